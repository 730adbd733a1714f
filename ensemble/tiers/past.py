"""Puts events into a user's past: bounded, each item once, in order of time, whatever order they came in."""

from __future__ import annotations

import numpy as np

from ensemble.arrays import Array


def merge_past(seen: Array, times: Array, rows: Array, event_times: Array) -> tuple[Array, Array]:
    """Puts items rows [E] at event_times [E] into a past: seen [W] int32 and times [W] float64 -> the same,
    merged.

    `seen` is left-padded with -1; a time of -inf means as loaded. An item stands once, at its latest time;
    those as loaded keep their order before all that have a time; equal times are in order of rows. The last W
    stay. What falls out once is older than all that stays, so events may come late, or twice, to the same
    end.
    """
    width = len(seen)
    all_rows = np.concatenate([seen, np.asarray(rows, seen.dtype)])
    all_times = np.concatenate([times, np.asarray(event_times, np.float64)])
    tie = np.where(np.isneginf(all_times), np.arange(len(all_rows)), all_rows)
    order = np.lexsort((tie, all_times))
    order = order[all_rows[order] > 0]
    _, from_end = np.unique(all_rows[order][::-1], return_index=True)  # the last of each item
    kept = order[np.sort(len(order) - 1 - from_end)][-width:]
    new_seen, new_times = np.full(width, -1, seen.dtype), np.full(width, -np.inf)
    if len(kept):
        new_seen[-len(kept) :], new_times[-len(kept) :] = all_rows[kept], all_times[kept]
    return new_seen, new_times
