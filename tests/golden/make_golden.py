"""Makes a folder of golden data: small caches, runs, images and a report, as the scripts write them at the time.

    python tests/golden/make_golden.py format_1

Golden data are made once, before a change, and kept for good: `tests/test_golden.py` shows that every later version
reads them, goes on with them and computes the same. When a format changes, new golden data are made under another
name, beside the old ones, which this script never overwrites. It only runs the scripts as commands, so it does not
depend on how the code behind them is arranged. All is made in /tmp/golden, so that the absolute paths that runs and
caches remember are those of no particular machine.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).absolute().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(HERE.parent)]

import numpy as np  # noqa: E402
import tiny  # noqa: E402
import tiny_vae  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

WORK = Path("/tmp/golden")  # the paths inside the golden data begin with it
CLASSES = ("ID_1", "ID_2", "ID_10")
# The commit before the settings guidance_interval, time_shift and noise_shift and before the recorded number of
# solver steps: a run of its scripts knows none of them.
OLDER_COMMIT = "c0100c7db5f7c72396c52fb5467776bc33b99fd4"
STOPPED_STEP = 5  # between two lines of metrics.jsonl, so that the state holds a loss that was not logged yet
OLDER_STOPPED_STEP = 4

TRAIN = {
    "image_size": 16,
    "images_per_user": 3,
    "latent_norm_images": 6,
    "dim": 4,
    "dim_mults": [1],
    "attn_heads": 1,
    "attn_dim_head": 4,
    "timesteps": 50,
    "cond_drop_prob": 0.2,
    "train_batch_size": 4,
    "gradient_accumulate_every": 1,
    "train_num_steps": 8,
    "train_lr": 1e-3,
    "ema_update_every": 2,
    "save_and_sample_every": 4,
    "num_samples": 2,
    "log_every": 2,
    "compile": "false",
    "trackers": "none",
    "device": "cpu",
}
LATER_TRAIN = {
    "time_shift": 0.25,  # two columns of these latents; the default would move them by none
    "learn_edges": "true",
}
PREPROCESS = {"image_size": 16, "images_per_user": 3, "splits": ["train", "test"], "device": "cpu"}
GENERATE = {"images_per_class": 2, "image_format": "png", "device": "cpu"}
EVALUATE = {"classifier": "false", "device": "cpu"}


def train_flags(root: Path, results: str, **changes: object) -> list[str]:
    """Returns the flags of the golden training run below `root`, with some changed."""
    places = {"vae_path": root / "vae.safetensors", "data_path": root / "images"}
    places |= {"latents_cache_folder": root / "latents_cache", "results_folder": root / results}
    return tiny.flags({**places, **TRAIN, **LATER_TRAIN, **changes})


def preprocess_flags(root: Path, cache: str, **changes: object) -> list[str]:
    """Returns the flags of the golden preprocess below `root`, with some changed."""
    places = {"vae_path": root / "vae.safetensors", "data_path": root / "images", "output_folder": root / cache}
    return tiny.flags({**places, **PREPROCESS, **changes})


def generate_flags(root: Path, run: str, folder: str, **changes: object) -> list[str]:
    """Returns the flags that make the golden images of a run below `root`, with some changed."""
    places = {"checkpoint": root / run, "output_folder": root / folder, "vae_path": root / "vae.safetensors"}
    return tiny.flags({**places, **GENERATE, **changes})


def evaluate_flags(root: Path, folder: str, **changes: object) -> list[str]:
    """Returns the flags of the golden evaluation below `root`, with some changed."""
    places = {"checkpoint": root / "finished", "synthetic_path": root / "synthetic", "output_folder": root / folder}
    places |= {"data_path": root / "images", "vae_path": root / "vae.safetensors"}
    return tiny.flags({**places, **EVALUATE, **changes})


# --- what bits depend on -----------------------------------------------------------------------------------


def conditions() -> dict[str, str]:
    """Returns what the bits of encoding, training and sampling depend on besides the code of this project."""
    versions = {name: version(name) for name in ("numpy", "pillow", "denoising-diffusion-pytorch")}
    return {
        "torch": torch.__version__,
        **versions,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "arithmetic": arithmetic(),
    }


def arithmetic() -> str:
    """Returns a digest of some float32 sums of one thread, in which CPUs of one capability may still differ."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        values = (torch.arange(2 * 32 * 16 * 16) * 7919 % 1009).reshape(2, 32, 16, 16) / 1009 - 0.5
        kernel = (torch.arange(32 * 32 * 9) * 104729 % 997).reshape(32, 32, 3, 3) / 997 - 0.5
        found = torch.nn.functional.conv2d(values, kernel, padding=1)
        found = torch.nn.functional.silu(torch.nn.functional.group_norm(found, 32))
        rows = found.flatten(2).transpose(1, 2)  # [2 256 32]
        found = torch.softmax(rows @ rows.transpose(1, 2) / 32**0.5, dim=-1) @ rows
        small = torch.nn.functional.conv2d(values[:, :4, :8, :8], kernel[:4, :4], padding=1)
        small = torch.nn.functional.linear(small.flatten(1), kernel.flatten()[: 16 * 256].reshape(16, 256))
    finally:
        torch.set_num_threads(threads)
    return hashlib.sha256(found.numpy().tobytes() + small.numpy().tobytes()).hexdigest()


