"""preprocess_latents.py from end to end: what is encoded, what never is again, and what is told about it."""

import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pipeline
import pytest
import tiny
import tiny_vae
import torch
from PIL import Image
from pipeline import open_cache, preprocess, stored_moments

import preprocess_latents
from gait_latents.common import console, errors, pictures
from gait_latents.common.errors import UserError
from gait_latents.images import reading
from gait_latents.images.split import Split, read_split
from gait_latents.latents import preview as preview_module
from gait_latents.latents.dataset import LatentDataset
from gait_latents.latents.manifest import read_manifest
from gait_latents.vae import load
from gait_latents.vae.batch_encoder import BatchEncoder

ROOT = Path(__file__).resolve().parents[2]


def account(capsys: pytest.CaptureFixture[str]) -> tuple[int, int, int]:
    """Returns what the account says of newly encoded, already cached and failed images."""
    said = capsys.readouterr().out
    newly, cached, failed = re.findall(r"^(?:newly encoded|already cached|failed) +(\d+)$", said, re.MULTILINE)
    return int(newly), int(cached), int(failed)


def cache_files(root: Path) -> dict[str, tuple[bytes, int]]:
    """Returns content and inode of each file of the cache."""
    files = [path for path in (root / "latents_cache").rglob("*") if path.is_file()]
    return {str(path): (path.read_bytes(), path.stat().st_ino) for path in files}


def stored_split(root: Path) -> Split:
    split = read_split(root / "latents_cache")
    assert split is not None
    return split


def shard(root: Path) -> Path:
    (path,) = (root / "latents_cache").glob("*/*.safetensors")
    return path


def test_a_folder_that_has_changed_since_its_split_is_told(cached, capsys):
    assert preprocess(cached) == 0
    assert "the split is drawn anew" not in capsys.readouterr().out
    tiny.make_images(cached / "data", {"ID_1": 9, "ID_3": 8}, seed=2)  # eight of ID_1 are other pictures now
    (cached / "data" / "ID_10" / "walk_0.jpg").unlink()
    assert preprocess(cached) == 0
    who = f"the split in {cached / 'latents_cache'}"
    told = (
        f"{cached / 'data'} has 1 image of ID_1 and the class ID_3 that {who} does not know, and lacks 1 image of "
        f"ID_10 that {who} knows, and has 8 images edited since then; the split is drawn anew from what is there now\n"
    )
    assert told in capsys.readouterr().out
    assert preprocess(cached) == 0
    assert "the split is drawn anew" not in capsys.readouterr().out


def test_a_split_that_cannot_be_read_is_told_and_written_again(cached, capsys):
    path = cached / "latents_cache" / "split.json"
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    assert preprocess(cached) == 0
    told = "the images were not compared with those of earlier, and their split is written again: "
    assert f"{told}{path} is damaged or was edited" in capsys.readouterr().out
    assert path.read_bytes() == whole


# --- which VAE, and its constants --------------------------------------------------------------------------


def test_the_constants_of_a_vae_are_told_and_are_no_part_of_the_latents(world, capsys):
    assert preprocess(world) == 0
    said = capsys.readouterr().out
    assert "scale_factor 0.18215 (assumed, as the file names none)" in said and "should be about 1" not in said
    assert preprocess(world, scale_factor=0.01) == 0
    said = capsys.readouterr().out
    told = re.search(
        r"^scale_factor    only for .* the latents have .* --scale_factor (\S+) makes it so", said, re.MULTILINE
    )
    assert told is not None
    before = cache_files(world)
    assert preprocess(world, scale_factor=told[1], shift_factor=-0.5) == 0
    said = capsys.readouterr().out
    assert f"scale_factor {float(told[1]):g} and shift_factor -0.5\n" in said and "it should be about 1" not in said
    after = cache_files(world)
    assert after.keys() == before.keys() and all(after[path] == before[path] for path in before if ".json" not in path)
    manifest = read_manifest(world / "latents_cache")
    assert manifest is not None and manifest.record["scale_factor"] == float(told[1])
    assert manifest.record["shift_factor"] == -0.5


