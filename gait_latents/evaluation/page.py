"""What the page about an evaluation says; page.html.jinja says how: self-contained, for a browser, a printer, a phone.

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
    memorisation                distances in latent space to the nearest training image, moved sideways or not
        distances, median       of each synthetic image
        test_distances, test_median     of each test image
        threshold               the distance that few of the test images stay below
        test_near_share         how few: the share of unseen images that is expected below the threshold
        near_share, near_share_limit    share of synthetic images below it; what chance alone seldom exceeds
        nearer_to_training, nearer_to_training_limit    share nearer to a training than to a test image; likewise
        copying                 C_T: about 0 where synthetic images are no nearer than test images, else below
        per_class               {class: {median, test_median, near_share, copying}}
        pairs                   [{synthetic, training: class/file, distance}], the closest
        picture, why_no_picture key of the picture of the pairs in `pictures`, or a sentence
        same_content            [{synthetic, same_as: class/file, kind: training, test or synthetic}], equal files
    classifier                  as a Comparison returns it, and what the script adds: image_size
    sweep
        points                  [{checkpoint, step, guidance, images, near_share, near_share_limit, test_near_share,
                                nearer_to_training, recognition, and the figures of latents.synthetic}]; where
                                classifiers were trained, alone and with_real: the share that one recognises that saw
                                these samples, or real images too; and classifier, as above
        training                the same figures of as many training images; with_real: of real images alone
        best                    the point that is nearest to the test images without many near copies, or None
        best_for_classifiers    the one with the largest with_real, or None
        sentences               [sentence] about the best ones
        against                 which images the samples were compared with: validation or test
    settings                    {setting: value}
"""

import base64
import math
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from gait_latents.common import charts
from gait_latents.common.console import harmless
from gait_latents.evaluation import forms
from gait_latents.evaluation.comparison import BOTH, REAL, SYNTHETIC
from gait_latents.evaluation.figures import LARGEST_MOVE
from gait_latents.evaluation.forms import DRAWS, is_figure

_CLOSE, _NEAR = 1.25, 2.0  # times the yardstick
FEW_PER_CLASS = 30  # images: figures of fewer are shown with a warning
_MANY_CLASSES = 12  # that make confusion matrices folded
_NUM_LISTED = 20
_DIGITS = 4  # of the largest figure in a column
_EXPLAINED = ("latents", "inception", "memorisation", "classifier", "sweep")  # parts whose figures are explained
_REAL, _TEST = "real (training)", "real (test)"  # which images are meant


def write_html(report: dict[str, Any], pictures: dict[str, bytes]) -> bytes:
    """Returns the page as UTF-8: one file that asks for nothing else, whatever the texts in it are.

    Args:
        report: see the top of this module.
        pictures: PNG files by name; `memorisation.picture` names one of them.

    Raises:
        UserError: where matplotlib is absent.
    """
    unfit = forms.unfit_parts(report)  # of what this program has read or computed, none
    report = {name: part for name, part in report.items() if name not in unfit}
    notes = [f"{name} is left out of this page: it has another form than it should." for name in unfit]
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.ChainableUndefined, finalize=_harmless
    )
    sections = [
        ("In latent space", _distances(report, "latents")),
        ("In the features of Inception", _distances(report, "inception")),
        ("Are they copies?", _memorisation(report.get("memorisation") or {}, pictures)),
        ("Do they help a classifier?", _classifier(report)),
        ("Which guidance scale?", _sweep(report.get("sweep") or {})),
        ("What was evaluated", _evaluated(report.get("evaluated") or {})),
        ("Settings", [_settings(report)]),
    ]
    template = environment.from_string(Path(__file__).with_name("page.html.jinja").read_text("utf-8"))
    page = template.render(
        style=Markup(Path(__file__).with_name("page.css").read_text("utf-8")),
        facts=_facts(report.get("evaluated") or {}),
        cards=_cards(report),
        warnings=[_sentence(line) for line in [*(report.get("warnings") or []), *notes]],
        sections=[(title, shown) for title, blocks in sections if (shown := list(filter(None, blocks)))],
        parts=[name for name in _EXPLAINED if report.get(name)],
    )
    return page.encode()


