"""labels.csv: what a spreadsheet takes for a formula is none, and programs find each file and each name."""

import csv
import io

import pytest

from gait_latents.images import labels_csv

SIGNS = ("=", "+", "-", "@", "\t", "\r", "\uff1d", "\uff0b", "\uff0d", "\uff20", "\ufe66")
PLAIN = ("ID_1", "a=b", "步态", "x'", 'say "no"', "a,b", "two\nlines", "a\rb", " x", ".x", "a\udcff", "a;b")
ODD = tuple(f"{sign}1+1" for sign in SIGNS) + (
    "'",
    "'=x",
    "''",
    " =x",
    "\u200b=x",
    "\n=x",
    "\ufeff=x",
    "-rf",
    "\t",
    "@",
)


def table(*names: str) -> list[list[str]]:
    data = labels_csv.to_bytes(names, {name: [f"{name}_000000.png"] for name in names})
    return list(csv.reader(io.StringIO(data.decode("utf-8", "surrogateescape"), newline="")))


@pytest.mark.parametrize("name", (*PLAIN, *ODD))
def test_a_program_finds_the_file_and_the_name_again(name):
    head, (path, shown, label) = table(name)
    assert head == ["file", "class", "label"] and label == "0"
    assert path.removeprefix("./") == f"{name}/{name}_000000.png"
    assert (shown[1:] if shown.startswith("'") else shown) == name


@pytest.mark.parametrize("name", ODD)
def test_no_cell_of_an_odd_name_begins_as_a_formula_does(name):
    for cell in table(name)[1]:
        assert cell.lstrip(" \ufeff\u200b")[0] not in SIGNS and cell[0] not in "\t\r\n", cell


def test_usual_names_stand_as_they_are_and_no_two_names_are_written_alike():
    shown = [row[1] for row in table(*PLAIN, *ODD)[1:]]
    assert shown[: len(PLAIN)] == list(PLAIN) and len(set(shown)) == len(PLAIN) + len(ODD)
    assert labels_csv.to_bytes(["b", "a"], {"a": ["a_0.png"], "b": ["b_0.png", "b_1.png"]}) == (
        b"file,class,label\nb/b_0.png,b,0\nb/b_1.png,b,0\na/a_0.png,a,1\n"
    )
