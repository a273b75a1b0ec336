"""What the benchmarks share: variants that take turns, in processes of their own or in one, and how they compare.

Where each variant is a worker process (`compare`, `serve`), it keeps its model warm and works only when it is asked to,
so that in every round all variants are timed one after the other on the same machine in the same state. `take_turns`
does the same within one process. Figures are medians over rounds; ratios are taken within a round.
"""

import argparse
import json
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

Round = Callable[[], int]  # does a round's work and returns how many units that was


def read_arguments(description: str, **counts: tuple[int, str]) -> argparse.Namespace:
    """Reads the command line: the flags that every benchmark has, and {name: (default, help)} of its own."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds; figures are medians over them")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of torch on a CPU")
    parser.add_argument("--small", action="store_true", help="tiny sizes: shows that it works, measures nothing")
    parser.add_argument("--only", nargs="+", help="names of variants, besides the baseline")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    for name, (default, text) in counts.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=text)
    return parser.parse_args()


# --- the worker's side -------------------------------------------------------------------------------------


def serve(prepare: Callable[[], Round], facts: Callable[[], Mapping[str, Any]]) -> None:
    """Prepares, warms up with one round, and then does a round for each line on standard input.

    On a GPU, all workers together may need more memory than there is. So a worker that waits holds its weights alone,
    and gets the rest back in a round that is not timed.
    """
    import torch

    channel, sys.stdout = sys.stdout, sys.stderr  # what the program prints must not mix with the answers
    has_gpu = torch.cuda.is_available()
    work = prepare()
    work()
    wait_for_device()
    if has_gpu:
        torch.cuda.empty_cache()
    print("ready", file=channel, flush=True)
    for _ in sys.stdin:
        if has_gpu:
            work()
            wait_for_device()
        started = time.perf_counter()
        count = work()
        wait_for_device()
        seconds = time.perf_counter() - started
        peak = torch.cuda.max_memory_allocated() if has_gpu else 0
        if has_gpu:
            torch.cuda.empty_cache()
        answer = {"seconds": seconds, "count": count, "host_peak": _host_peak(), "gpu_peak": peak, **facts()}
        print(json.dumps(answer), file=channel, flush=True)


def wait_for_device() -> None:
    """Waits until the GPU, if there is one, has done what was queued on it."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _host_peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# --- the side that asks ------------------------------------------------------------------------------------


def compare(script: str, names: Sequence[str], arguments: argparse.Namespace, unit: str) -> None:
    """Runs the variants in turn for some rounds; prints a table, and in the last line the same as JSON.

    Args:
        script: path of the benchmark, which is called again with --worker NAME.
        names: the variants; the first is the baseline.
        unit: what a round counts, in the singular.
    """
    words = [word for word in sys.argv[1:] if word != "--worker"]
    workers = {name: _start(script, name, words, arguments.threads) for name in names}
    answers: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for number in range(arguments.rounds):
        for name, worker in workers.items():
            answers[name].append(_ask(worker, name))
        print(f"round {number + 1} of {arguments.rounds} done", file=sys.stderr, flush=True)
    for worker in workers.values():
        worker.stdin.close()  # type: ignore[union-attr]
        worker.wait()
    figures = {name: _figures(found, answers[names[0]]) for name, found in answers.items()}
    _print_table(figures, unit)
    print(json.dumps({"benchmark": Path(script).stem, **machine(arguments.threads), "variants": figures}))


