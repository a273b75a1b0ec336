"""Images that are cut short, that are something else, or that would fill the memory: right pixels or a reason."""

import io
import os
import re
import shutil
import struct
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from bounds import in_child
from fault_account import Account
from PIL import Image, ImageFile, ImageOps
from pipeline import preprocess, stored_moments, train
from tiny_images import SAMPLES, encoded, grey16, pgm16, png, reason, smooth, tiff
from torchvision import transforms

from gait_latents.images.reading import BadImage, decode
from gait_latents.images.split import read_split
from gait_latents.latents.dataset import LatentDataset

MEMORY = 200_000_000  # bytes that a bomb may cost at most
SIZE = 16


def outcome(data: bytes, image_size: int = SIZE) -> np.ndarray | None:
    """Returns the pixels, or None where the bytes are refused; the reason must be one printable line."""
    try:
        return decode(data, image_size=image_size)
    except BadImage as error:
        assert str(error) and str(error).isprintable() and len(str(error)) < 400
        return None


# --- cut short ---------------------------------------------------------------------------------------------


def photograph(kind: str) -> bytes:
    """Returns the bytes of a picture large enough that a part of it can be missing."""
    noise = np.random.default_rng(1).integers(0, 256, (160, 160, 3), dtype=np.uint8)
    return encoded(Image.fromarray(noise), kind)


@pytest.mark.parametrize("others_load_truncated", [False, True])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"])
def test_a_picture_cut_at_some_share_is_refused_whatever_others_have_switched_on(
    monkeypatch: pytest.MonkeyPatch, account: Account, kind: str, others_load_truncated: bool
) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", others_load_truncated)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5)
    data = photograph(kind)
    assert outcome(data) is not None
    shares = (0.3, 0.6, 0.95, 0.999)
    wrong = sum(outcome(data[: int(len(data) * share)]) is not None for share in shares)
    assert ImageFile.LOAD_TRUNCATED_IMAGES is others_load_truncated and Image.MAX_IMAGE_PIXELS == 5
    how = f"30 to 99.9 %{', LOAD_TRUNCATED_IMAGES' if others_load_truncated else ''}"
    account.add(f"{kind} cut short", how, cases=len(shares), wrong=wrong)


@pytest.mark.parametrize("kind", SAMPLES)
def test_a_file_cut_anywhere_is_refused_or_had_lost_no_pixel(account: Account, kind: str, is_long: bool) -> None:
    data = SAMPLES[kind]
    whole = decode(data, image_size=SIZE)
    lengths = [*range(0, len(data), 1 if is_long else 7), *range(len(data) - 40, len(data))]
    found = [outcome(data[:length]) for length in lengths]
    taken = [pixels for pixels in found if pixels is not None]
    assert len(taken) <= 25 + 40 * is_long
    wrong = sum(not np.array_equal(pixels, whole) for pixels in taken)
    account.add("image cut short", "many lengths", cases=len(lengths), wrong=wrong)


def compressed_tiffs() -> dict[str, bytes]:
    """Returns damaged TIFFs of which libtiff prints errors or warnings, by what is wrong with them."""
    kinds = {"tiff_lzw": "RGB", "tiff_adobe_deflate": "RGB", "group4": "1", "jpeg": "RGB"}
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8))
    good = {kind: encoded(noise.convert(mode), "TIFF", compression=kind) for kind, mode in kinds.items()}
    found = {}
    for kind in ("tiff_lzw", "tiff_adobe_deflate", "group4"):
        start, end = 8, struct.unpack_from("<I", good[kind], 4)[0]
        middle = (start + end) // 2
        broken = bytes(byte ^ 0x5A for byte in good[kind][middle : middle + 40])
        found[f"{kind} with other bytes"] = good[kind][:middle] + broken + good[kind][middle + 40 :]
    directory = struct.unpack_from("<I", good["jpeg"], 4)[0]
    last = directory + 2 + 12 * (struct.unpack_from("<H", good["jpeg"], directory)[0] - 1)  # the tables of the JPEG
    found["jpeg without tables"] = good["jpeg"][:last] + struct.pack("<H", 65_000) + good["jpeg"][last + 2 :]
    return found


def test_what_libtiff_says_is_the_reason_and_is_printed_without_a_file_name_no_more(
    account: Account, capfd: pytest.CaptureFixture[str]
) -> None:
    files = compressed_tiffs()
    with ThreadPoolExecutor(4) as pool:  # several decode at once, and each gets its own reason
        reasons = list(pool.map(lambda data: reason(data, image_size=SIZE), 5 * list(files.values())))
    assert reasons == 5 * reasons[: len(files)] and len(set(reasons)) == len(files)
    for told, words in zip(
        reasons,
        ("code not yet in table", "Decoding error", "Uncompressed data (not supported)", "Quantization table"),
        strict=False,
    ):
        assert told.startswith("the file is damaged (") and words in told
    good = encoded(smooth(40, 40), "TIFF", compression="tiff_lzw")
    assert outcome(good) is not None  # a reason is of one picture alone
    assert capfd.readouterr() == ("", "")
    account.add("damaged TIFF", "lines of libtiff, four threads", cases=len(reasons), wrong=0)


