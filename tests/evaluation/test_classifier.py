"""The classifier: it learns, repeats, and leaves nothing behind."""

import random
from typing import Any

import numpy as np
import pytest
import torch
from tiny_images import coloured
from torch import Tensor

from gait_latents.evaluation import classifier
from gait_latents.evaluation.augmentation import Augmentation
from gait_latents.evaluation.classifier import train_and_classify, train_features
from gait_latents.evaluation.comparison import score

CPU = torch.device("cpu")
SIDE = 16


def noise(count: int, *, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, SIDE, SIDE, 3), generator=generator).byte()
    return images, torch.randint(0, 2, (count,), generator=generator)


def as_they_are(images: Tensor, targets: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    return images, targets


def classify(*sets: tuple[Tensor, Tensor], test: Tensor, **changes: Any) -> Tensor:
    settings: dict[str, Any] = {
        "num_classes": 3,
        "num_steps": 4,
        "seed": 1,
        "device": CPU,
        "batch_size": 6,
        "learning_rate": 2e-3,
        "augment": Augmentation(),
    }
    return train_and_classify(sets, test, **settings | changes)


def classify_noise(seed: int) -> Tensor:
    size = {"num_classes": 2, "num_steps": 5, "batch_size": 8}
    return classify(noise(24, seed=1), test=noise(160, seed=2)[0], seed=seed, **size)


@pytest.mark.parametrize("number_format", [torch.float32, torch.bfloat16])
def test_classes_that_differ_are_learnt(number_format):
    steps, (test, labels) = [], coloured([4, 0, 7], seed=5)
    augment = Augmentation(mixup=0)
    how = {"num_steps": 14, "batch_size": 9, "augment": augment, "number_format": number_format}
    logits = classify(coloured([9, 9, 9]), test=test, **how, progress=lambda: steps.append(1))
    assert logits.dtype == torch.float32 and logits.shape == (11, 3) and torch.equal(logits.argmax(1), labels)
    assert len(steps) == 14


def test_a_classifier_may_begin_with_what_another_has_learnt_and_never_sees_its_last_layer():
    how: dict[str, Any] = {"seed": 3, "device": CPU, "learning_rate": 2e-3, "augment": as_they_are, "batch_size": 6}
    few, (test, labels) = coloured([1, 1, 1]), coloured([4, 4, 4], seed=5)
    pixels, names = coloured([9, 9, 9], seed=2)
    features = train_features((pixels, names + 1), num_steps=14, **how)  # four classes, one of them without images
    assert features and all(not name.startswith("fc.") and value.device == CPU for name, value in features.items())
    kept = {name: value.clone() for name, value in features.items()}
    known = classify(few, test=test, num_steps=3, begin_with=features)
    unknown = classify(few, test=test, num_steps=3)
    loss = torch.nn.functional.cross_entropy
    assert loss(known, labels) < loss(unknown, labels)
    assert all(torch.equal(features[name], value) for name, value in kept.items())


@pytest.mark.slow
def test_labels_that_mean_nothing_give_chance_and_the_seed_alone_decides():
    torch.manual_seed(11)
    before = torch.get_rng_state(), random.getstate(), repr(np.random.get_state())
    flags = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    logits = classify_noise(3)
    after = torch.get_rng_state(), random.getstate(), repr(np.random.get_state())
    assert torch.equal(before[0], after[0]) and before[1:] == after[1:]
    assert flags == (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark)
    accuracy = float((logits.argmax(1) == noise(160, seed=2)[1]).double().mean())
    assert 0.35 < accuracy < 0.65  # four standard deviations of chance
    torch.manual_seed(12)
    assert torch.equal(classify_noise(3), logits)
    assert not torch.equal(classify_noise(4), logits)


def test_a_score_counts_true_classes_in_rows():
    logits = torch.eye(3)[[0, 2, 2, 1]]
    found = score(logits, torch.tensor([0, 0, 2, 2]))
    assert found["accuracy"] == 0.5 and found["per_class"] == [0.5, None, 0.5]
    assert found["confusion"] == [[1, 0, 1], [0, 0, 0], [0, 1, 1]]


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
    batches = list(classifier._batches(sets, 7, 8, 0, as_they_are))
    assert len(batches) == 7
    for images, labels in batches:
        assert images.shape == (8, SIDE, SIDE, 3) and labels.tolist() == [0] * 4 + [1] * 4
    single = torch.cat([labels for _, labels in classifier._batches([(many, torch.arange(50))], 10, 5, 0, as_they_are)])
    assert sorted(single.tolist()) == list(range(50))  # one round visits every image once


def test_targets_are_probabilities_and_rate_width_and_augmentation_matter():
    train, test = coloured([6, 6, 6]), coloured([5, 5, 5], seed=5)[0]
    seen = []

    def note(images: Tensor, targets: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        seen.append(targets)
        return images.float(), targets

    logits = classify(train, test=test, augment=note)
    assert len(seen) == 4 and all(targets.shape == (6, 3) and (targets.sum(1) == 1).all() for targets in seen)
    assert torch.equal(logits, classify(train, test=test, augment=as_they_are))
    for change in ({}, {"augment": note, "learning_rate": 1e-4}, {"augment": note, "width": 32}):
        assert not torch.equal(logits, classify(train, test=test, **change))


def test_of_the_usual_width_it_is_the_resnet_18_of_torchvision():
    from torchvision.models import resnet18

    ours, theirs = classifier._build(31, 64, 0, 64), resnet18(num_classes=31)
    assert {n: p.shape for n, p in ours.named_parameters()} == {n: p.shape for n, p in theirs.named_parameters()}
    narrow = classifier._build(31, 64, 0, 32)
    ratio = sum(p.numel() for p in narrow.parameters()) / sum(p.numel() for p in theirs.parameters())
    assert 0.2 < ratio < 0.3
