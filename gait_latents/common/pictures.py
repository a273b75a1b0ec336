"""The pictures that the scripts make: rows of images with names. PIL only; charts.py draws charts.

Images are uint8 arrays [S S 3].
"""

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from gait_latents.common import files
from gait_latents.common.console import harmless

if TYPE_CHECKING:
    from torch import Tensor

_MARGIN = 4
_WHITE, _BLACK = (255, 255, 255), (0, 0, 0)


def to_uint8(images: "Tensor") -> np.ndarray:
    """Turns float images [B 3 S S] in [0, 1] into uint8 arrays [B S S 3], rounded to nearest."""
    return to_bytes(images).cpu().numpy()


def to_bytes(images: "Tensor") -> "Tensor":
    """Does what `to_uint8` does, and leaves the uint8 images [B S S 3] on their device."""
    return (images.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1)


def labelled_grid(
    rows: Sequence[Sequence[np.ndarray]], row_names: Sequence[str], column_names: Sequence[str] = ()
) -> Image.Image:
    """Draws rows of images, each with its name at the left, under optional column names."""
    side = rows[0][0].shape[0]
    font_size = max(11, min(18, side // 8))
    font = ImageFont.load_default(size=font_size)
    left = 2 * _MARGIN + max(math.ceil(font.getlength(one_line(name))) for name in row_names)
    top = _MARGIN + (round(font_size * 1.5) if column_names else 0)
    step = side + _MARGIN
    canvas = Image.new("RGB", (left + step * max(map(len, rows)), top + step * len(rows)), _WHITE)
    draw = ImageDraw.Draw(canvas)
    for j, name in enumerate(column_names):
        draw.text((left + j * step + side / 2, top / 2), one_line(name), fill=_BLACK, font=font, anchor="mm")
    for i, (row, name) in enumerate(zip(rows, row_names, strict=True)):
        draw.text((_MARGIN, top + i * step + side / 2), one_line(name), fill=_BLACK, font=font, anchor="lm")
        for j, image in enumerate(row):
            canvas.paste(Image.fromarray(image), (left + j * step, top + i * step))
    return canvas


def one_line(name: str, *, longest: int = 24) -> str:
    """Returns a name on one line, cut with an ellipsis where it has more than `longest` letters."""
    text = " ".join(harmless(name).split())
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


# Bytes that a pixel takes in a file of `encode_image`; spectrograms and photographs take up to 30 % more or less.
BYTES_PER_PIXEL = {".png": 1.8, ".jpg": 0.9}


def encode_image(image: Image.Image, suffix: str) -> bytes:
    """Returns the bytes of an image file: `.png`, or `.jpg` at quality 95 without chroma subsampling."""
    buffer = io.BytesIO()
    if suffix == ".png":
        image.save(buffer, format="PNG")
    else:
        image.save(buffer, format="JPEG", quality=95, subsampling=0)
    return buffer.getvalue()


def save_picture(image: Image.Image, path: Path, *, below: Path | None = None) -> None:
    """Publishes a picture; its format follows the ending of the path. `below` is as in `files.publish`."""
    files.publish(path, encode_image(image, path.suffix), below=below)


def psnr(reference: np.ndarray, other: np.ndarray) -> float:
    """Returns the peak signal-to-noise ratio in dB of two uint8 images, infinite for equal ones."""
    error = np.mean((reference.astype(np.float64) - other.astype(np.float64)) ** 2)
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)
