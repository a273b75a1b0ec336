"""The denoising loss of images that training does not see, at each save: where it rises, training has begun to recite.

It needs no sampling. Each image is noised once in each of ten ranges of timesteps, always at the same timestep with the
same noise, so that two saves differ by their weights alone. Of validation and of training images up to 64 each are
measured, which the seed draws: the distance between the two is what the model has learnt by heart.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gait_latents.common import hardware, shortage
from gait_latents.common.console import say, warn
from gait_latents.common.errors import UserError
from gait_latents.common.seeds import sample_generator
from gait_latents.diffusion.model import NUM_TIME_BINS, LatentDiffusion, mean_by_timestep
from gait_latents.latents.dataset import LatentDataset

LOSS, SEEN_LOSS = "held_out_loss", "seen_loss"  # in metrics.jsonl: of validation and of training images
_MOST_IMAGES = 64
_MARGIN = 0.02  # by which the loss has to rise before that is told
_AT_ONCE = 32  # noisy latents in a pass


class HeldOutLoss:
    """Measures the averaged network on validation and on training images.

    Args:
        network: the averaged network, which changes between the calls.
        dtype: the number format that it computes in.
        training: the data that it is trained on, with its normalisation.
        validation: the data that it is not trained on; None where the run has none.
        seed: chooses images, timesteps and noise.
    """

    def __init__(
        self,
        network: LatentDiffusion,
        dtype: torch.dtype,
        training: LatentDataset,
        validation: LatentDataset | None,
        *,
        seed: int,
    ) -> None:
        self.network, self.dtype, self.seed = network, dtype, seed
        self.sets = {LOSS: validation, SEEN_LOSS: training} if validation is not None else {}
        self._positions: dict[str, Tensor] = {}
        if validation is not None:
            assert training.norm is not None  # since the trainer has started
            validation.set_norm(training.norm)
            missing = len(validation.missing())
            if missing and not validation.can_encode:
                say(
                    f"no {LOSS}: {missing:,} validation images are not encoded, and the images or the VAE are not at "
                    "hand"
                )
                self.sets = {}

    def measure(self, between: Callable[[], None] = lambda: None) -> dict[str, Any]:
        """Returns both losses, as mean over all ranges of timesteps and for each; empty where nothing can be measured.

        Where it fails, for want of memory or of the VAE, it warns and measures no more: training goes on.

        Args:
            between: called between any two pieces of the work; what it raises ends the work.
        """
        try:
            return self._measure(between)
        except (UserError, MemoryError, RuntimeError) as error:
            kind = None if isinstance(error, UserError) else shortage.kind_of(error)
            if not isinstance(error, UserError) and kind not in (shortage.GPU, shortage.MEMORY):
                raise
            why = str(error) if kind is None else f"{shortage.who_lacks_memory(kind)} has too little memory for it"
            warn(f"no more {LOSS}: {why}")
            self.sets = {}
            return {}

    def _measure(self, between: Callable[[], None]) -> dict[str, Any]:
        figures: dict[str, Any] = {}
        for name, dataset in self.sets.items():
            positions = self._encoded(name, dataset, between)
            if not len(positions):
                return {}
            times, losses = self._losses(name, dataset, positions, between)
            figures[name] = round(math.fsum(losses) / len(losses), 6)
            table = mean_by_timestep(times, losses, self.network.num_timesteps)
            figures[f"{name}_by_timestep"] = {part: round(loss, 6) for part, loss in table.items()}
        return figures

    def _choose(self, name: str, dataset: LatentDataset) -> Tensor:
        order = torch.randperm(len(dataset), generator=sample_generator(self.seed, "held out", name))
        return order[:_MOST_IMAGES].sort().values

    def _encoded(self, name: str, dataset: LatentDataset, between: Callable[[], None]) -> Tensor:
        """Returns the positions to measure; images that cannot be read are named once and left out."""
        if name not in self._positions:
            chosen = self._choose(name, dataset)
            # Of validation images all, so that the cache is the one that preprocess_latents.py makes.
            wanted = None if name == LOSS else chosen.tolist()
            bad = dict(dataset.fill(wanted, advance=lambda _count: between()))
            for position, reason in bad.items():
                warn(f"{dataset.names[position]}: {reason}; it is left out of the {name}")
            self._positions[name] = torch.tensor([p for p in chosen.tolist() if p not in bad], dtype=torch.long)
        return self._positions[name]

    @torch.inference_mode()
    def _losses(
        self, name: str, dataset: LatentDataset, positions: Tensor, between: Callable[[], None]
    ) -> tuple[list[int], list[float]]:
        """Returns timestep and loss of each image in each range."""
        generator = sample_generator(self.seed, "held out", name, "noise")
        shape, steps = (len(positions), *dataset.latent_shape), self.network.num_timesteps
        draws = torch.randn(shape, generator=generator)
        all_times, all_losses = [], []
        was_training = self.network.training
        self.network.eval()
        try:
            for number in range(NUM_TIME_BINS):
                places = torch.rand(len(positions), generator=generator)
                times = ((number + places) * steps / NUM_TIME_BINS).long().clamp(max=steps - 1)
                noise = torch.randn(shape, generator=generator)
                for some in torch.arange(len(positions)).split(_AT_ONCE):
                    between()
                    latents, labels = dataset.batch(positions[some], draws[some])
                    with hardware.autocast(dataset.device, self.dtype):
                        losses = self.network(
                            latents,
                            labels,
                            times=times[some].to(dataset.device),
                            noise=noise[some].to(dataset.device),
                            cond_keep_mask=torch.ones(len(some), dtype=torch.bool, device=dataset.device),
                        )
                    all_times += times[some].tolist()
                    all_losses += losses.float().tolist()
        finally:
            self.network.train(was_training)
            torch.clear_autocast_cache()  # as after sampling
        return all_times, all_losses


def best_save(rows: Sequence[Mapping[str, Any]], saved: Sequence[int]) -> Mapping[str, Any] | None:
    """Returns the line of metrics.jsonl with the lowest held-out loss, of the steps that are saved; None of none."""
    return min(_measured(rows, saved), key=lambda row: row[LOSS], default=None)


def _measured(rows: Sequence[Mapping[str, Any]], saved: Sequence[int]) -> list[Mapping[str, Any]]:
    both = (LOSS, SEEN_LOSS)
    return [row for row in rows if row["step"] in saved and all(isinstance(row.get(name), float) for name in both)]


def describe_best(rows: Sequence[Mapping[str, Any]], saved: Sequence[int]) -> str | None:
    """Says which save has the lowest held-out loss, and what that means; None where no two saves can be compared."""
    known, best = _measured(rows, saved), best_save(rows, saved)
    if best is None or len(known) < 2:
        return None
    last = max(known, key=lambda row: row["step"])
    if best is last:
        return (
            f"the loss of images that training does not see is lowest at the last of {len(known)} saves "
            f"({last[LOSS]:.4f}; of training images {last[SEEN_LOSS]:.4f}): more steps may still make it better"
        )
    found = (
        f"the loss of images that training does not see is lowest at step {best['step']:,} ({best[LOSS]:.4f}), and "
        f"{last[LOSS]:.4f} at step {last['step']:,}"
    )
    if last[LOSS] <= best[LOSS] * (1 + _MARGIN):
        return f"{found}: next to no difference"
    return found + (": later saves learn their training images by heart" if last[SEEN_LOSS] < best[SEEN_LOSS] else "")
