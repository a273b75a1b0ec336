"""What is served is what the encoder at hand says of the images at hand: any other change of it misses, and only that.

A hit is what the real encoder did not encode; a row is wrong unless it has the very bits that the encoder gives for
the file, and the label of the folder that the file lies in.
"""

import functools
import hashlib
import io
import os
import random
import re
import shutil
import unicodedata
from pathlib import Path

import numpy as np
import pipeline
import pytest
import tiny
import tiny_vae
import torch
from fault_account import Account
from PIL import Image
from pipeline import EncoderLog, preprocess, train
from safetensors.torch import save_file
from tiny_cache import SPACE, found_rows, make_space, reader, stored
from torch import Tensor

from gait_latents.images import reading
from gait_latents.images.split import read_split
from gait_latents.latents import cache as latent_cache
from gait_latents.latents.dataset import LatentDataset
from gait_latents.vae import load
from gait_latents.vae.base import HALVES
from gait_latents.vae.batch_encoder import BatchEncoder

ALL = {"images_per_user": "all"}


@functools.cache
def encoder_of(path: Path, _digest: str) -> BatchEncoder:
    return BatchEncoder(
        lambda: load.load_vae(path, torch.device("cpu"), parts="encoder"),
        device=torch.device("cpu"),
        batch_size=4,  # as tiny.preprocess_flags has it
        dtype=torch.float32,
    )


def truth(vae_path: Path, file: Path, size: int) -> Tensor:
    """Returns the moments [2C h w] that the encoder gives for a file, rounded as they are stored."""
    encode = encoder_of(vae_path, hashlib.sha256(vae_path.read_bytes()).hexdigest())
    pixels = torch.from_numpy(reading.decode(file.read_bytes(), image_size=size))
    return encode(pixels[None])[0].half().float()


def wrong_rows(world: Path, data: Path, vae_path: Path, size: int) -> int:
    """Counts the images of a cache that are served with another row or label than they have."""
    dataset, split = LatentDataset.open(world / "latents_cache"), read_split(world / "latents_cache")
    assert split is not None
    wrong = 0
    for position, entry in enumerate(split.train):
        expected = truth(vae_path, reading.image_path(data, entry), size)
        is_right = torch.equal(dataset.moments(torch.tensor([position]))[0], expected)
        wrong += not is_right or split.classes[int(dataset.labels[position])] != entry.class_name
    return wrong


def check(
    account: Account, world: Path, encoder: EncoderLog, fault: str, how: str, *, misses: int, **changes: object
) -> None:
    """Preprocesses after a change; so many images should be encoded, and each row served be right."""
    flags = {**ALL, **changes}
    encoder.forget()
    assert preprocess(world, **flags) == 0
    encoded = encoder.num_images
    data, vae_path = (Path(str(flags.get(name, world / usual))) for name, usual in PATHS)
    wrong = wrong_rows(world, data, vae_path, int(str(flags.get("image_size", pipeline.SIZE))))
    cases = len(LatentDataset.open(world / "latents_cache"))
    account.add(fault, how, cases=cases, lost=max(0, encoded - misses), wrong=wrong + max(0, misses - encoded))


PATHS = (("data_path", "data"), ("vae_path", "vae.pt"))


def read_state(path: Path) -> dict[str, Tensor]:
    return torch.load(path, weights_only=True)


def test_the_check_sees_a_wrong_row_and_a_wrong_label(world):
    """The cache of one VAE is looked at with another, and with classes swapped."""
    assert preprocess(world, **ALL) == 0
    assert wrong_rows(world, world / "data", world / "vae.pt", pipeline.SIZE) == 0
    tiny_vae.save_tiny_vae(world / "other.pt", seed=1)
    assert wrong_rows(world, world / "data", world / "other.pt", pipeline.SIZE) == 24
    (world / "data" / "ID_1").rename(world / "kept")
    (world / "data" / "ID_2").rename(world / "data" / "ID_1")
    (world / "kept").rename(world / "data" / "ID_2")
    assert wrong_rows(world, world / "data", world / "vae.pt", pipeline.SIZE) == 16


# --- another VAE -------------------------------------------------------------------------------------------


