"""Opens the dataset over a cache for the scripts (`open_dataset`) and for notebooks (`open_cache`).

Which images the settings mean is decided before, in `images/selection.py`, and which space in `latents/vae_fit.py`.
The images and the VAE may be absent as long as they are not needed: with a complete cache neither has to exist. What
goes with an open cache is here, too: joining its shards, writing its manifest, and saying what is missing.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from gait_latents.common import cli, hardware, mounts
from gait_latents.common.console import say, warn
from gait_latents.common.errors import UserError
from gait_latents.common.layout import MANIFEST_NAME, SPLIT_NAME
from gait_latents.images.reading import EDITED_BEFORE, EDITED_MEANWHILE, read_image
from gait_latents.images.split import Entry, Split, read_split
from gait_latents.latents import cache as latent_cache
from gait_latents.latents.cache import LatentCache
from gait_latents.latents.dataset import LatentDataset
from gait_latents.latents.manifest import read_manifest, write_manifest
from gait_latents.latents.vae_fit import ChosenSpace, check_vae_of_cache
from gait_latents.settings import ImageSettings, PreprocessSettings
from gait_latents.vae import load
from gait_latents.vae.batch_encoder import BatchEncoder
from gait_latents.vae.formats import layout


def merge_shards(cache: LatentCache) -> None:
    """Joins small shards into few large ones.

    The new shards are written before the old ones are removed. Where the disk has no room for both, the old ones stay,
    with a warning.
    """
    try:
        cache.merge()
    except OSError as error:
        warn(
            f"the shards in {cache.folder} could not be joined ({error.strerror or error}) and stay as they are, "
            "which costs nothing but their number"
        )


def record_manifest(folder: Path, settings: ImageSettings, chosen: ChosenSpace, num_images: int) -> None:
    """Writes the manifest of a cache: the settings as defaults for later runs, and the space; raises OSError."""
    write_manifest(
        folder,
        cli.to_dict(settings),
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
    """Opens the dataset over `entries`; what the cache lacks is encoded when it is needed.

    Args:
        settings: where the images and the VAE are, the image size, and how to encode.
        split: says which label each class has.
        entries: the images of the dataset, in its order.
        cache: the open cache of the space that the VAE makes.
        vae_at_hand: whether the VAE can be read; without it nothing is encoded.
        images_at_hand: whether the image folder is there; without it nothing is encoded.
        device: where batches are wanted, and where the VAE encodes.
        on_store_error: called when the cache cannot be written to; new rows then stay in memory. None raises instead.
        if_edited: the reason with which an image is refused whose content is no longer that of its key.
    """
    hardware.allow_tf32()

    def read_one(position: int) -> np.ndarray:
        how = {"image_size": settings.image_size, "resize": settings.resize, "if_edited": if_edited}
        return read_image(settings.data_path, entries[position], **how)

    encoder = BatchEncoder(
        lambda: load.load_vae(
            settings.vae_path,
            device,
            parts="encoder",
            memory_format=layout(device),
            trust_pickle=settings.trust_pickle,
        ),
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
        read_image=read_one if images_at_hand else None,
        encode_batch_size=settings.encode_batch_size,
        device=device,
        on_store_error=on_store_error,
    )


def say_equal(dataset: LatentDataset) -> None:
    """Says how many images have the same content as an earlier one, if any: they are counted once elsewhere."""
    num_equal = len(dataset) - dataset.num_different
    if num_equal:
        say(f"{num_equal:,} more have the same content as one of these, and share its latent")


def check_can_encode(dataset: LatentDataset, settings: ImageSettings) -> None:
    """Raises UserError when latents are missing and cannot be encoded, for want of the VAE or of the images."""
    missing = dataset.missing()
    if missing and not dataset.can_encode:
        name = "vae_path" if dataset.encode is None else "data_path"
        what = getattr(settings, name)
        reason = mounts.why_missing(name, what)
        raise UserError(
            f"{len(missing):,} of {dataset.num_different:,} images are not in {dataset.cache.folder} (the first is "
            f"{dataset.names[missing[0]]}), and {what}, which is needed to encode them, is not there"
            + (f"; {reason}" if reason else "")
        )


def open_cache(
    folder: str | Path, *, split: str = "train", device: str | torch.device = "cpu", trust_pickle: bool = False
) -> LatentDataset:
    """Opens the dataset of a cache that may lack images, able to encode them as its manifest says.

    Made for training loops of one's own: after `open_cache(folder).fill()` the cache is complete, and
    `LatentDataset.open(folder)` takes it. The VAE and the images are needed only if something is missing.

    Args:
        folder: the cache folder that preprocess_latents.py or train_latent_cfg.py made.
        split: "train", "validation" or "test"; the test images may be encoded in this way, too.
        device: where the VAE encodes.
        trust_pickle: as in `load_vae`; no manifest switches it on.

    Raises:
        UserError: when the folder is no cache, `split` is none of these, or latents are missing and the
            VAE that the manifest names cannot be read or is not the one that the cache was made with.
    """
    folder = Path(mounts.locate(str(folder)))
    manifest, stored = read_manifest(folder), read_split(folder)
    if manifest is None or stored is None:
        raise UserError(f"{folder} has no {MANIFEST_NAME} or no {SPLIT_NAME}; run preprocess_latents.py")
    layer = cli.stored_layer(PreprocessSettings, f"{folder}/{MANIFEST_NAME}", manifest.settings, only_about_cache=True)
    settings = replace(cli.resolve(PreprocessSettings, [layer]).settings, trust_pickle=trust_pickle)
    is_writable = latent_cache.why_not_writable(folder, manifest.space) is None
    cache = LatentCache(folder, manifest.space, writable=is_writable)

    def open_it(*, can_encode: bool) -> LatentDataset:
        return open_dataset(
            settings,
            stored,
            list(stored.part(split)),
            cache=cache,
            vae_at_hand=can_encode,
            images_at_hand=can_encode,
            device=torch.device(device),
            if_edited=EDITED_BEFORE,
        )

    dataset = open_it(can_encode=False)
    if not dataset.missing():
        return dataset
    check_vae_of_cache(manifest.space, settings.vae_path, trust_pickle=trust_pickle)
    return open_it(can_encode=True)
