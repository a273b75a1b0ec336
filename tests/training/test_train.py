"""train_latent_cfg.py from end to end: the same training however it is fed; what it saves and leaves behind."""

import json
import os
import re
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pipeline
import pytest
import tiny
import torch
from PIL import Image
from pipeline import (
    CLASSES,
    HALF,
    STEPS,
    assert_same_run,
    at_step,
    forget_setting,
    losses,
    one_error,
    preprocess,
    signal_self,
    state_digests,
    stored_moments,
    train,
)

import train_latent_cfg
from gait_latents.common import charts, cli, hardware, pictures, process
from gait_latents.diffusion.model import own_columns, shift_along_width
from gait_latents.images.split import read_split
from gait_latents.settings import TrainSettings
from gait_latents.training import plan as training_plan
from gait_latents.training import run_folder
from gait_latents.training.loop import Clock
from gait_latents.training.plan import pass_size
from gait_latents.training.trainer import Trainer
from gait_latents.vae.batch_encoder import BatchEncoder

ROOT = Path(__file__).resolve().parents[2]
NO_IMAGE_FLAGS: dict[str, object] = {"vae_path": None, "data_path": None, "image_size": None, "images_per_user": None}

needs_compiler = pytest.mark.skipif(
    hardware.why_not_compile(torch.device("cpu")) is not None, reason="needs a C++ compiler"
)


# --- lazy and pre-encoded are one --------------------------------------------------------------------------


def test_lazy_training_is_pre_encoded_training(world, trained, encoder, capsys):
    assert train(world, num_samples=0) == 0
    assert stored_moments(world / "latents_cache") == stored_moments(trained / "latents_cache")
    assert_same_run(world, trained)
    assert "15 images asked, 0 cached, 15 to encode when first needed" in capsys.readouterr().out
    assert encoder.num_images == 15
    assert encoder.batches == [1] * 15  # on a CPU a call takes one image
    assert encoder.built == ["encoder"]


def stop_at_image(monkeypatch: pytest.MonkeyPatch, number: int, count: int) -> None:
    """Sends this process a signal while the image of this number is encoded."""
    encode, seen = BatchEncoder.__call__, []

    def stopping(encoder: BatchEncoder, images: torch.Tensor) -> torch.Tensor:
        seen.append(images)
        if len(seen) == count:
            os.kill(os.getpid(), number)
        return encode(encoder, images)

    monkeypatch.setattr(BatchEncoder, "__call__", stopping)


@pytest.mark.parametrize(
    ("at_image", "told", "kept"),
    [
        (2, "stopped; what is encoded is kept, and the same command goes on from there", 2),  # of the normalisation
        (7, "stopped by Ctrl-C before the first step; new latents are kept, and the same command begins again", 7),
        (11, "stopped by Ctrl-C at step 1; saved, and the same command goes on from there", 11),
    ],
)
def test_ctrl_c_ends_lazy_encoding_within_one_image(world, trained, monkeypatch, capsys, at_image, told, kept):
    with monkeypatch.context() as patch:
        stop_at_image(patch, signal.SIGINT, at_image)
        assert train(world, num_samples=0) == 130
    captured = capsys.readouterr()
    assert told in captured.out and "Ctrl-C: stopping after this" in captured.err
    assert len(stored_moments(world / "latents_cache")) == kept
    assert train(world, num_samples=0) == 0
    assert_same_run(world, trained)


def test_equal_images_are_not_said_to_be_cached_before_they_are(world, encoder, capsys):
    for name in ("walk_1", "walk_2"):
        shutil.copy(world / "data" / "ID_1" / "walk_0.jpg", world / "data" / "ID_1" / f"{name}.jpg")
    asked = {"images_per_user": "all", "num_samples": 0}
    assert train(world, **asked, train_num_steps=HALF) == 0
    said = capsys.readouterr().out
    assert "24 images asked, 0 cached, 22 to encode when first needed" in said
    assert "2 more have the same content as one of these, and share its latent" in said
    num_encoded = encoder.num_images
    assert 0 < num_encoded < 22  # four steps see 16 images
    assert train(world, **asked) == 0
    assert f"24 images asked, {num_encoded} cached, {22 - num_encoded} to encode" in capsys.readouterr().out


