"""evaluate_images.py on a tiny run: figures of the right images, nothing computed twice, mistakes named."""

import json
import os
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pipeline
import pytest
import tiny
import tiny_vae
import torch
from PIL import Image
from pipeline import CLASSES, HALF, SIZE, STEPS, one_error
from safetensors.torch import load_file, save_file

import evaluate_images
from gait_latents.common import errors
from gait_latents.evaluation import comparison, evaluator, figures, image_sets, inception
from gait_latents.evaluation import plan as evaluation_plan
from gait_latents.evaluation import sweep as sweep_module
from gait_latents.images import reading
from gait_latents.images.split import read_split
from gait_latents.training import run_folder
from gait_latents.training.trained_model import TrainedModel
from gait_latents.vae import load, trained_on
from gait_latents.vae.batch_encoder import BatchEncoder

PER_CLASS = 4  # synthetic images
TRIED = [(12,)] * len(comparison.CANDIDATES)  # which learn from all but the last of each class


@pytest.fixture(scope="module")
def generated(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images that the finished run made; to be copied and not to be changed."""
    folder = tmp_path_factory.mktemp("generated") / "synthetic"
    assert pipeline.generate(trained, output_folder=folder, images_per_class=PER_CLASS) == 0
    return folder


@pytest.fixture
def synthetic(generated: Path, tmp_path: Path) -> Path:
    """A copy of these images."""
    return shutil.copytree(generated, tmp_path / "synthetic")


@pytest.fixture(scope="module")
def first_evaluation(trained: Path, generated: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a whole evaluation of these images; to be copied and not to be changed."""
    folder = tmp_path_factory.mktemp("evaluated") / "evaluation"
    assert evaluate(trained, generated, folder) == 0
    return folder


@pytest.fixture
def evaluated(first_evaluation: Path, tmp_path: Path) -> Path:
    """A copy of that folder."""
    return shutil.copytree(first_evaluation, tmp_path / "evaluation")


def evaluate(root: Path, synthetic: Path, folder: Path, **changes: object) -> int:
    """Runs evaluate_images.py; without changes, with few neighbours, for there are three test images per class."""
    settings = {
        "checkpoint": root / "results",
        "synthetic_path": synthetic,
        "output_folder": folder,
        "neighbours": 2,
        "device": "cpu",
    }
    return evaluate_images.main(tiny.flags({**settings, **changes}))


def read_report(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "report.json").read_text())


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def forbid(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    for name in names:
        monkeypatch.setattr(evaluator, name, lambda *_, name=name, **__: pytest.fail(f"{name} was computed again"))


# --- the figures -------------------------------------------------------------------------------------------


def latents_by_hand(root: Path, paths: list[Path]) -> torch.Tensor:
    """Encodes files one by one, without cache, with the normalisation that stands in the checkpoint."""
    encoder = load.load_vae(root / "vae.pt", "cpu", parts="encoder")
    norm = run_folder.read_averages(root / "results").meta.latent_norm
    found = []
    for path in paths:
        pixels = torch.from_numpy(reading.decode(path.read_bytes(), image_size=SIZE)).permute(2, 0, 1)[None] / 255
        with torch.no_grad():
            found.append(norm.mean_latent(encoder.encode(pixels)))
    return torch.cat(found)


def test_the_figures_are_those_of_the_images_in_the_folders(trained, generated, first_evaluation):
    report = read_report(first_evaluation)
    split = read_split(trained / "results")
    assert split is not None
    training, test = (
        [reading.image_path(trained / "data", entry) for entry in entries] for entries in (split.train, split.test)
    )
    made = [path for name in CLASSES for path in sorted((generated / name).iterdir())]
    labels = torch.arange(3).repeat_interleave(PER_CLASS)
    points = [
        figures.Points(latents_by_hand(trained, paths), its_labels)
        for paths, its_labels in (
            (made, labels),
            (training, torch.tensor(split.labels(split.train))),
            (test, torch.tensor(split.labels(split.test))),
        )
    ]
    expected = figures.closeness(*points, neighbours=2, seed=42, num_directions=16)
    found = report["latents"]
    assert (found["images"], found["test_images"]) == (12, 9) == (expected["images"], expected["test_images"])
    for kind in ("synthetic", "training"):
        for name in ("frechet", "frechet_mean", "kernel", "precision", "recall", "coverage"):
            assert found[kind][name] == pytest.approx(expected[kind][name], rel=1e-2, abs=1e-3), (kind, name)
        assert list(found[kind]["frechet_per_class"]) == list(CLASSES)
    copies = figures.memorisation(*points, seed=42)
    assert report["memorisation"]["distances"] == pytest.approx(copies["distances"], rel=1e-2)
    assert report["memorisation"]["test_distances"] == pytest.approx(copies["test_distances"], rel=1e-2)
    first = report["memorisation"]["pairs"][0]
    i, j, _ = copies["pairs"][0]
    assert first["synthetic"] == f"{made[i].parent.name}/{made[i].name}"
    assert first["training"] == f"{training[j].parent.name}/{training[j].name}"


def test_a_vae_that_was_trained_on_test_images_is_told_of(trained, synthetic, first_evaluation, tmp_path, capsys):
    assert read_report(first_evaluation)["evaluated"]["vae_saw"].startswith("nobody knows, as the file of the VAE does")
    split, vae = read_split(trained / "results"), tmp_path / "vae.safetensors"
    assert split is not None
    seen = [entry.key for entry in (*split.test[:2], *split.train)]
    weights = torch.load(trained / "vae.pt", weights_only=True)
    save_file(weights, vae, {"trained_on": trained_on.to_text(seen)})
    assert evaluate(trained, synthetic, tmp_path / "evaluation", vae_path=vae) == 0
    said = capsys.readouterr()
    assert "warning: the VAE was trained on 2 of the 9 test images, so that figures" in said.err
    assert "test images that the VAE was trained on: 2 of 9\n" in said.out
    report = read_report(tmp_path / "evaluation")
    assert report["evaluated"]["vae_saw"] == "2 of 9"
    assert any(line.startswith("the VAE was trained on 2 of") for line in report["warnings"])


@pytest.mark.parametrize("name", ["", run_folder.ema_name(1)])
def test_test_images_that_the_run_before_was_trained_on_are_told_of(trained, synthetic, tmp_path, capsys, name):
    split = read_split(trained / "results")
    assert split is not None
    before = tmp_path / "before"
    flags = {"latents_cache_folder": tmp_path / "cache", "images_per_user": 7, "train_num_steps": 1}
    assert pipeline.train(trained, results_folder=before, num_samples=0, **flags) == 0
    seen = {entry.key for entry in getattr(read_split(before), "train", ())}
    count = sum(entry.key in seen for entry in split.test)
    assert count > 0
    results, place = tmp_path / "results", before / name
    assert pipeline.train(trained, results_folder=results, init_from=place, num_samples=0, train_num_steps=1) == 0
    assert evaluate(trained, synthetic, tmp_path / "evaluation", checkpoint=results) == 0
    told = f"{count} of the {len(split.test)} test images were training images of the run in {place}, with which"
    assert f"warning: {told}" in capsys.readouterr().err
    report = read_report(tmp_path / "evaluation")
    assert any(line.startswith(told) for line in report["warnings"])
    assert report["evaluated"]["trained_with"]["init_from"] is True
    shutil.copy(before / "split.json", tmp_path)
    shutil.rmtree(before)  # then nobody knows, and the folder around it is not asked
    assert evaluate(trained, synthetic, tmp_path / "evaluation", checkpoint=results) == 0
    assert "with which this one began" not in capsys.readouterr().err


def test_the_report_says_what_was_evaluated(first_evaluation, generated):
    report = read_report(first_evaluation)
    told = report["evaluated"]
    assert told["step"] == STEPS and told["checkpoint"] == f"ema-{STEPS:08d}.safetensors"
    assert told["images"] == {"synthetic": 12, "training": 15, "test": 9}
    assert told["images_per_class"] == {name: {"synthetic": 4, "training": 5, "test": 3} for name in CLASSES}
    assert told["made_with"]["cond_scale"] == 1.5 and told["split"] == "random"
    assert report["settings"]["synthetic_path"] == str(generated)
    assert report["memorisation"]["same_content"] == []
    page = (first_evaluation / "report.html").read_text(encoding="utf-8")
    assert all(name in page for name in CLASSES) and "data:image/png;base64," in page
    with Image.open(first_evaluation / "closest_pairs.png") as picture:
        assert picture.height > 2 * SIZE and picture.width > figures.NUM_PAIRS * SIZE


def test_the_table_is_printed_with_its_yardstick_and_its_warnings(trained, generated, evaluated, capsys):
    assert evaluate(trained, generated, evaluated) == 0
    out, err = capsys.readouterr()
    found = read_report(evaluated)["latents"]
    (line,) = [line for line in out.splitlines() if line.startswith("Fréchet distance per class")]
    shown = [figures.format_figure(found[kind]["frechet_mean"]) for kind in ("synthetic", "training")]
    assert line.split()[-2:] == shown
    assert "no classifier: on a CPU it takes long" in out and "no inception" not in out
    assert "warning: the split is random" in err and "very content" not in err


def test_the_cache_of_the_run_is_read_and_not_written_to(trained, synthetic, tmp_path, encoder):
    before = content(trained / "latents_cache")
    assert evaluate(trained, synthetic, tmp_path / "evaluation") == 0
    assert encoder.num_images == 12 + 9  # the training images were copied from there
    assert content(trained / "latents_cache") == before


# --- again -------------------------------------------------------------------------------------------------


def test_a_second_time_computes_nothing(trained, generated, evaluated, encoder, monkeypatch):
    forbid(monkeypatch, "closeness", "memorisation")
    assert evaluate(trained, generated, evaluated) == 0
    before = content(evaluated)
    assert evaluate(trained, generated, evaluated) == 0
    assert encoder.num_images == 0 and content(evaluated) == before


def forget_how_they_were_made(folder: Path) -> None:
    """Makes a folder of generated images one of any images."""
    (folder / "settings.json").unlink()


def test_an_image_that_changed_is_encoded_and_everything_is_computed_again(trained, synthetic, evaluated, encoder):
    forget_how_they_were_made(synthetic)
    before = read_report(evaluated)
    tiny.make_image(77, size=SIZE).save(synthetic / "ID_2" / "ID_2_000001.jpg")
    assert evaluate(trained, synthetic, evaluated) == 0
    after = read_report(evaluated)
    assert encoder.num_images == 1
    assert after["latents"]["synthetic"] != before["latents"]["synthetic"]
    assert after["memorisation"]["distances"] != before["memorisation"]["distances"]


def test_other_neighbours_change_only_what_depends_on_them(trained, generated, evaluated, monkeypatch):
    before = read_report(evaluated)
    forbid(monkeypatch, "memorisation")
    assert evaluate(trained, generated, evaluated, neighbours=1) == 0
    after = read_report(evaluated)
    assert after["latents"]["neighbours"] == 1 and after["latents"]["digest"] != before["latents"]["digest"]
    assert after["memorisation"] == before["memorisation"]


@pytest.mark.parametrize("damage", ["edited", "cut short", "no picture"])
def test_what_was_damaged_is_computed_again(trained, generated, evaluated, damage):
    before = content(evaluated)
    path = evaluated / "report.json"
    if damage == "edited":
        report = read_report(evaluated)
        report["latents"]["synthetic"]["frechet"] = 0.0
        path.write_text(json.dumps(report))
    elif damage == "cut short":
        path.write_bytes(path.read_bytes()[:-50])
    else:
        (evaluated / "closest_pairs.png").unlink()
    assert evaluate(trained, generated, evaluated) == 0
    after = content(evaluated)
    assert after["closest_pairs.png"] == before["closest_pairs.png"]
    reports = [json.loads(files["report.json"]) for files in (before, after)]
    for report in reports:
        del report["settings"], report["sha256"]  # settings name the folder
    assert reports[0] == reports[1]


def test_an_encoding_that_is_stopped_goes_on(trained, synthetic, tmp_path, encoder, monkeypatch, capsys):
    encode = BatchEncoder.__call__

    def stop_after_four(self: BatchEncoder, pixels: torch.Tensor) -> torch.Tensor:
        os.kill(os.getpid(), signal.SIGTERM)
        return encode(self, pixels)

    with monkeypatch.context() as patch:
        patch.setattr(BatchEncoder, "__call__", stop_after_four)
        assert evaluate(trained, synthetic, tmp_path / "evaluation") == 128 + signal.SIGTERM
    assert "what is encoded is kept" in capsys.readouterr().out
    done = encoder.num_images
    assert 0 < done < 12 and not (tmp_path / "evaluation" / "report.json").exists()
    assert evaluate(trained, synthetic, tmp_path / "evaluation") == 0
    assert encoder.num_images == 12 + 9


def test_neither_vae_nor_real_images_are_needed_once_all_is_encoded(trained, generated, evaluated, tmp_path, capsys):
    gone = {"vae_path": tmp_path / "gone.pt", "data_path": tmp_path / "gone"}
    (evaluated / "report.json").unlink()
    assert evaluate(trained, generated, evaluated, classifier="true", **gone) == 0
    report = read_report(evaluated)
    assert report["latents"]["synthetic"]["frechet"] > 0
    assert report["memorisation"]["picture"] is None and "not at hand" in report["memorisation"]["why_no_picture"]
    assert "no classifier: the real images are not at hand" in capsys.readouterr().out


# --- what may be wrong with the images ---------------------------------------------------------------------


def test_copies_of_training_images_are_named_as_copies(trained, synthetic, tmp_path, capsys):
    forget_how_they_were_made(synthetic)
    split = read_split(trained / "results")
    assert split is not None
    for number, entry in enumerate(split.train):
        target = synthetic / entry.class_name / f"{entry.class_name}_{number % 5:06d}.jpg"
        shutil.copyfile(reading.image_path(trained / "data", entry), target)
    shutil.copyfile(synthetic / "ID_1" / "ID_1_000000.jpg", synthetic / "ID_2" / "twice.jpg")
    assert evaluate(trained, synthetic, tmp_path / "evaluation") == 0
    found = read_report(tmp_path / "evaluation")["memorisation"]
    assert found["median"] == 0.0 and found["near_share"] == 1.0
    assert len(found["same_content"]) == 16 and {pair["kind"] for pair in found["same_content"]} == {"training"}
    assert found["pairs"][0]["distance"] == 0.0
    assert "warning: 16 synthetic file(s) have the very content of another file" in capsys.readouterr().err
    with Image.open(tmp_path / "evaluation" / "closest_pairs.png") as picture:
        pixels = np.asarray(picture)
    above, below = pixels[-2 * SIZE - 4 - 4 : -SIZE - 4 - 4, -SIZE - 4 : -4], pixels[-SIZE - 4 : -4, -SIZE - 4 : -4]
    assert np.array_equal(above, below)


def test_classes_that_are_missing_or_unknown_are_said(trained, synthetic, tmp_path, capsys):
    shutil.rmtree(synthetic / "ID_2")
    tiny.make_images(synthetic, {"strangers": 2}, size=SIZE)
    assert evaluate(trained, synthetic, tmp_path / "evaluation", classifier="true") == 0
    out, err = capsys.readouterr()
    assert "folders of classes that the run does not know: strangers" in err
    assert "there are no synthetic images of ID_2" in err
    assert "no classifier: there are classes without synthetic images" in out
    report = read_report(tmp_path / "evaluation")
    assert list(report["latents"]["synthetic"]["frechet_per_class"]) == ["ID_1", "ID_10"]
    assert list(report["memorisation"]["per_class"]) == ["ID_1", "ID_10"]
    assert report["evaluated"]["images_per_class"]["ID_2"]["synthetic"] == 0


def test_a_class_whose_images_are_all_for_training_is_said_and_left_out_of_the_comparison(
    world, synthetic, tmp_path, capsys
):
    for path in sorted((world / "data" / "ID_2").iterdir())[5:]:
        path.unlink()
    assert pipeline.train(world, train_num_steps=1, num_samples=0) == 0
    assert evaluate(world, synthetic, tmp_path / "evaluation") == 0
    assert "there are no test images of ID_2; what is compared with them leaves these out" in capsys.readouterr().err
    latents = read_report(tmp_path / "evaluation")["latents"]
    assert list(latents["synthetic"]["frechet_per_class"]) == ["ID_1", "ID_10"]
    assert latents["images"] == 2 * 4 and latents["test_images"] == 2 * 3
    assert evaluate(world, synthetic, tmp_path / "evaluation", sweep=1, sweep_images=4) == 0
    assert "there are no test images of ID_2" in capsys.readouterr().err
    (point,) = read_report(tmp_path / "evaluation")["sweep"]["points"]
    assert point["images"] == 2 * 4 and len(point["frechet_per_class"]) == 2


def test_without_test_images_only_what_needs_none_is_computed(world, synthetic, tmp_path, capsys):
    flags = {"images_per_user": "all", "train_num_steps": 1, "num_samples": 0}
    assert pipeline.train(world, **flags) == 0
    assert evaluate(world, synthetic, tmp_path / "evaluation") == 0
    report = read_report(tmp_path / "evaluation")
    assert "latents" not in report and report["why"]["latents"].startswith("the run has no test images")
    assert len(report["memorisation"]["distances"]) == 12 and "near_share" not in report["memorisation"]
    out, err = capsys.readouterr()
    assert "no latents: the run has no test images" in out and "made with other weights" in err
    assert evaluate(world, synthetic, tmp_path / "evaluation", sweep=1) == 2
    assert "a sweep compares with images that training has not seen" in one_error_of(capsys)


def one_error_of(capsys: pytest.CaptureFixture[str]) -> str:
    """Returns the error on stderr, which may stand below warnings."""
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith(("error", "Trace"))]
    return line


