"""LatentDataset: latents and labels of images. What the cache holds is read; what it lacks is encoded and stored.

Shapes: moments [B 2C h w], the mean and then the log-variance that the VAE's encoder gives, float16 as stored; latents
[B C h w] float32, drawn from the moments and normalised to about unit variance; labels [B] int64.

A *position* is an index into the dataset. A *row* is a place in the table of moments: images of the same content share
one row, whatever their labels.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from gait_latents import settings
from gait_latents.common import cli, hardware, mounts
from gait_latents.common.errors import UserError
from gait_latents.common.layout import MANIFEST_NAME, SPLIT_NAME
from gait_latents.common.seeds import sample_generator
from gait_latents.images.reading import BadImage
from gait_latents.images.split import read_split
from gait_latents.latents.cache import LatentCache
from gait_latents.latents.manifest import read_manifest
from gait_latents.vae.batch_encoder import Encode, is_storable
from gait_latents.vae.norm import LatentNorm

ReadImage = Callable[[int], np.ndarray]  # position -> uint8 image [S S 3]; raises BadImage


def _unwatched(count: int) -> None:
    """Stands where nobody wants to know of encoded images; a function of the module, so that a dataset pickles."""


class LatentDataset(Dataset):
    """Latents and labels of an ordered list of images, from a cache to which it adds what is missing.

    `dataset[i]` is `(latent [C h w], label)`: a new draw from the image's moments each time, with torch's global
    generator, so that any DataLoader can use it. A training loop with random numbers of its own uses `batch`.

    The normalisation is set by `set_norm` or measured by `fit_norm` before the first latent is asked for.

    Args:
        cache: the open cache of the space that the VAE makes.
        keys: content key of each image (64 hex digits), in dataset order.
        labels: label of each image.
        names: a name of each image, for messages and for the cache.
        encode: turns uint8 images [B S S 3] into moments [B 2C h w] float32; None when no VAE is at hand.
        read_image: gives the image at a position, uint8 [S S 3]; None when the images are not at hand.
        encode_batch_size: how many missing images are encoded together.
        device: where batches are wanted.
        on_store_error: called when the cache cannot be written to; new rows then stay in memory. None raises instead.

    Attributes:
        norm: the normalisation of the latents, on the CPU; None before it is set.
        place: where the moments are kept for training: the name of a device, or "shards" when no memory holds them.

    Raises:
        UserError: when an image has no content key.
    """

    def __init__(
        self,
        cache: LatentCache,
        keys: Sequence[str],
        labels: Sequence[int],
        names: Sequence[str],
        *,
        encode: Encode | None,
        read_image: ReadImage | None,
        encode_batch_size: int,
        device: torch.device,
        on_store_error: Callable[[OSError], None] | None = None,
    ) -> None:
        self._on_store_error = on_store_error
        self.cache, self.names = cache, list(names)
        self.encode, self.read_image, self.encode_batch_size = encode, read_image, encode_batch_size
        self._after_images: Callable[[int], None] = _unwatched  # see `watched`
        self.device = device
        self.keys = list(keys)
        if "" in self.keys:  # as in the split of a folder whose files were not read yet
            first = self.names[self.keys.index("")]
            raise UserError(f"the split has no content key of {first}; run preprocess_latents.py again")
        self.labels = torch.tensor(list(labels), dtype=torch.long)  # N
        self._device_labels = self.labels.to(device)
        self.norm: LatentNorm | None = None
        self._device_norm: LatentNorm | None = None
        row_of_key = {key: row for row, key in enumerate(dict.fromkeys(self.keys))}
        self._row_keys = list(row_of_key)
        self._row_of = np.array([row_of_key[key] for key in self.keys], dtype=np.int64)  # N
        self._rows = torch.from_numpy(self._row_of)  # N, moved to where the table is
        self._first_position = np.unique(self._row_of, return_index=True)[1].tolist()  # of each row
        self._load()

    # --- reading ---

    def _load(self) -> None:
        """Puts the rows where batches are fastest: on the device, in main memory, or left in the shards.

        A memory is used when the rows take less than half of what is free there.
        """
        shape = (len(self._row_keys), *self.moments_shape)
        needed = 2 * int(np.prod(shape))
        fits = [
            device for device in (self.device, torch.device("cpu")) if needed < hardware.free_memory_bytes(device) / 2
        ]
        self.place = str(fits[0]) if fits else "shards"
        if fits:
            moments, found = self.cache.read(self._row_keys)
            self._table = torch.from_numpy(moments).to(fits[0])  # rows 2C h w
            self._rows = self._rows.to(fits[0])
            self._have = found
        else:
            self._table = None
            self._have = self.cache.holds(self._row_keys)
        self._complete = bool(self._have.all())

    @property
    def moments_shape(self) -> tuple[int, int, int]:
        """Shape of one row of moments: (2C, h, w)."""
        return self.cache.space.moments_shape

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Shape of one latent: (C, h, w)."""
        channels, height, width = self.moments_shape
        return channels // 2, height, width

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def num_different(self) -> int:
        """How many images it has when those of the same content, which share their moments, are counted once."""
        return len(self._row_keys)

    def missing(self) -> list[int]:
        """Returns the positions of the images that are not encoded yet, one of each content, in dataset order."""
        return sorted(self._first_position[row] for row in np.flatnonzero(~self._have).tolist())

    def num_missing(self, positions: Tensor) -> int:
        """Returns how many images, each content once, would have to be encoded to read `positions` [B]."""
        return len(list(self._missing_rows(positions.tolist())))

    def moments(self, positions: Tensor) -> Tensor:
        """Returns the moments [B 2C h w] float32 at `positions` [B], on the device; missing ones are encoded first."""
        self.ensure(positions)
        return self._stored(positions)

    def _stored(self, positions: Tensor) -> Tensor:
        if self._table is None:
            return self._on_device(self._read_rows(self._row_of[positions.cpu().numpy()].tolist())).float()
        positions = positions.to(self._rows.device)
        return self._on_device(self._table.index_select(0, self._rows[positions])).float()

    def _on_device(self, moments: Tensor) -> Tensor:
        """Copies moments to the device; a GPU copies them by itself, while the host goes on."""
        if self.device.type == "cuda" and moments.device.type == "cpu":
            moments = moments.pin_memory()
        return moments.to(self.device, non_blocking=True)

    def _read_rows(self, rows: list[int]) -> Tensor:
        """Reads moments [B 2C h w] float16 from the shards; rows that are damaged by now are encoded again."""
        moments, found = self.cache.read([self._row_keys[row] for row in rows])
        if not found.all():  # a row went bad since it was indexed
            lost = list(dict.fromkeys(row for row, good in zip(rows, found, strict=True) if not good))
            self._have[lost] = False
            self._encode_or_raise(lost)
            moments, found = self.cache.read([self._row_keys[row] for row in rows])
        return torch.from_numpy(moments)

    def batch(self, positions: Tensor, noise: Tensor, host_positions: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Draws latents at `positions` [B] with unit normal `noise` [B C h w]; returns them and the labels [B].

        With `host_positions`, the same positions on the host, nothing waits for the device.
        """
        on_host = positions if host_positions is None else host_positions
        self.ensure(on_host)
        moments = self._stored(positions if self.place == str(self.device) else on_host)
        latents = self._norm_here().to_latent(moments, noise.to(self.device))
        return latents, self._device_labels[positions.to(self.device)]

    def __getitem__(self, position: int) -> tuple[Tensor, int]:
        return self.__getitems__([position])[0]

    def __getitems__(self, positions: list[int]) -> list[tuple[Tensor, int]]:
        """Returns a list of (latent [C h w], label), encoding what is missing in one go."""
        index = torch.as_tensor(positions, dtype=torch.long)
        latents, labels = self.batch(index, torch.randn(len(index), *self.latent_shape))
        return list(zip(latents, labels.tolist(), strict=True))

    @property
    def can_encode(self) -> bool:
        """Says whether a miss can be encoded: both the VAE and the images are at hand."""
        return self.encode is not None and self.read_image is not None

    def mean_latents(self, positions: Tensor) -> Tensor:
        """Returns the normalised posterior means [B C h w] at `positions` [B], on the device."""
        return self._norm_here().mean_latent(self.moments(positions))

    # --- normalisation ---

    def _norm_here(self) -> LatentNorm:
        """Returns the normalisation on the device."""
        if self._device_norm is None:
            raise RuntimeError("set_norm or fit_norm comes before the first batch")
        return self._device_norm

    def set_norm(self, norm: LatentNorm) -> None:
        """Sets the normalisation of the latents."""
        self.norm, self._device_norm = norm, norm.to(self.device)

    def positions_for_norm(self, *, seed: int, num_images: int) -> Tensor:
        """Returns the positions of the images that `fit_norm` measures."""
        order = torch.randperm(len(self), generator=sample_generator(seed, "latent norm"))
        return order[:num_images].sort().values

    def fit_norm(self, *, seed: int, num_images: int) -> LatentNorm:
        """Measures the normalisation on `num_images` images chosen by the seed, sets it, and returns it."""
        norm = LatentNorm.from_moments(self.sample_moments(seed=seed, num_images=num_images))
        self.set_norm(norm)
        return norm

    def sample_moments(self, *, seed: int, num_images: int) -> Tensor:
        """Returns the moments [N 2C h w] of `num_images` images chosen by the seed, on the CPU."""
        return self.moments(self.positions_for_norm(seed=seed, num_images=num_images)).cpu()

    # --- filling ---

    def ensure(self, positions: Tensor, upcoming: Iterable[int] = ()) -> None:
        """Encodes the images at `positions` [B] that are missing.

        An encoder takes full batches, so missing images of `upcoming` positions are encoded along where there is room.

        Raises:
            UserError: when an image or the VAE that is needed is not at hand.
            BadImage: when an image cannot be encoded; the message begins with its name.
        """
        if self._complete:
            return
        wanted = list(self._missing_rows(positions.tolist()))
        if not wanted:
            return
        if get_worker_info() is not None:
            raise RuntimeError("an image is not encoded yet, and a DataLoader worker cannot do it: call dataset.fill()")
        ahead = (row for row in self._missing_rows(upcoming) if row not in wanted)
        self._encode_or_raise([*wanted, *islice(ahead, -len(wanted) % self.encode_batch_size)])

    def _encode_or_raise(self, rows: list[int]) -> None:
        """Encodes rows; once none is missing, publishes what waits and frees the VAE. Raises BadImage, UserError."""
        bad = self._encode_rows(rows)
        if bad:
            position, reason = bad[0]
            raise BadImage(f"{self.names[position]}: {reason}")
        self._complete = bool(self._have.all())
        if self._complete:
            self.cache_flush()
            self.close_encoder()

    def _missing_rows(self, positions: Iterable[int]) -> Iterator[int]:
        """Yields the rows at `positions` that are not encoded yet, each once, in order."""
        seen = set()
        for position in positions:
            row = int(self._row_of[position])
            if not self._have[row] and row not in seen:
                seen.add(row)
                yield row

    def fill(
        self, positions: Sequence[int] | None = None, *, advance: Callable[[int], None] = lambda count: None
    ) -> list[tuple[int, str]]:
        """Encodes what is missing, publishes it, and frees the VAE.

        Args:
            positions: encode only what is missing of these; None for all.
            advance: as for `watched`.

        Returns:
            (position, reason) of each image that could not be encoded; images of the same content are all listed.
        """
        wanted = self.missing() if positions is None else positions
        with self.watched(advance):
            reasons = dict(self._encode_rows(list(self._missing_rows(wanted))))
        first = [self._first_position[row] for row in self._row_of.tolist()]
        bad = [(position, reasons[first[position]]) for position in range(len(self)) if first[position] in reasons]
        self._complete = bool(self._have.all())
        self.cache_flush()
        self.close_encoder()
        return bad

    @contextmanager
    def watched(self, advance: Callable[[int], None]) -> Iterator[None]:
        """Within the block, tells of images that are encoded, for whatever reason.

        Args:
            advance: called after each call of the encoder (on a CPU, after each image) with the number of images that
                it encoded or could not encode. What it raises ends the encoding; what is encoded by then is kept.
        """
        before, self._after_images = self._after_images, advance
        try:
            yield
        finally:
            self._after_images = before

    def refresh(self) -> int:
        """Takes up the missing rows that other processes have published since; returns how many."""
        rows = np.flatnonzero(~self._have)
        self.cache.refresh()
        keys = [self._row_keys[row] for row in rows]
        if self._table is None:
            found = self.cache.holds(keys)
        else:
            moments, found = self.cache.read(keys)
            there = torch.from_numpy(rows[found]).to(self._table.device)
            self._table[there] = torch.from_numpy(moments[found]).to(self._table.device)
        self._have[rows[found]] = True
        self._complete = bool(self._have.all())
        return int(found.sum())

    def cache_flush(self) -> None:
        """Publishes the rows that wait in memory."""
        self._store(self.cache.flush)

    def _store(self, operation: Callable[[], None]) -> None:
        """Does what writes to the cache; when the disk fails, tells `on_store_error` and writes no more."""
        try:
            operation()
        except OSError as error:
            if self._on_store_error is None:
                raise
            self._on_store_error(error)
            self.cache.writable = False

    def close_encoder(self) -> None:
        """Frees the VAE, if the encoder holds one."""
        close = getattr(self.encode, "close", None)
        if close is not None:
            close()

    def _encode_rows(self, rows: list[int]) -> list[tuple[int, str]]:
        """Encodes `rows`, in calls of as many as the encoder takes at once.

        Returns:
            (position, reason) of each row that could not be encoded, at the first position of that row.

        Raises:
            UserError: when the VAE or the images are not at hand.
        """
        if not rows:
            return []
        encode, read_image = self.encode, self.read_image
        if encode is None or read_image is None:
            what = "the VAE is" if encode is None else "the images are"
            first = self.names[self._first_position[rows[0]]]
            raise UserError(f"{len(rows)} image(s) are not in the cache (the first is {first}) and {what} not at hand")
        bad, good = [], []
        at_once = min(self.encode_batch_size, getattr(encode, "batch_size", self.encode_batch_size))
        for row, image in self._read_ahead(rows, read_image):
            if isinstance(image, BadImage):
                bad.append((self._first_position[row], str(image)))
                self._after_images(1)
            else:
                good.append((row, image))
            if len(good) == at_once:
                bad += self._encode_batch(good, encode)
                self._after_images(len(good))
                good = []
        if good:
            bad += self._encode_batch(good, encode)
            self._after_images(len(good))
        return bad

    def _encode_batch(self, batch: list[tuple[int, np.ndarray]], encode: Encode) -> list[tuple[int, str]]:
        """Encodes (row, image) pairs and keeps what can be stored; returns (position, reason) of the others."""
        rows = [row for row, _ in batch]
        moments = encode(torch.from_numpy(np.stack([image for _, image in batch])))
        self._check_shape(moments)
        stored = moments.to(torch.float16)  # what the network sees must be what a later run reads
        finite = is_storable(moments).tolist()
        kept = [i for i, good in enumerate(finite) if good]
        good_rows = [rows[i] for i in kept]
        if kept:
            keys = [self._row_keys[row] for row in good_rows]
            names = [self.names[self._first_position[row]] for row in good_rows]
            record = getattr(encode, "record", {})
            self._store(lambda: self.cache.put(keys, stored[kept].numpy(), names, record))
            if self._table is not None:
                self._table[torch.tensor(good_rows, device=self._table.device)] = stored[kept].to(self._table.device)
            self._have[good_rows] = True
        reason = "the VAE gives values that are not finite, in float32 too"
        return [(self._first_position[row], reason) for row, good in zip(rows, finite, strict=True) if not good]

    def _check_shape(self, moments: Tensor) -> None:
        """Raises UserError unless an encoder gave moments [B 2C h w] of the shape that the cache holds."""
        if tuple(moments.shape[1:]) != self.moments_shape:
            raise UserError(
                f"the VAE gives moments of shape {tuple(moments.shape[1:])}, but the cache holds {self.moments_shape}"
            )

    def _read_ahead(self, rows: Sequence[int], read_image: ReadImage) -> Iterator[tuple[int, np.ndarray | BadImage]]:
        """Yields (row, image) in order, with threads reading and decoding a few batches ahead."""
        with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
            waiting: list[tuple[int, Future]] = []
            queue = iter(rows)
            try:
                while True:
                    for row in islice(queue, 3 * self.encode_batch_size - len(waiting)):
                        waiting.append((row, pool.submit(_read_or_reason, read_image, self._first_position[row])))
                    if not waiting:
                        return
                    row, future = waiting.pop(0)
                    yield row, future.result()
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    # --- identity ---

    def digest(self) -> str:
        """Returns the SHA-256 over the space, and keys and labels in dataset order; it is known before any encoding."""
        whole = hashlib.sha256(self.cache.space.id.encode())
        for key, label in zip(self.keys, self.labels.tolist(), strict=True):
            whole.update(f"{key}:{label}\n".encode())
        return whole.hexdigest()

    def moments_digest(self) -> str | None:
        """Returns the SHA-256 of all moments; None while some are missing or when they are not kept in memory."""
        if not self._complete or self._table is None:
            return None
        return hashlib.sha256(self._table.cpu().numpy().tobytes()).hexdigest()

    @classmethod
    def open(
        cls, folder: str | Path, *, split: str = "train", device: str | torch.device = "cpu", seed: int = 42
    ) -> "LatentDataset":
        """Opens a complete cache, ready for a training loop: no VAE and no image is needed, and nothing is written.

        Args:
            folder: the cache folder that preprocess_latents.py made.
            split: "train", "validation" or "test".
            device: where batches are wanted.
            seed: chooses the images that the normalisation is measured on, as train_latent_cfg.py does by its seed.

        Raises:
            UserError: when the folder is no cache, the split has no such images, or rows are missing or damaged.
        """
        folder = Path(mounts.locate(str(folder)))
        manifest = read_manifest(folder)
        if manifest is None:
            raise UserError(f"{folder} holds no latents: there is no {MANIFEST_NAME}; run preprocess_latents.py")
        stored = read_split(folder)
        if stored is None:
            raise UserError(f"{folder} holds no {SPLIT_NAME}; run preprocess_latents.py")
        entries = stored.part(split)
        if not entries:
            raise UserError(f"the split in {folder} has no {split} images; lower --images_per_user to leave some")
        dataset = cls(
            LatentCache(folder, manifest.space, writable=False),
            [entry.key for entry in entries],
            stored.labels(entries),
            [f"{entry.class_name}/{entry.name}" for entry in entries],
            encode=None,
            read_image=None,
            encode_batch_size=1,
            device=torch.device(device),
        )
        missing = dataset.missing()
        if missing:
            raise UserError(
                f"{len(missing)} of {len(dataset)} {split} images are not in {folder} "
                f"(the first is {dataset.names[missing[0]]}); run preprocess_latents.py"
            )
        dataset.fit_norm(seed=seed, num_images=cli.defaults(settings.TrainSettings)["latent_norm_images"])
        return dataset


def _read_or_reason(read_image: ReadImage, position: int) -> np.ndarray | BadImage:
    """Reads an image; gives the reason, instead of raising it, where it cannot be used."""
    try:
        return read_image(position)
    except BadImage as error:
        return error
