"""A shop's folder -> one Dataset of dense arrays: ids, packed features, histories, splits, impressions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from builders.dataset import Dataset, Histories, Impressions
from builders.interactions import Exposures, Interactions, exposures_from_interactions, read_interactions
from builders.packing import pack_features
from builders.shop import Entities, Shop, open_shop
from builders.splits import histories_from_positives, history_ends, split_histories, split_impressions
from builders.tables import Column, first_true, ids_from_column, read_table, texts_from_column
from ensemble.arrays import Array
from ensemble.errors import InvalidInput
from ensemble.ids import IdMap
from ensemble.schema import Schema, Sizes, Task

TITLE_BYTES = 120


@dataclass(frozen=True)
class Rows:
    """One table of the shop: its ids, and the file row that each belongs to."""

    ids: Array  # [R] S, sorted, distinct
    index: Array  # [n] int64: place in `ids` of each file row
    columns: dict[str, Column]


@dataclass(frozen=True)
class ShopTables:
    """All files of a shop, read and checked, before anything is packed."""

    shop: Shop
    items: Rows
    users: Rows
    interactions: Interactions  # rows whose item exists
    user_rows: Array  # [n] int64, row 1 + i is the i-th user id
    item_rows: Array  # [n] int64
    num_dropped: int  # rows left out because their item is not in the items file
    first_dropped: str  # the first such item


def read_shop(folder: Path, *, now_s: float | None = None, progress: Callable[[str], None] = lambda step: None) -> ShopTables:
    """Reads shop.toml and its files; InvalidInput names the first thing that is wrong."""
    shop = open_shop(folder)
    progress("reading items and users")
    items, users = _read_entities(folder, shop.items), _read_entities(folder, shop.users)
    progress("reading interactions")
    interactions = read_interactions(folder, shop, now_s)
    if items is None:
        items = Rows(interactions.item_ids, np.zeros(0, np.int64), {})
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
        raise InvalidInput(f"{shop.interactions.file}: no row's item is in {file}, for example {dropped!r}; do both use the same ids?")
    if len(items.ids) < 2:
        raise InvalidInput(
            f"{shop.items.file if shop.items else shop.interactions.file} has one item, {items.ids[0].decode()!r}; at least 2 are needed to rank"
        )
    return ShopTables(shop, items, users, kept, user_rows[keep], item_rows[keep], int((~keep).sum()), dropped)


def _read_entities(folder: Path, entry: Entities | None) -> Rows | None:
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
        raise columns[entry.id].error(again, f"is there already (row {first_row[index[again]] + 1}); one row per {entry.id}")
    return Rows(ids, index, columns)


def load_dataset(
    shop_dir: Path, *, sizes: Sizes | None = None, now_s: float | None = None, progress: Callable[[str], None] = lambda step: None
) -> Dataset:
    """The whole of a shop as arrays. `progress` is called with the name of each step as it begins."""
    tables = read_shop(Path(shop_dir), now_s=now_s, progress=progress)
    return dataset_from_tables(tables, sizes=sizes, progress=progress)


def dataset_from_tables(tables: ShopTables, *, sizes: Sizes | None = None, progress: Callable[[str], None] = lambda step: None) -> Dataset:
    """Packs features, orders histories, splits."""
    shop, items, users = tables.shop, tables.items, tables.users
    progress("packing features")
    item_pack = pack_features(shop.items.features if shop.items else [], items.columns, items.index + 1, len(items.ids))
    user_pack = pack_features(shop.users.features if shop.users else [], users.columns, users.index + 1, len(users.ids))
    progress("ordering histories")
    exposures = exposures_from_interactions(shop, tables.interactions)
    histories = _histories(tables, exposures)
    splits = split_histories(shop.split, histories, tables.interactions.times)
    progress("splitting impressions")
    parts = split_impressions(_impressions(tables, exposures, histories), splits.cuts) if shop.has_labels else (None, None, None)
    tasks = tuple(Task(t.name, t.kind, t.given, t.weight) for t in shop.tasks) or (Task("interact", "binary"),)
    return Dataset(
        schema=Schema(shop.name, item_pack.table, user_pack.table, tasks, sizes or Sizes()),
        item_ids=items.ids,
        user_ids=users.ids,
        item_titles=_titles(shop, items),
        item_codes=item_pack.codes,
        item_values=item_pack.values,
        user_codes=user_pack.codes,
        user_values=user_pack.values,
        vocabularies={"items": item_pack.vocabularies, "users": user_pack.vocabularies},
        histories=histories,
        train_ends=splits.train_ends,
        validation=splits.validation,
        test=splits.test,
        train_impressions=parts[0],
        validation_impressions=parts[1],
        test_impressions=parts[2],
        item_numbers=item_pack.numbers,
        item_encoding=item_pack.encoding,
    )


def positive_rows(tables: ShopTables, exposures: Exposures) -> Array:
    """Rows of the interactions that form histories, as `history` in shop.toml says (see builders/shop.py)."""
    shop, interactions = tables.shop, tables.interactions
    rule = shop.interactions.history
    if isinstance(rule, list):
        return np.flatnonzero(np.any([interactions.is_event(name) for name in rule], axis=0))
    named = [t for t in shop.tasks if t.kind == "binary" and t.label and rule in ("", t.name)]
    if rule == "all" or not named:
        return np.arange(len(interactions))
    task = named[0]
    if task.label and task.label.event:  # the event has its own row and time, later than the exposure's
        return np.flatnonzero(interactions.is_event(task.label.event))
    return exposures.rows[exposures.labels[:, shop.tasks.index(task)] == 1]


def _histories(tables: ShopTables, exposures: Exposures) -> Histories:
    rows = positive_rows(tables, exposures)
    return histories_from_positives(tables.user_rows[rows], tables.item_rows[rows], tables.interactions.times[rows], len(tables.users.ids))


def _impressions(tables: ShopTables, exposures: Exposures, histories: Histories) -> Impressions:
    rows, truth = exposures.rows, tables.interactions.truth
    users, times = tables.user_rows[rows], tables.interactions.times[rows]
    ends = history_ends(histories, users, times)
    return Impressions(users, tables.item_rows[rows], times, ends, exposures.labels, None if truth is None else truth[rows])


def _titles(shop: Shop, items: Rows) -> Array:
    """[I + 1] S: titles as UTF-8, cut at TITLE_BYTES without splitting a letter."""
    if shop.items is None or shop.items.title is None:
        return np.zeros(len(items.ids) + 1, "S1")
    texts = pc.fill_null(texts_from_column(items.columns[shop.items.title]), "")
    cut = pc.utf8_slice_codeunits(texts, 0, TITLE_BYTES).cast(pa.large_binary())
    titles = np.array(["", *cut.to_pylist()], dtype="O")
    titles[0] = b""
    for row in 1 + np.flatnonzero(pc.binary_length(cut).to_numpy(zero_copy_only=False) > TITLE_BYTES):
        titles[row] = titles[row][:TITLE_BYTES].decode(errors="ignore").encode()
    ordered = np.full(len(items.ids) + 1, b"", dtype="O")
    ordered[items.index + 1] = titles[1:]
    return ordered.astype("S") if len(ordered) else np.zeros(1, "S1")
