"""The stages of bench_gpu.py, which starts each as a process of its own:

    python benchmarks/gpu_stages.py train --seconds 200 --folder scratch

A stage prints each row of its table as a line of JSON as soon as it is measured, so that what there is survives when a
later part fails or takes too long; what it is doing goes to standard error. VAE, images and latents are random.
"""

import argparse
import itertools
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import bench_encode
import bench_ranks
import bench_train
import gpu_truth
import harness
from harness import Round, Window

USERS_LOOP, EAGER, COMPILED, DRAWS = "users' loop", "ours, eager", "ours, compiled", "data and draws of ours"
USERS_SCRIPT = f"users' script: PIL, batches of {bench_encode.BASELINE_BATCH}, one .pt per image"
SAMPLE, DECODE, JPEG, PUBLISH = "sampling", "decoding", "JPEG", "writing and fsync"
CONVOLUTION, CHAIN = "convolution", "norm, SiLU, convolution"
TWO_GPUS = "two GPUs, eager"
DOING = "> "  # how a line on standard error begins that says what is being done
NETWORK_FORMAT, REDUCED_FORMAT = "number format of --precision auto", "reduced number format"
SPEED, STEP_MS, IMAGES_PER_SECOND, PEAK_GB = "speed", "ms per step", "images per second", "peak GB on the device"
PSNR = "dB against float32"
IMAGE_MS, RATE, SHARE, COMPILE_SECONDS = "ms per image", "TFLOP/s", "share of a step", "s of the first steps"
_STARTED = time.monotonic()  # about when the process did: torch is not imported yet
_RANK = "rank"  # the word that a process of the stage on two GPUs is started with


