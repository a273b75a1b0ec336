"""Do generated images help a classifier? The whole way in a laboratory where the truth is known.

    python benchmarks/bench_usefulness.py --folder usefulness
    python benchmarks/bench_usefulness.py --folder usefulness --recipe my_recipe.yaml

demo/make_recordings.py simulates walkers, several recordings of each. A classifier learns from the first windows of one
recording and is tested on every fourth window of the others, none of which overlap. For each number of windows per
walker there are four training sets:

    real                the windows
    real + posterior    the windows, and draws of what their VAE made of them: the same pipeline without diffusion
    synthetic           generated images alone
    real + synthetic    the windows, and generated images, half of each batch of each

The VAE (demo/train_vae.py), the latents and the diffusion model see the training windows alone, or --vae names a VAE
that was trained on other walkers. Other walkers may help further: with --classifier_of a folder of their images, every
classifier begins with what it learns there, and with init_from in a --recipe (and freeze_network), so does the
diffusion model. The learning rate of the classifier and the strength of its augmentation (shifts in time and Doppler
frequency, masks, noise, mixup) are those with which the last quarter of the training windows is recognised best, in
negative log-likelihood, by a classifier that learns from the windows before; all training sets have the same. Nothing
is chosen on test windows. More windows of the recording, up to all that there are, give the learning curve of real
windows, on which generated images are worth so many.

A split takes another recording to learn from, and begins at another window; a generator is a diffusion model and its
images; a classifier is a seed. The interval of a difference is a bootstrap over walkers and runs, see
gait_latents/evaluation/intervals.py. --recipe is a settings file for train_latent_cfg.py and generate.py: its images
are compared with those of other recipes in the same folder, which share all else. Each stage is kept and not done
again, so the same command goes on where it stopped. It writes results.md, results.json and curve.png.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import itertools
import json
import math
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import harness

sys.path.insert(0, str(harness.ROOT / "demo"))

REAL, POSTERIOR, SYNTHETIC, BOTH = "real", "real + posterior", "synthetic", "real + synthetic"
OF_PEOPLE = ("walker", "recording")
TEST_EVERY = 4  # at an overlap of 75 % these windows share nothing
DEFAULT = "default"  # the recipe without a file
TUNING_SEED = 0


@dataclass(frozen=True)
class Sizes:
    """How large the laboratory and its models are; a folder keeps those that it began with."""

    people: int = 31
    recordings: int = 3
    windows: int = 240  # of each recording
    image_size: int = 64
    vae: Mapping[str, Any] = dataclasses.field(
        default_factory=lambda: {"multipliers": [1, 2, 4], "train_num_steps": 3000, "train_batch_size": 8}
    )
    model: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    images_per_class: int = 50
    classifier_steps: int = 600  # more where these are fewer than `classifier_passes`
    classifier_passes: int = 5
    classifier_width: int = 32
    first_steps: int = 1800  # of a classifier on images of other walkers, with the next two
    first_learning_rate: float = 2e-3
    first_strength: float = 0.5
    precision: str | None = None  # of the diffusion model and the classifiers; None is what they have of themselves
    batch_size: int = 32
    # (learning rate, strength of the augmentation) among which the validation windows choose.
    candidates: tuple[tuple[float, float], ...] = ((2e-3, 0.0), (2e-3, 0.5), (2e-3, 1.0), (1e-3, 1.0))


SMALL = Sizes(
    people=3,
    recordings=2,
    windows=12,
    image_size=32,
    vae={"multipliers": [1, 2], "train_num_steps": 2, "train_batch_size": 2},
    model={"dim": 8, "dim_mults": [1], "train_num_steps": 2, "sampling_timesteps": 2},
    images_per_class=2,
    classifier_steps=2,
    classifier_passes=0,
    first_steps=2,
    batch_size=6,
    candidates=((2e-3, 0.5), (5e-4, 1.0)),
)


def read_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line, or these words."""
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, help="where everything is kept; needed but for --small")
    parser.add_argument("--windows", type=int, nargs="+", help="real windows of each walker (default 4 8 20 50)")
    parser.add_argument("--splits", type=int, default=3, help="recordings and places to learn from (default 3)")
    parser.add_argument("--generators", type=int, default=2, help="diffusion models of each (default 2)")
    parser.add_argument("--classifiers", type=int, default=3, help="classifiers of each training set (default 3)")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no stage after so long")
    parser.add_argument("--vae", type=Path, help="a VAE of other walkers, in place of one for each trial")
    parser.add_argument(
        "--precision",
        choices=("float32", "bfloat16"),
        help="number format of the diffusion model and the classifiers; bfloat16 is faster where a machine has it",
    )
    parser.add_argument(
        "--classifier_of", type=Path, help="images of other walkers, on which every classifier is trained first"
    )
    parser.add_argument("--recipe", type=Path, help="settings of the diffusion model and its images, a YAML file")
    parser.add_argument("--small", action="store_true", help="tiny sizes: shows that it works, measures nothing")
    arguments = parser.parse_args(argv)
    sizes = SMALL if arguments.small else Sizes()
    arguments.windows = sorted(set(arguments.windows or ([4] if arguments.small else [4, 8, 20, 50])))
    if not 3 <= arguments.windows[0] <= arguments.windows[-1] <= sizes.windows:
        parser.error(f"--windows are from 3, one of which chooses, to {sizes.windows}")
    if min(arguments.splits, arguments.generators, arguments.classifiers) < 1:
        parser.error("--splits, --generators and --classifiers are at least 1")
    if arguments.folder is None and not arguments.small:
        parser.error("give --folder, where everything is kept")
    if arguments.vae is not None and not arguments.vae.is_file():
        parser.error(f"--vae {arguments.vae} is no file")
    if arguments.classifier_of is not None and not arguments.classifier_of.is_dir():
        parser.error(f"--classifier_of {arguments.classifier_of} is no folder")
    if arguments.recipe is not None and (not arguments.recipe.is_file() or arguments.recipe.stem == DEFAULT):
        parser.error(f"--recipe {arguments.recipe} is no file, or has the name of the recipe without one")
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    """Works until all is there or the time is over, then reports."""
    arguments = read_arguments(argv)
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        sizes = dataclasses.replace(SMALL if arguments.small else Sizes(), precision=arguments.precision)
        laboratory = Laboratory(folder, sizes, vae=arguments.vae, others=arguments.classifier_of)
        clock = Clock(time.monotonic() + 60 * arguments.minutes)
        is_done = True
        try:
            for stage in stages(laboratory, arguments):
                clock.check()
                stage()
        except OutOfTime:
            is_done = False
        kept = write_results(laboratory, is_done=is_done)
        if kept is None:
            print("nothing was measured yet; the same command goes on")
            return
        print((folder / "results.md").read_text())
        print("all is done" if is_done else "not all is done; the same command goes on")
        print(json.dumps({"benchmark": "bench_usefulness", **{k: v for k, v in kept.items() if k != "runs"}}))


