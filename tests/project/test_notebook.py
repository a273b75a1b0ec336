"""The Kaggle notebook: run from top to bottom at tiny sizes, over two sessions; and what stands in it."""

import ast
import asyncio
import hashlib
import html
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from gait_latents.common import cli, mounts
from gait_latents.settings import SCRIPTS, GenerateSettings, PreprocessSettings
from gait_latents.vae import weight_files

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

ROOT = Path(__file__).parents[2]
FILE = ROOT / "examples" / "kaggle.ipynb"
TINY = {
    "image_size": 64,
    "dim": 8,
    "dim_mults": [1, 2],
    "attn_heads": 2,
    "attn_dim_head": 8,
    "train_batch_size": 2,
    "gradient_accumulate_every": 1,
    "latent_norm_images": 4,
    "train_num_steps": 3,
    "save_and_sample_every": 1,
    "log_every": 1,
    "num_samples": 2,
    "sampling_timesteps": 2,
    "compile": False,
    "device": "cpu",
}
Notebook = Any


def read() -> Notebook:
    return nbformat.read(FILE, as_version=4)


def with_settings(**settings: object) -> Notebook:
    """Returns the notebook with its settings cell filled in by a user; every setting in it is asked for."""
    notebook = read()
    (cell,) = [cell for cell in notebook.cells if "settings" in cell.metadata.get("tags", [])]
    assert assigned(cell.source) == set(settings)
    cell.source = "\n".join(f"{name} = {value!r}" for name, value in settings.items())
    return notebook


def assigned(source: str) -> set[str]:
    return {node.targets[0].id for node in ast.parse(source).body if isinstance(node, ast.Assign)}  # type: ignore[attr-defined]


def settings_of(root: Path, **changes: object) -> dict[str, object]:
    """Returns the settings of a first session: the paths are those that stand in the notebook."""
    names = settings_cell()
    settings = {
        "CODE": str(root / "code"),
        "WHEELS": None,
        "DATA_PATH": names["DATA_PATH"],
        "VAE_PATH": names["VAE_PATH"],
        "NUM_USERS": 2,
        "IMAGES_PER_USER": 3,
        "IMAGES_PER_CLASS": 2,
        "MAX_HOURS": 1e-6,  # over at the first step
        "RESUME_FROM": None,
        "MORE_SETTINGS": TINY,
    }
    assert not set(changes) - set(settings)
    return settings | changes


def settings_cell() -> dict[str, Any]:
    """Returns what stands in the settings cell."""
    (cell,) = [cell for cell in read().cells if "settings" in cell.metadata.get("tags", [])]
    names: dict[str, Any] = {}
    exec(cell.source, names)
    return names


def execute(notebook: Notebook, folder: Path, interrupt_when: Callable[[], bool] | None = None) -> Notebook:
    """Runs a notebook in a folder, and interrupts it when this becomes true; raises where a cell fails."""
    folder.mkdir(parents=True, exist_ok=True)
    resources = {"metadata": {"path": str(folder)}}
    client = nbclient.NotebookClient(notebook, kernel_name="python3", timeout=600, resources=resources)

    def watch() -> None:
        while not interrupt_when():  # type: ignore[misc]
            time.sleep(0.05)
        asyncio.run(client.km.interrupt_kernel())  # as the button does

    if interrupt_when is not None:
        threading.Thread(target=watch, daemon=True).start()
    return client.execute()


def outputs(notebook: Notebook, cell_id: str) -> list[Any]:
    (cell,) = [cell for cell in notebook.cells if cell.id == cell_id]
    return cell.outputs


def text_of(notebook: Notebook, *cell_ids: str) -> str:
    """Returns what cells printed: these, or all."""
    return "".join(
        output.text
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if output.output_type == "stream" and (not cell_ids or cell.id in cell_ids)
    )


