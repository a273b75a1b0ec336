"""The house: which wing may import which, what lies at the root, what pip installs, and that nothing grows too long."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "gait_latents"
SCRIPTS = {"preprocess_latents", "train_latent_cfg", "generate", "evaluate_images"}
FACES = {"vae", "latent_dataset"}
# What each wing may import besides itself; all may import common and settings.
MAY_IMPORT = {
    "common": set(),
    "images": set(),
    "vae": set(),
    "diffusion": set(),
    "latents": {"images", "vae"},
    "training": {"latents", "diffusion", "images", "vae"},
    "evaluation": {"training", "latents", "diffusion", "images", "vae"},
}
MODULES = sorted(PACKAGE.rglob("*.py"))
LONGEST_FUNCTION, LONGEST_SCRIPT = 60, 100


def name_of(path: Path) -> str:
    """Returns the dotted name of a module of the package."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imported(path: Path) -> Iterator[str]:
    """Yields the dotted name of each module that a file imports; those for type checkers are left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
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
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module
            for alias in node.names:
                below = f"{node.module}.{alias.name}"
                is_module = (ROOT / f"{below.replace('.', '/')}.py").exists()
                yield below if is_module else node.module


def wing_of(name: str) -> str | None:
    """Returns the wing that a dotted name lies in; None for what is not of the package, and for its own modules."""
    parts = name.split(".")
    return parts[1] if parts[0] == "gait_latents" and len(parts) > 1 and parts[1] in MAY_IMPORT else None


def test_the_wings_are_those_that_there_are():
    assert {path.parent.name for path in PACKAGE.glob("*/__init__.py")} == MAY_IMPORT.keys()


@pytest.mark.parametrize("wing", MAY_IMPORT)
def test_a_wing_imports_only_what_it_may(wing):
    allowed = MAY_IMPORT[wing] | {wing, "common"}
    num_imports = 0
    for path in (PACKAGE / wing).rglob("*.py"):
        for name in imported(path):
            num_imports += name.startswith("gait_latents.")
            assert wing_of(name) in (None, *allowed), f"{name_of(path)} imports {name}"
            is_settings = name.startswith("gait_latents.settings")
            assert wing != "common" or not is_settings, f"{name_of(path)} imports {name}"
            is_own = wing_of(name) is not None or is_settings or not name.startswith("gait_latents.")
            assert is_own, f"{name_of(path)} imports {name}, which is built on the wings"
    assert num_imports > 3


def test_settings_import_common_alone():
    assert {wing_of(name) for name in imported(PACKAGE / "settings.py")} == {None, "common"}


def test_no_module_of_the_package_imports_the_root():
    for path in MODULES:
        assert not {name.split(".")[0] for name in imported(path)} & (SCRIPTS | FACES), path


def test_no_script_imports_another():
    for script in SCRIPTS:
        assert not {name.split(".")[0] for name in imported(ROOT / f"{script}.py")} & (SCRIPTS | FACES)


def test_no_two_modules_import_each_other_in_a_circle():
    below = {name_of(path): {name for name in imported(path) if name.startswith("gait_latents.")} for path in MODULES}
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " imports ".join((*above[above.index(name) :], name))
        if name not in done:
            for other in below.get(name, ()):
                visit(other, (*above, name))
            done.add(name)

    for name in below:
        visit(name, ())
    assert len(done) > 60


def test_the_drawing_of_the_wings_is_in_the_order_of_their_imports():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    (drawing,) = (block for block in re.findall(r"^```text\n(.*?)^```$", text, re.M | re.S) if "evaluation" in block)
    height = {
        word.removeprefix("gait_latents/"): -number
        for number, line in enumerate(drawing.splitlines())
        for word in line.split()
    }
    assert height.keys() >= MAY_IMPORT.keys() | SCRIPTS | FACES
    for wing, others in MAY_IMPORT.items():
        for other in others:
            assert height[other] < height[wing], f"{other} must stand below {wing}"


def test_the_root_shows_the_scripts_and_the_faces_alone():
    assert {path.stem for path in ROOT.glob("*.py")} == SCRIPTS | FACES
    for name in SCRIPTS | FACES:
        assert len((ROOT / f"{name}.py").read_text(encoding="utf-8").splitlines()) <= LONGEST_SCRIPT, name


def test_pip_installs_the_package_and_the_scripts_and_a_command_for_each():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    found = project["tool"]["setuptools"]
    assert set(found["py-modules"]) == SCRIPTS and found["packages"]["find"]["include"] == ["gait_latents*"]
    assert {target.partition(":")[0] for target in project["project"]["scripts"].values()} == SCRIPTS
    for wing, files in found["package-data"].items():
        assert all((ROOT / wing.replace(".", "/") / name).is_file() for name in files)


def test_no_module_hides_one_of_the_standard_library():
    assert not (SCRIPTS | FACES) & set(sys.stdlib_module_names)


def test_no_function_is_longer_than_one_screen():
    num_functions = 0
    for path in [*MODULES, *ROOT.glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                num_functions += 1
                length = (node.end_lineno or 0) - node.lineno + 1
                assert length <= LONGEST_FUNCTION, f"{path}: {node.name} has {length} lines"
    assert num_functions > 500


def test_every_module_says_what_it_is_for():
    for path in MODULES:
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
        assert text and "TODO" not in text, path
