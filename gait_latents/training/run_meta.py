"""What a checkpoint says of its run: one dataclass, its reader and its writer.

It is stored as JSON in the file. A checksum says that a file is whole, not who wrote it: the reader takes only values
that training could have written, and none that lead out of the folders.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gait_latents.common import cli
from gait_latents.common.errors import UserError, let_shortage_pass
from gait_latents.diffusion import build
from gait_latents.images.split import is_file_name
from gait_latents.latents.space import Space
from gait_latents.settings import AUTO_STEPS_BEFORE, TrainSettings, with_later_settings_of_runs
from gait_latents.training.metrics_log import is_number
from gait_latents.vae.norm import LatentNorm


@dataclass(frozen=True, eq=False, kw_only=True)
class RunMeta:
    """The facts about a run that are stored with its weights in each checkpoint.

    Attributes:
        step: number of finished steps.
        settings: of training, by name, as `cli.to_dict` gives them; settings that are newer than the run have
            the values that it counts as having (`with_later_settings_of_runs`).
        classes: the class names, in label order.
        latent_norm: how the latents were normalised.
        space: what the latents are.
        scale_factor, shift_factor: the constants of the VAE.
        data_digest: the digest of the training images and their labels.
        moments_digest: the digest of their moments; None where some were not encoded yet.
        image_suffix: the commonest suffix of the training images.
        auto_steps: the solver steps that auto stands for, by sampler.
        compiled: whether the network was compiled.
        torch: the version that trained.
        threads: how many threads the steps take on a CPU; None on a GPU, and for older runs.
        training: the values that training goes on from; None beside averaged weights alone.
        began_from: the run whose weights this one began with: "place", as it was given, "step", and "digest" of the
            file's header; None for a run that began with new weights.
    """

    step: int
    settings: Mapping[str, Any]
    classes: tuple[str, ...]
    latent_norm: LatentNorm
    space: Space
    scale_factor: float
    shift_factor: float
    data_digest: str
    moments_digest: str | None
    image_suffix: str
    auto_steps: Mapping[str, int]
    compiled: bool
    torch: str
    threads: int | None = None
    training: Mapping[str, Any] | None = None
    began_from: Mapping[str, Any] | None = None

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Shape of one latent: (C, h, w)."""
        return _latent_shape(self.space)

    @property
    def image_size(self) -> int:
        """Side of the images in pixels."""
        return self.settings["image_size"]

    @property
    def network_facts(self) -> dict[str, Any]:
        """The arguments of the `LatentDiffusion` of the run."""
        return build.network_facts(self.settings, num_classes=len(self.classes), latent_shape=self.latent_shape)

    def chosen_settings(self, *names: str) -> dict[str, Any]:
        """Returns those of the settings named that the run has, as defaults for what is done with it."""
        return {name: self.settings[name] for name in names if name in self.settings}

    def to_json(self) -> dict[str, Any]:
        """Returns plain values that `from_json` reads back; training and began_from only where there are any."""
        plain = {
            "step": self.step,
            "settings": dict(self.settings),
            "classes": list(self.classes),
            "latent_shape": list(self.latent_shape),
            "latent_norm": self.latent_norm.to_json(),
            "space": self.space.spec,
            "scale_factor": self.scale_factor,
            "shift_factor": self.shift_factor,
            "data_digest": self.data_digest,
            "moments_digest": self.moments_digest,
            "image_suffix": self.image_suffix,
            "auto_steps": dict(self.auto_steps),
            "compiled": self.compiled,
            "torch": self.torch,
            "threads": self.threads,
        }
        others = {"training": self.training, "began_from": self.began_from}
        return plain | {name: value for name, value in others.items() if value is not None}

    @classmethod
    def from_json(cls, plain: Mapping[str, Any], path: Path) -> "RunMeta":
        """Reads what `to_json` gave, be it in an older version; raises UserError, naming the file, for other values."""
        try:
            return cls._read(plain)
        except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError, UserError) as error:
            let_shortage_pass(error)
            what = f"{type(error).__name__}: {error}"[:200]
            raise UserError(f"{path} is no checkpoint of a training run that can be gone on with ({what})") from error

    @classmethod
    def _read(cls, plain: Mapping[str, Any]) -> "RunMeta":
        step, space = plain["step"], Space.from_stored(plain["space"])
        if type(step) is not int or not 0 <= step < 10**18:
            raise ValueError("its step is no number of steps")
        if plain["latent_shape"] != list(_latent_shape(space)) or plain["latent_shape"][1] != plain["latent_shape"][2]:
            raise ValueError("its latents have another shape than its space")
        norm = LatentNorm.from_json(plain["latent_norm"])
        if len(norm.shift) != plain["latent_shape"][0]:
            raise ValueError("its normalisation is of other latents")
        if not all(is_number(plain[name]) for name in ("scale_factor", "shift_factor")):
            raise ValueError("its scale_factor or shift_factor is no number")
        if not all(isinstance(plain[name], str) for name in ("data_digest", "image_suffix")):
            raise ValueError("its data_digest or image_suffix is no text")
        if not isinstance(plain["moments_digest"], str | None):
            raise ValueError("its moments_digest is no text")
        return cls(
            step=step,
            settings=_read_settings(plain["settings"]),
            classes=_read_classes(plain["classes"]),
            latent_norm=norm,
            space=space,
            scale_factor=plain["scale_factor"],
            shift_factor=plain["shift_factor"],
            data_digest=plain["data_digest"],
            moments_digest=plain["moments_digest"],
            image_suffix=plain["image_suffix"],
            auto_steps=_read_auto_steps(plain.get("auto_steps", AUTO_STEPS_BEFORE)),
            compiled=bool(plain.get("compiled", False)),
            torch=str(plain.get("torch", "")),
            threads=_read_threads(plain.get("threads")),
            training=plain.get("training"),
            began_from=_read_began_from(plain.get("began_from")),
        )


