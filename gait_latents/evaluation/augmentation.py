"""The obvious ways to make more of few spectrograms while a classifier is trained: shifts, masks, noise and mixing.

Time runs along the width and Doppler frequency along the height. Images are [B S S 3] in levels from 0 to 255; targets
are the probabilities of the classes [B K].
"""

from dataclasses import asdict, dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Augmentation:
    """Changes the images of a batch, each by its own draws.

    Attributes:
        time_shift: images are moved along the width by up to this share of it; the edge column fills the gap.
        doppler_shift: images are moved along the height by up to this share of it; the edge row fills the gap.
        time_mask, doppler_mask: one band of columns and one of rows, up to this share wide, take the mean colour of
            the image (SpecAugment, Park et al. 2019).
        noise: standard deviation of normal noise on each value, in levels.
        mixup: two images are mixed, and their targets alike, by a share from the beta distribution with both
            parameters of this value (Zhang et al. 2018); 0 mixes none.
    """

    time_shift: float = 1 / 8
    doppler_shift: float = 1 / 32
    time_mask: float = 1 / 4
    doppler_mask: float = 1 / 8
    noise: float = 8.0
    mixup: float = 0.2

    def scaled(self, strength: float) -> "Augmentation":
        """Returns an augmentation that is so many times as strong; 0 changes nothing."""
        return Augmentation(**{name: strength * value for name, value in asdict(self).items()})

    def __call__(self, images: Tensor, targets: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Returns the changed images, float32, and their targets; everything random comes from the generator."""
        images = shift(images.float(), self.time_shift, dim=2, generator=generator)
        images = shift(images, self.doppler_shift, dim=1, generator=generator)
        colour = images.mean((1, 2), keepdim=True)
        for share, dim in ((self.time_mask, 2), (self.doppler_mask, 1)):
            images = torch.where(band(images, share, dim=dim, generator=generator), colour, images)
        if self.noise:
            images = images + self.noise * torch.randn(images.shape, generator=generator)
        return mix(images, targets, self.mixup, generator) if self.mixup else (images, targets)


def shift(images: Tensor, share: float, *, dim: int, generator: torch.Generator) -> Tensor:
    """Moves each image along a dimension (1 or 2) by its own whole number of places, up to a share of them."""
    size = images.shape[dim]
    most = int(size * share)
    places = torch.randint(-most, most + 1, (len(images), 1), generator=generator)
    index = (torch.arange(size) + places).clamp(0, size - 1)  # B S
    index = index[:, None, :, None] if dim == 2 else index[:, :, None, None]
    return images.gather(dim, index.expand(images.shape))


def band(images: Tensor, share: float, *, dim: int, generator: torch.Generator) -> Tensor:
    """Draws one band for each image across a dimension (1 or 2); returns whether each place lies in it, bool.

    Its width is evenly distributed over the whole numbers from 0 up to the share, and its place over where it fits.
    """
    size = images.shape[dim]
    widths = torch.randint(0, int(size * share) + 1, (len(images), 1), generator=generator)
    first = (torch.rand(len(images), 1, generator=generator) * (size - widths + 1)).long()
    at = torch.arange(size)
    inside = (at >= first) & (at < first + widths)  # B S
    return inside[:, None, :, None] if dim == 2 else inside[:, :, None, None]


def mix(images: Tensor, targets: Tensor, alpha: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Mixes each image, and its targets, with those of another of the batch, which is drawn without replacement."""
    shares = beta(alpha, len(images), generator)
    others = torch.randperm(len(images), generator=generator)

    def mixed(values: Tensor) -> Tensor:
        share = shares.reshape(-1, *[1] * (values.ndim - 1)).to(values.dtype)
        return share * values + (1 - share) * values[others]

    return mixed(images), mixed(targets)


def beta(alpha: float, count: int, generator: torch.Generator) -> Tensor:
    """Draws from the beta distribution with both parameters `alpha`, float64 [count] (Jöhnk 1964).

    torch's own draws from it take no generator. For alpha of 1 or less at least half of the trials are kept.
    """
    found = torch.empty(0, dtype=torch.float64)
    while len(found) < count:
        # U^(1/a) as a logarithm, so that small values of alpha do not end in 0 / 0.
        logs = torch.rand(2, 2 * count, generator=generator, dtype=torch.float64).log() / alpha
        total = torch.logaddexp(logs[0], logs[1])
        found = torch.cat([found, (logs[0] - total).exp()[total <= 0]])
    return found[:count]
