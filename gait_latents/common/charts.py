"""The charts of training runs, caches and reports, drawn with matplotlib: PNG files, and SVG for a page.

Colours are from the palette of Okabe and Ito, which colour-blind people can tell apart too; blue and vermilion stand
out from white and from black. matplotlib is imported when something is drawn, and its global state is left alone.
Texts and lines of an SVG have the colour and the font of the page around it.
"""

import atexit
import functools
import importlib.util
import io
import logging
import math
import os
import re
import shutil
import tempfile
import unicodedata
import warnings
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec

import numpy as np

from gait_latents.common.console import harmless
from gait_latents.common.errors import UserError
from gait_latents.common.pictures import one_line

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


_P = ParamSpec("_P")
_BLUE, _VERMILION = "#0072B2", "#D55E00"
_MARKS = (_VERMILION, "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # of the same palette
_OF_THE_PAGE = "#010203"  # stands for the colour of the page's text until the SVG is done
_STYLE = {
    "font.size": 10.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "text.parse_math": False,  # a $ in a name is a $
}
_UNITS = 72  # of an SVG per inch
_PAGE_STYLE = {
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "grid.color"), _OF_THE_PAGE),
    **dict.fromkeys(("xtick.color", "ytick.color"), _OF_THE_PAGE),
    "figure.dpi": _UNITS,
    "svg.fonttype": "none",
}
_PAGE_WIDTH = 5.0  # inches of an SVG, as wide as a phone: 360 of its units
_FEW_CLASSES = 12
_CELL = 0.38  # inches of a confusion matrix for each class
_LONGEST_NAME = 16  # letters


def check_installed() -> None:
    """Raises UserError, with the remedy, where matplotlib is absent."""
    spec = importlib.util.find_spec("matplotlib")
    if spec is None or spec.origin is None:  # a folder of that name is found too, but has no file
        raise UserError("charts need the package matplotlib; pip install matplotlib")


# --- PNG files ---------------------------------------------------------------------------------------------


def loss_curve(
    steps: Sequence[int],
    losses: Sequence[float],
    measured: Mapping[str, tuple[Sequence[int], Sequence[float]]] | None = None,
) -> bytes:
    """Draws the loss against the step, on a logarithmic loss axis, with its running median in bold.

    Args:
        steps: of the lines of the log.
        losses: of each.
        measured: name -> steps and losses, above 0, of what was measured at some of the saves.
    """
    values = np.asarray(losses, dtype=np.float64)
    drawn = np.isfinite(values) & (values > 0)
    x, y = np.asarray(steps, dtype=np.float64)[drawn], values[drawn]
    with _style():
        figure, axes = _new(6.4, 3.6)
        axes.set_xlabel("training step")
        axes.set_ylabel("loss (logarithmic scale)")
        axes.xaxis.set_major_formatter("{x:,.0f}")
        if len(y):
            marker = "o" if len(y) == 1 else ""
            axes.plot(x, y, marker=marker, color=_BLUE, alpha=0.4, linewidth=1, label="as logged")
            axes.plot(x, _running_median(y), color=_VERMILION, linewidth=2, label="running median")
            for number, (name, (at, values)) in enumerate((measured or {}).items()):
                line = {"linestyle": ("--", ":")[number % 2], "marker": "os"[number % 2], "clip_on": False}
                axes.plot(at, values, color="black", markersize=4, label=name, **line)
            _log_scale(axes)
            axes.set_xlim(0, max(x.max(), 1.0))
            axes.grid()
            axes.legend()
        else:
            axes.text(0.5, 0.5, "no loss yet", transform=axes.transAxes, ha="center")
        return _png(figure)


def _log_scale(axes: "Axes") -> None:
    """Makes the upright axis logarithmic, with round numbers that are written out."""
    from matplotlib import ticker

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5) if high < 1000 * low else (1,), numticks=8))
    if sum(low <= tick <= high for tick in axes.get_yticks()) < 3:  # too little for that: as on a plain axis
        axes.yaxis.set_major_locator(ticker.MaxNLocator(5))
    axes.yaxis.set_major_formatter("{x:.5g}")
    axes.yaxis.set_minor_locator(ticker.NullLocator())


