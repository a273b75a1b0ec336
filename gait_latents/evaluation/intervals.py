"""How sure a mean over runs and classes is: a bootstrap that resamples whole runs and whole classes.

The figures of an experiment are not independent: those of one split share its images, those of one class its looks.
So whole levels of such factors are drawn again, not single figures.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Interval:
    """The mean of figures, the interval that it lies in, and for which kinds of chance that holds.

    Attributes:
        low, high: None where no factor has two levels.
        covers: factors whose chance is in the interval.
        leaves_out: factors of which there is one level, so that nobody knows how much another would change.
    """

    mean: float
    low: float | None
    high: float | None
    covers: tuple[str, ...]
    leaves_out: tuple[str, ...]


def bootstrap_interval(
    values: np.ndarray,
    chains: Sequence[Sequence[str]],
    *,
    seed: int,
    weights: np.ndarray | None = None,
    num_draws: int = 2000,
    level: float = 0.95,
) -> Interval:
    """Finds a percentile interval of the mean of figures that several factors make vary.

    A chain names factors from the outside to the inside, each nested in the one before, such as (split, generator,
    classifier) or (class, recording). In each chain the outermost factor with two levels or more is resampled, and all
    inside of it goes with it: the levels that it has differ by what is inside as well. Chains cross each other, and are
    resampled independently, which makes the interval too wide rather than too narrow (Owen 2007, the pigeonhole
    bootstrap). Of n levels n - 1 are drawn with replacement: with few levels the usual bootstrap finds too small a
    variance, this one the unbiased one (Rao and Wu 1988). Even so, two or three levels show little of how a factor
    varies.

    Args:
        values: one axis for each factor, in the order of the chains; NaN where there is no figure.
        chains: the names of the factors.
        seed: of the draws.
        weights: of the figures, such as how many images each is the mean of; None gives all the same.
        num_draws: how often the levels are drawn.
        level: share of the draws that the interval holds.

    Raises:
        ValueError: when the axes are not those of the factors, or there is no figure.
    """
    factors = [factor for chain in chains for factor in chain]
    if values.ndim != len(factors):
        raise ValueError(f"{values.ndim} axes are not the {len(factors)} factors {', '.join(factors)}")
    is_known = ~np.isnan(values)
    if not is_known.any():
        raise ValueError("there is no figure to take the mean of")
    resampled, leaves_out = _resampled(values.shape, chains)
    counts = is_known * (1.0 if weights is None else weights)
    known = np.where(is_known, values, 0.0) * counts
    mean = float(known.sum() / counts.sum())
    covers = tuple(factor for factor in factors if factor not in leaves_out)
    if not resampled:
        return Interval(mean, None, None, covers, leaves_out)
    others = tuple(axis for axis in range(values.ndim) if axis not in resampled)
    means = _means(known.sum(axis=others), counts.sum(axis=others), np.random.default_rng(seed), num_draws)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(mean, float(low), float(high), covers, leaves_out)


def _resampled(shape: Sequence[int], chains: Sequence[Sequence[str]]) -> tuple[list[int], tuple[str, ...]]:
    """Returns the axes that are resampled, and the factors of which there is one level outside of these."""
    axes, single, axis = [], [], 0
    for chain in chains:
        sizes = shape[axis : axis + len(chain)]
        place = next((place for place, size in enumerate(sizes) if size > 1), None)
        single += chain if place is None else chain[:place]
        axes += [] if place is None else [axis + place]
        axis += len(chain)
    return axes, tuple(single)


def _means(sums: np.ndarray, counts: np.ndarray, rng: np.random.Generator, num_draws: int) -> np.ndarray:
    """Draws the levels of every axis again and again; returns the mean of each draw in which there is a figure."""
    weights = [rng.multinomial(size - 1, np.full(size, 1 / size), size=num_draws).astype(float) for size in sums.shape]
    totals = np.stack([_weighted(table, weights) for table in (sums, counts)])
    totals = totals[:, totals[1] > 0]
    return totals[0] / totals[1]


def _weighted(table: np.ndarray, weights: Sequence[np.ndarray]) -> np.ndarray:
    """Sums a table with the weights [draws, size] of each of its axes; returns [draws]."""
    found = np.tensordot(weights[0], table, axes=1)  # draws ...
    for axis_weights in weights[1:]:
        found = np.einsum("ds,ds...->d...", axis_weights, found)
    return found
