"""A run that is killed, stopped or robbed of its data goes on as the uninterrupted run, or says why it cannot.

Kills come at places drawn from a seed: a step, and a function before or after which the process dies in it.
"""

import hashlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pipeline
import pytest
import tiny
import torch
from os_faults import forked, overwrite
from pipeline import HALF, STEPS, assert_same_run, at_step, losses, preprocess, signal_self, state_digests, train
from torch import Tensor

import train_latent_cfg
from gait_latents.common import errors, files, hardware, pictures
from gait_latents.diffusion.ema import EMA
from gait_latents.diffusion.model import LatentDiffusion, LatentUnet
from gait_latents.images import reading
from gait_latents.images.split import read_split
from gait_latents.latents import cache as latent_cache
from gait_latents.latents import dataset
from gait_latents.latents.dataset import LatentDataset
from gait_latents.training import draws as draws_module
from gait_latents.training import plan as training_plan
from gait_latents.training import run_data, run_folder
from gait_latents.training.trainer import Trainer
from gait_latents.vae.batch_encoder import BatchEncoder

ROOT = Path(__file__).resolve().parents[2]
LONG_RUN = 24  # steps
FIRST_SCALE = 2.0**26  # of the loss; the first gradients overflow with it

# --- killed ------------------------------------------------------------------------------------------------

KINDS: dict[str, dict[str, object]] = {
    "accumulation, and an average due at each save": {
        "train_batch_size": 2,
        "gradient_accumulate_every": 2,
        "ema_update_every": 5,
    },
    "bfloat16, and an average due between saves": {"precision": "bfloat16", "ema_update_every": 7},
    "a lazy cache and a skipped image": {
        "latent_norm_images": 2,
        "encode_batch_size": 2,
        "images_per_user": "all",
        "skip_bad_images": "true",
    },
    "grids between": {"num_samples": 1, "save_and_sample_every": 6},
    "float16 and its loss scaler": {"precision": "float16", "time_shift": 0.25},  # and with a mask of columns
    "damage to the newest save": {},
}
ALWAYS_RUN = ("float16 and its loss scaler",)
ALWAYS_CALLED: dict[str, tuple[object, str]] = {
    "step": (Trainer, "train_step"),
    "batch": (LatentDataset, "batch"),
    "update": (Trainer, "_update"),
    "average": (EMA, "update"),
    "publish": (files, "publish"),
    "save": (Trainer, "save"),
}
PLACES = {**ALWAYS_CALLED, "grid": (LatentUnet, "predict_guided"), "encode": (BatchEncoder, "__call__")}


def act_at(
    set_attribute: Callable[[Any, str, object], None],
    place: str,
    step: int,
    action: Callable[[], object],
    *,
    after: bool = False,
) -> list[int]:
    """Acts once, before or after the first call of a place in step number `step` or later.

    Returns:
        A list that holds the number of the step once that has happened.
    """
    owner, name = PLACES[place]
    real, take_step, now, happened = getattr(owner, name), Trainer.train_step, [0], []

    def act(is_due: bool) -> None:
        if is_due and now[0] >= step and not happened:
            happened.append(now[0])
            action()

    def call(*args: Any, **facts: Any) -> Any:
        act(not after)
        result = real(*args, **facts)
        act(after)
        return result

    def train_step(trainer: Trainer) -> None:
        now[0] = trainer.finished_steps + 1
        (call if place == "step" else take_step)(trainer)

    set_attribute(owner, name, call)
    set_attribute(Trainer, "train_step", train_step)
    return happened