class OutOfTime(Exception):
    """Says that the time of --minutes is over."""


@dataclass(frozen=True)
class Clock:
    """Knows when no further stage may begin."""

    end: float  # of time.monotonic

    def check(self) -> None:
        """Raises OutOfTime when the time is over."""
        if time.monotonic() > self.end:
            raise OutOfTime


# --- the laboratory ----------------------------------------------------------------------------------------


Images = tuple[Any, Any]  # uint8 tensor [N S S 3] and labels [N]


class Laboratory:
    """The folder with the recordings and all that is made from them. Splits, generators and classifiers count from 1.

    Raises:
        SystemExit: when the folder was begun with other sizes.
    """

    def __init__(self, folder: Path, sizes: Sizes, *, vae: Path | None = None, others: Path | None = None) -> None:
        from gait_latents.common import hardware

        self.folder, self.sizes, self.vae, self.others = folder, sizes, vae, others
        self.device = hardware.pick_device("auto")
        self._test: dict[int, tuple[Images, Any]] = {}  # by the recording that is learnt from
        self.facts = {
            **dataclasses.asdict(sizes),
            "vae_of_others": None if vae is None else hashlib.sha256(vae.read_bytes()).hexdigest(),
            "classifier_of": None if others is None else digest_of_images(others),
        }
        stored, own = folder / "sizes.json", json.loads(json.dumps(self.facts))
        before = {"classifier_of": None, **json.loads(json.dumps(dataclasses.asdict(Sizes())))}  # of older folders
        if stored.exists() and {**before, **json.loads(stored.read_text())} != own:
            raise SystemExit(f"error: {folder} was begun with other sizes, precision or models; give another --folder")
        save_json(stored, own)

    @property
    def recordings(self) -> Path:
        """The folder of the recordings, which is made when it is first needed."""
        found = self.folder / "recordings"
        if not found.exists():
            import make_recordings

            say("simulating the recordings")
            unfinished = found.with_name("recordings.unfinished")
            make_recordings.write_recordings(
                unfinished,
                people=self.sizes.people,
                recordings=self.sizes.recordings,
                num_windows=self.sizes.windows,
                image_size=self.sizes.image_size,
                seed=0,
            )
            unfinished.rename(found)
        return found

    def training(self, split: int, count: int) -> tuple[int, list[int]]:
        """Returns the recording to learn from and the numbers of its windows, in their order of time.

        A split begins at a window of its own, so that the windows of fewer are the first of those of more; behind the
        last window comes the first.
        """
        recording = 1 + (split - 1) % self.sizes.recordings
        start = (split - 1) * (self.sizes.windows * 5 // 13)
        return recording, [1 + (start + i) % self.sizes.windows for i in range(count)]

    def paths(self, recording: int, windows: Sequence[int]) -> list[tuple[Path, int]]:
        """Returns path and label of these windows, walker after walker."""
        import make_recordings

        walkers = range(1, self.sizes.people + 1)
        return [
            (make_recordings.window_path(self.recordings, recording, number, window), number - 1)
            for number in walkers
            for window in windows
        ]

    def read(self, found: Sequence[tuple[Path, int]]) -> Images:
        """Reads images and their labels."""
        import numpy as np
        import torch

        from gait_latents.images import reading

        pixels = [reading.decode(path.read_bytes(), image_size=self.sizes.image_size) for path, _ in found]
        return torch.from_numpy(np.stack(pixels)), torch.tensor([label for _, label in found])

    def test(self, split: int) -> tuple[Images, Any]:
        """Returns the test images of a split, and the recording [M] of each."""
        import torch

        learnt, _ = self.training(split, 1)
        if learnt not in self._test:
            others = [number for number in range(1, self.sizes.recordings + 1) if number != learnt]
            windows = range(1, self.sizes.windows + 1, TEST_EVERY)
            found = {number: self.paths(number, windows) for number in others}
            images = self.read([each for part in found.values() for each in part])
            self._test[learnt] = images, torch.tensor([number for number, part in found.items() for _ in part])
        return self._test[learnt]

    def read_classes(self, folder: Path) -> Images:
        """Reads the images of a folder with one sub-folder for each walker."""
        from gait_latents.images import folders

        listed = folders.list_images(folder)
        return self.read(
            [(folder / name / file, int(name.removeprefix("ID_")) - 1) for name in listed for file in listed[name]]
        )

    @cached_property
    def features(self) -> Mapping[str, Any] | None:
        """The weights that all classifiers begin with, learnt from other walkers; None where there are no others."""
        if self.others is None:
            return None
        from safetensors.torch import load_file
        from safetensors.torch import save as to_safetensors

        from gait_latents.common import files
        from gait_latents.evaluation.augmentation import Augmentation
        from gait_latents.evaluation.classifier import train_features
        from gait_latents.images import folders

        path = self.folder / "features.safetensors"
        if not path.exists():
            say("a classifier of other walkers")
            listed = folders.list_images(self.others)
            found = [(self.others / name / file, label) for label, name in enumerate(listed) for file in listed[name]]
            weights = train_features(
                self.read(found),
                num_steps=self.sizes.first_steps,
                learning_rate=self.sizes.first_learning_rate,
                augment=Augmentation().scaled(self.sizes.first_strength),
                seed=TUNING_SEED,
                **self.how_to_train,
            )
            files.publish(path, to_safetensors({name: value.contiguous() for name, value in weights.items()}))
        return load_file(path)

    @property
    def how_to_train(self) -> dict[str, Any]:
        """What all trainings of a classifier have in common."""
        from gait_latents.common import hardware

        return {
            "device": self.device,
            "batch_size": self.sizes.batch_size,
            "width": self.sizes.classifier_width,
            "number_format": hardware.NUMBER_FORMATS[self.sizes.precision or "float32"],
        }


def digest_of_images(folder: Path) -> str:
    """Returns a digest of names and content of the images in a folder with one sub-folder for each walker."""
    from gait_latents.images import folders

    digest = hashlib.sha256()
    for name, files in folders.list_images(folder).items():
        for file in files:
            content = hashlib.sha256((folder / name / file).read_bytes()).hexdigest()
            digest.update(f"{json.dumps([name, file])} {content}\n".encode())
    return digest.hexdigest()


def counts_of_curve(windows: Sequence[int], most: int) -> list[int]:
    """Returns the numbers of windows of the learning curve: those asked for, doublings of the largest, and all."""
    doublings = itertools.takewhile(lambda n: n < most / 1.5, (windows[-1] * 2**i for i in itertools.count()))
    return sorted({*windows, *doublings, most})


def say(text: str) -> None:
    """Tells how far the work is."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def save_json(path: Path, value: object) -> None:
    """Writes a file whole or not at all."""
    from gait_latents.common import files

    files.publish(path, json.dumps(value, indent=1).encode())


# --- stages ------------------------------------------------------------------------------------------------


def stages(laboratory: Laboratory, arguments: argparse.Namespace) -> Iterator[Callable[[], object]]:
    """Yields what there is to do, in the order of its use: whole trials first, then the rest of the curve."""
    seeds = range(1, arguments.classifiers + 1)
    curve = counts_of_curve(arguments.windows, laboratory.sizes.windows)
    for split in range(1, arguments.splits + 1):
        for count in arguments.windows:
            trial = Trial(laboratory, split, count)
            yield from trial.classifiers(REAL, seeds)
            yield trial.train_vae
            yield trial.encode
            yield trial.draw_posterior
            yield from trial.classifiers(POSTERIOR, seeds)
            for number in range(1, arguments.generators + 1):
                generator = Generator(trial, number, arguments.recipe)
                yield generator.train
                yield generator.generate
                for arm in (SYNTHETIC, BOTH):
                    yield from trial.classifiers(arm, seeds, generator)
            yield lambda: write_results(laboratory, is_done=False)
        for count in curve:
            yield from Trial(laboratory, split, count).classifiers(REAL, seeds)


def run_script(
    main: Callable[[Sequence[str]], int], settings: Mapping[str, object], recipe: Path | None = None
) -> None:
    """Runs a script in this process; what it says goes to standard error. Raises SystemExit where it fails."""
    words = ["--config", str(recipe)] if recipe else []
    for name, value in settings.items():
        words += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    with contextlib.redirect_stdout(sys.stderr):
        code = main(words)
    if code:
        raise SystemExit(code)


@dataclass(frozen=True)
class Trial:
    """One number of real windows in one split."""

    laboratory: Laboratory
    split: int
    count: int

    @property
    def folder(self) -> Path:
        """Where all of it is kept."""
        return self.laboratory.folder / f"split_{self.split}" / f"windows_{self.count}"

    @property
    def vae(self) -> Path:
        """The file of the trained VAE."""
        return self.laboratory.vae or self.folder / "vae" / "vae.safetensors"

    @cached_property
    def real(self) -> Images:
        """The training windows."""
        return self.laboratory.read(self.laboratory.paths(*self.laboratory.training(self.split, self.count)))

    @property
    def num_steps(self) -> int:
        """Training steps of each classifier."""
        sizes = self.laboratory.sizes
        passes = sizes.classifier_passes * self.count * sizes.people / sizes.batch_size
        return max(sizes.classifier_steps, math.ceil(passes))

    def copy_windows(self) -> Path:
        """Copies the training windows into a folder of their own, for the scripts; returns it."""
        folder = self.folder / "training"
        for path, _ in self.laboratory.paths(*self.laboratory.training(self.split, self.count)):
            copy = folder / path.parent.name / path.name
            if not copy.exists():
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, copy.with_suffix(".part"))
                copy.with_suffix(".part").rename(copy)
        return folder

    def train_vae(self) -> None:
        """Trains the VAE on the training windows."""
        done = self.folder / "vae" / "done"
        if done.exists() or self.laboratory.vae is not None:
            return
        import train_vae

        say(f"split {self.split}, {self.count} windows: VAE")
        settings = {
            "data_path": self.copy_windows(),
            "output_folder": done.parent,
            "image_size": self.laboratory.sizes.image_size,
            "seed": self.split,
            **self.laboratory.sizes.vae,
        }
        run_script(train_vae.main, settings)
        done.touch()

    def encode(self) -> None:
        """Encodes the training windows; does nothing where all are encoded."""
        import preprocess_latents

        settings = {
            "data_path": self.copy_windows(),
            "vae_path": self.vae,
            "output_folder": self.folder / "latents_cache",
            "image_size": self.laboratory.sizes.image_size,
            "images_per_user": "all",
        }
        if not (self.folder / "encoded").exists():
            run_script(preprocess_latents.main, settings)
            (self.folder / "encoded").touch()

    def draw_posterior(self) -> None:
        """Decodes draws of the posterior of the windows, as many of each walker as a generator makes."""
        import torch
        from PIL import Image

        from gait_latents.common import pictures, seeds
        from gait_latents.vae.load import load_vae

        folder = self.folder / "posterior"
        if folder.exists():
            return
        say(f"split {self.split}, {self.count} windows: draws of the posterior")
        unfinished = folder.with_name("posterior.unfinished")
        vae = load_vae(self.vae, self.laboratory.device)
        images, labels = self.real
        with torch.inference_mode():
            for label in range(self.laboratory.sizes.people):
                own = images[labels == label].permute(0, 3, 1, 2).float() / 255
                mean, logvar = vae.encode(own.to(self.laboratory.device)).cpu().chunk(2, dim=1)
                (unfinished / f"ID_{label + 1}").mkdir(parents=True, exist_ok=True)
                for number in range(self.laboratory.sizes.images_per_class):
                    at = number % len(own)
                    noise = torch.randn(
                        mean[at].shape, generator=seeds.sample_generator(self.split, "posterior", label, number)
                    )
                    latent = mean[at] + (logvar[at] / 2).exp() * noise
                    (pixels,) = pictures.to_uint8(vae.decode(latent[None].to(self.laboratory.device)))
                    path = unfinished / f"ID_{label + 1}" / f"{number:05d}.jpg"
                    path.write_bytes(pictures.encode_image(Image.fromarray(pixels), ".jpg"))
        unfinished.rename(folder)

    # What follows trains classifiers.

    def tuned(self) -> dict[str, float]:
        """Returns learning rate and strength of the augmentation, chosen on the last of the training windows."""
        path = self.folder / "tuning.json"
        if not path.exists():
            from gait_latents.evaluation.worth import negative_log_likelihood

            first, last = validation(self.count)
            at = self.real[1].new_tensor(range(self.count)).repeat(self.laboratory.sizes.people)
            learnt, asked = ([part[where] for part in self.real] for where in (at < first, at >= last))
            found = []
            for rate, strength in self.laboratory.sizes.candidates:
                say(f"split {self.split}, {self.count} windows: learning rate {rate:g}, augmentation {strength:g}")
                how = {"learning_rate": rate, "strength": strength}
                logits = self.train([tuple(learnt)], asked[0], seed=TUNING_SEED, **how)
                found.append({**how, "validation_nll": negative_log_likelihood(logits, asked[1])})
            save_json(path, {"chosen": min(found, key=lambda row: row["validation_nll"]), "tried": found})
        chosen = json.loads(path.read_text())["chosen"]
        return {name: chosen[name] for name in ("learning_rate", "strength")}

    def train(self, sets: Sequence[Images], asked: Any, *, seed: int, learning_rate: float, strength: float) -> Any:
        """Trains a classifier; returns the logits of the images that it is asked about."""
        from gait_latents.evaluation.augmentation import Augmentation
        from gait_latents.evaluation.classifier import train_and_classify

        return train_and_classify(
            sets,
            asked,
            num_classes=self.laboratory.sizes.people,
            num_steps=self.num_steps,
            seed=seed,
            learning_rate=learning_rate,
            augment=Augmentation().scaled(strength),
            begin_with=self.laboratory.features,
            **self.laboratory.how_to_train,
        )

    def classifiers(
        self, arm: str, seeds: Iterable[int], generator: "Generator | None" = None
    ) -> Iterator[Callable[[], object]]:
        """Yields the trainings of one training set, each of which keeps its predictions."""
        name = arm.replace(" + ", "_and_") + (f"_{generator.name}" if generator else "")
        for seed in seeds:
            path = self.folder / "predictions" / f"{name}_classifier_{seed}.safetensors"
            key = {"arm": arm, "split": self.split, "windows": self.count, "classifier": seed}
            key |= {"recipe": generator.recipe_name, "generator": generator.number} if generator else {}
            if not path.exists():
                yield lambda key=key, path=path: self.classify(key, path, generator)

    def classify(self, key: Mapping[str, Any], path: Path, generator: "Generator | None") -> None:
        """Trains one classifier, and keeps what it answers for each test window."""
        from safetensors.torch import save as to_safetensors

        from gait_latents.common import files

        how = self.tuned()
        say(", ".join(f"{name} {value}" for name, value in key.items()))
        (images, labels), recordings = self.laboratory.test(self.split)
        sets = [] if key["arm"] == SYNTHETIC else [self.real]
        if key["arm"] == POSTERIOR:
            sets.append(self.laboratory.read_classes(self.folder / "posterior"))
        elif generator:
            sets.append(self.laboratory.read_classes(generator.images))
        started = time.monotonic()
        logits = self.train(sets, images, seed=key["classifier"], **how)
        facts = {**key, **how, "steps": self.num_steps, "seconds": round(time.monotonic() - started, 1)}
        tensors = {"logits": logits.contiguous(), "labels": labels, "recordings": recordings}
        files.publish(path, to_safetensors(tensors, metadata={"facts": json.dumps(facts)}))


def validation(count: int) -> tuple[int, int]:
    """Returns how many of the first training windows are learnt from, and from which on the rest chooses.

    The last quarter chooses. What overlaps it is left out, but for no more than a third of what remains, so that few
    windows are still enough to learn from.
    """
    last = count - max(1, count // 4)
    return last - min(TEST_EVERY - 1, last // 3), last


@dataclass(frozen=True)
class Generator:
    """One diffusion model of a trial, and its images."""

    trial: Trial
    number: int
    recipe: Path | None

    @property
    def recipe_name(self) -> str:
        """The name of the settings file without its ending."""
        return self.recipe.stem if self.recipe else DEFAULT

    @property
    def name(self) -> str:
        """What its files are called."""
        return f"{self.recipe_name}_generator_{self.number}"

    @property
    def folder(self) -> Path:
        """Where model and images are."""
        return self.trial.folder / self.name

    @property
    def images(self) -> Path:
        """The folder of the generated images."""
        return self.folder / "synthetic"

    def train(self) -> None:
        """Trains the diffusion model on the latents of the training windows."""
        self._check_recipe()
        if (self.folder / "trained").exists():
            return
        import train_latent_cfg

        say(f"split {self.trial.split}, {self.trial.count} windows: {self.name}")
        settings = {
            "latents_cache_folder": self.trial.folder / "latents_cache",
            "results_folder": self.folder / "results",
            "num_samples": 0,
            "trackers": "none",
            "seed": self.number,
            **self._sizes(train_latent_cfg),
        }
        run_script(train_latent_cfg.main, settings, self.recipe)
        (self.folder / "trained").touch()

    def _check_recipe(self) -> None:
        """Keeps beside the model its recipe, and which weights that begins with; ends the program where they differ."""
        if self.recipe is None:
            return
        for name, content in {"recipe.yaml": self.recipe.read_bytes(), "begins_with": self._begins_with()}.items():
            kept = self.folder / name
            if kept.exists() and content is not None and kept.read_bytes() != content:
                raise SystemExit(
                    f"error: {self.folder} was made with other settings or weights than {self.recipe} has now; give it "
                    "another name"
                )
            if content is not None:
                kept.parent.mkdir(parents=True, exist_ok=True)
                kept.write_bytes(content)

    def _begins_with(self) -> bytes | None:
        """Returns the digest of the weights in the recipe's init_from; None where it has none or they are gone."""
        import yaml

        from gait_latents.common.errors import UserError
        from gait_latents.training.beginning import read_beginning

        assert self.recipe is not None
        settings = yaml.safe_load(self.recipe.read_text())
        place = settings.get("init_from") if isinstance(settings, dict) else None  # the script says what is wrong
        if place is None or not Path(place).exists():
            return None
        try:
            return read_beginning(place).to_json()["digest"].encode()
        except UserError as error:
            raise SystemExit(f"error: {error}") from error

    def generate(self) -> None:
        """Makes its images."""
        if (self.folder / "generated").exists():
            return
        import generate

        settings = {
            "checkpoint": self.folder / "results",
            "output_folder": self.images,
            "images_per_class": self.trial.laboratory.sizes.images_per_class,
            "seed": self.number,
            **self._sizes(generate),
        }
        run_script(generate.main, settings, self.recipe)
        (self.folder / "generated").touch()

    def _sizes(self, script: Any) -> dict[str, Any]:
        """Returns those of the sizes of the model that a script has as settings."""
        from gait_latents.settings import SCRIPTS

        names = {field.name for field in dataclasses.fields(SCRIPTS[f"{script.__name__}.py"])}
        sizes = self.trial.laboratory.sizes
        model = {**sizes.model, **({"precision": sizes.precision} if sizes.precision else {})}
        return {name: value for name, value in model.items() if name in names}


# --- what is shown -----------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Run:
    """One trained classifier: what it was, and how it did."""

    facts: Mapping[str, Any]
    cells: Any  # accuracy of each walker in each recording [walkers recordings], NaN where none was asked for
    accuracy: float
    nll: float
    eer: float | None

    @classmethod
    def open(cls, path: Path) -> "Run":
        """Reads kept predictions."""
        import numpy as np
        from safetensors import safe_open

        from gait_latents.evaluation import worth

        with safe_open(path, framework="pt") as kept:
            logits, labels, recordings = (kept.get_tensor(name) for name in ("logits", "labels", "recordings"))
            facts = json.loads(kept.metadata()["facts"])
        is_right = (logits.argmax(1) == labels).double()
        cells = np.full((logits.shape[1], int(recordings.max())), np.nan)
        for label, recording in {*zip(labels.tolist(), recordings.tolist(), strict=True)}:
            where = (labels == label) & (recordings == recording)
            cells[label, recording - 1] = is_right[where].mean()
        return cls(
            facts,
            cells,
            float(is_right.mean()),
            worth.negative_log_likelihood(logits, labels),
            worth.macro_eer(logits, labels),
        )

    @property
    def row(self) -> str:
        """The training set, with the recipe of its images."""
        recipe = self.facts.get("recipe", DEFAULT)
        return self.facts["arm"] + ("" if recipe == DEFAULT else f" ({recipe})")


def write_results(laboratory: Laboratory, *, is_done: bool) -> dict[str, Any] | None:
    """Writes results.json, results.md and curve.png; returns what is in the first, None where nothing was measured."""
    from gait_latents.common import charts, files

    runs = [Run.open(path) for path in sorted(laboratory.folder.glob("split_*/windows_*/predictions/*.safetensors"))]
    if not runs:
        return None
    curve = Curve.of(runs)
    table = [
        summarise(runs, count, row, curve)
        for count in sorted({run.facts["windows"] for run in runs})
        for row in sorted({run.row for run in runs if run.facts["windows"] == count}, key=order_of_rows)
    ]
    kept = {
        "sizes": laboratory.facts,
        "is_done": is_done,
        **harness.machine(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1))),
        "table": table,
        "runs": [{**run.facts, "accuracy": run.accuracy, "nll": run.nll, "eer": run.eer} for run in runs],
    }
    save_json(laboratory.folder / "results.json", kept)
    ceiling = curve.accuracies.get(laboratory.sizes.windows)
    files.publish(laboratory.folder / "results.md", markdown(table, ceiling).encode())
    marks: dict[str, list[tuple[int, float]]] = {}
    for line in table:
        if "accuracy_on_curve" in line:
            marks.setdefault(line["row"], []).append((line["windows"], line["accuracy_on_curve"]))
    if curve.accuracies:
        drawn = charts.learning_curve([*curve.accuracies], [*curve.accuracies.values()], marks, ceiling=ceiling)
        files.publish(laboratory.folder / "curve.png", drawn)
    return kept


