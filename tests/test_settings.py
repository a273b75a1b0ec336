"""Settings: one home for each fact, the same parser for flags and files, and the order of precedence."""

import io
import json
import re
import shlex
import subprocess
import sys
from contextlib import redirect_stdout
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from gait_latents.common import cli
from gait_latents.common.cli import Layer
from gait_latents.common.console import harmless
from gait_latents.common.errors import UserError
from gait_latents.images.names import choose_names
from gait_latents.settings import (
    GROUPS,
    SCRIPTS,
    ExportSettings,
    GenerateSettings,
    PreprocessSettings,
    TrainSettings,
    differences_on_resume,
    with_later_settings,
)

ALL = list(SCRIPTS.values())


def read(cls: type, *argv: str) -> cli.Resolved:
    return cli.resolve(cls, cli.read_command_line(cls, argv, description="A script."))


@pytest.mark.parametrize("cls", ALL)
def test_every_default_is_a_value_that_could_be_typed(cls):
    num_checked = 0
    for name, default in cli.defaults(cls).items():
        assert cli.parse(name, cli.to_words(default), cli.specs(cls)[name], "a test") == default
        num_checked += 1
    assert num_checked == len(fields(cls)) >= 4


@pytest.mark.parametrize("cls", ALL)
def test_settings_survive_the_way_through_yaml(cls, tmp_path):
    changed = {name: value for name, value in {"seed": 7, "cond_scale": 3.0}.items() if name in cli.specs(cls)}
    assert changed
    settings = cli.resolve(cls, [Layer("a test", changed)]).settings
    path = tmp_path / "settings.yaml"
    path.write_text(cli.to_yaml(settings))
    assert cli.to_dict(read(cls, "--config", str(path)).settings) == cli.to_dict(settings)


def test_a_setting_shared_by_scripts_has_one_default():
    num_shared = 0
    for name in cli.defaults(PreprocessSettings).keys() & cli.defaults(TrainSettings).keys():
        assert cli.defaults(PreprocessSettings)[name] == cli.defaults(TrainSettings)[name]
        num_shared += 1
    assert num_shared >= 12