def test_grids_and_their_decoder_change_nothing(world, trained, encoder):
    assert train(world, save_and_sample_every=3, num_samples=1) == 0
    assert_same_run(world, trained)
    assert encoder.num_images == 15
    assert encoder.built.count("encoder") == 1


def test_a_half_filled_cache_is_filled_up(world, trained, encoder):
    preprocess(world, images_per_user=2)
    encoder.forget()
    assert train(world, num_samples=0) == 0
    assert encoder.num_images == 6  # the validation images of before, one of each class, are for training now
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
    assert re.search(
        r"from the settings of \S+latents_cache: vae_path \S+vae.pt, data_path \S+data, image_size 16", said
    )


def test_the_settings_of_a_run_are_a_config_file(trained, tmp_path):
    config_file = trained / "results" / "settings.yaml"
    words = ["--config", str(config_file), "--results_folder", str(tmp_path / "results")]
    assert train_latent_cfg.main(words) == 0
    assert_same_run(tmp_path, trained)


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


@pytest.mark.slow
@needs_compiler
def test_a_compiled_network_trains_alike_and_a_run_goes_on_as_it_began(cached, monkeypatch, capsys):
    monkeypatch.setattr(hardware, "COMPILED_STEPS", STEPS)  # so that a longer run would choose otherwise
    moved = {"time_shift": 0.25, "num_samples": 0}  # so that some columns do not count
    assert train(cached, **moved, compile="false", results_folder=cached / "plain") == 0
    assert train(cached, **moved, compile="auto", results_folder=cached / "whole") == 0
    assert "compiled, which takes a minute" in capsys.readouterr().out
    expected = list(losses(cached / "plain").values())
    assert list(losses(cached / "whole").values()) == pytest.approx(expected, rel=1e-5)
    with monkeypatch.context() as patch:
        at_step(patch, HALF, signal_self(signal.SIGTERM))
        assert train(cached, **moved, compile="auto") == 143
    monkeypatch.setattr(hardware, "COMPILED_STEPS", STEPS + 1)
    assert train(cached, **moved, compile="auto") == 0
    assert state_digests(cached / "results") == state_digests(cached / "whole")


