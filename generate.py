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

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until `main` begins, Ctrl-C ends without a traceback
sys.path.append(str(Path(__file__).resolve().parent))  # which python -I and PYTHONSAFEPATH=1 leave out

from gait_latents.common.script import imports, run_script
from gait_latents.settings import GenerateSettings


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the script; returns its exit code."""
    return run_script(GenerateSettings, argv, __doc__, generate)


def generate(argv: Sequence[str] | None) -> int:
    """Settings, model, images: the whole way from a run to a folder of images."""
    with imports():
        from gait_latents.common.distributed import join_ranks
        from gait_latents.common.hardware import plain_memory_error
        from gait_latents.training.generation import open_generator

    with join_ranks() as ranks, plain_memory_error():  # torchrun may have started several processes
        # Settings: flags, --config, the run, defaults. Model: the newest averaged weights, and the VAE's decoder.
        generator = open_generator(argv, __doc__, ranks)

        # Images: what is missing in the output folder, each made from its class and number, decoded and written.
        return generator.make_strip() if generator.settings.strip else generator.make_images()


if __name__ == "__main__":
    sys.exit(main())