def test_a_folder_that_cannot_be_evaluated_is_named(trained, tmp_path, capsys):
    assert evaluate(trained, tmp_path / "absent", tmp_path / "evaluation") == 2
    assert f"synthetic_path {tmp_path / 'absent'} does not exist" in one_error(capsys)
    (tmp_path / "empty").mkdir()
    assert evaluate(trained, tmp_path / "empty", tmp_path / "evaluation") == 2
    assert "has no sub-folders; it needs one folder for the images of each class" in one_error(capsys)
    tiny.make_images(tmp_path / "others", {"a": 1, "b": 1}, size=SIZE)
    assert evaluate(trained, tmp_path / "others", tmp_path / "evaluation") == 2
    assert "has images of a, b, and the run knows ID_1, ID_2, ID_10" in one_error(capsys)
    assert not (tmp_path / "evaluation").exists()


def test_an_image_that_cannot_be_read_is_named(trained, synthetic, tmp_path, capsys):
    forget_how_they_were_made(synthetic)
    (synthetic / "ID_2" / "ID_2_000001.jpg").write_bytes(b"no image")
    assert evaluate(trained, synthetic, tmp_path / "evaluation") == 1
    out, err = capsys.readouterr()
    assert "    ID_2/ID_2_000001.jpg: a text, not an image; download it again" in out
    assert "error: 1 synthetic image(s) cannot be read" in err


