"""Everything random in one training step, drawn on the CPU from (seed, step) alone.

The draws are made for the whole batch of a step at once, and each forward pass and each process takes a slice of
them. So neither gradient accumulation, nor several processes, nor a restart change what is trained. Nothing here
touches torch's global generator.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields
from itertools import accumulate

import torch
from torch import Tensor

from gait_latents.common.seeds import draw_positions, sample_generator


@dataclass(frozen=True, eq=False)
class StepDraws:
    """What one step of effective batch B needs."""

    positions: Tensor  # B, int64, items of the data set
    posterior_noise: Tensor  # B C h w, float32
    times: Tensor  # B, int64, 0 <= time < timesteps
    noise: Tensor  # B C h w, float32
    cond_keep_mask: Tensor  # B, bool, True where the class is shown to the network
    shifts: Tensor  # B, int64, columns that a latent is moved to the right by
    host_positions: Tensor  # B, the positions once more, which stay on the host: what is read there needs no wait

    def slice(self, start: int, stop: int) -> "StepDraws":
        """Gives rows start to stop - 1, the share of a micro-batch or a rank."""
        return StepDraws(*(getattr(self, field.name)[start:stop] for field in fields(self)))

    def tensors(self) -> list[Tensor]:
        """Returns what a device needs of them."""
        return [getattr(self, field.name) for field in fields(self)[:-1]]


class DeviceDraws:
    """Puts the draws of one step after another into the same memory of a device.

    Each step takes one copy, for which the host does not wait, and no new memory. Draws that were sent before are then
    those of the new step.

    Args:
        device: where the network is.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._memory = torch.empty(0, dtype=torch.uint8, device=device)

    def send(self, draws: StepDraws, buffer: Tensor) -> StepDraws:
        """Returns draws on the device, which hold until the next call.

        Args:
            draws: those on the host.
            buffer: the same, packed.
        """
        if self._memory.shape != buffer.shape:
            self._memory = torch.empty(buffer.shape, dtype=buffer.dtype, device=self.device)
        self._memory.copy_(buffer, non_blocking=True)
        return StepDraws(*[*unpacked(self._memory, draws.tensors()), draws.host_positions])


class DrawsAhead:
    """Makes the draws of the next steps in a thread, so that a GPU need not wait for them.

    A step's draws depend on its number alone, so that whoever asks for another than the next step gets it, too.

    Args:
        draw: makes the draws of a step on the host.
        own: the rows that this process takes.
        pinned: whether they are packed into memory that a GPU copies from by itself; torch keeps such a buffer until
            the copy is done, and gives it out again afterwards.
    """

    STEPS = 3

    def __init__(self, draw: Callable[[int], StepDraws], own: slice, *, pinned: bool) -> None:
        self._draw, self._own, self._pinned = draw, own, pinned
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="draws")
        self._coming: dict[int, Future[tuple[StepDraws, StepDraws, Tensor]]] = {}

    def of(self, step: int) -> tuple[StepDraws, StepDraws, Tensor]:
        """Returns the draws of a step, the rows of this process among them, and these rows packed."""
        wanted = range(step, step + 1 + self.STEPS)
        self._coming = {number: found for number, found in self._coming.items() if number in wanted}
        for number in wanted:
            if number not in self._coming:
                self._coming[number] = self._thread.submit(self._make, number)
        return self._coming.pop(step).result()

    def _make(self, step: int) -> tuple[StepDraws, StepDraws, Tensor]:
        draws = self._draw(step)
        own = draws.slice(self._own.start, self._own.stop)
        return draws, own, packed(own.tensors(), pinned=self._pinned)


def packed(tensors: Sequence[Tensor], *, pinned: bool = False) -> Tensor:
    """Puts tensors one behind the other into a uint8 buffer [N], each at a multiple of 16 bytes.

    Args:
        pinned: whether to take memory that a GPU copies from while the host goes on; torch keeps such a buffer until
            the copy is done, and gives it out again afterwards.
    """
    starts = _starts(tensors)
    buffer = torch.empty(starts[-1], dtype=torch.uint8, pin_memory=pinned)
    for tensor, place in zip(tensors, unpacked(buffer, tensors), strict=True):
        place.copy_(tensor)
    return buffer


def unpacked(buffer: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Returns views into a buffer of `packed`, of the shapes and dtypes of these tensors."""
    return [
        buffer[start : start + tensor.numel() * tensor.element_size()].view(tensor.dtype).view(tensor.shape)
        for start, tensor in zip(_starts(like), like, strict=False)
    ]


def _starts(tensors: Sequence[Tensor]) -> list[int]:
    """Returns where each tensor begins in a packed buffer, and last how many bytes there are in all."""
    sizes = (-(-tensor.numel() * tensor.element_size() // 16) * 16 for tensor in tensors)
    return [0, *accumulate(sizes)]


def draw_step(
    seed: int,
    step: int,
    *,
    batch: int,
    size: int,
    latent_shape: tuple[int, ...],
    timesteps: int,
    cond_drop_prob: float,
    largest_shift: int = 0,
) -> StepDraws:
    """Draws step number `step`, from 0: items step * batch onwards of the order, and all noise for them.

    Shifts are from -largest_shift to largest_shift. They are drawn last, so that the rest does not depend on them.
    """
    generator = sample_generator(seed, "step", step)
    noise_shape = (batch, *latent_shape)
    positions = draw_positions(seed, step * batch, batch, size)
    return StepDraws(
        positions=positions,
        posterior_noise=torch.randn(noise_shape, generator=generator, dtype=torch.float32),
        times=torch.randint(timesteps, (batch,), generator=generator),
        noise=torch.randn(noise_shape, generator=generator, dtype=torch.float32),
        cond_keep_mask=torch.rand(batch, generator=generator, dtype=torch.float64) >= cond_drop_prob,
        shifts=torch.randint(-largest_shift, largest_shift + 1, (batch,), generator=generator),
        host_positions=positions,
    )
