"""Trackers: what TensorBoard and W&B show is what metrics.jsonl says, also after a kill; a failing one is dropped."""

import importlib.util
import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from event_files import read_events, shown_scalars
from PIL import Image
from pipeline import HALF, STEPS, assert_same_run, at_step, one_error, train

from gait_latents.common.errors import UserError
from gait_latents.diffusion.model import mean_by_timestep
from gait_latents.training import trackers
from gait_latents.training.trackers import Trackers, choose, flat_figures

ROW = {"step": 3, "loss": 0.5, "loss_by_timestep": {"0-9": 0.25}}


class Killed(Exception):
    """Ends a training as a kill would: nothing is saved any more."""


def kill() -> None:
    raise Killed


def open_trackers(folder: Path, *names: str, step: int = 0, rows: tuple = ()) -> Trackers:
    return Trackers(names, folder, step=step, rows=rows, project="tests", run_name="a run", settings={"dim": 8})


def metrics_rows(results: Path) -> list[dict]:
    return [json.loads(line) for line in (results / "metrics.jsonl").read_text().splitlines()]


def expected_scalars(results: Path) -> dict[str, list[tuple[int, float]]]:
    """Returns name -> (step, float32 value) of all figures of metrics.jsonl."""
    found: dict[str, list[tuple[int, float]]] = {}
    for row in metrics_rows(results):
        for name, value in flat_figures(row).items():
            found.setdefault(name, []).append((row["step"], float(np.float32(value))))
    return found


# --- TensorBoard -------------------------------------------------------------------------------------------


def test_tensorboard_shows_each_step_once_after_a_kill_and_training_has_the_same_bits(cached, trained, monkeypatch):
    pytest.importorskip("tensorboard")
    with monkeypatch.context() as patch:
        at_step(patch, HALF + 3, kill)  # two steps were logged after the last save
        with pytest.raises(Killed):
            train(cached, trackers="tensorboard")
    assert [step for step, _ in shown_scalars(cached / "results")["loss"]] == list(range(1, HALF + 3))
    assert train(cached, trackers="tensorboard", num_samples=2) == 0
    assert_same_run(cached, trained)
    shown = shown_scalars(cached / "results")
    assert shown == expected_scalars(cached / "results")
    assert [step for step, _ in shown["loss"]] == list(range(1, STEPS + 1))
    assert {"lr", "grad_norm", "seconds_per_step", "nearest_class_mean"} <= shown.keys()
    grids = read_events(cached / "results").Images("grid")
    assert [grid.step for grid in grids] == [HALF, STEPS]
    saved = np.asarray(Image.open(cached / "results" / f"grid-{STEPS:08d}.png"))
    path = cached / "shown.png"
    path.write_bytes(grids[-1].encoded_image_string)
    assert np.array_equal(np.asarray(Image.open(path)), saved)


def test_a_run_that_moves_brings_its_curve_along(cached, trained):
    pytest.importorskip("tensorboard")
    assert train(cached, trackers="tensorboard", resume_from=trained / "results", train_num_steps=STEPS + 1) == 0
    assert shown_scalars(cached / "results") == expected_scalars(cached / "results")
    assert [step for step, _ in shown_scalars(cached / "results")["loss"]] == list(range(1, STEPS + 2))


def test_a_tracker_that_fails_is_dropped_with_one_warning(tmp_path, capsys):
    pytest.importorskip("tensorboard")
    shown = open_trackers(tmp_path, "tensorboard")
    shown.add_row(ROW)
    shown._open["tensorboard"]._file.close()  # type: ignore[attr-defined]
    shown.add_row({**ROW, "step": 4})
    shown.add_picture(4, Image.new("RGB", (4, 4)))
    shown.close()
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1 and errors[0].startswith("warning: tensorboard gets no more figures (write to closed file)")
    assert shown_scalars(tmp_path) == {"loss": [(3, 0.5)], "loss_by_timestep/0-9": [(3, 0.25)]}


def test_a_folder_that_takes_no_events_does_not_stop_the_training(cached, trained, capsys):
    pytest.importorskip("tensorboard")
    (cached / "results").mkdir()
    (cached / "results" / "tensorboard").write_text("in the way")
    assert train(cached, trackers="tensorboard") == 0
    assert capsys.readouterr().err.count("warning: tensorboard gets no more figures") == 1
    assert_same_run(cached, trained)


# --- Weights & Biases --------------------------------------------------------------------------------------


