"""What a classifier's answers are worth: likelihood, equal error rate, and how many real images would do as well.

Logits are [N K], one row per image and one column per class; labels are int64 [N] from 0 to K - 1.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def negative_log_likelihood(logits: Tensor, labels: Tensor) -> float:
    """Returns the mean over images of minus the natural logarithm of the probability of the true class."""
    return float(torch.nn.functional.cross_entropy(logits.double(), labels))


def macro_eer(logits: Tensor, labels: Tensor) -> float | None:
    """Returns the equal error rate of verifying a class by its log-probability, as the mean over the classes.

    A class takes part where it has images and another has, too; None where there is no such class.
    """
    scores = logits.double().log_softmax(1)
    rates = []
    for label in range(logits.shape[1]):
        is_own = labels == label
        if is_own.any() and not is_own.all():
            rates.append(equal_error_rate(scores[is_own, label], scores[~is_own, label]))
    return math.fsum(rates) / len(rates) if rates else None


def equal_error_rate(own: Tensor, others: Tensor) -> float:
    """Returns the rate at which as many own scores are refused as others are taken, when a threshold is chosen.

    Between two thresholds both rates are interpolated linearly: the result is where the line through the points of the
    receiver operating characteristic meets the diagonal of equal errors.

    Args:
        own: scores [N] that should be high.
        others: scores [M] that should be low.
    """
    thresholds = torch.cat([own, others]).unique()
    refused = torch.searchsorted(own.sort().values, thresholds).double() / len(own)  # below each threshold
    taken = 1 - torch.searchsorted(others.sort().values, thresholds).double() / len(others)
    # From taking all to refusing all: the difference of the rates rises from -1 to 1.
    refused = torch.cat([refused, refused.new_ones(1)])
    taken = torch.cat([taken, taken.new_zeros(1)])
    difference = refused - taken
    after = int((difference >= 0).nonzero()[0])  # not the first, at which all are taken
    share = -difference[after - 1] / (difference[after] - difference[after - 1])
    return float(refused[after - 1] + share * (refused[after] - refused[after - 1]))


def worth(counts: Sequence[int], scores: Sequence[float], score: float) -> float:
    """Returns how many real images reach a score, read off the learning curve of real images.

    The curve is made to rise by pooling neighbours that fall (isotonic regression), and is linear in the logarithm of
    the count between its points. Where it is level, the smallest count is returned.

    Args:
        counts: of real images, rising.
        scores: what each count reaches; more is better.
        score: what is asked for.

    Returns:
        The count; 0 for less than the smallest count reaches, infinity for more than the largest does.

    Raises:
        ValueError: when there is no point, or the counts do not rise from 1 or more.
    """
    if not counts or len(counts) != len(scores) or counts[0] < 1 or any(np.diff(counts) <= 0):
        raise ValueError(f"a learning curve needs a score for each of some rising counts, not {list(counts)}")
    rising = pool_neighbours(scores)
    if score < rising[0]:
        return 0.0
    if score > rising[-1]:
        return math.inf
    after = next(place for place, reached in enumerate(rising) if reached >= score)
    if after == 0:
        return float(counts[0])
    share = (score - rising[after - 1]) / (rising[after] - rising[after - 1])
    return math.exp((1 - share) * math.log(counts[after - 1]) + share * math.log(counts[after]))


def pool_neighbours(scores: Sequence[float]) -> list[float]:
    """Returns the nearest scores, by least squares, that never fall (pool adjacent violators)."""
    pools: list[tuple[float, int]] = []  # mean and how many scores it stands for
    for score in scores:
        pools.append((float(score), 1))
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (last, last_size), (before, size) = pools.pop(), pools.pop()
            pools.append(((before * size + last * last_size) / (size + last_size), size + last_size))
    return [mean for mean, size in pools for _ in range(size)]


def say_worth(images: float, counts: Sequence[int]) -> str:
    """Returns what `worth` found in words for a table, such as 27, "fewer than 4" or "more than 240"."""
    if images == 0:
        return f"fewer than {counts[0]}"
    return f"{images:.0f}" if math.isfinite(images) else f"more than {counts[-1]}"
