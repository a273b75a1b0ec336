"""The laboratory's recordings: they repeat, go on, overlap by what they say, and differ where they should."""

import itertools
from pathlib import Path

import make_demo
import make_recordings
import numpy as np
import pytest

from gait_latents.images import folders, reading
from gait_latents.images.names import natural_key

SIZE = 32


def cut(number: int, recording: int, *, num_windows: int = 5, seed: int = 0, image_size: int = SIZE) -> np.ndarray:
    found = make_recordings.windows(seed, number, recording, num_windows=num_windows, image_size=image_size)
    return np.stack(list(found))


def torso_speed(number: int, recording: int) -> float:
    """Returns the speed of the loudest row of a spectrogram, in m/s."""
    level = make_recordings.recording_db(0, number, recording, 256)
    row = make_demo.IMAGE_SIZE - 1 + make_demo.LOWEST_ROW - level.argmax(axis=0).mean()
    return row * make_demo.PULSES_PER_SECOND / make_demo.STFT_LENGTH * make_demo.WAVELENGTH_M / 2


@pytest.mark.parametrize("image_size", make_recordings.IMAGE_SIZES)
def test_neighbours_share_three_quarters_of_their_columns(image_size):
    found = cut(1, 1, image_size=image_size)
    assert found.shape == (5, image_size, image_size, 3) and found.dtype == np.uint8
    hop = image_size // 4
    for before, after in itertools.pairwise(found):
        assert np.array_equal(before[:, hop:], after[:, :-hop])
        assert not np.array_equal(before, after)


def test_a_recording_is_a_function_of_seed_walker_and_number_and_a_longer_one_goes_on():
    first = cut(1, 1)
    longer = cut(1, 1, num_windows=9)  # of two chunks
    assert make_recordings.columns_of(5) <= make_recordings.CHUNK_COLUMNS < make_recordings.columns_of(9)
    assert np.array_equal(longer[:5], first)
    for other in (cut(1, 2), cut(2, 1), cut(1, 1, seed=1)):
        assert not np.array_equal(other, first)


def test_chunks_join_without_a_seam():
    level = make_recordings.recording_db(0, 3, 1, 2 * make_recordings.CHUNK_COLUMNS)
    steps = np.abs(np.diff(level, axis=1)).mean(axis=0)
    assert steps[make_recordings.CHUNK_COLUMNS - 1] < 1.5 * np.median(steps)


def test_the_torso_moves_at_the_pace_of_the_recording_as_the_radar_sees_it():
    for number, recording in ((1, 1), (2, 1), (2, 3)):
        how = make_recordings.Circumstances.draw(np.random.default_rng([0, number, recording, 0]))
        who = make_recordings.walker(0, number)
        assert how.of_the_day(who).speed == pytest.approx(who.speed * how.pace)
        seconds = np.linspace(0, 256 * make_demo.STFT_HOP / make_demo.PULSES_PER_SECOND, 500)
        drifts = make_recordings.draw_drifts(np.random.default_rng([0, number, recording, 1]), seconds)
        seen = np.exp(drifts["pace"]) * np.cos(how.aspect + np.deg2rad(drifts["aspect"]))
        assert torso_speed(number, recording) == pytest.approx(who.speed * how.pace * seen.mean(), rel=0.08)


def test_drifts_have_their_deviations_and_those_of_a_longer_recording_begin_alike():
    seconds = np.arange(0, 4000, make_recordings.DRIFT_SECONDS)
    drifts = make_recordings.draw_drifts(np.random.default_rng(0), seconds)
    for name, deviation in make_recordings.DRIFTS.items():
        assert drifts[name].std() == pytest.approx(deviation, rel=0.1)
        shorter = make_recordings.draw_drifts(np.random.default_rng(0), seconds[:9])
        assert np.array_equal(shorter[name], drifts[name][:9])


def test_recordings_differ_in_their_circumstances_and_walkers_in_themselves():
    drawn = [make_recordings.Circumstances.draw(np.random.default_rng([0, 1, number, 0])) for number in (1, 2, 3)]
    for name in vars(drawn[0]):
        assert len({getattr(how, name) for how in drawn}) == 3, name
    assert make_recordings.walker(0, 1) == make_recordings.walker(0, 1) != make_recordings.walker(0, 2)
    assert make_recordings.walker(0, 1) != make_recordings.walker(1, 1)
    points, levels_db = make_demo.body_points(make_recordings.walker(0, 1), np.zeros(2), np.zeros(2))
    assert len(points) == len(levels_db) == make_recordings.NUM_SCATTERERS


def test_each_recording_is_a_folder_of_classes_whose_names_carry_the_number_of_the_window(tmp_path, capsys):
    words = ["--people", "2", "--recordings", "2", "--windows", "11", "--image_size", str(SIZE)]
    assert make_recordings.main(["--output", str(tmp_path), *words]) == 0
    assert "2 walkers x 2 recordings x 11 windows" in capsys.readouterr().out
    for recording in (1, 2):
        index = folders.list_images(tmp_path / f"recording_{recording}")
        assert list(index) == ["ID_1", "ID_2"]
        for name, files in index.items():
            assert files == [f"{name}_recording_{recording}_{window:04d}.jpg" for window in range(1, 12)]
            assert files == sorted(files, key=natural_key)
    path = make_recordings.window_path(tmp_path, 2, 1, 11)
    expected = cut(1, 2, num_windows=11)[10].astype(float)
    kept = reading.decode(path.read_bytes(), image_size=SIZE)
    assert np.abs(kept - expected).mean() < 15  # JPEG is what differs


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--windows", "0"], "--windows is 0"),
        (["--people", "1000"], "--people is 1000"),
        (["--seed", "-1"], "--seed is -1"),
        (["--output", str(Path(__file__) / "below")], "cannot be written"),
    ],
)
def test_what_cannot_be_made_is_told(tmp_path, capsys, words, message):
    with pytest.raises(SystemExit) as stopped:
        make_recordings.main(["--output", str(tmp_path / "out"), *words])
    assert stopped.value.code == 2 and message in capsys.readouterr().err
