"""Golden data: caches, runs, images and a report of earlier versions are still read, continued and made again alike.

`tests/golden/make_golden.py` made them. Where torch, Pillow and the arithmetic of the CPU are those that made them,
all must be the same bit for bit; elsewhere figures must be near. Nothing here looks at how the code is arranged: the
tests call the four scripts, and read files with other libraries.
"""

import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from golden import make_golden
from PIL import Image
from safetensors import safe_open

import evaluate_images
import generate as generate_script
import preprocess_latents
import train_latent_cfg
from gait_latents.latents.dataset import LatentDataset
from gait_latents.vae.load import load_vae

GOLDEN = Path(make_golden.__file__).parent / "format_1"
FACTS = json.loads((GOLDEN / "golden.json").read_text(encoding="utf-8"))
SAME_BITS = FACTS["conditions"] == make_golden.conditions()
# Where another build of torch or another CPU computes: relative to the largest value of a tensor, or to 1 where that is
# smaller. With the kernels of older CPUs, weights differed by 6e-8 and latents by one step of float16. Adam can turn
# the rounding of a tiny gradient into more, but what is drawn otherwise moves weights by up to 4e-3.
WEIGHTS_TOLERANCE, FIGURES_TOLERANCE, LATENTS_TOLERANCE, PIXEL_LEVELS = 2e-4, 2e-3, 4e-3, 2
# Settings that files written earlier hold and that later versions may not know any more.
LEAVING = {"compiled", "dry_run", "import_folder", "import_scale_factor", "import_split"}
TIMES = ("seconds_per_step", "steps_per_second", "images_per_second", "hours")


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the golden data, in another place than where they were made; the scripts run in it, as then."""
    root = shutil.copytree(GOLDEN, tmp_path / "golden")
    monkeypatch.chdir(root)
    return root


@pytest.fixture(autouse=True)
def _says_how_it_compares(request: pytest.FixtureRequest) -> None:
    """Notes in the report of each test whether it asked for the same bits."""
    differing = [name for name, value in make_golden.conditions().items() if value != FACTS["conditions"].get(name)]
    text = "bit for bit" if SAME_BITS else f"within tolerances, for there is another {', '.join(differing)}"
    request.node.user_properties.append(("compared", text))
    print(f"compared {text}")


# --- looking at files --------------------------------------------------------------------------------------


def as_made(value: Any, root: Path) -> Any:
    """Returns a value out of a file with the places below `root` written as where the golden data were made."""
    if isinstance(value, dict):
        return {name: as_made(inner, root) for name, inner in value.items()}
    if isinstance(value, list):
        return [as_made(inner, root) for inner in value]
    return value.replace(str(root), FACTS["work"]) if isinstance(value, str) else value


def tensors_and_meta(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Reads a safetensors file."""
    with safe_open(path, "np") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118


def assert_same_tensors(path: Path, golden: Path, tolerance: float) -> None:
    """Asserts that two files hold the same tensors, bit for bit where that is to be expected."""
    found, expected = tensors_and_meta(path)[0], tensors_and_meta(golden)[0]
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape), name
        if SAME_BITS:
            assert found[name].tobytes() == value.tobytes(), name
        elif value.size:
            largest = max(1.0, float(np.abs(value).max()))
            assert np.abs(found[name].astype(float) - value).max() <= tolerance * largest, name


def assert_same_settings(found: dict[str, Any], golden: dict[str, Any]) -> None:
    """Asserts that stored settings say the same; a later version may have dropped or added some."""
    assert golden.keys() - found.keys() <= LEAVING
    assert {name: found[name] for name in golden.keys() & found.keys()} == {
        name: golden[name] for name in golden.keys() & found.keys()
    }


