"""Describes what a user did lately, and with which candidates: numbers that the ranker reads beside all it
has learned. Training and serving compute them here, from the same columns of a past.

    user_state [A]        recency and log count of each kind of event; of all events the recency, and log
    counts
                          of the last ten minutes, hour, day and week; then the request's context
                          (ensemble/context.py); then the user's rates (builders/data/rates.py)
    candidate_state [G]   recency of the user's last event of each kind with this very item; one over how many
                          events ago the last one was (1 = it was the newest); log count of all

A recency falls from 1 (just now) to 0 (a year ago, or never): 1 - log2(1 + seconds) / 25, in steps of a
hundredth, so that an answer does not change from one second to the next. Without a clock recencies are 0.

Axes: B batch, W seen, N candidates, A user state, G candidate state, K kinds of events.
"""

from __future__ import annotations

import numpy as np

from ensemble.arrays import Array
from ensemble.context import context_width
from ensemble.schema import Schema

_YEAR_LOG2 = 25.0  # log2 of a year in seconds, nearly
_STEPS = 100.0  # of a recency
_WINDOWS_S = (600, 3_600, 86_400, 604_800)
_STRIDE = 1 << 40  # more than any item row


def activity_width(schema: Schema) -> int:
    """Counts the numbers that `activity` gives of a user."""
    return 2 * len(schema.events) + 1 + len(_WINDOWS_S)


def state_width(schema: Schema) -> int:
    """Counts the numbers of user_state, A: activity, then context, then rates."""
    return activity_width(schema) + context_width(schema) + schema.sizes.user_rates


def context_columns(schema: Schema) -> slice:
    """Gives the columns of user_state that tell the context."""
    start = activity_width(schema)
    return slice(start, start + context_width(schema))


def touches_width(schema: Schema) -> int:
    """Counts the numbers of candidate_state, G."""
    return len(schema.events) + 2


def recencies(schema: Schema, seen_times: Array, seen_kinds: Array, now: Array) -> Array:
    """Gives the recency of each event of a past: seen_times [B, W] Unix seconds, seen_kinds [B, W] (0 where
    padded), now [B] seconds -> [B, W] float32; 0 where padded, and everywhere if the shop has no clock."""
    if not schema.has_clock:
        return np.zeros(seen_times.shape, np.float32)
    gap = np.maximum(now[:, None] - seen_times, 0).astype(np.float32)
    steps = np.floor(np.maximum(1 - np.log2(1 + gap) / _YEAR_LOG2, 0) * _STEPS)
    return np.where(seen_kinds > 0, steps / np.float32(_STEPS), 0).astype(np.float32)


def activity(schema: Schema, seen_recencies: Array, seen_kinds: Array) -> Array:
    """Describes users by their pasts: seen_recencies [B, W] float32, seen_kinds [B, W] -> [B, activity_width]
    float32."""
    out = np.zeros((len(seen_kinds), activity_width(schema)), np.float32)
    there = seen_kinds > 0
    for kind in range(len(schema.events)):
        own = seen_kinds == kind + 1
        out[:, 2 * kind] = np.where(own, seen_recencies, 0).max(axis=1, initial=0)
        out[:, 2 * kind + 1] = np.log1p(own.sum(axis=1))
    place = 2 * len(schema.events)
    out[:, place] = np.where(there, seen_recencies, 0).max(axis=1, initial=0)
    if schema.has_clock:
        for window in _WINDOWS_S:
            place += 1
            least = np.floor((1 - np.log2(1 + window) / _YEAR_LOG2) * _STEPS) / _STEPS
            out[:, place] = np.log1p((there & (seen_recencies >= np.float32(least))).sum(axis=1))
    return out


def touches(
    schema: Schema, seen_rows: Array, seen_recencies: Array, seen_kinds: Array, candidate_rows: Array
) -> Array:
    """Says what each user did with each candidate: seen_* [B, W], candidate_rows [B, N] -> [B, N, G]
    float32."""
    width = touches_width(schema)
    out = np.zeros((*candidate_rows.shape, width), np.float32)
    users, places = np.nonzero((seen_rows > 0) & (seen_kinds > 0))
    if not len(users):
        return out
    keys = users * _STRIDE + seen_rows[users, places]
    distinct, owner = np.unique(keys, return_inverse=True)
    facts = np.zeros((len(distinct), width), np.float32)
    # a touch counts even where a clock says nothing: its place among the newest, and the count, then tell
    np.maximum.at(
        facts, (owner, seen_kinds[users, places].astype(np.int64) - 1), seen_recencies[users, places]
    )
    np.maximum.at(facts[:, -2], owner, 1 / (seen_rows.shape[1] - places).astype(np.float32))
    facts[:, -1] = np.log1p(np.bincount(owner, minlength=len(distinct)))
    wanted = np.arange(len(candidate_rows))[:, None] * _STRIDE + candidate_rows
    place = np.minimum(np.searchsorted(distinct, wanted), len(distinct) - 1)
    found = (distinct[place] == wanted) & (candidate_rows > 0)
    out[found] = facts[place[found]]
    return out
