"""VAEs of diffusers, from a folder or the hub: they encode as diffusers does, and what is no such VAE is explained."""

import json
import sys
import zipfile

import pytest
import torch
from closeness import IMAGES, LATENTS, assert_close
from safetensors.torch import load_file, save_file
from tiny_vae import save_tiny_diffusers_vae, save_tiny_vae

from gait_latents.common.errors import UserError
from gait_latents.vae import diffusers_vae
from gait_latents.vae.load import load_vae, read_identity


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


def test_a_config_with_the_mark_of_windows_is_the_same_vae(tmp_path):
    save_tiny_diffusers_vae(tmp_path / "vae")
    before, config = load_vae(tmp_path / "vae", "cpu"), tmp_path / "vae" / "config.json"
    config.write_bytes(b"\xef\xbb\xbf" + config.read_bytes().replace(b"\n", b"\r\n"))
    after = load_vae(tmp_path / "vae", "cpu")
    assert after.identity == before.identity and torch.equal(after.encode(IMAGES), before.encode(IMAGES))


@pytest.mark.parametrize("saving", [{"max_shard_size": "40KB"}, {"safe_serialization": False}, {"variant": "bf16"}])
def test_weights_in_shards_in_a_pickle_or_of_a_variant_are_the_same_vae(tmp_path, saving):
    model = save_tiny_diffusers_vae(tmp_path / "whole")
    model.save_pretrained(tmp_path / "vae", **saving)
    before, after = load_vae(tmp_path / "whole", "cpu"), load_vae(tmp_path / "vae", "cpu")
    assert not (tmp_path / "vae" / "diffusion_pytorch_model.safetensors").exists()
    assert after.identity == before.identity and torch.equal(after.encode(IMAGES), before.encode(IMAGES))
    assert torch.equal(after.decode(LATENTS), before.decode(LATENTS))


def test_a_damaged_index_of_shards_is_told(tmp_path):
    model = save_tiny_diffusers_vae(tmp_path / "vae")
    (tmp_path / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    model.save_pretrained(tmp_path / "vae", max_shard_size="40KB")
    index = tmp_path / "vae" / "diffusion_pytorch_model.safetensors.index.json"
    next(index.parent.glob("*-00001-of-*.safetensors")).unlink()
    with pytest.raises(UserError, match=r"names diffusion_pytorch_model-00001-of-\d+\.safetensors, which is not there"):
        read_identity(tmp_path / "vae")
    for content in ("{", "[]", '{"weight_map": {"a": "../b.safetensors"}}', '{"weight_map": {"a": 1}}'):
        index.write_text(content)
        with pytest.raises(UserError, match=r"index\.json cannot be read"):
            read_identity(tmp_path / "vae")


def test_normalisation_by_channel_in_a_config_is_told_as_not_used(tmp_path):
    save_tiny_diffusers_vae(tmp_path / "vae", latents_mean=[0.5] * 4, latents_std=[2.0] * 4)
    assert read_identity(tmp_path / "vae").describe().endswith("not used: its latents_mean and latents_std")


def test_a_config_that_names_no_scaling_factor_is_told_as_assumed(tmp_path):
    save_tiny_diffusers_vae(tmp_path / "vae", scaling_factor=0.18215)
    assert "assumed" not in read_identity(tmp_path / "vae").describe()
    edit_config(tmp_path / "vae", scaling_factor=...)
    assert "scale_factor 0.18215 (assumed" in read_identity(tmp_path / "vae").describe()


def test_the_root_of_a_model_in_the_hub_cache_is_its_only_or_newest_revision(tmp_path):
    root = tmp_path / "models--x--y"
    save_tiny_diffusers_vae(root / "snapshots" / "abc")
    first = read_identity(root / "snapshots" / "abc")
    assert read_identity(root) == read_identity(root / "snapshots") == first
    save_tiny_diffusers_vae(root / "snapshots" / "def", seed=1)
    with pytest.raises(UserError, match="holds 2 revisions of a model; give the folder of one of them"):
        read_identity(root)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("def")
    assert read_identity(root) == read_identity(root / "snapshots" / "def") != first


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
    if not hasattr(diffusers, class_name):
        pytest.skip(f"diffusers {diffusers.__version__} has no {class_name}")
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
    complains("lacks 1 weights of its model, such as decoder.conv_in.bias|following keys are missing")  # old diffusers
    save_file({**state, "encoder.conv_in.bias": torch.zeros(7)}, file, {"format": "pt"})
    complains(r"config\.json does not describe the weights beside it: encoder\.conv_in\.bias is \(7,\), not \(32,\)")
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
