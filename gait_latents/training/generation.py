"""Makes the images of a folder, or a strip over guidance scales, with the averaged network of a run."""

import errno
import os
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from gait_latents.common import cli, console, files, hardware, pictures
from gait_latents.common.console import Progress, say, show_name, warn
from gait_latents.common.distributed import ALONE, Ranks
from gait_latents.common.errors import DONE, UserError
from gait_latents.common.layout import LABELS_NAME, OVERVIEW_NAME, RECORD_NAME, SPLIT_NAME, STRIP_NAME
from gait_latents.common.process import StopSignals
from gait_latents.diffusion.sampling import BATCH_SIZE
from gait_latents.images import generated, labels_csv, names, selection
from gait_latents.images.counts import counts_as_asked, counts_to_fill, describe_counts
from gait_latents.images.generated import Cell, Digests, file_name, list_made, list_missing, read_made, read_record
from gait_latents.images.split import read_split
from gait_latents.images.write_behind import WriteBehind
from gait_latents.settings import GenerateSettings
from gait_latents.training import run_folder
from gait_latents.training.run_folder import SavedState
from gait_latents.training.trained_model import FROM_RUN, TrainedModel

_MOST_UNWRITTEN = 2 * BATCH_SIZE  # images that wait to be written while the next are made
_OVERVIEW_ROWS, _OVERVIEW_COLUMNS = 16, 6
_NUM_LISTED = 3  # damaged images
_LONGEST_TEMPORARY = 64  # letters that the name of a file that is being written may have


def open_generator(argv: Sequence[str] | None, description: str | None = None, ranks: Ranks = ALONE) -> "Generator":
    """Puts together flags, file, the settings of the run and the defaults, and reads the newest averaged weights."""
    with ranks.together():
        layers = cli.Layers(GenerateSettings, argv, description=description)
        state = run_folder.read_averages(Path(layers.settings.checkpoint))
        layers.add(f"the run in {state.path.parent}", state.meta.chosen_settings(*FROM_RUN))
        settings = _one_number(layers.resolve())
        selection.refuse_to_be_a_class(Path(settings.output_folder), state.meta.settings.get("data_path"))
        device = hardware.pick_device(ranks.device_name(settings.device))
        ranks.say_unused(settings.device, "generate.py")
        generator = Generator(settings, state, device, ranks)
        say(generator.description)
    ranks.check_same(generator.facts(), "start all with the same command, and let all see the same run")
    return generator


