"""The classifier of an evaluation: how one is trained on some images, and what it answers about others.

Images are uint8 tensors [N S S 3], labels int64 [N].
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, ResNet

from gait_latents.common import hardware
from gait_latents.common.seeds import draw_positions, sample_generator

Images = tuple[Tensor, Tensor]  # uint8 [N S S 3] and labels [N]
# Changes the images of a batch [B S S 3] and their targets, the probabilities of the classes [B K]; what it returns may
# have any number format, in levels from 0 to 255.
Augment = Callable[[Tensor, Tensor, torch.Generator], Images]
BATCH_SIZE = 32
_WEIGHT_DECAY = 0.05
_WIDTH = 64  # of ResNet-18
_SMALL_PX = 64  # images below this keep more of their resolution


def train_and_classify(
    sets: Sequence[Images],
    test: Tensor,
    *,
    num_classes: int,
    num_steps: int,
    seed: int,
    device: torch.device,
    learning_rate: float,
    augment: Augment,
    batch_size: int = BATCH_SIZE,
    width: int = _WIDTH,
    number_format: torch.dtype = torch.float32,
    begin_with: Mapping[str, Tensor] | None = None,
    progress: Callable[[], None] | None = None,
) -> Tensor:
    """Trains a ResNet-18 on some images; returns the logits [M K] of others, float32 on the CPU.

    The recipe is the same for every training set: `num_steps` batches, AdamW with weight decay under a one-cycle
    learning rate, cross-entropy. Images are normalised by the mean and standard deviation of each channel of
    the training set. There is no mirroring: a mirrored spectrogram would run backwards in time.

    Everything random comes from the seed, and no global state is changed: the bits repeat on one device with one
    number of threads.

    Args:
        sets: training images uint8 [N S S 3] and their labels [N]; several sets have equal shares of every batch.
        test: images [M S S 3] to classify.
        num_classes: labels are 0 to this - 1.
        learning_rate: the largest of the one-cycle schedule.
        batch_size: images per step; a smaller set fills a batch by more than one round.
        width: channels of the first blocks; ResNet-18 has 64, and half as many take about a third of the time.
        number_format: in which the network computes; weights, loss and logits stay float32.
        begin_with: what `train_features` returned, of the same width; None begins with weights of the seed.
        progress: called after each step; what it raises ends the work.
    """
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
        network = _build(num_classes, sets[0][0].shape[1], seed, width)
        if begin_with is not None:
            network.load_state_dict({**network.state_dict(), **begin_with})  # the last layer is its own
        normalise = _Normalisation.of([images for images, _ in sets], device)
        _train(
            network.to(device),
            _batches(_with_targets(sets, num_classes), num_steps, batch_size, seed, augment),
            normalise,
            num_steps=num_steps,
            learning_rate=learning_rate,
            number_format=number_format,
            progress=progress,
        )
        with hardware.autocast(device, number_format):
            return _classify(network.eval(), test, normalise)


def train_features(
    images: Images,
    *,
    num_steps: int,
    seed: int,
    device: torch.device,
    learning_rate: float,
    augment: Augment,
    batch_size: int = BATCH_SIZE,
    width: int = _WIDTH,
    number_format: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """Trains a ResNet-18 on images of other classes; returns its weights without those of the last layer, on the CPU.

    The arguments are those of `train_and_classify`, and so is the recipe.
    """
    num_classes = int(images[1].max()) + 1
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
        network = _build(num_classes, images[0].shape[1], seed, width).to(device)
        _train(
            network,
            _batches(_with_targets([images], num_classes), num_steps, batch_size, seed, augment),
            _Normalisation.of([images[0]], device),
            num_steps=num_steps,
            learning_rate=learning_rate,
            number_format=number_format,
        )
    return {name: value.cpu() for name, value in network.state_dict().items() if not name.startswith("fc.")}


def _train(
    network: nn.Module,
    batches: Iterable[Images],
    normalise: "_Normalisation",
    *,
    num_steps: int,
    learning_rate: float,
    number_format: torch.dtype,
    progress: Callable[[], None] | None = None,
) -> None:
    """Trains a network, which is on its device already, on batches of images and targets [B K]."""
    device = normalise.mean.device
    network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    optimiser = torch.optim.AdamW(network.parameters(), lr=learning_rate, weight_decay=_WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, learning_rate, total_steps=num_steps + 1)
    for images, targets in batches:
        with hardware.autocast(device, number_format):  # for each step anew: it keeps the weights that it has cast
            logits = network(normalise(images))
        loss = nn.functional.cross_entropy(logits.float(), targets.to(device))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        if progress is not None:
            progress()


def _with_targets(sets: Sequence[Images], num_classes: int) -> list[Images]:
    return [(images, nn.functional.one_hot(labels, num_classes).float()) for images, labels in sets]


class _Narrow(ResNet):
    """ResNet-18 with another number of channels in its blocks; torchvision's own has no such argument."""

    def __init__(self, num_classes: int, width: int) -> None:
        self._width = width
        super().__init__(BasicBlock, [2, 2, 2, 2], num_classes=num_classes)
        if width != _WIDTH:
            self.fc = nn.Linear(8 * width, num_classes)

    def _make_layer(self, block: type, planes: int, *args: Any, **kwargs: Any) -> nn.Sequential:
        return super()._make_layer(block, planes * self._width // _WIDTH, *args, **kwargs)  # pyright: ignore


def _build(num_classes: int, image_size: int, seed: int, width: int) -> nn.Module:
    """Builds the network with weights that depend on the seed alone.

    The stem of ResNet-18 reduces an image fourfold before the first block. Images of _SMALL_PX or more keep that: 2 x 2
    or more places are left at the end, and a step costs little on a CPU. For smaller images the pooling is left out.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(sample_generator(seed, "classifier", "weights").initial_seed())
        network = _Narrow(num_classes, width)
    if image_size < _SMALL_PX:
        network.maxpool = nn.Identity()  # pyright: ignore[reportAttributeAccessIssue]
    return network


@dataclass(frozen=True, eq=False)
class _Normalisation:
    """Brings images to zero mean and unit variance in each channel, on the device."""

    mean: Tensor  # 1 3 1 1, in levels from 0 to 255
    deviation: Tensor

    @classmethod
    def of(cls, sets: Sequence[Tensor], device: torch.device) -> "_Normalisation":
        """Measures sets of images, each with equal weight, as the batches have them."""
        moments = [torch.stack(_moments(images)) for images in sets]
        mean, square = torch.stack(moments).mean(0)
        deviation = (square - mean.square()).clamp(min=1).sqrt()  # a channel of one level stays finite
        return cls(*(t.float().reshape(1, 3, 1, 1).to(device) for t in (mean, deviation)))

    def __call__(self, images: Tensor) -> Tensor:
        """Returns float images [B 3 S S] of images [B S S 3] in levels from 0 to 255."""
        return (images.to(self.mean.device).permute(0, 3, 1, 2).float() - self.mean) / self.deviation


def _moments(images: Tensor) -> tuple[Tensor, Tensor]:
    """Returns mean and mean square of each channel of uint8 images, in float64, from the counts of the 256 levels."""
    levels = torch.arange(256, dtype=torch.float64)
    counts = torch.stack([torch.bincount(images[..., c].flatten(), minlength=256) for c in range(3)]).double()
    shares = counts / counts.sum(1, keepdim=True)
    return shares @ levels, shares @ levels.square()


def _batches(sets: Sequence[Images], num_steps: int, batch_size: int, seed: int, augment: Augment) -> Iterator[Images]:
    """Yields batches of changed images, with an equal share of each set; every set has an order of its own."""
    share = batch_size // len(sets)
    seeds = [sample_generator(seed, "classifier", "order", i).initial_seed() for i in range(len(sets))]
    for step in range(num_steps):
        parts = []
        for (images, targets), own in zip(sets, seeds, strict=True):
            positions = draw_positions(own, step * share, share, len(targets))
            parts.append((images[positions], targets[positions]))
        images, targets = (torch.cat(part) for part in zip(*parts, strict=True))
        yield augment(images, targets, sample_generator(seed, "classifier", "augment", step))


@torch.inference_mode()
def _classify(network: nn.Module, images: Tensor, normalise: _Normalisation) -> Tensor:
    return torch.cat([network(normalise(part)).float().cpu() for part in images.split(BATCH_SIZE)])
