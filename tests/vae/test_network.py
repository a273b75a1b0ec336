"""The network of the KL-VAE: its arithmetic against independent implementations."""

import pytest
import torch
import torch.nn.functional as F
from closeness import IMAGES, LATENTS, assert_close
from tiny_vae import save_tiny_diffusers_vae, save_tiny_vae, tiny_vae

from gait_latents.vae.load import load_vae
from gait_latents.vae.network import KLVAE


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
