"""The charts: what they show, in which colours, of names of every script, and what happens without matplotlib."""

import base64
import importlib.util
import io
import math
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
import tiny
from PIL import Image
from pipeline import one_error, train

import evaluate_images
from gait_latents.common import charts
from gait_latents.common.errors import UserError

BLUE, VERMILION = "#0072b2", "#d55e00"
NAMES = ["<script>alert(1)</script>", "$x_1$ \"'&", "行走者_3", "שלום\u202eabc", "a\nb", "\x00\x1b[31m\udcff", ""]
SHOWN = ["<script>alert(1…", "$x_1$ \"'&", "行走者_3", r"שלום\u202eabc", "a b", r"\x00\x1b[31m\ud" + "…", "\u00a0"]


def pixels_of(png: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(png)) as picture:
        return np.asarray(picture.convert("RGB")).astype(int)


def texts(svg: str) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(svg).iter() if element.tag.endswith("}text")]


def boxes(svg: str, colour: str, how: str = "fill") -> list[tuple[float, float, float, float]]:
    """Returns (left, top, right, bottom) of each path of a colour that is not a mark of a legend."""
    found = []
    for element in ElementTree.fromstring(svg).iter():
        facts = element.attrib
        if "d" in facts and "clip-path" in facts and f"{how}: {colour}" in facts.get("style", ""):
            x, y = np.array(re.findall(r"[ML] ([\d.-]+) ([\d.-]+)", facts["d"]), dtype=float).T
            found.append((x.min(), y.min(), x.max(), y.max()))
    return found


# --- PNG files ---------------------------------------------------------------------------------------------


def test_the_learning_curve_rises_to_its_ceiling_and_marks_lie_where_their_score_is():
    marks = {"both": [(16, 0.8)], "synthetic": []}
    drawn = pixels_of(charts.learning_curve([4, 16, 64], [0.2, 0.4, 0.8], marks, ceiling=0.8))
    assert drawn.shape == (630, 960, 3)
    drawn[400:, 680:] = 255  # the legend
    heights = {}
    for name, colour in (("real", [0, 114, 178]), ("both", [213, 94, 0])):
        rows, columns = np.nonzero(np.abs(drawn - colour).max(2) < 30)
        heights[name] = (rows.min(), columns)
    assert abs(heights["real"][0] - heights["both"][0]) < 6  # at the ceiling both
    assert abs(np.median(heights["both"][1]) - np.mean([heights["real"][1].min(), heights["real"][1].max()])) < 12


def test_the_loss_curve_falls_where_the_loss_falls():
    steps = list(range(1, 101))
    curve = pixels_of(charts.loss_curve(steps, [10.0 / step for step in steps]))
    assert curve.shape == (540, 960, 3)
    is_median = np.abs(curve[:, :600] - [213, 94, 0]).max(2) < 40  # the legend is at the right
    columns = np.flatnonzero(is_median.any(0))
    assert len(columns) > 400
    heights = [np.flatnonzero(is_median[:, column]).mean() for column in columns[::50]]
    assert heights == sorted(heights)  # pixel rows count from the top


@pytest.mark.parametrize("losses", [[1.0], [0.5, 0.5], [math.nan, math.inf, 0.3], [math.nan], [], [0.0, -1.0]])
def test_any_losses_can_be_drawn(losses):
    curve = pixels_of(charts.loss_curve(list(range(1, len(losses) + 1)), losses))
    assert curve.shape == (540, 960, 3) and (curve < 100).any()


def test_every_range_of_losses_has_a_few_numbers():
    from matplotlib.figure import Figure

    generator = np.random.default_rng(0)
    for _ in range(200):
        low = 10 ** generator.uniform(-6, 6)
        high = low * 10 ** generator.uniform(0.04, 12)
        axes = Figure().add_subplot()
        axes.plot([0, 1], [low, high])
        charts._log_scale(axes)
        bottom, top = axes.get_ylim()
        ticks = [tick for tick in axes.get_yticks() if bottom <= tick <= top]
        assert 2 <= len(ticks) <= 12, (low, high, ticks)
        written = [axes.yaxis.get_major_formatter()(tick).replace("−", "-") for tick in ticks]
        assert [float(text) for text in written] == pytest.approx(ticks, rel=1e-6)


def test_a_picture_of_channels_has_a_panel_for_each():
    edges = np.linspace(-5, 5, 51)
    expected = np.exp(-((edges[1:] + edges[:-1]) ** 2) / 8) / math.sqrt(2 * math.pi)
    sizes = []
    for count in (1, 4, 5):
        panels = [(f"channel {i}", "nearly unused", expected * i / count) for i in range(count)]
        sizes.append(pixels_of(charts.channel_histograms(panels, edges, expected)).shape[:2])
    assert sizes[0][0] == sizes[1][0] < sizes[2][0] and sizes[0][1] < sizes[1][1] == sizes[2][1]


