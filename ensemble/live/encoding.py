"""Turns an entry of the catalogue's log into a release's packed row.

Features are packed as the build packed them, vectors come from the release's item_encoder. A new item has no
learned id row: the encoder gets the release's row for new items, and the item's features speak for it. A
changed item keeps what was learned of it: its embedding moves by what the encoder says the change of its
features is worth. All is reckoned from the release's own row, so it does not matter by which way the item
came to its values.
"""

from __future__ import annotations

import contextlib
import json
import re
import zlib
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from ensemble.arrays import Array
from ensemble.content.encoder import EMPTY
from ensemble.contract import IMAGE, TEXT
from ensemble.engines import EngineStep
from ensemble.errors import InvalidInput, ReleaseError
from ensemble.live.catalogue import REPLACE, Entry, log_folder
from ensemble.live.contents import LiveContents
from ensemble.live.new_values import NewValues
from ensemble.live.pictures import keep_picture, picture_from_value
from ensemble.options import default_options
from ensemble.release.release import Release
from ensemble.release.snapshot import item_dtype
from ensemble.schema import Feature, number_names

ENCODING = "encoding.json"  # what builders.data.packing did to each column
TITLE = "title"  # known of every item, also where no feature is made of it
_BESIDE = ("item_id", "item_embedding", TITLE)  # keys of an item beside its features
_WORD = re.compile(r"[^\W_]+")


