"""Says how lists do for a new user after the first clicks: the first, the second, ... the fifth.

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
from builders.data.splits import users_of
from builders.export.verifier import Verifier
from ensemble.bootstrap import paired_difference

FIRST_CLICKS = "New users, of whom nothing was learned, after their first clicks: HR@10 of the next new item."
CLICKS = (1, 2, 3, 4, 5)
_MOST, _FEWEST = 500, 30  # users that are asked about a number of clicks; with fewer a figure says nothing


def targets_after(dataset: Dataset, clicks: int) -> Targets:
    """Gives (a sample of) the new users' next events after so many clicks, where the item is new to them."""
    histories = dataset.histories
    begins, ends = histories.offsets[:-1], histories.offsets[1:]
    chosen_by = np.isin(np.arange(len(begins)), dataset.validation.user_rows)
    is_new = (dataset.train_ends <= begins) & (ends - begins > clicks) & ~chosen_by
    users = np.flatnonzero(is_new)
    places = begins[users] + clicks
    pairs = users_of(histories) * (dataset.num_items + 1) + histories.item_rows
    first_time = np.zeros(len(pairs), bool)
    first_time[np.unique(pairs, return_index=True)[1]] = True
    asked = np.random.default_rng(0).permutation(np.flatnonzero(first_time[places]))[:_MOST]
    asked.sort()
    return Targets(users[asked], places[asked], histories.item_rows[places[asked]])


def first_clicks(dataset: Dataset, verifier: Verifier) -> dict[str, Any]:
    """Gives HR@10 of the chain, recall and popularity after each number of clicks, and the chain's gain over
    popularity by a bootstrap; nothing for numbers that too few new users reached."""
    found = {}
    for clicks in CLICKS:
        targets = targets_after(dataset, clicks)
        if len(targets.user_rows) < _FEWEST:
            continue
        users, ranks = verifier.ranks(targets)
        hits = {way: metrics.hits(ranks[way], 10) for way in ("chain", "recall", "popularity")}
        gain = paired_difference(hits["popularity"], hits["chain"], users)
        found[str(clicks)] = {
            "users": len(users),
            **{way: float(of.mean()) for way, of in hits.items()},
            "chain_minus_popularity": vars(gain),
        }
    return found


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
