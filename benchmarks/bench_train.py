"""Times a training step of train_latent_cfg.py against the training loop that users run today.

    python benchmarks/bench_train.py

The baseline reads one `.pt` latent per image through a DataLoader, runs the library's U-Net and diffusion in 8 x 2
accumulated, calls `loss.item()` on every micro-batch, clips and updates tensor by tensor, and averages the weights in
a loop. All variants train the same network on as many latents of the same shape. With --only, give names of variants.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import harness
from harness import Round

VARIANTS: dict[str, dict[str, Any]] = {
    "float32": {"precision": "float32", "compile": "false"},
    "float32 compiled": {"precision": "float32", "compile": "true"},
    "bfloat16": {"precision": "bfloat16", "compile": "false"},
    "bfloat16 compiled": {"precision": "bfloat16", "compile": "true"},
    "float16": {"precision": "float16", "compile": "false"},
    "float16 compiled": {"precision": "float16", "compile": "true"},
}
MICRO_BATCH, ACCUMULATE, NUM_CLASSES = 8, 2, 31
LEARNING_RATE, BETAS, DECAY, UPDATE_EVERY = 1e-4, (0.9, 0.99), 0.9995, 10


def main() -> None:
    """Compares the variants."""
    arguments = harness.read_arguments(
        "Time training steps.", steps=(5, "steps in a round"), images=(310, "latents in the training set")
    )
    if arguments.worker:
        serve(arguments)
        return
    harness.compare(__file__, ["baseline", *(arguments.only or known_variants())], arguments, "step")


def known_variants() -> list[str]:
    """Returns the variants that this machine is made for."""
    import torch

    from gait_latents.common import hardware

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    compiles, formats = hardware.why_not_compile(device) is None, harness.number_formats()
    return [
        name
        for name, variant in VARIANTS.items()
        if variant["precision"] in formats and (compiles or variant["compile"] == "false")
    ]


def network_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns the sizes of the network: the default recipe, or tiny ones."""
    if arguments.small:
        return {"dim": 8, "dim_mults": (1, 2), "attn_dim_head": 8, "attn_heads": 2}
    return {"dim": 48, "dim_mults": (1, 2, 4), "attn_dim_head": 32, "attn_heads": 4}


def latent_shape(arguments: argparse.Namespace) -> tuple[int, int, int]:
    """Returns the shape of a latent of a 256x256 image, or a tiny one."""
    return (4, 8, 8) if arguments.small else (4, 32, 32)


def serve(arguments: argparse.Namespace) -> None:
    """Runs one variant as a worker."""
    with tempfile.TemporaryDirectory() as folder:
        if arguments.worker == "baseline":
            harness.serve(lambda: baseline(arguments, Path(folder)), dict)
            return
        shares: list[Callable[[], float]] = []
        harness.serve(lambda: ours(arguments, Path(folder), shares), lambda: {"share of data and draws": shares[-1]()})


# --- the loop of today -------------------------------------------------------------------------------------


def baseline(arguments: argparse.Namespace, folder: Path) -> Round:
    """Sets up the usual loop: files, library, per-tensor updates."""
    import copy

    import torch
    from denoising_diffusion_pytorch.classifier_free_guidance import GaussianDiffusion, Unet
    from torch import Tensor
    from torch.utils.data import DataLoader, Dataset

    class Files(Dataset):
        def __init__(self) -> None:
            self.paths = [folder / f"user_{i % NUM_CLASSES:02d}_{i}.pt" for i in range(arguments.images)]
            for path in self.paths:
                torch.save(torch.randn(latent_shape(arguments)), path)

        def __len__(self) -> int:
            return len(self.paths)

        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            return torch.load(self.paths[index], weights_only=True), index % NUM_CLASSES

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    channels, size, _ = latent_shape(arguments)
    unet = Unet(num_classes=NUM_CLASSES, cond_drop_prob=0.5, channels=channels, **network_settings(arguments))
    diffusion = GaussianDiffusion(
        unet, image_size=size, timesteps=1000, objective="pred_v", min_snr_loss_weight=True
    ).to(device)
    average = copy.deepcopy(diffusion)
    optimizer = torch.optim.Adam(diffusion.parameters(), lr=LEARNING_RATE, betas=BETAS, foreach=False)

    files = Files()

    def endless() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield from DataLoader(files, batch_size=MICRO_BATCH, shuffle=True, drop_last=True)

    data, step = endless(), 0

    def one_step() -> None:
        nonlocal step
        total = 0.0
        for _ in range(ACCUMULATE):
            latents, labels = next(data)
            loss = diffusion(latents.to(device), classes=labels.to(device)) / ACCUMULATE
            total += loss.item()
            loss.backward()
        torch.nn.utils.clip_grad_norm_(diffusion.parameters(), 1.0, foreach=False)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if step % UPDATE_EVERY == 0:
            with torch.no_grad():
                for kept, new in zip(average.parameters(), diffusion.parameters(), strict=True):
                    kept.mul_(DECAY).add_(new, alpha=1 - DECAY)

    return repeat(one_step, arguments.steps)


