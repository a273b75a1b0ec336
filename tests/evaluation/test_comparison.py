"""The comparison of training sets: what is trained, by which images settings are chosen, and what the figures say."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from tiny_images import coloured
from torch import Tensor

from gait_latents.common.errors import UserError
from gait_latents.evaluation import comparison, worth
from gait_latents.evaluation.comparison import BOTH, CANDIDATES, POSTERIOR, REAL, SYNTHETIC, Comparison

CPU = torch.device("cpu")
Set = tuple[Tensor, Tensor]


def images(**changes: Set) -> dict[str, Set]:
    return {REAL: coloured([4, 4, 4]), SYNTHETIC: coloured([6, 6, 6], seed=1), **changes}


def compare(
    done: dict[str, Any], saved: list[dict[str, Any]], *, sets: dict[str, Set] | None = None, **changes: Any
) -> Comparison:
    settings: dict[str, Any] = {
        "num_steps": 2,
        "seeds": [5, 6],
        "device": CPU,
        "class_names": ["ID_1", "ID_2", "ID_10"],
        "batch_size": 4,
        "parts": (),
        "validation": None,
        "test": coloured([2, 3, 4], seed=2),
    }
    settings |= changes
    return Comparison(
        sets or images(),
        settings.pop("validation"),
        settings.pop("test"),
        **settings,
        done=done,
        save=lambda state: saved.append(json.loads(json.dumps(state))),
    )


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Notes what each classifier learns from and is asked about, and with which settings."""
    noted: list[dict[str, Any]] = []
    train = comparison.train_and_classify

    def train_and_note(sets: Any, asked: Tensor, **how: Any) -> Tensor:
        noted.append({"sets": [len(labels) for _, labels in sets], "asked": len(asked), **how})
        return train(sets, asked, **how)

    monkeypatch.setattr(comparison, "train_and_classify", train_and_note)
    return noted


@pytest.mark.slow
def test_an_interrupted_comparison_goes_on_and_ends_like_an_uninterrupted_one(trainings):
    saved: list[dict[str, Any]] = []
    whole = compare({}, saved).run()
    num_tried = len(CANDIDATES)
    assert len(saved) == num_tried + 6 and saved[-1] == {name: whole[name] for name in ("scores", "tuning")}
    assert json.loads(json.dumps(whole)) == whole
    assert [t["sets"] for t in trainings] == [[9]] * num_tried + [[12], [18], [12, 18]] * 2
    assert [t["asked"] for t in trainings] == [3] * num_tried + [9] * 6  # the last quarter of the real ones chooses
    chosen = min(whole["tuning"]["tried"], key=lambda row: row["nll"])
    assert whole["tuning"]["chosen"] == {name: chosen[name] for name in ("learning_rate", "strength")}
    assert all(t["learning_rate"] == chosen["learning_rate"] for t in trainings[num_tried:])

    for stopped_after in (1, num_tried, num_tried + 2):
        steps, kept = [], []

        def stop_in_the_middle(steps: list[int] = steps, at: int = 2 * stopped_after) -> None:
            steps.append(1)
            if len(steps) > at:
                raise InterruptedError

        with pytest.raises(InterruptedError):
            compare({}, kept, progress=stop_in_the_middle).run()
        assert kept == saved[:stopped_after]
        rest = compare(kept[-1], kept)
        assert rest.num_trainings_left() == len(saved) - stopped_after
        assert rest.run() == whole and kept == saved
    trainings.clear()
    assert compare(whole, []).run() == whole and not trainings

    assert whole["images"] == {"real": 12, "synthetic": 18, "test": 9}
    for figures in whole["sets"].values():
        assert [sum(row) for row in figures["confusion"]] == [4, 6, 8]  # both seeds
        right = sum(row[i] for i, row in enumerate(figures["confusion"]))
        assert figures["mean"] == pytest.approx(right / 18)


@pytest.mark.slow
def test_validation_images_choose_and_the_answers_are_handed_on(trainings):
    kept: dict[tuple[str, int], Tensor] = {}
    sets = images(**{POSTERIOR: coloured([5, 5, 5], seed=3)})
    found = compare(
        {},
        [],
        sets=sets,
        validation=coloured([1, 1, 0], seed=4),
        parts=(4, 2),
        keep=lambda name, seed, logits: kept.update({(name, seed): logits}),
    ).run()
    assert [t["sets"] for t in trainings[: len(CANDIDATES)]] == [[12]] * len(CANDIDATES)
    assert {t["asked"] for t in trainings[: len(CANDIDATES)]} == {2}
    names = ["1/4 of real", "1/2 of real", REAL, POSTERIOR, SYNTHETIC, BOTH]
    assert [t["sets"] for t in trainings[len(CANDIDATES) :]] == [[3], [6], [12], [12, 15], [18], [12, 18]] * 2
    assert list(found["sets"]) == names and list(kept) == [(name, seed) for seed in (5, 6) for name in names]
    truth = coloured([2, 3, 4], seed=2)[1]
    for (name, seed), logits in kept.items():
        score = found["scores"][name][str(seed)]
        assert score["accuracy"] == pytest.approx(float((logits.argmax(1) == truth).double().mean()))
        assert score["nll"] == pytest.approx(float(torch.nn.functional.cross_entropy(logits.double(), truth)))
        assert score["eer"] == worth.macro_eer(logits, truth)
    assert found["curve"]["counts"] == [1, 2, 4]
    assert found["curve"]["accuracies"] == [found["sets"][name]["mean"] for name in names[:3]]
    assert set(found["differences"]) == {POSTERIOR, SYNTHETIC, BOTH}
    means = {name: figures["mean"] for name, figures in found["sets"].items()}
    assert found["beyond_posterior"]["mean"] == pytest.approx(means[BOTH] - means[POSTERIOR])
    assert "in place of draws of the VAE's posterior" in found["beyond_posterior"]["sentence"]
    assert {name for name, figures in found["sets"].items() if "worth" in figures} == {POSTERIOR, SYNTHETIC, BOTH}


