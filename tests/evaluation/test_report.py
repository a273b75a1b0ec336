"""The page about an evaluation: well-formed, self-contained, deaf to hostile names, and shown by a real browser."""

import io
import json
import re
import shutil
import subprocess
from copy import deepcopy
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from properties import given, settings, st

from gait_latents.common.console import harmless
from gait_latents.evaluation import comparison
from gait_latents.evaluation.page import FEW_PER_CLASS, closeness, write_html

VOID = {"meta", "link", "img"}
HOSTILE = "<script>alert(1)</script>\"'><img src=http://x.invalid/>&amp;\u202eשלום 😀"


def png(width: int = 900, height: int = 60) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (90, 120, 160)).save(buffer, format="PNG")
    return buffer.getvalue()


def make_report(names: list[str]) -> dict[str, Any]:
    """Makes a report with all its parts, of as many classes as there are names."""
    distances = {name: 3.5 + i for i, name in enumerate(names)}
    figures = {
        "frechet": 20.5,
        "frechet_mean": 4.25,
        "kernel": -0.0125,
        "kernel_deviation": 0.031,
        "kernel_mean": 0.5,
        "frechet_per_class": distances,
        "kernel_per_class": distances,
        "precision": 0.875,
        "recall": 0.5,
        "density": 1.031,
        "coverage": 0.61,
    }
    latents = {
        "images": 40 * len(names),
        "test_images": 60,
        "synthetic": figures,
        "training": {**figures, "frechet_mean": 4.0},
        "recognition": {"synthetic": 0.91, "test": 0.99},
    }
    return {
        "evaluated": {
            "checkpoint": "ema-00001500.safetensors",
            "step": 1500,
            "synthetic_path": "/somewhere/synthetic",
            "made_with": {"cond_scale": 2.0, "sampler": "dpm++", "seed": 42},
            "split": "random",
            "images": {"synthetic": 120, "training": 90, "test": 60},
            "images_per_class": {name: {"synthetic": 40, "training": 30, "test": 20} for name in names},
        },
        "warnings": ["the split is random"],
        "latents": latents,
        "inception": deepcopy(latents),
        "memorisation": {
            "distances": [5.0, 5.5, 6.0, 6.25, 9.0],
            "test_distances": [4.0, 6.0, 7.0, 9.0],
            "median": 6.0,
            "test_median": 6.5,
            "threshold": 4.5,
            "test_near_share": 0.05,
            "near_share": 0.04,
            "near_share_limit": 0.12,
            "nearer_to_training": 0.48,
            "nearer_to_training_limit": 0.6,
            "per_class": {name: {"median": 6.0, "test_median": 6.5, "near_share": 0.0} for name in names},
            "pairs": [{"synthetic": f"{names[0]}/a.jpg", "training": f"{names[-1]}/b.jpg", "distance": 5.0}],
            "picture": "closest_pairs.png",
            "same_content": [{"synthetic": f"{names[0]}/a.jpg", "same_as": f"{names[0]}/c.jpg", "kind": "test"}],
        },
        "classifier": make_classifier(len(names)),
        "sweep": {
            "points": [
                {
                    **figures,
                    "step": step,
                    "guidance": scale,
                    "recognition": 0.9,
                    "near_share": 0.03,
                    "alone": 0.612,
                    "with_real": 0.734,
                    "classifier": make_classifier(len(names)),
                }
                for step in (500, 1000)
                for scale in (1.0, 2.0, 3.0)
            ],
            "training": {**figures, "with_real": 0.701},
            "best": {"step": 1000, "guidance": 2.0},
            "best_for_classifiers": {"step": 500, "guidance": 3.0, "with_real": 0.734},
            "sentences": ["Nearest is guidance 2.", "Best for classifiers is guidance 3."],
        },
        "settings": {"checkpoint": "results", "sweep": [1.0, 2.0], "neighbours": 5, "classifier": True, "x": None},
    }


