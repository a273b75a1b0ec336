"""What is in the class folders: every image file by its name, in natural order; anything else is explained."""

import os
import re
from pathlib import Path

import pytest
from properties import given, quick, st

from gait_latents.common.errors import UserError
from gait_latents.images import reading
from gait_latents.images.folders import list_images, natural_key
from gait_latents.images.split import Split, make_split


def touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")
    return path


def test_numbers_in_names_are_ordered_by_value():
    names = ["ID_10", "ID_2", "ID_1", "ID_02", "b", "ID_", "10", "9", "a1b10", "a1b9", "9" * 5000]
    ordered = ["9", "10", "9" * 5000, "ID_", "ID_1", "ID_02", "ID_2", "ID_10", "a1b9", "a1b10", "b"]
    assert sorted(names, key=natural_key) == ordered


@quick
@given(st.lists(st.text(alphabet="a0129٣_²\n", max_size=6), unique=True))
def test_natural_order_is_total(names):
    assert len({natural_key(name) for name in names}) == len(names)
    backwards = names[::-1]
    assert sorted(names, key=natural_key) == sorted(backwards, key=natural_key)


def test_image_files_directly_in_class_folders_are_listed_in_natural_order(tmp_path):
    for name in ("ID_10/a.jpg", "ID_2/10.png", "ID_2/9.JPG", "ID_2/9.png", "ID_2/x.tiff", "loose.jpg"):
        touch(tmp_path / name)
    for name in ("ID_2/notes.txt", "ID_2/._9.jpg", "ID_2/deeper/b.jpg", ".hidden/a.jpg", "ID_2/noending"):
        touch(tmp_path / name)
    (tmp_path / "ID_2" / "folder.jpg").mkdir()
    (tmp_path / "ID_3").mkdir()
    assert list(list_images(tmp_path).items()) == [
        ("ID_2", ["9.JPG", "9.png", "10.png", "x.tiff"]),
        ("ID_10", ["a.jpg"]),
    ]


def test_any_name_works_and_leads_back_to_its_file(tmp_path):
    long = "é" * 125 + ".jpg"
    files = [
        ("Ünï cödé 人", "人 1.jpg"),
        ("new\nline", "a\nb.png"),
        ("space ", " .jpg"),
        ("'\"", '"\\.png'),
        ("l", long),
    ]
    for class_name, name in files:
        (tmp_path / class_name).mkdir()
        (tmp_path / class_name / name).write_bytes(name.encode())
    index = list_images(str(tmp_path))
    assert {(class_name, name) for class_name, names in index.items() for name in names} == set(files)
    split = make_split(index, num_users="all", images_per_user=1, seed=0, split="random", split_gap=0)
    stored = Split.from_bytes(split.to_bytes(), "here")
    assert stored == split
    assert {reading.image_path(tmp_path, entry).read_bytes().decode() for entry in stored.train} == {
        n for _, n in files
    }


def test_names_that_are_not_unicode_survive_a_stored_split(tmp_path):
    folder = tmp_path / os.fsdecode(b"class\xff")
    try:
        touch(folder / os.fsdecode(b"image\xfe\xed.jpg"))
    except OSError:
        pytest.skip("this file system takes no such names")
    split = make_split(list_images(tmp_path), num_users="all", images_per_user=1, seed=0, split="random", split_gap=0)
    stored = Split.from_bytes(split.to_bytes(), "here")
    assert stored == split
    assert reading.image_path(tmp_path, stored.train[0]).exists()
    with pytest.raises(UserError, match=re.escape(r"'class\udcff' has 1")) as caught:
        make_split(list_images(tmp_path), num_users=1, images_per_user=2, seed=0, split="random", split_gap=0)
    assert str(caught.value).isprintable()


def test_linked_folders_and_files_count_and_broken_links_are_not_passed_over(tmp_path):
    touch(tmp_path / "elsewhere" / "a.jpg")
    data = tmp_path / "data"
    data.mkdir()
    (data / "ID_1").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "b.jpg").symlink_to("a.jpg")
    (tmp_path / "elsewhere" / "gone.jpg").symlink_to("nowhere.jpg")
    (tmp_path / "elsewhere" / "loop.jpg").symlink_to("loop.jpg")
    assert list_images(data) == {"ID_1": ["a.jpg", "b.jpg", "gone.jpg", "loop.jpg"]}
    (data / "ID_2").symlink_to("nowhere")
    with pytest.raises(UserError, match="lead nowhere: ID_2"):
        list_images(data)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "does not exist"),
        (["data/a.jpg", "data/b.png"], "2 images but no sub-folders"),
        (["data/readme.txt"], "has no sub-folders"),
        (["data/ID_1/a.txt", "data/ID_2/b.npy"], r"\(ID_1, ID_2\); files taken as images: .bmp .gif"),
        (["data/Normal_line/ID_1/a.jpg"], "are they deeper, in .*data/Normal_line[?]"),
        (["data/x/y/Normal_line/ID_1/a.jpg"], "are they deeper, in .*data/x/y/Normal_line[?]"),
        (["data/docs/old/a.txt", "data/x/Normal_line/ID_1/a.jpg"], "are they deeper, in .*data/x/Normal_line[?]"),
        (["data/ID_1/old/a.txt", "data/ID_1/.cache/a.jpg"], r"\(ID_1\); files taken as images: .bmp .gif"),
    ],
)
def test_a_folder_without_class_images_is_explained(tmp_path, files, message):
    for name in files:
        touch(tmp_path / name)
    with pytest.raises(UserError, match=message):
        list_images(tmp_path / "data")


def test_a_file_in_place_of_the_data_folder_is_explained(tmp_path):
    with pytest.raises(UserError, match="is a file"):
        list_images(touch(tmp_path / "data.zip"))
