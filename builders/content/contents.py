"""Holds what was encoded of a shop's items, for the stages that read it; nothing here loads torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from builders.content.samples import write_samples
from builders.folders import link
from ensemble.arrays import Array
from ensemble.content.encoder import TOKENIZER
from ensemble.content.projection import PROJECTIONS, Projection, save_projections
from ensemble.contract import IMAGE, TEXT
from ensemble.schema import EncoderSizes

if TYPE_CHECKING:
    from builders.content.cache import KeptEncoder

LINES = "contents.txt"  # of the data stage: what was encoded and what was not, a line a feature
FILES = (f"{TEXT}.json", f"{IMAGE}.json", TOKENIZER, PROJECTIONS)  # that a release has of its encoders


@dataclass(frozen=True)
class Content:
    """Holds one feature's values [n, P + 1] float32, a row a row of the table, and the model behind them."""

    model: str
    values: Array


@dataclass
class Contents:
    """Holds all of a shop's content features, by name, and what was counted on the way."""

    by_feature: dict[str, Content] = field(default_factory=dict)
    projections: dict[str, Projection] = field(default_factory=dict)
    encoders: list[KeptEncoder] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)  # what a person reads of it
    samples: dict[str, list[bytes]] = field(default_factory=dict)  # some inputs, by feature

    @property
    def sizes(self) -> tuple[EncoderSizes, ...]:
        """Gives what the schema says of the encoders."""
        return tuple(encoder.sizes for encoder in self.encoders)

    def save(self, folder: Path) -> None:
        """Links the encoders, and writes the projections, for the release that will be."""
        for encoder in self.encoders:
            encoder.link_into(folder)
        if self.projections:
            save_projections(self.projections, folder / PROJECTIONS)
            write_samples(self.samples, folder)


def link_encoders(data: Path, folder: Path) -> None:
    """Links the encoders that the data stage kept, and what belongs to them, into a staged release."""
    named = (data / name for name in FILES)
    for path in (*(path for path in named if path.is_file()), *data.glob("engines/*/model.onnx")):
        link(path, folder / path.relative_to(data))
