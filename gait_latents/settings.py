"""Every setting once: type, default, limits and help, one frozen dataclass per script."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from gait_latents.common.cli import CATALOGUE, setting, specs, to_dict

# Where train_num_steps is auto, training sees each image so often; after 130 to 200 passes, samples turned into copies
# of training images (docs/log.md).
AUTO_PASSES = 150
# A run that learns embeddings of classes alone: passes of train_num_steps auto, and what else is then the default.
FROZEN_PASSES = 25
FROZEN_DEFAULTS = {"train_lr": 0.03, "fewest_steps": 400}
# Solver steps where sampling_timesteps is auto (docs/log.md); a sampler that is not here takes every training timestep.
AUTO_STEPS = {"dpm++": 12, "ddim": 250}
ALL_CLASSES = ("all",)
DOWNLOAD = "download"  # a word that stands in place of a path, for what can be fetched
DATA, CACHE, NETWORK, DIFFUSION, TRAINING, SAVING, SAMPLING, OUTPUT, EVALUATION, MACHINE = (
    "images",
    "cache and VAE",
    "network",
    "diffusion",
    "training",
    "saving and logging",
    "sampling",
    "generated images",
    "evaluation",
    "machine",
)
# The order in which --help and the READMEs show them: what a newcomer sets stands first.
GROUPS = (OUTPUT, EVALUATION, DATA, CACHE, TRAINING, SAVING, SAMPLING, MACHINE, NETWORK, DIFFUSION)


@dataclass(frozen=True)
class MachineSettings:
    """Settings that every script has."""

    seed: int = setting(
        42, int, DATA, "seed of the split and of every random draw", low=0, high=2**63 - 1, about_cache=True
    )
    device: str = setting("auto", str, MACHINE, "auto, cpu, cuda or cuda:N", free=True)
    trust_pickle: bool = setting(
        False,
        bool,
        CACHE,
        "open a VAE or weights in a pickle (.pt, .pth, .ckpt, .bin) with torch below 2.10, which has a hole there",
        free=True,
        stored=False,
    )


@dataclass(frozen=True)
class ImageSettings(MachineSettings):
    """Settings of the scripts that read images: what is encoded, and by which VAE."""

    vae_path: str = setting(
        "/kaggle/input/kl-vae-best-pt/kl_vae_best.pt",
        str,
        CACHE,
        "KL-VAE: a .pt, .pth or .safetensors file, a diffusers folder, or a hub id",
        path=True,
        free=True,
        about_cache=True,
    )
    scale_factor: float | None = setting(
        None,
        float,
        CACHE,
        "scale of the VAE's own normalisation, (z - shift) times scale; none takes that of its file, or the usual one",
        low=1e-6,
        high=1e6,
        words=("none",),
        about_cache=True,
    )
    shift_factor: float | None = setting(
        None,
        float,
        CACHE,
        "shift of the VAE's own normalisation; none takes that of its file, or the usual one",
        low=-1e6,
        high=1e6,
        words=("none",),
        about_cache=True,
    )
    data_path: str = setting(
        "/kaggle/input/organized-gait-dataset/Normal_line",
        str,
        DATA,
        "folder with one sub-folder of images per class",
        path=True,
        free=True,
        about_cache=True,
    )
    image_size: int = setting(
        256, int, DATA, "side of the square images, in pixels", low=8, high=4096, about_cache=True, unit="pixels"
    )
    resize: str = setting(
        "crop",
        str,
        DATA,
        "how an image becomes a square: crop cuts the centre out, squash keeps all but the aspect, pad adds black bars",
        choices=("crop", "squash", "pad"),
        about_cache=True,
    )
    num_users: int | str = setting(
        "all", int, DATA, "number of classes, in natural order", low=1, words=("all",), about_cache=True, unit="classes"
    )
    class_names: tuple[str, ...] = setting(
        ALL_CLASSES,
        str,
        DATA,
        "which classes, by name or by a pattern such as ID_*, or all; num_users takes the first of them",
        many=True,
        about_cache=True,
    )
    images_per_user: int | str = setting(
        50, int, DATA, "training images per class", low=1, words=("all",), about_cache=True, unit="images"
    )
    small_classes: str = setting(
        "refuse",
        str,
        DATA,
        "what to do where a class has fewer images than images_per_user: refuse, or take all that it has",
        choices=("refuse", "take"),
        about_cache=True,
    )
    split: str = setting(
        "random",
        str,
        DATA,
        "how training images are chosen in a class; contiguous suits overlapping windows of one recording",
        choices=("random", "contiguous"),
        about_cache=True,
    )
    split_gap: int = setting(
        4,
        int,
        DATA,
        "images left out between training, validation and test of a contiguous split",
        low=0,
        about_cache=True,
        unit="images",
    )
    split_start: float = setting(
        0.0,
        float,
        DATA,
        "where in each class a contiguous split begins, as a share of its images: another start is another split",
        low=0.0,
        high=1.0,
        about_cache=True,
    )
    validation_per_user: int = setting(
        10,
        int,
        DATA,
        "images per class on which a run is measured while it trains, at most a quarter of those not for training",
        low=0,
        about_cache=True,
        unit="images",
    )
    skip_bad_images: bool = setting(
        False, bool, DATA, "go on without images that cannot be read, and record them", about_cache=True
    )
    encode_batch_size: int = setting(
        16,
        int,
        CACHE,
        "images of 256x256 per encoder call on a GPU, of larger ones fewer; on a CPU, where it is faster, always one",
        low=1,
        high=1024,
        free=True,
        about_cache=True,
        unit="images",
    )
    encode_precision: str = setting(
        "float32",
        str,
        CACHE,
        "number format of the encoder; what is stored is float16 moments in any case",
        choices=("float32", "float16", "bfloat16"),
        free=True,
        about_cache=True,
    )


@dataclass(frozen=True)
class PreprocessSettings(ImageSettings):
    """Settings of preprocess_latents.py."""

    EVERYDAY: ClassVar[tuple[str, ...]] = (
        "data_path",
        "vae_path",
        "output_folder",
        "num_users",
        "class_names",
        "images_per_user",
        "image_size",
        "resize",
        "split",
        "split_gap",
        "splits",
        "skip_bad_images",
        "verify",
        "prune",
        "yes",
    )  # what --help shows

    output_folder: str = setting("./latents_cache", str, CACHE, "the cache folder", path=True)
    splits: tuple[str, ...] = setting(
        ("train", "validation"),
        str,
        DATA,
        "which images to encode",
        choices=("train", "validation", "test"),
        many=True,
        about_cache=True,
    )
    verify: bool = setting(
        False, bool, CACHE, "check a cache instead of filling it: every seal, and a few images decoded"
    )
    prune: bool = setting(
        False, bool, CACHE, "list what nobody needs in a cache instead of filling it; with --yes, remove it"
    )
    yes: bool = setting(False, bool, CACHE, "do what --prune lists")
    keep_for: tuple[str, ...] = setting(
        ("./results",),
        str,
        CACHE,
        "run folders whose latents --prune keeps, besides those of the cache's own split",
        many=True,
        needed=False,
        path=True,
    )


@dataclass(frozen=True)
class SamplingSettings(MachineSettings):
    """Settings of the scripts that sample images."""

    cond_scale: float = setting(
        1.5,
        float,
        SAMPLING,
        "guidance scale s in uncond + s * (cond - uncond); 1 is off",
        low=0.0,
        high=100.0,
        free=True,
    )
    guidance_interval: tuple[float, ...] = setting(
        (0.0, 1.0),
        float,
        SAMPLING,
        "part of the way from noise (0) to image (1) on which guidance acts; elsewhere a step takes one pass, not two",
        low=0.0,
        high=1.0,
        many=True,
        pair=True,
        free=True,
    )
    sampler: str = setting(
        "dpm++",
        str,
        SAMPLING,
        "solver: dpm++ is DPM-Solver++(2M)",
        choices=("dpm++", "ddim", "ddpm"),
        free=True,
    )
    sampling_timesteps: int | str = setting(
        "auto",
        int,
        SAMPLING,
        f"solver steps; auto is {AUTO_STEPS['dpm++']} for dpm++ (20 in runs that began with that), "
        f"{AUTO_STEPS['ddim']} for ddim, every step for ddpm",
        low=1,
        words=("auto",),
        free=True,
        unit="steps",
    )
    precision: str = setting(
        "auto",
        str,
        MACHINE,
        "number format of the network: auto is bfloat16 or float16 on a GPU, whichever is native, float32 on a CPU",
        choices=("auto", "float32", "float16", "bfloat16"),
    )


@dataclass(frozen=True)
class TrainSettings(SamplingSettings, ImageSettings):
    """Settings of train_latent_cfg.py."""

    EVERYDAY: ClassVar[tuple[str, ...]] = (
        "data_path",
        "vae_path",
        "latents_cache_folder",
        "results_folder",
        "resume_from",
        "init_from",
        "num_users",
        "class_names",
        "images_per_user",
        "image_size",
        "split",
        "train_num_steps",
        "train_batch_size",
        "save_and_sample_every",
        "max_hours",
    )  # what --help shows

    latents_cache_folder: str = setting("./latents_cache", str, CACHE, "the cache folder", path=True, free=True)
    results_folder: str = setting(
        "./results", str, SAVING, "where checkpoints, grids and logs go", path=True, free=True
    )
    resume_from: str | None = setting(
        None,
        str,
        SAVING,
        "run folder or checkpoint file to go on from, when results_folder is empty; may be read-only",
        words=("none",),
        path=True,
        free=True,
    )
    init_from: str | None = setting(
        None,
        str,
        SAVING,
        "run folder or checkpoint file whose weights a new run begins with; its classes may be others (freeze_network)",
        words=("none",),
        path=True,
    )
    freeze_network: bool = setting(
        False,
        bool,
        TRAINING,
        "with init_from: train the embeddings of classes alone, and keep all else; train_lr is then "
        f"{FROZEN_DEFAULTS['train_lr']}, and auto {FROZEN_PASSES} passes and {FROZEN_DEFAULTS['fewest_steps']} steps "
        "at least",
    )
    latent_norm: str = setting(
        "moments",
        str,
        DIFFUSION,
        "moments: per-channel shift and scale measured on training images; scale_factor: the VAE's own constant",
        choices=("moments", "scale_factor"),
    )
    latent_norm_images: int = setting(
        64, int, DIFFUSION, "training images that the measured normalisation looks at", low=1, unit="images"
    )
    dim: int = setting(48, int, NETWORK, "width of the U-Net's first level, in channels", low=4, unit="channels")
    dim_mults: tuple[int, ...] = setting(
        (1, 2, 4), int, NETWORK, "width of each level, as multiples of dim", low=1, many=True
    )
    attn_dim_head: int = setting(32, int, NETWORK, "channels per attention head", low=1, unit="channels")
    attn_heads: int = setting(4, int, NETWORK, "attention heads", low=1, unit="heads")
    cond_drop_prob: float = setting(
        0.1,
        float,
        DIFFUSION,
        "probability that a training latent loses its class, for guidance",
        low=0.0,
        high=1.0,
    )
    timesteps: int = setting(1000, int, DIFFUSION, "diffusion timesteps", low=2, high=1_000_000, unit="steps")
    objective: str = setting(
        "pred_v", str, DIFFUSION, "what the network predicts", choices=("pred_v", "pred_noise", "pred_x0")
    )
    beta_schedule: str = setting("cosine", str, DIFFUSION, "noise schedule", choices=("cosine", "linear"))
    noise_shift: float = setting(
        0.5,
        float,
        DIFFUSION,
        "how much noisier each timestep is than in the schedule: added to log(sigma / alpha)",
        low=-3.0,
        high=3.0,
    )
    min_snr_loss_weight: bool = setting(True, bool, DIFFUSION, "weigh the loss by min-SNR")
    min_snr_gamma: float = setting(5.0, float, DIFFUSION, "gamma of min-SNR", low=0.01)
    train_batch_size: int = setting(8, int, TRAINING, "latents per forward pass", low=1, unit="latents")
    gradient_accumulate_every: int = setting(
        2, int, TRAINING, "forward passes per step; a step sees train_batch_size times this", low=1
    )
    train_lr: float = setting(4e-4, float, TRAINING, "learning rate of Adam", low=0.0)
    train_num_steps: int | str = setting(
        "auto",
        int,
        TRAINING,
        f"steps in all; auto is as many as see each training image {AUTO_PASSES} times, and at least fewest_steps",
        low=1,
        words=("auto",),
        free=True,
        unit="steps",
    )
    fewest_steps: int = setting(
        1500,
        int,
        TRAINING,
        "steps that train_num_steps auto takes at least: few images need as many as some hundred do",
        low=0,
        free=True,
        unit="steps",
    )
    join_passes: bool = setting(
        True,
        bool,
        TRAINING,
        "compute the forward passes of a step as one where they are small: the same training, and faster",
        free=True,
    )
    time_shift: float = setting(
        1 / 16,
        float,
        TRAINING,
        "latents are moved along the width, time in a spectrogram, by up to this share of it, each time they are seen",
        low=0.0,
        high=0.5,
    )
    learn_edges: bool = setting(
        False,
        bool,
        TRAINING,
        "count columns that time_shift fills with the edge in the loss, as older runs do: samples get such edges",
    )
    max_grad_norm: float = setting(1.0, float, TRAINING, "gradients are clipped to this norm", low=0.0)
    ema_decay: float = setting(0.9995, float, TRAINING, "decay of the averaged weights", low=0.0, high=1.0)
    ema_update_every: int = setting(3, int, TRAINING, "steps between updates of the average", low=1, unit="steps")
    max_hours: float | None = setting(
        None,
        float,
        SAVING,
        "save and stop before this many hours after the start of the process",
        low=0.0,
        words=("none",),
        free=True,
        unit="hours",
    )
    save_and_sample_every: int = setting(
        2000, int, SAVING, "steps between checkpoints and grids", low=1, free=True, unit="steps"
    )
    num_samples: int = setting(
        4, int, SAVING, "columns of the sample grid; 0 makes no grid", low=0, free=True, unit="images"
    )
    log_every: int = setting(100, int, SAVING, "steps between lines of metrics.jsonl", low=1, free=True, unit="steps")
    trackers: tuple[str, ...] = setting(
        ("auto",),
        str,
        SAVING,
        "where figures and grids go, too: auto is tensorboard where it is installed; wandb sends them to its server",
        choices=("auto", "none", "tensorboard", "wandb"),
        many=True,
        free=True,
    )
    wandb_project: str = setting("gait-latents", str, SAVING, "project in Weights & Biases", free=True)
    wandb_name: str | None = setting(
        None,
        str,
        SAVING,
        "name of the run in Weights & Biases; none is that of results_folder",
        words=("none",),
        free=True,
    )
    compile: str = setting(
        "auto",
        str,
        MACHINE,
        "compile the network: auto does so in runs long enough to repay it, where a compiler is at hand",
        choices=("auto", "true", "false"),
        free=True,
    )
    deterministic: bool = setting(False, bool, MACHINE, "bit-exact resume on a GPU, at some cost in speed", free=True)


@dataclass(frozen=True)
class GenerateSettings(SamplingSettings):
    """Settings of generate.py."""

    EVERYDAY: ClassVar[tuple[str, ...]] = (
        "checkpoint",
        "classes",
        "images_per_class",
        "fill_up_to",
        "output_folder",
        "image_format",
        "strip",
        "seed",
        "vae_path",
        "cond_scale",
        "guidance_interval",
        "sampler",
        "sampling_timesteps",
        "device",
        "precision",
    )  # what --help shows

    checkpoint: str = setting("./results", str, OUTPUT, "run folder, or one checkpoint file in it", path=True)
    classes: tuple[str, ...] = setting(
        ALL_CLASSES, str, OUTPUT, "class names, or patterns such as ID_*, or all", many=True
    )
    images_per_class: int | tuple[int | str, ...] = setting(
        50,
        int,
        OUTPUT,
        "images per class; ID_3=100 ID_4=20 50 is 100 of ID_3, 20 of ID_4 and 50 of each other class",
        low=1,
        unit="images",
        many=True,
        by_name=True,
    )
    fill_up_to: int | None = setting(
        None,
        int,
        OUTPUT,
        "as many images of each class as make this number together with its training images",
        low=1,
        words=("none",),
        unit="images",
    )
    from_real: float | None = setting(
        None,
        float,
        OUTPUT,
        "begin with training images instead of noise: 0 gives them back as the VAE draws them, 1 keeps next to nothing",
        low=0.0,
        high=1.0,
        words=("none",),
    )
    vae_path: str | None = setting(
        None, str, CACHE, "the VAE that decodes; none takes the run's own", words=("none",), path=True
    )
    output_folder: str = setting("./synthetic", str, OUTPUT, "where the images go", path=True)
    image_format: str = setting(
        "auto", str, OUTPUT, "auto is the format of the training images", choices=("auto", "jpg", "png")
    )
    strip: tuple[float, ...] = setting(
        (),
        float,
        OUTPUT,
        "make only a picture of classes x these guidance scales",
        low=0.0,
        many=True,
        needed=False,
    )


@dataclass(frozen=True)
class EvaluateSettings(MachineSettings):
    """Settings of evaluate_images.py."""

    EVERYDAY: ClassVar[tuple[str, ...]] = (
        "checkpoint",
        "synthetic_path",
        "output_folder",
        "data_path",
        "vae_path",
        "inception_weights",
        "classifier",
        "classifier_steps",
        "classifier_seeds",
        "classifier_image_size",
        "sweep",
        "sweep_checkpoints",
        "sweep_images",
        "seed",
        "device",
    )  # what --help shows

    checkpoint: str = setting("./results", str, EVALUATION, "run folder, or one checkpoint file in it", path=True)
    synthetic_path: str = setting(
        "./synthetic", str, EVALUATION, "folder with one sub-folder of generated images per class", path=True
    )
    output_folder: str = setting("./evaluation", str, EVALUATION, "where the report goes", path=True)
    data_path: str | None = setting(
        None, str, DATA, "the real images; none takes the run's own folder", words=("none",), path=True
    )
    vae_path: str | None = setting(
        None, str, CACHE, "the VAE that encodes; none takes the run's own", words=("none",), path=True
    )
    neighbours: int = setting(5, int, EVALUATION, "k of precision, recall, density and coverage", low=1, high=1000)
    inception_weights: str | None = setting(
        None,
        str,
        EVALUATION,
        f"weights for FID with Inception features: a file, or {DOWNLOAD}; none leaves FID out",
        words=("none", DOWNLOAD),
        path=True,
    )
    classifier: str = setting(
        "auto",
        str,
        EVALUATION,
        "train classifiers with and without the generated images, and test them: auto does so on a GPU",
        choices=("auto", "true", "false"),
    )
    classifier_steps: int = setting(1000, int, EVALUATION, "training steps of each classifier", low=1)
    classifier_seeds: int = setting(3, int, EVALUATION, "classifiers of each kind, to see the spread", low=1, high=100)
    classifier_image_size: int = setting(
        64, int, EVALUATION, "side of the images that the classifiers see, in pixels", low=8, high=512
    )
    combine: tuple[str, ...] = setting(
        (),
        str,
        EVALUATION,
        "print the classifiers of these evaluation folders in one table, instead of evaluating",
        many=True,
        path=True,
        needed=False,
    )
    sweep: tuple[float, ...] = setting(
        (),
        float,
        EVALUATION,
        "sample at these guidance scales instead of looking at images, and compare",
        low=0.0,
        high=100.0,
        many=True,
        needed=False,
    )
    sweep_checkpoints: tuple[str, ...] = setting(
        ("newest",), str, EVALUATION, "checkpoints of the sweep: newest, all, or their steps", many=True
    )
    sweep_images: int = setting(40, int, EVALUATION, "samples per class at each point of the sweep", low=1)


def _as_in(cls: type, name: str) -> Any:
    """Makes the setting that another script has under this name."""
    (known,) = (f for f in fields(cls) if f.name == name)
    return field(default=known.default, metadata=known.metadata)


@dataclass(frozen=True)
class ExportSettings:
    """Settings of `python -m gait_latents.export`."""

    checkpoint: str = _as_in(GenerateSettings, "checkpoint")
    cond_scale: float = _as_in(GenerateSettings, "cond_scale")
    guidance_interval: tuple[float, ...] = _as_in(GenerateSettings, "guidance_interval")
    ddim_steps: int = setting(
        100, int, SAMPLING, "levels of noise listed for a DDIM loop; at most as many as the model has timesteps", low=1
    )
    latents: str | None = setting(
        None,
        str,
        SAVING,
        "export the training latents of a cache in place of a model; webdataset writes tar shards for many nodes",
        choices=("webdataset",),
        words=("none",),
    )
    latents_cache_folder: str = setting(
        "./latents_cache", str, SAVING, "the cache whose latents are exported", path=True
    )
    rows_per_shard: int = setting(4096, int, SAVING, "latents in a shard; each process needs shards of its own", low=1)
    seed: int = _as_in(MachineSettings, "seed")
    output_folder: str = setting("./exported", str, SAVING, "where the exported model, or the shards, go", path=True)


SCRIPTS: dict[str, type] = {
    "preprocess_latents.py": PreprocessSettings,
    "train_latent_cfg.py": TrainSettings,
    "generate.py": GenerateSettings,
    "evaluate_images.py": EvaluateSettings,
    "python -m gait_latents.export": ExportSettings,
}
# The cache folder has two names: in preprocess_latents.py it is what comes out.
_OTHER_NAMES = {
    "output_folder": "latents_cache_folder",
    "latents_cache_folder": "output_folder",
    "learning_rate": "train_lr",
    "epochs": "train_num_steps",
    "guidance": "cond_scale",
    "guidance_scale": "cond_scale",
}
# Settings of earlier versions: what a file of settings says where nobody used one, and what takes its place.
_GONE = {
    "dry_run": ("false", "the disk is told at the start, and the length of a training after its first 50 steps"),
    "import_folder": ("null", "give --data_path, for the images of imported latents are encoded again"),
    "import_scale_factor": ("0.18215", "it belonged to --import_folder"),
    "import_split": ("null", "choose training images with --images_per_user, --split and --seed"),
}


vars(CATALOGUE).update(scripts=SCRIPTS, groups=GROUPS, other_names=_OTHER_NAMES, gone=_GONE)


# --- storing the settings of a run -------------------------------------------------------------------------


AUTO_STEPS_BEFORE = {"dpm++": 20, "ddim": 250}  # of runs that do not store theirs
# Values that older runs and images count as having, whatever today's defaults: what was done before these settings.
_BEFORE = {
    "guidance_interval": [0.0, 1.0],
    "time_shift": 0.0,
    "noise_shift": 0.0,
    "resize": "crop",
    "class_names": list(ALL_CLASSES),
    "small_classes": "refuse",
}
# The same of settings that images do not record.
_BEFORE_IN_RUNS = {
    "scale_factor": None,
    "shift_factor": None,
    "validation_per_user": 0,
    "split_start": 0.0,
    "fewest_steps": 0,
    "learn_edges": True,
    "freeze_network": False,
}


def with_later_settings(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the stored settings of a run or of images, with the values of settings that are newer than it added."""
    return {**_BEFORE, **stored}


def with_later_settings_of_runs(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the stored settings of a run, with the values of settings that are newer than it added."""
    return {**_BEFORE_IN_RUNS, **with_later_settings(stored)}


def differences_on_resume(stored: Mapping[str, Any], settings: Any) -> list[tuple[str, Any, Any]]:
    """Lists (name, stored value, value asked for) of settings that must not change when a run goes on.

    The batch counts as one setting: 8 x 2 and 16 x 1 see the same latents in the same steps.
    """
    asked = to_dict(settings)
    fixed = {name for name, spec in specs(type(settings)).items() if not spec.free and name in stored}
    batch = ("train_batch_size", "gradient_accumulate_every")
    if fixed.issuperset(batch) and math.prod(stored[n] for n in batch) == math.prod(asked[n] for n in batch):
        fixed -= set(batch)
    return [(name, stored[name], asked[name]) for name in asked if name in fixed and stored[name] != asked[name]]
