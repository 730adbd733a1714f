"""Holds what compression starts from: the staged release and the modules its engines were exported from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from builders.data.dataset import Dataset, open_dataset
from builders.export.trained import open_trained
from builders.folders import Inputs
from builders.ranker.checkpoint import read_config
from builders.ranker.model import RankerConfig
from ensemble.arrays import Array


@dataclass(frozen=True)
class Source:
    """Holds the uncompressed release: its staged folder, and what its engines were exported from."""

    dataset: Dataset
    folder: Path
    data: Path  # of the data stage
    modules: dict[str, nn.Module]  # by model
    item_id_embeddings: Array  # [I + 1, E] float32: what item_encoder reads of each item
    ranker_config: RankerConfig


def open_source(inputs: Inputs) -> Source:
    """Opens the uncompressed release out of the finished stages data, encoders, ranker and export."""
    trained = open_trained(inputs)
    return Source(
        open_dataset(inputs["data"]),
        inputs["export"],
        inputs["data"],
        trained.modules,
        trained.item_id_embeddings,
        read_config(inputs["ranker"]),
    )
