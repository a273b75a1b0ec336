"""LatentDataset: the right latent with the right label, whatever is cached, damaged, doubled or asked for."""

import errno
import hashlib
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import pytest
import tiny_vae
import torch
from os_faults import fault_at, raising
from properties import given, settings, st
from torch import Tensor, nn
from torch.utils.data import DataLoader

from gait_latents.common import hardware
from gait_latents.common.errors import UserError
from gait_latents.images.reading import BadImage
from gait_latents.latents import cache as latent_cache
from gait_latents.latents.cache import LatentCache
from gait_latents.latents.dataset import LatentDataset
from gait_latents.latents.space import Space
from gait_latents.vae.batch_encoder import BatchEncoder
from gait_latents.vae.norm import LatentNorm

SHAPE = (4, 2, 2)  # 2C h w
SPACE = Space.of({"weights": "those of a fake"}, 8, {"version": 1}, SHAPE)
UNIT = LatentNorm(torch.zeros(2), torch.ones(2))


def key_of(content: int) -> str:
    return hashlib.sha256(str(content).encode()).hexdigest()


def picture_of(content: int) -> np.ndarray:
    return np.full((8, 8, 3), content, dtype=np.uint8)


def moments_of(contents: Iterable[int]) -> Tensor:
    """Moments [B 2C h w] that say which image they are of: the content in every mean, no variance to speak of."""
    means = torch.tensor(list(contents), dtype=torch.float32)[:, None, None, None].expand(-1, *SHAPE).clone()
    means[:, 2:] = -100.0
    return means


def contents_in(moments: Tensor) -> list[int]:
    """Returns the content that each row of moments is of."""
    found = moments[:, 0, 0, 0].tolist()
    assert torch.equal(moments, moments_of(found))
    return [int(content) for content in found]


class Encoder:
    """A fake VAE that recognises each picture, and notes what it was shown."""

    def __init__(self, *, not_finite: Sequence[int] = ()) -> None:
        self.batches: list[list[int]] = []
        self.not_finite = not_finite
        self.closed = 0

    def __call__(self, images: Tensor) -> Tensor:
        assert images.dtype == torch.uint8 and images.shape[1:] == (8, 8, 3)
        contents = images[:, 0, 0, 0].tolist()
        self.batches.append(contents)
        moments = moments_of(contents)
        for row, content in enumerate(contents):
            if content in self.not_finite:
                moments[row, 0, 0, 0] = torch.nan
        return moments

    def close(self) -> None:
        self.closed += 1

    @property
    def contents(self) -> list[int]:
        return [content for batch in self.batches for content in batch]


def open_dataset(
    folder: Path,
    contents: Sequence[int],
    labels: Sequence[int] | None = None,
    *,
    encoder: Encoder | None = None,
    bad: Sequence[int] = (),
    writable: bool = True,
    batch_size: int = 4,
    delay: Callable[[int], float] = lambda position: 0.0,
    on_store_error: Callable[[OSError], None] | None = None,
) -> LatentDataset:
    """Opens a dataset whose image number i has the content contents[i]; those of `bad` contents cannot be read."""

    def read_image(position: int) -> np.ndarray:
        time.sleep(delay(position))
        if contents[position] in bad:
            raise BadImage(f"content {contents[position]} is bad")
        return picture_of(contents[position])

    dataset = LatentDataset(
        LatentCache(folder, SPACE, writable=writable),
        [key_of(content) for content in contents],
        labels if labels is not None else [0] * len(contents),
        [f"image {position}" for position in range(len(contents))],
        encode=encoder,
        read_image=read_image,
        encode_batch_size=batch_size,
        device=torch.device("cpu"),
        on_store_error=on_store_error,
    )
    dataset.set_norm(UNIT)
    return dataset


def store(folder: Path, contents: Sequence[int]) -> None:
    """Publishes one shard with the rows of these contents."""
    cache = LatentCache(folder, SPACE, writable=True)
    rows = moments_of(contents).to(torch.float16).numpy()
    cache.put([key_of(content) for content in contents], rows, [str(content) for content in contents], {})
    cache.flush()


