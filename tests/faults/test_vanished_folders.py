"""A folder that is removed, renamed, emptied or replaced under a running command: told, and nothing is made anew."""

import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pipeline
import pytest
from fault_account import Account
from os_faults import said
from pipeline import HALF, STEPS, assert_same_run, at_step, preprocess, stored_moments, train
from test_hostile_files import contents

from gait_latents.common.errors import Failed
from gait_latents.common.layout import MANIFEST_NAME, SETTINGS_NAME, SPLIT_NAME
from gait_latents.images.split import make_split
from gait_latents.latents import cache as latent_cache
from gait_latents.training.run_folder import Writer
from gait_latents.vae.batch_encoder import BatchEncoder

ROOT = Path(__file__).resolve().parents[2]


def _remove(folder: Path) -> None:
    shutil.rmtree(folder)


def _rename(folder: Path) -> None:
    folder.rename(folder.with_name("moved away"))


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _replace_by_an_empty_one(folder: Path) -> None:
    _rename(folder)
    folder.mkdir()


def _replace_by_another_run(folder: Path) -> None:
    """One of the same images, which has other settings."""
    _rename(folder)
    shutil.copytree(folder.with_name("moved away"), folder)
    (folder / SETTINGS_NAME).write_text("seed: 2\n")


WAYS: dict[str, Callable[[Path], None]] = {
    "removed": _remove,
    "renamed": _rename,
    "emptied": _empty,
    "replaced by an empty one": _replace_by_an_empty_one,
    "replaced by another run": _replace_by_another_run,
}


def _left(folder: Path) -> dict[str, bytes] | None:
    return contents(folder) if folder.exists() else None


# --- a results folder --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "way", [way if way == "removed" else pytest.param(way, marks=pytest.mark.slow) for way in WAYS]
)
def test_a_results_folder_that_vanishes_is_an_error(
    way: str, cached: Path, trained: Path, monkeypatch: pytest.MonkeyPatch, account: Account
) -> None:
    folder, left = cached / "results", []

    def vanish() -> None:
        WAYS[way](folder)
        left.append(_left(folder))

    with monkeypatch.context() as patch:
        at_step(patch, HALF + 2, vanish)
        code, output = said(lambda: train(cached))
    assert left, "it never vanished"
    is_told = f"error: the results folder {folder} is not there any more" in output and "put the folder back" in output
    account.add("a results folder that vanishes", f"it is {way}", cases=1, wrong=code != 1 or _left(folder) != left[0])
    assert is_told and "Traceback" not in output
    if way in ("renamed", "replaced by another run"):  # put back, as the message says
        shutil.rmtree(folder, ignore_errors=True)
        (cached / "moved away").rename(folder)
        assert said(lambda: train(cached))[0] == 0
        assert_same_run(cached, trained)


@pytest.mark.slow
@pytest.mark.parametrize("place", ["grid", "stop"])
def test_it_is_noticed_wherever_something_is_written(
    place: str, cached: Path, monkeypatch: pytest.MonkeyPatch, account: Account
) -> None:
    """While a grid is sampled, and where a signal asks for a last save."""
    folder = cached / "results"
    if place == "stop":
        stop = pipeline.signal_self(15)
        at_step(monkeypatch, HALF + 1, lambda: (_remove(folder), stop()))
        code, output = said(lambda: train(cached, log_every=100))
    else:
        from gait_latents.training.grids import GridMaker

        sample = GridMaker._sample

        def sample_and_vanish(maker: GridMaker, *args: object) -> object:
            result = sample(maker, *args)  # type: ignore[arg-type]
            _remove(folder)
            return result

        monkeypatch.setattr(GridMaker, "_sample", sample_and_vanish)
        code, output = said(lambda: train(cached, num_samples=1))
    account.add("a results folder that vanishes", f"at a {place}", cases=1, wrong=code != 1 or folder.exists())
    assert "is not there any more" in output


