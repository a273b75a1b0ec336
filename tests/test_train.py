"""train_latent_cfg.py from end to end: the same training however it is fed, stopped, killed or taken up again."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pipeline
import pytest
import tiny
import torch
from os_faults import fault_at, forked, killing, raising
from PIL import Image
from pipeline import CLASSES, HALF, STEPS, losses, one_error, preprocess, state_digests, stored_moments, train

import checkpoint
import config
import durable
import hardware
import images
import latent_dataset
import pictures
import run_folder
import script
import train_latent_cfg
from config import TrainSettings
from draws import StepDraws
from train_latent_cfg import Clock, Trainer, pass_size

ROOT = Path(__file__).resolve().parent.parent
NO_IMAGE_FLAGS: dict[str, object] = {"vae_path": None, "data_path": None, "image_size": None, "images_per_user": None}

needs_compiler = pytest.mark.skipif(
    hardware.why_not_compile(torch.device("cpu")) is not None, reason="needs a C++ compiler"
)


@pytest.fixture
def cached(trained: Path, world: Path) -> Path:
    """A world whose images are all encoded already."""
    shutil.copytree(trained / "latents_cache", world / "latents_cache")
    return world


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, action: Callable[[], object]) -> None:
    """Does something right before the step of this number, counted from 1, is taken."""
    take_step = Trainer.train_step

    def train_step(trainer: Trainer) -> None:
        if trainer.finished_steps == step - 1:
            action()
        take_step(trainer)

    monkeypatch.setattr(Trainer, "train_step", train_step)


def signal_self(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def assert_same_run(world: Path, trained: Path, results: str = "results") -> None:
    """Asserts that a run ended in the very bits of the uninterrupted one, and tells of the same losses."""
    assert state_digests(world / results) == state_digests(trained / "results")
    assert losses(world / results) == losses(trained / "results")


# --- lazy and pre-encoded are one --------------------------------------------------------------------------


def test_lazy_training_is_pre_encoded_training(world, trained, encoder, capsys):
    assert train(world, num_samples=0) == 0
    assert stored_moments(world / "latents_cache") == stored_moments(trained / "latents_cache")
    assert_same_run(world, trained)
    assert "15 images asked, 0 cached, 15 to encode when first needed" in capsys.readouterr().out
    assert encoder.num_images == 15
    assert encoder.batches == [4, 2, 4, 4, 1]  # the six of the normalisation, then the next full batch each time
    assert encoder.built == ["encoder"]


def test_grids_and_their_decoder_change_nothing(world, trained, encoder):
    assert train(world, save_and_sample_every=3, num_samples=1) == 0
    assert_same_run(world, trained)
    assert encoder.num_images == 15
    assert encoder.built.count("encoder") == 1


def test_a_half_filled_cache_is_filled_up(world, trained, encoder):
    preprocess(world, images_per_user=2)
    encoder.forget()
    assert train(world, num_samples=0) == 0
    assert encoder.num_images == 9
    assert_same_run(world, trained)


def test_with_a_complete_cache_neither_vae_nor_images_need_exist(cached, trained, encoder, capsys):
    """The bare command takes their paths from the manifest; where one is typed, it may lack when a run goes on."""
    preprocess(cached)  # so that the manifest names what is in this world
    shutil.rmtree(cached / "data")
    (cached / "vae.pt").unlink()
    encoder.forget()
    assert train(cached, train_num_steps=HALF, **NO_IMAGE_FLAGS) == 0
    captured = capsys.readouterr()
    assert "15 images asked, 15 cached, 0 to encode" in captured.out
    assert captured.err.count("sample grids are scored, but not drawn") == 1
    assert "of 6 samples are nearest to the mean of their own class" in captured.out
    assert train(cached) == 0
    assert_same_run(cached, trained)
    assert "encoder" not in encoder.built and encoder.batches == []
    assert not list((cached / "results").glob("grid-*"))


def test_the_manifest_supplies_what_is_not_given(trained, tmp_path, capsys):
    """The bare command: vae_path, data_path, image_size and images_per_user come from the cache."""
    flags = {"latents_cache_folder": trained / "latents_cache", "results_folder": tmp_path / "results"}
    assert train(tmp_path, **flags, **NO_IMAGE_FLAGS) == 0
    assert_same_run(tmp_path, trained)
    said = " ".join(capsys.readouterr().out.split())
    assert re.search(r"manifest of \S+latents_cache: vae_path \S+vae.pt, data_path \S+data, image_size 16", said)


def test_the_settings_of_a_run_are_a_config_file(trained, tmp_path):
    config_file = trained / "results" / "settings.yaml"
    words = ["--config", str(config_file), "--results_folder", str(tmp_path / "results")]
    assert train_latent_cfg.main(words) == 0
    assert_same_run(tmp_path, trained)


def test_a_read_only_cache_serves_its_hits_and_stays_as_it_is(world, trained, encoder, capfd):
    preprocess(world, images_per_user=3)
    folder = world / "latents_cache"
    before = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in folder.rglob("*")}

    def child() -> None:
        try:
            pipeline.mount_read_only(folder)
        except OSError:
            os._exit(77)
        encoder.forget()
        code = train(world, num_samples=0)
        os._exit(code if encoder.num_images == 6 else 78)

    code = forked(child)
    if code == 77:
        pytest.skip("this system lets nobody mount a folder read-only")
    assert code == 0
    said = capfd.readouterr().out
    assert f"{folder} is read-only: what is encoded in this run stays in memory" in said
    assert {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in folder.rglob("*")} == before
    assert_same_run(world, trained)


def test_a_cache_on_a_full_disk_does_not_stop_a_run(world, trained, monkeypatch, capsys):
    publish = durable.publish

    def without_room(path, data) -> None:
        if str(path).endswith(".safetensors") and "latents_cache" in str(path):
            with fault_at(-1, raising(errno.ENOSPC), only=("write",)):
                publish(path, data)
        publish(path, data)

    monkeypatch.setattr(durable, "publish", without_room)
    assert train(world, num_samples=0) == 0
    assert capsys.readouterr().err.count("the cache cannot be written to (No space left on device)") == 1
    assert_same_run(world, trained)


# --- the batch ---------------------------------------------------------------------------------------------


def test_accumulation_changes_a_step_by_rounding_alone(cached, trained):
    assert train(cached, train_batch_size=2, gradient_accumulate_every=2) == 0
    ours, theirs = losses(cached / "results"), losses(trained / "results")
    assert ours.keys() == theirs.keys() and list(ours.values()) == pytest.approx(list(theirs.values()), rel=1e-5)
    mine, other = (run_folder.newest_state(root / "results") for root in (cached, trained))
    assert mine is not None and other is not None
    for name, tensor in other.tensors.items():
        if name.startswith("model."):
            # Where a gradient is nearly nothing, Adam's first steps turn its rounding into a share of a step.
            assert torch.allclose(mine.tensors[name], tensor, atol=2e-4), name


def test_a_run_may_go_on_with_the_same_batch_in_other_parts(cached, trained):
    assert train(cached, train_num_steps=HALF) == 0
    assert train(cached, train_batch_size=2, gradient_accumulate_every=2) == 0
    expected = list(losses(trained / "results").values())
    assert list(losses(cached / "results").values()) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "size"),
    [({}, 16), ({"train_batch_size": 32}, 64), ({"train_batch_size": 33}, 33), ({"join_passes": False}, 8)],
)
def test_passes_are_joined_where_they_are_small(changes, size):
    assert pass_size(TrainSettings(**changes), (4, 32, 32)) == size
    assert pass_size(TrainSettings(**changes), (4, 256, 256)) == changes.get("train_batch_size", 8)


def test_a_joined_pass_is_the_larger_batch_bit_for_bit(cached, trained):
    assert train(cached, train_batch_size=2, gradient_accumulate_every=2, join_passes="true") == 0
    assert_same_run(cached, trained)


@needs_compiler
def test_a_compiled_network_trains_alike_and_a_run_goes_on_as_it_began(cached, trained, monkeypatch, capsys):
    monkeypatch.setattr(train_latent_cfg, "_COMPILED_STEPS", STEPS)  # so that a longer run would choose otherwise
    assert train(cached, compile="auto", results_folder=cached / "whole") == 0
    assert "compiled, which takes a minute" in capsys.readouterr().out
    expected = list(losses(trained / "results").values())
    assert list(losses(cached / "whole").values()) == pytest.approx(expected, rel=1e-5)
    with monkeypatch.context() as patch:
        at_step(patch, HALF, signal_self(signal.SIGTERM))
        assert train(cached, compile="auto") == 143
    monkeypatch.setattr(train_latent_cfg, "_COMPILED_STEPS", STEPS + 1)
    assert train(cached, compile="auto") == 0
    assert state_digests(cached / "results") == state_digests(cached / "whole")


def test_without_a_compiler_auto_does_without_and_true_is_refused(cached, trained, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(train_latent_cfg, "_COMPILED_STEPS", 1)
    assert train(cached, compile="auto") == 0
    assert "not compiled (there is no C++ compiler)" in capsys.readouterr().out
    assert_same_run(cached, trained)
    assert train(cached, compile="true", results_folder=cached / "other") == 2
    assert "--compile true cannot be done: there is no C++ compiler" in one_error(capsys)


def test_a_network_that_cannot_be_compiled_trains_without(cached, trained, monkeypatch, capsys):
    class BackendCompilerFailed(RuntimeError):
        pass

    def fail(*_: object, **__: object) -> None:
        raise BackendCompilerFailed("no such header")

    BackendCompilerFailed.__module__ = "torch._dynamo.exc"
    monkeypatch.setattr(torch, "compile", lambda *_, **__: fail)
    monkeypatch.setattr(train_latent_cfg, "_COMPILED_STEPS", 1)
    assert train(cached, compile="auto") == 0
    assert capsys.readouterr().err.count("cannot be compiled, and trains without (no such header)") == 1
    assert_same_run(cached, trained)
    assert train(cached, compile="true", results_folder=cached / "other") == 1
    assert "give --compile false" in one_error(capsys)


# --- stopped and taken up again ----------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_half_a_run_a_signal_and_the_other_half_are_one_run(world, trained, monkeypatch, capsys, encoder, number):
    with monkeypatch.context() as patch:
        at_step(patch, HALF, signal_self(number))
        assert train(world, save_and_sample_every=3) == 128 + number
    assert (
        f"stopped by signal at step {HALF}; saved, and the same command goes on from there" in capsys.readouterr().out
    )
    assert train(world, save_and_sample_every=3) == 0
    assert f"going on from step {HALF} of " in capsys.readouterr().out
    assert_same_run(world, trained)
    assert encoder.num_images == 15  # nothing twice: what the first half encoded is in the cache


def test_sigterm_stops_a_real_process_cleanly(cached):
    process = subprocess.Popen(
        [sys.executable, "train_latent_cfg.py", *pipeline.train_flags(cached, train_num_steps=10_000)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics, deadline = cached / "results" / "metrics.jsonl", time.monotonic() + 120
    while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 143 and "Traceback" not in err
    assert "stopped by signal" in out
    steps = int(state_digests(cached / "results")["step"])
    assert 1 <= steps < 10_000
    assert train(cached, train_num_steps=steps + 2) == 0
    assert train(cached, results_folder=cached / "whole", train_num_steps=steps + 2) == 0
    assert_same_run(cached, cached, "whole")
    assert state_digests(cached / "results") == state_digests(cached / "whole")


def test_a_killed_run_goes_on_from_its_last_save(world, trained, monkeypatch, encoder):
    with monkeypatch.context() as patch:
        at_step(patch, HALF + 2, signal_self(signal.SIGKILL))
        assert forked(lambda: train(world)) == -signal.SIGKILL
    assert train(world) == 0
    assert_same_run(world, trained)


@pytest.mark.parametrize("after", [False, True])
def test_a_run_killed_while_it_saves_loses_no_save_before(cached, trained, monkeypatch, after):
    save = checkpoint.save

    def deadly_save(path, tensors, meta) -> None:
        if Path(path).name == checkpoint.full_name(6):
            with fault_at(0, killing(after=after), only=("rename",)):
                save(path, tensors, meta)
        save(path, tensors, meta)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", deadly_save)
        assert forked(lambda: train(cached, save_and_sample_every=3)) == -signal.SIGKILL
    state = run_folder.newest_state(cached / "results")
    assert state is not None and state.step == (6 if after else 3) and not state.warnings
    assert train(cached, save_and_sample_every=3) == 0
    assert_same_run(cached, trained)
    assert not list((cached / "results").glob(f"{durable.TEMPORARY_PREFIX}*"))


def test_a_run_with_a_skipped_image_goes_on_exactly(world, monkeypatch, capsys):
    (world / "data" / "ID_2" / "walk_0.jpg").write_bytes(b"no image")
    flags = {"images_per_user": "all", "skip_bad_images": "true", "num_samples": 0}
    assert train(world, results_folder=world / "whole", latents_cache_folder=world / "other_cache", **flags) == 0
    with monkeypatch.context() as patch:
        at_step(patch, HALF, signal_self(signal.SIGTERM))
        assert train(world, **flags) == 143
    assert train(world, **flags) == 0
    assert "23 images asked" in capsys.readouterr().out
    assert_same_run(world, world, "whole")
    assert state_digests(world / "results") == state_digests(world / "whole")


def test_the_time_budget_ends_a_run_cleanly_and_the_next_session_goes_on(cached, trained, capsys):
    assert train(cached, max_hours=1e-6) == 0
    assert "stopped after --max_hours 1e-06 at step 1; saved" in capsys.readouterr().out
    assert train(cached, max_hours=1e-6) == 0
    assert "at step 2; saved" in capsys.readouterr().out
    assert train(cached, max_hours="none") == 0
    assert_same_run(cached, trained)


def test_the_time_budget_counts_from_the_start_of_the_process_and_leaves_room_for_a_save(monkeypatch):
    clock = Clock(1.0, SimpleNamespace(finished_steps=0))  # type: ignore[arg-type]

    def is_up_after(seconds: float) -> bool:
        monkeypatch.setattr(script, "PROCESS_START", time.monotonic() - seconds)
        return clock.is_up()

    assert not is_up_after(3500) and is_up_after(3599)
    clock.note_save(60)
    clock.note_save(2)
    assert is_up_after(3500) and not is_up_after(3400)
    assert not Clock(None, SimpleNamespace(finished_steps=0)).is_up()  # type: ignore[arg-type]


def test_a_longer_run_goes_on_from_a_finished_one(cached, trained, capsys):
    assert train(cached, train_num_steps=HALF) == 0
    files = {path: path.stat().st_mtime_ns for path in (cached / "results").iterdir()}
    capsys.readouterr()
    assert train(cached, train_num_steps=HALF) == 0
    assert f"is finished ({HALF} steps); a larger --train_num_steps goes further" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in (cached / "results").iterdir()} == files
    assert train(cached) == 0
    assert_same_run(cached, trained)


# --- another folder, damage, moved and re-encoded data -----------------------------------------------------


def test_another_folder_seeds_an_empty_results_folder_and_stays_as_it_is(cached, trained):
    assert train(cached, results_folder=cached / "last", train_num_steps=HALF) == 0
    before = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in (cached / "last").iterdir()}
    flags = {"resume_from": cached / "last", "save_and_sample_every": 100}
    assert train(cached, **flags, train_num_steps=HALF + 1) == 0
    assert train(cached, **flags) == 0  # the same command: now from its own folder
    assert_same_run(cached, trained)
    assert {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in (cached / "last").iterdir()} == before


def test_one_checkpoint_file_alone_is_enough_to_go_on(cached, trained):
    assert train(cached, results_folder=cached / "last", train_num_steps=HALF) == 0
    name = checkpoint.full_name(HALF)
    (cached / "upload").mkdir()
    shutil.move(cached / "last" / name, cached / "upload" / name)
    assert train(cached, resume_from=cached / "upload" / name) == 0
    assert state_digests(cached / "results") == state_digests(trained / "results")
    assert list(losses(cached / "results")) == list(range(HALF + 1, STEPS + 1))


@pytest.mark.parametrize("kind", ["flipped", "cut", "empty"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before_and_says_so(cached, trained, capsys, kind):
    assert train(cached, train_num_steps=6, save_and_sample_every=3, num_samples=0) == 0
    newest = cached / "results" / checkpoint.full_name(6)
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 4
    newest.write_bytes({"flipped": data, "cut": data[:-100], "empty": b""}[kind])
    capsys.readouterr()
    assert train(cached, save_and_sample_every=100) == 0
    captured = capsys.readouterr()
    assert re.search(rf"warning: \S*{newest.name}: .*; taking the one before", captured.err)
    assert "going on from step 3 of" in captured.out
    assert_same_run(cached, trained)


def test_a_stop_at_the_step_of_a_damaged_checkpoint_replaces_it(cached, trained, monkeypatch):
    assert train(cached, train_num_steps=6, save_and_sample_every=3, num_samples=0) == 0
    newest = cached / "results" / checkpoint.full_name(6)
    newest.write_bytes(newest.read_bytes()[:-1])
    with monkeypatch.context() as patch:
        at_step(patch, 6, signal_self(signal.SIGTERM))
        assert train(cached, save_and_sample_every=100) == 143
    state = run_folder.newest_state(cached / "results")
    assert state is not None and state.step == 6 and not state.warnings


def test_a_torn_line_of_metrics_is_dropped(cached, trained):
    assert train(cached, train_num_steps=HALF) == 0
    path = cached / "results" / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines, json.dumps({"step": HALF + 1, "loss": 9.0}) + "\n", '{"step": 6, "lo']))
    assert train(cached) == 0
    assert_same_run(cached, trained)
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_moved_images_are_the_same_images(world, trained):
    assert train(world, train_num_steps=2, num_samples=0) == 0
    (world / "data").rename(world / "elsewhere")
    assert train(world, data_path=world / "elsewhere") == 0
    assert_same_run(world, trained)


def test_the_same_images_encoded_again_go_on_with_one_line(cached, capsys):
    assert train(cached, train_num_steps=2) == 0
    shutil.rmtree(cached / "latents_cache")
    preprocess(cached)
    capsys.readouterr()
    assert train(cached, train_num_steps=3) == 0
    assert "encoded again" not in capsys.readouterr().out  # the very same bits
    shutil.rmtree(cached / "latents_cache")
    preprocess(cached, encode_precision="bfloat16")
    assert train(cached, train_num_steps=4) == 0
    assert capsys.readouterr().out.count("the same images were encoded again since the last save") == 1


def test_an_image_that_vanishes_from_a_lazy_run_ends_it_in_one_line(world, capsys):
    assert train(world, train_num_steps=1, num_samples=0, latent_norm_images=2, encode_batch_size=2) == 0
    split = latent_dataset.read_split(world / "results")
    assert split is not None
    held = set(pipeline.open_cache(world / "latents_cache").keys())
    gone = next(entry for entry in split.train if entry.key not in held)
    images.image_path(world / "data", gone).unlink()
    capsys.readouterr()
    assert train(world, num_samples=0, latent_norm_images=2, encode_batch_size=2) == 1
    error = pipeline.one_error(capsys)
    assert f"{gone.class_name}/{gone.name}: cannot be read: No such file" in error


@pytest.mark.parametrize("change", ["content", "class"])
def test_other_images_or_labels_stop_a_resume_and_leave_the_run_alone(cached, capsys, change):
    assert train(cached, train_num_steps=2, num_samples=0) == 0
    split = latent_dataset.read_split(cached / "results")
    assert split is not None
    first, other = split.train[0], split.train[-1]
    path, other_path = (images.image_path(cached / "data", entry) for entry in (first, other))
    if change == "content":
        tiny.make_image(600).save(path)
    else:  # the two swap places, and with them their labels
        path.rename(cached / "kept.jpg")
        other_path.rename(path)
        (cached / "kept.jpg").rename(other_path)
    before = {path: path.read_bytes() for path in (cached / "results").iterdir()}
    capsys.readouterr()
    assert train(cached) == 2
    error = pipeline.one_error(capsys)
    assert f"{first.class_name}/{first.name}" in error and "--results_folder" in error
    assert {path: path.read_bytes() for path in (cached / "results").iterdir()} == before


def test_an_average_that_lags_behind_the_weights_goes_on_as_it_was(cached):
    flags = {"ema_update_every": 3, "num_samples": 0}
    assert train(cached, train_num_steps=4, **flags) == 0
    assert train(cached, train_num_steps=5, **flags) == 0
    assert train(cached, train_num_steps=5, results_folder=cached / "whole", **flags) == 0
    assert state_digests(cached / "results") == state_digests(cached / "whole")
    state = run_folder.newest_state(cached / "results")
    assert state is not None
    averages = [name for name in state.tensors if name.startswith("ema.")]
    assert any(not torch.equal(state.tensors[name], state.tensors[f"model.{name[4:]}"]) for name in averages)


# --- saving ------------------------------------------------------------------------------------------------


def test_two_full_states_and_every_average_are_kept(cached):
    assert train(cached, save_and_sample_every=3, num_samples=0) == 0
    names = sorted(path.name for path in (cached / "results").iterdir())
    states, averages = [3, 6, 8], [3, 6, 8]
    expected = [checkpoint.full_name(step) for step in states[1:]] + [checkpoint.ema_name(step) for step in averages]
    assert names == sorted([*expected, "loss.png", "metrics.jsonl", "settings.yaml", "split.json"])


def test_a_full_disk_shows_after_the_first_step(cached, monkeypatch, capsys):
    save = checkpoint.save

    def without_room(path, tensors, meta) -> None:
        with fault_at(-1, raising(errno.ENOSPC), only=("write",)):
            save(path, tensors, meta)

    monkeypatch.setattr(checkpoint, "save", without_room)
    assert train(cached) == 1
    error = pipeline.one_error(capsys)
    assert "the checkpoint of step 1 could not be saved in" in error and "No space left on device" in error


def test_a_save_that_fails_later_leaves_the_one_before_whole(cached, trained, monkeypatch, capsys):
    save = checkpoint.save

    def without_room(path, tensors, meta) -> None:
        if "6" in Path(path).name:
            with fault_at(-1, raising(errno.EIO), only=("fsync",)):
                save(path, tensors, meta)
        save(path, tensors, meta)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", without_room)
        assert train(cached, save_and_sample_every=3) == 1
    assert "earlier ones are whole" in pipeline.one_error(capsys)
    assert train(cached, save_and_sample_every=3) == 0
    assert_same_run(cached, trained)


# --- losses that are not finite ----------------------------------------------------------------------------


def poison(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Makes the noise of the step of this number, counted from 1, infinite."""
    draw_step = train_latent_cfg.draw_step

    def poisoned(seed: int, number: int, **facts) -> StepDraws:
        draws = draw_step(seed, number, **facts)
        if number == step - 1:
            draws.noise[1] = torch.inf
        return draws

    monkeypatch.setattr(train_latent_cfg, "draw_step", poisoned)


