"""Errors of the disk: what was acknowledged stays, nothing is half done, and the user reads one sentence."""

import errno
import itertools
import json
import os
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pipeline
import pytest
from os_faults import (
    ERRORS,
    Calls,
    Child,
    Fault,
    MayNotMount,
    Tally,
    Tell,
    fault_at,
    mount_small_disk,
    nothing_synced,
    raising,
    resize_small_disk,
    said,
)
from pipeline import HALF
from publishings import NEW, OLD, WORKS, Work, check_rows, done_again, temporaries, verdict
from test_kill import Reference, Told, averages, forget_run, telling
from tiny_cache import SPACE, put, reader, stored

from gait_latents.common import files
from gait_latents.images.split import read_split
from gait_latents.latents import cache as latent_cache
from gait_latents.latents import shard as shard_file
from gait_latents.latents.cache import LatentCache
from gait_latents.training import run_folder

# --- at each call ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", ERRORS, ids=errno.errorcode.get)
@pytest.mark.parametrize("work", WORKS, ids=str)
def test_an_error_at_each_call(work, number, tmp_path, account):
    tally = faults_at_each_call(work, tmp_path, lambda index: (index, raising(number)))
    assert tally.cases >= 12
    account.add(
        f"errors in {work}", f"{' '.join(map(errno.errorcode.__getitem__, ERRORS))} at each call", **vars(tally)
    )


@pytest.mark.parametrize("work", WORKS, ids=str)
def test_a_disk_that_is_full_from_each_call_on(work, tmp_path, account):
    tally = faults_at_each_call(work, tmp_path, lambda index: (-1, full_from(index)))
    assert tally.cases >= 6
    account.add(f"disk full in {work}", "from each call on", **vars(tally))


@pytest.mark.parametrize("work", WORKS, ids=str)
def test_a_short_write_at_each_write(work, tmp_path, account):
    """A short write is no error: the rest is written by another call."""
    before = tmp_path / "before"
    work.prepare(before)
    tally = Tally()
    for length in (1, 7, 100):
        folder, told = shutil.copytree(before, tmp_path / str(length)), []
        with nothing_synced(), fault_at(-1, _at_most(length), only=("write",)):
            work.run(folder, told.append)
        tally += work.check(folder, told)
    account.add("short writes", "of 1, 7 and 100 bytes", **vars(tally))


def _at_most(length: int) -> Fault:
    return lambda name, real, args: real(args[0], args[1][:length])


