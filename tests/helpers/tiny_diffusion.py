"""A tiny diffusion model, its random numbers, and networks that are formulas."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from gait_latents.common.seeds import sample_generator
from gait_latents.diffusion.model import LatentDiffusion

OBJECTIVES = ("pred_v", "pred_noise", "pred_x0")
TINY = {
    "num_classes": 3,
    "latent_channels": 2,
    "latent_size": 8,
    "dim": 8,
    "dim_mults": (1, 2),
    "attn_dim_head": 4,
    "attn_heads": 2,
    "cond_drop_prob": 0.5,
    "timesteps": 1000,
    "objective": "pred_v",
    "beta_schedule": "cosine",
    "noise_shift": 0.0,
    "min_snr_loss_weight": True,
    "min_snr_gamma": 5.0,
}
SAMPLING = {"cond_scale": 2.0, "guidance_interval": (0, 1), "sampler": "dpm++", "sampling_timesteps": 5}


def scheduler_class(module: str, name: str) -> Any:
    """Gives a scheduler of diffusers, or skips the test where diffusers is not installed."""
    return getattr(pytest.importorskip(f"diffusers.schedulers.scheduling_{module}"), name)


def tiny(**changes) -> LatentDiffusion:
    """A real model of some 60,000 weights, the same each time, without a trace in the global generator."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LatentDiffusion(**{**TINY, **changes})


def generators(count: int, seed: int = 0) -> list[torch.Generator]:
    return [sample_generator(seed, "test", index) for index in range(count)]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def signal_share(schedule: str, timesteps: int = 1000, noise_shift: float = 0.0) -> Tensor:
    """The product of 1 - beta up to each timestep, from the papers' formulas, in float64."""
    if schedule == "linear":  # Ho et al. 2020, section 4
        betas = [1e-4 + (0.02 - 1e-4) * step / (timesteps - 1) for step in range(timesteps)]
    else:  # Nichol & Dhariwal 2021, equation 17
        shares = [math.cos((step / timesteps + 0.008) / 1.008 * math.pi / 2) ** 2 for step in range(timesteps + 1)]
        betas = [min(1 - after / before, 0.999) for before, after in pairwise(shares)]
    share = torch.cumprod(1 - torch.tensor(betas, dtype=torch.float64), dim=0)
    return torch.sigmoid(torch.logit(share) - 2 * noise_shift)  # of log(alpha^2 / sigma^2)


# Two narrow classes of values, far outside [-1, 1], as the distribution of every latent element.
CENTERS, SPREADS, SHARES = (-3.0, 1.5), (0.5, 0.3), (0.4, 0.6)


def exact(objective: str, error: float = 0.0):
    """The perfect network for the mixture, by Bayes' rule; `error` scales its output up."""
    share = signal_share("cosine")

    def output(x: Tensor, time: Tensor) -> Tensor:
        alpha, sigma = (each[time].sqrt()[:, None, None, None] for each in (share, 1 - share))
        x = x.double()
        log_odds, latents = [], []
        for weight, center, spread in zip(SHARES, CENTERS, SPREADS, strict=True):
            variance = (alpha * spread) ** 2 + sigma**2
            log_odds.append(math.log(weight) - variance.log() / 2 - (x - alpha * center) ** 2 / (2 * variance))
            latents.append(center + alpha * spread**2 / variance * (x - alpha * center))
        odds = torch.stack(log_odds).softmax(dim=0)
        latent = (odds * torch.stack(latents)).sum(dim=0)
        noise = (x - alpha * latent) / sigma
        outputs = {"pred_v": alpha * noise - sigma * latent, "pred_noise": noise, "pred_x0": latent}
        return outputs[objective] * (1 + error)

    return output
