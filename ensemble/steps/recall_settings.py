"""Holds what the builder chose for recall: recall.json of a release."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from ensemble.errors import ReleaseError


@dataclass(frozen=True)
class RecallSettings:
    """Holds the content of recall.json."""

    nprobe: int = 1  # IVF lists visited; Flat ignores it
    # Items scored again with vectors.npy for each one wanted; 0: the index's own scores are exact.
    refine_factor: int = 0
    probe_share: float = 0.001  # of live queries, searched exactly in the background
    transition_items: int = 5  # last items of the past that transitions are read for
    content_items: int = 5  # last items of the past whose content is asked for
    content_nprobe: int = 1  # IVF lists visited for them
    content_refine_factor: int = 0
    # Places kept among the N candidates, by source; a source that is not here has what the others leave.
    quotas: Mapping[str, int] = field(default_factory=lambda: {"transitions": 96, "popular": 16})
    # Of the schema's sources, in their order, in the fused score.
    source_weights: tuple[float, ...] = (1.0, 1.0, 0.0)
    # How much more an item follows a past in which it is, times the log of how often: for who asks for what
    # he had, where the ranker never saw such a candidate
    again: float = 0.0
    off: tuple[str, ...] = ()  # sources that gained nothing on held-out users: they offer and say nothing

    def to_json(self) -> str:
        """Writes the settings as JSON."""
        return json.dumps(self.__dict__, indent=1)


def settings_from_json(text: str) -> RecallSettings:
    """Reads what RecallSettings.to_json wrote; ReleaseError when another version wrote it."""
    try:
        raw = json.loads(text)
        lists = {name: tuple(raw[name]) for name in ("source_weights", "off")}
        return RecallSettings(**{**raw, **lists})
    except (TypeError, ValueError, KeyError) as error:
        raise ReleaseError(
            f"recall.json does not fit this Peregrine ({error}); build the release again"
        ) from None
