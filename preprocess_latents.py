"""Encodes a folder of labelled images through a KL-VAE into a cache of latents.

    python preprocess_latents.py --vae_path kl_vae_best.pt --data_path Normal_line --output_folder ./latents_cache
    python preprocess_latents.py --vae_path kl_vae_best.pt --data_path Normal_line --dry_run
    python preprocess_latents.py --verify

Running it again encodes only what is missing; train_latent_cfg.py then reads the cache.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until `main` begins, Ctrl-C ends without a traceback

import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import config
import script
from config import PreprocessSettings, UserError

if __name__ == "__main__":
    script.check_command_line(PreprocessSettings, __doc__)

import numpy as np
import torch

import cache_check
import disk
import durable
import forecast
import hardware
import images
import latent_cache
import old_caches
import pictures
import prepare
import run_folder
import vae
from images import BadImage, Entry, Skipped, Split, shown
from latent_cache import LatentCache, Manifest, Report, Space
from latent_dataset import SPLIT_NAME, LatentDataset, read_split
from ranks import Ranks, joined
from sampling import check_decodes
from script import DONE, FAILED, Failed, StopSignals, say, warn

_NUM_PREVIEWS = 6  # images decoded again for the PSNR and the preview
_NUM_LISTED = 20  # names shown of a longer list
_BELONGS_TO = {"yes": "prune", "import_split": "import_folder", "import_scale_factor": "import_folder"}


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
    """Returns what is asked for besides encoding, a check, a prune or an import.

    Raises:
        UserError: for two at once, and for several processes, which only encode together.
    """
    works = {"verify": verify, "prune": prune, "import_folder": import_latents}
    asked = [name for name in works if getattr(settings, name)]
    if len(asked) > 1:
        raise UserError(f"--{asked[0]} and --{asked[1]} are two commands; give one of them")
    if settings.dry_run and asked:
        raise UserError(f"--dry_run is for encoding; leave it or --{asked[0]} out")
    for name, owner in _BELONGS_TO.items():
        if getattr(settings, name) != config.defaults(PreprocessSettings)[name] and not getattr(settings, owner):
            raise UserError(f"--{name} belongs to --{owner}")
    for name in (*asked, *["dry_run"] * settings.dry_run):
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
    if settings.dry_run:
        return dry_run(settings, work)
    ranks.check_same({"images and latents of the digest": dataset.digest()[:16]}, "give all the same images and VAE")
    with ranks.together():
        bad = fill(dataset, num_missing, ranks)
        if ranks.is_main:
            _merge(dataset.cache)
            _record(settings, work.split, work.entries, bad, work.chosen, folder)
    with ranks.together():  # so that no process ends, for bad images, before rank 0 has told of them
        if ranks.is_main:
            newly = num_missing - len(dataset.missing())
            _account(settings, dataset, bad, newly=newly, seconds=time.monotonic() - started)
            _preview(settings, dataset, work.entries, device, folder / "preview.png", fresh=bool(num_missing))
    return _end(settings, bad)


def open_work(settings: PreprocessSettings, sources: dict[str, str], device: torch.device) -> Work:
    """Chooses the images and the space, and says what there is to encode."""
    folder = Path(settings.output_folder)
    script.check_writable(folder, "output_folder", dry_run=settings.dry_run)
    manifest = latent_cache.read_manifest(folder)
    if manifest is not None and manifest.space.is_imported:  # whose split no setting draws again
        raise UserError(f"{folder} holds imported latents; give another --output_folder for latents of images")
    if not prepare.images_at_hand(settings, sources, may_lack=False):
        raise UserError(prepare.no_images_message(settings.data_path))
    split = prepare.choose_images(settings, at_hand=True, stored=None, where=str(folder))
    prepare.warn_of_shared_content(split)
    chosen = prepare.choose_space(settings, sources, manifest and prepare.space_of_manifest(manifest), may_lack=False)
    cache = LatentCache(folder, chosen.space, writable=not settings.dry_run)
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
        f"{_num_different(dataset) - len(missing):,} cached, {len(missing):,} to encode in {settings.encode_precision} "
        f"on {hardware.describe(device)}"
    )
    if _num_different(dataset) < len(dataset):
        say(f"{len(dataset) - _num_different(dataset):,} more have the very content of another, and share its latent")
    prepare.check_can_encode(dataset, settings)
    disk.tell(
        latent_cache.expected_bytes(chosen.space, len(missing)),
        f"{len(missing):,} latents",
        folder,
        remedy="give another --output_folder",
    )
    return Work(split, entries, chosen, dataset)


def _num_different(dataset: LatentDataset) -> int:
    return len(set(dataset.keys))


def dry_run(settings: PreprocessSettings, work: Work) -> int:
    """Tries every missing image and a few encoder calls, says what the run would take, and writes nothing."""
    dataset = work.dataset
    missing = dataset.missing()
    wanted = [work.entries[position] for position in missing]
    bad = prepare.find_bad_images(wanted, data_path=settings.data_path, image_size=settings.image_size)
    for skipped in bad:
        say(f"    {shown(f'{skipped.class_name}/{skipped.name}')}: {skipped.reason}")
    with _plain_memory_error(dataset):
        say(forecast.encoding(dataset, missing))
    say(forecast.memory(dataset.device))
    if bad and not settings.skip_bad_images:
        warn(
            f"{len(bad)} image(s) cannot be read; mend or remove them, or give --skip_bad_images to go on without them"
        )
        return FAILED
    work.split.without(bad)  # raises where nothing of a class is left
    say(script.DRY_RUN_END)
    return DONE


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
    num_failed = len({dataset.keys[position] for position, _ in bad})  # as the others, without equal ones
    say(f"already cached  {_num_different(dataset) - newly - num_failed:,}")
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
) -> None:
    """Decodes a few entries again, draws them below their images, and says how close they are."""
    if not fresh and path.exists():
        return
    lost = set(dataset.missing())
    present = [position for position in range(len(dataset)) if position not in lost]
    if not present:
        return
    chosen = [present[i] for i in np.linspace(0, len(present) - 1, min(_NUM_PREVIEWS, len(present))).astype(int)]
    pairs = [(i, image) for i in chosen if (image := _read_or_none(settings, entries[i])) is not None]
    if pairs:
        chosen = [i for i, _ in pairs]
    elif not dataset.cache.space.is_imported:  # of which there may never have been any images here
        return
    originals = [image for _, image in pairs]
    try:
        decoded = decode_means(dataset, chosen, settings.vae_path, device)
    except (UserError, torch.OutOfMemoryError) as error:  # the latents are good all the same
        reason = error if isinstance(error, UserError) else "the GPU has too little memory for the VAE decoder"
        warn(f"no {path.name}: {reason}")
        return
    scores = [pictures.psnr(a, b) for a, b in zip(originals, decoded, strict=True)] if originals else []
    names = [dataset.names[i].split("/")[0] for i in chosen]
    rows = {"image": originals, "decoded": decoded} if originals else {"decoded": decoded}
    try:
        pictures.save_picture(pictures.labelled_grid(list(rows.values()), list(rows), names), path)
        where = f"see {path}"
    except OSError as error:  # a cache may be checked where it is read-only
        where = f"{path.name} cannot be written ({error.strerror or error})"
    if scores:
        quality = f"PSNR {np.mean(scores):.1f} dB over {len(scores)} images (worst {min(scores):.1f})"
        say(f"round trip      {quality}; {where}")
    else:
        say(f"decoded         {len(decoded)} latents, with no images to compare; {where}")


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
    return "" if same else f" --latents_cache_folder {shlex.quote(folder)}"


# --- a check -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Finished:
    """A cache that has a manifest and a split, and what is at hand of its images."""

    folder: Path
    manifest: Manifest
    stored: Split  # as written
    split: Split  # with the content keys of the images as they are now, where they are at hand
    images_at_hand: bool

    @property
    def parts(self) -> dict[str, tuple[Entry, ...]]:
        """The entries that were to be encoded, under "train" and "test"."""
        # A cache that training made is of its images alone, and names no splits.
        named = {"splits": self.manifest.settings.get("splits", ["train"])}
        parts = config.stored_layer(PreprocessSettings, "manifest", named).values["splits"]
        return {name: getattr(self.split, name) for name in parts}


def _open_finished(settings: PreprocessSettings, sources: dict[str, str]) -> Finished:
    folder = Path(settings.output_folder)
    manifest, stored = latent_cache.read_manifest(folder), read_split(folder)
    if manifest is None or stored is None:
        raise UserError(f"{folder} holds no finished cache (manifest.json and {SPLIT_NAME}); run preprocess_latents.py")
    at_hand = not manifest.space.is_imported and prepare.images_at_hand(settings, sources, may_lack=False)
    split = prepare.with_fresh_keys(stored, settings.data_path) if at_hand else stored
    return Finished(folder, manifest, stored, split, at_hand)


def verify(settings: PreprocessSettings, sources: dict[str, str]) -> int:
    """Checks every seal of a cache, compares it with split and images, and looks at the latents themselves."""
    found = _open_finished(settings, sources)
    if prepare.is_explicit(sources, "vae_path"):
        _check_vae(settings.vae_path, found.manifest.space)
    cache = LatentCache(found.folder, found.manifest.space, writable=False)
    entries = [entry for part in found.parts.values() for entry in part]
    report = latent_cache.verify(cache, [entry.key for entry in entries])
    for problem in report.problems:
        warn(problem)
    _say_status(settings, found, report, entries)
    _say_contents(found, report, cache)
    if report.good:
        _say_statistics(found.folder, cache, report.good)
        _decode_some(settings, found, cache, entries)
    return FAILED if report.missing or report.damaged or report.problems else DONE


def _check_vae(vae_path: str, space: Space) -> None:
    """Raises UserError unless this VAE can be read and is the one that the latents are of, as far as that is known."""
    if space.is_imported:
        check_decodes(vae_path, vae.read_identity(vae_path), space.moments_shape[0] // 2)
    else:
        prepare.check_vae_of(space, vae_path)


def _say_status(settings: PreprocessSettings, found: Finished, report: Report, entries: list[Entry]) -> None:
    """Says which images are cached: in all, by class, and the names of those that are not."""
    lost = {*report.missing, *report.damaged}
    old_keys = set(found.stored.keys().values())
    stale = [entry for entry in entries if entry.key in lost and entry.key not in old_keys]
    absent = [entry for entry in entries if entry.key in lost and entry.key in old_keys]
    content = _what_was_compared(settings, found, entries)
    say(f"images      {len(entries):,} asked for, {len(entries) - len(stale) - len(absent):,} cached ({content})")
    for label, some in (("stale", stale), ("missing", absent)):
        say(f"{label:<11} {len(some):,}")
        for entry in some[:_NUM_LISTED]:
            say(f"    {shown(f'{entry.class_name}/{entry.name}')}")
    stale_keys = {entry.key for entry in stale}
    status = cache_check.class_status(found.split.classes, found.parts, missing=lost, stale=stale_keys)
    say()
    for line in cache_check.class_table(status):
        say(line)
    say()


def _what_was_compared(settings: PreprocessSettings, found: Finished, entries: list[Entry]) -> str:
    """Says of how many images the content was compared with that of their latents."""
    if found.manifest.space.is_imported:
        return "imported, content not checked"
    at_hand = found.images_at_hand and sum(images.image_path(settings.data_path, e).is_file() for e in entries)
    if not at_hand:
        return "images not at hand, content not checked"
    return "content checked" if at_hand == len(entries) else f"content checked of {at_hand:,}, the rest not at hand"


def _say_contents(found: Finished, report: Report, cache: LatentCache) -> None:
    """Says what else is in the folder, and how the latents were made."""
    in_split = set(found.split.keys().values())
    orphans = sum(key not in in_split for key in report.orphaned)
    orphan_size = script.size(orphans * cache.space.row_bytes)
    say(f"orphaned    {orphans:,} rows of no image in the split ({orphan_size}); --prune lists what can go")
    on_disk = sum(shard.num_bytes for shard in report.shards)
    say(f"shards      {len(report.shards):,}, {script.size(on_disk)}, {len(report.damaged):,} damaged rows")
    for made, count in cache_check.ways_of_encoding(report).items():
        say(f"encoded     {count:,} rows with {made}")
    for other in cache_check.other_spaces(found.folder, cache.space):
        say(f"also there  {other.line()}")


def _say_statistics(folder: Path, cache: LatentCache, keys: list[str]) -> None:
    """Says how the latents are distributed in each channel, and draws it."""
    moments = cache_check.measured_rows(cache, keys)
    statistics = cache_check.ChannelStatistics.of(moments)
    path = folder / "latents.png"
    try:
        pictures.save_picture(cache_check.latents_picture(moments, statistics), path)
        where = f"see {path}"
    except OSError as error:  # a cache may be checked where it is read-only
        where = f"{path.name} cannot be written ({error.strerror or error})"
    say()
    for line in statistics.table():
        say(line)
    say()
    say(f"channels    {len(statistics.mean):,}, measured on {len(moments):,} images; {where}")


def _decode_some(settings: PreprocessSettings, found: Finished, cache: LatentCache, entries: list[Entry]) -> None:
    """Decodes a few entries, beside their images where these are at hand."""
    is_imported = found.manifest.space.is_imported
    if not Path(settings.vae_path).exists() or not (found.images_at_hand or is_imported):
        return
    try:
        _check_vae(settings.vae_path, found.manifest.space)
    except UserError as error:
        warn(f"nothing is decoded: {error}")
        return
    device = hardware.pick_device(settings.device)
    dataset = prepare.open_dataset(
        settings, found.split, entries, cache=cache, vae_at_hand=False, images_at_hand=not is_imported, device=device
    )
    shown_entries = [replace(entry, key="") for entry in entries] if is_imported else entries  # the key is of no image
    _preview(settings, dataset, shown_entries, device, found.folder / "preview.png", fresh=True)


# --- pruning -----------------------------------------------------------------------------------------------


def prune(settings: PreprocessSettings, sources: dict[str, str]) -> int:
    """Lists what nobody needs in a cache and, with --yes, removes it."""
    found = _open_finished(settings, sources)
    if settings.yes:  # told from permissions: a full disk, on which no file can be made, is why one prunes
        script.check_writable(found.folder, "output_folder", dry_run=True)
    used = found.manifest.space
    needed = _needed_keys(settings, sources, found)
    plan = cache_check.plan_prune(found.folder, used, needed)
    runs = " and ".join(place for place in settings.keep_for if (Path(place) / SPLIT_NAME).exists())
    say(f"kept        {len(needed[used.id]):,} images, of the split and of {runs or 'no run'}")
    own = plan.own
    if own.num_rows:
        say(f"orphaned    {own.num_rows:,} rows ({script.size(own.num_bytes)}) of no image in these splits")
        say("            runs that use another split of this cache will have to encode these again: name such runs in")
        say("            --keep_for, and wait for a preprocess_latents.py that is under way")
    for surplus, other in plan.others:
        some = "" if surplus.num_rows == other.num_rows else f"{surplus.num_rows:,} of "
        say(f"other kind  {some}{other.line()}")
    if plan.temporaries:
        size = script.size(plan.temporary_bytes)
        say(f"left over   {len(plan.temporaries):,} temporary files of killed processes ({size})")
    if plan.is_empty:
        say("nothing to remove")
        return DONE
    if not settings.yes:
        say(f"nothing was removed; the same command with --yes frees {script.size(plan.num_bytes)}")
        return DONE
    try:
        plan.carry_out()
    except OSError as error:
        raise Failed(
            f"pruning stopped: {error.filename or found.folder}: {error.strerror or error}; every latent that is "
            "needed is there, and the same command goes on"
        ) from error
    for problem in plan.problems:
        warn(f"{problem}; left alone")
    say(f"removed     {script.size(plan.num_bytes)}")
    return DONE


def _needed_keys(settings: PreprocessSettings, sources: dict[str, str], found: Finished) -> dict[str, set[str]]:
    """Returns space id -> keys that the cache's split or a run needs there."""
    used = found.manifest.space.id
    needed = {used: {*found.stored.keys().values(), *found.split.keys().values()}}
    for place in map(Path, settings.keep_for):
        split = read_split(place)
        if split is None:
            if prepare.is_explicit(sources, "keep_for"):
                raise UserError(f"--keep_for {place} is no run folder: it has no {SPLIT_NAME}")
            continue
        state = run_folder.newest_averages(place)  # its full states may be deleted
        space = used if state is None else Space.stored(state.meta["space"]).id
        needed.setdefault(space, set()).update(split.keys().values())
    return needed


