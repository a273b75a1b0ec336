"""Times a training step on two processes of one thread each against one process of one thread.

    python benchmarks/bench_ranks.py

Two cores at least should be free. Both train the default network on as many latents; the table also tells what the
exchange alone takes: the sum of the gradients, and the agreements that a step ends with.
"""

import argparse
import os
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bench_train
import harness
from harness import Round

ONE, TWO = "one process", "two processes"
_EXCHANGES = 50
Action = Callable[[], object]


def main() -> None:
    """Compares one process with two."""
    arguments = harness.read_arguments(
        "Time steps on two processes.", steps=(2, "steps in a round"), images=(310, "latents in the training set")
    )
    arguments.threads = 1
    if not arguments.worker:
        harness.compare(__file__, [ONE, TWO], arguments, "step")
    elif arguments.worker == ONE or not start_second():
        serve(arguments)
    else:
        follow(arguments)


def start_second() -> bool:
    """Starts the second process as a copy of this one; says whether this is it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free.getsockname()[1]), WORLD_SIZE="2")
    is_second = os.fork() == 0
    os.environ["RANK"] = str(int(is_second))
    return is_second


def serve(arguments: argparse.Namespace) -> None:
    """Answers the harness, as rank 0 or alone."""
    from gait_latents.common.distributed import join_ranks

    facts: dict[str, float] = {}
    with join_ranks() as ranks, tempfile.TemporaryDirectory() as folder:

        def prepare() -> Round:
            step, exchange = set_up(arguments, Path(folder), ranks, on_one_thread())
            facts["s of that exchanged"] = median_seconds(step, exchange)

            def work() -> int:
                ranks.of_main("go on")
                for _ in range(arguments.steps):
                    step()
                return arguments.steps

            return work

        harness.serve(prepare, lambda: facts)
        ranks.of_main("end")


def follow(arguments: argparse.Namespace) -> None:
    """Takes part in each round, as rank 1."""
    from gait_latents.common.distributed import join_ranks

    with join_ranks() as ranks, tempfile.TemporaryDirectory() as folder:
        step, exchange = set_up(arguments, Path(folder), ranks, on_one_thread())
        median_seconds(step, exchange)
        while ranks.of_main("") == "go on":
            for _ in range(arguments.steps):
                step()


def median_seconds(step: Action, exchange: Action) -> float:
    """Times the exchange alone, after a step that leaves gradients to add up."""
    step()
    taken = []
    for _ in range(_EXCHANGES):
        harness.wait_for_device()
        started = time.perf_counter()
        exchange()
        harness.wait_for_device()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def on_one_thread() -> Any:
    """Returns the CPU as a device, on which this process computes with one thread from now on."""
    import torch

    torch.set_num_threads(1)
    return torch.device("cpu")


def set_up(arguments: argparse.Namespace, folder: Path, ranks: Any, device: Any) -> tuple[Action, Action]:
    """Builds the trainer; returns a step as the loop takes it, and what of it the processes exchange."""
    import torch

    trainer = bench_train.make_trainer(arguments, folder, device, ranks, compile="false")

    def agree() -> None:
        with ranks.together():
            trainer.losses, trainer.sample_losses = [], []
        ranks.agree_to_stop(None, False)

    def step() -> None:
        trainer.train_step()
        agree()

    def exchange() -> None:
        zero = torch.zeros((), device=device)
        ranks.add_up(trainer.diffusion, zero, zero.expand(2, trainer.batch).clone())
        agree()

    return step, exchange


if __name__ == "__main__":
    sys.exit(main())
