"""The record of the images that a VAE was trained on, and what an evaluation says of it."""

import hashlib
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from tiny_vae import save_tiny_vae

from gait_latents.vae import load, trained_on

KEYS = [hashlib.sha256(bytes([i])).hexdigest() for i in range(20)]


def saved(path: Path, **metadata: str) -> str:
    """Saves a VAE as safetensors with metadata; returns its path."""
    save_tiny_vae(path)
    save_file(load_file(path), path, metadata)
    return str(path)


def test_a_vae_names_the_images_that_it_was_trained_on_and_is_the_same_vae(tmp_path: Path) -> None:
    plain = saved(tmp_path / "plain.safetensors")
    told = saved(tmp_path / "told.safetensors", trained_on=trained_on.to_text(KEYS[:12]))
    assert trained_on.num_seen(told, KEYS[10:]) == 2 and trained_on.num_seen(told, KEYS[12:]) == 0
    assert load.read_identity(told) == load.read_identity(plain)
    assert load_file(told).keys() == load_file(plain).keys()


OTHERS = ("nowhere.safetensors", "vae.pt", "cut.safetensors", "plain.safetensors", "folder", "")


@pytest.mark.parametrize("name", OTHERS)
def test_of_other_files_nobody_knows(name: str, tmp_path: Path) -> None:
    saved(tmp_path / "plain.safetensors")
    save_tiny_vae(tmp_path / "vae.pt")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "plain.safetensors").read_bytes()[:40])
    (tmp_path / "folder").mkdir()
    assert trained_on.num_seen(str(tmp_path / name) if name else "", KEYS) is None
    assert trained_on.num_seen("owner/name", KEYS) is None  # no file, and nothing is downloaded
