"""Reads all files of a shop, checks them and joins their ids."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from builders.shop.changes import Applied, changed_columns, changed_ids
from builders.shop.columns.categories import with_lists
from builders.shop.columns.column import Column, Said, first_true
from builders.shop.columns.ids import ids_from_column, known_ids, with_text_ids, would_join
from builders.shop.interactions import Interactions, read_interactions
from builders.shop.shop_toml import LISTED, Entities, Shop, open_shop
from builders.shop.tables import read_table
from builders.shop.truth import open_truth
from ensemble.arrays import Array
from ensemble.errors import InvalidInput
from ensemble.live.catalogue import Entry
from ensemble.release.ids import IdMap

MOST_DROPPED = 0.5  # share of rows whose items may be unknown; with more the two files are not of one shop


@dataclass(frozen=True)
class Rows:
    """Holds one table of the shop: its ids, and the file row that each belongs to."""

    ids: Array  # [R] S, sorted, distinct
    index: Array  # [n] int64: place in `ids` of each file row
    columns: dict[str, Column]
    said: tuple[Said, ...] = ()  # what each column was taken for


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
    logged_items: Array  # [I] S: ids that the interactions name
    logged_users: Array  # [U] S
    told_users: Array | None  # [R] S: ids of the users' file, if there is one


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
    items = _read_entities(folder, shop, shop.items, changes or {}, applied)
    users = _read_entities(folder, shop, shop.users, {}, applied)
    progress("reading interactions")
    interactions = read_interactions(folder, shop, now_s)
    if shop.interactions.planted:
        open_truth(folder / shop.interactions.planted)  # what `verify` will read must be whole
    if items is None:
        ids = changed_ids(interactions.item_ids, changes or {}, applied)
        items = Rows(ids, np.zeros(0, np.int64), {})
    user_ids = interactions.user_ids if users is None else np.union1d(users.ids, interactions.user_ids)
    index = np.zeros(0, np.int64) if users is None else np.searchsorted(user_ids, users.ids)[users.index]
    told = None if users is None else users.ids
    users = Rows(user_ids, index, *(({},) if users is None else (users.columns, users.said)))
    item_rows = IdMap(items.ids).rows_from_ids(interactions.item_ids)[interactions.items]
    user_rows = IdMap(users.ids).rows_from_ids(interactions.user_ids)[interactions.users]
    keep = item_rows > 0
    first = first_true(~keep)
    dropped = interactions.item_ids[interactions.items[first]].decode() if first >= 0 else ""
    kept = interactions.where(keep)
    if len(items.ids) < 2:
        raise InvalidInput(
            f"{shop.items.file if shop.items else shop.interactions.file} has one item, "
            f"{items.ids[0].decode()!r}; at least 2 are needed to rank"
        )
    _refuse_strangers(shop, interactions, items.ids, keep, told)
    return ShopTables(
        shop, items, users, kept, user_rows[keep], item_rows[keep], int((~keep).sum()), dropped, applied,
        interactions.item_ids, interactions.user_ids, told,
    )  # fmt: skip


def _refuse_strangers(
    shop: Shop, interactions: Interactions, items: Array, keep: Array, users: Array | None
) -> None:
    """Raises InvalidInput where more than MOST_DROPPED of the rows name items that are not in the items'
    file, or where no row's user is in the users' file; says what would join if it were written alike."""
    file, lost = shop.interactions.file, int((~keep).sum())
    if shop.items and lost > MOST_DROPPED * len(keep):
        absent = interactions.item_ids[np.unique(interactions.items[~keep])]
        how = (
            "no row's item is"
            if lost == len(keep)
            else f"the items of {lost:,} of {len(keep):,} rows are not"
        )
        raise InvalidInput(
            f"{file}: {how} in {shop.items.file}, for example {absent[0].decode()!r} (there: "
            f"{items[0].decode()!r}); do both use the same ids?{_hints(absent, items)}"
        )
    if users is not None and shop.users and len(users) and not np.isin(users, interactions.user_ids).any():
        raise InvalidInput(
            f"{file}: no row's user is in {shop.users.file}, for example "
            f"{interactions.user_ids[0].decode()!r} "
            f"(there: {users[0].decode()!r}); do both use the same ids?"
            f"{_hints(interactions.user_ids, users)}"
        )


def _hints(absent: Array, known: Array) -> str:
    """Says which ids would join if they were written alike."""
    return "".join(f" {hint}" for hint in would_join(absent, known))


def _read_entities(
    folder: Path, shop: Shop, entry: Entities | None, changes: Mapping[str, Entry], applied: Applied
) -> Rows | None:
    """Reads a table of items or users, one row each; of a log that tells of them, too, their first rows."""
    if entry is None:
        return None
    wanted = [entry.id, *([entry.title] if entry.title else []), *(f.source for f in entry.features)]
    columns = read_table(folder, entry.file, wanted, entry.reading)
    if not len(columns[entry.id].values):
        raise InvalidInput(f"{entry.file} has no rows")
    ids, index = known_ids(columns[entry.id])
    named = index >= 0
    if not len(ids):
        raise InvalidInput(f"{columns[entry.id].place(0)}: the id is missing, as in all rows")
    if not named.all():
        columns, index = {name: column.where(named) for name, column in columns.items()}, index[named]
    if len(ids) < len(index) and entry.file == shop.interactions.file:
        first = np.zeros(len(index), bool)
        first[np.unique(index, return_index=True)[1]] = True
        columns, index = {name: column.where(first) for name, column in columns.items()}, index[first]
        columns[entry.id].said.note("the first row of each counts")
    if len(ids) < len(index):
        first_row = np.unique(index, return_index=True)[1]
        again = first_true(first_row[index] != np.arange(len(index)))
        before = columns[entry.id].place(int(first_row[index[again]])).rpartition(", ")[2]
        raise columns[entry.id].error(again, f"is there already ({before}); one row per {entry.id}")
    columns[entry.id] = with_text_ids(columns[entry.id], ids, index)
    for feature in entry.features:
        if feature.kind in LISTED and feature.separator is None:
            columns[feature.source] = with_lists(columns[feature.source])
    if changes:
        columns = changed_columns(columns, entry, changes, applied)
        ids, index = ids_from_column(columns[entry.id])
    return Rows(ids, index, columns, tuple(column.said for column in columns.values()))
