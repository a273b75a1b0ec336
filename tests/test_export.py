"""export_model.py: what it writes rebuilds the network and its samples in a program that has nothing of ours."""

import json
import subprocess
import sys
from pathlib import Path

import pages
import pipeline
import pytest
import tiny
import torch
from denoising_diffusion_pytorch.classifier_free_guidance import Unet
from pipeline import CLASSES, STEPS
from safetensors.torch import load_file
from torch import Tensor

from gait_latents.common import files
from gait_latents.export import main
from gait_latents.training import checkpoint, run_folder, trained_model

NAMES = {"model.safetensors", "config.json"}


def export(trained: Path, folder: Path, **changes: object) -> int:
    """Runs export_model.py on the finished run."""
    settings = {"checkpoint": trained / "results", "output_folder": folder, "ddim_steps": 5}
    return main(tiny.flags({**settings, **changes}))


def facts_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def documented_program() -> str:
    """Returns the program in docs/python.md that samples from an export."""
    (block,) = [
        block.text for block in pages.blocks("docs/python.md", "python") if "exported/config.json" in block.text
    ]
    return block


def our_samples(
    results: Path, labels: list[int], *, cond_scale: float, steps: int, interval: tuple[float, float] = (0, 1)
) -> Tensor:
    """Samples [B C h w] as the VAE decodes them, by our own sampler, from the noise of the documented program."""
    state = run_folder.read_averages(results)
    diffusion = trained_model.averaged_diffusion(state)
    one = torch.Generator().manual_seed(0)  # its rows, drawn one after the other, are those of a single draw
    samples = diffusion.sample(
        torch.tensor(labels),
        [one] * len(labels),
        cond_scale=cond_scale,
        guidance_interval=interval,
        sampler="ddim",
        sampling_timesteps=steps,
    )
    return state.meta.latent_norm.to_unscaled(samples)


# --- in a program without this repository ------------------------------------------------------------------


def run_elsewhere(program: str, folder: Path) -> subprocess.CompletedProcess:
    """Runs a program in a folder, with the installed packages and without this repository, even if it is installed.

    Isolated (-I), Python looks neither here nor into PYTHONPATH; without `site` (-S), no .pth file leads here.
    """
    packages = [path for path in sys.path if Path(path).name == "site-packages"]
    start = f"import sys; sys.path += {packages!r}\nimport torch; torch.set_num_threads(1)\n"
    return subprocess.run(
        [sys.executable, "-I", "-S", "-c", start + program], cwd=folder, capture_output=True, text=True, timeout=300
    )


