"""A preview of a cache: a few latents are decoded and drawn below their images, to judge the VAE by.

What the VAE loses in this round trip no generated image can have, so the mean PSNR over these images is said, too.
"""

from pathlib import Path

import numpy as np
import torch

from gait_latents.common import pictures, shortage
from gait_latents.common.console import say, warn
from gait_latents.common.errors import UserError
from gait_latents.images import reading
from gait_latents.images.reading import BadImage
from gait_latents.images.split import Entry
from gait_latents.latents.dataset import LatentDataset
from gait_latents.settings import PreprocessSettings
from gait_latents.vae import load
from gait_latents.vae.formats import layout

_NUM_PREVIEWS = 6  # images decoded again for the PSNR and the picture
_LOW_PSNR_DB = 20  # below this mean PSNR the decoded images are visibly others than the images


def draw_preview(
    settings: PreprocessSettings,
    dataset: LatentDataset,
    entries: list[Entry],
    device: torch.device,
    path: Path,
    *,
    fresh: bool,
) -> None:
    """Decodes a few latents, draws them below their images, and says how close they are (PSNR in dB).

    Nothing happens where the images are not at hand. Where the VAE cannot be loaded or the picture cannot be written,
    this says so and goes on: the latents are good all the same.

    Args:
        settings: where the images and the VAE are.
        dataset: the cached latents.
        entries: the image of each position of the dataset.
        device: where to decode.
        path: the picture to write.
        fresh: draw again though there is a picture already, as after images were encoded.
    """
    if not fresh and path.exists():
        return
    lost = set(dataset.missing())
    present = [position for position in range(len(dataset)) if position not in lost]
    if not present:
        return
    chosen = [present[i] for i in np.linspace(0, len(present) - 1, min(_NUM_PREVIEWS, len(present))).astype(int)]
    say(f"preview         decoding {len(chosen)} latents, drawing {path.name}")
    pairs = [(i, image) for i in chosen if (image := _read_or_none(settings, entries[i])) is not None]
    if not pairs:
        return
    chosen = [i for i, _ in pairs]
    originals = [image for _, image in pairs]
    try:
        decoded = decode_means(dataset, chosen, settings.vae_path, device, trust_pickle=settings.trust_pickle)
    except (UserError, MemoryError, RuntimeError) as error:  # the latents are good all the same
        kind = shortage.kind_of(error)
        if kind is None and not isinstance(error, UserError):
            raise
        reason = f"{shortage.who_lacks_memory(kind)} has too little memory for the VAE decoder" if kind else error
        warn(f"no {path.name}: {reason}")
        return
    scores = [pictures.psnr(a, b) for a, b in zip(originals, decoded, strict=True)]
    names = [dataset.names[i].split("/")[0] for i in chosen]
    try:
        pictures.save_picture(
            pictures.labelled_grid([originals, decoded], ["image", "decoded"], names), path, below=path.parent
        )
        where = f"see {path}"
    except OSError as error:  # a cache may be checked where it is read-only
        where = f"{path.name} cannot be written ({error.strerror or error})"
    quality = f"PSNR {np.mean(scores):.1f} dB over {len(scores)} images (worst {min(scores):.1f})"
    say(f"round trip      {quality}; {where}")
    if np.mean(scores) < _LOW_PSNR_DB:
        say(
            "                that is low: generated images can be no better, so look at that picture; is it the "
            "VAE for these images and this image_size, trained long enough?"
        )


def _read_or_none(settings: PreprocessSettings, entry: Entry) -> np.ndarray | None:
    """Reads an image as uint8 [S S 3]; None where it cannot be used."""
    try:
        return reading.read_image(settings.data_path, entry, image_size=settings.image_size, resize=settings.resize)
    except BadImage:  # the image was removed or edited since, and its latent is still in the cache
        return None


@torch.inference_mode()
def decode_means(
    dataset: LatentDataset, positions: list[int], vae_path: str, device: torch.device, *, trust_pickle: bool
) -> list[np.ndarray]:
    """Decodes the posterior means at `positions`; returns uint8 images [S S 3]."""
    decoder = load.load_vae(vae_path, device, parts="decoder", memory_format=layout(device), trust_pickle=trust_pickle)
    moments = dataset.moments(torch.tensor(positions))
    means = moments[:, : moments.shape[1] // 2]
    return [image for mean in means for image in pictures.to_uint8(decoder.decode(mean[None]))]
