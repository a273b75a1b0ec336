"""Reads one image file as uint8 pixels [S S 3], S being image_size: upright, in RGB, made square as --resize says.

Cropped, the pixels are exactly those that torchvision's Resize(S) and CenterCrop(S) give on a PIL image. `recipe` names
this way of reading; it is part of the space of latents. Files that are damaged, cut short, or unreasonably large are
refused.
"""

import hashlib
import io
import itertools
import os
import re
import struct
import threading
import warnings
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError

from gait_latents.common import files, shortage
from gait_latents.common.console import progress
from gait_latents.common.errors import Shortage, let_shortage_pass
from gait_latents.images import formats, tiff_messages
from gait_latents.images.names import nfc, nfd
from gait_latents.images.split import Entry, Skipped, one_line

# Part of the identity of every latent: when the pixels that `decode` gives change, so must something in here.
RECIPE: dict[str, object] = {
    "version": 1,
    "orientation": "EXIF",
    "colours": "RGB, alpha over white, 16-bit grey scaled to 8 bits, ICC profiles ignored",
    "resize": "Pillow bilinear with antialiasing, shorter side to image_size, longer side rounded down",
    "crop": "centre",
}
_RECIPES = {  # by the value of --resize; the first is the recipe of all latents that are older than the setting
    "crop": RECIPE,
    "squash": RECIPE
    | {"resize": "squash: Pillow bilinear with antialiasing, both sides to image_size", "crop": "none"},
    "pad": RECIPE
    | {
        "resize": "pad: Pillow bilinear with antialiasing, longer side to image_size, shorter side rounded down",
        "crop": "none, black bars of equal width, an odd pixel at the right or below",
    },
}
MAX_FILE_BYTES = 2**29 + 2**24  # more than MAX_PIXELS pixels take uncompressed with 16-bit colours and alpha
MAX_SCANS = 100  # of a JPEG; a progressive one has about ten
MAX_PIXELS = 2**26  # in the file, as it claims, and in the resized image before it is cropped: 256 MiB in memory


class BadImage(Exception):
    """An image that cannot be used; `str()` is the reason, in one line."""


def recipe(resize: str) -> dict[str, object]:
    """Returns what the identity of latents says of how their images are read, for a value of --resize."""
    return _RECIPES[resize]


def resize_of(stored: object) -> str | None:
    """Returns the value of --resize that a stored recipe was made with; None where this version has no such recipe."""
    return next((resize for resize, known in _RECIPES.items() if known == stored), None)


# --- reading one -------------------------------------------------------------------------------------------


def image_path(data_path: str | os.PathLike[str], entry: Entry) -> Path:
    """Returns the path of the file of an entry; where the disk has its name in another Unicode form, in that one."""
    path = Path(data_path) / entry.class_name / entry.name
    if (entry.class_name.isascii() and entry.name.isascii()) or os.path.lexists(path):
        return path
    for class_form, form in itertools.product((str, nfc, nfd), repeat=2):
        other = Path(data_path) / class_form(entry.class_name) / form(entry.name)
        if os.path.lexists(other):
            return other
    return path


def image_key(data: bytes) -> str:
    """Returns the content key of an image: the SHA-256, in hex, of the bytes of its file."""
    return hashlib.sha256(data).hexdigest()


def decode(data: bytes, *, image_size: int, resize: str = "crop", exact: bool = True) -> np.ndarray:
    """Turns the bytes of an image file into uint8 [S S 3]; of a file with several frames, it takes the first.

    Cropped, the pixels equal those of torchvision's Resize(S) and CenterCrop(S) on the upright RGB image, bit for bit.
    Any number of threads may decode at once.

    Args:
        data: the whole file.
        image_size: S, in pixels.
        resize: how the image is made square: crop cuts the centre out, squash scales both sides to S whatever the
            aspect, pad scales the longer side to S and puts black bars beside the shorter.
        exact: False lets a large JPEG be decoded smaller than it is, which is faster and gives other pixels.

    Raises:
        BadImage: with the reason, for whatever is not a whole image of a reasonable size.
    """
    _refuse_strangers(data)
    if _has_too_many_scans(data):
        raise BadImage(f"a JPEG of more than {MAX_SCANS} scans, each of which costs the time of a picture")
    with _strict_pillow:
        tiff_messages.start()
        try:
            with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
                _check_depth(image, data)
                if not exact:
                    image.draft(image.mode, (2 * image_size, 2 * image_size))
                image.load()
                if tiff_messages.errors():  # Pillow returns what a fax decoder makes of bad codes
                    raise OSError("decoder error")
                return _SQUARE[resize](_upright(_to_rgb(image), _orientation(image)), image_size)
        except _PILLOW_ERRORS as error:
            _let_shortage_pass(error, data)
            raise BadImage(_reason(error, data)) from error