def _harmless(value: Any) -> Any:
    """Returns what a template writes with its control and direction characters escaped; jinja2 escapes the rest."""
    return harmless(value) if type(value) is str else value


# --- what a section is made of: nothing (None) where there is nothing to show ------------------------------


_Block = dict[str, Any] | None


def _table(
    caption: str, head: Sequence[str], rows: Iterable[Sequence[str]], *, kind: str = "", folded: str = ""
) -> _Block:
    """Returns a table of texts, the first of each row its head; with `folded`, a title that it is folded under."""
    rows = list(rows)
    return {"caption": caption, "head": head, "rows": rows, "kind": kind, "folded": folded} if rows else None


def _figures(figures: Iterable[tuple[str, str]], *, folded: str = "") -> _Block:
    """Returns charts, as SVG with a caption, side by side where there is room."""
    found = [(Markup(svg), caption) for svg, caption in figures]
    return {"figures": found, "folded": folded} if found else None


def _text(text: str, *, kind: str = "") -> _Block:
    return {"text": text, "kind": kind} if text else None


# --- numbers and sentences ---------------------------------------------------------------------------------


_UNKNOWN = "–"


def _number(value: Any) -> str:
    if not is_figure(value):
        return _UNKNOWN
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}".replace("-", "−")


def _column(values: Iterable[Any]) -> Callable[[Any], str]:
    """Returns how the numbers of a column are written: with equally many decimals, so that they can be compared."""
    largest = max((abs(value) for value in values if is_figure(value)), default=0.0)
    decimals = max(0, _DIGITS - 1 - math.floor(math.log10(largest))) if largest > 0 else 0
    return lambda value: f"{value:z,.{decimals}f}".replace("-", "−") if is_figure(value) else _UNKNOWN


def _share(value: Any) -> str:
    return f"{100 * value:.1f}\u00a0%" if is_figure(value) else _UNKNOWN


def _round_share(value: float) -> str:
    """Writes a share that was not measured."""
    return f"{100 * value:.3g}\u00a0%"


def _typeset(sentence: Any) -> str:
    """Returns a sentence that was made for a terminal with minus signs, and numbers that keep their %."""
    return re.sub(r"(?<=\d) %", "\u00a0%", re.sub(r"(?<![\w.])-(?=\d)", "−", str(sentence)))


def _sentence(line: Any) -> str:
    """Returns a line that was made for a terminal as a sentence."""
    text = str(line)
    return f"{text[:1].upper() if text[:1].isascii() else text[:1]}{text[1:]}{'' if text.endswith('.') else '.'}"


# --- top of the page ---------------------------------------------------------------------------------------


