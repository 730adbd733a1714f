"""What an event and an item's update are, and what is wrong with one: named before anything is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ensemble.contract import MAX_ID_BYTES
from ensemble.errors import InvalidArgument
from ensemble.tiers import records as rows

Id = str | int | bytes


@dataclass(frozen=True)
class Event:
    """Somebody did something with an item. `time`: seconds, or any number that grows; `event`: its name, at
    most 64 bytes."""

    user_id: Id
    item_id: Id
    event: str
    time: float


@dataclass(frozen=True)
class ItemUpdate:
    """New parts of an item's row, packed as the release has them (snapshot.py): codes and values by the
    feature's name."""

    item_id: Id
    time: float
    features: Sequence[float] | None = None  # [F]
    codes: Mapping[str, Sequence[int]] | None = None
    values: Mapping[str, Sequence[float]] | None = None


def packed_update(row_format: rows.RowFormat, update: ItemUpdate) -> tuple[np.ndarray, np.ndarray]:
    """A row [1] with the update's numbers, and which of its words [words] bool they are; InvalidArgument
    names what does not fit."""
    row, given = np.zeros(1, row_format.row), np.zeros(1, row_format.row)
    if update.features is not None:
        row["features"], given["features"] = (
            _numbers("features", update.features, row["features"].shape[1], None),
            1,
        )
    for field, parts in (("codes", update.codes), ("values", update.values)):
        for name, numbers in (parts or {}).items():
            feature = next(
                (
                    f
                    for f in row_format.schema.items.features
                    if f.name == name and f.is_code == (field == "codes")
                ),
                None,
            )
            if feature is None:
                raise InvalidArgument(f"{field}: items have no such feature {name!r}")
            limits = (feature.offset, feature.offset + feature.size - 1) if feature.is_code else None
            row[field][0, feature.columns], given[field][0, feature.columns] = (
                _numbers(name, numbers, feature.width, limits),
                1,
            )
    marked = given.view(np.uint32) != 0
    if not marked.any():
        raise InvalidArgument("update: give features, codes or values")
    return row, marked


def _numbers(name: str, numbers: Any, width: int, limits: tuple[int, int] | None) -> np.ndarray:
    kinds = (int,) if limits else (int, float)
    if (
        not isinstance(numbers, (list, tuple))
        or len(numbers) != width
        or not all(isinstance(n, kinds) and not isinstance(n, bool) for n in numbers)
    ):
        raise InvalidArgument(f"{name}: must be a list of {width} {'whole ' if limits else ''}numbers")
    if limits and not all(n == 0 or limits[0] <= n <= limits[1] for n in numbers):
        raise InvalidArgument(f"{name}: codes must be 0 or {limits[0]}..{limits[1]}")
    if not limits and not all(abs(n) < 3e38 for n in numbers):  # false for NaN, too
        raise InvalidArgument(f"{name}: must be finite float32 numbers")
    return np.array(numbers)


def check_event(event: Event) -> tuple[bytes, bytes, float]:
    """An event as it is written: user id, item id, time; InvalidArgument names the field."""
    if not isinstance(event.event, str) or not 0 < len(event.event.encode(errors="replace")) <= 64:
        raise InvalidArgument("event: must be a name of 1 to 64 bytes")
    return encode_id("user_id", event.user_id), encode_id("item_id", event.item_id), check_time(event.time)


def encode_id(field: str, value: Id) -> bytes:
    """An id as bytes; InvalidArgument by the same rules as `recommend`'s."""
    if not isinstance(value, (str, int, bytes)) or isinstance(value, bool):
        raise InvalidArgument(f"{field}: must be a string or an integer")
    try:
        encoded = value if isinstance(value, bytes) else str(value).encode()
        encoded.decode()
    except UnicodeError:
        raise InvalidArgument(f"{field}: is not UTF-8") from None
    if not 0 < len(encoded) <= MAX_ID_BYTES or encoded.endswith(b"\0"):
        raise InvalidArgument(f"{field}: must have 1 to {MAX_ID_BYTES} bytes and not end in a NUL byte")
    return encoded


def check_time(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e300:  # NaN, too
        raise InvalidArgument("time: must be a finite number, such as seconds since 1970")
    return float(value)
