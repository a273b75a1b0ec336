"""Decodes latents to images, in a faster number format where a trial shows that the images look the same."""

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from gait_latents.common import hardware, pictures
from gait_latents.common.console import warn
from gait_latents.vae import load
from gait_latents.vae.formats import Formats, layout
from gait_latents.vae.norm import LatentNorm

AS_GOOD_DB = 45.0  # from this PSNR on images look the same; rounding to 8 bits alone gives 59 dB
_TRIAL_SIZE = 16  # height and width of the latent with which a number format is tried


class ImageDecoder:
    """The decoder half of a VAE, from normalised latents to images: built when first needed and freed by `close`.

    Each latent is decoded by itself, so that an image does not depend on the images beside it. Whether the VAE fits the
    latents is asked before, in `latents/vae_fit.py`.

    Args:
        vae_path: a file, folder or hub id.
        norm: the normalisation of the latents, which is undone before decoding.
        device: where to decode.
        dtype: the number format to compute in. When the decoder is built, one other than float32 is tried and given up
            where its images would look different.
    """

    def __init__(
        self,
        vae_path: str,
        norm: LatentNorm,
        device: torch.device,
        *,
        dtype: torch.dtype = torch.float32,
        trust_pickle: bool = False,
    ) -> None:
        self.vae_path, self.norm, self.device, self.dtype = vae_path, norm.to(device), device, dtype
        self.trust_pickle = trust_pickle
        self._formats: Formats | None = None
        self._is_tried = dtype == torch.float32

    def __call__(self, samples: Tensor, between: Callable[[], None] = lambda: None) -> list[np.ndarray]:
        """Decodes normalised latents [B C h w] to B images, uint8 [S S 3]; raises UserError when there is no VAE.

        `between` is called before each image; what it raises ends the work.
        """
        return list(self.each(samples, between))

    def each(self, samples: Tensor, between: Callable[[], None] = lambda: None) -> Iterator[np.ndarray]:
        """Yields the images that a call gives, each as soon as it is decoded."""
        self.open()
        for latent in self.norm.to_unscaled(samples.to(self.device)):
            between()
            with torch.inference_mode():
                image = self._image(latent[None])
            yield image

    def _image(self, latent: Tensor) -> np.ndarray:
        """Decodes a latent, in float32 where the number format overflows, which a trial with noise may not show.

        The host waits once: whether all pixels are finite comes in the same copy as the image.
        """
        if self.dtype != torch.float32:
            pixels = self._pixels(latent, self.dtype)
            image = pictures.to_bytes(pixels)[0]
            *content, is_finite = (
                torch.cat([image.flatten(), pixels.isfinite().all().byte()[None]]).cpu().split([image.numel(), 1])
            )
            if is_finite:
                return content[0].view(image.shape).numpy()
        return pictures.to_uint8(self._pixels(latent, torch.float32))[0]

    def _pixels(self, latent: Tensor, dtype: torch.dtype) -> Tensor:
        """Decodes unscaled latents [B C h w] in a number format; returns float32 pixels [B 3 S S] in [0, 1]."""
        assert self._formats is not None  # `open` comes first
        with self._formats.at(dtype) as decoder:
            return decoder.decode(latent).float()

    def open(self) -> None:
        """Builds the decoder if there is none yet; raises UserError when there is no VAE."""
        if self._formats is None:
            hardware.allow_tf32()
            decoder = load.load_vae(
                self.vae_path,
                self.device,
                parts="decoder",
                memory_format=layout(self.device),
                trust_pickle=self.trust_pickle,
            )
            self._formats = Formats(decoder, self.device)
        if not self._is_tried:
            quality = self.quality()
            if quality < AS_GOOD_DB:
                name = str(self.dtype).removeprefix("torch.")
                warn(f"images are decoded in float32, as {name} would change them (PSNR {quality:.1f} dB)")
                self.dtype = torch.float32
            self._is_tried = True

    def go_on_in(self, dtype: torch.dtype) -> None:
        """Computes in this number format without a trial, as images that are already there were decoded."""
        self.dtype, self._is_tried = dtype, True

    @torch.inference_mode()
    def quality(self) -> float:
        """Decodes unit noise in `dtype` and in float32; returns the PSNR of the one against the other, in dB.

        There must be a decoder (`open`).
        """
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(1, len(self.norm.shift), _TRIAL_SIZE, _TRIAL_SIZE, generator=generator)
        latent = self.norm.to_unscaled(noise.to(self.device))
        exact, found = (self._pixels(latent, dtype) for dtype in (torch.float32, self.dtype))
        if not found.isfinite().all():
            return -math.inf
        return pictures.psnr(pictures.to_uint8(exact), pictures.to_uint8(found))

    def close(self) -> None:
        """Frees the VAE; a later call builds it again."""
        if self._formats is None:
            return
        self._formats = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
