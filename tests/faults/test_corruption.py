"""What a disk can do to a file that was whole: flipped bits, lost ends, zeros, exchanged parts."""

import os
import random
import re
import shutil
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import numpy as np
import pytest
import tiny_cache
from fault_account import Account
from os_faults import each_flipped_bit, overwrite
from pipeline import CLASSES, STEPS, generate, preprocess, state_digests, stored_moments, train
from tiny_cache import SPACE, key, reader, row, strangers
from tiny_checkpoint import same, saved, tiny_tensors
from tiny_images import small_split

from gait_latents.common.errors import UserError
from gait_latents.common.layout import MANIFEST_NAME, SPLIT_NAME
from gait_latents.images.split import Split, make_split, read_split
from gait_latents.latents.manifest import read_manifest, write_manifest
from gait_latents.latents.verify import verify
from gait_latents.training import checkpoint, run_folder
from gait_latents.training.checkpoint import DamagedCheckpoint

# --- a shard -----------------------------------------------------------------------------------------------

ROWS, OTHERS = range(3), range(3, 5)  # those of the shard that is damaged, and of one beside it


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    """A shard with ROWS, beside one with OTHERS."""
    tiny_cache.stored(tmp_path, OTHERS)
    return tiny_cache.stored(tmp_path, ROWS)


def served(folder: Path) -> tuple[set[int], int]:
    """Returns the numbers of the rows that are served as they were stored, and how many are served otherwise.

    A shard whose rows are missing must be named as damaged.
    """
    cache, numbers = reader(folder), [*ROWS, *OTHERS]
    moments, found = cache.read([key(i) for i in numbers])
    right = {i for i, m, f in zip(numbers, moments, found, strict=True) if f and np.array_equal(m, row(i, SPACE))}
    invented = strangers(cache, numbers)
    num_invented = int(cache.read(invented)[1].sum()) if invented else 0
    assert right >= {*ROWS} or cache.problems
    return right, int(found.sum()) - len(right) + num_invented


def losses(right: set[int], spared: Collection[int] = ()) -> int:
    """Returns how many rows are missing of those that were not damaged."""
    return len({*OTHERS, *spared} - right)


def informative_bytes(data: bytes) -> range:
    """Returns the place of the names and records in a shard, which no row depends on."""
    return range(data.index(b'"names":'), data.index(b'"space":'))


def row_at(position: int, data: bytes) -> int | None:
    """Returns the number of the row that a byte of a shard belongs to; None for the header."""
    place = position - 8 - int.from_bytes(data[:8], "little")
    for size in (4, 8, 32):  # seals, moments, keys
        if 0 <= place < size * len(ROWS):
            return place // size
        place -= size * len(ROWS)
    return None


def test_no_flipped_bit_of_a_shard_gives_a_wrong_row(shard: Path, account: Account) -> None:
    data, cases, lost, wrong = shard.read_bytes(), 0, 0, 0
    harmless = informative_bytes(data)
    for position in each_flipped_bit(shard):
        right, num_wrong = served(shard.parents[1])
        hit = row_at(position, data)
        lost += losses(right, [] if hit is None else set(ROWS) - {hit})
        wrong += num_wrong + (right >= set(ROWS) and position not in harmless)  # a flip that nobody noticed
        cases += 1
    assert served(shard.parents[1]) == ({*ROWS, *OTHERS}, 0)
    account.add("flipped bit in a shard", "each bit", cases=cases, lost=lost, wrong=wrong)


def test_a_truncated_shard_only_has_misses_whatever_its_length(shard: Path, account: Account) -> None:
    cases, lost, wrong = 0, 0, 0
    for length in reversed(range(shard.stat().st_size)):
        os.truncate(shard, length)
        right, num_wrong = served(shard.parents[1])
        lost, wrong, cases = lost + losses(right), wrong + num_wrong + len(right & set(ROWS)), cases + 1
        assert [str(shard) in line for line in reader(shard.parents[1]).problems] == [True]
    account.add("shard cut short", "each length", cases=cases, lost=lost, wrong=wrong)


def test_a_shard_cut_after_it_was_opened_only_has_misses(shard: Path, account: Account) -> None:
    cache = reader(shard.parents[1])
    os.truncate(shard, shard.stat().st_size - 3 * 32 - 1)
    assert not cache.read([key(2)])[1].any()
    moments, found = cache.read([key(0), key(1)])
    assert found.all()
    wrong = sum(not np.array_equal(moments[i], row(i, SPACE)) for i in (0, 1))
    assert "ends too early" in cache.problems[0]
    account.add("shard cut short", "after it was opened", cases=1, wrong=wrong)


