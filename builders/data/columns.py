"""Says what each column of a shop was taken for, how many ids join, and what looks wrong with either."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np

from builders.shop.columns.categories import warn_of_words
from builders.shop.columns.ids import likenesses, would_join
from builders.shop.read import MOST_DROPPED, ShopTables
from builders.shop.shop_toml import Entities
from ensemble.arrays import Array

FEW_JOIN = 0.5  # share of the log's users, below which those that the users' file lacks are warned of
FEW_TAKEN = 0.1  # share of the items' file that the log names, below which that is warned of
MANY_MISSING = 0.9  # share of an item's or user's cells, above which that is warned of


def columns_said(tables: ShopTables, warnings: list[str]) -> list[dict[str, Any]]:
    """Lists what each column was taken for, its range and its missing cells; adds what looks wrong to
    `warnings`."""
    shop = tables.shop
    for entity, rows in ((shop.items, tables.items), (shop.users, tables.users)):
        for feature in entity.features if entity else []:
            if feature.kind == "category" and feature.separator is None:
                warn_of_words(rows.columns[feature.source])
    lengths = {id(one): len(tables.interactions) for one in tables.interactions.said}
    lengths |= {id(one): len(rows.index) for rows in (tables.items, tables.users) for one in rows.said}
    found = []
    for said in (*tables.interactions.said, *tables.items.said, *tables.users.said):
        warnings += [f"{said.file}: column {said.name!r}: {text}" for text in said.warnings]
        is_log = said.file == shop.interactions.file  # most of whose labels may well not have come in
        if not is_log and 1 > said.missing / max(lengths[id(said)], 1) > MANY_MISSING:
            warnings.append(
                f"{said.file}: column {said.name!r} is empty in {said.missing:,} of "
                f"{lengths[id(said)]:,} rows"
            )
        found.append({name: value for name, value in asdict(said).items() if name != "warnings"})
    return found


def joins(tables: ShopTables, sections: dict[str, dict[str, Any]], warnings: list[str]) -> None:
    """Says, for each table, how many of its ids the log names, and how many of the log's ids it has."""
    shop, log = tables.shop, tables.interactions
    if log.num_unnamed:
        share = log.num_unnamed / (log.num_unnamed + len(log) + tables.num_dropped)
        warnings.append(
            f"{log.num_unnamed:,} interactions ({share:.1%}) are left out: they lack a user or item"
        )
    section: dict[str, Any] = {}
    pairs = (
        ("items", shop.items, tables.logged_items, tables.items.ids if shop.items else None, FEW_TAKEN, 0.0),
        ("users", shop.users, tables.logged_users, tables.told_users, 0.0, FEW_JOIN),
    )
    for what, entity, logged, told, few_taken, few_known in pairs:
        for text in likenesses(logged):
            warnings.append(f"{shop.interactions.file}: {what}: {text}")
        if entity is None or told is None:
            continue
        _join(what, entity, logged, told, section, warnings, (few_taken, few_known))
        for text in likenesses(told):
            warnings.append(f"{entity.file}: {text}")
    if section:
        section["refused"] = f"where more than {MOST_DROPPED:.0%} of the rows name unknown items"
        sections["ids that join"] = section


def _join(
    what: str,
    entity: Entities,
    logged: Array,
    told: Array,
    section: dict[str, Any],
    warnings: list[str],
    few: tuple[float, float],
) -> None:
    """Says how the ids that are logged [L] S and told [T] S join; `few`: shares of told and logged ones."""
    absent, idle = np.setdiff1d(logged, told), np.setdiff1d(told, logged)
    known, taken = 1 - len(absent) / max(len(logged), 1), 1 - len(idle) / max(len(told), 1)
    section[f"{what} of the log"] = (
        f"{len(logged) - len(absent):,} of {len(logged):,} ({known:.1%}) are in "
        f"{entity.file}{_example(absent)}"
    )
    section[f"{what} of {entity.file}"] = (
        f"{len(told) - len(idle):,} of {len(told):,} ({taken:.1%}) are in the log{_example(idle)}"
    )
    for hint in would_join(absent, told) if len(absent) else []:
        warnings.append(f"{what}: {len(absent):,} ids of the log are not in {entity.file}; {hint}")
    if known < few[1]:
        warnings.append(f"{what}: {len(absent):,} of the log's {len(logged):,} are not in {entity.file}")
    if taken < few[0]:
        warnings.append(f"{what}: {len(idle):,} of {entity.file}'s {len(told):,} occur in no interaction")


def _example(ids: Array) -> str:
    return f"; not {ids[0].decode()!r}" if len(ids) else ""