def main() -> None:
    """Runs a stage."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("stage", choices=(*STAGES, _RANK))
    parser.add_argument("--seconds", type=float, required=True, help="how long it may take, from its start")
    parser.add_argument("--folder", type=Path, required=True, help="where it may write what it needs")
    parser.add_argument("--small", action="store_true", help="tiny sizes: shows that it works, measures nothing")
    arguments = parser.parse_args()
    run = rank_of_two if arguments.stage == _RANK else STAGES[arguments.stage]
    run(Stage(arguments))


class Stage:
    """What every stage has: the device, its time, a folder, and the way to hand in its rows.

    Attributes:
        formats: number formats to compare on this device.
        usual: the one that training and sampling take here.
        reduced: the same, or another than float32 to compare with.
        sizes: what the functions of the other benchmarks take for their arguments.
    """

    def __init__(self, arguments: argparse.Namespace) -> None:
        import torch

        from gait_latents.common import hardware

        self.small, self.folder = arguments.small, arguments.folder
        self.deadline = _STARTED + 0.9 * arguments.seconds
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.formats = harness.number_formats()
        self.usual = str(hardware.pick_precision("auto", self.device)[0]).removeprefix("torch.")
        self.reduced = self.usual if self.usual != "float32" else self.formats[1]
        # A round has more images where a GPU is done with few at once.
        is_fast = self.device.type == "cuda" and torch.cuda.get_device_capability() >= (8, 0)
        self.sizes = argparse.Namespace(small=self.small, images=4 if self.small else 128 if is_fast else 32, steps=1)
        hardware.allow_tf32()

    @property
    def is_cpu(self) -> bool:
        """Says whether there is no GPU."""
        return self.device.type == "cpu"

    def row(self, name: str, **figures: Any) -> None:
        """Hands in a row; one of the same name takes its place."""
        print(json.dumps({"name": name, **figures}), flush=True)

    def say(self, what: str) -> None:
        """Says what is being done, which is what the report has when it fails or takes too long."""
        print(f"{DOING}{what}", file=sys.stderr, flush=True)

    def turns(self, works: Mapping[str, Round], *, share: float = 1.0) -> dict[str, list[Window]]:
        """Times works in turn, in a share of the time that is left."""
        self.say(f"timing {', '.join(works)}")
        seconds = max(0.0, self.deadline - time.monotonic()) * share
        size = {"window": 0.01, "rounds": 2} if self.small else {}
        return harness.take_turns(works, seconds=seconds, **size)

    def new_folder(self) -> Path:
        """Makes an empty folder."""
        return Path(tempfile.mkdtemp(dir=self.folder))

    def with_peak(self, build: Callable[[], Round]) -> tuple[Round, float | None]:
        """Builds a work and does it once; returns it, and the most memory in GB that it had on the device."""
        import torch

        if self.is_cpu:
            return build(), None
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work = build()
        work()
        harness.wait_for_device()
        peak = (torch.cuda.max_memory_allocated() - before) / 1e9
        torch.cuda.empty_cache()
        return work, peak

    def trainer(self, device: Any = None, **chosen: Any) -> Any:
        """Builds a trainer of the default recipe, not compiled unless `chosen` says so."""
        sizes = argparse.Namespace(small=self.small, images=310)
        settings = {"compile": "false", **chosen}
        return bench_train.make_trainer(sizes, self.new_folder(), device or self.device, **settings)

    def decoder(self, name: str) -> Any:
        """Returns the decoder of vae.pt in the folder of the stage, in a number format, without a trial."""
        from gait_latents.common import hardware
        from gait_latents.vae.decoder import ImageDecoder
        from gait_latents.vae.norm import LatentNorm

        found = ImageDecoder(str(self.folder / "vae.pt"), LatentNorm.from_scale_factor(4, 1.0, 0.0), self.device)
        found.go_on_in(hardware.NUMBER_FORMATS[name])
        return found


def per_unit(windows: list[Window], factor: float = 1.0) -> dict[str, float]:
    """Sums up the seconds per unit, times a factor."""
    return harness.summary([factor * window.each for window in windows])


def per_second(windows: list[Window], factor: float = 1.0) -> dict[str, float]:
    """Sums up the units per second, times a factor."""
    return harness.summary([factor / window.each for window in windows])


def host_per_unit(windows: list[Window], factor: float) -> dict[str, float]:
    """Sums up the seconds of the host per unit, times a factor."""
    return harness.summary([factor * window.host_seconds / window.count for window in windows])


def with_usual_flags(work: Round) -> Round:
    """Lets a work of the users' run with matrix products in plain float32, as torch begins."""
    import torch

    def usual() -> int:
        torch.backends.cuda.matmul.allow_tf32 = False
        try:
            return work()
        finally:
            torch.backends.cuda.matmul.allow_tf32 = True

    return usual


# --- facts -------------------------------------------------------------------------------------------------


def facts(stage: Stage) -> None:
    """Names the machine and the versions."""
    import torch

    found: dict[str, Any] = harness.machine(torch.get_num_threads())
    found.update(found.pop("versions"))
    found["cpu_features"] = ", ".join(found["cpu_features"]) or "none of those that matter"
    found.update({"CUDA": torch.version.cuda, "cuDNN": torch.backends.cudnn.version()})
    found["GPUs"] = torch.cuda.device_count()
    found[NETWORK_FORMAT], found[REDUCED_FORMAT] = stage.usual, stage.reduced
    if not stage.is_cpu:
        properties = torch.cuda.get_device_properties(0)
        found["capability"] = f"{properties.major}.{properties.minor}"
        found["GB on the device"] = round(properties.total_memory / 1e9, 1)
        found["convolutions in float32"] = "by TF32" if properties.major >= 8 else "plain"
        found["multiprocessors"] = properties.multi_processor_count
    commit = ["git", "-C", str(harness.ROOT), "log", "-1", "--format=%h of %cs"]
    found["commit"] = output_of(commit)
    names = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit", "temperature.gpu")
    smi = output_of(["nvidia-smi", "-i", "0", f"--query-gpu={','.join(names)}", "--format=csv,noheader"])
    found.update(zip(names, smi.split(", "), strict=False) if smi else {})
    for name, value in found.items():
        stage.row(name, value=value)


