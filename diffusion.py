"""The diffusion model on latents: the library's U-Net and noise schedule, our guidance, samplers and EMA.

Shapes: B samples, C latent channels, S the latent's height and width, T timesteps of training.
A noisy latent is alpha * latent + sigma * noise, with alpha^2 + sigma^2 = 1 and lambda = log(alpha / sigma).
"""

import copy
import importlib.metadata
import importlib.util
import math
import re
import sys
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from config import UserError

LIBRARY = "denoising-diffusion-pytorch"
LIBRARY_MODULE = "denoising_diffusion_pytorch"
LIBRARY_OLDEST = (2, 3, 4)

# Sampling starts at the noisiest timestep whose lambda is at least this. Beyond it a latent keeps nothing of its
# signal, and a network that predicts noise says nothing of it either: its error is divided by alpha.
START_LAMBDA = -5.1

# From there, steps are even in a mix of lambda and time. Even in time alone, a short run takes the first part of the
# cosine schedule in one stride and flattens what is wide in latents (layout, brightness), and stops too noisy to give
# their detail its spread; even in lambda alone, strong guidance suffers. An exact network shows all three.
TIME_SHARE = 0.25


Model = TypeVar("Model", bound=nn.Module)


def check_library() -> None:
    """Raises UserError, with version and place, unless Python would import a new enough diffusion library."""
    wanted = ".".join(map(str, LIBRARY_OLDEST))
    remedy = f'pip install "{LIBRARY}>={wanted}"'
    folder = _library_folder()
    if folder is None:
        raise UserError(f"{LIBRARY} is not installed; {remedy}")
    version = _version_in(folder)
    if version is None or _release(version) < LIBRARY_OLDEST:
        raise UserError(
            f"Python imports {LIBRARY} {version or '(version unknown)'} from {folder}, but {wanted} or newer is"
            f" needed; move that folder away if it is a copy, then {remedy}"
        )


def library_version() -> str | None:
    """Returns the version of the diffusion library that Python imports, None where there is none or it does not say."""
    folder = _library_folder()
    return None if folder is None else _version_in(folder)


def _library_folder() -> Path | None:
    spec = importlib.util.find_spec(LIBRARY_MODULE)
    return None if spec is None else Path(spec.origin or LIBRARY_MODULE).resolve().parent


def _version_in(folder: Path) -> str | None:
    """Reads the version of the very folder that is imported, which may hide the installed one."""
    own = folder / "version.py"
    if own.is_file():
        text = own.read_text(encoding="utf-8", errors="replace")
        found = re.search(r"""__version__\s*=\s*['"]([^'"]+)""", text)
        return found[1] if found else None
    try:
        installed = importlib.metadata.distribution(LIBRARY)
    except importlib.metadata.PackageNotFoundError:
        return None
    same = Path(str(installed.locate_file(LIBRARY_MODULE))).resolve() == folder
    return installed.version if same else None


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


check_library()  # first: an old copy may pass the import below and fail much later, with a puzzling message

from denoising_diffusion_pytorch.classifier_free_guidance import GaussianDiffusion, Unet  # noqa: E402


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

    def guided(self, x: Tensor, time: Tensor, classes: Tensor, cond_scale: float) -> Tensor:
        """Gives uncond + cond_scale * (cond - uncond), so that 1 is no guidance and 0 unconditional."""
        if passes_per_step(cond_scale) == 1:
            return self(x, time, classes, cond_drop_prob=1.0 - cond_scale)
        batch = len(x)
        keep = torch.arange(2 * batch, device=x.device) < batch  # 2B: with the class, then without
        both = self(x.repeat(2, 1, 1, 1), time.repeat(2), classes.repeat(2), cond_keep_mask=keep)  # 2B C S S
        cond, uncond = both[:batch], both[batch:]  # each B C S S
        return uncond + cond_scale * (cond - uncond)

    def forward_with_cond_scale(self, *args, **kwargs):
        """Refuses, and with it the library's samplers: its guidance projects, rescales and returns a pair or not."""
        raise NotImplementedError("use LatentUnet.guided and LatentDiffusion.sample")


