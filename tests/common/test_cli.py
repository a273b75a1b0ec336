"""What the scripts share: exit codes, signals, progress, the words for times and sizes; and the device."""

import contextlib
import io
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import termios
import threading
import time
import tomllib
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import gait_latents
from gait_latents.common import cli, console, hardware
from gait_latents.common.errors import Failed, Stopped, UserError
from gait_latents.common.process import StopSignals
from gait_latents.common.script import imports, run_script

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ("preprocess_latents.py", "train_latent_cfg.py", "generate.py", "evaluate_images.py")
EXPORT = "gait_latents.export"


# --- the next command ---------------------------------------------------------------------------------------


def test_the_next_command_starts_the_python_of_this_one(tmp_path):
    folder = tmp_path / "my tools" / ".venv"
    venv.create(folder, symlinks=True)
    telling = "from gait_latents.common import console; import sys; print(console.python_word()); print(sys.prefix)"
    clean = {"PATH": "/usr/bin:/bin", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    active = {**clean, "PATH": f"{folder / 'bin'}:/usr/bin:/bin"}
    for place, env, expected in (
        (folder.parent, clean, ".venv/bin/python"),
        (tmp_path, clean, "'my tools/.venv/bin/python'"),
        (ROOT, clean, f"'{folder}/bin/python'"),
        (ROOT, active, "python"),
    ):
        run = {"cwd": place, "env": env, "capture_output": True, "text": True, "check": True}
        word, _ = subprocess.run([folder / "bin" / "python", "-c", telling], **run).stdout.splitlines()
        assert word == expected
        again = subprocess.run(f"{word} -c '{telling}'", shell=True, **run).stdout.splitlines()
        assert again == [word, str(folder)]


# --- how a script ends -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """Settings of a script that is made up."""

    number: int = cli.setting(1, int, "numbers", "a number")


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("dim is 3;\n  use 4"), 2, "error: dim is 3; use 4\n"),
        (Failed("no room"), 1, "error: no room\n"),
        (OSError(28, "No space left on device", "/a/b"), 1, "error: /a/b: No space left on device\n"),
        (OSError("odd"), 1, "error: odd\n"),
        (Stopped(signal.SIGTERM), 143, ""),
        (Stopped(signal.SIGINT), 130, ""),
        (KeyboardInterrupt(), 130, "\nstopped by Ctrl-C\n"),
    ],
)
def test_every_way_to_end_has_its_exit_code_and_at_most_one_line(capsys, error, code, line):
    def work(argv):
        raise error

    assert run_script(Settings, [], "Fails.", work) == code
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", line)


def test_a_script_that_ends_well_keeps_its_exit_code():
    assert run_script(Settings, ["--number", "2"], "Counts.", lambda argv: len(argv or ())) == 2


def test_a_mistake_in_the_flags_ends_a_script_before_its_work(capsys):
    assert run_script(Settings, ["--numbr", "2"], "Never begins.", lambda argv: pytest.fail("it began")) == 2
    assert capsys.readouterr().err == "error: there is no setting --numbr; did you mean --number?\n"


def test_a_mistake_of_ours_is_not_hidden():
    def work(argv):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_script(Settings, [], "Fails.", work)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ImportError("No module named 'x'", name="x"), "No module named 'x'; pip install -r requirements.txt"),
        (RuntimeError("operator torchvision::nms does not exist"), "torch and torchvision do not fit each other"),
    ],
)
def test_what_fails_in_the_imports_is_told_with_its_remedy(error, told):
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(UserError) as raised, imports():
        raise error
    assert str(raised.value).startswith(told)
    assert signal.getsignal(signal.SIGINT) == before


@pytest.mark.parametrize("error", [ImportError("no x in ours", name="gait_latents.vae.x"), RuntimeError("odd")])
def test_a_defect_of_ours_in_the_imports_is_not_taken_for_a_missing_package(error):
    with pytest.raises(type(error)), imports():
        raise error


def as_main(name: str, *words: str) -> str:
    """Returns the end of a program, which starts a script, or the export, as a user does."""
    run = f"run_module({name!r}, run_name='__main__', alter_sys=True)"
    if name != EXPORT:
        run = f"run_path({name!r}, run_name='__main__')"
    return f"import runpy, sys; sys.argv = {[name, *words]!r}; runpy.{run}"


