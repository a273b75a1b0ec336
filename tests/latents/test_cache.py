"""The cache: what is stored comes back bit for bit, or not at all, whoever else reads, writes and merges."""

import errno
import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from os_faults import fault_at, fork, forked, overwrite, raising, wait_for
from properties import given, settings, st
from tiny_cache import RECORD, SPACE, found_rows, key, make_space, put, reader, row, stored

from gait_latents.common import files as disk_files
from gait_latents.latents import shard as shard_file
from gait_latents.latents.cache import LatentCache, spaces
from gait_latents.latents.verify import verify

ROOT = Path(__file__).resolve().parents[2]


def files(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(p): (p.stat().st_size, p.stat().st_mtime_ns) for p in folder.rglob("*")}


# --- what the helpers of this file can see -----------------------------------------------------------------


def test_found_rows_notices_a_wrong_row(tmp_path):
    cache = LatentCache(tmp_path, SPACE, writable=True)
    cache.put([key(1)], row(2)[None], ["x"], RECORD)
    with pytest.raises(AssertionError, match="row 1 is wrong"):
        found_rows(cache, [1])


# --- spaces ------------------------------------------------------------------------------------------------


def test_the_seal_knows_the_space_even_where_a_header_lies(tmp_path):
    here, there = make_space(weights="one"), make_space(weights="two")
    path = stored(tmp_path, range(2), here)
    forged = tmp_path / there.id / path.name
    forged.parent.mkdir()
    forged.write_bytes(path.read_bytes().replace(b"one", b"two"))
    cache = reader(tmp_path, there)
    assert len(cache) == 2
    assert found_rows(cache, range(2)) == []


# --- writing and reading -----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(8, 4, 4), (32, 2, 2), (64, 1, 3)])
def test_rows_come_back_bit_for_bit_in_the_order_asked(tmp_path, shape):
    space = make_space(shape)
    stored(tmp_path, range(7), space)
    assert found_rows(reader(tmp_path, space), [3, 0, 6, 6, 3, 99, 5]) == [3, 0, 6, 6, 3, 5]


def test_a_shard_is_a_plain_safetensors_file_named_by_its_content(tmp_path):
    path = stored(tmp_path, range(3))
    assert path.name == hashlib.sha256(path.read_bytes()).hexdigest()[:32] + ".safetensors"
    tensors = safetensors.numpy.load_file(path)
    assert sorted((name, str(t.dtype), t.shape) for name, t in tensors.items()) == [
        ("keys", "uint8", (3, 32)),
        ("moments", "float16", (3, 2, 2, 1)),
        ("seals", "uint32", (3,)),
    ]
    assert [k.tobytes().hex() for k in tensors["keys"]] == [key(i) for i in range(3)]
    with safetensors.safe_open(path, framework="numpy") as file:
        metadata = file.metadata()
    assert json.loads(metadata["names"]) == [f"ID_{i}/{i}.jpg" for i in range(3)]
    assert json.loads(metadata["records"]) == [[3, RECORD]]
    assert json.loads(metadata["space"]) == SPACE.spec


def test_keys_membership_and_length_cover_what_is_published_and_what_waits(tmp_path):
    stored(tmp_path, range(3))
    cache = LatentCache(tmp_path, SPACE, writable=True)
    put(cache, [2, 3, 4])
    assert sorted(cache.keys()) == sorted(key(i) for i in range(5))
    assert len(cache) == 5
    assert cache.pending == 3
    assert key(1) in cache
    assert key(4) in cache
    assert key(5) not in cache
    assert cache.holds([key(9), key(4), key(0)]).tolist() == [False, True, True]
    assert found_rows(cache, range(6)) == [0, 1, 2, 3, 4]


def test_keys_that_end_in_zero_bytes_are_told_apart(tmp_path):
    keys = ["ab" + "00" * 31, "ab" * 32, "00" * 32, "ab" * 31 + "00"]
    cache = LatentCache(tmp_path, SPACE, writable=True)
    cache.put(keys[:2], np.stack([row(0), row(1)]), ["a", "b"], RECORD)
    cache.flush()
    moments, found = reader(tmp_path).read(keys)
    assert found.tolist() == [True, True, False, False]
    assert np.array_equal(moments[:2], [row(0), row(1)])


