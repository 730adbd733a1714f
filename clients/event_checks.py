"""Says what an event and an item's update are, and finds what is wrong with one before it is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ensemble.arrays import Array
from ensemble.errors import InvalidArgument
from ensemble.id_rule import recorded_id
from ensemble.schema import Feature, Schema
from ensemble.tiers import records as rows
from ensemble.time_rule import check_time

Id = str | int | bytes


@dataclass(frozen=True)
class Event:
    """Says that somebody did something with an item. `time`: Unix seconds, milliseconds, …, told by their
    size, an ISO 8601 text, or a small number that orders; `event`: its name, at most 64 bytes."""

    user_id: Id
    item_id: Id
    event: str
    time: float | str


@dataclass(frozen=True)
class ItemUpdate:
    """Holds new parts of an item's row, packed as the release has them (ensemble/release/snapshot.py): codes
    and values by the feature's name."""

    item_id: Id
    time: float | str
    features: Sequence[float] | None = None  # [F]
    codes: Mapping[str, Sequence[int]] | None = None
    values: Mapping[str, Sequence[float]] | None = None


def packed_update(row_format: rows.RowFormat, update: ItemUpdate) -> tuple[Array, Array]:
    """Gives a row [1] with the update's numbers, and which of its 32-bit words [words] bool they are;
    InvalidArgument names what does not fit."""
    row, marks = np.zeros(1, row_format.row), np.zeros(1, row_format.row)
    if update.features is not None:
        row["features"] = _numbers("features", update.features, row["features"].shape[1], None)
        marks["features"] = 1
    for field, parts in (("codes", update.codes), ("values", update.values)):
        for name, numbers in (parts or {}).items():
            feature = _item_feature(row_format.schema, field, name)
            limits = (feature.offset, feature.offset + feature.size - 1) if feature.is_code else None
            row[field][0, feature.columns] = _numbers(name, numbers, feature.width, limits)
            marks[field][0, feature.columns] = 1
    marked = marks.view(np.uint32) != 0
    if not marked.any():
        raise InvalidArgument("update: give features, codes or values")
    return row, marked


def _item_feature(schema: Schema, field: str, name: str) -> Feature:
    """Finds the item feature that an update names under "codes" or "values"."""
    for feature in schema.items.features:
        if feature.name == name and feature.is_code == (field == "codes"):
            return feature
    raise InvalidArgument(f"{field}: items have no such feature {name!r}")


def _numbers(name: str, numbers: Any, width: int, limits: tuple[int, int] | None) -> Array:
    """Checks the numbers of one feature and gives them as an array [width]; `limits`: those of its codes."""
    kinds = (int,) if limits else (int, float)
    if (
        not isinstance(numbers, (list, tuple))
        or len(numbers) != width
        or not all(isinstance(n, kinds) and not isinstance(n, bool) for n in numbers)
    ):
        kind = "whole numbers" if limits else "numbers"
        raise InvalidArgument(f"{name}: must be a list of {width} {kind}, got {numbers!r:.60}")
    if limits and not all(n == 0 or limits[0] <= n <= limits[1] for n in numbers):
        raise InvalidArgument(f"{name}: codes must be 0 or {limits[0]}..{limits[1]}, got {numbers!r:.60}")
    if not limits and not all(abs(n) < 3e38 for n in numbers):  # false for NaN, too
        raise InvalidArgument(f"{name}: must be finite float32 numbers, got {numbers!r:.60}")
    return np.array(numbers)


def check_event(event: Event) -> tuple[bytes, bytes, str, float]:
    """Gives an event as it is written: user id, item id, name, time; InvalidArgument names the field."""
    if not isinstance(event, Event):
        raise InvalidArgument(f"events: must be a list of Event, got {event!r:.60} in it")
    if not isinstance(event.event, str) or not 0 < len(event.event.encode(errors="replace")) <= 64:
        raise InvalidArgument(f"event: must be a name of 1 to 64 bytes, got {event.event!r:.60}")
    user, item = recorded_id("user_id", event.user_id), recorded_id("item_id", event.item_id)
    return user, item, event.event, check_time(event.time)[0]