def names_of_step(root: Path, step: int) -> list[str]:
    """Returns the images of a step by drawing it again."""
    split = latent_dataset.read_split(root / "results")
    assert split is not None
    facts = {"size": 15, "latent_shape": (4, 8, 8), "timesteps": 1000, "cond_drop_prob": 0.5}
    positions = train_latent_cfg.draw_step(42, step - 1, batch=4, **facts).positions
    return [f"{split.train[i].class_name}/{split.train[i].name}" for i in positions.tolist()]


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_a_step_without_a_finite_loss_changes_no_weight_and_no_moment(cached, monkeypatch, precision):
    poison(monkeypatch, 3)
    plan = train_latent_cfg.make_plan(pipeline.train_flags(cached, precision=precision, ema_update_every=1))
    device = hardware.pick_device("cpu")
    trainer = Trainer(plan.settings, train_latent_cfg.open_data(plan, device), device)
    trainer.start(plan)

    def weights() -> dict[str, torch.Tensor]:
        state, _ = checkpoint.pack_training_state(trainer.diffusion, trainer.ema.model, trainer.optimizer, None)
        return {name: tensor.clone() for name, tensor in state.items()}

    trainer.train_step()
    trainer.train_step()
    before = weights()
    trainer.train_step()
    assert not trainer.losses[2].isfinite()
    after = weights()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    trainer.train_step()
    assert any(not torch.equal(before[name], tensor) for name, tensor in weights().items())
    assert all(tensor.isfinite().all() for tensor in weights().values())
    with pytest.raises(script.Failed, match="the loss of step 3 is not finite; the step was not taken"):
        trainer.check_finite()


