"""README and the pages in docs/ are true: blocks run or parse, what they name exists, and translations are up to date.

A python block is run, in a folder with a complete cache in `latents_cache` and a model in `exported`; one marked
```python not-run is not. A line of a bash block is a command, `!` or `%` before it being a notebook's; one that no
function here checks is a failure. A text block is output or a drawing. A message in a table is code with an ellipsis
for what varies.

A translation begins with a remark that holds the digest of the English page. After an edit of that page the test fails
until the edit is translated, too, and the remark replaced by the one that the failing test shows.
"""

import ast
import importlib
import re
import shlex
import tomllib
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import bench_sample
import pages
import pytest
import settings_table
import tiny
import tiny_vae
from pages import ENGLISH, RECORDS, ROOT, TRANSLATIONS, blocks, code_spans, prose, text_of

import preprocess_latents
import train_latent_cfg

# The names of modules that the checks need stand here alone, so that one that moves is renamed in one place.
from gait_latents import export, settings
from gait_latents.common import cli, errors, process
from gait_latents.evaluation import figures
from gait_latents.evaluation.page import FEW_PER_CLASS

COMMAND_OF_MODULE = {"gait_latents.export": settings.ExportSettings}  # python -m
CONSOLE_COMMANDS = {
    "preprocess-latents": "preprocess_latents.py",
    "train-latent-cfg": "train_latent_cfg.py",
    "generate-latents": "generate.py",
    "evaluate-latents": "evaluate_images.py",
}

WRITTEN_BY_USERS = {"kl_vae_best.pt", "vae.pt", "001.jpg", "002.jpg"}
KINDS_OF_FILE = "py|yaml|json|jsonl|toml|txt|md|png|jpg|csv|safetensors|pt|pth|ipynb|html|zip"
OUR_FOLDERS = "gait_latents|tests|docs|demo|examples|configs|benchmarks"
OTHER_FLAGS = {"--signal", "--max_restarts", "--config", "--help", "--write", "--nproc_per_node", "--minutes"}
OF_OTHER_PROGRAMS = {"MDSWriter", "DistributedDataParallel", "open", "index.json"}
CHECKED = tuple(page for page in pages.ALL if page not in RECORDS)
ENGLISH_CHECKED = tuple(page for page in ENGLISH if page not in RECORDS)
by_page = pytest.mark.parametrize("page", CHECKED)
by_any_page = pytest.mark.parametrize("page", pages.ALL)
by_translation = pytest.mark.parametrize("page", TRANSLATIONS)


# --- python blocks -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cache_of_both_splits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pages")
    tiny.make_images(root / "data", {"ID_1": 7, "ID_2": 7, "ID_10": 7})
    tiny_vae.save_tiny_vae(root / "vae.pt")
    assert preprocess_latents.main(tiny.preprocess_flags(root, splits=["train", "test"])) == errors.DONE
    assert train_latent_cfg.main(tiny.train_flags(root, train_num_steps=1, num_samples=0)) == errors.DONE
    exported = {"checkpoint": root / "results", "output_folder": root / "exported", "ddim_steps": 3}
    assert export.main(tiny.flags(exported)) == errors.DONE
    return root


PROGRAMS = {f"{page}-{i}": block.text for page in ENGLISH for i, block in enumerate(blocks(page, "python"))}


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_python_block_runs(name, cache_of_both_splits, monkeypatch, capsys):
    monkeypatch.chdir(cache_of_both_splits)
    exec(compile(PROGRAMS[name], name, "exec"), {})
    assert capsys.readouterr().out.strip()


def test_there_are_python_blocks():
    assert len(PROGRAMS) >= 3


def test_the_five_lines_give_latents_and_labels(cache_of_both_splits, monkeypatch):
    monkeypatch.chdir(cache_of_both_splits)
    names: dict = {}
    exec(next(text for text in PROGRAMS.values() if "DataLoader" in text), names)
    latents, labels = names["latents"], names["labels"]
    assert latents.shape == (15, *names["dataset"].latent_shape)
    assert sorted(labels.tolist()) == [0] * 5 + [1] * 5 + [2] * 5
    assert names["dataset"].norm.to_unscaled(latents).shape == latents.shape


