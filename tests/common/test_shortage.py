"""Small machines: which errors say that something has run out, what is said of it, and the watch over a process."""

import errno
import os
import resource
import signal
import subprocess
import sys
import time
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import fields
from pathlib import Path

import numpy as np
import os_faults
import pytest
import tiny_images
import torch
from PIL import Image

from gait_latents.common import errors, files, limits, script, shortage
from gait_latents.common.errors import Failed, Shortage, UserError, explain, is_told
from gait_latents.images import folders, reading
from gait_latents.images.split import Entry
from gait_latents.latents import shard
from gait_latents.settings import SCRIPTS, ExportSettings, GenerateSettings, TrainSettings
from gait_latents.training import run_folder
from gait_latents.vae import weight_files

ROOT = Path(__file__).resolve().parents[2]
ENFORCED = (
    "[enforce fail at alloc_cpu.cpp:125] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "80 bytes. Error code 12 (Cannot allocate memory)"
)
NUMPY = ImportError("IMPORTANT: PLEASE READ THIS FOR ADVICE ON HOW TO SOLVE THIS ISSUE!")
NUMPY.__cause__ = ImportError("libscipy_openblas64_-6bb31eeb.so: failed to map segment from shared object")
OWN_CAUSE = ValueError("of itself")
OWN_CAUSE.__cause__ = OWN_CAUSE


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (MemoryError(), shortage.MEMORY),
        (np._core._exceptions._ArrayMemoryError((1 << 50,), np.dtype("u1")), shortage.MEMORY),  # type: ignore[attr-defined]
        (RuntimeError(ENFORCED), shortage.MEMORY),
        (RuntimeError("[enforce fail] . DefaultCPUAllocator: not enough memory: you tried"), shortage.MEMORY),
        (RuntimeError("std::bad_alloc"), shortage.MEMORY),
        (RuntimeError("unable to mmap 80 bytes from file </a/b>: Cannot allocate memory (12)"), shortage.MEMORY),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), shortage.MEMORY),
        (ImportError("libtorch_cpu.so: failed to map segment from shared object"), shortage.MEMORY),
        (OSError("libtorch_cuda.so: failed to map segment from shared object"), shortage.MEMORY),
        (ImportError("libc10.so: cannot open shared object file: Cannot allocate memory"), shortage.MEMORY),
        (NUMPY, shortage.MEMORY),
        (RuntimeError("can't start new thread"), shortage.THREADS),
        (RuntimeError("Resource temporarily unavailable"), shortage.THREADS),
        (BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"), shortage.THREADS),
        (OSError(errno.EMFILE, "Too many open files", "/a/b"), shortage.FILES),
        (OSError(errno.ENFILE, "Too many open files in system"), shortage.FILES),
        (ImportError("libc10.so: cannot open shared object file: Too many open files"), shortage.FILES),
        (BrokenProcessPool("A process in the process pool was terminated abruptly"), shortage.HELPER),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), shortage.GPU),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_an_error_of_a_small_machine_is_one_line_and_exit_code_1(error, kind, capsys):
    assert shortage.kind_of(error) == kind and is_told(error)
    with pytest.raises(Shortage):
        errors.let_shortage_pass(error)

    def work(argv: object) -> int:
        raise error

    assert script.run_script(TrainSettings, [], None, work) == 1
    output = capsys.readouterr()
    (line,) = output.err.splitlines()
    assert line.startswith("error: ") and output.out == ""
    assert any(word in line for word in ("raise", "end other programs", "end what else uses it"))


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"),
        RuntimeError("can't start new thread at interpreter shutdown"),
        RuntimeError("could not create a primitive"),  # oneDNN says so of defects, too; here is memory enough
        RuntimeError("could not create a primitive descriptor for a convolution forward propagation primitive"),
        RuntimeError("the out of memory flag is set"),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("unable to mmap 80 bytes from file </a/b>: Permission denied (13)"),
        ValueError("std::bad_alloc"),
        KeyError("DefaultCPUAllocator: can't allocate memory"),
        AssertionError("memory"),
        ImportError("cannot allocate memory in static TLS block"),
        OWN_CAUSE,
    ],
    ids=str,
)
def test_any_other_error_is_a_defect_and_keeps_its_traceback(error):
    def work(argv: object) -> int:
        raise error

    assert shortage.kind_of(error) is None
    errors.let_shortage_pass(error)
    with pytest.raises(type(error)) as raised:
        script.run_script(TrainSettings, [], None, work)
    assert raised.value is error


