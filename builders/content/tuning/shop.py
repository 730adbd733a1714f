"""Reads of a shop what its encoders are tuned on: its items' texts and pictures, and what its users clicked
within a short time, by training events alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from builders.content.features import Pictures, Texts, inputs_of
from builders.content.sources import encoded_features, find_source
from builders.content.tuning.material import Material, View, is_held_out, numbered
from builders.content.tuning.towers import refuse_own
from builders.data.dataset import Dataset, training_histories
from builders.data.stage import dataset_from_tables
from builders.shop.columns.categories import lists_from_column
from builders.shop.read import ShopTables, read_shop
from builders.shop.shop_toml import FeatureColumn
from ensemble.arrays import Array
from ensemble.errors import InvalidInput

_SOON_S = 30 * 60  # between two clicks of a user: with one intention
_MOST_PAIRS = 1_000_000


def material_of(shop: Path) -> Material:
    """Reads a shop; InvalidInput where it has nothing to tune, or nothing to tune it on."""
    tables = read_shop(shop)
    features = _tuned_features(tables)
    for feature in features:
        refuse_own(find_source(feature, shop))
    inputs = [_inputs(feature, tables, shop) for feature in features]
    there = np.all([of.places >= 0 for of in inputs], axis=0)
    for feature, of in zip(features, inputs, strict=True):
        if not (of.places >= 0).any():
            what = "a text" if feature.kind == "text" else "a picture's file"
            raise InvalidInput(
                f"no item has {what} in {feature.source!r}, which the feature {feature.name!r} encodes",
                "fill the column, or leave the feature's encoder out",
            )
    rows = np.flatnonzero(there)  # of the table, as read
    ids = [tables.items.ids[at] for at in tables.items.index[rows].tolist()]
    held = is_held_out(ids)
    views = tuple(_view(feature, of, rows, shop) for feature, of in zip(features, inputs, strict=True))
    place = np.full(len(tables.items.ids) + 1, -1, np.int64)
    place[tables.items.index[rows] + 1] = np.arange(len(rows))
    together = place[clicked_together(dataset_from_tables(tables))]
    there = (together >= 0).all(axis=1)
    return Material(views, held, _groups(tables, rows), together[there])


def _tuned_features(tables: ShopTables) -> list[FeatureColumn]:
    """Gives the first text and the first image that an encoder reads; InvalidInput where there is neither."""
    features = encoded_features(tables.shop.items.features if tables.shop.items else [])
    found = [next((f for f in features if f.kind == kind), None) for kind in ("text", "image")]
    if not any(found):
        raise InvalidInput(
            "shop.toml names no encoder of its items' texts or images, so there is nothing to tune",
            'give a text or image feature of the items an encoder, such as encoder = "minilm"',
        )
    return [feature for feature in found if feature is not None]


def _inputs(feature: FeatureColumn, tables: ShopTables, shop: Path) -> Texts | Pictures:
    inputs = inputs_of(feature, tables.items.columns[feature.source], shop, shop)
    if isinstance(inputs, Texts):
        empty = np.array([not text.strip("\0 \t\r\n") for text in inputs.texts], bool)
        inputs.places = np.where(empty[inputs.places], -1, inputs.places)
    return inputs


def _view(feature: FeatureColumn, inputs: Texts | Pictures, rows: Array, shop: Path) -> View:
    places = inputs.places[rows]
    return View(
        feature.name,
        find_source(feature, shop),
        places.astype(np.int64),
        lambda of: list(inputs.read([int(places[at]) for at in of])),
    )


def _groups(tables: ShopTables, rows: Array) -> Array:
    """Gives each item's group: its first category; -1 where the shop has none."""
    features = tables.shop.items.features if tables.shop.items else []
    feature = next((f for f in features if f.kind == "category"), None)
    if feature is None:
        return np.full(len(rows), -1, np.int64)
    of, texts = lists_from_column(tables.items.columns[feature.source], feature.separator)
    numbers, first = np.full(len(tables.items.index), -1, np.int64), numbered(texts.to_pylist())
    numbers[of[::-1]] = first[::-1]  # the first value of each row is written last
    return numbers[rows]


def clicked_together(dataset: Dataset) -> Array:
    """Lists pairs of item rows [m, 2] int64 that one user took one after the other within _SOON_S seconds,
    of training events alone; where the shop has no clock, one after the other. Each pair once."""
    offsets, items = training_histories(dataset)
    histories = dataset.histories
    if len(items) < 2:
        return np.zeros((0, 2), np.int64)
    lengths = np.diff(offsets)
    source = np.repeat(histories.offsets[:-1] - offsets[:-1], lengths) + np.arange(len(items))
    users, times = np.repeat(np.arange(len(lengths)), lengths), np.asarray(histories.times)[source]
    soon = (users[1:] == users[:-1]) & (items[1:] != items[:-1])
    if dataset.schema.has_clock:
        soon &= times[1:] - times[:-1] <= _SOON_S
    pairs = np.stack([items[:-1][soon], items[1:][soon]], axis=1).astype(np.int64)
    pairs = np.unique(np.sort(pairs, axis=1), axis=0)
    if len(pairs) > _MOST_PAIRS:
        chosen = np.random.default_rng(0).choice(len(pairs), _MOST_PAIRS, replace=False)
        pairs = pairs[np.sort(chosen)]
    return pairs