def test_the_constants_of_one_vae_are_no_defaults_for_another(world, capsys):
    assert preprocess(world, scale_factor=0.5) == 0
    assert preprocess(world) == 0
    assert "scale_factor 0.5" in capsys.readouterr().out
    tiny_vae.save_tiny_vae(world / "other.pt", seed=5)
    assert preprocess(world, vae_path=world / "other.pt") == 0
    assert "scale_factor 0.18215 (assumed, as the file names none)" in capsys.readouterr().out


# --- one run, and another ----------------------------------------------------------------------------------


def test_a_run_encodes_everything_into_one_shard_and_accounts_for_it(world, encoder, capsys):
    assert preprocess(world) == 0
    said = capsys.readouterr().out
    assert "3 classes, 15 images (train): 0 cached, 15 to encode in float32 on CPU (1 threads)" in said
    assert "newly encoded   15\nalready cached  0\nfailed          0\n" in said
    assert re.search(r"time +\d.* images/s; peak memory", said)
    assert f"next: {console.python_word()} train_latent_cfg.py --latents_cache_folder {world}/latents_cache" in said
    assert encoder.batches == [1] * 15  # on a CPU a call takes one image
    assert encoder.built == ["encoder", "decoder"]
    names = {path.name for path in (world / "latents_cache").iterdir()}
    assert names == {"manifest.json", "split.json", "preview.png", open_cache(world / "latents_cache").space.id}
    assert f"({console.size(shard(world).stat().st_size)})" in said


def test_what_is_stored_is_what_the_encoder_says(world):
    preprocess(world)
    moments = stored_moments(world / "latents_cache")
    network = load.load_vae(world / "vae.pt", "cpu")
    entries = stored_split(world).train
    assert {entry.key for entry in entries} == set(moments)
    for entry in entries[::5]:
        data = reading.image_path(world / "data", entry).read_bytes()
        pixels = torch.from_numpy(reading.decode(data, image_size=pipeline.SIZE)).permute(2, 0, 1)[None] / 255
        expected = network.encode(pixels)[0].half()
        found = np.frombuffer(moments[entry.key], dtype=np.float16).reshape(8, 8, 8)
        assert np.allclose(found, expected, rtol=2e-3, atol=1e-4)


def test_a_second_run_encodes_nothing_and_changes_no_shard(world, encoder, capsys):
    preprocess(world)
    before = cache_files(world)
    account(capsys)
    encoder.forget()
    assert preprocess(world) == 0
    assert account(capsys) == (0, 15, 0)
    assert encoder.batches == [] and encoder.built == []
    after = cache_files(world)
    assert {name: content for name, (content, _) in after.items()} == {n: content for n, (content, _) in before.items()}
    assert after[str(shard(world))] == before[str(shard(world))]


def test_a_vae_that_is_asked_for_and_gone_is_an_error_even_if_all_is_cached(world, capsys):
    preprocess(world)
    (world / "vae.pt").unlink()
    assert preprocess(world) == 2
    assert "vae.pt" in pipeline.one_error(capsys)


def test_equal_images_are_encoded_once_and_not_said_to_be_cached(world, encoder, capsys):
    for name in ("walk_1", "walk_2"):
        shutil.copy(world / "data" / "ID_1" / "walk_0.jpg", world / "data" / "ID_1" / f"{name}.jpg")
    assert preprocess(world, images_per_user="all") == 0
    said = capsys.readouterr().out
    assert (
        "24 images (train): 0 cached, 22 to encode" in said and "2 more have the same content as one of these" in said
    )
    assert "newly encoded   22\nalready cached  0\nfailed          0\n" in said and encoder.num_images == 22
    assert preprocess(world, images_per_user="all") == 0
    assert account(capsys) == (0, 22, 0)


