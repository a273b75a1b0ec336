"""Checkpoints of the KL-VAE: their facts are read off the tensors, and every other kind of file is refused by name."""

import argparse
import collections
import hashlib
import json
import pathlib
import shlex
import struct
import subprocess
import sys

import numpy as np
import pytest
import torch
from closeness import IMAGES, LATENTS, assert_close
from safetensors.torch import save_file
from tiny_vae import save_tiny_diffusers_vae, save_tiny_vae, tiny_vae

from gait_latents.common.errors import UserError
from gait_latents.vae import base, weight_files
from gait_latents.vae.load import load_vae, read_identity

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


def with_half_an_attention(state):
    extra = {f"encoder.down.1.attn.0.{word}.weight": torch.rand(32, 32, 1, 1) for word in "qkv"}
    return {**state, **extra}


def without(*starts):
    return lambda state: {name: tensor for name, tensor in state.items() if not name.startswith(starts)}


def replaced(name, *shape):
    return lambda state: {**state, name: torch.rand(*shape)}


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (with_half_an_attention, r"encoder\.down\.1\.attn\.0\.norm\.weight .* is missing"),
        (without("quant_conv."), r"quant_conv\.weight .* is missing"),
        (without("encoder.mid.attn_1.q"), r"encoder\.mid\.attn_1\.q\.weight .* is missing"),
        (without("encoder.down"), r"widths 32, then \[\]"),
        (without("encoder."), r"has no tensor encoder\.conv_in\.weight; it has 70 others"),
        (replaced("encoder.conv_in.weight", 32, 1, 3, 3), r"conv_in\.weight is \(32, 1, 3, 3\), not \(32, 3, 3, 3\)"),
        (replaced("encoder.conv_in.weight", 48, 3, 3, 3), "multiples of 32"),
        (replaced("encoder.conv_in.weight", 48), r"is \(48,\), no convolution"),
        (replaced("quantize.embedding.weight", 8, 4), "vector-quantised"),
        (replaced("encoder.down_blocks.0.resnets.0.norm1.weight", 32), r"norm1\.weight \(32,\) has no place"),
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


@pytest.mark.parametrize(("version", "cve"), [("2.5.1+cu121", "CVE-2025-32434"), ("2.9.1", "CVE-2026-24747")])
def test_a_torch_with_a_hole_opens_no_pickle_unless_it_is_trusted(tmp_path, monkeypatch, version, cve):
    saved = save_tiny_vae(tmp_path / "vae.pt")
    save_tiny_vae(tmp_path / "vae.safetensors")
    monkeypatch.setattr(torch, "__version__", version)
    monkeypatch.setattr(weight_files, "SAFE_TORCH", (2, 10))  # whatever the torch of these tests is
    with pytest.raises(UserError, match=cve) as caught:
        read_identity(tmp_path / "vae.pt")
    assert "safetensors" in str(caught.value) and str(tmp_path / "vae.pt") in str(caught.value)
    read_identity(tmp_path / "vae.safetensors")
    if version.startswith("2.5"):  # there it runs code, so that trust is not asked for
        with pytest.raises(UserError, match=cve):
            load_vae(tmp_path / "vae.pt", "cpu", trust_pickle=True)
        return
    assert "--trust_pickle" in str(caught.value)
    assert read_identity(tmp_path / "vae.pt", trust_pickle=True) == saved.identity
    assert load_vae(tmp_path / "vae.pt", "cpu", trust_pickle=True).identity == saved.identity


@pytest.mark.slow
def test_the_command_that_converts_a_pickle_gives_the_same_vae(tmp_path):
    saved = save_tiny_vae(tmp_path / "vae.pt", wrapped=True)
    words = shlex.split(weight_files.CONVERT)
    subprocess.run([sys.executable, *words[1:]], cwd=tmp_path, check=True, timeout=120)
    assert words[0] == "python" and load_vae(tmp_path / "vae.safetensors", "cpu").fingerprint == saved.fingerprint
