"""The random draws: functions of (seed, step) alone, and of no other state."""

import hashlib
from dataclasses import fields

import pytest
import torch
from device_traffic import DEVICE, Traffic
from properties import given, settings, st

from gait_latents.common.seeds import draw_positions, sample_generator
from gait_latents.training.draws import DeviceDraws, DrawsAhead, StepDraws, draw_step, packed, unpacked

SHAPE = (4, 8, 8)
NAMES = [field.name for field in fields(StepDraws)]


def draw(step: int, *, seed: int = 42, batch: int = 16, size: int = 100, cond_drop_prob: float = 0.5) -> StepDraws:
    return draw_step(
        seed,
        step,
        batch=batch,
        size=size,
        latent_shape=SHAPE,
        timesteps=1000,
        cond_drop_prob=cond_drop_prob,
        largest_shift=2,
    )


def same(one: StepDraws, other: StepDraws) -> list[bool]:
    return [torch.equal(getattr(one, name), getattr(other, name)) for name in NAMES]


def test_shapes_types_and_ranges():
    draws = draw(3)
    assert draws.positions.shape == draws.times.shape == draws.cond_keep_mask.shape == (16,)
    assert draws.positions.dtype == draws.times.dtype == torch.int64
    assert draws.cond_keep_mask.dtype == torch.bool
    assert draws.noise.shape == draws.posterior_noise.shape == (16, *SHAPE)
    assert draws.noise.dtype == draws.posterior_noise.dtype == torch.float32
    assert draws.positions.min() >= 0 and draws.positions.max() < 100
    assert draws.times.min() >= 0 and draws.times.max() < 1000


def test_shifts_are_even_and_change_nothing_else():
    facts = {"batch": 2000, "size": 100, "latent_shape": (1, 2, 2), "timesteps": 10, "cond_drop_prob": 0.5}
    moved, still = draw_step(42, 3, **facts, largest_shift=2), draw_step(42, 3, **facts)
    counts = torch.bincount(moved.shifts + 2, minlength=5)
    assert len(counts) == 5 and counts.min() > 300 and not still.shifts.any()
    others = [name for name in NAMES if name != "shifts"]
    assert all(torch.equal(getattr(moved, name), getattr(still, name)) for name in others)


def test_another_default_dtype_changes_nothing():
    expected = draw(3)
    torch.set_default_dtype(torch.float64)
    try:
        assert all(same(draw(3), expected))
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("micro", [2, 8, 16])
def test_micro_batches_together_are_the_effective_batch(micro):
    whole = draw(7)
    parts = [whole.slice(start, start + micro) for start in range(0, 16, micro)]
    joined = StepDraws(*(torch.cat([getattr(part, name) for part in parts]) for name in NAMES))
    assert all(same(joined, whole))


def test_a_step_does_not_depend_on_the_steps_before():
    first = draw(5)
    for step in (0, 99, 4):
        draw(step)
    assert all(same(draw(5), first))


def test_steps_and_seeds_differ():
    assert not any(same(draw(5), draw(6)))
    assert not any(same(draw(5), draw(5, seed=43)))


def test_the_two_noises_are_not_one():
    draws = draw(0, batch=64)
    correlation = (draws.noise * draws.posterior_noise).mean().abs()
    assert correlation < 4 / draws.noise.numel() ** 0.5


def test_the_global_generator_is_left_alone():
    before = torch.get_rng_state()
    draw(1)
    draw_positions(1, 0, 5, 100)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(123)
    other = draw(1)
    torch.manual_seed(321)
    assert all(same(draw(1), other))


def test_noise_is_unit_normal_and_times_are_uniform():
    steps = [draw(step, batch=64) for step in range(40)]
    noise = torch.stack([each.noise for each in steps])
    assert abs(noise.mean().item()) < 4 / noise.numel() ** 0.5
    assert noise.std().item() == pytest.approx(1, abs=4 / (2 * noise.numel()) ** 0.5)
    counts = torch.histc(torch.cat([each.times for each in steps]).float(), bins=10, min=0, max=1000)
    assert (counts - 256).abs().max() < 4 * 256**0.5


@pytest.mark.parametrize("cond_drop_prob", [0.1, 0.5, 0.9])
def test_the_condition_is_kept_with_the_rest_of_the_drop_probability(cond_drop_prob):
    kept = torch.cat([draw(step, batch=256, cond_drop_prob=cond_drop_prob).cond_keep_mask for step in range(16)])
    spread = (cond_drop_prob * (1 - cond_drop_prob) / len(kept)) ** 0.5
    assert kept.double().mean().item() == pytest.approx(1 - cond_drop_prob, abs=4 * spread)


def test_without_dropout_every_condition_is_kept_and_with_full_dropout_none():
    assert draw(0, cond_drop_prob=0.0).cond_keep_mask.all()
    assert not draw(0, cond_drop_prob=1.0).cond_keep_mask.any()


