"""The KL-VAE: its arithmetic against independent implementations, and what happens to every kind of file."""

import argparse
import collections
import hashlib
import json
import pathlib
import struct
import sys
import zipfile

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tiny_vae import save_tiny_diffusers_vae, save_tiny_vae, tiny_vae

from gait_latents.common.errors import UserError
from gait_latents.vae import base, diffusers_vae
from gait_latents.vae.load import load_vae, read_identity
from gait_latents.vae.network import KLVAE

IMAGES = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
LATENTS = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(2))


def assert_close(actual, expected, tolerance=1e-4):
    """Asserts equal shapes and a largest absolute difference below a tolerance times the largest value."""
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


def test_the_comparison_used_here_sees_a_difference():
    assert_close(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0]))
    with pytest.raises(AssertionError):
        assert_close(torch.tensor([2.0, 1.0]), torch.tensor([1.0, 2.0]))


# --- the network of family A -------------------------------------------------------------------------------


def plain_norm(x, state, name):
    groups = x.reshape(len(x), 32, -1)
    mean, variance = groups.mean(-1, keepdim=True), groups.var(-1, keepdim=True, unbiased=False)
    normed = ((groups - mean) / (variance + 1e-6).sqrt()).reshape(x.shape)
    return normed * state[f"{name}.weight"][:, None, None] + state[f"{name}.bias"][:, None, None]


def plain_conv(x, state, name, **how):
    return F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], **how)


def plain_block(x, state, name):
    h = plain_norm(x, state, f"{name}.norm1")
    h = plain_conv(h * torch.sigmoid(h), state, f"{name}.conv1", padding=1)
    h = plain_norm(h, state, f"{name}.norm2")
    h = plain_conv(h * torch.sigmoid(h), state, f"{name}.conv2", padding=1)
    if f"{name}.nin_shortcut.weight" in state:
        x = plain_conv(x, state, f"{name}.nin_shortcut")
    return x + h


def plain_attention(x, state, name):
    normed = plain_norm(x, state, f"{name}.norm")
    q, k, v = (plain_conv(normed, state, f"{name}.{word}").flatten(2) for word in "qkv")
    scores = torch.einsum("bci,bcj->bij", q, k) * x.shape[1] ** -0.5
    attended = torch.einsum("bij,bcj->bci", scores.softmax(dim=2), v).reshape(x.shape)
    return x + plain_conv(attended, state, f"{name}.proj_out")


def plain_middle(x, state, name):
    x = plain_block(x, state, f"{name}.block_1")
    return plain_block(plain_attention(x, state, f"{name}.attn_1"), state, f"{name}.block_2")


def plain_end(x, state, half):
    x = plain_norm(x, state, f"{half}.norm_out")
    return plain_conv(x * torch.sigmoid(x), state, f"{half}.conv_out", padding=1)


def plain_encode(images, state, *, num_levels, num_blocks):
    x = plain_conv(images, state, "encoder.conv_in", padding=1)
    for i in range(num_levels):
        for j in range(num_blocks):
            x = plain_block(x, state, f"encoder.down.{i}.block.{j}")
        if i < num_levels - 1:
            x = plain_conv(x, state, f"encoder.down.{i}.downsample", stride=2, padding=1)
    return plain_conv(plain_end(plain_middle(x, state, "encoder.mid"), state, "encoder"), state, "quant_conv")


def plain_decode(latents, state, *, num_levels, num_blocks):
    x = plain_conv(plain_conv(latents, state, "post_quant_conv"), state, "decoder.conv_in", padding=1)
    x = plain_middle(x, state, "decoder.mid")
    for i in reversed(range(num_levels)):
        for j in range(num_blocks + 1):
            x = plain_block(x, state, f"decoder.up.{i}.block.{j}")
        if i > 0:
            weight, bias = (state[f"decoder.up.{i}.upsample.{word}"] for word in ("weight", "bias"))
            x = F.conv_transpose2d(x, weight, bias, stride=2, padding=1)
    return plain_end(x, state, "decoder")


def test_channels_last_changes_only_rounding(tmp_path):
    save_tiny_vae(tmp_path / "vae.pt", multipliers=(1, 2))
    plain = load_vae(str(tmp_path / "vae.pt"), "cpu")
    turned = load_vae(str(tmp_path / "vae.pt"), "cpu", memory_format=torch.channels_last)
    assert not all(parameter.is_contiguous() for parameter in turned.parameters())
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    latents = plain.encode(images)[:, :4]
    assert torch.allclose(turned.encode(images), plain.encode(images), atol=1e-4)
    assert torch.allclose(turned.decode(latents), plain.decode(latents), atol=1e-4)


