"""Turns filters (categories, ranges of numbers) into masks over item rows, and remembers the masks, because
pages ask for the same again and again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ensemble.arrays import Array
from ensemble.contract import Degraded
from ensemble.live.new_values import NewValues
from ensemble.live.segment import Segment
from ensemble.live.state import LiveState, LiveView
from ensemble.options import Category, Filter
from ensemble.schema import Schema, number_names

# Masks that are kept, and what they may take: a bit an item would do, but a byte is faster to index.
_REMEMBERED, _FEWEST, _BYTES = 128, 8, 1 << 28
_PIECE = 1 << 17  # rows looked at by all new filters before the next ones are read


@dataclass(frozen=True, eq=False)
class RowMask:
    """Says which rows pass one filter, as of one view."""

    view: LiveView
    main: Array  # [num_base] bool: the release's rows, by its own content; row 0 never passes
    segments: tuple[Array, ...]  # [n] bool each: the segments' slots
    tail: Array  # [t] bool: the tail's slots

    @property
    def sealed(self) -> tuple[Array, tuple[Array, ...]]:
        """Gives the part that no later change touches."""
        return self.main, self.segments

    def passes(self, rows: Array) -> Array:
        """Says for rows [...] int64 which pass: [...] bool, false where <= 0."""
        if not self.view.num_slots:
            rows = np.where(rows < len(self.main), rows, 0)
            return self.main[np.maximum(rows, 0)]
        state, rows = self.view.state, np.maximum(rows, 0)
        slots = state.slot_of_row[rows]
        passing = np.where(rows < len(self.main), self.main[np.minimum(rows, len(self.main) - 1)], False)
        for mask, start in zip((*self.segments, self.tail), state.starts.tolist(), strict=True):
            place = slots - 1 - start
            here = (place >= 0) & (place < len(mask))
            passing[here] = mask[place[here]]
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
        self._remembered = max(_FEWEST, min(_REMEMBERED, _BYTES // max(1, len(codes))))
        self._columns = {name: column for column, name in enumerate(number_names(schema))}
        self._masks: OrderedDict[Filter, RowMask] = OrderedDict()
        # What outlives a merge: masks of the release's own rows, and of segments
        self._parts: OrderedDict[Filter, tuple[Array, dict[Segment, Array]]] = OrderedDict()

    def masks(self, wanted: Sequence[Filter | None], view: LiveView) -> list[RowMask | None]:
        """Gives each user's mask, None for None; users with the same filter get the same object."""
        new = [one for one in dict.fromkeys(wanted) if one is not None and one not in self._parts]
        if len(new) > 1:
            self._scan(new)
        return [None if one is None else self.mask(one, view) for one in wanted]

    def status(self, wanted: Sequence[Filter | None], view: LiveView) -> Array:
        """Says whose filter names a value that no item has: UNKNOWN_VALUES or 0, [B, 1] int64."""
        found = [one is not None and self._names_a_stranger(one, view.state.new_values) for one in wanted]
        return np.where(np.array(found, bool), int(Degraded.UNKNOWN_VALUES), 0)[:, None].astype(np.int64)

    def _names_a_stranger(self, wanted: Filter, new_values: NewValues | None) -> bool:
        for name, values in (*wanted.allow, *wanted.deny):
            unknown = list(dict.fromkeys(value for value in values if value not in self._code_of[name]))
            if unknown and (new_values is None or len(new_values.codes(name, unknown)) < len(unknown)):
                return True
        return False

    def _scan(self, wanted: list[Filter]) -> None:
        """Computes which of the release's own rows pass each filter, reading the catalogue once for all."""
        passing = np.empty((len(wanted), len(self._codes)), bool)
        for start in range(0, len(self._codes), _PIECE):
            piece = slice(start, start + _PIECE)
            codes, numbers = np.ascontiguousarray(self._codes[piece]), self._numbers[piece]
            for place, one in enumerate(wanted):
                passing[place, piece] = self._passing(one, codes, numbers, None)
        passing[:, 0] = False
        for one, main in zip(wanted, passing, strict=True):
            self._parts[one] = main.copy(), {}  # a copy: else the last one of them keeps all

    def mask(self, wanted: Filter, view: LiveView) -> RowMask:
        """Gives the mask of a filter; the same object for the same filter and view."""
        state = view.state
        if self._masks and next(iter(self._masks.values())).view.state is not state:
            self._forget_views(state)
        known = self._masks.get(wanted)
        if known is None or known.view is not view:
            tail = known.tail if known is not None else np.zeros(0, bool)
            done, end = len(tail), view.num_slots - state.tail_start
            if end > done:
                codes, numbers = state.slots["codes"][done:end], state.numbers[done:end]
                more = self._passing(wanted, codes, numbers, state.new_values)
                tail = np.concatenate([tail, more])
            known = RowMask(view, *(self._sealed(wanted, state) if known is None else known.sealed), tail)
        self._masks[wanted] = known
        self._masks.move_to_end(wanted)
        if len(self._masks) > self._remembered:
            self._parts.pop(self._masks.popitem(last=False)[0], None)
        return known

    def _forget_views(self, state: LiveState) -> None:
        """Forgets masks of a state that was merged away, which they would keep; what they say of parts that
        are still there stays."""
        self._masks.clear()
        for _, masks in self._parts.values():
            for segment in set(masks) - set(state.segments):
                del masks[segment]
        while len(self._parts) > self._remembered:
            self._parts.popitem(last=False)

    def _sealed(self, wanted: Filter, state: LiveState) -> tuple[Array, tuple[Array, ...]]:
        """Gives which of the release's own rows pass [num_base] bool, and of each segment's slots."""
        if wanted not in self._parts:
            main = self._passing(wanted, self._codes, self._numbers, None)
            main[0] = False
            self._parts[wanted] = main, {}
        main, masks = self._parts[wanted]
        for segment in state.segments:
            if segment not in masks:
                codes, numbers = segment.part.items["codes"], segment.part.numbers
                masks[segment] = self._passing(wanted, codes, numbers, state.new_values)
        return main, tuple(masks[segment] for segment in state.segments)

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
        wanted = np.zeros(feature.offset + feature.size + 1, bool)  # by code; the last: of other features
        wanted[[self._code_of[name][v] for v in values if v in self._code_of[name]]] = True
        known = wanted.take(codes[:, feature.columns], mode="clip")
        unknown = [value for value in values if value not in self._code_of[name]]
        if new_values is not None and unknown and (more := new_values.codes(name, unknown)):
            known |= np.isin(codes[:, feature.columns], more)
        return known.any(axis=1)