def digests(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the code, and in `input` a tree like Kaggle's: a VAE, and images of two walkers of the demo."""
    root = tmp_path_factory.mktemp("kaggle")
    (root / "code").mkdir()
    for path in [*ROOT.glob("*.py"), ROOT / "requirements.txt"]:
        shutil.copy(path, root / "code")
    shutil.copytree(ROOT / "gait_latents", root / "code" / "gait_latents", ignore=shutil.ignore_patterns("__pycache__"))
    datasets = root / "input" / "datasets"
    for name in ("ID_1", "ID_2"):
        images = datasets / "ann" / "organized-gait-dataset" / "Normal_line" / name
        images.mkdir(parents=True)
        for path in sorted((ROOT / "demo" / "walkers" / name).iterdir())[:5]:
            shutil.copy(path, images)
    (datasets / "bob" / "kl-vae-best-pt").mkdir(parents=True)
    vae = safetensors.torch.load_file(ROOT / "demo" / "demo_vae.safetensors")
    torch.save(vae, datasets / "bob" / "kl-vae-best-pt" / "kl_vae_best.pt")
    return root


@pytest.fixture(autouse=True)
def quiet_kernel(monkeypatch: pytest.MonkeyPatch, root: Path, tmp_path: Path) -> None:
    """Gives the kernel one thread, the tree like Kaggle's, and no kernel of the user's."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv(mounts.ROOT_VARIABLE, str(root / "input"))
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path / "jupyter"))


@pytest.fixture(scope="module")
def first(root: Path) -> Notebook:
    """The notebook after a first session, which had no time to train to the end."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        monkeypatch.setenv(mounts.ROOT_VARIABLE, str(root / "input"))
        return execute(with_settings(**settings_of(root)), root / "first")


# --- two sessions ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_first_session_runs_from_top_to_bottom(root, first):
    assert "the code is in " in text_of(first, "code")
    assert text_of(first, "packages") == "to install: nothing\n"
    said = text_of(first, "preprocess")
    assert "newly encoded   6\n" in said and "disk: about " in said
    assert re.search(r"stopped after --max_hours 1e-06 at step 1; saved", text_of(first, "train"))
    assert "4 images made in synthetic" in text_of(first, "generate")
    assert (root / "first" / "gait-latents" / "evaluation" / "report.html").is_file()
    kinds = Counter(output.output_type for cell in first.cells for output in cell.get("outputs", []))
    assert set(kinds) == {"stream", "display_data"} and kinds["display_data"] == 6


@pytest.mark.slow
def test_the_inputs_are_found_where_kaggle_puts_them_today(root, first):
    images, vae = "ann/organized-gait-dataset/Normal_line", "bob/kl-vae-best-pt/kl_vae_best.pt"
    place = root / "input" / "datasets"
    assert text_of(first, "tools") == f"images: {place}/{images}\nVAE: {place}/{vae}\n"


@pytest.mark.slow
def test_the_report_stands_in_the_notebook(root, first):
    (page,) = [o.data["text/html"] for o in outputs(first, "evaluate") if "text/html" in o.get("data", {})]
    (shown,) = re.findall(r'srcdoc="([^"]*)"', page)
    assert html.unescape(shown) == (root / "first" / "gait-latents" / "evaluation" / "report.html").read_text()
    assert shown.startswith("&lt;!DOCTYPE html&gt;")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cell_id", "paths"),
    [
        ("preprocess", ["latents_cache/preview.png"]),
        ("pictures", ["results/grid-00000001.png", "results/loss.png"]),
        ("generate", ["synthetic/overview.png"]),
        ("evaluate", ["evaluation/closest_pairs.png"]),
    ],
)
def test_pictures_stand_in_the_notebook(first, cell_id, paths):
    pictures = [output for output in outputs(first, cell_id) if output.output_type == "display_data"]
    shown = [picture for picture in pictures if "text/html" not in picture.data]
    assert len(shown) == len(paths)
    assert all("image/jpeg" not in output.data and len(output.data["image/png"]) > 2000 for output in shown)
    assert [line for line in text_of(first, cell_id).splitlines() if line.endswith(".png")][-len(paths) :] == paths


@pytest.mark.slow
def test_the_saved_notebook_is_no_endless_log(first):
    text = text_of(first)
    counts = Counter(line for line in text.splitlines() if line.strip())
    assert "\r" not in text and len(counts) > 20
    assert counts.most_common(1)[0][1] <= 5  # each of the scripts says how it has understood the VAE
    assert len(text.splitlines()) < 120


@pytest.mark.slow
def test_the_archive_holds_what_is_worth_keeping(root, first):
    folder = root / "first" / "gait-latents"
    with zipfile.ZipFile(folder / "gait-latents.zip") as archive:
        assert archive.testzip() is None
        names = archive.namelist()
        labels = archive.read("synthetic/labels.csv")
    assert labels == (folder / "synthetic" / "labels.csv").read_bytes()
    for name in ("settings.yaml", "split.json", "metrics.jsonl", "loss.png", "grid-00000001.png"):
        assert f"results/{name}" in names
    assert [name for name in names if name.endswith(".safetensors") and "results" in name] == [
        "results/state-00000001.safetensors",
        "results/ema-00000001.safetensors",
    ]
    assert "latents_cache/manifest.json" in names and "synthetic/settings.json" in names
    assert "evaluation/report.json" in names and "evaluation/report.html" in names
    assert sum(name.endswith(".jpg") for name in names) == 4
    assert len(names) == len(set(names))
    assert re.search(rf"gait-latents.zip: {len(names)} files, [\d.]+ MB\n$", text_of(first, "pack"))


