"""Does this VAE fit: the settings, the latents of a cache, the run that goes on, the model whose samples it decodes?

A VAE fits latents when its encoder makes latents of the same space (`Space`): the same encoder weights, architecture,
pixel range, image size and way of reading images. The decoder has no part in that. Every place that has a VAE and
latents from elsewhere asks here:

- `choose_space`: which space do the settings mean, with a VAE or without one?
- `check_vae_of_cache`: would this VAE encode what a cache lacks like the latents that are there?
- `check_vae_of_run`: are the latents of the settings those that a run which goes on was started with?
- `check_vae_of_model`: can this VAE decode what a trained model samples?
"""

from collections.abc import Mapping
from dataclasses import dataclass

from gait_latents.common.cli import is_explicit
from gait_latents.common.console import say
from gait_latents.common.errors import UserError
from gait_latents.images import reading
from gait_latents.latents.manifest import Manifest
from gait_latents.latents.space import Space
from gait_latents.settings import ImageSettings
from gait_latents.vae import load
from gait_latents.vae.base import VAEIdentity


@dataclass(frozen=True)
class ChosenSpace:
    """The space of the cache that the settings mean, and what is known about its VAE.

    Attributes:
        space: the space.
        scale_factor, shift_factor: the constants that the makers of the VAE gave it: latent = (z - shift) * scale.
        vae_at_hand: whether the VAE can be read here, so that missing images can be encoded.
    """

    space: Space
    scale_factor: float
    shift_factor: float
    vae_at_hand: bool


def choose_space(
    settings: ImageSettings, sources: Mapping[str, str], known: ChosenSpace | None, *, may_lack: bool
) -> ChosenSpace:
    """Derives the space from the VAE's encoder, or takes the known one when the VAE cannot be read.

    Args:
        settings: which VAE and which image size are meant.
        sources: where each setting comes from; a VAE of the command line or the config file was asked for.
        known: the space of the run that goes on, or of the cache's manifest; None where there is neither.
        may_lack: accept a missing VAE even if --vae_path was given, as a run that goes on does: its latents may all be
            cached. Otherwise only a VAE that nobody asked for may be missing.

    Raises:
        UserError: when a VAE that was asked for cannot be read, when there is neither a VAE nor a known space, or when
            the image size does not fit the VAE or the known space.
    """
    try:
        identity = load.read_identity(settings.vae_path)
    except UserError as error:
        if known is None or (is_explicit(sources, "vae_path") and not may_lack):
            raise
        say(f"no VAE at hand ({error}); taking the latents that the cache holds")
        return _without_vae(settings, known)
    _check_image_size(settings, identity)
    side = settings.image_size // identity.downsampling
    shape = (2 * identity.latent_channels, side, side)
    space = Space.of(identity.fingerprint, settings.image_size, reading.RECIPE, shape)
    if known is not None and known.space.id != space.id:
        say(
            f"this cache was made with another VAE or image size ({_what_differs(settings, space, known.space)}): its "
            "latents are left alone and the images are encoded again"
        )
    return ChosenSpace(space, identity.scale_factor, identity.shift_factor, vae_at_hand=True)


SETTINGS_OF_SPACE = ("vae_path", "image_size")  # which decide the space, and so which latents are used


def _what_differs(settings: ImageSettings, here: Space, there: Space) -> str:
    """Says in the names of settings why the settings mean another space than that of a cache."""
    found = []
    size, cached_size = here.spec["image_size"], there.spec["image_size"]
    if size != cached_size:
        found.append(f"--image_size {size}, the cache has {cached_size}")
    if here.spec["vae"] != there.spec["vae"]:
        found.append(f"--vae_path {settings.vae_path} has another encoder than the VAE of the cache")
    if here.spec["recipe"] != there.spec["recipe"]:
        found.append("this version reads images in another way")
    return "; ".join(found) or _differences(here, there)


