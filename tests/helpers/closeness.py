"""Pixels and latents for the tests of VAEs, and how near two tensors are."""

import torch

IMAGES = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
LATENTS = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(2))


def assert_close(actual, expected, tolerance=1e-4):
    """Asserts equal shapes and a largest absolute difference below a tolerance times the largest value."""
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()
