"""Versions with known holes are told in one line, once for a command, and by the first of several processes alone."""

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from gait_latents import export
from gait_latents.common import script, versions
from gait_latents.settings import ExportSettings, GenerateSettings

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def told(monkeypatch, capsys):
    """Returns the lines on stderr of a script that runs with a version of Pillow."""
    monkeypatch.delenv("GAIT_LATENTS_OLD_PILLOW")

    def lines(version: str, words: tuple[str, ...] = (), **options: bool) -> list[str]:
        monkeypatch.setattr(metadata, "version", {"pillow": version}.__getitem__)
        assert script.run_script(GenerateSettings, words, None, lambda argv: 0, **options) == 0
        return capsys.readouterr().err.splitlines()

    return lines


@pytest.mark.parametrize("version", ["10.1.0", "11.3.0", "12.2.0", "9.5.0.post2", "12.3.0rc1"])
def test_a_pillow_with_known_holes_is_told_with_the_command(told, version):
    (line,) = told(version)
    assert line == (
        f"warning: Pillow {version} has known holes: an image made for it can overwrite memory (CVE-2026-59199 and "
        "others); pip install -U pillow, or, for images that you trust, GAIT_LATENTS_OLD_PILLOW=ok"
    )


@pytest.mark.parametrize("version", ["13.0.0", "13.1.dev0", "14"])
def test_a_repaired_pillow_is_not_told(told, version):
    assert told(version) == []


def test_nothing_is_told_for_help_by_other_ranks_of_scripts_without_images_and_where_it_is_known(told, monkeypatch):
    with pytest.raises(SystemExit):
        told("11.3.0", ("--help",))
    assert told("11.3.0", reads_images=False) == []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert told("11.3.0") == []
    monkeypatch.setenv("RANK", "0")
    assert len(told("11.3.0")) == 1
    monkeypatch.setenv("GAIT_LATENTS_OLD_PILLOW", "ok")
    assert told("11.3.0") == []


def test_the_export_reads_no_images(told, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(metadata, "version", {"pillow": "11.3.0"}.__getitem__)
    assert export.main(["--checkpoint", str(tmp_path / "none")]) == 2
    assert "Pillow" not in capsys.readouterr().err
    assert ExportSettings


def test_a_missing_pillow_is_told_when_it_is_imported(monkeypatch, capsys):
    monkeypatch.delenv("GAIT_LATENTS_OLD_PILLOW")

    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    versions.warn_of_holes()
    assert capsys.readouterr().err == ""


def test_a_script_of_this_environment_tells_of_its_own_pillow(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "GAIT_LATENTS_OLD_PILLOW"}
    command = [sys.executable, ROOT / "generate.py", "--checkpoint", tmp_path / "none"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    is_old = int(metadata.version("pillow").split(".")[0]) < versions.PILLOW_REPAIRED[0]
    lines = done.stderr.splitlines()
    assert done.returncode == 2 and len(lines) == 1 + is_old and lines[-1].startswith("error: ")
    assert lines[0].startswith("warning: Pillow ") == is_old


def test_the_audit_fails_where_it_cannot_be_done():
    (line,) = (line for line in (ROOT / "Makefile").read_text().splitlines() if "-m pip_audit" in line)
    assert "--strict" in line.split()
    assert "audit" not in (ROOT / ".ci" / "run").read_text()  # which has to pass without a network
