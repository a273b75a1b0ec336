"""The on-disk cache of moments: spaces, sealed shards, the manifest, and a check of it all.

    latents_cache/
      manifest.json                    settings of the last preprocess, and the space that it filled
      9f2c41d07a3b5e88/                one folder per space
        11c3...5c45.safetensors        one immutable shard, named by the SHA-256 of its content

A shard holds `seals` uint32 [n], `moments` float16 [n 2C h w] and `keys` uint8 [n 32]. A seal is the CRC-32 over
space id, key and row, so that a row is served only as what it was stored as; anything else is a miss. Of several
copies of a row the first valid one counts, in the order of the shards' names. Callers write a key as 64 hex digits.
"""

import errno
import hashlib
import itertools
import json
import math
import os
import re
import stat
import time
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

import durable
import json_text
from config import UserError

FORMAT = 1
SHARD_BYTES = 64 << 20  # moments in a full shard
SHARD_SECONDS = 60.0  # how long a row may wait in memory
MANIFEST_NAME = "manifest.json"
_HEADER_BYTES = 1 << 20  # a larger header is refused unread: parsing takes twenty times its memory
_LARGEST_SHARD_BYTES = 16 * SHARD_BYTES  # what is larger is no shard: its seals and keys alone could fill the memory
_LARGEST_MANIFEST_BYTES = 16 << 20
_LISTINGS = 5  # times to look again when a merge removes what the listing of a folder names
_READ_BYTES = 8 << 20  # at most this much of neighbouring rows in one read
_SHARD_NAME = re.compile(r"[0-9a-f]{32}\.safetensors")
_SPACE_NAME = re.compile(r"[0-9a-f]{16}")
_KEY_BYTES, _SEAL_BYTES = 32, 4


class _Invalid(Exception):
    """The reason why a file is no shard of the space at hand."""


# --- spaces ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Space:
    """What makes a latent what it is; a row of one space never stands for a row of another."""

    spec: dict

    @classmethod
    def of(cls, fingerprint: Mapping, image_size: int, recipe: Mapping, moments_shape: Sequence[int]) -> "Space":
        """Describes moments [2C h w] of a VAE with this fingerprint, from images read by this recipe."""
        spec = {
            "format": FORMAT,
            "quantity": "moments",
            "dtype": "float16",
            "moments_shape": list(moments_shape),
            "image_size": image_size,
            "recipe": recipe,
            "vae": fingerprint,
        }
        return cls(json.loads(json_text.canonical(spec)))

    @classmethod
    def stored(cls, spec: object) -> "Space":
        """Takes a spec out of a file; raises ValueError unless it could be one that `of` made."""
        if not isinstance(spec, dict) or spec.keys() != _SPEC_FIELDS or not _is_shallow(spec):
            raise ValueError("it does not describe a space")
        shape, size = spec["moments_shape"], spec["image_size"]
        if not (_are_counts(shape, 3) and shape[0] % 2 == 0 and math.prod(shape) <= _MAX_ROW_VALUES):
            raise ValueError("it has moments of an impossible shape")
        if not _are_counts([size], 1) or not isinstance(spec["vae"], dict):
            raise ValueError("it describes no VAE or no image size")
        return cls(spec)

    @cached_property
    def text(self) -> str:
        """The spec as canonical JSON."""
        return json_text.canonical(self.spec)

    @cached_property
    def id(self) -> str:
        """The first 16 hex digits of the SHA-256 of the canonical spec."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:16]

    @property
    def moments_shape(self) -> tuple[int, int, int]:
        """Shape of one row: (2C, h, w)."""
        channels, height, width = self.spec["moments_shape"]
        return channels, height, width

    @property
    def is_imported(self) -> bool:
        """Says whether an earlier version took these latents over from another program, whose VAE nobody knows."""
        return "imported" in self.spec["vae"]

    @property
    def row_bytes(self) -> int:
        """Bytes of the moments of one image."""
        return 2 * math.prod(self.moments_shape)

    def differing_fields(self, other: "Space") -> list[str]:
        """Returns a line "field: here vs there" for each field of the spec in which the two differ."""
        here, there = _flat(self.spec), _flat(other.spec)
        names = [name for name in sorted({*here, *there}) if here.get(name) != there.get(name)]
        lines = [f"{name}: {here.get(name, 'absent')} vs {there.get(name, 'absent')}" for name in names]
        return [
            re.sub(r"\b([0-9a-f]{12})[0-9a-f]{52}\b", r"\1", line) for line in lines
        ]  # the start of a digest will do


_SPEC_FIELDS = {"format", "quantity", "dtype", "moments_shape", "image_size", "recipe", "vae"}
_MAX_ROW_VALUES = 1 << 28


def _are_counts(values: object, number: int) -> bool:
    """Says whether this is a list of so many whole numbers, each above 0 and none absurd."""
    is_list = isinstance(values, list) and len(values) == number
    return is_list and all(type(value) is int and 0 < value < 1 << 20 for value in values)  # type: ignore[union-attr]


def _is_shallow(value: object, depth: int = 20) -> bool:
    """Says whether no more than `depth` objects or lists lie in each other, so that a recursion over them ends."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return depth > 0 and all(_is_shallow(item, depth - 1) for item in inner)


