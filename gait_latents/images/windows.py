"""Whether the images of a class are overlapping windows of one recording, as their pixels tell; and what to say of it.

Where neighbours in a numbered series show the same content, moved along the time, a random split puts nearly the same
picture into training and test. A few series are looked at, each in a run of neighbours and in images far from it:

- The images are reduced to what is fine along the width, so that colours, loudness and level lines of one window do not
  count, and margins, axes and all else that is the same in all images is left out.
- What follows is done along the width and, where nothing is found, along the height, where time may run as well.
- For each pair the correlation is computed at all shifts. Neighbours that are windows agree about the best one.
- A periodic signal, such as a gait, matches itself at many shifts, and in images far apart. So neighbours must match
  much better than they do at any other shift, and than other pairs do at any shift.
"""

import math
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median

import numpy as np

from gait_latents.common.console import warn
from gait_latents.images import reading
from gait_latents.images.names import natural_key
from gait_latents.images.split import Entry, Split

_MOST_CLASSES = 8  # that are looked at
_MOST_SERIES = 3  # ways of numbering that are tried in a class
_RUN, _FAR = 7, 3  # images next to each other, and images far from them
_SHORTEST = 4  # images of a series
_SIDE = 128  # pixels of the reduced images
_FINE = 5  # columns: what is broader than this is removed
_FRAME = 3  # columns beside a margin that its edge spoils
_STEPS = 4  # shifts that are tried per column
_VARIES, _SHARE = 6.0, 0.1  # a pixel varies by so many grey levels among images; a row or column by so many pixels
_HOPS = (0.015, 0.8)  # shares of the width by which neighbours may be moved
_SAME = 0.02  # shifts closer than this share of the width are the same
_BESIDE = 0.06  # shifts further apart than this are others
_AGREEING = 0.6  # of the pairs agree about the shift
_MATCH = 0.4  # correlation of neighbours at their best shift
# How many times smaller what does not match is than in other pairs, and than at other shifts.
_SURELY, _LIKELY = (1.6, 1.3), (1.15, 1.15)
_ENOUGH = 3  # classes that agree about a shift are as good as a sure one
_TINY = 1e-6
_NOTHING = 0.02  # windows that share less than this share of the width count as sharing nothing


@dataclass(frozen=True)
class Windows:
    """What was found of images that are overlapping windows of one recording.

    Attributes:
        overlap: share of the width, or of the height, that neighbours have in common, from 0 to 1.
        stride: images from one window to the next, in natural order: 2 where two series take turns.
    """

    overlap: float
    stride: int = 1

    @property
    def gap(self) -> int:
        """The smallest --split_gap with which no test image shares anything with a training image."""
        return (math.ceil((1 - _NOTHING) / (1 - self.overlap)) - 1) * self.stride


def warn_of_windows(split: Split, data_path: str, *, resize: str) -> None:
    """Warns when images look like windows of one recording and the split lets training and test share their content."""
    notice = windows_warning(split, data_path, resize=resize)
    if notice:
        warn(notice)


def windows_warning(split: Split, data_path: str, *, resize: str) -> str | None:
    """Returns the warning that `warn_of_windows` gives, else None.

    Args:
        split: the training and test images; without test images there is nothing to warn of.
        data_path: the image folder; where it is not there, nothing is known.
        resize: how images are made square, as the setting says: only what is left of them counts.
    """
    kind, own_gap = split.rule["split"], split.rule["split_gap"]
    is_at_hand = data_path != "" and Path(data_path).is_dir()
    if not split.test or not is_at_hand or kind not in ("random", "contiguous"):
        return None
    found = find_windows(_some_classes(split), data_path, resize=resize)
    if found is None or (kind == "contiguous" and isinstance(own_gap, int) and own_gap >= found.gap):
        return None
    what = (
        f"neighbouring images of a class overlap by about {found.overlap:.0%}: they look like windows of one recording"
    )
    if kind == "contiguous":
        return (
            f"{what}, and across a gap of {own_gap} test images still share content with training images, so that "
            f"every score will be too good; give --split_gap {found.gap}"
        )
    return (
        f"{what}, and in a random split a test image shares much of its content with a training image, so that every "
        f"score will be too good; give --split contiguous --split_gap {found.gap}"
    )


