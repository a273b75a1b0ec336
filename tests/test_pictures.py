"""The pictures: grids with names, the loss curve, and how they are saved."""

import io
import math

import numpy as np
import pytest
import torch
from PIL import Image

import pictures
from pictures import confusion_matrix, encode_image, labelled_grid, loss_curve, psnr, save_picture, to_uint8


def tile(value: int, side: int = 32) -> np.ndarray:
    return np.full((side, side, 3), value, dtype=np.uint8)


def is_inked(pixels: np.ndarray) -> bool:
    """Says whether something dark stands on the white."""
    return bool((pixels < 100).any())


def test_images_are_rounded_to_the_nearest_of_256_levels():
    levels = torch.arange(256, dtype=torch.float32) / 255
    image = levels.reshape(1, 1, 16, 16).expand(1, 3, 16, 16)
    found = to_uint8(image)
    assert found.shape == (1, 16, 16, 3) and found.dtype == np.uint8
    assert found[0, :, :, 0].ravel().tolist() == list(range(256))
    outside = torch.tensor([-0.5, 0.4999 / 255, 0.5001 / 255, 1.7]).reshape(1, 1, 2, 2).expand(1, 3, 2, 2)
    assert to_uint8(outside)[0, :, :, 1].ravel().tolist() == [0, 0, 1, 255]


def test_a_grid_shows_each_image_in_its_place_beside_its_name():
    rows = [[tile(50), tile(100), tile(150)], [tile(200), tile(220), tile(10)]]
    grid = np.asarray(labelled_grid(rows, ["ID_2", "ID_10"]))
    step, left = 36, grid.shape[1] - 3 * 36
    assert grid.shape[0] == 4 + 2 * step
    for i, row in enumerate(rows):
        for j, image in enumerate(row):
            top, start = 4 + i * step, left + j * step
            assert np.array_equal(grid[top : top + 32, start : start + 32], image)
        assert is_inked(grid[4 + i * step : 36 + i * step, :left])
    names = grid[:, :left]
    assert not np.array_equal(names[4:36], names[40:72])


def test_columns_have_names_above_them_on_request():
    plain = labelled_grid([[tile(200), tile(200)]], ["row"])
    named = labelled_grid([[tile(200), tile(200)]], ["row"], ["1", "2.5"])
    assert named.height > plain.height and named.width == plain.width
    top = np.asarray(named)[: named.height - plain.height]
    left = named.width - 2 * 36
    assert is_inked(top[:, left : left + 32]) and is_inked(top[:, left + 36 : left + 68])
    assert not is_inked(top[:, :left])


@pytest.mark.parametrize("name", ["行走者_3", "a name\nof two lines", "x" * 300, "\udcff broken", "", "naïve Ünïcode"])
def test_any_name_can_be_drawn_in_a_line_of_bounded_length(name):
    grid = labelled_grid([[tile(128)]], [name])
    assert grid.height == 40 and grid.width < 400


def test_rows_of_different_lengths_leave_white():
    grid = np.asarray(labelled_grid([[tile(1), tile(2)], [tile(3)]], ["a", "b"]))
    assert (grid[40:72, -36:] == 255).all()


def test_the_loss_curve_falls_where_the_loss_falls():
    steps = list(range(1, 101))
    curve = np.asarray(loss_curve(steps, [10.0 / step for step in steps])).astype(int)
    is_blue = (curve[:, :, 2] > 150) & (curve[:, :, 0] < 60)
    columns = np.flatnonzero(is_blue.any(0))
    assert len(columns) > 700
    heights = [np.flatnonzero(is_blue[:, column]).mean() for column in columns[::50]]
    assert heights == sorted(heights)  # pixel rows count from the top


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.027, 0.0705, [0.03, 0.04, 0.05, 0.06, 0.07]),
        (0.002, 3.0, [0.003, 0.01, 0.03, 0.1, 0.3, 1, 3]),
        (0.9e-4, 1.1, [1e-4, 1e-3, 1e-2, 1e-1, 1]),
        (0.04, 0.6, [0.05, 0.1, 0.2, 0.5]),
        (0.2865, 0.3141, [0.29, 0.3, 0.31]),
        (0.95, 1.05, [0.95, 1.0, 1.05]),
    ],
)
def test_the_loss_axis_has_round_numbers(low, high, expected):
    assert pictures.round_numbers(low, high) == pytest.approx(expected)


