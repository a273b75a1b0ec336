"""The figures against closed forms, scipy's matrix square root, and loops that follow the definitions word by word."""

import itertools
import math

import pytest
import torch

from gait_latents.evaluation import distances as latent_distances
from gait_latents.evaluation.distances import (
    Projection,
    copying_score,
    coverage,
    frechet_distance,
    kernel_distance,
    kernel_distance_of_subsets,
    nearest_moved,
)


def normal(seed: int, count: int, size: int) -> torch.Tensor:
    return torch.randn(count, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- Fréchet -----------------------------------------------------------------------------------------------


def test_a_shift_costs_its_squared_length():
    points = normal(0, 50, 3)
    assert frechet_distance(points, points + torch.tensor([3.0, 4.0, 0.0])) == pytest.approx(25.0, abs=1e-9)


def test_in_one_dimension_it_is_the_closed_form():
    first, second = normal(0, 40, 1), 3 * normal(1, 60, 1) + 2
    expected = (first.mean() - second.mean()) ** 2 + (first.std() - second.std()) ** 2
    assert frechet_distance(first, second) == pytest.approx(float(expected), abs=1e-9)


@pytest.mark.parametrize(("count", "size"), [(80, 5), (6, 9), (9, 9)])
def test_it_equals_the_formula_with_scipys_matrix_square_root(count, size):
    linalg = pytest.importorskip("scipy.linalg")
    first, second = normal(0, count, size), normal(1, 70, size) @ normal(2, size, size)
    one, two = torch.cov(first.T).numpy(), torch.cov(second.T).numpy()
    root = linalg.sqrtm(two).real  # the second has full rank; of a singular product the root may not exist
    cross = linalg.sqrtm(root @ one @ root + 1e-14 * torch.eye(size).numpy()).real.trace()
    expected = float((first.mean(0) - second.mean(0)).square().sum()) + one.trace() + two.trace() - 2 * cross
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-5)


def test_of_many_draws_it_is_the_distance_of_the_distributions():
    scales = torch.tensor([1.0, 2.0, 3.0])
    first, second = normal(0, 20_000, 3), normal(1, 20_000, 3) * scales + 1
    assert frechet_distance(first, second) == pytest.approx(3 + 0 + 1 + 4, rel=0.03)


def test_fewer_points_than_dimensions_still_give_a_finite_distance():
    distance = frechet_distance(normal(0, 4, 10), normal(1, 5, 10))
    assert math.isfinite(distance)
    assert distance > 0


def test_the_projection_keeps_the_variance_of_its_directions():
    latents = normal(0, 200, 6) * torch.tensor([5.0, 3.0, 1.0, 0.1, 0.1, 0.1])
    projection = Projection.fit(latents.reshape(200, 2, 3), 2)
    kept = projection(latents)
    assert kept.shape == (200, 2)
    assert kept.var(0).sum() == pytest.approx(float(torch.linalg.eigvalsh(torch.cov(latents.T))[-2:].sum()), rel=1e-9)
    torch.testing.assert_close(projection.leading(1)(latents), kept[:, :1])


# --- kernel distance ---------------------------------------------------------------------------------------


def kernel_by_hand(first: torch.Tensor, second: torch.Tensor) -> float:
    def kernel(x: torch.Tensor, y: torch.Tensor) -> float:
        return (sum(a * b for a, b in zip(x.tolist(), y.tolist(), strict=True)) / len(x) + 1) ** 3

    def within(points: torch.Tensor) -> float:
        pairs = [kernel(x, y) for x, y in itertools.permutations(points, 2)]
        return sum(pairs) / len(pairs)

    across = [kernel(x, y) for x in first for y in second]
    return within(first) + within(second) - 2 * sum(across) / len(across)


def test_the_kernel_distance_is_that_of_loops_over_all_pairs():
    first, second = normal(0, 7, 4), 2 * normal(1, 5, 4) + 1
    assert kernel_distance(first, second) == pytest.approx(kernel_by_hand(first, second), rel=1e-12)
    assert kernel_distance(first.reshape(7, 2, 2), second.reshape(5, 2, 2)) == kernel_distance(first, second)


def test_the_kernel_distance_has_the_expectation_of_its_closed_form():
    """Of N(m, 1) in one dimension: E (xy + 1)^3 is sum over k of binom(3, k) E x^k E y^k."""

    def moments(mean: float) -> list[float]:
        return [1, mean, mean**2 + 1, mean**3 + 3 * mean]

    def kernel(one: list[float], two: list[float]) -> float:
        return sum(math.comb(3, k) * one[k] * two[k] for k in range(4))

    zero, half = moments(0), moments(0.5)
    expected = kernel(zero, zero) + kernel(half, half) - 2 * kernel(zero, half)
    first, second = normal(0, 4000, 1), normal(1, 4000, 1) + 0.5
    assert kernel_distance(first, second) == pytest.approx(expected, rel=0.1)
    small = [kernel_distance(first[i : i + 4], second[i : i + 4]) for i in range(0, 4000, 4)]
    assert sum(small) / len(small) == pytest.approx(expected, rel=0.2)  # without bias however small the sets


def test_subsets_are_drawn_by_the_generator_and_scatter_around_the_whole():
    first, second = normal(0, 60, 3), normal(1, 50, 3) + 1

    def draw(seed: int, subset_size: int = 20) -> tuple[float, float]:
        generator = torch.Generator().manual_seed(seed)
        return kernel_distance_of_subsets(first, second, subset_size=subset_size, num_subsets=200, generator=generator)

    assert draw(0) == draw(0) != draw(1)
    mean, deviation = draw(0)
    assert mean == pytest.approx(kernel_distance(first, second), abs=4 * deviation / 200**0.5)
    assert draw(0, subset_size=40)[1] < 0.7 * deviation


