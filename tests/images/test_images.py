"""Which images are used, and how one is read: against torchvision, closed forms and files made here."""

import hashlib
import io
import json
import os
import random
import re
import struct
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile
from properties import given, settings, st
from tiny_images import SAMPLES, encoded, grey16, png, reason, small_split, smooth, split_of, tiff
from torchvision import transforms

from gait_latents.common.errors import UserError
from gait_latents.images import folders, reading
from gait_latents.images.folders import list_images, natural_key
from gait_latents.images.reading import BadImage, decode
from gait_latents.images.split import Entry, Skipped, Split, make_split, shared_content

quick = settings(max_examples=60, deadline=None, derandomize=True, database=None)


# --- what is in the folders --------------------------------------------------------------------------------


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
        ("ID_3", []),
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
        (["data/Normal_line/ID_1/a.jpg"], "are they deeper, in .*Normal_line"),
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


# --- which of them are used --------------------------------------------------------------------------------

indexes = st.dictionaries(
    st.text(alphabet="ab12", min_size=1, max_size=3),
    st.lists(st.text(alphabet="xy12", min_size=1, max_size=3), min_size=3, max_size=9, unique=True),
    min_size=1,
    max_size=4,
)
kinds = st.sampled_from(["random", "contiguous"])


def places(entries) -> set[tuple[str, str]]:
    return {(entry.class_name, entry.name) for entry in entries}


@quick
@given(indexes, kinds, st.sampled_from([1, 3, "all"]), st.integers(0, 9))
def test_a_split_divides_all_images_in_natural_order(index, kind, images_per_user, seed):
    split = split_of(index, images_per_user=images_per_user, split=kind, seed=seed)
    assert list(split.classes) == sorted(index, key=natural_key)
    parts = (split.train, split.test, split.gap)
    everything = [(class_name, name) for class_name in index for name in index[class_name]]
    assert sorted(everything) == sorted((e.class_name, e.name) for part in parts for e in part)
    for part in parts:
        order = [(natural_key(e.class_name), natural_key(e.name)) for e in part]
        assert order == sorted(order)
    for class_name, names in index.items():
        wanted = len(names) if images_per_user == "all" else images_per_user
        assert sum(entry.class_name == class_name for entry in split.train) == wanted


@quick
@given(indexes, kinds, st.integers(0, 9))
def test_another_class_changes_nobody_elses_split(index, kind, seed):
    before = split_of(index, split=kind, seed=seed)
    after = split_of({**index, "new 5": ["1", "2", "3"]}, split=kind, seed=seed)
    for part in ("train", "test", "gap"):
        others = tuple(e for e in getattr(after, part) if e.class_name != "new 5")
        assert others == getattr(before, part)


@quick
@given(indexes, kinds, st.integers(0, 9), st.text(alphabet="xyz0", min_size=4, max_size=4))
def test_another_image_displaces_at_most_one(index, kind, seed, name):
    before = split_of(index, split=kind, seed=seed)
    class_name = next(iter(index))
    after = split_of({**index, class_name: [*index[class_name], name]}, split=kind, seed=seed)
    assert len(places(before.train) - places(after.train)) <= 1


@quick
@given(indexes, kinds, st.integers(0, 9), st.sampled_from([1, 2, "all"]))
def test_a_stored_split_stands_in_for_the_folder(index, kind, seed, num_users):
    split = split_of(index, split=kind, seed=seed, num_users=num_users)
    skipped = Skipped(split.train[0].class_name, split.train[0].name, "truncated")
    for stored in (split, split.without([skipped])):
        stored = Split.from_bytes(stored.to_bytes(), "here")
        assert split_of(stored.index(), split=kind, seed=seed, num_users=num_users) == split


def test_the_images_of_a_seed_are_the_same_for_ever():
    # Were this order another one, the test images of every user would move into training.
    index = {"ID_1": [f"{i}.jpg" for i in range(12)], "ID_2": [f"{i}.jpg" for i in range(12)]}
    ranks = {name: hashlib.sha256(f'[42, "ID_2", "{name}"]'.encode()).digest() for name in index["ID_2"]}
    expected = sorted(sorted(ranks, key=lambda name: ranks[name])[:4], key=natural_key)
    names = [(entry.class_name, entry.name) for entry in split_of(index, images_per_user=4, seed=42).train]
    assert names[4:] == [("ID_2", name) for name in expected]
    assert [name for _, name in names] == ["7.jpg", "8.jpg", "9.jpg", "11.jpg", "3.jpg", "6.jpg", "7.jpg", "9.jpg"]


