"""What an evaluation is to do: its settings, and the run with its split whose images it evaluates."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from gait_latents.common import charts, cli, files, hardware
from gait_latents.common.errors import UserError
from gait_latents.common.layout import SPLIT_NAME
from gait_latents.images import selection
from gait_latents.images.split import Split, read_split
from gait_latents.latents.space import Space
from gait_latents.settings import EvaluateSettings, PreprocessSettings
from gait_latents.training import run_folder
from gait_latents.training.run_folder import SavedState


@dataclass(frozen=True)
class EvaluationPlan:
    """The settings of an evaluation, and the run that made the images."""

    settings: EvaluateSettings
    state: SavedState
    split: Split
    images: PreprocessSettings  # how the run read and encoded images, and where they are
    device: torch.device

    @property
    def folder(self) -> Path:
        """Where the report goes."""
        return Path(self.settings.output_folder)

    @property
    def classes(self) -> tuple[str, ...]:
        """All classes of the run, in label order."""
        return self.split.classes

    @property
    def space(self) -> Space:
        """The space of the run's latents: which VAE, image size and way of reading made them."""
        return self.state.meta.space


def make_plan(argv: Sequence[str] | None, description: str | None = None) -> EvaluationPlan:
    """Puts together flags, file, the run and the defaults.

    Raises:
        UserError: for what could only fail later, such as a missing split or an output folder that is not writable.
    """
    layers = cli.Layers(EvaluateSettings, argv, description=description)
    state = run_folder.read_averages(Path(layers.settings.checkpoint))
    run = state.path.parent
    layers.add(f"the run in {run}", state.meta.chosen_settings("seed", "vae_path", "data_path"))
    settings: EvaluateSettings = layers.resolve().settings
    charts.check_installed()  # before anything is computed
    split = read_split(run)
    if split is None:
        raise UserError(f"{run} holds no {SPLIT_NAME}, which says which images were for training; keep it with the run")
    if split.classes != state.meta.classes:
        raise UserError(f"{run / SPLIT_NAME} names other classes than {state.path}; they belong to two runs")
    read_like = cli.resolve(
        PreprocessSettings, [cli.stored_layer(PreprocessSettings, f"the run in {run}", state.meta.settings)]
    )
    read_like = replace(
        read_like.settings,
        data_path=settings.data_path or "",
        vae_path=settings.vae_path or "",
        device=settings.device,
        trust_pickle=settings.trust_pickle,
    )
    plan = EvaluationPlan(settings, state, split, read_like, hardware.pick_device(settings.device))
    selection.refuse_to_be_a_class(plan.folder, settings.data_path)
    files.check_writable(plan.folder, "output_folder")
    return plan
