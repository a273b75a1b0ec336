"""A model for programs that do not have these modules: the averaged U-Net of a run, and all that sampling needs."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from gait_latents.common import files
from gait_latents.common.console import say
from gait_latents.common.errors import UserError
from gait_latents.common.layout import CONFIG_NAME, WEIGHTS_NAME
from gait_latents.diffusion.library import LIBRARY, library_version
from gait_latents.diffusion.model import LatentDiffusion, unet_arguments
from gait_latents.images import selection
from gait_latents.settings import ExportSettings
from gait_latents.training.run_folder import SavedState
from gait_latents.training.trained_model import averaged_diffusion


def export(settings: ExportSettings, state: SavedState) -> None:
    """Publishes the two files, the weights first: a folder with config.json is whole."""
    diffusion = averaged_diffusion(state)
    weights = safetensors.torch.save(diffusion.model.state_dict(), {"format": "pt"})
    facts = _to_json(
        describe(
            state,
            diffusion,
            cond_scale=settings.cond_scale,
            guidance_interval=settings.guidance_interval,
            ddim_steps=settings.ddim_steps,
        )
    )
    folder = Path(settings.output_folder)
    selection.refuse_to_be_a_class(folder, state.meta.settings.get("data_path"))
    files.check_writable(folder, "output_folder")
    contents = {folder / WEIGHTS_NAME: weights, folder / CONFIG_NAME: facts}
    for path, data in contents.items():
        _refuse_to_replace(path, data)
    for path, data in contents.items():
        files.publish(path, data)
    millions = sum(parameter.numel() for parameter in diffusion.model.parameters()) / 1e6
    say(f"{state.path} (step {state.step:,}): a U-Net of {millions:.2f} M parameters, in {folder}")


def describe(
    state: SavedState,
    diffusion: LatentDiffusion,
    *,
    cond_scale: float,
    guidance_interval: Sequence[float],
    ddim_steps: int,
) -> dict[str, Any]:
    """Returns the content of config.json; docs/python.md says what each entry is."""
    meta = state.meta
    facts = meta.network_facts
    levels = diffusion.levels(min(ddim_steps, diffusion.num_timesteps))
    return {
        "step": state.step,
        "class_names": list(meta.classes),
        "unet": unet_arguments(**facts),
        "timesteps": facts["timesteps"],
        "objective": facts["objective"],
        "beta_schedule": facts["beta_schedule"],
        "noise_shift": facts["noise_shift"],
        "latent_shape": list(meta.latent_shape),
        "latent_norm": meta.latent_norm.to_json(),
        "guidance": diffusion.guidance(levels, cond_scale, guidance_interval),
        "levels": [list(level) for level in levels],
        "image_size": meta.image_size,
        "vae": {
            "path": meta.settings.get("vae_path"),
            "scale_factor": meta.scale_factor,
            "shift_factor": meta.shift_factor,
        },
        "versions": {
            LIBRARY: library_version(),
            "torch": torch.__version__,
            "safetensors": safetensors.__version__,
        },
    }


def _to_json(facts: dict[str, Any]) -> bytes:
    """Writes one entry to a line."""
    lines = (f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in facts.items())
    return ("{\n" + ",\n".join(lines) + "\n}\n").encode()


def _refuse_to_replace(path: Path, data: bytes) -> None:
    """Raises UserError when another file has that name: neither an earlier export nor a stranger's file is lost."""
    if not os.path.lexists(path):
        return
    try:
        is_same = files.read_whole(path, at_most=len(data)) == data
    except OSError:  # it is longer, no file, a link, or cannot be read
        is_same = False
    if not is_same:
        raise UserError(f"{path} is there already and differs; remove it, or give another --output_folder")