def test_default_width_has_the_known_size_and_shapes():
    with torch.device("meta"):
        network = KLVAE(
            width=128, multipliers=(1, 2, 2, 4), num_blocks=2, embed_dim=4, style="kl", scale_factor=0.18215
        )
        moments = network.encode(torch.rand(1, 3, 256, 256))
        images = network.decode(torch.rand(1, 4, 32, 32))
    assert network.num_parameters == 65_164_519
    assert (network.downsampling, network.latent_channels) == (8, 4)
    assert moments.shape == (1, 8, 32, 32)
    assert images.shape == (1, 3, 256, 256)
    assert "65.16 M parameters" in network.describe()


@pytest.mark.parametrize(
    ("multipliers", "num_blocks", "embed_dim", "z_channels"), [((1, 1), 1, 4, 4), ((2, 1, 3), 2, 3, 5)]
)
def test_kl_style_is_the_described_arithmetic(multipliers, num_blocks, embed_dim, z_channels):
    network = tiny_vae(multipliers=multipliers, num_blocks=num_blocks, embed_dim=embed_dim, z_channels=z_channels)
    state, depth = network.state_dict(), {"num_levels": len(multipliers), "num_blocks": num_blocks}
    assert_close(network.encode(IMAGES), plain_encode(IMAGES, state, **depth).clamp(max=20.0))
    latents = torch.randn(2, embed_dim, 4, 4, generator=torch.Generator().manual_seed(3))
    assert_close(network.decode_raw(latents), plain_decode(latents, state, **depth))
    assert torch.equal(network.decode(latents), network.decode_raw(latents).clamp(0, 1))


def as_diffusers_names(state, num_levels):
    """Returns an LDM state dict under the names of diffusers' AutoencoderKL."""
    renamed = {}
    for name, tensor in state.items():
        for old, new in (
            ("mid.block_1", "mid_block.resnets.0"),
            ("mid.block_2", "mid_block.resnets.1"),
            ("mid.attn_1.norm", "mid_block.attentions.0.group_norm"),
            ("mid.attn_1.proj_out", "mid_block.attentions.0.to_out.0"),
            ("mid.attn_1.", "mid_block.attentions.0.to_"),
            ("nin_shortcut", "conv_shortcut"),
            ("norm_out", "conv_norm_out"),
            (".block.", ".resnets."),
            ("downsample.", "downsamplers.0."),
            ("upsample.", "upsamplers.0."),
            *((f"up.{i}.", f"up_blocks.{num_levels - 1 - i}.") for i in range(num_levels)),
            ("down.", "down_blocks."),
        ):
            name = name.replace(old, new)
        renamed[name] = tensor.flatten(1) if ".to_" in name and tensor.ndim == 4 else tensor
    return renamed


def test_ldm_style_equals_diffusers_with_the_same_weights(tmp_path):
    network = tiny_vae(style="ldm", multipliers=(1, 2, 2), num_blocks=2)
    twin = save_tiny_diffusers_vae(
        tmp_path / "twin",
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 64, 64),
        layers_per_block=2,
    )
    twin.load_state_dict(as_diffusers_names(network.state_dict(), 3), strict=True)
    with torch.inference_mode():
        posterior = twin.encode(IMAGES * 2 - 1).latent_dist
        pixels = twin.decode(LATENTS).sample
    assert_close(network.encode(IMAGES), torch.cat([posterior.mean, posterior.logvar], dim=1))
    assert_close(network.decode_raw(LATENTS), (pixels + 1) / 2)


def test_log_variance_is_clamped_and_the_mean_is_not():
    network = tiny_vae()
    network.state_dict()["quant_conv.bias"][:] = torch.tensor([100.0, -100.0, 100.0, -100.0] * 2)
    mean, logvar = network.encode(IMAGES).chunk(2, dim=1)
    assert mean.max() > 20 and mean.min() < -30
    assert logvar.max() == 20 and logvar.min() == -30


def test_half_precision_weights_compute_in_half_and_return_float32():
    network = tiny_vae()
    moments, images = network.encode(IMAGES), network.decode(LATENTS)
    network.to(torch.bfloat16)
    assert network.encode(IMAGES).dtype == network.decode(LATENTS).dtype == torch.float32
    assert_close(network.encode(IMAGES), moments, tolerance=0.1)
    assert_close(network.decode(LATENTS), images, tolerance=0.2)


def test_gradients_flow_for_training_one():
    network = tiny_vae().requires_grad_(True)
    mean, logvar = network.encode(IMAGES).chunk(2, dim=1)
    (network.decode_raw(mean).square().mean() + logvar.square().mean()).backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


# --- checkpoints of family A -------------------------------------------------------------------------------


