"""Odd surroundings: closed streams, pipes that nobody reads, users without name or home, locales without letters."""

import getpass
import io
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import tiny

from gait_latents import load_vae
from gait_latents.common import cli, console
from gait_latents.common.errors import UserError
from gait_latents.settings import TrainSettings

ROOT = Path(__file__).resolve().parents[2]
UNNAMED = ["unshare", "--user", "--map-user=12345", "--map-group=12345"]  # this user, under a number without a name
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}


def can_be_unnamed() -> bool:
    """Says whether this machine lets a process have another number for its user."""
    found = shutil.which(UNNAMED[0])
    return found is not None and subprocess.run([*UNNAMED, "true"], capture_output=True).returncode == 0


unnamed = pytest.mark.skipif(not can_be_unnamed(), reason="no user namespaces here")


def start(
    words: Sequence[object], folder: Path, *, without: Sequence[str] = (), redirect: str = "", **variables: str
) -> subprocess.CompletedProcess[str]:
    """Runs a command in a folder; `redirect` is what a shell gets behind it, such as >&-."""
    kept = {name: value for name, value in os.environ.items() if name not in without}
    return subprocess.run(
        ["sh", "-c", f'exec "$@" {redirect}', "sh", *map(str, words)],
        cwd=folder,
        env=kept | {"PYTHONPATH": str(ROOT)} | variables,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=300,
    )


def script(folder: Path, *lines: str) -> list[str]:
    """Writes a small script that runs these lines as its work; returns the command."""
    head = [
        "import getpass, os, sys",
        "from pathlib import Path",
        "from gait_latents.common.console import print_error, progress, say, warn",
        "from gait_latents.common.script import run_script",
        "from gait_latents.settings import TrainSettings",
        "def work(argv):",
        *(f"    {line}" for line in lines),
        "    return 0",
        "sys.exit(run_script(TrainSettings, None, 'Works.', work))",
    ]
    (folder / "small.py").write_text("\n".join(head), encoding="utf-8")
    return [sys.executable, "small.py"]


@pytest.mark.parametrize("name", ["preprocess_latents.py", "train_latent_cfg.py"])
def test_a_working_folder_that_was_removed_is_told(tmp_path, name):
    (tmp_path / "gone").mkdir()
    command = 'cd gone && rmdir ../gone && exec "$@"'
    done = start(["sh", "-c", command, "sh", sys.executable, ROOT / name], tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "error: the working folder is not there any more; change to one that is, such as cd ~\n"


# --- streams -----------------------------------------------------------------------------------------------

SPEAKING = (
    "say('said')",
    "warn('warned')",
    "print_error('told')",
    "print('printed', flush=True)",
    "with progress(total=2, unit='images', label='work') as bar: bar.advance(2)",
    "with open('made', 'w') as file: file.write(str(file.fileno()))",
    "os.write(1, b'of a library\\n'), os.write(2, b'of a library\\n')",
)


@pytest.mark.parametrize("redirect", [">&-", "2>&-", "<&-", ">&- 2>&-", ">&- 2>&- <&-"])
def test_closed_streams_are_no_reason_to_fail(tmp_path, redirect):
    done = start(script(tmp_path, *SPEAKING), tmp_path, redirect=redirect)
    assert done.returncode == 0, done.stderr
    assert ("said" in done.stdout) == (" >&-" not in f" {redirect}")
    assert ("warned" in done.stderr) == ("2>&-" not in redirect) and "Traceback" not in done.stderr
    assert int((tmp_path / "made").read_text()) > 2  # else it would hold what libraries print


@pytest.mark.parametrize("redirect", [">&-", "2>&-", ">&- 2>&-"])
def test_a_mistake_with_closed_streams_has_its_exit_code(tmp_path, redirect):
    done = start([sys.executable, ROOT / "generate.py", "--dimm", "8"], tmp_path, redirect=redirect)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == (
        "" if "2>&-" in redirect else "error: there is no setting --dimm; --help lists the settings\n"
    )


@pytest.mark.slow
@pytest.mark.parametrize("redirect", [">&-", "2>&-", ">&- 2>&- <&-"])
def test_images_are_generated_with_closed_streams(trained, tmp_path, redirect):
    words = tiny.flags({"checkpoint": trained / "results", "device": "cpu", "images_per_class": 1})
    command = [sys.executable, ROOT / "generate.py", *words, "--sampling_timesteps", "1"]
    assert start(command, tmp_path, redirect=redirect).returncode == 0
    assert len(list((tmp_path / "synthetic").glob("*/*.jpg"))) == 3


@pytest.mark.parametrize("closed", [False, True])
def test_a_program_whose_streams_are_none_or_closed_can_call_what_prints(monkeypatch, closed):
    """As under pythonw, which has none; the scripts open them, other callers need not."""
    for name in ("stdout", "stderr"):
        stream = io.StringIO()
        stream.close()
        monkeypatch.setattr(sys, name, stream if closed else None)
    console.say("said")
    console.warn("warned")
    console.print_error("told")
    with console.progress(total=1, unit="images", label="work") as bar:
        bar.advance()
    assert bar.bar.n == 1


@pytest.mark.parametrize("stream", ["stdout", "stderr", "both"])
@pytest.mark.parametrize(("words", "code"), [(["--help", "all"], 0), (["--dimm", "8"], 2), ([], 0)])
def test_a_pipe_that_nobody_reads_is_no_reason_to_fail(tmp_path, stream, words, code):
    """As in `generate.py | head -1`."""
    command = [*script(tmp_path, *(line for line in SPEAKING if "print(" not in line and "os." not in line)), *words]
    read, write = os.pipe()
    os.close(read)
    pipes = {name: write if stream in (name, "both") else subprocess.PIPE for name in ("stdout", "stderr")}
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, **pipes, timeout=60)  # type: ignore[call-overload]
    os.close(write)
    assert done.returncode == code
    assert b"Traceback" not in (done.stderr or b"") and b"Exception" not in (done.stderr or b"")


