"""Redis killed, frozen, full, slow, lying: no request fails, nobody gets another's row, what was degraded is
flagged, and it comes back."""

from __future__ import annotations

import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from random_release import make_release
from reading import assert_own_items, assert_own_rows, read_users, status, wait_until

from ensemble.contract import Degraded
from ensemble.options import default_options
from ensemble.steps.features import FeatureLookup
from ensemble.tiers import redis_tier
from ensemble.tiers.connection import Caller
from ensemble.tiers.load import load_release
from ensemble.tiers.records import item_identities, keys_from_identities, prefix, user_identities

pytestmark = [pytest.mark.redis, pytest.mark.timeout(60)]
STALE, MISSING = int(Degraded.FEATURES_STALE), int(Degraded.FEATURES_MISSING)
USERS = [f"u{u:05}" for u in range(40)]


def user_key(readers, user: str) -> bytes:
    return keys_from_identities(
        prefix(readers.redis.tracker.version, "users"), user_identities(np.array([user.encode()]))
    )[0]


def item_key(readers, row: int) -> bytes:
    return keys_from_identities(
        prefix(readers.redis.tracker.version, "items"), item_identities(np.array([row]))
    )[0]


class Traffic:
    """Asks for random users in a thread of its own, checks every row, and keeps what was flagged and how long
    it took."""

    def __init__(self, readers, release, pause_s: float = 0.005) -> None:
        self.readers, self.release, self.pause_s = readers, release, pause_s
        self.failed, self.degraded, self.wall_ms, self.at = [], [], [], []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        rng = np.random.default_rng(0)
        while not self._stop.is_set():
            users = [USERS[u] for u in rng.integers(0, 40, 3)]
            started = time.perf_counter()
            try:
                found = read_users(self.readers, self.release, users)
                self.degraded.append(any(status(found)))
                assert_own_rows(found, self.release, users)
            except Exception as error:
                self.failed.append(repr(error))
            self.wall_ms.append((time.perf_counter() - started) * 1e3)
            self.at.append(time.monotonic())
            time.sleep(self.pause_s)

    def __enter__(self):
        return self

    def __exit__(self, *why) -> None:
        self._stop.set()
        self._thread.join()

    def tell(self, fault: str, first: int, last: int, recovery_s: float) -> None:
        """For who runs with -s: what the fault did to the reads between `first` and `last`."""
        wall, bad = self.wall_ms[first:last], sum(self.degraded[first:last])
        print(
            f"\n{fault}: {len(wall)} reads, failed {len(self.failed)}, degraded {bad}, wall p50 "
            f"{np.quantile(wall, 0.5):.2f} ms, "
            f"p99 {np.quantile(wall, 0.99):.2f} ms (before {np.quantile(self.wall_ms[:first], 0.99):.2f}), "
            f"back after {recovery_s:.3f} s"
        )

    def clean_after(self, moment: float) -> float | None:
        """Seconds from `moment` until the last degraded answer; None while the newest is one."""
        if not self.degraded or self.degraded[-1] or self.at[-1] < moment + 0.2:
            return None
        return max(
            [at - moment for at, bad in zip(self.at, self.degraded, strict=False) if bad and at > moment],
            default=0.0,
        )


def test_every_tier_in_turn(server, release, open_readers):
    readers = open_readers(server)
    rows = np.array([[1, 2, -1], [3, 3, 120]])
    for _ in range(2):
        found = read_users(readers, release, [*USERS[:5], "nobody"])
        assert_own_rows(found, release, [*USERS[:5], "nobody"])
        assert found.known.tolist() == [True] * 5 + [False]
        assert status(found) == [0] * 6
        assert_own_items(readers.items.read_items(rows), release, rows)
    assert readers.users.memory.counters.hits == 6
    assert readers.redis.latencies.total == 2, (
        "one round trip a table for all the misses of a batch, none for what is known"
    )
    assert (readers.redis.rows_asked, readers.redis.rows_found) == (6 + 4, 5 + 4)
    assert readers.users.memory.counters.negative_hits == 1, "that Redis has no such user is remembered, too"