def damage(folder: Path, content: int) -> None:
    """Flips one bit of each stored row of a content, which is found by its bytes."""
    row = moments_of([content]).to(torch.float16).numpy().tobytes()
    for path in folder.rglob("*.safetensors"):
        data = path.read_bytes()
        if row in data:
            place = data.index(row) + 3
            path.write_bytes(data[:place] + bytes([data[place] ^ 16]) + data[place + 1 :])


def index(positions: Sequence[int]) -> Tensor:
    return torch.tensor(positions, dtype=torch.long)


def noise(count: int) -> Tensor:
    return torch.zeros(count, 2, 2, 2)


# --- pairing -----------------------------------------------------------------------------------------------

# Contents 1 to 40; several images may have the same content, and then different labels.
CONTENTS = st.lists(st.integers(1, 40), min_size=1, max_size=25)


@settings(max_examples=40, deadline=None)
@given(contents=CONTENTS, data=st.data(), in_shards=st.booleans(), read_only=st.booleans())
def test_each_image_comes_with_its_own_latent_and_label(contents, data, in_shards, read_only):
    labels = list(range(len(contents)))  # all different: a mix-up cannot hide
    distinct = sorted(set(contents))
    cached = data.draw(st.lists(st.sampled_from([*distinct, 41, 42]), unique=True))  # two of other images
    damaged = data.draw(st.sets(st.sampled_from(cached))) if cached else set()
    cut = data.draw(st.integers(0, len(cached)))
    asked = data.draw(st.lists(st.lists(st.sampled_from(labels), min_size=1, max_size=7), max_size=8))
    upcoming = data.draw(st.permutations(labels))
    encoder = Encoder()
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        for part in (cached[:cut], cached[cut:]):
            if part:
                store(Path(name), part)
        for content in damaged:
            damage(Path(name), content)
        if in_shards:
            patch.setattr(hardware, "free_memory_bytes", lambda device: 0)
        dataset = open_dataset(
            Path(name),
            contents,
            labels,
            encoder=encoder,
            writable=not read_only,
            batch_size=data.draw(st.integers(1, 5)),
            delay=lambda position: 0.0003 * (position % 3),  # later images may be read first
        )
        assert dataset.place == ("shards" if in_shards else "cpu")
        for positions in asked:
            dataset.ensure(index(positions), upcoming)
            latents, found_labels = dataset.batch(index(positions), noise(len(positions)))
            assert found_labels.tolist() == positions
            assert contents_in(dataset.moments(index(positions))) == [contents[i] for i in positions]
            assert latents[:, 0, 0, 0].tolist() == [contents[i] for i in positions]
        assert dataset.fill() == []
        assert contents_in(dataset.moments(torch.arange(len(contents)))) == contents
    served = set(cached) - damaged
    assert not served & set(encoder.contents)
    assert max(Counter(encoder.contents).values(), default=1) == 1
    if not in_shards:  # there a damaged row shows when it is read
        assert set(encoder.contents) == set(distinct) - served


def test_a_batch_of_misses_comes_back_in_the_order_asked_for(tmp_path):
    dataset = open_dataset(tmp_path, [10, 11, 12, 13, 14, 15], [0, 1, 2, 3, 4, 5], encoder=Encoder(), batch_size=3)
    pairs = dataset.__getitems__([4, 1, 5, 0, 4])
    assert [(latent[0, 0, 0].item(), label) for latent, label in pairs] == [(14, 4), (11, 1), (15, 5), (10, 0), (14, 4)]


def test_equal_images_of_two_classes_are_encoded_once_and_keep_their_labels(tmp_path):
    encoder = Encoder()
    dataset = open_dataset(tmp_path, [7, 8, 7, 7], [0, 0, 1, 2], encoder=encoder)
    assert dataset.missing() == [0, 1]
    latents, labels = dataset.batch(index([3, 0, 2, 1]), noise(4))
    assert latents[:, 0, 0, 0].tolist() == [7, 7, 7, 8]
    assert labels.tolist() == [2, 0, 1, 0]
    assert sorted(encoder.contents) == [7, 8]
    assert len(dataset) == 4 and len(dataset.cache) == 2


