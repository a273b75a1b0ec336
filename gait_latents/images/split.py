"""The split into training, validation and test images: drawn by the seed, stored as JSON with a checksum.

The split is made from names alone, without opening a file. Content keys are added afterwards (`selection.py`).
"""

import hashlib
import itertools
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeGuard

from gait_latents.common import files
from gait_latents.common.console import show_name
from gait_latents.common.errors import UserError
from gait_latents.common.layout import SPLIT_NAME
from gait_latents.images.names import ALL, choose_names, name_list, natural_key, nfc

SPLIT_FORMAT = 1
_RULE_FIELDS = ("seed", "split", "split_gap", "images_per_user", "num_users")
# Parts of the rule that are stored where they differ from these, which is what older splits were drawn with.
_LATER_RULE_FIELDS: dict[str, Any] = {
    "class_names": list(ALL),
    "small_classes": "refuse",
    "validation_per_user": 0,
    "split_start": 0.0,
}
PARTS = ("train", "validation", "test")  # but for the gaps between them
_LARGEST_VALIDATION = 4  # one in so many of the images that are not for training, at most


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
    """The images of a run; entries are ordered by class, then by name, both in natural order.

    Attributes:
        classes: the class names, in label order.
        train: the training images.
        test: the test images.
        skipped: images that could not be read and are in neither part.
        rule: the settings that made the split.
        gap: images left out between training, validation and test images, as --split_gap says.
        validation: the images on which choices are made, so that no test image has a say in them.
    """

    classes: tuple[str, ...]
    train: tuple[Entry, ...]
    test: tuple[Entry, ...]
    skipped: tuple[Skipped, ...]
    rule: dict[str, Any]
    gap: tuple[Entry, ...] = ()
    validation: tuple[Entry, ...] = ()

    @property
    def used(self) -> tuple[Entry, ...]:
        """The training, validation and test images: all but those left out between them."""
        return (*self.train, *self.validation, *self.test)

    def part(self, name: str) -> tuple[Entry, ...]:
        """Returns the entries of "train", "validation" or "test"; raises UserError for any other name."""
        if name not in PARTS:
            raise UserError(f"split is {name!r}; it is train, validation or test")
        return getattr(self, name)

    def labels(self, entries: Iterable[Entry]) -> list[int]:
        """Returns the label of each entry: the place of its class among the classes."""
        label_of = {name: label for label, name in enumerate(self.classes)}
        return [label_of[entry.class_name] for entry in entries]

    def keys(self) -> dict[tuple[str, str], str]:
        """Returns (class name, file name) -> content key for all entries that have one."""
        entries = (*self.used, *self.gap)
        return {(entry.class_name, entry.name): entry.key for entry in entries if entry.key}

    def with_keys(self, keys: Mapping[tuple[str, str], str]) -> "Split":
        """Returns the split with these content keys, by (class name, file name); other entries keep theirs."""

        def add_keys(entries: Iterable[Entry]) -> tuple[Entry, ...]:
            return tuple(Entry(e.class_name, e.name, keys.get((e.class_name, e.name), e.key)) for e in entries)

        parts = {part: add_keys(getattr(self, part)) for part in (*PARTS, "gap")}
        return replace(self, **parts)

    def without(self, skipped: Iterable[Skipped]) -> "Split":
        """Returns the split in which those of these images that it holds are recorded as skipped, and in neither part.

        Raises:
            UserError: when that leaves a class without a training image.
        """
        own = {(entry.class_name, entry.name) for entry in self.used}
        new = {(item.class_name, item.name): item for item in skipped if (item.class_name, item.name) in own}
        old = {(item.class_name, item.name): item for item in self.skipped}

        def keep(entries: Iterable[Entry]) -> tuple[Entry, ...]:
            return tuple(e for e in entries if (e.class_name, e.name) not in new)

        train = keep(self.train)
        empty = sorted({e.class_name for e in self.train} - {e.class_name for e in train}, key=natural_key)
        if empty:
            raise UserError(
                f"no training image can be read of {name_list(empty)}; mend the images or remove the folder"
            )
        parts = {"train": train, "validation": keep(self.validation), "test": keep(self.test)}
        return replace(self, **parts, skipped=tuple((old | new).values()))

    def index(self) -> dict[str, list[str]]:
        """Returns class -> names of all images that the split was made from, as `list_images` returned them."""
        names: dict[str, list[str]] = {class_name: [] for class_name in self.classes}
        for item in (*self.used, *self.gap, *self.skipped):
            names[item.class_name].append(item.name)
        return {class_name: sorted(found, key=natural_key) for class_name, found in names.items()}

    def to_bytes(self) -> bytes:
        """Returns the split as readable JSON, one image a line, ending in the SHA-256 of what precedes it."""
        members = [
            f'  "format": {SPLIT_FORMAT}',
            f'  "rule": {_json(_stored_rule(self.rule))}',
            _json_lines("classes", self.classes),
            *(
                _json_lines(part, [{"class": e.class_name, "name": e.name, "key": e.key} for e in entries])
                for part, entries in self._stored_parts()
            ),
            _json_lines("skipped", [{"class": s.class_name, "name": s.name, "reason": s.reason} for s in self.skipped]),
        ]
        body = ("{\n" + ",\n".join(members) + ",\n").encode()
        return body + _seal(body)

    def _stored_parts(self) -> Iterator[tuple[str, tuple[Entry, ...]]]:
        """Yields the parts as they are stored; older splits have no validation images, and no line that says so."""
        for part in (*PARTS, "gap"):
            entries = getattr(self, part)
            if entries or part != "validation":
                yield part, entries

    @staticmethod
    def from_bytes(data: bytes, where: str) -> "Split":
        """Reads what `to_bytes` wrote.

        Raises:
            UserError: naming `where`, when anything is not as it was written, or the format is another.
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
            raise UserError(f"{where} does not hold a split ({one_line(error)}); remove it") from error
        raise UserError(f"{where} has format {found!r} but this program reads format {SPLIT_FORMAT}; remove it")


def make_split(
    index: Mapping[str, Sequence[str]],
    *,
    num_users: int | str,
    images_per_user: int | str,
    seed: int,
    split: str,
    split_gap: int,
    split_start: float = 0.0,
    validation_per_user: int = 0,
    class_names: Sequence[str] = ALL,
    small_classes: str = "refuse",
    form: Callable[[str], str] = nfc,
) -> Split:
    """Divides the listed images of the chosen classes into training, validation and test images.

    Which images are for training does not depend on how many are for validation.

    Args:
        index: class -> file names, from `list_images` or `Split.index`.
        num_users: how many of the chosen classes, the first in natural order, or "all".
        images_per_user: training images of each class, or "all".
        seed: orders the images of a "random" split.
        split: "random", or "contiguous" for the first images in natural order.
        split_gap: images left out between training, validation and test in a contiguous split.
        split_start: where a contiguous split begins, as a share of the images; those before it come after the last.
        validation_per_user: of each class, at most a quarter of the images not for training, and the first of these.
        class_names: names and patterns of the classes to choose from; `ALL` is every class.
        small_classes: "refuse" classes with fewer images than images_per_user, or "take" all that these have.
        form: that in which names are compared and drawn; earlier versions took them as they stand.

    Raises:
        UserError: naming each class that has too few images, the name that fits no class, or what no split can be.
    """
    _check_rule(split, split_start)
    ordered = sorted(index, key=lambda name: natural_key(name, form))
    named = choose_names(class_names, ordered, setting="class_names", where="the image folder")
    classes = named[: None if num_users == "all" else int(num_users)]
    if small_classes != "take" or not all(index[name] for name in classes):
        _check_enough({name: len(index[name]) for name in classes}, images_per_user)
    parts: dict[str, list[Entry]] = {part: [] for part in (*PARTS, "gap")}
    for class_name in classes:
        names = sorted(index[class_name], key=lambda name: natural_key(name, form))
        count = len(names) if images_per_user == "all" else min(int(images_per_user), len(names))
        is_drawn = split == "random"
        order = sorted(names, key=_draw_order(seed, class_name, form)) if is_drawn else names
        places, gap = (range(len(names)), 0) if is_drawn else (_from(split_start, len(names)), split_gap)
        part_at = _parts_by_place(places, count, validation_per_user, gap)
        part_of = {name: part_at[place] for place, name in enumerate(order)}
        for name in names:
            parts[part_of[name]].append(Entry(class_name, name))
    train, validation, test, gaps = (tuple(parts[part]) for part in (*PARTS, "gap"))
    rule = {
        **dict(zip(_RULE_FIELDS, (seed, split, split_gap, images_per_user, num_users), strict=True)),
        "class_names": list(class_names),
        "small_classes": small_classes,
        "validation_per_user": validation_per_user if validation else 0,
        "split_start": split_start,
    }
    return Split(tuple(classes), train, test, (), rule, gaps, validation)


def _check_rule(split: str, start: float) -> None:
    if split not in ("random", "contiguous"):
        raise UserError(f"split is {split!r}; it is random or contiguous")
    if split == "random" and start:
        raise UserError(
            f"--split_start is {start:g}, but a random split begins nowhere: give --split contiguous, or --split_start "
            "0 and, for another random one, another --seed"
        )


def _from(start: float, count: int) -> list[int]:
    """Returns the places 0 to count - 1, from a share of the way on; those before it come last."""
    first = math.floor(start * count) % max(1, count)
    return [*range(first, count), *range(first)]


def _parts_by_place(places: Sequence[int], num_training: int, num_validation: int, gap: int) -> dict[int, str]:
    """Returns the part of the image at each place of a class, in which neighbours may share something.

    Args:
        places: 0 to the number of images - 1, in the order in which the split takes them.
        gap: so many images on either side of each training image are in no other part, and so on.
    """
    training, rest = places[:num_training], places[num_training:]

    def apart(some: Sequence[int], others: Sequence[int]) -> list[int]:
        """Returns those that are further than the gap from all others."""
        steps = [0] * (len(places) + 1)
        for place in others:
            steps[max(0, place - gap)] += 1
            steps[min(len(places), place + gap + 1)] -= 1
        num_near = list(itertools.accumulate(steps))
        return [place for place in some if not num_near[place]]

    after = apart(rest, training)
    validation = after[: min(num_validation, max(0, len(after) - gap) // _LARGEST_VALIDATION)]
    test = apart(after[len(validation) :], validation)
    found = dict.fromkeys(places, "gap")
    for part, chosen in zip(PARTS, (training, validation, test), strict=True):
        found |= dict.fromkeys(chosen, part)
    return found


def _draw_order(seed: int, class_name: str, form: Callable[[str], str]) -> Callable[[str], bytes]:
    # The place of a file depends on its own name alone, so that files and classes that come or go do not reshuffle the
    # others. JSON keeps the three parts apart, and its escapes also stand for names that are not valid Unicode.
    return lambda name: hashlib.sha256(json.dumps([seed, form(class_name), form(name)]).encode()).digest()


def _check_enough(counts: Mapping[str, int], images_per_user: int | str) -> None:
    wanted = 1 if images_per_user == "all" else int(images_per_user)
    if wanted < 1:
        raise UserError(f"--images_per_user is {wanted}; it must be at least 1")
    few = [name for name, count in counts.items() if count < wanted]
    if not few:
        return
    listing = ", ".join(f"{show_name(name)} has {counts[name] or 'none'}" for name in few)
    would_do = min((count for count in counts.values() if count), default=0)
    remedy = "add images"
    if wanted > would_do > 0:
        remedy = f"lower it to {would_do}, add images, or give --small_classes take for all that such classes have"
    if any(counts[name] == 0 for name in few):
        remedy += ", and remove the folders that have none"
    raise UserError(f"--images_per_user is {images_per_user} but {listing}; {remedy}")


def shared_content(split: Split) -> list[tuple[Entry, Entry]]:
    """Pairs each validation or test image with the first image of the same content in a part before its own."""
    first: dict[str, Entry] = {}
    pairs = []
    for before, entries in ((split.train, split.validation), (split.validation, split.test)):
        for entry in before:
            first.setdefault(entry.key, entry)
        pairs += [(first[entry.key], entry) for entry in entries if entry.key and entry.key in first]
    return pairs


def in_two_classes(split: Split) -> list[tuple[Entry, Entry]]:
    """Pairs each image that has the content of one of another class with the first such image."""
    first: dict[str, Entry] = {}
    pairs = []
    for entry in split.used:
        other = first.setdefault(entry.key, entry)
        if entry.key and other.class_name != entry.class_name:
            pairs.append((other, entry))
    return pairs


def _json(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    # Line separators, control characters and surrogates, which stand for undecodable bytes, only survive as escapes.
    return text if text.isprintable() else json.dumps(value)


def _stored_rule(rule: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in rule.items() if value != _LATER_RULE_FIELDS.get(name)}


def _json_lines(name: str, rows: Sequence[object]) -> str:
    lines = ",\n".join(f"    {_json(row)}" for row in rows)
    return f'  "{name}": [\n{lines}\n  ]' if rows else f'  "{name}": []'


def _seal(body: bytes) -> bytes:
    return f'  "sha256": "{hashlib.sha256(body).hexdigest()}"\n}}\n'.encode()


def _split_of(document: dict[str, Any]) -> Split:
    classes = tuple(_name(name) for name in document["classes"])
    rows = {"validation": [], **document}
    parts = {
        part: tuple(Entry(_name(row["class"]), _name(row["name"]), _key(row["key"])) for row in rows[part])
        for part in (*PARTS, "gap")
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
    rule |= {name: document["rule"].get(name, before) for name, before in _LATER_RULE_FIELDS.items()}
    names = rule["class_names"]
    if not isinstance(names, list) or not all(isinstance(text, str) for text in (*names, rule["small_classes"])):
        raise TypeError("the rule")
    if type(rule["validation_per_user"]) is not int or type(rule["split_start"]) not in (int, float):
        raise TypeError("the rule")
    return Split(classes, parts["train"], parts["test"], skipped, rule, parts["gap"], parts["validation"])


def _name(value: object) -> str:
    # A file name and no path: nothing in a split may lead out of the data folder.
    if not is_file_name(value):
        raise ValueError(f"{value!r:.100} is not the name of a file or folder")
    return value


def is_file_name(value: object) -> TypeGuard[str]:
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


def one_line(error: BaseException | str) -> str:
    """Returns the message of an error as one short line that can be printed."""
    return show_name(" ".join(str(error).split())[:200])


LARGEST_SPLIT_BYTES = 1 << 30


def read_split(folder: Path) -> Split | None:
    """Reads the split stored in a cache or run folder; None when there is none.

    Raises:
        UserError: when it cannot be read, or is damaged or was edited.
    """
    path = folder / SPLIT_NAME
    try:
        data = files.read_whole(path, at_most=LARGEST_SPLIT_BYTES)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}; restore it or remove it") from error
    return Split.from_bytes(data, str(path))
