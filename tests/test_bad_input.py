"""What a user can get wrong: one line that names value, place and remedy, the exit code, and nothing lost."""

import errno
import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import tiny
import tiny_vae
import torch
from os_faults import fault_at, raising
from pipeline import SIZE, STEPS, generate, preprocess, train

import generate as generate_script
import preprocess_latents
import train_latent_cfg
from gait_latents import export
from gait_latents.common import layout, mounts
from gait_latents.diffusion.model import LatentDiffusion
from gait_latents.images.split import read_split
from gait_latents.training import checkpoint, run_folder
from gait_latents.vae.network import KLVAE

ROOT = Path(__file__).resolve().parent.parent
Run = Callable[..., int]
SCRIPTS: dict[str, ModuleType] = {
    "preprocess": preprocess_latents,
    "train": train_latent_cfg,
    "generate": generate_script,
    "export": export,
}
ENCODING = pytest.mark.parametrize("run", [preprocess, train], ids=["preprocess", "train"])


@pytest.fixture
def ready(trained: Path, tmp_path: Path) -> Path:
    """A world of one's own with data, VAE, complete cache and a finished run."""
    return shutil.copytree(trained, tmp_path / "world")


def contents(root: Path) -> dict[str, bytes | str | None]:
    """Returns what is below a folder: the content of files, the goal of links, None for folders."""
    found: dict[str, bytes | str | None] = {}
    for path in sorted(root.rglob("*")):
        kind = str(path.readlink()) if path.is_symlink() else path.read_bytes() if path.is_file() else None
        found[str(path.relative_to(root))] = kind
    return found


def refused(
    run: Callable[[], int], root: Path, capsys: pytest.CaptureFixture[str], *words: object, code: int = 2
) -> str:
    """Asserts that a run ends in one line on stderr with these words and leaves everything as it was; returns it."""
    capsys.readouterr()
    before = contents(root)
    assert run() == code
    assert contents(root) == before
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    assert [word for word in words if str(word) not in lines[0]] == [], lines[0]
    return lines[0]


def call(name: str, *words: object) -> int:
    """Runs a script with these words and nothing else."""
    return SCRIPTS[name].main([str(word) for word in words])


# --- flags and files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "words", "told"),
    [
        ("preprocess", ["--data_pth", "x"], ["--data_pth", "did you mean --data_path?"]),
        ("train", ["--train-lrr", "1"], ["--train_lrr", "did you mean --train_lr?"]),
        ("generate", ["--class", "ID_1"], ["--class;", "did you mean --classes?"]),
        ("train", ["--output_folder", "x"], ["--output_folder", "did you mean --latents_cache_folder?"]),
        ("preprocess", ["--latents_cache_folder", "x"], ["did you mean --output_folder?"]),
        ("preprocess", ["--dim", "8"], ["--dim", "it is one of train_latent_cfg.py"]),
        ("preprocess", ["spectrograms"], ["spectrograms", "--help"]),
        ("train", ["--dim", "wide"], ["dim is 'wide' in --dim", "a whole number"]),
        ("train", ["--dim_mults", "1;2;4"], ["'1;2;4'", "--dim_mults", "several as separate words"]),
        ("train", ["--seed", 2**70], [2**70, "--seed", "largest allowed"]),
        ("generate", ["--images_per_class", "0"], ["images_per_class is 0", "smallest allowed is 1"]),
        ("generate", ["--image_format", "gif"], ["'gif'", "auto, jpg, png"]),
        ("export", ["--steps", "9"], ["--steps", "did you mean --ddim_steps?"]),
        ("export", ["--max_hours", "9"], ["--max_hours", "it is one of"]),
        ("train", ["--config", "nowhere.yaml"], ["--config nowhere.yaml", "No such file"]),
        ("train", ["--config", "."], ["--config .", "Is a directory"]),
        ("train", ["--config"], ["--config", "expected one argument"]),
    ],
)
def test_a_wrong_flag_is_refused(tmp_path, monkeypatch, capsys, name, words, told):
    monkeypatch.chdir(tmp_path)
    refused(lambda: call(name, *words), tmp_path, capsys, *told)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("data_pth: x\n", ["data_pth", "did you mean data_path?"]),
        ("image_size: big\n", ["image_size is 'big'", "a whole number"]),
        ("dim_mults: 1 2\n", ["dim_mults is '1 2'", "separate words"]),
        ("seed: 1\nseed: 2\n", ["seed stands 2 times"]),
        ("[image_size, 8]: x\n", ["name: value"]),
        ("image_size: [8\n", ["is not valid YAML"]),
        ("just text\n", ["name: value"]),
        ("\0", ["is not valid YAML"]),
    ],
)
def test_a_wrong_config_file_is_refused(tmp_path, monkeypatch, capsys, text, told):
    monkeypatch.chdir(tmp_path)
    Path("my.yaml").write_text(text)
    for name in SCRIPTS:
        refused(lambda name=name: call(name, "--config", "my.yaml"), tmp_path, capsys, "my.yaml", *told)