def assert_near(found: Any, golden: Any, where: str = "") -> None:
    """Asserts that two values out of JSON are equal; where other bits are expected, that their numbers are near."""
    if isinstance(golden, dict):
        assert found.keys() == golden.keys(), where
        for name in golden:
            assert_near(found[name], golden[name], f"{where}.{name}")
    elif isinstance(golden, list):
        assert len(found) == len(golden), where
        for number, (one, other) in enumerate(zip(found, golden, strict=True)):
            assert_near(one, other, f"{where}[{number}]")
    elif isinstance(golden, float) and not SAME_BITS:
        assert found == pytest.approx(golden, rel=FIGURES_TOLERANCE, abs=FIGURES_TOLERANCE), where
    else:
        assert found == golden, where


def metrics(run: Path) -> list[dict[str, Any]]:
    """Returns the lines of metrics.jsonl without what depends on the clock."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


def assert_same_pictures(folder: Path, golden: Path, pattern: str) -> None:
    """Asserts that two folders hold the same pictures, byte for byte or within some levels of each pixel."""
    places = sorted(path.relative_to(golden) for path in golden.glob(pattern))
    assert places and sorted(path.relative_to(folder) for path in folder.glob(pattern)) == places
    for place in places:
        one, other = (np.asarray(Image.open(root / place)).astype(int) for root in (folder, golden))
        assert one.shape == other.shape
        if SAME_BITS:
            assert (folder / place).read_bytes() == (golden / place).read_bytes(), place
        assert np.abs(one - other).max() <= (0 if SAME_BITS else PIXEL_LEVELS), place


def contents(folder: Path) -> dict[str, bytes]:
    """Returns the bytes of each file below a folder by its place."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def shards(cache: Path) -> dict[str, bytes]:
    """Returns the bytes of each shard of a cache by the names of its space and its own."""
    return {path.relative_to(cache).as_posix(): path.read_bytes() for path in cache.glob("*/*.safetensors")}


def rows(cache: Path) -> dict[bytes, np.ndarray]:
    """Returns the moments in a cache by their key."""
    found = [tensors_and_meta(path)[0] for path in cache.glob("*/*.safetensors")]
    return {key.tobytes(): row for shard in found for key, row in zip(shard["keys"], shard["moments"], strict=True)}


def assert_same_cache(cache: Path, golden: Path) -> None:
    """Asserts that two caches have the same spaces and rows, in shards of the same bytes where that is expected."""
    assert {Path(name).parent for name in shards(cache)} == {Path(name).parent for name in shards(golden)}
    found, expected = rows(cache), rows(golden)
    assert found.keys() == expected.keys()
    if SAME_BITS:
        assert shards(cache) == shards(golden)
    for key, row in expected.items():
        assert np.allclose(found[key].astype(float), row.astype(float), atol=LATENTS_TOLERANCE, rtol=LATENTS_TOLERANCE)


def manifest(cache: Path) -> dict[str, Any]:
    """Returns what manifest.json says; it must be sealed by its digest."""
    return json.loads((cache / "manifest.json").read_text(encoding="utf-8"))


def assert_same_manifest(cache: Path, golden: Path, root: Path) -> None:
    """Asserts that a manifest says of its space and its settings what the golden one says."""
    found, expected = as_made(manifest(cache), root), manifest(golden)
    for name in ("format", "space", "spec", "record"):
        assert found[name] == expected[name]
    assert_same_settings(found["settings"], expected["settings"])