def test_one_weight_of_the_encoder_changed_by_one_ulp_misses(world, encoder, account, is_long):
    state = read_state(world / "vae.pt")
    names = [name for name in state if name.startswith(HALVES["encoder"])]
    generator, seen = random.Random(1), [load.read_identity(world / "vae.pt").fingerprint["weights"]]
    assert preprocess(world, images_per_user=1, splits=["train"]) == 0
    for name in names if is_long else generator.sample(names, 4):
        changed = {**state, name: state[name].clone()}
        place = np.unravel_index(generator.randrange(changed[name].numel()), tuple(changed[name].shape))
        changed[name][place] = torch.nextafter(changed[name][place], torch.tensor(torch.inf))
        torch.save(changed, world / "changed.pt")
        flags = {"images_per_user": 1, "vae_path": world / "changed.pt"}
        check(account, world, encoder, "one encoder weight changed by one ulp", "a miss", misses=3, **flags)
        seen.append(load.read_identity(world / "changed.pt").fingerprint["weights"])
    assert len(set(seen)) == len(seen)
    check(account, world, encoder, "another VAE", "the first one again: a hit", misses=0, images_per_user=1)


def save_same_encoder(world: Path, kind: str) -> Path:
    """Writes the same encoder in another way; returns the file."""
    state, path = read_state(world / "vae.pt"), world / "other.pt"
    others = [name for name in state if not name.startswith(HALVES["encoder"])]
    if kind == "safetensors":
        path = world / "vae.safetensors"
        save_file(state, path)
    elif kind == "another decoder":
        torch.save({**state, **{name: state[name] + 1 for name in others}}, path)
    elif kind == "another scale factor":
        torch.save({"model_state_dict": state, "scale_factor": 0.5, "embed_dim": 4}, path)
    elif kind == "wrapped by training":
        torch.save({"model_state_dict": {f"module._orig_mod.{n}": t for n, t in state.items()}, "epoch": 3}, path)
    elif kind == "other order, float64":
        torch.save({name: state[name].double() for name in reversed(state)}, path)
    else:
        path = world / "VAE 步态.ckpt"
        shutil.copy(world / "vae.pt", path)
    return path


@pytest.mark.parametrize(
    "kind",
    [
        "safetensors",
        "another decoder",
        "another scale factor",
        "wrapped by training",
        "other order, float64",
        "another file name",
    ],
)
def test_the_same_encoder_in_another_file_hits(world, encoder, account, kind):
    assert preprocess(world, **ALL) == 0
    path = save_same_encoder(world, kind)
    check(account, world, encoder, "the same encoder in another file", "a hit", misses=0, vae_path=path)


def test_another_precision_hits_and_is_recorded(world, encoder, account, capsys):
    assert preprocess(world, images_per_user=2, encode_precision="bfloat16", splits=["train"]) == 0
    rows = pipeline.stored_moments(world / "latents_cache")
    encoder.forget()
    assert preprocess(world, images_per_user=3, encode_precision="float32") == 0
    lost = encoder.num_images - 3
    after = pipeline.stored_moments(world / "latents_cache")
    capsys.readouterr()
    assert preprocess(world, verify="true") == 0
    said = capsys.readouterr().out
    assert re.search(r"encoded +6 rows with .*precision bfloat16", said)
    assert re.search(r"encoded +3 rows with .*precision float32", said)
    wrong = sum(after[key] != row for key, row in rows.items())
    account.add("another precision", "a hit", cases=6, lost=lost, wrong=wrong)
    for precision in ("float16", "bfloat16"):
        changes = {"encode_precision": precision, "images_per_user": 3}
        encoder.forget()
        assert preprocess(world, **changes) == 0
        account.add("another precision", "a hit", cases=9, lost=encoder.num_images)


def test_another_vae_or_image_size_never_hits_and_says_which_setting_differs(world, encoder, account, capsys):
    check(account, world, encoder, "another VAE", "a miss", misses=24)
    (path,) = (world / "latents_cache").glob("*/*.safetensors")
    kept = path.read_bytes()
    tiny_vae.save_tiny_vae(world / "vae.pt", seed=1)
    capsys.readouterr()
    check(account, world, encoder, "another VAE", "a miss", misses=24)
    said = capsys.readouterr().out
    assert f"(--vae_path {world / 'vae.pt'} has another encoder than the VAE of the cache)" in said
    check(account, world, encoder, "another image size", "a miss", misses=24, image_size=32)
    assert "(--image_size 32, the cache has 16)" in capsys.readouterr().out
    assert path.read_bytes() == kept
    assert len(latent_cache.spaces(world / "latents_cache")) == 3
    check(account, world, encoder, "another image size", "the first one again: a hit", misses=0)
    tiny_vae.save_tiny_vae(world / "vae.pt", seed=0)
    check(account, world, encoder, "another VAE", "the first one again: a hit", misses=0)


def test_rows_of_another_space_are_never_served(tmp_path, account):
    path = stored(tmp_path, range(3))
    other = make_space(weights="other")
    wrong = len(found_rows(reader(tmp_path, other), range(3)))
    moved = tmp_path / other.id / path.name
    moved.parent.mkdir()
    path.rename(moved)
    cache = reader(tmp_path, other)
    wrong += len(found_rows(cache, range(3)))
    assert cache.problems == [f"{moved}: it belongs to another space; its rows count as missing"]
    assert SPACE.id != other.id
    account.add("another VAE", "a shard moved to its folder", cases=6, wrong=wrong)