@pytest.mark.parametrize(
    "often", [{"log_every": 4}, {"log_every": 100, "save_and_sample_every": 4}, {"log_every": 100}]
)
def test_a_loss_that_is_not_finite_ends_the_run_by_name_before_anything_is_saved(cached, monkeypatch, capsys, often):
    poison(monkeypatch, 3)
    assert train(cached, **{"save_and_sample_every": 100, **often, "num_samples": 0}) == 1
    error = pipeline.one_error(capsys)
    assert "the loss of step 3 is not finite" in error
    assert ", ".join(names_of_step(cached, 3)) in error
    state = run_folder.newest_state(cached / "results")
    assert state is not None and state.step == 1  # of the rehearsal


def test_an_absurd_learning_rate_is_noticed(cached, capsys):
    assert train(cached, train_lr=1e30, num_samples=0) == 1
    assert re.search(r"the loss of step \d is not finite", pipeline.one_error(capsys))
    state = run_folder.newest_state(cached / "results")
    assert state is not None and all(tensor.isfinite().all() for tensor in state.tensors.values())


# --- number formats ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_reduced_precision_trains_like_float32_and_goes_on_exactly(cached, trained, capsys, precision):
    assert train(cached, results_folder=cached / "whole", precision=precision) == 0
    assert f"{precision} (as asked)" in capsys.readouterr().out
    assert train(cached, precision=precision, train_num_steps=HALF, num_samples=0) == 0
    assert train(cached, precision=precision) == 0
    assert state_digests(cached / "results") == state_digests(cached / "whole")
    assert losses(cached / "results") == losses(cached / "whole") != losses(trained / "results")
    expected = list(losses(trained / "results").values())
    assert list(losses(cached / "results").values()) == pytest.approx(expected, rel=0.1)
    state = run_folder.newest_state(cached / "results")
    assert state is not None and bool(state.meta["training"]["scaler"]) == (precision == "float16")