def spoiled(data: bytes) -> Iterator[tuple[str, bytes]]:
    """Yields (what was done, content) of other ways in which a file loses its content."""
    for extra in (b"\0", b" ", b" " * 8, b"x" * 44, data):
        yield "bytes appended", data + extra
    yield "all zeros", bytes(len(data))
    yield "all zeros", b""
    for half in (len(data) // 2, len(data) - 100):
        yield "the end zeros", data[:half] + bytes(len(data) - half)
        yield "the beginning zeros", bytes(half) + data[half:]
    for begin in range(0, len(data), 64):
        yield "a block of zeros", data[:begin] + bytes(len(data[begin : begin + 64])) + data[begin + 64 :]
        yield "a block twice", data[:begin] + data[max(0, begin - 64) : begin] + data[begin:][64:]


def test_a_shard_that_lost_its_content_only_has_misses(shard: Path, account: Account) -> None:
    data = shard.read_bytes()
    for what, content in spoiled(data):
        overwrite(shard, content)
        right, num_wrong = served(shard.parents[1])
        is_partial = what.startswith("a block")  # other rows of the shard may go on
        wrong = num_wrong + (not is_partial and len(right & set(ROWS)))
        account.add(f"shard: {what}", "whole file", cases=1, lost=losses(right), wrong=wrong)
        assert content == data or verify(reader(shard.parents[1]), []).problems or is_partial


@pytest.mark.parametrize("parts", [["keys"], ["moments"], ["seals"], ["keys", "seals"], ["moments", "seals"]])
def test_rows_swapped_in_part_are_misses(shard: Path, account: Account, parts: list[str]) -> None:
    overwrite(shard, swapped(shard.read_bytes(), parts))
    right, wrong = served(shard.parents[1])
    assert right == {2, *OTHERS}
    account.add("rows of a shard exchanged", "in part", cases=1, lost=losses(right, [2]), wrong=wrong)


def test_rows_swapped_whole_are_still_right(shard: Path, account: Account) -> None:
    overwrite(shard, swapped(shard.read_bytes(), ["seals", "moments", "keys"]))
    right, wrong = served(shard.parents[1])
    account.add("rows of a shard exchanged", "whole", cases=1, lost=losses(right, ROWS), wrong=wrong)


def swapped(data: bytes, parts: list[str]) -> bytes:
    """Exchanges the first two rows of a shard in some of its parts."""
    content = bytearray(data)
    size = {"seals": 4, "moments": 8, "keys": 32}
    start = {"seals": len(data) - 3 * 44, "moments": len(data) - 3 * 40, "keys": len(data) - 3 * 32}
    for part in parts:
        first, second = start[part], start[part] + size[part]
        third = second + size[part]
        content[first:second], content[second:third] = content[second:third], content[first:second]
    return bytes(content)


# --- a checkpoint ------------------------------------------------------------------------------------------


def wrong_states(folder: Path, older: Path, newer: Path) -> int:
    """Returns 0 when the state of `older` is taken and the damage of `newer` told, else 1."""
    try:
        found = run_folder.find_newest(folder)
    except UserError:  # of another format number: that one stops the run, and is told
        return 0
    assert found is not None
    path, tensors, meta, warnings = found
    is_told = len(warnings) == 1 and warnings[0].startswith(f"{newer}: ") and warnings[0].endswith("the one before")
    return int(not (path == older and meta == {"step": 2} and same(tensors, tiny_tensors(2)) and is_told))


def test_for_every_flipped_bit_the_state_before_is_taken_and_the_damage_told(tmp_path: Path, account: Account) -> None:
    older, newer = saved(tmp_path, 2), saved(tmp_path, 4)
    outcomes = [wrong_states(tmp_path, older, newer) for _ in each_flipped_bit(newer)]
    account.add("flipped bit in a checkpoint", "each bit", cases=len(outcomes), wrong=sum(outcomes))
    found = run_folder.find_newest(tmp_path)
    assert found is not None and (found[0], found[3]) == (newer, [])


def test_a_truncated_checkpoint_is_never_taken(tmp_path: Path, account: Account) -> None:
    older, newer = saved(tmp_path, 2), saved(tmp_path, 4)
    outcomes = []
    for length in reversed(range(newer.stat().st_size)):
        os.truncate(newer, length)
        outcomes.append(wrong_states(tmp_path, older, newer))
    account.add("checkpoint cut short", "each length", cases=len(outcomes), wrong=sum(outcomes))


def test_a_checkpoint_that_lost_its_content_is_never_taken(tmp_path: Path, account: Account) -> None:
    older, newer = saved(tmp_path, 2), saved(tmp_path, 4)
    data = newer.read_bytes()
    for what, content in spoiled(data):
        if content != data:
            overwrite(newer, content)
            account.add(f"checkpoint: {what}", "whole file", cases=1, wrong=wrong_states(tmp_path, older, newer))


def test_two_tensors_exchanged_are_damage(tmp_path: Path, account: Account) -> None:
    path = tmp_path / "x"
    checkpoint.save(path, {"a": tiny_tensors(1)["model.w"], "b": tiny_tensors(2)["model.w"]}, {})
    data = path.read_bytes()
    numbers = data[:-64] + data[-32:] + data[-64:-32]
    names = data.replace(b'"a":', b'"?":').replace(b'"b":', b'"a":').replace(b'"?":', b'"b":')
    for content in (numbers, names):
        overwrite(path, content)
        with pytest.raises(DamagedCheckpoint, match="checksum"):
            checkpoint.load(path)
    account.add("tensors of a checkpoint exchanged", "numbers, names", cases=2)


# --- manifest and split ------------------------------------------------------------------------------------


def count_wrong(path: Path, read: Callable[[], object], contents: Iterator[bytes]) -> tuple[int, int]:
    """Returns (number of contents, how many are read as anything but the original, or refused without a name)."""
    original, cases, wrong = read(), 0, 0
    for content in contents:
        overwrite(path, content)
        cases += 1
        try:
            wrong += read() != original
        except UserError as error:
            wrong += str(path) not in str(error)
    return cases, wrong


def flipped(data: bytes) -> Iterator[bytes]:
    """Yields the content with each of its bits flipped in turn."""
    for position in range(len(data)):
        for bit in range(8):
            yield data[:position] + bytes([data[position] ^ 1 << bit]) + data[position + 1 :]


def cut_short(data: bytes) -> Iterator[bytes]:
    """Yields each beginning of the content, itself left out."""
    return (data[:length] for length in range(len(data)))


NONSENSE = (b"{", b"[]", b"null", b"\0" * 300, b"[" * 100_000, b'{"format": 1}', b"\xff", b"{}")


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    """A small manifest.json."""
    write_manifest(tmp_path, {"seed": 42, "path": "/a b"}, SPACE, {"scale_factor": 0.18215})
    return tmp_path / MANIFEST_NAME


@pytest.fixture
def split(tmp_path: Path) -> Path:
    """A small split.json."""
    (tmp_path / SPLIT_NAME).write_bytes(small_split().to_bytes())
    return tmp_path / SPLIT_NAME


def everything(data: bytes) -> dict[str, Iterator[bytes]]:
    """Returns the ways in which a small file is damaged, and for each the contents."""
    others = [content for _, content in spoiled(data)] + list(NONSENSE)
    return {"each bit": flipped(data), "each length": cut_short(data), "zeros, blocks, more bytes": iter(others)}


def test_a_damaged_manifest_is_a_clear_error_and_never_another_one(manifest: Path, account: Account) -> None:
    data, folder = manifest.read_bytes(), manifest.parent
    for how, contents in everything(data).items():
        cases, wrong = count_wrong(manifest, lambda: read_manifest(folder), contents)
        account.add("damaged manifest", how, cases=cases, wrong=wrong)
        overwrite(manifest, data)
    for content in (b"", *NONSENSE):
        overwrite(manifest, content)
        with pytest.raises(UserError, match=r"manifest\.json is damaged or was edited.*remove it"):
            read_manifest(folder)


def test_a_damaged_split_is_a_clear_error_and_never_another_one(split: Path, account: Account) -> None:
    data, folder = split.read_bytes(), split.parent
    for how, contents in everything(data).items():
        cases, wrong = count_wrong(split, lambda: read_split(folder), contents)
        account.add("damaged split", how, cases=cases, wrong=wrong)
        overwrite(split, data)
    for content in (b"", *NONSENSE):
        overwrite(split, content)
        with pytest.raises(UserError, match=r"split\.json is damaged or was edited"):
            read_split(folder)


# --- the scripts -------------------------------------------------------------------------------------------


@pytest.fixture
def finished(trained: Path, tmp_path: Path) -> Path:
    """A world of one's own after preprocessing and a whole training run."""
    return shutil.copytree(trained, tmp_path / "world")


def another_split(data: bytes) -> bytes:
    """Returns a split of the same images by another seed, whole in itself."""
    split = Split.from_bytes(data, "")
    rule = {**split.rule, "seed": 43}
    return make_split(split.index(), **rule).with_keys(split.keys()).to_bytes()  # type: ignore[arg-type]


def test_a_damaged_split_of_a_run_stops_it_rather_than_drawing_another(
    finished: Path, account: Account, capsys: pytest.CaptureFixture[str]
) -> None:
    path = finished / "results" / SPLIT_NAME
    data = path.read_bytes()
    place = data.index(b"ID_2")
    damages = {
        "a flipped bit": data[:place] + b"Y" + data[place + 1 :],
        "cut short": data[:-100],
        "empty": b"",
        "zeros": bytes(len(data)),
        "another split": another_split(data),
    }
    before = {file.name: file.read_bytes() for file in (finished / "results").iterdir()}
    for what, content in damages.items():
        overwrite(path, content)
        capsys.readouterr()
        assert train(finished, train_num_steps=STEPS + 1) == 2, what
        said = capsys.readouterr().err
        after = {file.name: file.read_bytes() for file in (finished / "results").iterdir()}
        wrong = int(len(said.splitlines()) != 1 or str(finished) not in said)
        wrong += after != {**before, SPLIT_NAME: content}
        account.add("damaged split of a run", f"training goes on: {what}", cases=1, wrong=wrong)
    path.unlink()
    path.mkdir()
    assert train(finished, train_num_steps=STEPS + 1) == 2
    assert f"{path} cannot be read: Is a directory" in capsys.readouterr().err


def test_a_damaged_manifest_or_split_of_a_cache_stops_every_script(
    finished: Path, account: Account, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = finished / "latents_cache"
    runs: list[tuple[str, Callable[[], int]]] = [
        (MANIFEST_NAME, lambda: preprocess(finished)),
        (MANIFEST_NAME, lambda: train(finished, train_num_steps=STEPS + 1)),
        (MANIFEST_NAME, lambda: train(finished, results_folder=finished / "new")),
        (SPLIT_NAME, lambda: train(finished, results_folder=finished / "new")),
    ]
    for name, run in runs:
        data = (cache / name).read_bytes()
        for content in (
            b"",
            data[:-100],
            b"\xff\xfe\0junk",
            data.replace(b"ID_1", b"ID_3", 1).replace(b"42", b"43", 1),
        ):
            overwrite(cache / name, content)
            capsys.readouterr()
            assert run() == 2
            (line,) = capsys.readouterr().err.splitlines()
            wrong = f"{cache / name} is damaged or was edited" not in line or not re.search(r"re(store|move) it", line)
            account.add(f"damaged {name} of a cache", "each script that reads it", cases=1, wrong=int(wrong))
            assert not (finished / "new").exists()
        overwrite(cache / name, data)


class Truth:
    """What the scripts give from undamaged files."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.moments = stored_moments(root / "latents_cache")
        self.state = self._goes_on(shutil.copytree(root, root.parent / "truth"))
        self.images = made(root.parent / "truth", root / "results")

    @staticmethod
    def _goes_on(copy: Path) -> dict[str, str]:
        assert train(copy, **GOING_ON) == 0
        return state_digests(copy / "results")


GOING_ON = {"train_num_steps": STEPS + 1, "num_samples": 0, "save_and_sample_every": 100}


def made(root: Path, results: Path) -> dict[str, bytes] | None:
    """Generates an image of each class from a run; returns them by name, None when that was refused."""
    code = generate(root, checkpoint=results, images_per_class=1)
    assert code in (0, 2)
    found = {f.name: f.read_bytes() for name in CLASSES for f in (root / "synthetic" / name).glob("*.jpg")}
    assert bool(found) == (code == 0)
    return found or None


def wrong_after(copy: Path, truth: Truth) -> int:
    """Runs the scripts on a damaged cache and run; returns how many of their results are not the true ones."""
    images = made(copy, copy / "results")
    wrong = int(images not in (None, truth.images))
    checked = preprocess(copy, verify=True)
    assert checked in (0, 1, 2)
    code = train(copy, **GOING_ON)
    assert code in (0, 2)
    wrong += code == 0 and state_digests(copy / "results") != truth.state
    code = preprocess(copy)
    assert code in (0, 2)
    return wrong + (code == 0 and stored_moments(copy / "latents_cache") != truth.moments)


@pytest.mark.slow
def test_a_flipped_bit_in_any_file_of_a_cache_and_a_run_gives_no_wrong_data_and_no_traceback(
    trained: Path, tmp_path: Path, account: Account, is_long: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    root = shutil.copytree(trained, tmp_path / "world")
    truth, draw = Truth(root), random.Random(0)
    folders = [root / "latents_cache", root / "results"]
    files = sorted(file.relative_to(root) for folder in folders for file in folder.rglob("*") if file.is_file())
    unchecked = [name for name in files if name.suffix in (".png", ".jsonl", ".yaml")]  # no run depends on them
    checked = [name for name in files if name not in unchecked]
    for number, names in enumerate([[name] for name in files] * 3 if is_long else [*([n] for n in checked), unchecked]):
        copy = shutil.copytree(root, tmp_path / f"case {number}")
        for name in names:
            data = bytearray((copy / name).read_bytes())
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
            overwrite(copy / name, data)
        wrong = wrong_after(copy, truth)
        account.add("flipped bit in a cache and a run", "the three scripts", cases=len(names), wrong=wrong)
        said = capsys.readouterr().err
        assert "Traceback" not in said and said.count("error: ") <= 4
        shutil.rmtree(copy)
    assert len(checked) >= 8 and len(unchecked) >= 5
