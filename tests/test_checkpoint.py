import copy
import errno
import json
import os
from pathlib import Path

import pytest
import safetensors.torch
import torch
from os_faults import fault_at, forked, killing, overwrite
from tiny_checkpoint import same, saved, tiny_tensors
from torch import nn

import checkpoint
from config import UserError

META = {"step": 4, "settings": {"lr": 1e-4, "dims": [1, 2]}, "classes": ["ID_1", "步态", "\udcff"], "norm": 0.1 + 0.2}


def test_same_tells_types_shapes_and_bits_apart():
    zeros = {"a": torch.zeros(2, 2)}
    assert same(zeros, {"a": torch.zeros(2, 2)})
    assert same({"a": torch.tensor(float("nan"))}, {"a": torch.tensor(float("nan"))})
    others = [torch.zeros(4), torch.zeros(2, 2, dtype=torch.int32), -torch.zeros(2, 2)]
    assert not any(same(zeros, {"a": other}) for other in others)
    assert not same(zeros, {})


# --- one file ----------------------------------------------------------------------------------------------

GENERATOR = torch.Generator().manual_seed(0)
MANY = {
    "half": torch.randn(3, 5, generator=GENERATOR).to(torch.float16),
    "brain": torch.randn(3, 5, generator=GENERATOR).to(torch.bfloat16),
    "double": torch.randn(2, generator=GENERATOR).double(),
    "step": torch.tensor(7.0),
    "count": torch.tensor(2**60 + 1),
    "int32": torch.arange(5, dtype=torch.int32),
    "int16": torch.arange(3, dtype=torch.int16),
    "int8": torch.arange(-3, 3, dtype=torch.int8),
    "bytes": torch.arange(7, dtype=torch.uint8),
    "flags": torch.tensor([True, False, True]),
    "nothing": torch.zeros(0, 3),
    "special": torch.tensor([float("nan"), float("inf"), -0.0]),
    "last": torch.randn(2, 3, 4, 5, generator=GENERATOR).to(memory_format=torch.channels_last),
    "view": torch.randn(6, 4, generator=GENERATOR).t()[1:3],
    "a name/with. odd\ncharacters 步": torch.ones(1),
}


def test_every_kind_of_tensor_and_plain_values_come_back_bit_for_bit(tmp_path):
    path = tmp_path / "new" / "x.safetensors"
    checkpoint.save(path, MANY, META)
    tensors, meta = checkpoint.load(path)
    assert same(tensors, MANY)
    assert meta == META


def test_the_file_is_plain_safetensors_with_aligned_tensors(tmp_path):
    path = tmp_path / "x.safetensors"
    checkpoint.save(path, MANY, META)
    assert same(safetensors.torch.load_file(path), MANY)
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    assert length % 8 == 0
    header = json.loads(data[8 : 8 + length])
    assert json.loads(header["__metadata__"]["meta"]) == META
    for name, tensor in MANY.items():
        assert header[name]["data_offsets"][0] % tensor.element_size() == 0


def test_loaded_tensors_may_be_changed(tmp_path):
    checkpoint.save(tmp_path / "x", tiny_tensors(), {})
    tensors, _ = checkpoint.load(tmp_path / "x")
    tensors["model.w"] += 1
    assert same(checkpoint.load(tmp_path / "x")[0], tiny_tensors())


def test_the_tensors_and_the_callers_meta_are_not_changed_by_saving(tmp_path):
    tensors = {"p": nn.Parameter(torch.ones(2))}
    meta = {"dims": (1, 2)}
    checkpoint.save(tmp_path / "x", tensors, meta)
    assert meta == {"dims": (1, 2)}
    assert tensors["p"].requires_grad
    loaded, meta = checkpoint.load(tmp_path / "x")
    assert meta == {"dims": [1, 2]}
    assert not loaded["p"].requires_grad


