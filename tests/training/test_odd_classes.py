"""Classes of odd names go the whole way: named in every script, trained on, and made again under their names."""

import csv
import json
import os
import shutil
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import pipeline
import pytest
import tiny
import tiny_vae

import evaluate_images
import generate as generate_script
import train_latent_cfg
from gait_latents.common import files
from gait_latents.images import generated, names, reading
from gait_latents.images.split import read_split
from gait_latents.training import generation

COMPOSED, DECOMPOSED = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
LONG_ASCII, LONG_CJK = "a" * 250, "步" * 82


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step on classes of odd names, to be looked at alone."""
    root = tmp_path_factory.mktemp("odd")
    tiny.make_images(root / "data", dict.fromkeys([LONG_ASCII, LONG_CJK, "all", "none", DECOMPOSED], 2), size=16)
    tiny_vae.save_tiny_vae(root / "vae.pt")
    assert pipeline.train(root, images_per_user=2, train_num_steps=1, num_samples=0) == 0
    return root


def made(root: Path, tmp_path: Path, *classes: str) -> list[str]:
    """Returns the folders of the images that are made of these classes."""
    folder = tmp_path / "synthetic"
    shutil.rmtree(folder, ignore_errors=True)
    assert pipeline.generate(root, classes=list(classes), images_per_class=1, output_folder=folder) == 0
    return sorted(path.name for path in folder.iterdir() if path.is_dir())


def test_names_as_long_as_a_file_name_may_be_are_trained_on_and_made(odd, tmp_path):
    assert made(odd, tmp_path, "a*", "步*") == sorted([LONG_ASCII, LONG_CJK, "all"])
    (path,) = (tmp_path / "synthetic" / LONG_CJK).iterdir()
    assert path.name.startswith("步步") and path.name.endswith("_000000.jpg") and len(os.fsencode(path.name)) > 250
    rows = list(csv.reader((tmp_path / "synthetic" / "labels.csv").read_text().splitlines()))
    assert [f"{LONG_CJK}/{path.name}", LONG_CJK, "4"] in rows


def test_file_names_stay_as_they_were_where_they_fit():
    assert generated.file_name("ID_1", 7, ".jpg") == "ID_1_000007.jpg"
    assert generated.file_name("a" * 244, 7, ".jpg") == "a" * 244 + "_000007.jpg"
    assert generated.file_name("a" * 245, 7, ".jpg") == "a" * 244 + "_000007.jpg"


def test_classes_called_all_and_none_and_either_form_of_a_name_can_be_given(odd, tmp_path, capsys):
    assert made(odd, tmp_path, "[a]ll") == ["all"]
    assert made(odd, tmp_path, "none", COMPOSED) == sorted([DECOMPOSED, "none"])
    assert made(odd, tmp_path, DECOMPOSED) == [DECOMPOSED]
    capsys.readouterr()
    assert len(made(odd, tmp_path, "all")) == 5
    assert '--classes all is every class; --classes "[a]ll" is the one of that name' in capsys.readouterr().out


def test_a_run_goes_on_where_the_disk_has_its_names_in_the_other_form(odd, tmp_path):
    root = shutil.copytree(odd, tmp_path / "moved")
    (root / "data" / DECOMPOSED).rename(root / "data" / COMPOSED)
    shutil.rmtree(root / "latents_cache")  # so that the images are read again
    assert pipeline.train(root, images_per_user=2, train_num_steps=2, num_samples=0) == 0
    split = read_split(root / "results")
    assert split is not None and DECOMPOSED in split.classes


def test_named_classes_are_a_setting_of_the_cache_and_of_the_run(world, capsys):
    named = {"class_names": ["ID_1?", "ID_2"], "images_per_user": 5}
    assert pipeline.preprocess(world, **named) == 0
    assert "images: 2 classes (ID_2, ID_10) with 8 images each" in capsys.readouterr().out
    assert pipeline.train(world, train_num_steps=1, num_samples=0, class_names=None) == 0  # as the manifest says
    split = read_split(world / "results")
    assert split is not None and split.classes == ("ID_2", "ID_10")
    assert pipeline.train(world, train_num_steps=2, num_samples=0) == 0
    assert "images: " not in capsys.readouterr().out.split("ID_10)")[-1]  # a run that goes on has its own split
    assert pipeline.train(world, train_num_steps=2, class_names="all") == 2
    assert "--class_names is all, but the run in " in pipeline.one_error(capsys)


def test_a_check_names_pictures_that_lie_in_two_classes(world, capsys):
    split_before = {"images_per_user": "all"}
    shutil.copy(world / "data" / "ID_1" / "walk_0.jpg", world / "data" / "ID_2" / "walk_0.jpg")
    assert pipeline.preprocess(world, **split_before) == 0
    told = "warning: 1 picture in two classes, of which one must be wrong: ID_1/walk_0.jpg and ID_2/walk_0.jpg have"
    assert told in capsys.readouterr().err
    assert pipeline.preprocess(world, **split_before, verify="true") == 0
    assert told in capsys.readouterr().err
    split = read_split(world / "latents_cache")
    assert split is not None
    first = next(entry for entry in split.train if entry.class_name == "ID_1")
    assert reading.image_path(world / "data", first).is_file()


def test_an_odd_folder_stops_both_scripts_before_anything_is_encoded(world, capsys, encoder):
    (world / "data" / "ID_1" / "session_2").mkdir()
    for number in range(9):
        tiny.make_image(900 + number).save(world / "data" / "ID_1" / "session_2" / f"{number}.jpg")
    for run in (pipeline.preprocess, pipeline.train):
        assert run(world) == 2
        assert "class ID_1 in --data_path" in pipeline.one_error(capsys)
    assert encoder.num_images == 0 and not (world / "latents_cache" / "manifest.json").exists()


# --- names that no class may have --------------------------------------------------------------------------


def odd_world(root: Path, *classes: str) -> Path:
    """Makes images of these classes and a VAE below a folder."""
    tiny.make_images(root / "data", dict.fromkeys(classes, 3), size=16)
    tiny_vae.save_tiny_vae(root / "vae.pt")
    return root


@pytest.fixture
def old_names(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Lets a class have any name, as earlier versions did, until it is undone."""
    with monkeypatch.context() as before:
        before.setattr(names, "GENERATED_NAMES", frozenset())
        yield before


