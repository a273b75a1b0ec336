"""Trains a class-conditional latent diffusion model with classifier-free guidance.

    python train_latent_cfg.py
    python train_latent_cfg.py --vae_path kl_vae_best.pt --data_path Normal_line --max_hours 11.5

It reads the cache that preprocess_latents.py made, and encodes and caches what is missing there when it is first
needed. The same command goes on with a run that was stopped.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until `main` begins, Ctrl-C ends without a traceback

import math
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import config
import script
from config import TrainSettings, UserError

if __name__ == "__main__":
    script.check_command_line(TrainSettings, __doc__)

import torch
from torch import Tensor

import build
import checkpoint
import disk
import durable
import hardware
import latent_cache
import optimizer_state
import prepare
import run_folder
import trackers
from diffusion import EMA, LatentDiffusion, mean_by_timestep, moved
from draws import StepDraws, draw_step, visited
from images import BadImage, Split, shown
from latent_cache import LatentCache
from latent_dataset import SPLIT_NAME, LatentDataset, read_split
from latent_norm import LatentNorm
from metrics_log import Metrics
from prepare import ChosenSpace
from ranks import ALONE, TIME_IS_UP, Ranks, joined
from run_folder import SavedState
from run_meta import RunMeta
from sample_grid import GridMaker
from sampling import num_solver_steps
from script import DONE, Failed, Progress, Stopped, StopSignals, say, warn

_SETTLING_STEPS = 10  # first steps of a process, among which are compiling and the first save: they tell no pace
_FORECAST_STEPS = 50  # steps after which the length of the run is told
_JOINED_VALUES = 64 * 48 * 32 * 32  # of one activation at full width: four batches of the default recipe
_NOT_INHERITED = ("results_folder", "resume_from", "device")  # settings that say where a run is, not what it is


@script.command
def main(argv: Sequence[str] | None) -> int:
    """Runs the script; returns its exit code."""
    with joined() as ranks:
        return train(argv, ranks)


def train(argv: Sequence[str] | None, ranks: Ranks) -> int:
    """Plans, opens the data, trains; what can be wrong before the first step is told once, whoever finds it."""
    with ranks.together():
        plan = make_plan(argv)
        _check_share(plan.settings, ranks)
        durable.remove_stale_temporaries(plan.results)
        facts = _facts_of_plan(plan)
    ranks.check_same(facts, "start all with the same command, and let all see the same --results_folder")
    with ranks.together():
        if _is_finished(plan):  # which needs neither cache nor images
            return DONE
        if plan.settings.deterministic:
            hardware.make_deterministic()
        device = hardware.pick_device(ranks.device_name(plan.settings.device))
        if ranks.is_main:
            _check_results_folder(plan)
    ranks.use(device)
    ranks.say_unused(plan.settings.device, "train_latent_cfg.py")
    with ranks.together(), _plain_errors(plan):
        data = open_data(plan, device, ranks)
    ranks.check_same(_facts_of_data(data, device), "give all the same images, VAE and packages, and one kind of device")
    with ranks.together(), _plain_errors(plan):
        if ranks.count > 1:
            _fill(data.dataset, ranks)
        trainer = Trainer(plan.settings, data, device, ranks)
        if ranks.is_main:
            write_cache_defaults(plan, data)
        trainer.start(plan)
    trainer.begin_alike()
    with _plain_errors(plan):
        return run(trainer, plan)


@contextmanager
def _plain_errors(plan: "Plan") -> Iterator[None]:
    """Turns what may go wrong with images and the GPU into one sentence with a remedy."""
    try:
        yield
    except BadImage as error:
        raise Failed(
            f"{error}; this run needs that image as it was: put it back, or start another run with another "
            "--results_folder"
        ) from error
    except torch.OutOfMemoryError as error:
        raise Failed(
            f"the GPU has too little memory for --train_batch_size {plan.settings.train_batch_size}: give "
            "--join_passes false, and if that is not enough, halve it and double --gradient_accumulate_every, which "
            "is the same training; or lower --encode_batch_size"
        ) from error


# --- what to do --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """The settings, and the run that goes on if there is one."""

    settings: TrainSettings
    sources: dict[str, str]
    origin: Path | None  # run folder that `state` comes from
    state: SavedState | None
    manifest: latent_cache.Manifest | None
    newest_save: tuple[str, str] | None  # in the results folder, as `run_folder.newest_stamp` tells it

    @property
    def results(self) -> Path:
        """Where this run writes."""
        return Path(self.settings.results_folder)

    @property
    def cache_folder(self) -> Path:
        """Where the latents are."""
        return Path(self.settings.latents_cache_folder)


def make_plan(argv: Sequence[str] | None) -> Plan:
    """Puts together flags, file, the run being resumed, the manifest and the defaults."""
    layers = config.read_command_line(TrainSettings, argv, description=__doc__)
    typed = config.resolve(TrainSettings, layers).settings
    newest_save = run_folder.newest_stamp(typed.results_folder)
    origin, state = find_run(Path(typed.results_folder), typed.resume_from)
    _refuse_imported(origin, state)
    stored = {} if state is None else {k: v for k, v in state.meta.settings.items() if k not in _NOT_INHERITED}
    layers.append(config.stored_layer(TrainSettings, f"run {origin}", stored))
    folder = config.resolve(TrainSettings, layers).settings.latents_cache_folder
    manifest = prepare.manifest_of_images(folder)
    about_cache = {} if manifest is None else manifest.settings
    layers.append(config.stored_layer(TrainSettings, f"manifest of {folder}", about_cache, only_about_cache=True))
    resolved = config.resolve(TrainSettings, layers)
    for line in resolved.changes():
        say(line)
    _refuse_changes(stored, resolved.settings, origin)
    trackers.choose(resolved.settings.trackers)  # before anything else is done
    _refuse_impossible(resolved.settings)
    return Plan(resolved.settings, resolved.sources, origin, state, manifest, newest_save)


def _is_finished(plan: Plan) -> bool:
    """Says whether the run has taken all its steps, and tells the user so."""
    own_split = None if plan.state is None or plan.origin is None else read_split(plan.origin)
    if plan.state is None or own_split is None or plan.state.step < num_steps(plan.settings, len(own_split.train)):
        return False
    say(f"the run in {plan.origin} is finished ({plan.state.step:,} steps); a larger --train_num_steps goes further")
    return True


def find_run(results: Path, resume_from: str | None) -> tuple[Path | None, SavedState | None]:
    """Finds the run to go on with: the one in the results folder, else the one that --resume_from names."""
    place = None if resume_from is None else Path(resume_from)
    if place is not None and not place.exists():
        raise UserError(f"--resume_from {place} does not exist; give a run folder, or a state-*.safetensors in one")
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
    changed = config.differences_on_resume(stored, settings)
    if changed:
        name, old, new = changed[0]
        raise UserError(
            f"--{name} is {config.show(new)}, but the run in {origin} was started with {config.show(old)}; "
            f"leave it at {config.show(old)}, or start another run with another --results_folder"
        )


def _refuse_impossible(settings: TrainSettings) -> None:
    """Raises for what would only fail at the first grid, hours later."""
    num_solver_steps(settings.sampler, settings.sampling_timesteps, settings.timesteps, auto_steps=config.AUTO_STEPS)


def _check_share(settings: TrainSettings, ranks: Ranks) -> None:
    """Raises UserError unless each process gets as many latents of a step as any other."""
    if batch_size(settings) % ranks.count:
        raise UserError(
            f"a step sees {batch_size(settings)} latents (--train_batch_size {settings.train_batch_size} times "
            f"--gradient_accumulate_every {settings.gradient_accumulate_every}), which {ranks.count} processes cannot "
            f"share evenly; make it a multiple of {ranks.count}"
        )


def _facts_of_plan(plan: Plan) -> dict[str, object]:
    """Returns what all processes of a run must have alike: the state that it goes on from, and the settings."""
    settings = {
        f"--{name}": config.show(getattr(plan.settings, name))
        for name, spec in config.specs(TrainSettings).items()
        if name != "device" and not spec.path  # a machine may have its own folders
    }
    state = plan.state
    step, digest = ("none", "none") if state is None else (state.step, checkpoint.stamp(state.path)[:16])
    return {"a run at step": step, "a saved state of the digest": digest, **settings}


def _facts_of_data(data: "Data", device: torch.device) -> dict[str, object]:
    return {
        "latents of the space": data.chosen.space.id,
        "images and labels of the digest": data.dataset.digest()[:16],
        "a device of the kind": device.type,
        "torch": torch.__version__,
    }


def _check_results_folder(plan: Plan) -> None:
    script.check_writable(plan.results, "results_folder")
    if plan.state is None:
        prepare.refuse_to_be_a_class(plan.results, plan.settings.data_path)
    if plan.state is None and any(plan.results.glob("ema-*.safetensors")):
        raise UserError(
            f"--results_folder {plan.results} holds averaged weights of an earlier run, but no state-*.safetensors to "
            "go on from; move them away, or give another folder"
        )


# --- the data ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Data:
    """The training images of the run: split, space and dataset."""

    split: Split
    chosen: ChosenSpace
    dataset: LatentDataset


def open_data(plan: Plan, device: torch.device, ranks: Ranks = ALONE) -> Data:
    """Opens the dataset of the run, and refuses what would only fail later.

    Raises:
        UserError: when something that is needed is not at hand, or differs from what the run was started with.
        Failed: when images cannot be read, after each was named.
    """
    settings, folder = plan.settings, plan.cache_folder
    goes_on = plan.state is not None  # the split is the run's own, so that nothing else can be meant
    known = _known_space(plan)
    at_hand = prepare.images_at_hand(settings, plan.sources, may_lack=goes_on)
    split = _run_split(plan, at_hand)
    chosen = prepare.choose_space(settings, plan.sources, known, may_lack=goes_on)
    prepare.warn_of_shared_content(split)
    _check_same_space(plan, chosen)
    reason = durable.why_not_writable(folder)
    if reason is not None:
        say(f"{folder} takes no files ({reason}): what is encoded in this run stays in memory")
    cache = LatentCache(folder, chosen.space, writable=reason is None)
    for problem in cache.problems:
        warn(problem)

    def open_over(split: Split) -> LatentDataset:
        return prepare.open_dataset(
            settings,
            split,
            list(split.train),
            cache=cache,
            vae_at_hand=chosen.vae_at_hand,
            images_at_hand=at_hand,
            device=device,
            on_store_error=_go_on_in_memory,
        )

    dataset = open_over(split)
    if at_hand and chosen.vae_at_hand and plan.state is None:
        mended = _without_bad_images(plan, split, dataset)
        if mended is not split:
            split, dataset = mended, open_over(mended)
    _report_missing(plan, dataset, "before the first step" if ranks.count > 1 else "when first needed")
    if plan.state is not None:
        _check_same_data(plan, plan.state.meta, split, dataset)
    return Data(split, chosen, dataset)


def _run_split(plan: Plan, at_hand: bool) -> Split:
    """Returns the run's own split when it goes on, else draws it; content keys are fresh where images are at hand."""
    own = None if plan.origin is None else read_split(plan.origin)
    if own is not None:
        return prepare.with_fresh_keys(own, plan.settings.data_path) if at_hand else own
    stored = read_split(plan.cache_folder)
    split = prepare.choose_images(plan.settings, at_hand=at_hand, stored=stored, where=str(plan.cache_folder))
    if plan.settings.skip_bad_images and stored is not None:
        split = split.without(stored.skipped)
    return split


