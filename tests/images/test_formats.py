"""What lies under the name of an image and is none: named by its first bytes, with what to do about it."""

import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image, features
from tiny_images import SAMPLES, encoded, reason, smooth

from gait_latents.images.formats import stranger


def container(brand: bytes, *others: bytes) -> bytes:
    body = b"ftyp" + brand + bytes(4) + b"".join(others)
    return (len(body) + 4).to_bytes(4, "big") + body + bytes(100)


def tar() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("a.jpg"))
    return buffer.getvalue()


def array() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.zeros((4, 4)))
    return buffer.getvalue()


CONVERT, AGAIN = "is not read; convert it to PNG or JPEG", "not an image; download it again"
KINDS = [
    ("AVIF", container(b"avif", b"mif1", b"avif"), ["AVIF picture", CONVERT]),
    ("AVIF of another first brand", container(b"mif1", b"mif1", b"avif"), ["AVIF picture", CONVERT]),
    ("HEIC", container(b"heic", b"mif1", b"heic"), ["HEIC picture", CONVERT]),
    ("HEIC of another first brand", container(b"mif1", b"heic"), ["HEIC picture", CONVERT]),
    ("video", container(b"isom", b"mp41"), ["a video"]),
    ("JPEG 2000 codestream", b"\xff\x4f\xff\x51" + bytes(50), ["JPEG 2000", CONVERT]),
    ("JPEG XL", b"\xff\x0a" + bytes(50), ["JPEG XL", CONVERT]),
    ("JPEG XL in a container", b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(50), ["JPEG XL", CONVERT]),
    ("Photoshop", b"8BPS\0\1" + bytes(50), ["Photoshop", CONVERT]),
    ("DICOM", bytes(128) + b"DICM" + bytes(50), ["DICOM", CONVERT]),
    ("NumPy", array(), ["NumPy", "save what it holds as PNG"]),
    ("HDF5", b"\x89HDF\r\n\x1a\n" + bytes(50), ["HDF5"]),
    ("tar", tar(), ["tar archive", "unpack it"]),
    ("gzip", b"\x1f\x8b\x08" + bytes(50), ["gzip", "unpack it"]),
    ("AppleDouble", b"\0\5\x16\7" + bytes(80), ["AppleDouble", "remove it"]),
    ("web page", b"\xef\xbb\xbf\r\n<!-- saved -->\n<HTML><head>", ["a web page", AGAIN]),
    ("web page without html", b"<head><title>404 Not Found</title></head>", ["a web page", AGAIN]),
    ("answer of a store", b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', ["an XML text", AGAIN]),
    ("answer of a service", json.dumps({"error": "not found"}).encode(), ["a JSON text", AGAIN, "not found"]),
    ("error message", b"404: Not Found\n", ["a text", AGAIN, "'404: Not Found'"]),
    ("Git-LFS pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", ["git lfs pull"]),
    ("empty", b"", ["the file is empty"]),
    ("vectors", b'<svg xmlns="http://www.w3.org/2000/svg"/>', ["SVG", "convert it to PNG"]),
]


@pytest.mark.parametrize(("data", "told"), [kind[1:] for kind in KINDS], ids=[kind[0] for kind in KINDS])
def test_another_kind_of_file_is_named_by_its_first_bytes(data, told):
    for text in told:
        assert text in reason(data)


@pytest.mark.parametrize(("kind", "name"), [("AVIF", "AVIF"), ("JPEG2000", "JPEG 2000")])
def test_a_real_picture_of_another_format_is_named(kind, name):
    Image.init()
    if kind not in Image.SAVE or (kind == "AVIF" and not features.check("avif")):
        pytest.skip(f"this Pillow writes no {kind}")
    assert f"a{'n' * (name[0] == 'A')} {name} picture, which is not read; convert it" in reason(encoded(smooth(), kind))


def test_no_format_that_is_read_is_taken_for_another():
    ascii_ppm = b"P3 2 1 255\n255 0 0  0 255 0\n"
    assert [name for name, data in {**SAMPLES, "text": ascii_ppm}.items() if stranger(data) is not None] == []
