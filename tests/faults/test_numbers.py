"""Numbers that go wrong: what the VAE gives, losses, gradients and loss scales, and channels that hold nothing."""

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pipeline
import pytest
import tiny_vae
import torch
from fault_account import Account
from PIL import Image
from pipeline import assert_same_run, preprocess, stored_moments, train
from tiny_cache import RECORD, SPACE, key, row
from torch import Tensor, nn

from gait_latents.common import errors
from gait_latents.common.errors import UserError
from gait_latents.diffusion.model import LatentDiffusion
from gait_latents.images import reading
from gait_latents.images.split import read_split
from gait_latents.latents.cache import LatentCache
from gait_latents.training import checkpoint, optimizer_state, run_data, run_folder
from gait_latents.training import draws as draws_module
from gait_latents.training import plan as training_plan
from gait_latents.training import trainer as trainer_module
from gait_latents.training.draws import StepDraws
from gait_latents.training.trainer import Trainer
from gait_latents.vae.batch_encoder import BatchEncoder
from gait_latents.vae.norm import LatentNorm

# --- from the VAE ------------------------------------------------------------------------------------------

SICK = ("ID_1/walk_2.jpg", "ID_2/walk_0.jpg", "ID_10/walk_7.jpg")
VALUES = {"NaN": math.nan, "infinity": math.inf, "minus infinity": -math.inf, "more than float16 holds": 65520.0}


