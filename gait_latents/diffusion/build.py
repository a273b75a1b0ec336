"""Builds the network and the schedule that the settings of a run describe."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from gait_latents.common import cli, hardware
from gait_latents.common.errors import UserError
from gait_latents.diffusion.model import LatentDiffusion, network_bytes

NETWORK_SETTINGS = (
    "dim",
    "dim_mults",
    "attn_dim_head",
    "attn_heads",
    "cond_drop_prob",
    "timesteps",
    "objective",
    "beta_schedule",
    "noise_shift",
    "min_snr_loss_weight",
    "min_snr_gamma",
)


def network_facts(settings: Mapping[str, Any], *, num_classes: int, latent_shape: Sequence[int]) -> dict[str, Any]:
    """Returns the arguments of the `LatentDiffusion` that the settings of a run describe.

    Args:
        settings: by name; those in NETWORK_SETTINGS are used.
        num_classes: how many classes there are.
        latent_shape: (C, h, w) of a latent.
    """
    facts = {"num_classes": num_classes, "latent_channels": latent_shape[0], "latent_size": latent_shape[1]}
    return facts | {name: settings[name] for name in NETWORK_SETTINGS}


def build_diffusion(
    settings: Mapping[str, Any], *, num_classes: int, latent_shape: tuple[int, int, int]
) -> LatentDiffusion:
    """Builds the network and the schedule that the settings of a run describe.

    Raises:
        UserError: when the sizes do not fit the latents, or the weights do not fit into memory.
    """
    facts = network_facts(settings, num_classes=num_classes, latent_shape=latent_shape)
    needed, free = network_bytes(**facts), hardware.free_memory_bytes(torch.device("cpu"))
    if needed > free:
        raise UserError(
            f"a network of dim {settings['dim']}, dim_mults {cli.show(settings['dim_mults'])} and attn_heads "
            f"{settings['attn_heads']} has {needed:.3g} bytes of weights, and {free:.3g} bytes of memory are free "
            "for it; lower them"
        )
    return LatentDiffusion(**facts)
