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

from gait_latents.common.console import show_name, warn
from gait_latents.common.errors import UserError
from gait_latents.common.layout import REPORT_NAME
from gait_latents.evaluation.comparison import BOTH, POSTERIOR, REAL, SYNTHETIC
from gait_latents.evaluation.intervals import Interval, bootstrap_interval
from gait_latents.evaluation.report import read_finished

# Who trains on real images alone is the same classifier whatever generator stands beside it, so a seed is not nested in
# a sampling: the three chains cross.
_CHAINS = (("split", "generator", "sampling"), ("classifier",), ("class",))
_SETS = (REAL, POSTERIOR, SYNTHETIC, BOTH)
_ENOUGH = 6  # levels of what is resampled; with fewer, fewer than 95 of 100 such intervals hold the truth
_OWN = ("weights", "seed")  # of what generate.py wrote down, what may differ
_TRAINED_WITH = "how the model was trained"  # None in reports of earlier versions, which do not say

Score = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Evaluated:
    """The classifiers of one evaluation.

    Attributes:
        place: split, generator and sampling, as digests.
        facts: what all evaluations of one table must have in common, by what a person calls it.
        scores: {set: {seed as text: {accuracy, confusion, nll, ...}}}, see `comparison.py`.
        warnings: why to read its figures with care.
    """

    folder: Path
    place: tuple[str, str, str]
    facts: Mapping[str, Any]
    scores: Mapping[str, Mapping[str, Score]]
    warnings: Sequence[str]

    @classmethod
    def read(cls, folder: Path) -> "Evaluated":
        """Reads a report; raises UserError where it has no finished classifiers, or is of an earlier version."""
        report = read_finished(folder, ("evaluated", "classifier", "warnings"))
        classifier, evaluated = report.get("classifier", {}), report.get("evaluated", {})
        classes = evaluated.get("images_per_class", {})
        scores = classifier.get("scores", {})
        has_answers = all(np.sum(score["confusion"]) > 0 for by_seed in scores.values() for score in by_seed.values())
        if "sets" not in classifier or not classes or not has_answers:
            raise UserError(
                f"{folder / REPORT_NAME} has no finished classifiers; give evaluate_images.py that --output_folder and "
                "--classifier true, besides the settings of before, and let it come to its end"
            )
        place = tuple(evaluated.get(name) for name in ("split_digest", "weights_digest", "synthetic_digest"))
        if None in place:
            raise UserError(
                f"{folder / REPORT_NAME} does not say which split and weights it is about, as those of earlier "
                "versions; run evaluate_images.py for it once more, which adds that"
            )
        made_with = {name: value for name, value in evaluated.get("made_with", {}).items() if name not in _OWN}
        facts = {
            "their classes": list(classes),
            "how many real images they train on": [counts.get("training") for counts in classes.values()],
            "how many generated images of each class they have": [
                counts.get("synthetic") for counts in classes.values()
            ],
            "classifier_image_size": classifier.get("image_size"),
            "classifier_steps": classifier.get("num_steps"),
            "the version that trained the classifiers": classifier.get("recipe"),
            "the step of the model": evaluated.get("step"),
            "how images were generated": made_with,
            _TRAINED_WITH: evaluated.get("trained_with"),
        }
        return cls(folder, place, facts, scores, report.get("warnings", []))  # pyright: ignore[reportArgumentType]