def _flat(value: object, name: str = "") -> dict[str, str]:
    """Flattens nested objects to {dotted name: value as JSON}."""
    if not isinstance(value, dict):
        return {name: json_text.canonical(value)}
    parts = [_flat(inner, f"{name}.{key}" if name else key) for key, inner in value.items()]
    return {name: text for part in parts for name, text in part.items()}


# --- one shard ---------------------------------------------------------------------------------------------


class _Row(NamedTuple):
    """A row in memory, on its way to a shard."""

    moments: np.ndarray  # float16 [2C h w]
    name: str
    record: dict
    since: float = 0.0  # seconds on the monotonic clock


@dataclass
class _Shard:
    """Where the rows of a shard lie. `bad` marks those found damaged; no file is kept open."""

    path: Path
    size: int
    moments_offset: int
    keys: np.ndarray  # uint8 [n 32]
    seals: np.ndarray  # uint32 [n]
    bad: np.ndarray = field(init=False)  # bool [n]

    def __post_init__(self) -> None:
        self.bad = np.zeros(len(self.keys), dtype=bool)

    def __len__(self) -> int:
        return len(self.keys)


def _layout(count: int, space: Space) -> dict[str, dict]:
    """Returns the tensor table of a shard of `count` rows: the one order in which they are written."""
    shapes = {"seals": ("U32", [count]), "moments": ("F16", [count, *space.moments_shape])}
    shapes["keys"] = ("U8", [count, _KEY_BYTES])
    sizes = (_SEAL_BYTES * count, space.row_bytes * count, _KEY_BYTES * count)
    ends = list(itertools.accumulate(sizes))
    return {
        name: {"dtype": dtype, "shape": shape, "data_offsets": [end - size, end]}
        for (name, (dtype, shape)), size, end in zip(shapes.items(), sizes, ends, strict=True)
    }


def expected_bytes(space: Space, count: int) -> int:
    """Returns about how much `count` latents take on disk, with their keys, seals and names."""
    return count * (space.row_bytes + 64)


def _header(space: Space, count: int, names: list[str], records: list) -> bytes:
    """Builds the start of a safetensors file: the header's length and the header.

    Names are informative: where they do not fit they are left out.
    """
    for kept in (names, []):
        metadata = {"format": str(FORMAT), "space": space.text}
        metadata |= {"names": json_text.canonical(kept), "records": json_text.canonical(records)}
        text = json_text.canonical({"__metadata__": metadata, **_layout(count, space)}).encode()
        text += b" " * (-len(text) % 8)
        if len(text) <= _HEADER_BYTES:
            return len(text).to_bytes(8, "little") + text
    raise ValueError("the record of how the rows were made is too long for a shard")


def _check_header(text: bytes, data_bytes: int, space: Space) -> tuple[dict[str, str], int]:
    """Returns (metadata, number of rows) of a header; raises _Invalid if `_header` did not build it."""
    count, rest = divmod(data_bytes, _SEAL_BYTES + space.row_bytes + _KEY_BYTES)
    try:
        header = json_text.parse(text)
        metadata = header.pop("__metadata__", None) if isinstance(header, dict) else None
        table = json_text.canonical(header)
    except (ValueError, RecursionError) as error:
        raise _Invalid(f"its header cannot be read ({str(error)[:60]})") from None
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _Invalid("its header has no metadata")
    if metadata.get("format") != str(FORMAT):
        raise _Invalid(f"its format is {str(metadata.get('format'))[:20]}, and this version reads {FORMAT}")
    if metadata.get("space") != space.text:
        raise _Invalid("it belongs to another space")
    # Compared as text, since in Python 1 equals True and 1.0.
    if rest or table != json_text.canonical(_layout(count, space)):
        raise _Invalid("its length or its table of tensors is not that of a shard")
    return metadata, count


@contextmanager
def _opened(path: Path) -> Iterator[tuple[int, int]]:
    """Opens a regular file for reading; gives (descriptor, size)."""
    # Without O_NONBLOCK a named pipe would wait for a writer.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise _Invalid("it is not a file")
        yield descriptor, status.st_size
    except OSError as error:
        if error.errno == errno.ESTALE:  # how NFS says that the file was removed
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path)) from None
        raise
    finally:
        os.close(descriptor)


