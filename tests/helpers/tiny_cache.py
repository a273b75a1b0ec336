"""A cache of tiny rows that the tests know by number: row(i) is the one right row of key(i)."""

import functools
import hashlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from gait_latents.latents.cache import LatentCache
from gait_latents.latents.space import Space

RECORD = {"precision": "float32", "device": "a CPU"}


def make_space(shape: tuple[int, int, int] = (2, 2, 1), **fingerprint: object) -> Space:
    """Describes moments of this shape by a VAE with this fingerprint."""
    return Space.of({"weights": "w", **fingerprint}, 256, {"version": 1}, shape)


SPACE = make_space()


def key(i: int) -> str:
    """The key of row(i)."""
    return hashlib.sha256(str(i).encode()).hexdigest()


@functools.cache
def values(i: int, shape: tuple[int, int, int]) -> np.ndarray:
    """Draws float16 numbers that depend on `i` and shape alone."""
    return np.random.default_rng(i).standard_normal(shape).astype(np.float16)


def row(i: int, space: Space = SPACE) -> np.ndarray:
    """The one right row of key(i)."""
    return values(i, space.moments_shape)


def put(cache: LatentCache, numbers: Iterable[int], record: dict = RECORD) -> None:
    """Puts rows by their numbers."""
    numbers = list(numbers)
    rows = np.stack([row(i, cache.space) for i in numbers])
    cache.put([key(i) for i in numbers], rows, [f"ID_{i}/{i}.jpg" for i in numbers], record)


def stored(folder: Path, numbers: Iterable[int], space: Space = SPACE) -> Path:
    """Publishes rows as one shard and returns its path."""
    cache = LatentCache(folder, space, writable=True)
    before = set(cache.shard_paths())
    put(cache, numbers)
    cache.flush()
    (path,) = set(cache.shard_paths()) - before
    return path


def reader(folder: Path, space: Space = SPACE) -> LatentCache:
    """Opens a cache that writes nothing."""
    return LatentCache(folder, space, writable=False)


def found_rows(cache: LatentCache, numbers: Iterable[int]) -> list[int]:
    """Reads the rows and returns the numbers of those found; each of them must be right."""
    numbers = list(numbers)
    moments, found = cache.read([key(i) for i in numbers])
    for i, moment, is_found in zip(numbers, moments, found, strict=True):
        if is_found:
            assert np.array_equal(moment, row(i, cache.space)), f"row {i} is wrong"
        else:
            assert np.isnan(moment).all()
    return [i for i, is_found in zip(numbers, found, strict=True) if is_found]


def strangers(cache: LatentCache, numbers: Iterable[int]) -> list[str]:
    """Returns the keys that the cache claims to have besides those of `numbers`."""
    return sorted(set(cache.keys()) - {key(i) for i in numbers})