@pytest.mark.alone
def test_redis_killed_and_back_empty_and_loaded_again(own_server, release, open_readers):
    readers = open_readers(own_server, soft_ttl_s=0.05, hard_ttl_s=0.1, negative_ttl_s=0.05)
    with Traffic(readers, release) as traffic:
        wait_until(lambda: len(traffic.wall_ms) > 20)
        assert not any(traffic.degraded)
        own_server.kill()
        killed = len(traffic.wall_ms)
        wait_until(lambda: len(traffic.degraded) > 20 and all(traffic.degraded[-10:]))
        before = len(traffic.wall_ms)
        wait_until(lambda: len(traffic.wall_ms) > before + 30)
        own_server.start()
        wait_until(lambda: readers.redis.tracker.connected)
        wait_until(lambda: all(traffic.degraded[-5:]), 2)
        load_release(release, own_server.url)
        loaded, last = time.monotonic(), len(traffic.wall_ms)
        wait_until(lambda: traffic.clean_after(loaded) is not None)
        traffic.tell("kill -9, back empty, loaded", killed, last, traffic.clean_after(loaded))
        assert traffic.clean_after(loaded) < 2
    assert traffic.failed == []
    assert sum(traffic.degraded) >= 30
    assert readers.redis.causes["not_loaded"] > 0


def test_a_redis_that_is_back_is_asked_at_once_though_the_breaker_was_to_stay_open(
    own_server, release, open_readers
):
    """The tracker finds it first: without that word rows would stay degraded for as long as the breaker is
    open."""
    readers = open_readers(own_server, breaker_open_s=3600)
    own_server.kill()
    for _ in range(4):
        assert status(read_users(readers, release, USERS[:1])) == [STALE]
    assert readers.redis.breaker.state == "open"
    own_server.start()
    load_release(release, own_server.url)
    loaded = own_server.client().hget("feat:shop:random", release.name)
    wait_until(lambda: readers.redis.tracker.version == loaded and readers.redis.breaker.state == "half_open")
    assert status(read_users(readers, release, USERS)) == [0] * 40
    assert readers.redis.breaker.state == "closed"


@pytest.mark.alone
def test_redis_frozen(own_server, release, open_readers):
    """Requests wait for the deadline until the breaker opens, then for one probe now and then."""
    readers = open_readers(own_server, deadline_ms=5, soft_ttl_s=0.05, hard_ttl_s=0.1)
    with Traffic(readers, release) as traffic:
        wait_until(lambda: len(traffic.wall_ms) > 20)
        own_server.signal(signal.SIGSTOP)
        frozen = len(traffic.wall_ms)
        time.sleep(2)
        thawed = len(traffic.wall_ms)
        own_server.signal(signal.SIGCONT)
        moment = time.monotonic()
        wait_until(lambda: traffic.clean_after(moment) is not None)
        recovery_s = traffic.clean_after(moment)
    traffic.tell("SIGSTOP 2 s", frozen, thawed, recovery_s)
    assert traffic.failed == []
    during = np.array(traffic.wall_ms[frozen:thawed])
    assert len(during) > 100
    assert sum(traffic.degraded[frozen:thawed]) > 0.8 * len(during)
    assert np.quantile(during, 0.5) < 4, "most requests must not wait for a Redis that does not answer"
    assert recovery_s < 2, "bar 0.5 s on a quiet machine: a breaker's 0.25 s and a call"
    assert readers.redis.breaker.opened >= 1
    assert readers.redis.breaker.state == "closed"


def test_a_connection_that_ended_between_two_calls_costs_nobody_anything(own_server, release, open_readers):
    readers = open_readers(own_server)
    for user in USERS[:4]:
        assert status(read_users(readers, release, [user])) == [0]
        for one in own_server.client().client_list(_type="normal"):
            if one["cmd"] == "mget":
                own_server.client().client_kill_filter(_id=one["id"])
        time.sleep(0.05)
    assert not readers.redis.causes


