"""Finds what a release's build has kept: the verified model, and the shop as arrays."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from builders.data.dataset import Dataset, open_dataset
from builders.data.spans import Span, span_of, training_span
from ensemble.errors import ReleaseError
from ensemble.release.release import open_release

STAGES = "stages"  # the manifest's entry: {"data": folder, "verified": folder}, from the repository on


@dataclass(frozen=True)
class Kept:
    """Holds a release's verified model, which has not seen the held-out rows, and its shop."""

    name: str
    manifest: dict[str, Any]
    dataset: Dataset
    staged: Path

    @property
    def trained(self) -> Span:
        """Says how many events and impressions the verified model learned from, and the newest one's time."""
        span, shown = training_span(self.dataset), self.dataset.train_impressions
        return span if shown is None else _later(span, span_of(shown.times))

    @property
    def has_clock(self) -> bool:
        """Says whether one moment splits the shop: else each user has its own, or is held out whole."""
        return bool(self.dataset.split["kind"] == "time")

    def test_begins(self) -> int | None:
        """Gives the time of the first event or impression that neither trained nor chose anything; None
        without one."""
        test, shown = self.dataset.test, self.dataset.test_impressions
        times = [self.dataset.histories.times[test.history_ends]] if len(test.user_rows) else []
        times += [shown.times] if shown is not None and len(shown.times) else []
        return int(np.concatenate(times).min()) if times else None


def open_kept(repository: Path, name: str) -> Kept:
    """Opens what the build of release `name` has kept; ReleaseError if it is gone."""
    manifest = open_release(repository, name).manifest
    folders = manifest.get(STAGES)
    if folders is None:
        raise ReleaseError(
            f"release {name} does not say which stages of its build hold the model that was verified",
            "build it again: releases built since do",
        )
    data, staged = (repository / folders[part] for part in ("data", "verified"))
    for folder in (data, staged):
        if not folder.is_dir():
            refitted = " What is published has learned from all rows, so it cannot be asked." * bool(
                manifest.get("refit")
            )
            raise ReleaseError(
                f"release {name}: {folder} is gone, of which a build keeps the newest three.{refitted}",
                "build it again (what is unchanged is not made again), or evaluate a newer release",
            )
    return Kept(name, manifest, open_dataset(data), staged)


def _later(first: Span, second: Span) -> Span:
    """Adds up two spans."""
    known = [until for until in (first.until, second.until) if until is not None]
    return Span(first.events + second.events, max(known) if known else None)
