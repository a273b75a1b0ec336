"""Do generated images help? A classifier is trained with and without them, and tested on images that nobody saw.

`compare` returns, and keeps while it works, plain values only:

    num_steps, batch_size       of each training
    seeds                       [seed]
    images                      {real, synthetic, test: count}
    scores                      {set: {seed as text: {accuracy, per_class, confusion}}}, one per training; `save` gets
                                this, and `done` takes it back
    sets                        {set: ...} for each of "real", "synthetic" and "real + synthetic"
        accuracies              [share], one per seed, in the order of `seeds`
        mean, deviation         over the seeds; the deviation (n - 1) is None for one seed
        per_class               [share], the mean over the seeds, in label order; None for a class without test images
        confusion               [[count]], summed over the seeds; rows are true classes, columns what was said
    difference                  accuracy of "real + synthetic" minus that of "real"
        per_seed                [difference]
        mean, deviation         as above
        low, high               95 % t interval of the mean; None for one seed
        verdict                 helps, harms or open
        sentence                the same for a person

Images are uint8 tensors [N S S 3], labels int64 [N].
"""

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import resnet18

from gait_latents.common.errors import UserError, make_sure_of_room_for_scipy
from gait_latents.common.seeds import draw_positions, sample_generator

REAL, SYNTHETIC, BOTH = "real", "synthetic", "real + synthetic"
_BATCH_SIZE = 32
_LARGEST_LEARNING_RATE, _WEIGHT_DECAY = 2e-3, 0.05
_LARGEST_SHIFT = 1 / 16  # of the width
_SMALL_PX = 64  # images below this keep more of their resolution


@dataclass(frozen=True)
class Score:
    """How a classifier did on the test images."""

    accuracy: float  # share of all test images
    per_class: tuple[float | None, ...]  # share of the test images of each class; None where there are none
    confusion: tuple[tuple[int, ...], ...]  # counts; rows are true classes, columns what was said


# --- one training ------------------------------------------------------------------------------------------


_Images = tuple[Tensor, Tensor]  # uint8 [N S S 3] and labels [N]
# Changes the images of a batch [B S S 3] and their targets, which are labels [B] or probabilities [B K].
Augment = Callable[[Tensor, Tensor, torch.Generator], tuple[Tensor, Tensor]]


def train_and_test(
    sets: Sequence[_Images],
    test: _Images,
    *,
    num_classes: int,
    num_steps: int,
    seed: int,
    device: torch.device,
    batch_size: int = _BATCH_SIZE,
    progress: Callable[[], None] | None = None,
) -> Score:
    """Trains a ResNet-18 from nothing on some images and tests its last weights on others.

    The recipe is the same for every training set: `num_steps` batches, AdamW with weight decay under a one-cycle
    learning rate, cross-entropy. Images are normalised by the mean and standard deviation of each channel of
    the training set. The one augmentation is a shift along the time axis (the width) by up to a sixteenth of it; the
    edge column is repeated in the gap. There is no mirroring: a mirrored spectrogram would run backwards in time. No
    choice is made by the test images.

    Everything random comes from the seed, and no global state is changed: the bits repeat on one device with one
    number of threads.

    Args:
        sets: training images uint8 [N S S 3] and their labels [N]; several sets have equal shares of every batch.
        test: images [M S S 3] that are in no training set, and their labels [M].
        num_classes: labels are 0 to this - 1.
        batch_size: images per step; a smaller set fills a batch by more than one round.
        progress: called after each step; what it raises ends the work.
    """
    logits = train_and_classify(
        sets,
        test[0],
        num_classes=num_classes,
        num_steps=num_steps,
        seed=seed,
        device=device,
        batch_size=batch_size,
        progress=progress,
    )
    return _score(logits.argmax(1), test[1], num_classes)


def train_and_classify(
    sets: Sequence[_Images],
    test: Tensor,
    *,
    num_classes: int,
    num_steps: int,
    seed: int,
    device: torch.device,
    batch_size: int = _BATCH_SIZE,
    learning_rate: float = _LARGEST_LEARNING_RATE,
    augment: Augment | None = None,
    progress: Callable[[], None] | None = None,
) -> Tensor:
    """Trains as `train_and_test` does; returns the logits [M K] of the test images [M S S 3], float32 on the CPU.

    Args:
        learning_rate: the largest of the one-cycle schedule.
        augment: what takes the place of the shift along the width; it is given the probabilities of the classes as
            targets, and may return images of any number format, in levels from 0 to 255.
    """
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
        network = _build(num_classes, sets[0][0].shape[1], seed).to(device)
        network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        normalise = _Normalisation.of([images for images, _ in sets], device)
        optimiser = torch.optim.AdamW(network.parameters(), lr=learning_rate, weight_decay=_WEIGHT_DECAY)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, learning_rate, total_steps=num_steps + 1)
        if augment is not None:
            sets = [(images, nn.functional.one_hot(labels, num_classes).float()) for images, labels in sets]
        for images, targets in _batches(sets, num_steps, batch_size, seed, augment):
            loss = nn.functional.cross_entropy(network(normalise(images)), targets.to(device))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            if progress is not None:
                progress()
        return _classify(network.eval(), test, normalise)