def test_more_images_encode_only_the_new_ones_and_end_in_one_shard(world, encoder, capsys):
    preprocess(world, images_per_user=2)
    encoder.forget()
    account(capsys)
    assert preprocess(world, images_per_user=5) == 0
    assert account(capsys) == (6, 9, 0)  # the validation images of before, one of each class, are for training now
    assert encoder.num_images == 6
    assert len(open_cache(world / "latents_cache")) == 15
    assert shard(world).exists()  # the one and only


def test_the_test_images_are_encoded_on_request(world, encoder, capsys):
    preprocess(world)
    with pytest.raises(UserError, match=r"9 of 9 test images are not in .*; run preprocess_latents\.py"):
        LatentDataset.open(world / "latents_cache", split="test")
    encoder.forget()
    account(capsys)
    assert preprocess(world, splits=["train", "test"]) == 0
    assert account(capsys) == (9, 15, 0)
    assert encoder.num_images == 9
    test = LatentDataset.open(world / "latents_cache", split="test")
    assert len(test) == 9 and test.labels.tolist() == [0] * 3 + [1] * 3 + [2] * 3
    assert not set(test.keys) & set(LatentDataset.open(world / "latents_cache").keys)


def test_a_finished_cache_is_all_that_another_loop_needs(world):
    preprocess(world)
    shutil.rmtree(world / "data")
    (world / "vae.pt").unlink()
    dataset = LatentDataset.open(world / "latents_cache")
    latent, label = dataset[14]
    assert latent.shape == (4, 8, 8) and label == 2
    latents = dataset.mean_latents(torch.arange(15))
    assert abs(latents.mean()) < 0.1 and 0.5 < latents.std() <= 1.01
    with pytest.raises(UserError, match=r"there is no manifest\.json; run preprocess_latents\.py"):
        LatentDataset.open(world)


def test_a_part_that_is_named_twice_is_encoded_once(world, capsys):
    assert preprocess(world, splits=["train", "test", "train"]) == 0
    assert "3 classes, 24 images (train and test): 0 cached, 24 to encode" in capsys.readouterr().out


@pytest.mark.parametrize("place", ["data", "data/latents_cache", "data/../data/latents_cache"])
def test_a_cache_does_not_become_a_class(world, capsys, place):
    folder = world / place
    for code in (preprocess(world, output_folder=folder), pipeline.train(world, latents_cache_folder=folder)):
        assert code == 2
    assert pipeline.train(world, results_folder=folder) == 2
    assert capsys.readouterr().err.count("is among the class folders of --data_path") == 3
    assert sorted(path.name for path in (world / "data").iterdir()) == ["ID_1", "ID_10", "ID_2"]


def test_the_next_command_can_be_typed_as_it_stands(world, capsys):
    assert preprocess(world, output_folder=world / "my cache") == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("next: ")]
    assert line.startswith(f"next: {console.python_word()} train_latent_cfg.py ")
    assert shlex.split(line)[-2:] == ["--latents_cache_folder", str(world / "my cache")]


def test_a_contiguous_split_leaves_the_neighbours_out(world):
    preprocess(world, split="contiguous", images_per_user=3, split_gap=2)
    split = stored_split(world)
    first = [
        [entry.name for entry in part if entry.class_name == "ID_1"] for part in (split.train, split.gap, split.test)
    ]
    assert first == [[f"walk_{i}.jpg" for i in numbers] for numbers in ((0, 1, 2), (3, 4), (5, 6, 7))]
    assert len(open_cache(world / "latents_cache")) == 9


# --- the settings of a cache that is there ------------------------------------------------------------------


def bare(world: Path, **changes: object) -> int:
    """Runs preprocess_latents.py with no flag but the place of the cache, and those that are given."""
    flags = {"output_folder": world / "latents_cache", "device": "cpu"}
    return preprocess_latents.main(tiny.flags({**flags, **changes}))


