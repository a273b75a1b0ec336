"""Several processes train as one: the same steps, one who speaks and writes, and an end for all.

The processes are real: forked, which saves the imports, or started by torchrun. They talk through gloo.
"""

import hashlib
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import os_faults
import pipeline
import pytest
import tiny
import torch
from pipeline import HALF, STEPS, at_step, generate, losses, preprocess, signal_self, stored_moments, train, train_flags

import evaluate_images
import train_latent_cfg
from gait_latents import export
from gait_latents.common import distributed, errors, hardware
from gait_latents.common import process as this_process
from gait_latents.common.distributed import Ranks
from gait_latents.common.errors import UserError
from gait_latents.common.script import run_script
from gait_latents.diffusion.model import LatentDiffusion
from gait_latents.images.split import read_split
from gait_latents.latents import filling
from gait_latents.latents.dataset import LatentDataset
from gait_latents.settings import TrainSettings
from gait_latents.training import checkpoint, generation, run_folder
from gait_latents.training.grids import GridMaker
from gait_latents.training.loop import TrainingLoop
from gait_latents.vae.batch_encoder import BatchEncoder

ROOT = Path(__file__).resolve().parents[2]
Work = Callable[[int], int]  # rank -> exit code


class Company:
    """Forked processes that are the ranks of one run."""

    def __init__(self, folder: Path, work: Work, *, count: int = 2) -> None:
        self.logs = [folder / f"rank-{rank}.log" for rank in range(count)]
        place = {"WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
        self.processes = [os_faults.fork(lambda rank=rank: self._be(rank, place, work)) for rank in range(count)]

    def _be(self, rank: int, place: dict[str, object], work: Work) -> None:
        os.environ.update({name: str(value) for name, value in (place | {"RANK": rank}).items()})
        with self.logs[rank].open("w") as log, redirect_stdout(log), redirect_stderr(log):
            code = work(rank)
        os._exit(code)

    def end(self) -> tuple[list[int], list[str]]:
        """Waits for all; returns their exit codes, and what each of them printed."""
        codes = [os_faults.wait_for(process) for process in self.processes]
        return codes, [log.read_text() for log in self.logs]


def free_port() -> int:
    """Returns a port that nobody listens to just now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def train_on_two(world: Path, **changes: Any) -> tuple[list[int], list[str]]:
    """Runs train_latent_cfg.py as two processes."""
    return Company(world, lambda rank: train(world, **changes)).end()


def one_told(told: list[str]) -> str:
    """Returns the only error line; it is rank 0 that prints it, and the others print nothing."""
    assert not any(told[1:]), told[1:]
    lines = [line for line in told[0].splitlines() if line.startswith(("error", "warning", "Trace"))]
    assert len(lines) == 1 and lines[0].startswith("error: "), told[0]
    return lines[0]


def figures(world: Path) -> dict[str, float]:
    """Returns the loss, the gradient norm and the losses by timestep of each step that the metrics tell of."""
    rows = [json.loads(line) for line in (world / "results" / "metrics.jsonl").read_text().splitlines()]
    steps = {row["step"]: row for row in rows if "loss" in row}
    assert list(steps) == list(losses(world / "results"))
    return {
        f"{step} {name}": value
        for step, row in steps.items()
        for name, value in {"loss": row["loss"], "norm": row["grad_norm"], **row["loss_by_timestep"]}.items()
    }


def assert_alike(world: Path, other: Path) -> None:
    """Asserts that two runs ended alike within rounding."""
    # Adam takes the same step for gradients of twice the size: only their norm would tell.
    assert figures(world) == pytest.approx(figures(other), rel=1e-4, abs=1e-6)
    mine, expected = (run_folder.newest_state(root / "results") for root in (world, other))
    assert mine is not None and expected is not None and mine.step == expected.step
    for name, tensor in expected.tensors.items():
        if name.startswith(("model.", "ema.")):
            # Where a gradient is nearly nothing, Adam's first steps turn its rounding into a share of a step.
            assert torch.allclose(mine.tensors[name], tensor, atol=2e-4), name


@pytest.fixture(scope="module")
def on_two(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A world after a whole run on two processes from a complete cache; to be looked at only."""
    root = tmp_path_factory.mktemp("on_two") / "world"
    shutil.copytree(trained, root, ignore=shutil.ignore_patterns("results"))
    codes, told = train_on_two(root, num_samples=0)
    assert codes == [0, 0], told
    return root


# --- one training ------------------------------------------------------------------------------------------


def test_two_processes_train_as_one_and_encode_each_image_once(world, trained):
    codes, told = train_on_two(world, num_samples=1, encode_batch_size=2)
    assert codes == [0, 0], told
    assert told[1] == "" and "batch 4, 2 on each of 2 processes" in told[0]
    assert "15 images asked, 0 cached, 15 to encode before the first step" in told[0]
    assert told[0].count("of 3 samples are nearest") == 2
    assert_alike(world, trained)
    assert stored_moments(world / "latents_cache") == stored_moments(trained / "latents_cache")
    cache = pipeline.open_cache(world / "latents_cache")
    rows = [len(shard) for shard in cache._shards.values()]
    assert sorted(rows) == [7, 8]


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes(cached, trained):
    assert train(cached, train_num_steps=3, num_samples=0) == 0
    assert train_on_two(cached, train_num_steps=6, num_samples=0)[0] == [0, 0]
    assert train(cached, num_samples=0) == 0
    assert_alike(cached, trained)


@pytest.mark.slow
def test_accumulating_on_two_is_the_same_training_too_and_so_is_one_without_a_bad_image(world, tmp_path):
    (world / "data" / "ID_2" / "walk_0.jpg").write_bytes(b"no image")
    (world / "data" / "ID_2" / "walk_1.jpg").write_bytes(b"nor this one")
    alone = shutil.copytree(world, tmp_path / "alone")
    ways: dict[str, object] = {"skip_bad_images": "true", "num_samples": 0, "train_num_steps": HALF}
    assert train(alone, **ways, train_batch_size=8) == 0
    codes, told = train_on_two(world, **ways, train_batch_size=2, gradient_accumulate_every=4)
    assert codes == [0, 0], told
    assert "batch 8, 4 on each of 2 processes in passes of 2" in told[0]
    assert f"{15 - skipped(world)} images asked" in told[0] and skipped(world)
    assert_alike(world, alone)


def skipped(world: Path) -> int:
    """Counts the images that a run does without."""
    split = read_split(world / "results")
    assert split is not None
    return len(split.skipped)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_all_processes_end_with_the_same_numbers(cached, on_two, precision):
    """Weights, averages, loss scale and losses; an overflow in one process's half of a batch skips the step for all."""
    enter, finish = TrainingLoop.__enter__, TrainingLoop.finish

    def enter_with_a_large_scale(self: TrainingLoop) -> TrainingLoop:
        if precision == "float16":
            self.trainer.scaler = torch.amp.GradScaler(
                "cpu", init_scale=2.0**26
            )  # the first gradients overflow with it
        return enter(self)

    def finish_and_note(self: TrainingLoop) -> int:
        trainer = self.trainer
        tensors = [*trainer.diffusion.state_dict().values(), *trainer.ema.model.state_dict().values()]
        digest = hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in tensors))
        digest.update(str([trainer.scaler.state_dict(), trainer.losses, trainer.grad_norm]).encode())
        (cached / f"end-{os.environ['RANK']}").write_text(f"{digest.hexdigest()} {trainer.scaler.get_scale()}")
        return finish(self)

    def work(rank: int) -> int:
        TrainingLoop.__enter__, TrainingLoop.finish = enter_with_a_large_scale, finish_and_note
        return train(cached, precision=precision, num_samples=0, log_every=100)

    codes, told = Company(cached, work).end()
    assert codes == [0, 0], told
    ends = [(cached / f"end-{rank}").read_text() for rank in range(2)]
    assert ends[0] == ends[1]
    if precision == "float16":
        assert float(ends[0].split()[1]) < 2.0**26
    else:  # and the same run twice has the same bits
        digests = [pipeline.state_digests(root / "results") for root in (cached, on_two)]
        weights = [{name: d for name, d in one.items() if not name.startswith("log.")} for one in digests]
        assert weights[0] == weights[1]