def test_what_has_other_reasons_counts_where_memory_is_short(monkeypatch):
    monkeypatch.setattr(limits, "free_on_machine", lambda: 1 << 20)
    assert shortage.kind_of(RuntimeError("could not create a primitive")) == shortage.MEMORY
    assert shortage.kind_of(ImportError("a.so: cannot allocate memory in static TLS block")) == shortage.MEMORY
    assert shortage.kind_of(SystemError("error return without exception set")) == shortage.MEMORY
    assert shortage.kind_of(SystemError("<built-in> returned NULL without setting an exception")) == shortage.MEMORY


def test_looking_for_room_takes_none():
    program = """
from pathlib import Path
from gait_latents.common import shortage
assert shortage.has_room(1 << 29) and not shortage.has_room(1 << 62)
print(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert int(done.stdout) < 1 << 18, done.stderr  # kB, a half of what was looked for


@pytest.mark.parametrize("room", [40, 60, 110, 400])
def test_scipy_is_loaded_where_there_is_room_for_it_and_else_that_is_told(room):
    """Where its OpenBLAS gets a part of what it needs, loading it does not end."""
    program = f"""
import os, resource
os.environ["OPENBLAS_NUM_THREADS"] = "1"
from gait_latents.common import errors
taken = int(open("/proc/self/statm").read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
resource.setrlimit(resource.RLIMIT_AS, (taken + ({room} << 20),) * 2)
errors.make_sure_of_room_for_scipy()
import scipy.linalg
errors.make_sure_of_room_for_scipy()
print("loaded")
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    if room > 200:
        assert done.stdout == "loaded\n", done.stderr
    else:
        assert done.returncode == 1 and "Shortage: this process may take" in done.stderr


def test_where_the_limits_cannot_even_be_looked_at_the_shortest_line_is_told(monkeypatch):
    def fails() -> None:
        raise MemoryError

    monkeypatch.setattr(limits, "smallest_memory_limit", fails)
    assert shortage.describe(shortage.MEMORY).startswith("this machine has too little memory: end other programs")


def test_errors_that_are_told_already_keep_their_words_and_codes():
    assert explain(UserError("mend it")) == ("mend it", 2)
    assert explain(Failed("gone")) == ("gone", 1)
    assert explain(OSError(errno.ENOSPC, "No space left on device", "/a")) == ("/a: No space left on device", 1)


def test_a_remedy_names_settings_that_the_script_has():
    for settings in (*SCRIPTS.values(), ExportSettings):
        names = {field.name for field in fields(settings)}
        shortage.offer(names)
        flags = [word.strip(";:,.") for word in shortage.describe(shortage.MEMORY).split() if word.startswith("--")]
        assert {flag.removeprefix("--") for flag in flags} <= names
        assert bool(flags) == (settings not in (GenerateSettings, ExportSettings))


# --- limits ------------------------------------------------------------------------------------------------


def grouped(root: Path, monkeypatch: pytest.MonkeyPatch, membership: str, texts: dict[str, str]) -> None:
    """Makes control groups below `root` that this process seems to be in."""
    for name, text in {**texts, "self": membership}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    read = limits._read
    monkeypatch.setattr(limits, "_CGROUPS", root)
    monkeypatch.setattr(
        limits, "_read", lambda path: read(root / "self" if path == Path("/proc/self/cgroup") else path)
    )


def test_the_limit_of_a_container_is_read_in_either_form(tmp_path, monkeypatch):
    new = {"memory.max": "3000000000\n", "memory.current": "2500000000\n", "memory.stat": "inactive_file 1000000000\n"}
    grouped(tmp_path / "2", monkeypatch, "0::/a/b\n", {f"a/{name}": text for name, text in new.items()})
    (limit,) = [limit for limit in limits.memory_limits() if not limit.is_own]
    assert (limit.num_bytes, limit.free, limit.by) == (3_000_000_000, 1_500_000_000, "the container")
    assert limits.free_on_machine() <= 1_500_000_000 and not limits.are_tight()
    monkeypatch.undo()
    old = {
        "memory/memory.limit_in_bytes": "500000000",
        "memory/memory.usage_in_bytes": "600000000",
        "memory/memory.stat": "inactive_file 1\ntotal_inactive_file 300000000\n",
    }
    grouped(tmp_path / "1", monkeypatch, "3:cpu:/\n4:memory:/not/shown/here\n", old)
    (limit,) = [limit for limit in limits.memory_limits() if not limit.is_own]
    assert (limit.num_bytes, limit.free) == (500_000_000, 200_000_000) and limits.are_tight()


def test_a_container_without_a_limit_has_none(tmp_path, monkeypatch):
    texts = {"memory.max": "max\n", "pids.max": "max\n", "memory/memory.limit_in_bytes": "9223372036854771712\n"}
    grouped(tmp_path, monkeypatch, "0::/\n4:memory:/\n", texts)
    assert limits.smallest_memory_limit() is None and not limits.are_tight()


def test_a_limit_on_threads_is_the_smallest(tmp_path, monkeypatch):
    grouped(tmp_path, monkeypatch, "0::/\n", {"pids.max": "7\n"})
    assert limits.thread_limit() == (7, "the container") and limits.are_tight()
    assert "(7 by the container): give the container more, or set OMP_NUM_THREADS=1" in shortage.describe("threads")


def limited(kind: int, value: int, check: str) -> subprocess.CompletedProcess[str]:
    """Runs lines of Python under a limit."""
    return subprocess.run(
        [sys.executable, "-c", check],
        preexec_fn=lambda: resource.setrlimit(kind, (value, value)),
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_ulimit_on_memory_is_read_and_told():
    lines = (
        "from gait_latents.common import limits, shortage",
        "limit = limits.smallest_memory_limit()",
        "assert limits.are_tight() and 0 < limit.free < limit.num_bytes == 2 * 10**9, limit",
        "assert limits.free_bytes() <= limit.free",
        "assert shortage.has_room(10**8) and not shortage.has_room(2 * 10**9)",
        "print(shortage.describe('memory'))",
    )
    done = limited(resource.RLIMIT_AS, 2 * 10**9, "\n".join(lines))
    assert done.stdout.startswith("this process may take 2.0 GB of memory, and that is too little: raise ulimit -v; ")


# --- files are not to blame --------------------------------------------------------------------------------


def test_no_file_is_damaged_because_handles_ran_out(tmp_path):
    """Else an image would be left out of the split for ever, and a run would go on from an older state."""
    (tmp_path / "ID_1").mkdir()
    (tmp_path / "ID_1" / "1.png").write_bytes(tiny_images.SAMPLES["PNG"])
    (tmp_path / "state-00000004.safetensors").write_bytes(b"x")
    torch.save({"a": torch.zeros(2)}, tmp_path / "vae.pt")
    tries = (
        lambda: weight_files.read_weights(tmp_path / "vae.pt"),
        lambda: reading.read_image(str(tmp_path), Entry("ID_1", "1.png", ""), image_size=16),
        lambda: files.read_whole(tmp_path / "ID_1" / "1.png", at_most=1 << 20),
        lambda: run_folder.find_newest(tmp_path),
        lambda: folders.list_images(tmp_path),
        lambda: shard.open_to_read(tmp_path / "ID_1" / "1.png").__enter__(),
    )

    def without_handles() -> None:
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)
        lowest = os.dup(0)
        os.close(lowest)
        for attempt in tries:
            resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, limit[1]))
            try:
                with pytest.raises((Shortage, OSError)) as raised:
                    attempt()
                assert f"no more files can be opened ({lowest} by ulimit -n): raise it" in explain(raised.value)[0]
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, limit)

    assert os_faults.forked(without_handles) == 0


