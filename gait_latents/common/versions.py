"""Packages whose installed version has known holes in the code that reads the user's files: one line, with the remedy.

Nothing is looked up anywhere: what is known stands here, as of the release of this version. torch is not among them,
since a pickle, the only thing that its hole is about, is refused where an older torch would read it.
"""

import os
import re
from importlib import metadata

from gait_latents.common.console import warn

# The first version without any, of the branch that gets repairs, and what the holes are.
PILLOW_REPAIRED = (13, 0)
_SWITCH = "GAIT_LATENTS_OLD_PILLOW"  # set to ok, nothing is said: for whoever reads only images of his own


def warn_of_holes() -> None:
    """Warns of a Pillow in which an image file made on purpose can overwrite memory; nothing else is looked at."""
    if os.environ.get(_SWITCH) == "ok":
        return
    found = _version("pillow")
    if found is not None and _numbers(found) < PILLOW_REPAIRED:
        warn(
            f"Pillow {found} has known holes: an image made for it can overwrite memory (CVE-2026-59199 and others); "
            f"pip install -U pillow, or, for images that you trust, {_SWITCH}=ok"
        )


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # told when it is imported
        return None


def _numbers(version: str) -> tuple[int, ...]:
    """Returns the first two numbers of a version, such as 12.3.0.post1."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])