def test_libtiff_prints_again_for_others_once_nothing_is_decoded(capfd: pytest.CaptureFixture[str]) -> None:
    data = compressed_tiffs()["tiff_lzw with other bytes"]
    assert outcome(data) is None
    assert capfd.readouterr().err == ""
    with pytest.raises(OSError, match="decoder error"), Image.open(io.BytesIO(data)) as image:
        image.load()
    assert "code not yet in table" in capfd.readouterr().err


# --- what claims to be an image ----------------------------------------------------------------------------

SVG = b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><rect width="9"/></svg>'
STRANGERS = [
    (b"", "empty"),
    (b"\0" * 5000, "nothing but zeros"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
    (b"\n<!DOCTYPE html><html></html>", "web page"),
    (b"<html><body><img src=x></body></html>", "web page"),
    (SVG, "not an image"),
    (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "PostScript"),
    (b"\xc5\xd0\xd3\xc6" + struct.pack("<II", 30, 99) + bytes(20) + b"%!PS-Adobe-3.0 EPSF-3.0\n", "not an image"),
    (b"%PDF-1.7\n", "PDF"),
    (b"PK\3\4" + b"x" * 50, "zip archive"),
    (b"text\n" * 50, "not an image"),
    (b"\x89PNG\r\n\x1a\n", "beginning is damaged"),
    (b"#!/bin/sh\ntouch trace\n", "not an image"),
    (encoded(smooth(), "ICO"), "an ICO picture, which is not read; convert it"),
    (encoded(smooth(), "PDF"), "PDF"),
    (encoded(smooth(), "TGA"), "not an image"),
    (encoded(smooth(20_000, 10), "PNG"), "strip"),
    (encoded(smooth(1, 5_000), "JPEG"), "strip"),
    (encoded(Image.new("L", (10, 100_000)), "PNG"), "strip"),
]


def test_what_is_no_usable_image_is_refused_with_the_reason(account: Account) -> None:
    for data, message in STRANGERS:
        assert message in reason(data, image_size=256)
    account.add("no image under its name", "EPS, SVG, HTML, pointers, strips ...", cases=len(STRANGERS))


def plain_square(data: bytes, side: int) -> np.ndarray:
    """Returns what torchvision makes of a file, its orientation applied."""
    with Image.open(io.BytesIO(data)) as image:
        upright = ImageOps.exif_transpose(image).convert("RGB")
    return np.asarray(transforms.CenterCrop(side)(transforms.Resize(side)(upright)))


def test_images_that_only_look_odd_are_read_with_the_right_pixels(account: Account) -> None:
    """A TIFF called .jpg is an image all the same: what counts is the content."""
    exif = Image.Exif()
    exif[0x0112] = 6
    large_profile = encoded(smooth(60, 44), "JPEG", icc_profile=bytes(300_000))
    odd = [
        encoded(smooth(60, 44), "TIFF"),
        encoded(smooth(60, 44), "JPEG", exif=exif),
        encoded(smooth(60, 44).convert("CMYK"), "JPEG"),
        encoded(smooth(60, 44), "GIF", save_all=True, append_images=[smooth(60, 44, seed=n) for n in range(1, 40)]),
        encoded(smooth(60, 44), "JPEG") + b"<script>trailing bytes</script>" * 100,
        large_profile,
    ]
    wrong = sum(not np.array_equal(decode(data, image_size=32), plain_square(data, 32)) for data in odd)
    account.add("odd image", "TIFF called .jpg, EXIF, CMYK, frames, trailing bytes", cases=len(odd), wrong=wrong)


def test_greys_of_16_bits_are_right_or_refused(account: Account) -> None:
    expected = (grey16() * 255.0 / 65535).round().astype(np.uint8)
    right = [*(encoded(Image.fromarray(grey16()), kind) for kind in ("PNG", "TIFF")), pgm16(grey16())]
    right.append(tiff(grey16().astype(">u2"), photometric=1, bits=16, order=">"))
    refused = [
        tiff(grey16(), photometric=0, bits=16),
        tiff(grey16().view(np.int16), photometric=1, bits=16, sample_format=2),
        tiff(grey16().astype(np.uint32), photometric=1, bits=32),
        tiff(grey16().astype(np.float32), photometric=1, bits=32, sample_format=3),
        png(2, 1, 16, 0, b"\0\0\0\0\1", (b"tRNS", b"\0\1")),
    ]
    wrong = sum(not np.array_equal(decode(data, image_size=20)[..., 0], expected) for data in right)
    wrong += sum(outcome(data) is not None for data in refused)
    account.add("greys of 16 bits", "right or refused", cases=len(right) + len(refused), wrong=wrong)


# --- bombs -------------------------------------------------------------------------------------------------


def many_frames(count: int) -> bytes:
    """Returns a GIF of 8 x 8 pixels and `count` frames, the first of them black."""
    first = encoded(Image.new("L", (8, 8)), "GIF")
    frame = first[first.index(b",") : -1]
    return first[:-1] + frame * (count - 1) + b";"


def bombs() -> dict[str, bytes]:
    """Returns files that would fill the memory, or take for ever."""
    huge = (40_000, 40_000)
    gif = b"GIF89a" + struct.pack("<HH", *huge) + b"\0\0\0," + struct.pack("<HHHH", 0, 0, *huge) + b"\0\2\0;"
    text = zlib.compress(b"\0" * 100_000_000)
    jpeg = encoded(smooth(), "JPEG")
    assert struct.pack(">HH", 30, 40) in jpeg
    wide = struct.pack("<HHIHH", 256, 3, 1, 1, 0), struct.pack("<HHII", 256, 4, 1, 2**30)
    icc = b"".join(
        b"\xff\xe2" + struct.pack(">H", 65_000) + b"ICC_PROFILE\0" + bytes([n, 255]) + bytes(64_984)
        for n in range(1, 256)
    )
    return {
        "9,500 x 9,500": encoded(Image.new("1", (9_500, 9_500)), "PNG"),
        "13,300 x 13,300": encoded(Image.new("1", (13_300, 13_300)), "PNG"),
        "40,000 x 40,000": png(*huge, 8, 2, b"\0"),
        "interlaced": png(*huge, 8, 2, b"\0").replace(b"\x08\x02\0\0\0", b"\x08\x02\0\0\1", 1),
        "text": png(1, 1, 8, 0, b"\0\0", (b"zTXt", b"key\0\0" + text)),
        "much text": png(1, 1, 8, 0, b"\0\0", *[(b"tEXt", b"key\0" + b"x" * 1_000_000)] * 100),
        "international text": png(1, 1, 8, 0, b"\0\0", (b"iTXt", b"key\0\1\0\0\0" + text)),
        "colour profile": png(1, 1, 8, 0, b"\0\0", (b"iCCP", b"key\0\0" + text)),
        "rows beyond the end": png(1, 1, 8, 0, b"\0" * 100_000_000),
        "GIF": gif,
        "BMP": b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, *huge, 1, 24, 0, 0, 0, 0, 0, 0),
        "PPM": b"P6 40000 40000 255\n" + b"\0" * 99,
        "PPM of endless digits": b"P6 " + b"9" * 100_000 + b" 1 255\n",
        "TIFF": tiff(np.zeros((1, 1), np.uint8), photometric=1, bits=8).replace(*wide),
        "WEBP": b"RIFF\x16\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0\xff\xff\x00\xff\xff\x00",
        "JPEG": jpeg.replace(struct.pack(">HH", 30, 40), struct.pack(">HH", 65_000, 65_000), 1),
        "20,000 frames": many_frames(20_000),
        "1,000 scans": many_scans(),
        "a profile in 255 parts": jpeg[:2] + icc + jpeg[2:],
    }


