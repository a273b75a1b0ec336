"""A writer of JSON whose text is the same for equal values, so that it can be hashed, and a strict reader of JSON."""

import json
import math
from typing import NoReturn


def canonical(value: object) -> str:
    """Writes JSON in which equal values give equal texts, in ASCII, so that any file name can be in it."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


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