def _let_shortage_pass(error: BaseException, data: bytes) -> None:
    """Raises Shortage where an image cannot be read because this machine has no room for it, and not by its own fault.

    Pillow's decoders say of either that the data are broken; a damaged file may claim any size, which says nothing.
    """
    pixels = 0
    if not isinstance(error, UnidentifiedImageError | Image.DecompressionBombError):
        width, height = _claimed_size(data) or _USUAL_SIZE
        pixels = min(width * height, MAX_PIXELS)
    if not shortage.has_room(_ROOM_BYTES + _PIXEL_BYTES * pixels):
        raise Shortage(shortage.MEMORY) from error


def _claimed_size(data: bytes) -> tuple[int, int] | None:
    with suppress(*_PILLOW_ERRORS), Image.open(io.BytesIO(data), formats=_FORMATS) as image:
        return image.size
    return None


_USUAL_SIZE = (4096, 4096)  # of an image that cannot be opened, which it takes memory to do, too
_ROOM_BYTES, _PIXEL_BYTES = 2**24, 16  # what reading takes at least, and for a pixel: as decoded, as RGB, turned
_MARKER = re.compile(rb"\xff+[^\0\xff\xd0-\xd7]")  # within a scan, these bytes stand for anything but a marker


def _has_too_many_scans(data: bytes) -> bool:
    return data.startswith(b"\xff\xd8") and _num_scans(data) > MAX_SCANS


def _num_scans(data: bytes) -> int:
    """Counts the scans of a JPEG, until there are more than MAX_SCANS: about ten where it is progressive, else one."""
    count = position = 0
    while found := _MARKER.search(data, position):
        marker, position = found[0][-1], found.end()
        count += marker == 0xDA
        if marker == 0xD9 or count > MAX_SCANS:  # its end; further pictures may follow
            return count
        if marker not in (0x01, 0xD8):  # these two have no content
            position += int.from_bytes(data[position : position + 2], "big")
    return count


_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "PPM", "TIFF", "WEBP")
# What Pillow raises on bad data: seen in tests with damaged files, or found in its code.
_PILLOW_ERRORS = (
    *(ArithmeticError, AssertionError, AttributeError, EOFError, ImportError, LookupError, MemoryError, OSError),
    *(RuntimeError, SyntaxError, TypeError, ValueError, struct.error, zlib.error, Image.DecompressionBombError),
)


def _refuse_strangers(data: bytes) -> None:
    """Raises BadImage for empty files and for files of other kinds that often lie in the place of an image."""
    if not data:
        raise BadImage("the file is empty")
    reason = formats.stranger(data)
    if reason is not None:
        raise BadImage(reason)
    if not data.strip(b"\0"):
        raise BadImage("the file holds nothing but zeros")


def _reason(error: BaseException, data: bytes) -> str:
    """Says in one line why Pillow could not read a file."""
    if isinstance(error, UnidentifiedImageError):
        text = formats.plain_text(data)
        return text or f"not an image, or its beginning is damaged (read are {', '.join(_FORMATS)})"
    if isinstance(error, Image.DecompressionBombError):
        return f"it claims to have more than {MAX_PIXELS:,} pixels"
    if isinstance(error, MemoryError):
        return "there is not enough memory to decode it"
    if "truncated" in str(error).lower():
        return f"the file is cut short ({one_line(error)})"
    said = [one_line(text) for text in tiff_messages.errors()]
    return f"the file is damaged ({said[0] if said else one_line(error) or type(error).__name__})"


