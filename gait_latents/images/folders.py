"""Folders of images, one per class: which there are, in natural order, and what to say where there are none."""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from gait_latents.common import mounts
from gait_latents.common.console import show_name
from gait_latents.common.errors import UserError

IMAGE_SUFFIXES = frozenset(
    {".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".mpo", ".pbm", ".pgm", ".png", ".pnm", ".ppm"}
    | {".tif", ".tiff", ".webp"}
)
LAYOUT_REMEDY = "give the folder that has one sub-folder of images for each class"


def natural_key(name: str) -> tuple:
    """Returns a sort key that puts ID_2 before ID_10; different names never have equal keys."""
    pieces = enumerate(re.split(r"([0-9]+)", name))  # every second one is a number
    return tuple((len(text.lstrip("0")), text.lstrip("0")) if i % 2 else text for i, text in pieces), name


def list_images(data_path: str | os.PathLike[str], *, setting: str = "data_path") -> dict[str, list[str]]:
    """Lists the image files directly in each class folder, classes and files in natural order.

    Hidden files and folders are passed over, and so are files whose names do not end like those of images
    (IMAGE_SUFFIXES). A class folder without images has an empty list.

    Args:
        data_path: the folder that holds a folder for each class.
        setting: the name of the setting that the folder comes from, for messages.

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
        remedy = mounts.why_missing(setting, root) or LAYOUT_REMEDY
        found = "is a file, not a folder; unpack it first" if root.exists() else f"does not exist; {remedy}"
        raise UserError(f"--{setting} {show_name(root)} {found}")
    children = _visible_children(root)
    dangling = [child.name for child in children if _leads_nowhere(child)]
    if dangling:
        raise UserError(
            f"in --{setting} {show_name(root)} are links that lead nowhere: {name_list(dangling)}; remove them"
        )
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
        raise UserError(f"the folder {show_name(folder)} cannot be listed: {error.strerror or error}") from error


def _leads_nowhere(child: os.DirEntry[str]) -> bool:
    if not child.is_symlink():
        return False
    try:
        child.stat()
    except OSError:
        return True
    return False


def _nothing_found_message(root: Path, classes: Sequence[str], setting: str) -> str:
    where = f"--{setting} {show_name(root)}"
    if not classes:
        loose = len(_image_names(root))
        found = f"{loose} images but no sub-folders" if loose else "no sub-folders"
        return f"{where} has {found}; it needs one folder for the images of each class"
    for name in classes:
        if any(child.is_dir(follow_symlinks=False) for child in _visible_children(root / name)):
            return f"no images in the class folders of {where}; are they deeper, in {show_name(root / name)}?"
    endings = " ".join(sorted(IMAGE_SUFFIXES))
    return f"no images in the class folders of {where} ({name_list(classes)}); files taken as images: {endings}"


def name_list(names: Sequence[str], limit: int = 20) -> str:
    """Lists names for a message, at most `limit` of them and the number of the others."""
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(show_name(name) for name in names[:limit]) + rest


def missing_classes_warning(index: Mapping[str, Sequence[str]], num_users: int | str) -> str | None:
    """Returns a warning that lists the class folders when there are fewer than asked for, else None."""
    if num_users == "all" or len(index) >= int(num_users):
        return None
    folders = name_list(list(index), limit=100)
    return f"--num_users is {num_users} but there are only {len(index)} class folders: {folders}"
