"""The diffusion model: network, schedule, losses against closed forms, guidance, and a short training."""

from typing import Any

import pytest
import torch
from denoising_diffusion_pytorch.classifier_free_guidance import Unet
from tiny_diffusion import OBJECTIVES, generators, randn, scheduler_class, signal_share, tiny

from gait_latents.common.errors import UserError
from gait_latents.diffusion.ema import EMA
from gait_latents.diffusion.model import own_columns, shift_along_width
from gait_latents.training.draws import draw_step

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


@pytest.mark.parametrize("columns", [None, [0, 2, -3, 0]])
@pytest.mark.parametrize("shift", [0.0, 0.5])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("gamma", [5.0, None])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_losses_are_the_closed_form(objective, gamma, schedule, shift, columns):
    """With columns, those do not count that a move by so many has filled."""
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
    loss_mask = None if columns is None else own_columns(torch.tensor(columns), width=8)
    with torch.no_grad():
        losses = model(latents, classes, times=times, noise=noise, cond_keep_mask=keep, loss_mask=loss_mask)
        share = signal_share(schedule, noise_shift=shift)[times]
        alpha, sigma = share.sqrt()[:, None, None, None], (1 - share).sqrt()[:, None, None, None]
        noisy = (alpha * latents + sigma * noise).float()
        output = Unet.forward(model.model, noisy, times, classes, cond_keep_mask=keep)
    targets = {"pred_v": alpha * noise - sigma * latents, "pred_noise": noise, "pred_x0": latents}
    snr = share / (1 - share)
    capped = snr if gamma is None else snr.clamp(max=gamma)
    weights = {"pred_v": capped / (snr + 1), "pred_noise": capped / snr, "pred_x0": capped}
    errors = (output - targets[objective]) ** 2
    own = [slice(max(by, 0), 8 + min(by, 0)) for by in columns or [0] * 4]
    means = torch.stack([error[..., part].mean() for error, part in zip(errors, own, strict=True)])
    expected = means * weights[objective]
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


def test_moved_latents_keep_their_rows_and_repeat_the_edge():
    latents = torch.arange(2 * 3 * 2 * 4, dtype=torch.float32).reshape(2, 3, 2, 4)
    found = shift_along_width(latents, torch.tensor([1, -2]))
    assert torch.equal(found[0], latents[0][:, :, [0, 0, 1, 2]])
    assert torch.equal(found[1], latents[1][:, :, [2, 3, 3, 3]])
    assert torch.equal(shift_along_width(latents, torch.zeros(2, dtype=torch.int64)), latents)


def test_the_columns_that_a_move_fills_are_those_that_it_does_not_keep():
    kept = own_columns(torch.tensor([1, -2, 0]), width=4)
    assert kept.tolist() == [[False, True, True, True], [True, True, False, False], [True] * 4]
    numbers = torch.arange(1.0, 5.0).expand(3, 1, 1, 4)
    moved = shift_along_width(numbers, torch.tensor([1, -2, 0]))[:, 0, 0]
    assert moved[kept].tolist() == [1, 2, 3, 3, 4, 1, 2, 3, 4]  # each of the latent's own columns, once
