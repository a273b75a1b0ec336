"""Latents that other programs cached, one `user_07_name.pt` per image, taken over into a cache of ours.

Such a file holds one scaled draw [C h w] (or [1 C h w], or either in a dictionary). It becomes moments whose mean is
the unscaled draw and whose variance is next to nothing, in a space of its own: no VAE is known that made it, so no
VAE's latents may stand beside it. Its key is the SHA-256 of the file.
"""

import csv
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import durable
import images
import weight_files
from config import UserError
from images import Entry, Skipped, Split, shown
from latent_cache import LatentCache, Space

SMALLEST_LOGVAR = -30.0  # a draw differs from the mean by less than float16 can tell
FILE_PATTERN = "user_NUMBER_NAME.pt"
_FILE_NAME = re.compile(r"user_(\d{1,9})_(.+)\.pth?", re.IGNORECASE | re.DOTALL)
_USER_NAME = re.compile(r"user_(\d{1,9})_(.+)", re.DOTALL)
_LARGEST_FILE_BYTES = 256 << 20  # torch.save of a part of a batch writes the whole batch
_LARGEST_SIDE, _LARGEST_CHANNELS = 1024, 256
_LARGEST_LIST_BYTES = 64 << 20
_LATENT_NAMES = ("latent", "latents", "z", "sample")  # which of several tensors in a dictionary is meant
_ROWS_PER_PUT = 256


class BadLatent(Exception):
    """A file that holds no latent; `str()` is the reason, in one line."""


@dataclass(frozen=True)
class OldFile:
    """A file of an old cache and the image that it stands for."""

    path: Path
    class_name: str
    name: str


# --- which files, and of which images ----------------------------------------------------------------------


def list_files(folder: Path, index: Mapping[str, Sequence[str]] | None) -> tuple[list[OldFile], list[str]]:
    """Lists the latents in a folder.

    Args:
        folder: the old cache.
        index: class -> file names of the images, when they are at hand: the class of user 7 is then the folder whose
            name ends in the number 7, and the image is the file of that name in it. Otherwise the class is ID_7.

    Returns:
        The latents, by class and name in natural order, and the names of .pt files that are called otherwise.

    Raises:
        UserError: when there are none, two stand for one image, or no one class folder has the number of a user.
    """
    names = _visible_names(folder)
    matches = {name: _FILE_NAME.fullmatch(name) for name in names}
    others = [name for name, match in matches.items() if match is None and name.lower().endswith((".pt", ".pth"))]
    numbered = [(name, int(match[1]), match[2]) for name, match in matches.items() if match is not None]
    if not numbered:
        raise UserError(f"--import_folder {shown(folder)} has no file called {FILE_PATTERN}")
    class_of = _classes_of({number for _, number, _ in numbered}, index)
    files = {(class_of[number], _image_called(stem, class_of[number], index)): [] for _, number, stem in numbered}
    for name, number, stem in numbered:
        files[class_of[number], _image_called(stem, class_of[number], index)].append(name)
    for same in files.values():
        if len(same) > 1:
            raise UserError(f"{' and '.join(shown(name) for name in same[:2])} stand for one image; remove one of them")
    order = sorted(files, key=lambda place: (images.natural_key(place[0]), images.natural_key(place[1])))
    return [OldFile(folder / files[place][0], *place) for place in order], others


def _visible_names(folder: Path) -> list[str]:
    try:
        return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise UserError(f"--import_folder {shown(folder)} cannot be listed: {error.strerror or error}") from None


def _classes_of(numbers: set[int], index: Mapping[str, Sequence[str]] | None) -> dict[int, str]:
    """Names the class of each user number."""
    if index is None:
        return {number: f"ID_{number}" for number in numbers}
    folders: dict[int, list[str]] = {}
    for name in index:
        found = re.findall(r"\d+", name)
        if found:
            folders.setdefault(int(found[-1]), []).append(name)
    for number in sorted(numbers):
        candidates = folders.get(number, [])
        if len(candidates) != 1:
            what = f"{len(candidates)} class folders end" if candidates else "no class folder ends"
            raise UserError(
                f"{what} in the number {number}, which files in --import_folder begin with; mend --data_path"
            )
    return {number: folders[number][0] for number in numbers}


def _image_called(stem: str, class_name: str, index: Mapping[str, Sequence[str]] | None) -> str:
    """Returns the name of the image file with this stem, where just one is at hand, else the stem."""
    if not images.is_file_name(stem):
        raise UserError(f"{stem!r:.100} in --import_folder can be the name of no image")
    found = [name for name in (index or {}).get(class_name, ()) if stem in (name, Path(name).stem)]
    return found[0] if len(found) == 1 else stem


