"""Reads a VAE out of a folder in the format of diffusers: config.json and the weights.

Its identity is read without diffusers, which is only needed to build the network. The weights are read here and given
to the network: what was looked at is what is used.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gait_latents.common import files as disk_files
from gait_latents.common.errors import UserError
from gait_latents.vae.base import (
    HALVES,
    LDM_SCALE_FACTOR,
    PIXEL_RANGES,
    VAE,
    Parts,
    VAEIdentity,
    check_number,
    check_positive,
    fingerprint_of,
    first_line,
    leave_out,
    split_halves,
)
from gait_latents.vae.ldm_checkpoint import MOST_LEVELS
from gait_latents.vae.weight_files import SUFFIXES, check_finite, check_tensors, kind_of, printable, read_weights

WEIGHT_FILES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors")
# What else may hold the weights, in the order in which it is taken; an index names the files that share them.
OTHER_WEIGHT_FILES = (
    "diffusion_pytorch_model.safetensors.index.json",
    "diffusion_pytorch_model.safetensors.index.fp16.json",
    "diffusion_pytorch_model.bin",
    "diffusion_pytorch_model.fp16.bin",
)
# The classes that can be used: `encode` gives a normal distribution over latents [B C h w], and `decode` needs nothing
# but such latents. For each, how its settings tell (latent channels, downsampling).
DIFFUSERS_CLASSES: dict[str, Callable[[Mapping[str, Any]], tuple[int, int]]] = {
    "AutoencoderKL": lambda c: (c["latent_channels"], 2 ** (len(c["block_out_channels"]) - 1)),
    "AutoencoderKLFlux2": lambda c: (c["latent_channels"], 2 ** (len(c["block_out_channels"]) - 1)),
    "AsymmetricAutoencoderKL": lambda c: (c["latent_channels"], 2 ** (len(c["down_block_out_channels"]) - 1)),
    "AutoencoderKLHunyuanImage": lambda c: (c["latent_channels"], c["spatial_compression_ratio"]),
    "AutoencoderKLKVAE": lambda c: (c["z_channels"], 2 ** (len(c["ch_mult"]) - 1)),
}
# Settings on which the moments do not depend, or which the tensors show already; the others are in the fingerprint.
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
# Files from before diffusers 0.17 have other names for the layers of the attention.
OLD_ATTENTION_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


class DiffusersVAE(VAE):
    """An autoencoder of diffusers behind the interface of `VAE`."""

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
    """Reads config.json of a folder; raises UserError unless it is of a class that can be used."""
    path = folder / "config.json"
    try:
        config = json.loads(
            disk_files.read_whole(path, at_most=MAX_CONFIG_BYTES, follow_link=True), parse_constant=_refuse_constant
        )
    except FileNotFoundError:
        raise UserError(f"{folder} is a folder without config.json, {_what_a_folder_is(folder)}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {printable(error)}") from error
    name = config.get("_class_name") if isinstance(config, dict) else None
    if not isinstance(name, str) or name not in DIFFUSERS_CLASSES:
        what = f"the class {printable(name)}" if name else "a model of unknown class"
        raise UserError(
            f"{folder} holds {what}, which has no posterior for single "
            f"images; classes that do: {', '.join(DIFFUSERS_CLASSES)}"
        )
    if not all(_is_setting(value) for value in config.values()):
        raise UserError(f"{path} cannot be read: a setting is too large, or too deep a list")
    return config


MAX_CONFIG_BYTES = 1 << 20


def _refuse_constant(constant: str) -> None:
    raise ValueError(f"{constant} is not a number")


def _is_setting(value: Any, depth: int = 4) -> bool:
    """Says whether a value can be a setting of a model; huge numbers and lists, which could fill the memory, cannot."""
    if isinstance(value, list | dict):
        inner = list(value.values()) if isinstance(value, dict) else value
        return depth > 0 and len(inner) <= 1024 and all(_is_setting(item, depth - 1) for item in inner)
    return value is None or isinstance(value, bool | str) or abs(value) <= 1_000_000


def _what_a_folder_is(folder: Path) -> str:
    """Says what a folder without config.json seems to be, and what to give instead."""
    if (folder / "vae" / "config.json").exists():
        return f"but {folder / 'vae'} has one: give that"
    if (folder / "data.pkl").exists():
        return "an unpacked .pt file it seems: give the .pt file itself"
    files = [f.name for f in folder.iterdir() if f.suffix.lower() in SUFFIXES]
    files.sort(
        key=lambda name: (name.startswith("state-"), name)
    )  # state-* is what a training goes on from, so others are named first
    if files:
        return f"so not a diffusers model; give a checkpoint in it, such as {folder / files[0]}"
    return "so not a diffusers model"


def _weight_files(folder: Path) -> list[Path]:
    """Returns the files of the weights; raises UserError where there are none."""
    for name in (*WEIGHT_FILES, *OTHER_WEIGHT_FILES):
        if (folder / name).exists():
            return _shards(folder / name) if ".index." in name else [folder / name]
    variants = [path for path in folder.glob("diffusion_pytorch_model.*.safetensors") if "-of-" not in path.name]
    if len(variants) == 1:
        return variants
    raise UserError(f"{folder} has no {WEIGHT_FILES[0]}; save the model again with save_pretrained")


def _shards(index: Path) -> list[Path]:
    """Returns the files that an index of shards names; raises UserError where it is damaged or one is missing."""
    try:
        names = set(
            json.loads(disk_files.read_whole(index, at_most=MAX_CONFIG_BYTES, follow_link=True))["weight_map"].values()
        )
        if not names or not all(name == Path(name).name and name.endswith(".safetensors") for name in names):
            raise ValueError("it names no files beside it")
    except (OSError, ValueError, RecursionError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{index} cannot be read: {printable(error)}") from error
    files = [index.parent / name for name in sorted(names)]
    lost = [file for file in files if not file.exists()]
    if lost:
        raise UserError(
            f"{index} names {printable(lost[0].name)}, which is not there; copy or download the folder again"
        )
    return files


def _read_tensors(folder: Path, halves: Sequence[str], *, trust_pickle: bool) -> dict[str, Tensor]:
    """Reads all tensors under the names of today's diffusers, and checks those of the halves; raises UserError."""
    pattern = re.compile(r"(?<=\.attentions\.0\.)(query|key|value|proj_attn)(?=\.)")
    prefixes = tuple(prefix for half in halves for prefix in HALVES[half])
    found: dict[str, Tensor] = {}
    for path in _weight_files(folder):
        if (kind_of(path) == "safetensors") == (path.suffix == ".bin"):
            raise UserError(f"{path} does not hold safetensors; save the model again with save_pretrained")
        contents = read_weights(path, trust_pickle=trust_pickle)
        if not isinstance(contents.tree, Mapping):
            raise UserError(f"{path} is no state dict; save the model again with save_pretrained")
        stored = {name: t for name, t in contents.tree.items() if isinstance(name, str)}
        own = {name: t for name, t in stored.items() if name.startswith(prefixes)}
        check_tensors(path, own)
        check_finite(path, own)
        found |= {pattern.sub(lambda m: OLD_ATTENTION_NAMES[m[0]], name): t for name, t in stored.items()}
    return found


