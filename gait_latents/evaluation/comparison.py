"""Do generated images help? Classifiers learn from several training sets, and are tested on images that nobody saw.

A `Comparison` returns, and keeps while it works, plain values only:

    num_steps, batch_size       of each training
    seeds                       [seed]
    images                      {real, posterior, synthetic, test: count}
    tuning                      chosen: {learning_rate, strength}, which all trainings have; tried: [{learning_rate,
                                strength, nll}] on the validation images; images: how many those were
    scores                      {set: {seed as text: {accuracy, per_class, confusion, nll, eer}}}, one per training
    sets                        {set: ...}, of REAL and the names after it, and of parts of REAL; absent without images
        accuracies              [share], one per seed, in the order of `seeds`
        mean, deviation         over the seeds; the deviation (n - 1) is None for one seed
        nll, eer                negative log-likelihood and macro equal error rate, means over the seeds
        per_class               [share], the mean over the seeds, in label order; None for a class without test images
        confusion               [[count]], summed over the seeds; rows are true classes, columns what was said
        worth                   how many real images per class would do as well, in words; not for real ones themselves
    curve                       {counts, accuracies} of real images: parts of each class, and all
    differences                 {set: accuracy of it minus that of "real"}, for each other one
        mean, low, high         and its 95 % interval; None where nothing varies
        covers, leaves_out      the kinds of chance that the interval holds, and those of which there is one sample
        verdict                 helps, harms or open
        sentence                the same for a person
    difference                  the one of "real + synthetic"
    beyond_posterior            the same against "real + posterior": what the diffusion model adds; absent without those

Images are uint8 tensors [N S S 3], labels int64 [N].
"""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gait_latents.common.errors import UserError
from gait_latents.evaluation import worth
from gait_latents.evaluation.augmentation import Augmentation
from gait_latents.evaluation.classifier import BATCH_SIZE, Images, train_and_classify
from gait_latents.evaluation.intervals import Interval, bootstrap_interval

REAL, POSTERIOR, SYNTHETIC, BOTH = "real", "real + posterior", "synthetic", "real + synthetic"
PARTS_OF_REAL = (4, 2)  # the learning curve has a quarter and a half of the real images of each class, and all
# (learning rate, strength of the augmentation) among which the validation images choose.
CANDIDATES = ((2e-3, 0.0), (2e-3, 0.5), (2e-3, 1.0), (1e-3, 1.0))
_UNKNOWN = ("split", "generator", "sampling")  # of each there is one in an evaluation


def part_of_real(divisor: int) -> str:
    """Names a training set of a part of the real images of each class."""
    return f"1/{divisor} of {REAL}"