@dataclass(frozen=True)
class Curve:
    """The learning curve of real windows: the mean accuracy for each count, over the splits that have got furthest."""

    accuracies: Mapping[int, float]
    splits: frozenset[int]

    @classmethod
    def of(cls, runs: Sequence[Run]) -> "Curve":
        """Draws it from the runs of real windows alone."""
        counts: dict[int, set[int]] = {}
        for run in (run for run in runs if run.facts["arm"] == REAL):
            counts.setdefault(run.facts["split"], set()).add(run.facts["windows"])
        most = max(map(len, counts.values()), default=0)
        splits = frozenset(split for split, found in counts.items() if len(found) == most)
        real = [run for run in runs if run.facts["arm"] == REAL and run.facts["split"] in splits]
        accuracies = {
            count: statistics.fmean(run.accuracy for run in real if run.facts["windows"] == count)
            for count in sorted({run.facts["windows"] for run in real})
        }
        return cls(accuracies, splits)

    def place(self, runs: Sequence[Run]) -> dict[str, Any]:
        """Returns the accuracy of runs in the splits of the curve, and what it is worth there; nothing of no runs."""
        from gait_latents.evaluation.worth import say_worth, worth

        found = [run.accuracy for run in runs if run.facts["split"] in self.splits]
        if not found:
            return {}
        accuracy, counts = statistics.fmean(found), [*self.accuracies]
        return {
            "accuracy_on_curve": accuracy,
            "worth": say_worth(worth(counts, [*self.accuracies.values()], accuracy), counts),
        }


