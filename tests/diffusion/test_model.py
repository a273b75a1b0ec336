"""The diffusion model: losses against closed forms, guidance, samplers against diffusers and exact scores, EMA."""

import copy
import math
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from denoising_diffusion_pytorch.classifier_free_guidance import Unet
from torch import Tensor, nn

from gait_latents.common.errors import UserError
from gait_latents.common.seeds import sample_generator
from gait_latents.diffusion import samplers
from gait_latents.diffusion.ema import EMA
from gait_latents.diffusion.library import check_library
from gait_latents.diffusion.model import LatentDiffusion, shift_along_width
from gait_latents.diffusion.samplers import CLEAN, START_LAMBDA, TIME_SHARE, NoiseLevel, solve_dpmpp
from gait_latents.training.draws import draw_step

ROOT = Path(__file__).resolve().parents[2]
OBJECTIVES = ("pred_v", "pred_noise", "pred_x0")
PREDICTION_TYPES = {"pred_v": "v_prediction", "pred_noise": "epsilon", "pred_x0": "sample"}

TINY = {
    "num_classes": 3,
    "latent_channels": 2,
    "latent_size": 8,
    "dim": 8,
    "dim_mults": (1, 2),
    "attn_dim_head": 4,
    "attn_heads": 2,
    "cond_drop_prob": 0.5,
    "timesteps": 1000,
    "objective": "pred_v",
    "beta_schedule": "cosine",
    "noise_shift": 0.0,
    "min_snr_loss_weight": True,
    "min_snr_gamma": 5.0,
}
SAMPLING = {"cond_scale": 2.0, "guidance_interval": (0, 1), "sampler": "dpm++", "sampling_timesteps": 5}


def scheduler_class(module: str, name: str) -> Any:
    """Gives a scheduler of diffusers, or skips the test where diffusers is not installed."""
    return getattr(pytest.importorskip(f"diffusers.schedulers.scheduling_{module}"), name)


def tiny(**changes) -> LatentDiffusion:
    """A real model of some 60,000 weights, the same each time, without a trace in the global generator."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LatentDiffusion(**{**TINY, **changes})


def generators(count: int, seed: int = 0) -> list[torch.Generator]:
    return [sample_generator(seed, "test", index) for index in range(count)]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


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


def signal_share(schedule: str, timesteps: int = 1000, noise_shift: float = 0.0) -> Tensor:
    """The product of 1 - beta up to each timestep, from the papers' formulas, in float64."""
    if schedule == "linear":  # Ho et al. 2020, section 4
        betas = [1e-4 + (0.02 - 1e-4) * step / (timesteps - 1) for step in range(timesteps)]
    else:  # Nichol & Dhariwal 2021, equation 17
        shares = [math.cos((step / timesteps + 0.008) / 1.008 * math.pi / 2) ** 2 for step in range(timesteps + 1)]
        betas = [min(1 - after / before, 0.999) for before, after in pairwise(shares)]
    share = torch.cumprod(1 - torch.tensor(betas, dtype=torch.float64), dim=0)
    return torch.sigmoid(torch.logit(share) - 2 * noise_shift)  # of log(alpha^2 / sigma^2)


# ---- the library


def place_library(folder: Path, monkeypatch, version_file: str | None) -> Path:
    """Puts a library of that name first on the path, as if nothing had imported the real one."""
    package = folder / "denoising_diffusion_pytorch"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "classifier_free_guidance.py").write_text("class Unet: pass\nclass GaussianDiffusion: pass\n")
    if version_file is not None:
        (package / "version.py").write_text(version_file)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "denoising_diffusion_pytorch")
    return package


def test_the_installed_library_is_accepted():
    check_library()


@pytest.mark.parametrize(
    ("version_file", "named"),
    [
        ("__version__ = '1.8.0'\n", "1.8.0"),
        ('__version__="2.3.3"', "2.3.3"),
        ("__version__ = '2.3'", "2.3"),
        ("nothing here", "version unknown"),
        (None, "version unknown"),
    ],
)
def test_an_old_copy_on_the_path_is_named_with_its_place(tmp_path, monkeypatch, version_file, named):
    package = place_library(tmp_path, monkeypatch, version_file)
    with pytest.raises(UserError, match=rf"{re.escape(named)}.*{re.escape(str(package.resolve()))}.*2\.3\.4"):
        check_library()


