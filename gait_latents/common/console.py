"""What the scripts print: log lines, warnings, progress bars, and numbers with their units."""

import os
import re
import shlex
import shutil
import sys
import time
import unicodedata
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO, TypeVar

from gait_latents.common.errors import missing_package
from gait_latents.common.process import rank

Item = TypeVar("Item")

_KERNEL_MARK = "JPY_PARENT_PID"  # Jupyter sets it for its kernels, and so for the commands in their cells
# In a log, a line of progress comes when this much time has passed and this share of the work was done since the last.
LOG_SECONDS, _LOG_SHARE = 60.0, 0.1
_SLOW_SECONDS = 2.0  # of silence that need a word


def print_error(text: str) -> None:
    """Prints on stderr, if it is open; a closed terminal or a full disk below the log is no reason to fail."""
    if _is_open(sys.stderr):
        with suppress(OSError):
            print(_as_shown(harmless(text), sys.stderr), file=sys.stderr, flush=True)


def _is_open(stream: TextIO | None) -> bool:
    """Says whether a stream takes text: Python has None for one that was closed when it started."""
    return stream is not None and not getattr(stream, "closed", False)


def _as_shown(text: str, stream: TextIO) -> str:
    """Escapes what a stream cannot show."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


# What a terminal or a browser may obey or not show at all: control characters, marks that turn the direction of what
# follows, tags, surrogates (which stand for bytes that are no text), what no font has; and letters without a picture.
_HARMFUL = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})  # categories of Unicode
_BLANK_LETTERS = "\u034f\u115f\u1160\u17b4\u17b5\u3164\uffa0"
_JOINER, _NON_JOINER = "\u200d", "\u200c"
_PLAIN = re.compile(r"[^ -~]")  # none of these is harmful


def harmless(text: str, *, one_line: bool = False) -> str:
    """Escapes what a terminal would obey or would not show: names may come from a file that somebody else wrote.

    Letters and signs of every script stay as they are. So do the two joiners of Unicode where they do their work, in
    emoji and in words of scripts such as Persian or Hindi, which would be garbled without them; anywhere else they are
    invisible, and could make two names look like one.

    Args:
        one_line: escape line breaks and unusual blanks, too.
    """
    if text.isascii() and text.isprintable():
        return text
    return _PLAIN.sub(lambda found: _escaped_if_harmful(found, one_line=one_line), text)


def _escaped_if_harmful(found: re.Match[str], *, one_line: bool) -> str:
    letter = found[0]
    if letter in (_JOINER, _NON_JOINER) and _has_work(found):
        return letter
    if one_line and not letter.isprintable():
        return ascii(letter)[1:-1]
    is_harmful = unicodedata.category(letter) in _HARMFUL or letter in _BLANK_LETTERS
    return ascii(letter)[1:-1] if is_harmful and letter != "\n" else letter


def _has_work(found: re.Match[str]) -> bool:
    """Says whether a joiner stands between signs that it shapes: emoji, letters of Arabic script, Indic consonants."""
    before, after = found.string[: found.start()][-1:], found.string[found.end() :][:1]
    if not before or not after:
        return False
    if _VIRAMA in (unicodedata.combining(before), unicodedata.combining(after)):
        return True
    if unicodedata.bidirectional(after) == "AL":
        return unicodedata.bidirectional(before) in ("AL", "NSM")
    is_emoji = unicodedata.category(before) in ("So", "Sk") or before == "\ufe0f"
    return found[0] == _JOINER and is_emoji and unicodedata.category(after) == "So"


_VIRAMA = 9  # the combining class of the signs that join Indic consonants


def _tqdm() -> Any:
    """Returns tqdm's class, imported when the first line is printed: --help does without it.

    Raises:
        UserError: with the command that installs it, when it is missing.
    """
    try:
        from tqdm import TqdmMonitorWarning
        from tqdm.auto import tqdm
    except ImportError as error:
        raise missing_package(error) from error
    warnings.filterwarnings("ignore", category=TqdmMonitorWarning)  # where no thread can be started for it
    return tqdm


def say(text: str = "") -> None:
    """Prints one line for the user, above any progress bar; what the output cannot show is escaped. Only on rank 0."""
    if rank() or not _is_open(sys.stdout):
        return
    with suppress(OSError):  # a closed terminal, or a full disk below the log, does not end the work
        _tqdm().write(_as_shown(harmless(text), sys.stdout), file=sys.stdout)
        sys.stdout.flush()


def warn(text: str) -> None:
    """Prints one line that begins with "warning:" on stderr. Only rank 0 prints."""
    if rank() or not _is_open(sys.stderr):
        return
    with suppress(OSError):
        _tqdm().write(_as_shown(f"warning: {harmless(text)}", sys.stderr), file=sys.stderr)


class Progress:
    """A bar on a terminal; where output is kept (a log, a notebook), a plain line now and then and one at the end."""

    def __init__(
        self,
        *,
        total: int,
        unit: str,
        label: str,
        initial: int = 0,
        only_if_slow: bool = False,
        first_is_slow: bool = False,
    ) -> None:
        self.total, self.unit, self.label = total, unit, harmless(label, one_line=True)
        self.first_is_slow = first_is_slow
        self.is_quiet = rank() != 0
        self.is_log = self.is_quiet or not _is_live(sys.stderr)
        self.only_if_slow, self.has_printed = only_if_slow, False
        # A bar that is not drawn still counts, so that both forms show the same numbers.
        self.bar = _tqdm()(
            total=total,
            unit=f" {unit}",
            desc=self.label,
            initial=initial,
            file=_Nowhere() if self.is_log else sys.stderr,
            dynamic_ncols=not self.is_log,
            smoothing=0.1,
            delay=_SLOW_SECONDS if only_if_slow else 0,
            leave=not only_if_slow,
        )
        self.last_time, self.last_count = time.monotonic(), initial  # when the last line was printed

    def advance(self, count: int = 1, **figures: str) -> None:
        """Moves on by `count`; `figures` are shown behind the bar."""
        if figures:
            self.bar.set_postfix({name: harmless(figure) for name, figure in figures.items()}, refresh=False)
        self.bar.update(count)
        is_time = time.monotonic() - self.last_time >= LOG_SECONDS
        is_shown = not self.only_if_slow or self.bar.format_dict["elapsed"] >= _SLOW_SECONDS
        is_due = is_shown and is_time and self.bar.n - self.last_count >= max(1, _LOG_SHARE * self.total)
        if self.is_log and (is_due or (count and not self.has_printed and self._takes_long())):
            self._print_line()

    def counted(self, item: Item) -> Item:
        """Moves on by one, and returns the item."""
        self.advance()
        return item

    def _takes_long(self) -> bool:
        """Says whether, at the pace so far, a line is a long time away: the first image then gets a line of its own."""
        elapsed, done = self.bar.format_dict["elapsed"], self.bar.n - self.bar.initial
        return bool(done) and elapsed >= _SLOW_SECONDS and elapsed / done * (self.total - self.bar.n) >= LOG_SECONDS

    def close(self) -> None:
        """Ends the bar."""
        is_worth_it = self.has_printed or not self.only_if_slow
        if self.is_log and is_worth_it and self.bar.n > self.last_count:
            self._print_line(is_last=True)
        self.bar.close()

    def _print_line(self, *, is_last: bool = False) -> None:
        if self.is_quiet:
            return
        facts, done = self.bar.format_dict, self.bar.n
        parts = [f"{self.label}: {done:,} of {self.total:,} {self.unit} ({done / self.total:.0%})"]
        parts[0] += f" after {duration(facts['elapsed'])}"
        is_slow_start = self.first_is_slow and done - facts["initial"] <= 1
        if done < self.total and not is_last and not is_slow_start:
            pace = facts["rate"] or (done - facts["initial"]) / facts["elapsed"]
            parts.append(f"about {duration((self.total - done) / pace)} to go")
        if facts["postfix"]:
            parts.append(facts["postfix"])
        print_error(", ".join(parts))
        self.last_time, self.last_count, self.has_printed = time.monotonic(), done, True


def _is_live(stream: TextIO | None) -> bool:
    """Says whether a bar can be drawn on a stream, each time over the last.

    A command in a notebook's cell has a terminal, too, but all that is drawn on it ends up in the saved notebook.
    """
    return stream is not None and _is_open(stream) and stream.isatty() and _KERNEL_MARK not in os.environ


class _Nowhere:
    """A file for a bar that only counts."""

    def write(self, _text: str) -> None:
        """Drops the text."""

    def flush(self) -> None:
        """Has nothing to flush."""


@contextmanager
def progress(
    *,
    total: int,
    unit: str,
    label: str,
    initial: int = 0,
    only_if_slow: bool = False,
    first_is_slow: bool = False,
) -> Iterator[Progress]:
    """Shows progress over a block, and ends the bar on every way out.

    Args:
        total: how many there are of `unit`, such as "images".
        label: what is done to them.
        initial: how many of them are done.
        only_if_slow: show nothing where it is done in two seconds.
        first_is_slow: the first one says nothing of the pace, as where the first step compiles a network.
    """
    bar = Progress(
        total=total, unit=unit, label=label, initial=initial, only_if_slow=only_if_slow, first_is_slow=first_is_slow
    )
    try:
        yield bar
    finally:
        bar.close()


def duration(seconds: float) -> str:
    """Writes a time as 42 s, 3 min 20 s or 4 h 05 min."""
    if seconds < 59.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def python_word() -> str:
    """Returns how to start this Python: "python", or its path where its virtual environment is not activated."""
    found, own = shutil.which("python"), Path(sys.executable)
    if sys.prefix == sys.base_prefix or (found and Path(found).parent == own.parent):
        return "python"
    return shell_word(str(own.relative_to(Path.cwd()) if own.is_relative_to(Path.cwd()) else own))


def size(count: float) -> str:
    """Writes a number of bytes as 512 B, 25.4 MB or 1.2 GB."""
    for unit in ("B", "kB", "MB"):
        if count < 999.95:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def tell(num_bytes: float, what: str, folder: Path, *, remedy: str) -> None:
    """Prints about how much `what` will take in `folder` and how much is free there; warns where that is too little.

    Args:
        num_bytes: an estimate; where it is 0, nothing is printed.
        what: what is written, with its number, such as "75 saves".
        folder: need not exist yet.
        remedy: what the user may do besides making room.
    """
    if num_bytes <= 0:
        return
    try:
        free = free_bytes(folder)
    except OSError as error:  # no reason to fail: if writing is impossible too, the write says so
        say(f"disk: about {size(num_bytes)} for {what}; what is free on {folder} is not known ({error.strerror})")
        return
    if num_bytes < free:
        say(f"disk: about {size(num_bytes)} for {what}; {size(free)} free on {folder}")
    else:
        warn(
            f"disk: about {size(num_bytes)} for {what} will not fit on {folder}, where {size(free)} are free; "
            f"make room, or {remedy}"
        )


def free_bytes(folder: Path) -> int:
    """Returns how much this user can still write where a folder is, or would be made."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def show_name(name: str | os.PathLike[str]) -> str:
    """Returns a name for a message of one line: quoted and escaped where `harmless` finds something in it."""
    text = str(name)
    if harmless(text, one_line=True) == text:
        return text
    return f"'{harmless(text.replace(chr(92), 2 * chr(92)), one_line=True)}'"


def shell_word(text: str) -> str:
    """Returns a word as it can be typed into bash: as it stands, quoted, or with escapes where it cannot be shown."""
    if harmless(text, one_line=True) == text:
        return shlex.quote(text)
    plain = text.replace("\\", "\\\\").replace("'", "\\'")
    return (
        "$'" + "".join(letter if harmless(letter, one_line=True) == letter else _bash(letter) for letter in plain) + "'"
    )


def _bash(letter: str) -> str:
    """Returns a character as bash takes it in $'...'."""
    number = ord(letter)
    if 0xDC80 <= number <= 0xDCFF:  # which stands for a byte that is no text
        return f"\\x{number - 0xDC00:02x}"
    return f"\\x{number:02x}" if number < 0x80 else f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"