def test_scientific_notation_is_a_number_in_a_file_as_in_a_flag(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("train_lr: 1e-3\ndim_mults: [1, 2]\nmax_hours: null\n")
    settings = read(TrainSettings, "--config", str(path)).settings
    assert settings.train_lr == 1e-3 == read(TrainSettings, "--train_lr", "1e-3").settings.train_lr
    assert settings.dim_mults == (1, 2)
    assert settings.max_hours is None


@pytest.mark.parametrize(
    ("word", "value"), [("on", "true"), ("off", "false"), ("Yes", "true"), ("0", "false"), ("auto", "auto")]
)
def test_a_switch_with_a_third_position_takes_the_words_of_a_switch(word, value):
    assert read(TrainSettings, "--compile", word).settings.compile == value


def test_settings_of_earlier_versions_break_neither_files_nor_runs(tmp_path):
    path = tmp_path / "settings.yaml"  # as an earlier version left it in a run folder
    path.write_text("dry_run: false\nimport_folder: null\nimport_scale_factor: 0.18215\ndim: 16\n")
    for cls in (TrainSettings, PreprocessSettings):
        assert (
            read(cls, "--config", str(path)).settings == read(cls, *["--dim", "16"] * (cls is TrainSettings)).settings
        )
    stored = {"dry_run": False, "import_folder": "/old", "import_split": ["no", {"value": 1}], "dim": 16}
    layer = cli.stored_layer(TrainSettings, "run x", stored)
    assert layer.values == {"dim": 16}
    assert not differences_on_resume(stored, cli.resolve(TrainSettings, [layer]).settings)
    path.write_text("dry_run: true\n")
    with pytest.raises(UserError, match="there is no setting dry_run any more; the disk is told at the start, and"):
        read(TrainSettings, "--config", str(path))


def test_flag_wins_over_file_over_run_over_manifest_over_default(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = Path("run.yaml")  # short: the folder of a test may be so long that a line with it is broken
    path.write_text("dim: 16\ntimesteps: 20\n")
    layers = cli.read_command_line(TrainSettings, ["--config", str(path), "--dim", "8"], description="")
    layers.append(cli.stored_layer(TrainSettings, "run x", {"dim": 32, "timesteps": 30, "seed": 3}))
    layers.append(cli.stored_layer(TrainSettings, "manifest", {"seed": 4, "num_users": 5}, only_about_cache=True))
    resolved = cli.resolve(TrainSettings, layers)
    got = resolved.settings
    assert (got.dim, got.timesteps, got.seed, got.num_users, got.image_size) == (8, 20, 3, 5, 256)
    assert resolved.sources["dim"] == "flag"
    assert resolved.sources["timesteps"] == f"--config {path}"
    assert resolved.sources["seed"] == "run x"
    assert resolved.sources["num_users"] == "manifest"
    assert resolved.sources["image_size"] == "default"
    places = {"run x": "seed 3", "manifest": "num_users 5", "the flags": "dim 8", f"--config {path}": "timesteps 20"}
    lines = [f"from {place}: {values}" for place, values in places.items()]
    assert resolved.changes() == lines


def test_the_manifest_speaks_only_of_the_cache():
    layer = cli.stored_layer(TrainSettings, "manifest", {"dim": 3, "num_users": 5}, only_about_cache=True)
    assert layer.values == {"num_users": 5}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--train_lrr", "1"], "there is no setting --train_lrr; did you mean --train_lr?"),
        (["--train-lrr", "1"], "there is no setting --train_lrr; did you mean --train_lr?"),
        (["--dim", "many"], "dim is 'many' in --dim; it takes a whole number"),
        (["--dim", "1.5"], "dim is '1.5' in --dim; it takes a whole number"),
        (["--dim", "2"], "dim is 2 in --dim; the smallest allowed is 4"),
        (["--cond_drop_prob", "1.5"], "cond_drop_prob is 1.5 in --cond_drop_prob; the largest allowed is 1"),
        (["--train_lr", "nan"], "train_lr is 'nan' in --train_lr; it takes a number"),
        (["--objective", "pred_y"], "objective is 'pred_y' in --objective; it is one of pred_v, pred_noise, pred_x0"),
        (
            ["--dim_mults", "1;2"],
            "dim_mults is '1;2' in --dim_mults; it takes a whole number, or several as separate words",
        ),
        (["--seed", str(2**63)], f"seed is {2**63} in --seed; the largest allowed is 9.22337e+18"),
        (["--num_users", "none"], "num_users is 'none' in --num_users; it takes a whole number or all"),
        (["--deterministic", "maybe"], "deterministic is 'maybe' in --deterministic; it takes true or false"),
        (["--dim_mults"], "dim_mults in --dim_mults needs at least one value"),
        (["--vae_path", ""], "vae_path is '' in --vae_path; it takes a text"),
        (["--dim"], "argument --dim: expected one argument; --help lists the settings"),
        (["--output_folder", "x"], "there is no setting --output_folder; did you mean --latents_cache_folder?"),
        (
            ["--checkpoint", "x"],
            "there is no setting --checkpoint; it is one of generate.py and evaluate_images.py and "
            "python -m gait_latents.export",
        ),
        (["--lr", "1"], "there is no setting --lr; did you mean --train_lr?"),
        (["--num_steps", "1"], "there is no setting --num_steps; did you mean --train_num_steps?"),
        (["--guidance_scale", "1"], "there is no setting --guidance_scale; did you mean --cond_scale?"),
        (["--r", "1"], "there is no setting --r; --help lists the settings"),
        (["stray"], "there is no setting stray; --help lists the settings"),
    ],
)
def test_a_wrong_flag_is_told_in_one_line(argv, message):
    with pytest.raises(UserError) as error:
        read(TrainSettings, *argv)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train_lrr: 1\n", "there is no setting train_lrr; did you mean train_lr?, in {path}"),
        ("dim: x\n", "dim is 'x' in {path}; it takes a whole number"),
        ("dim: [1, 2]\n", "dim takes one value, not 2 (1 2), in {path}"),
        ("dim: {a: 1}\n", "dim in {path} (line 1) must be a value or a list of values"),
        ("dim: 8\ndim: 9\n", "dim stands 2 times in {path}"),
        ("- dim\n", "--config {path} must hold lines of the form 'name: value'"),
        ("? [dim]\n: 8\n", "--config {path} must hold lines of the form 'name: value'"),
        ("[" * 2000, "--config {path} is not valid YAML"),
        ("dim: [8\n", "--config {path} is not valid YAML"),
        ("images_per_class: {a: {b: 1}}\n", "images_per_class in {path} (line 1) must be a value, a list of values or"),
        ("images_per_class: zero\n", "images_per_class is 'zero' in {path}; it takes a whole number"),
    ],
)
def test_a_wrong_file_is_told_in_one_line(text, message, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        read(TrainSettings, "--config", str(path))
    assert str(error.value).startswith(message.format(path=path))
    assert "\n" not in str(error.value)


def test_one_file_serves_all_scripts():
    path = "configs/demo.yaml"
    assert read(PreprocessSettings, "--config", path).settings.image_size == 128
    assert read(TrainSettings, "--config", path).settings.dim == 32
    assert read(GenerateSettings, "--config", path).settings.images_per_class > 0


def test_only_settings_that_define_the_run_are_fixed_on_resume():
    stored = cli.to_dict(read(TrainSettings).settings)
    free = read(TrainSettings, "--train_num_steps", "7", "--max_hours", "1", "--num_samples", "9", "--cond_scale", "3")
    assert differences_on_resume(stored, free.settings) == []
    fixed = read(TrainSettings, "--dim", "64", "--train_lr", "1")
    assert differences_on_resume(stored, fixed.settings) == [("dim", 48, 64), ("train_lr", 4e-4, 1.0)]


def test_a_run_that_is_older_than_resize_counts_as_cropped_and_is_told_of_another_value():
    older = {name: value for name, value in cli.to_dict(TrainSettings()).items() if name != "resize"}
    stored = with_later_settings(older)
    assert differences_on_resume(stored, read(TrainSettings).settings) == []
    squashed = read(TrainSettings, "--resize", "squash").settings
    assert differences_on_resume(stored, squashed) == [("resize", "crop", "squash")]


def test_the_batch_is_fixed_as_a_whole():
    stored = cli.to_dict(read(TrainSettings).settings)
    same = read(TrainSettings, "--train_batch_size", "16", "--gradient_accumulate_every", "1").settings
    assert differences_on_resume(stored, same) == []
    other = read(TrainSettings, "--train_batch_size", "16").settings
    assert differences_on_resume(stored, other) == [("train_batch_size", 8, 16)]


def test_stored_paths_are_absolute_and_hub_ids_stay(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.absolute_path("./latents_cache") == str(tmp_path / "latents_cache")
    assert cli.absolute_path("stabilityai/sd-vae-ft-mse") == "stabilityai/sd-vae-ft-mse"
    (tmp_path / "vae.pt").touch()
    assert cli.absolute_path("vae.pt") == str(tmp_path / "vae.pt")


def test_a_home_folder_is_understood_in_a_file_too(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/somewhere")
    path = tmp_path / "run.yaml"
    path.write_text("data_path: ~/images\n")
    assert read(TrainSettings, "--config", str(path)).settings.data_path == "/somewhere/images"


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_does_not_import_torch(script):
    name = script.removeprefix("python -m ").removesuffix(".py")
    source = (
        f"import sys; sys.argv = ['{script}', '--help']\n"
        "import runpy\n"
        f"try: runpy.run_module('{name}', run_name='__main__')\n"
        "except SystemExit as end: assert end.code in (None, 0), end.code\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    everyday = getattr(SCRIPTS[script], "EVERYDAY", cli.specs(SCRIPTS[script]))
    for name in everyday:
        assert f"--{name} " in done.stdout
    assert "(default: " in done.stdout


def help_of(cls: type, *words: str) -> str:
    """Returns what --help prints."""
    with redirect_stdout(io.StringIO()) as printed, pytest.raises(SystemExit) as end:
        cli.read_command_line(cls, words, description="A script.")
    assert end.value.code == 0
    return printed.getvalue()


def settings_in(text: str) -> list[str]:
    """Lists the settings that a help text has an entry for."""
    return re.findall(r"^  --(\w+) ", text.replace("  --config ", ""), flags=re.MULTILINE)


@pytest.mark.parametrize("cls", ALL)
def test_help_shows_what_people_change_and_help_all_every_setting(cls):
    short, whole = help_of(cls, "--help"), help_of(cls, "--help", "all")
    assert 4 <= len(settings_in(short)) <= 15
    assert set(settings_in(short)) <= set(settings_in(whole))
    assert sorted(settings_in(whole)) == sorted(cli.specs(cls))
    assert "--help all lists the other settings." not in whole
    is_part = len(settings_in(short)) < len(cli.specs(cls))
    assert ("--help all lists the other settings." in short) == is_part
    assert help_of(cls, "-h") == short
    for words in (["-h", "all"], ["--help=all"], ["-hall"], ["--seed", "1", "--help", "all"]):
        assert help_of(cls, *words) == whole


def test_a_value_that_is_all_does_not_make_the_help_longer():
    assert help_of(TrainSettings, "--num_users", "all", "--help") == help_of(TrainSettings, "--help")


def test_help_goes_before_a_mistake_in_the_other_flags():
    assert help_of(TrainSettings, "--dimm", "8", "--help") == help_of(TrainSettings, "--help")


def test_the_name_of_a_flag_may_have_hyphens_but_its_value_is_left_as_it_is():
    hyphens = read(PreprocessSettings, "--data-path", "my-images", "--vae-path=--my-vae.pt", "--image-size", "64")
    plain = read(PreprocessSettings, "--data_path", "my-images", "--vae_path=--my-vae.pt", "--image_size", "64")
    assert hyphens.settings == plain.settings and hyphens.sources == plain.sources
    assert (plain.settings.data_path, plain.settings.vae_path) == ("my-images", "--my-vae.pt")


@pytest.mark.parametrize(
    ("cls", "name", "words", "value"),
    [
        (TrainSettings, "dim_mults", ["1,2,4"], (1, 2, 4)),
        (TrainSettings, "dim_mults", ["1,2", "4"], (1, 2, 4)),
        (TrainSettings, "guidance_interval", ["0.25,0.75"], (0.25, 0.75)),
        (PreprocessSettings, "splits", ["train,test"], ("train", "test")),
    ],
)
def test_a_list_is_separated_by_spaces_or_commas(cls, name, words, value, tmp_path):
    assert getattr(read(cls, f"--{name}", *words).settings, name) == value
    separate = [word for text in words for word in text.split(",")]
    assert getattr(read(cls, f"--{name}", *separate).settings, name) == value
    path = tmp_path / "run.yaml"
    path.write_text(f"{name}: {','.join(words)}\n")
    assert getattr(read(cls, "--config", str(path)).settings, name) == value


@pytest.mark.parametrize(
    ("words", "value", "counts"),
    [
        (["50"], 50, ({}, 50)),
        (["1,000"], 1000, ({}, 1000)),
        (["ID_3=100", "ID_4=20", "50"], ("ID_3=100", "ID_4=20", 50), ({"ID_3": 100, "ID_4": 20}, 50)),
        (["50", "ID_3=100"], (50, "ID_3=100"), ({"ID_3": 100}, 50)),
        (["ID_3=100"], ("ID_3=100",), ({"ID_3": 100}, None)),
        (["a=1,b=2", "3"], ("a=1", "b=2", 3), ({"a": 1, "b": 2}, 3)),
        (["a=1,000"], ("a=1000",), ({"a": 1000}, None)),
        (["Doe, Jane=5"], ("Doe, Jane=5",), ({"Doe, Jane": 5}, None)),
        (["x=y=5"], ("x=y=5",), ({"x=y": 5}, None)),
    ],
)
def test_a_number_may_differ_by_name(words, value, counts, tmp_path):
    settings = read(GenerateSettings, "--images_per_class", *words).settings
    assert settings.images_per_class == value and cli.counts_by_name(value) == counts
    assert cli.parse("n", cli.to_words(value), cli.specs(GenerateSettings)["images_per_class"], "a test") == value
    path = tmp_path / "settings.yaml"
    path.write_text(cli.to_yaml(settings))
    assert read(GenerateSettings, "--config", str(path)).settings.images_per_class == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("50", 50),
        ("{ID_3: 100, 4: 20}", ("ID_3=100", "4=20")),
        ("\n  ID_3: 100\n  ID_4: 20", ("ID_3=100", "ID_4=20")),
        ("[ID_3: 100, ID_4: 20, 50]", ("ID_3=100", "ID_4=20", 50)),
        ("[ID_3=100, ID_4=20, 50]", ("ID_3=100", "ID_4=20", 50)),
        ("\n- ID_3: 100\n- 50", ("ID_3=100", 50)),
    ],
)
def test_in_a_file_numbers_by_name_are_a_mapping_or_a_list(text, value, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(f"images_per_class: {text}\n")
    assert read(GenerateSettings, "--config", str(path)).settings.images_per_class == value
    assert read(TrainSettings, "--config", str(path)).settings == read(TrainSettings).settings


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["ID_3"], "is 'ID_3' in --images_per_class; it takes a whole number, or words of the form NAME=NUMBER"),
        (["ID_3=x"], "of ID_3 is 'x' in --images_per_class; it takes a whole number, or words"),
        (["ID_3="], "of ID_3 is '' in --images_per_class; it takes a whole number, or words"),
        (["ID_3=0"], "of ID_3 is 0 in --images_per_class; the smallest allowed is 1"),
        (["=3"], "is '=3' in --images_per_class; a name stands before the ="),
        (["a=1", "2", "a=3"], "in --images_per_class names a 2 times"),
        (["1", "a=2", "3"], "is 1 a=2 3 in --images_per_class; one number alone is for all other names"),
        ([], "in --images_per_class needs at least one value"),
    ],
)
def test_a_wrong_number_by_name_is_told_in_one_line(words, message):
    with pytest.raises(UserError) as error:
        read(GenerateSettings, "--images_per_class", *words)
    assert str(error.value).startswith(f"images_per_class {message}")


