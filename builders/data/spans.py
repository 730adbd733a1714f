"""Says what a model was trained on: how many events, and up to when."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from builders.data.dataset import Dataset
from ensemble.arrays import Array

_FILE = "trained.json"
FIRST_CLOCK_S = 100_000_000  # 1973: numbers below it are positions of a shop without a clock


@dataclass(frozen=True)
class Span:
    """Holds how many events (or impressions) a model learned from, and the time of the newest one."""

    events: int
    until: int | None  # Unix seconds, or a position where the shop has no clock; None: it saw no event

    def to_json(self) -> dict[str, Any]:
        """Gives it as an entry of a manifest, with the time in words too."""
        return {**asdict(self), "trained_up_to": self.words()}

    def words(self) -> str:
        """Writes the time as a date in UTC; a position as such."""
        if self.until is None:
            return "nothing"
        if self.until < FIRST_CLOCK_S:
            return f"position {self.until}"
        return f"{datetime.fromtimestamp(self.until, UTC):%Y-%m-%d %H:%M:%S} UTC"


def span_of(times: Array) -> Span:
    """Gives the span of events at `times` [n] int64."""
    return Span(len(times), int(times.max()) if len(times) else None)


def training_span(dataset: Dataset) -> Span:
    """Gives the span of the events that may be trained on."""
    histories = dataset.histories
    place = np.arange(len(histories.times))
    ends = np.repeat(dataset.train_ends, np.diff(histories.offsets))
    return span_of(histories.times[place < ends])


def save_span(span: Span, folder: Path) -> None:
    """Writes it beside a checkpoint."""
    (folder / _FILE).write_text(json.dumps(asdict(span)))


def read_span(folder: Path) -> Span:
    """Reads what save_span wrote."""
    return Span(**json.loads((folder / _FILE).read_text()))