def _read_at(descriptor: int, count: int, offset: int) -> bytearray:
    """Reads exactly `count` bytes, or raises _Invalid. (With a memory map a failing disk is a signal.)"""
    data = bytearray(count)
    view, done = memoryview(data), 0
    while done < count:
        got = os.preadv(descriptor, [view[done:]], offset + done)
        if got == 0:
            raise _Invalid("it ends too early")
        done += got
    return data


def _read_header(descriptor: int, size: int) -> bytes:
    if size < 8:
        raise _Invalid("it is empty" if size == 0 else "it ends too early")
    length = int.from_bytes(_read_at(descriptor, 8, 0), "little")
    if length > min(_HEADER_BYTES, size - 8):
        raise _Invalid("its header is longer than the file or than any shard's")
    return bytes(_read_at(descriptor, length, 8))


def _open_shard(path: Path, space: Space) -> tuple[_Shard, dict[str, str]]:
    """Reads and checks all of a shard but its moments; raises _Invalid or OSError."""
    with _opened(path) as (descriptor, size):
        if size > max(_LARGEST_SHARD_BYTES, 2 * space.row_bytes):
            raise _Invalid("it is larger than any shard")
        text = _read_header(descriptor, size)
        start = 8 + len(text)
        metadata, count = _check_header(text, size - start, space)
        seals = np.frombuffer(_read_at(descriptor, _SEAL_BYTES * count, start), dtype="<u4")
        keys = _read_at(descriptor, _KEY_BYTES * count, size - _KEY_BYTES * count)
    key_rows = np.frombuffer(keys, dtype=np.uint8).reshape(count, _KEY_BYTES)
    return _Shard(path, size, start + _SEAL_BYTES * count, key_rows, seals), metadata


def _seal_rows(space: Space, keys: np.ndarray, moments: np.ndarray) -> np.ndarray:
    """Returns the seals [n] of contiguous rows: CRC-32 over space id, key and the row's bytes."""
    start = zlib.crc32(space.id.encode())
    size = space.row_bytes
    key_bytes, row_bytes = keys.tobytes(), moments.reshape(-1).view(np.uint8).data
    seals = [
        zlib.crc32(
            row_bytes[i * size : (i + 1) * size],
            zlib.crc32(key_bytes[i * _KEY_BYTES : (i + 1) * _KEY_BYTES], start),
        )
        for i in range(len(keys))
    ]
    return np.array(seals, dtype="<u4")


