"""Requests and answers on the wire: the one place where options become Triton request parameters and tensors
become results.

Both clients share it, so that the sync and the asyncio one cannot differ.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from clients.errors import InvalidArgument
from clients.results import Item, Recommendations
from ensemble.contract import MAX_ID_BYTES, Degraded
from ensemble.options import NOTHING_ASKED, OPTION_NAMES, Id

Parameter: TypeAlias = bool | int | float | str
Answer: TypeAlias = Mapping[str, Any]  # tensor name -> ndarray; BYTES tensors as a flat list of bytes

_MANY = 64  # elements from which numpy is faster than a loop
_ID_LISTS = ("session_items", "exclude_items")


@dataclass(frozen=True)
class Call:
    """One request: users and options, ready to be sent."""

    user_ids: tuple[bytes, ...]
    parameters: dict[str, Parameter]
    budget_ms: float | None = None


def call_from_options(
    user_ids: Sequence[Id], options: Mapping[str, Any], budget_ms: float | None, per_user: bool
) -> Call:
    """Checks what can only be checked here (types) and encodes; the server checks the rest, in one place for
    every client."""
    unknown = next((name for name in options if name not in OPTION_NAMES), None)
    if unknown is not None:
        raise InvalidArgument(f"{unknown}: unknown parameter; known: {', '.join(OPTION_NAMES)}")
    if not user_ids:
        raise InvalidArgument("user_id: at least one user is needed, got none")
    if budget_ms is not None and not budget_ms > 0:
        raise InvalidArgument(f"budget_ms: must be above 0, got {budget_ms!r}")
    ids = tuple(_text_from_id("user_id", user).encode() for user in user_ids)
    count = len(ids) if per_user else 0
    parameters = {
        name: _parameter(name, value, count) for name, value in options.items() if value is not None
    }
    return Call(ids, parameters, budget_ms)


def _text_from_id(field: str, value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, (str, int, np.integer)):
        raise InvalidArgument(f"{field}: an id must be a string or an integer, got {value!r}")
    text = str(value)
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise InvalidArgument(f"{field}: an id must be valid UTF-8, got {value!r}") from None
    if size > MAX_ID_BYTES:
        raise InvalidArgument(f"{field}: an id has at most {MAX_ID_BYTES} bytes, got {size}")
    return text


def _parameter(name: str, value: Any, num_users: int) -> Parameter:
    """One option as a Triton request parameter: scalars as they are, all else as JSON."""
    if num_users and _is_per_user(name, value):
        if len(value) != num_users:
            raise InvalidArgument(
                f"{name}: one value per user is needed: {num_users} users, got {len(value)} values"
            )
        if name not in NOTHING_ASKED and any(one is None for one in value):
            raise InvalidArgument(f"{name}: None is no value; give one to every user, or leave {name} out")
        neutral = NOTHING_ASKED.get(name)  # None is for users who ask for nothing while others do
        return _json(name, [_plain(name, neutral if one is None else one) for one in value])
    plain = _plain(name, value)
    if isinstance(plain, float) and not math.isfinite(plain):
        raise InvalidArgument(f"{name}: numbers must be finite, got {plain!r}")
    if isinstance(plain, int) and not -(2**63) <= plain < 2**63:
        raise InvalidArgument(f"{name}: {plain} does not fit into 64 bits")
    return plain if isinstance(plain, (bool, int, float)) else _json(name, plain)


def _is_per_user(name: str, value: Any) -> bool:
    """A sequence where one value is none itself; for lists of ids, a sequence of sequences."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Sequence):
        return False
    return name not in _ID_LISTS or any(
        one is None or (isinstance(one, Sequence) and not isinstance(one, str)) for one in value
    )


def _plain(name: str, value: Any) -> Any:
    """The option's value in JSON's types; InvalidArgument if it has none."""
    if name in _ID_LISTS:
        if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, (Sequence, np.ndarray)):
            raise InvalidArgument(f"{name}: must be a list of item ids, got {value!r}")
        return [_text_from_id(name, one) for one in value]
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        return {str(key): _plain_list(one) for key, one in value.items()}
    return value


def _plain_list(value: Any) -> Any:
    if isinstance(value, str):
        return [value]
    if isinstance(value, (set, frozenset, tuple)):
        return sorted(value) if isinstance(value, (set, frozenset)) else list(value)
    return value.item() if isinstance(value, np.generic) else value


def _json(name: str, value: Any) -> str:
    try:
        return json.dumps(value, allow_nan=False, separators=(",", ":"))
    except ValueError:
        raise InvalidArgument(f"{name}: numbers must be finite, got {value!r}") from None
    except TypeError:
        raise InvalidArgument(f"{name}: cannot be written as JSON: {value!r}") from None


def encode_bytes(values: Sequence[bytes]) -> bytes:
    """Triton's BYTES: each element after its length, 4 bytes little-endian."""
    return b"".join([struct.pack("<I", len(value)) + value for value in values])


def decode_bytes(raw: bytes, count: int) -> list[bytes]:
    """Inverse of `encode_bytes`. Many elements of one length are cut by numpy at once."""
    width = len(raw) // count if count >= _MANY else 0
    if width > 4 and width * count == len(raw):
        table = np.frombuffer(raw, np.uint8).reshape(count, width)
        # An id that ends in NUL would be cut by numpy's S dtype, and is the server's bug; the slow way keeps
        # even that one.
        if (
            (table[:, :4] == table[0, :4]).all()
            and int.from_bytes(raw[:4], "little") == width - 4
            and table[:, -1].all()
        ):
            return np.ascontiguousarray(table[:, 4:]).view(f"S{width - 4}").ravel().tolist()
    values, at = [], 0
    while at < len(raw):
        end = at + 4 + int.from_bytes(raw[at : at + 4], "little")
        values.append(raw[at + 4 : end])
        at = end
    return values


def recommendations_from_answer(call: Call, answer: Answer, latency_ms: float) -> list[Recommendations]:
    """One result per user; padding (empty ids) is cut off."""
    num_users = len(call.user_ids)
    tasks: list[str] = json.loads(answer["tasks"][0])
    ids: list[bytes] = answer["item_ids"]
    depth = len(ids) // num_users
    scores = np.asarray(answer["scores"]).reshape(num_users, depth).tolist()
    probabilities = np.asarray(answer["probabilities"]).reshape(num_users, depth, -1).tolist()
    degraded = np.asarray(answer["degraded"]).ravel().tolist()
    results = []
    for row, user in enumerate(call.user_ids):
        mine = ids[row * depth : (row + 1) * depth]
        columns = zip(mine, scores[row], probabilities[row], strict=True)
        items = tuple(
            [
                Item(item.decode("utf-8", "replace"), score, dict(zip(tasks, values, strict=True)))
                for item, score, values in columns
                if item
            ]
        )
        results.append(
            Recommendations(
                user.decode(), items, Degraded(degraded[row]), answer["release"][row].decode(), latency_ms
            )
        )
    return results