@pytest.mark.parametrize("style", ["kl", "ldm"])
@pytest.mark.parametrize("name", ["vae.pt", "vae.pth", "vae.safetensors"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_saved_vae_loads_with_its_facts_read_off_the_tensors(tmp_path, style, name, wrapped):
    saved = save_tiny_vae(
        tmp_path / name, style=style, wrapped=wrapped, multipliers=(2, 1, 2), embed_dim=3, z_channels=5,
        scale_factor=0.7,
    )  # fmt: skip
    loaded = load_vae(tmp_path / name, "cpu")
    assert (loaded.latent_channels, loaded.downsampling, loaded.shift_factor) == (3, 4, 0.0)
    assert loaded.scale_factor == (0.7 if wrapped else 0.18215)
    assert loaded.pixel_range == ((0.0, 1.0) if style == "kl" else (-1.0, 1.0))
    assert torch.equal(loaded.encode(IMAGES), saved.encode(IMAGES))
    assert torch.equal(loaded.decode(LATENTS[:, :3]), saved.decode(LATENTS[:, :3]))
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    assert loaded.fingerprint == saved.fingerprint == read_identity(str(tmp_path / name)).fingerprint


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: f"module.{name}",
        lambda name: f"_orig_mod.{name}",
        lambda name: f"module._orig_mod.{name}",
        lambda name: name.replace("encoder.", "encoder._orig_mod."),
        lambda name: f"vae.{name}",
    ],
)
@pytest.mark.parametrize("key", [None, "model_state_dict", "state_dict", "model", "vae", "something_else"])
def test_wrappers_around_names_and_dicts_are_taken_off(tmp_path, rename, key):
    network = tiny_vae()
    state = {rename(name): tensor for name, tensor in network.state_dict().items()}
    torch.save({"epoch": 1, key: state} if key else state, tmp_path / "vae.pt")
    assert load_vae(tmp_path / "vae.pt", "cpu").fingerprint == network.fingerprint


def test_the_named_state_wins_over_another_one_in_the_same_checkpoint(tmp_path):
    first, second = tiny_vae(seed=1), tiny_vae(seed=2)
    torch.save({"ema": second.state_dict(), "model_state_dict": first.state_dict()}, tmp_path / "vae.pt")
    assert load_vae(tmp_path / "vae.pt", "cpu").fingerprint == first.fingerprint


def test_a_full_latent_diffusion_checkpoint_yields_its_first_stage(tmp_path):
    network, other = tiny_vae(style="ldm", seed=1), tiny_vae(style="ldm", seed=2)
    state = {f"first_stage_model.{k}": v for k, v in network.state_dict().items()}
    state |= {f"cond_stage_model.{k}": v for k, v in other.state_dict().items()}
    state |= {
        "first_stage_model.loss.discriminator.main.0.weight": torch.full((4,), torch.nan),
        "first_stage_model.loss.logvar": torch.zeros(()),
        "model.diffusion_model.input_blocks.0.0.weight": torch.rand(4, 4, 3, 3),
        "model_ema.decay": torch.tensor(0.999),
        "scale_factor": torch.tensor(0.25),
        "betas": torch.rand(10),
    }
    torch.save({"state_dict": state, "global_step": 7}, tmp_path / "sd.ckpt")
    loaded = load_vae(tmp_path / "sd.ckpt", "cpu")
    assert loaded.fingerprint == network.fingerprint
    assert loaded.scale_factor == 0.25
    assert "ignored: loss" in loaded.describe()
    assert loaded.pixel_range == (-1.0, 1.0)


def test_half_precision_files_load_as_float32(tmp_path):
    network = tiny_vae()
    halves = {name: tensor.half() for name, tensor in network.state_dict().items()}
    save_file(halves, tmp_path / "vae.safetensors")
    loaded = load_vae(tmp_path / "vae.safetensors", "cpu")
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert_close(loaded.encode(IMAGES), network.encode(IMAGES), tolerance=0.02)
    assert loaded.fingerprint["weights"] == base.weights_digest(
        {k: v for k, v in halves.items() if k.startswith(("encoder.", "quant_conv."))}
    )


