"""What the scripts share: exit codes, the one-line error, signals, progress and log lines."""

import atexit
import functools
import gc
import os
import re
import shlex
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import TextIO

from tqdm.auto import tqdm

import config
import durable
from config import UserError

DONE, FAILED, USER_ERROR = 0, 1, 2
SIGNALLED = 128  # to which the number of the signal is added
# Files by which a folder that a script wrote is known: a training run, generated images, an evaluation.
SETTINGS_NAME = "settings.yaml"
RECORD_NAME, LABELS_NAME = "settings.json", "labels.csv"
REPORT_NAME, PAGE_NAME = "report.json", "report.html"
PROCESS_START = time.monotonic()  # this module is among the first that a script imports
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_KERNEL_MARK = "JPY_PARENT_PID"  # Jupyter sets it for its kernels, and so for the commands in their cells
_LOG_SECONDS, _LOG_SHARE = 60.0, 0.1  # least time and least share of the work between progress lines in a log


class Stopped(Exception):
    """A signal asked for an end, and everything worth keeping is saved."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal.Signals(signal_number).name)
        self.exit_code = SIGNALLED + signal_number


class Failed(Exception):
    """The work could not be finished for a reason outside the settings; exit code 1."""


class Told(Exception):
    """The run has failed, and another of its processes says why."""

    def __init__(self, exit_code: int) -> None:
        super().__init__(exit_code)
        self.exit_code = exit_code


def num_ranks() -> int:
    """Returns how many processes torchrun has started for this run; 1 for a process that is alone."""
    return max(1, _number_of("WORLD_SIZE"))


def num_local_ranks() -> int:
    """Returns how many of them are on this machine, as torchrun tells; all, where nothing tells."""
    return min(_number_of("LOCAL_WORLD_SIZE") or num_ranks(), num_ranks())


def rank() -> int:
    """Returns the number of this process among them; rank 0 alone prints."""
    return _number_of("RANK") if num_ranks() > 1 else 0


def _number_of(variable: str) -> int:
    text = os.environ.get(variable, "")
    return int(text) if text.isdecimal() else 0


def command(main: Callable[[Sequence[str] | None], int]) -> Callable[[Sequence[str] | None], int]:
    """Makes `main(argv)` return its exit code for every way in which a script ends, without a traceback."""

    @functools.wraps(main)
    def wrapped(argv: Sequence[str] | None) -> int:
        if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # as it is until here, see `check_command_line`
            signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            return main(argv)
        except (UserError, Failed, OSError) as error:
            return _fail(*explain(error))
        except (Stopped, Told) as end:
            return end.exit_code
        except KeyboardInterrupt:
            return _interrupted()

    return wrapped


def explain(error: Exception) -> tuple[str, int]:
    """Returns the sentence and the exit code of a UserError, Failed, OSError or Stopped."""
    if isinstance(error, Stopped):
        return f"stopped by {error}", error.exit_code
    if isinstance(error, OSError):
        return _describe_os_error(error), FAILED
    return str(error), USER_ERROR if isinstance(error, UserError) else FAILED


def check_command_line(cls: type, description: str | None) -> None:
    """Answers --help and mistakes in the flags at once; a script calls this before it imports torch.

    From then on the imports, too, end in one line when they fail. Ctrl-C ends them without a word.
    """

    @command
    def check(argv: Sequence[str] | None) -> int:
        config.read_command_line(cls, argv, description=description)
        return DONE

    asks_for_help = not {"-h", "--help"}.isdisjoint(sys.argv[1:])
    if asks_for_help and rank():
        sys.exit(DONE)
    code = check(None) if asks_for_help or num_ranks() == 1 else DONE  # else they agree on it, and one tells
    if code != DONE:
        sys.exit(code)
    atexit.register(gc.freeze)  # else Python looks for garbage at its end among all that torch has made, for a second
    sys.excepthook = _explain_import
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # an import may turn KeyboardInterrupt into an error of its own


def _explain_import(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if isinstance(error, UserError):  # from a module that looks at what it is about to import
        sys.exit(_fail(error, USER_ERROR))
    if isinstance(error, ImportError):
        sys.exit(_fail(f"{error}; pip install -r requirements.txt", USER_ERROR))
    if "torchvision::nms" in str(error):
        remedy = "install both from the same package index, as a matching pair"
        sys.exit(_fail(f"torch and torchvision do not fit each other ({error}); {remedy}", USER_ERROR))
    if isinstance(error, KeyboardInterrupt):
        sys.exit(_interrupted())
    sys.__excepthook__(kind, error, trace)


def _interrupted() -> int:
    if rank() == 0:
        _print_error("\nstopped by Ctrl-C")
    return SIGNALLED + signal.SIGINT


def _fail(message: object, code: int) -> int:
    where = f"process {rank()}: " if rank() else ""  # which speaks only of what rank 0 cannot know
    _print_error(f"error: {where}{_harmless(' '.join(str(message).split()))}")
    return code


def _print_error(text: str) -> None:
    with suppress(OSError):
        print(text, file=sys.stderr, flush=True)


_CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]")


def _harmless(text: str) -> str:
    """Escapes what a terminal would obey: names and values may come from a file of somebody else."""
    return _CONTROL.sub(lambda found: ascii(found[0])[1:-1], text)


def _describe_os_error(error: OSError) -> str:
    place = f"{error.filename}: " if error.filename else ""
    return f"{place}{error.strerror or error}"


def check_writable(folder: Path, setting: str, *, by_trying: bool = True) -> None:
    """Raises UserError, naming the setting, when files cannot be made in a folder; it need not exist yet.

    Where it is not found out `by_trying`, which a full disk would fail, it is told from permissions.
    """
    reason = durable.why_not_writable(folder) if by_trying else durable.why_not_permitted(folder)
    if reason is not None:
        raise UserError(f"--{setting} {folder} cannot be written to ({reason}); give another, or mend that one")


def say(text: str = "") -> None:
    """Prints one line for the user, above any progress bar; what the output cannot show is escaped."""
    if rank():
        return
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    with suppress(OSError):  # a closed terminal, or a full disk below the log, does not end the work
        tqdm.write(_harmless(text).encode(encoding, "backslashreplace").decode(encoding), file=sys.stdout)
        sys.stdout.flush()


def warn(text: str) -> None:
    """Prints one line that the user should not miss."""
    if rank():
        return
    with suppress(OSError):
        tqdm.write(f"warning: {_harmless(text)}", file=sys.stderr)


def warn_uncompiled(choice: str, obstacle: str) -> None:
    """Warns that the network trains without the compiler.

    Args:
        choice: the setting: auto or true.
        obstacle: what the compiler failed at.

    Raises:
        Failed: where a compiled network was asked for.
    """
    if choice == "true":
        raise Failed(f"the network cannot be compiled ({obstacle}); give --compile false")
    warn(f"the network cannot be compiled, and trains without ({obstacle})")


class StopSignals:
    """Within the block, the first Ctrl-C or SIGTERM only sets a flag; a second one ends the program at once."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = number

    def raise_if_received(self) -> None:
        """Raises Stopped when a signal has come."""
        if self.received is not None:
            raise Stopped(self.received)


