"""What a training run does around its steps: figures, grids, saves, the clock, and how it ends."""

import math
import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from gait_latents.common import cli, console, hardware, process
from gait_latents.common.console import Progress, say
from gait_latents.common.distributed import TIME_IS_UP
from gait_latents.common.errors import DONE, Failed, Stopped
from gait_latents.common.process import StopSignals
from gait_latents.diffusion.model import mean_by_timestep
from gait_latents.images.reading import BadImage
from gait_latents.latents import shard as shard_file
from gait_latents.settings import TrainSettings
from gait_latents.training import run_folder, trackers
from gait_latents.training.grids import GridMaker
from gait_latents.training.metrics_log import Metrics
from gait_latents.training.plan import Plan
from gait_latents.training.trainer import Trainer

_SETTLING_STEPS = 10  # first steps of a process, among which are compiling and the first save: they tell no pace
_FORECAST_STEPS = 50  # steps after which the length of the run is told


@contextmanager
def plain_errors(plan: "Plan") -> Iterator[None]:
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
    say(f"next: {console.python_word()} generate.py --checkpoint {shlex.quote(settings.results_folder)}")
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
        settings=cli.to_dict(settings),
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


def _bar(trainer: Trainer, settings: TrainSettings) -> Any:
    return console.progress(total=trainer.num_steps, unit="steps", label="train", initial=trainer.finished_steps)


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
            say(f"{left:,} steps to go will take about {console.duration(seconds * left)}")

    def note_save(self, seconds: float) -> None:
        """Remembers how long a save took, so that the last one fits into the budget."""
        self.longest_save = max(self.longest_save, seconds)

    def is_up(self) -> bool:
        """Says whether the budget is used up, room for the last save left."""
        reserve = min(2 * self.longest_save + 5, self.limit / 2)
        return time.monotonic() - process.PROCESS_START + reserve >= self.limit