def test_inert_objects_of_a_training_checkpoint_do_no_harm(tmp_path):
    network = tiny_vae()
    counts = collections.defaultdict(list, a=[1, 2])
    checkpoint = {
        "model_state_dict": network.state_dict(),
        "scale_factor": np.float64(0.3),
        "best_loss": np.float32(1.5),
        "history": np.arange(6.0).reshape(2, 3),
        "dtype": np.dtype("int64"),
        "args": argparse.Namespace(lr=1e-4, data=pathlib.Path("images"), nested=argparse.Namespace(a=1)),
        "path": pathlib.PurePosixPath("a/b"),
        "windows": pathlib.PureWindowsPath("c:/b"),
        "counts": counts,
        "tallies": collections.defaultdict(int, a=1),
        "optimizer": torch.optim.Adam(torch.nn.Linear(2, 2).parameters()).state_dict(),
    }
    torch.save(checkpoint, tmp_path / "vae.pt")
    torch.save(checkpoint, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    allowed = torch.serialization.get_safe_globals()
    for name in ("vae.pt", "old.pt"):
        loaded = load_vae(tmp_path / name, "cpu")
        assert loaded.fingerprint == network.fingerprint
        assert loaded.scale_factor == 0.3
    assert torch.serialization.get_safe_globals() == allowed


@pytest.mark.parametrize("kind", ["float16", "float32", "float64", ">f8", "int32", "int64"])
def test_numpy_scale_factors_keep_their_value(tmp_path, kind):
    value = np.array(2, dtype=kind)[()]
    torch.save({"model": tiny_vae().state_dict(), "scale_factor": value}, tmp_path / "vae.pt")
    assert read_identity(tmp_path / "vae.pt").scale_factor == 2.0


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), "fast", None, [1], torch.ones(3)])
def test_a_senseless_scale_factor_is_refused(tmp_path, value):
    torch.save({"model": tiny_vae().state_dict(), "scale_factor": value}, tmp_path / "vae.pt")
    with pytest.raises(UserError, match=r"scale_factor is .*must be a number above 0"):
        read_identity(tmp_path / "vae.pt")


@pytest.mark.parametrize("name", ["vae.pt", "vae.safetensors", "folder"])
def test_a_loaded_vae_does_not_change_with_its_file(tmp_path, name):
    file = tmp_path / name
    if name == "folder":
        save_tiny_diffusers_vae(file)
        file = file / "diffusion_pytorch_model.safetensors"
    else:
        save_tiny_vae(file)
    loaded = load_vae(tmp_path / name, "cpu")
    moments, images = load_vae(tmp_path / name, "cpu").encode(IMAGES), loaded.decode(LATENTS)
    with file.open("r+b") as overwritten:
        overwritten.write(bytes(file.stat().st_size))
    assert torch.equal(loaded.encode(IMAGES), moments)
    assert torch.equal(loaded.decode(LATENTS), images)


# --- identity ----------------------------------------------------------------------------------------------


def test_the_fingerprint_is_of_the_encoder_alone(tmp_path):
    network = save_tiny_vae(tmp_path / "vae.pt", wrapped=True, scale_factor=0.5)
    identity = network.identity
    state = network.state_dict()  # shares its memory with the network
    for name in ("decoder.conv_out.weight", "post_quant_conv.weight"):
        state[name] += 1
        assert network.identity == identity
    for name in ("encoder.mid.attn_1.q.weight", "quant_conv.bias"):
        state[name].view(-1)[0] += 1e-3
        assert network.fingerprint["weights"] != identity.fingerprint["weights"]
        assert network.fingerprint["architecture"] == identity.fingerprint["architecture"]
    assert json.loads(json.dumps(identity.fingerprint)) == identity.fingerprint
    assert (identity.scale_factor, identity.latent_channels, identity.downsampling) == (0.5, 4, 2)


def test_the_weights_digest_is_a_hash_of_names_shapes_and_float32_bytes():
    tensors = {"b": torch.tensor([1.5], dtype=torch.float16), "a": torch.tensor([[1.0, 2.0]]).T}
    text = b'["a", [2, 1]]\n' + struct.pack("<2f", 1.0, 2.0) + b'["b", [1]]\n' + struct.pack("<f", 1.5)
    assert base.weights_digest(tensors) == hashlib.sha256(text).hexdigest()


def test_the_same_weights_in_another_style_are_another_space(tmp_path):
    kl, ldm = (tiny_vae(style=style, multipliers=(1,)) for style in ("kl", "ldm"))
    assert kl.fingerprint["weights"] == ldm.fingerprint["weights"]
    assert kl.fingerprint["architecture"] != ldm.fingerprint["architecture"]
    assert kl.fingerprint["pixel_range"] != ldm.fingerprint["pixel_range"]


def test_half_a_vae_has_the_identity_of_the_whole(tmp_path):
    whole = save_tiny_vae(tmp_path / "vae.pt")
    encoder, decoder = (load_vae(tmp_path / "vae.pt", "cpu", parts=half) for half in ("encoder", "decoder"))
    assert encoder.identity == decoder.identity == whole.identity == read_identity(tmp_path / "vae.pt")
    assert encoder.num_parameters + decoder.num_parameters == whole.num_parameters
    assert torch.equal(encoder.encode(IMAGES), whole.encode(IMAGES))
    assert torch.equal(decoder.decode(LATENTS), whole.decode(LATENTS))
    with pytest.raises(RuntimeError, match="loaded without its decoder"):
        encoder.decode(LATENTS)
    with pytest.raises(RuntimeError, match="loaded without its encoder"):
        decoder.encode(IMAGES)


