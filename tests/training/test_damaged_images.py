"""A folder of generated images that was damaged, changed by others or prepared by somebody: told, and made again."""

import csv
import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hostile_values
import pipeline
import pytest
from PIL import Image
from pipeline import CLASSES

from gait_latents.common import files
from gait_latents.common.seeds import sample_generator
from gait_latents.images import generated
from gait_latents.training import generation, trained_model


@pytest.fixture(scope="module")
def whole(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two images of each class; to be copied and not to be changed."""
    folder = tmp_path_factory.mktemp("whole") / "synthetic"
    assert pipeline.generate(trained, output_folder=folder) == 0
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return shutil.copytree(whole, tmp_path / "synthetic")


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Notes class and number of each image that is sampled."""
    noted: list[tuple[str, int]] = []

    def note(seed: int, kind: str, *facts: Any) -> Any:
        noted.append(facts)
        return sample_generator(seed, kind, *facts)

    monkeypatch.setattr(trained_model, "sample_generator", note)
    return noted


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def listed(folder: Path) -> list[str]:
    return [row[0] for row in csv.reader(io.StringIO((folder / "labels.csv").read_text()))][1:]


def record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "settings.json").read_text())


def forget_digests(folder: Path) -> None:
    """Makes the record one of an older version."""
    (folder / "settings.json").write_text(json.dumps({k: v for k, v in record(folder).items() if k != "images"}))


def empty(path: Path) -> None:
    path.write_bytes(b"")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def replace_by_another(path: Path) -> None:
    shutil.copy(path.parent / path.name.replace("000001", "000000"), path)


def resize(path: Path) -> None:
    Image.new("RGB", (8, 8)).save(path)


def grow(path: Path) -> None:
    os.truncate(path, 10**10)  # sparse


def remove(path: Path) -> None:
    path.unlink()


def link(path: Path) -> None:
    path.rename(path.parent.parent.parent / "elsewhere.jpg")
    path.symlink_to(path.parent.parent.parent / "elsewhere.jpg")


def dangle(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.parent / "nothing")


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


DAMAGES = (empty, cut, flip, replace_by_another, resize, grow, remove, link, dangle, pipe)
TOLD = (empty, cut, flip, replace_by_another, resize, grow, link)  # the others are images that are missing
SEEN_BY_DECODING = (empty, cut, resize, grow, remove, link, dangle, pipe)


def test_the_record_holds_the_digest_of_each_image(whole):
    digests = record(whole)["images"]
    assert list(digests) == list(CLASSES)
    found = {f"{name}/{file}": digest for name, own in digests.items() for file, digest in own.items()}
    assert list(found) == listed(whole)
    for place, digest in found.items():
        assert hashlib.sha256((whole / place).read_bytes()).hexdigest() == digest


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_image_is_told_and_made_again_bit_for_bit(trained, whole, folder, made, capsys, damage):
    damage(folder / "ID_2" / "ID_2_000001.jpg")
    assert pipeline.generate(trained, output_folder=folder) == 0
    assert made == [("ID_2", 1)] and contents(folder) == contents(whole)
    told = capsys.readouterr().err
    line = (
        f"1 of the images in {folder} are damaged or not those that were made, and are made again: ID_2/ID_2_000001.jpg"
    )
    assert (line in told) == (damage in TOLD)


@pytest.mark.parametrize("damage", SEEN_BY_DECODING, ids=lambda damage: damage.__name__)
def test_a_folder_of_an_older_version_is_checked_by_decoding(trained, whole, folder, made, damage):
    forget_digests(folder)
    before = record(folder)
    damage(folder / "ID_2" / "ID_2_000001.jpg")
    assert pipeline.generate(trained, output_folder=folder) == 0
    assert made == [("ID_2", 1)]
    assert {name: data for name, data in contents(folder).items() if name != "settings.json"} == {
        name: data for name, data in contents(whole).items() if name != "settings.json"
    }
    assert record(folder) == {**before, "images": record(whole)["images"]}


