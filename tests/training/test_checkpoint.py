import errno
import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from bounds import in_child
from os_faults import overwrite
from tiny_checkpoint import same, saved, tiny_tensors
from torch import nn

from gait_latents.common.errors import UserError
from gait_latents.training import checkpoint, run_folder
from gait_latents.training.checkpoint import DamagedCheckpoint

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


def test_a_header_that_is_too_long_is_refused_though_it_is_right(tmp_path):
    text = json.dumps({"log": "x" * (5 << 20)})
    facts = {"format": "1", "meta": text, "sha256": checkpoint._checksum(tiny_tensors(), text)}
    (tmp_path / "x").write_bytes(safetensors.torch.save(tiny_tensors(), facts))
    with pytest.raises(DamagedCheckpoint, match="does not begin like a checkpoint"):
        checkpoint.load(tmp_path / "x")


def test_saving_takes_no_memory_besides_the_tensors_and_loading_takes_the_file_and_them(tmp_path):
    tensors = {f"model.{i}": torch.ones(8 << 18) for i in range(8)}  # 8 MiB each
    size = 64 << 20

    def load_and_compare() -> bool:
        return same_sums(checkpoint.load(tmp_path / "x")[0], tensors)

    _, growth = in_child(lambda: checkpoint.save(tmp_path / "x", tensors, {}))
    assert growth < size / 2
    is_same, growth = in_child(load_and_compare)
    assert is_same and growth < 2.5 * size


def same_sums(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Compares large tensors faster than `same` does."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_another_format_number_is_a_user_error(tmp_path):
    path = saved(tmp_path, 2)
    saved(tmp_path, 1)
    header = {"format": "2", "meta": "other", "sha256": "other"}
    overwrite(path, safetensors.torch.save(tiny_tensors(), header))
    for use in (lambda: checkpoint.load(path), lambda: run_folder.find_newest(tmp_path)):
        with pytest.raises(UserError, match="has format 2, and this version reads 1"):
            use()


def test_a_disk_error_while_reading_is_not_taken_for_damage(tmp_path):
    with pytest.raises(OSError) as caught:
        checkpoint.load(tmp_path)
    assert caught.value.errno == errno.EISDIR


@pytest.mark.parametrize("facts", [None, {"format": "pt"}, {"scale_factor": "0.3", "modelspec.title": "x"}])
def test_safetensors_of_another_kind_are_called_so(tmp_path, facts):
    safetensors.torch.save_file(tiny_tensors(), tmp_path / "model.safetensors", facts)
    with pytest.raises(DamagedCheckpoint, match=r"model\.safetensors: no training run wrote it; it may be a VAE or an"):
        checkpoint.load(tmp_path / "model.safetensors")
