"""Solvers that go from noise to a sample over levels of noise: DPM-Solver++(2M), DDIM and DDPM.

A noisy latent is alpha * latent + sigma * noise, with alpha^2 + sigma^2 = 1, and lambda = log(alpha / sigma): half the
logarithm of the signal-to-noise ratio (SNR). Sampling visits levels of falling noise and ends at the clean one.
"""

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

from torch import Tensor

# Sampling starts at the noisiest timestep whose lambda is at least this. At noisier ones nothing of the latent is left
# (alpha is below 0.0062), and a network that predicts noise cannot tell it: its error is divided by alpha.
START_LAMBDA = -5.1
# From there to the last noisy level, steps are even in a mix: 25 % time, 75 % lambda (log-SNR). Steps even in time lose
# layout when there are few: the first one crosses the part of the cosine schedule in which layout and brightness arise,
# and the last noisy level is too noisy for fine detail. Steps even in lambda suffer under strong guidance. All of this
# was seen with a network that predicts exactly, so it is the solver's error and not the network's.
TIME_SHARE = 0.25


class NoiseLevel(NamedTuple):
    """A level of noise on the way from noise to a latent.

    Attributes:
        time: the timestep of the schedule, 0 the least noisy; -1 for the clean end.
        alpha: amplitude of the latent, 0 to 1.
        sigma: amplitude of the noise, 0 to 1.
    """

    time: int
    alpha: float
    sigma: float

    @property
    def log_snr(self) -> float:
        """Lambda = log(alpha / sigma), half the logarithm of the signal-to-noise ratio."""
        return math.log(self.alpha) - math.log(self.sigma)


CLEAN = NoiseLevel(time=-1, alpha=1.0, sigma=0.0)
# A solver gets x [B C S S], noise at the first level, and returns the sample at the last level, which is CLEAN.
# `denoise` gives the latent that the network expects behind x at a level, `draw` new unit noise [B C S S]. The
# coefficients are Python floats, so that the program need not wait for the device at any step.
Denoise = Callable[[Tensor, NoiseLevel], Tensor]
Draw = Callable[[], Tensor]


def solve_dpmpp(denoise: Denoise, draw: Draw, levels: Sequence[NoiseLevel], x: Tensor) -> Tensor:
    """Follows DPM-Solver++(2M), the multistep solver of second order (Lu et al. 2022, algorithm 2)."""
    clean, h_before, clean_before = x, math.nan, None
    for here, there in pairwise(levels):
        clean = denoise(x, here)
        if there is CLEAN:  # the sample is the latent that the network expects
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
    """Returns for each level how far it lies on the way from the first (0) to the last (1); see TIME_SHARE."""
    first, last = usable[0], usable[-1]
    times, lambdas = last.time - first.time, last.log_snr - first.log_snr
    return [
        TIME_SHARE * (level.time - first.time) / times + (1 - TIME_SHARE) * (level.log_snr - first.log_snr) / lambdas
        for level in usable
    ]


def spread(usable: Sequence[NoiseLevel], steps: int) -> list[NoiseLevel]:
    """Chooses `steps` of the usable levels (noisiest first), the first and the last among them, evenly on the way."""
    ways, chosen, place = steps_of_levels(usable), [], -1
    for step in range(steps):
        wanted = bisect_left(ways, step / max(1, steps - 1))
        place = min(
            max(wanted, place + 1), len(usable) - steps + step
        )  # no level twice, and enough levels left for the remaining steps
        chosen.append(usable[place])
    return chosen
