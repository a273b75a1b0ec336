"""The features that FID is usually computed with: the 2048 averages of InceptionV3, as pytorch-fid has them.

The network is that of the package pytorch-fid, which the diffusion library brings along. Its weights come from a
local file, or from its usual address when asked for.
"""

import urllib.error
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from gait_latents.common import mounts
from gait_latents.common.errors import UserError, let_shortage_pass
from gait_latents.settings import DOWNLOAD
from gait_latents.vae import weight_files

NUM_FEATURES = 2048
_BATCH_SIZE = 16


def find_weights(path_or_word: str) -> Path:
    """Returns where the weights lie; the word "download" fetches them, once, into torch's folder of checkpoints.

    Raises:
        UserError: when the file does not exist, or the download fails.
    """
    if path_or_word != DOWNLOAD:
        path = Path(path_or_word)
        if not path.is_file():
            missing = mounts.why_missing("inception_weights", path)
            remedy = missing or f"give a file, or {DOWNLOAD} to fetch {_address()}"
            raise UserError(f"--inception_weights {path} does not exist; {remedy}")
        return path
    path = Path(torch.hub.get_dir()) / "checkpoints" / _address().rpartition("/")[2]
    return path if path.is_file() else _download(path)


def _address() -> str:
    return _package().FID_WEIGHTS_URL


def _package() -> ModuleType:
    try:
        import pytorch_fid.inception
    except ImportError as error:
        raise UserError(
            f"--inception_weights needs the package pytorch-fid ({error}); pip install pytorch-fid"
        ) from error
    return pytorch_fid.inception


def _download(path: Path) -> Path:
    digest = path.stem.rpartition("-")[2]  # torch's way to name a file after the start of its SHA-256
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(_address(), str(path), hash_prefix=digest, progress=False)
    except (urllib.error.URLError, OSError, RuntimeError) as error:
        reason = weight_files.printable((str(error).splitlines() or [type(error).__name__])[0])
        raise UserError(
            f"{_address()} could not be fetched ({reason}); download it elsewhere and give the file as "
            "--inception_weights"
        ) from error
    return path


def load_network(path: Path, device: torch.device, *, trust_pickle: bool = False) -> nn.Module:
    """Builds the network with the weights in a file, in eval mode.

    Args:
        path: the file.
        device: where to put it.
        trust_pickle: as in `load_vae`.

    Raises:
        UserError: when the file does not hold the weights of this network.
    """
    state = weight_files.read_weights(path, trust_pickle=trust_pickle).tree
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise UserError(f"{path} holds no state dict of InceptionV3")
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    try:
        network = _build(_package(), tensors)
    except RuntimeError as error:
        let_shortage_pass(error)
        raise UserError(
            f"{path} does not hold the weights of pytorch-fid's InceptionV3 ({' '.join(str(error).split())[:150]})"
        ) from error
    weight_files.check_finite(path, {name: value for name, value in tensors.items() if value.is_floating_point()})
    return network.to(device).eval()


def _build(package: Any, tensors: dict[str, Tensor]) -> nn.Module:
    """Builds the network; the package always downloads weights, so its download is replaced meanwhile by `tensors`."""
    theirs, package.load_state_dict_from_url = package.load_state_dict_from_url, lambda *_, **__: tensors
    try:
        return package.InceptionV3()
    finally:
        package.load_state_dict_from_url = theirs


@torch.inference_mode()
def features(network: nn.Module, images: Tensor, *, advance: Callable[[int], None] = lambda count: None) -> Tensor:
    """Returns the features [N 2048] float32, on the CPU, of images uint8 [N S S 3].

    The network resizes them to 299 x 299, bilinearly, as pytorch-fid does.

    Args:
        advance: called after each batch with the number of images in it; what it raises ends the work.
    """
    device = next(network.parameters()).device
    found = []
    for part in images.split(_BATCH_SIZE):
        pixels = part.to(device).permute(0, 3, 1, 2).float() / 255  # B 3 S S
        found.append(network(pixels)[0].flatten(1).cpu())  # B 2048
        advance(len(part))
    return torch.cat(found)
