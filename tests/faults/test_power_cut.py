"""The power cut, modelled: whatever the disk may have kept, what was acknowledged is there and nothing is wrong."""

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pipeline
import pytest
from disk_model import power_cuts, put_down, recording
from os_faults import Tally, Tell, nothing_synced
from publishings import WORKS, Work
from test_kill import Reference, Told, telling

import latent_cache
from latent_dataset import read_split

# --- one piece of work -------------------------------------------------------------------------------------


@pytest.mark.parametrize("work", WORKS, ids=str)
def test_a_power_cut_at_each_call(work, tmp_path, account):
    tally = power_cuts_in(work, tmp_path)
    assert tally.cases >= 9
    account.add(f"power cut in {work}", "each state of the disk", **vars(tally))


def power_cuts_in(work: Work, root: Path) -> Tally:
    """Looks at each state in which a power cut may leave the work."""
    before, folder = root / "before", root / "folder"
    work.prepare(before)
    shutil.copytree(before, folder)
    with recording(folder) as recorder:
        work.run(folder, recorder.tell)
    tally = Tally()
    for state, told in power_cuts(before, recorder.events):
        tally += work.check(put_down(state, root / "after"), told)
    return tally


# --- whole scripts -----------------------------------------------------------------------------------------

Command = Callable[[Path, Path, Tell], object]  # input, output folder, where to tell


def cut_script(command: Command, world: Path, end: Callable[[Path], tuple], *, num_repeats: int) -> tuple[Tally, Tally]:
    """Looks at each state in which a power cut may leave a script that began with nothing.

    Args:
        command: runs the script to its end.
        world: where the input is.
        end: returns what matters of a finished run.
        num_repeats: from how many states, drawn at random, the script then goes on to its end.

    Returns:
        The count of all states, and of those from which it went on.
    """
    before, folder, after = world / "before", world / "folder", world / "after"
    before.mkdir()
    folder.mkdir()
    with recording(folder) as recorder:
        command(world, folder, recorder.tell)
    told = Told().add([event[1] for event in recorder.events if event[0] == "told"])
    rows = pipeline.stored_moments(folder / "latents_cache")
    reference = Reference(pipeline.open_cache(folder / "latents_cache").space, rows, told.saved)
    cuts, looked, repeated = list(power_cuts(before, recorder.events)), Tally(), Tally()
    for state, lines in cuts:
        looked += reference.check(put_down(state, after), Told().add(lines))
    for state, lines in random.Random(num_repeats).sample(cuts, min(num_repeats, len(cuts))):
        told = Told().add(lines)
        with nothing_synced():
            command(world, put_down(state, after), lambda line, told=told: told.add([line]))
        repeated += Tally(1, told.num_repeated, int(end(after) != end(folder)))
    return looked, repeated


def _encode(world: Path, folder: Path, tell: Tell) -> None:
    row_bytes = 2 * 8 * 8 * 8
    with (
        telling(tell),
        mock.patch.object(latent_cache, "SHARD_SECONDS", 0.0),
        mock.patch.object(latent_cache, "SHARD_BYTES", 8 * row_bytes),
    ):
        assert pipeline.preprocess(world, output_folder=folder / "latents_cache") == 0


def test_a_power_cut_while_encoding(world, account, is_long):
    def end(folder: Path) -> tuple:
        return pipeline.stored_moments(folder / "latents_cache"), read_split(folder / "latents_cache")

    looked, repeated = cut_script(_encode, world, end, num_repeats=100 if is_long else 4)
    assert looked.cases > 200
    account.add("power cut while encoding", "each state of the disk", **vars(looked))
    account.add("power cut while encoding", "goes on to its end", **vars(repeated))


def _train(world: Path, folder: Path, tell: Tell) -> None:
    flags = {"latents_cache_folder": folder / "latents_cache", "results_folder": folder / "results", "num_samples": 0}
    with telling(tell), mock.patch.object(latent_cache, "SHARD_SECONDS", 0.0):
        assert pipeline.train(world, **flags) == 0


def test_a_power_cut_while_training(world, account, is_long):
    """The figures of metrics.jsonl are not synced: those of the last seconds may be lost."""

    def end(folder: Path) -> tuple:
        return pipeline.state_digests(folder / "results"), pipeline.stored_moments(folder / "latents_cache")

    looked, repeated = cut_script(_train, world, end, num_repeats=60 if is_long else 4)
    assert looked.cases > 100
    account.add("power cut while training", "each state of the disk", **vars(looked))
    account.add("power cut while training", "goes on to its end", **vars(repeated))
