"""SIGKILL: what was acknowledged is there, nothing is wrong, and the same command goes on to the same end."""

import functools
import hashlib
import io
import itertools
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import pipeline
import pytest
import tiny
from os_faults import BARS, Child, Tally, Tell, fault_at, killing, nothing_synced
from pipeline import HALF, STEPS
from publishings import CHECKPOINT, FIRST_SHARD, WORKS, Work, done_again, temporaries, verdict
from torch import Tensor

from gait_latents.common import files as disk_files
from gait_latents.common import layout
from gait_latents.common.layout import SPLIT_NAME
from gait_latents.images.split import read_split
from gait_latents.latents import cache as latent_cache
from gait_latents.latents import shard as shard_file
from gait_latents.latents.cache import LatentCache
from gait_latents.latents.dataset import LatentDataset
from gait_latents.latents.space import Space
from gait_latents.training import checkpoint, run_folder

ROOT = Path(__file__).resolve().parents[2]

# --- at each call ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "work",
    [work if work in (FIRST_SHARD, CHECKPOINT) else pytest.param(work, marks=pytest.mark.slow) for work in WORKS],
    ids=str,
)
def test_a_kill_at_each_call(work, tmp_path, account, is_long):
    tally = kills_at_each_call(work, tmp_path, sides=(True, False) if is_long else (True,))
    assert tally.cases >= 12
    account.add(f"SIGKILL in {work}", "at each call", **vars(tally))


def kills_at_each_call(work: Work, root: Path, *, sides: Sequence[bool] = (True,)) -> Tally:
    """Kills the work after each of its calls (and before it), looks at what is left, and does the work again."""
    work.prepare(root / "before")
    tally = Tally()
    for after in sides:
        for index in itertools.count():
            folder = shutil.copytree(root / "before", root / f"{index}-{after}")
            code, told = Child(functools.partial(_run_and_die, work, folder, index, after)).end()
            if code == 0:  # past the last call
                break
            assert code == -9
            tally += work.check(folder, told)
            tally += done_again(work, folder)
    return tally


def _run_and_die(work: Work, folder: Path, index: int, after: bool, tell: Tell) -> None:
    with nothing_synced(), fault_at(index, killing(after=after)):
        work.run(folder, tell)


@pytest.mark.parametrize("bars", BARS)
def test_a_child_that_dies_while_it_draws_a_bar_holds_up_no_other(bars, monkeypatch):
    """tqdm's lock is one for all processes forked from one that has used it: each child must have its own."""

    def draw(tell: Tell) -> None:
        for _ in bars(range(3), file=io.StringIO()):
            pass

    def die(tell: Tell) -> None:
        with bars.get_lock():
            os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(bars, "_lock", multiprocessing.RLock(), raising=False)  # as if this class were the first

    draw(print)  # from here on there is a lock to share
    assert Child(die).end()[0] == -9
    assert Child(draw).end(kill_after=60)[0] == 0


