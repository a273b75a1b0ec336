"""What the reader of TensorBoard finds in the event files of a run."""

from pathlib import Path

import pytest


def read_events(results: Path):
    """Opens the event files of a run with the reader of TensorBoard itself."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(
        str(results / "tensorboard"), size_guidance={"scalars": 0, "images": 0}, purge_orphaned_data=True
    )
    return events.Reload()


def shown_scalars(results: Path) -> dict[str, list[tuple[int, float]]]:
    """Returns name -> (step, value) of all figures."""
    events = read_events(results)
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