def test_rows_of_other_images_in_the_cache_do_not_shift_anything(tmp_path):
    store(tmp_path, [30, 3, 31, 1, 32])
    dataset = open_dataset(tmp_path, [1, 2, 3], [5, 6, 7], encoder=Encoder())
    assert contents_in(dataset.moments(index([2, 1, 0]))) == [3, 2, 1]


# --- what is encoded, and when -----------------------------------------------------------------------------


def test_a_miss_encodes_the_next_full_batch_in_visiting_order(tmp_path):
    store(tmp_path, [4, 6])
    encoder = Encoder()
    dataset = open_dataset(tmp_path, list(range(20)), encoder=encoder, batch_size=5)
    upcoming = [6, 2, 9, 9, 3, 12, 15, 1, 0]
    dataset.ensure(index([4, 7, 8]), upcoming)
    assert encoder.batches == [[7, 8, 2, 9, 3]]
    dataset.ensure(index([2, 3, 4]), upcoming)
    assert len(encoder.batches) == 1
    dataset.ensure(index([12, 15, 16, 17, 18, 19]), [])
    assert encoder.batches[1:] == [[12, 15, 16, 17, 18], [19]]


def test_visiting_everything_takes_one_call_a_batch(tmp_path):
    encoder = Encoder()
    dataset = open_dataset(tmp_path, list(range(40)), encoder=encoder, batch_size=8)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0)).tolist()
    for start in range(0, 40, 2):
        dataset.ensure(index(order[start : start + 2]), order[start + 2 :])
    assert [len(batch) for batch in encoder.batches] == [8] * 5
    assert encoder.contents == order


def test_the_vae_is_freed_after_the_last_miss_and_not_before(tmp_path):
    encoder = Encoder()
    dataset = open_dataset(tmp_path, [1, 2, 3], encoder=encoder)
    dataset.ensure(index([1, 2]))
    assert encoder.closed == 0
    dataset.ensure(index([0]))
    assert encoder.closed == 1
    assert dataset.cache.pending == 0  # and all of it is published


def test_what_is_served_at_once_is_what_a_later_run_reads(tmp_path):
    class Thirds(Encoder):
        def __call__(self, images: Tensor) -> Tensor:
            return super().__call__(images) / 3  # not a float16

    dataset = open_dataset(tmp_path, [1, 2, 3], encoder=Thirds())
    fresh = dataset.moments(index([0, 1, 2]))
    dataset.fill()
    stored = open_dataset(tmp_path, [1, 2, 3]).moments(index([0, 1, 2]))
    assert torch.equal(fresh, stored)
    assert torch.equal(fresh, fresh.half().float())


def test_nothing_that_is_published_is_encoded_again(tmp_path):
    first, second = Encoder(), Encoder()
    dataset = open_dataset(tmp_path, [1, 2, 3, 4], encoder=first)
    dataset.ensure(index([0, 3]))
    dataset.cache_flush()
    again = open_dataset(tmp_path, [1, 2, 3, 4], encoder=second)
    assert again.missing() == [1, 2]
    assert again.fill() == []
    assert sorted(second.contents) == [2, 3]


def test_fill_tells_how_far_it_is_and_names_what_failed(tmp_path):
    steps: list[int] = []
    dataset = open_dataset(tmp_path, [1, 2, 3, 4, 5, 6], encoder=Encoder(not_finite=[5]), bad=[2], batch_size=2)
    bad = dataset.fill(advance=steps.append)
    assert sum(steps) == 6
    assert [position for position, _ in sorted(bad)] == [1, 4]
    assert dict(bad)[1] == "content 2 is bad"
    assert "not finite" in dict(bad)[4]
    assert dataset.missing() == [1, 4]
    assert contents_in(dataset.moments(index([0, 2, 3, 5]))) == [1, 3, 4, 6]