# --- caches of other programs ------------------------------------------------------------------------------


def import_latents(settings: PreprocessSettings, sources: dict[str, str]) -> int:
    """Makes a cache of the latents that an older script left in a folder of .pt files."""
    folder = Path(settings.output_folder)
    script.check_writable(folder, "output_folder")
    _refuse_mixture(folder)
    index = None
    if prepare.is_explicit(sources, "data_path"):
        prepare.refuse_to_be_a_class(folder, settings.data_path)
        index = images.list_images(settings.data_path)
    lists = None if settings.import_split is None else old_caches.read_name_lists(Path(settings.import_split))
    files, others = old_caches.list_files(Path(settings.import_folder), index)  # type: ignore[arg-type]
    if others:
        warn(
            f"{len(others):,} .pt files are not called {old_caches.FILE_PATTERN}, such as {shown(others[0])}; not read"
        )
    chosen, image_size = _imported_space(settings, sources, old_caches.first_shape(files))
    result = _store(files, LatentCache(folder, chosen.space, writable=True), settings)
    _refuse_bad_files(result, len(files), settings)
    bad = [Skipped(file.class_name, file.name, reason) for file, reason in result.bad]
    rest = [] if index is None else _images_not_imported(settings.data_path, index, files)
    split, unknown = old_caches.split_of(result.entries, rest, lists, bad)
    prepare.imported_split(settings, sources, split, str(folder))
    _merge(result.cache)
    known = replace(settings, image_size=image_size, num_users="all", images_per_user="all", splits=("train",))
    durable.publish(folder / SPLIT_NAME, split.to_bytes())
    prepare.record_manifest(folder, known, chosen, len(split.train))
    _say_imported(settings, chosen.space, split, result, unknown)
    found = Finished(folder, Manifest(chosen.space, {}, {}), split, split, images_at_hand=False)
    _decode_some(known, found, result.cache, list(split.train))
    return _end(settings, [])