class Diary:
    """What the processes of one run tell, also those that are killed: a digest of each batch, and each save."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def keep(self) -> None:
        """Starts to write, in this process, which is a forked child."""
        file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        forward, save, step = LatentDiffusion.forward, Trainer.save, Trainer.train_step
        place = [0, 0]  # step, and part of its batch

        def noted_step(trainer: Trainer) -> None:
            place[:] = [trainer.finished_steps + 1, 0]
            step(trainer)

        def noted_forward(model: LatentDiffusion, *args: Any, **facts: Any) -> Tensor:
            digest = hashlib.sha256()
            named = (facts[name] for name in sorted(facts) if facts[name] is not None)  # no mask: no shift
            for tensor in (*args, *named):
                digest.update(tensor.numpy().tobytes())
            os.write(file, f"batch {place[0]}.{place[1]} {digest.hexdigest()}\n".encode())
            place[1] += 1
            return forward(model, *args, **facts)

        def noted_save(trainer: Trainer, *args: Any, **facts: Any) -> None:
            save(trainer, *args, **facts)
            os.write(file, f"save {trainer.finished_steps} done\n".encode())

        for owner, name, noted in (
            (LatentDiffusion, "forward", noted_forward),
            (Trainer, "save", noted_save),
            (Trainer, "train_step", noted_step),
        ):
            setattr(owner, name, noted)

    def lines(self, kind: str) -> Iterator[tuple[str, str]]:
        """Yields (number, text) of the lines of one kind."""
        for line in self.path.read_text().splitlines():
            word, number, text = line.split()
            if word == kind:
                yield number, text

    def batches(self) -> dict[str, set[str]]:
        """Returns the digests that each part of each step has had."""
        found = defaultdict(set)
        for number, digest in self.lines("batch"):
            found[number].add(digest)
        return found

    def saved(self) -> int:
        """Returns the number of the last step that was acknowledged as saved."""
        return max((int(number) for number, _ in self.lines("save")), default=0)


def set_up_child() -> None:
    """Shortens what takes longer than 24 steps: the average's warm-up, the scaler's growth, a shard's wait."""
    EMA.WARMUP_STEPS = 4  # type: ignore[assignment]
    latent_cache.SHARD_SECONDS = 0.02
    scaler = torch.amp.GradScaler
    torch.amp.GradScaler = lambda device, *, enabled: scaler(  # type: ignore[misc, assignment]
        device, init_scale=FIRST_SCALE, growth_interval=7, enabled=enabled
    )


@dataclass
class Run:
    """One run in a world, process by process."""

    world: Path
    name: str
    kind: str

    @property
    def results(self) -> Path:
        """Where it saves."""
        return self.world / self.name

    @property
    def diary(self) -> Diary:
        """What its processes tell."""
        return Diary(self.world / f"{self.name}.txt")

    def flags(self, **changes: object) -> list[str]:
        """Returns its command line."""
        often = {"train_num_steps": LONG_RUN, "save_and_sample_every": 5, "log_every": 3, "num_samples": 0}
        cache = self.world / (f"cache of {self.name}" if "lazy" in self.kind else "latents_cache")
        where = {"results_folder": self.results, "latents_cache_folder": cache}
        return pipeline.train_flags(self.world, **{**often, **where, **KINDS[self.kind], **changes})

    def go(self, place: str = "", step: int = 0, *, after: bool = False) -> int:
        """Lets one process run to its end, or to its death at a place; returns its exit code."""

        def work() -> None:
            set_up_child()
            self.diary.keep()
            if place:
                act_at(setattr, place, step, signal_self(signal.SIGKILL), after=after)
            os._exit(train_latent_cfg.main(self.flags()))

        return forked(work)

    def step(self) -> int:
        """Returns the step of its newest good state."""
        state = run_folder.newest_state(self.results) if run_folder.has_state(self.results) else None
        return 0 if state is None else state.step

    def next_batch(self) -> tuple[Tensor, Tensor]:
        """Returns the latents and labels that another process would train on next."""
        plan = training_plan.make_plan(self.flags(train_num_steps=LONG_RUN + 1))
        trainer = Trainer(plan.settings, run_data.open_data(plan, torch.device("cpu")), torch.device("cpu"))
        trainer.start(plan)
        facts = {"size": len(trainer.dataset), "latent_shape": (4, 8, 8), "timesteps": 1000, "cond_drop_prob": 0.5}
        draws = draws_module.draw_step(42, trainer.finished_steps, batch=4, **facts)
        return trainer.dataset.batch(draws.positions, draws.posterior_noise)


def differences(run: Run, other: Run) -> list[str]:
    """Returns what two runs do not have in common, of all that must be equal."""
    found = []
    mine, theirs = state_digests(run.results), state_digests(other.results)
    found += [name for name in {*mine, *theirs} if mine.get(name) != theirs.get(name)]
    states = [run_folder.newest_state(each.results) for each in (run, other)]
    metas = [state.meta.to_json() if state is not None else {} for state in states]
    facts = ("training", "latent_norm", "data_digest", "moments_digest", "classes", "step")
    found += [name for name in facts if metas[0][name] != metas[1][name]]
    if losses(run.results) != losses(other.results):
        found.append("losses")
    if not all(torch.equal(a, b) for a, b in zip(run.next_batch(), other.next_batch(), strict=True)):
        found.append("next batch")
    seen, expected = run.diary.batches(), other.diary.batches()
    return found + [f"batch {number}" for number in {*seen, *expected} if seen[number] != expected[number]]


