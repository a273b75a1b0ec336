"""The form of each part of a report: what was stored counts only where it is what this program writes.

report.json may come from somebody else, with a checksum that fits. Here stands what the page, the table and later
computations take for granted of it; `page.py` says what the parts mean.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeGuard

from gait_latents.common.layout import PAIRS_NAME
from gait_latents.evaluation.comparison import BOTH, REAL, SYNTHETIC

DRAWS = "draws of the posterior"  # the name under which a report says why classifiers saw none
_LARGEST_FIGURE, _LARGEST_COUNT = 1e30, 2**48  # far beyond any that is measured; charts draw both


def is_figure(value: object) -> TypeGuard[float]:
    """Says whether a value out of a report is a finite number that can be shown and drawn.

    A whole number must also fit into those of numpy, which draw it.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) < (_LARGEST_COUNT if isinstance(value, int) else _LARGEST_FIGURE)


def unfit_parts(report: Mapping[str, Any], *, num_classes: int | None = None) -> list[str]:
    """Returns the names of those parts of a report that have another form than theirs.

    Args:
        num_classes: of the run, for what is stored and goes on from there. None is for what is only shown: any key may
            be absent or None then.
    """
    known = _parts(num_classes)
    is_whole = num_classes is not None
    there = [name for name in known if name in report and (is_whole or report[name] is not None)]
    return [name for name in there if not _fits(report[name], known[name], is_whole=is_whole)]


# --- what a form is ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Record:
    """A dict with known keys; others are passed over."""

    needed: Mapping[str, Any]
    others: Mapping[str, Any] = field(default_factory=dict)  # keys that may be absent
    is_sound: Callable[[dict[str, Any]], bool] = lambda _: True  # asked last, of a whole one whose keys fit


@dataclass(frozen=True)
class _MapOf:
    """A dict whose keys are names."""

    form: Any
    needed: tuple[str, ...] = ()


@dataclass(frozen=True)
class _ListOf:
    form: Any
    length: int | None = None


@dataclass(frozen=True)
class _Maybe:
    """The form, or None."""

    form: Any


_Form = _Record | _MapOf | _ListOf | _Maybe | Callable[[Any], bool]


def _fits(value: Any, form: _Form, *, is_whole: bool) -> bool:
    if isinstance(form, _Maybe):
        return value is None or _fits(value, form.form, is_whole=is_whole)
    if isinstance(form, _Record):
        return isinstance(value, dict) and _is_record(value, form, is_whole)
    if isinstance(form, _MapOf):
        has_all = isinstance(value, dict) and (not is_whole or value.keys() >= set(form.needed))
        return has_all and all(_fits(inner, form.form, is_whole=is_whole) for inner in value.values())
    if isinstance(form, _ListOf):
        is_list = isinstance(value, list) and (form.length is None or len(value) == form.length)
        return is_list and all(_fits(inner, form.form, is_whole=is_whole) for inner in value)
    return form(value)


def _is_record(value: dict[str, Any], form: _Record, is_whole: bool) -> bool:
    if is_whole and not value.keys() >= form.needed.keys():
        return False
    fits = all(
        (value[name] is None and not is_whole) or _fits(value[name], inner, is_whole=is_whole)
        for name, inner in {**form.needed, **form.others}.items()
        if name in value
    )
    return fits and (not is_whole or form.is_sound(value))


def _all_or_none(names: Iterable[str]) -> Callable[[dict[str, Any]], bool]:
    names = tuple(names)
    return lambda value: len({name in value for name in names}) == 1


# --- values ------------------------------------------------------------------------------------------------


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _LARGEST_COUNT


def _is_number_or_none(value: Any) -> bool:
    return value is None or is_figure(value)


def is_setting(value: Any) -> bool:
    """Says whether a value is one that a setting has: a text, a figure, a switch, nothing, or a list of these."""
    return _is_plain(value) or (isinstance(value, list) and all(map(_is_plain, value)))


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, bool | str) or is_figure(value)


def _is_name_of_picture(value: Any) -> bool:
    return value in (None, PAIRS_NAME)


def _is_square(value: Any) -> bool:
    """Says whether a value is a table of counts with as many rows as columns."""
    form = _ListOf(_ListOf(_is_count, len(value)), len(value)) if isinstance(value, list) and value else _is_none
    return _fits(value, form, is_whole=True)


def _is_none(value: Any) -> bool:
    return value is None


# --- the parts ---------------------------------------------------------------------------------------------


