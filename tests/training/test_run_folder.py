"""A folder of checkpoints: the newest whole one is found, what is no longer needed goes, and one training writes."""

import itertools
import os
from pathlib import Path

import pytest
import torch
from os_faults import fault_at, forked, killing
from tiny_checkpoint import saved

from gait_latents.common.errors import Failed, UserError
from gait_latents.common.layout import SETTINGS_NAME
from gait_latents.images.split import Split
from gait_latents.training import checkpoint, run_folder
from gait_latents.training.metrics_log import Metrics
from gait_latents.training.run_folder import Writer


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


# --- who writes --------------------------------------------------------------------------------------------


class Training:
    """A training as far as it writes in a run folder: it begins, and then takes steps, each with a line of metrics."""

    def __init__(self, folder: Path) -> None:
        self.writer = Writer(folder, run_folder.newest_stamp(folder), "dim: 8\n", Split((), (), (), (), {}))
        self.metrics = Metrics(folder, step=0, check=self.writer.check)
        self.step, self.has_ended = 0, False

    def go_on(self, *, steps: int) -> None:
        """Takes a step, unless it has taken so many or has ended in company."""
        if self.has_ended or self.step == steps:
            return
        self.step += 1
        try:
            if not self.writer.has_begun:
                self.writer.begin(self.step)
                self.metrics.publish()
            self.metrics.add(step=self.step, loss=1.0)
        except Failed as error:
            assert "another training saves in" in str(error)
            self.has_ended = True


@pytest.mark.parametrize("count", [2, 3])
def test_of_trainings_that_begin_in_one_folder_in_any_order_the_last_goes_on(tmp_path, count):
    steps, num_orders = 3, 0
    for order in sorted(set(itertools.permutations(list(range(count)) * (4 if count == 2 else 2)))):
        folder, num_orders = tmp_path / f"{num_orders}", num_orders + 1
        trainings = [Training(folder) for _ in range(count)]
        for one in order:
            trainings[one].go_on(steps=steps)
        for one in trainings:
            for _ in range(steps):
                one.go_on(steps=steps)
        alive = [one for one in trainings if not one.has_ended]
        rows = [row["step"] for row in Metrics(folder, step=steps).rows]
        assert rows == list(range(1, steps + 1)) and alive, order
        begun_last = max(range(count), key=order.index)
        assert not trainings[begun_last].has_ended
    assert num_orders in (70, 90)


def test_a_training_that_has_looked_before_another_saved_ends_and_the_other_goes_on(tmp_path):
    first, second = Training(tmp_path), Training(tmp_path)
    first.go_on(steps=2)
    saved(tmp_path, 1)
    first.writer.note_save()
    second.go_on(steps=2)
    first.go_on(steps=2)
    assert second.has_ended and not first.has_ended


def test_a_killed_training_holds_up_none_that_comes_after_it(tmp_path):
    Training(tmp_path).go_on(steps=1)
    saved(tmp_path, 1)
    after = Training(tmp_path)
    after.go_on(steps=2)
    after.go_on(steps=2)
    assert not after.has_ended


@pytest.mark.parametrize("text", [None, b"dim: 8\n", b"# written by the training of mine\n", b"\xff"])
def test_where_the_settings_do_not_tell_who_writes_the_saves_do(tmp_path, text):
    training = Training(tmp_path)
    training.go_on(steps=3)
    (tmp_path / SETTINGS_NAME).unlink()
    if text is not None:
        (tmp_path / SETTINGS_NAME).write_bytes(text)
    training.go_on(steps=3)
    assert not training.has_ended
    saved(tmp_path, 2)
    training.go_on(steps=3)
    assert training.has_ended


def test_metrics_that_another_has_changed_are_written_anew(tmp_path):
    training = Training(tmp_path)
    for harm in (b"", b'{"step": 1}\n{"step": 2}\n', None):
        training.go_on(steps=9)
        training.metrics.path.unlink()
        if harm is not None:
            training.metrics.path.write_bytes(harm)
    training.go_on(steps=9)
    assert [row["step"] for row in Metrics(tmp_path, step=9).rows] == [1, 2, 3, 4]
