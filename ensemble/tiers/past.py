"""Puts events into a user's past: bounded, each item once a kind of event, in order of time, whatever order
they came in."""

from __future__ import annotations

import numpy as np

from ensemble.arrays import Array

FIELDS = ("seen", "seen_times", "seen_kinds")  # of a user's row: what a past is made of
_KINDS = 1 << 8  # kinds are bytes


def merge_past(row: np.void, times: Array, rows: Array, kinds: Array, event_times: Array) -> Array:
    """Puts events of items rows [E], of `kinds` [E], at event_times [E] into the past of a user's `row`
    (snapshot.user_dtype), in place; `times` [W] float64 order what is there -> the times of what is there
    then.

    `seen` is left-padded with -1; a time of -inf means as loaded. An item stands once a kind, at its latest
    time; those as loaded keep their order before all that have a time; equal times are in order of rows. The
    last W stay. What falls out once is older than all that stays, so events may come late, or twice, to the
    same end.
    """
    width = len(times)
    seconds = np.clip(np.asarray(event_times, np.float64), 0, np.iinfo(np.uint32).max)
    seconds = np.where(np.isfinite(seconds), seconds, 0).astype(np.uint32)
    new = {
        "seen": np.asarray(rows, np.int32),
        "seen_times": seconds,
        "seen_kinds": np.asarray(kinds, np.uint8),
    }
    every = {name: np.concatenate([row[name], new[name]]) for name in FIELDS}
    every_time = np.concatenate([times, np.asarray(event_times, np.float64)])
    key = every["seen"].astype(np.int64) * _KINDS + every["seen_kinds"]
    tie = np.where(np.isneginf(every_time), np.arange(len(key)), key)
    order = np.lexsort((tie, every_time))
    order = order[every["seen"][order] > 0]
    _, from_end = np.unique(key[order][::-1], return_index=True)  # the last of each item and kind
    kept = order[np.sort(len(order) - 1 - from_end)][-width:]
    for name, padding in zip(FIELDS, (-1, 0, 0), strict=True):
        row[name] = padding
        if len(kept):
            row[name][-len(kept) :] = every[name][kept]
    merged = np.full(width, -np.inf)
    if len(kept):
        merged[-len(kept) :] = every_time[kept]
    return merged
