"""The exceptions by which a script ends, and its exit codes.

0    done
1    `Failed` or OSError: something outside the settings went wrong
2    `UserError`: a mistake that the user can mend
128 + n    `Stopped`: signal n asked for an end, and what is worth keeping is saved
"""

import signal
import sys

from gait_latents.common import shortage


class UserError(Exception):
    """A mistake that its user can mend; a script prints it as one line on stderr and exits with 2."""


DONE, FAILED, USER_ERROR = 0, 1, 2
SIGNALLED = 128  # to which the number of the signal is added


class Stopped(Exception):
    """A signal asked for an end, and everything worth keeping is saved; `str()` names the signal."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(name_signal(signal_number))
        self.exit_code = SIGNALLED + signal_number


def name_signal(number: int) -> str:
    """Names a signal as the user knows it: SIGINT is what Ctrl-C sends."""
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


class Failed(Exception):
    """The work could not be finished for a reason outside the settings; exit code 1."""


class Shortage(Failed):
    """This machine has run out of something, and what was being read when that came is not to blame.

    Args:
        kind: of what, as `shortage.kind_of` names it.
        found: what else is known, for the line about it.
    """

    def __init__(self, kind: str, *, found: str = "") -> None:
        super().__init__(shortage.describe(kind, found=found))
        self.kind = kind


def let_shortage_pass(error: BaseException) -> None:
    """Raises Shortage where an error says that this machine has run out of something, and not what is wrong elsewhere.

    Call it before an error is taken for one of the file, the image or the network at hand.
    """
    kind = error.kind if isinstance(error, Shortage) else shortage.kind_of(error)
    if kind is not None:
        raise Shortage(kind) from error


def make_sure_of_room_for_scipy() -> None:
    """Raises Shortage where memory is too short to load scipy: its OpenBLAS then tries to get some without end.

    Call it before an import that loads scipy, as that of the diffusion library does. Where it is loaded it takes none.
    """
    if "scipy.linalg" not in sys.modules and not shortage.has_room(_ROOM_FOR_SCIPY):
        raise Shortage(shortage.MEMORY)


_ROOM_FOR_SCIPY = 1 << 27  # bytes; it takes three quarters of that


class Told(Exception):
    """The run has failed, and another of its processes prints why; this one ends with the same exit code in silence."""

    def __init__(self, exit_code: int) -> None:
        super().__init__(exit_code)
        self.exit_code = exit_code


def missing_package(error: ImportError) -> UserError:
    """Returns what to tell when a package is missing or broken: its name and the command that installs it.

    Raises:
        Shortage: when it is there, and this machine has run out of memory or file handles while it was loaded.
    """
    let_shortage_pass(error)
    return UserError(f"{error}; pip install -r requirements.txt")


def is_told(error: BaseException) -> bool:
    """Says whether an error is told in one line; any other is a defect, and shows its traceback."""
    return isinstance(error, UserError | Failed | OSError | Stopped) or shortage.kind_of(error) is not None


def explain(error: BaseException) -> tuple[str, int]:
    """Returns the sentence and the exit code of an error that `is_told`."""
    if isinstance(error, Stopped):
        return f"stopped by {error}", error.exit_code
    kind = None if isinstance(error, UserError | Failed) else shortage.kind_of(error)
    if kind is not None:
        place = f"{error.filename}: " if isinstance(error, OSError) and error.filename else ""
        return f"{place}{shortage.describe(kind)}", FAILED
    if isinstance(error, OSError):
        return _describe_os_error(error), FAILED
    return str(error), USER_ERROR if isinstance(error, UserError) else FAILED


def _describe_os_error(error: OSError) -> str:
    place = f"{error.filename}: " if error.filename else ""
    return f"{place}{error.strerror or error}"