@pytest.fixture(scope="module")
def second(root: Path, first: Notebook) -> Notebook:
    """The notebook after a second session, which goes on from the archive and has no images."""
    with zipfile.ZipFile(root / "first" / "gait-latents" / "gait-latents.zip") as archive:
        archive.extractall(root / "input" / "datasets" / "ann" / "session-1")
    shutil.copytree(root / "code", root / "second")
    settings = settings_of(
        root, MAX_HOURS=1, RESUME_FROM="/kaggle/input/session-1", CODE="ADDRESS", DATA_PATH="/kaggle/input/not-attached"
    )
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        monkeypatch.setenv(mounts.ROOT_VARIABLE, str(root / "input"))
        return execute(with_settings(**settings), root / "second")


@pytest.mark.slow
def test_the_second_session_goes_on_where_the_first_one_stopped(root, first, second):
    assert text_of(second, "code").startswith("the code is here already")
    said = text_of(second, "train")
    assert "going on from step 1 of " in said and "done: 3 steps" in said
    assert len(outputs(second, "preprocess")) == 2 and "encode" not in text_of(second, "preprocess")
    assert "results/grid-00000003.png\n" in text_of(second, "pictures")
    metrics = (root / "second" / "results" / "metrics.jsonl").read_text()
    assert len(re.findall('"loss"', metrics)) == 3
    assert "(step 3)" in text_of(second, "generate")
    assert text_of(second, "evaluate") == "the images are not attached, so there is nothing to compare with\n"


@pytest.mark.slow
def test_the_output_of_the_session_before_is_left_as_it_was(root, first, second):
    with zipfile.ZipFile(root / "first" / "gait-latents" / "gait-latents.zip") as archive:
        assert digests(root / "input" / "datasets" / "ann" / "session-1") == {
            name: hashlib.sha256(archive.read(name)).hexdigest() for name in archive.namelist()
        }


@pytest.mark.slow
def test_a_session_after_the_last_step_still_has_its_run(root, second):
    notebook = with_settings(**settings_of(root, RESUME_FROM=str(root / "second")))
    last = [cell.id for cell in notebook.cells].index("pictures")
    notebook.cells = notebook.cells[: last + 1]
    execute(notebook, root / "third")
    assert "is finished (3 steps)" in text_of(notebook, "train")
    assert f"{root}/second/results/grid-00000003.png\n" in text_of(notebook, "pictures")


# --- what goes wrong ---------------------------------------------------------------------------------------


def test_a_script_that_fails_stops_the_notebook_and_its_reason_is_shown(root, tmp_path):
    notebook = with_settings(**settings_of(root, MORE_SETTINGS={**TINY, "train_num_stepz": 3}))
    with pytest.raises(nbclient.exceptions.CellExecutionError, match=r"preprocess_latents\.py ended with exit code 2"):
        execute(notebook, tmp_path)
    assert "error: there is no setting train_num_stepz; did you mean train_num_steps?" in text_of(notebook)
    assert all(not cell.outputs for cell in notebook.cells if cell.id in ("train", "generate", "pack"))


def cell_alone(cell_id: str, folder: Path, monkeypatch: pytest.MonkeyPatch, **names: object) -> None:
    """Runs one cell in a folder, with these names that earlier cells have made."""
    (source,) = [cell.source for cell in read().cells if cell.id == cell_id]
    monkeypatch.chdir(folder)
    exec(source, {"Path": Path, "subprocess": subprocess, "sys": sys, **names})


def test_code_that_cannot_be_fetched_is_told_in_one_line(tmp_path, monkeypatch):
    with pytest.raises(RuntimeError, match="git cannot fetch ADDRESS: check CODE in the first cell"):
        cell_alone("code", tmp_path, monkeypatch, CODE="ADDRESS")


def test_a_package_that_cannot_be_installed_is_told_in_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "requirements.txt").write_text("# comment\nno-such-package-of-anybody>=1\ntorch>=2\n")
    names = {"VAE_PATH": "vae.pt", "WHEELS": str(tmp_path)}
    with pytest.raises(RuntimeError, match="pip cannot install these: switch the internet on"):
        cell_alone("packages", tmp_path, monkeypatch, **names)
    assert capsys.readouterr().out == "to install: no-such-package-of-anybody>=1\n"