def _known_space(plan: Plan) -> ChosenSpace | None:
    """Returns the space that the run or the cache already knows, for when the VAE is not at hand."""
    if plan.state is not None:
        meta = plan.state.meta
        return ChosenSpace(meta.space, meta.scale_factor, meta.shift_factor, vae_at_hand=False)
    return None if plan.manifest is None else prepare.space_of_manifest(plan.manifest)


def _without_bad_images(plan: Plan, split: Split, dataset: LatentDataset) -> Split:
    missing = {dataset.keys[position] for position in dataset.missing()}
    entries = [entry for entry in split.train if entry.key in missing]
    bad = prepare.find_bad_images(entries, data_path=plan.settings.data_path, image_size=plan.settings.image_size)
    if not bad:
        return split
    for skipped in bad:
        say(f"    {shown(f'{skipped.class_name}/{skipped.name}')}: {skipped.reason}")
    if not plan.settings.skip_bad_images:
        raise Failed(
            f"{len(bad)} of {len(split.train):,} training images cannot be read; mend or remove them, or give "
            "--skip_bad_images to train without them"
        )
    return split.without(bad)


def _report_missing(plan: Plan, dataset: LatentDataset, when: str) -> None:
    missing = dataset.missing()
    say(
        f"{len(dataset):,} images asked, {dataset.num_different - len(missing):,} cached, {len(missing):,} to encode"
        f"{f' {when}' if missing else ''} ({dataset.place} holds the latents)"
    )
    prepare.say_equal(dataset)
    prepare.check_can_encode(dataset, plan.settings)


