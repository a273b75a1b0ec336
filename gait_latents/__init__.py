"""Class-conditional latent diffusion for small labelled image sets.

The names below are what programs of one's own build on; everything else may change. Each is loaded when it is first
used, so that importing the package costs nothing and `--help` of the scripts stays instant.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gait_latents.latents.dataset import LatentDataset
    from gait_latents.latents.opening import open_cache
    from gait_latents.vae.load import load_vae

_HOMES = {
    "LatentDataset": "gait_latents.latents.dataset",
    "open_cache": "gait_latents.latents.opening",
    "load_vae": "gait_latents.vae.load",
}

__all__ = ["LatentDataset", "load_vae", "open_cache"]


def __getattr__(name: str) -> Any:
    """Loads a public name when it is first asked for (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
