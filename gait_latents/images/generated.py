"""A folder of images that generate.py made: which files it is to have, which of them are whole, and their record.

The record, settings.json, says how the images were made, and holds the SHA-256 of each under "images":
{class: {file: digest}}. `training/generation.py` makes the images and decides when the record is written.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gait_latents import settings
from gait_latents.common import files, json_text
from gait_latents.common.console import progress
from gait_latents.common.errors import Failed, UserError
from gait_latents.images import reading
from gait_latents.images.reading import BadImage


def suffix(image_format: str, trained_on: str) -> str:
    """Returns the ending of generated images, .png or .jpg.

    Args:
        image_format: "png", "jpg", or "auto" for JPEG where the training images were JPEG, else PNG.
        trained_on: the commonest ending of the training images, such as .jpg.
    """
    if image_format != "auto":
        return f".{image_format}"
    return ".jpg" if trained_on in (".jpg", ".jpeg", ".jpe", ".jfif") else ".png"


_LONGEST_NAME = 255  # bytes of a file name that file systems take


def file_name(class_name: str, index: int, suffix: str) -> str:
    """Returns the name of the file of one image: its class and its number.

    The name of a class can be as long as a file name may be; what is too long of it is left out here, and the folder
    has it whole.
    """
    end = f"_{index:06d}{suffix}"
    start = class_name
    while len(os.fsencode(start + end)) > _LONGEST_NAME:
        start = start[:-1]
    return start + end


LARGEST_RECORD_BYTES = 1 << 25  # 300,000 images with names of usual length
DIGESTS = "images"  # the key of the digests in the record
_DIGEST = re.compile("[0-9a-f]{64}")
Digests = dict[str, dict[str, str]]  # {class: {file: SHA-256}}


def number_of(file: str) -> int:
    """Returns the number in the name of an image."""
    found = re.search(r"_([0-9]+)\.[^.]*$", file)
    return int(found[1]) if found else 0


@dataclass(frozen=True)
class Cell:
    """One image to make: its class, its number within the class, and its file."""

    label: int
    class_name: str
    index: int
    path: Path


def list_made(folder: Path, class_name: str, suffix: str) -> list[str]:
    """Lists the files in the folder of a class that have names as `file_name` gives them; strange files are left out.

    The folder need not exist.
    """
    ours = re.compile(r".*_([0-9]{6,18})" + re.escape(suffix), re.DOTALL)
    found = {path.name: ours.fullmatch(path.name) for path in folder.glob(f"*{suffix}") if path.is_file()}
    return sorted(
        name for name, match in found.items() if match and name == file_name(class_name, int(match[1]), suffix)
    )


def list_missing(cells: Sequence[Cell]) -> list[Cell]:
    """Returns the images whose files are not there."""
    return [cell for cell in cells if not cell.path.is_file()]


def read_made(path: Path, image_size: int) -> np.ndarray:
    """Reads a generated image as uint8 [S S 3]; raises Failed when it is damaged."""
    try:
        data = files.read_whole(path, at_most=_largest_file(image_size))
        return reading.decode(data, image_size=image_size)
    except (OSError, BadImage) as error:
        raise Failed(
            f"{path} is damaged; remove it, and the same command makes it again ({getattr(error, 'strerror', error)})"
        ) from error


# --- which images are whole --------------------------------------------------------------------------------


def check_made(
    folder: Path, names: Mapping[str, Sequence[str]], *, image_size: int, digests: Digests
) -> tuple[Digests, list[str]]:
    """Reads images, several at a time, and says which of them are as they were made.

    One with a digest must have it. One without, as of an older version or after a kill, must be a whole image of the
    right size. Links are not followed.

    Args:
        folder: has a folder for each class.
        names: the files of each class.
        image_size: the width and height of the images.
        digests: those of the record.

    Returns:
        The digests of those that are whole, and the others as class/file.
    """
    places = [(class_name, file) for class_name, listed in names.items() for file in listed]

    def look(place: tuple[str, str]) -> str | None:
        class_name, file = place
        return _digest_if_whole(folder / class_name / file, image_size, digests.get(class_name, {}).get(file))

    with (
        ThreadPoolExecutor() as pool,
        progress(total=len(places), unit="images", label="check images", only_if_slow=True) as bar,
    ):
        found = [bar.counted(digest) for digest in pool.map(look, places)]
    whole: Digests = {}
    for (class_name, file), digest in zip(places, found, strict=True):
        if digest is not None:
            whole.setdefault(class_name, {})[file] = digest
    return whole, ["/".join(place) for place, digest in zip(places, found, strict=True) if digest is None]


def digest(data: bytes) -> str:
    """Returns the digest of the bytes of an image file, as the record has it."""
    return hashlib.sha256(data).hexdigest()


def _digest_if_whole(path: Path, image_size: int, known: str | None) -> str | None:
    try:
        data = files.read_whole(path, at_most=_largest_file(image_size))
    except OSError:  # whatever the reason, nobody could use it
        return None
    found = digest(data)
    is_whole = _is_picture(data, image_size) if known is None else found == known
    return found if is_whole else None


def _is_picture(data: bytes, image_size: int) -> bool:
    """Says whether these are the bytes of a whole image of so many pixels."""
    head = reading.header(data)
    if head is None or head[:2] != (image_size, image_size):
        return False
    try:
        reading.decode(data, image_size=image_size)
    except BadImage:
        return False
    return True


def _largest_file(image_size: int) -> int:
    """Returns more bytes than any image that `pictures.encode_image` writes, be it noise, takes."""
    return (1 << 16) + 16 * image_size**2


# --- the record --------------------------------------------------------------------------------------------


def read_record(path: Path) -> dict[str, Any]:
    """Reads settings.json of a folder of generated images; raises UserError when it is damaged.

    Settings that came after the record was written are added, with the values that they then had.
    """
    record = record_or_none(path)
    if record is None:
        raise UserError(f"{path} is damaged; give another --output_folder")
    return {**_BEFORE_RECORDED, **settings.with_later_settings(record)}


def record_or_none(path: Path) -> dict[str, Any] | None:
    """Reads what settings.json says as it stands; None where it is absent, a link or damaged."""
    try:
        record = json.loads(files.read_whole(path, at_most=LARGEST_RECORD_BYTES))
    except (OSError, ValueError, RecursionError):
        return None
    is_ours = isinstance(record, dict) and not json_text.is_deep({**record, DIGESTS: None})
    return record if is_ours else None


def digests_of(record: Mapping[str, Any] | None) -> Digests:
    """Returns the digests in a record; what is no class, file and digest is left out, for anybody may have written it.

    An image without a digest is checked by decoding it.
    """
    by_class = (record or {}).get(DIGESTS)
    if not isinstance(by_class, dict):
        return {}
    return {name: _digests_alone(listed) for name, listed in by_class.items() if isinstance(listed, dict)}


def _digests_alone(listed: dict[str, Any]) -> dict[str, str]:
    return {file: text for file, text in listed.items() if isinstance(text, str) and _DIGEST.fullmatch(text)}


def record_bytes(record: Mapping[str, Any], digests: Digests) -> bytes:
    """Returns settings.json with these digests: those of the first classes alone, where all would be too large."""
    kept, num_bytes = {}, len(_text({**record, DIGESTS: {}}))
    for name, listed in digests.items():
        num_bytes += len(_text({DIGESTS: {name: listed}}))
        if num_bytes > LARGEST_RECORD_BYTES:
            break
        kept[name] = listed
    return _text({**record, DIGESTS: kept})


def _text(record: Mapping[str, Any]) -> bytes:
    return (json.dumps(record, indent=2) + "\n").encode()


# What older versions did when settings.json did not say it yet.
_BEFORE_RECORDED = {"decoder_precision": "float32"}