def moved(latents: Tensor, columns: Tensor) -> Tensor:
    """Moves each latent [B C S S] to the right by its number of columns [B]; the edge column fills the gap."""
    width = latents.shape[3]
    sources = (torch.arange(width, device=latents.device) - columns[:, None]).clamp(0, width - 1)  # B S
    return latents.gather(3, sources[:, None, None, :].expand(latents.shape))


def passes_per_step(cond_scale: float) -> int:
    """Returns the network passes per sample that guidance of this scale takes: with the class, without, or both."""
    return 1 if cond_scale in (0, 1) else 2


def mean_by_timestep(times: Sequence[int], losses: Sequence[float], timesteps: int) -> dict[str, float]:
    """Returns the mean loss in ten equal ranges of timesteps by names such as 100-199; empty ranges are left out."""
    num_bins, width = min(_NUM_TIME_BINS, timesteps), len(str(timesteps - 1))
    found: dict[int, list[float]] = {}
    for time, loss in zip(times, losses, strict=True):
        found.setdefault(time * num_bins // timesteps, []).append(loss)
    edges = [-(-timesteps * number // num_bins) for number in range(num_bins + 1)]
    return {
        f"{edges[number]:0{width}d}-{edges[number + 1] - 1:0{width}d}": math.fsum(some) / len(some)
        for number, some in sorted(found.items())
    }


_NUM_TIME_BINS = 10


class Level(NamedTuple):
    """A place on the way from noise to a latent: timestep (-1 at the end), signal and noise amplitudes."""

    time: int
    alpha: float
    sigma: float

    @property
    def log_snr(self) -> float:
        """Lambda: half the logarithm of the signal-to-noise ratio."""
        return math.log(self.alpha) - math.log(self.sigma)


CLEAN = Level(time=-1, alpha=1.0, sigma=0.0)

# A solver goes from x [B C S S] at the first level to the clean last one; `denoise` gives the expected latent,
# `draw` fresh unit noise. The coefficients are Python floats, so nothing waits for the device.
Denoise = Callable[[Tensor, Level], Tensor]
Draw = Callable[[], Tensor]


def solve_dpmpp(denoise: Denoise, draw: Draw, levels: Sequence[Level], x: Tensor) -> Tensor:
    """Follows DPM-Solver++(2M), the multistep solver of second order (Lu et al. 2022, algorithm 2)."""
    clean, h_before, clean_before = x, math.nan, None
    for here, there in pairwise(levels):
        clean = denoise(x, here)
        if there is CLEAN:  # no noise left to keep: the sample is the expected latent
            break
        h = there.log_snr - here.log_snr
        slope = 0.0 if clean_before is None else (clean - clean_before) * (0.5 * h / h_before)
        x = (there.sigma / here.sigma) * x - (there.alpha * math.expm1(-h)) * (clean + slope)
        clean_before, h_before = clean, h
    return clean


def solve_ddim(denoise: Denoise, draw: Draw, levels: Sequence[Level], x: Tensor) -> Tensor:
    """Follows deterministic DDIM (Song et al. 2020, equation 12 with sigma 0)."""
    for here, there in pairwise(levels):
        clean = denoise(x, here)
        noise = (x - here.alpha * clean) / here.sigma
        x = there.alpha * clean + there.sigma * noise
    return x


def solve_ddpm(denoise: Denoise, draw: Draw, levels: Sequence[Level], x: Tensor) -> Tensor:
    """Samples each step's posterior, whose variance is beta-tilde (Ho et al. 2020, equations 6 and 7)."""
    for here, there in pairwise(levels):
        kept = (here.alpha / there.alpha) ** 2  # the product of 1 - beta over the timesteps between
        clean = denoise(x, here)
        mean_clean = there.alpha * (1 - kept) / here.sigma**2
        mean_noisy = math.sqrt(kept) * there.sigma**2 / here.sigma**2
        x = mean_clean * clean + mean_noisy * x
        if there is not CLEAN:
            x = x + (there.sigma / here.sigma * math.sqrt(1 - kept)) * draw()
    return x


SAMPLERS = {"dpm++": solve_dpmpp, "ddim": solve_ddim, "ddpm": solve_ddpm}


class LatentDiffusion(GaussianDiffusion):
    """Trains the U-Net on latents and samples from it, with no map to [-1, 1], clamp or random call of its own."""

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
        """Builds network and schedule; raises UserError where sizes or timesteps do not fit them."""
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
        self, latents: Tensor, classes: Tensor, *, times: Tensor, noise: Tensor, cond_keep_mask: Tensor
    ) -> Tensor:
        """Gives the weighted losses [B] of latents [B C S S], noised with `noise` [B C S S] to `times` [B]."""
        if latents.shape[1:] != self.latent_shape:
            raise ValueError(f"latents {list(latents.shape)} do not have the shape {self.latent_shape}")
        return self.p_losses(
            latents, times, classes=classes, noise=noise, cond_keep_mask=cond_keep_mask, loss_reduction="none"
        )

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
        progress: Callable[[], object] | None = None,
    ) -> Tensor:
        """Makes a sample [B C S S] per class [B], each from its own CPU generator whatever else is in the batch.

        `sampler` is a key of SAMPLERS; `progress`, where given, is called after every step. For `guidance_interval`
        see `guidance`.
        """
        if len(generators) != len(classes):
            raise ValueError(f"{len(classes)} classes, but {len(generators)} generators")
        levels = self.levels(sampling_timesteps)
        scales = dict(zip(levels[:-1], self.guidance(levels, cond_scale, guidance_interval), strict=True))
        device = self.get_buffer("betas").device
        classes = classes.to(device)

        def draw() -> Tensor:
            rows = [torch.randn(self.latent_shape, generator=own, dtype=torch.float32) for own in generators]
            return torch.stack(rows).to(device)  # B C S S

        def denoise(x: Tensor, level: Level) -> Tensor:
            time = torch.full((len(x),), level.time, device=device)
            clean = self._clean(x, level, self.model.guided(x, time, classes, scales[level]))
            if progress is not None:
                progress()
            return clean

        was_training = self.training
        self.eval()
        try:
            return SAMPLERS[sampler](denoise, draw, levels, draw())
        finally:
            self.train(was_training)

    def levels(self, sampling_timesteps: int) -> list[Level]:
        """Gives the levels that sampling visits, from START_LAMBDA on (see TIME_SHARE) to clean, without repeats.

        There are `sampling_timesteps` of them before the clean one, or as many as the schedule has after the start.
        """
        if not 1 <= sampling_timesteps <= self.num_timesteps:
            raise UserError(
                f"sampling_timesteps is {sampling_timesteps}, but the model was trained with"
                f" {self.num_timesteps} timesteps; give a number from 1 to {self.num_timesteps}"
            )
        usable = self._usable_levels()
        return [*_spread(usable, min(sampling_timesteps, len(usable))), CLEAN]

    def guidance(self, levels: Sequence[Level], cond_scale: float, interval: Sequence[float]) -> list[float]:
        """Gives the guidance scale of each step: `cond_scale` in the interval, 1 outside (Kynkäänniemi et al. 2024).

        `levels` are those of `levels`. The interval is a part of the way on which steps are spread, 0 at the first
        level and 1 at the last noisy one, so that a level is in it or not whatever the number of steps. Of (0, 1) it
        has all, of (a, a) none; between, it ends before the level at its end.
        """
        low, high = interval
        if not 0 <= low <= high <= 1:
            raise ValueError(f"{low} to {high} is no part of the way from 0 to 1")
        usable = self._usable_levels()
        ways = dict(zip(usable, _ways(usable), strict=True))
        if high == 1 > low:
            high = math.inf  # the last level belongs to the way
        return [cond_scale if low <= ways[level] < high else 1.0 for level in levels if level is not CLEAN]

    def num_passes(self, sampling_timesteps: int, *, cond_scale: float, guidance_interval: Sequence[float]) -> int:
        """Returns the network passes that one sample takes."""
        return sum(map(passes_per_step, self.guidance(self.levels(sampling_timesteps), cond_scale, guidance_interval)))

    def _usable_levels(self) -> list[Level]:
        """Gives every level that sampling may visit, noisiest first."""
        alphas = self.get_buffer("sqrt_alphas_cumprod").tolist()
        sigmas = self.get_buffer("sqrt_one_minus_alphas_cumprod").tolist()
        every = [Level(*level) for level in zip(range(self.num_timesteps), alphas, sigmas, strict=True)]
        return [level for level in reversed(every) if level.log_snr >= START_LAMBDA]

    def _clean(self, x: Tensor, level: Level, output: Tensor) -> Tensor:
        """Turns the network's output into the expected latent."""
        output = output.float()
        if self.objective == "pred_noise":
            return (x - level.sigma * output) / level.alpha
        if self.objective == "pred_v":  # Salimans & Ho 2022, appendix D
            return level.alpha * x - level.sigma * output
        return output


@contextmanager
def _noisier_schedule(beta_schedule: str, noise_shift: float) -> Iterator[None]:
    """Lets the library compute its tables, weights of the loss too, from a shifted schedule: it takes no betas."""
    library, name = sys.modules[GaussianDiffusion.__module__], f"{beta_schedule}_beta_schedule"
    schedule = getattr(library, name)
    setattr(library, name, lambda timesteps: noisier(schedule(timesteps), noise_shift))
    try:
        yield
    finally:
        setattr(library, name, schedule)


def noisier(betas: Tensor, noise_shift: float) -> Tensor:
    """Lowers the lambda of each timestep by `noise_shift` (Hoogeboom et al. 2023, "simple diffusion", section 3.1).

    Args:
        betas: float64 [T], each below 1; others, of too few timesteps, come back as they are.
    """
    if noise_shift == 0 or betas.max() >= 1:
        return betas
    signal = torch.cumprod(1 - betas, dim=0)  # alpha^2
    signal = signal / (signal + (1 - signal) * math.exp(2 * noise_shift))
    kept = signal / torch.cat([signal.new_ones(1), signal[:-1]])
    return (1 - kept).clamp(0, 0.999)  # as the library's cosine schedule


def _ways(usable: Sequence[Level]) -> list[float]:
    """Says for each level how far it lies on the way from the first (0) to the last (1)."""
    first, last = usable[0], usable[-1]
    times, lambdas = last.time - first.time, last.log_snr - first.log_snr
    return [
        TIME_SHARE * (level.time - first.time) / times + (1 - TIME_SHARE) * (level.log_snr - first.log_snr) / lambdas
        for level in usable
    ]


def _spread(usable: Sequence[Level], steps: int) -> list[Level]:
    """Chooses `steps` of the usable levels (noisiest first), from the first to the last and even on the way."""
    ways, chosen, place = _ways(usable), [], -1
    for step in range(steps):
        wanted = bisect_left(ways, step / max(1, steps - 1))
        place = min(max(wanted, place + 1), len(usable) - steps + step)  # no level twice, and enough left for the rest
        chosen.append(usable[place])
    return chosen


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
    """Returns the size of the weights of a `LatentDiffusion` of these settings, infinity where torch cannot count it.

    Raises:
        UserError: where sizes do not fit.
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


class EMA(Generic[Model]):
    """Keeps a moving average of a model's weights; its decay is a function of the step, so it has no other state."""

    WARMUP_STEPS = 100

    def __init__(self, model: Model, *, decay: float, update_every: int):
        """Starts from a copy of the model, in eval mode and without gradients."""
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay
        self.update_every = update_every

    def decay_at(self, step: int) -> float:
        """Gives the share of the average that survives this step's update: 0 at first, `decay` in the end."""
        if step < self.WARMUP_STEPS:
            return 0.0
        return min(self.decay, 1.0 - (1 + step - self.WARMUP_STEPS) ** (-2 / 3))

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Moves towards the model after optimiser step number `step`, if that is a multiple of `update_every`."""
        if step % self.update_every:
            return
        averaged: list[Tensor] = list(self.model.parameters())
        current: list[Tensor] = list(model.parameters())
        decay = self.decay_at(step)
        if decay == 0:
            torch._foreach_copy_(averaged, current)
        else:
            torch._foreach_lerp_(averaged, current, 1 - decay)
        for kept, new in zip(self.model.buffers(), model.buffers(), strict=True):
            kept.copy_(new)
