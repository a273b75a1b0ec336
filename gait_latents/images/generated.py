"""The files of a folder of generated images: reads them back, and what is recorded beside them."""

import json
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
    if image_format != "auto":
        return f".{image_format}"
    return ".jpg" if trained_on in (".jpg", ".jpeg", ".jpe", ".jfif") else ".png"


LARGEST_RECORD_BYTES = 1 << 20


@dataclass(frozen=True)
class Cell:
    """One image to make."""

    label: int
    class_name: str
    index: int
    path: Path


def list_missing(cells: Sequence[Cell]) -> list[Cell]:
    return [cell for cell in cells if not cell.path.is_file()]


def read_made(path: Path, image_size: int) -> np.ndarray:
    try:
        return reading.decode(files.read_whole(path, at_most=reading.MAX_FILE_BYTES), image_size=image_size)
    except (OSError, BadImage) as error:
        raise Failed(
            f"{path} is damaged; remove it, and the same command makes it again ({getattr(error, 'strerror', error)})"
        ) from error


def read_record(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(files.read_whole(path, at_most=LARGEST_RECORD_BYTES))
    except (OSError, ValueError, RecursionError):
        record = None
    if not isinstance(record, dict):
        raise UserError(f"{path} is damaged; give another --output_folder")
    return {**_BEFORE_RECORDED, **settings.with_later_settings(record)}


# What was done before settings.json said so.
_BEFORE_RECORDED = {"decoder_precision": "float32"}