def combine(folders: Sequence[str]) -> str:
    """Returns a table in Markdown of the classifiers of several evaluations, and what its intervals cover.

    Raises:
        UserError: where a folder has no finished classifiers, two have the same images and weights, or they differ in
            more than split, seed, weights and images: in their numbers, or in how models, images or classifiers were
            made.
    """
    found = [Evaluated.read(Path(folder)) for folder in folders]
    _refuse_what_differs(found)
    for one in found:
        for line in one.warnings:
            warn(f"{show_name(str(one.folder))}: {line}")
    splits, generators, samplings = (len({one.place[:depth] for one in found}) for depth in (1, 2, 3))
    lines = [
        f"{_count(len(found), 'evaluation')} of {_count(splits, 'split')}, {_count(generators, 'diffusion model')} and "
        f"{_count(samplings, 'folder')} of generated images",
        "",
        "| trained on | classifiers | accuracy (deviation) | NLL | points against real (95 %) |",
        "|---" * 5 + "|",
    ]
    pairs = [*((name, REAL) for name in _SETS if name != REAL), (BOTH, POSTERIOR)]
    intervals = {pair: known for pair in pairs if (known := _difference(found, *pair)) is not None}
    for name in _SETS:
        scores = _scores(found, name)
        if scores:
            lines.append(_row(name, scores, intervals.get((name, REAL))))
    lines.append("")
    if (BOTH, POSTERIOR) in intervals:
        lines.append(f"{BOTH} against {POSTERIOR}: {_say(intervals[BOTH, POSTERIOR])} points.")
    scopes = {_scope(interval): None for interval in intervals.values()}
    names = {scope: [own for (own, _), known in intervals.items() if _scope(known) == scope] for scope in scopes}
    lines += [f"The intervals{_of(names[scope], len(scopes))} cover the chance of {scope}" for scope in scopes]
    resampled = next((n for n in (splits, generators, samplings) if n > 1), 0)
    if 0 < resampled < _ENOUGH:
        lines.append(f"Of so few ({resampled}) they are narrower than they should be; {_ENOUGH} or more are better.")
    return "\n".join(lines)


def _refuse_what_differs(found: Sequence[Evaluated]) -> None:
    first, *others = found
    for other in others:
        for name, value in first.facts.items():
            is_unknown = name == _TRAINED_WITH and None in (value, other.facts[name])
            if other.facts[name] != value and not is_unknown:
                which = _what_differs(value, other.facts[name])
                raise UserError(
                    f"the evaluations in {first.folder} and {other.folder} differ in {name}{which}, so their "
                    "classifiers cannot be put together"
                )
    by_place: dict[tuple[str, ...], Evaluated] = {}
    for one in found:
        same = by_place.setdefault(one.place, one)
        if same is not one:
            raise UserError(
                f"{same.folder} and {one.folder} are about the same split, weights and images; give each only once"
            )


def _what_differs(value: Any, other: Any) -> str:
    if not isinstance(value, Mapping) or not isinstance(other, Mapping):
        return ""
    names = [name for name in {**value, **other} if value.get(name) != other.get(name)]
    return f" ({', '.join(names)})"


def _scores(found: Sequence[Evaluated], name: str) -> list[Score]:
    """Returns the classifiers of a training set, each once: those of real images are the same in all of a split."""
    unique: dict[Any, Score] = {}
    for one in found:
        for seed, score in one.scores.get(name, {}).items():
            unique.setdefault((one.place[0], seed, score["nll"], str(score["confusion"])), score)
    return [*unique.values()]


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
    is_tested = counts.sum(axis=(0, 1, 2, 3)) > 0
    return bootstrap_interval(values[..., is_tested], _CHAINS, seed=0, weights=counts[..., is_tested])


def _per_class(score: Score) -> np.ndarray:
    """Returns the share of the images of each class that are recognised; NaN where there are none."""
    cells = np.array(score["confusion"], dtype=float)
    counts = cells.sum(axis=1)
    return np.divide(cells.diagonal(), counts, out=np.full(len(counts), np.nan), where=counts > 0)


def _row(name: str, scores: Sequence[Score], difference: Interval | None) -> str:
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
    rest = f", not that of {', '.join(found.leaves_out)}" if found.leaves_out else ""
    return f"{', '.join(found.covers) or 'nothing'}{rest}."


def _of(names: Sequence[str], num_scopes: int) -> str:
    return f" of {', '.join(dict.fromkeys(names))}" if num_scopes > 1 else ""


def _count(number: int, name: str) -> str:
    return f"{number} {name}{'' if number == 1 else 's'}"