def test_read_fills_the_array_it_is_given_and_leaves_the_rest(tmp_path):
    stored(tmp_path, range(4))
    out = np.full((3, 2, 2, 1), 7, dtype=np.float16)
    moments, found = reader(tmp_path).read([key(2), key(9), key(1)], out)
    assert moments is out
    assert found.tolist() == [True, False, True]
    assert np.array_equal(out, [row(2), np.full((2, 2, 1), 7), row(1)])
    for wrong in (out[:2], out.astype(np.float32), out.reshape(3, 4, 1, 1)):
        with pytest.raises(ValueError, match="is needed"):
            reader(tmp_path).read([key(0)] * 3, wrong)


def test_reading_in_small_pieces_gives_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(shard_file, "_READ_BYTES", 3 * 8)
    stored(tmp_path, range(20))
    numbers = [*range(20), 5, 5, 19, 0, *range(10, 14)]
    assert found_rows(reader(tmp_path), numbers) == numbers


@settings(max_examples=40, deadline=None)
@given(
    shards=st.lists(st.lists(st.integers(0, 12), min_size=1, max_size=5, unique=True), max_size=4),
    waiting=st.lists(st.integers(0, 15), max_size=4, unique=True),
    asked=st.lists(st.integers(0, 17), max_size=12),
)
def test_any_asked_order_with_repeats_equals_a_dictionary(tmp_path_factory, shards, waiting, asked):
    folder = tmp_path_factory.mktemp("cache")
    cache = LatentCache(folder, SPACE, writable=True)
    for numbers in shards:
        put(cache, numbers)
        cache.flush()
    if waiting:
        put(cache, waiting)
    known = {i for numbers in shards for i in numbers} | set(waiting)
    assert found_rows(cache, asked) == [i for i in asked if i in known]
    assert len(cache) == len(known)


@pytest.mark.parametrize("bad", ["", "ab", "g" * 64, "A" * 64, "a" * 62 + "  ", "a" * 128])
def test_what_is_no_key_is_refused(tmp_path, bad):
    cache = LatentCache(tmp_path, SPACE, writable=True)
    for use in (cache.read, cache.holds, lambda keys: cache.put(keys, row(0)[None], ["x"], {})):
        with pytest.raises(ValueError):
            use([bad])


def test_wrong_shapes_types_and_records_are_refused(tmp_path):
    cache = LatentCache(tmp_path, SPACE, writable=True)
    for rows in (row(0), row(0)[None].astype(np.float32), np.zeros((1, 2, 2, 2), np.float16)):
        with pytest.raises(ValueError, match="the space holds"):
            cache.put([key(0)], rows, ["x"], RECORD)
    with pytest.raises(TypeError):
        cache.put([key(0)], row(0)[None], ["x"], {"path": Path("x")})
    assert cache.pending == 0


def test_later_changes_to_the_callers_array_do_not_reach_the_cache(tmp_path):
    cache = LatentCache(tmp_path, SPACE, writable=True)
    rows, record = row(0)[None].copy(), dict(RECORD)
    cache.put([key(0)], rows, ["x"], record)
    rows[:] = 0
    record["precision"] = "other"
    cache.flush()
    assert found_rows(reader(tmp_path), [0]) == [0]
    assert verify(cache, []).shards[0].records == [(1, RECORD)]


NAMES = ["步态/ü.jpg", "line\nbreak", os.fsdecode(b"not-utf8-\xff"), "n" * 255, '"quoted"\\', "\x00\x1b", ""]


def test_names_may_hold_anything(tmp_path):
    cache = LatentCache(tmp_path, SPACE, writable=True)
    cache.put([key(i) for i in range(7)], np.stack([row(i) for i in range(7)]), NAMES, RECORD)
    cache.flush()
    assert found_rows(reader(tmp_path), range(7)) == [*range(7)]
    assert verify(cache, []).orphaned == {key(i): NAMES[i] for i in range(7)}


def test_names_that_do_not_fit_are_left_out_and_rows_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(shard_file, "_HEADER_BYTES", 2000)
    cache = LatentCache(tmp_path, SPACE, writable=True)
    cache.put([key(i) for i in range(3)], np.stack([row(i) for i in range(3)]), ["n" * 1000] * 3, RECORD)
    cache.flush()
    assert found_rows(reader(tmp_path), range(3)) == [0, 1, 2]
    assert set(verify(cache, []).orphaned.values()) == {""}
    cache.put([key(4)], row(4)[None], ["x"], {"log": "x" * 3000})
    with pytest.raises(ValueError, match="too long"):
        cache.flush()


# --- when rows reach the disk ------------------------------------------------------------------------------


