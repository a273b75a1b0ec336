"""evaluate_images.py as two processes: the same report as alone, and an end for all."""

import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pipeline
import pytest
import torch
from test_evaluate import CLASSIFIERS, evaluate, read_report, sweep
from test_ranks import Company, one_told

import classifier
import evaluate_images
import images
import inception
from latent_dataset import BatchEncoder, read_split


def facts_of(folder: Path) -> dict[str, Any]:
    """Returns a report without what names the folder."""
    report = read_report(folder)
    del report["settings"], report["sha256"]
    return report


@pytest.fixture
def synthetic(trained: Path, tmp_path: Path) -> Path:
    """Generated images."""
    assert pipeline.generate(trained, output_folder=tmp_path / "synthetic", images_per_class=3) == 0
    return tmp_path / "synthetic"


def test_two_processes_find_what_one_does(trained, synthetic, tmp_path):
    alone, together = tmp_path / "alone", tmp_path / "together"
    asked = {**CLASSIFIERS, "classifier_seeds": 2}
    assert evaluate(trained, synthetic, alone, **asked) == 0
    codes, told = Company(tmp_path, lambda _: evaluate(trained, synthetic, together, **asked)).end()
    assert codes == [0, 0] and told[1] == "", told
    assert facts_of(together) == facts_of(alone)
    assert "6 trainings of a classifier to go" in told[0] and "see " in told[0]


def test_two_processes_sweep_as_one(trained, tmp_path):
    alone, together = tmp_path / "alone", tmp_path / "together"
    assert sweep(trained, alone, 1, 1.5, 2, sweep_checkpoints="newest", **CLASSIFIERS) == 0
    work = lambda _: sweep(trained, together, 1, 1.5, 2, sweep_checkpoints="newest", **CLASSIFIERS)  # noqa: E731
    codes, told = Company(tmp_path, work).end()
    assert codes == [0, 0] and told[1] == "", told
    assert facts_of(together) == facts_of(alone)
    codes, told = Company(tmp_path, work).end()
    assert codes == [0, 0] and "3 of 3 points are in the report already" in told[0]


def test_each_image_is_encoded_by_one_of_them(trained, synthetic, tmp_path, monkeypatch):
    encode = BatchEncoder.__call__

    def noted(self: BatchEncoder, pixels: Any) -> Any:
        with (tmp_path / f"encoded-{os.environ['RANK']}").open("a") as log:
            log.write("x" * len(pixels))
        return encode(self, pixels)

    monkeypatch.setattr(BatchEncoder, "__call__", noted)
    codes, told = Company(tmp_path, lambda _: evaluate(trained, synthetic, tmp_path / "evaluation")).end()
    assert codes == [0, 0], told
    sizes = [(tmp_path / f"encoded-{rank}").stat().st_size for rank in range(2)]
    assert sum(sizes) == 9 + 9 and min(sizes) >= 8  # the synthetic and the test images


def test_a_signal_to_one_stops_both_and_what_was_trained_is_kept(trained, synthetic, tmp_path, monkeypatch):
    train, folder = classifier.train_and_test, tmp_path / "evaluation"
    calls: list[int] = []

    def train_and_stop(*sets: Any, **facts: Any) -> classifier.Score:
        calls.append(1)
        if len(calls) == 2 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)
        return train(*sets, **facts)

    monkeypatch.setattr(classifier, "train_and_test", train_and_stop)
    asked = {**CLASSIFIERS, "classifier_seeds": 2}
    work = lambda _: evaluate(trained, synthetic, folder, **asked)  # noqa: E731
    codes, told = Company(tmp_path, work).end()
    assert codes == [128 + signal.SIGTERM] * 2 and told[1] == "", told
    scores = read_report(folder)["classifier"]["scores"]
    assert [len(scores[name]) for name in (classifier.REAL, classifier.SYNTHETIC, classifier.BOTH)] == [1, 1, 0]


def test_an_image_that_cannot_be_read_ends_both_with_one_line(trained, synthetic, tmp_path):
    (synthetic / "ID_2" / "ID_2_000001.jpg").write_bytes(b"no image")
    codes, told = Company(tmp_path, lambda _: evaluate(trained, synthetic, tmp_path / "evaluation")).end()
    assert codes == [1, 1]
    assert "1 synthetic image(s) cannot be read" in one_told(told)


def test_other_settings_are_refused_by_one_line(trained, synthetic, tmp_path):
    def work(rank: int) -> int:
        return evaluate(trained, synthetic, tmp_path / "evaluation", neighbours=2 + rank)

    codes, told = Company(tmp_path, work).end()
    assert codes == [2, 2]
    assert "process 1 has --neighbours 3, process 0 has 2" in told[0] and told[1] == ""


# --- Inception features ------------------------------------------------------------------------------------


