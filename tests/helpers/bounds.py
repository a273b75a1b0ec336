"""Runs work in a forked child and says what it gave and how much memory it took: hostile files must cost neither."""

import json
import os
import select
import signal
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from os_faults import fork, wait_for

SECONDS = 120  # many times what any of this takes; a child that is not done by then hangs


def in_child(work: Callable[[], object], *, seconds: float = SECONDS) -> tuple[Any, int]:
    """Returns what `work` returns, as JSON gives it back, and by how many bytes the memory of the child grew at most.

    Fails when `work` raises, dies or takes longer than `seconds`.
    """
    here, there = os.pipe()
    child = fork(lambda: _send(there, work))
    os.close(there)
    with os.fdopen(here, "rb") as pipe:
        if not select.select([pipe], [], [], seconds)[0]:
            os.kill(child, signal.SIGKILL)
            wait_for(child)
            pytest.fail(f"not done after {seconds:g} seconds")
        answer = pipe.read()
    code = wait_for(child)
    if code or not answer:
        pytest.fail(f"the child ended with {code}: {answer.decode()}")
    found = json.loads(answer)
    if "raised" in found:
        pytest.fail(found["raised"])
    return found["value"], found["bytes"]


def _send(descriptor: int, work: Callable[[], object]) -> None:
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is the parent's
    before = _resident("VmRSS")
    try:
        answer: dict[str, object] = {"value": work()}
    except BaseException:
        answer = {"raised": traceback.format_exc()}
    text = json.dumps({**answer, "bytes": _resident("VmHWM") - before}).encode()
    with os.fdopen(descriptor, "wb") as pipe:
        pipe.write(text)


def _resident(name: str) -> int:
    """Returns a figure of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) * 1024
