"""Events into rows: right whatever order they come in, once however often, and seen by the next request."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import random
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from random_release import make_release, schema_of
from reading import read_users, status, wait_until
from shops import ROOT

from clients.event_checks import Event, ItemUpdate
from clients.events import EventWriter, Outcome
from ensemble.errors import InvalidArgument, ServerError
from ensemble.tiers.load import load_release
from ensemble.tiers.reader import RowReaders
from ensemble.tiers.records import item_identities, keys_from_identities, prefix, user_identities
from ensemble.tiers.settings import TierSettings

pytestmark = [pytest.mark.redis, pytest.mark.timeout(120)]


def past(readers, release, user: str) -> list[int]:
    """The user's items as the readers have them."""
    row = read_users(readers, release, [user]).field("seen")[0]
    return row[row > 0].tolist()


def item(row: int) -> str:
    return f"i{row - 1:05}"


def loaded(release, user: int) -> list[int]:
    row = release.users["seen"][user + 1]
    return row[row > 0].tolist()


def with_events(old: list[int], events: list[tuple[int, float]], width: int = 12) -> list[int]:
    """Brute force: as loaded (each item once, the last time), then every event's item at its latest time."""
    latest = {row: max(time for other, time in events if other == row) for row, _ in events}
    stay = [row for place, row in enumerate(old) if row not in latest and row not in old[place + 1 :]]
    return (stay + [row for _, row in sorted((time, row) for row, time in latest.items())])[-width:]


@pytest.fixture
def writer(server, release, open_readers):
    load_release(release, server.url)
    with EventWriter(server.url, "random") as opened:
        yield opened


@pytest.mark.alone
def test_the_next_read_sees_an_event_though_memory_held_the_row(server, release, open_readers, writer):
    readers = open_readers(server, load=False)
    waits = []
    for n in range(40):
        before = past(readers, release, "u00003")
        assert before == past(readers, release, "u00003")
        row = 1 + n
        writer.record_event("u00003", item(row), "click", 1000.0 + n)
        started = time.monotonic()
        wait_until(lambda row=row: past(readers, release, "u00003")[-1] == row)
        waits.append(time.monotonic() - started)
    assert np.quantile(waits, 0.9) < 0.1, "within 100 ms"
    assert readers.users.memory.counters.hits >= 40
    assert past(readers, release, "u00003") == list(range(29, 41))


