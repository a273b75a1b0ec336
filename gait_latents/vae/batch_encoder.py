"""Encodes batches of images to moments, in the number format that is asked for."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gait_latents.common import hardware

Encode = Callable[[Tensor], Tensor]  # uint8 images [B S S 3] -> moments [B 2C h w] float32


class BatchEncoder:
    """Encodes images in calls of one fixed shape, with a VAE that is built at the first call.

    The fixed shape keeps a row's bits independent of the images beside it. On a CPU it is one image: what a call
    works on then stays in the processor's caches. Rows that come out not finite in a reduced precision are encoded
    again in float32.

    Args:
        load: builds the VAE (an object with `encode`) on the device.
        batch_size: images per call on a GPU; shorter calls are padded.
        dtype: number format of the encoder.
    """

    def __init__(self, load: Callable[[], Any], *, device: torch.device, batch_size: int, dtype: torch.dtype) -> None:
        self.load, self.device, self.dtype = load, device, dtype
        self.vae: Any = None  # what `load` gave; None until the first call
        self.batch_size = 1 if device.type == "cpu" else batch_size
        self.record = {
            "precision": str(dtype).removeprefix("torch."),
            "device": hardware.describe(device),
            "torch": torch.__version__,
        }

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        """Encodes uint8 images [B S S 3]; returns moments [B 2C h w] float32 on the CPU."""
        return torch.cat([self._encode_padded(part) for part in images.split(self.batch_size)])

    def _encode_padded(self, images: Tensor) -> Tensor:
        """Encodes up to `batch_size` images in a call of exactly so many."""
        padded = images.new_zeros(self.batch_size, *images.shape[1:])
        padded[: len(images)] = images
        # ToTensor divides by 255 in float32; multiplying by 1/255 gives other bits.
        pixels = padded.to(self.device).permute(0, 3, 1, 2).to(torch.float32) / 255  # B 3 S S, channels last in memory
        moments = self._encode(pixels, self.dtype)
        if self.dtype != torch.float32:
            bad = ~is_storable(moments)
            if bad.any():
                moments[bad] = self._encode(pixels, torch.float32)[bad]
        return moments[: len(images)].cpu()

    def _encode(self, pixels: Tensor, dtype: torch.dtype) -> Tensor:
        self.vae = self.vae or self.load()
        with hardware.autocast(self.device, dtype):
            return self.vae.encode(pixels).float()

    def close(self) -> None:
        """Frees the VAE; a later call builds it again."""
        self.vae = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def is_storable(moments: Tensor) -> Tensor:
    """Says of each row whether all its values are finite as float16."""
    return torch.isfinite(moments.to(torch.float16)).flatten(1).all(1)