# --- making ------------------------------------------------------------------------------------------------


def command(script: str, flags: list[str], code: Path = ROOT) -> str:
    """Runs one of the scripts in a process of its own with one thread; returns what it printed on stdout."""
    one_thread = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, code / script, *flags],
        cwd=WORK,
        env={**os.environ, **one_thread},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return done.stdout


def make_images() -> None:
    """Makes two classes of JPEG files, and one of PNG files of which one is 16-bit grey and one has transparency."""
    tiny.make_images(WORK / "images", dict.fromkeys(CLASSES[:2], 5), seed=13)
    folder = WORK / "images" / CLASSES[2]
    folder.mkdir()
    pictures = [tiny.make_image(13000 + number, hue=2) for number in range(5)]
    pictures[1] = Image.fromarray(np.asarray(pictures[1].convert("L")).astype(np.uint16) * 257)
    pictures[2].putalpha(Image.fromarray(np.tile(np.linspace(0, 255, 32).astype(np.uint8), (32, 1))))
    for number, picture in enumerate(pictures):
        picture.save(folder / f"walk_{number}.png")


def make_vaes() -> None:
    """Makes a VAE of each family, with weights of 16 bits to keep them small."""
    network = tiny_vae.tiny_vae(seed=13)
    state = {name: tensor.half().clone() for name, tensor in network.state_dict().items()}
    facts = {"embed_dim": str(network.latent_channels), "scale_factor": str(network.scale_factor)}
    save_file(state, WORK / "vae.safetensors", facts)
    small = {"block_out_channels": (8, 8), "norm_num_groups": 8}
    with tempfile.TemporaryDirectory() as place:
        model = tiny_vae.save_tiny_diffusers_vae(place, seed=13, **small)
    model.half().save_pretrained(WORK / "vae_diffusers")


def make_caches() -> None:
    """Makes a cache by preprocessing with each VAE.

    The golden data hold one more, which an earlier version imported from the latents of another program.
    """
    command("preprocess_latents.py", preprocess_flags(WORK, "latents_cache"))
    other = {"vae_path": WORK / "vae_diffusers", "splits": ["train"], "images_per_user": 1}
    command("preprocess_latents.py", preprocess_flags(WORK, "diffusers_cache", **other))


