"""The settings files in configs/: they are read by every script, and what they are made for works."""

from pathlib import Path

import pipeline
import pytest
import tiny_vae
from recordings import WIDTH, cut, recording, save_windows

from gait_latents.common.cli import CATALOGUE, defaults, read_file, specs
from gait_latents.images import windows
from gait_latents.images.split import Split, read_split

CONFIGS = Path(__file__).parents[2] / "configs"
TINY: dict[str, object] = {"images_per_user": 8, "image_size": 16}
SHORT: dict[str, object] = {"train_num_steps": 2, "save_and_sample_every": 2, "num_samples": 0}
FROM_CACHE = dict.fromkeys(("vae_path", "data_path", "images_per_user", "image_size"))


@pytest.fixture(scope="module")
def _recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("recorded")
    for person in (1, 2):
        images = cut(recording(person, 5 * WIDTH), 0.75, 15, size=(64, 64))
        save_windows(root / "data" / f"ID_{person}", images, f"ID{person}_case1_1_Doppler{{}}.jpg")
    tiny_vae.save_tiny_vae(root / "vae.pt")
    return root


@pytest.fixture
def recorded(_recorded: Path, tmp_path: Path) -> Path:
    """A world whose images are windows of two recordings that overlap by 75%."""
    for name in ("data", "vae.pt"):
        (tmp_path / name).symlink_to(_recorded / name)
    return tmp_path


def stored_split(folder: Path) -> Split:
    split = read_split(folder)
    assert split is not None
    return split


def warnings_in(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_script_reads_a_settings_file_and_it_names_no_path_of_somebodys(path):
    found = {
        name: value for cls in CATALOGUE.scripts.values() for name, value in read_file(cls, str(path)).values.items()
    }
    assert len(found) >= 3 and len(path.read_text().splitlines()) <= 30
    paths = {name for cls in CATALOGUE.scripts.values() for name, spec in specs(cls).items() if spec.path}
    assert path.stem == "demo" or not paths & found.keys()


@pytest.mark.parametrize("name", ["kaggle_t4", "radar_windows"])
def test_a_settings_file_takes_images_all_the_way(recorded, name):
    config = {"config": CONFIGS / f"{name}.yaml"}
    assert pipeline.preprocess(recorded, **config, **TINY) == 0
    assert pipeline.train(recorded, **config, **FROM_CACHE, **SHORT) == 0
    assert pipeline.generate(recorded, **config, images_per_class=1) == 0
    assert len(list((recorded / "synthetic").rglob("*.jpg"))) >= 2


def test_the_settings_for_a_t4_are_shared_evenly_by_one_or_two_of_them():
    found = read_file(CATALOGUE.scripts["train_latent_cfg.py"], str(CONFIGS / "kaggle_t4.yaml")).values
    assert found["train_batch_size"] * found["gradient_accumulate_every"] % 2 == 0
    assert 0 < found["max_hours"] < 12


def test_the_settings_for_radar_windows_are_those_that_an_overlap_of_75_percent_needs():
    cls = CATALOGUE.scripts["train_latent_cfg.py"]
    found = read_file(cls, str(CONFIGS / "radar_windows.yaml")).values
    assert found["split"] == "contiguous" and found["split_gap"] == windows.Windows(0.75).gap
    assert found["time_shift"] == defaults(cls)["time_shift"]


# --- what the scripts say of windows -----------------------------------------------------------------------


def test_preprocessing_and_a_new_training_tell_of_windows_in_one_line_and_one_that_goes_on_does_not_look(
    recorded, capsys, monkeypatch
):
    assert pipeline.preprocess(recorded, **TINY) == 0
    (line,) = warnings_in(capsys)
    assert line.startswith(
        "warning: neighbouring images of a class overlap by about 75%: they look like windows of one"
    )
    assert line.endswith("give --split contiguous --split_gap 3")
    assert pipeline.train(recorded, **FROM_CACHE, **SHORT) == 0
    assert warnings_in(capsys) == [line]
    monkeypatch.setattr(windows, "find_windows", lambda *_, **__: pytest.fail("looked"))
    assert pipeline.train(recorded, **FROM_CACHE, **{**SHORT, "train_num_steps": 3}) == 0
    assert warnings_in(capsys) == []


def test_the_flags_that_the_line_names_silence_it_and_part_the_windows(recorded, capsys):
    assert pipeline.preprocess(recorded, **TINY, split="contiguous", split_gap=3) == 0
    assert pipeline.train(recorded, **FROM_CACHE, **SHORT) == 0
    assert warnings_in(capsys) == []
    split = stored_split(recorded / "results")
    assert [entry.name for entry in split.gap[:3]] == [f"ID1_case1_1_Doppler{i}.jpg" for i in (9, 10, 11)]


def test_looking_for_windows_changes_no_split(recorded, monkeypatch):
    assert pipeline.preprocess(recorded, **TINY) == 0
    monkeypatch.setattr(windows, "find_windows", lambda *_, **__: None)
    assert pipeline.preprocess(recorded, **TINY, output_folder=recorded / "other") == 0
    assert stored_split(recorded / "latents_cache") == stored_split(recorded / "other")
    first, other = (pipeline.stored_moments(recorded / name) for name in ("latents_cache", "other"))
    assert first == other


def test_images_that_are_no_windows_are_told_nothing_of_them(world, capsys):
    assert pipeline.preprocess(world) == 0
    assert warnings_in(capsys) == []