def test_a_whole_folder_of_an_older_version_stays_as_it_is(trained, folder, made, capsys):
    forget_digests(folder)
    before = contents(folder)
    assert pipeline.generate(trained, output_folder=folder) == 0
    assert contents(folder) == before and made == [] and "warning" not in capsys.readouterr().err


def test_images_that_a_killed_process_made_are_taken_as_they_are(trained, whole, folder, made):
    killed = generated.record_bytes(record(folder), {"ID_1": record(folder)["images"]["ID_1"]})
    (folder / "settings.json").write_bytes(killed)
    (folder / "labels.csv").unlink()
    assert pipeline.generate(trained, output_folder=folder) == 0
    assert made == [] and contents(folder) == contents(whole)


def test_what_is_damaged_and_not_asked_for_is_left_out_of_the_labels(trained, folder, made, capsys):
    empty(folder / "ID_2" / "ID_2_000001.jpg")
    assert pipeline.generate(trained, output_folder=folder, classes="ID_1") == 0
    assert "1 images in" in (told := capsys.readouterr().err) and "does not ask for are damaged" in told
    assert made == [] and listed(folder) == [f"{name}/{name}_{i:06d}.jpg" for name in CLASSES for i in (0, 1)][:3] + [
        f"ID_10/ID_10_{i:06d}.jpg" for i in (0, 1)
    ]
    assert "ID_2_000001.jpg" not in record(folder)["images"]["ID_2"]


def test_of_many_damaged_images_the_first_are_named(trained, whole, folder, capsys):
    for path in folder.glob("*/*.jpg"):
        empty(path)
    assert pipeline.generate(trained, output_folder=folder) == 0
    told = capsys.readouterr().err
    assert "6 of the images" in told and "ID_1/ID_1_000000.jpg" in told and " and 3 more" in told
    assert contents(folder) == contents(whole)


HOSTILE_DIGESTS: list[Any] = [
    *hostile_values.VALUES,
    *({name: value} for name in ("ID_1", "../x", "\0") for value in (None, 7, "x", [], {"ID_1_000000.jpg": 7})),
    {"ID_1": {"../../etc/passwd": "0" * 64, "ID_1_000000.jpg": "0" * 63, "": "F" * 64}},
    {"../..": {"etc/passwd": "0" * 64}},
]


def digests_count(trained: Path, folder: Path, values: list[Any]) -> tuple[int, int]:
    """Puts each value in the place of the digests and generates; returns how many there were and went wrong."""
    like, wrong = contents(folder), 0
    whole = record(folder)
    for value in values:
        (folder / "settings.json").write_text(json.dumps({**whole, "images": value}))
        is_nonsense = pipeline.generate(trained, output_folder=folder) != 0
        wrong += is_nonsense or contents(folder) != like
        (folder / "settings.json").write_bytes(like["settings.json"])
    return len(values), wrong


def test_nonsense_in_the_place_of_digests_stops_nothing(trained, folder):
    assert digests_count(trained, folder, HOSTILE_DIGESTS[::9]) == (len(HOSTILE_DIGESTS[::9]), 0)


@pytest.mark.slow
def test_no_nonsense_in_the_place_of_digests_stops_anything(trained, folder):
    assert digests_count(trained, folder, HOSTILE_DIGESTS) == (len(HOSTILE_DIGESTS), 0)


def test_wrong_digests_cost_work_and_change_nothing(trained, whole, folder, made):
    digests = {name: dict.fromkeys(own, "0" * 64) for name, own in record(folder)["images"].items()}
    (folder / "settings.json").write_text(json.dumps({**record(folder), "images": digests}, indent=2))
    assert pipeline.generate(trained, output_folder=folder) == 0
    assert len(made) >= 6 and contents(folder) == contents(whole)


