"""The state of training: packed, stored, and put back into the same network only."""

import copy

import pytest
import torch
from tiny_checkpoint import same
from torch import nn

from gait_latents.common.errors import UserError
from gait_latents.training import checkpoint, optimizer_state


class Training:
    """A tiny network with Adam in two groups, averaged weights and a loss scaler."""

    def __init__(self, seed: int, width: int = 3) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Conv2d(2, width, 1), nn.BatchNorm2d(width), nn.Conv2d(width, 1, 1))
        self.ema = copy.deepcopy(self.model)
        groups = [{"params": self.model[0].parameters()}, {"params": self.model[2].parameters(), "lr": 0.03}]
        self.optimizer = torch.optim.Adam(groups, lr=0.1, betas=(0.9, 0.99))
        self.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)

    def steps(self, begin: int, end: int) -> None:
        for step in range(begin, end):
            images = torch.randn(4, 2, 2, 2, generator=torch.Generator().manual_seed(step))
            self.optimizer.zero_grad()
            self.scaler.scale(self.model(images).square().mean()).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            with torch.no_grad():
                for average, weight in zip(self.ema.parameters(), self.model.parameters(), strict=True):
                    average.lerp_(weight, 0.1)

    @property
    def parts(self) -> tuple:
        return self.model, self.ema, self.optimizer, self.scaler


def test_training_resumed_from_a_file_equals_training_without_a_break(tmp_path):
    straight, before, after = Training(0), Training(0), Training(1)
    straight.steps(0, 8)
    before.steps(0, 4)
    tensors, training = optimizer_state.pack_training_state(*before.parts)
    checkpoint.save(tmp_path / "x", tensors, {"training": training})
    loaded, meta = checkpoint.load(tmp_path / "x")
    optimizer_state.unpack_training_state(loaded, meta["training"], *after.parts)
    after.steps(4, 8)
    expected, expected_values = optimizer_state.pack_training_state(*straight.parts)
    result, values = optimizer_state.pack_training_state(*after.parts)
    assert same(result, expected)
    assert values == expected_values
    assert values["optimizer"]["param_groups"][1]["lr"] == 0.03
    assert values["optimizer"]["param_groups"][0]["betas"] == (0.9, 0.99)
    assert values["scaler"]["scale"] > 1024


def test_tensors_are_named_by_part():
    training = Training(0)
    training.steps(0, 1)
    tensors, _ = optimizer_state.pack_training_state(*training.parts)
    assert {"model.0.weight", "ema.1.running_mean", "optimizer.3.exp_avg_sq", "optimizer.0.step"} <= tensors.keys()


def test_a_state_from_before_the_first_step_and_without_a_scaler_can_be_resumed(tmp_path):
    training, other = Training(0), Training(1)
    tensors, values = optimizer_state.pack_training_state(training.model, training.ema, training.optimizer, None)
    checkpoint.save(tmp_path / "x", tensors, values)
    optimizer_state.unpack_training_state(*checkpoint.load(tmp_path / "x"), *other.parts)
    training.steps(0, 3)
    other.steps(0, 3)
    assert same(training.model.state_dict(), other.model.state_dict())


def test_the_state_of_another_network_is_refused_and_nothing_is_changed():
    wide, narrow = Training(0, width=4), Training(1)
    wide.steps(0, 1)
    narrow.steps(0, 1)
    stored, values = optimizer_state.pack_training_state(*wide.parts)
    before = {name: tensor.clone() for name, tensor in optimizer_state.pack_training_state(*narrow.parts)[0].items()}
    own, own_values = optimizer_state.pack_training_state(*narrow.parts)
    cases = [
        (stored, values, r"model\.0\.weight is \[4, 2, 1, 1\] in it, and \[3, 2, 1, 1\] with"),
        ({**own, "model.extra": torch.ones(1)}, own_values, r"model\.extra is \[1\] in it, and absent"),
        ({n: t for n, t in own.items() if n != "ema.2.bias"}, own_values, r"ema\.2\.bias is absent in it"),
        ({**own, "other.x": torch.ones(1)}, own_values, r"holds other\.x"),
        ({**own, "optimizer.0.exp_avg": torch.ones(9)}, own_values, r"optimizer\.0\.exp_avg is \[9\]"),
    ]
    for tensors, training, message in cases:
        with pytest.raises(UserError, match=message):
            optimizer_state.unpack_training_state(tensors, training, *narrow.parts)
    one_group = torch.optim.Adam(narrow.model.parameters())
    with pytest.raises(UserError, match="other groups"):
        optimizer_state.unpack_training_state(own, own_values, narrow.model, narrow.ema, one_group, None)
    assert same(optimizer_state.pack_training_state(*narrow.parts)[0], before)