@pytest.mark.parametrize("version", ["2.3.4", "2.3.10", "2.10.0", "3.0"])
def test_a_newer_copy_on_the_path_is_accepted(tmp_path, monkeypatch, version):
    place_library(tmp_path, monkeypatch, f"__version__ = '{version}'\n")
    check_library()


@pytest.mark.parametrize(("version", "accepted"), [("2.4.0", True), ("2.2.0", False)])
def test_an_installation_without_a_version_file_is_asked_through_its_metadata(tmp_path, monkeypatch, version, accepted):
    place_library(tmp_path, monkeypatch, None)
    metadata = tmp_path / f"denoising_diffusion_pytorch-{version}.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: denoising-diffusion-pytorch\nVersion: {version}\n")
    if accepted:
        check_library()
    else:
        with pytest.raises(UserError, match=version):
            check_library()


def test_an_absent_library_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "denoising_diffusion_pytorch")
    with pytest.raises(UserError, match="not installed; pip install"):
        check_library()


def test_a_fork_in_the_working_directory_stops_the_import_of_our_module(tmp_path, monkeypatch):
    package = place_library(tmp_path, monkeypatch, "__version__ = '2.0.1'\n")
    program = "import config\ntry:\n  import diffusion\nexcept config.UserError as error:\n  print(error)"
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert "2.0.1" in run.stdout
    assert str(package.resolve()) in run.stdout


def test_only_the_diffusion_module_pays_for_importing_the_library():
    importing = re.compile(r"^\s*(from|import)\s+denoising_diffusion_pytorch", re.MULTILINE)
    modules = {path.name for path in ROOT.glob("*.py") if importing.search(path.read_text())}
    assert modules == {"diffusion.py"}


# ---- network and schedule


def test_the_default_recipe_has_the_size_it_is_known_by():
    recipe = {"dim": 48, "dim_mults": (1, 2, 4), "attn_dim_head": 32, "attn_heads": 4}
    model = tiny(**recipe, num_classes=31, latent_channels=4, latent_size=32)
    assert sum(weight.numel() for weight in model.parameters()) == pytest.approx(6.37e6, rel=0.002)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_schedule_is_the_papers_and_that_of_diffusers(schedule):
    ours = tiny(beta_schedule=schedule).get_buffer("alphas_cumprod")
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, signal_share(schedule).float(), rtol=1e-6, atol=0)
    names = {"linear": {"beta_start": 1e-4, "beta_end": 0.02}, "cosine": {"beta_schedule": "squaredcos_cap_v2"}}
    theirs = scheduler_class("ddpm", "DDPMScheduler")(num_train_timesteps=1000, **names[schedule])
    torch.testing.assert_close(ours, theirs.alphas_cumprod, rtol=1e-4, atol=0)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("shift", [-1.0, 0.5, 2.0])
def test_a_shift_makes_each_timestep_noisier_by_as_much(schedule, shift):
    """Up to the largest beta, 0.999, which bounds the last few timesteps of the cosine schedule."""
    plain, shifted = (tiny(beta_schedule=schedule, noise_shift=value) for value in (0.0, shift))
    bounded = shifted.get_buffer("betas") >= 0.999
    assert bounded.sum() <= 3
    share = signal_share(schedule, noise_shift=shift).float()
    torch.testing.assert_close(shifted.get_buffer("alphas_cumprod")[~bounded], share[~bounded], rtol=1e-5, atol=0)
    by_time = {level.time: level.log_snr for level in plain.levels(1000)[:-1]}
    for level in shifted.levels(1000)[:-1]:
        if level.time in by_time and not bounded[level.time]:
            assert by_time[level.time] - level.log_snr == pytest.approx(shift, abs=1e-3)


