"""Encodes the images of the settings into a cache: opens the work, fills the cache, and gives the account."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from gait_latents import cache_tools
from gait_latents.common import console, errors, files, hardware
from gait_latents.common.console import say, shown, warn
from gait_latents.common.distributed import Ranks
from gait_latents.common.errors import DONE, FAILED, Failed, UserError
from gait_latents.common.layout import SPLIT_NAME
from gait_latents.common.process import StopSignals
from gait_latents.images import reading, selection
from gait_latents.images.split import Entry, Split
from gait_latents.latents import filling, opening, vae_fit
from gait_latents.latents import shard as shard_file
from gait_latents.latents.cache import LatentCache
from gait_latents.latents.dataset import LatentDataset
from gait_latents.latents.manifest import manifest_of_images
from gait_latents.settings import PreprocessSettings


@dataclass(frozen=True)
class Work:
    """The images of a preprocess and what is to be done with them."""

    split: Split
    entries: list[Entry]
    chosen: vae_fit.ChosenSpace
    dataset: LatentDataset


def open_work(settings: PreprocessSettings, sources: dict[str, str], device: torch.device) -> Work:
    """Chooses the images and the space, and says what there is to encode."""
    folder = Path(settings.output_folder)
    files.check_writable(folder, "output_folder")
    manifest = manifest_of_images(folder)
    if not selection.images_at_hand(settings, sources, may_lack=False):
        raise UserError(selection.no_images_message(settings.data_path))
    split = selection.choose_images(settings, at_hand=True, stored=None, where=str(folder))
    selection.warn_of_shared_content(split)
    chosen = vae_fit.choose_space(settings, sources, manifest and vae_fit.space_of_manifest(manifest), may_lack=False)
    cache = LatentCache(folder, chosen.space, writable=True)
    for problem in cache.problems:
        warn(problem)
    names = dict.fromkeys(settings.splits)
    entries = [entry for name in names for entry in getattr(split, name)]
    dataset = opening.open_dataset(
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
    opening.say_equal(dataset)
    opening.check_can_encode(dataset, settings)
    console.tell(
        shard_file.expected_bytes(chosen.space, len(missing)),
        f"{len(missing):,} latents",
        folder,
        remedy="give another --output_folder",
    )
    return Work(split, entries, chosen, dataset)


def fill(dataset: LatentDataset, num_missing: int, ranks: Ranks) -> list[tuple[int, str]]:
    """Encodes what is missing under a progress bar; on a signal, what is encoded so far is kept."""
    with StopSignals() as signals, _plain_memory_error(dataset):
        try:
            return filling.fill_together(dataset, ranks, signals)
        except errors.Stopped:
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


def record(
    settings: PreprocessSettings,
    split: Split,
    entries: list[Entry],
    bad: list[tuple[int, str]],
    chosen: vae_fit.ChosenSpace,
    folder: Path,
) -> None:
    if bad and settings.skip_bad_images:
        split = split.without(reading.skipped(entries, bad))
    files.publish(folder / SPLIT_NAME, split.to_bytes())
    opening.record_manifest(folder, settings, chosen, len(entries))


def account(
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
    say(f"time            {console.duration(seconds)}{pace}; peak memory {hardware.peak_memory(dataset.device)}")
    on_disk = sum(path.stat().st_size for path in dataset.cache.shard_paths())
    say(f"cache           {settings.output_folder} ({console.size(on_disk)})")


def end(settings: PreprocessSettings, bad: list[tuple[int, str]]) -> int:
    if bad and not settings.skip_bad_images:
        say()
        warn(
            f"{len(bad)} image(s) failed and the rest are cached; mend or remove them, or give "
            "--skip_bad_images to go on without them"
        )
        return FAILED
    cache_tools.say_next(settings)
    return DONE