def kill_again_and_again(run: Run, generator: random.Random, *, at_most: int) -> tuple[int, int]:
    """Kills a run on its way; returns how often, and after how many of these an acknowledged save was gone."""
    kills = lost = 0
    while kills < at_most and run.step() < LONG_RUN:
        step = min(run.step() + generator.randint(1, 9), LONG_RUN)
        place, after = generator.choice(list(ALWAYS_CALLED)), generator.random() < 0.5
        assert run.go(place, step, after=after) == -signal.SIGKILL
        kills += 1
        lost += run.step() < run.diary.saved()
        if "damage" in run.kind:
            spoil_newest(run.results)
            run.diary.path.write_text("".join(f"batch {place} {text}\n" for place, text in run.diary.lines("batch")))
    return kills, lost


def spoil_newest(results: Path) -> None:
    """Flips a bit in the newest state, if there is one before it."""
    states = sorted(results.glob("state-*"))
    if len(states) > 1:
        data = bytearray(states[-1].read_bytes())
        data[len(data) // 2] ^= 4
        overwrite(states[-1], data)


def assert_exercised(kind: str, results: Path) -> None:
    """Asserts that a run has met what its kind is about."""
    state = run_folder.newest_state(results)
    assert state is not None and state.meta.training is not None
    averages = {name: tensor for name, tensor in state.tensors.items() if name.startswith("ema.")}
    lags = any(not torch.equal(tensor, state.tensors[f"model.{name[4:]}"]) for name, tensor in averages.items())
    assert lags or "average" not in kind
    scaler = state.meta.training["scaler"]
    assert bool(scaler) == ("float16 " in kind)
    assert not scaler or (0 < scaler["scale"] != FIRST_SCALE and scaler["_growth_tracker"])


@pytest.mark.parametrize(
    "kind", [kind if kind in ALWAYS_RUN else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]
)
def test_a_run_killed_anywhere_again_and_again_is_the_uninterrupted_one(cached, account, is_long, kind):
    if "skipped" in kind:
        (cached / "data" / "ID_2" / "walk_0.jpg").write_bytes(b"no image")
    whole = Run(cached, "whole", kind)
    assert whole.go() == 0
    assert_exercised(kind, whole.results)
    for number in range(3 if is_long else 1):
        run = Run(cached, f"run {number}", kind)
        generator = random.Random(f"{kind} {number}")
        kills, lost = kill_again_and_again(run, generator, at_most=5 if is_long else 3)
        assert run.go() == 0
        assert len(run.diary.batches()) == LONG_RUN * (2 if "accumulation" in kind else 1)
        wrong = differences(run, whole)
        account.add(f"training killed: {kind}", "SIGKILL at seeded places", cases=kills, lost=lost, wrong=len(wrong))


@pytest.mark.slow
def test_the_comparison_of_runs_sees_each_difference(cached):
    run, other = (
        Run(cached, "results", "damage to the newest save"),
        Run(cached, "other", "float16 and its loss scaler"),
    )
    assert run.go() == other.go() == 0
    found = differences(run, other)
    assert {"losses", "training"} <= set(found)
    assert all(any(name.startswith(f"{part}.") for name in found) for part in ("model", "ema", "optimizer"))
    other.diary.path.write_text(run.diary.path.read_text().replace("batch 7.0 ", "batch 7.0 x"))
    assert "batch 7.0" in differences(run, other)
    assert differences(run, run) == []


# --- stopped -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "place"),
    [
        (signal.SIGTERM, "publish"),
        (signal.SIGINT, "update"),
        (signal.SIGHUP, "step"),
        (signal.SIGUSR1, "encode"),
        *(pytest.param(signal.SIGTERM, place, marks=pytest.mark.slow) for place in ("step", "grid", "encode")),
    ],
)
def test_a_signal_anywhere_ends_a_run_within_one_step(
    world, trained, monkeypatch, capsys, encoder, account, number, place
):
    with monkeypatch.context() as patch:
        happened = act_at(patch.setattr, place, 2 if place == "encode" else 3, signal_self(number))
        assert train(world, save_and_sample_every=3) == 128 + number
    said = capsys.readouterr().out
    if place == "encode":  # a step that waits for latents is not begun
        happened[0] -= 1
    end = f"stopped by {errors.name_signal(number)} at step {happened[0]}"
    assert f"{end}; saved, and the same command goes on from there" in said
    assert ("no sample grid, since a signal came" in said) == (happened == [3])
    lost = int(state_digests(world / "results")["step"]) != happened[0]
    assert train(world, save_and_sample_every=3) == 0
    assert f"going on from step {happened[0]} of " in capsys.readouterr().out
    assert_same_run(world, trained)
    again = encoder.num_images - 15  # what the first part encoded is in the cache
    account.add("training stopped", f"{signal.Signals(number).name}", cases=1, lost=lost + again)