def test_rows_wait_until_a_shard_is_full_or_a_minute_is_over(tmp_path, monkeypatch):
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    monkeypatch.setattr(shard_file, "SHARD_BYTES", 5 * 8)
    cache = LatentCache(tmp_path, SPACE, writable=True)
    put(cache, range(4))
    assert (cache.pending, cache.acknowledged) == (4, 0)
    put(cache, range(4, 12))
    assert (cache.pending, cache.acknowledged) == (2, 10)
    now += 59.9
    put(cache, [12])
    assert cache.pending == 3
    now += 0.2
    cache.commit()
    assert (cache.pending, cache.acknowledged) == (0, 13)
    now += 1000
    put(cache, [13])
    assert cache.pending == 1
    cache.flush()
    assert [len(safetensors.numpy.load_file(path)["keys"]) for path in cache.shard_paths()].count(5) == 2
    assert found_rows(reader(tmp_path), range(14)) == [*range(14)]


def test_a_cache_that_is_not_writable_writes_nothing_at_all(tmp_path, monkeypatch):
    monkeypatch.setattr(shard_file, "SHARD_BYTES", 8)
    stored(tmp_path, [0])
    stored(tmp_path, [1])
    (tmp_path / SPACE.id / ".tmp-x-1-y").write_bytes(b"half")
    os.utime(tmp_path / SPACE.id / ".tmp-x-1-y", (0, 0))
    before = files(tmp_path)
    with fault_at(None) as calls:
        cache = LatentCache(tmp_path, SPACE, writable=False)
        put(cache, range(1, 4))
        cache.merge()
        cache.flush()
        verify(cache, [key(0)])
        assert found_rows(cache, range(5)) == [0, 1, 2, 3]
    assert files(tmp_path) == before
    assert {name for name, _ in calls.log} <= {"open", "fstat", "close"}
    assert LatentCache(tmp_path / "absent", SPACE, writable=False).keys() == []
    assert not (tmp_path / "absent").exists()


# --- what else may lie there -------------------------------------------------------------------------------


def test_a_folder_that_another_process_has_made_to_see_whether_it_can_counts_as_new(tmp_path):
    """Such a process takes it away again, while this one may already have opened it."""
    folder = tmp_path / "cache"
    folder.mkdir()
    probe = folder / f"{disk_files.TEMPORARY_PREFIX}other"
    probe.touch()
    cache = LatentCache(folder, SPACE, writable=True)
    probe.unlink()
    folder.rmdir()
    put(cache, [0])
    cache.flush()
    assert found_rows(reader(folder), range(2)) == [0]


def test_other_names_do_not_exist_for_the_cache(tmp_path):
    path = stored(tmp_path, [0])
    for name in (".tmp-x", "x.safetensors", f"{'A' * 32}.safetensors", path.name + ".bak", f"{'a' * 31}.safetensors"):
        (path.parent / name).write_bytes(b"x")
    cache = reader(tmp_path)
    assert cache.problems == []
    assert len(cache.shard_paths()) == 1
    (tmp_path / "file").write_bytes(b"")
    assert LatentCache(tmp_path / "file", SPACE, writable=False).keys() == []


def test_an_empty_shard_is_valid_and_has_no_rows(tmp_path):
    stored(tmp_path, [0])
    cache = LatentCache(tmp_path, SPACE, writable=True)
    cache._publish_shard({})
    assert found_rows(reader(tmp_path), [0]) == [0]
    assert reader(tmp_path).problems == []
    cache.merge()
    assert len(reader(tmp_path).shard_paths()) == 1
    assert found_rows(reader(tmp_path), [0]) == [0]


def test_a_damaged_row_can_be_put_again(tmp_path):
    path = stored(tmp_path, range(3))
    data = bytearray(path.read_bytes())
    data[-100] ^= 1  # in the last row
    overwrite(path, data)
    cache = LatentCache(tmp_path, SPACE, writable=True)
    assert found_rows(cache, range(3)) == [0, 1]
    assert cache.problems == [f"{path}: 1 of 3 rows are damaged and count as missing"]
    assert key(2) not in cache
    put(cache, [2])
    assert found_rows(cache, range(3)) == [0, 1, 2]
    cache.flush()
    assert found_rows(cache, range(3)) == [0, 1, 2]
    assert found_rows(reader(tmp_path), range(3)) == [0, 1, 2]


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES])
def test_a_shard_that_cannot_be_read_is_a_reported_miss(tmp_path, number):
    path = stored(tmp_path, range(3))
    cache = reader(tmp_path)
    with fault_at(-1, raising(number), only=("open",)):
        assert found_rows(cache, range(3)) == []
        assert os.strerror(number) in cache.problems[0]
        assert os.strerror(number) in reader(tmp_path).problems[0]
    assert str(path) in cache.problems[0]