class BatchColours(torch.nn.Module):
    """Stands for InceptionV3: the mean colours of each image, and those of its batch."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(()))

    def forward(self, pixels: torch.Tensor) -> list[torch.Tensor]:
        own = pixels.mean((2, 3))
        return [torch.cat([own, own.mean(0).expand(len(own), 3)], 1)[:, :, None, None]]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, object]:
    """Asks for features in batches of two, read four at a time, of a small network."""
    (tmp_path / "weights.pth").write_bytes(b"here")
    monkeypatch.setattr(inception, "load_network", lambda *_: BatchColours())
    monkeypatch.setattr(inception, "NUM_FEATURES", 6)
    monkeypatch.setattr(inception, "_BATCH_SIZE", 2)
    monkeypatch.setattr(evaluate_images, "READ_AT_ONCE", 4)
    return {"inception_weights": tmp_path / "weights.pth"}


def before_each_piece(monkeypatch: pytest.MonkeyPatch, log: Path, act: Callable[[int, int], object]) -> None:
    """Calls `act(rank, count)` before features of some images are computed; `log` gets a line for each, by rank."""
    features = inception.features

    def noted(network: torch.nn.Module, pixels: torch.Tensor, **facts: Any) -> torch.Tensor:
        rank, own = int(os.environ.get("RANK", 0)), log.with_suffix(f".{os.environ.get('RANK')}")
        with own.open("a") as file:
            file.write(f"{len(pixels)}\n")
        act(rank, len(own.read_text().split()))
        return features(network, pixels, **facts)

    monkeypatch.setattr(inception, "features", noted)


def error_told(told: list[str]) -> str:
    """Returns the only error line, which follows warnings about the images."""
    assert told[1] == "" and "Traceback" not in told[0], told
    (line,) = [line for line in told[0].splitlines() if line.startswith("error: ")]
    return line


def lines(log: Path, rank: int) -> list[int]:
    return [int(line) for line in log.with_suffix(f".{rank}").read_text().split()]


def test_two_processes_compute_the_features_that_one_does_each_its_share(
    trained, synthetic, tmp_path, asked, monkeypatch
):
    alone, together, log = tmp_path / "alone", tmp_path / "together", tmp_path / "log"
    assert evaluate(trained, synthetic, alone, **asked) == 0
    before_each_piece(monkeypatch, log, lambda rank, count: None)
    codes, told = Company(tmp_path, lambda _: evaluate(trained, synthetic, together, **asked)).end()
    assert codes == [0, 0] and told[1] == "", told
    assert facts_of(together)["inception"]["synthetic"]["frechet"] > 0
    assert facts_of(together) == facts_of(alone)
    # 9 synthetic, 15 training and 9 test images, by fours
    assert (lines(log, 0), lines(log, 1)) == ([4, 1, 4, 3, 4], [4, 4, 4, 4, 1])


def test_a_signal_to_one_stops_both_and_the_figures_before_are_kept(trained, synthetic, tmp_path, asked, monkeypatch):
    folder = tmp_path / "evaluation"
    stop = lambda rank, count: os.kill(os.getpid(), signal.SIGTERM) if rank and count == 2 else None  # noqa: E731
    before_each_piece(monkeypatch, tmp_path / "log", stop)
    codes, told = Company(tmp_path, lambda _: evaluate(trained, synthetic, folder, **asked)).end()
    assert codes == [128 + signal.SIGTERM] * 2 and told[1] == "", told
    assert len(lines(tmp_path / "log", 1)) == 2
    report = read_report(folder)
    assert "latents" in report and "memorisation" in report and "inception" not in report


def test_an_image_that_one_cannot_read_ends_both_at_once(trained, synthetic, tmp_path, asked, monkeypatch):
    data, split = shutil.copytree(trained / "data", tmp_path / "data"), read_split(trained / "results")
    assert split is not None
    images.image_path(data, split.train[0]).write_bytes(b"no image")  # the second piece of process 1
    before_each_piece(monkeypatch, tmp_path / "log", lambda rank, count: time.sleep(0 if rank else 0.5))
    work = lambda _: evaluate(trained, synthetic, tmp_path / "evaluation", data_path=data, **asked)  # noqa: E731
    codes, told = Company(tmp_path, work).end()
    assert codes == [1, 1]
    assert f"{split.train[0].name}: " in error_told(told) and "(in process 1)" in error_told(told)
    assert len(lines(tmp_path / "log", 0)) < 5


def test_other_weights_of_the_network_are_refused_by_one_line(trained, synthetic, tmp_path, asked, monkeypatch):
    find = inception.find_weights

    def find_others(path: str) -> Path:
        if os.environ["RANK"] == "0":
            return find(path)
        (tmp_path / "others.pth").write_bytes(b"other")
        return tmp_path / "others.pth"

    monkeypatch.setattr(inception, "find_weights", find_others)
    codes, told = Company(tmp_path, lambda _: evaluate(trained, synthetic, tmp_path / "evaluation", **asked)).end()
    assert codes == [2, 2]
    assert "process 1 has --inception_weights of the digest " in error_told(told)
