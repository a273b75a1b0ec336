"""The diffusion model on latents: the library's U-Net and noise schedule, with our loss, guidance and sampling.

Shapes: B samples, C latent channels, S the latent's height and width, T timesteps of training.
A noisy latent is alpha * latent + sigma * noise, with alpha^2 + sigma^2 = 1 and lambda = log(alpha / sigma).
"""

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from gait_latents.common.errors import UserError
from gait_latents.diffusion.library import GaussianDiffusion, Unet
from gait_latents.diffusion.samplers import CLEAN, SAMPLERS, START_LAMBDA, NoiseLevel, spread, steps_of_levels


class LatentUnet(Unet):
    """The library's U-Net: from noisy latents [B C S S], times [B] and classes [B] to float32 [B C S S]."""

    def forward(
        self,
        x: Tensor,
        time: Tensor,
        classes: Tensor,
        cond_drop_prob: float | None = None,
        cond_keep_mask: Tensor | None = None,
    ) -> Tensor:
        """Runs the network; under autocast its output still comes back in float32."""
        return super().forward(x, time, classes, cond_drop_prob, cond_keep_mask).float()

    def predict_guided(self, x: Tensor, time: Tensor, classes: Tensor, cond_scale: float) -> Tensor:
        """Runs the network with classifier-free guidance (Ho & Salimans 2022).

        Args:
            x: noisy latents [B C S S].
            time: timesteps [B].
            classes: labels [B].
            cond_scale: 0 is without class, 1 with class and no guidance; above 1 is guided.

        Returns:
            without + cond_scale * (with - without), float32 [B C S S].
        """
        if passes_per_step(cond_scale) == 1:
            return self(x, time, classes, cond_drop_prob=1.0 - cond_scale)
        batch = len(x)
        keep = torch.arange(2 * batch, device=x.device) < batch  # 2B: with the class, then without
        both = self(x.repeat(2, 1, 1, 1), time.repeat(2), classes.repeat(2), cond_keep_mask=keep)  # 2B C S S
        cond, uncond = both[:batch], both[batch:]  # each B C S S
        return uncond + cond_scale * (cond - uncond)

    def forward_with_cond_scale(self, *args, **kwargs):
        """Raises NotImplementedError, so that no sampler of the library runs: its guidance is another one."""
        raise NotImplementedError("use LatentUnet.predict_guided and LatentDiffusion.sample")


def shift_along_width(latents: Tensor, columns: Tensor) -> Tensor:
    """Shifts each latent [B C S S] to the right by its number of columns [B]; the edge column fills the gap."""
    width = latents.shape[3]
    sources = (torch.arange(width, device=latents.device) - columns[:, None]).clamp(0, width - 1)  # B S
    return latents.gather(3, sources[:, None, None, :].expand(latents.shape))


def own_columns(columns: Tensor, width: int) -> Tensor:
    """Returns False for the columns that `shift_along_width` fills with the edge, and True for the others, [B S]."""
    sources = torch.arange(width, device=columns.device) - columns[:, None]  # B S
    return (sources >= 0) & (sources < width)


def passes_per_step(cond_scale: float) -> int:
    """Returns the network passes per sample that guidance of this scale takes: with the class, without, or both."""
    return 1 if cond_scale in (0, 1) else 2


