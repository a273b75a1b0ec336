"""Normalises latents: from moments to what the network sees, and from its samples back to what the decoder takes.

Moments `[B 2C h w]` are the mean and then the log-variance, as the encoder gives them. A latent `[B C h w]` is one draw
from them, normalised to about unit variance: what the network sees. Unscaled latents are what the VAE decodes.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gait_latents.common.errors import UserError

# Moments are stored in float16. A deviation below its relative resolution is rounding noise, and dividing by it would
# train the network on that noise.
FLOAT16_RESOLUTION = 2.0**-11
SMALLEST_SCALE = 1e-6  # a channel with a smaller deviation counts as constant, even around 0


@dataclass(frozen=True, eq=False)
class LatentNorm:
    """Shift and scale of each channel, which normalise an unscaled latent and undo that.

    normalised = (unscaled - shift) / scale

    Attributes:
        shift: float32 `[C]`.
        scale: float32 `[C]`, above 0.
    """

    shift: Tensor
    scale: Tensor

    def __post_init__(self):
        """Raises ValueError unless shift and scale are float32 vectors of one length."""
        if self.shift.ndim != 1 or self.shift.shape != self.scale.shape:
            raise ValueError(f"shift {list(self.shift.shape)} and scale {list(self.scale.shape)} are not both [C]")
        if self.shift.dtype != torch.float32 or self.scale.dtype != torch.float32:
            raise ValueError(f"shift is {self.shift.dtype} and scale {self.scale.dtype}, not float32")

    @classmethod
    def from_moments(cls, moments: Tensor) -> "LatentNorm":
        """Measures shift and scale on moments `[N 2C h w]`: mean and deviation of draws, over images and positions.

        The variance of a draw is that of the means and, on average, that of the posterior: Var(mean) + E(exp(logvar)).

        Raises:
            UserError: when a channel is constant or not finite, naming it.
            ValueError: for other shapes.
        """
        if moments.ndim != 4 or moments.shape[1] % 2 or not moments.numel():
            raise ValueError(f"moments must be [N 2C h w] and not empty, got shape {list(moments.shape)}")
        mean, logvar = moments.double().chunk(2, dim=1)  # each N C h w
        shift = mean.mean(dim=(0, 2, 3))  # C
        variance = mean.var(dim=(0, 2, 3), correction=0) + logvar.exp().mean(dim=(0, 2, 3))  # C
        scale = variance.sqrt()
        for channel, (center, spread) in enumerate(zip(shift.tolist(), scale.tolist(), strict=True)):
            _check_channel(channel, center, spread)
        return cls(shift.float(), scale.float())

    @classmethod
    def from_scale_factor(cls, channels: int, scale_factor: float, shift_factor: float) -> "LatentNorm":
        """Uses the VAE's own constants: normalised = (unscaled - shift_factor) * scale_factor in every channel.

        Raises:
            UserError: when they are no finite numbers, or the scale factor is not above 0.
        """
        if not (math.isfinite(scale_factor) and scale_factor > 0 and math.isfinite(shift_factor)):
            raise UserError(
                f"the VAE's scale_factor {scale_factor} and shift_factor {shift_factor} cannot normalise its latents;"
                " use latent_norm: moments, which measures them instead"
            )
        shift = torch.full((channels,), shift_factor, dtype=torch.float32)
        return cls(shift, torch.full((channels,), 1.0 / scale_factor, dtype=torch.float32))

    def to_latent(self, moments: Tensor, noise: Tensor) -> Tensor:
        """Draws normalised latents `[... C h w]` from moments `[... 2C h w]` with unit normal noise `[... C h w]`."""
        mean, logvar = self._split(moments)
        return self._normalise(mean + torch.exp(0.5 * logvar) * noise)

    def mean_latent(self, moments: Tensor) -> Tensor:
        """Returns the normalised posterior mean `[... C h w]` of moments `[... 2C h w]`."""
        mean, _ = self._split(moments)
        return self._normalise(mean)

    def to_unscaled(self, latents: Tensor) -> Tensor:
        """Undoes the normalisation: latents `[... C h w]` become what the VAE decodes."""
        self._check_channels(latents, len(self.shift))
        return latents * self.scale[:, None, None] + self.shift[:, None, None]

    def to(self, device: torch.device | str) -> "LatentNorm":
        """Returns the same numbers on another device."""
        return LatentNorm(self.shift.to(device), self.scale.to(device))

    def to_json(self) -> dict[str, list[float]]:
        """Returns plain lists that `from_json` reads back bit for bit."""
        # Sorted by name, as checkpoints store them: exporting from either must give the same bytes.
        return {"scale": self.scale.tolist(), "shift": self.shift.tolist()}

    @classmethod
    def from_json(cls, plain: dict[str, list[float]]) -> "LatentNorm":
        """Reads what `to_json` returned; raises ValueError on numbers that cannot be a normalisation."""
        norm = cls(
            torch.tensor(plain["shift"], dtype=torch.float32),
            torch.tensor(plain["scale"], dtype=torch.float32),
        )
        if not (norm.shift.isfinite().all() and norm.scale.isfinite().all() and (norm.scale > 0).all()):
            raise ValueError(f"not a latent normalisation: {plain}")
        return norm

    def _split(self, moments: Tensor) -> tuple[Tensor, Tensor]:
        self._check_channels(moments, 2 * len(self.shift))
        mean, logvar = moments.float().chunk(2, dim=-3)  # each ... C h w
        return mean, logvar

    def _normalise(self, unscaled: Tensor) -> Tensor:
        return (unscaled - self.shift[:, None, None]) / self.scale[:, None, None]

    def _check_channels(self, tensor: Tensor, channels: int) -> None:
        if tensor.ndim < 3 or tensor.shape[-3] != channels:
            raise ValueError(f"expected {channels} channels in dimension -3, got shape {list(tensor.shape)}")


def spread(moments: Tensor) -> float:
    """Returns the standard deviation of draws from moments `[N 2C h w]`, over all images, channels and positions.

    A scale factor of 1 / spread gives unit variance, as latent diffusion measures it.
    """
    mean, logvar = moments.double().chunk(2, dim=1)  # each N C h w
    return float((mean.var(correction=0) + logvar.exp().mean()).sqrt())


def _check_channel(channel: int, center: float, spread: float) -> None:
    if not (math.isfinite(center) and math.isfinite(spread)):
        raise UserError(f"channel {channel} of the moments is not finite (mean {center}, deviation {spread})")
    if is_constant(center, spread):
        raise UserError(
            f"channel {channel} of the moments is constant (mean {center:.4g}, deviation {spread:.2g}) over the images"
            " it is measured on: the VAE does not use it, or the images are all alike; use another VAE or"
            " latent_norm: scale_factor"
        )


def is_constant(center: float, spread: float) -> bool:
    """Says whether a channel with this mean and standard deviation varies less than float16 can resolve."""
    return spread <= max(SMALLEST_SCALE, FLOAT16_RESOLUTION * abs(center))
