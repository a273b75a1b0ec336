"""Which images a VAE was trained on, where its file says so: a VAE that has seen test images makes figures look better.

`demo/train_vae.py` writes it beside the weights; files of other programs do not say it.
"""

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError, safe_open

from gait_latents.common import mounts
from gait_latents.common.errors import UserError
from gait_latents.vae import weight_files

NAME = "trained_on"  # in the metadata of a safetensors file
_DIGITS = 16  # of each image's SHA-256, which tell images of one set apart


def to_text(keys: Iterable[str]) -> str:
    """Returns what a file says of the images with these keys (SHA-256, 64 hex digits)."""
    return "".join(sorted({key[:_DIGITS] for key in keys}))


def num_seen(vae_path: str, keys: Iterable[str]) -> int | None:
    """Returns how many of the images with these keys a VAE was trained on.

    Returns:
        The number; None where the file does not say it, or is not on this machine.
    """
    text = _text_in(Path(mounts.locate(vae_path)))
    if text is None:
        return None
    seen = {text[start : start + _DIGITS] for start in range(0, len(text), _DIGITS)}
    return sum(key[:_DIGITS] in seen for key in keys)


def _text_in(path: Path) -> str | None:
    with suppress(UserError, SafetensorError, OSError):  # whoever needs the weights says what is wrong with the file
        if path.is_file() and weight_files.kind_of(path) == "safetensors":
            with safe_open(path, framework="pt") as file:
                return (file.metadata() or {}).get(NAME)
    return None