def _sealed_rows(shard: _Shard, rows: np.ndarray, space: Space) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Reads the given rows (ascending, no repeats) of a shard in runs of neighbours.

    Yields (row numbers [m], moments float16 [m 2C h w], whether each seal holds [m]).

    Raises:
        FileNotFoundError: when the shard is gone.
        _Invalid, OSError: when it cannot be read any further.
    """
    size = space.row_bytes
    longest = max(1, _READ_BYTES // size)
    with _opened(shard.path) as (descriptor, _):
        for run in np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1):
            for begin in range(0, len(run), longest):
                some = run[begin : begin + longest]
                data = _read_at(descriptor, len(some) * size, shard.moments_offset + int(some[0]) * size)
                moments = np.frombuffer(data, dtype="<f2").reshape(len(some), *space.moments_shape)
                yield some, moments, _seal_rows(space, shard.keys[some], moments) == shard.seals[some]


def _key_rows(keys: Sequence[str]) -> np.ndarray:
    """Turns hex keys into uint8 [n 32]; raises ValueError for anything else."""
    joined = "".join(keys)
    if any(len(key) != 2 * _KEY_BYTES for key in keys) or joined != joined.lower():
        raise ValueError("a key is 64 lower-case hexadecimal digits")
    rows = np.frombuffer(bytes.fromhex(joined), dtype=np.uint8)
    if rows.size != _KEY_BYTES * len(keys):  # fromhex skips spaces
        raise ValueError("a key is 64 lower-case hexadecimal digits")
    return rows.reshape(-1, _KEY_BYTES)


def _hex_keys(rows: np.ndarray) -> list[str]:
    joined = rows.tobytes().hex()
    return [joined[i : i + 2 * _KEY_BYTES] for i in range(0, len(joined), 2 * _KEY_BYTES)]


def _shard_paths(space_folder: Path) -> list[Path]:
    """Returns the files named like shards, in the order of their names; none if the folder does not exist."""
    if not _SPACE_NAME.fullmatch(space_folder.name) or not space_folder.is_dir():
        return []
    with os.scandir(space_folder) as entries:
        return sorted(space_folder / entry.name for entry in entries if _SHARD_NAME.fullmatch(entry.name))


def _problem(path: Path, error: Exception) -> str:
    reason = error.strerror or str(error) if isinstance(error, OSError) else str(error)
    return f"{path}: {reason}; its rows count as missing"


class _Index:
    """Finds the first copy of a key, in the order of the shards given, among the rows not known to be bad."""

    def __init__(self, shards: Sequence[_Shard]) -> None:
        self.shards = list(shards)
        good = [np.flatnonzero(~shard.bad) for shard in self.shards]
        keys = [shard.keys[rows] for shard, rows in zip(self.shards, good, strict=True)]
        places = [(number << 32) + rows for number, rows in enumerate(good)]
        joined = np.concatenate([np.empty((0, _KEY_BYTES), dtype=np.uint8), *keys])
        self.keys, first = np.unique(self._comparable(joined), return_index=True)
        self.places = np.concatenate([np.empty(0, dtype=np.int64), *places])[first]

    @staticmethod
    def _comparable(keys: np.ndarray) -> np.ndarray:
        """Views uint8 [n 32] as n byte strings, which numpy sorts and compares as wholes."""
        return np.ascontiguousarray(keys).view(f"S{_KEY_BYTES}").ravel()

    def find(self, keys: np.ndarray) -> np.ndarray:
        """Returns for each key [n 32] its place [n], shard number * 2**32 + row, or -1."""
        if not len(self.keys):
            return np.full(len(keys), -1, dtype=np.int64)
        wanted = self._comparable(keys)
        order = np.argsort(wanted)  # looked up in this order, neighbours lie near each other in memory
        nearest = np.empty(len(wanted), dtype=np.int64)
        nearest[order] = np.minimum(np.searchsorted(self.keys, wanted[order]), len(self.keys) - 1)
        return np.where(self.keys[nearest] == wanted, self.places[nearest], -1)


# --- the cache ---------------------------------------------------------------------------------------------


class LatentCache:
    """The rows of one space: reads what is stored, and stores what is new.

    It keeps paths and arrays only, so it may be forked or pickled. Nothing is ever written unless `writable`,
    which may be set to False later, when the disk turns out to be full. New rows then stay in memory and are
    served from there.

    Args:
        folder: the cache folder; it need not exist.
        space: the space to read and write.
        writable: whether new rows go to disk.

    Attributes:
        problems: one line for each damaged file or row found so far; such rows count as missing.
        acknowledged: how many rows this object has published.
    """

    def __init__(self, folder: str | os.PathLike[str], space: Space, *, writable: bool) -> None:
        self.folder, self.space, self.writable = Path(folder), space, writable
        self.problems: list[str] = []
        self.acknowledged = 0
        self._pending: dict[str, _Row] = {}
        self._shards: dict[str, _Shard] = {}
        if writable:
            durable.remove_stale_temporaries(self.folder)
            durable.remove_stale_temporaries(self._space_folder)
        self.refresh()

    @property
    def _space_folder(self) -> Path:
        return self.folder / self.space.id

    def refresh(self) -> None:
        """Looks for shards that other processes have published or merged since."""
        known, self._shards = self._shards, {}
        with self._noting_problems(self._space_folder), suppress(FileNotFoundError):
            for _ in range(_LISTINGS):
                if self._open_all(_shard_paths(self._space_folder), known):
                    break
        self._forget_index()

    def _open_all(self, paths: Sequence[Path], known: Mapping[str, _Shard]) -> bool:
        """Opens the shards that are not known yet, and says whether none was removed meanwhile."""
        are_all_there = True
        for path in paths:
            try:
                with self._noting_problems(path):
                    opened = self._shards.get(path.name) or known.get(path.name)
                    self._shards[path.name] = opened or _open_shard(path, self.space)[0]
            except FileNotFoundError:
                are_all_there = False
        return are_all_there

    def shard_paths(self) -> list[Path]:
        """Returns the readable shards, in the order in which they count."""
        return [shard.path for shard in self._in_order]

    @contextmanager
    def _noting_problems(self, path: Path) -> Iterator[None]:
        """Turns what is wrong with a file, other than that it is gone, into a line in `problems`."""
        try:
            yield
        except FileNotFoundError:
            raise
        except (_Invalid, OSError) as error:
            self._note(_problem(path, error))

    def _note(self, line: str) -> None:
        if line not in self.problems:
            self.problems.append(line)

    @cached_property
    def _index(self) -> _Index:
        return _Index(self._in_order)

    def _forget_index(self) -> None:
        self.__dict__.pop("_index", None)

    # --- reading ---

    def keys(self) -> list[str]:
        """Returns the keys of all rows at hand, published or not; a seal is checked only when its row is read."""
        stored = _hex_keys(self._index.keys)
        return stored + sorted(self._pending.keys() - set(stored)) if self._pending else stored

    def holds(self, keys: Sequence[str]) -> np.ndarray:
        """Says for each key [n] whether a row is at hand; its seal is checked only when it is read."""
        stored = self._index.find(_key_rows(keys)) >= 0
        return stored | np.array([key in self._pending for key in keys], dtype=bool)

    def __contains__(self, key: str) -> bool:
        return bool(self.holds([key])[0])

    def __len__(self) -> int:
        return len(self.keys())

    def read(self, keys: Sequence[str], out: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Reads rows in the order of `keys`, which may repeat.

        Args:
            keys: n keys.
            out: float16 [n 2C h w] to be filled; rows that are not found are left as they are. By default a
                new array, NaN where a row is not found.

        Returns:
            The moments, and whether each was found with a good seal, bool [n].
        """
        wanted = _key_rows(keys)
        shape = (len(keys), *self.space.moments_shape)
        if out is None:
            out = np.full(shape, np.nan, dtype=np.float16)
        if out.shape != shape or out.dtype != np.float16:
            raise ValueError(f"out is {out.dtype} {list(out.shape)}, but float16 {list(shape)} is needed")
        found = self._take_pending(keys, out)
        vanished: set[str] = set()
        while True:  # each round settles a row, or rules out a copy of it
            todo = np.flatnonzero(~found)
            places = self._index.find(wanted[todo])
            todo, places = todo[places >= 0], places[places >= 0]
            if not len(todo):
                return out, found
            self._read_places(places, todo, out, found, vanished)

    def _take_pending(self, keys: Sequence[str], out: np.ndarray) -> np.ndarray:
        found = np.zeros(len(keys), dtype=bool)
        for i, key in enumerate(keys if self._pending else ()):
            if key in self._pending:
                out[i], found[i] = self._pending[key].moments, True
        return found

    def _read_places(
        self, places: np.ndarray, positions: np.ndarray, out: np.ndarray, found: np.ndarray, vanished: set[str]
    ) -> None:
        """Copies the rows at `places` [m] to `positions` [m] of `out`, and marks the good ones in `found`.

        Shards that are gone are looked for once more and added to `vanished`; those in it already count as damaged.
        """
        order = np.argsort(places, kind="stable")
        places, positions = places[order], positions[order]
        numbers, begins = np.unique(places >> 32, return_index=True)
        ends = [*begins[1:], len(places)]
        shards, look_again = self._index.shards, False
        for number, begin, end in zip(numbers, begins, ends, strict=True):
            shard, rows = shards[number], places[begin:end] & 0xFFFFFFFF
            try:
                self._copy_rows(shard, rows, positions[begin:end], out, found)
            except FileNotFoundError as error:  # merged by another process
                if shard.path.name in vanished:  # no: a server that opens it and cannot read it
                    self._note(_problem(shard.path, error))
                    shard.bad[rows] = True
                    self._forget_index()
                    continue
                vanished.add(shard.path.name)
                self._shards.pop(shard.path.name, None)
                look_again = True
        if look_again:
            self.refresh()

    def _copy_rows(
        self, shard: _Shard, rows: np.ndarray, positions: np.ndarray, out: np.ndarray, found: np.ndarray
    ) -> None:
        """Copies ascending `rows` of one shard and marks those that are damaged or cannot be read.

        Raises:
            FileNotFoundError: when the shard is gone.
        """
        distinct, done = np.unique(rows), 0
        good = np.zeros(len(distinct), dtype=bool)
        try:
            for some, moments, sealed in _sealed_rows(shard, distinct, self.space):
                begin, end = np.searchsorted(rows, [some[0], some[-1] + 1])
                which, where = rows[begin:end] - some[0], positions[begin:end]
                out[where[sealed[which]]] = moments[which[sealed[which]]]
                found[where[sealed[which]]] = True
                good[done : done + len(some)] = sealed
                done += len(some)
        except FileNotFoundError:
            raise
        except (_Invalid, OSError) as error:
            self._note(_problem(shard.path, error))
        if not good.all():
            shard.bad[distinct[~good]] = True
            self._note(f"{shard.path}: {(~good).sum()} of {len(good)} rows are damaged and count as missing")
            self._forget_index()

    # --- writing ---

    @property
    def pending(self) -> int:
        """How many rows are in memory only."""
        return len(self._pending)

    def put(self, keys: Sequence[str], moments: np.ndarray, names: Sequence[str], record: dict) -> None:
        """Takes new rows, and publishes what is due.

        Args:
            keys: n keys; a key that waits in memory already keeps the row that it has.
            moments: float16 [n 2C h w], all finite.
            names: what to call the n images in messages.
            record: plain facts about how the rows were made (precision, device, versions).

        Raises:
            ValueError: for other shapes or types, or a value that is not finite; nothing is then taken.
            OSError: when publishing fails; the rows are taken all the same, and wait for the next attempt.
        """
        hex_keys, shape = _hex_keys(_key_rows(keys)), (len(keys), *self.space.moments_shape)
        if moments.shape != shape or moments.dtype != np.float16 or len(names) != len(keys):
            raise ValueError(f"{moments.dtype} {list(moments.shape)} put, but the space holds float16 {list(shape)}")
        finite = np.isfinite(moments).reshape(len(keys), -1).all(axis=1)
        if not finite.all():
            raise ValueError(f"the moments of {names[int(np.argmin(finite))]} are not finite")
        # What cannot be written is refused now, and later changes do not count.
        record = json.loads(json_text.canonical(record))
        now = time.monotonic()
        for key, row, name in zip(hex_keys, moments.copy(), names, strict=True):
            self._pending.setdefault(key, _Row(row, name, record, now))
        self.commit()

    def commit(self) -> None:
        """Publishes full shards, and everything once a row has waited SHARD_SECONDS; raises OSError."""
        if not self.writable:
            return
        while len(self._pending) >= self._full_shard_rows:
            self._publish_pending()
        if self._pending:
            waited = time.monotonic() - next(iter(self._pending.values())).since
            if waited >= SHARD_SECONDS:
                self._publish_pending()

    def flush(self) -> None:
        """Publishes every row that waits in memory, if the cache is writable; raises OSError."""
        while self.writable and self._pending:
            self._publish_pending()

    @property
    def _full_shard_rows(self) -> int:
        return max(1, SHARD_BYTES // self.space.row_bytes)

    def _publish_pending(self) -> None:
        rows = dict(itertools.islice(self._pending.items(), self._full_shard_rows))
        self._publish_shard(rows)
        for key in rows:
            del self._pending[key]
        self.acknowledged += len(rows)

    def _publish_shard(self, rows: Mapping[str, _Row]) -> _Shard:
        """Publishes rows as one shard and starts to serve them from it; raises OSError."""
        keys = _key_rows(list(rows))
        moments = np.empty((len(rows), *self.space.moments_shape), dtype="<f2")
        for i, row in enumerate(rows.values()):
            moments[i] = row.moments
        seals = _seal_rows(self.space, keys, moments)
        names = [row.name for row in rows.values()]
        runs = itertools.groupby(row.record for row in rows.values())
        header = _header(self.space, len(rows), names, [[len(list(run)), record] for record, run in runs])
        parts = [header, seals.tobytes(), moments.reshape(-1).view(np.uint8).data, keys.tobytes()]
        path = self._space_folder / f"{_digest(parts)[:32]}.safetensors"
        durable.publish(path, parts)
        shard = _Shard(path, sum(map(len, parts)), len(header) + seals.nbytes, keys, seals)
        self._shards[path.name] = shard
        self._forget_index()
        return shard

    # --- merging ---

    def merge(self) -> None:
        """Joins small shards into as few as SHARD_BYTES allows: publishes the new one, then removes the old.

        Only rows with a good seal are carried over. Other processes are not disturbed: a row is at every moment
        in some published shard, and a reader that misses a removed one looks again.

        Raises:
            OSError: when publishing fails; the old shards are then still there.
        """
        if not self.writable:
            return
        self.flush()
        self.refresh()
        for group in self._mergeable_groups():
            self._merge(group)

    def _mergeable_groups(self) -> list[list[_Shard]]:
        """Packs the shards, largest first, each into the first group with room; drops groups of one."""
        groups: list[list[_Shard]] = []
        for _, shard in sorted(self._shards.items(), key=lambda item: (-len(item[1]), item[0])):
            has_room = (g for g in groups if sum(map(len, g)) + len(shard) <= self._full_shard_rows)
            group = next(has_room, None)
            if group is None:
                groups.append([shard])
            else:
                group.append(shard)
        return [sorted(group, key=lambda shard: shard.path.name) for group in groups if len(group) > 1]

    def _merge(self, group: Sequence[_Shard]) -> None:
        rows: dict[str, _Row] = {}
        carried: list[_Shard] = []
        for shard in group:
            with self._noting_problems(shard.path), suppress(FileNotFoundError):
                for key, row in self._load_shard(shard.path):
                    rows.setdefault(key, row)
                carried.append(shard)
        if len(carried) < 2:
            return
        merged = self._publish_shard(rows)
        for shard in carried:
            if shard.path != merged.path:  # equal content has an equal name
                self._shards.pop(shard.path.name, None)
                with suppress(OSError):  # a shard that stays only holds its rows twice
                    shard.path.unlink()
        self._forget_index()

    # --- pruning ---

    def surplus(self, needed: Collection[str]) -> tuple[int, int]:
        """Returns how many stored rows have no key in `needed`, and how many bytes they take (within a header)."""
        counts = [(shard, len(shard) - sum(key in needed for key in _hex_keys(shard.keys))) for shard in self._in_order]
        one_row = self.space.row_bytes + _KEY_BYTES + _SEAL_BYTES
        freed = sum(shard.size if count == len(shard) else count * one_row for shard, count in counts)
        return sum(count for _, count in counts), freed

    def prune(self, needed: Collection[str]) -> None:
        """Removes the rows whose key is not in `needed`: publishes what is kept of a shard, then removes the old.

        A needed row is at every moment in some published shard. Shards that others publish meanwhile stay.

        Raises:
            OSError: when publishing or removing fails; every needed row is then still there.
        """
        if not self.writable:
            return
        kept = [(shard, sum(key in needed for key in _hex_keys(shard.keys))) for shard in self._in_order]
        # On a full disk, those of which little is written anew make room for the others.
        for shard, count in sorted(kept, key=lambda item: item[1]):
            if count < len(shard):
                self._prune_shard(shard, needed)
        with suppress(OSError):  # not empty, or never made
            self._space_folder.rmdir()

    def _prune_shard(self, shard: _Shard, needed: Collection[str]) -> None:
        rows: dict[str, _Row] | None = None
        with self._noting_problems(shard.path), suppress(FileNotFoundError):  # merged by another process, rows and all
            rows = {key: row for key, row in self._load_shard(shard.path) if key in needed}
        if rows is None:
            return
        kept = self._publish_shard(rows) if rows else None
        if kept is None or kept.path != shard.path:
            self._shards.pop(shard.path.name, None)
            self._forget_index()
            with durable.naming(shard.path):
                shard.path.unlink(missing_ok=True)

    @property
    def _in_order(self) -> list[_Shard]:
        return [self._shards[name] for name in sorted(self._shards)]

    def _load_shard(self, path: Path) -> list[tuple[str, _Row]]:
        """Reads the good rows of a shard with their names and records; raises _Invalid or OSError."""
        shard, metadata = _open_shard(path, self.space)
        names, records = _row_facts(metadata, len(shard))
        keys = _hex_keys(shard.keys)
        return [
            (keys[row], _Row(moments[i], names[row], records[row]))
            for some, moments, good in _sealed_rows(shard, np.arange(len(shard)), self.space)
            for i, row in enumerate(some)
            if good[i]
        ]


def _digest(parts: Sequence[bytes | memoryview]) -> str:
    whole = hashlib.sha256()
    for part in parts:
        whole.update(part)
    return whole.hexdigest()


def _row_facts(metadata: Mapping[str, str], count: int) -> tuple[list[str], list[dict]]:
    """Returns name and record of each row; blanks where that part of a header is damaged or was left out."""
    names = _parse_or_none(metadata.get("names"))
    if not isinstance(names, list) or len(names) != count or not all(isinstance(name, str) for name in names):
        names = [""] * count
    return names, [record for length, record in _record_runs(metadata, count) for _ in range(length)]


def _record_runs(metadata: Mapping[str, str], count: int) -> list[tuple[int, dict]]:
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


# --- the manifest ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Manifest:
    """What the last preprocess of a cache folder was: its settings, the space that it filled, and facts."""

    space: Space
    settings: dict
    record: dict


def write_manifest(folder: str | os.PathLike[str], settings: dict, space: Space, record: dict) -> None:
    """Publishes manifest.json, readable and ending in its own SHA-256; raises OSError."""
    body = {
        "format": FORMAT,
        "space": space.id,
        "spec": space.spec,
        "settings": settings,
        "record": record,
    }
    document = {**body, "sha256": hashlib.sha256(json_text.canonical(body).encode()).hexdigest()}
    text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False)
    # Paths that are not UTF-8 hold surrogates, which only this error handler writes and json.loads reads.
    durable.publish(Path(folder) / MANIFEST_NAME, text.encode("utf-8", "surrogatepass") + b"\n")