def test_the_library_keeps_its_own_schedules():
    before = tiny().get_buffer("betas")
    with pytest.raises(UserError):
        tiny(beta_schedule="linear", timesteps=20, noise_shift=0.5)
    tiny(noise_shift=0.5)
    assert torch.equal(tiny().get_buffer("betas"), before)


def test_the_step_sizes_come_from_float64():
    model = tiny()
    share = signal_share("cosine")
    for name, exact in (("sqrt_alphas_cumprod", share), ("sqrt_one_minus_alphas_cumprod", 1 - share)):
        assert (model.get_buffer(name).double() / exact.sqrt() - 1).abs().max() < 1e-7


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latent_size": 30, "dim_mults": (1, 2, 4)}, "latents are 30 x 30.*multiple of 4"),
        ({"dim": 7}, "dim is 7"),
        ({"dim": 2}, "dim is 2"),
        ({"beta_schedule": "linear", "timesteps": 20}, "timesteps is 20, too few for beta_schedule linear"),
        ({"beta_schedule": "linear", "timesteps": 5}, "timesteps is 5, too few for beta_schedule linear"),
    ],
)
def test_sizes_that_do_not_fit_are_told(changes, message):
    with pytest.raises(UserError, match=message):
        tiny(**changes)


# ---- training


@pytest.mark.parametrize("shift", [0.0, 0.5])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("gamma", [5.0, None])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_losses_are_the_closed_form(objective, gamma, schedule, shift):
    model = tiny(
        objective=objective,
        min_snr_loss_weight=gamma is not None,
        min_snr_gamma=gamma or 1.0,
        beta_schedule=schedule,
        noise_shift=shift,
    )
    latents, noise = 3 * randn(4, 2, 8, 8, seed=1), randn(4, 2, 8, 8, seed=2)  # well outside [-1, 1]
    times, classes = torch.tensor([0, 150, 600, 990]), torch.tensor([0, 1, 2, 0])
    keep = torch.tensor([True, False, True, False])
    with torch.no_grad():
        losses = model(latents, classes, times=times, noise=noise, cond_keep_mask=keep)
        share = signal_share(schedule, noise_shift=shift)[times]
        alpha, sigma = share.sqrt()[:, None, None, None], (1 - share).sqrt()[:, None, None, None]
        noisy = (alpha * latents + sigma * noise).float()
        output = Unet.forward(model.model, noisy, times, classes, cond_keep_mask=keep)
    targets = {"pred_v": alpha * noise - sigma * latents, "pred_noise": noise, "pred_x0": latents}
    snr = share / (1 - share)
    capped = snr if gamma is None else snr.clamp(max=gamma)
    weights = {"pred_v": capped / (snr + 1), "pred_noise": capped / snr, "pred_x0": capped}
    expected = ((output - targets[objective]) ** 2).mean(dim=(1, 2, 3)) * weights[objective]
    assert losses.shape == (4,)
    torch.testing.assert_close(losses, expected.float(), rtol=2e-5, atol=0)


def test_a_dropped_condition_hides_the_class_and_a_kept_one_shows_it():
    model, latents, noise = tiny(), randn(2, 2, 8, 8, seed=1), randn(2, 2, 8, 8, seed=2)
    given = {"times": torch.tensor([500, 500]), "noise": noise, "cond_keep_mask": torch.tensor([True, False])}
    with torch.no_grad():
        one, other = (model(latents, torch.tensor([label, label]), **given) for label in (0, 1))
    assert one[0] != other[0]
    assert one[1] == other[1]


def test_losses_are_repeatable_and_leave_the_global_generator_alone():
    model = tiny()
    given = {"times": torch.tensor([10, 20]), "noise": randn(2, 2, 8, 8), "cond_keep_mask": torch.tensor([True, False])}
    before = torch.get_rng_state()
    with torch.no_grad():
        one, other = (model(randn(2, 2, 8, 8), torch.tensor([0, 1]), **given) for _ in range(2))
    assert torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), before)


