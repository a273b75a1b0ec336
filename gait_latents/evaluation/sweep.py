"""Guidance scales and checkpoints compared: each is sampled and measured, and classifiers train on its samples."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gait_latents.common import cli, console, hardware
from gait_latents.common.console import say, warn
from gait_latents.common.errors import UserError
from gait_latents.common.process import StopSignals
from gait_latents.diffusion.sampling import BATCH_SIZE
from gait_latents.evaluation import trials
from gait_latents.evaluation.comparison import BOTH, REAL, SYNTHETIC
from gait_latents.evaluation.figures import (
    MANY_NEAR,
    NUM_DIRECTIONS,
    Points,
    closeness,
    format_figure,
    memorisation,
    recognition,
)
from gait_latents.evaluation.image_sets import (
    FEWEST_TO_CHOOSE,
    RealImages,
    list_names,
    made_of_real,
    open_real,
    warnings_of_run,
)
from gait_latents.evaluation.plan import EvaluationPlan
from gait_latents.evaluation.report import Report, file_digest
from gait_latents.evaluation.trials import Trials
from gait_latents.settings import GenerateSettings
from gait_latents.training import run_folder
from gait_latents.training.trained_model import FROM_RUN, TrainedModel

_CHOSEN_ON_TEST = (
    f"the run has fewer than {FEWEST_TO_CHOOSE} validation images of a class, so points are compared with the test "
    "images: the figures of a point that is chosen so look better than they are"
)


def find_states(plan: EvaluationPlan) -> list[Path]:
    """Returns the checkpoint files that the sweep samples from, oldest first; raises UserError when one is absent."""
    asked, newest = plan.settings.sweep_checkpoints, plan.state.path
    saved = run_folder.saved_averages(newest.parent)
    if asked == ("newest",) or (asked == ("all",) and not saved):
        return [newest]
    if asked == ("all",):
        return [saved[step] for step in sorted(saved)]
    steps = {int(word) if word.isdecimal() else word for word in asked}
    unknown = steps - saved.keys()
    if unknown:
        raise UserError(
            f"--sweep_checkpoints {cli.show(asked)}: {newest.parent} has averaged weights of the steps "
            f"{list_names([str(step) for step in sorted(saved)])}; give some of these, or all alone, or newest alone"
        )
    return [saved[step] for step in sorted(saved) if step in steps]


def sampling_settings(plan: EvaluationPlan) -> GenerateSettings:
    """Returns how the run samples, as generate.py would without flags."""
    of_run = plan.state.meta.chosen_settings(*FROM_RUN)
    layer = cli.stored_layer(GenerateSettings, f"the run in {plan.state.path.parent}", of_run)
    own = {name: getattr(plan.settings, name) for name in ("seed", "vae_path", "device", "trust_pickle")}
    return replace(cli.resolve(GenerateSettings, [layer]).settings, **own)


def sweep(plan: EvaluationPlan, states: Sequence[Path]) -> None:
    """Samples at each checkpoint and guidance scale, compares the samples with the validation images, and says the
    best; where the run has none, with the test images.

    What is found about a point is kept in the report at once.
    """
    real = open_real(plan)
    if not len(real.for_choices):
        raise UserError(
            "a sweep compares with images that training has not seen, and the run has none; train with "
            "fewer images_per_user"
        )
    report = Report(plan.folder, made_of_real(plan, real), num_classes=len(plan.classes))
    warnings = warnings_of_run(plan)
    if real.for_choices is not real.validation:
        warnings.append(_CHOSEN_ON_TEST)
    for line in warnings:
        warn(line)
    if "evaluated" not in report.data:
        report.set_facts(warnings=warnings, settings=cli.to_dict(plan.settings))
    with StopSignals(after="this piece of work") as signals:
        Sweep(plan, real, report, signals).run(states)


class Sweep:
    """Computes the points of a sweep and keeps each in the report; a point is one checkpoint at one guidance scale."""

    def __init__(self, plan: EvaluationPlan, real: RealImages, report: Report, signals: StopSignals) -> None:
        self.plan, self.real, self.report, self.signals = plan, real, report, signals
        self.sampling = sampling_settings(plan)
        self.made_of = made_of_sweep(plan, real, self.sampling)
        self.part: dict[str, Any] = report.part("sweep", self.made_of) or {"points": []}
        self.labels = torch.arange(len(plan.classes)).repeat_interleave(plan.settings.sweep_images)
        self.why_no_classifier = trials.why_not(plan, real, self.labels)
        self.trials = None if self.why_no_classifier else Trials.of(plan, real, test=real.for_choices)
        if self.trials is not None:
            self._drop_other_classifiers()
        self._model: tuple[Path, TrainedModel] | None = None

    def run(self, states: Sequence[Path]) -> None:
        """Does what is missing, and prints the figures."""
        scales = list(dict.fromkeys(self.plan.settings.sweep))
        weights = {path: file_digest(path) for path in states}
        points = [self._recall_point(path, weights[path], scale) for path, scale in itertools.product(states, scales)]
        todo = [point for point in points if not self._is_done(point)]
        if len(todo) < len(points):
            say(f"{len(points) - len(todo)} of {len(points)} points are in the report already")
        for point in todo:
            self._keep(self._look_at(point))
        print_sweep(self.part)
        if self.why_no_classifier:
            say(f"no classifier: {self.why_no_classifier}")

    def _recall_point(self, path: Path, weights: str, scale: float) -> dict[str, Any]:
        """Returns what the report knows of a point already."""
        name = {"weights": weights, "guidance": scale}
        same = [point for point in self.part["points"] if name.items() <= point.items()]
        return {**(same[0] if same else name), "checkpoint": path.name}

    def _drop_other_classifiers(self) -> None:
        """Removes from the points what classifiers with other settings than today's have found."""
        asked = trials.made_of(self.plan).items()
        for point in self.part["points"]:
            if "classifier" in point and not asked <= point["classifier"].items():
                for figures, name in itertools.product(
                    (point, self.part["training"]), ("classifier", *_CLASSIFIER_COLUMNS)
                ):
                    figures.pop(name, None)

    def _is_done(self, point: dict[str, Any]) -> bool:
        if "frechet_mean" not in point:
            return False
        return self.trials is None or point.get("classifier", {}).get("seeds") == trials.seeds(self.plan)

    def _look_at(self, point: dict[str, Any]) -> dict[str, Any]:
        """Samples at a point and measures; returns the point with its figures, and with those of training images."""
        model = self._model_of(point["checkpoint"])
        say(f"guidance {point['guidance']:g} at step {model.meta.step:,}")
        samples = self._sample(model, point["guidance"])
        figures, yardstick = measure(self.plan, self.real, Points(samples, self.labels))
        found = {**point, "step": model.meta.step, **figures, "yardstick": yardstick}
        if self.trials is not None:
            for name in _CLASSIFIER_COLUMNS:  # they are means over fewer seeds
                found.pop(name, None)
            self._keep(found)
            found["classifier"] = self._train_classifiers(found, samples, model)
            means = {name: trained["mean"] for name, trained in found["classifier"]["sets"].items()}
            found |= {"alone": means[SYNTHETIC], "with_real": means[BOTH]}
            yardstick["with_real"] = means[REAL]
        return found

    def _model_of(self, name: str) -> TrainedModel:
        path = self.plan.state.path.parent / name
        if self._model is None or self._model[0] != path:
            self._model = path, TrainedModel(self.sampling, run_folder.read_state(path), self.plan.device)
        return self._model[1]

    def _sample(self, model: TrainedModel, scale: float) -> Tensor:
        """Samples latents [N C h w] of every class, the same that generate.py would decode."""
        labels, count = self.labels.tolist(), self.plan.settings.sweep_images
        parts = []
        with console.progress(total=len(labels), unit="samples", label="sample") as bar:
            for start in range(0, len(labels), BATCH_SIZE):
                own = labels[start : start + BATCH_SIZE]
                indices = [place % count for place in range(start, start + len(own))]
                parts.append(model.sample(own, indices, scale, between=self.signals.raise_if_received).cpu())
                bar.advance(len(own))
                self.signals.raise_if_received()
        return torch.cat(parts)

    def _train_classifiers(self, point: dict[str, Any], samples: Tensor, model: TrainedModel) -> dict[str, Any]:
        assert self.trials is not None
        others = [other.get("classifier", {}).get("scores", {}) for other in self.part["points"]]
        real_alone = {seed: score for scores in others for seed, score in scores.get(REAL, {}).items()}
        tunings = [
            other["classifier"]["tuning"] for other in self.part["points"] if "tuning" in other.get("classifier", {})
        ]
        own = point.get("classifier", {})
        done = {
            "scores": {**own.get("scores", {}), REAL: real_alone},
            "tuning": max(tunings, key=lambda tuning: len(tuning["tried"]), default=None),
        }

        def save(state: dict[str, Any]) -> None:
            self._keep({**point, "classifier": {**state, **trials.made_of(self.plan)}})

        images = decode(samples, model, self.plan, between=self.signals.raise_if_received)
        return self.trials.run((images, self.labels), done=done, save=save, signals=self.signals)

    def _keep(self, point: dict[str, Any]) -> None:
        own = {name: value for name, value in point.items() if name != "yardstick"}
        others = [
            other
            for other in self.part["points"]
            if (other["weights"], other["guidance"]) != (point["weights"], point["guidance"])
        ]
        points = sorted([*others, own], key=lambda one: (one["step"], one["guidance"]))
        best = {
            "best": best_point(points),
            "best_for_classifiers": best_for_classifiers(points),
            "sentences": say_best(points, self.plan.settings.sweep_images, against=self.real.for_choices.name),
            "against": self.real.for_choices.name,
        }
        training = {**self.part.get("training", {}), **point["yardstick"]}
        self.part = self.report.put("sweep", self.made_of, {"points": points, "training": training, **best})


