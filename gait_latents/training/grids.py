"""The pictures that training makes along the way: sample grids with class names, and the loss curve."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from gait_latents.common import charts, files, pictures, shortage
from gait_latents.common.console import say, warn
from gait_latents.common.errors import UserError
from gait_latents.common.layout import LOSS_NAME
from gait_latents.common.seeds import sample_generator
from gait_latents.diffusion.model import LatentDiffusion
from gait_latents.diffusion.sampling import BATCH_SIZE, nearest_class, num_solver_steps, sample_padded
from gait_latents.latents.dataset import LatentDataset
from gait_latents.settings import TrainSettings
from gait_latents.training import held_out, run_folder
from gait_latents.training.metrics_log import Metrics
from gait_latents.vae.decoder import ImageDecoder

_MEASURED = {held_out.LOSS: "of images not seen", held_out.SEEN_LOSS: "of training images"}
_MAX_ROWS = 16  # classes in a grid; further ones are not drawn
_IMAGES_PER_MEAN = 32  # training images that a class mean is measured on


class GridMaker:
    """Samples the first classes with the averaged network, scores them, and draws them when the VAE is at hand.

    Args:
        network: the averaged network, which changes between the grids.
        dtype: the number format that it samples in.
        dataset: the training data, with its normalisation.
        classes: all class names, in label order.
        auto_steps: the solver steps that auto stands for, by sampler.
        show: called with the step and the picture of each grid.
    """

    def __init__(
        self,
        settings: TrainSettings,
        network: LatentDiffusion,
        dtype: torch.dtype,
        dataset: LatentDataset,
        classes: Sequence[str],
        folder: Path,
        metrics: Metrics,
        *,
        auto_steps: Mapping[str, int],
        show: Callable[[int, Image.Image], None] = lambda step, picture: None,
    ) -> None:
        self.settings, self.network, self.dtype, self.dataset = settings, network, dtype, dataset
        self.folder, self.metrics, self.auto_steps, self.show = folder, metrics, auto_steps, show
        self.num_classes, self.names = len(classes), list(classes)[:_MAX_ROWS]
        assert dataset.norm is not None  # since the trainer has started
        self.decoder = ImageDecoder(settings.vae_path, dataset.norm, dataset.device, trust_pickle=settings.trust_pickle)
        self.class_means: Tensor | None = None
        self.can_draw = self.can_chart = True
        try:
            charts.check_installed()
        except UserError as error:
            self._go_on_without_charts(error)

    def rehearse(self) -> None:
        """Takes one sampler step and decodes one image, so that what cannot work fails before hours of training."""
        if not self.settings.num_samples:
            return
        self._decode(self._sample_batch([0], [0], steps=1))

    def make(self, step: int, *, between: Callable[[], None] = lambda: None) -> None:
        """Makes the grid of a step: one figure in metrics.jsonl, and the picture.

        Args:
            step: number of finished steps.
            between: called between any two pieces of the work; what it raises ends the work.
        """
        if not self.settings.num_samples:
            return
        cells = self._cells()
        samples = torch.cat(
            [self._sample(cells[start : start + BATCH_SIZE], between) for start in range(0, len(cells), BATCH_SIZE)]
        )
        score = self._score(samples, [label for label, _ in cells], between)
        self.metrics.add(step=step, nearest_class_mean=round(score, 4))
        message = f"step {step:,}: {score:.0%} of {len(cells)} samples are nearest to the mean of their own class"
        images = self._decode(samples, between)
        if images:
            path = self.folder / run_folder.grid_name(step)
            columns = self.settings.num_samples
            rows = [images[start : start + columns] for start in range(0, len(images), columns)]
            picture = pictures.labelled_grid(rows, self.names)
            self.metrics.check(step)
            pictures.save_picture(picture, path, below=self.folder)
            self.show(step, picture)
            message += f"; see {path}"
        say(message)

    def expected_bytes(self) -> float:
        """Returns about how much the picture of one grid takes on disk."""
        side = self.settings.image_size
        return len(self._cells()) * side * side * pictures.BYTES_PER_PIXEL[".png"]

    def draw_loss(self) -> None:
        """Draws the loss curve from the metrics; where matplotlib fails, training goes on without it."""
        steps, losses = self.metrics.series("loss")
        if not steps or not self.can_chart:
            return
        try:
            measured = {label: self.metrics.series(name) for name, label in _MEASURED.items()}
            picture = charts.loss_curve(steps, losses, {label: both for label, both in measured.items() if both[0]})
        except Exception as error:
            self._go_on_without_charts(error)
        else:
            self.metrics.check(steps[-1])
            files.publish(self.folder / LOSS_NAME, picture, below=self.folder)

    def _go_on_without_charts(self, error: Exception) -> None:
        self.can_chart = False
        warn(f"there will be no {LOSS_NAME}: {str(error) or type(error).__name__}")

    def _cells(self) -> list[tuple[int, int]]:
        """Lists (label, column) of the cells, row by row."""
        return [(label, column) for label in range(len(self.names)) for column in range(self.settings.num_samples)]

    def _sample(self, cells: list[tuple[int, int]], between: Callable[[], None]) -> Tensor:
        settings = self.settings
        steps = num_solver_steps(
            settings.sampler, settings.sampling_timesteps, settings.timesteps, auto_steps=self.auto_steps
        )
        labels, columns = [label for label, _ in cells], [column for _, column in cells]
        return self._sample_batch(labels, columns, steps=steps, progress=between)

    def _sample_batch(
        self, labels: list[int], columns: list[int], *, steps: int, progress: Callable[[], None] | None = None
    ) -> Tensor:
        settings = self.settings
        generators = [
            sample_generator(settings.seed, "grid", self.names[label], column)
            for label, column in zip(labels, columns, strict=True)
        ]
        with _with_room(f"to make {BATCH_SIZE} samples at once"):
            return sample_padded(
                self.network,
                labels,
                generators,
                dtype=self.dtype,
                cond_scale=settings.cond_scale,
                guidance_interval=settings.guidance_interval,
                sampler=settings.sampler,
                sampling_timesteps=steps,
                progress=progress,
            )

    def _score(self, samples: Tensor, labels: list[int], between: Callable[[], None]) -> float:
        if self.class_means is None:
            self.class_means = measure_class_means(self.dataset, self.num_classes, between)
        found = nearest_class(samples, self.class_means).cpu()
        return (found == torch.tensor(labels)).double().mean().item()

    def _decode(self, samples: Tensor, between: Callable[[], None] = lambda: None) -> list[np.ndarray]:
        """Decodes samples to images; without a VAE it warns once and returns none."""
        if not self.can_draw:
            return []
        with _with_room("for the VAE decoder"):
            try:
                return self.decoder(samples, between)
            except UserError as error:
                self.can_draw = False
                warn(f"sample grids are scored, but not drawn: {error}")
                return []
            finally:
                self.decoder.close()


@contextmanager
def _with_room(what: str) -> Iterator[None]:
    """Raises UserError where the memory runs out in the block: a smaller --train_batch_size would not help there."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        kind = shortage.kind_of(error)
        if kind not in (shortage.GPU, shortage.MEMORY):
            raise
        raise UserError(
            f"{shortage.who_lacks_memory(kind)} has too little memory {what}; --num_samples 0 makes no grids"
        ) from error


def measure_class_means(dataset: LatentDataset, num_classes: int, between: Callable[[], None] = lambda: None) -> Tensor:
    """Returns the mean normalised latent of each class [K C h w], over its first training images."""
    means = []
    for label in range(num_classes):
        between()
        positions = (dataset.labels == label).nonzero()[:_IMAGES_PER_MEAN, 0]
        means.append(dataset.mean_latents(positions).mean(0))
    return torch.stack(means)
