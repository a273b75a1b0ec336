"""Trains a small classifier on cached latents, in a plain PyTorch loop with workers.

python examples/plain_loop.py latents_cache
"""

import sys

import torch
from torch import nn
from torch.utils.data import DataLoader

from gait_latents import LatentDataset, open_cache


def main(folder: str, num_epochs: int = 3) -> list[float]:
    """Trains on the cache in `folder`; returns the mean loss of each epoch."""
    # Before there are workers, which cannot encode. Does nothing if the cache is complete.
    failed = open_cache(folder).fill()
    if failed:
        sys.exit(f"{len(failed)} images cannot be encoded; the first is number {failed[0][0]}: {failed[0][1]}")

    dataset = LatentDataset.open(folder)
    torch.manual_seed(0)  # also chooses the order, and the seeds of the workers
    loader = DataLoader(dataset, batch_size=16, shuffle=True, num_workers=2, persistent_workers=True)
    num_channels, num_classes = dataset.latent_shape[0], int(dataset.labels.max()) + 1
    network = nn.Sequential(
        nn.Conv2d(num_channels, 32, 3, padding=1), nn.SiLU(), nn.Flatten(), nn.LazyLinear(num_classes)
    )
    network(torch.zeros(1, *dataset.latent_shape))  # gives the lazy layer its size
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)

    means = []
    for epoch in range(num_epochs):
        losses = []
        for latents, labels in loader:  # float32 [B C h w] of about unit variance, int64 [B]
            loss = nn.functional.cross_entropy(network(latents), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        means.append(sum(losses) / len(losses))
        print(f"epoch {epoch}: mean loss {means[-1]:.3f}")
    return means


if __name__ == "__main__":
    folder = sys.argv[1] if len(sys.argv) == 2 else sys.exit(__doc__)
    main(folder)
