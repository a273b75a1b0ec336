"""A clock or a host name that changes between two sessions, or within one: nothing of a run goes by either."""

import ctypes
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from event_files import shown_scalars
from fault_account import Account
from os_faults import Child, Tell, dead_process
from pipeline import HALF, STEPS, assert_same_run, at_step, preprocess, signal_self, train

from gait_latents.common import files
from gait_latents.training import trackers

ROOT = Path(__file__).resolve().parents[2]
YEAR = 365 * 24 * 3600.0


# --- the clock ---------------------------------------------------------------------------------------------


def _set_clock(patch: pytest.MonkeyPatch, years: float) -> None:
    """Sets the clock that this process reads, and none that measures how long something takes."""
    real = time.time
    patch.setattr(time, "time", lambda: real() + years * YEAR)


def _date_files(root: Path, years: float) -> None:
    """Gives every file the date that it would have, had it been written so many years from now."""
    then = max(0.0, time.time() + years * YEAR)
    for path in root.rglob("*"):
        os.utime(path, (then, then))


@pytest.mark.parametrize("years", [-50, pytest.param(80, marks=pytest.mark.slow)])
def test_a_clock_that_jumps_between_two_sessions(
    years: float, cached: Path, trained: Path, monkeypatch: pytest.MonkeyPatch, account: Account
) -> None:
    """The run goes on bit for bit, and TensorBoard shows each step once."""
    pytest.importorskip("tensorboard")
    with monkeypatch.context() as patch:
        at_step(patch, HALF + 2, signal_self(15))
        assert train(cached, trackers="tensorboard") == 128 + 15
    with monkeypatch.context() as patch:
        _set_clock(patch, years)
        _date_files(cached / "latents_cache", 2 * years)  # as if a third session had still another clock
        assert preprocess(cached) == 0
        assert train(cached, trackers="tensorboard") == 0
    assert_same_run(cached, trained)
    is_once = [step for step, _ in shown_scalars(cached / "results")["loss"]] == list(range(1, STEPS + 1))
    account.add("a clock that jumps between two sessions", "50 years back, 80 ahead", cases=1, wrong=not is_once)


def test_event_files_sort_as_they_were_made_whatever_the_clock_says(tmp_path: Path) -> None:
    names = []
    for now in (1.7e9, 1.7e9, 5.0, 4.3e9, 1.8e9, 4.3e9 + 0.9):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(time, "time", lambda now=now: now)
            names.append(f"events.out.tfevents.{trackers._next_time(tmp_path)}.host.1")
        (tmp_path / names[-1]).touch()
    assert names == sorted(names) and len(set(names)) == len(names)
    assert names[0] == "events.out.tfevents.1700000000.000.host.1"


def test_a_living_writer_keeps_its_temporary_whatever_the_clock_says(tmp_path: Path) -> None:
    path = tmp_path / files._temporary_name()
    path.write_bytes(b"half")
    for then in (0.0, 4e9):
        os.utime(path, (then, then))
        assert files.remove_stale_temporaries(tmp_path) == 0


# --- the host name -----------------------------------------------------------------------------------------


def _clean(folder: Path) -> str:
    """Removes stale temporaries in a process that has just been started; returns how many, and its host."""
    code = "import sys; from gait_latents.common import files; "
    code += "print(files.remove_stale_temporaries(sys.argv[1]), files.host_digest())"
    return subprocess.check_output([sys.executable, "-c", code, str(folder)], cwd=ROOT, text=True).strip()


def _renamed_in_a_publish(folder: Path, tell: Tell) -> None:
    """Publishes on a machine that gets another name meanwhile, when a process of the new name looks for leftovers."""
    new_names = 0x04000000  # of the host, for this process alone
    if ctypes.CDLL(None).unshare(new_names):
        tell("may not")
        return
    socket.sethostname("first")
    put_in_place = files._put_in_place

    def rename_host_first(temporary: Path, *rest: object) -> None:
        (folder / f"{files.TEMPORARY_PREFIX}{files.host_digest()}-{dead_process()}-{'0' * 32}").write_bytes(b"half")
        socket.sethostname("second")
        tell(f"young {_clean(folder)}")
        yesterday = time.time() - 25 * 3600
        for path in folder.iterdir():
            if path != temporary:
                os.utime(path, (yesterday, yesterday))
        tell(f"old {_clean(folder)}")
        put_in_place(temporary, *rest)  # type: ignore[arg-type]

    files._put_in_place = rename_host_first
    files.publish(folder / "file", b"content")
    tell(f"own {files.host_digest()}")


def test_a_host_that_gets_another_name_in_a_session(tmp_path: Path, account: Account) -> None:
    """Its temporary stays while it lives; what a dead process left under the old name goes after a day."""
    code, told = Child(lambda tell: _renamed_in_a_publish(tmp_path, tell)).end(kill_after=120)
    assert code == 0
    if told == ["may not"]:
        pytest.skip("this system lets nobody name a host")
    (_, young, host), (_, old, same_host), (_, own) = (line.split() for line in told)
    assert host == same_host != own, "the new process has another name for this host"
    is_right = (young, old) == ("0", "1") and [path.name for path in tmp_path.iterdir()] == ["file"]
    account.add("a host name that changes in a session", "in the middle of a publish", cases=2, wrong=not is_right)


@pytest.mark.slow
def test_a_host_that_has_another_name_in_the_next_session(
    cached: Path, trained: Path, monkeypatch: pytest.MonkeyPatch, account: Account
) -> None:
    with monkeypatch.context() as patch:
        at_step(patch, HALF + 2, signal_self(15))
        assert train(cached) == 128 + 15
    files.host_digest.cache_clear()
    try:
        monkeypatch.setattr(socket, "gethostname", lambda: "another")
        assert train(cached) == 0
    finally:
        monkeypatch.undo()
        files.host_digest.cache_clear()
    assert_same_run(cached, trained)
    account.add("a host name that changes between two sessions", "resume bit for bit", cases=1)