IMPORTS = sorted(
    {span for page in ENGLISH_CHECKED for span in code_spans(prose(page)) if re.match(r"(from|import) \w", span)}
)


@pytest.mark.parametrize("line", IMPORTS)
def test_an_import_that_is_named_works(line):
    names: dict = {}
    exec(line, names)
    assert len(names) > 1


# --- bash blocks -------------------------------------------------------------------------------------------


def commands(page: str) -> Iterator[list[str]]:
    """Yields the words of each command line, without what makes it a notebook's or a virtual environment's."""
    for block in blocks(page, "bash"):
        for line in block.text.replace("\\\n", " ").splitlines():
            words = shlex.split(line.strip().lstrip("!%"), comments=True)
            if words:
                yield [words[0].removeprefix(".venv/bin/"), *words[1:]]


def check_flags(cls: type, flags: list[str]) -> None:
    cli.read_command_line(cls, flags, description=None)


def check_python(words: list[str]) -> None:
    file, flags = words[0], words[1:]
    if file == "-m" and flags[0] in COMMAND_OF_MODULE:
        check_flags(COMMAND_OF_MODULE[flags[0]], flags[1:])
    elif file == "-m":
        assert flags == ["venv", ".venv"]
    elif file in settings.SCRIPTS:
        check_flags(settings.SCRIPTS[file], flags)
    elif file == "demo/train_vae.py":
        check_flags(importlib.import_module("train_vae").VAESettings, flags)
    elif file.startswith("examples/"):
        assert (ROOT / file).is_file() and len(flags) == 1
    elif file == "benchmarks/bench_sample.py":
        bench_sample.read_arguments(flags)
    else:
        raise AssertionError(f"nobody checks the flags of {file}")


def check_torchrun(words: list[str]) -> None:
    option = words.pop(0)
    assert re.fullmatch(r"--nproc_per_node=[1-9]", option), option
    check_python(words)


def check_make(words: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"^([a-z-]+):", makefile, re.MULTILINE)
    assert "\ntest-%: .venv-%/installed\n" in makefile
    targets += [f"test-{path.stem}" for path in (ROOT / "constraints").glob("*.txt")]
    assert words and set(words) <= set(targets), f"the Makefile has no {' '.join(words)}"


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


def check_console_command(name: str) -> Callable[[list[str]], None]:
    def check(flags: list[str]) -> None:
        installed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"].get("scripts", {})
        assert name in installed, f"pyproject.toml installs no command {name}"
        check_flags(settings.SCRIPTS[CONSOLE_COMMANDS[name]], flags)

    return check


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
    **{name: check_console_command(name) for name in CONSOLE_COMMANDS},
}


@by_page
def test_every_command_is_one_that_works(page):
    for first, *rest in commands(page):
        assert first in CHECKS, f"nobody checks {first}"
        CHECKS[first](rest)


def test_there_are_commands_to_check():
    assert len(list(commands("README.md"))) >= 12
    assert sum(len(list(commands(page))) for page in ENGLISH) >= 40


def test_a_command_with_a_wrong_setting_is_noticed():
    with pytest.raises(errors.UserError):
        check_python(["train_latent_cfg.py", "--max_hour", "11.5"])
    with pytest.raises(errors.UserError):
        check_python(["-m", "gait_latents.export", "--checkpoints", "results"])
    with pytest.raises(errors.UserError):
        check_torchrun(["--nproc_per_node=2", "generate.py", "--images", "5"])
    with pytest.raises(AssertionError):
        check_make(["demos"])
    with pytest.raises(AssertionError):
        check_pip(["install", "torch==1.0"])
    with pytest.raises(AssertionError):
        check_console_command("preprocess-images")([])


def test_the_commands_that_users_type_are_in_the_readme():
    lines = "\n".join(block.text for block in blocks("README.md", "bash")).splitlines()
    cells = [line.lstrip("!") for line in lines]
    assert (
        "python preprocess_latents.py --vae_path kl_vae_best.pt --data_path Normal_line "
        "--output_folder ./latents_cache --num_users 31 --images_per_user 50"
    ) in cells
    assert "python train_latent_cfg.py" in cells


