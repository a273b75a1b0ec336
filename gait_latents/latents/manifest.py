"""The manifest of a cache: the settings that made it, as defaults for later runs, and its space."""

import difflib
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gait_latents.common import files, json_text
from gait_latents.common.cli import Layers, same_path
from gait_latents.common.console import say, show_name
from gait_latents.common.errors import UserError
from gait_latents.common.layout import MANIFEST_NAME
from gait_latents.latents.space import FORMAT, Space

_LARGEST_MANIFEST_BYTES = 16 << 20


@dataclass(frozen=True)
class Manifest:
    """What made a cache last.

    Attributes:
        space: the space whose latents are there.
        settings: the settings by name, which later runs take as defaults.
        record: facts: the VAE's "scale_factor" and "shift_factor", and the number of "images".
    """

    space: Space
    settings: dict
    record: dict


def write_manifest(folder: str | os.PathLike[str], settings: dict, space: Space, record: dict) -> None:
    """Publishes manifest.json as readable JSON that ends in the SHA-256 of the rest; raises OSError."""
    body = {
        "format": FORMAT,
        "space": space.id,
        "spec": space.spec,
        "settings": settings,
        "record": record,
    }
    document = {**body, "sha256": hashlib.sha256(json_text.canonical(body).encode()).hexdigest()}
    text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False)
    # Paths that are not UTF-8 hold surrogates, which only this error handler writes and json.loads reads.
    files.publish(Path(folder) / MANIFEST_NAME, text.encode("utf-8", "surrogatepass") + b"\n")


def read_manifest(folder: str | os.PathLike[str]) -> Manifest | None:
    """Reads manifest.json; None when there is none.

    Raises:
        UserError: when it is damaged or was edited, cannot be read, or has another format number.
    """
    path = Path(folder) / MANIFEST_NAME
    try:
        document = json_text.parse(files.read_whole(path, at_most=_LARGEST_MANIFEST_BYTES))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError:
        document = None
    seal = document.pop("sha256", None) if isinstance(document, dict) else None
    if not isinstance(document, dict) or "format" not in document:
        raise UserError(_damage(path))
    if document["format"] != FORMAT:
        raise UserError(
            f"{path} has format {str(document['format'])[:20]}, and this version reads {FORMAT}; "
            "use the version that made it, or another cache folder"
        )
    try:
        sealed = hashlib.sha256(json_text.canonical(document).encode()).hexdigest() == seal
    except (ValueError, RecursionError):
        sealed = False
    if not sealed:
        raise UserError(_damage(path))
    settings, record = document.get("settings"), document.get("record")
    if not isinstance(settings, dict) or not isinstance(record, dict):
        raise UserError(_damage(path, "it has no settings"))
    try:
        return Manifest(Space.from_stored(document.get("spec")), settings, record)
    except ValueError as error:
        raise UserError(_damage(path, str(error))) from None


def _damage(path: Path, what: str = "its content does not match its checksum") -> str:
    return (
        f"{path} is damaged or was edited: {what}; remove it and run preprocess_latents.py again (the images encoded "
        "so far are kept)"
    )


def defaults_of(manifest: Manifest | None, layers: Layers) -> dict[str, Any]:
    """Returns the settings with which a cache was made, for a layer of defaults.

    The constants of its VAE are left out where another VAE is given: they are none of that one.
    """
    # A cache of an earlier version has no validation images, and goes on without.
    stored = {} if manifest is None else {"validation_per_user": 0, "split_start": 0.0, **manifest.settings}
    if layers.gives("vae_path") and not same_path(layers.settings.vae_path, stored.get("vae_path")):
        for name in ("scale_factor", "shift_factor"):
            stored.pop(name, None)
    return stored


def tell_new_cache(folder: str | Path) -> None:
    """Says so where a folder holds no cache yet, and which cache beside it may be meant: its name may be mistyped."""
    holds_one = (Path(folder) / MANIFEST_NAME).exists() or any(Path(folder).glob("*/*.safetensors"))
    if not holds_one:
        guess = did_you_mean(folder, only_alike=True)
        say(f"no cache in {folder} yet, so a new one is made{guess and f'; {guess}'}")


def did_you_mean(folder: str | Path, *, only_alike: bool = False) -> str:
    """Returns a question that names the cache beside a folder whose name is most like it; an empty text without one.

    Args:
        folder: where there is no cache.
        only_alike: leave out names that are no likely mistyping of this one, as a new cache may well have another.
    """
    place = Path(folder).absolute()
    try:
        others = [path.parent.name for path in sorted(place.parent.glob(f"*/{MANIFEST_NAME}")) if path.parent != place]
    except OSError:  # what is beside it cannot be looked at
        return ""
    near = difflib.get_close_matches(place.name, others, n=1, cutoff=0.75 if only_alike else 0.0)
    return f"did you mean {show_name(str(Path(folder).parent / near[0]))}?" if near else ""


HOLDS_IMPORTED = "holds latents that an earlier version took over from another program"


def manifest_of_images(folder: str | Path) -> Manifest | None:
    """Returns the manifest of a cache; None where there is none or where it is of latents from another program.

    Nobody knows which VAE made such latents, so new ones cannot join them; the user is told. The settings in such a
    manifest are not taken as defaults either: they ask for all the images that were found.
    """
    manifest = read_manifest(folder)
    if manifest is None or not manifest.space.is_imported:
        return manifest
    say(
        f"{folder} {HOLDS_IMPORTED}: they are left alone, and the images are encoded again with the VAE and the "
        "image_size in use"
    )
    return None
