"""What a run keeps on disk: settings, split, checkpoints, metrics. One home for their names and meaning.

results/settings.yaml               the settings of the run, itself a valid --config
results/split.json                  which images it trains on
results/state-00002000.safetensors  everything needed to go on; the last two are kept
results/ema-00002000.safetensors    the averaged weights alone; one at every save
results/metrics.jsonl               a line of figures every log_every steps
results/grid-00002000.png, loss.png
results/tensorboard/                the same figures and grids as events, where TensorBoard is installed
"""

import hashlib
import os
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from gait_latents.common import files, mounts
from gait_latents.common.console import warn
from gait_latents.common.errors import Failed, UserError, let_shortage_pass
from gait_latents.common.layout import SETTINGS_NAME, SPLIT_NAME
from gait_latents.images.split import LARGEST_SPLIT_BYTES, Split
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


class OpenFolder:
    """The folder of a run that is under way, known by its settings and its split, which this publishes.

    When it goes on, some settings may have changed. Once it is open, nothing makes it anew: what a process would put
    into another folder of the same name could not be gone on with.

    Attributes:
        path: the folder.
    """

    def __init__(self, path: Path, settings_yaml: str, split: Split) -> None:
        self.path = path
        contents = {path / SETTINGS_NAME: settings_yaml.encode(), path / SPLIT_NAME: split.to_bytes()}
        for name, content in contents.items():
            files.publish(name, content)
        self._digests = {name: hashlib.sha256(content).digest() for name, content in contents.items()}
        self._note_identity()

    def _note_identity(self) -> None:
        self._folder = _identity(self.path)
        self._files = {name: _identity(name) for name in self._digests}

    def check(self) -> None:
        """Raises Failed where the folder is gone, empty, or another one."""
        if not self._is_there():
            raise Failed(
                f"the results folder {self.path} is not there any more: it was removed, renamed or replaced while this "
                "training ran, which ends here and makes none anew; put the folder back, and the same command goes on "
                "from its last save"
            )

    def _is_there(self) -> bool:
        """Says whether one of the two files is the very one in the very folder, or both have the same content.

        Some network file systems number their files anew from time to time; and a user may edit or remove one file.
        """
        if _identity(self.path) == self._folder and any(_identity(name) == one for name, one in self._files.items()):
            return True
        if not all(_has_digest(name, digest) for name, digest in self._digests.items()):
            return False
        self._note_identity()
        return True


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


def _has_digest(path: Path, digest: bytes) -> bool:
    try:
        return hashlib.sha256(files.read_whole(path, at_most=LARGEST_SPLIT_BYTES)).digest() == digest
    except OSError:
        return False


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


def newest_stamp(folder: str | os.PathLike[str]) -> tuple[str, str] | None:
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