def read_manifest(folder: str | os.PathLike[str]) -> Manifest | None:
    """Reads manifest.json; None when there is none.

    Raises:
        UserError: when it is damaged, cannot be read, or has another format number.
    """
    path = Path(folder) / MANIFEST_NAME
    try:
        document = json_text.parse(durable.read_whole(path, at_most=_LARGEST_MANIFEST_BYTES))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError:
        document = None
    seal = document.pop("sha256", None) if isinstance(document, dict) else None
    if not isinstance(document, dict) or "format" not in document:
        raise UserError(_damage(path))
    if document["format"] != FORMAT:
        raise UserError(
            f"{path} has format {str(document['format'])[:20]}, and this version reads {FORMAT}; "
            "use the version that made it, or another cache folder"
        )
    try:
        sealed = hashlib.sha256(json_text.canonical(document).encode()).hexdigest() == seal
    except (ValueError, RecursionError):
        sealed = False
    if not sealed:
        raise UserError(_damage(path))
    settings, record = document.get("settings"), document.get("record")
    if not isinstance(settings, dict) or not isinstance(record, dict):
        raise UserError(_damage(path, "it has no settings"))
    try:
        return Manifest(Space.stored(document.get("spec")), settings, record)
    except ValueError as error:
        raise UserError(_damage(path, str(error))) from None


