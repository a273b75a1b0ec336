"""The KL-VAE that users bring: images to moments, latents to images.

Two families behind one interface. Family A is a checkpoint file with LDM-style names, which `KLVAE` builds;
family B is a diffusers autoencoder with a posterior. `load_vae` returns either; `read_identity` says which
latents an encoder makes, from its tensors, without building it.

Shapes: B batch, S image size, C latent channels, h = w = S / downsampling; inside the network c channels, and
z between the encoder and `quant_conv`.
"""

import hashlib
import json
import math
import re
import socket
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import durable
from config import UserError
from weight_files import SUFFIXES, check_finite, check_tensor, kind_of, printable, read_weights

Style = Literal["kl", "ldm"]
Parts = Literal["both", "encoder", "decoder"]

LDM_SCALE_FACTOR = 0.18215
LOGVAR_RANGE = (-30.0, 20.0)
NORM_GROUPS = 32
NORM_EPS = 1e-6
PIXEL_RANGES: dict[str, tuple[float, float]] = {"kl": (0.0, 1.0), "ldm": (-1.0, 1.0)}
HALVES = {"encoder": ("encoder.", "quant_conv."), "decoder": ("decoder.", "post_quant_conv.")}


# --- what every VAE here offers -----------------------------------------------------------------------------


@dataclass(frozen=True)
class VAEIdentity:
    """What makes the latents of a VAE what they are, and the constants that its makers gave them."""

    fingerprint: dict[str, Any]
    latent_channels: int
    downsampling: int
    scale_factor: float
    shift_factor: float


class VAE(nn.Module):
    """Encodes images `[B 3 S S]` in [0, 1] to moments `[B 2C h w]`, decodes unscaled latents `[B C h w]`."""

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
        """The JSON-able part of the identity that names the latent space."""
        return self.identity.fingerprint

    @property
    def num_parameters(self) -> int:
        """The number of weights in memory: of one half only, if only one was loaded."""
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
    """Stands where a half was not loaded, and says so when called."""

    def __init__(self, name: str):
        super().__init__()
        self.name = name

    def forward(self, *_: Any) -> Tensor:
        raise RuntimeError(f"this VAE was loaded without its {self.name}; load it with parts='both'")


def _halves(parts: Parts) -> list[str]:
    return [half for half in HALVES if parts in ("both", half)]


def _leave_out(model: nn.Module, halves: Sequence[str]) -> None:
    """Replaces the modules of the halves that are not named."""
    for half in HALVES.keys() - set(halves):
        for name in (prefix.rstrip(".") for prefix in HALVES[half]):
            if getattr(model, name, None) is not None:
                setattr(model, name, LeftOut(half))


# --- family A: the network ----------------------------------------------------------------------------------


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(NORM_GROUPS, channels, eps=NORM_EPS)