def _start(script: str, name: str, words: list[str], threads: int) -> subprocess.Popen[str]:
    """Starts a worker and waits until it is warm, so that no other is disturbed by it."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, script, *words, "--worker", name]
    worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    if worker.stdout.readline() != "ready\n":  # type: ignore[union-attr]
        raise _ended(name)
    return worker


def _ask(worker: subprocess.Popen[str], name: str) -> dict[str, Any]:
    try:
        worker.stdin.write("\n")  # type: ignore[union-attr]
        worker.stdin.flush()  # type: ignore[union-attr]
        return json.loads(worker.stdout.readline())  # type: ignore[union-attr]
    except (BrokenPipeError, ValueError):
        raise _ended(name) from None


def _ended(name: str) -> SystemExit:
    return SystemExit(f"the variant {name!r} ended with an error; see above")


def _figures(found: list[dict[str, Any]], baseline: list[dict[str, Any]]) -> dict[str, Any]:
    each = [answer["seconds"] / answer["count"] for answer in found]
    ratios = [base["seconds"] / base["count"] / own for base, own in zip(baseline, each, strict=True)]
    extra = {k: v for k, v in found[-1].items() if k not in ("seconds", "count", "host_peak", "gpu_peak")}
    return {
        "seconds": statistics.median(each),
        "seconds_min": min(each),
        "seconds_max": max(each),
        "speed": statistics.median(ratios),
        "speed_min": min(ratios),
        "speed_max": max(ratios),
        "host_gb": max(answer["host_peak"] for answer in found) / 1e9,
        "gpu_gb": max(answer["gpu_peak"] for answer in found) / 1e9,
        **extra,
    }


def _print_table(figures: Mapping[str, Mapping[str, Any]], unit: str) -> None:
    extra = list(dict.fromkeys(name for row in figures.values() for name in row if name not in _COLUMNS))
    heads = ["variant", f"s per {unit} (min to max)", "speed (min to max)", "GB host", "GB GPU", *extra]
    print("| " + " | ".join(heads) + " |")
    print("|---" * len(heads) + "|")
    for name, row in figures.items():
        cells = [
            name,
            f"{row['seconds']:.4g} ({row['seconds_min']:.4g} to {row['seconds_max']:.4g})",
            f"{row['speed']:.2f}x ({row['speed_min']:.2f} to {row['speed_max']:.2f})",
            f"{row['host_gb']:.2f}",
            f"{row['gpu_gb']:.2f}",
            *(_cell(row.get(key, "")) for key in extra),
        ]
        print("| " + " | ".join(cells) + " |")


_COLUMNS = {"seconds", "seconds_min", "seconds_max", "speed", "speed_min", "speed_max", "host_gb", "gpu_gb"}


def _cell(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


# --- turns in one process ----------------------------------------------------------------------------------

_AGREEMENT, _MOST_WARM_UPS = 0.03, 6  # work is warm when two windows differ by less than this, or after so many
_WARM_UP_ROUNDS = 3  # the share of the time that is for warming up, in rounds
_SHORTEST_WINDOW = 0.01  # seconds


@dataclass(frozen=True)
class Window:
    """Work that was repeated for some seconds, the device waited for at the edges alone.

    Attributes:
        count: how many units were done.
        seconds: from edge to edge.
        host_seconds: until the host was done, while the device may have had work left.
        device_seconds: between the events at the edges on the device; None without a GPU.
    """

    count: int
    seconds: float
    host_seconds: float
    device_seconds: float | None

    @property
    def each(self) -> float:
        """Seconds per unit."""
        return self.seconds / self.count


def take_turns(
    works: Mapping[str, Round], *, seconds: float, window: float = 2.0, rounds: int = 5
) -> dict[str, list[Window]]:
    """Warms each work up, then times all of them in turn, for some rounds.

    Args:
        works: what is timed.
        seconds: how long all may take. Windows get shorter where it would not do, and rounds that do not fit are left
            out, but for the first.
        window: seconds of a window; at least one call of the work fills it.
        rounds: how many windows each work gets.
    """
    deadline = time.monotonic() + seconds
    share = seconds / max(len(works), 1) / (rounds + _WARM_UP_ROUNDS)
    window = max(_SHORTEST_WINDOW, min(window, share))
    repeats = {name: _warm_up(work, window, _WARM_UP_ROUNDS * share) for name, work in works.items()}
    found: dict[str, list[Window]] = {name: [] for name in works}
    for number in range(rounds):
        if number and time.monotonic() > deadline:
            break
        for name, work in works.items():
            found[name].append(_time_window(work, repeats[name]))
    return found


def _warm_up(work: Round, window: float, seconds: float) -> int:
    """Works until two windows agree, for so many seconds at most; returns how many calls fill a window."""
    work()  # the first call may take much longer, and says nothing of the others
    deadline, repeats, before = time.monotonic() + seconds, 1, math.inf
    for _ in range(_MOST_WARM_UPS):
        found = _time_window(work, repeats)
        agree = abs(found.each / before - 1) < _AGREEMENT
        before, repeats = found.each, max(1, math.ceil(repeats * window / found.seconds))
        if agree or time.monotonic() > deadline:
            break
    return repeats


def _time_window(work: Round, repeats: int) -> Window:
    import torch

    edges = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if torch.cuda.is_available() else []
    wait_for_device()
    started = time.perf_counter()
    if edges:
        edges[0].record()
    count = sum(work() for _ in range(repeats))
    if edges:
        edges[1].record()
    host_seconds = time.perf_counter() - started
    wait_for_device()
    seconds = time.perf_counter() - started
    return Window(count, seconds, host_seconds, edges[0].elapsed_time(edges[1]) / 1000 if edges else None)


def summary(values: Sequence[float]) -> dict[str, float]:
    """Returns the median of values, the smallest and the largest, and how many there are."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "windows": len(values)}


def speed(windows: Sequence[Window], baseline: Sequence[Window]) -> dict[str, float]:
    """Returns how many times as fast as the baseline a work was, by the ratios within the rounds."""
    return summary([base.each / own.each for base, own in zip(baseline, windows, strict=True)])


# --- the machine -------------------------------------------------------------------------------------------


def number_formats() -> tuple[str, ...]:
    """Returns the number formats to compare here: on a GPU without bfloat16 of its own, not that one."""
    import torch

    if not torch.cuda.is_available():
        return ("float32", "bfloat16")
    has_bfloat16 = torch.cuda.get_device_capability() >= (8, 0)
    return ("float32", "bfloat16", "float16") if has_bfloat16 else ("float32", "float16")


def machine(threads: int) -> dict[str, Any]:
    """Describes the machine and the versions."""
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    names = ("torch", "torchvision", "pillow", "numpy", "denoising-diffusion-pytorch")
    return {
        "cpu": _cpu_fact("model name") or platform.processor(),
        "cpu_features": [name for name in _CPU_FEATURES if name in _cpu_fact("flags").split()],
        "cores": os.cpu_count(),
        "threads": threads,
        "gpu": gpu,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in names},
    }


# Instructions that decide how fast a CPU computes in float32 and in bfloat16.
_CPU_FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


def _cpu_fact(name: str) -> str:
    """Returns what Linux says of the first processor under a name; nothing elsewhere."""
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith(name):
            return line.partition(":")[2].strip()
    return ""


def flags(settings: Mapping[str, object]) -> list[str]:
    """Turns settings into the words of a command line."""
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]