class Comparison:
    """Trains what is missing of a comparison, and says what it shows.

    All trainings take the same number of steps of the same size, and the same learning rate and augmentation: those
    with which a classifier of the real images alone does best on the validation images. Where there are two sets, half
    of every batch is of each: the weight of the few real images then does not depend on how many were generated.

    Args:
        sets: name -> training images and labels, at least REAL; SYNTHETIC goes alone and beside REAL, and POSTERIOR
            (draws of what the VAE makes of the real images) beside it.
        validation: images that no classifier learns from, by which rate and augmentation are chosen; None takes the
            last quarter of the real images of each class, and a classifier that learns from those before; a class
            of one image has it in both.
        gap: so many images between the two are then left out, but for no more than a third of those before.
        test: images that are in no other set, and their labels.
        seeds: one training of each set per seed.
        class_names: in label order.
        parts: divisors of the learning curve of real images.
        done: what `save` was given by an earlier call with the same images and settings; it is not done again.
        save: called with all that is done after each training: {"scores": ..., "tuning": ...}.
        keep: called after each training with set, seed and the logits [M K] of the test images.
        progress: called after each step; what it raises ends the work.

    Raises:
        UserError: when there are no test images, or a class lacks real or synthetic ones.
    """

    def __init__(
        self,
        sets: Mapping[str, Images],
        validation: Images | None,
        test: Images,
        *,
        num_steps: int,
        seeds: Sequence[int],
        device: torch.device,
        class_names: Sequence[str],
        done: Mapping[str, Any],
        save: Callable[[dict[str, Any]], object],
        keep: Callable[[str, int, Tensor], object] = lambda name, seed, logits: None,
        parts: Sequence[int] = PARTS_OF_REAL,
        gap: int = 0,
        batch_size: int = BATCH_SIZE,
        progress: Callable[[], None] | None = None,
    ) -> None:
        if not len(test[1]):
            raise UserError("a classifier needs test images, and the run has none; train with fewer images_per_user")
        for kind in (REAL, SYNTHETIC):
            if kind in sets:
                _refuse_empty_classes(kind, sets[kind][1], class_names)
        self.images, self.test, self.seeds = dict(sets), test, list(seeds)
        self.num_steps, self.batch_size, self.device, self.progress = num_steps, batch_size, device, progress
        self.num_classes, self.save, self.keep = len(class_names), save, keep
        self.learn, self.ask = _for_tuning(sets[REAL], validation, gap)
        self.parts = {divisor: _first_of_each(sets[REAL], divisor) for divisor in parts}
        self.sets = _training_sets(sets, self.parts)
        self.scores: dict[str, dict[str, Any]] = {
            name: dict(done.get("scores", {}).get(name, {})) for name in self.sets
        }
        self.tried: list[dict[str, float]] = list((done.get("tuning") or {}).get("tried", []))

    def num_trainings_left(self) -> int:
        """Returns how many classifiers `run` will train."""
        return len(self._candidates_left()) + len(self._left())

    def _candidates_left(self) -> list[tuple[float, float]]:
        known = {(row["learning_rate"], row["strength"]) for row in self.tried}
        return [candidate for candidate in CANDIDATES if candidate not in known]

    def _left(self) -> list[tuple[str, int]]:
        return [(name, seed) for seed in self.seeds for name in self.sets if str(seed) not in self.scores[name]]

    def run(self) -> dict[str, Any]:
        """Does what is missing; returns what the top of this module lists."""
        for rate, strength in self._candidates_left():
            logits = self._train([self.learn], self.ask[0], 0, learning_rate=rate, strength=strength)
            nll = worth.negative_log_likelihood(logits, self.ask[1])
            self.tried.append({"learning_rate": rate, "strength": strength, "nll": nll})
            self.save(self._state())
        for name, seed in self._left():
            logits = self._train(self.sets[name], self.test[0], seed, **self._chosen())
            self.keep(name, seed, logits)
            self.scores[name][str(seed)] = score(logits, self.test[1])
            self.save(self._state())
        return {**self._state(), **self._figures()}

    def _chosen(self) -> dict[str, float]:
        best = min(self.tried, key=lambda row: row["nll"])
        return {name: best[name] for name in ("learning_rate", "strength")}

    def _state(self) -> dict[str, Any]:
        tuning: dict[str, Any] = {"tried": self.tried, "images": len(self.ask[1])}
        if not self._candidates_left():
            tuning["chosen"] = self._chosen()
        return {"tuning": tuning, "scores": self.scores}

    def _train(
        self, sets: Sequence[Images], asked: Tensor, seed: int, *, learning_rate: float, strength: float
    ) -> Tensor:
        return train_and_classify(
            sets,
            asked,
            num_classes=self.num_classes,
            num_steps=self.num_steps,
            seed=seed,
            device=self.device,
            batch_size=self.batch_size,
            learning_rate=learning_rate,
            augment=Augmentation().scaled(strength),
            progress=self.progress,
        )

    def _figures(self) -> dict[str, Any]:
        sets = {name: summary([self.scores[name][str(seed)] for seed in self.seeds]) for name in self.sets}
        curve = self._curve(sets)
        for name in sets:
            if name in (POSTERIOR, SYNTHETIC, BOTH):
                found = worth.worth(curve["counts"], curve["accuracies"], sets[name]["mean"])
                sets[name]["worth"] = worth.say_worth(found, curve["counts"])
        differences = {name: self._difference(name) for name in self.sets if name in (POSTERIOR, SYNTHETIC, BOTH)}
        return {
            "num_steps": self.num_steps,
            "batch_size": self.batch_size,
            "seeds": self.seeds,
            "images": {
                **{name.removeprefix(f"{REAL} + "): len(part[1]) for name, part in self.images.items()},
                "test": len(self.test[1]),
            },
            "sets": sets,
            "curve": curve,
            "differences": differences,
            "difference": differences[BOTH],
            **({"beyond_posterior": self._difference(BOTH, POSTERIOR)} if POSTERIOR in sets else {}),
        }

    def _curve(self, sets: Mapping[str, Mapping[str, Any]]) -> dict[str, list[Any]]:
        """Returns the accuracy of real images against how many of a class there are, in the mean over the classes."""
        points = {
            **{len(part[1]): sets[part_of_real(divisor)]["mean"] for divisor, part in self.parts.items()},
            len(self.images[REAL][1]): sets[REAL]["mean"],
        }
        counts = {total: max(1, round(total / self.num_classes)) for total in sorted(points)}
        by_count = {count: points[total] for total, count in counts.items()}  # of equal counts the larger set
        return {"counts": [*by_count], "accuracies": [*by_count.values()]}

    def _difference(self, name: str, other: str = REAL) -> dict[str, Any]:
        """Compares a set with another, seed by seed and class by class."""
        own, real = (
            np.array([self.scores[which][str(seed)]["per_class"] for seed in self.seeds], dtype=float)
            for which in (name, other)
        )
        weights = torch.bincount(self.test[1], minlength=self.num_classes).double().numpy()
        own, real, weights = (values[..., weights > 0] for values in (own, real, weights))
        found = bootstrap_interval(
            own - real, (["classifier"], ["class"]), seed=0, weights=np.broadcast_to(weights, own.shape)
        )
        verdict, sentence = _say(name, other, found)
        return {
            **asdict(found),
            "covers": list(found.covers),
            "leaves_out": _left_out(found),
            "verdict": verdict,
            "sentence": sentence,
        }


