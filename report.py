"""One HTML page that shows what evaluate_images.py found: self-contained, for a browser, a printer and a phone.

The page is made from a dict, the same that report.json holds, and this is the one home of its shape. It is plain:
dicts, lists, texts, finite numbers, None. A key may be absent everywhere; what would be shown from it is left out.
None stands for a figure that could not be computed. Shares are from 0 to 1. Classes are named by the text of their
folder and stand in label order. Keys that are not listed here (digests, for example) are passed over.

    evaluated
        checkpoint, step        file name and training step of the model
        synthetic_path          the folder with the generated images
        made_with               what generate.py wrote beside them: step, cond_scale, guidance_interval, sampler,
                                sampling_timesteps, seed
        split, image_size       random or contiguous; pixels
        images                  {synthetic, training, test: count}
        images_per_class        {class: {synthetic, training, test: count}}, of all classes
    warnings                    [sentence], what the figures must be read with
    why                         {name of a part below: sentence}, why that part is not there
    latents, inception          the same shape twice: in latent space, and with Inception features
        images, test_images     how many synthetic (and as many training) images, against how many test images
        directions, directions_per_class    principal directions of the Fréchet distance; None: all
        neighbours, subset_size, num_subsets
        synthetic, training     the figures of either, against the test images; training images are the yardstick
            frechet, frechet_mean, kernel, kernel_deviation, kernel_mean        ..._mean: over the classes
            frechet_per_class, kernel_per_class     {class: distance}
            precision, recall, density, coverage
        recognition             {synthetic, test: share nearest to the mean of their own class}, latents only
    memorisation                distances in latent space to the nearest training image
        distances, median       of each synthetic image
        test_distances, test_median     of each test image
        threshold               the distance that few of the test images stay below
        test_near_share         how few: the share that makes the threshold
        near_share, near_share_limit    share of synthetic images below it; what chance alone seldom exceeds
        nearer_to_training, nearer_to_training_limit    share nearer to a training than to a test image; likewise
        per_class               {class: {median, test_median, near_share}}
        pairs                   [{synthetic, training: class/file, distance}], the closest
        picture, why_no_picture key of the picture of the pairs in `pictures`, or a sentence
        same_content            [{synthetic, same_as: class/file, kind: training, test or synthetic}], equal files
    classifier                  as classifier.compare returns it, and what the script adds: image_size
    sweep
        points                  [{checkpoint, step, guidance, images, near_share, near_share_limit, nearer_to_training,
                                recognition, and the figures of latents.synthetic}]; where classifiers were trained,
                                alone and with_real: the share that one recognises that saw these samples, or real
                                images too; and classifier, as above
        training                the same figures of as many training images; with_real: of real images alone
        best                    the point that is nearest to the test images without many near copies, or None
        best_for_classifiers    the one with the largest with_real, or None
        sentences               [sentence] about the best ones
    settings                    {setting: value}
"""

import base64
import math
import re
from collections.abc import Callable, Iterable, Sequence
from html import escape
from typing import Any, TypeGuard

import pictures

_WIDTH, _HEIGHT = 640, 310  # of a chart, in its own units
_LEFT, _RIGHT, _TOP, _BOTTOM = 88, 16, 16, 62
_CLOSE, _NEAR = 1.25, 2.0  # times the yardstick
FEW_PER_CLASS = 30  # images: figures of fewer are shown with a warning
_MANY_CLASSES = 12  # that make confusion matrices as wide as the page, and folded
_NUM_LISTED = 20
_DIGITS = 4  # of the largest figure in a column


def write_html(report: dict[str, Any], pictures: dict[str, bytes]) -> bytes:
    """Returns the page as UTF-8: one file that asks for nothing else, whatever the texts in it are.

    Args:
        report: see the top of this module.
        pictures: PNG files by name; `memorisation.picture` names one of them.
    """
    sections = [
        _verdict(report),
        _warnings(report),
        _distances(report, "latents", "In latent space"),
        _distances(report, "inception", "In the features of Inception"),
        _memorisation(report, pictures),
        _classifier(report),
        _sweep(report),
        _evaluated(report),
        _footnotes(report),
        _settings(report),
    ]
    body = "\n".join(section for section in sections if section)
    return _PAGE.format(style=_STYLE, intro=_intro(report), body=body).encode("utf-8", "replace")


# --- texts and numbers -------------------------------------------------------------------------------------

_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")


def _text(value: Any) -> str:
    """Returns a value as harmless HTML; what HTML cannot hold becomes a question mark in a diamond."""
    return escape(_UNPRINTABLE.sub("\ufffd", str(value)), quote=True)


def _name(value: Any) -> str:
    """Returns the name of a class or file, which may run from right to left without turning what is around it."""
    return f"<bdi>{_text(value)}</bdi>"


def _number(value: Any) -> str:
    if not _is_number(value):
        return '<span class="none" title="not known">–</span>'
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}".replace("-", "−")


def _column(values: Iterable[Any]) -> Callable[[Any], str]:
    """Returns how the numbers of a column are written: with equally many decimals, so that they can be compared."""
    largest = max((abs(value) for value in values if _is_number(value)), default=0.0)
    decimals = max(0, _DIGITS - 1 - math.floor(math.log10(largest))) if largest > 0 else 0
    return lambda value: f"{value:z,.{decimals}f}".replace("-", "−") if _is_number(value) else _number(None)


