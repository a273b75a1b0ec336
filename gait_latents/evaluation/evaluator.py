"""Makes the report about the images of a folder, part by part: latents, Inception features, copies, classifiers."""

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors

from gait_latents.common import cli, console, files, mounts, pictures
from gait_latents.common.console import say, warn
from gait_latents.common.errors import Failed, UserError
from gait_latents.common.layout import PAIRS_NAME, RECORD_NAME
from gait_latents.common.process import StopSignals
from gait_latents.evaluation import forms, inception, page
from gait_latents.evaluation import trials as classifier_trials
from gait_latents.evaluation.comparison import PARTS_OF_REAL, POSTERIOR
from gait_latents.evaluation.figures import NUM_DIRECTIONS, Points, closeness, memorisation, recognition
from gait_latents.evaluation.image_sets import (
    NO_TEST_IMAGES,
    READ_AT_ONCE,
    ImageSet,
    RealImages,
    list_names,
    made_of_real,
    open_real,
    open_synthetic,
    warnings_of_run,
)
from gait_latents.evaluation.plan import EvaluationPlan
from gait_latents.evaluation.report import Report, file_digest
from gait_latents.evaluation.terminal import print_figures
from gait_latents.evaluation.trials import Trials
from gait_latents.images import generated, selection
from gait_latents.settings import (
    DIFFUSION,
    NETWORK,
    TRAINING,
    TrainSettings,
    with_later_settings,
    with_later_settings_of_runs,
)
from gait_latents.training.beginning import num_learnt_from
from gait_latents.vae import base, trained_on

_PREDICTIONS = "predictions"
_LENGTH = ("train_num_steps", "fewest_steps")  # of a run; which step was evaluated is known
_OF_THE_MODEL = [
    name
    for name, spec in cli.specs(TrainSettings).items()
    if spec.group in (TRAINING, DIFFUSION, NETWORK) and name not in _LENGTH
]


