"""--dry_run: it says what would be done, fails as the real run would, and writes nothing at all."""

import os
import re
import shutil
import time
from pathlib import Path

import pytest
import torch
from pipeline import STEPS, assert_same_run, generate, one_error, preprocess, train

import durable
import forecast

RUN = {"preprocess": preprocess, "train": train, "generate": generate}


def tree(root: Path) -> dict[str, tuple]:
    """Returns all that a file system says of what is below `root`, folders and their times of change included."""
    found = {}
    for path in (root, *root.rglob("*")):
        status = path.stat()
        content = path.read_bytes() if path.is_file() else b""
        found[str(path)] = (status.st_mode, status.st_size, status.st_mtime_ns, status.st_ino, content)
    return found


@pytest.fixture
def halted(cached: Path, trained: Path) -> Path:
    """A world with a run of STEPS steps, and what killed processes leave behind."""
    shutil.copytree(trained / "results", cached / "results")
    for folder in ("results", "latents_cache"):
        name = durable._temporary_name().replace(str(os.getpid()), "999999999")  # of no process
        (cached / folder / name).write_bytes(b"left behind")
    return cached


def test_a_new_training_is_told_and_nothing_is_written(world, capsys):
    before = tree(world)
    assert train(world, dry_run="true") == 0
    out = capsys.readouterr().out
    assert tree(world) == before
    assert "15 images asked, 0 cached, 15 to encode when first needed" in out
    assert re.search(r"encode: 15 images to encode, about \S+ s \(\S+ s per image, measured on 2 images\)", out)
    assert re.search(r"train: 8 steps, about \S+ s \(\S+ s per step, measured on 5 steps, not compiled", out)
    assert re.search(r"memory: about \S+ GB host, the most that was held here with the encoder", out)
    assert "for 2 saves;" in out and "for 15 latents;" in out
    assert out.endswith("dry run: nothing was written; the times are estimates\n")


def test_a_run_that_goes_on_is_told_by_its_remaining_steps(halted, encoder, capsys):
    before = tree(halted)
    assert train(halted, dry_run="true", train_num_steps=STEPS + 5) == 0
    out = capsys.readouterr().out
    assert tree(halted) == before
    assert "train: 5 steps, about" in out and "going on from step 8" in out
    assert "encode: nothing, every latent is cached" in out
    assert encoder.batches == []


def test_a_finished_run_says_so(halted, capsys):
    before = tree(halted)
    assert train(halted, dry_run="true") == 0
    assert tree(halted) == before
    assert "is finished (8 steps)" in capsys.readouterr().out


def test_preprocessing_is_told_and_nothing_is_written(cached, encoder, capsys):
    before = tree(cached)
    assert preprocess(cached, images_per_user=7, dry_run="true") == 0
    out = capsys.readouterr().out
    assert tree(cached) == before
    assert re.search(r"encode: 6 images to encode, about \S+ s \(\S+ s per image, measured on 2 images\)", out)
    assert encoder.batches == [1, 1, 1]
    assert preprocess(cached, dry_run="true") == 0
    assert "encode: nothing, every latent is cached" in capsys.readouterr().out


def test_generating_is_told_and_nothing_is_written(trained, tmp_path, capsys):
    before = tree(trained)
    assert generate(trained, output_folder=tmp_path / "synthetic", dry_run="true") == 0
    out = capsys.readouterr().out
    assert tree(trained) == before and not list(tmp_path.iterdir())
    assert "0 of the images are already there, 6 to make" in out
    assert re.search(r"generate: 6 images, about \S+ s \(\S+ s per image, measured on 2 solver steps", out)
    assert "; 4 network passes)" in out  # one batch of 2 steps, with and without the class
    assert generate(trained, output_folder=tmp_path / "synthetic", strip=[1, 2], dry_run="true") == 0
    assert "generate: 6 images" in capsys.readouterr().out and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("script", "changes"),
    [
        ("preprocess", {"data_path": "nowhere"}),
        ("preprocess", {"images_per_user": 9}),
        ("preprocess", {"vae_path": "nowhere.pt"}),
        ("preprocess", {"output_folder": "{root}/vae.pt/cache"}),
        ("preprocess", {"vae_path": None, "images_per_user": 7}),
        ("train", {"results_folder": "{root}/vae.pt"}),
        ("train", {"train_lr": 0.5, "train_num_steps": 9}),
        ("train", {"resume_from": "nowhere", "results_folder": "{root}/new"}),
        ("train", {"images_per_user": 9, "results_folder": "{root}/new"}),
        ("train", {"dim_mults": [1, 2, 4, 8, 16], "results_folder": "{root}/new"}),
        ("generate", {"classes": ["ID_3"]}),
        ("generate", {"checkpoint": "nowhere"}),
        ("generate", {"output_folder": "{root}/vae.pt"}),
    ],
)
def test_the_errors_are_those_of_the_real_run(halted, capsys, script, changes):
    changes = {k: v.format(root=halted) if isinstance(v, str) else v for k, v in changes.items()}
    before = tree(halted)
    assert RUN[script](halted, dry_run="true", **changes) == 2
    told = one_error(capsys)
    assert tree(halted) == before
    assert RUN[script](halted, **changes) == 2
    assert told == one_error(capsys)


