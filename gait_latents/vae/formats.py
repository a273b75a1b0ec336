"""How a VAE computes on a device: how its weights lie in memory, and in which number format they are.

On a CPU the channels come last, and other number formats than float32 are those of autocast. On a GPU the channels come
first: torch's GroupNorm for GPUs writes nothing else, so that with the channels last each norm, and each convolution
after it, would turn its input round. And the weights themselves are in the number format there: autocast would keep
norms and activations in float32, which moves twice the bytes, and convert the input of every convolution.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from gait_latents.common import hardware
from gait_latents.vae.base import VAE


def layout(device: torch.device) -> torch.memory_format:
    """Returns the memory format that a VAE has on a device; another one changes only speed and rounding.

    On a CPU it was measured to be the faster one; on a GPU no speed was measured yet.
    """
    return torch.channels_last if device.type == "cpu" else torch.contiguous_format


class Formats:
    """A VAE in float32 and, on a GPU, a copy of it in each other number format that was asked for.

    Args:
        vae: in float32.
        device: where it is.
    """

    def __init__(self, vae: VAE, device: torch.device) -> None:
        self.device = device
        self._copies = {torch.float32: vae}

    @contextmanager
    def at(self, dtype: torch.dtype) -> Iterator[VAE]:
        """Gives the VAE that computes in a number format within the block; what it returns is float32."""
        if self.device.type == "cpu":
            with hardware.autocast(self.device, dtype):
                yield self._copies[torch.float32]
            return
        if dtype not in self._copies:
            self._copies[dtype] = copy.deepcopy(self._copies[torch.float32]).to(dtype)
        yield self._copies[dtype]
