"""`peregrine serve --redis` on a real tritonserver: events count at the next request, Redis may go, and its
password is nowhere to be read."""

from __future__ import annotations

import time
import urllib.request
from functools import partial
from pathlib import Path

import pytest
from ports import free_port
from reading import wait_until
from redis_server import RedisServer
from shops import private_copy

from clients.client import Client
from clients.event_checks import Event
from clients.events import EventWriter
from clients.operations.releases import activate
from ensemble.contract import Degraded
from ensemble.server import process as server_process
from ensemble.server.options import ServeOptions
from ensemble.server.supervisor import serve
from ensemble.tiers.load import load_release
from ensemble.tiers.settings import TierSettings

pytestmark = [pytest.mark.redis, pytest.mark.triton, pytest.mark.timeout(300)]
SECRET = "canary-7f3a"


def said_by(process: str) -> bytes:
    folder = Path("/proc") / process
    return (folder / "cmdline").read_bytes() + (folder / "environ").read_bytes()


def seconds_unaware(client: Client, user: str, item: str) -> float:
    """From now until the beginning of the last request that still recommends `item`; 0: the very next one
    knows that the user has it.

    Beginnings are compared because a request that takes long, on a machine that is busy, may have read the
    row before it changed.
    """
    unaware_s, started = 0.0, time.monotonic()
    while True:
        asked_s = time.monotonic() - started
        if item not in client.recommend(user, top_k=3).item_ids:
            return unaware_s
        unaware_s = asked_s
        assert unaware_s < 5


@pytest.mark.alone
@pytest.mark.parametrize("fused", [False, True], ids=["ensemble", "fused"])
def test_events_count_at_once_and_redis_may_go(
    tiny_repository, tiny_release, tmp_path, fused, monkeypatch, capfd
):
    # What is asked here is whether rows are known at all, so a call to Redis has time where the machine is
    # busy; as in conftest.py.
    monkeypatch.setattr(server_process.tiers, "TierSettings", partial(TierSettings, deadline_ms=250))
    repository = private_copy(tiny_repository, tmp_path / "repository")
    redis = RedisServer(tmp_path, "--requirepass", SECRET)
    url = f"redis://:{SECRET}@127.0.0.1:{redis.port}"
    shop, users = (
        tiny_release.schema.shop,
        [user.decode() for user in tiny_release.user_ids.sorted_ids[:20].tolist()],
    )
    load_release(tiny_release, url)
    try:
        with (
            serve(repository, ServeOptions(0, free_port(), fused=fused, redis=url)) as server,
            Client(server.url) as client,
            EventWriter(url, shop) as events,
        ):
            waits = []
            for n, user in enumerate(users):
                first = [client.recommend(user, top_k=3) for _ in range(4)][
                    -1
                ]  # in the memory of every instance by now, mostly
                assert first.degraded == 0
                events.record_events(
                    [Event(user, first.item_ids[0], tiny_release.schema.events[0], time.time() + n)]
                )
                waits.append(seconds_unaware(client, user, first.item_ids[0]))
            assert sorted(waits)[len(waits) * 3 // 4] < 0.1, "a request that begins 100 ms later knows of it"
            for process in (str(server.pid), *(str(pid) for pids in server.stubs().values() for pid in pids)):
                assert SECRET.encode() not in said_by(process)
            time.sleep(1.1)
            client.recommend(users[0])
            text = urllib.request.urlopen(server.metrics_url).read().decode()
            for name, label in (
                ("hits", "memory"),
                ("hits", "redis"),
                ("misses", "memory"),
                ("latency_us_bucket", "redis"),
                ("breaker_closed", "redis"),
            ):
                found = [
                    line
                    for line in text.splitlines()
                    if line.startswith(f"peregrine_tier_{name}{{") and f'tier="{label}"' in line
                ]
                assert any(float(line.split()[-1]) > 0 for line in found), (name, label, found)
            of_items = [
                line
                for line in text.splitlines()
                if line.startswith("peregrine_tier_hits{") and 'table="items",tier="memory"' in line
            ]
            readers = [model for model in server.stubs() if fused or model in ("r1_features", "r1_recall")]
            assert len(of_items) == sum(len(server.stubs()[model]) for model in readers), of_items
            assert not any("step=" in line for line in of_items), "all steps of a process count together"
            assert all(f"\n{name}{{" in text for name in ("peregrine_live_sequence", "peregrine_recall_at_n"))
            redis.kill()
            others = [user.decode() for user in tiny_release.user_ids.sorted_ids[100:160].tolist()]
            answers = [client.recommend(user) for user in others]
            assert all(Degraded.FEATURES_STALE in answer.degraded and answer.items for answer in answers)
            redis.start()
            assert activate(repository, "r1").served
            said = capfd.readouterr().err
            assert f"warning: Redis at redis://127.0.0.1:{redis.port} has no rows for release r1: " in said
            assert f"features load --redis @FILE -r {repository.resolve()} --release r1" in said
            load_release(tiny_release, url)
            activate(repository, "r1")
            assert "warning" not in capfd.readouterr().err
            wait_until(lambda: all(client.recommend(user).degraded == 0 for user in others), 20)
    finally:
        redis.stop()
