"""What a run keeps on disk: settings, split, checkpoints, metrics. One home for their names and meaning.

results/settings.yaml               the settings of the run, itself a valid --config; its first line: who writes here
results/split.json                  which images it trains on
results/state-00002000.safetensors  everything needed to go on; the last two are kept
results/ema-00002000.safetensors    the averaged weights alone; one at every save
results/metrics.jsonl               a line of figures every log_every steps
results/grid-00002000.png, loss.png
results/tensorboard/                the same figures and grids as events, where TensorBoard is installed
"""

import operator
import os
import re
import secrets
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from gait_latents.common import files, mounts
from gait_latents.common.console import warn
from gait_latents.common.errors import Failed, UserError, let_shortage_pass
from gait_latents.common.layout import SETTINGS_NAME, SPLIT_NAME
from gait_latents.images.split import Split
from gait_latents.training import checkpoint
from gait_latents.training.checkpoint import DamagedCheckpoint
from gait_latents.training.optimizer_state import expected_bytes
from gait_latents.training.run_meta import RunMeta

_NUM_KEPT = 2  # full states that stay: the newest may be damaged by the disk later
_FULL_NAME = re.compile(r"state-([0-9]{8,18})\.safetensors")
_EMA_NAME = re.compile(r"ema-([0-9]{8,18})\.safetensors")
_ANY_NAME = re.compile(r"(?:state|ema)-([0-9]{8,18})\.safetensors")


def full_name(step: int) -> str:
    """Names the file of the full training state after `step` steps."""
    return f"state-{step:08d}.safetensors"


def ema_name(step: int) -> str:
    """Names the file of the EMA weights alone after `step` steps."""
    return f"ema-{step:08d}.safetensors"


def grid_name(step: int) -> str:
    """Names the picture of the samples that were made after `step` steps."""
    return f"grid-{step:08d}.png"


# --- who writes here ---------------------------------------------------------------------------------------

_WRITER = re.compile(rb"# written by the training ([0-9a-f]{32})\b")
_LARGEST_SETTINGS_BYTES = 1 << 20
Stamp = tuple[str, str]  # from `newest_stamp`


class Writer:
    """A training among those that may write in one run folder: the last that has begun to write there goes on.

    It begins when its first step is taken, so that one that fails before it disturbs nobody, and puts a random word
    into settings.yaml. One that finds the word of another there ends. There is no lock: a network file system may
    ignore it, and a killed process on another machine would hold it for ever.

    Once it has begun, nothing makes the folder anew: what it would put into another folder of the same name could not
    be gone on with.

    Args:
        folder: of the run.
        known: the newest state there when this training looked for one to go on from, from `newest_stamp`.
        settings_yaml: the settings of the run; when it goes on, some may have changed.
        split: of the run.
    """

    def __init__(self, folder: Path, known: Stamp | None, settings_yaml: str, split: Split) -> None:
        self.folder, self.settings_yaml, self.split = folder, settings_yaml, split
        self.word = secrets.token_hex(16)
        self.has_begun = False
        self._identities: list[tuple[int, ...] | None] = []  # of the folder and of its two files
        self._known: set[Stamp | None] = {None, known}  # what may be the newest state without being that of another

    def begin(self, step: int) -> None:
        """Publishes the settings with the word, and the split; does nothing when that is done already.

        Raises:
            Failed: when another training has saved here since this one looked, or begins just now.
        """
        if self.has_begun:
            return
        self._refuse_foreign_save(step)
        line = f"# written by the training {self.word}, which ends when another takes this place\n"
        files.publish(self.folder / SETTINGS_NAME, (line + self.settings_yaml).encode())
        files.publish(self.folder / SPLIT_NAME, self.split.to_bytes())
        self._identities, self.has_begun = self._look(), True
        self.check(step)

    def check(self, step: int) -> None:
        """Looks whether the folder is still that of this training; called before each write there.

        Some network file systems number their files anew from time to time; and a user may edit or remove one file.

        Args:
            step: which the error names.

        Raises:
            Failed: when another training writes there, or the folder was removed, renamed, emptied or replaced.
        """
        if not self.has_begun:
            return
        word, (folder, *inside) = _word_in(self.folder), self._look()
        is_same = folder is not None and folder == self._identities[0]
        if word == self.word:
            self._identities = [folder, *inside]
        elif is_same and word is not None:
            raise self._in_company("it has begun to write there after", step)
        elif is_same and any(map(operator.eq, inside, self._identities[1:])):
            self._refuse_foreign_save(step)  # settings.yaml was removed or edited: saves alone can tell
        else:
            raise Failed(
                f"the results folder {self.folder} is not there any more: it was removed, renamed or replaced while "
                "this training ran, which ends here and makes none anew; put the folder back, and the same command "
                "goes on from its last save"
            )

    def _look(self) -> list[tuple[int, ...] | None]:
        return [_identity(place) for place in (self.folder, self.folder / SETTINGS_NAME, self.folder / SPLIT_NAME)]

    def note_save(self) -> None:
        """Remembers the newest state as this training's own."""
        self._known.add(newest_stamp(self.folder))

    def _refuse_foreign_save(self, step: int) -> None:
        newest = newest_stamp(self.folder)
        if newest is not None and newest not in self._known:
            raise self._in_company(f"{newest[0]} there is not of", step)

    def _in_company(self, why: str, step: int) -> Failed:
        return Failed(
            f"another training saves in {self.folder} too: {why} this process, which ends unsaved at step {step:,}; "
            "let the other go on alone, or give each its own --results_folder"
        )


