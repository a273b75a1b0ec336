"""What preprocess_latents.py does besides encoding: it checks a cache, prunes it, or makes one of older latents."""

import shlex
from dataclasses import dataclass, replace
from pathlib import Path

import cache_check
import config
import durable
import hardware
import images
import latent_cache
import old_caches
import prepare
import run_folder
import script
import vae
from config import PreprocessSettings, UserError
from images import Entry, Skipped, Split, shown
from latent_cache import LatentCache, Manifest, Report, Space
from latent_dataset import SPLIT_NAME, read_split
from preview import draw_preview
from sampling import check_decodes
from script import DONE, FAILED, Failed, StopSignals, say, warn

_NUM_LISTED = 20  # names shown of a longer list


def merge_shards(cache: LatentCache) -> None:
    """Joins the shards into few; where there is no room for both, they stay as they are."""
    try:
        cache.merge()
    except OSError as error:
        warn(
            f"the shards in {cache.folder} could not be joined ({error.strerror or error}) and stay as they are, "
            "which costs nothing but their number"
        )


def say_next(settings: PreprocessSettings) -> None:
    """Says how to train on the cache."""
    standard = config.defaults(config.TrainSettings)["latents_cache_folder"]
    folder = settings.output_folder
    same = Path(folder).absolute() == Path(standard).absolute()
    flag = "" if same else f" --latents_cache_folder {shlex.quote(folder)}"
    say()
    say(f"next: {script.python_word()} train_latent_cfg.py{flag}")


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
        durable.publish(path, cache_check.latents_picture(moments, statistics))
        where = f"see {path}"
    except UserError as error:
        where = f"{path.name} is not drawn: {error}"
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
    try:
        device = hardware.pick_device(settings.device)
    except UserError as error:  # the check itself needs none
        warn(f"no preview.png: {error}")
        return
    dataset = prepare.open_dataset(
        settings, found.split, entries, cache=cache, vae_at_hand=False, images_at_hand=not is_imported, device=device
    )
    shown_entries = [replace(entry, key="") for entry in entries] if is_imported else entries  # the key is of no image
    draw_preview(settings, dataset, shown_entries, device, found.folder / "preview.png", fresh=True)


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
    merge_shards(result.cache)
    known = replace(settings, image_size=image_size, num_users="all", images_per_user="all", splits=("train",))
    durable.publish(folder / SPLIT_NAME, split.to_bytes())
    prepare.record_manifest(folder, known, chosen, len(split.train))
    _say_imported(settings, chosen.space, split, result, unknown)
    found = Finished(folder, Manifest(chosen.space, {}, {}), split, split, images_at_hand=False)
    _decode_some(known, found, result.cache, list(split.train))
    say_next(settings)
    return DONE


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
