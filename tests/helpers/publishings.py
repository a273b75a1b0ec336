"""What the project publishes, as small pieces of work that a fault may strike, and the check of what it leaves.

Each piece is prepared undisturbed, then runs until the fault stops it, and tells what it was acknowledged. The check
looks at the folder as a later process would.
"""

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tiny_cache
import tiny_checkpoint
import torch
from os_faults import Tally, Tell, nothing_synced
from tiny_cache import SPACE

from gait_latents.common import files
from gait_latents.common.errors import UserError
from gait_latents.common.layout import SPLIT_NAME
from gait_latents.images.split import Split, make_split, read_split
from gait_latents.latents.cache import LatentCache
from gait_latents.latents.manifest import read_manifest, write_manifest
from gait_latents.training import checkpoint, run_folder

OLD, NEW = b"old content", b"new content, and longer"


@dataclass(frozen=True)
class Work:
    """A piece of work on a folder.

    Attributes:
        prepare: makes the folder and what was in it before.
        run: does the work, and tells each thing that was acknowledged.
        check: counts one case, and whether anything that was told, or was there before, is lost or wrong.
        num_files: how many files are there when all is done.
        is_one_publish: whether each call belongs to a publish, which must then tell of each error.
    """

    name: str
    prepare: Callable[[Path], object]
    run: Callable[[Path, Tell], object]
    check: Callable[[Path, Collection[str]], Tally]
    num_files: int
    is_one_publish: bool = False

    def __str__(self) -> str:
        return self.name


def verdict(*, lost: bool, wrong: bool) -> Tally:
    """Returns the count of one case."""
    return Tally(1, int(lost), int(wrong))


# --- one file ----------------------------------------------------------------------------------------------


def _prepare_file(folder: Path) -> None:
    files.publish(folder / "file", OLD)


def _put_file(path: Path, tell: Tell) -> None:
    files.publish(path, NEW)
    tell("new")


def _check_file(path: Path, before: bytes | None, told: Collection[str]) -> Tally:
    content = path.read_bytes() if path.exists() else None
    return verdict(
        lost=(content is None and before is not None) or ("new" in told and content != NEW),
        wrong=content not in (before, NEW),
    )


REPLACED_FILE = Work(
    "a file replaced",
    _prepare_file,
    lambda folder, tell: _put_file(folder / "file", tell),
    lambda folder, told: _check_file(folder / "file", OLD, told),
    num_files=1,
    is_one_publish=True,
)
NEW_FOLDERS = Work(
    "a file in new folders",
    lambda folder: folder.mkdir(),
    lambda folder, tell: _put_file(folder / "a" / "b" / "file", tell),
    lambda folder, told: _check_file(folder / "a" / "b" / "file", None, told),
    num_files=1,
    is_one_publish=True,
)


# --- shards ------------------------------------------------------------------------------------------------


def check_rows(cache: LatentCache, needed: Iterable[int], possible: Iterable[int]) -> Tally:
    """Counts one case: are the needed rows there, and is every row that is there right, and every shard whole?"""
    possible = list(possible)
    moments, found = cache.read([tiny_cache.key(i) for i in possible])
    good = {i for i, row, is_found in zip(possible, moments, found, strict=True) if is_found and _is_right(row, i)}
    return verdict(
        lost=not good.issuperset(needed),
        wrong=len(good) != found.sum() or bool(tiny_cache.strangers(cache, possible)) or bool(cache.problems),
    )


def _is_right(row: np.ndarray, i: int) -> bool:
    return row.tobytes() == tiny_cache.row(i).tobytes()


def _put_rows(folder: Path, tell: Tell) -> None:
    cache = LatentCache(folder / "cache", SPACE, writable=True)
    tiny_cache.put(cache, [2, 3])
    cache.flush()
    assert cache.acknowledged == 2
    tell("2")
    tell("3")


def _merge(folder: Path, tell: Tell) -> None:
    LatentCache(folder / "cache", SPACE, writable=True).merge()
    tell("3")


def _prepare_rows(folder: Path, *shards: list[int]) -> None:
    folder.mkdir()
    for numbers in shards:
        tiny_cache.stored(folder / "cache", numbers)


def _check_cache(folder: Path, before: Iterable[int], told: Collection[str]) -> Tally:
    return check_rows(tiny_cache.reader(folder / "cache"), {*before, *map(int, told)}, range(4))


FIRST_SHARD = Work(
    "the first shard",
    _prepare_rows,
    _put_rows,
    lambda folder, told: _check_cache(folder, [], told),
    num_files=1,
)
SECOND_SHARD = Work(
    "another shard",
    lambda folder: _prepare_rows(folder, [0, 1]),
    _put_rows,
    lambda folder, told: _check_cache(folder, [0, 1], told),
    num_files=2,
)
MERGE = Work(
    "a merge of three shards",
    lambda folder: _prepare_rows(folder, [0, 1], [1, 2], [3]),
    _merge,
    lambda folder, told: _check_cache(folder, range(4), told),
    num_files=1,
)


