"""A terminal that is closed, a torchrun that is killed, and a second training that starts in the same moment."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pipeline
import pytest
import tiny
from pipeline import assert_same_run, state_digests

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
SECONDS = 120  # many times what anything here takes


def wait_until(is_so: Callable[[], bool], *, seconds: float = SECONDS) -> float:
    """Waits until something is so; returns how many seconds that took."""
    started = time.monotonic()
    while not is_so():
        assert time.monotonic() - started < seconds, "it did not come to this"
        time.sleep(0.01)
    return time.monotonic() - started


# --- signals and terminals ---------------------------------------------------------------------------------

SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


def words_of(stage: str, world: Path) -> list[str]:
    """Returns the command of a stage, long enough that a signal comes in the midst of it."""
    if stage == "generate":
        many = {"checkpoint": world / "trained", "output_folder": world / "made", "images_per_class": 500}
        return ["generate.py", *tiny.flags({**many, "device": "cpu"})]
    if stage == "encode":
        many = {"data_path": world / "many", "output_folder": world / "cache", "images_per_user": "all"}
        return [
            "preprocess_latents.py",
            *tiny.preprocess_flags(world, image_size=pipeline.SIZE, encode_batch_size=1, **many),
        ]
    if stage == "evaluate":
        asked = {"checkpoint": world / "trained", "sweep": [1, 2], "output_folder": world / "evaluation"}
        return ["evaluate_images.py", *tiny.flags({**asked, "sweep_images": 300, "device": "cpu"})]
    long = {"train_num_steps": 100_000, "save_and_sample_every": 50_000, "num_samples": 0, "log_every": 10}
    return ["train_latent_cfg.py", *pipeline.train_flags(world, **long)]


def files_below(folder: Path) -> list[str]:
    """Returns the names of all files below a folder that may come, go and come again while it is read."""
    return [name for _, _, names in os.walk(folder) for name in names]


HAS_BEGUN = {
    "imports": lambda world, said: True,
    "train": lambda world, said: "the first step is saved" in said or (world / "results" / "metrics.jsonl").exists(),
    "generate": lambda world, said: sum(".jpg" in name for name in files_below(world / "made")) > 3,
    "encode": lambda world, said: "to encode" in said,
    "evaluate": lambda world, said: "guidance 1" in said,
}


@pytest.fixture
def busy(cached: Path, trained: Path) -> Path:
    """A world with a trained run and many images to encode."""
    shutil.copytree(trained / "results", cached / "trained")
    tiny.make_images(cached / "many", dict.fromkeys(("a", "b"), 300))
    return cached


@pytest.mark.slow
@pytest.mark.parametrize("stage", HAS_BEGUN)
def test_each_signal_ends_each_script_in_each_stage_with_its_code_and_no_traceback(busy, account, stage):
    for number in SIGNALS:
        log = busy / "log"
        with (
            log.open("w") as file,
            subprocess.Popen(
                [sys.executable, *words_of(stage, busy)], cwd=ROOT, env=ENVIRONMENT, stdout=file, stderr=file
            ) as process,
        ):
            wait_until(lambda: HAS_BEGUN[stage](busy, log.read_text()))  # noqa: B023
            process.send_signal(number)
            code = process.wait(SECONDS)
        said = log.read_text()
        is_right = code in (128 + number, -number) and "Traceback" not in said and "error" not in said
        if stage == "train":
            step = re.search(rf"stopped by {number.name} at step ([\d,]+); saved", said)
            is_right &= step is not None and state_digests(busy / "results")["step"] == step[1].replace(",", "")
            shutil.rmtree(busy / "results")
        assert is_right, (code, said)
        account.add(f"{stage} stopped", number.name, cases=1)


@pytest.mark.slow
@pytest.mark.parametrize("is_ignored", [False, True], ids=["shell", "nohup"])
def test_a_training_whose_terminal_is_closed_saves_and_goes_on_where_it_ignores_that(
    busy, account, is_long, is_ignored
):
    """The terminal is a real one: it sends SIGHUP when it goes, and each print fails from then on."""
    program = "import fcntl, os, signal, sys, termios; os.setsid(); fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
    program += "signal.signal(signal.SIGHUP, signal.SIG_IGN); " * is_ignored
    program += "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    metrics = busy / "results" / "metrics.jsonl"
    for _ in range(2 if is_long else 1):
        ours, theirs = os.openpty()
        words = [sys.executable, "-c", program, *words_of("train", busy)]
        with subprocess.Popen(words, cwd=ROOT, env=ENVIRONMENT, stdin=theirs, stdout=theirs, stderr=theirs) as process:
            os.close(theirs)
            wait_until(lambda: metrics.exists() and metrics.stat().st_size > 0)
            os.close(ours)
            if is_ignored:
                size = metrics.stat().st_size
                wait_until(lambda: metrics.stat().st_size > 2 * size)  # noqa: B023
                process.send_signal(signal.SIGTERM)
            code = process.wait(SECONDS)
        assert code == 128 + (signal.SIGTERM if is_ignored else signal.SIGHUP)
        lines = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
        lost = int(state_digests(busy / "results")["step"]) < lines[-1]
        account.add("a closed terminal", "under nohup" if is_ignored else "SIGHUP", cases=1, lost=lost)
        shutil.rmtree(busy / "results")


# --- torchrun is killed ------------------------------------------------------------------------------------


def start_two(words: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    """Starts a script on two processes by torchrun."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}"]
    with log.open("w") as file:
        return subprocess.Popen([*command, *words], cwd=ROOT, env=ENVIRONMENT, stdout=file, stderr=file)