def many_scans() -> bytes:
    """Returns a progressive JPEG of 8,192 x 8,192 pixels whose last scan stands in it a thousand times."""
    data = encoded(Image.new("L", (8_192, 8_192)), "JPEG", progressive=True)
    last, end = data.rindex(b"\xff\xda"), data.rindex(b"\xff\xd9")
    return data[:end] + 1000 * data[last:end] + data[end:]


READABLE = {"20,000 frames", "rows beyond the end", "a profile in 255 parts"}  # odd, and read at no cost


@pytest.mark.slow
def test_bombs_cost_little_memory(account: Account) -> None:
    files = bombs()
    assert outcome(SAMPLES["WEBP"]) is not None  # what Pillow loads once is not their cost
    for name, data in files.items():
        taken, memory = in_child(lambda data=data: outcome(data) is not None)
        wrong = int(memory > MEMORY or (taken and name not in READABLE))
        account.add("image bomb", "sizes, texts, profiles, frames", cases=1, wrong=wrong)
    assert decode(files["20,000 frames"], image_size=8).max() == 0
    np.testing.assert_array_equal(
        decode(files["a profile in 255 parts"], image_size=8), decode(SAMPLES["JPEG"], image_size=8)
    )


@pytest.mark.slow
def test_the_largest_picture_that_is_read_costs_what_its_pixels_do() -> None:
    data = encoded(Image.new("RGB", (8_192, 8_192)), "PNG")
    taken, memory = in_child(lambda: outcome(data) is not None)
    assert taken and memory < 400_000_000


