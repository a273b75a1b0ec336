"""The augmentations: each does what it says within its limits, by its own draws, and nothing at strength 0."""

import numpy as np
import pytest
import torch
from scipy import stats

from gait_latents.evaluation.augmentation import Augmentation, band, beta, mix, shift

NOTHING = Augmentation().scaled(0)
SIDE = 32


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def some_images(count: int) -> torch.Tensor:
    return torch.randint(0, 256, (count, SIDE, SIDE, 3), generator=generator(9)).byte()


def test_nothing_changes_at_strength_zero_and_all_changes_repeat_with_the_generator():
    images, targets = some_images(6), torch.eye(6)
    same, own = NOTHING(images, targets, generator())
    assert torch.equal(same, images.float()) and torch.equal(own, targets)
    changed, mixed = Augmentation()(images, targets, generator(1))
    again = Augmentation()(images, targets, generator(1))
    assert torch.equal(changed, again[0]) and torch.equal(mixed, again[1])
    assert changed.shape == images.shape and changed.dtype == torch.float32
    assert (changed != images).flatten(1).any(1).all()
    assert Augmentation().scaled(0.5).noise == Augmentation().noise / 2


@pytest.mark.parametrize("dim", [1, 2])
def test_a_shift_moves_by_whole_places_up_to_its_share_and_repeats_the_edge(dim):
    images = some_images(200)
    moved = shift(images, 1 / 8, dim=dim, generator=generator())
    seen = set()
    for image, found in zip(images.numpy(), moved.numpy(), strict=True):
        for places in range(-4, 5):
            padded = np.pad(image, [(4, 4) if axis == dim - 1 else (0, 0) for axis in range(3)], mode="edge")
            expected = np.take(padded, np.arange(SIDE) + 4 + places, axis=dim - 1)
            if np.array_equal(expected, found):
                seen.add(places)
                break
        else:
            raise AssertionError("moved by no whole number of places")
    assert seen == set(range(-4, 5))


@pytest.mark.parametrize("dim", [1, 2])
def test_a_band_is_one_piece_of_any_width_up_to_its_share_and_lies_anywhere(dim):
    images = some_images(3000)
    inside = band(images, 1 / 4, dim=dim, generator=generator()).squeeze()  # B S
    widths = inside.sum(1)
    assert (torch.bincount(widths) / 3000 - 1 / 9).abs().max() < 0.03 and len(torch.bincount(widths)) == 9
    edges = torch.nn.functional.pad(inside.int(), (1, 1)).diff(dim=1).abs().sum(1)
    assert torch.equal(edges, torch.where(widths > 0, 2, 0))
    assert inside.any(0).all()


def test_a_mask_takes_the_mean_colour_of_the_image_in_whole_columns():
    images = some_images(50)
    changed, _ = Augmentation(**{**vars(NOTHING), "time_mask": 1 / 4})(images, torch.eye(50), generator(2))
    columns = (changed != images).any(3).any(1)  # B S
    assert 0 < columns.sum(1).max() <= SIDE / 4
    for image, found, masked in zip(images.double(), changed.double(), columns, strict=True):
        colour = image.mean((0, 1))
        assert torch.allclose(found[:, masked], colour.expand(SIDE, int(masked.sum()), 3), atol=1e-3)


def test_noise_has_its_deviation():
    images = some_images(20)
    changed, _ = Augmentation(**{**vars(NOTHING), "noise": 7.0})(images, torch.eye(20), generator(3))
    difference = (changed - images).double()
    assert difference.std().item() == pytest.approx(7, rel=0.02) and abs(difference.mean().item()) < 0.1


def test_mixed_images_have_mixed_targets():
    images, targets = torch.zeros(64, 2, 2, 3), torch.eye(64)
    images[torch.arange(64), 0, 0, 0] = torch.arange(64.0)  # whose value tells which image it was
    mixed, shares = mix(images, targets, 0.4, generator(4))
    assert torch.allclose(shares.sum(1), torch.ones(64))
    assert torch.allclose(mixed[:, 0, 0, 0], shares @ torch.arange(64.0), atol=1e-4)
    assert (shares > 0).sum(1).max() == 2 and ((shares > 0.05) & (shares < 0.95)).any()


@pytest.mark.parametrize("alpha", [0.1, 0.4, 1.0])
def test_shares_are_of_the_beta_distribution(alpha):
    found = beta(alpha, 4000, generator(5)).numpy()
    assert found.shape == (4000,) and found.min() >= 0 and found.max() <= 1
    # Compared within (0, 1), as for small alpha most shares round to an end of it.
    inner = np.linspace(0.02, 0.98, 25)
    shares = (found[:, None] <= inner).mean(0)
    assert np.abs(shares - stats.beta(alpha, alpha).cdf(inner)).max() < 0.03
