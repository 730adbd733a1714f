"""Turns a new or changed item, as JSON, into its packed row.

Features are packed as the build packed them, vectors come from the release's item_encoder. A new item has no
learned id row: the encoder gets the release's row for new items, and the item's features speak for it. A
changed item keeps what was learned of it: its embedding moves by what the encoder says the change of its
features is worth.
"""

from __future__ import annotations

import contextlib
import json
import re
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from ensemble.arrays import Array
from ensemble.engines import EngineStep
from ensemble.errors import InvalidInput, ReleaseError
from ensemble.options import default_options
from ensemble.release.release import Release
from ensemble.release.snapshot import item_dtype
from ensemble.schema import Feature, number_names

ENCODING = "encoding.json"  # what builders.data.packing did to each column
_KEYS = ("item_id", "item_embedding", "title")  # beside features, unless a feature has that name
_WORD = re.compile(r"[^\W_]+")


class ItemEncoding:
    """Holds the release's own way from a catalogue entry to a row."""

    def __init__(self, release: Release) -> None:
        if not (release.path / ENCODING).exists():
            raise ReleaseError(
                f"release {release.name} has no {ENCODING}, so items cannot be added or updated",
                "build it again",
            )
        release.verify_data(ENCODING, "new_item_id_embedding.npy", "vocabularies.json")
        self.schema, self.dtype = release.schema, item_dtype(release.schema)
        self.how = {entry["name"]: entry for entry in json.loads((release.path / ENCODING).read_text())}
        vocabularies = release.vocabularies.get("items", {})
        self.code_of = {
            name: {value: v for v, value in enumerate(values)} for name, values in vocabularies.items()
        }
        self.numbers = {name: column for column, name in enumerate(number_names(release.schema))}
        self.new_id = np.load(release.path / "new_item_id_embedding.npy", allow_pickle=False)
        self.features = {f.name: f for f in release.schema.items.features}
        # A field of an item is a feature's own name, or its column in the shop's file
        self.fields = {
            key: entry["name"] for entry in self.how.values() for key in (entry["name"], entry["source"])
        }
        self.engine = EngineStep(release.model("item_encoder"), release)

    def rows(
        self, changes: list[Mapping[str, Any]], old: Array, old_numbers: Array, is_new: Array
    ) -> tuple[Array, Array]:
        """Encodes n items, whose old rows [n] and numbers [n, *] count unless is_new [n].

        Gives packed rows [n] and numbers [n, *].
        """
        rows, numbers = old.copy(), old_numbers.copy()
        rows[is_new], numbers[is_new] = np.zeros(1, self.dtype)[0], np.nan
        for i, change in enumerate(changes):
            self._write(change, rows[i], numbers[i])
        embedding, features = self._encode(rows)
        kept = np.flatnonzero(~is_new)
        if len(kept):
            before, features_before = self._encode(old[kept])
            moved = old["embedding"][kept] + embedding[kept] - before
            length = np.linalg.norm(embedding[kept], axis=1, keepdims=True) / np.maximum(
                np.linalg.norm(moved, axis=1, keepdims=True), 1e-12
            )
            same = (embedding[kept] == before).all(axis=1, keepdims=True)
            embedding[kept] = np.where(same, old["embedding"][kept], moved * length)
            features[kept] = old["features"][kept] + features[kept] - features_before
        rows["embedding"], rows["features"] = embedding, features
        self._own_embeddings(changes, rows)
        return rows, numbers

    def _own_embeddings(self, changes: list[Mapping[str, Any]], rows: Array) -> None:
        """Puts in embeddings that the caller brings; InvalidInput for an item that could not be recalled."""
        for i, change in enumerate(changes):
            if "item_embedding" in change:
                rows["embedding"][i] = self._embedding(change)
            if not np.isfinite(rows["embedding"][i]).all() or not np.isfinite(rows["features"][i]).all():
                raise InvalidInput(
                    f"item {change['item_id']!r}: the item_encoder gives NaN or infinity for it",
                    "check its features",
                )
            if not rows["embedding"][i].any():
                raise InvalidInput(
                    f"item {change['item_id']!r}: its embedding is all zeros, so no search could find it"
                )

    def _embedding(self, change: Mapping[str, Any]) -> Array:
        """Reads the embedding [D] that the caller brings."""
        wanted, given = self.schema.sizes.embedding, change["item_embedding"]
        # JSON's numbers; true is none.
        if isinstance(given, list) and len(given) == wanted and set(map(type, given)) <= {int, float}:
            with contextlib.suppress(OverflowError), np.errstate(over="ignore"):
                vector = np.array(given, np.float32)
                if np.isfinite(vector).all():
                    return vector
        count = f"{len(given)} components" if isinstance(given, list) else type(given).__name__
        raise InvalidInput(
            f"item {change['item_id']!r}: item_embedding must be {wanted} finite numbers, got {count}"
        )

    def _encode(self, rows: Array) -> tuple[Array, Array]:
        """Encodes rows [n] as items that are only known by their codes and values: embedding [n, D], features
        [n, F]."""
        ids = np.repeat(self.new_id, len(rows), axis=0)
        feeds = {
            "item_id_embedding": ids,
            "item_codes": np.ascontiguousarray(rows["codes"]),
            "item_values": np.ascontiguousarray(rows["values"]),
        }
        outputs = self.engine.run(default_options(len(rows)), **feeds)
        return outputs["item_embedding"].copy(), outputs["item_features"].copy()

    def _write(self, change: Mapping[str, Any], row: np.void, numbers: Array) -> None:
        """Writes the item's fields into codes, values and numbers, in place."""
        known = self.fields
        for key, value in change.items():
            if key in _KEYS and key not in known:
                continue
            if key not in known:
                raise InvalidInput(
                    f"item {change['item_id']!r}: no item feature {key!r}",
                    f"known: {', '.join(sorted(known)) or 'none'}",
                )
            try:
                self._write_one(self.features[known[key]], value, row, numbers)
            except ValueError as error:
                raise InvalidInput(f"item {change['item_id']!r}: {key}: {error}") from None

    def _write_one(self, feature: Feature, value: Any, row: np.void, numbers: Array) -> None:
        """Writes one field into its columns; ValueError says what is wrong with the value."""
        how = self.how[feature.name]
        if feature.is_code:
            read = self._category if feature.kind == "category" else self._words
            kept = read(feature, value)[: feature.width]
            codes = np.zeros(feature.width, np.int32)
            codes[: len(kept)] = [feature.offset + index for index in kept]
            row["codes"][feature.columns] = codes
            return
        given = _numbers(value, feature.width, how["separator"])
        if feature.name in self.numbers:
            numbers[self.numbers[feature.name]] = np.nan if given is None else given[0]
        row["values"][feature.columns] = 0 if given is None else _standardized(given, how)

    def _category(self, feature: Feature, value: Any) -> list[int]:
        """Gives the codes of a category's values, without its offset: 0 for one the vocabulary lacks."""
        values = [_text(v) for v in value] if isinstance(value, list) else [_text(value)]
        separator = self.how[feature.name]["separator"]
        if separator is not None:
            values = [part.strip() for text in values for part in text.split(separator)]
        known = self.code_of[feature.name]
        return [known[v] + 1 if v in known else 0 for v in values if v]

    def _words(self, feature: Feature, value: Any) -> list[int]:
        """Gives the hash buckets of a text's words."""
        return [zlib.crc32(word.encode()) % feature.size for word in _WORD.findall(_text(value).lower())]