class Spell:
    """Makes the encoder give one value for some images: in all number formats, or in the reduced ones alone."""

    def __init__(self, world: Path, value: float, *, in_float32: bool) -> None:
        data = [(world / "data" / name).read_bytes() for name in SICK]
        pixels = [reading.decode(content, image_size=pipeline.SIZE) for content in data]
        self.pixels = [torch.from_numpy(image).permute(2, 0, 1).float() / 255 for image in pixels]
        self.value, self.in_float32 = value, in_float32
        self.dtypes: list[torch.dtype] = []

    def cast(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Begins."""
        encode = BatchEncoder._encode

        def spoilt(encoder: BatchEncoder, pixels: Tensor, dtype: torch.dtype) -> Tensor:
            moments = encode(encoder, pixels, dtype)
            self.dtypes.append(dtype)
            for moment, image in zip(moments, pixels, strict=True):
                is_sick = any(torch.equal(image, sick) for sick in self.pixels)
                if is_sick and (self.in_float32 or dtype != torch.float32):
                    moment[1, 2, 3] = self.value
            return moments

        monkeypatch.setattr(BatchEncoder, "_encode", spoilt)


def keys_of(world: Path, names: tuple[str, ...]) -> set[str]:
    return {reading.image_key((world / "data" / name).read_bytes()) for name in names}


@pytest.fixture(scope="module")
def sane(_pristine: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What the encoder gives for all images, by their keys."""
    folder = tmp_path_factory.mktemp("sane")
    assert preprocess(_pristine, output_folder=folder, images_per_user="all") == 0
    return stored_moments(folder)


@pytest.mark.parametrize(("kind", "precision"), [*((kind, "float32") for kind in VALUES), ("NaN", "bfloat16")])
def test_values_that_cannot_be_stored_are_refused_by_name_and_the_others_kept(
    world, sane, monkeypatch, capsys, encoder, account, kind, precision
):
    flags = {"images_per_user": "all", "encode_batch_size": 5}
    spell = Spell(world, VALUES[kind], in_float32=True)
    with monkeypatch.context() as patch:
        spell.cast(patch)
        assert preprocess(world, **flags, encode_precision=precision) == 1
    captured = capsys.readouterr()
    assert "newly encoded   21\nalready cached  0\nfailed          3\n" in captured.out
    for name in SICK:
        assert f"    {name}: the VAE gives values that are not finite, in float32 too\n" in captured.out
    assert "3 image(s) failed and the rest are cached" in captured.err
    assert (torch.float32 in spell.dtypes) and (precision == "float32" or torch.bfloat16 in spell.dtypes)
    found = stored_moments(world / "latents_cache")
    lost, wrong = len(sane.keys() - keys_of(world, SICK) - found.keys()), len(found.keys() & keys_of(world, SICK))
    encoder.forget()
    assert preprocess(world, **flags) == 0  # with a VAE that is well again
    wrong += encoder.num_images != 3
    if precision == "float32":
        wrong += sum(sane[name] != row for name, row in stored_moments(world / "latents_cache").items())
    account.add("the VAE gives what cannot be stored", "NaN, infinities, overflow", cases=3, lost=lost, wrong=wrong)


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_what_only_a_reduced_precision_breaks_is_encoded_again_in_float32(world, sane, monkeypatch, account, precision):
    spell = Spell(world, math.nan, in_float32=False)
    spell.cast(monkeypatch)
    assert preprocess(world, images_per_user="all", encode_precision=precision) == 0
    found = stored_moments(world / "latents_cache")
    pairs = [(np.frombuffer(found[name], "<f2"), np.frombuffer(sane[name], "<f2")) for name in sane]
    close = [np.allclose(ours, theirs, rtol=0.1, atol=0.3) for ours, theirs in pairs]
    wrong = close.count(False) + sum(found[k] != sane[k] for k in keys_of(world, SICK))
    assert found != sane  # the others are as the reduced precision gives them
    account.add("the VAE gives what cannot be stored", "in a reduced precision only", cases=3, wrong=wrong)


def test_images_that_the_vae_cannot_do_are_left_out_on_request_and_stop_a_lazy_training(
    world, monkeypatch, capsys, account
):
    spell = Spell(world, math.inf, in_float32=True)
    spell.cast(monkeypatch)
    assert train(world, images_per_user="all", num_samples=0) == 1
    assert re.search(
        rf"error: ({'|'.join(SICK)}): the VAE gives values that are not finite, .*; this run needs that image",
        pipeline.one_error(capsys),
    )
    assert preprocess(world, images_per_user="all", skip_bad_images="true") == 0
    assert train(world, images_per_user="all", skip_bad_images="true", num_samples=0, results_folder=world / "r") == 0
    split = read_split(world / "r")
    assert split is not None and {f"{item.class_name}/{item.name}" for item in split.skipped} == set(SICK)
    account.add("the VAE gives what cannot be stored", "in a lazy training; skipped on request", cases=3)


class Loud(nn.Module):
    """An encoder whose inner values overflow float16 for bright images, and whose moments do not."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 2, stride=2)
        nn.init.constant_(self.conv.weight, 2e4)
        nn.init.zeros_(self.conv.bias)  # type: ignore[arg-type]

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        return self.conv(images) * 1e-4


def test_rows_that_really_overflow_float16_are_encoded_again_in_float32(account):
    def encode(dtype: torch.dtype) -> Tensor:
        return BatchEncoder(Loud, device=torch.device("cpu"), batch_size=4, dtype=dtype)(images)

    images = torch.zeros(3, 16, 16, 3, dtype=torch.uint8)
    images[1] = 255
    images[2] = 20
    exact, reduced = encode(torch.float32), encode(torch.float16)
    assert exact.isfinite().all()
    assert not torch.equal(reduced[2], exact[2])  # this one fits, and stays as float16 gives it
    assert torch.allclose(reduced, exact, rtol=2e-3)
    wrong = not torch.equal(reduced[1], exact[1])
    account.add("the VAE gives what cannot be stored", "in a reduced precision only", cases=1, wrong=wrong)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_moments_that_are_not_finite_are_refused_by_name_and_nothing_is_taken(tmp_path, account, value):
    cache = LatentCache(tmp_path, SPACE, writable=True)
    rows = np.stack([row(0), row(1)])
    rows[1, 0, 1, 0] = value
    with pytest.raises(ValueError, match=r"ID_7/x\.jpg are not finite"):
        cache.put([key(0), key(1)], rows, ["ID_7/w.jpg", "ID_7/x.jpg"], RECORD)
    account.add("the VAE gives what cannot be stored", "put into the cache", cases=1, wrong=cache.pending)


# --- a VAE or images that say nothing ----------------------------------------------------------------------


def save_changed_vae(world: Path, changes: dict[str, dict[Any, float]]) -> None:
    """Writes the VAE with some elements of some tensors replaced."""
    state = {name: tensor.clone() for name, tensor in tiny_vae.tiny_vae().state_dict().items()}
    for name, elements in changes.items():
        for place, value in elements.items():
            state[name][place] = value
    torch.save(state, world / "vae.pt")


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["encoder.conv_in.weight", "encoder.mid.attn_1.q.bias", "quant_conv.weight"])
def test_a_vae_with_weights_that_are_not_finite_is_refused_before_any_work(world, capsys, account, name, value):
    save_changed_vae(world, {name: {0: value}})
    for run in (preprocess, train):
        assert run(world) == 2
        assert f"vae.pt: {name} has values that are not finite" in pipeline.one_error(capsys)
    left = list(world.rglob("*.safetensors"))
    account.add("a VAE with NaN or infinite weights", "in the encoder", cases=2, wrong=len(left))


def test_a_decoder_that_is_not_finite_costs_the_pictures_only(world, trained, capsys, account):
    save_changed_vae(world, {"decoder.conv_out.weight": {0: math.nan}})
    assert preprocess(world) == 0
    assert "warning: no preview.png: " in capsys.readouterr().err
    assert train(world) == 0
    said = capsys.readouterr()
    assert said.err.count("sample grids are scored, but not drawn") == 1 and "nearest to the mean" in said.out
    assert_same_run(world, trained)
    account.add("a VAE with NaN or infinite weights", "in the decoder", cases=1)


def test_a_constant_channel_is_an_error_that_names_it(world, capsys, account):
    rows: dict[str, dict[Any, float]] = {"quant_conv.weight": {1: 0.0, 5: 0.0}, "quant_conv.bias": {1: 0.3, 5: -30.0}}
    save_changed_vae(world, rows)
    assert preprocess(world) == 0
    capsys.readouterr()
    assert train(world) == 2
    assert "channel 1 of the moments is constant (mean 0.3, deviation" in pipeline.one_error(capsys)
    left = list((world / "results").iterdir()) if (world / "results").exists() else []
    account.add("a latent channel that is constant", "a VAE that does not use it", cases=1, wrong=len(left))


def synthetic_moments() -> Tensor:
    """Three channels of means about 0, and small variances."""
    means = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return torch.cat([means, torch.full_like(means, -4.0)], dim=1)


def assert_channel_is_named(moments: Tensor, channel: int, reason: str, account: Account) -> None:
    with pytest.raises(UserError, match=f"channel {channel} of the moments is {reason}"):
        LatentNorm.from_moments(moments)
    account.add(f"a latent channel that is {reason}", "moments to the normalisation", cases=1)


@pytest.mark.parametrize("value", [0.0, 3.0, -500.0])
def test_a_constant_channel_of_moments_is_named(account, value):
    moments = synthetic_moments()
    moments[:, 1], moments[:, 4] = value, -30.0
    assert_channel_is_named(moments, 1, "constant", account)


def test_a_spread_that_float16_cannot_hold_is_constant(account):
    moments = synthetic_moments()
    moments[:, 2] = 1000.0 + 0.1 * torch.rand_like(moments[:, 2])
    moments[:, 5] = -30.0
    assert_channel_is_named(moments, 2, "constant", account)


def test_moments_that_are_not_finite_are_named(account):
    moments = synthetic_moments()
    moments[5, 2, 0, 0] = math.nan
    assert_channel_is_named(moments, 2, "not finite", account)


def test_images_that_are_all_black_train_without_a_bad_number(world, account):
    for size, path in enumerate(sorted((world / "data").rglob("*.jpg")), start=16):
        Image.new("RGB", (size, size)).save(path)  # so that their contents differ
    assert train(world, num_samples=1) == 0
    state = run_folder.newest_state(world / "results")
    assert state is not None
    wrong = sum(not tensor.isfinite().all() for tensor in state.tensors.values())
    account.add("images that are all black", "24 of 24", cases=24, wrong=wrong)


# --- losses and gradients ----------------------------------------------------------------------------------


def poison_noise(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Makes the noise of the step of this number, counted from 1, infinite, and with it its loss not finite."""
    draw_step = trainer_module.draw_step

    def poisoned(seed: int, number: int, **facts) -> StepDraws:
        draws = draw_step(seed, number, **facts)
        if number == step - 1:
            draws.noise[1] = torch.inf
        return draws

    monkeypatch.setattr(trainer_module, "draw_step", poisoned)


class _SickGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, losses: Tensor) -> Tensor:
        return losses.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0] * math.nan


