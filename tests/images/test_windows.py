"""Windows of one recording: by how much they overlap, what is said of it, and where nothing must be found."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import recordings
import tiny_images
from PIL import Image
from recordings import HEIGHT, WIDTH, cut, recording, save_recordings, save_windows

from gait_latents.images import windows
from gait_latents.images.folders import list_images
from gait_latents.images.windows import Windows, find_windows, split_warnings, windows_warning

DEMO = Path(__file__).parents[2] / "demo" / "walkers"


def found_in(folder: Path, resize: str = "crop") -> Windows | None:
    return find_windows(list_images(folder), str(folder), resize=resize)


def overlap_in(folder: Path, resize: str = "crop") -> float:
    found = found_in(folder, resize)
    assert found is not None
    return found.overlap


# --- what is found -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("overlap", "gap"), [(0.5, 1), (0.75, 3), (0.9, 9)])
def test_the_overlap_of_windows_is_found(tmp_path, overlap, gap):
    found = found_in(save_recordings(tmp_path, overlap))
    assert found is not None
    assert found.overlap == pytest.approx(overlap, abs=0.011) and found.gap == gap and found.stride == 1


def test_windows_that_follow_each_other_without_overlap_are_not_found(tmp_path):
    assert found_in(save_recordings(tmp_path, 0)) is None


LOOKS = {
    "grey": {"colours": recordings.grey},
    "with axes and numbers around": {"axes": 30},
    "small": {"size": (64, 64)},
    "of another shape": {"size": (300, 120)},
}


@pytest.mark.parametrize("look", LOOKS)
def test_the_look_of_the_pictures_does_not_count(tmp_path, look):
    resize = "squash" if look == "of another shape" else "crop"
    assert overlap_in(save_recordings(tmp_path, 0.75, **LOOKS[look]), resize) == pytest.approx(0.75, abs=0.02)


def test_the_loudness_of_a_window_does_not_count(tmp_path):
    for person in (1, 2):
        levels = recording(person, 4 * WIDTH + 1)
        images = cut(levels, 0.75, 13)
        dimmed = [
            Image.fromarray((np.asarray(image) * (1 if i % 2 else 0.6)).astype(np.uint8))
            for i, image in enumerate(images)
        ]
        save_windows(tmp_path / f"ID_{person}", dimmed)
    assert overlap_in(tmp_path) == pytest.approx(0.75, abs=0.01)


def test_a_walk_as_even_as_a_machine_is_found_by_its_noise(tmp_path):
    for overlap, expected in ((0.75, 0.75), (0.0, None)):
        folder = tmp_path / str(overlap)
        for person in (1, 2):
            save_windows(folder / f"ID_{person}", cut(recording(person, 14 * WIDTH, jitter=0), overlap, 14))
        found = found_in(folder)
        assert (found and found.overlap) == (expected and pytest.approx(expected, abs=0.01))


def test_numbers_may_run_against_the_time(tmp_path):
    save_windows(tmp_path / "ID_1", cut(recording(1, 5 * WIDTH), 0.75, 14)[::-1])
    assert overlap_in(tmp_path) == pytest.approx(0.75, abs=0.01)


def test_a_class_may_have_several_recordings(tmp_path):
    for take in range(1, 5):
        images = cut(recording(take, 3 * WIDTH), 0.75, 6)
        save_windows(tmp_path / "ID_1", images, f"ID1_case{take}_Doppler{{}}.jpg")
    assert found_in(tmp_path) == Windows(0.75, 1)


def test_copies_beside_a_recording_do_not_hide_it(tmp_path):
    images = cut(recording(1, 5 * WIDTH), 0.75, 14)
    save_windows(tmp_path / "ID_1", images, "{}.jpg")
    save_windows(tmp_path / "ID_1", images[::3], "copy_{}.jpg")
    assert found_in(tmp_path) == Windows(0.75, 1)


@pytest.mark.parametrize("quarters", [1, 3])
def test_time_may_run_along_the_height(tmp_path, quarters):
    for person in range(1, 4):
        images = [image.rotate(90 * quarters) for image in cut(recording(person, 5 * WIDTH), 0.75, 14)]
        save_windows(tmp_path / f"ID_{person}", images)
    assert found_in(tmp_path) == Windows(0.75, 1)


def test_two_series_that_take_turns_need_twice_the_gap(tmp_path):
    for antenna in (1, 2):
        save_windows(
            tmp_path / "ID_1", cut(recording(antenna, 5 * WIDTH), 0.75, 12), f"window{{}}_antenna{antenna}.jpg"
        )
    found = found_in(tmp_path)
    assert found is not None and found == Windows(0.75, 2) and found.gap == 6


def test_names_may_hold_the_time_of_day(tmp_path):
    (tmp_path / "ID_1").mkdir()
    for number, image in enumerate(cut(recording(1, 5 * WIDTH), 0.75, 14)):
        seconds = 50 + 3 * number
        image.save(tmp_path / "ID_1" / f"2026-01-05_09-{seconds // 60:02}-{seconds % 60:02}.jpg")
    assert overlap_in(tmp_path) == pytest.approx(0.75, abs=0.01)


def test_each_recording_may_have_an_overlap_of_its_own(tmp_path):
    for person, overlap in enumerate((0.7, 0.75, 0.8), start=1):
        save_windows(tmp_path / f"ID_{person}", cut(recording(person, 6 * WIDTH), overlap, 14))
    assert overlap_in(tmp_path) == pytest.approx(0.75, abs=0.02)


def test_images_that_cannot_be_read_do_not_hide_the_others(tmp_path):
    save_recordings(tmp_path, 0.75)
    (tmp_path / "ID_1" / "ID1_case1_1_Doppler5.jpg").write_bytes(b"")
    assert overlap_in(tmp_path) == pytest.approx(0.75, abs=0.01)


def test_what_the_crop_leaves_over_is_what_counts(tmp_path):
    """The centre of a wide window is narrower than the hop: what is left of two of them has nothing in common."""
    save_recordings(tmp_path, 0.75, size=(480, 96))
    assert found_in(tmp_path, "crop") is None
    assert overlap_in(tmp_path, "squash") == overlap_in(tmp_path, "pad") == pytest.approx(0.75, abs=0.01)


# --- where nothing must be found ---------------------------------------------------------------------------


def test_shuffled_names_are_no_series(tmp_path):
    draws = np.random.default_rng(0)
    for person in (1, 2, 3):
        images = cut(recording(person, 12 * WIDTH), 0.75, 40)
        save_windows(tmp_path / f"ID_{person}", [images[i] for i in draws.permutation(40)])
    assert found_in(tmp_path) is None


def test_names_without_numbers_are_no_series(tmp_path):
    (tmp_path / "ID_1").mkdir()
    for letter, image in zip("abcdefghijklmn", cut(recording(1, 5 * WIDTH), 0.75, 14), strict=True):
        image.save(tmp_path / "ID_1" / f"{letter * 3}{'xyz' * (ord(letter) % 3)}.jpg")
    assert found_in(tmp_path) is None


def test_walks_of_one_person_that_were_recorded_one_by_one_are_no_windows():
    assert found_in(DEMO) is None


def series_of(kind: str) -> list[Image.Image]:
    """Returns 12 pictures in which neighbours have no content in common but for what all have."""
    draws = np.random.default_rng(1)
    if kind == "noise":
        return [Image.fromarray(draws.integers(0, 256, (64, 64, 3), dtype=np.uint8)) for _ in range(12)]
    if kind == "the same picture":
        return [tiny_images.smooth(64, 64)] * 12
    if kind == "one colour":
        return [Image.new("RGB", (64, 64), (0, 0, 20 * i)) for i in range(12)]
    if kind == "things on a plain ground":
        pictures = [np.full((64, 64, 3), 200, np.uint8) for _ in range(12)]
        for picture in pictures:
            left, high = draws.integers(10, 40, 2)
            picture[high:, left : left + 12] = draws.integers(60, 120, (1, 1, 3))
        return [Image.fromarray(picture) for picture in pictures]
    assert kind == "stripes"
    waves = [np.sin(np.arange(64) / 2 + draws.uniform(0, 6)) for _ in range(12)]
    return [Image.fromarray(np.tile((128 + 100 * wave).astype(np.uint8), (64, 1))) for wave in waves]


@pytest.mark.parametrize("kind", ["noise", "the same picture", "one colour", "things on a plain ground", "stripes"])
def test_pictures_of_other_kinds_are_no_windows(tmp_path, kind):
    for name in ("a", "b"):
        save_windows(tmp_path / name, series_of(kind))
    assert found_in(tmp_path) is None


def test_few_images_and_files_that_are_no_images_are_no_windows(tmp_path):
    save_windows(tmp_path / "few", cut(recording(1, 2 * WIDTH), 0.75, 3))
    for number in range(9):
        (tmp_path / "few" / f"empty{number}.jpg").write_bytes(b"")
    assert found_in(tmp_path) is None


def test_one_recording_among_many_classes_is_passed_over(tmp_path):
    save_windows(tmp_path / "ID_1", cut(recording(1, 5 * WIDTH), 0.75, 14))
    for other in range(2, 6):
        shutil.copytree(DEMO / f"ID_{other}", tmp_path / f"ID_{other}")
    assert found_in(tmp_path) is None


# --- the gap, the sentences, the time ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overlap", "gap"),
    [(0.2, 1), (0.5, 1), (0.52, 2), (2 / 3, 2), (0.7, 3), (0.75, 3), (0.76, 4), (0.9, 9), (0.95, 19)],
)
def test_the_gap_leaves_out_all_windows_that_share_anything(overlap, gap):
    assert Windows(overlap).gap == gap
    assert 1 - (gap + 1) * (1 - overlap) <= 0.02 < 1 - gap * (1 - overlap)


def split_of(folder: Path, **rule):
    return tiny_images.split_of(list_images(folder), **{"images_per_user": 6, **rule})


def test_a_random_split_is_warned_of_with_the_flags_that_mend_it(tmp_path):
    save_recordings(tmp_path, 0.75)
    assert windows_warning(split_of(tmp_path), str(tmp_path), resize="crop") == (
        "neighbouring images of a class overlap by about 75%: they look like windows of one recording, and in a random "
        "split a test image shares much of its content with a training image, so that every score will be too good; "
        "give --split contiguous --split_gap 3"
    )


def test_a_contiguous_split_is_warned_of_only_where_its_gap_is_too_small(tmp_path):
    save_recordings(tmp_path, 0.75)
    small, enough = (split_of(tmp_path, split="contiguous", split_gap=gap) for gap in (2, 3))
    warning = windows_warning(small, str(tmp_path), resize="crop")
    assert warning is not None and "overlap by about 75%" in warning and warning.endswith("give --split_gap 3")
    assert "across a gap of 2 test images still share content" in warning
    assert windows_warning(enough, str(tmp_path), resize="crop") is None
    assert split_warnings(enough, str(tmp_path), resize="crop") == []


def test_the_gap_that_is_asked_for_separates_training_and_test(tmp_path):
    """The last training window and the first test window are as far apart as their hops say: nothing is shared."""
    split = split_of(save_recordings(tmp_path, 0.75), split="contiguous", split_gap=3)
    last, first = (int(entry.name.split("Doppler")[1][:-4]) for entry in (split.train[5], split.test[0]))
    assert first - last == 4 and (first - last) * (1 - 0.75) >= 1


def test_without_test_images_or_without_the_folder_nothing_is_said(tmp_path):
    save_recordings(tmp_path, 0.75)
    assert windows_warning(split_of(tmp_path, images_per_user="all"), str(tmp_path), resize="crop") is None
    split = split_of(tmp_path)
    for missing in ("", str(tmp_path / "gone")):
        assert windows_warning(split, missing, resize="crop") is None


def test_figures_of_a_random_split_are_never_told_without_a_warning(tmp_path):
    split = split_of(save_recordings(tmp_path / "one", 0))
    assert split_warnings(split, str(tmp_path / "one"), resize="crop")[0].startswith(
        "the split is random: if images are"
    )
    split = split_of(save_recordings(tmp_path / "other", 0.9))
    (found,) = split_warnings(split, str(tmp_path / "other"), resize="crop")
    flags = "give --split contiguous --split_gap 9 to preprocess_latents.py, and train in another --results_folder"
    assert "overlap by about 90%" in found and found.endswith(flags)


def test_however_many_images_there_are_few_are_read(tmp_path, monkeypatch):
    index = {f"ID_{c}": [f"ID{c}_{i}.jpg" for i in range(200)] for c in range(50)}
    read = []
    monkeypatch.setattr(windows, "_read", lambda folder, entry, resize: read.append(entry))
    split = tiny_images.split_of(index, images_per_user=50)
    assert windows_warning(split, str(tmp_path), resize="crop") is None
    assert 0 < len(read) <= 8 * 3 * 10


def test_the_recordings_of_these_tests_are_as_long_as_they_say():
    assert recording(1, 200).shape == (HEIGHT, 200) and len(cut(recording(1, 300), 0.75, 5)) == 5