def _training_sets(images: Mapping[str, Images], parts: Mapping[int, Images]) -> dict[str, list[Images]]:
    """Returns the training sets by name, in the order in which they are trained."""
    real = images[REAL]
    sets = {part_of_real(divisor): [part] for divisor, part in parts.items()} | {REAL: [real]}
    if POSTERIOR in images:
        sets[POSTERIOR] = [real, images[POSTERIOR]]
    if SYNTHETIC in images:
        sets |= {SYNTHETIC: [images[SYNTHETIC]], BOTH: [real, images[SYNTHETIC]]}
    return sets


def _for_tuning(real: Images, validation: Images | None, gap: int) -> tuple[Images, Images]:
    """Returns what a classifier that tries a setting learns from, and what it is asked about."""
    if validation is not None and len(validation[1]):
        return real, validation

    def last(count: int) -> int:
        return count - max(1, count // 4)

    def learnt(place: int, count: int) -> bool:
        return count == 1 or place < last(count) - min(gap, last(count) // 3)

    return _by_place(real, learnt), _by_place(real, lambda place, count: count == 1 or place >= last(count))


def _first_of_each(images: Images, divisor: int) -> Images:
    """Returns the first images of each class: one in `divisor`, and one at least."""
    return _by_place(images, lambda place, count: place < max(1, count // divisor))


def _by_place(images: Images, is_wanted: Callable[[int, int], bool]) -> Images:
    """Returns the images of whose place in their class, and number of these, something holds."""
    pixels, labels = images
    counts, seen, chosen = torch.bincount(labels).tolist(), {}, []
    for position, label in enumerate(labels.tolist()):
        place = seen[label] = seen.get(label, -1) + 1
        if is_wanted(place, counts[label]):
            chosen.append(position)
    return pixels[chosen], labels[chosen]


def _refuse_empty_classes(kind: str, labels: Tensor, class_names: Sequence[str]) -> None:
    counts = torch.bincount(labels, minlength=len(class_names)).tolist()
    empty = [name for name, count in zip(class_names, counts, strict=True) if not count]
    if empty:
        rest = f" and {len(empty) - 10} more" if len(empty) > 10 else ""
        raise UserError(
            f"there are no {kind} images of class {', '.join(empty[:10])}{rest}; a classifier that never saw a class "
            "cannot be compared with one that did: generate some, or leave the classifier out"
        )


# --- figures -----------------------------------------------------------------------------------------------


def score(logits: Tensor, truth: Tensor) -> dict[str, Any]:
    """Returns how a classifier did on the test images, as JSON gives it back.

    Args:
        logits: what it answered, [M K].
        truth: labels [M].
    """
    num_classes = logits.shape[1]
    cells = torch.bincount(truth * num_classes + logits.argmax(1), minlength=num_classes**2)
    cells = cells.reshape(num_classes, num_classes)
    counts, right = cells.sum(1).tolist(), cells.diag().tolist()
    return {
        "accuracy": sum(right) / sum(counts),
        "per_class": [r / n if n else None for r, n in zip(right, counts, strict=True)],
        "confusion": cells.tolist(),
        "nll": worth.negative_log_likelihood(logits, truth),
        "eer": worth.macro_eer(logits, truth),
    }


def summary(scores: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the figures of one training set over all seeds."""
    accuracies = [found["accuracy"] for found in scores]
    by_class = zip(*(found["per_class"] for found in scores), strict=True)
    return {
        "accuracies": accuracies,
        "mean": statistics.fmean(accuracies),
        "deviation": statistics.stdev(accuracies) if len(accuracies) > 1 else None,
        "nll": statistics.fmean(found["nll"] for found in scores),
        "eer": _mean(found["eer"] for found in scores),
        "per_class": [_mean(shares) for shares in by_class],
        "confusion": torch.tensor([found["confusion"] for found in scores]).sum(0).tolist(),
    }


def _mean(values: Iterable[float | None]) -> float | None:
    values = list(values)
    return None if None in values else statistics.fmean(values)  # pyright: ignore[reportArgumentType]


def _left_out(found: Interval) -> list[str]:
    return [*found.leaves_out, *_UNKNOWN]


def _say(name: str, other: str, found: Interval) -> tuple[str, str]:
    """Returns a verdict on a set against another, and the same in a sentence."""
    what = {POSTERIOR: "draws of the VAE's posterior are added", SYNTHETIC: "synthetic images alone are learnt from"}
    change = f"accuracy changes by {100 * found.mean:+.1f} points when "
    change += what.get(name, "synthetic images are added")
    change += " in place of draws of the VAE's posterior" if other == POSTERIOR else ""
    if found.low is None or found.high is None or "classifier" in found.leaves_out:
        return "open", f"{change}, but one classifier cannot show whether that is more than chance; give more seeds."
    over = " and ".join({"classifier": "classifiers", "class": "classes"}[factor] for factor in found.covers)
    interval = f"{change} (95 % interval {100 * found.low:+.1f} to {100 * found.high:+.1f} over {over}; the chance of "
    interval += f"another {' or '.join(_left_out(found))} is not in it)"
    if found.low > 0:
        return "helps", f"They help: {interval}."
    if found.high < 0:
        return "harms", f"They harm: {interval}."
    return "open", f"No difference that can be shown: {interval}."