def output_of(command: list[str]) -> str:
    """Returns what a program prints, and nothing where there is no such program or it fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


# --- micro -------------------------------------------------------------------------------------------------


def micro(stage: Stage) -> None:
    """Measures what the card can do: a convolution as the VAE has most, what is around it, memory, launches, copies."""
    channels, size, batch = (32, 16, 1) if stage.small else (128, 256, 8)
    for chain, kind, share in ((False, CONVOLUTION, 0.35), (True, CHAIN, 0.6)):
        found = stage.turns(convolutions(stage, channels, size, batch, chain=chain), share=share)
        tera = 2 * 9 * channels**2 * size**2 * batch / 1e12
        for name, windows in found.items():
            figures = {RATE: per_second(windows, tera), "ms per call": per_unit(windows, 1e3)}
            stage.row(f"{kind}, {name}", **figures)
    traffic(stage)


def convolutions(stage: Stage, channels: int, size: int, batch: int, *, chain: bool) -> dict[str, Round]:
    """Returns a 3x3 convolution [B C S S] for each format and layout; in a chain, behind GroupNorm and SiLU."""
    import torch
    from torch import nn

    def work(dtype: Any, layout: Any, autocast: Any = None) -> Round:
        convolution = nn.Conv2d(channels, channels, 3, padding=1)
        block = nn.Sequential(nn.GroupNorm(32, channels), nn.SiLU(), convolution) if chain else convolution
        block = block.to(stage.device, dtype).to(memory_format=layout)  # pyright: ignore[reportCallIssue]
        images = torch.randn(batch, channels, size, size, device=stage.device, dtype=dtype)
        images = images.contiguous(memory_format=layout)

        @torch.inference_mode()
        def call() -> int:
            with torch.autocast(stage.device.type, dtype=autocast, enabled=autocast is not None):
                block(images)
            return 1

        return call

    layouts = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}
    works = {
        f"{name} {layout}": work(getattr(torch, name), memory_format)
        for name in stage.formats
        for layout, memory_format in layouts.items()
    }
    if chain:
        reduced = getattr(torch, stage.reduced)
        works[f"{stage.reduced} by autocast NHWC"] = work(torch.float32, torch.channels_last, reduced)
    return works


def traffic(stage: Stage) -> None:
    """Measures the device's memory, the launch of a kernel, and the copy of one step's draws."""
    import torch

    from gait_latents.settings import TrainSettings
    from gait_latents.training.draws import DeviceDraws, draw_step, packed
    from gait_latents.training.plan import batch_size

    settings, launches = TrainSettings(), 200
    source = torch.zeros(1 << (16 if stage.small else 26), device=stage.device)
    target, single = torch.empty_like(source), torch.zeros(1, device=stage.device)
    draws = draw_step(
        settings.seed,
        0,
        batch=batch_size(settings),
        size=310,
        latent_shape=bench_train.latent_shape(stage.sizes),
        timesteps=settings.timesteps,
        cond_drop_prob=settings.cond_drop_prob,
    )
    memory = DeviceDraws(stage.device)

    def copy() -> int:
        target.copy_(source)
        return 1

    def launch() -> int:
        for _ in range(launches):
            single.add_(1)
        return launches

    def pageable() -> int:
        for tensor in draws.tensors():
            tensor.to(stage.device)
        return 1

    def pinned() -> int:
        memory.send(draws, packed(draws.tensors(), pinned=stage.device.type == "cuda"))
        return 1

    copies = {"draws of a step, one by one from pageable memory": pageable, "draws of a step, as we copy them": pinned}
    found = stage.turns({"memory": copy, "launch": launch, **copies})
    gigabytes = 2 * source.numel() * source.element_size() / 1e9  # read and written
    stage.row("memory of the device, copied", **{"GB/s": per_second(found["memory"], gigabytes)})
    names = {"launch": "launch of a small kernel from Python", **{name: name for name in copies}}
    for key, name in names.items():
        figures = {"us": per_unit(found[key], 1e6), "us until queued": host_per_unit(found[key], 1e6)}
        stage.row(name, **figures)


# --- encode ------------------------------------------------------------------------------------------------


def encode(stage: Stage) -> None:
    """Times the users' script against ours from files to cache, and then the encoder alone in each layout."""
    import torch

    bench_encode.make_images(stage.folder / "data", stage.sizes)
    bench_encode.save_vae(stage.folder / "vae.pt", stage.sizes)
    facts: dict[str, dict[str, float]] = {name: {} for name in ("float32", stage.reduced)}
    builds: dict[str, Callable[[], Round]] = {
        USERS_SCRIPT: partial(bench_encode.usual, stage.sizes, stage.folder, bench_encode.BASELINE_BATCH)
    }
    for name, found in facts.items():
        chosen = argparse.Namespace(**vars(stage.sizes), worker=name)
        builds[f"ours, {name}"] = partial(bench_encode.ours, chosen, stage.folder, found)
    works, peaks = build_all(stage, builds)
    works[USERS_SCRIPT] = with_usual_flags(works[USERS_SCRIPT])
    turns = stage.turns(works, share=0.65)
    for name, windows in turns.items():
        speed = harness.speed(windows, turns[USERS_SCRIPT])
        figures = {IMAGES_PER_SECOND: per_second(windows), SPEED: speed, PEAK_GB: peaks[name]}
        stage.row(name, **figures, **facts.get(name.removeprefix("ours, "), {}))
    layouts = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}
    builds = {
        f"encoder alone, {name} {layout}": partial(encoder_alone, stage, name, memory_format)
        for name in dict.fromkeys(("float32", stage.reduced))
        for layout, memory_format in layouts.items()
    }
    works, peaks = build_all(stage, builds)
    for name, windows in stage.turns(works).items():
        figures = {IMAGES_PER_SECOND: per_second(windows), PEAK_GB: peaks[name]}
        stage.row(name, **figures)