@pytest.mark.slow
def test_what_is_deterministic_is_so_from_the_first_encoded_image_on(world, monkeypatch):
    """On a GPU torch looks once, at its first matrix product, whether cuBLAS was told to be."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    encode = BatchEncoder.__call__

    def encode_and_note(encoder: BatchEncoder, images: torch.Tensor) -> torch.Tensor:
        facts = (torch.are_deterministic_algorithms_enabled(), os.environ.get("CUBLAS_WORKSPACE_CONFIG"))
        (world / f"found-{os.environ['RANK']}").write_text(str(facts))
        return encode(encoder, images)

    monkeypatch.setattr(BatchEncoder, "__call__", encode_and_note)
    codes, told = train_on_two(world, num_samples=0, train_num_steps=2, deterministic="true")
    assert codes == [0, 0], told
    assert [(world / f"found-{rank}").read_text() for rank in range(2)] == ["(True, ':4096:8')"] * 2


@pytest.mark.slow
def test_a_process_with_another_disk_that_takes_no_files_encodes_for_itself(world, trained):
    def work(rank: int) -> int:
        elsewhere = {"latents_cache_folder": "/proc/nowhere"} if rank else {}
        return train(world, num_samples=0, **elsewhere)

    codes, told = Company(world, work).end()
    assert codes == [0, 0] and told[1] == "", told
    assert_alike(world, trained)
    assert len(stored_moments(world / "latents_cache")) == 15


@pytest.mark.slow
def test_a_process_that_lacks_nothing_waits_for_one_that_does_however_long_it_takes(world, trained, monkeypatch):
    """The exchange after the encoding has a limit of time; the encoding has none."""
    monkeypatch.setattr(distributed, "_ANSWER_SECONDS", 2.0)
    encode = BatchEncoder.__call__

    def encode_slowly(encoder: BatchEncoder, images: torch.Tensor) -> torch.Tensor:
        time.sleep(0.5)
        return encode(encoder, images)

    monkeypatch.setattr(BatchEncoder, "__call__", encode_slowly)

    def work(rank: int) -> int:
        full = {"latents_cache_folder": trained / "latents_cache"} if rank else {}
        return train(world, num_samples=0, encode_batch_size=2, **full)

    started = time.monotonic()
    codes, told = Company(world, work).end()
    assert codes == [0, 0] and told[1] == "", told
    assert time.monotonic() - started < 60  # and not the patience with a process that is silent
    assert_alike(world, trained)


@pytest.mark.slow
def test_what_a_dead_process_leaves_is_encoded_by_the_others(world, monkeypatch):
    """Without torchrun nobody tells of its death before the next exchange."""
    monkeypatch.setattr(distributed, "_PATIENCE_SECONDS", 0.2)

    def work(rank: int) -> int:
        if rank:
            filling.fill_together = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment]
        return train(world, num_samples=0)

    codes, told = Company(world, work).end()
    assert codes == [1, -signal.SIGKILL]
    assert "another process of this run has ended" in one_told(told)
    assert len(pipeline.open_cache(world / "latents_cache")) == 15


def test_preprocessing_is_shared_and_its_cache_is_that_of_one_process(world, trained):
    (world / "data" / "ID_2" / "more.jpg").write_bytes((world / "data" / "ID_2" / "walk_0.jpg").read_bytes()[:200])
    whole: dict[str, object] = {"images_per_user": "all", "skip_bad_images": "true"}
    codes, told = Company(world, lambda rank: preprocess(world, **whole)).end()
    assert codes == [0, 0] and told[1] == "", told
    account = "newly encoded   24 already cached 0 failed 1 ID_2/more.jpg: "
    assert " ".join(account.split()) in " ".join(told[0].split())
    assert preprocess(world, **whole, output_folder=world / "alone") == 0
    assert stored_moments(world / "latents_cache") == stored_moments(world / "alone")
    assert (world / "latents_cache" / "split.json").read_bytes() == (world / "alone" / "split.json").read_bytes()
    assert (world / "latents_cache" / "preview.png").read_bytes() == (world / "alone" / "preview.png").read_bytes()
    assert len(list((world / "latents_cache").rglob("*.safetensors"))) == 1


def test_a_signal_to_one_encoder_ends_all_and_keeps_what_is_encoded(world, monkeypatch):
    encode = BatchEncoder.__call__

    def encode_and_signal(encoder: BatchEncoder, images: torch.Tensor) -> torch.Tensor:
        if os.environ.get("RANK") == "1":
            signal_self(signal.SIGTERM)()
        return encode(encoder, images)

    monkeypatch.setattr(BatchEncoder, "__call__", encode_and_signal)
    codes, told = Company(world, lambda rank: preprocess(world, encode_batch_size=2)).end()
    assert codes == [143, 143], told
    assert told[1] == "" and "new latents are kept" in told[0]
    monkeypatch.undo()
    assert preprocess(world) == 0
    assert len(pipeline.open_cache(world / "latents_cache")) == 15


@pytest.mark.slow
@pytest.mark.parametrize("command", [train, preprocess])
def test_a_process_that_cannot_encode_its_share_ends_all_at_once(world, monkeypatch, command):
    """And none does its work meanwhile, nor goes on to what comes after it."""
    fill = LatentDataset.fill

    def fill_or_fail(dataset: LatentDataset, *args: Any, **kwargs: Any) -> object:
        if os.environ["RANK"] == "1":
            raise OSError(28, "No space left on device")
        return fill(dataset, *args, **kwargs)

    monkeypatch.setattr(LatentDataset, "fill", fill_or_fail)
    codes, told = Company(world, lambda rank: command(world, encode_batch_size=2)).end()
    assert codes == [1, 1]
    assert "No space left on device" in one_told(told) and "(in process 1)" in one_told(told)
    monkeypatch.undo()
    assert not (world / "latents_cache" / "manifest.json").exists()
    left = re.search(r"(\d+) to encode", os_faults.said(lambda: preprocess(world))[1])
    assert left is not None and 7 <= int(left[1]) < 15  # the share of the other, and what was in memory is kept


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2])
def test_a_signal_after_the_last_image_is_not_lost(world, monkeypatch, count):
    close = LatentDataset.close_encoder

    def close_and_signal(dataset: LatentDataset) -> None:
        close(dataset)
        if this_process.rank() == count - 1:
            signal_self(signal.SIGTERM)()

    monkeypatch.setattr(LatentDataset, "close_encoder", close_and_signal)
    codes, told = Company(world, lambda rank: preprocess(world), count=count).end()
    assert codes == [143] * count
    assert "new latents are kept" in told[0] and not (world / "latents_cache" / "manifest.json").exists()


@pytest.mark.parametrize("dies", [False, True])
def test_generating_is_shared_and_its_files_are_those_of_one_process(trained, tmp_path, monkeypatch, dies):
    monkeypatch.setattr(distributed, "_PATIENCE_SECONDS", 0.2 if dies else 60.0)

    def work(rank: int) -> int:
        if rank:
            sample = generation.Generator.sample

            def note(generator: Any, labels: list[int], *facts: Any, **more: Any) -> torch.Tensor:
                if dies:
                    os.kill(os.getpid(), signal.SIGKILL)
                (tmp_path / "share").write_text(str(len(labels)))
                return sample(generator, labels, *facts, **more)

            generation.Generator.sample = note  # type: ignore[assignment]
        return generate(trained, output_folder=tmp_path / "two", images_per_class=3)

    codes, told = Company(tmp_path, work).end()
    assert codes == [0, -signal.SIGKILL if dies else 0] and told[1] == "", told
    assert "9 images made" in told[0]
    assert dies or (tmp_path / "share").read_text() == "4"
    assert generate(trained, output_folder=tmp_path / "one", images_per_class=3) == 0
    two, one = (
        {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.*")}
        for folder in (tmp_path / "two", tmp_path / "one")
    )
    assert two == one and len(one) == 9 + 3


@pytest.mark.slow
def test_two_processes_begin_with_the_training_images_that_one_begins_with(trained, tmp_path):
    how: dict[str, Any] = {"images_per_class": 3, "from_real": 0.5}
    codes, told = Company(tmp_path, lambda rank: generate(trained, output_folder=tmp_path / "two", **how)).end()
    assert codes == [0, 0] and told[1] == "", told
    assert generate(trained, output_folder=tmp_path / "one", **how) == 0
    two, one = (
        {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.*")}
        for folder in (tmp_path / "two", tmp_path / "one")
    )
    assert two == one and len(one) == 9 + 3


@pytest.mark.slow
def test_what_fails_in_one_process_between_the_exchanges_is_told_by_the_first(trained, tmp_path, monkeypatch):
    sample = generation.Generator.sample

    def sample_or_fail(generator: Any, *facts: Any, **more: Any) -> torch.Tensor:
        if os.environ["RANK"] == "1":
            raise OSError(28, "No space left on device")
        time.sleep(1)
        return sample(generator, *facts, **more)

    monkeypatch.setattr(generation.Generator, "sample", sample_or_fail)
    codes, told = Company(tmp_path, lambda rank: generate(trained, output_folder=tmp_path / "made")).end()
    assert codes == [1, 1]
    assert one_told(told) == "error: No space left on device (in process 1)"


@pytest.mark.slow
def test_a_process_speaks_for_itself_where_the_first_does_not(tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "_LAST_WORDS_SECONDS", 0.1)

    def work(_argv: object) -> int:
        with distributed.join_ranks() as company:
            company.tell("joined")  # else rank 0 might still be looking for the other when that has gone
            company.await_end("joined", lambda: None)
            if company.rank:
                raise errors.Failed("the disk is full")
            time.sleep(2)
        return 0

    codes, told = Company(tmp_path, lambda rank: run_script(TrainSettings, [], "Trains.", work)).end()
    assert codes[1] == 1 and told[1] == "error: process 1: the disk is full\n"


@pytest.mark.slow
def test_torch_tells_nothing_of_a_store_that_goes_with_the_first_process(cached, monkeypatch, capfd):
    monkeypatch.setattr(distributed, "_LOOK_SECONDS", 3.0)  # on a busy machine
    codes, told = Company(cached, lambda rank: train(cached, seed=rank)).end()
    assert codes == [2, 2] and "process 1 has --seed 1, process 0 has 0" in one_told(told)
    assert capfd.readouterr() == ("", "")


# --- ends --------------------------------------------------------------------------------------------------


def test_a_signal_to_one_process_saves_once_and_ends_all(cached, trained, monkeypatch):
    at_step(monkeypatch, 5, lambda: signal_self(signal.SIGTERM)() if os.environ.get("RANK") == "1" else None)
    codes, told = train_on_two(cached, num_samples=0)
    assert codes == [143, 143], told
    assert told[1] == "" and "stopped by SIGTERM at step 5; saved" in told[0]
    state = run_folder.newest_state(cached / "results")
    assert state is not None and state.step == 5
    monkeypatch.undo()
    assert train(cached, num_samples=0) == 0
    assert_alike(cached, trained)


def test_a_killed_process_ends_the_other_and_the_run_goes_on(cached, on_two, monkeypatch):
    with monkeypatch.context() as patch:
        at_step(patch, HALF + 2, lambda: signal_self(signal.SIGKILL)() if os.environ.get("RANK") == "1" else None)
        started = time.monotonic()
        codes, told = train_on_two(cached, num_samples=0)
        assert time.monotonic() - started < 60
    assert codes == [1, -signal.SIGKILL]
    assert "another process of this run has ended or cannot be reached" in one_told(told)
    state = run_folder.newest_state(cached / "results")
    assert state is not None and state.step == HALF
    codes, told = train_on_two(cached, num_samples=0)
    assert codes == [0, 0], told
    pipeline.assert_same_run(cached, on_two)


class SlowGrid:
    """Makes the first grid of a run take long, and signs of life in it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(distributed, "_ANSWER_SECONDS", 1.0)
        make = GridMaker.make

        def make_slowly(maker: GridMaker, step: int, *, between: Callable[[], None]) -> None:
            for _ in range(25 if step == HALF else 0):
                between()
                time.sleep(0.1)
            make(maker, step, between=between)

        monkeypatch.setattr(GridMaker, "make", make_slowly)


