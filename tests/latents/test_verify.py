"""What a check says of a cache: counts by class, numbers by channel, and a picture of them."""

import io

import numpy as np
import pipeline
import pytest
import tiny
import torch
from PIL import Image

import preprocess_latents
from gait_latents.common import charts
from gait_latents.images.split import Entry
from gait_latents.latents import verify
from gait_latents.latents.verify import (
    ChannelStatistics,
    ClassStatus,
    class_status,
    class_table,
    latents_picture,
    outside_text,
)
from gait_latents.vae.norm import LatentNorm


def test_classes_are_counted():
    train = [Entry("a", "1", "k1"), Entry("a", "2", "k2"), Entry("b", "1", "k3")]
    test = [Entry("a", "3", "k4"), Entry("b", "2", "k5")]
    status = class_status(["a", "b"], {"train": train, "test": test}, missing={"k2", "k3", "k4"}, stale={"k3"})
    assert status == [
        ClassStatus("a", (1, 2), test=(0, 1), missing=2, stale=0),
        ClassStatus("b", (0, 1), test=(1, 1), missing=0, stale=1),
    ]
    assert [line.split() for line in class_table(status)[1:]] == [
        ["a", "1/2", "0/1", "2", "0"],
        ["b", "0/1", "1/1", "0", "1"],
    ]
    assert len({len(line) for line in class_table(status)}) == 1
    parts = {"train": train, "validation": [Entry("b", "9", "k9")], "test": test}
    lines = [line.split() for line in class_table(class_status(["a", "b"], parts, missing={"k9"}, stale=set()))]
    assert lines[0] == ["class", "train", "validation", "test", "missing", "stale"]
    assert lines[1:] == [["a", "2/2", "-", "1/1", "0", "0"], ["b", "1/1", "0/1", "1/1", "1", "0"]]


def test_of_many_classes_those_in_need_come_first_and_the_rest_are_added_up():
    status = [ClassStatus(f"ID_{i}", (9, 10) if i == 90 else (10, 10), missing=int(i == 90)) for i in range(100)]
    lines = class_table(status)
    assert len(lines) == 40
    assert lines[1].split() == ["ID_90", "9/10", "-", "1", "0"]
    assert lines[2].split()[0] == "ID_0"
    assert lines[-1].split() == ["…", "62", "more", "620/620", "-", "0", "0"]
    assert len(class_table(status[:39])) == 40 and "more" not in class_table(status[:39])[-1]


def some_moments(count: int = 40) -> np.ndarray:
    """Makes moments of four channels: a usual one, a shifted one, one that is all noise, and a constant one."""
    generator = np.random.default_rng(0)
    mean = generator.standard_normal((count, 4, 8, 8)) * [[[[1.0]], [[3.0]], [[0.1]], [[0.0]]]]
    mean += np.array([0, 5, 0, 2]).reshape(1, 4, 1, 1)
    logvar = np.broadcast_to(np.array([-4.0, -2.0, 0.0, -30.0]).reshape(1, 4, 1, 1), mean.shape)
    return np.concatenate([mean, logvar], axis=1).astype(np.float16)