def test_shared_memory_is_refused_by_both_names(tmp_path):
    whole = torch.ones(4)
    for other in (whole, whole[1:], whole.view(2, 2)):
        with pytest.raises(ValueError, match="first and second share memory"):
            checkpoint.save(tmp_path / "x", {"first": whole, "second": other}, {})
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_read_back_is_refused(tmp_path):
    for meta, error in (
        ({"loss": float("nan")}, ValueError),
        ({"path": Path()}, TypeError),
        ({"t": META.keys()}, TypeError),
    ):
        with pytest.raises(error):
            checkpoint.save(tmp_path / "x", tiny_tensors(), meta)
    with pytest.raises(ValueError, match="complex64"):
        checkpoint.save(tmp_path / "x", {"c": torch.zeros(1, dtype=torch.complex64)}, {})
    with pytest.raises(ValueError, match="can be read back"):
        checkpoint.save(tmp_path / "x", tiny_tensors(), {"log": "x" * (5 << 20)})
    assert not list(tmp_path.iterdir())


def test_another_format_number_is_a_user_error(tmp_path):
    path = saved(tmp_path, 2)
    saved(tmp_path, 1)
    header = {"format": "2", "meta": "other", "sha256": "other"}
    overwrite(path, safetensors.torch.save(tiny_tensors(), header))
    for use in (lambda: checkpoint.load(path), lambda: checkpoint.newest(tmp_path)):
        with pytest.raises(UserError, match="has format 2, and this version reads 1"):
            use()


# --- a folder of them --------------------------------------------------------------------------------------


def test_names_sort_by_step():
    assert checkpoint.full_name(66000) == "state-00066000.safetensors"
    assert checkpoint.ema_name(66000) == "ema-00066000.safetensors"


def test_newest_goes_by_step_and_ignores_other_files(tmp_path):
    assert checkpoint.newest(tmp_path) is None
    assert checkpoint.newest(tmp_path / "absent") is None
    for step in (900, 2_000, 123_456_789):
        saved(tmp_path, step)
    os.utime(tmp_path / checkpoint.full_name(900), (4e9, 4e9))
    for name in ("state-999999999.safetensors.bak", ".tmp-x", "state-x.safetensors", "ema-999999999.safetensors"):
        (tmp_path / name).write_bytes(b"x")
    found = checkpoint.newest(tmp_path)
    assert found is not None
    assert found[0].name == "state-123456789.safetensors"
    assert found[2:] == ({"step": 123_456_789}, [])


def test_when_none_is_whole_it_is_an_error_and_not_a_new_start(tmp_path):
    for step in (2, 4):
        saved(tmp_path, step).write_bytes(b"x")
    with pytest.raises(UserError, match=r"no checkpoint in .* can be read \(.*state-00000004"):
        checkpoint.newest(tmp_path)


def test_newest_averages_takes_the_latest_file_that_holds_them(tmp_path):
    assert checkpoint.newest_averages(tmp_path) is None
    saved(tmp_path, 2)
    checkpoint.save(tmp_path / checkpoint.ema_name(6), {"ema.w": torch.ones(2)}, {"step": 6})
    found = checkpoint.newest_averages(tmp_path)
    assert found is not None
    assert found[2] == {"step": 6}
    found[0].write_bytes(b"x")
    found = checkpoint.newest_averages(tmp_path)
    assert found is not None
    assert (found[2], len(found[3])) == ({"step": 2}, 1)


def test_prune_keeps_the_last_two_states_all_averages_and_later_damaged_ones(tmp_path):
    for step in (1, 2, 3, 4, 9):
        saved(tmp_path, step)
        checkpoint.save(tmp_path / checkpoint.ema_name(step), {"ema.w": torch.ones(2)}, {"step": step})
    (tmp_path / checkpoint.full_name(9)).write_bytes(b"damaged")
    checkpoint.prune(tmp_path, step=4)
    assert sorted(path.name[:14] for path in tmp_path.iterdir() if path.name.startswith("state")) == [
        "state-00000003",
        "state-00000004",
        "state-00000009",
    ]
    assert len(list(tmp_path.glob("ema-*"))) == 5


