"""The network of a KL-VAE (Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models").

Modules have the names of the checkpoints of latent diffusion, so that these load without translation. Of the two
styles, "ldm" is the original; "kl" has plain layers between the resolutions and takes pixels from 0 to 1.

Shapes: c channels inside the network, z channels between encoder and `quant_conv`, C latent channels.
"""

from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from gait_latents.vae.base import PIXEL_RANGES, VAE, VAEIdentity, fingerprint_of

Style = Literal["kl", "ldm"]
NORM_GROUPS = 32
NORM_EPS = 1e-6  # as in latent diffusion; torch has 1e-5


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
    """One resolution: residual blocks, each with attention after it where the level has attention, then the change to
    the next resolution where there is one.
    """

    def __init__(self, channels_in: int, channels_out: int, num_blocks: int, *, has_attention: bool):
        super().__init__()
        widths = [channels_in] + [channels_out] * num_blocks
        self.block = nn.ModuleList(ResidualBlock(a, b) for a, b in pairwise(widths))
        self.attn = nn.ModuleList(Attention(channels_out) for _ in range(num_blocks if has_attention else 0))
        self.downsample: nn.Module | None = None
        self.upsample: nn.Module | None = None

    def forward(self, x: Tensor) -> Tensor:
        for number, block in enumerate(self.block):
            x = block(x)
            if self.attn:
                x = self.attn[number](x)
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

    def __init__(
        self,
        stem: int,
        widths: Sequence[int],
        num_blocks: int,
        z_channels: int,
        style: Style,
        attention: Collection[int] = (),
    ):
        super().__init__()
        self.conv_in = nn.Conv2d(3, stem, 3, padding=1)
        inputs = [stem, *widths[:-1]]
        self.down = nn.ModuleList(
            Level(a, b, num_blocks, has_attention=i in attention)
            for i, (a, b) in enumerate(zip(inputs, widths, strict=True))
        )
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

    def __init__(
        self,
        widths: Sequence[int],
        num_blocks: int,
        z_channels: int,
        style: Style,
        attention: Collection[int] = (),
    ):
        super().__init__()
        self.conv_in = nn.Conv2d(z_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1])
        inputs = [*widths[1:], widths[-1]]
        self.up = nn.ModuleList(
            Level(a, b, num_blocks + 1, has_attention=i in attention)
            for i, (a, b) in enumerate(zip(inputs, widths, strict=True))
        )
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
    """A convolutional VAE with the tensor names of LDM, in the plain ("kl") or the original ("ldm") style.

    Args:
        width: channels of the first layer.
        multipliers: the width of each level, in multiples of `width`.
        num_blocks: residual blocks in each level of the encoder; the decoder has one more.
        embed_dim: C.
        z_channels: z; None is C.
        style: see the module.
        scale_factor, shift_factor: see `VAEIdentity`.
        attention, decoder_attention: numbers of the levels of each half that have attention, besides the middle.
        has_quant_conv: whether there are `quant_conv` and `post_quant_conv`; FLUX and SD3 have none.
    """

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
        shift_factor: float = 0.0,
        attention: Collection[int] = (),
        decoder_attention: Collection[int] = (),
        has_quant_conv: bool = True,
    ):
        super().__init__()
        z_channels = embed_dim if z_channels is None else z_channels
        widths = [width * multiplier for multiplier in multipliers]
        self.width, self.widths, self.num_blocks, self.z_channels = width, widths, num_blocks, z_channels
        self.style: Style = style
        self.ignored: tuple[str, ...] = ()
        self.pixel_range = PIXEL_RANGES[style]
        self.scale_factor, self.shift_factor = scale_factor, shift_factor
        self.attention = sorted(attention)
        self.latent_channels, self.downsampling = embed_dim, 2 ** (len(widths) - 1)
        self.encoder = Encoder(width, widths, num_blocks, z_channels, style, attention)
        self.decoder = Decoder(widths, num_blocks, z_channels, style, decoder_attention)
        self.quant_conv = nn.Conv2d(2 * z_channels, 2 * embed_dim, 1) if has_quant_conv else None
        self.post_quant_conv = nn.Conv2d(embed_dim, z_channels, 1) if has_quant_conv else None

    def moments(self, pixels: Tensor) -> Tensor:
        """Returns mean and log-variance `[B 2C h w]`, the log-variance not yet clamped."""
        moments = self.encoder(pixels)  # B 2z h w
        return moments if self.quant_conv is None else self.quant_conv(moments)

    def pixels(self, latents: Tensor) -> Tensor:
        """Returns `[B 3 S S]` about `pixel_range`."""
        return self.decoder(latents if self.post_quant_conv is None else self.post_quant_conv(latents))

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
        # What the first kinds of files could not have is named only where it is so: their spaces stay as they are.
        if self.attention:
            architecture["attention_levels"] = self.attention
        if self.quant_conv is None:
            architecture["quant_conv"] = False
        return VAEIdentity(
            fingerprint_of(tensors, architecture, self.pixel_range),
            self.latent_channels,
            self.downsampling,
            self.scale_factor,
            self.shift_factor,
        )
