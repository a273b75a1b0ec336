"""Solvers that lead from noise to a sample: DPM-Solver++(2M), DDIM and DDPM, over levels of noise."""

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

from torch import Tensor

# Sampling starts at the noisiest timestep whose lambda is at least this. Beyond it a latent keeps nothing of its
# signal, and a network that predicts noise says nothing of it either: its error is divided by alpha.
START_LAMBDA = -5.1
# From there, steps are even in a mix of lambda and time. Even in time alone, a short run takes the first part of the
# cosine schedule in one stride and flattens what is wide in latents (layout, brightness), and stops too noisy to give
# their detail its spread; even in lambda alone, strong guidance suffers. An exact network shows all three.
TIME_SHARE = 0.25


class NoiseLevel(NamedTuple):
    """A place on the way from noise to a latent: timestep (-1 at the end), signal and noise amplitudes."""

    time: int
    alpha: float
    sigma: float

    @property
    def log_snr(self) -> float:
        """Lambda: half the logarithm of the signal-to-noise ratio."""
        return math.log(self.alpha) - math.log(self.sigma)


CLEAN = NoiseLevel(time=-1, alpha=1.0, sigma=0.0)
# A solver goes from x [B C S S] at the first level to the clean last one; `denoise` gives the expected latent,
# `draw` fresh unit noise. The coefficients are Python floats, so nothing waits for the device.
Denoise = Callable[[Tensor, NoiseLevel], Tensor]
Draw = Callable[[], Tensor]


def solve_dpmpp(denoise: Denoise, draw: Draw, levels: Sequence[NoiseLevel], x: Tensor) -> Tensor:
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


def solve_ddim(denoise: Denoise, draw: Draw, levels: Sequence[NoiseLevel], x: Tensor) -> Tensor:
    """Follows deterministic DDIM (Song et al. 2020, equation 12 with sigma 0)."""
    for here, there in pairwise(levels):
        clean = denoise(x, here)
        noise = (x - here.alpha * clean) / here.sigma
        x = there.alpha * clean + there.sigma * noise
    return x


def solve_ddpm(denoise: Denoise, draw: Draw, levels: Sequence[NoiseLevel], x: Tensor) -> Tensor:
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


def steps_of_levels(usable: Sequence[NoiseLevel]) -> list[float]:
    """Says for each level how far it lies on the way from the first (0) to the last (1)."""
    first, last = usable[0], usable[-1]
    times, lambdas = last.time - first.time, last.log_snr - first.log_snr
    return [
        TIME_SHARE * (level.time - first.time) / times + (1 - TIME_SHARE) * (level.log_snr - first.log_snr) / lambdas
        for level in usable
    ]


def spread(usable: Sequence[NoiseLevel], steps: int) -> list[NoiseLevel]:
    """Chooses `steps` of the usable levels (noisiest first), from the first to the last and even on the way."""
    ways, chosen, place = steps_of_levels(usable), [], -1
    for step in range(steps):
        wanted = bisect_left(ways, step / max(1, steps - 1))
        place = min(max(wanted, place + 1), len(usable) - steps + step)  # no level twice, and enough left for the rest
        chosen.append(usable[place])
    return chosen