@pytest.mark.slow
def test_the_others_wait_for_a_grid_however_long_it_takes(cached, trained, monkeypatch):
    """The exchange after it has a limit of time; the grid has none."""
    SlowGrid(monkeypatch)
    codes, told = train_on_two(cached, num_samples=1)
    assert codes == [0, 0] and told[1] == "", told
    assert_alike(cached, trained)


@pytest.mark.slow
def test_a_signal_to_one_process_cuts_the_grid_of_rank_0_short(cached, monkeypatch):
    SlowGrid(monkeypatch)
    wait = Ranks.while_main_works

    def signal_and_wait(company: Ranks, topic: str, between: Callable[[], object]) -> Any:
        if company.rank == 1:
            signal_self(signal.SIGTERM)()
        return wait(company, topic, between)

    monkeypatch.setattr(Ranks, "while_main_works", signal_and_wait)
    codes, told = train_on_two(cached, num_samples=1)
    assert codes == [143, 143]
    assert f"step {HALF}: no sample grid, since a signal came" in told[0]
    assert f"stopped by SIGTERM at step {HALF}; saved" in told[0] and told[1] == ""


@pytest.mark.slow
@pytest.mark.parametrize("asked", ["true", "auto"])
@pytest.mark.parametrize("failing", [0, 1])
def test_what_cannot_be_compiled_in_one_process_is_not_compiled_in_any(cached, trained, monkeypatch, asked, failing):
    class CompilerError(Exception):  # Triton's are no RuntimeErrors
        __module__ = "triton.compiler.errors"

    def compile_or_fail(network: LatentDiffusion, **_: object) -> Callable[..., torch.Tensor]:
        def fail(*_: object, **__: object) -> torch.Tensor:
            raise CompilerError("no such register")

        return fail if os.environ["RANK"] == str(failing) else lambda *args, **kwargs: network(*args, **kwargs)

    def finish_and_note(self: TrainingLoop) -> int:
        (cached / f"compiled-{os.environ['RANK']}").write_text(str(self.trainer.is_compiled))
        return finish(self)

    finish = TrainingLoop.finish
    monkeypatch.setattr(TrainingLoop, "finish", finish_and_note)
    monkeypatch.setattr(hardware, "COMPILED_STEPS", 1)
    monkeypatch.setattr(hardware, "why_not_compile", lambda device: None)
    monkeypatch.setattr(torch, "compile", compile_or_fail)
    codes, told = train_on_two(cached, num_samples=0, compile=asked)
    if asked == "true":
        assert codes == [1, 1]
        assert "the network cannot be compiled (no such register); give --compile false" in one_told(told)
    else:
        assert codes == [0, 0] and told[1] == ""
        assert told[0].count("the network cannot be compiled, and trains without (no such register)") == 1
        assert [(cached / f"compiled-{rank}").read_text() for rank in range(2)] == ["False", "False"]
        assert_alike(cached, trained)