def _text(value: Any) -> str:
    """Gives a value's text as builders.shop.tables.texts_from_column does: whole numbers as decimal text,
    booleans as true and false."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if value is None or isinstance(value, (str, int)):
        return "" if value is None else str(value)
    raise ValueError(f"must be text or a whole number, got {type(value).__name__}")


def _numbers(value: Any, width: int, separator: str | None) -> Array | None:
    """Gives a value as [width] float64; None where it is missing, ValueError where it is no number."""
    if value is None or value == "":
        return None
    parts: Any = (
        value.split(separator or " ")
        if isinstance(value, str) and width > 1
        else value
        if isinstance(value, list)
        else [value]
    )
    try:
        numbers = np.array([float(part) for part in parts])
    except (TypeError, ValueError):
        raise ValueError("is no number") from None
    if len(numbers) != width:
        raise ValueError(f"has {len(numbers)} components, the release wants {width}")
    if not np.isfinite(numbers).all():
        raise ValueError("is no finite number; use null where a value is missing")
    return numbers


def _standardized(numbers: Array, how: Mapping[str, Any]) -> Array:
    """Standardizes numbers with the same arithmetic as builders.data.packing."""
    if how["log1p"]:
        if (numbers < 0).any():
            raise ValueError("is negative; its feature is read as log(1 + x)")
        numbers = np.log1p(numbers)
    scaled = (numbers - np.array(how["mean"])) / np.array(how["deviation"])
    return np.clip(scaled, -how["limit"], how["limit"]).astype(np.float32)