def start(*arguments: str, cwd: Path = ROOT, **variables: str) -> subprocess.CompletedProcess[str]:
    """Starts this Python with words and variables of the environment; returns how it ended."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("name", [*SCRIPTS, EXPORT])
def test_help_comes_before_torch_is_imported(name):
    done = start("-c", f"import sys; sys.modules['torch'] = None; {as_main(name, '--help')}")
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.startswith("usage: ") and "--config FILE" in done.stdout and "(default: " in done.stdout


def test_what_each_script_imports_before_it_reads_its_flags_is_light():
    """Even with what is small, for a missing package is to be told in one line."""
    heavy = ("torch", "numpy", "tqdm", "yaml", "PIL", "matplotlib", "safetensors")
    names = f"gait_latents, {EXPORT}, {', '.join(name.removesuffix('.py') for name in SCRIPTS)}"
    done = start("-c", f"import sys, {names}; print([name for name in {heavy} if name in sys.modules])")
    assert (done.stdout, done.stderr) == ("[]\n", "")


PACKAGES = ("torch", "yaml", *(pytest.param(name, marks=pytest.mark.slow) for name in ("tqdm", "safetensors", "numpy")))


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("name", [*SCRIPTS, EXPORT])
def test_a_missing_package_is_one_line_with_the_command_that_installs_it(name, package, tmp_path, trained):
    line = one_line_without(package, name, tmp_path, trained)
    assert package in line and line.endswith("; pip install -r requirements.txt")


@pytest.mark.slow
def test_an_evaluation_says_that_it_needs_matplotlib(tmp_path, trained):
    line = one_line_without("matplotlib", "evaluate_images.py", tmp_path, trained)
    assert line == "error: charts need the package matplotlib; pip install matplotlib"


def one_line_without(package: str, name: str, folder: Path, trained: Path) -> str:
    """Starts a script, or the export, where a package is missing; returns the only line that it prints to stderr."""
    config, made = folder / "settings.yaml", folder / "made"
    config.write_text("seed: 1\n")
    words = ["--config", str(config)]
    if name in ("generate.py", "evaluate_images.py", EXPORT):
        words += ["--checkpoint", str(trained / "results")]
    if name == "evaluate_images.py":
        words += ["--synthetic_path", str(trained / "data")]
    words += ["--results_folder" if name == "train_latent_cfg.py" else "--output_folder", str(made)]
    done = start("-c", f"import sys; sys.modules['{package}'] = None; {as_main(name, *words)}", OMP_NUM_THREADS="1")
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and line.startswith("error: ") and not made.exists()
    return line


def test_python_looks_for_no_garbage_at_the_end_of_a_script():
    """It would go through all that torch has made, several times."""
    program = "import atexit, gc; atexit.register(lambda: print(gc.get_freeze_count() > 0))\n"  # runs last
    program += "from gait_latents.common.script import run_script\nfrom gait_latents.settings import TrainSettings\n"
    program += "run_script(TrainSettings, None, 'Trains.', lambda argv: 0)"
    done = start("-c", program)
    assert (done.returncode, done.stdout, done.stderr) == (0, "True\n", "")


# --- where a script is started -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_finds_the_package_however_python_is_started(name, tmp_path):
    path, mistake = str(ROOT / name), ["--dimm", "8"]
    for words, variables in (([path], {}), (["-I", path], {}), (["-P", path], {}), ([path], {"PYTHONSAFEPATH": "1"})):
        done = start(*words, *mistake, cwd=tmp_path, PYTHONPATH="", **variables)
        assert done.returncode == 2 and done.stderr.startswith("error: there is no setting --dimm"), done.stderr


@pytest.mark.slow
def test_modules_of_a_user_in_the_current_folder_do_not_get_in_the_way(tmp_path, trained):
    for name in ("config", "images", "vae", "script", "settings", "common", "latents", "training", "latent_dataset"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('this module is of the user')\n")
    words = ["--checkpoint", str(trained / "results"), "--output_folder", str(tmp_path / "made"), "--device", "cpu"]
    words += ["--images_per_class", "1", "--sampling_timesteps", "1"]
    done = start("-m", "generate", *words, cwd=tmp_path, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "made").glob("*/*.jpg"))) == 3
    for module in ("preprocess_latents", "train_latent_cfg", "evaluate_images", EXPORT):
        done = start("-m", module, "--help", cwd=tmp_path, PYTHONPATH=str(ROOT))
        assert (done.returncode, done.stderr) == (0, ""), done.stderr


@pytest.mark.slow
def test_importing_the_package_imports_no_torch_until_a_public_name_is_used():
    program = "import sys, gait_latents\n"
    program += "print(sorted(set(dir(gait_latents)) & {'LatentDataset', 'open_cache', 'load_vae'}))\n"
    program += "print('torch' in sys.modules)\n"
    program += "from gait_latents import LatentDataset, open_cache, load_vae\n"
    program += "print('torch' in sys.modules, LatentDataset.__name__, open_cache.__name__, load_vae.__name__)\n"
    done = start("-c", program)
    names = "['LatentDataset', 'load_vae', 'open_cache']"
    assert done.stdout == f"{names}\nFalse\nTrue LatentDataset open_cache load_vae\n", done.stderr
    with pytest.raises(AttributeError, match="module 'gait_latents' has no attribute 'LatentDatasets'"):
        gait_latents.LatentDatasets  # type: ignore[attr-defined]  # noqa: B018


def test_what_pip_names_as_a_command_is_there_to_be_called():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert len(project["scripts"]) == len(SCRIPTS)
    for command, target in project["scripts"].items():
        module, _, function = target.partition(":")
        called = (
            f"import sys; sys.argv = ['{command}', '--help']; from {module} import {function}; sys.exit({function}())"
        )
        done = start("-c", called)
        assert done.returncode == 0 and done.stdout.startswith(f"usage: {command} "), done.stderr


@pytest.mark.slow
def test_a_wheel_has_the_package_its_data_and_the_commands(tmp_path):
    setuptools = pytest.importorskip("setuptools", "70.1")  # which builds a wheel by itself
    source = tmp_path / "source"
    shutil.copytree(ROOT / "gait_latents", source / "gait_latents", ignore=shutil.ignore_patterns("__pycache__"))
    for path in [*ROOT.glob("*.py"), *ROOT.glob("*.toml"), *ROOT.glob("*.txt"), *ROOT.glob("*.md"), ROOT / "LICENSE"]:
        shutil.copy(path, source)
    build = ["-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path), str(source)]
    done = start(*build, PIP_NO_INDEX="1")
    assert done.returncode == 0, f"{setuptools.__version__}: {done.stderr}"
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (entry_points,) = (archive.read(name).decode() for name in names if name.endswith("entry_points.txt"))
        archive.extractall(tmp_path / "installed")
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "gait_latents").rglob("*") if path.is_file()}
    assert {name for name in modules if not name.endswith(".pyc")} <= names and set(SCRIPTS) <= names
    assert not {name for name in names if name.startswith("tests/")} | {"vae.py", "latent_dataset.py"} & names
    for command in ("preprocess-latents", "train-latent-cfg", "generate-latents", "evaluate-latents"):
        assert f"{command} = " in entry_points
    done = start("-m", "train_latent_cfg", "--help", cwd=tmp_path, PYTHONPATH=str(tmp_path / "installed"))
    assert done.returncode == 0 and "--config FILE" in done.stdout, done.stderr


# --- signals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*SCRIPTS, EXPORT])
@pytest.mark.parametrize("module", ["gait_latents.common.script", "gait_latents.settings", "torch"])
def test_ctrl_c_during_the_imports_ends_without_a_word(name, module):
    program = f"""
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it from the start
class Finder:
    def find_spec(self, wanted, path=None, target=None):
        if wanted == "{module}":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder())
{as_main(name)}
"""
    done = start("-c", program)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


@pytest.mark.parametrize("before", [signal.SIG_IGN, signal.default_int_handler])
def test_the_imports_of_a_script_leave_ctrl_c_as_it_was(before):
    own = signal.signal(signal.SIGINT, before)
    try:
        with imports():
            assert signal.getsignal(signal.SIGINT) is (signal.SIG_IGN if before is signal.SIG_IGN else signal.SIG_DFL)
        assert signal.getsignal(signal.SIGINT) is before
    finally:
        signal.signal(signal.SIGINT, own)


def test_ctrl_c_is_a_sentence_once_a_script_has_begun(capsys):
    own = signal.signal(signal.SIGINT, signal.SIG_DFL)  # as the first lines of a script leave it
    try:
        assert run_script(Settings, [], "Is stopped.", lambda argv: os.kill(os.getpid(), signal.SIGINT) or 0) == 130
    finally:
        signal.signal(signal.SIGINT, own)
    assert capsys.readouterr().err == "\nstopped by Ctrl-C\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_the_first_signal_only_sets_a_flag_and_a_second_ctrl_c_ends_the_program(number):
    before = signal.getsignal(number)
    with StopSignals() as signals:
        signals.raise_if_received()
        os.kill(os.getpid(), number)
        assert signals.received == number
        with pytest.raises(Stopped) as stopped:
            signals.raise_if_received()
        assert stopped.value.exit_code == 128 + number
        for other in (signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1):  # a queue and torchrun may both send one
            os.kill(os.getpid(), other)
        assert signals.received == number
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
    assert signal.getsignal(number) == before


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1])
def test_what_nohup_lets_a_process_ignore_stays_ignored(number):
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with StopSignals() as signals:
            os.kill(os.getpid(), number)
            assert signals.received is None and signal.getsignal(number) is signal.SIG_IGN
        assert signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, before)


def test_a_process_of_torchrun_ends_with_it_and_one_of_another_parent_goes_on(tmp_path):
    """The parent is killed, which leaves it no time to end its processes."""
    child = """
