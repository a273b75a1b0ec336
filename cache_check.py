"""What a check of a cache says: status by class, statistics by channel, other spaces; and what a prune would remove.

Shapes: moments [N 2C h w] float16 as stored; a statistic is one number for each of the C channels.
"""

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import charts
import durable
import latent_cache
import latent_norm
import script
from images import Entry, shown
from latent_cache import LatentCache, Report, Space

MAX_CLASS_ROWS = 38  # of the table; further classes are added up in one more
MAX_ROWS_MEASURED = 2000  # rows that statistics are taken of: 64 MB of the usual ones
UNUSED_SHARE = 0.9  # share of the posterior's own variance from which a channel carries next to nothing
_BINS = np.linspace(-5, 5, 101)
_SMALLEST_SHARE = 1e-5  # that is written as a number


# --- status by class ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ClassStatus:
    """How many images of a class are cached, of how many that were asked for, and why the rest are not."""

    name: str
    train: tuple[int, int] = (0, 0)  # cached, asked
    test: tuple[int, int] = (0, 0)
    missing: int = 0
    stale: int = 0

    @property
    def is_whole(self) -> bool:
        """Says whether nothing lacks."""
        return not self.missing and not self.stale

    def cells(self) -> tuple[str, ...]:
        """Returns the texts of a line of the table."""
        parts = [f"{cached:,}/{asked:,}" if asked else "-" for cached, asked in (self.train, self.test)]
        return self.name, *parts, f"{self.missing:,}", f"{self.stale:,}"


def class_status(
    classes: Sequence[str], parts: Mapping[str, Sequence[Entry]], *, missing: Collection[str], stale: Collection[str]
) -> list[ClassStatus]:
    """Counts by class, in order.

    Args:
        parts: the entries asked for, under "train" and "test".
        missing: keys that are not cached.
        stale: keys that are not cached since the image has another content than before.
    """
    counts: Counter[tuple[str, str]] = Counter()
    for part, entries in parts.items():
        for entry in entries:
            state = "stale" if entry.key in stale else "missing" if entry.key in missing else part
            counts.update([(entry.class_name, state), (entry.class_name, f"{part} asked")])
    return [
        ClassStatus(
            name,
            *((counts[name, part], counts[name, f"{part} asked"]) for part in ("train", "test")),
            missing=counts[name, "missing"],
            stale=counts[name, "stale"],
        )
        for name in classes
    ]


def class_table(status: Sequence[ClassStatus]) -> list[str]:
    """Draws the status as aligned lines. Of many classes, those that lack something come first."""
    shown_rows, rest = list(status), []
    if len(status) > MAX_CLASS_ROWS + 1:
        in_need_first = sorted(status, key=lambda row: row.is_whole)
        shown_rows, rest = in_need_first[:MAX_CLASS_ROWS], in_need_first[MAX_CLASS_ROWS:]
    head = ("class", "train", "test", "missing", "stale")
    cells = [head, *(row.cells() for row in shown_rows), *([_sum(rest).cells()] if rest else [])]
    return _aligned([[shown(first)[:40], *others] for first, *others in cells])


