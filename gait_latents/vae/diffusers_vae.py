"""Reads a VAE out of a folder in the format of diffusers: config.json and the weights as safetensors.

Its identity is read without diffusers, which is only needed to load it.
"""

import json
import math
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
    check_positive,
    fingerprint_of,
    first_line,
    leave_out,
    split_halves,
    to_number,
    weights_digest,
)
from gait_latents.vae.ldm_checkpoint import MOST_LEVELS
from gait_latents.vae.weight_files import SUFFIXES, check_finite, check_tensor, kind_of, printable, read_weights

WEIGHT_FILES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors")
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
        config = json.loads(disk_files.read_whole(path, at_most=MAX_CONFIG_BYTES), parse_constant=_refuse_constant)
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


def _weight_file(folder: Path) -> Path:
    """Returns the file of the weights; raises UserError where there is none."""
    there = [folder / name for name in WEIGHT_FILES if (folder / name).exists()]
    if not there:
        raise UserError(f"{folder} has no {WEIGHT_FILES[0]}; save the model again with save_pretrained")
    return there[0]


def _diffusers_tensors(path: Path, halves: Sequence[str]) -> dict[str, Tensor]:
    """Reads and checks the tensors of the halves, under the names of today's diffusers; raises UserError."""
    if kind_of(path) != "safetensors":
        raise UserError(f"{path} does not hold safetensors; save the model again with save_pretrained")
    prefixes = tuple(prefix for half in halves for prefix in HALVES[half])
    stored = {name: t for name, t in read_weights(path)[0].items() if name.startswith(prefixes)}
    for name, tensor in stored.items():
        check_tensor(path, name, tensor)
    check_finite(path, stored)
    pattern = re.compile(r"(?<=\.attentions\.0\.)(query|key|value|proj_attn)(?=\.)")
    return {pattern.sub(lambda m: OLD_ATTENTION_NAMES[m[0]], name): t for name, t in stored.items()}


def identify_diffusers(folder: Path, halves: Sequence[str]) -> VAEIdentity:
    """Reads which latents the VAE in a folder makes, and checks the tensors of the halves; raises UserError."""
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
    # AutoencoderKL had this constant before its config named it; the other classes are unscaled where theirs does not.
    default = LDM_SCALE_FACTOR if class_name == "AutoencoderKL" else 1.0
    return VAEIdentity(
        fingerprint_of(tensors, architecture, PIXEL_RANGES["ldm"]),
        channels,
        downsampling,
        check_positive(folder / "config.json", "scaling_factor", config.get("scaling_factor") or default),
        _shift_factor(folder / "config.json", config.get("shift_factor") or 0.0),
    )


def _shift_factor(path: Path, value: Any) -> float:
    number = to_number(value)
    if not math.isfinite(number):
        raise UserError(f"{path}: shift_factor is {printable(value)}; it must be a number")
    return number


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


def load_diffusers(folder: Path, device: torch.device | str, parts: Parts) -> DiffusersVAE:
    """Loads the VAE of a folder, or half of it, in float32; raises UserError."""
    halves = split_halves(parts)
    identity = identify_diffusers(folder, sorted({"encoder", *halves}))
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
        raise UserError(f"{folder} cannot be built by diffusers: {first_line(error)}") from error
    missing = [k for k in report["missing_keys"] if k.startswith(HALVES["encoder"] + HALVES["decoder"])]
    if missing:
        raise UserError(f"{file} lacks {len(missing)} weights of its model, such as {missing[0]}")
    encoder = {name: t for name, t in model.state_dict().items() if name.startswith(HALVES["encoder"])}
    if (
        weights_digest(encoder) != identity.fingerprint["weights"]
    ):  # as when an index file beside the weights names other files
        raise UserError(f"diffusers took other weights from {folder} than those in {file.name}; keep these alone")
    leave_out(model, halves)
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.to(
            device, copy=True
        )  # copied: diffusers leaves them mapped from the file, which may be replaced
    return DiffusersVAE(model, identity)