def test_the_seed_decides_and_a_larger_share_contains_the_smaller():
    index = {"a": [str(i) for i in range(100)]}
    ten, twenty = split_of(index, images_per_user=10), split_of(index, images_per_user=20)
    assert places(ten.train) < places(twenty.train)
    assert places(split_of(index, images_per_user=10, seed=1).train) != places(ten.train)


def test_a_contiguous_split_trains_on_one_end_and_leaves_a_gap():
    index = {"ID_1": [f"{i}.jpg" for i in reversed(range(12))], "ID_2": ["1", "2", "3", "4", "5", "6"]}
    split = split_of(index, images_per_user=5, split="contiguous", split_gap=4)
    names = {
        part: [e.name for e in getattr(split, part) if e.class_name == "ID_1"] for part in ("train", "gap", "test")
    }
    assert names["train"] == ["0.jpg", "1.jpg", "2.jpg", "3.jpg", "4.jpg"]
    assert names["gap"] == ["5.jpg", "6.jpg", "7.jpg", "8.jpg"]
    assert names["test"] == ["9.jpg", "10.jpg", "11.jpg"]
    assert [e.name for e in split.gap if e.class_name == "ID_2"] == ["6"]


def test_classes_with_too_few_images_are_listed_with_the_number_that_would_do():
    index = {"ID_1": list("abcdefghi"), "ID_2": ["a", "b"], "ID_10": ["a", "b", "c"]}
    with pytest.raises(UserError) as caught:
        split_of(index, images_per_user=5)
    assert str(caught.value) == ("--images_per_user is 5 but ID_2 has 2, ID_10 has 3; lower it to 2 or add images")
    assert len(split_of(index, images_per_user=5, num_users=1).train) == 5


@pytest.mark.parametrize("images_per_user", [3, "all"])
def test_a_class_without_images_is_an_error_that_names_it(images_per_user):
    with pytest.raises(UserError, match=r"ID_2 has none; .*remove the folders that have none"):
        split_of({"ID_1": ["a", "b", "c"], "ID_2": []}, images_per_user=images_per_user)


def test_fewer_classes_than_asked_for_is_a_warning_that_lists_them():
    index = {"ID_1": ["a"], "ID_2": ["a"]}
    assert folders.missing_classes_warning(index, "all") is None
    assert folders.missing_classes_warning(index, 2) is None
    assert (
        folders.missing_classes_warning(index, 3) == "--num_users is 3 but there are only 2 class folders: ID_1, ID_2"
    )
    assert split_of(index, images_per_user=1, num_users=3).classes == ("ID_1", "ID_2")


def test_entries_know_their_labels_and_keys():
    split = split_of({"ID_2": ["a", "b"], "ID_10": ["a", "b"]}, images_per_user=1)
    assert split.labels(split.train) == [0, 1]
    assert split.labels(reversed(split.test)) == [1, 0]
    assert split.keys() == {}
    keys = {(entry.class_name, entry.name): reading.image_key(entry.name.encode()) for entry in split.train}
    assert split.with_keys(keys).keys() == keys
    assert split.with_keys(keys).with_keys({}) == split.with_keys(keys)


def test_skipped_images_leave_the_split_but_not_its_record():
    split = split_of({"a": ["1", "2", "3"], "b": ["1", "2", "3"]})
    gone = [Skipped("a", split.train[0].name, "empty"), Skipped("b", split.test[-1].name, "cut short")]
    left = split.without(gone[:1]).without(gone)
    assert left.skipped == tuple(gone)
    assert places(left.train) == places(split.train) - places(gone)
    assert places(left.test) == places(split.test) - places(gone)
    with pytest.raises(UserError, match="no training image can be read of a;"):
        split.without([Skipped("a", name, "empty") for name in "123"])


def test_content_in_both_parts_is_found():
    split = split_of({"a": ["1", "2", "3", "4"]}, images_per_user=2)
    assert shared_content(split) == []
    same = reading.image_key(b"same")
    split = split.with_keys({(e.class_name, e.name): same for e in (*split.train, split.test[0])})
    assert shared_content(split) == [(split.train[0], split.test[0])]


# --- the stored split --------------------------------------------------------------------------------------


def test_a_stored_split_is_readable_with_one_image_a_line():
    data = small_split().to_bytes()
    lines = data.decode().splitlines()
    assert json.loads(data)["rule"]["split"] == "contiguous"
    assert sum("3.jpg" in line for line in lines) == 1 and all(len(line) < 200 for line in lines)
    key = reading.image_key(b"1.jpg")
    assert f'    {{"class": "ID_1", "name": "1.jpg", "key": "{key}"}}' in lines
    assert Split.from_bytes(data, "here") == small_split()


