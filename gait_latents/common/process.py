"""This process: its number among those that torchrun started, the signals that ask it to stop, and when it began."""

import ctypes
import os
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from types import FrameType
from typing import Any

from gait_latents.common.errors import Stopped, name_signal

PROCESS_START = time.monotonic()  # this module is among the first that a script imports
# SIGHUP comes when the terminal is gone, SIGUSR1 as the warning of a queue, such as SLURM's --signal=USR1.
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
_IGNORED_BY_WISH = (signal.SIGHUP, signal.SIGUSR1)  # where this process was started so, as nohup does
_PARENT = os.getppid()  # as it was when this process began
_DEATH_SIGNAL_OF_PARENT = 1  # PR_SET_PDEATHSIG of prctl(2)


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


def end_with_torchrun() -> None:
    """Lets the system send SIGTERM to this process when the torchrun that has started it ends in whatever way.

    kill -9 leaves torchrun no time to end its processes itself. A process that a shell, a notebook or a queue has
    started goes on without them.
    """
    if _is_of_torchrun():
        with suppress(AttributeError):  # a system without prctl: torchrun is missed when its store is looked into
            ctypes.CDLL(None).prctl(_DEATH_SIGNAL_OF_PARENT, signal.SIGTERM)
        if has_lost_torchrun() or _is_store_of_torchrun_gone():  # before the system was asked
            os.kill(os.getpid(), signal.SIGTERM)


def _is_store_of_torchrun_gone() -> bool:
    """Says whether nobody listens where torchrun has its store, which it opens before it starts a process."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return False
    try:
        socket.create_connection((os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])), timeout=1.0).close()
    except ConnectionRefusedError:
        return True
    except (KeyError, ValueError, OSError):  # joining says what is the matter
        return False
    return False


def has_lost_torchrun(*, within: float = 0.0) -> bool:
    """Says whether the torchrun that has started this process is gone, or goes within so many seconds."""
    until = time.monotonic() + within
    while _is_of_torchrun() and os.getppid() == _PARENT and time.monotonic() < until:
        time.sleep(0.01)
    return _is_of_torchrun() and os.getppid() != _PARENT


def _is_of_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


class StopSignals:
    """Within the block, the first of STOP_SIGNALS is only noted in `received`; a Ctrl-C after it ends the program.

    Another signal after the first one changes nothing: a terminal that goes, a queue and torchrun may send several,
    and what is under way is being saved. The user is told at once that the first one was heard, for the work goes on
    until it comes to a place to stop. SIGHUP and SIGUSR1 stay ignored where they are.

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
                if number not in _IGNORED_BY_WISH or signal.getsignal(number) is not signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if self.received is not None:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return
        self.received = number
        if rank() == 0:
            _tell_at_once(f"{name_signal(number)}: stopping after {self._after}; a second Ctrl-C ends at once")

    def raise_if_received(self) -> None:
        """Raises Stopped when a signal has come."""
        if self.received is not None:
            raise Stopped(self.received)


def _tell_at_once(line: str) -> None:
    """Prints a line on stderr from within the handler of a signal, which may have come in the midst of a print."""
    if sys.stderr is None or sys.stderr.closed:
        return
    text = f"\n{line}\n" if sys.stderr.isatty() else f"{line}\n"  # below the bar that stands in the last line
    with suppress(OSError):  # a closed terminal is no reason to fail
        try:
            sys.stderr.write(text)
            sys.stderr.flush()
        except RuntimeError:  # Python refuses a print within a print to the same stream; the system does not
            os.write(2, text.encode())
