"""Describes shop.toml, which says which columns of which files are what. This page is its reference.

name = "beauty"
split = "time"                       # or "leave_one_out", or {kind = "time", validation = 0.1, test = 0.1},
                                     # or {kind = "random", seed = 0}: shares of the users, held out whole,
                                     # or {kind = "column", column = "part"}: train, validation or test,
                                     # or {kind = "files", test_file = "test.parquet"}: rows of its own
                                     # keep_test = true: a published test set, never trained on nor served
[interactions]                       # one row per shown item, or one row per event
file = "interactions.parquet"        # parquet, CSV or TSV, JSON lines, Arrow; or a folder of such files.
                                     # of a text file, where its first line does not tell: separator = ";",
                                     # encoding = "latin-1", decimal = ","
user = "user_id"
item = "item_id"
time = "time"                        # Unix seconds, milliseconds, …, ISO texts, timestamps, or any number
                                     # that orders; time_unit = "ms" and time_format = "%d/%m/%Y" name others;
                                     # "": there is none, and the rows' order stands for it
[items]
file = "items.parquet"               # or the log itself: the first row of each counts
id = "item_id"
title = "title"
features = [{name = "brand", kind = "category"}, {name = "price", kind = "number", log1p = true}]
[context]                            # columns of the interactions that a request says too
features = [{name = "device", kind = "category"}, {name = "hour", kind = "number"}]
[[tasks]]
name = "ctr"
kind = "binary"
label = {column = "clicked"}
[recall]                             # may be left out; "content", "walks": kept only where they gain
sources = ["user_embeddings", "transitions", "popular", "content"]
quotas = {content = 0.2}             # share of the candidates that is kept for a source; else a build fits it
new_items = "median"                 # what nobody has taken counts as popular as the middle of what somebody
                                     # took; default "last": as the least popular
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from builders.shop.columns.column import Reading
from builders.toml_file import read_toml
from ensemble.errors import InvalidInput
from ensemble.options import RECALL_WEIGHT
from ensemble.schema import DEFAULT_SOURCES, SOURCE_KINDS, RecallSource

SHOP_FILE = "shop.toml"
_UNITS_S = {"s": 1, "min": 60, "h": 3_600, "d": 86_400}
NAME = r"^[A-Za-z][A-Za-z0-9_]*$"
KINDS = "category, number, text, image, video, vector(<dim>)"
LISTED = ("category", "video")  # kinds of which a cell may hold several values
PICTURED = ("image", "video")  # kinds that name files of pictures
HASHED = "hashed"  # the encoder of a text whose words are hashed into buckets


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TableFile(_Entry):
    """Names a file of a table, or a folder of them, and how its cells are to be read."""

    file: str
    separator: str | None = Field(
        default=None, min_length=1, max_length=1
    )  # of columns; default: by the header
    encoding: str | None = None  # of text files; default: UTF-8
    decimal: Literal[".", ","] | None = None  # the sign before decimals, where the cells do not tell

    @property
    def reading(self) -> Reading:
        """Says how the file's cells are to be read."""
        return Reading(self.separator, self.encoding, self.decimal)


class FeatureColumn(_Entry):
    """Describes one feature of the items or users."""

    name: str = Field(pattern=NAME)
    kind: str  # category | number | text | image | video (a list of frames, image files) | vector(<dim>)
    column: str = ""  # default: the feature's name
    # values kept per row: category 1 (lists 8), text 16; components, where an encoder is named: 128
    width: int | None = Field(default=None, ge=1, le=256)
    separator: str | None = None  # splits one text cell into several values ("red|matte")
    buckets: int = Field(default=16384, ge=16, le=4_000_000)  # hash buckets of a text's words
    # a category's most frequent values kept; the others share one code
    vocabulary: int = Field(default=100_000, ge=1)
    log1p: bool = False  # number: log(1 + x) before it is standardized
    # items only: text "hashed" (the default) | "minilm", image "efficientnet-lite0", or a folder with a
    # Hugging Face checkpoint (config.json, model.safetensors), or MODULE:CLASS, a module of one's own; an
    # image without one is left aside
    encoder: str | None = Field(default=None, min_length=1)

    @field_validator("kind")
    @classmethod
    def _known_kind(cls, kind: str) -> str:
        if not re.fullmatch(r"category|number|text|image|video|vector\([1-9][0-9]{0,4}\)", kind):
            raise ValueError(f"{kind!r} is no kind of feature; use {KINDS}")
        return kind

    @model_validator(mode="after")
    def _encoder_fits(self) -> FeatureColumn:
        if self.encoder is not None and self.kind not in ("text", *PICTURED):
            raise ValueError(f"an encoder reads a text or an image, and {self.name!r} is a {self.kind}")
        if self.encoder == HASHED and self.kind in PICTURED:
            raise ValueError(f"{HASHED!r} is for texts, and {self.name!r} is of kind {self.kind}")
        return self

    @property
    def source(self) -> str:
        return self.column or self.name

    @property
    def dim(self) -> int:
        """Gives the components of a vector feature; 1 for a number."""
        return int(self.kind[7:-1]) if self.kind.startswith("vector") else 1