def test_a_folder_is_known_by_its_files_where_their_numbers_change(tmp_path: Path) -> None:
    """As on some network file systems; and one file of the two may be edited or removed."""
    split = make_split({"a": ["1", "2"]}, num_users=1, images_per_user=1, seed=0, split="random", split_gap=0)
    writer = Writer(tmp_path / "results", None, "seed: 1\n", split)
    writer.begin(1)
    for _ in range(2):
        shutil.copytree(writer.folder, tmp_path / "copy")
        shutil.rmtree(writer.folder)
        (tmp_path / "copy").rename(writer.folder)
        writer.check(2)
    (writer.folder / SETTINGS_NAME).write_text("seed: 2\n")
    writer.check(2)
    (writer.folder / SPLIT_NAME).unlink()
    with pytest.raises(Failed, match="was removed, renamed or replaced"):
        writer.check(2)


@pytest.mark.slow
def test_a_real_training_whose_folder_is_removed_ends(cached: Path, account: Account) -> None:
    folder = cached / "results"
    flags = pipeline.train_flags(cached, train_num_steps=100_000, save_and_sample_every=1000, num_samples=0)
    process = subprocess.Popen(
        [sys.executable, "train_latent_cfg.py", *flags], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    metrics = folder / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.05)
    folder.rename(cached / "moved away")
    shutil.rmtree(cached / "moved away")
    _, told = process.communicate(timeout=120)
    account.add("a results folder that vanishes", "a real process", cases=1, wrong=process.returncode != 1)
    assert not folder.exists() and "is not there any more" in told and "Traceback" not in told


# --- a cache -----------------------------------------------------------------------------------------------


def _encode_with_a_shard_each(world: Path) -> int:
    row_bytes = 2 * 8 * 8 * 8
    with (
        mock.patch.object(latent_cache, "SHARD_SECONDS", 0.0),
        mock.patch.object(latent_cache.shard_file, "SHARD_BYTES", 2 * row_bytes),
    ):
        return preprocess(world, encode_batch_size=1)


CACHE_WAYS = [way for way in WAYS if way != "replaced by another run"]


@pytest.mark.parametrize(
    "way", [way if way == "emptied" else pytest.param(way, marks=pytest.mark.slow) for way in CACHE_WAYS]
)
@pytest.mark.parametrize("at", [7, 15])
def test_a_cache_that_vanishes_while_it_is_made_is_an_error(
    way: str, at: int, world: Path, trained: Path, monkeypatch: pytest.MonkeyPatch, account: Account
) -> None:
    """It never ends with 0 and a manifest over a part of its latents."""
    folder, encode, count, left = world / "latents_cache", BatchEncoder.__call__, [0], []

    def encode_and_vanish(encoder: BatchEncoder, images: object) -> object:
        count[0] += 1
        if count[0] == at:
            WAYS[way](folder)
            left.append(_left(folder))
        return encode(encoder, images)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(BatchEncoder, "__call__", encode_and_vanish)
        code, output = said(lambda: _encode_with_a_shard_each(world))
    assert left, "it never vanished"
    is_right = code == 1 and _left(folder) == left[0] and not (folder / MANIFEST_NAME).exists()
    account.add("a cache that vanishes", f"while encoding, {way}", cases=1, wrong=not is_right)
    assert "are not there any more" in output and "Traceback" not in output
    assert said(lambda: _encode_with_a_shard_each(world))[0] == 0
    assert stored_moments(folder) == stored_moments(trained / "latents_cache")


@pytest.mark.slow
@pytest.mark.parametrize("way", CACHE_WAYS)
def test_a_training_goes_on_without_the_cache_that_vanishes(
    way: str, world: Path, monkeypatch: pytest.MonkeyPatch, account: Account
) -> None:
    """A cache can be made again: what is still missing stays in memory, and no half of a cache is begun."""
    folder, left = world / "latents_cache", []

    def vanish() -> None:
        WAYS[way](folder)
        left.append(_left(folder))

    monkeypatch.setattr(latent_cache, "SHARD_SECONDS", 0.0)
    at_step(monkeypatch, 2, vanish)
    code, output = said(lambda: train(world, encode_batch_size=1, latent_norm_images=2, num_samples=0))
    account.add("a cache that vanishes", f"while training, {way}", cases=1, wrong=code != 0 or _left(folder) != left[0])
    assert (
        "cannot be written to (what was in it was removed or renamed meanwhile); new latents stay in memory" in output
    )
    assert len(pipeline.losses(world / "results")) == STEPS
