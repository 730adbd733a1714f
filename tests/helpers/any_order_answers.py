"""What answers in tests/together/test_any_order.py: local twins, or a real server; each reads its rows
through Redis."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from clients.client import Client
from clients.errors import CallError
from clients.items import make_ready
from ensemble.contract import Degraded
from ensemble.local import LocalPipeline
from ensemble.release.route import Route
from ensemble.server.following import route_in
from ensemble.server.options import ServeOptions
from ensemble.server.supervisor import Server, serve
from ensemble.steps.served import open_served
from ensemble.tiers.reader import RowReaders
from ensemble.tiers.settings import TierSettings

NEWCOMER = b"nobody-knows-me"
USERS = (NEWCOMER, b"u1", b"u2", b"u3")
WAIT_S = 20.0
DEADLINE_MS = 250  # a call to Redis has time where the machine is busy


class Answer(NamedTuple):
    """Holds one list, whoever gave it, and whether all of its rows are Redis's word."""

    release: str
    sequence: int
    items: list[bytes]
    is_sure: bool


class Steps(Protocol):
    """Is what answers: local twins, or a server."""

    def open(self) -> None:
        """Makes sure that the releases of the route answer."""

    def restart(self) -> None:
        """Starts what answers again, in the rough way."""

    def close(self) -> None:
        """Ends it."""

    def ask(self, user: bytes, options: dict[str, Any]) -> Answer:
        """Asks for one user's list."""


class Twins:
    """Keeps a local twin of every release that was in the route, as a server's steps are kept."""

    def __init__(self, repository: Path, redis: str) -> None:
        self.repository, self.redis, self.twins = repository, redis, dict[str, LocalPipeline]()

    def open(self) -> None:
        for name in the_route(self.repository).releases:
            make_ready(self.repository, name)
            if name not in self.twins:
                release = open_served(self.repository, name)
                # As PEREGRINE_TIERS would have it: a process of a server has one Redis, this one has several.
                settings = TierSettings(self.redis, deadline_ms=DEADLINE_MS)
                vars(release)["readers"] = RowReaders(release, settings)
                self.twins[name] = LocalPipeline(release)
                self.twins[name].release.live.follow()

    def restart(self) -> None:
        self.close()
        self.open()

    def close(self) -> None:
        for twin in self.twins.values():
            twin.release.close()
        self.twins.clear()

    def ask(self, user: bytes, options: dict[str, Any]) -> Answer:
        twin = self.twins[whose(self.repository, user)]
        answer = twin.recommend([user], options)
        assert not twin.release.live.fault
        items = [item for item in answer["item_ids"][0].tolist() if item]
        return Answer(
            answer["release"].item().decode(),
            answer["sequence"].item(),
            items,
            is_sure(answer["degraded"].item()),
        )


class Triton:
    """Keeps a real server."""

    def __init__(self, repository: Path, redis: str, fused: bool) -> None:
        self.repository = repository
        self.options = ServeOptions(port=0, metrics_port=None, fused=fused, redis=redis)
        self.stack = contextlib.ExitStack()
        self.server: Server | None = None

    def open(self) -> None:
        if self.server is None:
            self.server = self.stack.enter_context(serve(self.repository, self.options))
            self.client = self.stack.enter_context(Client(self.server.url))
        until(self._follows_the_route)

    def restart(self) -> None:
        """Kills tritonserver; the supervisor starts another."""
        assert self.server is not None
        os.kill(self.server.pid, signal.SIGKILL)
        until(self._follows_the_route)

    def close(self) -> None:
        self.stack.close()
        self.server = None

    def ask(self, user: bytes, options: dict[str, Any]) -> Answer:
        answer = self.client.recommend(user.decode(), **options)
        items = [item.encode() for item in answer.item_ids]
        return Answer(answer.release, answer.sequence, items, is_sure(answer.degraded))

    def _follows_the_route(self) -> bool:
        with contextlib.suppress(CallError):
            return all(self.ask(user, {}).release == whose(self.repository, user) for user in USERS)
        return False


def is_sure(degraded: int) -> bool:
    """Says whether Redis answered for every row of an answer."""
    return not degraded & (Degraded.FEATURES_STALE | Degraded.FEATURES_MISSING)


def the_route(repository: Path) -> Route:
    """Gives the route; there is always one."""
    route = route_in(repository, repository)
    assert route is not None
    return route


def whose(repository: Path, user: bytes) -> str:
    """Names the release that answers a user."""
    route = the_route(repository)
    return route.releases[int(route.places([user])[0])]


def until(holds: Callable[[], bool], otherwise: Callable[[], object] = lambda: "it does not come") -> None:
    """Waits until it holds; AssertionError, with what `otherwise` says, where it does not come."""
    end = time.monotonic() + WAIT_S
    while not holds():
        assert time.monotonic() < end, otherwise()
        time.sleep(0.01)