def _check_same_space(plan: Plan, chosen: ChosenSpace) -> None:
    known = _known_space(plan)
    if plan.state is not None and known is not None and chosen.space.id != known.space.id:
        raise UserError(
            f"--vae_path {plan.settings.vae_path} makes other latents than the run in {plan.origin} was started with "
            f"({'; '.join(chosen.space.differing_fields(known.space))}); give the VAE of that run, or start another "
            "run with another --results_folder"
        )


def _check_same_data(plan: Plan, meta: RunMeta, split: Split, dataset: LatentDataset) -> None:
    if dataset.digest() != meta.data_digest:
        raise UserError(
            f"the images are not those that the run in {plan.origin} was started with: "
            f"{_what_changed(plan, meta, split)}; put them back, or start another run with another --results_folder"
        )
    now = dataset.moments_digest()
    if now is not None and meta.moments_digest not in (None, now):
        say("the same images were encoded again since the last save; the run goes on with the new latents")


def _what_changed(plan: Plan, meta: RunMeta, split: Split) -> str:
    """Names the training images whose content or class is not what the split of the run says."""
    before = read_split(plan.origin) if plan.origin is not None else None
    if before is None:
        return f"the run had {', '.join(meta.classes)}"
    then = before.keys()
    names = [f"{e.class_name}/{e.name}" for e in split.train if then.get((e.class_name, e.name)) != e.key]
    if not names:
        return f"{SPLIT_NAME} there is of another run"
    return f"{len(names):,} of {len(split.train):,} have another content, the first is {shown(names[0])}"


def _fill(dataset: LatentDataset, ranks: Ranks) -> None:
    """Encodes what is missing before the first step: a step must not wait for the encoder of another process."""
    with StopSignals() as signals:
        try:
            bad = prepare.fill_together(dataset, ranks, signals)
        finally:
            dataset.cache_flush()
    if bad:
        position, reason = bad[0]
        raise BadImage(f"{dataset.names[position]}: {reason}")


