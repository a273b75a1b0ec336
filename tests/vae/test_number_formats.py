"""The number formats and memory layouts of a VAE: what a GPU would convert, seen on a device without values."""

from collections import Counter
from typing import Any

import pytest
import torch
from device_traffic import DEVICE
from tiny_vae import tiny_vae
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from gait_latents.vae.base import VAE
from gait_latents.vae.batch_encoder import BatchEncoder
from gait_latents.vae.formats import Formats, layout

CPU = torch.device("cpu")
OF_ATTENTION = 5  # of the one in the middle, which a GPU computes by a kernel of its own


class Conversions(TorchDispatchMode):
    """Within the block, counts tensors that are turned into another number format, and inputs of convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.casts = 0
        self.inputs: Counter[tuple[torch.dtype, bool]] = Counter()  # dtype, and whether the channels come first

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ == "_to_copy":
            self.casts += result.dtype != args[0].dtype
        if func.overloadpacket.__name__ == "convolution":
            tensors = [t for t in pytree.tree_leaves(args[:2]) if isinstance(t, Tensor)]
            self.inputs[tensors[0].dtype, all(t.is_contiguous() for t in tensors)] += 1
        return result


def encoded_on(device: torch.device, dtype: torch.dtype) -> Conversions:
    encoder = BatchEncoder(
        lambda: tiny_vae().to(device=device, memory_format=layout(device)),  # pyright: ignore[reportCallIssue]
        device=device,
        batch_size=2,
        dtype=dtype,
    )
    pixels = torch.zeros(2, 3, 16, 16, device=device)
    encoder._formats = Formats(encoder.load(), device)
    with encoder._formats.at(dtype):
        pass  # the copy of the weights is made once
    with Conversions() as seen:
        encoder._encode(pixels, dtype)
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_on_a_gpu_a_network_converts_at_its_ends_alone_and_no_convolution_turns_its_input(dtype: torch.dtype) -> None:
    seen = encoded_on(DEVICE, dtype)
    assert seen.casts == (0 if dtype == torch.float32 else 2 + OF_ATTENTION)
    turned = seen.inputs.pop((dtype, False))
    assert turned == 1 and set(seen.inputs) == {(dtype, True)} and seen.inputs.total() > 8  # what attention gives


def test_autocast_converts_at_each_layer() -> None:
    assert encoded_on(CPU, torch.bfloat16).casts > 20


def test_on_a_cpu_the_channels_come_last() -> None:
    assert layout(CPU) == torch.channels_last and layout(DEVICE) == torch.contiguous_format


def test_weights_in_a_number_format_give_what_autocast_gives_within_its_rounding() -> None:
    vae, images = tiny_vae(), torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    exact = vae.encode(images)
    formats = Formats(vae, CPU)
    formats.device = DEVICE  # as on a GPU, but with values
    with formats.at(torch.bfloat16) as reduced, torch.no_grad():
        found = reduced.encode(images)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        usual = vae.encode(images)
    assert found.dtype == usual.dtype == torch.float32 and isinstance(reduced, VAE)
    assert vae.dtype == torch.float32  # the copy is another object
    assert 0 < (found - exact).abs().max() < 2 * (usual - exact).abs().max()


@pytest.mark.parametrize(
    ("image_size", "expected"), [(64, [6, 6]), (256, [6, 6]), (264, [3, 3, 3]), (512, [2] * 4), (4096, [1] * 7)]
)
def test_larger_images_are_encoded_fewer_at_once(
    image_size: int, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many pixels as there are in the calls of six images of 256x256, where one image has no more by itself."""
    encoder, sizes = BatchEncoder(tiny_vae, device=DEVICE, batch_size=6, dtype=torch.float32), []

    def noted(images: Tensor, size: int) -> Tensor:
        sizes.append(size)
        return torch.zeros(len(images), 8, 1, 1)

    monkeypatch.setattr(encoder, "_encode_padded", noted)
    assert encoder(torch.zeros(7, image_size, image_size, 3, dtype=torch.uint8)).shape[0] == 7
    assert sizes == expected