def test_no_image_is_damaged_because_memory_ran_out():
    large = {kind: tiny_images.encoded(Image.new("RGB", (6000, 4000), "red"), kind) for kind in ("JPEG", "PNG", "WEBP")}

    def without_memory() -> None:
        for data in tiny_images.SAMPLES.values():  # all that is imported by then
            reading.decode(data, image_size=16)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), resource.RLIM_INFINITY))
        taken = []
        with suppress(MemoryError):  # the free places of the heap, too
            while True:
                taken.append(bytearray(1 << 20))
        del taken[-40:]
        for data in large.values():
            with pytest.raises(Shortage, match="too little"):
                reading.decode(data, image_size=16)
        for name, data in tiny_images.SAMPLES.items():
            assert reading.decode(data, image_size=16).shape == (16, 16, 3), name
        with pytest.raises(reading.BadImage):
            reading.decode(tiny_images.SAMPLES["PNG"][:300], image_size=16)

    assert os_faults.forked(without_memory) == 0


# --- the watch ---------------------------------------------------------------------------------------------


def start(folder: Path, *lines: str, handles: int = 64) -> subprocess.Popen[str]:
    """Starts a script whose work is these lines, under a limit that is tight but harms nothing."""
    head = (
        "import ctypes, os, resource, signal, subprocess, sys, threading, time",
        f"resource.setrlimit(resource.RLIMIT_NOFILE, ({handles}, {handles}))",
        "from gait_latents.common.console import say, warn",
        "from gait_latents.common.script import run_script",
        "from gait_latents.settings import TrainSettings",
        "def work(argv):",
        *(f"    {line}" for line in lines),
        "    return 0",
        "sys.exit(run_script(TrainSettings, None, 'Works.', work))",
    )
    (folder / "small.py").write_text("\n".join(head))
    pipe = subprocess.PIPE
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "small.py"], cwd=folder, env=environment, stdout=pipe, stderr=pipe, text=True
    )