@pytest.mark.parametrize("name", ["run 1.yaml", "manifest.yaml", "default.yaml"])
def test_a_path_in_a_config_file_is_meant_whatever_the_file_is_called(ready, monkeypatch, capsys, name):
    monkeypatch.chdir(ready)
    Path(name).write_text("data_path: nowhere\n")
    words = tiny.train_flags(ready, image_size=SIZE, data_path=None, results_folder=ready / "other")
    refused(lambda: call("train", *words, "--config", name), ready, capsys, "--data_path nowhere does not exist")


# --- images ------------------------------------------------------------------------------------------------


def make_file(place: Path) -> None:
    place.write_bytes(b"")


def make_loose_images(place: Path) -> None:
    place.mkdir()
    tiny.make_image(0).save(place / "a.jpg")


def make_deep_images(place: Path) -> None:
    tiny.make_images(place / "Normal_line", {"ID_1": 1})


def make_texts(place: Path) -> None:
    (place / "ID_1").mkdir(parents=True)
    (place / "ID_1" / "notes.txt").write_text("no image")


@ENCODING
@pytest.mark.parametrize(
    ("make", "told"),
    [
        (None, "does not exist; give the folder that has one sub-folder of images for each class"),
        (make_file, "is a file; give the folder that has"),
        (Path.mkdir, "has no sub-folders; it needs one folder for the images of each class"),
        (make_loose_images, "1 images but no sub-folders; it needs one folder"),
        (make_deep_images, "are they deeper, in"),
        (make_texts, "files taken as images: .bmp"),
    ],
)
def test_a_data_folder_without_images_of_classes_is_refused(world, capsys, run, make, told):
    place = world / "wrong"
    if make is not None:
        make(place)
    refused(lambda: run(world, data_path=place), world, capsys, "data_path", place, told)


