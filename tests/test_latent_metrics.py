"""Fréchet distance against its closed form and against scipy's matrix square root."""

import math

import pytest
import torch

from latent_metrics import Projection, frechet_distance, frechet_per_class


def normal(seed: int, count: int, size: int) -> torch.Tensor:
    return torch.randn(count, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_a_shift_costs_its_squared_length():
    points = normal(0, 50, 3)
    assert frechet_distance(points, points + torch.tensor([3.0, 4.0, 0.0])) == pytest.approx(25.0, abs=1e-9)


def test_in_one_dimension_it_is_the_closed_form():
    first, second = normal(0, 40, 1), 3 * normal(1, 60, 1) + 2
    expected = (first.mean() - second.mean()) ** 2 + (first.std() - second.std()) ** 2
    assert frechet_distance(first, second) == pytest.approx(float(expected), abs=1e-9)


def test_it_equals_the_formula_with_scipys_matrix_square_root():
    linalg = pytest.importorskip("scipy.linalg")
    first, second = normal(0, 80, 5), normal(1, 70, 5) @ normal(2, 5, 5)
    one, two = torch.cov(first.T).numpy(), torch.cov(second.T).numpy()
    cross = linalg.sqrtm(one @ two).real.trace()
    expected = float((first.mean(0) - second.mean(0)).square().sum()) + one.trace() + two.trace() - 2 * cross
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-8)


def test_fewer_points_than_dimensions_still_give_a_finite_distance():
    distance = frechet_distance(normal(0, 4, 10), normal(1, 5, 10))
    assert math.isfinite(distance)
    assert distance > 0


def test_the_projection_keeps_the_variance_of_its_directions():
    latents = normal(0, 200, 6) * torch.tensor([5.0, 3.0, 1.0, 0.1, 0.1, 0.1])
    kept = Projection.fit(latents.reshape(200, 2, 3), 2)(latents)
    assert kept.shape == (200, 2)
    assert kept.var(0).sum() == pytest.approx(float(torch.linalg.eigvalsh(torch.cov(latents.T))[-2:].sum()), rel=1e-9)


def test_each_class_is_compared_with_its_own():
    real, labels = normal(0, 100, 4), torch.arange(2).repeat(50)
    samples = real + 10.0 * (labels == 1)[:, None]
    projection = Projection.fit(real, 4)
    near, far = frechet_per_class(samples, labels, real, labels, projection)
    assert near == pytest.approx(0.0, abs=1e-6)
    assert far == pytest.approx(400.0, rel=1e-6)
