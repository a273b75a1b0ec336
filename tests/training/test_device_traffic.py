"""What a GPU would wait for: a step of training reads nothing back and gets its draws in one copy."""

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from device_traffic import DEVICE, Traffic
from tiny_cache import RECORD, key, make_space
from tiny_vae import tiny_vae

from gait_latents.common import cli, hardware
from gait_latents.diffusion import build, sampling
from gait_latents.images.split import Split
from gait_latents.latents.cache import LatentCache
from gait_latents.latents.dataset import LatentDataset
from gait_latents.latents.vae_fit import ChosenSpace
from gait_latents.settings import TrainSettings
from gait_latents.training import draws
from gait_latents.training.run_data import Data
from gait_latents.training.trainer import Trainer
from gait_latents.vae.batch_encoder import BatchEncoder
from gait_latents.vae.decoder import ImageDecoder
from gait_latents.vae.formats import Formats
from gait_latents.vae.norm import LatentNorm

CLASSES = ("a", "b")


def trainer_on(device: torch.device, folder: Path, *, num_stored: int = 20) -> Trainer:
    """Makes a trainer whose network, optimizer and latents are on a device, and whose cache may lack some of these."""
    space = make_space((8, 8, 8))
    cache = LatentCache(folder, space, writable=True)
    keys = [key(i) for i in range(20)]
    moments = np.random.default_rng(0).standard_normal((20, 8, 8, 8)).astype(np.float16)
    stored = keys[:num_stored]
    cache.put(stored, moments[:num_stored], stored, RECORD)
    cache.flush()
    facts = {
        "encode": lambda images: torch.zeros(len(images), 8, 8, 8),
        "read_image": lambda position: np.zeros((16, 16, 3), np.uint8),
        "encode_batch_size": 4,
        "device": device,
    }
    dataset = LatentDataset(cache, keys, [i % 2 for i in range(20)], keys, **facts)
    dataset.set_norm(LatentNorm.from_scale_factor(4, 1.0, 0.0))
    settings = TrainSettings(
        dim=8, dim_mults=(1, 2), attn_dim_head=8, attn_heads=2, ema_update_every=2, time_shift=0.25
    )
    split = Split(classes=CLASSES, train=(), test=(), skipped=(), rule={})
    return Trainer(settings, Data(split, ChosenSpace(space, 1.0, 0.0, vae_at_hand=False), dataset), device)


@pytest.fixture
def trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Trainer:
    """A trainer on the device that has no values."""
    monkeypatch.setattr(
        sys.modules[torch.optim.Optimizer.__module__], "_get_fused_kernels_supported_devices", lambda: ["meta"]
    )
    return trainer_on(DEVICE, tmp_path)


def traffic_of_steps(trainer: Trainer, count: int) -> Traffic:
    with Traffic():
        trainer.train_step()  # the first makes the state of the optimizer
    with Traffic() as traffic:
        for _ in range(count):
            trainer.train_step()
    return traffic


def test_a_step_of_training_reads_nothing_back_and_copies_once(trainer: Trainer) -> None:
    traffic = traffic_of_steps(trainer, 6)
    assert traffic.waits.total() == 0 and traffic.to_device.total() == 6
    assert trainer.finished_steps == 7


def test_a_step_waits_for_nothing_while_some_images_are_not_encoded_yet(trainer: Trainer, tmp_path: Path) -> None:
    """The trainer of the fixture lets the other one have its optimizer on this device."""
    early = trainer_on(DEVICE, tmp_path / "early", num_stored=2)
    early.settings = dataclasses.replace(early.settings, train_batch_size=1)
    early.batch = early.share = early.pass_size = 2
    early.own = slice(0, 2)
    early._ahead = draws.DrawsAhead(early._draw, early.own, pinned=False)
    assert traffic_of_steps(early, 3).waits.total() == 0 and early.dataset.missing()


def test_a_step_in_several_passes_copies_once_too(trainer: Trainer) -> None:
    trainer.pass_size = trainer.share // 4
    assert traffic_of_steps(trainer, 3).to_device.total() == 3


