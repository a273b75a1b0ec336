"""Generates images of each class with a trained model, one folder per class.

    python generate.py --checkpoint results --images_per_class 50
    python generate.py --checkpoint results --classes ID_1 ID_7 --cond_scale 3
    python generate.py --checkpoint results --strip 1 1.5 2 3 4 6

An image depends on the checkpoint, the settings, its class and its number alone. Running it again makes only what is
missing.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until `main` begins, Ctrl-C ends without a traceback

import csv
import difflib
import io
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import config
import script
from config import GenerateSettings, UserError

if __name__ == "__main__":
    script.check_command_line(GenerateSettings, __doc__)

import numpy as np
import torch
from PIL import Image

import disk
import durable
import hardware
import images
import pictures
import prepare
from images import BadImage
from ranks import ALONE, Ranks, joined
from run_folder import SavedState, read_averages
from sampling import BATCH_SIZE
from script import DONE, LABELS_NAME, RECORD_NAME, Failed, Progress, StopSignals, say, warn
from trained_model import FROM_RUN, TrainedModel
from write_behind import WriteBehind

_OVERVIEW_NAME, _STRIP_NAME = "overview.png", "strip.png"
LARGEST_RECORD_BYTES = 1 << 20
_MOST_UNWRITTEN = 2 * BATCH_SIZE  # images that wait to be written while the next are made
_OVERVIEW_ROWS, _OVERVIEW_COLUMNS = 16, 6


@script.command
def main(argv: Sequence[str] | None) -> int:
    """Runs the script; returns its exit code."""
    with joined() as ranks:
        try:
            with ranks.together():
                generator = open_generator(argv, ranks)
            ranks.check_same(generator.facts(), "start all with the same command, and let all see the same run")
            return generator.make_strip() if generator.settings.strip else generator.make_images()
        except torch.OutOfMemoryError as error:
            raise Failed(hardware.TOO_LITTLE_MEMORY) from error


def open_generator(argv: Sequence[str] | None, ranks: Ranks) -> "Generator":
    """Puts together flags, file, the settings of the run and the defaults, and reads the newest averaged weights."""
    layers = config.read_command_line(GenerateSettings, argv, description=__doc__)
    state = read_averages(Path(config.resolve(GenerateSettings, layers).settings.checkpoint))
    for line in state.warnings:
        warn(line)
    of_run = state.meta.chosen_settings(*FROM_RUN)
    layers.append(config.stored_layer(GenerateSettings, f"run {state.path.parent}", of_run))
    resolved = config.resolve(GenerateSettings, layers)
    settings: GenerateSettings = resolved.settings
    for line in resolved.changes():
        say(line)
    prepare.refuse_to_be_a_class(Path(settings.output_folder), state.meta.settings.get("data_path"))
    device = hardware.pick_device(ranks.device_name(settings.device))
    ranks.say_unused(settings.device, "generate.py")
    generator = Generator(settings, state, device, ranks)
    say(generator.description)
    return generator


@dataclass(frozen=True)
class Cell:
    """One image to make."""

    label: int
    class_name: str
    index: int
    path: Path


class Generator(TrainedModel):
    """The averaged network of a checkpoint, ready to make images: a folder of them, or a strip."""

    def __init__(
        self, settings: GenerateSettings, state: SavedState, device: torch.device, ranks: Ranks = ALONE
    ) -> None:
        self.classes = _chosen_classes(settings.classes, state.meta.classes)  # a misspelt name is told at once
        super().__init__(settings, state, device)
        self.ranks = ranks
        self.folder = Path(settings.output_folder)
        interval = settings.guidance_interval
        where = "" if interval == (0, 1) else f" from {interval[0]:g} to {interval[1]:g} of the way"
        passes = self.diffusion.num_passes(self.steps, cond_scale=settings.cond_scale, guidance_interval=interval)
        self.description = (
            f"{state.path} (step {state.step:,}), {len(self.classes)} of {len(self.all_classes)} classes, guidance "
            f"{settings.cond_scale:g}{where}, {self.steps} steps of {settings.sampler} ({passes} network passes), "
            f"{str(self.dtype).removeprefix('torch.')} ({self.precision_reason}) on {hardware.describe(device)}"
        )

    # --- one folder per class ---

    def make_images(self) -> int:
        """Makes the images that are missing in the output folder; writes labels.csv and settings.json.

        Each process makes its share; rank 0 waits for the others' files, and makes those that do not appear, as on
        the disk of another machine.
        """
        with self.ranks.together():
            cells = _not_there(self._cells())
            self._go_on_as_begun()
            script.check_writable(self.folder, "output_folder")
            if cells:
                self.decoder.open()  # before anything is written
        self.ranks.check_same({"the decoder in": self.decoder.dtype}, "give --precision float32")
        with self.ranks.together():
            self._check_output_folder()
        there = len(self.classes) * self.settings.images_per_class - len(cells)
        if there:
            say(f"{there:,} of the images are already there")
        self._tell_disk(len(cells))
        with (
            StopSignals() as signals,
            script.progress(total=len(cells), unit="images", label="generate") as bar,
        ):
            try:
                self._make(self.ranks.share(cells), bar, signals)
                if not self.ranks.is_main:
                    return DONE
                if self.ranks.count > 1:
                    self._await_others(cells, bar, signals)
                    self._make(_not_there(cells), bar, signals)
            finally:
                self.ranks.tell("made")
                if self.ranks.is_main:
                    self._write_labels()
        say(
            f"{len(cells):,} images made in {self.folder} ({self.suffix[1:]}, {LABELS_NAME}); "
            f"peak memory {hardware.peak_memory(self.device)}"
        )
        say(f"the first of each class: {self._draw_overview()}")
        places = {"checkpoint": self.settings.checkpoint, "synthetic_path": self.settings.output_folder}
        flags = "".join(f" --{name} {shlex.quote(place)}" for name, place in places.items())
        say(f"next: {script.python_word()} evaluate_images.py{flags}")
        return DONE

    def _go_on_as_begun(self) -> None:
        """Decodes as the images were that are in the folder already."""
        path = self.folder / RECORD_NAME
        if path.exists() and not self.settings.strip:
            began = _read_record(path)["decoder_precision"]
            if isinstance(began, str) and began in hardware.NUMBER_FORMATS:  # else the folder is refused
                self.decoder.go_on_in(hardware.NUMBER_FORMATS[began])

    def _make(self, cells: Sequence[Cell], bar: Progress, signals: StopSignals) -> None:
        with WriteBehind(self._write, at_most=_MOST_UNWRITTEN) as writer:
            for start in range(0, len(cells), BATCH_SIZE):
                bar.advance(self._make_batch(cells[start : start + BATCH_SIZE], writer))
                self.ranks.raise_if_stopped(signals)
            bar.advance(writer.finish())

    def _await_others(self, cells: Sequence[Cell], bar: Progress, signals: StopSignals) -> None:
        self.ranks.tell("made")
        to_come = len(cells) - len(self.ranks.share(cells))

        def look() -> tuple[int, int]:
            nonlocal to_come
            self.ranks.raise_if_stopped(signals)
            before, to_come = to_come, len(_not_there(cells))
            bar.advance(before - to_come)
            return before - to_come, to_come

        self.ranks.await_others("made", look)

    def _tell_disk(self, count: int) -> None:
        num_bytes = count * self.meta.image_size**2 * pictures.BYTES_PER_PIXEL[self.suffix]
        disk.tell(num_bytes, f"{count:,} images", self.folder, remedy="give another --output_folder")

    def _draw_overview(self) -> Path:
        names = list(self.classes.values())[:_OVERVIEW_ROWS]
        shown = [cell for cell in self._cells() if cell.index < _OVERVIEW_COLUMNS]
        side = self.meta.image_size
        rows = [[_read_made(cell.path, side) for cell in shown if cell.class_name == name] for name in names]
        path = self.folder / _OVERVIEW_NAME
        pictures.save_picture(pictures.labelled_grid(rows, names), path)
        return path

    def _make_batch(self, cells: Sequence[Cell], writer: WriteBehind) -> int:
        """Makes these images and hands them to the writer; returns how many images it has written meanwhile."""
        samples = self.sample([c.label for c in cells], [c.index for c in cells], self.settings.cond_scale)
        return sum(writer.put(cell.path, image) for cell, image in zip(cells, self.decoder(samples), strict=True))

    def _write(self, path: Path, image: np.ndarray) -> None:
        durable.publish(path, pictures.encode_image(Image.fromarray(image), self.suffix))

    def _cells(self) -> list[Cell]:
        return [
            Cell(label, name, index, self.folder / name / f"{name}_{index:06d}{self.suffix}")
            for label, name in self.classes.items()
            for index in range(self.settings.images_per_class)
        ]

    def _check_output_folder(self) -> None:
        """Refuses a folder whose images were made in another way, and writes down how these are made."""
        for place in (self.folder, *(self.folder / name for name in self.classes.values())):
            durable.remove_stale_temporaries(place)
        self._refuse_other_images()
        path = self.folder / RECORD_NAME
        if not path.exists():  # else it stays as it is, with what an earlier version has written into it
            durable.publish(path, (json.dumps(self._record(), indent=2) + "\n").encode())

    def _refuse_other_images(self) -> None:
        record, path = self._record(), self.folder / RECORD_NAME
        if path.exists():
            before = _read_record(path)
            for name, value in record.items():
                if before.get(name) != value:
                    then = str(before.get(name))[:100]
                    raise UserError(
                        f"{self.folder} holds images made with {name} {then}, now it is {value}; give another "
                        "--output_folder"
                    )

    def _record(self) -> dict[str, Any]:
        """Returns all that the images of the folder have in common."""
        return {
            "weights": self.weights_digest,
            "step": self.meta.step,
            "cond_scale": self.settings.cond_scale,
            "guidance_interval": list(self.settings.guidance_interval),
            "sampler": self.settings.sampler,
            "sampling_timesteps": self.steps,
            "seed": self.settings.seed,
            "precision": str(self.dtype).removeprefix("torch."),
            "decoder_precision": str(self.decoder.dtype).removeprefix("torch."),
            "image_format": self.suffix[1:],
            "vae": self.vae_name,
        }

    def facts(self) -> dict[str, object]:
        """Returns what all processes must have alike."""
        asked = {name: getattr(self.settings, name) for name in ("classes", "images_per_class", "strip")}
        return {**self._record(), **{f"--{name}": config.show(value) for name, value in asked.items()}}

    def _write_labels(self) -> None:
        """Lists every image of the folder with its class and label."""
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow(["file", "class", "label"])
        for label, name in enumerate(self.all_classes):
            for path in sorted((self.folder / name).glob(f"*{self.suffix}")):
                writer.writerow([f"{name}/{path.name}", name, label])
        durable.publish(self.folder / LABELS_NAME, buffer.getvalue().encode("utf-8", "surrogateescape"))

    # --- a picture to choose the guidance by ---

    def make_strip(self) -> int:
        """Draws one image per class and guidance scale, with the same noise along a row; rank 0 does so."""
        if not self.ranks.is_main:
            return DONE
        script.check_writable(self.folder, "output_folder")
        self.decoder.open()  # first, for it says how all is computed: float32 on a GPU as TF32 or not
        scales, columns = self.settings.strip, []
        labels = list(self.classes)
        with script.progress(total=len(scales) * len(labels), unit="images", label="strip") as bar:
            for scale in scales:
                column = []
                for start in range(0, len(labels), BATCH_SIZE):
                    part = labels[start : start + BATCH_SIZE]
                    column += self.decoder(self.sample(part, [0] * len(part), scale))
                    bar.advance(len(part))
                columns.append(column)
        rows = [list(row) for row in zip(*columns, strict=True)]
        path = self.folder / _STRIP_NAME
        picture = pictures.labelled_grid(rows, list(self.classes.values()), [f"{scale:g}" for scale in scales])
        pictures.save_picture(picture, path)
        say(f"classes from top to bottom, guidance scales from left to right: {path}")
        return DONE


def _not_there(cells: Sequence[Cell]) -> list[Cell]:
    return [cell for cell in cells if not cell.path.is_file()]


def _read_made(path: Path, image_size: int) -> np.ndarray:
    try:
        return images.decode(durable.read_whole(path, at_most=images.MAX_FILE_BYTES), image_size=image_size)
    except (OSError, BadImage) as error:
        raise Failed(
            f"{path} is damaged; remove it, and the same command makes it again ({getattr(error, 'strerror', error)})"
        ) from error


def _read_record(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(durable.read_whole(path, at_most=LARGEST_RECORD_BYTES))
    except (OSError, ValueError, RecursionError):
        record = None
    if not isinstance(record, dict):
        raise UserError(f"{path} is damaged; give another --output_folder")
    return {**_BEFORE_RECORDED, **config.with_later_settings(record)}


# What was done before settings.json said so.
_BEFORE_RECORDED = {"decoder_precision": "float32"}


def _chosen_classes(asked: Sequence[str], known: Sequence[str]) -> dict[int, str]:
    """Returns label -> name of the classes asked for, in the order of their labels."""
    if tuple(asked) == ("all",):
        return dict(enumerate(known))
    for name in asked:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"it knows {', '.join(known[:40])}"
            raise UserError(f"--classes: the model has no class {name}; {hint}")
    return {label: name for label, name in enumerate(known) if name in asked}


if __name__ == "__main__":
    sys.exit(main(None))