def test_rows_past_their_soft_ttl_serve_while_redis_is_away_and_none_past_the_hard_one(
    own_server, release, open_readers
):
    readers = open_readers(own_server, soft_ttl_s=0.1, hard_ttl_s=1.0, jitter=0)
    assert status(read_users(readers, release, USERS[:3])) == [0, 0, 0]
    own_server.kill()
    assert status(read_users(readers, release, USERS[:3])) == [0, 0, 0], "fresh rows are as good as ever"
    time.sleep(0.15)
    read_from_snapshot = readers.users.snapshot_rows
    found = read_users(readers, release, [*USERS[:3], "nobody"])
    assert status(found) == [STALE, STALE, STALE, MISSING]
    assert found.known.tolist() == [True, True, True, False]
    assert readers.users.snapshot_rows == read_from_snapshot + 1, "the three came from memory"
    time.sleep(1.0)
    assert status(read_users(readers, release, USERS[:3])) == [STALE] * 3
    assert readers.users.snapshot_rows == read_from_snapshot + 4, "now they come from the snapshot"


def test_a_call_that_fails_while_rows_are_still_believed_makes_nothing_stale(
    own_server, release, open_readers
):
    readers = open_readers(own_server, soft_ttl_s=4.0, jitter=0.0, breaker_failures=1000)
    first = readers.items.read_items(np.array([[1, 2, 3]]))
    assert not np.any(first.status)
    own_server.signal(signal.SIGSTOP)
    try:
        time.sleep(3.3)
        calls = readers.redis.latencies.total
        later = readers.items.read_items(np.array([[1, 2, 3]]))
        assert readers.redis.latencies.total > calls, "Redis was asked"
        assert not np.any(later.status)
        time.sleep(0.9)
        assert np.all(readers.items.read_items(np.array([[1, 2, 3]])).status)
    finally:
        own_server.signal(signal.SIGCONT)


def test_redis_absent_at_the_start(own_server, release, open_readers):
    own_server.kill()
    readers = open_readers(own_server, load=False)
    found = read_users(readers, release, [*USERS[:2], "nobody"])
    assert status(found) == [STALE, STALE, MISSING]
    assert_own_rows(found, release, [*USERS[:2], "nobody"])
    own_server.start()
    load_release(release, own_server.url)
    wait_until(lambda: status(read_users(readers, release, USERS[:2])) == [0, 0])


def test_full_redis_evicts_rows_and_the_snapshot_has_them(own_server, release, open_readers):
    readers = open_readers(own_server)
    client = own_server.client()
    client.config_set("maxmemory-policy", "volatile-lru")
    client.config_set("maxmemory", "1mb")  # less than an empty Redis takes: all that may go goes
    with pytest.raises(Exception, match="maxmemory"):
        client.set("filler", b"x" * 100_000)
    wait_until(lambda: client.dbsize() == 1, 5)
    assert client.type(b"feat:shop:random") == b"hash", "the pointers have no TTL, so they stay"
    readers.users.memory.flush()
    found = read_users(readers, release, USERS)
    assert_own_rows(found, release, USERS)
    assert status(found) == [0] * 40, "Redis answered: it has none, so the release's own row is the right one"


def test_a_value_of_another_type_or_size_or_schema_or_range_is_a_miss_and_counted(
    server, release, open_readers, tmp_path, rng
):
    readers = open_readers(server)
    client = server.client()
    older = readers.users.format.__class__("users", release.schema, 12345, 120)
    old_record = older.pack(user_identities(np.array([b"u00002"])), release.users[3:4], 0.0).tobytes()
    good = client.get(user_key(readers, USERS[4]))
    for user, value in enumerate([b"abc", b"x" * 4000, old_record, client.get(user_key(readers, USERS[9]))]):
        client.set(user_key(readers, USERS[user]), value)
    row = np.frombuffer(good, readers.users.format.record).copy()
    row["row"]["seen"][0, -1] = (
        1 << 24
    ) + 121  # no log can have added so many: another table's gather would fail
    client.set(user_key(readers, USERS[4]), row.tobytes())
    row["row"]["seen"][0, -1], row["row"]["features"][0, 0] = 1, np.nan
    row["identity"] = user_identities(np.array([b"u00005"]))
    client.set(user_key(readers, USERS[5]), row.tobytes())
    client.delete(user_key(readers, USERS[6]))
    client.rpush(user_key(readers, USERS[6]), 1)  # MGET tells it from nothing by nothing
    time.sleep(0.05)
    found = read_users(readers, release, USERS[:8])
    assert_own_rows(found, release, USERS[:8])
    assert status(found) == [STALE] * 6 + [0, 0]
    assert dict(readers.redis.causes) == {"malformed": 2, "wrong_schema": 1, "wrong_id": 1, "out_of_range": 2}
    assert status(read_users(readers, release, USERS[:1])) == [STALE], (
        "and asked for again: nothing of it is remembered"
    )


