"""Encodes a folder of labelled images through a KL-VAE into a cache of latents.

    python preprocess_latents.py --vae_path kl_vae_best.pt --data_path Normal_line --output_folder ./latents_cache
    python preprocess_latents.py --verify

Running it again encodes only what is missing; train_latent_cfg.py then reads the cache.
"""

import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from gait_latents import cache_tools
from gait_latents.common import cli, hardware
from gait_latents.common.console import say
from gait_latents.common.distributed import Ranks, joined
from gait_latents.common.errors import UserError
from gait_latents.latents import opening
from gait_latents.latents.manifest import read_manifest
from gait_latents.latents.preprocessing import account, end, fill, open_work, record
from gait_latents.latents.preview import draw_preview
from gait_latents.settings import PreprocessSettings

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until `main` begins, Ctrl-C ends without a traceback


if __name__ == "__main__":
    cli.check_command_line(PreprocessSettings, __doc__)


@cli.command
def main(argv: Sequence[str] | None) -> int:
    """Runs the script; returns its exit code."""
    with joined() as ranks:
        with ranks.together():
            settings, sources = resolve(argv)
            other = other_work(settings, ranks)
        return other(settings, sources) if other is not None else encode(settings, sources, ranks)


def resolve(argv: Sequence[str] | None) -> tuple[PreprocessSettings, dict[str, str]]:
    """Puts together flags, file, the manifest of a cache to be checked, and the defaults; says where each is from."""
    layers = cli.read_command_line(PreprocessSettings, argv, description=__doc__)
    resolved = cli.resolve(PreprocessSettings, layers)
    if resolved.settings.verify or resolved.settings.prune:
        manifest = read_manifest(resolved.settings.output_folder)
        stored = {} if manifest is None else manifest.settings
        layers.append(cli.stored_layer(PreprocessSettings, "manifest", stored, only_about_cache=True))
        resolved = cli.resolve(PreprocessSettings, layers)
    for line in resolved.changes():
        say(line)
    return resolved.settings, resolved.sources


def other_work(
    settings: PreprocessSettings, ranks: Ranks
) -> Callable[[PreprocessSettings, dict[str, str]], int] | None:
    """Returns what is asked for besides encoding, a check or a prune.

    Raises:
        UserError: for two at once, and for several processes, which only encode together.
    """
    works = {"verify": cache_tools.verify, "prune": cache_tools.prune}
    asked = [name for name in works if getattr(settings, name)]
    if len(asked) > 1:
        raise UserError(f"--{asked[0]} and --{asked[1]} are two commands; give one of them")
    if settings.yes and not settings.prune:
        raise UserError("--yes belongs to --prune")
    for name in asked:
        ranks.must_be_alone(f"--{name}")
    return works[asked[0]] if asked else None


def encode(settings: PreprocessSettings, sources: dict[str, str], ranks: Ranks) -> int:
    """Encodes what is missing, writes split and manifest, and prints the account."""
    started = time.monotonic()
    folder = Path(settings.output_folder)
    with ranks.together():
        device = hardware.pick_device(ranks.device_name(settings.device))
        ranks.say_unused(settings.device, "preprocess_latents.py")
        work = open_work(settings, sources, device)
    dataset, num_missing = work.dataset, len(work.dataset.missing())
    ranks.check_same({"images and latents of the digest": dataset.digest()[:16]}, "give all the same images and VAE")
    with ranks.together():
        bad = fill(dataset, num_missing, ranks)
        if ranks.is_main:
            opening.merge_shards(dataset.cache)
            record(settings, work.split, work.entries, bad, work.chosen, folder)
    with ranks.together():  # so that no process ends, for bad images, before rank 0 has told of them
        if ranks.is_main:
            newly = num_missing - len(dataset.missing())
            account(settings, dataset, bad, newly=newly, seconds=time.monotonic() - started)
            draw_preview(settings, dataset, work.entries, device, folder / "preview.png", fresh=bool(num_missing))
    return end(settings, bad)


if __name__ == "__main__":
    sys.exit(main(None))
