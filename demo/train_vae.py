"""Trains a small KL-VAE on a folder of images, for whoever has none: the demo's own was made by this script.

    python demo/train_vae.py --data_path my_images --output_folder my_vae --image_size 128

The folder may hold images or sub-folders of images; every 32nd image, at most 64, is held out and measures the PSNR.
Typed again, the same command goes on where it stopped. `my_vae/vae.safetensors` is the result (averaged weights,
float16), usable as --vae_path from the first save on; `my_vae/preview.png` shows held-out images above what came back.

Shapes: N images, B batch, S image size, C latent channels, h = w = S / downsampling.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gait_latents.common.script import begin, run_script

if __name__ == "__main__":
    begin()  # before torch, which the next lines import

import numpy as np
import torch
from safetensors.torch import save as to_safetensors
from torch import Tensor

from gait_latents.common import cli, console, errors, files, hardware, json_text, pictures, process, seeds
from gait_latents.common.errors import UserError
from gait_latents.diffusion.ema import EMA
from gait_latents.images import folders, names, reading, selection
from gait_latents.settings import ImageSettings, MachineSettings, SamplingSettings, differences_on_resume
from gait_latents.training import checkpoint, optimizer_state, run_folder
from gait_latents.vae import trained_on
from gait_latents.vae.network import KLVAE


def _setting(default: Any, kind: type, group: str, help: str, **facts: Any) -> Any:
    spec = cli.Spec(kind=kind, help=help, group=group, **facts)
    return dataclasses.field(default=default, metadata={"spec": spec})


@dataclasses.dataclass(frozen=True)
class VAESettings(MachineSettings):
    """Settings of train_vae.py."""

    data_path: str = _setting(
        ImageSettings.data_path, str, "images", "folder of images, or of folders of images", path=True, free=True
    )
    image_size: int = _setting(
        ImageSettings.image_size, int, "images", "side of the square images, in pixels", low=8, high=4096
    )
    output_folder: str = _setting(
        "./vae", str, "saving", "where vae.safetensors, preview.png and the training state go", path=True, free=True
    )
    width: int = _setting(32, int, "network", "channels at full resolution; a multiple of 32", low=32)
    multipliers: tuple[int, ...] = _setting(
        (1, 2, 2, 4),
        int,
        "network",
        "width of each level as multiples; each level more halves the side",
        low=1,
        many=True,
    )
    num_blocks: int = _setting(1, int, "network", "residual blocks per level", low=1)
    latent_channels: int = _setting(4, int, "network", "channels of a latent", low=1)
    kl_weight: float = _setting(
        2e-4,
        float,
        "training",
        "weight of the KL per latent value, against the mean absolute error of a pixel",
        low=0.0,
    )
    train_num_steps: int = _setting(4000, int, "training", "steps in all", low=1, free=True)
    train_batch_size: int = _setting(4, int, "training", "images per step", low=1)
    train_lr: float = _setting(1e-3, float, "training", "peak learning rate of Adam, on a half cosine", low=0.0)
    max_grad_norm: float = _setting(1.0, float, "training", "gradients are clipped to this norm", low=0.0)
    ema_decay: float = _setting(0.999, float, "training", "decay of the averaged weights", low=0.0, high=1.0)
    save_and_sample_every: int = _setting(500, int, "saving", "steps between saves", low=1, free=True)
    precision: str = _setting(
        SamplingSettings.precision,
        str,
        "machine",
        "number format of the convolutions; bfloat16 is also fast on CPUs that have AMX",
        choices=("auto", "float32", "float16", "bfloat16"),
    )
    compile: str = _setting(
        "auto",
        str,
        "machine",
        "torch.compile; auto: where it is possible and repays",
        choices=("auto", "true", "false"),
    )


WARMUP_STEPS = 100
COMPILE_FROM_STEPS = 300  # compiling takes as long as about a hundred steps
HELD_OUT_EVERY, MOST_HELD_OUT = 32, 64
EVAL_BATCH = 16
LOOK_EVERY = 20  # steps between looks at the loss


# --- images ------------------------------------------------------------------------------------------------


def find_images(folder: str) -> list[Path]:
    """Lists the images in a folder and its sub-folders, hidden ones left out, in natural order."""
    root = Path(folder)
    if not root.is_dir():
        raise UserError(f"--data_path {folder} is not a folder; give the folder that holds the images")
    found = [
        path.relative_to(root)
        for path in root.rglob("*")
        if path.suffix.lower() in folders.IMAGE_SUFFIXES
        and not any(part[0] == "." for part in path.relative_to(root).parts)
    ]
    return [root / path for path in sorted(found, key=lambda path: [names.natural_key(part) for part in path.parts])]


def read_images(folder: str, image_size: int) -> tuple[np.ndarray, list[str]]:
    """Reads a folder into memory; returns uint8 [N S S 3] and the key of each image, the SHA-256 of its file.

    Images that cannot be read are left out, each with a warning that says why.
    """
    keys, pixels = [], []

    def read(path: Path) -> tuple[np.ndarray | None, str]:
        try:
            data = files.read_whole(path, at_most=reading.MAX_FILE_BYTES, follow_link=True)
            return reading.decode(data, image_size=image_size), reading.image_key(data)
        except (reading.BadImage, OSError) as error:
            return None, str(error)

    paths = find_images(folder)
    with ThreadPoolExecutor() as pool, console.progress(total=len(paths), unit="images", label="reading") as bar:
        for path, (image, word) in zip(paths, pool.map(read, paths), strict=True):
            if image is None:
                console.warn(f"{path} is left out: {word}")
            else:
                keys.append(word)
                pixels.append(image)
            bar.advance()
    if len(pixels) < 2:
        raise UserError(f"--data_path {folder} has {len(pixels)} readable images; training needs at least 2")
    return np.stack(pixels), keys


def are_held_out(count: int) -> Tensor:
    """Says for each of `count` images whether it is one of the few that are held out, bool [count]."""
    chosen = torch.zeros(count, dtype=torch.bool)
    spacing = max(HELD_OUT_EVERY, math.ceil(count / MOST_HELD_OUT))
    chosen[spacing // 2 :: spacing] = True
    if not chosen.any():
        chosen[-1] = True
    return chosen


def hold_out(pixels: np.ndarray) -> tuple[Tensor, Tensor]:
    """Splits images [N S S 3] into those to train on and a few held out, both uint8 [n 3 S S]."""
    channels_first = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
    chosen = are_held_out(len(pixels))
    return channels_first[~chosen], channels_first[chosen]


# --- the model ---------------------------------------------------------------------------------------------


def check_settings(settings: VAESettings) -> None:
    """Raises UserError for settings that no VAE can have, and for a folder that files should not or cannot go to."""
    if settings.width % 32:
        raise UserError(f"--width is {settings.width}; it must be a multiple of 32")
    levels = len(settings.multipliers)
    if settings.image_size % 2 ** (levels - 1):
        raise UserError(
            f"--image_size is {settings.image_size}; {levels} levels need a multiple of {2 ** (levels - 1)}"
        )
    folder = Path(settings.output_folder)
    selection.refuse_to_be_a_class(folder, settings.data_path)
    if Path(settings.data_path).resolve() in folder.resolve().parents:
        raise UserError(
            f"--output_folder {folder} is in --data_path {settings.data_path}, so that its preview would count as an "
            "image; give a folder outside"
        )
    if not files.can_write(settings.output_folder):
        raise UserError(
            f"--output_folder {settings.output_folder} cannot be written to (no permission, or no space left)"
        )


def build_vae(settings: VAESettings) -> KLVAE:
    """Builds the untrained VAE; its weights depend on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        return KLVAE(
            width=settings.width,
            multipliers=settings.multipliers,
            num_blocks=settings.num_blocks,
            embed_dim=settings.latent_channels,
            style="kl",
            scale_factor=1.0,
        )