def test_a_release_loaded_under_the_same_name_with_other_items_is_not_believed(
    server, release, open_readers, tmp_path
):
    other = make_release(tmp_path / "other", np.random.default_rng(5))
    other.manifest["files"] = {"r1/items.npy": {"sha256": "other"}}
    other.verify_data = lambda *names: None
    load_release(other, server.url)
    readers = open_readers(server, load=False)
    found = read_users(readers, release, USERS)
    assert_own_rows(found, release, USERS)
    assert status(found) == [STALE] * 40
    assert readers.redis.causes["wrong_schema"] == 40


@pytest.mark.alone
@pytest.mark.parametrize("delay_ms", [15, 50, 500])
def test_slow_network_costs_the_deadline_until_the_breaker_opens(
    server, release, open_readers, proxy, delay_ms
):
    between = proxy(server)
    readers = open_readers(server, url=between.url, deadline_ms=5, soft_ttl_s=0.02, hard_ttl_s=0.04)
    wait_until(lambda: readers.redis.tracker.connected)
    with Traffic(readers, release) as traffic:
        wait_until(lambda: len(traffic.wall_ms) > 20)
        between.delay_s, first = delay_ms / 1000, len(traffic.wall_ms)
        time.sleep(1)
        between.delay_s = 0.0
        moment, last = time.monotonic(), len(traffic.wall_ms)
        wait_until(lambda: traffic.clean_after(moment) is not None, 15)
    traffic.tell(f"{delay_ms} ms slower", first, last, traffic.clean_after(moment))
    assert traffic.failed == []
    assert sum(traffic.degraded) > 10
    assert np.quantile(traffic.wall_ms, 0.5) < 5
    assert readers.redis.causes["timeout"] >= 3


@pytest.mark.alone
def test_a_reply_that_drips_in_takes_no_longer_than_the_deadline(server, release, open_readers, proxy):
    between = proxy(server)
    readers = open_readers(server, url=between.url, deadline_ms=20)
    wait_until(lambda: readers.redis.tracker.connected)
    between.drip = True  # 64 bytes every 10 ms: each read gets something in time, the whole takes 0.7 s
    started = time.perf_counter()
    found = read_users(readers, release, USERS)
    assert time.perf_counter() - started < 0.4
    assert_own_rows(found, release, USERS)
    assert status(found) == [STALE] * 40


def test_a_reply_cut_off_in_the_middle(server, release, open_readers, proxy):
    between = proxy(server)
    readers = open_readers(server, url=between.url)
    wait_until(lambda: readers.redis.tracker.connected)
    for cut in (1, 5, 40, 300):
        between.reset_after = cut
        found = read_users(readers, release, USERS[:10])
        assert_own_rows(found, release, USERS[:10])
        assert status(found) == [STALE] * 10
    between.reset_after = 0
    wait_until(lambda: status(read_users(readers, release, USERS[:10])) == [0] * 10)


def test_replies_that_slipped_by_one_never_give_another_users_row(server, release, open_readers, proxy):
    between = proxy(server)
    readers = open_readers(server, url=between.url)
    wait_until(lambda: readers.redis.tracker.connected)
    read_users(readers, release, ["u00039"])
    between.slip = True
    for user in USERS[:20]:
        found = read_users(readers, release, [user])
        assert_own_rows(found, release, [user])
    assert readers.redis.causes["wrong_id"] >= 5
    between.slip = False
    assert status(read_users(readers, release, USERS[20:30])) == [0] * 10


def test_a_stored_row_of_another_user_costs_no_connection(server, release, open_readers):
    readers, client = open_readers(server), server.client()
    readers.users.memory.flush()
    client.set(user_key(readers, USERS[0]), client.get(user_key(readers, USERS[1])))
    before = client.info("stats")["total_connections_received"]
    for _ in range(20):
        found = read_users(readers, release, USERS[:1])
        np.testing.assert_array_equal(found.field("seen"), release.users["seen"][1:2])
    assert readers.redis.causes["wrong_id"] == 20
    assert client.info("stats")["total_connections_received"] <= before + 1


