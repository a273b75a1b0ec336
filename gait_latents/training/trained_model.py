"""The averaged network of a checkpoint, ready to sample."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from gait_latents.common import hardware
from gait_latents.common.errors import Failed, UserError, let_shortage_pass
from gait_latents.common.seeds import sample_generator
from gait_latents.diffusion import build
from gait_latents.diffusion.model import LatentDiffusion
from gait_latents.diffusion.sampling import num_solver_steps, sample_padded
from gait_latents.images.generated import suffix
from gait_latents.latents.vae_fit import check_vae_of_model
from gait_latents.settings import GenerateSettings
from gait_latents.training.real_latents import RealLatents
from gait_latents.training.run_folder import SavedState
from gait_latents.vae import base
from gait_latents.vae.decoder import ImageDecoder

# Settings of sampling whose default is what the run was trained with.
FROM_RUN = ("vae_path", "seed", "cond_scale", "guidance_interval", "sampler", "sampling_timesteps", "precision")


class TrainedModel:
    """The averaged network of a checkpoint, ready to make samples.

    Attributes:
        meta: what the checkpoint says of its run.
        all_classes: the class names, in label order.
        suffix: of the image files that its samples become.
        steps: number of solver steps of a sample.
        dtype: the number format of the network; `precision_reason` says why.
        decoder: makes images of samples.
        weights_digest: the digest of the averaged weights.
        real: the training latents, where samples begin with these.
    """

    def __init__(self, settings: GenerateSettings, state: SavedState, device: torch.device) -> None:
        self.settings, self.meta, self.device = settings, state.meta, device
        self.all_classes = state.meta.classes
        self.suffix = suffix(settings.image_format, state.meta.image_suffix)
        self.steps = num_solver_steps(
            settings.sampler,
            settings.sampling_timesteps,
            state.meta.settings["timesteps"],
            auto_steps=state.meta.auto_steps,
        )
        vae_path = check_vae_of_model(state.meta.space, settings.vae_path, trust_pickle=settings.trust_pickle)
        self.vae_name = Path(vae_path).name
        self.dtype, self.precision_reason = hardware.pick_precision(settings.precision, device)
        follows = device.type != "cpu" or self.dtype == torch.bfloat16  # float16 was not timed on CPUs
        decoder_dtype = self.dtype if follows else torch.float32
        self.decoder = ImageDecoder(
            vae_path, state.meta.latent_norm, device, dtype=decoder_dtype, trust_pickle=settings.trust_pickle
        )
        self.weights_digest = base.weights_digest(state.averages)
        self.diffusion = averaged_diffusion(state).to(device)
        self.real = None if settings.from_real is None else RealLatents.of_run(state)
        self.strength = 1.0 if settings.from_real is None else settings.from_real

    def sample(
        self,
        labels: list[int],
        indices: list[int],
        cond_scale: float,
        *,
        between: Callable[[], None] = lambda: None,
    ) -> torch.Tensor:
        """Makes samples [B C h w] of at most BATCH_SIZE images.

        `between` is called after each step of the solver; what it raises ends the work.

        Raises:
            Failed: when one is not finite, which would be decoded to a blank image.
        """
        samples = sample_padded(
            self.diffusion,
            labels,
            [
                sample_generator(self.settings.seed, "image", self.all_classes[label], index)
                for label, index in zip(labels, indices, strict=True)
            ],
            dtype=self.dtype,
            cond_scale=cond_scale,
            guidance_interval=self.settings.guidance_interval,
            sampler=self.settings.sampler,
            sampling_timesteps=self.steps,
            start=None if self.real is None else self.real.draw(labels, indices, seed=self.settings.seed),
            strength=self.strength,
            progress=between,
        )
        self._refuse_not_finite(samples, labels, cond_scale)
        return samples

    def _refuse_not_finite(self, samples: torch.Tensor, labels: Sequence[int], cond_scale: float) -> None:
        is_finite = samples.flatten(1).isfinite().all(1).tolist()
        if all(is_finite):
            return
        first = self.all_classes[labels[is_finite.index(False)]]
        remedy = "give --precision float32 to generate.py" if self.dtype != torch.float32 else "take another checkpoint"
        raise Failed(
            f"the samples in {str(self.dtype).removeprefix('torch.')} are not finite, of {first} at guidance "
            f"{cond_scale:g}; {remedy}, or less guidance"
        )


def averaged_diffusion(state: SavedState) -> LatentDiffusion:
    """Builds the averaged network of a checkpoint, in eval mode and without gradients.

    Raises:
        UserError: when its weights are those of another network.
    """
    meta = state.meta
    diffusion = build.build_diffusion(meta.settings, num_classes=len(meta.classes), latent_shape=meta.latent_shape)
    try:
        diffusion.load_state_dict(state.averages)
    except RuntimeError as error:
        let_shortage_pass(error)
        raise UserError(
            f"the checkpoint holds other weights than those of its network: {' '.join(str(error).split())[:300]}"
        ) from error
    return diffusion.eval().requires_grad_(False)