def test_late_and_repeated_events_of_many_writers_end_where_brute_force_does(
    server, release, open_readers, writer
):
    events = [
        Event(f"u{u:05}", item(r), "buy", float(t))
        for u, r, t in np.random.default_rng(3).integers(1, [6, 30, 50], (300, 3)).tolist()
    ]
    wanted = {
        u: with_events(
            loaded(release, u), [(int(e.item_id[1:]) + 1, e.time) for e in events if e.user_id == f"u{u:05}"]
        )
        for u in range(1, 6)
    }
    mixed = events + events[:100]
    random.Random(0).shuffle(mixed)

    def work(mine: list[Event]) -> None:
        with EventWriter(server.url, "random") as own:
            for at in range(0, len(mine), 7):
                own.record_events(mine[at : at + 7])

    threads = [threading.Thread(target=work, args=(mixed[n::4],)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    readers = open_readers(server, load=False)
    for user, rows in wanted.items():
        assert past(readers, release, f"u{user:05}") == rows
    again = writer.record_events(mixed)
    assert (again.changed, again.unchanged) == (0, 5), "the same events a second time change nothing"


def test_a_new_user_has_a_past_and_is_known(server, release, open_readers, writer):
    readers = open_readers(server, load=False)
    assert read_users(readers, release, ["new"]).known.tolist() == [False]
    writer.record_events([Event("new", item(7), "click", 2.0), Event("new", item(5), "click", 1.0)])
    wait_until(lambda: past(readers, release, "new") == [5, 7], 1)
    found = read_users(readers, release, ["new"])
    assert found.known.tolist() == [True]
    assert status(found) == [0]
    assert not found.field("features").any()


def test_a_user_whose_row_was_evicted_keeps_the_releases_past(server, release, open_readers, writer):
    readers = open_readers(server, load=False)
    key = keys_from_identities(
        prefix(readers.redis.tracker.version, "users"), user_identities(np.array([b"u00004"]))
    )[0]
    server.client().delete(key)
    writer.record_event("u00004", item(9), "click", 5.0)
    writer.record_event("u00004", item(8), "click", 4.0)
    wait_until(
        lambda: past(readers, release, "u00004") == with_events(loaded(release, 4), [(9, 5.0), (8, 4.0)]), 1
    )
    np.testing.assert_array_equal(
        read_users(readers, release, ["u00004"]).field("features")[0], release.users["features"][5]
    )


def test_every_loaded_release_of_the_shop_gets_the_event(server, release, open_readers, writer, tmp_path):
    other = make_release(tmp_path / "other", np.random.default_rng(9), num_items=60)
    other.name = "r2"
    other.path = tmp_path / "other" / "r1"
    load_release(other, server.url)
    assert writer.record_event("u00001", item(3), "click", 1.0) == Outcome(changed=2)
    assert writer.record_event("u00001", item(100), "click", 2.0) == Outcome(changed=1), (
        "only r1 has this item"
    )
    assert writer.record_event("u00001", "nothing", "click", 3.0) == Outcome(unknown_items=("nothing",))


def test_items_are_updated_and_late_updates_lose(server, release, open_readers, writer):
    readers = open_readers(server, load=False)
    rows = np.array([[4]])
    brand = release.schema.items.category("brand")
    readers.items.read_items(rows)
    first = ItemUpdate(item(4), 10.0, features=[1.0, 2.0, 3.0], codes={"brand": [brand.offset + 2]})
    assert writer.update_item(first) == Outcome(changed=1)
    wait_until(lambda: readers.items.read_items(rows).field("features")[0, 0].tolist() == [1, 2, 3], 1)
    assert readers.items.read_items(rows).field("codes")[0, 0, 0] == brand.offset + 2
    np.testing.assert_array_equal(
        readers.items.read_items(rows).field("embedding")[0, 0], release.items["embedding"][4]
    )
    assert writer.update_item(first) == Outcome(unchanged=1)
    assert writer.update_item(ItemUpdate(item(4), 9.0, features=[7, 7, 7])) == Outcome(unchanged=1)
    assert writer.update_item(ItemUpdate(item(4), 9.0, codes={"tags": [0, 0]})) == Outcome(changed=1), (
        "for each number its own latest time"
    )
    key = keys_from_identities(
        prefix(readers.redis.tracker.version, "items"), item_identities(np.array([5]))
    )[0]
    server.client().delete(key)
    assert writer.update_item(ItemUpdate(item(5), 1.0, features=[1, 1, 1])) == Outcome(unchanged=1), (
        "a lost row is not made up"
    )


@pytest.mark.parametrize(
    ("event", "text"),
    [
        (
            Event("u", "i", "click", float("nan")),
            "time: must be a finite number or an ISO 8601 time, got nan",
        ),
        (
            Event("u", "i", "click", True),
            "time: must be a finite number or an ISO 8601 time, got True",
        ),
        (
            Event("u", "i", "click", "20990101"),
            "time: '20990101' is in the future (2099-01-01); it would stay the newest for ever",
        ),
        (Event("u", "i", "", 1.0), "event: must be a name of 1 to 64 bytes, got ''"),
        (
            Event("", "i", "click", 1.0),
            "user_id: an id must not be empty",
        ),
        (Event("NULL", "i", "click", 1.0), "user_id: the id is missing, got 'NULL'"),
        (Event("u", "NA", "click", 1.0), "item_id: the id is missing, got 'NA'"),
        (Event("u", None, "click", 1.0), "item_id: an id must be a string or an integer, got None"),
        (Event(b"\xff", "i", "click", 1.0), "user_id: an id must be valid UTF-8, got b'\\xff'"),
        (
            Event("u", "i" * 129, "click", 1.0),
            "item_id: an id must have at most 128 bytes, got 129",
        ),
    ],
)
def test_bad_events_are_named_and_none_of_their_batch_is_written(writer, event, text):
    with pytest.raises(InvalidArgument) as caught:
        writer.record_events([Event("u00001", item(1), "click", 1e9), event])
    assert str(caught.value) == text
    assert writer.record_event("u00001", item(1), "click", 1e9).changed == 1


@pytest.mark.parametrize(
    ("update", "text"),
    [
        (ItemUpdate("i00001", 1.0), "update: give features, codes or values"),
        (ItemUpdate("i00001", 1.0, features=[1.0]), "features: must be a list of 3 numbers, got [1.0]"),
        (
            ItemUpdate("i00001", 1.0, features=[1.0, 2.0, float("nan")]),
            "features: must be finite float32 numbers, got [1.0, 2.0, nan]",
        ),
        (ItemUpdate("i00001", 1.0, codes={"colour": [1]}), "codes: items have no such feature 'colour'"),
        (ItemUpdate("i00001", 1.0, codes={"brand": [99]}), "brand: codes must be 0 or 1..7, got [99]"),
    ],
)
def test_bad_updates_are_named(writer, update, text):
    with pytest.raises(InvalidArgument) as caught:
        writer.update_item(update)
    assert str(caught.value) == text


def test_names_of_events_are_a_list_not_letters(server):
    with pytest.raises(InvalidArgument, match=r"^only: must be a list of names of events, got 'buy'$"):
        EventWriter(server.url, "random", only="buy")


def test_a_writer_survives_a_restart_of_redis(own_server, release):
    load_release(release, own_server.url)
    with EventWriter(own_server.url, "random") as writer:
        writer.record_event("u00001", item(1), "click", 1.0)
        own_server.kill()
        with pytest.raises(ServerError, match="nothing is lost by sending the same events again"):
            writer.record_event("u00001", item(2), "click", 2.0)
        own_server.start()
        load_release(release, own_server.url)
        assert writer.record_event("u00001", item(2), "click", 2.0).changed == 1


def test_a_shop_without_rows_and_a_server_that_is_not_there(server):
    with (
        EventWriter(server.url, "nowhere") as lost,
        pytest.raises(ServerError, match=r"no rows of shop 'nowhere'.*peregrine features load"),
    ):
        lost.record_event("u", "i", "click", 1.0)
    with pytest.raises(
        ServerError, match=r"^Redis at redis://127.0.0.1:1 does not answer: .*; start it, or correct --redis$"
    ):
        EventWriter("redis://me:secret@127.0.0.1:1", "random")


def tail(server, *arguments: str, text: str = "") -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "peregrine",
        "events",
        "tail",
        *arguments,
        "--redis",
        server.url,
        "--shop",
        "random",
    ]
    return subprocess.run(
        command, input=text, capture_output=True, text=True, cwd=ROOT, timeout=60, check=False
    )


def test_tail_reads_lines_names_bad_ones_and_goes_on(server, release, open_readers, tmp_path):
    readers = open_readers(server)
    good = [{"user_id": "u00002", "item_id": item(n), "event": "click", "time": 100 + n} for n in range(1, 6)]
    bad = [
        "{",
        "[]",
        json.dumps({**good[0], "time": "soon"}),
        json.dumps({"user_id": "u", "item_id": "i"}),
        '{"item_id": "i", "time": 1, "codes": 3}',
    ]
    update = json.dumps({"item_id": item(9), "time": "2026-01-02T03:04:05Z", "features": [4, 5, 6]})
    lines = [
        json.dumps(good[0]),
        *bad,
        "",
        *[json.dumps(g) for g in good[1:]],
        update,
        json.dumps({**good[0], "item_id": "nothing"}),
    ]
    (tmp_path / "events.jsonl").write_text("\n".join(lines))  # no newline at the end
    done = tail(server, str(tmp_path / "events.jsonl"), "--json")
    assert done.returncode == 2
    assert json.loads(done.stdout) == {
        "lines": 13,
        "changed": 2,
        "unchanged": 0,
        "unknown": 1,
        "bad": 5,
        "left_out": [],
    }
    assert done.stderr.splitlines() == [
        "line 2: not JSON; skipped",
        "line 3: must be a JSON object; skipped",
        "line 4: time: must be a number or an ISO 8601 time, got 'soon'; skipped",
        "line 5: event: missing; skipped",
        "line 6: codes: must be a JSON object; skipped",
        "item 'nothing' is in no loaded release; its events are skipped",
    ]
    assert past(readers, release, "u00002")[-5:] == [1, 2, 3, 4, 5]
    assert readers.items.read_items(np.array([[9]])).field("features")[0, 0].tolist() == [4, 5, 6]
    again = tail(server, "-", "--json", text="\n".join(json.dumps(g) for g in good))
    assert again.returncode == 0
    assert json.loads(again.stdout) == {
        "lines": 5,
        "changed": 0,
        "unchanged": 1,
        "unknown": 0,
        "bad": 0,
        "left_out": [],
    }


def test_tail_writes_what_a_pipe_has_brought_before_it_waits_for_more(server, release, open_readers):
    readers = open_readers(server)
    command = [
        sys.executable,
        "-m",
        "peregrine",
        "events",
        "tail",
        "-",
        "--redis",
        server.url,
        "--shop",
        "random",
    ]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, text=True
    ) as process:
        process.stdin.write(
            json.dumps({"user_id": "u00002", "item_id": item(11), "event": "click", "time": 1}) + "\n"
        )
        process.stdin.flush()
        wait_until(lambda: past(readers, release, "u00002")[-1] == 11, 20)
        assert process.poll() is None
        process.stdin.close()
        assert process.wait() == 0


