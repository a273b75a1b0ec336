"""Trains a class-conditional latent diffusion model with classifier-free guidance.

    python train_latent_cfg.py
    python train_latent_cfg.py --vae_path kl_vae_best.pt --data_path Normal_line --max_hours 11.5

It reads the cache that preprocess_latents.py made, and encodes and caches what is missing there when it is first
needed. The same command goes on with a run that was stopped.
"""

import signal
import sys
from collections.abc import Sequence

from gait_latents.common import cli, files, hardware
from gait_latents.common.distributed import Ranks, joined
from gait_latents.common.errors import DONE
from gait_latents.settings import TrainSettings
from gait_latents.training.loop import plain_errors, run
from gait_latents.training.plan import (
    check_results_folder,
    check_share,
    facts_of_data,
    facts_of_plan,
    is_finished,
    make_plan,
)
from gait_latents.training.run_data import fill, open_data, write_cache_defaults
from gait_latents.training.trainer import Trainer

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until `main` begins, Ctrl-C ends without a traceback


if __name__ == "__main__":
    cli.check_command_line(TrainSettings, __doc__)


@cli.command
def main(argv: Sequence[str] | None) -> int:
    """Runs the script; returns its exit code."""
    with joined() as ranks:
        return train(argv, ranks)


def train(argv: Sequence[str] | None, ranks: Ranks) -> int:
    """Plans, opens the data, trains; what can be wrong before the first step is told once, whoever finds it."""
    with ranks.together():
        plan = make_plan(argv)
        check_share(plan.settings, ranks)
        files.remove_stale_temporaries(plan.results)
        facts = facts_of_plan(plan)
    ranks.check_same(facts, "start all with the same command, and let all see the same --results_folder")
    with ranks.together():
        if is_finished(plan):  # which needs neither cache nor images
            return DONE
        if plan.settings.deterministic:
            hardware.make_deterministic()
        device = hardware.pick_device(ranks.device_name(plan.settings.device))
        if ranks.is_main:
            check_results_folder(plan)
    ranks.use(device)
    ranks.say_unused(plan.settings.device, "train_latent_cfg.py")
    with ranks.together(), plain_errors(plan):
        data = open_data(plan, device, ranks)
    ranks.check_same(facts_of_data(data, device), "give all the same images, VAE and packages, and one kind of device")
    with ranks.together(), plain_errors(plan):
        if ranks.count > 1:
            fill(data.dataset, ranks)
        trainer = Trainer(plan.settings, data, device, ranks)
        if ranks.is_main:
            write_cache_defaults(plan, data)
        trainer.start(plan)
    trainer.begin_alike()
    with plain_errors(plan):
        return run(trainer, plan)


if __name__ == "__main__":
    sys.exit(main(None))
