"""Trains a small classifier on exported latents, each process of torchrun on shards of its own.

python -m gait_latents.export --latents webdataset --output_folder shards
torchrun --nproc_per_node=2 examples/with_webdataset.py shards
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import webdataset
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def batches_of(folder: Path, batch_size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields moments [B 2C h w] and labels [B] from the shards of this process, again and again."""
    shards = sorted(str(path) for path in folder.glob("latents-*.tar"))
    if len(shards) < dist.get_world_size():
        sys.exit(f"{len(shards)} shards for {dist.get_world_size()} processes; export with a smaller --rows_per_shard")
    rows = webdataset.WebDataset(shards, nodesplitter=webdataset.split_by_node, shardshuffle=False)  # pyright: ignore[reportAttributeAccessIssue]
    return iter(rows.decode().to_tuple("npy", "cls").repeat().batched(batch_size))


def main(folder: str, num_steps: int = 30, batch_size: int = 8) -> list[float]:
    """Trains for so many steps; returns the loss of each in this process."""
    dist.init_process_group()
    device = torch.device("cuda", dist.get_node_local_rank()) if torch.cuda.is_available() else torch.device("cpu")
    torch.manual_seed(dist.get_rank())  # each process draws latents of its own
    facts = json.loads((Path(folder) / "dataset.json").read_text())
    norm = facts["latent_norm"]
    shift, scale = (torch.tensor(norm[name], device=device)[:, None, None] for name in ("shift", "scale"))
    num_channels, num_classes = len(shift), len(facts["class_names"])
    network = nn.Sequential(
        nn.Conv2d(num_channels, 32, 3, padding=1), nn.SiLU(), nn.Flatten(), nn.LazyLinear(num_classes)
    )
    network.to(device)(torch.zeros(1, num_channels, *facts["moments_shape"][1:], device=device))  # sizes the lazy layer
    network = DistributedDataParallel(network)  # which begins with the weights of the first process
    optimizer, losses = torch.optim.Adam(network.parameters(), lr=1e-3), []
    for _, (moments, labels) in zip(range(num_steps), batches_of(Path(folder), batch_size), strict=False):
        mean, logvar = torch.as_tensor(moments, device=device).float().chunk(2, dim=1)
        latents = (mean + torch.exp(0.5 * logvar) * torch.randn_like(mean) - shift) / scale
        loss = nn.functional.cross_entropy(network(latents), torch.as_tensor(labels, device=device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print(f"process {dist.get_rank()}: loss {losses[0]:.3f} to {losses[-1]:.3f}")
    dist.destroy_process_group()
    return losses


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) == 2 else sys.exit(__doc__))