def _facts(evaluated: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Returns (before, value, after) of what stands under the title."""
    facts = [("model ", evaluated["checkpoint"], "")] if "checkpoint" in evaluated else []
    facts += [("step ", _number(evaluated["step"]), "")] if "step" in evaluated else []
    made_with = evaluated.get("made_with") or {}
    facts += [("guidance ", _number(made_with["cond_scale"]), "")] if "cond_scale" in made_with else []
    return facts + [(f"{_number(count)} ", name, " images") for name, count in (evaluated.get("images") or {}).items()]


def _cards(report: dict[str, Any]) -> list[dict[str, str]]:
    """Answers three questions in a sentence each."""
    cards = []
    for question, part, answer, good, bad in (
        ("Are they close to real images?", "latents", _is_close, "yes", "no"),
        ("Are they copies?", "memorisation", _are_copies, "no sign of it", "yes"),
        ("Do they help a classifier?", "classifier", _do_help, "yes", "no"),
    ):
        why = (report.get("why") or {}).get(part)
        if report.get(part) or why is not None:
            mark, text = answer(report[part]) if report.get(part) else ("not known", f"Why: {why}")
            kind = {good: "good", bad: "bad"}.get(mark, "open")
            cards.append({"question": question, "mark": f"{mark.capitalize()}.", "kind": kind, "text": text})
    return cards


def _is_close(latents: dict[str, Any]) -> tuple[str, str]:
    named: list[str] = []
    mark, sentence = closeness(latents, show=lambda name: named.append(name) or "\0")
    return mark, escape(sentence).replace("\0", Markup("<bdi>{}</bdi>").format(harmless(named[0] if named else "")))


def closeness(latents: dict[str, Any], *, show: Callable[[str], str]) -> tuple[str, str]:
    """Says whether synthetic images are as close to the test images as real ones are: yes, nearly, no or not known.

    Args:
        latents: that part of the report.
        show: returns the name of a class as it can stand in a sentence.
    """
    ours, theirs = latents.get("synthetic") or {}, latents.get("training") or {}
    key = next((k for k in ("frechet_mean", "frechet") if is_figure(ours.get(k)) and is_figure(theirs.get(k))), None)
    if key is None:
        return "not known", "There are too few images for a Fréchet distance."
    ratio = ours[key] / theirs[key] if theirs[key] > 0 else math.inf
    times = f"{ratio:.2g} times that" if math.isfinite(ratio) else "more than the 0"
    sentence = f"Their Fréchet distance to the test images is {times} of real training images."
    one, two = ours.get("frechet_per_class") or {}, theirs.get("frechet_per_class") or {}
    known = [name for name in one if is_figure(one[name]) and is_figure(two.get(name)) and two[name] > 0]
    ratios = {name: one[name] / two[name] for name in known}
    far = [name for name in ratios if ratios[name] > _NEAR]
    if len(ratios) > 1:
        farthest = max(ratios, key=lambda name: ratios[name])
        sentence += f" The farthest class is {show(farthest)}, at {ratios[farthest]:.1f} times what real ones reach"
        sentence += f"; beyond {_NEAR:g} times: {len(far)} of {len(ratios)} classes." if far else "."
    per_class = (latents.get("images") or 0) / max(1, len(one))
    if per_class < FEW_PER_CLASS:
        sentence += f" It scatters much with so few images: {per_class:.3g} per class."
    if ratio <= _CLOSE and not far:
        return "yes", sentence
    return ("nearly" if ratio <= _NEAR else "no"), sentence


def _are_copies(memorisation: dict[str, Any]) -> tuple[str, str]:
    same = [pair for pair in memorisation.get("same_content") or [] if pair.get("kind") == "training"]
    if same:
        return "yes", f"Synthetic files that are training images, byte for byte: {_number(len(same))}."
    share, limit = memorisation.get("near_share"), memorisation.get("near_share_limit")
    nearer, nearer_limit = memorisation.get("nearer_to_training"), memorisation.get("nearer_to_training_limit")
    if not is_figure(share) or not is_figure(limit):
        return "not known", "Without test images nobody can say how near a training image is too near."
    few = memorisation.get("test_near_share")
    of_test = f"only {_round_share(few)}" if is_figure(few) else "only few"
    near = f"{_share(share)} of them are as near to a training image as {of_test} of the test images are"
    if share > limit:
        return "perhaps", f"{near}; chance explains up to {_share(limit)}. Look at the closest pairs."
    if is_figure(nearer) and is_figure(nearer_limit) and nearer > nearer_limit:
        return "perhaps", (
            f"{_share(nearer)} of them are nearer to a training than to a test image; chance explains up to "
            f"{_share(nearer_limit)}. Look at the closest pairs."
        )
    return "no sign of it", f"{near}; chance explains up to {_share(limit)}."


def _do_help(classifier: dict[str, Any]) -> tuple[str, str]:
    difference = classifier.get("difference") or {}
    mark = {"helps": "yes", "harms": "no"}.get(str(difference.get("verdict")), "not known")
    return mark, _typeset(difference.get("sentence", "Not all classifiers are trained yet."))


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


def _distances(report: dict[str, Any], part: str) -> list[_Block]:
    """Shows synthetic images and, as the yardstick, training images against the test images."""
    figures = report.get(part)
    if not figures:
        return _reason(report, part)
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
    return [
        _table(caption, ("figure", "synthetic", _REAL, "good is"), rows),
        *_of_classes(ours, theirs, "latent space" if part == "latents" else "Inception features"),
    ]


def _with_spread(figures: dict[str, Any], name: str, write: Callable[[Any], str]) -> str:
    value, deviation = figures.get(name), figures.get(f"{name}_deviation")
    if not is_figure(value) or not is_figure(deviation) or deviation <= 0:
        return write(value)
    decimals = max(0, 1 - math.floor(math.log10(deviation)))  # two digits of the deviation, and no more of the figure
    return f"{value:z,.{decimals}f} ±\u00a0{deviation:,.{decimals}f}".replace("-", "−")


def _of_classes(ours: dict[str, Any], theirs: dict[str, Any], where: str) -> list[_Block]:
    """Shows the distances of each class, as bars and as numbers."""
    one, two = ours.get("frechet_per_class") or {}, theirs.get("frechet_per_class") or {}
    kernel = ours.get("kernel_per_class") or {}
    names = list(dict.fromkeys([*one, *two]))
    if not names:
        return []
    write, write_kernel = _column([*one.values(), *two.values()]), _column(kernel.values())
    rows = [(n, write(one.get(n)), write(two.get(n)), write_kernel(kernel.get(n))) for n in names]
    series = {"synthetic": [one.get(n) for n in names], _REAL: [two.get(n) for n in names]}
    axis, caption = "Fréchet distance to the test images", "Distance to the test images of each class"
    chart = charts.bars(names, series, axis, label=f"{axis} of each class, {where}")
    head = ("class", "synthetic", _REAL, "kernel distance, synthetic")
    return [_figures([(chart, "Lower is better.")]), _table(caption, head, rows, folded="These distances in numbers")]


def _reason(report: dict[str, Any], part: str) -> list[_Block]:
    why = (report.get("why") or {}).get(part)
    return [_text(_sentence(why) if why else "")]


# --- copies ------------------------------------------------------------------------------------------------


def _memorisation(part: dict[str, Any], files: dict[str, bytes]) -> list[_Block]:
    """Shows how near the synthetic images are to single training images."""
    if not part:
        return []
    few = part.get("test_near_share")
    chance = "up to this share by chance"
    rows = [
        ("median distance to the nearest training image", *map(_number, map(part.get, ("median", "test_median")))),
        (f"share {_nearer_than(part)}", _share(part.get("near_share")), _round_share(few) if is_figure(few) else ""),
        (chance, _share(part.get("near_share_limit")), ""),
        ("share nearer to a training than to a test image", _share(part.get("nearer_to_training")), _round_share(0.5)),
        (chance, _share(part.get("nearer_to_training_limit")), ""),
        ("C_T, far below 0 where they are nearer than test images", _number(part.get("copying")), "0"),
    ]
    return [
        _text(
            "A copy that was moved sideways is a copy: training images may be moved by up to "
            f"{LARGEST_MOVE:.0%} of the width to be the nearest."
        ),
        _table("Distances in latent space", ("figure", "synthetic", _TEST), rows),
        _histogram(part),
        *_closest(part, files),
        _same_content(part),
        _memorisation_per_class(part),
    ]


def _nearer_than(part: dict[str, Any]) -> str:
    few = part.get("test_near_share")
    most = f"{_round_share(1 - few)} of the" if is_figure(few) else "nearly all"
    return f"nearer than {most} test images"


def _histogram(part: dict[str, Any]) -> _Block:
    """Draws how far images are from the training images."""
    ours, theirs = ([v for v in part.get(name) or [] if is_figure(v)] for name in ("distances", "test_distances"))
    if not ours and not theirs:
        return None
    threshold, few = part.get("threshold"), part.get("test_near_share")
    threshold = threshold if is_figure(threshold) else None
    label = (
        f"Histogram of distances to the nearest training image: {_number(part.get('median'))} in the median of the "
        f"synthetic, {_number(part.get('test_median'))} of the test images"
    )
    note = "Copies would stand at the left"
    if threshold is not None:
        of_test = _round_share(few) if is_figure(few) else "few"
        note += f", left of the dashed line; {of_test} of the test images are there, too"
    axis = "distance to the nearest training image"
    return _figures([(charts.distances_histogram(ours, theirs, threshold, axis=axis, label=label), f"{note}.")])


def _closest(part: dict[str, Any], files: dict[str, bytes]) -> list[_Block]:
    pairs = part.get("pairs") or []
    rows = [(str(p.get("synthetic")), str(p.get("training")), _number(p.get("distance"))) for p in pairs]
    data, why = files.get(part.get("picture") or ""), part.get("why_no_picture")
    shown = _text(f"There is no picture of the closest pairs: {why}." if why else "")
    if data is not None:
        shown = {
            "picture": f"data:image/png;base64,{base64.b64encode(data).decode()}",
            "alt": f"{len(pairs)} synthetic images, each above the training image that is nearest to it",
        }
    head = ("synthetic", "nearest training image", "distance")
    return [shown, _table("The closest pairs", head, rows, kind="words pairs")]


def _same_content(part: dict[str, Any]) -> _Block:
    pairs = part.get("same_content") or []
    rows = [(str(p.get("synthetic")), str(p.get("same_as")), str(p.get("kind"))) for p in pairs[:_NUM_LISTED]]
    more = f", the first {_NUM_LISTED} of {len(pairs):,}" if len(pairs) > _NUM_LISTED else ""
    head = ("synthetic", "the same as", "which is")
    return _table(f"Files that are equal, byte for byte{more}", head, rows, kind="words")


def _memorisation_per_class(part: dict[str, Any]) -> _Block:
    classes = part.get("per_class") or {}
    write = _column(p.get(name) for p in classes.values() for name in ("median", "test_median"))
    rows = [
        (
            name,
            write(p.get("median")),
            write(p.get("test_median")),
            _share(p.get("near_share")),
            _number(p.get("copying")),
        )
        for name, p in classes.items()
    ]
    head = ("class", "median, synthetic", f"median, {_TEST}", _nearer_than(part), "C_T")
    return _table("Distance to the nearest training image", head, rows, folded="Distances of each class")


# --- classifier --------------------------------------------------------------------------------------------


def _classifier(report: dict[str, Any]) -> list[_Block]:
    """Shows the accuracy with and without the synthetic images."""
    part = report.get("classifier")
    if not part:
        return _reason(report, "classifier")
    sets, difference, counts = (part.get(name) or {} for name in ("sets", "difference", "images"))
    differences = part.get("differences") or {}
    rows = [
        (
            name,
            _mean(found),
            _number(found.get("nll")),
            _share(found.get("eer")),
            found.get("worth") or "",
            _points(differences.get(name) or {}),
        )
        for name, found in sets.items()
    ]
    facts = [f"{_number(count)} {name}" for name, count in counts.items()]
    facts += [f"{_number(part[name])} {label}" for name, label in _TRAINING_FACTS.items() if name in part]
    names = list((report.get("evaluated") or {}).get("images_per_class") or {})
    why = (report.get("why") or {}).get(DRAWS)
    return [
        _text(_typeset(difference.get("sentence", ""))),
        _text(_typeset((part.get("beyond_posterior") or {}).get("sentence", ""))),
        _table("On the test images", _TRIAL_HEAD, rows),
        _text(f"No {DRAWS}: {why}" if why else ""),
        _text(_about_tuning(part.get("tuning") or {}), kind="note"),
        _text(f"Images and settings: {', '.join(facts)}." if facts else "", kind="note"),
        _accuracy_per_class(sets, names),
        _matrices(sets, names),
    ]


_TRIAL_HEAD = ("trained on", "accuracy", "NLL", "EER", "worth", "against real")


def _points(difference: dict[str, Any]) -> str:
    """Writes a difference of accuracies with its interval."""
    mean, low, high = (difference.get(name) for name in ("mean", "low", "high"))
    if not is_figure(mean):
        return ""
    text = f"{100 * mean:+.1f}"
    return f"{text} ({100 * low:+.1f} to {100 * high:+.1f})" if is_figure(low) and is_figure(high) else text


def _about_tuning(tuning: dict[str, Any]) -> str:
    """Says with which settings the classifiers were trained, and by which images they were chosen."""
    chosen = tuning.get("chosen") or {}
    if not chosen:
        return ""
    return (
        f"Learning rate {_number(chosen.get('learning_rate'))} and augmentation of strength "
        f"{_number(chosen.get('strength'))} were best for real images alone on {_number(tuning.get('images'))} images "
        "that are not for testing; all classifiers have them. Predictions are in the folder predictions."
    )


_TRAINING_FACTS = {"num_steps": "training steps", "batch_size": "images per step", "image_size": "pixels wide"}


def _mean(found: dict[str, Any]) -> str:
    deviation = found.get("deviation")
    return _share(found.get("mean")) + (f" ±\u00a0{100 * deviation:.1f}" if is_figure(deviation) else "")


def _accuracy_per_class(sets: dict[str, Any], names: Sequence[str]) -> _Block:
    columns = [found.get("per_class") or [] for found in sets.values()]
    rows = [
        (_class_name(names, i), *(_share(column[i] if i < len(column) else None) for column in columns))
        for i in range(max(map(len, columns), default=0))
    ]
    caption = "Accuracy of each class, mean over the seeds"
    return _table(caption, ("class", *sets), rows, folded="Accuracy of each class")


def _class_name(names: Sequence[str], label: int) -> str:
    return names[label] if label < len(names) else str(label)


def _matrices(sets: dict[str, Any], names: Sequence[str]) -> _Block:
    figures = []
    for name in (REAL, SYNTHETIC, BOTH):
        counts = (sets.get(name) or {}).get("confusion")
        if counts:
            label = f"Confusion matrix of the classifier trained on {name} images: {_confusions(counts, names)}"
            chart = charts.confusion(counts, [_class_name(names, i) for i in range(len(counts))], label=label)
            figures.append((chart, f"Trained on {name}: counts over all seeds; deeper blue is more of a true class."))
    return _figures(figures, folded="Confusion matrices" if len(names) > _MANY_CLASSES else "")


def _confusions(counts: Sequence[Sequence[int]], names: Sequence[str]) -> str:
    """Says in words what a confusion matrix shows: how many are right, and the commonest mistake."""
    right, total = sum(row[i] for i, row in enumerate(counts)), sum(map(sum, counts))
    wrong = [(count, i, j) for i, row in enumerate(counts) for j, count in enumerate(row) if i != j and count]
    text = f"{right:,} of {total:,} are right"
    if wrong:
        count, i, j = max(wrong, key=lambda cell: cell[0])
        text += f"; most often {_class_name(names, i)} was taken for {_class_name(names, j)} ({count:,})"
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
_SWEEP_CLASSIFIERS = {"alone": ("classifier, these alone", _share), "with_real": ("classifier, with real", _share)}


def _sweep(part: dict[str, Any]) -> list[_Block]:
    """Shows the figures at each guidance scale and checkpoint."""
    points, best, training = part.get("points") or [], part.get("best") or {}, part.get("training") or {}
    columns = _SWEEP_COLUMNS | (_SWEEP_CLASSIFIERS if part.get("best_for_classifiers") is not None else {})

    def row(head: str, figures: dict[str, Any]) -> list[str]:
        return [head, *(write(figures.get(name)) for name, (_, write) in columns.items())]

    rows = [row("real training images", training)] if training else []
    for point in points:
        is_best = bool(best) and all(point.get(name) == best.get(name) for name in ("step", "guidance"))
        head = f"step {_number(point.get('step'))}, guidance {_number(point.get('guidance'))}"
        rows.append(row(f"{head} (best)" if is_best else head, point))
    head = ("", *(label for label, _ in columns.values()))
    return [
        *(_text(_typeset(sentence)) for sentence in part.get("sentences") or ()),
        _sweep_curves(points, training),
        _table(f"Against the {part.get('against') or 'test'} images", head, rows),
    ]


def _sweep_curves(points: Sequence[dict[str, Any]], training: dict[str, Any]) -> _Block:
    known = [p for p in points if is_figure(p.get("frechet_mean")) and is_figure(p.get("guidance"))]
    if not known:
        return None
    curves: dict[str, list[tuple[float, float]]] = {}
    for point in sorted(known, key=lambda p: p.get("step") or 0):
        name = f"synthetic, step {_number(point.get('step'))}"
        curves.setdefault(name, []).append((point["guidance"], point["frechet_mean"]))
    floor = training.get("frechet_mean")
    floor = floor if is_figure(floor) else None
    scales = [p["guidance"] for p in known]
    label = f"Fréchet distance per class against the guidance scale, from {min(scales):g} to {max(scales):g}"
    chart = charts.sweep_curves(curves, floor, axis="Fréchet distance per class", label=label)
    note = "; the dashed line is what real training images reach" if floor is not None else ""
    return _figures([(chart, f"Lower is better{note}.")])


# --- what, and with which settings -------------------------------------------------------------------------


_FACTS = (  # part, its fact, what it is called
    ("evaluated", "checkpoint", "checkpoint"),
    ("evaluated", "step", "training step"),
    ("evaluated", "synthetic_path", "folder of the synthetic images"),
    ("evaluated", "split", "how test images were chosen"),
    ("evaluated", "vae_saw", "test images that the VAE was trained on"),
    ("evaluated", "image_size", "image size, pixels"),
    ("made_with", "step", "step that the images were made with"),
    ("made_with", "cond_scale", "guidance scale"),
    ("made_with", "guidance_interval", "part of the way that is guided"),
    ("made_with", "sampler", "sampler"),
    ("made_with", "sampling_timesteps", "sampler steps"),
    ("made_with", "seed", "seed of the images"),
)


def _evaluated(evaluated: dict[str, Any]) -> list[_Block]:
    parts = {"evaluated": evaluated, "made_with": evaluated.get("made_with") or {}}
    rows = [
        (label, _number(parts[part][name]) if name == "step" else _value(parts[part][name]))
        for part, name, label in _FACTS
        if name in parts[part]
    ]
    kinds = ("synthetic", "training", "test")
    counts = (evaluated.get("images_per_class") or {}).items()
    classes = [(name, *(_number(of_class.get(kind)) for kind in kinds)) for name, of_class in counts]
    return [
        _table("The model and its images", ("what", "value"), rows, kind="words"),
        _table("Number of images", ("class", "synthetic", _REAL, _TEST), classes, folded="Images of each class"),
    ]


def _value(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "none"}[value]
    if isinstance(value, list | tuple):
        return " ".join(map(_value, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _settings(report: dict[str, Any]) -> _Block:
    rows = [(name, _value(value)) for name, value in (report.get("settings") or {}).items()]
    return _table("As the script was run", ("setting", "value"), rows, kind="words settings")
