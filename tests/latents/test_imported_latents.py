"""Caches and runs of latents that an earlier version imported: they are recognised, and nothing of them is lost."""

import shutil
from pathlib import Path

import numpy as np
import pipeline
import pytest
import tiny_vae

import preprocess_latents
from gait_latents.common import cli
from gait_latents.common.layout import SPLIT_NAME
from gait_latents.images.split import Entry, Split
from gait_latents.latents.cache import LatentCache
from gait_latents.latents.dataset import LatentDataset
from gait_latents.latents.manifest import read_manifest, write_manifest
from gait_latents.latents.space import Space
from gait_latents.settings import PreprocessSettings
from gait_latents.training import checkpoint, run_folder

RULE = {"seed": 0, "split": "imported", "split_gap": 0, "images_per_user": "all", "num_users": "all"}
OWN_SETTINGS = {"import_folder": "/old/latents", "import_scale_factor": 0.18215, "import_split": None, "dry_run": False}


def imported_space() -> Space:
    """Describes latents of a VAE that nobody knows."""
    fingerprint = {"imported": "latents of another program", "scale_factor": 0.18215}
    return Space.of(fingerprint, 64, {"version": "unknown"}, (8, 8, 8))


def make_imported_cache(folder: Path) -> dict[str, bytes]:
    """Makes the cache that importing two latents of each class left; returns the rows by key."""
    space = imported_space()
    entries = [
        Entry(name, f"walk_{i}", f"{number}{i}" * 32) for number, name in enumerate(pipeline.CLASSES) for i in (0, 1)
    ]
    rows = np.random.default_rng(0).standard_normal((len(entries), *space.moments_shape)).astype(np.float16)
    cache = LatentCache(folder, space, writable=True)
    keys = [entry.key for entry in entries]
    cache.put(keys, rows, [f"{e.class_name}/{e.name}" for e in entries], {"imported": "one draw, frozen"})
    cache.flush()
    (folder / SPLIT_NAME).write_bytes(Split(pipeline.CLASSES, tuple(entries), (), (), RULE).to_bytes())
    settings = {**cli.to_dict(PreprocessSettings()), **OWN_SETTINGS}
    settings |= {"image_size": 64, "images_per_user": "all", "splits": ["train"]}
    write_manifest(folder, settings, space, {"scale_factor": 0.18215, "shift_factor": 0.0, "images": 6})
    return {key: row.tobytes() for key, row in zip(keys, rows, strict=True)}


def rows_of(folder: Path, space: Space) -> dict[str, bytes]:
    cache = LatentCache(folder, space, writable=False)
    moments, found = cache.read(cache.keys())
    assert found.all()
    return {key: row.tobytes() for key, row in zip(cache.keys(), moments, strict=True)}


@pytest.fixture
def imported(world: Path) -> dict[str, bytes]:
    """Puts an imported cache into the world; returns its rows by key."""
    return make_imported_cache(world / "latents_cache")


@pytest.mark.parametrize("command", [pipeline.preprocess, pipeline.train])
def test_the_images_are_encoded_again_beside_imported_latents(world, imported, encoder, capsys, command):
    assert command(world) == 0
    out = capsys.readouterr().out
    told = "holds latents that an earlier version took over from another program: they are left alone, and the images "
    assert out.count(told) == 1 and "do not fit" not in out
    assert encoder.num_images == 15
    folder = world / "latents_cache"
    assert rows_of(folder, imported_space()) == imported
    manifest = read_manifest(folder)
    assert manifest is not None and not manifest.space.is_imported and manifest.settings["image_size"] == pipeline.SIZE
    assert len(LatentDataset.open(folder)) == 15
    assert command(world, **({"train_num_steps": 9} if command is pipeline.train else {})) == 0
    assert told not in capsys.readouterr().out and encoder.num_images == 15


def test_imported_latents_alone_are_nothing_to_train_on(world, imported, capsys):
    (world / "data").rename(world / "elsewhere")
    assert pipeline.train(world, data_path=None, images_per_user=2) == 2
    assert "is needed to encode them, is not there" in pipeline.one_error(capsys)
    (world / "vae.pt").unlink()
    assert pipeline.train(world, data_path=None, vae_path=None, images_per_user=2) == 2
    assert "error: " in pipeline.one_error(capsys)
    assert rows_of(world / "latents_cache", imported_space()) == imported


@pytest.mark.parametrize("work", ["verify", "prune"])
def test_a_check_and_a_prune_leave_an_imported_cache_alone(world, imported, capsys, work):
    flags = [f"--{work}", "--output_folder", str(world / "latents_cache"), "--device", "cpu"]
    assert preprocess_latents.main([*flags, *["--yes"] * (work == "prune")]) == 2
    assert "run preprocess_latents.py, which encodes the images again" in pipeline.one_error(capsys)
    assert rows_of(world / "latents_cache", imported_space()) == imported


def test_a_dataset_still_reads_an_imported_cache(world, imported):
    dataset = LatentDataset.open(world / "latents_cache")
    assert len(dataset) == 6
    assert {dataset.cache.read([key])[0].tobytes() for key in dataset.keys} == set(imported.values())


def make_imported_run(results: Path) -> None:
    """Turns a run into one that was trained on imported latents, as its checkpoints tell."""
    for path in results.glob("*.safetensors"):
        state = run_folder.read_state(path)
        checkpoint.save(path, state.tensors, {**state.meta.to_json(), "space": imported_space().spec})


def test_a_run_on_imported_latents_does_not_go_on_but_still_makes_images(world, trained, imported, tmp_path, capsys):
    shutil.copytree(trained / "results", world / "results")
    make_imported_run(world / "results")
    before = {path: path.read_bytes() for path in (world / "results").iterdir() if path.is_file()}
    assert pipeline.train(world, train_num_steps=9) == 2
    assert "was trained on imported latents and cannot go on in this version" in pipeline.one_error(capsys)
    assert {path: path.read_bytes() for path in (world / "results").iterdir() if path.is_file()} == before
    assert pipeline.generate(world, images_per_class=1) == 0
    assert len(list((world / "synthetic").rglob("ID_*_000000.jpg"))) == 3
    tiny_vae.save_tiny_vae(world / "other.pt", embed_dim=3)
    capsys.readouterr()
    assert pipeline.generate(world, vae_path=world / "other.pt", output_folder=tmp_path / "other") == 2
    assert "decodes latents of 3 channels, and these have 4" in pipeline.one_error(capsys)


def test_settings_of_an_import_are_told_to_be_gone(world, capsys):
    assert pipeline.preprocess(world, import_folder=world / "old") == 2
    told = "there is no setting --import_folder any more; give --data_path, for the images of imported latents"
    assert told in pipeline.one_error(capsys)
