"""Reads a KL-VAE out of one file with the tensor names of latent diffusion (LDM) or of diffusers.

The file may hold the state dict itself, a training checkpoint around it, or a whole latent diffusion model of which the
VAE is one part. The architecture is read from the shapes of the tensors.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gait_latents.common.errors import UserError
from gait_latents.vae.base import (
    HALVES,
    LDM_SCALE_FACTOR,
    Parts,
    VAEIdentity,
    check_positive,
    leave_out,
    split_halves,
    to_number,
)
from gait_latents.vae.network import KLVAE, NORM_GROUPS, Style
from gait_latents.vae.tensor_names import LANDMARK, unwrapped
from gait_latents.vae.weight_files import (
    Contents,
    check_finite,
    check_tensor,
    check_tensors,
    holds_no_weight,
    printable,
    read_weights,
)
from gait_latents.vae.weight_sets import WeightSet, find_sets, left_out, mappings

MOST_LEVELS = 32  # and at most as many blocks in each; usual are four levels of two blocks
BOTH = ("encoder", "decoder")
# The makers' constants of VAEs of 16 channels without quant_conv, which no tensor tells apart.
FLUX_FACTORS = (0.3611, 0.1159)
SD3_FACTORS = (1.5305, 0.0609)


@dataclass(frozen=True)
class Factors:
    """The makers' normalisation of a VAE: latent = (z - shift) * scale; `are_assumed` where the file names none."""

    scale: float
    shift: float
    are_assumed: bool


@dataclass(frozen=True)
class CheckpointVAE:
    """A KL-VAE that was found in a checkpoint.

    Attributes:
        path: the checkpoint.
        weights: the set of weights that was taken.
        factors: the normalisation of its makers.
        left_out: what else is in the file, in words.
    """

    path: Path
    weights: WeightSet
    factors: Factors
    left_out: tuple[str, ...] = ()

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Its tensors, under the names that `KLVAE` gives them."""
        return self.weights.tensors

    def half(self, half: str) -> dict[str, Tensor]:
        """Returns the tensors of "encoder" or "decoder", including `quant_conv` or `post_quant_conv`."""
        return {name: t for name, t in self.tensors.items() if name.startswith(HALVES[half])}

    def size(self, name: str, axis: int = 0) -> int:
        """Returns one side of the weights of a convolution; raises UserError where there are none."""
        tensor = self.tensors.get(name)
        if tensor is None or tensor.ndim != 4 or 0 in tensor.shape:
            there = "is missing" if tensor is None else f"is {tuple(tensor.shape)}, no convolution"
            raise UserError(f"{self.path} is not a KL-VAE of the known architecture: {name} {there}")
        return tensor.shape[axis]

    def levels_with_attention(self, prefix: str) -> list[int]:
        """Returns the numbers of the levels under a prefix that have attention."""
        names = (re.match(rf"{re.escape(prefix)}(\d{{1,4}})\.attn\.", name) for name in self.tensors)
        return sorted({int(match[1]) for match in names if match})

    def count(self, prefix: str) -> int:
        """Returns how many different words follow a prefix in the tensors' names: the number of levels or blocks."""
        return len({name[len(prefix) :].split(".")[0] for name in self.tensors if name.startswith(prefix)})


def _find_vae(path: Path, contents: Contents) -> CheckpointVAE:
    """Finds the KL-VAE in what a checkpoint holds; other models are ignored. Raises UserError where there is none."""
    found = find_sets(contents.tree)
    if not found:
        if contents.foreign:
            raise UserError(holds_no_weight(path, contents.foreign[0]))
        trees = mappings(contents.tree) if isinstance(contents.tree, Mapping) else ()
        names = [printable(key) for _, tree in trees for key, value in tree.items() if isinstance(value, Tensor)]
        there = f"; it has {len(names)} others, such as {', '.join(names[:3])}" if names else ""
        raise UserError(f"{path} is not a KL-VAE: it has no tensor {LANDMARK}{there}")
    taken = _choose(path, found)
    _refuse_other_vaes(path, taken)
    check_tensors(path, taken.tensors)
    told = left_out(found, taken)
    if contents.foreign:
        told.append(f"objects of other programs, such as {printable(contents.foreign[0])}")
    return CheckpointVAE(path, taken, _factors(path, contents, taken), tuple(told))


