"""Holds what the offline stages read: a shop as dense arrays. Nothing here knows a file format."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from ensemble.arrays import Array
from ensemble.release.events import event_cells
from ensemble.schema import Schema, schema_from_json
from ensemble.steps.features import Past

_STRIDE = 7919  # a prime: neighbours get exposures of different times


@dataclass(frozen=True)
class Histories:
    """Holds positive events in time order (CSR): user u has item_rows[offsets[u] : offsets[u + 1]]."""

    offsets: Array  # [U + 2] int64; user row 0 (unknown) is empty
    item_rows: Array  # [P] int64
    times: Array  # [P] int64, seconds (or positions, where the shop has no clock)
    kinds: Array  # [P] uint8, each event's kind, from 1 in the order of the schema's events


@dataclass(frozen=True)
class Targets:
    """Holds held-out next items: each row is a user, how much of the history is known, and what came next."""

    user_rows: Array  # [Q] int64
    # [Q] int64, absolute end into Histories.item_rows: known = item_rows[offsets[u]:history_ends]
    history_ends: Array
    item_rows: Array  # [Q] int64, the true next item


@dataclass(frozen=True)
class Impressions:
    """Holds shown items and what became of them; a label is NaN where its task is not defined."""

    user_rows: Array  # [E] int64
    item_rows: Array  # [E] int64
    times: Array  # [E] int64
    # [E] int64, absolute end into Histories.item_rows: positives strictly before this impression
    history_ends: Array
    labels: Array  # [E, T] float32
    positions: Array  # [E] int64, the place where the item was shown, 1 = first; 0 = unknown
    # [E, T] float32, planted probabilities of a generated shop (aligned, tests only)
    truth: Array | None = None
    # [E, T] float32, the labels as known when all periods are over, which a refit learns from; None: the same
    settled: Array | None = None
    # [E] float64, the chance with which the item was shown, NaN where unknown; None: the shop logs none
    propensities: Array | None = None
    # [E, T] int64, when each label came to be known: a purchase that an exposure led to comes later than it
    known_times: Array | None = None
    # [E, X] float32, what each said of its context, NaN where nothing (ensemble/context.py); None: no context
    contexts: Array | None = None

    def at(self, rows: Array) -> Impressions:
        """Gives the impressions at `rows`, int64 or bool."""
        return Impressions(
            **{
                entry.name: of[rows]
                for entry in fields(self)
                if (of := getattr(self, entry.name)) is not None
            }
        )

    def behind(self, place: int) -> Impressions:
        """Gives the impressions from a place on."""
        arrays = ((entry.name, getattr(self, entry.name)) for entry in fields(self))
        return Impressions(**{name: array[place:] for name, array in arrays if array is not None})


@dataclass(frozen=True)
class Dataset:
    """Holds one shop. Rows are dense: row 0 is "unknown", row 1 + i is the i-th id in byte order."""

    schema: Schema
    item_ids: Array  # [I] S, sorted
    user_ids: Array  # [U] S, sorted
    item_titles: Array  # [I + 1] S, UTF-8, cut at 120 bytes; empty where there is none
    item_codes: Array  # [I + 1, C] int32
    item_values: Array  # [I + 1, R] float32, standardized, 0 where missing
    user_codes: Array  # [U + 1, C] int32
    user_values: Array  # [U + 1, R] float32
    vocabularies: dict[
        str, dict[str, list[str]]
    ]  # {"items": {feature: [value, …]}, "users": …}, categories only
    histories: Histories
    train_ends: Array  # [U + 1] int64, absolute end into Histories.item_rows of what may be trained on
    validation: Targets
    test: Targets
    train_impressions: Impressions | None  # None: no labels; the ranker's task is then `interact`
    validation_impressions: Impressions | None
    test_impressions: Impressions | None
    item_numbers: Array  # [I + 1, n] float32, number features as the shop wrote them, NaN where missing
    item_encoding: list[dict[str, Any]]  # builders.data.packing.Packed.encoding
    # [U + 1] int64, absolute end into Histories.item_rows of what is served as history, and refitted on
    known_ends: Array
    split: dict[str, Any]  # shop.toml's, as JSON-able data

    @property
    def refit_impressions(self) -> tuple[Impressions, ...]:
        """Gives the impressions that a refit learns from, training's first; a published test is none of
        them."""
        parts = (self.train_impressions, self.validation_impressions, self.test_impressions)
        return tuple(part for part in parts[: 2 if self.split["keep_test"] else 3] if part is not None)

    @property
    def num_items(self) -> int:
        return len(self.item_ids)

    @property
    def num_users(self) -> int:
        return len(self.user_ids)


def save_dataset(dataset: Dataset, folder: Path) -> None:
    """Writes one .npy an array, named by its path in the dataset; schema and vocabularies as JSON."""
    save_arrays(dataset, folder, tuple(entry.name for entry in fields(Dataset)))
    (folder / "schema.json").write_text(dataset.schema.to_json())
    (folder / "vocabularies.json").write_text(json.dumps(dataset.vocabularies))
    (folder / "encoding.json").write_text(json.dumps(dataset.item_encoding))
    (folder / "split.json").write_text(json.dumps(dataset.split))


def save_arrays(dataset: Dataset, folder: Path, parts: tuple[str, ...]) -> None:
    """Writes the arrays of some of the dataset's parts, by the names of its fields."""
    for name, value in _leaves(dataset, ""):
        if isinstance(value, np.ndarray) and name.partition(".")[0] in parts:
            np.save(folder / f"{name}.npy", value, allow_pickle=False)


