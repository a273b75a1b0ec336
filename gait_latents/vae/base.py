"""What every VAE here has in common: identity, pixel range, scale and shift factor, encoding to moments, decoding.

An image becomes moments, mean and log-variance of a normal distribution for each latent value. A latent is a draw from
it. An *unscaled* latent is as the encoder makes it, which the decoder takes, before any normalisation.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gait_latents.common.errors import UserError
from gait_latents.vae.weight_files import printable

Parts = Literal["both", "encoder", "decoder"]
LDM_SCALE_FACTOR = 0.18215  # of latent diffusion and Stable Diffusion 1 and 2 (Rombach et al. 2022)
LOGVAR_RANGE = (-30.0, 20.0)  # to which log-variances are clamped, as in latent diffusion and diffusers
# The values that a network of each style takes for black and white; `network.py` says what the styles are.
PIXEL_RANGES: dict[str, tuple[float, float]] = {"kl": (0.0, 1.0), "ldm": (-1.0, 1.0)}
# How the names of the tensors of each half of a VAE begin.
HALVES = {"encoder": ("encoder.", "quant_conv."), "decoder": ("decoder.", "post_quant_conv.")}


@dataclass(frozen=True)
class VAEIdentity:
    """Which latents a VAE makes, and the constants that its makers gave.

    Attributes:
        fingerprint: plain values that name the encoder: digest of its weights, architecture, pixel range. VAEs with
            equal fingerprints make the same moments; the decoder has no part in it.
        latent_channels: C.
        downsampling: how many times smaller a latent is than the image, along each side.
        scale_factor, shift_factor: the makers' normalisation: latent = (z - shift_factor) * scale_factor.
        kind: what kind of VAE this is, where in its file it was found, and what was left out there; for people to read.
        factors_are_assumed: whether the file names no scale_factor, so that the usual one of its family is taken.
    """

    fingerprint: dict[str, Any]
    latent_channels: int
    downsampling: int
    scale_factor: float
    shift_factor: float
    kind: str = field(default="KL-VAE", compare=False)
    factors_are_assumed: bool = field(default=False, compare=False)

    def describe(self) -> str:
        """Returns one line that says how the VAE was understood."""
        low, high = self.fingerprint["pixel_range"]
        factors = describe_factors(self.scale_factor, self.shift_factor, are_assumed=self.factors_are_assumed)
        family, *rest = self.kind.split("; ")
        facts = (
            f"{self.latent_channels} channels, {self.downsampling}x smaller, pixels in [{low:g}, {high:g}], {factors}"
        )
        return "; ".join([f"{family}, {facts}", *rest])


def describe_factors(scale_factor: float, shift_factor: float, *, are_assumed: bool) -> str:
    """Returns the normalisation of a VAE in words, such as "scale_factor 0.3611 and shift_factor 0.1159"."""
    shift = f" and shift_factor {shift_factor:g}" if shift_factor else ""
    return f"scale_factor {scale_factor:g}{shift}{' (assumed, as the file names none)' if are_assumed else ''}"


class VAE(nn.Module):
    """Encodes images `[B 3 S S]` in [0, 1] to moments `[B 2C h w]`, decodes unscaled latents `[B C h w]`.

    Attributes:
        latent_channels, downsampling, scale_factor, shift_factor: see `VAEIdentity`.
        pixel_range: the values that the network takes for black and white.
        known_identity: the identity read from the file; None where the weights came from no file.
    """

    latent_channels: int
    downsampling: int
    scale_factor: float
    shift_factor: float
    pixel_range: tuple[float, float]
    known_identity: VAEIdentity | None = None

    def moments(self, pixels: Tensor) -> Tensor:
        """Returns mean and log-variance `[B 2C h w]` of pixels in `pixel_range`, both in `dtype`."""
        raise NotImplementedError

    def pixels(self, latents: Tensor) -> Tensor:
        """Returns pixels `[B 3 S S]` about `pixel_range` from latents `[B C h w]`, both in `dtype`."""
        raise NotImplementedError

    def identify(self) -> VAEIdentity:
        """Returns the identity of the weights as they are now."""
        raise NotImplementedError

    def encode(self, images: Tensor) -> Tensor:
        """Returns float32 moments `[B 2C h w]`, mean then log-variance, of images `[B 3 S S]` in [0, 1]."""
        low, high = self.pixel_range
        mean, logvar = self.moments((images * (high - low) + low).to(self.dtype)).float().chunk(2, dim=1)
        return torch.cat([mean, logvar.clamp(*LOGVAR_RANGE)], dim=1)  # B 2C h w

    def decode_raw(self, latents: Tensor) -> Tensor:
        """Returns float32 images `[B 3 S S]` from unscaled latents `[B C h w]`, not clamped to [0, 1]."""
        low, high = self.pixel_range
        return (self.pixels(latents.to(self.dtype)).float() - low) / (high - low)

    def decode(self, latents: Tensor) -> Tensor:
        """Returns float32 images `[B 3 S S]` in [0, 1] from unscaled latents `[B C h w]`."""
        return self.decode_raw(latents).clamp(0.0, 1.0)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights, in which the network computes."""
        return next(self.parameters()).dtype

    @property
    def identity(self) -> VAEIdentity:
        """The identity read from the file, or that of the present weights where they came from no file."""
        return self.known_identity or self.identify()

    @property
    def fingerprint(self) -> dict[str, Any]:
        """The part of the identity that names the encoder: plain values, which can be stored as JSON."""
        return self.identity.fingerprint

    @property
    def num_parameters(self) -> int:
        """How many weights are in memory; of one half alone where only that was loaded."""
        return sum(parameter.numel() for parameter in self.parameters())

    def describe(self) -> str:
        """Returns one line for a log."""
        low, high = self.pixel_range
        return (
            f"{self.name_for_log()}, {self.num_parameters / 1e6:.2f} M parameters, "
            f"{self.latent_channels} channels, {self.downsampling}x down, pixels in [{low:g}, {high:g}]"
        )

    def name_for_log(self) -> str:
        """Returns what kind of VAE this is, in a few words."""
        raise NotImplementedError


