"""A trained model that samples: the averaged network of a checkpoint, with the decoder that belongs to it."""

from collections.abc import Sequence
from pathlib import Path

import torch

import build
import hardware
import vae
from config import GenerateSettings, UserError
from diffusion import LatentDiffusion
from draws import sample_generator
from images import RECIPE
from latent_cache import Space
from run_folder import SavedState
from sampling import Decoder, check_decodes, num_solver_steps, sample_padded
from script import Failed

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
    """

    def __init__(self, settings: GenerateSettings, state: SavedState, device: torch.device) -> None:
        self.settings, self.meta, self.device = settings, state.meta, device
        self.all_classes = state.meta.classes
        self.suffix = _suffix(settings.image_format, state.meta.image_suffix)
        self.steps = num_solver_steps(
            settings.sampler,
            settings.sampling_timesteps,
            state.meta.settings["timesteps"],
            auto_steps=state.meta.auto_steps,
        )
        vae_path = checked_vae(settings.vae_path, state.meta.space)
        self.vae_name = Path(vae_path).name
        self.dtype, self.precision_reason = hardware.pick_precision(settings.precision, device)
        follows = device.type != "cpu" or self.dtype == torch.bfloat16  # float16 was not timed on CPUs
        decoder_dtype = self.dtype if follows else torch.float32
        self.decoder = Decoder(vae_path, state.meta.latent_norm, device, dtype=decoder_dtype)
        self.weights_digest = vae.weights_digest(state.averages)
        self.diffusion = averaged_diffusion(state).to(device)

    def sample(self, labels: list[int], indices: list[int], cond_scale: float) -> torch.Tensor:
        """Makes samples [B C h w] of at most BATCH_SIZE images.

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
        raise UserError(
            f"the checkpoint holds other weights than those of its network: {' '.join(str(error).split())[:300]}"
        ) from error
    return diffusion.eval().requires_grad_(False)


def checked_vae(vae_path: str | None, trained: Space) -> str:
    """Returns the path of the VAE; refuses one whose encoder did not make the latents that the model learnt."""
    if vae_path is None:
        raise UserError("--vae_path is needed: the checkpoint does not name a VAE")
    identity = vae.read_identity(vae_path)
    if trained.is_imported:  # nobody knows which VAE made them
        check_decodes(vae_path, identity, trained.moments_shape[0] // 2)
        return vae_path
    space = Space.of(identity.fingerprint, trained.spec["image_size"], RECIPE, trained.moments_shape)
    if space.spec["vae"] != trained.spec["vae"]:
        raise UserError(
            f"--vae_path {vae_path} is not the VAE that the model was trained with: "
            + "; ".join(space.differing_fields(trained))
        )
    return vae_path


def _suffix(image_format: str, trained_on: str) -> str:
    if image_format != "auto":
        return f".{image_format}"
    return ".jpg" if trained_on in (".jpg", ".jpeg", ".jpe", ".jfif") else ".png"
