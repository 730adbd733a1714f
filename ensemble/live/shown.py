"""Shows items as people wrote them: from the catalogue's log, and from what a release keeps of the files.

Reads only, so it needs no writer. A release keeps categories, numbers, vectors and titles; of texts and
pictures only what a model reads, which cannot be read back.
"""

from __future__ import annotations

import heapq
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ensemble.arrays import Array
from ensemble.live.catalogue import DELETE, REPLACE, UPDATE, Entry, last_entries, open_catalogue
from ensemble.live.encoding import ENCODING, TITLE
from ensemble.release.release import Release
from ensemble.schema import Feature, number_names


@dataclass(frozen=True)
class ShownItem:
    """Says what is known of one item of a release."""

    item_id: str
    is_here: bool  # it can be recommended
    source: str  # "files", "log", or "files+log"
    sequence: int  # of its last change; 0 if it was never changed
    title: str = ""
    values: dict[str, Any] = field(default_factory=dict)  # by column
    from_log: tuple[str, ...] = ()  # the columns whose value is the log's


class ShownItems:
    """Holds a release and what the log says by now."""

    def __init__(self, release: Release) -> None:
        self.release = release
        reader = open_catalogue(release.home)
        self.entries: dict[str, Entry] = last_entries(reader) if reader is not None else {}
        is_ours = reader is not None and reader.id == release.watermark.log
        self._watermark = release.watermark.sequence if is_ours else 0
        self._how = {e["name"]: e for e in json.loads((release.path / ENCODING).read_text())}
        self._numbers = {name: column for column, name in enumerate(number_names(release.schema))}

    def __getitem__(self, item_id: str) -> ShownItem | None:
        """Shows one item; None for one that neither the files nor the log know."""
        row = int(self.release.item_ids.rows_from_ids(np.array([item_id.encode()]))[0])
        entry = self.entries.get(item_id)
        if not row and entry is None:
            return None
        is_here = row > 0
        if entry is not None and entry.sequence > self._watermark:
            is_here = entry.kind != DELETE and (row > 0 or entry.kind != UPDATE)
        said = {} if entry is None else entry.values
        base = {} if not row or (entry is not None and entry.kind == REPLACE) else self._of_release(row)
        values = {**base, **said}
        title = values.pop(TITLE, None) if TITLE not in self._columns() else values.get(TITLE)
        return ShownItem(
            item_id,
            is_here,
            "files" if entry is None else "log" if not base else "files+log",
            0 if entry is None else entry.sequence,
            str(title or ""),
            values,
            tuple(column for column in values if column in said),
        )

    def ids(self, after: str = "", *, changed: bool = False) -> Iterator[str]:
        """Gives the ids behind `after`, in byte order; if `changed`, only those that the log names."""
        base, start = self.release.item_ids.sorted_ids, after.encode()
        ours = (one.encode() for one in self.entries if changed or not self._is_old(one))
        logged = sorted(one for one in ours if one > start)
        place = int(np.searchsorted(base, np.array(start, base.dtype), side="right")) if start else 0
        of_files = (base[n] for n in range(place, len(base))) if not changed else iter(())
        merged: Iterator[bytes] = heapq.merge(map(bytes, of_files), logged)
        return (one.decode() for one, _ in itertools.groupby(merged))

    def _is_old(self, item_id: str) -> bool:
        """Says whether the build had read all that the log says of an item: its row has it then."""
        return self.entries[item_id].sequence <= self._watermark

    def _columns(self) -> set[str]:
        """Gives the columns that the release makes features of."""
        return {entry["source"] for entry in self._how.values()}

    def _of_release(self, row: int) -> dict[str, Any]:
        """Reads back what a release's row keeps of the shop's files, by column."""
        values: dict[str, Any] = {}
        for feature in self.release.schema.items.features:
            value = self._value(feature, row)
            if value is not None:
                values[self._how[feature.name]["source"]] = value
        if TITLE not in self._columns() and (self.release.path / "item_titles.npy").exists():
            values[TITLE] = self.release.item_titles[row].decode(errors="replace")
        return values

    def _value(self, feature: Feature, row: int) -> Any:
        """Reads one feature back; None where it is missing, or cannot be read back."""
        if feature.kind == "category":
            known = self.release.vocabularies["items"][feature.name]
            codes = self.release.items["codes"][row, feature.columns] - feature.offset - 1
            texts = [known[code] for code in codes.tolist() if 0 <= code < len(known)]
            return (texts if feature.width > 1 else texts[0]) if texts else None
        if feature.name in self._numbers:
            number = float(self.release.item_numbers[row, self._numbers[feature.name]])
            return None if np.isnan(number) else float(f"{number:.7g}")  # float32's digits
        if feature.is_code or feature.kind == "embedding":
            return None
        return self._unscaled(self.release.items["values"][row, feature.columns], feature)

    def _unscaled(self, values: Array, feature: Feature) -> list[float] | None:
        """Undoes the standardization of a vector [n]; None where it was missing."""
        how = self._how[feature.name]
        if not values.any():
            return None
        numbers = values * np.array(how["deviation"]) + np.array(how["mean"])
        return [float(f"{number:.6g}") for number in (np.expm1(numbers) if how["log1p"] else numbers)]