def test_statistics_are_those_of_the_normalisation():
    moments = some_moments()[:, [0, 1, 2, 4, 5, 6]]
    statistics, norm = ChannelStatistics.of(moments), LatentNorm.from_moments(torch.from_numpy(moments))
    np.testing.assert_allclose(statistics.mean, norm.shift, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(statistics.std, norm.scale, rtol=1e-5)
    mean = moments[:, :3].astype(np.float64)
    np.testing.assert_array_equal(statistics.low, mean.min(axis=(0, 2, 3)))
    np.testing.assert_array_equal(statistics.high, mean.max(axis=(0, 2, 3)))
    own = np.exp([-4.0, -2.0, 0.0])
    np.testing.assert_allclose(statistics.posterior_share, own / (own + mean.var(axis=(0, 2, 3))), rtol=1e-3)


def test_channels_of_no_use_are_named():
    statistics = ChannelStatistics.of(some_moments())
    assert [statistics.remark(i).partition(":")[0] for i in range(4)] == ["", "", "nearly unused", "constant"]
    table = statistics.table()
    assert table[0].split() == ["channel", "mean", "std", "min", "max", "posterior"]
    assert table[3].endswith("nearly unused: most of a draw is noise") and "99.0%" in table[3]


def panels_of(monkeypatch: pytest.MonkeyPatch, moments: np.ndarray) -> list[tuple[str, str, np.ndarray]]:
    """Returns what is drawn of each channel: title, remark and density."""
    seen, draw = [], charts.channel_histograms
    monkeypatch.setattr(charts, "channel_histograms", lambda panels, *more: seen.extend(panels) or draw(panels, *more))
    with Image.open(io.BytesIO(latents_picture(moments, ChannelStatistics.of(moments)))) as picture:
        assert picture.format == "PNG" and picture.width > picture.height
    return seen


def test_the_picture_shows_the_distribution_of_each_channel(monkeypatch):
    generator = np.random.default_rng(1)
    normal = generator.standard_normal((100, 1, 16, 16))
    two_peaks = np.where(normal > 0, 1.0, -1.0) + 0.2 * generator.standard_normal(normal.shape)
    moments = np.concatenate([normal, two_peaks, np.full((100, 2, 16, 16), -30.0)], axis=1).astype(np.float16)
    one, two = (density for _, _, density in panels_of(monkeypatch, moments))
    middle, quarter = len(one) // 2, len(one) // 10  # of ten standard deviations
    assert one[middle] > one[middle - quarter] > one[middle - 3 * quarter] >= 0 and one[middle] == pytest.approx(
        0.4, abs=0.05
    )
    assert two[middle] < 0.05 and min(two[middle - quarter], two[middle + quarter]) > one[middle]


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (0.0, ""),
        (6e-7, "under 0.001 % beyond ±5"),
        (1e-5, "0.001 % beyond ±5"),
        (0.001, "0.1 % beyond ±5"),
        (0.0386, "4 % beyond ±5"),
    ],
)
def test_what_lies_outside_the_picture_is_told_in_percent(share, text):
    assert outside_text(share) == text


def test_the_picture_tells_of_each_channel_what_lies_outside(monkeypatch):
    mean = np.random.default_rng(0).standard_normal((100, 2, 10, 10))
    mean[:10, 1, 0, 0] = 40.0  # 10 of 10,000
    moments = np.concatenate([mean, np.full_like(mean, -30.0)], axis=1).astype(np.float16)
    assert [remark for _, remark, _ in panels_of(monkeypatch, moments)] == ["", "0.1 % beyond ±5"]


def test_no_more_rows_than_needed_are_measured(cached, monkeypatch):
    cache = pipeline.open_cache(cached / "latents_cache")
    assert len(verify.read_rows_to_measure(cache, cache.keys())) == 15
    monkeypatch.setattr(verify, "MAX_ROWS_MEASURED", 4)
    moments = verify.read_rows_to_measure(cache, cache.keys())
    expected, _ = cache.read([cache.keys()[i] for i in (0, 4, 9, 14)])
    np.testing.assert_array_equal(moments, expected)


@pytest.fixture
def checked(cached, capsys) -> list[str]:
    """The lines of a check of a cache with test images, an orphan and another space."""
    assert pipeline.preprocess(cached, image_size=32) == 0
    assert pipeline.preprocess(cached, splits=["train", "test"]) == 0
    tiny.make_image(555).save(cached / "data" / "ID_2" / "walk_0.jpg")
    capsys.readouterr()
    folder = str(cached / "latents_cache")
    assert preprocess_latents.main(["--verify", "--output_folder", folder, "--device", "cpu"]) == 1
    return capsys.readouterr().out.splitlines()


def test_a_check_says_all_of_it(checked):
    rows = {line.split()[0]: line.split()[1:] for line in checked if line}
    assert rows["ID_1"] == ["5/5", "3/3", "0", "0"] and rows["ID_10"] == rows["ID_1"]
    assert rows["ID_2"] in (["4/5", "3/3", "0", "1"], ["5/5", "2/3", "0", "1"])
    size = 2 * 8 * 8 * 8
    (orphans,) = [line for line in checked if line.startswith("orphaned")]
    assert f"1 rows of no image in the split ({size / 1000:.1f} kB)" in orphans
    (other,) = [line for line in checked if line.startswith("also there")]
    assert "15 rows" in other and "image_size: 16 vs 32" in other
    (channels,) = [line for line in checked if line.startswith("channels")]
    assert "4, measured on 23 images; see " in channels and channels.endswith("latents.png")
