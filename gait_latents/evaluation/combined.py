"""Several evaluations in one table: do generated images help, whatever the split, the diffusion model and the draw?

One evaluation has one split, one diffusion model and one set of its images, so its interval cannot cover their chance.
Evaluations of runs with other seeds together can. An evaluation is placed by three digests of its report: the images
that it learnt from and was tested on (split), the weights (generator), the generated images (sampling).
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gait_latents.common.errors import UserError
from gait_latents.common.layout import REPORT_NAME
from gait_latents.evaluation.comparison import BOTH, POSTERIOR, REAL, SYNTHETIC
from gait_latents.evaluation.intervals import Interval, bootstrap_interval
from gait_latents.evaluation.report import read_finished

_RUNS, _CLASSES = ("split", "generator", "sampling", "classifier"), ("class",)  # each nested in the one before
_SETS = (REAL, POSTERIOR, SYNTHETIC, BOTH)
_MUST_AGREE = {
    "classes": "their classes",
    "image_size": "classifier_image_size",
    "num_steps": "classifier_steps",
    "recipe": "the version that trained the classifiers",
}


@dataclass(frozen=True, eq=False)
class Evaluated:
    """The classifiers of one evaluation.

    Attributes:
        place: split, generator and sampling, as digests.
        facts: what all evaluations of one table must have in common.
        scores: {set: {seed as text: {accuracy, per_class, confusion, nll, eer}}}, see `comparison.py`.
    """

    folder: Path
    place: tuple[str, str, str]
    facts: Mapping[str, Any]
    scores: Mapping[str, Mapping[str, Mapping[str, Any]]]

    @classmethod
    def read(cls, folder: Path) -> "Evaluated":
        """Reads a report; raises UserError where it has no finished classifiers, or is of an earlier version."""
        report = read_finished(folder)
        classifier, evaluated = report.get("classifier", {}), report.get("evaluated", {})
        if "sets" not in classifier:
            raise UserError(
                f"{folder / REPORT_NAME} has no finished classifiers; run evaluate_images.py --output_folder {folder} "
                "--classifier true, with the settings of before, to the end"
            )
        place = tuple(evaluated.get(name) for name in ("split_digest", "weights_digest", "synthetic_digest"))
        if None in place:
            raise UserError(
                f"{folder / REPORT_NAME} does not say which split and weights it is about, as those of earlier "
                "versions; run evaluate_images.py for it once more, which adds that and trains nothing again"
            )
        facts = {"classes": list(evaluated["images_per_class"])}
        facts |= {name: classifier.get(name) for name in _MUST_AGREE if name != "classes"}
        return cls(folder, place, facts, classifier["scores"])  # pyright: ignore[reportArgumentType]


def combine(folders: Sequence[str]) -> str:
    """Returns a table in Markdown of the classifiers of several evaluations, and what its intervals cover.

    Raises:
        UserError: where a folder has no finished classifiers, two have the same images and weights, or they differ in
            their classes or in how classifiers were trained.
    """
    found = [Evaluated.read(Path(folder)) for folder in folders]
    _refuse_what_differs(found)
    splits, generators, samplings = (len({one.place[:depth] for one in found}) for depth in (1, 2, 3))
    lines = [
        f"{len(found)} evaluations of {_count(splits, 'split')}, {_count(generators, 'diffusion model')} and "
        f"{_count(samplings, 'folder')} of generated images",
        "",
    ]
    lines += [
        "| trained on | classifiers | accuracy (deviation) | NLL | points against real (95 %) |",
        "|---" * 5 + "|",
    ]
    intervals = {name: _difference(found, name, REAL) for name in _SETS if name != REAL}
    for name in _SETS:
        scores = [score for one in found for score in one.scores.get(name, {}).values()]
        if scores:
            lines.append(_row(name, scores, intervals.get(name)))
    lines.append("")
    beyond = _difference(found, BOTH, POSTERIOR)
    if beyond is not None:
        lines.append(f"{BOTH} against {POSTERIOR}: {_say(beyond)} points.")
    lines += [_scope(known) for known in (intervals[BOTH],) if known is not None]
    return "\n".join(lines)


def _refuse_what_differs(found: Sequence[Evaluated]) -> None:
    first, *others = found
    for other in others:
        for name, value in first.facts.items():
            if other.facts[name] != value:
                raise UserError(
                    f"the evaluations in {first.folder} and {other.folder} differ in {_MUST_AGREE[name]}, so their "
                    "classifiers cannot be put together"
                )
    by_place: dict[tuple[str, ...], Evaluated] = {}
    for one in found:
        same = by_place.setdefault(one.place, one)
        if same is not one:
            raise UserError(
                f"{same.folder} and {one.folder} are about the same split, weights and images; give each only once"
            )


def _difference(found: Sequence[Evaluated], name: str, other: str) -> Interval | None:
    """Compares two training sets, classifier by classifier and class by class; None where nothing can be compared."""
    keys, rows, weights = [], [], []
    for one in found:
        for seed, score in one.scores.get(name, {}).items():
            against = one.scores.get(other, {}).get(seed)
            if against is not None:
                keys.append((*one.place, seed))
                rows.append(np.subtract(_per_class(score), _per_class(against)))
                weights.append(np.sum(score["confusion"], axis=1))
    if not keys:
        return None
    levels = [sorted(set(level)) for level in zip(*keys, strict=True)]
    values = np.full((*map(len, levels), len(rows[0])), np.nan)
    counts = np.zeros_like(values)
    for key, row, weight in zip(keys, rows, weights, strict=True):
        at = tuple(level.index(part) for level, part in zip(levels, key, strict=True))
        values[at], counts[at] = row, weight
    return bootstrap_interval(values, (_RUNS, _CLASSES), seed=0, weights=counts)


def _per_class(score: Mapping[str, Any]) -> np.ndarray:
    return np.array(score["per_class"], dtype=float)  # NaN where a class has no test images


def _row(name: str, scores: Sequence[Mapping[str, Any]], difference: Interval | None) -> str:
    accuracies = [score["accuracy"] for score in scores]
    deviation = f" ({statistics.stdev(accuracies):.1%})" if len(accuracies) > 1 else ""
    nll = statistics.fmean(score["nll"] for score in scores)
    against = "" if difference is None else _say(difference)
    cells = (name, str(len(scores)), f"{statistics.fmean(accuracies):.1%}{deviation}", f"{nll:.2f}", against)
    return f"| {' | '.join(cells)} |"


def _say(found: Interval) -> str:
    if found.low is None or found.high is None:
        return f"{100 * found.mean:+.1f}"
    return f"{100 * found.mean:+.1f} ({100 * found.low:+.1f} to {100 * found.high:+.1f})"


def _scope(found: Interval) -> str:
    rest = ", ".join(found.leaves_out)
    return f"The intervals cover the chance of {', '.join(found.covers)}" + (f", not that of {rest}." if rest else ".")


def _count(number: int, name: str) -> str:
    return f"{number} {name}{'s' if number > 1 else ''}"
