"""The average of the weights: that of a plain loop, without waiting for the device."""

import copy
import math

import pytest
import torch
from tiny_diffusion import (
    SAMPLING,
    generators,
    randn,
    tiny,
)
from torch import nn

from gait_latents.diffusion.ema import EMA


def test_the_decay_warms_up_and_ends_at_its_setting():
    ema = EMA(nn.Linear(1, 1), decay=0.9995, update_every=10)
    assert [ema.decay_at(step) for step in (0, 50, 99, 100)] == [0.0] * 4
    assert ema.decay_at(107) == pytest.approx(0.75)
    assert ema.decay_at(1099) == pytest.approx(0.99)
    assert ema.decay_at(10_000_000) == 0.9995
    decays = [ema.decay_at(step) for step in range(100, 200_000, 100)]
    assert decays == sorted(decays)


def test_an_average_of_trained_weights_is_no_copy_at_the_first_step():
    ema = EMA(nn.Linear(1, 1), decay=0.9995, update_every=1)
    ema.copied_steps = 0
    assert ema.decay_at(7) == pytest.approx(0.75) and ema.decay_at(999) == pytest.approx(0.99)
    assert ema.decay_at(1) > 0 and ema.decay_at(10_000_000) == 0.9995


def test_the_average_is_that_of_a_plain_loop():
    model = nn.Linear(3, 2)
    ema = EMA(model, decay=0.97, update_every=10)
    average = model.weight.detach().double().tolist()
    for step in range(1, 1001):
        with torch.no_grad():
            model.weight.add_(torch.sin(torch.arange(6.0).reshape(2, 3) + step))
        ema.update(model, step)
        if step % 10:
            continue
        decay = 0.0 if step < 100 else min(0.97, 1 - (step - 99) ** (-2 / 3))
        current = model.weight.detach().double().tolist()
        average = [
            [decay * old + (1 - decay) * new for old, new in zip(*rows, strict=True)]
            for rows in zip(average, current, strict=True)
        ]
        torch.testing.assert_close(
            ema.model.weight.detach().double(), torch.tensor(average).double(), atol=1e-5, rtol=0
        )


def test_the_average_is_a_plain_copy_before_the_warm_up_and_only_moves_when_due():
    model = nn.Linear(2, 2)
    ema = EMA(model, decay=0.9995, update_every=10)
    with torch.no_grad():
        model.weight.fill_(7.0)
    ema.update(model, 55)
    assert not torch.equal(ema.model.weight, model.weight)
    ema.update(model, 60)
    assert torch.equal(ema.model.weight, model.weight)
    assert ema.model.weight is not model.weight


def test_buffers_are_copied():
    model = nn.BatchNorm1d(2)
    ema = EMA(model, decay=0.9995, update_every=1)
    model(randn(8, 2) + 5)
    ema.update(model, 5000)
    for name, value in model.named_buffers():
        assert torch.equal(ema.model.get_buffer(name), value)
    assert ema.model.get_buffer("num_batches_tracked") == 1


def test_the_average_is_in_eval_mode_without_gradients_and_samples():
    model = tiny().train()
    ema = EMA(model, decay=0.9995, update_every=1)
    ema.update(model, 200)
    assert not any(module.training for module in ema.model.modules())
    assert not any(weight.requires_grad for weight in ema.model.parameters())
    assert model.training and all(weight.requires_grad for weight in model.parameters())
    samples = ema.model.sample(torch.tensor([0]), generators(1), **SAMPLING)
    torch.testing.assert_close(samples, model.sample(torch.tensor([0]), generators(1), **SAMPLING))


def test_an_average_goes_on_from_its_weights_alone():
    model = nn.Linear(3, 2)
    through = EMA(model, decay=0.999, update_every=2)
    broken_off = EMA(model, decay=0.999, update_every=2)
    for step in range(1, 301):
        with torch.no_grad():
            model.weight.add_(math.sin(step))
        through.update(model, step)
        if step == 150:
            stored = copy.deepcopy(broken_off.model.state_dict())
            broken_off = EMA(nn.Linear(3, 2), decay=0.999, update_every=2)
            broken_off.model.load_state_dict(stored)
        broken_off.update(model, step)
    assert torch.equal(through.model.weight, broken_off.model.weight)


def test_updating_the_average_never_reads_a_value_from_the_device():
    model = nn.BatchNorm1d(2, device="meta")  # there are no values on this device: reading one raises
    with pytest.raises(RuntimeError):
        model.weight.sum().item()
    ema = EMA(model, decay=0.9995, update_every=1)
    for step in (50, 100, 5000):
        ema.update(model, step)
