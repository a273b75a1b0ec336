"""Names of classes and images: compared in one Unicode form, put in natural order, and found by what a user types.

The same name can be stored in two ways: macOS writes é as e and an accent (NFD), other systems as one character (NFC).
Names are compared and sorted in NFC, and keep on the disk, in splits and in messages the form that they have.
"""

import difflib
import fnmatch
import re
import shlex
import unicodedata
from collections.abc import Callable, Iterable, Sequence

from gait_latents.common.console import show_name
from gait_latents.common.errors import UserError
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


def choose_names(asked: Sequence[str], known: Sequence[str], *, setting: str, where: str) -> list[str]:
    """Returns the classes that a user names, in the order of `known`.

    A name is taken as it stands, in whichever Unicode form; one that no class has is taken as a pattern, in which *
    stands for any text, ? for one character, and [12] for one of these characters.

    Args:
        asked: names and patterns; `ALL` stands for every class.
        known: the names of the classes.
        setting: the name of the setting, for messages.
        where: what has these classes, for messages.

    Raises:
        UserError: for a name that fits no class, with the nearest one and the list of classes.
    """
    for text in () if tuple(asked) == ALL else asked:
        if not _fitting(text, known):
            raise UserError(_no_such_class(text, known, setting=setting, where=where))
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


def _no_such_class(text: str, known: Sequence[str], *, setting: str, where: str) -> str:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    lower = {nfc(name).casefold(): name for name in known}
    near = difflib.get_close_matches(nfc(text).casefold(), lower, n=1)
    if len(parts) > 1 and all(_fitting(part, known) for part in parts):
        guess = f"give the names as separate words: --{setting} {shlex.join(parts)}; "
    else:
        guess = f"did you mean {show_name(lower[near[0]])}? " if near else ""
    listing = name_list(known, limit=_MOST_CLASSES)
    return f"--{setting}: {where} has no class {show_name(text)}; {guess}it has {listing}"