# --- what the text names -----------------------------------------------------------------------------------


@cache
def sources() -> dict[Path, str]:
    files = [*ROOT.glob("*.py"), *(ROOT / "gait_latents").rglob("*.py"), *(ROOT / "demo").glob("*.py")]
    files += [ROOT / "Makefile", ROOT / "configs" / "demo.yaml"]
    return {path: path.read_text(encoding="utf-8") for path in files}


def is_known_file(name: str) -> bool:
    """Says whether a file is here, is a user's, or has a name that the scripts give."""
    if (ROOT / name).exists() or (ROOT / "docs" / name).exists() or name in WRITTEN_BY_USERS:
        return True
    return re.sub(r"[0-9]{8}", "…", name.rpartition("/")[2]) in {*source_strings(), *notebook_files()}


@cache
def notebook_files() -> tuple[str, ...]:
    """Returns the names of files that the notebook writes."""
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / "examples").glob("*.ipynb")]
    return tuple(name for text in texts for name in re.findall(r"[\w-]+\.zip", text))


def named_files(page: str) -> set[str]:
    spans = {span for span in code_spans(prose(page)) if re.fullmatch(rf"[\w./-]+\.({KINDS_OF_FILE})", span)}
    spans |= {span for span in code_spans(prose(page)) if re.fullmatch(rf"({OUR_FOLDERS})/[\w./-]*", span)}
    return {span for span in spans if not span.startswith(".")} - OF_OTHER_PROGRAMS  # an ending is no file


@by_page
def test_files_that_are_named_exist(page):
    assert not sorted(name for name in named_files(page) if not (is_known_file(name) or is_generated_image(name)))


def test_there_are_files_to_check():
    assert len(named_files("README.md")) > 6
    assert len({name for page in ENGLISH for name in named_files(page)}) > 60


def is_generated_image(name: str) -> bool:
    """Says whether a path has the form that generate.py gives: class, then class and number."""
    return re.fullmatch(r"synthetic/(\w+)/\1_[0-9]{6}\.jpg", name) is not None


def test_a_file_that_nobody_knows_is_noticed():
    assert is_known_file("results/ema-00002000.safetensors") and is_known_file("constraints.txt")
    assert not is_known_file("results/weights-00002000.safetensors")
    assert not is_known_file("latents_cache/index.json")


def test_what_the_page_on_scale_names_exists():
    code, num_found = "\n".join(sources().values()), 0
    for span in set(code_spans(prose("docs/scale.md"))) - OF_OTHER_PROGRAMS:
        name = span.rpartition(".")[2]
        is_known = is_known_file(span) or re.search(rf"^ *(def|class) {re.escape(name)}\b", code, re.MULTILINE)
        assert is_known, span
        num_found += 1
    assert num_found > 20


def target_of(page: str, link: str) -> tuple[Path, str]:
    """Returns the file that a link of a page leads to, and the anchor in it or nothing."""
    file, _, anchor = link.partition("#")
    return ((ROOT / page).parent / file if file else ROOT / page).resolve(), anchor


def leads_nowhere(page: str, link: str) -> bool:
    path, anchor = target_of(page, link)
    return not path.exists() or bool(anchor and anchor not in pages.anchors(str(path.relative_to(ROOT.resolve()))))


@by_any_page
def test_links_and_pictures_lead_somewhere(page):
    local = [link for link in pages.links(page) if "://" not in link]
    assert not [link for link in local if leads_nowhere(page, link)]


def test_a_link_that_leads_nowhere_is_noticed():
    assert not leads_nowhere("README.md", "docs/kaggle.md#p100")
    assert leads_nowhere("README.md", "docs/kaggle.md#p200")
    assert leads_nowhere("docs/kaggle.md", "docs/kaggle.md")


@by_page
def test_flags_and_make_targets_that_are_named_exist(page):
    known = {f"--{name}" for cls in settings.SCRIPTS.values() for name in cli.specs(cls)} | OTHER_FLAGS
    spans = code_spans(prose(page))
    flags = {word.replace("-", "_").replace("__", "--", 1) for span in spans for word in re.findall(r"--[\w-]+", span)}
    assert not flags - known
    for span in spans:
        if span.startswith("make "):
            check_make(span.split()[1:])


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


