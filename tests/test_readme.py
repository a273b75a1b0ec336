"""Both READMEs are true: blocks run or parse, what they name exists, and they say the same.

A python block is run, in a folder with a complete cache in `latents_cache` and a model in `exported`; one marked
```python not-run is not. A line of a bash block is a command, `!` or `%` before it being a notebook's; one that no
function here checks is a failure. A text block is output or a drawing. A message in a table is code with an ellipsis
for what varies.
"""

import ast
import importlib
import re
import shlex
import tomllib
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import bench_sample
import pytest
import tiny
import tiny_vae

import config
import evaluation
import export_model
import preprocess_latents
import report
import script
import settings_table
import train_latent_cfg

ROOT = Path(__file__).parents[1]
READMES = {language: (ROOT / path).read_text(encoding="utf-8") for language, path in settings_table.READMES.items()}
WRITTEN_BY_USERS = {"kl_vae_best.pt", "vae.pt", "user_07_name.pt", "001.jpg", "002.jpg"}
KINDS_OF_FILE = "py|yaml|json|jsonl|toml|txt|md|png|jpg|csv|safetensors|pt|pth"
OTHER_FLAGS = {"--max_restarts", "--config", "--help", "--write", "--nproc_per_node"}
by_language = pytest.mark.parametrize("language", READMES)


class Block(NamedTuple):
    """A fenced block: its tag, such as "bash", and its text."""

    tag: str
    text: str


def blocks(language: str, *tags: str) -> list[Block]:
    found = [Block(*match) for match in re.findall(r"^```(.*)\n((?:.*\n)*?)```$", READMES[language], re.MULTILINE)]
    return [block for block in found if not tags or block.tag in tags]


def prose(language: str) -> str:
    """Returns a README without its blocks, its settings tables and its remarks."""
    text = re.sub(r"^```.*\n(?:.*\n)*?```$", "", READMES[language], flags=re.MULTILINE)
    begin, end = text.index(settings_table.BEGIN), text.index(settings_table.END)
    return re.sub(r"<!--.*?-->", "", text[:begin] + text[end:])