def _refuse_mixture(folder: Path) -> None:
    manifest = latent_cache.read_manifest(folder)
    if manifest is not None and not manifest.space.is_imported:
        raise UserError(f"{folder} holds latents of images already; give another --output_folder for imported ones")


def _imported_space(
    settings: PreprocessSettings, sources: dict[str, str], shape: tuple[int, int, int]
) -> tuple[prepare.ChosenSpace, int]:
    """Returns the space of latents [C h w], and the size of their images as far as it can be told."""
    scale_factor, image_size = settings.import_scale_factor, old_caches.usual_image_size(shape)
    try:
        identity = vae.read_identity(settings.vae_path)
    except UserError:
        if prepare.is_explicit(sources, "vae_path"):
            raise
    else:
        check_decodes(settings.vae_path, identity, shape[0])
        image_size = identity.downsampling * shape[1]
        if (identity.scale_factor, identity.shift_factor) != (scale_factor, 0.0):
            warn(
                f"{settings.vae_path} says scale_factor {identity.scale_factor:g} and shift_factor "
                f"{identity.shift_factor:g}, but --import_scale_factor is {scale_factor:g}; look at preview.png"
            )
    if prepare.is_explicit(sources, "image_size"):
        image_size = settings.image_size
    space = old_caches.space_of(shape, image_size, scale_factor)
    return prepare.ChosenSpace(space, scale_factor, 0.0, vae_at_hand=False), image_size


