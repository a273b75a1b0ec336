"""What a training run is to do: its settings, and the saved state of the run that it goes on with, if any."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from gait_latents.common import cli, files, hardware, mounts
from gait_latents.common.console import say, warn
from gait_latents.common.distributed import ALONE, Ranks
from gait_latents.common.errors import Failed, UserError
from gait_latents.diffusion.sampling import num_solver_steps
from gait_latents.images import selection
from gait_latents.images.changes import tell_changes_of_run
from gait_latents.images.reading import BadImage
from gait_latents.images.split import read_split
from gait_latents.latents.manifest import Manifest, defaults_of, manifest_of_images, tell_new_cache
from gait_latents.settings import (
    AUTO_PASSES,
    AUTO_STEPS,
    FROZEN_DEFAULTS,
    FROZEN_PASSES,
    TrainSettings,
    differences_on_resume,
)
from gait_latents.training import checkpoint, run_folder, trackers
from gait_latents.training.beginning import Beginning, check_settings, read_beginning
from gait_latents.training.run_folder import SavedState

# Passes of a step are computed as one while an activation of the first level has no more values than this, which is
# four times the batch of the default recipe.
_JOINED_VALUES = 64 * 48 * 32 * 32
_NOT_INHERITED = ("results_folder", "resume_from", "device")  # they say where a run is, not what it is


@dataclass(frozen=True)
class TrainingPlan:
    """The settings of a training run, and the saved state that it goes on from; a new run has none."""

    settings: TrainSettings
    sources: dict[str, str]
    origin: Path | None  # the run folder that `state` comes from; --resume_from may name another than `results`
    state: SavedState | None
    manifest: Manifest | None
    newest_save: tuple[str, str] | None  # the newest state in the results folder, from `run_folder.newest_stamp`
    beginning: Beginning | None  # the run whose weights a new run begins with; none for one that goes on

    @property
    def results(self) -> Path:
        """Where this run writes."""
        return Path(self.settings.results_folder)

    @property
    def cache_folder(self) -> Path:
        """Where the latents are."""
        return Path(self.settings.latents_cache_folder)


def make_plan(argv: Sequence[str] | None, description: str | None = None, ranks: Ranks = ALONE) -> TrainingPlan:
    """Puts together flags, file, the run that goes on, the manifest of the cache and the defaults.

    Raises:
        UserError: for what cannot work, or must not change when a run goes on.
    """
    with ranks.together():
        plan = _read_plan(argv, description)
        _check_share(plan.settings, ranks)
        files.remove_stale_temporaries(plan.results)
        facts = _facts(plan)
    ranks.check_same(facts, "start all with the same command, and let all see the same --results_folder")
    return plan


def _read_plan(argv: Sequence[str] | None, description: str | None) -> TrainingPlan:
    layers = cli.Layers(TrainSettings, argv, description=description)
    typed: TrainSettings = layers.settings
    newest_save = run_folder.newest_stamp(typed.results_folder)
    origin, state = find_run(Path(typed.results_folder), typed.resume_from)
    _refuse_imported(origin, state)
    stored = {} if state is None else {k: v for k, v in state.meta.settings.items() if k not in _NOT_INHERITED}
    layers.add(f"the run in {origin}", stored)
    folder = layers.settings.latents_cache_folder
    manifest = manifest_of_images(folder)
    if manifest is None and state is None:
        tell_new_cache(folder)
    layers.add(f"the settings of {folder}", defaults_of(manifest, layers), only_about_cache=True)
    beginning = read_beginning(typed.init_from) if state is None and typed.init_from is not None else None
    layers.add("the run in --init_from", {} if beginning is None else beginning.inherited)
    if state is None and layers.settings.freeze_network:
        _refuse_new_network(beginning)
        layers.add("--freeze_network", FROZEN_DEFAULTS)
    resolved = layers.resolve()
    settings = resolved.settings
    if beginning is not None:
        check_settings(beginning, settings)
        _warn_of_slow_embeddings(settings)
    if state is not None:
        began = cli.stored_layer(TrainSettings, f"the run in {origin}", stored).values.get("init_from")
        settings = replace(settings, init_from=_began_with(typed.init_from, began, origin))
    _refuse_changes(stored, settings, origin)
    _tell_other_split(stored, manifest, origin)
    _refuse_missing_cache(resolved)
    trackers.choose(settings.trackers)  # before anything else is done
    _refuse_impossible(settings)
    return TrainingPlan(settings, resolved.sources, origin, state, manifest, newest_save, beginning)


def _refuse_new_network(beginning: Beginning | None) -> None:
    if beginning is None:
        raise UserError(
            "--freeze_network leaves the network as it is, and a new one has learnt nothing; give --init_from with a "
            "run that was trained on other classes, or leave --freeze_network out"
        )


def _warn_of_slow_embeddings(settings: TrainSettings) -> None:
    usual = FROZEN_DEFAULTS["train_lr"]
    if settings.freeze_network and settings.train_lr < usual / 10:
        warn(
            f"--train_lr is {settings.train_lr:g}, with which embeddings hardly move; without it, --freeze_network "
            f"takes {usual:g}"
        )


def _began_with(asked: str | None, stored: str | None, origin: Path | None) -> str | None:
    """Returns what the run that goes on began with; says so where another beginning, or the same, is asked for."""
    if asked is not None:
        is_same = str(Path(asked).absolute()) == stored  # it need not exist any more
        what = (
            "was used when it began"
            if is_same
            else "is for a new run, with another --results_folder and without --resume_from"
        )
        say(f"the run in {origin} goes on; --init_from {asked} {what}")
    return stored


def is_finished(plan: TrainingPlan, ranks: Ranks) -> bool:
    """Says whether the run has taken all its steps, and tells the user so."""
    with ranks.together():
        return _has_all_steps(plan)


def _has_all_steps(plan: TrainingPlan) -> bool:
    own_split = None if plan.state is None or plan.origin is None else read_split(plan.origin)
    if plan.state is None or own_split is None or plan.state.step < num_steps(plan.settings, len(own_split.train)):
        return False
    if Path(plan.settings.data_path).is_dir():
        tell_changes_of_run(own_split, plan.settings.data_path)
    say(f"the run in {plan.origin} is finished ({plan.state.step:,} steps); a larger --train_num_steps goes further")
    return True


def find_run(results: Path, resume_from: str | None) -> tuple[Path | None, SavedState | None]:
    """Finds the run to go on with: the one in the results folder, else the one that --resume_from names."""
    place = None if resume_from is None else Path(resume_from)
    if place is not None and not place.exists():
        remedy = mounts.why_missing("resume_from", place) or "give a run folder, or a state-*.safetensors in one"
        raise UserError(f"--resume_from {place} does not exist; {remedy}")
    if run_folder.has_state(results):
        if place is not None and results.resolve() not in (place.resolve(), place.resolve().parent):
            say(f"{results} holds a run already, which goes on; --resume_from {place} is not used")
        return results, _say_warnings(run_folder.newest_state(results))
    if place is None:
        return None, None
    if place.is_file():
        state = run_folder.read_state(place)
        if not state.is_full:
            raise UserError(f"--resume_from {place} holds averaged weights only; give a state-*.safetensors")
        return place.parent, state
    if not place.is_dir() or not run_folder.has_state(place):
        raise UserError(f"--resume_from {place} is neither a checkpoint nor a folder with state-*.safetensors")
    return place, _say_warnings(run_folder.newest_state(place))


def _say_warnings(state: SavedState | None) -> SavedState | None:
    for line in state.warnings if state is not None else ():
        warn(line)
    return state


def _refuse_imported(origin: Path | None, state: SavedState | None) -> None:
    """Raises UserError for a run on latents that an earlier version took over from another program."""
    if state is not None and state.meta.space.is_imported:
        raise UserError(
            f"the run in {origin} was trained on imported latents and cannot go on in this version (generate.py still "
            "takes it); start another run on the images with another --results_folder"
        )


def _refuse_changes(stored: dict[str, Any], settings: TrainSettings, origin: Path | None) -> None:
    changed = differences_on_resume(stored, settings)
    if changed:
        name, old, new = changed[0]
        raise UserError(
            f"--{name} is {cli.show(new)}, but the run in {origin} was started with {cli.show(old)}; "
            f"leave it at {cli.show(old)}, or start another run with another --results_folder"
        )


def _tell_other_split(stored: dict[str, Any], manifest: Manifest | None, origin: Path | None) -> None:
    """Says so where the cache chooses training images in another way than the run that goes on with its own."""
    now = {} if manifest is None else {"split_start": 0.0, **manifest.settings}
    rule = ("images_per_user", "split", "split_gap", "split_start")
    names = [name for name in rule if name in stored and now.get(name, stored[name]) != stored[name]]
    if "split" not in names and stored.get("split") == "random":
        names = [name for name in names if not name.startswith("split_")]  # of no meaning there
    if names:
        own, other = (", ".join(f"{n} {cli.show(values[n])}" for n in names) for values in (stored, now))
        say(
            f"the run in {origin} goes on with its own training images ({own}), and the cache has others ({other}): to "
            "train on those, give another --results_folder"
        )


def _refuse_missing_cache(resolved: cli.Resolved) -> None:
    """Raises UserError for a cache that was asked for among Kaggle's inputs, where none can be made, and is not there.

    Without it, all images would be encoded again.
    """
    folder = resolved.settings.latents_cache_folder
    reason = mounts.why_missing("latents_cache_folder", folder)
    if reason is not None and cli.is_explicit(resolved.sources, "latents_cache_folder"):
        raise UserError(f"--latents_cache_folder {folder} does not exist; {reason}")


def _refuse_impossible(settings: TrainSettings) -> None:
    """Raises UserError for settings of sampling that would only fail at the first sample grid, hours later."""
    num_solver_steps(settings.sampler, settings.sampling_timesteps, settings.timesteps, auto_steps=AUTO_STEPS)


def _check_share(settings: TrainSettings, ranks: Ranks) -> None:
    """Raises UserError unless each process gets as many latents of a step as any other."""
    if batch_size(settings) % ranks.count:
        raise UserError(
            f"a step sees {batch_size(settings)} latents (--train_batch_size {settings.train_batch_size} times "
            f"--gradient_accumulate_every {settings.gradient_accumulate_every}), which {ranks.count} processes cannot "
            f"share evenly; make it a multiple of {ranks.count}"
        )


def _facts(plan: TrainingPlan) -> dict[str, object]:
    """Returns what must be the same on all processes: the state that the run goes on from, and the settings."""
    settings = {
        f"--{name}": cli.show(getattr(plan.settings, name))
        for name, spec in cli.specs(TrainSettings).items()
        if name != "device" and not spec.path  # a machine may have its own folders
    }
    state = plan.state
    step, digest = (
        ("none", "none") if state is None else (state.step, checkpoint.stamp(state.path, follow_link=True)[:16])
    )
    first = "none" if plan.beginning is None else plan.beginning.to_json()["digest"][:16]
    return {
        "a run at step": step,
        "a saved state of the digest": digest,
        "a checkpoint for --init_from of the digest": first,
        **settings,
    }


def pick_device(plan: TrainingPlan, ranks: Ranks) -> torch.device:
    """Chooses the device of this process, and makes sure that the results folder can be written to.

    Raises:
        UserError: where either cannot be had.
    """
    with ranks.together():
        if plan.settings.deterministic:  # before anything is computed: torch refuses it later
            hardware.make_deterministic()
        device = hardware.pick_device(ranks.device_name(plan.settings.device))
        if ranks.is_main:
            _check_results_folder(plan)
    ranks.use(device)
    return device


def _check_results_folder(plan: TrainingPlan) -> None:
    files.check_writable(plan.results, "results_folder")
    if plan.state is None:
        selection.refuse_to_be_a_class(plan.results, plan.settings.data_path)
    if plan.state is None and any(plan.results.glob("ema-*.safetensors")):
        raise UserError(
            f"--results_folder {plan.results} holds averaged weights of an earlier run, but no state-*.safetensors to "
            "go on from; move them away, or give another folder"
        )


@contextmanager
def plain_errors(plan: TrainingPlan) -> Iterator[None]:
    """Turns what may go wrong with images and the GPU into one sentence with a remedy."""
    remedy = (
        f"for --train_batch_size {plan.settings.train_batch_size}: give --join_passes false, and if that is not "
        "enough, halve it and double --gradient_accumulate_every, which is the same training; or lower "
        "--encode_batch_size"
    )
    try:
        with hardware.plain_memory_error(remedy=remedy):
            yield
    except BadImage as error:
        raise Failed(
            f"{error}; this run needs that image as it was: put it back, or start another run with another "
            "--results_folder"
        ) from error


def batch_size(settings: TrainSettings) -> int:
    """Returns how many latents a step sees, in all its passes and on all processes."""
    return settings.train_batch_size * settings.gradient_accumulate_every


def num_steps(settings: TrainSettings, num_images: int) -> int:
    """Returns how many steps a run of so many training images takes in all."""
    if isinstance(settings.train_num_steps, str):
        return max(settings.fewest_steps, math.ceil(_auto_passes(settings) * num_images / batch_size(settings)))
    return settings.train_num_steps


def _auto_passes(settings: TrainSettings) -> int:
    return FROZEN_PASSES if settings.freeze_network else AUTO_PASSES


def describe_num_steps(settings: TrainSettings, num_images: int) -> str:
    """Returns the number of steps for a message, and where it is from."""
    steps = num_steps(settings, num_images)
    if not isinstance(settings.train_num_steps, str):
        return f"{steps:,} steps"
    passes = steps * batch_size(settings) / num_images
    why = (
        f"{_auto_passes(settings)} passes over the images"
        if steps > settings.fewest_steps
        else f"--fewest_steps: {passes:,.0f} passes over the images"
    )
    return f"{steps:,} steps ({why})"


def pass_size(settings: TrainSettings, latent_shape: tuple[int, int, int], *, num_ranks: int = 1) -> int:
    """Returns how many latents [C h w] go through the network at once.

    That is this process's whole share of a step where it is small (see _JOINED_VALUES), else --train_batch_size. The
    share is the whole batch for a process that is alone.
    """
    share = batch_size(settings) // num_ranks
    is_small = share * settings.dim * latent_shape[1] * latent_shape[2] <= _JOINED_VALUES
    return share if settings.join_passes and is_small else min(settings.train_batch_size, share)
