"""Packs feature columns of items or users into the codes and values of ensemble.schema.Table."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from builders.content.contents import Content
from builders.shop.columns.categories import lists_from_column, texts_from_column
from builders.shop.columns.column import Column, is_list
from builders.shop.columns.numbers import numbers_from_column, vectors_from_column
from builders.shop.shop_toml import PICTURED, FeatureColumn
from ensemble.arrays import Array, ranks_within
from ensemble.schema import Feature, Table

TEXT_WIDTH = 16  # words kept of a text
LIST_WIDTH = 8  # values kept of a multi-valued category
MAX_DEVIATIONS = 10.0  # standardized numbers are cut here: one mistyped price must not swamp a model


@dataclass(frozen=True)
class Packed:
    """Holds a table's features, row 0 ("unknown") first."""

    table: Table
    codes: Array  # [R + 1, C] int32
    values: Array  # [R + 1, V] float32
    vocabularies: dict[str, list[str]]  # categories only, most frequent value first
    encoding: list[
        dict[str, Any]
    ]  # what was done to each feature's column, for items that come later (ensemble.live.encoding)
    numbers: Array  # [R + 1, number features] float32 as the shop wrote them, NaN where missing


def words_from_texts(texts: pa.LargeStringArray) -> tuple[Array, pa.LargeStringArray]:
    """Splits texts into lower-case words of letters and digits: row of each [m] int64 ascending, word [m]."""
    plain = pc.utf8_trim_whitespace(pc.replace_substring_regex(pc.utf8_lower(texts), r"[^\p{L}\p{N}]+", " "))
    lists = pc.split_pattern(plain, pattern=" ")
    words = pc.list_flatten(lists)
    keep = pc.not_equal(words, "")
    return pc.list_parent_indices(lists).to_numpy()[keep.to_numpy(zero_copy_only=False)].astype(
        np.int64
    ), words.filter(keep)


def pack_features(
    features: list[FeatureColumn],
    columns: dict[str, Column],
    rows: Array,
    num_rows: int,
    contents: Mapping[str, Content],
) -> Packed:
    """Packs `columns`, whose i-th cell belongs to row rows[i] >= 1 of `num_rows` + 1; `contents` has what was
    encoded of texts and images, and an image that was not is left out."""
    packed: list[Feature] = []
    codes: list[Array] = []
    values: list[Array] = []
    vocabularies: dict[str, list[str]] = {}
    encoding: list[dict[str, Any]] = []
    raw: list[Array] = []
    code_start, value_start, offset = 0, 0, 1
    for feature in features:
        content = contents.get(feature.name)
        if feature.kind in PICTURED and content is None:
            continue
        column = columns[feature.source]
        kind: Any = feature.kind.partition("(")[0]  # "vector" of "vector(64)"
        encoding.append({name: getattr(feature, name) for name in ("name", "source", "separator", "log1p")})
        if content is not None:
            values.append(_content_block(content, rows, num_rows))
            width = values[-1].shape[1]
            packed.append(Feature(feature.name, "embedding", value_start, width, encoder=content.model))
            value_start += width
        elif feature.kind in ("category", "text"):
            indices, size, vocabulary = _indices(feature, column)
            block = np.zeros((num_rows + 1, indices.shape[1]), np.int32)
            block[rows] = np.where(indices >= 0, indices + offset, 0)
            packed.append(Feature(feature.name, kind, code_start, block.shape[1], offset, size))
            if vocabulary is not None:
                vocabularies[feature.name] = vocabulary
            codes.append(block)
            code_start, offset = code_start + block.shape[1], offset + size
        else:
            wide = np.zeros((num_rows + 1, feature.dim), np.float32)
            wide[rows], mean, deviation = _standardized(feature, column)
            encoding[-1] |= {"mean": mean.tolist(), "deviation": deviation.tolist(), "limit": MAX_DEVIATIONS}
            if feature.kind == "number":
                raw.append(np.full(num_rows + 1, np.nan, np.float32))
                raw[-1][rows] = numbers_from_column(column)
            packed.append(Feature(feature.name, kind, value_start, feature.dim))
            values.append(wide)
            value_start += feature.dim
    return Packed(
        Table(tuple(packed)),
        np.concatenate(codes, axis=1) if codes else np.zeros((num_rows + 1, 1), np.int32),
        np.concatenate(values, axis=1) if values else np.zeros((num_rows + 1, 1), np.float32),
        vocabularies,
        encoding,
        np.stack(raw, axis=1) if raw else np.full((num_rows + 1, 1), np.nan, np.float32),
    )


