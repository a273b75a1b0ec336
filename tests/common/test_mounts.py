"""Inputs of Kaggle: the same path is found in each layout, what is not there is told by what is, and runs go on."""

import os
import shutil
from pathlib import Path

import pipeline
import pytest
import tiny
from pipeline import preprocess, train

import evaluate_images
import generate as generate_script
import preprocess_latents
from gait_latents import LatentDataset, load_vae, open_cache
from gait_latents.common import cli, mounts
from gait_latents.settings import PreprocessSettings, TrainSettings

LAYOUTS = ("gait", "d/ann/gait", "datasets/ann/gait", "notebooks/ann/gait", "models/ann/gait", "competitions/gait")


@pytest.fixture
def inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that stands in place of /kaggle/input, with nothing in it."""
    root = tmp_path / "input"
    root.mkdir()
    monkeypatch.setenv(mounts.ROOT_VARIABLE, str(root))
    return root


def attach(inputs: Path, *names: str, holding: str = "Normal_line") -> None:
    for name in names:
        (inputs / name / holding).mkdir(parents=True)


# --- where a path is ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("there", LAYOUTS)
@pytest.mark.parametrize("asked", LAYOUTS)
def test_a_path_of_one_layout_is_found_in_every_other(inputs, asked, there):
    attach(inputs, there, "datasets/bob/other", "unlike")
    found = str(inputs / there / "Normal_line")
    assert mounts.locate(f"/kaggle/input/{asked}/Normal_line") == found
    assert mounts.locate(str(inputs / asked / "Normal_line")) == found


@pytest.mark.parametrize("asked", ["gait", "datasets/ann/gait"])
@pytest.mark.parametrize("rest", ["", "/", "/Normal_line/", "//Normal_line", "/./Normal_line/../Normal_line"])
def test_a_path_is_found_however_it_is_written(inputs, asked, rest):
    attach(inputs, "notebooks/ann/gait")
    name = "Normal_line" if "Normal" in rest else ""
    assert mounts.locate(f"/kaggle/input/{asked}{rest}") == str(inputs / "notebooks/ann/gait" / name)


def test_a_path_from_the_working_folder_on_is_found(inputs, tmp_path, monkeypatch):
    """As ../input/gait, which many notebooks write."""
    attach(inputs, "datasets/ann/gait")
    (tmp_path / "working").mkdir()
    monkeypatch.chdir(tmp_path / "working")
    assert mounts.locate("../input/gait/Normal_line") == str(inputs / "datasets/ann/gait/Normal_line")


def test_what_is_there_stays_as_it_is_written(inputs, tmp_path, monkeypatch):
    attach(inputs, "gait", "datasets/ann/gait")
    monkeypatch.chdir(tmp_path)
    for path in ("input/gait/Normal_line", str(inputs / "gait" / "Normal_line"), "input/gait/"):
        assert mounts.locate(path) == path
    assert mounts.locate("/kaggle/input/gait/Normal_line") == str(inputs / "gait/Normal_line")


@pytest.mark.parametrize("path", ["data", "/data/gait/Normal_line", "ann/gait", "../gait", "/kaggle/inputs/gait", "."])
def test_what_is_no_input_is_left_alone(inputs, path):
    attach(inputs, "datasets/ann/gait", "datasets/kaggle/gait")
    assert mounts.locate(path) == path and mounts.why_missing("checkpoint", path) is None


def test_a_name_on_the_hub_is_left_alone_among_the_inputs(inputs, monkeypatch):
    attach(inputs, "gait")
    monkeypatch.chdir(inputs / "gait")
    assert mounts.locate("ann/vae") == "ann/vae"


def test_the_rest_of_the_path_must_be_there(inputs):
    attach(inputs, "datasets/ann/gait", holding="Other")
    attach(inputs, "notebooks/bob/gait")
    assert mounts.locate("/kaggle/input/gait/Normal_line") == str(inputs / "notebooks/bob/gait/Normal_line")


def test_a_path_that_names_an_owner_is_not_found_below_another(inputs):
    attach(inputs, "datasets/bob/gait")
    asked = str(inputs / "datasets/ann/gait/Normal_line")
    assert mounts.locate(asked) == asked
    assert mounts.why_missing("data_path", asked) == f"the inputs attached are {inputs}/datasets/bob/gait"


def test_an_input_called_like_a_kind_of_inputs_is_found(inputs):
    attach(inputs, "datasets/ann/models")
    assert mounts.locate("/kaggle/input/models/Normal_line") == str(inputs / "datasets/ann/models/Normal_line")


def test_one_place_under_two_names_is_one(inputs):
    attach(inputs, "datasets/ann/gait")
    (inputs / "d").mkdir()
    (inputs / "d" / "ann").symlink_to(inputs / "datasets" / "ann")
    found = mounts.locate("/kaggle/input/gait/Normal_line")
    assert found.endswith("ann/gait/Normal_line") and Path(found).is_dir()


def test_of_several_places_none_is_taken(inputs):
    attach(inputs, "datasets/ann/gait", "datasets/bob/gait")
    asked = str(inputs / "gait/Normal_line")
    assert mounts.locate("/kaggle/input/gait/Normal_line") == asked
    places = [f"--data_path {inputs}/datasets/{owner}/gait/Normal_line" for owner in ("ann", "bob")]
    assert mounts.why_missing("data_path", asked) == f"it is in 2 inputs: give {' or '.join(places)}"


# --- what is said of a path that is nowhere ----------------------------------------------------------------


def test_the_folders_of_an_input_are_told_where_its_name_is_right(inputs):
    attach(inputs, "datasets/ann/gait", holding="walks/Normal line")
    places = {"Normal_line": " has walks", "x/walks": " has walks", "walks/Normal_line/x": "/walks has Normal line"}
    for asked, end in places.items():
        told = mounts.why_missing("data_path", f"/kaggle/input/gait/{asked}")
        assert told == f"{inputs}/datasets/ann/gait{end}"


def test_a_dozen_of_many_inputs_are_told(inputs):
    attach(inputs, *(f"datasets/ann/set-{number:02d}" for number in range(10)), *(f"old-{n}" for n in range(5)))
    told = mounts.why_missing("data_path", "/kaggle/input/gait")
    assert told is not None and told.startswith(f"the inputs attached are {inputs}/datasets/ann/set-00, ")
    assert told.count(str(inputs)) == 12 and told.endswith(" and 3 more") and "/datasets," not in told


def test_a_bare_name_of_images_that_is_nowhere_is_told_with_what_is_attached(inputs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert mounts.why_missing("data_path", "Normal_line") is None  # this machine has no inputs
    attach(inputs, "gait")
    assert mounts.why_missing("data_path", "Normal_line") == f"the inputs attached are {inputs}/gait"
    assert mounts.why_missing("checkpoint", "results") is None
    (tmp_path / "Normal_line").mkdir()
    assert mounts.why_missing("data_path", "Normal_line") is None


def test_that_nothing_is_attached_is_told(inputs):
    assert mounts.why_missing("data_path", "/kaggle/input/gait") == f"nothing is attached below {inputs}"


def test_a_machine_without_inputs_is_told_nothing_of_them(inputs):
    inputs.rmdir()
    assert mounts.why_missing("data_path", "/kaggle/input/gait") is None


def test_what_is_there_is_not_missing(inputs):
    attach(inputs, "gait")
    assert mounts.why_missing("data_path", "/kaggle/input/gait") is None


def test_the_folder_of_the_inputs_is_that_of_kaggle(monkeypatch):
    monkeypatch.delenv(mounts.ROOT_VARIABLE)
    assert str(mounts.root()) == "/kaggle/input"


# --- settings ----------------------------------------------------------------------------------------------


def test_each_path_of_each_script_is_looked_for(inputs):
    """Those that a file of settings, a run or a manifest gives, too: all come together in one place."""
    attach(inputs, "datasets/ann/gait", holding="x")
    found, count = str(inputs / "datasets/ann/gait/x"), 0
    for cls in {*cli.CATALOGUE.scripts.values()}:
        for name, spec in cli.specs(cls).items():
            asked = ("/kaggle/input/gait/x",) if spec.many else "/kaggle/input/gait/x"
            resolved = cli.resolve(cls, [cli.Layer("a test", {name: asked})])
            here = getattr(resolved.settings, name)
            if spec.path:
                assert here == ((found,) if spec.many else found)
                count += 1
            assert resolved.places() == [f"--{name}: /kaggle/input/gait/x is at {found}"] * spec.path
    assert count > 15


def test_the_default_paths_are_told_and_are_no_changes(inputs):
    attach(inputs, "datasets/ann/organized-gait-dataset")
    resolved = cli.resolve(PreprocessSettings, [])
    found = str(inputs / "datasets/ann/organized-gait-dataset/Normal_line")
    assert resolved.settings.data_path == found and resolved.changes() == []
    assert resolved.places()[-1] == f"--data_path: /kaggle/input/organized-gait-dataset/Normal_line is at {found}"


def test_a_file_of_settings_is_looked_for(inputs, capsys):
    attach(inputs, "datasets/ann/mine")
    (inputs / "datasets/ann/mine/my.yaml").write_text("dim: 8\n")
    layers = cli.Layers(TrainSettings, ["--config", "/kaggle/input/mine/my.yaml"], description=None)
    assert layers.resolve().settings.dim == 8
    place = inputs / "datasets/ann/mine/my.yaml"
    assert f"--config: /kaggle/input/mine/my.yaml is at {place}\n" in capsys.readouterr().out
    with pytest.raises(cli.UserError, match=r"--config .*/yours\.yaml cannot be read: .*/mine has Normal_line, my"):
        cli.read_file(TrainSettings, "/kaggle/input/mine/yours.yaml")


# --- scripts -----------------------------------------------------------------------------------------------


def said(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    return captured.out + captured.err


def test_the_scripts_work_with_their_default_paths_on_kaggle(inputs, world, monkeypatch, capsys):
    data, vae = inputs / "datasets/ann/organized-gait-dataset/Normal_line", inputs / "models/bob/kl-vae-best-pt"
    shutil.copytree(world / "data", data)
    vae.mkdir(parents=True)
    shutil.copy(world / "vae.pt", vae / "kl_vae_best.pt")
    monkeypatch.chdir(world)
    own = {"data_path": None, "vae_path": None}
    assert preprocess(world, **own) == 0
    told = said(capsys).splitlines()
    assert f"--vae_path: /kaggle/input/kl-vae-best-pt/kl_vae_best.pt is at {vae}/kl_vae_best.pt" in told
    assert f"--data_path: /kaggle/input/organized-gait-dataset/Normal_line is at {data}" in told
    assert train(world, **own, train_num_steps=1) == 0
    assert "15 images asked, 15 cached, 0 to encode" in said(capsys)


def test_a_run_goes_on_when_its_inputs_are_in_another_layout(inputs, world, trained, capsys):
    """What was stored names the layout of that session: images, VAE, cache, and the run itself."""
    for name, file in (("images", "data"), ("vae", "vae.pt")):
        place = inputs / name / file
        (shutil.copytree if file == "data" else shutil.copy)(
            world / file, place if file == "data" else attach_one(place)
        )
    flags = {"data_path": inputs / "images/data", "vae_path": inputs / "vae/vae.pt", "num_samples": 1}
    assert train(world, **flags, train_num_steps=4) == 0
    (inputs / "notebooks/ann").mkdir(parents=True)
    (inputs / "datasets/bob").mkdir(parents=True)
    for name in ("images", "vae"):
        (inputs / name).rename(inputs / "datasets/bob" / name)
    (world / "results").rename(attach_one(inputs / "notebooks/ann/run/results"))
    (world / "latents_cache").rename(inputs / "notebooks/ann/run/latents_cache")
    capsys.readouterr()
    old = {"data_path": None, "vae_path": None, "latents_cache_folder": "/kaggle/input/run/latents_cache"}
    assert train(world, **old, resume_from="/kaggle/input/run/results", train_num_steps=8) == 0
    told = said(capsys)
    assert f"--data_path: {inputs}/images/data is at {inputs}/datasets/bob/images/data\n" in told
    assert f"--resume_from: /kaggle/input/run/results is at {inputs}/notebooks/ann/run/results\n" in told
    assert "15 images asked, 15 cached, 0 to encode" in told and "done: 8 steps" in told


def test_a_cache_goes_on_with_the_constants_of_its_vae_when_that_is_in_another_layout(inputs, world, capsys):
    shutil.copytree(world, inputs / "gait")
    flags = ["--vae_path", "/kaggle/input/gait/vae.pt", "--data_path", "/kaggle/input/gait/data", "--image_size", "16"]
    flags += ["--images_per_user", "5", "--output_folder", str(world / "of_input"), "--device", "cpu"]
    assert preprocess_latents.main([*flags, "--scale_factor", "0.5"]) == 0
    (inputs / "datasets/ann").mkdir(parents=True)
    (inputs / "gait").rename(inputs / "datasets/ann/gait")
    capsys.readouterr()
    assert preprocess_latents.main(flags) == 0
    text = said(capsys)
    assert "scale_factor 0.5" in text and "other than when" not in text and "15 cached, 0 to encode" in text


def attach_one(place: Path) -> Path:
    place.parent.mkdir(parents=True, exist_ok=True)
    return place


def test_generating_and_evaluating_find_a_run_and_its_inputs(inputs, trained, tmp_path, monkeypatch, capsys):
    place = inputs / "notebooks/ann/run/results"
    shutil.copytree(trained / "results", attach_one(place))
    monkeypatch.chdir(tmp_path)
    words = tiny.flags({"checkpoint": "/kaggle/input/run/results", "device": "cpu"})
    assert generate_script.main([*words, "--images_per_class", "2", "--sampling_timesteps", "1"]) == 0
    assert f"--checkpoint: /kaggle/input/run/results is at {place}\n" in said(capsys)
    shutil.move("synthetic", attach_one(inputs / "datasets/bob/made/synthetic"))
    words += ["--synthetic_path", "/kaggle/input/made/synthetic", "--classifier", "false"]
    assert evaluate_images.main(words) == 0
    assert f"--synthetic_path: /kaggle/input/made/synthetic is at {inputs}/datasets/bob/made" in said(capsys)


def test_a_cache_is_found_to_be_checked_and_from_python(inputs, trained, capsys):
    shutil.copytree(trained / "latents_cache", attach_one(inputs / "notebooks/ann/run/latents_cache"))
    shutil.copy(trained / "vae.pt", attach_one(inputs / "models/ann/vae/vae.pt"))
    path = "/kaggle/input/run/latents_cache"
    assert preprocess_latents.main(["--verify", "--output_folder", path, "--device", "cpu"]) == 0
    assert "15 asked for, 15 cached" in said(capsys)
    assert len(LatentDataset.open(path)) == len(open_cache(path)) == 15
    assert load_vae("/kaggle/input/vae/vae.pt", "cpu").latent_channels == 4


MISSING = {
    "data_path": lambda world: preprocess(world, data_path="/kaggle/input/run/data"),
    "vae_path": lambda world: preprocess(world, vae_path="/kaggle/input/run/vae.pt"),
    "resume_from": lambda world: train(world, resume_from="/kaggle/input/run/results"),
    "latents_cache_folder": lambda world: train(world, latents_cache_folder="/kaggle/input/run/latents_cache"),
    "checkpoint": lambda world: pipeline.generate(world, checkpoint="/kaggle/input/run/results"),
    "output_folder": lambda world: preprocess(world, output_folder="/kaggle/input/run/cache", verify=True),
    "keep_for": lambda world: preprocess(world, keep_for="/kaggle/input/run/results", prune=True),
}


@pytest.mark.parametrize("name", MISSING)
def test_a_path_that_is_nowhere_is_told_with_what_is_attached(inputs, cached, capsys, name):
    attach(inputs, "datasets/ann/gait", "old")
    assert MISSING[name](cached) == 2
    (line,) = (line for line in said(capsys).splitlines() if line.startswith("error: "))
    assert f"{inputs}/run/" in line and line.endswith(
        f"the inputs attached are {inputs}/datasets/ann/gait, {inputs}/old"
    )


def test_images_in_two_inputs_are_told_with_the_flags_to_choose_by(inputs, world, capsys):
    for owner in ("ann", "bob"):
        shutil.copytree(world / "data", inputs / "datasets" / owner / "gait")
    assert preprocess(world, data_path="/kaggle/input/gait") == 2
    flags = " or ".join(f"--data_path {inputs}/datasets/{owner}/gait" for owner in ("ann", "bob"))
    assert f"/gait does not exist; it is in 2 inputs: give {flags}\n" in said(capsys)
    assert not os.path.lexists(world / "latents_cache")