@pytest.mark.slow
def test_the_documented_program_gives_our_samples_without_our_modules(trained, tmp_path):
    assert export(trained, tmp_path / "exported", cond_scale=3) == 0
    proof = (
        "try:\n    import diffusion\nexcept ModuleNotFoundError:\n    pass\nelse:\n    raise SystemExit(diffusion)\n"
        "from safetensors.torch import save_file; save_file({'latents': latents}, 'latents.safetensors')\n"
    )
    done = run_elsewhere(documented_program() + proof, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "torch.Size([4, 4, 8, 8])\n"
    found = load_file(tmp_path / "latents.safetensors")["latents"]
    expected = our_samples(trained / "results", [0, 0, 1, 1], cond_scale=3.0, steps=5)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert expected.std() > 100 * 1e-4


@pytest.mark.parametrize("objective", ["pred_noise", "pred_x0"])
def test_the_program_knows_what_else_a_network_may_predict(cached, tmp_path, monkeypatch, objective):
    settings = {"train_num_steps": 1, "num_samples": 0, "objective": objective, "beta_schedule": "linear"}
    assert pipeline.train(cached, **settings) == 0
    assert export(cached, tmp_path / "exported", ddim_steps=4) == 0
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(documented_program(), names)
    expected = our_samples(cached / "results", [0, 0, 1, 1], cond_scale=1.5, steps=4)
    torch.testing.assert_close(names["latents"], expected, rtol=1e-3, atol=1e-3)


# --- the two files -----------------------------------------------------------------------------------------


def test_the_weights_are_the_averaged_ones_under_the_names_of_the_library(trained, tmp_path):
    tensors, meta = checkpoint.load(trained / "results" / run_folder.full_name(STEPS))
    for name in tensors:
        if name.startswith("ema.model."):
            tensors[name] += 1.0  # in so short a run the average is the last state
    checkpoint.save(tmp_path / run_folder.full_name(STEPS), tensors, meta)
    assert export(trained, tmp_path / "exported", checkpoint=tmp_path) == 0
    assert {path.name for path in (tmp_path / "exported").iterdir()} == NAMES
    weights = load_file(tmp_path / "exported" / "model.safetensors")
    unet = Unet(**facts_of(tmp_path / "exported")["unet"])
    assert set(weights) == set(unet.state_dict())
    assert all(torch.equal(weights[name], tensors[f"ema.model.{name}"]) for name in weights)


def test_the_config_says_all_that_a_sampler_must_know(trained, tmp_path):
    assert export(trained, tmp_path / "exported", ddim_steps=5000) == 0
    facts = facts_of(tmp_path / "exported")
    _, meta = checkpoint.load(trained / "results" / run_folder.ema_name(STEPS))
    assert facts["class_names"] == list(CLASSES) and facts["step"] == STEPS
    assert facts["latent_shape"] == [4, 8, 8] and facts["latent_norm"] == meta["latent_norm"]
    assert list(facts["latent_norm"]) == ["scale", "shift"]  # the same bytes as an export of an earlier version
    assert (facts["objective"], facts["timesteps"], facts["beta_schedule"]) == ("pred_v", 1000, "cosine")
    assert facts["vae"]["path"] == str(trained / "vae.pt") and facts["vae"]["scale_factor"] == meta["scale_factor"]
    assert facts["guidance"] == [1.5] * (len(facts["levels"]) - 1) and facts["image_size"] == 16
    assert facts["versions"]["torch"] == torch.__version__ and len(facts["versions"]) == 3
    times, alphas, sigmas = zip(*facts["levels"], strict=True)
    assert list(times) == [*range(times[0], -1, -1), -1]  # no more than there are
    assert all(abs(alpha**2 + sigma**2 - 1) < 1e-6 for alpha, sigma in zip(alphas, sigmas, strict=True))
    assert (alphas[-1], sigmas[-1]) == (1.0, 0.0) and list(alphas) == sorted(alphas)


def test_the_guidance_is_that_of_the_run_unless_another_is_given(world, tmp_path):
    assert pipeline.train(world, train_num_steps=1, num_samples=0, cond_scale=1.5) == 0
    assert export(world, tmp_path / "a") == export(world, tmp_path / "b", cond_scale=4) == 0
    assert [set(facts_of(tmp_path / name)["guidance"]) for name in "ab"] == [{1.5}, {4.0}]


def test_the_program_guides_in_the_interval_of_the_run_or_of_the_flags(cached, tmp_path, monkeypatch):
    assert pipeline.train(cached, train_num_steps=1, num_samples=0, guidance_interval=[0.2, 0.7]) == 0
    assert export(cached, tmp_path / "exported", cond_scale=3) == 0
    assert export(cached, tmp_path / "other", cond_scale=3, guidance_interval=[0, 0.5]) == 0
    assert facts_of(tmp_path / "exported")["guidance"] == [1, 3, 3, 1, 1]
    assert facts_of(tmp_path / "other")["guidance"] == [3, 3, 1, 1, 1]
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(documented_program(), names)
    expected, whole = (
        our_samples(cached / "results", [0, 0, 1, 1], cond_scale=3.0, steps=5, interval=interval)
        for interval in ((0.2, 0.7), (0, 1))
    )
    torch.testing.assert_close(names["latents"], expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(names["latents"], whole, rtol=1e-4, atol=1e-4)


def test_an_export_needs_neither_vae_nor_images_nor_cache(cached, tmp_path):
    assert pipeline.train(cached, train_num_steps=1, num_samples=0) == 0
    results = (cached / "results").rename(tmp_path / "results")
    (cached / "vae.pt").unlink()
    assert main(tiny.flags({"checkpoint": results, "output_folder": tmp_path / "exported"})) == 0
    assert {path.name for path in (tmp_path / "exported").iterdir()} == NAMES


# --- what is refused ---------------------------------------------------------------------------------------


def test_a_run_that_has_saved_nothing_is_told_in_one_line(tmp_path, capsys):
    (tmp_path / "results").mkdir()
    for place in (tmp_path / "results", tmp_path / "gone"):
        assert main(tiny.flags({"checkpoint": place, "output_folder": tmp_path / "exported"})) == 2
        error = pipeline.one_error(capsys)
        assert f"--checkpoint {place} is neither a checkpoint nor a folder of a run that has saved one" in error
    assert not (tmp_path / "exported").exists()


def test_an_export_does_not_become_a_class(trained, capsys):
    assert export(trained, trained / "data" / "exported") == 2
    assert "is among the class folders of --data_path" in pipeline.one_error(capsys)
    assert not (trained / "data" / "exported").exists()


def test_the_same_export_again_is_welcome_and_another_one_replaces_nothing(trained, tmp_path, capsys):
    folder = tmp_path / "exported"
    assert export(trained, folder) == export(trained, folder) == 0
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    earlier = trained / "results" / run_folder.ema_name(STEPS // 2)
    for changes in ({"checkpoint": earlier}, {"cond_scale": 5}):
        capsys.readouterr()
        assert export(trained, folder, **changes) == 2
        assert "is there already and differs; remove it, or give another" in pipeline.one_error(capsys)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_stop_between_the_files_leaves_no_config_and_is_made_good(trained, tmp_path, monkeypatch):
    publish = files.publish

    def full_disk(path: Path, data: bytes) -> None:
        if path.name == "config.json":
            raise OSError(28, "No space left on device", str(path))
        publish(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(files, "publish", full_disk)
        assert export(trained, tmp_path / "exported") == 1
    assert [path.name for path in (tmp_path / "exported").iterdir()] == ["model.safetensors"]
    assert export(trained, tmp_path / "exported") == 0
    assert {path.name for path in (tmp_path / "exported").iterdir()} == NAMES


def test_weights_of_another_network_are_refused(trained, tmp_path, capsys):
    tensors, meta = checkpoint.load(trained / "results" / run_folder.ema_name(STEPS))
    del tensors["ema.model.null_classes_emb"]
    checkpoint.save(tmp_path / run_folder.ema_name(STEPS), tensors, meta)
    assert export(trained, tmp_path / "exported", checkpoint=tmp_path) == 2
    assert "holds other weights than those of its network" in pipeline.one_error(capsys)


def test_a_program_that_samples_otherwise_is_noticed(trained, tmp_path, monkeypatch):
    assert export(trained, tmp_path / "exported") == 0
    monkeypatch.chdir(tmp_path)
    expected = our_samples(trained / "results", [0, 0, 1, 1], cond_scale=1.5, steps=5)
    for old, new in (
        ("x * scale + shift", "x * scale"),
        ("(0.0, 1.0)", "(1.0, 0.0)"),  # the two passes of guidance in the wrong order
        ("[0, 0, 1, 1]", "[0, 0, 1, 2]"),
        ("+ next_sigma *", "- next_sigma *"),
    ):
        assert documented_program().count(old) == 1
        names: dict = {}
        exec(documented_program().replace(old, new), names)
        assert not torch.allclose(names["latents"], expected, rtol=1e-4, atol=1e-4), old
