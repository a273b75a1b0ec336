"""The two containers in which torch.save keeps a pickle and the storages of its tensors, checked before use.

- A zip archive: `data.pkl`, one record per storage, and a few bytes of facts, all uncompressed. Its directory is read
  here, with limits, because torch's reader and Python's read the whole of what a file claims, and may differ in what
  they take for it. Taken is what both understand alike and torch.save writes.
- The older form: five pickles in a row (a number, a version, facts, the object, the keys of the storages), and then
  the storages, which torch reads into memory.
"""

import io
import mmap
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from gait_latents.common import hardware
from gait_latents.vae.pickle_check import MAX_PICKLE_BYTES, Checked, Refused, check_pickle

MAX_DIRECTORY_BYTES = 32 << 20  # some 300,000 records
_MAX_FACT_BYTES = 1024  # of a record that is neither the pickle nor a storage, such as the version
_MAGIC, _VERSION = 0x1950A86A20F9469CFC6C, 1001  # with which the older form begins


class Record(NamedTuple):
    """A record of an archive: where its header begins, and the bytes of its content."""

    offset: int
    size: int


# --- zip archives ------------------------------------------------------------------------------------------


def check_zip(path: Path) -> Checked:
    """Looks at an archive and the pickle in it; raises Refused."""
    size = path.stat().st_size
    with path.open("rb") as file:
        records = read_directory(file, size)
    root = next(iter(records)).partition("/")[0]
    own = {name.removeprefix(f"{root}/"): found for name, found in records.items() if name.startswith(f"{root}/")}
    if "data.pkl" not in own:
        raise Refused("it has no data.pkl")
    if own["data.pkl"].size > MAX_PICKLE_BYTES:
        raise Refused(f"its pickle has more than {MAX_PICKLE_BYTES >> 20} MiB")
    for name, found in own.items():
        if name != "data.pkl" and not name.startswith("data/") and found.size > _MAX_FACT_BYTES and _is_read(name):
            raise Refused(f"its record {name} has more than {_MAX_FACT_BYTES:,} bytes")
    reader = torch._C.PyTorchFileReader(str(path))
    data = reader.get_record("data.pkl")  # the very bytes that torch will read
    storages = {name.removeprefix("data/"): found.size for name, found in own.items() if name.startswith("data/")}
    checked = check_pickle(data, records=storages)
    if "byteorder" in own and reader.get_record("byteorder") != b"little":
        check_memory(sum(checked.storages.values()))  # each is copied to turn its bytes round
    return checked


def _is_read(name: str) -> bool:
    """Says whether torch reads a record that is neither the pickle nor a storage; others may be of any size."""
    return name in ("byteorder", "version") or name.startswith(".")


def read_directory(file: io.BufferedReader, size: int) -> dict[str, Record]:
    """Returns the records of an archive by name, in the order of its directory; raises Refused unless torch wrote it.

    Args:
        file: the archive.
        size: its length in bytes.
    """
    start, length, count = _find_directory(file, size)
    if length > MAX_DIRECTORY_BYTES:
        raise Refused(f"its directory has more than {MAX_DIRECTORY_BYTES >> 20} MiB")
    file.seek(start)
    data = file.read(length)
    records: dict[str, Record] = {}
    seen: set[str] = set()
    at = 0
    for _ in range(count):
        at, name, found = _read_entry(data, at)
        if name.lower() in seen:  # torch's reader does not tell large letters from small ones
            raise Refused("two of its records have one name")
        seen.add(name.lower())
        records[name] = found
    if at != len(data) or not records:
        raise Refused("its directory is not whole")
    _check_places(records, end=start)
    return records


_END, _END64, _LOCATOR = struct.Struct("<4s4H2IH"), struct.Struct("<4sQ2H2I4Q"), struct.Struct("<4sIQI")
_ENTRY = struct.Struct("<4s6H3I5H2I")
_ALL16, _ALL32 = 0xFFFF, 0xFFFFFFFF


def _find_directory(file: io.BufferedReader, size: int) -> tuple[int, int, int]:
    """Returns where the directory begins, its bytes, and the number of its records."""
    tail_size = min(size, _END.size + _LOCATOR.size + _END64.size)
    file.seek(size - tail_size)
    tail = file.read(tail_size)
    if len(tail) < _END.size or tail[-_END.size :][:4] != b"PK\5\6":
        raise Refused("it does not end like an archive of torch.save")
    _, disk, first_disk, here, count, length, start, comment = _END.unpack(tail[-_END.size :])
    if disk or first_disk or here != count or comment:
        raise Refused("it does not end like an archive of torch.save")
    end = size - _END.size
    if tail[-_END.size - _LOCATOR.size : -_END.size][:4] == b"PK\6\7":
        facts = (count, length, start)
        end, start, length, count = _read_end64(tail, end)
        if facts != (min(count, _ALL16), min(length, _ALL32), min(start, _ALL32)):
            raise Refused("its two ends differ")
    if start + length != end:
        raise Refused("its directory is not where it should be")
    return start, length, count


