"""One shard of a cache: a safetensors file of rows, each with its key and its seal.

A shard of n rows holds `seals` uint32 [n], `moments` float16 [n 2C h w] and `keys` uint8 [n 32], in this order. The
seal of a row is the CRC-32 over space id, key and moments: whoever reads a row checks it, so that damage is noticed and
moments are never taken for those of another image or space. The metadata in the header name the space, and for each row
the image that it was made from and how it was made (precision, device, versions).

A shard is never changed. Its name is the start of the SHA-256 of its content.
"""

import errno
import hashlib
import itertools
import os
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gait_latents.common import files, json_text
from gait_latents.latents.space import FORMAT, Space

SHARD_BYTES = 64 << 20  # moments in a full shard
_HEADER_BYTES = 1 << 20  # a larger header is refused unread, since parsing takes twenty times its size in memory
_LARGEST_SHARD_BYTES = 16 * SHARD_BYTES  # a larger file is no shard; its seals and keys alone could fill the memory
_READ_BYTES = 8 << 20  # neighbouring rows are read together, up to this much at once
_SHARD_NAME = re.compile(r"[0-9a-f]{32}\.safetensors")
_SPACE_NAME = re.compile(r"[0-9a-f]{16}")
KEY_BYTES, SEAL_BYTES = 32, 4


class Invalid(Exception):
    """A file is no shard of the space in question; `str()` is the reason."""


class Row(NamedTuple):
    """A row in memory, on its way to a shard.

    Attributes:
        moments: float16 [2C h w].
        name: what to call the image in messages.
        record: how the moments were made: precision, device, versions.
        since: when the row came, in seconds of the monotonic clock.
    """

    moments: np.ndarray
    name: str
    record: dict
    since: float = 0.0


@dataclass
class Shard:
    """Where the rows of a shard lie; no file is kept open.

    Attributes:
        path: the file.
        size: its length in bytes.
        moments_offset: where the moments of the first row begin in it.
        keys: of the rows, uint8 [n 32].
        seals: of the rows, uint32 [n].
        bad: marks the rows that were found damaged, bool [n].
    """

    path: Path
    size: int
    moments_offset: int
    keys: np.ndarray
    seals: np.ndarray
    bad: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.bad = np.zeros(len(self.keys), dtype=bool)

    def __len__(self) -> int:
        return len(self.keys)


def _layout(count: int, space: Space) -> dict[str, dict]:
    """Returns the table of tensors in the header of a shard of `count` rows, in the order in which they are written."""
    shapes = {"seals": ("U32", [count]), "moments": ("F16", [count, *space.moments_shape])}
    shapes["keys"] = ("U8", [count, KEY_BYTES])
    sizes = (SEAL_BYTES * count, space.row_bytes * count, KEY_BYTES * count)
    ends = list(itertools.accumulate(sizes))
    return {
        name: {"dtype": dtype, "shape": shape, "data_offsets": [end - size, end]}
        for (name, (dtype, shape)), size, end in zip(shapes.items(), sizes, ends, strict=True)
    }


def expected_bytes(space: Space, count: int) -> int:
    """Returns about how much `count` latents take on disk, with their keys, seals and names."""
    return count * (space.row_bytes + 64)


def header_bytes(space: Space, count: int, names: list[str], records: list) -> bytes:
    """Returns how the file of a shard begins: the length of its header, and the header.

    Args:
        space: of the rows.
        count: how many rows there are.
        names: what to call the image of each row. They only help messages, and are left out where they do not fit.
        records: [number of rows, how they were made] for each run of rows that were made alike.

    Raises:
        ValueError: when the records do not fit.
    """
    for kept in (names, []):
        metadata = {"format": str(FORMAT), "space": space.text}
        metadata |= {"names": json_text.canonical(kept), "records": json_text.canonical(records)}
        header = json_text.safetensors_header(json_text.canonical({"__metadata__": metadata, **_layout(count, space)}))
        if len(header) - 8 <= _HEADER_BYTES:
            return header
    raise ValueError("the record of how the rows were made is too long for a shard")