def _choose(path: Path, found: Sequence[WeightSet]) -> WeightSet:
    """Returns the set of weights to take, by the rule that `weight_sets.py` states."""
    if len(found) == 1 or _is_complete(path, found[0], ("encoder",), first_layout=True):
        return found[0]
    for halves in (BOTH, ("encoder",)):
        complete = [weights for weights in found if _is_complete(path, weights, halves)]
        if complete:
            return next((weights for weights in complete if weights.is_average), complete[0])
    return found[0]


def _is_complete(path: Path, weights: WeightSet, halves: Sequence[str], *, first_layout: bool = False) -> bool:
    """Says whether a set of weights has all tensors of these halves; of the first layout, if that is asked."""
    candidate = CheckpointVAE(path, weights, Factors(1.0, 0.0, True))
    try:
        _refuse_other_vaes(path, weights)
        for name, tensor in weights.tensors.items():
            check_tensor(path, name, tensor)
        network = _empty_vae(candidate)
        _check_architecture(candidate, network, halves)
    except UserError:
        return False
    is_first = network.quant_conv is not None and not network.attention and not weights.has_diffusers_names
    return is_first or not first_layout


def _refuse_other_vaes(path: Path, weights: WeightSet) -> None:
    """Raises UserError for autoencoders without moments, such as vector-quantised ones, which have LANDMARK, too."""
    for name in weights.beside:
        if name.startswith("quantize."):
            raise UserError(f"{path} is a vector-quantised VAE (it has {name}), so it has no moments")
    # Asked here, for the encoder alone could pass for one of half as many channels.
    made, taken = (weights.tensors.get(f"{name}.weight") for name in ("encoder.conv_out", "decoder.conv_in"))
    made, taken = (x.shape if isinstance(x, Tensor) and x.ndim == 4 else () for x in (made, taken))
    if made and taken and made[0] == taken[1]:
        raise UserError(
            f"{path} is an autoencoder without moments, plain or vector-quantised: its encoder makes as many "
            f"channels ({made[0]}) as its decoder takes, and that of a KL-VAE makes twice as many"
        )


def _factors(path: Path, contents: Contents, weights: WeightSet) -> Factors:
    """Returns the normalisation that the file names, else that of the family, which is then assumed.

    Of these names the first versions knew `scale_factor` alone. What the others hold counts where it is a number; else
    it stays without effect, as it was.
    """
    state = unwrapped(weights.mapping)
    inside = {name: state[there][1] for name, there in weights.beside.items()}
    whole = contents.tree if isinstance(contents.tree, Mapping) else {}
    places = (contents.metadata, whole, weights.mapping, inside)
    named = {name: place[name] for place in reversed(places) for name in _FACTOR_NAMES if name in place}
    shift = to_number(named.get("shift_factor"))
    scale = to_number(named.get("scaling_factor"))
    if "scale_factor" in named:
        scale = check_positive(path, "scale_factor", named["scale_factor"])
    if not (math.isfinite(scale) and scale > 0):
        usual_scale, usual_shift = _usual_factors(contents, weights)
        return Factors(usual_scale, shift if math.isfinite(shift) else usual_shift, are_assumed=True)
    return Factors(scale, shift if math.isfinite(shift) else 0.0, are_assumed=False)


_FACTOR_NAMES = ("scale_factor", "scaling_factor", "shift_factor")  # the second is the name that diffusers uses


def _usual_factors(contents: Contents, weights: WeightSet) -> tuple[float, float]:
    """Returns the normalisation of the family that the layout, and what is beside the VAE in the file, point to."""
    out = weights.tensors.get("encoder.conv_out.weight")
    if _has_quant_conv(weights.tensors) or not isinstance(out, Tensor) or len(out) != 32:
        return LDM_SCALE_FACTOR, 0.0
    is_sd3 = any(isinstance(name, str) and ".joint_blocks." in name for name in weights.mapping)
    is_sd3 |= any("stable-diffusion-v3" in text for text in contents.metadata.values())
    return SD3_FACTORS if is_sd3 else FLUX_FACTORS