@pytest.mark.slow
@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize("module", ["torch._inductor.exc", "torch"])
def test_a_compiled_network_that_fails_later_in_one_process_ends_all(cached, on_two, monkeypatch, failing, module):
    class BackendError(RuntimeError):
        __module__ = module

    def compile_for_a_while(network: LatentDiffusion, **_: object) -> Callable[..., torch.Tensor]:
        calls: list[int] = []

        def work(*args: Any, **facts: Any) -> torch.Tensor:
            calls.append(1)
            if os.environ["RANK"] == str(failing) and len(calls) == 3:
                raise BackendError("no such register")
            return network(*args, **facts)

        return work

    with monkeypatch.context() as patch:
        patch.setattr(hardware, "why_not_compile", lambda device: None)
        patch.setattr(torch, "compile", compile_for_a_while)
        started = time.monotonic()
        codes, told = train_on_two(cached, num_samples=0, compile="true")
        assert time.monotonic() - started < 60
    assert codes == [1, 1]
    if module == "torch":  # no failure that we know: its process ends with a traceback
        assert told[1] == "" and (failing == 0 or "another process of this run has ended" in one_told(told))
    else:
        where = " (in process 1)" if failing else ""
        remedy = "give --compile false, and the same command goes on from the last save"
        assert one_told(told) == f"error: the compiled network has failed (no such register); {remedy}{where}"
    state = run_folder.newest_state(cached / "results")
    assert state is not None and state.step == 1
    codes, told = train_on_two(cached, num_samples=0)
    assert codes == [0, 0], told
    pipeline.assert_same_run(cached, on_two)


