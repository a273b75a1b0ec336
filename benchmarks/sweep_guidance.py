"""Compares guidance scales: Fréchet distance per class in latent space, and how many samples look like their class.

    python benchmarks/sweep_guidance.py --checkpoint results --reference_path fresh_images --images_per_class 40

The reference folder has one sub-folder per class, as the training images had, with images that were not trained on.
The first `images_per_class` of each class are the row "real": as many real images, so the best that can be expected.
All others are what every row is compared with. Distances are taken in the leading principal directions of the others.
"""

import argparse
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

import config
import hardware
import images
import vae
from config import GenerateSettings
from generate import Generator, read_averages
from latent_dataset import BatchEncoder
from latent_metrics import Projection, frechet_distance, frechet_per_class
from latent_norm import LatentNorm
from sampling import BATCH_SIZE, nearest_class


def main() -> None:
    """Prints a table row per guidance scale, and the same as JSON in the last line."""
    args = read_arguments()
    state = read_averages(Path(args.checkpoint))
    stored = {name: state.meta["settings"][name] for name in ("vae_path", "sampler", "sampling_timesteps", "precision")}
    layers = [config.stored_layer(GenerateSettings, "run", stored)]
    settings = config.resolve(GenerateSettings, layers).settings
    device = hardware.pick_device("auto")
    generator = Generator(settings, state, device)
    norm = LatentNorm.from_json(state.meta["latent_norm"])
    count = args.images_per_class
    real = encode_reference(Path(args.reference_path), state.meta, settings.vae_path, norm, device)
    fresh = torch.cat([latents[:count] for latents in real])
    others = torch.cat([latents[count:] for latents in real])
    labels = torch.arange(len(real)).repeat_interleave(count)
    other_labels = torch.tensor([label for label, latents in enumerate(real) for _ in latents[count:]])
    means = torch.stack([latents[count:].mean(0) for latents in real])
    projection = Projection.fit(others, args.directions)

    def row(name: str, latents: Tensor, seconds: float) -> dict[str, float | str]:
        per_class = frechet_per_class(latents, labels, others, other_labels, projection)
        figures = {
            "guidance": name,
            "frechet_per_class": round(sum(per_class) / len(per_class), 2),
            "frechet_all": round(frechet_distance(projection(latents), projection(others)), 2),
            "nearest_class_mean": round((nearest_class(latents, means) == labels).double().mean().item(), 4),
            "std": round(latents.std().item(), 3),
            "seconds": round(seconds, 1),
        }
        print("| " + " | ".join(str(value) for value in figures.values()) + " |", flush=True)
        return figures

    print(f"{len(real)} classes x {count}, against {len(others)} others in {projection.directions.shape[1]} directions")
    print("| guidance | Fréchet per class | Fréchet, all | nearest class mean | std | seconds |")
    print("|---|---|---|---|---|---|")
    rows = [row("real", fresh, 0.0)]
    for scale in args.scales:
        started = time.monotonic()
        samples = sample_classes(generator, len(real), count, scale)
        rows.append(row(f"{scale:g}", samples, time.monotonic() - started))
    print(json.dumps({"checkpoint_step": state.step, "directions": args.directions, "rows": rows}))


def read_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description="Compare guidance scales.", allow_abbrev=False)
    parser.add_argument("--checkpoint", default="./results", help="run folder or checkpoint file")
    parser.add_argument("--reference_path", required=True, help="folder of real images that were not trained on")
    parser.add_argument("--images_per_class", type=int, default=40)
    parser.add_argument("--directions", type=int, default=16, help="principal directions")
    parser.add_argument("--scales", type=float, nargs="+", default=[1, 1.5, 2, 3, 4, 6])
    return parser.parse_args()


def encode_reference(folder: Path, meta: dict, vae_path: str, norm: LatentNorm, device: torch.device) -> list[Tensor]:
    """Encodes the reference images; returns for each class of the model its latents [N C h w], one draw each."""
    index = images.list_images(folder)
    size = meta["settings"]["image_size"]
    encoder = BatchEncoder(
        lambda: vae.load_vae(vae_path, device, parts="encoder"), device=device, batch_size=16, dtype=torch.float32
    )
    noise = torch.Generator().manual_seed(0)
    found = []
    for name in meta["classes"]:
        arrays = [images.decode((folder / name / file).read_bytes(), image_size=size) for file in index[name]]
        pixels = torch.stack([torch.from_numpy(array) for array in arrays])
        moments = torch.cat([encoder(part) for part in pixels.split(16)])
        shape = (len(moments), moments.shape[1] // 2, *moments.shape[2:])
        found.append(norm.to_latent(moments, torch.randn(shape, generator=noise)))
    return found


def sample_classes(generator: Generator, num_classes: int, count: int, scale: float) -> Tensor:
    """Samples `count` latents of each class, class by class."""
    cells = [(label, index) for label in range(num_classes) for index in range(count)]
    batches = [cells[start : start + BATCH_SIZE] for start in range(0, len(cells), BATCH_SIZE)]
    return torch.cat([generator.sample([a for a, _ in part], [b for _, b in part], scale).cpu() for part in batches])


if __name__ == "__main__":
    main()