def _content_block(content: Content, rows: Array, num_rows: int) -> Array:
    """Lays a content's values [n, P + 1] out by row [num_rows + 1, P + 1]; of the unknown item nothing is
    known."""
    block = np.zeros((num_rows + 1, content.values.shape[1]), np.float32)
    block[0, -1] = 1
    block[rows] = content.values
    return block


def _indices(feature: FeatureColumn, column: Column) -> tuple[Array, int, list[str] | None]:
    """Gives indices [n, width] int64 in the feature's own range (-1: none), its size, its vocabulary."""
    if feature.kind == "category":
        rows, texts = lists_from_column(column, feature.separator)
        width = feature.width or (LIST_WIDTH if is_list(column) or feature.separator else 1)
        index, vocabulary = _vocabulary_index(texts, feature.vocabulary)
        return _placed(rows, index, len(column.values), width), 1 + len(vocabulary), vocabulary
    rows, words = words_from_texts(texts_from_column(column))
    encoded = words.dictionary_encode()
    hashes = np.array(
        [zlib.crc32(word.encode()) % feature.buckets for word in encoded.dictionary.to_pylist()], np.int64
    )
    return (
        _placed(rows, hashes[encoded.indices.to_numpy()], len(column.values), feature.width or TEXT_WIDTH),
        feature.buckets,
        None,
    )


def _vocabulary_index(texts: pa.LargeStringArray, limit: int) -> tuple[Array, list[str]]:
    """Gives 1 + place in the vocabulary [m] (0: fell out), and the vocabulary, most frequent value first."""
    encoded = texts.dictionary_encode()
    index = encoded.indices.to_numpy()
    distinct = np.array(encoded.dictionary.to_pylist(), dtype=object)
    counts = np.bincount(index, minlength=len(distinct))
    by_text = np.argsort(distinct, kind="stable")
    order = by_text[np.argsort(-counts[by_text], kind="stable")][:limit]
    place = np.zeros(len(distinct), np.int64)
    place[order] = 1 + np.arange(len(order))
    return place[index], distinct[order].tolist()


def _placed(rows: Array, index: Array, num_rows: int, width: int) -> Array:
    """Lays values in one line out as [num_rows, width]: the first `width` of each row, -1 after the last."""
    position = ranks_within(rows)
    keep = position < width
    out = np.full((num_rows, width), -1, np.int64)
    out[rows[keep], position[keep]] = index[keep]
    return out


def _standardized(feature: FeatureColumn, column: Column) -> tuple[Array, Array, Array]:
    """Standardizes each component over the rows that have it: [n, dim] (0: missing), mean, deviation."""
    numbers = (
        numbers_from_column(column)[:, None]
        if feature.kind == "number"
        else vectors_from_column(column, feature.dim, feature.separator)
    )
    if feature.log1p:
        low = numbers < 0
        if low.any():
            raise column.error(int(low.any(1).argmax()), "is negative; log1p wants 0 or more")
        numbers = np.log1p(numbers)
    missing = np.isnan(numbers)
    count = np.maximum((~missing).sum(0), 1)
    filled = np.where(missing, 0.0, numbers)
    mean = filled.sum(0) / count
    centred = np.where(missing, 0.0, numbers - mean)
    deviation = np.sqrt((centred**2).sum(0) / count)
    deviation = np.where(deviation > 1e-12, deviation, 1.0)
    return np.clip(centred / deviation, -MAX_DEVIATIONS, MAX_DEVIATIONS).astype(np.float32), mean, deviation