def repeat(one_step: Callable[[], object], count: int) -> Round:
    """Makes a round of `count` steps."""

    def work() -> int:
        for _ in range(count):
            one_step()
        return count

    return work


# --- ours --------------------------------------------------------------------------------------------------


def ours(arguments: argparse.Namespace, folder: Path, shares: list[Callable[[], float]]) -> Round:
    """Sets up the trainer of train_latent_cfg.py on a cache of as many latents.

    After each round, `shares` gets what measures the share of data and draws in it, which takes time of its own.
    """
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trainer = make_trainer(arguments, folder, device, **VARIANTS[arguments.worker])

    def one_round() -> int:
        started = time.perf_counter()
        for _ in range(arguments.steps):
            trainer.train_step()
        trainer.losses[-1].item()
        seconds = time.perf_counter() - started
        shares.append(lambda: data_seconds(trainer, arguments.steps) / seconds)
        trainer.losses, trainer.sample_losses = [], []
        return arguments.steps

    return one_round


def make_trainer(arguments: argparse.Namespace, folder: Path, device: Any, ranks: Any = None, **chosen: Any) -> Any:
    """Builds a trainer of the default recipe, but for the `chosen` settings, on a new cache of random latents."""
    from gait_latents.common.distributed import ALONE
    from gait_latents.images.split import Split
    from gait_latents.latents.vae_fit import ChosenSpace
    from gait_latents.settings import TrainSettings
    from gait_latents.training import run_data
    from gait_latents.training.trainer import Trainer

    dataset = random_dataset(arguments, folder, device)
    settings = TrainSettings(**network_settings(arguments), **chosen)
    classes = tuple(f"ID_{i}" for i in range(1, NUM_CLASSES + 1))
    split = Split(classes=classes, train=(), test=(), skipped=(), rule={})
    space = ChosenSpace(dataset.cache.space, 1.0, 0.0, vae_at_hand=False)
    trainer = Trainer(settings, run_data.Data(split, space, dataset), device, ranks or ALONE)
    trainer.choose_network(None)
    dataset.fit_norm(seed=0, num_images=64)
    return trainer


def random_dataset(arguments: argparse.Namespace, folder: Path, device: Any) -> Any:
    """Fills a cache with random moments and opens it, without a VAE or images."""
    import hashlib

    import numpy as np

    from gait_latents.latents.cache import LatentCache
    from gait_latents.latents.dataset import LatentDataset
    from gait_latents.latents.space import Space

    channels, height, width = latent_shape(arguments)
    space = Space.of({"weights": "none"}, 8 * height, {"version": 0}, (2 * channels, height, width))
    cache = LatentCache(folder, space, writable=True)
    keys = [hashlib.sha256(str(i).encode()).hexdigest() for i in range(arguments.images)]
    moments = np.random.default_rng(0).standard_normal((len(keys), *space.moments_shape)).astype(np.float16)
    cache.put(keys, moments, keys, {})
    cache.flush()
    labels = [i % NUM_CLASSES for i in range(len(keys))]
    return LatentDataset(cache, keys, labels, keys, encode=None, read_image=None, encode_batch_size=1, device=device)


def data_seconds(trainer: Any, steps: int) -> float:
    """Times what a step spends before the network: its draws and its latents."""
    started = time.perf_counter()
    for step in range(steps):
        for part in trainer.parts_of(step):
            trainer.latents_of(part)
    harness.wait_for_device()
    return time.perf_counter() - started


if __name__ == "__main__":
    sys.exit(main())
