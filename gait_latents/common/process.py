"""This process: its number among those that torchrun started, the signals that ask it to stop, and when it began."""

import os
import signal
import sys
import threading
import time
from types import FrameType
from typing import Any

from gait_latents.common.errors import Stopped, name_signal

PROCESS_START = time.monotonic()  # this module is among the first that a script imports
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def num_ranks() -> int:
    """Returns how many processes torchrun has started for this run; 1 for a process that is alone."""
    return max(1, _number_of("WORLD_SIZE"))


def num_local_ranks() -> int:
    """Returns how many processes of this run are on this machine; all of them where torchrun does not tell."""
    return min(_number_of("LOCAL_WORLD_SIZE") or num_ranks(), num_ranks())


def rank() -> int:
    """Returns the number of this process among those of the run, from 0; only rank 0 prints."""
    return _number_of("RANK") if num_ranks() > 1 else 0


def _number_of(variable: str) -> int:
    text = os.environ.get(variable, "")
    return int(text) if text.isdecimal() else 0


class StopSignals:
    """Within the block, the first Ctrl-C or SIGTERM is only noted in `received`; a second one ends the program.

    The user is told at once that the first one was heard, for the work goes on until it comes to a place to stop.

    Args:
        after: what is still finished, such as "this image".
    """

    def __init__(self, *, after: str = "what is under way") -> None:
        self.received: int | None = None
        self._after = after
        self._previous: dict[int, Any] = {}  # the handlers that were there before the block

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = number
        if rank() == 0:
            _tell_at_once(f"{name_signal(number)}: stopping after {self._after}; a second Ctrl-C ends at once")

    def raise_if_received(self) -> None:
        """Raises Stopped when a signal has come."""
        if self.received is not None:
            raise Stopped(self.received)


def _tell_at_once(line: str) -> None:
    """Prints a line on stderr from within the handler of a signal, which may have come in the midst of a print."""
    text = f"\n{line}\n" if sys.stderr.isatty() else f"{line}\n"  # below the bar that stands in the last line
    try:
        sys.stderr.write(text)
        sys.stderr.flush()
    except RuntimeError:  # Python refuses a print within a print to the same stream; the system does not
        os.write(2, text.encode())
    except OSError:
        return  # a closed terminal is no reason to fail