def test_each_of_several_equal_bad_images_is_named(tmp_path):
    dataset = open_dataset(tmp_path, [1, 9, 2, 9, 9], encoder=Encoder(), bad=[9])
    assert [position for position, _ in sorted(dataset.fill())] == [1, 3, 4]


def test_an_image_that_fails_when_it_is_needed_is_named(tmp_path):
    for kind, encoder, bad in (("unreadable", Encoder(), [2]), ("not finite", Encoder(not_finite=[2]), [])):
        dataset = open_dataset(tmp_path / kind, [1, 2, 3], encoder=encoder, bad=bad)
        with pytest.raises(BadImage, match="image 1: "):
            dataset.moments(index([0, 1]))
        assert contents_in(dataset.moments(index([0, 2]))) == [1, 3]


def test_a_miss_without_vae_or_images_says_which_is_not_at_hand(tmp_path):
    dataset = open_dataset(tmp_path, [1, 2], encoder=None)
    with pytest.raises(UserError, match=r"2 image\(s\) are not in the cache \(the first is image 0\) and the VAE is"):
        dataset.moments(index([0, 1]))
    dataset = open_dataset(tmp_path, [1, 2], encoder=Encoder())
    dataset.read_image = None
    with pytest.raises(UserError, match=r"the first is image 1.* the images are"):
        dataset.moments(index([1]))


def test_moments_of_another_shape_are_refused(tmp_path):
    dataset = open_dataset(tmp_path, [1], encoder=Encoder())
    dataset.encode = lambda images: torch.zeros(len(images), 8, 2, 2)
    with pytest.raises(UserError, match=r"\(8, 2, 2\), but the cache holds \(4, 2, 2\)"):
        dataset.fill()


# --- a cache that cannot be written ------------------------------------------------------------------------


def test_a_read_only_cache_serves_its_hits_and_keeps_misses_in_memory(tmp_path):
    store(tmp_path, [1, 2])
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    encoder = Encoder()
    dataset = open_dataset(tmp_path, [1, 2, 3], encoder=encoder, writable=False)
    for _ in range(2):
        assert contents_in(dataset.moments(index([2, 0, 1]))) == [3, 1, 2]
    assert encoder.contents == [3]
    dataset.cache_flush()
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_disk_that_fills_up_is_told_once_and_the_run_goes_on_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(latent_cache, "SHARD_SECONDS", 0.0)  # publish at every put
    told: list[OSError] = []
    encoder = Encoder()
    dataset = open_dataset(tmp_path, list(range(1, 9)), encoder=encoder, batch_size=2, on_store_error=told.append)
    dataset.ensure(index([0, 1]))
    with fault_at(-1, raising(errno.ENOSPC), only=("write",)):
        dataset.ensure(index([2, 3]))
        dataset.ensure(index([4, 5]))
        assert dataset.fill() == []
    assert [error.errno for error in told] == [errno.ENOSPC]
    assert contents_in(dataset.moments(torch.arange(8))) == list(range(1, 9))
    assert len(encoder.contents) == 8
    assert len(LatentCache(tmp_path, SPACE, writable=False)) == 2
    assert not list(tmp_path.rglob(".tmp-*"))


def test_a_disk_that_fills_up_ends_a_preprocess(tmp_path):
    dataset = open_dataset(tmp_path, [1, 2, 3], encoder=Encoder())
    with fault_at(-1, raising(errno.ENOSPC), only=("write",)), pytest.raises(OSError, match="No space left"):
        dataset.fill()


def test_rows_that_stay_in_the_shards_are_mended_when_they_go_bad(tmp_path, monkeypatch):
    monkeypatch.setattr(hardware, "free_memory_bytes", lambda device: 0)
    store(tmp_path, [1, 2, 3])
    encoder = Encoder()
    dataset = open_dataset(tmp_path, [1, 2, 3], encoder=encoder)
    assert dataset.missing() == []
    damage(tmp_path, 2)
    assert contents_in(dataset.moments(index([2, 1, 0]))) == [3, 2, 1]
    assert encoder.contents == [2]
    damage(tmp_path, 3)
    unreadable = open_dataset(tmp_path, [1, 2, 3], encoder=encoder, bad=[3])
    with pytest.raises(BadImage, match="image 2: content 3 is bad"):
        unreadable.moments(index([0, 2]))


