"""Checkpoints of two tiny tensors, and a comparison bit for bit."""

from pathlib import Path

import torch

from gait_latents.training import checkpoint, run_folder


def tiny_tensors(value: float = 1.0) -> dict[str, torch.Tensor]:
    """Makes the tensors of a state, all of one value."""
    return {"model.w": torch.full((2, 2), value), "ema.w": torch.full((2,), value % 1000, dtype=torch.float16)}


def saved(folder: Path, step: int) -> Path:
    """Saves the state of a step, whose tensors are the number of the step."""
    path = folder / run_folder.full_name(step)
    checkpoint.save(path, tiny_tensors(step), {"step": step})
    return path


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Says whether two dictionaries hold the same tensors, bit for bit."""

    def facts(tensor: torch.Tensor) -> tuple:
        raw = tensor.contiguous().reshape(-1)
        return tensor.dtype, tensor.shape, raw.view(torch.uint8).tolist() if tensor.numel() else []

    return one.keys() == other.keys() and all(facts(one[name]) == facts(other[name]) for name in one)
