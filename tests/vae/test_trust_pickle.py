"""--trust_pickle reaches every reader of pickles, and nobody but the user gives it."""

import json
from pathlib import Path

import pytest
import torch
from pipeline import generate, preprocess, train

from gait_latents import load_vae, open_cache
from gait_latents.common import cli
from gait_latents.common.errors import UserError
from gait_latents.common.layout import MANIFEST_NAME
from gait_latents.evaluation import inception
from gait_latents.settings import EvaluateSettings, GenerateSettings, PreprocessSettings, TrainSettings
from gait_latents.vae import weight_files


@pytest.fixture
def torch_with_a_hole(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.9.1")
    monkeypatch.setattr(weight_files, "SAFE_TORCH", (2, 10))


def test_the_scripts_open_a_pickle_with_it_alone(
    world: Path, torch_with_a_hole: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert preprocess(world) == 2
    assert "CVE-2026-24747" in capsys.readouterr().err
    assert preprocess(world, trust_pickle=True) == 0
    manifest = (world / "latents_cache" / MANIFEST_NAME).read_text()
    assert "trust_pickle" not in manifest and json.loads(manifest)["settings"]
    assert train(world, trust_pickle=True, train_num_steps=2) == 0
    assert generate(world, images_per_class=1) == 2
    assert "CVE-2026-24747" in capsys.readouterr().err
    assert generate(world, images_per_class=1, trust_pickle=True) == 0
    written = [path for path in world.rglob("*") if path.is_file() and b"trust_pickle" in path.read_bytes()]
    assert written == []


def test_programs_open_a_pickle_with_it_alone(emptied: Path, torch_with_a_hole: None, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="CVE-2026-24747"):
        load_vae(emptied / "vae.pt", "cpu")
    load_vae(emptied / "vae.pt", "cpu", trust_pickle=True)
    with pytest.raises(UserError, match="CVE-2026-24747"):
        open_cache(emptied / "latents_cache")
    dataset = open_cache(emptied / "latents_cache", trust_pickle=True)
    dataset.fill()
    assert not dataset.missing()
    torch.save([1], tmp_path / "fid.pth")
    with pytest.raises(UserError, match="CVE-2026-24747"):
        inception.load_network(tmp_path / "fid.pth", torch.device("cpu"))
    with pytest.raises(UserError, match="holds no state dict"):
        inception.load_network(tmp_path / "fid.pth", torch.device("cpu"), trust_pickle=True)


@pytest.mark.parametrize("cls", [PreprocessSettings, TrainSettings, GenerateSettings, EvaluateSettings])
def test_what_is_stored_neither_keeps_nor_gives_it(cls: type) -> None:
    settings = cli.resolve(cls, [cli.Layer("flags", {"trust_pickle": True})]).settings
    assert settings.trust_pickle and "trust_pickle" not in cli.to_dict(settings)
    for only_about_cache in (False, True):
        layer = cli.stored_layer(cls, "a run", {"trust_pickle": True}, only_about_cache=only_about_cache)
        assert layer.values == {} and not cli.resolve(cls, [layer]).settings.trust_pickle