def test_an_overflow_of_the_loss_scale_only_lowers_it(cached, monkeypatch):
    scaler = torch.amp.GradScaler

    def steep(device: str, *, enabled: bool) -> torch.amp.GradScaler:
        return scaler(device, init_scale=2.0**40, enabled=enabled)

    monkeypatch.setattr(torch.amp, "GradScaler", steep)
    assert train(cached, precision="float16", num_samples=0) == 0
    state = run_folder.newest_state(cached / "results")
    assert state is not None and 0 < state.meta["training"]["scaler"]["scale"] < 2.0**40


# --- what a run leaves behind ------------------------------------------------------------------------------


def test_a_run_owns_its_split_and_its_settings(trained):
    split = latent_dataset.read_split(trained / "results")
    assert split is not None and split.classes == CLASSES and len(split.train) == 15
    assert split == latent_dataset.read_split(trained / "latents_cache")
    stored = config.read_file(TrainSettings, str(trained / "results" / "settings.yaml")).values
    assert stored["dim"] == 8 and stored["dim_mults"] == (1,) and stored["seed"] == 42
    assert Path(stored["data_path"]).is_absolute()


def test_the_metrics_tell_what_was_trained(trained):
    rows = [json.loads(line) for line in (trained / "results" / "metrics.jsonl").read_text().splitlines()]
    figures = [row for row in rows if "loss" in row]
    assert [row["step"] for row in figures] == list(range(1, STEPS + 1))
    assert all(row["lr"] == 1e-3 and row["grad_norm"] > 0 and row["images_per_second"] > 0 for row in figures)
    scores = [row for row in rows if "nearest_class_mean" in row]
    assert [row["step"] for row in scores] == [HALF, STEPS]
    assert all(0 <= row["nearest_class_mean"] <= 1 for row in scores)