def build_all(
    stage: Stage, builds: Mapping[str, Callable[[], Round]]
) -> tuple[dict[str, Round], dict[str, float | None]]:
    """Builds works one after the other; returns them, and the peak memory of each."""
    works, peaks = {}, {}
    for name, build in builds.items():
        stage.say(f"preparing {name}")
        works[name], peaks[name] = stage.with_peak(build)
    return works, peaks


def encoder_alone(stage: Stage, name: str, memory_format: Any) -> Round:
    """Sets up the encoder on 16 images that are on the device, weights and pixels in a number format and a layout."""
    import torch

    from gait_latents.common import hardware
    from gait_latents.vae import load

    vae = load.load_vae(stage.folder / "vae.pt", stage.device, parts="encoder", memory_format=memory_format)
    vae = vae.to(hardware.NUMBER_FORMATS[name])
    count, size = 2 if stage.small else 16, bench_encode.image_size(stage.sizes)
    images = torch.rand(count, 3, size, size, device=stage.device).contiguous(memory_format=memory_format)

    @torch.inference_mode()
    def work() -> int:
        vae.encode(images)
        return count

    return work


# --- train -------------------------------------------------------------------------------------------------


def train(stage: Stage) -> None:
    """Times steps of the users' loop and of ours: first not compiled, then all of them beside the compiled one."""
    sizes = argparse.Namespace(small=stage.small, images=310, steps=1)
    trainers: dict[str, Any] = {}

    def ours(name: str, **chosen: Any) -> Round:
        trainers[name] = stage.trainer(**chosen)
        return step_of(trainers[name])

    builds = {
        USERS_LOOP: partial(bench_train.baseline, sizes, stage.new_folder()),
        EAGER: partial(ours, EAGER),
    }
    works, peaks = build_all(stage, builds)
    works[USERS_LOOP] = with_usual_flags(works[USERS_LOOP])
    works[DRAWS] = draws_of(trainers[EAGER])
    time_steps(stage, works, peaks, share=0.3)
    if stage.small and stage.is_cpu:
        stage.row(COMPILED, note="not measured: it takes minutes on a CPU")
        return
    stage.say("compiling")
    try:
        started = time.perf_counter()
        works[COMPILED], peaks[COMPILED] = stage.with_peak(partial(ours, COMPILED, compile="true"))
        works[COMPILED]()
        harness.wait_for_device()
        seconds = time.perf_counter() - started
    except Exception as error:  # of many kinds, according to what is missing
        stage.row(COMPILED, note=f"not measured: {' '.join(str(error).split())[:200]}")
        return
    time_steps(stage, works, peaks, share=1.0, compiling=seconds)


