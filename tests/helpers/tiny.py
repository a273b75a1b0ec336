"""Small real things for the tests: folders of images, and the settings of a run that takes a second."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

IMAGE_SIZE = 32


def make_image(seed: int, *, size: int = IMAGE_SIZE, hue: int = 0) -> Image.Image:
    """Draws a smooth random picture; pictures of one `hue` look alike."""
    generator = np.random.default_rng([seed, hue])
    coarse = generator.integers(0, 120, (4, 4, 3), dtype=np.uint8)
    coarse[..., hue % 3] += 60 + 20 * (hue % 4)
    return Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC)


def make_images(
    folder: Path, counts: Mapping[str, int], *, size: int = IMAGE_SIZE, suffix: str = ".jpg", seed: int = 0
) -> Path:
    """Makes one sub-folder per class with so many images; returns the folder."""
    for hue, (name, count) in enumerate(counts.items()):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            make_image(1000 * seed + number, size=size, hue=hue).save(folder / name / f"walk_{number}{suffix}")
    return folder


def train_flags(root: Path, **changes: object) -> list[str]:
    """Returns the flags of a tiny training run below `root`, with some changed."""
    settings: dict[str, object] = {
        "vae_path": root / "vae.pt",
        "data_path": root / "data",
        "latents_cache_folder": root / "latents_cache",
        "results_folder": root / "results",
        "image_size": IMAGE_SIZE,
        "images_per_user": 5,
        "encode_batch_size": 4,
        "latent_norm_images": 6,
        "dim": 8,
        "dim_mults": [1, 2],
        "attn_heads": 2,
        "attn_dim_head": 8,
        "train_batch_size": 2,
        "gradient_accumulate_every": 2,
        "train_num_steps": 6,
        "train_lr": 1e-3,
        "ema_update_every": 2,
        "save_and_sample_every": 100,
        "sampling_timesteps": 2,
        "num_samples": 2,
        "log_every": 2,
        "join_passes": "false",
        "compile": "false",
        "trackers": "none",
        "device": "cpu",
    }
    return flags(settings | changes)


def preprocess_flags(root: Path, **changes: object) -> list[str]:
    """Returns the flags of a tiny preprocess below `root`, with some changed."""
    settings: dict[str, object] = {
        "vae_path": root / "vae.pt",
        "data_path": root / "data",
        "output_folder": root / "latents_cache",
        "image_size": IMAGE_SIZE,
        "images_per_user": 5,
        "encode_batch_size": 4,
        "device": "cpu",
    }
    return flags(settings | changes)


def flags(settings: Mapping[str, object]) -> list[str]:
    """Turns settings into command-line words; None leaves a setting out."""
    words = []
    for name, value in settings.items():
        if value is not None:
            items = value if isinstance(value, list | tuple) else [value]
            words += [f"--{name}", *map(str, items)]
    return words
