"""Figures about generated images in plain values: how close to real ones, how varied, and whether they are copies.

Three sets of points are compared: the synthetic images, the training images that the model saw, and the test images
that it never saw. The test images stand for reality. The training images are real, too, so what they get against the
test images is the best that can be expected: the yardstick. None stands for a figure that cannot be computed.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gait_latents.common.seeds import sample_generator
from gait_latents.diffusion.sampling import nearest_class
from gait_latents.evaluation import distances as latent_distances
from gait_latents.evaluation.distances import Projection

NUM_DIRECTIONS = 16  # principal directions in which latents are compared by the Fréchet distance
NUM_PAIRS = 8  # so many pairs of a synthetic image and its nearest training image are shown, the closest ones
NEAR_SHARE = 0.05  # the distance below which this share of the test images lies counts as near to a training image
LARGEST_MOVE = 0.25  # of its width that a training image may be moved by to be the nearest
MANY_NEAR = 3 * NEAR_SHARE  # where a larger share of the samples is near, they look like copies
_FEWEST = 3  # a class with fewer images is not compared by itself
_NUM_SUBSETS, _LARGEST_SUBSET = 100, 1000  # of the kernel distance


@dataclass(frozen=True, eq=False)
class Points:
    """Latents or features [N ...] with the label of each [N]."""

    points: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, chosen: Tensor) -> "Points":
        """Returns some of the points, by their indices or a mask."""
        return Points(self.points[chosen], self.labels[chosen])

    def of(self, label: int) -> Tensor:
        """Returns the points of one class."""
        return self.points[self.labels == label]

    def count(self, label: int) -> int:
        """Returns the number of points of one class."""
        return int((self.labels == label).sum())


def format_figure(value: float | None) -> str:
    """Returns a figure as a table shows it: three digits, or a dash for None."""
    return "-" if value is None else f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"


def match_counts(first: Points, second: Points, *, seed: int) -> tuple[Points, Points]:
    """Draws, by the seed, equally many points of each class from two sets: most figures depend on the number."""
    labels = sorted({*first.labels.tolist(), *second.labels.tolist()})
    counts = {label: min(first.count(label), second.count(label)) for label in labels}

    def some(points: Points, name: str) -> Points:
        chosen = []
        for label, count in counts.items():
            own = (points.labels == label).nonzero()[:, 0]
            order = torch.randperm(len(own), generator=sample_generator(seed, "evaluation", name, label))
            chosen.append(own[order[:count]].sort().values)
        return points.take(torch.cat(chosen))

    return some(first, "first"), some(second, "second")


# --- how close ---------------------------------------------------------------------------------------------


def closeness(
    synthetic: Points, training: Points, test: Points, *, neighbours: int, seed: int, num_directions: int | None
) -> dict[str, Any]:
    """Compares synthetic and training images with the test images, class by class and in all.

    The two sets are cut to equally many images of each class first, and all to the classes that synthetic and test
    images have in common: test images say nothing about classes that they lack.

    Args:
        neighbours: k of precision, recall, density and coverage.
        seed: chooses the images and the subsets.
        num_directions: at most so many principal directions of the test images for the Fréchet distance; None
            takes the points as they are.

    Returns:
        What was compared, and under "synthetic" and "training" the figures of each, all against the test images.
    """
    test = test.take(torch.isin(test.labels, synthetic.labels))
    synthetic = synthetic.take(torch.isin(synthetic.labels, test.labels))
    synthetic, training = match_counts(synthetic, training, seed=seed)
    alone = [label for label in test.labels.unique().tolist() if _fewest(label, synthetic, test) >= _FEWEST]
    smallest, smallest_alone = (
        min(len(synthetic), len(test)),
        min((_fewest(a, synthetic, test) for a in alone), default=0),
    )
    whole = num_directions if num_directions is None else min(num_directions, smallest - 1)
    single = num_directions if num_directions is None else min(num_directions, smallest_alone - 1)
    projection = None if whole is None or whole < 1 else Projection.fit(test.points, whole)
    facts = {
        "images": len(synthetic),
        "test_images": len(test),
        "directions": whole,
        "directions_per_class": single if alone else None,
        "neighbours": neighbours,
        "subset_size": _subset_size(smallest),
        "num_subsets": _NUM_SUBSETS,
    }
    for name, points in (("synthetic", synthetic), ("training", training)):
        generator = sample_generator(seed, "evaluation", "subsets")
        facts[name] = {
            **_in_all(points, test, projection, generator),
            **_per_class(points, test, alone, None if projection is None else projection.leading(single or 0)),
            **_overlap(points, test, neighbours),
        }
    return facts


def _fewest(label: int, *sets: Points) -> int:
    return min(points.count(label) for points in sets)


def _subset_size(smallest: int) -> int:
    return min(_LARGEST_SUBSET, smallest // 2)


def _in_all(points: Points, test: Points, projection: Projection | None, generator: torch.Generator) -> dict[str, Any]:
    smallest = min(len(points), len(test))
    if smallest < 2 * 2:  # a subset is half of them, and needs 2
        return {"frechet": None, "kernel": None, "kernel_deviation": None}
    mean, deviation = latent_distances.kernel_distance_of_subsets(
        points.points,
        test.points,
        subset_size=_subset_size(smallest),
        num_subsets=_NUM_SUBSETS,
        generator=generator,
    )
    return {
        "frechet": _frechet(points.points, test.points, projection),
        "kernel": mean,
        "kernel_deviation": deviation,
    }


def _frechet(first: Tensor, second: Tensor, projection: Projection | None) -> float:
    if projection is not None:
        first, second = projection(first), projection(second)
    return latent_distances.frechet_distance(first, second)


def _per_class(points: Points, test: Points, labels: Sequence[int], projection: Projection | None) -> dict[str, Any]:
    """Returns the distances of these classes by label, and the mean over them."""
    frechet = {label: _frechet(points.of(label), test.of(label), projection) for label in labels}
    kernel = {label: latent_distances.kernel_distance(points.of(label), test.of(label)) for label in labels}
    return {
        "frechet_per_class": frechet,
        "kernel_per_class": kernel,
        "frechet_mean": mean_of(frechet.values()),
        "kernel_mean": mean_of(kernel.values()),
    }


def mean_of(values: Any) -> float | None:
    """Returns the mean of numbers, None of none."""
    values = list(values)
    return sum(values) / len(values) if values else None


def _overlap(points: Points, test: Points, neighbours: int) -> dict[str, Any]:
    if min(len(points), len(test)) <= neighbours:
        return dict.fromkeys(("precision", "recall", "density", "coverage"))
    return vars(latent_distances.coverage(test.points, points.points, neighbours=neighbours))


def recognition(points: Points, training: Points) -> float:
    """Returns the share of latents that are nearer to the mean of their own class than to that of another.

    The means are those of the training images.
    """
    labels = training.labels.unique()
    means = torch.stack([training.of(label).double().mean(0) for label in labels.tolist()])
    return float((labels[nearest_class(points.points, means)] == points.labels).double().mean())


# --- copies ------------------------------------------------------------------------------------------------


def memorisation(synthetic: Points, training: Points, test: Points, *, seed: int) -> dict[str, Any]:
    """Measures whether synthetic images are nearer to single training images than unseen test images are.

    A copy that was moved sideways is a copy: distances are to the nearest training image in any place up to
    LARGEST_MOVE of its width, for synthetic and test images alike.

    Which share is near is told of the classes that synthetic and test images have in common, each counted as often as
    it has test images, so that neither a class without these nor one with more samples than others passes for copies.

    Returns:
        Distances of each synthetic and each test image to its nearest training image; medians; the share of
        synthetic images that are nearer than a threshold below which NEAR_SHARE of unseen images are expected (of few
        test images the nearest is the threshold, and more are); the share that is nearer to a training than to a test
        image, of equally many; limits that both shares pass by chance about once in thirty times; C_T, in all and of
        each class (`distances.copying_score`); and the closest pairs as indices. Without test images of their classes
        only what needs none.
    """
    distances, indices = _nearest(synthetic, training)
    order = distances.argsort(stable=True)[:NUM_PAIRS]
    facts: dict[str, Any] = {
        "distances": distances.tolist(),
        "median": _median(distances),
        "pairs": [(i, int(indices[i]), float(distances[i])) for i in order.tolist()],
    }
    test = test.take(torch.isin(test.labels, synthetic.labels))
    if not len(test):
        return facts
    seen = _nearest(test, training)[0]
    threshold = float(np.quantile(seen.numpy(), NEAR_SHARE, method="weibull"))  # so many of unseen images are below it
    is_near = (distances < threshold) | (distances == 0)
    per_class = {}
    for label in synthetic.labels.unique().tolist():
        own, others = synthetic.labels == label, test.labels == label
        per_class[label] = {
            "median": _median(distances[own]),
            "test_median": _median(seen[others]) if others.any() else None,
            "near_share": float(is_near[own].double().mean()) if others.any() else None,
            "copying": latent_distances.copying_score(distances[own], seen[others]) if others.any() else None,
        }
    expected = max(NEAR_SHARE, 1 / (len(test) + 1))
    shares = {label: test.count(label) / len(test) for label in per_class}
    inverse_count = sum(share**2 / synthetic.count(label) for label, share in shares.items())
    return {
        **facts,
        "test_distances": seen.tolist(),
        "test_median": _median(seen),
        "threshold": threshold,
        "test_near_share": expected,
        "near_share": _weighted(per_class, "near_share", test),
        "near_share_limit": _limit(expected, inverse_count + 1 / len(test)),
        "copying": _weighted(per_class, "copying", test),
        "per_class": per_class,
        **_nearer_to_training(synthetic, training, test, seed=seed),
    }


def _nearest(points: Points, among: Points) -> tuple[Tensor, Tensor]:
    largest = round(LARGEST_MOVE * points.points.shape[-1])
    return latent_distances.nearest_moved(points.points, among.points, largest_shift=largest)


def _weighted(per_class: dict[int, dict[str, Any]], figure: str, test: Points) -> float | None:
    """Returns the mean of a figure of the classes, each as often as the class has test images (Meehan et al. 2020)."""
    weights = {label: test.count(label) for label, found in per_class.items() if found[figure] is not None}
    if not weights:
        return None
    return sum(per_class[label][figure] * count for label, count in weights.items()) / sum(weights.values())


def _median(values: Tensor) -> float:
    return float(torch.quantile(values, 0.5))


def _nearer_to_training(synthetic: Points, training: Points, test: Points, *, seed: int) -> dict[str, Any]:
    """Returns the share of synthetic images that are nearer to a training image than to any test image.

    Training and test images are cut to equally many of each class first.
    """
    training, test = match_counts(training, test, seed=seed)
    chosen = torch.isin(synthetic.labels, test.labels)
    if not chosen.any():
        return {"nearer_to_training": None, "nearer_to_training_limit": None}
    synthetic = synthetic.take(chosen)
    to_training, to_test = (_nearest(synthetic, real)[0] for real in (training, test))
    wins = (to_training < to_test).double() + (to_training == to_test).double() / 2
    return {
        "nearer_to_training": float(wins.mean()),
        "nearer_to_training_limit": _limit(0.5, 1 / len(synthetic)),
    }


def _limit(share: float, inverse_count: float) -> float:
    """Returns the limit, two standard deviations up, that a share exceeds by chance in about one case of thirty."""
    return min(1.0, share + 2 * math.sqrt(share * (1 - share) * inverse_count))