def test_an_encoder_alone_in_a_file_is_enough_to_encode(tmp_path):
    whole = tiny_vae()
    half = {k: v for k, v in whole.state_dict().items() if k.startswith(("encoder", "quant_conv"))}
    torch.save(half, tmp_path / "encoder.pt")
    loaded = load_vae(tmp_path / "encoder.pt", "cpu", parts="encoder")
    assert torch.equal(loaded.encode(IMAGES), whole.encode(IMAGES))
    with pytest.raises(UserError, match=r"encoder.pt holds no decoder of a KL-VAE"):
        load_vae(tmp_path / "encoder.pt", "cpu")


# --- files that are no such VAE ----------------------------------------------------------------------------


def with_attention_on_another_level(state):
    extra = {f"encoder.down.1.attn.0.{word}.weight": torch.rand(32, 32, 1, 1) for word in "qkv"}
    return {**state, **extra}


def without(*starts):
    return lambda state: {name: tensor for name, tensor in state.items() if not name.startswith(starts)}


def replaced(name, *shape):
    return lambda state: {**state, name: torch.rand(*shape)}


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (with_attention_on_another_level, r"encoder\.down\.1\.attn\.0\.q\.weight .* has no place"),
        (without("quant_conv."), r"quant_conv\.weight .* is missing"),
        (without("encoder.mid.attn_1.q"), r"encoder\.mid\.attn_1\.q\.weight .* is missing"),
        (without("encoder.down"), r"widths 32, then \[\]"),
        (without("encoder."), r"has no tensor encoder\.conv_in\.weight; it has 70 others"),
        (replaced("encoder.conv_in.weight", 32, 1, 3, 3), r"conv_in\.weight is \(32, 1, 3, 3\), not \(32, 3, 3, 3\)"),
        (replaced("encoder.conv_in.weight", 48, 3, 3, 3), "multiples of 32"),
        (replaced("encoder.conv_in.weight", 48), r"is \(48,\), no convolution"),
        (replaced("quantize.embedding.weight", 8, 4), "vector-quantised"),
        (replaced("encoder.down_blocks.0.resnets.0.norm1.weight", 32), "from diffusers; give the folder"),
        (replaced("decoder.up.1.upsample.conv.weight", 32, 32, 3, 3), "has no place"),
    ],
)
def test_another_architecture_is_named_by_its_first_odd_tensor(tmp_path, change, complaint):
    torch.save(change(tiny_vae().state_dict()), tmp_path / "vae.pt")
    with pytest.raises(UserError, match=complaint):
        load_vae(tmp_path / "vae.pt", "cpu")


@pytest.mark.parametrize("content", [[1, 2], {}, {"weights": [1]}, torch.rand(3), {1: torch.rand(2)}])
def test_a_checkpoint_of_something_else_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "vae.pt")
    with pytest.raises(UserError, match="is not a KL-VAE"):
        load_vae(tmp_path / "vae.pt", "cpu")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["vae.pt", "vae.safetensors"])
def test_weights_that_are_not_finite_are_named(tmp_path, value, name):
    state = tiny_vae().state_dict()
    state["encoder.mid.block_1.conv1.bias"][3] = value
    (save_file if name.endswith("safetensors") else torch.save)(state, tmp_path / name)
    for reader in (read_identity, lambda path: load_vae(path, "cpu", parts="decoder")):
        with pytest.raises(UserError, match=r"encoder\.mid\.block_1\.conv1\.bias has values that are not finite"):
            reader(tmp_path / name)


def test_integer_and_sparse_weights_are_refused(tmp_path):
    state = tiny_vae().state_dict()
    for tensor, complaint in (
        (torch.ones(32, 3, 3, 3, dtype=torch.int8), "torch.int8, not floating-point"),
        (torch.ones(32, 3, 3, 3).to_sparse(), "not a plain tensor"),
        ("text", "not a plain tensor"),
    ):
        torch.save({**state, "encoder.conv_in.weight": tensor}, tmp_path / "vae.pt")
        with pytest.raises(UserError, match=f"encoder.conv_in.weight (holds|is) {complaint}"):
            load_vae(tmp_path / "vae.pt", "cpu")


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull"),
        (b"<!DOCTYPE html><html>Sign in</html>", "a web page"),
        (b"\x93NUMPY\x01\x00" + bytes(200), "neither a PyTorch checkpoint nor"),
        (b"\x89PNG\r\n\x1a\n" + bytes(200), "neither a PyTorch checkpoint nor"),
        (b"PK\x03\x04" + bytes(200), "damaged or truncated"),
        (b"\x80\x02" + bytes(200), "cannot be read as a PyTorch checkpoint"),
        (b"\x80\x02}q\x00.", "cannot be read as a PyTorch checkpoint"),
    ],
)
def test_a_file_that_is_no_checkpoint_is_told_for_what_it_is(tmp_path, content, complaint):
    (tmp_path / "vae.pt").write_bytes(content)
    with pytest.raises(UserError, match=complaint):
        read_identity(tmp_path / "vae.pt")