def test_a_bare_command_goes_on_with_the_settings_of_a_lazy_training(world, encoder, capsys):
    assert pipeline.train(world, train_num_steps=1, num_samples=0, images_per_user=3, seed=5) == 0
    encoder.forget()
    capsys.readouterr()
    assert bare(world) == 0
    said = capsys.readouterr().out
    words = " ".join(said.split())  # of lines that may break anywhere
    assert f"from the settings of {world}/latents_cache, which flags and --config override: " in words
    for name, value in {"vae_path": world / "vae.pt", "data_path": world / "data", "image_size": 16, "seed": 5}.items():
        assert f"{name} {value}" in words
    assert "12 images (train and validation): 12 cached, 0 to encode" in said  # it has measured itself on all of them
    assert len(open_cache(world / "latents_cache")) == 12
    assert bare(world) == 0
    assert "12 images (train and validation): 12 cached, 0 to encode" in capsys.readouterr().out


def test_flags_override_the_settings_of_a_cache_and_what_differs_is_told_by_its_name(world, capsys):
    assert preprocess(world) == 0
    capsys.readouterr()
    assert bare(world, images_per_user=2, image_size=32) == 0
    said = capsys.readouterr().out
    assert "other than when the cache was made: --images_per_user 2, the cache has 5\n" in said
    assert (
        "made with another VAE, image_size or resize (--image_size 32, the cache has 16): its latents are left alone"
        in said
    )
    assert "9 images (train and validation): 0 cached, 9 to encode" in said
    assert bare(world) == 0  # and now these are the settings of the cache
    assert "9 images (train and validation): 9 cached, 0 to encode" in capsys.readouterr().out


def test_a_path_written_in_another_way_is_no_other_vae_or_folder(world, capsys, monkeypatch):
    assert preprocess(world, scale_factor=0.5) == 0
    monkeypatch.chdir(world)
    (world / "link").symlink_to("data")
    capsys.readouterr()
    same = [
        "--output_folder",
        "latents_cache",
        "--vae_path",
        "./vae.pt",
        "--data_path",
        "link/../data/",
        "--device",
        "cpu",
    ]
    assert preprocess_latents.main(same) == 0
    said = capsys.readouterr().out
    assert "scale_factor 0.5" in said and "other than when the cache was made" not in said
    manifest = read_manifest(world / "latents_cache")
    assert manifest is not None and manifest.settings["scale_factor"] == 0.5


def test_a_config_file_overrides_the_settings_of_a_cache_too(world, tmp_path, capsys):
    assert preprocess(world) == 0
    capsys.readouterr()
    (tmp_path / "own.yaml").write_text("images_per_user: 4\n")
    assert bare(world, config=tmp_path / "own.yaml") == 0
    said = capsys.readouterr().out
    assert "--images_per_user 4, the cache has 5" in said and "15 images (train and validation): 15 cached" in said


def test_the_parts_that_a_cache_was_made_for_stay(world, capsys):
    assert preprocess(world, splits=["train", "test"]) == 0
    capsys.readouterr()
    assert bare(world) == 0
    assert "24 images (train and test): 24 cached, 0 to encode" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["verify", "prune"])
def test_a_check_and_a_pruning_read_the_settings_of_the_cache(world, capsys, command):
    assert preprocess(world) == 0
    capsys.readouterr()
    assert bare(world, **{command: "true"}) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert f"from the settings of {world}/latents_cache, which flags and --config override: " in said


@pytest.mark.parametrize("run", [preprocess, pipeline.train])
def test_a_cache_that_is_not_there_yet_is_told_with_the_one_beside_it(world, capsys, run):
    assert preprocess(world) == 0
    assert f"no cache in {world}/latents_cache yet, so a new one is made\n" in capsys.readouterr().out
    name = "output_folder" if run is preprocess else "latents_cache_folder"
    assert run(world, **{name: world / "latent_cache"}, **({} if run is preprocess else {"train_num_steps": 1})) == 0
    told = f"no cache in {world}/latent_cache yet, so a new one is made; did you mean {world}/latents_cache?\n"
    assert told in capsys.readouterr().out
    assert run(world, **{name: world / "latent_cache"}) == 0
    assert "no cache in" not in capsys.readouterr().out