def test_every_range_of_losses_has_a_few_numbers():
    generator = np.random.default_rng(0)
    for _ in range(500):
        low = 10 ** generator.uniform(-9, 9)
        high = low * 10 ** generator.uniform(0.04, 12)
        numbers = pictures.round_numbers(low, high)
        assert 2 <= len(numbers) <= 10 and low * (1 - 1e-9) <= min(numbers) and max(numbers) <= high * (1 + 1e-9)
        assert [float(f"{number:.4g}") for number in numbers] == pytest.approx(numbers, rel=1e-9)  # as they are written


@pytest.mark.parametrize("losses", [[1.0], [0.5, 0.5], [math.nan, math.inf, 0.3], [math.nan], [], [0.0, -1.0]])
def test_any_losses_can_be_drawn(losses):
    curve = loss_curve(list(range(1, len(losses) + 1)), losses)
    assert curve.size == (960, 480) and is_inked(np.asarray(curve))


def test_a_picture_is_saved_in_the_format_of_its_ending(tmp_path):
    gradient = Image.fromarray(np.arange(64 * 64 * 3, dtype=np.uint32).astype(np.uint8).reshape(64, 64, 3))
    save_picture(gradient, tmp_path / "deep" / "a.png")
    save_picture(gradient, tmp_path / "a.jpg")
    with Image.open(tmp_path / "deep" / "a.png") as png, Image.open(tmp_path / "a.jpg") as jpg:
        assert png.format == "PNG" and np.array_equal(np.asarray(png), np.asarray(gradient))
        assert jpg.format == "JPEG" and jpg.size == gradient.size


def test_jpegs_keep_their_colours():
    """Quality 95 without chroma subsampling: a red pixel column stays red."""
    stripes = np.zeros((16, 16, 3), dtype=np.uint8)
    stripes[:, ::2] = (255, 0, 0)
    back = np.asarray(Image.open(io.BytesIO(encode_image(Image.fromarray(stripes), ".jpg")))).astype(int)
    assert np.abs(back - stripes).max() < 40


def test_psnr_is_its_closed_form():
    assert psnr(tile(100), tile(100)) == math.inf
    assert psnr(tile(100), tile(110)) == pytest.approx(10 * math.log10(255**2 / 100))
    assert psnr(tile(0), tile(255)) == psnr(tile(255), tile(0)) == 0  # no wrap-around in uint8


@pytest.mark.parametrize("num_classes", [3, 31])
def test_a_confusion_matrix_is_darker_where_the_share_of_its_row_is_larger(num_classes):
    counts = (30 * np.eye(num_classes, dtype=int)).tolist()
    counts[0][-1] = 10  # a quarter of the first row
    pixels = np.asarray(confusion_matrix(counts, [f"ID_{i + 1}" for i in range(num_classes)])).astype(int)
    bottom, right = (axis.max() for axis in np.nonzero((pixels == (31, 90, 180)).all(2)))  # of the last cell
    cell = max(30, min(64, 400 // num_classes))

    def colour(row: int, column: int) -> list[int]:
        """Looks into the corner of a cell, beside the digits; the last cell has number -1."""
        return pixels[bottom + (row + 1) * cell - 3, right + (column + 1) * cell - 3].tolist()

    def blue(share: float) -> list[int]:
        return [round(255 + share * (level - 255)) for level in (31, 90, 180)]

    assert colour(-1, -1) == colour(-2, -2) == blue(1)
    assert colour(-num_classes, -1) == blue(0.25) and colour(-num_classes, -num_classes) == blue(0.75)
    assert colour(-1, -num_classes) == colour(-1, -2) == blue(0)
    top, left = bottom - num_classes * cell, right - num_classes * cell
    assert is_inked(pixels[:top, left:]) and is_inked(pixels[top:, :left]) and not is_inked(pixels[:top, :left])


def test_names_of_every_kind_stand_beside_a_confusion_matrix():
    names = ["行走者_3", "a name\nof two lines", "x" * 300, "\udcff broken", ""]
    picture = confusion_matrix(np.eye(5, dtype=int).tolist(), names)
    assert picture.width == picture.height < 800
    assert confusion_matrix([[0, 0], [0, 0]], ["a", "b"]).width < 400  # no images at all