def test_a_missing_file_is_an_error_that_names_it(tmp_path):
    for path in (tmp_path / "kl_vae_best.pt", "models/kl_vae_best.pt", "kl_vae_best", "./a/b"):
        with pytest.raises(UserError, match=f"{path} does not exist"):
            load_vae(path, "cpu")


def test_a_file_with_the_wrong_ending_is_told_to_be_renamed(tmp_path):
    save_tiny_vae(tmp_path / "vae.pt")
    save_tiny_vae(tmp_path / "vae.safetensors")
    (tmp_path / "vae.pt").rename(tmp_path / "pickle.safetensors")
    (tmp_path / "vae.safetensors").rename(tmp_path / "tensors.pt")
    with pytest.raises(UserError, match=r"holds a PyTorch pickle; rename it to end in \.pt"):
        load_vae(tmp_path / "pickle.safetensors", "cpu")
    with pytest.raises(UserError, match=r"holds safetensors but is named \.pt; rename it"):
        load_vae(tmp_path / "tensors.pt", "cpu")


@pytest.mark.parametrize("name", ["vae.pt", "vae.safetensors", "legacy.pt"])
def test_truncated_files_are_refused_wherever_they_end(tmp_path, name):
    if name == "legacy.pt":
        torch.save(tiny_vae().state_dict(), tmp_path / name, _use_new_zipfile_serialization=False)
    else:
        save_tiny_vae(tmp_path / name)
    whole = (tmp_path / name).read_bytes()
    ends = [1, 7, 8, 9, 63, 64, 100, 1000, len(whole) // 3, len(whole) // 2, len(whole) - 1000, len(whole) - 1]
    for end in ends:
        (tmp_path / name).write_bytes(whole[:end])
        with pytest.raises(UserError, match=name):
            load_vae(tmp_path / name, "cpu")
    assert len(ends) == 12


def test_names_from_a_file_are_shown_without_control_characters(tmp_path):
    torch.save({**tiny_vae().state_dict(), "encoder.\x1b[2J\n": torch.rand(2)}, tmp_path / "vae.pt")
    with pytest.raises(UserError, match=r"encoder\.\\x1b\[2J\\n \(2,\) has no place") as caught:
        load_vae(tmp_path / "vae.pt", "cpu")
    assert str(caught.value).isprintable()


# --- pickles ------------------------------------------------------------------------------------------------


def test_a_whole_pickled_model_is_refused_by_its_class(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "model.pt")
    with pytest.raises(UserError, match=r"holds torch\.nn\.modules\.linear\.Linear, which is no weight"):
        load_vae(tmp_path / "model.pt", "cpu")


@pytest.mark.parametrize(("version", "outcome"), [("2.5.1+cu121", UserError), ("2.9.1", UserWarning)])
def test_an_old_torch_does_not_open_foreign_pickles_quietly(tmp_path, monkeypatch, version, outcome):
    save_tiny_vae(tmp_path / "vae.pt")
    save_tiny_vae(tmp_path / "vae.safetensors")
    monkeypatch.setattr(torch, "__version__", version)
    with pytest.raises(outcome, match="CVE-202"):
        read_identity(tmp_path / "vae.pt")
    read_identity(tmp_path / "vae.safetensors")


# --- family B: diffusers -----------------------------------------------------------------------------------


def test_a_diffusers_folder_encodes_and_decodes_as_diffusers_does(tmp_path):
    model = save_tiny_diffusers_vae(tmp_path / "vae", scaling_factor=0.3, shift_factor=0.1)
    loaded = load_vae(tmp_path / "vae", "cpu")
    with torch.inference_mode():
        posterior = model.encode(IMAGES * 2 - 1).latent_dist
        pixels = model.decode(LATENTS).sample
        assert_close(loaded.encode(IMAGES), torch.cat([posterior.mean, posterior.logvar], dim=1), 1e-6)
        assert_close(loaded.decode(LATENTS), (pixels / 2 + 0.5).clamp(0, 1), 1e-6)
    assert (loaded.latent_channels, loaded.downsampling) == (4, 2)
    assert (loaded.scale_factor, loaded.shift_factor) == (0.3, 0.1)
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    assert "AutoencoderKL" in loaded.describe()


def test_half_a_diffusers_vae_has_the_identity_of_the_whole(tmp_path):
    model = save_tiny_diffusers_vae(tmp_path / "vae", use_post_quant_conv=False)
    encoder, decoder = (load_vae(tmp_path / "vae", "cpu", parts=half) for half in ("encoder", "decoder"))
    assert encoder.identity == decoder.identity == read_identity(tmp_path / "vae")
    assert encoder.num_parameters + decoder.num_parameters == sum(p.numel() for p in model.parameters())
    assert encoder.encode(IMAGES).shape == (2, 8, 8, 8)
    assert decoder.decode(LATENTS).shape == (2, 3, 16, 16)
    with pytest.raises(RuntimeError, match="loaded without its decoder"):
        encoder.decode(LATENTS)
    with pytest.raises(RuntimeError, match="loaded without its encoder"):
        decoder.encode(IMAGES)


def load_copy(file):
    """Returns the tensors of a safetensors file that is about to be overwritten."""
    return {name: tensor.clone() for name, tensor in load_file(file).items()}


def edit_config(folder, **changes):
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


def test_the_identity_of_a_diffusers_vae_is_of_its_encoder(tmp_path):
    save_tiny_diffusers_vae(tmp_path / "vae")
    identity = read_identity(tmp_path / "vae")
    file = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    state = load_copy(file)
    save_file({**state, "decoder.conv_in.bias": state["decoder.conv_in.bias"] + 1}, file)
    edit_config(tmp_path / "vae", force_upcast=..., mid_block_add_attention=..., _diffusers_version="0.4.2")
    assert read_identity(tmp_path / "vae") == identity
    edit_config(tmp_path / "vae", scaling_factor=0.5)
    changed = read_identity(tmp_path / "vae")
    assert changed.fingerprint == identity.fingerprint and changed.scale_factor == 0.5
    edit_config(tmp_path / "vae", act_fn="relu")
    assert read_identity(tmp_path / "vae").fingerprint != identity.fingerprint
    edit_config(tmp_path / "vae", act_fn="silu")
    save_file({**state, "quant_conv.bias": state["quant_conv.bias"] + 1}, file)
    assert read_identity(tmp_path / "vae").fingerprint != identity.fingerprint


def test_an_old_config_without_a_scaling_factor_means_the_usual_one(tmp_path):
    save_tiny_diffusers_vae(tmp_path / "vae", scaling_factor=0.5)
    edit_config(tmp_path / "vae", scaling_factor=...)
    assert load_vae(tmp_path / "vae", "cpu").scale_factor == 0.18215


def test_old_names_of_attention_layers_are_the_same_vae(tmp_path):
    save_tiny_diffusers_vae(tmp_path / "vae")
    new = load_vae(tmp_path / "vae", "cpu")
    file = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    old_names = {"to_q.": "query.", "to_k.": "key.", "to_v.": "value.", "to_out.0.": "proj_attn."}
    state = load_copy(file)
    for new_name, old_name in old_names.items():
        state = {name.replace(new_name, old_name): tensor for name, tensor in state.items()}
    assert "encoder.mid_block.attentions.0.proj_attn.weight" in state
    save_file(state, file, {"format": "pt"})
    old = load_vae(tmp_path / "vae", "cpu")
    assert old.identity == new.identity
    assert torch.equal(old.encode(IMAGES), new.encode(IMAGES))


def test_a_folder_with_only_the_half_precision_variant_loads_as_float32(tmp_path):
    model = save_tiny_diffusers_vae(tmp_path / "whole")
    model.half().save_pretrained(tmp_path / "half", variant="fp16")
    loaded = load_vae(tmp_path / "half", "cpu")
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert_close(loaded.encode(IMAGES), load_vae(tmp_path / "whole", "cpu").encode(IMAGES), 0.02)


def tiny_of(class_name):
    diffusers = pytest.importorskip("diffusers")

    two, three = ("DownEncoderBlock2D",) * 2, ("UpDecoderBlock2D",) * 2
    both = {"down_block_types": two, "up_block_types": three}
    settings = {
        "AutoencoderKL": {**both, "block_out_channels": (32, 32)},
        "AutoencoderKLFlux2": {**both, "block_out_channels": (32, 32), "latent_channels": 8},
        "AsymmetricAutoencoderKL": {
            **both, "down_block_out_channels": (32, 32), "up_block_out_channels": (32, 64), "latent_channels": 4,
        },
        "AutoencoderKLHunyuanImage": {
            "in_channels": 3, "out_channels": 3, "latent_channels": 8, "block_out_channels": (32, 32, 32),
            "layers_per_block": 1, "spatial_compression_ratio": 4, "sample_size": 16,
        },
        "AutoencoderKLKVAE": {"channels": 32, "z_channels": 4, "ch_mult": (1, 2)},
    }  # fmt: skip
    return getattr(diffusers, class_name)(**settings[class_name]).eval()


@pytest.mark.parametrize("class_name", sorted(diffusers_vae.DIFFUSERS_CLASSES))
def test_every_accepted_class_agrees_with_itself_and_with_what_is_said_of_it(tmp_path, class_name):
    torch.manual_seed(0)
    model = tiny_of(class_name)
    model.save_pretrained(tmp_path / "vae")
    loaded = load_vae(tmp_path / "vae", "cpu")
    channels, side = loaded.latent_channels, 16 // loaded.downsampling
    with torch.inference_mode():
        posterior = model.encode(IMAGES * 2 - 1).latent_dist
        moments = loaded.encode(IMAGES)
        assert moments.shape == (2, 2 * channels, side, side)
        assert_close(moments, torch.cat([posterior.mean, posterior.logvar], dim=1), 1e-6)
        latents = moments[:, :channels]
        assert_close(loaded.decode_raw(latents), model.decode(latents).sample / 2 + 0.5, 1e-6)


@pytest.mark.parametrize(
    "class_name",
    ["AutoencoderTiny", "VQModel", "AutoencoderDC", "AutoencoderKLTemporalDecoder", "AutoencoderKLWan", None],
)
def test_classes_without_a_posterior_for_images_are_refused_by_name(tmp_path, class_name):
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": class_name}))
    with pytest.raises(UserError, match=class_name or "model of unknown class"):
        load_vae(tmp_path, "cpu")


def test_folders_that_are_no_diffusers_model_say_what_to_give(tmp_path):
    def complaint():
        with pytest.raises(UserError, match=r"without config\.json") as caught:
            read_identity(tmp_path)
        return str(caught.value)

    assert complaint().endswith("not a diffusers model")
    (tmp_path / "state-00000500.safetensors").touch()
    save_tiny_vae(tmp_path / "kl_vae_best.pt")
    (tmp_path / "state-00001000.safetensors").touch()
    (tmp_path / "a_state.txt").touch()
    assert complaint().endswith(f"such as {tmp_path / 'kl_vae_best.pt'}")
    save_tiny_diffusers_vae(tmp_path / "vae")
    assert complaint().endswith(f"but {tmp_path / 'vae'} has one: give that")
    with zipfile.ZipFile(tmp_path / "kl_vae_best.pt") as archive:
        archive.extractall(tmp_path / "unpacked")
    with pytest.raises(UserError, match=r"an unpacked \.pt file"):
        read_identity(next((tmp_path / "unpacked").iterdir()))


def test_broken_diffusers_folders_are_told_in_one_line(tmp_path):
    save_tiny_diffusers_vae(tmp_path / "vae")
    file = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    state, whole = load_copy(file), file.read_bytes()

    def complains(pattern):
        with pytest.raises(UserError, match=pattern) as caught:
            load_vae(tmp_path / "vae", "cpu")
        assert "\n" not in str(caught.value)

    file.write_bytes(whole[:-100])
    complains("damaged or truncated")
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    complains("git lfs pull")
    save_file({**state, "encoder.conv_in.bias": torch.full((32,), torch.nan)}, file)
    complains("encoder.conv_in.bias has values that are not finite")
    save_file({name: t for name, t in state.items() if name != "decoder.conv_in.bias"}, file, {"format": "pt"})
    complains("lacks 1 weights of its model, such as decoder.conv_in.bias")
    save_file({**state, "encoder.conv_in.bias": torch.zeros(7)}, file, {"format": "pt"})
    complains("cannot be built by diffusers")
    file.unlink()
    complains("has no diffusion_pytorch_model.safetensors")
    edit_config(tmp_path / "vae", in_channels=1)
    complains("not for images of 3 channels")
    edit_config(tmp_path / "vae", latent_channels=...)
    complains("does not say how its AutoencoderKL is built: 'latent_channels'")
    (tmp_path / "vae" / "config.json").write_text("{")
    complains("config.json cannot be read")


def test_without_diffusers_the_error_says_what_to_install(tmp_path, monkeypatch):
    save_tiny_diffusers_vae(tmp_path / "vae")
    monkeypatch.setitem(sys.modules, "diffusers", None)
    identity = read_identity(tmp_path / "vae")
    assert identity.latent_channels == 4  # a cache that is complete needs no diffusers
    with pytest.raises(UserError, match="pip install diffusers"):
        load_vae(tmp_path / "vae", "cpu")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match="pip install diffusers"):
        load_vae("stabilityai/sd-vae-ft-mse", "cpu")


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """A local cache of the Hugging Face hub that may not use the network."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_a_hub_id_is_served_from_the_local_hub_cache(hub_cache):
    for subfolder in ("", "vae"):
        repo = hub_cache / f"models--someone--tiny{subfolder}"
        model = save_tiny_diffusers_vae(repo / "snapshots" / ("a" * 40) / subfolder)
        (repo / "refs").mkdir()
        (repo / "refs" / "main").write_text("a" * 40)
        loaded = load_vae(f"someone/tiny{subfolder}" + f"/{subfolder}" * bool(subfolder), "cpu")
        with torch.inference_mode():
            assert_close(loaded.encode(IMAGES)[:, :4], model.encode(IMAGES * 2 - 1).latent_dist.mean, 1e-6)


def test_a_failed_download_names_the_id(hub_cache):
    with pytest.raises(UserError, match=r"someone/absent is no file or folder in .*, and the Hugging Face hub did"):
        read_identity("someone/absent")
