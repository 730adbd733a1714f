"""Makes the lists that the ranker learns from: one user at one time, with items shown or recalled there.

Impressions that share user and history share a list, so that user-side work is done once for them. Axes: L
lists, N items a list (padded with -1), H history, S recall sources, T tasks, E impressions, A user state, G
candidate state, P item rates. States are kept in 16 bits: they are small numbers in steps of a hundredth.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import numpy as np

from builders.data.dataset import Dataset, Impressions, Targets, moments, past_windows
from builders.data.places import places_of
from builders.index.offline import CandidateFunction, ScoreFunction
from ensemble.activity import (
    activity,
    activity_width,
    context_columns,
    recencies,
    state_width,
    touches,
    touches_width,
)
from ensemble.arrays import Array
from ensemble.context import context_state
from ensemble.schema import Schema

_CHUNK = 4096  # lists scored at once


@dataclass(frozen=True)
class Lists:
    """Holds rows of the training set."""

    user_rows: Array  # [L] int64
    history_ends: Array  # [L] int64
    item_rows: Array  # [L, N] int64, -1 where padded
    scores: Array  # [L, N, S] float32
    labels: Array  # [L, N, T] float32, NaN where not defined or padded
    user_state: Array  # [L, N or 1, A] float16
    candidate_state: Array  # [L, N or 1, G] float16
    # [L, N, P] float16, the items' rates as they were known then; None: as they were when training ended
    item_rates: Array | None = None
    places: Array | None = None  # [L, N] uint8, where each was shown (positions.py); None: no list says it

    def __len__(self) -> int:
        return len(self.user_rows)

    def take(self, index: Array) -> Lists:
        """Gives the lists at `index`."""
        arrays = ((entry.name, getattr(self, entry.name)) for entry in fields(self))
        return Lists(**{name: array[index] for name, array in arrays if array is not None})


@dataclass(frozen=True)
class States:
    """Holds what was known of impressions at their own times."""

    users: Array  # [E, A] float16
    candidates: Array  # [E, G] float16
    item_rates: Array | None = None  # [E, P] float16; None: those that the items' features hold


def states_of(
    dataset: Dataset, impressions: Impressions, user_rates: Array, item_rates: Array | None = None
) -> States:
    """Describes the users and items of impressions [E] at their times; user_rates [E, Q], item_rates [E,
    P]."""
    schema, count = dataset.schema, len(impressions.times)
    users = np.zeros((count, state_width(schema)), np.float16)
    candidates = np.zeros((count, touches_width(schema)), np.float16)
    users[:, context_columns(schema).stop :] = user_rates
    if impressions.contexts is not None:
        users[:, context_columns(schema)] = context_state(schema, np.asarray(impressions.contexts))
    for start in range(0, count, _CHUNK):
        part = slice(start, start + _CHUNK)
        past = past_windows(
            dataset.histories,
            impressions.user_rows[part],
            impressions.history_ends[part],
            schema.sizes.seen,
        )
        near = recencies(schema, past.times, past.kinds, np.asarray(impressions.times[part], np.float64))
        users[part, : activity_width(schema)] = activity(schema, near, past.kinds)
        items = np.asarray(impressions.item_rows[part])[:, None]
        candidates[part] = touches(schema, past.rows, near, past.kinds, items)[:, 0]
    return States(users, candidates, None if item_rates is None else item_rates.astype(np.float16))


def lists_from_impressions(
    impressions: Impressions, scores: ScoreFunction, states: States, *, by_moment: bool = False
) -> tuple[Lists, Array]:
    """Groups impressions [E] into lists; gives also the place [E] of each in the flattened [L * N].
    `by_moment` keeps impressions of different times or contexts apart, so that a list has one user_state."""
    said = _context_keys(impressions)
    order = np.lexsort((said, impressions.times, impressions.history_ends, impressions.user_rows))
    users, ends = impressions.user_rows[order], impressions.history_ends[order]
    first = np.ones(len(order), bool)
    first[1:] = (users[1:] != users[:-1]) | (ends[1:] != ends[:-1])
    if by_moment:
        for one in (impressions.times[order], said[order]):
            first[1:] |= one[1:] != one[:-1]
    starts = np.flatnonzero(first)
    within = np.arange(len(order)) - np.repeat(starts, np.diff(np.append(starts, len(order))))
    width = _best_width(np.diff(np.append(starts, len(order))))
    first |= within % width == 0  # longer groups are cut into lists of `width`
    list_index, column = np.cumsum(first) - 1, within % width
    num_lists = int(first.sum())
    item_rows = np.full((num_lists, width), -1, np.int64)
    item_rows[list_index, column] = impressions.item_rows[order]

    def spread(values: Array, padding: float) -> Array:
        out = np.full((num_lists, width, values.shape[1]), padding, values.dtype)
        out[list_index, column] = values[order]
        return out

    places = np.empty(len(order), np.int64)
    places[order] = list_index * width + column
    user_rows, history_ends = users[first], ends[first]
    return Lists(
        user_rows,
        history_ends,
        item_rows,
        score_in_chunks(scores, user_rows, history_ends, item_rows),
        spread(np.asarray(impressions.labels), np.nan),
        spread(states.users, 0),
        spread(states.candidates, 0),
        None if states.item_rates is None else spread(states.item_rates, 0),
        spread(places_of(impressions.positions)[:, None], 0)[:, :, 0]
        if impressions.positions.any()
        else None,
    ), places


def _context_keys(impressions: Impressions) -> Array:
    """Gives a number for each impression's context [E]: equal ones for equal contexts."""
    if impressions.contexts is None:
        return np.zeros(len(impressions.times), np.int64)
    contexts = np.nan_to_num(np.asarray(impressions.contexts), nan=-1e9)
    return np.unique(contexts, axis=0, return_inverse=True)[1].ravel()


