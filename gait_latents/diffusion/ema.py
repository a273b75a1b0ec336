"""The exponential moving average of a network's weights, with which samples are made."""

import copy
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)


class EMA(Generic[Model]):
    """Keeps a moving average of a model's weights; the decay depends on the step alone, so there is no other state.

    average = decay * average + (1 - decay) * weights

    Args:
        model: the model to average.
        decay: the largest decay.
        update_every: steps between updates.

    Attributes:
        copied_steps: for so many steps the average is a copy of the model, since early weights are soon worthless; 0
            where model and average begin with trained weights.
    """

    WARMUP_STEPS = 100

    def __init__(self, model: Model, *, decay: float, update_every: int):
        """Starts from a copy of the model, in eval mode and without gradients."""
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay
        self.update_every = update_every
        self.copied_steps = self.WARMUP_STEPS

    def decay_at(self, step: int) -> float:
        """Returns the decay of this step: 0 for the first `copied_steps`, then rising to `self.decay`."""
        if step < self.copied_steps:
            return 0.0
        return min(self.decay, 1.0 - (1 + step - self.copied_steps) ** (-2 / 3))

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Moves towards the model after optimiser step number `step`, if that is a multiple of `update_every`."""
        if step % self.update_every:
            return
        averaged: list[Tensor] = list(self.model.parameters())
        current: list[Tensor] = list(model.parameters())
        decay = self.decay_at(step)
        if decay == 0:
            torch._foreach_copy_(averaged, current)
        else:
            torch._foreach_lerp_(averaged, current, 1 - decay)
        kept: list[Tensor] = list(self.model.buffers())
        if kept:  # in one call: on a GPU each of its own costs more than it copies
            torch._foreach_copy_(kept, list(model.buffers()))
