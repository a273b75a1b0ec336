"""JSON that is the same text for the same value, so that it can be hashed, a reader that refuses the rest, and
the header of a safetensors file, which is JSON too.
"""

import json
import math
from collections.abc import Iterable
from typing import Any, NoReturn


def canonical(value: object) -> str:
    """Writes JSON in which equal values give equal texts, in ASCII, so that any file name can be in it."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def safetensors_header(text: str) -> bytes:
    """Returns how a safetensors file begins: the length of its header in 8 bytes, then the header, a multiple of 8.

    Args:
        text: the header as JSON: {tensor name: {"dtype", "shape", "data_offsets"}}, and texts under "__metadata__".
    """
    header = text.encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header


_DEEPEST = 20  # dicts and lists inside one another; a report has half as many


def is_deep(value: object) -> bool:
    """Says whether dicts and lists lie deeper in one another than in any document of ours: who walks in may be lost."""
    layer = [value]
    for _ in range(_DEEPEST):
        layer = [inner for one in layer if isinstance(one, dict | list) for inner in _inside(one)]
    return bool(layer)


def _inside(value: dict[str, Any] | list[Any]) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value


def parse(text: bytes | str) -> object:
    """Parses JSON from an untrusted file; raises ValueError for nonsense, repeated names and NaN."""

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        names = dict(pairs)
        if len(names) != len(pairs):
            raise ValueError("a name occurs twice")
        return names

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is not a number")

    def finite(number: str) -> float:
        return float(number) if math.isfinite(float(number)) else refuse(number)

    try:
        return json.loads(text, object_pairs_hook=unique, parse_constant=refuse, parse_float=finite)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
