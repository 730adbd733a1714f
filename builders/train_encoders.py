"""Trains the item and the user encoder together: every position of every sequence predicts its next item.

The loss is a sampled softmax whose candidates are shared by a batch: the batch's own items, uniform ones and, later in
training, mined hard ones. A candidate's logit is lowered by the log of its chance of being one (logQ; Jean et al. 2015,
Yi et al. 2019), so the sum over candidates estimates the sum over the catalogue. Hard candidates, the snapshot's best
items for some of the batch's positions, are there on purpose: their chance is 1. Easy to hard: their number grows.

Axes: U users, I items, D embedding, P positions that have a next item, N candidates, R x H packed rows and places.
"""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from builders.metrics import hit_rate, ndcg, ranks_from_scores
from builders.models import ItemEncoder, UserEncoder
from builders.sampled_softmax import RowAdam, SampledSoftmax
from builders.sequences import PackedRows, Sequences, pack_sequences, windows

Array = np.ndarray
Slices = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class EncoderConfig:
    """What is trained and how. A catalogue of 10^4 items (Beauty) learns in half the epochs at learning_rate 3e-3."""

    num_item_codes: int = 1  # size of the items' joint code table
    item_code_slices: Slices = ()  # (start, stop) columns of each feature
    num_user_codes: int = 1
    user_code_slices: Slices = ()
    dim: int = 128
    max_history: int = 50
    interests: int = 1
    layers: int = 2
    heads: int = 4
    dropout: float = 0.3
    temperature: float = 0.07
    id_dropout: float = 0.1  # share of ids replaced by row 0, so that features learn to speak for a cold item
    history_dropout: float = 0.02  # share of histories hidden, so that the default learns what a new user wants
    epochs: int = 20
    batch_positions: int = 4096
    learning_rate: float = 1e-3
    warmup_steps: int = 100
    num_uniform: int = 2048  # uniform candidates of a batch
    num_hard: int = 512  # hard candidates of a batch in the last epoch (0 = none)
    hard_from: float = 0.3  # share of training before the first hard candidate
    evaluate_every: int = 2  # epochs
    patience: int = 3  # evaluations without a better NDCG@10 before training stops
    bf16: bool = True

    @classmethod
    def tiny(cls, **changes: Any) -> "EncoderConfig":
        """A shop of hundreds of users in seconds."""
        small = cls(dim=32, layers=1, heads=2, epochs=12, batch_positions=512, learning_rate=5e-3, warmup_steps=10, num_uniform=128, num_hard=64)
        return replace(small, **changes)


@dataclass(frozen=True)
class Validation:
    """The next item of some histories: of user_rows[q], who has histories' row q, it is target_rows[q]."""

    histories: Sequences
    target_rows: Array  # [Q] int64
    user_rows: Array  # [Q] int64, rows of user_codes and user_values


@dataclass(frozen=True)
class EncoderCheckpoint:
    """Torch weights of both encoders and the id table, row 0 = unknown item."""

    config: EncoderConfig
    item_ids: Array  # [I + 1, D] float32
    item_state: dict[str, Tensor]
    user_state: dict[str, Tensor]
    log: list[dict[str, float]] = field(default_factory=list)  # one entry an epoch: epoch, loss, seconds, ndcg_at_10

    def item_encoder(self) -> ItemEncoder:
        encoder = _item_encoder(self.config, self.item_state["values.weight"].shape[1])
        encoder.load_state_dict(self.item_state)
        return encoder.eval()

    def user_encoder(self) -> UserEncoder:
        encoder = _user_encoder(self.config, self.user_state["values.weight"].shape[1])
        encoder.load_state_dict(self.user_state)
        return encoder.eval()


def _item_encoder(config: EncoderConfig, num_values: int) -> ItemEncoder:
    return ItemEncoder(
        dim=config.dim, num_codes=config.num_item_codes, code_slices=config.item_code_slices,
        num_values=num_values, dropout=config.dropout, temperature=config.temperature,
    )  # fmt: skip


def _user_encoder(config: EncoderConfig, num_values: int) -> UserEncoder:
    return UserEncoder(
        dim=config.dim, num_user_codes=config.num_user_codes, user_code_slices=config.user_code_slices,
        num_user_values=num_values, interests=config.interests, layers=config.layers, heads=config.heads,
        dropout=config.dropout, temperature=config.temperature, max_history=config.max_history,
    )  # fmt: skip