def code_spans(text: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", text)


# --- python blocks -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cache_of_both_splits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("readme")
    tiny.make_images(root / "data", {"ID_1": 7, "ID_2": 7, "ID_10": 7})
    tiny_vae.save_tiny_vae(root / "vae.pt")
    assert preprocess_latents.main(tiny.preprocess_flags(root, splits=["train", "test"])) == script.DONE
    assert train_latent_cfg.main(tiny.train_flags(root, train_num_steps=1, num_samples=0)) == script.DONE
    exported = {"checkpoint": root / "results", "output_folder": root / "exported", "ddim_steps": 3}
    assert export_model.main(tiny.flags(exported)) == script.DONE
    return root


@pytest.mark.parametrize("number", range(len(blocks("en", "python"))))
def test_a_python_block_runs(number, cache_of_both_splits, monkeypatch, capsys):
    monkeypatch.chdir(cache_of_both_splits)
    exec(compile(blocks("en", "python")[number].text, f"README.md, python block {number + 1}", "exec"), {})
    assert capsys.readouterr().out.strip()


def test_the_five_lines_give_latents_and_labels(cache_of_both_splits, monkeypatch):
    monkeypatch.chdir(cache_of_both_splits)
    names: dict = {}
    exec(next(block.text for block in blocks("en", "python") if "DataLoader" in block.text), names)
    latents, labels = names["latents"], names["labels"]
    assert latents.shape == (15, *names["dataset"].latent_shape)
    assert sorted(labels.tolist()) == [0] * 5 + [1] * 5 + [2] * 5
    assert names["dataset"].norm.to_unscaled(latents).shape == latents.shape


# --- bash blocks -------------------------------------------------------------------------------------------


def commands(language: str) -> Iterator[list[str]]:
    """Yields the words of each command line, without what makes it a notebook's or a virtual environment's."""
    for block in blocks(language, "bash"):
        for line in block.text.replace("\\\n", " ").splitlines():
            words = shlex.split(line.strip().lstrip("!%"), comments=True)
            if words:
                yield [words[0].removeprefix(".venv/bin/"), *words[1:]]


def check_python(words: list[str]) -> None:
    file, flags = words[0], words[1:]
    if file == "-m":
        assert flags == ["venv", ".venv"]
    elif file in config.SCRIPTS:
        config.read_command_line(config.SCRIPTS[file], flags, description=None)
    elif file == "demo/train_vae.py":
        config.read_command_line(importlib.import_module("train_vae").VAESettings, flags, description=None)
    elif file == "benchmarks/bench_sample.py":
        bench_sample.read_arguments(flags)
    else:
        raise AssertionError(f"nobody checks the flags of {file}")


def check_torchrun(words: list[str]) -> None:
    option = words.pop(0)
    assert re.fullmatch(r"--nproc_per_node=[1-9]", option), option
    check_python(words)


def check_make(words: list[str]) -> None:
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert words and set(words) <= set(targets)


def check_pip(words: list[str]) -> None:
    takes_value, packages = {"--index-url"}, []
    assert words.pop(0) in ("install", "uninstall")
    while words:
        word = words.pop(0)
        if word in takes_value:
            words.pop(0)
        elif not word.startswith("-"):
            packages.append(word)
    assert packages
    for package in packages:
        name, pinned, version = package.partition("==")
        name = re.split(r"[<>]", name)[0]
        assert name == "." or name in {*required_packages(), *optional_packages()}, f"{name} is no dependency"
        assert not pinned or f"{name}=={version}\n" in (ROOT / "constraints.txt").read_text()


def check_nothing(words: list[str]) -> None:
    assert words


CHECKS: dict[str, Callable[[list[str]], None]] = {
    "python": check_python,
    "python3": check_python,
    "torchrun": check_torchrun,
    "make": check_make,
    "pip": check_pip,
    "git": check_nothing,
    "cd": check_nothing,
    "tensorboard": check_nothing,
}


@by_language
def test_every_command_is_one_that_works(language):
    num_checked = 0
    for first, *rest in commands(language):
        assert first in CHECKS, f"nobody checks {first}"
        CHECKS[first](rest)
        num_checked += 1
    assert num_checked >= 15


def test_a_command_with_a_wrong_setting_is_noticed():
    with pytest.raises(config.UserError):
        check_python(["train_latent_cfg.py", "--max_hour", "11.5"])
    with pytest.raises(config.UserError):
        check_torchrun(["--nproc_per_node=2", "generate.py", "--images", "5"])
    with pytest.raises(AssertionError):
        check_make(["demos"])
    with pytest.raises(AssertionError):
        check_pip(["install", "torch==1.0"])


# --- what the text names -----------------------------------------------------------------------------------


@cache
def sources() -> dict[Path, str]:
    files = [*ROOT.glob("*.py"), *(ROOT / "demo").glob("*.py"), ROOT / "Makefile", ROOT / "configs" / "demo.yaml"]
    return {path: path.read_text(encoding="utf-8") for path in files if path.stem != "settings_table"}


def is_known_file(name: str) -> bool:
    """Says whether a file is here, is a user's, or has a name that the scripts give."""
    if (ROOT / name).exists() or name in WRITTEN_BY_USERS:
        return True
    return re.sub(r"[0-9]{8}", "…", name.rpartition("/")[2]) in source_strings()


@by_language
def test_files_that_are_named_exist(language):
    mentioned = {span for span in code_spans(prose(language)) if re.fullmatch(rf"[\w./-]+\.({KINDS_OF_FILE})", span)}
    mentioned -= {span for span in mentioned if span.startswith(".")}  # endings
    assert len(mentioned) > 30
    unknown = sorted(name for name in mentioned if not (is_known_file(name) or is_generated_image(name)))
    assert not unknown


def is_generated_image(name: str) -> bool:
    """Says whether a path has the form that generate.py gives: class, then class and number."""
    return re.fullmatch(r"synthetic/(\w+)/\1_[0-9]{6}\.jpg", name) is not None


def test_a_file_that_nobody_knows_is_noticed():
    assert is_known_file("results/ema-00002000.safetensors") and is_known_file("constraints.txt")
    assert not is_known_file("results/weights-00002000.safetensors")
    assert not is_known_file("latents_cache/index.json")


OF_OTHER_PROGRAMS = {"MDSWriter", "DistributedDataParallel", "open"}


def test_what_the_page_on_scale_names_exists():
    page = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    assert all((ROOT / "docs" / target).exists() for target in re.findall(r"\]\((\.[^)]+)\)", page))
    code, num_found = "\n".join(sources().values()), 0
    for span in set(code_spans(page)) - OF_OTHER_PROGRAMS:
        name = span.rpartition(".")[2]
        is_known = is_known_file(span) or re.search(rf"^ *(def|class) {re.escape(name)}\b", code, re.MULTILINE)
        assert is_known or span == "index.json", span
        num_found += 1
    assert num_found > 25


@by_language
def test_links_and_pictures_lead_somewhere(language):
    targets = re.findall(r"\]\(([^)]+)\)", prose(language) + "".join(re.findall(r"^!\[.*$", READMES[language], re.M)))
    local = [target for target in targets if not target.startswith("https://")]
    assert local
    assert all((ROOT / target).exists() for target in local)


@by_language
def test_flags_and_make_targets_that_are_named_exist(language):
    known = {f"--{name}" for cls in config.SCRIPTS.values() for name in config.specs(cls)} | OTHER_FLAGS
    spans = code_spans(prose(language))
    flags = {word for span in spans for word in re.findall(r"--\w+", span)}
    assert len(flags) > 10
    assert flags <= known
    targets = [span.split()[1:] for span in spans if span.startswith("make ")]
    assert targets
    for target in targets:
        check_make(target)


def messages(language: str) -> list[str]:
    """Returns the first cells of the tables of messages."""
    return re.findall(r"^\| `([^`]+)` \| [^|]+ \|$", section_with(language, "\n| 130 | "), re.MULTILINE)


def section_with(language: str, text: str) -> str:
    (section,) = [part for part in re.split(r"^## ", prose(language), flags=re.MULTILINE) if text in part]
    return section


@cache
def source_strings() -> tuple[str, ...]:
    """Returns every string of the sources, with an ellipsis for what is filled in."""
    found = []
    for path, text in sources().items():
        for node in ast.walk(ast.parse(text)) if path.suffix == ".py" else ():
            if isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
                found.append("".join(str(part) for part in parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return tuple(found)


def is_in_sources(message: str) -> bool:
    """Says whether the pieces of a message stand in the sources, each in one string."""
    return all(any(piece.strip() in text for text in source_strings()) for piece in message.split("…"))


@by_language
def test_messages_are_those_of_the_program(language):
    quoted = messages(language)
    assert len(quoted) > 35
    assert not [message for message in quoted if not is_in_sources(message)]


def test_a_message_that_is_not_in_the_program_is_noticed():
    assert is_in_sources("there is no setting … did you mean")
    assert not is_in_sources("there is no such setting")


@by_language
def test_exit_codes_are_those_of_the_program(language):
    codes = re.findall(r"^\| (\d+) \| \S", section_with(language, "\n| 130 | "), re.MULTILINE)
    expected = [
        script.DONE,
        script.FAILED,
        script.USER_ERROR,
        script.Stopped(2).exit_code,
        script.Stopped(15).exit_code,
    ]
    assert [int(code) for code in codes] == expected


# --- dependencies ------------------------------------------------------------------------------------------


def package_names(file: str) -> set[str]:
    lines = (ROOT / file).read_text().splitlines()
    return {re.split(r"[<>=]", line)[0] for line in lines if line and not line.startswith("#")}


def required_packages() -> set[str]:
    return package_names("requirements.txt")


def optional_packages() -> set[str]:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    return {re.split(r"[<>=]", requirement)[0] for extra in extras.values() for requirement in extra}


@by_language
def test_the_table_of_dependencies_is_complete(language):
    rows = re.findall(r"^\| ([\w, -]+) \| [^|]+ \| ([^|]+) \|$", section_with(language, "\n| torch | "), re.MULTILINE)
    words = {"en": ("required", "optional", "for development"), "zh": ("必需", "可选", "开发用")}[language]
    of_kind = {word: {name for names, kind in rows if kind == word for name in names.split(", ")} for word in words}
    assert of_kind[words[0]] == required_packages()
    assert of_kind[words[1]] == optional_packages()
    assert of_kind[words[2]] == package_names("requirements-dev.txt") - optional_packages()


# --- settings tables and translation -----------------------------------------------------------------------


@by_language
def test_the_settings_tables_are_those_of_config(language):
    assert settings_table.with_tables(READMES[language], language) == READMES[language], (
        "python settings_table.py --write"
    )


def test_every_help_text_has_a_translation_and_none_is_left_over():
    assert set(settings_table.HELP_ZH) == settings_table.help_texts()


@by_language
def test_every_setting_has_a_row_with_its_default(language):
    table = settings_table.tables(language)
    num_rows = 0
    for name, cls in config.SCRIPTS.items():
        part = table.partition(f"<code>{name}</code>")[2].partition("</details>")[0]
        for setting, default in config.defaults(cls).items():
            (row,) = re.findall(rf"^\| `{setting}`(?: \\\*)? \| (.*)$", part, re.MULTILINE)
            assert default == () or row.startswith(f"`{config.show(default)}` |")
            num_rows += 1
    assert num_rows > 60


def test_both_languages_have_the_same_headings_and_blocks():
    shapes = [re.findall(r"^#+ ", prose(language), re.MULTILINE) for language in READMES]
    assert shapes[0] == shapes[1] and len(shapes[0]) > 15
    assert blocks("en") == blocks("zh")
    assert {block.tag for block in blocks("en")} <= {"bash", "python", "python not-run", "text"}


def test_both_languages_name_the_same_things():
    english, chinese = (set(code_spans(prose(language))) for language in READMES)
    assert english ^ chinese == set()


def test_both_languages_have_tables_of_the_same_length():
    english, chinese = (re.findall(r"^\|.*\|$", prose(language), re.MULTILINE) for language in READMES)
    assert [len(row.split("|")) for row in english] == [len(row.split("|")) for row in chinese]
    assert messages("en") == messages("zh")


@by_language
def test_the_numbers_of_an_evaluation_are_those_in_the_code(language):
    text = prose(language)
    advice = {"en": "have\n(\\d+) or more test images per class", "zh": "每个类别最好有 (\\d+) 张以上的测试图像"}[
        language
    ]
    assert re.findall(advice, text) == [str(report.FEW_PER_CLASS)]
    few = 100 * evaluation.NEAR_SHARE
    near = {
        "en": "nearer to one than (.*) % of the test images are \\| about (.*) %;",
        "zh": "比 (.*) % 的测试图像.* 约 (.*) %；",
    }
    assert re.findall(near[language], text) == [(f"{100 - few:g}", f"{few:g}")]
