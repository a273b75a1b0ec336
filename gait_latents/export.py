"""Exports the averaged U-Net of a run, for programs that do not have these modules.

    python -m gait_latents.export --checkpoint results --output_folder exported

Two files are written: model.safetensors, the weights under the names of denoising-diffusion-pytorch, and config.json,
all that is needed to build that U-Net and to sample from it. docs/python.md has the program that does so.

    python -m gait_latents.export --latents webdataset --output_folder shards

writes the latents of a cache as WebDataset shards, for trainings past one machine (docs/scale.md).
"""

import signal
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until `main` begins, Ctrl-C ends without a traceback

from gait_latents.common import cli
from gait_latents.common.errors import DONE
from gait_latents.common.process import rank
from gait_latents.common.script import imports, run_script
from gait_latents.settings import ExportSettings


def main(argv: Sequence[str] | None = None) -> int:
    """Exports a model or latents; returns the exit code. Of several processes of torchrun, the first does it all."""
    return DONE if rank() else run_script(ExportSettings, argv, __doc__, read_and_export, reads_images=False)


def read_and_export(argv: Sequence[str] | None) -> int:
    """Settings, averaged weights, files: the whole way from a run to an exported model, or from a cache to shards."""
    with imports():
        from gait_latents.latents import webdataset
        from gait_latents.training import exported_model, run_folder

    layers = cli.Layers(ExportSettings, argv, description=__doc__)
    if layers.settings.latents:
        given = layers.settings
        webdataset.export(
            Path(given.latents_cache_folder),
            Path(given.output_folder),
            rows_per_shard=given.rows_per_shard,
            seed=given.seed,
        )
        return DONE
    state = run_folder.read_averages(Path(layers.settings.checkpoint))
    layers.add(f"the run in {state.path.parent}", state.meta.chosen_settings("cond_scale", "guidance_interval"))
    exported_model.export(layers.resolve().settings, state)
    return DONE


if __name__ == "__main__":
    sys.exit(main())