class LeftOut(nn.Module):
    """Stands in the place of a half that was not loaded; a call raises RuntimeError, which says so."""

    def __init__(self, name: str):
        super().__init__()
        self.name = name

    def forward(self, *_: Any) -> Tensor:
        raise RuntimeError(f"this VAE was loaded without its {self.name}; load it with parts='both'")


def split_halves(parts: Parts) -> list[str]:
    """Returns the names of the halves that are to be loaded."""
    return [half for half in HALVES if parts in ("both", half)]


def leave_out(model: nn.Module, halves: Sequence[str]) -> None:
    """Replaces the modules of the halves that are not named by `LeftOut`, which frees their memory."""
    for half in HALVES.keys() - set(halves):
        for name in (prefix.rstrip(".") for prefix in HALVES[half]):
            if getattr(model, name, None) is not None:
                setattr(model, name, LeftOut(half))


def fingerprint_of(
    tensors: Mapping[str, Tensor], architecture: dict[str, Any], pixel_range: tuple[float, float]
) -> dict[str, Any]:
    """Returns the fingerprint of an encoder (see `VAEIdentity`).

    Args:
        tensors: the weights by name; those of a decoder among them are left out.
        architecture: plain values that describe the network.
        pixel_range: the values that it takes for black and white.
    """
    encoder = {name: tensor for name, tensor in tensors.items() if name.startswith(HALVES["encoder"])}
    return {
        "weights": weights_digest(encoder),
        "architecture": architecture,
        "pixel_range": list(pixel_range),
    }


def weights_digest(tensors: Mapping[str, Tensor]) -> str:
    """Returns the SHA-256 (hex) over name, shape and little-endian float32 bytes of each tensor, sorted by name."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        array = tensors[name].detach().to("cpu", torch.float32).contiguous().numpy()
        digest.update(json.dumps([name, list(array.shape)]).encode() + b"\n")
        digest.update(array.astype("<f4", copy=False).data)
    return digest.hexdigest()


def check_positive(path: Path, name: str, value: Any) -> float:
    """Returns a value out of a file as a finite number above 0; raises UserError, naming file and value, for others."""
    number = to_number(value)
    if not (math.isfinite(number) and number > 0):
        shown = printable(repr(value)) if isinstance(value, (float, str)) else f"a {type(value).__name__}"
        shown = str(value) if isinstance(value, int) and math.isfinite(number) else shown
        raise UserError(f"{path}: {name} is {shown}; it must be a number above 0")
    return number


def check_number(path: Path, name: str, value: Any) -> float:
    """Returns a value out of a file as a finite number; raises UserError, naming file and value, for others."""
    number = to_number(value)
    if not math.isfinite(number):
        raise UserError(f"{path}: {name} is {printable(repr(value))}; it must be a number")
    return number


def to_number(value: Any) -> float:
    """Returns a value out of a file as a float, NaN where it is no number."""
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return math.nan


def first_line(error: Exception) -> str:
    """Returns the first line of an error's message, as it may be printed."""
    return printable((str(error).strip().splitlines() or [type(error).__name__])[0])