def test_another_vae_is_refused(trained, synthetic, tmp_path, capsys):
    tiny_vae.save_tiny_vae(tmp_path / "other.pt", seed=9)
    assert evaluate(trained, synthetic, tmp_path / "evaluation", vae_path=tmp_path / "other.pt") == 2
    assert "is not the VAE that the model was trained with" in one_error(capsys)


def test_real_images_that_are_gone_are_asked_for(trained, synthetic, tmp_path, capsys):
    assert evaluate(trained, synthetic, tmp_path / "evaluation", data_path=tmp_path / "gone") == 2
    assert "9 of its images are not in the run's cache" in one_error(capsys)


def test_a_run_without_its_split_is_refused(trained, synthetic, tmp_path, capsys):
    (tmp_path / "results").mkdir()
    shutil.copy(trained / "results" / f"ema-{STEPS:08d}.safetensors", tmp_path / "results")
    assert evaluate(tmp_path, synthetic, tmp_path / "evaluation") == 2
    assert "holds no split.json" in one_error(capsys)


# --- features and classifiers ------------------------------------------------------------------------------


def test_inception_features_are_compared_when_weights_are_given(trained, generated, evaluated, tmp_path, monkeypatch):
    (tmp_path / "weights.pth").write_bytes(b"here")
    seen: list[tuple[int, ...]] = []

    def mean_colours(_network: object, pixels: torch.Tensor, *, advance) -> torch.Tensor:
        seen.append(tuple(pixels.shape))
        advance(len(pixels))
        return pixels.float().mean((1, 2))

    monkeypatch.setattr(inception, "load_network", lambda *_, **__: None)
    monkeypatch.setattr(inception, "features", mean_colours)
    monkeypatch.setattr(inception, "NUM_FEATURES", 3)
    asked = {"inception_weights": tmp_path / "weights.pth"}
    assert evaluate(trained, generated, evaluated, **asked) == 0
    found = read_report(evaluated)["inception"]
    assert seen == [(12, SIZE, SIZE, 3), (15, SIZE, SIZE, 3), (9, SIZE, SIZE, 3)]
    assert found["directions"] is None and found["synthetic"]["frechet"] > 0
    monkeypatch.setattr(inception, "load_network", lambda *_, **__: pytest.fail("looked again"))
    assert evaluate(trained, generated, evaluated, **asked) == 0
    assert evaluate(trained, generated, evaluated) == 0
    assert "inception" not in read_report(evaluated)


