"""Keeps what an evaluation finds in report.json, and shows it in report.html."""

import hashlib
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gait_latents.common import files, json_text
from gait_latents.common.console import warn
from gait_latents.common.errors import UserError
from gait_latents.common.layout import PAGE_NAME, PAIRS_NAME, REPORT_NAME
from gait_latents.evaluation import forms, page

_LARGEST_REPORT_BYTES = 1 << 26  # of more than a million images
_LARGEST_PICTURE_BYTES = 1 << 28
_PARTS = ("latents", "memorisation", "inception", "classifier", "why")  # of the report, about synthetic images


class Report:
    """report.json and report.html: written after each finished part, so that nothing is computed twice.

    A part is stored with a digest of all that it was computed from. It counts only as long as that digest is the same
    and the part has the form of such parts (`forms.py`). A report about other real images is dropped at once, so that
    no page mixes two.

    Args:
        real: what the figures about real images depend on (`made_of_real`).
        num_classes: of the run.
    """

    def __init__(self, folder: Path, real: dict[str, Any], *, num_classes: int) -> None:
        self.folder = folder
        stored = _read_report(folder / REPORT_NAME, num_classes)
        digest = _digest(real)
        self.data: dict[str, Any] = stored if stored.get("real_digest") == digest else {"real_digest": digest}

    def begin(self, *, evaluated: dict[str, Any], **facts: Any) -> None:
        """Stores what is evaluated and other facts; drops the parts that are about other synthetic images."""
        before = self.data.get("evaluated", {}).get("synthetic_digest")
        if before != evaluated["synthetic_digest"]:
            for name in _PARTS:
                self.data.pop(name, None)
        self.set_facts(evaluated=evaluated, **facts)

    def part(self, name: str, made_of: dict[str, Any]) -> dict[str, Any] | None:
        """Returns the figures of a part if they were computed from just this; None otherwise."""
        stored = self.data.get(name, {})
        return stored if stored.get("digest") == _digest(made_of) else None

    def put(self, name: str, made_of: dict[str, Any], figures: dict[str, Any]) -> dict[str, Any]:
        """Keeps the figures of a part, and publishes the report."""
        self.data[name] = {**plain(figures), "digest": _digest(made_of)}
        self.data.get("why", {}).pop(name, None)
        self.write()
        return self.data[name]

    def drop(self, name: str, *, why: str | None = None) -> None:
        """Removes a part that was not asked for or that cannot be computed; `why` is told in its place."""
        self.data.pop(name, None)
        self.data.get("why", {}).pop(name, None)
        if why is not None:
            self.data["why"] = {**self.data.get("why", {}), name: why}

    def set_facts(self, **facts: Any) -> None:
        """Stores facts besides the parts, such as warnings and settings."""
        self.data |= plain(facts)

    def write(self) -> None:
        """Publishes both files."""
        whole = {**self.data, "sha256": _digest(self.data)}
        files.publish(self.folder / REPORT_NAME, (json.dumps(whole, indent=1) + "\n").encode())
        files.publish(self.folder / PAGE_NAME, page.write_html(self.data, self._pictures()))

    def _pictures(self) -> dict[str, bytes]:
        """Returns the content of the picture that the report names, if it is there."""
        data, _ = self.picture()
        return {} if data is None else {PAIRS_NAME: data}

    def picture(self) -> tuple[bytes | None, str | None]:
        """Reads the picture of the closest pairs.

        Returns:
            Its content, if it is the very file that the report was made with; else None, and why, unless there is
            nothing of that name.
        """
        path = self.folder / PAIRS_NAME
        expected = self.data.get("memorisation", {}).get("picture_sha256")
        if not os.path.lexists(path):
            return None, None
        try:
            data = files.read_whole(path, at_most=_LARGEST_PICTURE_BYTES)
        except OSError as error:
            return None, error.strerror or str(error)
        if hashlib.sha256(data).hexdigest() != expected:
            return None, "the report holds no digest of it" if expected is None else "the report holds another digest"
        return data, None


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(plain(value), sort_keys=True).encode()).hexdigest()


def plain(value: Any) -> Any:
    """Returns a value as it is after JSON: keys as texts, lists for tuples; None for numbers that are not finite."""
    if isinstance(value, dict):
        return {str(name): plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_finished(folder: Path, parts: Sequence[str]) -> dict[str, Any]:
    """Returns a report whose parts of these names are whole; "evaluated" must be one of them.

    Raises:
        UserError: where there is none, it cannot be read, or it is damaged.
    """
    path = folder / REPORT_NAME
    try:
        data = _parse(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"{path} does not exist; give a folder that evaluate_images.py has written") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise UserError(
            f"{path} is damaged or was edited ({_reason(error)}); evaluate these images once more"
        ) from error
    is_sound = not forms.unfit_parts({"evaluated": data.get("evaluated", {})}, num_classes=0)
    num_classes = len(data.get("evaluated", {}).get("images_per_class", {})) if is_sound else 0
    unfit = [name for name in forms.unfit_parts(data, num_classes=num_classes) if name in parts]
    if unfit:
        raise UserError(
            f"{path}: what is stored as {', '.join(unfit)} has another form; evaluate these images once more"
        )
    return data


def _read_report(path: Path, num_classes: int) -> dict[str, Any]:
    """Reads what `Report.write` wrote, without the parts that it cannot have written; it warns of what is left out."""
    try:
        data = _parse(path)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        warn(f"{path} is damaged or was edited ({_reason(error)}); everything is computed anew")
        return {}
    unfit = forms.unfit_parts(data, num_classes=num_classes)
    if unfit:
        warn(f"{path}: what is stored as {', '.join(unfit)} has another form than it should, and is computed anew")
    return {name: value for name, value in data.items() if name not in unfit}


def _parse(path: Path) -> dict[str, Any]:
    """Reads a report whose checksum fits; raises OSError, or ValueError for what no report is."""
    data = json_text.parse(files.read_whole(path, at_most=_LARGEST_REPORT_BYTES))
    if not isinstance(data, dict) or json_text.is_deep(data):
        raise _Unfit("it has another form")
    if data.pop("sha256", None) != _digest(data):
        raise _Unfit("its checksum does not fit")
    return data


class _Unfit(ValueError):
    """Says why a file is no report."""


def _reason(error: OSError | ValueError) -> str:
    return str(error) if isinstance(error, _Unfit) else getattr(error, "strerror", None) or type(error).__name__


def file_digest(path: Path, *, follow_link: bool = False) -> str:
    """Returns the SHA-256 of a file; `follow_link` as in `files.open_file`."""
    with files.naming(path), os.fdopen(files.open_file(path, follow_link=follow_link), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
