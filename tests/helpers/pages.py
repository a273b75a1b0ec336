"""Reads README, CONTRIBUTING and the pages in docs/ for the tests: blocks, prose, tables, links and translations."""

import hashlib
import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

import settings_table

ROOT = Path(__file__).parents[2]
# What keeps a record is not held to the names of today.
RECORDS = ("docs/log.md",)
ENGLISH = ("README.md", "CONTRIBUTING.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")))
TRANSLATIONS = {
    "README.zh-CN.md": "README.md",
    **{
        f"docs/zh-CN/{name}.md": f"docs/{name}.md"
        for name in ("kaggle", "images-and-vae", "settings", "troubleshooting")
    },
}
ALL = (*ENGLISH, *TRANSLATIONS)
_MESSAGE_HEADS = ("message", "信息")


class Block(NamedTuple):
    """A fenced block: its tag, such as "bash", and its text."""

    tag: str
    text: str


@cache
def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str, *tags: str) -> list[Block]:
    found = [Block(*match) for match in re.findall(r"^```(.*)\n((?:.*\n)*?)```$", text_of(page), re.MULTILINE)]
    return [block for block in found if not tags or block.tag in tags]


def without_tables_of_settings(text: str) -> str:
    """Returns a page without what settings_table.py writes into it."""
    before, found, rest = text.partition(settings_table.BEGIN)
    return before + rest.partition(settings_table.END)[2] if found else text


def prose(page: str) -> str:
    """Returns a page without its blocks, its tables of settings and its remarks."""
    text = re.sub(r"^```.*\n(?:.*\n)*?```$", "", without_tables_of_settings(text_of(page)), flags=re.MULTILINE)
    return re.sub(r"<!--.*?-->", "", text)


def code_spans(text: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", text)


def headings(page: str) -> list[str]:
    """Returns the headings of a page, with the marks before them."""
    return re.findall(r"^#+ .*$", prose(page), re.MULTILINE)


def anchors(page: str) -> set[str]:
    """Returns the anchors of the headings of a page, as GitHub makes them."""
    texts = [re.sub(r"[^\w\- ]", "", heading.lstrip("# ").lower()) for heading in headings(page)]
    return {text.replace(" ", "-") for text in texts}


def links(page: str) -> list[str]:
    """Returns where the links and pictures of a page lead."""
    return re.findall(r"\]\(([^)\s]+)\)", prose(page))


def tables(page: str) -> list[list[list[str]]]:
    """Returns the tables of a page, each as rows of cells, the head first and the line below it left out."""
    found = []
    for lines in re.findall(r"(?:^\|.*\|\n)+", prose(page), re.MULTILINE):
        rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines.splitlines()]
        found.append([rows[0], *rows[2:]])
    return found


def messages(page: str) -> list[str]:
    """Returns the messages that the tables of a page explain, an ellipsis standing for what varies."""
    rows = [row for table in tables(page) if table[0][0] in _MESSAGE_HEADS for row in table[1:]]
    return [row[0].strip("`") for row in rows]


# --- translations ------------------------------------------------------------------------------------------


def digest(page: str) -> str:
    """Returns the SHA-256 of a page without its tables of settings, whose words are translated one by one."""
    return hashlib.sha256(without_tables_of_settings(text_of(page)).encode()).hexdigest()


def stamp(original: str) -> str:
    """Returns the remark that a translation of this page holds."""
    return f"<!-- translates {original} sha256 {digest(original)} -->"
