"""How far generated latents are from real ones: Fréchet distance in a few principal directions. Torch only."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Projection:
    """The leading principal directions of a set of latents: a few coordinates instead of thousands of pixels."""

    mean: Tensor  # D, float64
    directions: Tensor  # D K, float64

    @classmethod
    def fit(cls, latents: Tensor, num_directions: int) -> "Projection":
        """Finds the directions of largest variance of latents [N ...]; at most N - 1 of them mean anything."""
        flat = latents.flatten(1).double()
        mean = flat.mean(0)
        _, _, directions = torch.linalg.svd(flat - mean, full_matrices=False)
        return cls(mean, directions[: min(num_directions, len(flat) - 1)].T)

    def __call__(self, latents: Tensor) -> Tensor:
        """Returns the coordinates [N K] of latents [N ...]."""
        return (latents.flatten(1).double() - self.mean) @ self.directions


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """Returns the Fréchet distance between normal distributions fitted to two sets of points [N K] and [M K].

    |m1 - m2|^2 + tr(C1 + C2 - 2 (C1^(1/2) C2 C1^(1/2))^(1/2)), Dowson & Landau 1982; squared units of the points.
    """
    first, second = first.double(), second.double()
    mean_term = (first.mean(0) - second.mean(0)).square().sum()
    one, two = torch.atleast_2d(torch.cov(first.T)), torch.atleast_2d(torch.cov(second.T))
    root = _sqrt(one)
    cross = torch.linalg.eigvalsh(root @ two @ root).clamp(min=0).sqrt().sum()
    return float(mean_term + one.trace() + two.trace() - 2 * cross)


def _sqrt(covariance: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def frechet_per_class(
    samples: Tensor, sample_labels: Tensor, real: Tensor, real_labels: Tensor, projection: Projection
) -> list[float]:
    """Returns the Fréchet distance of each class that the samples [N ...] have, in label order."""
    ours, theirs = projection(samples), projection(real)
    return [
        frechet_distance(ours[sample_labels == label], theirs[real_labels == label])
        for label in sample_labels.unique().tolist()
    ]