def poison_gradient(monkeypatch: pytest.MonkeyPatch, step: int, last: int | None = None) -> None:
    """Makes the gradients of the steps from `step` to `last`, by default that one, NaN, and no loss."""
    forward, take_step, now = LatentDiffusion.forward, Trainer.train_step, [0]

    def train_step(trainer: Trainer) -> None:
        now[0] = trainer.finished_steps + 1
        take_step(trainer)

    def poisoned(diffusion: LatentDiffusion, *args: Any, **facts: Any) -> Tensor:
        losses = forward(diffusion, *args, **facts)
        return _SickGradient.apply(losses) if step <= now[0] <= (last or step) else losses  # type: ignore[return-value]

    monkeypatch.setattr(Trainer, "train_step", train_step)
    monkeypatch.setattr(LatentDiffusion, "forward", poisoned)


POISONS = {"loss": poison_noise, "gradient": poison_gradient}


def names_of_step(root: Path, step: int) -> list[str]:
    """Returns the images of a step by drawing it again."""
    split = read_split(root / "results")
    assert split is not None
    facts = {"size": 15, "latent_shape": (4, 8, 8), "timesteps": 1000, "cond_drop_prob": 0.5}
    positions = draws_module.draw_step(42, step - 1, batch=4, **facts).positions
    return [f"{split.train[i].class_name}/{split.train[i].name}" for i in positions.tolist()]


def sick_tensors(results: Path) -> int:
    """Counts the saved tensors that are not finite."""
    tensors = [checkpoint.load(path)[0] for path in results.glob("*.safetensors")]
    return sum(not tensor.isfinite().all() for each in tensors for tensor in each.values())