# --- SVG for a page ----------------------------------------------------------------------------------------


def all_charts() -> list[str]:
    """Draws each kind with hostile names; a warning would be an error."""
    counts = np.diag(range(len(NAMES))).tolist()
    ours = [float(i) for i in range(len(NAMES))]
    return [
        charts.bars(NAMES, {"synthetic": ours, "real": ours}, "distance", label="\x00 1 <&\"'"),
        charts.confusion(counts, NAMES, label="2"),
        charts.distances_histogram([1.0, 2.0], [1.5], 1.2, axis="distance", label="3"),
        charts.sweep_curves({"step 5": [(1.0, 2.0), (2.0, 3.0)]}, 1.0, axis="distance", label="4"),
    ]


def test_names_of_every_script_are_written_as_they_are():
    bars, matrix, *_ = all_charts()
    assert [text for text in texts(bars) if text in SHOWN] == SHOWN
    assert sorted(text for text in texts(matrix) if text in SHOWN) == sorted(2 * SHOWN)
    assert r"\x00 1 &lt;&amp;" in bars


def test_an_axis_says_what_it_is_and_two_series_have_a_legend():
    bars, matrix, histogram, sweep = (" | ".join(texts(svg)) for svg in all_charts())
    assert all(words in bars for words in ("distance", "synthetic", "real"))
    assert all(words in matrix for words in ("said by the classifier", "true class"))
    assert all(words in histogram for words in ("distance", "% of images", "synthetic", "real (test)", "near copies"))
    assert all(words in sweep for words in ("guidance scale", "distance", "step 5", "real (training)"))


def test_texts_have_the_colour_and_the_font_of_the_page():
    for svg in all_charts():
        assert "currentColor" in svg and "#010203" not in svg and "font-family" not in svg and "<style" not in svg
        colours = {colour.lower() for colour in re.findall("#[0-9a-fA-F]{6}", svg)}
        assert colours <= {BLUE, VERMILION, "#ffffff"}
        sizes = [float(size) for size in re.findall(r"font-size: ([\d.]+)px", svg)]
        assert sizes and min(sizes) >= 10 and 'viewBox="0 0 360 ' in svg  # so they are as large on a phone