def test_every_epoch_visits_every_item_once_and_steps_cross_the_seam():
    size, batch, epochs = 50, 16, 8
    chain = torch.cat([draw(step, batch=batch, size=size).positions for step in range(size * epochs // batch)])
    orders = chain.reshape(epochs, size)
    for order in orders:
        assert order.sort().values.tolist() == list(range(size))
    assert len({tuple(order.tolist()) for order in orders}) == epochs


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 40), st.integers(0, 300), st.integers(0, 120), st.integers(0, 120))
def test_any_stretch_of_the_order_is_the_same_stretch(size, start, first, second):
    whole = draw_positions(3, start, first + second, size)
    assert whole.dtype == torch.int64
    assert (
        whole.tolist()
        == draw_positions(3, start, first, size).tolist() + draw_positions(3, start + first, second, size).tolist()
    )


def test_the_order_is_the_documented_one():
    permutation = torch.randperm(30, generator=sample_generator(9, "order", 2))
    assert torch.equal(draw_positions(9, 60, 30, 30), permutation)


def test_changing_what_was_returned_does_not_change_the_order():
    first = draw_positions(1, 0, 10, 10)
    expected = first.clone()
    first.zero_()
    assert torch.equal(draw_positions(1, 0, 10, 10), expected)


def test_an_empty_data_set_has_no_order():
    with pytest.raises(ValueError, match="empty"):
        draw_positions(1, 0, 1, 0)


def test_a_step_of_a_large_data_set_does_not_permute_it_again(monkeypatch):
    calls, randperm = [], torch.randperm

    def counting(*args, **kwargs):
        calls.append(args)
        return randperm(*args, **kwargs)

    monkeypatch.setattr(torch, "randperm", counting)
    for step in range(20):
        draw(step, seed=77, size=200_000)
    assert len(calls) == 1


def test_streams_of_labels_are_distinct_and_repeatable():
    labels = [("a", 1), ("a", 2), ("b", 1), ("a",), ("a", 0), ("a", "1"), ("ab", "c"), ("a", "bc"), (1, "a"), (), (0,)]
    noises = [torch.randn(8, generator=sample_generator(5, *each)) for each in labels]
    assert len({tuple(noise.tolist()) for noise in noises}) == len(labels)
    again = [torch.randn(8, generator=sample_generator(5, *each)) for each in labels]
    assert all(torch.equal(one, other) for one, other in zip(noises, again, strict=True))
    assert not torch.equal(noises[0], torch.randn(8, generator=sample_generator(6, *labels[0])))


def test_numbers_never_share_the_32_bits_that_torch_seeds_with():
    generators = [sample_generator(42, "ID_7", index) for index in range(20_000)]
    assert len({generator.initial_seed() % 2**32 for generator in generators}) == len(generators)


def test_neighbouring_numbers_give_unrelated_noise():
    noise = torch.stack([torch.randn(4096, generator=sample_generator(0, "ID_1", index)) for index in range(200)])
    noise = noise.double() / noise.double().norm(dim=1, keepdim=True)
    correlations = noise @ noise.T - torch.eye(200, dtype=torch.float64)
    assert correlations.abs().max() * 64 < 6  # in standard deviations


def test_the_seed_of_a_stream_is_pinned():
    digest = hashlib.sha256(b'[42, "ID_7", null]').digest()
    expected = (int.from_bytes(digest[:8], "little") + 12) % 2**63
    assert sample_generator(42, "ID_7", 12).initial_seed() == expected


def test_draws_go_to_a_device_in_one_copy_with_the_same_bits():
    draws = draw(3, batch=5)  # 5 bools and 5 rows: nothing ends where the next may begin
    tensors = draws.tensors()
    buffer = packed(tensors)
    found = unpacked(buffer, tensors)
    assert all(torch.equal(one, other) and one.dtype == other.dtype for one, other in zip(found, tensors, strict=True))
    assert {one.untyped_storage().data_ptr() for one in found} == {buffer.untyped_storage().data_ptr()}
    with Traffic() as traffic:
        sent = DeviceDraws(DEVICE).send(draws, buffer)
    assert traffic.to_device.total() == 1 and sent.noise.shape == draws.noise.shape
    assert {one.device.type for one in sent.tensors()} == {"meta"} and sent.host_positions is draws.host_positions


def test_draws_of_all_steps_lie_in_the_same_memory_of_a_device():
    device, places = DeviceDraws(torch.device("cpu")), set()
    for step in range(4):
        draws = draw(step)
        sent = device.send(draws, packed(draws.tensors()))
        assert all(same(sent, draws))
        places.add(tuple(tensor.data_ptr() for tensor in sent.tensors()))
    assert len(places) == 1


def test_draws_that_are_made_ahead_are_those_of_their_step_wherever_one_begins():
    ahead = DrawsAhead(draw, slice(4, 12), pinned=False)
    for step in (7, 8, 9, 10, 11, 3, 4, 100, 5, 5):  # in a row, back, far away, and once more
        whole, own, buffer = ahead.of(step)
        expected = draw(step)
        assert all(same(whole, expected)) and all(same(own, expected.slice(4, 12)))
        assert all(map(torch.equal, unpacked(buffer, own.tensors()), own.tensors()))


def test_what_fails_while_draws_are_made_ahead_is_raised_where_they_are_wanted():
    def fails_at_two(step: int) -> StepDraws:
        if step == 2:
            raise MemoryError
        return draw(step)

    ahead = DrawsAhead(fails_at_two, slice(0, 16), pinned=False)
    ahead.of(0)
    ahead.of(1)
    with pytest.raises(MemoryError):
        ahead.of(2)