class _StrictPillow:
    """Sets Pillow's process-wide switches as `decode` needs them while any thread decodes, then restores them.

    Files that are cut short must fail even if the program that imported us lets Pillow accept them, Pillow's limit on
    pixels must be MAX_PIXELS, and its warnings must not reach the user (`warnings.catch_warnings` is not safe when
    several threads use it), nor what libtiff prints.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.users = 0
        self.theirs: tuple[bool, int | None] = (False, None)
        self.their_handlers: list[int | None] = []
        self.quiet = ("ignore", None, Warning, re.compile(r"PIL\."), 0)

    def __enter__(self) -> None:
        with self.lock:
            if self.users == 0:
                self.theirs = (ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS)
                self.their_handlers = tiff_messages.take_over()
            self.users += 1
            ImageFile.LOAD_TRUNCATED_IMAGES = False
            Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2  # Pillow warns above it and raises above twice as many
            if self.quiet not in warnings.filters:
                warnings.filters.insert(0, self.quiet)  # type: ignore[attr-defined]

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with self.lock:
            self.users -= 1
            if self.users == 0:
                ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS = self.theirs
                tiff_messages.give_back(self.their_handlers)
                with suppress(ValueError):
                    warnings.filters.remove(self.quiet)  # type: ignore[attr-defined]


_strict_pillow = _StrictPillow()


# --- colours, orientation, size ----------------------------------------------------------------------------
_ALPHA_MODES = ("LA", "La", "PA", "RGBA", "RGBa")
_PLAIN_MODES = ("1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "LAB")
_GREY16_MODES = ("I;16", "I;16B", "I;16L", "I;16N")
_TIFF_PHOTOMETRIC, _TIFF_BITS_PER_SAMPLE = 262, 258  # tags
_PNG_BIT_DEPTH = 24  # place in the file


def _check_depth(image: Any, data: bytes) -> None:
    """Refuses files of which Pillow would misread the greys or the transparency; raises BadImage."""
    if image.format == "PNG" and data[_PNG_BIT_DEPTH] == 16 and "transparency" in image.info:
        raise BadImage("a 16-bit PNG with a transparent colour; save it with an alpha channel or without any")
    if image.format == "TIFF" and image.mode in _GREY16_MODES and image.tag_v2.get(_TIFF_PHOTOMETRIC) != 1:
        raise BadImage("a 16-bit grey TIFF in which zero is not black; save it with zero as black")


def _to_rgb(image: ImageFile.ImageFile) -> Image.Image:
    if image.mode in _GREY16_MODES or (image.mode == "I" and image.format in ("PNG", "PPM")):
        return _grey16_to_rgb(image)
    if image.mode in _ALPHA_MODES or image.has_transparency_data:
        return _over_white(image.convert("RGBA"))
    if image.mode in _PLAIN_MODES:
        return image if image.mode == "RGB" else image.convert("RGB")
    raise BadImage(f"it has pixels of Pillow's mode {image.mode}, which do not say what is white; save it with 8 bits")


def _grey16_to_rgb(image: Any) -> Image.Image:
    bits = image.tag_v2[_TIFF_BITS_PER_SAMPLE][0] if image.format == "TIFF" else 16
    white = 2**bits - 1
    grey = np.asarray(image).astype(np.uint32)  # changed in place from here on, since these arrays can be large
    grey *= 255
    grey += white // 2
    grey //= white  # 0 to 255, to the nearest
    return Image.fromarray(grey.astype(np.uint8)).convert("RGB")


def _over_white(image: Image.Image) -> Image.Image:
    flat = Image.new("RGB", image.size, "white")
    flat.paste(image, mask=image.getchannel("A"))
    return flat


_TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _orientation(image: Image.Image) -> Image.Transpose | None:
    # Broken EXIF data do not make the pixels wrong: such an image is not turned.
    try:
        return _TRANSPOSES.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except _PILLOW_ERRORS as error:
        if isinstance(error, MemoryError) and not shortage.has_room(_ROOM_BYTES):
            raise Shortage(shortage.MEMORY) from error
    return None


def _upright(image: Image.Image, turn: Image.Transpose | None) -> Image.Image:
    return image if turn is None else image.transpose(turn)


def _crop(image: Image.Image, image_size: int) -> np.ndarray:
    """Resizes the shorter side to image_size and cuts out the centre: uint8 [S S 3]."""
    width, height = image.size
    shorter = min(width, height)
    # Rounded as torchvision rounds: the longer side down, half a pixel of margin to the even number.
    width, height = int(image_size * width / shorter), int(image_size * height / shorter)
    if width * height > MAX_PIXELS:
        raise BadImage(f"{image.width:,} x {image.height:,} is too long a strip to resize and crop to a square")
    left, top = round((width - image_size) / 2), round((height - image_size) / 2)
    resized = image.resize((width, height), Image.Resampling.BILINEAR)
    return np.array(resized.crop((left, top, left + image_size, top + image_size)))


def _squash(image: Image.Image, image_size: int) -> np.ndarray:
    """Resizes both sides to image_size, so that all of the image is kept and its aspect is not: uint8 [S S 3]."""
    return np.array(image.resize((image_size, image_size), Image.Resampling.BILINEAR))


def _pad(image: Image.Image, image_size: int) -> np.ndarray:
    """Resizes the longer side to image_size and puts the image in the middle of a black square: uint8 [S S 3]."""
    longer = max(image.size)
    width, height = (max(1, image_size * side // longer) for side in image.size)
    square = Image.new("RGB", (image_size, image_size))
    resized = image.resize((width, height), Image.Resampling.BILINEAR)
    square.paste(resized, ((image_size - width) // 2, (image_size - height) // 2))
    return np.array(square)


_SQUARE = {"crop": _crop, "squash": _squash, "pad": _pad}


# --- what a file says of itself, and looking at it in haste ------------------------------------------------


def header(data: bytes) -> tuple[int, int, int] | None:
    """Returns width and height, upright, and the bits of a value, as the header says; None without a good one."""
    with _strict_pillow, suppress(*_PILLOW_ERRORS), Image.open(io.BytesIO(data), formats=_FORMATS) as image:
        bits = 16 if image.mode.startswith("I") else 8
        width, height = image.size
        if image.format == "TIFF":  # of which Pillow, from some version on, tells the size of the turned picture
            width, height = (getattr(image, "tag_v2", {})[tag] for tag in _TIFF_SIZE)
        if _orientation(image) in _ON_ITS_SIDE:
            return height, width, bits
        return width, height, bits
    return None


_TIFF_SIZE = (256, 257)  # tags
_ON_ITS_SIDE = tuple(_TRANSPOSES[number] for number in (5, 6, 7, 8))


def value_range(data: bytes, *, in_haste: bool) -> tuple[int, int] | None:
    """Returns the smallest and the largest value, 0 to 255, of the pixels of an image; None where it cannot be read.

    Args:
        in_haste: look at an eighth of a JPEG's width and height, which shortens the range of fine patterns.
    """
    if _has_too_many_scans(data):
        return None
    with _strict_pillow, suppress(BadImage, *_PILLOW_ERRORS), Image.open(io.BytesIO(data), formats=_FORMATS) as image:
        if in_haste:
            image.draft("RGB", (image.width // 8, image.height // 8))
        bands: Any = _to_rgb(image).getextrema()
        return min(low for low, _ in bands), max(high for _, high in bands)
    return None


def find_bad_images(
    entries: Iterable[Entry], *, data_path: str, image_size: int, resize: str = "crop"
) -> tuple[Skipped, ...]:
    """Reads each image once and returns those that cannot be used, each with the reason."""

    def reason(entry: Entry) -> str | None:
        try:
            read_image(data_path, entry, image_size=image_size, resize=resize)
        except BadImage as error:
            return str(error)
        return None

    entries = list(entries)
    with (
        ThreadPoolExecutor() as pool,
        progress(total=len(entries), unit="images", label="look for bad images", only_if_slow=True) as bar,
    ):
        reasons = [bar.counted(found) for found in pool.map(reason, entries)]
    return tuple(Skipped(e.class_name, e.name, r) for e, r in zip(entries, reasons, strict=True) if r is not None)


def record_skipped(entries: list[Entry], bad: Iterable[tuple[int, str]]) -> tuple[Skipped, ...]:
    """Turns (position, reason) of images that cannot be used into what a split records of them."""
    return tuple(Skipped(entries[i].class_name, entries[i].name, reason) for i, reason in bad)


EDITED_MEANWHILE = "changed since this program looked at it first; start again"
EDITED_BEFORE = (
    "was edited since the cache was made; put it back as it was, or run preprocess_latents.py again, which takes it as "
    "it is now"
)


def read_image(
    data_path: str, entry: Entry, *, image_size: int, resize: str = "crop", if_edited: str = EDITED_MEANWHILE
) -> Any:
    """Reads one image as uint8 [S S 3].

    Args:
        data_path: the image folder.
        entry: the image; where it has a content key, the file must still have that content.
        image_size: S, in pixels.
        resize: how the image is made square, as `decode` takes it.
        if_edited: the reason to give when it has another content.

    Raises:
        BadImage: when the file cannot be read or has another content than its key says.
    """
    try:
        data = read_file(data_path, entry)
    except OSError as error:
        let_shortage_pass(error)
        raise BadImage(f"cannot be read: {error.strerror or error}") from error
    if entry.key and image_key(data) != entry.key:
        raise BadImage(if_edited)
    return decode(data, image_size=image_size, resize=resize)


def read_file(data_path: str, entry: Entry) -> bytes:
    """Reads the file of an image; raises OSError."""
    return files.read_whole(image_path(data_path, entry), at_most=MAX_FILE_BYTES, follow_link=True)