# --- other images ------------------------------------------------------------------------------------------


def flip_pixels(path: Path) -> None:
    """Changes one bit among the compressed pixels, far from any marker; size and times stay as they were."""
    status, data = path.stat(), bytearray(path.read_bytes())
    data[data.rindex(b"\xff\xd9") - 20] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (status.st_size, status.st_mtime_ns)


def swap(one: Path, other: Path) -> None:
    kept = one.with_name("kept")
    one.rename(kept)
    other.rename(one)
    kept.rename(other)


EDITS = {
    "an image replaced": (lambda data: tiny.make_image(500).save(data / "ID_1" / "walk_3.jpg"), 1),
    "an image edited, its size and time restored": (lambda data: flip_pixels(data / "ID_2" / "walk_1.jpg"), 1),
    "two images swapped": (lambda data: swap(data / "ID_1" / "walk_0.jpg", data / "ID_10" / "walk_0.jpg"), 0),
    "two classes swapped": (lambda data: swap(data / "ID_1", data / "ID_10"), 0),
    "a class renamed": (lambda data: (data / "ID_10").rename(data / "ID_0"), 0),
    "an image moved to another class": (
        lambda data: (data / "ID_1" / "walk_3.jpg").rename(data / "ID_2" / "a.JPEG"),
        0,
    ),
    "an image touched": (lambda data: os.utime(data / "ID_1" / "walk_3.jpg", (0, 2e9)), 0),
    "an image removed": (lambda data: (data / "ID_1" / "walk_3.jpg").unlink(), 0),
}


@pytest.mark.parametrize("what", EDITS)
def test_changed_content_misses_and_changed_places_hit_with_the_new_label(world, encoder, account, what):
    edit, misses = EDITS[what]
    assert preprocess(world, **ALL) == 0
    edit(world / "data")
    fault = "content of images changed" if misses else "names, places, times of images changed"
    check(account, world, encoder, fault, "a miss" if misses else "a hit", misses=misses)
    check(account, world, encoder, fault, "then a hit" if misses else "a hit", misses=0)


def test_an_edit_is_seen_by_training_too(world, encoder, account):
    assert preprocess(world, **ALL) == 0
    flip_pixels(world / "data" / "ID_2" / "walk_1.jpg")
    encoder.forget()
    assert train(world, **ALL, train_num_steps=6, num_samples=0) == 0
    wrong = encoder.num_images != 1
    check(account, world, encoder, "an image edited before training", "a miss in training", misses=0)
    account.add("an image edited before training", "a miss in training", cases=1, wrong=wrong)


def test_a_moved_data_folder_hits(world, encoder, account):
    assert preprocess(world, **ALL) == 0
    (world / "data").rename(world / "elsewhere")
    check(
        account,
        world,
        encoder,
        "names, places, times of images changed",
        "a hit",
        misses=0,
        data_path=world / "elsewhere",
    )


def test_the_same_file_in_two_classes_is_encoded_once_and_has_both_labels(world, encoder, account):
    shutil.copy(world / "data" / "ID_1" / "walk_0.jpg", world / "data" / "ID_10" / "other name.jpg")
    check(account, world, encoder, "the same file in two classes", "one row, two labels", misses=24)
    dataset = LatentDataset.open(world / "latents_cache")
    both = [position for position, key in enumerate(dataset.keys) if dataset.keys.count(key) == 2]
    assert [dataset.names[position] for position in both] == ["ID_1/walk_0.jpg", "ID_10/other name.jpg"]
    assert dataset.labels[both].tolist() == [0, 2] and len(dataset) == 25


def test_equal_stems_with_two_endings_are_two_images(world, encoder, account):
    tiny.make_image(77).save(world / "data" / "ID_1" / "walk_0.png")
    tiny.make_image(78).save(world / "data" / "ID_1" / "walk_0.jpeg")
    check(account, world, encoder, "equal stems with two endings", "two rows", misses=26)
    dataset = LatentDataset.open(world / "latents_cache")
    stems = [name for name in dataset.names if name.startswith("ID_1/walk_0.")]
    assert len(stems) == 3 and len(set(dataset.keys)) == 26


ODD_NAMES = (
    "步态 é",
    unicodedata.normalize("NFD", "步态 é"),
    "line\nbreak",
    "n" * 251,
    os.fsdecode(b"not utf-8 \xff"),
    "-- quoted '\"\\",
    "\u202eleft \x1b[31m",
)


