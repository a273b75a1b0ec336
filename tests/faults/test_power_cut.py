"""The power cut, modelled: whatever the disk may have kept, what was acknowledged is there and nothing is wrong."""

import io
import os
import random
import re
import shutil
from collections.abc import Callable
from contextlib import redirect_stderr, suppress
from pathlib import Path
from unittest import mock

import pipeline
import pytest
import tiny_cache
from disk_model import Disk, drawn_power_cuts, power_cuts, put_down, recording
from os_faults import Tally, Tell, nothing_synced
from publishings import (
    CHECKPOINT,
    FIRST_SHARD,
    MANIFEST,
    MERGE,
    NEW_FOLDERS,
    PRUNE,
    REPLACED_FILE,
    SECOND_SHARD,
    WORKS,
    Work,
)
from test_kill import Reference, Told, telling
from tiny_checkpoint import same, tiny_tensors

from gait_latents.common import files
from gait_latents.common.errors import UserError
from gait_latents.images.split import read_split
from gait_latents.latents import cache as latent_cache
from gait_latents.latents import manifest
from gait_latents.latents import shard as shard_file
from gait_latents.latents.cache import LatentCache
from gait_latents.training import run_folder

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


# --- a disk that lies --------------------------------------------------------------------------------------


def test_in_the_model_a_disk_that_lies_may_have_lost_what_was_synced(tmp_path):
    for name in ("before", "folder"):
        (tmp_path / name).mkdir()
    with recording(tmp_path / "folder") as recorder:
        files.publish(tmp_path / "folder" / "new", b"ab")
    states = list(drawn_power_cuts(tmp_path / "before", recorder.events, num_draws=50, seed=0))
    assert all(state in states for state in ({}, {"new": b""}, {"new": b"a\0"}, {"new": b"ab"}))


SEALED_WORKS = [work for work in WORKS if work not in (REPLACED_FILE, NEW_FOLDERS)]  # no plain file can tell a torn one


@pytest.mark.parametrize("work", SEALED_WORKS, ids=str)
def test_a_disk_that_lies_about_fsync(work, tmp_path, account, is_long):
    """What was acknowledged may be lost; nothing is wrong, and all is there once it is done again."""
    before, folder, after = tmp_path / "before", tmp_path / "folder", tmp_path / "after"
    work.prepare(before)
    shutil.copytree(before, folder)
    with recording(folder) as recorder:
        work.run(folder, lambda line: None)
    tally = Tally()
    for state in drawn_power_cuts(before, recorder.events, num_draws=60 if is_long else 12, seed=1):
        put_down(state, after)
        wrong = num_wrong(after)
        with nothing_synced():
            work.run(after, lambda line: None)
            is_done = work not in ROW_WORKS or _has_all_rows(after / "cache")
        if work is CHECKPOINT:
            is_done = run_folder.find_newest(after).meta["step"] == 4  # type: ignore[union-attr]
        if work is MANIFEST:
            is_done = manifest.read_manifest(after).settings["version"] == 2  # type: ignore[union-attr]
        tally += Tally(1, int(not is_done), wrong + num_wrong(after))
    assert tally.cases >= 8
    account.add("a disk that lies about fsync", f"{work}, states drawn", **vars(tally))


ROW_WORKS = (FIRST_SHARD, SECOND_SHARD, MERGE, PRUNE)


def num_wrong(folder: Path) -> int:
    """Counts what a folder serves, of rows, manifest, split and states, that was never stored."""
    rows = tiny_cache.reader(folder / "cache")
    wrong = len(tiny_cache.strangers(rows, range(4)))
    tiny_cache.found_rows(rows, range(4))  # asserts that each is right
    with suppress(UserError):  # which names the damaged file, and what to do
        found = manifest.read_manifest(folder)
        wrong += found is not None and found.settings["version"] not in (1, 2)
    with suppress(UserError):
        split = read_split(folder)
        wrong += split is not None and split.classes != ("ID_1",)
    with suppress(UserError):
        state = run_folder.find_newest(folder)
        wrong += state is not None and not same(state.tensors, tiny_tensors(state.meta["step"]))
    return wrong


def _has_all_rows(folder: Path) -> bool:
    """Stores the rows that are missing, as a later process would, and says whether all are there then."""
    cache = LatentCache(folder, tiny_cache.SPACE, writable=True)
    missing = sorted(set(range(4)) - set(tiny_cache.found_rows(cache, range(4))))
    if missing:
        tiny_cache.put(cache, missing)
        cache.flush()
    return tiny_cache.found_rows(tiny_cache.reader(folder), range(4)) == list(range(4))


def lie_to_script(command: Command, world: Path, end: Callable[[Path], tuple], *, num_states: int) -> Tally:
    """Lets a script go on from states drawn of a disk that lied while it ran, until it is at its end.

    Where it ends with a line that names a damaged file, that is removed, as the line says.
    """
    before, folder, after = world / "before", world / "folder", world / "after"
    before.mkdir()
    folder.mkdir()
    with recording(folder) as recorder:
        command(world, folder, lambda line: None)
    states = list(drawn_power_cuts(before, recorder.events, num_draws=5, seed=2))
    tally = Tally()
    for state in random.Random(3).sample(states, num_states):
        put_down(state, after)
        with nothing_synced():
            _until_it_ends(lambda: command(world, after, lambda line: None), after)
        tally += Tally(1, 0, int(end(after) != end(folder)))
    return tally


def _until_it_ends(command: Callable[[], object], root: Path) -> None:
    for _ in range(5):  # manifest, split and states may each be damaged
        output = io.StringIO()
        try:
            with redirect_stderr(output):
                command()
            return
        except AssertionError:
            lines = [line for line in output.getvalue().splitlines() if line.startswith("error: ")]
            assert len(lines) == 1 and ("remove" in lines[0] or "move them away" in lines[0]), output.getvalue()
            damaged = re.findall(r"(/\S+\.json) (?:is damaged|does not hold)", lines[0])
            if "no checkpoint in" in lines[0] or "holds averaged weights of an earlier run" in lines[0]:
                damaged = [str(path) for path in (root / "results").glob("*-*.safetensors")]
            assert damaged, lines[0]
            for path in damaged:
                Path(path).unlink()
    raise AssertionError("it does not come to its end")


def _sound_rows(folder: Path) -> dict[str, bytes]:
    """Returns all rows but the damaged ones: a torn shard may stay, and even claim keys that no image has."""
    return pipeline.stored_moments(folder / "latents_cache", may_be_damaged=True)


@pytest.mark.slow
def test_a_disk_that_lied_while_encoding(world, account, is_long):
    def end(folder: Path) -> tuple:
        return _sound_rows(folder), read_split(folder / "latents_cache")

    tally = lie_to_script(_encode, world, end, num_states=60 if is_long else 6)
    account.add("a disk that lies about fsync", "encoding goes on to its end", **vars(tally))


@pytest.mark.slow
def test_a_disk_that_lied_while_training(world, account, is_long):
    def end(folder: Path) -> tuple:
        return pipeline.state_digests(folder / "results"), _sound_rows(folder)

    tally = lie_to_script(_train, world, end, num_states=40 if is_long else 6)
    account.add("a disk that lies about fsync", "training goes on to its end", **vars(tally))