class ContextColumn(_Entry):
    """Describes something that the log says of the moment of each exposure, and a request of its own."""

    name: str = Field(pattern=NAME)
    kind: Literal["category", "number"]
    column: str = ""  # default: the feature's name
    # a category's most frequent values kept: each is a column of user_state; the others share one
    vocabulary: int = Field(default=32, ge=1, le=256)
    log1p: bool = False  # number: log(1 + x) before it is standardized

    @property
    def source(self) -> str:
        return self.column or self.name


class Context(_Entry):
    """Describes what the ranker reads of the moment of an exposure, and of a request."""

    features: list[ContextColumn]

    @model_validator(mode="after")
    def _distinct_names(self) -> Context:
        _refuse_repeats([f.name for f in self.features], "context features")
        return self


class Interactions(TableFile):
    """Describes the file of who met what, when; its rows need no order."""

    user: str = "user_id"
    item: str = "item_id"
    time: str = "time"
    # what its numbers are, where their sizes do not tell; "position" only orders
    time_unit: Literal["position", "s", "ms", "us", "ns", "day", "minute", "moment"] | None = None
    time_format: str | None = None  # of texts that are no ISO times, as strptime has it: "%d/%m/%Y %H:%M"
    event: str | None = None  # column with event names, for shops that log one row per event
    impression: str | None = None  # the event that shows an item; later events of that user and item label it
    position: str | None = None  # column with the place where an item was shown, 1 = first; empty = unknown
    # column with the chance with which an item was shown (its propensity), above 0 to 1; empty = unknown
    propensity: str | None = None
    # a task's name, event names, or "all"; default: the first binary task's positives
    history: str | list[str] = ""
    # generated shops: true values, aligned with the rows; read by tests, never by the build
    truth: str | None = None
    # generated shops: truth.npz (builders/shop/truth.py), by which `verify` says what the lists are worth
    planted: str | None = None

    @property
    def reading(self) -> Reading:
        """Says how the file's cells are to be read."""
        return Reading(self.separator, self.encoding, self.decimal, self.time_unit, self.time_format)


class Entities(TableFile):
    """Describes the table of the items or of the users, one row each."""

    id: str
    title: str | None = None
    features: list[FeatureColumn] = []

    @model_validator(mode="after")
    def _distinct_names(self) -> Entities:
        _refuse_repeats([f.name for f in self.features], "features")
        return self


class Label(_Entry):
    """Says where a task's truth comes from: an event's name, or a column."""

    event: str | None = None
    column: str | None = None
    threshold: float | None = None  # binary: 1 at or above it
    log1p: bool = False  # regression: log(1 + x), fit for seconds and counts
    time: str | None = None  # of a column: another one with when the label came in, empty where it has not
    # what comes later than this after the exposure is none of its doing: "7d", "12h", "30min", or seconds; an
    # exposure whose time is not yet over when its period ends has no label
    within: int | None = None

    @field_validator("within", mode="before")
    @classmethod
    def _seconds(cls, within: Any) -> Any:
        return _seconds_of(within)

    @model_validator(mode="after")
    def _one_source(self) -> Label:
        if (self.event is None) == (self.column is None):
            raise ValueError('a label is either {event = "…"} or {column = "…"}')
        if self.time and not self.column:
            raise ValueError("a label's time is of a column; an event has its own")
        return self


