"""What a run keeps on disk: settings, split, checkpoints, metrics. One home for their names and meaning.

results/settings.yaml               the settings of the run, itself a valid --config
results/split.json                  which images it trains on
results/state-00002000.safetensors  everything needed to go on; the last two are kept
results/ema-00002000.safetensors    the averaged weights alone; one at every save
results/metrics.jsonl               a line of figures every log_every steps
results/grid-00002000.png, loss.png
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

import checkpoint
import durable
from config import UserError
from diffusion import LatentDiffusion
from images import Split
from latent_dataset import SPLIT_NAME, read_split

SETTINGS_NAME, METRICS_NAME = "settings.yaml", "metrics.jsonl"

_NETWORK_SETTINGS = (
    "dim",
    "dim_mults",
    "attn_dim_head",
    "attn_heads",
    "cond_drop_prob",
    "timesteps",
    "objective",
    "beta_schedule",
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


def read_settings(folder: Path) -> dict[str, Any]:
    """Reads the settings of the run in `folder`; empty when there is no run."""
    path = folder / SETTINGS_NAME
    if not path.is_file():
        return {}
    try:
        with durable.naming(path):
            stored = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is damaged ({' '.join(str(error).split())}); restore it from a copy") from error
    if not isinstance(stored, dict):
        raise UserError(f"{path} is damaged: it holds no settings; restore it from a copy")
    return stored


def has_state(folder: Path) -> bool:
    """Says whether a run was saved here, be its files valid or not."""
    return any(folder.glob("state-*.safetensors"))


def newest_state(folder: Path) -> SavedState | None:
    """Reads the newest valid full state in a run folder; None when there is none.

    Raises:
        UserError: when there are full states but none is valid.
    """
    found = checkpoint.newest(folder)
    return None if found is None else SavedState(*found)


def newest_averages(folder: Path) -> SavedState | None:
    """Reads the newest valid averaged weights in a run folder, from either kind of file; None when there are none."""
    found = checkpoint.newest_averages(folder)
    return None if found is None else SavedState(*found)


def read_state(path: Path) -> SavedState:
    """Reads one checkpoint file."""
    try:
        return SavedState(path, *checkpoint.load(path), [])
    except checkpoint.DamagedCheckpoint as error:
        raise UserError(f"not a whole checkpoint: {error}; give another, or the folder of the run") from error


def write_plan(folder: Path, settings_yaml: str, split: Split) -> None:
    """Publishes the settings and the split of a new run, or the changed settings of one that goes on."""
    durable.publish(folder / SETTINGS_NAME, settings_yaml.encode())
    durable.publish(folder / SPLIT_NAME, split.to_bytes())


def read_plan_split(folder: Path) -> Split:
    """Reads the split that a run owns; raises UserError when it is missing or damaged."""
    split = read_split(folder)
    if split is None:
        raise UserError(f"{folder / SPLIT_NAME} is missing: without it the run cannot know its training images")
    return split


def build_diffusion(
    settings: Mapping[str, Any], *, num_classes: int, latent_shape: tuple[int, int, int]
) -> LatentDiffusion:
    """Builds the network and the schedule that the settings of a run describe."""
    return LatentDiffusion(
        num_classes=num_classes,
        latent_channels=latent_shape[0],
        latent_size=latent_shape[1],
        **{name: settings[name] for name in _NETWORK_SETTINGS},
    )


class Metrics:
    """The lines of metrics.jsonl, one JSON object each; those after the step that is resumed are dropped."""

    def __init__(self, folder: Path, *, step: int, earlier: Path | None = None) -> None:
        self.path = folder / METRICS_NAME
        source = self.path if self.path.is_file() else (earlier or folder) / METRICS_NAME
        self.rows = [row for row in _read_rows(source) if row["step"] <= step]
        durable.publish(self.path, "".join(json.dumps(row) + "\n" for row in self.rows).encode())

    def add(self, **row: Any) -> None:
        """Appends one line."""
        self.rows.append(row)
        with durable.naming(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """Returns the steps and values of one figure, over the lines that have it."""
        rows = [row for row in self.rows if name in row]
        return [row["step"] for row in rows], [row[name] for row in rows]


def _read_rows(path: Path) -> list[dict[str, Any]]:
    """Reads the lines that are whole; a kill may leave a torn last one."""
    rows = []
    with durable.naming(path):
        text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    for line in text.splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows
