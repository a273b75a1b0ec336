"""How many cores are free, how many threads a run takes, and what is told when other programs hold the cores."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gait_latents.common import cores, hardware
from gait_latents.common.cores import CoreTimes, CoreWatch

CPU = torch.device("cpu")


def times(*, busy: float, idle: float, num_cores: int = 4) -> CoreTimes:
    return CoreTimes(num_cores, busy, idle)


@pytest.fixture
def sampled(monkeypatch):
    """Lets the cores have done this between two looks at them."""

    def sample(*, busy: float, idle: float, quota: float = 99.0) -> int | None:
        looks = iter([times(busy=10, idle=10), times(busy=10 + busy, idle=10 + idle)])
        monkeypatch.setattr(cores, "read_core_times", lambda: next(looks))
        monkeypatch.setattr(cores, "_quota", lambda: quota)
        return cores.num_free_cores()

    return sample


def test_the_cores_of_this_machine_can_be_read():
    found = cores.read_core_times()
    assert found is not None and found.num_cores == len(os.sched_getaffinity(0))
    assert found.busy > 0
    free = cores.num_free_cores()
    assert free is not None and 1 <= free <= found.num_cores


def test_only_the_cores_that_this_process_may_use_count(tmp_path, monkeypatch):
    rows = [
        "cpu  9 9 9 9 9 9 9 9 0 0",
        "cpu0 100 0 0 300 0 0 0 0 0 0",
        "cpu1 1 2 3 400 5 6 7 8 0 0",
        "cpu12 1",
        "intr 5",
    ]
    (tmp_path / "stat").write_text("\n".join(rows))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1})
    tick = 1 / os.sysconf("SC_CLK_TCK")
    assert cores.read_core_times(tmp_path / "stat") == CoreTimes(1, busy=27 * tick, idle=405 * tick)
    assert cores.read_core_times(tmp_path / "none") is None


@pytest.mark.parametrize(
    ("busy", "idle", "quota", "free"),
    [
        (0.0, 4.0, 99, 4),
        (0.2, 3.8, 99, 4),  # a little of other work leaves a core free
        (1.0, 3.0, 99, 3),
        (2.5, 1.5, 99, 1),
        (4.0, 0.0, 99, 1),
        (0.0, 4.0, 2.0, 2),  # what a container may use
        (0.0, 4.0, 0.5, 1),
        (0.0, 0.0, 99, 4),
    ],
)
def test_free_cores_are_those_with_nothing_to_do(sampled, busy, idle, quota, free):
    assert sampled(busy=busy, idle=idle, quota=quota) == free


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({"cpu.max": "150000 100000\n"}, 1.5),
        ({"cpu.max": "max 100000\n"}, float("inf")),
        ({"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4.0),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, float("inf")),
        ({}, float("inf")),
    ],
)
def test_the_limit_of_a_container_is_read_in_both_its_forms(tmp_path, files, quota):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert cores._quota(tmp_path) == quota


# --- the number of threads ---------------------------------------------------------------------------------


@pytest.fixture
def machine(monkeypatch):
    """A machine on which torch takes four threads, and this many cores are free."""

    def build(free: int | None) -> None:
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
        monkeypatch.setattr(cores, "num_free_cores", lambda: free)

    return build


def test_a_new_run_takes_as_many_threads_as_cores_are_free_and_says_so(machine):
    machine(3)
    told = "3 of 4 threads, as only so many cores are free; OMP_NUM_THREADS=4 takes all"
    assert hardware.pick_threads(CPU, as_before=None) == (3, told)
    assert hardware.describe(CPU, 3) == "CPU (3 threads)"
    for free in (4, 9, None):
        machine(free)
        assert hardware.pick_threads(CPU, as_before=None) == (4, "")
    assert hardware.pick_threads(torch.device("cuda"), as_before=None) == (None, "")


def test_a_run_that_goes_on_keeps_the_number_that_it_began_with(machine):
    machine(1)
    assert hardware.pick_threads(CPU, as_before=4) == (4, "")
    count, told = hardware.pick_threads(CPU, as_before=2)
    assert count == 2 and told == "2 of 4 threads, as when it began; OMP_NUM_THREADS=4 takes all"
    count, told = hardware.pick_threads(CPU, as_before=16)
    assert count == 4 and told == "4 threads, not 16 as when it began: the same run within rounding"


def test_the_users_number_wins(machine, monkeypatch):
    machine(1)
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert hardware.pick_threads(CPU, as_before=2) == hardware.pick_threads(CPU, as_before=None) == (4, "")


def test_threads_are_as_before_after_the_block():
    before = torch.get_num_threads()
    with hardware.threads(before + 1):
        assert torch.get_num_threads() == before + 1
        with hardware.threads(None):
            assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


# --- how threads wait --------------------------------------------------------------------------------------


def test_threads_wait_briefly_unless_the_user_says_how_they_wait(monkeypatch):
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    with monkeypatch.context() as patch:
        patch.setenv("OMP_WAIT_POLICY", "ACTIVE")
        cores.wait_briefly()
        assert "GOMP_SPINCOUNT" not in os.environ
    monkeypatch.setenv("GOMP_SPINCOUNT", "5")
    cores.wait_briefly()
    assert os.environ["GOMP_SPINCOUNT"] == "5"
    monkeypatch.delenv("GOMP_SPINCOUNT")
    cores.wait_briefly()
    assert os.environ.pop("GOMP_SPINCOUNT") == "10000"


def test_a_script_says_how_threads_wait_before_torch_is_imported():
    program = (
        "import os, sys; from gait_latents.common.script import run_script; from gait_latents.settings import "
        "TrainSettings as T; run_script(T, [], 'x', lambda argv: print(os.environ['GOMP_SPINCOUNT'], 'torch' in "
        "sys.modules) or 0)"
    )
    environment = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, env=environment, capture_output=True, text=True)
    assert done.stdout == "10000 False\n", done.stderr


# --- other programs hold the cores -------------------------------------------------------------------------


class Steps:
    """A clock for a watch whose steps take so long, work so much, and run beside so much other work."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, num_threads: int) -> None:
        self.now = self.own = self.all = 0.0
        for name in ("monotonic", "perf_counter"):
            monkeypatch.setattr(cores.time, name, lambda: self.now)
        for name in ("process_time", "thread_time"):
            monkeypatch.setattr(cores.time, name, lambda: self.own)
        monkeypatch.setattr(cores, "read_core_times", lambda: times(busy=self.all, idle=0, num_cores=2))
        self.watch = CoreWatch(num_threads)

    def take(self, count: int, *, seconds: float, work: float, others: float) -> list[str]:
        told = []
        for _ in range(count):
            self.watch.begin_step()
            self.now, self.own, self.all = self.now + seconds, self.own + work, self.all + work + others * seconds
            self.watch.end_step()
            told.append(self.watch.report())
        return [line for line in told if line is not None]


def test_other_programs_that_hold_the_cores_are_told_once(monkeypatch):
    steps = Steps(monkeypatch, num_threads=2)
    assert steps.take(100, seconds=0.1, work=0.09, others=0.1) == []
    (line,) = steps.take(200, seconds=1.0, work=0.1, others=1.9)
    assert line == (
        "other programs hold the cores (1.9 of 2), and a step takes 10.0 times as long as its own work: end them, or "
        "set OMP_NUM_THREADS=1"
    )
    assert steps.take(200, seconds=1.0, work=0.1, others=1.9) == []


def test_with_one_thread_there_are_no_fewer_to_take(monkeypatch):
    (line,) = Steps(monkeypatch, num_threads=1).take(100, seconds=1.0, work=0.3, others=2.0)
    assert line.endswith("its own work: end them")


def test_a_disk_that_is_slow_and_a_short_disturbance_are_no_crowd(monkeypatch):
    steps = Steps(monkeypatch, num_threads=2)
    assert steps.take(100, seconds=1.0, work=0.1, others=0.0) == []  # it waits, but for no program
    assert steps.take(10, seconds=1.0, work=0.1, others=1.9) == []  # one window alone
    assert steps.take(50, seconds=0.2, work=0.19, others=0.0) == []
