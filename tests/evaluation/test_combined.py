"""Several evaluations in one table: whose chance its intervals cover, and what cannot be put together."""

import hashlib
import json
import re
from collections.abc import Sequence
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


def answers(share: float, labels: torch.Tensor, *key: object) -> torch.Tensor:
    """Returns logits [M K] that are right for about this share of the test images, which ones depending on the key."""
    seed = int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:4])
    is_right = torch.rand(len(labels), generator=torch.Generator().manual_seed(seed)) < share
    said = torch.where(is_right, labels, (labels + 1) % len(CLASSES))
    return 2.0 * torch.nn.functional.one_hot(said, len(CLASSES)).float()


def scores_of(place: tuple[int, int, int], seeds: Sequence[int], labels: torch.Tensor) -> dict[str, dict[str, Any]]:
    """Makes up what classifiers do; one of real images, or of draws of the posterior, is the same in all of a split."""
    return {
        name: {
            str(seed): comparison.score(
                answers(share, labels, name, place[:1] if name in (REAL, POSTERIOR) else place, seed), labels
            )
            for seed in seeds
        }
        for name, share in SHARES.items()
    }


def write_report(
    folder: Path,
    *,
    place: tuple[int, int, int] = (1, 1, 1),
    seeds: Sequence[int] = (42, 43),
    without: str = "",
    labels: torch.Tensor = LABELS,
    num_steps: int = 5,
    warnings: Sequence[str] = (),
    **facts: Any,
) -> dict[str, dict[str, Any]]:
    """Writes what an evaluation of classifiers writes; returns its scores.

    Args:
        place: numbers of the split, of the generator and of the sampling.
        without: a training set that it lacks.
        facts: of what was evaluated; None for one that is absent.
    """
    scores = scores_of(place, seeds, labels)
    tried = [{"learning_rate": rate, "strength": strength, "nll": 1.0} for rate, strength in CANDIDATES]
    sets = {name: coloured([4, 4, 4]) for name in (REAL, POSTERIOR, SYNTHETIC) if name != without}
    whole = Comparison(
        sets,
        None,
        (torch.zeros(len(labels), 8, 8, 3, dtype=torch.uint8), labels),
        num_steps=num_steps,
        seeds=seeds,
        device=torch.device("cpu"),
        class_names=CLASSES,
        parts=(),
        done={"scores": scores, "tuning": {"tried": tried}},
        save=lambda state: pytest.fail("a classifier was trained"),
    ).run()
    evaluated = {
        "images_per_class": {name: {"synthetic": 4, "training": 4} for name in CLASSES},
        "split_digest": f"split {place[0]}",
        "weights_digest": f"weights {place[:2]}",
        "synthetic_digest": f"images {place}",
        "made_with": {"weights": f"weights {place[:2]}", "seed": place[2], "cond_scale": 1.5},
        **facts,
    }
    report = Report(folder, {"real": place[0]}, num_classes=len(CLASSES))
    known = {name: value for name, value in evaluated.items() if value is not None}
    report.begin(evaluated=known, warnings=[*warnings], settings={})
    report.put("classifier", {}, {**whole, "image_size": 64, "recipe": 2})
    return scores


def row(table: str, name: str) -> list[str]:
    """Returns the cells of a training set."""
    (found,) = (line for line in table.splitlines() if line.startswith(f"| {name} |"))
    return [cell.strip() for cell in found.strip("|").split("|")]