def test_what_a_stream_cannot_show_is_escaped(monkeypatch):
    streams = {name: io.TextIOWrapper(io.BytesIO(), encoding="ascii") for name in ("stdout", "stderr")}
    for name, stream in streams.items():
        monkeypatch.setattr(sys, name, stream)
    console.say("café")
    console.warn("ID_é\udcff")
    console.print_error("été")
    for stream in streams.values():
        stream.flush()
    assert streams["stdout"].buffer.getvalue() == rb"caf\xe9" + b"\n"  # type: ignore[attr-defined]
    told = rb"warning: ID_\xe9\udcff" + b"\n" + rb"\xe9t\xe9" + b"\n"
    assert streams["stderr"].buffer.getvalue() == told  # type: ignore[attr-defined]


# --- users and homes ---------------------------------------------------------------------------------------


def data_path(text: str) -> str:
    layers = cli.read_command_line(TrainSettings, ["--data_path", text], description=None)
    return cli.resolve(TrainSettings, layers).settings.data_path


def test_a_tilde_is_the_home_folder_with_and_without_its_variable(monkeypatch):
    import pwd

    monkeypatch.setenv("HOME", "/somewhere")
    assert data_path("~/images") == "/somewhere/images"
    monkeypatch.delenv("HOME")
    own = pwd.getpwuid(os.getuid())
    assert data_path("~/images") == f"{own.pw_dir.rstrip('/')}/images" == data_path(f"~{own.pw_name}/images")


def test_the_home_folder_of_a_user_who_is_not_there_is_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as raised:
        data_path("~no_such_user/images")
    assert str(raised.value) == (
        "data_path is ~no_such_user/images in --data_path, and the home folder of no_such_user is not known; write the "
        "whole path, or ./~no_such_user/images for a folder called ~no_such_user"
    )
    with pytest.raises(UserError, match=r"--config is ~no_such_user/x\.yaml in the command, and the home folder of"):
        cli.read_command_line(TrainSettings, ["--config", "~no_such_user/x.yaml"], description=None)
    assert data_path("./~no_such_user/images") == "./~no_such_user/images"


def test_a_vae_below_the_home_folder_of_nobody_is_told_in_python_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"the VAE ~no_such_user/vae\.pt does not exist in "):
        load_vae("~no_such_user/vae.pt", "cpu")