# --- what a file holds -------------------------------------------------------------------------------------


def read_latent(path: Path) -> tuple[Tensor, str]:
    """Opens one file without running what is in it; returns the scaled latent [C h w] and the key of its bytes.

    Raises:
        BadLatent: when it holds no latent, or cannot be read.
    """
    try:
        key = images.image_key(durable.read_whole(path, at_most=_LARGEST_FILE_BYTES))
        content, _ = weight_files.read_weights(path)
        latent = _the_latent(path, content)
        weight_files.check_tensor(path, "its tensor", latent)
    except OSError as error:
        raise BadLatent(f"cannot be read: {error.strerror or error}") from None
    except UserError as error:  # its remedy is for weights
        raise BadLatent(str(error).removeprefix(str(path)).lstrip(": ").partition("; ")[0]) from None
    latent = latent.detach()
    if latent.itemsize < 2:  # formats of 8 bits, in which torch can do next to nothing
        latent = latent.float()
    shape = tuple(latent.shape)
    if len(shape) == 4 and shape[0] == 1:
        latent, shape = latent[0], shape[1:]
    if len(shape) != 3 or not 0 < shape[0] <= _LARGEST_CHANNELS or not 0 < shape[1] == shape[2] <= _LARGEST_SIDE:
        raise BadLatent(f"its tensor has the shape {list(latent.shape)}, and a latent is [C h h] or [1 C h h]")
    if not latent.isfinite().all():
        raise BadLatent("it has values that are not finite")
    return latent.clone(), key


def _the_latent(path: Path, content: Any) -> Any:
    """Finds the one tensor that is meant."""
    if not isinstance(content, dict):
        return content
    found = {name: value for name, value in content.items() if isinstance(value, Tensor) and value.ndim in (3, 4)}
    for name in _LATENT_NAMES:
        if name in found:
            return found[name]
    if len(found) != 1:
        names = ", ".join(weight_files.printable(name) for name in list(content)[:5])
        raise BadLatent(f"it is a dictionary with {len(found)} tensors that could be the latent ({names})")
    return next(iter(found.values()))


def to_moments(latent: Tensor, scale_factor: float) -> np.ndarray:
    """Turns a scaled latent [C h w] into moments float16 [2C h w]; raises BadLatent when a value is out of range."""
    mean = (latent.double() / scale_factor).to(torch.float16)  # C h w
    if not mean.isfinite().all():
        largest = float(latent.abs().max())
        raise BadLatent(f"a value of {largest:.3g}, divided by {scale_factor:g}, is more than float16 holds")
    return torch.cat([mean, torch.full_like(mean, SMALLEST_LOGVAR)]).numpy()


# --- taking them over --------------------------------------------------------------------------------------


@dataclass
class Imported:
    """What came of an import."""

    cache: LatentCache
    entries: list[Entry] = field(default_factory=list)
    bad: list[tuple[OldFile, str]] = field(default_factory=list)
    dtypes: Counter[str] = field(default_factory=Counter)


def first_shape(files: Iterable[OldFile]) -> tuple[int, int, int]:
    """Returns the shape [C h w] of the first file that holds a latent; raises UserError when none does."""
    reason = ""
    for file in files:
        try:
            channels, height, width = read_latent(file.path)[0].shape
            return channels, height, width
        except BadLatent as error:
            reason = reason or f"{shown(file.path.name)}: {error}"
    raise UserError(f"no file in --import_folder holds a latent; the first, {reason}")


