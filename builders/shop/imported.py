"""Holds what an importer was asked for, and what it makes of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from builders.shop.first_toml import ROLES, named_column
from ensemble.errors import InvalidInput

LIKED = 4  # a rating that means "liked", on the usual scale to 5


@dataclass(frozen=True)
class Asked:
    """Says what an importer cannot know: which data set, columns by role, and from which rating an item is
    liked."""

    name: str | None = None
    told: Mapping[str, str] = field(default_factory=dict)
    like_from: float | None = None

    @property
    def liked(self) -> float:
        """Gives the rating from which an item is liked."""
        return LIKED if self.like_from is None else self.like_from

    def refuse(self, form: str, why: str) -> None:
        """Raises InvalidInput where a format has no use for --map or --like-from."""
        if self.told or self.like_from is not None:
            option = "--map" if self.told else "--like-from"
            raise InvalidInput(f"{option}: {why}", f"leave it out for --format {form}")

    def column(self, role: str, file: str, columns: Iterable[str], *, needed: bool = True) -> str | None:
        """Finds the column of a role in a file: the one that --map names, else one that is called like it."""
        there = list(columns)
        told = self.told.get(role)
        found = named_column(there, ROLES[role], told)
        if found is None and (needed or told is not None):
            why = f"no column {told!r}" if told is not None else f"no column is called like a {role}"
            raise InvalidInput(
                f"{file}: {why}; there are {', '.join(there)}", f"name one: --map {role}=COLUMN"
            )
        return found


@dataclass
class Imported:
    """Holds a shop that is not yet written; `features` are entries of shop.toml."""

    name: str
    interactions: pa.Table  # columns user_id, item_id, time, …
    split: str
    tasks: list[dict[str, Any]]
    items: pa.Table | None = None  # column item_id, and title where there is one
    item_features: list[dict[str, Any]] = field(default_factory=list)
    users: pa.Table | None = None
    user_features: list[dict[str, Any]] = field(default_factory=list)
    history: str | list[str] = "all"
    keys: dict[str, Any] = field(default_factory=dict)  # more of [interactions]
    held_out: dict[str, pa.Table] = field(default_factory=dict)  # validation and test, by files of their own
    mapping: list[tuple[str, str, str]] = field(default_factory=list)  # (file, column, what it was taken for)
