"""Says how lists do for a new user before the first click, and after the first, the second, ... the fifth.

Asked are users of whom nothing was learned and nothing chosen by: all that is known of them are these clicks
and what the shop says of them, as in a session of somebody unknown. Splits by time, by a column, by files and
by drawn users have such users; leaving one out has none.

Axes: U users, P events, Q targets.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from builders import metrics
from builders.data.dataset import Dataset, Targets
from builders.data.splits import are_new
from builders.export.verifier import Verifier
from ensemble.arrays import Array
from ensemble.bootstrap import paired_difference

FIRST_CLICKS = (
    "New users, of whom nothing was learned, before and after their first clicks: HR@10 of the next new item."
)
CLICKS = (1, 2, 3, 4, 5)
_MOST, _FEWEST = 500, 30  # users that are asked about a number of clicks; with fewer a figure says nothing


def targets_after(dataset: Dataset, clicks: int) -> Targets:
    """Gives (a sample of) the new users' next events after so many clicks, where the item is new to them."""
    found = next_new(dataset, new_users(dataset) & ~_chosen_by(dataset), clicks)
    asked = np.random.default_rng(0).permutation(len(found.user_rows))[:_MOST]
    asked.sort()
    return Targets(found.user_rows[asked], found.history_ends[asked], found.item_rows[asked])


def new_users(dataset: Dataset) -> Array:
    """Says of each user row whether nothing of theirs trains: [U + 1] bool."""
    return np.asarray(dataset.train_ends <= dataset.histories.offsets[:-1])


def _chosen_by(dataset: Dataset) -> Array:
    """Says by whose held-out events something was chosen: [U + 1] bool."""
    return np.isin(np.arange(len(dataset.train_ends)), dataset.validation.user_rows)


def next_new(dataset: Dataset, users: Array, clicks: int, ends: Array | None = None) -> Targets:
    """Gives what users [U + 1] bool took after so many clicks, where the item is new to them and lies before
    `ends` [U + 1] int64; None: the end of all that is known."""
    histories = dataset.histories
    begins = histories.offsets[:-1]
    ends = histories.offsets[1:] if ends is None else ends
    rows = np.flatnonzero(users & (ends - begins > clicks))
    places = begins[rows] + clicks
    kept = are_new(histories)[places]
    return Targets(rows[kept], places[kept], histories.item_rows[places[kept]])


def first_clicks(dataset: Dataset, verifier: Verifier) -> dict[str, Any]:
    """Gives HR@10 of the chain, recall and popularity after each number of clicks, from none on, and its
    gain over popularity by a bootstrap, of NDCG@10 too; nothing where there are too few new users."""
    found = {}
    for clicks in (0, *CLICKS):
        targets = targets_after(dataset, clicks)
        if len(targets.user_rows) < _FEWEST:
            continue
        users, ranks = verifier.ranks(targets)
        hits = {way: metrics.hits(ranks[way], 10) for way in ("chain", "recall", "popularity")}
        gain = paired_difference(hits["popularity"], hits["chain"], users)
        placed = {way: metrics.gains(ranks[way], 10) for way in ("chain", "popularity")}
        found[str(clicks)] = {
            "users": len(users),
            **{way: float(of.mean()) for way, of in hits.items()},
            "chain_minus_popularity": vars(gain),
            "ndcg@10": {
                **{way: float(of.mean()) for way, of in placed.items()},
                "chain_minus_popularity": vars(
                    paired_difference(placed["popularity"], placed["chain"], users)
                ),
            },
        }
    return found


def first_click_shortfalls(found: Mapping[str, Any]) -> list[str]:
    """Says in a line each after how many clicks the served list is surely below popularity."""
    lines = []
    for clicks, of in found.items():
        placed = of["ndcg@10"]
        if placed["chain_minus_popularity"]["high"] < 0:
            when = (
                f"after {clicks} click{'s' * (clicks != '1')}"
                if clicks != "0"
                else "before their first click"
            )
            figures = f"{placed['chain']:.4f} is below that of popularity, {placed['popularity']:.4f}"
            lines.append(f"new users {when}: the served list's NDCG@10 {figures}")
    return lines


def first_click_table(found: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Gives the head and the rows of the table that reports show."""
    ways = ("chain", "recall", "popularity")
    rows = []
    for clicks, of in found.items():
        gain = of["chain_minus_popularity"]
        interval = f"{gain['mean']:+.4f} [{gain['low']:+.4f}, {gain['high']:+.4f}]"
        rows.append([clicks, f"{of['users']:,}", *(f"{of[way]:.4f}" for way in ways), interval])
    return ["clicks", "users", *ways, "chain minus popularity"], rows


def first_click_lines(found: Mapping[str, Any]) -> list[str]:
    """Writes the report's part on first clicks; none where there are no new users."""
    if not found:
        return []
    head, rows = first_click_table(found)
    table = [head, ["---"] * len(head), *rows]
    return ["", FIRST_CLICKS, "", *("| " + " | ".join(row) + " |" for row in table)]