import os, time
from pathlib import Path
from gait_latents.common import process
process.end_with_torchrun()
Path(os.environ["PLACE"]).write_text(str(os.getpid()))
time.sleep(60)
"""
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    for variables, survives in (({"TORCHELASTIC_RUN_ID": "none"}, False), ({"WORLD_SIZE": "2"}, True)):
        place = tmp_path / f"{survives}"
        environment = {**os.environ, **variables, "PLACE": str(place), "PYTHONPATH": str(ROOT)}
        with subprocess.Popen([sys.executable, "-c", parent], env=environment, cwd=ROOT) as started:
            until = time.monotonic() + 60
            while not (place.exists() and place.read_text()) and time.monotonic() < until:
                time.sleep(0.01)
            number = int(place.read_text())
            started.kill()
        until = time.monotonic() + (0.5 if survives else 30)
        while _is_running(number) and time.monotonic() < until:
            time.sleep(0.01)
        assert _is_running(number) == survives
        if survives:
            os.kill(number, signal.SIGKILL)


def _is_running(number: int) -> bool:
    """Says whether a process, which may be nobody's child any more, runs."""
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_process_whose_torchrun_was_gone_before_it_began_ends_at_once():
    program = "from gait_latents.common import process; process.end_with_torchrun(); print(1)"
    with socket.socket() as free:  # bound, and nobody listens
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        place |= {"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_USE_AGENT_STORE": "True", "WORLD_SIZE": "2"}
        done = start("-c", program, cwd=ROOT, **place)
        assert (done.returncode, done.stdout) == (-signal.SIGTERM, "")
        free.listen()
        done = start("-c", program, cwd=ROOT, **place)
        assert (done.returncode, done.stdout) == (0, "1\n")


