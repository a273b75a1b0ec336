"""Where the figures and grids of a run go besides its folder: TensorBoard event files, and Weights & Biases.

metrics.jsonl and the pictures are written in any case. Nothing leaves the machine unless wandb is asked for. A
tracker that fails while training goes on is dropped with one warning.
"""

import importlib.util
import os
import re
import secrets
import socket
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from gait_latents.common import files, pictures
from gait_latents.common.console import harmless, warn
from gait_latents.common.errors import UserError

TENSORBOARD_FOLDER, WANDB_ID_NAME = "tensorboard", "wandb_id.txt"
_WANDB_FOLDER = "wandb"  # which wandb makes in the folder of the run
_GRID_TAG = "grid"
_LARGEST_ID_BYTES = 1000


class Tracker(Protocol):
    """A place outside the run folder that shows figures and pictures by their step."""

    def add_figures(self, step: int, figures: Mapping[str, float]) -> None:
        """Takes the figures of a step."""

    def add_picture(self, step: int, picture: Image.Image) -> None:
        """Takes the sample grid of a step."""

    def close(self) -> None:
        """Writes what waits, and ends."""


def choose(names: Sequence[str]) -> list[str]:
    """Returns the trackers that the setting `trackers` means on this machine.

    Raises:
        UserError: when the package of one that is asked for is absent, or none is named beside others.
    """
    if "none" in names and len(set(names)) > 1:
        raise UserError(f"--trackers is {' '.join(names)}; give none alone, or leave it out")
    chosen = [name for name in ("tensorboard", "wandb") if name in names]
    for name in chosen:
        if not _is_installed(name):
            raise UserError(f"--trackers {name} needs the package {name}; pip install {name}, or leave it out")
    if "auto" in names and "tensorboard" not in chosen and _is_installed("tensorboard"):
        chosen.append("tensorboard")
    return chosen


def _is_installed(package: str) -> bool:
    # A folder of that name, such as ./tensorboard or ./wandb with earlier runs, is found too, but has no file.
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None


