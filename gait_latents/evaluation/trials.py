"""The classifiers of an evaluation: whether any are trained, on which images, and with which settings."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from gait_latents.common import console, pictures
from gait_latents.common.errors import UserError
from gait_latents.common.process import StopSignals
from gait_latents.evaluation.classifier import Images
from gait_latents.evaluation.comparison import POSTERIOR, REAL, SYNTHETIC, Comparison
from gait_latents.evaluation.image_sets import NO_TEST_IMAGES, ImageSet, RealImages, resize_image
from gait_latents.evaluation.plan import EvaluationPlan
from gait_latents.images import generated, reading
from gait_latents.latents.vae_fit import check_vae_of_model
from gait_latents.training.real_latents import RealLatents
from gait_latents.vae.decoder import ImageDecoder


def why_not(
    plan: EvaluationPlan, real: RealImages, synthetic_labels: Tensor, others: Sequence[ImageSet] = ()
) -> str | None:
    """Returns why no classifier is trained, in a sentence; None where it is.

    Args:
        others: further image sets whose files are needed.
    """
    asked = plan.settings.classifier
    if asked == "false":
        return "not asked for (--classifier false)"
    if asked == "auto" and plan.device.type == "cpu":
        return "on a CPU it takes long, and is left out unless asked for (--classifier true)"
    if not len(real.test):
        return NO_TEST_IMAGES
    if len(synthetic_labels.unique()) < len(plan.classes):
        return "there are classes without synthetic images"
    absent = [part.folder for part in (real.training, *others, real.test) if not part.are_at_hand]
    return f"the real images are not at hand in {absent[0]}" if absent else None


@dataclass(frozen=True, eq=False)
class Trials:
    """Classifiers with and without generated images, tested on images that none of them saw."""

    plan: EvaluationPlan
    training: Images
    validation: Images | None  # by which learning rate and augmentation are chosen; None takes training images
    test: Images

    @classmethod
    def of(cls, plan: EvaluationPlan, real: RealImages, *, test: ImageSet) -> "Trials":
        """Reads the real images; raises Failed naming the first that cannot be read.

        Args:
            test: the images that the classifiers are tested on; where those are the validation images, these choose
                nothing else.
        """
        size = plan.settings.classifier_image_size

        def read(part: ImageSet) -> Images:
            return part.pixels(size), part.labels

        has_validation = len(real.validation) and test is not real.validation
        return cls(plan, read(real.training), read(real.validation) if has_validation else None, read(test))

    def comparison(
        self,
        synthetic: Images,
        *,
        posterior: Images | None = None,
        parts: Sequence[int] = (),
        done: dict[str, Any],
        save: Callable[[dict[str, Any]], object],
        keep: Callable[[str, int, Tensor], object] = lambda name, seed, logits: None,
        progress: Callable[[], None] | None = None,
    ) -> Comparison:
        """Prepares the trainings that are not done yet; for the arguments see `Comparison`."""
        settings = self.plan.settings
        sets = {REAL: self.training, SYNTHETIC: synthetic} | ({} if posterior is None else {POSTERIOR: posterior})
        return Comparison(
            sets,
            self.validation,
            self.test,
            num_steps=settings.classifier_steps,
            seeds=seeds(self.plan),
            device=self.plan.device,
            class_names=self.plan.classes,
            parts=parts,
            gap=self.plan.split.rule["split_gap"] if self.plan.split.rule["split"] == "contiguous" else 0,
            done=done,
            save=save,
            keep=keep,
            progress=progress,
        )

    def run(self, synthetic: Images, *, signals: StopSignals, **how: Any) -> dict[str, Any]:
        """Trains what is not done yet under a progress bar; returns what `Comparison.run` does, and what all share."""
        left = self.comparison(synthetic, **how).num_trainings_left()
        total = left * self.plan.settings.classifier_steps
        with console.progress(total=total, unit="steps", label="classifier") as bar:

            def progress() -> None:
                bar.advance()
                signals.raise_if_received()

            found = self.comparison(synthetic, **how, progress=progress).run()
        return {**found, **made_of(self.plan)}


def seeds(plan: EvaluationPlan) -> list[int]:
    """Returns the seeds of the classifiers."""
    return list(range(plan.settings.seed, plan.settings.seed + plan.settings.classifier_seeds))


def made_of(plan: EvaluationPlan) -> dict[str, Any]:
    """Returns all that a classifier depends on besides its images and its seed."""
    return {
        "image_size": plan.settings.classifier_image_size,
        "num_steps": plan.settings.classifier_steps,
        "recipe": 2,  # to be raised when classifiers are trained in another way
    }


def why_no_posterior(plan: EvaluationPlan) -> str | None:
    """Returns why there are no draws of the posterior, in a sentence; None where there can be some."""
    try:
        check_vae_of_model(plan.space, plan.settings.vae_path, trust_pickle=plan.settings.trust_pickle)
    except UserError as error:
        return str(error)
    return None


def posterior_images(plan: EvaluationPlan, real: RealImages, labels: Tensor, signals: StopSignals) -> Tensor:
    """Decodes draws of what the VAE makes of training images, uint8 [N S S 3], as `generate.py --from_real 0` does.

    Args:
        labels: the classes of the images [N]; those of one class are drawn from its training images in turn.
    """
    norm = plan.state.meta.latent_norm
    decoder = ImageDecoder(plan.settings.vae_path or "", norm, plan.device, trust_pickle=plan.settings.trust_pickle)
    draws = RealLatents(
        lambda positions: real.dataset.moments(torch.tensor(positions)).cpu(),
        real.training.labels.tolist(),
        plan.classes,
        norm,
    )
    numbers: dict[int, int] = {}

    def draw(label: int) -> Tensor:
        number = numbers[label] = numbers.get(label, -1) + 1
        return draws.draw([label], [number], seed=plan.settings.seed)

    with console.progress(total=len(labels), unit="images", label="draws of the posterior") as bar:

        def between() -> None:
            bar.advance()
            signals.raise_if_received()

        try:
            return decoded(map(draw, labels.tolist()), decoder, plan, between=between)
        finally:
            decoder.close()


def decoded(
    samples: Any,
    decoder: ImageDecoder,
    plan: EvaluationPlan,
    *,
    suffix: str | None = None,
    between: Callable[[], None] = lambda: None,
) -> Tensor:
    """Decodes samples [1 C h w] to the images [N S S 3] that classifiers see, by way of files as generate.py writes.

    Args:
        suffix: of the files; None takes that of the training images.
        between: called after each; what it raises ends the work.
    """
    size, suffix = plan.settings.classifier_image_size, suffix or generated.suffix("auto", plan.state.meta.image_suffix)
    found = []
    for sample in samples:
        (image,) = decoder(sample)
        file = pictures.encode_image(Image.fromarray(image), suffix)
        found.append(resize_image(reading.decode(file, image_size=plan.images.image_size), size))
        between()
    return torch.stack(found)
