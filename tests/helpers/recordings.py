"""Simulated recordings of walking people, and the windows that people cut out of them as images."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

HEIGHT, WIDTH = 96, 128  # of a window, in values of the recording


def recording(seed: int, columns: int, *, speckle: bool = True, jitter: float = 0.05) -> np.ndarray:
    """Returns the levels of a spectrogram [HEIGHT columns], in dB: limbs as sinusoids around a torso.

    Args:
        seed: of the person and the walk.
        columns: length, 60 of them a second.
        speckle: multiply the power by the noise that every radar has.
        jitter: how much the pace differs from step to step; 0 is a machine.
    """
    draws = np.random.default_rng(seed)
    steps = np.repeat(draws.normal(size=columns // 40 + 1), 40)[:columns]
    phase = 2 * np.pi * np.cumsum(draws.uniform(0.8, 1.1) * (1 + jitter * steps) / 60)
    rows, power = np.arange(HEIGHT)[:, None], np.full((HEIGHT, columns), 0.01)
    for limb in range(5):
        harmonic = 1 if limb < 3 else 2
        speed = HEIGHT / 2 + draws.uniform(8, 40) * np.sin(harmonic * phase + draws.uniform(0, 6))
        power += draws.uniform(0.1, 0.5) * np.exp(-(((rows - speed) / draws.uniform(2, 5)) ** 2))
    power += np.exp(-(((rows - HEIGHT / 2 - 3 * np.sin(2 * phase)) / 3) ** 2))
    return 10 * np.log10(power * (draws.exponential(size=power.shape) if speckle else 1) + 1e-4)


def jet(level: np.ndarray) -> np.ndarray:
    """Colours levels in [0, 1] from dark blue to dark red; uint8 [... 3]."""
    bands = np.clip(1.5 - np.abs(4 * level[..., None] - np.array([3.0, 2.0, 1.0])), 0, 1)
    return np.round(255 * bands).astype(np.uint8)


def grey(level: np.ndarray) -> np.ndarray:
    """Shows levels in [0, 1] as greys; uint8 [... 3]."""
    return np.repeat(np.round(255 * level[..., None]).astype(np.uint8), 3, axis=-1)


def window(levels: np.ndarray, *, size: tuple[int, int] = (256, 256), colours=jet, axes: int = 0) -> Image.Image:
    """Draws one window as a picture of its own: its loudest value is at the top of the colours.

    Args:
        size: width and height in pixels.
        axes: width of a white margin with numbers, as plots have; the numbers below are those of its time.
    """
    top = np.percentile(levels, 99.5)
    inner = (size[0] - 2 * axes, size[1] - 2 * axes)
    plot = Image.fromarray(colours(np.clip(1 + (levels - top) / 40, 0, 1))).resize(inner, Image.Resampling.BILINEAR)
    if not axes:
        return plot
    page = Image.new("RGB", size, "white")
    page.paste(plot, (axes, axes))
    pen = ImageDraw.Draw(page)
    pen.rectangle((axes - 1, axes - 1, size[0] - axes, size[1] - axes), outline="black")
    for tick in range(4):
        pen.text((2, axes + 40 * tick), str(100 * tick), fill="black")
        pen.text((axes + 40 * tick, size[1] - axes + 4), f"{levels[0, 0] % 7 + tick:.1f}", fill="black")
    return page


def cut(levels: np.ndarray, overlap: float, count: int, **look) -> list[Image.Image]:
    """Cuts windows of WIDTH columns, each moved on by the hop that this overlap leaves."""
    starts = [round(number * WIDTH * (1 - overlap)) for number in range(count)]
    return [window(levels[:, start : start + WIDTH], **look) for start in starts]


def save_windows(folder: Path, images: Sequence[Image.Image], names: str = "case1_1_Doppler{}.jpg") -> None:
    """Saves images in order under numbered names, from 1."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(images, start=1):
        image.save(folder / names.format(number), quality=75)


def save_recordings(root: Path, overlap: float, *, people: int = 3, count: int = 14, **look) -> Path:
    """Makes one class per person of windows of one recording; returns the folder."""
    for person in range(1, people + 1):
        levels = recording(person, round(WIDTH * (1 + (count - 1) * (1 - overlap))) + 1)
        save_windows(root / f"ID_{person}", cut(levels, overlap, count, **look), f"ID{person}_case1_1_Doppler{{}}.jpg")
    return root
