"""metrics.jsonl: a line of figures every log_every steps."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gait_latents.common import files
from gait_latents.common.layout import METRICS_NAME


class Metrics:
    """The lines of metrics.jsonl, one JSON object each; lines after the step that the run goes on from are dropped.

    Attributes:
        on_row: called with each new line that is written.

    Args:
        earlier: the run folder to take the lines from where `folder` has none.
        writes: whether to write the file; of several processes of a run only one does.
        check: called with the step before something is written; raises an error where the folder is not there any more,
            or another training writes there.

    Raises:
        OSError: when the file is there and cannot be read, or is a link.
    """

    def __init__(
        self,
        folder: Path,
        *,
        step: int,
        earlier: Path | None = None,
        writes: bool = True,
        check: Callable[[int], None] = lambda step: None,
    ) -> None:
        self.on_row: Callable[[dict[str, Any]], None] = lambda row: None
        self.path, self.writes, self.check = folder / METRICS_NAME, writes, check
        source = self.path if os.path.lexists(self.path) else (earlier or folder) / METRICS_NAME
        self.rows = [row for row in _read_rows(source) if row["step"] <= step]
        self._size = 0  # of the file, as this training has left it

    def publish(self) -> None:
        """Writes the file anew, in a folder that is there."""
        if self.writes:
            text = "".join(json.dumps(row) + "\n" for row in self.rows).encode()
            files.publish(self.path, text, below=self.path.parent)
            self._size = len(text)

    def add(self, **row: Any) -> None:
        """Appends one line; a file that another has changed or removed meanwhile is written anew."""
        self.rows.append(row)
        if not self.writes:
            return
        if not self._append((json.dumps(row) + "\n").encode(), row["step"]):
            self.publish()
        self.on_row(row)

    def _append(self, line: bytes, step: int) -> bool:
        """Appends a line where the file is as this training has left it; returns False where it is not."""
        try:
            with files.appending(self.path) as file:
                self.check(step)  # with the file open: another training that begins now has another file there
                is_ours = file.tell() == self._size
                if is_ours:
                    self._size += file.write(line)
                return is_ours
        except FileNotFoundError:
            self.check(step)  # the folder may be gone with it
            return False

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """Returns the steps and values of one figure, over the lines that have it."""
        rows = [row for row in self.rows if is_number(row.get(name))]
        return [row["step"] for row in rows], [row[name] for row in rows]


_LARGEST_METRICS_BYTES = 1 << 30


def _read_rows(path: Path) -> list[dict[str, Any]]:
    """Reads the lines that are whole; a kill may leave a torn last one."""
    rows = []
    try:
        text = files.read_whole(path, at_most=_LARGEST_METRICS_BYTES).decode("utf-8", "replace")
    except FileNotFoundError:
        return rows
    for line in text.splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and type(row.get("step")) is int and row["step"] >= 0:
            rows.append(row)
    return rows


def is_number(value: object) -> bool:
    """Says whether a value out of a file is a number that fits into a float, and is finite."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300
