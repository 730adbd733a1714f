"""Trains the item and the user encoder together: every position of every sequence predicts its next item.

The loss is a sampled softmax whose candidates are shared by a batch: the batch's own items, uniform ones and,
later in training, mined hard ones. A candidate's logit is lowered by the log of its chance of being one
(logQ; Jean et al. 2015, Yi et al. 2019), so the sum over candidates estimates the sum over the catalogue.
Hard candidates, the snapshot's best items for some of the batch's positions, are there on purpose: their
chance is 1. Easy to hard: their number grows.

Axes: U users, I items, D embedding, P positions that have a next item, N candidates, R x H packed rows and
places.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from builders.encoders.encoders import (
    EncoderCheckpoint,
    EncoderConfig,
    Validation,
    encode_rows,
    evaluate_encoders,
    new_item_encoder,
    new_user_encoder,
)
from builders.encoders.sampled_softmax import RowAdam, SampledSoftmax
from builders.encoders.sequences import PackedRows, Sequences, pack_sequences
from builders.events import EventRows
from builders.layers import narrow_products, training_dtype
from ensemble.arrays import Array


class _Trainer:
    """Holds one training's state: weights, optimizers, the shop's features, the clock of the schedule."""

    def __init__(
        self,
        sequences: Sequences,
        features: tuple[Array, ...],
        config: EncoderConfig,
        seed: int,
        own: nn.Module | None,
        start: Start | None = None,
    ):
        for name, codes, size in (
            ("item", features[0], config.num_item_codes),
            ("user", features[2], config.num_user_codes),
        ):
            if codes.max(initial=0) >= size:
                raise ValueError(
                    f"{name}_codes go up to {codes.max()}, EncoderConfig.num_{name}_codes is {size}: it "
                    "must be larger"
                )
        self.config, self.sequences = config, sequences
        self.item_codes, self.item_values, self.user_codes, self.user_values = (
            torch.from_numpy(np.ascontiguousarray(x)) for x in features
        )
        self.rng, self.steps, self.total_steps = np.random.default_rng(seed), 0, 1
        num_rows = len(features[0])
        self.share = np.bincount(sequences.rows, minlength=num_rows) / max(len(sequences.rows), 1)
        # Items that somebody took. The others are in no batch: negatives that nobody could take teach
        # only that new items are bad. They keep row 0's id row, as an item has that is added live.
        self.taken = 1 + np.flatnonzero(self.share[1:])
        self.table = torch.zeros(num_rows, config.dim)
        if start is None:
            self.table[self.taken] = torch.randn(len(self.taken), config.dim) * 0.02
        self.items = new_item_encoder(config, features[1].shape[1])
        self.own = own
        self.users: Any = own or new_user_encoder(config, features[3].shape[1])
        self.events = EventRows(config.num_kinds, config.dim)
        self.begin = 0.0 if start is None else start.begin
        if start is not None:
            self._take_weights(start.checkpoint)
        self.dense = torch.optim.Adam(
            [*self.items.parameters(), *self.users.parameters(), *self.events.parameters()],
            lr=config.learning_rate,
        )
        self.rows = RowAdam(self.table)
        # item rows [n] and embeddings [n, D] that hard items come from
        self.snapshot: tuple[Array, Tensor] | None = None

    def _take_weights(self, checkpoint: EncoderCheckpoint) -> None:
        """Takes all weights of a trained model; items without a row of their own start at row 0's, as they
        were served until now."""
        self.table[:] = torch.from_numpy(checkpoint.item_ids)
        self.items.load_state_dict(checkpoint.item_state)
        self.users.load_state_dict(checkpoint.user_state)
        self.events.load_state_dict(checkpoint.event_state)

    @property
    def done(self) -> float:
        """Gives the share of the schedule that has passed."""
        return self.begin + (1 - self.begin) * self.steps / self.total_steps

    def learning_rate(self) -> float:
        """Gives the rate now: a linear warm-up, then a half cosine down to 0."""
        return (
            self.config.learning_rate
            * min(1.0, (self.steps + 1) / self.config.warmup_steps)
            * 0.5
            * (1 + np.cos(np.pi * self.done))
        )

    def epoch(self) -> float:
        """Passes once over every sequence; returns the mean loss."""
        config = self.config
        packed = pack_sequences(
            self.sequences, self.rng.permutation(len(self.sequences.offsets) - 1), config.max_history
        )
        order = self.rng.permutation(len(packed.items))
        size = max(1, config.batch_positions // config.max_history)
        self.total_steps = max(-(-len(order) // size) * config.epochs, self.steps + 1)
        self.items.train(), self.users.train()
        parts = [order[start : start + size] for start in range(0, len(order), size)]
        return float(np.mean([self.step(packed.take(part)) for part in parts]))

    def step(self, batch: PackedRows) -> float:
        """Takes one optimizer step; returns its loss."""
        filled, kind = batch.items > 0, training_dtype(self.config.bf16)
        own = np.union1d(batch.items[filled], batch.targets[filled])
        drawn = self.rng.choice(self.taken, self.config.num_uniform)
        rows = np.union1d(own, drawn)
        chance = -np.expm1(
            filled.sum() * np.log1p(-self.share[rows]) + len(drawn) * np.log1p(-1 / len(self.taken))
        )
        leaf, embeddings = self.encode(rows)
        users = self.user_states(batch, embeddings[torch.from_numpy(np.searchsorted(rows, batch.items))])
        leaves = [(rows, leaf)]
        hard = self.mine(users.detach(), rows)
        if len(hard):
            leaf, extra = self.encode(hard)
            leaves.append((hard, leaf))
            embeddings, chance = torch.cat([embeddings, extra]), np.concatenate([chance, np.ones(len(hard))])
        targets = torch.from_numpy(np.searchsorted(rows, batch.targets[filled]))
        if self.config.interests > 1:  # ComiRec: the interest nearest to the target is the one that learns
            nearest = (users.detach() @ embeddings.detach()[targets, :, None]).squeeze(2).argmax(1)
            users = users[torch.arange(len(users)), nearest]
        loss = SampledSoftmax.apply(
            users.flatten(1), embeddings, torch.from_numpy(np.log(chance)).float(), targets, kind
        )
        self.update(loss, leaves)
        return loss.item()

    def encode(self, rows: Array) -> tuple[Tensor, Tensor]:
        """Encodes items [n], some ids hidden: their id rows as a leaf [n, D], item embeddings [n, D]."""
        index = torch.from_numpy(rows)
        leaf = self.table[index].requires_grad_()
        hidden = torch.rand(len(rows), 1) < self.config.id_dropout
        ids = torch.where(hidden, leaf.new_zeros(()), leaf)  # row 0 of the table is and stays zero
        with narrow_products(self.config.bf16):
            return leaf, self.items(ids, self.item_codes[index], self.item_values[index])

    def user_states(self, batch: PackedRows, history: Tensor) -> Tensor:
        """Encodes every filled place of history [R, H, D] -> user embeddings [P, M, D]."""
        history = history + self.events(torch.from_numpy(batch.cells))
        if self.own is not None:
            return self.own_states(batch, history)
        segments = torch.from_numpy(batch.segments)
        seen = (segments[:, :, None] == segments[:, None]) & torch.ones(
            segments.shape[1], segments.shape[1], dtype=torch.bool
        ).tril()
        filled = torch.from_numpy(batch.items > 0)
        owners, place = np.unique(batch.users[batch.items > 0], return_inverse=True)
        with narrow_products(self.config.bf16):
            states = self.users.positions(history, seen)[filled]
            features = self.users.features(self.user_codes[owners], self.user_values[owners])[
                torch.from_numpy(place)
            ]
            hidden = torch.rand(len(states), 1, 1) < self.config.history_dropout
            return self.users.embeddings(torch.where(hidden, self.users.default, states), features)

    def own_states(self, batch: PackedRows, history: Tensor) -> Tensor:
        """Does user_states with a user's own module, which takes no packed rows but a window a place."""
        row, places, inside = batch.windows()
        inside = inside & (self.rng.random(len(row)) >= self.config.history_dropout)[:, None]
        known = torch.from_numpy(inside)
        owners = batch.users[batch.items > 0]
        embeddings = history[torch.from_numpy(row)[:, None], torch.from_numpy(places)] * known[..., None]
        return self.users(embeddings, known, self.user_codes[owners], self.user_values[owners]).float()

    def mine(self, users: Tensor, rows: Array) -> Array:
        """Mines the snapshot's best items for 64 positions, less `rows`: [n] int64 ascending, ever more."""
        begin = self.config.hard_from
        wanted = int(self.config.num_hard * (self.done - begin) / (1 - begin)) if begin < 1 else 0
        if wanted <= 0 or self.snapshot is None:
            return np.zeros(0, np.int64)
        pool, embeddings = self.snapshot
        chosen = users[torch.from_numpy(self.rng.integers(0, len(users), 64)), 0]
        best = (chosen @ embeddings.T).topk(min(1 + wanted // 16, len(pool)), dim=1).indices
        found = np.setdiff1d(pool[best.numpy()], rows)
        return np.sort(self.rng.permutation(found)[:wanted])

    def update(self, loss: Tensor, leaves: list[tuple[Array, Tensor]]) -> None:
        rate = self.learning_rate()
        for group in self.dense.param_groups:
            group["lr"] = rate
        self.dense.zero_grad()
        loss.backward()
        self.dense.step()
        index = torch.from_numpy(np.concatenate([rows for rows, _ in leaves]))
        self.rows.step(index, torch.cat([leaf.grad for _, leaf in leaves if leaf.grad is not None]), rate)
        self.steps += 1

    def checkpoint(self, log: list[dict[str, float]]) -> EncoderCheckpoint:
        parts = self.items, self.users, self.events
        items, users, events = (copy.deepcopy(part.state_dict()) for part in parts)
        return EncoderCheckpoint(self.config, self.table.numpy().copy(), items, users, events, log, self.own)


@dataclass(frozen=True)
class Start:
    """Says where training goes on: from these weights, at this share of the schedule."""

    checkpoint: EncoderCheckpoint
    begin: float


def train_encoders(
    sequences: Sequences,
    item_codes: Array,
    item_values: Array,
    user_codes: Array,
    user_values: Array,
    *,
    config: EncoderConfig,
    seed: int = 0,
    validation: Validation | None = None,
    user_encoder: nn.Module | None = None,
    start: Start | None = None,
    progress: Callable[[dict[str, float]], None] | None = None,
) -> EncoderCheckpoint:
    """Trains both encoders and keeps the epoch of the best validation NDCG@10 (without validation: the last).

    sequences hold training events only; the codes [I + 1, C] int32 and values [I + 1, R] float32 are features
    by item row (row 0 unknown), those of users by the rows of `sequences`; `user_encoder` is the user's own
    in place of ours; with `start`, training goes on from there for config.epochs. Same seed, threads and
    machine: same checkpoint.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        trainer = _Trainer(
            sequences, (item_codes, item_values, user_codes, user_values), config, seed, user_encoder, start
        )
        if start is not None:
            pool = trainer.taken, trainer.rng
            trainer.snapshot = _mining_pool(start.checkpoint, item_codes, item_values, *pool)
        log: list[dict[str, float]] = []
        best, best_score, waited, began = None, -1.0, 0, time.monotonic()
        for epoch in range(1, config.epochs + 1):
            log.append({"epoch": epoch, "loss": trainer.epoch(), "seconds": time.monotonic() - began})
            current = trainer.checkpoint(log)
            trainer.snapshot = _mining_pool(current, item_codes, item_values, trainer.taken, trainer.rng)
            if validation is not None and (epoch % config.evaluate_every == 0 or epoch == config.epochs):
                log[-1] |= evaluate_encoders(
                    current, validation, item_codes, item_values, user_codes, user_values
                )
                improved = log[-1]["ndcg_at_10"] > best_score
                best, best_score = (current, log[-1]["ndcg_at_10"]) if improved else (best, best_score)
                waited = 0 if improved else waited + 1
            if progress is not None:
                progress(log[-1])
            if waited >= config.patience:
                break
        return best or current


def _mining_pool(
    checkpoint: EncoderCheckpoint,
    item_codes: Array,
    item_values: Array,
    taken: Array,
    rng: np.random.Generator,
) -> tuple[Array, Tensor]:
    """Gives at most 65,536 of the items `taken` with their embeddings of now: enough to mine in, at a bounded
    price."""
    rows = rng.permutation(taken)[:65536]
    return rows, torch.from_numpy(encode_rows(checkpoint, rows, item_codes, item_values))
