"""Which items may be shown: categories and ranges of numbers as masks over rows, remembered because pages ask
again and again."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np

from ensemble.live.items import LiveState, LiveView
from ensemble.options import Category, Filter
from ensemble.schema import Schema, number_names

# masks; one bit an item would do, one byte is faster to index: 128 MB for a million items at most
_REMEMBERED = 128


@dataclass(frozen=True, eq=False)
class RowMask:
    """Which rows pass one filter, as of one view."""

    view: LiveView
    # [main rows] bool, the main index's rows with the content that it holds; row 0 never passes
    main: np.ndarray
    slots: np.ndarray  # [num_slots - delta_start] bool, slots of the delta

    def passes(self, rows: np.ndarray) -> np.ndarray:
        """[...] bool for rows [...] int64; false where <= 0."""
        if not self.view.num_slots:
            return self.main[np.maximum(rows, 0)]
        state, rows = self.view.state, np.maximum(rows, 0)
        place = state.slot_of_row[rows] - 1 - state.delta_start
        passing = np.where(rows < len(self.main), self.main[np.minimum(rows, len(self.main) - 1)], False)
        in_delta = (place >= 0) & (place < len(self.slots))
        passing[in_delta] = self.slots[place[in_delta]]
        return passing


class ItemFilters:
    """Turns a Filter into a mask over item rows."""

    def __init__(
        self, schema: Schema, vocabularies: dict[str, list[str]], codes: np.ndarray, numbers: np.ndarray
    ) -> None:
        """`codes` [I + 1, C] int32 of the snapshot, `vocabularies` {feature: values} of items, `numbers` [I +
        1, n] float32 raw, NaN missing."""
        self._features = {f.name: f for f in schema.items.features if f.kind == "category"}
        self._code_of = {
            name: {value: f.offset + 1 + v for v, value in enumerate(vocabularies.get(name, []))}
            for name, f in self._features.items()
        }
        self._codes, self._numbers = codes, numbers
        self._columns = {name: column for column, name in enumerate(number_names(schema))}
        self._masks: OrderedDict[Filter, RowMask] = OrderedDict()

    def mask(self, wanted: Filter, view: LiveView) -> RowMask:
        """The mask of `wanted`; the same object for the same filter and view."""
        if self._masks and next(iter(self._masks.values())).view.state is not view.state:
            # all at once: one mask would keep the whole index of a generation that was merged away
            self._masks.clear()
        known = self._masks.get(wanted)
        if known is None:
            known = RowMask(
                view,
                self._main(wanted, view.state),
                self._of_slots(wanted, view.state, view.state.delta_start, view.num_slots),
            )
        elif known.view is not view:
            done = view.state.delta_start + len(known.slots)
            more = [self._of_slots(wanted, view.state, done, view.num_slots)] if view.num_slots > done else []
            known = RowMask(view, known.main, np.concatenate([known.slots, *more]))
        self._masks[wanted] = known
        self._masks.move_to_end(wanted)
        if len(self._masks) > _REMEMBERED:
            self._masks.popitem(last=False)
        return known

    def _main(self, wanted: Filter, state: LiveState) -> np.ndarray:
        """[main rows] bool: the release's own rows, and what the generation has merged over them."""
        mask = np.zeros(state.main_rows, bool)
        mask[: state.num_base] = self._passing(wanted, self._codes, self._numbers)
        mask[state.slot_rows[: state.delta_start]] = self._of_slots(wanted, state, 0, state.delta_start)
        mask[0] = False
        return mask

    def _of_slots(self, wanted: Filter, state: LiveState, start: int, stop: int) -> np.ndarray:
        return self._passing(wanted, state.slots["codes"][start:stop], state.numbers[start:stop])

    def _passing(self, wanted: Filter, codes: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        """[n] bool for items with these codes [n, C] and numbers [n, *]."""
        mask = np.ones(len(codes), bool)
        for category in wanted.allow:
            mask &= self._has(category, codes)
        for category in wanted.deny:
            mask &= ~self._has(category, codes)
        for name, low, high in wanted.ranges:
            column = numbers[:, self._columns[name]]
            # NaN, a missing number, is in no range
            mask &= (column >= np.float32(low)) & (column <= np.float32(high))
        return mask

    def _has(self, category: Category, codes: np.ndarray) -> np.ndarray:
        """[n] bool: items with one of the values; a value that the release does not know is on no item."""
        name, values = category
        feature = self._features[name]
        wanted = np.zeros(feature.size, bool)
        wanted[[self._code_of[name][v] - feature.offset for v in values if v in self._code_of[name]]] = True
        local = codes[:, feature.columns] - feature.offset
        return (wanted[np.clip(local, 0, feature.size - 1)] & (local >= 0)).any(axis=1)