@unnamed
def test_a_user_without_a_name_and_a_home_gets_one_line_for_a_tilde(tmp_path):
    command = [*UNNAMED, *script(tmp_path), "--data_path", "~/images"]
    done = start(command, tmp_path, without=["HOME", "USER", "LOGNAME", "LNAME", "USERNAME"])
    assert done.returncode == 2
    assert done.stderr.startswith(
        "error: data_path is ~/images in --data_path, and the home folder of this user is not"
    )


@unnamed
def test_a_user_without_a_name_has_one_for_packages_that_ask(tmp_path):
    """torch.compile names its folder so, and some versions of it fail without."""
    command = [*UNNAMED, *script(tmp_path, "say(getpass.getuser())")]
    done = start(command, tmp_path, without=["HOME", "USER", "LOGNAME", "LNAME", "USERNAME"])
    assert (done.returncode, done.stdout, done.stderr) == (0, "user-12345\n", "")


def test_a_user_with_a_name_keeps_it(tmp_path):
    done = start(script(tmp_path, "say(getpass.getuser())"), tmp_path)
    assert done.stdout == f"{getpass.getuser()}\n"


DRAWING = ["-c", "from gait_latents.common import charts; print(len(charts.loss_curve([1, 2], [1.0, 0.5])) > 1000)"]


@unnamed
def test_charts_are_drawn_for_a_user_without_a_home(tmp_path):
    done = start([*UNNAMED, sys.executable, *DRAWING], tmp_path, without=["HOME", "TMPDIR"])
    assert (done.returncode, done.stdout, done.stderr) == (0, "True\n", "")


def test_charts_are_drawn_without_a_word_where_the_home_cannot_be_written_to(tmp_path):
    (tmp_path / "file").write_text("")
    variables = {"HOME": str(tmp_path / "file")}
    without = ["TMPDIR", "XDG_CONFIG_HOME", "XDG_CACHE_HOME", "MPLCONFIGDIR"]
    done = start([sys.executable, *DRAWING], tmp_path, without=without, **variables)
    assert (done.returncode, done.stdout, done.stderr) == (0, "True\n", "")


# --- locales -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("isolated", [False, True])
def test_names_are_read_alike_in_an_ascii_locale(tmp_path, isolated):
    (tmp_path / "data" / "café").mkdir(parents=True)
    lines = ["import os", "(name,) = os.listdir('data')", "say(ascii(name) + ' ' + ' '.join(sys.argv[1:]))"]
    python, name = script(tmp_path, *lines)
    words = [python, *(["-P"] if isolated else []), name, "--vae_path", "vaé.pt"]
    done = start(words, tmp_path, **ASCII)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == r"'caf\xe9' --vae_path va\xe9.pt" + "\n"


@pytest.mark.slow
def test_a_class_with_an_accent_is_the_same_in_an_ascii_locale(world, tmp_path):
    """In messages, names of files, splits, checkpoints and reports."""
    (world / "data" / "ID_2").rename(world / "data" / "café")
    machine = {"device": "cpu"}
    steps = {
        "preprocess_latents.py": tiny.preprocess_flags(world, image_size=16),
        "train_latent_cfg.py": tiny.train_flags(world, image_size=16, train_num_steps=2, dim_mults=[1]),
        "generate.py": tiny.flags({**machine, "classes": ["café"], "images_per_class": 3, "sampling_timesteps": 1}),
        "evaluate_images.py": tiny.flags({**machine, "classifier": "false"}),
    }
    for name, words in steps.items():
        done = start([sys.executable, ROOT / name, *words], world, **ASCII)
        assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert (world / "synthetic" / "café" / "café_000002.jpg").is_file()
    assert "café/café_000002.jpg,café,2\n" in (world / "synthetic" / "labels.csv").read_text(encoding="utf-8")
    assert "café" in (world / "evaluation" / "report.html").read_text(encoding="utf-8")
    assert "café" in (world / "results" / "split.json").read_text(encoding="utf-8")
    done = start([sys.executable, ROOT / "generate.py", *steps["generate.py"]], world, PYTHONUTF8="1")
    assert done.returncode == 0 and done.stdout.startswith(
        "from the flags: device cpu, sampling_timesteps 1, classes café"
    )
    assert "3 of the images are already there" in done.stdout