def test_a_new_cache_with_a_name_of_its_own_is_not_taken_for_a_mistyping(world, capsys):
    assert preprocess(world) == 0
    capsys.readouterr()
    assert preprocess(world, output_folder=world / "squashed") == 0
    assert f"no cache in {world}/squashed yet, so a new one is made\n" in capsys.readouterr().out


def test_a_check_of_a_mistyped_folder_names_the_cache_beside_it(world, capsys):
    assert preprocess(world) == 0
    capsys.readouterr()
    assert bare(world, output_folder=world / "latent_cache", verify="true") == 2
    assert f"did you mean {world}/latents_cache? Else run preprocess_latents.py" in pipeline.one_error(capsys)


# --- bad images --------------------------------------------------------------------------------------------


def spoil(world: Path) -> dict[str, str]:
    """Spoils six images in four ways; returns a part of the reason by name. All images are used by the caller."""
    data = world / "data"
    (data / "ID_1" / "walk_0.jpg").write_bytes(b"")
    (data / "ID_1" / "walk_5.jpg").write_bytes(b"")
    (data / "ID_10" / "walk_1.jpg").write_bytes(b"")
    whole = (data / "ID_2" / "walk_2.jpg").read_bytes()
    (data / "ID_2" / "walk_2.jpg").write_bytes(whole[: len(whole) // 2])
    (data / "ID_2" / "walk_3.jpg").write_text("version https://git-lfs.github.com/spec/v1\n")
    (data / "ID_2" / "walk_4.jpg").unlink()
    (data / "ID_2" / "walk_4.jpg").symlink_to("nowhere")
    empty = dict.fromkeys(("ID_1/walk_0.jpg", "ID_1/walk_5.jpg", "ID_10/walk_1.jpg"), "the file is empty")
    return {**empty, "ID_2/walk_2.jpg": "cut short", "ID_2/walk_3.jpg": "Git-LFS", "ID_2/walk_4.jpg": "cannot be read"}


def test_bad_images_are_listed_with_their_reasons_and_the_good_ones_are_kept(world, encoder, capsys):
    reasons = spoil(world)
    assert preprocess(world, images_per_user="all") == 1
    captured = capsys.readouterr()
    assert "newly encoded   18\nalready cached  0\nfailed          6\n" in captured.out
    for name, reason in reasons.items():
        assert re.search(rf"^    {re.escape(name)}: .*{reason}", captured.out, re.MULTILINE)
    assert "6 image(s) failed and the rest are cached; mend or remove them, or give --skip_bad_images" in captured.err
    assert encoder.num_images == 18
    encoder.forget()
    for number, name in enumerate(reasons):
        (world / "data" / name).unlink()
        tiny.make_image(500 + number).save(world / "data" / name)
    assert preprocess(world, images_per_user="all") == 0
    assert encoder.num_images == 6
    assert len(LatentDataset.open(world / "latents_cache")) == 24


def test_skipped_images_are_recorded_and_training_agrees(world, encoder, capsys):
    reasons = spoil(world)
    assert preprocess(world, images_per_user="all", skip_bad_images="true") == 0
    split = stored_split(world)
    assert {f"{item.class_name}/{item.name}" for item in split.skipped} == set(reasons)
    assert all(reasons[f"{item.class_name}/{item.name}"] in item.reason for item in split.skipped)
    assert len(split.train) == 18 == len(LatentDataset.open(world / "latents_cache"))
    encoder.forget()
    capsys.readouterr()
    # From the cache alone, with the manifest's settings: neither all images nor a VAE are there.
    shutil.rmtree(world / "data")
    (world / "vae.pt").unlink()
    for results in ("results", "again"):
        flags = dict.fromkeys(("images_per_user", "data_path", "vae_path", "image_size"))
        assert pipeline.train(world, results_folder=world / results, train_num_steps=1, **flags) == 0
        assert "18 images asked, 18 cached, 0 to encode" in capsys.readouterr().out
    assert encoder.num_images == 0


def test_training_finds_bad_images_before_its_first_step_and_agrees_with_preprocessing(world, encoder, capsys):
    reasons = spoil(world)
    assert pipeline.train(world, images_per_user="all", train_num_steps=1) == 1
    captured = capsys.readouterr()
    for name, reason in reasons.items():
        assert re.search(rf"^    {re.escape(name)}: .*{reason}", captured.out, re.MULTILINE)
    assert "6 of 24 training images cannot be read" in captured.err
    assert not list((world / "results").glob("state-*"))
    assert pipeline.train(world, images_per_user="all", train_num_steps=1, skip_bad_images="true") == 0
    mine = read_split(world / "results")
    preprocess(world, images_per_user="all", skip_bad_images="true")
    assert mine is not None and mine.train == stored_split(world).train
    assert encoder.num_images == 18


def test_a_run_on_fewer_classes_than_the_skipped_images_are_of_can_go_on(world, capsys):
    (world / "data" / "ID_10" / "walk_1.jpg").write_bytes(b"")
    preprocess(world, images_per_user="all", skip_bad_images="true")
    flags = {"images_per_user": "all", "skip_bad_images": "true", "num_users": 2}
    assert pipeline.train(world, train_num_steps=1, **flags) == 0
    assert pipeline.train(world, train_num_steps=2, **flags) == 0
    split = read_split(world / "results")
    assert split is not None and split.skipped == () and len(split.train) == 16


def test_a_class_without_one_good_image_is_an_error(world, capsys):
    for path in (world / "data" / "ID_2").iterdir():
        path.write_text(f"{path.name} is no image")
    assert preprocess(world, skip_bad_images="true") == 2
    assert "no training image can be read of ID_2" in pipeline.one_error(capsys)


# --- a stop in the middle ----------------------------------------------------------------------------------


def test_ctrl_c_keeps_what_is_encoded_and_the_same_command_goes_on(world, encoder, capsys):
    tiny.make_images(world / "data", {"ID_3": 60}, seed=1)
    settings = {"num_users": 4, "images_per_user": "all", "encode_batch_size": 1}
    code = "import sys; from gait_latents.common import console; console.LOG_SECONDS = 0; "
    code += "import preprocess_latents as p; sys.exit(p.main(None))"
    words = [*tiny.preprocess_flags(world, image_size=16, **settings)]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *words],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stderr is not None
    while "encode" not in (line := process.stderr.readline()):  # a line of progress: the first image is encoded
        assert "Warning" in line or line.startswith(" "), line  # of an old torch
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Ctrl-C: stopping after this image; a second Ctrl-C ends at once\n" in err
    assert "Traceback" not in err
    said = re.search(r"stopped; (\d+) new latents are kept, and the same command goes on from there", out)
    assert said is not None
    kept = int(said[1])
    assert 1 <= kept < 84
    assert len(list((world / "latents_cache").rglob("*.safetensors"))) == 1
    assert preprocess(world, **settings) == 0
    assert account(capsys) == (84 - kept, kept, 0)
    assert encoder.num_images == 84 - kept


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_encoding_within_one_image_of_a_batch(world, capsys, monkeypatch, number):
    encode, seen = BatchEncoder.__call__, []

    def stopping(encoder: BatchEncoder, images: torch.Tensor) -> torch.Tensor:
        seen.append(len(images))
        if len(seen) == 2:
            os.kill(os.getpid(), number)
        return encode(encoder, images)

    with monkeypatch.context() as patch:
        patch.setattr(BatchEncoder, "__call__", stopping)
        assert preprocess(world, encode_batch_size=16) == 128 + number
    assert seen == [1, 1]
    captured = capsys.readouterr()
    assert "stopped; 2 new latents are kept, and the same command goes on from there" in captured.out
    assert f"{errors.name_signal(number)}: stopping after this image; a second Ctrl-C ends at once\n" in captured.err
    assert preprocess(world) == 0
    assert account(capsys) == (13, 2, 0)


# --- the round trip ----------------------------------------------------------------------------------------


def test_the_preview_shows_images_above_their_reconstructions(world, capsys):
    preprocess(world)
    said = capsys.readouterr().out
    preview = Image.open(world / "latents_cache" / "preview.png")
    split = stored_split(world)
    chosen = [split.train[i] for i in np.linspace(0, 14, 6).astype(int)]
    originals = [
        reading.decode(reading.image_path(world / "data", entry).read_bytes(), image_size=16) for entry in chosen
    ]
    network = load.load_vae(world / "vae.pt", "cpu")
    decoded = [
        pictures.to_uint8(network.decode(network.encode(torch.from_numpy(image).permute(2, 0, 1)[None] / 255)[:, :4]))[
            0
        ]
        for image in originals
    ]
    expected = pictures.labelled_grid(
        [originals, decoded], ["image", "decoded"], [entry.class_name for entry in chosen]
    )
    assert preview.size == expected.size
    difference = np.abs(np.asarray(preview, dtype=float) - np.asarray(expected, dtype=float))
    assert difference.max() <= 4 and difference.mean() < 0.2  # the stored moments are float16
    scores = [pictures.psnr(a, b) for a, b in zip(originals, decoded, strict=True)]
    assert f"PSNR {np.mean(scores):.1f} dB over 6 images (worst {min(scores):.1f})" in said


# --- verify ------------------------------------------------------------------------------------------------


def verify(world: Path, capsys: pytest.CaptureFixture[str], **changes: object) -> tuple[int, dict[str, str], str]:
    """Checks the cache; returns the exit code, what stands behind each word, and the lines on stderr."""
    capsys.readouterr()
    settings = {"output_folder": world / "latents_cache", "device": "cpu", **changes}
    code = preprocess_latents.main(["--verify", *tiny.flags(settings)])
    captured = capsys.readouterr()
    facts = dict(re.findall(r"^(\w[\w ]*?) {2,}(.+(?:\n    .+)*)", captured.out, re.MULTILINE))
    return code, facts, captured.err


def test_a_low_psnr_is_said_to_be_low(world, capsys, monkeypatch):
    for limit, is_low in ((math.inf, True), (-math.inf, False)):
        monkeypatch.setattr(preview_module, "_LOW_PSNR_DB", limit)
        assert preprocess(world, output_folder=world / f"cache {limit}") == 0
        assert ("that is low: generated images can be no better" in capsys.readouterr().out) is is_low


def test_a_good_cache_is_found_good_and_left_as_it_is(world, capsys):
    preprocess(world)
    before = cache_files(world)
    code, facts, err = verify(world, capsys)
    assert code == 0 and err == ""
    assert facts["images"] == "15 asked for, 15 cached (content checked)"
    assert (facts["stale"], facts["missing"]) == ("0", "0")
    assert facts["orphaned"].startswith("0 rows")
    assert facts["shards"].startswith("1, ") and facts["shards"].endswith("0 damaged rows")
    assert "15 rows with device CPU (1 threads), precision float32" in facts["encoded"]
    assert "PSNR" in facts["round trip"]
    after = cache_files(world)
    assert after[str(shard(world))] == before[str(shard(world))]
    assert set(after) - set(before) == {str(world / "latents_cache" / "latents.png")}


def test_a_flipped_bit_is_found_named_and_mended_by_the_next_run(world, encoder, capsys):
    preprocess(world)
    entry = stored_split(world).train[4]
    row = stored_moments(world / "latents_cache")[entry.key]
    data = bytearray(shard(world).read_bytes())
    data[data.index(row) + 100] ^= 1
    shard(world).write_bytes(data)
    code, facts, err = verify(world, capsys)
    assert code == 1
    assert facts["images"].startswith("15 asked for, 14 cached")
    assert facts["missing"] == f"1\n    {entry.class_name}/{entry.name}"
    assert facts["shards"].endswith("1 damaged rows")
    assert "1 of 15 rows are damaged" in err
    encoder.forget()
    assert preprocess(world) == 0
    assert encoder.num_images == 1
    assert stored_moments(world / "latents_cache")[entry.key] == row
    assert verify(world, capsys)[0] == 0


def test_stale_orphaned_and_deleted_images_are_told_apart(world, capsys):
    preprocess(world)
    edited, deleted = stored_split(world).train[3], stored_split(world).train[0]
    tiny.make_image(555).save(reading.image_path(world / "data", edited))
    reading.image_path(world / "data", deleted).unlink()
    code, facts, _ = verify(world, capsys)
    assert code == 1
    assert facts["images"].startswith("15 asked for, 14 cached")
    assert facts["stale"] == f"1\n    {edited.class_name}/{edited.name}"
    assert facts["missing"] == "0"
    assert facts["orphaned"].startswith("1 rows")  # of the content before the edit


def test_a_lost_shard_is_found(world, capsys):
    preprocess(world)
    shard(world).unlink()
    code, facts, _ = verify(world, capsys)
    assert code == 1
    assert facts["images"].startswith("15 asked for, 0 cached") and facts["missing"].startswith("15\n    ID_1/walk_")


def test_a_check_works_without_images_and_vae_and_names_other_spaces(world, capsys):
    preprocess(world, image_size=32)
    preprocess(world)
    shutil.rmtree(world / "data")
    (world / "vae.pt").unlink()
    code, facts, _ = verify(world, capsys)
    assert code == 0
    assert facts["images"] == "15 asked for, 15 cached (images not at hand, content not checked)"
    assert "image_size: 16 vs 32" in facts["also there"]
    assert "round trip" not in facts


def test_a_check_says_how_many_images_it_looked_at(world, tmp_path, capsys):
    preprocess(world)
    for entry in stored_split(world).train[:2]:
        reading.image_path(world / "data", entry).unlink()
    code, facts, _ = verify(world, capsys)
    assert code == 0 and facts["images"].endswith("15 cached (content checked of 13, the rest not at hand)")
    (tmp_path / "elsewhere" / "sub").mkdir(parents=True)
    code, facts, _ = verify(world, capsys, data_path=tmp_path / "elsewhere")
    assert code == 0 and facts["images"].endswith("15 cached (images not at hand, content not checked)")


def test_a_check_decodes_with_the_vae_of_the_cache_alone(world, capsys):
    preprocess(world)
    tiny_vae.save_tiny_vae(world / "other.pt", seed=1)
    for name, message in (("other.pt", "makes other latents than those of the cache"), ("gone.pt", "does not exist")):
        code, facts, err = verify(world, capsys, vae_path=world / name)
        assert code == 2 and message in err and not facts.keys() & {"images", "round trip"}
    (world / "other.pt").replace(world / "vae.pt")
    code, facts, err = verify(world, capsys)  # the manifest's own path, with another file
    assert code == 0 and "warning: nothing is decoded: " in err and "makes other latents" in err
    assert "round trip" not in facts and facts["images"].startswith("15 asked for, 15 cached")


def test_a_check_without_a_device_to_decode_on_is_a_check_all_the_same(world, capsys):
    preprocess(world)
    code, facts, err = verify(world, capsys, device="cuda:99")
    assert code == 0 and "warning: no preview.png: --device cuda:99 " in err
    assert "round trip" not in facts and facts["images"].startswith("15 asked for, 15 cached")


def test_a_cache_that_training_made_can_be_checked(world, capsys):
    assert pipeline.train(world, train_num_steps=5) == 0
    code, facts, _ = verify(world, capsys)
    assert code == 0 and facts["images"].startswith("15 asked for, 15 cached")