def make_classifier(num_classes: int) -> dict[str, Any]:
    """Makes what `Comparison.run` returns, without any training."""
    import torch

    def score(wrong: int) -> dict[str, Any]:
        truth = torch.arange(num_classes).repeat_interleave(4)
        said = truth.clone()
        places = [(4 * i + i // num_classes) % (4 * num_classes) for i in range(wrong)]  # spread over the classes
        said[places] = (said[places] + 1) % num_classes
        return comparison.score(torch.nn.functional.one_hot(said, num_classes).double(), truth)

    images, labels = torch.zeros(4 * num_classes, 4, 4, 3, dtype=torch.uint8), torch.arange(num_classes)
    labels = labels.repeat_interleave(4)
    sets: dict[str, Any] = dict.fromkeys(
        (comparison.REAL, comparison.POSTERIOR, comparison.SYNTHETIC), (images, labels)
    )
    wrong = {"1/4 of real": 5, "1/2 of real": 4, comparison.REAL: 3, comparison.POSTERIOR: 3}
    wrong |= {comparison.SYNTHETIC: 4, comparison.BOTH: 0}
    tried = [{"learning_rate": rate, "strength": strength, "nll": 0.5} for rate, strength in comparison.CANDIDATES]
    done = {
        "scores": {name: {str(seed): score(count + seed % 2) for seed in range(3)} for name, count in wrong.items()},
        "tuning": {"tried": tried, "images": 7},
    }
    found = comparison.Comparison(
        sets,
        None,
        (images, labels),
        num_steps=1000,
        seeds=[0, 1, 2],
        device=torch.device("cpu"),
        class_names=[str(number) for number in range(num_classes)],
        done=done,
        save=lambda _: pytest.fail("nothing is left to train"),
    ).run()
    return json.loads(json.dumps({**found, "image_size": 64}))


class Page(HTMLParser):
    """Reads a page, and notes what it is made of; raises AssertionError where tags do not fit each other."""

    def __init__(self, data: bytes) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.headings: list[str] = []
        self.feed(data.decode("utf-8"))
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(attrs) == len(dict(attrs)), f"{tag} says something twice"
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert "svg" in self.open and len(attrs) == len(dict(attrs))
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style",):
            self.words.append(data)
            if self.open[-1] == "h2":
                self.headings.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def page_of(report: dict[str, Any], pictures: dict[str, bytes] | None = None) -> Page:
    return Page(write_html(report, pictures or {}))


NAMES = ["ID_1", "ID_2", "ID_10"]


def test_the_page_shows_every_part_with_its_figures():
    page = page_of(make_report(NAMES), {"closest_pairs.png": png()})
    assert page.headings == [
        "In three sentences",
        "To keep in mind",
        "In latent space",
        "In the features of Inception",
        "Are they copies?",
        "Do they help a classifier?",
        "Which guidance scale?",
        "What was evaluated",
        "Settings",
        "How the figures are computed",
    ]
    assert len(page.all("h1")) == 1 and page.all("html")[0]["lang"] == "en"
    for words in (
        "model ema-00001500.safetensors · step 1,500 · guidance 2 · 120 synthetic images",
        "1.1 times that of real training images",
        "No sign of it. 4.0 % of them are as near",
        "The split is random.",
        "−0.013 ± 0.031",
        "87.5 %",
        "ID_10/b.jpg",
        "step 1,000, guidance 2 (best)",
        "1,000 training steps, 32 images per step, 64 pixels wide",
        "They help: accuracy changes by +25.0 points",
        "training step1,500",
        "seed of the images42",
        "Best for classifiers is guidance 3.",
        "classifier, these alone",
        "70.1 %",
        "73.4 %",
    ):
        assert words in page.text, words


def test_a_sweep_without_classifiers_has_no_columns_for_them():
    report = make_report(NAMES)
    report["sweep"]["best_for_classifiers"] = None
    text = page_of(report, {}).text
    assert "step 1,000, guidance 2 (best)" in text and "classifier, these alone" not in text


def test_the_page_is_for_everyone():
    """Tables have captions and heads with a scope, pictures have texts, what scrolls can be reached by the keyboard."""
    page = page_of(make_report(NAMES), {"closest_pairs.png": png()})
    assert len(page.all("table")) == len(page.all("caption")) > 8
    assert all(attributes.get("scope") in ("row", "col") for attributes in page.all("th"))
    assert len(page.all("img")) == 1 and len(page.all("img")[0]["alt"] or "") > 30
    labels = [attributes["aria-label"] or "" for attributes in page.all("svg") if attributes["role"] == "img"]
    assert len(labels) == len(set(labels)) == 7 and all(len(label) > 30 for label in labels)
    assert "most often ID_1 was taken for ID_2" in labels[3]
    names = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert names and len(names) == len(set(names))
    boxes = [attributes for attributes in page.all("div") if attributes.get("class") == "scroll"]
    assert boxes and all(attributes["tabindex"] == "0" and attributes["aria-label"] for attributes in boxes)


def test_what_is_printed_is_dark_on_light():
    style = write_html({}, {}).decode().partition("<style>")[2].partition("</style>")[0]
    assert re.findall(r"@media ([^{]*prefers-color-scheme[^{]*) {", style) == [
        "screen and (prefers-color-scheme: dark)"
    ]


def test_nothing_is_asked_for_from_elsewhere():
    data = write_html(make_report([HOSTILE, "ID_2"]), {"closest_pairs.png": png()})
    page = Page(data)
    for tag, attributes in page.tags:
        assert tag not in ("script", "iframe", "object", "embed", "form", "base")
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href", "xlink:href", "srcset", "poster", "action"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:", "#")), (tag, value)
    styles = re.findall(r"<style>(.*?)</style>", data.decode(), re.DOTALL)
    assert len(styles) == 1 and "url(" not in styles[0] and "@import" not in styles[0]


