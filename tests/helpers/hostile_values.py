"""Values that no document of ours holds, and every place of a document where one of them can be put."""

import copy
from collections.abc import Iterator
from typing import Any


def nested(depth: int) -> list[Any]:
    """Returns lists inside one another."""
    found: list[Any] = []
    for _ in range(depth):
        found = [found]
    return found


VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 2**63, 10**400, -(10**400)),
    *(0.5, -0.0, 5e-324, 1e300, -1e300, 1e29, float("nan"), float("inf"), float("-inf")),
    *("", "x", "7", "\0", "\x1b[2J", "\u202e", "\ud800", "9" * 5000, "../../etc/passwd", "closest_pairs.png"),
    *([], [[]], [None], [0], ["x"] * 1000, [[1, 2], [3]], [{}], nested(50), nested(400)),
    *({}, {"": {}}, {"a": {"a": {"a": 1}}}, {"x": None}, {"digest": []}),
]

Place = tuple[str | int, ...]


def places(document: Any, above: Place = ()) -> Iterator[Place]:
    """Yields where each node and leaf of a document is, but for the document itself."""
    inside = document.items() if isinstance(document, dict) else enumerate(document)
    for name, inner in inside:
        yield (*above, name)
        if isinstance(inner, dict | list):
            yield from places(inner, (*above, name))


def replaced(document: Any, place: Place, value: Any) -> Any:
    """Returns a copy of a document with another value in one place."""
    changed = copy.deepcopy(document)
    inner = changed
    for name in place[:-1]:
        inner = inner[name]
    inner[place[-1]] = value
    return changed


def without(document: Any, place: Place) -> Any:
    """Returns a copy of a document that lacks what was in one place."""
    changed = copy.deepcopy(document)
    inner = changed
    for name in place[:-1]:
        inner = inner[name]
    del inner[place[-1]]
    return changed
