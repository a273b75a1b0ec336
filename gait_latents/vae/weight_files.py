"""Opens weight files of unknown origin without running what is in them.

A pickle can run any code when it is loaded, so it goes through torch's restricted unpickler. Classes of other programs
in it (callbacks, settings) are neither imported nor called: an inert stand-in takes the place of each. The tensors of
pickles and of safetensors are mapped from the file, so that only those that are used are read. Whatever is wrong with a
file becomes a UserError that names it.
"""

import _compat_pickle
import pickle
import re
import stat
import struct
import sys
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gait_latents.common import shortage
from gait_latents.common.errors import UserError, let_shortage_pass

PICKLE_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".pkl")
SUFFIXES = (*PICKLE_SUFFIXES, ".safetensors")
_ROOM_RATIO = 3  # times its size, which a file of weights takes while it is read
MAX_HEADER_BYTES = (
    16_000_000  # enough for about 100,000 tensors; a larger header is refused, since parsing takes many times its size
)
# What torch, zipfile and pickle raise for damaged or hostile bytes; MemoryError for sizes that the file only claims.
UNREADABLE = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    pickle.UnpicklingError,
    struct.error,
    zipfile.BadZipFile,
)


class Contents(NamedTuple):
    """What a weight file holds.

    Attributes:
        tree: the object in it, its tensors not yet checked (`check_tensor`).
        metadata: the texts that safetensors keeps beside the tensors.
        foreign: names of classes in a pickle in whose place `tree` has stand-ins.
    """

    tree: Any
    metadata: dict[str, str]
    foreign: tuple[str, ...]


def read_weights(path: Path) -> Contents:
    """Returns what a weight file holds; raises UserError where it cannot be read without running something."""
    kind = kind_of(path)
    if kind == "safetensors":
        return Contents(*_read_safetensors(path), ())
    tree, foreign = _read_pickle(path, is_zip=kind == "zip")
    return Contents(tree, {}, foreign)


