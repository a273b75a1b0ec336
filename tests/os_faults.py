"""Ways to harm storage: file-system calls that fail or kill, children that may be killed, files that are damaged."""

import errno
import os
import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

CALLS = ("open", "write", "fsync", "fstat", "close", "rename", "unlink", "mkdir")
ERRORS = (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EINTR)

Fault = Callable[[str, Callable, tuple], object]


class Calls:
    """The calls seen so far, as (name, file): descriptors are named by the path that they were opened with."""

    def __init__(self) -> None:
        self.log: list[tuple[str, str]] = []
        self.synced_twice: list[str] = []
        self._paths: dict[int, str] = {}
        self._synced: set[int] = set()

    def note(self, name: str, args: tuple, result: object) -> None:
        """Records one call that came back with `result`, None if it failed."""
        target = self._paths.get(args[0], "?") if isinstance(args[0], int) else os.fspath(args[0])
        self.log.append((name, target))
        if name == "open" and isinstance(result, int):
            self._paths[result] = target
            self._synced.discard(result)
        if name == "fsync":
            if args[0] in self._synced:
                self.synced_twice.append(target)
            self._synced.add(args[0])


@contextmanager
def fault_at(index: int | None, fault: Fault | None = None, *, only: tuple[str, ...] = CALLS) -> Iterator[Calls]:
    """Runs `fault(name, real_call, args)` in place of call `index` (from 0; -1: each; None: none) to one of `only`."""
    calls, count = Calls(), 0

    def wrap(name: str) -> Callable:
        real = getattr(os, name)

        def call(*args: object, **kwargs: object) -> object:
            nonlocal count
            is_chosen = name in only and (count == index or index == -1)
            count += name in only
            result = None
            try:
                if is_chosen and fault is not None:
                    result = fault(name, real, args)
                else:
                    result = real(*args, **kwargs)
                return result
            finally:
                calls.note(name, args, result)

        return call

    with ExitStack() as patches:
        for name in CALLS:
            patches.enter_context(mock.patch.object(os, name, wrap(name)))
        yield calls


def raising(number: int) -> Fault:
    """Makes a call fail with this error number; a file is closed all the same."""

    def fault(name: str, real: Callable, args: tuple) -> object:
        if name == "close":
            real(*args)
        raise OSError(number, os.strerror(number))

    return fault


def killing(*, after: bool) -> Fault:
    """Kills the process before or after a call."""

    def fault(name: str, real: Callable, args: tuple) -> object:
        if after:
            real(*args)
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("still alive")

    return fault


def forked(work: Callable[[], object]) -> int:
    """Runs `work` in a forked child and returns its exit code: 0, 1 after an exception, -9 when it was killed."""
    return wait_for(fork(work))


def fork(work: Callable[[], object]) -> int:
    """Starts `work` in a forked child and returns its process id."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer Pythons warn of any fork beside threads
        process = os.fork()
    if process:
        return process
    code = 1
    try:
        work()
        code = 0
    finally:
        os._exit(code)


def wait_for(process: int) -> int:
    """Waits for a forked child and returns its exit code."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def each_flipped_bit(path: Path) -> Iterator[int]:
    """Flips each bit of a file in turn and yields its byte's position; the file is whole again at the end."""
    data = path.read_bytes()
    with path.open("r+b", buffering=0) as file:  # in place, since replacing a file's content can wait for the disk
        for position in range(len(data)):
            for bit in range(8):
                os.pwrite(file.fileno(), bytes([data[position] ^ (1 << bit)]), position)
                yield position
            os.pwrite(file.fileno(), data[position : position + 1], position)


def overwrite(path: Path, content: bytes | bytearray) -> None:
    """Replaces a file by a new one."""
    path.unlink(missing_ok=True)
    path.write_bytes(content)
