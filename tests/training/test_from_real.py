"""generate.py --from_real: samples that begin with training images."""

import json
import shutil
from pathlib import Path

import numpy as np
import pipeline
import pytest
import tiny
import torch
from PIL import Image
from pipeline import CLASSES, one_error

import evaluate_images
from gait_latents.common import pictures
from gait_latents.training import run_folder
from gait_latents.training.real_latents import RealLatents
from gait_latents.training.trained_model import averaged_diffusion
from gait_latents.vae.decoder import ImageDecoder


def make(root: Path, name: str, **changes: object) -> dict[str, np.ndarray]:
    """Makes PNG files of each class; returns them by their place."""
    flags = {"output_folder": root / name, "image_format": "png", "images_per_class": 3, **changes}
    assert pipeline.generate(root, **flags) == 0
    return {str(p.relative_to(root / name)): np.array(Image.open(p)) for p in (root / name).glob("ID_*/*.png")}


def test_strength_0_gives_the_training_images_as_the_vae_draws_them(trained, tmp_path):
    root = shutil.copytree(trained, tmp_path / "world")
    images = make(root, "zero", from_real=0)
    state = run_folder.read_averages(root / "results")
    draws = RealLatents.of_run(state).draw([1, 1], [0, 2], seed=42)
    decoder = ImageDecoder(str(root / "vae.pt"), state.meta.latent_norm, torch.device("cpu"))
    expected = decoder(draws)
    for image, number in zip(expected, (0, 2), strict=True):
        (found,) = [
            pixels for place, pixels in images.items() if place.startswith("ID_2/") and f"{number}.png" in place
        ]
        assert pictures.psnr(found, image) > 40
    with pytest.raises(AssertionError):
        make(root, "zero", from_real=0.5)


def test_the_strength_decides_how_much_is_left_of_them(trained, tmp_path, capsys):
    root = shutil.copytree(trained, tmp_path / "world")
    zero, half, one = (make(root, f"at_{strength}", from_real=strength) for strength in (0, 0.5, 1))
    plain = make(root, "plain")
    assert zero.keys() == half.keys() == one.keys() == plain.keys() and len(zero) == 9

    def distance(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> float:
        return float(np.mean([np.abs(first[name].astype(float) - second[name]).mean() for name in first]))

    assert 0 < distance(zero, half) < distance(zero, one)
    assert distance(one, plain) > 0
    assert json.loads((root / "at_0.5" / "settings.json").read_text())["from_real"] == 0.5
    assert "from_real" not in json.loads((root / "plain" / "settings.json").read_text())
    capsys.readouterr()
    flags = {"checkpoint": root / "results", "synthetic_path": root / "at_0.5", "output_folder": root / "evaluation"}
    assert evaluate_images.main(tiny.flags({**flags, "device": "cpu"})) == 0
    assert "were begun with training images (--from_real 0.5)" in capsys.readouterr().err
    more = make(root, "at_0.5", from_real=0.5, images_per_class=7)  # of five training images: some are begun with twice
    assert all(np.array_equal(more[name], half[name]) for name in half) and len(more) == 21
    for name, flags in (("at_0.5", {}), ("plain", {"from_real": 0.5})):
        capsys.readouterr()
        assert pipeline.generate(root, output_folder=root / name, image_format="png", **flags) == 2
        assert "holds images made with from_real" in one_error(capsys)


def test_latents_that_are_not_there_are_told(trained, tmp_path, capsys):
    root = shutil.copytree(trained, tmp_path / "world")
    (shard, *_) = (root / "latents_cache").glob("*/*.safetensors")
    state = run_folder.read_averages(root / "results")
    assert Path(state.meta.settings["latents_cache_folder"]) == trained / "latents_cache"  # where the run was trained
    moved = root / "results"
    (moved / "split.json").unlink()
    assert pipeline.generate(root, from_real=0.5) == 2
    assert "needs the list of the training images: split.json" in one_error(capsys)
    assert shard.is_file()


def test_a_sample_from_a_latent_follows_the_last_part_of_the_way(trained):
    state = run_folder.read_averages(trained / "results")
    network = averaged_diffusion(state)
    start = RealLatents.of_run(state).draw([0, 1, 2], [0, 0, 0], seed=1)
    how = {"cond_scale": 1.0, "guidance_interval": (0, 1), "sampler": "dpm++", "sampling_timesteps": 10}

    def sample(strength: float) -> tuple[torch.Tensor, int]:
        steps: list[int] = []
        generators = [torch.Generator().manual_seed(i) for i in range(len(CLASSES))]
        labels = torch.arange(len(CLASSES))
        found = network.sample(
            labels, generators, **how, start=start, strength=strength, progress=lambda: steps.append(1)
        )
        return found, len(steps)

    assert torch.equal(sample(0)[0], start) and sample(0)[1] == 0
    counts = [sample(strength)[1] for strength in (0.01, 0.3, 0.6, 1)]
    assert counts == sorted(counts) and counts[0] == 1 and counts[-1] == 10 and counts[1] < counts[2] < 10
