"""The held-out loss: which images it measures, that it disturbs nothing, and which save it names."""

import json
from pathlib import Path
from typing import Any

import pipeline
import pytest
import tiny
import tiny_vae
import torch

from gait_latents.images.split import make_split, read_split
from gait_latents.latents.cache import LatentCache
from gait_latents.latents.manifest import read_manifest
from gait_latents.training import run_folder
from gait_latents.training.held_out import LOSS, SEEN_LOSS, best_save, describe_best


def make_world(root: Path) -> Path:
    """Makes a tiny VAE and 14 images of each of three classes: four are for training, two for validation."""
    tiny.make_images(root / "data", dict.fromkeys(pipeline.CLASSES, 14))
    tiny_vae.save_tiny_vae(root / "vae.pt")
    return root


@pytest.fixture
def world(tmp_path: Path) -> Path:
    return make_world(tmp_path / "world")


SETTINGS: dict[str, Any] = {"images_per_user": 4, "train_num_steps": 6, "save_and_sample_every": 3, "num_samples": 0}


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def measured(folder: Path) -> list[dict[str, Any]]:
    return [row for row in rows_of(folder) if LOSS in row]


def test_each_save_is_measured_on_images_that_training_does_not_see(world, capsys):
    assert pipeline.train(world, **SETTINGS) == 0
    found = measured(world / "results")
    assert [row["step"] for row in found] == [3, 6]
    for row in found:
        for name in (LOSS, SEEN_LOSS):
            table = row[f"{name}_by_timestep"]
            assert len(table) == 10 and row[name] == pytest.approx(sum(table.values()) / 10, abs=1e-4)
    split = read_split(world / "results")
    assert split is not None and len(split.train) == 12 and len(split.validation) == 6
    manifest = read_manifest(world / "latents_cache")
    assert manifest is not None
    cache = LatentCache(world / "latents_cache", manifest.space, writable=False)
    assert cache.holds([entry.key for entry in (*split.train, *split.validation)]).all()
    assert not cache.holds([entry.key for entry in split.test]).any()
    out = capsys.readouterr().out
    assert "12 for training, 6 for validation and 24 for testing" in " ".join(out.split())
    assert "the loss of images that training does not see is lowest at" in out


def test_it_changes_no_bit_of_the_training_and_is_the_same_after_encoding_first(world, tmp_path):
    assert pipeline.train(world, **SETTINGS) == 0
    other = make_world(tmp_path / "other")
    assert pipeline.preprocess(other, images_per_user=4) == 0
    assert pipeline.train(other, **SETTINGS) == 0
    assert measured(world / "results") == measured(other / "results")
    without = make_world(tmp_path / "without")
    assert pipeline.train(without, **SETTINGS, validation_per_user=0) == 0
    assert not measured(without / "results")
    states = [run_folder.newest_state(folder / "results") for folder in (world, without)]
    first, second = (state.tensors for state in states if state is not None)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_a_run_of_an_earlier_version_goes_on_without_validation_images(world, capsys):
    assert pipeline.train(world, **SETTINGS, validation_per_user=0) == 0
    split = read_split(world / "results")
    assert split is not None and not split.validation and '"validation' not in split.to_bytes().decode()
    assert pipeline.train(world, **{**SETTINGS, "train_num_steps": 9}) == 0
    assert not measured(world / "results") and "error" not in capsys.readouterr().err


def test_validation_images_that_are_not_there_cost_the_measure_and_nothing_else(world, capsys):
    assert pipeline.preprocess(world, images_per_user=4, splits=["train"]) == 0
    (world / "data").rename(world / "elsewhere")
    capsys.readouterr()
    assert pipeline.train(world, **SETTINGS, data_path=None, vae_path=None) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert f"no {LOSS}: 6 validation images are not encoded" in out and not measured(world / "results")


def test_a_damaged_validation_image_is_named_and_left_out(world, capsys):
    assert pipeline.preprocess(world, images_per_user=4, splits=["train"]) == 0
    split = read_split(world / "latents_cache")
    assert split is not None
    entry = split.validation[0]
    (world / "data" / entry.class_name / entry.name).write_bytes(b"no image")
    assert pipeline.train(world, **SETTINGS) == 0
    assert f"{entry.class_name}/{entry.name}" in capsys.readouterr().err
    assert [row["step"] for row in measured(world / "results")] == [3, 6]


def test_the_save_with_the_lowest_loss_is_named_and_why():
    rows = [{"step": step, LOSS: loss, SEEN_LOSS: 0.1} for step, loss in ((10, 0.5), (20, 0.3), (30, 0.4))]
    rows.append({"step": 30, "loss": 0.0})
    best = best_save(rows, [10, 20, 30])
    assert best is not None and best["step"] == 20
    sentence = describe_best(rows, [10, 20, 30])
    assert sentence is not None and "lowest at step 20 (0.3000), and 0.4000 at step 30" in sentence
    assert "by heart" not in sentence  # the loss of training images does not fall
    rows.append({"step": 40, LOSS: 0.4, SEEN_LOSS: 0.05})
    sentence = describe_best(rows, [20, 40])
    assert sentence is not None and sentence.endswith(
        "0.4000 at step 40: later saves learn their training images by heart"
    )
    rows.append({"step": 50, LOSS: 0.306, SEEN_LOSS: 0.05})
    sentence = describe_best(rows, [20, 50])
    assert sentence is not None and sentence.endswith("0.3060 at step 50: next to no difference")
    last = describe_best(rows, [10, 30])
    assert last is not None and "lowest at the last of 2 saves (0.4000; of training images 0.1000)" in last
    assert describe_best(rows, [30]) is None and describe_best([], []) is None


@pytest.mark.parametrize("split", ["random", "contiguous"])
def test_validation_images_follow_the_training_images_and_move_none_of_these(split):
    index = {"a": [f"{i:03d}.jpg" for i in range(60)], "b": [f"{i:03d}.jpg" for i in range(26)]}

    def draw(validation: int) -> Any:
        how: dict[str, Any] = {"num_users": "all", "images_per_user": 20, "seed": 1, "split": split, "split_gap": 3}
        return make_split(index, **how, validation_per_user=validation)

    with_them, without = draw(7), draw(0)
    assert with_them.train == without.train and not without.validation
    counts = {name: [e.class_name for e in with_them.validation].count(name) for name in index}
    assert counts == {"a": 7, "b": 1 if split == "random" else 0}  # at most a quarter of what is left
    parts = (with_them.train, with_them.validation, with_them.test, with_them.gap)
    assert sorted((e.class_name, e.name) for part in parts for e in part) == sorted(
        (name, file) for name, files in index.items() for file in files
    )
    if split == "contiguous":
        assert [e.name for e in with_them.validation] == [f"{i:03d}.jpg" for i in range(23, 30)]
        assert [e.name for e in with_them.gap if e.class_name == "a"] == [
            f"{i:03d}.jpg" for i in (20, 21, 22, 30, 31, 32)
        ]
    again = type(with_them).from_bytes(with_them.to_bytes(), "split.json")
    assert again == with_them and again.part("validation") == with_them.validation