@pytest.mark.slow
def test_a_failed_save_ends_all_with_one_sentence(cached, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save", fail)
    codes, told = train_on_two(cached, num_samples=0)
    assert codes == [1, 1]
    assert "the checkpoint of step 1 could not be saved" in one_told(told)


def test_the_time_budget_is_that_of_rank_0(cached):
    codes, told = Company(cached, lambda rank: train(cached, num_samples=0, max_hours=1e-5)).end()
    assert codes == [0, 0] and "stopped after --max_hours 1e-05 at step 1; saved" in told[0]


# --- what does not fit together ----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"train_lr": 0.5}, "process 1 has --train_lr 0.5, process 0 has 0.001; start all with the same command"),
        ({"dim": "x"}, "(in process 1)"),
        ({"data_path": "other"}, "process 1 has images and labels of the digest "),
        ({"both": 3}, "a step sees 3 latents (--train_batch_size 3 times --gradient_accumulate_every 1)"),
    ],
)
def test_processes_that_do_not_fit_together_end_with_one_sentence(cached, changes, sentence):
    if "data_path" in changes:
        shutil.copytree(cached / "data", cached / "other")
        shutil.copy(cached / "data" / "ID_1" / "walk_0.jpg", cached / "other" / "ID_1" / "walk_1.jpg")
        changes = {"data_path": cached / "other", "images_per_user": "all"}
    every = {"train_batch_size": changes["both"]} if "both" in changes else {}
    every |= {"images_per_user": "all"} if "images_per_user" in changes else {}

    def work(rank: int) -> int:
        return train(cached, num_samples=0, **(every | (changes if rank and not every.get("train_batch_size") else {})))

    codes, told = Company(cached, work).end()
    assert codes == [2, 2], told
    assert sentence in one_told(told)
    assert not (cached / "results").exists()


