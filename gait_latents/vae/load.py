"""Finds the VAE that --vae_path names (a file, a folder, a hub id), reads its identity, and loads it."""

import re
import socket
import urllib.parse
import urllib.request
from contextlib import suppress
from pathlib import Path

import torch

from gait_latents.common import mounts
from gait_latents.common.errors import UserError
from gait_latents.vae.base import VAE, Parts, VAEIdentity, first_line
from gait_latents.vae.diffusers_vae import OTHER_WEIGHT_FILES, WEIGHT_FILES, identify_diffusers, load_diffusers
from gait_latents.vae.ldm_checkpoint import identify_checkpoint, load_checkpoint, open_checkpoint
from gait_latents.vae.weight_files import SUFFIXES

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+(/[\w-]+)?")


def _locate(path_or_id: str | Path) -> Path:
    """Returns the file or folder; one that a hub id names is downloaded first."""
    text = mounts.locate(str(path_or_id))
    path = Path(text)
    with suppress(RuntimeError):  # of a ~ that leads to no known home folder: then it is no path, and told below
        path = path.expanduser()
    if path.exists():
        return _inside(path)
    looks_like_file = path.suffix.lower() in SUFFIXES
    if looks_like_file or not HUB_ID.fullmatch(text):
        place = "" if path.is_absolute() else f" in {Path.cwd()}"
        remedy = mounts.why_missing("vae_path", text) or "give --vae_path a checkpoint, a folder or a hub id"
        raise UserError(f"the VAE {text} does not exist{place}; {remedy}")
    return _download(text)


def _inside(path: Path) -> Path:
    """Returns where the VAE lies that somebody names by a folder around it, or by the weights beside a config.json.

    The hub keeps a model as models--owner--name/snapshots/REVISION. Raises UserError where there are several revisions
    and none is the newest.
    """
    if path.name in (*WEIGHT_FILES, *OTHER_WEIGHT_FILES) and (path.parent / "config.json").exists():
        return path.parent
    snapshots = path if path.name == "snapshots" else path / "snapshots"
    if not snapshots.is_dir() or (path / "config.json").exists():
        return path
    revisions = sorted(folder for folder in snapshots.iterdir() if folder.is_dir())
    newest = snapshots.parent / "refs" / "main"
    if len(revisions) > 1 and newest.is_file():
        revisions = [folder for folder in revisions if folder.name == newest.read_text(errors="replace").strip()]
    if len(revisions) != 1:
        raise UserError(
            f"{snapshots} holds {len(revisions) or 'no'} revisions of a model; give the folder of one of them"
        )
    return revisions[0]


def _download(hub_id: str) -> Path:
    """Returns the local folder of "owner/name" or "owner/name/subfolder" on the Hugging Face hub."""
    try:
        from huggingface_hub import constants, hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError
    except ImportError as error:
        raise UserError(
            f"the VAE {hub_id} is no file or folder here; for the Hugging Face hub, pip install diffusers"
        ) from error
    owner, name, *subfolder = hub_id.split("/")
    # Without a network the hub's library would try again for half a minute, so it is told to look on the disk alone.
    is_online = _can_reach(constants.ENDPOINT)

    def fetch(file: str) -> Path:
        place = "/".join(subfolder) or None
        return Path(hf_hub_download(f"{owner}/{name}", file, subfolder=place, local_files_only=not is_online))

    try:
        folder = fetch("config.json").parent
        try:
            fetch(WEIGHT_FILES[0])
        except EntryNotFoundError:
            fetch(WEIGHT_FILES[1])
    except (EntryNotFoundError, OSError, ValueError) as error:
        reason = first_line(error) if is_online else f"{constants.ENDPOINT} cannot be reached"
        raise UserError(
            f"the VAE {hub_id} is no file or folder in {Path.cwd()}, and the Hugging Face hub did not give it: "
            f"{reason}; check --vae_path, or the network"
        ) from error
    return folder


def _can_reach(url: str) -> bool:
    """Says whether the host of a URL takes connections; where a proxy is set, it is taken to reach the host."""
    place = urllib.parse.urlsplit(url)
    if urllib.request.getproxies().get(place.scheme):
        return True
    try:
        with socket.create_connection((place.hostname, place.port or 443), timeout=5):
            return True
    except OSError:
        return False


def read_identity(path_or_id: str | Path, *, trust_pickle: bool = False) -> VAEIdentity:
    """Reads which latents the VAE of a file, folder or hub id makes, without building it.

    Args:
        path_or_id: as in `load_vae`.
        trust_pickle: as in `load_vae`.

    Raises:
        UserError: when there is no such VAE, or it cannot be used.
    """
    path = _locate(path_or_id)
    if path.is_dir():
        return identify_diffusers(path, ["encoder"], trust_pickle=trust_pickle)[0]
    found, network = open_checkpoint(path, ["encoder"], trust_pickle=trust_pickle)
    return identify_checkpoint(found, network)


def load_vae(
    path_or_id: str | Path,
    device: torch.device | str,
    *,
    parts: Parts = "both",
    memory_format: torch.memory_format = torch.contiguous_format,
    trust_pickle: bool = False,
) -> VAE:
    """Loads a VAE, or half of it: float32, in eval mode, without gradients.

    Args:
        path_or_id: a checkpoint file, a folder of diffusers, or "owner/name" or "owner/name/subfolder" on the Hugging
            Face hub, from which it is then downloaded.
        device: where to put it.
        parts: "both", "encoder" or "decoder". The half that is left out takes no memory and cannot be called.
        memory_format: how the weights lie in memory; torch.channels_last is faster on a CPU, and changes the rounding.
        trust_pickle: whether a file that is a pickle is opened by torch below 2.10, too, which has a hole there.

    Raises:
        UserError: when there is no such VAE, or it cannot be used.
    """
    path = _locate(path_or_id)
    load = load_diffusers if path.is_dir() else load_checkpoint
    vae = load(path, device, parts, trust_pickle=trust_pickle)
    return vae.to(memory_format=memory_format).eval().requires_grad_(False)  # pyright: ignore[reportCallIssue]
