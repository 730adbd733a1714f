"""Saves a trained ranker in a folder, as .npy and .npz (never pickle), and reads it back."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from builders.events import EventRows
from builders.own_model import OwnModel, open_own, read_own, write_own
from builders.ranker.model import CalibratedRanker, ItemFeatures, OwnRanker, Ranker, RankerConfig
from builders.ranker.positions import Positions, read_positions, save_positions
from builders.weights import read_state, save_state
from ensemble.arrays import Array
from ensemble.schema import Schema
from ensemble.steps.blend import BLEND, Blend, read_blend

_TABLES = ("item_id_features", "item_features", "user_features", "user_rates")


@dataclass(frozen=True)
class RankerCheckpoint:
    """Holds all that export and snapshot need of a trained ranker; `report` is JSON-ready."""

    ranker: CalibratedRanker  # calibrated, in eval mode
    # item_id_features, item_codes, item_values, item_embedding -> item_features; in eval mode
    item_head: ItemFeatures
    events: EventRows  # what the events of a history add to its items
    # [I + 1, F] float32, the id rows that the head reads, with the items' rates; row 0 is that of a new item
    item_id_features: Array
    item_features: Array  # [I + 1, F] float32, the head's output for every item: the snapshot's `features`
    user_features: Array  # [U + 1, U'] float32, row 0 (unknown) is 0
    user_rates: Array  # [U + 1, Q] float32, the last columns of user_state; row 0 (unknown) is 0
    blend: Blend  # how tasks and recall's relevance make one score
    positions: Positions | None  # what the place of an exposure does; None where the shop logs none
    report: dict[str, Any]


def save_ranker(
    checkpoint: RankerCheckpoint, folder: Path, config: RankerConfig, own: OwnModel | None = None
) -> None:
    """Writes the modules' weights, their sizes, the tables of rows and report.json."""
    (folder / "config.json").write_text(json.dumps(dataclasses.asdict(config), indent=1))
    write_own(own, folder)
    save_state(checkpoint.ranker.state_dict(), folder / "ranker.npz")
    save_state(checkpoint.item_head.state_dict(), folder / "item_head.npz")
    save_state(checkpoint.events.state_dict(), folder / "events.npz")
    for name in _TABLES:
        np.save(folder / f"{name}.npy", getattr(checkpoint, name), allow_pickle=False)
    (folder / BLEND).write_text(checkpoint.blend.to_json())
    save_positions(checkpoint.positions, folder)
    (folder / "report.json").write_text(json.dumps(checkpoint.report, indent=1))


def read_ranker(
    folder: Path, schema: Schema, config: RankerConfig, own: nn.Module | None = None
) -> RankerCheckpoint:
    """Reads what save_ranker wrote, given the same sizes (and the user's own module, if it was one)."""
    model = Ranker(schema, config) if own is None else OwnRanker(schema, own)
    head, events = ItemFeatures(schema, config), EventRows(len(schema.events), schema.sizes.item_features)
    model.load_state_dict(read_state(folder / "ranker.npz"))
    head.load_state_dict(read_state(folder / "item_head.npz"))
    events.load_state_dict(read_state(folder / "events.npz"))
    tables = {name: np.load(folder / f"{name}.npy", allow_pickle=False) for name in _TABLES}
    report = json.loads((folder / "report.json").read_text())
    rest = {"blend": read_blend(folder), "positions": read_positions(folder), "report": report}
    return RankerCheckpoint(model.eval(), head.eval(), events, **tables, **rest)


def open_ranker(folder: Path, schema: Schema) -> RankerCheckpoint:
    """Reads what save_ranker wrote: its sizes and the user's own module are named in the folder."""
    return read_ranker(folder, schema, read_config(folder), open_own(read_own(folder), schema, "ranker"))


def read_config(folder: Path) -> RankerConfig:
    """Reads the sizes of the ranker that save_ranker wrote."""
    sizes: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return RankerConfig(**{**sizes, "expert": tuple(sizes["expert"])})
