"""What a script says of its disk: the estimates against the files themselves, and the line against the free space."""

import re
import shutil
from pathlib import Path

import pipeline
import pytest

import generate as generate_script
from gait_latents.common import console, distributed, files, pictures
from gait_latents.diffusion import build
from gait_latents.training import beginning, grids, optimizer_state, plan, run_folder

STATED = re.compile(r"disk: about ([\d.]+) (B|kB|MB|GB) for (.*); .* free on (.*)")
UNITS = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9}


def stated(text: str) -> tuple[float, str, str]:
    """Returns the bytes, what they are for and the folder that the one line about the disk tells."""
    (line,) = [line for line in text.splitlines() if "disk:" in line]
    match = STATED.fullmatch(line)
    assert match is not None, line
    return float(match[1]) * UNITS[match[2]], match[3], match[4]


def used(folder: Path, pattern: str = "*") -> int:
    return sum(path.stat().st_size for path in folder.rglob(pattern) if path.is_file())


# --- the line ----------------------------------------------------------------------------------------------


def test_what_fits_is_said_and_what_does_not_is_a_warning(tmp_path, capsys):
    folder = tmp_path / "not" / "there" / "yet"
    console.tell(2_100_000_000_000_000_000, "75 saves", folder, remedy="save less")
    captured = capsys.readouterr()
    line = r"warning: disk: about 21\d* ?.*GB for 75 saves will not fit on (.*), where [\d.]+ \w+ are free; "
    assert re.fullmatch(line + "make room, or save less\n", captured.err) and captured.out == ""
    console.tell(2000, "75 saves", folder, remedy="save less")
    captured = capsys.readouterr()
    assert stated(captured.out) == (2000, "75 saves", str(folder)) and captured.err == ""
    assert not (tmp_path / "not").exists()


