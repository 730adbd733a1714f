"""Reads all files of a shop, checks them and joins their ids."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from builders.shop.changes import Applied, changed_columns, changed_ids
from builders.shop.interactions import Interactions, read_interactions
from builders.shop.shop_toml import Entities, Shop, open_shop
from builders.shop.tables import Column, first_true, ids_from_column, read_table
from builders.shop.truth import open_truth
from ensemble.arrays import Array
from ensemble.errors import InvalidInput
from ensemble.live.catalogue import Entry
from ensemble.release.ids import IdMap


@dataclass(frozen=True)
class Rows:
    """Holds one table of the shop: its ids, and the file row that each belongs to."""

    ids: Array  # [R] S, sorted, distinct
    index: Array  # [n] int64: place in `ids` of each file row
    columns: dict[str, Column]


@dataclass(frozen=True)
class ShopTables:
    """Holds all files of a shop, read and checked, before anything is packed."""

    shop: Shop
    items: Rows
    users: Rows
    interactions: Interactions  # rows whose item exists
    user_rows: Array  # [n] int64, row 1 + i is the i-th user id
    item_rows: Array  # [n] int64
    num_dropped: int  # rows left out because their item is not in the items file
    first_dropped: str  # the first such item
    applied: Applied  # what became of the catalogue's log


def read_shop(
    folder: Path,
    *,
    now_s: float | None = None,
    progress: Callable[[str], None] = lambda step: None,
    changes: Mapping[str, Entry] | None = None,
) -> ShopTables:
    """Reads shop.toml and its files, and puts `changes` of items, by id, over them; InvalidInput names the
    first thing that is wrong."""
    shop, applied = open_shop(folder), Applied()
    progress("reading items and users")
    items = _read_entities(folder, shop.items, changes or {}, applied)
    users = _read_entities(folder, shop.users, {}, applied)
    progress("reading interactions")
    interactions = read_interactions(folder, shop, now_s)
    if shop.interactions.planted:
        open_truth(folder / shop.interactions.planted)  # what `verify` will read must be whole
    if items is None:
        ids = changed_ids(interactions.item_ids, changes or {}, applied)
        items = Rows(ids, np.zeros(0, np.int64), {})
    user_ids = interactions.user_ids if users is None else np.union1d(users.ids, interactions.user_ids)
    index = np.zeros(0, np.int64) if users is None else np.searchsorted(user_ids, users.ids)[users.index]
    users = Rows(user_ids, index, {} if users is None else users.columns)
    item_rows = IdMap(items.ids).rows_from_ids(interactions.item_ids)[interactions.items]
    user_rows = IdMap(users.ids).rows_from_ids(interactions.user_ids)[interactions.users]
    keep = item_rows > 0
    first = first_true(~keep)
    dropped = interactions.item_ids[interactions.items[first]].decode() if first >= 0 else ""
    kept = interactions.where(keep)
    if not len(kept):
        file = shop.items.file if shop.items else ""
        raise InvalidInput(
            f"{shop.interactions.file}: no row's item is in {file}, for example {dropped!r}; do both use "
            "the same ids?"
        )
    if len(items.ids) < 2:
        raise InvalidInput(
            f"{shop.items.file if shop.items else shop.interactions.file} has one item, "
            f"{items.ids[0].decode()!r}; at least 2 are needed to rank"
        )
    return ShopTables(
        shop, items, users, kept, user_rows[keep], item_rows[keep], int((~keep).sum()), dropped, applied
    )


def _read_entities(
    folder: Path, entry: Entities | None, changes: Mapping[str, Entry], applied: Applied
) -> Rows | None:
    if entry is None:
        return None
    wanted = [entry.id, *([entry.title] if entry.title else []), *(f.source for f in entry.features)]
    columns = read_table(folder, entry.file, wanted)
    if not len(columns[entry.id].values):
        raise InvalidInput(f"{entry.file} has no rows")
    ids, index = ids_from_column(columns[entry.id])
    if len(ids) < len(index):
        first_row = np.unique(index, return_index=True)[1]
        again = first_true(first_row[index] != np.arange(len(index)))
        raise columns[entry.id].error(
            again, f"is there already (row {first_row[index[again]] + 1}); one row per {entry.id}"
        )
    if changes:
        columns = changed_columns(columns, entry, changes, applied)
        ids, index = ids_from_column(columns[entry.id])
    return Rows(ids, index, columns)
