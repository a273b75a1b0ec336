"""The pictures that the scripts make: rows of images with names, and the loss curve. PIL only.

Images are uint8 arrays [S S 3].
"""

import io
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

import durable

_MARGIN = 4
_WHITE, _BLACK, _GREY, _BLUE = (255, 255, 255), (0, 0, 0), (210, 210, 210), (31, 90, 180)


def to_uint8(images: object) -> np.ndarray:
    """Turns float images [B 3 S S] in [0, 1] (a tensor) into uint8 arrays [B S S 3], rounded to nearest."""
    return (images.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()  # type: ignore[attr-defined]


def labelled_grid(
    rows: Sequence[Sequence[np.ndarray]], row_names: Sequence[str], column_names: Sequence[str] = ()
) -> Image.Image:
    """Draws rows of images, each with its name at the left, under optional column names."""
    side = rows[0][0].shape[0]
    font_size = max(11, min(18, side // 8))
    font = ImageFont.load_default(size=font_size)
    left = 2 * _MARGIN + max(math.ceil(font.getlength(_one_line(name))) for name in row_names)
    top = _MARGIN + (round(font_size * 1.5) if column_names else 0)
    step = side + _MARGIN
    canvas = Image.new("RGB", (left + step * max(map(len, rows)), top + step * len(rows)), _WHITE)
    draw = ImageDraw.Draw(canvas)
    for j, name in enumerate(column_names):
        draw.text((left + j * step + side / 2, top / 2), _one_line(name), fill=_BLACK, font=font, anchor="mm")
    for i, (row, name) in enumerate(zip(rows, row_names, strict=True)):
        draw.text((_MARGIN, top + i * step + side / 2), _one_line(name), fill=_BLACK, font=font, anchor="lm")
        for j, image in enumerate(row):
            canvas.paste(Image.fromarray(image), (left + j * step, top + i * step))
    return canvas


def _one_line(name: str) -> str:
    text = " ".join(name.encode("utf-8", "replace").decode().split())
    return text if len(text) <= 24 else f"{text[:23]}…"


def loss_curve(steps: Sequence[int], losses: Sequence[float]) -> Image.Image:
    """Draws the loss against the step, on a logarithmic loss axis, with its running median in bold."""
    width, height, left, right, top, bottom = 960, 480, 80, 24, 30, 48
    canvas = Image.new("RGB", (width, height), _WHITE)
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(size=14)
    values = np.asarray(losses, dtype=np.float64)
    finite = np.isfinite(values) & (values > 0)
    x, y = np.asarray(steps, dtype=np.float64)[finite], np.log10(values[finite])
    if not len(y):
        draw.text((width / 2, height / 2), "no loss yet", fill=_BLACK, font=font, anchor="mm")
        return canvas
    low, high = y.min() - 0.02, y.max() + 0.02
    last = max(x.max(), 1.0)

    def place(step: float, value: float) -> tuple[float, float]:
        across = left + (width - left - right) * step / last
        return across, top + (height - top - bottom) * (high - value) / (high - low)

    for loss in round_numbers(10**low, 10**high):
        _, row = place(0, math.log10(loss))
        draw.line([(left, row), (width - right, row)], fill=_GREY)
        draw.text((left - 8, row), f"{loss:.4g}", fill=_BLACK, font=font, anchor="rm")
    for step in np.linspace(0, last, 6):
        column, bottom_row = place(step, low)
        draw.text((column, bottom_row + 8), f"{step:,.0f}", fill=_BLACK, font=font, anchor="mt")
    draw.line([place(0, low), place(last, low)], fill=_BLACK)
    draw.text((width / 2, height - 6), "step", fill=_BLACK, font=font, anchor="mb")
    draw.text((left - 8, 2), "loss", fill=_BLACK, font=font, anchor="ra")
    draw.line([place(a, b) for a, b in zip(x, y, strict=True)], fill=(150, 180, 225))
    draw.line([place(a, b) for a, b in zip(x, _running_median(y), strict=True)], fill=_BLUE, width=3)
    return canvas


def round_numbers(low: float, high: float) -> list[float]:
    """Returns a few round numbers from `low` to `high`, both above 0, for a logarithmic axis."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in ("1", "13", "125", "123456789"):
        found = [float(f"{digit}e{power}") for power in powers for digit in digits]
        found = [number for number in found if low <= number <= high]
        if len(found) >= 4:
            return found[:: math.ceil(len(found) / 10)]
    step = 10 ** math.floor(math.log10((high - low) / 2))  # too little for that: as on a plain axis
    step *= next(factor for factor in (5, 2, 1) if (high - low) / (factor * step) >= 2)
    return [step * number for number in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _running_median(values: np.ndarray) -> np.ndarray:
    half = max(1, len(values) // 40)
    return np.array([np.median(values[max(0, i - half) : i + half + 1]) for i in range(len(values))])


def confusion_matrix(counts: Sequence[Sequence[int]], names: Sequence[str]) -> Image.Image:
    """Draws a confusion matrix: a row per true class, a column per class that was said, darker for a larger share.

    Args:
        counts: whole numbers [K][K]; the colour of a cell is its share of its row.
        names: the K classes, in the same order.
    """
    num_classes = len(names)
    cell = max(30, min(64, 400 // num_classes))
    font_size = max(12, round(cell / 3.5))
    font = ImageFont.load_default(size=font_size)
    small = ImageFont.load_default(size=11 if cell < 40 else 14)
    texts = [_one_line(name) for name in names]
    reach = math.ceil(max(font.getlength(text) for text in texts))
    title = round(font_size * 1.8)
    start = _MARGIN + title + reach + 2 * _MARGIN  # where the cells begin, in both directions
    side = max(start + cell * num_classes, start + math.ceil(font.getlength(_SAID))) + 2 * _MARGIN
    canvas = Image.new("RGB", (side, side), _WHITE)
    draw = ImageDraw.Draw(canvas)
    middle = start + cell * num_classes / 2
    draw.text((middle, _MARGIN), _SAID, fill=_BLACK, font=font, anchor="ma")
    _draw_upright(canvas, (_MARGIN, round(middle)), _TRUE, font, anchor="mm")
    for i, text in enumerate(texts):
        place = start + i * cell + cell / 2
        draw.text((start - 2 * _MARGIN, place), text, fill=_BLACK, font=font, anchor="rm")
        _draw_upright(canvas, (round(place), start - 2 * _MARGIN), text, font, anchor="bottom")
    for i, row in enumerate(counts):
        for j, count in enumerate(row):
            share = count / max(1, sum(row))
            left, top = start + j * cell, start + i * cell
            fill = tuple(round(255 + share * (level - 255)) for level in _BLUE)
            draw.rectangle([left, top, left + cell, top + cell], fill=fill, outline=_GREY)
            if count:
                ink = _WHITE if share > 0.5 else _BLACK
                draw.text((left + cell / 2, top + cell / 2), f"{count}", fill=ink, font=small, anchor="mm")
    return canvas


_SAID, _TRUE = "said by the classifier", "true class"


def _draw_upright(
    canvas: Image.Image,
    place: tuple[int, int],
    text: str,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    *,
    anchor: str,
) -> None:
    """Writes text from bottom to top: its end at `place` horizontally centred ("bottom"), or around it ("mm")."""
    box = ImageDraw.Draw(canvas).textbbox((0, 0), text or " ", font=font)
    height = math.ceil(font.getbbox("Ag")[3])
    strip = Image.new("RGB", (max(1, math.ceil(box[2])), height + 2), _WHITE)
    ImageDraw.Draw(strip).text((0, 0), text, fill=_BLACK, font=font)
    strip = strip.rotate(90, expand=True)
    if anchor == "bottom":
        canvas.paste(strip, (place[0] - strip.width // 2, place[1] - strip.height))
    else:
        canvas.paste(strip, (place[0], place[1] - strip.height // 2))


# About what a pixel of `encode_image` takes. Spectrograms and photographs lie 30 % around it.
BYTES_PER_PIXEL = {".png": 1.8, ".jpg": 0.9}


def histograms(panels: Sequence[tuple[str, str, np.ndarray]], edges: np.ndarray, expected: np.ndarray) -> Image.Image:
    """Draws densities as bars, up to four panels in a row, with the expected density as a line over each.

    Args:
        panels: (title, remark, density [n]) of each.
        edges: of the bins, [n + 1].
        expected: density [n] at the middle of the bins.
    """
    width, height, pad, title_height, axis_height = 300, 200, 14, 40, 22
    columns = min(4, len(panels))
    canvas = Image.new("RGB", (width * columns, height * math.ceil(len(panels) / columns)), _WHITE)
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(size=13)
    for number, (title, remark, density) in enumerate(panels):
        left, top = width * (number % columns) + pad, height * (number // columns) + title_height
        right, bottom = left + width - 2 * pad, top + height - title_height - axis_height
        across = left + (edges - edges[0]) / (edges[-1] - edges[0]) * (right - left)
        unit = (bottom - top) / (1.6 * expected.max())  # a peak that is higher is cut off
        tops = np.maximum(top, bottom - density * unit)
        for x0, x1, y in zip(across[:-1], across[1:], tops, strict=True):
            if y < bottom:
                draw.rectangle([x0, y, max(x0, x1 - 1), bottom], fill=(150, 180, 225))
        middles = (across[:-1] + across[1:]) / 2
        draw.line(list(zip(middles.tolist(), (bottom - expected * unit).tolist(), strict=True)), fill=_BLUE, width=2)
        draw.line([(left, bottom), (right, bottom)], fill=_BLACK)
        for value in range(math.ceil(edges[0]), math.floor(edges[-1]) + 1):
            x = left + (value - edges[0]) / (edges[-1] - edges[0]) * (right - left)
            draw.line([(x, bottom), (x, bottom + 3)], fill=_BLACK)
            if value % 2 == 0:
                draw.text((x, bottom + 4), str(value), fill=_BLACK, font=font, anchor="mt")
        draw.text((left, top - title_height + 4), title, fill=_BLACK, font=font)
        draw.text((left, top - title_height + 20), remark, fill=(180, 40, 40), font=font)
    return canvas


def encode_image(image: Image.Image, suffix: str) -> bytes:
    """Returns the bytes of an image file: `.png`, or `.jpg` at quality 95 without chroma subsampling."""
    buffer = io.BytesIO()
    if suffix == ".png":
        image.save(buffer, format="PNG")
    else:
        image.save(buffer, format="JPEG", quality=95, subsampling=0)
    return buffer.getvalue()


def save_picture(image: Image.Image, path: Path) -> None:
    """Publishes a picture; its format follows the ending of the path."""
    durable.publish(path, encode_image(image, path.suffix))


def psnr(reference: np.ndarray, other: np.ndarray) -> float:
    """Returns the peak signal-to-noise ratio in dB of two uint8 images, infinite for equal ones."""
    error = np.mean((reference.astype(np.float64) - other.astype(np.float64)) ** 2)
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)