# --- what a child tells of a script ------------------------------------------------------------------------


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Returns a digest of tensors by name."""
    whole = hashlib.sha256()
    for name in sorted(tensors):
        whole.update(name.encode() + tensors[name].detach().contiguous().numpy().tobytes())
    return whole.hexdigest()


@contextmanager
def telling(tell: Tell) -> Iterator[None]:
    """Tells each row that was encoded, and after they have returned the saves and each row that was published."""
    save, put, publish = checkpoint.save, LatentCache.put, LatentCache._publish_shard

    def told_save(path, tensors, meta, **where) -> None:
        save(path, tensors, meta, **where)
        tell(f"saved {Path(path).name} {digest(tensors)}")

    def told_put(cache, keys, *rest) -> None:
        for key in keys:
            tell(f"encoded {key}")
        put(cache, keys, *rest)

    def told_publish(cache, rows) -> object:
        shard = publish(cache, rows)
        for key in rows:
            tell(f"published {key}")
        return shard

    with (
        mock.patch.object(checkpoint, "save", told_save),
        mock.patch.object(LatentCache, "put", told_put),
        mock.patch.object(LatentCache, "_publish_shard", told_publish),
    ):
        yield


@dataclass
class Told:
    """What the children of one run have told so far."""

    saved: dict[str, str] = field(default_factory=dict)  # file name: digest
    published: set[str] = field(default_factory=set)
    num_repeated: int = 0  # rows that were encoded although they were published

    def add(self, lines: list[str]) -> "Told":
        """Takes the lines of one more child."""
        for line in lines:
            what, name, *rest = line.split()
            if what == "saved":
                self.saved[name] = rest[0]
            elif what == "published":
                self.published.add(name)
            else:
                self.num_repeated += name in self.published
        return self

    @property
    def last_step(self) -> int:
        """The step of the newest full state that was saved."""
        return max([int(name[6:14]) for name in self.saved if name.startswith("state-")], default=0)


@dataclass(frozen=True)
class Reference:
    """The uninterrupted run that others must equal: its rows, and the digest of each save."""

    space: Space
    moments: dict[str, bytes]
    saved: dict[str, str]

    def check(self, root: Path, told: Told) -> Tally:
        """Counts one case: is all that was told there, and is all that is there as in the uninterrupted run?"""
        tally = self.check_rows(root / "latents_cache", told.published)
        states = self.check_saves(root / "results", told)
        return verdict(lost=bool(tally.lost + states.lost), wrong=bool(tally.wrong + states.wrong))

    def check_rows(self, folder: Path, needed: set[str]) -> Tally:
        cache = LatentCache(folder, self.space, writable=False)
        keys = cache.keys()
        moments, found = cache.read(keys)
        rows = {key: row.tobytes() for key, row, is_found in zip(keys, moments, found, strict=True) if is_found}
        return verdict(lost=not needed <= rows.keys(), wrong=not self._are_right(rows) or bool(cache.problems))

    def _are_right(self, rows: Mapping[str, bytes]) -> bool:
        return all(self.moments.get(key) == row for key, row in rows.items())

    def check_saves(self, results: Path, told: Told) -> Tally:
        averages = [results / name for name in told.saved if name.startswith("ema-")]
        lost = not all(path.exists() for path in averages)
        wrong = not all(digest(checkpoint.load(path)[0]) == self.saved[path.name] for path in averages if path.exists())
        state = run_folder.newest_state(results)
        if state is None:
            return verdict(lost=lost or told.last_step > 0, wrong=wrong)
        lost |= state.step < told.last_step
        return verdict(lost=lost, wrong=wrong or bool(state.warnings) or not self._is_right(state))

    def _is_right(self, state: run_folder.SavedState) -> bool:
        return digest(state.tensors) == self.saved[state.path.name]


# --- at random times ---------------------------------------------------------------------------------------


def kill_at_random(
    command: Callable[[Tell], object],
    end: Callable[[], Tally],
    check: Callable[[Told], Tally],
    *,
    num_kills: int,
    seconds: float,
) -> Tally:
    """Kills a command at times uniform over its length, and lets it go on until it is through, time and again.

    Args:
        command: runs to its end from wherever it was stopped, and tells.
        end: looks at a finished run, counts what is not as it should be, and removes it.
        check: looks at what a kill has left.
        num_kills: how many kills in all.
        seconds: length of an undisturbed run.
    """
    times, tally, told, is_done = random.Random(num_kills), Tally(), Told(), False
    while tally.cases < num_kills or not is_done:
        is_last = tally.cases >= num_kills
        code, lines = Child(command).end(kill_after=None if is_last else times.uniform(0, seconds))
        told.add(lines)
        is_done = code == 0
        if is_done:
            tally.lost += told.num_repeated
            tally += end()
            told = Told()
        else:
            assert code == -9
            tally += check(told)
    return tally


def _timed(command: Callable[[Tell], object]) -> tuple[float, Told]:
    started = time.monotonic()
    code, lines = Child(command).end()
    assert code == 0
    return time.monotonic() - started, Told().add(lines)


def _count_of_an_end(root: Path, *, is_equal: bool) -> Tally:
    """Counts it as wrong when a finished run is not equal to the undisturbed one, or leaves a temporary."""
    return Tally(0, 0, int(not is_equal) + len(temporaries(root)))


def forget_run(root: Path) -> None:
    """Removes what the scripts have made."""
    for name in ("latents_cache", "results"):
        shutil.rmtree(root / name, ignore_errors=True)


def _quick(command: Callable[[Tell], object], is_long: bool) -> Callable[[Tell], object]:
    """In the short form lets a command not wait for the disk, which tells it nothing when it is only killed."""

    def run(tell: Tell) -> None:
        with nothing_synced() if not is_long else nullcontext():
            command(tell)

    return run


def _encode(root: Path, tell: Tell) -> None:
    """Preprocesses with a publish for every image, and merges of four shards into one."""
    row_bytes = 2 * 8 * 8 * 8
    with (
        telling(tell),
        mock.patch.object(latent_cache, "SHARD_SECONDS", 0.0),
        mock.patch.object(shard_file, "SHARD_BYTES", 4 * row_bytes),
    ):
        assert pipeline.preprocess(root, encode_batch_size=1) == 0


@pytest.mark.slow
def test_kills_at_random_while_encoding(world, account, is_long):
    command = _quick(functools.partial(_encode, world), is_long)
    seconds, told = _timed(command)
    cache = pipeline.open_cache(world / "latents_cache")
    reference = Reference(cache.space, pipeline.stored_moments(world / "latents_cache"), {})
    split = read_split(world / "latents_cache")
    assert len(told.published) == 15 and {len(shard.keys) for shard in cache._shards.values()} == {3, 4}

    def end() -> Tally:
        folder = world / "latents_cache"
        is_equal = pipeline.stored_moments(folder) == reference.moments and read_split(folder) == split
        tally = _count_of_an_end(world, is_equal=is_equal)
        forget_run(world)
        return tally

    tally = kill_at_random(
        command,
        end,
        functools.partial(reference.check, world),
        num_kills=60 if is_long else 20,
        seconds=seconds,
    )
    account.add("SIGKILL while encoding", "at random times", **vars(tally))


def _train(root: Path, every: int, tell: Tell) -> None:
    """Trains from no cache, with a publish for each batch that is encoded."""
    with telling(tell), mock.patch.object(latent_cache, "SHARD_SECONDS", 0.0):
        assert pipeline.train(root, save_and_sample_every=every, num_samples=0) == 0


def averages(results: Path) -> dict[str, str]:
    """Returns the digest of each file of averaged weights."""
    return {path.name: digest(checkpoint.load(path)[0]) for path in results.glob("ema-*.safetensors")}


def trained(root: Path) -> tuple:
    """Returns what matters of a finished run that began with no cache."""
    results = root / "results"
    rows = pipeline.stored_moments(root / "latents_cache")
    return pipeline.state_digests(results), averages(results), pipeline.losses(results), rows


@pytest.fixture(scope="module")
def reference(_pristine: Path, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """What training must be equal to at each step."""
    root = shutil.copytree(_pristine, tmp_path_factory.mktemp("reference") / "world")
    _, told = _timed(functools.partial(_train, root, 1))
    folder = root / "latents_cache"
    assert len(told.saved) == 2 * STEPS and len(told.published) == 15
    return Reference(pipeline.open_cache(folder).space, pipeline.stored_moments(folder), told.saved)


@pytest.mark.slow
def test_kills_at_random_while_training(world, reference, account, is_long):
    command = _quick(functools.partial(_train, world, 2), is_long)
    seconds, _ = _timed(command)
    expected = trained(world)

    def end() -> Tally:
        tally = _count_of_an_end(world, is_equal=trained(world) == expected)
        forget_run(world)
        return tally

    assert end() == Tally()
    tally = kill_at_random(
        command,
        end,
        functools.partial(reference.check, world),
        num_kills=60 if is_long else 20,
        seconds=seconds,
    )
    account.add("SIGKILL while training", "at random times", **vars(tally))


@pytest.mark.slow
def test_kills_while_a_run_saves(world, reference, account, is_long):
    """Whichever file of a save is the last, the run ends with the same files as if undisturbed."""
    _train(world, HALF, lambda line: None)
    expected, publish, tally = trained(world), disk_files.publish, Tally()

    def train_and_die(name: str, call: str, after: bool, tell: Tell) -> None:
        def deadly_publish(path: Path, data: list, **where: Any) -> None:
            is_last = (path.parent / run_folder.full_name(STEPS)).exists()
            is_due = path.name == name and (is_last or name != "loss.png")
            with fault_at(0 if is_due else None, killing(after=after), only=(call,)):
                publish(path, data, **where)

        with mock.patch.object(disk_files, "publish", deadly_publish):
            _train(world, HALF, tell)

    names = (run_folder.full_name(HALF), run_folder.ema_name(HALF), run_folder.full_name(STEPS), "loss.png")
    cases = [(name, "rename", name != "loss.png") for name in names]
    if is_long:
        cases = list(itertools.product(names, ("write", "fsync", "rename"), (False, True)))
    for name, call, after in cases:
        forget_run(world)
        code, lines = Child(functools.partial(train_and_die, name, call, after)).end()
        assert code == -9
        tally += reference.check(world, Told().add(lines))
        _train(world, HALF, lambda line: None)
        tally += _count_of_an_end(world, is_equal=trained(world) == expected)
    account.add("SIGKILL while training", "inside a save", **vars(tally))


@pytest.mark.slow
def test_kills_while_generating(trained, tmp_path, account):
    """The same command makes the rest, and takes away what the killed one had begun."""
    folder, publish, places = tmp_path / "synthetic", disk_files.publish, itertools.count()

    def run(tell: Tell) -> None:
        assert pipeline.generate(trained, output_folder=folder, classes=["ID_1"]) == 0

    def run_and_die(place: int, tell: Tell) -> None:
        def deadly_publish(path: Path, data: bytes, **where: Any) -> None:
            with fault_at(0 if next(places) == place else None, killing(after=False), only=("rename",)):
                publish(path, data, **where)

        with nothing_synced(), mock.patch.object(disk_files, "publish", deadly_publish):
            run(tell)

    def files() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    run(lambda line: None)
    expected, tally = files(), Tally()
    for place in range(len(expected) + 1):  # settings.json is written at the beginning and at the end
        shutil.rmtree(folder)
        assert Child(functools.partial(run_and_die, place)).end()[0] == -9
        made = [path.name for path in folder.rglob("[!.]*.*") if path.is_file() and path.name != "settings.json"]
        is_right = all(files()[name] == expected[name] for name in made)
        run(lambda line: None)
        tally += Tally(1, 0, int(not is_right) + (files() != expected))
    account.add("SIGKILL while generating", "inside each publish", **vars(tally))


def test_a_kill_before_the_manifest_and_a_training_run(world, account):
    """A cache that has no manifest, since the preprocess was killed before it, gets one from training."""

    def encode_and_die(before: str, tell: Tell) -> None:
        publish = disk_files.publish

        def deadly_publish(path: Path, data: bytes, **where: Any) -> None:
            if path.name == before:
                os.kill(os.getpid(), signal.SIGKILL)
            publish(path, data, **where)

        with nothing_synced(), mock.patch.object(disk_files, "publish", deadly_publish):
            pipeline.preprocess(world)

    tally = Tally()
    for name in (SPLIT_NAME, layout.MANIFEST_NAME):
        forget_run(world)
        assert Child(functools.partial(encode_and_die, name)).end()[0] == -9
        assert pipeline.train(world, train_num_steps=2, num_samples=0) == 0
        dataset = LatentDataset.open(world / "latents_cache")
        tally += verdict(lost=len(dataset) != 15, wrong=bool(dataset.missing()))
    account.add("SIGKILL while encoding", "before split and manifest", **vars(tally))


# --- the real commands, in the long form -------------------------------------------------------------------


class RealCommand:
    """A script in a process of its own, killed at times uniform over its length."""

    def __init__(self, words: list[str], seed: int) -> None:
        self.words, self.times = words, random.Random(seed)
        started = time.monotonic()
        assert self.run(None) == 0
        self.seconds = time.monotonic() - started

    def run(self, kill_after: float | None) -> int:
        process = subprocess.Popen(
            [sys.executable, *self.words],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            return process.wait(kill_after)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()

    def kill(self) -> bool:
        """Runs it and kills it; says whether it was through before."""
        code = self.run(self.times.uniform(0, self.seconds))
        assert code in (0, -9)
        return code == 0


def needs_long(is_long: bool) -> None:
    """Skips a test in the short form."""
    if not is_long:
        pytest.skip("only in the long form")


def test_the_real_encoding_is_killed(world, account, is_long):
    """What a process has published, the next one finds, and never less."""
    needs_long(is_long)
    tiny.make_images(world / "data", {"ID_3": 60}, seed=1)
    flags = {"image_size": pipeline.SIZE, "num_users": 4, "images_per_user": "all", "encode_batch_size": 1}
    code = "import sys, preprocess_latents as p; from gait_latents.latents import cache; "
    code += "cache.SHARD_SECONDS = 0; sys.exit(p.main(None))"
    command = RealCommand(["-c", code, *tiny.preprocess_flags(world, **flags)], seed=1)
    folder = world / "latents_cache"
    reference = Reference(pipeline.open_cache(folder).space, pipeline.stored_moments(folder), {})
    forget_run(world)
    tally, published = Tally(), set()
    for _ in range(8):
        is_through = command.kill()
        tally += reference.check_rows(folder, published)
        published = set(LatentCache(folder, reference.space, writable=False).keys())
        if is_through:
            tally.wrong += pipeline.stored_moments(folder) != reference.moments
            forget_run(world)
            published = set()
    account.add("SIGKILL while encoding", "the real command, at random times", **vars(tally))


def test_the_real_training_is_killed(world, reference, account, is_long):
    """The step of the newest state never falls, and the run ends as an undisturbed one."""
    needs_long(is_long)
    flags = pipeline.train_flags(world, save_and_sample_every=1, num_samples=0)
    command = RealCommand(["train_latent_cfg.py", *flags], seed=2)
    expected, tally, told = trained(world), Tally(), Told()
    forget_run(world)
    for _ in range(8):
        is_through = command.kill()
        tally += reference.check(world, told)
        names = [path.name for path in (world / "results").glob("*-*.safetensors")]
        told = Told().add([f"saved {name} -" for name in names])
        if is_through:
            tally += _count_of_an_end(world, is_equal=trained(world) == expected)
            forget_run(world)
            told = Told()
    account.add("SIGKILL while training", "the real command, at random times", **vars(tally))
