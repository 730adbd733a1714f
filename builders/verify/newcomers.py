"""Says how lists do for new items and new users, beside those that are well known.

Items are told apart by how many training events they have, users by how many events they had when they were
asked about. An average over everybody hides both: most events are of what is well known. Groups are small, so
each figure has the 95% interval of a bootstrap over the group's users.

Axes: Q held-out targets, K places of a list.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from builders import metrics
from builders.data.dataset import Dataset, Targets, training_histories
from builders.verify.values import Worth
from ensemble.arrays import Array
from ensemble.bootstrap import groups, ratio, spreads, user_rows, user_sums

_UPTO = (0, 5, 30)  # the last group has more
GROUPS = ("0", "1 to 5", "6 to 30", "more")


def newcomers(
    dataset: Dataset, lists: Array, targets: Targets, ranks: dict[str, Array], worth: Worth | str
) -> dict[str, Any]:
    """Gives figures by group: of the targets that were ranked [Q], and of the items in `lists` [*, K], which
    are padded with -1. `intervals` has low and high of those that are means over held-out rows."""
    counts = np.bincount(training_histories(dataset)[1], minlength=dataset.num_items + 1)
    known = targets.history_ends - dataset.histories.offsets[targets.user_rows]
    items, users = _groups(counts), _groups(known)
    of_targets = items[targets.item_rows]
    rows = _rows(ranks, dataset)
    by_item, by_user = (
        [_figures(rows, targets.user_rows, of == group) for group in range(len(GROUPS))]
        for of in (of_targets, users)
    )
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


def _rows(ranks: dict[str, Array], dataset: Dataset) -> dict[str, Array]:
    """Gives what each target counts in each figure: [Q] float."""
    num_candidates = dataset.schema.sizes.candidates
    return {
        f"recall@{num_candidates}": metrics.hits(ranks["recall"], num_candidates),
        "hr@10": metrics.hits(ranks["chain"], 10),
        "ndcg@10": metrics.gains(ranks["chain"], 10),
    }


def _figures(rows: Mapping[str, Array], users: Array, chosen: Array) -> dict[str, Any]:
    """Measures some of the targets, users [Q] and chosen [Q] bool; None where there are none."""
    found: dict[str, Any] = {"targets": int(chosen.sum()), **dict.fromkeys(rows), "intervals": {}}
    if chosen.any():
        _add_means(found, {name: of[chosen] for name, of in rows.items()}, users[chosen])
    return found


def _add_means(found: dict[str, Any], rows: Mapping[str, Array], users: Array) -> None:
    """Adds the mean of each figure's rows [R], and its interval over users [R].

    There is none where every resample has the same mean: all of the group missed, or it is one user.
    """
    num_users, group = groups(users)
    counts = user_rows(group, num_users)
    means = [ratio(user_sums(group, of, num_users), counts) for of in rows.values()]
    for (name, of), spread in zip(rows.items(), spreads(means, num_users), strict=True):
        found[name] = float(of.mean())
        if spread.low < spread.high:
            found["intervals"][name] = {"low": spread.low, "high": spread.high}


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


def _add_worth(figures: list[dict[str, Any]], worth: Worth, group_of_row: Array | None) -> None:
    """Adds what the chain's lists are worth in the rows of each group [Q]; None: not known by group."""
    if group_of_row is None:
        return
    for group, one in enumerate(figures):
        chosen = group_of_row == group
        one |= {"worth": None, "worth_rows": int(chosen.sum())}
        if chosen.any():
            _add_means(one, {"worth": worth.values["chain"][chosen, 0]}, worth.users[chosen])


_SHARES = ("of_items", "of_places")  # of the catalogue and of what lists show: no figures of held-out rows
_HEADS = {"items": "events of the item", "users": "events of the user"}


def newcomer_lines(found: Mapping[str, Any]) -> list[str]:
    """Writes the report's part on new items and users."""
    lines = ["", "## New items and new users", ""]
    lines += [
        "Held-out next items by how many training events the item has, and by how many events the user had. "
        "Places: of all that the served lists of ten show, the share that goes to items of the group. "
        "In brackets: 95% intervals, by resampling the group's users.",
    ]
    for what, head in _HEADS.items():
        names = [name for name in _names(found[what]) if name not in ("intervals", *_SHARES)]
        lines += _table(head, found[what], names)
    return [*lines, *_table(_HEADS["items"], found["items"], list(_SHARES))]


def _table(head: str, by_group: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """Writes some figures of each group as a table of Markdown, few enough for a terminal's 80 columns."""
    rows = [[group, *(cell(of, name) for name in names)] for group, of in by_group.items()]
    table = [[head, *(name.replace("_", " ") for name in names)], ["---"] * (1 + len(names)), *rows]
    return ["", *("| " + " | ".join(row) + " |" for row in table)]


def newcomer_table(found: Mapping[str, Any]) -> list[str]:
    """Writes what a terminal of 80 columns shows of it: each group's HR@10, and what its lists are worth."""
    lines = []
    for what, head in _HEADS.items():
        names = ["targets", "hr@10", "worth" if "worth" in _names(found[what]) else "ndcg@10"]
        rows = [
            [head, *names],
            *([group, *(cell(of, name) for name in names)] for group, of in found[what].items()),
        ]
        lines += [f"{one:<18}{two:>10}{three:>25}{four:>25}" for one, two, three, four in rows]
    return lines


def _names(by_group: Mapping[str, Any]) -> list[str]:
    """Lists all figures that some group has."""
    return list(dict.fromkeys(name for of in by_group.values() for name in of))


def cell(figures: Mapping[str, Any], name: str) -> str:
    """Writes a figure and its interval, which reports of an earlier Peregrine do not have."""
    interval = figures.get("intervals", {}).get(name)
    text = _number(figures.get(name))
    return f"{text} [{interval['low']:.4f}, {interval['high']:.4f}]" if interval else text


def _number(value: float | None) -> str:
    """Writes a figure; nothing where there is none."""
    return "" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
