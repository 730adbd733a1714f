"""Learns which items follow by a network over the graph of what is taken soon before or after.

Each item has a start; one and two steps of messages over its ties bring it what its neighbours have, and what
their neighbours have; a network then reads all three. The messages are computed once, before training (SIGN,
Frasca et al. 2020, after SGC, Wu et al., ICML 2019): there is no layer to train between them. The start is
what the encoders made of the item, or random signs, whose messages are then a projection of the graph alone
(FastRP, Chen et al., CIKM 2019, in Node2Vec's place).

No tie may tell of its own event. Training events fall into parts, and a part is learned with the messages of
the others only: with a clock, parts follow each other, a part knows the ties before it, and a tie counts less
the older it is; without one, parts are users, and a part knows the ties of the other users.

Axes: P events, Q targets, I items, C clicks, N candidates, D embedding, X = 3 D messages.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from builders.encoders.sequences import Sequences, windows
from ensemble.arrays import Array

PARTS = 4
CLICKS = 4
_WINDOW, _HALF_LIVES = 8, 4  # half-lives of a tie within the whole log
_BATCH, _UNIFORM, _RATE, _LENGTH = 512, 1024, 2e-3, 0.07**-0.5


@dataclass(frozen=True)
class Events:
    """Holds training histories as sequences, and when each event was [P]; None: there is no clock."""

    sequences: Sequences
    times: Array | None

    def parts(self) -> Array:
        """Gives the part of each event [P], 0 to PARTS - 1, equal in size: by time or by user."""
        if self.times is not None:
            return np.argsort(np.argsort(self.times, kind="stable")) * PARTS // max(1, len(self.times))
        users = len(self.sequences.offsets) - 1
        part = np.random.default_rng(0).permutation(users) % PARTS
        return np.repeat(part, np.diff(self.sequences.offsets))


def ties(events: Events, known: Array, now: float, num_items: int) -> Tensor:
    """Gives the chances [I + 1, I + 1], sparse, that a step from an item takes each tie, over the events that
    are `known` [P] bool at the time `now`: by 1 / distance within 8 events of a user, both ways, and age."""
    rows = events.sequences.rows
    owner = np.repeat(np.arange(len(events.sequences.offsets) - 1), np.diff(events.sequences.offsets))
    pairs, weights = [], []
    life = 1.0 if events.times is None else max(1.0, float(np.ptp(events.times))) / _HALF_LIVES
    for distance in range(1, _WINDOW + 1):
        same = (owner[:-distance] == owner[distance:]) & known[:-distance] & known[distance:]
        same &= rows[:-distance] != rows[distance:]
        weight = np.full(int(same.sum()), 1 / distance)
        if events.times is not None:
            weight *= 0.5 ** ((now - events.times[distance:][same]) / life)
        before, after = rows[:-distance][same], rows[distance:][same]
        pairs += [np.stack([before, after]), np.stack([after, before])]
        weights += [weight, weight]
    index, weight = np.concatenate(pairs, axis=1), np.concatenate(weights)
    total = np.bincount(index[0], weight, minlength=num_items + 1)
    values = torch.from_numpy(weight / total[index[0]]).float()
    shape = (num_items + 1, num_items + 1)
    place = torch.from_numpy(index)
    return torch.sparse_coo_tensor(place, values, shape, check_invariants=False).coalesce()


def messages(start: Array, chances: Tensor) -> Tensor:
    """Gives each item's start [I + 1, D] and what one and two steps bring it: [I + 1, 3 D] float32."""
    states = [torch.from_numpy(np.ascontiguousarray(start, np.float32))]
    for _ in range(2):
        states.append(chances @ states[-1])
    return torch.cat([functional.normalize(state, dim=1) for state in states], dim=1)


def random_start(num_items: int, dim: int, seed: int) -> Array:
    """Gives random signs [I + 1, D] float32."""
    return np.random.default_rng(seed).choice(np.array([-1, 1], np.float32), (num_items + 1, dim))


