"""A space: all that decides the moments of an image, so that rows of one space belong together and no others do.

The moments that a VAE's encoder makes of an image depend on the encoder (its fingerprint), on the image size and on how
the image is read (the recipe). A space names these; its id, a hash of them, is the name of the folder in a cache that
holds its rows. Another VAE or another image size is another space, so latents of the two are never mixed.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from gait_latents.common import json_text

FORMAT = 1


@dataclass(frozen=True)
class Space:
    """What the moments of an image depend on, besides the image.

    Attributes:
        spec: plain values, as they are stored in shards, manifests and checkpoints: "format", "quantity", "dtype",
            "moments_shape" [2C h w], "image_size" in pixels, "recipe" (how an image is read), "vae" (the fingerprint of
            the encoder).
    """

    spec: dict

    @classmethod
    def of(cls, fingerprint: Mapping, image_size: int, recipe: Mapping, moments_shape: Sequence[int]) -> "Space":
        """Describes the moments of shape [2C h w] that a VAE makes of images.

        Args:
            fingerprint: names the encoder, as `VAEIdentity.fingerprint` does.
            image_size: side of the square images in pixels.
            recipe: how an image is read, as `reading.recipe` says.
            moments_shape: (2C, h, w) of one image.
        """
        spec = {
            "format": FORMAT,
            "quantity": "moments",
            "dtype": "float16",
            "moments_shape": list(moments_shape),
            "image_size": image_size,
            "recipe": recipe,
            "vae": fingerprint,
        }
        return cls(json.loads(json_text.canonical(spec)))

    @classmethod
    def from_stored(cls, spec: object) -> "Space":
        """Takes the spec that a file holds; raises ValueError unless it could be one that `of` made."""
        if not isinstance(spec, dict) or spec.keys() != _SPEC_FIELDS or not _is_shallow(spec):
            raise ValueError("it does not describe a space")
        shape, size = spec["moments_shape"], spec["image_size"]
        if not (_are_counts(shape, 3) and shape[0] % 2 == 0 and math.prod(shape) <= _MAX_ROW_VALUES):
            raise ValueError("it has moments of an impossible shape")
        if not _are_counts([size], 1) or not isinstance(spec["vae"], dict):
            raise ValueError("it describes no VAE or no image size")
        return cls(spec)

    @cached_property
    def text(self) -> str:
        """The spec as canonical JSON."""
        return json_text.canonical(self.spec)

    @cached_property
    def id(self) -> str:
        """The first 16 hex digits of the SHA-256 of the canonical spec."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:16]

    @property
    def moments_shape(self) -> tuple[int, int, int]:
        """Shape of one row: (2C, h, w)."""
        channels, height, width = self.spec["moments_shape"]
        return channels, height, width

    @property
    def is_imported(self) -> bool:
        """Says whether an earlier version took these latents over from another program, whose VAE nobody knows."""
        return "imported" in self.spec["vae"]

    @property
    def row_bytes(self) -> int:
        """Bytes of the moments of one image: two for each value."""
        return 2 * math.prod(self.moments_shape)

    def differing_fields(self, other: "Space") -> list[str]:
        """Returns a line "field: here vs there" for each field of the spec in which the two differ."""
        here, there = _flat(self.spec), _flat(other.spec)
        names = [name for name in sorted({*here, *there}) if here.get(name) != there.get(name)]
        lines = [f"{name}: {here.get(name, 'absent')} vs {there.get(name, 'absent')}" for name in names]
        # The first 12 of the 64 digits of a digest are enough to tell two apart.
        return [re.sub(r"\b([0-9a-f]{12})[0-9a-f]{52}\b", r"\1", line) for line in lines]


_SPEC_FIELDS = {"format", "quantity", "dtype", "moments_shape", "image_size", "recipe", "vae"}
_MAX_ROW_VALUES = 1 << 28


def _are_counts(values: object, number: int) -> bool:
    """Says whether this is a list of so many whole numbers, each above 0 and none absurd."""
    if not isinstance(values, list) or len(values) != number:
        return False
    return all(type(value) is int and 0 < value < 1 << 20 for value in values)


def _is_shallow(value: object, depth: int = 20) -> bool:
    """Says whether no more than `depth` objects or lists lie in each other, so that a recursion over them ends."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return depth > 0 and all(_is_shallow(item, depth - 1) for item in inner)


def _flat(value: object, name: str = "") -> dict[str, str]:
    """Flattens nested objects to {dotted name: value as JSON}."""
    if not isinstance(value, dict):
        return {name: json_text.canonical(value)}
    parts = [_flat(inner, f"{name}.{key}" if name else key) for key, inner in value.items()]
    return {name: text for part in parts for name, text in part.items()}
