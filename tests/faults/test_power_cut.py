"""The power cut, modelled: whatever the disk may have kept, what was acknowledged is there and nothing is wrong."""

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pipeline
import pytest
from disk_model import Disk, power_cuts, put_down, recording
from os_faults import Tally, Tell, nothing_synced
from publishings import WORKS, Work
from test_kill import Reference, Told, telling

from gait_latents.images.split import read_split
from gait_latents.latents import cache as latent_cache
from gait_latents.latents import manifest
from gait_latents.latents import shard as shard_file

# --- the model ---------------------------------------------------------------------------------------------


def _states_after(root: Path, action: Callable[[Path], object]) -> list[dict[str, bytes | None]]:
    """Returns the states in which a power cut right after an action may leave a folder with a file in it."""
    before, folder = root / "before", root / "folder"
    for place in (before, folder):
        place.mkdir()
        (place / "old").write_bytes(b"old!")
    disk = Disk(before)
    with recording(folder) as recorder:
        action(folder)
    for event in recorder.events:
        disk.apply(event)
    return list({str(sorted(state.items())): state for state in disk.after_a_cut()}.values())


def _write(path: Path, *, sync: bool) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT)
    os.write(descriptor, b"ab")
    if sync:
        os.fsync(descriptor)
    os.close(descriptor)


def test_the_model_leaves_what_was_not_synced_in_every_way(tmp_path):
    states = _states_after(tmp_path, lambda folder: _write(folder / "new", sync=False))
    found = [state.get("new") for state in states]
    assert sorted(content for content in found if content is not None) == [b"", b"\0\0", b"a", b"a\0", b"ab"]
    assert found.count(None) == 1 and all(state["old"] == b"old!" for state in states)


def test_in_the_model_a_synced_file_may_lack_its_name_and_a_replaced_one_be_either(tmp_path):
    def replace(folder: Path) -> None:
        _write(folder / "new", sync=True)
        os.rename(folder / "new", folder / "old")  # noqa: PTH104

    states = _states_after(tmp_path, replace)
    expected = [{"old": b"old!"}, {"old": b"ab"}, {"old": b"old!", "new": b"ab"}, {"old": b"ab", "new": b"ab"}]
    assert len(states) == 4 and all(state in states for state in expected)


def test_in_the_model_a_synced_folder_has_its_names_and_not_their_content(tmp_path):
    def make(folder: Path) -> None:
        (folder / "sub").mkdir()
        _write(folder / "sub" / "new", sync=True)
        descriptor = os.open(folder, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)

    states = _states_after(tmp_path, make)
    assert states == [{"old": b"old!", "sub": None}, {"old": b"old!", "sub": None, "sub/new": b"ab"}]


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
        for place in (after / "latents_cache", after / "results"):  # raise for what is damaged
            manifest.read_manifest(place)
            read_split(place)
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
        mock.patch.object(shard_file, "SHARD_BYTES", 8 * row_bytes),
    ):
        assert pipeline.preprocess(world, output_folder=folder / "latents_cache") == 0


@pytest.mark.slow
def test_a_power_cut_while_encoding(world, account, is_long):
    def end(folder: Path) -> tuple:
        return pipeline.stored_moments(folder / "latents_cache"), read_split(folder / "latents_cache")

    looked, repeated = cut_script(_encode, world, end, num_repeats=100 if is_long else 4)
    assert looked.cases > 100
    account.add("power cut while encoding", "each state of the disk", **vars(looked))
    account.add("power cut while encoding", "goes on to its end", **vars(repeated))


def _train(world: Path, folder: Path, tell: Tell) -> None:
    flags = {"latents_cache_folder": folder / "latents_cache", "results_folder": folder / "results", "num_samples": 0}
    with telling(tell), mock.patch.object(latent_cache, "SHARD_SECONDS", 0.0):
        assert pipeline.train(world, **flags) == 0


@pytest.mark.slow
def test_a_power_cut_while_training(world, account, is_long):
    """The figures of metrics.jsonl are not synced: those of the last seconds may be lost."""

    def end(folder: Path) -> tuple:
        return pipeline.state_digests(folder / "results"), pipeline.stored_moments(folder / "latents_cache")

    looked, repeated = cut_script(_train, world, end, num_repeats=60 if is_long else 4)
    assert looked.cases > 100
    account.add("power cut while training", "each state of the disk", **vars(looked))
    account.add("power cut while training", "goes on to its end", **vars(repeated))