# --- a whole run -------------------------------------------------------------------------------------------


def spoil(data: Path) -> dict[str, str]:
    """Puts one bad image of each kind among good ones; returns a part of the reason by name."""
    good = (data / "ID_1" / "walk_0.jpg").read_bytes()
    bad = {
        "empty.jpg": (b"", "the file is empty"),
        "zeros.jpg": (bytes(3000), "nothing but zeros"),
        "cut.jpg": (good[: len(good) * 2 // 3], "cut short"),
        "cut.png": (SAMPLES["PNG"][:-60], "cut short"),
        "pointer.jpg": (STRANGERS[2][0], "git lfs pull"),
        "page.jpg": (STRANGERS[3][0], "web page"),
        "drawing.jpg": (STRANGERS[6][0], "PostScript"),
        "vector.png": (SVG, "not an image"),
        "bomb.png": (png(40_000, 40_000, 8, 2, b"\0"), "67,108,864"),
        "text.png": (png(1, 1, 8, 0, b"\0\0", (b"zTXt", b"key\0\0" + zlib.compress(bytes(9_000_000)))), "too large"),
        "strip.png": (encoded(Image.new("L", (1, 400_000)), "PNG"), "strip"),
        "float.tif": (tiff(grey16().astype(np.float32), photometric=1, bits=32, sample_format=3), "mode F"),
        "white.tif": (tiff(grey16(), photometric=0, bits=16), "zero is not black"),
        "table.tif": (compressed_tiffs()["tiff_lzw with other bytes"], "code not yet in table"),
    }
    for name, (content, _) in bad.items():
        (data / "ID_2" / name).write_bytes(content)
    (data / "ID_2" / "gone.jpg").symlink_to("nowhere")
    (data / "ID_2" / "loop.jpg").symlink_to("loop.jpg")
    with (data / "ID_2" / "hole.jpg").open("wb") as file:
        file.truncate(1 << 40)
    told = {name: why for name, (_, why) in bad.items()}
    return {**told, "gone.jpg": "cannot be read", "loop.jpg": "cannot be read", "hole.jpg": "larger than"}


def listed(text: str) -> dict[str, str]:
    """Returns the reasons that a script gives, by name."""
    return dict(re.findall(r"^    ID_2/(\S+): (.*)$", text, re.MULTILINE))


def test_a_run_keeps_every_good_image_and_lists_every_bad_one(
    world: Path, account: Account, capsys: pytest.CaptureFixture[str]
) -> None:
    run_all: Callable[..., int] = lambda **more: preprocess(world, images_per_user="all", **more)  # noqa: E731
    assert run_all() == 0
    good = stored_moments(world / "latents_cache")
    shutil.rmtree(world / "latents_cache")
    reasons = spoil(world / "data")
    _, memory = in_child(lambda: [run_all(output_folder=world / "other")])
    assert memory < 2 * MEMORY  # the VAE and the images of a whole run are in it
    capsys.readouterr()
    assert run_all() == 1
    told = listed(capsys.readouterr().out)
    assert told.keys() == reasons.keys()
    unexplained = sum(why.lower() not in told[name].lower() for name, why in reasons.items())
    kept = stored_moments(world / "latents_cache")
    wrong = sum(kept[key] != row for key, row in good.items() if key in kept) + unexplained
    account.add(
        "bad images among good ones", "preprocess", cases=len(reasons), lost=len(good.keys() - kept), wrong=wrong
    )
    assert kept.keys() == good.keys()

    assert run_all(skip_bad_images=True) == 0
    split = read_split(world / "latents_cache")
    assert split is not None and {item.name for item in split.skipped} == reasons.keys()
    assert train(world, images_per_user="all", train_num_steps=1, num_samples=0, skip_bad_images=False) == 1
    assert listed(capsys.readouterr().out).keys() == reasons.keys()
    assert train(world, images_per_user="all", train_num_steps=1, num_samples=0, skip_bad_images=True) == 0
    mine = read_split(world / "results")
    wrong = int(
        mine is None or mine.train != split.train or len(LatentDataset.open(world / "latents_cache")) != len(good)
    )
    account.add("bad images among good ones", "--skip_bad_images, then training", cases=len(reasons), wrong=wrong)


def test_a_pipe_among_the_images_is_passed_over_and_does_not_wait(world: Path, account: Account) -> None:
    os.mkfifo(world / "data" / "ID_2" / "pipe.jpg")
    (world / "data" / "ID_2" / "device.jpg").symlink_to("/dev/zero")
    code, _ = in_child(lambda: preprocess(world, images_per_user="all"))
    assert code == 0
    account.add("no file among the images", "pipe, device", cases=2)