class Progress:
    """A bar on a terminal; in a log, and a notebook's output is one, a plain line now and then and one at the end."""

    def __init__(self, *, total: int, unit: str, label: str, initial: int = 0) -> None:
        self.total, self.unit, self.label = total, unit, label
        self.is_quiet = rank() != 0
        self.is_log = self.is_quiet or not _is_live(sys.stderr)
        # A bar that is not drawn still counts, so that both forms show the same numbers.
        self.bar = tqdm(
            total=total,
            unit=f" {unit}",
            desc=label,
            initial=initial,
            file=_Nowhere() if self.is_log else sys.stderr,
            dynamic_ncols=not self.is_log,
            smoothing=0.1,
        )
        self.last_time, self.last_count = time.monotonic(), initial  # of the last line

    def advance(self, count: int = 1, **figures: str) -> None:
        """Moves on by `count`; `figures` are shown behind the bar."""
        if figures:
            self.bar.set_postfix(figures, refresh=False)
        self.bar.update(count)
        is_time = time.monotonic() - self.last_time >= _LOG_SECONDS
        if self.is_log and is_time and self.bar.n - self.last_count >= max(1, _LOG_SHARE * self.total):
            self._print_line()

    def close(self) -> None:
        """Ends the bar."""
        if self.is_log and self.bar.n > self.last_count:
            self._print_line(is_last=True)
        self.bar.close()

    def _print_line(self, *, is_last: bool = False) -> None:
        if self.is_quiet:
            return
        facts, done = self.bar.format_dict, self.bar.n
        parts = [f"{self.label}: {done:,} of {self.total:,} {self.unit} ({done / self.total:.0%})"]
        parts[0] += f" after {duration(facts['elapsed'])}"
        if done < self.total and not is_last:
            pace = facts["rate"] or (done - facts["initial"]) / facts["elapsed"]
            parts.append(f"about {duration((self.total - done) / pace)} to go")
        if facts["postfix"]:
            parts.append(facts["postfix"])
        _print_error(", ".join(parts))
        self.last_time, self.last_count = time.monotonic(), done


def _is_live(stream: TextIO) -> bool:
    """Says whether a line that was printed can be drawn over.

    A command in a cell has a terminal, too, but all that a bar draws on it ends up in the saved notebook.
    """
    return stream.isatty() and _KERNEL_MARK not in os.environ


class _Nowhere:
    def write(self, _text: str) -> None:
        """Drops the text."""

    def flush(self) -> None:
        """Has nothing to flush."""


@contextmanager
def progress(*, total: int, unit: str, label: str, initial: int = 0) -> Iterator[Progress]:
    """Shows progress over a block, and ends the bar on every way out."""
    bar = Progress(total=total, unit=unit, label=label, initial=initial)
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
    """Returns how a shell here starts this Python: by its path where its virtual environment is not activated."""
    found, own = shutil.which("python"), Path(sys.executable)
    if sys.prefix == sys.base_prefix or (found and Path(found).parent == own.parent):
        return "python"
    return shlex.quote(str(own.relative_to(Path.cwd()) if own.is_relative_to(Path.cwd()) else own))


def size(count: float) -> str:
    """Writes a number of bytes as 512 B, 25.4 MB or 1.2 GB."""
    for unit in ("B", "kB", "MB"):
        if count < 999.95:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