def test_without_a_compiler_auto_does_without_and_true_is_refused(cached, trained, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(hardware, "COMPILED_STEPS", 1)
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
    monkeypatch.setattr(hardware, "COMPILED_STEPS", 1)
    assert train(cached, compile="auto") == 0
    assert capsys.readouterr().err.count("cannot be compiled, and trains without (no such header)") == 1
    assert_same_run(cached, trained)
    assert train(cached, compile="true", results_folder=cached / "other") == 1
    assert "give --compile false" in one_error(capsys)


# --- stopped and taken up again ----------------------------------------------------------------------------


def test_the_time_budget_counts_from_the_start_of_the_process_and_leaves_room_for_a_save(monkeypatch):
    clock = Clock(1.0, SimpleNamespace(finished_steps=0))  # type: ignore[arg-type]

    def is_up_after(seconds: float) -> bool:
        monkeypatch.setattr(process, "PROCESS_START", time.monotonic() - seconds)
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


def test_one_checkpoint_file_alone_is_enough_to_go_on(cached, trained):
    assert train(cached, results_folder=cached / "last", train_num_steps=HALF) == 0
    name = run_folder.full_name(HALF)
    (cached / "upload").mkdir()
    shutil.move(cached / "last" / name, cached / "upload" / name)
    assert train(cached, resume_from=cached / "upload" / name) == 0
    assert state_digests(cached / "results") == state_digests(trained / "results")
    assert list(losses(cached / "results")) == list(range(HALF + 1, STEPS + 1))


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


# --- saving ------------------------------------------------------------------------------------------------


def test_a_folder_that_has_changed_since_the_run_began_is_told_and_the_run_goes_on_as_it_was(cached, trained, capsys):
    assert train(cached, train_num_steps=HALF) == 0
    assert "the split of a run is fixed" not in capsys.readouterr().out
    tiny.make_images(cached / "data", {"ID_2": 12, "ID_3": 8}, seed=2)  # eight of ID_2 would be others, too
    for number in range(8):
        shutil.copy(trained / "data" / "ID_2" / f"walk_{number}.jpg", cached / "data" / "ID_2")
    split = read_split(cached / "results")
    assert split is not None
    place = cached / "data" / "ID_10" / split.test[-1].name
    place.write_bytes((cached / "data" / "ID_3" / "walk_0.jpg").read_bytes())
    told = (
        f"{cached / 'data'} has 4 images of ID_2 and the class ID_3 that this run does not know, and has 1 image "
        "edited since then; the split of a run is fixed when it begins, and another --results_folder trains on what "
        "is there now\n"
    )
    assert train(cached) == 0
    assert told in capsys.readouterr().out
    assert_same_run(cached, trained)
    assert read_split(cached / "results").classes == CLASSES  # pyright: ignore[reportOptionalMemberAccess]
    shutil.rmtree(cached / "data" / "ID_1")
    assert train(cached) == 0  # which is finished
    said = capsys.readouterr().out
    assert "and lacks the class ID_1 that this run knows; the split of a run is fixed" in said and "is finished" in said


def test_a_new_run_says_that_the_folder_is_not_as_the_cache_knows_it(cached, capsys):
    tiny.make_images(cached / "data", {"ID_3": 8})
    assert train(cached, train_num_steps=1, num_samples=0) == 0
    who = f"the split in {cached / 'latents_cache'}"
    told = f"{cached / 'data'} has the class ID_3 that {who} does not know; the split is drawn anew"
    assert told in capsys.readouterr().out


def test_a_run_says_that_the_cache_has_another_split_and_keeps_its_own(cached, trained, capsys):
    assert train(cached, train_num_steps=HALF) == 0
    assert "its own training images" not in capsys.readouterr().out
    assert pipeline.preprocess(cached, split="contiguous", split_gap=2, images_per_user=4) == 0
    capsys.readouterr()
    assert train(cached, **NO_IMAGE_FLAGS) == 0
    told = (
        f"the run in {cached / 'results'} goes on with its own training images (images_per_user 5, split random, "
        "split_gap 4), and the cache has others (images_per_user 4, split contiguous, split_gap 2): to train on those, "
        "give another --results_folder\n"
    )
    assert told in capsys.readouterr().out
    assert_same_run(cached, trained)


def test_two_full_states_and_every_average_are_kept(cached):
    assert train(cached, save_and_sample_every=3, num_samples=0) == 0
    names = sorted(path.name for path in (cached / "results").iterdir())
    states, averages = [3, 6, 8], [3, 6, 8]
    expected = [run_folder.full_name(step) for step in states[1:]] + [run_folder.ema_name(step) for step in averages]
    assert names == sorted([*expected, "loss.png", "metrics.jsonl", "settings.yaml", "split.json"])


# --- number formats ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_reduced_precision_trains_like_float32(cached, trained, capsys, precision):
    assert train(cached, precision=precision, num_samples=0) == 0
    assert f"{precision} (as asked)" in capsys.readouterr().out
    assert losses(cached / "results") != losses(trained / "results")
    expected = list(losses(trained / "results").values())
    assert list(losses(cached / "results").values()) == pytest.approx(expected, rel=0.1)
    state = run_folder.newest_state(cached / "results")
    assert state is not None and state.meta.training is not None
    assert bool(state.meta.training["scaler"]) == (precision == "float16")


# --- what a run leaves behind ------------------------------------------------------------------------------


def test_a_run_owns_its_split_and_its_settings(trained):
    split = read_split(trained / "results")
    assert split is not None and split.classes == CLASSES and len(split.train) == 15
    assert split == read_split(trained / "latents_cache")
    stored = cli.read_file(TrainSettings, str(trained / "results" / "settings.yaml")).values
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
    single = losses(trained / "results")
    assert (trained / "results" / "loss.png").read_bytes() == charts.loss_curve(list(single), list(single.values()))


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
    assert meta.step == STEPS and meta.classes == tuple(CLASSES) and meta.latent_shape == (4, 8, 8)
    assert meta.space.spec == pipeline.open_cache(trained / "latents_cache").space.spec
    assert meta.image_suffix == ".jpg" and meta.settings["dim"] == 8 and meta.torch == torch.__version__
    assert len(meta.latent_norm.shift) == 4
    assert len(meta.data_digest) == len(meta.moments_digest or "") == 64


def norm_of(root, results="results"):
    state = run_folder.newest_state(root / results)
    assert state is not None
    return state.meta.latent_norm.shift.tolist(), state.meta.latent_norm.scale.tolist()


def test_the_vaes_own_scale_factor_is_used_on_request(cached, capsys):
    assert train(cached, latent_norm="scale_factor", train_num_steps=1, num_samples=0) == 0
    assert norm_of(cached) == ([0.0] * 4, pytest.approx([1 / 0.18215] * 4))
    said = capsys.readouterr()
    assert "VAE vae.pt: KL-VAE with plain convolutions between its levels, 4 channels, 2x smaller" in said.out
    assert "scale_factor 0.18215 (assumed" in said.out and "should be about 1" not in said.err


def test_a_scale_factor_that_leaves_latents_far_from_unit_spread_is_told(cached, capsys):
    flags = {"latent_norm": "scale_factor", "train_num_steps": 1, "num_samples": 0}
    assert train(cached, **flags, scale_factor=100, results_folder=cached / "far") == 0
    said = capsys.readouterr().err
    told = re.search(
        r"after scale_factor 100, and it should be about 1: --scale_factor (\S+) makes it so, and so", said
    )
    assert told is not None
    assert train(cached, **flags, scale_factor=told[1], shift_factor=0.1) == 0
    assert "should be about 1" not in capsys.readouterr().err
    assert norm_of(cached) == (pytest.approx([0.1] * 4), pytest.approx([1 / float(told[1])] * 4))


def test_a_run_keeps_its_scale_factor(cached, capsys):
    """The defaults of the cache may have changed since, as when preprocess_latents.py was given another one."""
    flags = {"latent_norm": "scale_factor", "num_samples": 0}
    assert train(cached, **flags, scale_factor=0.7, train_num_steps=1) == 0
    assert preprocess(cached, scale_factor=0.9) == 0
    capsys.readouterr()
    assert train(cached, **flags, train_num_steps=2) == 0
    assert norm_of(cached)[1] == pytest.approx([1 / 0.7] * 4)
    assert train(cached, **flags, scale_factor=0.9, train_num_steps=3) == 2
    assert "--scale_factor is 0.9, but the run in" in one_error(capsys)
    assert train(cached, **flags, train_num_steps=1, results_folder=cached / "new") == 0
    assert norm_of(cached, "new")[1] == pytest.approx([1 / 0.9] * 4)
    assert "scale_factor 0.9" in capsys.readouterr().out


def test_a_scale_factor_that_nothing_uses_is_told(cached, capsys):
    assert train(cached, scale_factor=0.7, train_num_steps=1, num_samples=0) == 0
    assert "are not used, as --latent_norm moments measures the latents" in capsys.readouterr().out


def test_a_contiguous_split_is_trained_on(world, capsys):
    assert train(world, split="contiguous", images_per_user=3, split_gap=2, train_num_steps=1, num_samples=0) == 0
    split = read_split(world / "results")
    assert split is not None
    assert [entry.name for entry in split.train] == [f"walk_{number}.jpg" for number in range(3)] * 3


def test_another_ending_of_the_images_is_remembered(world):
    shutil.rmtree(world / "data")
    tiny.make_images(world / "data", dict.fromkeys(CLASSES, 5), suffix=".png")
    assert train(world, train_num_steps=1, num_samples=0) == 0
    state = run_folder.newest_state(world / "results")
    assert state is not None and state.meta.image_suffix == ".png"


def test_the_length_of_the_run_is_told_once_and_without_its_slow_first_steps(monkeypatch, capsys):
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    trainer = SimpleNamespace(finished_steps=100, device=torch.device("cpu"))
    clock = Clock(None, trainer)  # type: ignore[arg-type]
    for step in range(101, 153):
        now += 60 if step == 101 else 0.5
        trainer.finished_steps = step
        clock.forecast(1150)
    assert capsys.readouterr().out == "1,000 steps to go will take about 8 min 20 s\n"


def test_auto_sees_each_image_as_often_whatever_their_number_and_takes_some_steps_at_least(cached, monkeypatch, capsys):
    monkeypatch.setattr(training_plan, "AUTO_PASSES", 2)
    few = {"train_num_steps": "auto", "num_samples": 0}
    assert train(cached, **few, fewest_steps=5) == 0
    told = "batch 4, 8 steps (2 passes over the images)"  # 15 images
    assert told in capsys.readouterr().out
    assert train(cached, **few, fewest_steps=10, results_folder=cached / "longer") == 0
    assert "batch 4, 10 steps (--fewest_steps: 3 passes over the images)" in capsys.readouterr().out
    assert (longer := run_folder.newest_state(cached / "longer")) is not None and longer.step == 10
    state = run_folder.newest_state(cached / "results")
    assert state is not None and state.step == 8 and state.meta.settings["train_num_steps"] == "auto"
    assert train(cached, train_num_steps="auto", num_samples=0) == 0
    assert "is finished (8 steps); a larger --train_num_steps goes further" in capsys.readouterr().out
    assert train(cached, train_num_steps=9, num_samples=0) == 0
    assert (state := run_folder.newest_state(cached / "results")) is not None and state.step == 9


def test_latents_are_moved_by_the_draws_of_their_step_in_whatever_parts_and_after_a_stop(cached, trained):
    whole, parts = {"results_folder": cached / "whole"}, {"results_folder": cached / "parts"}
    shift = {"time_shift": 0.25, "num_samples": 0}
    assert train(cached, **whole, **shift) == 0
    assert losses(cached / "whole") != losses(trained / "results")
    assert train(cached, **parts, **shift, train_num_steps=3) == 0
    assert train(cached, **parts, **shift, train_batch_size=2, gradient_accumulate_every=2) == 0
    expected = list(losses(cached / "whole").values())
    assert list(losses(cached / "parts").values()) == pytest.approx(expected, rel=1e-5)


def test_the_network_sees_moved_latents(cached, monkeypatch):
    changed: list[bool] = []
    take = Trainer.latents_of

    def checked(self: Any, part: Any) -> Any:
        latents, labels = take(self, part)
        plain, _ = self.dataset.batch(part.positions, part.posterior_noise)
        assert self.largest_shift == round(plain.shape[3] / 4) and part.shifts.abs().max() <= self.largest_shift
        assert torch.equal(latents, shift_along_width(plain, part.shifts))
        changed.append(not torch.equal(latents, plain))
        return latents, labels

    monkeypatch.setattr(Trainer, "latents_of", checked)
    assert train(cached, time_shift=0.25, num_samples=0) == 0
    assert any(changed)


@pytest.mark.parametrize("is_older", [False, True])
def test_columns_that_a_move_fills_count_in_older_runs_alone(cached, monkeypatch, is_older):
    shift = {"time_shift": 0.25, "num_samples": 0}
    assert train(cached, **shift, train_num_steps=HALF) == 0
    state = run_folder.newest_state(cached / "results")
    assert state is not None
    if is_older:
        forget_setting(state.path, "learn_edges")
    found: list[Any] = []
    take = Trainer._loss_mask  # pyright: ignore[reportPrivateUsage]

    def noted(self: Any, part: Any) -> Any:
        mask = take(self, part)
        found.append(None if mask is None else (mask, part.shifts))
        return mask

    monkeypatch.setattr(Trainer, "_loss_mask", noted)
    assert train(cached, **shift) == 0
    assert len(found) == STEPS - HALF and (None in found) == is_older
    if not is_older:
        assert all(torch.equal(mask, own_columns(by, mask.shape[1])) for mask, by in found)
        assert not all(mask.all() for mask, _ in found)
    state = run_folder.newest_state(cached / "results")
    assert state is not None and state.meta.settings["learn_edges"] == is_older


@pytest.mark.parametrize("name", ["time_shift", "noise_shift"])
def test_a_run_of_before_a_setting_goes_on_without(trained, tmp_path, name):
    root = shutil.copytree(trained, tmp_path / "world")
    state = run_folder.newest_state(root / "results")
    assert state is not None
    forget_setting(state.path, name)
    plan = training_plan.make_plan(pipeline.train_flags(root, train_num_steps=STEPS + 1))
    assert getattr(plan.settings, name) == 0.0
