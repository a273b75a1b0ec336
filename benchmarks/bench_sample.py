"""Measures samplers by what they cost and what comes out: network passes and seconds against distance from real images.

    python benchmarks/bench_sample.py --checkpoint results
    python benchmarks/bench_sample.py --checkpoint results --variants "dpm++ 20 1.5 0 1" "ddim 50 1.5 0.2 0.8"

All variants sample with the same averaged weights in one process, in turn for each seed. The figures are those of
evaluate_images.py: samples against the test images of the run's split, whose latents are encoded where no cache has
them. Figures are medians over the seeds, with the smallest and the largest. "real" are as many training images; in that
row own class is that of the test images, near copies what is expected, and the classifier that of real images alone.
--classifier_steps trains classifiers as evaluate_images.py does, one seed of theirs for each seed of sampling. The
library computes in float32, ours in the precision of the run, so that on a GPU the seconds compare both at once.

The baseline is the library's own DDIM as its users run it: GaussianDiffusion with sampling_timesteps=250, the defaults
of its ddim_sample (guidance 6, rescaled_phi 0.7, the clamp of x_start to [-1, 1]) and of its constructor (eta 1), one
class at a time, two passes per step; what it maps to [0, 1] is mapped back. Its users scale their latents to [-1, 1];
these weights know latents of unit variance, which the clamp cuts off. So there are two rows more: with the clamp off,
and with the clamp off at the guidance of the run. Guidance there removes the part of the update that is parallel to
the output, and rescales.
"""

import argparse
import contextlib
import dataclasses
import io
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness

LIBRARY_STEPS, LIBRARY_GUIDANCE, LIBRARY_PHI = 250, 6.0, 0.7
FIGURES = {  # figure -> its head; the first is what the picture shows
    "frechet_mean": "Fréchet per class",
    "frechet": "Fréchet, all",
    "kernel_mean": "kernel per class",
    "kernel": "kernel, all",
    "recognition": "own class",
    "recall": "recall",
    "near_share": "near copies",
    "alone": "classifier on these alone",
    "gain": "gain beside real ones, points",
}

COSTS = {"passes": "passes per image", "seconds": "s per image", "speed": "speed"}
REAL = "real"
LEARNING_RATE, AUGMENTATION_STRENGTH = 2e-3, 0.5  # of the classifiers


@dataclass(frozen=True)
class Variant:
    """A way to sample: ours, or that of the library."""

    sampler: str
    steps: int
    guidance: float
    interval: tuple[float, float] = (0.0, 1.0)
    clamp: bool = False  # of the library alone

    @property
    def is_library(self) -> bool:
        """Says whether the library samples."""
        return self.sampler == "library ddim"

    @property
    def name(self) -> str:
        """What stands in the table; of ours, what --variants takes."""
        if self.is_library:
            return f"{self.sampler} {self.steps}, guidance {self.guidance:g}{', clamped' * self.clamp}"
        low, high = self.interval
        return f"{self.sampler} {self.steps} {self.guidance:g} {low:g} {high:g}"

    @staticmethod
    def parse(text: str) -> "Variant":
        """Reads "SAMPLER STEPS GUIDANCE LOW HIGH"; raises ArgumentTypeError for anything else."""
        try:
            sampler, steps, *rest = text.split()
            guidance, low, high = map(float, rest)
            found = Variant(sampler, int(steps), guidance, (low, high))
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r} is not like 'dpm++ 20 1.5 0 1'") from error
        is_number = math.isfinite(guidance)
        if sampler not in ("dpm++", "ddim", "ddpm") or found.steps < 1 or not 0 <= low <= high <= 1 or not is_number:
            raise argparse.ArgumentTypeError(f"{text!r}: a sampler, steps, guidance, and an interval within 0 to 1")
        return found


def library_variants(guidance: float, timesteps: int) -> list[Variant]:
    """Returns the baseline, and the rows that show what its clamp and its guidance do."""
    base = Variant("library ddim", min(LIBRARY_STEPS, timesteps), LIBRARY_GUIDANCE, clamp=True)
    rows = [base, dataclasses.replace(base, clamp=False)]
    if guidance not in (1, LIBRARY_GUIDANCE):  # its samplers cannot do without guidance
        rows.append(dataclasses.replace(base, clamp=False, guidance=guidance))
    return rows


