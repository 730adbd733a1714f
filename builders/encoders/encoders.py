"""Holds the encoders once trained: their settings, their weights, and what they say of items and users.

Axes: U users, I items, D embedding, M interests, C code columns, R value columns, Q held-out targets.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from builders.encoders.models import ItemEncoder, UserEncoder
from builders.encoders.sequences import Sequences, cell_windows, windows
from builders.events import EventRows
from builders.layers import code_slices, content_slices
from builders.metrics import hit_rate, ndcg, ranks_from_scores
from ensemble.arrays import Array
from ensemble.schema import Schema

Slices = tuple[tuple[int, int], ...]
_SCORES_AT_ONCE = 1 << 25  # of a full ranking: 128 MiB


@dataclass(frozen=True)
class EncoderConfig:
    """Says what is trained and how; 10^4 items (Beauty) learn in half the epochs at learning_rate 3e-3."""

    num_item_codes: int = 1  # size of the items' joint code table
    item_code_slices: Slices = ()  # (start, stop) columns of each feature
    item_content_slices: Slices = ()  # (start, stop) of values: what an encoder made of texts and pictures
    num_user_codes: int = 1
    user_code_slices: Slices = ()
    num_kinds: int = 1  # of events
    dim: int = 128
    max_history: int = 50
    ordered: bool = True  # False: histories without an order, whose last items are no newer than the others
    interests: int = 1
    layers: int = 2
    heads: int = 4
    dropout: float = 0.3
    temperature: float = 0.07
    id_dropout: float = 0.1  # share of ids replaced by row 0, so that features learn to speak for a cold item
    # share of histories hidden, so that the default learns what a new user wants
    history_dropout: float = 0.02
    epochs: int = 20
    batch_positions: int = 4096
    learning_rate: float = 1e-3
    warmup_steps: int = 100
    num_uniform: int = 2048  # uniform candidates of a batch
    num_hard: int = 512  # hard candidates of a batch in the last epoch (0 = none)
    hard_from: float = 0.3  # share of training before the first hard candidate
    evaluate_every: int = 2  # epochs
    patience: int = 3  # evaluations without a better NDCG@10 before training stops
    bf16: bool = True  # matrix products in bfloat16, on a CPU that has them

    @classmethod
    def tiny(cls, **changes: Any) -> EncoderConfig:
        """Gives settings that learn a shop of hundreds of users in seconds."""
        small = cls(
            dim=32,
            layers=1,
            heads=2,
            epochs=12,
            batch_positions=512,
            learning_rate=5e-3,
            warmup_steps=10,
            num_uniform=128,
            num_hard=64,
        )
        return replace(small, **changes)


def fitted(config: EncoderConfig, schema: Schema) -> EncoderConfig:
    """Gives a preset's settings with a shop's sizes filled in."""
    return replace(
        config,
        num_item_codes=schema.items.num_codes,
        item_code_slices=code_slices(schema.items),
        item_content_slices=content_slices(schema.items),
        num_user_codes=schema.users.num_codes,
        num_kinds=len(schema.events),
        user_code_slices=code_slices(schema.users),
        dim=schema.sizes.embedding,
        max_history=schema.sizes.history,
        interests=schema.sizes.interests,
    )


@dataclass(frozen=True)
class Validation:
    """Holds the next item of some histories: target_rows[q] is what user_rows[q] took after history q."""

    histories: Sequences
    target_rows: Array  # [Q] int64
    user_rows: Array  # [Q] int64, rows of user_codes and user_values


@dataclass(frozen=True)
class EncoderCheckpoint:
    """Holds torch weights of both encoders and the id table, whose row 0 is the unknown item."""

    config: EncoderConfig
    item_ids: Array  # [I + 1, D] float32
    item_state: dict[str, Tensor]
    user_state: dict[str, Tensor]
    event_state: dict[str, Tensor]  # of what events add to the embeddings of their items (builders/events.py)
    # one entry an epoch: epoch, loss, seconds, ndcg_at_10
    log: list[dict[str, float]] = field(default_factory=list)
    own: nn.Module | None = None  # the user's own user encoder, whose weights user_state then holds

    def item_encoder(self) -> ItemEncoder:
        encoder = new_item_encoder(self.config, self.item_state["values.weight"].shape[1])
        encoder.load_state_dict(self.item_state)
        return encoder.eval()

    def event_rows(self) -> EventRows:
        rows = EventRows(self.config.num_kinds, self.config.dim)
        rows.load_state_dict(self.event_state)
        return rows.eval()

    def user_encoder(self) -> nn.Module:
        encoder = (
            copy.deepcopy(self.own)
            if self.own
            else new_user_encoder(self.config, self.user_state["values.weight"].shape[1])
        )
        encoder.load_state_dict(self.user_state)
        return encoder.eval()


def new_item_encoder(config: EncoderConfig, num_values: int) -> ItemEncoder:
    return ItemEncoder(
        dim=config.dim, num_codes=config.num_item_codes, code_slices=config.item_code_slices,
        num_values=num_values, content_slices=config.item_content_slices, dropout=config.dropout,
        temperature=config.temperature,
    )  # fmt: skip


def new_user_encoder(config: EncoderConfig, num_values: int) -> UserEncoder:
    return UserEncoder(
        dim=config.dim, num_user_codes=config.num_user_codes, user_code_slices=config.user_code_slices,
        num_user_values=num_values, interests=config.interests, layers=config.layers, heads=config.heads,
        dropout=config.dropout, temperature=config.temperature, max_history=config.max_history,
        ordered=config.ordered,
    )  # fmt: skip


@torch.no_grad()
def encode_rows(checkpoint: EncoderCheckpoint, rows: Array, item_codes: Array, item_values: Array) -> Array:
    encoder = checkpoint.item_encoder()
    parts = [rows[start : start + 8192] for start in range(0, len(rows), 8192)]
    feeds = [
        [torch.from_numpy(table[part]) for table in (checkpoint.item_ids, item_codes, item_values)]
        for part in parts
    ]
    return np.concatenate([encoder(*feed).numpy() for feed in feeds])


def encode_items(checkpoint: EncoderCheckpoint, item_codes: Array, item_values: Array) -> Array:
    """Encodes all items: [I + 1, C], [I + 1, R] -> [I + 1, D] float32. Rows past the id table are new."""
    new = len(item_codes) - len(checkpoint.item_ids)
    if new > 0:
        checkpoint = replace(
            checkpoint,
            item_ids=np.concatenate([checkpoint.item_ids, np.repeat(checkpoint.item_ids[:1], new, axis=0)]),
        )
    return encode_rows(checkpoint, np.arange(len(item_codes)), item_codes, item_values)


@torch.no_grad()
def encode_users(
    checkpoint: EncoderCheckpoint, items: Array, histories: Sequences, user_codes: Array, user_values: Array
) -> Array:
    """Encodes users by `items` [I + 1, D] and features by the rows of `histories`: [U, M, D] float32."""
    encoder, lengths = checkpoint.user_encoder(), np.diff(histories.offsets)
    events = checkpoint.event_rows().table()
    out = np.empty((len(lengths), checkpoint.config.interests, checkpoint.config.dim), np.float32)
    order = np.argsort(lengths, kind="stable")  # short windows together: their common padding is cut off
    for start in range(0, len(order), 1024):
        users = order[start : start + 1024]
        length = min(max(int(lengths[users].max()), 1), checkpoint.config.max_history)
        rows, cells = windows(histories, users, length), cell_windows(histories, users, length)
        feeds = items[rows] + events[cells], rows > 0, user_codes[users], user_values[users]
        out[users] = encoder(*map(torch.from_numpy, feeds)).numpy()
    return out


def evaluate_encoders(
    checkpoint: EncoderCheckpoint,
    validation: Validation,
    item_codes: Array,
    item_values: Array,
    user_codes: Array,
    user_values: Array,
) -> dict[str, float]:
    """Ranks the whole catalogue by the best interest, history left out -> {hit_rate_at_10, ndcg_at_10}."""
    items = encode_items(checkpoint, item_codes, item_values)
    histories, rows, catalogue = validation.histories, validation.user_rows, torch.from_numpy(items).T
    users = encode_users(checkpoint, items, histories, user_codes[rows], user_values[rows])
    ranks = []
    step = max(1, _SCORES_AT_ONCE // len(items))
    for start in range(0, len(rows), step):
        part = np.arange(start, min(start + step, len(rows)))
        scores = (
            (torch.from_numpy(users[part]).flatten(0, 1) @ catalogue)
            .numpy()
            .reshape(len(part), -1, len(items))
            .max(1)
        )
        lengths = np.diff(histories.offsets)[part]
        scores[
            np.repeat(part - start, lengths),
            histories.rows[histories.offsets[start] : histories.offsets[part[-1] + 1]],
        ] = -np.inf
        scores[:, 0] = -np.inf
        ranks.append(ranks_from_scores(scores, validation.target_rows[part]))
    found = np.concatenate(ranks)
    return {"hit_rate_at_10": hit_rate(found, 10), "ndcg_at_10": ndcg(found, 10)}
