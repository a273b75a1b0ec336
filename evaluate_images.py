"""Says whether generated images are any good: close to real ones, not copies of them, and of help to a classifier.

    python evaluate_images.py --checkpoint results --synthetic_path synthetic
    python evaluate_images.py --checkpoint results --sweep 1 1.5 2 3

The first compares the images of a folder, the second samples at several guidance scales and compares those. Both
print a short table and keep evaluation/report.html and report.json. Running it again does only what is missing.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until `main` begins, Ctrl-C ends without a traceback

import hashlib
import itertools
import json
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import config
import script
from config import EvaluateSettings, GenerateSettings, PreprocessSettings, UserError

if __name__ == "__main__":
    script.check_command_line(EvaluateSettings, __doc__)

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import checkpoint
import classifier
import durable
import evaluation
import generate
import hardware
import images
import inception
import pictures
import prepare
import report as report_page
import run_folder
import vae
from evaluation import Points
from generate import Generator
from images import BadImage, Entry, Split, shown
from latent_cache import LatentCache, Space
from latent_dataset import SPLIT_NAME, LatentDataset, read_split
from latent_norm import LatentNorm
from run_folder import SavedState
from sampling import BATCH_SIZE
from script import DONE, Failed, StopSignals, say, warn

_REPORT_NAME, _PAGE_NAME, _PAIRS_NAME, _CACHE_NAME = "report.json", "report.html", "closest_pairs.png", "latents_cache"
_LARGEST_REPORT_BYTES = 1 << 28
_NUM_LISTED = 10
_PARTS = ("latents", "memorisation", "inception", "classifier", "why")  # of the report, about synthetic images
_READ_AT_ONCE = 64  # images whose pixels are in memory at once on their way into Inception


@script.command
def main(argv: Sequence[str] | None) -> int:
    """Runs the script; returns its exit code."""
    plan = make_plan(argv)
    script.check_writable(plan.folder, "output_folder", dry_run=False)
    try:
        if plan.settings.sweep:
            sweep(plan, find_states(plan))
        else:
            evaluate(plan)
    except torch.OutOfMemoryError as error:
        raise Failed("the GPU has too little memory; end what else uses it, or give --device cpu") from error
    say(f"see {plan.folder / _PAGE_NAME}; all figures are in {plan.folder / _REPORT_NAME}")
    return DONE


# --- what to do --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """The settings, and the run that made the images."""

    settings: EvaluateSettings
    state: SavedState
    split: Split
    images: PreprocessSettings  # how the run read and encoded images, and where they are
    device: torch.device

    @property
    def folder(self) -> Path:
        """Where the report goes."""
        return Path(self.settings.output_folder)

    @property
    def classes(self) -> tuple[str, ...]:
        """All classes of the run, in label order."""
        return self.split.classes

    @property
    def space(self) -> Space:
        """What makes a latent of the run what it is."""
        return Space.stored(self.state.meta["space"])


def make_plan(argv: Sequence[str] | None) -> Plan:
    """Puts together flags, file, the run and the defaults."""
    layers = config.read_command_line(EvaluateSettings, argv, description=__doc__)
    state = run_folder.read_averages(Path(config.resolve(EvaluateSettings, layers).settings.checkpoint))
    for line in state.warnings:
        warn(line)
    run, trained_with = state.path.parent, state.meta["settings"]
    of_run = {name: trained_with[name] for name in ("seed", "vae_path", "data_path") if name in trained_with}
    layers.append(config.stored_layer(EvaluateSettings, f"run {run}", of_run))
    resolved = config.resolve(EvaluateSettings, layers)
    for line in resolved.changes():
        say(line)
    settings: EvaluateSettings = resolved.settings
    split = read_split(run)
    if split is None:
        raise UserError(f"{run} holds no {SPLIT_NAME}, which says which images were for training; keep it with the run")
    if list(split.classes) != state.meta["classes"]:
        raise UserError(f"{run / SPLIT_NAME} names other classes than {state.path}; they belong to two runs")
    read_like = config.resolve(
        PreprocessSettings, [config.stored_layer(PreprocessSettings, f"run {run}", trained_with)]
    )
    read_like = replace(
        read_like.settings, data_path=settings.data_path or "", vae_path=settings.vae_path or "", device=settings.device
    )
    return Plan(settings, state, split, read_like, hardware.pick_device(settings.device))


# --- images and their latents ------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Some images with their latents; the files may be gone as long as nothing asks for pixels."""

    name: str  # training, test or synthetic
    folder: Path
    entries: tuple[Entry, ...]
    image_size: int
    latents: Points  # the means of the posterior, normalised [N C h w]

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def labels(self) -> Tensor:
        """The label of each image [N]."""
        return self.latents.labels

    @property
    def are_at_hand(self) -> bool:
        """Says whether the files should be there."""
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
                return prepare.read_image(str(self.folder), entry, image_size=self.image_size)
            except BadImage as error:
                raise Failed(f"{self.folder / entry.class_name / entry.name}: {error}") from error

        with ThreadPoolExecutor(max_workers=4) as pool:
            return list(pool.map(read_one, positions))

    def pixels(self, size: int) -> Tensor:
        """Reads all images as uint8 [N size size 3]: as the run saw them, then made smaller or larger."""
        found = torch.zeros(len(self), size, size, 3, dtype=torch.uint8)
        for positions in torch.arange(len(self)).split(_READ_AT_ONCE):
            for position, image in zip(positions.tolist(), self.read(positions.tolist()), strict=True):
                resized = Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR)
                found[position] = torch.from_numpy(np.array(resized))
        return found

    def place(self, position: int) -> str:
        """Names an image for a person: its class and its file."""
        return f"{self.entries[position].class_name}/{self.entries[position].name}"