def _damage(path: Path, what: str = "its content does not match its checksum") -> str:
    return (
        f"{path} is damaged or was edited: {what}; remove it and run preprocess_latents.py again (the images encoded "
        "so far are kept)"
    )


# --- a second look -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ShardReport:
    """What one shard holds; `records` are (number of rows, how they were made)."""

    path: Path
    num_rows: int
    num_good: int
    num_bytes: int
    records: list[tuple[int, dict]]


@dataclass(frozen=True)
class Report:
    """The state of a space, after every seal was checked. Keys are those that `verify` was asked about.

    Attributes:
        good: keys with a valid row.
        damaged: keys whose every row is damaged.
        missing: keys without a row.
        orphaned: {key: name} of valid rows that were not asked about.
        shards: one entry per shard of the space.
        problems: one line per damaged file.
    """

    good: list[str]
    damaged: list[str]
    missing: list[str]
    orphaned: dict[str, str]
    shards: list[ShardReport]
    problems: list[str]


def verify(cache: LatentCache, keys: Sequence[str]) -> Report:
    """Checks the seal of every row on disk, and compares with `keys`; rows in memory do not count."""
    stored = LatentCache(cache.folder, cache.space, writable=False)
    checks = [_check_shard(path, cache.space) for path in stored.shard_paths()]
    valid = {key: name for check in reversed(checks) for key, name in check.valid.items()}
    broken = {key for check in checks for key in check.broken}
    wanted = dict.fromkeys(keys)
    return Report(
        good=[key for key in wanted if key in valid],
        damaged=[key for key in wanted if key in broken and key not in valid],
        missing=[key for key in wanted if key not in broken and key not in valid],
        orphaned={key: name for key, name in valid.items() if key not in wanted},
        shards=[check.report for check in checks],
        problems=stored.problems + [line for check in checks for line in check.problems],
    )


