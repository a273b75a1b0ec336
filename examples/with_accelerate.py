"""Trains a small classifier on cached latents with Hugging Face Accelerate, on one device or on many.

accelerate launch examples/with_accelerate.py latents_cache
"""

import sys

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.utils.data import DataLoader

from gait_latents import LatentDataset


def main(folder: str, num_epochs: int = 3) -> list[float]:
    """Trains on the complete cache in `folder`; returns the mean loss of each epoch in this process."""
    accelerator = Accelerator()
    set_seed(0)  # the same first weights everywhere
    dataset = LatentDataset.open(folder)  # on the CPU: Accelerate moves each batch to the device of its process
    num_channels, num_classes = dataset.latent_shape[0], int(dataset.labels.max()) + 1
    network = nn.Sequential(
        nn.Conv2d(num_channels, 32, 3, padding=1), nn.SiLU(), nn.Flatten(), nn.LazyLinear(num_classes)
    )
    network(torch.zeros(1, *dataset.latent_shape))  # gives the lazy layer its size
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    loader = DataLoader(dataset, batch_size=16, shuffle=True)
    network, optimizer, loader = accelerator.prepare(network, optimizer, loader)

    set_seed(0, device_specific=True)  # from here each process draws latents of its own
    means = []
    for epoch in range(num_epochs):
        losses = []
        for latents, labels in loader:
            loss = nn.functional.cross_entropy(network(latents), labels)
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
            losses.append(loss.item())
        means.append(sum(losses) / len(losses))
        accelerator.print(f"epoch {epoch}: mean loss {means[-1]:.3f} in the first process")
    accelerator.end_training()  # else a process may abort at its exit
    return means


if __name__ == "__main__":
    folder = sys.argv[1] if len(sys.argv) == 2 else sys.exit(__doc__)
    main(folder)
