"""A folder of images that generate.py made: which files it is to have, reading them, and reading their record.

The record, settings.json, says how the images were made; `training/generation.py` writes it and makes the images.
"""

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gait_latents import settings
from gait_latents.common import files
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


LARGEST_RECORD_BYTES = 1 << 20


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
        return reading.decode(files.read_whole(path, at_most=reading.MAX_FILE_BYTES), image_size=image_size)
    except (OSError, BadImage) as error:
        raise Failed(
            f"{path} is damaged; remove it, and the same command makes it again ({getattr(error, 'strerror', error)})"
        ) from error


def read_record(path: Path) -> dict[str, Any]:
    """Reads settings.json of a folder of generated images; raises UserError when it is damaged.

    Settings that came after the record was written are added, with the values that they then had.
    """
    try:
        record = json.loads(files.read_whole(path, at_most=LARGEST_RECORD_BYTES))
    except (OSError, ValueError, RecursionError):
        record = None
    if not isinstance(record, dict):
        raise UserError(f"{path} is damaged; give another --output_folder")
    return {**_BEFORE_RECORDED, **settings.with_later_settings(record)}


# What older versions did when settings.json did not say it yet.
_BEFORE_RECORDED = {"decoder_precision": "float32"}