def test_inception_weights_that_are_absent_are_named(trained, generated, evaluated, capsys):
    assert evaluate(trained, generated, evaluated, inception_weights="absent.pth") == 2
    assert "--inception_weights absent.pth does not exist" in one_error_of(capsys)


def prediction(folder: Path, name: str, seed: str) -> Path:
    """Returns where an evaluation keeps the answers of a classifier."""
    return folder / "predictions" / f"{re.sub('[^a-z0-9]+', '_', name)}_{seed}.safetensors"


@pytest.mark.slow
def test_classifiers_are_trained_once_and_go_on_where_they_were_stopped(
    trained, generated, evaluated, monkeypatch, capsys
):
    asked = {"classifier": "true", "classifier_steps": 1, "classifier_seeds": 2, "classifier_image_size": 8}
    trainings: list[tuple[int, ...]] = []
    train = comparison.train_and_classify

    def noted(sets: Any, asked: Any, **how: Any) -> Any:
        trainings.append(tuple(len(labels) for _, labels in sets))
        assert sets[0][0].shape[1:] == (8, 8, 3) and len(asked) in (3, 9)
        if len(trainings) == len(TRIED) + 3:
            os.kill(os.getpid(), signal.SIGINT)
        return train(sets, asked, **how)

    monkeypatch.setattr(comparison, "train_and_classify", noted)
    assert evaluate(trained, generated, evaluated, **asked) == 128 + signal.SIGINT
    assert {len(found) for found in read_report(evaluated)["classifier"]["scores"].values()} == {0, 1}
    assert evaluate(trained, generated, evaluated, **asked) == 0
    each = [(3,), (6,), (15,), (15, 12), (12,), (15, 12)]  # parts of the real ones, with draws of the posterior, ...
    assert trainings == [*TRIED, *each[:3], *each[2:], *each]  # the one that was stopped is trained again
    report = read_report(evaluated)
    assert report["classifier"]["seeds"] == [42, 43] and report["classifier"]["image_size"] == 8
    expected = {"real": 15, "synthetic": 12, "posterior": 12, "test": 9}
    assert report["classifier"]["images"] == expected
    for name, by_seed in report["classifier"]["scores"].items():
        for seed, score in by_seed.items():
            kept = load_file(prediction(evaluated, name, seed))
            assert comparison.score(kept["logits"], kept["labels"]) == score
    file = prediction(evaluated, comparison.BOTH, "43")
    out = capsys.readouterr().out
    assert "classifier trained on real + synthetic: recognised" in out
    assert report["classifier"]["difference"]["sentence"] in out
    assert evaluate_images.main(tiny.flags({"combine": [evaluated]})) == 0
    mean = report["classifier"]["sets"][comparison.BOTH]["mean"]
    assert f"| {comparison.BOTH} | 2 | {mean:.1%}" in capsys.readouterr().out
    assert evaluate(trained, generated, evaluated, **asked) == 0
    assert len(trainings) == len(TRIED) + 13
    file.write_bytes(file.read_bytes()[:-9])  # of the last training: an answer that is damaged is given again
    assert evaluate(trained, generated, evaluated, **asked) == 0
    assert len(trainings) == len(TRIED) + 14 and file.is_file()
    assert evaluate(trained, generated, evaluated) == 0  # which trains none on a CPU, and takes none away
    assert read_report(evaluated)["classifier"] == report["classifier"]
    assert len(trainings) == len(TRIED) + 14


