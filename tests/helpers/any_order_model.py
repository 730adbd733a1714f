"""What every answer must be in tests/together/test_any_order.py: the catalogue and the users' events as
dictionaries, and twins that are told a user's past and ask no Redis."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from ensemble.arrays import Array
from ensemble.local import LocalPipeline
from ensemble.schema import kind_of
from ensemble.steps.served import open_served
from ensemble.tiers.past import FIELDS
from ensemble.tiers.reader import Rows

EVENT = "click"  # what users do
Key = TypeVar("Key", int, tuple[int, int])


class Catalogue:
    """Holds each item's brand, and how many changes were acknowledged."""

    def __init__(self, brands: dict[str, str | None]) -> None:
        self.brands, self.sequence = dict(brands), 0
        self.ever = set(brands)  # a deleted item is still known to who saw it

    def refuses(self, operation: str, item_id: str) -> bool:
        """Says whether the change is none: an item is added that is there, or changed that is not."""
        return (item_id in self.brands) == (operation == "add") and operation != "upsert"

    def apply(self, operation: str, item_id: str, values: dict[str, Any]) -> None:
        """Makes one change that was acknowledged."""
        self.sequence += 1
        if operation == "delete":
            del self.brands[item_id]
            return
        self.ever.add(item_id)
        known = self.brands.setdefault(item_id, None)
        self.brands[item_id] = values.get("brand", known)

    def with_brand(self, brand: str) -> set[bytes]:
        """Gives the ids of the items that a filter on this brand lets through."""
        return {item_id.encode() for item_id, one in self.brands.items() if one == brand}


class Pasts:
    """Holds what each user did: the latest time of each item."""

    def __init__(self) -> None:
        self.of: dict[bytes, dict[str, float]] = {}

    def record(self, user: bytes, item_id: str, time: float) -> None:
        """Takes one event; late ones and the same once more change nothing."""
        past = self.of.setdefault(user, {})
        past[item_id] = max(time, past.get(item_id, time))

    def copy(self) -> dict[bytes, dict[str, float]]:
        """Gives what each user did by now."""
        return {user: dict(past) for user, past in self.of.items()}


class Truth:
    """Keeps a twin of every release that it was asked for; its rows are the release's own files'."""

    def __init__(self, repository: Path) -> None:
        self.repository, self.twins = repository, dict[str, LocalPipeline]()

    def items(
        self, name: str, user: bytes, past: Mapping[str, float], options: dict[str, Any]
    ) -> list[bytes]:
        """Gives the list of a user who did `past` since release `name` was built."""
        if name not in self.twins:
            self.twins[name] = LocalPipeline(open_served(self.repository, name))
        twin = self.twins[name]
        twin.steps["features"].user_reader = ToldPast(twin, past)
        return [item for item in twin.recommend([user], options)["item_ids"][0].tolist() if item]

    def close(self) -> None:
        """Forgets all twins."""
        for twin in self.twins.values():
            twin.release.close()
        self.twins.clear()


class ToldPast:
    """Reads the row of one user from the release's files, and puts what it is told behind its past."""

    def __init__(self, twin: LocalPipeline, past: Mapping[str, float]) -> None:
        self.twin, self.past = twin, past

    def read_users(self, ids: Array, rows: Array) -> Rows:
        """Reads the users with ids [1] S and rows [1] int64."""
        table = np.asarray(self.twin.release.users[rows])
        known = rows > 0
        happened = self._happened()
        if happened:
            row = table[0]
            loaded = [one for one in zip(*(row[name].tolist() for name in FIELDS), strict=True) if one[0] > 0]
            seconds = {(item, kind): second for item, second, kind in loaded}
            seconds |= {key: int(time) for key, time in happened}
            keys = [(item, kind) for item, _, kind in loaded]
            past = merged_plainly(keys, happened, len(row["seen"]))
            for place, (item, kind) in enumerate([(-1, 0)] * (len(row["seen"]) - len(past)) + past):
                told = (item, seconds.get((item, kind), 0), kind)
                for name, value in zip(FIELDS, told, strict=True):
                    row[name][place] = value
            known = np.ones(1, bool)
        return Rows(table, np.arange(1), None, known, in_order=True)

    def _happened(self) -> list[tuple[tuple[int, int], float]]:
        """Gives ((row, kind), time) of the items that are known to the release as things are now."""
        kind = kind_of(self.twin.release.schema, EVENT)
        ids = np.array([item.encode() for item in self.past], "S")
        rows = self.twin.release.live.view.rows_from_ids(ids).tolist()
        return [((row, kind), time) for row, time in zip(rows, self.past.values(), strict=True) if row > 0]


def merged_plainly(loaded: list[Key], happened: list[tuple[Key, float]], width: int) -> list[Key]:
    """Gives every item (or item and kind) at its latest time, those as loaded first and in their order, equal
    times by row; the last `width`."""
    latest: dict[Key, float] = {}
    for item, time in happened:
        latest[item] = max(time, latest.get(item, time))
    old = [
        item for place, item in enumerate(loaded) if item not in latest and item not in loaded[place + 1 :]
    ]
    return (old + [item for _, item in sorted((time, item) for item, time in latest.items())])[-width:]
