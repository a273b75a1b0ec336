"""The lines about an image folder before anything is encoded: one for a clean folder, one for each thing that is odd.

Each kind of folder that people have brought is made here by its name.
"""

import contextlib
import dataclasses
import os
import socket
import unicodedata
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from PIL import Image
from tiny_images import encoded, png, smooth

from gait_latents.common.errors import UserError
from gait_latents.images import data_report, reading, selection
from gait_latents.images.folders import OUTPUTS
from gait_latents.images.shapes import Shape, ShapeReader
from gait_latents.images.split import Entry, Split
from gait_latents.settings import PreprocessSettings

COMPOSED, DECOMPOSED = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))


def put(path: Path, seed: int = 0, *, kind: str = "PNG", size: tuple[int, int] = (12, 12)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(smooth(*size, seed=seed), kind))
    return path


def classes(root: Path, *names: str, count: int = 4, first: int = 0) -> Path:
    for number, name in enumerate(names):
        for i in range(count):
            put(root / name / f"{i:03d}.png", first + 100 * number + i)
    return root


@pytest.fixture
def choose(tmp_path: Path):
    """Chooses images of the folder `data` as the scripts do; returns the split."""

    def run(**changes: object) -> Split:
        standard = {"data_path": str(tmp_path / "data"), "image_size": 16, "images_per_user": "all"}
        settings = dataclasses.replace(PreprocessSettings(), **{**standard, **changes})
        return selection.choose_images(settings, at_hand=True, stored=None, where=str(tmp_path / "cache"))

    return run


@pytest.fixture
def lines(choose, capsys):
    """Returns the lines that are printed on the images of the folder `data`, warnings last."""

    def run(**changes: object) -> list[str]:
        choose(**changes)
        printed = capsys.readouterr()
        return [*printed.out.splitlines(), *printed.err.splitlines()]

    return run


# --- what is used ------------------------------------------------------------------------------------------


def test_a_clean_folder_has_one_line(tmp_path, lines):
    classes(tmp_path / "data", "ID_1", "ID_2", "ID_10")
    assert lines(images_per_user=3) == [
        "images: 3 classes (ID_1, ID_2, ID_10) with 4 images each, 9 for training and 3 for testing; all 12 x 12 pixels"
    ]


def test_counts_sizes_and_what_a_contiguous_split_leaves_out_are_told(tmp_path, lines):
    classes(tmp_path / "data", *(f"ID_{i}" for i in range(1, 6)))
    put(tmp_path / "data" / "ID_1" / "x.png", 77, size=(30, 33))
    (tmp_path / "data" / "ID_2" / "y.png").write_bytes(b"")
    assert lines(images_per_user=2, split="contiguous", split_gap=1) == [
        "images: 5 classes (ID_1 to ID_5) with 4 to 5 images each, 10 for training and 7 for testing, 5 left out "
        "between them; 12 x 12 to 30 x 33 pixels, 1 other than 12 x 12, 1 of no readable size"
    ]


# --- what is not used --------------------------------------------------------------------------------------