def test_accumulated_micro_batches_have_the_gradient_of_the_effective_batch():
    latents, classes = randn(16, 2, 8, 8), torch.arange(16) % 3
    draws = draw_step(0, 0, batch=16, size=16, latent_shape=(2, 8, 8), timesteps=1000, cond_drop_prob=0.5)
    gradients = []
    for micro in (16, 2):
        model = tiny()
        for start in range(0, 16, micro):
            part, rows = draws.slice(start, start + micro), slice(start, start + micro)
            losses = model(
                latents[rows], classes[rows], times=part.times, noise=part.noise, cond_keep_mask=part.cond_keep_mask
            )
            (losses.sum() / 16).backward()
        gradients.append(torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.grad is not None]))
    assert (gradients[0] - gradients[1]).norm() < 2e-6 * gradients[0].norm()


def test_weights_with_the_channels_last_have_the_losses_and_gradients_of_plain_ones():
    turned: Any = tiny()
    turned = turned.to(memory_format=torch.channels_last)
    assert not all(weight.is_contiguous() for weight in turned.parameters())
    latents, classes = randn(8, 2, 8, 8), torch.arange(8) % 3
    draws = draw_step(0, 0, batch=8, size=8, latent_shape=(2, 8, 8), timesteps=1000, cond_drop_prob=0.5)
    losses, gradients = [], []
    for model in (tiny(), turned):
        losses.append(
            model(latents, classes, times=draws.times, noise=draws.noise, cond_keep_mask=draws.cond_keep_mask)
        )
        losses[-1].sum().backward()
        gradients.append(torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.grad is not None]))
    assert torch.allclose(losses[0], losses[1], rtol=1e-5)
    assert (gradients[0] - gradients[1]).norm() < 2e-6 * gradients[0].norm()


def test_latents_of_another_shape_are_refused():
    given = {"times": torch.tensor([1]), "noise": randn(1, 2, 4, 4), "cond_keep_mask": torch.tensor([True])}
    with pytest.raises(ValueError, match="shape"):
        tiny()(randn(1, 2, 4, 4), torch.tensor([0]), **given)


# ---- guidance


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("cond_scale", [0.0, 0.5, 1.0, 2.5, 6.0])
@torch.no_grad()
def test_guidance_is_the_stated_convention_in_one_pass(batch, cond_scale):
    unet = tiny().model
    x, time, classes = 3 * randn(batch, 2, 8, 8), torch.arange(batch) * 300, torch.arange(batch)
    cond = Unet.forward(unet, x, time, classes, cond_drop_prob=0.0)
    uncond = Unet.forward(unet, x, time, classes, cond_drop_prob=1.0)
    assert (cond - uncond).abs().max() > 1e-3
    passes = []
    hook = unet.init_conv.register_forward_hook(lambda module, inputs, output: passes.append(len(inputs[0])))
    guided = unet.predict_guided(x, time, classes, cond_scale)
    hook.remove()
    torch.testing.assert_close(guided, uncond + cond_scale * (cond - uncond), rtol=1e-4, atol=1e-5)
    if cond_scale in (0, 1):  # one undoubled pass, the same bits
        assert torch.equal(guided, cond if cond_scale else uncond)
        assert passes == [batch]
    else:
        assert passes == [2 * batch]