def test_a_signal_cuts_a_sample_grid_short_wherever_it_comes(cached, trained, monkeypatch, account):
    num_cases = late = 0
    for step, place in ((3, (LatentUnet, "predict_guided")), (5, (pictures, "to_uint8"))):
        with monkeypatch.context() as patch:
            calls = [0]
            real = getattr(*place)

            def counted(*args: Any, calls: list[int] = calls, real: Callable = real, **facts: Any) -> Any:
                calls[0] += 1
                if calls[0] == 5:  # the rehearsal takes one
                    os.kill(os.getpid(), signal.SIGTERM)
                return real(*args, **facts)

            patch.setattr(*place, counted)
            assert train(cached, save_and_sample_every=step, num_samples=8, sampling_timesteps=10) == 143
        assert int(state_digests(cached / "results")["step"]) == step
        assert not list((cached / "results").glob("grid-*"))
        num_cases, late = num_cases + 1, late + calls[0] - 5
    assert train(cached, sampling_timesteps=10) == 0
    assert_same_run(cached, trained)
    account.add("training stopped in a grid", "SIGTERM", cases=num_cases, lost=late)


def test_a_signal_in_the_last_step_leaves_a_finished_run(cached, trained, monkeypatch, capsys, account):
    with monkeypatch.context() as patch:
        at_step(patch, STEPS, signal_self(signal.SIGTERM))
        assert train(cached) == 0
    said = capsys.readouterr().out
    assert f"done: {STEPS} steps" in said and "stopped" not in said and "step 8: no sample grid" in said
    assert_same_run(cached, trained)
    account.add("training stopped", "SIGTERM in the last step", cases=1)


def test_the_time_budget_ends_a_run_cleanly_and_the_next_session_goes_on(cached, trained, capsys, account):
    for step in (1, 2):
        assert train(cached, max_hours=1e-6) == 0
        assert f"stopped after --max_hours 1e-06 at step {step}; saved" in capsys.readouterr().out
    assert train(cached, max_hours="none") == 0
    assert_same_run(cached, trained)
    account.add("training stopped", "--max_hours", cases=2)


# --- two at once -------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, HALF + 1])
def test_of_two_trainings_in_one_folder_one_ends_by_name_and_the_other_goes_on(
    cached, trained, monkeypatch, capsys, account, step
):
    begun = []

    def another() -> None:
        if begun:  # this is the other one
            return
        begun.append(True)
        assert forked(lambda: os._exit(train(cached, train_num_steps=step + 1, num_samples=0))) == 0

    with monkeypatch.context() as patch:
        at_step(patch, step, another)
        capsys.readouterr()
        assert train(cached) == 1
    name = run_folder.full_name(step + 1)
    why = f"{name} there is not of" if step == 1 else "it has begun to write there after"
    assert f"another training saves in {cached}/results too: {why} this process" in pipeline.one_error(capsys)
    lost = int(state_digests(cached / "results")["step"]) != step + 1
    assert train(cached) == 0
    assert state_digests(cached / "results") == state_digests(trained / "results")
    account.add("two trainings in one folder", "a second one saves between", cases=1, lost=lost)


# --- another folder, a damaged save ------------------------------------------------------------------------


def test_a_read_only_folder_seeds_another_run_and_stays_as_it_is(cached, trained, account):
    last = cached / "last"
    assert train(cached, results_folder=last, train_num_steps=HALF, num_samples=0) == 0
    before = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in last.iterdir()}
    flags = {"resume_from": last, "save_and_sample_every": 100, "num_samples": 0}

    def child() -> None:
        try:
            pipeline.mount_read_only(last)
        except OSError:
            os._exit(77)
        codes = [train(cached, **flags, train_num_steps=HALF + 1), train(cached, **flags)]  # then from its own folder
        os._exit(max(codes))

    code = forked(child)
    if code == 77:
        pytest.skip("this system lets nobody mount a folder read-only")
    assert code == 0
    changed = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in last.iterdir()} != before
    assert_same_run(cached, trained)
    account.add("--resume_from a read-only folder", "mount", cases=1, lost=changed)


