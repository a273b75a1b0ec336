"""generate.py and the sampling below it: an image depends on its class and number alone, and none is made twice."""

import csv
import io
import json
import math
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pipeline
import pytest
import tiny
import torch
from PIL import Image
from pipeline import CLASSES, STEPS, generate, train

from gait_latents import export, settings
from gait_latents.common import cli, files, pictures
from gait_latents.common.errors import UserError
from gait_latents.common.seeds import sample_generator
from gait_latents.diffusion import build, model
from gait_latents.diffusion.sampling import BATCH_SIZE, nearest_class, num_solver_steps, sample_padded
from gait_latents.evaluation import plan as evaluation_plan
from gait_latents.evaluation import sweep
from gait_latents.images.split import read_split
from gait_latents.training import checkpoint, generation, run_folder, trained_model
from gait_latents.training import plan as training_plan
from gait_latents.vae import load
from gait_latents.vae.decoder import ImageDecoder
from gait_latents.vae.norm import LatentNorm


@pytest.fixture
def make(trained: Path, tmp_path: Path):
    """Runs generate.py on the finished run, into a folder of this name; returns the exit code."""

    def run(folder: str = "synthetic", **changes: object) -> int:
        return generate(trained, output_folder=tmp_path / folder, **changes)

    return run


def image_files(folder: Path) -> dict[str, bytes]:
    """Returns the content of each image by its name below the folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.glob("*/*"))}


def labels_of(folder: Path) -> list[list[str]]:
    return list(csv.reader(io.StringIO((folder / "labels.csv").read_text())))


# --- one folder of images per class ------------------------------------------------------------------------


def test_each_class_has_its_folder_of_images_and_a_row_in_the_labels(make, trained, tmp_path, capsys):
    assert make() == 0
    folder = tmp_path / "synthetic"
    names = [f"{name}/{name}_{number:06d}.jpg" for name in sorted(CLASSES) for number in range(2)]
    assert list(image_files(folder)) == names
    for name in names:
        with Image.open(folder / name) as image:
            assert image.size == (16, 16) and image.format == "JPEG" and image.mode == "RGB"
    rows = [["file", "class", "label"]]
    rows += [[f"{name}/{name}_{i:06d}.jpg", name, str(label)] for label, name in enumerate(CLASSES) for i in range(2)]
    assert labels_of(folder) == rows
    record = json.loads((folder / "settings.json").read_text())
    assert record["step"] == STEPS and record["cond_scale"] == 1.5 and record["seed"] == 42
    assert record["sampling_timesteps"] == 2 and record["image_format"] == "jpg"  # as the run had them
    blank = [[np.zeros((16, 16, 3), dtype=np.uint8)] * 2] * 3
    with Image.open(folder / "overview.png") as overview:
        assert overview.size == pictures.labelled_grid(blank, CLASSES).size
    said = capsys.readouterr().out
    assert "6 images made in" in said
    assert f"evaluate_images.py --checkpoint {trained / 'results'} --synthetic_path {folder}\n" in said


def test_an_image_does_not_depend_on_what_else_is_asked_for(make, tmp_path):
    assert make("whole", images_per_class=5) == 0
    assert make("grown", images_per_class=2) == 0
    first = image_files(tmp_path / "grown")
    assert make("grown", images_per_class=5) == 0
    assert make("chosen", images_per_class=3, classes=["ID_10", "ID_2"]) == 0
    whole = image_files(tmp_path / "whole")
    assert len(whole) == 15 and len(set(whole.values())) == 15
    assert image_files(tmp_path / "grown") == whole and first.items() < whole.items()
    chosen = image_files(tmp_path / "chosen")
    assert set(chosen) == {f"{name}/{name}_{i:06d}.jpg" for name in ("ID_2", "ID_10") for i in range(3)}
    assert chosen.items() < whole.items()
    assert labels_of(tmp_path / "grown") == labels_of(tmp_path / "whole")
    assert [row[2] for row in labels_of(tmp_path / "chosen")[1:]] == ["1"] * 3 + ["2"] * 3


def test_a_class_has_as_many_images_as_are_asked_for_and_each_is_the_same_as_ever(make, tmp_path, capsys):
    assert make("whole", images_per_class=4) == 0
    capsys.readouterr()
    assert make("some", images_per_class=["ID_10=4", "ID_1=1", "2"]) == 0
    assert "\n7 images: 1 of ID_1, 2 of ID_2, 4 of ID_10\n" in capsys.readouterr().out
    some = image_files(tmp_path / "some")
    asked = {"ID_1": 1, "ID_2": 2, "ID_10": 4}
    assert set(some) == {f"{name}/{name}_{i:06d}.jpg" for name, count in asked.items() for i in range(count)}
    assert some.items() < image_files(tmp_path / "whole").items()
    assert make("some", images_per_class=["ID_2=3", "1"]) == 0  # which keeps what is there
    assert "\n4 of the images are already there\n" in (said := capsys.readouterr().out) and "1 images made in" in said
    assert len(labels_of(tmp_path / "some")) == 1 + 8
    assert image_files(tmp_path / "some").items() < image_files(tmp_path / "whole").items()


def test_a_class_without_a_number_of_its_own_gets_the_default(trained, tmp_path):
    flags = {"checkpoint": trained / "results", "output_folder": tmp_path / "out", "device": "cpu"}
    generator = generation.open_generator(tiny.flags({**flags, "images_per_class": "ID_1=3"}))
    assert generator.counts == {"ID_1": 3, "ID_2": 50, "ID_10": 50}


@pytest.mark.parametrize(
    ("words", "counts"),
    [
        (["ID_1=3", "ID_*=2"], {"ID_1": 3, "ID_2": 2, "ID_10": 2}),
        (["ID_*=2", "ID_1=3"], {"ID_1": 3, "ID_2": 2, "ID_10": 2}),
        (["ID_1=3", "ID_1*=4", "ID_*=2", "7"], {"ID_1": 3, "ID_2": 2, "ID_10": 4}),
    ],
)
def test_the_number_of_a_name_wins_over_that_of_a_pattern_in_any_order(trained, tmp_path, words, counts):
    flags = {"checkpoint": trained / "results", "output_folder": tmp_path / "out", "device": "cpu"}
    assert generation.open_generator(tiny.flags({**flags, "images_per_class": words})).counts == counts


def test_classes_are_filled_up_to_a_number_with_their_training_images_counted(trained, make, tmp_path, capsys):
    results = shutil.copytree(trained / "results", tmp_path / "results")
    split = read_split(results)
    assert split is not None and len(split.train) == 15 and len(split.test) == 9
    train = tuple(e for e in split.train if e.class_name != "ID_2" or e.name == "walk_0.jpg")
    fewer = len([entry for entry in train if entry.class_name == "ID_2"])
    (results / "split.json").write_bytes(replace(split, train=train).to_bytes())
    assert make(checkpoint=results, images_per_class=None, fill_up_to=5) == 0
    told = f"{5 - fewer} images fill the classes up to 5, the training images counted: {5 - fewer} of ID_2, none of"
    assert told in capsys.readouterr().out
    assert set(image_files(tmp_path / "synthetic")) == {f"ID_2/ID_2_{i:06d}.jpg" for i in range(5 - fewer)}
    assert make(checkpoint=results, images_per_class=None, fill_up_to=6) == 0
    assert f"{8 - fewer} images fill the classes up to 6" in (said := capsys.readouterr().out)
    assert f"{5 - fewer} of the images are already there" in said
    assert len(image_files(tmp_path / "synthetic")) == 8 - fewer


def test_of_two_numbers_of_images_a_flag_wins_over_a_file(trained, tmp_path, monkeypatch):
    path = tmp_path / "settings.yaml"
    flags = {"checkpoint": trained / "results", "output_folder": tmp_path / "out", "device": "cpu", "config": path}
    for text, typed, count in (
        ("images_per_class: 4", {"fill_up_to": 7}, 2),
        ("fill_up_to: 7", {"images_per_class": 4}, 4),
        ("fill_up_to: 7", {}, 2),
    ):
        path.write_text(text)
        generator = generation.open_generator(tiny.flags({**flags, **typed}))
        assert generator.counts == dict.fromkeys(CLASSES, count)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"images_per_class": ["ID_9=5", "2"]},
            "--images_per_class: the model has no class ID_9; did you mean ID_2? it has ID_1, ID_2, ID_10",
        ),
        (
            {"images_per_class": "ID_1=5", "classes": ["ID_2", "ID_10"]},
            "--images_per_class names ID_1, which --classes leaves out; leave it out here, too",
        ),
        (
            {"images_per_class": ["ID_1=3", "ID_[1]=2"]},
            "--images_per_class has two numbers for ID_1, ID_1=3 and ID_[1]=2; leave one of them out",
        ),
        ({"images_per_class": 2, "fill_up_to": 9}, "--images_per_class and --fill_up_to both say how many images"),
        ({"images_per_class": None, "fill_up_to": 5}, "--fill_up_to is 5, but each of these classes has 5 or more"),
    ],
)
def test_numbers_of_images_that_cannot_be_are_refused_before_anything_is_written(make, tmp_path, capsys, changes, told):
    assert make(**changes) == 2
    assert told in pipeline.one_error(capsys) and not (tmp_path / "synthetic").exists()


def test_without_the_list_of_training_images_classes_are_not_filled_up(trained, make, tmp_path, capsys):
    place = shutil.copy(trained / "results" / run_folder.ema_name(STEPS), tmp_path)
    assert make(checkpoint=place, images_per_class=None, fill_up_to=9) == 2
    told = f"--fill_up_to needs the list of the training images, but in {tmp_path} there is no split.json; say how many"
    assert told in pipeline.one_error(capsys)
    split = read_split(trained / "results")
    assert split is not None
    other = replace(split, classes=("ID_1", "ID_2", "ID_10", "ID_11"))
    (tmp_path / "split.json").write_bytes(other.to_bytes())
    assert make(checkpoint=place, images_per_class=None, fill_up_to=9) == 2
    assert f"but in {tmp_path} split.json is of another run; say how many" in pipeline.one_error(capsys)


def test_the_labels_list_the_images_that_were_made_and_no_strange_file(make, tmp_path):
    assert make(images_per_class=1) == 0
    folder = tmp_path / "synthetic" / "ID_1"
    before = labels_of(tmp_path / "synthetic")
    for name in (
        "other.jpg",
        "ID_1_5.jpg",
        "ID_1_0000005.jpg",
        "ID_2_000005.jpg",
        "ID_1_00000a.jpg",
        "ID_1_000005.png",
    ):
        shutil.copy(folder / "ID_1_000000.jpg", folder / name)
    (folder / "ID_1_000007.jpg").mkdir()
    assert make(images_per_class=1) == 0
    assert labels_of(tmp_path / "synthetic") == before
    shutil.copy(folder / "ID_1_000000.jpg", folder / "ID_1_1234567.jpg")  # as the image of this number is called
    assert make(images_per_class=1) == 0
    assert [row[0] for row in labels_of(tmp_path / "synthetic")][1:3] == [
        "ID_1/ID_1_000000.jpg",
        "ID_1/ID_1_1234567.jpg",
    ]


@pytest.mark.parametrize("place", ["", "synthetic", "ID_1", "../data/more"])
@pytest.mark.parametrize("how", [{}, {"strip": [1.0, 2.0]}])
def test_generated_images_do_not_become_a_class(trained, capsys, place, how):
    before = sorted((trained / "data").rglob("*"))
    assert generate(trained, output_folder=trained / "data" / place, **how) == 2
    assert "is among the class folders of --data_path" in pipeline.one_error(capsys)
    assert sorted((trained / "data").rglob("*")) == before


def test_a_rerun_makes_only_what_is_missing(make, tmp_path, monkeypatch, capsys):
    assert make() == 0
    folder = tmp_path / "synthetic"
    before = image_files(folder)
    (folder / "ID_2" / "ID_2_000001.jpg").unlink()
    kept = folder / "ID_1" / "ID_1_000000.jpg"
    time_kept = kept.stat().st_mtime_ns
    capsys.readouterr()
    assert make() == 0
    said = capsys.readouterr().out
    assert "5 of the images are already there" in said and "1 images made in" in said
    assert image_files(folder) == before and kept.stat().st_mtime_ns == time_kept
    monkeypatch.setattr(trained_model, "sample_padded", lambda *a, **k: pytest.fail("sampled"))
    assert make() == 0


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"cond_scale": 1}, "cond_scale 1.5, now it is 1.0"),
        ({"guidance_interval": [0, 0.5]}, "guidance_interval [0.0, 1.0], now it is [0.0, 0.5]"),
        ({"seed": 1}, "seed 42, now it is 1"),
        ({"sampling_timesteps": 3}, "sampling_timesteps 2, now it is 3"),
        ({"sampler": "ddim"}, "sampler dpm++, now it is ddim"),
        ({"image_format": "png"}, "image_format jpg, now it is png"),
        ({"precision": "bfloat16"}, "precision float32, now it is bfloat16"),
    ],
)
def test_other_settings_into_the_same_folder_are_refused(make, tmp_path, capsys, changes, word):
    assert make(images_per_class=1, classes="ID_1") == 0
    before = {path: path.read_bytes() for path in (tmp_path / "synthetic").rglob("*") if path.is_file()}
    assert make(images_per_class=1, classes="ID_1", **changes) == 2
    error = pipeline.one_error(capsys)
    assert f"holds images made with {word}" in error and "give another --output_folder" in error
    assert {path: path.read_bytes() for path in (tmp_path / "synthetic").rglob("*") if path.is_file()} == before


def test_images_of_another_checkpoint_are_refused_in_the_same_folder(trained, make, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(trained / "results", other)
    for path in other.glob(f"*-{STEPS:08d}.safetensors"):
        path.unlink()
    assert make() == 0
    assert make(checkpoint=other) == 2
    assert "holds images made with weights" in pipeline.one_error(capsys)


def test_a_folder_made_before_there_was_an_interval_counts_as_guided_on_the_whole_way(make, tmp_path, capsys):
    assert make(images_per_class=1) == 0
    whole = image_files(tmp_path / "synthetic")
    record_path = tmp_path / "synthetic" / "settings.json"
    record = json.loads(record_path.read_text())
    assert [record.pop(name) for name in ("guidance_interval", "decoder_precision")] == [[0, 1], "float32"]
    record_path.write_text(json.dumps(record))
    (tmp_path / "synthetic" / "ID_2" / "ID_2_000000.jpg").unlink()
    assert make(images_per_class=1, guidance_interval=[0, 0.5]) == 2
    assert "guidance_interval [0.0, 1.0], now it is" in pipeline.one_error(capsys)
    assert make(images_per_class=1) == 0
    assert image_files(tmp_path / "synthetic") == whole


@pytest.mark.parametrize("was_compiled", [True, False])
def test_a_folder_of_a_version_that_compiled_the_network_goes_on(make, tmp_path, was_compiled):
    assert make(images_per_class=1) == 0
    whole = image_files(tmp_path / "synthetic")
    record_path = tmp_path / "synthetic" / "settings.json"
    record = json.loads(record_path.read_text())
    assert "compiled" not in record
    record_path.write_text(json.dumps({**record, "compiled": was_compiled}, indent=2))
    before = record_path.read_bytes()
    (tmp_path / "synthetic" / "ID_2" / "ID_2_000000.jpg").unlink()
    assert make(images_per_class=1) == 0
    assert image_files(tmp_path / "synthetic") == whole and record_path.read_bytes() == before


def test_an_interval_is_told_with_the_passes_that_it_leaves(make, tmp_path, capsys):
    assert make("whole", images_per_class=1, sampling_timesteps=4, image_format="png") == 0
    assert "guidance 1.5, 4 steps of dpm++ (8 network passes), float32" in capsys.readouterr().out
    assert make("part", images_per_class=1, sampling_timesteps=4, image_format="png", guidance_interval=[0, 0.5]) == 0
    told = "guidance 1.5 from 0 to 0.5 of the way, 4 steps of dpm++ (6 network passes), float32"
    assert told in capsys.readouterr().out
    assert image_files(tmp_path / "whole") != image_files(tmp_path / "part")


@pytest.fixture
def old_run(trained: Path, tmp_path: Path, monkeypatch) -> Path:
    """Makes the finished run one from before there was an interval, in a time when its default is another."""
    results = tmp_path / "results"
    shutil.copytree(trained / "results", results)
    for path in results.glob("*.safetensors"):
        tensors, meta = checkpoint.load(path)
        assert meta["settings"].pop("guidance_interval") == [0.0, 1.0]
        path.unlink()
        checkpoint.save(path, tensors, meta)
    defaults = cli.defaults

    def of_later(cls: type) -> dict:
        known = defaults(cls)
        return known | {"guidance_interval": (0.3, 0.4)} if "guidance_interval" in known else known

    monkeypatch.setattr(cli, "defaults", of_later)
    return results


def test_an_old_run_is_guided_on_the_whole_way_whatever_the_default_is_now(trained, make, tmp_path, old_run):
    assert make("old", checkpoint=old_run) == 0
    assert make("new") == 0  # from the run that says so
    assert image_files(tmp_path / "old") == image_files(tmp_path / "new")
    flags = {"checkpoint": old_run, "output_folder": tmp_path / "out"}
    assert export.main(tiny.flags({**flags, "ddim_steps": 4})) == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["guidance"] == [1.5] * 4
    plan = evaluation_plan.make_plan(tiny.flags({**flags, "device": "cpu"}))
    assert sweep.sampling_settings(plan).guidance_interval == (0, 1)
    goes_on = training_plan.make_plan(pipeline.train_flags(trained, results_folder=old_run, train_num_steps=99))
    assert goes_on.settings.guidance_interval == (0, 1)
    begins = training_plan.make_plan(pipeline.train_flags(trained, results_folder=tmp_path / "begun"))
    assert begins.settings.guidance_interval == (0.3, 0.4)


def test_an_interrupted_run_keeps_its_images_and_goes_on(make, tmp_path, monkeypatch):
    assert make("whole", images_per_class=7) == 0
    make_batch = generation.Generator._make_batch

    def interrupted(self, *args) -> None:
        make_batch(self, *args)
        os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(generation.Generator, "_make_batch", interrupted)
        assert make("part", images_per_class=7) == 130
    part = image_files(tmp_path / "part")
    assert len(part) == BATCH_SIZE == len(labels_of(tmp_path / "part")) - 1
    assert make("part", images_per_class=7) == 0
    assert image_files(tmp_path / "part") == image_files(tmp_path / "whole")


def test_a_signal_within_a_batch_keeps_the_images_decoded_by_then(make, tmp_path, monkeypatch, capsys):
    assert make("whole", images_per_class=7) == 0
    capsys.readouterr()
    to_uint8, decoded = pictures.to_uint8, []

    def decode(image: torch.Tensor) -> np.ndarray:
        decoded.append(image)
        if len(decoded) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return to_uint8(image)

    with monkeypatch.context() as patch:
        patch.setattr(pictures, "to_uint8", decode)
        assert make("part", images_per_class=7) == 143
    assert "SIGTERM: stopping after this image; a second Ctrl-C ends at once\n" in capsys.readouterr().err
    assert len(image_files(tmp_path / "part")) == 3
    assert make("part", images_per_class=7) == 0
    assert image_files(tmp_path / "part") == image_files(tmp_path / "whole")


def test_a_signal_ends_the_sampling_after_a_step_of_the_solver(make, tmp_path, monkeypatch):
    sample = model.LatentDiffusion.sample

    def interrupted(self, *args, progress, **facts) -> torch.Tensor:
        os.kill(os.getpid(), signal.SIGINT)
        return sample(self, *args, progress=lambda: (progress(), pytest.fail("it went on")), **facts)

    monkeypatch.setattr(model.LatentDiffusion, "sample", interrupted)
    assert make("part", images_per_class=7) == 130
    assert not image_files(tmp_path / "part")


def test_a_file_that_cannot_be_written_ends_the_work_in_one_line_and_the_rest_is_made_later(
    make, tmp_path, monkeypatch, capsys
):
    assert make("whole", images_per_class=20) == 0
    publish, samplings = files.publish, []

    def full_disk(path: Path, data: bytes) -> None:
        if path.name == "ID_1_000003.jpg":
            raise OSError(28, "No space left on device", str(path))
        publish(path, data)

    def noted(*args, **facts) -> torch.Tensor:
        samplings.append(1)
        return sample_padded(*args, **facts)

    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(files, "publish", full_disk)
        patch.setattr(trained_model, "sample_padded", noted)
        assert make("part", images_per_class=20) == 1
    error = pipeline.one_error(capsys)
    assert "ID_1_000003.jpg" in error and "No space left on device" in error
    assert 0 < len(samplings) < 4  # of the four batches
    part, whole = image_files(tmp_path / "part"), image_files(tmp_path / "whole")
    assert part.items() < whole.items()
    assert len(labels_of(tmp_path / "part")) == 1 + len(part)
    assert make("part", images_per_class=20) == 0
    assert image_files(tmp_path / "part") == whole


# --- what to make them from --------------------------------------------------------------------------------


def test_the_state_and_the_average_of_a_step_and_the_folder_give_the_same_images(trained, make, tmp_path):
    results = trained / "results"
    places = [results, results / run_folder.ema_name(STEPS), results / run_folder.full_name(STEPS)]
    made = []
    for number, place in enumerate(places):
        assert make(str(number), checkpoint=place, images_per_class=1) == 0
        made.append(image_files(tmp_path / str(number)))
    assert made[0] == made[1] == made[2]


def test_a_damaged_average_falls_back_and_says_so(trained, make, tmp_path, capsys):
    results = tmp_path / "results"
    shutil.copytree(trained / "results", results)
    damaged = results / run_folder.ema_name(STEPS)
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert make(checkpoint=results, images_per_class=1) == 0
    captured = capsys.readouterr()
    assert damaged.name in captured.err and "taking the one before" in captured.err
    assert f"{run_folder.full_name(STEPS)} (step {STEPS})" in captured.out  # holds the same average


def test_the_images_are_what_the_averaged_network_and_the_decoder_give(trained, make, tmp_path):
    assert make(image_format="png", images_per_class=1, sampler="ddim", sampling_timesteps=3, cond_scale=3) == 0
    state = run_folder.newest_averages(trained / "results")
    assert state is not None
    network = build.build_diffusion(state.meta.settings, num_classes=3, latent_shape=(4, 8, 8))
    network.load_state_dict({name.removeprefix("ema."): tensor for name, tensor in state.tensors.items()})
    norm, decoder = state.meta.latent_norm, load.load_vae(trained / "vae.pt", "cpu")
    for label, name in enumerate(CLASSES):
        sample = network.sample(
            torch.tensor([label]),
            [sample_generator(42, "image", name, 0)],
            cond_scale=3.0,
            guidance_interval=(0, 1),
            sampler="ddim",
            sampling_timesteps=3,
        )
        expected = decoder.decode(norm.to_unscaled(sample))[0].permute(1, 2, 0).numpy() * 255
        found = np.asarray(Image.open(tmp_path / "synthetic" / name / f"{name}_000000.png"))
        assert np.abs(found - expected).max() < 0.51  # rounded, and of a batch of another size


def test_guidance_one_and_zero_run_and_differ_from_two(make, tmp_path):
    for scale in (0, 1, 2):
        assert make(str(scale), cond_scale=scale, images_per_class=1, image_format="png") == 0
    made = [image_files(tmp_path / str(scale)) for scale in (0, 1, 2)]
    assert made[0] != made[1] != made[2] != made[0]


def test_another_seed_gives_other_images(make, tmp_path):
    assert make("a", images_per_class=1, seed=1) == 0
    assert make("b", images_per_class=1, seed=2) == 0
    assert not set(image_files(tmp_path / "a").values()) & set(image_files(tmp_path / "b").values())


def test_the_format_follows_the_training_images_unless_another_is_asked_for(world, tmp_path):
    shutil.rmtree(world / "data")
    tiny.make_images(world / "data", dict.fromkeys(CLASSES, 5), suffix=".png")
    assert pipeline.train(world, train_num_steps=1, num_samples=0) == 0
    assert generate(world, images_per_class=1) == 0
    assert {Path(name).suffix for name in image_files(world / "synthetic")} == {".png"}
    assert [row[0] for row in labels_of(world / "synthetic")[1:]] == [f"{n}/{n}_000000.png" for n in CLASSES]
    assert generate(world, images_per_class=1, image_format="jpg", output_folder=tmp_path / "jpg") == 0
    assert {Path(name).suffix for name in image_files(tmp_path / "jpg")} == {".jpg"}


def test_without_the_vae_nothing_is_made_and_the_error_says_why(trained, make, tmp_path, capsys):
    assert make(vae_path=tmp_path / "gone.pt") == 2
    error = pipeline.one_error(capsys)
    assert "gone.pt" in error
    assert not (tmp_path / "synthetic").exists()


def test_the_encoder_and_the_training_images_are_not_needed(world, encoder):
    assert pipeline.train(world, train_num_steps=1, num_samples=0) == 0
    shutil.rmtree(world / "data")
    shutil.rmtree(world / "latents_cache")
    encoder.forget()
    assert generate(world, images_per_class=1) == 0
    assert encoder.built == ["decoder"]


# --- the strip ---------------------------------------------------------------------------------------------


def test_the_strip_shows_classes_by_guidance_scales_and_makes_nothing_else(make, tmp_path):
    assert make("strip", strip=[0, 2, 4], classes=["ID_1", "ID_10"]) == 0
    assert [path.name for path in (tmp_path / "strip").iterdir()] == ["strip.png"]
    strip = np.asarray(Image.open(tmp_path / "strip" / "strip.png"))
    assert make("images", image_format="png", images_per_class=1, cond_scale=2) == 0
    blank = [[np.zeros((16, 16, 3), dtype=np.uint8)] * 3] * 2
    empty = pictures.labelled_grid(blank, ["ID_1", "ID_10"], ["0", "2", "4"])
    assert strip.shape == (empty.height, empty.width, 3)
    for row, name in enumerate(["ID_1", "ID_10"]):
        top, left = empty.height - 20 * (2 - row), empty.width - 20 * 2  # of the second column: guidance 2
        image = np.asarray(Image.open(tmp_path / "images" / name / f"{name}_000000.png"))
        assert np.array_equal(strip[top : top + 16, left : left + 16], image)


# --- sampling ----------------------------------------------------------------------------------------------


def test_a_sample_does_not_depend_on_how_many_are_asked_for(trained):
    plan = training_plan.make_plan(pipeline.train_flags(trained))
    assert plan.state is not None
    network = build.build_diffusion(plan.state.meta.settings, num_classes=3, latent_shape=(4, 8, 8))
    how = {
        "dtype": torch.float32,
        "cond_scale": 2.0,
        "guidance_interval": (0, 1),
        "sampler": "dpm++",
        "sampling_timesteps": 2,
    }

    def sample(labels: list[int]) -> torch.Tensor:
        return sample_padded(network, labels, [sample_generator(0, "sample", label) for label in labels], **how)

    together = sample([2, 0, 1])
    assert together.shape == (3, 4, 8, 8)
    for row, label in enumerate([2, 0, 1]):
        assert torch.equal(sample([label])[0], together[row])
    assert torch.equal(sample([0] * BATCH_SIZE)[7], together[1])


def test_the_nearest_class_is_the_one_of_the_least_distance():
    generator = torch.Generator().manual_seed(0)
    samples = torch.randn(7, 2, 3, 3, generator=generator)
    means = torch.randn(4, 2, 3, 3, generator=generator)
    distances = [[float(((s - m) ** 2).sum()) for m in means] for s in samples]
    assert nearest_class(samples, means).tolist() == [row.index(min(row)) for row in distances]


def test_the_nearest_class_is_found_where_all_are_far_from_zero():
    generator = torch.Generator().manual_seed(0)
    means = 1e4 + torch.randn(31, 4, 4, 4, generator=generator)  # whose squares leave no digit for the differences
    labels = torch.arange(31).repeat(2)
    samples = means[labels] + 0.1 * torch.randn(62, 4, 4, 4, generator=generator)
    assert torch.equal(nearest_class(samples, means), labels)


def test_the_number_of_solver_steps():
    def auto(sampler: str, timesteps: int) -> int:
        return num_solver_steps(sampler, "auto", timesteps, auto_steps={"dpm++": 12, "ddim": 250})

    assert [auto(sampler, 1000) for sampler in ("dpm++", "ddim", "ddpm")] == [12, 250, 1000]
    assert [auto(sampler, 10) for sampler in ("dpm++", "ddim", "ddpm")] == [10, 10, 10]
    assert num_solver_steps("ddim", 7, 1000, auto_steps={}) == 7
    with pytest.raises(UserError, match="the model has 10 timesteps"):
        num_solver_steps("ddim", 11, 10, auto_steps={})


def test_on_a_cpu_the_decoder_computes_in_bfloat16_with_the_network_and_hardly_differs(trained, make, tmp_path):
    flags = {"images_per_class": 1, "image_format": "png", "precision": "bfloat16"}
    assert make("images", **flags) == 0
    assert json.loads((tmp_path / "images" / "settings.json").read_text())["decoder_precision"] == "bfloat16"
    words = tiny.flags({"checkpoint": trained / "results", "device": "cpu", **flags})
    generator = generation.open_generator(words)
    samples = generator.sample([0, 1, 2], [0, 0, 0], 1.5)
    generator.decoder.dtype = torch.float32
    for name, exact in zip(CLASSES, generator.decoder(samples), strict=True):
        found = np.asarray(Image.open(tmp_path / "images" / name / f"{name}_000000.png"))
        assert 30 < pictures.psnr(exact, found) < math.inf


def test_a_folder_goes_on_in_the_number_format_in_which_its_images_were_decoded(make, tmp_path, capsys):
    flags = {"images_per_class": 1, "image_format": "png", "precision": "bfloat16"}
    assert make(**flags) == 0
    narrow = image_files(tmp_path / "synthetic")
    record_path = tmp_path / "synthetic" / "settings.json"
    record = json.loads(record_path.read_text())
    record_path.write_text(json.dumps({**record, "decoder_precision": "float32"}))
    for path in (tmp_path / "synthetic").glob("*/*.png"):
        path.unlink()
    assert make(**flags) == 0
    assert json.loads(record_path.read_text())["decoder_precision"] == "float32"
    assert image_files(tmp_path / "synthetic") != narrow
    for unknown in ("float8", ["float32"]):
        record_path.write_text(json.dumps({**record, "decoder_precision": unknown}))
        capsys.readouterr()
        assert make(**flags) == 2
        assert f"made with decoder_precision {unknown}, now it is bfloat16" in pipeline.one_error(capsys)


@pytest.mark.parametrize(("factor", "expected"), [(1.0, torch.float16), (1e5, torch.float32)])
def test_the_decoder_gives_up_a_number_format_that_would_change_images(trained, tmp_path, capsys, factor, expected):
    state = torch.load(trained / "vae.pt", weights_only=True)
    weights = state.get("state_dict", state)
    weights["decoder.conv_in.weight"] *= factor  # what float16 cannot hold; the normalisation after it undoes it
    torch.save(state, tmp_path / "vae.pt")
    norm = LatentNorm(torch.zeros(4), torch.ones(4))
    samples = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    narrow, exact = (
        ImageDecoder(str(tmp_path / "vae.pt"), norm, torch.device("cpu"), dtype=dtype)
        for dtype in (torch.float16, torch.float32)
    )
    images, exact_images = narrow(samples), exact(samples)
    assert narrow.dtype == expected
    warning = "warning: images are decoded in float32, as float16 would change them (PSNR -inf dB)"  # not finite
    told = warning in capsys.readouterr().err
    assert told is np.array_equal(images, exact_images) is (expected == torch.float32)


@pytest.mark.parametrize("how", [{}, {"strip": [1.0]}])
def test_all_is_sampled_with_the_same_matrix_products(make, monkeypatch, how):
    torch.backends.cuda.matmul.allow_tf32 = False  # as torch begins; each script sets it
    seen, sample = set(), model.LatentDiffusion.sample

    def noted(*args, **kwargs) -> torch.Tensor:
        seen.add(torch.backends.cuda.matmul.allow_tf32)
        return sample(*args, **kwargs)

    monkeypatch.setattr(model.LatentDiffusion, "sample", noted)
    assert make(**how) == 0
    assert seen == {True}


@pytest.mark.parametrize("how", [{}, {"strip": [1.0]}])
def test_samples_that_the_number_format_cannot_hold_are_refused(trained, tmp_path, capsys, how):
    root = shutil.copytree(trained, tmp_path / "world")
    state = run_folder.newest_averages(root / "results")
    assert state is not None
    weights = dict(state.tensors)
    (name,) = [name for name in weights if name.startswith("ema.") and name.endswith("final_conv.weight")]
    weights[name] = weights[name] * 1e6  # what float16 cannot hold
    checkpoint.save(state.path, weights, state.meta.to_json())
    flags = {"checkpoint": state.path, "precision": "float16", "output_folder": tmp_path / "synthetic", **how}
    assert generate(root, **flags) == 1
    told = pipeline.one_error(capsys)
    assert "the samples in float16 are not finite, of ID_1 at guidance 1" in told and "give --precision float32" in told
    assert not list((tmp_path / "synthetic").glob("*/*")) and not (tmp_path / "synthetic" / "strip.png").exists()
    assert generate(root, **flags, **({} if how else {"images_per_class": 1})) == 1
    assert generate(root, **{**flags, "output_folder": tmp_path / "other", "precision": "float32"}) == 0


def test_an_image_that_the_number_format_of_the_decoder_cannot_hold_is_decoded_in_float32(trained):
    norm = LatentNorm(torch.zeros(4), torch.ones(4))
    samples = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    samples[1] *= 1e6  # more than float16 can hold, and than the noise that the number format was tried with
    narrow, exact = (
        ImageDecoder(str(trained / "vae.pt"), norm, torch.device("cpu"), dtype=dtype)
        for dtype in (torch.float16, torch.float32)
    )
    images, exact_images = narrow(samples), exact(samples)
    assert narrow.dtype == torch.float16
    assert [np.array_equal(a, b) for a, b in zip(images, exact_images, strict=True)] == [False, True, False]


def test_the_decoder_is_built_when_needed_and_each_image_is_decoded_by_itself(trained, encoder):
    norm = LatentNorm(torch.full((4,), 0.5), torch.full((4,), 2.0))
    decoder = ImageDecoder(str(trained / "vae.pt"), norm, torch.device("cpu"))
    assert encoder.built == []
    samples = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    whole = decoder(samples)
    assert [np.array_equal(decoder(samples[i : i + 1])[0], whole[i]) for i in range(3)] == [True] * 3
    assert encoder.built == ["decoder"]
    decoder.close()
    assert np.array_equal(decoder(samples[:1])[0], whole[0]) and encoder.built == ["decoder"] * 2
    expected = load.load_vae(trained / "vae.pt", "cpu").decode(samples[:1] * 2 + 0.5)
    assert np.abs(whole[0] - expected[0].permute(1, 2, 0).numpy() * 255).max() < 0.51


def test_auto_means_what_it_did_when_the_run_began(trained, tmp_path):
    root = shutil.copytree(trained, tmp_path / "world")
    state = run_folder.newest_state(root / "results")
    assert state is not None and state.meta.auto_steps == settings.AUTO_STEPS
    flags = {"checkpoint": state.path, "sampling_timesteps": "auto", "device": "cpu"}

    def told(**changes: object) -> str:
        return generation.open_generator(tiny.flags({**flags, **changes})).description

    assert ", 12 steps of dpm++ " in told()
    tensors, meta = checkpoint.load(state.path)
    del meta["auto_steps"]  # as in the checkpoints of earlier versions
    checkpoint.save(state.path, tensors, meta)
    assert ", 20 steps of dpm++ " in told()
    assert ", 250 steps of ddim " in told(sampler="ddim")
    assert train(root, train_num_steps=state.step + 1, num_samples=0) == 0  # which goes on
    gone_on = run_folder.newest_state(root / "results")
    assert gone_on is not None and gone_on.step == state.step + 1 and gone_on.meta.auto_steps["dpm++"] == 20
