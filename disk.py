"""Whether what a script will write fits on its disk: told in one line at the start, and never a reason to stop."""

import shutil
from pathlib import Path

from script import say, size, warn


def tell(num_bytes: float, what: str, folder: Path, *, remedy: str) -> None:
    """Says about how much `what` will take in `folder` and how much is free there; warns where that is too little.

    Args:
        num_bytes: an estimate; nothing is said of nothing.
        what: what is written, with its number, such as "75 saves".
        folder: need not exist yet.
        remedy: what the user may do besides making room.
    """
    if num_bytes <= 0:
        return
    try:
        free = free_bytes(folder)
    except OSError as error:  # the writing itself will tell, if it cannot be done either
        say(f"disk: about {size(num_bytes)} for {what}; what is free on {folder} is not known ({error.strerror})")
        return
    if num_bytes < free:
        say(f"disk: about {size(num_bytes)} for {what}; {size(free)} free on {folder}")
    else:
        warn(
            f"disk: about {size(num_bytes)} for {what} will not fit on {folder}, where {size(free)} are free; "
            f"make room, or {remedy}"
        )


def free_bytes(folder: Path) -> int:
    """Returns how much this user can still write where a folder is, or would be made."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free