def store(
    files: Sequence[OldFile], cache: LatentCache, *, scale_factor: float, advance: Callable[[int], None]
) -> Imported:
    """Puts the latents into the cache, and publishes them; whatever is wrong with one is noted in `bad`.

    Args:
        cache: of an imported space, whose shape every latent must have.
        scale_factor: what the old program multiplied its latents by.
        advance: called with the number of files settled.

    Raises:
        OSError: when publishing fails.
    """
    result = Imported(cache)
    for batch in _batches(files):
        keys, rows, names = [], [], []
        for file in batch:
            try:
                latent, key = read_latent(file.path)
                moments = to_moments(latent, scale_factor)
                if moments.shape != cache.space.moments_shape:
                    channels, height, width = cache.space.moments_shape
                    wanted = [channels // 2, height, width]
                    raise BadLatent(f"its shape is {list(latent.shape)}, and that of the first latent {wanted}")
            except BadLatent as error:
                result.bad.append((file, str(error)))
                continue
            result.entries.append(Entry(file.class_name, file.name, key))
            result.dtypes[str(latent.dtype).removeprefix("torch.")] += 1
            keys.append(key)
            rows.append(moments)
            names.append(f"{file.class_name}/{file.name}")
        new = [i for i, held in enumerate(cache.holds(keys)) if not held]
        if new:
            record = {"imported": "one draw, frozen", "scale_factor": scale_factor}
            cache.put([keys[i] for i in new], np.stack([rows[i] for i in new]), [names[i] for i in new], record)
        advance(len(batch))
    cache.flush()
    return result


def _batches(files: Sequence[OldFile]) -> Iterator[Sequence[OldFile]]:
    for start in range(0, len(files), _ROWS_PER_PUT):
        yield files[start : start + _ROWS_PER_PUT]


def space_of(shape: tuple[int, int, int], image_size: int, scale_factor: float) -> Space:
    """Returns the space of imported latents [C h w]."""
    channels, height, width = shape
    return Space.imported(image_size, (2 * channels, height, width), scale_factor)


# --- which are for training --------------------------------------------------------------------------------


@dataclass(frozen=True)
class NameLists:
    """The file names of an old split; `test` is None where it has none, and all others are then for testing."""

    train: list[str]
    test: list[str] | None


def read_name_lists(path: Path) -> NameLists:
    """Reads an old split: JSON with "train" and perhaps "test", CSV with a column split, or a training name a line.

    Raises:
        UserError: when it cannot be read or is none of these.
    """
    try:
        text = durable.read_whole(path, at_most=_LARGEST_LIST_BYTES).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        what = (error.strerror or error) if isinstance(error, OSError) else "it is no UTF-8 text"
        raise UserError(f"--import_split {shown(path)} cannot be read: {what}") from None
    if text.lstrip().startswith(("{", "[")):
        lists = _lists_of_json(text, path)
    elif path.suffix.lower() == ".csv":
        lists = _lists_of_csv(text, path)
    else:
        lists = NameLists([line.strip() for line in text.splitlines() if line.strip()], None)
    if not lists.train:
        raise UserError(f"--import_split {shown(path)} names no training image")
    return lists


def _lists_of_json(text: str, path: Path) -> NameLists:
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        document = None
    found = {"train": document} if isinstance(document, list) else document
    if not isinstance(found, dict) or not all(_are_names(found.get(part) or []) for part in ("train", "test")):
        raise UserError(f'--import_split {shown(path)} is not JSON of the form {{"train": [names], "test": [names]}}')
    return NameLists(found.get("train") or [], found.get("test"))


def _are_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _lists_of_csv(text: str, path: Path) -> NameLists:
    """Reads a table with a line for each image: its name, and train or test in another column."""
    parts: dict[str, list[str]] = {"train": [], "test": []}
    try:
        rows = list(csv.reader(text.splitlines()))
    except csv.Error as error:
        raise UserError(f"--import_split {shown(path)} is no CSV table: {error}") from None
    has_index = bool(rows and len(rows[0]) > 1 and not rows[0][0].strip())  # a first column without a name
    for row in rows:
        words = [cell.strip() for cell in row[has_index:]]
        part = next((word.lower() for word in words if word.lower() in parts), None)
        names = [word for word in words if word.lower() not in parts]
        if part is not None and names:
            parts[part].append(names[0])
    if not parts["train"]:
        raise UserError(f"--import_split {shown(path)} has no line with a name and the word train")
    return NameLists(parts["train"], parts["test"] or None)


def split_of(
    entries: Sequence[Entry], others: Sequence[Entry], lists: NameLists | None, skipped: Sequence[Skipped]
) -> tuple[Split, list[str]]:
    """Divides what was imported into training and test images.

    Without lists all that was imported is for training, and `others` are for testing. With lists, those that they
    name; and where they name no test images, all the rest is for testing.

    Args:
        entries: the imported images.
        others: images at hand that were not imported, and can only be for testing.
        lists: an old split.
        skipped: images whose latent was no good.

    Returns:
        The split, and the names in the lists that stand for no image.

    Raises:
        UserError: when nothing, or a class without anything, is left for training.
    """
    train, test, unknown = list(entries), list(others), []
    if lists is not None:
        places = _Places([*entries, *others])
        train, lost = places.find(lists.train)
        unknown = [name for name in lists.train if name in lost]
        have = set(entries)
        unknown += [f"{entry.class_name}/{entry.name}" for entry in train if entry not in have]
        train = [entry for entry in train if entry in have]
        taken = set(train)
        test = [entry for entry in (*entries, *others) if entry not in taken]
        if lists.test is not None:
            test, lost = places.find(lists.test)
            unknown += [name for name in lists.test if name in lost]
            both = set(train) & set(test)
            if both:
                first = min(both, key=lambda entry: (entry.class_name, entry.name))
                raise UserError(f"--import_split has {first.class_name}/{first.name} for training and for testing")
    if not train:
        raise UserError("--import_split names no image that was imported for training")
    classes = sorted({entry.class_name for entry in train}, key=images.natural_key)
    test = [entry for entry in test if entry.class_name in classes]
    rule: dict[str, int | str] = {"seed": 0, "split": "imported", "split_gap": 0}
    rule |= {"images_per_user": "all", "num_users": "all"}
    kept = tuple(item for item in skipped if item.class_name in classes)
    return Split(tuple(classes), _ordered(train), _ordered(test), kept, rule), unknown


def _ordered(entries: Iterable[Entry]) -> tuple[Entry, ...]:
    """Orders by class and name, naturally; one that stands there twice is taken once."""
    order = lambda entry: (images.natural_key(entry.class_name), images.natural_key(entry.name))  # noqa: E731
    return tuple(sorted(set(entries), key=order))


class _Places:
    """Finds entries by what an old list may call them: with or without folders, ending and `user_07_`."""

    def __init__(self, entries: Iterable[Entry]) -> None:
        self.by_name: dict[str, list[Entry]] = {}
        self.classes: set[str] = set()
        for entry in entries:
            self.classes.add(entry.class_name)
            for name in _calls(entry):
                self.by_name.setdefault(name, []).append(entry)

    def find(self, names: Sequence[str]) -> tuple[list[Entry], set[str]]:
        """Returns the entries found, and the names that stand for none; raises UserError when one stands for two."""
        found, lost = [], set()
        parts = [_parts(name) for name in names]
        # Where no folder is a class, such as in train/a.jpg, folders say nothing.
        tell = any(folder in self.classes or folder.startswith("#") for folder, _ in parts)
        for name, (folder, last) in zip(names, parts, strict=True):
            begin = f"{folder}/" if folder and tell else ""
            candidates = self.by_name.get(f"{begin}{last}") or self.by_name.get(f"{begin}{_bare(last)}", [])
            if len(candidates) > 1:
                places = " and ".join(shown(f"{entry.class_name}/{entry.name}") for entry in candidates[:2])
                raise UserError(f"--import_split has {shown(name)}, which may be {places}; write the class before it")
            found += candidates
            if not candidates:
                lost.add(name)
        return found, lost


def _parts(name: str) -> tuple[str, str]:
    """Returns the class and the file name in a name of a list; the class is "" or, from `user_07_`, #7."""
    *folders, last = name.replace("\\", "/").split("/")
    match = _USER_NAME.fullmatch(last)
    if match is not None:
        return f"#{int(match[1])}", match[2]
    return folders[-1] if folders else "", last


def _bare(name: str) -> str:
    """Returns a file name without its ending, if that is one of an image or of a latent."""
    path = Path(name)
    return path.stem if path.suffix.lower() in images.IMAGE_SUFFIXES | {".pt", ".pth"} else name


def _calls(entry: Entry) -> set[str]:
    """Returns the names of an entry: file name or stem, alone or after the class or the number of the user."""
    number = re.findall(r"\d+", entry.class_name)
    begins = ["", f"{entry.class_name}/", *([f"#{int(number[-1])}/"] if number else [])]
    return {f"{begin}{word}" for begin in begins for word in (entry.name, _bare(entry.name))}


def images_not_imported(
    index: Mapping[str, Sequence[str]], files: Iterable[OldFile], read: Callable[[Entry], bytes]
) -> list[Entry]:
    """Returns the images at hand, of the classes that were imported, for which there is no latent, with their keys."""
    known = {(file.class_name, file.name) for file in files}
    classes = {class_name for class_name, _ in known}
    rest = [
        Entry(class_name, name)
        for class_name in sorted(classes, key=images.natural_key)
        for name in index.get(class_name, ())
        if (class_name, name) not in known
    ]
    return [replace(entry, key=images.image_key(read(entry))) for entry in rest]


def usual_image_size(shape: tuple[int, int, int]) -> int:
    """Returns the side of the images behind latents [C h w] of a VAE that downsamples 8 times, as most do."""
    return min(8 * shape[1], 4096)
