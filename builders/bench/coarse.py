"""Distils a coarse ranker from the ranker, to say what one could gain (depth.py); none is served.

    score = item features . (what is known of the user x matrix + bias) + source scores . weights

Linear in the items' features, it costs an item next to nothing; it learns the ranker's own order of all that
recall gathers. Source: ListNet (Cao et al., ICML 2007), with the teacher's places for labels as in ranking
distillation (Tang & Wang, KDD 2018). DECISIONS.md says why it is not served.

Axes: Q users, G gathered items, U what is known of a user, F item features, S recall sources.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import torch

from builders.data.dataset import Targets
from builders.export.verifier import BATCH, Scored, Verifier
from ensemble.arrays import Array

_EPOCHS, _BATCH, _RATE, _DECAY = 15, 32, 0.005, 0.1
_PLACES, _FALL = 10, 1.5  # a place counts 1 / (10 + place) ^ 1.5: of the coarse order the first tens matter


@dataclass(frozen=True)
class Gathered:
    """Holds what the ranker makes of all that recall gathers for some users."""

    known: Array  # [Q, U] float32, what the chain knows of each user
    rows: Array  # [Q, G] int64, in recall's order, -1 where padded
    source_scores: Array  # [Q, G, S] float32
    blended: Array  # [Q, G] float32, the score that sorts the list; -inf where padded

    def take(self, chosen: slice) -> Gathered:
        """Picks some of the users."""
        return Gathered(*(getattr(self, one.name)[chosen] for one in fields(self)))


def gather(verifier: Verifier, targets: Targets) -> Gathered:
    """Asks recall as it is set, and the ranker about all that it gives, for each target."""
    parts = []
    for start in range(0, len(targets.user_rows), BATCH):
        piece = slice(start, start + BATCH)
        one = verifier.scored(targets.user_rows[piece], targets.history_ends[piece])
        found = one.found["candidate_rows"], one.found["candidate_scores"]
        parts.append((known_of(one), *found, one.blended))
    return Gathered(*(np.concatenate(of) for of in zip(*parts, strict=True)))


def known_of(one: Scored) -> Array:
    """Gives what the chain knows of users before recall [B, U] float32: embeddings, the history's mean and
    newest item as the ranker sees them, features and state."""
    history, there = one.tensors["history_features"], one.tensors["history_mask"][..., None]
    mean = (history * there).sum(axis=1) / np.maximum(there.sum(axis=1), 1)
    own = (one.tensors[name] for name in ("user_features", "user_values", "user_state"))
    parts = [one.query.reshape(len(history), -1), mean, history[:, -1] * there[:, -1], *own]
    return np.concatenate(parts, axis=1).astype(np.float32)


@dataclass(frozen=True)
class Coarse:
    """Holds a coarse ranker."""

    matrix: Array  # [U, F] float32
    bias: Array  # [F] float32
    source_weights: Array  # [S] float32

    def scores(self, known: Array, features: Array, source_scores: Array) -> Array:
        """Scores items' features [B, G, F] float32 with source_scores [B, G, S] for users [B, U]: [B, G]."""
        wanted = known @ self.matrix + self.bias
        return np.matmul(features, wanted[:, :, None])[..., 0] + source_scores @ self.source_weights

    def leaves(self, of: Gathered, features: Array, count: int) -> Gathered:
        """Leaves of each user's items the `count` best: `blended` is -inf for all others; features [I + 1, F]
        are the items'."""
        parts = []
        for start in range(0, len(of.rows), BATCH):
            one = of.take(slice(start, start + BATCH))
            scores = self.scores(one.known, features[np.maximum(one.rows, 0)], one.source_scores)
            order = np.lexsort((one.rows, np.where(one.rows > 0, -scores, np.inf)), axis=-1)
            kept = np.zeros(one.rows.shape, bool)
            np.put_along_axis(kept, order[:, :count], True, axis=1)
            parts.append(np.where(kept, one.blended, -np.inf))
        return Gathered(of.known, of.rows, of.source_scores, np.concatenate(parts))


def distil(taught: Gathered, features: Array, seed: int = 0) -> Coarse:
    """Learns the order of `blended` from what is known of users, the items' features [I + 1, F] and source
    scores; the same seed gives the same numbers."""
    there = torch.from_numpy(taught.rows > 0)
    rows, labels = torch.from_numpy(np.maximum(taught.rows, 0)), torch.from_numpy(_labels(taught.blended))
    table = torch.from_numpy(np.array(features, np.float32))
    known, scores = torch.from_numpy(taught.known), torch.from_numpy(taught.source_scores)
    # standardized, so that one rate fits all; undone at the end
    means = [of.mean(0) for of in (known, table[1:])]
    scales = [1 / (of.std(0) + 1e-6) for of in (known, table[1:], scores[there])]
    known, table = ((of - mean) * by for of, mean, by in zip((known, table), means, scales[:2], strict=True))
    scores = scores * scales[2]
    shapes = ((known.shape[1], table.shape[1]), (table.shape[1],), (scores.shape[2],))
    matrix, bias, weights = (torch.zeros(shape, requires_grad=True) for shape in shapes)
    optimizer = torch.optim.AdamW((matrix, bias, weights), lr=_RATE, weight_decay=_DECAY)
    steps = _EPOCHS * -(-len(rows) // _BATCH)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, steps)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(_EPOCHS):
        for chosen in torch.randperm(len(rows), generator=generator).split(_BATCH):
            wanted = (known[chosen] @ matrix + bias).unsqueeze(2)
            logits = (table[rows[chosen]] @ wanted).squeeze(2) + scores[chosen] @ weights
            logits = logits.masked_fill(~there[chosen], -1e4)
            loss = -(labels[chosen] * logits.log_softmax(1)).sum(1).mean()
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        whole = scales[0][:, None] * matrix * scales[1]
        constant = bias * scales[1] - means[0] @ whole  # what an item's own mean adds is the same for all
        return Coarse(whole.numpy(), constant.numpy(), (weights * scales[2]).numpy())


def _labels(blended: Array) -> Array:
    """Gives each item's share [Q, G] float32 of its list, by its place in the ranker's order; 0 where
    padded."""
    place = np.argsort(np.argsort(-blended, axis=1, kind="stable"), axis=1)
    share = np.where(np.isfinite(blended), 1 / (_PLACES + place) ** _FALL, 0).astype(np.float32)
    return share / np.maximum(share.sum(axis=1, keepdims=True), 1e-9)