def decode(
    samples: Tensor, model: TrainedModel, plan: EvaluationPlan, *, between: Callable[[], None] = lambda: None
) -> Tensor:
    """Decodes samples [N C h w] to the images [N S S 3] that classifiers see, by way of the files of generate.py.

    Args:
        between: called after each; what it raises ends the work.
    """
    with console.progress(total=len(samples), unit="images", label="decode") as bar:

        def advance() -> None:
            bar.advance()
            between()

        return trials.decoded(samples.split(1), model.decoder, plan, suffix=model.suffix, between=advance)


def made_of_sweep(plan: EvaluationPlan, real: RealImages, sampling: GenerateSettings) -> dict[str, Any]:
    """Returns all that the points of a sweep depend on; with another value they are computed anew."""
    return {
        **made_of_real(plan, real),
        "against": real.for_choices.digest(),
        "figures": 5,  # to be raised when the points get other figures
        "neighbours": plan.settings.neighbours,
        "images_per_class": plan.settings.sweep_images,
        "guidance_interval": sampling.guidance_interval,
        "sampler": sampling.sampler,
        "sampling_timesteps": sampling.sampling_timesteps,
        "precision": str(hardware.pick_precision(sampling.precision, plan.device)[0]),
    }


def measure(plan: EvaluationPlan, real: RealImages, samples: Points) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the figures of a point of the sweep, and those of as many training images."""
    seed, training, test = plan.settings.seed, real.training.latents, real.for_choices.latents
    found = closeness(
        samples,
        training,
        test,
        neighbours=plan.settings.neighbours,
        seed=seed,
        num_directions=NUM_DIRECTIONS,
    )
    copies = memorisation(samples, training, test, seed=seed)
    figures = {
        "images": found["images"],
        **found["synthetic"],
        "recognition": recognition(samples, training),
        **{name: copies[name] for name in ("near_share", "near_share_limit", "test_near_share", "nearer_to_training")},
    }
    yardstick = {
        **found["training"],
        "recognition": recognition(test, training),
        "near_share": copies["test_near_share"],
    }
    return figures, yardstick


def best_point(points: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Returns the point with the lowest Fréchet distance per class (the mean over the classes).

    A model that draws its training images again comes near to the test images, too, so points with many near copies
    count only where there are no others. And samples that look like no real image may lie near in the mean, which
    happens where sets are small: of the points that count, those with less than half of another's precision or
    coverage are left out, unless that would leave none.
    """
    known = [point for point in points if point["frechet_mean"] is not None]
    varied = [point for point in known if not _draws_copies(point)] or known
    real = [point for point in varied if _looks_real(point, varied)] or varied
    return min(real, key=lambda point: point["frechet_mean"], default=None)