def vae_loss(vae: KLVAE, batch: Tensor, noise: Tensor, kl_weight: float) -> tuple[Tensor, Tensor]:
    """Returns the loss and the mean absolute error of images [B 3 S S] coded with posterior noise [B C h w]."""
    mean, logvar = vae.encode(batch).chunk(2, dim=1)  # B C h w
    error = (vae.decode_raw(mean + (logvar / 2).exp() * noise) - batch).abs().mean()
    kl = 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).mean()
    return error + kl_weight * kl, error


def learning_rate(step: int, settings: VAESettings) -> float:
    """Gives the learning rate of a step: a linear warm-up times a half cosine down to nothing."""
    warm = min(1.0, (step + 1) / WARMUP_STEPS)
    return settings.train_lr * warm * 0.5 * (1 + math.cos(math.pi * step / settings.train_num_steps))


def pick_compile(settings: VAESettings, device: torch.device, dtype: torch.dtype) -> bool:
    """Decides whether to compile the loss: where asked, or where it is possible and the whole run repays it.

    The steps left do not count: a run that goes on must compute as it began. On a CPU float32 gains nothing, and
    16-bit convolutions are many times slower without.
    """
    if settings.compile != "auto":
        return settings.compile == "true"
    repays = settings.train_num_steps >= COMPILE_FROM_STEPS if device.type == "cuda" else dtype != torch.float32
    return repays and hardware.why_not_compile(device) is None


