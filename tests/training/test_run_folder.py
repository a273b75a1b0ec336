"""A folder of checkpoints: the newest whole one is found, and what is no longer needed goes."""

import os

import pytest
import torch
from os_faults import fault_at, forked, killing
from tiny_checkpoint import saved

from gait_latents.common.errors import UserError
from gait_latents.training import checkpoint, run_folder


def test_names_sort_by_step():
    assert run_folder.full_name(66000) == "state-00066000.safetensors"
    assert run_folder.ema_name(66000) == "ema-00066000.safetensors"


def test_newest_goes_by_step_and_ignores_other_files(tmp_path):
    assert run_folder.find_newest(tmp_path) is None
    assert run_folder.find_newest(tmp_path / "absent") is None
    for step in (900, 2_000, 123_456_789):
        saved(tmp_path, step)
    os.utime(tmp_path / run_folder.full_name(900), (4e9, 4e9))
    for name in ("state-999999999.safetensors.bak", ".tmp-x", "state-x.safetensors", "ema-999999999.safetensors"):
        (tmp_path / name).write_bytes(b"x")
    found = run_folder.find_newest(tmp_path)
    assert found is not None
    assert found[0].name == "state-123456789.safetensors"
    assert found[2:] == ({"step": 123_456_789}, [])


def test_when_none_is_whole_it_is_an_error_and_not_a_new_start(tmp_path):
    for step in (2, 4):
        saved(tmp_path, step).write_bytes(b"x")
    with pytest.raises(UserError, match=r"no checkpoint in .* can be read \(.*state-00000004"):
        run_folder.find_newest(tmp_path)


def test_newest_averages_takes_the_latest_file_that_holds_them(tmp_path):
    assert run_folder.find_newest_averages(tmp_path) is None
    saved(tmp_path, 2)
    checkpoint.save(tmp_path / run_folder.ema_name(6), {"ema.w": torch.ones(2)}, {"step": 6})
    found = run_folder.find_newest_averages(tmp_path)
    assert found is not None
    assert found[2] == {"step": 6}
    found[0].write_bytes(b"x")
    found = run_folder.find_newest_averages(tmp_path)
    assert found is not None
    assert (found[2], len(found[3])) == ({"step": 2}, 1)


def test_prune_keeps_the_last_two_states_all_averages_and_later_damaged_ones(tmp_path):
    for step in (1, 2, 3, 4, 9):
        saved(tmp_path, step)
        checkpoint.save(tmp_path / run_folder.ema_name(step), {"ema.w": torch.ones(2)}, {"step": step})
    (tmp_path / run_folder.full_name(9)).write_bytes(b"damaged")
    run_folder.prune(tmp_path, step=4)
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
    run_folder.prune(tmp_path, step=4)
    assert len(list(tmp_path.iterdir())) == 1