class Generator(TrainedModel):
    """The averaged network of a checkpoint, ready to make images: a folder of them, or a strip."""

    def __init__(
        self, settings: GenerateSettings, state: SavedState, device: torch.device, ranks: Ranks = ALONE
    ) -> None:
        self.classes = _choose_classes(settings.classes, state.meta.classes)  # a misspelt name is told at once
        self.counts = _choose_counts(settings, state, list(self.classes.values()))
        super().__init__(settings, state, device)
        self.ranks = ranks
        self.folder = Path(settings.output_folder)
        self.made: Digests = {}  # of the images that are whole, as rank 0 has found or made them
        interval = settings.guidance_interval
        where = "" if interval == (0, 1) else f" from {interval[0]:g} to {interval[1]:g} of the way"
        passes = self.diffusion.num_passes(
            self.steps,
            cond_scale=settings.cond_scale,
            guidance_interval=interval,
            strength=self.strength,
        )
        self.description = (
            f"{state.path} (step {state.step:,}), {len(self.classes)} of {len(self.all_classes)} classes, guidance "
            f"{settings.cond_scale:g}{where}, {self.steps} steps of {settings.sampler} ({passes} network passes), "
            f"{str(self.dtype).removeprefix('torch.')} ({self.precision_reason}) on {hardware.describe(device)}"
        )
        if settings.from_real is not None:
            self.description += f"\nbeginning with training images at strength {settings.from_real:g}"
        if not settings.strip:
            goal = settings.fill_up_to
            fill = "" if goal is None else f" fill the classes up to {goal:,}, the training images counted"
            self.description += f"\n{sum(self.counts.values()):,} images{fill}: {describe_counts(self.counts)}"

    # --- one folder per class ---

    def make_images(self) -> int:
        """Makes the images that are missing in the output folder; writes labels.csv and settings.json.

        Each process makes its share; rank 0 waits for the others' files, and makes those that do not appear, as on
        the disk of another machine.
        """
        with self.ranks.together():
            self._refuse_links()
            self._go_on_as_begun()
            files.check_writable(self.folder, "output_folder")
            damaged = self._look_for_damage() if self.ranks.is_main else []
        cells = self._cells_to_make()
        with self.ranks.together():
            if cells:
                self.decoder.open()  # before anything is written
        self.ranks.check_same({"the decoder in": self.decoder.dtype}, "give --precision float32")
        with self.ranks.together():
            self._check_output_folder()
            if self.ranks.is_main:
                self._remove_damaged(damaged, cells)
        there = sum(self.counts.values()) - len(cells)
        if there:
            say(f"{there:,} of the images are already there")
        self._tell_disk(len(cells))
        with (
            StopSignals(after="this image") as signals,
            console.progress(total=len(cells), unit="images", label="generate") as bar,
        ):
            try:
                self._make(self.ranks.share(cells), bar, signals)
                if not self.ranks.is_main:
                    return DONE
                if self.ranks.count > 1:
                    self._await_others(cells, bar, signals)
                    self._make(list_missing(cells), bar, signals)
            finally:
                self.ranks.tell("made")
                if self.ranks.is_main:
                    self._write_lists(has_made=bool(cells))
        say(
            f"{len(cells):,} images made in {self.folder} ({self.suffix[1:]}, {LABELS_NAME}); "
            f"peak memory {hardware.peak_memory(self.device)}"
        )
        self._draw_overview()
        places = {"checkpoint": self.settings.checkpoint, "synthetic_path": self.settings.output_folder}
        flags = "".join(f" {cli.typed(name, [place])}" for name, place in places.items())
        say(f"next: {console.python_word()} evaluate_images.py{flags}")
        return DONE

    def _refuse_links(self) -> None:
        """Raises OSError where the folder of a class is a link: what is read and written would be elsewhere."""
        for name in self.all_classes:
            files.refuse_links(self.folder / name / "image", below=self.folder)

    def _look_for_damage(self) -> list[str]:
        """Notes the digests of the images that are whole; returns those that are damaged, as class/file."""
        record = generated.record_or_none(self.folder / RECORD_NAME)
        listed = self._list_made()
        self.made, damaged = generated.check_made(
            self.folder, listed, image_size=self.meta.image_size, digests=generated.digests_of(record)
        )
        return damaged

    def _list_made(self) -> dict[str, list[str]]:
        return {name: list_made(self.folder / name, name, self.suffix) for name in self.all_classes}

    def _cells_to_make(self) -> list[Cell]:
        """Returns the images asked for that rank 0 has not found whole. A collective."""
        cells = self._cells()
        whole = self.made
        places = [i for i, cell in enumerate(cells) if cell.path.name not in whole.get(cell.class_name, {})]
        return [cells[i] for i in self.ranks.of_main(places if self.ranks.is_main else [])]

    def _remove_damaged(self, damaged: Sequence[str], cells: Sequence[Cell]) -> None:
        """Tells which images are damaged, and removes those that are made again: no process takes them for made."""
        to_make = {f"{cell.class_name}/{cell.path.name}": cell.path for cell in cells}
        again = [place for place in damaged if place in to_make]
        others = [place for place in damaged if place not in to_make]
        if again:
            warn(
                f"{len(again):,} of the images in {self.folder} are damaged or not those that were made, and are made "
                f"again: {names.name_list(again, limit=_NUM_LISTED)}"
            )
        if others:
            warn(
                f"{len(others):,} images in {self.folder} that this command does not ask for are damaged or not those "
                f"that were made, and are left out of {LABELS_NAME}: {names.name_list(others, limit=_NUM_LISTED)}"
            )
        for place in again:
            to_make[place].unlink(missing_ok=True)

    def _go_on_as_begun(self) -> None:
        """Decodes in the number format of the images that are in the folder already."""
        path = self.folder / RECORD_NAME
        if os.path.lexists(path) and not self.settings.strip:
            began = read_record(path)["decoder_precision"]
            if isinstance(began, str) and began in hardware.NUMBER_FORMATS:  # else the folder is refused
                self.decoder.go_on_in(hardware.NUMBER_FORMATS[began])

    def _make(self, cells: Sequence[Cell], bar: Progress, signals: StopSignals) -> None:
        with WriteBehind(self._write, at_most=_MOST_UNWRITTEN) as writer:
            for start in range(0, len(cells), BATCH_SIZE):
                self._make_batch(cells[start : start + BATCH_SIZE], writer, bar, signals)
                self.ranks.raise_if_stopped(signals)
            bar.advance(writer.finish())

    def _await_others(self, cells: Sequence[Cell], bar: Progress, signals: StopSignals) -> None:
        self.ranks.tell("made")
        to_come = len(cells) - len(self.ranks.share(cells))

        def look() -> tuple[int, int]:
            nonlocal to_come
            self.ranks.raise_if_stopped(signals)
            before, to_come = to_come, len(list_missing(cells))
            bar.advance(before - to_come)
            return before - to_come, to_come

        self.ranks.await_others("made", look)

    def _tell_disk(self, count: int) -> None:
        num_bytes = count * self.meta.image_size**2 * pictures.BYTES_PER_PIXEL[self.suffix]
        console.tell(num_bytes, f"{count:,} images", self.folder, remedy="give another --output_folder")

    def _draw_overview(self) -> None:
        path = self.folder / OVERVIEW_NAME
        if path.is_dir():  # of a class of that name in a run that began when it could have it
            warn(f"no picture of the first of each class: {path} is the folder of a class")
            return
        shown_classes = [name for name, count in self.counts.items() if count][:_OVERVIEW_ROWS]
        shown = [cell for cell in self._cells() if cell.index < _OVERVIEW_COLUMNS]
        side = self.meta.image_size
        rows = [[read_made(cell.path, side) for cell in shown if cell.class_name == name] for name in shown_classes]
        pictures.save_picture(pictures.labelled_grid(rows, shown_classes), path)
        say(f"the first of each class: {path}")

    def _make_batch(self, cells: Sequence[Cell], writer: WriteBehind, bar: Progress, signals: StopSignals) -> None:
        """Makes these images, and hands each to the writer when it is decoded; after a signal, no more of them."""

        def between() -> None:
            if signals.received is not None:  # the others are asked after each batch alone, for that takes time
                self.ranks.raise_if_stopped(signals)

        labels, indices = [cell.label for cell in cells], [cell.index for cell in cells]
        samples = self.sample(labels, indices, self.settings.cond_scale, between=between)
        for cell, image in zip(cells, self.decoder.each(samples, between), strict=True):
            bar.advance(writer.put(cell.path, image))

    def _write(self, path: Path, image: np.ndarray) -> None:
        data = pictures.encode_image(Image.fromarray(image), self.suffix)
        files.refuse_links(path, below=self.folder)  # again, for this takes hours
        files.publish(path, data)
        self.made.setdefault(path.parent.name, {})[path.name] = generated.digest(data)

    def _cells(self) -> list[Cell]:
        return [
            Cell(label, name, index, self.folder / name / file_name(name, index, self.suffix))
            for label, name in self.classes.items()
            for index in range(self.counts[name])
        ]

    def _check_output_folder(self) -> None:
        """Refuses a folder whose images were made in another way, and writes down how these are made."""
        for place in (self.folder, *(self.folder / name for name in self.classes.values())):
            files.remove_stale_temporaries(place)
        self._refuse_other_images()
        self._make_folders()
        path = self.folder / RECORD_NAME
        if not os.path.lexists(path):  # else it stays as it is, with what an earlier version has written into it
            files.publish(path, generated.record_bytes(self._record(), {}))

    def _make_folders(self) -> None:
        """Makes a folder for each class, so that a disk that takes no such names is told before any image is made."""
        owners: dict[tuple[int, int], str] = {}
        for name in (name for name, count in self.counts.items() if count):
            place = self.folder / name
            try:
                if name in (RECORD_NAME, LABELS_NAME):
                    raise FileExistsError(errno.EEXIST, "a file is to have that name")
                place.mkdir(parents=True, exist_ok=True)
                status = place.stat()
                for file in (file_name(name, 0, self.suffix), "x" * _LONGEST_TEMPORARY):
                    with suppress(FileNotFoundError):
                        (place.absolute() / file).lstat()
            except OSError as error:
                raise UserError(
                    f"--output_folder {self.folder} cannot have a folder for the class {show_name(name)} "
                    f"({error.strerror or error}); give another, or name the other classes with --classes"
                ) from error
            other = owners.setdefault((status.st_dev, status.st_ino), name)
            if other != name:
                raise UserError(
                    f"--output_folder {self.folder} has one folder for the classes {show_name(other)} and "
                    f"{show_name(name)}, as a disk does that takes their names for one; give another, or name one of "
                    "them with --classes"
                )

    def _refuse_other_images(self) -> None:
        record, path = self._record(), self.folder / RECORD_NAME
        if os.path.lexists(path):
            before = read_record(path)
            for name, value in {**record, "from_real": self.settings.from_real}.items():
                if before.get(name) != value:
                    then = str(before.get(name))[:100]
                    raise UserError(
                        f"{self.folder} holds images made with {name} {then}, now it is {value}; give another "
                        "--output_folder"
                    )

    def _record(self) -> dict[str, Any]:
        """Returns what settings.json says: all that the images of a folder have in common."""
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
            **({} if self.settings.from_real is None else {"from_real": self.settings.from_real}),
        }

    def facts(self) -> dict[str, object]:
        """Returns what must be the same on all processes."""
        asked = {name: getattr(self.settings, name) for name in ("classes", "images_per_class", "fill_up_to", "strip")}
        return {**self._record(), **{f"--{name}": cli.show(value) for name, value in asked.items()}}

    def _write_lists(self, *, has_made: bool) -> None:
        """Lists every image of the folder that is whole: in labels.csv, and with its digest in settings.json.

        The record of an older version, which has no digests, stays as it is where nothing was made.
        """
        whole = self._whole_by_now()
        files.publish(self.folder / LABELS_NAME, labels_csv.to_bytes(self.all_classes, whole))
        path = self.folder / RECORD_NAME
        record = generated.record_or_none(path) or self._record()
        if (has_made or generated.DIGESTS in record) and generated.digests_of(record) != whole:
            files.publish(path, generated.record_bytes(record, whole))

    def _whole_by_now(self) -> Digests:
        """Returns the digests of the images in the folder; those that others have made meanwhile are read for it."""
        listed = self._list_made()
        new = {name: [file for file in found if file not in self.made.get(name, {})] for name, found in listed.items()}
        digests = generated.digests_of(generated.record_or_none(self.folder / RECORD_NAME))
        others, _ = generated.check_made(self.folder, new, image_size=self.meta.image_size, digests=digests)
        known = {name: {**self.made.get(name, {}), **others.get(name, {})} for name in listed}
        return {
            name: {file: known[name][file] for file in found if file in known[name]} for name, found in listed.items()
        }

    # --- a picture to choose the guidance by ---

    def make_strip(self) -> int:
        """Draws one image per class and guidance scale, with the same noise along a row; rank 0 does so."""
        if not self.ranks.is_main:
            return DONE
        files.check_writable(self.folder, "output_folder")
        path = self.folder / STRIP_NAME
        if path.is_dir():
            raise UserError(f"{path} is a folder, of a class of that name; give another --output_folder")
        self.decoder.open()  # first, for it says how all is computed: float32 on a GPU as TF32 or not
        scales, columns = self.settings.strip, []
        labels = list(self.classes)
        with console.progress(total=len(scales) * len(labels), unit="images", label="strip") as bar:
            for scale in scales:
                column = []
                for start in range(0, len(labels), BATCH_SIZE):
                    part = labels[start : start + BATCH_SIZE]
                    column += self.decoder(self.sample(part, [0] * len(part), scale))
                    bar.advance(len(part))
                columns.append(column)
        rows = [list(row) for row in zip(*columns, strict=True)]
        picture = pictures.labelled_grid(rows, list(self.classes.values()), [f"{scale:g}" for scale in scales])
        pictures.save_picture(picture, path)
        say(f"classes from top to bottom, guidance scales from left to right: {path}")
        return DONE


