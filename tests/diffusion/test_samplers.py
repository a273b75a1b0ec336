"""The samplers: those of diffusers, one generator for each sample, and guidance in a part of the way."""

import math

import pytest
import torch
from denoising_diffusion_pytorch.classifier_free_guidance import Unet
from tiny_diffusion import (
    CENTERS,
    OBJECTIVES,
    SAMPLING,
    SHARES,
    SPREADS,
    exact,
    generators,
    randn,
    scheduler_class,
    signal_share,
    tiny,
)
from torch import Tensor, nn

from gait_latents.common.errors import UserError
from gait_latents.diffusion import samplers
from gait_latents.diffusion.model import LatentDiffusion
from gait_latents.diffusion.samplers import CLEAN, START_LAMBDA, TIME_SHARE, NoiseLevel, solve_dpmpp

PREDICTION_TYPES = {"pred_v": "v_prediction", "pred_noise": "epsilon", "pred_x0": "sample"}


class Formula(nn.Module):
    """A network that is a formula: `guided` calls function(x, time)."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def predict_guided(self, x: Tensor, time: Tensor, classes: Tensor, cond_scale: float) -> Tensor:
        return self.function(x, time)


def with_formula(function, **changes) -> LatentDiffusion:
    model = tiny(**changes)
    model.model = Formula(function)
    return model


def smooth(x: Tensor, time: Tensor) -> Tensor:
    return 0.4 * torch.sin(1.5 * x + time[:, None, None, None] / 300) + 0.3 * x


# ---- levels


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_levels_start_at_the_noisiest_timestep_that_can_be_trusted(schedule, objective):
    share = signal_share(schedule)
    lambdas = 0.5 * (share / (1 - share)).log()
    noisiest = (lambdas >= START_LAMBDA).nonzero().max().item()
    assert noisiest == {"linear": 999, "cosine": 995}[schedule]
    assert tiny(beta_schedule=schedule, objective=objective).levels(20)[0].time == noisiest


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 20, 25, 250, 500, 995])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_levels_fall_to_the_first_timestep_without_repeating(schedule, steps):
    *levels, last = tiny(beta_schedule=schedule).levels(steps)
    times = [level.time for level in levels]
    assert last is CLEAN
    assert len(times) == steps
    assert times == sorted(set(times), reverse=True)
    assert times[-1] == 0 or steps == 1


def test_steps_are_even_in_the_mix_of_lambda_and_time():
    *levels, _ = tiny(timesteps=20_000).levels(12)
    first, last = levels[0], levels[-1]
    ways = [
        (level.time - first.time) / (last.time - first.time) * TIME_SHARE
        + (level.log_snr - first.log_snr) / (last.log_snr - first.log_snr) * (1 - TIME_SHARE)
        for level in levels
    ]
    assert ways == pytest.approx([step / 11 for step in range(12)], abs=0.02)


@pytest.mark.parametrize("steps", [996, 1000])
def test_as_many_steps_as_timesteps_are_all_of_them(steps):
    assert [level.time for level in tiny().levels(steps)] == [*range(995, -1, -1), -1]


def test_levels_carry_the_amplitudes_of_their_timestep():
    share = signal_share("cosine")
    for level in tiny().levels(20)[:-1]:
        assert level.alpha == pytest.approx(math.sqrt(share[level.time]), rel=1e-6)
        assert level.sigma == pytest.approx(math.sqrt(1 - share[level.time]), rel=1e-6)
        expected = 0.5 * math.log(share[level.time] / (1 - share[level.time]))
        assert level.log_snr == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_a_number_of_steps_that_the_schedule_does_not_have_is_told(steps):
    with pytest.raises(UserError, match=rf"sampling_timesteps is {steps}.*1 to 1000"):
        tiny().levels(steps)


# ---- samplers


def sample_with_diffusers(scheduler, function, start: Tensor, draws: list[torch.Generator] | None = None) -> Tensor:
    x = start
    for time in scheduler.timesteps:
        output = function(x, time.expand(len(x)))
        extra = {} if draws is None else {"generator": draws}
        x = scheduler.step(output, time, x, **extra).prev_sample
    return x


def scheduler_settings(model: LatentDiffusion) -> dict:
    return {
        "num_train_timesteps": model.num_timesteps,
        "trained_betas": model.get_buffer("betas").double().numpy(),
        "prediction_type": PREDICTION_TYPES[model.objective],
    }


def initial_noise(own: list[torch.Generator]) -> Tensor:
    return torch.stack([torch.randn(2, 8, 8, generator=each) for each in own])


def timesteps_of(model: LatentDiffusion, steps: int) -> list[int]:
    return [level.time for level in model.levels(steps)[:-1]]


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("steps", [1, 2, 10, 20])
@pytest.mark.parametrize(("sampler", "order"), [("dpm++", 2), ("ddim", 1)])
def test_deterministic_samplers_are_the_multistep_solvers_of_diffusers(objective, schedule, steps, sampler, order):
    model = with_formula(smooth, objective=objective, beta_schedule=schedule)
    ours = model.sample(
        torch.zeros(3, dtype=torch.long),
        generators(3),
        cond_scale=1.0,
        guidance_interval=(0, 1),
        sampler=sampler,
        sampling_timesteps=steps,
    )
    scheduler = scheduler_class("dpmsolver_multistep", "DPMSolverMultistepScheduler")(
        **scheduler_settings(model),
        algorithm_type="dpmsolver++",
        solver_order=order,
        solver_type="midpoint",
        final_sigmas_type="zero",
    )
    scheduler.set_timesteps(timesteps=timesteps_of(model, steps))
    theirs = sample_with_diffusers(scheduler, smooth, initial_noise(generators(3)))
    torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=2e-3 * theirs.abs().max().item())


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_ddim_over_every_timestep_is_that_of_diffusers(objective):
    model = with_formula(smooth, objective=objective, timesteps=40, beta_schedule="linear")
    ours = model.sample(
        torch.zeros(2), generators(2), cond_scale=1.0, guidance_interval=(0, 1), sampler="ddim", sampling_timesteps=40
    )
    scheduler = scheduler_class("ddim", "DDIMScheduler")(
        **scheduler_settings(model), clip_sample=False, set_alpha_to_one=True
    )
    scheduler.set_timesteps(40)
    scheduler.timesteps = scheduler.timesteps[40 - len(timesteps_of(model, 40)) :]  # the noisiest may be left out
    theirs = sample_with_diffusers(scheduler, smooth, initial_noise(generators(2)))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("steps", [1, 15, 100])
def test_ddpm_is_that_of_diffusers_fed_the_same_noise(objective, steps, schedule):
    model = with_formula(smooth, objective=objective, timesteps=100, beta_schedule=schedule)
    ours = model.sample(
        torch.zeros(2),
        generators(2),
        cond_scale=1.0,
        guidance_interval=(0, 1),
        sampler="ddpm",
        sampling_timesteps=steps,
    )
    scheduler = scheduler_class("ddpm", "DDPMScheduler")(
        **scheduler_settings(model), clip_sample=False, variance_type="fixed_small"
    )
    scheduler.set_timesteps(timesteps=timesteps_of(model, steps))
    own = generators(2)
    theirs = sample_with_diffusers(scheduler, smooth, initial_noise(own), own)
    torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=2e-3)


MIXTURE_MEAN = sum(share * center for share, center in zip(SHARES, CENTERS, strict=True))
MIXTURE_STD = math.sqrt(
    sum(s * (d**2 + c**2) for s, c, d in zip(SHARES, CENTERS, SPREADS, strict=True)) - MIXTURE_MEAN**2
)


@pytest.mark.parametrize(
    ("sampler", "steps", "tolerance"),
    [("dpm++", 20, 0.02), ("dpm++", 10, 0.04), ("ddim", 250, 0.02), ("ddpm", 250, 0.02)],
)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_samples_have_the_distribution_that_the_exact_network_knows(objective, sampler, steps, tolerance):
    model = with_formula(exact(objective), objective=objective, latent_size=48)
    samples = model.sample(
        torch.zeros(4),
        generators(4),
        cond_scale=1.0,
        guidance_interval=(0, 1),
        sampler=sampler,
        sampling_timesteps=steps,
    )
    assert samples.mean().item() == pytest.approx(MIXTURE_MEAN, abs=tolerance * MIXTURE_STD)
    assert samples.std().item() == pytest.approx(MIXTURE_STD, rel=tolerance)
    low = samples[samples < sum(CENTERS) / 2]
    high = samples[samples >= sum(CENTERS) / 2]
    for part, center, spread in zip((low, high), CENTERS, SPREADS, strict=True):
        assert part.mean().item() == pytest.approx(center, abs=4 * tolerance)
        assert part.std().item() == pytest.approx(spread, rel=0.12)


def test_a_one_percent_error_of_noise_prediction_is_harmless_from_where_we_start_and_ruinous_from_the_end():
    model = with_formula(exact("pred_noise", error=0.01), objective="pred_noise", latent_size=32)
    samples = model.sample(
        torch.zeros(2), generators(2), cond_scale=1.0, guidance_interval=(0, 1), sampler="dpm++", sampling_timesteps=20
    )
    assert samples.std().item() == pytest.approx(MIXTURE_STD, rel=0.1)
    share = signal_share("cosine")
    even_in_time = [NoiseLevel(time, math.sqrt(share[time]), math.sqrt(1 - share[time])) for time in range(999, 0, -50)]
    ruined = solve_dpmpp(
        lambda x, level: model._clean(x, level, model.model.predict_guided(x, torch.full((2,), level.time), x, 1.0)),
        lambda: randn(2, 2, 32, 32),
        [*even_in_time, CLEAN],
        randn(2, 2, 32, 32),
    )
    assert ruined.std() > 2 * MIXTURE_STD


# ---- one sample, one generator


def test_the_noise_of_a_sample_does_not_know_its_batch():
    model = with_formula(lambda x, time: x, objective="pred_x0")
    given = {"cond_scale": 1.0, "guidance_interval": (0, 1), "sampler": "ddim", "sampling_timesteps": 1}
    together = model.sample(torch.zeros(5), generators(5), **given)
    for index in range(5):
        alone = model.sample(torch.zeros(1), generators(5)[index : index + 1], **given)
        assert torch.equal(together[index], alone[0])


@pytest.mark.parametrize("sampler", ["dpm++", "ddim", "ddpm"])
def test_a_sample_is_the_same_alone_and_among_others(sampler):
    model, classes = tiny(), torch.tensor([0, 1, 2])
    given = {**SAMPLING, "sampler": sampler}
    together = model.sample(classes, generators(3), **given)
    for index in range(3):
        alone = model.sample(classes[index : index + 1], generators(3)[index : index + 1], **given)
        torch.testing.assert_close(alone[0], together[index], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sampler", ["dpm++", "ddpm"])
def test_in_a_batch_of_one_shape_the_others_do_not_change_a_bit(sampler):
    model, given = tiny(), {**SAMPLING, "sampler": sampler}
    one = model.sample(torch.tensor([0, 1, 2]), generators(3), **given)
    other = model.sample(torch.tensor([2, 1, 1]), [generators(9)[8], generators(3)[1], generators(9)[5]], **given)
    assert torch.equal(one[1], other[1])
    assert not torch.equal(one[0], other[0])


def test_the_class_and_the_guidance_reach_the_sample():
    model = tiny()
    base = model.sample(torch.tensor([0]), generators(1), **SAMPLING)
    assert not torch.equal(base, model.sample(torch.tensor([1]), generators(1), **SAMPLING))
    assert not torch.equal(base, model.sample(torch.tensor([0]), generators(1), **{**SAMPLING, "cond_scale": 4.0}))


def test_sampling_leaves_the_global_generator_alone_and_ignores_it():
    model, classes = tiny(), torch.tensor([0, 1])
    given = {**SAMPLING, "sampler": "ddpm"}
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = model.sample(classes, generators(2), **given)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(model.sample(classes, generators(2), **given), one)


def test_every_sample_needs_its_generator():
    with pytest.raises(ValueError, match="2 classes, but 1 generators"):
        tiny().sample(torch.tensor([0, 1]), generators(1), **SAMPLING)


# ---- how sampling runs


@pytest.mark.parametrize("training", [True, False])
def test_sampling_runs_in_eval_mode_without_gradients_and_restores_the_mode(training):
    model, seen = tiny().train(training), []
    hook = model.model.register_forward_hook(
        lambda module, inputs, output: seen.append((module.training, torch.is_inference_mode_enabled()))
    )
    samples = model.sample(torch.tensor([0]), generators(1), **SAMPLING)
    hook.remove()
    assert seen == [(False, True)] * 5
    assert not samples.requires_grad
    assert all(module.training is training for module in model.modules())


def test_the_mode_is_restored_after_a_failure():
    def broken():
        raise RuntimeError("no terminal")

    model = tiny().train()
    with pytest.raises(RuntimeError, match="no terminal"):
        model.sample(torch.tensor([0]), generators(1), **SAMPLING, progress=broken)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("sampler", ["dpm++", "ddim", "ddpm"])
def test_one_network_pass_and_one_sign_of_progress_per_step(sampler):
    model, passes, signs = tiny(), [], []
    hook = model.model.register_forward_hook(lambda module, inputs, output: passes.append(len(output)))
    model.sample(
        torch.tensor([0, 1]),
        generators(2),
        cond_scale=3.0,
        guidance_interval=(0, 1),
        sampler=sampler,
        sampling_timesteps=20,
        progress=lambda: signs.append(len(passes)),
    )
    hook.remove()
    assert passes == [4] * 20
    assert signs == list(range(1, 21))


# ---- guidance in a part of the way


@pytest.mark.parametrize("sampler", ["dpm++", "ddim", "ddpm"])
def test_guidance_on_the_whole_way_is_full_guidance_and_on_none_of_it_no_guidance(sampler):
    model, classes, given = tiny(), torch.tensor([0, 1]), {"sampler": sampler, "sampling_timesteps": 6}

    def sample(cond_scale: float, *interval: float) -> Tensor:
        return model.sample(classes, generators(2), cond_scale=cond_scale, guidance_interval=interval, **given)

    def by_hand(scale_of_step: list[float]) -> Tensor:
        """Follows the solver with one call of the network per class and pass, and the scale of each step."""
        levels, own = model.levels(6), generators(2)

        @torch.no_grad()
        def denoise(x: Tensor, level: NoiseLevel) -> Tensor:
            time, scale = torch.full((2,), level.time), scale_of_step[levels.index(level)]
            cond = Unet.forward(model.model, x, time, classes, cond_drop_prob=0.0)
            uncond = Unet.forward(model.model, x, time, classes, cond_drop_prob=1.0)
            return model._clean(x, level, uncond + scale * (cond - uncond))

        return samplers.SAMPLERS[sampler](denoise, lambda: initial_noise(own), levels, initial_noise(own))

    full, none = sample(3.0, 0, 1), sample(1.0, 0, 1)
    torch.testing.assert_close(full, by_hand([3.0] * 6), rtol=1e-4, atol=1e-4)
    for place in (0, 0.3, 1):
        assert torch.equal(sample(3.0, place, place), none)
    assert torch.equal(sample(1.0, 0.2, 0.8), none)
    part = sample(3.0, 0.2, 0.8)  # of the places 0, 0.2, 0.4, 0.6, 0.8, 1, about
    scales = model.guidance(model.levels(6), 3.0, (0.2, 0.8))
    assert scales[0] == scales[-1] == 1 and 2 <= scales.count(3.0) <= 4
    torch.testing.assert_close(part, by_hand(scales), rtol=1e-4, atol=1e-4)
    for other in (full, none):
        assert (part - other).abs().max() > 1e-3


SCHEDULERS = {
    "dpm++": ("dpmsolver_multistep", "DPMSolverMultistepScheduler", {"solver_order": 2, "final_sigmas_type": "zero"}),
    "ddim": ("dpmsolver_multistep", "DPMSolverMultistepScheduler", {"solver_order": 1, "final_sigmas_type": "zero"}),
    "ddpm": ("ddpm", "DDPMScheduler", {"clip_sample": False, "variance_type": "fixed_small"}),
}


@pytest.mark.parametrize("sampler", list(SCHEDULERS))
def test_guidance_in_an_interval_is_the_loop_of_diffusers_with_guidance_switched_on_there(sampler):
    model, classes = tiny(), torch.tensor([2, 0])
    ours = model.sample(
        classes, generators(2), cond_scale=4.0, guidance_interval=(0.3, 0.8), sampler=sampler, sampling_timesteps=10
    )
    module, name, facts = SCHEDULERS[sampler]
    scheduler = scheduler_class(module, name)(**scheduler_settings(model), **facts)
    scheduler.set_timesteps(timesteps=timesteps_of(model, 10))
    guided_times = timesteps_of(model, 10)[3:8]  # of the places 0, 1/9, ..., 1, about

    @torch.no_grad()
    def network(x: Tensor, time: Tensor) -> Tensor:
        cond = Unet.forward(model.model, x, time, classes, cond_drop_prob=0.0)
        if int(time[0]) not in guided_times:
            return cond
        uncond = Unet.forward(model.model, x, time, classes, cond_drop_prob=1.0)
        return uncond + 4.0 * (cond - uncond)

    own = generators(2)
    theirs = sample_with_diffusers(scheduler, network, initial_noise(own), own)
    torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=2e-3 * theirs.abs().max().item())


@pytest.mark.parametrize("cond_scale", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("interval", [(0, 1), (0.25, 0.75), (0, 0.5), (0.5, 1), (1, 1)])
def test_the_number_of_passes_is_that_of_the_network_and_the_null_pass_is_skipped_outside(interval, cond_scale):
    model, sizes = tiny(), []
    hook = model.model.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    given = {"cond_scale": cond_scale, "guidance_interval": interval}
    model.sample(torch.tensor([0, 1, 2]), generators(3), sampler="dpm++", sampling_timesteps=12, **given)
    hook.remove()
    assert len(sizes) == 12 and sum(sizes) == 3 * model.num_passes(12, **given)
    begun, start = [], torch.zeros(3, *model.latent_shape)
    hook = model.model.register_forward_hook(lambda module, inputs, output: begun.append(len(output)))
    for strength in (0.0, 0.3, 1.0):
        begun.clear()
        how = {**given, "strength": strength}
        model.sample(torch.tensor([0, 1, 2]), generators(3), sampler="dpm++", sampling_timesteps=12, start=start, **how)
        assert sum(begun) == 3 * model.num_passes(12, **how) and (len(begun) == 12) == (strength == 1)
    hook.remove()
    scales = model.guidance(model.levels(12), cond_scale, interval)
    assert sizes == [3 if scale in (0, 1) else 6 for scale in scales]
    expected = {(0, 1): 12, (0.25, 0.75): 6, (0, 0.5): 6, (0.5, 1): 6, (1, 1): 0}[interval]
    if cond_scale == 3:
        assert abs(scales.count(3.0) - expected) <= 1 and (expected not in (0, 12) or scales.count(3.0) == expected)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_level_is_in_the_interval_whatever_the_number_of_steps(schedule):
    model, found, num_cases = tiny(beta_schedule=schedule), {}, 0
    for steps in (1, 2, 5, 12, 20, 50, 250, 1000):
        levels = model.levels(steps)
        for interval in ((0, 0.3), (0.3, 0.6), (0.6, 1), (0, 1)):
            scales = model.guidance(levels, 5.0, interval)
            assert len(scales) == len(levels) - 1
            for level, scale in zip(levels[:-1], scales, strict=True):
                assert found.setdefault((level, interval), scale) == scale
                num_cases += 1
            inside = [number for number, scale in enumerate(scales) if scale == 5.0]
            assert inside == list(range(inside[0], inside[-1] + 1)) if inside else steps < 5  # in one piece
            if 20 <= steps <= 250:
                assert len(inside) / len(scales) == pytest.approx(interval[1] - interval[0], abs=1 / steps)
        parts = [model.guidance(levels, 5.0, interval) for interval in ((0, 0.3), (0.3, 0.6), (0.6, 1))]
        assert all(sorted(own) == [1.0, 1.0, 5.0] for own in zip(*parts, strict=True))  # each level in one of them
    assert num_cases > 5000


def test_a_longer_interval_takes_no_fewer_steps():
    model = tiny()
    levels = model.levels(20)
    ends = [number / 16 for number in range(17)]
    counts = [model.guidance(levels, 2.0, (0, end)).count(2.0) for end in ends]
    assert counts == sorted(counts) and (counts[0], counts[-1]) == (0, 20)
    counts = [model.guidance(levels, 2.0, (begin, 1)).count(2.0) for begin in ends]
    assert counts == sorted(counts, reverse=True) and (counts[0], counts[-1]) == (20, 0)


@pytest.mark.parametrize("interval", [(0.8, 0.2), (-0.1, 1), (0, 1.1), (math.nan, 1)])
def test_what_is_no_interval_is_refused(interval):
    with pytest.raises(ValueError, match="no part of the way"):
        tiny().sample(torch.tensor([0]), generators(1), **{**SAMPLING, "guidance_interval": interval})


def test_under_autocast_only_the_network_is_in_low_precision():
    model, inner = tiny(), []
    hook = model.model.final_conv.register_forward_hook(lambda module, inputs, output: inner.append(output.dtype))
    exact_samples = model.sample(torch.tensor([0, 1]), generators(2), **SAMPLING)
    inner.clear()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        samples = model.sample(torch.tensor([0, 1]), generators(2), **SAMPLING)
        losses = model(
            randn(1, 2, 8, 8),
            torch.tensor([0]),
            times=torch.tensor([5]),
            noise=randn(1, 2, 8, 8),
            cond_keep_mask=torch.tensor([True]),
        )
    hook.remove()
    losses.sum().backward()  # weights that sampling cast under autocast are still trainable
    assert set(inner) == {torch.bfloat16}
    assert samples.dtype == losses.dtype == torch.float32
    assert (samples - exact_samples).norm() < 0.05 * exact_samples.norm()
    assert not torch.equal(samples, samples.bfloat16().float())


@torch.no_grad()
def test_under_autocast_guidance_is_mixed_in_float32():
    unet, inner = tiny().model, []
    hook = unet.final_conv.register_forward_hook(lambda module, inputs, output: inner.append(output))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        guided = unet.predict_guided(randn(2, 2, 8, 8), torch.tensor([100, 900]), torch.tensor([0, 1]), 3.0)
    hook.remove()
    cond, uncond = inner[0].float().chunk(2)
    assert guided.dtype == torch.float32
    assert torch.equal(guided, uncond + 3.0 * (cond - uncond))


def test_the_solver_stays_in_float32_when_the_network_does_not():
    rounded = with_formula(lambda x, time: smooth(x, time).bfloat16())
    widened = with_formula(lambda x, time: smooth(x, time).bfloat16().float())
    one, other = (model.sample(torch.zeros(2), generators(2), **SAMPLING) for model in (rounded, widened))
    assert one.dtype == torch.float32
    assert torch.equal(one, other)


# ---- all of it together


def test_every_sampler_of_the_settings_is_known_and_no_other():
    assert set(samplers.SAMPLERS) == {"dpm++", "ddim", "ddpm"}
    with pytest.raises(KeyError):
        tiny().sample(torch.tensor([0]), generators(1), **{**SAMPLING, "sampler": "euler"})
