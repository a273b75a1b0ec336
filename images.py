"""Which images a run uses, and how one is read.

A class is a sub-folder of the data folder. `list_images` looks at the folders, `make_split` divides what they
hold into training and test images without touching a file, and `decode` turns the bytes of one file into pixels:
exactly what torchvision's Resize(S) and CenterCrop(S) give on a PIL image. Numpy and Pillow only.

Shapes: S image_size.
"""

import hashlib
import io
import json
import os
import re
import struct
import threading
import warnings
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError

from config import UserError

IMAGE_SUFFIXES = frozenset(
    {".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".mpo", ".pbm", ".pgm", ".png", ".pnm", ".ppm"}
    | {".tif", ".tiff", ".webp"}
)

# Part of the identity of every latent: when the pixels that `decode` gives change, so must something in here.
RECIPE: dict[str, object] = {
    "version": 1,
    "orientation": "EXIF",
    "colours": "RGB, alpha over white, 16-bit grey scaled to 8 bits, ICC profiles ignored",
    "resize": "Pillow bilinear with antialiasing, shorter side to image_size, longer side rounded down",
    "crop": "centre",
}

LAYOUT_REMEDY = "give the folder that has one sub-folder of images for each class"

MAX_FILE_BYTES = 2**29 + 2**24  # 16-bit colours and alpha of so many pixels, not compressed
MAX_SCANS = 100  # of a JPEG
MAX_PIXELS = 2**26  # of the file as it claims, and of the resized image before it is cropped: 256 MiB in memory


class BadImage(Exception):
    """An image that cannot be used; `str()` is the reason, in one line."""


# --- what is in the folders --------------------------------------------------------------------------------


def natural_key(name: str) -> tuple:
    """Returns a sort key that puts ID_2 before ID_10; different names never have equal keys."""
    pieces = enumerate(re.split(r"([0-9]+)", name))  # every second one is a number
    return tuple((len(text.lstrip("0")), text.lstrip("0")) if i % 2 else text for i, text in pieces), name


def list_images(data_path: str | os.PathLike[str], *, setting: str = "data_path") -> dict[str, list[str]]:
    """Lists the image files directly in each class folder, classes and files in natural order.

    Hidden files and folders and files of other endings are passed over; a folder without images has an empty list.
    Errors name the `setting` that the folder comes from.

    Raises:
        UserError: when the folder is missing or unreadable, or no sub-folder has an image.
    """
    root = Path(data_path)
    classes = sorted(_class_folders(root, setting), key=natural_key)
    index = {name: sorted(_image_names(root / name), key=natural_key) for name in classes}
    if not any(index.values()):
        raise UserError(_nothing_found_message(root, classes, setting))
    return index


def _class_folders(root: Path, setting: str) -> list[str]:
    if not root.is_dir():
        found = "is a file, not a folder; unpack it first" if root.exists() else f"does not exist; {LAYOUT_REMEDY}"
        raise UserError(f"--{setting} {shown(root)} {found}")
    children = _visible_children(root)
    dangling = [child.name for child in children if _leads_nowhere(child)]
    if dangling:
        raise UserError(f"in --{setting} {shown(root)} are links that lead nowhere: {_listing(dangling)}; remove them")
    return [child.name for child in children if child.is_dir()]


def _image_names(folder: Path) -> list[str]:
    # A link that leads nowhere is listed too: reading it then fails by name, instead of one image fewer.
    return [
        child.name
        for child in _visible_children(folder)
        if Path(child.name).suffix.lower() in IMAGE_SUFFIXES and (_leads_nowhere(child) or child.is_file())
    ]


def _visible_children(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as children:
            return [child for child in children if not child.name.startswith(".")]
    except OSError as error:
        raise UserError(f"the folder {shown(folder)} cannot be listed: {error.strerror or error}") from error


def _leads_nowhere(child: os.DirEntry[str]) -> bool:
    if not child.is_symlink():
        return False
    try:
        child.stat()
    except OSError:
        return True
    return False


def _nothing_found_message(root: Path, classes: Sequence[str], setting: str) -> str:
    where = f"--{setting} {shown(root)}"
    if not classes:
        loose = len(_image_names(root))
        found = f"{loose} images but no sub-folders" if loose else "no sub-folders"
        return f"{where} has {found}; it needs one folder for the images of each class"
    for name in classes:
        if any(child.is_dir(follow_symlinks=False) for child in _visible_children(root / name)):
            return f"no images in the class folders of {where}; are they deeper, in {shown(root / name)}?"
    endings = " ".join(sorted(IMAGE_SUFFIXES))
    return f"no images in the class folders of {where} ({_listing(classes)}); files taken as images: {endings}"


def shown(name: str | os.PathLike[str]) -> str:
    """Returns a name for a message of one line: quoted and escaped where a character cannot be printed."""
    text = str(name)
    return text if text.isprintable() else ascii(text)


def _listing(names: Sequence[str], limit: int = 20) -> str:
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(shown(name) for name in names[:limit]) + rest


# --- which of them are used --------------------------------------------------------------------------------

SPLIT_FORMAT = 1
_RULE_FIELDS = ("seed", "split", "split_gap", "images_per_user", "num_users")


@dataclass(frozen=True)
class Entry:
    """One image of a split: its place below the data folder, and its content key ("" when not hashed yet)."""

    class_name: str
    name: str
    key: str = ""


@dataclass(frozen=True)
class Skipped:
    """An image that the split would have held but that could not be read, and why."""

    class_name: str
    name: str
    reason: str


@dataclass(frozen=True)
class Split:
    """The images of a run: for training, for testing, skipped as unreadable, and left out between the first two.

    Entries are ordered by class, then by name, both naturally; `rule` holds the settings that made the split.
    """

    classes: tuple[str, ...]
    train: tuple[Entry, ...]
    test: tuple[Entry, ...]
    skipped: tuple[Skipped, ...]
    rule: dict[str, int | str]
    gap: tuple[Entry, ...] = ()

    def part(self, name: str) -> tuple[Entry, ...]:
        """Returns the entries of "train" or "test"; raises UserError for any other name."""
        if name not in ("train", "test"):
            raise UserError(f"split is {name!r}; it is train or test")
        return getattr(self, name)

    def labels(self, entries: Iterable[Entry]) -> list[int]:
        """Returns the label of each entry: the place of its class among the classes."""
        label_of = {name: label for label, name in enumerate(self.classes)}
        return [label_of[entry.class_name] for entry in entries]

    def keys(self) -> dict[tuple[str, str], str]:
        """Returns (class name, file name) -> content key for all entries that have one."""
        entries = (*self.train, *self.test, *self.gap)
        return {(entry.class_name, entry.name): entry.key for entry in entries if entry.key}

    def with_keys(self, keys: Mapping[tuple[str, str], str]) -> "Split":
        """Returns the split with these content keys; entries that are not named keep theirs."""

        def keyed(entries: Iterable[Entry]) -> tuple[Entry, ...]:
            return tuple(replace(e, key=keys.get((e.class_name, e.name), e.key)) for e in entries)

        return replace(self, train=keyed(self.train), test=keyed(self.test), gap=keyed(self.gap))

    def without(self, skipped: Iterable[Skipped]) -> "Split":
        """Returns the split with these images, as far as they are in it, recorded as skipped and in neither part.

        Raises:
            UserError: when that leaves a class without a training image.
        """
        own = {(entry.class_name, entry.name) for entry in (*self.train, *self.test)}
        new = {(item.class_name, item.name): item for item in skipped if (item.class_name, item.name) in own}
        old = {(item.class_name, item.name): item for item in self.skipped}

        def kept(entries: Iterable[Entry]) -> tuple[Entry, ...]:
            return tuple(e for e in entries if (e.class_name, e.name) not in new)

        train = kept(self.train)
        empty = sorted({e.class_name for e in self.train} - {e.class_name for e in train}, key=natural_key)
        if empty:
            raise UserError(f"no training image can be read of {_listing(empty)}; mend the images or remove the folder")
        return replace(self, train=train, test=kept(self.test), skipped=tuple((old | new).values()))

    def index(self) -> dict[str, list[str]]:
        """Returns class -> names of all images that the split was made from, as `list_images` would."""
        names: dict[str, list[str]] = {class_name: [] for class_name in self.classes}
        for item in (*self.train, *self.test, *self.gap, *self.skipped):
            names[item.class_name].append(item.name)
        return {class_name: sorted(found, key=natural_key) for class_name, found in names.items()}

    def to_bytes(self) -> bytes:
        """Returns the split as readable JSON, one image a line, ending in the SHA-256 of what precedes it."""
        members = [
            f'  "format": {SPLIT_FORMAT}',
            f'  "rule": {_json(self.rule)}',
            _json_lines("classes", self.classes),
            *(
                _json_lines(part, [{"class": e.class_name, "name": e.name, "key": e.key} for e in entries])
                for part, entries in (("train", self.train), ("test", self.test), ("gap", self.gap))
            ),
            _json_lines("skipped", [{"class": s.class_name, "name": s.name, "reason": s.reason} for s in self.skipped]),
        ]
        body = ("{\n" + ",\n".join(members) + ",\n").encode()
        return body + _seal(body)

    @staticmethod
    def from_bytes(data: bytes, where: str) -> "Split":
        """Reads what `to_bytes` wrote.

        Raises:
            UserError: naming `where`, when a single bit is not as it was written, or the format is another.
        """
        body = data[: -len(_seal(b""))]
        if data != body + _seal(body):
            raise UserError(f"{where} is damaged or was edited (its checksum does not fit); restore it or remove it")
        try:
            document = json.loads(data)
            found = document["format"]
            if found == SPLIT_FORMAT:
                return _split_of(document)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{where} does not hold a split ({_one_line(error)}); remove it") from error
        raise UserError(f"{where} has format {found!r} but this program reads format {SPLIT_FORMAT}; remove it")


def make_split(
    index: Mapping[str, Sequence[str]],
    *,
    num_users: int | str,
    images_per_user: int | str,
    seed: int,
    split: str,
    split_gap: int,
) -> Split:
    """Divides the listed images of the first classes into training and test images.

    Args:
        index: class -> file names, from `list_images` or `Split.index`.
        num_users: how many classes, the first in natural order, or "all".
        images_per_user: training images of each class, or "all".
        seed: orders the images of a "random" split.
        split: "random", or "contiguous" for the first images in natural order.
        split_gap: images left out between training and test in a contiguous split.

    Raises:
        UserError: naming each class that has too few images.
    """
    classes = sorted(index, key=natural_key)[: None if num_users == "all" else int(num_users)]
    _check_enough({name: len(index[name]) for name in classes}, images_per_user)
    parts: dict[str, list[Entry]] = {"train": [], "test": [], "gap": []}
    for class_name in classes:
        names = sorted(index[class_name], key=natural_key)
        count = len(names) if images_per_user == "all" else int(images_per_user)
        if split == "contiguous":
            chosen, gap = set(names[:count]), set(names[count : count + split_gap])
        elif split == "random":
            chosen, gap = set(sorted(names, key=_draw_order(seed, class_name))[:count]), set()
        else:
            raise UserError(f"split is {split!r}; it is random or contiguous")
        for name in names:
            part = "train" if name in chosen else "gap" if name in gap else "test"
            parts[part].append(Entry(class_name, name))
    settings = (seed, split, split_gap, images_per_user, num_users)
    rule: dict[str, int | str] = dict(zip(_RULE_FIELDS, settings, strict=True))
    train, test, gap = (tuple(parts[part]) for part in ("train", "test", "gap"))
    return Split(tuple(classes), train, test, (), rule, gap)


def _draw_order(seed: int, class_name: str) -> Callable[[str], bytes]:
    # A file's place depends on itself alone: other files and classes that come or go do not reshuffle it. JSON
    # keeps the three parts apart, and its escapes also stand for names that are not valid Unicode.
    return lambda name: hashlib.sha256(json.dumps([seed, class_name, name]).encode()).digest()


def _check_enough(counts: Mapping[str, int], images_per_user: int | str) -> None:
    wanted = 1 if images_per_user == "all" else int(images_per_user)
    if wanted < 1:
        raise UserError(f"--images_per_user is {wanted}; it must be at least 1")
    few = [name for name, count in counts.items() if count < wanted]
    if not few:
        return
    listing = ", ".join(f"{shown(name)} has {counts[name] or 'none'}" for name in few)
    would_do = min((count for count in counts.values() if count), default=0)
    remedy = "add images"
    if wanted > would_do > 0:
        remedy = f"lower it to {would_do} or add images"
    if any(counts[name] == 0 for name in few):
        remedy += ", and remove the folders that have none"
    raise UserError(f"--images_per_user is {images_per_user} but {listing}; {remedy}")


def missing_classes_warning(index: Mapping[str, Sequence[str]], num_users: int | str) -> str | None:
    """Returns a warning that lists the class folders when there are fewer than asked for, else None."""
    if num_users == "all" or len(index) >= int(num_users):
        return None
    folders = _listing(list(index), limit=100)
    return f"--num_users is {num_users} but there are only {len(index)} class folders: {folders}"


def shared_content(split: Split) -> list[tuple[Entry, Entry]]:
    """Pairs each test image with the first training image of the same content, where there is one."""
    train_of: dict[str, Entry] = {}
    for entry in split.train:
        train_of.setdefault(entry.key, entry)
    return [(train_of[entry.key], entry) for entry in split.test if entry.key and entry.key in train_of]


def _json(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    # Line separators, control characters and the stand-ins for undecodable bytes only survive as escapes.
    return text if text.isprintable() else json.dumps(value)


def _json_lines(name: str, rows: Sequence[object]) -> str:
    lines = ",\n".join(f"    {_json(row)}" for row in rows)
    return f'  "{name}": [\n{lines}\n  ]' if rows else f'  "{name}": []'


def _seal(body: bytes) -> bytes:
    return f'  "sha256": "{hashlib.sha256(body).hexdigest()}"\n}}\n'.encode()


def _split_of(document: dict[str, Any]) -> Split:
    classes = tuple(_name(name) for name in document["classes"])
    parts = {
        part: tuple(Entry(_name(row["class"]), _name(row["name"]), _key(row["key"])) for row in document[part])
        for part in ("train", "test", "gap")
    }
    skipped = tuple(Skipped(_name(row["class"]), _name(row["name"]), str(row["reason"])) for row in document["skipped"])
    images = [(item.class_name, item.name) for items in (*parts.values(), skipped) for item in items]
    if len(set(classes)) < len(classes) or len(set(images)) < len(images):
        raise ValueError("a class or an image stands in it twice")
    if not parts["train"]:
        raise ValueError("it has no training image")
    if not {class_name for class_name, _ in images} <= set(classes):
        raise ValueError("an image of a class that is not listed")
    rule = {name: document["rule"][name] for name in _RULE_FIELDS}
    if not all(isinstance(value, int | str) for value in rule.values()):
        raise TypeError("the rule")
    return Split(classes, parts["train"], parts["test"], skipped, rule, parts["gap"])


def _name(value: object) -> str:
    # A file name and no path: nothing in a split may lead out of the data folder.
    if not is_file_name(value):
        raise ValueError(f"{value!r:.100} is not the name of a file or folder")
    return value  # type: ignore[return-value]


def is_file_name(value: object) -> bool:
    """Says whether a value out of a file can be the name of one file or folder, and leads nowhere else."""
    if not isinstance(value, str) or value in ("", ".", "..") or "/" in value or "\0" in value:
        return False
    try:
        return bool(os.fsencode(value))
    except UnicodeEncodeError:
        return False


def _key(value: object) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"([0-9a-f]{64})?", value):
        raise ValueError(f"{value!r:.100} is not a content key")
    return value


# --- reading one -------------------------------------------------------------------------------------------


def image_path(data_path: str | os.PathLike[str], entry: Entry) -> Path:
    """Returns where the file of an entry is."""
    return Path(data_path) / entry.class_name / entry.name


def image_key(data: bytes) -> str:
    """Returns the content key of an image: the SHA-256, in hex, of the very bytes given to `decode`."""
    return hashlib.sha256(data).hexdigest()


def decode(data: bytes, *, image_size: int) -> np.ndarray:
    """Turns the bytes of an image file into uint8 [S S 3]; of several frames, the first.

    The pixels equal those of torchvision's Resize(S) and CenterCrop(S) on the upright RGB image, bit for bit.
    Any number of threads may decode at once.

    Raises:
        BadImage: with the reason, for whatever is not a whole image of a reasonable size.
    """
    _refuse_strangers(data)
    if data.startswith(b"\xff\xd8") and _num_scans(data) > MAX_SCANS:
        raise BadImage(f"a JPEG of more than {MAX_SCANS} scans, each of which costs the time of a picture")
    with _strict_pillow:
        try:
            with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
                _check_depth(image, data)
                image.load()
                return _square(_upright(_to_rgb(image), _orientation(image)), image_size)
        except _PILLOW_ERRORS as error:
            raise BadImage(_reason(error)) from error


_MARKER = re.compile(rb"\xff+[^\0\xff\xd0-\xd7]")  # within a scan, these bytes stand for anything but a marker


def _num_scans(data: bytes) -> int:
    """Counts the scans of a JPEG: about ten where it is progressive, one where it is not."""
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

# What Pillow was seen to raise on bad data, and what its code shows that it may.
_PILLOW_ERRORS = (
    *(ArithmeticError, AssertionError, AttributeError, EOFError, ImportError, LookupError, MemoryError, OSError),
    *(RuntimeError, SyntaxError, TypeError, ValueError, struct.error, zlib.error, Image.DecompressionBombError),
)

_STRANGERS = (
    (b"version https://git-lfs", "a Git-LFS pointer instead of the image; run `git lfs pull`"),
    (b"<!doctype html", "a web page, not an image; download it again"),
    (b"<html", "a web page, not an image; download it again"),
    (b"%!ps", "PostScript, not an image"),
    (b"%pdf", "a PDF, not an image"),
    (b"pk\3\4", "a zip archive, not an image"),
)


def _refuse_strangers(data: bytes) -> None:
    if not data:
        raise BadImage("the file is empty")
    start = data[:32].lstrip().lower()
    for beginning, reason in _STRANGERS:
        if start.startswith(beginning):
            raise BadImage(reason)
    if not data.strip(b"\0"):
        raise BadImage("the file holds nothing but zeros")


def _reason(error: BaseException) -> str:
    if isinstance(error, UnidentifiedImageError):
        return f"not an image, or its beginning is damaged (read are {', '.join(_FORMATS)})"
    if isinstance(error, Image.DecompressionBombError):
        return f"it claims to have more than {MAX_PIXELS:,} pixels"
    if isinstance(error, MemoryError):
        return "there is not enough memory to decode it"
    if "truncated" in str(error).lower():
        return f"the file is cut short ({_one_line(error)})"
    return f"the file is damaged ({_one_line(error) or type(error).__name__})"


def _one_line(error: BaseException) -> str:
    return shown(" ".join(str(error).split())[:200])


class _StrictPillow:
    """Holds Pillow's process-wide switches where we need them while any thread decodes, then puts them back.

    Files that are cut short must fail even if somebody switched that off, Pillow's own limit on pixels must be
    ours, and its warnings must not reach the user; `warnings.catch_warnings` is not safe among threads.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.users = 0
        self.theirs: tuple[bool, int | None] = (False, None)
        self.quiet = ("ignore", None, Warning, re.compile(r"PIL\."), 0)

    def __enter__(self) -> None:
        with self.lock:
            if self.users == 0:
                self.theirs = (ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS)
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
    """Refuses what Pillow would open with other greys or another transparency than the file means."""
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
    grey = np.asarray(image).astype(np.uint32)  # from here in place, for these arrays can be large
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
    # Broken EXIF data say nothing about the pixels: such an image is taken as it lies.
    with suppress(*_PILLOW_ERRORS):
        return _TRANSPOSES.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    return None


def _upright(image: Image.Image, turn: Image.Transpose | None) -> Image.Image:
    return image if turn is None else image.transpose(turn)


def _square(image: Image.Image, image_size: int) -> np.ndarray:
    """Resizes the shorter side to image_size and cuts out the centre: uint8 [S S 3]."""
    width, height = image.size
    shorter = min(width, height)
    # Rounded as torchvision rounds: down for the longer side, to even for half a pixel of margin.
    width, height = int(image_size * width / shorter), int(image_size * height / shorter)
    if width * height > MAX_PIXELS:
        raise BadImage(f"{image.width:,} x {image.height:,} is too long a strip to resize and crop to a square")
    left, top = round((width - image_size) / 2), round((height - image_size) / 2)
    resized = image.resize((width, height), Image.Resampling.BILINEAR)
    return np.array(resized.crop((left, top, left + image_size, top + image_size)))
