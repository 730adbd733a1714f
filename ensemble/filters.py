"""Which items may be shown: category filters as masks over rows, remembered because pages ask again and again."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np

from ensemble.options import Category, Filter
from ensemble.schema import Schema

_REMEMBERED = 128  # masks; one bit an item would do, one byte is faster to index: 128 MB for a million items at most


class ItemFilters:
    """Turns a Filter into a mask over item rows."""

    def __init__(self, schema: Schema, vocabularies: dict[str, list[str]], codes: np.ndarray) -> None:
        """`codes` [I + 1, C] int32 of the snapshot, `vocabularies` {feature: values} of items."""
        self._features = {f.name: f for f in schema.items.features if f.kind == "category"}
        self._code_of = {name: {value: f.offset + 1 + v for v, value in enumerate(vocabularies.get(name, []))} for name, f in self._features.items()}
        self._codes = codes
        self._masks: OrderedDict[Filter, np.ndarray] = OrderedDict()

    def mask(self, wanted: Filter) -> np.ndarray:
        """[I + 1] bool, true for items that pass; the unknown item (row 0) never does."""
        if wanted in self._masks:
            self._masks.move_to_end(wanted)
            return self._masks[wanted]
        mask = np.ones(len(self._codes), bool)
        for category in wanted.allow:
            mask &= self._has(category)
        for category in wanted.deny:
            mask &= ~self._has(category)
        mask[0] = False
        self._masks[wanted] = mask
        if len(self._masks) > _REMEMBERED:
            self._masks.popitem(last=False)
        return mask

    def _has(self, category: Category) -> np.ndarray:
        """[I + 1] bool: items with one of the values; a value that the release does not know is on no item."""
        name, values = category
        feature = self._features[name]
        wanted = np.zeros(feature.size, bool)
        wanted[[self._code_of[name][v] - feature.offset for v in values if v in self._code_of[name]]] = True
        local = self._codes[:, feature.columns] - feature.offset
        return (wanted[np.clip(local, 0, feature.size - 1)] & (local >= 0)).any(axis=1)
