"""Holds what the builder chose for recall: recall.json of a release."""

from __future__ import annotations

import json
from dataclasses import dataclass

from ensemble.errors import ReleaseError


@dataclass(frozen=True)
class RecallSettings:
    """Holds the content of recall.json."""

    nprobe: int = 1  # IVF lists visited; Flat ignores it
    # Items scored again with vectors.npy for each one wanted; 0: the index's own scores are exact.
    refine_factor: int = 0
    probe_share: float = 0.001  # of live queries, searched exactly in the background
    transition_items: int = 5  # last items of the past that transitions are read for
    transition_quota: int = 96  # places kept among the N candidates
    popular_quota: int = 16
    source_weights: tuple[float, ...] = (1.0, 1.0, 0.0)  # of contract.SOURCES in the fused score

    def to_json(self) -> str:
        """Writes the settings as JSON."""
        return json.dumps(self.__dict__, indent=1)


def settings_from_json(text: str) -> RecallSettings:
    """Reads what RecallSettings.to_json wrote; ReleaseError when another version wrote it."""
    try:
        raw = json.loads(text)
        return RecallSettings(**{**raw, "source_weights": tuple(raw["source_weights"])})
    except (TypeError, ValueError, KeyError) as error:
        raise ReleaseError(
            f"recall.json does not fit this Peregrine ({error}); build the release again"
        ) from None
