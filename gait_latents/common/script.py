"""How a script begins and ends: flags are checked before torch is imported, and every end is an exit code and one line.

A script is a module with `main(argv)`, which calls `run_script`, and a function that does the work. That function
begins with its imports, held by `imports()`. Until `main` begins, the first lines of a script leave Ctrl-C to the
system, which ends the process without a traceback.
"""

import atexit
import gc
import getpass
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

from gait_latents.common import cli, cores, guard, shortage, versions
from gait_latents.common.console import harmless, print_error
from gait_latents.common.errors import (
    DONE,
    SIGNALLED,
    Shortage,
    Stopped,
    Told,
    UserError,
    explain,
    is_told,
    missing_package,
)
from gait_latents.common.process import end_with_torchrun, num_ranks, rank


def run_script(
    settings_class: type,
    argv: Sequence[str] | None,
    description: str | None,
    work: Callable[[Sequence[str] | None], int],
    *,
    reads_images: bool = True,
) -> int:
    """Runs a script, and returns its exit code for every way in which it ends: a user's mistake gives no traceback.

    `--help` and mistakes in the flags are answered before `work` runs, which imports torch and so takes seconds. Where
    torchrun has started several processes, `work` finds the mistakes, so that one process tells them for all.

    Args:
        settings_class: the dataclass of the script's settings.
        argv: the flags; None takes those of this process.
        description: what --help says first.
        work: does what the script is for, given `argv`; returns the exit code.
        reads_images: whether it does, so that holes in the package for that are told of.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # as the first lines of a script have left it
        signal.signal(signal.SIGINT, signal.default_int_handler)
    words = sys.argv[1:] if argv is None else argv
    shortage.offer(field.name for field in fields(settings_class))
    told = False
    try:
        if argv is None:
            begin()
        cores.wait_briefly()
        _check_working_folder()
        asks_for_help = cli.asks_for_help(words)
        if asks_for_help and rank():
            return DONE
        if asks_for_help or num_ranks() == 1:
            cli.read_command_line(settings_class, argv, description=description)
        if reads_images:
            versions.warn_of_holes()
        return work(argv)
    except (Stopped, Told) as end:
        return end.exit_code
    except Exception as error:
        if not is_told(error):
            raise
        told = isinstance(error, Shortage) or shortage.kind_of(error) is not None
        return _fail(*explain(error))
    except KeyboardInterrupt:
        if rank() == 0:
            print_error("\nstopped by Ctrl-C")
        return SIGNALLED + signal.SIGINT
    finally:
        guard.release(told=told)


def begin() -> None:
    """Prepares this process for a script; a script that imports torch at once calls it before. A second call is free.

    Raises:
        OSError: where the limits of this machine allow no second process.
    """
    global _has_begun  # of this process
    if _has_begun:
        return
    _has_begun = True
    _read_names_as_utf8()
    _open_streams()
    _name_the_user()
    end_with_torchrun()
    cores.wait_briefly()
    guard.watch()
    atexit.register(gc.freeze)  # else the end takes a second, in which Python collects all that torch has made


_has_begun = False


def _check_working_folder() -> None:
    """Raises UserError where the folder that this process is in was removed, which would end torch's import."""
    try:
        Path.cwd()
    except OSError as error:
        raise UserError("the working folder is not there any more; change to one that is, such as cd ~") from error


def _read_names_as_utf8() -> None:
    """Starts this program anew in Python's UTF-8 mode where the locale is ASCII and Python was told to keep to it.

    A class called café would have another name in such a process than in any other, and runs store the names.
    """
    if sys.getfilesystemencoding() == "ascii" and Path(sys.argv[0]).is_file():
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])


def _open_streams() -> None:
    """Opens what was closed of stdin, stdout and stderr when this process began, with nothing behind it.

    Otherwise the next file to be opened would get the stream's number, and whatever a library prints would go there.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)  # it gets the lowest number that is free, which is this one
            os.set_inheritable(opened, True)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115  # until the end


def _name_the_user() -> None:
    """Gives a user whom the system knows by number alone a name, which packages ask for to name their folders."""
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["LOGNAME"] = f"user-{os.getuid()}"


@contextmanager
def imports() -> Iterator[None]:
    """Surrounds the imports of a script, which take seconds: Ctrl-C ends them at once and without a traceback.

    Raises:
        UserError: with the command that installs it, when a package is missing or does not fit another.
    """
    is_ours = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )
    if is_ours:  # the system's default ends the process; a package might turn KeyboardInterrupt into another error
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    warnings.filterwarnings("ignore", "Failed to initialize NumPy")  # of torch, where numpy is missing: told below
    try:
        yield
    except ImportError as error:
        if (error.name or "").partition(".")[0] == "gait_latents":
            raise  # a defect of this project, and no missing package
        raise missing_package(error) from error
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        raise UserError(
            f"torch and torchvision do not fit each other ({error}); install both from the same package index, as a "
            "matching pair"
        ) from error
    finally:
        if is_ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _fail(message: object, code: int) -> int:
    """Prints the one line about an error, and returns the exit code."""
    where = f"process {rank()}: " if rank() else ""  # others than rank 0 print only what rank 0 cannot know
    print_error(f"error: {where}{' '.join(harmless(str(message)).split())}")
    return code
