"""Every setting once: type, default, limits and help; read from flags and YAML files.

One frozen dataclass per script. A value is looked up in this order, and `Resolved.sources` remembers where it
was found: flag > --config file > the run being resumed > manifest of the cache > default. Flags and files go
through the same text parser, so `1e-4` means the same in both. Nothing here imports torch: `--help` is instant.
"""

import argparse
import difflib
import math
import os
import re
import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn

import yaml


class UserError(Exception):
    """A mistake that its user can mend; a script prints it as one line on stderr and exits with 2."""


AUTO_PASSES = 150  # of training over the images; after 130 to 200, samples turned into copies (docs/log.md)
# Solver steps where sampling_timesteps is auto (docs/log.md); a sampler that is not here takes every training timestep.
AUTO_STEPS = {"dpm++": 12, "ddim": 250}
DOWNLOAD = "download"  # a word that stands in place of a path, for what can be fetched


# --- what a setting is -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spec:
    """The facts about one setting besides its name and default."""

    kind: type  # int, float, bool or str
    help: str
    group: str
    words: tuple[str, ...] = ()  # texts accepted besides the kind, such as "all"; "none" becomes None
    choices: tuple[str, ...] = ()
    low: float | None = None  # smallest value allowed
    high: float | None = None  # largest value allowed
    unit: str = ""  # what a number counts, such as "steps"
    many: bool = False  # a list, as separate words on the command line
    needed: bool = True  # a list must not be empty
    pair: bool = False  # a list of two numbers, the first no larger than the second
    path: bool = False  # a file or folder name
    free: bool = False  # may change when a run is resumed
    about_cache: bool = False  # the manifest of the cache supplies a default


def _setting(default: Any, kind: type, group: str, help: str, **facts: Any) -> Any:
    return field(default=default, metadata={"spec": Spec(kind=kind, help=help, group=group, **facts)})


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

    seed: int = _setting(
        42, int, DATA, "seed of the split and of every random draw", low=0, high=2**63 - 1, about_cache=True
    )
    device: str = _setting("auto", str, MACHINE, "auto, cpu, cuda or cuda:N", free=True)


