"""How a new run begins with the weights of another run (--init_from), which may have other classes and other images.

Network and average are taken over, but for the embeddings of classes, which are taken by the names of the classes. All
else that a network computes with (the size of its layers, the VAE, the size of the images, the objective) must be the
same, and its latents are normalised as before. The optimizer and the count of steps begin anew.
"""

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gait_latents.common import cli
from gait_latents.common.console import say, warn
from gait_latents.common.errors import UserError
from gait_latents.diffusion.model import LatentDiffusion
from gait_latents.images.names import name_list
from gait_latents.images.split import Entry, Split, read_split
from gait_latents.settings import TrainSettings
from gait_latents.training import checkpoint, run_folder
from gait_latents.training.run_folder import SavedState

# What a new run takes from the other one where nothing else is said: it decides what the weights mean.
INHERITED = (
    *("dim", "dim_mults", "attn_dim_head", "attn_heads", "objective", "timesteps", "beta_schedule", "noise_shift"),
    *("latent_norm", "latent_norm_images", "image_size", "vae_path"),
)
# With another value, the weights are of no use.
_FIXED = ("dim", "dim_mults", "attn_dim_head", "attn_heads", "objective", "latent_norm", "image_size")
# With another value, each timestep is another amount of noise, which the network must learn anew.
_NOISE = ("timesteps", "beta_schedule", "noise_shift")
_EMBEDDINGS = "model.classes_emb.weight"  # [classes, dim], the only weights of a network that depend on the classes
_MOST_LISTED = 8  # classes that a line names


@dataclass(frozen=True, eq=False)
class Beginning:
    """The run that a new run begins with.

    Attributes:
        place: the run folder or checkpoint file, as it was given.
        state: what was saved there.
    """

    place: str
    state: SavedState

    @property
    def inherited(self) -> dict[str, Any]:
        """The settings that a new run takes from this one where nothing else is said."""
        return self.state.meta.chosen_settings(*INHERITED)

    def to_json(self) -> dict[str, Any]:
        """Returns what the checkpoints of the new run say of this one."""
        return {
            "place": self.place,
            "step": self.state.step,
            "digest": checkpoint.stamp(self.state.path, follow_link=True),
        }


def read_beginning(place: str) -> Beginning:
    """Reads the newest full state of a run folder, its averaged weights where it has nothing else, or a file of either.

    Raises:
        UserError: when there is none, or it is of latents that an earlier version took over from another program.
    """
    path = Path(place)
    if not path.exists():
        raise UserError(f"--init_from {place} does not exist; give the folder of a run, or a checkpoint file in it")
    if path.is_file():
        state = run_folder.read_state(path)
    else:
        state = run_folder.newest_state(path) if run_folder.has_state(path) else run_folder.newest_averages(path)
    if state is None:
        raise UserError(f"--init_from {place} is neither a checkpoint nor a folder of a run that has saved one")
    for line in state.warnings:
        warn(line)
    if state.meta.space.is_imported:
        raise UserError(
            f"--init_from {place}: that run was trained on imported latents, whose VAE nobody knows, so that no other "
            "run can begin with its weights; leave --init_from out"
        )
    return Beginning(place, state)


def check_settings(beginning: Beginning, settings: TrainSettings) -> None:
    """Raises UserError for a setting with which the weights would be of no use; warns of another noise schedule."""
    stored = beginning.state.meta.settings
    asked = cli.to_dict(settings)
    for name in (*_FIXED, *_NOISE):
        if name not in stored or stored[name] == asked[name]:
            continue
        differs = f"--{name} is {cli.show(asked[name])}, but the run in --init_from {beginning.place} has "
        differs += cli.show(stored[name])
        if name in _FIXED:
            raise UserError(
                f"{differs}, and its weights are of use with that alone; give --{name} {cli.show(stored[name])}, or "
                "leave --init_from out"
            )
        warn(f"{differs}: a timestep is then another amount of noise than its weights have learnt, and they learn anew")


def num_learnt_from(folder: Path, entries: Sequence[Entry]) -> int:
    """Returns how many of these images were training images of the run in a folder, as far as it lists them.

    Raises:
        UserError: when its list cannot be read.
    """
    split = read_split(folder)
    seen = {entry.key for entry in split.train if entry.key} if split is not None else set()
    return sum(entry.key in seen for entry in entries)