def order_of_rows(row: str) -> tuple[int, str]:
    """Puts the training sets into their order, and recipes beside each other."""
    arm, _, recipe = row.partition(" (")
    return (REAL, POSTERIOR, SYNTHETIC, BOTH).index(arm), recipe


def summarise(runs: Sequence[Run], count: int, row: str, curve: Curve) -> dict[str, Any]:
    """Returns the figures of one training set at one number of windows, and its difference from real ones alone."""
    own = [run for run in runs if run.facts["windows"] == count and run.row == row]
    real = [run for run in runs if run.facts["windows"] == count and run.row == REAL]
    accuracies = [run.accuracy for run in own]
    rates = [run.eer for run in own if run.eer is not None]
    found: dict[str, Any] = {
        "windows": count,
        "row": row,
        "runs": len(own),
        "accuracy": statistics.fmean(accuracies),
        "deviation": statistics.stdev(accuracies) if len(own) > 1 else None,
        "nll": statistics.fmean(run.nll for run in own),
        "eer": statistics.fmean(rates) if rates else None,
    }
    if row != REAL:
        found |= curve.place(own)
        found["difference"] = difference(own, real)
    return found


def difference(own: Sequence[Run], real: Sequence[Run]) -> dict[str, Any] | None:
    """Returns mean and interval of the accuracy minus that of real windows; None where no two runs can be compared.

    A run is compared with that of the same split and classifier seed, walker by walker and recording by recording.
    """
    import numpy as np

    from gait_latents.evaluation.intervals import bootstrap_interval

    others = {(run.facts["split"], run.facts["classifier"]): run.cells for run in real}
    of_runs = [name for name in ("split", "generator", "classifier") if name in own[0].facts]
    pairs = {
        tuple(run.facts[name] for name in of_runs): run.cells - others[same]
        for run in own
        if (same := (run.facts["split"], run.facts["classifier"])) in others
    }
    if not pairs:
        return None
    levels = [sorted(set(level)) for level in zip(*pairs, strict=True)]
    num_recordings = max(cells.shape[1] for cells in pairs.values())
    num_walkers = next(iter(pairs.values())).shape[0]
    values = np.full((*map(len, levels), num_walkers, num_recordings), np.nan)
    for key, cells in pairs.items():
        place = tuple(level.index(name) for level, name in zip(levels, key, strict=True))
        values[(*place, slice(None), slice(cells.shape[1]))] = cells
    # A classifier of real windows is the same whatever generator stands beside it: its seed is a chain of its own.
    chains = (of_runs[:-1], of_runs[-1:], OF_PEOPLE)
    return dataclasses.asdict(bootstrap_interval(values, chains, seed=0))


