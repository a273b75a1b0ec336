"""The pictures: grids with names, and how they are saved."""

import io
import math

import numpy as np
import pytest
import torch
from PIL import Image

from gait_latents.common.pictures import encode_image, labelled_grid, psnr, save_picture, to_uint8


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
