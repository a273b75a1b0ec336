"""Reads a KL-VAE out of a checkpoint file with the tensor names of latent diffusion (LDM).

The file may hold the state dict itself, a training checkpoint around it, or a whole latent diffusion model of which the
VAE is one part. The architecture is read from the shapes of the tensors.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gait_latents.common.errors import UserError
from gait_latents.vae.base import HALVES, LDM_SCALE_FACTOR, Parts, check_positive, leave_out, split_halves
from gait_latents.vae.network import KLVAE, NORM_GROUPS, Style
from gait_latents.vae.weight_files import check_finite, check_tensor, printable, read_weights

# Under these keys training checkpoints keep weights; of several, the first that holds a VAE is taken.
WEIGHT_KEYS = ("model_state_dict", "vae_state_dict", "state_dict", "vae", "model", "ema_state_dict", "ema")
WRAPPERS = ("module", "_orig_mod")  # what DistributedDataParallel and torch.compile put into the names of tensors
LANDMARK = "encoder.conv_in.weight"  # where a tensor of this name is, there is a VAE
MOST_LEVELS = 32  # and at most as many blocks in each; usual are four levels of two blocks


@dataclass(frozen=True)
class CheckpointVAE:
    """A KL-VAE that was found in a checkpoint.

    Attributes:
        path: the checkpoint.
        tensors: its tensors, under the names that `KLVAE` gives them.
        scale_factor: the constant of its makers; that of latent diffusion where the checkpoint names none.
        is_ldm_checkpoint: whether it was one model of several, as in a full LDM or Stable Diffusion checkpoint.
        ignored: first words of names beside its tensors that are no part of it, such as "loss".
    """

    path: Path
    tensors: dict[str, Tensor]
    scale_factor: float
    is_ldm_checkpoint: bool
    ignored: tuple[str, ...]

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

    def count(self, prefix: str) -> int:
        """Returns how many different words follow a prefix in the tensors' names: the number of levels or blocks."""
        return len({name[len(prefix) :].split(".")[0] for name in self.tensors if name.startswith(prefix)})


def _state_dicts(tree: Mapping[Any, Any], depth: int = 2, seen: set[int] | None = None) -> Iterator[Mapping[Any, Any]]:
    """Yields a mapping and the mappings in it, those under the usual names first, each once.

    Each once, because a small pickle can hold the same mapping a million times, which then holds another so often.
    """
    seen = set() if seen is None else seen
    seen.add(id(tree))
    yield tree
    by_rank = sorted(tree, key=lambda key: WEIGHT_KEYS.index(key) if key in WEIGHT_KEYS else len(WEIGHT_KEYS))
    for key in by_rank if depth else ():
        if isinstance(tree[key], Mapping) and id(tree[key]) not in seen:
            yield from _state_dicts(tree[key], depth - 1, seen)


def _unwrap_names(state: Mapping[Any, Any]) -> dict[str, Any]:
    """Returns a state dict without what DistributedDataParallel and torch.compile put into its names."""
    named = ((printable(key).split("."), value) for key, value in state.items() if isinstance(key, str))
    return {".".join(word for word in words if word not in WRAPPERS): value for words, value in named}


def _vae_prefix(names: Sequence[str]) -> str | None:
    """Returns what stands before the names of a VAE's tensors; None where there is no VAE."""
    prefixes = {n.removesuffix(LANDMARK) for n in names if n == LANDMARK or n.endswith("." + LANDMARK)}
    if "first_stage_model." in prefixes:
        return "first_stage_model."
    return min(prefixes, key=lambda prefix: (len(prefix), prefix), default=None)


def _find_vae(path: Path, checkpoint: Any, metadata: Mapping[str, Any]) -> CheckpointVAE:
    """Finds the KL-VAE in what a checkpoint holds; other models are ignored. Raises UserError where there is none."""
    trees = list(_state_dicts(checkpoint)) if isinstance(checkpoint, Mapping) else []
    for tree in trees:
        state = _unwrap_names(tree)
        prefix = _vae_prefix(list(state))
        if prefix is not None:
            inside = {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}
            _refuse_other_vaes(path, inside)
            tensors = {k: t for k, t in inside.items() if k.startswith(HALVES["encoder"] + HALVES["decoder"])}
            for name, tensor in tensors.items():
                check_tensor(path, name, tensor)
            return CheckpointVAE(
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
    """Raises UserError for VAEs of other kinds, which have a tensor of the name LANDMARK, too."""
    for name in names:
        if name.startswith("encoder.down_blocks."):
            raise UserError(f"{path} is from diffusers; give the folder that holds it and its config.json")
        if name.startswith("quantize."):
            raise UserError(f"{path} is a vector-quantised VAE (it has {name}), so it has no moments")


def _scale_factor(path: Path, places: Iterable[Mapping[Any, Any]]) -> float:
    """Returns the scale factor that the first of the places names, else that of latent diffusion."""
    values = [place["scale_factor"] for place in places if "scale_factor" in place]
    return check_positive(path, "scale_factor", values[0] if values else LDM_SCALE_FACTOR)


def _style(found: CheckpointVAE) -> Style:
    """Returns the style, which the names of the layers between the resolutions show."""
    plain = any(re.search(r"\.(down|up)sample\.weight$", name) for name in found.tensors)
    nested = any(re.search(r"\.(down|up)sample\.conv\.weight$", name) for name in found.tensors)
    return "ldm" if nested or (found.is_ldm_checkpoint and not plain) else "kl"


def _empty_vae(found: CheckpointVAE) -> KLVAE:
    """Returns the network to which the shapes of the tensors belong, on the meta device: without memory for weights."""
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


def open_checkpoint(path: Path, halves: Sequence[str]) -> tuple[CheckpointVAE, KLVAE]:
    """Returns the VAE in a checkpoint file, its halves checked, and the network for it, on the meta device."""
    found = _find_vae(path, *read_weights(path))
    network = _empty_vae(found)
    _check_architecture(found, network, halves)
    for half in halves:
        check_finite(path, found.half(half))
    return found, network


def _fill(network: KLVAE, tensors: Mapping[str, Tensor], device: torch.device | str) -> None:
    """Puts the weights into a network without memory."""
    # Copied, because the tensors are mapped from the file, which may be replaced while this runs.
    copies = {k: t.detach().to(device, torch.float32, copy=True).contiguous() for k, t in tensors.items()}
    network.load_state_dict(copies, strict=True, assign=True)


def load_checkpoint(path: Path, device: torch.device | str, parts: Parts) -> KLVAE:
    """Loads the KL-VAE of a checkpoint file, or half of it, in float32; raises UserError."""
    halves = split_halves(parts)
    found, network = open_checkpoint(path, sorted({"encoder", *halves}))
    network.known_identity, network.ignored = network.identity_of(found.tensors), found.ignored
    leave_out(network, halves)
    _fill(network, {name: t for half in halves for name, t in found.half(half).items()}, device)
    return network
