"""What is chosen in an evaluation is chosen on validation images, and said where there are none."""

import json
from pathlib import Path
from typing import Any

import pipeline
import pytest
import tiny
import tiny_vae

import evaluate_images
from gait_latents.images.split import read_split

FEW: dict[str, Any] = {"classifier": "true", "classifier_steps": 2, "classifier_seeds": 1, "classifier_image_size": 8}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on four images of each of three classes, with five for validation and 17 for testing."""
    root = tmp_path_factory.mktemp("validation")
    tiny.make_images(root / "data", dict.fromkeys(pipeline.CLASSES, 26))
    tiny_vae.save_tiny_vae(root / "vae.pt")
    assert pipeline.train(root, images_per_user=4, train_num_steps=2, num_samples=0) == 0
    assert pipeline.generate(root, images_per_class=3) == 0
    return root


def evaluate(root: Path, folder: Path, **changes: object) -> dict[str, Any]:
    settings = {"checkpoint": root / "results", "output_folder": folder, "device": "cpu", **changes}
    assert evaluate_images.main(tiny.flags(settings)) == 0
    return json.loads((folder / "report.json").read_text())


@pytest.mark.slow
def test_validation_images_tune_the_classifiers_and_stand_for_reality_in_a_sweep(world, tmp_path, capsys):
    found = evaluate(world, tmp_path / "images", synthetic_path=world / "synthetic", **FEW)["classifier"]
    assert found["tuning"]["images"] == 15 and found["images"]["test"] == 51
    swept = evaluate(world, tmp_path / "sweep", sweep=[1, 2], sweep_images=3, **FEW)["sweep"]
    assert swept["against"] == "validation"
    for point in swept["points"]:
        assert point["classifier"]["images"]["test"] == 15 and point["classifier"]["tuning"]["images"] == 3
    captured = capsys.readouterr()
    assert "Nearest to the validation images" in captured.out and "fewer than 5 validation images" not in captured.err


@pytest.mark.slow
def test_a_sweep_of_a_run_without_validation_images_says_what_that_means(world, tmp_path, capsys):
    flags = {"validation_per_user": 0, "images_per_user": 4, "train_num_steps": 2, "num_samples": 0}
    assert pipeline.train(world, **flags, results_folder=tmp_path / "results") == 0
    split = read_split(tmp_path / "results")
    assert split is not None and not split.validation and len(split.test) == 66
    flags = {"checkpoint": tmp_path / "results", "output_folder": tmp_path / "sweep", "device": "cpu"}
    assert evaluate_images.main(tiny.flags({**flags, "sweep": 1, "sweep_images": 3})) == 0
    captured = capsys.readouterr()
    assert (
        "the run has fewer than 5 validation images of a class, so points are compared with the test images"
        in captured.err
    )
    assert "Nearest to the test images" in captured.out
