"""Checkpoints on disk: arrays as .npy and weights as .npz, never pickle."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from torch import nn

from builders.ranker.model import ItemFeatures, OwnRanker, Ranker, RankerConfig
from builders.ranker.stage import RankerCheckpoint
from builders.weights import read_state, save_state
from ensemble.schema import Schema


def save_ranker(checkpoint: RankerCheckpoint, folder: Path) -> None:
    """Both modules' weights, the three tables of rows, report.json."""
    save_state(checkpoint.ranker.state_dict(), folder / "ranker.npz")
    save_state(checkpoint.item_head.state_dict(), folder / "item_head.npz")
    for name in _TABLES:
        np.save(folder / f"{name}.npy", getattr(checkpoint, name), allow_pickle=False)
    (folder / "report.json").write_text(json.dumps(checkpoint.report, indent=1))


def read_ranker(
    folder: Path, schema: Schema, config: RankerConfig, own: nn.Module | None = None
) -> RankerCheckpoint:
    """Inverse of save_ranker, given the same sizes (and the user's own module, if it was one)."""
    model = Ranker(schema, config) if own is None else OwnRanker(schema, own)
    head = ItemFeatures(schema, config)
    model.load_state_dict(read_state(folder / "ranker.npz"))
    head.load_state_dict(read_state(folder / "item_head.npz"))
    tables = {name: np.load(folder / f"{name}.npy", allow_pickle=False) for name in _TABLES}
    return RankerCheckpoint(
        model.eval(), head.eval(), report=json.loads((folder / "report.json").read_text()), **tables
    )


_TABLES = ("item_id_features", "item_features", "user_features")
