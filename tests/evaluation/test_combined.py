"""Several evaluations in one table: whose chance its intervals cover, and what cannot be put together."""

import hashlib
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from tiny_images import coloured

import evaluate_images
from gait_latents.common.errors import UserError
from gait_latents.evaluation import comparison
from gait_latents.evaluation.combined import combine
from gait_latents.evaluation.comparison import BOTH, CANDIDATES, POSTERIOR, REAL, SYNTHETIC, Comparison
from gait_latents.evaluation.intervals import bootstrap_interval
from gait_latents.evaluation.report import Report

CLASSES = ["ID_1", "ID_2", "ID_10"]
LABELS = torch.tensor([0] * 8 + [1] * 12 + [2] * 20)
SHARES = {REAL: 0.5, POSTERIOR: 0.6, SYNTHETIC: 0.4, BOTH: 0.8}  # of test images that a classifier recognises


def answers(share: float, *key: object) -> torch.Tensor:
    """Returns logits [M K] that are right for about this share of the test images, which ones depending on the key."""
    seed = int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:4])
    generator = torch.Generator().manual_seed(seed)
    is_right = torch.rand(len(LABELS), generator=generator) < share
    said = torch.where(is_right, LABELS, (LABELS + 1) % len(CLASSES))
    return 2.0 * torch.nn.functional.one_hot(said, len(CLASSES)).float()


def write_report(
    folder: Path,
    *,
    split: int = 1,
    generator: int = 1,
    sampling: int = 1,
    seeds: tuple[int, ...] = (42, 43),
    **facts: Any,
) -> dict[str, dict[str, dict[str, Any]]]:
    """Writes what an evaluation of classifiers writes; returns its scores."""
    scores = {
        name: {
            str(seed): comparison.score(answers(share, name, split, generator, sampling, seed), LABELS)
            for seed in seeds
        }
        for name, share in SHARES.items()
    }
    tried = [{"learning_rate": rate, "strength": strength, "nll": 1.0} for rate, strength in CANDIDATES]
    images = coloured([4, 4, 4])
    whole = Comparison(
        {REAL: images, POSTERIOR: images, SYNTHETIC: images},
        None,
        (torch.zeros(len(LABELS), 8, 8, 3, dtype=torch.uint8), LABELS),
        num_steps=facts.pop("num_steps", 5),
        seeds=list(seeds),
        device=torch.device("cpu"),
        class_names=CLASSES,
        parts=(),
        done={"scores": scores, "tuning": {"tried": tried}},
        save=lambda state: pytest.fail("a classifier was trained"),
    ).run()
    evaluated = {
        "images_per_class": {name: {"synthetic": 4.0} for name in facts.pop("classes", CLASSES)},
        "split_digest": f"split {split}",
        "weights_digest": f"weights {generator}",
        "synthetic_digest": f"images {split} {generator} {sampling}",
    }
    report = Report(folder, {"real": split}, num_classes=len(CLASSES))
    known = {name: value for name, value in {**evaluated, **facts}.items() if value is not None}
    report.begin(evaluated=known, warnings=[], settings={})
    report.put("classifier", {}, {**whole, "image_size": 64, "recipe": 2})
    return scores


def row(table: str, name: str) -> list[str]:
    """Returns the cells of a training set."""
    (found,) = (line for line in table.splitlines() if line.startswith(f"| {name} |"))
    return [cell.strip() for cell in found.strip("|").split("|")]


def test_the_intervals_cover_what_there_are_several_of(tmp_path):
    places = [(split, generator) for split in (1, 2, 3) for generator in (1, 2)]
    scores = {
        place: write_report(tmp_path / str(number), split=place[0], generator=10 * place[0] + place[1])
        for number, place in enumerate(places)
    }
    table = combine([str(tmp_path / str(number)) for number in range(len(places))])
    assert "6 evaluations of 3 splits, 6 diffusion models and 6 folders of generated images" in table
    assert "The intervals cover the chance of split, generator, sampling, classifier, class." in table
    for name in SHARES:
        accuracies = [score["accuracy"] for found in scores.values() for score in found[name].values()]
        cells = row(table, name)
        assert cells[1:3] == ["12", f"{np.mean(accuracies):.1%} ({np.std(accuracies, ddof=1):.1%})"]
    values = np.full((3, 6, 6, 2, 3), np.nan)
    for number, found in enumerate(scores.values()):
        for seed, (own, real) in enumerate(zip(found[BOTH].values(), found[REAL].values(), strict=True)):
            values[number // 2, number, number, seed] = np.subtract(own["per_class"], real["per_class"])
    weights = np.broadcast_to(np.array([8.0, 12.0, 20.0]), values.shape)
    chains = (("split", "generator", "sampling", "classifier"), ("class",))
    expected = bootstrap_interval(values, chains, seed=0, weights=weights)
    assert expected.low is not None and expected.high is not None
    low, high = 100 * expected.low, 100 * expected.high
    assert row(table, BOTH)[-1] == f"{100 * expected.mean:+.1f} ({low:+.1f} to {high:+.1f})"
    assert re.search(rf"{re.escape(BOTH)} against {re.escape(POSTERIOR)}: \+\d+\.\d \(", table)


def test_what_there_is_one_of_is_said(tmp_path):
    write_report(tmp_path / "a", generator=1)
    write_report(tmp_path / "b", generator=2, seeds=(42,))
    table = combine([str(tmp_path / "a"), str(tmp_path / "b")])
    assert "2 evaluations of 1 split, 2 diffusion models and 2 folders of generated images" in table
    assert "The intervals cover the chance of generator, sampling, classifier, class, not that of split." in table
    assert row(table, REAL)[1] == "3"  # two classifiers of one evaluation, one of the other
    single = combine([str(tmp_path / "b")])
    assert "The intervals cover the chance of class, not that of split, generator, sampling, classifier." in single


def test_what_cannot_be_put_together_is_refused_and_named(tmp_path):
    first = tmp_path / "first"
    write_report(first)
    for name, changes, words in [
        ("steps", {"generator": 2, "num_steps": 6}, "differ in classifier_steps"),
        ("classes", {"generator": 2, "classes": [*CLASSES[:2], "ID_3"]}, "differ in their classes"),
        ("same", {}, "are about the same split, weights and images; give each only once"),
    ]:
        write_report(tmp_path / name, **changes)
        with pytest.raises(UserError, match=words):
            combine([str(first), str(tmp_path / name)])


def test_a_folder_that_holds_no_such_report_is_refused_and_named(tmp_path, capsys):
    write_report(tmp_path / "old", weights_digest=None)
    write_report(tmp_path / "damaged")
    (tmp_path / "damaged" / "report.json").write_bytes(b"{}")
    unfinished = Report(tmp_path / "unfinished", {}, num_classes=3)
    unfinished.begin(evaluated={"synthetic_digest": "x"}, warnings=[], settings={})
    unfinished.write()
    strange = Report(tmp_path / "strange", {}, num_classes=3)
    strange.set_facts(evaluated=[1], classifier={"sets": 1})
    strange.write()
    for name, words in [
        ("absent", "absent/report.json does not exist; give a folder that evaluate_images.py has written"),
        ("damaged", "its checksum does not fit"),
        ("unfinished", "has no finished classifiers"),
        ("old", "earlier versions; run evaluate_images.py for it once more"),
        ("strange", "what is stored as evaluated, classifier has another form"),
    ]:
        assert evaluate_images.main(tiny.flags({"combine": [tmp_path / name]})) == 2
        told = capsys.readouterr().err
        assert words in told and name in told and "Traceback" not in told
