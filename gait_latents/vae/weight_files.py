"""Opens weight files of unknown origin without running what is in them.

A pickle can run any code when it is loaded, so it goes through torch's restricted unpickler. Classes of other programs
in it (callbacks, settings) are neither imported nor called: an inert stand-in takes the place of each. The tensors of
pickles and of safetensors are mapped from the file, so that only those that are used are read. Whatever is wrong with a
file becomes a UserError that names it.
"""

import gc
import pickle
import re
import stat
import struct
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gait_latents.common import hardware, shortage
from gait_latents.common.console import harmless
from gait_latents.common.errors import UserError, let_shortage_pass
from gait_latents.vae import containers, stand_ins
from gait_latents.vae.pickle_check import Refused

PICKLE_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".pkl")
SUFFIXES = (*PICKLE_SUFFIXES, ".safetensors")
MAX_HEADER_BYTES = (
    16_000_000  # enough for about 100,000 tensors; a larger header is refused, since parsing takes many times its size
)
# What torch and pickle raise for damaged or hostile bytes; MemoryError for sizes that the file only claims.
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


def read_weights(path: Path, *, trust_pickle: bool = False) -> Contents:
    """Returns what a weight file holds.

    Args:
        path: the file.
        trust_pickle: whether a pickle is opened by a torch with a known hole, too.

    Raises:
        UserError: where it cannot be read without running something, or without more memory than it accounts for.
    """
    kind = kind_of(path)
    if kind == "safetensors":
        return Contents(*_read_safetensors(path), ())
    tree, foreign = _read_pickle(path, is_zip=kind == "zip", trust_pickle=trust_pickle)
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
        size, free = path.stat().st_size, hardware.free_memory_bytes(torch.device("cpu"))
        if shortage.kind_of(error) == shortage.MEMORY and size > free:
            raise UserError(
                f"{path} has {size / 1e9:.1f} GB, and {free / 1e9:.1f} GB of memory are free; give a file with the VAE "
                "alone"
            ) from error
        let_shortage_pass(error)
        raise UserError(f"{path} is damaged or truncated ({error}); copy or download it again") from error


# --- pickles -----------------------------------------------------------------------------------------------


def _read_pickle(path: Path, *, is_zip: bool, trust_pickle: bool) -> tuple[Any, tuple[str, ...]]:
    """Returns the object in a pickle, and the names of the classes that stand-ins take the place of."""
    _check_torch_version(path, trust_pickle=trust_pickle)
    try:
        with _without_collecting():
            return _checked_and_read(path, is_zip=is_zip)
    except Refused as refusal:
        raise UserError(_why_refused(path, refusal)) from refusal
    except UNREADABLE as error:
        let_shortage_pass(error)  # the check has bounded what the file itself can take
        raise UserError(_why_unreadable(path, error)) from error


def _checked_and_read(path: Path, *, is_zip: bool) -> tuple[Any, tuple[str, ...]]:
    source = path if is_zip else containers.MappedFile(path)
    checked = containers.check_zip(path) if isinstance(source, Path) else containers.check_legacy(source)
    with _given(stand_ins.stand_ins(checked.known, checked.foreign)), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch warns of unusual protocols, which are harmless
        # Explicit, because TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1 defeats the default but not the argument.
        tree = torch.load(source, map_location="cpu", weights_only=True, mmap=is_zip)  # pyright: ignore
    return tree, tuple(checked.foreign)


@contextmanager
def _without_collecting() -> Iterator[None]:
    """Lets Python look for no garbage meanwhile: among millions of new objects that takes half of the time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@contextmanager
def _given(pairs: list[Any]) -> Iterator[None]:
    """Gives the unpickler these stand-ins, and for the while none of the classes that other code has given it."""
    before = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals(pairs)
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


def _check_torch_version(path: Path, *, trust_pickle: bool) -> None:
    version = tuple(int(number) for number in re.findall(r"\d+", torch.__version__)[:2])
    if version < (2, 6):
        raise UserError(
            f"torch {torch.__version__} can be made to run code by a pickle such as {path} (CVE-2025-32434); "
            "install torch 2.6 or newer, or give the weights as .safetensors"
        )
    if version < SAFE_TORCH and not trust_pickle:
        raise UserError(
            f"torch {torch.__version__} has a memory error in reading pickles (CVE-2026-24747), so {path} was not "
            f"opened; update torch to 2.10 or newer, or convert the file where torch is new ({CONVERT}), or, if you "
            "trust where it came from, add --trust_pickle"
        )


SAFE_TORCH = (2, 10)  # the first whose unpickler has no hole that is known
# One line that makes safetensors of the state dict in a checkpoint.
CONVERT = (
    """python -c "import torch as t, safetensors.torch as s; d = t.load('vae.pt', 'cpu', weights_only=True); """
    """s.save_file(d.get('model_state_dict', d.get('state_dict', d)), 'vae.safetensors')\""""
)


def _why_refused(path: Path, refusal: Refused) -> str:
    """Says what is wrong with a pickle or its container, and what to do."""
    if refusal.name:
        return holds_no_weight(path, refusal.name.removeprefix("builtins."))
    if isinstance(refusal, containers.Compressed):
        return f"{path} was compressed after torch.save made it; give the file that torch.save wrote"
    return (
        f"{path} cannot be read as a PyTorch checkpoint ({refusal}): it is damaged or truncated, or holds more than "
        "weights; copy or download it again, or save the weights alone: torch.save(model.state_dict(), 'vae.pt')"
    )


def _why_unreadable(path: Path, error: BaseException) -> str:
    """Says why torch refused or could not read a pickle, and what to do."""
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
    """Returns a text from a foreign file as it may be shown: short, and without control characters.

    Of a container its kind is shown: the text of a small one can be endless, where it holds the same again and again.
    """
    is_short = text is None or isinstance(text, str | int | float | BaseException)
    return harmless(str(text)[:200] if is_short else f"a {type(text).__name__}", one_line=True)


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


def check_tensors(path: Path, tensors: Mapping[str, Any]) -> None:
    """Raises UserError unless the weights of one model are as `check_tensor` says, and fit into file and memory."""
    for name, tensor in tensors.items():
        check_tensor(path, name, tensor)
    if sum(tensor.nbytes for tensor in tensors.values()) > path.stat().st_size:
        raise UserError(f"{path}: its weights together claim more bytes than the file holds; do not trust it")
    needed = 4 * sum(tensor.numel() for tensor in tensors.values())  # in float32, as they are used
    free = hardware.free_memory_bytes(torch.device("cpu"))
    if needed > free:
        raise UserError(
            f"{path}: its weights take {needed / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are free; give a "
            "smaller VAE, or end what else takes memory"
        )


def check_finite(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raises UserError, naming the first tensor that holds a NaN or an infinity."""
    for name, tensor in tensors.items():
        if not all(piece.float().isfinite().all() for piece in _pieces(tensor.detach())):
            raise UserError(f"{path}: {name} has values that are not finite; that training had broken down")


def _pieces(tensor: Tensor) -> Iterator[Tensor]:
    """Yields views of a tensor that are small enough to be copied without a thought."""
    if tensor.numel() <= _PIECE:
        yield tensor
        return
    axis = max(range(tensor.ndim), key=lambda axis: tensor.shape[axis])
    for half in tensor.tensor_split(2, dim=axis):
        yield from _pieces(half)


_PIECE = 1 << 24  # numbers