def test_the_intervals_cover_what_there_are_several_of(tmp_path):
    places = [(split, generator, 1) for split in (1, 2, 3) for generator in (1, 2)]
    scores = [write_report(tmp_path / str(number), place=place) for number, place in enumerate(places)]
    table = combine([str(tmp_path / str(number)) for number in range(len(places))])
    assert "6 evaluations of 3 splits, 6 diffusion models and 6 folders of generated images" in table
    assert "The intervals cover the chance of split, generator, sampling, classifier, class.\n" in table
    assert table.endswith("Of so few (3) they are narrower than they should be; 6 or more are better.")
    for name in SHARES:
        own = scores[:: 2 if name in (REAL, POSTERIOR) else 1]  # which are the same for both generators of a split
        accuracies = [score["accuracy"] for found in own for score in found[name].values()]
        assert row(table, name)[1:3] == [
            str(len(accuracies)),
            f"{np.mean(accuracies):.1%} ({np.std(accuracies, ddof=1):.1%})",
        ]
    values = np.full((3, 6, 6, 2, 3), np.nan)
    for number, found in enumerate(scores):
        for seed, (own, real) in enumerate(zip(found[BOTH].values(), found[REAL].values(), strict=True)):
            values[number // 2, number, number, seed] = np.subtract(own["per_class"], real["per_class"])
    weights = np.broadcast_to(np.array([8.0, 12.0, 20.0]), values.shape)
    chains = (("split", "generator", "sampling"), ("classifier",), ("class",))
    expected = bootstrap_interval(values, chains, seed=0, weights=weights)
    assert expected.low is not None and expected.high is not None
    low, high = 100 * expected.low, 100 * expected.high
    assert row(table, BOTH)[-1] == f"{100 * expected.mean:+.1f} ({low:+.1f} to {high:+.1f})"
    assert re.search(rf"{re.escape(BOTH)} against {re.escape(POSTERIOR)}: \+\d+\.\d \(", table)


def test_what_there_is_one_of_is_said(tmp_path):
    write_report(tmp_path / "a", place=(1, 1, 1))
    write_report(tmp_path / "b", place=(1, 2, 1), seeds=[42])
    table = combine([str(tmp_path / "a"), str(tmp_path / "b")])
    assert "2 evaluations of 1 split, 2 diffusion models and 2 folders of generated images" in table
    assert "The intervals cover the chance of generator, sampling, classifier, class, not that of split." in table
    assert (row(table, REAL)[1], row(table, BOTH)[1]) == ("2", "3")  # 42 of real images is the same in both
    single = combine([str(tmp_path / "b")])
    assert single.startswith("1 evaluation of 1 split, 1 diffusion model and 1 folder of generated images")
    assert "The intervals cover the chance of class, not that of split, generator, sampling, classifier." in single


def test_a_classifier_of_real_images_that_stands_beside_many_generators_is_one(tmp_path):
    for number in range(6):
        write_report(tmp_path / str(number), place=(1, number, 1), seeds=[42])
    table = combine([str(tmp_path / str(number)) for number in range(6)])
    assert row(table, REAL)[1] == "1" and row(table, BOTH)[1] == "6"
    assert "cover the chance of generator, sampling, class, not that of split, classifier." in table
    assert "Of so few" not in table


def test_each_interval_says_what_it_covers_itself(tmp_path):
    write_report(tmp_path / "a", place=(1, 1, 1))
    write_report(tmp_path / "b", place=(2, 1, 1), without=POSTERIOR, warnings=["the VAE was trained on 3 test images"])
    table = combine([str(tmp_path / "a"), str(tmp_path / "b")])
    both = f"The intervals of {SYNTHETIC}, {BOTH} cover the chance of split, generator, sampling, classifier, class."
    # REAL + POSTERIOR, and BOTH against it, are of the first evaluation alone.
    rest = f"The intervals of {POSTERIOR}, {BOTH} cover the chance of classifier, class, not that of split, generator"
    assert both in table and rest in table


def test_classes_without_test_images_have_no_part_in_it(tmp_path, capsys):
    labels = LABELS[LABELS == 1]
    write_report(tmp_path / "a", labels=labels, seeds=[42], warnings=["few images"])
    table = combine([str(tmp_path / "a")])
    assert "cover the chance of nothing, not that of split, generator, sampling, classifier, class." in table
    assert re.fullmatch(r"[+-]\d+\.\d", row(table, BOTH)[-1])  # one class has no interval
    assert f"warning: {tmp_path / 'a'}: few images" in capsys.readouterr().err


def test_what_cannot_be_put_together_is_refused_and_named(tmp_path):
    first, other, how = tmp_path / "first", (1, 2, 1), {"dim": 64, "freeze_network": False}
    write_report(first, trained_with=how)
    write_report(tmp_path / "unknown", place=other)  # of a version that did not say how a model was trained
    assert "2 diffusion models" in combine([str(first), str(tmp_path / "unknown")])
    few = {name: {"synthetic": 4, "training": 2} for name in CLASSES}
    renamed = {name: {"synthetic": 4, "training": 4} for name in (*CLASSES[:2], "ID_3")}
    for name, changes, words in [
        ("steps", {"place": other, "num_steps": 6}, "differ in classifier_steps"),
        ("classes", {"place": other, "images_per_class": renamed}, "differ in their classes"),
        ("few", {"place": other, "images_per_class": few}, "differ in how many real images they train on"),
        (
            "guided",
            {"place": other, "made_with": {"weights": "x", "cond_scale": 3.0}},
            r"differ in how images were generated \(cond_scale\)",
        ),
        (
            "frozen",
            {"place": other, "trained_with": {**how, "freeze_network": True}},
            r"differ in how the model was trained \(freeze_network\), so",
        ),
        ("earlier", {"place": other, "step": 1000}, "differ in the step of the model"),
        ("same", {}, "are about the same split, weights and images; give each only once"),
    ]:
        write_report(tmp_path / name, **changes)
        with pytest.raises(UserError, match=words):
            combine([str(first), str(tmp_path / name)])


def refused(capsys: pytest.CaptureFixture[str], **flags: object) -> str:
    """Runs evaluate_images.py with flags that it must refuse; returns what it says."""
    assert evaluate_images.main(tiny.flags(flags)) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ") and "Traceback" not in told
    return told


def test_a_folder_that_holds_no_such_report_is_refused_and_named(tmp_path, capsys):
    write_report(tmp_path / "old", weights_digest=None)
    write_report(tmp_path / "damaged")
    (tmp_path / "damaged" / "report.json").write_bytes(b"{}")
    write_report(tmp_path / "unnamed", images_per_class=None)
    write_report(tmp_path / "classless", images_per_class={})
    write_report(tmp_path / "memories")
    facts = json.loads((tmp_path / "memories" / "report.json").read_text())
    unfinished = Report(tmp_path / "unfinished", {}, num_classes=3)
    unfinished.begin(evaluated={"synthetic_digest": "x"}, warnings=[], settings={})
    unfinished.write()
    strange = Report(tmp_path / "strange", {}, num_classes=3)
    strange.set_facts(evaluated=[1], classifier={"sets": 1})
    strange.write()
    empty = Report(tmp_path / "empty", {}, num_classes=3)
    for by_seed in facts["classifier"]["scores"].values():
        for score in by_seed.values():
            score["confusion"], score["per_class"] = [[0] * 3] * 3, [None] * 3
    empty.set_facts(evaluated=facts["evaluated"], classifier=facts["classifier"])
    empty.write()
    for name, words in [
        ("absent", "absent/report.json does not exist; give a folder that evaluate_images.py has written"),
        ("old/report.json", "report.json/report.json does not exist; give a folder"),
        ("damaged", "its checksum does not fit"),
        ("unfinished", "has no finished classifiers"),
        ("old", "earlier versions; run evaluate_images.py for it once more"),
        ("strange", "what is stored as evaluated, classifier has another form"),
        ("unnamed", "what is stored as classifier has another form"),
        ("classless", "what is stored as classifier has another form"),
        ("empty", "has no finished classifiers"),
    ]:
        told = refused(capsys, combine=[tmp_path / name])
        assert words in told and name in told


def test_the_flag_needs_folders_and_stands_alone(tmp_path, capsys):
    assert "--combine needs folders of earlier evaluations" in refused(capsys, combine=[])
    write_report(tmp_path / "a")
    told = refused(capsys, combine=[tmp_path / "a"], sweep=[1.0])
    assert "--combine needs folders of earlier evaluations, and no --sweep beside it" in told
