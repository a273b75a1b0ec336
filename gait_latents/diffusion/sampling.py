"""Makes samples with an averaged network, for the grids of training, for generate.py and for evaluation."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from gait_latents.common import hardware
from gait_latents.common.errors import UserError
from gait_latents.diffusion.model import LatentDiffusion

BATCH_SIZE = 16  # samples in every call of a sampler, so that the bits of one do not depend on how many are made


def num_solver_steps(
    sampler: str, sampling_timesteps: int | str, timesteps: int, *, auto_steps: Mapping[str, int]
) -> int:
    """Returns the number of solver steps that the settings mean for a model of `timesteps` timesteps.

    Args:
        sampling_timesteps: a number, or "auto".
        timesteps: of the schedule that the model was trained with.
        auto_steps: how many steps "auto" means for each sampler; every timestep for a sampler that is not in it.

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
    start: Tensor | None = None,
    strength: float = 1.0,
    progress: Callable[[], None] | None = None,
) -> Tensor:
    """Makes one sample per label, [B C h w], in a call of exactly BATCH_SIZE samples; spare ones are thrown away.

    Args:
        labels: at most BATCH_SIZE class labels.
        generators: one CPU generator per label; all noise of a sample comes from its own.
        dtype: number format that the network computes in.
        cond_scale: guidance; 1 is none (see `LatentUnet.predict_guided`).
        guidance_interval: part of the way on which guidance is used (see `LatentDiffusion.guidance`).
        sampler: a key of SAMPLERS.
        sampling_timesteps: number of solver steps.
        start, strength: latents to begin with, one per label (see `LatentDiffusion.sample`).
        progress: called after every step.
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
            start=None if start is None else torch.cat([start, start[:1].expand(padding, *start.shape[1:])]),
            strength=strength,
            progress=progress,
        )
    return samples[: len(labels)]


def nearest_class(samples: Tensor, class_means: Tensor) -> Tensor:
    """Returns for each sample [B C h w] the index of the class mean [K C h w] that is nearest to it (Euclidean)."""
    samples, class_means = samples.flatten(1).float(), class_means.flatten(1).float()
    # By differences: with a matrix product digits cancel, and on a GPU with TF32 only ten bits are there to begin with.
    return torch.cdist(samples, class_means, compute_mode="donot_use_mm_for_euclid_dist").argmin(1)
