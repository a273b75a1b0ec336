"""What a run keeps on disk: settings, split, checkpoints, metrics. One home for their names and meaning.

results/settings.yaml               the settings of the run, itself a valid --config
results/split.json                  which images it trains on
results/state-00002000.safetensors  everything needed to go on; the last two are kept
results/ema-00002000.safetensors    the averaged weights alone; one at every save
results/metrics.jsonl               a line of figures every log_every steps
results/grid-00002000.png, loss.png
results/tensorboard/                the same figures and grids as events, where TensorBoard is installed
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import checkpoint
import config
import durable
import hardware
from config import TrainSettings, UserError
from diffusion import LatentDiffusion, network_bytes
from images import Split, is_file_name
from latent_cache import Space
from latent_dataset import SPLIT_NAME
from latent_norm import LatentNorm
from script import SETTINGS_NAME

METRICS_NAME = "metrics.jsonl"

_NETWORK_SETTINGS = (
    "dim",
    "dim_mults",
    "attn_dim_head",
    "attn_heads",
    "cond_drop_prob",
    "timesteps",
    "objective",
    "beta_schedule",
    "noise_shift",
    "min_snr_loss_weight",
    "min_snr_gamma",
)


@dataclass(frozen=True)
class SavedState:
    """A checkpoint that was read: tensors by name, and what it says of itself."""

    path: Path
    tensors: dict[str, Tensor]
    meta: dict[str, Any]
    warnings: list[str]

    @property
    def is_full(self) -> bool:
        """Says whether training can go on from it; otherwise it holds averaged weights alone."""
        return checkpoint.is_full(self.meta)

    @property
    def step(self) -> int:
        """Number of finished steps."""
        return self.meta["step"]

    @property
    def averages(self) -> dict[str, Tensor]:
        """The averaged weights, by their names in a `LatentDiffusion`."""
        return {name.removeprefix("ema."): t for name, t in self.tensors.items() if name.startswith("ema.")}


def _saved_state(path: Path, tensors: dict[str, Tensor], meta: dict[str, Any], warnings: list[str]) -> SavedState:
    """Takes what was read from a file; its checksum says that it is whole, but not who wrote it.

    Raises:
        UserError: when its meta are not those of a training run.
    """
    try:
        _check_meta(meta)
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError, UserError) as error:
        what = f"{type(error).__name__}: {error}"[:200]
        raise UserError(f"{path} is no checkpoint of a training run that can be gone on with ({what})") from error
    return SavedState(path, tensors, config.with_later_facts(meta), warnings)


def _check_meta(meta: Mapping[str, Any]) -> None:
    """Raises for meta that `Trainer` did not write: values of other types, or that lead out of the folders."""
    step, classes, factors = meta["step"], meta["classes"], [meta["scale_factor"], meta["shift_factor"]]
    if type(step) is not int or not 0 <= step < 10**18:
        raise ValueError("its step is no number of steps")
    if not isinstance(classes, list) or not classes or len(set(classes)) < len(classes):
        raise ValueError("its classes are no list of names")
    for name in classes:
        if not is_file_name(name):  # generate.py makes folders of these names
            raise ValueError(f"{name!r:.100} is not the name of a class")
    _check_settings(meta["settings"])
    channels, height, width = Space.stored(meta["space"]).moments_shape
    if meta["latent_shape"] != [channels // 2, height, width] or height != width:
        raise ValueError("its latents have another shape than its space")
    if len(LatentNorm.from_json(meta["latent_norm"]).shift) != channels // 2:
        raise ValueError("its normalisation is of other latents")
    if not all(_is_number(factor) for factor in factors):
        raise ValueError("its scale_factor or shift_factor is no number")
    if not all(isinstance(meta[name], str) for name in ("data_digest", "image_suffix")):
        raise ValueError("its data_digest or image_suffix is no text")
    if not isinstance(meta["moments_digest"], str | None):
        raise ValueError("its moments_digest is no text")
    auto_steps = meta.get("auto_steps", {})
    if not isinstance(auto_steps, dict) or not all(type(steps) is int and steps > 0 for steps in auto_steps.values()):
        raise ValueError("its auto_steps are no numbers of steps")


def _check_settings(settings: Any) -> None:
    if not isinstance(settings, dict):
        raise ValueError("its settings are no table")
    settings = config.with_later_settings(settings)
    parsed = config.stored_layer(TrainSettings, "its settings", settings).values
    for name in (*_NETWORK_SETTINGS, "image_size"):
        if name not in parsed:
            raise ValueError(f"its settings lack {name}")
    for name, value in parsed.items():  # "8" is a number in a file of settings, and none for the network
        stored = settings[name]
        if (
            stored != (list(value) if isinstance(value, tuple) else value)
            and not config.specs(TrainSettings)[name].path
        ):
            raise ValueError(f"{name} in its settings is {stored!r:.100}")


def has_state(folder: Path) -> bool:
    """Says whether a run was saved here, be its files valid or not."""
    return any(folder.glob("state-*.safetensors"))


def newest_state(folder: Path) -> SavedState | None:
    """Reads the newest valid full state in a run folder; None when there is none.

    Raises:
        UserError: when there are full states but none is valid.
    """
    found = checkpoint.newest(folder)
    return None if found is None else _saved_state(*found)


def newest_averages(folder: Path) -> SavedState | None:
    """Reads the newest valid averaged weights in a run folder, from either kind of file; None when there are none."""
    found = checkpoint.newest_averages(folder)
    return None if found is None else _saved_state(*found)


def read_state(path: Path) -> SavedState:
    """Reads one checkpoint file."""
    try:
        return _saved_state(path, *checkpoint.load(path), [])
    except checkpoint.DamagedCheckpoint as error:
        raise UserError(f"not a whole checkpoint: {error}; give another, or the folder of the run") from error


def read_averages(place: Path) -> SavedState:
    """Reads the newest averaged weights of the run folder that --checkpoint names, or those of one checkpoint file."""
    if place.is_file():
        return read_state(place)
    state = newest_averages(place) if place.is_dir() else None
    if state is None:
        raise UserError(f"--checkpoint {place} is neither a checkpoint nor a folder of a run that has saved one")
    return state


def write_plan(folder: Path, settings_yaml: str, split: Split) -> None:
    """Publishes the settings and the split of a new run, or the changed settings of one that goes on."""
    durable.publish(folder / SETTINGS_NAME, settings_yaml.encode())
    durable.publish(folder / SPLIT_NAME, split.to_bytes())


def network_facts(settings: Mapping[str, Any], *, num_classes: int, latent_shape: Sequence[int]) -> dict[str, Any]:
    """Returns the arguments of the `LatentDiffusion` that the settings of a run describe."""
    facts = {"num_classes": num_classes, "latent_channels": latent_shape[0], "latent_size": latent_shape[1]}
    return facts | {name: settings[name] for name in _NETWORK_SETTINGS}


def build_diffusion(
    settings: Mapping[str, Any], *, num_classes: int, latent_shape: tuple[int, int, int]
) -> LatentDiffusion:
    """Builds the network and the schedule that the settings of a run describe.

    Raises:
        UserError: when the sizes do not fit the latents, or the weights do not fit into memory.
    """
    facts = network_facts(settings, num_classes=num_classes, latent_shape=latent_shape)
    needed, free = network_bytes(**facts), hardware.free_memory_bytes(torch.device("cpu"))
    if needed > free:
        raise UserError(
            f"a network of dim {settings['dim']}, dim_mults {config.show(settings['dim_mults'])} and attn_heads "
            f"{settings['attn_heads']} has {needed:.3g} bytes of weights, and {free:.3g} bytes of memory are free "
            "for it; lower them"
        )
    return LatentDiffusion(**facts)


def averaged_diffusion(state: SavedState) -> LatentDiffusion:
    """Builds the averaged network of a checkpoint, in eval mode and without gradients.

    Raises:
        UserError: when its weights are those of another network.
    """
    meta = state.meta
    diffusion = build_diffusion(
        meta["settings"], num_classes=len(meta["classes"]), latent_shape=tuple(meta["latent_shape"])
    )
    try:
        diffusion.load_state_dict(state.averages)
    except RuntimeError as error:
        raise UserError(
            f"the checkpoint holds other weights than those of its network: {' '.join(str(error).split())[:300]}"
        ) from error
    return diffusion.eval().requires_grad_(False)


class Metrics:
    """The lines of metrics.jsonl, one JSON object each; those after the step that is resumed are dropped.

    Attributes:
        on_row: told of each new line that is written.

    Args:
        earlier: the run folder to take the lines from where `folder` has none.
        writes: whether not only to read; several processes of one run have one file.
    """

    def __init__(self, folder: Path, *, step: int, earlier: Path | None = None, writes: bool = True) -> None:
        self.on_row: Callable[[dict[str, Any]], None] = lambda row: None
        self.path, self.writes = folder / METRICS_NAME, writes
        source = self.path if self.path.exists() else (earlier or folder) / METRICS_NAME
        self.rows = [row for row in _read_rows(source) if row["step"] <= step]
        if writes:
            durable.publish(self.path, "".join(json.dumps(row) + "\n" for row in self.rows).encode())

    def add(self, **row: Any) -> None:
        """Appends one line."""
        self.rows.append(row)
        if not self.writes:
            return
        with durable.naming(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        self.on_row(row)

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """Returns the steps and values of one figure, over the lines that have it."""
        rows = [row for row in self.rows if _is_number(row.get(name))]
        return [row["step"] for row in rows], [row[name] for row in rows]


_LARGEST_METRICS_BYTES = 1 << 30


def _read_rows(path: Path) -> list[dict[str, Any]]:
    """Reads the lines that are whole; a kill may leave a torn last one."""
    rows = []
    try:
        text = durable.read_whole(path, at_most=_LARGEST_METRICS_BYTES).decode("utf-8", "replace")
    except FileNotFoundError:
        return rows
    for line in text.splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and type(row.get("step")) is int and row["step"] >= 0:
            rows.append(row)
    return rows


def _is_number(value: object) -> bool:
    """Says whether a value out of a file is a number that fits into a float, and is finite."""
    return type(value) in (int, float) and abs(value) < 1e300  # type: ignore[operator]
