"""Reads labels of binary tasks: 0 and 1, and the words that people write for them."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from builders.shop.columns.column import Column, distinct_of, is_textual, shown, to_numpy
from builders.shop.columns.numbers import numbers_from_column
from ensemble.arrays import Array

_YES, _NO = ("true", "yes", "t", "y"), ("false", "no", "f", "n")


def labels_from_column(column: Column) -> Array:
    """Reads labels [n] float64: 0/1, true/false, yes/no, t/f or y/n in any case; NaN where the cell is empty.

    What is no such word is read as a number; InvalidInput where it is none.
    """
    if not is_textual(column.values.type):
        labels = numbers_from_column(column)
        column.said.what = "labels"
        return labels
    texts, index = distinct_of(column.values)
    texts = texts.cast(pa.large_string())
    lower = pc.utf8_lower(pc.utf8_trim_whitespace(texts))
    is_word = pc.is_in(lower, value_set=pa.array([*_YES, *_NO], lower.type))
    if not pc.any(is_word).as_py():
        labels = numbers_from_column(column)
    else:
        yes = pc.is_in(lower, value_set=pa.array(_YES, lower.type))
        numbers = pc.if_else(is_word, pc.if_else(yes, "1", "0"), texts)
        laid_out = pa.DictionaryArray.from_arrays(pa.array(index, pa.int32(), mask=index < 0), numbers)
        words = Column(
            column.file, column.name, pa.chunked_array([laid_out]), column.pieces, column.rows,
            column.reading, said=column.said,
        )  # fmt: skip
        labels = numbers_from_column(words)
        for written, label in ((_YES, 1), (_NO, 0)):
            there = texts.filter(pc.is_in(lower, value_set=pa.array(written, lower.type)))
            if used := sorted(there.to_pylist()):
                column.said.note(f"{shown(used)} read as {label}")
    column.said.what = "labels"
    return labels


def are_labels(texts: pa.Array) -> bool:
    """Says whether all of some distinct texts [K] are labels, of both kinds."""
    lower = pc.utf8_lower(pc.utf8_trim_whitespace(texts))
    known = pa.array([*_YES, *_NO, "0", "1", ""], lower.type)
    return bool(np.all(to_numpy(pc.is_in(lower, value_set=known))) and 2 <= len(texts) <= 5)
