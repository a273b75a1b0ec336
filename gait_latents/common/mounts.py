"""Where Kaggle puts what is attached to a notebook, so that a path of one of its layouts is found in another.

Of an input X, a file is at one of

    /kaggle/input/X/...
    /kaggle/input/datasets/OWNER/X/...      (or notebooks, models, d in place of datasets)
    /kaggle/input/competitions/X/...

and which of them depends on what X is and on when the notebook was made. `locate` finds the place in this session, and
`why_missing` says what is attached where there is none.

The environment variable GAIT_LATENTS_KAGGLE_INPUT names a folder that stands in place of /kaggle/input.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from gait_latents.common.console import shell_word, show_name

ROOT_VARIABLE = "GAIT_LATENTS_KAGGLE_INPUT"
_ROOT = "/kaggle/input"
_OWNED = ("datasets", "notebooks", "models", "d")  # folders that hold a folder for each owner
_COMPETITIONS = "competitions"
_MOST_LISTED = 12  # names in a message


class _Input(NamedTuple):
    """Something attached."""

    name: str
    owner: str | None  # None where the layout tells none
    folder: Path


def root() -> Path:
    """Returns the folder below which the inputs are."""
    return _absolute(os.environ.get(ROOT_VARIABLE) or _ROOT)


def locate(path: str) -> str:
    """Returns where the file or folder of an input is in this session.

    A path of the older layout is looked for below every owner, and one that names an owner in the layouts that tell
    none and below the same owner. What follows the name of the input must be there, too.

    Returns:
        The path as it is where it is there, is of no input, is nowhere, or is in several inputs.
    """
    place = _place(path)
    if place is None:
        return path
    found = [] if place.exists() else _find(place)
    there = found[0] if len(found) == 1 else place
    return path if there == _absolute(path) else str(there)


def why_missing(setting: str, path: str | os.PathLike[str]) -> str | None:
    """Says, of a path of an input that is not there, which inputs have it or what is attached.

    Args:
        setting: the name of the setting that gives the path.
        path: the path, as `locate` has returned it.

    Returns:
        The end of a sentence; None where the path is there, where this machine has no inputs, and where it is of no
        input, but for a relative path to images or a VAE.
    """
    place = _place(os.fspath(path))
    if place is None and setting in _OF_INPUTS and not Path(path).is_absolute() and not os.path.lexists(path):
        return _attached() if _inputs() else None
    if place is None or place.exists() or not root().is_dir():
        return None
    found = _find(place)
    if found:
        return f"it is in {len(found)} inputs: give " + " or ".join(
            f"--{setting} {shell_word(str(one))}" for one in found
        )
    for one, rest in _same_name(place):
        folder = one.folder
        for part in rest:
            if not (folder / part).is_dir():
                break
            folder /= part
        names = [child.name for child in folder.iterdir()]
        return f"{show_name(folder)} has {_listed(names) or 'nothing in it'}"
    return _attached()


_OF_INPUTS = ("data_path", "vae_path")  # what is attached as an input, so that a bare name is one that lacks its place


def _attached() -> str:
    attached = [str(one.folder) for one in _inputs()]
    return f"the inputs attached are {_listed(attached)}" if attached else f"nothing is attached below {root()}"


def _place(path: str) -> Path | None:
    """Returns the absolute path below `root`; None where it is of no input. A folder may stand in place of the root."""
    absolute = _absolute(path)
    if absolute.is_relative_to(_ROOT):
        absolute = root() / absolute.relative_to(_ROOT)
    return absolute if absolute.is_relative_to(root()) and absolute != root() else None


def _absolute(path: str) -> Path:
    """Returns a path from the root on, without following links: the name of an input is what stands in the path."""
    return Path(os.path.normpath(Path(path).absolute()))


def _find(place: Path) -> list[Path]:
    """Returns where in the inputs of the same name the rest of a path is; one place that has two names counts once."""
    found = [one.folder.joinpath(*rest) for one, rest in _same_name(place)]
    different = {os.path.realpath(path): path for path in found if path.exists()}
    return list(different.values())


def _same_name(place: Path) -> Iterator[tuple[_Input, Sequence[str]]]:
    """Yields the inputs that a path may mean, and what follows their name in the path."""
    first, *others = place.relative_to(root()).parts
    readings: list[tuple[str | None, str, Sequence[str]]] = [(None, first, others)]
    if first in _OWNED and len(others) > 1:
        readings.append((others[0], others[1], others[2:]))
    if first == _COMPETITIONS and others:
        readings.append((None, others[0], others[1:]))
    for owner, name, rest in readings:
        for one in _inputs():
            if one.name == name and (owner is None or one.owner in (None, owner)):
                yield one, rest


def _inputs() -> list[_Input]:
    """Lists what is attached, in all layouts, in the order of the names."""
    old = [folder for folder in _folders(root()) if folder.name not in (*_OWNED, _COMPETITIONS)]
    found = [_Input(folder.name, None, folder) for folder in old]
    found += [_Input(folder.name, None, folder) for folder in _folders(root() / _COMPETITIONS)]
    for kind in _OWNED:
        for owner in _folders(root() / kind):
            found += [_Input(folder.name, owner.name, folder) for folder in _folders(owner)]
    return found


def _folders(folder: Path) -> list[Path]:
    """Lists the folders in a folder; none where it is not there or must not be looked into."""
    with suppress(FileNotFoundError, NotADirectoryError, PermissionError):
        return sorted(child for child in folder.iterdir() if child.is_dir())
    return []


def _listed(names: Sequence[str]) -> str:
    rest = f" and {len(names) - _MOST_LISTED} more" if len(names) > _MOST_LISTED else ""
    return ", ".join(show_name(name) for name in sorted(names)[:_MOST_LISTED]) + rest
