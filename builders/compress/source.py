"""Holds what compression starts from: the staged release and the modules its engines were exported from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from builders.data.dataset import Dataset
from builders.ranker.model import RankerConfig
from ensemble.arrays import Array


@dataclass(frozen=True)
class Source:
    """Holds the uncompressed release: its staged folder, and what its engines were exported from."""

    dataset: Dataset
    folder: Path
    modules: dict[str, nn.Module]  # by model
    item_id_embeddings: Array  # [I + 1, E] float32: what item_encoder reads of each item
    ranker_config: RankerConfig
