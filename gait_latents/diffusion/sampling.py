"""From an averaged network and classes to samples, and from samples to pictures; shared by grids and generate.py."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from gait_latents.common import hardware
from gait_latents.common.errors import UserError
from gait_latents.diffusion.model import LatentDiffusion

BATCH_SIZE = 16  # samples per sampler call, always: a sample's bits must not depend on how many are asked for


def num_solver_steps(
    sampler: str, sampling_timesteps: int | str, timesteps: int, *, auto_steps: Mapping[str, int]
) -> int:
    """Returns the number of solver steps that the settings mean for a model of `timesteps` timesteps.

    Args:
        auto_steps: what auto is for a run, by sampler; for one that is not there, every timestep.

    Raises:
        UserError: when more are asked for than there are timesteps.
    """
    if sampling_timesteps == "auto":
        return min(auto_steps.get(sampler, timesteps), timesteps)
    if int(sampling_timesteps) > timesteps:
        raise UserError(
            f"--sampling_timesteps is {sampling_timesteps}, but the model has {timesteps} timesteps; "
            f"give a number from 1 to {timesteps}, or auto"
        )
    return int(sampling_timesteps)


def sample_padded(
    diffusion: LatentDiffusion,
    labels: Sequence[int],
    generators: Sequence[torch.Generator],
    *,
    dtype: torch.dtype,
    cond_scale: float,
    guidance_interval: Sequence[float],
    sampler: str,
    sampling_timesteps: int,
    progress: Callable[[], None] | None = None,
) -> Tensor:
    """Makes one sample [B C h w] per label, in a call of exactly BATCH_SIZE, padded where short.

    Args:
        labels: at most BATCH_SIZE class labels.
        generators: one CPU generator per label; all noise of a sample comes from its own.
        dtype: number format of the network.
    """
    padding = BATCH_SIZE - len(labels)
    device = next(diffusion.parameters()).device
    padded = torch.tensor([*labels, *[labels[0]] * padding], device=device)
    spare = [torch.Generator().manual_seed(0) for _ in range(padding)]
    with hardware.autocast(device, dtype):
        samples = diffusion.sample(
            padded,
            [*generators, *spare],
            cond_scale=cond_scale,
            guidance_interval=guidance_interval,
            sampler=sampler,
            sampling_timesteps=sampling_timesteps,
            progress=progress,
        )
    return samples[: len(labels)]


def nearest_class(samples: Tensor, class_means: Tensor) -> Tensor:
    """Returns for each sample [B C h w] the index of the class mean [K C h w] at the least Euclidean distance."""
    samples, class_means = samples.flatten(1).float(), class_means.flatten(1).float()
    # Without the matrix product: it cancels digits, on a GPU of the ten bits that TF32 has.
    return torch.cdist(samples, class_means, compute_mode="donot_use_mm_for_euclid_dist").argmin(1)