def test_a_comma_in_a_name_separates_nothing():
    assert read(GenerateSettings, "--classes", "Doe, Jane", "b,c").settings.classes == ("Doe, Jane", "b,c")


def test_a_comma_between_thousands_separates_nothing_either():
    assert read(TrainSettings, "--train_num_steps", "20,000").settings.train_num_steps == 20_000


def test_a_mistake_in_a_flag_ends_with_one_line_and_exit_code_2():
    done = subprocess.run(
        [sys.executable, "train_latent_cfg.py", "--dimm", "3"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr == "error: there is no setting --dimm; did you mean --dim?\n"


def test_configs_hold_only_known_settings():
    files = sorted(Path("configs").glob("*.yaml"))
    for file in files:
        cli.read_file(TrainSettings, str(file))
    assert files


@pytest.mark.parametrize("cls", ALL)
def test_help_shows_each_setting_once_under_its_topic_with_unit_and_default(cls):
    text = cli._help_parser(cls, "A script.\n\n    python script.py --flag\n").format_help()
    lines = text.splitlines()
    assert "    python script.py --flag" in lines
    pieces = re.split(r"^(\S.*):\n", text, flags=re.MULTILINE)
    words = {topic: " ".join(part.split()) for topic, part in zip(pieces[1::2], pieces[2::2], strict=True)}
    expected = {spec.group for spec in cli.specs(cls).values()}
    assert list(words) == ["options", *(group for group in GROUPS if group in expected)]
    for name, spec in cli.specs(cls).items():
        _, *entries = re.split(rf"^  --{name} ", text, flags=re.MULTILINE)
        assert len(entries) == 1
        own = " ".join(re.split(r"^  (?:--|\*)|\n\n", entries[0], flags=re.MULTILINE)[0].split())
        assert own in words[spec.group]
        assert cli.metavar(spec) in own and spec.unit.upper() in own
        mark = " *" if spec.free and cli.can_resume(cls) else ""
        assert f"(default: {cli.show(cli.defaults(cls)[name])}){mark}" in own
        assert mark or ") *" not in own


@pytest.mark.parametrize("cls", [TrainSettings, GenerateSettings, ExportSettings])
@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["0.8", "0.2"], "is 0.8 0.2 in --guidance_interval; it takes two numbers, the smaller one first"),
        (["0.5"], "it takes two numbers"),
        (["0", "0.5", "1"], "it takes two numbers"),
        ([], "needs at least one value"),
        (["-0.1", "1"], "the smallest allowed is 0"),
        (["0", "1.01"], "the largest allowed is 1"),
        (["0", "nan"], "it takes a number"),
        (["all"], "it takes a number"),
    ],
)
def test_what_is_no_interval_is_told_in_one_line(cls, words, told):
    with pytest.raises(UserError) as caught:
        read(cls, "--guidance_interval", *words)
    assert told in str(caught.value) and "\n" not in str(caught.value)


