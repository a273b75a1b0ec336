"""From an averaged network and classes to samples, and from samples to pictures; shared by grids and generate.py."""

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

import hardware
import pictures
import vae
from config import UserError
from diffusion import LatentDiffusion
from latent_norm import LatentNorm
from script import warn

_AS_GOOD_DB = 45.0  # images that differ less look the same; rounding to 8 bits alone is 59 dB
_TRIAL_SIZE = 16  # of the latent with which a number format is tried
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


class Decoder:
    """The VAE's decoder, built when first needed and freed by `close`.

    Each sample is decoded by itself, so that an image does not depend on the images beside it. `dtype` is the number
    format that it computes in: when it is built, a shorter one is tried, and given up where its images would differ.
    """

    def __init__(
        self, vae_path: str, norm: LatentNorm, device: torch.device, *, dtype: torch.dtype = torch.float32
    ) -> None:
        self.vae_path, self.norm, self.device, self.dtype = vae_path, norm.to(device), device, dtype
        self.vae: vae.VAE | None = None
        self._is_tried = dtype == torch.float32

    @torch.inference_mode()
    def __call__(self, samples: Tensor, between: Callable[[], None] = lambda: None) -> list[np.ndarray]:
        """Decodes samples [B C h w] to uint8 images [S S 3]; raises UserError when there is no VAE.

        `between` is called before each; what it raises ends the work.
        """
        decoder = self.open()
        images = []
        for latent in self.norm.to_unscaled(samples.to(self.device)):
            between()
            images.append(pictures.to_uint8(self._finite_pixels(decoder, latent[None]))[0])
        return images

    def _finite_pixels(self, decoder: vae.VAE, latent: Tensor) -> Tensor:
        """Decodes in float32 what the number format cannot hold: noise, with which it was tried, has no extremes."""
        pixels = self._pixels(decoder, latent, self.dtype)
        if self.dtype == torch.float32 or pixels.isfinite().all():
            return pixels
        return self._pixels(decoder, latent, torch.float32)

    def _pixels(self, decoder: vae.VAE, latent: Tensor, dtype: torch.dtype) -> Tensor:
        with hardware.autocast(self.device, dtype):
            return decoder.decode(latent).float()

    def open(self) -> vae.VAE:
        """Builds the decoder if there is none yet; raises UserError when there is no VAE."""
        if self.vae is None:
            hardware.allow_tf32()
            self.vae = vae.load_vae(self.vae_path, self.device, parts="decoder", memory_format=torch.channels_last)
        if not self._is_tried:
            quality = self._quality(self.vae)
            if quality < _AS_GOOD_DB:
                name = str(self.dtype).removeprefix("torch.")
                warn(f"images are decoded in float32, as {name} would change them (PSNR {quality:.1f} dB)")
                self.dtype = torch.float32
            self._is_tried = True
        return self.vae

    def go_on_in(self, dtype: torch.dtype) -> None:
        """Takes the number format of images that there are already."""
        self.dtype, self._is_tried = dtype, True

    @torch.inference_mode()
    def _quality(self, decoder: vae.VAE) -> float:
        """Returns the PSNR in dB of an image decoded in `dtype` against float32; of noise, which is no easier."""
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(1, len(self.norm.shift), _TRIAL_SIZE, _TRIAL_SIZE, generator=generator)
        latent = self.norm.to_unscaled(noise.to(self.device))
        exact, found = (self._pixels(decoder, latent, dtype) for dtype in (torch.float32, self.dtype))
        if not found.isfinite().all():
            return -math.inf
        return pictures.psnr(pictures.to_uint8(exact), pictures.to_uint8(found))

    def close(self) -> None:
        """Frees the VAE; a later call builds it again."""
        self.vae = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def check_decodes(vae_path: str, identity: vae.VAEIdentity, latent_channels: int) -> None:
    """Raises UserError unless the latents of the VAE at this path have so many channels."""
    found = identity.latent_channels
    if found != latent_channels:
        raise UserError(f"--vae_path {vae_path} decodes latents of {found} channels, and these have {latent_channels}")


def nearest_class(samples: Tensor, class_means: Tensor) -> Tensor:
    """Returns for each sample [B C h w] the index of the class mean [K C h w] at the least Euclidean distance."""
    samples, class_means = samples.flatten(1).float(), class_means.flatten(1).float()
    # Without the matrix product: it cancels digits, on a GPU of the ten bits that TF32 has.
    return torch.cdist(samples, class_means, compute_mode="donot_use_mm_for_euclid_dist").argmin(1)