# --- reading one: size, orientation ------------------------------------------------------------------------


def torchvision_square(image: Image.Image, image_size: int) -> np.ndarray:
    steps = [transforms.Resize(image_size), transforms.CenterCrop(image_size), transforms.ToTensor()]
    tensor = transforms.Compose(steps)(image.convert("RGB"))
    assert isinstance(tensor, torch.Tensor)
    return (tensor * 255).round().byte().permute(1, 2, 0).numpy()


def test_pixels_equal_torchvisions_bit_for_bit():
    draw = random.Random(0)
    sizes = [(32, 32), (33, 32), (32, 35), (1, 1), (1, 30), (64, 64), (31, 97), (640, 480), (257, 256), (100, 101)]
    sizes += [(draw.randint(1, 150), draw.randint(1, 150)) for _ in range(70)]
    for case, size in enumerate(sizes):
        image = smooth(*size, seed=case)
        for image_size in (32, draw.randint(1, 70)):
            found = decode(encoded(image, "PNG"), image_size=image_size)
            assert found.shape == (image_size, image_size, 3) and found.dtype == np.uint8
            np.testing.assert_array_equal(found, torchvision_square(image, image_size), f"{size} to {image_size}")


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"quality": 30}])
def test_a_large_jpeg_is_decoded_at_full_size_before_it_is_resized(options):
    data = encoded(smooth(900, 700), "JPEG", **options)
    found = decode(data, image_size=32)
    np.testing.assert_array_equal(found, torchvision_square(Image.open(io.BytesIO(data)), 32))
    assert found.flags.writeable and found.flags.c_contiguous


