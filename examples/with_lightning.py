"""Trains a small classifier on cached latents with Lightning.

pip install lightning
python examples/with_lightning.py latents_cache
"""

import sys

import lightning  # pyright: ignore[reportMissingImports]  # not among what these modules need
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from gait_latents import LatentDataset


class Classifier(lightning.LightningModule):
    """Tells from a latent whose it is; notes the loss of each step."""

    def __init__(self, latent_shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__()
        channels, height, width = latent_shape
        features = nn.Sequential(nn.Conv2d(channels, 32, 3, padding=1), nn.SiLU(), nn.Flatten())
        self.network = nn.Sequential(features, nn.Linear(32 * height * width, num_classes))
        self.losses: list[float] = []

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        latents, labels = batch
        loss = nn.functional.cross_entropy(self.network(latents), labels)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def main(folder: str, num_epochs: int = 3) -> list[float]:
    """Trains on the complete cache in `folder`; returns the loss of each step."""
    lightning.seed_everything(0, workers=True)  # each worker of each process then draws latents of its own
    dataset = LatentDataset.open(folder)
    model = Classifier(dataset.latent_shape, num_classes=int(dataset.labels.max()) + 1)
    loader = DataLoader(dataset, batch_size=16, shuffle=True, num_workers=2, persistent_workers=True)
    lightning.Trainer(max_epochs=num_epochs, logger=False, enable_checkpointing=False).fit(model, loader)
    return model.losses


if __name__ == "__main__":
    folder = sys.argv[1] if len(sys.argv) == 2 else sys.exit(__doc__)
    print(f"last loss {main(folder)[-1]:.3f}")