def _check_image_size(settings: ImageSettings, identity: VAEIdentity) -> None:
    if settings.image_size % identity.downsampling == 0:
        return
    below = settings.image_size // identity.downsampling * identity.downsampling
    near = " or ".join(str(size) for size in (below, below + identity.downsampling) if size)
    raise UserError(
        f"--image_size {settings.image_size} is not a multiple of {identity.downsampling}, "
        f"the downsampling of {settings.vae_path}; take {near}"
    )


def _without_vae(settings: ImageSettings, known: ChosenSpace) -> ChosenSpace:
    """Returns the known space where the settings ask for images of its size."""
    size = known.space.spec["image_size"]
    if settings.image_size != size:
        raise UserError(
            f"--image_size is {settings.image_size}, but the cached latents are of images of {size}, and the VAE "
            f"{settings.vae_path} that could encode them again is not at hand"
        )
    return known


def space_of_manifest(manifest: Manifest) -> ChosenSpace:
    """Returns the space that the manifest of a cache names; raises UserError where it names no constants of the VAE."""
    scale, shift = (_factor(manifest.record.get(name)) for name in ("scale_factor", "shift_factor"))
    return ChosenSpace(manifest.space, scale, shift, vae_at_hand=False)


def _factor(value: object) -> float:
    # A bool is an int to Python, but none of these constants.
    if isinstance(value, int | float) and not isinstance(value, bool) and -1e30 < value < 1e30:
        return value
    raise UserError("the manifest of the cache names no scale_factor and shift_factor; run preprocess_latents.py")


def check_vae_of_cache(cached: Space, vae_path: str) -> None:
    """Raises UserError unless this VAE can be read and makes latents of the space of a cache."""
    space = _space_like(load.read_identity(vae_path), cached)
    if space.id != cached.id:
        raise UserError(
            f"{vae_path} makes other latents than those of the cache ({_differences(space, cached)}); give the VAE "
            "that the cache was made with"
        )


def check_vae_of_run(chosen: Space, of_run: Space, *, vae_path: str, run: str) -> None:
    """Raises UserError unless the space that the settings mean is that of the run that goes on.

    Args:
        chosen: the space that `choose_space` gave.
        of_run: the space that the checkpoint of the run names.
        vae_path: the VAE of the settings, for the message.
        run: the folder of the run, for the message.
    """
    if chosen.id != of_run.id:
        raise UserError(
            f"--vae_path {vae_path} makes other latents than the run in {run} was started with "
            f"({_differences(chosen, of_run)}); give the VAE of that run, or start another run with another "
            "--results_folder"
        )


def check_vae_of_model(trained: Space, vae_path: str | None) -> str:
    """Returns the path of a VAE that can decode the samples of a model.

    How images are read may have changed since the model was trained: that makes other latents of an image, and the
    model's samples are decoded as before. Of latents from another program nobody knows the VAE, and any with as many
    latent channels is taken.

    Args:
        trained: the space of the latents that the model was trained on.
        vae_path: the VAE; None where neither the command line nor the run names one.

    Raises:
        UserError: when there is none, it cannot be read, or its encoder did not make those latents.
    """
    if vae_path is None:
        raise UserError("--vae_path is needed: the checkpoint does not name a VAE")
    identity = load.read_identity(vae_path)
    if trained.is_imported:
        _check_channels(vae_path, identity.latent_channels, trained.moments_shape[0] // 2)
        return vae_path
    space = _space_like(identity, trained)
    if space.spec["vae"] != trained.spec["vae"]:
        raise UserError(
            f"--vae_path {vae_path} is not the VAE that the model was trained with: {_differences(space, trained)}"
        )
    return vae_path


def _check_channels(vae_path: str, decoded: int, given: int) -> None:
    if decoded != given:
        raise UserError(f"--vae_path {vae_path} decodes latents of {decoded} channels, and these have {given}")


def _space_like(identity: VAEIdentity, other: Space) -> Space:
    """Returns the space of latents of a VAE that are of images of the same size, and as large, as those of another."""
    return Space.of(identity.fingerprint, other.spec["image_size"], reading.RECIPE, other.moments_shape)


def _differences(here: Space, there: Space) -> str:
    return "; ".join(here.differing_fields(there))
