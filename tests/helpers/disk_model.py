"""A model of what a power cut may leave on a disk, and a recorder of the calls that it is fed with.

What was not synced may be there or not: of a file, its new content, its old one, nothing, zeros or a part; of a
folder, each new, renamed or removed name by itself, and of a rename also both names. Real file systems leave fewer
states (ext4 keeps the order of names; a rename is one step there), so that what is sound here is sound on them. What
was synced is there: of a file its content, but not its name; of a folder its names, but not what is in the files.

A disk that lies says that it has synced, and has not: then all that was written since the beginning may be lost. Such
a disk has too many states to look at each, and some are drawn at random.
"""

import itertools
import os
import random
import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

Event = tuple[Any, ...]
State = dict[str, bytes | None]  # path below the root: content, None for a folder


# --- recording ---------------------------------------------------------------------------------------------


class Recorder:
    """The calls that changed something below a folder, in order; `tell` adds what was acknowledged."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.events: list[Event] = []
        self._open: dict[int, str] = {}

    def tell(self, what: str) -> None:
        """Notes that something was acknowledged at this point."""
        self.events.append(("told", what))

    def note(self, name: str, args: tuple, result: Any) -> None:
        """Notes one call that succeeded."""
        if name == "open":
            self._note_open(self._inside(args[0]), args[1], result)
        elif name in ("mkdir", "unlink", "rmdir"):
            self._add(name, self._inside(args[0]))
        elif name == "rename":
            self._add(name, self._inside(args[0]), self._inside(args[1]))
        elif args[0] in self._open and name == "write":
            self._note_write(self._open[args[0]], bytes(args[1][:result]))
        elif args[0] in self._open:
            self.events.append((name, self._open[args[0]]))
            if name == "close":
                del self._open[args[0]]

    def _inside(self, path: str | os.PathLike[str]) -> str | None:
        place = Path(os.path.abspath(path))  # noqa: PTH100
        return str(place.relative_to(self.root)) if place.is_relative_to(self.root) else None

    def _note_open(self, path: str | None, flags: int, descriptor: int) -> None:
        self._open.pop(descriptor, None)
        if path is not None:
            self._open[descriptor] = path
            if flags & os.O_CREAT:
                self._add("create", path, bool(flags & os.O_TRUNC))

    def _note_write(self, path: str, data: bytes) -> None:
        # Writes in a row are one: the model itself leaves parts of them.
        if self.events and self.events[-1][:2] == ("write", path):
            data = self.events.pop()[2] + data
        self.events.append(("write", path, data))

    def _add(self, name: str, *args: Any) -> None:
        if None not in args:
            self.events.append((name, *args))


@contextmanager
def recording(root: Path) -> Iterator[Recorder]:
    """Records what the calls of `os` change below a folder. (fsync itself is left out: nobody cuts the power.)"""
    recorder = Recorder(root)

    def wrap(name: str) -> Any:
        real = getattr(os, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            result = None if name == "fsync" else real(*args, **kwargs)
            recorder.note(name, args, result)
            return result

        return call

    with ExitStack() as patches:
        for name in ("open", "write", "fsync", "close", "rename", "mkdir", "unlink", "rmdir"):
            patches.enter_context(mock.patch.object(os, name, wrap(name)))
        yield recorder


# --- the disk ----------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _File:
    content: bytes = b""
    synced: bytes = b""
    position: int = 0

    def after_a_cut(self) -> set[bytes]:
        """Returns what the file may hold."""
        now, half = self.content, len(self.content) // 2
        if now == self.synced:
            return {now}
        return {now, self.synced, b"", bytes(len(now)), now[:half], now[:half] + bytes(len(now) - half)}


@dataclass(eq=False)
class _Folder:
    names: dict[str, "_File | _Folder"] = field(default_factory=dict)
    synced: dict[str, "_File | _Folder"] = field(default_factory=dict)
    changes: list[Event] = field(default_factory=list)  # since the last sync

    def change(self, *event: Any) -> None:
        self.changes.append(event)
        self.names = _changed(self.names, [event])

    def sync(self) -> None:
        self.synced, self.changes = dict(self.names), []

    def _ways(self) -> list[tuple[Event | None, ...]]:
        """Returns what may have become of each change."""
        return [
            (None, change, ("copy", *change[1:])) if change[0] == "move" else (None, change) for change in self.changes
        ]

    def after_a_cut(self) -> Iterator[dict[str, "_File | _Folder"]]:
        """Yields the names that the folder may have."""
        assert len(self.changes) < 12, "so many unsynced names would take for ever"
        for chosen in itertools.product(*self._ways()):
            yield _changed(self.synced, filter(None, chosen))

    def drawn_after_a_cut(self, draws: random.Random) -> dict[str, "_File | _Folder"]:
        """Draws the names that the folder has."""
        return _changed(self.synced, filter(None, [draws.choice(ways) for ways in self._ways()]))


def _changed(names: dict[str, Any], changes: Iterable[Event]) -> dict[str, Any]:
    names = dict(names)
    for what, name, node, *target in changes:
        if what == "add":
            names[name] = node
        else:
            names.pop(name, None)
        if what in ("move", "copy"):
            names[target[0]] = node
        if what == "copy":
            names[name] = node
    return names


class Disk:
    """A disk under one folder, as it was made by the calls so far; one that lies does nothing on fsync."""

    def __init__(self, root: Path, *, lies: bool = False) -> None:
        self._root, self._lies = _read_folder(root), lies

    def apply(self, event: Event) -> None:
        """Does what one recorded call did."""
        name, path, *rest = event
        if name == "fsync" and self._lies:
            return
        if name in ("write", "fsync"):
            self._change_content(self._find(path), *rest)
        elif name in ("create", "mkdir", "unlink", "rmdir", "rename"):
            self._change_names(self._find(str(Path(path).parent)), name, Path(path).name, *rest)

    def _change_content(self, node: Any, *data: bytes) -> None:
        if isinstance(node, _Folder):
            node.sync()
        elif data:
            end = node.position + len(data[0])
            node.content = node.content[: node.position] + data[0] + node.content[end:]
            node.position = end
        else:
            node.synced = node.content

    def _change_names(self, folder: Any, what: str, name: str, *rest: Any) -> None:
        if what == "create" and name in folder.names:
            folder.names[name].position = 0
            if rest[0]:
                folder.names[name].content = b""
        elif what in ("create", "mkdir"):
            folder.change("add", name, _File() if what == "create" else _Folder())
        elif what == "rename":
            assert Path(rest[0]).parent == self._path(folder), "nothing is moved to another folder here"
            folder.change("move", name, folder.names[name], Path(rest[0]).name)
        else:
            folder.change("remove", name, folder.names[name])

    def _find(self, path: str) -> Any:
        node: Any = self._root
        for part in Path(path).parts:
            node = node.names[part]
        return node

    def _path(self, folder: _Folder) -> Path:
        (path,) = (path for path, node in _walk(self._root) if node is folder)
        return path

    def after_a_cut(self) -> Iterator[State]:
        """Yields each state that the disk may be in when the power fails now."""
        for tree in _trees(self._root):
            files = {path: node for path, node in tree.items() if node is not None}
            for contents in itertools.product(*(sorted(node.after_a_cut()) for node in files.values())):
                yield {**dict.fromkeys(tree), **dict(zip(files, contents, strict=True))}

    def drawn_after_a_cut(self, draws: random.Random) -> State:
        """Draws a state that the disk may be in when the power fails now; each change is there or not by itself."""
        state: State = {}
        waiting = [("", self._root)]
        while waiting:
            place, folder = waiting.pop()
            for name, node in folder.drawn_after_a_cut(draws).items():
                if isinstance(node, _Folder):
                    state[f"{place}{name}"] = None
                    waiting.append((f"{place}{name}/", node))
                else:
                    state[f"{place}{name}"] = draws.choice(sorted(node.after_a_cut()))
        return state


def _read_folder(path: Path) -> _Folder:
    """Reads a folder that lies safely on the disk."""
    folder = _Folder()
    for child in path.iterdir():
        content = child.read_bytes() if child.is_file() else b""
        folder.names[child.name] = _File(content, content) if child.is_file() else _read_folder(child)
    folder.sync()
    return folder


def _walk(folder: _Folder, place: Path = Path()) -> Iterator[tuple[Path, _Folder]]:
    yield place, folder
    for name, node in folder.names.items():
        if isinstance(node, _Folder):
            yield from _walk(node, place / name)


def _trees(folder: _Folder, place: str = "") -> Iterator[dict[str, _File | None]]:
    """Yields the trees that a folder may hold: path to file, or None for a folder."""
    for names in folder.after_a_cut():
        files = {f"{place}{name}": node for name, node in names.items() if isinstance(node, _File)}
        folders = {f"{place}{name}": node for name, node in names.items() if isinstance(node, _Folder)}
        for below in itertools.product(*(list(_trees(node, f"{path}/")) for path, node in folders.items())):
            tree: dict[str, _File | None] = {**files, **dict.fromkeys(folders)}
            for part in below:
                tree |= part
            yield tree


# --- all power cuts ----------------------------------------------------------------------------------------


def power_cuts(before: Path, events: list[Event]) -> Iterator[tuple[State, list[str]]]:
    """Yields each different (state of the disk, what had been told) for a cut after any number of the events.

    Args:
        before: the folder as it was, safely on the disk.
        events: what was recorded.
    """
    disk, told, seen = Disk(before), [], set()
    for event in [("told", ""), *events]:
        if event[0] == "told":
            told = [*told, *filter(None, event[1:])]
        else:
            disk.apply(event)
        for state in disk.after_a_cut():
            key = (len(told), frozenset(state.items()))
            if key not in seen:
                seen.add(key)
                yield state, told


def drawn_power_cuts(before: Path, events: list[Event], *, num_draws: int, seed: int) -> Iterator[State]:
    """Yields different states of a disk that lies, of `num_draws` drawn for a cut after each of the events."""
    disk, draws, seen = Disk(before, lies=True), random.Random(seed), set()
    for event in events:
        if event[0] == "told":
            continue
        disk.apply(event)
        for _ in range(num_draws):
            state = disk.drawn_after_a_cut(draws)
            key = frozenset(state.items())
            if key not in seen:
                seen.add(key)
                yield state


def put_down(state: State, folder: Path) -> Path:
    """Makes a folder that is in this state."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for path in sorted(state):
        content = state[path]
        if content is None:
            (folder / path).mkdir()
        else:
            (folder / path).write_bytes(content)
    return folder
