"""Does this VAE fit? To the settings, to the latents of a cache, and to the model that is to be decoded."""

from collections.abc import Mapping
from dataclasses import dataclass

from gait_latents.common.cli import is_explicit
from gait_latents.common.console import say
from gait_latents.common.errors import UserError
from gait_latents.images import reading
from gait_latents.images.reading import RECIPE
from gait_latents.latents.manifest import Manifest
from gait_latents.latents.space import Space
from gait_latents.settings import ImageSettings
from gait_latents.vae import base, load


def check_decodes(vae_path: str, identity: base.VAEIdentity, latent_channels: int) -> None:
    """Raises UserError unless the latents of the VAE at this path have so many channels."""
    found = identity.latent_channels
    if found != latent_channels:
        raise UserError(f"--vae_path {vae_path} decodes latents of {found} channels, and these have {latent_channels}")


@dataclass(frozen=True)
class ChosenSpace:
    """The space of the cache that the settings mean, and what is known about its VAE."""

    space: Space
    scale_factor: float
    shift_factor: float
    vae_at_hand: bool


def choose_space(
    settings: ImageSettings, sources: Mapping[str, str], known: ChosenSpace | None, *, may_lack: bool
) -> ChosenSpace:
    """Derives the space from the VAE's encoder, or takes the known one when there is no VAE.

    Args:
        known: the space of the run that goes on, or of the cache's manifest.
        may_lack: whether to go on without a VAE that was asked for, too.

    Raises:
        UserError: when a VAE that was asked for cannot be read, or there is neither a VAE nor a known space.
    """
    try:
        identity = load.read_identity(settings.vae_path)
    except UserError as error:
        if known is None or (is_explicit(sources, "vae_path") and not may_lack):
            raise
        say(f"no VAE at hand ({error}); taking the latents that the cache holds")
        return _without_vae(settings, known)
    if settings.image_size % identity.downsampling:
        below = settings.image_size // identity.downsampling * identity.downsampling
        near = " or ".join(str(size) for size in (below, below + identity.downsampling) if size)
        raise UserError(
            f"--image_size {settings.image_size} is not a multiple of {identity.downsampling}, "
            f"the downsampling of {settings.vae_path}; take {near}"
        )
    side = settings.image_size // identity.downsampling
    space = Space.of(
        identity.fingerprint, settings.image_size, reading.RECIPE, (2 * identity.latent_channels, side, side)
    )
    if known is not None and known.space.id != space.id:
        differences = "; ".join(space.differing_fields(known.space))
        say(f"the cache's last latents do not fit and will not be used: {differences}")
    return ChosenSpace(space, identity.scale_factor, identity.shift_factor, vae_at_hand=True)


def _without_vae(settings: ImageSettings, known: ChosenSpace) -> ChosenSpace:
    size = known.space.spec["image_size"]
    if settings.image_size != size:
        raise UserError(
            f"--image_size is {settings.image_size}, but the cached latents are of images of {size}, and the VAE "
            f"{settings.vae_path} that could encode them again is not at hand"
        )
    return known


def space_of_manifest(manifest: Manifest) -> ChosenSpace:
    """Returns the space that the manifest of a cache names."""
    scale, shift = (_factor(manifest.record.get(name)) for name in ("scale_factor", "shift_factor"))
    return ChosenSpace(manifest.space, scale, shift, vae_at_hand=False)


def _factor(value: object) -> float:
    if type(value) not in (int, float) or not -1e30 < value < 1e30:  # type: ignore[operator]
        raise UserError("the manifest of the cache names no scale_factor and shift_factor; run preprocess_latents.py")
    return value  # type: ignore[return-value]


def check_vae_of(known: Space, vae_path: str) -> None:
    """Raises UserError unless this VAE can be read and is the one that makes latents of a known space."""
    space = Space.of(
        load.read_identity(vae_path).fingerprint, known.spec["image_size"], reading.RECIPE, known.moments_shape
    )
    if space.id != known.id:
        differences = "; ".join(space.differing_fields(known))
        raise UserError(f"{vae_path} makes other latents than those of the cache ({differences}); give that one")


def checked_vae(vae_path: str | None, trained: Space) -> str:
    """Returns the path of the VAE; refuses one whose encoder did not make the latents that the model learnt."""
    if vae_path is None:
        raise UserError("--vae_path is needed: the checkpoint does not name a VAE")
    identity = load.read_identity(vae_path)
    if trained.is_imported:  # nobody knows which VAE made them
        check_decodes(vae_path, identity, trained.moments_shape[0] // 2)
        return vae_path
    space = Space.of(identity.fingerprint, trained.spec["image_size"], RECIPE, trained.moments_shape)
    if space.spec["vae"] != trained.spec["vae"]:
        raise UserError(
            f"--vae_path {vae_path} is not the VAE that the model was trained with: "
            + "; ".join(space.differing_fields(trained))
        )
    return vae_path
