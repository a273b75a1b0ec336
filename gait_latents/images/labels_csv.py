"""labels.csv: the path, the class and the label of each generated image, for programs and for spreadsheets.

A spreadsheet takes a cell that begins with = + - @ for a formula and runs it, and names of classes come from folders of
others. Such a path begins with ./ here, and leads to the same file. Such a name has an apostrophe before it, and so has
one that begins with an apostrophe: a program takes one apostrophe away, and has the name.
"""

import csv
import io
import unicodedata
from collections.abc import Iterable, Mapping, Sequence

_FORMULA = "=+-@"
_APOSTROPHE = "'"


def to_bytes(classes: Sequence[str], names: Mapping[str, Iterable[str]]) -> bytes:
    """Returns labels.csv.

    Args:
        classes: all that the model knows, in the order of their labels.
        names: the files of each class, in their order.
    """
    rows = [("file", "class", "label")]
    for label, name in enumerate(classes):
        for file in names.get(name, ()):
            path = f"{name}/{file}"
            rows.append((f"./{path}" if _may_be_formula(path) else path, _shown(name), str(label)))
    return "".join(map(_line, rows)).encode("utf-8", "surrogateescape")


def _line(row: tuple[str, ...]) -> str:
    """Returns a row as text; where a cell holds a carriage return, all are in quotes, which Python itself forgets."""
    buffer = io.StringIO()
    quoting = csv.QUOTE_ALL if any("\r" in cell for cell in row) else csv.QUOTE_MINIMAL
    csv.writer(buffer, lineterminator="\n", quoting=quoting).writerow(row)
    return buffer.getvalue()


def _shown(name: str) -> str:
    return f"{_APOSTROPHE}{name}" if name.startswith(_APOSTROPHE) or _may_be_formula(name) else name


def _may_be_formula(cell: str) -> bool:
    """Says whether a spreadsheet might see a formula: full-width signs count, and blanks before a sign do not."""
    text = unicodedata.normalize("NFKC", cell)
    start = 0
    while start < len(text) and not (text[start].isprintable() and not text[start].isspace()):
        start += 1
    return text[start : start + 1] in tuple(_FORMULA) or cell[:1] in ("\t", "\r", "\n")
