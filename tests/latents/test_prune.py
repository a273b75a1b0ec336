"""A prune removes what nobody needs, says so before, and takes nothing that a split names."""

import os
import shutil
from pathlib import Path
from typing import Any

import pipeline
import pytest
import tiny
import tiny_cache
import tiny_vae
from os_faults import forked
from tiny_cache import SPACE, found_rows, key, make_space, put, reader, stored, strangers

import preprocess_latents
from gait_latents.common import files
from gait_latents.images.split import read_split
from gait_latents.latents import cache as latent_cache
from gait_latents.latents.cache import LatentCache
from gait_latents.latents.prune import plan_prune


def needed(*numbers: int) -> set[str]:
    return {key(i) for i in numbers}


def on_disk(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- rows --------------------------------------------------------------------------------------------------


def test_needed_rows_stay_and_the_rest_goes(tmp_path):
    whole, mixed, spare = stored(tmp_path, [0, 1]), stored(tmp_path, [1, 2, 3]), stored(tmp_path, [4, 5])
    cache = LatentCache(tmp_path, SPACE, writable=True)
    assert cache.surplus(needed(0, 1, 3)) == (3, 36 + 8 + spare.stat().st_size)
    cache.prune(needed(0, 1, 3))
    assert found_rows(cache, range(6)) == found_rows(reader(tmp_path), range(6)) == [0, 1, 3]
    assert not strangers(reader(tmp_path), [0, 1, 3])
    assert whole.exists() and not mixed.exists() and not spare.exists()
    assert len(list((tmp_path / SPACE.id).iterdir())) == 2
    assert cache.surplus(needed(0, 1, 3)) == (0, 0) and not cache.problems


def test_names_and_records_of_kept_rows_stay(tmp_path):
    stored(tmp_path, [0, 1])
    cache = LatentCache(tmp_path, SPACE, writable=True)
    cache.prune(needed(1))
    (path,) = cache.shard_paths()
    ((kept, row),) = cache._load_shard(path)
    assert (kept, row.name, row.record) == (key(1), "ID_1/1.jpg", tiny_cache.RECORD)


def test_a_space_that_nobody_needs_goes_with_its_folder(tmp_path):
    other = make_space(weights="other")
    stored(tmp_path, [0])
    stored(tmp_path, [0, 1], other)
    LatentCache(tmp_path, other, writable=True).prune(())
    assert not (tmp_path / other.id).exists()
    assert found_rows(reader(tmp_path), [0]) == [0]


def test_a_good_copy_counts_and_a_damaged_row_is_not_carried_on(tmp_path):
    path = stored(tmp_path, [0, 1, 2])
    data = bytearray(path.read_bytes())
    at = data.index(tiny_cache.row(1).tobytes())
    data[at] ^= 1
    path.write_bytes(data)
    stored(tmp_path, [1])
    LatentCache(tmp_path, SPACE, writable=True).prune(needed(0, 1))
    cache = reader(tmp_path)
    assert found_rows(cache, range(3)) == [0, 1]
    assert not cache.problems


def test_a_shard_that_cannot_be_read_is_left_alone(tmp_path):
    path = stored(tmp_path, [0, 1])
    cache = LatentCache(tmp_path, SPACE, writable=True)
    before = path.read_bytes()
    path.write_bytes(before[:-10])
    cache.prune(needed(0))
    assert path.exists() and len(cache.problems) == 1


def test_a_cache_that_is_not_writable_is_not_pruned(tmp_path):
    stored(tmp_path, [0, 1])
    before = on_disk(tmp_path)
    reader(tmp_path).prune(needed(0))
    assert on_disk(tmp_path) == before


def test_rows_published_or_merged_meanwhile_stay(tmp_path):
    stored(tmp_path, [0, 1])
    stored(tmp_path, [2])
    cache, old = LatentCache(tmp_path, SPACE, writable=True), reader(tmp_path)
    stored(tmp_path, [3])  # by an encoder, after the prune looked
    cache.prune(needed(0, 2))
    assert found_rows(reader(tmp_path), range(4)) == [0, 2, 3]
    assert found_rows(old, range(4)) == [0, 2, 3]  # a reader that was open before
    late = LatentCache(tmp_path, SPACE, writable=True)
    LatentCache(tmp_path, SPACE, writable=True).merge()
    late.prune(needed(0))
    assert found_rows(reader(tmp_path), range(4)) == [0, 2, 3]  # the merged shard was not in its view
    assert not late.problems


def test_an_encoder_that_is_open_during_a_prune_loses_nothing(tmp_path):
    stored(tmp_path, [0, 1])
    encoder = LatentCache(tmp_path, SPACE, writable=True)
    put(encoder, [2])
    LatentCache(tmp_path, SPACE, writable=True).prune(needed(0))
    encoder.merge()
    assert found_rows(reader(tmp_path), range(3)) == [0, 2]
    assert not encoder.problems


# --- the command -------------------------------------------------------------------------------------------


def prune(world: Path, **changes: object) -> int:
    settings = {"output_folder": world / "latents_cache", "keep_for": world / "results", **changes}
    return preprocess_latents.main(["--prune", *tiny.flags(settings)])


@pytest.fixture
def crowded(cached: Path, trained: Path) -> Path:
    """A cache with 15 needed rows, 5 that only a run needs, rows of another space, and a left-over temporary."""
    folder = cached / "latents_cache"
    assert pipeline.preprocess(cached, image_size=32) == 0
    tiny.make_images(cached / "data", {"ID_2": 8}, seed=1)  # eight others under the same names
    assert pipeline.preprocess(cached) == 0
    (folder / f"{files.TEMPORARY_PREFIX}{files.host_digest()}-999999999-a").write_bytes(b"x" * 100)
    shutil.copytree(trained / "results", cached / "results")  # of the eight before
    return cached


def test_without_yes_nothing_is_touched(crowded, capsys):
    before = on_disk(crowded / "latents_cache")
    capsys.readouterr()
    assert prune(crowded) == 0
    said = capsys.readouterr().out
    assert "orphaned" not in said  # the run needs the images as they were
    assert "other kind  15 rows" in said and "image_size: 16 vs 32" in said
    assert "1 temporary files of killed processes (100 B)" in said
    assert "nothing was removed; the same command with --yes frees" in said
    assert on_disk(crowded / "latents_cache") == before


def test_what_a_run_needs_is_kept_and_what_nobody_needs_goes(crowded, encoder, capsys):
    folder = crowded / "latents_cache"
    assert prune(crowded, yes="true") == 0
    assert not list(folder.glob(".tmp-*")) and len([path for path in folder.iterdir() if path.is_dir()]) == 1
    assert len(pipeline.open_cache(folder)) == 20
    shutil.rmtree(crowded / "results")
    capsys.readouterr()
    assert preprocess_latents.main(["--prune", "--output_folder", str(folder), "--yes"]) == 0
    said = capsys.readouterr().out
    assert "orphaned    5 rows" in said and "will have to encode these again" in said
    split = read_split(folder)
    assert split is not None
    assert set(pipeline.open_cache(folder).keys()) == {entry.key for entry in split.train}
    encoder.forget()
    assert pipeline.preprocess(crowded) == 0 and encoder.num_images == 0
    capsys.readouterr()
    assert prune(crowded, keep_for=None) == 0
    assert "nothing to remove" in capsys.readouterr().out


def test_a_run_without_full_states_keeps_its_kind_of_latents(cached, trained, encoder, capsys):
    shutil.copytree(trained / "results", cached / "results")
    for path in (cached / "results").glob("state-*"):
        path.unlink()
    tiny_vae.save_tiny_vae(cached / "vae.pt", seed=1)
    assert pipeline.preprocess(cached) == 0
    assert len(latent_cache.spaces(cached / "latents_cache")) == 2
    capsys.readouterr()
    assert prune(cached) == 0
    assert "nothing to remove" in capsys.readouterr().out
    assert prune(cached, keep_for=None) == 0
    assert "other kind  15 rows" in capsys.readouterr().out


def test_what_is_freed_is_what_was_said(crowded, capsys):
    folder = crowded / "latents_cache"
    plan = plan_prune(folder, pipeline.open_cache(folder).space, {})
    before = sum(map(len, on_disk(folder).values()))
    plan.carry_out()
    assert before - sum(map(len, on_disk(folder).values())) == plan.num_bytes
    assert {path.name for path in on_disk(folder)} == {"manifest.json", "split.json", "preview.png"}


def test_what_cannot_be_pruned_is_refused(cached, tmp_path, capsys):
    folder = cached / "latents_cache"
    capsys.readouterr()
    assert prune(cached, keep_for=tmp_path) == 2
    assert "is no run folder: it has no split.json" in pipeline.one_error(capsys)
    assert preprocess_latents.main(["--yes", "--output_folder", str(folder)]) == 2
    assert "--yes belongs to --prune" in pipeline.one_error(capsys)
    (tmp_path / "odd.yaml").write_text('keep_for: ["a\\0b"]\n')
    assert prune(cached, keep_for=None, config=tmp_path / "odd.yaml") == 2
    assert "that can be no path" in pipeline.one_error(capsys)
    for name in ("split.json", "manifest.json"):
        (folder / name).rename(tmp_path / name)
        assert prune(cached, keep_for=None) == 2
        assert "holds no finished cache" in pipeline.one_error(capsys)
        (tmp_path / name).rename(folder / name)


def test_a_read_only_cache_is_listed_and_not_pruned(cached, capfd):
    folder = cached / "latents_cache"

    def child() -> None:
        try:
            pipeline.mount_read_only(folder)
        except OSError:
            os._exit(77)
        os._exit(10 * prune(cached, keep_for=None) + prune(cached, keep_for=None, yes="true"))

    code = forked(child)
    if code == 77:
        pytest.skip("this system lets nobody mount a folder read-only")
    captured = capfd.readouterr()
    assert code == 2 and "nothing to remove" in captured.out and "cannot be written to" in captured.err


def test_a_full_disk_is_made_room_on(crowded, monkeypatch, capsys):
    folder = crowded / "latents_cache"
    stored(folder, [0, 1], pipeline.open_cache(folder).space)  # a shard that nobody needs, beside one needed in part
    shutil.rmtree(crowded / "results")
    publish, room = files.publish, folder / pipeline.open_cache(folder).space.id

    def full(path: Path, data: object, **where: Any) -> None:
        spare = [place for place in folder.glob("*/*.safetensors") if place.parent != room]
        if spare or len(list(room.iterdir())) > 1:
            raise OSError(28, "No space left on device", str(path))
        publish(path, data, **where)  # type: ignore[arg-type]

    monkeypatch.setattr(files, "publish", full)
    monkeypatch.setattr(files, "why_not_writable", lambda place: "No space left on device")
    capsys.readouterr()
    assert prune(crowded, yes="true", keep_for=None) == 0
    split = read_split(folder)
    assert split is not None
    assert set(pipeline.open_cache(folder).keys()) == {entry.key for entry in split.train}


def test_a_prune_that_cannot_publish_removes_nothing_that_is_needed(crowded, monkeypatch, capsys):
    folder = crowded / "latents_cache"
    pipeline.open_cache(folder)
    LatentCache(folder, pipeline.open_cache(folder).space, writable=True).merge()
    before = pipeline.stored_moments(folder)

    def full(path: Path, data: object, **where: Any) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(files, "publish", full)
    shutil.rmtree(crowded / "results")
    capsys.readouterr()
    assert prune(crowded, yes="true", keep_for=None) == 1
    assert "every latent that is needed is there" in pipeline.one_error(capsys)
    assert pipeline.stored_moments(folder) == before
