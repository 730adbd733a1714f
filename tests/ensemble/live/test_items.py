"""Live items: what was added, changed and deleted is what brute force over the items as they are now finds;
nothing is lost."""

from __future__ import annotations

import json
import math
import os
import shutil
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from item_changes import ASKED, KINDS, Mirror, found_names, hold_against, random_changes, recall_of
from random_release import make_release, open_again, open_recall, write_item_encoder

from ensemble.contract import Degraded
from ensemble.errors import InvalidInput, ReleaseError
from ensemble.index.item_index import find
from ensemble.live.encoding import ItemEncoding
from ensemble.live.merge import merge
from ensemble.live.writer import ItemWriter
from ensemble.options import parse_options
from ensemble.steps.features import FeatureLookup
from ensemble.steps.recall import Recall
from ensemble.steps.reranking import Reranking
from ensemble.steps.sources import Popular


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
            writer.overlay.turn_to(number, merged)
            hold_against(recall, mirror, rng, exact=index == "Flat")
            assert recall.live.view.state.generation == 1
            assert recall.live.view.num_slots - recall.live.view.state.tail_start <= 20
    hold_against(recall_of(open_again(release), index), mirror, rng, exact=index == "Flat")
    writer.close()
    assert ItemWriter(open_again(release)).sequence == writer.sequence


def test_every_step_knows_a_new_item(tmp_path, rng):
    release = make_release(tmp_path, rng)
    write_item_encoder(release)
    other = open_again(release)
    features, recall, reranking = (
        step(other.model(name), other)
        for step, name in ((FeatureLookup, "features"), (Recall, "recall"), (Reranking, "reranking"))
    )
    vector = 9 * np.ones(8)
    ItemWriter(release).apply(
        [
            {
                "op": "add",
                "item": {
                    "item_id": "brand new",
                    "brand": "brand1",
                    "price": 5,
                    "item_embedding": vector.tolist(),
                },
            }
        ]
    )
    session = parse_options(
        json.dumps({"session_items": '["brand new"]', "exclude_seen": False}), 1, release.schema
    )
    known = features.run(session, user_id=np.array([[b"u00001"]]))
    assert known["seen_rows"][0, -1] == 121
    np.testing.assert_array_equal(known["history_embeddings"][0, -1], vector)
    found = recall.run(session, seen_rows=known["seen_rows"], user_embeddings=np.ones((1, 1, 8), np.float32))
    place = found["candidate_rows"][0].tolist().index(121)
    probabilities = np.zeros((1, 24, 3), np.float32)
    probabilities[0, place] = 1
    parameters = {
        "candidate_rows": found["candidate_rows"],
        "candidate_probabilities": probabilities,
        "candidate_scores": found["candidate_scores"],
        "user_status": np.zeros((1, 1), np.int64),
    }
    parameters["candidate_status"] = found["candidate_status"]
    answer = reranking.run(session, **parameters)
    assert answer["item_ids"][0, 0] == b"brand new"
    assert (answer["release"][0, 0], answer["sequence"][0, 0]) == (b"r1", 1), "an answer says how far it is"
    unseen = parse_options(json.dumps({"session_items": '["brand new"]'}), 1, release.schema)
    rows = recall.run(unseen, seen_rows=known["seen_rows"], user_embeddings=np.ones((1, 1, 8), np.float32))[
        "candidate_rows"
    ]
    assert 121 not in rows, "what the session holds is seen"
    excluded = parse_options(json.dumps({"exclude_items": '["brand new"]'}), 1, release.schema)
    rows = recall.run(
        excluded, seen_rows=np.full((1, 12), -1), user_embeddings=np.ones((1, 1, 8), np.float32)
    )["candidate_rows"]
    assert 121 not in rows


def test_new_items_that_are_the_same_are_cut_in_order_of_rows(tmp_path, rng):
    """Who comes out may not hang on how deep batch-mates go."""
    release = make_release(tmp_path, rng)
    write_item_encoder(release)
    recall = recall_of(open_again(release), "Flat")
    ItemWriter(release).apply(
        [{"op": "add", "item": {"item_id": f"twin{n:02}", "item_embedding": [9.0] * 8}} for n in range(40)]
    )
    view, query = recall.live.refresh(), np.ones((1, 8), np.float32)
    for depth in (3, 17, 39):
        assert find(view, query, depth, None)[0][0].tolist() == list(range(121, 121 + depth))


