"""Says how lists do for new items and new users, beside those that are well known.

Items are told apart by how many training events they have, users by how many events they had when they were
asked about. An average over everybody hides both: most events are of what is well known.

Axes: Q held-out targets, K places of a list.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from builders import metrics
from builders.data.dataset import Dataset, Targets, training_histories
from builders.verify.values import Worth
from ensemble.arrays import Array

_UPTO = (0, 5, 30)  # the last group has more
GROUPS = ("0", "1 to 5", "6 to 30", "more")


def newcomers(
    dataset: Dataset, lists: Array, targets: Targets, ranks: dict[str, Array], worth: Worth | str
) -> dict[str, Any]:
    """Gives figures by group: of the targets that were ranked [Q], and of the items in `lists` [*, K], which
    are padded with -1."""
    counts = np.bincount(training_histories(dataset)[1], minlength=dataset.num_items + 1)
    known = targets.history_ends - dataset.histories.offsets[targets.user_rows]
    items, users = _groups(counts), _groups(known)
    of_targets = items[targets.item_rows]
    by_item = [_figures(ranks, of_targets == group, dataset) for group in range(len(GROUPS))]
    by_user = [_figures(ranks, users == group, dataset) for group in range(len(GROUPS))]
    shown = lists[lists > 0]
    for group in range(len(GROUPS)):
        by_item[group]["of_items"] = float((items[1:] == group).mean())
        by_item[group]["of_places"] = float((items[shown] == group).mean()) if len(shown) else None
    if isinstance(worth, Worth):
        _add_worth(by_item, worth, items[worth.items] if (worth.items > 0).all() else None)
        _add_worth(by_user, worth, _known_then(dataset, worth))
    return {
        "items": dict(zip(GROUPS, by_item, strict=True)),
        "users": dict(zip(GROUPS, by_user, strict=True)),
    }


def _groups(counts: Array) -> Array:
    """Gives the group of each count [...]: 0 to 3."""
    return np.searchsorted(_UPTO, counts)


def _figures(ranks: dict[str, Array], chosen: Array, dataset: Dataset) -> dict[str, Any]:
    """Measures some of the targets; None where there are none."""
    num_candidates, figures = dataset.schema.sizes.candidates, dict[str, Any]()
    figures["targets"] = int(chosen.sum())
    if not chosen.any():
        return {**figures, f"recall@{num_candidates}": None, "hr@10": None, "ndcg@10": None}
    chain = ranks["chain"][chosen]
    return {
        **figures,
        f"recall@{num_candidates}": metrics.recall_at(ranks["recall"][chosen], num_candidates),
        "hr@10": metrics.hit_rate(chain, 10),
        "ndcg@10": metrics.ndcg(chain, 10),
    }


def _known_then(dataset: Dataset, worth: Worth) -> Array:
    """Gives the group of each row's user [Q], by the events before the row's time."""
    histories = dataset.histories
    low, high = (np.asarray(histories.offsets[worth.users + more]) for more in (0, 1))
    begin, last = low.copy(), max(0, len(histories.times) - 1)
    while (low < high).any():  # a binary search in each user's own times
        middle = (low + high) // 2
        before = (histories.times[np.minimum(middle, last)] < worth.times) & (low < high)
        low, high = np.where(before, middle + 1, low), np.where(before, high, np.minimum(middle, high))
    return _groups(low - begin)


def _add_worth(figures: list[dict[str, Any]], worth: Worth, groups: Array | None) -> None:
    """Adds what the chain's lists are worth in the rows of each group [Q]; None: not known by group."""
    if groups is None:
        return
    values = worth.values["chain"][:, 0]
    for group, one in enumerate(figures):
        chosen = groups == group
        one["worth"] = float(values[chosen].mean()) if chosen.any() else None
        one["worth_rows"] = int(chosen.sum())


def newcomer_lines(found: dict[str, Any]) -> list[str]:
    """Writes the report's part on new items and users."""
    lines = ["", "## New items and new users", ""]
    lines += [
        "Held-out next items by how many training events the item has, and by how many events the user had. "
        "Places: of all that the served lists of ten show, the share that goes to items of the group.",
    ]
    for what, head in (("items", "events of the item"), ("users", "events of the user")):
        groups = found[what]
        names = list(dict.fromkeys(name for of in groups.values() for name in of))
        rows = [[group, *(_number(of.get(name)) for name in names)] for group, of in groups.items()]
        table = [[head, *(name.replace("_", " ") for name in names)], ["---"] * (1 + len(names)), *rows]
        lines += ["", *("| " + " | ".join(row) + " |" for row in table)]
    return lines


def _number(value: float | None) -> str:
    """Writes a figure; nothing where there is none."""
    return "" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