class Evaluation:
    """Makes the report about the images of a folder, part by part; parts that the report has already are kept.

    Attributes:
        made_of: what every part depends on; a part counts as done only as long as this is the same.
    """

    def __init__(self, plan: EvaluationPlan, synthetic: ImageSet, real: RealImages, report: Report) -> None:
        self.plan, self.synthetic, self.real, self.report = plan, synthetic, real, report
        self.settings = plan.settings
        self.made_of = {**made_of_real(plan, real), "synthetic": synthetic.digest()}

    def run(self) -> None:
        """Computes what is missing, and publishes the report after each part."""
        self.compare_latents()
        self.look_for_copies()
        with StopSignals(after="this piece of work") as signals:
            self.compare_features(signals)
            self.try_classifiers(signals)
        self.report.write()

    def compare_latents(self) -> None:
        """Compares the latents of synthetic and training images with those of the test images."""
        made_of = {**self.made_of, "neighbours": self.settings.neighbours}
        if self._is_done("latents", made_of):
            return
        figures = self._closeness(*self._latents(), num_directions=NUM_DIRECTIONS)
        figures["recognition"] = {
            part.name: recognition(part.latents, self.real.training.latents)
            for part in (self.synthetic, self.real.test)
        }
        self.report.put("latents", made_of, figures)

    def _is_done(self, name: str, made_of: dict[str, Any]) -> bool:
        """Says whether a part that needs test images is in the report already, or cannot be made without any."""
        if not len(self.real.test):
            self.report.drop(name, why=NO_TEST_IMAGES)
            return True
        return self.report.part(name, made_of) is not None

    def _latents(self) -> tuple[Points, Points, Points]:
        return self.synthetic.latents, self.real.training.latents, self.real.test.latents

    def _closeness(self, *points: Points, num_directions: int | None) -> dict[str, Any]:
        found = closeness(
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
        made_of = {**self.made_of, "figures": 3}  # to be raised when this part gets other figures
        figures = self.report.part("memorisation", made_of)
        pairs = self._pairs_of(figures) if figures is not None else None
        if figures is None or pairs is None:
            figures, pairs = self._measure_copies()
        elif not self._picture_is_wanted(figures):
            return
        self.report.put("memorisation", made_of, {**figures, **self._draw_pairs(pairs)})

    def _measure_copies(self) -> tuple[dict[str, Any], list[tuple[int, int]]]:
        """Returns the figures, and the closest pairs as positions."""
        synthetic, training = self.synthetic, self.real.training
        figures = memorisation(*self._latents(), seed=self.settings.seed)
        pairs = [(i, j) for i, j, _ in figures["pairs"]]
        figures["pairs"] = [
            {"synthetic": synthetic.place(i), "training": training.place(j), "distance": distance}
            for i, j, distance in figures["pairs"]
        ]
        figures["per_class"] = self._by_name(figures.get("per_class", {}))
        figures["same_content"] = same_content(synthetic, self.real)
        return figures, pairs

    def _pairs_of(self, figures: dict[str, Any]) -> list[tuple[int, int]] | None:
        """Returns the closest pairs of a report as positions; None where it names images that there are not."""
        ours, theirs = ({part.place(i): i for i in range(len(part))} for part in (self.synthetic, self.real.training))
        named = [(pair["synthetic"], pair["training"]) for pair in figures["pairs"]]
        is_known = named and all(one in ours and other in theirs for one, other in named)
        return [(ours[one], theirs[other]) for one, other in named] if is_known else None

    def _picture_is_wanted(self, figures: dict[str, Any]) -> bool:
        """Says whether the picture of a report is to be drawn again; tells where one is there that is not its own."""
        data, why = self.report.picture()
        are_at_hand = self.real.training.are_at_hand
        if why is not None and figures["picture"] is not None:
            then = "drawn again" if are_at_hand else "left out, as the training images are not at hand"
            warn(f"{self.plan.folder / PAIRS_NAME} is not the picture of this report ({why}), and is {then}")
        return are_at_hand and (figures["picture"] is None or data is None)

    def _draw_pairs(self, pairs: Sequence[tuple[int, int]]) -> dict[str, str | None]:
        """Draws the closest pairs; returns what the report says of the picture."""
        data, why = draw_pairs(self.synthetic, self.real.training, pairs)
        path = self.plan.folder / PAIRS_NAME
        path.unlink(missing_ok=True)
        if data is None:
            return {"picture": None, "picture_sha256": None, "why_no_picture": why}
        files.publish(path, data)
        return {"picture": path.name, "picture_sha256": hashlib.sha256(data).hexdigest(), "why_no_picture": None}

    def compare_features(self, signals: StopSignals) -> None:
        """Compares the Inception features of synthetic and training images with those of the test images, if asked."""
        if self.settings.inception_weights is None:
            self.report.drop("inception")
            return
        path = inception.find_weights(self.settings.inception_weights)
        made_of = {
            **self.made_of,
            "neighbours": self.settings.neighbours,
            "weights": file_digest(path, follow_link=True),
        }
        if self._is_done("inception", made_of):
            return
        sets = (self.synthetic, self.real.training, self.real.test)
        for part in sets:
            if not part.are_at_hand:
                raise UserError(selection.no_images_message(str(part.folder), also=", and Inception looks at images"))
        points = features(
            inception.load_network(path, self.plan.device, trust_pickle=self.settings.trust_pickle), sets, signals
        )
        self.report.put("inception", made_of, self._closeness(*points, num_directions=None))
        signals.raise_if_received()

    def try_classifiers(self, signals: StopSignals) -> None:
        """Trains classifiers with and without the synthetic images, and tests them on the test images."""
        plan, settings = self.plan, self.settings
        why = classifier_trials.why_not(plan, self.real, self.synthetic.labels, [self.synthetic])
        if why is not None:
            if "classifier" not in self.report.data:  # else an earlier call has trained some on the same images
                self.report.drop("classifier", why=why)
            return
        made_of = {**self.made_of, **classifier_trials.made_of(plan), "validation": self.real.validation.digest()}
        stored = self.report.part("classifier", made_of) or {}
        self._predictions = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()
        is_done = stored.get("seeds") == classifier_trials.seeds(plan) and self._has_predictions(stored["scores"])
        if is_done and POSTERIOR in stored["sets"]:
            return
        labels, why_no_posterior = self.synthetic.labels, classifier_trials.why_no_posterior(plan)
        self.report.drop(forms.DRAWS, why=why_no_posterior)
        if is_done and why_no_posterior is not None:
            return
        posterior = None
        if why_no_posterior is None:
            posterior = classifier_trials.posterior_images(plan, self.real, labels, signals), labels
        else:
            say(f"no {forms.DRAWS}: {why_no_posterior}")
        trials = Trials.of(plan, self.real, test=self.real.test)
        how = {
            "posterior": posterior,
            "parts": PARTS_OF_REAL,
            "done": self._with_predictions(stored),
            "save": lambda state: self.report.put("classifier", made_of, state),
            "keep": self._keep_prediction,
        }
        synthetic = self.synthetic.pixels(settings.classifier_image_size), labels
        say(
            f"{trials.comparison(synthetic, **how).num_trainings_left()} trainings of a classifier to go, of "
            f"{settings.classifier_steps:,} steps each; they may be stopped, and the same command goes on"
        )
        self.report.put("classifier", made_of, trials.run(synthetic, signals=signals, **how))

    def _prediction_path(self, name: str, seed: int | str) -> Path:
        return self.plan.folder / _PREDICTIONS / f"{re.sub('[^a-z0-9]+', '_', name)}_{seed}.safetensors"

    def _keep_prediction(self, name: str, seed: int, logits: torch.Tensor) -> None:
        """Keeps what a classifier answers for each test image, for tests of one's own."""
        tensors = {"logits": logits.contiguous(), "labels": self.real.test.labels}
        data = to_safetensors(tensors, metadata={"made_of": self._predictions})
        files.publish(self._prediction_path(name, seed), data, below=self.plan.folder)

    def _with_predictions(self, stored: dict[str, Any]) -> dict[str, Any]:
        """Returns what is stored without the trainings whose answers are not there any more."""
        scores = {
            name: {seed: found for seed, found in by_seed.items() if self._is_kept(self._prediction_path(name, seed))}
            for name, by_seed in stored.get("scores", {}).items()
        }
        return {**stored, "scores": scores}

    def _is_kept(self, path: Path) -> bool:
        """Says whether a file holds answers about today's images by a classifier with today's settings."""
        try:
            with safe_open(path, framework="pt") as file:
                shape = file.get_slice("logits").get_shape()
                is_ours = (file.metadata() or {}).get("made_of") == self._predictions
        except (OSError, SafetensorError):
            return False
        return is_ours and shape == [len(self.real.test), len(self.plan.classes)]

    def _has_predictions(self, scores: dict[str, Any]) -> bool:
        return self._with_predictions({"scores": scores})["scores"] == scores


def features(network: torch.nn.Module, sets: Sequence[ImageSet], signals: StopSignals) -> list[Points]:
    """Returns the Inception features of all images of each set.

    Raises:
        Stopped: after a signal.
        Failed: when an image cannot be read.
    """
    found = [torch.zeros(len(part), inception.NUM_FEATURES) for part in sets]
    with console.progress(total=sum(map(len, sets)), unit="images", label="inception") as bar:

        def advance(count: int) -> None:
            bar.advance(count)
            signals.raise_if_received()

        for part, rows in zip(sets, found, strict=True):
            for positions in torch.arange(len(part)).split(READ_AT_ONCE):
                pixels = torch.from_numpy(np.stack(part.read(positions.tolist())))
                rows[positions] = inception.features(network, pixels, advance=advance)
    return [Points(rows, part.labels) for rows, part in zip(found, sets, strict=True)]


def evaluate(plan: EvaluationPlan) -> None:
    """Makes the report about the images of a folder, and prints the main figures."""
    synthetic, real = open_synthetic(plan), open_real(plan)
    report = Report(plan.folder, made_of_real(plan, real), num_classes=len(plan.classes))
    warnings = find_warnings(plan, synthetic, real)
    for line in warnings:
        warn(line)
    evaluated, settings = describe(plan, synthetic, real), cli.to_dict(plan.settings)
    say(f"test images that the VAE was trained on: {evaluated['vae_saw']}")
    report.begin(evaluated=evaluated, warnings=warnings, settings=settings)
    Evaluation(plan, synthetic, real, report).run()
    print_figures(report.data)


def describe(plan: EvaluationPlan, synthetic: ImageSet, real: RealImages) -> dict[str, Any]:
    """Says what is evaluated: which model, which images, and how many of each class."""
    sets = (synthetic, real.training, real.test)
    return {
        "checkpoint": plan.state.path.name,
        "step": plan.state.step,
        "synthetic_path": str(synthetic.folder.absolute()),
        "synthetic_digest": synthetic.digest(),
        "split_digest": hashlib.sha256(f"{real.training.digest()} {real.test.digest()}".encode()).hexdigest(),
        "weights_digest": weights_of(plan, synthetic.folder),
        "made_with": made_with(synthetic.folder),
        "trained_with": trained_with(plan),
        "vae_saw": what_the_vae_saw(plan)[1],
        "split": plan.split.rule["split"],
        "image_size": plan.images.image_size,
        "images": {part.name: len(part) for part in sets},
        "images_per_class": {
            name: {part.name: part.latents.count(label) for part in sets} for label, name in enumerate(plan.classes)
        },
    }


def what_the_vae_saw(plan: EvaluationPlan) -> tuple[int | None, str]:
    """Returns how many of the test images the VAE was trained on, None where nobody knows, and the same in words."""
    found = trained_on.num_seen(plan.settings.vae_path or "", [entry.key for entry in plan.split.test])
    if found is None:
        return None, "nobody knows, as the file of the VAE does not say on which it was trained"
    return found, f"{found:,} of {len(plan.split.test):,}"


def weights_of(plan: EvaluationPlan, folder: Path) -> str:
    """Returns the digest of the weights that made the images of a folder: the run's, where nothing else is known."""
    found = made_with(folder).get("weights")
    return found if isinstance(found, str) else base.weights_digest(plan.state.averages)


def made_with(folder: Path) -> dict[str, Any]:
    """Returns what generate.py wrote down beside its images; for a folder of other images, an empty dict."""
    record = generated.record_or_none(folder / RECORD_NAME)
    known = ("weights", "step", "cond_scale", "guidance_interval", "sampler", "sampling_timesteps", "seed", "from_real")
    found = {} if record is None else with_later_settings(record)
    return {name: found[name] for name in known if name in found and forms.is_setting(found[name])}


def trained_with(plan: EvaluationPlan) -> dict[str, Any]:
    """Returns the settings of the run that make another kind of model of the same images; seed and length do not."""
    known = with_later_settings_of_runs(plan.state.meta.settings)
    found = {name: known[name] for name in _OF_THE_MODEL if name in known}
    return {**found, "init_from": plan.state.meta.began_from is not None}


def find_warnings(plan: EvaluationPlan, synthetic: ImageSet, real: RealImages) -> list[str]:
    """Returns a sentence for each reason to read the figures about these images with care."""
    found = warnings_of_run(plan)
    if not len(real.test):
        found.append(f"{NO_TEST_IMAGES}, so that only the distances to training images can be computed")
    seen = what_the_vae_saw(plan)[0]
    if seen:
        found.append(
            f"the VAE was trained on {seen:,} of the {len(plan.split.test):,} test images, so that figures and "
            "classifiers look better than they are; train a VAE on training images alone"
        )
    if plan.state.meta.began_from is not None:
        found += _learnt_before(plan, plan.state.meta.began_from["place"])
    missing = [name for label, name in enumerate(plan.classes) if not synthetic.latents.count(label)]
    if missing:
        found.append(f"there are no synthetic images of {list_names(missing)}; the figures are about the other classes")
    for part, remedy in ((synthetic, "generate"), (real.test, "have")):
        counts = [part.latents.count(label) for label in part.labels.unique().tolist()]
        if counts and min(counts) < page.FEW_PER_CLASS:
            found.append(
                f"only {min(counts)} {part.name} images of a class: distances of so few are too large, and all figures "
                f"scatter; {remedy} {page.FEW_PER_CLASS} or more of each"
            )
    record, weights = made_with(synthetic.folder), base.weights_digest(plan.state.averages)
    if record.get("from_real") is not None:
        found.append(
            f"the images were begun with training images (--from_real {record['from_real']}), so that they are near to "
            "these on purpose, and what is said of copies is no surprise"
        )
    if record.get("weights", weights) != weights:
        found.append(
            f"the images were made with other weights (of step {record.get('step')}) than those of "
            f"{plan.state.path.name}"
        )
    return found


def _learnt_before(plan: EvaluationPlan, place: str) -> list[str]:
    """Says how many test images the run was trained on that this one began with, as far as that run is at hand."""
    path = Path(mounts.locate(place))  # a checkpoint, or the folder of a run
    try:
        count = num_learnt_from(path.parent if path.suffix == ".safetensors" else path, plan.split.test)
    except UserError as error:
        return [f"which images the run in {place} was trained on, with which this one began, is not known: {error}"]
    if not count:
        return []
    return [
        f"{count:,} of the {len(plan.split.test):,} test images were training images of the run in {place}, with which "
        "this one began, so that figures and classifiers look better than they are"
    ]


def draw_pairs(
    synthetic: ImageSet, training: ImageSet, pairs: Sequence[tuple[int, int]]
) -> tuple[bytes | None, str | None]:
    """Draws synthetic images above their nearest training images; returns a PNG file, or why there is none."""
    if not training.are_at_hand:
        return None, f"the training images are not at hand in {training.folder}"
    try:
        above, below = synthetic.read(i for i, _ in pairs), training.read(j for _, j in pairs)
    except Failed as error:  # an image was changed or removed since it was encoded; the figures do not need it
        return None, str(error)
    names = [
        " / ".join(dict.fromkeys((synthetic.entries[i].class_name, training.entries[j].class_name))) for i, j in pairs
    ]
    picture = pictures.labelled_grid([above, below], ["synthetic", "nearest training"], names)
    return pictures.encode_image(picture, Path(PAIRS_NAME).suffix), None


def same_content(synthetic: ImageSet, real: RealImages) -> list[dict[str, str]]:
    """Pairs each synthetic file with the first other file of the very same content, be it real or synthetic."""
    first: dict[str, tuple[str, str]] = {}
    for part in (real.training, real.validation, real.test):
        for position, entry in enumerate(part.entries):
            first.setdefault(entry.key, (part.name, part.place(position)))
    found = []
    for position, entry in enumerate(synthetic.entries):
        own = (synthetic.name, synthetic.place(position))
        kind, place = first.setdefault(entry.key, own)
        if (kind, place) != own:
            found.append({"synthetic": own[1], "same_as": place, "kind": kind})
    return found