@dataclass(frozen=True)
class ImageSettings(MachineSettings):
    """Settings of the scripts that read images: what is encoded, and by which VAE."""

    vae_path: str = _setting(
        "/kaggle/input/kl-vae-best-pt/kl_vae_best.pt",
        str,
        CACHE,
        "KL-VAE: a .pt, .pth or .safetensors file, a diffusers folder, or a hub id",
        path=True,
        free=True,
        about_cache=True,
    )
    data_path: str = _setting(
        "/kaggle/input/organized-gait-dataset/Normal_line",
        str,
        DATA,
        "folder with one sub-folder of images per class",
        path=True,
        free=True,
        about_cache=True,
    )
    image_size: int = _setting(
        256, int, DATA, "side of the square images, in pixels", low=8, high=4096, about_cache=True, unit="pixels"
    )
    num_users: int | str = _setting(
        "all", int, DATA, "number of classes, in natural order", low=1, words=("all",), about_cache=True, unit="classes"
    )
    images_per_user: int | str = _setting(
        50, int, DATA, "training images per class", low=1, words=("all",), about_cache=True, unit="images"
    )
    split: str = _setting(
        "random",
        str,
        DATA,
        "how training images are chosen in a class; contiguous suits overlapping windows of one recording",
        choices=("random", "contiguous"),
        about_cache=True,
    )
    split_gap: int = _setting(
        4,
        int,
        DATA,
        "images left out between training and test of a contiguous split",
        low=0,
        about_cache=True,
        unit="images",
    )
    skip_bad_images: bool = _setting(
        False, bool, DATA, "go on without images that cannot be read, and record them", about_cache=True
    )
    encode_batch_size: int = _setting(
        16,
        int,
        CACHE,
        "images per encoder call on a GPU; on a CPU, where it is faster, always one",
        low=1,
        high=1024,
        free=True,
        about_cache=True,
        unit="images",
    )
    encode_precision: str = _setting(
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

    output_folder: str = _setting("./latents_cache", str, CACHE, "the cache folder", path=True)
    splits: tuple[str, ...] = _setting(
        ("train",),
        str,
        DATA,
        "which images to encode: train, or train test",
        choices=("train", "test"),
        many=True,
    )
    verify: bool = _setting(
        False, bool, CACHE, "check a cache instead of filling it: every seal, and a few images decoded"
    )
    prune: bool = _setting(
        False, bool, CACHE, "list what nobody needs in a cache instead of filling it; with --yes, remove it"
    )
    yes: bool = _setting(False, bool, CACHE, "do what --prune lists")
    keep_for: tuple[str, ...] = _setting(
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

    cond_scale: float = _setting(
        1.5,
        float,
        SAMPLING,
        "guidance scale s in uncond + s * (cond - uncond); 1 is off",
        low=0.0,
        high=100.0,
        free=True,
    )
    guidance_interval: tuple[float, ...] = _setting(
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
    sampler: str = _setting(
        "dpm++",
        str,
        SAMPLING,
        "solver: dpm++ is DPM-Solver++(2M)",
        choices=("dpm++", "ddim", "ddpm"),
        free=True,
    )
    sampling_timesteps: int | str = _setting(
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
    precision: str = _setting(
        "auto",
        str,
        MACHINE,
        "number format of the network: auto is bfloat16 or float16 on a GPU, whichever is native, float32 on a CPU",
        choices=("auto", "float32", "float16", "bfloat16"),
    )


@dataclass(frozen=True)
class TrainSettings(SamplingSettings, ImageSettings):
    """Settings of train_latent_cfg.py."""

    latents_cache_folder: str = _setting("./latents_cache", str, CACHE, "the cache folder", path=True, free=True)
    results_folder: str = _setting(
        "./results", str, SAVING, "where checkpoints, grids and logs go", path=True, free=True
    )
    resume_from: str | None = _setting(
        None,
        str,
        SAVING,
        "run folder or checkpoint file to go on from, when results_folder is empty; may be read-only",
        words=("none",),
        path=True,
        free=True,
    )
    latent_norm: str = _setting(
        "moments",
        str,
        DIFFUSION,
        "moments: per-channel shift and scale measured on training images; scale_factor: the VAE's own constant",
        choices=("moments", "scale_factor"),
    )
    latent_norm_images: int = _setting(
        64, int, DIFFUSION, "training images that the measured normalisation looks at", low=1, unit="images"
    )
    dim: int = _setting(48, int, NETWORK, "width of the U-Net's first level, in channels", low=4, unit="channels")
    dim_mults: tuple[int, ...] = _setting(
        (1, 2, 4), int, NETWORK, "width of each level, as multiples of dim", low=1, many=True
    )
    attn_dim_head: int = _setting(32, int, NETWORK, "channels per attention head", low=1, unit="channels")
    attn_heads: int = _setting(4, int, NETWORK, "attention heads", low=1, unit="heads")
    cond_drop_prob: float = _setting(
        0.1,
        float,
        DIFFUSION,
        "probability that a training latent loses its class, for guidance",
        low=0.0,
        high=1.0,
    )
    timesteps: int = _setting(1000, int, DIFFUSION, "diffusion timesteps", low=2, high=1_000_000, unit="steps")
    objective: str = _setting(
        "pred_v", str, DIFFUSION, "what the network predicts", choices=("pred_v", "pred_noise", "pred_x0")
    )
    beta_schedule: str = _setting("cosine", str, DIFFUSION, "noise schedule", choices=("cosine", "linear"))
    noise_shift: float = _setting(
        0.5,
        float,
        DIFFUSION,
        "how much noisier each timestep is than in the schedule: added to log(sigma / alpha)",
        low=-3.0,
        high=3.0,
    )
    min_snr_loss_weight: bool = _setting(True, bool, DIFFUSION, "weigh the loss by min-SNR")
    min_snr_gamma: float = _setting(5.0, float, DIFFUSION, "gamma of min-SNR", low=0.01)
    train_batch_size: int = _setting(8, int, TRAINING, "latents per forward pass", low=1, unit="latents")
    gradient_accumulate_every: int = _setting(
        2, int, TRAINING, "forward passes per step; a step sees train_batch_size times this", low=1
    )
    train_lr: float = _setting(4e-4, float, TRAINING, "learning rate of Adam", low=0.0)
    train_num_steps: int | str = _setting(
        "auto",
        int,
        TRAINING,
        f"steps in all; auto is as many as see each training image {AUTO_PASSES} times",
        low=1,
        words=("auto",),
        free=True,
        unit="steps",
    )
    join_passes: bool = _setting(
        True,
        bool,
        TRAINING,
        "compute the forward passes of a step as one where they are small: the same training, and faster",
        free=True,
    )
    time_shift: float = _setting(
        1 / 16,
        float,
        TRAINING,
        "latents are moved along the width, time in a spectrogram, by up to this share of it, each time they are seen",
        low=0.0,
        high=0.5,
    )
    max_grad_norm: float = _setting(1.0, float, TRAINING, "gradients are clipped to this norm", low=0.0)
    ema_decay: float = _setting(0.9995, float, TRAINING, "decay of the averaged weights", low=0.0, high=1.0)
    ema_update_every: int = _setting(3, int, TRAINING, "steps between updates of the average", low=1, unit="steps")
    max_hours: float | None = _setting(
        None,
        float,
        SAVING,
        "save and stop before this many hours after the start of the process",
        low=0.0,
        words=("none",),
        free=True,
        unit="hours",
    )
    save_and_sample_every: int = _setting(
        2000, int, SAVING, "steps between checkpoints and grids", low=1, free=True, unit="steps"
    )
    num_samples: int = _setting(
        4, int, SAVING, "columns of the sample grid; 0 makes no grid", low=0, free=True, unit="images"
    )
    log_every: int = _setting(100, int, SAVING, "steps between lines of metrics.jsonl", low=1, free=True, unit="steps")
    trackers: tuple[str, ...] = _setting(
        ("auto",),
        str,
        SAVING,
        "where figures and grids go, too: auto is tensorboard where it is installed; wandb sends them to its server",
        choices=("auto", "none", "tensorboard", "wandb"),
        many=True,
        free=True,
    )
    wandb_project: str = _setting("gait-latents", str, SAVING, "project in Weights & Biases", free=True)
    wandb_name: str | None = _setting(
        None,
        str,
        SAVING,
        "name of the run in Weights & Biases; none is that of results_folder",
        words=("none",),
        free=True,
    )
    compile: str = _setting(
        "auto",
        str,
        MACHINE,
        "compile the network: auto does so in runs long enough to repay it, where a compiler is at hand",
        choices=("auto", "true", "false"),
        free=True,
    )
    deterministic: bool = _setting(False, bool, MACHINE, "bit-exact resume on a GPU, at some cost in speed", free=True)


@dataclass(frozen=True)
class GenerateSettings(SamplingSettings):
    """Settings of generate.py."""

    checkpoint: str = _setting("./results", str, OUTPUT, "run folder, or one checkpoint file in it", path=True)
    classes: tuple[str, ...] = _setting(("all",), str, OUTPUT, "class names, or all", many=True)
    images_per_class: int = _setting(50, int, OUTPUT, "images per class", low=1, unit="images")
    vae_path: str | None = _setting(
        None, str, CACHE, "the VAE that decodes; none takes the run's own", words=("none",), path=True
    )
    output_folder: str = _setting("./synthetic", str, OUTPUT, "where the images go", path=True)
    image_format: str = _setting(
        "auto", str, OUTPUT, "auto is the format of the training images", choices=("auto", "jpg", "png")
    )
    strip: tuple[float, ...] = _setting(
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

    checkpoint: str = _setting("./results", str, EVALUATION, "run folder, or one checkpoint file in it", path=True)
    synthetic_path: str = _setting(
        "./synthetic", str, EVALUATION, "folder with one sub-folder of generated images per class", path=True
    )
    output_folder: str = _setting("./evaluation", str, EVALUATION, "where the report goes", path=True)
    data_path: str | None = _setting(
        None, str, DATA, "the real images; none takes the run's own folder", words=("none",), path=True
    )
    vae_path: str | None = _setting(
        None, str, CACHE, "the VAE that encodes; none takes the run's own", words=("none",), path=True
    )
    neighbours: int = _setting(5, int, EVALUATION, "k of precision, recall, density and coverage", low=1, high=1000)
    inception_weights: str | None = _setting(
        None,
        str,
        EVALUATION,
        f"weights for FID with Inception features: a file, or {DOWNLOAD}; none leaves FID out",
        words=("none", DOWNLOAD),
        path=True,
    )
    classifier: str = _setting(
        "auto",
        str,
        EVALUATION,
        "train classifiers with and without the generated images, and test them: auto does so on a GPU",
        choices=("auto", "true", "false"),
    )
    classifier_steps: int = _setting(1000, int, EVALUATION, "training steps of each classifier", low=1)
    classifier_seeds: int = _setting(3, int, EVALUATION, "classifiers of each kind, to see the spread", low=1, high=100)
    classifier_image_size: int = _setting(
        64, int, EVALUATION, "side of the images that the classifiers see, in pixels", low=8, high=512
    )
    sweep: tuple[float, ...] = _setting(
        (),
        float,
        EVALUATION,
        "sample at these guidance scales instead of looking at images, and compare",
        low=0.0,
        high=100.0,
        many=True,
        needed=False,
    )
    sweep_checkpoints: tuple[str, ...] = _setting(
        ("newest",), str, EVALUATION, "checkpoints of the sweep: newest, all, or their steps", many=True
    )
    sweep_images: int = _setting(40, int, EVALUATION, "samples per class at each point of the sweep", low=1)


def _as_in(cls: type, name: str) -> Any:
    """Makes the same setting as another script has."""
    (known,) = (f for f in fields(cls) if f.name == name)
    return field(default=known.default, metadata=known.metadata)


@dataclass(frozen=True)
class ExportSettings:
    """Settings of export_model.py."""

    checkpoint: str = _as_in(GenerateSettings, "checkpoint")
    cond_scale: float = _as_in(GenerateSettings, "cond_scale")
    guidance_interval: tuple[float, ...] = _as_in(GenerateSettings, "guidance_interval")
    ddim_steps: int = _setting(
        100, int, SAMPLING, "levels of noise listed for a DDIM loop; at most as many as the model has timesteps", low=1
    )
    output_folder: str = _setting("./exported", str, SAVING, "where the exported model goes", path=True)


SCRIPTS: dict[str, type] = {
    "preprocess_latents.py": PreprocessSettings,
    "train_latent_cfg.py": TrainSettings,
    "generate.py": GenerateSettings,
    "evaluate_images.py": EvaluateSettings,
    "export_model.py": ExportSettings,
}


def specs(cls: type) -> dict[str, Spec]:
    """Returns the facts about each setting of one script, in order."""
    return {f.name: f.metadata["spec"] for f in fields(cls)}


def defaults(cls: type) -> dict[str, Any]:
    """Returns the default of each setting of one script."""
    return {f.name: f.default for f in fields(cls) if f.default is not MISSING}


# --- text to value and back --------------------------------------------------------------------------------

_SWITCH = {
    "true": True,
    "yes": True,
    "on": True,
    "1": True,
    "false": False,
    "no": False,
    "off": False,
    "0": False,
}
_THOUSANDS = re.compile(r"[0-9]{1,3}(,[0-9]{3})+")
_KIND_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}


def parse(name: str, texts: Sequence[str], spec: Spec, where: str) -> Any:
    """Turns the words given for one setting into its value; raises UserError naming the setting and `where`."""
    if spec.many:
        if not texts and spec.needed:
            raise UserError(f"{name} in {where} needs at least one value")
        values = tuple(_parse_word(name, text, spec, where) for text in texts)
        if spec.pair and (len(values) != 2 or values[0] > values[1]):
            raise UserError(f"{name} is {' '.join(texts)} in {where}; it takes two numbers, the smaller one first")
        return values
    if len(texts) != 1:
        raise UserError(f"{name} takes one value, not {len(texts)} ({' '.join(texts)}), in {where}")
    return _parse_word(name, texts[0], spec, where)


def _parse_word(name: str, text: str, spec: Spec, where: str) -> Any:
    word = text.strip()
    if "none" in spec.words and word.lower() in ("none", "null", "~", ""):
        return None
    if word in spec.words:
        return word
    if "true" in spec.choices and word.lower() in _SWITCH:  # a switch with a third position
        return str(_SWITCH[word.lower()]).lower()
    value = _convert(word, spec.kind)
    if value is None or (spec.kind is str and not word):
        wanted = " or ".join([_KIND_NAMES[spec.kind], *spec.words]) + (", or several as separate words" * spec.many)
        raise UserError(f"{name} is {text!r} in {where}; it takes {wanted}")
    if spec.choices and value not in spec.choices:
        raise UserError(f"{name} is {text!r} in {where}; it is one of {', '.join(spec.choices)}")
    if spec.low is not None and value < spec.low:
        raise UserError(f"{name} is {text} in {where}; the smallest allowed is {spec.low:g}")
    high = _LARGEST_INT if spec.high is None and spec.kind is int else spec.high
    if high is not None and value > high:
        raise UserError(f"{name} is {text} in {where}; the largest allowed is {high:g}")
    if spec.path and not _can_be_path(value):
        raise UserError(f"{name} is {text!r} in {where}; that can be no path")
    return str(Path(value).expanduser()) if spec.path and value.startswith("~") else value


_LARGEST_INT = 2**63 - 1  # what torch can count


def _can_be_path(text: str) -> bool:
    """Says whether the system can be asked about this name; an escape in YAML or JSON may stand for anything."""
    try:
        name = os.fsencode(text)
    except UnicodeEncodeError:
        return False
    return b"\0" not in name and len(name) < 4096 and all(len(part) < 256 for part in name.split(b"/"))


def _convert(word: str, kind: type) -> Any:
    if kind is bool:
        return _SWITCH.get(word.lower())
    if kind is int and _THOUSANDS.fullmatch(word):  # but 1,2,4 is no number
        word = word.replace(",", "")
    try:
        value = kind(word)
    except ValueError:
        return None
    return None if kind is float and not math.isfinite(value) else value


def to_words(value: Any) -> list[str]:
    """Turns a value back into the words that `parse` reads; the inverse of `parse`."""
    if isinstance(value, list | tuple):
        return [word for item in value for word in to_words(item)]
    if isinstance(value, bool):
        return [str(value).lower()]
    return ["none" if value is None else str(value)]


def show(value: Any) -> str:
    """Shows a value as it would be typed."""
    return " ".join(to_words(value)) or "(nothing)"


# --- layers ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """Values of some settings and the place that they come from."""

    source: str
    values: dict[str, Any]


@dataclass(frozen=True)
class Resolved:
    """The settings of one script, and for each the place that its value comes from."""

    settings: Any
    sources: dict[str, str]

    def changes(self) -> list[str]:
        """Lists the settings that differ from their defaults, in lines that begin with where they come from."""
        standard, found = defaults(type(self.settings)), {}
        for name, source in self.sources.items():
            if getattr(self.settings, name) != standard[name]:
                found.setdefault(source, []).append(f"{name} {show(getattr(self.settings, name))}")
        return [line for source, texts in found.items() for line in _wrap(f"{source}: ", texts)]


def _wrap(start: str, texts: list[str]) -> list[str]:
    """Joins texts by commas into lines of about 100 characters, breaking none of them."""
    glued = ", ".join(text.replace(" ", "\0") for text in texts)
    lines = textwrap.wrap(start + glued, 100, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)
    return [line.replace("\0", " ") for line in lines]


def resolve(cls: type, layers: Iterable[Layer]) -> Resolved:
    """Puts layers together, the first one that has a value winning, and the defaults last."""
    values, sources = {}, {}
    layers = [*layers, Layer("default", defaults(cls))]
    for name in specs(cls):
        layer = next(layer for layer in layers if name in layer.values)
        values[name], sources[name] = layer.values[name], layer.source
    return Resolved(cls(**values), sources)


def stored_layer(cls: type, source: str, values: Mapping[str, Any], *, only_about_cache: bool = False) -> Layer:
    """Makes a layer of values stored earlier (settings of a run, manifest), read by the same text parser.

    Names that this version does not know are left out: an older or newer file still gives what it can.
    """
    known = {name: spec for name, spec in specs(cls).items() if spec.about_cache or not only_about_cache}
    found = {name: values[name] for name in known if name in values}
    for name, value in found.items():
        if not all(item is None or isinstance(item, str | int | float) for item in _items(value)):
            raise UserError(f"{name} in {source} is neither a value nor a list of values")
    return Layer(source, {name: parse(name, to_words(value), known[name], source) for name, value in found.items()})


def _items(value: Any) -> Iterable[Any]:
    return value if isinstance(value, list | tuple) else [value]


def read_command_line(cls: type, argv: Sequence[str] | None, *, description: str | None) -> list[Layer]:
    """Parses the flags of one script and the file that --config names: the two highest layers.

    Raises:
        UserError: for an unknown flag or key (the nearest known one is named) or a value of the wrong type.
    """
    typed, unknown = _parser(cls, description).parse_known_args(argv)
    if unknown:
        raise UserError(_unknown_message(unknown[0].split("=")[0], specs(cls), prefix="--"))
    words = {name: value if isinstance(value, list) else [value] for name, value in vars(typed).items()}
    config_file = words.pop("config", [None])[0]
    values = {name: parse(name, texts, specs(cls)[name], f"--{name}") for name, texts in words.items()}
    layers = [Layer("flag", values)]
    return layers if config_file is None else [*layers, read_file(cls, config_file)]


def read_file(cls: type, path: str) -> Layer:
    """Reads the settings of one script from a YAML file.

    One file may serve several scripts: a key of another script is checked and then left alone.
    """
    known = {name: spec for other in SCRIPTS.values() for name, spec in specs(other).items()}
    values = {}
    for name, texts in _read_pairs(path):
        if name in _GONE and texts == [_GONE[name][0]]:
            continue
        if name not in known:
            raise UserError(f"{_unknown_message(name, known)}, in {path}")
        value = parse(name, texts, specs(cls).get(name, known[name]), path)
        if name in specs(cls):
            values[name] = value
    return Layer(f"--config {path}", values)


def _read_pairs(path: str) -> list[tuple[str, list[str]]]:
    try:
        root = yaml.compose(Path(path).read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise UserError(f"--config {path} is not valid YAML: {' '.join(str(error).split())}") from error
    if root is None:
        return []
    if not isinstance(root, yaml.MappingNode) or not all(isinstance(key, yaml.ScalarNode) for key, _ in root.value):
        raise UserError(f"--config {path} must hold lines of the form 'name: value'")
    pairs = [(key.value, _node_words(key.value, node, path)) for key, node in root.value]
    for name, count in Counter(name for name, _ in pairs).items():
        if count > 1:
            raise UserError(f"{name} stands {count} times in {path}")
    return pairs


def _node_words(name: str, node: yaml.Node, path: str) -> list[str]:
    items = node.value if isinstance(node, yaml.SequenceNode) else [node]
    if not all(isinstance(item, yaml.ScalarNode) for item in items):
        raise UserError(f"{name} in {path} (line {node.start_mark.line + 1}) must be a value or a list of values")
    return [item.value for item in items]


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


def _unknown_message(name: str, known: Iterable[str], prefix: str = "") -> str:
    plain, known = name.lstrip("-").replace("-", "_"), list(known)
    if plain in _GONE:
        return f"there is no setting {name} any more; {_GONE[plain][1]}"
    near = [other for other in (_OTHER_NAMES.get(plain),) if other in known]
    near += difflib.get_close_matches(plain, known, n=1, cutoff=0.8)
    near += [other for other in known if f"_{plain}_" in f"_{other}_"]  # a part of a name, in whole words
    near += difflib.get_close_matches(plain, known, n=1)
    elsewhere = [script for script, cls in SCRIPTS.items() if plain in specs(cls)]
    if near:
        hint = f"did you mean {prefix}{near[0]}?"
    elif elsewhere:
        hint = f"it is one of {' and '.join(elsewhere)}"
    else:
        hint = "--help lists the settings"
    return f"there is no setting {name}; {hint}"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --help lists the settings")


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32, width=110)


def _parser(cls: type, description: str | None) -> argparse.ArgumentParser:
    parser = _Parser(
        description=description,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        formatter_class=_HelpFormatter,
        usage="%(prog)s [--config FILE] [--SETTING VALUE ...]",
        epilog=_FREE_NOTE if can_resume(cls) else None,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file of settings; flags win over it")
    known = specs(cls)
    groups = {
        group: parser.add_argument_group(group) for group in dict.fromkeys(known[name].group for name in by_group(cls))
    }
    for name, spec in known.items():
        group = groups[spec.group]
        words = {"nargs": "*"} if spec.many else {"nargs": "?", "const": "true"} if spec.kind is bool else {}
        group.add_argument(f"--{name}", metavar=metavar(spec), help=_help(cls, name, spec), **words)  # type: ignore[arg-type]
    return parser


def by_group(cls: type) -> list[str]:
    """Lists the settings of one script in the order of their groups; groups of its own come last."""
    known = specs(cls)
    order = list(dict.fromkeys([*GROUPS, *(spec.group for spec in known.values())]))
    return sorted(known, key=lambda name: order.index(known[name].group))


def can_resume(cls: type) -> bool:
    """Says whether a script goes on with a run, which keeps its settings but for the free ones."""
    return "resume_from" in specs(cls)


def metavar(spec: Spec) -> str:
    """Names what a setting takes, such as STEPS|auto or cosine|linear."""
    kind = spec.unit.upper() or ("PATH" if spec.path else _METAVARS[spec.kind])
    return "|".join(spec.choices or (kind, *spec.words))


_METAVARS = {int: "INT", float: "NUMBER", bool: "true|false", str: "TEXT"}
_FREE_NOTE = "* may change when a run goes on. The README says more of each setting."


def _help(cls: type, name: str, spec: Spec) -> str:
    mark = " *" if spec.free and can_resume(cls) else ""
    return f"{spec.help} (default: {show(defaults(cls)[name])}){mark}".replace("%", "%%")


# --- storing the settings of a run -------------------------------------------------------------------------

AUTO_STEPS_BEFORE = {"dpm++": 20, "ddim": 250}  # what AUTO_STEPS was for runs that do not say
# What was done before these settings existed: old runs and old images stand for it, whatever the defaults are now.
_BEFORE = {"guidance_interval": [0.0, 1.0], "time_shift": 0.0, "noise_shift": 0.0}


def with_later_settings(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Adds to the stored settings of a run, or of images, what it did in those that came later than it."""
    return {**_BEFORE, **stored}


def to_dict(settings: Any) -> dict[str, Any]:
    """Returns the settings as plain values for JSON or YAML, paths made absolute."""
    plain = {}
    for name, spec in specs(type(settings)).items():
        value = getattr(settings, name)
        if isinstance(value, tuple):
            plain[name] = [absolute_path(item) for item in value] if spec.path else list(value)
        else:
            plain[name] = absolute_path(value) if spec.path and value is not None else value
    return plain


def absolute_path(text: str) -> str:
    """Makes a path absolute, leaving alone what looks like a hub id (`owner/name`, not on disk)."""
    path = Path(text).expanduser()
    return str(path.absolute()) if path.exists() or path.is_absolute() or text.startswith(".") else text


def to_yaml(settings: Any) -> str:
    """Returns the settings as a YAML text that is itself a valid --config file."""
    return yaml.safe_dump(to_dict(settings), sort_keys=False, default_flow_style=None, allow_unicode=True)


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
