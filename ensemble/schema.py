"""Describes a shop to the engines: features, tasks and sizes. Builders write it into every release."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any, Literal

from ensemble.errors import ReleaseError

SCHEMA_VERSION = 3

MAX_KINDS = 16  # kinds of events that are told apart where a history is of all events


@dataclass(frozen=True)
class Feature:
    """Describes a column of the items or users table, packed into codes (category, text) or values (number,
    vector, embedding).

    Codes of all features of a table share one range: feature f owns [offset, offset + size); code 0 is
    "nothing here". `offset` itself is "seen, but not in the vocabulary"; category value v of the vocabulary
    is offset + 1 + v.
    """

    name: str
    kind: Literal["category", "text", "number", "vector", "embedding"]
    start: int  # first column it fills in codes or values
    width: int  # columns it fills
    offset: int = 0  # first code it owns (category, text)
    size: int = 0  # codes it owns (category: 1 + vocabulary; text: hash buckets)
    # embedding: the model that encodes it, text_encoder or image_encoder; its last column is 1 where there is
    # nothing to encode
    encoder: str = ""

    @property
    def is_code(self) -> bool:
        """Says whether the feature fills columns of codes; else it fills columns of values."""
        return self.kind in ("category", "text")

    @property
    def columns(self) -> slice:
        """Gives the columns of codes or values that the feature fills."""
        return slice(self.start, self.start + self.width)


@dataclass(frozen=True)
class Table:
    """Lists the features of one table, in column order."""

    features: tuple[Feature, ...] = ()

    @property
    def num_codes(self) -> int:
        """Gives the size of the joint code range, code 0 included."""
        return 1 + sum(f.size for f in self.features if f.is_code)

    @property
    def code_width(self) -> int:
        """Counts the columns of `codes`; at least 1, so that no tensor is empty."""
        return max(1, sum(f.width for f in self.features if f.is_code))

    @property
    def value_width(self) -> int:
        """Counts the columns of `values`; at least 1, so that no tensor is empty."""
        return max(1, sum(f.width for f in self.features if not f.is_code))

    def category(self, name: str) -> Feature | None:
        """Finds the category feature called `name`; None if there is none."""
        return next((f for f in self.features if f.name == name and f.kind == "category"), None)


@dataclass(frozen=True)
class Task:
    """Describes something that the ranker predicts: a probability (binary) or a number (regression).

    `given` names the task it is conditional on (buy given click); its value then enters the blend times that
    task's probability. `weight` is its default share in the score.
    """

    name: str
    kind: Literal["binary", "regression"]
    given: str | None = None
    weight: float = 1.0


@dataclass(frozen=True)
class ContextFeature:
    """Describes what a request may say of its moment, such as a device or an hour (ensemble/context.py)."""

    name: str
    kind: Literal["category", "number"]
    values: tuple[str, ...] = ()  # a category's, the most frequent first
    log1p: bool = False  # a number's logarithm is standardized
    mean: float = 0.0
    deviation: float = 1.0

    @property
    def width(self) -> int:
        """Counts the columns of user_state that it fills."""
        return 1 + len(self.values) if self.kind == "category" else 2


@dataclass(frozen=True)
class Sizes:
    """Holds every size in the contract, once. Letters as in contract.py."""

    seen: int = 200  # W, what the snapshot keeps of a user's past items
    history: int = 50  # H, the last of them, which engines read
    embedding: int = 128  # D
    interests: int = 1  # M
    candidates: int = 256  # N
    item_features: int = 64  # F, what the ranker sees of an item
    user_features: int = 32  # U, what the ranker sees of a user beside the history
    # Of the item features, the last so many columns are rates of the tasks, not learned
    # (builders/data/rates.py)
    item_rates: int = 0
    user_rates: int = 0  # the last columns of user_state
    max_batch: int = 64  # users per request and per dynamic batch
    max_top_k: int = 100  # K at most


@dataclass(frozen=True)
class EncoderSizes:
    """Holds the sizes of a model that encodes items' texts or pictures."""

    model: str  # text_encoder or image_encoder
    width: int  # V, components of its vectors
    side: int = 0  # Y and X, pixels of what an image_encoder takes


