"""A watch over the process on a small machine: where a library ends it in the midst of C code, one line says why.

Where memory, threads or files run out, most of torch and numpy raise an error, but some parts end the process by
themselves: OpenMP and OpenBLAS without threads, C++ without memory, a thread without a stack. Python can then say
nothing. So, where a limit is tight (`limits.are_tight`), the work is done in a child process, and this one waits for it
and tells what became of it. Nothing changes for whoever started it: signals go on to the child, its exit code is taken
over, and it does not outlive this process.

What libraries print on stderr meanwhile is kept until the end, and dropped where the line about it stands.
"""

import ctypes
import os
import signal
import sys
import threading
from types import TracebackType

from gait_latents.common import errors, limits, process, shortage
from gait_latents.common.console import harmless, print_error

_CRASHES = {signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGKILL, signal.SIGSEGV, signal.SIGSYS}
_HANDED_ON = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGTSTP)
_PR_SET_PDEATHSIG = 1
# What libraries print on stderr before they end the process.
_LAST_WORDS = (
    ("libgomp: Thread creation failed", shortage.THREADS),
    ("pthread_create failed", shortage.THREADS),
    ("std::system_error", shortage.THREADS),
    ("can't start new thread", shortage.THREADS),
    ("bad_alloc", shortage.MEMORY),
    ("memory allocation of", shortage.MEMORY),
    ("out of memory", shortage.MEMORY),
    ("MemoryError", shortage.MEMORY),
    ("Cannot allocate memory", shortage.MEMORY),
    ("Memory allocation still failed", shortage.MEMORY),
    ("Too many open files", shortage.FILES),
)
_real_stderr: int | None = None  # the descriptor, in a child under watch


def watch() -> None:
    """Begins the watch where a limit is tight; call it before torch is imported. Only the child returns from it.

    Raises:
        BlockingIOError or OSError: when there can be no other process.
    """
    threading.excepthook = _end_with_a_thread
    sys.excepthook = _told_or_traced
    if process.num_ranks() > 1 or threading.active_count() > 1 or not limits.are_tight():
        return  # torchrun watches its processes, and rank 0 tells of them
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # each of its threads takes memory that little is computed with
    words = os.memfd_create("stderr")
    parent, blocked = os.getpid(), signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD, *_HANDED_ON])
    child = os.fork()
    if child:
        _wait(child, words)
    os.setpgid(0, 0)  # so that a signal for all comes once, from this one's parent
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(errors.FAILED)
    signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    _keep_words(words)


def _keep_words(words: int) -> None:
    """Lets this process print on stderr as before, and what its libraries print there go to a file."""
    global _real_stderr  # there is one stderr
    sys.stderr.flush()
    _real_stderr = os.dup(2)
    old = sys.stderr
    new = open(_real_stderr, "w", encoding=old.encoding, errors=old.errors, buffering=1, closefd=False)  # noqa: SIM115
    sys.stderr = sys.__stderr__ = new
    os.dup2(words, 2)
    os.close(words)


def release(*, told: bool) -> None:
    """Ends the keeping of what libraries print, at the end of the work.

    Args:
        told: whether the line that was printed says it all.
    """
    global _real_stderr
    if _real_stderr is None:
        return
    kept = b"" if told else _content(2)
    os.ftruncate(2, 0)
    os.dup2(_real_stderr, 2)
    _real_stderr = None
    os.write(2, kept)


def _content(words: int) -> bytes:
    return os.pread(words, 1 << 20, 0)


def _wait(child: int, words: int) -> None:
    """Waits for the child, hands signals on to it, and ends as it did; does not return."""
    status = None
    while status is None:
        found = signal.sigwaitinfo([signal.SIGCHLD, *_HANDED_ON]).si_signo
        if found == signal.SIGTSTP:
            os.kill(child, signal.SIGSTOP)
            os.kill(os.getpid(), signal.SIGSTOP)
            os.kill(child, signal.SIGCONT)
        elif found != signal.SIGCHLD:
            os.kill(child, found)
        ended, status_now = os.waitpid(child, os.WNOHANG)
        status = status_now if ended else None
    number, text = os.WTERMSIG(status), _content(words).decode(errors="replace")
    kind = next((kind for word, kind in _LAST_WORDS if word in text), None)
    if os.WIFEXITED(status) and not (os.WEXITSTATUS(status) and kind):
        _print(text)
        os._exit(os.WEXITSTATUS(status))
    if os.WIFSIGNALED(status) and number not in _CRASHES:  # asked for from outside
        _print(text)
        signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [number])
        os.kill(os.getpid(), number)
    print_error(f"error: {harmless(_tell_end(number if os.WIFSIGNALED(status) else None, kind, text))}")
    os._exit(errors.FAILED)


def _tell_end(number: int | None, kind: str | None, text: str) -> str:
    """Says why the child has ended without a word of its own."""
    if kind is not None:
        return shortage.describe(kind)
    how = f"a library was ended by {signal.Signals(number or 0).name}, as happens where a limit is reached"
    said = " ".join(text.split())[-200:]
    return shortage.describe(shortage.STACK if limits.is_stack_tight() else shortage.MEMORY, found=said or how)


def _print(text: str) -> None:
    if text:
        sys.stderr.write(text)
        sys.stderr.flush()


# --- errors that nobody catches ----------------------------------------------------------------------------


def _told_or_traced(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Prints one line where an error says what is wrong, else its traceback."""
    is_told = isinstance(error, Exception) and errors.is_told(error)
    if is_told:
        print_error(f"error: {harmless(errors.explain(error)[0])}")
    release(told=is_told)
    if not is_told:
        sys.__excepthook__(kind, error, trace)


def _end_with_a_thread(details: threading.ExceptHookArgs) -> None:
    """Ends the program where a thread has no memory even to begin: others would wait for it for ever.

    Whatever is saved is saved whole at any moment, so that nothing is lost.
    """
    error = details.exc_value
    if error is None or shortage.kind_of(error) is None:
        threading.__excepthook__(details)
        return
    print_error(f"error: {harmless(errors.explain(error)[0])}")
    release(told=True)
    os._exit(errors.FAILED)