@pytest.mark.parametrize("kind", ["flipped", "cut", "empty"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before_and_says_so(cached, trained, capsys, account, kind):
    assert train(cached, train_num_steps=6, save_and_sample_every=3, num_samples=0) == 0
    newest = cached / "results" / run_folder.full_name(6)
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 4
    newest.write_bytes({"flipped": data, "cut": data[:-100], "empty": b""}[kind])
    capsys.readouterr()
    assert train(cached, save_and_sample_every=100) == 0
    captured = capsys.readouterr()
    assert re.search(rf"warning: \S*{newest.name}: .*; taking the one before", captured.err)
    assert "going on from step 3 of" in captured.out
    assert_same_run(cached, trained)
    account.add("newest checkpoint damaged", "a flipped bit, cut, empty", cases=1)


def test_a_stop_at_the_step_of_a_damaged_checkpoint_replaces_it(cached, monkeypatch, account):
    assert train(cached, train_num_steps=6, save_and_sample_every=3, num_samples=0) == 0
    newest = cached / "results" / run_folder.full_name(6)
    newest.write_bytes(newest.read_bytes()[:-1])
    with monkeypatch.context() as patch:
        at_step(patch, 6, signal_self(signal.SIGTERM))
        assert train(cached, save_and_sample_every=100) == 143
    state = run_folder.newest_state(cached / "results")
    assert state is not None and state.step == 6 and not state.warnings
    account.add("newest checkpoint damaged", "and a stop at its step", cases=1)


# --- the data are no longer what they were -----------------------------------------------------------------


def shard(root: Path) -> Path:
    (path,) = (root / "latents_cache").glob("*/*.safetensors")
    return path


def flip_in_rows(root: Path, *, count: int) -> None:
    """Flips a bit in each of the first stored rows."""
    data = bytearray(shard(root).read_bytes())
    for row in list(pipeline.stored_moments(root / "latents_cache").values())[:count]:
        data[data.index(row) + 100] ^= 1
    overwrite(shard(root), data)


CHANGES: dict[str, tuple[Callable[[Path], object], int]] = {
    "its only shard is lost": (lambda root: shard(root).unlink(), 15),
    "the whole cache is lost": (lambda root: shutil.rmtree(root / "latents_cache"), 15),
    "a row is damaged": (lambda root: flip_in_rows(root, count=1), 1),
    "rows of more images are added": (lambda root: preprocess(root, images_per_user="all"), 9),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", CHANGES)
def test_a_run_goes_on_with_the_same_latents_when_its_cache_was_changed(
    cached, trained, capsys, encoder, account, what
):
    change, num_encoded = CHANGES[what]
    assert train(cached, train_num_steps=HALF) == 0
    encoder.forget()
    change(cached)
    assert train(cached) == 0
    assert encoder.num_images == num_encoded
    assert "encoded again" not in capsys.readouterr().out  # the very same bits
    assert_same_run(cached, trained)
    account.add("cache changed between two parts of a run", "rows lost, damaged, added", cases=1)


def test_a_row_that_is_damaged_under_a_running_training_is_encoded_again(
    cached, trained, monkeypatch, encoder, account
):
    without_memory = SimpleNamespace(**{**vars(hardware), "free_memory_bytes": lambda device: 0})
    monkeypatch.setattr(dataset, "hardware", without_memory)  # so that rows stay in the shards
    at_step(monkeypatch, HALF, lambda: flip_in_rows(cached, count=15))
    assert train(cached, num_samples=0) == 0
    assert 0 < encoder.num_images <= 15
    ours, theirs = state_digests(cached / "results"), state_digests(trained / "results")
    wrong = sum(ours[name] != theirs[name] for name in theirs)
    account.add("cache damaged under a running training", "a flipped bit in each row", cases=15, wrong=wrong)


def test_latents_of_another_precision_are_told_in_one_line(cached, capsys, account):
    assert train(cached, train_num_steps=2, num_samples=0) == 0
    shutil.rmtree(cached / "latents_cache")
    preprocess(cached, encode_precision="bfloat16")
    capsys.readouterr()
    assert train(cached, train_num_steps=3, num_samples=0) == 0
    silent = capsys.readouterr().out.count("the same images were encoded again since the last save") != 1
    account.add("cache changed between two parts of a run", "encoded in another precision", cases=1, wrong=silent)


def assert_refused(root: Path, capsys: pytest.CaptureFixture[str], code: int, *parts: str) -> None:
    """Asserts that the run in `root` does not go on, says why in one line, and is left as it is."""
    before = {path: path.read_bytes() for path in (root / "results").iterdir()}
    capsys.readouterr()
    assert train(root, num_samples=0, latent_norm_images=2, encode_batch_size=2) == code
    error = pipeline.one_error(capsys)
    assert all(part in error for part in parts)
    after = {path: path.read_bytes() for path in (root / "results").iterdir()}
    states = [path for path in before if path.suffix == ".safetensors"]
    assert after == before if code == 2 else all(after[path] == before[path] for path in states)


@pytest.mark.parametrize("change", ["content", "class", "vae", "lost"])
def test_other_data_stop_a_resume_and_leave_the_run_alone(world, capsys, account, change):
    assert train(world, train_num_steps=2, num_samples=0, latent_norm_images=2, encode_batch_size=2) == 0
    split = read_split(world / "results")
    assert split is not None
    first, other = split.train[0], split.train[-1]
    path, other_path = (reading.image_path(world / "data", entry) for entry in (first, other))
    expected = [f"{first.class_name}/{first.name}", "--results_folder"]
    if change == "content":
        tiny.make_image(600).save(path)
    elif change == "class":  # the two swap places, and with them their labels
        path.rename(world / "kept.jpg")
        other_path.rename(path)
        (world / "kept.jpg").rename(other_path)
    elif change == "vae":
        pipeline.tiny_vae.save_tiny_vae(world / "vae.pt", seed=1)
        expected = ["vae.pt makes other latents than the run in", "vae.weights: "]
    else:
        shutil.rmtree(world / "latents_cache")
        (world / "vae.pt").unlink()
        expected = ["15 of 15 images are not in", "vae.pt, which is needed to encode them, is not there"]
    assert_refused(world, capsys, 2, *expected)
    account.add("other data at a resume", "images, labels, the VAE, a lost cache without it", cases=1)


def test_an_image_that_vanishes_from_a_lazy_run_ends_it_in_one_line(world, capsys, account):
    assert train(world, train_num_steps=1, num_samples=0, latent_norm_images=2, encode_batch_size=2) == 0
    split = read_split(world / "results")
    assert split is not None
    held = set(pipeline.open_cache(world / "latents_cache").keys())
    gone = next(entry for entry in split.train if entry.key not in held)
    reading.image_path(world / "data", gone).unlink()
    assert_refused(world, capsys, 1, f"{gone.class_name}/{gone.name}: cannot be read: No such file")
    account.add("other data at a resume", "an image that is gone", cases=1)


# --- real processes ----------------------------------------------------------------------------------------


def test_real_processes_killed_and_stopped_at_any_time_are_one_run(cached, is_long, account):
    if not is_long:
        pytest.skip("starts real processes; --all does")
    num_steps, generator, ends = 700, random.Random(5), []
    command = [sys.executable, "train_latent_cfg.py"]
    command += pipeline.train_flags(cached, train_num_steps=num_steps, save_and_sample_every=25, num_samples=0)
    while len(ends) < 8:
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        time.sleep(generator.uniform(0.5, 9.0))
        process.send_signal(generator.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT]))
        out, _ = process.communicate(timeout=120)
        ends.append(process.returncode)
        assert "Traceback" not in out and process.returncode in (0, -9, -15, -2, 130, 143), out
        if process.returncode == 0:
            break
    assert subprocess.run(command, cwd=ROOT, capture_output=True).returncode == 0
    assert forked(lambda: os._exit(train(cached, results_folder=cached / "whole", train_num_steps=num_steps))) == 0
    mine, theirs = state_digests(cached / "results"), state_digests(cached / "whole")
    wrong = sum(mine[name] != theirs[name] for name in theirs) + (
        losses(cached / "results") != losses(cached / "whole")
    )
    account.add("training killed and stopped", "real processes at random times", cases=len(ends), wrong=wrong)
