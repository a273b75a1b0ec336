"""What evaluate_images.py compares: the run's own images and generated ones, each with its latents."""

import hashlib
import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from gait_latents.common import cli, console, files, mounts
from gait_latents.common.console import say, show_name, warn
from gait_latents.common.distributed import ALONE
from gait_latents.common.errors import Failed, Stopped, UserError
from gait_latents.common.layout import RECORD_NAME
from gait_latents.common.process import StopSignals
from gait_latents.evaluation import forms
from gait_latents.evaluation.figures import Points
from gait_latents.evaluation.plan import EvaluationPlan
from gait_latents.images import data_report, folders, generated, names, reading, selection, windows
from gait_latents.images.reading import BadImage
from gait_latents.images.split import Entry, Split
from gait_latents.latents import filling, opening
from gait_latents.latents.cache import LatentCache
from gait_latents.latents.dataset import LatentDataset
from gait_latents.latents.vae_fit import check_vae_of_model
from gait_latents.settings import GenerateSettings
from gait_latents.training.trained_model import FROM_RUN

_CACHE_NAME = "latents_cache"
_SYNTHETIC = "synthetic"
_NUM_LISTED = 10
FEWEST_TO_CHOOSE = 5  # validation images of a class by which a sweep can choose
READ_AT_ONCE = 64  # images whose pixels are in memory at once


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Some images with their latents; the files are needed only where pixels are asked for."""

    name: str  # training, test or synthetic
    folder: Path
    entries: tuple[Entry, ...]
    image_size: int
    resize: str  # how the run makes an image square; a generated one is square already
    latents: Points  # normalised means of the posterior [N C h w]

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def labels(self) -> Tensor:
        """The label of each image [N]."""
        return self.latents.labels

    @property
    def are_at_hand(self) -> bool:
        """Says whether the folder of the files is there."""
        return self.folder.is_dir()

    def digest(self) -> str:
        """Returns the SHA-256 over class, name and content of all images."""
        whole = hashlib.sha256()
        for entry in self.entries:
            whole.update(json.dumps([entry.class_name, entry.name, entry.key]).encode())
        return whole.hexdigest()

    def read(self, positions: Iterable[int]) -> list[np.ndarray]:
        """Reads some of the images as uint8 [S S 3]; raises Failed naming the first that cannot be read."""

        def read_one(position: int) -> np.ndarray:
            entry = self.entries[position]
            try:
                return reading.read_image(
                    str(self.folder),
                    entry,
                    image_size=self.image_size,
                    resize=self.resize,
                    if_edited=_edited_remedy(self.name),
                )
            except BadImage as error:
                raise Failed(f"{self.folder / entry.class_name / entry.name}: {error}") from error

        with ThreadPoolExecutor(max_workers=4) as pool:
            return list(pool.map(read_one, positions))

    def pixels(self, size: int) -> Tensor:
        """Reads all images as uint8 [N size size 3]: as the run saw them, then made smaller or larger."""
        found = torch.zeros(len(self), size, size, 3, dtype=torch.uint8)
        for positions in torch.arange(len(self)).split(READ_AT_ONCE):
            for position, image in zip(positions.tolist(), self.read(positions.tolist()), strict=True):
                found[position] = resize_image(image, size)
        return found

    def place(self, position: int) -> str:
        """Names an image for a person: its class and its file."""
        return f"{self.entries[position].class_name}/{self.entries[position].name}"


def _edited_remedy(what: str) -> str:
    """Returns what to say of an image whose content is not the one that was noted.

    That of real images was noted when the run was trained, that of synthetic ones a moment ago.
    """
    return reading.EDITED_MEANWHILE if what == _SYNTHETIC else "was edited since the run was trained; put it back"


def resize_image(image: np.ndarray, size: int) -> Tensor:
    """Returns a uint8 image [S S 3] made smaller or larger, [size size 3]."""
    return torch.from_numpy(np.array(Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR)))


@dataclass(frozen=True)
class RealImages:
    """The training, validation and test images of the run.

    Attributes:
        dataset: the latents of the training images, which it draws from their posteriors; others follow them.
    """

    training: ImageSet
    validation: ImageSet
    test: ImageSet
    dataset: LatentDataset

    @property
    def for_choices(self) -> ImageSet:
        """The images that samples are compared with to choose: validation images, or test images where they are few."""
        counts = torch.bincount(self.validation.labels, minlength=int(self.training.labels.max()) + 1)
        return self.validation if int(counts.min()) >= FEWEST_TO_CHOOSE else self.test

    def digest(self) -> str:
        """Returns a digest of the training and the test images."""
        return f"{self.training.digest()}:{self.test.digest()}"


def open_real(plan: EvaluationPlan) -> RealImages:
    """Opens the images of the run's split with their latents, encoding what is not cached."""
    folder, split = Path(plan.images.data_path), plan.split
    validation = split.validation if _can_be_had(plan, split.validation, folder) else ()
    entries = (*split.train, *validation, *split.test)
    points, dataset = encode(plan, split, list(entries), folder, "real")
    first = len(split.train), len(split.train) + len(validation)  # of the validation and of the test images

    def part(name: str, start: int, stop: int) -> ImageSet:
        own = points.take(torch.arange(start, stop))
        return ImageSet(name, folder, entries[start:stop], plan.images.image_size, plan.images.resize, own)

    return RealImages(
        part("training", 0, first[0]), part("validation", *first), part("test", first[1], len(dataset)), dataset
    )


