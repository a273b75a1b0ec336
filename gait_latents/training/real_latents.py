"""The training latents of a run, as what samples may begin with in place of noise (`generate.py --from_real`)."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from gait_latents.common import mounts
from gait_latents.common.errors import UserError
from gait_latents.common.layout import SPLIT_NAME
from gait_latents.common.seeds import sample_generator
from gait_latents.images.split import read_split
from gait_latents.latents.cache import LatentCache
from gait_latents.training.run_folder import SavedState
from gait_latents.vae.norm import LatentNorm


class RealLatents:
    """Draws of the posterior of training images, normalised as in training.

    Args:
        read: gives the moments [B 2C h w] of images, by their positions.
        labels: label of each image, by its position.
        classes: the class names, in label order.
        norm: the normalisation of the latents.
    """

    def __init__(
        self, read: Callable[[list[int]], Tensor], labels: Sequence[int], classes: Sequence[str], norm: LatentNorm
    ) -> None:
        self.read, self.classes, self.norm = read, classes, norm
        self.positions = [[i for i, own in enumerate(labels) if own == label] for label in range(len(classes))]

    @classmethod
    def of_run(cls, state: SavedState) -> "RealLatents":
        """Reads those of a run from its cache.

        Args:
            state: a checkpoint of the run, which lies in its folder.

        Raises:
            UserError: when the folder does not list the training images, or latents are not in the run's cache.
        """
        folder, classes = state.path.parent, state.meta.classes
        split = read_split(folder)
        if split is None or split.classes != classes:
            raise UserError(f"--from_real needs the list of the training images: {SPLIT_NAME} of the run, in {folder}")
        place = Path(mounts.locate(state.meta.settings.get("latents_cache_folder", "")))
        keys = [entry.key for entry in split.train]
        moments, found = LatentCache(place, state.meta.space, writable=False).read(keys)
        if not found.all():
            raise UserError(
                f"--from_real needs the latents of the training images: {int((~found).sum()):,} of {len(keys):,} are "
                f"not in {place}, the cache of the run"
            )
        table = torch.from_numpy(moments)  # N 2C h w, float16
        return cls(lambda positions: table[positions], split.labels(split.train), classes, state.meta.latent_norm)

    def draw(self, labels: Sequence[int], indices: Sequence[int], *, seed: int) -> Tensor:
        """Returns a latent [B C h w] for each image: that of number i is a draw from training image i of its class.

        Where a class has fewer, they are drawn from in turn.
        """
        chosen = [
            self.positions[label][i % len(self.positions[label])] for label, i in zip(labels, indices, strict=True)
        ]
        moments = self.read(chosen).float()
        shape = (1, moments.shape[1] // 2, *moments.shape[2:])
        noise = [
            torch.randn(shape, generator=sample_generator(seed, "from real", self.classes[label], index))
            for label, index in zip(labels, indices, strict=True)
        ]
        return self.norm.to_latent(moments, torch.cat(noise))
