"""The classifier: it learns, repeats, leaves nothing behind; and the comparison with and without generated images."""

import json
import random
import statistics
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gait_latents.common.errors import UserError
from gait_latents.evaluation import classifier
from gait_latents.evaluation.classifier import BOTH, REAL, SYNTHETIC, Score, compare, train_and_test, trainings_left

CPU = torch.device("cpu")
SIDE = 16


def coloured(counts: list[int], *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Makes images whose brightest channel is their class, in a shuffled order."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    labels = labels[torch.randperm(len(labels), generator=generator)]
    images = torch.randint(0, 100, (len(labels), SIDE, SIDE, 3), generator=generator)
    images[torch.arange(len(labels)), :, :, labels] += 120
    return images.byte(), labels


def noise(count: int, *, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, SIDE, SIDE, 3), generator=generator).byte()
    return images, torch.randint(0, 2, (count,), generator=generator)


def score_noise(seed: int) -> Score:
    return train_and_test(
        [noise(24, seed=1)], noise(160, seed=2), num_classes=2, num_steps=5, seed=seed, device=CPU, batch_size=8
    )


def test_classes_that_differ_are_learnt_and_the_counts_are_in_label_order():
    steps = []
    score = train_and_test(
        [coloured([9, 9, 9])],
        coloured([4, 0, 7], seed=5),
        num_classes=3,
        num_steps=12,
        seed=0,
        device=CPU,
        batch_size=9,
        progress=lambda: steps.append(1),
    )
    assert score == Score(1.0, (1.0, None, 1.0), ((4, 0, 0), (0, 0, 0), (0, 0, 7)))
    assert len(steps) == 12


@pytest.mark.slow
def test_labels_that_mean_nothing_give_chance_and_the_seed_alone_decides():
    torch.manual_seed(11)
    before = torch.get_rng_state(), random.getstate(), repr(np.random.get_state())
    flags = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    score = score_noise(3)
    after = torch.get_rng_state(), random.getstate(), repr(np.random.get_state())
    assert torch.equal(before[0], after[0]) and before[1:] == after[1:]
    assert flags == (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark)
    truth = noise(160, seed=2)[1]
    assert [sum(row) for row in score.confusion] == torch.bincount(truth).tolist()
    assert score.accuracy == (score.confusion[0][0] + score.confusion[1][1]) / 160
    assert 0.35 < score.accuracy < 0.65  # four standard deviations of chance
    torch.manual_seed(12)
    assert score_noise(3) == score
    assert score_noise(4) != score


def test_a_score_counts_true_classes_in_rows():
    score = classifier._score(torch.tensor([0, 2, 2, 1]), torch.tensor([0, 0, 2, 2]), 3)
    assert score == Score(0.5, (0.5, None, 0.5), ((1, 0, 1), (0, 0, 0), (0, 1, 1)))