def write_cache_defaults(plan: Plan, data: Data) -> None:
    """Gives a cache that training alone fills the same manifest and split as preprocessing would."""
    cache = data.dataset.cache
    if plan.manifest is not None or not cache.writable:
        return
    try:
        durable.publish(plan.cache_folder / SPLIT_NAME, data.split.to_bytes())
        prepare.record_manifest(plan.cache_folder, plan.settings, data.chosen, len(data.dataset))
    except OSError as error:
        _go_on_in_memory(error)
        cache.writable = False


def _go_on_in_memory(error: OSError) -> None:
    warn(f"the cache cannot be written to ({error.strerror or error}); what is encoded from now on stays in memory")


# --- the training step -------------------------------------------------------------------------------------


def batch_size(settings: TrainSettings) -> int:
    """Returns how many latents a step sees, in all its passes and on all processes."""
    return settings.train_batch_size * settings.gradient_accumulate_every


def num_steps(settings: TrainSettings, num_images: int) -> int:
    """Returns how many steps a run of so many training images takes in all."""
    if isinstance(settings.train_num_steps, str):
        return math.ceil(config.AUTO_PASSES * num_images / batch_size(settings))
    return settings.train_num_steps


def pass_size(settings: TrainSettings, latent_shape: tuple[int, int, int], *, num_ranks: int = 1) -> int:
    """Returns how many latents [C h w] go through the network at once: a process's share of a step where it is small.

    The share is the whole batch for a process that is alone.
    """
    share = batch_size(settings) // num_ranks
    is_small = share * settings.dim * latent_shape[1] * latent_shape[2] <= _JOINED_VALUES
    return share if settings.join_passes and is_small else min(settings.train_batch_size, share)