def _sum(rows: Sequence[ClassStatus]) -> ClassStatus:
    train, test = (
        (sum(getattr(row, part)[0] for row in rows), sum(getattr(row, part)[1] for row in rows))
        for part in ("train", "test")
    )
    name = f"… {len(rows):,} more"
    return ClassStatus(name, train, test, sum(row.missing for row in rows), sum(row.stale for row in rows))


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Puts texts below each other: the first of each line to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            [row[0].ljust(widths[0]), *(text.rjust(width) for text, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]


# --- statistics by channel ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class ChannelStatistics:
    """Of unscaled latents [C]: mean, deviation of a draw, range of the means, and how much of a draw is mere noise."""

    mean: np.ndarray
    std: np.ndarray
    low: np.ndarray
    high: np.ndarray
    posterior_share: np.ndarray  # of the variance, 0 to 1

    @classmethod
    def of(cls, moments: np.ndarray) -> "ChannelStatistics":
        """Measures moments [N 2C h w]; as `LatentNorm` does, but of a constant channel too."""
        mean, logvar = np.split(moments.astype(np.float32), 2, axis=1)  # each N C h w
        over = (0, 2, 3)
        own = np.exp(logvar).mean(axis=over, dtype=np.float64)
        variance = mean.var(axis=over, dtype=np.float64) + own
        share = own / np.maximum(variance, np.finfo(np.float64).tiny)
        center = mean.mean(axis=over, dtype=np.float64)
        return cls(center, np.sqrt(variance), mean.min(axis=over), mean.max(axis=over), share)

    def remark(self, channel: int) -> str:
        """Says what is wrong with a channel, or nothing."""
        if latent_norm.is_constant(float(self.mean[channel]), float(self.std[channel])):
            return "constant: the VAE does not use it"
        if self.posterior_share[channel] >= UNUSED_SHARE:
            return "nearly unused: most of a draw is noise"
        return ""

    def table(self) -> list[str]:
        """Draws the numbers as aligned lines, one for each channel."""
        rows = [["channel", "mean", "std", "min", "max", "posterior"]]
        for i in range(len(self.mean)):
            numbers = [f"{values[i]:.3g}" for values in (self.mean, self.std, self.low, self.high)]
            rows.append([str(i), *numbers, f"{self.posterior_share[i]:.1%}"])
        remarks = ["", *(self.remark(i) for i in range(len(self.mean)))]
        return [f"{line}  {remark}".rstrip() for line, remark in zip(_aligned(rows), remarks, strict=True)]


def measured_rows(cache: LatentCache, keys: Iterable[str]) -> np.ndarray:
    """Reads the moments [N 2C h w] of keys that are in the cache, evenly chosen where there are too many."""
    distinct = list(dict.fromkeys(keys))
    count = min(len(distinct), MAX_ROWS_MEASURED)
    moments, found = cache.read([distinct[i] for i in np.linspace(0, len(distinct) - 1, count).astype(int)])
    return moments[found]


def latents_picture(moments: np.ndarray, statistics: ChannelStatistics) -> bytes:
    """Draws (PNG) for each channel how the normalised latents are distributed, with the unit normal over it."""
    mean, logvar = np.split(moments.astype(np.float32), 2, axis=1)  # each N C h w
    noise = np.random.default_rng(0).standard_normal(mean.shape, dtype=np.float32)
    draws = mean + np.exp(0.5 * logvar) * noise
    panels = []
    for i in range(mean.shape[1]):
        scale = max(float(statistics.std[i]), latent_norm.SMALLEST_SCALE)
        values = (draws[:, i].ravel() - statistics.mean[i]) / scale
        density = np.histogram(values, _BINS)[0] / (len(values) * np.diff(_BINS))
        remark = statistics.remark(i).partition(":")[0] or outside_text(float(np.mean(np.abs(values) > _BINS[-1])))
        title = f"channel {i}\nmean {statistics.mean[i]:.3g}, std {statistics.std[i]:.3g}"
        panels.append((title, remark, density))
    centers = (_BINS[1:] + _BINS[:-1]) / 2
    return charts.channel_histograms(panels, _BINS, np.exp(-(centers**2) / 2) / math.sqrt(2 * math.pi))


def outside_text(share: float) -> str:
    """Says which share of the latents, from 0 to 1, lies outside the picture; nothing where none does."""
    if share == 0:
        return ""
    shown = f"{100 * share:.1g} %" if share >= _SMALLEST_SHARE else f"under {100 * _SMALLEST_SHARE:g} %"
    return f"{shown} beyond ±{_BINS[-1]:g}"


# --- other spaces ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OtherSpace:
    """A space in the folder that is not the one in use."""

    cache: LatentCache
    num_rows: int
    num_bytes: int
    differences: list[str]  # "field: in use vs there"

    def line(self) -> str:
        """Says how much there is, and what makes it another kind."""
        size = script.size(self.num_bytes)
        return f"{self.num_rows:,} rows ({size}) in {self.cache.space.id}, where {'; '.join(self.differences)}"


def other_spaces(folder: Path, used: Space) -> list[OtherSpace]:
    """Lists the spaces of a cache folder besides the one in use."""
    found = [Space(spec) for name, spec in latent_cache.spaces(folder).items() if name != used.id]
    caches = [LatentCache(folder, space, writable=False) for space in found]
    return [OtherSpace(cache, *cache.surplus(()), used.differing_fields(cache.space)) for cache in caches]


def ways_of_encoding(report: Report) -> dict[str, int]:
    """Counts the rows by how they were made: precision, device, versions."""
    ways: Counter[str] = Counter()
    for shard in report.shards:
        for count, record in shard.records:
            ways[", ".join(f"{name} {value}" for name, value in sorted(record.items())) or "(not recorded)"] += count
    return dict(ways)


# --- pruning -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Surplus:
    """What nobody needs in one space: rows and bytes, and the keys to keep."""

    cache: LatentCache
    needed: frozenset[str]
    num_rows: int
    num_bytes: int


@dataclass(frozen=True)
class PrunePlan:
    """What a prune removes: rows of the space in use, rows of other spaces, temporaries of killed processes."""

    own: Surplus
    others: list[tuple[Surplus, OtherSpace]]
    temporaries: list[Path]
    temporary_bytes: int

    @property
    def num_bytes(self) -> int:
        """What it frees, within the size of a few headers."""
        return sum(surplus.num_bytes for surplus in self.surpluses) + self.temporary_bytes

    @property
    def surpluses(self) -> list[Surplus]:
        """What nobody needs in each space, that in use first."""
        return [self.own, *(surplus for surplus, _ in self.others)]

    @property
    def problems(self) -> list[str]:
        """One line for each file found damaged so far; such files are left alone."""
        return [line for surplus in self.surpluses for line in surplus.cache.problems]

    @property
    def is_empty(self) -> bool:
        """Says whether there is nothing to remove."""
        return not (self.own.num_rows or self.others or self.temporaries)

    def carry_out(self) -> None:
        """Removes it; raises OSError, and what is needed is then still there.

        What takes no room comes first: on a full disk it makes the room for what is written anew.
        """
        for path in self.temporaries:
            path.unlink(missing_ok=True)
        for surplus in sorted(self.surpluses, key=lambda surplus: bool(surplus.needed)):
            surplus.cache.writable = True  # it was opened for reading, so that the plan alone changes nothing
            surplus.cache.prune(surplus.needed)


def plan_prune(folder: Path, used: Space, needed: Mapping[str, Collection[str]]) -> PrunePlan:
    """Finds what can go.

    Args:
        folder: the cache folder.
        used: the space in use.
        needed: space id -> keys that somebody needs there.
    """

    def surplus(cache: LatentCache) -> Surplus:
        keys = frozenset(needed.get(cache.space.id, ()))
        return Surplus(cache, keys, *cache.surplus(keys))

    others = [(surplus(other.cache), other) for other in other_spaces(folder, used)]
    own = surplus(LatentCache(folder, used, writable=False))
    places = [folder, *(child for child in folder.iterdir() if child.is_dir())]
    temporaries = [path for place in places for path in durable.stale_temporaries(place)]
    return PrunePlan(
        own,
        [(surplus, other) for surplus, other in others if surplus.num_rows],
        temporaries,
        sum(path.lstat().st_size for path in temporaries if path.exists()),
    )