def test_images_are_shifted_in_time_and_never_mirrored():
    width = 64
    images = torch.arange(width, dtype=torch.uint8).reshape(1, 1, width, 1).expand(200, 2, width, 3).contiguous()
    shifted = classifier._shift_images(images, torch.Generator().manual_seed(0))
    columns = torch.arange(width)
    shifts = set()
    for image in shifted:
        shift = int(image[0, width // 2, 0]) - width // 2
        expected = (columns + shift).clamp(0, width - 1).byte()
        assert torch.equal(image, expected[None, :, None].expand(2, width, 3))
        shifts.add(shift)
    assert shifts == set(range(-4, 5))


def test_normalisation_is_that_of_the_training_images_with_each_set_weighing_the_same():
    first, second = coloured([5, 1, 2])[0], noise(3, seed=0)[0]
    for sets in ([first], [first, second]):
        rows = [images.double().reshape(-1, 3) for images in sets]
        mean = torch.stack([row.mean(0) for row in rows]).mean(0)
        variance = torch.stack([(row - mean).square().mean(0) for row in rows]).mean(0)
        expected = (first.double() - mean) / variance.sqrt()
        found = classifier._Normalisation.of(sets, CPU)(first)
        assert torch.allclose(found.permute(0, 2, 3, 1).double(), expected, atol=1e-5)
    assert torch.isfinite(classifier._Normalisation.of([torch.zeros_like(first)], CPU)(first)).all()


def test_each_set_has_its_share_of_every_batch_however_large_it_is():
    few, many = noise(3, seed=0)[0], noise(50, seed=1)[0]
    sets = [(few, torch.zeros(3, dtype=torch.int64)), (many, torch.ones(50, dtype=torch.int64))]
    batches = list(classifier._batches(sets, 7, 8, seed=0))
    assert len(batches) == 7
    for images, labels in batches:
        assert images.shape == (8, SIDE, SIDE, 3) and labels.tolist() == [0] * 4 + [1] * 4
    single = torch.cat([labels for _, labels in classifier._batches([(many, torch.arange(50))], 10, 5, seed=0)])
    assert sorted(single.tolist()) == list(range(50))  # one round visits every image once


# --- with and without generated images -----------------------------------------------------------------------


def run(done: dict[str, Any], saved: list[dict[str, Any]], progress: Any = None, **changes: Any) -> dict[str, Any]:
    images = (*coloured([4, 4, 4]), *coloured([6, 6, 6], seed=1), *coloured([2, 3, 4], seed=2))
    settings: dict[str, Any] = {"num_classes": 3, "num_steps": 2, "seeds": [5, 6], "device": CPU, "batch_size": 4}
    return compare(
        *changes.pop("images", images),
        **settings | changes,
        done=done,
        save=lambda scores: saved.append(json.loads(json.dumps(scores))),
        progress=progress,
    )


@pytest.mark.slow
def test_an_interrupted_comparison_goes_on_and_ends_like_an_uninterrupted_one():
    saved: list[dict[str, Any]] = []
    whole = run({}, saved)
    assert len(saved) == 6 and saved[-1] == whole["scores"]
    assert json.loads(json.dumps(whole)) == whole

    steps, kept = [], []

    def stop_in_the_middle() -> None:
        steps.append(1)
        if len(steps) == 5:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        run({}, kept, stop_in_the_middle)
    assert kept == saved[:2]
    assert trainings_left([5, 6], kept[-1]) == [(BOTH, 5), (REAL, 6), (SYNTHETIC, 6), (BOTH, 6)]
    steps.clear()
    assert run(kept[-1], kept, lambda: steps.append(1)) == whole
    assert len(steps) == 2 * 4 and len(kept) == 6
    assert run(whole["scores"], kept, lambda: steps.append(1)) == whole
    assert len(steps) == 2 * 4 and len(kept) == 6

    assert whole["images"] == {"real": 12, "synthetic": 18, "test": 9}
    for figures in whole["sets"].values():
        assert [sum(row) for row in figures["confusion"]] == [4, 6, 8]  # both seeds
        right = sum(row[i] for i, row in enumerate(figures["confusion"]))
        assert figures["mean"] == pytest.approx(right / 18)
    assert whole["scores"][REAL]["5"] == classifier._plain(
        train_and_test(
            [coloured([4, 4, 4])],
            coloured([2, 3, 4], seed=2),
            num_classes=3,
            num_steps=2,
            seed=5,
            device=CPU,
            batch_size=4,
        )
    )


def made_up(accuracies: dict[str, list[float]]) -> dict[str, Any]:
    return {
        name: {
            str(seed): {"accuracy": value, "per_class": [value, value, None], "confusion": [[seed, 0, 1]] * 3}
            for seed, value in enumerate(values)
        }
        for name, values in accuracies.items()
    }


@pytest.mark.parametrize(
    ("real", "both", "verdict", "words"),
    [
        ([0.5, 0.6, 0.5], [0.6, 0.71, 0.6], "helps", "They help: accuracy changes by +10.3 points"),
        ([0.6, 0.71, 0.6], [0.5, 0.6, 0.5], "harms", "They harm"),
        ([0.5, 0.6, 0.5], [0.6, 0.5, 0.6], "open", "No difference that these seeds can show"),
        ([0.5, 0.5], [0.6, 0.8], "open", "95 % interval -107.1 to +147.1, 2 seeds"),
        ([0.5, 0.5], [0.5, 0.5], "open", "No difference"),
        ([0.5], [0.9], "open", "one seed cannot show"),
    ],
)
def test_the_verdict_follows_from_the_interval_of_the_paired_difference(real, both, verdict, words):
    scores = made_up({REAL: real, SYNTHETIC: [0.1] * len(real), BOTH: both})
    found = run(scores, [], seeds=list(range(len(real))))
    difference = found["difference"]
    assert difference["verdict"] == verdict and words in difference["sentence"]
    values = np.array(both) - np.array(real)
    assert difference["per_seed"] == pytest.approx(values) and difference["mean"] == pytest.approx(values.mean())
    if len(real) > 1:
        stats = pytest.importorskip("scipy.stats")
        assert difference["deviation"] == pytest.approx(values.std(ddof=1), abs=1e-12)
        if values.std() > 1e-9:
            expected = stats.ttest_rel(both, real).confidence_interval(0.95)
            assert (difference["low"], difference["high"]) == pytest.approx((expected.low, expected.high))
    else:
        assert difference["deviation"] is difference["low"] is difference["high"] is None
    assert found["sets"][BOTH]["per_class"] == [pytest.approx(np.mean(both)), pytest.approx(np.mean(both)), None]
    assert found["sets"][BOTH]["confusion"] == [[sum(range(len(real))), 0, len(real)]] * 3


@pytest.mark.parametrize(("num_seeds", "quantile"), [(2, 12.7062), (3, 4.30265), (5, 2.77645), (10, 2.26216)])
def test_the_interval_is_that_of_student(num_seeds, quantile):
    """The quantiles are those of printed tables."""
    changes = [0.01 * (-1) ** seed for seed in range(num_seeds)]
    scores = {
        REAL: {str(seed): {"accuracy": 0.5} for seed in range(num_seeds)},
        BOTH: {str(seed): {"accuracy": 0.5 + change} for seed, change in enumerate(changes)},
    }
    found = classifier._difference(scores, range(num_seeds))
    reach = quantile * statistics.stdev(changes) / num_seeds**0.5
    assert found["high"] - found["mean"] == pytest.approx(reach, rel=1e-5)
    assert found["mean"] - found["low"] == pytest.approx(reach, rel=1e-5)


def test_a_class_without_images_is_refused_by_its_name():
    real, synthetic, test = coloured([4, 4, 4]), coloured([6, 0, 6]), coloured([2, 2, 2])
    with pytest.raises(UserError, match=r"no synthetic images of class ID_2; .*generate some"):
        run({}, [], images=(*real, *synthetic, *test), class_names=["ID_1", "ID_2", "ID_10"])
    with pytest.raises(UserError, match="no real images of class 1; "):
        run({}, [], images=(*synthetic, *real, *test))
    with pytest.raises(UserError, match="needs test images"):
        run({}, [], images=(*real, *real, *coloured([0, 0, 0])))


def test_the_logits_are_those_of_the_score_and_an_augmentation_takes_the_place_of_the_shift():
    train, test = coloured([6, 6, 6]), coloured([5, 5, 5], seed=5)
    size: dict[str, Any] = {"num_classes": 3, "num_steps": 4, "seed": 1, "device": CPU, "batch_size": 6}
    logits = classifier.train_and_classify([train], test[0], **size)
    assert logits.shape == (15, 3)
    assert classifier._score(logits.argmax(1), test[1], 3) == train_and_test([train], test, **size)
    seen = []

    def as_they_are(images: Tensor, targets: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        seen.append(targets)
        return images.float(), targets

    other = classifier.train_and_classify([train], test[0], **size, augment=as_they_are)
    assert len(seen) == 4 and all(targets.shape == (6, 3) and (targets.sum(1) == 1).all() for targets in seen)
    assert not torch.equal(other, logits)
    slower = classifier.train_and_classify([train], test[0], **size, augment=as_they_are, learning_rate=1e-4)
    assert not torch.equal(other, slower)