def test_wandb_offline_keeps_one_run_that_goes_on(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for step in (0, 3):
        shown = open_trackers(tmp_path, "wandb", step=step)
        shown.add_row({**ROW, "step": step + 1})
        shown.add_picture(step + 1, Image.new("RGB", (4, 4)))
        shown.close()
    run_id = (tmp_path / trackers.WANDB_ID_NAME).read_text()
    files = list(tmp_path.rglob(f"run-{run_id}.wandb"))
    assert files and all(path.stat().st_size for path in files)
    (tmp_path / trackers.WANDB_ID_NAME).write_text("../elsewhere")
    with pytest.raises(UserError, match="is damaged; remove it"):
        open_trackers(tmp_path, "wandb")


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """Puts a package in the place of wandb that only notes how it is started."""
    started: list[dict] = []
    module = types.ModuleType("wandb")
    run = types.SimpleNamespace(log=lambda *_, **__: None, finish=lambda: None)
    module.init = lambda **how: started.append(how) or run  # type: ignore[attr-defined]
    module.Settings = dict  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setattr(trackers, "_is_installed", lambda name: name == "wandb")
    return started


def test_a_run_that_moves_is_the_same_run_in_wandb(cached, wandb):
    for number, results in enumerate(("results", "session_2", "session_3", "another")):
        origin = cached / ("results", "results", "session_2")[number] if number in (1, 2) else None
        flags = {"results_folder": cached / results, "resume_from": origin, "train_num_steps": 1 + number}
        assert train(cached, trackers="wandb", num_samples=0, **flags) == 0
    ids = [how["id"] for how in wandb]
    assert ids[0] == ids[1] == ids[2] != ids[3]
    assert (cached / "session_3" / trackers.WANDB_ID_NAME).read_text() == ids[0]


def test_a_package_that_is_absent_is_told_before_anything_is_done(world, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "wandb" else find(name))
    assert train(world, trackers=["tensorboard", "wandb"] if find("tensorboard") else "wandb") == 2
    assert one_error(capsys) == "error: --trackers wandb needs the package wandb; pip install wandb, or leave it out"
    assert sorted(path.name for path in world.iterdir()) == ["data", "vae.pt"]


# --- which ones --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("installed", "names", "expected"),
    [
        (("tensorboard", "wandb"), ["auto"], ["tensorboard"]),
        ((), ["auto"], []),
        (("tensorboard",), ["none"], []),
        (("tensorboard", "wandb"), ["wandb"], ["wandb"]),
        (("tensorboard", "wandb"), ["wandb", "auto"], ["wandb", "tensorboard"]),
        (("tensorboard", "wandb"), ["wandb", "tensorboard", "wandb"], ["tensorboard", "wandb"]),
    ],
)
def test_only_what_is_asked_for_is_used(monkeypatch, installed, names, expected):
    monkeypatch.setattr(trackers, "_is_installed", lambda package: package in installed)
    assert choose(names) == expected


def test_none_stands_alone():
    with pytest.raises(UserError, match="give none alone"):
        choose(["none", "wandb"])


def test_a_folder_called_wandb_is_no_package(tmp_path, monkeypatch):
    (tmp_path / "wandb_runs_here").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    assert not trackers._is_installed("wandb_runs_here")
    assert trackers._is_installed("json")


# --- the figures -------------------------------------------------------------------------------------------


def test_figures_are_flat_and_without_the_step():
    assert flat_figures({**ROW, "name": "x", "flag": True}) == {"loss": 0.5, "loss_by_timestep/0-9": 0.25}


@pytest.mark.parametrize("timesteps", [2, 10, 37, 1000])
def test_losses_by_timestep_are_means_over_their_ranges(timesteps):
    generator = np.random.default_rng(timesteps)
    times, losses = generator.integers(0, timesteps, 50), generator.random(50)
    found = mean_by_timestep(times.tolist(), losses.tolist(), timesteps)
    covered = 0
    for name, mean in found.items():
        low, high = map(int, name.split("-"))
        inside = (times >= low) & (times <= high)
        covered += int(inside.sum())
        assert mean == pytest.approx(losses[inside].mean())
        assert len(name) == 2 * len(str(timesteps - 1)) + 1
    assert covered == 50 and len(found) <= 10


def test_the_losses_by_timestep_make_up_the_loss(trained):
    """With one line per step and a batch of four, the mean over samples is the mean of the ranges by their counts."""
    rows = [row for row in metrics_rows(trained / "results") if "loss" in row]
    assert len(rows) == STEPS
    for row in rows:
        parts = list(row["loss_by_timestep"].values())
        assert 1 <= len(parts) <= 4 and min(parts) <= row["loss"] <= max(parts)
        if len(parts) == 4:
            assert sum(parts) / 4 == pytest.approx(row["loss"], rel=1e-5)
    assert any(len(row["loss_by_timestep"]) == 4 for row in rows)


def test_what_was_not_logged_yet_survives_a_stop(cached, trained, monkeypatch):
    assert train(cached, log_every=STEPS, results_folder=cached / "whole", num_samples=0) == 0
    with monkeypatch.context() as patch:
        at_step(patch, HALF + 2, kill)
        with pytest.raises(Killed):
            train(cached, log_every=STEPS, num_samples=0)
    assert train(cached, log_every=STEPS, num_samples=0) == 0
    mine, whole = (metrics_rows(cached / name)[0]["loss_by_timestep"] for name in ("results", "whole"))
    assert mine == whole and len(mine) > 4