def _read_end64(tail: bytes, end: int) -> tuple[int, int, int, int]:
    """Returns where the end of a large archive begins, and where its directory does, its bytes, its records."""
    body = tail[: -_END.size]
    _, disk, place, disks = _LOCATOR.unpack(body[-_LOCATOR.size :])
    body, end = body[: -_LOCATOR.size], end - _LOCATOR.size - _END64.size
    if len(body) < _END64.size or disk or disks != 1 or place != end:
        raise Refused("its second end is not where it should be")
    found, size, _, _, disk, first_disk, here, count, length, start = _END64.unpack(body[-_END64.size :])
    if found != b"PK\6\6" or size != _END64.size - 12 or disk or first_disk or here != count:
        raise Refused("its second end is damaged")
    return end, start, length, count


def _read_entry(data: bytes, at: int) -> tuple[int, str, Record]:
    """Reads one entry of a directory; returns where the next begins, its name, and its record."""
    if at + _ENTRY.size > len(data):
        raise Refused("its directory is not whole")
    (mark, _, _, flags, method, _, _, _, packed, size, name_size, extra_size, comment, disk, _, _, offset) = (
        _ENTRY.unpack_from(data, at)
    )
    begin = at + _ENTRY.size
    name, extra = data[begin : begin + name_size], data[begin + name_size : begin + name_size + extra_size]
    if mark != b"PK\1\2" or len(extra) != extra_size or comment or disk or flags & 1:
        raise Refused("its directory is damaged")
    if method:
        raise Compressed
    sizes = _large_sizes(extra, [size, packed, offset])
    if sizes[0] != sizes[1] or not name.isascii() or not name.decode("ascii").isprintable():
        raise Refused("its directory is damaged")
    return begin + name_size + extra_size, name.decode("ascii"), Record(sizes[2], sizes[0])


class Compressed(Refused):
    """The records of an archive were compressed by another program."""

    def __init__(self) -> None:
        super().__init__("its records are compressed")


def _large_sizes(extra: bytes, sizes: list[int]) -> list[int]:
    """Puts the numbers of 64 bits that a field of an entry holds in the place of those that do not fit into 32."""
    while len(extra) >= 4 and _ALL32 in sizes:
        kind, length = struct.unpack_from("<2H", extra)
        body, extra = extra[4 : 4 + length], extra[4 + length :]
        if kind == 1:
            for index, number in enumerate(sizes):
                if number == _ALL32 and len(body) >= 8:
                    sizes[index], body = int.from_bytes(body[:8], "little"), body[8:]
            break
    return sizes


def _check_places(records: Mapping[str, Record], end: int) -> None:
    """Raises Refused unless the records lie one after the other before `end`."""
    last = 0
    for found in sorted(records.values()):
        if found.offset < last:
            raise Refused("two of its records lie in one place")
        last = found.offset + 30 + found.size  # after a header of at least 30 bytes
    if last > end:
        raise Refused("it claims more bytes than it has")


# --- the older form ----------------------------------------------------------------------------------------


class MappedFile:
    """A file in the older form, mapped; what was checked is what torch reads.

    It has no number of an open file. With one, torch would first try whether the file is a tar archive, and would read
    whole storages without listening to Ctrl-C.
    """

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            self.data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def read(self, count: int = -1) -> bytes:
        """Reads on."""
        return self.data.read(None if count < 0 else count)

    def readline(self) -> bytes:
        """Reads to the end of a line."""
        return self.data.readline()

    def seek(self, place: int, whence: int = 0) -> int:
        """Goes to a place."""
        self.data.seek(place, whence)  # pyright: ignore[reportArgumentType]
        return self.data.tell()

    def tell(self) -> int:
        """Returns the place."""
        return self.data.tell()


def check_legacy(file: MappedFile) -> Checked:
    """Looks at all pickles of a file in the older form, and at the storages after them; raises Refused."""
    data = file.data
    none: dict[str, int] = {}
    magic = check_pickle(data, records=none)
    if magic.value != _MAGIC:
        raise Refused("it does not begin as torch.save does")
    version = check_pickle(data, magic.end, records=none)
    if version.value != _VERSION:
        raise Refused("its version is unknown")
    facts = check_pickle(data, version.end, records=none)
    checked = check_pickle(data, facts.end)
    keys = check_pickle(data, checked.end, records=none)
    named = getattr(keys.value, "items", None)
    if not isinstance(named, list) or not all(type(key) is str for key in named):
        raise Refused("it does not list its storages")
    if sorted(named) != sorted(checked.storages):
        raise Refused("it lists other storages than it has")
    wanted = sum(checked.storages.values())
    if keys.end + wanted + 8 * len(named) > len(data):
        raise Refused("a storage of a tensor claims more bytes than the file has")
    check_memory(wanted)
    return checked


def check_memory(num_bytes: int) -> None:
    """Raises Refused where so many bytes of a file, which torch reads whole, do not fit into the memory."""
    free = hardware.free_memory_bytes(torch.device("cpu"))
    if num_bytes > free:
        raise Refused(f"it has {num_bytes / 1e9:.1f} GB of tensors to be read whole, and {free / 1e9:.1f} GB are free")
