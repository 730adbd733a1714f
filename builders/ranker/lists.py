"""Makes the lists that the ranker learns from: one user at one time, with items shown or recalled there.

Impressions that share user and history share a list, so that user-side work is done once for them. Axes: L
lists, N items a list (padded with -1), H history, S recall sources, T tasks, E impressions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from builders.data.dataset import Dataset, Impressions, Targets
from builders.index.offline import CandidateFunction, ScoreFunction
from ensemble.arrays import Array
from ensemble.contract import SOURCES

_CHUNK = 4096  # lists scored at once


@dataclass(frozen=True)
class Lists:
    """Holds rows of the training set."""

    user_rows: Array  # [L] int64
    history_ends: Array  # [L] int64
    item_rows: Array  # [L, N] int64, -1 where padded
    scores: Array  # [L, N, S] float32
    labels: Array  # [L, N, T] float32, NaN where not defined or padded

    def __len__(self) -> int:
        return len(self.user_rows)

    def take(self, index: Array) -> Lists:
        """Gives the lists at `index`."""
        return Lists(
            self.user_rows[index],
            self.history_ends[index],
            self.item_rows[index],
            self.scores[index],
            self.labels[index],
        )


def lists_from_impressions(impressions: Impressions, scores: ScoreFunction) -> tuple[Lists, Array]:
    """Groups impressions [E] into lists; gives also the place [E] of each in the flattened [L * N]."""
    order = np.lexsort((impressions.history_ends, impressions.user_rows))
    users, ends = impressions.user_rows[order], impressions.history_ends[order]
    first = np.ones(len(order), bool)
    first[1:] = (users[1:] != users[:-1]) | (ends[1:] != ends[:-1])
    starts = np.flatnonzero(first)
    within = np.arange(len(order)) - np.repeat(starts, np.diff(np.append(starts, len(order))))
    width = _best_width(np.diff(np.append(starts, len(order))))
    first |= within % width == 0  # longer groups are cut into lists of `width`
    list_index, column = np.cumsum(first) - 1, within % width
    num_lists = int(first.sum())
    item_rows = np.full((num_lists, width), -1, np.int64)
    item_rows[list_index, column] = impressions.item_rows[order]
    labels = np.full((num_lists, width, impressions.labels.shape[1]), np.nan, np.float32)
    labels[list_index, column] = impressions.labels[order]
    places = np.empty(len(order), np.int64)
    places[order] = list_index * width + column
    user_rows, history_ends = users[first], ends[first]
    return Lists(
        user_rows,
        history_ends,
        item_rows,
        score_in_chunks(scores, user_rows, history_ends, item_rows),
        labels,
    ), places


def _best_width(group_sizes: Array) -> int:
    """Chooses the items a list so that work is least: a list's history costs as much as four items."""
    if not len(group_sizes):
        return 1
    widths = (1, 2, 4, 8)  # wider ones would make batches of few users
    return min(widths, key=lambda width: int(np.ceil(group_sizes / width).sum()) * (width + 4))


def score_in_chunks(scores: ScoreFunction, user_rows: Array, history_ends: Array, item_rows: Array) -> Array:
    """Scores all lists, a few thousand at a time: [L, N, S] float32, 0 where padded."""
    out = np.zeros((*item_rows.shape, len(SOURCES)), np.float32)
    for start in range(0, len(item_rows), _CHUNK):
        part = slice(start, start + _CHUNK)
        out[part] = scores(user_rows[part], history_ends[part], item_rows[part])
    out[item_rows <= 0] = 0
    return out


def lists_from_targets(dataset: Dataset, targets: Targets, candidates: CandidateFunction) -> Lists:
    """Makes lists of recall's candidates for each target; its label is 1 if it was recalled, all others 0."""
    parts = []
    for start in range(0, len(targets.user_rows), _CHUNK):
        part = slice(start, start + _CHUNK)
        parts.append(candidates(targets.user_rows[part], targets.history_ends[part]))
    width = dataset.schema.sizes.candidates
    rows = np.concatenate([rows for rows, _ in parts]) if parts else np.zeros((0, width), np.int64)
    scores = (
        np.concatenate([scores for _, scores in parts])
        if parts
        else np.zeros((0, width, len(SOURCES)), np.float32)
    )
    labels = np.where(rows > 0, (rows == targets.item_rows[:, None]).astype(np.float32), np.float32(np.nan))
    return Lists(targets.user_rows, targets.history_ends, rows, scores.astype(np.float32), labels[:, :, None])


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
    return Lists(
        lists.user_rows,
        lists.history_ends,
        np.concatenate([lists.item_rows, drawn], 1),
        np.concatenate([lists.scores, more], 1),
        np.concatenate([lists.labels, labels], 1),
    )
