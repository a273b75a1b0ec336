"""The on-disk cache of moments: reads the rows of one space, stores new ones, merges shards and removes rows.

    latents_cache/
      manifest.json                    settings of the last preprocess, and the space that it filled
      split.json                       which images are for training, validation and testing
      9f2c41d07a3b5e88/                one folder per space, named by its id
        11c3...5c45.safetensors        one immutable shard, named by the SHA-256 of its content

A row is the moments of one image; its key, the SHA-256 of the image file, is written as 64 hex digits. A row that is
damaged, as its seal shows (`shard.py`), counts as missing. Of several copies of a row the first valid one is read, in
the order of the shards' names.

Nothing on disk is ever changed: shards are added, and removed when their rows are in others. So several processes may
read and write one cache at the same time without a lock.

No link in the cache folder is followed, for it may lead anywhere: a linked shard, or a linked folder of a space, counts
as damaged. A cache that is removed while a process writes to it is not begun anew by that process, which could only
put the later half of its rows there.
"""

import errno
import itertools
import json
import os
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path

import numpy as np

from gait_latents.common import files, json_text
from gait_latents.latents import shard as shard_file
from gait_latents.latents.shard import (
    KEY_BYTES,
    SEAL_BYTES,
    Invalid,
    Row,
    Shard,
    digest,
    header_bytes,
    keys_as_hex,
    keys_of_rows,
    open_shard,
    open_to_read,
    problem,
    read_header,
    row_facts,
)
from gait_latents.latents.space import Space

SHARD_SECONDS = 60.0  # how long a new row may wait in memory before it is published
_LISTINGS = 5  # how often to list a folder again when a merge removes shards between listing and opening


class Vanished(OSError):
    """The cache folder, or all that was in it, was removed or renamed while it was in use."""

    def __init__(self, folder: Path) -> None:
        super().__init__(errno.ENOENT, "what was in it was removed or renamed meanwhile", str(folder))


def _has_content(folder: Path) -> bool:
    """Says whether a folder holds more than what another process, trying whether it may write there, takes away."""
    with suppress(OSError), os.scandir(folder) as entries:
        return any(not entry.name.startswith(files.TEMPORARY_PREFIX) for entry in entries)
    return False


class _Index:
    """Finds where the row of a key lies: the first copy, in the order of the shards, that is not known to be damaged.

    Attributes:
        keys: the distinct keys, sorted, as byte strings [m].
        places: the place of each [m]: shard number * 2**32 + row number.
    """

    def __init__(self, shards: Sequence[Shard]) -> None:
        self.shards = list(shards)
        good = [np.flatnonzero(~shard.bad) for shard in self.shards]
        keys = [shard.keys[rows] for shard, rows in zip(self.shards, good, strict=True)]
        places = [(number << 32) + rows for number, rows in enumerate(good)]
        joined = np.concatenate([np.empty((0, KEY_BYTES), dtype=np.uint8), *keys])
        self.keys, first = np.unique(self._comparable(joined), return_index=True)
        self.places = np.concatenate([np.empty(0, dtype=np.int64), *places])[first]

    @staticmethod
    def _comparable(keys: np.ndarray) -> np.ndarray:
        """Views uint8 [n 32] as n byte strings, which numpy sorts and compares as wholes."""
        return np.ascontiguousarray(keys).view(f"S{KEY_BYTES}").ravel()

    def find(self, keys: np.ndarray) -> np.ndarray:
        """Returns the place [n] of each key uint8 [n 32], -1 where there is none."""
        if not len(self.keys):
            return np.full(len(keys), -1, dtype=np.int64)
        wanted = self._comparable(keys)
        order = np.argsort(wanted)  # searching in sorted order touches memory in order, which is faster
        nearest = np.empty(len(wanted), dtype=np.int64)
        nearest[order] = np.minimum(np.searchsorted(self.keys, wanted[order]), len(self.keys) - 1)
        return np.where(self.keys[nearest] == wanted, self.places[nearest], -1)


# --- the cache ---------------------------------------------------------------------------------------------


