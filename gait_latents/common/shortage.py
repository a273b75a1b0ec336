"""What a small machine runs out of: which errors say so, and the line with the remedy.

Such an error says nothing about the file that was being read when it came: no image is damaged because memory was
short. Only errors that can have no other reason count; each other one is a defect, and keeps its traceback.
"""

import ctypes
import errno
import re
from collections.abc import Iterable
from concurrent.futures import BrokenExecutor

from gait_latents.common import limits

MEMORY, THREADS, FILES, STACK, HELPER, GPU = "memory", "threads", "files", "stack", "helper", "gpu"
LITTLE_ON_GPU = "the GPU has too little memory; end what else uses it, or give --device cpu"

_BY_NUMBER = {
    errno.ENOMEM: MEMORY,
    errno.EAGAIN: THREADS,  # of a fork; a file of ours never answers so
    errno.EMFILE: FILES,
    errno.ENFILE: FILES,
}
# What libraries say: of torch's allocators and its mapped files, of C++, of threads, and of the loader.
_BY_TEXT = (
    (RuntimeError, re.compile(r"DefaultCPUAllocator: (can't allocate|not enough) memory"), MEMORY),
    (RuntimeError, re.compile(r"^(std::bad_alloc|bad allocation)$"), MEMORY),
    (RuntimeError, re.compile(r"^unable to mmap .*Cannot allocate memory \(12\)", re.S), MEMORY),
    (RuntimeError, re.compile(r"^can't start new thread$|^Resource temporarily unavailable$"), THREADS),
    (
        (ImportError, OSError),
        re.compile(r"failed to map segment from shared object|cannot map zero-fill pages"),
        MEMORY,
    ),
    ((ImportError, OSError), re.compile(r"\.so[.\d]*: [^:]*: Cannot allocate memory"), MEMORY),
    ((ImportError, OSError), re.compile(r"\.so[.\d]*: [^:]*: Too many open files"), FILES),
)
# These have other reasons, too, and count only where memory is short as it comes.
_IF_SHORT = (
    (RuntimeError, re.compile(r"^could not (create|execute) a primitive$"), MEMORY),
    (ImportError, re.compile(r"cannot allocate memory in static TLS block"), MEMORY),
    # Python's own words where it had no memory to make a MemoryError.
    (SystemError, re.compile(r"error return without exception set|without setting an exception"), MEMORY),
)
_SHORT_BYTES = 1 << 28
_LIBC = ctypes.CDLL(None)
_LIBC.malloc.restype, _LIBC.malloc.argtypes, _LIBC.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
_LONGEST_CHAIN = 8  # of causes; one may be its own
# Settings that memory grows with, the one that helps most first.
_SMALLER = ("train_batch_size", "encode_batch_size", "image_size", "dim", "width", "classifier_image_size")
_offered: tuple[str, ...] = ()


def offer(names: Iterable[str]) -> None:
    """Notes the settings of the script that runs, so that a remedy names flags that it has."""
    global _offered  # of the script, of which a process runs one
    known = set(names)
    _offered = tuple(name for name in _SMALLER if name in known)[:3]


def kind_of(error: BaseException | None) -> str | None:
    """Returns what has run out, such as MEMORY, when an error says so; None for every other error."""
    for _ in range(_LONGEST_CHAIN):
        found = None if error is None else _kind_of_one(error)
        if error is None or found is not None:
            return found
        error = error.__cause__  # numpy wraps the error of the loader, and others do so with theirs
    return None


def _kind_of_one(error: BaseException) -> str | None:
    if isinstance(error, MemoryError):
        return MEMORY
    if isinstance(error, BrokenExecutor):
        return HELPER
    if isinstance(error, OSError) and error.errno is not None:
        return _BY_NUMBER.get(error.errno)
    if type(error).__name__ == "OutOfMemoryError" and type(error).__module__.startswith("torch"):
        return GPU
    text = str(error)
    for classes, pattern, kind in _BY_TEXT:
        if isinstance(error, classes) and pattern.search(text):
            return kind
    for classes, pattern, kind in _IF_SHORT:
        if isinstance(error, classes) and pattern.search(text) and not has_room(_SHORT_BYTES):
            return kind
    return None


def who_lacks_memory(kind: str | None) -> str:
    """Names what has too little memory, GPU or MEMORY by its kind."""
    return "the GPU" if kind == GPU else "this machine"


def has_room(num_bytes: int) -> bool:
    """Says whether so much memory may be taken just now; none of it is touched."""
    place = _LIBC.malloc(num_bytes)  # which Python's own objects would fill
    _LIBC.free(place)
    return place is not None and limits.free_on_machine() >= num_bytes


def describe(kind: str, *, found: str = "") -> str:
    """Returns the line about what has run out: the limit, where one is known, and what to do.

    Args:
        found: what else is known of how the program ended.
    """
    if kind == GPU:
        return LITTLE_ON_GPU
    try:
        if kind == THREADS and limits.is_memory_for_threads_short():
            kind = MEMORY
        what, remedy = _LINES[kind]()
    except (MemoryError, OSError):  # there is not even enough left to look at the limits
        what, remedy = _SHORTEST
    facts = f" ({found})" if found else ""
    return f"{what}{facts}: {remedy}; what was saved is whole, and the same command goes on from there"


def _memory() -> tuple[str, str]:
    limit = limits.smallest_memory_limit()
    what, more = _SHORTEST
    if limit is not None:
        who = "this container" if limit.by == "the container" else "this process"
        what = f"{who} may take {_size(limit.num_bytes)} of memory, and that is too little"
        more = "give the container more" if limit.by == "the container" else f"raise {limit.by}"
    smaller = " or ".join(f"--{name}" for name in _offered)
    return what, f"{more}; or give a smaller {smaller}" if smaller else more


def _threads() -> tuple[str, str]:
    limit = limits.thread_limit()
    known = f" ({limit[0]:,} by {limit[1]})" if limit else ""
    by = limit[1] if limit else "the limit"
    raise_it = "give the container more" if by == "the container" else f"raise {by}"
    return f"no more threads or processes can be started{known}", f"{raise_it}, or set OMP_NUM_THREADS=1"


def _files() -> tuple[str, str]:
    limit = limits.file_limit()
    known = f" ({limit:,} by ulimit -n)" if limit else ""
    return f"no more files can be opened{known}", "raise it with ulimit -n 1024"


def _helper() -> tuple[str, str]:
    return "a process that helped this one was ended from outside, as a system does when memory runs out", _memory()[1]


def _stack() -> tuple[str, str]:
    return "the stack of a thread is too small, as ulimit -s sets it", "raise it with ulimit -s 8192"


_SHORTEST = "this machine has too little memory", "end other programs, or take a machine with more"
_LINES = {MEMORY: _memory, THREADS: _threads, FILES: _files, STACK: _stack, HELPER: _helper}


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.0f} MB"
