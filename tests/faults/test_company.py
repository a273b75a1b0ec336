"""Several processes on one cache folder: killed, beside others that merge, read-only, with wrong clocks, no locks."""

import ast
import errno
import hashlib
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest import mock

import numpy as np
import pipeline
import pytest
from os_faults import fault_at, fork, forked, killing, raising, wait_for
from pipeline import assert_same_run, preprocess, state_digests, stored_moments, train
from tiny_cache import RECORD, SPACE, found_rows, key, put, reader, row, stored

from gait_latents.common import files
from gait_latents.latents import cache as latent_cache
from gait_latents.latents import shard as shard_file
from gait_latents.latents.cache import LatentCache

ROOT = Path(__file__).resolve().parents[2]
ALL = {"images_per_user": "all"}

# --- encoders and a trainer --------------------------------------------------------------------------------


class Company:
    """Four encoders and a lazy trainer on one cache folder, and a reader that compares what it sees with the truth."""

    def __init__(self, world: Path, truth: dict[str, bytes], *, num_rounds: int, seed: int) -> None:
        self.world, self.truth, self.num_rounds = world, truth, num_rounds
        self.folder, self.results = world / f"cache {seed}", world / f"results {seed}"
        self.generator = random.Random(seed)
        space = pipeline.open_cache(world / "latents_cache").space
        self.reader = LatentCache(self.folder, space, writable=False)
        self.seen: set[str] = set()
        self.num_starts = self.num_kills = self.lost = self.wrong = 0

    def work(self, name: str) -> int:
        """Does what a process of this name is for; returns its exit code."""
        latent_cache.SHARD_SECONDS = 0.0  # in this process, a forked child: publish each batch
        if name == "trainer":
            flags = {"results_folder": self.results, "save_and_sample_every": 2, "num_samples": 0}
            return train(self.world, **ALL, latents_cache_folder=self.folder, **flags)
        return preprocess(self.world, **ALL, output_folder=self.folder)

    def start(self, name: str, *, may_die: bool) -> int:
        """Starts one process, which is killed at a random file-system call, if it makes so many."""
        self.num_starts += 1
        index = self.generator.randrange(150) if may_die else None
        fault = killing(after=self.generator.random() < 0.5)

        def child() -> None:
            with fault_at(index, fault):
                code = self.work(name)
            os._exit(code)

        return fork(child)

    def look(self) -> None:
        """Reads all rows that are there now."""
        self.reader.refresh()
        keys = list(self.truth)
        moments, found = self.reader.read(keys)
        now = {key for key, is_found in zip(keys, found, strict=True) if is_found}
        rows = dict(zip(keys, moments, strict=True))
        self.wrong += sum(rows[key].tobytes() != self.truth[key] for key in now)
        self.lost += len(self.seen - now)
        self.seen |= now

    def meet(self, names: Sequence[str], *, may_die: bool) -> list[str]:
        """Runs these processes side by side, looking on; returns those that were killed."""
        running = {self.start(name, may_die=may_die): name for name in names}
        killed = []
        while running:
            process, status = os.waitpid(-1, os.WNOHANG)
            if process:
                code, name = os.waitstatus_to_exitcode(status), running.pop(process)
                assert code in (0, -signal.SIGKILL), f"{name} ended with {code}"
                killed += [name] if code else []
            self.look()
            time.sleep(0.01)
        self.num_kills += len(killed)
        return killed

    def go(self) -> None:
        """Runs everybody, and everybody who was killed again, until all are done."""
        names = ["encoder 1", "encoder 2", "encoder 3", "encoder 4", "trainer"]
        for number in range(self.num_rounds + 1):
            names = self.meet(names, may_die=number < self.num_rounds)
        assert not names


@pytest.mark.slow
def test_four_encoders_and_a_trainer_that_are_killed_fill_one_cache(world, encoder, account, is_long):
    assert preprocess(world, **ALL) == 0
    assert train(world, **ALL, num_samples=0) == 0
    truth = stored_moments(world / "latents_cache")
    for seed in range(3 if is_long else 1):
        company = Company(world, truth, num_rounds=3, seed=seed)
        company.go()
        assert company.num_kills
        encoder.forget()
        assert preprocess(world, **ALL, output_folder=company.folder) == 0
        union = stored_moments(company.folder)
        lost = company.lost + len(truth.keys() - union.keys()) + encoder.num_images
        wrong = company.wrong + sum(truth.get(key) != row for key, row in union.items())
        ours, theirs = state_digests(company.results), state_digests(world / "results")
        wrong += sum(ours[name] != digest for name, digest in theirs.items())
        assert company.reader.problems == []
        assert not list(company.folder.rglob(f"{files.TEMPORARY_PREFIX}*"))
        how = "SIGKILL at random calls, then once more"
        account.add("four encoders and a trainer on one cache", how, cases=company.num_starts, lost=lost, wrong=wrong)


