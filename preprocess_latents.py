"""Encodes a folder of labelled images through a KL-VAE into a cache of latents.

    python preprocess_latents.py --vae_path kl_vae_best.pt --data_path Normal_line --output_folder ./latents_cache
    python preprocess_latents.py --verify

Running it again encodes only what is missing; train_latent_cfg.py then reads the cache.
"""

import signal
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until `main` begins, Ctrl-C ends without a traceback
sys.path.append(str(Path(__file__).resolve().parent))  # which python -I and PYTHONSAFEPATH=1 leave out

from gait_latents.common.script import imports, run_script
from gait_latents.settings import PreprocessSettings


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the script; returns its exit code."""
    return run_script(PreprocessSettings, argv, __doc__, preprocess)


def preprocess(argv: Sequence[str] | None) -> int:
    """Settings, images and space, encoding, account: the whole way from a folder of images to a cache."""
    with imports():
        from gait_latents import cache_tools
        from gait_latents.common.distributed import join_ranks
        from gait_latents.latents.preprocessing import account, encode, open_work, read_settings

    with join_ranks() as ranks:  # this process among those that torchrun has started; mostly it is alone
        # Settings: flags, --config, defaults.
        settings, sources = read_settings(argv, __doc__, ranks)
        if settings.verify:
            return cache_tools.verify(settings, sources)
        if settings.prune:
            return cache_tools.prune(settings, sources)

        # Images: classes and split. Space: which VAE and image size. Dataset: what the cache has of them already.
        work = open_work(settings, sources, ranks)

        # Encoding: what is missing goes through the VAE's encoder, in batches, into shards of the cache.
        encode(work, ranks)

        # Account: what was encoded, what failed, and pictures to look at.
        return account(work, ranks)


if __name__ == "__main__":
    sys.exit(main())
