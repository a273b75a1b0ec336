"""Output and evaluation folders that were damaged or prepared by somebody: nothing of that is kept or read."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pipeline
import pytest
import tiny
from fault_account import Account

import evaluate_images
from gait_latents.evaluation import report

SECRET = b"a secret of the user"


@pytest.fixture
def outputs(trained: Path, tmp_path: Path) -> Path:
    """A folder with generated images in `synthetic` and their evaluation in `evaluation`."""
    assert pipeline.generate(trained, output_folder=tmp_path / "synthetic", images_per_class=1) == 0
    assert evaluate(trained, tmp_path) == 0
    return tmp_path


def evaluate(trained: Path, root: Path) -> int:
    flags = {"checkpoint": trained / "results", "synthetic_path": root / "synthetic", "device": "cpu", "neighbours": 1}
    return evaluate_images.main(tiny.flags({**flags, "output_folder": root / "evaluation"}))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def put_link(path: Path) -> None:
    folder = next(above for above in path.parents if above.name in ("synthetic", "evaluation"))
    secret = folder.parent / "secret"
    secret.write_bytes(SECRET)
    path.unlink()
    path.symlink_to(secret)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "emptied": lambda path: path.write_bytes(b""),
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-9]),
    "other bytes": lambda path: path.write_bytes(b"x" * 500),
    "10 GB": lambda path: os.truncate(path, 10**10),
    "a link": put_link,
    "removed": lambda path: path.unlink(),
}


def test_damage_in_an_output_folder_is_mended_by_the_same_command(
    trained: Path, outputs: Path, account: Account
) -> None:
    like, wrong, tried = contents(outputs / "synthetic"), 0, 0
    for name in ("ID_1/ID_1_000000.jpg", "labels.csv", "overview.png"):
        for damage in DAMAGES.values():
            damage(outputs / "synthetic" / name)
            wrong += pipeline.generate(trained, output_folder=outputs / "synthetic", images_per_class=1) != 0
            wrong += contents(outputs / "synthetic") != like
            tried += 1
    account.add("damage in an output folder", "6 kinds", cases=tried, wrong=wrong)


def test_damage_in_an_evaluation_folder_is_mended_and_nothing_of_the_user_gets_in(
    trained: Path, outputs: Path, account: Account
) -> None:
    like, wrong, tried = contents(outputs / "evaluation"), 0, 0
    for name in ("closest_pairs.png", "report.json", "report.html"):
        for damage in DAMAGES.values():
            damage(outputs / "evaluation" / name)
            wrong += evaluate(trained, outputs) != 0 or contents(outputs / "evaluation") != like
            tried += 1
    wrong += (outputs / "secret").read_bytes() != SECRET
    account.add("damage in an evaluation folder", "6 kinds", cases=tried, wrong=wrong)


def test_class_folders_that_are_links_are_refused(trained: Path, outputs: Path, account: Account) -> None:
    outside, wrong = outputs / "outside", 0
    for name in pipeline.CLASSES:
        (outputs / "synthetic" / name).rename(outside)
        (outputs / "synthetic" / name).symlink_to(outside)
        before = contents(outputs)
        wrong += pipeline.generate(trained, output_folder=outputs / "synthetic", images_per_class=3) != 1
        wrong += contents(outputs) != before
        (outputs / "synthetic" / name).unlink()
        outside.rename(outputs / "synthetic" / name)
    account.add("links in an output folder", "in the place of a class folder", cases=3, wrong=wrong)


STRANGE: list[tuple[str, str, Any]] = [
    ("latents", "synthetic", 7),
    ("latents", "images", "many"),
    ("memorisation", "distances", [10**400]),
    ("memorisation", "same_content", [None]),
    ("memorisation", "near_share", {}),
    ("why", "classifier", []),
]


def test_parts_of_a_report_of_another_form_are_computed_again(trained: Path, outputs: Path, account: Account) -> None:
    folder, wrong = outputs / "evaluation", 0
    page = (folder / "report.html").read_bytes()
    data = json.loads((folder / "report.json").read_text())
    del data["sha256"]
    for part, name, value in STRANGE:
        changed = {**data, part: {**data[part], name: value}}
        (folder / "report.json").write_text(json.dumps({**changed, "sha256": report._digest(changed)}))
        wrong += evaluate(trained, outputs) != 0 or (folder / "report.html").read_bytes() != page
        found = json.loads((folder / "report.json").read_text())
        wrong += {name: found[name] for name in data} != data
    account.add("right checksum, hostile content", "report.json", cases=len(STRANGE), wrong=wrong)