def test_prune_clears_up_after_a_save_that_was_killed(tmp_path):
    def save_and_die() -> None:
        with fault_at(0, killing(after=False), only=("rename",)):
            saved(tmp_path, 6)

    saved(tmp_path, 4)
    assert forked(save_and_die) == -9
    assert len(list(tmp_path.iterdir())) == 2
    checkpoint.prune(tmp_path, step=4)
    assert len(list(tmp_path.iterdir())) == 1


# --- training state ----------------------------------------------------------------------------------------


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
    tensors, training = checkpoint.pack_training_state(*before.parts)
    checkpoint.save(tmp_path / "x", tensors, {"training": training})
    loaded, meta = checkpoint.load(tmp_path / "x")
    assert checkpoint.is_full(meta)
    checkpoint.unpack_training_state(loaded, meta["training"], *after.parts)
    after.steps(4, 8)
    expected, expected_values = checkpoint.pack_training_state(*straight.parts)
    result, values = checkpoint.pack_training_state(*after.parts)
    assert same(result, expected)
    assert values == expected_values
    assert values["optimizer"]["param_groups"][1]["lr"] == 0.03
    assert values["optimizer"]["param_groups"][0]["betas"] == (0.9, 0.99)
    assert values["scaler"]["scale"] > 1024


def test_tensors_are_named_by_part():
    training = Training(0)
    training.steps(0, 1)
    tensors, _ = checkpoint.pack_training_state(*training.parts)
    assert {"model.0.weight", "ema.1.running_mean", "optimizer.3.exp_avg_sq", "optimizer.0.step"} <= tensors.keys()


def test_a_state_from_before_the_first_step_and_without_a_scaler_can_be_resumed(tmp_path):
    training, other = Training(0), Training(1)
    tensors, values = checkpoint.pack_training_state(training.model, training.ema, training.optimizer, None)
    checkpoint.save(tmp_path / "x", tensors, values)
    checkpoint.unpack_training_state(*checkpoint.load(tmp_path / "x"), *other.parts)
    training.steps(0, 3)
    other.steps(0, 3)
    assert same(training.model.state_dict(), other.model.state_dict())


def test_the_state_of_another_network_is_refused_and_nothing_is_changed():
    wide, narrow = Training(0, width=4), Training(1)
    wide.steps(0, 1)
    narrow.steps(0, 1)
    stored, values = checkpoint.pack_training_state(*wide.parts)
    before = {name: tensor.clone() for name, tensor in checkpoint.pack_training_state(*narrow.parts)[0].items()}
    own, own_values = checkpoint.pack_training_state(*narrow.parts)
    cases = [
        (stored, values, r"model\.0\.weight is \[4, 2, 1, 1\] in it, and \[3, 2, 1, 1\] with"),
        ({**own, "model.extra": torch.ones(1)}, own_values, r"model\.extra is \[1\] in it, and absent"),
        ({n: t for n, t in own.items() if n != "ema.2.bias"}, own_values, r"ema\.2\.bias is absent in it"),
        ({**own, "other.x": torch.ones(1)}, own_values, r"holds other\.x"),
        ({**own, "optimizer.0.exp_avg": torch.ones(9)}, own_values, r"optimizer\.0\.exp_avg is \[9\]"),
    ]
    for tensors, training, message in cases:
        with pytest.raises(UserError, match=message):
            checkpoint.unpack_training_state(tensors, training, *narrow.parts)
    one_group = torch.optim.Adam(narrow.model.parameters())
    with pytest.raises(UserError, match="other groups"):
        checkpoint.unpack_training_state(own, own_values, narrow.model, narrow.ema, one_group, None)
    assert same(checkpoint.pack_training_state(*narrow.parts)[0], before)


def test_a_disk_error_while_reading_is_not_taken_for_damage(tmp_path):
    with pytest.raises(OSError) as caught:
        checkpoint.load(tmp_path)
    assert caught.value.errno == errno.EISDIR