def test_mixed_formats_are_passed_over_by_ending_and_number(tmp_path, lines):
    data = classes(tmp_path / "data", "a", "b")
    for i in range(6):
        (data / "a" / f"IMG_{i}.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
        (data / "a" / f"IMG_{i}.avif").write_bytes(b"\0\0\0\x18ftypavif")
        put(data / "b" / f"noending_{i}", 70 + i)
    assert lines()[1:] == [
        "passed over 18 files in the class folders: 6 without ending, 6 .avif, 6 .HEIC; to use them, convert pictures "
        "to PNG or JPEG and give images an ending such as .jpg"
    ]
    assert len(lines(class_names=("a",))[1:]) == 1 and "12 files" in lines(class_names=("a",))[1]


def test_half_nested_images_are_a_warning_and_an_error_where_they_are_more_than_the_own(tmp_path, lines, choose):
    data = classes(tmp_path / "data", "a", "b")
    for i in range(4):
        put(data / "a" / "session_2" / "deep" / f"{i}.png", 500 + i)
    put(data / "b" / "@eaDir" / "thumb.png")
    put(data / "b" / ".ipynb_checkpoints" / "000.png")
    (data / "b" / "notes").mkdir()
    assert lines()[1:] == [
        "warning: 4 images in sub-folders of the class folders are not used (a/session_2: 4); put the images of a "
        "class directly into its folder to use them"
    ]
    put(data / "a" / "session_3" / "x.png", 600)
    with pytest.raises(UserError, match=r"class a in --data_path .*data has 4 images of its own and 5 in sub-folders "):
        choose()
    assert choose(class_names=("b",)).classes == ("b",)
    assert choose(class_names=("b", "a")[:1], num_users=1).classes == ("b",)


def test_a_class_with_all_its_images_deeper_is_an_error_and_no_class_less(tmp_path, choose):
    data = classes(tmp_path / "data", "a", "b")
    put(data / "c" / "session_1" / "x.png", 9)
    with pytest.raises(UserError, match=r"class c in .* has no images of its own and 1 in sub-folders \(session_1\)"):
        choose()
    assert choose(num_users=2).classes == ("a", "b")


@pytest.mark.parametrize("files", OUTPUTS)
def test_what_the_scripts_wrote_below_a_folder_makes_it_no_class(tmp_path, choose, lines, files):
    data = classes(tmp_path / "data", "a", "b")
    for name in files:
        (data / "out" / "first").mkdir(parents=True, exist_ok=True)
        (data / "out" / "first" / name).touch()
    put(data / "out" / "first" / "preview.png", 9)
    put(data / "out" / "first" / "a" / "a_000000.png", 10)
    assert choose().classes == ("a", "b")
    put(data / "a" / "first" / "preview.png", 9)
    for name in files:
        (data / "a" / "first" / name).touch()
    assert "warning" not in " ".join(lines())
    put(data / "out" / "second" / "x.png", 9)
    with pytest.raises(UserError, match=r"class out in .* and 1 in sub-folders \(second\)"):
        choose()


@pytest.mark.parametrize("loose", [True, False])
@pytest.mark.parametrize("names", [("train", "val"), ("Training", "Testing"), ("test", "train", "validation")])
def test_train_and_val_are_no_classes_where_they_have_class_folders(tmp_path, choose, names, loose):
    for name in names:
        classes(tmp_path / "data" / name, "a", "b")
        if loose:
            put(tmp_path / "data" / name / "samples_grid.png", 3)
    wanted = next(name for name in names if name.casefold().startswith("train"))
    with pytest.raises(UserError, match=rf"are parts of a data set .*; give --data_path .*/data/{wanted}$"):
        choose()


def test_train_and_val_that_hold_images_alone_are_classes_with_a_warning(tmp_path, lines):
    classes(tmp_path / "data", "train", "val")
    assert [line for line in lines() if line.startswith("warning")] == [
        "warning: the classes are called train, val, like parts of a data set; if they are, give a folder with one "
        "sub-folder for each class"
    ]


def test_junk_beside_classes_is_left_out_in_one_line(tmp_path, lines):
    data = classes(tmp_path / "data", "a", "b")
    junk = ["$RECYCLE.BIN", ".ipynb_checkpoints", "@eaDir", "System Volume Information", "__MACOSX", "__pycache__"]
    for name in [*junk, "lost+found", "notes", "photos"]:
        (data / name).mkdir()
    (data / "__MACOSX" / "._000.jpg").write_bytes(b"\0\5\x16\7")
    (data / "photos" / "1.heic").write_bytes(b"x")
    put(data / "$RECYCLE.BIN" / "deleted.png", 5)
    put(data / "loose.png", 6)
    for name in ("Thumbs.db", "desktop.ini", ".DS_Store", "._001.jpg"):
        (data / "a" / name).write_bytes(b"x" * 64)
    first, passed, left, loose = lines()
    assert first.startswith("images: 2 classes (a, b) with 4 images each")
    assert passed == "passed over 4 files in the class folders: 1 .db, 1 .ini, 2 hidden"
    assert left == (
        "9 folders are no classes, for want of images or as the system's own: $RECYCLE.BIN, .ipynb_checkpoints, "
        "@eaDir, System Volume Information, __MACOSX, __pycache__, lost+found, notes, photos (1 .heic); to use them, "
        "convert pictures to PNG or JPEG"
    )
    assert loose == "1 image beside the class folders, not in one, is not used"


def test_an_unreadable_folder_of_the_system_stops_nobody(tmp_path, choose, monkeypatch):
    data = classes(tmp_path / "data", "a")
    (data / "lost+found").mkdir()
    scan = selection.list_folder.__globals__["os"].scandir

    def refuse(place):
        if Path(place).name == "lost+found":
            raise PermissionError(13, "Permission denied")
        return scan(place)

    monkeypatch.setattr("os.scandir", refuse)
    assert choose().classes == ("a",)


def test_folders_without_one_class_are_an_error(tmp_path, choose):
    for name in ("ID_1", "__MACOSX"):
        (tmp_path / "data" / name).mkdir(parents=True)
    with pytest.raises(UserError, match=r"no images in the class folders of .*\(ID_1\)"):
        choose()


# --- what looks odd ----------------------------------------------------------------------------------------


def test_wide_pictures_lose_more_than_a_tenth_in_one_line(tmp_path, lines):
    data = classes(tmp_path / "data", "left", "right")
    put(data / "left" / "w.png", 1, size=(48, 10))
    put(data / "right" / "h.jpg", 2, kind="JPEG", size=(10, 20))
    put(data / "right" / "little.png", 3, size=(20, 18))  # 10 % and no more
    assert lines()[1:] == [
        "warning: 2 of 11 images lose more than 10% of their area, since only the square in the centre is kept: up to "
        "79% (left/w.png, 48 x 10); --resize squash and --resize pad keep all of it"
    ]
    assert not lines(resize="pad")[1:]


@pytest.mark.parametrize("all_dark", [True, False])
def test_12_bits_in_a_16_bit_png_use_little_of_the_range(tmp_path, lines, all_dark):
    data = tmp_path / "data"
    if not all_dark:
        classes(data, "a", "b", count=20)
    for i in range(3):
        grey = np.random.default_rng(i).integers(0, 4096, (12, 12)).astype(np.uint16)
        (data / "c").mkdir(parents=True, exist_ok=True)
        Image.fromarray(grey).save(data / "c" / f"{i}.png")
    (warning,) = lines()[1:]
    assert warning.startswith("warning: 3 of 3 images looked at use less than a quarter of the range between black and")
    assert "such as c/0.png: 0 to 16 of 0 to 255 (12 bits stored in a file of 16 look like this)" in warning


def test_dark_jpegs_are_told_and_fine_patterns_are_not_taken_for_them(tmp_path, lines):
    data = tmp_path / "data"
    checker = np.indices((64, 64)).sum(0).astype(np.uint8) % 2 * 255
    (data / "a").mkdir(parents=True)
    for i in range(5):
        checker[i, i] = 7
        Image.fromarray(checker).save(data / "a" / f"{i}.jpg", quality=95)
    assert lines()[1:] == []
    for i in range(5):
        Image.fromarray(checker // 8 + 3).save(data / "a" / f"{i}.jpg", quality=95)
        checker[0, i + 3] = 9
    assert "5 of 5 images looked at use less than a quarter" in lines()[1]


def test_names_that_differ_in_case_alone_are_told(tmp_path, lines):
    data = classes(tmp_path / "data", "ID_1", "id_1")
    assert lines()[1].startswith("warning: the classes ID_1, id_1 differ in upper and lower case alone")
    (data / "id_1").rename(data / "ID_2")
    for name in ("x.JPG", "x.jpg", "x.jpeg", COMPOSED + ".png", DECOMPOSED + ".png"):
        put(data / "ID_2" / name, sum(map(ord, name)))
    assert lines()[1] == (
        "warning: 4 images have the name of another but for case or Unicode form, such as "
        "ID_2/cafe\\u0301.png and ID_2/caf\\xe9.png; on Windows and macOS these are one file"
    )


def test_both_forms_of_a_class_are_refused_only_where_both_are_used(tmp_path, choose):
    classes(tmp_path / "data", "b", COMPOSED, DECOMPOSED)
    with pytest.raises(
        UserError, match=r"--data_path .* have the same name, caf.*, in two Unicode forms: 'cafe\\u0301'"
    ):
        choose()
    assert choose(num_users=2).classes == ("b", DECOMPOSED)
    assert choose(class_names=("b",)).classes == ("b",)


def test_one_picture_in_two_classes_names_the_pair(tmp_path, choose, capsys):
    data = classes(tmp_path / "data", "a", "b")
    (data / "b" / "copy.png").write_bytes((data / "a" / "001.png").read_bytes())
    (data / "a" / "own.png").write_bytes((data / "a" / "002.png").read_bytes())
    data_report.warn_of_equal_pictures(choose())
    assert capsys.readouterr().err.splitlines() == [
        "warning: 1 picture in two classes, of which one must be wrong: a/001.png and b/copy.png have the same "
        "content; remove one of each pair"
    ]


# --- names in two Unicode forms ----------------------------------------------------------------------------


def test_labels_and_split_are_the_same_from_both_unicode_forms(tmp_path, choose):
    found = []
    forms: tuple[Literal["NFC", "NFD"], ...] = ("NFC", "NFD")
    for form in forms:
        place = form.lower()
        for name in ("z", "café", "cafz"):
            for i in range(6):
                put(tmp_path / place / unicodedata.normalize(form, name) / unicodedata.normalize(form, f"é{i}.png"), i)
        split = choose(data_path=str(tmp_path / place), images_per_user=3)
        found.append([(unicodedata.normalize("NFC", f"{e.class_name}/{e.name}"), e.key) for e in split.train])
        assert [unicodedata.normalize("NFC", name) for name in split.classes] == ["cafz", "café", "z"]
        assert split.classes[1] == unicodedata.normalize(form, "café")
    assert found[0] == found[1]


def test_a_cache_of_names_in_the_other_form_keeps_its_order_and_its_images(tmp_path, choose):
    data = classes(tmp_path / "data", DECOMPOSED, "cafz", count=8)
    names = {name: [f"{i:03d}.png" for i in range(8)] for name in (DECOMPOSED, "cafz")}
    rule = {"num_users": "all", "images_per_user": 3, "seed": 42, "split": "random", "split_gap": 4}
    before = selection.make_split(names, **rule, form=str)  # as earlier versions drew it
    now = selection.make_split(names, **rule)
    assert before.classes == (DECOMPOSED, "cafz") and now.classes == ("cafz", DECOMPOSED)
    assert choose(images_per_user=3).classes == now.classes
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "split.json").write_bytes(before.to_bytes())
    again = choose(images_per_user=3)
    assert again.classes == before.classes
    assert [(e.class_name, e.name) for e in again.train] == [(e.class_name, e.name) for e in before.train]
    assert choose(images_per_user=4).classes == now.classes
    assert data.is_dir()


def test_a_file_is_found_whose_name_the_disk_has_in_the_other_form(tmp_path):
    path = put(tmp_path / COMPOSED / (COMPOSED + ".png"))
    for class_name, name in ((DECOMPOSED, DECOMPOSED + ".png"), (COMPOSED, DECOMPOSED + ".png")):
        assert reading.image_path(tmp_path, Entry(class_name, name)).samefile(path)
        assert reading.read_image(str(tmp_path), Entry(class_name, name), image_size=8).shape == (8, 8, 3)
    long = "é" * 125 + ".png"  # longer than a file name may be, in the other form
    assert reading.image_path(tmp_path, Entry(COMPOSED, long)) == tmp_path / COMPOSED / long


# --- which classes -----------------------------------------------------------------------------------------


def test_classes_are_named_and_num_users_takes_the_first_of_them(tmp_path, choose, capsys):
    classes(tmp_path / "data", *(f"ID_{i}" for i in range(1, 13)))
    assert choose(class_names=("ID_1?", "ID_3")).classes == ("ID_3", "ID_10", "ID_11", "ID_12")
    assert choose(class_names=("ID_1?", "ID_3"), num_users=2).classes == ("ID_3", "ID_10")
    assert choose(num_users=2).classes == ("ID_1", "ID_2")
    capsys.readouterr()
    assert choose(class_names=("ID_1", "ID_2"), num_users=3).classes == ("ID_1", "ID_2")
    assert "--num_users is 3 but --class_names names only 2: ID_1, ID_2" in capsys.readouterr().err
    with pytest.raises(
        UserError, match=r"--class_names: --data_path .* has no class ID_99; did you mean ID_9\? it has"
    ):
        choose(class_names=("ID_1", "ID_99"))


def test_named_classes_are_drawn_as_among_all_and_again_from_the_stored_split(tmp_path, choose):
    classes(tmp_path / "data", "a", "b", "c", count=6)
    whole, part = choose(images_per_user=3), choose(images_per_user=3, class_names=("[bc]",))
    assert part.train == tuple(entry for entry in whole.train if entry.class_name != "a")
    stored = Split.from_bytes(part.to_bytes(), "here")
    assert stored.rule["class_names"] == ["[bc]"]

    def from_stored(*names: str) -> Split:
        standard = dataclasses.replace(PreprocessSettings(), images_per_user=3, class_names=names)
        return selection.choose_images(standard, at_hand=False, stored=stored, where="here")

    assert from_stored("[bc]") == part
    assert from_stored("b").classes == ("b",)
    with pytest.raises(UserError, match="--class_names is all, but here knows only b, c, and --data_path"):
        from_stored("all")


def test_the_split_of_no_names_is_stored_as_it_always_was(tmp_path, choose):
    classes(tmp_path / "data", "a")
    data = choose().to_bytes()
    assert b"class_names" not in data and b"small_classes" not in data
    assert Split.from_bytes(data, "here").rule["class_names"] == ["all"]


def test_small_classes_are_taken_whole_on_request(tmp_path, choose, lines):
    classes(tmp_path / "data", "a", "b", count=6)
    classes(tmp_path / "data", "c", count=2, first=900)
    with pytest.raises(UserError, match=r"is 4 but c has 2; lower it to 2, add images, or give --small_classes take"):
        choose(images_per_user=4)
    split = choose(images_per_user=4, small_classes="take")
    assert [sum(e.class_name == name for e in split.train) for name in "abc"] == [4, 4, 2]
    assert "c" not in {e.class_name for e in split.test}
    lines(images_per_user="all")  # what was printed until here
    assert lines(images_per_user=4, small_classes="take")[1:] == [
        "warning: all images of 1 small class are for training, and none for testing: c has 2"
    ]
    assert Split.from_bytes(split.to_bytes(), "here").rule["small_classes"] == "take"


# --- sizes from headers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM"])
def test_the_size_is_read_off_the_header_of_each_format(kind):
    sizes, reader = [(40, 30), (17, 90), (40, 30)], ShapeReader()
    found = [reader.shape_of(encoded(smooth(*size, seed=number), kind)) for number, size in enumerate(sizes)]
    assert list(map(str, found)) == ["40 x 30", "17 x 90", "40 x 30"]


@pytest.mark.parametrize("kind", ["JPEG", "TIFF", "WEBP"])
@pytest.mark.parametrize("endian", ["<", ">"])
def test_the_size_of_a_turned_photograph_is_the_one_that_is_seen(kind, endian):
    reader, found = ShapeReader(), []
    for turn in (1, 6, 3, 8, 1):
        exif = Image.Exif()
        exif.endian = endian
        exif[0x0112] = turn
        found.append(str(reader.shape_of(encoded(smooth(40, 30), kind, exif=exif))))
    assert found == ["40 x 30", "30 x 40", "40 x 30", "30 x 40", "40 x 30"]


@pytest.mark.parametrize("data", [b"", b"\xff\xd8", b"\xff\xd8\xff\xe0\0\x10JFIF", b"text", b"\x89PNG\r\n\x1a\n"])
def test_what_has_no_header_has_no_size(data):
    assert ShapeReader().shape_of(data) is None


def test_the_depth_and_the_share_cut_away():
    assert ShapeReader().shape_of(encoded(Image.fromarray(np.zeros((3, 4), np.uint16)), "PNG")) == Shape(4, 3, 16)
    assert Shape(4, 3).cut_away == Shape(3, 4).cut_away == 0.25


def test_a_size_that_no_image_can_have_is_none():
    assert ShapeReader().shape_of(png(20_000, 20_000, 8, 2, b"\0")) is None


def test_a_class_with_just_as_many_images_as_are_asked_for_has_none_to_test(tmp_path, choose, lines):
    classes(tmp_path / "data", "a", "b", count=6)
    classes(tmp_path / "data", "c", count=4, first=900)
    assert lines(images_per_user=4)[1:] == [
        "warning: all images of 1 small class are for training, and none for testing: c has 4"
    ]
    classes(tmp_path / "few", "a", "b", count=4)
    assert len(lines(data_path=str(tmp_path / "few"), images_per_user=4)) == 1  # no class has: its line says it


def test_what_has_the_name_of_an_image_and_is_no_file_is_told_by_kind_and_number(tmp_path, lines):
    data = classes(tmp_path / "data", "a", "b")
    for name in ("a/p.jpg", "b/p.jpg", "b/q\x1b.png"):
        os.mkfifo(data / name)
    (data / "a" / "device.jpg").symlink_to("/dev/zero")
    (data / "b" / "folder.jpg").mkdir()
    (data / "b" / "notes").mkdir()
    with socket.socket(socket.AF_UNIX) as server, contextlib.chdir(data / "a"):  # a socket's path must be short
        server.bind("s.jpg")
    found, passed_over = lines()
    assert found.startswith("images: 2 classes")
    for part in (
        "passed over 6 files in the class folders: ",
        r"3 named pipes (a/p.jpg, b/p.jpg, 'b/q\x1b.png')",
        "1 device (a/device.jpg)",
        "1 socket (a/s.jpg)",
        "1 folder (b/folder.jpg)",
    ):
        assert part in passed_over


def test_a_class_folder_of_pipes_alone_is_no_class_and_told(tmp_path, lines):
    data = classes(tmp_path / "data", "a", "b")
    (data / "c").mkdir()
    os.mkfifo(data / "c" / "p.jpg")
    assert "1 folder is no class, for want of images or as the system's own: c (1 named pipe (c/p.jpg))" in lines()[1]


def test_names_that_windows_does_not_take_are_told(tmp_path, lines):
    classes(tmp_path / "data", "ID_1", "x.", "a:b")
    assert lines()[1].startswith("warning: Windows takes no folder called a:b, x.: generated images of such a class")