def _identity(path: Path) -> tuple[int, ...] | None:
    """Returns what no other file or folder has, as long as this one is there; None where there is none.

    The number of a file that was removed is soon given to another one, which was not changed in the same nanosecond.
    """
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    changed = () if path.is_dir() else (status.st_mtime_ns,)
    return status.st_dev, status.st_ino, *changed


def _word_in(folder: Path) -> str | None:
    """Returns the word of the training that has begun last to write in a run folder; None where it cannot be read."""
    with suppress(OSError):
        found = _WRITER.match(files.read_whole(folder / SETTINGS_NAME, at_most=_LARGEST_SETTINGS_BYTES))
        return None if found is None else found[1].decode()
    return None


# --- which files are whole ---------------------------------------------------------------------------------


class WholeFile(NamedTuple):
    """A checkpoint file whose checksum holds, whatever training wrote it."""

    path: Path
    tensors: dict[str, Tensor]
    meta: dict[str, Any]
    warnings: list[str]  # one for each newer file that is not whole


def find_newest(folder: str | os.PathLike[str]) -> WholeFile | None:
    """Finds the newest full state that is whole; None when there is no full state.

    Raises:
        UserError: when there are full states and none is whole, or the newest whole one has another format number.
    """
    return _newest_whole(Path(folder), _FULL_NAME)


def find_newest_averages(folder: str | os.PathLike[str]) -> WholeFile | None:
    """Finds the newest whole file that holds averaged weights, alone or in a full state; raises as `find_newest`."""
    return _newest_whole(Path(folder), _ANY_NAME)


def _newest_whole(folder: Path, pattern: re.Pattern[str]) -> WholeFile | None:
    warnings: list[str] = []
    for _, path in _list_saved(folder, pattern):
        try:
            return WholeFile(path, *checkpoint.load(path), warnings)
        except DamagedCheckpoint as error:
            warnings.append(f"{error}; taking the one before")
        except OSError as error:
            let_shortage_pass(error)  # the file is whole, and an older one would be no remedy
            warnings.append(f"{path}: {error.strerror or error}; taking the one before")
    if warnings:
        raise UserError(
            f"no checkpoint in {folder} can be read ({warnings[0].rpartition(';')[0]}); remove them to start from the "
            "beginning, or use another results_folder"
        )
    return None


def newest_stamp(folder: str | os.PathLike[str]) -> Stamp | None:
    """Returns the name of the newest full state, whole or not, and a digest that no other save has.

    Returns None when there is no state or it cannot be read just now.
    """
    with suppress(OSError):
        for _, path in _list_saved(Path(folder), _FULL_NAME)[:1]:
            return path.name, checkpoint.stamp(path)
    return None


