"""Times opening and indexing a cache of ten thousand rows, of ten times as many, and of as many as ImageNet has images.

    python benchmarks/bench_open.py

The rows are tiny, in shards of 4,096, so that the cost of a row is seen and not that of its bytes. A round opens the
cache, and a dataset over all of its rows, and asks what is missing.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import harness
from harness import Round

ROWS = {"10,000 rows": 10_000, "100,000 rows": 100_000, "1,280,000 rows": 1_280_000}
SHARD_ROWS = 4096


def main() -> None:
    """Compares the sizes."""
    arguments = harness.read_arguments("Time opening a cache.")
    if arguments.worker:
        facts: dict[str, float] = {}
        with tempfile.TemporaryDirectory() as folder:
            harness.serve(lambda: opening(arguments, Path(folder), facts), lambda: facts)
        return
    harness.compare(__file__, list(ROWS), arguments, "row")


def opening(arguments: argparse.Namespace, folder: Path, facts: dict[str, float]) -> Round:
    """Sets up a cache of the worker's size."""
    import torch

    from gait_latents.latents.cache import LatentCache
    from gait_latents.latents.dataset import LatentDataset
    from gait_latents.latents.space import Space

    count = ROWS[arguments.worker] // (100 if arguments.small else 1)
    space = Space.of({"weights": "none"}, 8, {"version": 0}, (2, 1, 1))
    keys = fill(folder, space, count)
    labels = [i % 1000 for i in range(count)]

    def work() -> int:
        before, started = resident_bytes(), time.perf_counter()
        cache = LatentCache(folder, space, writable=False)
        dataset = LatentDataset(
            cache,
            keys,
            labels,
            keys,
            encode=None,
            read_image=None,
            encode_batch_size=1,
            device=torch.device("cpu"),
        )
        missing = dataset.missing()
        assert not missing, f"{len(missing)} rows are missing"
        facts["s in all"] = time.perf_counter() - started
        facts["shards"] = len(cache.shard_paths())
        facts["GB held"] = (resident_bytes() - before) / 1e9
        return count

    return work


def fill(folder: Path, space: Any, count: int) -> list[str]:
    """Writes `count` rows; returns their keys."""
    import numpy as np

    from gait_latents.latents.cache import LatentCache

    random = np.random.default_rng(0)
    keys = [random.bytes(32).hex() for _ in range(count)]
    cache = LatentCache(folder, space, writable=True)
    moments = np.zeros((SHARD_ROWS, *space.moments_shape), dtype=np.float16)
    for start in range(0, count, SHARD_ROWS):
        part = keys[start : start + SHARD_ROWS]
        cache.put(part, moments[: len(part)], part, {})
        cache.flush()
    return keys


def resident_bytes() -> int:
    """Returns how much memory this process holds now."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    sys.exit(main())