def test_signals_are_left_alone_outside_the_main_thread():
    before, seen = signal.getsignal(signal.SIGTERM), []

    def work() -> None:
        with StopSignals():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]


# --- what is shown -----------------------------------------------------------------------------------------


def test_a_log_gets_a_line_when_a_minute_and_a_tenth_have_passed_and_one_at_the_end(capsys, monkeypatch):
    with console.progress(total=3000, unit="images", label="encode", initial=1000) as bar:
        bar.advance(500)
        bar.advance(500, loss="0.25")
        assert capsys.readouterr().err == ""  # no minute has passed
        monkeypatch.setattr(bar, "last_time", time.monotonic() - 61)
        bar.advance(200)
        line = r"encode: 2,200 of 3,000 images \(73%\) after 0\.\d s, about 0\.\d s to go, loss=0\.25\n"
        assert re.fullmatch(line, capsys.readouterr().err)
        monkeypatch.setattr(bar, "last_time", time.monotonic() - 61)
        bar.advance(299)
        assert capsys.readouterr().err == ""  # no tenth
        bar.advance(501)
    captured = capsys.readouterr()
    assert re.fullmatch(r"encode: 3,000 of 3,000 images \(100%\) after 0\.\d s, loss=0\.25\n", captured.err)
    assert captured.out == ""