def _check_header(text: bytes, data_bytes: int, space: Space) -> tuple[dict[str, str], int]:
    """Returns (metadata, number of rows) of a header; raises Invalid unless it is one that `header_bytes` builds."""
    count, rest = divmod(data_bytes, SEAL_BYTES + space.row_bytes + KEY_BYTES)
    try:
        header = json_text.parse(text)
        metadata = header.pop("__metadata__", None) if isinstance(header, dict) else None
        table = json_text.canonical(header)
    except (ValueError, RecursionError) as error:
        raise Invalid(f"its header cannot be read ({str(error)[:60]})") from None
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise Invalid("its header has no metadata")
    if metadata.get("format") != str(FORMAT):
        raise Invalid(f"its format is {str(metadata.get('format'))[:20]}, and this version reads {FORMAT}")
    if metadata.get("space") != space.text:
        raise Invalid("it belongs to another space")
    # Compared as text, since in Python 1 equals True and 1.0.
    if rest or table != json_text.canonical(_layout(count, space)):
        raise Invalid("its length or its table of tensors is not that of a shard")
    return metadata, count


@contextmanager
def open_to_read(path: Path) -> Iterator[tuple[int, int]]:
    """Opens the file of a shard; gives (descriptor, size in bytes). Raises OSError, also for a link."""
    try:
        descriptor = files.open_file(path)
        try:
            yield descriptor, os.fstat(descriptor).st_size
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno == errno.ESTALE:  # how NFS says that the file was removed
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path)) from None
        raise


def _read_at(descriptor: int, count: int, offset: int) -> bytearray:
    """Reads exactly `count` bytes; raises Invalid where the file ends before, OSError.

    The file is not mapped into memory: an error of the disk would then kill the process with a signal.
    """
    data = bytearray(count)
    view, done = memoryview(data), 0
    while done < count:
        got = os.preadv(descriptor, [view[done:]], offset + done)
        if got == 0:
            raise Invalid("it ends too early")
        done += got
    return data


def read_header(descriptor: int, size: int) -> bytes:
    """Reads the header of an open shard of `size` bytes; raises Invalid where it cannot be one, OSError."""
    if size < 8:
        raise Invalid("it is empty" if size == 0 else "it ends too early")
    length = int.from_bytes(_read_at(descriptor, 8, 0), "little")
    if length > min(_HEADER_BYTES, size - 8):
        raise Invalid("its header is longer than the file or than any shard's")
    return bytes(_read_at(descriptor, length, 8))


def open_shard(path: Path, space: Space) -> tuple[Shard, dict[str, str]]:
    """Reads and checks all of a shard but its moments; returns it and its metadata. Raises Invalid, OSError."""
    with open_to_read(path) as (descriptor, size):
        if size > max(_LARGEST_SHARD_BYTES, 2 * space.row_bytes):
            raise Invalid("it is larger than any shard")
        text = read_header(descriptor, size)
        start = 8 + len(text)
        metadata, count = _check_header(text, size - start, space)
        seals = np.frombuffer(_read_at(descriptor, SEAL_BYTES * count, start), dtype="<u4")
        keys = _read_at(descriptor, KEY_BYTES * count, size - KEY_BYTES * count)
    key_rows = np.frombuffer(keys, dtype=np.uint8).reshape(count, KEY_BYTES)
    return Shard(path, size, start + SEAL_BYTES * count, key_rows, seals), metadata


def seal_rows(space: Space, keys: np.ndarray, moments: np.ndarray) -> np.ndarray:
    """Returns the seals uint32 [n] of rows with keys uint8 [n 32] and contiguous moments float16 [n 2C h w]."""
    start = zlib.crc32(space.id.encode())
    size = space.row_bytes
    key_bytes, row_bytes = keys.tobytes(), moments.reshape(-1).view(np.uint8).data
    seals = [
        zlib.crc32(
            row_bytes[i * size : (i + 1) * size],
            zlib.crc32(key_bytes[i * KEY_BYTES : (i + 1) * KEY_BYTES], start),
        )
        for i in range(len(keys))
    ]
    return np.array(seals, dtype="<u4")


