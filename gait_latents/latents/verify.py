"""Checks a cache: the seal of every row, which images are cached by class, and how the latents are distributed.

`verify` reads all rows and gives a report; `class_table` and `ChannelStatistics` turn what was found into tables for
the terminal. `--verify` (`cache_tools.py`) prints them.

Shapes: moments [N 2C h w] float16 as stored; a statistic is one number for each of the C channels.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gait_latents.common import charts, files
from gait_latents.common.console import show_name
from gait_latents.images.split import PARTS, Entry
from gait_latents.latents import shard as shard_file
from gait_latents.latents.cache import LatentCache
from gait_latents.latents.shard import Invalid, keys_as_hex, open_shard, problem, record_runs, row_facts
from gait_latents.latents.space import Space
from gait_latents.vae import norm


@dataclass(frozen=True)
class ShardReport:
    """What one shard holds.

    Attributes:
        path: the file.
        num_rows: rows in it.
        num_good: rows whose seal fits.
        num_bytes: its size.
        records: (number of rows, how they were made) for each run of rows that were made alike.
    """

    path: Path
    num_rows: int
    num_good: int
    num_bytes: int
    records: list[tuple[int, dict]]


@dataclass(frozen=True)
class CacheReport:
    """The state of a space after every seal was checked, compared with the keys that `verify` was given.

    Attributes:
        good: keys with a valid row.
        damaged: keys of which there are rows, all of them damaged.
        missing: keys without a row.
        orphaned: {key: name of the image} of valid rows whose key was not given.
        shards: one entry per shard of the space.
        problems: one line per damaged file.
    """

    good: list[str]
    damaged: list[str]
    missing: list[str]
    orphaned: dict[str, str]
    shards: list[ShardReport]
    problems: list[str]


def verify(cache: LatentCache, keys: Sequence[str]) -> CacheReport:
    """Reads every row on disk, checks its seal, and compares with `keys`; rows that are in memory only do not count."""
    stored = LatentCache(cache.folder, cache.space, writable=False)
    checks = [_check_shard(path, cache.space) for path in stored.shard_paths()]
    valid = {key: name for check in reversed(checks) for key, name in check.valid.items()}
    broken = {key for check in checks for key in check.broken}
    wanted = dict.fromkeys(keys)
    return CacheReport(
        good=[key for key in wanted if key in valid],
        damaged=[key for key in wanted if key in broken and key not in valid],
        missing=[key for key in wanted if key not in broken and key not in valid],
        orphaned={key: name for key, name in valid.items() if key not in wanted},
        shards=[check.report for check in checks],
        problems=stored.problems + [line for check in checks for line in check.problems],
    )


class _Check(NamedTuple):
    """What was found in one shard."""

    report: ShardReport
    valid: dict[str, str]  # key: name
    broken: set[str]
    problems: list[str]


def _check_shard(path: Path, space: Space) -> _Check:
    """Reads and checks a whole shard; what is wrong with it becomes a line of `problems`."""
    problems, valid, broken, num_rows, num_bytes, records = [], {}, set(), 0, 0, []
    try:
        shard, metadata = open_shard(path, space)
        num_rows, num_bytes = len(shard), shard.size
        names, _ = row_facts(metadata, num_rows)
        records = record_runs(metadata, num_rows)
        keys = keys_as_hex(shard.keys)
        broken.update(keys)
        for some, _, good in shard_file.sealed_rows(shard, np.arange(num_rows), space):
            valid |= {keys[row]: names[row] for row in some[good]}
        if _file_digest(path) != path.stem:
            problems.append(f"{path}: its content is not the one that its name stands for")
    except (Invalid, OSError) as error:
        problems.append(problem(path, error))
    broken -= valid.keys()
    if broken:
        problems.append(f"{path}: {len(broken)} of {num_rows} rows are damaged and count as missing")
    return _Check(ShardReport(path, num_rows, len(valid), num_bytes, records), valid, broken, problems)


def _file_digest(path: Path) -> str:
    """Returns the start of the SHA-256 of a file, as which a shard is named."""
    with files.reading(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:32]


MAX_CLASS_ROWS = 38  # of the table of classes; the others are added up in one more row
MAX_ROWS_MEASURED = 2000  # rows that the statistics are measured on; 64 MB when a row has 32 kB
UNUSED_SHARE = 0.9  # a channel of whose variance this share is the posterior's own noise carries next to nothing
_BINS = np.linspace(-5, 5, 101)
_SMALLEST_SHARE = 1e-5  # a smaller share is written as "under" this one


# --- status by class ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ClassStatus:
    """How many images of a class are cached, of how many that were asked for, and why the rest are not.

    Attributes:
        name: of the class.
        train, validation, test: (cached, asked for) images of each part of the split.
        missing: images that are not cached.
        stale: images that are not cached since their files were edited.
    """

    name: str
    train: tuple[int, int] = (0, 0)
    validation: tuple[int, int] = (0, 0)
    test: tuple[int, int] = (0, 0)
    missing: int = 0
    stale: int = 0

    @property
    def is_whole(self) -> bool:
        """Says whether all its images are cached."""
        return not self.missing and not self.stale

    def cells(self, parts: Sequence[str]) -> tuple[str, ...]:
        """Returns the texts of its row in the table."""
        counts = (getattr(self, part) for part in parts)
        found = [f"{cached:,}/{asked:,}" if asked else "-" for cached, asked in counts]
        return self.name, *found, f"{self.missing:,}", f"{self.stale:,}"


def class_status(
    classes: Sequence[str], parts: Mapping[str, Sequence[Entry]], *, missing: Collection[str], stale: Collection[str]
) -> list[ClassStatus]:
    """Counts by class, in the order of `classes`.

    Args:
        parts: the entries asked for, under "train", "validation" and "test".
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
            **{part: (counts[name, part], counts[name, f"{part} asked"]) for part in PARTS},
            missing=counts[name, "missing"],
            stale=counts[name, "stale"],
        )
        for name in classes
    ]