def identify_diffusers(
    folder: Path, halves: Sequence[str], *, trust_pickle: bool
) -> tuple[VAEIdentity, dict[str, Tensor]]:
    """Returns which latents the VAE in a folder makes, and its tensors; raises UserError.

    The tensors of the halves are checked. They are mapped from the file.
    """
    config = _read_config(folder)
    class_name = config["_class_name"]
    try:
        channels, downsampling = DIFFUSERS_CLASSES[class_name](config)
        _check_counts(config, channels, downsampling)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder / 'config.json'} does not say how its {class_name} is built: {error}") from error
    if (config.get("in_channels", 3), config.get("out_channels", 3)) != (3, 3):
        raise UserError(f"the {class_name} in {folder} is not for images of 3 channels")
    tensors = _read_tensors(folder, halves, trust_pickle=trust_pickle)
    of_encoder = {k: v for k, v in config.items() if not k.startswith("_") and k not in NOT_OF_THE_ENCODER}
    architecture = {"family": "diffusers", "class": class_name, **of_encoder}
    # AutoencoderKL had this constant before its config named it; the other classes are unscaled where theirs does not.
    default = LDM_SCALE_FACTOR if class_name == "AutoencoderKL" else 1.0
    by_channel = [name for name in ("latents_mean", "latents_std") if config.get(name) is not None]
    identity = VAEIdentity(
        fingerprint_of(tensors, architecture, PIXEL_RANGES["ldm"]),
        channels,
        downsampling,
        check_positive(folder / "config.json", "scaling_factor", config.get("scaling_factor") or default),
        check_number(folder / "config.json", "shift_factor", config.get("shift_factor") or 0.0),
        kind=f"diffusers {class_name}" + (f"; not used: its {' and '.join(by_channel)}" if by_channel else ""),
        factors_are_assumed=not config.get("scaling_factor"),
    )
    return identity, tensors