def _latent_shape(space: Space) -> tuple[int, int, int]:
    channels, height, width = space.moments_shape
    return channels // 2, height, width


def _read_classes(classes: Any) -> tuple[str, ...]:
    if not isinstance(classes, list) or not classes or len(set(classes)) < len(classes):
        raise ValueError("its classes are no list of names")
    for name in classes:
        if not is_file_name(name):  # generate.py makes folders of these names
            raise ValueError(f"{name!r:.100} is not the name of a class")
    return tuple(classes)


def _read_settings(settings: Any) -> dict[str, Any]:
    if not isinstance(settings, dict):
        raise ValueError("its settings are no table")
    settings = with_later_settings_of_runs(settings)
    parsed = cli.stored_layer(TrainSettings, "its settings", settings).values
    for name in (*build.NETWORK_SETTINGS, "image_size"):
        if name not in parsed:
            raise ValueError(f"its settings lack {name}")
    specs = cli.specs(TrainSettings)
    for name, value in parsed.items():  # "8" is a number in a file of settings, and none for the network
        stored = settings[name]
        if specs[name].path:  # which may differ from what was stored by its home folder, but is a text
            is_same = all(isinstance(item, str | None) for item in (stored if isinstance(stored, list) else [stored]))
        else:
            is_same = stored == (list(value) if isinstance(value, tuple) else value)
        if not is_same:
            raise ValueError(f"{name} in its settings is {stored!r:.100}")
    return settings


def _read_began_from(began_from: Any) -> dict[str, Any] | None:
    if began_from is None:
        return None
    place, step, digest = (began_from[name] for name in ("place", "step", "digest"))
    if not (isinstance(place, str) and type(step) is int and isinstance(digest, str)):
        raise ValueError("its began_from names no run")
    return {"place": place, "step": step, "digest": digest}


def _read_threads(threads: Any) -> int | None:
    if threads is not None and (type(threads) is not int or not 0 < threads <= 4096):
        raise ValueError("its threads are no number of threads")
    return threads


def _read_auto_steps(auto_steps: Any) -> dict[str, int]:
    if not isinstance(auto_steps, dict) or not all(type(steps) is int and steps > 0 for steps in auto_steps.values()):
        raise ValueError("its auto_steps are no numbers of steps")
    return auto_steps
