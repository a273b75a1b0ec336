"""Trains a class-conditional latent diffusion model with classifier-free guidance.

    python train_latent_cfg.py
    python train_latent_cfg.py --vae_path kl_vae_best.pt --data_path Normal_line --max_hours 11.5

It reads the cache that preprocess_latents.py made, and encodes and caches what is missing there when it is first
needed. The same command goes on with a run that was stopped.
"""

import signal
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until `main` begins, Ctrl-C ends without a traceback
sys.path.append(str(Path(__file__).resolve().parent))  # which python -I and PYTHONSAFEPATH=1 leave out

from gait_latents.common.script import imports, run_script
from gait_latents.settings import TrainSettings


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the script; returns its exit code."""
    return run_script(TrainSettings, argv, __doc__, train)


def train(argv: Sequence[str] | None) -> int:
    """Settings, data, model, loop, end: the whole way of a training run."""
    with imports():
        from gait_latents.common.distributed import join_ranks
        from gait_latents.common.errors import DONE
        from gait_latents.training.loop import TrainingLoop
        from gait_latents.training.plan import is_finished, make_plan, pick_device, plain_errors
        from gait_latents.training.run_data import open_data
        from gait_latents.training.trainer import start_trainer

    with join_ranks() as ranks:  # this process among those that torchrun has started; mostly it is alone
        # Settings: flags, --config, the run that goes on, the manifest of the cache, defaults, in this order.
        plan = make_plan(argv, __doc__, ranks)
        if is_finished(plan, ranks):  # which needs neither cache nor images
            return DONE
        device = pick_device(plan, ranks)

        # Data: the split, the space of the cache, and a dataset that encodes what is missing when it is first needed.
        data = open_data(plan, device, ranks)

        # Model: the U-Net, its average and its optimizer, new or as they were saved.
        trainer = start_trainer(plan, data, device, ranks)

        # Loop: a step at a time, with log lines, saves and sample grids between them.
        with plain_errors(plan):
            with TrainingLoop(trainer, plan) as loop:
                while trainer.finished_steps < trainer.num_steps:
                    trainer.train_step()
                    loop.after_step()
                    reason = loop.reason_to_stop()
                    if reason is not None:
                        return loop.stop(reason)
            return loop.finish()


if __name__ == "__main__":
    sys.exit(main())
