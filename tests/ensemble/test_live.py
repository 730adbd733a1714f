"""Live items: what was added, changed and deleted is what brute force over the items as they are now finds; nothing is lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from random_release import BRANDS, RandomRelease, make_release, schema_of, write_item_encoder
from shops import ROOT

from clients.errors import InvalidArgument, Unavailable
from clients.items import ItemClient
from ensemble.errors import InvalidInput, ReleaseError
from ensemble.features import FeatureLookup
from ensemble.live.encoding import ItemEncoding
from ensemble.live.instances import InstanceFile, sequences
from ensemble.live.items import LiveItems
from ensemble.live.log import HEADER_BYTES, record_dtype
from ensemble.live.merging import merge
from ensemble.live.service import ItemService
from ensemble.live.writer import ItemWriter
from ensemble.options import parse_options
from ensemble.recall import Recall
from ensemble.reranking import Reranking

KINDS = ["Flat", "IVF8,Flat", "IVF8,PQ8x4fs"]


def open_again(release: RandomRelease) -> RandomRelease:
    """The same release, as another process sees it."""
    return RandomRelease(release.repository, release.name, {})


def recall_of(release: RandomRelease, index: str = "Flat") -> Recall:
    if "PQ" in index:
        settings = json.loads((release.path / "recall.json").read_text())
        (release.path / "recall.json").write_text(json.dumps({**settings, "nprobe": 8, "refine_factor": 16}))
    return Recall(release.model("recall"), release)


def random_changes(rng: np.random.Generator, release: RandomRelease, count: int) -> list[dict]:
    """Upserts and deletes of old and new items, each id once."""
    ids = [f"i{i:05}" for i in rng.choice(120, count // 2, replace=False)] + [
        f"new{i:03}" for i in rng.choice(100, count - count // 2, replace=False)
    ]
    view, changes = release.live.refresh(), []
    for item_id in ids:
        row = int(view.rows_from_ids(np.array([item_id.encode()]))[0])
        there = row > 0 and not bool(view.is_deleted(np.array([row]))[0])
        if there and rng.random() < 0.3:
            changes.append({"op": "delete", "item": {"item_id": item_id}})
            continue
        features = {"brand": str(rng.choice(BRANDS)), "tags": "tag1|tag2", "price": float(rng.uniform(1, 100))}
        changes.append({"op": "upsert", "item": {"item_id": item_id, **features, "item_embedding": rng.standard_normal(8).tolist()}})
    return changes


class Mirror:
    """The items as plain dictionaries: the truth."""

    def __init__(self, release: RandomRelease) -> None:
        numbers, names = np.load(release.path / "numbers.npy"), release.item_ids.sorted_ids
        self.items = {names[row - 1]: (np.array(release.items["embedding"][row]), self._brand(release, row), numbers[row, 0])
                      for row in range(1, len(release.items))}  # fmt: skip

    @staticmethod
    def _brand(release: RandomRelease, row: int) -> str:
        code = int(release.items["codes"][row, 0])
        return BRANDS[code - 2] if code >= 2 else ""

    def apply(self, changes: list[dict]) -> None:
        for change in changes:
            name, item = change["item"]["item_id"].encode(), change["item"]
            if change["op"] == "delete":
                del self.items[name]
            else:
                self.items[name] = (np.array(item["item_embedding"], np.float32), item["brand"], np.float32(item["price"]))

    def best(self, query: np.ndarray, depth: int, brands: list[str] | None = None, price: tuple[float, float] | None = None) -> list[bytes]:
        passing = {name: e @ query for name, (e, brand, cost) in self.items.items()
                   if (brands is None or brand in brands) and (price is None or price[0] <= cost <= price[1])}  # fmt: skip
        return sorted(passing, key=lambda name: -passing[name])[:depth]


ASKED = [{}, {"brands": ["brand1", "brand2"]}, {"price": (20.0, 60.0)}, {"brands": ["brand3"], "price": (0.0, 50.0)}, {"brands": []}]


def found_names(recall: Recall, query: np.ndarray, depth: int, asked: dict) -> list[bytes]:
    parameters = {}
    if "brands" in asked:
        parameters["allow"] = json.dumps({"brand": asked["brands"]})
    if "price" in asked:
        parameters["ranges"] = json.dumps({"price": asked["price"]})
    wanted = parse_options(json.dumps(parameters), 1, recall.live.release.schema).users[0].filter
    view = recall.live.refresh()
    mask = None if wanted is None else recall.filters.mask(wanted, view)
    rows = recall.index.find(view, query[None], depth, mask)[0][0]
    return view.ids_from_rows(rows[rows > 0]).tolist()


def hold_against(recall: Recall, mirror: Mirror, rng: np.random.Generator, exact: bool) -> None:
    shares = []
    for _ in range(8):
        query = rng.standard_normal(8).astype(np.float32)
        for asked in ASKED:
            best, found = mirror.best(query, 20, **asked), found_names(recall, query, 20, asked)
            assert len(found) == len(best) == len(set(found)), "as many as pass, each once"
            assert found == best or not exact
            shares.append(len(set(found) & set(best)) / max(1, len(best)) if best else 1.0)
    assert np.mean(shares) >= 0.95


@pytest.mark.parametrize("index", KINDS)
def test_what_is_found_is_what_is_there(tmp_path, rng, index):
    """Through changes, a merge, more changes and a restart; the reader is another one than the writer."""
    release = make_release(tmp_path, rng, index=index)
    write_item_encoder(release)
    writer, recall, mirror = ItemWriter(release), recall_of(open_again(release), index), Mirror(release)
    for turn in range(5):
        changes = random_changes(rng, release, 40)
        writer.apply(changes)
        mirror.apply(changes)
        hold_against(recall, mirror, rng, exact=index == "Flat")
        if turn == 2:
            merged = writer.sequence
            number = merge(open_again(release), merged)
            more = random_changes(rng, release, 20)  # while the merge runs
            writer.apply(more)
            mirror.apply(more)
            writer.turn_to(number, merged)
            hold_against(recall, mirror, rng, exact=index == "Flat")
            assert recall.live.view.state.generation == 1
            assert recall.live.view.num_slots - recall.live.view.state.delta_start <= 20
    hold_against(recall_of(open_again(release), index), mirror, rng, exact=index == "Flat")
    writer.close()
    assert ItemWriter(open_again(release)).sequence == writer.sequence


def test_every_step_knows_a_new_item(tmp_path, rng):
    release = make_release(tmp_path, rng)
    write_item_encoder(release)
    other = open_again(release)
    features, recall, reranking = (
        step(other.model(name), other) for step, name in ((FeatureLookup, "features"), (Recall, "recall"), (Reranking, "reranking"))
    )
    vector = 9 * np.ones(8)
    ItemWriter(release).apply([{"op": "add", "item": {"item_id": "brand new", "brand": "brand1", "price": 5, "item_embedding": vector.tolist()}}])
    session = parse_options(json.dumps({"session_items": '["brand new"]', "exclude_seen": False}), 1, release.schema)
    known = features.run(session, user_id=np.array([[b"u00001"]]))
    assert known["seen_rows"][0, -1] == 121
    np.testing.assert_array_equal(known["history_embeddings"][0, -1], vector)
    found = recall.run(session, seen_rows=known["seen_rows"], user_embeddings=np.ones((1, 1, 8), np.float32))
    place = found["candidate_rows"][0].tolist().index(121)
    probabilities = np.zeros((1, 24, 3), np.float32)
    probabilities[0, place] = 1
    parameters = {"candidate_rows": found["candidate_rows"], "candidate_probabilities": probabilities, "user_status": np.zeros((1, 1), np.int64)}
    parameters["candidate_status"] = found["candidate_status"]
    answer = reranking.run(session, **parameters)
    assert answer["item_ids"][0, 0] == b"brand new"
    assert answer["release"][0, 0] == b"r1+1", "an answer says how far it is"
    unseen = parse_options(json.dumps({"session_items": '["brand new"]'}), 1, release.schema)
    rows = recall.run(unseen, seen_rows=known["seen_rows"], user_embeddings=np.ones((1, 1, 8), np.float32))["candidate_rows"]
    assert 121 not in rows, "what the session holds is seen"
    excluded = parse_options(json.dumps({"exclude_items": '["brand new"]'}), 1, release.schema)
    rows = recall.run(excluded, seen_rows=np.full((1, 12), -1), user_embeddings=np.ones((1, 1, 8), np.float32))["candidate_rows"]
    assert 121 not in rows


def test_new_items_that_are_the_same_are_cut_in_order_of_rows(tmp_path, rng):
    """Who comes out may not hang on how deep batch-mates go."""
    release = make_release(tmp_path, rng)
    write_item_encoder(release)
    recall = recall_of(open_again(release), "Flat")
    ItemWriter(release).apply([{"op": "add", "item": {"item_id": f"twin{n:02}", "item_embedding": [9.0] * 8}} for n in range(40)])
    view, query = recall.live.refresh(), np.ones((1, 8), np.float32)
    for depth in (3, 17, 39):
        assert recall.index.find(view, query, depth, None)[0][0].tolist() == list(range(121, 121 + depth))


def test_a_deleted_item_leaves_every_source(tmp_path, rng):
    release = make_release(tmp_path, rng)
    recall = Recall(release.model("recall"), release)
    popular = recall.popular_rows[:5]
    names = release.item_ids.ids_from_rows(popular)
    ItemWriter(open_again(release)).apply([{"op": "delete", "item": {"item_id": name.decode()}} for name in names])
    seen = release.users["seen"][1:30].astype(np.int64)
    options = parse_options('{"exclude_seen": false}', 29, release.schema)
    rows = recall.run(options, seen_rows=seen, user_embeddings=rng.standard_normal((29, 1, 8), dtype=np.float32))["candidate_rows"]
    assert not np.isin(rows, popular).any()
    assert (rows > 0).all(), "the list is still full"


def test_an_update_moves_only_what_it_names(tmp_path, rng):
    release = make_release(tmp_path, rng)
    write_item_encoder(release)
    writer = ItemWriter(release)
    before = np.array(release.items[1])
    name = release.item_ids.sorted_ids[0].decode()
    writer.apply([{"op": "update", "item": {"item_id": name}}])
    row = np.array([1])
    np.testing.assert_array_equal(release.live.refresh().gather(row, "embedding")[0], before["embedding"])
    writer.apply([{"op": "update", "item": {"item_id": name, "price_eur": 80.0}}])
    view = release.live.refresh()
    np.testing.assert_array_equal(view.gather(row, "codes")[0], before["codes"])
    np.testing.assert_allclose(view.gather(row, "values")[0], [1.0])
    assert (view.gather(row, "embedding")[0] != before["embedding"]).any()


NAN, ZERO = [float("nan")] * 8, [0.0] * 8
BAD = {
    "a second add": ({"op": "add", "item": {"item_id": "i00003"}},
        "item 'i00003' exists already; update it instead"),
    "an unknown delete": ({"op": "delete", "item": {"item_id": "x"}},
        "item 'x' is unknown; there is nothing to delete"),
    "an unknown update": ({"op": "update", "item": {"item_id": "x"}},
        "item 'x' is unknown; add it first"),
    "an unknown kind": ({"op": "ad", "item": {"item_id": "x"}},
        "item 'x': op 'ad' is unknown; use add, update, upsert, delete"),
    "no id": ({"op": "add"}, "a change must be an operation and an item with an item_id (text or a whole number), got \"{'op': 'add'}\""),
    "a long id": ({"op": "add", "item": {"item_id": "x" * 129}},
        f"item_id {'x' * 40!r}: must have 1 to 128 bytes and not end in NUL"),
    "an unknown feature": ({"op": "add", "item": {"item_id": "x", "prise": 3}},
        "item 'x': no item feature 'prise'; known: brand, price, price_eur, tags"),
    "text for a number": ({"op": "add", "item": {"item_id": "x", "price": "cheap"}},
        "item 'x': price: is no number"),
    "an infinite number": (
        {"op": "add", "item": {"item_id": "x", "price": float("inf")}}, "item 'x': price: is no finite number; use null where a value is missing"),
    "a number for text": ({"op": "add", "item": {"item_id": "x", "brand": 1.5}},
        "item 'x': brand: must be text or a whole number, got float"),
    "a NaN vector": ({"op": "add", "item": {"item_id": "x", "item_embedding": NAN}},
        "item 'x': item_embedding must be 8 finite numbers, got 8 components"),
    "a zero vector": ({"op": "add", "item": {"item_id": "x", "item_embedding": ZERO}},
        "item 'x': its embedding is all zeros, so no search could find it"),
    "a short vector": ({"op": "add", "item": {"item_id": "x", "item_embedding": [1.0]}},
        "item 'x': item_embedding must be 8 finite numbers, got 1 components"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "text"), BAD.values(), ids=BAD)
def test_a_bad_change_is_refused_whole_and_named(tmp_path, rng, change, text):
    release = make_release(tmp_path, rng)
    write_item_encoder(release)
    writer = ItemWriter(release)
    with pytest.raises(InvalidInput) as caught:
        writer.apply([{"op": "delete", "item": {"item_id": "i00001"}}, change])
    assert str(caught.value) == text
    assert writer.sequence == 0, "nothing of the group is done"


def test_a_second_writer_is_refused(tmp_path, rng):
    release = make_release(tmp_path, rng)
    writer = ItemWriter(release)
    with pytest.raises(ReleaseError, match=r"^another process writes the live items of r1 in .*; use it, or stop it$"):
        ItemWriter(open_again(release))
    writer.close()
    ItemWriter(open_again(release)).close()


# --- damaged files


def written(tmp_path: Path, rng: np.random.Generator, count: int = 6) -> tuple[RandomRelease, Path]:
    release = make_release(tmp_path, rng)
    writer = ItemWriter(release)
    for i in range(count):
        writer.apply([{"op": "delete", "item": {"item_id": f"i{i:05}"}}])
    writer.close()
    return release, tmp_path / ".live" / "r1" / "log-0"


@pytest.mark.parametrize("cut", [1, 100, 190])
def test_a_torn_tail_is_cut_off_and_said(tmp_path, rng, cut):
    release, log = written(tmp_path, rng)
    os.truncate(log, log.stat().st_size - cut)
    assert open_again(release).live.view.sequence == 5, "a reader stops before it"
    notes: list[str] = []
    writer = ItemWriter(open_again(release), notes.append)
    left = record_dtype(release.schema).itemsize - cut
    assert notes == [f"{log}: the last {left} bytes were torn by a crash and are cut off; whole up to sequence 5"]
    assert writer.apply([{"op": "delete", "item": {"item_id": "i00005"}}]) == 6
    assert open_again(release).live.view.num_deleted == 6


def test_a_damaged_middle_is_refused_with_the_way_back(tmp_path, rng):
    release, log = written(tmp_path, rng)
    size = record_dtype(release.schema).itemsize
    offset = HEADER_BYTES + 2 * size
    content = bytearray(log.read_bytes())
    content[offset + 30] ^= 1
    log.write_bytes(content)
    for opened in (lambda: open_again(release).live, lambda: ItemWriter(open_again(release))):
        with pytest.raises(ReleaseError) as caught:
            opened()
        assert str(caught.value).startswith(
            f"{log} is damaged at offset {offset}, with whole records behind it; cut it there (`truncate -s {offset} {log}`"
        )
        assert f"or move {log.parent} away" in str(caught.value)
    os.truncate(log, offset)  # the way back, as told
    assert open_again(release).live.view.sequence == 2


def test_a_log_that_is_damaged_while_it_is_served_keeps_the_last_good_view(tmp_path, rng):
    release, log = written(tmp_path, rng)
    live = open_again(release).live
    writer = ItemWriter(open_again(release))
    start = log.stat().st_size
    writer.apply([{"op": "delete", "item": {"item_id": f"i{i:05}"}} for i in (50, 51, 52)])
    with log.open("r+b") as file:
        file.seek(start + 20)
        file.write(b"\xff")
    assert live.refresh().sequence == 6
    assert f"{log} is damaged at offset {start}" in live.fault


@pytest.mark.parametrize("content", [b"", b"nonsense" * 20])
def test_a_log_without_its_header_is_refused(tmp_path, rng, content):
    release, log = written(tmp_path, rng)
    log.write_bytes(content)
    with pytest.raises(
        ReleaseError, match=r"log-0 is no log of live items, or its header is damaged at offset 0; put a copy of it back, or move .* away"
    ):
        open_again(release).live  # noqa: B018


def test_a_log_of_another_schema_is_refused(tmp_path, rng):
    written(tmp_path / "a", rng)
    other = make_release(tmp_path / "b", rng, schema=schema_of(embedding=4))
    (tmp_path / "a" / ".live").rename(tmp_path / "b" / ".live")
    with pytest.raises(ReleaseError, match="belongs to a release with another contract or schema"):
        other.live  # noqa: B018


@pytest.mark.parametrize("name", ["rows.npy", "index.faiss", "meta.json"])
def test_a_changed_generation_is_refused(tmp_path, rng, name):
    release, _ = written(tmp_path, rng)
    writer = ItemWriter(release)
    writer.turn_to(merge(open_again(release), 6), 6)
    writer.close()
    path = tmp_path / ".live" / "r1" / "g1" / name
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ReleaseError, match=r"g1.*put a copy of it back, or move .*r1 away: the release then serves without live items$"):
        open_again(release).live  # noqa: B018


# --- instances and processes


def test_dead_instances_do_not_hold_a_change_up(tmp_path):
    first, second = InstanceFile(tmp_path), InstanceFile(tmp_path)
    first.publish(3)
    second.publish(5)
    assert sorted(sequences(tmp_path).values()) == [3, 5]
    os.close(first._descriptor)  # as the kernel does for a killed process
    assert list(sequences(tmp_path).values()) == [5]
    second.close()
    assert sequences(tmp_path) == {}


def active(release: RandomRelease) -> RandomRelease:
    """Makes the release one that other processes find: a manifest and an alias."""
    from ensemble import contract

    manifest = {"format": 1, "contract": contract.fingerprint(release.schema), "files": _digests(release.repository)}
    (release.path / "manifest.json").write_text(json.dumps(manifest))
    (release.repository / "recommend").mkdir()
    (release.repository / "recommend" / "config.pbtxt").write_text('model_name: "r1_recommend"')
    return release


def _digests(repository: Path) -> dict[str, dict]:
    from ensemble.release import file_sha256

    return {str(p.relative_to(repository)): {"sha256": file_sha256(p)} for p in repository.rglob("*") if p.is_file()}


def start_writer(repository: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "ensemble.live.service", str(repository)]
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdin=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            ItemClient(repository).close()
            return process
        except Unavailable:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.05)
    raise AssertionError("the writer did not start")


def delete_until_it_is_gone(repository: Path, items: range, acknowledged: set[str]) -> None:
    with ItemClient(repository, wait_s=0) as client:
        for i in items:
            client.delete(f"i{i:05}")
            acknowledged.add(f"i{i:05}")
            time.sleep(0.005)
        while True:
            client.status()


def test_nothing_acknowledged_is_lost_when_the_writer_is_killed(tmp_path, rng):
    release = active(make_release(tmp_path, rng))
    acknowledged: set[str] = set()
    for turn in range(2):
        process = start_writer(tmp_path)
        killer = threading.Timer(0.3, process.kill)
        killer.start()
        with pytest.raises(Unavailable):
            delete_until_it_is_gone(tmp_path, range(60 * turn, 60 * turn + 60), acknowledged)
        process.wait()
        process.stdin.close()
        process.stderr.close()
        (tmp_path / ".live" / "writer.json").unlink()
        view, unique = open_again(release).live.view, len(acknowledged)
        gone = {f"i{i:05}" for i in range(120) if view.state.deleted[1 + i]}
        assert acknowledged <= gone
        assert len(gone) <= unique + 2, "at most the ones in flight"


def test_a_change_is_recallable_in_under_a_second_and_done_when_all_have_it(tmp_path, rng):
    release = make_release(tmp_path, rng)
    write_item_encoder(release)
    active(release)
    service = ItemService(tmp_path, lambda line: None)
    thread = threading.Thread(target=service.run, daemon=True)
    thread.start()
    followers = [LiveItems(open_again(release)) for _ in range(3)]
    for follower in followers:
        follower.follow()
    deadline = time.monotonic() + 5
    while not (tmp_path / ".live" / "writer.json").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    try:
        with ItemClient(tmp_path, wait_s=5.0) as client:
            client.status()
            while len(client.status().instances) < 3 and time.monotonic() < deadline:
                time.sleep(0.01)
            client.add({"item_id": "first", "brand": "brand1"})  # opens the engine
            started = time.monotonic()
            done = client.add({"item_id": "n1", "brand": "brand1", "price": 3})
            assert time.monotonic() - started < 1.0
            assert done.done
            assert list(done.instances.values()) == [2, 2, 2]
            assert all(follower.view.rows_from_ids(np.array([b"n1"]))[0] == 122 for follower in followers)
            with pytest.raises(InvalidArgument, match=r"^item 'n1' exists already; update it instead$"):
                client.add({"item_id": "n1"})
            client.merge()
            while client.status().generation == 0 and time.monotonic() < deadline + 30:
                time.sleep(0.02)
            assert client.status().unmerged == 0
            assert client.delete("n1").done
            assert all(follower.view.state.generation == 1 for follower in followers)
    finally:
        for follower in followers:
            follower.close()
        service.stop()
        thread.join()


def test_without_a_writer_the_client_says_how_to_start_one(tmp_path):
    with pytest.raises(Unavailable, match=r"^nobody writes the items of .*; start `peregrine serve`, or `peregrine items serve`$"):
        ItemClient(tmp_path)


def test_encoding_needs_what_the_build_wrote(tmp_path, rng):
    release = make_release(tmp_path, rng)
    (release.path / "encoding.json").unlink()
    with pytest.raises(ReleaseError, match=r"^release r1 has no encoding\.json, so items cannot be added or updated; build it again$"):
        ItemEncoding(release)
