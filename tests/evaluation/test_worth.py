"""Likelihood, equal error rate and worth: against closed forms, plain loops and other programs."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy import optimize

from gait_latents.evaluation import worth as measures
from gait_latents.evaluation.worth import equal_error_rate, macro_eer, negative_log_likelihood, pool_neighbours, worth

COUNTS, SCORES = [4, 8, 16, 64], [0.2, 0.4, 0.4, 0.8]


def test_the_likelihood_is_that_of_the_true_class():
    shares = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]])
    assert negative_log_likelihood(shares.log() + 3, torch.tensor([0, 2])) == pytest.approx(
        -(math.log(0.5) + math.log(0.8)) / 2
    )


def rate_by_a_plain_loop(own: np.ndarray, others: np.ndarray) -> float:
    """Walks along the receiver operating characteristic and solves for equal errors on the piece that crosses."""
    thresholds = [*np.unique(np.concatenate([own, others])), math.inf]
    points = [((own < t).mean(), (others >= t).mean()) for t in thresholds]

    def gap(place: float) -> float:
        refused, taken = (np.interp(place, range(len(points)), [p[i] for p in points]) for i in (0, 1))
        return float(refused - taken)

    crossing: Any = optimize.brentq(gap, 0, len(points) - 1)
    return float(np.interp(crossing, range(len(points)), [p[0] for p in points]))


def test_equal_errors_are_found_where_both_rates_meet():
    rng, cases = np.random.default_rng(0), 0
    for _ in range(40):
        own = rng.normal(rng.uniform(-0.5, 3), 1, rng.integers(1, 30)).round(1)  # with ties
        others = rng.normal(0, 1, rng.integers(1, 60)).round(1)
        found = equal_error_rate(torch.from_numpy(own), torch.from_numpy(others))
        assert found == pytest.approx(rate_by_a_plain_loop(own, others), abs=1e-6)
        cases += 1
    assert cases == 40


@pytest.mark.parametrize(
    ("own", "others", "rate"),
    [([2.0, 3.0], [0.0, 1.0], 0.0), ([0.0, 1.0], [2.0, 3.0], 1.0), ([1.0, 1.0], [1.0], 0.5), ([0.0, 2.0], [1.0], 0.5)],
)
def test_equal_errors_of_plain_cases(own, others, rate):
    assert equal_error_rate(torch.tensor(own), torch.tensor(others)) == pytest.approx(rate)


def test_normal_scores_have_the_rate_of_the_normal_distribution():
    generator = torch.Generator().manual_seed(1)
    own, others = torch.randn(2, 40_000, generator=generator, dtype=torch.float64)
    expected = 0.5 * math.erfc(1 / math.sqrt(2))  # half of the distance of 2 lies on either side
    assert equal_error_rate(own + 2, others) == pytest.approx(expected, abs=0.004)


def test_the_macro_rate_is_the_mean_over_classes_that_can_be_verified():
    logits = torch.tensor([[5.0, 0, 0], [4, 0, 0], [0, 5, 0], [5, 0, 0]])
    labels = torch.tensor([0, 0, 1, 1])  # none of class 2
    scores = logits.double().log_softmax(1)
    each = [equal_error_rate(scores[labels == k, k], scores[labels != k, k]) for k in (0, 1)]
    assert macro_eer(logits, labels) == pytest.approx(sum(each) / 2)
    assert macro_eer(logits[:2], labels[:2]) is None


def test_worth_is_read_off_the_curve_between_its_points_in_the_logarithm():
    assert worth(COUNTS, SCORES, 0.2) == 4
    assert worth(COUNTS, SCORES, 0.3) == pytest.approx(math.sqrt(4 * 8))
    assert worth(COUNTS, SCORES, 0.4) == pytest.approx(8)  # where it is level, the fewest
    assert worth(COUNTS, SCORES, 0.6) == pytest.approx(32)
    assert worth(COUNTS, SCORES, 0.8) == pytest.approx(64)
    assert worth(COUNTS, SCORES, 0.1) == 0 and worth(COUNTS, SCORES, 0.9) == math.inf
    shown = [measures.say_worth(worth(COUNTS, SCORES, score), COUNTS) for score in (0.1, 0.3, 0.9)]
    assert shown == ["fewer than 4", "6", "more than 64"]


def test_a_curve_that_falls_is_made_to_rise_by_least_squares():
    rng = np.random.default_rng(2)
    for _ in range(20):
        scores = rng.normal(size=6)
        found = pool_neighbours(list(scores))
        # The same by maximising and minimising means (Barlow et al. 1972).
        expected = [max(min(scores[a : b + 1].mean() for b in range(i, 6)) for a in range(i + 1)) for i in range(6)]
        assert found == pytest.approx(expected)
    assert worth([1, 2, 3], [0.5, 0.3, 0.9], 0.4) == 1


@pytest.mark.parametrize(
    ("counts", "scores"), [([], []), ([4, 4], [0, 1]), ([8, 4], [0, 1]), ([0, 1], [0, 1]), ([1], [])]
)
def test_what_is_no_curve_is_refused(counts, scores):
    with pytest.raises(ValueError, match="learning curve"):
        worth(counts, scores, 0.5)
