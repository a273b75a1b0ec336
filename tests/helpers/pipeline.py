"""The three scripts on a tiny world, by calling their `main(argv)`, and what to look at afterwards."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import os_faults
import pytest
import tiny
import tiny_vae
import torch
from torch import Tensor

import generate as generate_script
import preprocess_latents
import train_latent_cfg
from gait_latents.latents.cache import LatentCache
from gait_latents.latents.manifest import read_manifest
from gait_latents.training import checkpoint, run_folder
from gait_latents.training.trainer import Trainer
from gait_latents.vae import base
from gait_latents.vae import load as vae_load
from gait_latents.vae.batch_encoder import BatchEncoder

SIZE = 16  # pixels; the files are larger
CLASSES = ("ID_1", "ID_2", "ID_10")
STEPS = 8  # of the usual training run, stopped in the middle by many tests
HALF = STEPS // 2


def make_world(root: Path) -> Path:
    """Makes images and a VAE below `root`; returns it."""
    tiny.make_images(root / "data", dict.fromkeys(CLASSES, 8))
    tiny_vae.save_tiny_vae(root / "vae.pt")
    return root


def preprocess(root: Path, **changes: object) -> int:
    """Runs preprocess_latents.py; five of the eight images of each class are for training."""
    return preprocess_latents.main(tiny.preprocess_flags(root, **{"image_size": SIZE, **changes}))


def train(root: Path, **changes: object) -> int:
    """Runs train_latent_cfg.py."""
    return train_latent_cfg.main(train_flags(root, **changes))


def train_flags(root: Path, **changes: object) -> list[str]:
    """Returns the flags of a training run with a line of metrics and a forward pass for each step."""
    settings = {"image_size": SIZE, "train_num_steps": STEPS, "save_and_sample_every": HALF, "log_every": 1}
    batch = {"train_batch_size": 4, "gradient_accumulate_every": 1, "dim_mults": [1]}
    return tiny.train_flags(root, **{**settings, **batch, **changes})


def generate(root: Path, **changes: object) -> int:
    """Runs generate.py on the results."""
    settings = {"checkpoint": root / "results", "output_folder": root / "synthetic", "images_per_class": 2}
    return generate_script.main(tiny.flags({**settings, "device": "cpu", **changes}))


class EncoderLog:
    """Notes each batch that is encoded, by its number of images, and each VAE that is built, by its parts."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.batches: list[int] = []
        self.built: list[str] = []
        encode, load = BatchEncoder.__call__, vae_load.load_vae

        def noted_encode(encoder: BatchEncoder, images: Tensor) -> Tensor:
            self.batches.append(len(images))
            return encode(encoder, images)

        def noted_load(path: str, device: torch.device, *, parts: base.Parts = "both", **layout: Any) -> object:
            self.built.append(parts)
            return load(path, device, parts=parts, **layout)

        monkeypatch.setattr(BatchEncoder, "__call__", noted_encode)
        monkeypatch.setattr(vae_load, "load_vae", noted_load)

    @property
    def num_images(self) -> int:
        """How many images were encoded so far."""
        return sum(self.batches)

    def forget(self) -> None:
        """Starts to count anew."""
        self.batches.clear()
        self.built.clear()


def open_cache(folder: Path) -> LatentCache:
    """Opens the space that the manifest of a cache names."""
    manifest = read_manifest(folder)
    assert manifest is not None
    return LatentCache(folder, manifest.space, writable=False)


def stored_moments(folder: Path, *, may_be_damaged: bool = False) -> dict[str, bytes]:
    """Returns the bytes of each row of a cache by its key; damaged rows, if there may be any, are left out."""
    cache = open_cache(folder)
    keys = cache.keys()
    moments, found = cache.read(keys)
    assert may_be_damaged or found.all()
    return {key: row.tobytes() for key, row, is_found in zip(keys, moments, found, strict=True) if is_found}


def forget_setting(path: Path, name: str) -> None:
    """Makes a checkpoint one of before a setting."""
    tensors, meta = checkpoint.load(path)
    del meta["settings"][name]
    checkpoint.save(path, tensors, meta)


def state_digests(results: Path) -> dict[str, str]:
    """Returns a digest of each tensor of the newest state of a run, and its step under "step"."""
    state = run_folder.newest_state(results)
    assert state is not None and state.is_full
    digests = {name: hashlib.sha256(t.numpy().tobytes()).hexdigest() for name, t in state.tensors.items()}
    assert {name.partition(".")[0] for name in digests} == {"model", "ema", "optimizer", "log"}
    return {**digests, "step": str(state.step)}


def losses(results: Path) -> dict[int, float]:
    """Returns the loss of each step that metrics.jsonl tells of; no step may stand there twice."""
    rows = [json.loads(line) for line in (results / "metrics.jsonl").read_text().splitlines()]
    found = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    assert len(dict(found)) == len(found)
    return dict(found)


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, action: Callable[[], object]) -> None:
    """Does something right before the step of this number, counted from 1, is taken."""
    take_step = Trainer.train_step

    def train_step(trainer: Trainer) -> None:
        if trainer.finished_steps == step - 1:
            action()
        take_step(trainer)

    monkeypatch.setattr(Trainer, "train_step", train_step)


def signal_self(number: int) -> Callable[[], None]:
    """Makes an action that sends this process a signal."""
    return lambda: os.kill(os.getpid(), number)


def assert_same_run(world: Path, trained: Path, results: str = "results") -> None:
    """Asserts that a run ended in the very bits of the uninterrupted one, and tells of the same losses."""
    assert state_digests(world / results) == state_digests(trained / "results")
    assert losses(world / results) == losses(trained / "results")


def one_error(capsys: pytest.CaptureFixture[str]) -> str:
    """Returns the only line on stderr that is not progress; there must be no traceback."""
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith(("error", "warning", "Trace"))]
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


def mount_read_only(folder: Path) -> None:
    """Makes a folder read-only for this process alone, which should be a forked child; raises OSError if forbidden.

    Permission bits would prove nothing where the tests run as root.
    """
    bind, remount, read_only = 4096, 32, 1
    os_faults.own_mounts()
    os_faults.mount(str(folder), folder, None, bind)
    os_faults.mount(None, folder, None, bind | remount | read_only)