def test_an_earlier_session_that_is_not_attached_is_told_with_what_is(root, tmp_path, monkeypatch):
    names = {"locate": mounts.locate, "why_missing": mounts.why_missing, "MORE_SETTINGS": {}}
    names |= dict.fromkeys(("DATA_PATH", "VAE_PATH"), "/kaggle/input/x")
    with pytest.raises(RuntimeError, match=r"RESUME_FROM: .*/walks does not exist; the inputs attached are .*/ann/"):
        cell_alone("tools", tmp_path, monkeypatch, RESUME_FROM="/kaggle/input/walks", **names)


def test_files_older_than_an_archive_can_date_are_packed(tmp_path, monkeypatch, capsys):
    for name in ("results/split.json", "synthetic/ID_1/ID_1_000000.jpg"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("of 1970")
        os.utime(tmp_path / name, (0, 0))
    cell_alone("pack", tmp_path, monkeypatch, RESULTS=Path("results"))
    with zipfile.ZipFile(tmp_path / "gait-latents.zip") as archive:
        assert archive.read("results/split.json") == archive.read("synthetic/ID_1/ID_1_000000.jpg") == b"of 1970"
    assert "gait-latents.zip: 2 files, " in capsys.readouterr().out


@pytest.mark.slow
def test_an_interrupted_cell_lets_the_script_save(root, first, tmp_path):
    endless = {**TINY, "train_num_steps": 10**6, "save_and_sample_every": 10**6}
    notebook = with_settings(**settings_of(root, MAX_HOURS=1, MORE_SETTINGS=endless))
    last = [cell.id for cell in notebook.cells].index("train")
    notebook.cells = notebook.cells[: last + 1]
    shutil.copytree(root / "code", tmp_path / "run")
    shutil.copytree(root / "first" / "gait-latents" / "latents_cache", tmp_path / "run" / "latents_cache")
    saved = tmp_path / "run" / "results"
    with pytest.raises(nbclient.exceptions.CellExecutionError, match=r"train_latent_cfg\.py ended with exit code 130"):
        execute(notebook, tmp_path / "run", lambda: any(saved.glob("metrics.jsonl")) and any(saved.glob("state-*")))
    said = re.search(r"stopped by Ctrl-C at step ([\d,]+); saved", text_of(notebook, "train"))
    assert said is not None
    assert (saved / f"state-{int(said[1].replace(',', '')):08d}.safetensors").is_file()


# --- what stands in the file -------------------------------------------------------------------------------


def test_the_file_is_valid_and_clean():
    notebook = nbformat.read(FILE, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    ids = [cell.id for cell in notebook.cells]
    assert len(set(ids)) == len(ids) > 15
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code)


def calls() -> list[tuple[str, set[str]]]:
    """Returns the script and the settings of each call of `run` in the notebook."""
    trees = [ast.parse(cell.source) for cell in read().cells if cell.cell_type == "code"]
    found = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [
        (ast.literal_eval(node.args[0]), {str(keyword.arg) for keyword in node.keywords})
        for node in found
        if isinstance(node.func, ast.Name) and node.func.id == "run"
    ]


def test_the_commands_use_settings_that_exist():
    assert [script for script, _ in calls()] == [
        "preprocess_latents.py",
        "train_latent_cfg.py",
        "generate.py",
        "evaluate_images.py",
    ]
    for script, settings in calls():
        assert settings - {"config"} <= set(cli.specs(SCRIPTS[script]))


def test_diffusers_is_installed_for_no_vae_that_is_one_file():
    """With the internet off that would end the notebook."""
    (source,) = [cell.source for cell in read().cells if cell.id == "packages"]
    (suffixes,) = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Tuple)]
    assert ast.literal_eval(suffixes) == weight_files.SUFFIXES


def test_the_paths_of_the_settings_cell_are_the_defaults():
    names = settings_cell()
    defaults = cli.defaults(PreprocessSettings)
    assert (names["DATA_PATH"], names["VAE_PATH"]) == (defaults["data_path"], defaults["vae_path"])
    assert names["IMAGES_PER_USER"] == defaults["images_per_user"]
    assert cli.defaults(GenerateSettings)["images_per_class"] == names["IMAGES_PER_CLASS"]
    assert (names["CODE"], names["RESUME_FROM"], names["MORE_SETTINGS"]) == ("ADDRESS", None, {})