def sealed_rows(shard: Shard, rows: np.ndarray, space: Space) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Reads the given rows (ascending, no repeats) of a shard in runs of neighbours.

    Yields (row numbers [m], moments float16 [m 2C h w], whether the seal of each fits bool [m]).

    Raises:
        FileNotFoundError: when the shard is gone.
        Invalid, OSError: when it cannot be read any further.
    """
    size = space.row_bytes
    longest = max(1, _READ_BYTES // size)
    with open_to_read(shard.path) as (descriptor, _):
        for run in np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1):
            for begin in range(0, len(run), longest):
                some = run[begin : begin + longest]
                data = _read_at(descriptor, len(some) * size, shard.moments_offset + int(some[0]) * size)
                moments = np.frombuffer(data, dtype="<f2").reshape(len(some), *space.moments_shape)
                yield some, moments, seal_rows(space, shard.keys[some], moments) == shard.seals[some]


def keys_of_rows(keys: Sequence[str]) -> np.ndarray:
    """Turns hex keys into uint8 [n 32]; raises ValueError for anything else."""
    joined = "".join(keys)
    if any(len(key) != 2 * KEY_BYTES for key in keys) or joined != joined.lower():
        raise ValueError("a key is 64 lower-case hexadecimal digits")
    rows = np.frombuffer(bytes.fromhex(joined), dtype=np.uint8)
    if rows.size != KEY_BYTES * len(keys):  # fromhex skips spaces
        raise ValueError("a key is 64 lower-case hexadecimal digits")
    return rows.reshape(-1, KEY_BYTES)


def keys_as_hex(rows: np.ndarray) -> list[str]:
    """Turns keys uint8 [n 32] into n texts of 64 hex digits."""
    joined = rows.tobytes().hex()
    return [joined[i : i + 2 * KEY_BYTES] for i in range(0, len(joined), 2 * KEY_BYTES)]


def list_shards(space_folder: Path) -> list[Path]:
    """Returns the files named like shards, in the order of their names; none if the folder does not exist.

    Raises:
        OSError: when the folder cannot be listed, or is a link, which may lead out of the cache.
    """
    if not _SPACE_NAME.fullmatch(space_folder.name) or not space_folder.is_dir():
        return []
    files.refuse_links(space_folder / "any", below=space_folder.parent)
    with os.scandir(space_folder) as entries:
        return sorted(space_folder / entry.name for entry in entries if _SHARD_NAME.fullmatch(entry.name))


def problem(path: Path, error: Exception) -> str:
    """Says in one line what is wrong with a shard."""
    reason = error.strerror or str(error) if isinstance(error, OSError) else str(error)
    return f"{path}: {reason}; its rows count as missing"


def digest(parts: Sequence[bytes | memoryview]) -> str:
    """Returns the SHA-256, in hex, of a file that consists of these parts."""
    whole = hashlib.sha256()
    for part in parts:
        whole.update(part)
    return whole.hexdigest()


def row_facts(metadata: Mapping[str, str], count: int) -> tuple[list[str], list[dict]]:
    """Returns the name and the record of each row; empty ones where the header has none that can be read."""
    names = _parse_or_none(metadata.get("names"))
    if not isinstance(names, list) or len(names) != count or not all(isinstance(name, str) for name in names):
        names = [""] * count
    return names, [record for length, record in record_runs(metadata, count) for _ in range(length)]


def record_runs(metadata: Mapping[str, str], count: int) -> list[tuple[int, dict]]:
    """Returns (number of rows, how they were made) for each run of equal rows of a shard."""
    runs = _parse_or_none(metadata.get("records"))
    if isinstance(runs, list) and all(_is_run(run) for run in runs) and sum(run[0] for run in runs) == count:
        return [(length, record) for length, record in runs]
    return [(count, {})]


def _is_run(run: object) -> bool:
    return isinstance(run, list) and len(run) == 2 and type(run[0]) is int and run[0] > 0 and isinstance(run[1], dict)


def _parse_or_none(text: str | None) -> object:
    try:
        return json_text.parse(text or "")
    except ValueError:
        return None
