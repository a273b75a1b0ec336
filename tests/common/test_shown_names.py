"""Names of any origin as they are shown: readable in every script, and with nothing that a terminal would obey."""

import subprocess
import unicodedata

import pytest

from gait_latents.common.console import harmless, shell_word, show_name
from gait_latents.common.pictures import one_line
from gait_latents.vae.weight_files import printable

RANGES = [
    *[(0x00, 0x1F), (0x7F, 0x9F), (0x61C, 0x61C), (0x200B, 0x200F), (0x2028, 0x202E), (0x2060, 0x2069)],
    *[(0xFEFF, 0xFEFF), (0xFFF9, 0xFFFB), (0xE0000, 0xE007F), (0xD800, 0xDFFF), (0x115F, 0x1160), (0x3164, 0x3164)],
]
HARMFUL = [chr(number) for low, high in RANGES for number in range(low, high + 1)]
READABLE = [
    "café",
    unicodedata.normalize("NFD", "café"),
    "行走者_3",
    "مشي سريع",
    "הליכה",
    "नमस्ते",
    "ID_1",
    "a\\b",
    "$x'\"",
]
JOINED = ["👩\u200d🔬", "🧑🏽\u200d🚀", "❤\ufe0f\u200d🔥", "🏳\ufe0f\u200d🌈", "می\u200cخواهم", "क्\u200dष", "র\u200d্য"]
LOST_JOINERS = ["ID\u200d_1", "\u200dx", "x\u200d", "👩\u200d", "\u200c", "abc\u200cdef", "👩\u200c🔬", "مش\u200d"]


def test_every_control_and_direction_character_is_escaped_wherever_names_are_shown():
    for letter in HARMFUL:
        escape = ascii(letter)[1:-1]
        assert harmless(f"ID{letter}1") == (f"ID{escape}1" if letter != "\n" else "ID\n1")
        assert show_name(f"ID{letter}1") == f"'ID{escape}1'"
        assert printable(f"ID{letter}1") == f"ID{escape}1"
        assert one_line(f"ID{letter}1") == (f"ID{escape}1" if letter != "\n" else "ID 1")


@pytest.mark.parametrize("name", [*READABLE, *JOINED])
def test_names_of_every_script_and_emoji_stay_readable(name):
    assert show_name(name) == harmless(name) == one_line(name) == name


@pytest.mark.parametrize("name", LOST_JOINERS)
def test_a_joiner_that_joins_nothing_is_told_from_no_joiner(name):
    shown = harmless(name)
    assert shown != name and shown.isascii() == name.replace("\u200d", "").replace("\u200c", "").isascii()
    assert "\\u200d" in shown or "\\u200c" in shown


def test_a_backslash_of_a_name_is_told_from_an_escape():
    assert show_name("a\\n") == "a\\n"
    assert show_name("a\\n\n") == "'a\\\\n\\n'"


@pytest.mark.parametrize(
    "name",
    ["-rf", "a b", "it's", "\x1b[31m3", "\u202eabc", "a\udcff1", "\x85", "\U000e0041b", "\\'\n$(x)", "*", "", "é"],
)
def test_a_word_for_the_shell_is_shown_and_is_taken_for_the_name(name):
    word = shell_word(name)
    assert harmless(word, one_line=True) == word
    got = subprocess.run(
        ["bash", "-c", f"printf %s {word}"], capture_output=True, check=True, env={"LC_ALL": "C.UTF-8"}
    )
    assert got.stdout.decode("utf-8", "surrogateescape") == name
