"""The short table that evaluate_images.py prints."""

from typing import Any

from gait_latents.common import console
from gait_latents.common.console import say, warn
from gait_latents.evaluation import page
from gait_latents.evaluation.figures import format_figure

_CLOSENESS_ROWS = {  # figure -> what a row of the table calls it
    "frechet_mean": "Fréchet distance per class",
    "frechet": "Fréchet distance, all classes",
    "kernel": "kernel distance",
    "precision": "precision",
    "recall": "recall",
    "density": "density",
    "coverage": "coverage",
}
_NAME_WIDTH, _FIGURE_WIDTH = 50, 11


def print_figures(data: dict[str, Any]) -> None:
    """Prints the main figures of the synthetic images, beside those of real ones, which are the best to be expected."""
    say()
    say(_row("", "synthetic", "real"))
    for name, title in (("latents", ""), ("inception", "Inception: ")):
        for figure, label in _CLOSENESS_ROWS.items() if name in data else ():
            say(_row(title + label, *(format_figure(data[name][kind][figure]) for kind in ("synthetic", "training"))))
    if "latents" in data:
        found = data["latents"]["recognition"]
        say(_row("nearest to the mean of their own class", _share(found["synthetic"]), _share(found["test"])))
    copies = data["memorisation"]
    if "near_share" in copies:
        say(_row("very near to a training image", _share(copies["near_share"]), _share(copies["test_near_share"])))
        say(_row("nearer to a training than to a test image", _share(copies["nearer_to_training"]), _share(0.5)))
    if "sets" in data.get("classifier", {}):
        for name, found in data["classifier"]["sets"].items():
            say(_row(f"classifier trained on {name}: recognised", _share(found["mean"]), _worth(found)))
        for name in ("difference", "beyond_posterior"):
            if name in data["classifier"]:
                say(data["classifier"][name]["sentence"])
    if "latents" in data:
        mark, sentence = page.closeness(data["latents"], show=console.show_name)
        say(f"Are they close to real images? {mark.capitalize()}. {sentence}")
    for name, why in data.get("why", {}).items():
        say(f"no {name}: {why}")
    if copies["same_content"]:
        first = copies["same_content"][0]
        warn(
            f"{len(copies['same_content'])} synthetic file(s) have the very content of another file, such as "
            f"{first['synthetic']} and {first['same_as']} ({first['kind']})"
        )


def _row(name: str, *figures: str) -> str:
    return f"{name:<{_NAME_WIDTH}}" + "".join(f"{figure:>{_FIGURE_WIDTH}}" for figure in figures)


def _worth(found: dict[str, Any]) -> str:
    return f"  as {found['worth']} real images per class" if "worth" in found else ""


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"