# --- training ----------------------------------------------------------------------------------------------


class Trainer:
    """Holds everything that a training step changes, and how to take, save and restore it."""

    def __init__(
        self, settings: VAESettings, train: Tensor, digest: str, device: torch.device, keys: Sequence[str] = ()
    ):
        self.settings, self.train, self.digest, self.device = settings, train, digest, device
        self.keys = keys  # of the images to train on
        self.dtype, _ = hardware.pick_precision(settings.precision, device)
        self.vae = build_vae(settings).to(device)
        self.ema = EMA(self.vae, decay=settings.ema_decay, update_every=1)
        self.optimizer = torch.optim.Adam(self.vae.parameters(), lr=settings.train_lr, betas=(0.9, 0.99))
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)
        self.step = 0
        self.loss_function: Callable[..., tuple[Tensor, Tensor]] = vae_loss

    def batch(self) -> tuple[Tensor, Tensor]:
        """Draws the images [B 3 S S] of this step and their posterior noise [B C h w], from (seed, step) alone."""
        size = self.settings.train_batch_size
        positions = seeds.draw_positions(self.settings.seed, self.step * size, size, len(self.train))
        side = self.settings.image_size // self.vae.downsampling
        generator = seeds.sample_generator(self.settings.seed, "vae", self.step)
        noise = torch.randn(size, self.vae.latent_channels, side, side, generator=generator)
        return to_unit_range(self.train[positions], self.device), noise.to(self.device)

    def train_step(self) -> tuple[Tensor, Tensor]:
        """Takes one step; returns the mean absolute error and the norm of the gradient, on the device."""
        batch, noise = self.batch()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.settings)
        try:
            error = self._gradients(batch, noise)
        except RuntimeError as failure:
            hardware.warn_uncompiled(self.settings.compile, hardware.compiler_obstacle(failure))
            self.loss_function = vae_loss
            error = self._gradients(batch, noise)
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.vae.parameters(), self.settings.max_grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.ema.update(self.vae, self.step)
        self.step += 1
        return error, norm

    def _gradients(self, batch: Tensor, noise: Tensor) -> Tensor:
        """Leaves the gradients of a step in the VAE; returns its mean absolute error."""
        self.optimizer.zero_grad(set_to_none=True)
        with hardware.autocast(self.device, self.dtype):
            loss, error = self.loss_function(self.vae, batch, noise, self.settings.kl_weight)
        self.scaler.scale(loss).backward()
        return error.detach()

    def check_finite(self, error: Tensor, norm: Tensor) -> None:
        """Raises Failed when the last step has broken the weights, before they are saved."""
        is_norm_good = self.scaler.is_enabled() or math.isfinite(norm)  # the scaler leaves such a step out
        if not math.isfinite(error) or not is_norm_good:
            what = "gradient" if math.isfinite(error) else "loss"
            raise errors.Failed(f"the {what} is not finite at step {self.step}; lower --train_lr")

    def save_state(self) -> None:
        """Saves the full state, then removes older ones but one."""
        folder = Path(self.settings.output_folder)
        tensors, values = optimizer_state.pack_training_state(self.vae, self.ema.model, self.optimizer, self.scaler)
        settings = cli.to_dict(self.settings)
        meta = {"step": self.step, "settings": settings, "data": self.digest, "training": values}
        checkpoint.save(folder / run_folder.full_name(self.step), tensors, meta)
        run_folder.prune(folder, step=self.step)

    def resume(self) -> bool:
        """Goes on from the newest state in the output folder, if there is one, and says whether there was."""
        found = run_folder.find_newest(Path(self.settings.output_folder))
        if found is None:
            return False
        path, tensors, meta, warnings = found
        for line in warnings:
            console.warn(line)
        check_same_run(meta, self.settings, self.digest, path)
        optimizer_state.unpack_training_state(
            tensors, meta["training"], self.vae, self.ema.model, self.optimizer, self.scaler
        )
        self.step = meta["step"]
        return True


