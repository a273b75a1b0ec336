"""One checkpoint file: tensors and plain values, published whole, and trusted only after its checksum.

It is a safetensors file. Its metadata hold a format number, `meta` as JSON, and the SHA-256 over meta and all tensors.
Reading one never executes anything from it.
"""

import errno
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from gait_latents.common import files, json_text
from gait_latents.common.errors import UserError, let_shortage_pass

FORMAT = 1
_HEADER_BYTES = 4 << 20  # a larger header is refused unread
_NAMES = {  # what safetensors calls the number formats that a checkpoint may hold
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class DamagedCheckpoint(Exception):
    """A file is no whole checkpoint; the text names it and says why."""


def save(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    meta: Mapping[str, Any],
    *,
    below: str | os.PathLike[str] | None = None,
) -> None:
    """Publishes tensors of any device, and `meta`, as one file.

    Args:
        path: where to; a file of that name is replaced once the new one is whole.
        tensors: {name: tensor}; no two may share memory.
        meta: plain values as JSON knows them; tuples come back as lists.
        below: as in `files.publish`.

    Raises:
        OSError: when the file cannot be published; what was there is untouched.
        ValueError: for shared tensors or other number formats, and for NaN or infinity in `meta`.
        TypeError: for anything in `meta` that JSON does not know.
    """
    _check_storable(tensors)
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json_text.canonical(meta)
    facts = {"format": str(FORMAT), "meta": text, "sha256": _checksum(stored, text)}
    # Written from where the tensors lie. safetensors.torch.save would hold all of it twice more, and its save_file puts
    # a file of its own in place, with mode 0600 and no errno when that fails; both shuffle the metadata.
    order = sorted(stored, key=lambda name: (-stored[name].element_size(), name))  # keeps each tensor aligned
    header = _header({name: stored[name] for name in order}, facts)
    files.publish(path, [header, *(_bytes(stored[name]) for name in order)], below=below)


def load(path: str | os.PathLike[str], *, follow_link: bool = False) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads a file that `save` made; returns its tensors, on the CPU, and meta.

    Args:
        follow_link: as in `files.open_file`.

    Raises:
        DamagedCheckpoint: when it is not what `save` wrote.
        UserError: when it has another format number.
        OSError: when it cannot be read.
    """
    path = Path(path)
    try:
        facts, data = _read(path, follow_link=follow_link)
        tensors = safetensors.torch.load(data)
    except (SafetensorError, _Unreadable) as error:
        raise DamagedCheckpoint(f"{path}: {str(error)[:100]}") from None
    except (AssertionError, LookupError, RuntimeError, TypeError, ValueError) as error:  # of safetensors.torch
        let_shortage_pass(error)
        what = f"{type(error).__name__}: {error}"[:60]
        raise DamagedCheckpoint(f"{path}: it holds a tensor of an impossible type or shape ({what})") from None
    except MemoryError:
        raise OSError(errno.ENOMEM, "it is larger than the memory that is free", str(path)) from None
    return tensors, _checked_meta(path, tensors, facts)


def _header(tensors: Mapping[str, Tensor], facts: Mapping[str, str]) -> bytes:
    """Builds the start of a safetensors file that holds the tensors one after the other."""
    table: dict[str, Any] = {"__metadata__": facts}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        table[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    # In the order of the tensors, which canonical JSON would not keep.
    header = json_text.safetensors_header(json.dumps(table, separators=(",", ":")))
    if len(header) - 8 > _HEADER_BYTES:
        raise ValueError(f"names and meta need {len(header) - 8} bytes, and {_HEADER_BYTES} can be read back")
    return header


def _bytes(tensor: Tensor) -> memoryview:
    """Views a contiguous CPU tensor as its bytes."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else memoryview(b"")


class _Unreadable(Exception):
    """A file cannot have been written by `save`; the text says why."""


def _read(path: Path, *, follow_link: bool) -> tuple[dict[str, str], bytes]:
    """Returns the metadata and the content of a file that is as long as the tensors that it lists.

    Both are checked before anything is read: a few bytes may claim to be terabytes, and a sparse file may have
    terabytes of nothing behind a few bytes.
    """
    with files.reading(path, follow_link=follow_link) as file:
        start = _start(file)
        if _header_length(start) > _HEADER_BYTES:
            raise _Unreadable("it does not begin like a checkpoint")
        facts, num_bytes = _listed(start[8:])
        if num_bytes != os.fstat(file.fileno()).st_size - len(start):
            raise _Unreadable("it is not as long as the tensors that it lists")
        file.seek(0)
        return facts, file.read()


def _listed(header: bytes) -> tuple[dict[str, str], int]:
    """Returns the metadata of a header, and how many bytes the tensors take that it lists; raises _Unreadable."""
    try:
        table = json_text.parse(header)
        assert isinstance(table, dict)
        facts = table.pop("__metadata__", {})
        ends = [entry["data_offsets"][1] for entry in table.values()]
        return dict(facts), max(ends, default=0)
    except (AssertionError, LookupError, TypeError, ValueError) as error:
        raise _Unreadable(f"its header cannot be read ({type(error).__name__}: {str(error)[:60]})") from None


def _start(file: BinaryIO) -> bytes:
    """Reads the length of the header and the header, as far as it is not too long."""
    length = file.read(8)
    return length + file.read(min(_header_length(length), _HEADER_BYTES))


def _header_length(data: bytes) -> int:
    return int.from_bytes(data[:8], "little")


def stamp(path: Path, *, follow_link: bool = False) -> str:
    """Returns a digest of the header, which no other save has; the file need not be whole. Raises OSError."""
    with files.reading(path, follow_link=follow_link) as file:
        return hashlib.sha256(_start(file)).hexdigest()  # the header holds the checksum of all the rest


def _checked_meta(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, str]) -> dict[str, Any]:
    """Returns the meta of a file whose checksum holds; raises DamagedCheckpoint or UserError."""
    if not {"meta", "sha256"} & facts.keys():
        raise DamagedCheckpoint(f"{path}: no training run wrote it; it may be a VAE or an exported model")
    number, text = facts.get("format", ""), facts.get("meta", "")
    is_intact = _checksum(tensors, text) == facts.get("sha256")
    # Where our checksum holds and the number alone is another, the number is what was damaged.
    if number.isdecimal() and number != str(FORMAT) and not is_intact:
        raise UserError(
            f"{path} has format {number[:20]}, and this version reads {FORMAT}; use the version that wrote it, "
            "or another folder"
        )
    if not is_intact or number != str(FORMAT):
        raise DamagedCheckpoint(f"{path}: its content does not match its checksum")
    try:
        meta = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DamagedCheckpoint(f"{path}: its meta cannot be read: {str(error)[:100]}") from None
    if not isinstance(meta, dict):
        raise DamagedCheckpoint(f"{path}: its meta are not an object")
    return meta


def _checksum(tensors: Mapping[str, Tensor], meta_text: str) -> str:
    """Returns the SHA-256 over meta, then names, types and shapes, then the bytes of contiguous CPU tensors."""
    names = sorted(tensors)
    table = [[name, str(tensors[name].dtype), list(tensors[name].shape)] for name in names]
    whole = hashlib.sha256(json_text.canonical([meta_text, table]).encode())
    for name in names:
        whole.update(_bytes(tensors[name]))
    return whole.hexdigest()


def _check_storable(tensors: Mapping[str, Tensor]) -> None:
    owners: dict[tuple[torch.device, int], str] = {}
    for name, tensor in tensors.items():
        if tensor.dtype not in _NAMES:
            raise ValueError(f"{name} is {tensor.dtype}, which a checkpoint does not hold")
        if tensor.numel():
            owner = owners.setdefault((tensor.device, tensor.untyped_storage().data_ptr()), name)
            if owner != name:
                raise ValueError(f"{owner} and {name} share memory; keep one of them")