def test_an_interval_is_read_from_flags_and_files_alike(tmp_path):
    (tmp_path / "run.yaml").write_text("guidance_interval: [0.25, 0.75]\n")
    from_file = read(TrainSettings, "--config", str(tmp_path / "run.yaml")).settings
    assert from_file == read(TrainSettings, "--guidance_interval", "0.25", "0.75").settings
    assert read(TrainSettings, "--guidance_interval", "1", "1").settings.guidance_interval == (1, 1)


def test_every_group_has_its_place():
    assert {spec.group for cls in ALL for spec in cli.specs(cls).values()} == set(GROUPS)


def test_words_with_blanks_among_others_are_shown_as_they_are_typed():
    assert cli.show(("a b", "c", "[d]", "it's")) == """'a b' c [d] 'it'"'"'s'"""
    assert cli.show("a b") == "a b" and cli.show((1, 2)) == "1 2" and cli.show(()) == "(nothing)"


@pytest.mark.parametrize("stored", [None, 5, True, ["vae.pt"], {"a": 1}, "a\0b", "~nobodyknown/vae.pt", "x" * 5000])
def test_what_is_no_path_is_the_same_as_no_path(tmp_path, stored):
    assert not cli.same_path(str(tmp_path), stored)
    assert cli.same_path(stored, stored)


