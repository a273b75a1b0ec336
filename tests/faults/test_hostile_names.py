"""Hostile names of classes and images, through the real scripts: no character that a terminal obeys comes out."""

import html
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import tiny_vae
from fault_account import Account
from PIL import Image
from pipeline import train_flags

ROOT = Path(__file__).parents[2]
HARMFUL = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ufff9-\ufffb"
    "\U000e0000-\U000e007f\ud800-\udfff]"
)
NAMES = (
    "\x1b[2J\x1b]0;x\x07",
    "\u202egpj.\u2066x",
    "two\nlines\x85",
    os.fsdecode(b"bytes_\xff"),
    "\ufeff\u200bID\U000e0041",
    "-rf",
    "café",
)


def run(script: str, *words: str) -> tuple[int, str]:
    """Runs a script in a process of its own; returns its exit code and all that it printed."""
    env = {**os.environ, "PYTHONUTF8": "1", "COLUMNS": "200"}
    done = subprocess.run([sys.executable, str(ROOT / script), *words], capture_output=True, env=env, check=False)
    return done.returncode, (done.stdout + done.stderr).decode("utf-8", "surrogateescape")


def hostile_world(root: Path) -> Path:
    """Makes classes and images of hostile names, a few of them bad, and a VAE."""
    tiny.make_images(root / "data", dict.fromkeys(NAMES, 3), size=16)
    for name in NAMES[:-1]:
        (root / "data" / name / "walk_0.jpg").rename(root / "data" / name / f"walk{name}0.jpg")
        (root / "data" / name / f"bad{name}.jpg").write_bytes(b"")
    os.mkfifo(root / "data" / NAMES[0] / f"pipe{NAMES[1]}.jpg")
    shutil.copy(root / "data" / NAMES[0] / "walk_1.jpg", root / "data" / NAMES[1] / "walk_2.jpg")
    tiny_vae.save_tiny_vae(root / "vae.pt")
    return root


def commands(root: Path) -> list[tuple[str, list[str], int]]:
    """Returns script, words and expected exit code of the work of a whole project, and of mistakes in it."""
    few = {"images_per_user": 2, "image_size": 16}
    preprocess = tiny.preprocess_flags(root, splits=["train", "test"], **few)
    train = train_flags(root, train_num_steps=2, save_and_sample_every=2, **few)
    generate = tiny.flags({"checkpoint": root / "results", "output_folder": root / "synthetic", "device": "cpu"})
    evaluate = tiny.flags({"checkpoint": root / "results", "synthetic_path": root / "synthetic", "device": "cpu"})
    skip = ["--skip_bad_images", "true"]
    return [
        ("preprocess_latents.py", [*preprocess, f"--{NAMES[0]}", "1"], 2),
        ("preprocess_latents.py", [*preprocess, "--data_path", str(root / NAMES[0])], 2),
        ("preprocess_latents.py", [*preprocess, "--config", str(root / NAMES[1])], 2),
        ("preprocess_latents.py", [*preprocess, "--class_names", f"{NAMES[0][:-1]}?x", NAMES[1]], 2),
        ("preprocess_latents.py", preprocess, 1),
        ("preprocess_latents.py", [*preprocess, *skip], 0),
        ("preprocess_latents.py", [*preprocess, *skip, "--verify", "--vae_path", str(root / "vae.pt")], 0),
        ("train_latent_cfg.py", [*train, *skip, "--class_names", *NAMES], 0),
        ("train_latent_cfg.py", [*train, "--dim", NAMES[0]], 2),
        ("generate.py", [*generate, "--images_per_class", "1"], 0),
        ("generate.py", [*generate, "--classes", f"{NAMES[1]}y"], 2),
        ("generate.py", [*generate, f"--images_per_class={NAMES[0]}=1", f"{NAMES[0]}=2"], 2),
        ("generate.py", [*generate, "--strip", "1", "--output_folder", str(root / "strip")], 0),
        ("evaluate_images.py", [*evaluate, "--output_folder", str(root / "evaluation")], 0),
    ]


def check(root: Path, some: list[tuple[str, list[str], int]], account: Account) -> list[str]:
    """Runs commands; returns what each printed."""
    said = []
    for script, words, code in some:
        found, text = run(script, *words)
        assert found == code, (script, text)
        assert "Traceback" not in text
        assert HARMFUL.findall(text.replace("\r\n", "\n")) == [], (script, ascii(text))
        said.append(text)
    account.add("hostile names", "the real scripts, all that they print", cases=len(some), wrong=0)
    return said


def test_a_hostile_name_in_a_mistake_and_in_a_list_of_bad_images_is_escaped(tmp_path: Path, account: Account) -> None:
    root = hostile_world(tmp_path)
    (said,) = check(root, [commands(root)[4]], account)
    assert r"'\x1b[2J\x1b]0;x\x07/bad\x1b[2J\x1b]0;x\x07.jpg': the file is empty" in said
    assert r"1 named pipe ('\x1b[2J\x1b]0;x\x07/pipe\u202egpj.\u2066x.jpg')" in said
    assert r"'bytes_\udcff/badbytes_\udcff.jpg': the file is empty" in said


@pytest.mark.slow
def test_no_script_prints_or_writes_for_people_what_a_terminal_or_a_browser_would_obey(
    tmp_path: Path, account: Account
) -> None:
    root = hostile_world(tmp_path)
    check(root, commands(root), account)
    page = (root / "evaluation" / "report.html").read_text(encoding="utf-8")
    isolated = re.sub("\u2068[^\u2068\u2069]*\u2069", lambda found: found[0][1:-1], html.unescape(page))
    assert HARMFUL.findall(isolated) == [] and r"\u202egpj.\u2066x" in page and "café" in page
    written = (root / "results" / "settings.yaml").read_bytes().decode("utf-8")
    assert HARMFUL.findall(written) == [] and "\\e[2J" in written
    for picture in ("latents_cache/preview.png", "synthetic/overview.png", "strip/strip.png"):
        with Image.open(root / picture) as image:
            image.load()
    code, text = run(
        "train_latent_cfg.py",
        *["--config", str(root / "results" / "settings.yaml"), "--results_folder", str(root / "again")],
        *["--train_num_steps", "1", "--num_samples", "0"],
    )
    assert code == 0, text  # the settings of a run are a file of settings
