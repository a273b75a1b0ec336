"""Latents as a dataset: the face of `gait_latents.latents` for notebooks that import `latent_dataset`."""

from gait_latents.latents.dataset import LatentDataset
from gait_latents.latents.opening import open_cache

__all__ = ["LatentDataset", "open_cache"]