def _build(num_classes: int, image_size: int, seed: int) -> nn.Module:
    """Builds the network with weights that depend on the seed alone.

    The stem of ResNet-18 reduces an image fourfold before the first block. Images of _SMALL_PX or more keep that: 2 x 2
    or more places are left at the end, and a step costs little on a CPU. For smaller images the pooling is left out.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(sample_generator(seed, "classifier", "weights").initial_seed())
        network = resnet18(weights=None, num_classes=num_classes)
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


def _batches(
    sets: Sequence[_Images], num_steps: int, batch_size: int, seed: int, augment: Augment | None = None
) -> Iterator[_Images]:
    """Yields batches of changed images, with an equal share of each set; every set has an order of its own."""
    share = batch_size // len(sets)
    seeds = [sample_generator(seed, "classifier", "order", i).initial_seed() for i in range(len(sets))]
    for step in range(num_steps):
        parts = [
            _take(images_and_labels, draw_positions(own, step * share, share, len(images_and_labels[1])))
            for images_and_labels, own in zip(sets, seeds, strict=True)
        ]
        images, labels = (torch.cat(part) for part in zip(*parts, strict=True))
        yield (augment or _shift_in_time)(images, labels, sample_generator(seed, "classifier", "shift", step))


def _take(images_and_labels: _Images, positions: Tensor) -> _Images:
    images, labels = images_and_labels
    return images[positions], labels[positions]


def _shift_in_time(images: Tensor, labels: Tensor, generator: torch.Generator) -> _Images:
    return _shift_images(images, generator), labels


def _shift_images(images: Tensor, generator: torch.Generator) -> Tensor:
    """Moves each image [B S S 3] left or right by its own number of columns; the edge column fills the gap."""
    count, width = len(images), images.shape[2]
    most = int(width * _LARGEST_SHIFT)
    shifts = torch.randint(-most, most + 1, (count,), generator=generator)
    columns = (torch.arange(width) + shifts[:, None]).clamp(0, width - 1)  # B S
    return images.gather(2, columns[:, None, :, None].expand(images.shape))


@torch.inference_mode()
def _classify(network: nn.Module, images: Tensor, normalise: _Normalisation) -> Tensor:
    return torch.cat([network(normalise(part)).cpu() for part in images.split(_BATCH_SIZE)])


def _score(said: Tensor, truth: Tensor, num_classes: int) -> Score:
    cells = torch.bincount(truth * num_classes + said, minlength=num_classes**2).reshape(num_classes, num_classes)
    counts, right = cells.sum(1).tolist(), cells.diag().tolist()
    return Score(
        accuracy=sum(right) / sum(counts),
        per_class=tuple(r / n if n else None for r, n in zip(right, counts, strict=True)),
        confusion=tuple(tuple(row) for row in cells.tolist()),
    )


# --- with and without generated images -----------------------------------------------------------------------


def trainings_left(seeds: Sequence[int], done: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, int]]:
    """Returns the trainings, as set and seed, that `compare` has still to do."""
    return [(name, seed) for seed in seeds for name in (REAL, SYNTHETIC, BOTH) if str(seed) not in done.get(name, {})]


def compare(
    real: Tensor,
    real_labels: Tensor,
    synthetic: Tensor,
    synthetic_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    *,
    num_classes: int,
    num_steps: int,
    seeds: Sequence[int],
    device: torch.device,
    done: Mapping[str, Mapping[str, Any]],
    save: Callable[[dict[str, Any]], object],
    class_names: Sequence[str] = (),
    batch_size: int = _BATCH_SIZE,
    progress: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """Trains on real images, on synthetic ones and on both, once per seed, and tests each on the same images.

    All trainings take the same number of steps of the same size. With both, half of every batch is real and half
    synthetic: the weight of the few real images then does not depend on how many were generated.

    Args:
        real: training images; synthetic: generated ones; test: real ones that are in neither.
        seeds: one training of each kind per seed.
        done: `scores` of an earlier call with the same images and settings; what it holds is not trained again.
        save: called with all `scores` after each training.
        class_names: for messages, in label order; without them classes are numbered from 0.
        progress: called after each step; what it raises ends the work. `trainings_left` tells how many will come.

    Returns:
        What the top of this module lists.

    Raises:
        UserError: when a class has no synthetic or no real image.
    """
    if not len(test):
        raise UserError("a classifier needs test images, and the run has none; train with fewer images_per_user")
    for kind, labels in ((REAL, real_labels), (SYNTHETIC, synthetic_labels)):
        _refuse_empty_classes(kind, labels, class_names or [str(label) for label in range(num_classes)])
    real_set, synthetic_set = (real, real_labels), (synthetic, synthetic_labels)
    sets = {REAL: [real_set], SYNTHETIC: [synthetic_set], BOTH: [real_set, synthetic_set]}
    scores = {name: dict(done.get(name, {})) for name in sets}
    size = {"num_classes": num_classes, "num_steps": num_steps, "batch_size": batch_size}
    for name, seed in trainings_left(seeds, scores):
        score = train_and_test(sets[name], (test, test_labels), **size, seed=seed, device=device, progress=progress)
        scores[name][str(seed)] = _plain(score)
        save(scores)
    return {
        "num_steps": num_steps,
        "batch_size": batch_size,
        "seeds": list(seeds),
        "images": {REAL: len(real), SYNTHETIC: len(synthetic), "test": len(test)},
        "scores": scores,
        "sets": {name: _summary([scores[name][str(seed)] for seed in seeds]) for name in sets},
        "difference": _difference(scores, seeds),
    }


def _refuse_empty_classes(kind: str, labels: Tensor, class_names: Sequence[str]) -> None:
    counts = torch.bincount(labels, minlength=len(class_names)).tolist()
    empty = [name for name, count in zip(class_names, counts, strict=True) if not count]
    if empty:
        rest = f" and {len(empty) - 10} more" if len(empty) > 10 else ""
        raise UserError(
            f"there are no {kind} images of class {', '.join(empty[:10])}{rest}; a classifier that never saw a class "
            "cannot be compared with one that did: generate some, or leave the classifier out"
        )


def _plain(score: Score) -> dict[str, Any]:
    """Returns a score as JSON gives it back."""
    values = asdict(score)
    return values | {"per_class": list(score.per_class), "confusion": [list(row) for row in score.confusion]}


def _summary(scores: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the figures of one training set over all seeds."""
    accuracies = [score["accuracy"] for score in scores]
    by_class = zip(*(score["per_class"] for score in scores), strict=True)
    return {
        "accuracies": accuracies,
        "mean": statistics.fmean(accuracies),
        "deviation": _deviation(accuracies),
        "per_class": [None if None in shares else statistics.fmean(shares) for shares in by_class],
        "confusion": torch.tensor([score["confusion"] for score in scores]).sum(0).tolist(),
    }