# --- names that look like flags ----------------------------------------------------------------------------


def typed_values(cls: type, *argv: str) -> dict[str, Any]:
    return cli.read_command_line(cls, argv, description="A script.")[0].values


DASHED = ["-rf", "-", "--", "-1", "--help", "-h", "--classes", "-x y", "--x y", "-=3", "-help", "-s", "-classes=1"]


@pytest.mark.parametrize("name", DASHED)
def test_a_class_of_any_name_can_be_given_and_is_proposed_in_a_form_that_works(name, tmp_path):
    assert typed_values(GenerateSettings, f"--classes={name}", "ID_1")["classes"] == (name, "ID_1")
    for words in ([name], ["ID_1", name], [name, "a b"]):
        command = shlex.split(cli.typed("classes", words))
        assert sorted(typed_values(GenerateSettings, *command, "--seed", "3")["classes"]) == sorted(words)
    counted = typed_values(GenerateSettings, f"--images_per_class={name}=5", "--seed", "3")["images_per_class"]
    assert counted == (f"{name}=5",)
    path = tmp_path / "settings.yaml"
    for text in (json.dumps({"classes": [name, "ID_1"]}), yaml.safe_dump({"classes": [name, "ID_1"]})):
        path.write_text(text)
        assert cli.read_file(GenerateSettings, str(path)).values["classes"] == (name, "ID_1")