@dataclass(frozen=True)
class RealImages:
    """The training and the test images of the run."""

    training: ImageSet
    test: ImageSet

    def digest(self) -> str:
        """Returns a digest of both."""
        return f"{self.training.digest()}:{self.test.digest()}"


def open_real(plan: Plan) -> RealImages:
    """Opens the training and test images of the run's split with their latents, encoding what is not cached."""
    folder = Path(plan.images.data_path)
    entries = [*plan.split.train, *plan.split.test]
    points = encode(plan, plan.split, entries, folder, "real")
    count = len(plan.split.train)
    training, test = points.take(torch.arange(count)), points.take(torch.arange(count, len(entries)))
    size = plan.images.image_size
    return RealImages(
        ImageSet("training", folder, plan.split.train, size, training),
        ImageSet("test", folder, plan.split.test, size, test),
    )


def open_synthetic(plan: Plan) -> ImageSet:
    """Opens the generated images of the classes that the run knows; says which classes are missing or unknown."""
    folder = Path(plan.settings.synthetic_path)
    index = images.list_images(folder, setting="synthetic_path")
    unknown = [name for name in index if name not in plan.classes]
    found = [name for name in plan.classes if index.get(name)]
    if not found:
        raise UserError(
            f"synthetic_path {shown(folder)} has images of {_listing(list(index))}, and the run knows "
            f"{_listing(plan.classes)}: give a folder with one sub-folder per class of the run"
        )
    if unknown:
        warn(f"{folder} has folders of classes that the run does not know: {_listing(unknown)}; they are passed over")
    entries = tuple(Entry(name, file) for name in found for file in index[name])
    split = Split(plan.classes, entries, (), (), {})
    split = prepare.with_fresh_keys(split, str(folder))
    points = encode(plan, split, list(split.train), folder, "synthetic")
    return ImageSet("synthetic", folder, split.train, plan.images.image_size, points)


def _listing(names: Sequence[str]) -> str:
    rest = f" and {len(names) - _NUM_LISTED} more" if len(names) > _NUM_LISTED else ""
    return ", ".join(shown(name) for name in names[:_NUM_LISTED]) + rest


def encode(plan: Plan, split: Split, entries: list[Entry], folder: Path, what: str) -> Points:
    """Returns the normalised posterior means of images; what is encoded is kept in a cache of the output folder.

    Rows that the run's own cache has are copied from there, and that cache is not written to.

    Raises:
        UserError: when images are to be encoded, and they or the run's VAE are not at hand.
        Failed: when images cannot be read, after each was named.
    """
    cache = LatentCache(plan.folder / _CACHE_NAME, plan.space, writable=True)
    _borrow(cache, Path(plan.state.meta["settings"].get("latents_cache_folder", "")), [e.key for e in entries])
    dataset = prepare.open_dataset(
        replace(plan.images, data_path=str(folder)),
        split,
        entries,
        cache=cache,
        vae_at_hand=True,
        images_at_hand=True,
        device=plan.device,
    )
    missing = dataset.missing()
    if missing:
        if not folder.is_dir():
            also = f", and {len(missing):,} of its images are not in the run's cache"
            raise UserError(prepare.no_images_message(str(folder), also=also))
        generate.checked_vae(plan.settings.vae_path, plan.state.meta)
        say(f"{what} images: {len(dataset):,}, of which {len(missing):,} are to be encoded")
        _refuse_bad(fill(dataset, len(missing)), dataset, what)
    dataset.set_norm(LatentNorm.from_json(plan.state.meta["latent_norm"]))
    parts = [dataset.mean_latents(positions).cpu() for positions in torch.arange(len(dataset)).split(_READ_AT_ONCE)]
    return Points(torch.cat(parts) if parts else torch.zeros(0, *dataset.latent_shape), dataset.labels)


