"""The house: every module has its place in the README's drawing, and imports only from the lines below it."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
TOOLS = {"settings_table"}  # not imported by anything, and not installed
MODULES = {path.stem for path in ROOT.glob("*.py")} - TOOLS


def drawing() -> list[list[str]]:
    """Returns the lines of the drawing in README.md, the scripts first."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    texts = re.findall(r"^```text\n((?:.*\n)*?)```$", readme, re.MULTILINE)
    (house,) = [text for text in texts if text.startswith("preprocess_latents ")]
    return [line.split() for line in house.splitlines()]


def imported(module: str) -> Iterator[str]:
    """Yields the first word of each import of a module, wherever it stands; those for type checkers left out."""
    tree = ast.parse((ROOT / f"{module}.py").read_text(encoding="utf-8"))
    for_checkers = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if node in for_checkers:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module
            yield node.module.split(".")[0]


def test_every_module_has_its_place_in_the_drawing():
    placed = [name for line in drawing() for name in line]
    assert len(placed) == len(set(placed))
    assert set(placed) == MODULES


def test_imports_point_down_only():
    height = {name: -number for number, line in enumerate(drawing()) for name in line}
    num_imports = 0
    for module in MODULES:
        for other in set(imported(module)) & MODULES:
            assert height[other] < height[module], f"{module} imports {other}, which is not below it"
            num_imports += 1
    assert num_imports > 50


def test_config_imports_the_standard_library_and_yaml_only():
    assert set(imported("config")) - set(sys.stdlib_module_names) == {"yaml"}


def test_every_module_is_installed():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert set(project["tool"]["setuptools"]["py-modules"]) == MODULES


def test_no_module_hides_one_of_the_standard_library():
    assert not (MODULES | TOOLS) & set(sys.stdlib_module_names)


def test_every_module_is_in_the_table_of_files():
    for file in ("README.md", "README.zh-CN.md"):
        rows = re.findall(r"^\| `(\w+)\.py` \|", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE)
        assert sorted(rows) == sorted(MODULES | TOOLS), file
