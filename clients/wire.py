"""Turns options into Triton request parameters, and an answer's tensors into results; nothing else does.

Both clients share it, so that the sync and the asyncio one cannot differ.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, TypeAlias

import numpy as np

from clients.errors import InvalidArgument, ServerFault
from clients.results import Item, Recommendations
from ensemble.contract import Degraded
from ensemble.id_rule import encode_id
from ensemble.options import NOTHING_ASKED, OPTION_NAMES, Ids

Parameter: TypeAlias = bool | int | float | str
Answer: TypeAlias = Mapping[str, Any]  # tensor name -> Array; a BYTES tensor is a flat list of bytes

REQUEST_ID = re.compile(r"[\w.:/+=@-]{1,64}", re.ASCII)
_MOST_SHOWN = 120  # characters of a value in an error
_MANY = 64  # elements from which numpy is faster than a loop
_ID_LISTS = ("session_items", "exclude_items", "like")
_MAPPINGS = ("allow", "deny", "ranges", "weights", "caps", "context")
_OF_LISTS = ("allow", "deny", "ranges")  # mappings whose values are lists
# A sequence of letters or of numbers to Python, and a list to nobody who passes one
_TEXTS = (str, bytes, bytearray, memoryview)
_SCALARS = {type(None), bool, int, float, str, bytes, bytearray, memoryview}


@dataclass(frozen=True)
class Call:
    """Holds one request, users and options, ready to be sent."""

    user_ids: tuple[bytes, ...]
    parameters: dict[str, Parameter]
    budget_ms: float | None = None
    model: str = ""  # the alias that is called; empty: the one that the transport calls
    contents: tuple[tuple[str, bytes], ...] = ()  # of a search, by input: the same for each user
    traceparent: str = ""  # W3C's header of the caller's trace; empty where it has none
    request_id: str = ""  # Triton's, which the server's log names; empty: the client gives it one


def call_from_options(
    user_ids: Ids,
    options: Mapping[str, Any],
    budget_ms: float | None,
    per_user: bool,
    request_id: str | None = None,
) -> Call:
    """Encodes users and options as a Call; raises InvalidArgument for what cannot be sent.

    Values are checked by the server, in one place for every client. `per_user`: an option may hold one value
    for each user.
    """
    unknown = next((name for name in options if name not in OPTION_NAMES), None)
    if unknown is not None:
        raise InvalidArgument(f"{unknown}: unknown parameter; known: {', '.join(OPTION_NAMES)}")
    if budget_ms is not None and not (isinstance(budget_ms, Real) and budget_ms > 0):
        raise InvalidArgument(f"budget_ms: must be above 0, got {shown(budget_ms)}")
    if request_id is not None and not (isinstance(request_id, str) and REQUEST_ID.fullmatch(request_id)):
        raise InvalidArgument(
            f"request_id: must be 1 to 64 letters, digits or any of ._:/+=@-, got {shown(request_id)}"
        )
    ids = _encoded_ids("user_id", user_ids)
    if not ids:
        raise InvalidArgument("user_id: at least one user is needed, got none")
    count = len(ids) if per_user else 0
    parameters = {
        name: _parameter(name, value, count) for name, value in options.items() if value is not None
    }
    return Call(tuple(ids), parameters, budget_ms, request_id=request_id or "")


def shown(value: Any) -> str:
    """Shows a value in an error: in one short line, whatever it is (a table has many)."""
    text = " ".join(repr(value).split())
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]} … ({type(value).__name__})"


def _encoded_ids(field: str, ids: Any) -> list[bytes]:
    """Gives the ids of a list, a tuple or an array as bytes; refuses a lone text, a sequence of letters."""
    values = _plain(ids)
    if isinstance(values, _TEXTS) or not isinstance(values, Sequence):
        what = "user" if field == "user_id" else "item"
        raise InvalidArgument(f"{field}: must be a list of {what} ids, got {shown(ids)}")
    return [encode_id(field, value, may_be_empty=True) for value in values]


def _parameter(name: str, value: Any, num_users: int) -> Parameter:
    """Gives one option as a Triton request parameter: a number or bool as it is, all else as JSON."""
    plain = _plain(value)
    if num_users and _is_per_user(name, plain):
        return _json(name, _values_per_user(name, plain, num_users))
    plain = _checked(name, plain)
    if isinstance(plain, float) and not math.isfinite(plain):
        raise InvalidArgument(f"{name}: numbers must be finite, got {plain!r}")
    if isinstance(plain, int) and not -(2**63) <= plain < 2**63:
        raise InvalidArgument(f"{name}: {plain} does not fit into 64 bits")
    return plain if isinstance(plain, (bool, int, float)) else _json(name, plain)


def _is_per_user(name: str, value: Any) -> bool:
    """Tells whether an option has one value per user: it is a list although one value is none, or a list of
    lists where one value is a list of ids."""
    return isinstance(value, list) and (
        name not in _ID_LISTS or any(one is None or isinstance(one, list) for one in value)
    )


def _values_per_user(name: str, values: list[Any], num_users: int) -> list[Any]:
    """Checks that there is a value for each user, and puts what nobody asks for in place of None."""
    if len(values) != num_users:
        raise InvalidArgument(
            f"{name}: one value per user is needed: {num_users} users, got {len(values)} values"
        )
    if name not in NOTHING_ASKED and None in values:
        raise InvalidArgument(f"{name}: None is no value; give one to every user, or leave {name} out")
    neutral = NOTHING_ASKED.get(name)
    return [_checked(name, neutral if value is None else value) for value in values]


def _checked(name: str, plain: Any) -> Any:
    """Gives one value of an option in the form it is sent in, ids as texts; refuses a lone text in the place
    of a list or a mapping."""
    if name in _ID_LISTS:
        return [one.decode() for one in _encoded_ids(name, plain)]
    if name in _MAPPINGS and isinstance(plain, _TEXTS):
        raise InvalidArgument(f"{name}: must map names to values, got {shown(plain)}")
    if name in _OF_LISTS and isinstance(plain, dict):
        for key, value in plain.items():
            if isinstance(value, _TEXTS):
                raise InvalidArgument(f"{name}: {key!r} must be a list, [{value!r}], got {value!r}")
    return plain


def _plain(value: Any) -> Any:
    """Turns arrays, numpy's numbers and tuples into JSON's types, at any depth, and sets where their order
    means nothing: in allow and deny. What JSON cannot say stays as it is."""
    if type(value) in _SCALARS:
        return value
    if isinstance(value, np.ndarray) and value.dtype != object:
        return value.tolist()
    for name in ("tolist", "to_list", "to_pylist"):  # NumPy's and pandas', polars', pyarrow's
        if callable(listed := getattr(value, name, None)):
            found = listed()
            return [_plain(one) for one in found] if isinstance(found, list) else found
    if isinstance(value, Mapping):
        return {
            str(key): _plain(sorted(one, key=str) if isinstance(one, (set, frozenset)) else one)
            for key, one in value.items()
        }
    return [_plain(one) for one in value] if isinstance(value, Sequence) else value


def _json(name: str, value: Any) -> str:
    """Writes a value as JSON text; InvalidArgument names the option whose value has none."""
    try:
        return json.dumps(value, allow_nan=False, separators=(",", ":"))
    except ValueError:
        raise InvalidArgument(f"{name}: numbers must be finite, got {shown(value)}") from None
    except TypeError:
        raise InvalidArgument(f"{name}: cannot be written as JSON: {shown(value)}") from None


def encode_bytes(values: Sequence[bytes]) -> bytes:
    """Writes values as Triton's BYTES: each after its length, 4 bytes little-endian."""
    return b"".join([struct.pack("<I", len(value)) + value for value in values])