def class_table(status: Sequence[ClassStatus]) -> list[str]:
    """Writes the status as aligned lines. Of many classes, those that are not whole come first."""
    shown_rows, rest = list(status), []
    if len(status) > MAX_CLASS_ROWS + 1:
        in_need_first = sorted(status, key=lambda row: row.is_whole)
        shown_rows, rest = in_need_first[:MAX_CLASS_ROWS], in_need_first[MAX_CLASS_ROWS:]
    parts = [part for part in PARTS if part != "validation" or any(row.validation[1] for row in status)]
    shown_rows += [_sum(rest)] if rest else []
    cells = [("class", *parts, "missing", "stale"), *(row.cells(parts) for row in shown_rows)]
    return _align([[show_name(first)[:40], *others] for first, *others in cells])


def _sum(rows: Sequence[ClassStatus]) -> ClassStatus:
    """Adds up the classes that have no row of their own."""
    parts = {
        part: (sum(getattr(row, part)[0] for row in rows), sum(getattr(row, part)[1] for row in rows)) for part in PARTS
    }
    name = f"… {len(rows):,} more"
    missing, stale = sum(row.missing for row in rows), sum(row.stale for row in rows)
    return ClassStatus(name, **parts, missing=missing, stale=stale)


def _align(rows: Sequence[Sequence[str]]) -> list[str]:
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
    """How unscaled latents are distributed in each of C channels, over images and positions.

    Attributes:
        mean: of the posterior means.
        std: standard deviation of a draw from the posteriors.
        low, high: smallest and largest posterior mean.
        posterior_share: the share, from 0 to 1, of the variance of a draw that is the posteriors' own. At 1 a channel
            says nothing about the image.
    """

    mean: np.ndarray
    std: np.ndarray
    low: np.ndarray
    high: np.ndarray
    posterior_share: np.ndarray

    @classmethod
    def of(cls, moments: np.ndarray) -> "ChannelStatistics":
        """Measures moments [N 2C h w] as `LatentNorm.from_moments` does, but refuses no constant channel."""
        mean, logvar = np.split(moments.astype(np.float32), 2, axis=1)  # each N C h w
        over = (0, 2, 3)
        own = np.exp(logvar).mean(axis=over, dtype=np.float64)
        variance = mean.var(axis=over, dtype=np.float64) + own
        share = own / np.maximum(variance, np.finfo(np.float64).tiny)
        center = mean.mean(axis=over, dtype=np.float64)
        return cls(center, np.sqrt(variance), mean.min(axis=over), mean.max(axis=over), share)

    def remark(self, channel: int) -> str:
        """Says what is wrong with a channel; an empty text where nothing is."""
        if norm.is_constant(float(self.mean[channel]), float(self.std[channel])):
            return "constant: the VAE does not use it"
        if self.posterior_share[channel] >= UNUSED_SHARE:
            return "nearly unused: most of a draw is noise"
        return ""

    def table(self) -> list[str]:
        """Writes the numbers as aligned lines, one for each channel."""
        rows = [["channel", "mean", "std", "min", "max", "posterior"]]
        for i in range(len(self.mean)):
            numbers = [f"{values[i]:.3g}" for values in (self.mean, self.std, self.low, self.high)]
            rows.append([str(i), *numbers, f"{self.posterior_share[i]:.1%}"])
        remarks = ["", *(self.remark(i) for i in range(len(self.mean)))]
        return [f"{line}  {remark}".rstrip() for line, remark in zip(_align(rows), remarks, strict=True)]


