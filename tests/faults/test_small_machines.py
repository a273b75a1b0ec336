"""Small machines: every script under limits on memory, threads and files ends rightly or in one line, and goes on."""

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pipeline
import pytest
import tiny

from gait_latents.common.layout import REPORT_NAME

ROOT = Path(__file__).resolve().parents[2]
OTHER_USER = 54_321  # ulimit -u does not bind root
KINDS = {
    "ulimit -v": resource.RLIMIT_AS,
    "ulimit -d": resource.RLIMIT_DATA,
    "ulimit -n": resource.RLIMIT_NOFILE,
    "ulimit -s": resource.RLIMIT_STACK,
    "ulimit -u": resource.RLIMIT_NPROC,
}
# Each limit at several places, from before torch is there to the midst of the work; each script under two of them.
CASES = [
    ("encode", "ulimit -v", 3.0e9),
    ("encode", "ulimit -n", 8),
    ("encode", "ulimit -u", 3),
    ("verify", "ulimit -d", 0.7e9),
    ("verify", "ulimit -n", 6),
    ("prune", "ulimit -v", 0.5e9),
    ("prune", "ulimit -u", 1),
    ("train", "ulimit -v", 3.5e9),
    ("train", "ulimit -d", 0.5e9),
    ("train", "ulimit -s", 256e3),
    ("generate", "ulimit -v", 3.3e9),
    ("generate", "ulimit -u", 4),
    ("evaluate", "ulimit -d", 0.8e9),
    ("export", "ulimit -n", 5),
    ("train_vae", "ulimit -v", 3.6e9),
    ("train_vae", "ulimit -n", 10),
]


def world_flags(world: Path) -> dict[str, list[str]]:
    """Returns the command of each script, after the name of Python."""
    cache, results = ["--output_folder", str(world / "latents_cache")], str(world / "results")
    steps: dict = {"train_num_steps": 4, "save_and_sample_every": 2, "log_every": 1, "dim_mults": [1]}
    demo: dict = {"data_path": world / "data", "output_folder": world / "my_vae", "image_size": 16, "device": "cpu"}
    demo |= {"multipliers": [1, 1], "train_num_steps": 4, "save_and_sample_every": 2}
    made: dict = {"checkpoint": results, "output_folder": world / "made", "images_per_class": 2, "device": "cpu"}
    looked: dict = {"checkpoint": results, "synthetic_path": world / "synthetic", "device": "cpu"}
    return {
        "encode": ["preprocess_latents.py", *tiny.preprocess_flags(world, image_size=16)],
        "verify": ["preprocess_latents.py", "--verify", *tiny.preprocess_flags(world, image_size=16)],
        "prune": ["preprocess_latents.py", "--prune", *cache, "--data_path", str(world / "data")],
        "train": ["train_latent_cfg.py", *tiny.train_flags(world, image_size=16, **steps)],
        "generate": ["generate.py", *tiny.flags(made | {"sampling_timesteps": 1})],
        "evaluate": ["evaluate_images.py", *tiny.flags(looked | {"output_folder": world / "evaluation"})],
        "export": ["-m", "gait_latents.export", "--checkpoint", results, "--output_folder", str(world / "exported")],
        "train_vae": ["demo/train_vae.py", *tiny.flags(demo)],
    }


def _figures(world: Path) -> object:
    report = json.loads((world / "evaluation" / REPORT_NAME).read_text())
    return report["latents"], report["memorisation"]


def _bytes_below(name: str) -> Callable[[Path], object]:
    def read(world: Path) -> object:
        found = {str(path.relative_to(world)): path.read_bytes() for path in sorted((world / name).rglob("*.*"))}
        return {place: data for place, data in found.items() if not place.endswith((".json", ".png"))}

    return read


# What a script removes beforehand, and what must be the same in the end.
OUTCOMES: dict[str, tuple[tuple[str, ...], Callable[[Path], object]]] = {
    "encode": (("latents_cache",), lambda world: pipeline.stored_moments(world / "latents_cache")),
    "verify": ((), lambda world: pipeline.stored_moments(world / "latents_cache")),
    "prune": ((), lambda world: pipeline.stored_moments(world / "latents_cache")),
    "train": (
        ("latents_cache", "results"),
        lambda world: (pipeline.state_digests(world / "results"), pipeline.losses(world / "results")),
    ),
    "generate": ((), _bytes_below("made")),
    "evaluate": ((), _figures),
    "export": ((), _bytes_below("exported")),
    "train_vae": ((), lambda world: (world / "my_vae" / "vae.safetensors").read_bytes()),
}


def start(world: Path, name: str, kind: int | None = None, value: int = 0) -> subprocess.CompletedProcess[str]:
    """Runs a script, with one limit set."""
    words = world_flags(world)[name]
    place = words if words[0] == "-m" else [str(ROOT / words[0]), *words[1:]]
    prefix: list[str] = []
    if kind == resource.RLIMIT_NPROC:
        who = [f"--reuid={OTHER_USER}", f"--regid={OTHER_USER}", "--clear-groups"]
        prefix = ["setpriv", *who, "--inh-caps=+dac_override", "--ambient-caps=+dac_override"]
    return subprocess.run(
        [*prefix, sys.executable, *place],
        preexec_fn=None if kind is None else lambda: resource.setrlimit(kind, (value, value)),
        cwd=world,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        errors="replace",
        timeout=600,
    )


def is_sound(done: subprocess.CompletedProcess[str]) -> bool:
    """Says whether a script has done its work, or has said in one line why not."""
    lines = [line for line in done.stderr.splitlines() if not line.startswith("warning: ") and " after " not in line]
    if done.returncode == 0:
        return "Traceback" not in done.stderr
    return done.returncode in (1, 2) and len(lines) == 1 and lines[0].startswith("error: ")


@pytest.fixture(scope="module")
def made(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A world in which every script has something to work on."""
    world = shutil.copytree(trained, tmp_path_factory.mktemp("made") / "world")
    assert pipeline.generate(world, sampling_timesteps=1, images_per_class=5) == 0
    return world


def prepared(made: Path, world: Path, name: str) -> Path:
    """Copies the world to where a script finds all but its own results."""
    shutil.rmtree(world, ignore_errors=True)
    shutil.copytree(made, world)
    for folder in OUTCOMES[name][0]:
        shutil.rmtree(world / folder)
    return world


@pytest.mark.slow
@pytest.mark.parametrize(("name", "limit", "value"), CASES)
def test_a_script_under_a_limit_ends_rightly_or_in_one_line_and_goes_on(name, limit, value, made, tmp_path, account):
    kind, outcome = KINDS[limit], OUTCOMES[name][1]
    if kind == resource.RLIMIT_NPROC and (os.geteuid() != 0 or shutil.which("setpriv") is None):
        pytest.skip("ulimit -u binds neither root nor a user who has other programs")
    world = prepared(made, tmp_path / "world", name)
    assert start(world, name).returncode == 0
    expected = outcome(world)
    prepared(made, world, name)
    done = start(world, name, kind, int(value))
    again = start(world, name)
    wrong, lost = int(not is_sound(done)), int(again.returncode != 0 or outcome(world) != expected)
    if wrong:
        print(f"it ended with {done.returncode}: {done.stderr[-1000:]}")
    if lost:
        print(f"it did not go on: {again.stderr[-1000:]}")
    account.add("a machine that is too small", limit, cases=1, lost=lost, wrong=wrong)