def made_up(shares: dict[str, list[list[float]]]) -> dict[str, Any]:
    """Makes scores of sets whose classes were recognised to these shares, seed by seed."""
    rest = {"confusion": [[0, 0, 1]] * 3, "nll": 1.0, "eer": 0.1}
    weights = [2 / 9, 3 / 9, 4 / 9]  # of the test images
    scores = {
        name: {
            str(seed): {"accuracy": float(np.dot(row, weights)), "per_class": row, **rest}
            for seed, row in enumerate(rows)
        }
        for name, rows in shares.items()
    }
    tried = [{"learning_rate": rate, "strength": strength, "nll": 1.0} for rate, strength in CANDIDATES]
    return {"scores": scores, "tuning": {"tried": tried, "images": 3}}


@pytest.mark.parametrize(
    ("real", "both", "verdict", "words"),
    [
        ([[0.5, 0.5, 0.6]] * 3, [[0.6, 0.6, 0.7]] * 3, "helps", "They help: accuracy changes by +10.0 points"),
        ([[0.6, 0.6, 0.7]] * 3, [[0.5, 0.5, 0.6]] * 3, "harms", "They harm"),
        ([[0.5, 0.5, 0.5]] * 2, [[0.9, 0.4, 0.3]] * 2, "open", "No difference that can be shown"),
        ([[0.5, 0.5, 0.5], [0.5] * 3], [[0.8] * 3, [0.2] * 3], "open", "over classifiers and classes"),
    ],
)
def test_the_verdict_follows_from_the_interval_over_classifiers_and_classes(real, both, verdict, words):
    found = compare(made_up({REAL: real, SYNTHETIC: real, BOTH: both}), [], seeds=list(range(len(real)))).run()
    difference = found["difference"]
    assert difference["verdict"] == verdict and words in difference["sentence"]
    assert "another split or generator or sampling is not in it" in difference["sentence"]
    assert difference["mean"] == pytest.approx(found["sets"][BOTH]["mean"] - found["sets"][REAL]["mean"])
    assert difference["low"] <= difference["mean"] <= difference["high"]
    assert difference["covers"] == ["classifier", "class"]
    assert difference["leaves_out"] == ["split", "generator", "sampling"]


def test_one_classifier_is_no_measure_of_its_chance_but_classes_are_of_theirs():
    found = compare(made_up({REAL: [[0.5] * 3], SYNTHETIC: [[0.5] * 3], BOTH: [[0.7, 0.6, 0.5]]}), [], seeds=[0]).run()
    difference = found["difference"]
    assert difference["covers"] == ["class"] and difference["leaves_out"][0] == "classifier"
    assert difference["verdict"] == "open" and "one classifier cannot show" in difference["sentence"]
    assert found["sets"][BOTH]["deviation"] is None


def test_a_class_without_test_images_is_left_out_of_the_mean():
    shares = {REAL: [[0.5, None, 0.5]] * 2, SYNTHETIC: [[0.5, None, 0.5]] * 2, BOTH: [[0.6, None, 0.9]] * 2}
    done = made_up({name: [[0.0 if v is None else v for v in row] for row in rows] for name, rows in shares.items()})
    for name, rows in shares.items():
        for seed, row in enumerate(rows):
            done["scores"][name][str(seed)]["per_class"] = row
    found = compare(done, [], seeds=[0, 1], test=coloured([1, 0, 3], seed=2)).run()
    assert found["difference"]["mean"] == pytest.approx((0.1 * 1 + 0.4 * 3) / 4)
    assert found["sets"][BOTH]["per_class"] == [pytest.approx(0.6), None, pytest.approx(0.9)]


def test_a_class_without_images_is_refused_by_its_name():
    few = coloured([6, 0, 6])
    with pytest.raises(UserError, match=r"no synthetic images of class ID_2; .*generate some"):
        compare({}, [], sets=images(**{SYNTHETIC: few}))
    with pytest.raises(UserError, match="no real images of class ID_2; "):
        compare({}, [], sets=images(**{REAL: few}))
    with pytest.raises(UserError, match="needs test images"):
        compare({}, [], test=coloured([0, 0, 0]))


def test_the_last_quarter_of_each_class_chooses_and_the_first_parts_make_the_curve():
    labels = torch.tensor([0, 1, 0, 1, 0, 0, 1, 1, 1, 1, 1, 1, 2])
    pixels = torch.arange(13, dtype=torch.uint8).reshape(13, 1, 1, 1)
    learn, ask = comparison._for_tuning((pixels, labels), None, 0)
    assert learn[0].flatten().tolist() == [0, 1, 2, 3, 4, 6, 7, 8, 9, 12]
    with_gap = comparison._for_tuning((pixels, labels), None, 4)[0]
    assert with_gap[0].flatten().tolist() == [0, 1, 2, 3, 6, 7, 12]  # a third of those before at most
    assert ask[0].flatten().tolist() == [5, 10, 11, 12]  # of a class of one image, that one
    assert comparison._first_of_each((pixels, labels), 4)[0].flatten().tolist() == [0, 1, 3, 12]
    assert comparison._first_of_each((pixels, labels), 2)[0].flatten().tolist() == [0, 1, 2, 3, 6, 7, 12]