class Trackers:
    """The trackers of a run; what is added after the last save is dropped when the run goes on from there.

    Args:
        names: from `choose`.
        folder: the results folder.
        earlier: the folder that the run began in, where it goes on from another one.
        step: the number of finished steps.
        rows: the lines of metrics.jsonl so far, told to a tracker that knows nothing of them yet.
        project: project in Weights & Biases.
        run_name: name of the run there.
        settings: plain values, shown there.

    Raises:
        UserError: when Weights & Biases cannot be started.
    """

    def __init__(
        self,
        names: Sequence[str],
        folder: Path,
        *,
        earlier: Path | None = None,
        step: int,
        rows: Iterable[Mapping[str, Any]],
        project: str,
        run_name: str,
        settings: Mapping[str, Any],
    ) -> None:
        self._open: dict[str, Tracker] = {}
        if "wandb" in names:
            self._open["wandb"] = WandB(folder, earlier=earlier, project=project, run_name=run_name, settings=settings)
        if "tensorboard" in names:
            self._guard("tensorboard", lambda: self._open_tensorboard(folder, step, rows))

    def _open_tensorboard(self, folder: Path, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
        place = folder / TENSORBOARD_FOLDER
        files.refuse_links(place / "any", below=folder)
        is_new = not any(place.glob("*tfevents*"))
        tracker = TensorBoard(place, first_step=step + 1)
        self._open["tensorboard"] = tracker
        for row in rows if is_new else ():
            tracker.add_figures(row["step"], flat_figures(row))

    def add_row(self, row: Mapping[str, Any]) -> None:
        """Tells each tracker a line of metrics.jsonl."""
        figures = flat_figures(row)
        for name, tracker in list(self._open.items()):
            self._guard(name, lambda tracker=tracker: tracker.add_figures(row["step"], figures))

    def add_picture(self, step: int, picture: Image.Image) -> None:
        """Shows each tracker a sample grid."""
        for name, tracker in list(self._open.items()):
            self._guard(name, lambda tracker=tracker: tracker.add_picture(step, picture))

    def close(self) -> None:
        """Ends each tracker."""
        for name, tracker in list(self._open.items()):
            self._guard(name, tracker.close)
        self._open.clear()

    def _guard(self, name: str, action: Callable[[], None]) -> None:
        """Calls `action` for a tracker, and drops the tracker with a warning when it fails: training must go on."""
        try:
            action()
        except Exception as error:
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            warn(f"{name} gets no more figures ({reason}); training goes on, and metrics.jsonl has them all")
            self._open.pop(name, None)


def flat_figures(row: Mapping[str, Any]) -> dict[str, float]:
    """Returns the figures of a line of metrics.jsonl by name, those of a table as table/name; the step is none."""
    figures = {}
    for name, value in row.items():
        if isinstance(value, Mapping):
            figures |= {f"{name}/{inner}": number for inner, number in flat_figures(value).items()}
        elif name != "step" and type(value) in (int, float):
            figures[name] = float(value)
    return figures


class TensorBoard:
    """An event file of TensorBoard, complete after each line; torch's own writer would need a thread of its own.

    Args:
        folder: where the event files are.
        first_step: what earlier event files hold from this step on is not shown any more.
    """

    def __init__(self, folder: Path, *, first_step: int) -> None:
        self._proto = importlib.import_module("tensorboard.compat.proto.event_pb2")
        self._summary = importlib.import_module("tensorboard.compat.proto.summary_pb2").Summary
        records = importlib.import_module("tensorboard.summary.writer.record_writer")
        files.make_folder(folder)
        name = f"events.out.tfevents.{_next_time(folder)}.{socket.gethostname()}.{os.getpid()}"
        self._file = (folder / name).open("xb")
        self._records = records.RecordWriter(self._file)
        self._write(file_version="brain.Event:2")
        start = self._proto.SessionLog(status=self._proto.SessionLog.START)
        self._write(step=first_step, session_log=start)

    def add_figures(self, step: int, figures: Mapping[str, float]) -> None:
        """Takes the figures of a step."""
        values = [self._summary.Value(tag=name, simple_value=number) for name, number in figures.items()]
        self._write(step=step, summary=self._summary(value=values))

    def add_picture(self, step: int, picture: Image.Image) -> None:
        """Takes the sample grid of a step."""
        shown = self._summary.Image(
            encoded_image_string=pictures.encode_image(picture, ".png"),
            width=picture.width,
            height=picture.height,
            colorspace=len(picture.getbands()),
        )
        self._write(step=step, summary=self._summary(value=[self._summary.Value(tag=_GRID_TAG, image=shown)]))

    def _write(self, **facts: Any) -> None:
        self._records.write(self._proto.Event(wall_time=time.time(), **facts).SerializeToString())
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


_EVENTS_NAME = re.compile(r"events\.out\.tfevents\.([0-9]{1,10})\..*", re.DOTALL)


def _next_time(folder: Path) -> str:
    """Returns the time to name an event file by, in seconds: now, but later than those in the names that are there.

    The files are read in the order of their names, and the clock may have been set back since the last one. Of one
    second, they would else come in any order.
    """
    found = (_EVENTS_NAME.fullmatch(path.name) for path in folder.iterdir())
    last = max((int(match[1]) for match in found if match), default=0)
    return f"{max(time.time(), last + 1.0):014.3f}"


class WandB:
    """A run in Weights & Biases, or in its offline folder; a run that goes on is the same run there.

    What is told again after a kill has the same values, and is not taken twice: a step there never goes back.
    """

    def __init__(
        self, folder: Path, *, earlier: Path | None, project: str, run_name: str, settings: Mapping[str, Any]
    ) -> None:
        files.make_folder(folder)
        files.refuse_links(folder / _WANDB_FOLDER / "any", below=folder)
        places = [folder] if earlier is None else [folder, earlier]
        known = (_read_id(place / WANDB_ID_NAME) for place in places)
        run_id = next(filter(None, known), None) or secrets.token_hex(4)
        try:
            self._wandb = importlib.import_module("wandb")
            self._run = self._wandb.init(
                project=project,
                name=harmless(run_name, one_line=True),
                id=run_id,
                resume="allow",
                dir=str(folder),
                config={name: _shown(value) for name, value in settings.items()},
                # Figures and grids alone: no output of the terminal, no code, nothing about the machine's repository.
                settings=self._wandb.Settings(console="off", disable_git=True, save_code=False),
            )
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"--trackers wandb cannot start ({reason}); log in with `wandb login`, set WANDB_MODE=offline, or "
                "leave it out"
            ) from error
        files.publish(folder / WANDB_ID_NAME, run_id.encode(), below=folder)

    def add_figures(self, step: int, figures: Mapping[str, float]) -> None:
        """Takes the figures of a step."""
        self._run.log(dict(figures), step=step)

    def add_picture(self, step: int, picture: Image.Image) -> None:
        """Takes the sample grid of a step."""
        self._run.log({_GRID_TAG: self._wandb.Image(picture)}, step=step)

    def close(self) -> None:
        """Sends what waits, and ends the run."""
        self._run.finish()


def _shown(value: Any) -> Any:
    """Returns a setting with its texts as a page may show them."""
    if isinstance(value, list | tuple):
        return [_shown(item) for item in value]
    return harmless(value, one_line=True) if isinstance(value, str) else value


def _read_id(path: Path) -> str | None:
    try:
        text = files.read_whole(path, at_most=_LARGEST_ID_BYTES).decode("ascii", "replace").strip()
    except FileNotFoundError:
        return None
    if not text.isalnum():
        raise UserError(f"{path} is damaged; remove it, and Weights & Biases gets a new run")
    return text
