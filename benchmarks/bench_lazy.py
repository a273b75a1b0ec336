"""Times the two ways to a trained model: encode first and then train an epoch, or encode in the first epoch.

    python benchmarks/bench_lazy.py

Both run the real scripts, called in a process that has its imports done, on the same JPGs and with the same VAE of
random weights and the usual width. Every round starts from an empty cache and an empty results folder.
"""

import argparse
import contextlib
import io
import shutil
import sys
import tempfile
from pathlib import Path

import harness
from bench_encode import image_size, make_images, save_vae
from harness import Round

NAMES = ("encode first", "lazy")


def main() -> None:
    """Compares the two ways."""
    arguments = harness.read_arguments(
        "Compare lazy encoding with encoding first.",
        images=(32, "images in a round; batches of 16 go through the epoch"),
    )
    if arguments.worker:
        with tempfile.TemporaryDirectory() as folder:
            make_images(Path(folder) / "data", arguments)
            save_vae(Path(folder) / "vae.pt", arguments)
            harness.serve(lambda: epoch(arguments, Path(folder)), dict)
        return
    harness.compare(__file__, NAMES, arguments, "image")


def epoch(arguments: argparse.Namespace, folder: Path) -> Round:
    """Sets up one of the two ways."""
    import preprocess_latents
    import train_latent_cfg

    cache, results = folder / "latents_cache", folder / "results"
    about_images = {
        "vae_path": folder / "vae.pt",
        "data_path": folder / "data",
        "image_size": image_size(arguments),
        "images_per_user": "all",
    }
    about_training = {
        "latents_cache_folder": cache,
        "results_folder": results,
        "train_num_steps": -(-arguments.images // 16),
        "num_samples": 0,
        **({"dim": 8, "dim_mults": 1} if arguments.small else {}),
    }

    def work() -> int:
        shutil.rmtree(cache, ignore_errors=True)
        shutil.rmtree(results, ignore_errors=True)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            if arguments.worker == "encode first":
                assert preprocess_latents.main(harness.flags({**about_images, "output_folder": cache})) == 0
            assert train_latent_cfg.main(harness.flags({**about_images, **about_training})) == 0
        return arguments.images

    return work


if __name__ == "__main__":
    sys.exit(main())
