"""The classifiers of an evaluation: whether any are trained, on which images, and with which settings."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from gait_latents.common import console
from gait_latents.common.process import StopSignals
from gait_latents.evaluation import classifier
from gait_latents.evaluation.image_sets import NO_TEST_IMAGES, ImageSet, RealImages
from gait_latents.evaluation.plan import EvaluationPlan


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
    """Classifiers with and without generated images, tested on the test images."""

    plan: EvaluationPlan
    training: tuple[Tensor, Tensor]  # uint8 [N S S 3] and labels [N]
    test: tuple[Tensor, Tensor]

    @classmethod
    def of(cls, plan: EvaluationPlan, real: RealImages) -> "Trials":
        """Reads the real images; raises Failed naming the first that cannot be read."""
        size = plan.settings.classifier_image_size
        training, test = ((part.pixels(size), part.labels) for part in (real.training, real.test))
        return cls(plan, training, test)

    def run(
        self,
        synthetic: Tensor,
        labels: Tensor,
        *,
        done: dict[str, Any],
        save: Callable[[dict[str, Any]], object],
        signals: StopSignals,
    ) -> dict[str, Any]:
        """Trains what is not done yet; returns what `classifier.compare` does, and what all trainings share.

        Args:
            synthetic: generated images, uint8 [N S S 3] of the size that the classifiers see.
            done: `scores` of an earlier call.
            save: called with all scores after each training.
        """
        settings = self.plan.settings
        left = len(classifier.trainings_left(seeds(self.plan), done))
        with console.progress(total=left * settings.classifier_steps, unit="steps", label="classifier") as bar:

            def progress() -> None:
                bar.advance()
                signals.raise_if_received()

            found = classifier.compare(
                *self.training,
                synthetic,
                labels,
                *self.test,
                num_classes=len(self.plan.classes),
                num_steps=settings.classifier_steps,
                seeds=seeds(self.plan),
                device=self.plan.device,
                done=done,
                save=save,
                class_names=self.plan.classes,
                progress=progress,
            )
        return {**found, **made_of(self.plan)}


def seeds(plan: EvaluationPlan) -> list[int]:
    """Returns the seeds of the classifiers."""
    return list(range(plan.settings.seed, plan.settings.seed + plan.settings.classifier_seeds))


def made_of(plan: EvaluationPlan) -> dict[str, Any]:
    """Returns all that a classifier depends on besides its images and its seed."""
    return {"image_size": plan.settings.classifier_image_size, "num_steps": plan.settings.classifier_steps}