def check_same_run(meta: dict, settings: VAESettings, digest: str, path: Path) -> None:
    """Raises UserError when a saved state was trained with other settings or other images."""
    for name, stored, asked in differences_on_resume(meta["settings"], settings):
        raise UserError(
            f"{path} was trained with --{name} {cli.show(stored)}, not {cli.show(asked)}; "
            "take that, or another --output_folder"
        )
    if meta["data"] != digest:
        raise UserError(f"{path} was trained on other images than those in --data_path; take another --output_folder")


def to_unit_range(pixels: Tensor, device: torch.device) -> Tensor:
    """Turns uint8 images into float32 ones in [0, 1] on the device."""
    return pixels.to(device).float() / 255


# --- looking and saving ------------------------------------------------------------------------------------


@torch.inference_mode()
def encode(vae: KLVAE, pixels: Tensor, device: torch.device) -> Tensor:
    """Returns the moments [N 2C h w] of uint8 images, on the CPU."""
    return torch.cat([vae.encode(to_unit_range(part, device)).cpu() for part in pixels.split(EVAL_BATCH)])


@torch.inference_mode()
def reconstruct(vae: KLVAE, moments: Tensor, device: torch.device) -> np.ndarray:
    """Returns the images that the posterior means decode to, uint8 [N S S 3]."""
    means = moments.chunk(2, dim=1)[0]
    return np.concatenate([pictures.to_uint8(vae.decode(part.to(device))) for part in means.split(EVAL_BATCH)])


def latent_std(moments: Tensor) -> Tensor:
    """Returns the standard deviation per channel [C] of latents drawn from the moments."""
    mean, logvar = moments.double().chunk(2, dim=1)
    return (mean.var(dim=(0, 2, 3)) + logvar.exp().mean(dim=(0, 2, 3))).sqrt()


def vae_bytes(vae: KLVAE, scale_factor: float, keys: Sequence[str] = ()) -> bytes:
    """Returns the VAE as a float16 safetensors file that `vae.load_vae` reads, and that names its images by key."""
    tensors = {name: tensor.half().contiguous().cpu() for name, tensor in vae.state_dict().items()}
    facts = {"scale_factor": repr(scale_factor)} | ({trained_on.NAME: trained_on.to_text(keys)} if keys else {})
    # safetensors writes several facts in another order each time; the same training is to give the same file.
    data = to_safetensors(tensors, metadata=facts)
    end = 8 + int.from_bytes(data[:8], "little")
    table = json.loads(data[8:end]) | {"__metadata__": facts}
    return json_text.safetensors_header(json.dumps(table, separators=(",", ":"))) + data[end:]


def save_all(trainer: Trainer, held_out: Tensor) -> str:
    """Saves state, VAE and preview; returns a line on how good the VAE is by now."""
    trainer.save_state()
    vae, folder = trainer.ema.model, Path(trainer.settings.output_folder)
    moments = encode(vae, held_out, trainer.device)
    decoded = reconstruct(vae, moments, trainer.device)
    originals = held_out.permute(0, 2, 3, 1).numpy()
    std = latent_std(moments)
    files.publish(folder / "vae.safetensors", vae_bytes(vae, 1 / std.square().mean().sqrt().item(), trainer.keys))
    shown = slice(None, None, math.ceil(len(originals) / 8))
    grid = pictures.labelled_grid([[*originals[shown]], [*decoded[shown]]], ["image", "VAE"])
    pictures.save_picture(grid, folder / "preview.png")
    psnr = np.mean([pictures.psnr(a, b) for a, b in zip(originals, decoded, strict=True)])
    return f"PSNR {psnr:.2f} dB, latent std per channel {' '.join(f'{value:.2f}' for value in std)}"