def _running_median(values: np.ndarray) -> np.ndarray:
    half = max(1, len(values) // 40)
    return np.array([np.median(values[max(0, i - half) : i + half + 1]) for i in range(len(values))])


def learning_curve(
    counts: Sequence[int],
    scores: Sequence[float],
    marks: Mapping[str, Sequence[tuple[int, float]]],
    *,
    ceiling: float | None,
) -> bytes:
    """Draws the accuracy that real images reach against how many there are, and what other training sets reach.

    Args:
        counts: of real images of each class, rising; the axis is logarithmic.
        scores: shares from 0 to 1.
        marks: name of a training set -> (count of real images, share) of each trial.
        ceiling: the share that all real images reach, where that is known.
    """
    with _style():
        figure, axes = _new(6.4, 4.2)
        if ceiling is not None:
            axes.axhline(100 * ceiling, color="0.5", linestyle="--", linewidth=1, label="all real images")
        axes.plot(counts, [100 * score for score in scores], marker="o", color=_BLUE, linewidth=2, label="real")
        for number, (name, points) in enumerate(marks.items()):
            x, y = [count for count, _ in points], [100 * score for _, score in points]
            colour = _MARKS[number % len(_MARKS)]
            axes.plot(x, y, marker="s^Dv<>"[number % 6], color=colour, linestyle=":", label=name)
        axes.set_xscale("log")
        axes.set_xticks(counts, [str(count) for count in counts])
        axes.minorticks_off()
        axes.set_ylim(0, 100)
        axes.set_xlabel("real images of each class")
        axes.set_ylabel("accuracy, %")
        axes.grid()
        axes.legend()
        return _png(figure)


def channel_histograms(panels: Sequence[tuple[str, str, np.ndarray]], edges: np.ndarray, expected: np.ndarray) -> bytes:
    """Draws densities as bars, up to four panels in a row, with the expected density as a line over each.

    Args:
        panels: (title, remark, density [n]) of each.
        edges: of the bins, [n + 1].
        expected: density [n] at the middle of the bins.
    """
    columns = min(4, len(panels))
    rows = math.ceil(len(panels) / columns)
    with _style({"font.size": 9}):
        figure = _new_empty(max(4.0, 2.4 * columns), 2.3 * rows + 0.6)
        grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
        for axes in grid.flat[len(panels) :]:
            axes.set_visible(False)
        for axes, (title, remark, density) in zip(grid.flat, panels, strict=False):
            axes.stairs(density, edges, fill=True, color=_BLUE, alpha=0.45, label="latents")
            axes.plot((edges[1:] + edges[:-1]) / 2, expected, color=_VERMILION, label="unit normal")
            axes.set_ylim(0, 1.6 * expected.max())  # a peak that is higher is cut off
            axes.set_title(f"{title}\n{remark}", fontsize=9)
        figure.supxlabel("normalised value, in standard deviations", fontsize=9)
        figure.supylabel("density", fontsize=9)
        figure.legend(*grid.flat[0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
        return _png(figure)


# --- SVG for a page: `label` says in words what a chart shows, and no two charts of a page have the same ---


def _once(draw: Callable[_P, str]) -> Callable[_P, str]:
    """Draws what was drawn before of the very same figures not again: a page is made anew after each of its parts."""
    drawn: dict[str, str] = {}

    @functools.wraps(draw)
    def found(*args: _P.args, **kwargs: _P.kwargs) -> str:
        key = repr((args, kwargs))
        if key not in drawn:
            drawn[key] = draw(*args, **kwargs)
        return drawn[key]

    return found


@_once
def bars(
    names: Sequence[str],
    series: Mapping[str, Sequence[float | None]],
    axis: str,
    *,
    label: str,
) -> str:
    """Draws figures of some things as bars that lie side by side, one for each series.

    Args:
        names: of the things, from above.
        series: name -> a figure for each, None where it is not known.
        axis: what the figures are, with their unit.
    """
    with _style(_PAGE_STYLE):
        figure, axes = _new(_PAGE_WIDTH, 0.9 + len(names) * (0.45 if len(names) <= _FEW_CLASSES else 0.24))
        height = 0.8 / len(series)
        for number, (name, values) in enumerate(series.items()):
            places = np.arange(len(names)) + height * (number - (len(series) - 1) / 2)
            widths = [math.nan if value is None else value for value in values]
            axes.barh(places, widths, height, color=(_BLUE, _VERMILION)[number], label=name)
        axes.set_xlim(0)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_xlabel(axis, loc="right")
        axes.grid(axis="x")
        _few_ticks(axes.xaxis)
        if len(series) > 1:
            figure.legend(loc="outside upper center", ncols=2)
        return _svg(figure, label, {axes.yaxis: names})


@_once
def distances_histogram(
    ours: Sequence[float], theirs: Sequence[float], threshold: float | None, *, axis: str, label: str
) -> str:
    """Draws how distances are distributed: of synthetic images as bars, of test images as an outline."""
    values = [*ours, *theirs]
    low, high = min(values), max(values)
    num_bins = max(8, min(40, round(2 * len(values) ** 0.5)))
    edges = np.linspace(low, high if high > low else low + 1.0, num_bins + 1)
    with _style(_PAGE_STYLE):
        figure, axes = _new(_PAGE_WIDTH, 2.9)
        for found, name, how in (
            (ours, "synthetic", {"fill": True, "color": _BLUE, "alpha": 0.6}),
            (theirs, "real (test)", {"color": _VERMILION, "linewidth": 2}),
        ):
            if len(found):
                axes.stairs(100 * np.histogram(found, edges)[0] / len(found), edges, label=name, **how)
        if threshold is not None:
            axes.axvline(threshold, color=_OF_THE_PAGE, linestyle="--", linewidth=1.2, label="near copies")
        axes.set_xlabel(axis)
        axes.set_ylabel("% of images")
        axes.grid(axis="y")
        _few_ticks(axes.xaxis, axes.yaxis)
        figure.legend(loc="outside upper center", ncols=3, columnspacing=1.2, handlelength=1.5)
        return _svg(figure, label)


@_once
def confusion(counts: Sequence[Sequence[int]], names: Sequence[str], *, label: str) -> str:
    """Draws a confusion matrix: a row per true class, a column per class that was said, deeper for a larger share.

    Args:
        counts: whole numbers [K][K]; the colour of a cell is its share of its row.
        names: the K classes, in the same order.
    """
    table = np.asarray(counts)
    shares = table / np.maximum(1, table.sum(1, keepdims=True))
    reach = 0.5 + max(_expected_width(_shorten(name)) for name in names)  # of what stands left of the cells, and below
    cell = max(_CELL, min(1.6 * _CELL, (_PAGE_WIDTH - reach) / len(names)))
    width, height = max(_PAGE_WIDTH, reach + cell * len(names)), reach + cell * len(names)
    with _style(_PAGE_STYLE | {"axes.spines.top": True, "axes.spines.right": True}):
        from matplotlib.colors import LinearSegmentedColormap

        colours = LinearSegmentedColormap.from_list("share", [(*_rgb(_BLUE), 0.0), (*_rgb(_BLUE), 1.0)])
        figure, axes = _new(width, height)
        axes.imshow(shares, cmap=colours, vmin=0, vmax=1, interpolation="none")
        for (i, j), count in np.ndenumerate(table):
            if count:
                ink = "white" if shares[i, j] > 0.7 else _OF_THE_PAGE
                axes.text(j, i, str(count), color=ink, ha="center", va="center")
        axes.set_xlabel("said by the classifier", loc="right")
        axes.set_ylabel("true class")
        axes.tick_params(length=0)
        return _svg(figure, label, {axes.xaxis: names, axes.yaxis: names})


def sweep_curves(
    curves: Mapping[str, Sequence[tuple[float, float]]], floor: float | None, *, axis: str, label: str
) -> str:
    """Draws a figure against the guidance scale.

    Args:
        curves: name -> (scale, figure) of each point.
        floor: what real images reach, drawn as a dashed line.
        axis: what the figure is.
    """
    with _style(_PAGE_STYLE):
        figure, axes = _new(_PAGE_WIDTH, 3.0)
        for number, (name, points) in enumerate(curves.items()):
            fade = 0.35 + 0.65 * (number + 1) / len(curves)
            marker = "os^Dv"[number % 5]
            axes.plot(*zip(*sorted(points), strict=True), marker=marker, color=_BLUE, alpha=fade, label=name)
        if floor is not None:
            axes.axhline(floor, color=_VERMILION, linestyle="--", label="real (training)")
        axes.set_ylim(0, None)
        axes.set_xlabel("guidance scale")
        axes.set_ylabel(axis)
        axes.grid()
        _few_ticks(axes.xaxis, axes.yaxis)
        figure.legend(loc="outside upper center", ncols=2)
        return _svg(figure, label)


# --- how they are drawn ------------------------------------------------------------------------------------


@contextmanager
def _style(more: Mapping[str, Any] | None = None) -> Iterator[None]:
    """Sets how things look, and puts back what was set before.

    Raises:
        UserError: where matplotlib is absent or broken.
    """
    check_installed()
    _have_a_folder()
    with _quiet():
        try:
            import matplotlib
        except ImportError as error:
            raise UserError(
                f"matplotlib cannot be imported ({one_line(str(error))}); pip install --upgrade matplotlib"
            ) from error
    with matplotlib.rc_context(), warnings.catch_warnings(), _quiet():
        matplotlib.rcdefaults()  # not what a file of this user says
        settings: Any = _STYLE | dict(more or {})  # matplotlib types the names as literals
        matplotlib.rcParams.update(settings)
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a browser has fonts that matplotlib lacks
        yield


def _have_a_folder() -> None:
    """Gives matplotlib a temporary folder for its cache where the user has no home folder, without which it fails."""
    try:
        Path.home()
    except RuntimeError:
        if "MPLCONFIGDIR" not in os.environ:
            os.environ["MPLCONFIGDIR"] = folder = tempfile.mkdtemp(prefix="matplotlib-")
            atexit.register(shutil.rmtree, folder, ignore_errors=True)


@contextmanager
def _quiet() -> Iterator[None]:
    """Lets matplotlib keep to itself where it finds no folder for its cache or no font; it has others to take."""
    logger = logging.getLogger("matplotlib")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _new(width: float, height: float) -> tuple["Figure", "Axes"]:
    """Returns a figure of so many inches with one pair of axes, and these axes."""
    figure = _new_empty(width, height)
    return figure, figure.add_subplot()


def _new_empty(width: float, height: float) -> "Figure":
    """Returns a figure of so many inches without axes; it belongs to no window."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _few_ticks(*axes: Any) -> None:
    for axis in axes:
        axis.get_major_locator().set_params(nbins=5)
        axis.set_major_formatter("{x:,.5g}")


def _rgb(colour: str) -> tuple[float, ...]:
    return tuple(int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))


def _png(figure: "Figure") -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
    return buffer.getvalue()


def _svg(figure: "Figure", label: str, names: Mapping[Any, Sequence[str]] | None = None) -> str:
    """Returns a figure as the SVG element of a page; the same figure gives the same text.

    Args:
        label: what it shows, in words.
        names: the names along an axis, which may be of any script.
    """
    import matplotlib

    label = harmless(label)
    shown = {axis: [_shorten(name) for name in texts] for axis, texts in (names or {}).items()}
    for axis, texts in shown.items():
        axis.set_ticks(
            range(len(texts)), [_as_wide(text) for text in texts], **_UPRIGHT if axis.axis_name == "x" else {}
        )
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    for axis, texts in shown.items():
        axis.set_label_coords(*axis.label.get_position(), transform=axis.label.get_transform())
        axis.set_ticklabels(texts)
    matplotlib.rcParams["svg.hashsalt"] = label
    buffer = io.BytesIO()
    figure.savefig(
        buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
    )
    return _for_a_page(buffer.getvalue(), label)


_UPRIGHT = {"rotation": 90, "rotation_mode": "anchor", "ha": "right", "va": "center"}  # ends at its tick in any font


def _shorten(name: str) -> str:
    """Returns a name as a tick shows it: a tick without any text would be left out of the layout."""
    return one_line(name, longest=_LONGEST_NAME) or "\u00a0"


def _expected_width(text: str) -> float:
    """Returns about how many inches a text takes."""
    return sum(0.15 if letter == "W" else 0.095 for letter in _as_wide(text))


def _as_wide(text: str) -> str:
    """Returns a text that is as wide in a font which lacks the characters of the Far East."""
    return "".join("W" if unicodedata.east_asian_width(letter) in "WF" else letter for letter in text)


_SVG, _LINK = "http://www.w3.org/2000/svg", "{http://www.w3.org/1999/xlink}href"


def _for_a_page(svg: bytes, label: str) -> str:
    """Takes from an SVG file what a page has itself: style sheet, fonts, and names of parts that nothing refers to."""
    ElementTree.register_namespace("", _SVG)
    root = ElementTree.fromstring(svg)
    width = float(root.attrib.pop("width").removesuffix("pt"))
    del root.attrib["height"]
    root.attrib |= {"class": "chart", "role": "img", "aria-label": label}
    if width > _PAGE_WIDTH * _UNITS:
        root.set("style", f"min-width: {width:.0f}px")
    used = set(re.findall(rb"#([\w-]+)", svg))
    for parent in [*root.iter()]:
        for child in [*parent]:
            if child.tag == f"{{{_SVG}}}style":
                parent.remove(child)
        if parent.get("id", "").encode() not in used:
            parent.attrib.pop("id", None)
        if _LINK in parent.attrib:
            parent.set("href", "".join(parent.attrib.pop(_LINK).split()))
        if "style" in parent.attrib:
            style = re.sub(r"font-family: [^;]*;? ?", "", parent.attrib["style"])
            style = re.sub(r"font: ([\d.]+px)[^;]*", r"font-size: \1", style)  # as matplotlib 3.8 writes it
            parent.set("style", style.replace(_OF_THE_PAGE, "currentColor"))
    return ElementTree.tostring(root, encoding="unicode")