def _share(value: Any) -> str:
    return f"{100 * value:.1f}\u00a0%" if _is_number(value) else _number(None)


def _round_share(value: float) -> str:
    """Writes a share that was not measured."""
    return f"{100 * value:.3g}\u00a0%"


def _typeset(sentence: Any) -> str:
    """Returns a sentence that was made for a terminal with minus signs, and numbers that keep their %."""
    return re.sub(r"(?<=\d) %", "\u00a0%", re.sub(r"(?<![\w.])-(?=\d)", "−", _text(sentence)))


def _sentence(line: Any) -> str:
    """Returns a line that was made for a terminal as a sentence."""
    text = str(line)
    return _text(f"{text[:1].upper() if text[:1].isascii() else text[:1]}{text[1:]}{'' if text.endswith('.') else '.'}")


def _points(value: Any) -> str:
    return f"{100 * value:+.1f}".replace("-", "−") if _is_number(value) else _number(None)


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


# --- building blocks ---------------------------------------------------------------------------------------


def _section(title: str, *parts: str) -> str:
    inner = "\n".join(part for part in parts if part)
    return f"<section>\n<h2>{_text(title)}</h2>\n{inner}\n</section>" if inner else ""


def _table(caption: str, head: Sequence[str], rows: Iterable[Sequence[str]], *, kind: str = "") -> str:
    """Returns a table of cells that are HTML already; the first cell of a row is its head."""
    top = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    lines = "\n".join(
        f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in rest)}</tr>' for first, *rest in rows
    )
    if not lines:
        return ""
    table = (
        f"<table{kind}><caption>{caption}</caption>\n<thead><tr>{top}</tr></thead>\n<tbody>\n{lines}\n</tbody></table>"
    )
    return _scrolling(table, caption)


def _scrolling(inner: str, label: str) -> str:
    """Puts something wide into a box of its own, so that the page itself never has to be moved sideways."""
    return f'<div class="scroll" role="region" tabindex="0" aria-label="{_plain(label)}">\n{inner}\n</div>'


def _plain(html: str) -> str:
    """Returns HTML as the text of an attribute: tags go, and what was escaped stays so."""
    return re.sub(r"<[^>]*>", "", html)


def _folded(title: str, inner: str) -> str:
    return f"<details><summary>{title}</summary>\n{inner}\n</details>" if inner else ""


def _figure(inner: str, caption: str) -> str:
    return f"<figure>\n{inner}\n<figcaption>{caption}</figcaption>\n</figure>"


def _png(data: bytes, alt: str) -> str:
    return f'<img src="data:image/png;base64,{base64.b64encode(data).decode()}" alt="{alt}">'


def _bars(ours: Any, theirs: Any, largest: float) -> str:
    """Draws two bars, one above the other: of the synthetic images, and of the real ones."""
    first = 1 if _is_number(theirs) else 6  # a bar that is alone stands in the middle
    bars = [
        f'<rect class="{kind}" y="{y}" height="8" width="{100 * max(0.0, value) / largest:.1f}"/>'
        for kind, y, value in (("ours", first, ours), ("theirs", 11, theirs))
        if _is_number(value)
    ]
    return f'<svg class="bars" viewBox="0 0 100 20" preserveAspectRatio="none" aria-hidden="true">{"".join(bars)}</svg>'


def _key(**kinds: str) -> str:
    """Explains the colours of a chart."""
    items = "".join(f'<li><span class="swatch {kind}"></span>{label}</li>' for kind, label in kinds.items())
    return f'<ul class="key">{items}</ul>'