def our_variants(guidance: float) -> list[Variant]:
    """Returns what is compared unless --variants says otherwise: one thing varied at a time."""
    more = 2 * guidance - 1
    return [
        *(Variant("dpm++", steps, guidance) for steps in (8, 12, 16, 20, 25)),
        *(Variant("ddim", steps, guidance) for steps in (20, 50)),
        Variant("ddpm", 100, guidance),
        Variant("dpm++", 20, 1.0),
        *(Variant("dpm++", 20, guidance, interval) for interval in ((0.0, 0.5), (0.25, 0.75), (0.5, 1.0))),
        *(Variant("dpm++", 20, more, interval) for interval in ((0.0, 1.0), (0.25, 0.75))),
    ]


def read_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line, or these words."""
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", help="run folder, or one checkpoint file in it; its images or cache at hand")
    parser.add_argument("--images_per_class", type=int, default=40, help="samples per class, variant and seed")
    parser.add_argument("--seeds", type=int, default=3, help="sampling seeds, 0 and up")
    parser.add_argument("--variants", nargs="+", type=Variant.parse, help="'SAMPLER STEPS GUIDANCE LOW HIGH' of each")
    parser.add_argument(
        "--library", choices=("all", "baseline", "none"), default="all", help="which rows of the library there are"
    )
    parser.add_argument(
        "--classifier_steps", type=int, default=0, help="steps of a classifier for each variant and seed; 0 trains none"
    )
    parser.add_argument("--picture", help="where the picture goes (.png); none without")
    parser.add_argument("--small", action="store_true", help="a tiny run of its own: shows that it works")
    arguments = parser.parse_args(argv)
    if arguments.seeds < 1 or arguments.images_per_class < 1 or arguments.classifier_steps < 0:
        parser.error("--seeds and --images_per_class are at least 1, --classifier_steps 0")
    if (arguments.checkpoint is None) != arguments.small:
        parser.error("give --checkpoint, or --small, which makes a run of its own")
    return arguments


def main() -> None:
    """Samples, compares, prints."""
    arguments = read_arguments()
    from gait_latents.common import errors
    from gait_latents.common.errors import UserError

    with tempfile.TemporaryDirectory() as folder:
        checkpoint = make_small_run(Path(folder)) if arguments.small else arguments.checkpoint
        try:
            measure(arguments, checkpoint, Path(folder))
        except (UserError, errors.Failed) as error:
            raise SystemExit(f"error: {error}") from error


def measure(arguments: argparse.Namespace, checkpoint: str, folder: Path) -> None:
    """Prints the table and the line of JSON, and draws the picture."""
    import torch

    from gait_latents.common import pictures
    from gait_latents.evaluation import image_sets
    from gait_latents.evaluation import plan as evaluation_plan

    plan = evaluation_plan.make_plan(harness.flags({"checkpoint": checkpoint, "output_folder": folder / "evaluation"}))
    real = image_sets.open_real(plan)
    if not len(real.test):
        raise SystemExit("error: the run has no test images to compare with")
    count = 4 if arguments.small else arguments.images_per_class
    bench = Bench(plan, real, count, classifier_steps=arguments.classifier_steps)
    guidance = float(plan.state.meta.settings["cond_scale"])
    library = library_variants(guidance, bench.diffusion.num_timesteps)
    variants = {"all": library, "baseline": library[:1], "none": []}[arguments.library]
    variants += arguments.variants or our_variants(guidance)
    if arguments.small:
        variants = [dataclasses.replace(variant, steps=min(variant.steps, 4)) for variant in variants]
    most = bench.diffusion.num_timesteps
    variants = [dataclasses.replace(variant, steps=min(variant.steps, most)) for variant in variants]
    variants = list(dict.fromkeys(variants))
    rows: dict[str, list[dict[str, float]]] = {variant.name: [] for variant in variants}
    with contextlib.suppress(KeyboardInterrupt):  # Ctrl-C shows what there is by then
        for seed in range(arguments.seeds):
            for variant in variants:
                rows[variant.name].append(bench.run(variant, seed))
                print(f"seed {seed}: {variant.name} done", file=sys.stderr, flush=True)
    baseline = variants[0].name
    if not rows[baseline]:
        raise SystemExit("error: stopped before anything was measured")
    for found in rows.values():
        for own, base in zip(found, [row["seconds"] for row in rows[baseline]], strict=False):
            own["speed"] = base / own["seconds"]
    real_rows = [{**bench.yardstick, "alone": accuracy} for accuracy in bench.on_real.values()] or [bench.yardstick]
    table = {name: summary(found) for name, found in {**rows, REAL: real_rows}.items() if found}
    print_table(table)
    if arguments.picture:
        pictures.save_picture(draw(table), Path(arguments.picture))
    facts = {
        "step": plan.state.step,
        "images_per_class": bench.count,
        "test_images": len(real.test),
        "seeds": {name: len(found) for name, found in rows.items()},
    }
    machine = harness.machine(torch.get_num_threads())
    print(json.dumps({"benchmark": "bench_sample", **machine, **facts, "baseline": baseline, "variants": table}))


def make_small_run(folder: Path) -> str:
    """Trains a tiny network on tiny images for some steps; returns its results folder."""
    import bench_encode

    import preprocess_latents
    import train_latent_cfg

    sizes = argparse.Namespace(small=True, images=24)
    bench_encode.make_images(folder / "data", sizes)
    (folder / "data" / "ID_2").mkdir()
    for path in sorted((folder / "data" / "ID_1").iterdir())[::2]:
        path.rename(folder / "data" / "ID_2" / path.name)
    bench_encode.save_vae(folder / "vae.pt", sizes)
    about_images = {
        "vae_path": folder / "vae.pt",
        "data_path": folder / "data",
        "image_size": bench_encode.image_size(sizes),
        "images_per_user": 6,
    }
    cache, results = folder / "latents_cache", folder / "results"
    network = {"dim": 8, "dim_mults": 1, "train_num_steps": 2, "num_samples": 0, "trackers": "none"}
    with contextlib.redirect_stdout(sys.stderr):
        words = harness.flags({**about_images, "output_folder": cache})
        assert preprocess_latents.main([*words, "--splits", "train", "test"]) == 0
        words = harness.flags({**about_images, **network, "latents_cache_folder": cache, "results_folder": results})
        assert train_latent_cfg.main(words) == 0
    return str(results)


# --- sampling ----------------------------------------------------------------------------------------------


class Bench:
    """The networks and the real images; samples with a variant, and compares."""

    def __init__(self, plan: Any, real: Any, count: int, *, classifier_steps: int) -> None:
        import torch
        from denoising_diffusion_pytorch.classifier_free_guidance import GaussianDiffusion, Unet

        from gait_latents.diffusion.model import unet_arguments
        from gait_latents.evaluation import sweep
        from gait_latents.evaluation.trials import Trials
        from gait_latents.training.trained_model import TrainedModel

        self.plan, self.real, self.count, self.classifier_steps = plan, real, count, classifier_steps
        self.shape = plan.state.meta.latent_shape
        self.generator = TrainedModel(sweep.sampling_settings(plan), plan.state, plan.device)
        self.diffusion, self.dtype = self.generator.diffusion, self.generator.dtype
        self.trials = Trials.of(plan, real, test=real.test) if classifier_steps else None
        self.on_real: dict[int, float] = {}  # accuracy of the classifier on real images, by seed
        facts = plan.state.meta.network_facts
        self.library = GaussianDiffusion(
            Unet(**unet_arguments(**facts)),
            image_size=self.shape[1],
            timesteps=facts["timesteps"],
            objective=facts["objective"],
            ddim_sampling_eta=1 - 1e-6,  # with 1, rounding makes a variance negative on some CPUs where steps are few
        )
        self.library.load_state_dict(self.diffusion.state_dict())  # the tables of the schedule too
        self.library.eval().to(plan.device)
        self.labels = torch.arange(len(plan.classes)).repeat_interleave(count)
        self.yardstick: dict[str, float] = {}
        self._warm_up()

    def _warm_up(self) -> None:
        """Takes one step with each shape that is timed."""
        self._library(Variant("library ddim", 1, LIBRARY_GUIDANCE), 0, [0])
        for guidance in (1.0, 2.0):
            self._ours(Variant("ddim", 1, guidance), 0, [(0, 0)])

    def run(self, variant: Variant, seed: int) -> dict[str, float]:
        """Samples every class with a seed; returns passes and seconds per sample, and the figures."""
        from gait_latents.evaluation.figures import Points

        started = time.perf_counter()
        labels = range(len(self.plan.classes))
        if variant.is_library:
            samples = self._library(variant, seed, labels)
        else:
            samples = self._ours(variant, seed, [(label, index) for label in labels for index in range(self.count)])
        seconds = (time.perf_counter() - started) / len(self.labels)
        if variant.is_library:
            passes = 2 * variant.steps
        else:
            passes = self.diffusion.num_passes(
                variant.steps, cond_scale=variant.guidance, guidance_interval=variant.interval
            )
        figures = {**self.figures(Points(samples, self.labels)), **self.help(samples, seed)}
        return {"passes": passes, "seconds": seconds, **figures}

    def _library(self, variant: Variant, seed: int, labels: Sequence[int]) -> Any:
        """Samples these classes one after the other, as many samples in a call as there are of a class."""
        import torch

        torch.manual_seed(seed)
        self.library.sampling_timesteps = variant.steps
        parts = []
        with contextlib.redirect_stderr(io.StringIO()):  # a bar for each class
            for label in labels:
                mapped = self.library.ddim_sample(
                    torch.full((self.count,), label, device=self.plan.device),
                    (self.count, *self.shape),
                    cond_scale=variant.guidance,
                    rescaled_phi=LIBRARY_PHI,
                    clip_denoised=variant.clamp,
                )
                parts.append(2 * mapped - 1)
        return torch.cat(parts).cpu()

    def _ours(self, variant: Variant, seed: int, cells: Sequence[tuple[int, int]]) -> Any:
        """Samples (label, index) in full batches, as generate.py does."""
        import torch

        from gait_latents.common.seeds import sample_generator
        from gait_latents.diffusion.sampling import BATCH_SIZE, sample_padded

        parts = []
        for start in range(0, len(cells), BATCH_SIZE):
            some = cells[start : start + BATCH_SIZE]
            parts.append(
                sample_padded(
                    self.diffusion,
                    [label for label, _ in some],
                    [sample_generator(seed, "image", self.plan.classes[label], index) for label, index in some],
                    dtype=self.dtype,
                    cond_scale=variant.guidance,
                    guidance_interval=variant.interval,
                    sampler=variant.sampler,
                    sampling_timesteps=variant.steps,
                )
            )
        return torch.cat(parts).cpu()

    def figures(self, samples: Any) -> dict[str, float]:
        """Compares samples with the test images; keeps what as many training images get as the yardstick."""
        from gait_latents.evaluation.figures import NUM_DIRECTIONS, closeness, memorisation, recognition

        training, test, seed = self.real.training.latents, self.real.test.latents, self.plan.settings.seed
        found = closeness(
            samples,
            training,
            test,
            neighbours=self.plan.settings.neighbours,
            seed=seed,
            num_directions=NUM_DIRECTIONS,
        )
        copies = memorisation(samples, training, test, seed=seed)
        self.yardstick = {
            **{name: found["training"][name] for name in FIGURES if name in found["training"]},
            "recognition": recognition(test, training),
            "near_share": copies["test_near_share"],
        }
        return {
            **{name: found["synthetic"][name] for name in FIGURES if name in found["synthetic"]},
            "recognition": recognition(samples, training),
            "near_share": copies["near_share"],
        }

    def help(self, samples: Any, seed: int) -> dict[str, float]:
        """Trains a classifier on the decoded samples, and one on these and the real images, which is what they gain."""
        if self.trials is None:
            return {}
        from gait_latents.evaluation import sweep

        training, test = self.trials.training, self.trials.test
        synthetic = sweep.decode(samples, self.generator, self.plan), self.labels
        if seed not in self.on_real:
            self.on_real[seed] = self._accuracy([training], test, seed)
        both = self._accuracy([training, synthetic], test, seed)
        return {"alone": self._accuracy([synthetic], test, seed), "gain": 100 * (both - self.on_real[seed])}

    def _accuracy(self, sets: Sequence[Any], test: Any, seed: int) -> float:
        from gait_latents.evaluation.augmentation import Augmentation
        from gait_latents.evaluation.classifier import train_and_classify
        from gait_latents.evaluation.comparison import score

        logits = train_and_classify(
            sets,
            test[0],
            num_classes=len(self.plan.classes),
            num_steps=self.classifier_steps,
            seed=seed,
            device=self.plan.device,
            learning_rate=LEARNING_RATE,
            augment=Augmentation().scaled(AUGMENTATION_STRENGTH),
        )
        return score(logits, test[1])["accuracy"]


# --- what is shown -----------------------------------------------------------------------------------------


def summary(rows: Sequence[Mapping[str, float | None]]) -> dict[str, list[float]]:
    """Returns median, smallest and largest of each figure over the seeds, without those that could not be had."""
    found = {}
    for name in rows[0]:
        values = [value for row in rows if (value := row.get(name)) is not None]
        if values:
            found[name] = [statistics.median(values), min(values), max(values)]
    return found


def print_table(table: Mapping[str, Mapping[str, list[float]]]) -> None:
    """Prints a row for each variant; figures of one seed, or alike over all, stand without their spread."""
    heads = {name: head for name, head in {**COSTS, **FIGURES}.items() if any(name in row for row in table.values())}
    print("| | variant | " + " | ".join(heads.values()) + " |")
    print("|---" * (len(heads) + 2) + "|")
    for number, (name, figures) in enumerate(table.items()):
        cells = [_cell(name_of, figures.get(name_of)) for name_of in heads]
        print(f"| {number if name != REAL else ''} | {name} | " + " | ".join(cells) + " |")


def _cell(name: str, figure: Sequence[float] | None) -> str:
    if figure is None:
        return ""

    def shown(value: float) -> str:
        if name in ("recognition", "recall", "near_share", "alone"):
            return f"{value:.1%}"
        if name == "gain":
            return f"{value:+.1f}"
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"

    middle, low, high = map(shown, figure)
    return middle if low == high else f"{middle} ({low} to {high})"


COLOURS = {"library": (190, 60, 40), "dpm++": (31, 90, 180), "ddim": (40, 140, 70), "ddpm": (140, 80, 170)}
INK, FAINT = (0, 0, 0), (210, 210, 210)
LEFT, TOP, ACROSS, DOWN, LEGEND = 70, 20, 620, 460, 330  # of the frame, in pixels, and the room beside it


def draw(table: Mapping[str, Mapping[str, list[float]]]) -> Any:
    """Draws the first figure against the passes, both logarithmic: a mark for each variant, a line for real images.

    The bar of a mark spans the seeds. Numbers stand for the names beside the frame.
    """
    from PIL import Image, ImageDraw, ImageFont

    figure = next(iter(FIGURES))
    rows = [
        (number, name, row["passes"][0], row[figure])
        for number, (name, row) in enumerate(table.items())
        if name != REAL and figure in row
    ]
    real = table[REAL].get(figure, [math.nan])[0]
    heights = [value for *_, found in rows for value in found] + ([real] if math.isfinite(real) else [])
    x_of = axis([passes for _, _, passes, _ in rows], LEFT, LEFT + ACROSS)
    y_of = axis(heights, TOP + DOWN, TOP)
    canvas = Image.new("RGB", (LEFT + ACROSS + LEGEND, TOP + DOWN + 60), (255, 255, 255))
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=13)
    for value in ticks([passes for _, _, passes, _ in rows]):
        pen.line([(x_of(value), TOP), (x_of(value), TOP + DOWN)], fill=FAINT)
        pen.text((x_of(value), TOP + DOWN + 6), f"{value:g}", fill=INK, font=font, anchor="mt")
    for value in ticks(heights):
        pen.line([(LEFT, y_of(value)), (LEFT + ACROSS, y_of(value))], fill=FAINT)
        pen.text((LEFT - 8, y_of(value)), f"{value:g}", fill=INK, font=font, anchor="rm")
    pen.text((LEFT + ACROSS / 2, TOP + DOWN + 30), "network passes per image", fill=INK, font=font, anchor="mt")
    title = FIGURES[figure].replace("é", "e")  # which the font of Pillow lacks
    pen.text((LEFT, 3), f"{title}: less is nearer to real images", fill=INK, font=font)
    if math.isfinite(real):
        pen.line([(LEFT, y_of(real)), (LEFT + ACROSS, y_of(real))], fill=INK)
        pen.text((LEFT + ACROSS - 4, y_of(real) - 2), "as many real images", fill=INK, font=font, anchor="rb")
    for place, (number, name, passes, (middle, low, high)) in enumerate(rows):
        x, y, colour = x_of(passes), y_of(middle), COLOURS[name.partition(" ")[0]]
        pen.line([(x, y_of(low)), (x, y_of(high))], fill=colour, width=2)
        pen.ellipse([x - 4, y - 4, x + 4, y + 4], fill=colour)
        pen.text((x + 7, y), str(number), fill=colour, font=font, anchor="lm")
        pen.text((LEFT + ACROSS + 14, TOP + 22 * place), f"{number}   {name}", fill=colour, font=font)
    return canvas


def axis(values: Sequence[float], start: float, end: float) -> Callable[[float], float]:
    """Returns the place of a value on a logarithmic axis between two places, with some room at both ends."""
    low, high = math.log(min(values)) - 0.1, math.log(max(values)) + 0.1
    return lambda value: start + (math.log(value) - low) / (high - low) * (end - start)


def ticks(values: Sequence[float]) -> list[float]:
    """Returns round numbers between the smallest and the largest value."""
    decades = range(math.floor(math.log10(min(values))), math.ceil(math.log10(max(values))) + 1)
    return [v for decade in decades for v in (10.0**decade * k for k in (1, 2, 5)) if min(values) <= v <= max(values)]


if __name__ == "__main__":
    sys.exit(main())