# --- several copies, several processes ---------------------------------------------------------------------


def two_copies(folder: Path) -> tuple[list[Path], list[np.ndarray]]:
    """Stores two different rows under one key; returns the shards in the order of their names, and their rows."""
    rows = [row(10), row(11)]
    for moments in rows:
        cache = LatentCache(folder, SPACE, writable=True)
        cache.put([key(0)], moments[None], ["x"], RECORD)
        cache.flush()
    paths = reader(folder).shard_paths()
    return paths, [safetensors.numpy.load_file(path)["moments"][0] for path in paths]


def test_the_next_valid_copy_counts_when_the_first_is_damaged(tmp_path):
    paths, rows = two_copies(tmp_path)
    data = bytearray(paths[0].read_bytes())
    data[-33] ^= 0x10
    paths[0].write_bytes(data)
    cache = reader(tmp_path)
    moments, found = cache.read([key(0), key(0)])
    assert found.all()
    assert np.array_equal(moments[1], rows[1])
    report = verify(cache, [key(0)])
    assert (report.good, report.damaged) == ([key(0)], [])


def test_a_forked_child_reads_through_the_same_object(tmp_path):
    stored(tmp_path, range(3))
    cache = reader(tmp_path)

    def read() -> None:
        assert found_rows(cache, range(3)) == [0, 1, 2]

    assert forked(read) == 0
    read()


# --- merging -----------------------------------------------------------------------------------------------


def test_merge_joins_small_shards_and_keeps_rows_names_and_records(tmp_path):
    for i in range(4):
        stored(tmp_path, [2 * i, 2 * i + 1])
    cache = LatentCache(tmp_path, SPACE, writable=True)
    put(cache, [8], {"precision": "float16"})
    cache.merge()
    (path,) = (tmp_path / SPACE.id).iterdir()
    assert cache.shard_paths() == [path]
    assert found_rows(cache, range(9)) == [*range(9)]
    assert found_rows(reader(tmp_path), range(9)) == [*range(9)]
    report = verify(cache, [key(i) for i in range(8)])
    assert report.orphaned == {key(8): "ID_8/8.jpg"}
    precisions = [record["precision"] for count, record in report.shards[0].records for _ in range(count)]
    assert sorted(precisions) == ["float16"] + ["float32"] * 8
    before = files(tmp_path)
    cache.merge()
    assert files(tmp_path) == before


def test_merge_fills_shards_up_to_their_size_and_leaves_full_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(shard_file, "SHARD_BYTES", 5 * 8)
    full = stored(tmp_path, range(5))
    before = full.stat()
    for i in (5, 7, 9):
        stored(tmp_path, [i, i + 1])
    stored(tmp_path, [11])
    LatentCache(tmp_path, SPACE, writable=True).merge()
    sizes = [len(safetensors.numpy.load_file(path)["keys"]) for path in reader(tmp_path).shard_paths()]
    assert sorted(sizes) == [2, 5, 5]
    assert full.stat().st_mtime_ns == before.st_mtime_ns
    assert found_rows(reader(tmp_path), range(12)) == [*range(12)]


def test_merge_carries_good_rows_only_and_other_spaces_are_not_touched(tmp_path):
    other = make_space(weights="other")
    stored(tmp_path, range(2), other)
    stored(tmp_path, range(2, 4), other)
    paths = [stored(tmp_path, range(3)), stored(tmp_path, range(3, 6))]
    data = bytearray(paths[0].read_bytes())
    data[-100] ^= 1  # in the last row
    paths[0].write_bytes(data)
    (tmp_path / SPACE.id / f"{'0' * 32}.safetensors").write_bytes(b"damaged")
    before = files(tmp_path / other.id)
    LatentCache(tmp_path, SPACE, writable=True).merge()
    assert files(tmp_path / other.id) == before
    assert found_rows(reader(tmp_path), range(6)) == [0, 1, 3, 4, 5]
    assert verify(reader(tmp_path), [key(2)]).missing == [key(2)]


