"""Encodes a folder of labelled images through a KL-VAE into a cache of latents.

    python preprocess_latents.py --vae_path kl_vae_best.pt --data_path Normal_line --output_folder ./latents_cache
    python preprocess_latents.py --verify

Running it again encodes only what is missing; train_latent_cfg.py then reads the cache.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until `main` begins, Ctrl-C ends without a traceback

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import config
import script
from config import PreprocessSettings, UserError

if __name__ == "__main__":
    script.check_command_line(PreprocessSettings, __doc__)

import torch

import cache_work
import disk
import durable
import hardware
import latent_cache
import prepare
from images import Entry, Split, shown
from latent_cache import LatentCache
from latent_dataset import SPLIT_NAME, LatentDataset
from preview import draw_preview
from ranks import Ranks, joined
from script import DONE, FAILED, Failed, StopSignals, say, warn


@script.command
def main(argv: Sequence[str] | None) -> int:
    """Runs the script; returns its exit code."""
    with joined() as ranks:
        with ranks.together():
            settings, sources = resolve(argv)
            other = other_work(settings, ranks)
        return other(settings, sources) if other is not None else encode(settings, sources, ranks)


def resolve(argv: Sequence[str] | None) -> tuple[PreprocessSettings, dict[str, str]]:
    """Puts together flags, file, the manifest of a cache to be checked, and the defaults; says where each is from."""
    layers = config.read_command_line(PreprocessSettings, argv, description=__doc__)
    resolved = config.resolve(PreprocessSettings, layers)
    if resolved.settings.verify or resolved.settings.prune:
        manifest = latent_cache.read_manifest(resolved.settings.output_folder)
        stored = {} if manifest is None else manifest.settings
        layers.append(config.stored_layer(PreprocessSettings, "manifest", stored, only_about_cache=True))
        resolved = config.resolve(PreprocessSettings, layers)
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
    works = {"verify": cache_work.verify, "prune": cache_work.prune}
    asked = [name for name in works if getattr(settings, name)]
    if len(asked) > 1:
        raise UserError(f"--{asked[0]} and --{asked[1]} are two commands; give one of them")
    if settings.yes and not settings.prune:
        raise UserError("--yes belongs to --prune")
    for name in asked:
        ranks.must_be_alone(f"--{name}")
    return works[asked[0]] if asked else None


@dataclass(frozen=True)
class Work:
    """The images of a preprocess and what is to be done with them."""

    split: Split
    entries: list[Entry]
    chosen: prepare.ChosenSpace
    dataset: LatentDataset


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
            cache_work.merge_shards(dataset.cache)
            _record(settings, work.split, work.entries, bad, work.chosen, folder)
    with ranks.together():  # so that no process ends, for bad images, before rank 0 has told of them
        if ranks.is_main:
            newly = num_missing - len(dataset.missing())
            _account(settings, dataset, bad, newly=newly, seconds=time.monotonic() - started)
            draw_preview(settings, dataset, work.entries, device, folder / "preview.png", fresh=bool(num_missing))
    return _end(settings, bad)


def open_work(settings: PreprocessSettings, sources: dict[str, str], device: torch.device) -> Work:
    """Chooses the images and the space, and says what there is to encode."""
    folder = Path(settings.output_folder)
    script.check_writable(folder, "output_folder")
    manifest = prepare.manifest_of_images(folder)
    if not prepare.images_at_hand(settings, sources, may_lack=False):
        raise UserError(prepare.no_images_message(settings.data_path))
    split = prepare.choose_images(settings, at_hand=True, stored=None, where=str(folder))
    prepare.warn_of_shared_content(split)
    chosen = prepare.choose_space(settings, sources, manifest and prepare.space_of_manifest(manifest), may_lack=False)
    cache = LatentCache(folder, chosen.space, writable=True)
    for problem in cache.problems:
        warn(problem)
    names = dict.fromkeys(settings.splits)
    entries = [entry for name in names for entry in getattr(split, name)]
    dataset = prepare.open_dataset(
        settings,
        split,
        entries,
        cache=cache,
        vae_at_hand=chosen.vae_at_hand,
        images_at_hand=True,
        device=device,
    )
    missing = dataset.missing()
    say(
        f"{len(split.classes)} classes, {len(entries):,} images ({' and '.join(names)}): "
        f"{dataset.num_different - len(missing):,} cached, {len(missing):,} to encode in {settings.encode_precision} "
        f"on {hardware.describe(device)}"
    )
    prepare.say_equal(dataset)
    prepare.check_can_encode(dataset, settings)
    disk.tell(
        latent_cache.expected_bytes(chosen.space, len(missing)),
        f"{len(missing):,} latents",
        folder,
        remedy="give another --output_folder",
    )
    return Work(split, entries, chosen, dataset)


def fill(dataset: LatentDataset, num_missing: int, ranks: Ranks) -> list[tuple[int, str]]:
    """Encodes what is missing under a progress bar; on a signal, what is encoded so far is kept."""
    with StopSignals() as signals, _plain_memory_error(dataset):
        try:
            return prepare.fill_together(dataset, ranks, signals)
        except script.Stopped:
            dataset.cache.flush()
            kept = num_missing - len(dataset.missing())
            say(f"stopped; {kept:,} new latents are kept, and the same command goes on from there")
            raise
        except torch.OutOfMemoryError:
            dataset.cache.flush()
            raise
        except OSError as error:
            raise Failed(
                f"a shard could not be written to {dataset.cache.folder}: {error.strerror or error}; "
                "what was written before is kept"
            ) from error


@contextmanager
def _plain_memory_error(dataset: LatentDataset) -> Iterator[None]:
    """Turns too little memory on the GPU into one sentence with a remedy."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise Failed(
            f"the GPU has too little memory for --encode_batch_size {dataset.encode_batch_size}; give a smaller "
            "one: what is encoded already is kept"
        ) from error


def _record(
    settings: PreprocessSettings,
    split: Split,
    entries: list[Entry],
    bad: list[tuple[int, str]],
    chosen: prepare.ChosenSpace,
    folder: Path,
) -> None:
    if bad and settings.skip_bad_images:
        split = split.without(prepare.skipped(entries, bad))
    durable.publish(folder / SPLIT_NAME, split.to_bytes())
    prepare.record_manifest(folder, settings, chosen, len(entries))


def _account(
    settings: PreprocessSettings,
    dataset: LatentDataset,
    bad: list[tuple[int, str]],
    *,
    newly: int,
    seconds: float,
) -> None:
    pace = f", {newly / seconds:.1f} images/s" if newly else ""
    say()
    say(f"newly encoded   {newly:,}")
    num_failed = len({dataset.keys[position] for position, _ in bad})  # as the others, without equal ones
    say(f"already cached  {dataset.num_different - newly - num_failed:,}")
    say(f"failed          {len(bad):,}")
    for position, reason in bad:
        say(f"    {shown(dataset.names[position])}: {reason}")
    say(f"time            {script.duration(seconds)}{pace}; peak memory {hardware.peak_memory(dataset.device)}")
    on_disk = sum(path.stat().st_size for path in dataset.cache.shard_paths())
    say(f"cache           {settings.output_folder} ({script.size(on_disk)})")


def _end(settings: PreprocessSettings, bad: list[tuple[int, str]]) -> int:
    if bad and not settings.skip_bad_images:
        say()
        warn(
            f"{len(bad)} image(s) failed and the rest are cached; mend or remove them, or give "
            "--skip_bad_images to go on without them"
        )
        return FAILED
    cache_work.say_next(settings)
    return DONE


if __name__ == "__main__":
    sys.exit(main(None))
