"""Saves trained encoders in a folder and reads them back."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from builders.encoders.encoders import EncoderCheckpoint, EncoderConfig
from builders.own_model import OwnModel, open_own, read_own, write_own
from builders.weights import read_state, save_state
from ensemble.schema import Schema


def save_encoders(checkpoint: EncoderCheckpoint, folder: Path, own: OwnModel | None = None) -> None:
    """Writes config.json, log.json, own.json, item_id_embeddings.npy and the modules' weights."""
    write_own(own, folder)
    (folder / "config.json").write_text(json.dumps(dataclasses.asdict(checkpoint.config), indent=1))
    (folder / "log.json").write_text(json.dumps(checkpoint.log, indent=1))
    np.save(folder / "item_id_embeddings.npy", checkpoint.item_ids)
    save_state(checkpoint.item_state, folder / "item_encoder.npz")
    save_state(checkpoint.user_state, folder / "user_encoder.npz")
    save_state(checkpoint.event_state, folder / "events.npz")


def read_encoders(folder: Path, own: nn.Module | None = None) -> EncoderCheckpoint:
    """Reads what save_encoders wrote, given the user's own module if it was one."""
    raw: dict[str, Any] = json.loads((folder / "config.json").read_text())
    fields: dict[str, Any] = {
        name: tuple(map(tuple, value)) if isinstance(value, list) else value for name, value in raw.items()
    }
    config = EncoderConfig(**fields)
    ids = np.load(folder / "item_id_embeddings.npy", allow_pickle=False)
    log = json.loads((folder / "log.json").read_text())
    return EncoderCheckpoint(
        config,
        ids,
        read_state(folder / "item_encoder.npz"),
        read_state(folder / "user_encoder.npz"),
        read_state(folder / "events.npz"),
        log,
        own,
    )


def open_encoders(folder: Path, schema: Schema) -> EncoderCheckpoint:
    """Reads what save_encoders wrote: the user's own module, if it was one, is named in the folder."""
    return read_encoders(folder, open_own(read_own(folder), schema, "user_encoder"))
