"""--resize from end to end: a cache, a run and an evaluation read the same images in the same way."""

import numpy as np
import pipeline
import pytest
import tiny
import torch
from PIL import Image
from pipeline import SIZE, one_error

from gait_latents import open_cache
from gait_latents.evaluation import image_sets
from gait_latents.evaluation.plan import make_plan
from gait_latents.images import reading
from gait_latents.images.split import read_split
from gait_latents.latents.manifest import read_manifest
from gait_latents.training import run_folder
from gait_latents.vae import load

PICTURES = 6  # of each class
NO_IMAGE_FLAGS: dict[str, object] = {"vae_path": None, "data_path": None, "image_size": None, "images_per_user": None}


@pytest.fixture
def wide(world):
    """A world of wide pictures whose classes differ only outside of the centre."""
    draws = np.random.default_rng(1)
    for place, name in ((slice(0, 80), "left"), (slice(400, 480), "right")):
        (world / "wide" / name).mkdir(parents=True)
        for number in range(PICTURES):
            pixels = 126 + draws.integers(0, 5, (96, 480, 3), dtype=np.uint8)
            pixels[:, place] = 255
            Image.fromarray(pixels).save(world / "wide" / name / f"{number}.png")
    return world


def preprocess(world, **changes) -> int:
    return pipeline.preprocess(world, **{"data_path": world / "wide", "images_per_user": 4, **changes})


def moments_by_hand(world, entries, resize: str) -> torch.Tensor:
    encoder = load.load_vae(world / "vae.pt", "cpu", parts="encoder")
    found = []
    for entry in entries:
        data = reading.image_path(world / "wide", entry).read_bytes()
        pixels = torch.from_numpy(reading.decode(data, image_size=SIZE, resize=resize)).permute(2, 0, 1)[None] / 255
        with torch.no_grad():
            found.append(encoder.encode(pixels))
    return torch.cat(found)


def test_squashed_images_are_cached_trained_on_and_evaluated_as_such(wide, encoder, capsys):
    assert preprocess(wide, resize="squash", splits=["train", "test"]) == 0
    manifest, split = read_manifest(wide / "latents_cache"), read_split(wide / "latents_cache")
    assert manifest is not None and split is not None
    assert manifest.settings["resize"] == "squash" and reading.resize_of(manifest.space.spec["recipe"]) == "squash"
    expected = moments_by_hand(wide, split.train, "squash")
    cached = open_cache(wide / "latents_cache").moments(torch.arange(len(split.train)))
    torch.testing.assert_close(cached.float(), expected, atol=2e-3, rtol=2e-3)
    encoder.forget()
    assert pipeline.train(wide, **NO_IMAGE_FLAGS, train_num_steps=2, save_and_sample_every=2, num_samples=0) == 0
    assert "resize squash" in capsys.readouterr().out and encoder.num_images == 0
    state = run_folder.newest_state(wide / "results")
    assert state is not None and state.meta.settings["resize"] == "squash" and state.meta.space == manifest.space
    assert pipeline.generate(wide) == 0
    plan = make_plan(
        tiny.flags(
            {
                "checkpoint": wide / "results",
                "synthetic_path": wide / "synthetic",
                "output_folder": wide / "evaluation",
                "device": "cpu",
            }
        )
    )
    encoder.forget()
    real = image_sets.open_real(plan)
    assert encoder.num_images == 0  # the latents of the run are those of the evaluation
    entries = real.training.entries
    by_hand = [
        reading.decode(reading.image_path(wide / "wide", entry).read_bytes(), image_size=SIZE, resize="squash")
        for entry in entries
    ]
    assert all((a == b).all() for a, b in zip(real.training.read(range(len(entries))), by_hand, strict=True))
    assert {real.training.read([i])[0][0, 0, 0] for i in range(8)} >= {255}  # the bar at the left, which a crop loses


def test_what_a_squashed_cache_lacks_is_encoded_like_the_rest_by_whoever_opens_it(wide):
    assert preprocess(wide, resize="pad") == 0
    test = open_cache(wide / "latents_cache", split="test")
    assert test.fill() == []
    split = read_split(wide / "latents_cache")
    assert split is not None
    expected = moments_by_hand(wide, split.test, "pad")
    torch.testing.assert_close(test.moments(torch.arange(len(split.test))).float(), expected, atol=2e-3, rtol=2e-3)


def test_another_resize_never_hits_and_says_so(wide, encoder, capsys):
    assert preprocess(wide) == 0
    cropped = read_manifest(wide / "latents_cache")
    encoder.forget()
    assert preprocess(wide, resize="squash") == 0
    said = capsys.readouterr().out
    assert encoder.num_images == 8
    assert "made with another VAE, image_size or resize (--resize squash, the cache has crop)" in said
    encoder.forget()
    assert preprocess(wide, resize="crop") == 0
    back = read_manifest(wide / "latents_cache")
    assert encoder.num_images == 0 and cropped is not None and back is not None and back.space == cropped.space


def test_without_the_vae_a_cache_gives_only_images_that_were_read_as_asked(wide, capsys):
    assert preprocess(wide, resize="squash") == 0
    (wide / "vae.pt").unlink()
    capsys.readouterr()
    flags = {**NO_IMAGE_FLAGS, "train_num_steps": 1, "num_samples": 0}
    assert pipeline.train(wide, **flags, resize="pad") == 2
    line = one_error(capsys)
    assert "--resize is pad, but the cached latents are of images read with squash" in line and "vae.pt" in line
    assert pipeline.train(wide, **flags) == 0
