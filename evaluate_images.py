"""Says whether generated images are any good: close to real ones, not copies of them, and of help to a classifier.

    python evaluate_images.py --checkpoint results --synthetic_path synthetic
    python evaluate_images.py --checkpoint results --sweep 1 1.5 2 3

The first compares the images of a folder, the second samples at several guidance scales and compares those. Both
print a short table and keep evaluation/report.html and report.json. Running it again does only what is missing.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until `main` begins, Ctrl-C ends without a traceback

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import config
import script
from config import EvaluateSettings, PreprocessSettings, UserError

if __name__ == "__main__":
    script.check_command_line(EvaluateSettings, __doc__)

import numpy as np
import torch

import charts
import classifier
import classifier_trials
import durable
import evaluation
import generate
import hardware
import images
import inception
import page
import pictures
import prepare
import run_folder
import sweep
import vae
from classifier_trials import Trials
from evaluation import Points
from image_sets import (
    NO_TEST_IMAGES,
    READ_AT_ONCE,
    ImageSet,
    Plan,
    RealImages,
    listing,
    made_of_real,
    open_real,
    open_synthetic,
    warnings_of_run,
)
from latent_dataset import SPLIT_NAME, read_split
from ranks import joined
from report_file import PAIRS_NAME, Report, file_digest
from script import DONE, PAGE_NAME, RECORD_NAME, REPORT_NAME, Failed, StopSignals, say, warn


@script.command
def main(argv: Sequence[str] | None) -> int:
    """Runs the script; returns its exit code."""
    with joined() as ranks, ranks.together():
        ranks.must_be_alone("evaluate_images.py")
    try:
        plan = make_plan(argv)
        prepare.refuse_to_be_a_class(plan.folder, plan.settings.data_path)
        script.check_writable(plan.folder, "output_folder")
        if plan.settings.sweep:
            sweep.sweep(plan, sweep.find_states(plan))
        else:
            evaluate(plan)
    except torch.OutOfMemoryError as error:
        raise Failed(hardware.TOO_LITTLE_MEMORY) from error
    say(f"see {plan.folder / PAGE_NAME}; all figures are in {plan.folder / REPORT_NAME}")
    return DONE


# --- what to do --------------------------------------------------------------------------------------------


def make_plan(argv: Sequence[str] | None) -> Plan:
    """Puts together flags, file, the run and the defaults."""
    layers = config.read_command_line(EvaluateSettings, argv, description=__doc__)
    state = run_folder.read_averages(Path(config.resolve(EvaluateSettings, layers).settings.checkpoint))
    for line in state.warnings:
        warn(line)
    run, of_run = state.path.parent, state.meta.chosen_settings("seed", "vae_path", "data_path")
    layers.append(config.stored_layer(EvaluateSettings, f"run {run}", of_run))
    resolved = config.resolve(EvaluateSettings, layers)
    for line in resolved.changes():
        say(line)
    settings: EvaluateSettings = resolved.settings
    charts.check_installed()  # before anything is computed
    split = read_split(run)
    if split is None:
        raise UserError(f"{run} holds no {SPLIT_NAME}, which says which images were for training; keep it with the run")
    if split.classes != state.meta.classes:
        raise UserError(f"{run / SPLIT_NAME} names other classes than {state.path}; they belong to two runs")
    read_like = config.resolve(
        PreprocessSettings, [config.stored_layer(PreprocessSettings, f"run {run}", state.meta.settings)]
    )
    read_like = replace(
        read_like.settings, data_path=settings.data_path or "", vae_path=settings.vae_path or "", device=settings.device
    )
    return Plan(settings, state, split, read_like, hardware.pick_device(settings.device))


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
            for compute in (self.compare_latents, self.look_for_copies):
                compute()
                signals.raise_if_received()
            self.compare_features(signals)
            self.try_classifiers(signals)
        self.report.write()

    def compare_latents(self) -> None:
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
            self.report.drop(name, why=NO_TEST_IMAGES)
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

    def look_for_copies(self) -> None:
        """Measures how near synthetic images are to single training images, and draws the closest pairs."""
        synthetic, training = self.synthetic, self.real.training
        path = self.plan.folder / PAIRS_NAME
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
        if self.settings.inception_weights is None:
            self.report.drop("inception")
            return
        path = inception.find_weights(self.settings.inception_weights)
        made_of = {**self.made_of, "neighbours": self.settings.neighbours, "weights": file_digest(path)}
        if self._is_done("inception", made_of):
            return
        sets = (self.synthetic, self.real.training, self.real.test)
        for part in sets:
            if not part.are_at_hand:
                raise UserError(prepare.no_images_message(str(part.folder), also=", and Inception looks at images"))
        points = features(inception.load_network(path, self.plan.device), sets, signals)
        self.report.put("inception", made_of, self._closeness(*points, num_directions=None))
        signals.raise_if_received()

    def try_classifiers(self, signals: StopSignals) -> None:
        """Trains classifiers with and without the synthetic images, and tests them on the test images."""
        plan, settings = self.plan, self.settings
        why = classifier_trials.why_not(plan, self.real, self.synthetic.labels, [self.synthetic])
        if why is not None:
            if "classifier" not in self.report.data:  # those of an earlier run are about the same images
                self.report.drop("classifier", why=why)
            return
        made_of = {**self.made_of, **classifier_trials.made_of(plan)}
        stored = self.report.part("classifier", made_of) or {}
        done, seeds = stored.get("scores", {}), classifier_trials.seeds(plan)
        left = len(classifier.trainings_left(seeds, done))
        if not left and stored.get("seeds") == seeds:
            return
        if left:
            say(
                f"{left} trainings of a classifier to go, of {settings.classifier_steps:,} steps each; they may be "
                "stopped, and the same command goes on"
            )
        trials, pixels = Trials.of(plan, self.real), self.synthetic.pixels(settings.classifier_image_size)
        found = trials.run(
            pixels,
            self.synthetic.labels,
            done=done,
            save=lambda scores: self.report.put("classifier", made_of, {"scores": scores}),
            signals=signals,
        )
        self.report.put("classifier", made_of, found)


def features(network: torch.nn.Module, sets: Sequence[ImageSet], signals: StopSignals) -> list[Points]:
    """Returns the Inception features of all images of each set.

    Raises:
        Stopped: after a signal.
        Failed: when an image cannot be read.
    """
    found = [torch.zeros(len(part), inception.NUM_FEATURES) for part in sets]
    with script.progress(total=sum(map(len, sets)), unit="images", label="inception") as bar:

        def advance(count: int) -> None:
            bar.advance(count)
            signals.raise_if_received()

        for part, rows in zip(sets, found, strict=True):
            for positions in torch.arange(len(part)).split(READ_AT_ONCE):
                pixels = torch.from_numpy(np.stack(part.read(positions.tolist())))
                rows[positions] = inception.features(network, pixels, advance=advance)
    return [Points(rows, part.labels) for rows, part in zip(found, sets, strict=True)]


def evaluate(plan: Plan) -> None:
    """Makes the report about the images of a folder, and prints the main figures."""
    synthetic, real = open_synthetic(plan), open_real(plan)
    report = Report(plan.folder, made_of_real(plan, real))
    warnings = find_warnings(plan, synthetic, real)
    for line in warnings:
        warn(line)
    evaluated, settings = describe(plan, synthetic, real), config.to_dict(plan.settings)
    report.begin(evaluated=evaluated, warnings=warnings, settings=settings)
    Evaluation(plan, synthetic, real, report).run()
    print_figures(report.data)


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
        record = json.loads(durable.read_whole(folder / RECORD_NAME, at_most=generate.LARGEST_RECORD_BYTES))
    except (OSError, ValueError, RecursionError):
        return {}
    known = ("weights", "step", "cond_scale", "guidance_interval", "sampler", "sampling_timesteps", "seed")
    found = config.with_later_settings(record) if isinstance(record, dict) else {}
    return {name: found[name] for name in known if isinstance(found.get(name), str | int | float | list)}


def find_warnings(plan: Plan, synthetic: ImageSet, real: RealImages) -> list[str]:
    """Returns a sentence for each thing that the figures about these images must be read with."""
    found = warnings_of_run(plan)
    if not len(real.test):
        found.append(f"{NO_TEST_IMAGES}, so that only the distances to training images can be computed")
    missing = [name for label, name in enumerate(plan.classes) if not synthetic.latents.count(label)]
    if missing:
        found.append(f"there are no synthetic images of {listing(missing)}; the figures are about the other classes")
    for part, remedy in ((synthetic, "generate"), (real.test, "have")):
        counts = [part.latents.count(label) for label in part.labels.unique().tolist()]
        if counts and min(counts) < page.FEW_PER_CLASS:
            found.append(
                f"only {min(counts)} {part.name} images of a class: distances of so few are too large, and all figures "
                f"scatter; {remedy} {page.FEW_PER_CLASS} or more of each"
            )
    record, weights = made_with(synthetic.folder), vae.weights_digest(plan.state.averages)
    if record.get("weights", weights) != weights:
        found.append(
            f"the images were made with other weights (of step {record.get('step')}) than those of "
            f"{plan.state.path.name}"
        )
    return found


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
            say(
                _row(
                    title + label, *(evaluation.written(data[name][kind][figure]) for kind in ("synthetic", "training"))
                )
            )
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
    if "latents" in data:
        mark, sentence = page.closeness(data["latents"], show=images.shown)
        say(f"Are they close to real images? {mark.capitalize()}. {sentence}")
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


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


if __name__ == "__main__":
    sys.exit(main(None))