def run_script(main: Callable[[list[str]], int], flags: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Runs a script, which must succeed; returns what it printed."""
    capsys.readouterr()
    code = main(flags)
    output = capsys.readouterr()
    assert code == 0, output.err
    return output.out


# --- the golden data themselves ----------------------------------------------------------------------------


def test_the_golden_data_are_as_they_were_made():
    assert make_golden.digests(GOLDEN) == FACTS["sha256"]
    assert make_golden.spaces(GOLDEN) == FACTS["spaces"]
    assert make_golden.foreign_words(GOLDEN) == []


def test_golden_data_are_never_overwritten(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["make_golden.py", GOLDEN.name])
    with pytest.raises(SystemExit, match="never overwritten"):
        make_golden.main()


def test_an_imported_cache_is_told_in_one_line_and_its_images_are_encoded_beside_it(tree, capsys):
    cache = tree / "imported_cache"
    assert "imported" in manifest(cache)["spec"]["vae"] and len(rows(cache)) == 4
    before = {path: path.read_bytes() for path in cache.rglob("*.safetensors")}
    output = run_script(preprocess_latents.main, make_golden.preprocess_flags(tree, "imported_cache"), capsys)
    (line,) = (line for line in output.splitlines() if "from another program" in line)
    assert "encoded again" in line
    assert "newly encoded   15" in output and "imported" not in manifest(cache)["spec"]["vae"]
    assert {path: path.read_bytes() for path in before} == before


# --- caches ------------------------------------------------------------------------------------------------


def test_a_golden_cache_is_hit(tree, capsys):
    cache = tree / "latents_cache"
    before = contents(cache)
    flags = make_golden.preprocess_flags(tree, "latents_cache")
    output = run_script(preprocess_latents.main, flags, capsys)
    assert "15 cached, 0 to encode" in output and "newly encoded   0" in output
    after = contents(cache)
    assert after.keys() == before.keys()
    assert [name for name in after if after[name] != before[name]] == ["manifest.json"]  # whose paths are others
    assert_same_manifest(cache, GOLDEN / "latents_cache", tree)
    run_script(preprocess_latents.main, flags, capsys)
    assert contents(cache) == after


def test_the_cache_of_a_vae_of_the_other_family_is_hit_without_its_package(tree, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    changes = {"vae_path": tree / "vae_diffusers", "splits": ["train"], "images_per_user": 1}
    output = run_script(
        preprocess_latents.main, make_golden.preprocess_flags(tree, "diffusers_cache", **changes), capsys
    )
    assert "3 cached, 0 to encode" in output
    assert_same_manifest(tree / "diffusers_cache", GOLDEN / "diffusers_cache", tree)
    assert make_golden.spaces(tree) == FACTS["spaces"]


def test_encoding_anew_makes_the_golden_cache(tree, capsys):
    run_script(preprocess_latents.main, make_golden.preprocess_flags(tree, "new_cache"), capsys)
    new, golden = tree / "new_cache", GOLDEN / "latents_cache"
    assert_same_cache(new, golden)
    assert (new / "split.json").read_bytes() == (golden / "split.json").read_bytes()
    found = as_made(manifest(new), tree)
    assert found["spec"] == manifest(golden)["spec"] and found["record"] == manifest(golden)["record"]


@pytest.mark.parametrize("cache", ["latents_cache", "lazy_cache"])
def test_a_golden_cache_is_enough_to_train_the_golden_run(cache, tree, capsys):
    shutil.rmtree(tree / "images")
    (tree / "vae.safetensors").unlink()
    places = {"latents_cache_folder": tree / cache, "vae_path": None, "data_path": None}  # as the manifest says
    run_script(train_latent_cfg.main, make_golden.train_flags(tree, "new", **places, num_samples=0), capsys)
    name = "state-00000008.safetensors"
    assert_same_tensors(tree / "new" / name, GOLDEN / "finished" / name, WEIGHTS_TOLERANCE)


def test_training_alone_fills_the_golden_lazy_cache(tree, capsys):
    changes = {"latents_cache_folder": tree / "new_cache", "train_num_steps": 3, "num_samples": 0}
    run_script(train_latent_cfg.main, make_golden.train_flags(tree, "new", **changes), capsys)
    assert_same_cache(tree / "new_cache", GOLDEN / "lazy_cache")
    assert (tree / "new_cache" / "split.json").read_bytes() == (GOLDEN / "lazy_cache" / "split.json").read_bytes()


def test_the_documented_imports_read_the_golden_cache_and_its_vae(tree):
    dataset = LatentDataset.open(tree / "latents_cache")
    meta = json.loads(tensors_and_meta(GOLDEN / "finished" / "state-00000008.safetensors")[1]["meta"])
    assert len(dataset) == 9 and list(dataset.latent_shape) == meta["latent_shape"]
    assert dataset.digest() == meta["data_digest"] and dataset.moments_digest() == meta["moments_digest"]
    vae = load_vae(str(tree / "vae.safetensors"), "cpu")
    assert vae.known_identity is not None
    assert vae.known_identity.fingerprint == manifest(tree / "latents_cache")["spec"]["vae"]


# --- runs --------------------------------------------------------------------------------------------------


def assert_same_meta(path: Path, golden: Path, root: Path) -> None:
    """Asserts that a checkpoint says of itself what the golden one says, its settings compared by name."""
    found, expected = (json.loads(tensors_and_meta(place)[1]["meta"]) for place in (path, golden))
    found = as_made(found, root)
    found["settings"]["results_folder"] = expected["settings"]["results_folder"]
    assert_same_settings(found.pop("settings"), expected.pop("settings"))
    for meta in (found, expected):
        meta.pop("torch")
    if SAME_BITS:
        assert {name: found[name] for name in expected} == expected
    else:
        names = [name for name in expected if name not in ("latent_norm", "moments_digest", "training")]
        assert {name: found[name] for name in names} == {name: expected[name] for name in names}


def test_the_stopped_run_ends_as_the_finished_one(tree, capsys):
    flags = make_golden.train_flags(tree, "stopped", max_hours="none")
    output = run_script(train_latent_cfg.main, flags, capsys)
    assert "going on from step 5" in output
    run, golden = tree / "stopped", GOLDEN / "finished"
    for name in ("state-00000008.safetensors", "ema-00000008.safetensors"):
        assert_same_tensors(run / name, golden / name, WEIGHTS_TOLERANCE)
        assert_same_meta(run / name, golden / name, tree)
    assert_near(metrics(run), metrics(golden))
    assert_same_pictures(run, golden, "grid-*.png")
    assert (run / "split.json").read_bytes() == (golden / "split.json").read_bytes()


def test_the_finished_run_is_known_to_be_finished(tree, capsys):
    before = contents(tree / "finished")
    output = run_script(train_latent_cfg.main, make_golden.train_flags(tree, "finished"), capsys)
    assert "is finished (8 steps)" in output
    assert contents(tree / "finished") == before


def test_an_older_run_goes_on_and_makes_images_as_its_own_version_did(tree, capsys):
    # No flag says what the run was started with: all that is not stored must be what was done then.
    places = {"vae_path": tree / "vae.safetensors", "data_path": tree / "images", "max_hours": "none"}
    places |= {"latents_cache_folder": tree / "latents_cache", "results_folder": tree / "older"}
    output = run_script(train_latent_cfg.main, make_golden.tiny.flags(places), capsys)
    assert "going on from step 4" in output
    assert_near(metrics(tree / "older"), metrics(GOLDEN / "older_end"))
    assert_same_pictures(tree / "older", GOLDEN / "older_end", "grid-*.png")
    meta = json.loads(tensors_and_meta(tree / "older" / "state-00000008.safetensors")[1]["meta"])
    assert [meta["settings"][name] for name in ("noise_shift", "time_shift", "guidance_interval")] == [0, 0, [0, 1]]
    assert meta["auto_steps"]["dpm++"] == 20
    run_script(generate_script.main, make_golden.generate_flags(tree, "older", "new_images"), capsys)
    assert_same_images(tree / "new_images", GOLDEN / "older_synthetic")
    if SAME_BITS:  # else the weights are others, and the folder is refused
        output = run_script(generate_script.main, make_golden.generate_flags(tree, "older", "older_synthetic"), capsys)
        assert "6 of the images are already there" in output and "0 images made" in output


# --- images and their evaluation ---------------------------------------------------------------------------


def assert_same_images(folder: Path, golden: Path) -> None:
    """Asserts that two folders of generated images are the same, and say the same of how they were made."""
    assert_same_pictures(folder, golden, "ID_*/*.png")
    assert (folder / "labels.csv").read_bytes() == (golden / "labels.csv").read_bytes()
    found, expected = (json.loads((place / "settings.json").read_text()) for place in (folder, golden))
    names = expected.keys() - LEAVING - (set() if SAME_BITS else {"weights"})
    assert {name: found[name] for name in names} == {name: expected[name] for name in names}


def test_the_finished_run_makes_the_golden_images_again(tree, capsys):
    run_script(generate_script.main, make_golden.generate_flags(tree, "finished", "new_images"), capsys)
    assert_same_images(tree / "new_images", GOLDEN / "synthetic")


def test_golden_images_are_not_made_again(tree, capsys):
    before = contents(tree / "synthetic")
    output = run_script(generate_script.main, make_golden.generate_flags(tree, "finished", "synthetic"), capsys)
    assert "6 of the images are already there" in output and "0 images made" in output
    assert contents(tree / "synthetic") == before


def report(folder: Path) -> dict[str, Any]:
    """Returns what report.json says."""
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))


def seal(data: dict[str, Any]) -> dict[str, Any]:
    """Returns a report with the checksum that fits it."""
    data = {name: value for name, value in data.items() if name != "sha256"}
    return {**data, "sha256": hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()}


def without_what_is_new(memorisation: dict[str, Any]) -> dict[str, Any]:
    """Returns what reports of that time have, too; no image of theirs is nearer to a training image that is moved.

    Which distance of few test images counts as near, and what chance explains, is reckoned otherwise since.
    """
    per_class = {
        name: {figure: value for figure, value in found.items() if figure != "copying"}
        for name, found in memorisation["per_class"].items()
    }
    new = {"picture_sha256", "copying", "digest"}  # the digest is of how the figures are made
    new |= {"threshold", "test_near_share", "near_share_limit"}
    kept = {name: value for name, value in memorisation.items() if name not in new}
    return {**kept, "per_class": per_class}


def test_the_figures_of_the_golden_evaluation_are_kept(tree, capsys):
    path = tree / "evaluation" / "report.json"
    marked = report(path.parent)
    assert seal(marked) == marked
    golden = marked["memorisation"]
    marked["latents"]["mark"] = "computed once"  # which computing anew would lose
    path.write_text(json.dumps(seal(marked)), encoding="utf-8")
    run_script(evaluate_images.main, make_golden.evaluate_flags(tree, "evaluation"), capsys)
    found = report(path.parent)
    digest = found["memorisation"]["picture_sha256"]
    assert digest == hashlib.sha256((path.parent / "closest_pairs.png").read_bytes()).hexdigest()
    assert found["latents"] == marked["latents"]
    assert_near(
        without_what_is_new(found["memorisation"]), without_what_is_new(golden)
    )  # of which there are more figures since
    assert shards(path.parent / "latents_cache") == shards(GOLDEN / "evaluation" / "latents_cache")


def test_evaluating_anew_gives_the_golden_figures(tree, capsys):
    run_script(evaluate_images.main, make_golden.evaluate_flags(tree, "new_evaluation"), capsys)
    found, golden = as_made(report(tree / "new_evaluation"), tree), report(GOLDEN / "evaluation")
    found["memorisation"] = without_what_is_new(found["memorisation"])
    for name in ("vae_saw", "split_digest", "weights_digest", "trained_with"):
        del found["evaluated"][name]
    golden["memorisation"] = without_what_is_new(golden["memorisation"])
    for part in ("latents", "memorisation", "evaluated"):
        assert_near(found[part], golden[part], part)
    assert found["real_digest"] == golden["real_digest"]
    page = (tree / "new_evaluation" / "report.html").read_text(encoding="utf-8")
    assert "<html" in page.lower()