@pytest.mark.parametrize(
    "name", [HOSTILE, "", "a" * 255, "\x00\x1b[31m", "\udcff", "--><!--", "{style} {0} %s", "日本"]
)
def test_any_name_is_text_and_nothing_else(name):
    plain, hostile = page_of(make_report(["ID_1", "ID_2"])), page_of(make_report([name, "ID_2"]))
    assert [tag for tag, _ in hostile.tags] == [tag for tag, _ in plain.tags]


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(name=st.text(min_size=1, max_size=40))
def test_texts_of_every_kind_keep_the_page_whole(name):
    report = make_small_report(name)
    page = page_of(report)
    assert [tag for tag, _ in page.tags] == [tag for tag, _ in page_of(make_small_report("x")).tags]
    assert " ".join(f"|{harmless(name)}|".split()) in page.text


def make_small_report(text: str) -> dict[str, Any]:
    distances = {"frechet_per_class": {text: 1.0}}
    return {
        "evaluated": {"checkpoint": text, "images_per_class": {text: {text: 1}}},
        "warnings": [f"|{text}|"],
        "why": {"classifier": text, "sweep": text},
        "latents": {"synthetic": distances},
        "memorisation": {
            "pairs": [{"synthetic": text, "training": text, "distance": None}],
            "same_content": [{"synthetic": text, "same_as": text, "kind": text}],
            "per_class": {text: {}},
            "picture": None,
            "why_no_picture": text,
        },
        "settings": {text: text},
    }


PARTS = ["evaluated", "warnings", "latents", "inception", "memorisation", "classifier", "sweep", "settings"]


@pytest.mark.parametrize("part", PARTS)
def test_a_part_may_be_absent_or_stand_alone(part):
    whole = make_report(NAMES)
    without = page_of({name: value for name, value in whole.items() if name != part})
    assert len(without.headings) == 9
    alone = page_of({part: whole[part]})
    assert set(alone.headings) <= set(page_of(whole).headings) and alone.headings


def test_an_empty_report_is_a_page_without_sections():
    page = page_of({})
    assert page.headings == [] and "How good are the generated images?" in page.text