@pytest.mark.slow
def test_where_there_can_be_no_draws_of_the_posterior_the_report_says_why(
    trained, generated, evaluated, tmp_path, capsys
):
    asked = {"classifier": "true", "classifier_steps": 1, "classifier_seeds": 1, "classifier_image_size": 8}
    assert evaluate(trained, generated, evaluated, **asked, vae_path=tmp_path / "gone.pt") == 0
    report, page = read_report(evaluated), (evaluated / "report.html").read_text()
    assert comparison.POSTERIOR not in report["classifier"]["sets"]
    why = report["why"]["draws of the posterior"]
    assert "gone.pt" in why and f"no draws of the posterior: {why}" in capsys.readouterr().out
    assert "No draws of the posterior: " in page and "gone.pt does not exist" in page
    assert evaluate(trained, generated, evaluated, **asked) == 0
    report, page = read_report(evaluated), (evaluated / "report.html").read_text()
    assert comparison.POSTERIOR in report["classifier"]["sets"]
    assert "No draws of the posterior" not in page


@pytest.mark.slow
def test_what_was_found_about_other_images_goes_before_anything_is_computed(trained, synthetic, evaluated, monkeypatch):
    forget_how_they_were_made(synthetic)
    asked = {"classifier": "true", "classifier_steps": 1, "classifier_seeds": 1, "classifier_image_size": 8}
    assert evaluate(trained, synthetic, evaluated, **asked) == 0
    assert sweep(trained, evaluated, 1, sweep_checkpoints="newest") == 0
    sampled = read_report(evaluated)["sweep"]
    first = next((synthetic / "ID_1").glob("*.*"))
    Image.fromarray(255 - np.asarray(Image.open(first))).save(first)

    def stop(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        raise errors.Failed("stopped")

    monkeypatch.setattr(evaluator, "memorisation", stop)
    assert evaluate(trained, synthetic, evaluated) != 0
    report = read_report(evaluated)
    assert "classifier" not in report and "memorisation" not in report
    assert "latents" in report and report["sweep"] == sampled  # these are about the new images, and about none of them


def test_a_training_image_that_has_changed_since_costs_the_picture_alone(trained, generated, tmp_path):
    root, folder = shutil.copytree(trained, tmp_path / "world"), tmp_path / "evaluation"
    split = read_split(root / "results")
    assert split is not None
    facts = {"data_path": root / "data", "vae_path": root / "vae.pt"}
    for entry in split.train:
        path = reading.image_path(root / "data", entry)
        Image.fromarray(255 - np.asarray(Image.open(path))).save(path)
    assert evaluate(root, generated, folder, **facts) == 0
    copies = read_report(folder)["memorisation"]
    assert copies["picture"] is None and "was edited since the run was trained; put it back" in copies["why_no_picture"]
    assert not (folder / "closest_pairs.png").exists() and (folder / "report.html").exists()


@pytest.mark.parametrize("place", ["", "evaluation", "ID_1"])
def test_an_evaluation_does_not_become_a_class(trained, generated, capsys, place):
    before = content(trained / "data")
    assert evaluate(trained, generated, trained / "data" / place) == 2
    assert "is among the class folders of --data_path" in one_error(capsys)
    assert content(trained / "data") == before and not (trained / "data" / "evaluation").exists()


def test_what_a_script_wrote_among_the_class_folders_is_named_and_is_no_class(
    world, trained, generated, first_evaluation, capsys
):
    outputs = {
        "is a cache of latents": trained / "latents_cache",
        "was written by train_latent_cfg.py": trained / "results",
        "was written by generate.py": generated,
        "was written by evaluate_images.py": first_evaluation,
    }
    for what, folder in outputs.items():
        place = shutil.copytree(folder, world / "data" / "my_output")
        assert any(path.suffix == ".png" for path in place.iterdir())  # else it would be empty as a class
        for script in (pipeline.preprocess, pipeline.train):
            assert script(world, images_per_user="all") == 2
            error = one_error(capsys)
            assert f"the folder my_output in --data_path {world / 'data'} {what}" in error and "move it" in error
        assert not (world / "latents_cache").exists() and not (world / "results").exists()
        assert pipeline.preprocess(world, num_users=3, output_folder=world / "without") == 0
        shutil.rmtree(place)
        capsys.readouterr()
    (world / "data" / "ID_1" / "split.json").write_text("{}")  # a file of somebody else's by such a name
    assert pipeline.preprocess(world) == 0


# --- the sweep ---------------------------------------------------------------------------------------------


def sweep(root: Path, folder: Path, *scales: float, **changes: object) -> int:
    facts = {"sweep": list(scales), "sweep_images": 3, "sweep_checkpoints": "all", **changes}
    return evaluate(root, folder / "absent", folder, **facts)


@pytest.fixture
def sampled(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, list[int]]]:
    """Notes guidance and labels of each call of the sampler."""
    calls: list[tuple[float, list[int]]] = []
    sample = TrainedModel.sample

    def noted(
        self: TrainedModel, labels: list[int], indices: list[int], cond_scale: float, **facts: Any
    ) -> torch.Tensor:
        calls.append((cond_scale, labels))
        return sample(self, labels, indices, cond_scale, **facts)

    monkeypatch.setattr(TrainedModel, "sample", noted)
    return calls


