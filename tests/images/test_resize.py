"""How an image becomes a square: cropped, squashed or padded, and how each is named in the space of latents."""

import io

import numpy as np
import pytest
from PIL import Image
from tiny_images import SAMPLES, encoded, reason, smooth

from gait_latents.images import reading
from gait_latents.images.reading import decode
from gait_latents.images.split import Entry


def bars(width: int = 480, height: int = 96) -> Image.Image:
    """Returns a grey picture with a white bar at its left and a black one at its right, each a sixth of the width."""
    pixels = np.full((height, width), 128, np.uint8)
    pixels[:, : width // 6], pixels[:, -(width // 6) :] = 255, 0
    return Image.fromarray(pixels)


def columns(pixels: np.ndarray) -> np.ndarray:
    """Returns the mean grey of each column."""
    return pixels.mean(axis=(0, 2))


def test_crop_is_the_default_and_loses_the_sides_of_a_wide_picture():
    data = encoded(bars(), "PNG")
    np.testing.assert_array_equal(decode(data, image_size=48), decode(data, image_size=48, resize="crop"))
    assert (decode(data, image_size=48) == 128).all()


def test_squash_keeps_the_sides_of_a_wide_picture():
    found = decode(encoded(bars(), "PNG"), image_size=48, resize="squash")
    assert found.shape == (48, 48, 3) and found.dtype == np.uint8
    assert (
        (columns(found)[:7] == 255).all() and (columns(found)[-7:] == 0).all() and (columns(found)[9:39] == 128).all()
    )


def test_pad_keeps_the_aspect_of_a_wide_picture_between_black_bars():
    found = decode(encoded(bars(), "PNG"), image_size=50, resize="pad")
    assert found.shape == (50, 50, 3) and found.dtype == np.uint8
    inner = found[20:30]  # 480 x 96 is 50 x 10
    assert found[:20].max() == found[30:].max() == 0
    np.testing.assert_array_equal(inner, np.asarray(bars().convert("RGB").resize((50, 10), Image.Resampling.BILINEAR)))


def test_a_tall_picture_is_padded_at_its_sides_and_an_odd_pixel_is_at_the_right():
    found = decode(encoded(Image.new("RGB", (30, 60), "white"), "PNG"), image_size=33, resize="pad")
    assert (columns(found) == [0] * 8 + [255] * 16 + [0] * 9).all()


@pytest.mark.parametrize("side", [16, 32, 45])
def test_a_square_is_read_alike_in_all_ways(side):
    data = encoded(smooth(side, side), "PNG")
    cropped, squashed, padded = (decode(data, image_size=32, resize=how) for how in ("crop", "squash", "pad"))
    assert (cropped == squashed).all() and (cropped == padded).all()


@pytest.mark.parametrize("resize", ["squash", "pad"])
@pytest.mark.parametrize("kind", SAMPLES)
def test_every_kind_of_file_can_be_squashed_and_padded(kind, resize):
    found = decode(SAMPLES[kind], image_size=24, resize=resize)
    assert found.shape == (24, 24, 3) and found.flags.writeable and found.flags.c_contiguous


@pytest.mark.parametrize("resize", ["crop", "squash", "pad"])
def test_a_turned_photograph_is_set_upright_first(resize):
    exif = Image.Exif()
    exif[0x0112] = 6
    upright = bars().transpose(Image.Transpose.ROTATE_270)
    turned, plain = encoded(bars(), "PNG", exif=exif), encoded(upright, "PNG")
    assert (decode(turned, image_size=40, resize=resize) == decode(plain, image_size=40, resize=resize)).all()


def test_a_long_strip_is_refused_only_where_it_would_be_cropped():
    data = encoded(Image.new("RGB", (100_000, 10), "white"), "PNG")
    assert "too long a strip to resize and crop" in reason(data, image_size=256)
    assert decode(data, image_size=256, resize="squash").min() == 255
    padded = decode(data, image_size=256, resize="pad")
    assert (padded[127] == 255).all() and padded.sum() == 256 * 3 * 255  # one row of it


@pytest.mark.parametrize("resize", ["crop", "squash", "pad"])
def test_a_jpeg_that_is_read_in_haste_looks_nearly_the_same(resize):
    data = encoded(smooth(1200, 800), "JPEG")
    exact, hasty = (decode(data, image_size=32, resize=resize, exact=exact).astype(int) for exact in (True, False))
    assert hasty.shape == exact.shape and np.abs(exact - hasty).max() <= 8
    small = decode(encoded(smooth(40, 30), "JPEG"), image_size=32, resize=resize, exact=False)
    assert (small == decode(encoded(smooth(40, 30), "JPEG"), image_size=32, resize=resize)).all()


def test_images_are_read_and_tried_as_they_are_to_be_resized(tmp_path):
    (tmp_path / "ID_1").mkdir()
    entry = Entry("ID_1", "1.png")
    reading.image_path(tmp_path, entry).write_bytes(encoded(Image.new("RGB", (100_000, 10)), "PNG"))
    assert reading.read_image(str(tmp_path), entry, image_size=256, resize="pad").shape == (256, 256, 3)
    (bad,) = reading.find_bad_images([entry], data_path=str(tmp_path), image_size=256)
    assert "too long a strip" in bad.reason
    assert reading.find_bad_images([entry], data_path=str(tmp_path), image_size=256, resize="pad") == ()


def test_each_way_has_a_recipe_of_its_own_and_crop_that_of_all_older_latents():
    recipes = {how: reading.recipe(how) for how in ("crop", "squash", "pad")}
    assert recipes["crop"] is reading.RECIPE and len({str(recipe) for recipe in recipes.values()}) == 3
    for how, recipe in recipes.items():
        assert recipe.keys() == reading.RECIPE.keys() and reading.resize_of(dict(recipe)) == how
        assert how == "crop" or str(recipe["resize"]).startswith(f"{how}: ")
    assert reading.resize_of({**reading.RECIPE, "version": 0}) is reading.resize_of(None) is None


def test_the_pixels_of_each_recipe_are_those_of_pillow():
    """Where Pillow's resize gives other pixels, the versions of the recipes must be raised."""
    image = smooth(90, 61)
    stored = Image.open(io.BytesIO(encoded(image, "PNG")))
    squashed = stored.resize((32, 32), Image.Resampling.BILINEAR)
    assert (decode(encoded(image, "PNG"), image_size=32, resize="squash") == np.asarray(squashed)).all()
    padded = decode(encoded(image, "PNG"), image_size=32, resize="pad")
    assert (padded[5:26] == np.asarray(stored.resize((32, 21), Image.Resampling.BILINEAR))).all()
    assert padded[:5].max() == padded[26:].max() == 0
