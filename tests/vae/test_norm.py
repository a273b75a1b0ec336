"""LatentNorm against closed forms in float64, and its errors."""

import json
import math

import pytest
import torch
from properties import given, settings, st

from gait_latents.common.errors import UserError
from gait_latents.vae import norm as norm_module
from gait_latents.vae.norm import LatentNorm

MEANS = (0.5, -3.0, 20.0)
MEAN_SPREADS = (2.0, 0.3, 5.0)
POSTERIOR_STDS = (0.1, 1.5, 0.02)


def synthetic_moments(count: int = 64, size: int = 16, seed: int = 0) -> torch.Tensor:
    """Three channels whose spread comes from the means, from the posterior, and from means far off zero."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, 3, size, size, generator=generator)
    mean = torch.tensor(MEANS)[:, None, None] + torch.tensor(MEAN_SPREADS)[:, None, None] * noise
    logvar = 2 * torch.tensor(POSTERIOR_STDS).log()[:, None, None].expand_as(mean)
    return torch.cat([mean, logvar], dim=1)


def test_shift_and_scale_are_the_mean_and_total_deviation_of_each_channel():
    moments = synthetic_moments()
    norm = LatentNorm.from_moments(moments)
    for channel in range(3):
        values = moments[:, channel].double().flatten().tolist()
        logvars = moments[:, 3 + channel].double().flatten().tolist()
        mean = math.fsum(values) / len(values)
        variance = math.fsum((value - mean) ** 2 for value in values) / len(values)
        posterior = math.fsum(map(math.exp, logvars)) / len(logvars)
        assert norm.shift[channel].item() == pytest.approx(mean, rel=1e-6)
        assert norm.scale[channel].item() == pytest.approx(math.sqrt(variance + posterior), rel=1e-6)


def test_accumulation_survives_what_float32_would_lose():
    half = 3000 * torch.randn(16, 1, 16, 16, generator=torch.Generator().manual_seed(2))
    values = torch.cat([half, 0.1 - half])  # a mean far below the values that make it
    norm = LatentNorm.from_moments(torch.cat([values, torch.full_like(values, -20.0)], dim=1))
    exact = values.double().flatten().tolist()
    mean = math.fsum(exact) / len(exact)
    assert norm.shift.item() == pytest.approx(mean, rel=1e-7)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in exact) / len(exact) + math.exp(-20))
    assert norm.scale.item() == pytest.approx(deviation, rel=1e-7)


def test_drawn_latents_have_unit_variance_in_every_channel():
    moments = synthetic_moments()
    noise = torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    latents = LatentNorm.from_moments(moments).to_latent(moments, noise)
    assert latents.dtype == torch.float32
    torch.testing.assert_close(latents.mean(dim=(0, 2, 3)), torch.zeros(3), atol=0.03, rtol=0)
    torch.testing.assert_close(latents.std(dim=(0, 2, 3)), torch.ones(3), atol=0.03, rtol=0)


def test_a_latent_is_the_normalised_draw():
    norm = LatentNorm(torch.tensor([1.0, -2.0]), torch.tensor([0.5, 4.0]))
    moments = torch.tensor([3.0, 6.0, math.log(4.0), math.log(0.25)])[None, :, None, None]
    latent = norm.to_latent(moments, torch.tensor([1.5, -2.0])[None, :, None, None])
    expected = torch.tensor([(3 + 2 * 1.5 - 1) / 0.5, (6 + 0.5 * -2.0 + 2) / 4])
    torch.testing.assert_close(latent.flatten(), expected)
    torch.testing.assert_close(norm.mean_latent(moments).flatten(), torch.tensor([4.0, 2.0]))


def test_half_precision_moments_are_drawn_from_in_float32():
    norm = LatentNorm.from_moments(synthetic_moments())
    halves, noise = synthetic_moments(4).half(), torch.randn(4, 3, 16, 16)
    latents = norm.to_latent(halves, noise)
    assert latents.dtype == torch.float32
    assert torch.equal(latents, norm.to_latent(halves.float(), noise))


def test_one_image_and_a_batch_are_treated_alike():
    norm, moments = LatentNorm.from_moments(synthetic_moments()), synthetic_moments(4)
    noise = torch.randn(4, 3, 16, 16)
    assert torch.equal(norm.to_latent(moments[2], noise[2]), norm.to_latent(moments, noise)[2])


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.floats(-100, 100, width=32), st.floats(2.0**-10, 2.0**10, width=32)), min_size=1, max_size=16)
)
def test_to_unscaled_undoes_the_normalisation(channels):
    shift, scale = (torch.tensor(numbers, dtype=torch.float32) for numbers in zip(*channels, strict=True))
    norm = LatentNorm(shift, scale)
    unscaled = shift[:, None, None] + scale[:, None, None] * torch.linspace(-4, 4, 9).reshape(1, 1, 3, 3)
    moments = torch.cat([unscaled, torch.full_like(unscaled, -30.0)], dim=1)
    size = shift.abs()[:, None, None] + scale[:, None, None]
    error = (norm.to_unscaled(norm.mean_latent(moments)) - unscaled).abs() / size
    assert error.max() < 1e-6


@given(st.lists(st.floats(2.0**-126, 2.0**100, width=32), min_size=1, max_size=4))
def test_json_keeps_every_bit(scales):
    norm = LatentNorm(torch.tensor([1 / 3] * len(scales)), torch.tensor(scales, dtype=torch.float32))
    back = LatentNorm.from_json(json.loads(json.dumps(norm.to_json())))
    assert torch.equal(back.shift, norm.shift)
    assert torch.equal(back.scale, norm.scale)


@pytest.mark.parametrize(
    "plain",
    [
        {"shift": [0.0], "scale": [0.0]},
        {"shift": [0.0], "scale": [-1.0]},
        {"shift": [math.nan], "scale": [1.0]},
        {"shift": [0.0], "scale": [math.inf]},
        {"shift": [0.0, 1.0], "scale": [1.0]},
        {"shift": 0.0, "scale": 1.0},
    ],
)
def test_numbers_that_cannot_be_a_normalisation_are_refused(plain):
    with pytest.raises(ValueError):
        LatentNorm.from_json(plain)


def test_the_vae_constants_multiply_the_shifted_latent():
    norm = LatentNorm.from_scale_factor(2, 0.3611, 0.1159)
    unscaled = torch.randn(3, 2, 4, 4)
    moments = torch.cat([unscaled, torch.full_like(unscaled, -30.0)], dim=1)
    torch.testing.assert_close(norm.mean_latent(moments), (unscaled - 0.1159) * 0.3611)


@pytest.mark.parametrize(("scale_factor", "shift_factor"), [(0.0, 0.0), (-1.0, 0.0), (math.nan, 0.0), (1.0, math.inf)])
def test_useless_vae_constants_are_told(scale_factor, shift_factor):
    with pytest.raises(UserError, match="scale_factor"):
        LatentNorm.from_scale_factor(4, scale_factor, shift_factor)


def test_a_channel_that_only_its_posterior_spreads_is_no_error():
    moments = synthetic_moments()
    moments[:, 0], moments[:, 3] = 0.0, 0.0
    assert LatentNorm.from_moments(moments).scale[0] == 1


def test_the_spread_is_that_of_draws_over_all_channels():
    moments = synthetic_moments()
    mean, logvar = moments.chunk(2, dim=1)
    noise = torch.randn(200, *mean.shape, generator=torch.Generator().manual_seed(0))
    draws = mean + torch.exp(0.5 * logvar) * noise
    assert norm_module.spread(moments) == pytest.approx(float(draws.std()), rel=0.01)
    centred = LatentNorm.from_scale_factor(mean.shape[1], 1 / norm_module.spread(moments), 0.3)
    assert norm_module.spread(torch.cat([centred.mean_latent(moments), logvar - 200], dim=1)) < 1.01


@pytest.mark.parametrize("shape", [(2, 3, 4, 4), (2, 6, 4), (0, 6, 4, 4)])
def test_moments_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match="moments must be"):
        LatentNorm.from_moments(torch.zeros(shape))


def test_another_number_of_channels_does_not_broadcast():
    norm = LatentNorm.from_scale_factor(1, 1.0, 0.0)
    for call in (norm.to_unscaled, norm.mean_latent):
        with pytest.raises(ValueError, match="channels"):
            call(torch.zeros(2, 4, 8, 8))


def test_shift_and_scale_must_be_float32_vectors_of_one_length():
    with pytest.raises(ValueError, match="float32"):
        LatentNorm(torch.zeros(2).double(), torch.ones(2))
    with pytest.raises(ValueError, match="not both"):
        LatentNorm(torch.zeros(2), torch.ones(3))


def test_to_moves_both_numbers():
    moved = LatentNorm.from_scale_factor(2, 0.5, 1.0).to("meta")
    assert moved.shift.device.type == moved.scale.device.type == "meta"