def _has_quant_conv(tensors: Mapping[str, Any]) -> bool:
    """Says whether a VAE has `quant_conv` and `post_quant_conv`; where one is there, the other must be."""
    return any(name.startswith(("quant_conv.", "post_quant_conv.")) for name in tensors)


def _style(found: CheckpointVAE) -> Style:
    """Returns the style, which the names of the layers between the resolutions show."""
    plain = any(re.search(r"\.(down|up)sample\.weight$", name) for name in found.tensors)
    nested = any(re.search(r"\.(down|up)sample\.conv\.weight$", name) for name in found.tensors)
    weights = found.weights
    return "ldm" if nested or ((weights.is_first_stage or weights.has_diffusers_names) and not plain) else "kl"


def _empty_vae(found: CheckpointVAE) -> KLVAE:
    """Returns the network to which the shapes of the tensors belong, on the meta device: without memory for weights."""
    stem, z_channels = found.size(LANDMARK), found.size("encoder.conv_out.weight") // 2
    embed_dim = found.size("quant_conv.weight") // 2 if "quant_conv.weight" in found.tensors else z_channels
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
            scale_factor=found.factors.scale,
            shift_factor=found.factors.shift,
            attention=found.levels_with_attention("encoder.down."),
            decoder_attention=found.levels_with_attention("decoder.up."),
            has_quant_conv=_has_quant_conv(found.tensors),
        )


def _check_architecture(found: CheckpointVAE, network: KLVAE, halves: Sequence[str]) -> None:
    """Raises UserError, naming the first tensors in which the network and the file differ."""
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


def open_checkpoint(path: Path, halves: Sequence[str], *, trust_pickle: bool) -> tuple[CheckpointVAE, KLVAE]:
    """Returns the VAE in a checkpoint file, its halves checked, and the network for it, on the meta device."""
    found = _find_vae(path, read_weights(path, trust_pickle=trust_pickle))
    network = _empty_vae(found)
    network.ignored = tuple(sorted({name.split(".")[0] for name in found.weights.beside}))
    _check_architecture(found, network, halves)
    for half in halves:
        check_finite(path, found.half(half))
    return found, network


def identify_checkpoint(found: CheckpointVAE, network: KLVAE) -> VAEIdentity:
    """Returns which latents the VAE in a file makes, and how its file was understood."""
    place = found.weights.place
    if found.weights.is_average:
        place = f"averaged weights{f' under {place}' if place else ''}"
    parts = [_family(found, network), *([f"taken from {place}"] if place else [])]
    parts += [f"left out: {', '.join(found.left_out)}"] if found.left_out else []
    return replace(
        network.identity_of(found.tensors), kind="; ".join(parts), factors_are_assumed=found.factors.are_assumed
    )


def _family(found: CheckpointVAE, network: KLVAE) -> str:
    """Says which family of VAEs a file belongs to."""
    if network.style == "kl":
        return "KL-VAE with plain convolutions between its levels"
    names = "names of diffusers" if found.weights.has_diffusers_names else "names of LDM"
    if network.quant_conv is None:
        kind = "KL-VAE as in FLUX and SD3" if network.latent_channels == 16 else "KL-VAE without quant_conv"
        return f"{kind} ({names})"
    return f"KL-VAE as in Stable Diffusion ({names})"


def _fill(network: KLVAE, tensors: Mapping[str, Tensor], device: torch.device | str) -> None:
    """Puts the weights into a network without memory."""
    # Copied, because the tensors are mapped from the file, which may be replaced while this runs.
    copies = {k: t.detach().to(device, torch.float32, copy=True).contiguous() for k, t in tensors.items()}
    network.load_state_dict(copies, strict=True, assign=True)


def load_checkpoint(path: Path, device: torch.device | str, parts: Parts, *, trust_pickle: bool) -> KLVAE:
    """Loads the KL-VAE of a checkpoint file, or half of it, in float32; raises UserError."""
    halves = split_halves(parts)
    found, network = open_checkpoint(path, sorted({"encoder", *halves}), trust_pickle=trust_pickle)
    network.known_identity = identify_checkpoint(found, network)
    leave_out(network, halves)
    _fill(network, {name: t for half in halves for name, t in found.half(half).items()}, device)
    return network
