"""This process: its number among those that torchrun started, the signals that ask it to stop, and when it began."""

import os
import signal
import threading
import time
from types import FrameType
from typing import Any

from gait_latents.common.errors import Stopped

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
    """Within the block, the first Ctrl-C or SIGTERM is only noted in `received`; a second one ends the program."""

    def __init__(self) -> None:
        self.received: int | None = None
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

    def raise_if_received(self) -> None:
        """Raises Stopped when a signal has come."""
        if self.received is not None:
            raise Stopped(self.received)
