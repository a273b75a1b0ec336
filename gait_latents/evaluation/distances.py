"""How far generated points are from real ones, as figures. Torch only.

A point is a latent, flattened, or the features of an image. Sets of points are [N ...] and [M ...]; figures are
computed in float64 on the CPU, and distances are Euclidean.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

_ROWS = 1024  # rows of a table of distances that are in memory at once


@dataclass(frozen=True, eq=False)
class Projection:
    """The leading principal directions of a set of latents, which give a few coordinates instead of thousands."""

    mean: Tensor  # D, float64
    directions: Tensor  # D K, float64

    @classmethod
    def fit(cls, latents: Tensor, num_directions: int) -> "Projection":
        """Finds the directions of largest variance of latents [N ...]; N points span no more than N - 1."""
        flat = _flat(latents)
        mean = flat.mean(0)
        _, _, directions = torch.linalg.svd(flat - mean, full_matrices=False)
        return cls(mean, directions[: min(num_directions, len(flat) - 1)].T)

    def __call__(self, latents: Tensor) -> Tensor:
        """Returns the coordinates [N K] of latents [N ...]."""
        return (_flat(latents) - self.mean) @ self.directions

    def leading(self, num_directions: int) -> "Projection":
        """Returns the first of the directions alone."""
        return Projection(self.mean, self.directions[:, :num_directions])


def _flat(points: Tensor) -> Tensor:
    return points.flatten(1).double().cpu()


# --- distances between two sets ----------------------------------------------------------------------------


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """Returns the Fréchet distance between normal distributions fitted to two sets of points, 2 or more in each.

    |m1 - m2|^2 + tr(C1 + C2 - 2 (C1^(1/2) C2 C1^(1/2))^(1/2)), Dowson & Landau 1982; squared units of the points.
    """
    one, two = _flat(first), _flat(second)
    mean_term = (one.mean(0) - two.mean(0)).square().sum()
    one, two = _root_of_covariance(one), _root_of_covariance(two)
    # With C1 = A'A and C2 = B'B, the trace of the root is the sum of the singular values of AB'.
    cross = torch.linalg.svdvals(one @ two.T).sum()
    return float(mean_term + one.square().sum() + two.square().sum() - 2 * cross)


def _root_of_covariance(points: Tensor) -> Tensor:
    """Returns R with R'R the covariance of points [N D]; it has the smaller of N and D rows."""
    centred = (points - points.mean(0)) / (len(points) - 1) ** 0.5
    return torch.linalg.qr(centred, mode="r").R


def kernel_distance(first: Tensor, second: Tensor) -> float:
    """Returns the unbiased squared maximum mean discrepancy of two sets of points, 2 or more in each.

    The kernel is (x.y / D + 1)^3, Bińkowski et al. 2018 (KID). Without bias: the expectation is 0 for two sets from
    one distribution, whatever their sizes, so that values just below 0 occur.
    """
    one, two = _flat(first), _flat(second)
    within = _mean_off_diagonal(_kernel(one, one)) + _mean_off_diagonal(_kernel(two, two))
    return float(within - 2 * _kernel(one, two).mean())


def _kernel(one: Tensor, two: Tensor) -> Tensor:
    return (one @ two.T / one.shape[1] + 1) ** 3


def _mean_off_diagonal(square: Tensor) -> Tensor:
    count = len(square)
    return (square.sum() - square.trace()) / (count * (count - 1))


def kernel_distance_of_subsets(
    first: Tensor, second: Tensor, *, subset_size: int, num_subsets: int, generator: torch.Generator
) -> tuple[float, float]:
    """Returns mean and standard deviation (n - 1) of the kernel distance between random subsets of two sets.

    The deviation says how far subsets of this size scatter, not how sure the mean is.
    """
    one, two = _flat(first), _flat(second)
    values = torch.tensor(
        [
            kernel_distance(_some(one, subset_size, generator), _some(two, subset_size, generator))
            for _ in range(num_subsets)
        ],
        dtype=torch.float64,
    )
    return float(values.mean()), float(values.std())


def _some(points: Tensor, count: int, generator: torch.Generator) -> Tensor:
    return points[torch.randperm(len(points), generator=generator)[:count]]


# --- nearest neighbours ------------------------------------------------------------------------------------