@pytest.mark.parametrize("page", ["README.md", "README.zh-CN.md", "docs/troubleshooting.md"])
def test_messages_are_those_of_the_program(page):
    quoted = pages.messages(page)
    assert len(quoted) >= 10
    assert not [message for message in quoted if not is_in_sources(message)]


def test_a_message_that_is_not_in_the_program_is_noticed():
    assert is_in_sources("there is no setting … did you mean")
    assert not is_in_sources("there is no such setting")


def test_exit_codes_are_those_of_the_program():
    (table,) = [table for table in pages.tables("docs/troubleshooting.md") if table[0][0] == "exit code"]
    expected = [
        errors.DONE,
        errors.FAILED,
        errors.USER_ERROR,
        *(errors.Stopped(number).exit_code for number in sorted(process.STOP_SIGNALS)),
    ]
    assert [int(row[0]) for row in table[1:]] == expected


def test_the_output_of_the_demo_is_made_of_what_the_scripts_say():
    (output,) = re.findall(r"demo output: begin -->\n+```text\n((?:.*\n)*?)```", text_of("README.md"))
    lines = [line for line in output.splitlines() if line]
    assert len(lines) >= 7
    for line in lines:
        pairs = re.findall(r"(?=\b([a-zA-Z]+ [a-zA-Z]+)\b)", line)
        assert any(pair in text for pair in pairs for text in source_strings()), line


# --- dependencies ------------------------------------------------------------------------------------------


def package_names(file: str) -> set[str]:
    lines = (ROOT / file).read_text().splitlines()
    return {re.split(r"[<>=]", line)[0].lower() for line in lines if line and not line.startswith("#")}


def required_packages() -> set[str]:
    return package_names("requirements.txt")


def optional_packages() -> set[str]:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    return {re.split(r"[<>=]", requirement)[0] for extra in extras.values() for requirement in extra}


def test_the_table_of_dependencies_is_complete():
    (table,) = [table for table in pages.tables("docs/install.md") if table[0][0] == "package"]
    of_kind: dict[str, set[str]] = {}
    for names, _, kind in table[1:]:
        of_kind.setdefault(kind, set()).update(names.split(", "))
    assert of_kind == {
        "required": required_packages(),
        "optional": optional_packages(),
        "for development": package_names("requirements-dev.txt") - optional_packages(),
    }


# --- the package -------------------------------------------------------------------------------------------


