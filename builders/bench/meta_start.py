"""Learns how a new user's vector starts and how it steps after each click: over past users' first clicks.

Items are vectors that stay as they are, and a user is a vector whose products with them are logits. It starts
at one of G learned vectors, by the group of the first click, and takes S steps down the cross entropy of the
clicks so far (inner loss), each with a learned size a component; a click counts by a learned weight of its
age. All that is learned by what the stepped vector says of the next new item (outer loss). A step's gradient
is in closed form, so the outer one goes through the steps whole.

Sources: ANIL (Raghu et al., ICLR 2020): only the head adapts, here the user's vector; MAML's second-order
gradient (Finn et al., ICML 2017); Meta-SGD (Li et al., 2017) for the sizes a component.

Axes: Q tasks (a user after some clicks), C clicks, N candidates, I items, D embedding, S steps, G groups.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import faiss
import numpy as np
import torch
from torch import Tensor, nn

from ensemble.arrays import Array

UPDATES = 600
_BATCH, _UNIFORM, _RATE = 256, 1024, 0.03
_TOLD = 6  # mean losses in a report


@dataclass(frozen=True)
class Tasks:
    """Holds users after their first clicks, and the next item that was new to them."""

    clicks: Array  # [Q, C] int64, padded with values below 1
    wanted: Array  # [Q] int64

    def take(self, rows: Array) -> Tasks:
        """Gives some of them."""
        return Tasks(self.clicks[rows], self.wanted[rows])


class MetaStart(nn.Module):
    """Holds starts [G, D], step sizes [S, D], clicks' weights by age [C] and the groups' centres [G, D]."""

    centres: Tensor

    def __init__(self, centres: Array, steps: int, clicks: int) -> None:
        super().__init__()
        groups, dim = centres.shape
        self.register_buffer("centres", torch.from_numpy(centres))
        self.start = nn.Parameter(torch.zeros(groups, dim))
        self.sizes = nn.Parameter(torch.full((steps, dim), 1.0 / max(1, steps)))
        self.ages = nn.Parameter(torch.zeros(clicks))  # the newest click last

    def forward(self, clicked: Tensor, known: Tensor, candidates: Tensor, log_chance: Tensor) -> Tensor:
        """Adapts to clicked embeddings [Q, C, D], known [Q, C] bool, against candidates [N, D]: [Q, D].

        log_chance [N] float32 is that of each candidate of being one: 0 where all items are.
        """
        first = clicked[torch.arange(len(known)), known.float().argmax(1)]
        users = self.start[(first @ self.centres.T).argmax(1)]
        weights = torch.where(known, self.ages, -torch.inf).softmax(1)
        mean = (clicked * weights[..., None]).sum(1)
        for size in self.sizes:
            chance = (users @ candidates.T - log_chance).softmax(1)
            users = users - size * (chance @ candidates - mean)
        return users


@dataclass
class Learned:
    """Holds a trained start over fixed items."""

    items: Tensor  # [I + 1, D]
    taken: Array  # [n] int64, the items that somebody took: the inner loss's candidates
    model: MetaStart
    losses: list[float] = field(default_factory=list)  # the mean outer loss of each sixth of the updates

    @torch.no_grad()
    def users(self, clicks: Array) -> Array:
        """Gives the stepped vectors [Q, D] float32 of clicks [Q, C] int64, padded with values below 1."""
        candidates = self.items[torch.from_numpy(self.taken)]
        parts = []
        for start in range(0, len(clicks), _BATCH):
            rows = torch.from_numpy(np.maximum(clicks[start : start + _BATCH], 0))
            parts.append(self.model(self.items[rows], rows > 0, candidates, torch.zeros(len(candidates))))
        return torch.cat(parts).numpy() if parts else np.zeros((0, self.items.shape[1]), np.float32)


def learn(
    items: Array,
    counts: Array,
    tasks: Tasks,
    *,
    steps: int,
    groups: int,
    seed: int = 0,
    updates: int = UPDATES,
) -> Learned:
    """Trains starts, sizes and weights on past users' tasks.

    items [I + 1, D] float32 stay as they are; counts [I + 1] say how often each was taken in training, and
    those of 0 are no candidates. Same arguments, threads and machine: the same result.
    """
    rng = np.random.default_rng(seed)
    taken = np.flatnonzero(counts)
    taken = taken[taken > 0]
    share = counts / max(1, counts.sum())
    model = MetaStart(_centres(items[taken], groups, seed), steps, tasks.clicks.shape[1])
    learned = Learned(torch.from_numpy(np.ascontiguousarray(items)), taken, model)
    optimizer = torch.optim.Adam(model.parameters(), lr=_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
    losses = []
    for _ in range(updates):
        loss = _loss(learned, tasks.take(rng.integers(0, len(tasks.wanted), _BATCH)), share, rng)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    learned.losses = [float(np.mean(part)) for part in np.array_split(losses, _TOLD)]
    return learned


def _loss(learned: Learned, batch: Tasks, share: Array, rng: np.random.Generator) -> Tensor:
    """Gives the outer loss, a sampled softmax with logQ as the encoders' (encoders/training.py): candidates
    are the batch's own items and uniform ones, in both loops the same."""
    own = np.concatenate([batch.clicks[batch.clicks > 0], batch.wanted])
    rows = np.union1d(own, rng.choice(learned.taken, _UNIFORM))
    missed = len(own) * np.log1p(-share[rows]) + _UNIFORM * np.log1p(-1 / max(2, len(learned.taken)))
    log_chance = torch.from_numpy(np.log(-np.expm1(missed))).float()
    clicks = torch.from_numpy(np.maximum(batch.clicks, 0))
    candidates = learned.items[torch.from_numpy(rows)]
    users = learned.model(learned.items[clicks], clicks > 0, candidates, log_chance)
    logits = users @ candidates.T - log_chance
    return nn.functional.cross_entropy(logits, torch.from_numpy(np.searchsorted(rows, batch.wanted)))


def _centres(items: Array, groups: int, seed: int) -> Array:
    """Finds the centres [G, D] of groups of items [n, D], whose lengths are alike, by k-means."""
    if groups <= 1:
        return np.zeros((1, items.shape[1]), np.float32)
    means = faiss.Kmeans(items.shape[1], groups, niter=20, seed=seed + 1, spherical=True)
    means.train(np.ascontiguousarray(items, np.float32))
    return np.asarray(means.centroids)