def test_a_part_that_was_asked_for_and_is_not_there_says_why():
    report = make_report(NAMES)
    del report["classifier"]
    report["why"] = {"classifier": "the test images are not at hand"}
    page = page_of(report)
    assert "Not known. Why: the test images are not at hand" in page.text
    assert page.text.count("The test images are not at hand.") == 1  # in its section


def without_numbers(value: Any) -> Any:
    """Returns a report in which no figure could be computed."""
    if isinstance(value, dict):
        return {name: without_numbers(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [without_numbers(inner) for inner in value]
    return None if isinstance(value, int | float) and not isinstance(value, bool) else value


def test_figures_that_could_not_be_computed_are_dashes():
    whole = make_report(NAMES)
    report = without_numbers({name: part for name, part in whole.items() if name != "classifier"})
    page = page_of(report)
    assert page.text.count("–") > 50 and "nan" not in page.text and "None" not in page.text
    assert "There are too few images for a Fréchet distance." in page.text


def verdict(**parts: Any) -> str:
    return page_of(parts).text.split("How the figures")[0]


@pytest.mark.parametrize(
    ("ours", "theirs", "words"),
    [
        (4.9, 4.0, "Yes. Their Fréchet distance to the test images is 1.2 times that of real training images."),
        (6.0, 4.0, "Nearly. "),
        (8.1, 4.0, "No. "),
        (1.0, 0.0, "No. Their Fréchet distance to the test images is more than the 0 of real training images."),
        (None, 4.0, "Not known. "),
    ],
)
def test_closeness_is_judged_by_the_training_images(ours, theirs, words):
    figures = {
        "images": 2 * FEW_PER_CLASS,
        "synthetic": {"frechet_mean": ours, "frechet_per_class": {"a": 1.0, "b": 2.0}},
    }
    text = verdict(latents={**figures, "training": {"frechet_mean": theirs}})
    assert words in text and "scatters" not in text
    few = verdict(latents={**figures, "images": 2 * FEW_PER_CLASS - 1, "training": {"frechet_mean": theirs}})
    assert (f"scatters much with so few images: {FEW_PER_CLASS - 0.5} per class" in few) == (ours is not None)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "No sign of it. 4.0 %"),
        ({"near_share": 0.13}, "Perhaps. 13.0 % of them are as near"),
        ({"nearer_to_training": 0.61}, "Perhaps. 61.0 % of them are nearer"),
        ({"near_share": None}, "Not known. "),
        (
            {"same_content": [{"synthetic": "a", "same_as": "b", "kind": "training"}]},
            "Yes. Synthetic files that are training images, byte for byte: 1.",
        ),
    ],
)
def test_copies_are_judged_by_what_chance_explains(changes, words):
    assert words in verdict(memorisation={**make_report(["a"])["memorisation"], **changes})


def test_what_few_of_the_test_images_are_is_the_share_that_made_the_threshold():
    memorisation = {**make_report(["a"])["memorisation"], "test_near_share": 0.025}
    text = page_of({"memorisation": memorisation}).text
    for words in (
        "as near to a training image as only 2.5 % of the test images are",
        "share nearer than 97.5 % of the test images4.0 %2.5 %",
        "left of the dashed line; 2.5 % of the test images are there, too.",
        "median, real (test)nearer than 97.5 % of the test images",
    ):
        assert words in text, words
    del memorisation["test_near_share"]
    text = page_of({"memorisation": memorisation}).text
    for words in (
        "as near to a training image as only few of the test images are",
        "share nearer than nearly all test images4.0 % up",
        "left of the dashed line; few of the test images are there, too.",
    ):
        assert words in text, words


def cells_of(html: str, row: str) -> list[str]:
    """Returns the cells of the first row with a head."""
    found = re.search(rf'<th scope="row"><bdi>{row}</bdi></th>(.*?)</tr>', html)
    assert found is not None
    return [re.sub("<[^>]*>", "", cell) for cell in found[1].split("</td>")[:-1]]