def full_from(index: int, number: int = errno.ENOSPC) -> Fault:
    """Makes each call that needs room fail from call `index` (from 0) on; the first write after it is only short."""
    count, is_short = itertools.count(), itertools.count()

    def fault(name: str, real: Callable, args: tuple) -> object:
        needs_room = name in ("write", "mkdir", "fsync") or (name == "open" and args[1] & os.O_CREAT)
        if next(count) < index or not needs_room:
            return real(*args)
        if name == "write" and next(is_short) == 0 and len(args[1]) > 1:
            return real(args[0], args[1][: len(args[1]) // 2])
        raise OSError(number, os.strerror(number))

    return fault


def faults_at_each_call(work: Work, root: Path, fault: Callable[[int], tuple[int, Fault]]) -> Tally:
    """Runs the work with a fault at (or from) each of its calls, looks at what is left, and does the work again.

    An error that is not told, or names no file, a second fsync of one descriptor, and a temporary that stays count as
    wrong.
    """
    work.prepare(root / "before")
    tally = Tally()
    for case in itertools.count():
        folder, told = shutil.copytree(root / "before", root / str(case)), []
        index, harm = fault(case)
        with nothing_synced(), fault_at(index, harm) as calls:
            error = _error_of(lambda folder=folder, told=told: work.run(folder, told.append))
        if len(calls.log) <= case:
            return tally
        is_named = error is None or str(error.filename).startswith(str(folder))
        is_told = error is not None or index < 0 or not work.is_one_publish
        tally += work.check(folder, told)
        tally.wrong += sum([not is_named, not is_told, bool(calls.synced_twice), bool(temporaries(folder))])
        tally += done_again(work, folder)
    raise AssertionError


def _error_of(action: Callable[[], object]) -> OSError | None:
    try:
        action()
    except OSError as error:
        return error
    return None


@pytest.mark.parametrize("number", ERRORS, ids=errno.errorcode.get)
def test_rows_that_could_not_be_published_are_served_from_memory_and_published_later(tmp_path, account, number):
    tally = Tally()
    for index in itertools.count():
        folder = tmp_path / str(index)
        stored(folder, [0, 1])
        cache = LatentCache(folder, SPACE, writable=True)
        put(cache, [2, 3])
        with nothing_synced(), fault_at(index, raising(number)) as calls:
            error = _error_of(cache.flush)
        if len(calls.log) <= index:
            break
        assert error is not None and error.errno == number
        assert (cache.pending, cache.acknowledged) == (2, 0)
        tally += check_rows(cache, range(4), range(4))
        tally += check_rows(reader(folder), [0, 1], range(4))
        cache.flush()
        tally += check_rows(reader(folder), range(4), range(4))
    account.add("rows that could not be published", "at each call", **vars(tally))


def test_a_cache_whose_disk_is_given_up_serves_from_memory(tmp_path, account):
    cache = LatentCache(tmp_path, SPACE, writable=True)
    put(cache, [0])
    with fault_at(-1, full_from(0)), pytest.raises(OSError):
        cache.flush()
    cache.writable = False
    put(cache, [1])
    cache.flush()
    assert not list(tmp_path.rglob("*.safetensors"))
    account.add("rows that could not be published", "disk given up", **vars(check_rows(cache, [0, 1], [0, 1])))


def test_another_writer_between_any_two_calls(tmp_path, account):
    account.add("another writer", "between any two calls of a publish", **vars(other_writer_at_each_call(tmp_path)))


def other_writer_at_each_call(root: Path) -> Tally:
    """Publishes one file while another writer publishes it, too, before each call in turn."""
    path, other = root / "file", b"from another writer, of another length than that"
    tally = Tally()
    for index in itertools.count():
        files.publish(path, OLD)

        def interrupt(name: str, real: Callable, args: tuple) -> object:
            files.publish(path, other)
            return real(*args)

        with nothing_synced(), fault_at(index, interrupt) as calls:
            error = _error_of(lambda: files.publish(path, NEW))
        if len(calls.log) <= index:
            return tally
        content = path.read_bytes()
        is_whole = content in (NEW, other) and not temporaries(root)
        tally += verdict(lost=content == OLD, wrong=error is not None or not is_whole)
    raise AssertionError


# --- the scripts -------------------------------------------------------------------------------------------

SLOW = pytest.mark.slow
ROW_BYTES = 2 * 8 * 8 * 8


@dataclass(frozen=True)
class Script:
    """A script on a world.

    Attributes:
        name: what it does.
        run: runs it with small shards, and returns the exit code.
        outcome: returns what matters of a finished run.
    """

    name: str
    run: Callable[..., int]
    outcome: Callable[[Path], tuple]


def _encode(world: Path, **changes: object) -> int:
    with mock.patch.object(latent_cache, "SHARD_SECONDS", 0.0):  # a shard for each batch, and two to be merged
        with mock.patch.object(shard_file, "SHARD_BYTES", 8 * ROW_BYTES):
            return pipeline.preprocess(world, **changes)


def _train(world: Path, **changes: object) -> int:
    with mock.patch.object(latent_cache, "SHARD_SECONDS", 0.0):
        return pipeline.train(world, **{"num_samples": 0, **changes})


def _encoded(root: Path) -> tuple:
    return pipeline.stored_moments(root / "latents_cache"), read_split(root / "latents_cache")


def _trained(root: Path) -> tuple:
    return pipeline.state_digests(root / "results"), pipeline.losses(root / "results")


ENCODE, TRAIN = Script("encoding", _encode, _encoded), Script("training", _train, _trained)


def undisturbed(script: Script, world: Path, **changes: object) -> tuple[Reference, tuple]:
    """Runs a script without a fault; returns what it must be equal to, and its outcome."""
    told = Told()
    with nothing_synced(), telling(lambda line: told.add([line])):
        assert script.run(world, **changes) == 0
    cache = world / "latents_cache"
    reference = Reference(pipeline.open_cache(cache).space, pipeline.stored_moments(cache), told.saved)
    return reference, script.outcome(world)


def is_one_sentence(code: int, text: str, root: Path) -> bool:
    """Says whether a script that failed told so in one line with a path, and one that did not in none."""
    lines = [line for line in text.splitlines() if line.startswith(("error", "Traceback"))]
    if code == 0:
        return lines == []
    return len(lines) == 1 and lines[0].startswith("error: ") and str(root) in lines[0] and code in (1, 2)


def struck(
    script: Script, world: Path, like: tuple[Reference, tuple], index: int, harm: Fault
) -> tuple[Tally, int, str, Calls]:
    """Runs a script from nothing with a fault, and then once more without it.

    Returns:
        The count of this one case, the exit code under the fault, what was printed, and the calls.
    """
    reference, outcome = like
    forget_run(world)
    told = Told()
    with nothing_synced(), telling(lambda line: told.add([line])):
        with fault_at(index, harm) as calls:
            code, text = said(lambda: script.run(world))
        tally = reference.check(world, told)
        is_clean = not temporaries(world) or calls.log[index][0] == "unlink"
        again, _ = said(lambda: script.run(world))
    is_equal = again == 0 and script.outcome(world) == outcome
    is_sound = is_one_sentence(code, text, world) and not calls.synced_twice
    tally.lost += told.num_repeated
    tally.wrong += sum([not is_equal, not is_sound, not is_clean])
    return tally, code, text, calls


def _places(script: Script, world: Path, is_long: bool) -> list[int]:
    """Returns the numbers of some calls to strike, evenly spread (of many writes in a row the first alone).

    Reading an image is left out: the next test looks at that.
    """
    forget_run(world)
    with nothing_synced(), fault_at(None) as calls:
        assert said(lambda: script.run(world))[0] == 0
    log = calls.log
    is_image = [path.startswith(str(world / "data")) for _, path in log]
    places = [i for i in range(len(log)) if not is_image[i] and (log[i][0] != "write" or log[i - 1] != log[i])]
    wanted = {ENCODE: 100, TRAIN: 40} if is_long else {ENCODE: 10, TRAIN: 5}
    return places[:: -(-len(places) // wanted[script])]


@pytest.mark.slow
@pytest.mark.parametrize("script", [pytest.param(ENCODE, id="encode"), pytest.param(TRAIN, id="train", marks=SLOW)])
def test_an_error_at_each_call_of_a_script(world, account, is_long, script):
    """Training goes on without its cache."""
    like, tally = undisturbed(script, world), Tally()
    for i, place in enumerate(_places(script, world, is_long)):
        case, code, text, calls = struck(script, world, like, place, raising(ERRORS[i % len(ERRORS)]))
        if calls.log[place][1].startswith(str(world / "data")):
            continue  # images are read by several threads, so that the calls come in another order each time
        if script is TRAIN and calls.log[place][1].startswith(str(world / "latents_cache")):
            case.lost += code != 0 and "cannot be read" not in text  # what cannot be read is not begun anew
            case.wrong += text.count("the cache cannot be written to") > 1
        if case.lost or case.wrong:
            print(calls.log[place], ERRORS[i % len(ERRORS)], case, code, text[-700:])
        tally += case
    assert tally.cases >= 5
    account.add(f"errors while {script.name}", "at calls of the script", **vars(tally))


@pytest.mark.parametrize("time", [0, 3], ids=["looked at", "encoded"])
def test_an_image_that_the_disk_fails_on_is_named_and_the_others_are_encoded(world, account, time):
    like, count = undisturbed(ENCODE, world), itertools.count()
    split = read_split(world / "latents_cache")
    assert split is not None
    entry = split.train[0]
    name_of_image = f"{entry.class_name}/{entry.name}"
    image = world / "data" / name_of_image
    forget_run(world)

    def fails(name: str, real: Callable, args: tuple) -> object:
        if name == "open" and str(args[0]) == str(image) and next(count) == time:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(image))
        return real(*args)

    with nothing_synced(), fault_at(-1, fails):
        code, text = said(lambda: _encode(world))
    is_told = "1 image(s) failed" in text and f"{name_of_image}: " in text
    again, _ = said(lambda: _encode(world))
    tally = verdict(lost=again != 0 or _encoded(world) != like[1], wrong=code != 1 or not is_told)
    account.add("errors while encoding", "at a call that opens an image", **vars(tally))


@pytest.mark.slow
@pytest.mark.parametrize("script", [pytest.param(ENCODE, id="encode"), pytest.param(TRAIN, id="train", marks=SLOW)])
def test_a_disk_that_is_full_from_each_call_of_a_script_on(world, account, is_long, script):
    like, tally = undisturbed(script, world), Tally()
    for place in _places(script, world, is_long):
        case, code, text, _ = struck(script, world, like, -1, full_from(place))
        if case.lost or case.wrong:
            print(place, case, code, text[-700:])
        tally += case
    assert tally.cases >= 5
    account.add(f"disk full while {script.name}", "from calls of the script on", **vars(tally))


@pytest.mark.slow
def test_a_fault_at_each_call_of_generating(trained, tmp_path, account, is_long):
    """Each image is whole or not there, and is made once; labels.csv is right in the end."""
    folder = tmp_path / "synthetic"
    flags = {"output_folder": folder, "classes": ["ID_1"]}

    def run(index: int | None, harm: Fault | None) -> tuple[int, str, Calls]:
        with nothing_synced(), fault_at(index, harm) as calls:
            code, text = said(lambda: pipeline.generate(trained, **flags))
        return code, text, calls

    _, _, calls = run(None, None)
    lists = ("labels.csv", "settings.json")  # of what is whole at the end
    expected, tally = _files(folder), {"errors": Tally(), "disk full": Tally()}
    for place in range(0, len(calls.log), 3 if is_long else 25):
        for fault, index, harm in (("errors", place, raising(errno.EIO)), ("disk full", -1, full_from(place))):
            shutil.rmtree(folder)
            code, text, calls = run(index, harm)
            made = _files(folder)
            is_sound = is_one_sentence(code, text, folder) and not calls.synced_twice
            is_clean = not temporaries(folder) or calls.log[index][0] == "unlink"
            is_right = all(made[name] == expected[name] for name in made if name not in lists)
            run(None, None)
            tally[fault] += Tally(1, 0, sum([not is_sound, not is_clean, not is_right, _files(folder) != expected]))
    for fault, found in tally.items():
        account.add(f"{fault} while generating", "at calls of the script", **vars(found))


def _files(folder: Path) -> dict[str, bytes]:
    """Returns the content of each file below a folder, which need not exist; temporaries left out."""
    paths = {path for path in folder.rglob("*") if path.is_file()} - {*temporaries(folder)}
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


UNREADABLE = Path("/proc/self/mem")  # a file whose first byte gives EIO


@contextmanager
def _cannot_read(path: Path) -> Iterator[None]:
    """Opens a file that gives EIO in the place of another."""
    if not UNREADABLE.exists():
        pytest.skip(f"this system has no {UNREADABLE}")
    real = os.open

    def open_it(place: str | os.PathLike[str], *how: int) -> int:
        return real(UNREADABLE if os.fspath(place) == str(path) else place, *how)

    with mock.patch.object(os, "open", open_it):
        yield


def test_a_file_that_cannot_be_read_is_named(trained, tmp_path, account):
    """No run begins anew, or goes on with something else, because of a disk that fails."""
    names = ["results/split.json", "results/metrics.jsonl", "latents_cache/manifest.json"]
    tally = Tally()
    for i, name in enumerate(names):
        root = shutil.copytree(trained, tmp_path / str(i))
        before = averages(root / "results")
        with _cannot_read(root / name):
            code, text = said(lambda root=root: _train(root, train_num_steps=pipeline.STEPS + 1))
        is_kept = averages(root / "results") == before and run_folder.newest_state(root / "results") is not None
        tally += Tally(1, int(not is_kept), sum([code == 0, not is_one_sentence(code, text, root / name)]))
    account.add("a file that cannot be read", "EIO at its first byte", **vars(tally))


def test_a_state_that_cannot_be_read_is_no_new_start(trained, tmp_path, account):
    root = shutil.copytree(trained, tmp_path / "world")
    expected = _trained(root)
    newest = root / "results" / run_folder.full_name(pipeline.STEPS)
    with _cannot_read(newest):
        code, text = said(lambda: _train(root))
    is_told = f"warning: {newest}: Input/output error; taking the one before" in text
    tally = verdict(
        lost="going on from step 4" not in text, wrong=code != 0 or not is_told or _trained(root) != expected
    )
    account.add("a file that cannot be read", "EIO at its first byte", **vars(tally))


# --- a limit to the size of files, and a small disk --------------------------------------------------------


@contextmanager
def files_up_to(num_bytes: int) -> Iterator[None]:
    """Lets no file of this process grow beyond a size: a write is then short, and the next one fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


class SmallDisk:
    """A file system of 1 MiB, for this process alone, with room for a chosen number of bytes."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._ballast = folder, folder / "ballast"
        mount_small_disk(folder, 1 << 20)

    def leave(self, num_bytes: int) -> None:
        """Fills the disk but for so many bytes, after all else on it was removed."""
        for path in self.folder.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        free = os.statvfs(self.folder).f_bavail * os.statvfs(self.folder).f_frsize
        self._ballast.write_bytes(bytes(max(0, free - num_bytes)))

    def make_room(self) -> None:
        """Makes the disk as large as anybody needs."""
        self._ballast.unlink()
        resize_small_disk(self.folder, 64 << 20)


def in_child(work: Callable[[], Tally]) -> Tally:
    """Does the work in a forked child and returns its count; skips the test where that may not mount anything."""

    def child(tell: Tell) -> None:
        try:
            tell(json.dumps(vars(work())))
        except MayNotMount as error:
            tell(json.dumps(str(error)))

    code, told = Child(child).end()
    assert code == 0
    found = json.loads(told[0])
    if isinstance(found, str):
        pytest.skip(f"this system lets nobody mount a file system ({found})")
    return Tally(**found)


def test_files_limited_in_size_while_encoding(world, account):
    """What is below the limit is kept. Where only joined shards are above it, that is no error."""
    like = undisturbed(ENCODE, world)

    def encode_below(limit: int, expected: str) -> Tally:
        forget_run(world)
        told = Told()
        with telling(lambda line: told.add([line])):
            with files_up_to(limit):
                code, text = said(lambda: _encode(world))
            tally = like[0].check(world, told)
            again, _ = said(lambda: _encode(world))
        assert expected in text and str(world / "latents_cache") in text
        tally.wrong += sum([not is_one_sentence(code, text, world), bool(temporaries(world)), again != 0])
        tally.wrong += _encoded(world) != like[1]
        tally.lost += told.num_repeated
        return tally

    stops = "error: a shard could not be written to"
    unjoined = "could not be joined (File too large)"  # each image is a shard of its own, of some 2 kB, until then
    cases = [(1, stops), (1000, stops), (5000, unjoined), (8000, unjoined)]
    tally = in_child(lambda: sum((encode_below(*case) for case in cases), Tally()))
    account.add("files limited in size", "RLIMIT_FSIZE while encoding", **vars(tally))


@pytest.mark.slow
def test_a_small_disk_while_encoding(world, account, is_long):
    """Whatever there is room for is kept; the same command goes on when there is more."""
    like = undisturbed(ENCODE, world)
    forget_run(world)

    def encode_into(disk: SmallDisk, room: int) -> tuple[Tally, int]:
        disk.leave(room)
        told, flags = Told(), {"output_folder": disk.folder / "latents_cache"}
        with telling(lambda line: told.add([line])):
            code, text = said(lambda: _encode(world, **flags))
            tally = like[0].check(disk.folder, told)
            tally.wrong += sum([not is_one_sentence(code, text, disk.folder), bool(temporaries(disk.folder))])
            disk.make_room()
            again, _ = said(lambda: _encode(world, **flags))
        tally.wrong += again != 0 or _encoded(disk.folder) != like[1]
        tally.lost += told.num_repeated
        return tally, code

    def work() -> Tally:
        disk = SmallDisk(world / "disk")
        found = [encode_into(disk, 4096 * pages) for pages in (range(20) if is_long else (0, 1, 3, 5, 8))]
        assert [code for _, code in found[:2]] == [2, 1]
        assert {code for _, code in found} <= {0, 1, 2}
        return sum((tally for tally, _ in found), Tally())

    account.add("full disk", "1 MiB tmpfs while encoding", **vars(in_child(work)))


@pytest.mark.slow
def test_a_small_disk_for_the_cache_while_training(world, account, is_long):
    """Training goes on from memory and says so once, whatever there is room for."""
    like = undisturbed(TRAIN, world)
    forget_run(world)

    def train_beside(disk: SmallDisk, room: int) -> tuple[Tally, str]:
        disk.leave(room)
        shutil.rmtree(world / "results", ignore_errors=True)
        told = Told()
        with telling(lambda line: told.add([line])):
            code, text = said(lambda: _train(world, latents_cache_folder=disk.folder / "latents_cache"))
        tally = like[0].check_rows(disk.folder / "latents_cache", told.published)
        tally.wrong += sum([code != 0, bool(temporaries(disk.folder)), _trained(world) != like[1]])
        in_memory = [line for line in text.splitlines() if "in memory" in line]
        tally.wrong += len(in_memory) != (len(told.published) < 15)
        return tally, "".join(in_memory)

    def work() -> Tally:
        disk = SmallDisk(world / "disk")
        found = [train_beside(disk, 4096 * pages) for pages in (range(16) if is_long else (0, 1, 2, 4))]
        assert "(No space left on device); new latents stay in memory" in found[0][1]
        assert "the cache cannot be written to (No space left on device)" in found[1][1]
        return sum((tally for tally, _ in found), Tally())

    account.add("full disk", "1 MiB tmpfs under the cache while training", **vars(in_child(work)))


@pytest.mark.slow
def test_a_small_disk_for_the_results(world, account, is_long):
    """A checkpoint that cannot be written is an error; those before are whole, and the run goes on from them."""
    like = undisturbed(TRAIN, world)
    shutil.rmtree(world / "results")

    def train_into(disk: SmallDisk, room: int) -> tuple[Tally, str]:
        disk.leave(room)
        told, flags = Told(), {"results_folder": disk.folder / "results"}
        with telling(lambda line: told.add([line])):
            code, text = said(lambda: _train(world, **flags))
            tally = like[0].check_saves(disk.folder / "results", told)
            tally.wrong += sum([not is_one_sentence(code, text, disk.folder), bool(temporaries(disk.folder))])
            disk.make_room()
            again, _ = said(lambda: _train(world, **flags))
        tally.wrong += code == 0 or again != 0 or _trained(disk.folder) != like[1]
        return tally, text

    def work() -> Tally:
        disk = SmallDisk(world / "disk")
        rooms = (0, 1 << 13, *(range(1 << 15, 1 << 20, 1 << 15) if is_long else ()), 1 << 20)
        found = [train_into(disk, room) for room in rooms]
        assert "--results_folder" in found[0][1] and "metrics.jsonl" in found[1][1]
        assert "the checkpoint of step 4 could not be saved" in found[-1][1]
        return sum((tally for tally, _ in found), Tally())

    account.add("full disk", "1 MiB tmpfs under the results", **vars(in_child(work)))


@pytest.mark.slow
def test_a_checkpoint_limited_in_size(world, account):
    """The error of the very first save, and of a later one."""
    like = undisturbed(TRAIN, world)

    def train_below(limit: int, told: Told) -> Tally:
        with files_up_to(limit):
            code, text = said(lambda: _train(world))
        tally = like[0].check_saves(world / "results", told)
        is_told = "could not be saved in" in text and "File too large; earlier ones are whole" in text
        tally.wrong += sum([code != 1, not is_told, bool(temporaries(world))])
        return tally

    def work() -> Tally:
        shutil.rmtree(world / "results")
        first = train_below(300_000, Told())  # more than the averages alone, and less than a state
        assert said(lambda: _train(world, train_num_steps=HALF))[0] == 0
        second = train_below(300_000, Told({run_folder.full_name(HALF): ""}))
        assert said(lambda: _train(world))[0] == 0
        return first + second + Tally(0, 0, _trained(world) != like[1])

    account.add("files limited in size", "RLIMIT_FSIZE while training", **vars(in_child(work)))


def test_a_log_on_a_full_disk_does_not_end_the_work(world, account):
    """Nor does a terminal that was closed."""
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    like = undisturbed(TRAIN, world)
    forget_run(world)

    def work() -> Tally:
        full = Path("/dev/full").open("w")  # noqa: SIM115  # closing it would flush it
        with redirect_stdout(full), redirect_stderr(full):
            codes = [_encode(world), _train(world), _train(world, image_size=15)]
        return Tally(3, 0, (codes != [0, 0, 2]) + (_trained(world) != like[1]))

    account.add("full disk", "under the log", **vars(in_child(work)))