class GraphNetwork(nn.Module):
    """Reads messages as an item that was taken, and as one that may follow; weighs clicks by their age."""

    def __init__(self, width: int, dim: int = 128) -> None:
        super().__init__()
        self.took, self.follows = (
            nn.Sequential(nn.Dropout(0.3), nn.Linear(width, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))
            for _ in range(2)
        )
        self.ages = nn.Parameter(-torch.arange(CLICKS - 1, -1, -1).float())

    def users(self, took: Tensor, known: Tensor) -> Tensor:
        """Gives users [Q, D] whose clicks have messages `took` [Q, C, X], `known` [Q, C] bool."""
        logits = torch.where(known, self.ages[-known.shape[1] :], torch.full((), -1e4))
        states = (self.took(took) * logits.softmax(1)[..., None]).sum(1)
        return _LENGTH * functional.normalize(states, dim=1)

    def items(self, rows: Tensor) -> Tensor:
        """Gives items [N, D] by their messages [N, X]."""
        return _LENGTH * functional.normalize(self.follows(rows), dim=1)


@dataclass(frozen=True)
class GraphScores:
    """Holds a trained network over the whole training graph."""

    model: GraphNetwork
    states: Tensor  # [I + 1, X]
    items: Tensor  # [I + 1, D]

    @torch.no_grad()
    def __call__(self, clicks: Array) -> Array:
        """Scores all items [Q, I + 1] float32 for clicks [Q, C] int64, newest last, padded below 1."""
        rows = torch.from_numpy(np.maximum(clicks[:, -CLICKS:], 0))
        return (self.model.users(self.states[rows], rows > 0) @ self.items.T).numpy()


def learn(
    events: Events, start: Array, *, seed: int = 0, updates: int = 500
) -> tuple[GraphScores, list[float]]:
    """Trains on the events from a start [I + 1, D]; gives the scores, and the mean loss of each sixth."""
    num_items, rng = len(start) - 1, np.random.default_rng(seed)
    sequences, part = events.sequences, events.parts()
    counts = np.bincount(sequences.rows, minlength=num_items + 1)
    taken, share = np.flatnonzero(counts), counts / max(1, counts.sum())
    of_part = {
        at: messages(start, ties(events, *_known(events, part, at), num_items)) for at in _learned(events)
    }
    first = np.zeros(len(part), bool)
    first[sequences.offsets[:-1][np.diff(sequences.offsets) > 0]] = True
    places = {at: np.flatnonzero((part == at) & ~first) for at in of_part}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = GraphNetwork(3 * start.shape[1])
        optimizer = torch.optim.Adam(model.parameters(), lr=_RATE, weight_decay=1e-5)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
        losses = []
        for update in range(updates):
            at = list(of_part)[update % len(of_part)]
            if not len(places[at]):
                continue
            chosen = rng.choice(places[at], _BATCH)
            loss = _loss(model, of_part[at], sequences, chosen, taken, share, rng)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
    model.eval()
    now = 0.0 if events.times is None else float(events.times.max(initial=0))
    states = messages(start, ties(events, np.ones(len(part), bool), now, num_items))
    with torch.no_grad():
        scores = GraphScores(model, states, model.items(states))
    return scores, [round(float(np.mean(one)), 3) for one in np.array_split(losses, 6)]


def _learned(events: Events) -> range:
    """Says which parts are learned: of those with a clock, all that have ties before them."""
    return range(1 if events.times is not None else 0, PARTS)


def _known(events: Events, part: Array, at: int) -> tuple[Array, float]:
    """Says which events [P] a part may know, and what time it is then."""
    if events.times is None:
        return part != at, 0.0
    return part < at, float(events.times[part < at].max(initial=0))


def _loss(
    model: GraphNetwork,
    states: Tensor,
    sequences: Sequences,
    places: Array,
    taken: Array,
    share: Array,
    rng: np.random.Generator,
) -> Tensor:
    """Gives a sampled softmax with logQ, as the encoders' (encoders/training.py), of the events at `places`
    by the clicks before them."""
    owner = np.searchsorted(sequences.offsets, places, side="right") - 1
    past = windows(
        Sequences(np.stack([sequences.offsets[owner], places], 1).ravel(), sequences.rows),
        2 * np.arange(len(places)),
        CLICKS,
    )
    wanted = sequences.rows[places]
    rows = np.union1d(wanted, rng.choice(taken, _UNIFORM))
    missed = len(wanted) * np.log1p(-share[rows]) + _UNIFORM * np.log1p(-1 / max(2, len(taken)))
    log_chance = torch.from_numpy(np.log(-np.expm1(missed))).float()
    index = torch.from_numpy(past)
    users = model.users(states[index], index > 0)
    logits = users @ model.items(states[torch.from_numpy(rows)]).T - log_chance
    return functional.cross_entropy(logits, torch.from_numpy(np.searchsorted(rows, wanted)))