@pytest.mark.parametrize("run", [pipeline.preprocess, pipeline.train])
def test_a_class_with_the_name_of_an_output_is_refused_before_anything_is_done(tmp_path, capsys, encoder, run):
    root = odd_world(tmp_path, "ID_1", "Labels.csv")
    assert run(root, images_per_user=2) == 2
    told = pipeline.one_error(capsys)
    assert "the class Labels.csv in --data_path " in told and "name the other classes with --class_names" in told
    assert encoder.num_images == 0 and not (root / "results").exists()
    assert run(root, images_per_user=2, class_names=["ID_*"], **SHORT[run]) == 0


SHORT = {pipeline.preprocess: {}, pipeline.train: {"train_num_steps": 1, "num_samples": 0}}


def test_a_stored_split_with_such_a_class_goes_on_and_begins_no_new_run(tmp_path, capsys, old_names):
    root = odd_world(tmp_path, "ID_1", "labels.csv")
    assert pipeline.preprocess(root, images_per_user=2) == 0
    old_names.undo()
    assert pipeline.preprocess(root, images_per_user=2) == 0
    assert "no run that begins now can have the classes labels.csv" in capsys.readouterr().err
    (root / "data").rename(root / "elsewhere")
    assert pipeline.train(root, images_per_user=2, data_path=None) == 2
    assert "the class labels.csv in " in pipeline.one_error(capsys)


def test_a_run_that_has_such_classes_goes_on_and_generates_what_it_can(tmp_path, capsys, old_names):
    root = odd_world(tmp_path, "ID_1", "labels.csv", "overview.png", "strip.png")
    settings = {"images_per_user": 2, "num_samples": 0}
    assert pipeline.train(root, train_num_steps=1, **settings) == 0
    old_names.undo()
    assert pipeline.train(root, train_num_steps=2, **settings) == 0
    capsys.readouterr()

    assert pipeline.generate(root) == 2
    told = pipeline.one_error(capsys)
    assert "cannot have a folder for the class labels.csv" in told and "name the other classes with --classes" in told
    assert not [path for path in (root / "synthetic").rglob("*") if path.is_file()]
    assert made(root, tmp_path, "overview.png", "strip.png") == ["overview.png", "strip.png"]
    assert "overview.png is the folder of a class" in capsys.readouterr().err
    assert pipeline.generate(root, strip=[1], output_folder=tmp_path / "synthetic") == 2
    assert "strip.png is a folder, of a class of that name" in pipeline.one_error(capsys)
    assert pipeline.generate(root, strip=[1], output_folder=tmp_path / "strips") == 0  # of all four classes