class ItemEncoding:
    """Holds the release's own way from a catalogue entry to a row."""

    def __init__(self, release: Release, new_values: NewValues | None = None) -> None:
        self.new_values = new_values
        if not (release.path / ENCODING).exists():
            raise ReleaseError(
                f"release {release.name} has no {ENCODING}, so items cannot be added or updated",
                "build it again",
            )
        release.verify_data(ENCODING, "new_item_id_embedding.npy", "vocabularies.json")
        self.release, self.schema, self.dtype = release, release.schema, item_dtype(release.schema)
        self.how = {entry["name"]: entry for entry in json.loads((release.path / ENCODING).read_text())}
        vocabularies = release.vocabularies.get("items", {})
        self.code_of = {
            name: {value: v for v, value in enumerate(values)} for name, values in vocabularies.items()
        }
        self.numbers = {name: column for column, name in enumerate(number_names(release.schema))}
        self.new_id = np.load(release.path / "new_item_id_embedding.npy", allow_pickle=False)
        self.features = {f.name: f for f in release.schema.items.features}
        # A field of an item is a column of the shop's files, or a feature's own name
        self.columns = {entry["name"]: entry["source"] for entry in self.how.values()}
        self.columns |= {entry["source"]: entry["source"] for entry in self.how.values()}
        self.of_column: dict[str, list[Feature]] = {}
        for name, entry in self.how.items():
            self.of_column.setdefault(entry["source"], []).append(self.features[name])
        pictures = [name for name, fs in self.of_column.items() if any(f.encoder == IMAGE for f in fs)]
        self.image_column = pictures[0] if len(pictures) == 1 else "image"  # what `--image` means
        texts = [
            name
            for name, fs in self.of_column.items()
            if any(f.kind == "text" or f.encoder == TEXT for f in fs)
        ]
        self.title_column = texts[0] if len(texts) == 1 else TITLE  # what `--title` says, beside the title
        self.engine = EngineStep(release.model("item_encoder"), release)
        self.contents = LiveContents(release)
        self.left_out: Counter[str] = Counter()  # why values of the log are not in this release's rows

    def values(self, item: Mapping[str, Any]) -> dict[str, Any]:
        """Gives what a change says of an item by column; InvalidInput for a field that the release lacks."""
        values = {}
        if TITLE in item and self.title_column not in map(self.columns.get, item):
            item = {**item, self.title_column: item[TITLE]}
        for given, value in item.items():
            key = self.image_column if given == "image" and given not in self.columns else given
            if key in self.columns:
                values[self.columns[key]] = self._logged(item["item_id"], self.columns[key], value)
            elif key == TITLE:
                if not isinstance(value, str | None):
                    raise InvalidInput(f"item {item['item_id']!r}: title: must be text")
                values[TITLE] = value
            elif key not in _BESIDE:
                raise InvalidInput(
                    f"item {item['item_id']!r}: no item feature {given!r}",
                    f"known: {', '.join(sorted(self.columns)) or 'none'}",
                )
        return values

    def rows(
        self, entries: Sequence[Entry], given: Sequence[Collection[str]] | None = None
    ) -> tuple[Array, Array, Array]:
        """Encodes n items: packed rows [n], numbers [n, *], and whether each can be recalled [n] bool.

        `given` names the columns of each item that must fit the release, else InvalidInput; of all others
        what does not fit is left out, for it was said of another release.
        """
        base = self.release.item_ids.rows_from_ids(np.array([e.item_id.encode() for e in entries]))
        base = np.where([entry.kind == REPLACE for entry in entries], 0, base)
        old, is_new = np.array(self.release.items[base]), base == 0
        rows, numbers = old.copy(), np.array(self.release.item_numbers[base])
        rows[is_new], numbers[is_new] = np.zeros(1, self.dtype)[0], np.nan
        for i, entry in enumerate(entries):
            self._write(entry, rows[i], numbers[i], () if given is None else given[i])
        self._write_contents(entries, rows, is_new, given)
        rows["embedding"], rows["features"] = self._moved(rows, old, np.flatnonzero(~is_new))
        for i, entry in enumerate(entries):
            self._number_new_values(entry, rows[i])
        good = self._own_embeddings(entries, rows, is_strict=given is not None)
        return rows, numbers, good

    def _moved(self, rows: Array, old: Array, kept: Array) -> tuple[Array, Array]:
        """Gives embeddings [n, D] and features [n, F] of rows [n]; those at `kept` have old ones to go on
        from."""
        embedding, features = self._encode(rows)
        if len(kept):
            before, features_before = self._encode(old[kept])
            moved = old["embedding"][kept] + embedding[kept] - before
            length = np.linalg.norm(embedding[kept], axis=1, keepdims=True) / np.maximum(
                np.linalg.norm(moved, axis=1, keepdims=True), 1e-12
            )
            same = (embedding[kept] == before).all(axis=1, keepdims=True)
            embedding[kept] = np.where(same, old["embedding"][kept], moved * length)
            features[kept] = old["features"][kept] + features[kept] - features_before
        return embedding, features

    def _own_embeddings(self, entries: Sequence[Entry], rows: Array, *, is_strict: bool) -> Array:
        """Puts in embeddings that the caller brought for this release, and says which items can be recalled
        [n] bool; where that must be all, InvalidInput names the first that cannot."""
        for i, entry in enumerate(entries):
            if self.release.id in entry.embeddings:
                rows["embedding"][i] = self.embedding(entry.item_id, entry.embeddings[self.release.id])
        finite = np.isfinite(rows["embedding"]).all(axis=1) & np.isfinite(rows["features"]).all(axis=1)
        good = finite & rows["embedding"].any(axis=1)
        if is_strict and not good.all():
            first = int(np.argmin(good))
            if not finite[first]:
                raise InvalidInput(
                    f"item {entries[first].item_id!r}: the item_encoder gives NaN or infinity for it",
                    "check its features",
                )
            raise InvalidInput(
                f"item {entries[first].item_id!r}: its embedding is all zeros, so no search could find it"
            )
        self.left_out["no embedding"] += int((~good).sum())
        return good

    def embedding(self, item_id: str, given: Any) -> Array:
        """Reads an embedding [D] that a caller brings; InvalidInput where it is none."""
        wanted = self.schema.sizes.embedding
        # JSON's numbers; true is none.
        if isinstance(given, list) and len(given) == wanted and set(map(type, given)) <= {int, float}:
            with contextlib.suppress(OverflowError), np.errstate(over="ignore"):
                vector = np.array(given, np.float32)
                if np.isfinite(vector).all():
                    return vector
        count = f"{len(given)} components" if isinstance(given, list) else type(given).__name__
        raise InvalidInput(f"item {item_id!r}: item_embedding must be {wanted} finite numbers, got {count}")

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

    def _write(self, entry: Entry, row: np.void, numbers: Array, given: Collection[str]) -> None:
        """Writes an item's values into codes, values and numbers, in place."""
        for column, value in entry.values.items():
            for feature in self.of_column.get(column, ()):
                if feature.kind == "embedding":
                    continue  # _write_contents does them together
                try:
                    self._write_one(feature, value, row, numbers)
                except ValueError as error:
                    if column in given:
                        raise InvalidInput(f"item {entry.item_id!r}: {feature.name}: {error}") from None
                    self.left_out[f"{column}: {error}"] += 1

    def _logged(self, item_id: str, column: str, value: Any) -> Any:
        """Gives a value as the log has it: a picture is kept beside it, and named."""
        if not any(feature.encoder == IMAGE for feature in self.of_column[column]):
            return value
        try:
            data = picture_from_value(value)
            if data is None:
                return None
            self.contents.check_picture(data)
        except ValueError as error:
            raise InvalidInput(f"item {item_id!r}: {column}: {error}") from None
        return keep_picture(log_folder(self.release.home), data)

    def _write_contents(
        self,
        entries: Sequence[Entry],
        rows: Array,
        is_new: Array,
        given: Sequence[Collection[str]] | None,
    ) -> None:
        """Encodes texts and pictures of all entries together, in place; a new item has none at first."""
        for feature in self.features.values():
            if feature.kind != "embedding":
                continue
            rows["values"][is_new, feature.columns.stop - 1] = 1
            column = self.how[feature.name]["source"]
            places = [place for place, entry in enumerate(entries) if column in entry.values]
            said = [entries[place].values[column] for place in places]
            values, faults = self.contents.encoded(feature, said)
            for at, (kind, text) in faults.items():
                if given is not None and column in given[places[at]] and kind != EMPTY:
                    raise InvalidInput(f"item {entries[places[at]].item_id!r}: {feature.name}: {text}")
                self.left_out[f"{column}: {text}"] += kind != EMPTY
            if places:
                rows["values"][places, feature.columns] = values

    def unknown_values(self, item: Mapping[str, Any]) -> list[tuple[str, str]]:
        """Gives the features and values of an item, of a change that was made, that no vocabulary has."""
        return [
            (feature.name, value)
            for column, said in self.values(item).items()
            for feature in self.of_column.get(column, ())
            if feature.kind == "category"
            for value in self._texts(feature, said)[: feature.width]
            if value not in self.code_of[feature.name]
        ]

    def _number_new_values(self, entry: Entry, row: np.void) -> None:
        """Gives values that the vocabularies lack codes of their own, in place; encoders never see them."""
        for column, said in entry.values.items() if self.new_values is not None else ():
            for feature in self.of_column.get(column, ()):
                if feature.kind == "category":
                    self._number_some(feature, said, row)

    def _number_some(self, feature: Feature, said: Any, row: np.void) -> None:
        """Does the same for one feature."""
        assert self.new_values is not None
        with contextlib.suppress(ValueError):  # what does not fit was left out before
            for place, value in enumerate(self._texts(feature, said)[: feature.width]):
                if value not in self.code_of[feature.name]:
                    code = self.new_values.add(feature.name, value)
                    if code >= 0:
                        row["codes"][feature.columns.start + place] = code

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
        known = self.code_of[feature.name]
        return [known[v] + 1 if v in known else 0 for v in self._texts(feature, value)]

    def _texts(self, feature: Feature, value: Any) -> list[str]:
        """Gives a category's values as text, none empty."""
        values = [_text(v) for v in value] if isinstance(value, list) else [_text(value)]
        separator = self.how[feature.name]["separator"]
        if separator is not None:
            values = [part.strip() for text in values for part in text.split(separator)]
        return [value for value in values if value]

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
