"""Generates images of each class with a trained model, one folder per class.

    python generate.py --checkpoint results --images_per_class 50
    python generate.py --checkpoint results --classes ID_1 ID_7 --cond_scale 3
    python generate.py --checkpoint results --strip 1 1.5 2 3 4 6

An image depends on the checkpoint, the settings, its class and its number alone. Running it again makes only what is
missing.
"""

import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from gait_latents.common import cli, hardware
from gait_latents.common.console import say, warn
from gait_latents.common.distributed import Ranks, joined
from gait_latents.common.errors import Failed
from gait_latents.images import selection
from gait_latents.settings import GenerateSettings
from gait_latents.training.generation import Generator
from gait_latents.training.run_folder import read_averages
from gait_latents.training.trained_model import FROM_RUN

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until `main` begins, Ctrl-C ends without a traceback


if __name__ == "__main__":
    cli.check_command_line(GenerateSettings, __doc__)


@cli.command
def main(argv: Sequence[str] | None) -> int:
    """Runs the script; returns its exit code."""
    with joined() as ranks:
        try:
            with ranks.together():
                generator = open_generator(argv, ranks)
            ranks.check_same(generator.facts(), "start all with the same command, and let all see the same run")
            return generator.make_strip() if generator.settings.strip else generator.make_images()
        except torch.OutOfMemoryError as error:
            raise Failed(hardware.TOO_LITTLE_MEMORY) from error


def open_generator(argv: Sequence[str] | None, ranks: Ranks) -> "Generator":
    """Puts together flags, file, the settings of the run and the defaults, and reads the newest averaged weights."""
    layers = cli.read_command_line(GenerateSettings, argv, description=__doc__)
    state = read_averages(Path(cli.resolve(GenerateSettings, layers).settings.checkpoint))
    for line in state.warnings:
        warn(line)
    of_run = state.meta.chosen_settings(*FROM_RUN)
    layers.append(cli.stored_layer(GenerateSettings, f"run {state.path.parent}", of_run))
    resolved = cli.resolve(GenerateSettings, layers)
    settings: GenerateSettings = resolved.settings
    for line in resolved.changes():
        say(line)
    selection.refuse_to_be_a_class(Path(settings.output_folder), state.meta.settings.get("data_path"))
    device = hardware.pick_device(ranks.device_name(settings.device))
    ranks.say_unused(settings.device, "generate.py")
    generator = Generator(settings, state, device, ranks)
    say(generator.description)
    return generator


if __name__ == "__main__":
    sys.exit(main(None))