def step_of(trainer: Any) -> Round:
    """Makes a round of one step, whose losses are let go."""

    def step() -> int:
        trainer.train_step()
        trainer.losses, trainer.sample_losses = [], []
        return 1

    return step


def draws_of(trainer: Any) -> Round:
    """Makes a round of what a step spends on its draws and latents: most of it was made while the step before ran."""
    steps = itertools.count()

    def work() -> int:
        for part in trainer.parts_of(next(steps)):
            trainer.latents_of(part)
        harness.wait_for_device()
        return 1

    return work


def time_steps(
    stage: Stage,
    works: Mapping[str, Round],
    peaks: Mapping[str, float | None],
    *,
    share: float,
    compiling: float | None = None,
) -> None:
    """Times the works and hands in their rows."""
    turns = stage.turns(works, share=share)
    fastest = turns.get(COMPILED, turns[EAGER])
    for name, windows in turns.items():
        figures: dict[str, Any] = {STEP_MS: per_unit(windows, 1e3)}
        if not stage.is_cpu:
            events = [1e3 * (window.device_seconds or 0.0) / window.count for window in windows]
            figures["event ms"] = harness.summary(events)
            figures["ms until queued"] = harness.summary(queueing_ms(works[name]))
        if name == DRAWS:
            pairs = zip(windows, fastest, strict=True)
            figures[SHARE] = harness.summary([own.each / step.each for own, step in pairs])
        else:
            figures |= {SPEED: harness.speed(windows, turns[USERS_LOOP]), PEAK_GB: peaks[name]}
        if name == COMPILED:
            figures[COMPILE_SECONDS] = compiling
        stage.row(name, **figures)


def queueing_ms(work: Round) -> list[float]:
    """Returns the host's milliseconds for each of some calls, each of which finds the device idle."""
    found = []
    for _ in range(10):
        harness.wait_for_device()
        started = time.perf_counter()
        work()
        found.append(1e3 * (time.perf_counter() - started))
    return found


# --- generate ----------------------------------------------------------------------------------------------


def generate(stage: Stage) -> None:
    """Times what an image of generate.py is made of: sampling, decoding, JPEG, and the way to the disk."""
    import numpy as np
    import torch
    from PIL import Image

    from gait_latents.common import files, pictures

    bench_encode.make_images(stage.folder / "data", stage.sizes)
    bench_encode.save_vae(stage.folder / "vae.pt", stage.sizes)
    with Image.open(next((stage.folder / "data" / "ID_1").iterdir())) as opened:
        image = Image.fromarray(np.asarray(opened))
    data, place = pictures.encode_image(image, ".jpg"), stage.new_folder() / "image.jpg"
    latents = torch.randn(4, *bench_train.latent_shape(stage.sizes), device=stage.device)

    def decode(decode_all: Any) -> int:
        return len(decode_all(latents))

    def encode_jpeg() -> int:
        pictures.encode_image(image, ".jpg")
        return 1

    def publish() -> int:
        files.publish(place, data)
        return 1

    works: dict[str, Round] = {}
    quality: dict[str, float | None] = {}
    for name in dict.fromkeys(("float32", stage.reduced)):
        works[f"{SAMPLE}, {name}"] = sampling(stage, name)
        decoder = stage.decoder(name)
        decoder.open()
        works[f"{DECODE}, {name}"] = partial(decode, decoder)
        # With random weights; what a VAE of users reaches decides whether generate.py decodes in this format.
        quality[f"{DECODE}, {name}"] = decoder.quality() if name != "float32" else None
    works |= {JPEG: encode_jpeg, PUBLISH: publish}
    for name, windows in stage.turns(works).items():
        stage.row(name, **{IMAGE_MS: per_unit(windows, 1e3), PSNR: quality.get(name)})