def test_a_deleted_item_leaves_every_source(tmp_path, rng):
    release = make_release(tmp_path, rng)
    recall = open_recall(release)
    popular = recall.source(Popular).rows[:5]
    names = release.item_ids.ids_from_rows(popular)
    ItemWriter(open_again(release)).apply(
        [{"op": "delete", "item": {"item_id": name.decode()}} for name in names]
    )
    seen = release.users["seen"][1:30].astype(np.int64)
    options = parse_options('{"exclude_seen": false}', 29, release.schema)
    rows = recall.run(
        options, seen_rows=seen, user_embeddings=rng.standard_normal((29, 1, 8), dtype=np.float32)
    )["candidate_rows"]
    assert not np.isin(rows, popular).any()
    assert (rows > 0).all(), "the list is still full"


@pytest.mark.parametrize("index", KINDS)
def test_a_new_item_that_was_merged_and_deleted_is_gone(tmp_path, rng, index):
    """Its row is in the merged index, and has no content any more."""
    release = make_release(tmp_path, rng, index=index)
    write_item_encoder(release)
    writer, recall = ItemWriter(release), recall_of(open_again(release), index)
    writer.apply([{"op": "add", "item": {"item_id": "gone", "item_embedding": [9.0] * 8}}])
    writer.apply([{"op": "delete", "item": {"item_id": "gone"}}])
    writer.overlay.turn_to(merge(open_again(release), 2), 2)
    found = found_names(recall, np.ones(8, np.float32), 20, {})
    assert recall.live.view.state.generation == 1
    assert len(found) == 20
    assert b"gone" not in found