def test_odd_names_of_files_and_classes_are_just_names(tmp_path, encoder, account):
    tiny_vae.save_tiny_vae(tmp_path / "vae.pt")
    folders = (*ODD_NAMES[1:], "n" * 255)  # of a name in two Unicode forms, two images may have both, but not classes
    for hue, folder in enumerate(folders):
        (tmp_path / "data" / folder).mkdir(parents=True)
        for seed, name in enumerate(ODD_NAMES):
            tiny.make_image(seed, hue=hue).save(tmp_path / "data" / folder / f"{name}.png", "PNG")
    num_images = len(ODD_NAMES) * len(folders)
    check(account, tmp_path, encoder, "odd names of files and classes", "a miss", misses=num_images)
    check(account, tmp_path, encoder, "odd names of files and classes", "then a hit", misses=0)
    encoder.forget()
    assert train(tmp_path, **ALL, train_num_steps=2, num_samples=1) == 0
    assert preprocess(tmp_path, verify="true") == 0
    account.add("odd names of files and classes", "a hit in training", cases=num_images, lost=encoder.num_images)


# --- the numbers themselves --------------------------------------------------------------------------------

# For a picture without and with transparency: the sum and some pixels of what is read from it, and of each of the
# eight channels of moments that the tiny VAE gives, the mean, the deviation and two values.
GOLDEN_PIXELS = {"RGB": [111587, 33, 6, 251, 46, 9, 251], "RGBA": [150387, 237, 234, 255, 232, 227, 255]}
GOLDEN_MOMENTS = {
    "RGB": [
        [1.6408, 0.8779, 0.3899, 1.6074],
        [1.0227, 0.6665, 1.3232, 0.6011],
        [1.6518, 0.8056, 1.1299, 1.5654],
        [0.8758, 1.3072, -0.7124, 1.7930],
        [-1.5664, 0.7813, -1.4482, -1.5039],
        [0.9449, 0.8972, 0.9941, 1.8066],
        [1.2535, 0.8013, 2.4414, 1.0381],
        [3.3565, 0.7368, 3.8496, 2.2734],
    ],
    "RGBA": [
        [1.5995, 0.8775, 0.7974, 1.0244],
        [1.0623, 0.6012, 1.0361, 1.3701],
        [1.6371, 0.6916, 1.0693, 2.0781],
        [0.8608, 1.2541, -0.7119, 1.0186],
        [-1.5890, 0.9064, -1.4092, -1.8916],
        [0.8725, 1.0255, 1.0508, 1.3008],
        [1.2321, 0.7830, 2.5625, 1.2842],
        [3.3501, 0.7501, 4.3438, 2.3789],
    ],
}


def golden_png(mode: str) -> bytes:
    """Draws a picture by whole numbers alone, so that it depends on no library."""
    y, x = np.mgrid[0:40, 0:52]
    channels = [(x * 5 + y * 3) % 256, (x * y) % 256, (255 - 4 * y) % 256, (x + y) * 3 % 256][: len(mode)]
    file = io.BytesIO()
    Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8)).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("mode", GOLDEN_PIXELS)
def test_what_is_stored_does_not_move_unnoticed(tmp_path, account, mode):
    tiny_vae.save_tiny_vae(tmp_path / "vae.pt")
    for name in ("ID_1", "ID_2"):  # training needs two classes
        (tmp_path / "data" / name).mkdir(parents=True)
    (tmp_path / "data" / "ID_1" / "golden.png").write_bytes(golden_png(mode))
    tiny.make_image(1).save(tmp_path / "data" / "ID_2" / "other.png")
    assert preprocess(tmp_path, **ALL) == 0
    pixels = reading.decode(golden_png(mode), image_size=pipeline.SIZE).astype(int)
    read = [int(pixels.sum()), *pixels[0, :2].ravel().tolist()]
    assert read == GOLDEN_PIXELS[mode], f"an image gives other pixels: raise the version in images.RECIPE ({read})"
    row = pipeline.stored_moments(tmp_path / "latents_cache")[reading.image_key(golden_png(mode))]
    moments = np.frombuffer(row, "<f2").reshape(8, 8, 8).astype(float)
    found = np.stack([moments.mean((1, 2)), moments.std((1, 2), ddof=1), moments[:, 0, 0], moments[:, 4, 5]], axis=1)
    moved = np.abs(found - GOLDEN_MOMENTS[mode])
    is_same = moved[:, :2].max() < 3e-4 and moved[:, 2:].max() < 3e-3  # single values are rounded to float16
    assert is_same, f"equal pixels give other moments: raise latent_cache.FORMAT ({found.round(4).tolist()})"
    account.add("the code itself", "golden moments of a fixed PNG", cases=found.size)
