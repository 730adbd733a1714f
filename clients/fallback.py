"""Keeps the list that a release gives to whoever nothing is known of, for when nobody answers in time."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from concurrent.futures import Future

from clients.results import Recommendations
from clients.wire import Answer, Call, recommendations_from_answer
from ensemble.contract import Degraded
from ensemble.errors import InvalidArgument, PeregrineError

_DEEPEST = 100  # items, of which a request may exclude some; a shop may give fewer at once
_RELEASES = 4  # that are remembered: while there is a canary, answers come from two by turns
# What a list that is not made for the request cannot keep to
_RULES = ("allow", "deny", "ranges", "caps", "time")
_DEFAULT_TOP_K = 10


class Popular:
    """Fetches one list for each release, in the background, and answers with it."""

    def __init__(self, start: Callable[[Call], Future[Answer]]) -> None:
        self._start, self._lock = start, threading.Lock()
        self._depths = dict[str, int]()  # by release: how many items were asked for
        self._list: Recommendations | None = None

    def learn(self, release: str, answered: Call) -> None:
        """Takes note of a release that answered a call, and fetches its list where none as long is there."""
        depth = max(_each(answered, "top_k", len(answered.user_ids), _DEFAULT_TOP_K), default=_DEFAULT_TOP_K)
        with self._lock:
            known = self._depths.get(release, 0)
            if known >= depth:
                return
            self._depths[release] = depth if known else max(depth, _DEEPEST)
            asked = self._depths[release]
            while len(self._depths) > _RELEASES:
                del self._depths[next(iter(self._depths))]
        self._fetch(release, asked, depth)

    def _fetch(self, release: str, depth: int, answered: int) -> None:
        """Asks for the list of everybody, `depth` items; where the shop refuses so many, as many as it has
        `answered`."""
        call = Call((b"",), {"top_k": depth})

        def keep(done: Future[Answer]) -> None:
            try:
                [found] = recommendations_from_answer(call, done.result(), 0.0)
            except InvalidArgument:
                if depth > answered:
                    with self._lock:
                        self._depths[release] = answered
                    self._fetch(release, answered, answered)
                return
            except PeregrineError:
                self._forget(release)
                return
            if found.items:
                self._list = found

        try:
            self._start(call).add_done_callback(keep)
        except PeregrineError:
            self._forget(release)

    def _forget(self, release: str) -> None:
        """Lets the next answer of a release try again."""
        with self._lock:
            self._depths.pop(release, None)

    def answer(self, call: Call, latency_ms: float) -> list[Recommendations] | None:
        """Gives each user the list, without what the request excludes; None where there is none, or the
        request has rules that it cannot keep to."""
        known = self._list
        if known is None or any(name in call.parameters for name in _RULES):
            return None
        num_users = len(call.user_ids)
        top_ks = _each(call, "top_k", num_users, _DEFAULT_TOP_K)
        excluded = [
            {*map(str, out), *map(str, seen)}
            for out, seen in zip(
                _each(call, "exclude_items", num_users, []),
                _each(call, "session_items", num_users, []),
                strict=True,
            )
        ]
        return [
            Recommendations(
                user.decode(),
                tuple([one for one in known.items if one.item_id not in out][:top_k]),
                known.degraded | Degraded.RANK_SKIPPED | Degraded.POPULAR,
                known.release,
                latency_ms,
                known.sequence,
            )
            for user, top_k, out in zip(call.user_ids, top_ks, excluded, strict=True)
        ]


def _each(call: Call, name: str, num_users: int, neutral: object) -> list:  # type: ignore[type-arg]
    """Gives each user's value of an option."""
    value = call.parameters.get(name, neutral)
    if isinstance(value, str):
        value = json.loads(value)
    is_ids = isinstance(neutral, list)
    if isinstance(value, list) and (not is_ids or (value and all(isinstance(one, list) for one in value))):
        return value
    return [value] * num_users
