"""Pseudo-random order and generators that depend on nothing but a seed and a position."""

import hashlib
import json
from functools import lru_cache

import torch
from torch import Tensor


def draw_positions(seed: int, start: int, count: int, size: int) -> Tensor:
    """Returns entries start to start + count - 1 of an endless order over `size` items, as positions (int64).

    The order is one permutation of all items after another, so that each epoch visits every item once.
    """
    if size < 1:
        raise ValueError(f"an order over {size} items is empty")
    pieces = [torch.empty(0, dtype=torch.int64)]
    while count > 0:
        epoch, offset = divmod(start, size)
        taken = min(count, size - offset)
        pieces.append(_permutation(seed, epoch, size)[offset : offset + taken])
        start, count = start + taken, count - taken
    return torch.cat(pieces)  # a copy: the cached permutation stays ours


def sample_generator(seed: int, *labels: str | int) -> torch.Generator:
    """Makes the CPU generator that belongs to a seed and some labels, such as (42, "image", "ID_1", 7).

    A last label that is a number is not hashed with the rest but added to their hash. torch's CPU generator looks at
    only 32 bits of its seed: if everything were hashed, two of 100,000 images would more likely than not have the same
    32 bits and so the same noise. Consecutive numbers always have different ones.
    """
    count = labels[-1] if labels and isinstance(labels[-1], int) else None
    hashed = labels if count is None else (*labels[:-1], None)
    digest = hashlib.sha256(json.dumps([seed, *hashed]).encode()).digest()
    return torch.Generator().manual_seed((int.from_bytes(digest[:8], "little") + (count or 0)) % 2**63)


@lru_cache(maxsize=2)  # a batch may take the end of one epoch and the beginning of the next
def _permutation(seed: int, epoch: int, size: int) -> Tensor:
    return torch.randperm(size, generator=sample_generator(seed, "order", epoch))