def test_images_that_cannot_be_read_are_told(world, capsys):
    (world / "data" / "ID_1" / "walk_0.jpg").write_bytes(b"no image")
    (world / "data" / "ID_1" / "walk_1.jpg").write_bytes(b"no image either")
    before = tree(world)
    assert preprocess(world, images_per_user="all", dry_run="true") == 1
    captured = capsys.readouterr()
    assert "ID_1/walk_0.jpg: " in captured.out and "2 image(s) cannot be read; mend or remove them" in captured.err
    assert preprocess(world, images_per_user="all", skip_bad_images="true", dry_run="true") == 0
    assert train(world, images_per_user="all", dry_run="true") == 1
    assert tree(world) == before


def test_a_class_without_one_good_image_is_told(world, capsys):
    for path in (world / "data" / "ID_2").iterdir():
        path.write_text(f"{path.name} is no image")
    assert preprocess(world, skip_bad_images="true", dry_run="true") == 2
    assert "no training image can be read of ID_2" in one_error(capsys)


def test_verify_is_not_for_a_dry_run(world, capsys):
    assert preprocess(world, verify="true", dry_run="true") == 2
    assert "--dry_run is for encoding; leave it or --verify out" in one_error(capsys)


def test_a_dry_run_leaves_no_trace_in_what_comes_after(world, trained):
    assert train(world, dry_run="true", num_samples=0) == 0
    assert train(world, num_samples=0) == 0
    assert_same_run(world, trained)


def test_permissions_are_told_without_trying(tmp_path):
    assert durable.why_not_permitted(tmp_path / "new" / "folder") is None
    (tmp_path / "file").write_text("x")
    assert durable.why_not_permitted(tmp_path / "file" / "folder") == "Not a directory"
    assert durable.why_not_permitted("/proc/self/folder") is not None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


def test_calls_are_counted_and_slow_ones_end_early(monkeypatch):
    calls = []
    device = torch.device("cpu")
    _, count = forecast.seconds_per_call(lambda: calls.append(1), device, warm_up=2, count=5)
    assert count == 5 and len(calls) == 7
    monkeypatch.setattr(forecast, "_LONGEST_SECONDS", 0.001)
    seconds, count = forecast.seconds_per_call(lambda: time.sleep(0.01), device, warm_up=0, count=5)
    assert count == 1 and seconds >= 0.01


def test_the_total_is_the_pace_times_the_number(monkeypatch, cached):
    monkeypatch.setattr(forecast, "seconds_per_call", lambda *_, **__: (0.5, 5))
    device = torch.device("cpu")
    told = forecast.training(lambda: None, 1000, device)
    assert told.startswith("train: 1,000 steps, about 8 min 20 s (0.5 s per step")
    given = {"num_images": 40, "batch": 16, "most_steps": 20}
    line = forecast.generating(lambda scale, steps: None, lambda: None, device, **given, steps={2.0: 60})
    assert line.startswith("generate: 40 images, about 35 s (")  # 60 / 2 x 0.5 s, and 40 x 0.5 s
    assert line.endswith("; 120 network passes)")
    line = forecast.generating(
        lambda scale, steps: None, lambda: None, device, **{**given, "most_steps": 1}, steps={2.0: 3}
    )
    assert line.startswith("generate: 40 images, about 22 s (") and "on 1 solver steps" in line  # 3 x 0.5 s, 40 x 0.5 s


def test_steps_with_one_pass_and_with_two_are_timed_apart(monkeypatch):
    seconds = {"decode": 0.25, 1: 1.0, 2: 4.0}
    monkeypatch.setattr(forecast, "seconds_per_call", lambda action, *_, **__: (seconds[action()], 1))
    line = forecast.generating(
        lambda scale, steps: 1 if scale in (0, 1) else steps,
        lambda: "decode",
        torch.device("cpu"),
        num_images=8,
        batch=16,
        most_steps=20,
        steps={2.0: 10, 1.0: 6, 3.0: 4, 0.0: 2},
    )
    assert line.startswith("generate: 8 images, about 34 s (")  # 14 / 2 x 4 s, 8 / 2 x 1 s, and 8 x 0.25 s
    assert line.endswith("; 36 network passes)")
