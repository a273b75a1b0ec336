"""From settings to an open dataset: what preprocessing and training both do first.

Two questions are answered here, for both scripts in the same way: which images (`choose_images`), and which
space of the cache (`choose_space`). Each thing may be absent as long as it is not needed: with a complete cache
neither the images nor the VAE have to exist.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import config
import durable
import hardware
import images
import script
import vae
from config import ImageSettings, PreprocessSettings, UserError
from images import BadImage, Entry, Skipped, Split, shown
from latent_cache import MANIFEST_NAME, LatentCache, Manifest, Space, read_manifest, write_manifest
from latent_dataset import SPLIT_NAME, BatchEncoder, LatentDataset, read_split
from ranks import OtherFailed, Ranks
from script import (
    LABELS_NAME,
    PAGE_NAME,
    RECORD_NAME,
    REPORT_NAME,
    SETTINGS_NAME,
    Stopped,
    StopSignals,
    say,
    warn,
)


def is_explicit(sources: Mapping[str, str], name: str) -> bool:
    """Says whether the user gave this setting in a flag or a --config file."""
    return sources[name].startswith(("flag", "--config "))


# --- which images ------------------------------------------------------------------------------------------


def images_at_hand(settings: ImageSettings, sources: Mapping[str, str], *, may_lack: bool) -> bool:
    """Says whether the image folder has class folders; unless `may_lack`, one that was asked for must be there."""
    folder = Path(settings.data_path)
    is_needed = not may_lack and is_explicit(sources, "data_path")
    if is_needed and not folder.is_dir():
        raise UserError(no_images_message(settings.data_path))
    return is_needed or (folder.is_dir() and any(child.is_dir() for child in folder.iterdir()))


def no_images_message(data_path: str, *, also: str = "") -> str:
    """Says what is wrong with a data folder that cannot be used, and what to give instead."""
    folder = Path(data_path)
    state = "has no sub-folders" if folder.is_dir() else "is a file" if folder.exists() else "does not exist"
    return f"--data_path {shown(data_path)} {state}{also}; {images.LAYOUT_REMEDY}"


def choose_images(settings: ImageSettings, *, at_hand: bool, stored: Split | None, where: str) -> Split:
    """Draws the split, from the image folder when it is at hand, else from the one stored in the cache `where`.

    Both give the same split when the folder is as it was. Every entry comes with its content key.

    Raises:
        UserError: when neither is there, a class has too few images, or the cache would count as a class.
    """
    if not at_hand and stored is None:
        also = f", and {where} holds no split of earlier images"
        raise UserError(no_images_message(settings.data_path, also=also))
    if at_hand:
        refuse_to_be_a_class(Path(where), settings.data_path)
    else:
        _check_classes_known(settings, stored, where)  # type: ignore[arg-type]
    index = images.list_images(settings.data_path) if at_hand else stored.index()  # type: ignore[union-attr]
    if at_hand:
        _refuse_own_outputs(settings, list(index))
    notice = images.missing_classes_warning(index, settings.num_users)
    if notice:
        warn(notice)
    split = images.make_split(
        index,
        num_users=settings.num_users,
        images_per_user=settings.images_per_user,
        seed=settings.seed,
        split=settings.split,
        split_gap=settings.split_gap,
    )
    if at_hand:
        return with_fresh_keys(split, settings.data_path)
    known = stored.keys()  # type: ignore[union-attr]
    return split.with_keys({place: known.get(place, _key_of_no_content(*place)) for place in _places(split)})


def refuse_to_be_a_class(folder: Path, data_path: str | None) -> None:
    """Raises UserError for a folder to write to among the class folders: its pictures would be taken for images.

    Args:
        data_path: the image folder, which need not exist; None where nobody knows it.
    """
    place = folder.resolve()
    if data_path and Path(data_path).resolve() in (place, place.parent):
        raise UserError(
            f"{shown(folder)} is among the class folders of --data_path {shown(data_path)} and would count as one; "
            "give a folder outside"
        )


_OUTPUTS = {  # files that lie together in a folder of ours -> what wrote them
    (MANIFEST_NAME, SPLIT_NAME): "is a cache of latents",
    (SETTINGS_NAME, SPLIT_NAME): "was written by train_latent_cfg.py",
    (RECORD_NAME, LABELS_NAME): "was written by generate.py",
    (REPORT_NAME, PAGE_NAME): "was written by evaluate_images.py",
}


def _refuse_own_outputs(settings: ImageSettings, folders: list[str]) -> None:
    """Raises UserError when one of the class folders in use is what a script wrote: its pictures are no class."""
    for name in folders if settings.num_users == "all" else folders[: int(settings.num_users)]:
        for files, what in _OUTPUTS.items():
            if all((Path(settings.data_path) / name / file).is_file() for file in files):
                raise UserError(
                    f"the folder {shown(name)} in --data_path {shown(settings.data_path)} {what}, and its pictures "
                    "would count as a class; move it elsewhere"
                )


def _check_classes_known(settings: ImageSettings, stored: Split, where: str) -> None:
    """Raises UserError when more classes are asked for than the stored split was given of the images."""
    known, asked = stored.rule["num_users"], settings.num_users
    was_cut = known == len(stored.classes)
    if was_cut and (asked == "all" or int(asked) > int(known)):
        also = f"--num_users is {asked}, but {where} knows {known} classes, and "
        raise UserError(also + no_images_message(settings.data_path))


def with_fresh_keys(split: Split, data_path: str) -> Split:
    """Returns the split with the content key of each file as it is now; one that cannot be read keeps its key."""

    def key_of(entry: Entry) -> str:
        try:
            return images.image_key(read_file(data_path, entry))
        except OSError:
            return entry.key or _key_of_no_content(entry.class_name, entry.name)

    entries = [*split.train, *split.test]
    with ThreadPoolExecutor() as pool:
        keys = list(pool.map(key_of, entries))
    return split.with_keys(dict(zip(_places(split), keys, strict=True)))


def _places(split: Split) -> list[tuple[str, str]]:
    return [(entry.class_name, entry.name) for entry in (*split.train, *split.test)]


def _key_of_no_content(class_name: str, name: str) -> str:
    # Not a hash of an image's bytes, so never cached: reading the image is tried when it is needed, and fails by name.
    return images.image_key(json.dumps(["unreadable", class_name, name]).encode())


def warn_of_shared_content(split: Split) -> None:
    """Warns when the same file content is in the training and the test images."""
    notice = shared_content_warning(split)
    if notice:
        warn(notice)


def shared_content_warning(split: Split) -> str | None:
    """Returns a warning when the same file content is in the training and the test images, else None."""
    pairs = images.shared_content(split)
    if not pairs:
        return None
    train, test = pairs[0]
    return (
        f"{len(pairs)} test image(s) have the same content as a training image, such as "
        f"{test.class_name}/{test.name} and {train.class_name}/{train.name}; scores on them will look too good"
    )


def find_bad_images(entries: Iterable[Entry], *, data_path: str, image_size: int) -> tuple[Skipped, ...]:
    """Decodes each entry once and returns those that cannot be read, with the reason."""

    def reason(entry: Entry) -> str | None:
        try:
            read_image(data_path, entry, image_size=image_size)
        except BadImage as error:
            return str(error)
        return None

    entries = list(entries)
    with ThreadPoolExecutor() as pool:
        reasons = list(pool.map(reason, entries))
    return tuple(Skipped(e.class_name, e.name, r) for e, r in zip(entries, reasons, strict=True) if r is not None)


def common_suffix(split: Split) -> str:
    """Returns the commonest ending of the training images, such as .jpg."""
    return Counter(Path(entry.name).suffix.lower() for entry in split.train).most_common(1)[0][0]


def skipped(entries: list[Entry], bad: Iterable[tuple[int, str]]) -> tuple[Skipped, ...]:
    """Turns (position, reason) pairs into what the split records of images that are left out."""
    return tuple(Skipped(entries[i].class_name, entries[i].name, reason) for i, reason in bad)


EDITED_MEANWHILE = "changed since this program looked at it first; start again"
_EDITED_BEFORE = (
    "was edited since the cache was made; put it back as it was, or run preprocess_latents.py again, which takes it as "
    "it is now"
)


def read_image(data_path: str, entry: Entry, *, image_size: int, if_edited: str = EDITED_MEANWHILE) -> Any:
    """Reads one image as uint8 [S S 3].

    Raises:
        BadImage: when it cannot be read, or with the reason `if_edited` when it has not the content of its key.
    """
    try:
        data = read_file(data_path, entry)
    except OSError as error:
        raise BadImage(f"cannot be read: {error.strerror or error}") from error
    if entry.key and images.image_key(data) != entry.key:
        raise BadImage(if_edited)
    return images.decode(data, image_size=image_size)


def read_file(data_path: str, entry: Entry) -> bytes:
    """Reads the file of an image; raises OSError."""
    return durable.read_whole(images.image_path(data_path, entry), at_most=images.MAX_FILE_BYTES)


# --- which space -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ChosenSpace:
    """The space of the cache that the settings mean, and what is known about its VAE."""

    space: Space
    scale_factor: float
    shift_factor: float
    vae_at_hand: bool


def choose_space(
    settings: ImageSettings, sources: Mapping[str, str], known: ChosenSpace | None, *, may_lack: bool
) -> ChosenSpace:
    """Derives the space from the VAE's encoder, or takes the known one when there is no VAE.

    Args:
        known: the space of the run that goes on, or of the cache's manifest.
        may_lack: whether to go on without a VAE that was asked for, too.

    Raises:
        UserError: when a VAE that was asked for cannot be read, or there is neither a VAE nor a known space.
    """
    try:
        identity = vae.read_identity(settings.vae_path)
    except UserError as error:
        if known is None or (is_explicit(sources, "vae_path") and not may_lack):
            raise
        say(f"no VAE at hand ({error}); taking the latents that the cache holds")
        return _without_vae(settings, known)
    if settings.image_size % identity.downsampling:
        below = settings.image_size // identity.downsampling * identity.downsampling
        near = " or ".join(str(size) for size in (below, below + identity.downsampling) if size)
        raise UserError(
            f"--image_size {settings.image_size} is not a multiple of {identity.downsampling}, "
            f"the downsampling of {settings.vae_path}; take {near}"
        )
    side = settings.image_size // identity.downsampling
    space = Space.of(
        identity.fingerprint, settings.image_size, images.RECIPE, (2 * identity.latent_channels, side, side)
    )
    if known is not None and known.space.id != space.id:
        differences = "; ".join(space.differing_fields(known.space))
        say(f"the cache's last latents do not fit and will not be used: {differences}")
    return ChosenSpace(space, identity.scale_factor, identity.shift_factor, vae_at_hand=True)


def _without_vae(settings: ImageSettings, known: ChosenSpace) -> ChosenSpace:
    size = known.space.spec["image_size"]
    if settings.image_size != size:
        raise UserError(
            f"--image_size is {settings.image_size}, but the cached latents are of images of {size}, and the VAE "
            f"{settings.vae_path} that could encode them again is not at hand"
        )
    return known


HOLDS_IMPORTED = "holds latents that an earlier version took over from another program"


def manifest_of_images(folder: str | Path) -> Manifest | None:
    """Returns the manifest of a cache; None, after a line, where its latents were imported and are of no use here.

    Its settings are then left out as well: an import trained on all images that it found.
    """
    manifest = read_manifest(folder)
    if manifest is None or not manifest.space.is_imported:
        return manifest
    say(
        f"{folder} {HOLDS_IMPORTED}: they are left alone, and the images are encoded again with the VAE and the "
        "image_size in use"
    )
    return None


def space_of_manifest(manifest: Manifest) -> ChosenSpace:
    """Returns the space that the manifest of a cache names."""
    scale, shift = (_factor(manifest.record.get(name)) for name in ("scale_factor", "shift_factor"))
    return ChosenSpace(manifest.space, scale, shift, vae_at_hand=False)


def _factor(value: object) -> float:
    if type(value) not in (int, float) or not -1e30 < value < 1e30:  # type: ignore[operator]
        raise UserError("the manifest of the cache names no scale_factor and shift_factor; run preprocess_latents.py")
    return value  # type: ignore[return-value]


def record_manifest(folder: Path, settings: ImageSettings, chosen: ChosenSpace, num_images: int) -> None:
    """Writes the manifest: the settings as defaults for later runs, and the space."""
    write_manifest(
        folder,
        config.to_dict(settings),
        chosen.space,
        {"scale_factor": chosen.scale_factor, "shift_factor": chosen.shift_factor, "images": num_images},
    )


# --- the dataset -------------------------------------------------------------------------------------------


def open_dataset(
    settings: ImageSettings,
    split: Split,
    entries: list[Entry],
    *,
    cache: LatentCache,
    vae_at_hand: bool,
    images_at_hand: bool,
    device: torch.device,
    on_store_error: Callable[[OSError], None] | None = None,
    if_edited: str = EDITED_MEANWHILE,
) -> LatentDataset:
    """Opens the dataset over `entries`, able to encode misses where VAE and images are at hand.

    An image whose content is not that of its key is refused with the reason `if_edited`.
    """
    hardware.allow_tf32()
    encoder = BatchEncoder(
        lambda: vae.load_vae(settings.vae_path, device, parts="encoder", memory_format=torch.channels_last),
        device=device,
        batch_size=settings.encode_batch_size,
        dtype=hardware.NUMBER_FORMATS[settings.encode_precision],
    )
    return LatentDataset(
        cache,
        [entry.key for entry in entries],
        split.labels(entries),
        [f"{entry.class_name}/{entry.name}" for entry in entries],
        encode=encoder if vae_at_hand else None,
        read_image=(
            lambda i: read_image(settings.data_path, entries[i], image_size=settings.image_size, if_edited=if_edited)
        )
        if images_at_hand
        else None,
        encode_batch_size=settings.encode_batch_size,
        device=device,
        on_store_error=on_store_error,
    )


def say_equal(dataset: LatentDataset) -> None:
    """Says how many images are not counted among the different ones, if any."""
    num_equal = len(dataset) - dataset.num_different
    if num_equal:
        say(f"{num_equal:,} more have the very content of another, and share its latent")


def check_can_encode(dataset: LatentDataset, settings: ImageSettings) -> None:
    """Raises UserError when something is missing, and the VAE or the images, which could encode it, are so too."""
    missing = dataset.missing()
    if missing and not dataset.can_encode:
        what = settings.vae_path if dataset.encode is None else settings.data_path
        raise UserError(
            f"{len(missing):,} of {dataset.num_different:,} images are not in {dataset.cache.folder} (the first is "
            f"{dataset.names[missing[0]]}), and {what}, which is needed to encode them, is not there"
        )


def open_cache(folder: str | Path, *, split: str = "train", device: str | torch.device = "cpu") -> LatentDataset:
    """Opens the dataset of a cache that may lack images, able to encode them as its manifest says.

    Made for training loops of one's own: after `open_cache(folder).fill()` the cache is complete, and
    `LatentDataset.open(folder)` takes it. The VAE and the images are needed only if something is missing.

    Args:
        folder: the cache folder that preprocess_latents.py or train_latent_cfg.py made.
        split: "train" or "test"; the test images may be encoded in this way, too.
        device: where the VAE encodes.

    Raises:
        UserError: when the folder is no cache, the split is neither, or something is missing and its VAE is not the
            one of the cache.
    """
    folder = Path(folder)
    manifest, stored = read_manifest(folder), read_split(folder)
    if manifest is None or stored is None:
        raise UserError(f"{folder} has no {MANIFEST_NAME} or no {SPLIT_NAME}; run preprocess_latents.py")
    layer = config.stored_layer(
        PreprocessSettings, f"{folder}/{MANIFEST_NAME}", manifest.settings, only_about_cache=True
    )
    settings = config.resolve(PreprocessSettings, [layer]).settings
    cache = LatentCache(folder, manifest.space, writable=durable.can_write(folder))

    def opened(*, able: bool) -> LatentDataset:
        return open_dataset(
            settings,
            stored,
            list(stored.part(split)),
            cache=cache,
            vae_at_hand=able,
            images_at_hand=able,
            device=torch.device(device),
            if_edited=_EDITED_BEFORE,
        )

    dataset = opened(able=False)
    if not dataset.missing():
        return dataset
    check_vae_of(manifest.space, settings.vae_path)
    return opened(able=True)


def check_vae_of(known: Space, vae_path: str) -> None:
    """Raises UserError unless this VAE can be read and is the one that makes latents of a known space."""
    space = Space.of(
        vae.read_identity(vae_path).fingerprint, known.spec["image_size"], images.RECIPE, known.moments_shape
    )
    if space.id != known.id:
        differences = "; ".join(space.differing_fields(known))
        raise UserError(f"{vae_path} makes other latents than those of the cache ({differences}); give that one")


def fill_together(dataset: LatentDataset, ranks: Ranks, signals: StopSignals) -> list[tuple[int, str]]:
    """Encodes all that is missing, each process its share, and takes up what the others have published.

    What does not appear in the cache folder is encoded here too: the disk of another process may not be this one, or
    take no files, or the process may have died. When one fails, all end; this belongs in a block of `Ranks.together`.

    Returns:
        (position, reason) of each image that could not be encoded, equal ones included.

    Raises:
        Stopped: after a signal to any of the processes; what waits in memory is still to be published.
        OtherFailed: when another process could not encode its share; it tells why at the end of the block.
    """
    missing = dataset.missing()
    if not missing and ranks.count == 1:
        return []
    with script.progress(total=len(missing), unit="images", label="encode") as bar:

        def advance(count: int) -> None:
            bar.advance(count)
            if count:
                ranks.sign_of_life(_FILLED)
            ranks.raise_if_stopped(signals)
            ranks.raise_if_failed(_FILLED)

        try:
            bad = _fill_shares(dataset, missing, ranks, advance)
            ranks.raise_if_stopped(signals)  # by one that came since the last look
            return bad
        except OtherFailed:
            dataset.cache_flush()
            raise
        except Stopped:
            raise
        except BaseException:
            ranks.tell(f"{_FILLED} failed")
            raise


_ENCODED, _FILLED = "encoded", "filled"  # what a process tells the others: its share is encoded; all is there


def _fill_shares(
    dataset: LatentDataset, missing: list[int], ranks: Ranks, advance: Callable[[int], None]
) -> list[tuple[int, str]]:
    bad = dataset.fill(ranks.share(missing), advance=advance)
    if ranks.count == 1:
        return bad
    ranks.tell(_ENCODED)

    def look() -> tuple[int, int]:
        found = dataset.refresh()
        advance(found)
        return found, len(_others(dataset, bad))

    ranks.await_others(_ENCODED, look)
    left = _others(dataset, bad)
    bad = sorted(bad + dataset.fill(left, advance=advance)) if left else bad
    ranks.tell(_FILLED)
    ranks.await_end(_FILLED, lambda: advance(0))  # an exchange comes next, with a limit of time
    return bad


def _others(dataset: LatentDataset, bad: list[tuple[int, str]]) -> list[int]:
    """Returns what is missing and has not failed here."""
    failed = {position for position, _ in bad}
    return [position for position in dataset.missing() if position not in failed]
