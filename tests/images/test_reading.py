"""How one image is read: against torchvision, closed forms and files made here."""

import hashlib
import io
import json
import random
import struct
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile, PpmImagePlugin
from tiny_images import SAMPLES, encoded, grey16, pgm16, png, reason, smooth, tiff
from torchvision import transforms

from gait_latents.images import reading
from gait_latents.images.reading import BadImage, decode
from gait_latents.images.split import Entry

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
    try:
        converted = Image.open(io.BytesIO(data)).convert("RGB")
    except OSError as error:  # as Pillow 11.3 for YCbCr in a TIFF
        pytest.skip(f"this Pillow cannot read what it has written: {error}")
    np.testing.assert_array_equal(decode(data, image_size=20), np.asarray(converted))
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
        ("PGM", pgm16(grey16()), 65535),
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


READS_PFM = b"Pf" in PpmImagePlugin.MODES  # as Pillow 10.1 does not


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (tiff(grey16(), photometric=0, bits=16), "zero is not black"),
        (tiff(grey16().view(np.int16), photometric=1, bits=16, sample_format=2), "mode I,"),
        (tiff(grey16().astype(np.uint32), photometric=1, bits=32), "mode I,"),
        (tiff(gradient().astype(np.float32), photometric=1, bits=32, sample_format=3), "mode F,"),
        (b"Pf 20 20 -1.0\n" + gradient().astype("<f4").tobytes(), "mode F," if READS_PFM else "not an image"),
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
