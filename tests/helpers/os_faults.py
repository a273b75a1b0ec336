"""Ways to harm storage: file-system calls that fail or kill, children that may be killed, files that are damaged."""

import ctypes
import errno
import faulthandler
import io
import os
import select
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import tqdm
import tqdm.auto

CALLS = ("open", "write", "fsync", "fstat", "close", "rename", "unlink", "mkdir")
SECONDS = 600  # many times what any child takes; one that is not done by then shows where, and dies
ERRORS = (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EINTR)
BARS = (tqdm.tqdm, tqdm.auto.tqdm)  # the lock is that of the class that was used first

Fault = Callable[[str, Callable, tuple], object]
Tell = Callable[[str], object]  # gives one line to the parent of a child


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
        faulthandler.register(signal.SIGALRM, file=2, chain=True)
        signal.alarm(SECONDS)
        for bars in BARS:  # the lock of before is shared with all children: a kill would leave it locked
            bars.set_lock(threading.RLock())
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(code)


def wait_for(process: int) -> int:
    """Waits for a forked child and returns its exit code."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def dead_process() -> int:
    """Returns the id of a process that has ended."""
    process = fork(lambda: None)
    wait_for(process)
    return process


class Child:
    """A forked child that tells lines to its parent, which stay told whatever then becomes of it."""

    def __init__(self, work: Callable[[Tell], object]) -> None:
        self._pipe, end = os.pipe()
        write = os.write  # that of now, which no fault takes the place of later

        def tell(line: str) -> None:
            write(end, f"{line}\n".encode())  # whole: shorter than what a pipe takes at once

        self.process = fork(lambda: work(tell))
        os.close(end)

    def end(self, *, kill_after: float | None = None) -> tuple[int, list[str]]:
        """Waits for its end, or kills it after so many seconds; returns its exit code and the lines told."""
        limit = None if kill_after is None else time.monotonic() + kill_after
        data = bytearray()
        while select.select([self._pipe], [], [], limit and max(0.0, limit - time.monotonic()))[0]:
            some = os.read(self._pipe, 1 << 16)
            if not some:
                break
            data += some
        else:
            os.kill(self.process, signal.SIGKILL)
        code = wait_for(self.process)
        while some := os.read(self._pipe, 1 << 16):  # told between the last look and the kill
            data += some
        os.close(self._pipe)
        return code, data.decode().splitlines()


def said(command: Callable[[], int]) -> tuple[int, str]:
    """Runs one of our commands and returns its exit code and all that it printed."""
    output = io.StringIO()
    with redirect_stdout(output), redirect_stderr(output):
        code = command()
    return code, output.getvalue()


@contextmanager
def nothing_synced() -> Iterator[None]:
    """Makes fsync return at once, for tests of kills and errors: only a power cut can tell the difference."""
    with mock.patch.object(os, "fsync", lambda descriptor: None):
        yield


@dataclass
class Tally:
    """What a check has seen: how many cases, and in how many something was lost or wrong."""

    cases: int = 0
    lost: int = 0
    wrong: int = 0

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(self.cases + other.cases, self.lost + other.lost, self.wrong + other.wrong)


class MayNotMount(OSError):
    """This system lets nobody mount anything."""


def own_mounts() -> None:
    """Gives this process, which should be a forked child, mounts of its own; raises MayNotMount."""
    new_mounts, new_users, recursive, private = 0x00020000, 0x10000000, 16384, 1 << 18
    user = os.geteuid()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(new_mounts):
        _checked(libc.unshare(new_mounts | new_users))
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
    mount(None, "/", None, recursive | private)


def mount(source: str | None, folder: str | Path, kind: str | None, flags: int, options: str | None = None) -> None:
    """Mounts `source` on a folder, as mount(2) does; raises MayNotMount."""
    words = [None if word is None else os.fsencode(word) for word in (source, folder, kind, options)]
    libc = ctypes.CDLL(None, use_errno=True)
    _checked(libc.mount(words[0], words[1], words[2], ctypes.c_ulong(flags), words[3]))


def _checked(result: int) -> None:
    if result:
        raise MayNotMount(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def mount_small_disk(folder: Path, num_bytes: int) -> None:
    """Mounts an empty file system of this size on a folder, for this process alone; raises MayNotMount."""
    own_mounts()
    folder.mkdir(exist_ok=True)
    mount("tmpfs", folder, "tmpfs", 0, f"size={num_bytes}")


def resize_small_disk(folder: Path, num_bytes: int) -> None:
    """Gives such a file system another size."""
    remount = 32
    mount("tmpfs", folder, "tmpfs", remount, f"size={num_bytes}")


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
