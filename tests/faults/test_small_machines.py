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
LIMITS = {
    "ulimit -v": (resource.RLIMIT_AS, (0.5e9, 2.6e9, 3.0e9, 3.3e9, 3.5e9, 3.6e9, 3.8e9, 4.0e9, 4.5e9)),
    "ulimit -d": (resource.RLIMIT_DATA, (0.1e9, 0.3e9, 0.5e9, 0.7e9, 0.8e9, 1e9)),
    "ulimit -n": (resource.RLIMIT_NOFILE, (5, 6, 7, 8, 10, 16)),
    "ulimit -s": (resource.RLIMIT_STACK, (256e3, 512e3)),
    "ulimit -u": (resource.RLIMIT_NPROC, (1, 2, 3, 4, 6)),
}
FOR_EACH_SCRIPT = 3  # limits of each kind that a script gets in the short form; the long one takes all


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
@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("name", OUTCOMES)
def test_a_script_under_a_limit_ends_rightly_or_in_one_line_and_goes_on(name, limit, made, tmp_path, account, is_long):
    kind, values = LIMITS[limit]
    if kind == resource.RLIMIT_NPROC and (os.geteuid() != 0 or shutil.which("setpriv") is None):
        pytest.skip("ulimit -u binds neither root nor a user who has other programs")
    outcome = OUTCOMES[name][1]
    world = prepared(made, tmp_path / "world", name)
    assert start(world, name).returncode == 0
    expected = outcome(world)
    wrong = lost = 0
    step = 1 if is_long else -(-len(values) // FOR_EACH_SCRIPT)
    tried = values[::step]
    for value in tried:
        prepared(made, world, name)
        done = start(world, name, kind, int(value))
        again = start(world, name)
        if not is_sound(done):
            wrong += 1
            print(f"{limit} {value:g}: {name} ended with {done.returncode}: {done.stderr[-1000:]}")
        is_same = again.returncode == 0 and outcome(world) == expected
        lost += not is_same
        if not is_same:
            print(f"{limit} {value:g}: {name} did not go on: {again.stderr[-1000:]}")
    account.add("a machine that is too small", limit, cases=len(tried), lost=lost, wrong=wrong)
