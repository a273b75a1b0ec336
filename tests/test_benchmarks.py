import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def bench(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "benchmarks/bench_train.py", "--small", "--threads", "1", "--steps", "1", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


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


def test_a_variant_that_fails_ends_the_benchmark():
    done = bench("--rounds", "1", "--only", "no such variant")
    assert done.returncode == 1 and "the variant 'no such variant' ended with an error" in done.stderr
