"""What this process may take: memory, threads and open files, as the system and the container limit them.

A limit is read from the system each time, which takes microseconds; torch is not needed.
"""

import os
import resource
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")
_NO_LIMIT = 1 << 60  # what is larger stands for no limit
# Below these, a library may run out of something in the midst of its C code, and end the process without a word.
_TIGHT_THREADS, _TIGHT_FILES, _TIGHT_STACK, _TIGHT_CONTAINER = 512, 128, 1 << 20, 2 << 30


@dataclass(frozen=True)
class MemoryLimit:
    """A limit on the memory of this process, or of all in its container.

    Attributes:
        num_bytes: the limit.
        used: bytes of it that are in use.
        by: what sets it, such as "ulimit -v".
    """

    num_bytes: int
    used: int
    by: str

    @property
    def is_own(self) -> bool:
        """Says whether it is of this process alone, and not shared with others."""
        return self.by.startswith("ulimit")

    @property
    def free(self) -> int:
        """Bytes that may still be taken."""
        return max(0, self.num_bytes - self.used)


def memory_limits() -> list[MemoryLimit]:
    """Returns the limits on memory that are set: of the address space, of the data in it, and of the container."""
    page = os.sysconf("SC_PAGE_SIZE")
    sizes = [int(word) * page for word in (_read(Path("/proc/self/statm")) or "").split()]
    found = []
    for kind, place, flag in ((resource.RLIMIT_AS, 0, "-v"), (resource.RLIMIT_DATA, 5, "-d")):
        limit = _soft(kind)
        if limit is not None:
            found.append(MemoryLimit(limit, sizes[place] if len(sizes) > place else 0, f"ulimit {flag}"))
    for folder in _groups("memory"):
        limit = _number(folder / "memory.max", folder / "memory.limit_in_bytes")
        used = _number(folder / "memory.current", folder / "memory.usage_in_bytes") or 0
        if limit is not None:
            found.append(MemoryLimit(limit, max(0, used - _reclaimable(folder)), "the container"))
    return found


def smallest_memory_limit() -> MemoryLimit | None:
    """Returns the limit that leaves the least memory; None where there is no limit."""
    return min(memory_limits(), key=lambda limit: limit.free, default=None)


def free_on_machine() -> int:
    """Returns how many bytes all processes of this machine, or of its container, may still take together."""
    shared = [limit.free for limit in memory_limits() if not limit.is_own]
    return min([_available(), *shared])


def free_bytes(num_processes: int = 1) -> int:
    """Returns how many bytes this process may still take, where so many share what is free on the machine."""
    own = [limit.free for limit in memory_limits() if limit.is_own]
    return min([free_on_machine() // num_processes, *own])


def _available() -> int:
    for line in (_read(Path("/proc/meminfo")) or "").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def thread_limit() -> tuple[int, str] | None:
    """Returns how many threads and processes there may be, and what sets that; None where there is no limit."""
    own = _soft(resource.RLIMIT_NPROC)
    found = [] if own is None else [(own, "ulimit -u")]
    found += [(limit, "the container") for folder in _groups("pids") if (limit := _number(folder / "pids.max"))]
    return min(found, default=None)


def file_limit() -> int | None:
    """Returns how many files this process may have open; None where there is no limit."""
    return _soft(resource.RLIMIT_NOFILE)


def are_tight() -> bool:
    """Says whether a library may run out of memory, threads or files at a place where it can only end the process."""
    ours = memory_limits()
    threads, files = thread_limit(), file_limit()
    return (
        any(limit.is_own or limit.num_bytes < _TIGHT_CONTAINER for limit in ours)
        or (threads is not None and threads[0] < _TIGHT_THREADS)
        or (files is not None and files < _TIGHT_FILES)
        or is_stack_tight()
    )


def is_memory_for_threads_short() -> bool:
    """Says whether a thread that cannot be started lacks the memory for its stack, and not the leave to be."""
    own, threads = [limit for limit in memory_limits() if limit.is_own], thread_limit()
    return bool(own) and (threads is None or threads[0] >= _TIGHT_THREADS)


def is_stack_tight() -> bool:
    """Says whether the stacks of threads are so small that libraries run over their ends."""
    stack = _soft(resource.RLIMIT_STACK)
    return stack is not None and stack < _TIGHT_STACK


def _soft(kind: int) -> int | None:
    limit = resource.getrlimit(kind)[0]
    return None if limit in (resource.RLIM_INFINITY, -1) or limit >= _NO_LIMIT else limit


def _groups(controller: str) -> Iterator[Path]:
    """Yields the folders of the control groups that this process is in and that are within reach, from the inside."""
    for line in (_read(Path("/proc/self/cgroup")) or "").splitlines():
        _, controllers, name = (*line.split(":", 2), "", "")[:3]
        if controllers not in ("", controller):
            continue
        root = _CGROUPS / controllers
        place = root / name.lstrip("/")
        yield from (folder for folder in (place, *place.parents) if folder.is_relative_to(root))


def _number(*places: Path) -> int | None:
    """Returns the number in the first file that has one; None where there is none, or it stands for no limit."""
    for place in places:
        text = (_read(place) or "").strip()
        if text.isdecimal():
            return int(text) if int(text) < _NO_LIMIT else None
    return None


def _reclaimable(folder: Path) -> int:
    """Returns how many bytes of a group hold copies of files, which the system drops when memory is needed."""
    rows = (line.split() for line in (_read(folder / "memory.stat") or "").splitlines())
    found = {row[0]: int(row[1]) for row in rows if len(row) == 2}
    return found.get("total_inactive_file", found.get("inactive_file", 0))


def _read(path: Path) -> str | None:
    try:
        return path.read_text()
    except (OSError, ValueError):  # another system, or a container that does not show it
        return None