def _best_width(group_sizes: Array) -> int:
    """Chooses the items a list so that work is least: a list's history costs as much as four items."""
    if not len(group_sizes):
        return 1
    widths = (1, 2, 4, 8)  # wider ones would make batches of few users
    return min(widths, key=lambda width: int(np.ceil(group_sizes / width).sum()) * (width + 4))


def no_scores(schema: Schema) -> ScoreFunction:
    """Makes what gives nothing of recall's scores [L, N, S]: its sources have counted the very clicks that
    label the training impressions. In a shop of few clicks an item even its plain count tells them."""
    return lambda user_rows, history_ends, item_rows: np.zeros(
        (*item_rows.shape, len(schema.sources)), np.float32
    )


def score_in_chunks(scores: ScoreFunction, user_rows: Array, history_ends: Array, item_rows: Array) -> Array:
    """Scores all lists, a few thousand at a time: [L, N, S] float32, 0 where padded."""
    starts = range(0, max(1, len(item_rows)), _CHUNK)  # of no list there is a piece, too: it has the width
    parts = [slice(start, start + _CHUNK) for start in starts]
    out = np.concatenate([scores(user_rows[part], history_ends[part], item_rows[part]) for part in parts])
    out[item_rows <= 0] = 0
    return out


def lists_from_targets(
    dataset: Dataset, targets: Targets, candidates: CandidateFunction, user_rates: Array
) -> Lists:
    """Makes lists of recall's candidates for each target; its label is 1 if it was recalled, all others 0.
    user_rates [U + 1, Q]. Candidates are new to their users, so their state is 0."""
    parts = []
    for start in range(0, len(targets.user_rows), _CHUNK):
        part = slice(start, start + _CHUNK)
        parts.append(candidates(targets.user_rows[part], targets.history_ends[part]))
    width = dataset.schema.sizes.candidates
    rows = np.concatenate([rows for rows, _ in parts]) if parts else np.zeros((0, width), np.int64)
    scores = (
        np.concatenate([scores for _, scores in parts])
        if parts
        else np.zeros((0, width, len(dataset.schema.sources)), np.float32)
    )
    labels = np.where(rows > 0, (rows == targets.item_rows[:, None]).astype(np.float32), np.float32(np.nan))
    schema = dataset.schema
    return Lists(
        targets.user_rows,
        targets.history_ends,
        rows,
        scores.astype(np.float32),
        labels[:, :, None],
        _states_of_targets(dataset, targets, user_rates)[:, None],
        np.zeros((len(rows), 1, touches_width(schema)), np.float16),
    )


def _states_of_targets(dataset: Dataset, targets: Targets, user_rates: Array) -> Array:
    """Gives user_state [Q, A] float16 at the moments of targets [Q]."""
    schema = dataset.schema
    out = np.zeros((len(targets.user_rows), state_width(schema)), np.float16)
    out[:, context_columns(schema).stop :] = user_rates[targets.user_rows]
    for start in range(0, len(out), _CHUNK):
        part = slice(start, start + _CHUNK)
        ends = targets.history_ends[part]
        past = past_windows(dataset.histories, targets.user_rows[part], ends, schema.sizes.seen)
        now = moments(dataset.histories, targets.user_rows[part], ends).astype(np.float64)
        near = recencies(schema, past.times, past.kinds, now)
        out[part, : activity_width(schema)] = activity(schema, near, past.kinds)
    return out


def with_uniform(
    lists: Lists, num_items: int, count: int, scores: ScoreFunction, rng: np.random.Generator
) -> Lists:
    """Adds `count` items to each list, drawn uniformly, labelled 0 (NaN where an item is there already)."""
    drawn = rng.integers(1, num_items + 1, (len(lists), count))
    again = (
        (drawn[:, :, None] == lists.item_rows[:, None, :]).any(2) if count else np.zeros(drawn.shape, bool)
    )
    drawn = np.where(again, -1, drawn)
    more = score_in_chunks(scores, lists.user_rows, lists.history_ends, drawn)
    labels = np.where(drawn > 0, np.float32(0), np.float32(np.nan))[:, :, None]
    return replace(
        lists,
        item_rows=np.concatenate([lists.item_rows, drawn], 1),
        scores=np.concatenate([lists.scores, more], 1),
        labels=np.concatenate([lists.labels, labels], 1),
    )