def contrast(one: str, two: str) -> float:
    """Returns the contrast of two colours as the Web Content Accessibility Guidelines define it."""

    def luminance(colour: str) -> float:
        parts = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
        return float(
            np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722]
        )

    high, low = sorted((luminance(one), luminance(two)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_the_colours_stand_out_from_a_light_and_a_dark_page():
    assert contrast("#ffffff", "#000000") == pytest.approx(21)
    style = (Path(charts.__file__).parents[1] / "evaluation" / "page.css").read_text()
    backs = re.findall(r"--back: (#\w+)", style)
    assert len(backs) == 2
    for back in ("#ffffff", backs[1]):
        assert min(contrast(back, BLUE), contrast(back, VERMILION)) > 3


def test_bars_are_as_long_as_their_figures():
    svg = charts.bars(["a", "b"], {"one": [1.0, 2.0], "two": [4.0, None]}, "x", label="x")
    one, two = boxes(svg, BLUE), boxes(svg, VERMILION)
    widths = [right - left for left, _, right, _ in [*one, *two]]
    assert [width / widths[0] for width in widths[:3]] == pytest.approx([1, 2, 4], rel=1e-4)
    assert one[0][1] < two[0][1] < one[1][1]  # from above: a of both, then b


def test_test_images_are_an_outline_over_the_bars_of_the_synthetic_ones():
    svg = charts.distances_histogram([0.0, 1.0, 1.0, 8.0], [0.0, 0.0, 4.5, 8.0], None, axis="x", label="x")
    ((_, top, _, floor),), ((_, other_top, _, other_floor),) = boxes(svg, BLUE), boxes(svg, VERMILION, "stroke")
    assert (top, floor) == pytest.approx((other_top, other_floor)) and "near copies" not in svg  # half of either
    alone = charts.distances_histogram([0.0, 1.0], [], 0.5, axis="x", label="x")
    assert not boxes(alone, VERMILION, "stroke") and "real (test)" not in alone and "near copies" in alone


@pytest.mark.parametrize("num_classes", [3, 31])
def test_a_confusion_matrix_is_deeper_where_the_share_of_its_row_is_larger(num_classes):
    counts = 30 * np.eye(num_classes, dtype=int)
    counts[0, -1] = 10  # a quarter of the first row
    svg = charts.confusion(counts.tolist(), [f"ID_{i + 1}" for i in range(num_classes)], label="x")
    data = re.search(r'href="data:image/png;base64,([^"]*)"', svg)
    assert data is not None
    with Image.open(io.BytesIO(base64.b64decode(data[1]))) as picture:
        cells = np.asarray(picture.convert("RGBA"))
    alpha = cells[..., 3] / 255
    assert alpha.shape == (num_classes, num_classes)
    assert alpha == pytest.approx(counts / counts.sum(1, keepdims=True), abs=0.01)
    assert (cells[alpha > 0.5][:, :3] == [0, 114, 178]).all()
    assert texts(svg).count("30") == num_classes and texts(svg).count("10") == 1 and "0" not in texts(svg)
    assert charts.confusion([[0, 0], [0, 0]], ["a", "b"], label="x")  # no images at all


@pytest.mark.slow
def test_the_same_figures_give_the_same_chart_whatever_is_set_elsewhere():
    code = (
        "import sys; sys.path[:0] = ['.', 'tests/common', 'tests/helpers']; import matplotlib, test_charts\n"
        "now = matplotlib.rcParams\n"
        "now.update({'font.size': 30, 'axes.facecolor': 'red', 'svg.hashsalt': None})\n"
        "print(ascii(test_charts.all_charts()), now['font.size'], now['axes.facecolor'], now['svg.hashsalt'])"
    )
    again = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert again.stdout.strip() == f"{all_charts()!a} 30.0 red None"


def test_a_chart_of_the_same_figures_is_drawn_once(monkeypatch):
    first = [charts.bars(["a"], {"x": [value]}, "y", label="drawn once") for value in (1.0, 2.0)]
    without_matplotlib(monkeypatch)
    assert [charts.bars(["a"], {"x": [value]}, "y", label="drawn once") for value in (1.0, 2.0)] == first
    assert first[0] != first[1]
    with pytest.raises(UserError):
        charts.bars(["a"], {"x": [3.0]}, "y", label="drawn once")


# --- where matplotlib is absent ----------------------------------------------------------------------------


@pytest.mark.slow
def test_no_script_imports_matplotlib_before_something_is_drawn_and_none_needs_pyplot():
    code = (
        "import sys\n"
        "from gait_latents.common import charts\n"
        "from gait_latents.evaluation import evaluator, sweep\n"
        "from gait_latents.latents import preprocessing\n"
        "from gait_latents.training import loop, generation\n"
        "assert 'matplotlib' not in sys.modules\n"
        "charts.loss_curve([1, 2], [1.0, 0.5])\n"
        "assert 'matplotlib' in sys.modules and 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: find(name, *more) if name != "matplotlib" else None
    )


def test_a_missing_matplotlib_is_one_line_with_the_remedy(monkeypatch):
    without_matplotlib(monkeypatch)
    with pytest.raises(UserError, match=r"^charts need the package matplotlib; pip install matplotlib$"):
        charts.loss_curve([1], [1.0])


def test_a_broken_matplotlib_is_one_line_with_the_remedy(tmp_path):
    (tmp_path / "matplotlib.py").write_text("raise ImportError('built for another\\nnumpy')\n")
    code = f"import sys; sys.path[:0] = ['.', {str(tmp_path)!r}]; from gait_latents.common import charts\n"
    code += "charts.loss_curve([1], [1.0])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    words = "matplotlib cannot be imported (built for another numpy); pip install --upgrade matplotlib"
    assert found.returncode == 1 and found.stderr.splitlines()[-1] == f"gait_latents.common.errors.UserError: {words}"


def test_training_goes_on_without_matplotlib_and_says_so_once(world, monkeypatch, capsys):
    without_matplotlib(monkeypatch)
    assert train(world, num_samples=0) == 0
    said = capsys.readouterr().err
    assert said.count("there will be no loss.png: charts need the package matplotlib; pip install matplotlib") == 1
    assert not (world / "results" / "loss.png").exists() and (world / "results" / "metrics.jsonl").exists()
    flags = {"checkpoint": world / "results", "synthetic_path": world / "data", "output_folder": world / "evaluation"}
    assert evaluate_images.main(tiny.flags(flags)) == 2  # which is told before anything is computed
    assert one_error(capsys) == "error: charts need the package matplotlib; pip install matplotlib"
    assert not (world / "evaluation").exists()


def test_training_goes_on_when_a_chart_fails(world, monkeypatch, capsys):
    def fail(*_: object) -> bytes:
        raise ValueError("no font")

    monkeypatch.setattr(charts, "loss_curve", fail)
    assert train(world, num_samples=0) == 0
    assert capsys.readouterr().err.count("there will be no loss.png: no font") == 1


def test_what_was_measured_at_saves_is_drawn_beside_the_loss():
    steps, losses = [100, 200, 300], [0.3, 0.2, 0.1]
    measured = {"of images not seen": ([150, 300], [0.25, 0.2]), "of training images": ([150, 300], [0.25, 0.1])}
    plain, more = (pixels_of(charts.loss_curve(steps, losses, found)) for found in (None, measured))
    black = [(pixels.max(2) < 40).sum() for pixels in (plain, more)]
    assert black[1] > black[0] + 100
