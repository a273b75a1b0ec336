"""Small pictures, the bytes of image files made field by field, and a small split."""

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from gait_latents.images import reading
from gait_latents.images.reading import BadImage, decode
from gait_latents.images.split import Skipped, Split, make_split


def smooth(width: int = 40, height: int = 30, seed: int = 0) -> Image.Image:
    """Returns a picture of soft coloured blobs, different for each seed."""
    noise = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    """Returns the bytes of an image file of this kind."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def grey16(white: int = 65535) -> np.ndarray:
    """Returns 20 x 20 greys of 16 bits that climb from 0 to white."""
    return np.linspace(0, white, 400).round().astype(np.uint16).reshape(20, 20)


def pgm16(pixels: np.ndarray) -> bytes:
    """Returns a PGM of 16-bit greys, which Pillow 10.1 cannot write."""
    height, width = pixels.shape
    return f"P5\n{width} {height}\n65535\n".encode() + pixels.astype(">u2").tobytes()


def tiff(
    pixels: np.ndarray, *, photometric: int, bits: int, sample_format: int = 1, order: str = "<", data: bytes = b""
) -> bytes:
    """Returns an uncompressed TIFF of one channel with these header fields."""
    data = data or pixels.tobytes()
    height, width = pixels.shape
    short, long = 3, 4
    fields = [
        *[(256, short, width), (257, short, height), (258, short, bits), (259, short, 1), (262, short, photometric)],
        *[(273, long, 8), (277, short, 1), (278, short, height), (279, long, len(data)), (339, short, sample_format)],
    ]
    directory = struct.pack(order + "H", len(fields))
    for tag, kind, value in fields:
        directory += struct.pack(order + "HHI", tag, kind, 1)
        directory += struct.pack(order + ("HH" if kind == short else "I"), *((value, 0) if kind == short else (value,)))
    header = (b"II" if order == "<" else b"MM") + struct.pack(order + "HI", 42, 8 + len(data))
    return header + data + directory + struct.pack(order + "I", 0)


def png(width: int, height: int, bit_depth: int, colour: int, rows: bytes, *extra: tuple[bytes, bytes]) -> bytes:
    """Returns a PNG with this header, these uncompressed rows and further chunks in between."""
    header = struct.pack(">IIBBBBB", width, height, bit_depth, colour, 0, 0, 0)
    chunks = [(b"IHDR", header), *extra, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    body = [struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


def reason(data: bytes, image_size: int = 16) -> str:
    """Returns why these bytes are refused; fails when they are not, or in more than one printable line."""
    with pytest.raises(BadImage) as caught:
        decode(data, image_size=image_size)
    assert str(caught.value) and str(caught.value).isprintable()
    return str(caught.value)


SAMPLES = {
    "JPEG": encoded(smooth(), "JPEG"),
    "progressive JPEG": encoded(smooth(), "JPEG", progressive=True),
    "CMYK JPEG": encoded(smooth().convert("CMYK"), "JPEG"),
    "PNG": encoded(smooth(), "PNG"),
    "16-bit PNG": encoded(Image.fromarray(grey16()), "PNG"),
    "palette PNG": encoded(smooth().quantize(16), "PNG", transparency=3),
    "BMP": encoded(smooth(), "BMP"),
    "GIF": encoded(smooth(), "GIF"),
    "PPM": encoded(smooth(), "PPM"),
    "16-bit PGM": pgm16(grey16()),
    "TIFF": encoded(smooth(), "TIFF"),
    "deflated TIFF": encoded(smooth(), "TIFF", compression="tiff_adobe_deflate"),
    "WEBP": encoded(smooth(), "WEBP"),
    "lossless WEBP": encoded(smooth(), "WEBP", lossless=True),
}


def split_of(
    index,
    *,
    num_users: int | str = "all",
    images_per_user: int | str = 2,
    seed=0,
    split="random",
    split_gap=1,
    **others: Any,
) -> Split:
    rule = {"images_per_user": images_per_user, "seed": seed, "split": split, "split_gap": split_gap}
    return make_split(index, num_users=num_users, **rule, **others)


def small_split() -> Split:
    split = split_of({"ID_1": ["1.jpg", "2.jpg", "3.jpg", "4.jpg"]}, split="contiguous", images_per_user=2)
    keys = {(entry.class_name, entry.name): reading.image_key(entry.name.encode()) for entry in split.train}
    return split.with_keys(keys).without([Skipped("ID_1", "2.jpg", "cut short")])


def coloured(counts: list[int], *, side: int = 16, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Makes images [N S S 3] whose brightest channel is their class, in a shuffled order, and their labels [N]."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    labels = labels[torch.randperm(len(labels), generator=generator)]
    images = torch.randint(0, 100, (len(labels), side, side, 3), generator=generator)
    images[torch.arange(len(labels)), :, :, labels] += 120
    return images.byte(), labels
