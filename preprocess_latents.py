"""Encodes a folder of labelled images through a KL-VAE into a cache of latents.

    python preprocess_latents.py --vae_path kl_vae_best.pt --data_path Normal_line --output_folder ./latents_cache
    python preprocess_latents.py --vae_path kl_vae_best.pt --data_path Normal_line --dry_run
    python preprocess_latents.py --verify

Running it again encodes only what is missing; train_latent_cfg.py then reads the cache.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until `main` begins, Ctrl-C ends without a traceback

import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import config
import script
from config import PreprocessSettings, UserError

if __name__ == "__main__":
    script.check_command_line(PreprocessSettings, __doc__)

import numpy as np
import torch

import disk
import durable
import forecast
import hardware
import latent_cache
import pictures
import prepare
import vae
from images import BadImage, Entry, Split, shown
from latent_cache import LatentCache
from latent_dataset import SPLIT_NAME, LatentDataset, read_split
from script import DONE, FAILED, Failed, StopSignals, say, warn

_NUM_PREVIEWS = 6  # images decoded again for the PSNR and the preview
_NUM_LISTED = 20  # names shown of a longer list


@script.command
def main(argv: Sequence[str] | None) -> int:
    """Runs the script; returns its exit code."""
    layers = config.read_command_line(PreprocessSettings, argv, description=__doc__)
    resolved = config.resolve(PreprocessSettings, layers)
    if resolved.settings.verify and resolved.settings.dry_run:
        raise UserError("--verify only checks, and has nothing that --dry_run could leave out; leave one of them out")
    if resolved.settings.verify:
        manifest = latent_cache.read_manifest(resolved.settings.output_folder)
        stored = {} if manifest is None else manifest.settings
        layers.append(config.stored_layer(PreprocessSettings, "manifest", stored, only_about_cache=True))
        resolved = config.resolve(PreprocessSettings, layers)
    for line in resolved.changes():
        say(line)
    return (verify if resolved.settings.verify else encode)(resolved.settings, resolved.sources)


def encode(settings: PreprocessSettings, sources: dict[str, str]) -> int:
    """Encodes what is missing, writes split and manifest, and prints the account."""
    started = time.monotonic()
    folder = Path(settings.output_folder)
    device = hardware.pick_device(settings.device)
    script.check_writable(folder, "output_folder", dry_run=settings.dry_run)
    manifest = latent_cache.read_manifest(folder)
    if not prepare.images_at_hand(settings, sources, may_lack=False):
        raise UserError(prepare.no_images_message(settings.data_path))
    split = prepare.choose_images(settings, at_hand=True, stored=None, where=str(folder))
    prepare.warn_of_shared_content(split)
    chosen = prepare.choose_space(settings, sources, manifest and prepare.space_of_manifest(manifest), may_lack=False)
    cache = LatentCache(folder, chosen.space, writable=not settings.dry_run)
    for problem in cache.problems:
        warn(problem)
    entries = [entry for name in settings.splits for entry in getattr(split, name)]
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
        f"{len(split.classes)} classes, {len(entries):,} images ({' and '.join(settings.splits)}): "
        f"{len(entries) - len(missing):,} cached, {len(missing):,} to encode in {settings.encode_precision} "
        f"on {hardware.describe(device)}"
    )
    disk.tell(
        latent_cache.expected_bytes(chosen.space, len(missing)),
        f"{len(missing):,} latents",
        folder,
        remedy="give another --output_folder",
    )
    if settings.dry_run:
        return dry_run(settings, dataset, entries)
    bad = fill(dataset, len(missing))
    _merge(cache)
    _record(settings, split, entries, bad, chosen, folder)
    _account(settings, dataset, bad, newly=len(missing) - len(dataset.missing()), seconds=time.monotonic() - started)
    _preview(settings, dataset, entries, device, folder / "preview.png", fresh=bool(missing))
    return _end(settings, bad)


def dry_run(settings: PreprocessSettings, dataset: LatentDataset, entries: list[Entry]) -> int:
    """Tries every missing image and a few encoder calls, says what the run would take, and writes nothing."""
    missing = dataset.missing()
    wanted = [entries[position] for position in missing]
    bad = prepare.find_bad_images(wanted, data_path=settings.data_path, image_size=settings.image_size)
    for skipped in bad:
        say(f"    {shown(f'{skipped.class_name}/{skipped.name}')}: {skipped.reason}")
    say(forecast.encoding(dataset, missing))
    say(forecast.memory(dataset.device))
    if bad and not settings.skip_bad_images:
        warn(
            f"{len(bad)} image(s) cannot be read; mend or remove them, or give --skip_bad_images to go on without them"
        )
        return FAILED
    say(script.DRY_RUN_END)
    return DONE


def fill(dataset: LatentDataset, num_missing: int) -> list[tuple[int, str]]:
    """Encodes what is missing under a progress bar; on a signal, what is encoded so far is kept."""
    if not num_missing:
        return []
    with StopSignals() as signals, script.progress(total=num_missing, unit="images", label="encode") as bar:

        def advance(count: int) -> None:
            bar.advance(count)
            signals.raise_if_received()

        try:
            return dataset.fill(advance=advance)
        except script.Stopped:
            dataset.cache.flush()
            kept = num_missing - len(dataset.missing())
            say(f"stopped; {kept:,} new latents are kept, and the same command goes on from there")
            raise
        except torch.OutOfMemoryError as error:
            dataset.cache.flush()
            raise Failed(
                f"the GPU has too little memory for --encode_batch_size {dataset.encode_batch_size}; give a smaller "
                "one: what is encoded already is kept"
            ) from error
        except OSError as error:
            raise Failed(
                f"a shard could not be written to {dataset.cache.folder}: {error.strerror or error}; "
                "what was written before is kept"
            ) from error


def _merge(cache: LatentCache) -> None:
    """Joins the shards into few; where there is no room for both, they stay as they are."""
    try:
        cache.merge()
    except OSError as error:
        warn(
            f"the shards in {cache.folder} could not be joined ({error.strerror or error}) and stay as they are, "
            "which costs nothing but their number"
        )


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
    say(f"already cached  {len(dataset) - newly - len(bad):,}")
    say(f"failed          {len(bad):,}")
    for position, reason in bad:
        say(f"    {shown(dataset.names[position])}: {reason}")
    say(f"time            {script.duration(seconds)}{pace}; peak memory {hardware.peak_memory(dataset.device)}")
    on_disk = sum(path.stat().st_size for path in dataset.cache.shard_paths())
    say(f"cache           {settings.output_folder} ({script.size(on_disk)})")


def _preview(
    settings: PreprocessSettings,
    dataset: LatentDataset,
    entries: list[Entry],
    device: torch.device,
    path: Path,
    *,
    fresh: bool,
) -> list[float]:
    """Decodes a few entries again, draws them below their images, and says how close they are."""
    if not fresh and path.exists():
        return []
    lost = set(dataset.missing())
    present = [position for position in range(len(dataset)) if position not in lost]
    if not present:
        return []
    chosen = [present[i] for i in np.linspace(0, len(present) - 1, min(_NUM_PREVIEWS, len(present))).astype(int)]
    pairs = [(i, image) for i in chosen if (image := _read_or_none(settings, entries[i])) is not None]
    if not pairs:
        return []
    chosen, originals = [i for i, _ in pairs], [image for _, image in pairs]
    try:
        decoded = decode_means(dataset, chosen, settings.vae_path, device)
    except UserError as error:  # the latents are good all the same
        warn(f"no {path.name}: {error}")
        return []
    scores = [pictures.psnr(a, b) for a, b in zip(originals, decoded, strict=True)]
    names = [dataset.names[i].split("/")[0] for i in chosen]
    try:
        pictures.save_picture(pictures.labelled_grid([originals, decoded], ["image", "decoded"], names), path)
        where = f"see {path}"
    except OSError as error:  # a cache may be checked where it is read-only
        where = f"{path.name} cannot be written ({error.strerror or error})"
    say(f"round trip      PSNR {np.mean(scores):.1f} dB over {len(scores)} images (worst {min(scores):.1f}); {where}")
    return scores


def _read_or_none(settings: PreprocessSettings, entry: Entry) -> np.ndarray | None:
    try:
        return prepare.read_image(settings.data_path, entry, image_size=settings.image_size)
    except BadImage:  # its latent outlives it
        return None


@torch.inference_mode()
def decode_means(dataset: LatentDataset, positions: list[int], vae_path: str, device: torch.device) -> list[np.ndarray]:
    """Decodes the posterior means at `positions`; returns uint8 images [S S 3]."""
    decoder = vae.load_vae(vae_path, device, parts="decoder", memory_format=torch.channels_last)
    moments = dataset.moments(torch.tensor(positions))
    means = moments[:, : moments.shape[1] // 2]
    return [image for mean in means for image in pictures.to_uint8(decoder.decode(mean[None]))]


def _end(settings: PreprocessSettings, bad: list[tuple[int, str]]) -> int:
    say()
    if bad and not settings.skip_bad_images:
        warn(
            f"{len(bad)} image(s) failed and the rest are cached; mend or remove them, or give "
            "--skip_bad_images to go on without them"
        )
        return FAILED
    say(f"next: python train_latent_cfg.py{_folder_flag(settings.output_folder)}")
    return DONE


def _folder_flag(folder: str) -> str:
    standard = config.defaults(config.TrainSettings)["latents_cache_folder"]
    same = Path(folder).absolute() == Path(standard).absolute()
    return "" if same else f" --latents_cache_folder {folder}"


def verify(settings: PreprocessSettings, sources: dict[str, str]) -> int:
    """Checks every seal of a cache, compares it with split and images, and decodes a few entries."""
    folder = Path(settings.output_folder)
    manifest, stored = latent_cache.read_manifest(folder), read_split(folder)
    if manifest is None or stored is None:
        raise UserError(f"{folder} holds no finished cache (manifest.json and {SPLIT_NAME}); run preprocess_latents.py")
    at_hand = prepare.images_at_hand(settings, sources, may_lack=False)
    split = prepare.with_fresh_keys(stored, settings.data_path) if at_hand else stored
    cache = LatentCache(folder, manifest.space, writable=False)
    stored_parts = {"splits": manifest.settings.get("splits", ["train"])}  # training makes a cache of its images alone
    parts = config.stored_layer(PreprocessSettings, "manifest", stored_parts).values["splits"]
    entries = [entry for name in parts for entry in getattr(split, name)]
    report = latent_cache.verify(cache, [entry.key for entry in entries])
    for problem in report.problems:
        warn(problem)
    _verdict(report, entries, stored, images_at_hand=at_hand)
    if at_hand and report.good and Path(settings.vae_path).exists():
        device = hardware.pick_device(settings.device)
        dataset = prepare.open_dataset(
            settings, split, entries, cache=cache, vae_at_hand=False, images_at_hand=True, device=device
        )
        _preview(settings, dataset, entries, device, folder / "preview.png", fresh=True)
    return FAILED if report.missing or report.damaged or report.problems else DONE


def _verdict(report: latent_cache.Report, entries: list[Entry], stored: Split, *, images_at_hand: bool) -> None:
    """Prints what a check of the cache found."""
    lost = {*report.missing, *report.damaged}
    old_keys = set(stored.keys().values())
    stale = [entry for entry in entries if entry.key in lost and entry.key not in old_keys]
    absent = [entry for entry in entries if entry.key in lost and entry.key in old_keys]
    content = "content checked" if images_at_hand else "images not at hand, content not checked"
    say(f"images      {len(entries):,} asked for, {len(entries) - len(stale) - len(absent):,} cached ({content})")
    for label, found in (("stale", stale), ("missing", absent)):
        say(f"{label:<11} {len(found):,}")
        for entry in found[:_NUM_LISTED]:
            say(f"    {shown(f'{entry.class_name}/{entry.name}')}")
    say(f"orphaned    {len(report.orphaned):,} rows of no image in the split")
    on_disk = sum(shard.num_bytes for shard in report.shards)
    say(f"shards      {len(report.shards):,}, {script.size(on_disk)}, {len(report.damaged):,} damaged rows")
    for made, count in _ways_of_encoding(report).items():
        say(f"encoded     {count:,} rows with {made}")
    for space, differences in report.other_spaces.items():
        say(f"also there  latents of another kind in {space}: {'; '.join(differences)}")


def _ways_of_encoding(report: latent_cache.Report) -> Counter[str]:
    ways: Counter[str] = Counter()
    for shard in report.shards:
        for count, record in shard.records:
            ways[", ".join(f"{name} {value}" for name, value in sorted(record.items())) or "(not recorded)"] += count
    return ways


if __name__ == "__main__":
    sys.exit(main(None))