def test_the_table_of_the_architecture_names_every_wing_and_module():
    (table,) = [table for table in pages.tables("docs/architecture.md") if table[0][0] == "wing or module"]
    package = ROOT / "gait_latents"
    there = {path for path in package.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert sorted(row[0].strip("`") for row in table[1:]) == sorted(
        str(path.relative_to(ROOT)) for path in there if path.name != "__init__.py"
    )


# --- settings ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("language", settings_table.PAGES)
def test_the_tables_of_settings_are_those_of_the_code(language):
    text = settings_table.PAGES[language].read_text(encoding="utf-8")
    assert settings_table.with_tables(text, language) == text, "python docs/settings_table.py --write"


def test_every_help_text_has_a_translation_and_none_is_left_over():
    assert set(settings_table.HELP_ZH) == settings_table.help_texts()


@pytest.mark.parametrize("language", settings_table.PAGES)
def test_every_setting_has_a_row_with_its_default(language):
    table = settings_table.PAGES[language].read_text(encoding="utf-8")
    num_rows = 0
    for name, cls in settings.SCRIPTS.items():
        part = table.partition(f"{settings_table.title(name)}\n")[2].partition("\n## ")[0]
        for setting, default in cli.defaults(cls).items():
            (row,) = re.findall(rf"^\| `{setting}`(?: \\\*)? \| (.*)$", part, re.MULTILINE)
            assert default == () or row.startswith(f"`{cli.show(default)}` |")
            num_rows += 1
    assert num_rows > 60


# --- numbers -----------------------------------------------------------------------------------------------


def test_the_numbers_of_an_evaluation_are_those_in_the_code():
    text = " ".join(prose("docs/evaluation.md").split())
    assert re.findall(r"have (\d+) or more test images per class", text) == [str(FEW_PER_CLASS)]
    few = 100 * figures.NEAR_SHARE
    found = re.findall(r"nearer to one than (\S+)% of the test images are \| about (\S+)%;", text)
    assert found == [(f"{100 - few:g}", f"{few:g}")]
    assert f"far more than {few:g}% means" in prose("README.md")


def test_the_number_of_passes_is_that_in_the_code():
    assert f"sees each training image {settings.AUTO_PASSES} times" in prose("docs/runs.md")
    frozen = settings.FROZEN_DEFAULTS
    text = " ".join(prose("docs/runs.md").split())
    assert f"`train_lr` is then {frozen['train_lr']}, and `train_num_steps auto` sees each image" in text
    assert f"sees each image {settings.FROZEN_PASSES} times, and takes {frozen['fewest_steps']} steps at least" in text
    assert f"By default `dpm++` takes {settings.AUTO_STEPS['dpm++']}:" in " ".join(prose("docs/sampling.md").split())


# --- how the pages are kept --------------------------------------------------------------------------------


@pytest.mark.parametrize("page", ["README.md", "README.zh-CN.md"])
def test_the_readme_can_be_read_in_one_sitting(page):
    assert len(text_of(page).splitlines()) <= 200


def test_the_readme_links_to_every_page():
    linked = {target_of("README.md", link)[0] for link in pages.links("README.md")}
    assert len(ENGLISH) > 13
    assert not [page for page in ENGLISH if page != "README.md" and (ROOT / page).resolve() not in linked]


def test_the_chinese_readme_links_to_every_chinese_page():
    linked = {target_of("README.zh-CN.md", link)[0] for link in pages.links("README.zh-CN.md")}
    there = {path.resolve() for path in (ROOT / "docs" / "zh-CN").glob("*.md")}
    assert there == {(ROOT / page).resolve() for page in TRANSLATIONS if page.startswith("docs/")}
    assert there <= linked


@pytest.mark.parametrize("page", [page for page in pages.ALL if not page.startswith("README")])
def test_a_page_begins_with_a_sentence_that_says_what_it_is_for(page):
    first = prose(page).strip().split("\n\n")[1]
    assert first.startswith("本页" if page in TRANSLATIONS else "This page ")
    assert "。" in first or ". " in f"{first} "


# --- translations ------------------------------------------------------------------------------------------


@by_translation
def test_a_translation_is_of_the_page_as_it_is(page):
    original = TRANSLATIONS[page]
    assert pages.stamp(original) in text_of(page), f"translate what changed in {original}, then put this into {page}"


def test_an_edit_of_the_english_page_is_noticed_but_not_one_of_its_generated_tables(monkeypatch):
    before, text = pages.stamp("docs/settings.md"), text_of("docs/settings.md")
    monkeypatch.setattr(pages, "text_of", lambda page: text.replace("| `seed` | `42` |", "| `seed` | `43` |"))
    assert pages.text_of("docs/settings.md") != text and pages.stamp("docs/settings.md") == before
    monkeypatch.setattr(pages, "text_of", lambda page: f"{text}One more sentence.\n")
    assert pages.stamp("docs/settings.md") != before


@by_translation
def test_a_translation_has_the_same_headings_and_blocks(page):
    original = TRANSLATIONS[page]
    levels = [[heading.partition(" ")[0] for heading in pages.headings(name)] for name in (original, page)]
    assert levels[0] == levels[1]
    assert blocks(original) == blocks(page)


@by_translation
def test_a_translation_names_the_same_things(page):
    spans = [set(code_spans(prose(name))) for name in (TRANSLATIONS[page], page)]
    assert not spans[0] ^ spans[1]


@by_translation
def test_a_translation_has_the_same_tables(page):
    original = TRANSLATIONS[page]
    shapes = [[[len(row) for row in table] for table in pages.tables(name)] for name in (original, page)]
    assert shapes[0] == shapes[1]
    assert pages.messages(original) == pages.messages(page)


@by_any_page
def test_blocks_have_tags_that_are_checked(page):
    assert {block.tag for block in blocks(page)} <= {"bash", "python", "python not-run", "text", ""}