def _can_be_had(plan: EvaluationPlan, entries: Sequence[Entry], folder: Path) -> bool:
    """Says whether images are at hand or encoded; where they are neither, tells that it goes without them."""
    keys = [entry.key for entry in entries]
    places = plan.folder / _CACHE_NAME, _cache_of_run(plan)
    caches = [LatentCache(place, plan.space, writable=False) for place in places]
    if folder.is_dir() or np.any([cache.holds(keys) for cache in caches], axis=0).all():
        return True
    say(f"the {len(entries):,} validation images are neither at hand nor encoded, and are left out")
    return False


def _cache_of_run(plan: EvaluationPlan) -> Path:
    return Path(mounts.locate(plan.state.meta.settings.get("latents_cache_folder", "")))


def open_synthetic(plan: EvaluationPlan) -> ImageSet:
    """Opens the generated images of the classes that the run knows; says which classes are missing or unknown."""
    split = _list_synthetic(plan)
    folder = Path(plan.settings.synthetic_path)
    points, _ = encode(plan, split, list(split.train), folder, _SYNTHETIC)
    return ImageSet(_SYNTHETIC, folder, split.train, plan.images.image_size, plan.images.resize, points)


def _list_synthetic(plan: EvaluationPlan) -> Split:
    folder = Path(plan.settings.synthetic_path)
    listed = folders.list_folder(folder, setting="synthetic_path").classes
    index = {name: inside.images for name, inside in listed.items() if inside.images}
    odd = data_report.odd_ones_line(listed)
    if odd:
        say(odd)
    of_class = {names.nfc(name): files for name, files in index.items()}  # the disk may have them in another form
    known = {names.nfc(name) for name in plan.classes}
    unknown = [name for name in index if names.nfc(name) not in known]
    files_of = {name: index.get(name) or of_class.get(names.nfc(name), []) for name in plan.classes}
    found = [name for name, files in files_of.items() if files]
    if not found:
        raise UserError(
            f"synthetic_path {show_name(folder)} has images of {list_names(list(index))}, and the run knows "
            f"{list_names(plan.classes)}: give a folder with one sub-folder per class of the run"
        )
    if unknown:
        warn(f"{folder} has folders of classes that the run does not know: {list_names(unknown)}; they are passed over")
    entries = tuple(Entry(name, file) for name in found for file in files_of[name])
    split = selection.with_fresh_keys(Split(plan.classes, entries, (), (), {}), str(folder))
    _refuse_changed(plan, split.train)
    return split


def _refuse_changed(plan: EvaluationPlan, entries: Sequence[Entry]) -> None:
    """Raises Failed where images have another content than generate.py has noted, with the command that mends them."""
    folder = Path(plan.settings.synthetic_path)
    record = generated.record_or_none(folder / RECORD_NAME)
    digests = generated.digests_of(record)
    changed = [e for e in entries if digests.get(e.class_name, {}).get(e.name, e.key) != e.key]
    if record is not None and changed:
        listed = list_names([f"{entry.class_name}/{entry.name}" for entry in changed])
        raise Failed(
            f"{len(changed):,} of the images in {folder} are damaged or not those that generate.py made: {listed}; to "
            f"make them again: {_remedy(plan, record, changed)}"
        )


def _remedy(plan: EvaluationPlan, record: Mapping[str, Any], changed: Sequence[Entry]) -> str:
    """Returns the command that makes these images again, and others only where those up to their numbers are absent."""
    counts: dict[str, int] = {}
    for entry in changed:
        counts[entry.class_name] = max(counts.get(entry.class_name, 0), generated.number_of(entry.name) + 1)
    chosen = {_as_word(name): counts[name] for name in list(counts)[:_NUM_LISTED]}  # then this tells of the others
    words = ["--checkpoint", plan.settings.checkpoint, "--output_folder", plan.settings.synthetic_path or ""]
    words += ["--classes", *chosen, "--images_per_class", *(f"{name}={count}" for name, count in chosen.items())]
    return f"{console.python_word()} generate.py {shlex.join([*words, *_recorded_flags(record)])}"


def _as_word(name: str) -> str:
    """Returns a class as a word of the command line that is taken neither for a flag nor for all classes."""
    return f"[{name[0]}]{name[1:]}" if name.startswith("-") or (name,) == names.ALL else name