def decode_bytes(raw: bytes, count: int) -> list[bytes]:
    """Reads `count` values that `encode_bytes` wrote; numpy cuts many of one length at once."""
    width = len(raw) // count if count >= _MANY else 0
    if width > 4 and width * count == len(raw):
        table = np.frombuffer(raw, np.uint8).reshape(count, width)
        same_width = (table[:, :4] == table[0, :4]).all() and int.from_bytes(raw[:4], "little") == width - 4
        # An id that ends in NUL is the server's bug, and numpy's S dtype would cut it; the slow way keeps it.
        if same_width and table[:, -1].all():
            return np.ascontiguousarray(table[:, 4:]).view(f"S{width - 4}").ravel().tolist()
    values, at = [], 0
    while at < len(raw):
        end = at + 4 + int.from_bytes(raw[at : at + 4], "little")
        values.append(raw[at + 4 : end])
        at = end
    return values


def recommendations_from_answer(call: Call, answer: Answer, latency_ms: float) -> list[Recommendations]:
    """Gives one result per user, without padding (empty ids); ServerFault if the answer lacks a tensor or has
    one of another shape."""
    try:
        return _results(call, answer, latency_ms)
    except KeyError as error:
        fault = f"it has no tensor {error}"
    except (IndexError, TypeError, ValueError) as error:
        fault = str(error)
    raise ServerFault(f"the server said OK, but its answer cannot be read: {fault}; its log has the details")


def _names(finders: bytes) -> tuple[str, ...]:
    """Gives the names of the finders that the answer joins by commas."""
    return tuple(finders.decode().split(",")) if finders else ()


def _results(call: Call, answer: Answer, latency_ms: float) -> list[Recommendations]:
    """Cuts the tensors of an answer into one list per user."""
    num_users = len(call.user_ids)
    tasks: list[str] = json.loads(answer["tasks"][0])
    ids: list[bytes] = answer["item_ids"]
    depth = len(ids) // num_users
    scores = np.asarray(answer["scores"]).reshape(num_users, depth).tolist()
    probabilities = np.asarray(answer["probabilities"]).reshape(num_users, depth, len(tasks)).tolist()
    degraded = np.asarray(answer["degraded"]).ravel().tolist()
    finders = list(map(_names, answer["finders"])) if "finders" in answer else [()] * len(ids)
    sequences = np.asarray(answer["sequence"]).ravel().tolist()
    results = []
    for row, user in enumerate(call.user_ids):
        mine = ids[row * depth : (row + 1) * depth]
        found = finders[row * depth : (row + 1) * depth]
        columns = zip(mine, scores[row], probabilities[row], found, strict=True)
        items = tuple(
            [
                Item(item.decode("utf-8", "replace"), score, dict(zip(tasks, values, strict=True)), names)
                for item, score, values, names in columns
                if item
            ]
        )
        results.append(
            Recommendations(
                user.decode(),
                items,
                Degraded(degraded[row]),
                answer["release"][row].decode(),
                latency_ms,
                sequences[row],
            )
        )
    return results