def _deviation(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


def _student_quantile(probability: float, degrees: int) -> float:
    """Returns a quantile of Student's t distribution with so many degrees of freedom."""
    make_sure_of_room_for_scipy()
    from scipy import stats

    return float(stats.t.ppf(probability, degrees))


def _difference(scores: Mapping[str, Mapping[str, Any]], seeds: Sequence[int]) -> dict[str, Any]:
    """Compares "real + synthetic" with "real", seed by seed, by a 95 % t interval of the mean difference.

    Training with one seed starts both from the same weights. The interval is about the scatter of training; that
    the test images are only some of all possible ones is not in it.
    """
    values = [scores[BOTH][str(seed)]["accuracy"] - scores[REAL][str(seed)]["accuracy"] for seed in seeds]
    mean, deviation = statistics.fmean(values), _deviation(values)
    low = high = None
    if deviation is not None:
        reach = _student_quantile(0.975, len(values) - 1) * deviation / math.sqrt(len(values))
        low, high = mean - reach, mean + reach
    verdict, sentence = _verdict(mean, low, high, len(seeds))
    return {
        "per_seed": values,
        "mean": mean,
        "deviation": deviation,
        "low": low,
        "high": high,
        "verdict": verdict,
        "sentence": sentence,
    }


def _verdict(mean: float, low: float | None, high: float | None, num_seeds: int) -> tuple[str, str]:
    change = f"accuracy changes by {100 * mean:+.1f} points when synthetic images are added"
    if low is None or high is None:
        return "open", f"{change}, but one seed cannot show whether that is more than chance; give more seeds."
    interval = f"{change} (95 % interval {100 * low:+.1f} to {100 * high:+.1f}, {num_seeds} seeds)"
    if low > 0:
        return "helps", f"They help: {interval}."
    if high < 0:
        return "harms", f"They harm: {interval}."
    return "open", f"No difference that these seeds can show: {interval}."