class _Check(NamedTuple):
    report: ShardReport
    valid: dict[str, str]  # key: name
    broken: set[str]
    problems: list[str]


def _check_shard(path: Path, space: Space) -> _Check:
    """Reads a whole shard that opened a moment ago."""
    problems, valid, broken, num_rows, num_bytes, records = [], {}, set(), 0, 0, []
    try:
        shard, metadata = _open_shard(path, space)
        num_rows, num_bytes = len(shard), shard.size
        names, _ = _row_facts(metadata, num_rows)
        records = _record_runs(metadata, num_rows)
        keys = _hex_keys(shard.keys)
        broken.update(keys)
        for some, _, good in _sealed_rows(shard, np.arange(num_rows), space):
            valid |= {keys[row]: names[row] for row in some[good]}
        if _file_digest(path) != path.stem:
            problems.append(f"{path}: its content is not the one that its name stands for")
    except (_Invalid, OSError) as error:
        problems.append(_problem(path, error))
    broken -= valid.keys()
    if broken:
        problems.append(f"{path}: {len(broken)} of {num_rows} rows are damaged and count as missing")
    return _Check(ShardReport(path, num_rows, len(valid), num_bytes, records), valid, broken, problems)


def _file_digest(path: Path) -> str:
    """Returns the part of a file's SHA-256 that its name should be."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:32]


def spaces(folder: str | os.PathLike[str]) -> dict[str, dict]:
    """Returns {space id: spec} of the spaces in a cache folder that have a shard with a readable header."""
    found: dict[str, dict] = {}
    for space_folder in sorted(Path(folder).glob("*")):
        specs = (_stored_spec(path) for path in _shard_paths(space_folder))
        spec = next((spec for spec in specs if spec is not None and Space(spec).id == space_folder.name), None)
        if spec is not None:
            found[space_folder.name] = spec
    return found


def _stored_spec(path: Path) -> dict | None:
    try:
        with _opened(path) as (descriptor, size):
            header = json_text.parse(_read_header(descriptor, size))
        return Space.stored(json_text.parse(header["__metadata__"]["space"])).spec  # type: ignore[index]
    except (_Invalid, OSError, ValueError, KeyError, TypeError):
        return None