@torch.no_grad()
def test_guidance_of_a_batch_is_that_of_each_of_its_members():
    unet = tiny().model
    x, time, classes = randn(2, 2, 8, 8), torch.tensor([100, 900]), torch.tensor([2, 0])
    together = unet.predict_guided(x, time, classes, 3.0)
    alone = torch.cat([unet.predict_guided(x[i : i + 1], time[i : i + 1], classes[i : i + 1], 3.0) for i in range(2)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_guidance_draws_nothing():
    unet, before = tiny().model, torch.get_rng_state()
    for cond_scale in (0.0, 1.0, 2.0):
        unet.predict_guided(randn(2, 2, 8, 8), torch.tensor([1, 2]), torch.tensor([0, 1]), cond_scale)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_samplers_of_the_library_are_out_of_reach():
    model, classes = tiny(), torch.tensor([0, 1])
    inherited = (
        lambda: model.p_sample_loop(classes, (2, 2, 8, 8)),
        lambda: model.ddim_sample(classes, (2, 2, 8, 8)),
        lambda: model.interpolate(randn(2, 2, 8, 8), randn(2, 2, 8, 8), classes),
    )
    for call in inherited:
        with pytest.raises(NotImplementedError, match="predict_guided"):
            call()


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


# Two narrow classes of values, far outside [-1, 1], as the distribution of every latent element.
CENTERS, SPREADS, SHARES = (-3.0, 1.5), (0.5, 0.3), (0.4, 0.6)
MIXTURE_MEAN = sum(share * center for share, center in zip(SHARES, CENTERS, strict=True))
MIXTURE_STD = math.sqrt(
    sum(s * (d**2 + c**2) for s, c, d in zip(SHARES, CENTERS, SPREADS, strict=True)) - MIXTURE_MEAN**2
)


def exact(objective: str, error: float = 0.0):
    """The perfect network for the mixture, by Bayes' rule; `error` scales its output up."""
    share = signal_share("cosine")

    def output(x: Tensor, time: Tensor) -> Tensor:
        alpha, sigma = (each[time].sqrt()[:, None, None, None] for each in (share, 1 - share))
        x = x.double()
        log_odds, latents = [], []
        for weight, center, spread in zip(SHARES, CENTERS, SPREADS, strict=True):
            variance = (alpha * spread) ** 2 + sigma**2
            log_odds.append(math.log(weight) - variance.log() / 2 - (x - alpha * center) ** 2 / (2 * variance))
            latents.append(center + alpha * spread**2 / variance * (x - alpha * center))
        odds = torch.stack(log_odds).softmax(dim=0)
        latent = (odds * torch.stack(latents)).sum(dim=0)
        noise = (x - alpha * latent) / sigma
        outputs = {"pred_v": alpha * noise - sigma * latent, "pred_noise": noise, "pred_x0": latent}
        return outputs[objective] * (1 + error)

    return output


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


# ---- EMA


def test_the_decay_warms_up_and_ends_at_its_setting():
    ema = EMA(nn.Linear(1, 1), decay=0.9995, update_every=10)
    assert [ema.decay_at(step) for step in (0, 50, 99, 100)] == [0.0] * 4
    assert ema.decay_at(107) == pytest.approx(0.75)
    assert ema.decay_at(1099) == pytest.approx(0.99)
    assert ema.decay_at(10_000_000) == 0.9995
    decays = [ema.decay_at(step) for step in range(100, 200_000, 100)]
    assert decays == sorted(decays)


def test_the_average_is_that_of_a_plain_loop():
    model = nn.Linear(3, 2)
    ema = EMA(model, decay=0.97, update_every=10)
    average = model.weight.detach().double().tolist()
    for step in range(1, 1001):
        with torch.no_grad():
            model.weight.add_(torch.sin(torch.arange(6.0).reshape(2, 3) + step))
        ema.update(model, step)
        if step % 10:
            continue
        decay = 0.0 if step < 100 else min(0.97, 1 - (step - 99) ** (-2 / 3))
        current = model.weight.detach().double().tolist()
        average = [
            [decay * old + (1 - decay) * new for old, new in zip(*rows, strict=True)]
            for rows in zip(average, current, strict=True)
        ]
        torch.testing.assert_close(
            ema.model.weight.detach().double(), torch.tensor(average).double(), atol=1e-5, rtol=0
        )


def test_the_average_is_a_plain_copy_before_the_warm_up_and_only_moves_when_due():
    model = nn.Linear(2, 2)
    ema = EMA(model, decay=0.9995, update_every=10)
    with torch.no_grad():
        model.weight.fill_(7.0)
    ema.update(model, 55)
    assert not torch.equal(ema.model.weight, model.weight)
    ema.update(model, 60)
    assert torch.equal(ema.model.weight, model.weight)
    assert ema.model.weight is not model.weight


def test_buffers_are_copied():
    model = nn.BatchNorm1d(2)
    ema = EMA(model, decay=0.9995, update_every=1)
    model(randn(8, 2) + 5)
    ema.update(model, 5000)
    for name, value in model.named_buffers():
        assert torch.equal(ema.model.get_buffer(name), value)
    assert ema.model.get_buffer("num_batches_tracked") == 1


def test_the_average_is_in_eval_mode_without_gradients_and_samples():
    model = tiny().train()
    ema = EMA(model, decay=0.9995, update_every=1)
    ema.update(model, 200)
    assert not any(module.training for module in ema.model.modules())
    assert not any(weight.requires_grad for weight in ema.model.parameters())
    assert model.training and all(weight.requires_grad for weight in model.parameters())
    samples = ema.model.sample(torch.tensor([0]), generators(1), **SAMPLING)
    torch.testing.assert_close(samples, model.sample(torch.tensor([0]), generators(1), **SAMPLING))


def test_an_average_goes_on_from_its_weights_alone():
    model = nn.Linear(3, 2)
    through = EMA(model, decay=0.999, update_every=2)
    broken_off = EMA(model, decay=0.999, update_every=2)
    for step in range(1, 301):
        with torch.no_grad():
            model.weight.add_(math.sin(step))
        through.update(model, step)
        if step == 150:
            stored = copy.deepcopy(broken_off.model.state_dict())
            broken_off = EMA(nn.Linear(3, 2), decay=0.999, update_every=2)
            broken_off.model.load_state_dict(stored)
        broken_off.update(model, step)
    assert torch.equal(through.model.weight, broken_off.model.weight)


def test_updating_the_average_never_reads_a_value_from_the_device():
    model = nn.BatchNorm1d(2, device="meta")  # there are no values on this device: reading one raises
    with pytest.raises(RuntimeError):
        model.weight.sum().item()
    ema = EMA(model, decay=0.9995, update_every=1)
    for step in (50, 100, 5000):
        ema.update(model, step)


# ---- all of it together


def test_a_short_training_learns_which_class_is_which():
    means = torch.stack([torch.full((1, 4, 4), value) for value in (-1.0, 1.0)])
    model = tiny(num_classes=2, latent_channels=1, latent_size=4, dim_mults=(1,), cond_drop_prob=0.2)
    ema = EMA(model, decay=0.95, update_every=1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(40):
        draws = draw_step(0, step, batch=16, size=64, latent_shape=(1, 4, 4), timesteps=1000, cond_drop_prob=0.2)
        classes = draws.positions % 2
        latents = means[classes] + 0.2 * draws.posterior_noise
        losses = model(latents, classes, times=draws.times, noise=draws.noise, cond_keep_mask=draws.cond_keep_mask)
        optimizer.zero_grad()
        losses.mean().backward()
        optimizer.step()
        ema.update(model, step + 1)
    classes = torch.arange(16) % 2
    samples = ema.model.sample(
        classes, generators(16), cond_scale=1.0, guidance_interval=(0, 1), sampler="dpm++", sampling_timesteps=10
    )
    distances = (samples[:, None] - means).flatten(2).norm(dim=2)  # 16 2
    assert (distances.argmin(dim=1) == classes).float().mean() > 0.9


def test_every_sampler_of_the_settings_is_known_and_no_other():
    assert set(samplers.SAMPLERS) == {"dpm++", "ddim", "ddpm"}
    with pytest.raises(KeyError):
        tiny().sample(torch.tensor([0]), generators(1), **{**SAMPLING, "sampler": "euler"})


def test_moved_latents_keep_their_rows_and_repeat_the_edge():
    latents = torch.arange(2 * 3 * 2 * 4, dtype=torch.float32).reshape(2, 3, 2, 4)
    found = shift_along_width(latents, torch.tensor([1, -2]))
    assert torch.equal(found[0], latents[0][:, :, [0, 0, 1, 2]])
    assert torch.equal(found[1], latents[1][:, :, [2, 3, 3, 3]])
    assert torch.equal(shift_along_width(latents, torch.zeros(2, dtype=torch.int64)), latents)