def _prune(folder: Path, tell: Tell) -> None:
    LatentCache(folder / "cache", SPACE, writable=True).prune({tiny_cache.key(i) for i in (0, 1)})
    tell("1")


PRUNE = Work(
    "a prune of three shards",
    lambda folder: _prepare_rows(folder, [0], [1, 2], [3]),
    _prune,
    lambda folder, told: _check_cache(folder, [0, 1], told),
    num_files=2,
)


# --- manifest and split ------------------------------------------------------------------------------------


def _split(version: int) -> Split:
    listed = {"ID_1": [f"{version}-{i}.jpg" for i in range(3)]}
    split = make_split(listed, num_users="all", images_per_user=2, seed=0, split="random", split_gap=0)
    return split.with_keys({("ID_1", entry.name): tiny_cache.key(version) for entry in (*split.train, *split.test)})


def _write_split(folder: Path, version: int) -> None:
    files.publish(folder / SPLIT_NAME, _split(version).to_bytes())


def _write_manifest(folder: Path, version: int) -> None:
    write_manifest(folder, {"version": version, "data_path": "data"}, SPACE, {"images": version})


def _prepare_manifest(folder: Path) -> None:
    _write_split(folder, 1)
    _write_manifest(folder, 1)


def _replace_manifest(folder: Path, tell: Tell) -> None:
    _write_split(folder, 2)
    tell("split")
    _write_manifest(folder, 2)
    tell("manifest")


def _version_of_manifest(folder: Path) -> int | None:
    manifest = read_manifest(folder)
    return None if manifest is None else manifest.settings["version"]


def _version_of_split(folder: Path) -> int | None:
    split = read_split(folder)
    return None if split is None else next((i for i in (1, 2) if split == _split(i)), 0)


def _check_manifest(folder: Path, told: Collection[str]) -> Tally:
    lost = wrong = False
    for name, version in (("split", _version_of_split), ("manifest", _version_of_manifest)):
        try:
            found = version(folder)
        except UserError:  # it stops a run, as one that is gone does
            found = None
        lost |= found is None or (name in told and found != 2)
        wrong |= found not in (None, 1, 2)
    return verdict(lost=lost, wrong=wrong)


MANIFEST = Work("split and manifest replaced", _prepare_manifest, _replace_manifest, _check_manifest, num_files=2)


# --- checkpoints -------------------------------------------------------------------------------------------


def _save_checkpoint(folder: Path, tell: Tell) -> None:
    tiny_checkpoint.saved(folder, 4)
    tell("4")
    checkpoint.save(folder / run_folder.ema_name(4), {"ema.w": torch.full((2,), 4.0)}, {"step": 4})
    run_folder.prune(folder, step=4)


def check_states(folder: Path, needed_step: int) -> Tally:
    """Counts one case: is the newest state of the needed step or a later one, right, and no newer file damaged?"""
    try:
        found = run_folder.find_newest(folder)
    except UserError:
        found = None
    if found is None:
        return verdict(lost=needed_step > 0, wrong=False)
    _, tensors, meta, warnings = found
    is_right = tiny_checkpoint.same(tensors, tiny_checkpoint.tiny_tensors(meta["step"]))
    return verdict(lost=meta["step"] < needed_step, wrong=bool(warnings) or not is_right)


def _prepare_checkpoints(folder: Path) -> None:
    for step in (1, 2):
        tiny_checkpoint.saved(folder, step)


CHECKPOINT = Work(
    "a checkpoint",
    _prepare_checkpoints,
    _save_checkpoint,
    lambda folder, told: check_states(folder, max([2, *map(int, told)])),
    num_files=3,  # the last two states, and the averages
)

WORKS = (REPLACED_FILE, NEW_FOLDERS, FIRST_SHARD, SECOND_SHARD, MERGE, PRUNE, MANIFEST, CHECKPOINT)


def temporaries(folder: Path) -> list[Path]:
    """Returns the temporary files anywhere below a folder."""
    return list(folder.rglob(f"{files.TEMPORARY_PREFIX}*"))


def done_again(work: Work, folder: Path) -> Tally:
    """Does the work undisturbed where it was stopped; a file too many or too few afterwards counts as wrong."""
    for place in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
        files.remove_stale_temporaries(place)
    told: list[str] = []
    with nothing_synced():
        work.run(folder, told.append)
    tally = work.check(folder, told)
    num_files = sum(path.is_file() for path in folder.rglob("*"))
    return Tally(0, tally.lost, tally.wrong + (num_files != work.num_files))