def test_an_output_folder_that_cannot_have_the_folders_is_told_before_any_image_is_made(tmp_path, capsys, odd):
    for name, room in ((LONG_ASCII, 300), ("none", 40)):  # beyond the longest path, and only while a file is written
        place = tmp_path
        while len(str(place)) < 4095 - room:
            place /= "f" * max(1, min(200, 4095 - room - len(str(place)) - 1))
        assert pipeline.generate(odd, classes=[name], output_folder=place) in (1, 2)
        assert "File name too long" in pipeline.one_error(capsys)
        assert not [path for path in place.rglob("*") if path.is_file()]

    shared = tmp_path / "shared"
    shared.mkdir()
    (shared / "all").mkdir()
    (shared / "none").symlink_to("all")
    assert pipeline.generate(odd, classes=["[a]ll", "none"], output_folder=shared) == 1
    assert "it is a link" in pipeline.one_error(capsys)
    assert not any((shared / "all").iterdir())


LONG = ["b" * 244, "c" * 245, "d" * 255, "é" * 127, "步" * 85]  # letters of one, two and three bytes


@pytest.mark.slow
def test_names_of_244_to_255_bytes_go_the_whole_way(tmp_path, capsys):
    root = odd_world(tmp_path, *LONG)
    settings = {"images_per_user": 2}
    assert pipeline.preprocess(root, splits=["train", "test"], **settings) == 0
    assert pipeline.preprocess(root, verify="true", **settings) == 0
    assert pipeline.train(root, train_num_steps=1, num_samples=5, **settings) == 0
    assert pipeline.generate(root, images_per_class=2) == 0
    folders = [path for path in (root / "synthetic").iterdir() if path.is_dir()]
    assert {path.name for path in folders} == set(LONG)
    assert all(len(list(folder.iterdir())) == 2 for folder in folders)
    assert pipeline.generate(root, images_per_class=2) == 0
    assert "10 of the images are already there" in capsys.readouterr().out
    places = {"checkpoint": root / "results", "synthetic_path": root / "synthetic", "output_folder": root / "eval"}
    assert evaluate_images.main(tiny.flags({**places, "device": "cpu"})) == 0
    report = json.loads((root / "eval" / "report.json").read_text())
    assert set(report["evaluated"]["images_per_class"]) == set(LONG)
    assert all(count["synthetic"] == 2 for count in report["evaluated"]["images_per_class"].values())


def test_a_temporary_has_a_shorter_name_than_a_file_may_have():
    assert len(files._temporary_name()) <= generation._LONGEST_TEMPORARY < 255


# --- classes that look like flags --------------------------------------------------------------------------


def test_classes_that_look_like_flags_are_named_in_every_script(tmp_path, capsys):
    dashed = ["-rf", "--help", "-1", "-", "--"]
    root = odd_world(tmp_path, "ID_1", *dashed)
    few = {"images_per_user": 2}
    assert pipeline.preprocess(root, class_names=["-rf", "ID_1"], **few) == 0
    shutil.rmtree(root / "latents_cache")
    flags = pipeline.train_flags(root, train_num_steps=1, num_samples=0, **few)
    assert train_latent_cfg.main([*flags, "--class_names=--help", "-rf", "-1", "-", "[-]-"]) == 0
    split = read_split(root / "results")
    assert split is not None and split.classes == tuple(sorted(dashed, key=names.natural_key))
    assert made(root, tmp_path, "-rf", "-1", "-") == ["-", "-1", "-rf"]
    common = tiny.flags({"checkpoint": root / "results", "device": "cpu"})
    words = ["--output_folder", str(tmp_path / "more"), "--images_per_class", "-rf=2", "1"]
    assert generate_script.main([*common, *words, "--classes=--help", "-rf"]) == 0
    counts = {path.name: len(list(path.iterdir())) for path in (tmp_path / "more").iterdir() if path.is_dir()}
    assert counts == {"-rf": 2, "--help": 1}
    capsys.readouterr()
    assert generate_script.main([*common, "--classes=-rg"]) == 2
    assert "did you mean --classes=-rf?" in pipeline.one_error(capsys)
