"""What a training run does around its steps: log, saves, sample grids, trackers, time budget, and its end."""

import math
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from gait_latents.common import cli, console, hardware, process
from gait_latents.common.console import say, warn
from gait_latents.common.cores import CoreWatch
from gait_latents.common.distributed import TIME_IS_UP
from gait_latents.common.errors import DONE, Stopped, name_signal
from gait_latents.common.process import StopSignals
from gait_latents.diffusion.model import mean_by_timestep
from gait_latents.latents import shard as shard_file
from gait_latents.settings import TrainSettings
from gait_latents.training import run_folder, trackers
from gait_latents.training.grids import GridMaker
from gait_latents.training.held_out import HeldOutLoss, describe_best
from gait_latents.training.metrics_log import Metrics
from gait_latents.training.plan import TrainingPlan
from gait_latents.training.run_folder import Writer
from gait_latents.training.trainer import Trainer

_SETTLING_STEPS = 10  # the first steps of a process are slow, with compiling and the first save: no pace is measured
_FORECAST_STEPS = 50  # steps after which the length of the run is told


class TrainingLoop:
    """The work between the steps of a run, from the first step of this process to its end.

    Within the block, signals that ask for an end are noted, not obeyed at once: `reason_to_stop` tells of them between
    steps.
    """

    def __init__(self, trainer: Trainer, plan: TrainingPlan) -> None:
        self.trainer, self.plan, self.settings, self.ranks = trainer, plan, plan.settings, trainer.ranks
        self.writer = Writer(plan.results, plan.newest_save, cli.to_yaml(self.settings), trainer.data.split)
        with self.ranks.together():
            self.metrics = Metrics(
                plan.results,
                step=trainer.finished_steps,
                earlier=plan.origin,
                writes=self.ranks.is_main,
                check=self.writer.check,
            )
            self.trackers = open_trackers(self.settings, trainer.finished_steps, self.metrics, plan.origin)
        self.grids = GridMaker(
            trainer.settings,
            trainer.ema.model,
            trainer.dtype,
            trainer.dataset,
            trainer.data.split.classes,
            plan.results,
            self.metrics,
            auto_steps=trainer.auto_steps,
        )
        self.held_out = HeldOutLoss(
            trainer.ema.model, trainer.dtype, trainer.dataset, trainer.data.validation, seed=trainer.settings.seed
        )
        self.metrics.on_row, self.grids.show = self.trackers.add_row, self.trackers.add_picture
        tell_disk(trainer, self.grids, plan, num_missing=len(trainer.dataset.missing()))
        self.clock = Clock(self.settings.max_hours, trainer)
        self.core_watch = None if trainer.num_threads is None else CoreWatch(trainer.num_threads)
        self._is_first_step = plan.state is None
        self._open = ExitStack()

    def __enter__(self) -> "TrainingLoop":
        self.signals = self._open.enter_context(StopSignals(after="this step, or the image that is being encoded"))
        self._open.callback(self.trainer.dataset.close_encoder)
        self._open.callback(self.trainer.dataset.cache_flush)
        self._open.callback(self.trackers.close)
        self._open.enter_context(hardware.threads(self.trainer.num_threads))
        self._open.enter_context(self.trainer.dataset.watched(self._after_images))
        total, done = self.trainer.num_steps, self.trainer.finished_steps
        self.bar = self._open.enter_context(
            console.progress(
                total=total, unit="steps", label="train", initial=done, first_is_slow=self.trainer.is_compiled
            )
        )
        self._watch_step()
        return self

    def __exit__(self, *error: Any) -> None:
        self._open.__exit__(*error)

    def _after_images(self, _count: int) -> None:
        """Ends the run on a signal while a step waits for latents: nothing of that step is computed by then."""
        if self.signals.received is not None and self.ranks.count == 1:
            self.stop(self.signals.received)

    def after_step(self) -> None:
        """Does what is due after a step: a line of the log, the first save, a save with its sample grid."""
        trainer, settings = self.trainer, self.settings
        self._tell_crowd()
        self.clock.forecast(trainer.num_steps)
        done = trainer.finished_steps
        with self.ranks.together():
            self._begin_to_write()
            if done % settings.log_every == 0:  # before a save, which holds the losses not told yet
                self._log()
            if self._is_first_step:
                self._rehearse()
            self.bar.advance()
            if done % settings.save_and_sample_every == 0 or done == trainer.num_steps:
                started = time.monotonic()
                self._save_and_sample()
                self.clock.note_save(time.monotonic() - started)
        self._watch_step()

    def _begin_to_write(self) -> None:
        """Makes the results folder that of this training, on rank 0, after the first step that it has taken."""
        if self.ranks.is_main and not self.writer.has_begun:
            self.writer.begin(self.trainer.finished_steps)
            self.metrics.publish()

    def _watch_step(self) -> None:
        if self.core_watch is not None:
            self.core_watch.begin_step()

    def _tell_crowd(self) -> None:
        """Warns once of other programs that hold the cores which the steps need."""
        if self.core_watch is not None:
            self.core_watch.end_step()
            crowd = self.core_watch.report()
            if crowd is not None:
                warn(crowd)

    def reason_to_stop(self) -> int | None:
        """Returns why the run stops before its last step: the number of a signal, TIME_IS_UP, or None."""
        reason = self.ranks.agree_to_stop(self.signals.received, self.clock.is_up())
        return None if self.trainer.finished_steps >= self.trainer.num_steps else reason

    def stop(self, reason: int) -> int:
        """Saves, and says that the same command goes on; returns the exit code.

        Raises:
            Stopped: when the reason is a signal.
        """
        trainer = self.trainer
        why = f"after --max_hours {self.settings.max_hours:g}" if reason == TIME_IS_UP else f"by {name_signal(reason)}"
        if self._is_first_step and not trainer.finished_steps:  # while the first step's images were being encoded
            kept = "new latents are kept, and " if trainer.dataset.cache.writable else ""
            say(f"stopped {why} before the first step; {kept}the same command begins again")
            raise Stopped(reason)
        with self.ranks.together():  # so that no process leaves before rank 0 has saved
            self._begin_to_write()
            if trainer.saved_step != trainer.finished_steps:
                trainer.save(self.writer, with_average=False)
        say(f"stopped {why} at step {trainer.finished_steps:,}; saved, and the same command goes on from there")
        if reason != TIME_IS_UP:
            raise Stopped(reason)
        return DONE

    def finish(self) -> int:
        """Says that all steps are done, and how to go on; returns the exit code."""
        say(f"done: {self.trainer.finished_steps:,} steps; peak memory {hardware.peak_memory(self.trainer.device)}")
        advice = describe_best(self.metrics.rows, list(run_folder.saved_averages(self.plan.results)))
        if advice is not None:
            say(advice)
        flag = cli.typed("checkpoint", [self.settings.results_folder])
        say(f"next: {console.python_word()} generate.py {flag}")
        return DONE

    def _log(self) -> None:
        """Writes a line of figures. Reading the losses waits for the device, which steps do not."""
        trainer, clock = self.trainer, self.clock
        trainer.check_finite()
        losses = torch.stack(trainer.losses).tolist()
        times, sample_losses = (values.tolist() for values in trainer.losses_by_sample())
        trainer.losses, trainer.sample_losses = [], []
        loss, pace = math.fsum(losses) / len(losses), clock.steps_per_second()
        self.metrics.add(
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
        self.bar.advance(0, loss=f"{loss:.4f}")

    def _rehearse(self) -> None:
        """Saves and samples once after the first step, so that what cannot work fails now and not hours later."""
        self.trainer.save(self.writer, with_average=False)
        if self.ranks.is_main:
            if self.settings.num_samples:
                say("the first step is saved; a sample is tried now, so that what cannot work fails at once")
            self.grids.rehearse()
        self._is_first_step = False

    def _save_and_sample(self) -> None:
        """Saves the state, then draws, on rank 0, the sample grid, which a signal cuts short, and the loss curve."""
        ranks, step = self.ranks, self.trainer.finished_steps
        topic = f"drawn {step}"

        def between(_count: int = 0) -> None:
            if ranks.is_main:
                ranks.sign_of_life(topic)
            ranks.raise_if_stopped(self.signals)

        try:
            with ranks.while_main_works(topic, between), self.trainer.dataset.watched(between):
                self.trainer.save(self.writer)
                if ranks.is_main:
                    figures = self.held_out.measure(between)
                    if figures:
                        self.metrics.add(step=step, **figures)
                    self.grids.make(step, between=between)
        except Stopped:
            say(f"step {step:,}: no sample grid, since a signal came")
        if ranks.is_main:
            self.grids.draw_loss()


def open_trackers(settings: TrainSettings, step: int, metrics: Metrics, origin: Path | None) -> trackers.Trackers:
    """Opens the trackers (TensorBoard, Weights & Biases) that show the run besides its folder; on rank 0."""
    folder = Path(settings.results_folder)
    return trackers.Trackers(
        trackers.choose(settings.trackers) if metrics.writes else [],
        folder,
        earlier=origin,
        step=step,
        rows=metrics.rows,
        project=settings.wandb_project,
        run_name=settings.wandb_name or folder.absolute().name,
        settings=cli.to_dict(settings),
    )


def tell_disk(trainer: Trainer, grids: GridMaker, plan: TrainingPlan, *, num_missing: int) -> None:
    """Prints how much disk space the remaining saves with their grids and the missing latents will take."""
    every = trainer.settings.save_and_sample_every
    num_saves = math.ceil(trainer.num_steps / every) - trainer.finished_steps // every
    states = run_folder.bytes_for_saves(plan.results, num_saves, trainer.diffusion, trainer.ema.model)
    console.tell(
        states + num_saves * grids.expected_bytes(),
        f"{num_saves:,} save{'s' * (num_saves > 1)}",
        plan.results,
        remedy="raise --save_and_sample_every, or give another --results_folder",
    )
    cache = trainer.dataset.cache
    if cache.writable:  # else they stay in memory
        num_bytes = shard_file.expected_bytes(cache.space, num_missing)
        console.tell(num_bytes, f"{num_missing:,} latents", cache.folder, remedy="give another --latents_cache_folder")


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
        """Prints once, after the first steps, how long the rest will take."""
        taken = self.trainer.finished_steps - self.first_step
        left = num_steps - self.trainer.finished_steps
        if taken in (_SETTLING_STEPS, _FORECAST_STEPS):
            hardware.synchronize(self.trainer.device)
        if taken == _SETTLING_STEPS:
            self.settled = time.monotonic()
        if taken == _FORECAST_STEPS and left > 0:
            seconds = (time.monotonic() - self.settled) / (_FORECAST_STEPS - _SETTLING_STEPS)
            say(f"{left:,} steps to go will take about {console.duration(seconds * left)}")

    def note_save(self, seconds: float) -> None:
        """Remembers how long a save took, so that the last one fits into the budget."""
        self.longest_save = max(self.longest_save, seconds)

    def is_up(self) -> bool:
        """Says whether the time budget is used up but for what the last save needs."""
        reserve = min(2 * self.longest_save + 5, self.limit / 2)
        return time.monotonic() - process.PROCESS_START + reserve >= self.limit