def with_clock(offset: float, work: Callable[[], int]) -> Callable[[], None]:
    """Makes a forked child's work whose clocks are off by so many seconds."""

    def child() -> None:
        real, steady = time.time, time.monotonic
        time.time, time.monotonic = lambda: real() + offset, lambda: steady() + offset
        os._exit(work())

    return child


@pytest.mark.slow
def test_clocks_that_are_ten_years_off_change_nothing(world, trained, account, is_long):
    ten_years, folder = 10 * 365.25 * 86400, world / "latents_cache"
    for offset in (ten_years, -ten_years) if is_long else (-ten_years,):
        shutil.rmtree(folder, ignore_errors=True)
        children = [fork(with_clock(off, lambda: preprocess(world))) for off in (offset, 0.0)]
        assert [wait_for(child) for child in children] == [0, 0]
        for path in folder.rglob("*"):
            when = time.time() - offset
            os.utime(path, (when, when))
        results = world / f"results {offset}"
        assert forked(with_clock(-offset, lambda: train(world, results_folder=results, num_samples=0))) == 0  # noqa: B023
        ours, theirs = stored_moments(folder), stored_moments(trained / "latents_cache")
        wrong = sum(ours[key] != row for key, row in theirs.items() if key in ours)
        wrong += state_digests(results) != state_digests(trained / "results")
        lost = len(theirs.keys() - ours.keys())
        account.add("clocks ten years off", "in one of two encoders, and in training", cases=15, lost=lost, wrong=wrong)


def test_a_temporary_that_a_wrong_clock_makes_look_abandoned_is_written_anew(tmp_path, monkeypatch, account):
    """A process of another machine removes it under its living writer."""
    write_new, removed, long_ago = files._write_new, [], time.time() - 1e8

    def aged(path: Path, chunks: list[memoryview]) -> os.stat_result:
        status = write_new(path, chunks)
        if not removed and chunks:
            os.utime(path, (long_ago, long_ago))
            with mock.patch.object(files, "host_digest", lambda: "f" * 8):
                removed.append(files.remove_stale_temporaries(path.parent))
        return status

    cache = LatentCache(tmp_path, SPACE, writable=True)
    put(cache, range(5))
    with monkeypatch.context() as patch:
        patch.setattr(files, "_write_new", aged)
        cache.flush()
    assert removed == [1]
    lost = 5 - len(found_rows(reader(tmp_path), range(5)))
    account.add("clocks ten years off", "a temporary removed under its writer", cases=1, lost=lost)


# --- many writers of small rows ----------------------------------------------------------------------------


def write_in_rounds(folder: Path, numbers: Sequence[int], *, merge: bool) -> None:
    """Publishes rows two by two, as a new writer each time; may merge after each."""
    for i in numbers:
        cache = LatentCache(folder, SPACE, writable=True)
        put(cache, [i, i + 1])
        if merge:
            cache.merge()
        else:
            cache.flush()


