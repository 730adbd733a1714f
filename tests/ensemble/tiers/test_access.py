"""The two ACL users of ensemble/tiers/README.md may do what they must and no more; a cluster answers the same
calls."""

from __future__ import annotations

import subprocess

import numpy as np
import pytest
from ports import free_port
from reading import assert_own_items, assert_own_rows, read_users, status, wait_until
from redis_server import RedisServer
from shops import ROOT

from clients.events import EventWriter
from ensemble.tiers.load import load_release

pytestmark = [pytest.mark.redis, pytest.mark.timeout(60)]
USERS = [f"u{u:05}" for u in range(40)]
TIERS = ROOT / "ensemble" / "tiers" / "README.md"
COMMANDS = [line for line in TIERS.read_text("utf-8").splitlines() if line.startswith("ACL SETUSER")]


@pytest.fixture
def guarded(own_server):
    """A server with the README's two users and nobody else."""
    assert len(COMMANDS) == 2
    client = own_server.client()
    for command in (*COMMANDS, "ACL SETUSER default resetpass >nobody-knows"):
        client.execute_command(*command.split())
    return own_server


def test_each_user_can_do_its_work_and_nothing_else(guarded, release, open_readers):
    import redis

    reader, writer = (
        f"redis://peregrine-{name}:{word}@127.0.0.1:{guarded.port}"
        for name, word in (("reader", "READER-PASSWORD"), ("writer", "WRITER-PASSWORD"))
    )
    load_release(release, writer)
    load_release(release, writer)
    readers = open_readers(guarded, url=reader, load=False)
    found = read_users(readers, release, USERS)
    assert_own_rows(found, release, USERS)
    assert status(found) == [0] * 40
    with EventWriter(writer, "random") as events:
        events.record_event("u00001", "i00003", "click", 1.0)
        wait_until(lambda: read_users(readers, release, ["u00001"]).field("seen")[0, -1] == 4, 2)
    assert not readers.redis.causes
    plain = redis.Redis.from_url(reader)
    for command in (
        "SET feat:x 1",
        "GET other",
        "MGET other",
        "EVAL return 0",
        "KEYS *",
        "FLUSHALL",
        "SCAN 0",
        "DEL feat:x",
    ):
        with pytest.raises(redis.exceptions.NoPermissionError):
            plain.execute_command(*command.split())
    plain = redis.Redis.from_url(writer)
    for command in (
        "SET other 1",
        "GET other",
        "EVAL return 0",
        "FLUSHALL",
        "CONFIG GET *",
        "ACL LIST",
        "KEYS *",
    ):
        with pytest.raises(redis.exceptions.NoPermissionError):
            plain.execute_command(*command.split())


@pytest.fixture
def cluster(tmp_path):
    """Three real servers of one cluster, without replicas."""
    servers = []
    for n in range(3):
        (tmp_path / str(n)).mkdir()
        servers.append(
            RedisServer(tmp_path / str(n), "--cluster-enabled", "yes", "--cluster-port", str(free_port()))
        )
    addresses = [f"127.0.0.1:{server.port}" for server in servers]
    done = subprocess.run(
        ["redis-cli", "--cluster", "create", *addresses, "--cluster-yes"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for server in servers:
        wait_until(lambda server=server: server.client().cluster("info").get("cluster_state") == "ok", 20)
    yield servers
    for server in servers:
        server.stop()


def test_a_cluster_answers_invalidates_and_may_lose_a_server(cluster, release, open_readers):
    url = cluster[0].url.replace("redis://", "redis+cluster://")
    load_release(release, url)
    readers = open_readers(cluster[0], url=url, load=False, deadline_ms=200)
    wait_until(lambda: readers.redis.tracker.connected)
    rows = np.arange(1, 121).reshape(4, 30)
    found = read_users(readers, release, USERS)
    assert_own_rows(found, release, USERS)
    assert status(found) == [0] * 40
    assert_own_items(readers.items.read_items(rows), release, rows)
    with EventWriter(url, "random") as events:
        for user in USERS[:12]:  # on all three servers
            events.record_event(user, "i00003", "click", 1.0)
        wait_until(lambda: (read_users(readers, release, USERS[:12]).field("seen")[:, -1] == 4).all(), 3)
    for server in cluster:
        server.kill()
    readers.users.memory.flush()
    found = read_users(readers, release, USERS)
    assert_own_rows(found, release, USERS)
    assert all(status(found))