def test_a_sweep_compares_scales_and_checkpoints_and_names_the_best(trained, evaluated, sampled, capsys):
    assert sweep(trained, evaluated, 2, 1) == 0
    assert sampled == [(scale, [0, 0, 0, 1, 1, 1, 2, 2, 2]) for _ in range(2) for scale in (2.0, 1.0)]
    report = read_report(evaluated)
    points = report["sweep"]["points"]
    assert [(point["step"], point["guidance"]) for point in points] == [
        (step, scale) for step in (HALF, STEPS) for scale in (1.0, 2.0)
    ]
    best = report["sweep"]["best"]
    assert best in points and best == sweep_module.best_point(points)
    assert report["latents"]["synthetic"]["frechet"] > 0  # what was there before is still there
    out = capsys.readouterr().out
    assert f"guidance {best['guidance']:g} at step {best['step']}; one seed" in out
    assert sum(line.lstrip().startswith(("4 ", "8 ", "real ")) for line in out.splitlines()) == 5


def test_a_point_has_the_figures_of_its_samples(trained, evaluated):
    assert sweep(trained, evaluated, 1.5, sweep_checkpoints=STEPS) == 0
    (point,) = read_report(evaluated)["sweep"]["points"]
    plan = evaluation_plan.make_plan(tiny.flags({"checkpoint": trained / "results", "output_folder": evaluated}))
    real = image_sets.open_real(plan)
    generator = TrainedModel(sweep_module.sampling_settings(plan), plan.state, plan.device)
    labels = torch.arange(3).repeat_interleave(3)
    samples = torch.cat([generator.sample([label], [i], 1.5) for label in range(3) for i in range(3)])
    expected = figures.closeness(
        figures.Points(samples, labels),
        real.training.latents,
        real.test.latents,
        neighbours=2,
        seed=42,
        num_directions=16,
    )
    for name in ("frechet", "frechet_mean", "kernel", "precision", "coverage"):
        assert point[name] == pytest.approx(expected["synthetic"][name], rel=1e-4, abs=1e-5)
        assert read_report(evaluated)["sweep"]["training"][name] == pytest.approx(expected["training"][name])