def _store(files: list[old_caches.OldFile], cache: LatentCache, settings: PreprocessSettings) -> old_caches.Imported:
    """Takes the files over under a progress bar; a signal ends it between batches of files."""
    with StopSignals() as signals, script.progress(total=len(files), unit="latents", label="import") as bar:

        def advance(count: int) -> None:
            bar.advance(count)
            signals.raise_if_received()

        try:
            return old_caches.store(files, cache, scale_factor=settings.import_scale_factor, advance=advance)
        except script.Stopped:
            say("stopped; no cache was made, and the same command begins anew")
            raise
        except OSError as error:
            raise Failed(f"a shard could not be written to {cache.folder}: {error.strerror or error}") from error


def _refuse_bad_files(result: old_caches.Imported, num_files: int, settings: PreprocessSettings) -> None:
    for file, reason in result.bad:
        say(f"    {shown(file.path.name)}: {reason}")
    if result.bad and not settings.skip_bad_images:
        raise Failed(
            f"{len(result.bad):,} of {num_files:,} files hold no good latent, and no cache was made; mend or remove "
            "them, or give --skip_bad_images to go on without them"
        )


def _images_not_imported(data_path: str, index: dict[str, list[str]], files: list[old_caches.OldFile]) -> list[Entry]:
    try:
        return old_caches.images_not_imported(index, files, lambda entry: prepare.read_file(data_path, entry))
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read: {error.strerror or error}; mend it or remove it") from None


def _say_imported(
    settings: PreprocessSettings, space: Space, split: Split, result: old_caches.Imported, unknown: list[str]
) -> None:
    channels, height, width = space.moments_shape
    kind = f"[{channels // 2} {height} {width}] of {' and '.join(sorted(result.dtypes))}"
    names = ", ".join(map(shown, split.classes[:8])) + " …" * (len(split.classes) > 8)
    say(f"imported    {len(result.entries):,} latents {kind} from {settings.import_folder}")
    say(f"classes     {len(split.classes):,}: {names}")
    say(f"split       {len(split.train):,} for training, {len(split.test):,} for testing")
    if result.bad:
        say(f"skipped     {len(result.bad):,} files")
    if unknown:
        warn(f"{len(unknown):,} names in {settings.import_split} stand for nothing that was imported:")
        for name in unknown[:_NUM_LISTED]:
            say(f"    {shown(name)}")
    say("lost        one frozen draw of each image, for there are no moments to draw from anew; no VAE can be told to")
    say("            fit or not; and no image can be encoded to go with these. Encode the images again where you can")


if __name__ == "__main__":
    sys.exit(main(None))