class Trainer:
    """The state that a step changes: network, average, optimiser, loss scaler; and how a step changes it."""

    def __init__(self, settings: TrainSettings, data: Data, device: torch.device, ranks: Ranks = ALONE) -> None:
        self.settings, self.data, self.device, self.ranks = settings, data, device, ranks
        self.dataset = data.dataset
        self.batch = batch_size(settings)
        self.num_steps = num_steps(settings, len(self.dataset))
        self.largest_shift = round(settings.time_shift * self.dataset.latent_shape[2])  # in columns of a latent
        self.share = self.batch // ranks.count
        self.own = slice(ranks.rank * self.share, (ranks.rank + 1) * self.share)  # of the batch
        self.pass_size = pass_size(settings, self.dataset.latent_shape, num_ranks=ranks.count)
        hardware.allow_tf32()
        self.dtype, self.precision_reason = hardware.pick_precision(settings.precision, device)
        torch.manual_seed(settings.seed)  # the first weights; a step never looks at this generator
        self.diffusion: LatentDiffusion = build.build_diffusion(
            config.to_dict(settings),
            num_classes=len(data.split.classes),
            latent_shape=self.dataset.latent_shape,
        ).to(device=device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self.ema = EMA(self.diffusion, decay=settings.ema_decay, update_every=settings.ema_update_every)
        self.losses_of: Any = self.diffusion
        self.is_compiled = self.has_compiled = False
        self.optimizer = torch.optim.Adam(
            self.diffusion.parameters(), lr=settings.train_lr, betas=(0.9, 0.99), fused=True
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)
        self.auto_steps = config.AUTO_STEPS
        self.finished_steps = 0
        self.saved_step = -1
        self.known_saves: set[tuple[str, str] | None] = {None}  # newest states that are no other process's
        self.losses: list[Tensor] = []  # of the steps since the last log line, left on the device
        self.sample_losses: list[tuple[Tensor, Tensor]] = []  # the same by sample: timesteps [b] and losses [b]
        self.grad_norm = torch.zeros((), device=device)
        self.first_bad_step = torch.full((), -1, device=device)

    def start(self, plan: Plan) -> None:
        """Takes up a saved state, or measures the normalisation of a new run; writes down the run's plan."""
        self.known_saves.add(plan.newest_save)
        if plan.state is None:
            self._fit_norm()
        else:
            self._restore(plan.state)
        compiled = self.choose_network(None if plan.state is None else plan.state.meta.compiled)
        if self.ranks.is_main:
            run_folder.write_plan(plan.results, config.to_yaml(self.settings), self.data.split)
        parameters = sum(p.numel() for p in self.diffusion.parameters()) / 1e6
        shared = "" if self.ranks.count == 1 else f", {self.share} on each of {self.ranks.count} processes"
        passes = "" if self.pass_size == self.share else f" in passes of {self.pass_size}"
        is_auto = isinstance(self.settings.train_num_steps, str)
        auto = f" ({config.AUTO_PASSES} passes over the images)" if is_auto else ""
        say(
            f"U-Net of {parameters:.2f} M parameters, {len(self.data.split.classes)} classes, "
            f"batch {self.batch}{shared}{passes}, {self.num_steps:,} steps{auto}"
        )
        precision = str(self.dtype).removeprefix("torch.")
        say(f"{precision} ({self.precision_reason}) on {hardware.describe(self.device)}, {compiled}")
        if plan.state is not None:
            say(f"going on from step {self.finished_steps:,} of {plan.state.path}")

    @property
    def norm(self) -> LatentNorm:
        """How the latents are normalised, once `start` has measured it or taken it from the state."""
        assert self.dataset.norm is not None
        return self.dataset.norm

    def begin_alike(self) -> None:
        """Makes sure that all processes begin with the same numbers."""
        ranks, networks = self.ranks, (self.diffusion, self.ema.model)
        ranks.check_same({"the number format": self.dtype}, "give --precision")
        ranks.check_same({"a compiled network": self.is_compiled}, "give --compile false")
        ranks.copy_of_main(tensor for network in networks for tensor in network.state_dict().values())
        self.dataset.set_norm(LatentNorm.from_json(ranks.of_main(self.norm.to_json())))

    def choose_network(self, began_compiled: bool | None) -> str:
        """Compiles the network that gives the losses, or leaves it as it is; returns what it did, and why.

        Args:
            began_compiled: whether the run that goes on was compiled, so that it goes on with the same bits.
        """
        self.is_compiled, told = hardware.pick_compile(
            self.settings.compile, self.device, num_steps=self.num_steps, as_before=began_compiled
        )
        if self.is_compiled:
            self.losses_of = torch.compile(self.diffusion, dynamic=False)
        return told

    def _fit_norm(self) -> None:
        settings, chosen = self.settings, self.data.chosen
        if settings.latent_norm == "scale_factor":
            channels = self.dataset.latent_shape[0]
            self.dataset.set_norm(LatentNorm.from_scale_factor(channels, chosen.scale_factor, chosen.shift_factor))
        else:
            self.dataset.fit_norm(seed=settings.seed, num_images=settings.latent_norm_images)

    def train_step(self) -> None:
        """Takes one optimiser step on one effective batch; leaves its loss on the device."""
        parts = self.parts_of(self.finished_steps)
        loss, by_sample = self._compiled_gradients(parts) if self.is_compiled else self._gradients(parts)
        if self.ranks.count > 1:
            loss, by_sample = self._add_others(loss, by_sample)
        self.sample_losses += by_sample
        self._update(loss, self.finished_steps)

    def _compiled_gradients(self, parts: Sequence[StepDraws]) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Does what `_gradients` does; without the compiler, on all processes, where it fails on one."""
        result, obstacle = None, None
        try:
            result = self._gradients(parts)
        except RuntimeError as error:
            obstacle = hardware.compiler_obstacle(error)
        if not self.has_compiled:
            obstacle, self.has_compiled = self.ranks.first_of(obstacle), True
        elif obstacle is not None and self.ranks.count > 1:  # the others are waiting for the gradients of this one
            raise Failed(
                f"the compiled network has failed ({obstacle}); give --compile false, and the same command goes on "
                "from the last save"
            )
        if obstacle is not None:
            with self.ranks.together():
                self._do_without_compiler(obstacle)
            result = self._gradients(parts)
        return result  # type: ignore[return-value]

    def _gradients(self, parts: Sequence[StepDraws]) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Leaves the gradients of this process's parts of a step in the network.

        Returns:
            Their share of the loss, and for each part its timesteps [b] and losses [b].
        """
        self.optimizer.zero_grad(set_to_none=True)
        loss, by_sample = torch.zeros((), device=self.device), []
        for part in parts:
            latents, labels = self.latents_of(part)
            with hardware.autocast(self.device, self.dtype):
                losses = self.losses_of(
                    latents, labels, times=part.times, noise=part.noise, cond_keep_mask=part.cond_keep_mask
                )
            share = losses.sum() / self.batch
            self.scaler.scale(share).backward()
            loss = loss + share.detach()
            by_sample.append((part.times, losses.detach()))
        return loss, by_sample

    def _add_others(
        self, loss: Tensor, by_sample: list[tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Adds the gradients of all processes up, in place; returns what `_gradients` does, of the whole step."""
        table = torch.zeros(2, self.batch, device=self.device)  # timesteps and losses, each process filling its columns
        for row, values in zip(table, zip(*by_sample, strict=True), strict=True):
            row[self.own] = torch.cat(values).float()
        loss, table = self.ranks.add_up(self.diffusion, loss, table)
        return loss, [(table[0].long(), table[1])]

    def _do_without_compiler(self, obstacle: str) -> None:
        script.warn_uncompiled(self.settings.compile, obstacle)
        self.losses_of, self.is_compiled = self.diffusion, False

    def parts_of(self, step: int) -> list[StepDraws]:
        """Makes this process's draws of a step, on the device, a part for each pass; encodes what the step misses."""
        settings = self.settings
        draws = draw_step(
            settings.seed,
            step,
            batch=self.batch,
            size=len(self.dataset),
            latent_shape=self.dataset.latent_shape,
            timesteps=settings.timesteps,
            cond_drop_prob=settings.cond_drop_prob,
            largest_shift=self.largest_shift,
        )
        self.dataset.ensure(draws.positions, self._upcoming(step + 1))
        own = draws.slice(self.own.start, self.own.stop)
        starts = range(0, self.share, self.pass_size)
        return [own.slice(start, start + self.pass_size).to(self.device) for start in starts]

    def latents_of(self, part: StepDraws) -> tuple[Tensor, Tensor]:
        """Draws the latents [b C h w] of a part of a step; returns them and their labels [b]."""
        latents, labels = self.dataset.batch(part.positions, part.posterior_noise)
        return (moved(latents, part.shifts) if self.largest_shift else latents), labels

    def _update(self, loss: Tensor, step: int) -> None:
        self.scaler.unscale_(self.optimizer)
        self.grad_norm = torch.nn.utils.clip_grad_norm_(self.diffusion.parameters(), self.settings.max_grad_norm)
        sick = ~torch.isfinite(loss)
        if not self.scaler.is_enabled():  # the scaler brings its own; fused Adam skips the step on the device
            sick = sick | ~torch.isfinite(self.grad_norm)
            self.optimizer.grad_scale, self.optimizer.found_inf = None, sick.float()  # type: ignore[attr-defined]
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.first_bad_step = torch.where(sick & (self.first_bad_step < 0), step, self.first_bad_step)
        self.losses.append(loss)
        self.finished_steps = step + 1
        self.ema.update(self.diffusion, self.finished_steps)

    def _upcoming(self, step: int) -> Iterator[int]:
        """Yields the positions that the steps from `step` on will visit, for an epoch."""
        size, chunk = len(self.dataset), 256
        for offset in range(0, size, chunk):
            yield from visited(self.settings.seed, step * self.batch + offset, min(chunk, size - offset), size).tolist()

    def names_of_step(self, step: int) -> list[str]:
        """Returns the names of the images that a step sees."""
        positions = visited(self.settings.seed, step * self.batch, self.batch, len(self.dataset))
        return [self.dataset.names[position] for position in positions.tolist()]

    def check_finite(self) -> None:
        """Raises Failed, naming the step and its images, if one was skipped since loss or gradient were not finite."""
        bad = int(self.first_bad_step)
        if bad >= 0:
            loss = self.losses[bad - self.finished_steps]  # one for each step since the last log line
            what = "the gradient of step" if loss.isfinite() else "the loss of step"
            raise Failed(
                f"{what} {bad + 1:,} is not finite; the step was not taken, the last save is in "
                f"{self.settings.results_folder}; its images are {', '.join(self.names_of_step(bad))}"
            )
        if self.scaler.is_enabled() and self.scaler.get_scale() < 1:
            raise Failed(
                f"the gradients overflow float16 even with a loss scale of {self.scaler.get_scale():g}, at step "
                f"{self.finished_steps:,}; no such step was taken, and the last save is in "
                f"{self.settings.results_folder}; give another --results_folder and --precision bfloat16 or float32"
            )

    # --- saving ---

    def save(self, folder: Path, *, with_average: bool = True) -> None:
        """Publishes the averaged weights alone, and the full state; then drops older full states. Rank 0 does so."""
        self.check_finite()  # else the next process would not know of it
        if self.ranks.is_main:
            self._publish(folder, with_average=with_average)
        self.saved_step = self.finished_steps

    def _publish(self, folder: Path, *, with_average: bool) -> None:
        self._refuse_company(folder)
        tensors, training = optimizer_state.pack_training_state(
            self.diffusion, self.ema.model, self.optimizer, self.scaler
        )
        tensors["log.losses"] = torch.stack(self.losses) if self.losses else torch.zeros(0)
        tensors["log.times"], tensors["log.sample_losses"] = self.losses_by_sample()
        meta = self._meta()
        try:
            if with_average:  # first: a run that goes on from the full state does not make it again
                average = {name: value for name, value in tensors.items() if name.startswith("ema.")}
                checkpoint.save(folder / run_folder.ema_name(self.finished_steps), average, meta.to_json())
            checkpoint.save(
                folder / run_folder.full_name(self.finished_steps),
                tensors,
                replace(meta, training=training).to_json(),
            )
        except OSError as error:
            raise Failed(
                f"the checkpoint of step {self.finished_steps:,} could not be saved in {folder}: "
                f"{error.strerror or error}; earlier ones are whole"
            ) from error
        self.known_saves.add(run_folder.newest_stamp(folder))
        run_folder.prune(folder, step=self.finished_steps)

    def losses_by_sample(self) -> tuple[Tensor, Tensor]:
        """Returns the timesteps [n] and losses [n] of all samples since the last log line, on the device."""
        empty = (torch.zeros(0, dtype=torch.long), torch.zeros(0))
        times, losses = zip(*(self.sample_losses or [empty]), strict=True)
        return torch.cat(times), torch.cat(losses).float()

    def _refuse_company(self, folder: Path) -> None:
        """Raises Failed when another process has saved there meanwhile; without locks, one of two goes on."""
        newest = run_folder.newest_stamp(folder)
        if newest is not None and newest not in self.known_saves:
            raise Failed(
                f"another training saves in {folder} too: {newest[0]} there is not of this process, which ends unsaved "
                f"at step {self.finished_steps:,}; let the other go on alone, or give each its own --results_folder"
            )

    def _meta(self) -> RunMeta:
        chosen, dataset = self.data.chosen, self.dataset
        return RunMeta(
            step=self.finished_steps,
            settings=config.to_dict(self.settings),
            classes=self.data.split.classes,
            latent_norm=self.norm,
            space=chosen.space,
            scale_factor=chosen.scale_factor,
            shift_factor=chosen.shift_factor,
            data_digest=dataset.digest(),
            moments_digest=dataset.moments_digest(),
            image_suffix=prepare.common_suffix(self.data.split),
            auto_steps=self.auto_steps,
            compiled=self.is_compiled,
            torch=torch.__version__,
        )

    def _restore(self, state: SavedState) -> None:
        self.dataset.set_norm(state.meta.latent_norm)
        losses = state.tensors.pop("log.losses", torch.zeros(0))
        times = state.tensors.pop("log.times", torch.zeros(0, dtype=torch.long))
        by_sample = state.tensors.pop("log.sample_losses", torch.zeros(0))
        for found in (losses, by_sample):
            if found.ndim != 1 or not found.is_floating_point():
                raise UserError(
                    f"{state.path} holds {list(found.shape)} losses of {found.dtype}, which is no list of them"
                )
        if times.dtype != torch.long or times.shape != by_sample.shape:
            raise UserError(f"{state.path} holds {list(times.shape)} timesteps for {list(by_sample.shape)} losses")
        if ((times < 0) | (times >= self.settings.timesteps)).any():
            raise UserError(f"{state.path} holds losses of timesteps that there are not")
        optimizer_state.unpack_training_state(
            state.tensors, state.meta.training or {}, self.diffusion, self.ema.model, self.optimizer, self.scaler
        )
        self.losses = list(losses.to(self.device))
        self.sample_losses = [(times.to(self.device), by_sample.to(self.device))] if len(times) else []
        self.auto_steps = state.meta.auto_steps
        self.finished_steps = state.step


# --- the loop ----------------------------------------------------------------------------------------------


def run(trainer: Trainer, plan: Plan) -> int:
    """Trains to the end, the time budget or a signal; saves in every case, and says how it ended."""
    settings, ranks = plan.settings, trainer.ranks
    with ranks.together():
        metrics = Metrics(plan.results, step=trainer.finished_steps, earlier=plan.origin, writes=ranks.is_main)
        shown_in = open_trackers(settings, trainer.finished_steps, metrics, plan.origin)
    grids = make_grid_maker(trainer, plan.results, metrics)
    metrics.on_row, grids.show = shown_in.add_row, shown_in.add_picture
    tell_disk(trainer, grids, plan, num_missing=len(trainer.dataset.missing()))
    clock = Clock(settings.max_hours, trainer)
    fresh = plan.state is None
    try:
        with StopSignals() as signals, _bar(trainer, settings) as bar:
            while trainer.finished_steps < trainer.num_steps:
                trainer.train_step()
                clock.forecast(trainer.num_steps)
                done = trainer.finished_steps
                with ranks.together():
                    if done % settings.log_every == 0:  # before a save, which holds the losses not told yet
                        log(trainer, metrics, bar, clock)
                    if fresh:  # a full disk or too little memory shows now, not hours later
                        fresh = _rehearse(trainer, grids, plan.results)
                    bar.advance()
                    if done % settings.save_and_sample_every == 0 or done == trainer.num_steps:
                        started = time.monotonic()
                        save_and_sample(trainer, grids, plan.results, signals)
                        clock.note_save(time.monotonic() - started)
                reason = ranks.agree_to_stop(signals.received, clock.is_up())
                if done < trainer.num_steps and reason is not None:
                    return _stop(trainer, plan, reason)
    finally:
        shown_in.close()
        trainer.dataset.cache_flush()
        trainer.dataset.close_encoder()
    say(f"done: {trainer.finished_steps:,} steps; peak memory {hardware.peak_memory(trainer.device)}")
    say(f"next: {script.python_word()} generate.py --checkpoint {shlex.quote(settings.results_folder)}")
    return DONE


def open_trackers(settings: TrainSettings, step: int, metrics: Metrics, origin: Path | None) -> trackers.Trackers:
    """Opens what shows the run besides its folder."""
    folder = Path(settings.results_folder)
    return trackers.Trackers(
        trackers.choose(settings.trackers) if metrics.writes else [],
        folder,
        earlier=origin,
        step=step,
        rows=metrics.rows,
        project=settings.wandb_project,
        run_name=settings.wandb_name or folder.absolute().name,
        settings=config.to_dict(settings),
    )


def make_grid_maker(trainer: Trainer, folder: Path, metrics: Metrics) -> GridMaker:
    """Makes what samples and draws the grids."""
    return GridMaker(
        trainer.settings,
        trainer.ema.model,
        trainer.dtype,
        trainer.dataset,
        trainer.data.split.classes,
        folder,
        metrics,
        auto_steps=trainer.auto_steps,
    )


def tell_disk(trainer: Trainer, grids: GridMaker, plan: Plan, *, num_missing: int) -> None:
    """Says what the saves to come, with their grids, and the latents that are missing will take on the disk."""
    every = trainer.settings.save_and_sample_every
    num_saves = math.ceil(trainer.num_steps / every) - trainer.finished_steps // every
    states = run_folder.bytes_for_saves(plan.results, num_saves, trainer.diffusion, trainer.ema.model)
    disk.tell(
        states + num_saves * grids.expected_bytes(),
        f"{num_saves:,} save{'s' * (num_saves > 1)}",
        plan.results,
        remedy="raise --save_and_sample_every, or give another --results_folder",
    )
    cache = trainer.dataset.cache
    if cache.writable:  # else they stay in memory
        num_bytes = latent_cache.expected_bytes(cache.space, num_missing)
        disk.tell(num_bytes, f"{num_missing:,} latents", cache.folder, remedy="give another --latents_cache_folder")


def _bar(trainer: Trainer, settings: TrainSettings) -> Any:
    return script.progress(total=trainer.num_steps, unit="steps", label="train", initial=trainer.finished_steps)


def _rehearse(trainer: Trainer, grids: GridMaker, folder: Path) -> bool:
    trainer.save(folder, with_average=False)
    if trainer.ranks.is_main:
        grids.rehearse()
    return False


def log(trainer: Trainer, metrics: Metrics, bar: Progress, clock: "Clock") -> None:
    """Writes a line of figures; this is where the device is waited for."""
    trainer.check_finite()
    losses = torch.stack(trainer.losses).tolist()
    times, sample_losses = (values.tolist() for values in trainer.losses_by_sample())
    trainer.losses, trainer.sample_losses = [], []
    loss, pace = math.fsum(losses) / len(losses), clock.steps_per_second()
    metrics.add(
        step=trainer.finished_steps,
        loss=loss,
        lr=trainer.settings.train_lr,
        grad_norm=float(trainer.grad_norm),
        **({"loss_scale": trainer.scaler.get_scale()} if trainer.scaler.is_enabled() else {}),
        seconds_per_step=round(1 / pace, 6),
        steps_per_second=round(pace, 3),
        images_per_second=round(pace * trainer.batch, 2),
        hours=round(clock.seconds() / 3600, 4),
        loss_by_timestep=mean_by_timestep(times, sample_losses, trainer.settings.timesteps),
    )
    bar.advance(0, loss=f"{loss:.4f}")


def save_and_sample(trainer: Trainer, grids: GridMaker, folder: Path, signals: StopSignals) -> None:
    """Saves the state, then makes the grid, which a signal cuts short, and the loss curve. Rank 0 does so."""
    ranks, step = trainer.ranks, trainer.finished_steps
    topic = f"drawn {step}"

    def between() -> None:
        if ranks.is_main:
            ranks.sign_of_life(topic)
        ranks.raise_if_stopped(signals)

    try:
        with ranks.while_main_works(topic, between):
            trainer.save(folder)
            if ranks.is_main:
                grids.make(step, between=between)
    except Stopped:
        say(f"step {step:,}: no sample grid, since a signal came")
    if ranks.is_main:
        grids.draw_loss()


def _stop(trainer: Trainer, plan: Plan, reason: int) -> int:
    with trainer.ranks.together():  # so that no process leaves before rank 0 has saved
        if trainer.saved_step != trainer.finished_steps:
            trainer.save(plan.results, with_average=False)
    why = f"after --max_hours {plan.settings.max_hours:g}" if reason == TIME_IS_UP else "by signal"
    say(f"stopped {why} at step {trainer.finished_steps:,}; saved, and the same command goes on from there")
    if reason != TIME_IS_UP:
        raise Stopped(reason)
    return DONE


class Clock:
    """The pace of the run, and its time budget counted from the start of the process."""

    def __init__(self, max_hours: float | None, trainer: Trainer) -> None:
        self.trainer = trainer
        self.limit = math.inf if max_hours is None else 3600 * max_hours  # seconds
        self.started = self.marked = time.monotonic()
        self.settled = self.started
        self.first_step = self.marked_step = trainer.finished_steps
        self.longest_save = 0.0

    def seconds(self) -> float:
        """Returns the seconds since the first step of this process."""
        return time.monotonic() - self.started

    def steps_per_second(self) -> float:
        """Returns the pace since this was last asked."""
        now, done = time.monotonic(), self.trainer.finished_steps
        pace = (done - self.marked_step) / max(now - self.marked, 1e-9)
        self.marked, self.marked_step = now, done
        return pace

    def forecast(self, num_steps: int) -> None:
        """Says once, after the first steps, how long the rest will take."""
        taken = self.trainer.finished_steps - self.first_step
        left = num_steps - self.trainer.finished_steps
        if taken in (_SETTLING_STEPS, _FORECAST_STEPS):
            hardware.synchronize(self.trainer.device)
        if taken == _SETTLING_STEPS:
            self.settled = time.monotonic()
        if taken == _FORECAST_STEPS and left > 0:
            seconds = (time.monotonic() - self.settled) / (_FORECAST_STEPS - _SETTLING_STEPS)
            say(f"{left:,} steps to go will take about {script.duration(seconds * left)}")

    def note_save(self, seconds: float) -> None:
        """Remembers how long a save took, so that the last one fits into the budget."""
        self.longest_save = max(self.longest_save, seconds)

    def is_up(self) -> bool:
        """Says whether the budget is used up, room for the last save left."""
        reserve = min(2 * self.longest_save + 5, self.limit / 2)
        return time.monotonic() - script.PROCESS_START + reserve >= self.limit


if __name__ == "__main__":
    sys.exit(main(None))