def _borrow(cache: LatentCache, folder: Path, keys: Sequence[str]) -> None:
    """Copies the rows of these keys that are in the cache of a folder, and not here yet."""
    wanted = [key for key, is_here in zip(keys, cache.holds(keys), strict=True) if key and not is_here]
    wanted = list(dict.fromkeys(wanted))
    moments, found = LatentCache(folder, cache.space, writable=False).read(wanted)
    kept = [key for key, is_there in zip(wanted, found, strict=True) if is_there]
    if kept:
        cache.put(kept, moments[found], [""] * len(kept), {"copied from": str(folder)})
        cache.flush()


def fill(dataset: LatentDataset, num_missing: int) -> list[tuple[int, str]]:
    """Encodes what is missing under a progress bar; on a signal, what is encoded so far is kept."""
    with StopSignals() as signals, script.progress(total=num_missing, unit="images", label="encode") as bar:

        def advance(count: int) -> None:
            bar.advance(count)
            signals.raise_if_received()

        try:
            return dataset.fill(advance=advance)
        except script.Stopped:
            dataset.cache.flush()
            say("stopped; what is encoded is kept, and the same command goes on from there")
            raise


def _refuse_bad(bad: list[tuple[int, str]], dataset: LatentDataset, what: str) -> None:
    for position, reason in bad:
        say(f"    {shown(dataset.names[position])}: {reason}")
    if bad:
        raise Failed(f"{len(bad)} {what} image(s) cannot be read; mend or remove them (the rest is encoded and kept)")


# --- the report --------------------------------------------------------------------------------------------


class Report:
    """report.json and report.html: written after each finished part, so that nothing is computed twice.

    A part is kept with a digest of all that it was computed from, and counts only as long as that is the same. What
    is about other images than those of this run goes at once, so that no page mixes two.

    Args:
        real: what the figures about real images depend on.
    """

    def __init__(self, folder: Path, real: dict[str, Any]) -> None:
        self.folder = folder
        stored = _read_report(folder / _REPORT_NAME)
        digest = _digest(real)
        self.data: dict[str, Any] = stored if stored.get("real_digest") == digest else {"real_digest": digest}

    def begin(self, *, evaluated: dict[str, Any], **facts: Any) -> None:
        """Takes what is evaluated, and facts that are no part; drops the parts about other synthetic images."""
        before = self.data.get("evaluated", {}).get("synthetic_digest")
        if before != evaluated["synthetic_digest"]:
            for name in _PARTS:
                self.data.pop(name, None)
        self.set_facts(evaluated=evaluated, **facts)

    def part(self, name: str, made_of: dict[str, Any]) -> dict[str, Any] | None:
        """Returns the figures of a part if they were computed from just this; None otherwise."""
        stored = self.data.get(name, {})
        return stored if stored.get("digest") == _digest(made_of) else None

    def put(self, name: str, made_of: dict[str, Any], figures: dict[str, Any]) -> dict[str, Any]:
        """Keeps the figures of a part, and publishes the report."""
        self.data[name] = {**plain(figures), "digest": _digest(made_of)}
        self.data.get("why", {}).pop(name, None)
        self.write()
        return self.data[name]

    def drop(self, name: str, *, why: str | None = None) -> None:
        """Leaves out a part that was not asked for, or that cannot be computed, saying why."""
        self.data.pop(name, None)
        self.data.get("why", {}).pop(name, None)
        if why is not None:
            self.data["why"] = {**self.data.get("why", {}), name: why}

    def set_facts(self, **facts: Any) -> None:
        """Takes facts that are no part, such as warnings and settings."""
        self.data |= plain(facts)

    def write(self) -> None:
        """Publishes both files."""
        whole = {**self.data, "sha256": _digest(self.data)}
        durable.publish(self.folder / _REPORT_NAME, (json.dumps(whole, indent=1) + "\n").encode())
        durable.publish(self.folder / _PAGE_NAME, report_page.write_html(self.data, self._pictures()))

    def _pictures(self) -> dict[str, bytes]:
        """Returns the content of each picture that the report names and that is there."""
        name = self.data.get("memorisation", {}).get("picture")
        path = self.folder / _PAIRS_NAME
        return {_PAIRS_NAME: path.read_bytes()} if name == _PAIRS_NAME and path.is_file() else {}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(plain(value), sort_keys=True).encode()).hexdigest()