def _recorded_flags(record: Mapping[str, Any]) -> list[str]:
    """Returns the settings that a record tells as words of the command line; what is no value of one is left out."""
    known, words = cli.specs(GenerateSettings), []
    for name in (*FROM_RUN, "image_format", "from_real"):
        value = record.get(name) if name != "vae_path" else None  # which no record names
        texts = [str(item) for item in (value if isinstance(value, list) else [value])]
        if value is not None and forms.is_setting(value):
            with suppress(UserError):
                cli.parse(name, texts, known[name], RECORD_NAME)
                words += [f"--{name}", *texts]
    return words


def list_names(listed: Sequence[str]) -> str:
    """Returns the first names for a message, and how many more there are."""
    return names.name_list(listed, limit=_NUM_LISTED)


def encode(
    plan: EvaluationPlan, split: Split, entries: list[Entry], folder: Path, what: str
) -> tuple[Points, LatentDataset]:
    """Returns the normalised posterior means of images, and the dataset that they are from.

    What is encoded is kept in a cache of the output folder.

    Rows that the run's own cache has are copied from there, and that cache is not written to.

    Raises:
        UserError: when images are to be encoded, and they or the run's VAE are not at hand.
        Failed: when images cannot be read, after each was named.
    """
    place = plan.folder / _CACHE_NAME
    files.refuse_links(place / "any", below=plan.folder)
    cache = LatentCache(place, plan.space, writable=True)
    _copy_rows(cache, _cache_of_run(plan), [entry.key for entry in entries])
    dataset = opening.open_dataset(
        replace(plan.images, data_path=str(folder)),
        split,
        entries,
        cache=cache,
        vae_at_hand=True,
        images_at_hand=True,
        device=plan.device,
        if_edited=_edited_remedy(what),
    )
    missing = dataset.missing()
    if missing:
        if not folder.is_dir():
            also = f", and {len(missing):,} of its images are not in the run's cache"
            raise UserError(selection.no_images_message(str(folder), also=also))
        check_vae_of_model(plan.space, plan.settings.vae_path, trust_pickle=plan.settings.trust_pickle)
        say(f"{what} images: {len(dataset):,}, of which {len(missing):,} are to be encoded")
    _refuse_bad(fill(dataset), dataset, what)
    dataset.set_norm(plan.state.meta.latent_norm)
    parts = [dataset.mean_latents(positions).cpu() for positions in torch.arange(len(dataset)).split(READ_AT_ONCE)]
    return Points(torch.cat(parts) if parts else torch.zeros(0, *dataset.latent_shape), dataset.labels), dataset


def _copy_rows(cache: LatentCache, folder: Path, keys: Sequence[str]) -> None:
    """Copies rows that `cache` lacks from the cache in another folder, as far as they are there."""
    wanted = [key for key, is_here in zip(keys, cache.holds(keys), strict=True) if key and not is_here]
    wanted = list(dict.fromkeys(wanted))
    moments, found = LatentCache(folder, cache.space, writable=False).read(wanted)
    kept = [key for key, is_there in zip(wanted, found, strict=True) if is_there]
    if kept:
        cache.put(kept, moments[found], [""] * len(kept), {"copied from": str(folder)})
        cache.flush()


def fill(dataset: LatentDataset) -> list[tuple[int, str]]:
    """Encodes what is missing under a progress bar; on a signal, what is encoded so far is kept."""
    with StopSignals(after="this image") as signals:
        try:
            return filling.fill_together(dataset, ALONE, signals)
        except Stopped:
            dataset.cache.flush()
            say("stopped; what is encoded is kept, and the same command goes on from there")
            raise


def _refuse_bad(bad: list[tuple[int, str]], dataset: LatentDataset, what: str) -> None:
    for position, reason in bad:
        say(f"    {show_name(dataset.names[position])}: {reason}")
    if bad:
        raise Failed(f"{len(bad)} {what} image(s) cannot be read; mend or remove them (the rest is encoded and kept)")


# --- what concerns all figures -----------------------------------------------------------------------------


def made_of_real(plan: EvaluationPlan, real: RealImages) -> dict[str, Any]:
    """Returns all that figures about real images depend on; with another value they are computed anew."""
    return {
        "space": plan.space.id,
        "latent_norm": plan.state.meta.latent_norm.to_json(),
        "training": real.training.digest(),
        "test": real.test.digest(),
        "seed": plan.settings.seed,
    }


def warnings_of_run(plan: EvaluationPlan) -> list[str]:
    """Returns a sentence for each property of the split that makes figures look too good or leaves classes out."""
    found = windows.split_warnings(plan.split, plan.images.data_path, resize=plan.images.resize)
    tested = {entry.class_name for entry in plan.split.test}
    untested = [name for name in plan.classes if name not in tested]
    if tested and untested:
        found.append(f"there are no test images of {list_names(untested)}; what is compared with them leaves these out")
    shared = data_report.shared_content_warning(plan.split)
    return found if shared is None else [*found, shared]


NO_TEST_IMAGES = "the run has no test images: all were for training"
