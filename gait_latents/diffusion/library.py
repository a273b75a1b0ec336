"""The package denoising-diffusion-pytorch, from which the U-Net and the schedule come.

Whether it is installed and new enough is checked before it is imported; everything else imports its classes from here.
"""

import importlib.metadata
import importlib.util
import re
from pathlib import Path

from gait_latents.common.errors import UserError, make_sure_of_room_for_scipy

LIBRARY = "denoising-diffusion-pytorch"
LIBRARY_MODULE = "denoising_diffusion_pytorch"
LIBRARY_OLDEST = (2, 3, 4)


def check_library() -> None:
    """Raises UserError, with version and place, unless Python would import a new enough diffusion library."""
    wanted = ".".join(map(str, LIBRARY_OLDEST))
    remedy = f'pip install "{LIBRARY}>={wanted}"'
    folder = _library_folder()
    if folder is None:
        raise UserError(f"{LIBRARY} is not installed; {remedy}")
    version = _version_in(folder)
    if version is None or _release(version) < LIBRARY_OLDEST:
        raise UserError(
            f"Python imports {LIBRARY} {version or '(version unknown)'} from {folder}, but {wanted} or newer is"
            f" needed; move that folder away if it is a copy, then {remedy}"
        )


def library_version() -> str | None:
    """Returns the version of the library that Python imports; None where it is not installed or names no version."""
    folder = _library_folder()
    return None if folder is None else _version_in(folder)


def _library_folder() -> Path | None:
    spec = importlib.util.find_spec(LIBRARY_MODULE)
    return None if spec is None else Path(spec.origin or LIBRARY_MODULE).resolve().parent


def _version_in(folder: Path) -> str | None:
    """Reads the version in the folder that Python imports; another version may be installed elsewhere and be hidden."""
    own = folder / "version.py"
    if own.is_file():
        text = own.read_text(encoding="utf-8", errors="replace")
        found = re.search(r"""__version__\s*=\s*['"]([^'"]+)""", text)
        return found[1] if found else None
    try:
        installed = importlib.metadata.distribution(LIBRARY)
    except importlib.metadata.PackageNotFoundError:
        return None
    same = Path(str(installed.locate_file(LIBRARY_MODULE))).resolve() == folder
    return installed.version if same else None


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


check_library()  # first: an old copy may pass the import below and fail much later, with a puzzling message

make_sure_of_room_for_scipy()
import scipy.linalg  # noqa: E402, F401  # the library loads it, too, but after taking some of the room
from denoising_diffusion_pytorch.classifier_free_guidance import GaussianDiffusion, Unet  # noqa: E402, F401