class _Chart:
    """A drawing area with two labelled axes that start at `low` and end at `high`."""

    def __init__(self, x_range: tuple[float, float], y_range: tuple[float, float]) -> None:
        self.x_low, self.x_high = x_range
        self.y_low, self.y_high = y_range
        self.parts: list[str] = []

    def x(self, value: float) -> float:
        """Returns where a value is across."""
        span = (self.x_high - self.x_low) or 1.0
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * (value - self.x_low) / span

    def y(self, value: float) -> float:
        """Returns where a value is, from the top."""
        span = (self.y_high - self.y_low) or 1.0
        return _HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * (value - self.y_low) / span

    def axes(self, x_label: str, y_label: str, x_ticks: Iterable[float], y_ticks: Iterable[float]) -> None:
        """Draws the lines of the scale with their numbers."""
        for tick in y_ticks:
            row = self.y(tick)
            self.parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{row:.1f}" y2="{row:.1f}"/>')
            self._write(_LEFT - 8, row + 5, f"{tick:.3g}", "end")
        for tick in x_ticks:
            self._write(self.x(tick), _HEIGHT - _BOTTOM + 22, f"{tick:.3g}", "middle")
        self._write((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 8, x_label, "middle")
        middle = (_TOP + _HEIGHT - _BOTTOM) / 2
        turned = f' transform="rotate(-90 18 {middle})"'
        self._write(18, middle, y_label, "middle", turned)

    def _write(self, x: float, y: float, text: str, anchor: str, more: str = "") -> None:
        self.parts.append(f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{more}>{_text(text)}</text>')

    def draw(self, label: str) -> str:
        """Returns the drawing; `label` says in words what it shows."""
        inner = "\n".join(self.parts)
        return f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}">\n{inner}\n</svg>'


def _ticks(low: float, high: float) -> list[float]:
    """Returns four to ten round numbers within a range."""
    if not high > low:
        return [low]
    raw = (high - low) / 5
    unit = 10 ** math.floor(math.log10(raw))
    step = next(factor * unit for factor in (1, 2, 5, 10) if factor * unit >= raw)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


# --- top of the page ---------------------------------------------------------------------------------------


def _intro(report: dict[str, Any]) -> str:
    evaluated = report.get("evaluated") or {}
    facts = []
    if "checkpoint" in evaluated:
        facts.append(f"model {_name(evaluated['checkpoint'])}")
    if "step" in evaluated:
        facts.append(f"step {_number(evaluated['step'])}")
    made_with = evaluated.get("made_with") or {}
    if "cond_scale" in made_with:
        facts.append(f"guidance {_number(made_with['cond_scale'])}")
    for name, count in (evaluated.get("images") or {}).items():
        facts.append(f"{_number(count)} {_text(name)} images")
    return f"<p>{' · '.join(facts)}</p>" if facts else ""


def _verdict(report: dict[str, Any]) -> str:
    """Answers three questions in a sentence each."""
    why = report.get("why") or {}
    cards = []
    for question, part, answer in (
        ("Are they close to real images?", "latents", _is_close),
        ("Are they copies?", "memorisation", _are_copies),
        ("Do they help a classifier?", "classifier", _do_help),
    ):
        if report.get(part):
            mark, sentence = answer(report[part])
        elif part in why:
            mark, sentence = "not known", f"Why: {_text(why[part])}"
        else:
            continue
        kind = _COLOURS.get((part, mark), "open")
        answered = f"<strong>{mark[0].upper()}{mark[1:]}.</strong> {sentence}"
        cards.append(f'<div class="card {kind}"><h3>{question}</h3><p>{answered}</p></div>')
    return _section("In three sentences", f'<div class="cards">{"".join(cards)}</div>' if cards else "")


_COLOURS = {
    ("latents", "yes"): "good",
    ("latents", "no"): "bad",
    ("memorisation", "no sign of it"): "good",
    ("memorisation", "yes"): "bad",
    ("classifier", "yes"): "good",
    ("classifier", "no"): "bad",
}


def _is_close(latents: dict[str, Any]) -> tuple[str, str]:
    ours, theirs = latents.get("synthetic") or {}, latents.get("training") or {}
    key = next((k for k in ("frechet_mean", "frechet") if _is_number(ours.get(k)) and _is_number(theirs.get(k))), None)
    if key is None:
        return "not known", "There are too few images for a Fréchet distance."
    ratio = ours[key] / theirs[key] if theirs[key] > 0 else math.inf
    times = f"{ratio:.2g} times that" if math.isfinite(ratio) else "more than the 0"
    sentence = f"Their Fréchet distance to the test images is {times} of real training images."
    per_class = latents.get("images", 0) / max(1, len(ours.get("frechet_per_class") or {}))
    if per_class < FEW_PER_CLASS:
        sentence += f" It scatters much with so few images: {per_class:.3g} per class."
    if ratio <= _CLOSE:
        return "yes", sentence
    return ("nearly" if ratio <= _NEAR else "no"), sentence


def _are_copies(memorisation: dict[str, Any]) -> tuple[str, str]:
    same = [pair for pair in memorisation.get("same_content") or [] if pair.get("kind") == "training"]
    if same:
        return "yes", f"Synthetic files that are training images, byte for byte: {_number(len(same))}."
    share, limit = memorisation.get("near_share"), memorisation.get("near_share_limit")
    nearer, nearer_limit = memorisation.get("nearer_to_training"), memorisation.get("nearer_to_training_limit")
    if not _is_number(share) or not _is_number(limit):
        return "not known", "Without test images nobody can say how near a training image is too near."
    few = memorisation.get("test_near_share")
    of_test = f"only {_round_share(few)}" if _is_number(few) else "only few"
    near = f"{_share(share)} of them are as near to a training image as {of_test} of the test images are"
    if share > limit:
        return "perhaps", f"{near}; chance explains up to {_share(limit)}. Look at the closest pairs."
    if _is_number(nearer) and _is_number(nearer_limit) and nearer > nearer_limit:
        return "perhaps", (
            f"{_share(nearer)} of them are nearer to a training than to a test image; chance explains up to "
            f"{_share(nearer_limit)}. Look at the closest pairs."
        )
    return "no sign of it", f"{near}; chance explains up to {_share(limit)}."


def _do_help(classifier: dict[str, Any]) -> tuple[str, str]:
    difference = classifier.get("difference") or {}
    mark = {"helps": "yes", "harms": "no"}.get(str(difference.get("verdict")), "not known")
    return mark, _typeset(difference.get("sentence", "Not all classifiers are trained yet."))


def _warnings(report: dict[str, Any]) -> str:
    lines = "".join(f"<li>{_sentence(line)}</li>" for line in report.get("warnings") or [])
    return _section("To keep in mind", f'<ul class="warnings">{lines}</ul>' if lines else "")


# --- distances and overlap ---------------------------------------------------------------------------------

_FIGURES = {  # figure -> its name, what is good, how it is written
    "frechet_mean": ("Fréchet distance, mean over classes", "low", _number),
    "frechet": ("Fréchet distance, all classes as one", "low", _number),
    "kernel_mean": ("kernel distance, mean over classes", "low, near 0", _number),
    "kernel": ("kernel distance, all classes as one", "low, near 0", _number),
    "precision": ("precision: they look real", "high", _share),
    "recall": ("recall: they are as varied as real ones", "high", _share),
    "density": ("density: they lie where real ones are many", "near 1", _number),
    "coverage": ("coverage: every kind of real one occurs", "high", _share),
}


def _distances(report: dict[str, Any], part: str, title: str) -> str:
    """Shows synthetic images and, as the yardstick, training images against the test images."""
    figures = report.get(part)
    if not figures:
        return _reason(report, part, title)
    ours, theirs = figures.get("synthetic") or {}, figures.get("training") or {}
    rows = [
        (label, _with_spread(ours, name, write), _with_spread(theirs, name, write), good)
        for name, (label, good, write) in _FIGURES.items()
        if name in ours or name in theirs
    ]
    recognition = figures.get("recognition") or {}
    if recognition:
        label = "nearest to the mean of their own class"
        rows.append((label, _share(recognition.get("synthetic")), f"{_share(recognition.get('test'))} (test)", "high"))
    caption = (
        f"{_number(figures.get('images'))} synthetic images, and as many real training images as the yardstick, "
        f"against {_number(figures.get('test_images'))} test images"
    )
    return _section(
        title, _table(caption, ("figure", "synthetic", "training", "good is"), rows), _class_bars(ours, theirs)
    )


def _with_spread(figures: dict[str, Any], name: str, write: Callable[[Any], str]) -> str:
    value, deviation = figures.get(name), figures.get(f"{name}_deviation")
    if not _is_number(value) or not _is_number(deviation) or deviation <= 0:
        return write(value)
    decimals = max(0, 1 - math.floor(math.log10(deviation)))  # two digits of the deviation, and no more of the figure
    return f"{value:z,.{decimals}f} ±\u00a0{deviation:,.{decimals}f}".replace("-", "−")


def _class_bars(ours: dict[str, Any], theirs: dict[str, Any]) -> str:
    """Lists the classes with their distances, as numbers and as bars."""
    one, two = ours.get("frechet_per_class") or {}, theirs.get("frechet_per_class") or {}
    kernel = ours.get("kernel_per_class") or {}
    names = list(dict.fromkeys([*one, *two]))
    largest = max((value for value in [*one.values(), *two.values()] if _is_number(value)), default=0.0) or 1.0
    write, write_kernel = _column([*one.values(), *two.values()]), _column(kernel.values())
    rows = [
        (
            _name(name),
            _bars(one.get(name), two.get(name), largest),
            write(one.get(name)),
            write(two.get(name)),
            write_kernel(kernel.get(name)),
        )
        for name in names
    ]
    above_bars = '<span class="above-bars">Fréchet distance</span>'
    head = ("class", above_bars, "synthetic", "training", "kernel distance, synthetic")
    table = _table("Distance to the test images of each class", head, rows)
    return table and _key(ours="synthetic", theirs="training") + table


def _reason(report: dict[str, Any], part: str, title: str) -> str:
    why = (report.get("why") or {}).get(part)
    return _section(title, f"<p>{_sentence(why)}</p>") if why else ""


# --- copies ------------------------------------------------------------------------------------------------


def _memorisation(report: dict[str, Any], files: dict[str, bytes]) -> str:
    """Shows how near the synthetic images are to single training images."""
    title = "Are they copies?"
    part = report.get("memorisation")
    if not part:
        return ""
    few = part.get("test_near_share")
    expected = _round_share(few) if _is_number(few) else ""
    rows = [
        (
            "median distance to the nearest training image",
            _number(part.get("median")),
            _number(part.get("test_median")),
        ),
        (f"share {_nearer_than(part)}", _share(part.get("near_share")), expected),
        ("up to this share by chance", _share(part.get("near_share_limit")), ""),
        ("share nearer to a training than to a test image", _share(part.get("nearer_to_training")), _round_share(0.5)),
        ("up to this share by chance", _share(part.get("nearer_to_training_limit")), ""),
    ]
    return _section(
        title,
        _table("Distances in latent space", ("figure", "synthetic", "test images"), rows),
        _histogram(part),
        _closest(part, files),
        _same_content(part),
        _folded("Distances of each class", _memorisation_per_class(part)),
    )


def _nearer_than(part: dict[str, Any]) -> str:
    few = part.get("test_near_share")
    most = f"{_round_share(1 - few)} of the" if _is_number(few) else "nearly all"
    return f"nearer than {most} test images"


def _histogram(part: dict[str, Any]) -> str:
    """Draws how far images are from the training images: synthetic ones as bars, test images as an outline."""
    ours, theirs = part.get("distances") or [], part.get("test_distances") or []
    values = [value for value in [*ours, *theirs] if _is_number(value)]
    if not values:
        return ""
    low, high = min(values), max(values)
    high = high if high > low else low + 1.0
    num_bins = max(8, min(40, round(2 * len(values) ** 0.5)))
    one, two = _bin(ours, low, high, num_bins), _bin(theirs, low, high, num_bins)
    top = max(one + two)
    chart = _Chart((low, high), (0.0, 100 * top))
    chart.axes("distance to the nearest training image", "% of images", _ticks(low, high), _ticks(0, 100 * top))
    width = (high - low) / num_bins
    outline = [f"{chart.x(low):.1f},{chart.y(0):.1f}"]
    for i in range(num_bins):
        left, right = chart.x(low + i * width), chart.x(low + (i + 1) * width)
        row, other = chart.y(100 * one[i]), chart.y(100 * two[i])
        chart.parts.append(
            f'<rect class="ours see-through" x="{left:.1f}" y="{row:.1f}" width="{right - left - 1:.1f}" '
            f'height="{chart.y(0) - row:.1f}"/>'
        )
        outline += [f"{left:.1f},{other:.1f}", f"{right:.1f},{other:.1f}"]
    if theirs:
        outline.append(f"{chart.x(high):.1f},{chart.y(0):.1f}")
        chart.parts.append(f'<polyline class="outline" points="{" ".join(outline)}"/>')
    threshold = part.get("threshold")
    if _is_number(threshold) and low <= threshold <= high:
        place = f"{chart.x(threshold):.1f}"
        chart.parts.append(f'<line class="mark" x1="{place}" x2="{place}" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}"/>')
    label = (
        f"Histogram of distances to the nearest training image: {_plain(_number(part.get('median')))} in the median of "
        f"the synthetic, {_plain(_number(part.get('test_median')))} of the test images"
    )
    key = _key(ours="synthetic", **({"outline": "test"} if theirs else {}))
    few = part.get("test_near_share")
    note = "Copies would stand at the left"
    if _is_number(threshold):
        of_test = _round_share(few) if _is_number(few) else "few"
        note += f", left of the dashed line; {of_test} of the test images are there, too"
    note += "."
    return _figure(key + chart.draw(label), note)


def _bin(values: Sequence[Any], low: float, high: float, num_bins: int) -> list[float]:
    """Returns the share of the values in each of the bins from `low` to `high`."""
    counts = [0] * num_bins
    known = [value for value in values if _is_number(value)]
    for value in known:
        counts[min(num_bins - 1, int(num_bins * (value - low) / (high - low)))] += 1
    return [count / max(1, len(known)) for count in counts]


def _closest(part: dict[str, Any], files: dict[str, bytes]) -> str:
    pairs = part.get("pairs") or []
    rows = [(_name(p.get("synthetic")), _name(p.get("training")), _number(p.get("distance"))) for p in pairs]
    head = ("synthetic", "nearest training image", "distance")
    table = _table("The closest pairs", head, rows, kind=' class="words pairs"')
    data = files.get(part.get("picture") or "")
    if data is None:
        why = part.get("why_no_picture")
        return (f"<p>There is no picture of the closest pairs: {_text(why)}.</p>" if why else "") + table
    picture = _png(data, f"{len(pairs)} synthetic images, each above the training image that is nearest to it")
    shown = _scrolling(f'<div class="picture">{picture}</div>', "Picture of the closest pairs")
    return _figure(shown, "Synthetic images above their nearest training images, the closest pair first.") + table


def _same_content(part: dict[str, Any]) -> str:
    pairs = part.get("same_content") or []
    rows = [(_name(p.get("synthetic")), _name(p.get("same_as")), _text(p.get("kind"))) for p in pairs[:_NUM_LISTED]]
    more = f", the first {_NUM_LISTED} of {len(pairs):,}" if len(pairs) > _NUM_LISTED else ""
    caption, head = f"Files that are equal, byte for byte{more}", ("synthetic", "the same as", "which is")
    return _table(caption, head, rows, kind=' class="words"')


def _memorisation_per_class(part: dict[str, Any]) -> str:
    classes = part.get("per_class") or {}
    write = _column(p.get(name) for p in classes.values() for name in ("median", "test_median"))
    rows = [
        (_name(name), write(p.get("median")), write(p.get("test_median")), _share(p.get("near_share")))
        for name, p in classes.items()
    ]
    head = ("class", "median, synthetic", "median, test", _nearer_than(part))
    return _table("Distance to the nearest training image", head, rows)


# --- classifier --------------------------------------------------------------------------------------------


def _classifier(report: dict[str, Any]) -> str:
    """Shows the accuracy with and without the synthetic images."""
    title = "Do they help a classifier?"
    part = report.get("classifier")
    if not part:
        return _reason(report, "classifier", title)
    sets, difference = part.get("sets") or {}, part.get("difference") or {}
    known = list(sets)
    rows = [
        (
            _text(name),
            f"{_share(sets[name].get('mean'))}{_spread(sets[name].get('deviation'))}",
            _bars(sets[name].get("mean"), None, 1.0),
            " ".join(_share(value) for value in sets[name].get("accuracies") or []),
        )
        for name in known
    ]
    counts = part.get("images") or {}
    facts = [f"{_number(counts[name])} {name}" for name in ("real", "synthetic", "test") if name in counts]
    facts += [f"{_number(part[name])} {label}" for name, label in _TRAINING_FACTS.items() if name in part]
    sentence = f"<p>{_typeset(difference['sentence'])}</p>" if "sentence" in difference else ""
    names = _class_names(report)
    return _section(
        title,
        sentence,
        _table("Accuracy on the test images", ("trained on", "mean", "", "each seed"), rows),
        f'<p class="note">Images and settings: {", ".join(facts)}.</p>' if facts else "",
        _folded("Accuracy of each class", _accuracy_per_class(sets, known, names)),
        _matrices(sets, known, names),
    )


_TRAINING_FACTS = {"num_steps": "training steps", "batch_size": "images per step", "image_size": "pixels wide"}


def _spread(deviation: Any) -> str:
    return f" ±\u00a0{100 * deviation:.1f}" if _is_number(deviation) else ""


def _class_names(report: dict[str, Any]) -> list[str]:
    return list((report.get("evaluated") or {}).get("images_per_class") or {})


def _accuracy_per_class(sets: dict[str, Any], known: Sequence[str], names: Sequence[str]) -> str:
    columns = [sets[name].get("per_class") or [] for name in known]
    count = max(map(len, columns), default=0)
    rows = [
        (_name(_class_name(names, i)), *(_share(column[i] if i < len(column) else None) for column in columns))
        for i in range(count)
    ]
    return _table("Accuracy of each class, mean over the seeds", ("class", *map(_text, known)), rows)


def _class_name(names: Sequence[str], label: int) -> str:
    return names[label] if label < len(names) else str(label)


def _matrices(sets: dict[str, Any], known: Sequence[str], names: Sequence[str]) -> str:
    figures = []
    for name in known:
        title = _text(name)
        counts = sets[name].get("confusion")
        if counts:
            picture = pictures.confusion_matrix(counts, [_class_name(names, i) for i in range(len(counts))])
            alt = f"Confusion matrix of the classifier trained on {title} images: {_confusions(counts, names)}"
            shown = f'<div class="picture">{_png(pictures.encode_image(picture, ".png"), alt)}</div>'
            caption = f"Trained on {title}: counts over all seeds."
            figures.append(_figure(_scrolling(shown, f"Confusion matrix, trained on {title}"), caption))
    if len(names) > _MANY_CLASSES:
        return _folded("Confusion matrices", "".join(figures))
    return f'<div class="matrices">{"".join(figures)}</div>' if figures else ""


def _confusions(counts: Sequence[Sequence[int]], names: Sequence[str]) -> str:
    """Says in words what a confusion matrix shows: how many are right, and the commonest mistake."""
    right, total = sum(row[i] for i, row in enumerate(counts)), sum(map(sum, counts))
    wrong = [(count, i, j) for i, row in enumerate(counts) for j, count in enumerate(row) if i != j and count]
    text = f"{right:,} of {total:,} are right"
    if wrong:
        count, i, j = max(wrong, key=lambda cell: cell[0])
        text += f"; most often {_text(_class_name(names, i))} was taken for {_text(_class_name(names, j))} ({count:,})"
    return text


# --- sweep -------------------------------------------------------------------------------------------------

_SWEEP_COLUMNS = {  # figure -> its name, how it is written
    "frechet_mean": ("Fréchet per class", _number),
    "frechet": ("Fréchet", _number),
    "kernel": ("kernel", _number),
    "recognition": ("own class", _share),
    "precision": ("precision", _share),
    "recall": ("recall", _share),
    "density": ("density", _number),
    "coverage": ("coverage", _share),
    "near_share": ("near copies", _share),
}
_SWEEP_CLASSIFIER_COLUMNS = {
    "alone": ("classifier, these alone", _share),
    "with_real": ("classifier, with real", _share),
}


def _sweep(report: dict[str, Any]) -> str:
    """Shows the figures at each guidance scale and checkpoint."""
    title = "Which guidance scale?"
    part = report.get("sweep")
    if not part:
        return ""
    points, best, training = part.get("points") or [], part.get("best") or {}, part.get("training") or {}
    has_classifiers = part.get("best_for_classifiers") is not None
    columns = _SWEEP_COLUMNS | _SWEEP_CLASSIFIER_COLUMNS if has_classifiers else _SWEEP_COLUMNS

    def row(head: str, figures: dict[str, Any]) -> list[str]:
        return [head, *(write(figures.get(name)) for name, (_, write) in columns.items())]

    rows = [row("real training images", training)] if training else []
    for point in points:
        head = _point_name(point)
        is_best = bool(best) and _place(point) == _place(best)
        rows.append(row(f"<strong>{head} (best)</strong>" if is_best else head, point))
    chosen = "".join(f"<p>{_typeset(sentence)}</p>" for sentence in part.get("sentences") or ())
    head = ("", *(label for label, _ in columns.values()))
    return _section(title, chosen, _sweep_curve(points, training), _table("Against the test images", head, rows))


def _point_name(point: dict[str, Any]) -> str:
    return f"step {_number(point.get('step'))}, guidance {_number(point.get('guidance'))}"


def _place(point: dict[str, Any]) -> tuple[Any, Any]:
    return point.get("step"), point.get("guidance")


def _sweep_curve(points: Sequence[dict[str, Any]], training: dict[str, Any]) -> str:
    known = [p for p in points if _is_number(p.get("frechet_mean")) and _is_number(p.get("guidance"))]
    if not known:
        return ""
    floor = training.get("frechet_mean")
    scales = [p["guidance"] for p in known]
    top = 1.05 * max([p["frechet_mean"] for p in known] + ([floor] if _is_number(floor) else [])) or 1.0
    low, high = min(scales), max(scales)
    chart = _Chart((low, high) if high > low else (low - 1, high + 1), (0.0, top))
    chart.axes("guidance scale", "Fréchet per class", sorted(set(scales)), _ticks(0, top))
    if _is_number(floor):
        row = f"{chart.y(floor):.1f}"
        chart.parts.append(f'<line class="floor" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{row}" y2="{row}"/>')
    steps = sorted({p.get("step") or 0 for p in known})
    for number, step in enumerate(steps):
        own = sorted((p for p in known if (p.get("step") or 0) == step), key=lambda p: p["guidance"])
        places = [(chart.x(p["guidance"]), chart.y(p["frechet_mean"])) for p in own]
        fade = 0.35 + 0.65 * (number + 1) / len(steps)
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5"/>' for x, y in places)
        chart.parts.append(f'<g class="curve" opacity="{fade:.2f}"><polyline points="{line}"/>{dots}</g>')
    label = f"Fréchet distance per class against the guidance scale, from {low:g} to {high:g}"
    ours = "synthetic" + (", later steps darker" if len(steps) > 1 else "")
    if not _is_number(floor):
        return _figure(_key(ours=ours) + chart.draw(label), "Lower is better.")
    key = _key(ours=ours, dashed="training images")
    return _figure(key + chart.draw(label), "Lower is better; the dashed line is what real training images reach.")


# --- what, how and with which settings ---------------------------------------------------------------------


def _evaluated(report: dict[str, Any]) -> str:
    evaluated = report.get("evaluated") or {}
    made_with = evaluated.get("made_with") or {}
    rows = [(label, _fact(name, evaluated[name])) for name, label in _FACTS.items() if name in evaluated]
    rows += [(label, _fact(name, made_with[name])) for name, label in _MADE_WITH.items() if name in made_with]
    classes = [
        (_name(name), *(_number(counts.get(kind)) for kind in ("synthetic", "training", "test")))
        for name, counts in (evaluated.get("images_per_class") or {}).items()
    ]
    head = ("class", "synthetic", "training", "test")
    return _section(
        "What was evaluated",
        _table("The model and its images", ("what", "value"), rows, kind=' class="words"'),
        _folded("Images of each class", _table("Number of images", head, classes)),
    )


_FACTS = {
    "checkpoint": "checkpoint",
    "step": "training step",
    "synthetic_path": "folder of the synthetic images",
    "split": "how test images were chosen",
    "image_size": "image size, pixels",
}
_MADE_WITH = {
    "step": "step that the images were made with",
    "cond_scale": "guidance scale",
    "guidance_interval": "part of the way that is guided",
    "sampler": "sampler",
    "sampling_timesteps": "sampler steps",
    "seed": "seed of the images",
}


def _fact(name: str, value: Any) -> str:
    return _number(value) if name == "step" and _is_number(value) else _value(value)


def _value(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "none"}[value]
    if isinstance(value, list | tuple):
        return " ".join(map(_value, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else _name(value)


def _settings(report: dict[str, Any]) -> str:
    rows = [(f"<code>{_text(name)}</code>", _value(value)) for name, value in (report.get("settings") or {}).items()]
    return _section("Settings", _table("As the script was run", ("setting", "value"), rows, kind=' class="words"'))


def _footnotes(report: dict[str, Any]) -> str:
    """Says how each figure that is on the page is computed."""
    shown = [(term, text) for parts, term, text in _HOW if any(report.get(part) for part in parts.split())]
    items = "\n".join(f"<dt>{term}</dt><dd>{text}</dd>" for term, text in shown)
    return _section("How the figures are computed", f"<dl>\n{items}\n</dl>" if items else "")


_HOW = (  # parts of the report that show it, the figure, and how it is computed
    (
        "latents memorisation sweep",
        "Latent space",
        "An image is what the VAE's encoder makes of it: the mean of the posterior, normalised as in training.",
    ),
    (
        "latents inception sweep",
        "Yardstick",
        "Real training images, as many of each class as there are synthetic ones, are compared with the test images in "
        "the same way. They are real, so this is what a perfect generator would get.",
    ),
    (
        "latents inception sweep",
        "Fréchet distance",
        "Between normal distributions fitted to both sets: squared distance of the means plus the difference of the "
        "covariances (Dowson and Landau 1982; with Inception features: FID, Heusel et al. 2017). In latent space it is "
        "taken in the leading principal directions of the test images.",
    ),
    (
        "latents inception sweep",
        "Kernel distance",
        "The unbiased squared maximum mean discrepancy with the kernel (x·y/d + 1)³ (KID, Bińkowski et al. 2018): 0 "
        "for equal distributions whatever the number of images, so small negative values occur. ± is the standard "
        "deviation over random subsets.",
    ),
    (
        "latents inception sweep",
        "Precision and recall",
        "The share of synthetic images within the reach of a real one's k nearest neighbours, and the reverse "
        "(Kynkäänniemi et al. 2019).",
    ),
    (
        "latents inception sweep",
        "Density and coverage",
        "How many such neighbourhoods of real images a synthetic image lies in, over k, and the share of them with a "
        "synthetic image inside (Naeem et al. 2020).",
    ),
    (
        "memorisation sweep",
        "Nearness to training images",
        "The distance of a latent to its nearest training latent. Test images were never seen, so where they lie is "
        "where honest images may lie, and the nearest few of them make the threshold. “By chance”: two standard "
        "deviations above what is expected of independent images.",
    ),
    (
        "classifier",
        "Classifier",
        "A ResNet-18 (He et al. 2016) trained from nothing, with the same number of steps for each set, tested on the "
        "test images after the last step. With both kinds, half of each batch is real. ± is the standard deviation "
        "over the seeds, the interval is Student's t for 95 %. Both are about the scatter of training, not of the test "
        "images.",
    ),
)


# --- the frame ---------------------------------------------------------------------------------------------

_STYLE = """
:root { color-scheme: light dark; --back: #fff; --card: #f5f7fa; --ink: #1b2026; --soft: #56616e; --line: #d5dbe2;
  --ours: #1f5ab4; --theirs: #d97a1f; --good: #1d7d46; --bad: #b3261e; --open: #8a6100; }
@media screen and (prefers-color-scheme: dark) { :root { --back: #14181d; --card: #1d232a; --ink: #e7eaee;
  --soft: #a2adb9; --line: #37404a; --ours: #6ea6ff; --theirs: #f2a65e; --good: #62c98c; --bad: #ff8a80;
  --open: #e5b84b; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--ink); font: 1rem/1.5 system-ui, sans-serif;
  -webkit-text-size-adjust: 100%; }
header, main { max-width: 62rem; margin: 0 auto; padding: 0 1rem; overflow-wrap: anywhere; }
header { padding-top: 2rem; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .75rem; padding-bottom: .25rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 0 0 .25rem; }
header p, .note, figcaption, caption, dd { color: var(--soft); }
p { margin: .5rem 0; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 16rem), 1fr)); gap: 1rem; }
.card { background: var(--card); border-left: .35rem solid var(--open); border-radius: .4rem; padding: .75rem 1rem; }
.card strong { color: var(--open); }
.card.good { border-color: var(--good); } .card.good strong { color: var(--good); }
.card.bad { border-color: var(--bad); } .card.bad strong { color: var(--bad); }
.card p { margin: 0; }
.warnings { padding-left: 1.25rem; }
.scroll { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; min-width: 100%; font-size: .9375rem;
  overflow-wrap: normal; }
caption { text-align: left; padding-bottom: .35rem; position: sticky; left: 0; max-width: calc(100vw - 2rem); }
th, td { padding: .3rem .75rem .3rem 0; white-space: nowrap;
  border-bottom: 1px solid var(--line); text-align: right; vertical-align: top; }
th:last-child, td:last-child { padding-right: 0; }
th { font-weight: 600; }
th:first-child, .words td, .words th { text-align: left; }
tbody th { font-weight: 400; min-width: 7rem; } .words tbody th:has(code) { min-width: 11.5rem; }
tbody th, thead th, .words td { white-space: normal; } tbody th, .words td { overflow-wrap: anywhere; }
thead th { color: var(--soft); font-weight: 600; vertical-align: bottom; }
.pairs td:last-child, .pairs th:last-child { text-align: right; }
td:has(.bars) { width: 40%; } .above-bars { display: block; text-align: left; }
.bars { display: block; width: 100%; min-width: 7rem; height: 1.25rem; }
.chart { display: block; width: 100%; max-width: 44rem; }
.chart text { font-size: clamp(14px, 29.4px - 2.4vw, 21px); fill: var(--soft); } /* larger where the chart is small */
.ours { fill: var(--ours); background: var(--ours); } .theirs { fill: var(--theirs); background: var(--theirs); }
.see-through { opacity: .65; }
polyline.outline { fill: none; stroke: var(--theirs); stroke-width: 2.5; }
.swatch.outline { border: 3px solid var(--theirs); }
.swatch.dashed { width: 1.4rem; height: 0; border-top: 3px dashed var(--theirs); border-radius: 0;
  vertical-align: .25em; }
.grid { stroke: var(--line); } .mark { stroke: var(--ink); stroke-dasharray: 5 4; }
.floor { stroke: var(--theirs); stroke-width: 2; stroke-dasharray: 7 5; }
.curve polyline { fill: none; stroke: var(--ours); stroke-width: 2.5; } .curve circle { fill: var(--ours); }
.key { list-style: none; display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; margin: 1rem 0 0; padding: 0; }
.swatch { display: inline-block; width: .9rem; height: .9rem; border-radius: .2rem; margin-right: .4rem;
  vertical-align: -.1rem; }
figure { margin: 1rem 0; }
figure .scroll { margin: .5rem 0; }
.picture { background: #fff; border-radius: .4rem; padding: .5rem; width: fit-content; }
img { display: block; max-width: 100%; height: auto; }
.matrices { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 17rem), 1fr)); gap: 0 1rem; }
.matrices figure { min-width: 0; }
details { margin: 1rem 0; } summary { cursor: pointer; font-weight: 600; }
dt { font-weight: 600; margin-top: .75rem; } dd { margin: 0; }
main { padding-bottom: 3rem; }
@media screen and (max-width: 40rem) { .picture { width: max-content; } .picture img { max-width: none; }
  table { font-size: .875rem; } thead th { font-size: .8125rem; } th, td { padding-right: .4rem; }
  td { white-space: normal; }
  tbody th { min-width: 5rem; } .bars { min-width: 3rem; } td:has(.bars) { width: 25%; } }
@media print { :root { color-scheme: light; } body { font-size: 10pt; } .scroll { overflow: visible; }
  header, main { max-width: none; } h2 { break-after: avoid; } figure, .card, tr { break-inside: avoid; }
  .cards { grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); }
  .key, summary, dt { break-after: avoid; } section > .scroll { break-inside: avoid; }
  svg, .swatch, .card { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  table { font-size: 9pt; } th, td { padding: .15rem .4rem .15rem 0; } .scroll td { white-space: normal; }
  details::details-content { content-visibility: visible; height: auto; } }
"""

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<meta name="color-scheme" content="light dark">
<title>How good are the generated images?</title>
<link rel="icon" href="data:,">
<style>{style}</style>
</head>
<body>
<header>
<h1>How good are the generated images?</h1>
{intro}
</header>
<main>
{body}
</main>
</body>
</html>
"""
