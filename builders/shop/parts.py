"""Reads which rows train, validate and test where the shop itself says it: by a column, or by files of their
own."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from builders.shop.columns.categories import texts_from_column
from builders.shop.columns.column import Column, first_true
from builders.shop.shop_toml import Split
from ensemble.arrays import Array
from ensemble.errors import InvalidInput

TRAIN, VALIDATION, TEST = 0, 1, 2
NEVER = np.iinfo(np.int64).max  # a time that does not come
_NAMES = {
    "train": TRAIN, "training": TRAIN, "validation": VALIDATION, "valid": VALIDATION, "val": VALIDATION,
    "dev": VALIDATION, "test": TEST,
}  # fmt: skip


def given_parts(split: Split, columns: Mapping[str, Column], times: Array, file_of: Array) -> Array | None:
    """Gives the part of each row [n] int64, 0 training, 1 validation, 2 test; None where the shop leaves it
    to us.

    Where nothing validates, the last of what trains does: `split.validation` of it by its times [n]. file_of
    [n] says which of the interactions' files each row is of.
    """
    if split.kind == "files":
        parts = np.array([TRAIN, *split.files.values()])[file_of]
        where = f"{split.test_file}, the test file,"
    elif split.column is not None:
        parts = _from_column(columns[split.column])
        where = f"{columns[split.column].file}: column {split.column!r}"
    else:
        return None
    for part, name in ((TRAIN, "train"), (TEST, "test")):
        if not (parts == part).any():
            raise InvalidInput(f"{where} has no row to {name}; a split needs rows of both")
    if not (parts == VALIDATION).any():
        cut = np.quantile(times[parts == TRAIN], 1 - split.validation, method="higher")
        parts = np.where((parts == TRAIN) & (times >= cut), VALIDATION, parts)
    if not (parts == TRAIN).any():
        raise InvalidInput(
            f"{where} leaves nothing to train on: all other rows are of one time, and validate"
        )
    return parts


def _from_column(column: Column) -> Array:
    """Reads the names of parts [n]."""
    texts = texts_from_column(column).dictionary_encode()
    known = np.array(
        [_NAMES.get(str(text).strip().lower(), -1) for text in texts.dictionary.to_pylist()] + [-1]
    )
    parts = known[texts.indices.fill_null(len(known) - 1).to_numpy(zero_copy_only=False)]
    wrong = first_true(parts < 0)
    if wrong >= 0:
        raise column.error(wrong, "is no part of a split; write train, validation or test")
    return parts


def in_order(users: Array, times: Array, parts: Array, num_users: int) -> bool:
    """Says whether every user's parts follow each other in time, none begins within the one before it."""
    for part in (VALIDATION, TEST):
        before, after = np.full(num_users + 1, -1), np.full(num_users + 1, NEVER)
        np.maximum.at(before, users[parts < part], times[parts < part])
        np.minimum.at(after, users[parts >= part], times[parts >= part])
        if (before >= after).any():
            return False
    return True


def said_of(users: Array, times: Array, parts: Array, num_users: int) -> dict[str, str | int]:
    """Says how many rows each part has, and whether the parts follow the clock."""
    counts = np.bincount(parts, minlength=3).tolist()
    order = "each user's parts follow the clock"
    if not in_order(users, times, parts, num_users):
        order = "parts overlap in time: times say no more than which came first within a part"
    names = ("rows that train", "that validate", "that test")
    return {**dict(zip(names, counts, strict=True)), "order": order}


def places_in_order(times: Array, parts: Array) -> Array:
    """Gives each row's place in the order of parts, then times, from 0; those of one part and time share
    it."""
    order = np.lexsort((times, parts))
    new = np.ones(len(order), bool)
    new[1:] = (times[order][1:] != times[order][:-1]) | (parts[order][1:] != parts[order][:-1])
    places = np.empty(len(order), np.int64)
    places[order] = np.cumsum(new) - 1
    return places


def cuts_of(users: Array, times: Array, parts: Array, num_users: int) -> tuple[Array, Array]:
    """Gives when each user's validation, and when their test, begins: [U + 1] int64; never where there is
    none."""
    cuts = tuple(np.full(num_users + 1, NEVER) for _ in range(2))
    for part, cut in zip((VALIDATION, TEST), cuts, strict=True):
        np.minimum.at(cut, users[parts >= part], times[parts >= part])
    return cuts[0], cuts[1]
