"""What every test has: one thread, so that times and bits do not depend on the machine; and the tiny world."""

import shutil
from pathlib import Path

import pipeline
import pytest
import torch

torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds --long: the fault suite with many more cases (`make faults`)."""
    parser.addoption("--long", action="store_true", help="run the long form of tests/faults")


@pytest.fixture(scope="session")
def _pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pipeline.make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def world(_pristine: Path, tmp_path: Path) -> Path:
    """A folder of one's own with three classes of eight images in `data` and a VAE in `vae.pt`."""
    return shutil.copytree(_pristine, tmp_path / "world")


@pytest.fixture
def encoder(monkeypatch: pytest.MonkeyPatch) -> pipeline.EncoderLog:
    """Notes what the real encoder does during the test."""
    return pipeline.EncoderLog(monkeypatch)


@pytest.fixture(scope="session")
def trained(_pristine: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A world after preprocessing and a whole training run; to be looked at and not to be changed."""
    root = shutil.copytree(_pristine, tmp_path_factory.mktemp("trained") / "world")
    assert pipeline.preprocess(root) == 0
    assert pipeline.train(root) == 0
    return root


@pytest.fixture
def cached(trained: Path, world: Path) -> Path:
    """A world whose images are all encoded already."""
    shutil.copytree(trained / "latents_cache", world / "latents_cache")
    return world


@pytest.fixture
def emptied(world: Path) -> Path:
    """A world whose cache has manifest and split, and has lost every latent."""
    assert pipeline.preprocess(world) == 0
    (space,) = (path for path in (world / "latents_cache").iterdir() if path.is_dir())
    shutil.rmtree(space)
    return world
