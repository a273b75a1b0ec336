"""Brings the tensor names of a KL-VAE, as other programs write them, to those of latent diffusion (LDM)."""

import re
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from gait_latents.vae.weight_files import printable

WRAPPERS = ("module", "_orig_mod")  # what DistributedDataParallel and torch.compile put into the names of tensors
LANDMARK = "encoder.conv_in.weight"  # where a tensor of this name is, there is a VAE
# Words of LDM's names, longer ones first: its averaged weights have names without the dots between them.
_WORDS = (
    "post_quant_conv|quant_conv|nin_shortcut|downsample|upsample|proj_out|norm_out|conv_out|conv_in|encoder|decoder|"
    r"block_[12]|attn_1|block|attn|norm[12]?|conv[12]?|weight|bias|down|mid|up|[qkv]|\d++"
)
_IN_ATTENTION = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
    "query": "q",
    "key": "k",
    "value": "v",
    "proj_attn": "proj_out",
}
_OF_DIFFUSERS = (
    (r"\.down_blocks\.(\d+)\.", r".down.\1."),
    (r"\.mid_block\.resnets\.0\.", ".mid.block_1."),
    (r"\.mid_block\.resnets\.1\.", ".mid.block_2."),
    (r"\.mid_block\.attentions\.0\.", ".mid.attn_1."),
    (r"\.resnets\.(\d+)\.", r".block.\1."),
    (r"\.attentions\.(\d+)\.", r".attn.\1."),
    (r"\.(down|up)samplers\.0\.conv\.", r".\1sample.conv."),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
    (r"\.conv_norm_out\.", ".norm_out."),
)


def unwrapped(state: Mapping[Any, Any]) -> dict[str, tuple[str, Any]]:
    """Returns {name: (name in the file, value)}, names without what DDP and torch.compile put into them."""
    found = {}
    for key, value in state.items():
        if isinstance(key, str):
            name = printable(key)
            found[".".join(word for word in name.split(".") if word not in WRAPPERS)] = (name, value)
    return found


def with_dots(name: str) -> str | None:
    """Returns the name of a tensor of LDM that was written without dots, as in `model_ema.`; None for other texts."""
    if not re.fullmatch(f"(?>{_WORDS})+", name):
        return None
    return ".".join(re.findall(_WORDS, name))


def are_of_diffusers(names: Collection[str]) -> bool:
    """Says whether names are those of an AutoencoderKL of diffusers, with none of LDM among them."""
    theirs = any(name.startswith(("encoder.down_blocks.", "decoder.up_blocks.")) for name in names)
    return theirs and not any(name.startswith(("encoder.down.", "decoder.up.")) for name in names)


def to_ldm(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the tensors of a VAE under the names, and in the shapes, that LDM gives them.

    Names of diffusers are translated. `quant_conv` inside the encoder, as FLUX.2 has it, is moved out. The layers of an
    attention are 1x1 convolutions in LDM and matrices in diffusers, and here convolutions.
    """
    named = tensors
    if are_of_diffusers(tensors):
        levels = len({name.split(".")[2] for name in tensors if name.startswith("decoder.up_blocks.")})
        named = {_from_diffusers(name, levels): value for name, value in tensors.items()}
    named = {re.sub(r"^(?:en|de)coder\.(?=(?:post_)?quant_conv\.)", "", name): value for name, value in named.items()}
    return {name: _as_convolution(value) if _is_of_attention(name) else value for name, value in named.items()}


def _from_diffusers(name: str, levels: int) -> str:
    """Translates the name of one tensor; diffusers numbers the levels of a decoder from the coarsest."""
    if re.search(r"\.attentions\.\d+\.", name):
        for theirs, ours in _IN_ATTENTION.items():
            name = re.sub(rf"(?<=\d\.){re.escape(theirs)}(?=\.)", ours, name)
    name = re.sub(r"\.up_blocks\.(\d{1,4})\.", lambda match: f".up.{levels - 1 - int(match[1])}.", name)
    for theirs, ours in _OF_DIFFUSERS:
        name = re.sub(theirs, ours, name)
    return name


def _is_of_attention(name: str) -> bool:
    return re.search(r"\.attn(?:_1|\.\d+)\.(?:q|k|v|proj_out)\.weight$", name) is not None


def _as_convolution(value: Any) -> Any:
    return value[:, :, None, None] if isinstance(value, Tensor) and value.ndim == 2 else value
