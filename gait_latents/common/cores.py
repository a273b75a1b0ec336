"""Which cores of this machine are free, so that a run on a CPU takes no more threads than it can keep going.

Threads wait for each other several times in a layer. Where another program holds a core, the thread on that core comes
late each time, and all wait for it: two threads beside one busy program are slower than one thread.
"""

import math
import os
import time
from dataclasses import dataclass
from pathlib import Path

_SAMPLE_SECONDS = 0.15
_MOSTLY = 0.7  # a core that is idle for this share of the time is free
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")  # in which users say how many threads they want
_WAIT_VARIABLES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")  # in which they say how threads wait
_TURNS = "10000"  # of waiting awake, some microseconds; then a thread sleeps, and leaves its core to others
_WINDOW_STEPS, _WINDOW_SECONDS = 10, 3.0  # a window is at least so long
_SLOW_RATIO = 1.8  # times its own work
_CROWD = 0.4  # cores that others hold


def wait_briefly() -> None:
    """Lets the threads of torch sleep when they wait longer than a moment; call it before torch is imported.

    Else a thread that waits holds a core that the thread it waits for may need. What is computed stays the same.
    """
    if not any(name in os.environ for name in _WAIT_VARIABLES):
        os.environ["GOMP_SPINCOUNT"] = _TURNS


def threads_are_chosen() -> bool:
    """Says whether the user has said how many threads to use."""
    return any(os.environ.get(name) for name in _THREAD_VARIABLES)


@dataclass(frozen=True)
class CoreTimes:
    """What the cores that this process may use have done since the machine was started.

    Attributes:
        num_cores: how many they are.
        busy: seconds of work of all programs on them, added up.
        idle: seconds in which they had nothing to do, added up.
    """

    num_cores: int
    busy: float
    idle: float


def read_core_times(stat: Path = Path("/proc/stat")) -> CoreTimes | None:
    """Reads what the cores have done; None on a system that does not say."""
    try:
        allowed, tick = os.sched_getaffinity(0), 1 / os.sysconf("SC_CLK_TCK")
        rows = [line.split() for line in stat.read_text().splitlines() if line.startswith("cpu")]
    except (AttributeError, OSError, ValueError):
        return None
    times = [[int(word) for word in row[1:9]] for row in rows if row[0][3:].isdecimal() and int(row[0][3:]) in allowed]
    if not times or any(len(row) < 8 for row in times):
        return None
    idle = sum(row[3] + row[4] for row in times)  # idle, and idle while a disk works
    return CoreTimes(len(times), busy=(sum(map(sum, times)) - idle) * tick, idle=idle * tick)


def num_free_cores() -> int | None:
    """Returns how many cores are free just now, at least 1; None on a system that does not say. Takes 0.15 s."""
    before = read_core_times()
    time.sleep(_SAMPLE_SECONDS)
    after = read_core_times()
    if before is None or after is None or before.num_cores != after.num_cores:
        return None
    idle, busy = after.idle - before.idle, after.busy - before.busy
    share = idle / (idle + busy) if idle + busy > 0 else 1.0
    return max(1, math.floor(min(after.num_cores * share, _quota()) + 1 - _MOSTLY))


def _quota(root: Path = Path("/sys/fs/cgroup")) -> float:
    """Returns how many cores' time the container of this process may use; infinite where there is no limit."""
    for name, *parts in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        try:
            words = [word for part in (name, *parts) for word in (root / part).read_text().split()]
            allowed, period = map(float, words[:2])
        except (OSError, ValueError):  # no such file, or "max" in it
            continue
        if allowed > 0 and period > 0:
            return allowed / period
    return math.inf


class CoreWatch:
    """Watches the steps of a run for other programs that hold the cores which its threads need.

    A step is slow by others' doing when it takes much longer than its own work on the CPU. `report` tells that once.

    Args:
        num_threads: how many threads the steps use.
    """

    def __init__(self, num_threads: int) -> None:
        self.num_threads = num_threads
        self._has_told, self._num_slow = False, 0
        self._begin_window()

    def _begin_window(self) -> None:
        self._ratios: list[float] = []  # of each step: its time over its own work
        self._times, self._started, self._own = read_core_times(), time.monotonic(), time.process_time()

    def begin_step(self) -> None:
        """Notes the time at which a step begins."""
        self._step = time.perf_counter(), time.process_time(), time.thread_time()

    def end_step(self) -> None:
        """Notes what a step has taken."""
        if self._has_told:
            return
        start, process_start, thread_start = self._step
        # This thread works in every part of a step, and the others in most.
        own = max(time.thread_time() - thread_start, (time.process_time() - process_start) / self.num_threads)
        self._ratios.append((time.perf_counter() - start) / max(own, 1e-6))

    def report(self) -> str | None:
        """Returns what to tell the user, at the end of the second of two slow windows in a row; else None."""
        seconds = time.monotonic() - self._started
        if self._has_told or len(self._ratios) < _WINDOW_STEPS or seconds < _WINDOW_SECONDS:
            return None
        ratio, before, after = sorted(self._ratios)[len(self._ratios) // 2], self._times, read_core_times()
        own = time.process_time() - self._own
        self._begin_window()
        others = 0.0 if before is None or after is None else (after.busy - before.busy - own) / seconds
        if after is None or ratio < _SLOW_RATIO or others < _CROWD:
            self._num_slow = 0
            return None
        self._num_slow += 1
        if self._num_slow < 2:
            return None
        self._has_told = True
        remedy = "end them" if self.num_threads == 1 else "end them, or set OMP_NUM_THREADS=1"
        return (
            f"other programs hold the cores ({others:.1f} of {after.num_cores}), and a step takes {ratio:.1f} times as "
            f"long as its own work: {remedy}"
        )