def _check_counts(config: Mapping[str, Any], channels: Any, downsampling: Any) -> None:
    """Raises ValueError for sizes that no model has: building one of such sizes could take all the memory."""
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
    """Returns the class of diffusers that a folder names; raises UserError where it is not installed."""
    class_name = _read_config(folder)["_class_name"]
    try:
        import diffusers

        return getattr(diffusers, class_name)
    except (ImportError, RuntimeError) as error:
        raise UserError(f"{folder} is a diffusers model: pip install diffusers to use it ({error})") from error
    except AttributeError as error:
        raise UserError(f"this diffusers has no {class_name}; install a newer one to use {folder}") from error


def load_diffusers(folder: Path, device: torch.device | str, parts: Parts, *, trust_pickle: bool) -> DiffusersVAE:
    """Loads the VAE of a folder, or half of it, in float32; raises UserError."""
    halves = split_halves(parts)
    checked = sorted({"encoder", *halves})
    identity, tensors = identify_diffusers(folder, checked, trust_pickle=trust_pickle)
    model = _empty_model(folder)
    _check_architecture(folder, model, tensors, checked)
    leave_out(model, halves)
    # Copied, because the tensors are mapped from the file, which may be replaced while this runs.
    copies = {name: tensors[name].detach().to(device, copy=True) for name in model.state_dict() if name in tensors}
    model.load_state_dict({name: t.float() if t.is_floating_point() else t for name, t in copies.items()}, assign=True)
    return DiffusersVAE(model, identity)


def _empty_model(folder: Path) -> Any:
    """Builds the network that config.json describes, on the meta device: without memory for weights."""
    config = _read_config(folder)
    if config.get("quantization_config") is not None:
        raise UserError(f"{folder} cannot be built by diffusers: its weights are quantised")
    try:
        with torch.device("meta"):
            return _diffusers_class(folder).from_config(config)
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
        raise UserError(f"{folder} cannot be built by diffusers: {first_line(error)}") from error


def _check_architecture(folder: Path, model: Any, tensors: Mapping[str, Tensor], halves: Sequence[str]) -> None:
    """Raises UserError, naming a tensor, where the network and the weights of these halves differ."""
    prefixes = tuple(prefix for half in HALVES for prefix in HALVES[half] if half in halves)
    others = tuple(prefix for half in HALVES for prefix in HALVES[half] if half not in halves)
    wanted = {
        name: tuple(t.shape) for name, t in model.state_dict().items() if not (others and name.startswith(others))
    }
    lost = [name for name in wanted if name not in tensors]
    if lost:
        raise UserError(f"{folder} lacks {len(lost)} weights of its model, such as {lost[0]}")
    problems = [
        f"{name} is {tuple(tensors[name].shape)}, not {shape}"
        for name, shape in wanted.items()
        if tuple(tensors[name].shape) != shape
    ]
    problems += [f"{printable(n)} has no place" for n in tensors if n.startswith(prefixes) and n not in wanted]
    if problems:
        raise UserError(f"{folder / 'config.json'} does not describe the weights beside it: {problems[0]}")