def _some_classes(split: Split) -> dict[str, list[str]]:
    """Returns class -> file names in natural order for some classes, enough to choose from: there may be thousands."""
    count = min(len(split.classes), 2 * _MOST_CLASSES)
    index: dict[str, list[str]] = {split.classes[i * len(split.classes) // count]: [] for i in range(count)}
    for item in (*split.used, *split.gap, *split.skipped):
        if item.class_name in index:
            index[item.class_name].append(item.name)
    return {name: sorted(files, key=natural_key) for name, files in index.items()}


def split_warnings(split: Split, data_path: str, *, resize: str) -> list[str]:
    """Returns what is to be said of the figures of a run: of windows, or of a random split that it may leak.

    The images need not be at hand, and windows of one recording need not be numbered, or overlap by enough to show.
    """
    found = windows_warning(split, data_path, resize=resize)
    if found is not None:
        return [f"{found} to preprocess_latents.py, and train in another --results_folder"]
    return [_RANDOM_SPLIT] if split.rule["split"] == "random" else []


_RANDOM_SPLIT = (
    "the split is random: if images are overlapping windows of one recording, test images are nearly the same as "
    "training images, and the figures look too good; train with --split contiguous"
)


def find_windows(index: Mapping[str, Sequence[str]], data_path: str, *, resize: str) -> Windows | None:
    """Looks at a sample of the images and says by how much neighbours overlap, or None where they do not.

    Images that cannot be read are passed over. It takes a fraction of a second, whatever the number of images.

    Args:
        index: class -> file names in natural order, as `list_images` and `Split.index` give them.
        data_path: the image folder.
        resize: how images are made square.
    """
    usable = [name for name, files in index.items() if _series(files)]
    count = min(len(usable), _MOST_CLASSES)
    seen: list[_Seen] = []
    for number in range(count):
        name = usable[number * len(usable) // count]
        found = _look_at_class(data_path, name, index[name], resize)
        seen += [found] if found else []
        if 2 * (len(seen) + count - number - 1) < count:  # the others cannot change what most classes say
            return None
    sure = [found for found in seen if found.is_sure]
    middle = median(found.hop for found in seen) if seen else 0.0
    alike = [found for found in seen if abs(found.hop - middle) < _SAME]
    chosen = sure if 2 * len(sure) >= count else alike
    if not chosen or 2 * len(chosen) < count or (chosen is alike and len(alike) < _ENOUGH):
        return None
    hop, stride = median(found.hop for found in chosen), median(found.stride for found in chosen)
    return Windows(1 - round(hop, 2), round(stride))


@dataclass(frozen=True)
class _Seen:
    """What a class shows: neighbours are moved by `hop`, a share of the width, and lie `stride` files apart."""

    hop: float
    stride: float
    is_sure: bool


# --- numbered series ---------------------------------------------------------------------------------------


def _series(files: Sequence[str]) -> list[list[list[int]]]:
    """Finds the ways in which files are numbered, each a list of series of positions, the longest one first.

    Names belong to one series where only the number at one place differs. Where several numbers grow together, as in
    times of the day, those whose other letters are the same belong together.
    """
    pieces = [re.split(r"([0-9]+)", Path(name).stem) for name in files]
    ways: dict[object, dict[tuple[str, ...], list[int]]] = {}
    for position, parts in enumerate(pieces):
        for place in range(1, len(parts), 2):
            others = (*parts[:place], "", *parts[place + 1 :])
            ways.setdefault((len(parts), place), {}).setdefault(others, []).append(position)
        ways.setdefault("letters", {}).setdefault(tuple(parts[::2]), []).append(position)
    found = []
    for groups in ways.values():
        long = sorted((group for group in groups.values() if len(group) >= _SHORTEST), key=len, reverse=True)
        if long and long not in found:
            found.append(long)
    return sorted(found, key=lambda groups: -sum(map(len, groups)))[:_MOST_SERIES]


def _sample(groups: list[list[int]]) -> list[tuple[int, int]]:
    """Chooses images of some series, each as (number of the series, place in it): a run, then those far from it."""
    run: list[tuple[int, int]] = []
    for number, group in enumerate(groups):
        start = min(len(group) // 4, max(len(group) - _RUN, 0))
        run += [(number, start + i) for i in range(min(len(group) - start, _RUN - len(run)))]
        if len(run) > _RUN - _SHORTEST:
            break
    middle = groups[run[0][0]][run[len(run) // 2][1]]
    others = [(number, i) for number, group in enumerate(groups) for i in range(len(group)) if (number, i) not in run]
    own = {number for number, _ in run}  # another series may hold copies of the same pictures

    def order(item: tuple[int, int]) -> tuple[bool, int]:
        return item[0] not in own, -abs(groups[item[0]][item[1]] - middle)

    return run + sorted(others, key=order)[:_FAR]


def _look_at_class(data_path: str, class_name: str, files: Sequence[str], resize: str) -> _Seen | None:
    for groups in _series(files):
        sample = _sample(groups)
        names = [files[groups[number][place]] for number, place in sample]
        with ThreadPoolExecutor() as pool:
            images = list(pool.map(lambda name: _read(data_path, Entry(class_name, name), resize), names))
        kept = [i for i, image in enumerate(images) if image is not None]
        places, pictures = [sample[i] for i in kept], [image for image in images if image is not None]
        turned = [image.swapaxes(0, 1) for image in pictures]  # where time runs along the height
        found = _hop_of(places, np.array(pictures)) or _hop_of(places, np.array(turned))
        if found is not None:
            steps = [after - before for group in groups for before, after in pairwise(group)]
            return _Seen(found[0], median(steps), is_sure=found[1])
    return None


def _read(data_path: str, entry: Entry, resize: str) -> np.ndarray | None:
    """Reads an image small, uint8 [S S 3]; None where it cannot be read."""
    how = "crop" if resize == "crop" else "squash"  # for what is padded on says nothing
    try:
        return reading.decode(reading.read_file(data_path, entry), image_size=_SIDE, resize=how, exact=False)
    except (OSError, reading.BadImage):
        return None


# --- correlation -------------------------------------------------------------------------------------------


def _hop_of(places: list[tuple[int, int]], images: np.ndarray) -> tuple[float, bool] | None:
    """Returns the share of the width by which neighbours are moved and whether that is sure; None where they are not.

    Args:
        places: the series of each image and its place in it.
        images: uint8 [N S S 3].
    """
    content = _fine_content(images) if len(images) >= _SHORTEST else None
    if content is None:
        return None
    fine, width = content
    correlate = _Correlation(fine)
    pairs = [(i, j) for i in range(len(images)) for j in range(i + 1, len(images))]
    steps = {(i, j): _steps(places[i], places[j]) for i, j in pairs}
    neighbours = [correlate.peak(*pair) for pair in pairs if steps[pair] == 1]
    if len(neighbours) < _SHORTEST - 1:
        return None
    hop = median(shift for shift, _, _ in neighbours)
    agreeing = sum(abs(shift - hop) < _SAME for shift, _, _ in neighbours) / len(neighbours)
    match = median(best for _, best, _ in neighbours)
    if agreeing < _AGREEING or match < _MATCH or not _HOPS[0] <= abs(hop) <= _HOPS[1]:
        return None
    others = [correlate.best(*pair, but=hop * steps[pair]) for pair in pairs if steps[pair] != 1]
    if len(others) < _FAR:
        return None
    better = (
        (1 - np.quantile(others, 0.9)) / (1 - match + _TINY),
        median((1 - beside) / (1 - best + _TINY) for _, best, beside in neighbours),
    )
    hop = abs(hop) * fine.shape[-1] / width
    if min(better[0] / _LIKELY[0], better[1] / _LIKELY[1]) < 1:
        return None
    return hop, min(better[0] / _SURELY[0], better[1] / _SURELY[1]) >= 1


def _steps(one: tuple[int, int], other: tuple[int, int]) -> float:
    """Counts the places from one image to the other; infinity where they are in two series."""
    return other[1] - one[1] if one[0] == other[0] else math.inf


def _fine_content(images: np.ndarray) -> tuple[np.ndarray, int] | None:
    """Returns what is fine along the width where the images differ; None where they do not.

    Returns:
        The values, float32 [N rows W], and how many columns lie between the margins: W, or a little more.
    """
    pixels = images.astype(np.float32)
    varies = pixels.std(axis=0).max(axis=-1) > _VARIES
    rows = np.flatnonzero(varies.mean(axis=1) > _SHARE)
    columns = np.flatnonzero(varies[rows].mean(axis=0) > _SHARE) if len(rows) else rows
    if not len(columns) or columns[-1] - columns[0] < _SIDE // 4:
        return None
    left, right = int(columns[0]), int(columns[-1]) + 1
    pixels = pixels[:, rows, left + _FRAME * (left > 0) : right - _FRAME * (right < _SIDE)]
    pixels = pixels[:, : len(rows) // 2 * 2].reshape(len(pixels), -1, 2, *pixels.shape[2:]).mean(axis=2)
    values = pixels.transpose(0, 3, 1, 2).reshape(len(pixels), -1, pixels.shape[2])
    values = values - values.mean(axis=-1, keepdims=True)
    padded = np.pad(values, [(0, 0), (0, 0), (_FINE // 2, _FINE // 2)], mode="edge")
    broad = np.lib.stride_tricks.sliding_window_view(padded, _FINE, axis=-1).mean(axis=-1)
    return values - broad, right - left - (left > 0) - (right < _SIDE)


class _Correlation:
    """The normalised correlation of pairs of images [N rows W] where one is moved along the width over the other."""

    def __init__(self, values: np.ndarray) -> None:
        self.width = values.shape[-1]
        self.spectra = np.fft.rfft(values, 2 * self.width)
        energy = (values**2).sum(axis=1)
        self.energy = np.concatenate([np.zeros((len(values), 1)), energy.cumsum(axis=1)], axis=1)  # of columns before x
        reach = int(_HOPS[1] * self.width) * _STEPS
        self.at = np.arange(-reach, reach + 1)
        self.shifts = self.at / _STEPS  # in columns

    def peak(self, i: int, j: int) -> tuple[float, float, float]:
        """Returns the best shift of a pair as a share of the width, its correlation, and the best one elsewhere."""
        curve = self.curve(i, j)
        shift = self.shifts[curve.argmax()] / self.width
        return float(shift), float(curve.max()), self.best(i, j, but=shift)

    def best(self, i: int, j: int, *, but: float) -> float:
        """Returns the largest correlation of a pair at shifts other than `but`, a share of the width."""
        elsewhere = np.abs(self.shifts / self.width - but) > _BESIDE
        return float(self.curve(i, j)[elsewhere].max())

    def curve(self, i: int, j: int) -> np.ndarray:
        """Returns the correlation at each of the shifts, -1 where too little of the images overlaps there."""
        length = 2 * self.width * _STEPS
        products = np.fft.irfft((self.spectra[i] * self.spectra[j].conj()).sum(axis=0), length)[self.at] * _STEPS
        ahead, behind = np.maximum(self.shifts, 0), np.maximum(-self.shifts, 0)
        first, second = self._between(i, ahead, behind), self._between(j, behind, ahead)
        enough = (first > 0.1 * self.energy[i, -1]) & (second > 0.1 * self.energy[j, -1])
        return np.where(enough, products / np.sqrt(np.maximum(first * second, 1e-9)), -1.0)

    def _between(self, i: int, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        """Sums the energy of an image but for so many columns at its left and right."""
        columns = np.arange(self.width + 1)
        return np.interp(self.width - right, columns, self.energy[i]) - np.interp(left, columns, self.energy[i])
