import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bench_gpu
import bench_usefulness
import gpu_stages
import harness
import numpy as np
import pipeline
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]


def run(name: str, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, f"benchmarks/{name}.py", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def bench(*words: str) -> subprocess.CompletedProcess[str]:
    return run("bench_train", "--small", "--threads", "1", "--steps", "1", *words)


@pytest.mark.slow
def test_a_benchmark_prints_a_table_and_ends_in_a_line_of_json():
    done = bench("--rounds", "2", "--only", "float32")
    assert done.returncode == 0, done.stderr
    *table, last = done.stdout.splitlines()
    assert [line.split(" | ")[0] for line in table[2:]] == ["| baseline", "| float32"]
    result = json.loads(last)
    assert result["benchmark"] == "bench_train" and result["versions"]["torch"]
    assert isinstance(result["cpu_features"], list)
    for figures in result["variants"].values():
        assert 0 < figures["seconds_min"] <= figures["seconds"] <= figures["seconds_max"]
        assert figures["speed"] > 0 and figures["host_gb"] > 0.1
    assert 0 < result["variants"]["float32"]["share of data and draws"] < 1


@pytest.mark.slow
def test_a_variant_that_fails_ends_the_benchmark():
    done = bench("--rounds", "1", "--only", "no such variant")
    assert done.returncode == 1 and "the variant 'no such variant' ended with an error" in done.stderr


@pytest.mark.slow
def test_samplers_are_compared_with_the_library_by_their_passes_and_their_distance(tmp_path):
    asked = ["dpm++ 4 1.5 0 1", "dpm++ 4 1.5 0 0.5"]
    picture = tmp_path / "picture.png"
    words = ("--small", "--seeds", "2", "--classifier_steps", "2", "--picture", str(picture))
    done = run("bench_sample", *words, "--variants", *asked)
    assert done.returncode == 0, done.stderr
    *_, last = done.stdout.splitlines()
    found = json.loads(last)["variants"]
    assert list(found)[-3:] == [*asked, "real"] and all(name.startswith("library ddim") for name in list(found)[:-3])
    assert next(iter(found)) == "library ddim 4, guidance 6, clamped"
    assert [found[name]["passes"][0] for name in found if name != "real"] == [8, 8, 8, 8, 6]
    for name, figures in found.items():
        for middle, low, high in figures.values():
            assert low <= middle <= high
        assert figures["frechet_mean"][0] > 0 and 0 <= figures["recognition"][0] <= 1
        assert 0 <= figures["alone"][0] <= 1
        if name != "real":
            assert figures["seconds"][0] > 0 and -100 <= figures["gain"][0] <= 100 and f"| {name} |" in done.stdout
    assert "gain" not in found["real"]
    with Image.open(picture) as drawn:
        counted = drawn.getcolors(1 << 20)
    assert counted is not None
    colours = {colour for _, colour in counted}
    assert {(190, 60, 40), (31, 90, 180)} <= colours  # a mark of the library, and one of ours


@pytest.mark.slow
def test_the_rows_of_the_library_are_as_many_as_asked():
    for asked, expected in (("baseline", ["library ddim 4, guidance 6, clamped"]), ("none", [])):
        done = run("bench_sample", "--small", "--seeds", "1", "--library", asked, "--variants", "ddim 2 1 0 1")
        found = json.loads(done.stdout.splitlines()[-1])["variants"]
        assert list(found) == [*expected, "ddim 2 1 0 1", "real"]
        assert not any({"alone", "gain"} & set(figures) for figures in found.values())


@pytest.mark.slow
def test_what_is_no_variant_is_told():
    for text in ("dpm++ 4", "euler 4 1 0 1", "ddim 4 1 0.5 0.2", "ddim x 1 0 1"):
        done = run("bench_sample", "--small", "--variants", text)
        assert done.returncode == 2 and repr(text) in done.stderr
    assert "give --checkpoint" in run("bench_sample").stderr


# --- bench_gpu.py ------------------------------------------------------------------------------------------

# Stands in for gpu_stages.py: a stage says which stages the report has by then; "micro" fails, and "truth" never ends.
STAGE = """
import json, subprocess, sys, time
from pathlib import Path
name, folder = sys.argv[1], Path(sys.argv[sys.argv.index("--folder") + 1])
report = folder.parent / "gpu_report.json"
known = json.loads(report.read_text())["stages"] if report.exists() else {}
print(json.dumps({"name": "before", "value": list(known)}))
print("no row {", flush=True)
print("> working", file=sys.stderr)
if name == "micro":
    raise ValueError("the card is broken")
if name == "truth":
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    print(json.dumps({"name": "other", "value": other.pid}), flush=True)
    time.sleep(600)
"""


def is_running(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


def test_a_stage_that_fails_leaves_its_last_line_and_the_rest_go_on(tmp_path, capsys):
    report = {"date": "2026-11-29", "small": True, "stages": {}}
    bench_gpu.run_stages(report, ["facts", "micro", "generate"], [sys.executable, "-c", STAGE], 600, tmp_path)
    stages = report["stages"]
    assert [result["state"] for result in stages.values()] == ["done", "failed", "done"]
    assert stages["micro"]["last_line"] == "ValueError: the card is broken" and stages["micro"]["doing"] == "working"
    rows = [result["rows"] for result in stages.values()]
    assert rows == [{"before": {"value": found}} for found in ([], ["facts"], ["facts", "micro"])]
    assert json.loads((tmp_path / "gpu_report.json").read_text()) == report
    text = (tmp_path / "gpu_report.md").read_text()
    assert "while working; its last line: `ValueError: the card is broken`" in text and bench_gpu.SMALL in text
    assert [line for line in text.splitlines() if line.startswith("## ")][:4] == [
        "## facts",
        "## micro",
        "## generate",
        "## verdict",
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpu_report.json", "gpu_report.md"]
    assert "## generate" in capsys.readouterr().out


def test_a_stage_whose_time_is_up_is_ended_with_all_that_it_started(tmp_path):
    command = [sys.executable, "-c", STAGE, "truth", "--folder", str(tmp_path / "scratch")]
    result = bench_gpu.run_stage(command, 8, {})
    assert result["state"] == "out of time" and result["doing"] == "working" and result["last_line"] == "> working"
    assert not is_running(result["rows"]["other"]["value"])


def test_time_that_a_stage_leaves_goes_to_the_next_and_one_gpu_needs_little_for_two():
    names, report = list(bench_gpu.SECONDS), {"stages": {}}
    left, shares = 500.0, []
    for i, name in enumerate(names):
        shares.append(bench_gpu.share_of(name, names[i:], left, report))
        left -= shares[-1]
    assert left == pytest.approx(0) and min(shares) > 0
    assert bench_gpu.share_of("train", ["train"], 100, report) == 100
    one = {"stages": {"facts": {"rows": {"GPUs": {"value": 1}}}}}
    assert bench_gpu.share_of("train", names[4:], 300, one) > bench_gpu.share_of("train", names[4:], 300, report)


def median(value: float) -> dict[str, float]:
    return {"median": value, "min": value / 2, "max": 2 * value, "windows": 5}


def measured_report() -> dict[str, Any]:
    """A report of a T4 with round figures."""
    facts = {"gpu": "Tesla T4", "GPUs": 1, "reduced number format": "float16"}
    facts["number format of --precision auto"] = "float16"
    speed, step, image = ("images per second", "ms per step", "ms per image")
    rows = {
        "facts": {name: {"value": value} for name, value in facts.items()},
        "micro": {
            "convolution, float32 NCHW": {"TFLOP/s": median(4.36)},
            "convolution, float32 NHWC": {"TFLOP/s": median(2.0)},
        },
        "encode": {
            gpu_stages.USERS_SCRIPT: {speed: median(5)},
            "ours, float32": {speed: median(15.5), "peak GB on the device": 2.5},
            "ours, float16": {speed: median(62)},
        },
        "train": {
            "users' loop": {step: median(200), "speed": median(1)},
            "ours, eager": {step: median(30), "speed": median(7), "peak GB on the device": 0.9},
            "ours, compiled": {step: median(12), "speed": median(16), "s of the first steps": 60.0},
            "data and draws of ours": {"share of a step": median(0.01)},
        },
        "generate": {
            "sampling, float16": {image: median(20)},
            "decoding, float16": {image: median(10)},
            "JPEG": {image: median(2)},
            "writing and fsync": {image: median(40)},
        },
    }
    return {"small": False, "stages": {name: {"rows": found} for name, found in rows.items()}}


def test_the_verdict_adds_up_what_the_stages_measured():
    minutes = bench_gpu.job_minutes(measured_report())
    ours = {name: row["minutes, ours"] for name, row in minutes.items()}
    train = (14_532 * 0.012 + 60) / 60  # 150 passes over 1,550 images by 16
    expected = {
        "encode 1,550 images": 1550 / 15.5 / 60,
        "(encode with --encode_precision float16)": 1550 / 62 / 60,
        "train 14,532 steps": train,
        "generate 1,550 images": 1550 * 0.042 / 60,  # the disk takes longer than the GPU
    }
    expected["whole job"] = 1550 / 15.5 / 60 + train + 1550 * 0.042 / 60
    assert ours == pytest.approx(expected)
    assert minutes["train 14,532 steps"]["minutes, users' way"] == pytest.approx(14_532 * 0.2 / 60)
    assert minutes["encode 1,550 images"]["minutes, users' way"] == pytest.approx(1550 / 5 / 60)


def test_a_target_is_met_missed_or_not_measured():
    report = measured_report()
    rows = bench_gpu.targets(report)
    assert {name: row["result"] for name, row in rows.items()} == {
        "training step, times the users' loop": "met",
        "training step on an H100, ms": "not measured",
        "training step on a T4, ms": "met",
        "encoding in float32, of the rate of a convolution": "met",
        "encoding in float16, of the rate of a convolution": "not measured",
        "whole job on a T4, minutes": "met",
        "whole job on an H100, minutes": "not measured",
        "data and draws, share of a step": "met",
        "peak memory of encoding, GB": "missed",
        "peak memory of training, GB": "not measured",
    }
    assert rows["encoding in float32, of the rate of a convolution"]["found"] == pytest.approx(15.5 * 0.218 / 4.36)
    report["stages"]["train"]["rows"].pop("ours, compiled")
    rows = bench_gpu.targets(report)
    assert (
        rows["training step on a T4, ms"]["result"]
        == rows["training step, times the users' loop"]["result"]
        == "missed"
    )
    assert rows["peak memory of training, GB"]["result"] == "met"
    report["stages"] = {}
    assert {row["result"] for row in bench_gpu.targets(report).values()} == {"not measured"}
    assert bench_gpu.job_minutes(report)["whole job"]["minutes, ours"] is None


def test_works_take_turns_and_a_work_without_time_still_gets_a_window():
    calls: list[str] = []

    def work(name: str, count: int) -> int:
        calls.append(name)
        time.sleep(0.002)
        return count

    works = {"one": lambda: work("one", 1), "two": lambda: work("two", 2)}
    found = harness.take_turns(works, seconds=60, window=0.01, rounds=3)
    assert [len(windows) for windows in found.values()] == [3, 3]
    turns = [name for name, before in zip(calls, ["", *calls], strict=False) if name != before]
    assert turns == ["one", "two"] * 4  # warmed up, then timed in three rounds
    for windows in found.values():
        for window in windows:
            assert 0 < window.host_seconds <= window.seconds and window.each == window.seconds / window.count
    ratios = harness.speed(found["two"], found["one"])
    assert ratios["windows"] == 3 and ratios["min"] <= ratios["median"] <= ratios["max"]
    assert [len(windows) for windows in harness.take_turns(works, seconds=0).values()] == [1, 1]


@pytest.mark.slow
def test_the_benchmark_for_gpus_runs_at_tiny_sizes_on_a_cpu(tmp_path):
    done = run("bench_gpu", "--small", "--minutes", "20", "--output_folder", str(tmp_path))
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "gpu_report.json").read_text())
    assert list(report["stages"]) == list(bench_gpu.SECONDS)
    for name, result in report["stages"].items():
        assert result["state"] == "done" and result["rows"], (name, result)
    facts, micro, truth, encode, train, generate, two = (result["rows"] for result in report["stages"].values())
    assert facts["torch"]["value"] and {row["result"] for row in truth.values()} == {"pass", "not on a CPU"}
    assert len(micro) == 13 and len(truth) == 6 and len(encode) == 7 and len(train) == 4 and len(generate) == 6
    assert "not measured" in train["ours, compiled"]["note"] and two["two GPUs, eager"]["ms per step"]["median"] > 0
    assert report["verdict"]["minutes"]["whole job"]["minutes, ours"] > 0
    assert {row["result"] for row in report["verdict"]["targets"].values()} == {"not measured"}
    assert (tmp_path / "gpu_report.md").read_text().count(bench_gpu.SMALL) == 3


def test_without_a_gpu_only_tiny_sizes_are_run(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = run("bench_gpu", "--output_folder", str(tmp_path / "report"))
    assert done.returncode == 1 and "torch sees no GPU" in done.stderr and not (tmp_path / "report").exists()


# --- whether generated images help ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def laboratory(tmp_path_factory):
    """A finished tiny laboratory with two splits, as (folder, what was printed)."""
    folder = tmp_path_factory.mktemp("laboratory")
    words = ("--small", "--folder", str(folder), "--splits", "2", "--generators", "1", "--classifiers", "1")
    words += ("--precision", "bfloat16")
    begun = run("bench_usefulness", *words, "--minutes", "0")
    assert begun.returncode == 0 and "nothing was measured yet" in begun.stdout
    done = run("bench_usefulness", *words)
    assert done.returncode == 0, done.stderr
    return folder, done


@pytest.mark.slow
def test_the_whole_way_is_gone_in_the_laboratory_and_kept(laboratory):
    folder, done = laboratory
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["benchmark"] == "bench_usefulness" and found["is_done"]
    rows = {(line["windows"], line["row"]): line for line in found["table"]}
    arms = ["real", "real + posterior", "synthetic", "real + synthetic"]
    assert list(rows) == [*((4, arm) for arm in arms), (12, "real")]
    for line in rows.values():
        assert line["runs"] == 2 and 0 <= line["accuracy"] <= 1 and line["nll"] > 0 and 0 <= line["eer"] <= 1
    difference = rows[4, "real + synthetic"]["difference"]
    assert difference["covers"] == ["split", "generator", "walker", "recording"]
    assert difference["leaves_out"] == ["classifier"]  # whose seed is the same in both splits
    assert difference["low"] <= difference["mean"] <= difference["high"]
    assert difference["mean"] == pytest.approx(rows[4, "real + synthetic"]["accuracy"] - rows[4, "real"]["accuracy"])
    kept = json.loads((folder / "results.json").read_text())
    assert len(kept["runs"]) == 10 and kept["table"] == found["table"]
    assert done.stdout.startswith((folder / "results.md").read_text())
    with Image.open(folder / "curve.png") as drawn:
        assert drawn.width > 600


@pytest.mark.slow
def test_training_and_test_windows_are_of_different_recordings_and_the_vae_saw_the_first_alone(laboratory):
    folder, _ = laboratory
    for split, learnt, asked in ((1, 1, 2), (2, 2, 1)):
        trial = folder / f"split_{split}" / "windows_4"
        names = {path.name for path in (trial / "training").rglob("*.jpg")}
        assert len(names) == 12 and all(f"_recording_{learnt}_" in name for name in names)
        for path in (trial / "predictions").glob("*.safetensors"):
            predictions = load_file(path)
            assert set(predictions["recordings"].tolist()) == {asked} and predictions["logits"].shape == (9, 3)
        assert len([*(trial / "posterior").rglob("*.jpg")]) == 6
        assert len([*(trial / "default_generator_1" / "synthetic").glob("ID_*/*.jpg")]) == 6
        tried = json.loads((trial / "tuning.json").read_text())
        assert tried["chosen"]["validation_nll"] == min(row["validation_nll"] for row in tried["tried"])


@pytest.mark.slow
def test_what_is_done_is_not_done_again_and_another_recipe_shares_the_rest(laboratory, tmp_path):
    folder, _ = laboratory
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.suffix == ".safetensors"}
    recipe = tmp_path / "guided.yaml"
    recipe.write_text("cond_scale: 3\n")
    words = ("--small", "--folder", str(folder), "--splits", "1", "--generators", "1", "--classifiers", "1")
    words += ("--precision", "bfloat16")
    done = run("bench_usefulness", *words, "--recipe", str(recipe))
    assert done.returncode == 0, done.stderr
    rows = [line["row"] for line in json.loads(done.stdout.splitlines()[-1])["table"] if line["windows"] == 4]
    assert "synthetic (guided)" in rows and "real + synthetic (guided)" in rows and "synthetic" in rows
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    other = run("bench_usefulness", "--folder", str(folder), "--minutes", "0")
    assert other.returncode == 1 and "was begun with other sizes, precision or models" in other.stderr


@pytest.mark.slow
def test_classifiers_begin_with_what_they_learn_from_other_walkers(laboratory, tmp_path):
    others = laboratory[0] / "recordings" / "recording_2"
    folder, words = tmp_path / "lab", ("--small", "--splits", "1", "--generators", "1", "--classifiers", "1")
    shutil.copytree(laboratory[0] / "recordings", folder / "recordings")
    done = run("bench_usefulness", *words, "--folder", str(folder), "--classifier_of", str(others))
    assert done.returncode == 0, done.stderr
    features = load_file(folder / "features.safetensors")
    assert len(features["layer1.0.conv1.weight"]) == 32 and not any("fc" in name for name in features)
    again = run("bench_usefulness", *words, "--folder", str(folder), "--minutes", "0")
    assert again.returncode == 1 and "precision or models" in again.stderr


def test_the_curve_doubles_up_to_all_windows():
    assert bench_usefulness.counts_of_curve([4, 8, 20, 50], 240) == [4, 8, 20, 50, 100, 240]
    assert bench_usefulness.counts_of_curve([4], 12) == [4, 12]
    assert bench_usefulness.counts_of_curve([12], 12) == [12]


@pytest.mark.parametrize(
    ("count", "first", "last"), [(3, 2, 2), (4, 2, 3), (8, 4, 6), (20, 12, 15), (50, 35, 38), (240, 177, 180)]
)
def test_the_last_quarter_chooses_and_what_overlaps_it_is_left_out(count, first, last):
    assert bench_usefulness.validation(count) == (first, last)


def test_a_difference_is_paired_by_split_and_seed_and_says_what_it_covers():
    def made(arm: str, split: int, classifier: int, level: float, **facts: object) -> bench_usefulness.Run:
        cells = np.full((4, 2), level)
        cells[:, split - 1] = np.nan  # the recording learnt from
        facts = {"arm": arm, "split": split, "classifier": classifier, "windows": 4, **facts}
        return bench_usefulness.Run(facts, cells, level, 1.0, None)

    real = [made("real", split, seed, 0.1 * split) for split in (1, 2) for seed in (1, 2)]
    both = [
        made("real + synthetic", split, seed, 0.1 * split + 0.01 * split, generator=1, recipe="default")
        for split in (1, 2)
        for seed in (1, 2, 3)  # there is no third of real windows
    ]
    found = bench_usefulness.difference(both, real)
    assert found is not None and found["mean"] == pytest.approx(0.015)
    assert (found["low"], found["high"]) == pytest.approx((0.01, 0.02))
    assert found["covers"] == ("split", "generator", "classifier", "walker", "recording") and not found["leaves_out"]
    alone = bench_usefulness.difference(both[:1], real)
    assert alone is not None and alone["leaves_out"] == ("split", "generator", "classifier")
    assert bench_usefulness.difference(both[2:3], real) is None
    curve = bench_usefulness.Curve({4: 0.15}, frozenset({1, 2}))
    lines = bench_usefulness.markdown([bench_usefulness.summarise(real + both, 4, "real + synthetic", curve)], None)
    assert "| 4 | real + synthetic | 6 | 16.5%" in lines and "+1.5 (+1.0 to +2.0)" in lines
    assert "more than 4" in lines and "cover the chance of split, generator, classifier, walker, recording." in lines


def test_the_learning_curve_is_that_of_the_splits_that_have_got_furthest():
    def real(split: int, count: int, level: float) -> bench_usefulness.Run:
        facts = {"arm": "real", "split": split, "classifier": 1, "windows": count}
        return bench_usefulness.Run(facts, np.full((4, 2), level), level, 1.0, None)

    first, second = [real(1, 4, 0.3), real(1, 240, 0.8)], [real(2, 4, 0.5), real(2, 240, 0.6)]
    curve = bench_usefulness.Curve.of([*first, second[0]])
    assert (curve.accuracies, curve.splits) == ({4: 0.3, 240: 0.8}, {1})
    curve = bench_usefulness.Curve.of(first + second)
    assert curve.accuracies == {4: pytest.approx(0.4), 240: pytest.approx(0.7)} and curve.splits == {1, 2}
    assert bench_usefulness.Curve.of([]).accuracies == {}
    assert "Ceiling" not in bench_usefulness.markdown([], None)
    assert "Ceiling: all windows of a recording reach 80.0%." in bench_usefulness.markdown([], 0.8)


def test_what_images_are_worth_is_read_off_the_curve_of_the_same_splits():
    def made(arm: str, split: int, count: int, level: float) -> bench_usefulness.Run:
        facts = {"arm": arm, "split": split, "classifier": 1, "windows": count}
        return bench_usefulness.Run(facts, np.full((4, 2), level), level, 1.0, None)

    both = "real + synthetic"
    runs = [made("real", 1, count, level) for count, level in ((4, 0.5), (8, 0.6), (240, 0.9))]
    runs += [made(both, 1, 4, 0.6), made("real", 2, 4, 0.3), made(both, 2, 4, 0.36)]
    curve = bench_usefulness.Curve.of(runs)
    found = bench_usefulness.summarise(runs, 4, both, curve)
    assert found["accuracy"] == pytest.approx(0.48) and found["difference"]["mean"] == pytest.approx(0.08)
    assert found["accuracy_on_curve"] == 0.6 and found["worth"] == "8"
    assert curve.place([made(both, 2, 4, 0.36)]) == {}


def test_a_recipe_that_was_changed_is_not_taken_for_the_one_before(tmp_path):
    recipe, generator = tmp_path / "warm.yaml", object.__new__(bench_usefulness.Generator)
    recipe.write_text("cond_scale: 1")
    trial = SimpleNamespace(folder=tmp_path)
    for name, value in {"recipe": recipe, "trial": trial, "number": 1}.items():
        object.__setattr__(generator, name, value)
    generator._check_recipe()
    generator._check_recipe()
    recipe.write_text("cond_scale: 2")
    with pytest.raises(SystemExit, match="was made with other settings or weights than"):
        generator._check_recipe()


def test_other_images_and_other_weights_of_the_same_names_are_noticed(trained, tmp_path):
    folder = shutil.copytree(trained / "data", tmp_path / "others")
    before = bench_usefulness.digest_of_images(folder)
    first = next(folder.rglob("*.jpg"))
    first.write_bytes(first.read_bytes() + b"x")
    assert bench_usefulness.digest_of_images(folder) != before
    base = shutil.copytree(trained / "results", tmp_path / "base")
    recipe = tmp_path / "frozen.yaml"
    recipe.write_text(f"init_from: {base}\nfreeze_network: true\n")
    trial: Any = SimpleNamespace(folder=tmp_path)
    generator = bench_usefulness.Generator(trial, 1, recipe)
    generator._check_recipe()
    generator._check_recipe()
    assert pipeline.train(trained, results_folder=base, train_num_steps=pipeline.STEPS + 1) == 0
    with pytest.raises(SystemExit, match="other settings or weights"):
        generator._check_recipe()
    shutil.rmtree(base)
    generator._check_recipe()  # the weights are in the runs that began with them
    base.mkdir()
    with pytest.raises(SystemExit, match=r"error: --init_from .* is neither a checkpoint nor a folder of a run"):
        generator._check_recipe()


def test_what_the_laboratory_cannot_do_is_told(capsys, tmp_path):
    (tmp_path / "default.yaml").touch()
    for words, message in (
        (["--small", "--windows", "2"], "--windows are from 3"),
        (["--small", "--windows", "13"], "to 12"),
        (["--small", "--splits", "0"], "at least 1"),
        ([], "give --folder"),
        (["--small", "--recipe", str(tmp_path / "none.yaml")], "is no file"),
        (["--small", "--recipe", str(tmp_path / "default.yaml")], "the name of the recipe without one"),
    ):
        with pytest.raises(SystemExit):
            bench_usefulness.read_arguments(words)
        assert message in capsys.readouterr().err
