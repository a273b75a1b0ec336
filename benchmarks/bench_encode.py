"""Times encoding as preprocess_latents.py does it against the scripts that users run today.

    python benchmarks/bench_encode.py

The baseline opens each image with PIL, encodes batches of 32 in float32 and contiguous memory, and writes one `.pt`
file per image with torch.save; the lazy baseline does the same one image at a time. Ours goes the whole way of
preprocess_latents.py: read, hash, decode, encode in calls of 16, seal, publish. All encode the same JPGs with the same
VAE of random weights and the usual width. A round of ours starts from an empty cache. With --only, give "one at a time"
or number formats.
"""

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
from harness import Round

BASELINE_BATCH = 32


def main() -> None:
    """Compares the variants."""
    arguments = harness.read_arguments("Time encoding.", images=(32, "images in a round"))
    if arguments.worker:
        with tempfile.TemporaryDirectory() as folder:
            serve(arguments, Path(folder))
        return
    variants = arguments.only or ("one at a time", *harness.number_formats())
    harness.compare(__file__, ["baseline", *variants], arguments, "image")


def serve(arguments: argparse.Namespace, folder: Path) -> None:
    """Runs one variant as a worker."""
    make_images(folder / "data", arguments)
    save_vae(folder / "vae.pt", arguments)
    facts: dict[str, float] = {}
    if arguments.worker == "baseline":
        harness.serve(lambda: usual(arguments, folder, BASELINE_BATCH), dict)
    elif arguments.worker == "one at a time":
        harness.serve(lambda: usual(arguments, folder, 1), dict)
    else:
        harness.serve(lambda: ours(arguments, folder, facts), lambda: facts)


def image_size(arguments: argparse.Namespace) -> int:
    """Returns the side of the images, in pixels."""
    return 32 if arguments.small else 256


def make_images(folder: Path, arguments: argparse.Namespace) -> None:
    """Writes JPGs of smooth random pictures with some noise, about as large as spectrograms are."""
    import numpy as np
    from PIL import Image

    size, generator = image_size(arguments), np.random.default_rng(0)
    (folder / "ID_1").mkdir(parents=True)
    for i in range(arguments.images):
        coarse = Image.fromarray(generator.integers(0, 256, (16, 16, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC), dtype=np.int16)
        noisy = (smooth + generator.integers(-8, 9, smooth.shape)).clip(0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(folder / "ID_1" / f"{i:04d}.jpg")


def save_vae(path: Path, arguments: argparse.Namespace) -> None:
    """Writes a KL-VAE of the usual width, or a tiny one, with random weights."""
    import torch

    from gait_latents.vae.network import KLVAE

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"width": 128, "multipliers": (1, 2, 2, 4), "num_blocks": 2}
    if arguments.small:
        sizes = {"width": 32, "multipliers": (1, 1), "num_blocks": 1}
    vae = KLVAE(**sizes, embed_dim=4, style="kl", scale_factor=0.18215)
    torch.save({"model_state_dict": vae.state_dict(), "embed_dim": 4, "scale_factor": 0.18215}, path)


def usual(arguments: argparse.Namespace, folder: Path, batch_size: int) -> Round:
    """Sets up the usual script: PIL, one process, contiguous float32, a file per image."""
    import torch
    from PIL import Image
    from torchvision import transforms

    from gait_latents.vae import load

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load.load_vae(str(folder / "vae.pt"), device, parts="encoder")
    size = image_size(arguments)
    transform = transforms.Compose([transforms.Resize(size), transforms.CenterCrop(size), transforms.ToTensor()])
    paths = sorted((folder / "data" / "ID_1").iterdir())
    output = folder / "latents"
    output.mkdir()

    @torch.no_grad()
    def work() -> int:
        for start in range(0, len(paths), batch_size):
            some = paths[start : start + batch_size]
            images = torch.stack([transform(Image.open(path).convert("RGB")) for path in some])  # type: ignore[misc]
            mean, logvar = model.encode(images.to(device)).chunk(2, dim=1)
            latents = (mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)) * model.scale_factor
            for path, latent in zip(some, latents.cpu(), strict=True):
                torch.save(latent.clone(), output / f"user_01_{path.stem}.pt")
        return len(paths)

    return work


def ours(arguments: argparse.Namespace, folder: Path, facts: dict[str, float]) -> Round:
    """Sets up preprocess_latents.py without its preview; notes the time outside of the VAE and the error."""
    import torch

    from gait_latents.common import hardware
    from gait_latents.images import selection
    from gait_latents.latents import opening, vae_fit
    from gait_latents.latents.cache import LatentCache
    from gait_latents.settings import PreprocessSettings

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    settings = PreprocessSettings(
        vae_path=str(folder / "vae.pt"),
        data_path=str(folder / "data"),
        image_size=image_size(arguments),
        images_per_user="all",
        encode_precision=arguments.worker,
    )
    sources = {"vae_path": "flag", "data_path": "flag"}
    split = selection.choose_images(settings, at_hand=True, stored=None, where="")
    chosen = vae_fit.choose_space(settings, sources, None, may_lack=False)
    output = folder / f"cache_{arguments.worker}"

    def open_dataset(encoder: Any = None) -> Any:
        dataset = opening.open_dataset(
            settings,
            split,
            list(split.train),
            cache=LatentCache(output, chosen.space, writable=True),
            vae_at_hand=True,
            images_at_hand=True,
            device=device,
        )
        dataset.encode = encoder or dataset.encode
        return dataset

    hardware.allow_tf32()
    first = open_dataset()
    facts["error"] = stored_error(first, settings.vae_path)
    encoder = KeptEncoder(first.encode)

    def work() -> int:
        shutil.rmtree(output, ignore_errors=True)
        encoder.seconds, started = 0.0, time.perf_counter()
        dataset = open_dataset(encoder)
        bad = dataset.fill()
        assert not bad, bad
        dataset.cache.merge()
        facts["outside of the VAE"] = 1 - encoder.seconds / (time.perf_counter() - started)
        facts["bytes per image"] = sum(p.stat().st_size for p in dataset.cache.shard_paths()) / len(dataset)
        return len(dataset)

    return work


def stored_error(dataset: Any, vae_path: str) -> float:
    """Returns how far stored means are from plain float32 ones: root mean square, in deviations of the means."""
    import torch

    from gait_latents.vae import load

    images = torch.stack([torch.from_numpy(dataset.read_image(i)) for i in range(min(4, len(dataset)))])
    stored = dataset.encode(images).to(torch.float16).double()
    plain = load.load_vae(vae_path, "cpu", parts="encoder")
    with torch.inference_mode():
        exact = plain.encode(images.permute(0, 3, 1, 2).float().contiguous() / 255).double()
    means, exact_means = stored.chunk(2, dim=1)[0], exact.chunk(2, dim=1)[0]
    return float((means - exact_means).square().mean().sqrt() / exact_means.std())


class KeptEncoder:
    """An encoder that is not freed between rounds, and that notes the time spent in it."""

    def __init__(self, encode: Callable[[Any], Any]) -> None:
        self.encode, self.seconds = encode, 0.0

    def __call__(self, images: Any) -> Any:
        """Encodes; the result is on the host, so the device is done."""
        started = time.perf_counter()
        moments = self.encode(images)
        self.seconds += time.perf_counter() - started
        return moments


if __name__ == "__main__":
    sys.exit(main())
