"""Checkpoints on disk: arrays as .npy and weights as .npz, never pickle."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from builders.encoders import EncoderCheckpoint, EncoderConfig
from builders.ranker import ItemFeatures, OwnRanker, Ranker, RankerConfig
from builders.train_ranker import RankerCheckpoint
from ensemble.schema import Schema


def save_state(state: dict[str, torch.Tensor], path: Path) -> None:
    """Tensors by name -> .npz."""
    np.savez(
        path,
        **{name: tensor.detach().float().numpy() if tensor.dtype == torch.bfloat16 else tensor.detach().numpy() for name, tensor in state.items()},
    )


def read_state(path: Path) -> dict[str, torch.Tensor]:
    """Inverse of save_state."""
    with np.load(path, allow_pickle=False) as arrays:
        return {name: torch.from_numpy(arrays[name].copy()) for name in arrays.files}


def save_encoders(checkpoint: EncoderCheckpoint, folder: Path) -> None:
    """config.json, log.json, item_id_embeddings.npy and the two modules' weights."""
    (folder / "config.json").write_text(json.dumps(dataclasses.asdict(checkpoint.config), indent=1))
    (folder / "log.json").write_text(json.dumps(checkpoint.log, indent=1))
    np.save(folder / "item_id_embeddings.npy", checkpoint.item_ids)
    save_state(checkpoint.item_state, folder / "item_encoder.npz")
    save_state(checkpoint.user_state, folder / "user_encoder.npz")


def read_encoders(folder: Path, own: nn.Module | None = None) -> EncoderCheckpoint:
    """Inverse of save_encoders, given the user's own module if it was one."""
    raw: dict[str, Any] = json.loads((folder / "config.json").read_text())
    fields: dict[str, Any] = {name: tuple(map(tuple, value)) if isinstance(value, list) else value for name, value in raw.items()}
    config = EncoderConfig(**fields)
    ids = np.load(folder / "item_id_embeddings.npy", allow_pickle=False)
    log = json.loads((folder / "log.json").read_text())
    return EncoderCheckpoint(config, ids, read_state(folder / "item_encoder.npz"), read_state(folder / "user_encoder.npz"), log, own)


def save_ranker(checkpoint: RankerCheckpoint, folder: Path) -> None:
    """Both modules' weights, the three tables of rows, report.json."""
    save_state(checkpoint.ranker.state_dict(), folder / "ranker.npz")
    save_state(checkpoint.item_head.state_dict(), folder / "item_head.npz")
    for name in _TABLES:
        np.save(folder / f"{name}.npy", getattr(checkpoint, name), allow_pickle=False)
    (folder / "report.json").write_text(json.dumps(checkpoint.report, indent=1))


def read_ranker(folder: Path, schema: Schema, config: RankerConfig, own: nn.Module | None = None) -> RankerCheckpoint:
    """Inverse of save_ranker, given the same sizes (and the user's own module, if it was one)."""
    model = Ranker(schema, config) if own is None else OwnRanker(schema, own)
    head = ItemFeatures(schema, config)
    model.load_state_dict(read_state(folder / "ranker.npz"))
    head.load_state_dict(read_state(folder / "item_head.npz"))
    tables = {name: np.load(folder / f"{name}.npy", allow_pickle=False) for name in _TABLES}
    return RankerCheckpoint(model.eval(), head.eval(), report=json.loads((folder / "report.json").read_text()), **tables)


_TABLES = ("item_id_features", "item_features", "user_features")