class ResidualBlock(nn.Module):
    """Adds two normalised 3x3 convolutions to its input, `[B c_in h w]` to `[B c_out h w]`."""

    def __init__(self, channels_in: int, channels_out: int):
        super().__init__()
        self.norm1 = _norm(channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.norm2 = _norm(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        changes_width = channels_in != channels_out
        self.nin_shortcut = nn.Conv2d(channels_in, channels_out, 1) if changes_width else None

    def forward(self, x: Tensor) -> Tensor:
        residual = self.conv1(F.silu(self.norm1(x)))
        residual = self.conv2(F.silu(self.norm2(residual)))
        return residual + (x if self.nin_shortcut is None else self.nin_shortcut(x))


class Attention(nn.Module):
    """Adds single-head self-attention over all positions, scaled by `c ** -0.5`, `[B c h w]` to the same."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = _norm(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        q, k, v = (layer(normed).flatten(2).mT[:, None] for layer in (self.q, self.k, self.v))  # B 1 hw c
        attended = F.scaled_dot_product_attention(q, k, v)  # B 1 hw c
        return x + self.proj_out(attended[:, 0].mT.reshape(x.shape))  # B c h w


class LDMDownsample(nn.Module):
    """Halves the resolution as the original LDM does: a stride 2 convolution padded right and bottom only."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class LDMUpsample(nn.Module):
    """Doubles the resolution as the original LDM does: nearest neighbour, then a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def _downsample(channels: int, style: Style) -> nn.Module:
    return LDMDownsample(channels) if style == "ldm" else nn.Conv2d(channels, channels, 3, stride=2, padding=1)


def _upsample(channels: int, style: Style) -> nn.Module:
    if style == "ldm":
        return LDMUpsample(channels)
    return nn.ConvTranspose2d(channels, channels, 4, stride=2, padding=1)


class Level(nn.Module):
    """One resolution: residual blocks, then the change to the next resolution where there is one."""

    def __init__(self, channels_in: int, channels_out: int, num_blocks: int):
        super().__init__()
        widths = [channels_in] + [channels_out] * num_blocks
        self.block = nn.ModuleList(ResidualBlock(a, b) for a, b in pairwise(widths))
        self.downsample: nn.Module | None = None
        self.upsample: nn.Module | None = None

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        for resample in (self.downsample, self.upsample):
            x = x if resample is None else resample(x)
        return x


class Middle(nn.Module):
    """Residual block, attention, residual block at the coarsest resolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.block_1 = ResidualBlock(channels, channels)
        self.attn_1 = Attention(channels)
        self.block_2 = ResidualBlock(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    """Maps images `[B 3 S S]` to `[B 2z h w]`, before `quant_conv`."""

    def __init__(self, stem: int, widths: Sequence[int], num_blocks: int, z_channels: int, style: Style):
        super().__init__()
        self.conv_in = nn.Conv2d(3, stem, 3, padding=1)
        inputs = [stem, *widths[:-1]]
        self.down = nn.ModuleList(Level(a, b, num_blocks) for a, b in zip(inputs, widths, strict=True))
        for level, channels in zip(self.down[:-1], widths[:-1], strict=True):
            level.downsample = _downsample(channels, style)
        self.mid = Middle(widths[-1])
        self.norm_out = _norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 2 * z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)  # B width S S
        for level in self.down:
            x = level(x)
        x = self.mid(x)  # B c h w
        return self.conv_out(F.silu(self.norm_out(x)))  # B 2z h w


class Decoder(nn.Module):
    """Maps `[B z h w]` after `post_quant_conv` to `[B 3 S S]`; levels are numbered from the finest."""

    def __init__(self, widths: Sequence[int], num_blocks: int, z_channels: int, style: Style):
        super().__init__()
        self.conv_in = nn.Conv2d(z_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1])
        inputs = [*widths[1:], widths[-1]]
        self.up = nn.ModuleList(Level(a, b, num_blocks + 1) for a, b in zip(inputs, widths, strict=True))
        for level, channels in zip(self.up[1:], widths[1:], strict=True):
            level.upsample = _upsample(channels, style)
        self.norm_out = _norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid(self.conv_in(x))  # B c h w
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))  # B 3 S S


class KLVAE(VAE):
    """A convolutional VAE with the tensor names of LDM, in the plain ("kl") or the original ("ldm") style."""

    def __init__(
        self,
        *,
        width: int,
        multipliers: Sequence[int],
        num_blocks: int,
        embed_dim: int,
        z_channels: int | None = None,
        style: Style,
        scale_factor: float,
    ):
        super().__init__()
        z_channels = embed_dim if z_channels is None else z_channels
        widths = [width * multiplier for multiplier in multipliers]
        self.width, self.widths, self.num_blocks, self.z_channels = width, widths, num_blocks, z_channels
        self.style: Style = style
        self.ignored: tuple[str, ...] = ()
        self.pixel_range = PIXEL_RANGES[style]
        self.scale_factor, self.shift_factor = scale_factor, 0.0
        self.latent_channels, self.downsampling = embed_dim, 2 ** (len(widths) - 1)
        self.encoder = Encoder(width, widths, num_blocks, z_channels, style)
        self.decoder = Decoder(widths, num_blocks, z_channels, style)
        self.quant_conv = nn.Conv2d(2 * z_channels, 2 * embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, z_channels, 1)

    def moments(self, pixels: Tensor) -> Tensor:
        """Returns mean and log-variance `[B 2C h w]`, the log-variance not yet clamped."""
        return self.quant_conv(self.encoder(pixels))

    def pixels(self, latents: Tensor) -> Tensor:
        """Returns `[B 3 S S]` about `pixel_range`."""
        return self.decoder(self.post_quant_conv(latents))

    def name_for_log(self) -> str:
        """Returns the style, the widths and the depth."""
        ignored = f" (beside it, ignored: {', '.join(self.ignored[:5])})" if self.ignored else ""
        blocks = f"{self.num_blocks} blocks per level"
        return f"KL-VAE{ignored} of {self.style} style, widths {tuple(self.widths)}, {blocks}"

    def identify(self) -> VAEIdentity:
        """Returns the identity of the weights as they are now; the decoder has no part in it."""
        return self.identity_of(self.state_dict())

    def identity_of(self, tensors: Mapping[str, Tensor]) -> VAEIdentity:
        """Returns the identity that this network has with other weights in it, whatever device it is on."""
        architecture = {
            "family": "kl-vae",
            "style": self.style,
            "stem_width": self.width,
            "widths": self.widths,
            "num_blocks": self.num_blocks,
            "z_channels": self.z_channels,
            "latent_channels": self.latent_channels,
            "downsampling": self.downsampling,
        }
        return VAEIdentity(
            _fingerprint(tensors, architecture, self.pixel_range),
            self.latent_channels,
            self.downsampling,
            self.scale_factor,
            self.shift_factor,
        )