# --- anybody's DataLoader ----------------------------------------------------------------------------------


def test_a_data_loader_gets_pairs_from_it(tmp_path):
    dataset = open_dataset(tmp_path, [1, 2, 3, 4, 5], [0, 1, 2, 3, 4], encoder=Encoder())
    seen = [
        (x, label)
        for batch, labels in DataLoader(dataset, batch_size=2, shuffle=True)
        for x, label in zip(batch, labels, strict=True)
    ]
    assert sorted(label.item() for _, label in seen) == [0, 1, 2, 3, 4]
    assert all(x.shape == (2, 2, 2) and x[0, 0, 0] == label + 1 for x, label in seen)
    latent, label = dataset[3]
    assert latent.shape == dataset.latent_shape and latent.dtype == torch.float32 and label == 3
    assert len(dataset) == 5


def test_a_worker_refuses_to_encode_and_names_the_remedy(tmp_path):
    dataset = open_dataset(tmp_path, [1, 2], encoder=Encoder())
    with pytest.raises(RuntimeError, match=r"call dataset\.fill\(\)"):
        next(iter(DataLoader(dataset, batch_size=2, num_workers=1)))
    dataset.fill()
    latents, labels = next(iter(DataLoader(dataset, batch_size=2, num_workers=1)))
    assert latents[:, 0, 0, 0].tolist() == [1, 2] and labels.tolist() == [0, 0]


def test_each_visit_draws_anew_from_the_posterior(tmp_path):
    class Wide(Encoder):
        def __call__(self, images: Tensor) -> Tensor:
            moments = super().__call__(images)
            moments[:, 2:] = 2.0
            return moments

    dataset = open_dataset(tmp_path, [1, 2], encoder=Wide())
    dataset.fill()
    torch.manual_seed(1)
    first, second = dataset[1][0], dataset[1][0]
    torch.manual_seed(1)
    drawn = torch.randn(1, 2, 2, 2)
    assert not torch.equal(first, second)
    assert torch.equal(first, 2 + torch.exp(torch.tensor(1.0)) * drawn[0])


def test_a_batch_before_the_normalisation_is_a_clear_error(tmp_path):
    store(tmp_path, [1])
    cache = LatentCache(tmp_path, SPACE, writable=False)
    dataset = LatentDataset(
        cache,
        [key_of(1)],
        [0],
        ["one"],
        encode=None,
        read_image=None,
        encode_batch_size=1,
        device=torch.device("cpu"),
    )
    with pytest.raises(RuntimeError, match="fit_norm"):
        dataset[0]


# --- normalisation and identity ----------------------------------------------------------------------------


def test_the_normalisation_depends_on_data_and_seed_alone(tmp_path):
    contents = list(range(1, 31))
    store(tmp_path / "full", contents)
    store(tmp_path / "part", contents[5:9])

    def norm(folder: str, seed: int) -> dict:
        return open_dataset(tmp_path / folder, contents, encoder=Encoder()).fit_norm(seed=seed, num_images=6).to_json()

    assert norm("full", 3) == norm("part", 3)
    assert norm("full", 3) != norm("full", 4)


def test_the_normalisation_of_few_images_is_measured_on_those_images(tmp_path):
    dataset = open_dataset(tmp_path, [2, 4, 6], encoder=Encoder())
    norm = dataset.fit_norm(seed=0, num_images=64)
    expected = LatentNorm.from_moments(moments_of([2, 4, 6]))
    assert norm.to_json() == expected.to_json()
    assert torch.equal(dataset.mean_latents(index([2])), expected.mean_latent(moments_of([6])))