# How the stored pixels look when the upright picture is `a`, by the number in the EXIF tag.
TURNED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: a.swapaxes(0, 1)[::-1],
    7: lambda a: a.swapaxes(0, 1)[::-1, ::-1],
    8: lambda a: a.swapaxes(0, 1)[:, ::-1],
}


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", TURNED)
def test_a_turned_photograph_is_set_upright(kind, orientation):
    upright = np.asarray(smooth(40, 30))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(TURNED[orientation](upright)))
    data = encoded(stored, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
    np.testing.assert_array_equal(decode(data, image_size=24), torchvision_square(Image.fromarray(upright), 24))


@pytest.mark.parametrize(
    "exif",
    [
        b"Exif\0\0",
        b"Exif\0\0garbage",
        b"Exif\0\0MM\0*\0\0\0\x08\xff\xff",
        b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\x02\0\0\0ab\0\0",
        b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x63\0\0\0",
    ],
)
def test_broken_exif_does_not_cost_the_image(exif):
    plain = encoded(smooth(), "JPEG", quality=90)
    data = plain[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + plain[2:]
    np.testing.assert_array_equal(decode(data, image_size=16), decode(plain, image_size=16))


def test_exif_data_in_text_that_is_no_text_do_not_cost_the_image():
    data = png(2, 2, 8, 0, b"\0\1\2\0\3\4", (b"tEXt", b"Raw profile type exif\0\nexif\n 9\nno hex"))
    with pytest.raises(ValueError, match="hex"), Image.open(io.BytesIO(data)) as image:
        image.getexif()
    assert decode(data, image_size=2)[..., 0].tolist() == [[1, 2], [3, 4]]


def test_the_recipe_is_raised_when_the_pixels_change():
    data = encoded(smooth(90, 61), "PNG")
    pixels = hashlib.sha256(decode(data, image_size=32).tobytes()).hexdigest()
    assert (reading.RECIPE["version"], pixels[:16]) == (1, "30e5f1d6a49dfc6a")
    assert json.loads(json.dumps(reading.RECIPE)) == reading.RECIPE


# --- reading one: colours ----------------------------------------------------------------------------------


def decoded_pixels(data: bytes, image_size: int = 20) -> np.ndarray:
    return decode(data, image_size=image_size).astype(int)


def gradient() -> np.ndarray:
    """Returns 20 x 20 greys of 8 bits."""
    return np.linspace(0, 255, 400).round().astype(np.uint8).reshape(20, 20)


@pytest.mark.parametrize(
    ("kind", "mode", "options"),
    [
        *[("PNG", mode, {}) for mode in ("1", "L", "P", "RGB")],
        *[("TIFF", mode, {}) for mode in ("1", "L", "P", "RGB", "CMYK", "YCbCr", "LAB")],
        *[("TIFF", mode, {"compression": "tiff_lzw"}) for mode in ("L", "RGB")],
        *[("JPEG", mode, {"quality": 95}) for mode in ("L", "RGB", "CMYK")],
        *[("PPM", mode, {}) for mode in ("1", "L", "RGB")],
        *[("BMP", mode, {}) for mode in ("1", "L", "P", "RGB")],
        *[("GIF", mode, {}) for mode in ("L", "P")],
        *[("WEBP", "RGB", {"lossless": quality}) for quality in (True, False)],
    ],
)
def test_colours_without_alpha_are_what_pillow_converts(kind, mode, options):
    data = encoded(smooth(20, 20).convert("RGB").convert(mode), kind, **options)
    np.testing.assert_array_equal(decode(data, image_size=20), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
    assert np.ptp(decode(data, image_size=20)) > 100


@pytest.mark.parametrize(("kind", "mode"), [("PNG", "RGBA"), ("PNG", "LA"), ("TIFF", "RGBA"), ("WEBP", "RGBA")])
def test_alpha_lies_over_white(kind, mode):
    image = smooth(20, 20).convert("L") if mode == "LA" else smooth(20, 20)
    alpha = gradient()
    image.putalpha(Image.fromarray(alpha))
    data = encoded(image, kind, **({"lossless": True, "exact": True} if kind == "WEBP" else {}))
    colour = np.asarray(image.convert("RGBA"))[..., :3].astype(float)
    share = alpha[..., None] / 255
    assert np.abs(decoded_pixels(data) - (colour * share + 255 * (1 - share))).max() <= 1


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB"])
def test_a_transparent_colour_becomes_white(mode):
    image = smooth(20, 20).convert(mode) if mode != "P" else smooth(20, 20).quantize(8)
    stored = np.asarray(image)
    hidden = stored[3, 3] if mode != "1" else np.array(False)
    transparency = tuple(hidden.tolist()) if mode == "RGB" else int(hidden)
    data = encoded(image, "PNG", transparency=transparency)
    plain = np.array(image.convert("RGB"))
    mask = (stored == hidden).reshape(20, 20, -1).all(-1, keepdims=True)
    np.testing.assert_array_equal(decode(data, image_size=20), np.where(mask, 255, plain))
    assert np.where(mask, 255, plain).tolist() != plain.tolist()


def test_a_palette_with_alpha_lies_over_white():
    image = smooth(20, 20).quantize(4)
    alphas = bytes([0, 85, 170, 255])
    data = encoded(image, "PNG", transparency=alphas)
    share = np.frombuffer(alphas, np.uint8)[np.asarray(image)][..., None] / 255
    expected = np.asarray(image.convert("RGB")) * share + 255 * (1 - share)
    assert np.abs(decoded_pixels(data) - expected).max() <= 1


def test_a_transparent_gif_lies_over_white_and_gives_its_first_frame():
    first, second = smooth(20, 20, seed=1).quantize(8), smooth(20, 20, seed=2).quantize(8)
    stored = np.asarray(first)
    hidden = int(stored[0, 0])
    data = encoded(first, "GIF", save_all=True, append_images=[second], transparency=hidden, disposal=2)
    found = decode(data, image_size=20)
    assert (found[stored == hidden] == 255).all()
    np.testing.assert_array_equal(found[stored != hidden], np.asarray(first.convert("RGB"))[stored != hidden])


@pytest.mark.parametrize("kind", ["PNG", "GIF", "WEBP", "TIFF", "MPO"])
def test_of_several_frames_the_first_is_read(kind):
    first = smooth(20, 20, seed=1).convert("L").convert("RGB")
    options = {"save_all": True, "append_images": [smooth(20, 20, seed=2)]}
    data = encoded(first, kind, **options, **({"lossless": True} if kind == "WEBP" else {}))
    assert getattr(Image.open(io.BytesIO(data)), "n_frames", 1) == 2
    assert np.abs(decoded_pixels(data) - np.asarray(first)).max() <= (20 if kind == "MPO" else 0)


@pytest.mark.parametrize(
    ("name", "data", "white"),
    [
        ("PNG", encoded(Image.fromarray(grey16()), "PNG"), 65535),
        ("TIFF", encoded(Image.fromarray(grey16()), "TIFF"), 65535),
        ("deflated TIFF", encoded(Image.fromarray(grey16()), "TIFF", compression="tiff_adobe_deflate"), 65535),
        ("little-endian TIFF", tiff(grey16(), photometric=1, bits=16), 65535),
        ("big-endian TIFF", tiff(grey16().astype(">u2"), photometric=1, bits=16, order=">"), 65535),
        ("PGM", encoded(Image.fromarray(grey16()), "PPM"), 65535),
        ("12-bit PGM", b"P5 20 20 4095\n" + grey16(4095).astype(">u2").tobytes(), 4095),
    ],
)
def test_greys_of_16_bits_are_scaled_to_8(name, data, white):
    expected = (grey16(white) * 255.0 / white).round()
    found = decoded_pixels(data)
    assert np.abs(found - expected[..., None]).max() <= (0 if white == 65535 else 1), name
    assert found.min() == 0 and found.max() == 255


def test_a_12_bit_tiff_has_its_own_white():
    # Two greys in three bytes, the higher bits first.
    greys = grey16(4095).ravel().astype(int)
    pairs = [(a >> 4, (a & 15) << 4 | b >> 8, b & 255) for a, b in greys.reshape(-1, 2)]
    packed = bytes(byte for pair in pairs for byte in pair)
    found = decoded_pixels(tiff(grey16(4095), photometric=1, bits=12, data=packed))
    np.testing.assert_array_equal(found[..., 0], (grey16(4095) * 255.0 / 4095).round())


def test_colours_of_16_bits_keep_their_place():
    rows = b"".join(b"\0" + np.repeat(row[:, None], 3, 1).astype(">u2").tobytes() for row in grey16())
    found = decoded_pixels(png(20, 20, 16, 2, rows))
    assert np.abs(found - (grey16() / 257.0)[..., None]).max() <= 1


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (tiff(grey16(), photometric=0, bits=16), "zero is not black"),
        (tiff(grey16().view(np.int16), photometric=1, bits=16, sample_format=2), "mode I,"),
        (tiff(grey16().astype(np.uint32), photometric=1, bits=32), "mode I,"),
        (tiff(gradient().astype(np.float32), photometric=1, bits=32, sample_format=3), "mode F,"),
        (b"Pf 20 20 -1.0\n" + gradient().astype("<f4").tobytes(), "mode F,"),
        (png(2, 1, 16, 0, b"\0\0\0\0\1", (b"tRNS", b"\0\1")), "16-bit PNG with a transparent"),
        (png(1, 1, 16, 2, b"\0\0\0\0\0\0\1", (b"tRNS", b"\0\0\0\0\0\1")), "16-bit PNG with a transparent"),
    ],
)
def test_greys_of_unknown_meaning_are_refused(data, message):
    assert message in reason(data)


# --- reading one: refusals ---------------------------------------------------------------------------------


def test_an_image_under_another_ending_is_read():
    np.testing.assert_array_equal(decode(encoded(smooth(32, 32), "PNG"), image_size=32), np.asarray(smooth(32, 32)))


def test_the_limit_on_pixels_lets_large_photographs_through():
    assert decode(encoded(Image.new("1", (6_000, 4_000)), "PNG"), image_size=4).max() == 0
    assert "67,108,864" in reason(encoded(Image.new("1", (8_193, 8_192)), "PNG"))


# --- reading one: threads and warnings ---------------------------------------------------------------------


def test_threads_decode_as_one_does_and_leave_pillow_as_it_was(monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    filters = list(warnings.filters)
    good = [encoded(smooth(60, 50, seed=seed), "JPEG") for seed in range(20)]
    mixed = [data if i % 3 else data[:-100] for i, data in enumerate(good * 10)]

    def result(data: bytes) -> bytes | None:
        try:
            return decode(data, image_size=32).tobytes()
        except BadImage:
            return None

    alone = [result(data) for data in mixed]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(result, mixed)) == alone
    assert sum(pixels is None for pixels in alone) == len(mixed[::3])
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True and warnings.filters == filters


def test_a_switch_thrown_while_others_decode_does_not_let_truncated_files_through(monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", False)
    inside, leave = threading.Event(), threading.Event()

    def hold():
        with reading._strict_pillow:
            inside.set()
            leave.wait(10)

    holder = threading.Thread(target=hold)
    holder.start()
    assert inside.wait(10)
    ImageFile.LOAD_TRUNCATED_IMAGES = True
    try:
        assert "cut short" in reason(SAMPLES["JPEG"][:-100])
    finally:
        leave.set()
        holder.join()


def test_what_pillow_warns_of_does_not_surface():
    corrupt = b"Exif\0\0MM\0*\0\0\0\x08\0\x20"
    plain = encoded(smooth(), "JPEG")
    data = plain[:2] + b"\xff\xe1" + struct.pack(">H", len(corrupt) + 2) + corrupt + plain[2:]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning), Image.open(io.BytesIO(data)) as image:
            image.getexif()
        decode(data, image_size=16)
        with pytest.raises(UserWarning, match="mine"):
            warnings.warn("mine", stacklevel=1)


def test_the_key_is_the_digest_of_the_bytes():
    assert reading.image_key(b"abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert Entry("ID_1", "a.jpg") == Entry("ID_1", "a.jpg", "")