def nearest_moved(points: Tensor, among: Tensor, *, largest_shift: int) -> tuple[Tensor, Tensor]:
    """Returns for each of the points the distance to the nearest of `among`, moved sideways or not, and its index.

    Moved ones are compared in the columns that both have, and their distance is that of as many columns as there are:
    times (w / (w - |shift|))^(1/2).

    Args:
        points: [N C h w]; points of other shapes are not moved.
        among: [M C h w].
        largest_shift: columns that one may be moved by, to either side.
    """
    shifts = range(-largest_shift, largest_shift + 1) if points.ndim == 4 else range(1)
    best = torch.full((len(points),), torch.inf)
    index, shift = torch.zeros(len(points), dtype=torch.long), torch.zeros(len(points), dtype=torch.long)
    for moved in sorted(shifts, key=abs):  # of equals the least moved
        ours, theirs = (part.float() for part in _in_common(points, among, moved))  # to find which it is
        for start in range(0, len(points), _ROWS):
            rows = slice(start, start + _ROWS)
            found = torch.cdist(ours[rows], theirs).min(1)
            values = found.values * _stretch(points, moved)
            is_better = values < best[rows]
            best[rows] = torch.where(is_better, values, best[rows])
            index[rows] = torch.where(is_better, found.indices, index[rows])
            shift[rows] = torch.where(is_better, moved, shift[rows])
    exact = []
    for i, (other, moved) in enumerate(zip(index.tolist(), shift.tolist(), strict=True)):
        one, two = _in_common(points[i : i + 1], among[other : other + 1], moved)
        # Without the matrix product: it would make the distance of equal points 1e-7 instead of 0.
        apart = torch.cdist(one, two, compute_mode="donot_use_mm_for_euclid_dist")
        exact.append(float(apart) * _stretch(points, moved))
    return torch.tensor(exact, dtype=torch.float64), index


def _in_common(points: Tensor, others: Tensor, shift: int) -> tuple[Tensor, Tensor]:
    """Returns, flattened, the columns that points and others, moved to the right by `shift`, have in common."""
    if shift:
        width = points.shape[-1]
        points = points[..., max(shift, 0) : width + min(shift, 0)]
        others = others[..., max(-shift, 0) : width - max(shift, 0)]
    return _flat(points), _flat(others)


def _stretch(points: Tensor, shift: int) -> float:
    return (points.shape[-1] / (points.shape[-1] - abs(shift))) ** 0.5 if shift else 1.0


def copying_score(distances: Tensor, of_unseen: Tensor) -> float:
    """Returns C_T, how far below the distances of unseen points those of generated points are, in deviations.

    The Mann-Whitney statistic of the two samples, less its mean and over its deviation where both are of one
    distribution (Meehan et al. 2020): about 0 then, and far below where generated points are nearer.

    Args:
        distances: of generated points to their nearest training point [N].
        of_unseen: the same of points that were not trained on [M].
    """
    one, two = len(distances), len(of_unseen)
    wins = (distances[:, None] > of_unseen).double().sum() + (distances[:, None] == of_unseen).double().sum() / 2
    return float((wins - one * two / 2) / (one * two * (one + two + 1) / 12) ** 0.5)


def _distances(points: Tensor, others: Tensor) -> Iterator[Tensor]:
    """Yields the table of distances [N M], a number of rows at a time."""
    one, two = _flat(points), _flat(others)
    for part in one.split(_ROWS):
        # Without the matrix product: it would make the distance of equal points 1e-7 instead of 0.
        yield torch.cdist(part, two, compute_mode="donot_use_mm_for_euclid_dist")


@dataclass(frozen=True)
class Coverage:
    """Four shares that say how two sets of points overlap; density alone may exceed 1."""

    precision: float
    recall: float
    density: float
    coverage: float


def coverage(real: Tensor, generated: Tensor, *, neighbours: int) -> Coverage:
    """Measures overlap by balls around the points that reach to their k-th nearest neighbour in their own set.

    Precision and recall: the share of generated points in some ball of a real point, and the reverse (Kynkäänniemi
    et al. 2019, equation 1). Density: how many real balls a generated point is in, over k; coverage: the share of
    real balls that a generated point is in (Naeem et al. 2020, equations 4 and 5). A ball has its surface.

    Raises:
        ValueError: unless each set has more than `neighbours` points.
    """
    if min(len(real), len(generated)) <= neighbours:
        raise ValueError(f"{neighbours} neighbours need more points than {len(real)} and {len(generated)}")
    real_radii, generated_radii = _radii(real, neighbours), _radii(generated, neighbours)
    in_balls = torch.zeros(len(generated))  # of real points, for each generated one
    is_covered, is_recalled = [], []
    for start, rows in zip(range(0, len(real), _ROWS), _distances(real, generated), strict=True):
        inside = rows <= real_radii[start : start + _ROWS, None]
        in_balls += inside.sum(0)
        is_covered.append(inside.any(1))
        is_recalled.append((rows <= generated_radii).any(1))
    return Coverage(
        precision=_share(in_balls > 0),
        recall=_share(torch.cat(is_recalled)),
        density=float(in_balls.mean()) / neighbours,
        coverage=_share(torch.cat(is_covered)),
    )


def _radii(points: Tensor, neighbours: int) -> Tensor:
    """Returns the distance of each point to its k-th nearest other point."""
    return torch.cat([rows.kthvalue(neighbours + 1, 1).values for rows in _distances(points, points)])


def _share(flags: Tensor) -> float:
    return float(flags.double().mean())