def test_tail_says_what_is_wrong_with_its_own_options(server, tmp_path):
    missing = tail(server, str(tmp_path / "nothing.jsonl"))
    assert (missing.returncode, missing.stderr) == (
        2,
        f"error: {tmp_path / 'nothing.jsonl'}: No such file or directory\n",
    )
    (tmp_path / "url").write_text("http://somewhere\n")
    command = [
        sys.executable,
        "-m",
        "peregrine",
        "events",
        "tail",
        "-",
        "--redis",
        f"@{tmp_path / 'url'}",
        "--shop",
        "random",
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (
        2,
        "error: --redis: 'http://somewhere' is not a Redis URL; write redis://[USER:PASSWORD@]HOST:PORT[/DB]\n",
    )


def test_times_of_any_unit_are_one_clock(server, release, open_readers, writer):
    readers = open_readers(server)
    second = 1_700_000_000
    ways = [
        second * 1000,
        "2023-11-14T22:13:21Z",
        second + 2,
        str((second + 3) * 10**6),
        (second + 4) * 10**9,
        "2023-11-14 22:13:25 UTC",
    ]
    writer.record_events([Event("u00009", item(1 + n), "click", at) for n, at in enumerate(ways)])
    assert past(readers, release, "u00009")[-6:] == [1, 2, 3, 4, 5, 6]


def test_ids_are_mended_as_those_of_files_are(server, release, open_readers, writer):
    readers = open_readers(server)
    assert writer.record_event(" u00010", f"{item(1)} ", "click", 1_700_000_000).changed == 1
    assert past(readers, release, "u00010")[-1:] == [1]


def test_events_that_no_past_is_of_are_left_out_and_named(own_server, tmp_path):
    """As the shop's history says; who wants them names them."""
    schema = dataclasses.replace(schema_of(), events=("buy", "cart"))
    release = make_release(tmp_path / "r", np.random.default_rng(0), schema=schema)
    load_release(release, own_server.url)
    events = [Event("u00001", item(1), name, 1.0 + at) for at, name in enumerate(("view", "buy", "bye"))]
    with EventWriter(own_server.url, "random") as writer:
        assert writer.record_events(events) == Outcome(changed=1, left_out=("view", "bye"))
    with EventWriter(own_server.url, "random", only=["view"]) as writer:
        assert writer.record_events(events).left_out == ()
    with EventWriter(own_server.url, "random", only="all") as writer:
        assert writer.record_events(events).left_out == ()


@pytest.mark.parametrize(("second", "left_out"), [("ctr", ()), ("view", ("rate",))])
def test_a_shop_without_event_names_takes_any_and_tells_its_tasks_apart(
    own_server, tmp_path, second, left_out
):
    """A past of all that was rated is of `event` and of what a row tells: whatever else comes is an event."""
    schema = dataclasses.replace(schema_of(), events=("event", second))
    release = make_release(tmp_path / "r", np.random.default_rng(0), schema=schema)
    load_release(release, own_server.url)
    events = [
        Event("u00001", item(1 + at), name, 1_790_000_000.0 + at) for at, name in enumerate(("rate", second))
    ]
    with EventWriter(own_server.url, "random") as writer:
        assert writer.record_events(events) == Outcome(changed=1, left_out=left_out)
    with contextlib.closing(RowReaders(release, TierSettings(own_server.url, deadline_ms=250))) as readers:
        row = read_users(readers, release, ["u00001"])
    times, kinds = row.field("seen_times")[0], row.field("seen_kinds")[0]
    wanted = [2] if left_out else [1, 2]
    assert kinds[np.isin(times, [event.time for event in events])].tolist() == wanted


def test_a_follower_outlives_its_server_and_a_rotation_and_goes_on_where_it_was(tmp_path, own_server):
    release = make_release(tmp_path / "r", np.random.default_rng(0))
    load_release(release, own_server.url)
    file = tmp_path / "events.jsonl"

    def log(*rows: int) -> None:
        with file.open("a") as out:
            for row in rows:
                out.write(
                    json.dumps({"user_id": "u00001", "item_id": item(row), "event": "x", "time": row}) + "\n"
                )

    def follow() -> subprocess.Popen:
        command = [sys.executable, "-m", "peregrine", "events", "tail", str(file), "--follow", "--json"]
        command += ["--redis", own_server.url, "--shop", "random"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(command, cwd=ROOT, text=True, **pipes)

    def dealt_with() -> int:
        state = json.loads((tmp_path / "events.jsonl.offset").read_text())
        return state["offset"] if state["inode"] == file.stat().st_ino else -1

    def ended(process: subprocess.Popen, by: signal.Signals = signal.SIGINT) -> tuple[dict, str]:
        process.send_signal(by)
        out, said = process.communicate(timeout=30)
        assert process.returncode == 0
        return json.loads(out), said

    log(1, 2)
    with follow() as process:
        wait_until(
            lambda: (tmp_path / "events.jsonl.offset").exists() and dealt_with() == file.stat().st_size, 30
        )
        own_server.stop()
        log(3)
        assert "trying again" in process.stderr.readline()
        own_server.start()
        load_release(release, own_server.url)
        wait_until(lambda: dealt_with() == file.stat().st_size, 60)
        log(4)
        file.rename(tmp_path / "events.jsonl.1")
        log(5)
        wait_until(lambda: dealt_with() == file.stat().st_size, 30)
        counts, _ = ended(process)
    assert counts["lines"] == 5
    log(6)
    file.rename(tmp_path / "events.jsonl.1")
    log(7)
    with follow() as process:
        wait_until(lambda: dealt_with() == file.stat().st_size, 30)
        counts, _ = ended(process, signal.SIGTERM)
    assert counts["lines"] == 2, "one of the file that was renamed meanwhile, one of the new"
