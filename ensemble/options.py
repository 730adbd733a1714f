"""Parses what a request may ask beside its user: Triton request parameters -> columns for the whole batch.

Parameters, unlike optional tensors, do not split Triton's dynamic batches, so traffic whose options all
differ still batches. A string value holds JSON. For several users in one request a value is shared, or is a
JSON array with one value per user.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, TypeAlias, TypedDict

import numpy as np

from ensemble.arrays import Array
from ensemble.budget import without_budget
from ensemble.context import NO_CONTEXT, Context, read_context
from ensemble.contract import MAX_LIST
from ensemble.errors import InvalidArgument
from ensemble.id_rule import encode_id
from ensemble.json_values import is_number, object_of, short
from ensemble.schema import Schema, number_names

DEFAULT_TOP_K = 10
Id: TypeAlias = str | int  # an integer is taken as its decimal text
Ids: TypeAlias = Sequence[Id] | Array


class RequestOptions(TypedDict, total=False):
    """Names what a request may ask beside its user, with types and meaning: for clients and server alike.

    An option that is left out or None is as if nobody had asked for it.
    """

    top_k: int | None  # items wanted; default 10
    session_items: Ids | None  # looked at just now, newest last; read after the stored history
    exclude_items: Ids | None  # never to be returned
    exclude_seen: bool | None  # leave out what the user has had; default True, of a search False
    allow: Mapping[str, Sequence[str] | Array] | None  # {category feature: [values]}: only these
    deny: Mapping[str, Sequence[str] | Array] | None  # {category feature: [values]}: none of these
    # {number feature: [least, greatest]}, both included, None = open: {"price": [5, 20], "stock": [1, None]}
    ranges: Mapping[str, Sequence[float | None] | Array] | None
    # {task: its weight in the score}; "recall": the power of recall's relevance in it (steps/blend.py)
    weights: Mapping[str, float] | None
    caps: Mapping[str, int] | None  # {category feature: how many items of one value a list may hold}
    diversity: float | None  # 0..1: how much unlikeness counts against score; default 0
    # Unix seconds at which the request counts as made, for asking about the past again; default: now
    time: float | None
    # {context feature: its value}, such as {"device": "phone", "hour": 13}; None = nothing is said
    context: Mapping[str, str | float | None] | None
    like: Ids | None  # of a search: items that the list shall be like, whose own places it leaves free


OPTION_NAMES = tuple(RequestOptions.__annotations__)
# What each option asks for when nobody asks; without top_k, whose default is the server's.
NOTHING_ASKED: RequestOptions = {
    "session_items": [],
    "exclude_items": [],
    "exclude_seen": True,
    "allow": {},
    "deny": {},
    "ranges": {},
    "weights": {},
    "caps": {},
    "diversity": 0.0,
    "time": None,
    "context": {},
    "like": [],
}
# Triton's own, which may travel along with ours.
_FOREIGN = (
    "sequence_id",
    "sequence_start",
    "sequence_end",
    "priority",
    "timeout",
    "binary_data_output",
    "triton_enable_empty_final_response",
)

LATEST_S = 1 << 32  # 2106: later times do not fit into a past
RECALL_WEIGHT = "recall"  # beside the tasks among a request's weights
MOST_POWER = 16.0
NO_CAP = 1 << 30  # more items than any list has
# Longer ones (long sessions, many users) hardly come twice, and 4096 of them would fill the memory
_REMEMBERED_BYTES = 2048

Category = tuple[str, tuple[str, ...]]  # a feature and values of it
Range = tuple[str, float, float]  # a number feature, its least and its greatest value, both included


@dataclass(frozen=True)
class Filter:
    """Says which items pass: a value of every allowed feature, no denied one, numbers within range."""

    allow: tuple[Category, ...] = ()
    deny: tuple[Category, ...] = ()
    ranges: tuple[Range, ...] = ()


@dataclass(frozen=True)
class UserOptions:
    """Holds the options of one user of one request."""

    top_k: int = DEFAULT_TOP_K
    session_items: tuple[bytes, ...] = ()
    exclude_items: tuple[bytes, ...] = ()
    exclude_seen: bool | None = None  # None: as the pipeline does
    allow: tuple[Category, ...] = ()
    deny: tuple[Category, ...] = ()
    ranges: tuple[Range, ...] = ()
    weights: tuple[tuple[str, float], ...] = ()
    caps: tuple[tuple[str, int], ...] = ()
    diversity: float = 0.0
    time: float | None = None
    context: Context = NO_CONTEXT
    like: tuple[bytes, ...] = ()

    @property
    def filter(self) -> Filter | None:
        """Gives what items must fulfil; None where every item may be recommended."""
        return Filter(self.allow, self.deny, self.ranges) if self.allow or self.deny or self.ranges else None


@dataclass(frozen=True)
class Options:
    """Holds the options of a batch of B users, one entry each, in the batch's order."""

    users: tuple[UserOptions, ...]
    deadlines: tuple[float, ...] = ()  # of each user, on the monotonic clock; none: nobody's budget is known

    def __len__(self) -> int:
        return len(self.users)

    def late(self, within_s: float) -> Array:
        """Says whose budget is spent within so many seconds: [B] bool."""
        if not self.deadlines:
            return np.zeros(len(self.users), bool)
        return np.array(self.deadlines) < time.monotonic() + within_s

    def of(self, users: Array) -> Options:
        """Gives the options of some users, by their places [b]."""
        places = users.tolist()
        return Options(
            tuple(self.users[n] for n in places), tuple(self.deadlines[n] for n in places if self.deadlines)
        )

    @property
    def top_k(self) -> Array:
        """Gives how many items each user wants: [B] int64."""
        return np.array([u.top_k for u in self.users], np.int64)

    @property
    def exclude_seen(self) -> Array:
        """Says whose past items are left out: [B] bool, of everybody who does not say."""
        return np.array([u.exclude_seen is not False for u in self.users], bool)

    def of_search(self) -> Options:
        """Gives the options as a search takes them: whoever does not say may find again what he has had."""
        if all(user.exclude_seen is not None for user in self.users):
            return self
        users = (u if u.exclude_seen is not None else replace(u, exclude_seen=False) for u in self.users)
        return replace(self, users=tuple(users))

    def times(self, now: float) -> Array:
        """Gives when each user's request counts as made: [B] float64 Unix seconds, `now` where none is
        said."""
        return np.array([now if u.time is None else u.time for u in self.users], np.float64)

    def contexts(self, num_features: int) -> Array:
        """Gives what each user's request says of its moment: [B, X] float32, NaN where nothing."""
        nothing = (None,) * num_features
        rows = [u.context.values or nothing for u in self.users]
        return np.array(rows, np.float32).reshape(len(rows), num_features)

    @property
    def knows_context(self) -> Array:
        """Says whose context has nothing that the release does not know: [B] bool."""
        return np.array([u.context.is_known for u in self.users], bool)

    def ids(self, name: str) -> tuple[Array, Array]:
        """Gives all users' session_items, exclude_items or like, flat: (owners [L] int64, ids [L] S)."""
        lists = [getattr(u, name) for u in self.users]
        owners = np.repeat(np.arange(len(lists)), [len(ids) for ids in lists])
        return owners, np.array([i for ids in lists for i in ids], dtype="S") if len(owners) else np.zeros(
            0, "S1"
        )


