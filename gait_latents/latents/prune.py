"""Finds and removes what a cache holds besides the latents that are needed.

That is rows of images that no split in use names, rows of other spaces (of another VAE, image_size or resize), and
temporary files of processes that were killed.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from gait_latents.common import console, files
from gait_latents.latents import cache as latent_cache
from gait_latents.latents.cache import LatentCache
from gait_latents.latents.space import Space


@dataclass(frozen=True)
class OtherSpace:
    """A space in the folder that is not the one in use, and how many rows and bytes it has."""

    cache: LatentCache
    num_rows: int
    num_bytes: int
    differences: list[str]  # "field: in use vs there"

    def line(self) -> str:
        """Says how much there is, and in which fields its space differs from the one in use."""
        size = console.size(self.num_bytes)
        return f"{self.num_rows:,} rows ({size}) in {self.cache.space.id}, where {'; '.join(self.differences)}"


def other_spaces(folder: Path, used: Space) -> list[OtherSpace]:
    """Lists the spaces of a cache folder besides the one in use."""
    found = [Space(spec) for name, spec in latent_cache.spaces(folder).items() if name != used.id]
    caches = [LatentCache(folder, space, writable=False) for space in found]
    return [OtherSpace(cache, *cache.surplus(()), used.differing_fields(cache.space)) for cache in caches]


@dataclass(frozen=True)
class Surplus:
    """What can be removed from one space (its rows and their bytes), and the keys that are needed."""

    cache: LatentCache
    needed: frozenset[str]
    num_rows: int
    num_bytes: int


@dataclass(frozen=True)
class PrunePlan:
    """What a prune removes: rows of the space in use, rows of other spaces, temporary files of killed processes."""

    own: Surplus
    others: list[tuple[Surplus, OtherSpace]]
    temporaries: list[Path]
    temporary_bytes: int

    @property
    def num_bytes(self) -> int:
        """About how many bytes are freed; the headers of rewritten shards are not counted."""
        return sum(surplus.num_bytes for surplus in self.surpluses) + self.temporary_bytes

    @property
    def surpluses(self) -> list[Surplus]:
        """What can be removed from each space, the space in use first."""
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
        """Removes all of it; raises OSError when that fails, and every row that is needed is then still there.

        What can simply be deleted goes first. A shard of which some rows are needed has to be written anew without the
        others, and on a full disk the deleted files make the room for that.
        """
        for path in self.temporaries:
            path.unlink(missing_ok=True)
        for surplus in sorted(self.surpluses, key=lambda surplus: bool(surplus.needed)):
            surplus.cache.writable = True  # it was opened for reading, so that the plan alone changes nothing
            surplus.cache.prune(surplus.needed)


def plan_prune(folder: Path, used: Space, needed: Mapping[str, Collection[str]]) -> PrunePlan:
    """Finds what can be removed; nothing is changed yet.

    Args:
        folder: the cache folder.
        used: the space in use.
        needed: space id -> keys of the images that a split or a run needs there.
    """

    def surplus(cache: LatentCache) -> Surplus:
        keys = frozenset(needed.get(cache.space.id, ()))
        return Surplus(cache, keys, *cache.surplus(keys))

    others = [(surplus(other.cache), other) for other in other_spaces(folder, used)]
    own = surplus(LatentCache(folder, used, writable=False))
    places = [folder, *(child for child in folder.iterdir() if child.is_dir() and not child.is_symlink())]
    temporaries = [path for place in places for path in files.stale_temporaries(place)]
    return PrunePlan(
        own,
        [(surplus, other) for surplus, other in others if surplus.num_rows],
        temporaries,
        sum(path.lstat().st_size for path in temporaries if path.exists()),
    )
