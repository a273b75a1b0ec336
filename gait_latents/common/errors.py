"""The exceptions by which a script ends, and its exit codes.

0    done
1    `Failed` or OSError: something outside the settings went wrong
2    `UserError`: a mistake that the user can mend
128 + n    `Stopped`: signal n asked for an end, and what is worth keeping is saved
"""

import signal


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


class Told(Exception):
    """The run has failed, and another of its processes prints why; this one ends with the same exit code in silence."""

    def __init__(self, exit_code: int) -> None:
        super().__init__(exit_code)
        self.exit_code = exit_code


def missing_package(error: ImportError) -> UserError:
    """Returns what to tell when a package is missing or broken: its name and the command that installs it."""
    return UserError(f"{error}; pip install -r requirements.txt")


def explain(error: Exception) -> tuple[str, int]:
    """Returns the sentence and the exit code of a UserError, Failed, OSError or Stopped."""
    if isinstance(error, Stopped):
        return f"stopped by {error}", error.exit_code
    if isinstance(error, OSError):
        return _describe_os_error(error), FAILED
    return str(error), USER_ERROR if isinstance(error, UserError) else FAILED


def _describe_os_error(error: OSError) -> str:
    place = f"{error.filename}: " if error.filename else ""
    return f"{place}{error.strerror or error}"
