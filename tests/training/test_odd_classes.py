"""Classes of odd names go the whole way: named in every script, trained on, and made again under their names."""

import csv
import os
import shutil
import unicodedata
from pathlib import Path

import pipeline
import pytest
import tiny
import tiny_vae

from gait_latents.images import generated, reading
from gait_latents.images.split import read_split

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
