"""Names of classes and images: compared in one Unicode form, put in natural order, and found by what a user types.

The same name can be stored in two ways: macOS writes é as e and an accent (NFD), other systems as one character (NFC).
Names are compared and sorted in NFC, and keep on the disk, in splits and in messages the form that they have.
"""

import difflib
import fnmatch
import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence

from gait_latents.common.cli import typed
from gait_latents.common.console import show_name
from gait_latents.common.errors import UserError
from gait_latents.common.layout import GENERATED_NAMES
from gait_latents.settings import ALL_CLASSES

ALL = ALL_CLASSES  # what stands for every class; the class called all is meant by [a]ll
_MOST_CLASSES = 12  # that a message about a class nobody knows lists


def nfc(name: str) -> str:
    """Returns a name in the Unicode form in which names are compared."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def nfd(name: str) -> str:
    """Returns a name in the form that macOS gives it."""
    return unicodedata.normalize("NFD", name)


def natural_key(name: str, form: Callable[[str], str] = nfc) -> tuple:
    """Returns a sort key that puts ID_2 before ID_10; different names never have equal keys.

    Args:
        form: brings a name into the form in which it is compared.
    """
    written = form(name)
    pieces = enumerate(re.split(r"([0-9]+)", written))  # every second one is a number
    return tuple((len(text.lstrip("0")), text.lstrip("0")) if i % 2 else text for i, text in pieces), written, name


def ending(name: str) -> str:
    """Returns the ending of a file name with its dot, such as .jpg; an empty text where it has none."""
    stem, _, rest = name.rpartition(".")
    return f".{rest}" if stem and rest else ""


def name_list(names: Sequence[str], limit: int = 20) -> str:
    """Lists names for a message, at most `limit` of them and the number of the others."""
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(show_name(name) for name in names[:limit]) + rest


def alike(names: Iterable[str], form: Callable[[str], str]) -> list[list[str]]:
    """Groups those of different names that are equal in a form, such as `nfc`."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(form(name), []).append(name)
    return [group for group in groups.values() if len(group) > 1]


def refuse_alike(classes: Sequence[str], where: str) -> None:
    """Raises UserError when two classes have one name in two Unicode forms: nobody could tell them apart."""
    for first, second, *_ in alike(classes, nfc):
        raise UserError(
            f"two class folders in {where} have the same name, {show_name(first)}, in two Unicode forms: {first!a} and "
            f"{second!a}; put their images into one folder, or give one of them another name"
        )


_LONGEST_NAME = 255  # bytes of a name that file systems take
# Folders that systems and programs leave behind, with copies or small versions of images in some; never classes.
_LEFTOVERS = frozenset(
    {"__macosx", "lost+found", "$recycle.bin", "system volume information", "@eadir", "#recycle", "@recycle"}
    | {"__pycache__"}
)


def is_passed_over(name: str) -> bool:
    """Says whether a folder is no class whatever is in it: hidden, or of a name that systems leave behind."""
    return name.startswith(".") or name.casefold() in _LEFTOVERS


def refuse_unusable(classes: Iterable[str], where: str) -> None:
    """Raises UserError for a class whose name could not be that of a folder of generated images, and says why."""
    for name, reason in unusable(classes).items():
        raise UserError(
            f"the class {show_name(name)} in {where} cannot have that name: {reason}; rename its folder, or name the "
            "other classes with --class_names"
        )


def unusable(classes: Iterable[str]) -> dict[str, str]:
    """Returns those of the classes for which generate.py can make no folder that is read again, and for each why."""
    reasons = {name: _why_unusable(name) for name in classes}
    return {name: reason for name, reason in reasons.items() if reason is not None}


def _why_unusable(name: str) -> str | None:
    if nfc(name).casefold() in GENERATED_NAMES:
        return "generate.py writes a file of that name beside the folders of the classes"
    if is_passed_over(name):
        return "folders of that name are hidden or the system's own, and passed over"
    if len(os.fsencode(name)) > _LONGEST_NAME:
        return f"it has more than the {_LONGEST_NAME} bytes that file systems take"
    return None


def is_for_linux_alone(name: str) -> bool:
    """Says whether Windows takes no folder of that name, such as one that ends in a dot or holds a colon.

    Such a class goes the whole way here; its images cannot be copied to Windows, or to a disk in a format of Windows.
    """
    return bool(re.search(r'[<>:"\\|?*\x00-\x1f]|[. ]$', name) or re.match(_DEVICES, name, re.IGNORECASE))


_DEVICES = r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\.|$)"


def choose_names(
    asked: Sequence[str], known: Sequence[str], *, setting: str, where: str, number: str = ""
) -> list[str]:
    """Returns the classes that a user names, in the order of `known`.

    A name is taken as it stands, in whichever Unicode form; one that no class has is taken as a pattern, in which *
    stands for any text, ? for one character, and [12] for one of these characters.

    Args:
        asked: names and patterns; `ALL` stands for every class.
        known: the names of the classes.
        setting: the name of the setting, for messages.
        where: what has these classes, for messages.
        number: what stands behind each name, such as =50, for messages.

    Raises:
        UserError: for a name that fits no class, with the nearest one and the list of classes.
    """
    for text in () if tuple(asked) == ALL else asked:
        if not _fitting(text, known):
            raise UserError(_no_such_class(text, known, setting=setting, where=where, number=number))
    return fitting_classes(asked, known)


def fitting_classes(asked: Sequence[str], known: Sequence[str]) -> list[str]:
    """Returns those of the known classes that the names and patterns fit, in the order of `known`."""
    if tuple(asked) == ALL:
        return list(known)
    found = {name for text in asked for name in _fitting(text, known)}
    return [name for name in known if name in found]


def _fitting(text: str, known: Sequence[str]) -> list[str]:
    wanted = nfc(text)
    # The command line takes blanks at the ends of a word away, so that a class with such a name is found without them.
    same = [name for name in known if nfc(name) == wanted] or [name for name in known if nfc(name).strip() == wanted]
    return same or [name for name in known if fnmatch.fnmatchcase(nfc(name), wanted)]


def _no_such_class(text: str, known: Sequence[str], *, setting: str, where: str, number: str) -> str:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    lower = {nfc(name).casefold(): name for name in known}
    near = difflib.get_close_matches(nfc(text).casefold(), lower, n=1)
    if len(parts) > 1 and all(_fitting(part, known) for part in parts):
        guess = f"give the names as separate words: {typed(setting, parts)}; "
    elif near:
        found = lower[near[0]]
        is_plain = show_name(found) == found and not found.startswith("-")
        guess = f"did you mean {found if is_plain else typed(setting, [found + number])}? "
    else:
        guess = ""
    listing = name_list(known, limit=_MOST_CLASSES)
    return f"--{setting}: {where} has no class {show_name(text)}; {guess}it has {listing}"