def test_a_log_of_work_that_was_stopped_ends_without_a_forecast(capsys):
    with console.progress(total=3000, unit="images", label="encode") as bar:
        bar.advance(1)
    assert re.fullmatch(r"encode: 1 of 3,000 images \(0%\) after 0\.\d s\n", capsys.readouterr().err)


def test_a_slow_first_step_forecasts_nothing(capsys, monkeypatch):
    """A first step that compiled for four minutes would promise 5,000 steps for two weeks."""
    with console.progress(total=5000, unit="steps", label="train", first_is_slow=True) as bar:
        bar.bar.start_t -= 240
        bar.advance()
        assert re.fullmatch(r"train: 1 of 5,000 steps \(0%\) after 4 min 00 s\n", capsys.readouterr().err)
        bar.advance(999)
        monkeypatch.setattr(bar, "last_time", time.monotonic() - 61)
        bar.advance(1000)
        assert re.search(r"train: 2,000 of 5,000 steps .*, about .* to go\n", capsys.readouterr().err)


def test_no_line_of_a_log_comes_twice(capsys, monkeypatch):
    with console.progress(total=2, unit="images", label="encode") as bar:
        monkeypatch.setattr(bar, "last_time", time.monotonic() - 61)
        bar.advance(2)
    assert capsys.readouterr().err.count("\n") == 1


def test_nothing_is_shown_of_work_that_never_began(capsys):
    with pytest.raises(UserError), console.progress(total=3, unit="images", label="encode"):
        raise UserError("no")
    assert capsys.readouterr().err == ""


WORK = """
import time
from gait_latents.common import console
with console.progress(total=300, unit="steps", label="train") as bar:
    for _ in range(300):
        bar.advance()
        time.sleep(0.003)
"""


def test_a_pipe_gets_one_line_of_short_work():
    done = subprocess.run([sys.executable, "-c", WORK], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert re.fullmatch(r"train: 300 of 300 steps \(100%\) after \d\.\d s\n", done.stderr) and done.stdout == ""


def test_the_first_image_of_long_work_gets_a_line_of_its_own(monkeypatch, capsys):
    monkeypatch.setattr(console, "_SLOW_SECONDS", 0.0)
    monkeypatch.setattr(console, "LOG_SECONDS", 0.5)
    with console.progress(total=1000, unit="images", label="encode") as bar:
        time.sleep(0.002)
        for _ in range(3):
            bar.advance()
        lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("encode: 1 of 1,000 images (0%) after 0.0 s, about ")


@pytest.mark.parametrize("seconds", [0.0, 100.0])
def test_work_that_is_mostly_quick_is_told_only_where_it_is_slow(monkeypatch, capsys, seconds):
    monkeypatch.setattr(console, "_SLOW_SECONDS", 0.0 if seconds else 1.0)
    monkeypatch.setattr(console, "LOG_SECONDS", 0.0 if seconds else 60.0)
    with console.progress(total=3, unit="files", label="read image files", only_if_slow=True) as bar:
        assert [bar.counted(item) for item in "abc"] == ["a", "b", "c"]
    assert ("read image files: 3 of 3 files" in capsys.readouterr().err) == bool(seconds)


def test_a_signal_is_told_at_once_even_in_the_midst_of_a_print(capfd):
    with StopSignals(after="this image") as signals:
        sys.stderr = stream = io.TextIOWrapper(io.BytesIO())
        try:
            stream.write = lambda text: (_ for _ in ()).throw(RuntimeError("reentrant call"))
            os.kill(os.getpid(), signal.SIGINT)
        finally:
            sys.stderr = sys.__stderr__
        assert signals.received == signal.SIGINT
    assert capfd.readouterr().err == "Ctrl-C: stopping after this image; a second Ctrl-C ends at once\n"


@pytest.mark.slow
@pytest.mark.parametrize("in_cell", [False, True])
def test_a_terminal_gets_a_bar_but_not_that_of_a_notebook_cell(in_cell):
    environment = {name: value for name, value in os.environ.items() if name != "JPY_PARENT_PID"}
    environment |= {"JPY_PARENT_PID": "1"} if in_cell else {}
    ours, theirs = os.openpty()
    termios.tcsetwinsize(theirs, (24, 100))
    with subprocess.Popen([sys.executable, "-c", WORK], cwd=ROOT, env=environment, stderr=theirs):
        os.close(theirs)
        text = read_terminal(ours)
    assert "300" in text
    assert text.count("\r") - text.count("\r\n") > 3 if not in_cell else text.count("\r") == 1


def read_terminal(descriptor: int) -> str:
    """Reads what comes through a pseudo-terminal until its other end is closed."""
    parts = []
    with contextlib.suppress(OSError), open(descriptor, "rb", buffering=0) as file:  # Linux ends it by an error
        while part := file.read(4096):
            parts.append(part)
    return b"".join(parts).decode()


def test_lines_and_warnings_go_to_their_own_streams(capsys):
    console.say("done")
    console.say()
    console.warn("look")
    captured = capsys.readouterr()
    assert captured.out == "done\n\n" and captured.err == "warning: look\n"


def test_what_the_output_cannot_show_is_escaped(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    console.say("步态 \udcff")
    assert raw.getvalue() == b"\\u6b65\\u6001 \\udcff\n"


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.04, "0.0 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (200, "3 min 20 s"),
        (3599.6, "1 h 00 min"),
        (4 * 3600 + 300, "4 h 05 min"),
        (100 * 3600, "100 h 00 min"),
    ],
)
def test_times_in_words(seconds, words):
    assert console.duration(seconds) == words