def test_fewer_lines_of_metrics_are_means_over_the_steps_between(cached, trained, monkeypatch):
    single = losses(trained / "results")
    with monkeypatch.context() as patch:
        at_step(patch, 5, signal_self(signal.SIGTERM))
        assert train(cached, log_every=4, num_samples=0) == 143
    assert train(cached, log_every=4, num_samples=0) == 0  # the fifth loss is not lost
    expected = {4: sum(single[step] for step in range(1, 5)) / 4, 8: sum(single[step] for step in range(5, 9)) / 4}
    assert losses(cached / "results") == pytest.approx(expected)


def test_a_grid_has_a_row_with_its_name_for_each_class(trained):
    for step in (HALF, STEPS):
        grid = Image.open(trained / "results" / f"grid-{step:08d}.png")
        blank = [[np.zeros((16, 16, 3), dtype=np.uint8)] * 2] * 3
        assert grid.size == pictures.labelled_grid(blank, CLASSES).size
        pixels = np.asarray(grid)
        left = grid.width - 2 * 20
        names, samples = pixels[:, :left], pixels[:, left:]
        for row in range(3):
            band = slice(4 + 20 * row, 4 + 20 * row + 16)
            assert (names[band] < 128).any()
            assert all(samples[band, 20 * column : 20 * column + 16].std() > 1 for column in range(2))
    assert (trained / "results" / "loss.png").exists()


