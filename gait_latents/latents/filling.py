"""Encodes the images whose latents a dataset lacks, with one process or with several that share the work.

Each process encodes its share and publishes it in the cache folder; there the others find it.
"""

from collections.abc import Callable

from gait_latents.common import console
from gait_latents.common.distributed import OtherFailed, Ranks
from gait_latents.common.errors import Stopped
from gait_latents.common.process import StopSignals
from gait_latents.latents.dataset import LatentDataset


def fill_together(dataset: LatentDataset, ranks: Ranks, signals: StopSignals) -> list[tuple[int, str]]:
    """Encodes all that is missing, each process its share, and takes up what the others have published.

    What the others do not publish in this cache folder is encoded here, too: another process may write to another disk,
    may be unable to write, or may have died. When one process fails, all end, so every process must call this, in a
    block of `Ranks.together`.

    Returns:
        (position, reason) of each image that could not be encoded; images of the same content are all listed.

    Raises:
        Stopped: after a signal to any of the processes; rows in memory are not yet published, which the caller does.
        OtherFailed: when another process could not encode its share; the end of the block says why.
    """
    missing = dataset.missing()
    if not missing and ranks.count == 1:
        return []
    with console.progress(total=len(missing), unit="images", label="encode") as bar:

        def advance(count: int) -> None:
            bar.advance(count)
            if count:
                ranks.sign_of_life(_FILLED)
            ranks.raise_if_stopped(signals)
            ranks.raise_if_failed(_FILLED)

        try:
            bad = _fill_shares(dataset, missing, ranks, advance)
            ranks.raise_if_stopped(signals)  # by one that came since the last look
            return bad
        except OtherFailed:
            dataset.cache_flush()
            raise
        except Stopped:
            raise
        except BaseException:
            ranks.tell(f"{_FILLED} failed")
            raise


_ENCODED, _FILLED = (
    "encoded",
    "filled",
)  # what a process tells the others: its own share is encoded; all shares are there


def _fill_shares(
    dataset: LatentDataset, missing: list[int], ranks: Ranks, advance: Callable[[int], None]
) -> list[tuple[int, str]]:
    """Encodes the share of this process, waits for the others' shares, and encodes what does not come."""
    bad = dataset.fill(ranks.share(missing), advance=advance)
    if ranks.count == 1:
        return bad
    ranks.tell(_ENCODED)

    def look() -> tuple[int, int]:
        found = dataset.refresh()
        advance(found)
        return found, len(_others(dataset, bad))

    ranks.await_others(_ENCODED, look)
    left = _others(dataset, bad)
    bad = sorted(bad + dataset.fill(left, advance=advance)) if left else bad
    ranks.tell(_FILLED)
    ranks.await_end(
        _FILLED, lambda: advance(0)
    )  # the next exchange between the processes has a time limit, so they meet here first
    return bad


def _others(dataset: LatentDataset, bad: list[tuple[int, str]]) -> list[int]:
    """Returns the positions that are missing and did not fail in this process."""
    failed = {position for position, _ in bad}
    return [position for position in dataset.missing() if position not in failed]