@pytest.mark.parametrize(
    ("what", "precision"), [("loss", "float32"), ("loss", "float16"), ("gradient", "float32"), ("gradient", "float16")]
)
def test_a_step_that_is_not_finite_changes_no_weight_and_no_moment(cached, monkeypatch, account, what, precision):
    POISONS[what](monkeypatch, 3)
    plan = training_plan.make_plan(pipeline.train_flags(cached, precision=precision, ema_update_every=1))
    device = torch.device("cpu")
    trainer = Trainer(plan.settings, run_data.open_data(plan, device), device)
    trainer.start(plan)

    def weights() -> dict[str, Tensor]:
        state, _ = optimizer_state.pack_training_state(trainer.diffusion, trainer.ema.model, trainer.optimizer, None)
        return {name: tensor.clone() for name, tensor in state.items()}

    trainer.train_step()
    trainer.train_step()
    before, scale = weights(), trainer.scaler.get_scale()
    trainer.train_step()
    after = weights()
    wrong = sum(not torch.equal(before[name], after[name]) for name in before)
    trainer.train_step()
    assert any(not torch.equal(before[name], tensor) for name, tensor in weights().items())
    wrong += sum(not tensor.isfinite().all() for tensor in weights().values())
    assert trainer.losses[2].isfinite() == (what == "gradient")
    if (what, precision) == ("gradient", "float16"):  # which may be an overflow
        trainer.check_finite()
        assert trainer.scaler.get_scale() < scale
    else:
        with pytest.raises(errors.Failed, match=f"the {what} of step 3 is not finite; the step was not taken"):
            trainer.check_finite()
    account.add(f"a {what} that is not finite", "one step", cases=1, wrong=wrong)


@pytest.mark.parametrize(
    ("what", "often"),
    [
        ("loss", {"log_every": 4}),
        ("loss", {"log_every": 100, "save_and_sample_every": 4}),
        ("loss", {"log_every": 100}),
        ("gradient", {"log_every": 100}),
    ],
)
def test_a_run_ends_by_name_before_anything_bad_is_saved_and_the_next_goes_on(
    cached, trained, monkeypatch, capsys, account, often, what
):
    flags = {"save_and_sample_every": 100, **often, "num_samples": 0}
    with monkeypatch.context() as patch:
        POISONS[what](patch, 3)
        assert train(cached, **flags) == 1
    error = pipeline.one_error(capsys)
    assert f"the {what} of step 3 is not finite" in error
    assert ", ".join(names_of_step(cached, 3)) in error
    state = run_folder.newest_state(cached / "results")
    assert state is not None and state.step == 1  # of the rehearsal
    wrong = sick_tensors(cached / "results")
    assert train(cached, save_and_sample_every=100, num_samples=0) == 0
    ours, theirs = pipeline.state_digests(cached / "results"), pipeline.state_digests(trained / "results")
    wrong += sum(ours[name] != digest for name, digest in theirs.items() if not name.startswith("log."))
    account.add(f"a {what} that is not finite", "the run ends, and the next goes on", cases=1, wrong=wrong)


def test_an_absurd_learning_rate_is_noticed(cached, capsys, account):
    assert train(cached, train_lr=1e30, num_samples=0) == 1
    assert re.search(r"the loss of step \d is not finite", pipeline.one_error(capsys))
    account.add("a loss that is not finite", "an absurd learning rate", cases=1, wrong=sick_tensors(cached / "results"))


def test_an_overflow_of_the_loss_scale_only_lowers_it(cached, monkeypatch, account):
    scaler = torch.amp.GradScaler

    def steep(device: str, *, enabled: bool) -> torch.amp.GradScaler:
        return scaler(device, init_scale=2.0**40, enabled=enabled)

    monkeypatch.setattr(torch.amp, "GradScaler", steep)
    assert train(cached, precision="float16", num_samples=0) == 0
    state = run_folder.newest_state(cached / "results")
    assert state is not None and state.meta.training is not None
    assert 0 < state.meta.training["scaler"]["scale"] < 2.0**40
    account.add(
        "a gradient that overflows float16", "a loss scale of 2^40", cases=1, wrong=sick_tensors(cached / "results")
    )


def test_gradients_that_overflow_whatever_the_scale_end_the_run(cached, monkeypatch, capsys, account):
    """Else it would go on for ever without a step that is taken."""
    poison_gradient(monkeypatch, 3, last=1000)
    flags = {"precision": "float16", "num_samples": 0, "train_num_steps": 60, "save_and_sample_every": 100}
    assert train(cached, **flags, log_every=10) == 1
    error = pipeline.one_error(capsys)
    assert "the gradients overflow float16 even with a loss scale of 0.25, at step 20" in error
    account.add("a gradient that overflows float16", "in every step", cases=1, wrong=sick_tensors(cached / "results"))