def _looks_real(point: dict[str, Any], points: Sequence[dict[str, Any]]) -> bool:
    for name in ("precision", "coverage"):
        most = max((other[name] for other in points if other[name] is not None), default=0.0)
        if point[name] is not None and point[name] < most / 2:
            return False
    return True


def _draws_copies(point: dict[str, Any]) -> bool:
    return point["near_share"] > max(MANY_NEAR, point["near_share_limit"])


def best_for_classifiers(points: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Returns the point whose samples, beside the real images, made the best classifiers."""
    known = [point for point in points if "with_real" in point]
    return max(known, key=lambda point: point["with_real"], default=None)


def say_best(points: Sequence[dict[str, Any]], images_per_class: int, *, against: str = "test") -> list[str]:
    """Returns a sentence or more about which points are best, as the images `against` which they stand show it."""
    best, for_classifiers = best_point(points), best_for_classifiers(points)
    if best is None:
        found = [f"No point is the best: {images_per_class} samples per class, or the {against} images, are too few."]
    else:
        found = [
            f"Nearest to the {against} images by Fréchet distance per class: {_name_point(best)}; one seed, so how far "
            "such figures scatter is not known.",
            _about_copies(points, best),
        ]
    if for_classifiers is not None:
        sentence = for_classifiers["classifier"]["difference"]["sentence"]
        of = f", chosen by the same images out of {len(points)} points" if len(points) > 1 else ""
        found.append(
            f"Best beside real images in training a classifier{of}: {_name_point(for_classifiers)}. {sentence}"
        )
    return found


def _about_copies(points: Sequence[dict[str, Any]], best: dict[str, Any]) -> str:
    share = f"Of its samples, {best['near_share']:.0%} are very near to a training image (of unseen images, "
    share += f"{best['test_near_share']:.0%})"
    if _draws_copies(best):
        return f"{share}, and no point has few: train for fewer steps, or with more images."
    nearer = [p for p in points if p["frechet_mean"] is not None and p["frechet_mean"] < best["frechet_mean"]]
    copying = [p["near_share"] for p in nearer if _draws_copies(p)]
    told = f"{share}; points that are nearer draw copies, up to {max(copying):.0%}." if copying else f"{share}."
    unreal = [p for p in nearer if not _draws_copies(p)]
    if unreal:
        told += f" {_name_point(unreal[0])} is nearer still, but its samples look less real (precision "
        told += f"{format_figure(unreal[0]['precision'])}, coverage {format_figure(unreal[0]['coverage'])})."
    return told


def _name_point(point: dict[str, Any]) -> str:
    return f"guidance {point['guidance']:g} at step {point['step']:,}"


_COLUMNS = {  # figure -> its head
    "frechet_mean": "Fréchet/class",
    "frechet": "Fréchet",
    "kernel": "kernel",
    "recognition": "own class",
    "precision": "precision",
    "recall": "recall",
    "coverage": "coverage",
    "near_share": "near copies",
}
_CLASSIFIER_COLUMNS = {"alone": "alone", "with_real": "with real"}


def print_sweep(part: dict[str, Any]) -> None:
    """Prints a row for each point of a sweep, and which ones are best."""
    columns = _COLUMNS if part["best_for_classifiers"] is None else _COLUMNS | _CLASSIFIER_COLUMNS
    say()
    say(f"{'step':>8}  {'guidance':>8}  " + "  ".join(columns.values()))
    rows = [(f"{p['step']:>8,}  {p['guidance']:>8g}", p) for p in part["points"]]
    for name, figures in [(f"{'real (training)':>18}", part["training"]), *rows]:
        cells = [f"{format_figure(figures.get(column)):>{len(head)}}" for column, head in columns.items()]
        say(f"{name}  " + "  ".join(cells))
    for sentence in part["sentences"]:
        say(sentence)