def test_a_merge_whose_result_is_one_of_its_sources_keeps_it(tmp_path):
    def name_of(numbers) -> str:
        cache = LatentCache(tmp_path / "elsewhere", SPACE, writable=True)
        put(cache, numbers)
        cache.flush()
        return max(cache.shard_paths(), key=lambda path: path.stat().st_mtime_ns).name

    # The shard whose name comes first holds every row of the second, so that merging gives its content again.
    whole = next(n for n in range(2, 50) if name_of(range(n)) < name_of([0]))
    stored(tmp_path, range(whole))
    stored(tmp_path, [0])
    LatentCache(tmp_path, SPACE, writable=True).merge()
    assert [path.name for path in reader(tmp_path).shard_paths()] == [name_of(range(whole))]
    assert found_rows(reader(tmp_path), range(whole)) == [*range(whole)]


def test_a_shard_that_cannot_be_read_is_not_removed_by_a_merge(tmp_path):
    paths = [stored(tmp_path, [i]) for i in range(3)]
    cache = LatentCache(tmp_path, SPACE, writable=True)

    def fail_one(name, real, args):
        if str(args[0]) == str(paths[1]):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(*args)

    with fault_at(-1, fail_one, only=("open",)):
        cache._merge([cache._shards[path.name] for path in sorted(paths)])
    assert paths[1].exists()
    assert found_rows(reader(tmp_path), range(3)) == [0, 1, 2]
    assert len(reader(tmp_path).shard_paths()) == 2


def test_opening_for_writing_clears_up_after_dead_writers(tmp_path):
    stored(tmp_path, [0])
    process = fork(lambda: None)
    wait_for(process)
    for folder in (tmp_path, tmp_path / SPACE.id):
        (folder / f"{disk_files.TEMPORARY_PREFIX}{disk_files.host_digest()}-{process}-x").write_bytes(b"half")
    LatentCache(tmp_path, SPACE, writable=True)
    assert not list(tmp_path.rglob(".tmp*"))


# --- manifest, spaces, verify ------------------------------------------------------------------------------


def test_spaces_lists_those_with_a_readable_shard(tmp_path):
    other = make_space((4, 2, 2))
    stored(tmp_path, [0])
    broken = stored(tmp_path, [0], other)
    (broken.parent / f"{'0' * 32}.safetensors").write_bytes(b"")
    (tmp_path / ("0" * 16)).mkdir()
    (tmp_path / "notes").mkdir()
    (tmp_path / "file").write_bytes(b"")
    assert spaces(tmp_path) == {SPACE.id: SPACE.spec, other.id: other.spec}
    assert spaces(tmp_path / "absent") == {}
    broken.write_bytes(b"")
    assert spaces(tmp_path) == {SPACE.id: SPACE.spec}


def test_verify_tells_good_damaged_missing_and_orphaned_rows(tmp_path):
    stored(tmp_path, [0], make_space(weights="other"))
    path = stored(tmp_path, range(4))
    data = bytearray(path.read_bytes())
    data[-129] ^= 1  # in the last row
    overwrite(path, data)
    (tmp_path / SPACE.id / f"{'0' * 32}.safetensors").write_bytes(b"")
    report = verify(reader(tmp_path), [key(i) for i in (3, 1, 0, 7, 1)])
    assert report.good == [key(1), key(0)]
    assert report.damaged == [key(3)]
    assert report.missing == [key(7)]
    assert report.orphaned == {key(2): "ID_2/2.jpg"}
    (shard,) = report.shards
    assert (shard.path, shard.num_rows, shard.num_good, shard.num_bytes) == (path, 4, 3, len(data))
    assert shard.records == [(4, RECORD)]
    assert len(report.problems) == 3
    assert "it is empty" in report.problems[0]
    assert "not the one that its name stands for" in report.problems[1]
    assert "1 of 4 rows are damaged" in report.problems[2]


def test_verify_of_a_sound_cache_finds_nothing_wrong(tmp_path):
    stored(tmp_path, range(4))
    report = verify(reader(tmp_path), [key(i) for i in range(4)])
    assert report.good == [key(i) for i in range(4)]
    assert (report.damaged, report.missing, report.orphaned, report.problems) == ([], [], {}, [])


def test_verify_notices_a_name_changed_by_the_disk(tmp_path):
    path = stored(tmp_path, range(2))
    path.write_bytes(path.read_bytes().replace(b"ID_1", b"ID_9"))
    report = verify(reader(tmp_path), [key(0), key(1)])
    assert len(report.good) == 2
    assert "not the one that its name stands for" in report.problems[0]


def test_the_cache_does_not_import_torch():
    code = "import sys; from gait_latents.latents import cache, manifest; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