_FIGURE, _MEASURED = _is_number_or_none, is_figure  # a figure may be None where it cannot be computed
_FIGURES = {
    **dict.fromkeys(("frechet", "frechet_mean", "kernel", "kernel_mean", "kernel_deviation"), _FIGURE),
    **dict.fromkeys(("precision", "recall", "density", "coverage"), _FIGURE),
    **dict.fromkeys(("frechet_per_class", "kernel_per_class"), _MapOf(_FIGURE)),
}
_DISTANCES = {
    "images": _is_count,
    "test_images": _is_count,
    "synthetic": _Record(_FIGURES),
    "training": _Record(_FIGURES),
}
_HOW: dict[str, Any] = dict.fromkeys(
    ("directions", "directions_per_class", "neighbours", "subset_size", "num_subsets"), _FIGURE
)
_WITH_TEST = {
    "test_distances": _ListOf(_MEASURED),
    **dict.fromkeys(("test_median", "threshold", "near_share", "near_share_limit"), _MEASURED),
    **dict.fromkeys(("nearer_to_training", "nearer_to_training_limit"), _FIGURE),
}
_NEARNESS = _Record({"median": _FIGURE, "test_median": _FIGURE, "near_share": _FIGURE}, {"copying": _FIGURE})
_MEMORISATION = _Record(
    {
        "distances": _ListOf(_MEASURED),
        "median": _MEASURED,
        "per_class": _MapOf(_NEARNESS),
        "pairs": _ListOf(_Record({"synthetic": _is_text, "training": _is_text, "distance": _FIGURE})),
        "picture": _is_name_of_picture,
        "same_content": _ListOf(_Record({"synthetic": _is_text, "same_as": _is_text, "kind": _is_text})),
    },
    {
        **_WITH_TEST,
        "test_near_share": _MEASURED,
        "copying": _FIGURE,
        **dict.fromkeys(("picture_sha256", "why_no_picture"), _Maybe(_is_text)),
    },
    _all_or_none(_WITH_TEST),
)
_EVALUATED = _Record(
    {},
    {
        **dict.fromkeys(("checkpoint", "vae_saw", "synthetic_digest", "split_digest", "weights_digest"), _is_text),
        "step": _FIGURE,
        **dict.fromkeys(("synthetic_path", "split", "image_size"), is_setting),
        **dict.fromkeys(("made_with", "trained_with"), _MapOf(is_setting)),
        "images": _MapOf(_FIGURE),
        "images_per_class": _MapOf(_MapOf(_FIGURE)),
    },
)


def _parts(num_classes: int | None) -> dict[str, _Form]:
    """Returns the form of each part of a report about so many classes; None: however many."""
    classifier = _classifier(num_classes)
    return {
        "evaluated": _EVALUATED,
        "warnings": _ListOf(_is_text),
        "why": _MapOf(_is_text),
        "settings": _MapOf(is_setting),
        "latents": _Record(
            {**_DISTANCES, "recognition": _Record({"synthetic": _FIGURE, "test": _FIGURE})},
            _HOW,
        ),
        "inception": _Record(_DISTANCES, {**_HOW, "recognition": _Record({"synthetic": _FIGURE, "test": _FIGURE})}),
        "memorisation": _MEMORISATION,
        "classifier": classifier,
        "sweep": _sweep(classifier),
    }


def _classifier(num_classes: int | None) -> _Record:
    per_class = _ListOf(_FIGURE, num_classes)
    confusion = _is_square if num_classes is None else _ListOf(_ListOf(_is_count, num_classes), num_classes)
    tested = {"per_class": per_class, "confusion": confusion, "nll": _MEASURED, "eer": _FIGURE}
    difference = _Record(
        {
            "mean": _MEASURED,
            **dict.fromkeys(("low", "high"), _FIGURE),
            **dict.fromkeys(("covers", "leaves_out"), _ListOf(_is_text)),
            **dict.fromkeys(("verdict", "sentence"), _is_text),
        }
    )
    done = {
        "seeds": _ListOf(_MEASURED),
        "images": _MapOf(_is_count),
        "sets": _MapOf(
            _Record(
                {**tested, "accuracies": _ListOf(_MEASURED), "mean": _MEASURED, "deviation": _FIGURE},
                {"worth": _is_text},
            ),
            needed=(REAL, SYNTHETIC, BOTH),
        ),
        "curve": _Record({"counts": _ListOf(_is_count), "accuracies": _ListOf(_MEASURED)}),
        "differences": _MapOf(difference, needed=(BOTH,)),
        "difference": difference,
    }
    tried = _Record(dict.fromkeys(("learning_rate", "strength", "nll"), _MEASURED))
    chosen = _Record(dict.fromkeys(("learning_rate", "strength"), _MEASURED))
    tuning = _Record({"tried": _ListOf(tried), "images": _is_count}, {"chosen": chosen})
    scores = _MapOf(_MapOf(_Record({**tested, "accuracy": _MEASURED})))
    how = dict.fromkeys(("num_steps", "batch_size", "image_size"), _FIGURE)
    others = {**done, **how, "beyond_posterior": difference}
    return _Record({"scores": scores, "tuning": tuning}, others, _all_or_none(done))


def _sweep(classifier: _Record) -> _Record:
    measured = {
        "weights": _is_text,
        "checkpoint": _is_text,
        "guidance": _MEASURED,
        "step": _is_count,
        "images": _is_count,
        **_FIGURES,
        "recognition": _FIGURE,
        **dict.fromkeys(("near_share", "near_share_limit", "test_near_share"), _MEASURED),
    }
    trained = dict.fromkeys(("alone", "with_real"), _MEASURED)
    point = _Record(
        measured,
        {"nearer_to_training": _FIGURE, "classifier": classifier, **trained},
        # The means of the classifiers are there where all of these are trained, and only there.
        lambda value: {name in value for name in trained} == {"difference" in value.get("classifier", {})},
    )
    yardstick = _Record(_FIGURES, dict.fromkeys(("recognition", "near_share", "with_real"), _FIGURE))
    return _Record(
        {
            "points": _ListOf(point),
            "training": yardstick,
            **dict.fromkeys(("best", "best_for_classifiers"), _Maybe(point)),
            "sentences": _ListOf(_is_text),
        },
        {"against": _is_text},
    )