def test_a_wrong_password_is_counted_and_harmless(own_server, release, open_readers):
    readers = open_readers(own_server, soft_ttl_s=0.01, hard_ttl_s=0.02)
    read_users(readers, release, USERS[:3])
    own_server.client().config_set("requirepass", "secret")
    own_server.client(password="secret").client_kill_filter(_type="normal")
    time.sleep(0.1)
    found = read_users(readers, release, USERS[:3])
    assert_own_rows(found, release, USERS[:3])
    assert status(found) == [STALE] * 3
    wait_until(lambda: read_users(readers, release, USERS[:3]) and readers.redis.causes["auth"] > 0)


def test_five_hundred_askers_of_one_expired_row_ask_redis_once(server, release, open_readers):
    readers = open_readers(server, soft_ttl_s=1.5, hard_ttl_s=60, jitter=0)
    for expect, wait_s in ((1, 0), (2, 1.6)):  # a row that was never there, then one past its soft TTL
        time.sleep(wait_s)
        start = threading.Barrier(100)

        def ask(_: int, start=start) -> list[list[int]]:
            start.wait()
            return [status(read_users(readers, release, ["u00007"])) for _ in range(5)]

        with ThreadPoolExecutor(100) as threads:
            answers = [answer for asker in threads.map(ask, range(100)) for answer in asker]
        assert len(answers) == 500
        assert all(answer in ([0], [STALE]) for answer in answers)
        assert readers.redis.rows_asked == expect


def test_a_lost_tracking_connection_empties_memory_when_it_is_back(server, release, open_readers):
    readers = open_readers(server)
    read_users(readers, release, USERS)
    connects = readers.redis.tracker.connects
    for one in server.client().client_list():
        if one["resp"] == "3":
            server.client().client_kill_filter(_id=one["id"])
    wait_until(lambda: readers.redis.tracker.connects > connects)
    assert readers.users.memory.bytes == 0


def test_load_again_switches_over_and_the_old_rows_expire(server, release, open_readers):
    readers = open_readers(server)
    before = readers.redis.tracker.version
    with Traffic(readers, release, 0.001) as traffic:
        done = load_release(release, server.url, keep_s=2)
        wait_until(lambda: readers.redis.tracker.version != before)
        time.sleep(0.2)
    assert traffic.failed == []
    assert not any(traffic.degraded)
    client = server.client()
    assert (done.previous, done.users, done.items) == (before.decode(), 40, 120)
    assert done.expiring == 40 + 120 + 120 + 1
    assert all(client.ttl(key) > 0 for key in client.scan_iter(b"feat:*") if client.type(key) == b"string")
    wait_until(lambda: not list(client.scan_iter(b"feat:%s:*" % before)), 8)
    assert len(list(client.scan_iter(b"feat:*"))) == 40 + 120 + 120 + 1 + 1


def test_the_steps_flag_what_is_stale(own_server, release, monkeypatch, tmp_path):
    from ensemble.tiers.settings import VARIABLE, TierSettings, write_settings

    write_settings(tmp_path / "tiers.json", TierSettings(own_server.url, deadline_ms=50))
    assert (tmp_path / "tiers.json").stat().st_mode & 0o777 == 0o600
    load_release(release, own_server.url)
    plain = FeatureLookup(release.model("features"), release)
    monkeypatch.setenv(VARIABLE, str(tmp_path / "tiers.json"))
    tiered = type(release)(release.repository, release.name, release.manifest)
    step = FeatureLookup(release.model("features"), tiered)
    ask = np.array([[user.encode()] for user in [*USERS, "nobody"]])
    wanted = plain.run(default_options(41), user_id=ask)
    out = step.run(default_options(41), user_id=ask)
    for name, tensor in wanted.items():
        np.testing.assert_array_equal(out[name], tensor, err_msg=name)
    own_server.kill()
    tiered.readers.users.memory.flush()
    out = step.run(default_options(41), user_id=ask)
    assert out["user_status"].ravel().tolist() == [STALE] * 40 + [MISSING | Degraded.UNKNOWN_USER]
    for name in set(wanted) - {"user_status"}:
        np.testing.assert_array_equal(out[name], wanted[name], err_msg=name)
    assert any(one.name == "peregrine_tier_stale" and one.value > 0 for one in tiered.metrics())
    tiered.readers.close()