@pytest.mark.slow
def test_processes_that_go_on_from_other_states_of_one_step_end_with_one_sentence(cached, trained):
    shutil.copytree(trained / "results", cached / "results")
    assert train(cached, results_folder=cached / "others", num_samples=0, train_num_steps=HALF) == 0
    assert train(cached, results_folder=cached / "others", num_samples=0) == 0

    def work(rank: int) -> int:
        return train(cached, train_num_steps=STEPS + 1, results_folder=cached / ("others" if rank else "results"))

    codes, told = Company(cached, work).end()
    assert codes == [2, 2] and "process 1 has a saved state of the digest " in one_told(told)


def test_the_first_of_several_processes_prints_the_help_and_exports(trained, tmp_path, monkeypatch):
    def ask_for_help(rank: int) -> int:
        monkeypatch.setattr(sys, "argv", ["train_latent_cfg.py", "--help"])
        with pytest.raises(SystemExit) as end:
            sys.exit(train_latent_cfg.main())
        return end.value.code  # type: ignore[return-value]

    codes, told = Company(tmp_path, ask_for_help).end()
    assert codes == [0, 0] and told[0].count("usage: ") == 1 and told[1] == ""
    exports: dict[str, object] = {"checkpoint": trained / "results", "output_folder": tmp_path / "exported"}
    codes, told = Company(tmp_path, lambda rank: export.main(tiny.flags(exports))).end()
    assert codes == [0, 0] and "a U-Net of" in told[0] and told[1] == ""
    exports["checkpoint"] = tmp_path / "nowhere"
    codes, told = Company(tmp_path, lambda rank: export.main(tiny.flags(exports))).end()
    assert codes == [2, 0] and "--checkpoint" in one_told(told)


