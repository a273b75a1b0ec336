"""Opens weight files of unknown origin without running what is in them.

A pickle can run any code when it is loaded, so it goes through torch's restricted unpickler. The tensors of pickles
and of safetensors are mapped from the file, so that only those that are used are read. Whatever is wrong with a file
becomes a UserError that names it.
"""

import pickle
import re
import stat
import struct
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gait_latents.common.errors import UserError

PICKLE_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".pkl")
SUFFIXES = (*PICKLE_SUFFIXES, ".safetensors")
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


def read_weights(path: Path) -> tuple[Any, dict[str, str]]:
    """Returns what a checkpoint holds, its tensors not yet checked (`check_tensor`), and safetensors' metadata."""
    kind = kind_of(path)
    if kind == "safetensors":
        return _read_safetensors(path)
    return _read_pickle(path, is_zip=kind == "zip"), {}


def kind_of(path: Path) -> str:
    """Returns "safetensors", "zip" or "pickle" by the first bytes; raises UserError for others or a wrong ending."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise UserError(f"{path} is not a file")  # reading a named pipe would wait for ever
        with path.open("rb") as file:
            head = file.read(64)
    except OSError as error:
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
        raise UserError(f"{path} is damaged or truncated ({error}); copy or download it again") from error


# --- pickles -----------------------------------------------------------------------------------------------


def _read_pickle(path: Path, *, is_zip: bool) -> Any:
    _check_torch_version(path)
    if is_zip:
        _check_zip(path)
    try:
        with torch.serialization.safe_globals(_stand_ins()), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torch warns of unusual pickle protocols, which are harmless
            # Explicit, because TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1 defeats the default but not the argument.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except UNREADABLE as error:
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
    """Says why torch refused or could not read a pickle, and what to do."""
    refused = re.search(r"[Uu]nsupported (?:global: )?GLOBAL (\S+)", str(error))
    if refused:
        return (
            f"{path} holds {printable(refused[1])}, which is no weight and could run code, so it was not opened; "
            "where it was made, save the weights alone: torch.save(model.state_dict(), 'vae.pt')"
        )
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


def _number(dtype: Any, data: Any) -> Any:
    """Returns the number in a pickled numpy scalar, or its bytes where it is of another type."""
    code = dtype.args[0] if isinstance(dtype, Inert) and dtype.args else None
    formats = {"f2": "e", "f4": "f", "f8": "d", "i4": "i", "i8": "q", "u4": "I", "u8": "Q", "b1": "?"}
    if code not in formats or not isinstance(data, bytes):
        return data
    big_endian = isinstance(dtype.state, tuple) and ">" in dtype.state
    return struct.unpack((">" if big_endian else "<") + formats[code], data)[0]


def _stand_ins() -> list[Any]:
    """Returns (stand-in, name) for types besides tensors that training checkpoints often hold.

    The unpickler is not given the real numpy types: they were not made to be restored from hostile bytes, and only
    single numbers are needed from them.
    """
    inert = ["argparse.Namespace", "numpy.dtype", "numpy.ndarray"]
    for module in ("pathlib", "pathlib._local"):
        for kind in ("Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath"):
            inert.append(f"{module}.{kind}")
    pairs: list[Any] = [(Inert, name) for name in inert]
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
        pairs += [(Inert, f"{module}._reconstruct"), (_number, f"{module}.scalar")]
    pairs.append((_plain_dict, "collections.defaultdict"))
    return pairs + [(kind, f"builtins.{kind.__name__}") for kind in (list, dict, int, float)]


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
