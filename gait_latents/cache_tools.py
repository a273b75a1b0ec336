"""What preprocess_latents.py does besides encoding: checking a cache (--verify) and pruning it (--prune).

Pruning keeps what runs need, so this module looks into run folders and stands above `latents` and `training`.
"""

from dataclasses import dataclass
from pathlib import Path

from gait_latents.common import cli, console, files, hardware, mounts
from gait_latents.common.console import say, show_name, warn
from gait_latents.common.errors import DONE, FAILED, Failed, UserError
from gait_latents.common.layout import CHANNELS_NAME, MANIFEST_NAME, PREVIEW_NAME, SPLIT_NAME
from gait_latents.images import data_report, reading, selection
from gait_latents.images.split import Entry, Split, read_split
from gait_latents.latents import opening, vae_fit
from gait_latents.latents import verify as cache_verify
from gait_latents.latents.cache import LatentCache
from gait_latents.latents.manifest import HOLDS_IMPORTED, Manifest, did_you_mean, read_manifest
from gait_latents.latents.preview import draw_preview
from gait_latents.latents.prune import other_spaces, plan_prune
from gait_latents.latents.verify import CacheReport
from gait_latents.settings import PreprocessSettings
from gait_latents.training import run_folder

_NUM_LISTED = 20  # of a longer list, so many names are shown


# --- a check -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Finished:
    """A cache that has a manifest and a split.

    Attributes:
        folder: the cache folder.
        manifest: its manifest.
        stored: its split, as written.
        split: the split with the content keys of the images as they are now, where the images are at hand.
        images_at_hand: whether they are.
    """

    folder: Path
    manifest: Manifest
    stored: Split
    split: Split
    images_at_hand: bool

    @property
    def parts(self) -> dict[str, tuple[Entry, ...]]:
        """The entries that were to be encoded, under "train", "validation" and "test"."""
        # The manifest of a cache that training made names no splits: it holds what training needs.
        named = {"splits": self.manifest.settings.get("splits", ["train", "validation"])}
        parts = cli.stored_layer(PreprocessSettings, "manifest", named).values["splits"]
        return {name: getattr(self.split, name) for name in parts}


def _open_finished(settings: PreprocessSettings, sources: dict[str, str]) -> Finished:
    folder = Path(settings.output_folder)
    manifest, stored = read_manifest(folder), read_split(folder)
    if manifest is None or stored is None:
        guess = did_you_mean(folder)
        remedy = f"{guess and f'{guess} Else '}run preprocess_latents.py"
        remedy = mounts.why_missing("output_folder", folder) or remedy
        raise UserError(f"{folder} holds no finished cache ({MANIFEST_NAME} and {SPLIT_NAME}); {remedy}")
    if manifest.space.is_imported:
        raise UserError(f"{folder} {HOLDS_IMPORTED}; run preprocess_latents.py, which encodes the images again")
    at_hand = selection.images_at_hand(settings, sources, may_lack=False)
    split = selection.with_fresh_keys(stored, settings.data_path) if at_hand else stored
    return Finished(folder, manifest, stored, split, at_hand)


def verify(settings: PreprocessSettings, sources: dict[str, str]) -> int:
    """Checks the seal of every latent in a cache, compares the cache with split and images, and measures the latents.

    Returns:
        The exit code.
    """
    found = _open_finished(settings, sources)
    if cli.is_explicit(sources, "vae_path"):
        identity = vae_fit.check_vae_of_cache(
            found.manifest.space, settings.vae_path, trust_pickle=settings.trust_pickle
        )
        vae_fit.say_vae(settings.vae_path, identity)
    cache = LatentCache(found.folder, found.manifest.space, writable=False)
    entries = [entry for part in found.parts.values() for entry in part]
    report = cache_verify.verify(cache, [entry.key for entry in entries])
    for problem in report.problems:
        warn(problem)
    data_report.warn_of_equal_pictures(found.split)
    _say_status(settings, found, report, entries)
    _say_contents(found, report, cache)
    if report.good:
        _say_statistics(found.folder, cache, report.good)
        _decode_some(settings, found, cache, entries)
    return FAILED if report.missing or report.damaged or report.problems else DONE


def _say_status(settings: PreprocessSettings, found: Finished, report: CacheReport, entries: list[Entry]) -> None:
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
            say(f"    {show_name(f'{entry.class_name}/{entry.name}')}")
    stale_keys = {entry.key for entry in stale}
    status = cache_verify.class_status(found.split.classes, found.parts, missing=lost, stale=stale_keys)
    say()
    for line in cache_verify.class_table(status):
        say(line)
    say()


def _what_was_compared(settings: PreprocessSettings, found: Finished, entries: list[Entry]) -> str:
    """Says for how many images it was checked that they have the content that their latents were made of."""
    at_hand = found.images_at_hand and sum(reading.image_path(settings.data_path, e).is_file() for e in entries)
    if not at_hand:
        return "images not at hand, content not checked"
    return "content checked" if at_hand == len(entries) else f"content checked of {at_hand:,}, the rest not at hand"