@pytest.mark.slow
@pytest.mark.parametrize("work", ["verify", "prune"])
def test_what_cannot_be_shared_is_refused_by_one_sentence_and_does_nothing(trained, tmp_path, work):
    before = {path: path.stat().st_mtime_ns for path in trained.rglob("*")}
    codes, told = Company(tmp_path, lambda rank: preprocess(trained, **{work: "true"})).end()
    assert codes == [2, 2]
    assert one_told(told) == f"error: --{work} is for one process; start it without torchrun"
    assert before == {path: path.stat().st_mtime_ns for path in trained.rglob("*")}


def test_an_evaluation_by_several_processes_is_refused_by_one_sentence_and_writes_nothing(trained, tmp_path):
    asked: dict[str, object] = {"checkpoint": trained / "results", "synthetic_path": trained / "data"}
    flags = tiny.flags({**asked, "output_folder": tmp_path / "evaluation", "device": "cpu"})
    codes, told = Company(tmp_path, lambda rank: evaluate_images.main(flags)).end()
    assert codes == [2, 2]
    assert one_told(told) == "error: evaluate_images.py is for one process; start it without torchrun"
    assert not (tmp_path / "evaluation").exists()


@pytest.mark.slow
def test_the_first_of_several_processes_draws_the_strip(trained, tmp_path):
    strip: dict[str, object] = {"strip": [1, 2], "output_folder": tmp_path / "strip"}
    codes, told = Company(tmp_path, lambda rank: generate(trained, **strip)).end()
    assert codes == [0, 0] and told[1] == "" and told[0].count("classes from top to bottom") == 1, told
    drawn = (tmp_path / "strip" / "strip.png").read_bytes()
    assert generate(trained, **strip) == 0 and (tmp_path / "strip" / "strip.png").read_bytes() == drawn


@pytest.mark.parametrize(("waiting", "reason"), [(0, "no sign of it"), (1, "Connection refused")])
def test_a_process_without_its_partner_says_whom_it_waits_for_and_gives_up(monkeypatch, tmp_path, waiting, reason):
    for name, seconds in (("_JOIN_SECONDS", 1.0), ("_FIRST_NEWS_SECONDS", 0.1), ("_NEWS_SECONDS", 0.4)):
        monkeypatch.setattr(distributed, name, seconds)
    codes, told = Company(tmp_path, lambda rank: train(tmp_path) if rank == waiting else 0).end()
    assert codes[waiting] == 1
    *news, end = told[waiting].splitlines()
    who, other = "process 1: " * waiting, 1 - waiting
    assert 2 <= len(news) <= 3
    for line in news:
        assert re.fullmatch(
            rf"{who}waiting at 127\.0\.0\.1:\d+ for process {other} of 2, 0\.\d s at most; unset WORLD_SIZE to work "
            "without others",
            line,
        )
    assert end.startswith(f"error: {who}process {waiting} of 2 does not find the others at 127.0.0.1:")
    assert f"waited 1.0 s for process {other} of 2: {reason}); start them with torchrun" in end.replace(
        "1.1 s", "1.0 s"
    )


def test_processes_that_come_together_soon_say_nothing_of_waiting(on_two, tmp_path):
    codes, told = Company(tmp_path, lambda rank: generate(on_two, output_folder=tmp_path / "made"), count=3).end()
    assert codes == [0, 0, 0], told
    assert "waiting" not in "".join(told)