def prune(folder: str | os.PathLike[str], *, step: int) -> None:
    """Removes what is no longer needed once the state of `step` is published: older states, abandoned temporaries.

    That state and the one before it stay; so do states of later steps, which `find_newest` has found damaged.
    """
    files.remove_stale_temporaries(folder)
    until_now = [path for saved_step, path in _list_saved(Path(folder), _FULL_NAME) if saved_step <= step]
    for path in until_now[_NUM_KEPT:]:
        with suppress(OSError):  # costs space only
            path.unlink()


def saved_averages(folder: str | os.PathLike[str]) -> dict[int, Path]:
    """Returns the files of averaged weights alone in a run folder, by their step."""
    return dict(_list_saved(Path(folder), _EMA_NAME))


def _list_saved(folder: Path, pattern: re.Pattern[str]) -> list[tuple[int, Path]]:
    """Returns (step, path) of the files in `folder` whose name fits, newest first; of one step, the averages first."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    steps = {name: int(match[1]) for name in names if (match := pattern.fullmatch(name))}
    newest_first = sorted(steps, key=lambda name: (-steps[name], name))
    return [(steps[name], folder / name) for name in newest_first]


def bytes_for_saves(folder: str | os.PathLike[str], count: int, model: nn.Module, ema_model: nn.Module) -> int:
    """Estimates how many more bytes a run folder takes after `count` saves.

    While a save is written, the state that it replaces is still there.
    """
    average, full = expected_bytes(model, ema_model)
    num_there = min(len(_list_saved(Path(folder), _FULL_NAME)), _NUM_KEPT)
    return count * average + max(1, min(count, _NUM_KEPT) + 1 - num_there) * full


# --- the states of a run -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class SavedState:
    """A checkpoint that was read: tensors by name, and what it says of itself."""

    path: Path
    tensors: dict[str, Tensor]
    meta: RunMeta
    warnings: list[str]

    @property
    def is_full(self) -> bool:
        """Says whether training can go on from it; otherwise it holds averaged weights alone."""
        return self.meta.training is not None

    @property
    def step(self) -> int:
        """Number of finished steps."""
        return self.meta.step

    @property
    def averages(self) -> dict[str, Tensor]:
        """The averaged weights, by their names in a `LatentDiffusion`."""
        return self._part("ema.")

    @property
    def weights(self) -> dict[str, Tensor]:
        """The weights that training goes on from, by their names in a `LatentDiffusion`; only a full state has them."""
        return self._part("model.")

    def _part(self, prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): t for name, t in self.tensors.items() if name.startswith(prefix)}


def _saved_state(file: WholeFile) -> SavedState:
    """Reads what a file says of its run; raises UserError when it is of none."""
    return SavedState(file.path, file.tensors, RunMeta.from_json(file.meta, file.path), file.warnings)


def has_state(folder: Path) -> bool:
    """Says whether a run was saved here, whether its files are valid or not."""
    return any(folder.glob("state-*.safetensors"))


def newest_state(folder: Path) -> SavedState | None:
    """Reads the newest valid full state in a run folder; None when there is none.

    Raises:
        UserError: when there are full states but none is valid.
    """
    found = find_newest(folder)
    return None if found is None else _saved_state(found)


def newest_averages(folder: Path) -> SavedState | None:
    """Reads the newest valid averaged weights in a run folder, from either kind of file; None when there are none."""
    found = find_newest_averages(folder)
    return None if found is None else _saved_state(found)


def read_state(path: Path) -> SavedState:
    """Reads one checkpoint file that the user names, which may be a link."""
    try:
        return _saved_state(WholeFile(path, *checkpoint.load(path, follow_link=True), []))
    except DamagedCheckpoint as error:
        raise UserError(f"not a whole checkpoint: {error}; give another, or the folder of the run") from error


def read_averages(place: Path) -> SavedState:
    """Reads the newest averaged weights of the run folder that --checkpoint names, or those of one checkpoint file.

    Warns of each newer file that is not whole.
    """
    if place.is_file():
        return read_state(place)
    state = newest_averages(place) if place.is_dir() else None
    if state is None:
        missing = mounts.why_missing("checkpoint", place)
        found = "is neither a checkpoint nor a folder of a run that has saved one"
        raise UserError(f"--checkpoint {place} {found if missing is None else f'does not exist; {missing}'}")
    for line in state.warnings:
        warn(line)
    return state
