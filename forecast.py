"""What --dry_run tells: how long it would take, measured on a few real images and steps. Nothing is written."""

import itertools
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

import hardware
from diffusion import passes_per_step
from images import BadImage
from latent_dataset import Encode, LatentDataset
from script import duration

_NUM_CALLS = 2  # of the encoder that are timed, after one that is not
_WARM_STEPS, _TIMED_STEPS = 2, 5  # of the training
_LONGEST_SECONDS = 20.0  # after which no further step is timed
_SOLVER_STEPS = 2  # of the sampler that are timed
_RANDOM_IMAGE_PX = 8  # side of the pictures that stand in for images; nothing looks at them


def seconds_per_call(
    action: Callable[[], object], device: torch.device, *, warm_up: int, count: int
) -> tuple[float, int]:
    """Returns the mean time of a call and how many were timed: `count`, or fewer where they are slow."""
    for _ in range(warm_up):
        action()
    hardware.synchronize(device)
    started, done = time.perf_counter(), 0
    while done < count and time.perf_counter() - started < _LONGEST_SECONDS:
        action()
        hardware.synchronize(device)
        done += 1
    return (time.perf_counter() - started) / done, done


def encoding(dataset: LatentDataset, missing: Sequence[int]) -> str:
    """Says how long the images at the positions `missing` take to read and encode; the first of them are tried.

    Raises:
        UserError: when the VAE cannot be loaded.
    """
    if not missing:
        return "encode: nothing, every latent is cached"
    encode, batch = dataset.encode, getattr(dataset.encode, "batch_size", dataset.encode_batch_size)
    readable = itertools.islice(_readable(dataset, missing), batch)
    positions = [position for position, _ in readable]
    if not positions:
        return f"encode: {len(missing):,} images to encode, none of which can be read"

    def call() -> None:
        images = np.stack([dataset.read_image(position) for position in positions])  # type: ignore[misc]
        encode(torch.from_numpy(images))  # type: ignore[misc]

    seconds, count = seconds_per_call(call, dataset.device, warm_up=1, count=_NUM_CALLS)
    total = seconds * -(-len(missing) // batch)
    what = "images" if batch == 1 else f"batches of {batch}"
    return (
        f"encode: {len(missing):,} images to encode, about {duration(total)} ({seconds / batch:.3g} s per image, "
        f"measured on {count} {what})"
    )


def _readable(dataset: LatentDataset, positions: Sequence[int]):
    for position in positions:
        try:
            yield position, dataset.read_image(position)  # type: ignore[misc]
        except BadImage:  # the run itself tells of it
            continue


def random_moments(shape: tuple[int, int, int]) -> Encode:
    """Makes an encoder of random moments [2C h w], so that steps can be timed before anything is encoded."""
    generator = torch.Generator().manual_seed(0)

    def encode(images: Tensor) -> Tensor:
        return torch.randn(len(images), *shape, generator=generator)

    return encode


def blank_image(_position: int) -> np.ndarray:
    """Stands in for an image [S S 3] where the encoder does not look at it."""
    return np.zeros((_RANDOM_IMAGE_PX, _RANDOM_IMAGE_PX, 3), dtype=np.uint8)


def training(take_step: Callable[[], object], num_steps: int, device: torch.device) -> str:
    """Says how long `num_steps` steps take; takes a few of them."""
    seconds, count = seconds_per_call(take_step, device, warm_up=_WARM_STEPS, count=_TIMED_STEPS)
    return (
        f"train: {num_steps:,} steps, about {duration(num_steps * seconds)} ({seconds:.3g} s per step, measured on "
        f"{count} steps, not compiled; saves and grids come on top)"
    )


def memory(device: torch.device) -> str:
    """Says what this process has held at its most."""
    return f"memory: about {hardware.peak_memory(device)}, the most that was held here"


def generating(
    sample: Callable[[float, int], object],
    decode: Callable[[], object],
    device: torch.device,
    *,
    num_images: int,
    batch: int,
    steps: Mapping[float, int],
    most_steps: int,
) -> str:
    """Says how long so many images take.

    Args:
        sample: samples a whole batch with a guidance scale that it is told, in as many solver steps as it is told.
        decode: decodes one sample.
        batch: images in a batch.
        steps: solver steps of all batches, by their guidance scale. One of each number of passes is timed.
        most_steps: that a batch may take.
    """
    by_passes, timed = dict[int, float](), min(_SOLVER_STEPS, most_steps)
    for scale in steps:
        passes = passes_per_step(scale)
        if passes not in by_passes:
            seconds, _ = seconds_per_call(lambda: sample(scale, timed), device, warm_up=1, count=1)  # noqa: B023
            by_passes[passes] = seconds / timed
    per_image, _ = seconds_per_call(decode, device, warm_up=1, count=1)
    total = sum(count * by_passes[passes_per_step(scale)] for scale, count in steps.items()) + num_images * per_image
    num_passes = sum(count * passes_per_step(scale) for scale, count in steps.items())
    return (
        f"generate: {num_images:,} images, about {duration(total)} ({total / num_images:.3g} s per image, measured on "
        f"{timed} solver steps for {batch} images, not compiled, and on one decoded image; {num_passes:,} "
        "network passes)"
    )