def read_rows_to_measure(cache: LatentCache, keys: Iterable[str]) -> np.ndarray:
    """Reads moments [N 2C h w] to measure: of all the keys, or of MAX_ROWS_MEASURED evenly spaced ones."""
    distinct = list(dict.fromkeys(keys))
    count = min(len(distinct), MAX_ROWS_MEASURED)
    moments, found = cache.read([distinct[i] for i in np.linspace(0, len(distinct) - 1, count).astype(int)])
    return moments[found]


def latents_picture(moments: np.ndarray, statistics: ChannelStatistics) -> bytes:
    """Returns a picture (PNG) of the normalised latents' distribution in each channel, with the unit normal over it."""
    mean, logvar = np.split(moments.astype(np.float32), 2, axis=1)  # each N C h w
    noise = np.random.default_rng(0).standard_normal(mean.shape, dtype=np.float32)
    draws = mean + np.exp(0.5 * logvar) * noise
    panels = []
    for i in range(mean.shape[1]):
        scale = max(float(statistics.std[i]), norm.SMALLEST_SCALE)
        values = (draws[:, i].ravel() - statistics.mean[i]) / scale
        density = np.histogram(values, _BINS)[0] / (len(values) * np.diff(_BINS))
        remark = statistics.remark(i).partition(":")[0] or outside_text(float(np.mean(np.abs(values) > _BINS[-1])))
        title = f"channel {i}\nmean {statistics.mean[i]:.3g}, std {statistics.std[i]:.3g}"
        panels.append((title, remark, density))
    centers = (_BINS[1:] + _BINS[:-1]) / 2
    return charts.channel_histograms(panels, _BINS, np.exp(-(centers**2) / 2) / math.sqrt(2 * math.pi))


def outside_text(share: float) -> str:
    """Says which share (0 to 1) of the latents lies outside the picture; an empty text where none does."""
    if share == 0:
        return ""
    percent = f"{100 * share:.1g} %" if share >= _SMALLEST_SHARE else f"under {100 * _SMALLEST_SHARE:g} %"
    return f"{percent} beyond ±{_BINS[-1]:g}"


def ways_of_encoding(report: CacheReport) -> dict[str, int]:
    """Counts the rows by how they were made: precision, device, versions."""
    ways: Counter[str] = Counter()
    for shard in report.shards:
        for count, record in shard.records:
            ways[", ".join(f"{name} {value}" for name, value in sorted(record.items())) or "(not recorded)"] += count
    return dict(ways)
