"""Times the start of train_latent_cfg.py with a complete cache: from its imports done to its first step.

    python benchmarks/bench_start.py

Once from the cache alone, and once with the images at hand, whose content is then checked.
"""

import argparse
import contextlib
import hashlib
import io
import shutil
import sys
import tempfile
from pathlib import Path

import harness
from bench_encode import image_size, make_images
from harness import Round

NAMES = ("from the cache alone", "images checked")


def main() -> None:
    """Compares the two."""
    arguments = harness.read_arguments("Time the start of training.", images=(1550, "images in the cache"))
    if arguments.worker:
        with tempfile.TemporaryDirectory() as folder:
            harness.serve(lambda: start(arguments, Path(folder)), dict)
        return
    harness.compare(__file__, NAMES, arguments, "start")


class Started(Exception):
    """The first step is about to be taken."""


def start(arguments: argparse.Namespace, folder: Path) -> Round:
    """Sets up a complete cache of random moments for real images."""
    import train_latent_cfg
    from gait_latents.training import trainer

    make_images(folder / "data", arguments)
    fill_cache(arguments, folder)
    if arguments.worker == "from the cache alone":
        shutil.rmtree(folder / "data")
    words = harness.flags({"latents_cache_folder": folder / "latents_cache", "results_folder": folder / "results"})

    def stop(_trainer: object) -> None:
        raise Started

    trainer.Trainer.train_step = stop  # type: ignore[method-assign]

    def work() -> int:
        shutil.rmtree(folder / "results", ignore_errors=True)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(Started):
            code = train_latent_cfg.main(words)
            raise AssertionError(f"training ended with exit code {code} before its first step")
        return 1

    return work


def fill_cache(arguments: argparse.Namespace, folder: Path) -> None:
    """Writes the cache, manifest and split that a finished preprocess would, without encoding anything."""
    import numpy as np

    from gait_latents.common import files
    from gait_latents.images import selection
    from gait_latents.latents import opening, vae_fit
    from gait_latents.latents.cache import LatentCache
    from gait_latents.latents.space import Space
    from gait_latents.settings import PreprocessSettings

    size = image_size(arguments)
    settings = PreprocessSettings(
        data_path=str(folder / "data"), vae_path=str(folder / "none.pt"), image_size=size, images_per_user="all"
    )
    split = selection.choose_images(settings, at_hand=True, stored=None, where="")
    space = Space.of({"weights": hashlib.sha256(b"none").hexdigest()}, size, {"version": 0}, (8, size // 8, size // 8))
    cache = LatentCache(folder / "latents_cache", space, writable=True)
    keys = [entry.key for entry in split.train]
    moments = np.random.default_rng(0).standard_normal((len(keys), *space.moments_shape)).astype(np.float16)
    cache.put(keys, moments, [entry.name for entry in split.train], {})
    cache.flush()
    files.publish(folder / "latents_cache" / "split.json", split.to_bytes())
    chosen = vae_fit.ChosenSpace(space, 1.0, 0.0, vae_at_hand=False)
    opening.record_manifest(folder / "latents_cache", settings, chosen, len(keys))


if __name__ == "__main__":
    sys.exit(main())