@pytest.mark.parametrize(
    ("count", "words"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (999_960, "1.0 MB"),
        (25_400_000, "25.4 MB"),
        (1_240_000_000, "1.2 GB"),
        (5_000_000_000_000, "5000.0 GB"),
    ],
)
def test_sizes_in_words(count, words):
    assert console.size(count) == words


# --- the device --------------------------------------------------------------------------------------------

CPU = torch.device("cpu")


def test_the_number_format_and_its_reason(monkeypatch):
    assert hardware.pick_precision("auto", CPU) == (torch.float32, "the default without a GPU")
    assert hardware.pick_precision("bfloat16", CPU) == (torch.bfloat16, "as asked")
    gpu = torch.device("cuda")
    for capability, dtype in (
        ((6, 0), torch.float32),
        ((7, 0), torch.float16),
        ((7, 5), torch.float16),
        ((8, 0), torch.bfloat16),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        picked, reason = hardware.pick_precision("auto", gpu)
        assert picked == dtype and f"capability {capability[0]}.{capability[1]}" in reason
    assert hardware.pick_precision("float32", gpu)[0] == torch.float32


def test_a_gpu_without_kernels_is_told_in_one_sentence(monkeypatch):
    def no_kernels(*args, **kwargs):
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla P100-PCIE-16GB")
    monkeypatch.setattr(torch, "ones", no_kernels)
    for name in ("auto", "cuda", "cuda:0"):
        with pytest.raises(UserError, match=r"cannot compute on this GPU \(Tesla P100-PCIE-16GB\); on Kaggle switch"):
            hardware.pick_device(name)
    with pytest.raises(UserError, match="--device cuda:1 does not exist; this machine has 1 GPU"):
        hardware.pick_device("cuda:1")
    assert hardware.pick_device("cpu") == CPU


@pytest.mark.parametrize(
    "error", [RuntimeError("CUDA error: out of memory"), torch.OutOfMemoryError("CUDA out of memory. Tried to")]
)
def test_a_gpu_that_is_full_is_not_taken_for_one_without_kernels(monkeypatch, error):
    def full(*args, **kwargs):
        raise error

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    monkeypatch.setattr(torch, "ones", full)
    with pytest.raises(UserError, match=r"the GPU \(Tesla T4\) has no memory left: end what else uses it"):
        hardware.pick_device("cuda")


def test_memory_is_told_in_bytes():
    assert 2**26 < hardware.free_memory_bytes(CPU) < 2**45
    assert re.fullmatch(r"\d+\.\d\d GB host", hardware.peak_memory(CPU))
    assert hardware.describe(CPU) == "CPU (1 threads)"