def kind_of(path: Path) -> str:
    """Returns "safetensors", "zip" or "pickle" by the first bytes; raises UserError for others or a wrong ending."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise UserError(f"{path} is not a file")  # reading a named pipe would wait for ever
        with path.open("rb") as file:
            head = file.read(64)
    except OSError as error:
        let_shortage_pass(error)
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    for kind, recognised in (
        ("zip", head.startswith(b"PK\x03\x04")),
        ("safetensors", head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= MAX_HEADER_BYTES),
        ("pickle", head.startswith(b"\x80")),
    ):
        if recognised:
            _check_suffix(path, kind)
            return kind
    raise UserError(f"{path} {_what_it_is(head)}")


def _what_it_is(head: bytes) -> str:
    if not head:
        return "is empty; copy or download it again"
    if head.startswith(b"version https://git-lfs"):
        return "is a Git-LFS pointer, not the weights; fetch them with `git lfs pull`"
    if head.lstrip().lower().startswith((b"<!", b"<html")):
        return "is a web page, not a checkpoint; download it again"
    return "is neither a PyTorch checkpoint nor a safetensors file"


def _check_suffix(path: Path, kind: str) -> None:
    suffix = path.suffix.lower()
    if kind == "safetensors" and suffix in PICKLE_SUFFIXES:
        raise UserError(f"{path} holds safetensors but is named {suffix}; rename it to end in .safetensors")
    if kind != "safetensors" and suffix == ".safetensors":
        raise UserError(f"{path} is named .safetensors but holds a PyTorch pickle; rename it to end in .pt")


# --- safetensors -------------------------------------------------------------------------------------------


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in list(file.keys())}, file.metadata() or {}
    except (SafetensorError, *UNREADABLE) as error:
        let_shortage_pass(error)
        raise UserError(f"{path} is damaged or truncated ({error}); copy or download it again") from error


# --- pickles -----------------------------------------------------------------------------------------------


def _read_pickle(path: Path, *, is_zip: bool) -> tuple[Any, tuple[str, ...]]:
    """Returns the object in a pickle, and the names of the classes that stand-ins take the place of."""
    _check_torch_version(path)
    if is_zip:
        _check_zip(path)
    foreign = ForeignClasses()
    while True:
        try:
            with torch.serialization.safe_globals(_stand_ins() + foreign.stand_ins()), warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # torch warns of unusual protocols, which are harmless
                # Explicit, because TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1 defeats the default but not the argument.
                return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip), foreign.names
        except UNREADABLE as error:
            if not foreign.learn(str(error)):
                raise UserError(_why_unreadable(path, error)) from error


def _check_torch_version(path: Path) -> None:
    version = tuple(int(number) for number in re.findall(r"\d+", torch.__version__)[:2])
    if version < (2, 6):
        raise UserError(
            f"torch {torch.__version__} can be made to run code by a pickle such as {path} (CVE-2025-32434); "
            "install torch 2.6 or newer, or give the weights as .safetensors"
        )
    if version < (2, 10):
        warnings.warn(
            f"torch {torch.__version__} has a memory error in reading pickles (CVE-2026-24747): "
            f"use {path} only if you trust where it came from",
            stacklevel=2,
        )


def _check_zip(path: Path) -> None:
    """Raises UserError unless the records of a zip are uncompressed, as torch writes them and can map them."""
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
    except UNREADABLE as error:
        raise UserError(f"{path} is damaged or truncated ({error}); copy or download it again") from error
    if any(record.compress_type != zipfile.ZIP_STORED for record in records):
        raise UserError(f"{path} was compressed after torch.save made it; give the file that torch.save wrote")
    if sum(record.file_size for record in records) > path.stat().st_size:
        raise UserError(f"{path} claims more bytes than it has; it is damaged or made to do harm")


def _why_unreadable(path: Path, error: BaseException) -> str:
    """Says why torch refused or could not read a pickle, and what to do.

    Raises:
        Shortage: where this machine, and not the file, is to blame; a file may claim any size and so lack memory, too.
    """
    kind = shortage.kind_of(error)
    if kind is not None and (kind != shortage.MEMORY or not shortage.has_room(_ROOM_RATIO * path.stat().st_size)):
        let_shortage_pass(error)
    refused = _REFUSED.search(str(error))
    if refused:
        return holds_no_weight(path, refused[1])
    unpickler = re.search(r"WeightsUnpickler error:\s*(.+)", str(error))
    if unpickler or str(error).startswith(
        "Weights only load failed"
    ):  # torch's own message advises to load without the restriction
        what = f" ({printable(unpickler[1])})" if unpickler else ""
        return (
            f"{path} cannot be read as a PyTorch checkpoint{what}: it is damaged, or holds more than weights; "
            "where it was made, save the weights alone: torch.save(model.state_dict(), 'vae.pt')"
        )
    reason = printable((str(error).splitlines() or [""])[0])
    return f"{path} cannot be read as a PyTorch checkpoint ({type(error).__name__}: {reason})"


def holds_no_weight(path: Path, name: str) -> str:
    """Says that a class in a file is no weight, and what to do."""
    return (
        f"{path} holds {printable(name)}, which is no weight and could run code, so it was not opened; "
        "where it was made, save the weights alone: torch.save(model.state_dict(), 'vae.pt')"
    )


def printable(text: Any) -> str:
    """Returns a text from a foreign file as it may be shown: short, and without control characters."""
    text = str(text)[:200]
    return text if text.isprintable() else text.encode("unicode_escape").decode()


class Inert:
    """Stands in the place of an object in a checkpoint that no weight depends on; keeps the arguments and the state."""

    args: tuple[Any, ...] = ()
    state: Any = None

    def __new__(cls, *args: Any) -> "Inert":
        inert = super().__new__(cls)
        inert.args = args
        return inert

    def __setstate__(self, state: Any) -> None:
        self.state = state


def _plain_dict(*_factory: Any) -> dict[Any, Any]:
    """Stands in the place of collections.defaultdict."""
    return {}


def _plain_list(*_: Any) -> list[Any]:
    """Stands in the place of collections.deque."""
    return []


def _inert_class(*_: Any) -> type[Inert]:
    """Stands in the place of getattr, by which pickles name members of enums and classes in classes."""
    return Inert


def _number(dtype: Any, data: Any) -> Any:
    """Returns the number in a pickled numpy scalar, or its bytes where it is of another type."""
    code = dtype.args[0] if isinstance(dtype, Inert) and dtype.args else None
    formats = {"f2": "e", "f4": "f", "f8": "d", "i4": "i", "i8": "q", "u4": "I", "u8": "Q", "b1": "?"}
    if code not in formats or not isinstance(data, bytes):
        return data
    big_endian = isinstance(dtype.state, tuple) and ">" in dtype.state
    return struct.unpack((">" if big_endian else "<") + formats[code], data)[0]


# What training checkpoints often hold of Python's own library. None of it is given to the unpickler, a stand-in is.
_INERT_OF_PYTHON = (
    "argparse.Namespace",
    "builtins.bool",
    "builtins.bytes",
    "builtins.frozenset",
    "builtins.object",
    "builtins.range",
    "builtins.slice",
    "builtins.str",
    "builtins.tuple",
    "builtins.type",
    "copyreg._reconstructor",
    "datetime.date",
    "datetime.datetime",
    "datetime.timedelta",
    "datetime.timezone",
    "decimal.Decimal",
    "functools.partial",
    "logging.getLogger",
    "re._compile",
    "types.SimpleNamespace",
    "typing.Any",
    "typing.Optional",
    "typing.Union",
    "uuid.UUID",
)


def _stand_ins() -> list[Any]:
    """Returns (stand-in, name) for types besides tensors that training checkpoints often hold.

    The unpickler is not given the real numpy types: they were not made to be restored from hostile bytes, and only
    single numbers are needed from them.
    """
    inert = ["numpy.dtype", "numpy.ndarray", *_INERT_OF_PYTHON]
    for module in ("pathlib", "pathlib._local"):
        for kind in ("Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath"):
            inert.append(f"{module}.{kind}")
    pairs: list[Any] = [(Inert, name) for name in inert]
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
        pairs += [(Inert, f"{module}._reconstruct"), (_number, f"{module}.scalar")]
    pairs += [(_plain_dict, "collections.defaultdict"), (_plain_list, "collections.deque")]
    pairs.append((_inert_class, "builtins.getattr"))
    return pairs + [(kind, f"builtins.{kind.__name__}") for kind in (list, dict, int, float)]


_REFUSED = re.compile(r"[Uu]nsupported (?:global: )?GLOBAL (\S+)")
_MOST_FOREIGN = 100  # each costs one more pass over the pickle


class ForeignClasses:
    """Stand-ins for classes of other programs, found one by one from what torch refuses.

    A stand-in keeps what it is given and does nothing. Of Python's own library only the names listed above are taken:
    a checkpoint needs no others, and those that run code are there.
    """

    def __init__(self) -> None:
        self._kinds: dict[str, Any] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the classes, in the order in which they were met."""
        return tuple(self._kinds)

    def stand_ins(self) -> list[Any]:
        """Returns (stand-in, name) for each class met so far."""
        return [(kind, name) for name, kind in self._kinds.items()]

    def learn(self, error: str) -> bool:
        """Takes up the class that an error of torch is about; False where it is about none, or about none to be had."""
        misfit = re.search(r"_StandIn(\d+)\b", error)
        name = self.names[int(misfit[1])] if misfit and int(misfit[1]) < len(self._kinds) else ""
        if misfit and issubclass(self._kinds.get(name, int), Inert):  # it got items, as a subclass of dict or list does
            self._kinds[name] = _items_stand_in(list if "append" in error else OrderedDict)
            return True
        refused = _REFUSED.search(error)
        name = refused[1] if refused else ""
        module, dot, _ = name.partition(".")
        # torch names builtins without their module; protocol 2 has the names of Python 2 for what has moved since then.
        is_of_python = not dot or module in sys.stdlib_module_names or module in _compat_pickle.IMPORT_MAPPING
        if is_of_python or name in self._kinds or len(self._kinds) >= _MOST_FOREIGN:
            return False
        self._kinds[name] = type(f"_StandIn{len(self._kinds)}", (Inert,), {})
        return True


def _items_stand_in(container: type) -> type:
    """Returns a stand-in whose instances are plain containers, which take items."""

    class Items:
        def __new__(cls, *_: Any) -> Any:
            return container()

    return Items


# --- the tensors -------------------------------------------------------------------------------------------


def check_tensor(path: Path, name: str, tensor: Any) -> None:
    """Raises UserError unless a tensor is dense, floating-point, and has as many bytes in the file as it claims."""
    if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.device.type != "cpu":
        raise UserError(f"{path}: {name} is not a plain tensor")
    if not tensor.is_floating_point():
        raise UserError(f"{path}: {name} holds {tensor.dtype}, not floating-point weights")
    claimed = tensor.numel() * tensor.element_size()
    if claimed > min(tensor.untyped_storage().nbytes(), path.stat().st_size):
        raise UserError(f"{path}: {name} claims {claimed:,} bytes, more than the file holds; do not trust it")


def check_finite(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raises UserError, naming the first tensor that holds a NaN or an infinity."""
    for name, tensor in tensors.items():
        if not tensor.detach().float().isfinite().all():
            raise UserError(f"{path}: {name} has values that are not finite; that training had broken down")