def test_a_sweep_goes_on_and_a_new_scale_is_added(trained, evaluated, sampled, monkeypatch, capsys):
    measure = sweep_module.measure

    def stop(*arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return measure(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(sweep_module, "measure", stop)
        assert sweep(trained, evaluated, 1, 2, sweep_checkpoints="newest") == 128 + signal.SIGINT
    first = read_report(evaluated)["sweep"]["points"]
    assert [point["guidance"] for point in first] == [1.0]
    sampled.clear()
    assert sweep(trained, evaluated, 1, 2, sweep_checkpoints="newest") == 0
    assert {scale for scale, _ in sampled} == {
        2.0
    } and "1 of 2 points are in the report already" in capsys.readouterr().out
    assert sweep(trained, evaluated, 3, sweep_checkpoints="newest") == 0
    points = read_report(evaluated)["sweep"]["points"]
    assert [point["guidance"] for point in points] == [1.0, 2.0, 3.0] and points[0] == first[0]
    sampled.clear()
    assert sweep(trained, evaluated, 3, sweep_checkpoints="newest", sweep_images=4) == 0
    assert [point["guidance"] for point in read_report(evaluated)["sweep"]["points"]] == [3.0]  # others do not compare


def test_a_file_that_only_looks_like_averages_is_passed_over(trained, tmp_path):
    root = shutil.copytree(trained, tmp_path / "world")
    (root / "results" / "ema-best.safetensors").write_bytes(b"")
    assert sweep(root, tmp_path / "evaluation", 1, sweep_images=1) == 0
    assert [point["step"] for point in read_report(tmp_path / "evaluation")["sweep"]["points"]] == [HALF, STEPS]


def test_a_checkpoint_that_is_not_there_is_named(trained, tmp_path, capsys):
    assert sweep(trained, tmp_path / "evaluation", 1, sweep_checkpoints=[STEPS, 5]) == 2
    assert "--sweep_checkpoints 8 5" in (message := one_error(capsys)) and "of the steps 4, 8" in message
    assert sweep(trained, tmp_path / "evaluation", 1, sweep_checkpoints="last") == 2
    assert "give some of these, or all alone, or newest alone" in one_error(capsys)


# --- classifiers in the sweep ------------------------------------------------------------------------------

CLASSIFIERS = {"classifier": "true", "classifier_steps": 2, "classifier_seeds": 1, "classifier_image_size": 8}


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Notes the number of images in each set of each training of a classifier."""
    noted: list[tuple[int, ...]] = []
    train = comparison.train_and_classify

    def train_and_note(sets: Any, asked: Any, **how: Any) -> Any:
        noted.append(tuple(len(labels) for _, labels in sets))
        return train(sets, asked, **how)

    monkeypatch.setattr(comparison, "train_and_classify", train_and_note)
    return noted


@pytest.mark.slow
def test_classifiers_of_a_sweep_see_what_generate_writes(trained, generated, evaluated, tmp_path, trainings, capsys):
    asked = {**CLASSIFIERS, "sweep_images": PER_CLASS, "sweep_checkpoints": STEPS}
    assert sweep(trained, tmp_path / "swept", 1.5, 3, **asked) == 0
    assert trainings == [*TRIED, (15,), (12,), (15, 12), (12,), (15, 12)]  # the real ones alone once
    assert evaluate(trained, generated, evaluated, **CLASSIFIERS) == 0
    part, expected = read_report(tmp_path / "swept")["sweep"], read_report(evaluated)["classifier"]
    same, other = part["points"]
    assert same["guidance"] == 1.5 and same["classifier"]["tuning"] == expected["tuning"]
    assert same["classifier"]["scores"].items() <= expected["scores"].items()
    assert same["classifier"]["difference"] == expected["difference"]
    assert other["classifier"]["scores"]["real"] == expected["scores"]["real"]
    means = {name: found["mean"] for name, found in expected["sets"].items()}
    assert (same["alone"], same["with_real"]) == (means["synthetic"], means["real + synthetic"])
    assert part["training"]["with_real"] == means["real"]
    best = part["best_for_classifiers"]
    assert best["with_real"] == max(point["with_real"] for point in part["points"])
    out = capsys.readouterr().out
    words = f"chosen by the same images out of 2 points: guidance {best['guidance']:g} at step {STEPS}. "
    assert f"in training a classifier, {words}" in out
    assert "accuracy changes by" in out
    (head,) = [line for line in out.splitlines() if line.lstrip().startswith("step")]
    rows = [line.split() for line in out.splitlines() if line.lstrip().startswith(f"{STEPS} ")]
    assert head.endswith("alone  with real") and rows[0][-1] == figures.format_figure(same["with_real"])


@pytest.mark.slow
def test_classifiers_of_a_sweep_go_on_where_they_were_stopped(trained, evaluated, trainings, monkeypatch):
    train = comparison.train_and_classify

    def train_and_stop(*sets: Any, **facts: Any) -> Any:
        if len(trainings) == len(TRIED) + 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return train(*sets, **facts)

    asked = {**CLASSIFIERS, "sweep_checkpoints": STEPS}
    with monkeypatch.context() as patch:
        patch.setattr(comparison, "train_and_classify", train_and_stop)
        assert sweep(trained, evaluated, 1, 2, **asked) == 128 + signal.SIGTERM
    first, second = read_report(evaluated)["sweep"]["points"]
    assert "with_real" in first and "with_real" not in second and second["frechet_mean"] > 0
    trainings.clear()
    assert sweep(trained, evaluated, 1, 2, **asked) == 0
    assert trainings == [(9,), (15, 9)]
    assert read_report(evaluated)["sweep"]["points"][0] == first
    trainings.clear()
    assert sweep(trained, evaluated, 2, **{**asked, "classifier": "auto"}) == 0  # trains none here, takes none away
    assert "with_real" in read_report(evaluated)["sweep"]["points"][1] and not trainings
    assert sweep(trained, evaluated, 2, **{**asked, "classifier_steps": 1}) == 0
    part = read_report(evaluated)["sweep"]
    assert trainings == [*TRIED, (15,), (9,), (15, 9)]
    assert "classifier" not in part["points"][0] and part["points"][1]["classifier"]["num_steps"] == 1


@pytest.mark.slow
def test_more_seeds_train_only_what_is_missing(trained, evaluated, trainings):
    asked = {**CLASSIFIERS, "sweep_checkpoints": STEPS}
    assert sweep(trained, evaluated, 1, **asked) == 0
    trainings.clear()
    assert sweep(trained, evaluated, 1, **{**asked, "classifier_seeds": 2}) == 0
    assert trainings == [(15,), (9,), (15, 9)]
    (found,) = read_report(evaluated)["sweep"]["points"]
    assert found["classifier"]["seeds"] == [42, 43] and len(found["classifier"]["scores"]["real"]) == 2


def point(distance: float | None, near_share: float, **facts: Any) -> dict[str, Any]:
    usual = {"near_share_limit": 0.08, "test_near_share": 0.05, "guidance": 1, "precision": 0.5, "coverage": None}
    return {"frechet_mean": distance, "near_share": near_share, **usual, **facts}


def test_a_point_that_draws_copies_is_best_only_where_all_do():
    varied, copying, worse = point(50.0, 0.1, step=8), point(40.0, 0.75, step=20), point(45.0, 0.4, step=12)
    points = [varied, copying, worse, point(None, 0.0, step=2)]
    assert sweep_module.best_point(points) is varied
    sentences = sweep_module.say_best(points, 20)
    assert sentences[0].startswith("Nearest to the test images by Fréchet distance per class: guidance 1 at step 8;")
    assert "10% are very near" in sentences[1] and "points that are nearer draw copies, up to 75%." in sentences[1]
    assert sweep_module.best_point([copying, worse]) is copying
    assert "75% are very near" in (told := sweep_module.say_best([copying, worse], 20)[1])
    assert told.endswith("no point has few: train for fewer steps, or with more images.")
    assert sweep_module.best_point([{**copying, "near_share_limit": 0.8}, varied]) is not varied  # so few images
    assert sweep_module.best_point([points[-1]]) is None
    assert sweep_module.say_best([points[-1]], 2)[0].startswith("No point is the best: 2 samples per class")


def test_a_point_whose_samples_look_unreal_is_not_the_best_however_near_it_lies():
    """As with 20 images of each class: early samples lay nearest in the mean, and hardly one looked real."""
    early = point(182.0, 0.04, step=1000, precision=0.05, coverage=0.005)
    late, copying = point(187.0, 0.05, step=1875, precision=0.18, coverage=0.04), point(192.0, 0.25, step=5000)
    copying |= {"precision": 0.31, "coverage": 0.1}
    assert sweep_module.best_point([early, late, copying]) is late
    told = sweep_module.say_best([early, late, copying], 20)[1]
    assert told.endswith(
        " guidance 1 at step 1,000 is nearer still, but its samples look less real (precision 0.05, coverage 0.005)."
    )
    assert sweep_module.best_point([early, {**late, "precision": 0.09, "coverage": 0.01}]) is early
    assert sweep_module.best_point([early, {**late, "precision": 0.09}]) is not early  # for its coverage
    faithful, wide = {**early, "precision": 1.0, "coverage": 0.1}, {**late, "precision": 0.4, "coverage": 0.9}
    assert sweep_module.best_point([faithful, wide]) is faithful  # of which each would leave the other out
    unknown = {**early, "precision": None, "coverage": None}
    assert sweep_module.best_point([unknown, late]) is unknown
