"""Does this VAE fit: the settings, the latents of a cache, the run that goes on, the model whose samples it decodes?

A VAE fits latents when its encoder makes latents of the same space (`Space`): the same encoder weights, architecture,
pixel range, image size and way of reading images. The decoder has no part in that. Every place that has a VAE and
latents from elsewhere asks here:

- `choose_space`: which space do the settings mean, with a VAE or without one?
- `check_vae_of_cache`: would this VAE encode what a cache lacks like the latents that are there?
- `check_vae_of_run`: are the latents of the settings those that a run which goes on was started with?
- `check_vae_of_weights`: do the weights that a new run begins with know latents of this VAE?
- `check_vae_of_model`: can this VAE decode what a trained model samples?
- `doubt_of_factors`: do the constants of the VAE bring its latents to about unit variance?
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from gait_latents.common.cli import is_explicit
from gait_latents.common.console import say, show_name
from gait_latents.common.errors import UserError
from gait_latents.images import reading
from gait_latents.latents.manifest import Manifest
from gait_latents.latents.space import Space
from gait_latents.settings import ImageSettings
from gait_latents.vae import load
from gait_latents.vae.base import VAEIdentity, describe_factors
from gait_latents.vae.norm import spread


@dataclass(frozen=True)
class ChosenSpace:
    """The space of the cache that the settings mean, and what is known about its VAE.

    Attributes:
        space: the space.
        scale_factor, shift_factor: latent = (z - shift) * scale, by the settings or as the makers of the VAE say.
        vae_at_hand: whether the VAE can be read here, so that missing images can be encoded.
        factors_are_assumed: whether neither the settings nor the VAE's file name a scale factor.
    """

    space: Space
    scale_factor: float
    shift_factor: float
    vae_at_hand: bool
    factors_are_assumed: bool = field(default=False, compare=False)


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
        identity = load.read_identity(settings.vae_path, trust_pickle=settings.trust_pickle)
    except UserError as error:
        if known is None or (is_explicit(sources, "vae_path") and not may_lack):
            raise
        say(f"no VAE at hand ({error}); taking the latents that the cache holds")
        return _without_vae(settings, known)
    identity = replace(
        identity,
        **_given_factors(settings),
        factors_are_assumed=identity.factors_are_assumed and settings.scale_factor is None,
    )
    say_vae(settings.vae_path, identity)
    _check_image_size(settings, identity)
    side = settings.image_size // identity.downsampling
    shape = (2 * identity.latent_channels, side, side)
    space = Space.of(identity.fingerprint, settings.image_size, reading.recipe(settings.resize), shape)
    if known is not None and known.space.id != space.id:
        say(
            f"this cache was made with another VAE, image_size or resize "
            f"({_what_differs(settings, space, known.space)}): its "
            "latents are left alone and the images are encoded again"
        )
    return ChosenSpace(
        space,
        identity.scale_factor,
        identity.shift_factor,
        vae_at_hand=True,
        factors_are_assumed=identity.factors_are_assumed,
    )


def _given_factors(settings: ImageSettings) -> dict[str, float]:
    """Returns the scale factor and the shift factor of the settings, those that are given."""
    given = {name: getattr(settings, name) for name in ("scale_factor", "shift_factor")}
    return {name: value for name, value in given.items() if value is not None}


def say_vae(vae_path: str, identity: VAEIdentity) -> None:
    """Says in one line how the file of a VAE was understood."""
    say(f"VAE {show_name(Path(vae_path).name)}: {identity.describe()}")


SETTINGS_OF_SPACE = ("vae_path", "image_size", "resize")  # which decide the space, and so which latents are used


def _what_differs(settings: ImageSettings, here: Space, there: Space) -> str:
    """Says in the names of settings why the settings mean another space than that of a cache."""
    found = []
    size, cached_size = here.spec["image_size"], there.spec["image_size"]
    if size != cached_size:
        found.append(f"--image_size {size}, the cache has {cached_size}")
    if here.spec["vae"] != there.spec["vae"]:
        found.append(f"--vae_path {settings.vae_path} has another encoder than the VAE of the cache")
    resize, cached_resize = (reading.resize_of(space.spec["recipe"]) for space in (here, there))
    if here.spec["recipe"] != there.spec["recipe"]:
        is_known = resize != cached_resize and cached_resize is not None
        found.append(
            f"--resize {resize}, the cache has {cached_resize}"
            if is_known
            else "this version reads images in another way"
        )
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
    """Returns the known space where the settings ask for images of its size, made square in its way."""
    size, resize = known.space.spec["image_size"], reading.resize_of(known.space.spec["recipe"])
    asked = f"--image_size is {settings.image_size}", f"of {size}"
    if settings.image_size == size:
        asked = f"--resize is {settings.resize}", f"read with {resize}"
    if settings.image_size != size or resize not in (None, settings.resize):
        raise UserError(
            f"{asked[0]}, but the cached latents are of images {asked[1]}, and the VAE {settings.vae_path} that could "
            "encode them again is not at hand"
        )
    return replace(known, **_given_factors(settings))


def space_of_manifest(manifest: Manifest) -> ChosenSpace:
    """Returns the space that the manifest of a cache names; raises UserError where it names no constants of the VAE."""
    scale, shift = (_factor(manifest.record.get(name)) for name in ("scale_factor", "shift_factor"))
    return ChosenSpace(manifest.space, scale, shift, vae_at_hand=False)


def _factor(value: object) -> float:
    # A bool is an int to Python, but none of these constants.
    if isinstance(value, int | float) and not isinstance(value, bool) and -1e30 < value < 1e30:
        return value
    raise UserError("the manifest of the cache names no scale_factor and shift_factor; run preprocess_latents.py")


def check_vae_of_cache(cached: Space, vae_path: str, *, trust_pickle: bool) -> VAEIdentity:
    """Returns the identity of a VAE; raises UserError unless it makes latents of the space of a cache."""
    identity = load.read_identity(vae_path, trust_pickle=trust_pickle)
    space = _space_like(identity, cached, reading.recipe(reading.resize_of(cached.spec["recipe"]) or "crop"))
    if space.id != cached.id:
        raise UserError(
            f"{vae_path} makes other latents than those of the cache ({_differences(space, cached)}); give the VAE "
            "that the cache was made with"
        )
    return identity


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


def check_vae_of_weights(chosen: Space, of_weights: Space, *, vae_path: str, place: str) -> None:
    """Raises UserError unless weights know such latents as a new run is to be trained on.

    How images are read may differ: that makes other latents of an image, but not another kind.

    Args:
        chosen: the space that `choose_space` gave.
        of_weights: the space of the latents that the weights were trained on.
        vae_path: the VAE of the settings, for the message.
        place: where the weights come from, for the message.
    """
    if any(chosen.spec[name] != of_weights.spec[name] for name in ("vae", "image_size", "moments_shape")):
        raise UserError(
            f"--vae_path {vae_path} makes other latents than those that the run in --init_from {place} was trained on "
            f"({_differences(chosen, of_weights)}); give the VAE of that run, or leave --init_from out"
        )


def check_vae_of_model(trained: Space, vae_path: str | None, *, trust_pickle: bool) -> str:
    """Returns the path of a VAE that can decode the samples of a model.

    How images are read may have changed since the model was trained: that makes other latents of an image, and the
    model's samples are decoded as before. Of latents from another program nobody knows the VAE, and any with as many
    latent channels is taken.

    Args:
        trained: the space of the latents that the model was trained on.
        vae_path: the VAE; None where neither the command line nor the run names one.
        trust_pickle: as in `load.load_vae`.

    Raises:
        UserError: when there is none, it cannot be read, or its encoder did not make those latents.
    """
    if vae_path is None:
        raise UserError("--vae_path is needed: the checkpoint does not name a VAE")
    identity = load.read_identity(vae_path, trust_pickle=trust_pickle)
    say_vae(vae_path, identity)
    if trained.is_imported:
        _check_channels(vae_path, identity.latent_channels, trained.moments_shape[0] // 2)
        return vae_path
    space = _space_like(identity, trained, trained.spec["recipe"])
    if space.spec["vae"] != trained.spec["vae"]:
        raise UserError(
            f"--vae_path {vae_path} is not the VAE that the model was trained with: {_differences(space, trained)}"
        )
    return vae_path


def _check_channels(vae_path: str, decoded: int, given: int) -> None:
    if decoded != given:
        raise UserError(f"--vae_path {vae_path} decodes latents of {decoded} channels, and these have {given}")


def _space_like(identity: VAEIdentity, other: Space, recipe: Mapping) -> Space:
    """Returns the space of latents of a VAE that are of images of the same size, and as large, as those of another."""
    return Space.of(identity.fingerprint, other.spec["image_size"], recipe, other.moments_shape)


def _differences(here: Space, there: Space) -> str:
    return "; ".join(here.differing_fields(there))


def doubt_of_factors(moments: Tensor, chosen: ChosenSpace) -> str:
    """Says so where latents have a spread far from 1 after the constants of their VAE; else returns an empty text.

    Args:
        moments: [N 2C h w] of some images.
        chosen: the constants.
    """
    unscaled = spread(moments)
    scaled = unscaled * chosen.scale_factor
    if not (math.isfinite(scaled) and unscaled > 0) or _USUAL_SPREAD[0] <= scaled <= _USUAL_SPREAD[1]:
        return ""
    factors = describe_factors(chosen.scale_factor, chosen.shift_factor, are_assumed=chosen.factors_are_assumed)
    return (
        f"the latents have a standard deviation of {scaled:.2g} after {factors}, and it should be about 1: "
        f"--scale_factor {1 / unscaled:.4g} makes it so"
    )


_USUAL_SPREAD = (0.5, 2.0)  # between these, the noise of every timestep is about as strong as it is meant to be