@dataclass(frozen=True)
class RecallSource:
    """Names a source of recall, and the share of the N candidates that is kept for it; None: what the others
    leave."""

    name: str
    quota: float | None
    is_set: bool = False  # by the shop: a build does not fit it


# Every source there is: the class that offers, "module:Class", and the quota that it gets unless a shop says
# otherwise, or a build finds a better one (builders/index/quotas.py).
SOURCE_KINDS: dict[str, tuple[str, float | None]] = {
    "user_embeddings": ("ensemble.steps.sources:Nearest", None),
    "transitions": ("ensemble.steps.sources:Transitions", 3 / 8),
    "popular": ("ensemble.steps.sources:Popular", 1 / 16),
    "content": ("ensemble.steps.content:Content", 1 / 8),
    "walks": ("ensemble.steps.walks:Walks", 1 / 8),
}
# What every release has; a shop may name more, and other quotas.
DEFAULT_SOURCES = tuple(
    RecallSource(name, SOURCE_KINDS[name][1]) for name in ("user_embeddings", "transitions", "popular")
)


@dataclass(frozen=True)
class Schema:
    """Holds one shop's columns, tasks and sizes; with contract.py it determines every tensor."""

    shop: str
    items: Table
    users: Table
    tasks: tuple[Task, ...]
    sizes: Sizes = field(default_factory=Sizes)
    # Kinds of events that a past holds: an event of the first has kind 1; kind 0 is padding
    events: tuple[str, ...] = ("event",)
    has_clock: bool = (
        True  # times are Unix seconds; else they are positions, and no gap between two means anything
    )
    encoders: tuple[EncoderSizes, ...] = ()  # of items' texts and pictures, by name
    context: tuple[ContextFeature, ...] = ()
    version: int = SCHEMA_VERSION
    sources: tuple[RecallSource, ...] = DEFAULT_SOURCES  # of recall, in the order of candidate_scores
    # How popular recall holds an item that nobody has taken yet: as the least one, or as the middle one
    new_items: Literal["last", "median"] = "last"

    @property
    def source_names(self) -> tuple[str, ...]:
        """Names recall's sources, in the order of candidate_scores' last axis."""
        return tuple(source.name for source in self.sources)

    def to_json(self) -> str:
        """Writes the schema as JSON; schema_from_json reads it."""
        return json.dumps(dataclasses.asdict(self), indent=1, sort_keys=True)


def kind_of(schema: Schema, event: str) -> int:
    """Gives the kind of an event by its name, from 1; an event that the schema does not list counts as the
    first kind, since it stands in a past all the same."""
    return schema.events.index(event) + 1 if event in schema.events else 1


def number_names(schema: Schema) -> tuple[str, ...]:
    """Names the items' number features, in the order of numbers.npy's columns and of a live record's
    `numbers`."""
    return tuple(f.name for f in schema.items.features if f.kind == "number")


def schema_from_json(text: str) -> Schema:
    """Reads what Schema.to_json wrote; ReleaseError if another version of Peregrine wrote it."""
    raw: dict[str, Any] = json.loads(text)
    if raw.get("version") != SCHEMA_VERSION:
        raise ReleaseError(
            f"schema version {raw.get('version')} is not {SCHEMA_VERSION}, which this Peregrine reads",
            "build the release again",
        )
    tables = {name: Table(tuple(Feature(**f) for f in raw[name]["features"])) for name in ("items", "users")}
    return Schema(
        raw["shop"],
        tables["items"],
        tables["users"],
        tuple(Task(**t) for t in raw["tasks"]),
        Sizes(**raw["sizes"]),
        tuple(raw["events"]),
        raw["has_clock"],
        encoders=tuple(EncoderSizes(**e) for e in raw["encoders"]),
        sources=tuple(RecallSource(**source) for source in raw["sources"]),
        new_items=raw["new_items"],
        context=tuple(ContextFeature(**{**f, "values": tuple(f["values"])}) for f in raw["context"]),
    )