def markdown(table: Sequence[Mapping[str, Any]], ceiling: float | None) -> str:
    """Returns the table as Markdown, and below it what all windows reach, where known, and what the intervals cover."""
    heads = ("windows", "trained on", "runs", "accuracy (deviation)", "NLL", "macro EER", "worth N real windows")
    lines = ["| " + " | ".join((*heads, "points against real (95 %)")) + " |", "|---" * (len(heads) + 1) + "|"]
    for line in table:
        deviation = "" if line["deviation"] is None else f" ({line['deviation']:.1%})"
        cells = [
            str(line["windows"]),
            line["row"],
            str(line["runs"]),
            f"{line['accuracy']:.1%}{deviation}",
            f"{line['nll']:.2f}",
            "" if line["eer"] is None else f"{line['eer']:.1%}",
            line.get("worth", ""),
            _interval(line.get("difference")),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    if ceiling is not None:
        lines += ["", f"Ceiling: all windows of a recording reach {ceiling:.1%}."]
    scopes = {(tuple(d["covers"]), tuple(d["leaves_out"])) for line in table if (d := line.get("difference"))}
    for covers, leaves_out in sorted(scopes):
        rest = f"; there is one {' and one '.join(leaves_out)}, whose chance is not in them" if leaves_out else ""
        lines += ["", f"Intervals cover the chance of {', '.join(covers) or 'nothing'}{rest}."]
    return "\n".join(lines) + "\n"


def _interval(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return ""
    text = f"{100 * found['mean']:+.1f}"
    return text if found["low"] is None else f"{text} ({100 * found['low']:+.1f} to {100 * found['high']:+.1f})"


if __name__ == "__main__":
    sys.exit(main())