@pytest.mark.parametrize("merge", [False, True])
def test_writers_on_one_folder_lose_nothing_and_readers_see_whole_rows(tmp_path, account, is_long, merge):
    length = 30 if is_long else 15
    numbers = [range(start, start + length) for start in (0, length // 2, length)]
    children = [fork(lambda some=some: write_in_rounds(tmp_path, some, merge=merge)) for some in numbers]
    old = reader(tmp_path)
    seen: set[int] = set()
    num_looks = lost = 0
    for _ in range(8 * length):
        now = set(found_rows(old, range(2 * length + 1)))
        lost += len(seen - now)
        seen, num_looks = now, num_looks + 1
        old.refresh()
    assert [wait_for(child) for child in children] == [0, 0, 0]
    assert old.problems == []
    lost += 2 * length + 1 - len(found_rows(reader(tmp_path), range(2 * length + 1)))
    assert not list(tmp_path.rglob(".tmp*"))
    how = "each merging after each write" if merge else "each publishing shards"
    account.add("three writers and a reader", how, cases=num_looks, lost=lost)


@pytest.mark.slow
def test_merges_killed_beside_a_reader_lose_nothing(tmp_path, account, is_long):
    generator, old, kills, lost = random.Random(2), reader(tmp_path), 0, 0
    count = 25 if is_long else 12
    for start in range(count):
        stored(tmp_path, [start, start + 1])

        def merge(index: int = generator.randrange(30)) -> None:
            with fault_at(index, killing(after=False)):
                LatentCache(tmp_path, SPACE, writable=True).merge()

        old.refresh()
        child = fork(merge)
        while True:
            lost += start + 2 - len(found_rows(old, range(start + 2)))
            process, status = os.waitpid(child, os.WNOHANG)
            if process:
                break
        kills += os.waitstatus_to_exitcode(status) == -signal.SIGKILL
    assert 0 < kills <= count
    lost += count + 1 - len(found_rows(reader(tmp_path), range(count + 1)))
    account.add("a merge beside a reader", "SIGKILL at random calls", cases=count, lost=lost)


def rows_of_writer(writer: int, count: int) -> np.ndarray:
    """Returns rows that no other writer puts under the same keys."""
    return np.stack([row(1000 * writer + number) for number in range(count)])


def put_other_rows(folder: Path, writer: int, count: int) -> None:
    """Publishes a writer's own rows, in an order of its own, three by three."""
    numbers = list(range(count))
    random.Random(writer).shuffle(numbers)
    own = rows_of_writer(writer, count)
    for begin in range(0, count, 3):
        some = numbers[begin : begin + 3]
        cache = LatentCache(folder, SPACE, writable=True)
        cache.put([key(i) for i in some], own[some], ["x"] * len(some), RECORD)
        cache.flush()


def winners_in_a_child(folder: Path, count: int) -> str:
    """Returns the digest of the rows that a new process sees under the keys."""
    into, out = os.pipe()

    def child() -> None:
        moments, found = reader(folder).read([key(i) for i in range(count)])
        os.write(out, hashlib.sha256(moments.tobytes() + found.tobytes()).hexdigest().encode())

    assert forked(child) == 0
    os.close(out)
    with os.fdopen(into, "rb") as pipe:
        return pipe.read().decode()


def test_of_several_copies_all_processes_see_the_same_whatever_the_times(tmp_path, account, is_long):
    """Four writers put different rows under equal keys; which of them counts is in the names of the shards."""
    count, generator = 24, random.Random(3)
    children = [fork(lambda writer=writer: put_other_rows(tmp_path, writer, count)) for writer in range(4)]
    assert [wait_for(child) for child in children] == [0] * 4
    keys = [key(i) for i in range(count)]

    def first_by_name() -> dict[str, bytes]:
        rows: dict[str, bytes] = {}
        for path in sorted((tmp_path / SPACE.id).glob("*.safetensors")):
            alone = LatentCache(tmp_path, SPACE, writable=False)
            alone._shards = {path.name: alone._shards[path.name]}
            alone._forget_index()
            moments, found = alone.read(keys)
            rows |= {k: m.tobytes() for k, m, f in zip(keys, moments, found, strict=True) if f and k not in rows}
        return rows

    copies = [{rows_of_writer(writer, count)[i].tobytes() for writer in range(4)} for i in range(count)]
    expected, wrong = first_by_name(), 0
    for _ in range(12 if is_long else 4):
        for path in (tmp_path / SPACE.id).iterdir():
            when = generator.uniform(0, 4e9)
            os.utime(path, (when, when))
        moments, found = reader(tmp_path).read(keys)
        wrong += sum(m.tobytes() != expected[k] for k, m in zip(keys, moments, strict=True)) + int((~found).sum())
        wrong += winners_in_a_child(tmp_path, count) != hashlib.sha256(moments.tobytes() + found.tobytes()).hexdigest()
    LatentCache(tmp_path, SPACE, writable=True).merge()
    moments, _ = reader(tmp_path).read(keys)
    assert {m.tobytes() for m in moments} == set(expected.values())
    wrong += sum(m.tobytes() not in copies[i] for i, m in enumerate(moments))
    account.add("four rows under one key", "with random times of files", cases=4 * count, wrong=wrong)


# --- what a network file system shows ----------------------------------------------------------------------


def test_a_reader_with_an_older_view_finds_merged_rows(tmp_path, account):
    for i in range(3):
        stored(tmp_path, [i])
    old = reader(tmp_path)
    assert found_rows(old, [0]) == [0]
    LatentCache(tmp_path, SPACE, writable=True).merge()
    lost = 3 - len(found_rows(old, range(3)))
    assert old.problems == []
    for path in old.shard_paths():
        path.unlink()
    assert found_rows(old, range(3)) == []
    account.add("an old view of a cache", "merged by another process, then removed", cases=2, lost=lost)


def test_a_listing_that_a_merge_makes_stale_is_made_anew(tmp_path, monkeypatch, account):
    for i in range(4):
        stored(tmp_path, [i])
    list_shards, merged = shard_file.list_shards, []

    def listing_before_a_merge(folder: Path) -> list[Path]:
        paths = list_shards(folder)
        if not merged:
            merged.append(True)
            LatentCache(tmp_path, SPACE, writable=True).merge()
        return paths

    monkeypatch.setattr(shard_file, "list_shards", listing_before_a_merge)
    cache = reader(tmp_path)
    lost = 4 - len(found_rows(cache, range(4)))
    assert merged and cache.problems == []
    account.add("an old view of a cache", "merged while it is listed", cases=1, lost=lost)


def test_a_stale_listing_gives_misses_and_no_wrong_row(tmp_path, monkeypatch, account):
    for i in range(4):
        stored(tmp_path, [i])
    listing = shard_file.list_shards(tmp_path / SPACE.id)
    old = reader(tmp_path)
    LatentCache(tmp_path, SPACE, writable=True).merge()
    stored(tmp_path, [4])
    with monkeypatch.context() as patch:
        patch.setattr(shard_file, "list_shards", lambda folder: listing)
        for cache in (old, reader(tmp_path)):
            assert found_rows(cache, range(5)) == []
            assert cache.problems == []
    old.refresh()
    lost = 5 - len(found_rows(old, range(5)))
    account.add("an old view of a cache", "a stale listing of the folder", cases=2, lost=lost)


def test_a_stale_handle_is_looked_for_again(tmp_path, account):
    stored(tmp_path, range(3))
    cache = reader(tmp_path)
    with fault_at(0, raising(errno.ESTALE), only=("fstat",)):
        lost = 3 - len(found_rows(cache, range(3)))
    assert cache.problems == []
    account.add("an old view of a cache", "ESTALE once", cases=1, lost=lost)


def test_a_handle_that_stays_stale_gives_misses(tmp_path, monkeypatch, account):
    """A server may open a file, give its header, and have lost the rest."""
    path = stored(tmp_path, range(3))
    cache, preadv = reader(tmp_path), os.preadv

    def read(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        if len(buffers[0]) == 3 * 8:  # the moments
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return preadv(descriptor, buffers, offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", read)
        assert found_rows(cache, range(3)) == []
        assert len(cache.problems) == 1 and str(path) in cache.problems[0]
    lost = 3 - len(found_rows(reader(tmp_path), range(3)))
    account.add("an old view of a cache", "ESTALE for ever", cases=1, lost=lost)


# --- read-only ---------------------------------------------------------------------------------------------


def test_a_read_only_cache_serves_its_hits_and_stays_as_it_is(world, trained, encoder, capfd, account):
    preprocess(world, images_per_user=3, splits=["train"])
    folder = world / "latents_cache"
    before = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in folder.rglob("*")}

    def child() -> None:
        try:
            pipeline.mount_read_only(folder)
        except OSError:
            os._exit(77)
        encoder.forget()
        code = train(world, num_samples=0) or preprocess(world, verify="true")
        os._exit(code or (0 if encoder.num_images == 6 else 78))

    code = forked(child)
    if code == 77:
        pytest.skip("this system lets nobody mount a folder read-only")
    captured = capfd.readouterr()
    assert captured.out.count("new latents stay in memory") == 1
    changed = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in folder.rglob("*")} != before
    assert_same_run(world, trained)
    account.add("a read-only cache", "mount", cases=15, lost=changed, wrong=code != 0)


# --- no locks ----------------------------------------------------------------------------------------------


def test_nothing_depends_on_locks(world, trained, monkeypatch, account):
    """No module imports anything that locks, so that locks that lie or fail cannot matter."""
    num_modules = 0
    for path in [*ROOT.glob("*.py"), *(ROOT / "gait_latents").rglob("*.py")]:
        tree, num_modules = ast.parse(path.read_text()), num_modules + 1
        names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        names |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        names |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        assert not names & {"fcntl", "filelock", "portalocker", "msvcrt", "lockf", "flock"}, path
    assert num_modules > 60
    account.add("locks", "no module has any", cases=num_modules)
