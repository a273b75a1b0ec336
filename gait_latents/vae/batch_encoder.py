"""Encodes batches of images to moments, in the number format that the settings ask for.

An image gets the same moments, bit for bit, whichever images are encoded with it.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gait_latents.common import hardware
from gait_latents.vae.formats import Formats, layout

_USUAL_SIZE = 256  # side of an image, in pixels
Encode = Callable[[Tensor], Tensor]  # uint8 images [B S S 3] -> moments [B 2C h w] float32


class BatchEncoder:
    """Encodes images in calls of one fixed shape, with a VAE that is built at the first call.

    Libraries compute batches of other sizes by other ways, with other rounding; with a fixed shape the moments of an
    image do not depend on the images beside it. The rounding also depends on the number of threads: an encoder keeps
    the number that torch has when it is made. On a CPU the shape is of one image, which is fastest, since what a call
    works on then stays in the processor's caches. Moments that float16 or bfloat16 cannot hold are computed again in
    float32.

    Args:
        load: builds the VAE, an object whose `encode` turns float32 images [B 3 S S] in [0, 1] into moments.
        device: where it encodes.
        batch_size: images of up to 256x256 per call on a GPU; of larger ones as many are encoded in several calls. A
            call with fewer is filled up with black ones.
        dtype: number format that the encoder computes in.

    Attributes:
        record: how moments are made here (precision, device, version of torch), to be stored beside them.
    """

    def __init__(self, load: Callable[[], Any], *, device: torch.device, batch_size: int, dtype: torch.dtype) -> None:
        self.load, self.device, self.dtype = load, device, dtype
        self._formats: Formats | None = None  # of what `load` gave; None until the first call
        self.batch_size = 1 if device.type == "cpu" else batch_size
        self.num_threads = torch.get_num_threads()
        self.record = {
            "precision": str(dtype).removeprefix("torch."),
            "device": hardware.describe(device),
            "torch": torch.__version__,
        }

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        """Encodes uint8 images [B S S 3]; returns moments [B 2C h w] float32 on the CPU."""
        with hardware.threads(self.num_threads):
            size = self._call_size(images.shape[1])
            return torch.cat([self._encode_padded(part, size) for part in images.split(size)])

    def _call_size(self, image_size: int) -> int:
        num_calls = math.ceil(image_size**2 / _USUAL_SIZE**2)
        return math.ceil(self.batch_size / num_calls)

    def _encode_padded(self, images: Tensor, size: int) -> Tensor:
        """Encodes at most `size` images [B S S 3] in a call of exactly so many."""
        # Of pinned memory, which torch keeps until it is copied, so that the host need not wait for the copy.
        padded = torch.zeros(size, *images.shape[1:], dtype=images.dtype, pin_memory=self.device.type == "cuda")
        padded[: len(images)] = images
        # ToTensor divides by 255 in float32; multiplying by 1/255 gives other bits.
        sent = padded.to(self.device, non_blocking=True)
        pixels = (sent.permute(0, 3, 1, 2).to(torch.float32) / 255).contiguous(memory_format=layout(self.device))
        moments = self._encode(pixels, self.dtype)
        if self.dtype == torch.float32:
            return moments[: len(images)].cpu()
        # In one copy, for which the host waits once: the moments, and behind each whether they can be stored.
        together = torch.cat([moments.flatten(1), is_storable(moments)[:, None].float()], dim=1).cpu()
        found, good = together[:, :-1].reshape(moments.shape), together[:, -1].bool()
        if not good.all():
            found[~good] = self._encode(pixels, torch.float32).cpu()[~good]
        return found[: len(images)]

    def _encode(self, pixels: Tensor, dtype: torch.dtype) -> Tensor:
        """Encodes pixels [B 3 S S] in a number format; returns moments float32."""
        self._formats = self._formats or Formats(self.load(), self.device)
        with self._formats.at(dtype) as vae:
            return vae.encode(pixels).float()

    def close(self) -> None:
        """Frees the VAE; a later call builds it again."""
        if self._formats is None:
            return
        self._formats = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def is_storable(moments: Tensor) -> Tensor:
    """Says for each image of moments [B 2C h w] whether all its values are finite as float16, bool [B]."""
    return torch.isfinite(moments.to(torch.float16)).flatten(1).all(1)