def test_the_figures_of_a_column_have_equally_many_decimals():
    report = {
        "latents": {
            "synthetic": {
                "frechet_per_class": {"a": 109.24, "b": 7.0, "c": 0.31},
                "kernel_per_class": {"a": 0.25, "b": -0.04386, "c": -1e-9},
            },
            "training": {"frechet_per_class": {"a": 33.0, "b": None}},
        }
    }
    html = write_html(report, {}).decode()
    assert cells_of(html, "a") == ["109.2", "33.0", "0.2500"]
    assert cells_of(html, "b") == ["7.0", "–", "−0.0439"]
    assert cells_of(html, "c") == ["0.3", "–", "0.0000"]


@pytest.mark.parametrize(
    ("value", "deviation", "text"),
    [
        (0.008767, 0.003984, "0.0088 ± 0.0040"),
        (-0.004223, 0.0625, "−0.004 ± 0.062"),
        (1234.5, 171.0, "1,234 ± 171"),
        (0.5, 0.0, "0.5"),
        (0.5, None, "0.5"),
        (None, 0.1, "–"),
    ],
)
def test_a_figure_with_a_spread_has_no_digits_that_are_chance(value, deviation, text):
    figures = {"kernel": value, "kernel_deviation": deviation}
    assert f"kernel distance, all classes as one{text}–low" in page_of({"latents": {"synthetic": figures}}).text


def test_the_classifier_sentence_is_set_for_a_page():
    sentence = "changes by -0.1 points with t-SNE-2 (95 % interval -1.4 to +1.2, 3 seeds); 5 %<b>"
    html = write_html({"classifier": {"difference": {"sentence": sentence}}}, {}).decode()
    shown = "changes by −0.1 points with t-SNE-2 (95\u00a0% interval −1.4 to +1.2, 3 seeds); 5\u00a0%&lt;b&gt;"
    assert html.count(shown) == 2


def test_warnings_become_sentences():
    report = {"warnings": ["only 3 test images of a class", "ends already.", "ähnlich"]}
    html = write_html(report, {}).decode()
    assert re.findall("<li>(.*?)</li>", html) == ["Only 3 test images of a class.", "Ends already.", "ähnlich."]


@pytest.mark.parametrize(("farthest", "answer"), [(3.9, "Yes"), (8.1, "Nearly")])
def test_the_farthest_class_is_named_and_many_times_the_yardstick_is_not_close(farthest, answer):
    latents = {
        "images": 3 * FEW_PER_CLASS,
        "synthetic": {"frechet_mean": 4.0, "frechet_per_class": {"a": 1.0, "ID_7": farthest, "c": 3.0}},
        "training": {"frechet_mean": 4.0, "frechet_per_class": {"a": 2.0, "ID_7": 2.0, "c": None}},
    }
    text = verdict(latents=latents)
    words = "Their Fréchet distance to the test images is 1 times that of real training images. The farthest class is"
    assert f"{answer}. {words} ID_7, at {farthest / 2:.1f} times what real ones reach" in text
    assert "farthest class is <bdi>ID_7</bdi>, at" in write_html({"latents": latents}, {}).decode()
    assert ("; beyond 2 times: 1 of 2 classes." in text) == (farthest > 4)
    assert "class is <ID_7>, at" in closeness(latents, show=lambda name: f"<{name}>")[1]


def test_the_same_report_gives_the_same_page():
    report, files = make_report([HOSTILE, "日本", "$x_1$"]), {"closest_pairs.png": png()}
    assert write_html(report, files) == write_html(deepcopy(report), files)


def test_the_sweep_speaks_of_training_images_only_where_their_line_is():
    sweep = make_report(NAMES)["sweep"]
    assert "the dashed line is what" in page_of({"sweep": sweep}).text
    text = verdict(sweep={**sweep, "training": {}})
    assert "Lower is better." in text and "dashed" not in text and "real (training)" not in text


# --- in a browser ------------------------------------------------------------------------------------------

