"""The suite can fail: with any one safeguard taken away, a check of it finds what is then lost or wrong."""

import errno
import os
import stat
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import tiny_cache
import tiny_checkpoint
from os_faults import Tally, each_flipped_bit, raising
from publishings import CHECKPOINT, MERGE, NEW_FOLDERS, REPLACED_FILE, SECOND_SHARD, Work
from test_errors import faults_at_each_call, other_writer_at_each_call
from test_kill import kills_at_each_call
from test_power_cut import power_cuts_in

from gait_latents.common import files
from gait_latents.common.errors import UserError
from gait_latents.latents import shard as shard_file
from gait_latents.latents.space import Space
from gait_latents.training import checkpoint
from gait_latents.training.checkpoint import DamagedCheckpoint

Check = Callable[[Path], Tally]  # of a new folder

# --- checks ------------------------------------------------------------------------------------------------


def flipped_rows(root: Path) -> Tally:
    """Reads a shard with each of its bits flipped in turn, under all the keys that it then claims to have."""
    path = tiny_cache.stored(root, [0, 1])
    rows, tally = {tiny_cache.key(i): tiny_cache.row(i) for i in (0, 1)}, Tally()
    for _ in each_flipped_bit(path):
        cache = tiny_cache.reader(root)
        keys = sorted({*rows, *cache.keys()})
        served = {key: row for key, row, found in zip(keys, *cache.read(keys), strict=True) if found}
        is_right = all(key in rows and row.tobytes() == rows[key].tobytes() for key, row in served.items())
        tally += Tally(1, 0, int(not is_right))
    return tally


def flipped_checkpoint(root: Path) -> Tally:
    """Loads a checkpoint with each of its bits flipped in turn."""
    path, tally = tiny_checkpoint.saved(root, 4), Tally()
    for _ in each_flipped_bit(path):
        with suppress(DamagedCheckpoint, UserError):
            tensors, meta = checkpoint.load(path)
            is_right = tiny_checkpoint.same(tensors, tiny_checkpoint.tiny_tensors(4)) and meta == {"step": 4}
            tally.wrong += not is_right
        tally.cases += 1
    return tally


def an_error_in(work: Work) -> Check:
    """Returns the check of an error at each call."""
    return lambda root: faults_at_each_call(work, root, lambda index: (index, raising(errno.EIO)))


# --- safeguards taken away ---------------------------------------------------------------------------------


class OtherOs:
    """The module os with some functions exchanged, for one module that uses it."""

    def __init__(self, **functions: Callable) -> None:
        self.__dict__.update(functions)

    def __getattr__(self, name: str) -> object:
        return getattr(os, name)


def _sync_folders_only(descriptor: int) -> None:
    if stat.S_ISDIR(os.fstat(descriptor).st_mode):
        os.fsync(descriptor)


def _sync_again(descriptor: int) -> None:
    try:
        os.fsync(descriptor)
    except OSError:
        os.fsync(descriptor)


def _write_in_place(path: Path, chunks: list[memoryview], top: Path | None) -> None:
    files._make_folder(path.parent)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    files._fill_and_close(descriptor, chunks)
    files._sync_folder(path.parent)


def _open_shared(path: Path, flags: int, *mode: int) -> int:
    return os.open(path, (flags & ~os.O_EXCL) | os.O_TRUNC if flags & os.O_CREAT else flags, *mode)


def _ignore_errors(path: Path, data: object, *, publish: Callable = files.publish, **where: object) -> None:
    with suppress(OSError):
        publish(path, data, **where)


def _remove_others_first(path: Path, data: object, *, publish: Callable = files.publish, **where: object) -> None:
    for other in path.parent.glob(f"*{path.suffix}"):
        other.unlink()
    publish(path, data, **where)


def _serve_unchecked(shard: object, rows: np.ndarray, space: object, *, read: Callable = shard_file.sealed_rows):
    for some, moments, _ in read(shard, rows, space):
        yield some, moments, np.ones(len(some), dtype=bool)


def _seal_without_key(
    space: Space, keys: np.ndarray, moments: np.ndarray, *, seal: Callable = shard_file.seal_rows
) -> np.ndarray:
    return seal(space, np.zeros_like(keys), moments)


@dataclass(frozen=True)
class Mutation:
    """A safeguard that is taken away, by exchanging an attribute of a module, and the check that must notice it."""

    name: str
    module: object
    changes: dict[str, object]
    check: Check

    def __str__(self) -> str:
        return self.name


SHARED_TEMPORARY = {"os": OtherOs(open=_open_shared), "_temporary_name": lambda: f"{files.TEMPORARY_PREFIX}x"}
MUTATIONS = [
    Mutation(
        "a file is not synced", files, {"os": OtherOs(fsync=_sync_folders_only)}, partial(power_cuts_in, SECOND_SHARD)
    ),
    Mutation(
        "a folder is not synced",
        files,
        {"_sync_folder": lambda folder: None},
        partial(power_cuts_in, REPLACED_FILE),
    ),
    Mutation(
        "a new folder is not synced",
        files,
        {"_make_folder": lambda folder, top=None: folder.mkdir(parents=True, exist_ok=True)},
        partial(power_cuts_in, NEW_FOLDERS),
    ),
    Mutation(
        "a file is written in place",
        files,
        {"_publish_once": _write_in_place},
        partial(kills_at_each_call, REPLACED_FILE),
    ),
    Mutation("temporaries are shared", files, SHARED_TEMPORARY, other_writer_at_each_call),
    Mutation("temporaries stay", files, {"_discard": lambda path: None}, an_error_in(REPLACED_FILE)),
    Mutation("a failed sync is tried again", files, {"os": OtherOs(fsync=_sync_again)}, an_error_in(REPLACED_FILE)),
    Mutation(
        "a folder that cannot be synced is accepted", files, {"_CANNOT_SYNC": {errno.EIO}}, an_error_in(REPLACED_FILE)
    ),
    Mutation("errors are ignored", files, {"publish": _ignore_errors}, an_error_in(SECOND_SHARD)),
    Mutation(
        "a merge removes before it publishes",
        files,
        {"publish": _remove_others_first},
        partial(kills_at_each_call, MERGE),
    ),
    Mutation(
        "a checkpoint replaces those before",
        files,
        {"publish": _remove_others_first},
        partial(kills_at_each_call, CHECKPOINT),
    ),
    Mutation("seals are not checked", shard_file, {"sealed_rows": _serve_unchecked}, flipped_rows),
    Mutation("a seal is not over the key", shard_file, {"seal_rows": _seal_without_key}, flipped_rows),
    Mutation("a checkpoint has no checksum", checkpoint, {"_checksum": lambda tensors, text: ""}, flipped_checkpoint),
]


@pytest.mark.slow
@pytest.mark.parametrize("mutation", MUTATIONS, ids=str)
def test_a_missing_safeguard_is_noticed(mutation, tmp_path):
    with mock.patch.multiple(mutation.module, **mutation.changes):
        tally = mutation.check(tmp_path)
    assert tally.lost + tally.wrong > 0


@pytest.mark.parametrize("check", [flipped_rows, flipped_checkpoint])
def test_the_checks_of_this_file_find_nothing_where_nothing_is_missing(check, tmp_path):
    tally = check(tmp_path)
    assert tally.cases > 1000 and tally.lost == tally.wrong == 0