def warn_of_seen_tests(beginning: Beginning, split: Split) -> None:
    """Warns when test images of the new run were training images of the other one, as far as its folder lists them."""
    held_out = (*split.validation, *split.test)
    try:
        count = num_learnt_from(beginning.state.path.parent, held_out)
    except UserError as error:
        warn(f"which images the run in --init_from {beginning.place} was trained on is not known: {error}")
        return
    if count:
        what = "validation and test images" if split.validation else "test images"
        warn(
            f"{count:,} of {len(held_out):,} {what} were training images of the run in --init_from "
            f"{beginning.place}; scores on them will look too good"
        )


def begin(
    beginning: Beginning,
    diffusion: LatentDiffusion,
    average: LatentDiffusion,
    classes: Sequence[str],
    *,
    is_frozen: bool = False,
) -> None:
    """Puts the weights and the average of the other run into a new network and its average, and says so.

    The embeddings of classes that the other run does not know stay as they are, in both.

    Args:
        beginning: the other run.
        diffusion: the new network.
        average: its average, which is a copy of it.
        classes: the class names of the new run, in label order.
        is_frozen: whether the network stays as it is. It then is the average, with which samples are made.

    Raises:
        UserError: when the weights are of another network; nothing is then changed.
    """
    state = beginning.state
    weights = state.weights if state.is_full and not is_frozen else state.averages
    rows = _rows_of(state.meta.classes, classes)
    for found in (weights, state.averages):
        _check_weights(found, diffusion, num_classes=len(state.meta.classes), path=state.path)
    with torch.no_grad():
        for network, found in ((diffusion, weights), (average, state.averages)):
            for name, own in network.model.state_dict().items():
                kept = found[f"model.{name}"]
                if f"model.{name}" == _EMBEDDINGS:
                    own[list(rows)] = kept[list(rows.values())].to(own.device)
                else:
                    own.copy_(kept)
    _say_begin(beginning, classes, rows, is_frozen=is_frozen)


def freeze_network(diffusion: LatentDiffusion) -> None:
    """Leaves nothing but the embeddings of classes to be learnt."""
    for name, parameter in diffusion.named_parameters():
        parameter.requires_grad_(name == _EMBEDDINGS)


def _rows_of(there: Sequence[str], here: Sequence[str]) -> dict[int, int]:
    """Returns label here -> label there of each class that both runs have; é is é, however a file system writes it."""
    label_of = {unicodedata.normalize("NFC", name): label for label, name in enumerate(there)}
    label_of |= {name: label for label, name in enumerate(there)}
    found = {
        label: label_of.get(name, label_of.get(unicodedata.normalize("NFC", name))) for label, name in enumerate(here)
    }
    return {label: other for label, other in found.items() if other is not None}


def _check_weights(found: Mapping[str, Tensor], diffusion: LatentDiffusion, *, num_classes: int, path: Path) -> None:
    """Raises UserError unless these are all weights of such a network with so many classes."""
    for name, own in diffusion.model.state_dict().items():
        full = f"model.{name}"
        shape = [num_classes, *own.shape[1:]] if full == _EMBEDDINGS else list(own.shape)
        kept = found.get(full)
        if kept is None or list(kept.shape) != shape or kept.dtype != own.dtype:
            has = "absent" if kept is None else f"{list(kept.shape)} of {str(kept.dtype).removeprefix('torch.')}"
            raise UserError(
                f"--init_from: {path} holds other weights than those of its network: {full} is {has} in it, and "
                f"{shape} of {str(own.dtype).removeprefix('torch.')} in a network of these settings"
            )


def _say_begin(beginning: Beginning, classes: Sequence[str], rows: Mapping[int, int], *, is_frozen: bool) -> None:
    state = beginning.state
    taken = set(rows.values())
    new = [name for label, name in enumerate(classes) if label not in rows]
    left = [name for label, name in enumerate(state.meta.classes) if label not in taken]
    text = f"embeddings of {len(rows):,} of {len(classes):,} classes kept"
    text += f"; new: {name_list(new, _MOST_LISTED)}" if new else ""
    text += f"; not taken along: {name_list(left, _MOST_LISTED)}" if left else ""
    what = "weights" if state.is_full and not is_frozen else "averaged weights"
    say(f"begins with the {what} of {beginning.place} at step {state.step:,}: {text}")
    say("the latents are normalised as in that run; optimizer and steps begin anew")
    if is_frozen:
        say("the network stays as it is, and the embeddings of classes alone are learnt")
    elif not rows:
        say("all classes are new: if there are few images of each, --freeze_network may serve them better")
