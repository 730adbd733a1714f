"""Makes of a shop what it was before its test part began: what validated there tests here.

So settings may be judged as `verify` judges a release, while the rows that will judge the release stay
unread. What validates is cut from the end of what trained, by the shop's own rule of its split.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from builders.data import stage as data
from builders.folders import Inputs
from builders.progress import Progress
from builders.shop.interactions import Interactions, exposures_from_interactions
from builders.shop.parts import NEVER, TEST, TRAIN, VALIDATION
from builders.shop.read import ShopTables
from builders.shop.shop_toml import Split
from ensemble.arrays import Array
from ensemble.errors import InvalidInput
from ensemble.release.route import user_hashes
from ensemble.schema import Sizes


def run(inputs: Inputs, sizes: Sizes, folder: Path, progress: Progress) -> None:
    """Does what the stage `data` does, with all but the test part."""
    data.run(inputs, sizes, folder, progress, before_test)


def before_test(tables: ShopTables) -> ShopTables:
    """Leaves out what the test part of a shop has; InvalidInput where too little would be left."""
    tables = data.with_times_in_order(tables)
    split, log = tables.shop.split, tables.interactions
    if log.parts is not None:
        keep, parts = log.parts != TEST, _earlier_parts(log, split)
        return _only(replace(tables, interactions=replace(log, parts=parts)), keep, split)
    if split.kind == "time":
        cut = int(np.quantile(log.times, 1 - split.test, method="higher"))
        left = 1 - split.test
        earlier = split.model_copy(
            update={"test": split.validation / left, "validation": min(split.validation, left / 3) / left}
        )
        return _only(_labels_until(tables, np.full(len(log), cut)), log.times < cut, earlier)
    if split.kind == "random":
        tests = np.zeros(len(tables.users.ids) + 1, bool)
        tests[1:] = user_hashes(tables.users.ids.tolist(), f"split {split.seed}") < split.test
        earlier = split.model_copy(update={"test": split.test + split.validation})
        return _only(tables, ~tests[tables.user_rows], earlier)
    return _without_last(tables)


def _earlier_parts(log: Interactions, split: Split) -> Array:
    """Gives parts [n] in which the validation rows test, and the last of those that train validate."""
    assert log.parts is not None
    train = log.parts == TRAIN
    cut = np.quantile(log.times[train], 1 - split.validation, method="higher")
    parts = np.where(train & (log.times >= cut), VALIDATION, TRAIN)
    if not (parts == TRAIN).any():
        raise InvalidInput("all rows that train are of one time: nothing is left to choose settings by")
    return np.where(log.parts >= VALIDATION, TEST, parts)


def _without_last(tables: ShopTables) -> ShopTables:
    """Leaves out each user's last event, which tests, and what came with it or later."""
    log = tables.interactions
    rows, times = data.positives(tables, exposures_from_interactions(tables.shop, log))
    users = tables.user_rows[rows]
    order = np.lexsort((times, users))
    last = order[np.flatnonzero(np.append(users[order][1:] != users[order][:-1], True))]
    last = last[np.bincount(users)[users[last]] >= 3]
    cuts = np.full(len(tables.users.ids) + 1, NEVER)
    cuts[users[last]] = times[last]
    cut, is_positive = cuts[tables.user_rows], np.zeros(len(log), bool)
    is_positive[rows] = True
    is_positive[rows[last]] = False
    # of events of the same second the file's order says which was the last
    keep = (log.times < cut) | (is_positive & (log.times == cut))
    return _only(_labels_until(tables, cut), keep, tables.shop.split)


def _labels_until(tables: ShopTables, cut: Array) -> ShopTables:
    """Takes back the labels that came in at `cut` [n] or later: nobody knew of them."""
    log = tables.interactions
    labels, came_in = log.labels.copy(), dict[int, Array]()
    for task, came in log.label_times.items():
        late = came >= cut
        nothing = 0 if tables.shop.tasks[task].kind == "binary" else np.nan
        labels[late & ~np.isnan(labels[:, task]), task] = nothing
        came_in[task] = np.where(late, log.times, came)
    return replace(tables, interactions=replace(log, labels=labels, label_times=came_in))


def _only(tables: ShopTables, keep: Array, split: Split) -> ShopTables:
    """Gives the tables with those interactions, split so."""
    if not keep.any():
        raise InvalidInput(f"{tables.shop.interactions.file}: nothing came before its test part")
    return replace(
        tables,
        shop=tables.shop.model_copy(update={"split": split}),
        interactions=tables.interactions.where(keep),
        user_rows=tables.user_rows[keep],
        item_rows=tables.item_rows[keep],
    )