def test_a_generation_that_was_merged_away_is_let_go(tmp_path, rng):
    """With its index, its log's file and what filters remember of it: else every merge would cost its memory
    and disk once more."""
    release = make_release(tmp_path, rng)
    writer, recall = ItemWriter(release), recall_of(open_again(release))
    query = rng.standard_normal(8).astype(np.float32)
    gone = []
    for turn in range(3):
        writer.apply([{"op": "delete", "item": {"item_id": f"i{turn:05}"}}])
        found_names(recall, query, 20, ASKED[1])
        found_names(recall, query, 20, ASKED[turn + 2])
        gone.append(weakref.ref(recall.live.view.state))
        writer.overlay.turn_to(merge(open_again(release), turn + 1), turn + 1)
        found_names(recall, query, 20, ASKED[1])
    assert [state() for state in gone] == [None] * 3
    logs = [os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    assert {Path(log).name for log in logs if log.startswith(str(tmp_path)) and "/log-" in log} == {"log-3"}


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
    "no id": ({"op": "add"}, "a change must be an operation and an item with an item_id (text or a whole "
                             "number), got \"{'op': 'add'}\""),
    "a long id": ({"op": "add", "item": {"item_id": "x" * 129}},
        "item_id: an id must have at most 128 bytes, got 129"),
    "an unknown feature": ({"op": "add", "item": {"item_id": "x", "prise": 3}},
        "item 'x': no item feature 'prise'; known: brand, price, price_eur, tags"),
    "text for a number": ({"op": "add", "item": {"item_id": "x", "price": "cheap"}},
        "item 'x': price: is no number"),
    "an infinite number": (
        {"op": "add", "item": {"item_id": "x", "price": float("inf")}}, "item 'x': price: is no finite "
                                                                        "number; use null where a value is "
                                                                        "missing"),
    "a number for text": ({"op": "add", "item": {"item_id": "x", "brand": 1.5}},
        "item 'x': brand: must be text or a whole number, got float"),
    "an id that is not UTF-8": ({"op": "add", "item": {"item_id": "x\ud800"}},
        "item_id: an id must be valid UTF-8, got 'x\\ud800'"),
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
    with pytest.raises(ReleaseError, match=r"^another process writes the items of .*; use it, or stop it$"):
        ItemWriter(open_again(release))
    writer.close()
    ItemWriter(open_again(release)).close()


def test_encoding_needs_what_the_build_wrote(tmp_path, rng):
    release = make_release(tmp_path, rng)
    (release.path / "encoding.json").unlink()
    with pytest.raises(
        ReleaseError,
        match=r"^release r1 has no encoding\.json, so items cannot be added or updated; build it again$",
    ):
        ItemEncoding(release)


@pytest.mark.parametrize("merged", [False, True])
def test_a_value_that_the_release_lacks_filters_all_the_same(tmp_path, rng, merged):
    """Also in an instance that was there before it, after a merge, and when the overlay is made again."""
    release = make_release(tmp_path, rng)
    write_item_encoder(release)
    recall, writer = recall_of(open_again(release)), ItemWriter(release)
    assert found_names(recall, np.ones(8, np.float32), 20, {"brands": ["Vert"]}) == []
    for n, brand in enumerate(("Vert", "Bleu", "Vert")):
        item = {"item_id": f"new{n}", "brand": brand, "tags": "tag1|Neuf", "item_embedding": [9.0] * 8}
        writer.apply([{"op": "add", "item": item}])
    writer.apply([{"op": "update", "item": {"item_id": "i00003", "brand": "Vert"}}])
    if merged:
        writer.overlay.turn_to(merge(open_again(release), 4), 4)
    writer.close()

    def hold(recall: Recall) -> None:
        query = np.ones(8, np.float32)
        found = {brand: found_names(recall, query, 20, {"brands": [brand]}) for brand in ("Vert", "Bleu")}
        assert {brand: sorted(names) for brand, names in found.items()} == {
            "Vert": [b"i00003", b"new0", b"new2"],
            "Bleu": [b"new1"],
        }
        denied = parse_options('{"deny": "{\\"brand\\": [\\"Vert\\"]}"}', 1, release.schema).users[0].filter
        view = recall.live.refresh()
        passing = recall.filters.mask(denied, view).passes(view.rows_from_ids(np.array([b"new0", b"new1"])))
        assert passing.tolist() == [False, True]

    hold(recall)
    hold(recall_of(open_again(release)))
    shutil.rmtree(release.live_folder)
    ItemWriter(open_again(release)).close()
    hold(recall_of(open_again(release)))


def test_models_take_a_new_value_as_unknown(tmp_path, rng):
    release = make_release(tmp_path, rng)
    write_item_encoder(release)
    writer = ItemWriter(release)
    for n, brand in enumerate(("Vert", "Bleu")):
        writer.apply([{"op": "add", "item": {"item_id": f"new{n}", "brand": brand, "price": 3}}])
    first, second = writer.live.view.state.slots[:2]
    np.testing.assert_array_equal(first["embedding"], second["embedding"])
    assert first["codes"][0] != second["codes"][0], "though a cap counts them apart"
    encoding = writer.overlay.encoding
    assert encoding.unknown_values({"item_id": "x", "brand": "brand1", "tags": "tag1|Neuf"}) == [
        ("tags", "Neuf")
    ]


def test_values_that_no_item_has_are_told_until_a_live_item_brings_them(tmp_path, rng):
    release = make_release(tmp_path, rng)
    write_item_encoder(release)
    writer, recall = ItemWriter(release), open_recall(open_again(release))
    asked = [
        {"allow": {"brand": ["brand1"]}, "deny": {"tags": ["tag1"]}},
        {"deny": {"brand": ["brand1", "Vert"]}},
        {"allow": {"brand": ["Vert"], "tags": ["tag0"]}},
        {"allow": {"brand": ["Rouge"]}},
        {},
    ]

    def told() -> list[bool]:
        each = {name: [one.get(name, {}) for one in asked] for name in ("allow", "deny")}
        parameters = json.dumps({name: json.dumps(values) for name, values in each.items()})
        options = parse_options(parameters, 5, release.schema)
        options = replace(options, deadlines=(math.inf, math.inf, math.inf, 0.0, math.inf))
        found = recall.run(
            options, seen_rows=np.full((5, 12), -1), user_embeddings=np.ones((5, 1, 8), np.float32)
        )
        return ((found["candidate_status"][:, 0] & Degraded.UNKNOWN_VALUES) > 0).tolist()

    assert told() == [False, True, True, True, False]
    writer.apply([{"op": "add", "item": {"item_id": "new", "brand": "Vert"}}])
    assert told() == [False, False, False, True, False], "also where the budget leaves the popular list"
    merge(open_again(release), writer.sequence)
    assert told() == [False, False, False, True, False]


def test_an_overlay_whose_new_values_are_lost_is_made_again(tmp_path, rng):
    release = make_release(tmp_path, rng)
    write_item_encoder(release)
    writer = ItemWriter(release)
    writer.apply([{"op": "add", "item": {"item_id": "new", "brand": "Vert"}}])
    writer.close()
    (release.live_folder / "values-0").write_text("")
    notes: list[str] = []
    again = ItemWriter(open_again(release), notes.append)
    assert "lacks values that" in notes[0]
    assert again.live.view.state.new_values.codes("brand", ["Vert"])
