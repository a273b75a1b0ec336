"""The diffusion library: one that is absent or too old is told with its place, before anything is computed."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from gait_latents.common.errors import UserError
from gait_latents.diffusion.library import check_library

ROOT = Path(__file__).resolve().parents[2]


# ---- the library


def place_library(folder: Path, monkeypatch, version_file: str | None) -> Path:
    """Puts a library of that name first on the path, as if nothing had imported the real one."""
    package = folder / "denoising_diffusion_pytorch"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "classifier_free_guidance.py").write_text("class Unet: pass\nclass GaussianDiffusion: pass\n")
    if version_file is not None:
        (package / "version.py").write_text(version_file)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "denoising_diffusion_pytorch")
    return package


def test_the_installed_library_is_accepted():
    check_library()


@pytest.mark.parametrize(
    ("version_file", "named"),
    [
        ("__version__ = '1.8.0'\n", "1.8.0"),
        ('__version__="2.3.3"', "2.3.3"),
        ("__version__ = '2.3'", "2.3"),
        ("nothing here", "version unknown"),
        (None, "version unknown"),
    ],
)
def test_an_old_copy_on_the_path_is_named_with_its_place(tmp_path, monkeypatch, version_file, named):
    package = place_library(tmp_path, monkeypatch, version_file)
    with pytest.raises(UserError, match=rf"{re.escape(named)}.*{re.escape(str(package.resolve()))}.*2\.3\.4"):
        check_library()


@pytest.mark.parametrize("version", ["2.3.4", "2.3.10", "2.10.0", "3.0"])
def test_a_newer_copy_on_the_path_is_accepted(tmp_path, monkeypatch, version):
    place_library(tmp_path, monkeypatch, f"__version__ = '{version}'\n")
    check_library()


@pytest.mark.parametrize(("version", "accepted"), [("2.4.0", True), ("2.2.0", False)])
def test_an_installation_without_a_version_file_is_asked_through_its_metadata(tmp_path, monkeypatch, version, accepted):
    place_library(tmp_path, monkeypatch, None)
    metadata = tmp_path / f"denoising_diffusion_pytorch-{version}.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: denoising-diffusion-pytorch\nVersion: {version}\n")
    if accepted:
        check_library()
    else:
        with pytest.raises(UserError, match=version):
            check_library()


def test_an_absent_library_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "denoising_diffusion_pytorch")
    with pytest.raises(UserError, match="not installed; pip install"):
        check_library()


@pytest.mark.slow
def test_a_fork_in_the_working_directory_stops_the_import_of_our_module(tmp_path, monkeypatch):
    package = place_library(tmp_path, monkeypatch, "__version__ = '2.0.1'\n")
    program = (
        "from gait_latents.common.errors import UserError\n"
        "try:\n  from gait_latents.diffusion import model\n"
        "except UserError as error:\n  print(error)"
    )
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert "2.0.1" in run.stdout
    assert str(package.resolve()) in run.stdout


def test_only_the_diffusion_module_pays_for_importing_the_library():
    importing = re.compile(r"^\s*(from|import)\s+denoising_diffusion_pytorch", re.MULTILINE)
    paths = [*ROOT.glob("*.py"), *(ROOT / "gait_latents").rglob("*.py")]
    modules = {str(path.relative_to(ROOT)) for path in paths if importing.search(path.read_text())}
    assert len(paths) > 60 and modules == {"gait_latents/diffusion/library.py"}
