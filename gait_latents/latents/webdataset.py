"""Writes the latents of a cache as WebDataset shards: tar files that are read from beginning to end, for many nodes.

latents-000000.tar     rows in the order of the dataset: 000000000.npy, 000000000.cls and 000000000.json, and so on
dataset.json           number of rows and shards, shape of the moments, class names, normalisation; written last

A row is the moments as the cache has them (float16 [2C h w], mean then log-variance, unscaled), its label in decimal
digits, and in JSON the content key of the image, the seal of the row in the cache, and class and name of the image.
"""

import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from gait_latents.common import console, files
from gait_latents.common.console import say
from gait_latents.common.errors import UserError
from gait_latents.common.layout import DATASET_NAME
from gait_latents.images.split import read_split
from gait_latents.latents.dataset import LatentDataset
from gait_latents.latents.shard import keys_of_rows, seal_rows


def shard_name(number: int) -> str:
    """Names a shard by its number."""
    return f"latents-{number:06d}.tar"


def export(cache_folder: Path, output_folder: Path, *, rows_per_shard: int, seed: int) -> None:
    """Writes the training latents of a complete cache.

    Equal caches give equal files. A folder that holds another export is refused; what a stopped export left is written
    again.

    Args:
        seed: chooses the images that the normalisation is measured on, as in training.

    Raises:
        UserError: when the cache is incomplete, or the folder holds other latents.
    """
    dataset = LatentDataset.open(cache_folder, seed=seed)
    facts = _facts(dataset, cache_folder, rows_per_shard)
    path = output_folder / DATASET_NAME
    if path.exists() and files.read_whole(path, at_most=len(facts)) != facts:
        raise UserError(
            f"{output_folder} holds other latents ({DATASET_NAME}); remove it, or give another --output_folder"
        )
    files.check_writable(output_folder, "output_folder")
    count = -(-len(dataset) // rows_per_shard)
    with console.progress(total=len(dataset), unit="latents", label="export", only_if_slow=True) as bar:
        for number in range(count):
            rows = range(number * rows_per_shard, min((number + 1) * rows_per_shard, len(dataset)))
            files.publish(output_folder / shard_name(number), _tar(dataset, rows))
            bar.advance(len(rows))
    files.publish(path, facts)
    say(f"{len(dataset):,} latents in {count:,} shards of WebDataset in {output_folder}")


def _facts(dataset: LatentDataset, cache_folder: Path, rows_per_shard: int) -> bytes:
    split = read_split(cache_folder)
    assert split is not None and dataset.norm is not None  # since the dataset is open
    facts = {
        "rows": len(dataset),
        "rows_per_shard": rows_per_shard,
        "moments_shape": list(dataset.moments_shape),
        "class_names": list(split.classes),
        "latent_norm": dataset.norm.to_json(),
        "space": dataset.cache.space.id,
        "digest": dataset.digest(),
    }
    return (json.dumps(facts, indent=1) + "\n").encode()


def _tar(dataset: LatentDataset, rows: range) -> bytes:
    """Returns the tar file of some rows; nothing in it depends on the time or the user."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, content in _members(dataset, rows):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def _members(dataset: LatentDataset, rows: range) -> Iterator[tuple[str, bytes]]:
    keys = [dataset.keys[row] for row in rows]
    moments, found = dataset.cache.read(keys)
    if not found.all():
        lost = dataset.names[rows[int(np.flatnonzero(~found)[0])]]
        raise UserError(f"the latent of {lost} is damaged in {dataset.cache.folder}; run preprocess_latents.py")
    seals = seal_rows(dataset.cache.space, keys_of_rows(keys), np.ascontiguousarray(moments))
    for row, key, one, seal in zip(rows, keys, moments, seals.tolist(), strict=True):
        array = io.BytesIO()
        np.save(array, one, allow_pickle=False)
        class_name, _, name = dataset.names[row].partition("/")
        facts = {"key": key, "seal": seal, "class": class_name, "image": name}
        yield f"{row:09d}.npy", array.getvalue()
        yield f"{row:09d}.cls", str(int(dataset.labels[row])).encode()
        yield f"{row:09d}.json", json.dumps(facts).encode()