def _choose_classes(asked: Sequence[str], known: Sequence[str]) -> dict[int, str]:
    """Returns label -> name of the classes asked for, in the order of their labels."""
    if tuple(asked) == names.ALL and names.ALL[0] in known:
        say('--classes all is every class; --classes "[a]ll" is the one of that name')
    chosen = set(names.choose_names(asked, known, setting="classes", where="the model"))
    return {label: name for label, name in enumerate(known) if name in chosen}


def _one_number(resolved: cli.Resolved) -> GenerateSettings:
    """Returns the settings with one of the two that say how many images to make: a flag wins over a file.

    Raises:
        UserError: when both come from the same place.
    """
    settings, sources = resolved.settings, resolved.sources
    if settings.fill_up_to is None or not cli.is_explicit(sources, "images_per_class"):
        return settings
    if sources["fill_up_to"] == sources["images_per_class"]:
        raise UserError("--images_per_class and --fill_up_to both say how many images to make; give one of them")
    return replace(settings, fill_up_to=None) if cli.is_flag(sources, "images_per_class") else settings


def _choose_counts(settings: GenerateSettings, state: SavedState, chosen: Sequence[str]) -> dict[str, int]:
    """Returns how many images to make of each of these classes."""
    if settings.strip:  # which has one of each
        return dict.fromkeys(chosen, 1)
    if settings.fill_up_to is not None:
        return counts_to_fill(chosen, settings.fill_up_to, _training_images(state))
    asked, others = cli.counts_by_name(settings.images_per_class)
    named: dict[str, int] = {}
    fitting: dict[str, list[str]] = {}
    for name in asked:
        fitting[name] = names.choose_names(
            [name], state.meta.classes, setting="images_per_class", where="the model", number=f"={asked[name]}"
        )
        if not set(fitting[name]) <= set(chosen):
            raise UserError(f"--images_per_class names {name}, which --classes leaves out; leave it out here, too")
    giver: dict[str, str] = {}
    for name in sorted(asked, key=lambda name: -len(fitting[name])):  # a name wins over a pattern for many classes
        for owner in fitting[name]:
            other = giver.get(owner)
            if other is not None and len(fitting[other]) == len(fitting[name]):
                raise UserError(
                    f"--images_per_class has two numbers for {owner}, {other}={asked[other]} and {name}={asked[name]}; "
                    "leave one of them out"
                )
            giver[owner], named[owner] = name, asked[name]
    return counts_as_asked(
        chosen, named, cli.defaults(GenerateSettings)["images_per_class"] if others is None else others
    )


def _training_images(state: SavedState) -> Counter[str]:
    """Counts the training images of each class of a run; raises UserError where its folder does not list them."""
    folder = state.path.parent
    split = read_split(folder)
    if split is None or split.classes != state.meta.classes:
        found = f"there is no {SPLIT_NAME}" if split is None else f"{SPLIT_NAME} is of another run"
        raise UserError(
            f"--fill_up_to needs the list of the training images, but in {folder} {found}; say how many images to make "
            "with --images_per_class, such as ID_3=63 50"
        )
    return Counter(entry.class_name for entry in split.train)
