"""What every test has: one thread, so that times and bits do not depend on the machine; and the tiny world.

A whole run uses two processes where pytest-xdist is installed, and leaves the slow tests out unless --all is given.
"""

import os
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the scripts that tests start, too
# What is attached where the tests run, as in a notebook of Kaggle, is none of their business.
os.environ["GAIT_LATENTS_KAGGLE_INPUT"] = str(Path(__file__).parent / "no-input-is-attached")
os.environ["GAIT_LATENTS_OLD_PILLOW"] = "ok"  # the tests run with old versions, too

import pipeline
import pytest
import torch
from fault_account import ACCOUNT, Account, table

from gait_latents.vae import weight_files

torch.set_num_threads(1)
weight_files.SAFE_TORCH = (2, 6)  # the tests trust the pickles that they make, whichever torch they run with
NUM_PROCESSES = 2


def is_pinned_set() -> bool:
    """Says whether the packages are those of constraints.txt, whose warnings are known."""
    lines = (Path(__file__).parents[1] / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if "==" in line)
    names = ("torch", "torchvision", "numpy", "pillow")
    return all(metadata.version(name).partition("+")[0] == pins[name] for name in names)  # 2.14.1+cpu is 2.14.1


def pytest_configure(config: pytest.Config) -> None:
    """Makes a warning an error in the pinned set; other versions warn of other things, which is no defect of ours."""
    if is_pinned_set():
        config.addinivalue_line("filterwarnings", "error")
        for line in list(config.getini("filterwarnings")[:-1]):
            config.addinivalue_line("filterwarnings", line)  # the last line that fits counts


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds --all."""
    parser.addoption("--all", action="store_true", help="run the slow tests too, and tests/faults in its long form")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Lets a whole run share its tests between two processes; a file or a test that is named runs in this one."""
    is_worker = "PYTEST_XDIST_WORKER" in os.environ  # which pytest-xdist has started, and which starts no more
    is_whole = config.args_source is not pytest.Config.ArgsSource.ARGS and not is_worker
    if is_whole and config.pluginmanager.hasplugin("xdist") and config.getoption("numprocesses") is None:
        config.option.numprocesses, config.option.dist = NUM_PROCESSES, "worksteal"
        config.option.tx = [f"{NUM_PROCESSES}*popen"]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves the slow tests out, but for --all and for a test that is named with its file."""
    is_named = any("::" in argument for argument in config.args)
    if config.getoption("--all") or is_named:
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    if slow:
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if not item.get_closest_marker("slow")]


# --- the account of the fault suite, which a run ends with: only this file is known to all its processes ------


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Hands the rows of a process of pytest-xdist to the one that prints."""
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["fault rows"] = session.config.stash.get(ACCOUNT, Account()).rows


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Takes the rows of a process of pytest-xdist that has ended."""
    account = node.config.stash.setdefault(ACCOUNT, Account())
    account.rows += [tuple(row) for row in getattr(node, "workeroutput", {}).get("fault rows", [])]


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Prints the table."""
    account = config.stash.get(ACCOUNT, None)
    if account is None or not account.rows:
        return
    terminalreporter.section("faults")
    for line in table(account):
        terminalreporter.write_line(line)


# --- the tiny world ----------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def _pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pipeline.make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def world(_pristine: Path, tmp_path: Path) -> Path:
    """A folder of one's own with three classes of eight images in `data` and a VAE in `vae.pt`."""
    return shutil.copytree(_pristine, tmp_path / "world")


@pytest.fixture
def encoder(monkeypatch: pytest.MonkeyPatch) -> pipeline.EncoderLog:
    """Notes what the real encoder does during the test."""
    return pipeline.EncoderLog(monkeypatch)


@pytest.fixture(scope="session")
def trained(_pristine: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A world after preprocessing and a whole training run; to be looked at and not to be changed."""
    root = shutil.copytree(_pristine, tmp_path_factory.mktemp("trained") / "world")
    assert pipeline.preprocess(root) == 0
    assert pipeline.train(root) == 0
    return root


@pytest.fixture
def cached(trained: Path, world: Path) -> Path:
    """A world whose images are all encoded already."""
    shutil.copytree(trained / "latents_cache", world / "latents_cache")
    return world


@pytest.fixture
def emptied(world: Path) -> Path:
    """A world whose cache has manifest and split, and has lost every latent."""
    assert pipeline.preprocess(world) == 0
    (space,) = (path for path in (world / "latents_cache").iterdir() if path.is_dir())
    shutil.rmtree(space)
    return world
