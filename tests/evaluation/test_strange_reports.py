"""An evaluation folder of somebody else: no file of the user gets into the page, and nonsense is computed again."""

import contextlib
import hashlib
import io
import json
import os
import shlex
import shutil
import warnings
from pathlib import Path
from typing import Any

import hostile_values
import pipeline
import pytest
import tiny
from bounds import in_child
from hostile_values import VALUES, Place, places, replaced, without
from pipeline import CLASSES

import evaluate_images
from gait_latents.evaluation import forms, page, report, sweep, terminal

REAL = {"training": "a", "test": "b"}  # what figures depend on
SECRET = b"a secret of the user"


@pytest.fixture(scope="module")
def synthetic(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images that the finished run made."""
    folder = tmp_path_factory.mktemp("generated") / "synthetic"
    assert pipeline.generate(trained, output_folder=folder, images_per_class=4) == 0
    return folder


@pytest.fixture(scope="module")
def first(trained: Path, synthetic: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An evaluation of them; to be copied and not to be changed."""
    folder = tmp_path_factory.mktemp("evaluated") / "evaluation"
    assert evaluate(trained, synthetic, folder) == 0
    return folder


@pytest.fixture(scope="module")
def full(trained: Path, synthetic: Path, first: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with classifiers and a sweep."""
    folder = shutil.copytree(first, tmp_path_factory.mktemp("full") / "evaluation")
    assert evaluate(trained, synthetic, folder, **TRAINED) == 0
    assert evaluate(trained, synthetic, folder, **TRAINED, **SWEPT) == 0
    return folder


TRAINED = {"classifier": "true", "classifier_steps": 1, "classifier_seeds": 2, "classifier_image_size": 8}
SWEPT = {"sweep": [1.0, 2.0], "sweep_images": 3, "sweep_checkpoints": "newest"}


@pytest.fixture
def folder(first: Path, tmp_path: Path) -> Path:
    """A copy of the evaluation."""
    return shutil.copytree(first, tmp_path / "evaluation")


def evaluate(root: Path, synthetic: Path, folder: Path, **changes: Any) -> int:
    settings = {"checkpoint": root / "results", "synthetic_path": synthetic, "output_folder": folder}
    return evaluate_images.main(tiny.flags({**settings, "neighbours": 2, "device": "cpu", **changes}))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def stored(folder: Path) -> dict[str, Any]:
    return {name: value for name, value in json.loads((folder / "report.json").read_text()).items() if name != "sha256"}


def seal(folder: Path, data: dict[str, Any]) -> None:
    """Writes a report with the checksum that fits it."""
    (folder / "report.json").write_text(json.dumps({**data, "sha256": report._digest(data)}))


# --- the picture -------------------------------------------------------------------------------------------


def link(path: Path) -> None:
    secret = path.parent.parent / "secret"
    secret.write_bytes(SECRET)
    path.unlink()
    path.symlink_to(secret)


def replace(path: Path) -> None:
    path.write_bytes(SECRET)


def grow(path: Path) -> None:
    os.truncate(path, 3 * 10**9)  # sparse


def fill_with_a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("harm", [link, replace, grow, fill_with_a_pipe], ids=lambda harm: harm.__name__)
def test_a_picture_that_is_not_the_one_of_the_report_is_told_and_drawn_again(trained, synthetic, first, folder, harm):
    picture = folder / "closest_pairs.png"
    harm(picture)

    def run() -> tuple[int, str]:
        with contextlib.redirect_stderr(io.StringIO()) as said:
            return evaluate(trained, synthetic, folder), said.getvalue()

    (code, told), memory = in_child(run)
    assert code == 0 and memory < 400_000_000
    assert f"warning: {picture} is not the picture of this report (" in told
    assert not picture.is_symlink() and picture.read_bytes() == (first / "closest_pairs.png").read_bytes()
    assert b"YSBzZWNyZXQ" not in (folder / "report.html").read_bytes()  # the secret in base64
    if harm is link:
        assert (folder.parent / "secret").read_bytes() == SECRET


def test_without_the_training_images_such_a_picture_is_left_out_and_stays(trained, synthetic, folder, tmp_path, capsys):
    link(folder / "closest_pairs.png")
    assert evaluate(trained, synthetic, folder, data_path=tmp_path / "gone") == 0
    assert "and is left out, as the training images are not at hand" in capsys.readouterr().err
    assert b"data:image/png" not in (folder / "report.html").read_bytes() and (tmp_path / "secret").exists()


def test_a_report_of_an_older_version_gets_its_picture_again_and_keeps_its_figures(trained, synthetic, folder):
    data = stored(folder)
    digest = data["memorisation"].pop("picture_sha256")
    data["memorisation"]["mark"] = "computed once"
    seal(folder, data)
    assert evaluate(trained, synthetic, folder) == 0
    assert stored(folder)["memorisation"] == {**data["memorisation"], "picture_sha256": digest}


@pytest.mark.parametrize("name", ["report.json", "report.html", "closest_pairs.png"])
def test_a_link_with_the_name_of_a_file_is_replaced_and_what_it_names_stays(trained, synthetic, folder, tmp_path, name):
    (tmp_path / "target").write_bytes(SECRET)
    (folder / name).unlink()
    (folder / name).symlink_to(tmp_path / "target")
    assert evaluate(trained, synthetic, folder) == 0
    assert (tmp_path / "target").read_bytes() == SECRET and not (folder / name).is_symlink()


def test_a_cache_that_is_a_link_is_refused(trained, synthetic, folder, tmp_path, capsys):
    (folder / "latents_cache").rename(tmp_path / "outside")
    (folder / "latents_cache").symlink_to(tmp_path / "outside")
    before = contents(tmp_path / "outside")
    assert evaluate(trained, synthetic, folder) == 1
    assert f"{folder / 'latents_cache'}: it is a link, and may lead out of {folder}" in pipeline.one_error(capsys)
    assert contents(tmp_path / "outside") == before


def test_links_in_a_folder_of_images_that_the_user_names_are_followed(trained, synthetic, folder, tmp_path):
    linked = tmp_path / "linked"
    linked.mkdir()
    for name in CLASSES:
        (linked / name).symlink_to(synthetic / name)
    assert evaluate(trained, linked, folder) == 0
    assert stored(folder)["evaluated"]["images"]["synthetic"] == 12


# --- images that are not those that were made --------------------------------------------------------------


def test_images_that_do_not_fit_their_digests_are_named_with_the_command_that_makes_them_again(
    trained, synthetic, tmp_path, capsys
):
    images = shutil.copytree(synthetic, tmp_path / "synthetic")
    shutil.copy(images / "ID_2" / "ID_2_000000.jpg", images / "ID_2" / "ID_2_000002.jpg")
    (images / "ID_10" / "ID_10_000003.jpg").write_bytes(b"")
    capsys.readouterr()
    assert evaluate(trained, images, tmp_path / "evaluation") == 1
    error = pipeline.one_error(capsys)
    assert "2 of the images in" in error and "ID_2/ID_2_000002.jpg, ID_10/ID_10_000003.jpg; to make them" in error
    words = shlex.split(error.rpartition("generate.py ")[2])
    assert words[words.index("--images_per_class") + 1 :][:2] == ["ID_2=3", "ID_10=4"]
    assert pipeline.generate_script.main([*words, "--device", "cpu"]) == 0
    (images / "overview.png").write_bytes((synthetic / "overview.png").read_bytes())  # it now shows these classes alone
    assert contents(images) == contents(synthetic)
    assert evaluate(trained, images, tmp_path / "evaluation") == 0


@pytest.mark.parametrize(
    "record", [b"", b"[]", b"{", b'{"images": 7}', b'{"images": {"ID_1": {"ID_1_000000.jpg": null}}}', b"[" * 10**5]
)
def test_a_record_of_nonsense_stops_no_evaluation(trained, synthetic, folder, tmp_path, record):
    images = shutil.copytree(synthetic, tmp_path / "synthetic")
    (images / "settings.json").write_bytes(record)
    assert evaluate(trained, images, folder) == 0


@pytest.mark.slow
def test_values_of_a_record_are_shown_or_left_out(trained, synthetic, folder, tmp_path):
    images = shutil.copytree(synthetic, tmp_path / "synthetic")
    known = json.loads((synthetic / "settings.json").read_text())
    for name in ("step", "weights", "guidance_interval", "sampler"):
        for value in VALUES:
            (images / "settings.json").write_text(json.dumps({**known, name: value}))
            with contextlib.redirect_stderr(io.StringIO()) as said:
                assert evaluate(trained, images, folder) == 0, (name, value)
            assert "Traceback" not in said.getvalue()


# --- what is stored ----------------------------------------------------------------------------------------


def changes(data: dict[str, Any], step: int) -> list[tuple[Place, Any]]:
    """Returns every `step`-th of all replacements, and of all removals; those of one list are alike after the first."""
    nodes = [place for place in places(data) if not any(type(part) is int and part > 1 for part in place)]
    every = [(place, value) for place in nodes for value in VALUES]
    return every[::step]


def use_all(folder: Path, data: dict[str, Any]) -> None:
    """Does with a stored report what the script does with its parts: page, table, sweep."""
    seal(folder, {**data, "real_digest": report._digest(REAL)})
    read = report.Report(folder, REAL, num_classes=len(CLASSES))
    assert forms.unfit_parts(read.data, num_classes=len(CLASSES)) == []
    page.write_html(read.data, {})
    read.drop("latents" if "memorisation" not in read.data else "nothing", why="of a test")
    if "memorisation" in read.data:
        terminal.print_figures(read.data)
    if "sweep" in read.data:
        points = read.data["sweep"]["points"]
        sweep.print_sweep(read.data["sweep"])
        sweep.say_best(sorted(points, key=lambda one: (one["step"], one["guidance"])), 3)


def alone(data: dict[str, Any], part: str) -> dict[str, Any]:
    """Returns one part of a report, with those without which nobody looks at it."""
    return {name: value for name, value in data.items() if name in (part, "evaluated", "memorisation")}


def try_all(folder: Path, data: dict[str, Any], step: int) -> int:
    """Puts hostile values everywhere; returns how many cases there were."""
    use_all(folder, data)
    cases = changes(data, step)
    with (
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("error")
        for place, value in cases:
            changed = replaced(alone(data, str(place[0])), place, value)
            try:
                page.write_html(changed, {"closest_pairs.png": b"x"})
                use_all(folder, changed)
            except Exception as error:
                raise AssertionError(f"{place} is {repr(value)[:50]}") from error
        for place in list(places(data))[::step]:
            use_all(folder, without(alone(data, str(place[0])), place))
    return len(cases)


def test_hostile_values_in_a_report_end_neither_page_nor_table(folder):
    assert try_all(folder, stored(folder), step=397) > 7


@pytest.mark.slow
def test_no_hostile_value_in_a_report_ends_page_or_table(full, tmp_path):
    folder = shutil.copytree(full, tmp_path / "evaluation")
    assert try_all(folder, stored(folder), step=37) > 200


def test_a_real_report_has_the_form_that_is_asked_for(first):
    assert forms.unfit_parts(stored(first), num_classes=len(CLASSES)) == [] == forms.unfit_parts(stored(first))


@pytest.mark.slow
def test_a_report_with_all_its_parts_has_the_form_that_is_asked_for(full, first):
    for place in (full, first):
        assert forms.unfit_parts(stored(place), num_classes=len(CLASSES)) == []
        assert forms.unfit_parts(stored(place)) == []
    assert {"classifier", "sweep", "latents", "memorisation"} <= stored(full).keys()
    assert set(forms.unfit_parts(stored(full), num_classes=4)) == {"classifier", "sweep"}


def is_repaired(folder: Path, like: dict[str, Any], changed: dict[str, Any]) -> bool:
    """Says whether each part is again what it was; a change that cannot be noticed may stay."""
    unfit, found = forms.unfit_parts(changed, num_classes=len(CLASSES)), stored(folder)
    parts = ("latents", "memorisation", "classifier", "sweep")
    return all(found.get(name) == like.get(name) for name in parts if name in unfit) and not forms.unfit_parts(
        found, num_classes=len(CLASSES)
    )


def run_all(trained: Path, synthetic: Path, full: Path, folder: Path, step: int) -> tuple[int, int]:
    """Evaluates with hostile values in the report; returns how many cases there were and how many went wrong."""
    like, wrong = stored(full), 0
    cases = changes(like, 1)[::step]
    for place, value in cases:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(full, folder)
        changed = replaced(like, place, value)
        seal(folder, changed)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as said:
            how = SWEPT if place[0] == "sweep" else {}
            code = evaluate(trained, synthetic, folder, **TRAINED, **how)
        is_right = code == 0 and "Traceback" not in said.getvalue()
        is_asked = not forms.unfit_parts(changed, num_classes=3) or place[0] in (
            "latents",
            "memorisation",
            "classifier",
        )
        wrong += not (is_right and (not is_asked or is_repaired(folder, like, changed)))
        assert not wrong, (place, repr(value)[:50], said.getvalue())
    return len(cases), wrong


def test_the_script_computes_again_what_cannot_be_used(trained, synthetic, folder, capsys):
    data = stored(folder)
    for part, name, value in (
        ("latents", "synthetic", "x"),
        ("memorisation", "per_class", [1]),
        ("memorisation", "distances", {"a": 10**400}),
        ("evaluated", "synthetic_digest", []),
    ):
        seal(folder, {**data, part: {**data[part], name: value}})
        capsys.readouterr()
        assert evaluate(trained, synthetic, folder) == 0
        told = (
            f"{folder / 'report.json'}: what is stored as {part} has another form than it should, and is computed anew"
        )
        assert told in capsys.readouterr().err
        assert {**stored(folder), "settings": data["settings"]} == data  # settings name the folder


@pytest.mark.slow
def test_the_script_on_hostile_values_everywhere(trained, synthetic, full, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: None)
    cases, wrong = run_all(trained, synthetic, full, tmp_path / "evaluation", step=3001)
    assert cases >= 2 and wrong == 0


@pytest.mark.parametrize("text", ["[" * 10**5, "[]", "null", "7", '{"sha256": NaN}', '{"latents": ' + "9" * 5000 + "}"])
def test_a_report_that_is_none_is_told_and_made_anew(folder, capsys, text):
    (folder / "report.json").write_text(text)
    assert report.Report(folder, REAL, num_classes=3).data == {"real_digest": report._digest(REAL)}
    assert "report.json is damaged or was edited (" in capsys.readouterr().err


def test_depth_beyond_any_report_is_damage(folder, capsys):
    seal(folder, {**stored(folder), "more": hostile_values.nested(300)})
    assert report.Report(folder, REAL, num_classes=3).data == {"real_digest": report._digest(REAL)}
    assert "(it has another form)" in capsys.readouterr().err


def test_the_page_says_which_part_it_leaves_out(folder):
    text = page.write_html({**stored(folder), "latents": {"synthetic": 7}}, {}).decode()
    assert "Latents is left out of this page: it has another form than it should." in text
    assert "In latent space</h2>" not in text


def test_the_digest_of_a_file_is_that_of_its_bytes_and_of_no_link(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(SECRET)
    assert report.file_digest(path) == hashlib.sha256(SECRET).hexdigest()
    (tmp_path / "b").symlink_to(path)
    assert report.file_digest(tmp_path / "b", follow_link=True) == report.file_digest(path)
    with pytest.raises(OSError, match="it is a link"):
        report.file_digest(tmp_path / "b")