def test_the_loss_curve_shows_the_losses(trained):
    curve = np.asarray(Image.open(trained / "results" / "loss.png").convert("RGB")).astype(int)
    single = losses(trained / "results")
    expected = np.asarray(pictures.loss_curve(list(single), list(single.values()))).astype(int)
    assert np.array_equal(curve, expected)


def test_the_average_begins_as_a_copy_of_the_weights(trained):
    """With a decay of 0.9995 from the start the first grids would be noise."""
    state = run_folder.newest_state(trained / "results")
    assert state is not None
    pairs = [(state.tensors[name], state.tensors[f"model.{name[4:]}"]) for name in state.tensors if name[:4] == "ema."]
    assert len(pairs) > 50 and all(torch.equal(ema, model) for ema, model in pairs)
    averages = run_folder.newest_averages(trained / "results")
    assert averages is not None and averages.step == STEPS and not averages.is_full
    assert all(torch.equal(tensor, state.tensors[name]) for name, tensor in averages.tensors.items())


def test_a_checkpoint_describes_itself(trained):
    state = run_folder.newest_state(trained / "results")
    assert state is not None
    meta = state.meta
    assert meta["step"] == STEPS and meta["classes"] == list(CLASSES) and meta["latent_shape"] == [4, 8, 8]
    assert meta["space"] == pipeline.open_cache(trained / "latents_cache").space.spec
    assert meta["image_suffix"] == ".jpg" and meta["settings"]["dim"] == 8 and meta["torch"] == torch.__version__
    assert len(meta["latent_norm"]["shift"]) == 4 and len(meta["data_digest"]) == len(meta["moments_digest"]) == 64


