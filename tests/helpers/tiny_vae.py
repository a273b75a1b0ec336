"""Tiny VAEs with random weights, written the way that users bring theirs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from gait_latents.vae.network import KLVAE, Style


def tiny_vae(
    *,
    seed: int = 0,
    style: Style = "kl",
    multipliers: Sequence[int] = (1, 1),
    num_blocks: int = 1,
    embed_dim: int = 4,
    z_channels: int | None = None,
    scale_factor: float = 0.18215,
    **layout: Any,
) -> KLVAE:
    """Returns a small KL-VAE in eval mode whose every weight is random, the normalisations included.

    `layout` is further arguments of `KLVAE`: attention, decoder_attention, has_quant_conv.
    """
    network = KLVAE(
        width=32,  # the normalisation has 32 groups
        multipliers=multipliers,
        num_blocks=num_blocks,
        embed_dim=embed_dim,
        z_channels=z_channels,
        style=style,
        scale_factor=scale_factor,
        **layout,
    )
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 4
        offset = 1.0 if parameter.ndim == 1 else 0.0
        parameter.data = offset + torch.randn(parameter.shape, generator=generator) / fan_in**0.5
    return network.eval().requires_grad_(False)


def save_tiny_vae(path: str | Path, *, seed: int = 0, wrapped: bool = False, **architecture: Any) -> KLVAE:
    """Writes a tiny family A checkpoint, .pt or .safetensors by the name, and returns the network in it.

    A wrapped .pt is a training checkpoint with `model_state_dict`; a wrapped .safetensors says its scale factor.
    """
    path = Path(path)
    network = tiny_vae(seed=seed, **architecture)
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    facts = {"embed_dim": network.latent_channels, "scale_factor": network.scale_factor}
    if path.suffix == ".safetensors":
        save_file(state, path, {name: str(value) for name, value in facts.items()} if wrapped else None)
    else:
        torch.save({"model_state_dict": state, "epoch": 3, **facts} if wrapped else state, path)
    return network


def save_tiny_diffusers_vae(folder: str | Path, *, seed: int = 0, **config: Any) -> Any:
    """Writes a tiny diffusers AutoencoderKL (2x down, 4 channels) and returns it; skips a test without diffusers."""
    diffusers = pytest.importorskip("diffusers")

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        settings = {
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
            "block_out_channels": (32, 32),
            "layers_per_block": 1,
            "latent_channels": 4,
        }
        model = diffusers.AutoencoderKL(**{**settings, **config}).eval()
    model.save_pretrained(folder)
    return model