def test_a_process_takes_the_gpu_of_its_number(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [Ranks(rank, 4, rank % 2).device_name("auto") for rank in range(4)] == ["cuda:0", "cuda:1"] * 2
    assert Ranks(1, 2, 1).device_name("cpu") == "cpu" and Ranks().device_name("cuda:1") == "cuda:1"
    with pytest.raises(UserError, match=r"3 processes were started on a machine with 2 GPU"):
        Ranks(2, 3, 2).device_name("cuda")
    with pytest.raises(UserError, match="--device cuda:1 is one device, and there are 2 processes"):
        Ranks(0, 2, 0).device_name("cuda:1")


@pytest.mark.parametrize(
    ("place", "share"),
    [({}, 1), ({"WORLD_SIZE": 4, "LOCAL_WORLD_SIZE": 2}, 2), ({"WORLD_SIZE": 4}, 4), ({"LOCAL_WORLD_SIZE": 2}, 1)],
)
def test_each_process_plans_with_its_share_of_the_memory_of_its_machine(trained, monkeypatch, place, share):
    dataset = LatentDataset.open(trained / "latents_cache")
    table = 2 * len(dataset) * math.prod(dataset.moments_shape)  # bytes, in float16
    for name, value in place.items():
        monkeypatch.setenv(name, str(value))
    for free, expected in ((2 * table * share + share, "cpu"), (2 * table * share, "shards")):
        monkeypatch.setattr(hardware, "_free_host_bytes", lambda free=free: free)
        assert LatentDataset.open(trained / "latents_cache").place == expected


def test_a_gpu_that_is_not_used_is_told_of(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    Ranks(0, 2, 0).say_unused("auto", "generate.py")
    Ranks().say_unused("cuda:0", "generate.py")
    assert capsys.readouterr().out == ""
    Ranks().say_unused("auto", "generate.py")
    said = "one of 2 GPUs is used; torchrun --nproc_per_node=2 generate.py, with the same flags, uses them all\n"
    assert capsys.readouterr().out == said


def test_each_script_that_several_gpus_speed_up_tells_of_one_that_is_not_used(
    cached, trained, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert train(cached, device="auto", train_num_steps=1) == preprocess(cached, device="auto") == 0
    assert generate(trained, device="auto", output_folder=tmp_path / "synthetic", images_per_class=1) == 0
    said = capsys.readouterr().out
    for name in ("preprocess_latents.py", "generate.py"):
        assert said.count(f"torchrun --nproc_per_node=2 {name}, with the same flags") == 1
    assert said.count("GPUs is used") == 2


# --- torchrun ----------------------------------------------------------------------------------------------


def torchrun(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run([*command, *words], env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_the_first_process_has_the_last_word_although_torchrun_ends_all_when_one_fails(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        """
import sys, time
from gait_latents.common import distributed, errors, script
from gait_latents.settings import TrainSettings

def work(argv):
    with distributed.join_ranks() as company:
        try:
            with company.together():
                if company.is_main:
                    raise errors.Failed("the disk is full")
        finally:
            time.sleep(3 if company.is_main else 0)  # as a tracker that ends

sys.exit(script.run_script(TrainSettings, [], "Trains.", work))
"""
    )
    ended = torchrun(str(program))
    assert ended.returncode == 1
    assert ended.stderr.count("error: the disk is full") == 1, ended.stderr


def test_each_attempt_of_a_torchrun_on_one_machine_has_keys_of_its_own(monkeypatch):
    for name, value in {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "TORCHELASTIC_RESTART_COUNT": 1}.items():
        monkeypatch.setenv(name, str(value))
    assert distributed._attempt() == "attempt 1"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert distributed._attempt() == "attempt 0"


@pytest.mark.slow
def test_torchrun_starts_them_and_again_after_a_kill_and_the_run_ends_in_the_same_bits(cached, on_two):
    name, program = ROOT / "train_latent_cfg.py", cached / "program.py"
    program.write_text(
        f"""
import os, runpy, signal
from gait_latents.common.distributed import Ranks

agree, steps = Ranks.agree_to_stop, []

def agree_or_die(company, *facts):
    steps.append(1)
    if (os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"], len(steps)) == ("1", "0", {HALF + 1}):
        os.kill(os.getpid(), signal.SIGKILL)
    return agree(company, *facts)

Ranks.agree_to_stop = agree_or_die
runpy.run_path({str(name)!r}, run_name="__main__")
"""
    )
    ended = torchrun("--max_restarts=1", str(program), *train_flags(cached, num_samples=0))
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count(f"going on from step {HALF} of ") == 1 and ended.stdout.count("done: 8 steps") == 1
    pipeline.assert_same_run(cached, on_two)