def mgets(server) -> int:
    return server.client().info("commandstats").get("cmdstat_mget", {"calls": 0})["calls"]


def test_a_reply_that_comes_late_is_kept_for_the_next_request(server, release, open_readers, proxy):
    """Else a memory never warms whose batches take longer than the deadline."""
    between = proxy(server)
    readers = open_readers(server, url=between.url, deadline_ms=20)
    wait_until(lambda: readers.redis.tracker.connected)
    between.delay_s = 0.15
    asked = mgets(server)
    rows = np.arange(1, 121).reshape(2, 60)
    assert readers.items.read_items(rows).status_of_users().tolist() == [STALE, STALE]
    time.sleep(0.4)
    found = readers.items.read_items(rows)
    assert_own_items(found, release, rows)
    assert not np.any(found.status_of_users())
    assert mgets(server) == asked + 1, "nothing is asked twice"
    assert readers.redis.breaker.state == "closed"


def test_a_reply_that_comes_late_is_not_kept_if_its_row_changed_meanwhile(
    server, release, open_readers, proxy
):
    between = proxy(server)
    readers = open_readers(server, url=between.url, deadline_ms=20)
    wait_until(lambda: readers.redis.tracker.connected)
    between.delay_s = 0.2
    assert status(read_users(readers, release, USERS[:2])) == [STALE, STALE]
    key, before = user_key(readers, USERS[0]), readers.users.memory.counters.invalidations
    server.client().delete(key)
    wait_until(lambda: readers.users.memory.counters.invalidations > before)
    time.sleep(0.3)
    between.delay_s = 0.0
    asked = mgets(server)
    found = read_users(readers, release, USERS[:2])
    assert mgets(server) == asked + 1, "the row that changed is asked for again"
    assert status(found) == [0, 0]
    assert_own_rows(found, release, USERS[:2])


def test_what_has_come_is_read_though_we_are_late_ourselves(server, release, open_readers, monkeypatch):
    """A busy machine: the reply lay there while this process was not run."""
    readers = open_readers(server, deadline_ms=20)
    ask = Caller.ask

    def and_sleep(caller, questions) -> None:
        ask(caller, questions)
        time.sleep(0.2)

    monkeypatch.setattr(Caller, "ask", and_sleep)
    assert status(read_users(readers, release, USERS[:3])) == [0, 0, 0]
    assert not readers.redis.causes


def test_rows_in_memory_are_not_stale_while_redis_would_tell_of_a_change(
    server, release, open_readers, proxy
):
    between = proxy(server)
    readers = open_readers(server, url=between.url, deadline_ms=20, soft_ttl_s=0.2, hard_ttl_s=30)
    assert status(read_users(readers, release, USERS[:3])) == [0, 0, 0]
    between.delay_s = 0.5
    time.sleep(0.25)
    assert readers.redis.tracker.connected
    found = read_users(readers, release, USERS[:3])
    assert status(found) == [0, 0, 0]
    assert_own_rows(found, release, USERS[:3])
    assert readers.redis.causes["timeout"] == 1, "they were asked for again all the same"


def test_a_row_that_was_stored_wrongly_costs_the_rows_asked_with_it_nothing(
    server, release, open_readers, monkeypatch
):
    """A large batch goes in pieces: what is wrong in the first ends no connection that the others need."""
    monkeypatch.setattr(redis_tier, "_PIECE", 16)
    readers = open_readers(server)
    one, other = (item_key(readers, row) for row in (3, 4))
    server.client().set(one, server.client().get(other))
    connections = server.client().info("stats")["total_connections_received"]
    rows = np.arange(1, 121)[None]
    found = readers.items.read_items(rows)
    assert_own_items(found, release, rows)
    assert np.flatnonzero(found.status[0]).tolist() == [2], "only the row itself is not known"
    assert dict(readers.redis.causes) == {"wrong_id": 1}
    assert server.client().info("stats")["total_connections_received"] <= connections + 2
