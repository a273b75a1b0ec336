"""evaluate_images.py as two processes: the same report as alone, and an end for all."""

import os
import signal
from pathlib import Path
from typing import Any

import pipeline
import pytest
from test_evaluate import CLASSIFIERS, evaluate, read_report, sweep
from test_ranks import Company, one_told

import classifier
from latent_dataset import BatchEncoder


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