@pytest.mark.parametrize("name", ["preprocess", "train"])
def test_the_default_data_folder_is_named_where_it_is_not_there(tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    place = mounts.root() / "organized-gait-dataset" / "Normal_line"
    refused(
        lambda: call(name, "--device", "cpu"), tmp_path, capsys, f"--data_path {place} does not", "; give the folder"
    )


@ENCODING
def test_fewer_images_than_asked_for_are_told_class_by_class(world, capsys, run):
    (world / "data" / "ID_2" / "walk_0.jpg").unlink()
    told = ["images_per_user is 8", "ID_2 has 7", "lower it to 7, add images, or give --small_classes take"]
    assert "ID_1 " not in refused(lambda: run(world, images_per_user=8), world, capsys, *told)


def test_a_class_name_of_two_lines_is_told_in_one(world, capsys):
    (world / "data" / "ID_2").rename(world / "data" / "ID\n2")
    refused(lambda: preprocess(world, images_per_user=9), world, capsys, r"'ID\n2' has 8")
    (world / "data" / "ID\n2" / "walk_0.jpg").write_bytes(b"")
    assert preprocess(world, images_per_user="all") == 1
    assert r"    'ID\n2/walk_0.jpg': the file is empty" in capsys.readouterr().out.splitlines()


def test_a_file_name_that_is_no_text_can_be_shown(world, capsys):
    name = os.fsdecode(b"walk_\xff.jpg")
    (world / "data" / "ID_2" / name).write_bytes(b"")
    assert preprocess(world, images_per_user="all") == 1
    assert r"ID_2/walk_\udcff.jpg': the file is empty" in capsys.readouterr().out
    assert train(world, images_per_user="all", skip_bad_images=True, train_num_steps=1) == 0


@pytest.mark.parametrize("run", [preprocess, train])
def test_a_link_that_leads_nowhere_is_a_bad_image(world, capsys, run):
    (world / "data" / "ID_2" / "gone.jpg").symlink_to(world / "nowhere" / "gone.jpg")
    assert run(world, images_per_user="all") == 1
    assert "ID_2/gone.jpg: cannot be read: No such file or directory" in capsys.readouterr().out
    assert (
        run(world, images_per_user="all", skip_bad_images=True, **({"train_num_steps": 1} if run is train else {})) == 0
    )


def test_training_names_each_bad_image_and_writes_nothing(world, capsys):
    (world / "data" / "ID_2" / "walk_0.jpg").write_bytes(b"")
    (world / "data" / "ID_10" / "walk_0.jpg").write_text("version https://git-lfs.github.com/spec/v1\n")
    refused(lambda: train(world, images_per_user="all"), world, capsys, "2 of 24", "--skip_bad_images", code=1)


# --- the VAE -----------------------------------------------------------------------------------------------


class Code:
    """Pickles to a call that leaves a file behind when it is run."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.trace),)


def write_truncated(path: Path) -> None:
    tiny_vae.save_tiny_vae(path)
    path.write_bytes(path.read_bytes()[:100_000])


def write_pointer(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 260000000\n")


def write_code(path: Path) -> None:
    torch.save({"state_dict": Code(path.with_suffix(".trace"))}, path)


def write_old_pickle_with_code(path: Path) -> None:
    path.write_bytes(pickle.dumps(Code(path.with_suffix(".trace")), protocol=4))


def write_other_shapes(path: Path) -> None:
    state = dict(tiny_vae.tiny_vae().state_dict())
    state["encoder.down.0.block.0.conv2.weight"] = torch.zeros(32, 32, 5, 5)
    torch.save(state, path)


def write_other_names(path: Path) -> None:
    state = dict(tiny_vae.tiny_vae().state_dict())
    state["encoder.mid.attn_2.q.weight"] = torch.zeros(32, 32, 1, 1)
    torch.save({name: tensor for name, tensor in state.items() if name != "encoder.norm_out.bias"}, path)


def write_classifier(path: Path) -> None:
    torch.save(torch.nn.Linear(3, 3).state_dict(), path)


BAD_VAES: list[tuple[Callable[[Path], object] | None, list[str]]] = [
    (None, ["does not exist; give --vae_path"]),
    (make_file, ["is empty; copy or download it again"]),
    (write_truncated, ["is damaged or truncated", "download it again"]),
    (write_pointer, ["is a Git-LFS pointer", "git lfs pull"]),
    (write_code, ["posix.mkdir", "could run code, so it was not opened", "save the weights alone"]),
    (write_old_pickle_with_code, ["or holds more than weights", "save the weights alone"]),
    (write_other_shapes, ["encoder.down.0.block.0.conv2.weight is (32, 32, 5, 5), not (32, 32, 3, 3)"]),
    (
        write_other_names,
        ["encoder.mid.attn_2.q.weight (32, 32, 1, 1) has no place", "encoder.norm_out.bias (32,) is missing"],
    ),
    (write_classifier, ["is not a KL-VAE: it has no tensor encoder.conv_in.weight", "such as weight, bias"]),
    (Path.mkdir, ["is a folder without config.json"]),
]


@pytest.mark.parametrize(("write", "told"), BAD_VAES)
def test_a_file_that_is_no_kl_vae_is_refused_by_every_script(ready, capsys, write, told):
    path = ready / "bad.pt"
    if write is not None:
        write(path)
    runs: list[tuple[Run, dict[str, object]]] = [
        (preprocess, {"output_folder": ready / "new"}),
        (train, {"results_folder": ready / "new"}),
        (generate, {}),
    ]
    for run, places in runs:
        line = refused(lambda run=run, places=places: run(ready, vae_path=path, **places), ready, capsys, path, *told)
        assert "weights_only" not in line  # torch would have it switched off


def test_a_hub_id_that_cannot_be_had_is_told_at_once(world, monkeypatch, capsys):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(world / "hub"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("http_proxy", raising=False)
    monkeypatch.delenv("HTTP_PROXY", raising=False)
    told = ["the VAE models/kl_vae is no file or folder in", "http://127.0.0.1:9 cannot be reached", "check --vae_path"]
    refused(lambda: preprocess(world, vae_path="models/kl_vae"), world, capsys, *told)


def save_encoder_alone(path: Path) -> None:
    state = tiny_vae.tiny_vae().state_dict()
    torch.save({name: t for name, t in state.items() if name.startswith(("encoder.", "quant_conv."))}, path)


def test_a_vae_without_its_decoder_encodes_and_trains_but_generates_nothing(world, capsys):
    save_encoder_alone(world / "vae.pt")
    assert preprocess(world) == 0
    assert (
        pipeline_warning(capsys)
        == f"warning: no preview.png: {world / 'vae.pt'} holds no decoder of a KL-VAE; give the whole checkpoint"
    )
    assert train(world, train_num_steps=1) == 0
    assert "warning: sample grids are scored, but not drawn" in capsys.readouterr().err
    refused(lambda: generate(world), world, capsys, world / "vae.pt", "holds no decoder")


def pipeline_warning(capsys: pytest.CaptureFixture[str]) -> str:
    """Returns the only warning on stderr."""
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    return line


# --- sizes that do not fit ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"image_size": 17}, ["--image_size 17", "not a multiple of 2", "vae.pt; take 16 or 18"]),
        (
            {"image_size": 18, "dim_mults": [1, 2]},
            ["latents are 9 x 9", "2 dim_mults", "multiple of 2", "another image_size"],
        ),
        ({"dim_mults": [1, 2, 4, 8, 8]}, ["latents are 8 x 8", "5 dim_mults", "multiple of 16"]),
        ({"dim": 9}, ["dim is 9", "even number"]),
        ({"timesteps": 2, "beta_schedule": "linear"}, ["timesteps is 2", "beta_schedule linear", "use cosine"]),
        ({"timesteps": 5, "sampling_timesteps": 6}, ["--sampling_timesteps is 6", "5 timesteps", "or auto"]),
    ],
)
def test_sizes_that_do_not_fit_are_refused_before_anything_is_written(world, capsys, changes, told):
    refused(lambda: train(world, **changes), world, capsys, *told)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"timesteps": 2, "sampling_timesteps": 2},
        {"num_samples": 0},
        {"max_hours": 0},
        {"images_per_user": "all"},
        {"images_per_user": 1},
        {"num_users": 1},
        {"num_users": 1, "images_per_user": 1, "latent_norm_images": 64},
        {"cond_drop_prob": 1},
        {"cond_drop_prob": 0},
    ],
)
def test_extreme_settings_work(world, changes):
    assert train(world, **{"train_num_steps": 1, **changes}) == 0
    assert (world / "results" / run_folder.full_name(1)).is_file()


# --- devices -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "told"),
    [
        ("gpu", "is not a device; use auto, cpu, cuda or cuda:N"),
        ("0", "is not a device"),
        ("cuda:-1", "is not a device"),
        ("mps", "is not supported; use auto, cpu, cuda or cuda:N"),
    ],
)
def test_an_impossible_device_is_refused_by_every_script(ready, capsys, device, told):
    for run, places in ((preprocess, {}), (train, {"results_folder": ready / "new"}), (generate, {})):
        refused(
            lambda run=run, places=places: run(ready, device=device, **places),
            ready,
            capsys,
            f"--device {device} {told}",
        )


def test_a_gpu_that_is_absent_is_refused(world, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused(lambda: train(world, device="cuda"), world, capsys, "--device cuda", torch.__version__, "use --device cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    refused(lambda: train(world, device="cuda:2"), world, capsys, "--device cuda:2 does not exist", "2 GPU(s)")


@ENCODING
@pytest.mark.parametrize("device", ["auto", "cuda", "cuda:0"])
def test_a_gpu_without_kernels_is_told_what_to_do(world, monkeypatch, capsys, run, device):
    def no_kernel(*_: object, **__: object) -> torch.Tensor:
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla P100-PCIE-16GB")
    monkeypatch.setattr(torch, "ones", no_kernel)
    told = ["Tesla P100-PCIE-16GB", "switch the accelerator to T4 x2", "below 2.15", "CUDA 12.6"]
    refused(lambda: run(world, device=device), world, capsys, *told)


def test_a_gpu_that_is_too_small_is_told_what_to_lower(ready, monkeypatch, capsys):
    def too_much(*_: object, **__: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    with monkeypatch.context() as patches:
        patches.setattr(LatentDiffusion, "forward", too_much)
        assert train(ready, results_folder=ready / "new") == 1
        assert "error: the GPU has too little memory for --train_batch_size" in capsys.readouterr().err
        patches.undo()
        patches.setattr(LatentDiffusion, "sample", too_much)
        assert train(ready, results_folder=ready / "another") == 2
        assert "error: the GPU has too little memory to make 16 samples at once; --num" in capsys.readouterr().err
    monkeypatch.setattr(KLVAE, "pixels", too_much)
    assert preprocess(ready, output_folder=ready / "cache") == 0
    assert "no preview.png: the GPU has too little memory for the VAE decoder" in capsys.readouterr().err
    monkeypatch.setattr(KLVAE, "moments", too_much)
    assert preprocess(ready, output_folder=ready / "new") == 1
    assert "error: the GPU has too little memory for --encode_batch_size 4; give" in capsys.readouterr().err
    assert generate(ready, output_folder=ready / "other") == 1
    assert "error: the GPU has too little memory; end what else uses it" in capsys.readouterr().err


# --- folders that cannot be written to ---------------------------------------------------------------------

WRITERS = pytest.mark.parametrize(
    ("run", "setting"),
    [(preprocess, "output_folder"), (train, "results_folder"), (generate, "output_folder")],
    ids=["preprocess", "train", "generate"],
)


@WRITERS
def test_a_file_in_the_place_of_a_folder_is_refused_and_stays(ready, capsys, run, setting):
    (ready / "file").write_text("dear")
    for place in (ready / "file", ready / "file" / "deeper" / "still"):
        refused(lambda place=place: run(ready, **{setting: place}), ready, capsys, place, "Not a directory")


@WRITERS
@pytest.mark.parametrize(("call", "number"), [("open", errno.EACCES), ("mkdir", errno.EROFS), ("write", errno.ENOSPC)])
def test_no_permission_and_no_space_are_refused_before_anything_is_done(ready, capsys, run, setting, call, number):
    place = ready / "new" / "folder"

    def refuse(name: str, real: Callable, args: tuple) -> object:
        return real(*args) if name == "open" and not args[1] & os.O_CREAT else raising(number)(name, real, args)

    def run_on_a_bad_disk() -> int:
        with fault_at(-1, refuse, only=(call,)):
            return run(ready, **{setting: place})

    told = f"--{setting} {place} cannot be written to ({os.strerror(number)}); give another"
    refused(run_on_a_bad_disk, ready, capsys, told)


def test_a_cache_is_checked_where_it_is_read_only(ready, capsys):
    def refuse_new_files(name: str, real: Callable, args: tuple) -> object:
        if name == "open" and args[1] & os.O_CREAT:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return real(*args)

    (ready / "latents_cache" / "preview.png").unlink(missing_ok=True)
    before = contents(ready)
    with fault_at(-1, refuse_new_files, only=("open",)):
        assert call("preprocess", "--verify", "--output_folder", ready / "latents_cache") == 0
    assert contents(ready) == before
    assert "preview.png cannot be written (Read-only file system)" in capsys.readouterr().out


def test_a_check_of_no_cache_is_refused(world, capsys):
    place = world / "nowhere"
    words = ["--verify", "--output_folder", place]
    refused(lambda: call("preprocess", *words), world, capsys, place, "no finished cache", "run preprocess_latents.py")


# --- going on with a run -----------------------------------------------------------------------------------


def go_on(root: Path, **changes: object) -> int:
    return train(root, **{"train_num_steps": STEPS + 1, **changes})


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"dim": 16}, ["--dim is 16", "started with 8"]),
        ({"dim_mults": [1, 1]}, ["--dim_mults is 1 1", "started with 1;"]),
        ({"seed": 7}, ["--seed is 7", "started with 42"]),
        ({"image_size": 32}, ["--image_size is 32", "started with 16"]),
        ({"resize": "squash"}, ["--resize is squash", "started with crop"]),
        ({"images_per_user": 4}, ["--images_per_user is 4", "started with 5"]),
        ({"train_batch_size": 3}, ["--train_batch_size is 3", "started with "]),
        ({"objective": "pred_x0"}, ["--objective is pred_x0", "started with pred_v"]),
        ({"skip_bad_images": True}, ["--skip_bad_images is true", "started with false"]),
    ],
)
def test_a_run_does_not_go_on_with_other_settings(ready, capsys, changes, told):
    told = [*told, f"the run in {ready / 'results'}", "leave it at", "another --results_folder"]
    refused(lambda: go_on(ready, **changes), ready, capsys, *told)


@pytest.mark.parametrize(
    ("architecture", "told"),
    [({"seed": 1}, "(vae.weights: "), ({"embed_dim": 8}, "vae.architecture.latent_channels: 8 vs 4; ")],
)
def test_a_run_does_not_go_on_with_another_vae_and_names_what_differs(ready, capsys, architecture, told):
    tiny_vae.save_tiny_vae(ready / "vae.pt", **architecture)
    line = refused(
        lambda: go_on(ready), ready, capsys, f"--vae_path {ready / 'vae.pt'}", told, "give the VAE of that run"
    )
    assert len(line) < 500  # the beginnings of the digests


def test_a_run_does_not_go_on_with_another_content_of_an_image(ready, capsys):
    split = read_split(ready / "results")
    assert split is not None
    entry = split.train[3]
    tiny.make_image(99).save(ready / "data" / entry.class_name / entry.name)
    told = ["1 of 15 have another content", f"the first is {entry.class_name}/{entry.name}", "put them back"]
    refused(lambda: go_on(ready), ready, capsys, *told)


def test_a_run_goes_on_without_images_that_are_encoded_already(ready):
    split = read_split(ready / "results")
    assert split is not None
    entry = split.train[3]
    (ready / "data" / entry.class_name / entry.name).unlink()
    shutil.rmtree(ready / "data" / "ID_10")
    assert go_on(ready) == 0


def test_a_checkpoint_alone_does_not_go_on_with_other_labels(ready, capsys):
    lone = shutil.copy(ready / "results" / run_folder.full_name(STEPS), ready / "lone.safetensors")
    tiny.make_images(ready / "data", {"ID_0": 8}, seed=5)
    told = [f"the run in {ready}", "the run had ID_1, ID_2, ID_10"]
    refused(lambda: go_on(ready, results_folder=ready / "new", resume_from=lone), ready, capsys, *told)


@pytest.mark.parametrize(
    ("place", "told"),
    [
        ("nowhere", "does not exist; give a run folder, or a state-*.safetensors in one"),
        ("data", "is neither a checkpoint nor a folder with state-*.safetensors"),
        ("vae.pt", "does not begin like a checkpoint; give another, or the folder of the run"),
        ("results/" + run_folder.ema_name(STEPS), "holds averaged weights only; give a state-*.safetensors"),
    ],
)
def test_resuming_from_what_is_no_run_is_refused(ready, capsys, place, told):
    changes = {"results_folder": ready / "new", "resume_from": ready / place}
    refused(lambda: go_on(ready, **changes), ready, capsys, ready / place, told)


def test_a_wrong_resume_from_is_refused_beside_a_run_too_and_a_right_one_is_not_used(ready, capsys):
    refused(lambda: go_on(ready, resume_from=ready / "nowhere"), ready, capsys, "--resume_from", "does not exist")
    shutil.copytree(ready / "results", ready / "elsewhere")
    assert go_on(ready, resume_from=ready / "elsewhere") == 0
    assert (
        f"holds a run already, which goes on; --resume_from {ready / 'elsewhere'} is not used"
        in capsys.readouterr().out
    )


def test_checkpoints_that_are_all_damaged_are_refused(ready, capsys):
    for path in (ready / "results").glob("state-*.safetensors"):
        path.write_bytes(path.read_bytes()[:5000])
    told = [ready / "results", "can be read", "remove them to start from the beginning", "another results_folder"]
    refused(lambda: go_on(ready), ready, capsys, *told)


# --- other format numbers ----------------------------------------------------------------------------------


def sealed_json(body: dict[str, object]) -> str:
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return json.dumps({**body, "sha256": hashlib.sha256(text.encode()).hexdigest()})


def as_manifest_of_format_2(path: Path) -> None:
    body = json.loads(path.read_text())
    del body["sha256"]
    path.write_text(sealed_json({**body, "format": 2}))


def as_split_of_format_2(path: Path) -> None:
    body = path.read_bytes().replace(b'"format": 1', b'"format": 2')
    body = body[: body.rindex(b'  "sha256"')]
    path.write_bytes(body + f'  "sha256": "{hashlib.sha256(body).hexdigest()}"\n}}\n'.encode())


def test_a_manifest_of_another_format_is_refused(ready, capsys):
    path = ready / "latents_cache" / layout.MANIFEST_NAME
    as_manifest_of_format_2(path)
    told = "has format 2, and this version reads 1; use the version that made it, or another"
    for run in (preprocess, lambda root: train(root, results_folder=root / "new"), go_on):
        refused(lambda run=run: run(ready), ready, capsys, path, told)


def test_a_split_of_another_format_is_refused(ready, capsys):
    told = "has format 2 but this program reads format 1; remove it"
    as_split_of_format_2(ready / "results" / "split.json")
    refused(lambda: go_on(ready), ready, capsys, ready / "results" / "split.json", told)
    as_split_of_format_2(ready / "latents_cache" / "split.json")
    new_run = {"results_folder": ready / "new"}
    refused(lambda: train(ready, **new_run), ready, capsys, ready / "latents_cache" / "split.json", told)


def test_a_checkpoint_of_another_format_is_refused(ready, monkeypatch, capsys):
    path = ready / "results" / run_folder.full_name(STEPS)
    tensors, meta = checkpoint.load(path)
    with monkeypatch.context() as patches:
        patches.setattr(checkpoint, "FORMAT", 2)
        patches.setattr(checkpoint, "_checksum", lambda *_: "another way to add up")
        checkpoint.save(path, tensors, meta)
    told = [path, "has format 2, and this version reads 1"]
    refused(lambda: go_on(ready), ready, capsys, *told)
    refused(lambda: go_on(ready, results_folder=ready / "new", resume_from=path), ready, capsys, *told)
    refused(lambda: generate(ready, checkpoint=path), ready, capsys, *told)


# --- generating --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"classes": ["ID_1", "ID_20"]},
            ["the model has no class ID_20", "did you mean ID_2? it has ID_1, ID_2, ID_10"],
        ),
        ({"classes": ["zebra"]}, ["no class zebra", "it has ID_1, ID_2, ID_10"]),
        ({"sampling_timesteps": 2000}, ["--sampling_timesteps is 2000", "1000 timesteps", "or auto"]),
        ({"sampling_timesteps": 2000, "strip": [1, 2]}, ["--sampling_timesteps is 2000"]),
    ],
)
def test_generating_what_cannot_be_is_refused(ready, capsys, changes, told):
    refused(lambda: generate(ready, **changes), ready, capsys, *told)


@pytest.mark.parametrize(
    ("place", "told"),
    [
        ("nowhere", "is neither a checkpoint nor a folder of a run"),
        ("data", "is neither a checkpoint nor a folder of a run"),
        ("vae.pt", "does not begin like a checkpoint; give another, or the folder of the run"),
    ],
)
def test_generating_from_what_is_no_run_is_refused(ready, capsys, place, told):
    refused(lambda: generate(ready, checkpoint=ready / place), ready, capsys, ready / place, told)


def test_checkpoints_without_one_whole_average_are_refused(ready, capsys):
    for path in (ready / "results").glob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:5000])
    (ready / "results" / "state-99999999.safetensors").mkdir()
    refused(lambda: generate(ready), ready, capsys, "no checkpoint in", ready / "results")


def test_another_vae_than_that_of_the_run_is_refused_field_by_field(ready, capsys):
    tiny_vae.save_tiny_vae(ready / "other.pt", embed_dim=8)
    told = ["other.pt is not the VAE that the model was trained with", "vae.architecture.latent_channels: 8 vs 4"]
    refused(lambda: generate(ready, vae_path=ready / "other.pt"), ready, capsys, *told)


def test_a_damaged_image_in_the_folder_is_told_and_made_again(ready, capsys):
    assert generate(ready) == 0
    path = ready / "synthetic" / "ID_2" / "ID_2_000001.jpg"
    before = path.read_bytes()
    for damage in (b"", before[:50]):
        path.write_bytes(damage)
        assert generate(ready) == 0
        assert "1 of the images" in capsys.readouterr().err and path.read_bytes() == before


# --- before a script runs ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_older_diffusion_library_on_the_path_is_named_by_version_and_place(tmp_path):
    old = tmp_path / "denoising_diffusion_pytorch"
    old.mkdir()
    (old / "__init__.py").write_text("")
    (old / "version.py").write_text("__version__ = '1.0.0'\n")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    before = contents(tmp_path)
    for module in ("train_latent_cfg", "generate"):
        done = subprocess.run(
            [sys.executable, "-m", module], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        (line,) = done.stderr.splitlines()
        assert done.returncode == 2
        assert line.startswith(
            f"error: Python imports denoising-diffusion-pytorch 1.0.0 from {old}, but 2.3.4 or newer"
        )
    assert contents(tmp_path) == before
