"""The state of a training run (network, average, optimizer): how a step changes it, how it is saved and restored."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gait_latents.common import cli, hardware
from gait_latents.common.console import say, warn
from gait_latents.common.distributed import ALONE, Ranks
from gait_latents.common.errors import Failed, UserError
from gait_latents.common.seeds import draw_positions
from gait_latents.diffusion import build
from gait_latents.diffusion.ema import EMA
from gait_latents.diffusion.model import LatentDiffusion, own_columns, shift_along_width
from gait_latents.images import selection
from gait_latents.latents import vae_fit
from gait_latents.settings import AUTO_STEPS, TrainSettings
from gait_latents.training import checkpoint, optimizer_state, run_folder
from gait_latents.training.beginning import Beginning, begin, freeze_network
from gait_latents.training.draws import DeviceDraws, DrawsAhead, StepDraws, draw_step
from gait_latents.training.plan import (
    TrainingPlan,
    batch_size,
    describe_num_steps,
    num_steps,
    pass_size,
    plain_errors,
)
from gait_latents.training.run_data import Data, encode_sample, fill, write_cache_defaults
from gait_latents.training.run_folder import SavedState, Writer
from gait_latents.training.run_meta import RunMeta
from gait_latents.vae.norm import LatentNorm


def start_trainer(plan: TrainingPlan, data: Data, device: torch.device, ranks: Ranks = ALONE) -> "Trainer":
    """Builds the network, its average and its optimizer, and takes up the saved state of a run that goes on."""
    with ranks.together(), plain_errors(plan):
        if ranks.count > 1:
            fill(data.dataset, ranks)  # now, for no step must wait for the encoder of another process
        trainer = Trainer(plan.settings, data, device, ranks)
        if ranks.is_main:
            write_cache_defaults(plan, data)
        trainer.start(plan)
    trainer.begin_alike()
    return trainer


class Trainer:
    """The state that a step changes: network, average, optimiser, loss scaler; and how a step changes it."""

    def __init__(self, settings: TrainSettings, data: Data, device: torch.device, ranks: Ranks = ALONE) -> None:
        self.settings, self.data, self.device, self.ranks = settings, data, device, ranks
        self.dataset = data.dataset
        self.batch = batch_size(settings)
        self.num_steps = num_steps(settings, len(self.dataset))
        self.largest_shift = round(settings.time_shift * self.dataset.latent_shape[2])  # in columns of a latent
        self.share = self.batch // ranks.count
        self.own = slice(ranks.rank * self.share, (ranks.rank + 1) * self.share)  # the rows of the batch that are ours
        self.pass_size = pass_size(settings, self.dataset.latent_shape, num_ranks=ranks.count)
        self._ahead = DrawsAhead(self._draw, self.own, pinned=device.type == "cuda")
        self._sent = DeviceDraws(device)
        hardware.allow_tf32()
        self.dtype, self.precision_reason = hardware.pick_precision(settings.precision, device)
        torch.manual_seed(settings.seed)  # for the first weights; steps have generators of their own
        self.diffusion: LatentDiffusion = build.build_diffusion(
            cli.to_dict(settings),
            num_classes=len(data.split.classes),
            latent_shape=self.dataset.latent_shape,
        ).to(device=device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        if settings.freeze_network:
            freeze_network(self.diffusion)
        self.ema = EMA(self.diffusion, decay=settings.ema_decay, update_every=settings.ema_update_every)
        self.losses_of: Any = self.diffusion
        self.is_compiled = self.has_compiled = False
        self.num_threads: int | None = None  # of the steps on a CPU
        learnt = [parameter for parameter in self.diffusion.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.Adam(learnt, lr=settings.train_lr, betas=(0.9, 0.99), fused=True)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)
        self.auto_steps = AUTO_STEPS
        self.began_from: Mapping[str, Any] | None = None
        self.finished_steps = 0
        self.saved_step = -1
        self.losses: list[Tensor] = []  # of the steps since the last log line, left on the device
        self.sample_losses: list[tuple[Tensor, Tensor]] = []  # the same by sample: timesteps [b] and losses [b]
        self.grad_norm = torch.zeros((), device=device)
        self.first_bad_step = torch.full((), -1, device=device)

    def start(self, plan: TrainingPlan) -> None:
        """Restores the saved state, or begins a new run."""
        if plan.state is not None:
            self._restore(plan.state)
        elif plan.beginning is not None:
            self._begin(plan.beginning)
        else:
            self._fit_norm()
        compiled = self.choose_network(None if plan.state is None else plan.state.meta.compiled)
        told_threads = self._choose_threads(plan.state)
        parameters = sum(p.numel() for p in self.diffusion.parameters()) / 1e6
        learnt = sum(p.numel() for p in self.diffusion.parameters() if p.requires_grad)
        some = f" ({learnt:,} of them learnt)" if self.settings.freeze_network else ""
        shared = "" if self.ranks.count == 1 else f", {self.share} on each of {self.ranks.count} processes"
        passes = "" if self.pass_size == self.share else f" in passes of {self.pass_size}"
        say(
            f"U-Net of {parameters:.2f} M parameters{some}, {len(self.data.split.classes)} classes, "
            f"batch {self.batch}{shared}{passes}, {describe_num_steps(self.settings, len(self.dataset))}"
        )
        precision = str(self.dtype).removeprefix("torch.")
        say(f"{precision} ({self.precision_reason}) on {hardware.describe(self.device, self.num_threads)}, {compiled}")
        if told_threads:
            say(told_threads)
        if plan.state is not None:
            say(f"going on from step {self.finished_steps:,} of {plan.state.path}")

    @property
    def norm(self) -> LatentNorm:
        """How the latents are normalised, once `start` has measured it or taken it from the state."""
        assert self.dataset.norm is not None
        return self.dataset.norm

    def begin_alike(self) -> None:
        """Makes sure that all processes begin with the same weights and normalisation. Collectives."""
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

    def _begin(self, beginning: Beginning) -> None:
        """Begins with the weights of another run, which know latents as they were normalised there."""
        networks, classes = (self.diffusion, self.ema.model), self.data.split.classes
        begin(beginning, *networks, classes, is_frozen=self.settings.freeze_network)
        self.dataset.set_norm(beginning.state.meta.latent_norm)
        self._say_unused_factors("the latents are normalised as in the run of --init_from")
        self._note_beginning(beginning.to_json())

    def _note_beginning(self, began_from: Mapping[str, Any] | None) -> None:
        self.began_from = began_from
        if began_from is not None:
            self.ema.copied_steps = 0

    def _choose_threads(self, state: SavedState | None) -> str:
        """Chooses the number of threads for the steps; returns what to say of it.

        An older run has not noted its number, and goes on with all. Processes that share a machine are not free of each
        other: they take what they were started with.
        """
        usual = torch.get_num_threads()
        if self.ranks.count > 1:
            self.num_threads = usual if self.device.type == "cpu" else None
            return ""
        began_with = None if state is None else state.meta.threads or usual
        self.num_threads, told = hardware.pick_threads(self.device, as_before=began_with)
        return told

    def _fit_norm(self) -> None:
        settings, chosen = self.settings, self.data.chosen
        encode_sample(self.dataset, settings)
        if settings.latent_norm == "scale_factor":
            channels = self.dataset.latent_shape[0]
            self.dataset.set_norm(LatentNorm.from_scale_factor(channels, chosen.scale_factor, chosen.shift_factor))
            doubt = vae_fit.doubt_of_factors(
                self.dataset.sample_moments(seed=settings.seed, num_images=settings.latent_norm_images), chosen
            )
            if doubt:
                warn(f"{doubt}, and so does --latent_norm moments")
            return
        self.dataset.fit_norm(seed=settings.seed, num_images=settings.latent_norm_images)
        self._say_unused_factors("--latent_norm moments measures the latents instead")

    def _say_unused_factors(self, reason: str) -> None:
        if self.settings.scale_factor is not None or self.settings.shift_factor is not None:
            say(f"scale_factor and shift_factor are not used, as {reason}")

    def train_step(self) -> None:
        """Takes one optimiser step on one effective batch; leaves its loss on the device."""
        parts = self.parts_of(self.finished_steps)
        loss, by_sample = self._compiled_gradients(parts) if self.is_compiled else self._gradients(parts)
        if self.ranks.count > 1:
            loss, by_sample = self._add_others(loss, by_sample)
        self.sample_losses += by_sample
        self._update(loss, self.finished_steps)

    def _compiled_gradients(self, parts: Sequence[StepDraws]) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Does what `_gradients` does with the compiled network.

        Where compiling fails on one process in its first step, all go on without the compiler.
        """
        result, obstacle = None, None
        try:
            result = self._gradients(parts)
        except Exception as error:  # Triton's are no RuntimeErrors
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
            return self._gradients(parts)
        assert result is not None  # since no process has met an obstacle
        return result

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
                    latents,
                    labels,
                    times=part.times,
                    noise=part.noise,
                    cond_keep_mask=part.cond_keep_mask,
                    loss_mask=self._loss_mask(part),
                )
            share = losses.sum() / self.batch
            self.scaler.scale(share).backward()
            loss = loss + share.detach()
            by_sample.append((part.times.clone(), losses.detach()))  # the next step's times take their place
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
        hardware.warn_uncompiled(self.settings.compile, obstacle)
        self.losses_of, self.is_compiled = self.diffusion, False

    def parts_of(self, step: int) -> list[StepDraws]:
        """Returns this process's draws of a step, on the device, one part for each pass through the network.

        Latents of the step that were not encoded yet are encoded first.
        """
        if self.device.type == "cpu":  # where a thread beside the step would take its core
            draws = self._draw(step)
            own = draws.slice(self.own.start, self.own.stop)
            self.dataset.ensure(draws.positions, self._upcoming(step + 1))
        else:
            draws, own, buffer = self._ahead.of(step)
            self.dataset.ensure(draws.positions, self._upcoming(step + 1))
            own = self._sent.send(own, buffer)
        return [own.slice(start, start + self.pass_size) for start in range(0, self.share, self.pass_size)]

    def _draw(self, step: int) -> StepDraws:
        settings = self.settings
        return draw_step(
            settings.seed,
            step,
            batch=self.batch,
            size=len(self.dataset),
            latent_shape=self.dataset.latent_shape,
            timesteps=settings.timesteps,
            cond_drop_prob=settings.cond_drop_prob,
            largest_shift=self.largest_shift,
        )

    def latents_of(self, part: StepDraws) -> tuple[Tensor, Tensor]:
        """Draws the latents [b C h w] of a part of a step; returns them and their labels [b]."""
        latents, labels = self.dataset.batch(part.positions, part.posterior_noise, part.host_positions)
        return (shift_along_width(latents, part.shifts) if self.largest_shift else latents), labels

    def _loss_mask(self, part: StepDraws) -> Tensor | None:
        """Returns the mask [b w] of the columns that are the latent's own; None where all count.

        Where a shift repeats the edge there is nothing to learn: a network that did would draw such edges.
        """
        if not self.largest_shift or self.settings.learn_edges:
            return None
        return own_columns(part.shifts, self.dataset.latent_shape[2])

    def _update(self, loss: Tensor, step: int) -> None:
        self.scaler.unscale_(self.optimizer)
        self.grad_norm = torch.nn.utils.clip_grad_norm_(self.diffusion.parameters(), self.settings.max_grad_norm)
        sick = ~torch.isfinite(loss)
        if (
            not self.scaler.is_enabled()
        ):  # as a scaler does: fused Adam then skips a bad step without a word to the host
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
            yield from draw_positions(
                self.settings.seed, step * self.batch + offset, min(chunk, size - offset), size
            ).tolist()

    def names_of_step(self, step: int) -> list[str]:
        """Returns the names of the images that a step sees."""
        positions = draw_positions(self.settings.seed, step * self.batch, self.batch, len(self.dataset))
        return [self.dataset.names[position] for position in positions.tolist()]

    def check_finite(self) -> None:
        """Raises Failed, naming step and images, if a step was skipped because its loss or gradient was not finite."""
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
                f"{self.settings.results_folder}; give another --results_folder and --precision float32"
            )

    # --- saving ---

    def save(self, writer: Writer, *, with_average: bool = True) -> None:
        """Publishes, on rank 0, the averaged weights alone and the full state; then drops older full states.

        Raises:
            Failed: when that cannot be done, or the results folder is gone or that of another training.
        """
        self.check_finite()  # a step that was skipped would else be forgotten: it is not in the saved state
        if self.ranks.is_main:
            self._publish(writer, with_average=with_average)
        self.saved_step = self.finished_steps

    def _publish(self, writer: Writer, *, with_average: bool) -> None:
        folder = writer.folder
        tensors, training = optimizer_state.pack_training_state(
            self.diffusion, self.ema.model, self.optimizer, self.scaler
        )
        tensors["log.losses"] = torch.stack(self.losses) if self.losses else torch.zeros(0)
        tensors["log.times"], tensors["log.sample_losses"] = self.losses_by_sample()
        meta = self._meta()
        try:
            if with_average:  # before the full state: a run that goes on from that one would not write them again
                average = {name: value for name, value in tensors.items() if name.startswith("ema.")}
                writer.check(self.finished_steps)
                checkpoint.save(
                    folder / run_folder.ema_name(self.finished_steps), average, meta.to_json(), below=folder
                )
            writer.check(self.finished_steps)
            checkpoint.save(
                folder / run_folder.full_name(self.finished_steps),
                tensors,
                replace(meta, training=training).to_json(),
                below=folder,
            )
        except OSError as error:
            writer.check(self.finished_steps)
            raise Failed(
                f"the checkpoint of step {self.finished_steps:,} could not be saved in {folder}: "
                f"{error.strerror or error}; earlier ones are whole"
            ) from error
        writer.note_save()
        run_folder.prune(folder, step=self.finished_steps)

    def losses_by_sample(self) -> tuple[Tensor, Tensor]:
        """Returns the timesteps [n] and losses [n] of all samples since the last log line, on the device."""
        empty = (torch.zeros(0, dtype=torch.long), torch.zeros(0))
        times, losses = zip(*(self.sample_losses or [empty]), strict=True)
        return torch.cat(times), torch.cat(losses).float()

    def _meta(self) -> RunMeta:
        chosen, dataset = self.data.chosen, self.dataset
        return RunMeta(
            step=self.finished_steps,
            settings=cli.to_dict(self.settings),
            classes=self.data.split.classes,
            latent_norm=self.norm,
            space=chosen.space,
            scale_factor=chosen.scale_factor,
            shift_factor=chosen.shift_factor,
            data_digest=dataset.digest(),
            moments_digest=dataset.moments_digest(),
            image_suffix=selection.common_suffix(self.data.split),
            auto_steps=self.auto_steps,
            compiled=self.is_compiled,
            torch=torch.__version__,
            threads=self.num_threads,
            began_from=self.began_from,
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
        self._note_beginning(state.meta.began_from)
        self.auto_steps = state.meta.auto_steps
        self.finished_steps = state.step