# --- nearest neighbours ------------------------------------------------------------------------------------


def distance(x: torch.Tensor, y: torch.Tensor) -> float:
    return math.dist(x.flatten().tolist(), y.flatten().tolist())


def test_the_nearest_is_that_of_a_loop_and_an_equal_point_is_at_distance_zero(monkeypatch):
    monkeypatch.setattr(latent_distances, "_ROWS", 4)
    points, among = normal(0, 9, 6).reshape(9, 2, 3), normal(1, 7, 6).reshape(7, 2, 3)
    points[5] = among[3]
    distances, indices = nearest_moved(points, among, largest_shift=0)
    by_hand = [min((distance(x, y), j) for j, y in enumerate(among)) for x in points]
    assert indices.tolist() == [j for _, j in by_hand]
    assert distances.tolist() == pytest.approx([d for d, _ in by_hand], rel=1e-12)
    assert distances[5] == 0.0 and distances.count_nonzero() == 8


def moved_by_hand(x: torch.Tensor, y: torch.Tensor, largest: int) -> float:
    """Compares two pictures [C h w] column by column, at each shift."""
    width, found = x.shape[-1], []
    for shift in range(-largest, largest + 1):
        columns = [j for j in range(width) if 0 <= j - shift < width]
        apart = distance(x[..., columns], y[..., [j - shift for j in columns]])
        found.append(apart * (width / len(columns)) ** 0.5)
    return min(found)


def test_the_nearest_moved_is_that_of_a_loop_over_shifts(monkeypatch):
    monkeypatch.setattr(latent_distances, "_ROWS", 4)
    points, among = normal(0, 7, 2 * 3 * 8).reshape(7, 2, 3, 8), normal(1, 5, 2 * 3 * 8).reshape(5, 2, 3, 8)
    points[4, ..., 2:] = among[3, ..., :-2]  # a copy, moved to the right
    points[6] = among[1]
    distances, indices = nearest_moved(points, among, largest_shift=3)
    by_hand = [min((moved_by_hand(x, y, 3), j) for j, y in enumerate(among)) for x in points]
    assert indices.tolist() == [j for _, j in by_hand]
    assert distances.tolist() == pytest.approx([d for d, _ in by_hand], rel=1e-12, abs=1e-12)
    assert distances[4] == distances[6] == 0.0 and distances.count_nonzero() == 5
    still = nearest_moved(points, among, largest_shift=0)[0]
    assert (still >= distances).all() and still[4] > 1


def test_the_copying_score_is_the_statistic_of_mann_and_whitney():
    from scipy import stats

    generated, unseen = normal(2, 40, 1).flatten(), normal(3, 25, 1).flatten() + 0.4
    generated[:3] = unseen[:3]  # ties
    found = stats.mannwhitneyu(generated.numpy(), unseen.numpy(), alternative="less", method="asymptotic")
    expected = (found.statistic - 40 * 25 / 2) / (40 * 25 * 66 / 12) ** 0.5
    assert copying_score(generated, unseen) == pytest.approx(expected, abs=1e-12)
    assert copying_score(generated - 9, unseen) == pytest.approx(-((3 * 40 * 25 / 66) ** 0.5))


def coverage_by_hand(real: torch.Tensor, generated: torch.Tensor, k: int) -> tuple[float, float, float, float]:
    def radius(points: torch.Tensor, i: int) -> float:
        return sorted(distance(points[i], other) for j, other in enumerate(points) if j != i)[k - 1]

    def is_in_a_ball(point: torch.Tensor, centres: torch.Tensor) -> bool:
        return any(distance(point, centre) <= radius(centres, i) for i, centre in enumerate(centres))

    precision = sum(is_in_a_ball(point, real) for point in generated) / len(generated)
    recall = sum(is_in_a_ball(point, generated) for point in real) / len(real)
    counts = [[distance(x, y) <= radius(real, i) for y in generated] for i, x in enumerate(real)]
    density = sum(map(sum, counts)) / (k * len(generated))
    covered = sum(any(row) for row in counts) / len(real)
    return precision, recall, density, covered


@pytest.mark.parametrize("k", [1, 3])
def test_the_overlap_is_that_of_loops_over_the_definitions(k, monkeypatch):
    monkeypatch.setattr(latent_distances, "_ROWS", 5)
    real, generated = normal(0, 23, 3), 0.8 * normal(1, 17, 3) + 0.7
    found = coverage(real, generated, neighbours=k)
    by_hand = coverage_by_hand(real, generated, k)
    assert (found.precision, found.recall, found.density, found.coverage) == pytest.approx(by_hand, rel=1e-6)
    assert len({round(value, 3) for value in by_hand}) == 4  # so that none can stand for another


def test_equal_sets_overlap_fully_and_distant_ones_not_at_all():
    points = normal(0, 30, 3)
    same, apart = coverage(points, points, neighbours=3), coverage(points, points + 100, neighbours=3)
    assert (same.precision, same.recall, same.coverage) == (1.0, 1.0, 1.0)
    assert same.density == pytest.approx(4 / 3)  # each point is in its own ball and, on average, in three others
    assert (apart.precision, apart.recall, apart.density, apart.coverage) == (0.0, 0.0, 0.0, 0.0)


def test_as_few_points_as_neighbours_are_refused():
    with pytest.raises(ValueError, match="3 neighbours need more points than 9 and 3"):
        coverage(normal(0, 9, 2), normal(1, 3, 2), neighbours=3)