class ShopTask(_Entry):
    """Describes something to predict; without a label (then the only task): will the user take this item."""

    name: str = Field(pattern=NAME)
    kind: Literal["binary", "regression"] = "binary"
    label: Label | None = None
    given: str | None = None  # the binary task before it that must have happened: buy given click
    weight: float = Field(default=1.0, ge=0, allow_inf_nan=False)


class Split(_Entry):
    """Says what tests: each user's last event (leave_one_out), the last tenths of the clock (time), users
    drawn by chance, of whom nothing trains (random), rows that a column names (column), or those of files of
    their own (files)."""

    kind: Literal["leave_one_out", "time", "random", "column", "files"]
    validation: float = Field(default=0.1, gt=0, lt=0.5)
    test: float = Field(default=0.1, gt=0, lt=0.5)
    seed: int = 0  # of random: another one draws other users
    column: str | None = None  # of column: it holds train, validation or test
    # of files: where the held-out rows are, with the columns of the interactions' file
    test_file: str | None = None
    validation_file: str | None = None
    # a published test set: no refit learns from it, and the history that is served has none of it. So it is
    # where the shop itself says what tests (column, files), unless it says otherwise
    keep_test: bool = False

    @model_validator(mode="before")
    @classmethod
    def _given_tests_are_kept(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("kind") in ("column", "files"):
            return {"keep_test": True, **data}
        return data

    @model_validator(mode="after")
    def _keys_fit(self) -> Split:
        wanted = {"column": self.column, "test_file": self.test_file, "validation_file": self.validation_file}
        of = {"column": ("column",), "files": ("test_file", "validation_file")}.get(self.kind, ())
        for name, value in wanted.items():
            if value is not None and name not in of:
                raise ValueError(f"a split of kind {self.kind!r} takes no {name}")
        if of and wanted[of[0]] is None:
            raise ValueError(f'a split of kind {self.kind!r} needs {of[0]} = "…"')
        if self.test_file and self.test_file == self.validation_file:
            raise ValueError(
                f"test_file and validation_file are both {self.test_file!r}; a row does one of them"
            )
        return self

    @property
    def files(self) -> dict[str, int]:
        """Gives the files of held-out rows, each with its part: 1 validation, 2 test."""
        named = ((self.validation_file, 1), (self.test_file, 2))
        return {file: part for file, part in named if file is not None}


class Recall(_Entry):
    """Names the sources of recall: the usual three, and more. A build keeps of these what gains."""

    sources: list[str] = [source.name for source in DEFAULT_SOURCES]
    quotas: dict[str, float] = {}
    new_items: Literal["last", "median"] = "last"  # how popular is an item that nobody has taken yet

    @model_validator(mode="after")
    def _known_sources(self) -> Recall:
        _refuse_repeats(self.sources, "recall.sources")
        usual = [source.name for source in DEFAULT_SOURCES]
        if self.sources[: len(usual)] != usual:
            raise ValueError(f"recall.sources is {self.sources}; begin with {usual}, others behind")
        for name in self.sources:
            if name not in SOURCE_KINDS:
                raise ValueError(f"recall source {name!r} is unknown; known: {', '.join(SOURCE_KINDS)}")
        for name, share in self.quotas.items():
            if name not in self.sources or SOURCE_KINDS[name][1] is None:
                raise ValueError(f"recall.quotas names {name!r}, which is no source here that has a quota")
            if not 0 <= share < 1:
                raise ValueError(f"recall.quotas.{name} is {share}; give a share, 0 to 1")
        if (total := sum(source.quota or 0 for source in self.listed())) >= 1:
            raise ValueError(f"recall.quotas come to {total:g}; leave some for user_embeddings")
        return self

    def listed(self) -> tuple[RecallSource, ...]:
        """Gives the sources with their quotas, as the schema holds them."""
        return tuple(
            RecallSource(name, self.quotas.get(name, SOURCE_KINDS[name][1]), name in self.quotas)
            for name in self.sources
        )


class Shop(_Entry):
    """Holds all of shop.toml."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_. -]{0,63}$")
    split: Split = Split(kind="leave_one_out")
    interactions: Interactions
    items: Entities | None = None  # None: the items are those that the interactions name
    users: Entities | None = None
    context: Context | None = None
    tasks: list[ShopTask] = []
    recall: Recall = Field(default_factory=Recall)

    @field_validator("split", mode="before")
    @classmethod
    def _short_split(cls, split: Any) -> Any:
        return {"kind": split} if isinstance(split, str) else split

    @model_validator(mode="after")
    def _held_out_rows_are_apart(self) -> Shop:
        if self.interactions.file in self.split.files:
            raise ValueError(
                f"the split names {self.interactions.file!r}, the interactions' own file; held-out rows are "
                "in another one"
            )
        return self

    @model_validator(mode="after")
    def _only_items_are_encoded(self) -> Shop:
        for feature in self.users.features if self.users else ():
            if feature.encoder not in (None, HASHED):
                raise ValueError(
                    f"users.{feature.name} names the encoder {feature.encoder!r}; only features of items are "
                    "encoded"
                )
        return self

    @model_validator(mode="after")
    def _tasks_fit(self) -> Shop:
        _refuse_repeats([t.name for t in self.tasks], "tasks")
        if any(task.name == RECALL_WEIGHT for task in self.tasks):
            raise ValueError(
                f"a task may not be called {RECALL_WEIGHT!r}, which among a request's weights means recall's "
                "relevance; name it after what it predicts"
            )
        before: dict[str, str] = {}
        for task in self.tasks:
            if task.label is None and len(self.tasks) > 1:
                raise ValueError(f"task {task.name!r} has no label; only a shop's single task may do without")
            if task.label and task.label.event and not self.interactions.event:
                raise ValueError(
                    f"task {task.name!r} is labelled by the event {task.label.event!r}, but "
                    "interactions.event names no column"
                )
            if task.given and before.get(task.given) != "binary":
                raise ValueError(
                    f"task {task.name!r} is given {task.given!r}, which is no binary task before it"
                )
            before[task.name] = task.kind
            label = task.label
            if (
                label
                and label.within
                and not label.time
                and (label.column or not self.interactions.impression)
            ):
                raise ValueError(
                    f"task {task.name!r} has a label within a time, but nothing says when it comes in: give "
                    "its column a time, or name the event that shows an item, interactions.impression"
                )
        if self.context and not self.has_labels:
            raise ValueError("context is read with exposures and their labels, but no task has a label")
        rule = self.interactions.history
        if isinstance(rule, list) and not self.interactions.event:
            raise ValueError("interactions.history lists events, but interactions.event names no column")
        if isinstance(rule, str) and rule not in ("", "all") and before.get(rule) != "binary":
            raise ValueError(
                f"interactions.history is {rule!r}, which is no binary task; use a task, a list of events, "
                'or "all"'
            )
        if self.interactions.impression and not self.interactions.event:
            raise ValueError("interactions.impression needs interactions.event, the column with event names")
        return self

    @property
    def context_columns(self) -> list[ContextColumn]:
        """Lists the context's features; none where the shop has no context."""
        return self.context.features if self.context else []

    @property
    def has_labels(self) -> bool:
        """Says False where the single task, `interact`, learns from sampled negatives."""
        return any(task.label for task in self.tasks)


def open_shop(folder: Path) -> Shop:
    """Reads and checks `folder`/shop.toml; InvalidInput names the first wrong key."""
    path = folder / SHOP_FILE
    if not path.is_file():
        raise InvalidInput(
            f"{path} is missing; make a shop with `peregrine shop generate` or `peregrine shop import`, or "
            "write one (see `peregrine shop --help`)"
        )
    return read_toml(Shop, path, str(path))


def _seconds_of(within: Any) -> Any:
    """Reads a length of time: "7d", "12h", "30min", "45s" or a number of seconds; None stays."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)(s|min|h|d)", within) if isinstance(within, str) else None
    seconds = float(found[1]) * _UNITS_S[found[2]] if found else within
    if within is None or (
        isinstance(seconds, int | float) and not isinstance(seconds, bool) and seconds >= 1
    ):
        return None if within is None else int(seconds)
    raise ValueError(f'{within!r} is no length of time; write "7d", "12h", "30min", or seconds, at least 1')


def _refuse_repeats(names: list[str], what: str) -> None:
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two {what} are called {name!r}")
