"""The work of preprocess_latents.py: encodes the images that the settings name into a cache, and says what was done.

In this order: `read_settings`, `open_work` (which images, which VAE, what is missing), `encode`, `account`.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from gait_latents.common import cli, console, errors, files, hardware, shortage
from gait_latents.common.console import say, show_name, warn
from gait_latents.common.distributed import Ranks
from gait_latents.common.errors import DONE, FAILED, Failed, Shortage, UserError, let_shortage_pass
from gait_latents.common.layout import PREVIEW_NAME, SPLIT_NAME
from gait_latents.common.process import StopSignals
from gait_latents.images import changes, data_report, reading, selection, windows
from gait_latents.images.split import Entry, Split, read_split
from gait_latents.latents import cache as latent_cache
from gait_latents.latents import filling, opening, vae_fit
from gait_latents.latents import shard as shard_file
from gait_latents.latents.cache import LatentCache
from gait_latents.latents.dataset import LatentDataset
from gait_latents.latents.manifest import defaults_of, manifest_of_images, read_manifest, tell_new_cache
from gait_latents.latents.preview import draw_preview
from gait_latents.settings import PreprocessSettings, TrainSettings


@dataclass(frozen=True)
class Work:
    """The images of a run of preprocess_latents.py, and what is to be done with them.

    Attributes:
        settings: of the command.
        split: all images that the settings choose.
        entries: the images to have in the cache, those of `--splits`.
        chosen: the space of the VAE.
        dataset: over `entries`.
        missing: positions of the images whose latents are to be encoded.
        bad: (position, reason) of each image that could not be encoded; filled by `encode`.
        started: when the work was opened, as `time.monotonic` tells it.
    """

    settings: PreprocessSettings
    split: Split
    entries: list[Entry]
    chosen: vae_fit.ChosenSpace
    dataset: LatentDataset
    missing: list[int]
    bad: list[tuple[int, str]] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)


def read_settings(
    argv: Sequence[str] | None, description: str | None, ranks: Ranks
) -> tuple[PreprocessSettings, dict[str, str]]:
    """Puts together flags, file, the manifest of the cache, if there is one yet, and defaults.

    So the command without flags goes on with a cache as it was made, be it by this script or by a training. What flags
    and file say otherwise is told.

    Returns:
        The settings, and for each the place that its value comes from.

    Raises:
        UserError: for two commands at once, and for several processes, which only encode together.
    """
    with ranks.together():
        layers = cli.Layers(PreprocessSettings, argv, description=description)
        settings: PreprocessSettings = layers.settings
        asked = [name for name in ("verify", "prune") if getattr(settings, name)]
        folder = settings.output_folder
        manifest = read_manifest(folder)
        is_usable = manifest is not None and (not manifest.space.is_imported or bool(asked))
        stored = defaults_of(manifest if is_usable else None, layers)
        layers.add(f"the settings of {folder}, which flags and --config override", stored, only_about_cache=True)
        resolved = layers.resolve()
        if not asked:
            _say_differences(stored, resolved)
            tell_new_cache(folder)
        if len(asked) > 1:
            raise UserError(f"--{asked[0]} and --{asked[1]} are two commands; give one of them")
        if settings.yes and not settings.prune:
            raise UserError("--yes belongs to --prune")
        for name in asked:
            ranks.must_be_alone(f"--{name}")
    return resolved.settings, resolved.sources


def _say_differences(stored: Mapping[str, Any], resolved: cli.Resolved) -> None:
    """Says which flags differ from how a cache was made; of VAE and image size `choose_space` tells."""
    asked = cli.to_dict(resolved.settings)
    names = [
        name
        for name, spec in cli.specs(PreprocessSettings).items()
        if spec.about_cache and name in stored and name not in vae_fit.SETTINGS_OF_SPACE
        if cli.is_explicit(resolved.sources, name) and asked[name] != stored[name]
        if not (spec.path and cli.same_path(asked[name], stored[name]))
    ]
    if names:
        texts = [f"--{name} {cli.show(asked[name])}, the cache has {cli.show(stored[name])}" for name in names]
        say(f"other than when the cache was made: {'; '.join(texts)}")


def open_work(settings: PreprocessSettings, sources: dict[str, str], ranks: Ranks) -> Work:
    """Chooses the images and the space, and says what there is to encode."""
    with ranks.together():
        device = hardware.pick_device(ranks.device_name(settings.device))
        ranks.say_unused(settings.device, "preprocess_latents.py")
        work = _open(settings, sources, device)
    digest = work.dataset.digest()[:16]
    ranks.check_same({"images and latents of the digest": digest}, "give all the same images and VAE")
    return work


def encode(work: Work, ranks: Ranks) -> None:
    """Encodes what is missing, each process its share, and writes split and manifest.

    Raises:
        Stopped: after a signal; what was encoded until then is kept.
    """
    with ranks.together():
        work.bad.extend(_fill(work.dataset, len(work.missing), ranks))
        if ranks.is_main:
            opening.merge_shards(work.dataset.cache)
            work.dataset.cache.refresh()  # what is counted is what is there now
            _record(work)


def account(work: Work, ranks: Ranks) -> int:
    """Says what was encoded and what failed, draws the preview, and returns the exit code."""
    settings, dataset = work.settings, work.dataset
    with ranks.together():  # so that no process ends, for bad images, before rank 0 has told of them
        if ranks.is_main:
            _say_account(work)
            _say_doubt(work)
            path = Path(settings.output_folder) / PREVIEW_NAME
            draw_preview(settings, dataset, work.entries, dataset.device, path, fresh=bool(work.missing))
    if work.bad and not settings.skip_bad_images:
        say()
        warn(
            f"{len(work.bad)} image(s) failed and the rest are cached; mend or remove them, or give "
            "--skip_bad_images to go on without them"
        )
        return FAILED
    say_next(settings)
    return DONE


def _open(settings: PreprocessSettings, sources: dict[str, str], device: torch.device) -> Work:
    """Does what `open_work` says, in one process."""
    folder = Path(settings.output_folder)
    files.check_writable(folder, "output_folder")
    manifest = manifest_of_images(folder)
    if not selection.images_at_hand(settings, sources, may_lack=False):
        raise UserError(selection.no_images_message(settings.data_path))
    before = None if manifest is None else _split_before(folder)
    in_use = () if before is None else before.classes
    split = selection.choose_images(settings, at_hand=True, stored=None, where=str(folder), in_use=in_use)
    if before is not None:
        changes.tell_changes_of_cache(before, split, settings.data_path, folder)
    data_report.warn_of_equal_pictures(split)
    windows.warn_of_windows(split, settings.data_path, resize=settings.resize)
    chosen = vae_fit.choose_space(settings, sources, manifest and vae_fit.space_of_manifest(manifest), may_lack=False)
    reason = latent_cache.why_not_writable(folder, chosen.space)
    if reason is not None:
        raise UserError(f"--output_folder {folder} cannot be written to: {reason}")
    cache = LatentCache(folder, chosen.space, writable=True)
    for problem in cache.problems:
        warn(problem)
    names = [name for name in dict.fromkeys(settings.splits) if split.part(name)]
    entries = [entry for name in names for entry in split.part(name)]
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
    return Work(settings, split, entries, chosen, dataset, missing)


def _split_before(folder: Path) -> Split | None:
    """Returns the split that the cache has; None, and says so, where it cannot be read."""
    try:
        return read_split(folder)
    except UserError as error:
        say(f"the images were not compared with those of earlier, and their split is written again: {error}")
        return None


def _fill(dataset: LatentDataset, num_missing: int, ranks: Ranks) -> list[tuple[int, str]]:
    """Encodes what is missing under a progress bar; on a signal, what is encoded so far is kept."""
    remedy = f"for --encode_batch_size {dataset.encode_batch_size}; give a smaller one: what is encoded already is kept"
    with StopSignals(after="this image") as signals, hardware.plain_memory_error(remedy=remedy), _kept(dataset):
        try:
            return filling.fill_together(dataset, ranks, signals)
        except errors.Stopped:
            dataset.cache.flush()
            kept = num_missing - len(dataset.missing())
            say(f"stopped; {kept:,} new latents are kept, and the same command goes on from there")
            raise
        except latent_cache.Vanished as error:
            raise _vanished(dataset.cache) from error
        except OSError as error:
            let_shortage_pass(error)
            raise Failed(
                f"a shard could not be written to {dataset.cache.folder}: {error.strerror or error}; "
                "what was written before is kept"
            ) from error


def _vanished(cache: LatentCache) -> Failed:
    """Returns the error for a cache that was removed under this process; split and manifest are then not written."""
    return Failed(
        f"latents that were in {cache.folder} are not there any more: it was removed, renamed or emptied meanwhile; "
        "put it back if you have it, and the same command encodes what is missing"
    )


@contextmanager
def _kept(dataset: LatentDataset) -> Iterator[None]:
    """Keeps what is encoded where this machine or its GPU runs out of something in the block."""
    try:
        yield
    except Exception as error:
        if isinstance(error, Shortage) or shortage.kind_of(error) is not None:
            dataset.cache.flush()
        raise


def _record(work: Work) -> None:
    """Writes split and manifest; images that could not be encoded are left out of the split on --skip_bad_images.

    Raises:
        Failed: when latents that were encoded, or were there before, are gone from the folder.
    """
    split, folder = work.split, Path(work.settings.output_folder)
    cache, bad = work.dataset.cache, {position for position, _ in work.bad}
    try:
        cache.claim_folder()
    except latent_cache.Vanished as error:
        raise _vanished(cache) from error
    if not cache.holds([key for position, key in enumerate(work.dataset.keys) if position not in bad]).all():
        raise _vanished(cache)
    if work.bad and work.settings.skip_bad_images:
        split = split.without(reading.record_skipped(work.entries, work.bad))
    files.publish(folder / SPLIT_NAME, split.to_bytes(), below=folder)
    opening.record_manifest(folder, work.settings, work.chosen, len(work.entries))


def _say_account(work: Work) -> None:
    """Says how many images were encoded, were cached before and could not be encoded; the time; the size on disk."""
    dataset, seconds = work.dataset, time.monotonic() - work.started
    newly = len(work.missing) - len(dataset.missing())
    pace = f", {newly / seconds:.1f} images/s" if newly else ""
    say()
    say(f"newly encoded   {newly:,}")
    num_failed = len(
        {dataset.keys[position] for position, _ in work.bad}
    )  # counted as the others are: images of the same content once
    say(f"already cached  {dataset.num_different - newly - num_failed:,}")
    say(f"failed          {len(work.bad):,}")
    for position, reason in work.bad:
        say(f"    {show_name(dataset.names[position])}: {reason}")
    say(f"time            {console.duration(seconds)}{pace}; peak memory {hardware.peak_memory(dataset.device)}")
    say(f"cache           {work.settings.output_folder} ({console.size(_bytes_on_disk(dataset.cache))})")


def _say_doubt(work: Work) -> None:
    """Says so where the constants of the VAE do not bring its latents to about unit variance."""
    lost = {work.dataset.keys[position] for position in work.dataset.missing()}
    present = torch.tensor([position for position, key in enumerate(work.dataset.keys) if key not in lost])
    if not len(present):
        return
    some = present[torch.linspace(0, len(present) - 1, min(_NUM_MEASURED, len(present))).long()]
    doubt = vae_fit.doubt_of_factors(work.dataset.moments(some).cpu(), work.chosen)
    if doubt:
        say(f"scale_factor    only for training with --latent_norm scale_factor, else ignore this: {doubt}")


_NUM_MEASURED = 64  # images whose latents are looked at for the spread


def _bytes_on_disk(cache: LatentCache) -> int:
    """Adds up the sizes of the shards; one that another process joins with others meanwhile is left out."""
    num_bytes = 0
    for path in cache.shard_paths():
        with suppress(FileNotFoundError):
            num_bytes += path.stat().st_size
    return num_bytes


def say_next(settings: PreprocessSettings) -> None:
    """Says how to train on the cache."""
    standard = cli.defaults(TrainSettings)["latents_cache_folder"]
    folder = settings.output_folder
    same = Path(folder).absolute() == Path(standard).absolute()
    flag = "" if same else f" {cli.typed('latents_cache_folder', [folder])}"
    say()
    say(f"next: {console.python_word()} train_latent_cfg.py{flag}")