class _Trainer:
    """The state of one training: weights, optimizers, the shop's features as tensors, the clock of the schedule."""

    def __init__(self, sequences: Sequences, features: tuple[Array, ...], config: EncoderConfig, seed: int):
        for name, codes, size in (("item", features[0], config.num_item_codes), ("user", features[2], config.num_user_codes)):
            if codes.max(initial=0) >= size:
                raise ValueError(f"{name}_codes go up to {codes.max()}, EncoderConfig.num_{name}_codes is {size}: it must be larger")
        self.config, self.sequences = config, sequences
        self.item_codes, self.item_values, self.user_codes, self.user_values = (torch.from_numpy(np.ascontiguousarray(x)) for x in features)
        self.rng, self.steps, self.total_steps = np.random.default_rng(seed), 0, 1
        num_rows = len(features[0])
        self.table = torch.randn(num_rows, config.dim) * 0.02
        self.table[0] = 0.0
        self.items = _item_encoder(config, features[1].shape[1])
        self.users = _user_encoder(config, features[3].shape[1])
        self.dense = torch.optim.Adam([*self.items.parameters(), *self.users.parameters()], lr=config.learning_rate)
        self.rows = RowAdam(self.table)
        self.share = np.bincount(sequences.rows, minlength=num_rows) / max(len(sequences.rows), 1)
        self.snapshot: tuple[Array, Tensor] | None = None  # item rows [n] and embeddings [n, D] that hard items come from

    def learning_rate(self) -> float:
        """Linear warm-up, then a half cosine down to 0."""
        done = self.steps / self.total_steps
        return self.config.learning_rate * min(1.0, (self.steps + 1) / self.config.warmup_steps) * 0.5 * (1 + np.cos(np.pi * done))

    def epoch(self) -> float:
        """One pass over every sequence -> mean loss."""
        config = self.config
        packed = pack_sequences(self.sequences, self.rng.permutation(len(self.sequences.offsets) - 1), config.max_history)
        order = self.rng.permutation(len(packed.items))
        size = max(1, config.batch_positions // config.max_history)
        self.total_steps = max(-(-len(order) // size) * config.epochs, self.steps + 1)
        self.items.train(), self.users.train()
        parts = [order[start : start + size] for start in range(0, len(order), size)]
        return float(np.mean([self.step(packed.take(part)) for part in parts]))

    def step(self, batch: PackedRows) -> float:
        """One optimizer step -> loss."""
        filled, kind = batch.items > 0, torch.bfloat16 if self.config.bf16 else torch.float32
        own = np.union1d(batch.items[filled], batch.targets[filled])
        drawn = self.rng.integers(1, len(self.table), self.config.num_uniform)
        rows = np.union1d(own, drawn)
        chance = -np.expm1(filled.sum() * np.log1p(-self.share[rows]) + len(drawn) * np.log1p(-1 / len(self.table)))
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
        loss = SampledSoftmax.apply(users.flatten(1), embeddings, torch.from_numpy(np.log(chance)).float(), targets, kind)
        self.update(loss, leaves)
        return loss.item()

    def encode(self, rows: Array) -> tuple[Tensor, Tensor]:
        """rows [n] int64 -> (their id rows as a leaf [n, D], item embeddings [n, D]), some of the ids hidden."""
        index = torch.from_numpy(rows)
        leaf = self.table[index].requires_grad_()
        hidden = torch.rand(len(rows), 1) < self.config.id_dropout
        ids = torch.where(hidden, leaf.new_zeros(()), leaf)  # row 0 of the table is and stays zero
        with torch.autocast("cpu", torch.bfloat16, enabled=self.config.bf16):
            return leaf, self.items(ids, self.item_codes[index], self.item_values[index])

    def user_states(self, batch: PackedRows, history: Tensor) -> Tensor:
        """history [R, H, D] -> user embeddings of every filled place [P, M, D]."""
        segments = torch.from_numpy(batch.segments)
        seen = (segments[:, :, None] == segments[:, None]) & torch.ones(segments.shape[1], segments.shape[1], dtype=torch.bool).tril()
        filled = torch.from_numpy(batch.items > 0)
        owners, place = np.unique(batch.users[batch.items > 0], return_inverse=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.config.bf16):
            states = self.users.positions(history, seen)[filled]
            features = self.users.features(self.user_codes[owners], self.user_values[owners])[torch.from_numpy(place)]
            hidden = torch.rand(len(states), 1, 1) < self.config.history_dropout
            return self.users.embeddings(torch.where(hidden, self.users.default, states), features)

    def mine(self, users: Tensor, rows: Array) -> Array:
        """The snapshot's best items for 64 of the positions, less `rows`; ever more of them. -> [n] int64 ascending."""
        begin = self.config.hard_from
        wanted = int(self.config.num_hard * (self.steps / self.total_steps - begin) / (1 - begin)) if begin < 1 else 0
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
        items, users = copy.deepcopy(self.items.state_dict()), copy.deepcopy(self.users.state_dict())
        return EncoderCheckpoint(self.config, self.table.numpy().copy(), items, users, log)


def train_encoders(
    sequences: Sequences, item_codes: Array, item_values: Array, user_codes: Array, user_values: Array, *,
    config: EncoderConfig, seed: int = 0, validation: Validation | None = None, progress: Callable[[dict[str, float]], None] | None = None,
) -> EncoderCheckpoint:  # fmt: skip
    """Both encoders, at the epoch of the best validation NDCG@10 (without validation: the last).

    sequences hold training events only; the codes [I + 1, C] int32 and values [I + 1, R] float32 are features by item row
    (row 0 unknown), those of users by the rows of `sequences`. Same seed, threads and machine: same checkpoint.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        trainer = _Trainer(sequences, (item_codes, item_values, user_codes, user_values), config, seed)
        log: list[dict[str, float]] = []
        best, best_score, waited, start = None, -1.0, 0, time.monotonic()
        for epoch in range(1, config.epochs + 1):
            log.append({"epoch": epoch, "loss": trainer.epoch(), "seconds": time.monotonic() - start})
            current = trainer.checkpoint(log)
            trainer.snapshot = _mining_pool(current, item_codes, item_values, trainer.rng)
            if validation is not None and (epoch % config.evaluate_every == 0 or epoch == config.epochs):
                log[-1] |= evaluate_encoders(current, validation, item_codes, item_values, user_codes, user_values)
                improved = log[-1]["ndcg_at_10"] > best_score
                best, best_score = (current, log[-1]["ndcg_at_10"]) if improved else (best, best_score)
                waited = 0 if improved else waited + 1
            if progress is not None:
                progress(log[-1])
            if waited >= config.patience:
                break
        return best or current


def _mining_pool(checkpoint: EncoderCheckpoint, item_codes: Array, item_values: Array, rng: np.random.Generator) -> tuple[Array, Tensor]:
    """At most 65,536 items with their embeddings of now: enough to find hard ones in, at a bounded price."""
    rows = 1 + rng.permutation(len(item_codes) - 1)[:65536]
    return rows, torch.from_numpy(_encode_rows(checkpoint, rows, item_codes, item_values))


@torch.no_grad()
def _encode_rows(checkpoint: EncoderCheckpoint, rows: Array, item_codes: Array, item_values: Array) -> Array:
    encoder = checkpoint.item_encoder()
    parts = [rows[start : start + 8192] for start in range(0, len(rows), 8192)]
    feeds = [[torch.from_numpy(table[part]) for table in (checkpoint.item_ids, item_codes, item_values)] for part in parts]
    return np.concatenate([encoder(*feed).numpy() for feed in feeds])


def encode_items(checkpoint: EncoderCheckpoint, item_codes: Array, item_values: Array) -> Array:
    """[I + 1, C] int32, [I + 1, R] float32 -> [I + 1, D] float32, row 0 = unknown item. Rows past the id table are new items."""
    new = len(item_codes) - len(checkpoint.item_ids)
    if new > 0:
        checkpoint = replace(checkpoint, item_ids=np.concatenate([checkpoint.item_ids, np.repeat(checkpoint.item_ids[:1], new, axis=0)]))
    return _encode_rows(checkpoint, np.arange(len(item_codes)), item_codes, item_values)


@torch.no_grad()
def encode_users(checkpoint: EncoderCheckpoint, items: Array, histories: Sequences, user_codes: Array, user_values: Array) -> Array:
    """items [I + 1, D] from encode_items, features by the rows of `histories` -> user embeddings [U, M, D] float32."""
    encoder, lengths = checkpoint.user_encoder(), np.diff(histories.offsets)
    out = np.empty((len(lengths), checkpoint.config.interests, checkpoint.config.dim), np.float32)
    order = np.argsort(lengths, kind="stable")  # short windows together: their common padding is cut off
    for start in range(0, len(order), 1024):
        users = order[start : start + 1024]
        rows = windows(histories, users, min(max(int(lengths[users].max()), 1), checkpoint.config.max_history))
        feeds = items[rows], rows > 0, user_codes[users], user_values[users]
        out[users] = encoder(*map(torch.from_numpy, feeds)).numpy()
    return out


def evaluate_encoders(
    checkpoint: EncoderCheckpoint, validation: Validation, item_codes: Array, item_values: Array, user_codes: Array, user_values: Array
) -> dict[str, float]:
    """Full ranking, items of the history removed, score = best dot product over interests -> {hit_rate_at_10, ndcg_at_10}."""
    items = encode_items(checkpoint, item_codes, item_values)
    histories, rows, catalogue = validation.histories, validation.user_rows, torch.from_numpy(items).T
    users = encode_users(checkpoint, items, histories, user_codes[rows], user_values[rows])
    ranks = []
    for start in range(0, len(rows), 512):
        part = np.arange(start, min(start + 512, len(rows)))
        scores = (torch.from_numpy(users[part]).flatten(0, 1) @ catalogue).numpy().reshape(len(part), -1, len(items)).max(1)
        lengths = np.diff(histories.offsets)[part]
        scores[np.repeat(part - start, lengths), histories.rows[histories.offsets[start] : histories.offsets[part[-1] + 1]]] = -np.inf
        scores[:, 0] = -np.inf
        ranks.append(ranks_from_scores(scores, validation.target_rows[part]))
    found = np.concatenate(ranks)
    return {"hit_rate_at_10": hit_rate(found, 10), "ndcg_at_10": ndcg(found, 10)}
