"""Turns filters (categories, ranges of numbers) into masks over item rows, and remembers the masks, because
pages ask for the same again and again."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np

from ensemble.arrays import Array
from ensemble.live.items import LiveState, LiveView
from ensemble.live.new_values import NewValues
from ensemble.options import Category, Filter
from ensemble.schema import Schema, number_names

# Masks that are kept: 128 MB for a million items at most. A bit an item would do; a byte is faster to index.
_REMEMBERED = 128


@dataclass(frozen=True, eq=False)
class RowMask:
    """Says which rows pass one filter, as of one view."""

    view: LiveView
    # [main rows] bool: rows of the main index, by the content that it holds; row 0 never passes.
    main: Array
    slots: Array  # [num_slots - delta_start] bool: slots of the delta

    def passes(self, rows: Array) -> Array:
        """Says for rows [...] int64 which pass: [...] bool, false where <= 0."""
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
        self, schema: Schema, vocabularies: dict[str, list[str]], codes: Array, numbers: Array
    ) -> None:
        """Takes `codes` [I + 1, C] int32 of the snapshot, `vocabularies` {feature: values} of the items, and
        `numbers` [I + 1, n] float32 as the shop wrote them, NaN where missing."""
        self._features = {f.name: f for f in schema.items.features if f.kind == "category"}
        self._code_of = {
            name: {value: f.offset + 1 + v for v, value in enumerate(vocabularies.get(name, []))}
            for name, f in self._features.items()
        }
        self._codes, self._numbers = codes, numbers
        self._columns = {name: column for column, name in enumerate(number_names(schema))}
        self._masks: OrderedDict[Filter, RowMask] = OrderedDict()

    def mask(self, wanted: Filter, view: LiveView) -> RowMask:
        """Gives the mask of a filter; the same object for the same filter and view."""
        if self._masks and next(iter(self._masks.values())).view.state is not view.state:
            # All at once: one mask would keep the whole index of a generation that was merged away.
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

    def _main(self, wanted: Filter, state: LiveState) -> Array:
        """Gives [main rows] bool: the release's own rows, and what the generation has merged over them."""
        mask = np.zeros(state.main_rows, bool)
        mask[: state.num_base] = self._passing(wanted, self._codes, self._numbers, None)
        mask[state.slot_rows[: state.delta_start]] = self._of_slots(wanted, state, 0, state.delta_start)
        mask[0] = False
        return mask

    def _of_slots(self, wanted: Filter, state: LiveState, start: int, stop: int) -> Array:
        """Gives [stop - start] bool: which of these slots of the log pass."""
        codes, numbers = state.slots["codes"][start:stop], state.numbers[start:stop]
        return self._passing(wanted, codes, numbers, state.new_values)

    def _passing(self, wanted: Filter, codes: Array, numbers: Array, new_values: NewValues | None) -> Array:
        """Says which items pass that have these codes [n, C] and numbers [n, *]: [n] bool."""
        mask = np.ones(len(codes), bool)
        for category in wanted.allow:
            mask &= self._has(category, codes, new_values)
        for category in wanted.deny:
            mask &= ~self._has(category, codes, new_values)
        for name, low, high in wanted.ranges:
            column = numbers[:, self._columns[name]]
            # NaN, a missing number, is in no range.
            mask &= (column >= np.float32(low)) & (column <= np.float32(high))
        return mask

    def _has(self, category: Category, codes: Array, new_values: NewValues | None) -> Array:
        """Says which items have one of the values: [n] bool. One that neither the release nor a live item has
        is on no item."""
        name, values = category
        feature = self._features[name]
        wanted = np.zeros(feature.size, bool)
        wanted[[self._code_of[name][v] - feature.offset for v in values if v in self._code_of[name]]] = True
        local = codes[:, feature.columns] - feature.offset
        known = wanted[np.clip(local, 0, feature.size - 1)] & (local >= 0) & (local < feature.size)
        unknown = [value for value in values if value not in self._code_of[name]]
        if new_values is not None and unknown and (more := new_values.codes(name, unknown)):
            known |= np.isin(codes[:, feature.columns], more)
        return known.any(axis=1)