def open_dataset(folder: Path) -> Dataset:
    """Memory-maps what save_dataset wrote."""
    arrays: dict[str, Any] = {}
    for path in folder.glob("*.npy"):
        place, *rest = path.stem.split(".")
        array = np.load(path, mmap_mode="c", allow_pickle=False)  # private and writable, as torch wants it
        arrays[place] = {**arrays.get(place, {}), rest[0]: array} if rest else array
    for place, kind in _PARTS.items():
        arrays[place] = kind(**arrays[place]) if place in arrays else None
    vocabularies, encoding, split = (
        json.loads((folder / f"{name}.json").read_text()) for name in ("vocabularies", "encoding", "split")
    )
    return Dataset(
        schema=open_schema(folder), vocabularies=vocabularies, item_encoding=encoding, split=split, **arrays
    )


def open_schema(folder: Path) -> Schema:
    """Reads the schema that the data stage wrote, and later stages link."""
    return schema_from_json((folder / "schema.json").read_text())


_PARTS: dict[str, Any] = {
    "histories": Histories,
    "validation": Targets,
    "test": Targets,
    "train_impressions": Impressions,
    "validation_impressions": Impressions,
    "test_impressions": Impressions,
}


def _leaves(part: Any, prefix: str) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for entry in fields(part):
        value = getattr(part, entry.name)
        found += (
            _leaves(value, f"{prefix}{entry.name}.")
            if entry.name in _PARTS and value is not None
            else [(prefix + entry.name, value)]
        )
    return found


def training_histories(dataset: Dataset) -> tuple[Array, Array]:
    """Gives the part of each history that may be trained on: offsets [U + 2], item_rows [P], int64."""
    histories = dataset.histories
    lengths = np.maximum(dataset.train_ends - histories.offsets[:-1], 0)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    source = np.repeat(histories.offsets[:-1] - offsets[:-1], lengths) + np.arange(offsets[-1])
    return offsets, histories.item_rows[source]


def past_windows(histories: Histories, user_rows: Array, history_ends: Array, length: int) -> Past:
    """Gives the last `length` events before each end [L] as a past: [L, H] each, newest last, left padded."""
    place, inside = _window_places(histories, user_rows, history_ends, length)
    if not len(histories.item_rows):
        return Past(
            np.full(place.shape, -1, np.int64),
            np.zeros(place.shape, np.int64),
            np.zeros(place.shape, np.int32),
        )
    parts = ((histories.item_rows, -1), (histories.times, 0), (histories.kinds.astype(np.int32), 0))
    return Past(*(np.where(inside, column[place], pad) for column, pad in parts))


def history_windows(histories: Histories, user_rows: Array, history_ends: Array, length: int) -> Array:
    """Gives the last `length` items before each end: [L, H] int64, newest last, left padded with -1."""
    place, inside = _window_places(histories, user_rows, history_ends, length)
    if not len(histories.item_rows):
        return np.full(place.shape, -1, np.int64)
    return np.where(inside, histories.item_rows[place], -1)


def cell_windows(dataset: Dataset, user_rows: Array, history_ends: Array, length: int) -> Array:
    """Gives the cells of the last `length` events before each end: [L, H] int64, as in history_windows; those
    of padding add nothing (ensemble/release/events.py)."""
    past = past_windows(dataset.histories, user_rows, history_ends, length + 1)
    return event_cells(dataset.schema, past.times, past.kinds)[:, 1:]


def moments(histories: Histories, user_rows: Array, history_ends: Array) -> Array:
    """Gives when users [L] are asked about whose known events end at `history_ends` [L]: the time of the next
    event, or of the last where none follows: [L] int64; 0 for a user without events."""
    if not len(histories.times):
        return np.zeros(len(user_rows), np.int64)
    begin, stop = histories.offsets[user_rows], histories.offsets[user_rows + 1]
    place = np.clip(np.minimum(history_ends, stop - 1), 0, None)
    return np.where(stop > begin, histories.times[place], 0)


def _window_places(
    histories: Histories, user_rows: Array, history_ends: Array, length: int
) -> tuple[Array, Array]:
    """Gives where the last `length` events before each end stand [L, H] int64, and which of them are the
    user's [L, H] bool."""
    position = history_ends[:, None] - length + np.arange(length)
    inside = position >= histories.offsets[user_rows][:, None]
    return np.clip(position, 0, max(0, len(histories.item_rows) - 1)), inside


def some_contexts(dataset: Dataset, user_rows: Array) -> Array:
    """Gives users [B] the context of some training exposure each [B, X], NaN where it says nothing:
    engines are calibrated and compared on such as they will meet."""
    shown = dataset.train_impressions
    if shown is None or shown.contexts is None or not len(shown.times):
        return np.full((len(user_rows), len(dataset.schema.context)), np.nan, np.float32)
    return np.asarray(shown.contexts)[user_rows * _STRIDE % len(shown.times)]