def run(trainer: Trainer, held_out: Tensor, stop: process.StopSignals) -> None:
    """Trains to the end, saving on the way and on a signal."""
    settings, pace = trainer.settings, Pace(trainer)
    with console.progress(total=settings.train_num_steps, unit="steps", label="training", initial=trainer.step) as bar:
        while trainer.step < settings.train_num_steps:
            error, norm = trainer.train_step()
            pace.tell()
            saves = trainer.step % settings.save_and_sample_every == 0 or trainer.step == settings.train_num_steps
            saves = saves or stop.received is not None
            figures = {}
            if saves or trainer.step % LOOK_EVERY == 0:
                trainer.check_finite(error, norm)
                figures = {"error": f"{error:.4f}", "gradient": f"{norm:.2f}"}
            bar.advance(1, **figures)
            if saves:
                console.say(f"step {trainer.step}: {save_all(trainer, held_out)}")
                stop.raise_if_received()


class Pace:
    """Says once, when the first steps are over, how long the rest will take."""

    def __init__(self, trainer: Trainer):
        self.trainer, self.first = trainer, trainer.step
        self.start = time.monotonic()

    def tell(self) -> None:
        """Looks at the clock after a step."""
        done, settings = self.trainer.step - self.first, self.trainer.settings
        if done == 10:
            self.start = time.monotonic()  # compiling and warming up are over
        if done == 30:
            seconds = (time.monotonic() - self.start) / 20
            left = console.duration(seconds * (settings.train_num_steps - self.trainer.step))
            console.say(f"{seconds:.2f} s per step of {settings.train_batch_size} images; about {left} to go")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the script; returns its exit code."""
    return run_script(VAESettings, argv, __doc__, train_as_asked)


def train_as_asked(argv: Sequence[str] | None) -> int:
    """Trains a VAE as the command line asks; returns the exit code."""
    settings = cli.resolve(VAESettings, cli.read_command_line(VAESettings, argv, description=__doc__)).settings
    check_settings(settings)
    device = hardware.pick_device(settings.device)
    with process.StopSignals() as stop:
        pixels, keys = read_images(settings.data_path, settings.image_size)
        train, held_out = hold_out(pixels)
        digest = hashlib.sha256("".join(keys).encode()).hexdigest()
        to_train_on = [key for key, is_out in zip(keys, are_held_out(len(keys)), strict=True) if not is_out]
        trainer = Trainer(settings, train, digest, device, to_train_on)
        if trainer.resume():
            console.say(f"going on from step {trainer.step}")
        if trainer.step >= settings.train_num_steps:
            console.say(f"{settings.output_folder} is trained already; a higher --train_num_steps goes on")
            return errors.DONE
        if pick_compile(settings, device, trainer.dtype):
            trainer.loss_function = torch.compile(vae_loss)
        num_parameters = sum(p.numel() for p in trainer.vae.parameters())
        console.say(
            f"{len(train)} images to train on, {len(held_out)} held out; {num_parameters / 1e6:.2f} M parameters, "
            f"{str(trainer.dtype).removeprefix('torch.')} on {hardware.describe(device)}"
        )
        remedy = (
            f"for --train_batch_size {settings.train_batch_size} and --image_size {settings.image_size}; lower one of "
            "them, and give another --output_folder where a state was saved"
        )
        with hardware.plain_memory_error(remedy=remedy):
            run(trainer, held_out, stop)
    folder = Path(settings.output_folder)
    console.say(f"done: look at {folder / 'preview.png'}, which shows held-out images above what the VAE makes of them")
    path = shlex.quote(str(folder / "vae.safetensors"))
    console.say(f"next: preprocess_latents.py with --vae_path {path} --image_size {settings.image_size}")
    return errors.DONE


if __name__ == "__main__":
    sys.exit(main())