def _say_contents(found: Finished, report: CacheReport, cache: LatentCache) -> None:
    """Says what else is in the folder, and how the latents were made."""
    in_split = set(found.split.keys().values())
    orphans = sum(key not in in_split for key in report.orphaned)
    orphan_size = console.size(orphans * cache.space.row_bytes)
    say(f"orphaned    {orphans:,} rows of no image in the split ({orphan_size}); --prune lists what can go")
    on_disk = sum(shard.num_bytes for shard in report.shards)
    say(f"shards      {len(report.shards):,}, {console.size(on_disk)}, {len(report.damaged):,} damaged rows")
    for made, count in cache_verify.ways_of_encoding(report).items():
        say(f"encoded     {count:,} rows with {made}")
    for other in other_spaces(found.folder, cache.space):
        say(f"also there  {other.line()}")


def _say_statistics(folder: Path, cache: LatentCache, keys: list[str]) -> None:
    """Says how the latents are distributed in each channel, and draws it."""
    moments = cache_verify.read_rows_to_measure(cache, keys)
    statistics = cache_verify.ChannelStatistics.of(moments)
    path = folder / CHANNELS_NAME
    try:
        files.publish(path, cache_verify.latents_picture(moments, statistics), below=folder)
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
    """Decodes a few entries, and draws them below their images where these are at hand."""
    if not Path(settings.vae_path).exists() or not found.images_at_hand:
        return
    try:
        vae_fit.check_vae_of_cache(found.manifest.space, settings.vae_path, trust_pickle=settings.trust_pickle)
    except UserError as error:
        warn(f"nothing is decoded: {error}")
        return
    try:
        device = hardware.pick_device(settings.device)
    except UserError as error:  # the check itself needs none
        warn(f"no {PREVIEW_NAME}: {error}")
        return
    dataset = opening.open_dataset(
        settings, found.split, entries, cache=cache, vae_at_hand=False, images_at_hand=True, device=device
    )
    draw_preview(settings, dataset, entries, device, found.folder / PREVIEW_NAME, fresh=True)


# --- pruning -----------------------------------------------------------------------------------------------


def prune(settings: PreprocessSettings, sources: dict[str, str]) -> int:
    """Lists what nobody needs in a cache and, with --yes, removes it; returns the exit code."""
    found = _open_finished(settings, sources)
    if settings.yes:  # asked of the permissions and not tried: pruning is for full disks, on which no file can be made
        files.check_writable(found.folder, "output_folder", by_trying=False)
    used = found.manifest.space
    needed = _needed_keys(settings, sources, found)
    plan = plan_prune(found.folder, used, needed)
    runs = " and ".join(place for place in settings.keep_for if (Path(place) / SPLIT_NAME).exists())
    say(f"kept        {len(needed[used.id]):,} images, of the split and of {runs or 'no run'}")
    own = plan.own
    if own.num_rows:
        say(f"orphaned    {own.num_rows:,} rows ({console.size(own.num_bytes)}) of no image in these splits")
        say("            runs that use another split of this cache will have to encode these again: name such runs in")
        say("            --keep_for, and wait for a preprocess_latents.py that is under way")
    for surplus, other in plan.others:
        some = "" if surplus.num_rows == other.num_rows else f"{surplus.num_rows:,} of "
        say(f"other kind  {some}{other.line()}")
    if plan.temporaries:
        size = console.size(plan.temporary_bytes)
        say(f"left over   {len(plan.temporaries):,} temporary files of killed processes ({size})")
    told = plan.problems
    for problem in told:
        warn(f"{problem}; left alone")
    if plan.is_empty:
        say("nothing to remove")
        return DONE
    if not settings.yes:
        say(f"nothing was removed; the same command with --yes frees {console.size(plan.num_bytes)}")
        return DONE
    try:
        plan.carry_out()
    except OSError as error:
        raise Failed(
            f"pruning stopped: {error.filename or found.folder}: {error.strerror or error}; every latent that is "
            "needed is there, and the same command goes on"
        ) from error
    for problem in plan.problems:
        if problem not in told:
            warn(f"{problem}; left alone")
    say(f"removed     {console.size(plan.num_bytes)}")
    return DONE


def _needed_keys(settings: PreprocessSettings, sources: dict[str, str], found: Finished) -> dict[str, set[str]]:
    """Returns space id -> keys that the cache's split or a run needs there."""
    used = found.manifest.space.id
    needed = {used: {*found.stored.keys().values(), *found.split.keys().values()}}
    for place in map(Path, settings.keep_for):
        split = read_split(place)
        if split is None:
            if cli.is_explicit(sources, "keep_for"):
                missing = mounts.why_missing("keep_for", place)
                wrong = f"is no run folder: it has no {SPLIT_NAME}" if missing is None else f"does not exist; {missing}"
                raise UserError(f"--keep_for {place} {wrong}")
            continue
        state = run_folder.newest_averages(place)  # not a full state: those may have been deleted
        space = used if state is None else state.meta.space.id
        needed.setdefault(space, set()).update(split.keys().values())
    return needed