# --- identity -----------------------------------------------------------------------------------------------


def _fingerprint(
    tensors: Mapping[str, Tensor], architecture: dict[str, Any], pixel_range: tuple[float, float]
) -> dict[str, Any]:
    encoder = {name: tensor for name, tensor in tensors.items() if name.startswith(HALVES["encoder"])}
    return {
        "weights": weights_digest(encoder),
        "architecture": architecture,
        "pixel_range": list(pixel_range),
    }


def weights_digest(tensors: Mapping[str, Tensor]) -> str:
    """Returns the SHA-256 (hex) over name, shape and little-endian float32 bytes, in the order of names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        array = tensors[name].detach().to("cpu", torch.float32).contiguous().numpy()
        digest.update(json.dumps([name, list(array.shape)]).encode() + b"\n")
        digest.update(array.astype("<f4", copy=False).data)
    return digest.hexdigest()


# --- family A: finding the VAE in a checkpoint --------------------------------------------------------------

WEIGHT_KEYS = ("model_state_dict", "vae_state_dict", "state_dict", "vae", "model", "ema_state_dict", "ema")
WRAPPERS = ("module", "_orig_mod")
LANDMARK = "encoder.conv_in.weight"
MOST_LEVELS = 32  # and blocks in each; what people use is four levels of two


@dataclass(frozen=True)
class Found:
    """The tensors of a KL-VAE in a checkpoint, under the names that `KLVAE` gives them."""

    path: Path
    tensors: dict[str, Tensor]
    scale_factor: float
    is_ldm_checkpoint: bool  # it was one model of several, as in a full LDM or Stable Diffusion checkpoint
    ignored: tuple[str, ...]  # first words of the names beside it that are no part of it, such as "loss"

    def half(self, half: str) -> dict[str, Tensor]:
        """Returns the tensors of "encoder" or "decoder", their quantising convolution included."""
        return {name: t for name, t in self.tensors.items() if name.startswith(HALVES[half])}

    def size(self, name: str, axis: int = 0) -> int:
        """Returns one side of a tensor that the architecture is read from."""
        tensor = self.tensors.get(name)
        if tensor is None or tensor.ndim != 4 or 0 in tensor.shape:
            there = "is missing" if tensor is None else f"is {tuple(tensor.shape)}, no convolution"
            raise UserError(f"{self.path} is not a KL-VAE of the known architecture: {name} {there}")
        return tensor.shape[axis]

    def count(self, prefix: str) -> int:
        """Returns how many different words follow a prefix."""
        return len({name[len(prefix) :].split(".")[0] for name in self.tensors if name.startswith(prefix)})


def _state_dicts(tree: Mapping[Any, Any], depth: int = 2, seen: set[int] | None = None) -> Iterator[Mapping[Any, Any]]:
    """Yields a mapping and the mappings in it, those under the usual names first, each once.

    A small pickle can hold one mapping a million times in a mapping that it holds a million times.
    """
    seen = set() if seen is None else seen
    seen.add(id(tree))
    yield tree
    by_rank = sorted(tree, key=lambda key: WEIGHT_KEYS.index(key) if key in WEIGHT_KEYS else len(WEIGHT_KEYS))
    for key in by_rank if depth else ():
        if isinstance(tree[key], Mapping) and id(tree[key]) not in seen:
            yield from _state_dicts(tree[key], depth - 1, seen)


def _unwrapped(state: Mapping[Any, Any]) -> dict[str, Any]:
    """Returns a state dict without what DistributedDataParallel and torch.compile put into its names."""
    named = ((printable(key).split("."), value) for key, value in state.items() if isinstance(key, str))
    return {".".join(word for word in words if word not in WRAPPERS): value for words, value in named}


def _vae_prefix(names: Sequence[str]) -> str | None:
    prefixes = {n.removesuffix(LANDMARK) for n in names if n == LANDMARK or n.endswith("." + LANDMARK)}
    if "first_stage_model." in prefixes:
        return "first_stage_model."
    return min(prefixes, key=lambda prefix: (len(prefix), prefix), default=None)


def _find_vae(path: Path, checkpoint: Any, metadata: Mapping[str, Any]) -> Found:
    """Returns the KL-VAE of a checkpoint, whatever it is wrapped in; other models in it are ignored."""
    trees = list(_state_dicts(checkpoint)) if isinstance(checkpoint, Mapping) else []
    for tree in trees:
        state = _unwrapped(tree)
        prefix = _vae_prefix(list(state))
        if prefix is not None:
            inside = {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}
            _refuse_other_vaes(path, inside)
            tensors = {k: t for k, t in inside.items() if k.startswith(HALVES["encoder"] + HALVES["decoder"])}
            for name, tensor in tensors.items():
                check_tensor(path, name, tensor)
            return Found(
                path,
                tensors,
                _scale_factor(path, (metadata, *trees[:1], tree, inside)),
                is_ldm_checkpoint=prefix == "first_stage_model.",
                ignored=tuple(sorted({name.split(".")[0] for name in inside.keys() - tensors.keys()})),
            )
    names = [printable(key) for tree in trees for key, value in tree.items() if isinstance(value, Tensor)]
    there = f"; it has {len(names)} others, such as {', '.join(names[:3])}" if names else ""
    raise UserError(f"{path} is not a KL-VAE: it has no tensor {LANDMARK}{there}")


def _refuse_other_vaes(path: Path, names: Iterable[str]) -> None:
    """Raises for VAEs that share the first name with this architecture, but are known to be others."""
    for name in names:
        if name.startswith("encoder.down_blocks."):
            raise UserError(f"{path} is from diffusers; give the folder that holds it and its config.json")
        if name.startswith("quantize."):
            raise UserError(f"{path} is a vector-quantised VAE (it has {name}), so it has no moments")


def _scale_factor(path: Path, places: Iterable[Mapping[Any, Any]]) -> float:
    values = [place["scale_factor"] for place in places if "scale_factor" in place]
    return _positive(path, "scale_factor", values[0] if values else LDM_SCALE_FACTOR)


def _positive(path: Path, name: str, value: Any) -> float:
    number = _number(value)
    if not (math.isfinite(number) and number > 0):
        shown = printable(repr(value)) if isinstance(value, (float, str)) else f"a {type(value).__name__}"
        shown = str(value) if isinstance(value, int) and math.isfinite(number) else shown
        raise UserError(f"{path}: {name} is {shown}; it must be a number above 0")
    return number


def _number(value: Any) -> float:
    """Returns a value out of a file as a float, NaN where it is none."""
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return math.nan


def _style(found: Found) -> Style:
    """Returns the style from the names of the layers between the levels."""
    plain = any(re.search(r"\.(down|up)sample\.weight$", name) for name in found.tensors)
    nested = any(re.search(r"\.(down|up)sample\.conv\.weight$", name) for name in found.tensors)
    return "ldm" if nested or (found.is_ldm_checkpoint and not plain) else "kl"


def _empty_vae(found: Found) -> KLVAE:
    """Returns the network that the shapes ask for, on the meta device."""
    stem, z_channels = found.size(LANDMARK), found.size("encoder.conv_out.weight") // 2
    has_quant_conv = "quant_conv.weight" in found.tensors
    embed_dim = found.size("quant_conv.weight") // 2 if has_quant_conv else z_channels
    levels, num_blocks = range(found.count("encoder.down.")), found.count("encoder.down.0.block.")
    if max(len(levels), num_blocks) > MOST_LEVELS:  # their product could be more than the memory holds
        raise UserError(
            f"{found.path} is not a KL-VAE of the known architecture: {len(levels)} levels, {num_blocks} blocks in each"
        )
    widths = [found.size(f"encoder.down.{i}.block.0.conv1.weight") for i in levels]
    odd = [width for width in (stem, *widths) if width % NORM_GROUPS or width % stem]
    if odd or not widths:
        raise UserError(
            f"{found.path} is not a KL-VAE of the known architecture: its widths {stem}, then {widths} are "
            f"not all multiples of {NORM_GROUPS} (groups of its normalisation) and of the first"
        )
    with torch.device("meta"):
        return KLVAE(
            width=stem,
            multipliers=[width // stem for width in widths],
            num_blocks=num_blocks,
            embed_dim=embed_dim,
            z_channels=z_channels,
            style=_style(found),
            scale_factor=found.scale_factor,
        )


def _check_architecture(found: Found, network: KLVAE, halves: Sequence[str]) -> None:
    """Raises and names the first tensors that the network and the file do not agree on."""
    prefixes = tuple(prefix for half in halves for prefix in HALVES[half])
    wanted = {k: tuple(v.shape) for k, v in network.state_dict().items() if k.startswith(prefixes)}
    given = {k: tuple(v.shape) for k, v in found.tensors.items() if k.startswith(prefixes)}
    for half in halves:
        if not found.half(half):
            raise UserError(f"{found.path} holds no {half} of a KL-VAE; give the whole checkpoint")
    problems = [f"{k} is {given[k]}, not {wanted[k]}" for k in wanted if k in given and given[k] != wanted[k]]
    problems += [f"{k} {given[k]} has no place" for k in given if k not in wanted]
    problems += [f"{k} {wanted[k]} is missing" for k in wanted if k not in given]
    if problems:
        more = f"; and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise UserError(
            f"{found.path} is not a KL-VAE of the known architecture ({network.name_for_log()}): "
            f"{'; '.join(problems[:4])}{more}"
        )


def _open_checkpoint(path: Path, halves: Sequence[str]) -> tuple[Found, KLVAE]:
    """Returns the tensors of a checked checkpoint file, and the network for them on the meta device."""
    found = _find_vae(path, *read_weights(path))
    network = _empty_vae(found)
    _check_architecture(found, network, halves)
    for half in halves:
        check_finite(path, found.half(half))
    return found, network


def _fill(network: KLVAE, tensors: Mapping[str, Tensor], device: torch.device | str) -> None:
    # copy=True: the tensors are mapped from the file, which may be replaced while this runs.
    copies = {k: t.detach().to(device, torch.float32, copy=True).contiguous() for k, t in tensors.items()}
    network.load_state_dict(copies, strict=True, assign=True)


def _load_checkpoint(path: Path, device: torch.device | str, parts: Parts) -> KLVAE:
    halves = _halves(parts)
    found, network = _open_checkpoint(path, sorted({"encoder", *halves}))
    network.known_identity, network.ignored = network.identity_of(found.tensors), found.ignored
    _leave_out(network, halves)
    _fill(network, {name: t for half in halves for name, t in found.half(half).items()}, device)
    return network


# --- family B: diffusers ------------------------------------------------------------------------------------

WEIGHT_FILES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors")
# Classes whose `encode` gives a 4-D posterior and whose `decode` needs nothing but latents; and where their
# settings say how many latent channels they have and how far they scale down.
DIFFUSERS_CLASSES: dict[str, Callable[[Mapping[str, Any]], tuple[int, int]]] = {
    "AutoencoderKL": lambda c: (c["latent_channels"], 2 ** (len(c["block_out_channels"]) - 1)),
    "AutoencoderKLFlux2": lambda c: (c["latent_channels"], 2 ** (len(c["block_out_channels"]) - 1)),
    "AsymmetricAutoencoderKL": lambda c: (c["latent_channels"], 2 ** (len(c["down_block_out_channels"]) - 1)),
    "AutoencoderKLHunyuanImage": lambda c: (c["latent_channels"], c["spatial_compression_ratio"]),
    "AutoencoderKLKVAE": lambda c: (c["z_channels"], 2 ** (len(c["ch_mult"]) - 1)),
}
# Settings that the encoder does not depend on, or that its tensors show already; the rest is fingerprinted.
NOT_OF_THE_ENCODER = {
    "batch_norm_eps",
    "batch_norm_momentum",
    "decoder_block_out_channels",
    "force_upcast",
    "latents_mean",
    "latents_std",
    "layers_per_up_block",
    "mid_block_add_attention",
    "num_dec_blocks",
    "out_channels",
    "patch_size",
    "sample_size",
    "scaling_factor",
    "shift_factor",
    "up_block_out_channels",
    "up_block_types",
    "upsample_match_channel",
    "use_post_quant_conv",
    "use_quant_conv",
}
# Files from before diffusers 0.17 call the layers of the attention by other names.
OLD_ATTENTION_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


class DiffusersVAE(VAE):
    """A diffusers autoencoder with a posterior, behind the interface of this module."""

    def __init__(self, model: Any, identity: VAEIdentity):
        super().__init__()
        self.model = model
        self.known_identity = identity
        self.pixel_range = PIXEL_RANGES["ldm"]
        self.latent_channels, self.downsampling = identity.latent_channels, identity.downsampling
        self.scale_factor, self.shift_factor = identity.scale_factor, identity.shift_factor

    def moments(self, pixels: Tensor) -> Tensor:
        """Returns mean and log-variance `[B 2C h w]` of the posterior."""
        posterior = self.model.encode(pixels).latent_dist
        return torch.cat([posterior.mean, posterior.logvar], dim=1)

    def pixels(self, latents: Tensor) -> Tensor:
        """Returns `[B 3 S S]` about `pixel_range`."""
        return self.model.decode(latents).sample

    def name_for_log(self) -> str:
        """Returns the name of the diffusers class."""
        return f"diffusers {type(self.model).__name__}"


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        config = json.loads(durable.read_whole(path, at_most=MAX_CONFIG_BYTES), parse_constant=_refuse_constant)
    except FileNotFoundError:
        raise UserError(f"{folder} is a folder without config.json, {_what_a_folder_is(folder)}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {printable(error)}") from error
    name = config.get("_class_name") if isinstance(config, dict) else None
    if not isinstance(name, str) or name not in DIFFUSERS_CLASSES:
        raise UserError(
            f"{folder} holds a {printable(name or 'model of unknown class')}, which has no posterior for single "
            f"images; classes that do: {', '.join(DIFFUSERS_CLASSES)}"
        )
    if not all(_is_setting(value) for value in config.values()):
        raise UserError(f"{path} cannot be read: a setting is too large, or too deep a list")
    return config


MAX_CONFIG_BYTES = 1 << 20


def _refuse_constant(constant: str) -> None:
    raise ValueError(f"{constant} is not a number")


def _is_setting(value: Any, depth: int = 4) -> bool:
    """Says whether this can be a setting of a model: no number or list that could fill the memory."""
    if isinstance(value, list | dict):
        inner = list(value.values()) if isinstance(value, dict) else value
        return depth > 0 and len(inner) <= 1024 and all(_is_setting(item, depth - 1) for item in inner)
    return value is None or isinstance(value, bool | str) or abs(value) <= 1_000_000


def _what_a_folder_is(folder: Path) -> str:
    if (folder / "vae" / "config.json").exists():
        return f"but {folder / 'vae'} has one: give that"
    if (folder / "data.pkl").exists():
        return "an unpacked .pt file it seems: give the .pt file itself"
    files = [f.name for f in folder.iterdir() if f.suffix.lower() in SUFFIXES]
    files.sort(key=lambda name: (name.startswith("state-"), name))  # what a training goes on from is no VAE alone
    if files:
        return f"so not a diffusers model; give a checkpoint in it, such as {folder / files[0]}"
    return "so not a diffusers model"


def _weight_file(folder: Path) -> Path:
    there = [folder / name for name in WEIGHT_FILES if (folder / name).exists()]
    if not there:
        raise UserError(f"{folder} has no {WEIGHT_FILES[0]}; save the model again with save_pretrained")
    return there[0]


def _diffusers_tensors(path: Path, halves: Sequence[str]) -> dict[str, Tensor]:
    if kind_of(path) != "safetensors":
        raise UserError(f"{path} does not hold safetensors; save the model again with save_pretrained")
    prefixes = tuple(prefix for half in halves for prefix in HALVES[half])
    stored = {name: t for name, t in read_weights(path)[0].items() if name.startswith(prefixes)}
    for name, tensor in stored.items():
        check_tensor(path, name, tensor)
    check_finite(path, stored)
    pattern = re.compile(r"(?<=\.attentions\.0\.)(query|key|value|proj_attn)(?=\.)")
    return {pattern.sub(lambda m: OLD_ATTENTION_NAMES[m[0]], name): t for name, t in stored.items()}


def _identify_diffusers(folder: Path, halves: Sequence[str]) -> VAEIdentity:
    config = _read_config(folder)
    class_name = config["_class_name"]
    try:
        channels, downsampling = DIFFUSERS_CLASSES[class_name](config)
        _check_counts(config, channels, downsampling)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder / 'config.json'} does not say how its {class_name} is built: {error}") from error
    if (config.get("in_channels", 3), config.get("out_channels", 3)) != (3, 3):
        raise UserError(f"the {class_name} in {folder} is not for images of 3 channels")
    tensors = _diffusers_tensors(_weight_file(folder), halves)
    of_encoder = {k: v for k, v in config.items() if not k.startswith("_") and k not in NOT_OF_THE_ENCODER}
    architecture = {"family": "diffusers", "class": class_name, **of_encoder}
    # AutoencoderKL had this constant before its config had the setting; the classes without one need none.
    default = LDM_SCALE_FACTOR if class_name == "AutoencoderKL" else 1.0
    return VAEIdentity(
        _fingerprint(tensors, architecture, PIXEL_RANGES["ldm"]),
        channels,
        downsampling,
        _positive(folder / "config.json", "scaling_factor", config.get("scaling_factor") or default),
        _shift_factor(folder / "config.json", config.get("shift_factor") or 0.0),
    )


def _shift_factor(path: Path, value: Any) -> float:
    number = _number(value)
    if not math.isfinite(number):
        raise UserError(f"{path}: shift_factor is {printable(value)}; it must be a number")
    return number


def _check_counts(config: Mapping[str, Any], channels: Any, downsampling: Any) -> None:
    """Raises ValueError for sizes that no model has; one could otherwise take all the memory while it is built."""
    for name, value, most in (("latent channels", channels, 4096), ("downsampling", downsampling, 2**MOST_LEVELS)):
        if type(value) is not int or not 0 < value <= most:
            raise ValueError(f"{name} {printable(value)}")
    for name, value in config.items():
        layers = value if isinstance(value, list) else [value]
        if re.match(r"layers_per_|num_\w+_blocks", name) and not all(
            type(n) is int and n <= MOST_LEVELS for n in layers
        ):
            raise ValueError(f"{name} {printable(value)}")


def _diffusers_class(folder: Path) -> Any:
    class_name = _read_config(folder)["_class_name"]
    try:
        import diffusers

        return getattr(diffusers, class_name)
    except (ImportError, RuntimeError) as error:
        raise UserError(f"{folder} is a diffusers model: pip install diffusers to use it ({error})") from error
    except AttributeError as error:
        raise UserError(f"this diffusers has no {class_name}; install a newer one to use {folder}") from error


def _load_diffusers(folder: Path, device: torch.device | str, parts: Parts) -> DiffusersVAE:
    halves = _halves(parts)
    identity = _identify_diffusers(folder, sorted({"encoder", *halves}))
    file = _weight_file(folder)
    try:
        model, report = _diffusers_class(folder).from_pretrained(
            folder,
            variant="fp16" if file.name == WEIGHT_FILES[1] else None,
            torch_dtype=torch.float32,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    except (
        ArithmeticError,
        AttributeError,
        ImportError,
        LookupError,
        OSError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        raise UserError(f"{folder} cannot be built by diffusers: {_first_line(error)}") from error
    missing = [k for k in report["missing_keys"] if k.startswith(HALVES["encoder"] + HALVES["decoder"])]
    if missing:
        raise UserError(f"{file} lacks {len(missing)} weights of its model, such as {missing[0]}")
    encoder = {name: t for name, t in model.state_dict().items() if name.startswith(HALVES["encoder"])}
    if weights_digest(encoder) != identity.fingerprint["weights"]:  # as where an index beside it names other files
        raise UserError(f"diffusers took other weights from {folder} than those in {file.name}; keep these alone")
    _leave_out(model, halves)
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.to(device, copy=True)  # see _fill: diffusers leaves them mapped
    return DiffusersVAE(model, identity)


# --- files, folders and hub ids -----------------------------------------------------------------------------

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+(/[\w-]+)?")


def _locate(path_or_id: str | Path) -> Path:
    """Returns the file or folder, downloaded first where a hub id is given."""
    path = Path(path_or_id).expanduser()
    if path.exists():
        return path
    text = str(path_or_id)
    looks_like_file = path.suffix.lower() in SUFFIXES
    if looks_like_file or not HUB_ID.fullmatch(text):
        place = "" if path.is_absolute() else f" in {Path.cwd()}"
        raise UserError(f"the VAE {text} does not exist{place}; give --vae_path a checkpoint, a folder or a hub id")
    return _download(text)


def _download(hub_id: str) -> Path:
    """Returns the local folder of "owner/name" or "owner/name/subfolder" on the Hugging Face hub."""
    try:
        from huggingface_hub import constants, hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError
    except ImportError as error:
        raise UserError(
            f"the VAE {hub_id} is no file or folder here; for the Hugging Face hub, pip install diffusers"
        ) from error
    owner, name, *subfolder = hub_id.split("/")
    is_online = _can_reach(constants.ENDPOINT)  # else the hub's library tries again and again for half a minute

    def fetch(file: str) -> Path:
        place = "/".join(subfolder) or None
        return Path(hf_hub_download(f"{owner}/{name}", file, subfolder=place, local_files_only=not is_online))

    try:
        folder = fetch("config.json").parent
        try:
            fetch(WEIGHT_FILES[0])
        except EntryNotFoundError:
            fetch(WEIGHT_FILES[1])
    except (EntryNotFoundError, OSError, ValueError) as error:
        reason = _first_line(error) if is_online else f"{constants.ENDPOINT} cannot be reached"
        raise UserError(
            f"the VAE {hub_id} is no file or folder in {Path.cwd()}, and the Hugging Face hub did not give it: "
            f"{reason}; check --vae_path, or the network"
        ) from error
    return folder


def _can_reach(url: str) -> bool:
    """Says whether the host of a URL takes connections; where a proxy is set, that is left to the proxy."""
    place = urllib.parse.urlsplit(url)
    if urllib.request.getproxies().get(place.scheme):
        return True
    try:
        with socket.create_connection((place.hostname, place.port or 443), timeout=5):
            return True
    except OSError:
        return False


def _first_line(error: Exception) -> str:
    return printable((str(error).strip().splitlines() or [type(error).__name__])[0])


# --- the two ways in ----------------------------------------------------------------------------------------


def read_identity(path_or_id: str | Path) -> VAEIdentity:
    """Returns the identity of the VAE in a file, folder or hub id without building it; raises UserError."""
    path = _locate(path_or_id)
    if path.is_dir():
        return _identify_diffusers(path, ["encoder"])
    found, network = _open_checkpoint(path, ["encoder"])
    return network.identity_of(found.tensors)


def load_vae(
    path_or_id: str | Path,
    device: torch.device | str,
    *,
    parts: Parts = "both",
    memory_format: torch.memory_format = torch.contiguous_format,
) -> VAE:
    """Returns the VAE of a file, folder or hub id, or half of it, float32, in eval mode; raises UserError.

    With `memory_format` torch.channels_last it is faster, on CPUs and GPUs, and its values differ by rounding.
    """
    path = _locate(path_or_id)
    vae = _load_diffusers(path, device, parts) if path.is_dir() else _load_checkpoint(path, device, parts)
    return vae.to(memory_format=memory_format).eval().requires_grad_(False)  # pyright: ignore[reportCallIssue]
