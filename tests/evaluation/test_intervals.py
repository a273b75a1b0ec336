"""The bootstrap over runs and classes: against closed forms, a plain loop, and how often it holds the truth."""

import numpy as np
import pytest

from gait_latents.evaluation.intervals import Interval, bootstrap_interval

CHAINS = (("split", "generator", "classifier"), ("class", "recording"))


def width(found: Interval) -> float:
    assert found.low is not None and found.high is not None
    return found.high - found.low


def test_one_factor_gives_the_interval_of_the_mean():
    values = np.random.default_rng(0).normal(3, 2, 400)
    found = bootstrap_interval(values, [["class"]], seed=1)
    reach = 1.96 * values.std(ddof=1) / 20
    assert found.mean == pytest.approx(values.mean())
    assert (found.low, found.high) == pytest.approx((found.mean - reach, found.mean + reach), abs=0.03)
    assert found.covers == ("class",) and found.leaves_out == ()


def test_two_levels_have_the_unbiased_variance():
    """Of 1 and 3 each is drawn alone; the variance of the mean is 2 / 2, that of the usual bootstrap half of it."""
    found = bootstrap_interval(np.array([1.0, 3.0]), [["split"]], seed=0)
    assert (found.mean, found.low, found.high) == (2.0, 1.0, 3.0)


def test_figures_of_a_level_that_are_alike_count_once():
    of_class = np.random.default_rng(2).normal(0, 1, 30)
    many = np.repeat(of_class[:, None], 50, axis=1)
    alone = bootstrap_interval(of_class, [["class"]], seed=3)
    assert bootstrap_interval(many, [["class", "image"]], seed=3).low == pytest.approx(alone.low)
    wrong = bootstrap_interval(many.ravel(), [["image"]], seed=3)
    assert width(wrong) < 0.3 * width(alone)


def test_it_is_what_a_plain_loop_finds():
    rng = np.random.default_rng(4)
    values = rng.normal(size=(3, 2, 4, 5, 2)) + rng.normal(size=(3, 1, 1, 5, 1))
    values[1, :, :, 2] = np.nan
    values[0, 0, 0, 0, 1] = np.nan
    found = bootstrap_interval(values, CHAINS, seed=5, num_draws=3000)
    means = []
    for _ in range(3000):
        splits, classes = rng.choice(3, 2), rng.choice(5, 4)
        drawn = values[splits][:, :, :, classes]
        means.append(drawn[~np.isnan(drawn)].mean() if not np.isnan(drawn).all() else np.nan)
    low, high = np.nanquantile(means, [0.025, 0.975])
    assert found.mean == pytest.approx(np.nanmean(values))
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.12 * (high - low))


def test_the_outermost_factor_with_two_levels_is_resampled_and_the_rest_is_told():
    rng = np.random.default_rng(6)
    one_split = bootstrap_interval(rng.normal(size=(1, 2, 3, 9, 2)), CHAINS, seed=0)
    assert one_split.covers == ("generator", "classifier", "class", "recording")
    assert one_split.leaves_out == ("split",)
    classifiers = bootstrap_interval(rng.normal(size=(1, 1, 3, 1, 1)), CHAINS, seed=0)
    assert classifiers.covers == ("classifier",) and len(classifiers.leaves_out) == 4
    assert classifiers.low is not None
    nothing = bootstrap_interval(np.full((1, 1, 1, 1, 1), 0.25), CHAINS, seed=0)
    assert (nothing.mean, nothing.low, nothing.high, nothing.covers) == (0.25, None, None, ())


def test_it_holds_the_truth_as_often_as_it_says_where_runs_and_classes_vary():
    rng, held = np.random.default_rng(7), 0
    for number in range(200):
        values = rng.normal(size=(8, 1)) + rng.normal(size=(1, 20)) + rng.normal(size=(8, 20))
        found = bootstrap_interval(values, [["run"], ["class"]], seed=number, num_draws=400)
        assert found.low is not None and found.high is not None
        held += found.low <= 0 <= found.high
    assert 0.86 < held / 200 < 0.99


def test_wrong_axes_and_no_figures_are_refused():
    with pytest.raises(ValueError, match="2 axes are not the 1 factors class"):
        bootstrap_interval(np.zeros((2, 2)), [["class"]], seed=0)
    with pytest.raises(ValueError, match="no figure"):
        bootstrap_interval(np.full(3, np.nan), [["class"]], seed=0)