def test_the_digest_is_known_before_anything_is_encoded_and_sees_every_change(tmp_path):
    def digest(contents: list[int], labels: list[int]) -> str:
        return open_dataset(tmp_path, contents, labels).digest()

    same = digest([1, 2, 3], [0, 0, 1])
    store(tmp_path, [1, 2, 3])
    assert digest([1, 2, 3], [0, 0, 1]) == same
    others = {
        digest([1, 2, 3], [0, 1, 1]),
        digest([1, 3, 2], [0, 0, 1]),
        digest([1, 2, 4], [0, 0, 1]),
        digest([1, 2], [0, 0]),
    }
    assert len(others) == 4 and same not in others


def test_the_digest_of_the_moments_waits_for_the_last_one(tmp_path):
    store(tmp_path / "stored", [2, 1])
    dataset = open_dataset(tmp_path / "lazy", [1, 2], encoder=Encoder())
    dataset.ensure(index([0]))
    assert dataset.moments_digest() is None
    dataset.ensure(index([1]))
    assert dataset.moments_digest() == open_dataset(tmp_path / "stored", [1, 2]).moments_digest() is not None


# --- the real encoder --------------------------------------------------------------------------------------


def random_images(count: int) -> Tensor:
    return torch.randint(0, 256, (count, 16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def real_encoder(*, dtype: torch.dtype = torch.float32, network: object = None) -> BatchEncoder:
    network = network or tiny_vae.tiny_vae()
    return BatchEncoder(lambda: network, device=torch.device("cpu"), batch_size=4, dtype=dtype)


@pytest.mark.slow
def test_the_bits_of_a_row_do_not_depend_on_its_neighbours():
    encode, images = real_encoder(), random_images(6)
    alone = [encode(image[None])[0] for image in images]
    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [5, 0], [4, 5, 1]):
        for row, position in zip(encode(images[order]), order, strict=True):
            assert torch.equal(row, alone[position])


def test_pixels_reach_the_vae_as_torchvision_would_give_them():
    from torchvision.transforms.functional import to_tensor

    images, network = random_images(2), tiny_vae.tiny_vae()
    for image, moments in zip(images, real_encoder()(images), strict=True):
        pixels = to_tensor(image.numpy())[None].contiguous(memory_format=torch.channels_last)
        assert torch.equal(moments, network.encode(pixels)[0])


def test_a_short_call_is_padded_to_the_shape_of_all_calls():
    shapes, network = [], tiny_vae.tiny_vae()

    class Noting(nn.Module):
        def encode(self, pixels: Tensor) -> Tensor:
            shapes.append(tuple(pixels.shape))
            return network.encode(pixels)

    encode, images = real_encoder(network=Noting()), random_images(6)
    one_by_one = encode(images)
    assert shapes == [(1, 3, 16, 16)] * 6  # on a CPU
    encode.batch_size = 4  # as on a GPU
    assert torch.allclose(encode(images), one_by_one, atol=1e-5)
    assert shapes[6:] == [(4, 3, 16, 16)] * 2


def test_the_vae_is_built_at_the_first_call_and_again_after_it_was_freed():
    built: list[int] = []

    def load() -> nn.Module:
        built.append(1)
        return tiny_vae.tiny_vae()

    encode = BatchEncoder(load, device=torch.device("cpu"), batch_size=2, dtype=torch.float32)
    assert not built
    first = encode(random_images(1))
    encode(random_images(2))
    assert len(built) == 1
    encode.close()
    assert encode._formats is None
    assert torch.equal(encode(random_images(1)), first) and len(built) == 2


@pytest.mark.parametrize(("dtype", "error"), [(torch.float16, 0.01), (torch.bfloat16, 0.08)])
def test_reduced_precision_is_close_to_float32(dtype, error):
    images = random_images(4)
    exact, reduced = real_encoder()(images)[:, :4], real_encoder(dtype=dtype)(images)[:, :4]
    assert 0 < (reduced - exact).std() < error * exact.std()


def test_the_record_says_how_rows_were_made():
    record = real_encoder(dtype=torch.float16).record
    assert record == {"precision": "float16", "device": "CPU (1 threads)", "torch": torch.__version__}