CHROMIUM = shutil.which("chromium")
PROBE = """<script>addEventListener("load", () => { const d = document.documentElement;
  d.dataset.seen = JSON.stringify({wide: d.scrollWidth, window: innerWidth, height: d.scrollHeight,
    cut: [...document.querySelectorAll(".scroll:has(table)")].filter(
      e => e.checkVisibility() && e.scrollWidth > e.clientWidth).map(
      e => [e.getAttribute("aria-label"), e.querySelector("caption").offsetWidth]),
    charts: [...document.querySelectorAll(".chart")].map(e => [e.getAttribute("aria-label"),
      Math.min(...[...e.querySelectorAll("text")].map(
        t => parseFloat(getComputedStyle(t).fontSize) * e.getScreenCTM().a)),
      e.closest(".scroll").scrollWidth > e.closest(".scroll").clientWidth,
      [...e.querySelectorAll("text")].every(t => {
        const own = t.getBoundingClientRect(), whole = e.getBoundingClientRect();
        return own.left > whole.left - 1 && own.right < whole.right + 1 && own.top > whole.top - 1 &&
          own.bottom < whole.bottom + 1; })]),
    pictures: [...document.images].every(i => i.naturalWidth > 0),
    asked: performance.getEntriesByType("resource").map(e => e.name).filter(n => !n.startsWith("data:"))}); });
</script></head>"""


def browse(place: Path, *flags: str) -> str:
    """Opens a page in a headless browser with nothing stored, and returns what it prints."""
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"]
    command += ["--disable-background-networking", "--disable-component-update", "--hide-scrollbars"]
    command += [f"--user-data-dir={place.parent / 'profile'}", *flags, place.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=True).stdout


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_a_browser_shows_it_at_any_width_and_asks_for_nothing(tmp_path):
    """The page is put in a frame of 400 pixels: a window cannot be made that narrow."""
    data = write_html(make_report([f"ID_{i + 1}" for i in range(9)] + ["W" * 200]), {"closest_pairs.png": png()})
    page = re.sub(r"<meta http-equiv=.*?>", "", data.decode()).replace("</head>", PROBE)
    assert page.count("data-seen") == 0 and "<script>" in page  # the probe itself is no part of the page
    (tmp_path / "page.html").write_text(page, encoding="utf-8")
    outer = f"""<!DOCTYPE html><body style="margin: 0"><iframe width="400" height="800" srcdoc='{page_in_quotes(page)}'>
      </iframe><iframe width="1100" height="800" srcdoc='{page_in_quotes(page)}'></iframe><script>
      addEventListener("load", () => {{ document.body.dataset.seen = JSON.stringify([...document.querySelectorAll(
      "iframe")].map(f => JSON.parse(f.contentDocument.documentElement.dataset.seen))); }}); </script></body>"""
    (tmp_path / "outer.html").write_text(outer, encoding="utf-8")
    dumped = browse(tmp_path / "outer.html", "--virtual-time-budget=20000", "--dump-dom")
    found = re.search(r'<body[^>]* data-seen="([^"]*)"', dumped)
    assert found is not None
    narrow, wide = json.loads(found[1].replace("&quot;", '"'))
    assert (narrow["window"], narrow["wide"]) == (400, 400)
    assert (wide["window"], wide["wide"]) == (1100, 1100)
    ((label, caption_width),) = narrow["cut"]  # the widest table alone has to be moved, and its caption stays
    assert label == "Against the test images" and 0 < caption_width <= 400 and wide["cut"] == []
    for seen in (narrow, wide):
        assert len(seen["charts"]) == 7
        for label, smallest_text, is_moved, is_whole in seen["charts"]:
            assert smallest_text > 10 and is_whole  # in pixels, and no text is cut off
            assert not is_moved or label.startswith("Confusion matrix")
        assert seen["pictures"] and seen["asked"] == [] and seen["height"] > 2000


def page_in_quotes(page: str) -> str:
    return page.replace("&", "&amp;").replace("'", "&#39;")