def mean_by_timestep(times: Sequence[int], losses: Sequence[float], timesteps: int) -> dict[str, float]:
    """Returns the mean loss in ten equal ranges of timesteps by names such as 100-199; empty ranges are left out."""
    num_bins, width = min(NUM_TIME_BINS, timesteps), len(str(timesteps - 1))
    found: dict[int, list[float]] = {}
    for time, loss in zip(times, losses, strict=True):
        found.setdefault(time * num_bins // timesteps, []).append(loss)
    edges = [-(-timesteps * number // num_bins) for number in range(num_bins + 1)]
    return {
        f"{edges[number]:0{width}d}-{edges[number + 1] - 1:0{width}d}": math.fsum(some) / len(some)
        for number, some in sorted(found.items())
    }


NUM_TIME_BINS = 10  # ranges of timesteps


class LatentDiffusion(GaussianDiffusion):
    """Trains the U-Net on latents and samples from it.

    The library's own training and sampling are for images: they map pixels to [-1, 1], clamp, and draw random numbers.
    Here latents are taken as they are, and every random number comes from the caller.
    """

    loss_weight: Tensor  # of each timestep [T], a buffer of the library

    def __init__(
        self,
        *,
        num_classes: int,
        latent_channels: int,
        latent_size: int,
        dim: int,
        dim_mults: Sequence[int],
        attn_dim_head: int,
        attn_heads: int,
        cond_drop_prob: float,
        timesteps: int,
        objective: str,
        beta_schedule: str,
        noise_shift: float,
        min_snr_loss_weight: bool,
        min_snr_gamma: float,
    ):
        """Builds network and schedule; raises UserError where sizes or the number of timesteps do not fit."""
        _check_sizes(latent_size, dim, dim_mults)
        arguments = unet_arguments(
            dim=dim,
            num_classes=num_classes,
            cond_drop_prob=cond_drop_prob,
            dim_mults=dim_mults,
            latent_channels=latent_channels,
            attn_dim_head=attn_dim_head,
            attn_heads=attn_heads,
        )
        with _noisier_schedule(beta_schedule, noise_shift):
            super().__init__(
                LatentUnet(**arguments),
                image_size=latent_size,
                timesteps=timesteps,
                objective=objective,
                beta_schedule=beta_schedule,
                min_snr_loss_weight=min_snr_loss_weight,
                min_snr_gamma=min_snr_gamma,  # pyright: ignore[reportArgumentType]  # any number will do
            )
        self.latent_shape = (latent_channels, latent_size, latent_size)
        if timesteps < 2 or self.get_buffer("betas").max() >= 1:
            raise UserError(
                f"timesteps is {timesteps}, too few for beta_schedule {beta_schedule}; raise it or use cosine"
            )

    def forward(
        self,
        latents: Tensor,
        classes: Tensor,
        *,
        times: Tensor,
        noise: Tensor,
        cond_keep_mask: Tensor,
        loss_mask: Tensor | None = None,
    ) -> Tensor:
        """Returns the weighted loss of each latent, [B].

        Args:
            latents: normalised latents [B C S S].
            classes: labels [B].
            times: timesteps [B] to which the latents are noised.
            noise: unit normal [B C S S].
            cond_keep_mask: bool [B], True where the network is told the class.
            loss_mask: bool [B S], True for the columns whose error counts; the loss of a latent is the mean over these.
                None where all count.
        """
        if latents.shape[1:] != self.latent_shape:
            raise ValueError(f"latents {list(latents.shape)} do not have the shape {self.latent_shape}")
        if loss_mask is None:  # the library's own sum, with whose bits older runs go on
            return self.p_losses(
                latents, times, classes=classes, noise=noise, cond_keep_mask=cond_keep_mask, loss_reduction="none"
            )
        noisy = self.q_sample(x_start=latents, t=times, noise=noise)
        error = self.model(noisy, times, classes, cond_keep_mask=cond_keep_mask) - self._target(latents, times, noise)
        by_column = error.square().mean(dim=(1, 2))  # B S
        weight = self.loss_weight[times]
        return weight * (by_column * loss_mask).sum(1) / loss_mask.sum(1)

    def _target(self, latents: Tensor, times: Tensor, noise: Tensor) -> Tensor:
        """Returns what the network should answer, [B C S S]."""
        if self.objective == "pred_noise":
            return noise
        return self.predict_v(latents, times, noise) if self.objective == "pred_v" else latents

    @torch.inference_mode()
    def sample(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        classes: Tensor,
        generators: Sequence[torch.Generator],
        *,
        cond_scale: float,
        guidance_interval: Sequence[float],
        sampler: str,
        sampling_timesteps: int,
        start: Tensor | None = None,
        strength: float = 1.0,
        progress: Callable[[], object] | None = None,
    ) -> Tensor:
        """Makes a sample per class [B], [B C S S], each with the noise of its own CPU generator.

        `sampler` is a key of SAMPLERS; `progress`, where given, is called after every step. For `guidance_interval`
        see `guidance`. With `start`, latents [B C S S], a sample is one of these made noisy and clean again (SDEdit,
        Meng et al. 2022): `strength` is the part of the way that is left from there, 0 to 1, and 0 returns them.
        """
        if len(generators) != len(classes):
            raise ValueError(f"{len(classes)} classes, but {len(generators)} generators")
        levels, device = self.levels(sampling_timesteps), self.get_buffer("betas").device
        if start is not None:
            levels = self._last_part(levels, strength)
            if levels[0] is CLEAN:
                return start.to(device)
        scales = dict(zip(levels[:-1], self.guidance(levels, cond_scale, guidance_interval), strict=True))
        classes = classes.to(device)

        def draw() -> Tensor:
            rows = [torch.randn(self.latent_shape, generator=own, dtype=torch.float32) for own in generators]
            return torch.stack(rows).to(device)  # B C S S

        def denoise(x: Tensor, level: NoiseLevel) -> Tensor:
            time = torch.full((len(x),), level.time, device=device)
            clean = self._clean(x, level, self.model.predict_guided(x, time, classes, scales[level]))
            if progress is not None:
                progress()
            return clean

        was_training = self.training
        self.eval()
        try:
            x = draw() if start is None else levels[0].alpha * start.to(device) + levels[0].sigma * draw()
            return SAMPLERS[sampler](denoise, draw, levels, x)
        finally:
            self.train(was_training)
            torch.clear_autocast_cache()  # torch 2.10 keeps weights there that were cast here, without gradients

    def levels(self, sampling_timesteps: int) -> list[NoiseLevel]:
        """Returns the levels that sampling visits: from START_LAMBDA on, spread as TIME_SHARE says, each once.

        There are `sampling_timesteps` of them before the clean one, or all that the schedule has from there on.

        Raises:
            UserError: when more steps are asked for than there are timesteps.
        """
        if not 1 <= sampling_timesteps <= self.num_timesteps:
            raise UserError(
                f"sampling_timesteps is {sampling_timesteps}, but the model was trained with"
                f" {self.num_timesteps} timesteps; give a number from 1 to {self.num_timesteps}"
            )
        usable = self._usable_levels()
        return [*spread(usable, min(sampling_timesteps, len(usable))), CLEAN]

    def guidance(self, levels: Sequence[NoiseLevel], cond_scale: float, interval: Sequence[float]) -> list[float]:
        """Returns the guidance scale of each step: `cond_scale` in the interval, 1 outside (Kynkäänniemi et al. 2024).

        The interval is a part of the way from the first level (0) to the last noisy one (1), measured as steps are
        spread, so that whether a level lies in it does not depend on the number of steps. The interval (0, 1) holds all
        levels and (a, a) none; any other holds the level at its beginning and not that at its end.

        Args:
            levels: what `self.levels` returned.
            cond_scale: guidance inside the interval.
            interval: (begin, end), from 0 to 1.
        """
        low, high = interval
        if not 0 <= low <= high <= 1:
            raise ValueError(f"{low} to {high} is no part of the way from 0 to 1")
        usable = self._usable_levels()
        ways = dict(zip(usable, steps_of_levels(usable), strict=True))
        if high == 1 > low:
            high = math.inf  # the last level belongs to the way
        return [cond_scale if low <= ways[level] < high else 1.0 for level in levels if level is not CLEAN]

    def _last_part(self, levels: Sequence[NoiseLevel], strength: float) -> list[NoiseLevel]:
        """Returns the levels on the last part of the way, which is measured as `guidance` measures it."""
        usable = self._usable_levels()
        ways = dict(zip(usable, steps_of_levels(usable), strict=True))
        return [level for level in levels if level is CLEAN or (strength > 0 and ways[level] >= 1 - strength)]

    def num_passes(
        self,
        sampling_timesteps: int,
        *,
        cond_scale: float,
        guidance_interval: Sequence[float],
        strength: float = 1.0,
    ) -> int:
        """Returns how many passes of the network one sample takes; `strength` is that of one with a start."""
        levels = self._last_part(self.levels(sampling_timesteps), strength)
        return sum(map(passes_per_step, self.guidance(levels, cond_scale, guidance_interval)))

    def _usable_levels(self) -> list[NoiseLevel]:
        """Returns every level that sampling may visit, noisiest first."""
        alphas = self.get_buffer("sqrt_alphas_cumprod").tolist()
        sigmas = self.get_buffer("sqrt_one_minus_alphas_cumprod").tolist()
        every = [NoiseLevel(*level) for level in zip(range(self.num_timesteps), alphas, sigmas, strict=True)]
        return [level for level in reversed(every) if level.log_snr >= START_LAMBDA]

    def _clean(self, x: Tensor, level: NoiseLevel, output: Tensor) -> Tensor:
        """Turns the output of the network for x at a level into the latent that it expects, [B C S S]."""
        output = output.float()
        if self.objective == "pred_noise":
            return (x - level.sigma * output) / level.alpha
        if self.objective == "pred_v":  # Salimans & Ho 2022, appendix D
            return level.alpha * x - level.sigma * output
        return output


@contextmanager
def _noisier_schedule(beta_schedule: str, noise_shift: float) -> Iterator[None]:
    """In this block, the library builds its tables and the weights of its loss from a schedule shifted to more noise.

    The library takes the name of a schedule and no betas, so its function of that name is replaced for the time.
    """
    library, name = sys.modules[GaussianDiffusion.__module__], f"{beta_schedule}_beta_schedule"
    schedule = getattr(library, name)
    setattr(library, name, lambda timesteps: shift_schedule(schedule(timesteps), noise_shift))
    try:
        yield
    finally:
        setattr(library, name, schedule)


def shift_schedule(betas: Tensor, noise_shift: float) -> Tensor:
    """Lowers lambda of each timestep by `noise_shift` (Hoogeboom et al. 2023, "simple diffusion", section 3.1).

    Args:
        betas: float64 [T]. If one is 1 or more, as with too few timesteps, they are returned unchanged.
        noise_shift: how much is taken from lambda = log(alpha / sigma).
    """
    if noise_shift == 0 or betas.max() >= 1:
        return betas
    signal = torch.cumprod(1 - betas, dim=0)  # alpha^2
    signal = signal / (signal + (1 - signal) * math.exp(2 * noise_shift))
    kept = signal / torch.cat([signal.new_ones(1), signal[:-1]])
    return (1 - kept).clamp(0, 0.999)  # the limit of the library's cosine schedule


def unet_arguments(
    *,
    dim: int,
    num_classes: int,
    cond_drop_prob: float,
    dim_mults: Sequence[int],
    latent_channels: int,
    attn_dim_head: int,
    attn_heads: int,
    **_schedule: Any,
) -> dict[str, Any]:
    """Returns what the library's `Unet` is built with, from the arguments of a `LatentDiffusion`."""
    return {
        "dim": dim,
        "num_classes": num_classes,
        "cond_drop_prob": cond_drop_prob,
        "dim_mults": tuple(dim_mults),
        "channels": latent_channels,
        "attn_dim_head": attn_dim_head,
        "attn_heads": attn_heads,
    }


def network_bytes(**settings: Any) -> float:
    """Returns how many bytes the weights of a `LatentDiffusion` take; infinity where torch cannot count them.

    Raises:
        UserError: where the sizes do not fit each other.
    """
    _check_sizes(settings["latent_size"], settings["dim"], settings["dim_mults"])
    try:
        with torch.device("meta"):
            return sum(parameter.nbytes for parameter in LatentUnet(**unet_arguments(**settings)).parameters())
    except (RuntimeError, OverflowError, TypeError):  # "Storage size calculation overflowed", in several ways
        return math.inf


def _check_sizes(latent_size: int, dim: int, dim_mults: Sequence[int]) -> None:
    step = 2 ** min(len(dim_mults) - 1, 64)
    if latent_size % step:
        raise UserError(
            f"latents are {latent_size} x {latent_size}, but the {len(dim_mults)} dim_mults halve them"
            f" {len(dim_mults) - 1} times, which needs a multiple of {step}; use fewer dim_mults or another image_size"
        )
    if dim < 4 or dim % 2:
        raise UserError(f"dim is {dim}; the time embedding needs an even number of at least 4")