class LatentCache:
    """The rows of one space: reads what is stored, and stores what is new.

    It keeps paths and arrays only and no open file, so it may be forked or pickled. Nothing is written unless
    `writable`, which may be set to False later, as when the disk is full. New rows then stay in memory and are read
    from there.

    Args:
        folder: the cache folder; it need not exist.
        space: the space to read and write.
        writable: whether new rows go to disk.

    Attributes:
        problems: one line for each damaged file or shard with damaged rows found so far; such rows count as missing.
        acknowledged: how many rows this object has published.
    """

    def __init__(self, folder: str | os.PathLike[str], space: Space, *, writable: bool) -> None:
        self.folder, self.space, self.writable = Path(folder), space, writable
        self.problems: list[str] = []
        self.acknowledged = 0
        self._pending: dict[str, Row] = {}
        self._shards: dict[str, Shard] = {}
        self._was_there = _has_content(self.folder)
        self._had_shards = False
        if writable:
            files.remove_stale_temporaries(self.folder)
            if not self._space_folder.is_symlink():
                files.remove_stale_temporaries(self._space_folder)
        self.refresh()

    @property
    def _space_folder(self) -> Path:
        """Where the shards of the space are."""
        return self.folder / self.space.id

    def refresh(self) -> None:
        """Looks for shards that other processes have published or merged since the last look."""
        known, self._shards = self._shards, {}
        with self._noting_problems(self._space_folder), suppress(FileNotFoundError):
            for _ in range(_LISTINGS):
                if self._open_all(shard_file.list_shards(self._space_folder), known):
                    break
        self._had_shards |= bool(self._shards)
        self._forget_index()

    def _open_all(self, paths: Sequence[Path], known: Mapping[str, Shard]) -> bool:
        """Opens the shards that are not known yet, and says whether none was removed meanwhile."""
        are_all_there = True
        for path in paths:
            try:
                with self._noting_problems(path):
                    opened = self._shards.get(path.name) or known.get(path.name)
                    self._shards[path.name] = opened or open_shard(path, self.space)[0]
            except FileNotFoundError:
                are_all_there = False
        return are_all_there

    def shard_paths(self) -> list[Path]:
        """Returns the readable shards, in the order in which copies of a row count."""
        return [shard.path for shard in self._in_order]

    @contextmanager
    def _noting_problems(self, path: Path) -> Iterator[None]:
        """Turns what is wrong with a file, other than that it is gone, into a line in `problems`."""
        try:
            yield
        except FileNotFoundError:
            raise
        except (Invalid, OSError) as error:
            self._note(problem(path, error))

    def _note(self, line: str) -> None:
        if line not in self.problems:
            self.problems.append(line)

    @cached_property
    def _index(self) -> _Index:
        """Where each key lies; built when first needed, and again after `_forget_index`."""
        return _Index(self._in_order)

    def _forget_index(self) -> None:
        self.__dict__.pop("_index", None)

    # --- reading ---

    def keys(self) -> list[str]:
        """Returns the keys of all rows, on disk or in memory; a damaged row is noticed only when it is read."""
        stored = keys_as_hex(self._index.keys)
        return stored + sorted(self._pending.keys() - set(stored)) if self._pending else stored

    def holds(self, keys: Sequence[str]) -> np.ndarray:
        """Says for each key [n] whether there is a row; a damaged row is noticed only when it is read."""
        stored = self._index.find(keys_of_rows(keys)) >= 0
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
        wanted = keys_of_rows(keys)
        shape = (len(keys), *self.space.moments_shape)
        if out is None:
            out = np.full(shape, np.nan, dtype=np.float16)
        if out.shape != shape or out.dtype != np.float16:
            raise ValueError(f"out is {out.dtype} {list(out.shape)}, but float16 {list(shape)} is needed")
        found = self._take_pending(keys, out)
        vanished: set[str] = set()
        while True:  # each round reads a row or marks a copy of it as damaged, so this ends
            todo = np.flatnonzero(~found)
            places = self._index.find(wanted[todo])
            todo, places = todo[places >= 0], places[places >= 0]
            if not len(todo):
                return out, found
            self._read_places(places, todo, out, found, vanished)

    def _take_pending(self, keys: Sequence[str], out: np.ndarray) -> np.ndarray:
        """Copies the rows that wait in memory to `out`; returns which those were, bool [n]."""
        found = np.zeros(len(keys), dtype=bool)
        for i, key in enumerate(keys if self._pending else ()):
            if key in self._pending:
                out[i], found[i] = self._pending[key].moments, True
        return found

    def _read_places(
        self, places: np.ndarray, positions: np.ndarray, out: np.ndarray, found: np.ndarray, vanished: set[str]
    ) -> None:
        """Copies the rows at `places` [m] to `positions` [m] of `out`, and marks the good ones in `found`.

        A shard that is gone is added to `vanished`, and its rows are looked for in other shards: another process merged
        it. If it is listed and gone a second time, its rows count as damaged.
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
                if shard.path.name in vanished:  # not merged: a file server that opens the shard and cannot read it
                    self._note(problem(shard.path, error))
                    shard.bad[rows] = True
                    self._forget_index()
                    continue
                vanished.add(shard.path.name)
                self._shards.pop(shard.path.name, None)
                look_again = True
        if look_again:
            self.refresh()

    def _copy_rows(
        self, shard: Shard, rows: np.ndarray, positions: np.ndarray, out: np.ndarray, found: np.ndarray
    ) -> None:
        """Copies ascending `rows` of one shard and marks those that are damaged or cannot be read.

        Raises:
            FileNotFoundError: when the shard is gone.
        """
        distinct, done = np.unique(rows), 0
        good = np.zeros(len(distinct), dtype=bool)
        try:
            for some, moments, sealed in shard_file.sealed_rows(shard, distinct, self.space):
                begin, end = np.searchsorted(rows, [some[0], some[-1] + 1])
                which, where = rows[begin:end] - some[0], positions[begin:end]
                out[where[sealed[which]]] = moments[which[sealed[which]]]
                found[where[sealed[which]]] = True
                good[done : done + len(some)] = sealed
                done += len(some)
        except FileNotFoundError:
            raise
        except (Invalid, OSError) as error:
            self._note(problem(shard.path, error))
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
        hex_keys, shape = keys_as_hex(keys_of_rows(keys)), (len(keys), *self.space.moments_shape)
        if moments.shape != shape or moments.dtype != np.float16 or len(names) != len(keys):
            raise ValueError(f"{moments.dtype} {list(moments.shape)} put, but the space holds float16 {list(shape)}")
        finite = np.isfinite(moments).reshape(len(keys), -1).all(axis=1)
        if not finite.all():
            raise ValueError(f"the moments of {names[int(np.argmin(finite))]} are not finite")
        # What cannot be written is refused now, and later changes do not count.
        record = json.loads(json_text.canonical(record))
        now = time.monotonic()
        for key, row, name in zip(hex_keys, moments.copy(), names, strict=True):
            self._pending.setdefault(key, Row(row, name, record, now))
        self.commit()

    def commit(self) -> None:
        """Publishes full shards, and all rows once one has waited SHARD_SECONDS; raises OSError."""
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
        """How many rows make a full shard."""
        return max(1, shard_file.SHARD_BYTES // self.space.row_bytes)

    def claim_folder(self) -> None:
        """Makes the cache folder for what is to be written into it, where there was nothing when this object was made.

        Raises:
            Vanished: when it was there, or had shards of this space, and has none any more.
            OSError: when it cannot be made.
        """
        if not (self._was_there or self._had_shards):
            files.make_folder(self.folder)
            self._was_there = True
        if self._had_shards and not any(os.path.lexists(shard.path) for shard in self._shards.values()):
            self.refresh()  # another process may have merged them
        if not self.folder.is_dir() or (self._had_shards and not self._shards):
            raise Vanished(self.folder)

    def _publish_pending(self) -> None:
        """Publishes the rows that have waited longest, at most a full shard of them; raises OSError."""
        rows = dict(itertools.islice(self._pending.items(), self._full_shard_rows))
        self._publish_shard(rows)
        for key in rows:
            del self._pending[key]
        self.acknowledged += len(rows)

    def _publish_shard(self, rows: Mapping[str, Row]) -> Shard:
        """Publishes rows as one shard and starts to serve them from it; raises OSError."""
        keys = keys_of_rows(list(rows))
        moments = np.empty((len(rows), *self.space.moments_shape), dtype="<f2")
        for i, row in enumerate(rows.values()):
            moments[i] = row.moments
        seals = shard_file.seal_rows(self.space, keys, moments)
        names = [row.name for row in rows.values()]
        runs = itertools.groupby(row.record for row in rows.values())
        header = header_bytes(self.space, len(rows), names, [[len(list(run)), record] for record, run in runs])
        parts = [header, seals.tobytes(), moments.reshape(-1).view(np.uint8).data, keys.tobytes()]
        path = self._space_folder / f"{digest(parts)[:32]}.safetensors"
        self.claim_folder()
        files.publish(path, parts, below=self.folder)
        shard = Shard(path, sum(map(len, parts)), len(header) + seals.nbytes, keys, seals)
        self._shards[path.name], self._had_shards = shard, True
        self._forget_index()
        return shard

    # --- merging ---

    def merge(self) -> None:
        """Joins small shards into as few as SHARD_BYTES allows: publishes the new one, then removes the old.

        Damaged rows are left out. Other processes are not disturbed: a row is at every moment in some published shard,
        and a reader whose shard was removed looks for the row again.

        Raises:
            OSError: when publishing fails; the old shards are then still there.
        """
        if not self.writable:
            return
        self.flush()
        self.refresh()
        for group in self._mergeable_groups():
            self._merge(group)

    def _mergeable_groups(self) -> list[list[Shard]]:
        """Packs the shards, largest first, each into the first group with room; drops groups of one."""
        groups: list[list[Shard]] = []
        for _, shard in sorted(self._shards.items(), key=lambda item: (-len(item[1]), item[0])):
            has_room = (g for g in groups if sum(map(len, g)) + len(shard) <= self._full_shard_rows)
            group = next(has_room, None)
            if group is None:
                groups.append([shard])
            else:
                group.append(shard)
        return [sorted(group, key=lambda shard: shard.path.name) for group in groups if len(group) > 1]

    def _merge(self, group: Sequence[Shard]) -> None:
        """Replaces the readable shards of a group by one; raises OSError."""
        rows: dict[str, Row] = {}
        carried: list[Shard] = []
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
                with suppress(OSError):  # a shard that cannot be removed costs space only
                    shard.path.unlink()
        self._forget_index()

    # --- pruning ---

    def surplus(self, needed: Collection[str]) -> tuple[int, int]:
        """Returns how many stored rows have no key in `needed`, and about how many bytes they take."""
        counts = [
            (shard, len(shard) - sum(key in needed for key in keys_as_hex(shard.keys))) for shard in self._in_order
        ]
        one_row = self.space.row_bytes + KEY_BYTES + SEAL_BYTES
        freed = sum(shard.size if count == len(shard) else count * one_row for shard, count in counts)
        return sum(count for _, count in counts), freed

    def prune(self, needed: Collection[str]) -> None:
        """Removes the rows whose key is not in `needed`: publishes the rest of a shard, then removes the old shard.

        A needed row is at every moment in some published shard. Shards that others publish meanwhile are left alone.

        Raises:
            OSError: when publishing or removing fails; every needed row is then still there.
        """
        if not self.writable:
            return
        kept = [(shard, sum(key in needed for key in keys_as_hex(shard.keys))) for shard in self._in_order]
        # Shards of which few rows are written anew go first: on a full disk they make room for the others.
        for shard, count in sorted(kept, key=lambda item: item[1]):
            if count < len(shard):
                self._prune_shard(shard, needed)
        with suppress(OSError):  # not empty, or never made
            self._space_folder.rmdir()

    def _prune_shard(self, shard: Shard, needed: Collection[str]) -> None:
        """Replaces a shard by one of its needed rows, or removes it where there are none; raises OSError."""
        rows: dict[str, Row] | None = None
        with self._noting_problems(shard.path), suppress(FileNotFoundError):  # merged by another process, rows and all
            rows = {key: row for key, row in self._load_shard(shard.path) if key in needed}
        if rows is None:
            return
        kept = self._publish_shard(rows) if rows else None
        if kept is None or kept.path != shard.path:
            self._shards.pop(shard.path.name, None)
            self._forget_index()
            with files.naming(shard.path):
                shard.path.unlink(missing_ok=True)

    @property
    def _in_order(self) -> list[Shard]:
        """The shards in the order of their names, in which copies of a row count."""
        return [self._shards[name] for name in sorted(self._shards)]

    def _load_shard(self, path: Path) -> list[tuple[str, Row]]:
        """Reads the good rows of a shard with their names and records; raises Invalid or OSError."""
        shard, metadata = open_shard(path, self.space)
        names, records = row_facts(metadata, len(shard))
        keys = keys_as_hex(shard.keys)
        return [
            (keys[row], Row(moments[i], names[row], records[row]))
            for some, moments, good in shard_file.sealed_rows(shard, np.arange(len(shard)), self.space)
            for i, row in enumerate(some)
            if good[i]
        ]


def why_not_writable(folder: str | os.PathLike[str], space: Space) -> str | None:
    """Returns why no shard of a space can be put into a cache folder, by trying; None where one can."""
    reason = files.why_not_writable(folder)
    if reason is None and (Path(folder) / space.id).is_symlink():
        reason = f"{space.id} in it is a link, and may lead anywhere; remove it, or put the folder itself there"
    return reason


def spaces(folder: str | os.PathLike[str]) -> dict[str, dict]:
    """Returns {space id: spec} of the spaces in a cache folder that have a shard with a readable header."""
    found: dict[str, dict] = {}
    for space_folder in sorted(Path(folder).glob("*")):
        if space_folder.is_symlink():
            continue
        specs = (_stored_spec(path) for path in shard_file.list_shards(space_folder))
        spec = next((spec for spec in specs if spec is not None and Space(spec).id == space_folder.name), None)
        if spec is not None:
            found[space_folder.name] = spec
    return found


def _stored_spec(path: Path) -> dict | None:
    """Reads which space the header of a shard names; None where it cannot be read or names none."""
    try:
        with open_to_read(path) as (descriptor, size):
            header = json_text.parse(read_header(descriptor, size))
        metadata = header.get("__metadata__") if isinstance(header, dict) else None
        text = metadata.get("space") if isinstance(metadata, dict) else None
        return Space.from_stored(json_text.parse(text)).spec if isinstance(text, str) else None
    except (Invalid, OSError, ValueError):
        return None
