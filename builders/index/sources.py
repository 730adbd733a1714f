"""Says who writes what a source beside the usual three opens: a line a source."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from builders.data.dataset import Dataset
from builders.index.content import write_content
from builders.index.walks import write_walks
from ensemble.steps.content import INDEX, TABLE, VECTORS
from ensemble.steps.walks import WALKS

# dataset, folder, seed -> the settings of RecallSettings that go with the files
Writer = Callable[[Dataset, Path, int], dict[str, Any]]

WRITERS: dict[str, Writer] = {"content": write_content, "walks": write_walks}
FILES = (TABLE, VECTORS, INDEX, WALKS)  # of all of them, where they are there


def write_sources(dataset: Dataset, folder: Path, seed: int) -> dict[str, Any]:
    """Writes the files of the schema's further sources; gives their settings."""
    settings: dict[str, Any] = {}
    for name in dataset.schema.source_names:
        if name in WRITERS:
            settings |= WRITERS[name](dataset, folder, seed)
    return settings
