"""Folders of images, one per class: what lies in them, and what to say where there is nothing to use."""

import os
import stat
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from gait_latents.common import mounts
from gait_latents.common.cli import typed
from gait_latents.common.console import show_name
from gait_latents.common.errors import UserError, let_shortage_pass
from gait_latents.common.layout import (
    LABELS_NAME,
    MANIFEST_NAME,
    PAGE_NAME,
    RECORD_NAME,
    REPORT_NAME,
    SETTINGS_NAME,
    SPLIT_NAME,
)
from gait_latents.images.names import ending, is_passed_over, name_list, natural_key

IMAGE_SUFFIXES = frozenset(
    {".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".mpo", ".pbm", ".pgm", ".png", ".pnm", ".ppm"}
    | {".tif", ".tiff", ".webp"}
)
LAYOUT_REMEDY = "give the folder that has one sub-folder of images for each class"
_PARTS = frozenset(
    {"train", "training", "val", "valid", "validation", "test", "testing", "dev", "eval", "train_set", "test_set"}
)


OUTPUTS = {  # files that lie together in a folder of ours -> what wrote them
    (MANIFEST_NAME, SPLIT_NAME): "is a cache of latents",
    (SETTINGS_NAME, SPLIT_NAME): "was written by train_latent_cfg.py",
    (RECORD_NAME, LABELS_NAME): "was written by generate.py",
    (REPORT_NAME, PAGE_NAME): "was written by evaluate_images.py",
}


@dataclass(frozen=True)
class Contents:
    """What lies directly in one folder; hidden files and folders are in none of the lists of the others.

    Attributes:
        images: names of files whose endings are those of images, in natural order.
        others: names of other files.
        hidden: names of files that begin with a dot.
        special: name -> kind of what is neither file nor folder: named pipe, socket or device.
        folders: names of sub-folders, but for hidden ones and those that systems leave behind.
    """

    images: list[str]
    others: list[str]
    hidden: list[str]
    special: dict[str, str]
    folders: list[str]


@dataclass(frozen=True)
class Listing:
    """What lies in a data folder.

    Attributes:
        path: of the data folder.
        classes: what is in each class folder, in natural order of their names: those that hold an image, be it in a
            sub-folder.
        left_out: the other sub-folders, and what is in those that were looked into.
        loose: what lies in the data folder itself.
    """

    path: Path
    classes: dict[str, Contents]
    left_out: dict[str, Contents | None]
    loose: Contents

    def deeper(self, class_name: str) -> dict[str, int]:
        """Returns the number of images in each sub-folder of a class folder, at any depth, where there are some."""
        place = self.path / class_name
        counts = {name: _num_images_below(place / name) for name in self.classes[class_name].folders}
        return {name: count for name, count in counts.items() if count}


def list_folder(data_path: str | os.PathLike[str], *, setting: str = "data_path") -> Listing:
    """Lists what lies in a folder of class folders.

    A class folder holds image files, known by their endings (IMAGE_SUFFIXES). Folders that are hidden or that systems
    leave behind are no classes.

    Args:
        data_path: the folder that holds a folder for each class.
        setting: the name of the setting that the folder comes from, for messages.

    Raises:
        UserError: when the folder is missing or unreadable, or no sub-folder has an image.
    """
    root = Path(data_path)
    if not root.is_dir():
        remedy = mounts.why_missing(setting, root) or LAYOUT_REMEDY
        found = "is a file, not a folder; unpack it first" if root.exists() else f"does not exist; {remedy}"
        raise UserError(f"--{setting} {show_name(root)} {found}")
    children = _children(root)
    dangling = [child.name for child in children if not _is_hidden(child.name) and _leads_nowhere(child)]
    if dangling:
        raise UserError(
            f"in --{setting} {show_name(root)} are links that lead nowhere: {name_list(dangling)}; remove them"
        )
    loose = _contents(children)
    found = {name: _contents(_children(root / name)) for name in sorted(loose.folders, key=natural_key)}
    unused: dict[str, Contents | None] = {
        child.name: None for child in children if child.name not in found and _is_folder(child)
    }
    listing = Listing(root, found, unused, loose)
    _refuse_parts(listing, setting)
    if not any(inside.images for inside in found.values()):
        raise UserError(_nothing_found_message(listing, setting))
    for name, inside in list(found.items()):
        if not inside.images and not (inside.folders and listing.deeper(name)):
            unused[name] = found.pop(name)
    return listing


def list_images(data_path: str | os.PathLike[str], *, setting: str = "data_path") -> dict[str, list[str]]:
    """Lists the image files directly in each class folder: {class: names}, both in natural order.

    Folders without an image of their own are left out. Raises what `list_folder` does.
    """
    classes = list_folder(data_path, setting=setting).classes
    return {name: inside.images for name, inside in classes.items() if inside.images}


def refuse_nested(listing: Listing, class_names: Sequence[str], *, setting: str = "data_path") -> dict[str, int]:
    """Returns "class/sub-folder" -> number of images in it, which are not used, for these classes.

    Raises:
        UserError: for a class of which more images lie in sub-folders than in its own folder.
    """
    found = {}
    for name in class_names:
        deeper = listing.deeper(name) if listing.classes[name].folders else {}
        if sum(deeper.values()) > len(listing.classes[name].images):
            own, subs = len(listing.classes[name].images), name_list(list(deeper), limit=3)
            raise UserError(
                f"class {show_name(name)} in --{setting} {show_name(listing.path)} has {own or 'no'} images of its own "
                f"and {sum(deeper.values()):,} in sub-folders ({subs}), where images are not looked for; put the "
                "images of a class directly into its folder, or name the other classes with --class_names"
            )
        found.update({f"{name}/{sub}": count for sub, count in deeper.items()})
    return found


def _children(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as children:
            return list(children)
    except OSError as error:
        let_shortage_pass(error)
        raise UserError(f"the folder {show_name(folder)} cannot be listed: {error.strerror or error}") from error


def _contents(children: Sequence[os.DirEntry[str]]) -> Contents:
    images, others, hidden, folders = [], [], [], []
    special: dict[str, str] = {}
    for child in children:
        name = child.name
        if _is_folder(child):
            if not is_passed_over(name):
                folders.append(name)
        elif _is_hidden(name):
            hidden.append(name)
        elif not _leads_nowhere(child) and not child.is_file():
            special[name] = _kind(child.stat().st_mode)
        # A link that leads nowhere is listed too: reading it then fails by name, instead of one image fewer.
        elif ending(name).lower() in IMAGE_SUFFIXES:
            images.append(name)
        else:
            others.append(name)
    return Contents(sorted(images, key=natural_key), others, hidden, special, folders)


def _kind(mode: int) -> str:
    return "named pipe" if stat.S_ISFIFO(mode) else "socket" if stat.S_ISSOCK(mode) else "device"


def _is_hidden(name: str) -> bool:
    return name.startswith(".")


def _is_folder(child: os.DirEntry[str]) -> bool:
    return not _leads_nowhere(child) and child.is_dir()


def _leads_nowhere(child: os.DirEntry[str]) -> bool:
    if not child.is_symlink():
        return False
    try:
        child.stat()
    except OSError:
        return True
    return False


def _num_images_below(folder: Path) -> int:
    """Counts the image files in a folder and below it; what cannot be listed counts as empty."""
    return sum(1 for _, _, names in _walk(folder) for name in names if _is_image_name(name))


def _class_folders_below(folder: Path) -> Path | None:
    """Returns the first folder, this one or one below it, that has a folder with images; None without one."""
    for place, _, names in _walk(folder):
        if Path(place) != folder and any(map(_is_image_name, names)):
            return Path(place).parent
    return None


def _walk(folder: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """Walks through a folder, but for what is hidden, what systems leave behind and what our scripts have written."""
    for place, folders, names in os.walk(folder):
        if any(set(files) <= set(names) for files in OUTPUTS):
            folders.clear()
            continue
        folders[:] = [name for name in folders if not is_passed_over(name)]
        yield place, folders, names


def called_like_images(names: Iterable[str]) -> list[str]:
    """Returns those of some names of folders that are names of images."""
    return [name for name in names if _is_image_name(name)]


def _is_image_name(name: str) -> bool:
    return not _is_hidden(name) and ending(name).lower() in IMAGE_SUFFIXES


def _refuse_parts(listing: Listing, setting: str) -> None:
    """Raises UserError when train, val and test stand in the place of classes, and have class folders themselves."""
    parts = [name for name in listing.classes if name.casefold() in _PARTS and listing.classes[name].folders]
    parts = [name for name in parts if listing.deeper(name)]
    if len(parts) > 1 or (parts and parts == list(listing.classes)):
        first = next((name for name in parts if name.casefold().startswith("train")), parts[0])
        raise UserError(
            f"{name_list(parts)} in --{setting} {show_name(listing.path)} are parts of a data set with class folders "
            f"of their own, and no classes; give {typed(setting, [str(listing.path / first)])}"
        )


def parts_warning(class_names: Sequence[str]) -> str | None:
    """Returns a warning where all classes are called like the parts of a data set, else None."""
    if len(class_names) > 1 and all(name.casefold() in _PARTS for name in class_names):
        return (
            f"the classes are called {name_list(class_names)}, like parts of a data set; if they are, give a folder "
            "with one sub-folder for each class"
        )
    return None


def _nothing_found_message(listing: Listing, setting: str) -> str:
    where, classes = f"--{setting} {show_name(listing.path)}", list(listing.classes)
    if not classes and not listing.left_out:
        loose = len(listing.loose.images)
        found = f"{loose} images but no sub-folders" if loose else "no sub-folders"
        return f"{where} has {found}; it needs one folder for the images of each class"
    deeper = next(filter(None, (_class_folders_below(listing.path / name) for name in classes)), None)
    if deeper:
        return f"no images in the class folders of {where}; are they deeper, in {show_name(deeper)}?"
    endings = " ".join(sorted(IMAGE_SUFFIXES))
    names = name_list(classes or list(listing.left_out))
    return f"no images in the class folders of {where} ({names}); files taken as images: {endings}"


def missing_classes_warning(index: Collection[str], num_users: int | str, *, are_named: bool = False) -> str | None:
    """Returns a warning that lists the classes when there are fewer than asked for, else None.

    Args:
        index: the classes.
        num_users: how many are asked for.
        are_named: whether they are those that --class_names names, and there may be others.
    """
    if num_users == "all" or len(index) >= int(num_users):
        return None
    count, names = len(index), name_list(list(index), limit=100)
    if are_named:
        return f"--num_users is {num_users} but --class_names names only {count}: {names}"
    if count == 1:
        return f"--num_users is {num_users} but there is only 1 class folder: {names}"
    return f"--num_users is {num_users} but there are only {count} class folders: {names}"
