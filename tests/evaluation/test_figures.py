"""The figures of a report on sets whose answer is known: equal ones, copies, shifted ones."""

import math

import pytest
import torch

from gait_latents.evaluation.distances import Projection, coverage, frechet_distance, kernel_distance, nearest_moved
from gait_latents.evaluation.figures import NUM_PAIRS, Points, closeness, match_counts, memorisation, recognition

NUM_CLASSES = 3


def draw(seed: int, per_class: int, *, shift: float = 0.0, spread: float = 1.0) -> Points:
    """Draws latents [N 2 3 3] of classes that lie 2 apart from each other in every direction."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(NUM_CLASSES).repeat_interleave(per_class)
    noise = torch.randn(len(labels), 2, 3, 3, generator=generator)
    return Points(spread * noise + 2 * labels[:, None, None, None] + shift, labels)


def compare(synthetic: Points, training: Points, test: Points, **changes: object) -> dict:
    facts = {"neighbours": 3, "seed": 0, "num_directions": 16, **changes}
    return closeness(synthetic, training, test, **facts)  # type: ignore[arg-type]


TRAINING, TEST = draw(0, 20), draw(1, 15)


# --- equally many ------------------------------------------------------------------------------------------


def test_matched_sets_have_equally_many_of_each_class_and_only_points_of_their_own():
    first = draw(5, 9).take(torch.arange(25))  # 9, 9, 7
    second = draw(6, 8).take(torch.arange(8, 24))  # 0, 8, 8
    one, two = match_counts(first, second, seed=0)
    assert one.labels.tolist() == two.labels.tolist() == [1] * 8 + [2] * 7
    for points, source in ((one, first), (two, second)):
        rows = [int((source.points == point).flatten(1).all(1).nonzero()[0, 0]) for point in points.points]
        assert len(set(rows)) == 15 and [source.labels[row] for row in rows] == points.labels.tolist()
    again = match_counts(first, second, seed=0)[0]
    assert torch.equal(again.points, one.points)
    assert not torch.equal(match_counts(first, second, seed=1)[0].points, one.points)


# --- how close ---------------------------------------------------------------------------------------------


def test_the_figures_are_those_of_the_metrics_on_what_was_matched():
    synthetic = draw(2, 12, shift=0.3)
    found = compare(synthetic, TRAINING, TEST)
    assert (found["images"], found["test_images"], found["directions"]) == (36, 45, 16)
    assert found["directions_per_class"] == 11 and found["subset_size"] == 18
    own, yardstick = match_counts(synthetic, TRAINING, seed=0)
    projection = Projection.fit(TEST.points, 16)
    for name, points in (("synthetic", own), ("training", yardstick)):
        figures = found[name]
        assert figures["frechet"] == frechet_distance(projection(points.points), projection(TEST.points))
        assert {name: figures[name] for name in ("precision", "recall", "density", "coverage")} == vars(
            coverage(TEST.points, points.points, neighbours=3)
        )
        whole = kernel_distance(points.points, TEST.points)
        assert figures["kernel"] == pytest.approx(whole, abs=figures["kernel_deviation"])
        for label in range(NUM_CLASSES):
            expected = kernel_distance(points.of(label), TEST.of(label))
            assert figures["kernel_per_class"][label] == pytest.approx(expected)
            few = projection.leading(11)
            expected = frechet_distance(few(points.of(label)), few(TEST.of(label)))
            assert figures["frechet_per_class"][label] == pytest.approx(expected)
        assert figures["frechet_mean"] == pytest.approx(sum(figures["frechet_per_class"].values()) / 3)
    assert found["synthetic"]["frechet"] > 1.2 * found["training"]["frechet"]
    assert found["synthetic"]["kernel_mean"] > found["training"]["kernel_mean"]


def test_images_from_the_same_source_are_as_close_as_the_yardstick():
    found = compare(draw(3, 20), TRAINING, TEST)
    assert found["synthetic"]["frechet_mean"] == pytest.approx(found["training"]["frechet_mean"], rel=0.15)
    assert abs(found["synthetic"]["kernel"]) < 2 * found["synthetic"]["kernel_deviation"]


def test_a_class_that_is_missing_is_missing_in_the_yardstick_and_in_the_test_images_too():
    synthetic = draw(2, 12)
    found = compare(synthetic.take(synthetic.labels != 1), TRAINING, TEST)
    assert (found["images"], found["test_images"]) == (24, 30)
    assert list(found["training"]["frechet_per_class"]) == list(found["synthetic"]["kernel_per_class"]) == [0, 2]
    only = [points.take(points.labels != 1) for points in (synthetic, TRAINING, TEST)]
    assert found == compare(*only)


def test_a_class_without_test_images_is_left_out_of_what_is_compared_with_them():
    synthetic, in_test = draw(2, 12), torch.arange(30)  # of the classes 0 and 1
    found = compare(synthetic, TRAINING, TEST.take(in_test))
    assert found == compare(synthetic.take(torch.arange(24)), TRAINING, TEST.take(in_test))
    assert (found["images"], found["test_images"]) == (24, 30)
    nothing_in_common = compare(synthetic.take(torch.arange(12)), TRAINING, TEST.take(in_test[15:]))
    assert nothing_in_common["images"] == 0 and nothing_in_common["synthetic"]["frechet"] is None


def test_what_too_few_images_cannot_say_is_none():
    few = draw(2, 2)
    found = compare(few, TRAINING, TEST, neighbours=6)
    assert found["directions"] == 5 and found["directions_per_class"] is None
    for name in ("synthetic", "training"):
        assert found[name]["frechet"] > 0 and found[name]["frechet_mean"] is None
        assert found[name]["frechet_per_class"] == found[name]["kernel_per_class"] == {}
        assert found[name]["precision"] is None and found[name]["coverage"] is None
    one = compare(draw(2, 1), TRAINING, TEST)["synthetic"]
    assert one["frechet"] is None and one["kernel"] is None


def test_features_are_compared_as_they_are():
    found = compare(draw(2, 12), TRAINING, TEST, num_directions=None)
    own, _ = match_counts(draw(2, 12), TRAINING, seed=0)
    assert found["directions"] is None
    assert found["synthetic"]["frechet"] == pytest.approx(frechet_distance(own.points, TEST.points))


def test_recognition_counts_those_nearest_to_the_mean_of_their_class():
    assert recognition(draw(4, 30, spread=0.1), TRAINING) == 1.0
    shifted = draw(4, 10, spread=0.1, shift=2.0)  # every class lies where the next one is
    assert recognition(shifted, TRAINING) == pytest.approx(1 / 3)
    without = TRAINING.take(TRAINING.labels != 0)
    assert recognition(draw(4, 10, spread=0.1).take(torch.arange(10, 30)), without) == 1.0


# --- copies ------------------------------------------------------------------------------------------------


def test_copies_are_found():
    copies = Points(TRAINING.points + 1e-3, TRAINING.labels)
    found = memorisation(copies, TRAINING, TEST, seed=0)
    assert found["near_share"] == 1.0 and found["nearer_to_training"] > 0.6
    assert found["nearer_to_training"] > found["nearer_to_training_limit"]
    assert found["median"] == pytest.approx(1e-3 * 18**0.5, rel=1e-3) and found["test_median"] > 100 * found["median"]
    assert all(i == j for i, j, _ in found["pairs"]) and len(found["pairs"]) == NUM_PAIRS


def test_fresh_images_are_as_far_as_test_images_are():
    found = memorisation(draw(7, 200), TRAINING, TEST, seed=0)
    assert len(found["distances"]) == 600 and len(found["test_distances"]) == 45
    near = sum(value < found["threshold"] for value in found["test_distances"])
    assert near == 2 == math.floor(found["test_near_share"] * 46)  # below it lie 5 % of unseen ones, not of these
    assert found["near_share"] < found["near_share_limit"] < 0.15
    assert abs(found["nearer_to_training"] - 0.5) < 0.1
    assert found["median"] == pytest.approx(found["test_median"], rel=0.1)
    shares = [figures["near_share"] for figures in found["per_class"].values()]
    assert sum(shares) / 3 == pytest.approx(found["near_share"])


def test_the_closest_pairs_come_first_and_name_their_images():
    synthetic = draw(8, 4)
    synthetic.points[5] = TRAINING.points[33] + 0.01
    synthetic.points[2] = TRAINING.points[7]
    found = memorisation(synthetic, TRAINING, TEST, seed=0)
    assert [pair[:2] for pair in found["pairs"][:2]] == [(2, 7), (5, 33)]
    values = [value for _, _, value in found["pairs"]]
    assert values == sorted(values) and values[0] == 0.0
    i, j, value = found["pairs"][3]
    alone = nearest_moved(synthetic.points[i : i + 1], TRAINING.points[j : j + 1], largest_shift=1)[0]
    assert value == pytest.approx(float(alone), rel=1e-5)


def pictures(seed: int, count: int) -> Points:
    """Returns latents [n 2 4 16] of three classes that are noise, blurred along the width as signals are."""
    noise = torch.randn(3 * count, 2, 4, 20, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return Points(noise.unfold(-1, 5, 1).mean(-1), torch.arange(3).repeat_interleave(count))


def test_copies_that_were_moved_are_copies():
    training, test, fresh = pictures(0, 20), pictures(1, 15), pictures(2, 15)
    moved = Points(training.points.roll(3, -1), training.labels)
    moved.points[..., :3] = moved.points[..., 3:4]  # the edge repeated, as a model may do that saw it so
    found, unseen = (memorisation(points, training, test, seed=0) for points in (moved, fresh))
    assert found["near_share"] == 1.0 and found["copying"] < -4.9 and found["median"] < 1e-9
    assert all(i == j for i, j, _ in found["pairs"])
    assert [figures["copying"] < -3 for figures in found["per_class"].values()] == [True] * 3
    assert unseen["near_share"] <= unseen["near_share_limit"] and abs(unseen["copying"]) < 3


def test_the_share_of_fresh_images_that_are_near_is_that_expected_whatever_the_number_of_test_images():
    for per_class, expected in ((4, 1 / 13), (10, 0.05), (40, 0.05)):
        shares = [memorisation(draw(100 + i, 20), TRAINING, draw(500 + i, per_class), seed=0) for i in range(60)]
        assert {round(found["test_near_share"], 6) for found in shares} == {round(expected, 6)}
        values = torch.tensor([found["near_share"] for found in shares])
        assert float(values.mean()) == pytest.approx(expected, abs=3 * float(values.std()) / 60**0.5)
        assert sum(found["near_share"] > found["near_share_limit"] for found in shares) <= 6


def test_classes_that_are_tighter_or_have_more_samples_do_not_pass_for_copies():
    tight = torch.tensor([0.02, 1.0, 1.0])
    training, test, fresh = (
        Points(points.points * tight[points.labels].reshape(-1, *[1] * (points.points.dim() - 1)), points.labels)
        for points in (draw(20, 20), draw(21, 30), draw(22, 60))
    )
    untested = test.take(test.labels != 0)
    found = memorisation(fresh, training, untested, seed=0)
    assert found["near_share"] < found["near_share_limit"] and found["per_class"][0]["near_share"] is None
    others = fresh.take(fresh.labels != 0)
    alone = memorisation(others, training, untested, seed=0)
    assert found["near_share"] == alone["near_share"] and found["threshold"] == alone["threshold"]
    filled = fresh.take((fresh.labels == 0) | (torch.arange(len(fresh)) % 20 == 0))  # 60, 3 and 3
    found = memorisation(filled, training, test, seed=0)
    assert found["near_share"] < found["near_share_limit"]
    none = memorisation(others.take(others.labels == 1), training, untested.take(untested.labels == 2), seed=0)
    assert set(none) == {"distances", "median", "pairs"}


def test_copies_are_found_where_test_images_are_copies_too():
    test = Points(TEST.points.clone(), TEST.labels)
    test.points[:5] = TRAINING.points[:5]
    found = memorisation(TRAINING, TRAINING, test, seed=0)
    assert found["threshold"] == 0.0 and found["near_share"] == 1.0


def test_without_test_images_there_are_distances_and_no_verdict():
    nothing = TEST.take(torch.zeros(0, dtype=torch.long))
    assert set(memorisation(draw(8, 4), TRAINING, nothing, seed=0)) == {"distances", "median", "pairs"}
    partly = memorisation(draw(8, 4), TRAINING, TEST.take(TEST.labels == 0), seed=0)
    assert partly["per_class"][1]["test_median"] is None and partly["per_class"][0]["test_median"] > 0
