"""Names sizes and training settings: `tiny` for demos and tests, `base` for shops, `quick` for load tests."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from builders.encoders.encoders import EncoderConfig
from builders.ranker.config import BASE_TRAINING, TINY_TRAINING, RankerTraining
from builders.verify.baselines import SAMPLE_ROWS
from ensemble.errors import InvalidInput
from ensemble.schema import Sizes


@dataclass(frozen=True)
class Preset:
    """Holds all that a build may choose, under one name."""

    name: str
    sizes: Sizes
    encoders: EncoderConfig
    ranker: RankerTraining
    # of torch; None = all cores. Small tensors gain nothing from a second, and lose much on a busy machine
    threads: int | None = None
    boosting_rows: int = SAMPLE_ROWS  # that the baseline of verify learns from, at most
    refit: bool = True  # what is published has learned from the held-out rows too
    # settings that were changed, by dotted name (builders/settings.py), for the manifest
    changes: Mapping[str, Any] = field(default_factory=dict)
    base: str = ""  # of a preset file: the name of the preset that it changes

    @property
    def root(self) -> str:
        """Names the preset of ours that this one is, or changes."""
        return self.base or self.name


PRESETS = {
    "tiny": Preset(
        "tiny",
        Sizes(
            seen=50, history=20, embedding=32, candidates=64, item_features=16, user_features=8, max_top_k=50
        ),
        EncoderConfig.tiny(),
        TINY_TRAINING,
        threads=1,
        boosting_rows=10_000,
    ),
    # 3e-3 instead of EncoderConfig's 1e-3: on Beauty it is there in 12 epochs (DECISIONS.md)
    "base": Preset(
        "base", Sizes(), EncoderConfig(learning_rate=3e-3, epochs=12, evaluate_every=4), BASE_TRAINING
    ),
    # base's engines, index and rows, hardly trained: for measuring latency and memory on large catalogues
    "quick": Preset(
        "quick",
        Sizes(),
        EncoderConfig(learning_rate=3e-3, epochs=1),
        replace(BASE_TRAINING, epochs=1, list_epochs=1, tries_small=False),
        refit=False,
    ),
}


def preset(name: str) -> Preset:
    """Gives the preset called `name`; InvalidInput lists the known ones."""
    if name not in PRESETS:
        raise InvalidInput(f"--preset {name}: unknown; known: {', '.join(PRESETS)}")
    return PRESETS[name]