def test_what_just_fits_is_no_warning(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(console, "free_bytes", lambda folder: 1000)
    console.tell(999, "1 save", tmp_path, remedy="")
    assert capsys.readouterr().err == ""
    console.tell(1000, "1 save", tmp_path, remedy="")
    assert "will not fit" in capsys.readouterr().err


def test_nothing_is_said_of_nothing(tmp_path, capsys):
    console.tell(0, "0 images", tmp_path, remedy="")
    assert capsys.readouterr() == ("", "")


def test_a_disk_that_does_not_tell_is_no_obstacle(tmp_path, capsys, monkeypatch):
    def refuse(place: Path) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(shutil, "disk_usage", refuse)
    console.tell(2000, "75 saves", tmp_path, remedy="")
    assert capsys.readouterr().out == (
        f"disk: about 2.0 kB for 75 saves; what is free on {tmp_path} is not known (Function not implemented)\n"
    )


def test_the_free_space_is_that_of_the_file_system_of_the_folder(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    assert console.free_bytes(tmp_path / "a" / "b") == pytest.approx(free, rel=0.05)


# --- the estimates -----------------------------------------------------------------------------------------


def test_each_script_tells_its_disk_once_and_about_right(world, capsys, monkeypatch):
    monkeypatch.setattr(pictures, "BYTES_PER_PIXEL", {".png": 3.0, ".jpg": 3.0})  # tiny files are mostly header
    assert pipeline.preprocess(world) == 0
    cache = used(world / "latents_cache", "*.safetensors")
    num_bytes, what, folder = stated(capsys.readouterr().out)
    assert (what, folder) == ("15 latents", str(world / "latents_cache"))
    assert num_bytes == pytest.approx(cache, rel=0.5)

    assert pipeline.train(world, train_num_steps=10, num_samples=0) == 0  # saves after 4, 8 and 10 steps
    num_bytes, what, folder = stated(capsys.readouterr().out)
    assert (what, folder) == ("3 saves", str(world / "results"))
    full = max(path.stat().st_size for path in (world / "results").glob("state-*"))
    assert num_bytes == pytest.approx(used(world / "results", "*.safetensors") + full, rel=0.1)

    assert pipeline.generate(world) == 0
    num_bytes, what, folder = stated(capsys.readouterr().out)
    assert (num_bytes, what, folder) == (pytest.approx(6 * 16 * 16 * 3, rel=0.02), "6 images", str(world / "synthetic"))

    assert pipeline.preprocess(world) == 0  # nothing left to write
    assert pipeline.generate(world) == 0
    assert "disk:" not in capsys.readouterr().out


def test_training_tells_the_latents_that_it_will_encode(world, capsys, monkeypatch):
    assert pipeline.train(world, train_num_steps=1, num_samples=0) == 0
    found = {what: (num_bytes, folder) for num_bytes, what, folder in map(stated, disk_lines(capsys.readouterr().out))}
    assert found.keys() == {"1 save", "9 latents"}  # the normalisation has looked at six
    num_bytes, folder = found["9 latents"]
    assert num_bytes == pytest.approx(9 * (2 * 8 * 8 * 8 + 64), rel=0.01)
    assert folder == str(world / "latents_cache")
    monkeypatch.setattr(files, "why_not_writable", lambda place: None if "results" in str(place) else "x")
    flags = {"latents_cache_folder": world / "read_only", "results_folder": world / "results_2"}
    assert pipeline.train(world, train_num_steps=1, num_samples=0, **flags) == 0
    (line,) = disk_lines(capsys.readouterr().out)  # what stays in memory takes no disk
    assert stated(line)[1] == "1 save"


def disk_lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if "disk:" in line]


def test_a_run_that_goes_on_counts_what_is_still_to_come(trained, world, capsys):
    for name in ("latents_cache", "results"):
        shutil.copytree(trained / name, world / name)
    before = used(world / "results", "*.safetensors")
    assert pipeline.train(world, train_num_steps=16, num_samples=0) == 0  # 8 are done; saves after 12 and 16
    num_bytes, what, _ = stated(capsys.readouterr().out)
    assert what == "2 saves"
    full = max(path.stat().st_size for path in (world / "results").glob("state-*"))
    grown = used(world / "results", "*.safetensors") - before
    assert num_bytes == pytest.approx(grown + full, rel=0.1)


def test_the_files_of_a_run_have_the_size_that_is_expected(trained):
    state = run_folder.newest_state(trained / "results")
    assert state is not None
    network = build.build_diffusion(state.meta.settings, num_classes=3, latent_shape=state.meta.latent_shape)
    average, full = optimizer_state.expected_bytes(network, network)
    assert average == pytest.approx((trained / "results" / "ema-00000008.safetensors").stat().st_size, rel=0.1)
    assert full == pytest.approx((trained / "results" / "state-00000008.safetensors").stat().st_size, rel=0.1)


def test_a_frozen_network_has_moments_of_its_embeddings_alone(trained, tmp_path, world):
    frozen = {"init_from": trained / "results", "freeze_network": "true", "num_samples": 0}
    assert pipeline.train(world, **frozen) == 0
    state = run_folder.newest_state(world / "results")
    assert state is not None
    network = build.build_diffusion(state.meta.settings, num_classes=3, latent_shape=state.meta.latent_shape)
    beginning.freeze_network(network)
    _, full = optimizer_state.expected_bytes(network, network)
    assert full == pytest.approx(state.path.stat().st_size, rel=0.1)


def test_a_grid_counts_every_picture_in_it(trained):
    grid = grids.GridMaker.__new__(grids.GridMaker)
    settings = plan.make_plan(pipeline.train_flags(trained, num_samples=5), None, distributed.ALONE).settings
    grid.settings, grid.names = settings, ["a", "b"]
    assert grid.expected_bytes() == 2 * 5 * pipeline.SIZE**2 * pictures.BYTES_PER_PIXEL[".png"]


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_a_pixel_takes_about_what_is_expected(suffix):
    folder = Path(generate_script.__file__).parent / "demo" / "walkers"
    shown = [pictures.Image.open(path).convert("RGB") for path in sorted(folder.glob("*/*.jpg"))[::12]]
    sizes = [len(pictures.encode_image(image, suffix)) / (image.width * image.height) for image in shown]
    assert len(sizes) == 20
    assert sum(sizes) / len(sizes) == pytest.approx(pictures.BYTES_PER_PIXEL[suffix], rel=0.3)
