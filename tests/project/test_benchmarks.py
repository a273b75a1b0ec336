import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

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