def sampling(stage: Stage, name: str) -> Round:
    """Sets up a call of the sampler as generate.py makes it with the default settings, on random weights."""
    import torch

    from gait_latents.common import cli, hardware
    from gait_latents.diffusion import build
    from gait_latents.diffusion.sampling import BATCH_SIZE, num_solver_steps, sample_padded
    from gait_latents.settings import AUTO_STEPS, TrainSettings

    settings = TrainSettings(**bench_train.network_settings(stage.sizes))
    shape = bench_train.latent_shape(stage.sizes)
    network = build.build_diffusion(cli.to_dict(settings), num_classes=bench_train.NUM_CLASSES, latent_shape=shape)
    network = network.eval().requires_grad_(False).to(stage.device)
    steps = num_solver_steps(settings.sampler, settings.sampling_timesteps, settings.timesteps, auto_steps=AUTO_STEPS)
    labels = [i % bench_train.NUM_CLASSES for i in range(BATCH_SIZE)]

    def work() -> int:
        sample_padded(
            network,
            labels,
            [torch.Generator().manual_seed(i) for i in range(BATCH_SIZE)],
            dtype=hardware.NUMBER_FORMATS[name],
            cond_scale=settings.cond_scale,
            guidance_interval=settings.guidance_interval,
            sampler=settings.sampler,
            sampling_timesteps=steps,
        )
        return BATCH_SIZE

    return work


# --- two GPUs ----------------------------------------------------------------------------------------------


def two_gpus(stage: Stage) -> None:
    """Times steps that two GPUs share; with --small and no GPU at all, two processes on the CPU do."""
    import torch

    count = torch.cuda.device_count()
    if count < 2 and not (count == 0 and stage.small):
        stage.row(TWO_GPUS, note="one GPU")
        return
    stage.say("starting two processes")
    seconds = stage.deadline - time.monotonic()
    words = [__file__, _RANK, "--seconds", str(seconds), "--folder", str(stage.folder), *["--small"] * stage.small]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run([*launcher, *words], stderr=subprocess.PIPE, text=True)
    print(done.stderr, file=sys.stderr)
    if done.returncode:
        told = re.findall(r"^(?:\[rank\d\]: *)?(\w*[Ee]rror: .*)$", done.stderr, re.MULTILINE)
        raise SystemExit(f"the two processes failed: {told[0] if told else f'exit code {done.returncode}'}")


def rank_of_two(stage: Stage) -> None:
    """Takes 10 steps to warm up and 60 in five windows, as one of two processes; the first hands in the row."""
    from gait_latents.common import hardware
    from gait_latents.common.distributed import join_ranks
    from gait_latents.common.process import end_with_torchrun

    end_with_torchrun()
    warm_up, in_window, windows = (1, 1, 2) if stage.small else (10, 12, 5)
    with join_ranks() as ranks:
        device = hardware.pick_device(ranks.device_name("auto"))
        ranks.use(device)
        sizes = argparse.Namespace(small=stage.small, images=310)
        step, exchange = bench_ranks.set_up(sizes, stage.new_folder(), ranks, device)
        for _ in range(warm_up):
            step()
        taken = []
        for _ in range(windows):
            hardware.synchronize(device)
            started = time.perf_counter()
            for _ in range(in_window):
                step()
            hardware.synchronize(device)
            taken.append(1e3 * (time.perf_counter() - started) / in_window)
        exchanging = bench_ranks.median_seconds(step, exchange)
        if ranks.is_main:
            figures = {STEP_MS: harness.summary(taken), "ms of it that exchange": 1e3 * exchanging}
            stage.row(TWO_GPUS, **figures)


STAGES: dict[str, Callable[[Stage], None]] = {
    "facts": facts,
    "micro": micro,
    "truth": gpu_truth.truth,
    "encode": encode,
    "train": train,
    "generate": generate,
    "two GPUs": two_gpus,
}

if __name__ == "__main__":
    main()