def plain(value: Any) -> Any:
    """Returns a value as JSON gives it back: names as texts, lists for tuples, None for what is not finite."""
    if isinstance(value, dict):
        return {str(name): plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _read_report(path: Path) -> dict[str, Any]:
    """Reads what `Report.write` wrote; anything else counts as nothing, after a warning."""
    try:
        data = json.loads(durable.read_whole(path, at_most=_LARGEST_REPORT_BYTES))
        if data.pop("sha256") == _digest(data):
            return data
        reason = "its checksum does not fit"
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or type(error).__name__
    warn(f"{path} is damaged or was edited ({reason}); everything is computed anew")
    return {}


# --- the images of a folder --------------------------------------------------------------------------------


class Evaluation:
    """The report about the images of a folder, part by part; a part that the report has already is left as it is."""

    def __init__(self, plan: Plan, synthetic: ImageSet, real: RealImages, report: Report) -> None:
        self.plan, self.synthetic, self.real, self.report = plan, synthetic, real, report
        self.settings = plan.settings
        self.made_of = {**made_of_real(plan, real), "synthetic": synthetic.digest()}

    def run(self) -> None:
        """Computes what is missing, and publishes the report after each part."""
        with StopSignals() as signals:
            for part in (self.compare_latents, self.look_for_copies, self.compare_features, self.try_classifiers):
                part(signals)
                signals.raise_if_received()
        self.report.write()

    def compare_latents(self, _signals: StopSignals) -> None:
        """Compares the latents of synthetic and training images with those of the test images."""
        made_of = {**self.made_of, "neighbours": self.settings.neighbours}
        if self._is_done("latents", made_of):
            return
        figures = self._closeness(*self._latents(), num_directions=evaluation.NUM_DIRECTIONS)
        figures["recognition"] = {
            part.name: evaluation.recognition(part.latents, self.real.training.latents)
            for part in (self.synthetic, self.real.test)
        }
        self.report.put("latents", made_of, figures)

    def _is_done(self, name: str, made_of: dict[str, Any]) -> bool:
        """Says whether nothing is left to do for a part that needs test images."""
        if not len(self.real.test):
            self.report.drop(name, why=_NO_TEST_IMAGES)
            return True
        return self.report.part(name, made_of) is not None

    def _latents(self) -> tuple[Points, Points, Points]:
        return self.synthetic.latents, self.real.training.latents, self.real.test.latents

    def _closeness(self, *points: Points, num_directions: int | None) -> dict[str, Any]:
        found = evaluation.closeness(
            *points,
            neighbours=self.settings.neighbours,
            seed=self.settings.seed,
            num_directions=num_directions,
        )
        for name in ("synthetic", "training"):
            for figure in ("frechet_per_class", "kernel_per_class"):
                found[name][figure] = self._by_name(found[name][figure])
        return found

    def _by_name(self, by_label: dict[int, Any]) -> dict[str, Any]:
        return {self.plan.classes[label]: value for label, value in by_label.items()}

    def look_for_copies(self, _signals: StopSignals) -> None:
        """Measures how near synthetic images are to single training images, and draws the closest pairs."""
        synthetic, training = self.synthetic, self.real.training
        path = self.plan.folder / _PAIRS_NAME
        stored = self.report.part("memorisation", self.made_of)
        if stored is not None and (path.is_file() if stored["picture"] else not training.are_at_hand):
            return
        figures = evaluation.memorisation(*self._latents(), seed=self.settings.seed)
        figures["picture"], figures["why_no_picture"] = draw_pairs(path, synthetic, training, figures["pairs"])
        figures["pairs"] = [
            {"synthetic": synthetic.place(i), "training": training.place(j), "distance": distance}
            for i, j, distance in figures["pairs"]
        ]
        figures["per_class"] = self._by_name(figures.get("per_class", {}))
        figures["same_content"] = same_content(synthetic, self.real)
        self.report.put("memorisation", self.made_of, figures)

    def compare_features(self, signals: StopSignals) -> None:
        """Compares the Inception features of synthetic and training images with those of the test images, if asked."""
        asked = self.settings.inception_weights
        if asked is None:
            self.report.drop("inception")
            return
        path = inception.find_weights(asked)
        made_of = {**self.made_of, "neighbours": self.settings.neighbours, "weights": file_digest(path)}
        if self._is_done("inception", made_of):
            return
        sets = (self.synthetic, self.real.training, self.real.test)
        for part in sets:
            if not part.are_at_hand:
                raise UserError(prepare.no_images_message(str(part.folder), also=", and Inception looks at images"))
        network = inception.load_network(path, self.plan.device)
        with script.progress(total=sum(map(len, sets)), unit="images", label="inception") as bar:

            def advance(count: int) -> None:
                bar.advance(count)
                signals.raise_if_received()

            points = [_features(network, part, advance) for part in sets]
        self.report.put("inception", made_of, self._closeness(*points, num_directions=None))

    def try_classifiers(self, signals: StopSignals) -> None:
        """Trains classifiers with and without the synthetic images, and tests them on the test images."""
        settings, sets = self.settings, (self.real.training, self.synthetic, self.real.test)
        why = self._why_no_classifier()
        if why is not None:
            if "classifier" not in self.report.data:  # those of an earlier run are about the same images
                self.report.drop("classifier", why=why)
            return
        size = settings.classifier_image_size
        seeds = list(range(settings.seed, settings.seed + settings.classifier_seeds))
        made_of = {**self.made_of, "image_size": size, "num_steps": settings.classifier_steps}
        stored = self.report.part("classifier", made_of) or {}
        left = len(classifier.trainings_left(seeds, stored.get("scores", {})))
        if not left and stored.get("seeds") == seeds:
            return
        if left:
            say(
                f"{left} trainings of a classifier to go, of {settings.classifier_steps:,} steps each; they may be "
                "stopped, and the same command goes on"
            )
        images_and_labels = [value for part in sets for value in (part.pixels(size), part.labels)]
        with script.progress(total=left * settings.classifier_steps, unit="steps", label="classifier") as bar:

            def progress() -> None:
                bar.advance()
                signals.raise_if_received()

            def save(scores: dict[str, Any]) -> None:
                self.report.put("classifier", made_of, {"scores": scores})

            found = classifier.compare(
                *images_and_labels,
                num_classes=len(self.plan.classes),
                num_steps=settings.classifier_steps,
                seeds=seeds,
                device=self.plan.device,
                done=stored.get("scores", {}),
                save=save,
                class_names=self.plan.classes,
                progress=progress,
            )
        self.report.put("classifier", made_of, {**found, "image_size": size})

    def _why_no_classifier(self) -> str | None:
        """Returns why no classifier is trained, in a sentence; None where it is."""
        asked, sets = self.settings.classifier, (self.real.training, self.synthetic, self.real.test)
        if asked == "false":
            return "not asked for (--classifier false)"
        if asked == "auto" and self.plan.device.type == "cpu":
            return "on a CPU it takes long, and is left out unless asked for (--classifier true)"
        if not len(self.real.test):
            return _NO_TEST_IMAGES
        if len(self.synthetic.labels.unique()) < len(self.plan.classes):
            return "there are classes without synthetic images"
        absent = [part.folder for part in sets if not part.are_at_hand]
        return f"the real images are not at hand in {absent[0]}" if absent else None


def _features(network: torch.nn.Module, part: ImageSet, advance: Callable[[int], None]) -> Points:
    found = []
    for positions in torch.arange(len(part)).split(_READ_AT_ONCE):
        pixels = torch.from_numpy(np.stack(part.read(positions.tolist())))
        found.append(inception.features(network, pixels, advance=advance))
    return Points(torch.cat(found), part.labels)


def evaluate(plan: Plan) -> None:
    """Makes the report about the images of a folder, and prints the main figures."""
    synthetic, real = open_synthetic(plan), open_real(plan)
    report = Report(plan.folder, made_of_real(plan, real))
    warnings = find_warnings(plan, synthetic, real)
    for line in warnings:
        warn(line)
    report.begin(evaluated=describe(plan, synthetic, real), warnings=warnings, settings=config.to_dict(plan.settings))
    Evaluation(plan, synthetic, real, report).run()
    print_figures(report.data)


def made_of_real(plan: Plan, real: RealImages) -> dict[str, Any]:
    """Returns what figures about real images depend on."""
    return {
        "space": plan.space.id,
        "latent_norm": plan.state.meta["latent_norm"],
        "training": real.training.digest(),
        "test": real.test.digest(),
        "seed": plan.settings.seed,
    }


def file_digest(path: Path) -> str:
    """Returns the SHA-256 of a file."""
    with durable.naming(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def describe(plan: Plan, synthetic: ImageSet, real: RealImages) -> dict[str, Any]:
    """Says what is evaluated: which model, which images, and how many of each class."""
    sets = (synthetic, real.training, real.test)
    return {
        "checkpoint": plan.state.path.name,
        "step": plan.state.step,
        "synthetic_path": str(synthetic.folder.absolute()),
        "synthetic_digest": synthetic.digest(),
        "made_with": made_with(synthetic.folder),
        "split": plan.split.rule["split"],
        "image_size": plan.images.image_size,
        "images": {part.name: len(part) for part in sets},
        "images_per_class": {
            name: {part.name: part.latents.count(label) for part in sets} for label, name in enumerate(plan.classes)
        },
    }


def made_with(folder: Path) -> dict[str, Any]:
    """Returns what generate.py wrote down beside its images; nothing in a folder that it did not make."""
    try:
        record = json.loads(durable.read_whole(folder / generate.RECORD_NAME, at_most=generate.LARGEST_RECORD_BYTES))
    except (OSError, ValueError, RecursionError):
        return {}
    known = ("weights", "step", "cond_scale", "sampler", "sampling_timesteps", "seed")
    found = record if isinstance(record, dict) else {}
    return {name: found[name] for name in known if isinstance(found.get(name), str | int | float)}


def warnings_of_run(plan: Plan) -> list[str]:
    """Returns a sentence for each thing about the split that all figures must be read with."""
    found = [_RANDOM_SPLIT] if plan.split.rule["split"] == "random" else []
    shared = prepare.shared_content_warning(plan.split)
    return found if shared is None else [*found, shared]


def find_warnings(plan: Plan, synthetic: ImageSet, real: RealImages) -> list[str]:
    """Returns a sentence for each thing that the figures about these images must be read with."""
    found = warnings_of_run(plan)
    if not len(real.test):
        found.append(f"{_NO_TEST_IMAGES}, so that only the distances to training images can be computed")
    missing = [name for label, name in enumerate(plan.classes) if not synthetic.latents.count(label)]
    if missing:
        found.append(f"there are no synthetic images of {_listing(missing)}; the figures are about the other classes")
    for part, remedy in ((synthetic, "generate"), (real.test, "have")):
        counts = [part.latents.count(label) for label in part.labels.unique().tolist()]
        if counts and min(counts) < report_page.FEW_PER_CLASS:
            found.append(
                f"only {min(counts)} {part.name} images of a class: figures of so few scatter widely; {remedy} "
                f"{report_page.FEW_PER_CLASS} or more of each"
            )
    record, weights = made_with(synthetic.folder), vae.weights_digest(plan.state.averages)
    if record.get("weights", weights) != weights:
        found.append(
            f"the images were made with other weights (of step {record.get('step')}) than those of "
            f"{plan.state.path.name}"
        )
    return found


_NO_TEST_IMAGES = "the run has no test images: all were for training"
_RANDOM_SPLIT = (
    "the split is random: if images are overlapping windows of one recording, test images are nearly the same as "
    "training images, and the figures look too good; train with --split contiguous"
)


def draw_pairs(
    path: Path, synthetic: ImageSet, training: ImageSet, pairs: Sequence[tuple[int, int, float]]
) -> tuple[str | None, str | None]:
    """Draws synthetic images above their nearest training images; returns the file's name, or why there is none."""
    path.unlink(missing_ok=True)
    if not training.are_at_hand:
        return None, f"the training images are not at hand in {training.folder}"
    try:
        above, below = synthetic.read(i for i, _, _ in pairs), training.read(j for _, j, _ in pairs)
    except Failed as error:  # changed or removed since it was encoded, which the figures do not need
        return None, str(error)
    names = [
        " / ".join(dict.fromkeys((synthetic.entries[i].class_name, training.entries[j].class_name)))
        for i, j, _ in pairs
    ]
    pictures.save_picture(pictures.labelled_grid([above, below], ["synthetic", "nearest training"], names), path)
    return path.name, None


def same_content(synthetic: ImageSet, real: RealImages) -> list[dict[str, str]]:
    """Pairs each synthetic file with the first other file of the very same content, be it real or synthetic."""
    first: dict[str, tuple[str, str]] = {}
    for part in (real.training, real.test):
        for position, entry in enumerate(part.entries):
            first.setdefault(entry.key, (part.name, part.place(position)))
    found = []
    for position, entry in enumerate(synthetic.entries):
        own = (synthetic.name, synthetic.place(position))
        kind, place = first.setdefault(entry.key, own)
        if (kind, place) != own:
            found.append({"synthetic": own[1], "same_as": place, "kind": kind})
    return found


# --- what is printed ---------------------------------------------------------------------------------------

_CLOSENESS_ROWS = {  # figure -> what a row of the table calls it
    "frechet_mean": "Fréchet distance per class",
    "frechet": "Fréchet distance, all classes",
    "kernel": "kernel distance",
    "precision": "precision",
    "recall": "recall",
    "density": "density",
    "coverage": "coverage",
}
_NAME_WIDTH, _FIGURE_WIDTH = 50, 11


def print_figures(data: dict[str, Any]) -> None:
    """Prints the main figures of synthetic images, and beside them those of real ones: the best to be expected."""
    say()
    say(_row("", "synthetic", "real"))
    for name, title in (("latents", ""), ("inception", "Inception: ")):
        for figure, label in _CLOSENESS_ROWS.items() if name in data else ():
            say(_row(title + label, *(_shown(data[name][kind][figure]) for kind in ("synthetic", "training"))))
    if "latents" in data:
        found = data["latents"]["recognition"]
        say(_row("nearest to the mean of their own class", _share(found["synthetic"]), _share(found["test"])))
    copies = data["memorisation"]
    if "near_share" in copies:
        say(_row("very near to a training image", _share(copies["near_share"]), _share(evaluation.NEAR_SHARE)))
        say(_row("nearer to a training than to a test image", _share(copies["nearer_to_training"]), _share(0.5)))
    if "sets" in data.get("classifier", {}):
        for name, found in data["classifier"]["sets"].items():
            say(_row(f"classifier trained on {name}: recognised", _share(found["mean"])))
        say(data["classifier"]["difference"]["sentence"])
    for name, why in data.get("why", {}).items():
        say(f"no {name}: {why}")
    if copies["same_content"]:
        first = copies["same_content"][0]
        warn(
            f"{len(copies['same_content'])} synthetic file(s) have the very content of another file, such as "
            f"{first['synthetic']} and {first['same_as']} ({first['kind']})"
        )


def _row(name: str, *figures: str) -> str:
    return f"{name:<{_NAME_WIDTH}}" + "".join(f"{figure:>{_FIGURE_WIDTH}}" for figure in figures)


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


# --- guidance scales and checkpoints -----------------------------------------------------------------------


def find_states(plan: Plan) -> list[Path]:
    """Returns the checkpoint files that the sweep samples from, oldest first; raises UserError when one is absent."""
    asked, newest = plan.settings.sweep_checkpoints, plan.state.path
    saved = checkpoint.saved_averages(newest.parent)
    if asked == ("newest",) or (asked == ("all",) and not saved):
        return [newest]
    if asked == ("all",):
        return [saved[step] for step in sorted(saved)]
    steps = {int(word) if word.isdecimal() else word for word in asked}
    unknown = steps - saved.keys()
    if unknown:
        raise UserError(
            f"--sweep_checkpoints {config.show(asked)}: {newest.parent} has averaged weights of the steps "
            f"{_listing([str(step) for step in sorted(saved)])}; give some of these, or all alone, or newest alone"
        )
    return [saved[step] for step in sorted(saved) if step in steps]


def sweep(plan: Plan, states: Sequence[Path]) -> None:
    """Samples latents at each checkpoint and guidance scale, compares them with the test images, and says the best.

    Each point is kept in the report as soon as it is computed.
    """
    real = open_real(plan)
    if not len(real.test):
        raise UserError("a sweep compares with test images, and the run has none; train with fewer images_per_user")
    sampling, report = sampling_settings(plan), Report(plan.folder, made_of_real(plan, real))
    for line in warnings_of_run(plan):
        warn(line)
    if "evaluated" not in report.data:
        report.set_facts(warnings=warnings_of_run(plan), settings=config.to_dict(plan.settings))
    made_of = made_of_sweep(plan, real, sampling)
    part = report.part("sweep", made_of) or {"points": []}
    weights = {path: file_digest(path) for path in states}
    wanted = [(path, scale) for path in states for scale in dict.fromkeys(plan.settings.sweep)]
    todo = [(path, scale) for path, scale in wanted if not has_point(part, weights[path], scale)]
    if len(todo) < len(wanted):
        say(f"{len(wanted) - len(todo)} of {len(wanted)} points are in the report already")
    total = len(todo) * len(plan.classes) * plan.settings.sweep_images
    with StopSignals() as signals, script.progress(total=total, unit="samples", label="sweep") as bar:
        for path, points in itertools.groupby(todo, key=lambda point: point[0]):
            state = run_folder.read_state(path)
            generator = Generator(sampling, state, plan.device)
            for _, scale in points:
                samples = sample_classes(plan, generator, scale, bar, signals)
                figures, yardstick = measure(plan, real, samples)
                point = {"weights": weights[path], "checkpoint": path.name, "step": state.step, "guidance": scale}
                part = {"points": [*part["points"], {**point, **figures}], "training": yardstick}
                part["points"].sort(key=lambda point: (point["step"], point["guidance"]))
                part["best"] = best_point(part["points"])
                part = report.put("sweep", made_of, part)
    print_sweep(part, plan.settings.sweep_images)


def sampling_settings(plan: Plan) -> GenerateSettings:
    """Returns how the run samples, as generate.py would without flags."""
    trained_with = plan.state.meta["settings"]
    of_run = {name: trained_with[name] for name in generate.FROM_RUN if name in trained_with}
    layer = config.stored_layer(GenerateSettings, f"run {plan.state.path.parent}", of_run)
    own = {"seed": plan.settings.seed, "vae_path": plan.settings.vae_path, "device": plan.settings.device}
    return replace(config.resolve(GenerateSettings, [layer]).settings, **own)


def made_of_sweep(plan: Plan, real: RealImages, sampling: GenerateSettings) -> dict[str, Any]:
    """Returns what all points of a sweep depend on."""
    return {
        **made_of_real(plan, real),
        "neighbours": plan.settings.neighbours,
        "images_per_class": plan.settings.sweep_images,
        "guidance_interval": sampling.guidance_interval,
        "sampler": sampling.sampler,
        "sampling_timesteps": sampling.sampling_timesteps,
        "precision": str(hardware.pick_precision(sampling.precision, plan.device)[0]),
    }


def has_point(part: dict[str, Any], weights: str, scale: float) -> bool:
    """Says whether a sweep has the point of these weights and this guidance scale."""
    return any((point["weights"], point["guidance"]) == (weights, scale) for point in part["points"])


def sample_classes(
    plan: Plan, generator: Generator, scale: float, bar: script.Progress, signals: StopSignals
) -> Points:
    """Samples latents of every class; those that generate.py would decode."""
    count = plan.settings.sweep_images
    cells = [(label, index) for label in range(len(plan.classes)) for index in range(count)]
    parts = []
    for start in range(0, len(cells), BATCH_SIZE):
        labels, indices = zip(*cells[start : start + BATCH_SIZE], strict=True)
        parts.append(generator.sample(list(labels), list(indices), scale).cpu())
        bar.advance(len(labels), guidance=f"{scale:g}")
        signals.raise_if_received()
    return Points(torch.cat(parts), torch.tensor([label for label, _ in cells]))


def measure(plan: Plan, real: RealImages, samples: Points) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the figures of a point of the sweep, and those of as many training images."""
    seed, training, test = plan.settings.seed, real.training.latents, real.test.latents
    found = evaluation.closeness(
        samples,
        training,
        test,
        neighbours=plan.settings.neighbours,
        seed=seed,
        num_directions=evaluation.NUM_DIRECTIONS,
    )
    copies = evaluation.memorisation(samples, training, test, seed=seed)
    figures = {
        "images": found["images"],
        **found["synthetic"],
        "recognition": evaluation.recognition(samples, training),
        **{name: copies[name] for name in ("near_share", "nearer_to_training")},
    }
    yardstick = {
        **found["training"],
        "recognition": evaluation.recognition(test, training),
        "near_share": evaluation.NEAR_SHARE,
    }
    return figures, yardstick


def best_point(points: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Returns the point with the lowest Fréchet distance per class; of several classes, their mean."""
    known = [point for point in points if point["frechet_mean"] is not None]
    return min(known, key=lambda point: point["frechet_mean"], default=None)


_SWEEP_COLUMNS = {  # figure -> its head
    "frechet_mean": "Fréchet/class",
    "frechet": "Fréchet",
    "kernel": "kernel",
    "recognition": "own class",
    "precision": "precision",
    "recall": "recall",
    "coverage": "coverage",
    "near_share": "near copies",
}


def print_sweep(part: dict[str, Any], images_per_class: int) -> None:
    """Prints a row for each point of a sweep, and which one is best."""
    say()
    say(f"{'step':>8}  {'guidance':>8}  " + "  ".join(_SWEEP_COLUMNS.values()))
    rows = [(f"{p['step']:>8,}  {p['guidance']:>8g}", p) for p in part["points"]]
    for name, figures in [(f"{'real (training)':>18}", part["training"]), *rows]:
        cells = [f"{_shown(figures[column]):>{len(head)}}" for column, head in _SWEEP_COLUMNS.items()]
        say(f"{name}  " + "  ".join(cells))
    best = part["best"]
    if best is None:
        say(f"no point can be called the best: {images_per_class} samples per class, or the test images, are too few")
        return
    say(
        f"nearest to the test images by Fréchet distance per class: guidance {best['guidance']:g} at step "
        f"{best['step']:,}; one seed, so how far such figures scatter is not known"
    )


if __name__ == "__main__":
    sys.exit(main(None))