def default_options(num_users: int) -> Options:
    """Gives the options of users who ask for nothing."""
    return Options((UserOptions(),) * num_users)


def parse_options(parameters: str, num_users: int, schema: Schema) -> Options:
    """Parses one request's parameters, a JSON object as Triton gives it; InvalidArgument names the field."""
    parameters = without_budget(parameters)  # it differs at each call, and what is remembered does not
    if parameters in ("", "{}", "null"):
        return default_options(num_users)
    parse = _parse if len(parameters) <= _REMEMBERED_BYTES else _parse.__wrapped__
    return parse(parameters, num_users, schema)


def with_deadline(options: Options, deadline: float) -> Options:
    """Gives a request's options with the moment at which its budget is spent."""
    if math.isinf(deadline):
        return options
    return replace(options, deadlines=(deadline,) * len(options))


@lru_cache(maxsize=4096)  # the same page asks the same question again and again
def _parse(parameters: str, num_users: int, schema: Schema) -> Options:
    raw = read_parameters(parameters)
    unknown = sorted(set(raw) - set(OPTION_NAMES))
    if unknown:
        raise InvalidArgument(f"{unknown[0]}: unknown parameter", f"known: {', '.join(OPTION_NAMES)}")
    columns = {name: _column(name, value, num_users, schema) for name, value in raw.items()}
    return Options(
        tuple(UserOptions(**{name: column[i] for name, column in columns.items()}) for i in range(num_users))
    )


