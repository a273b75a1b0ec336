"""Loads VAEs: the face of `gait_latents.vae` for notebooks that say `from vae import load_vae`."""

from gait_latents.vae.base import VAE, VAEIdentity
from gait_latents.vae.load import load_vae, read_identity
from gait_latents.vae.network import KLVAE, Attention

__all__ = ["KLVAE", "VAE", "Attention", "VAEIdentity", "load_vae", "read_identity"]