def workers_of(process: subprocess.Popen[bytes]) -> list[int]:
    """Returns the ids of the processes that a torchrun has started."""
    path = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    wait_until(lambda: len(path.read_text().split()) == 2)
    return [int(word) for word in path.read_text().split()]


def is_running(number: int) -> bool:
    """Says whether a process, which may be nobody's child any more, runs."""
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["start", "imports", "train", "generate", "encode"])
def test_the_processes_of_a_killed_torchrun_end_soon_and_save(busy, account, is_long, stage):
    for number in range(2 if is_long else 1):
        log = busy / "log"
        process = start_two(words_of(stage, busy), log)
        workers = workers_of(process)
        if stage in ("start", "imports"):
            time.sleep(0.5 * (number + 1) if stage == "imports" else 0.0)
        else:
            wait_until(lambda: HAS_BEGUN[stage](busy, log.read_text()))  # noqa: B023
        process.kill()
        process.wait()
        wait_until(lambda: not any(map(is_running, workers)), seconds=30)  # noqa: B023
        said, lost = log.read_text(), False
        assert "Traceback" not in said and "error:" not in said, said
        if stage == "train":
            step = re.search(r"stopped by SIGTERM at step ([\d,]+); saved", said)
            lost = step is None or state_digests(busy / "results")["step"] != step[1].replace(",", "")
        for name in ("results", "made", "cache"):
            shutil.rmtree(busy / name, ignore_errors=True)
        account.add("kill -9 of torchrun", f"its processes: {stage}", cases=1, lost=lost)


# --- two trainings at once ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_of_two_equal_trainings_that_start_together_one_ends_and_the_other_is_as_if_alone(
    cached, trained, account, is_long
):
    words = [sys.executable, "train_latent_cfg.py", *pipeline.train_flags(cached, save_and_sample_every=2)]
    for number in range(6 if is_long else 3):
        both = []
        for delay in (0.0, 0.1 * (number % 4)):
            time.sleep(delay)
            both.append(subprocess.Popen(words, cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True))
        told = "".join(process.communicate(timeout=SECONDS)[1] for process in both)
        codes = sorted(process.returncode for process in both)
        assert codes == [0, 1] and told.count("error: another training saves in") == 1, (codes, told)
        assert_same_run(cached, trained)  # which finds a step that metrics.jsonl tells of twice, or not at all
        account.add("two equal trainings", "started together", cases=1)
        shutil.rmtree(cached / "results")
