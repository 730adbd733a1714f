"""Releases of random numbers, and Redis servers of a test's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from random_release import RandomRelease, make_release
from redis_server import Proxy, RedisServer

from ensemble.tiers.load import load_release
from ensemble.tiers.reader import RowReaders
from ensemble.tiers.settings import TierSettings

Open = Callable[..., RowReaders]


@pytest.fixture
def release(tmp_path, rng) -> RandomRelease:
    return make_release(tmp_path / "repository", rng)


@pytest.fixture(scope="module")
def module_server(tmp_path_factory) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    yield server
    server.stop()


@pytest.fixture
def server(module_server) -> RedisServer:
    """The module's redis-server, empty."""
    module_server.client().flushall()
    return module_server


@pytest.fixture
def own_server(tmp_path) -> Iterator[RedisServer]:
    """A redis-server to be killed and frozen."""
    server = RedisServer(tmp_path)
    yield server
    server.stop()


@pytest.fixture
def proxy() -> Iterator[Callable[[RedisServer], Proxy]]:
    opened = []

    def start(server: RedisServer) -> Proxy:
        opened.append(Proxy(server.port))
        return opened[-1]

    yield start
    for one in opened:
        one.close()


@pytest.fixture
def open_readers(release) -> Iterator[Open]:
    """Readers of the release, loaded into the server first unless told otherwise; the deadline is wide where
    the machine is busy."""
    opened = []

    def start(server: RedisServer, *, url: str | None = None, load: bool = True, **settings) -> RowReaders:
        if load:
            load_release(release, server.url)
        opened.append(
            RowReaders(release, TierSettings(url or server.url, **{"deadline_ms": 250, **settings}))
        )
        return opened[-1]

    yield start
    for one in opened:
        one.close()