def test_the_vaes_own_scale_factor_is_used_on_request(cached):
    assert train(cached, latent_norm="scale_factor", train_num_steps=1, num_samples=0) == 0
    state = run_folder.newest_state(cached / "results")
    assert state is not None
    assert state.meta["latent_norm"]["shift"] == [0.0] * 4
    assert state.meta["latent_norm"]["scale"] == pytest.approx([1 / 0.18215] * 4)


def test_a_contiguous_split_is_trained_on(world, capsys):
    assert train(world, split="contiguous", images_per_user=3, split_gap=2, train_num_steps=1, num_samples=0) == 0
    split = latent_dataset.read_split(world / "results")
    assert split is not None
    assert [entry.name for entry in split.train] == [f"walk_{number}.jpg" for number in range(3)] * 3


def test_another_ending_of_the_images_is_remembered(world):
    shutil.rmtree(world / "data")
    tiny.make_images(world / "data", dict.fromkeys(CLASSES, 5), suffix=".png")
    assert train(world, train_num_steps=1, num_samples=0) == 0
    state = run_folder.newest_state(world / "results")
    assert state is not None and state.meta["image_suffix"] == ".png"


def test_the_length_of_the_run_is_told_once(capsys):
    trainer = SimpleNamespace(finished_steps=100)
    clock = Clock(None, trainer)  # type: ignore[arg-type]
    clock.started -= 25.0
    for step in range(101, 153):
        trainer.finished_steps = step
        clock.forecast(1150)
    assert capsys.readouterr().out == "1,000 steps to go will take about 8 min 20 s\n"