def test_digests_beyond_the_largest_record_are_left_out_class_by_class(monkeypatch):
    digests = {name: {f"{name}_{i:06d}.png": "0" * 64 for i in range(9)} for name in ("a", "b", "c")}
    whole = generated.record_bytes({"seed": 1}, digests)
    assert json.loads(whole) == {"seed": 1, "images": digests}
    monkeypatch.setattr(generated, "LARGEST_RECORD_BYTES", len(whole) - 200)
    cut_short = json.loads(generated.record_bytes({"seed": 1}, digests))
    assert cut_short == {"seed": 1, "images": {name: digests[name] for name in ("a", "b")}}


def test_a_hundred_thousand_digests_fit():
    digests = {f"ID_{k}": {f"ID_{k}_{i:06d}.png": "0" * 64 for i in range(10_000)} for k in range(10)}
    assert generated.digests_of(json.loads(generated.record_bytes({}, digests))) == digests


# --- links -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [{}, {"classes": "ID_1"}])
def test_through_the_folder_of_a_class_that_is_a_link_nothing_is_read_written_or_removed(
    trained, folder, tmp_path, made, capsys, how
):
    outside = tmp_path / "outside"
    (folder / "ID_2").rename(outside)
    (outside / f"{files.TEMPORARY_PREFIX}{files.host_digest()}-999999999-0").write_bytes(b"stale")
    (outside / "ID_2_000001.jpg").unlink()
    (folder / "ID_2").symlink_to(outside)
    before = contents(outside), contents(folder)
    assert pipeline.generate(trained, output_folder=folder, **how) == 1
    assert f"{folder / 'ID_2'}: it is a link, and may lead out of {folder}; remove it" in pipeline.one_error(capsys)
    assert made == [] and (contents(outside), contents(folder)) == before


@pytest.mark.parametrize("name", ["labels.csv", "overview.png", "settings.json", "ID_1/ID_1_000000.jpg"])
@pytest.mark.parametrize("is_there", [True, False])
def test_a_link_with_the_name_of_a_file_is_replaced_and_what_it_names_stays(
    trained, whole, folder, tmp_path, capsys, name, is_there
):
    target, path = tmp_path / "target", folder / name
    if is_there:
        target.write_bytes(path.read_bytes())
    before = target.read_bytes() if is_there else None
    path.unlink()
    path.symlink_to(target)
    code = pipeline.generate(trained, output_folder=folder)
    assert (target.read_bytes() if target.exists() else None) == before
    if name == "settings.json":  # it says how the images were made, and nobody knows who wrote what is there
        assert code == 2 and "is damaged; give another --output_folder" in pipeline.one_error(capsys)
    else:
        assert code == 0 and not path.is_symlink() and contents(folder) == contents(whole)


def test_a_strip_is_not_written_through_a_link(trained, tmp_path):
    folder, target = tmp_path / "strip", tmp_path / "target"
    folder.mkdir()
    target.write_bytes(b"mine")
    (folder / "strip.png").symlink_to(target)
    assert pipeline.generate(trained, output_folder=folder, strip=[1.0], images_per_class=None) == 0
    assert target.read_bytes() == b"mine" and not (folder / "strip.png").is_symlink()


def test_a_link_that_comes_while_images_are_made_is_not_written_through(trained, tmp_path, monkeypatch, capsys):
    folder, outside = tmp_path / "synthetic", tmp_path / "outside"
    outside.mkdir()
    make_batch: Callable[..., None] = generation.Generator._make_batch

    def put_link(self: generation.Generator, *facts: Any) -> None:
        (folder / "ID_1").rmdir()
        (folder / "ID_1").symlink_to(outside)
        make_batch(self, *facts)

    monkeypatch.setattr(generation.Generator, "_make_batch", put_link)
    assert pipeline.generate(trained, output_folder=folder) == 1
    assert "it is a link" in pipeline.one_error(capsys) and not list(outside.iterdir())