def make_runs() -> None:
    """Makes a finished run and the same run stopped after five steps, and a cache that training filled by itself."""
    command("train_latent_cfg.py", train_flags(WORK, "finished"))
    for _ in range(STOPPED_STEP):  # each process finds its time used up after one step
        command("train_latent_cfg.py", train_flags(WORK, "stopped", max_hours=1e-6))
    alone = {"latents_cache_folder": WORK / "lazy_cache", "train_num_steps": 3, "num_samples": 0}
    command("train_latent_cfg.py", train_flags(WORK, "lazy_run", **alone))
    shutil.rmtree(WORK / "lazy_run")


def make_older(code: Path) -> None:
    """Makes a stopped run, its end and its images with scripts of before several settings existed."""
    archive = subprocess.run(["git", "archive", OLDER_COMMIT], cwd=ROOT, stdout=subprocess.PIPE, check=True)
    subprocess.run(["tar", "x", "-C", code], input=archive.stdout, check=True)
    later = dict.fromkeys(LATER_TRAIN)
    for _ in range(OLDER_STOPPED_STEP):
        command("train_latent_cfg.py", train_flags(WORK, "older", **later, max_hours=1e-6), code)
    shutil.copytree(WORK / "older", WORK / "older_end")
    command("train_latent_cfg.py", train_flags(WORK, "older_end", **later, max_hours="none"), code)
    command("generate.py", generate_flags(WORK, "older_end", "older_synthetic", compile=None), code)


def keep_small() -> None:
    """Removes what no test needs: earlier states and averages, and drawings of the losses.

    Of the end of the older run only the figures stay: settings.json of its images holds the digest of its weights.
    """
    for run, step in (("finished", 8), ("stopped", STOPPED_STEP), ("older", OLDER_STOPPED_STEP), ("older_end", 8)):
        for path in (WORK / run).iterdir():
            is_earlier = path.suffix == ".safetensors" and f"-{step:08d}" not in path.name
            if is_earlier or path.name == "loss.png" or (run == "older_end" and path.suffix == ".safetensors"):
                path.unlink()
    for run in ("stopped", "older"):
        for path in (WORK / run).glob("ema-*.safetensors"):  # the state of the same step holds the averages, too
            path.unlink()


def foreign_words(folder: Path) -> list[str]:
    """Returns the files that hold a path of this machine."""
    words = [b"/root", b"/home", b"/work", str(ROOT).encode()]
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return [f"{path}: {word!r}" for path in files for word in words if word in path.read_bytes()]


def digests(folder: Path) -> dict[str, str]:
    """Returns the SHA-256 of each file below a folder but golden.json, by its place in it."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "golden.json"]
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def spaces(folder: Path) -> dict[str, list[str]]:
    """Returns the ids of the spaces in each cache."""
    names = {}
    for cache in sorted(folder.glob("*_cache")):
        names[cache.name] = sorted(path.name for path in cache.iterdir() if re.fullmatch("[0-9a-f]{16}", path.name))
    return names


def main() -> None:
    """Makes the golden data of the name given, and refuses a name that is taken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="what to call the new golden data, such as format_2")
    target = HERE / parser.parse_args().name
    for place in (target, WORK):
        if place.exists():
            sys.exit(f"error: {place} exists; golden data are never overwritten")
    WORK.mkdir()
    make_images()
    make_vaes()
    make_caches()
    make_runs()
    with tempfile.TemporaryDirectory() as code:
        make_older(Path(code))
    command("generate.py", generate_flags(WORK, "finished", "synthetic"))
    command("evaluate_images.py", evaluate_flags(WORK, "evaluation"))
    keep_small()
    if found := foreign_words(WORK):
        sys.exit("error: paths of this machine in the golden data:\n" + "\n".join(found))
    facts = {"work": str(WORK), "conditions": conditions(), "spaces": spaces(WORK), "sha256": digests(WORK)}
    (WORK / "golden.json").write_text(json.dumps(facts, indent=1) + "\n")
    shutil.copytree(WORK, target)
    shutil.rmtree(WORK)


if __name__ == "__main__":
    main()