def _column(name: str, value: Any, num_users: int, schema: Schema) -> list[Any]:
    """Reads one parameter for each user of the request."""
    read = _READERS[name][0]
    value, one_each = _told_apart(name, value, num_users)
    return [read(name, v, schema) for v in value] if one_each else [read(name, value, schema)] * num_users


def _told_apart(name: str, value: Any, num_users: int) -> tuple[Any, bool]:
    """Reads a parameter from JSON, and says whether it has one value for each user; InvalidArgument if it has
    another number of them."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise InvalidArgument(f"{name}: not JSON: {error}") from None
    is_list = _READERS[name][1]
    one_each = isinstance(value, list) and (
        not is_list or (bool(value) and all(isinstance(v, list) for v in value))
    )
    if one_each and len(value) != num_users:
        raise InvalidArgument(
            f"{name}: {len(value)} values for {num_users} users", "give one value for all, or one each"
        )
    return value, one_each


def read_parameters(parameters: str) -> dict[str, Any]:
    """Reads one request's parameters without Triton's own, none of them checked yet; InvalidArgument if they
    are no JSON object."""
    try:
        given = json.loads(parameters or "{}")
    except ValueError:  # Triton writes a double that is NaN or infinite as nothing at all
        raise InvalidArgument(
            f"parameters: not JSON, a number may be NaN or infinite: {parameters[:80]}"
        ) from None
    if not isinstance(given, dict | None):
        raise InvalidArgument(f"parameters: must be a JSON object, got {short(given)}")
    return {name: value for name, value in (given or {}).items() if name not in _FOREIGN}


def parameters_of(raw: Mapping[str, Any], users: Sequence[int], num_users: int) -> dict[str, Any]:
    """Cuts a request's parameters down to some of its users, given by their places: a value for all stays as
    it is, of one for each user theirs are left, as JSON. Unknown parameters pass.

    InvalidArgument if there is another number of values than of users; no value is checked.
    """
    cut = {}
    for name, value in raw.items():
        plain, one_each = _told_apart(name, value, num_users) if name in _READERS else (value, False)
        cut[name] = json.dumps([plain[user] for user in users]) if one_each else value
    return cut


def _top_k(name: str, value: Any, schema: Schema) -> int:
    most = schema.sizes.max_top_k
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
        raise InvalidArgument(f"{name}: must be 1..{most}, got {short(value)}")
    return value


def _ids(name: str, value: Any, schema: Schema) -> tuple[bytes, ...]:
    if not isinstance(value, list):
        raise InvalidArgument(f"{name}: must be a JSON array of item ids, got {short(value)}")
    if len(value) > MAX_LIST:
        raise InvalidArgument(f"{name}: at most {MAX_LIST} items, got {len(value)}")
    return tuple([encode_id(name, one, may_be_empty=True) for one in value])


def _switch(name: str, value: Any, schema: Schema) -> bool:
    if not isinstance(value, bool):
        raise InvalidArgument(f"{name}: must be true or false, got {short(value)}")
    return value


def _share(name: str, value: Any, schema: Schema) -> float:
    if not is_number(value) or not 0 <= value <= 1:
        raise InvalidArgument(f"{name}: must be 0..1, got {short(value)}")
    return float(value)


def _time(name: str, value: Any, schema: Schema) -> float | None:
    if value is None:
        return None
    if not is_number(value) or not 0 <= value < LATEST_S:
        raise InvalidArgument(f"{name}: must be Unix seconds, from 0 to below {LATEST_S}, got {short(value)}")
    return float(value)


def _weights(name: str, value: Any, schema: Schema) -> tuple[tuple[str, float], ...]:
    known = {RECALL_WEIGHT, *(task.name for task in schema.tasks)}
    for task, weight in object_of(name, value, known, "task"):
        if task == RECALL_WEIGHT and not (is_number(weight) and 0 <= weight <= MOST_POWER):
            raise InvalidArgument(
                f"{name}: the weight of {task!r} is the power of recall's relevance, 0..{MOST_POWER:g}, got "
                f"{short(weight)}"
            )
        if not is_number(weight) or abs(weight) > 1e6:
            raise InvalidArgument(
                f"{name}: the weight of {task!r} must be a finite number, at most 1e6 in size, got "
                f"{short(weight)}"
            )
    return tuple((task, float(weight)) for task, weight in value.items())


def _caps(name: str, value: Any, schema: Schema) -> tuple[tuple[str, int], ...]:
    for feature, cap in object_of(name, value, _categories(schema), "item category"):
        if not isinstance(cap, int) or isinstance(cap, bool) or cap < 1:
            raise InvalidArgument(
                f"{name}: the cap of {feature!r} must be a whole number from 1, got {short(cap)}"
            )
    return tuple((feature, min(cap, NO_CAP)) for feature, cap in value.items())


def _filter(name: str, value: Any, schema: Schema) -> tuple[Category, ...]:
    for feature, values in object_of(name, value, _categories(schema), "item category"):
        if (
            not isinstance(values, list)
            or not all(isinstance(v, str) for v in values)
            or len(values) > MAX_LIST
        ):
            raise InvalidArgument(
                f"{name}: {feature!r} must be a JSON array of at most {MAX_LIST} strings, got {short(values)}"
            )
    return tuple((feature, tuple(sorted(set(values)))) for feature, values in sorted(value.items()))


def _ranges(name: str, value: Any, schema: Schema) -> tuple[Range, ...]:
    """Reads ranges such as {"price": [10, 50], "stock": [1, null]}: both ends included, null = open."""
    ranges = []
    for feature, ends in object_of(name, value, set(number_names(schema)), "item number"):
        if (
            not isinstance(ends, list)
            or len(ends) != 2
            or not all(end is None or is_number(end) for end in ends)
        ):
            raise InvalidArgument(
                f"{name}: {feature!r} must be [least, greatest], finite numbers or null, got {short(ends)}"
            )
        low = -math.inf if ends[0] is None else float(ends[0])
        high = math.inf if ends[1] is None else float(ends[1])
        if low > high:
            raise InvalidArgument(f"{name}: {feature!r} has no number from {low:g} to {high:g}")
        ranges.append((feature, low, high))
    return tuple(sorted(ranges))


def _categories(schema: Schema) -> set[str]:
    return {feature.name for feature in schema.items.features if feature.kind == "category"}


Reader = Callable[[str, Any, Schema], Any]
# Name: (reader of one user's value, whether that value is itself an array).
_READERS: dict[str, tuple[Reader, bool]] = {
    "top_k": (_top_k, False),
    "session_items": (_ids, True),
    "exclude_items": (_ids, True),
    "exclude_seen": (_switch, False),
    "allow": (_filter, False),
    "deny": (_filter, False),
    "ranges": (_ranges, False),
    "weights": (_weights, False),
    "caps": (_caps, False),
    "diversity": (_share, False),
    "time": (_time, False),
    "context": (read_context, False),
    "like": (_ids, True),
}


def stack(options: Sequence[Options]) -> Options:
    """Joins the options of consecutive requests into one batch's."""
    if len(options) == 1:
        return options[0]
    users = tuple(u for one in options for u in one.users)
    if not any(one.deadlines for one in options):
        return Options(users)
    return Options(users, tuple(d for one in options for d in one.deadlines or (math.inf,) * len(one)))