def ended(folder: Path, *lines: str, handles: int = 64) -> tuple[int, str, str]:
    """Runs such a script; returns its exit code, and what it printed on stdout and stderr."""
    process = start(folder, *lines, handles=handles)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        (["ctypes.string_at(0)"], "was ended by SIGSEGV"),
        (["os.write(2, b\"terminate called after throwing 'std::bad_alloc'\\n\")", "os.abort()"], "this machine has"),
        (["os.write(2, b'libgomp: Thread creation failed: Resource\\n')", "os._exit(1)"], "no more threads or proc"),
        (["os.kill(os.getpid(), signal.SIGKILL)"], "was ended by SIGKILL"),
        (["os.write(2, b'of a library\\n')", "os.abort()"], "(of a library)"),
    ],
)
def test_what_a_library_ends_is_told_in_one_line(tmp_path, lines, told):
    code, _, err = ended(tmp_path, *lines)
    assert code == 1 and err.startswith("error: ") and err.count("\n") == 1 and told in err
    assert err.endswith("; what was saved is whole, and the same command goes on from there\n")


def test_a_defect_under_watch_keeps_its_traceback_and_what_libraries_said(tmp_path):
    code, _, err = ended(tmp_path, "os.write(2, b'of a library\\n')", "raise RuntimeError('a defect')")
    assert code == 1 and "of a library\n" in err and err.endswith("RuntimeError: a defect\n") and "Traceback" in err


def test_under_watch_everything_is_printed_and_the_exit_code_is_kept(tmp_path):
    lines = ("say('said')", "warn('warned')", "os.write(2, b'of a library\\n')", "return 3")
    assert ended(tmp_path, *lines) == (3, "said\n", "warning: warned\nof a library\n")


def test_a_shortage_that_python_tells_drops_what_libraries_said_before(tmp_path):
    code, _, err = ended(tmp_path, "os.write(2, b'OpenBLAS: pthread_create failed\\n')", "raise MemoryError")
    assert code == 1 and err.count("\n") == 1 and err.startswith("error: ")


def test_a_thread_that_has_no_memory_to_begin_ends_the_program(tmp_path):
    """Others would wait for it for ever."""
    lines = (
        "class Poor(threading.Thread):",
        "    def run(self): raise MemoryError",
        "Poor().start()",
        "time.sleep(50)",
    )
    code, _, err = ended(tmp_path, *lines)
    assert code == 1 and err.count("\n") == 1 and err.startswith("error: ")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_is_handed_on_once_and_ends_as_without_the_watch(tmp_path, number):
    codes = []
    for handles in (64, 1024):
        process = start(tmp_path, "print('ready', flush=True)", "time.sleep(50)", handles=handles)
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        process.send_signal(number)
        _, err = process.communicate(timeout=30)
        codes.append((process.returncode, err))
    assert codes[0] == codes[1]


def test_a_signal_that_is_noted_is_noted_once(tmp_path):
    lines = (
        "from gait_latents.common.process import StopSignals",
        "with StopSignals() as signals:",
        "    print('ready', flush=True)",
        "    while signals.received is None: time.sleep(0.01)",
        "    time.sleep(0.3)",
        "    signals.raise_if_received()",
    )
    process = start(tmp_path, *lines)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.terminate()
    _, err = process.communicate(timeout=30)
    assert process.returncode == 143
    assert err == "SIGTERM: stopping after what is under way; a second Ctrl-C ends at once\n"


def test_the_work_does_not_outlive_the_watch(tmp_path):
    process = start(tmp_path, "print(os.getpid(), flush=True)", "time.sleep(50)")
    assert process.stdout is not None
    child = int(process.stdout.readline())
    assert child != process.pid
    process.kill()
    process.communicate(timeout=30)
    until = time.monotonic() + 20
    while Path(f"/proc/{child}/stat").exists() and time.monotonic() < until:
        if Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
            break
        time.sleep(0.02)
    assert time.monotonic() < until


def test_without_a_tight_limit_there_is_no_watch(tmp_path):
    process = start(tmp_path, "print(os.getpid())", handles=1024)
    out, err = process.communicate(timeout=60)
    assert (int(out), err) == (process.pid, "")