def test_two_names_that_look_like_flags_are_proposed_together():
    given = typed_values(GenerateSettings, *shlex.split(cli.typed("classes", ["ID_1", "--help", "--x[1]"])))
    assert given == {"classes": ("--help", "[-]-x[[]1]", "ID_1")}
    assert choose_names(given["classes"], ["--help", "--x[1]", "ID_1"], setting="classes", where="it") == [
        "--help",
        "--x[1]",
        "ID_1",
    ]


@pytest.mark.parametrize("word", ["-rf", "-", "-1", "-x y", "-é", "-rf=5"])
def test_a_name_that_begins_like_no_flag_needs_no_equals_sign(word):
    assert typed_values(GenerateSettings, "--classes", word, "ID_1", "--seed", "3")["classes"] == (word, "ID_1")
    assert typed_values(GenerateSettings, "--classes", "ID_1", word)["classes"] == ("ID_1", word)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--classes", "a", "--sed", "3"], "there is no setting --sed; did you mean --seed?; a name is given as "),
        (["--classes", "a", "-seed", "3"], "there is no setting -seed; did you mean --seed?; a name is given as "),
        (["--classes", "a", "--rm", "b"], "there is no setting --rm; --help lists the settings; a name is given as "),
        (
            ["--classes", "--", "b"],
            "there is no setting --; --help lists the settings; a name is given as --classes=--",
        ),
        (["--seed", "3", "-rf"], "there is no setting -rf; --help lists the settings"),
        (["--output_folder", "-rf"], "argument --output_folder: expected one argument; --help lists the settings"),
        (["--seed", "3", "4"], "there is no setting 4; --help lists the settings"),
        (["--seed=3", "4"], "there is no setting 4; --help lists the settings"),
        (["--classes"], "classes in --classes needs at least one value"),
        (["--seed", "-1"], "seed is -1 in --seed; the smallest allowed is 0"),
    ],
)
def test_a_mistyped_flag_is_not_taken_for_a_name(words, message):
    with pytest.raises(UserError) as error:
        read(GenerateSettings, *words)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_flags_are_read_as_they_always_were():
    given = typed_values(
        PreprocessSettings, "--verify", "--data-path=x=y", "--splits", "train,test", "--seed", "1", "--seed=2"
    )
    assert given == {"verify": True, "data_path": "x=y", "splits": ("train", "test"), "seed": 2}
    assert typed_values(PreprocessSettings, "--verify", "false") == {"verify": False}
    assert typed_values(PreprocessSettings, "--output_folder=-rf") == {"output_folder": "-rf"}


@pytest.mark.parametrize(
    "words", [["-h"], ["-help"], ["--help"], ["--class_names", "--help"], ["--help=all"], ["-h", "all"]]
)
def test_help_goes_before_all_else(words, capsys):
    with pytest.raises(SystemExit) as end:
        read(TrainSettings, *words)
    assert end.value.code == 0
    assert ("--help all lists" in capsys.readouterr().out) is ("all" not in " ".join(words))


@pytest.mark.parametrize(
    "name", ["\u202eabc", "\x1b[31m", "two\nlines", "a\udcff", "x\u2028y", "\ufeff", "\U000e0041", "x\x85y"]
)
def test_settings_of_a_run_are_written_without_a_control_character_and_read_back(name, tmp_path):
    text = cli.to_yaml(TrainSettings(class_names=(name, "café")))
    assert harmless(text) == text
    (tmp_path / "settings.yaml").write_text(text)
    assert cli.read_file(TrainSettings, str(tmp_path / "settings.yaml")).values["class_names"] == (name, "café")


def test_settings_of_readable_names_are_written_as_they_were():
    assert "class_names: [café, 行走者]" in cli.to_yaml(TrainSettings(class_names=("café", "行走者")))