def test_a_value_that_is_read_back_and_a_second_copy_are_seen(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    update = Trainer._update

    def with_waits(self: Trainer, loss: torch.Tensor, step: int) -> None:
        update(self, loss, step)
        float(loss)
        loss.cpu()
        torch.ones(3).to(DEVICE)

    monkeypatch.setattr(Trainer, "_update", with_waits)
    traffic = traffic_of_steps(trainer, 2)
    assert traffic.waits == {"_local_scalar_dense": 2, "_to_copy": 2} and traffic.to_device.total() == 4


def test_draws_sent_one_by_one_are_seen(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    def one_by_one(_: draws.DeviceDraws, host: draws.StepDraws, _buffer: torch.Tensor) -> draws.StepDraws:
        return draws.StepDraws(*[*(value.to(DEVICE) for value in host.tensors()), host.host_positions])

    monkeypatch.setattr(draws.DeviceDraws, "send", one_by_one)
    assert traffic_of_steps(trainer, 1).to_device.total() == 6


def test_where_the_moments_are_on_the_host_a_step_copies_these_too_and_waits_for_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.setattr(hardware, "free_memory_bytes", lambda device: 0 if device == DEVICE else 1 << 30)
    trainer = request.getfixturevalue("trainer")
    assert trainer.dataset.place == "cpu"
    traffic = traffic_of_steps(trainer, 3)
    assert traffic.waits.total() == 0 and traffic.to_device.total() == 6


def state_of(trainer: Trainer) -> list[torch.Tensor]:
    """Returns all that a step changes: weights, averages, moments of the optimizer."""
    moments = [value for state in trainer.optimizer.state.values() for value in state.values()]
    return [*trainer.diffusion.parameters(), *trainer.ema.model.parameters(), *moments]


def test_a_step_on_fixed_memory_is_that_of_today_bit_for_bit_and_no_address_changes(tmp_path: Path) -> None:
    """As a recorded graph of kernels would need it: the way of a GPU, gone on a CPU beside the usual one."""
    usual, fixed = (trainer_on(torch.device("cpu"), tmp_path / name) for name in ("usual", "fixed"))
    sent = []

    def parts_of(step: int) -> list[draws.StepDraws]:
        _, own, buffer = fixed._ahead.of(step)
        sent.append(fixed._sent.send(own, buffer))
        return [sent[-1]]

    fixed.parts_of = parts_of  # type: ignore[method-assign]
    places = set()
    for _ in range(5):
        usual.train_step()
        fixed.train_step()
        places.add(tuple(tensor.data_ptr() for tensor in [*state_of(fixed), *sent[-1].tensors()]))
    assert len(places) == 1
    assert all(torch.equal(one, other) for one, other in zip(state_of(usual), state_of(fixed), strict=True))
    assert torch.equal(torch.stack(usual.losses), torch.stack(fixed.losses))
    assert all(map(torch.equal, usual.losses_by_sample(), fixed.losses_by_sample()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_call_of_the_encoder_copies_once_and_waits_once(dtype: torch.dtype) -> None:
    encoder = BatchEncoder(lambda: tiny_vae().to(DEVICE), device=DEVICE, batch_size=4, dtype=dtype)
    with Traffic():
        encoder(torch.zeros(1, 16, 16, 3, dtype=torch.uint8))  # builds the VAE
    with Traffic() as traffic:
        found = encoder(torch.zeros(8, 16, 16, 3, dtype=torch.uint8))  # two calls
    assert found.shape == (8, 8, 8, 8) and found.device.type == "cpu"
    assert traffic.to_device.total() == traffic.waits.total() == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_host_waits_once_for_each_image_that_is_decoded(dtype: torch.dtype) -> None:
    decoder = ImageDecoder("none", LatentNorm.from_scale_factor(4, 1.0, 0.0), DEVICE)
    decoder._formats = Formats(tiny_vae().to(DEVICE), DEVICE)
    decoder.go_on_in(dtype)
    with Traffic() as traffic:
        images = decoder(torch.zeros(3, 4, 8, 8, device=DEVICE))
    assert [image.shape for image in images] == [(16, 16, 3)] * 3
    assert traffic.waits.total() == 3 and traffic.to_device.total() == 0


def test_a_wait_that_is_put_into_encoding_or_decoding_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def waiting(work: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def work_and_wait(*arguments: Any) -> torch.Tensor:
            found = work(*arguments)
            float(found.sum())
            return found

        return work_and_wait

    monkeypatch.setattr(BatchEncoder, "_encode", waiting(BatchEncoder._encode))
    monkeypatch.setattr(ImageDecoder, "_pixels", waiting(ImageDecoder._pixels))
    encoder = BatchEncoder(lambda: tiny_vae().to(DEVICE), device=DEVICE, batch_size=4, dtype=torch.float32)
    decoder = ImageDecoder("none", LatentNorm.from_scale_factor(4, 1.0, 0.0), DEVICE)
    decoder._formats = Formats(tiny_vae().to(DEVICE), DEVICE)
    with Traffic() as encoding:
        encoder(torch.zeros(8, 16, 16, 3, dtype=torch.uint8))
    with Traffic() as decoding:
        decoder(torch.zeros(3, 4, 8, 8, device=DEVICE))
    assert (encoding.waits.total(), decoding.waits.total()) == (2 * 2, 2 * 3)


@pytest.mark.parametrize("sampler", ["dpm++", "ddim", "ddpm"])
def test_no_step_of_sampling_waits(sampler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The levels of noise, which are read from the device once for each call, are given as numbers here."""
    settings = TrainSettings(dim=8, dim_mults=(1, 2), attn_dim_head=8, attn_heads=2)
    diffusion = build.build_diffusion(cli.to_dict(settings), num_classes=2, latent_shape=(4, 8, 8))
    levels = diffusion._usable_levels()
    monkeypatch.setattr(diffusion, "_usable_levels", lambda: levels)
    diffusion.to(DEVICE)

    def traffic(steps: int, progress: Callable[[], Any] | None = None) -> Traffic:
        how: dict[str, Any] = {
            "dtype": torch.float32,
            "cond_scale": 1.5,
            "guidance_interval": (0, 1),
            "sampler": sampler,
        }
        generators = [torch.Generator().manual_seed(i) for i in range(2)]
        with Traffic() as seen:
            sampling.sample_padded(diffusion, [0, 1], generators, sampling_timesteps=steps, progress=progress, **how)
        return seen

    few, many = traffic(4), traffic(8)
    assert few.waits.total() == many.waits.total() == 0
    more = many.to_device.total() - few.to_device.total()
    assert more == (4 if sampler == "ddpm" else 0)  # which draws new noise in each step
    one = torch.zeros((), device=DEVICE)
    assert traffic(4, lambda: one.item()).waits.total() == 4  # a wait that is put in is seen
