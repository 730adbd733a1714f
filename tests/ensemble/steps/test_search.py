"""A search finds what fits, in an order that taste may move, and nothing else: in the twin, on a release with
encoders."""

from __future__ import annotations

import base64
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from shops import private_copy
from untold import best_told

from ensemble import contract
from ensemble.contract import Degraded
from ensemble.errors import InvalidArgument
from ensemble.live.merge import merge
from ensemble.live.writer import ItemWriter
from ensemble.local import LocalPipeline, column_of
from ensemble.options import default_options, stack, with_deadline
from ensemble.release.release import Release
from ensemble.steps.search import SearchRecall, taste
from ensemble.steps.search_settings import SEARCH_FILE, read_search
from ensemble.steps.served import ServedRelease, open_served


@pytest.fixture(scope="module")
def search(pictured_release: ServedRelease) -> LocalPipeline:
    return LocalPipeline(pictured_release, "search")


def titles(release: Release) -> dict[str, bytes]:
    """Titles that one item has alone, with its id."""
    rows = release.item_ids.rows_from_ids(release.item_ids.sorted_ids)
    known = [
        (release.item_titles[row].decode(), bytes(release.item_ids.ids_from_rows(row[None])[0]))
        for row in rows
    ]
    texts = [title for title, _ in known]
    return {title: item for title, item in known if texts.count(title) == 1}


def picture_of(shop: Path, release: Release, place: int) -> tuple[bytes, bytes]:
    """An item's id, and its picture's file."""
    import pyarrow.parquet as pq

    table = pq.read_table(shop / "items.parquet").to_pylist()[place]
    return str(table["item_id"]).encode(), (shop / table["image"]).read_bytes()


def test_a_full_title_finds_its_item_first(search, pictured_release):
    known = titles(pictured_release)
    users = [f"u{place}" for place in range(len(known))]
    found = search.search(users, list(known), parameters={"top_k": 3})
    first = found["item_ids"][:, 0] == np.array(list(known.values()), object)
    assert first.mean() >= 0.95
    assert not (found["degraded"] & Degraded.NO_MATCH).any()
    assert all(b"words" in names.split(b",") for names in found["finders"][:, 0])
    assert (np.diff(found["scores"], axis=1) <= 0).all()


def test_a_picture_finds_its_item_first_and_says_that_the_picture_did(
    search, pictured_release, pictured_shop, monkeypatch
):
    last, hits = search.steps["search_reranking"], 0
    monkeypatch.setitem(last.__dict__, "taste_weight", 0.0)  # pictures of one category are much alike
    for place in range(5):
        item, data = picture_of(pictured_shop, pictured_release, place)
        found = search.search(["u1"], [""], [data])
        hits += found["item_ids"][0, 0] == item
        assert found["finders"][0, 0] == b"image"
    assert hits >= 4


def test_text_and_picture_together_find_what_both_say(search, pictured_release, pictured_shop):
    item, data = picture_of(pictured_shop, pictured_release, 3)
    title = pictured_release.item_titles[
        pictured_release.item_ids.rows_from_ids(np.array([item]))[0]
    ].decode()
    found = search.search(["u1"], [title], [data])
    assert found["item_ids"][0, 0] == item
    assert {b"words", b"text", b"image"} == set(found["finders"][0, 0].split(b","))


@pytest.mark.parametrize("text", ["xqzvkj wpfgh", "the of and", "口紅", "مكياج", "😀", "a\0b"])
def test_what_nothing_fits_gives_an_empty_list_that_says_so(search, text):
    found = search.search(["u1", "u2"], [text, text])
    assert (found["degraded"] & Degraded.NO_MATCH).all()
    assert (found["item_ids"] == b"").all()
    assert (found["finders"] == b"").all()


def test_taste_moves_items_and_admits_none(search, monkeypatch):
    recall, last = search.steps["search_recall"], search.steps["search_reranking"]
    lists = {}
    for weight in (0.0, 100.0):
        monkeypatch.setitem(last.__dict__, "taste_weight", weight)
        lists[weight] = search.search(["u1", "u2"], ["matte lipstick"] * 2, parameters={"top_k": 50})
    assert recall.search.least_text > 0
    for user in range(2):
        sets = [set(found["item_ids"][user].tolist()) - {b""} for found in lists.values()]
        assert sets[0] == sets[1]
    assert (lists[0.0]["item_ids"] != lists[100.0]["item_ids"]).any(), "much taste moves something"


def test_taste_is_a_place_among_those_that_are_there():
    blended = np.array([[3.0, 1.0, 2.0, 9.0], [5.0, 5.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]], np.float32)
    there = np.array([[1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0]], bool)
    np.testing.assert_array_equal(taste(blended, there), [[1, -1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])


def test_options_rule_a_search_as_they_rule_recommend(search, pictured_release):
    title, item = next(iter(titles(pictured_release).items()))
    ask = lambda **options: search.search(["u1"], [title], parameters=options)["item_ids"][0].tolist()  # noqa: E731
    everything = ask(top_k=20)
    assert everything[0] == item
    assert item not in ask(exclude_items=json.dumps([item.decode()]))
    row = pictured_release.item_ids.rows_from_ids(np.array([item]))
    feature = next(f for f in pictured_release.schema.items.features if f.name.startswith("category"))
    codes = pictured_release.items["codes"][row[0], feature.columns]
    value = pictured_release.vocabularies["items"][feature.name][int(codes[0]) - feature.offset - 1]
    assert item not in ask(deny=json.dumps({feature.name: [value]}))
    only = [i for i in ask(top_k=20, allow=json.dumps({feature.name: [value]})) if i]
    assert item in only
    rows = pictured_release.item_ids.rows_from_ids(np.array(only))
    assert set(pictured_release.items["codes"][rows][:, feature.columns].ravel().tolist()) == {int(codes[0])}


def test_what_the_user_has_had_is_found_again_unless_he_says_otherwise(search, pictured_release):
    users = pictured_release.users
    row = int(np.flatnonzero(users["seen"][:, -1] > 0)[0])
    user = bytes(pictured_release.user_ids.ids_from_rows(np.array([row]))[0])
    had = int(users["seen"][row, -1])
    title, item = (
        pictured_release.item_titles[had].decode(),
        bytes(pictured_release.item_ids.ids_from_rows(np.array([had]))[0]),
    )
    assert item in search.search([user], [title])["item_ids"][0]
    assert item not in search.search([user], [title], parameters={"exclude_seen": True})["item_ids"][0]
    both = search.search([user] * 2, [title] * 2, parameters={"exclude_seen": json.dumps([True, False])})
    assert [item in line for line in both["item_ids"]] == [False, True]


def test_batch_mates_change_nothing(search, pictured_release, pictured_shop):
    known = list(titles(pictured_release))[:6]
    texts = [*known[:3], "", "xqzvkj", known[4]]
    images = [
        b"",
        b"",
        b"",
        picture_of(pictured_shop, pictured_release, 1)[1],
        b"",
        picture_of(pictured_shop, pictured_release, 2)[1],
    ]
    users = [f"u{n}" for n in range(6)]
    options = [{"top_k": 5, "diversity": 0.3 * (n % 2)} for n in range(6)]
    together = search.search(users, texts, images, options)
    for n in range(6):
        alone = search.search([users[n]], [texts[n]], [images[n]], [options[n]])
        width = alone["item_ids"].shape[1]
        assert alone["item_ids"][0].tolist() == together["item_ids"][n, :width].tolist()
        np.testing.assert_allclose(alone["scores"][0], together["scores"][n, :width], atol=1e-4)


def test_more_like_an_item_is_a_list_without_it(search, pictured_release):
    item = next(iter(titles(pictured_release).values())).decode()
    found = search.search(["u1"], [""], parameters={"like": json.dumps([item]), "top_k": 5})
    ids = [one for one in found["item_ids"][0].tolist() if one]
    assert len(ids) == 5
    assert item.encode() not in ids
    found = search.search(["u1"], [""], parameters={"like": '["nobody knows"]'})
    assert found["degraded"][0, 0] & Degraded.NO_MATCH
    assert found["degraded"][0, 0] & Degraded.UNKNOWN_ITEMS


def test_only_a_search_takes_like(pictured_release):
    pipeline = LocalPipeline(pictured_release)
    with pytest.raises(InvalidArgument, match="like: is an option of search, not of recommend"):
        pipeline.recommend(["u1"], {"like": '["i1"]'})


def test_a_request_of_nothing_is_refused(search):
    with pytest.raises(InvalidArgument, match="query_text: it is empty, and so is query_image"):
        search.search(["u1", "u2"], ["matte", " \0"])


def test_whose_budget_is_spent_gets_what_fits_by_relevance_alone(search, pictured_release):
    known = list(titles(pictured_release).items())[:2]
    options = stack([default_options(1), with_deadline(default_options(1), 1.0)])
    tensors = {
        "user_id": np.array([[b"u1"], [b"u1"]]),
        "query_text": column_of([t.encode() for t, _ in known]),
    }
    tensors["query_image"] = column_of([b"", b""])
    found = search.run(options, search.read(options, tensors))
    assert found["item_ids"][:, 0].tolist() == [item for _, item in known]
    flags = (found["degraded"][:, 0] & Degraded.RANK_SKIPPED) > 0
    assert flags.tolist() == [False, True]
    assert found["probabilities"][0].any()
    assert not found["probabilities"][1].any()


def test_a_release_without_encoders_has_no_search_and_says_so(tiny_release):
    assert list(tiny_release.pipelines) == ["recommend"]
    with pytest.raises(InvalidArgument, match=r"release r1 has no search: .* `encoder` in shop.toml"):
        LocalPipeline(tiny_release, "search")


def test_the_contract_lists_pipelines_that_share_members(pictured_release, tiny_release):
    schema = pictured_release.schema
    names = [model.name for model in contract.members(schema)]
    assert len(names) == len(set(names))
    assert {"features", "text_query", "image_query", "search_recall", "text_encoder"} <= set(names)
    assert "text_query" not in [model.name for model in contract.members(tiny_release.schema)]
    for pipeline in contract.PIPELINES:
        assert (pictured_release.repository / f"r1_{pipeline}" / "config.pbtxt").exists()
        assert f"r1_{pipeline}" in (pictured_release.repository / pipeline / "config.pbtxt").read_text()
    assert not (tiny_release.repository / "search").exists()


def test_the_build_wrote_what_it_chose_and_what_that_is_worth(pictured_release):
    settings, report = read_search(pictured_release.path), pictured_release.manifest["report"]["search"]
    assert report["settings"]["taste_weight"] == settings.taste_weight
    assert report["ways"]["both"]["full_title_first"] >= 0.95
    assert report["with_taste"]["full_title_first"] >= 0.95
    lost = 1 - report["with_taste"]["ndcg@10"] / report["without_taste"]["ndcg@10"]
    assert lost <= 0.05  # chosen by at most 2% on the other half of the items
    assert settings.probe


def test_settings_that_do_not_fit_are_refused(pictured_repository, tmp_path):
    repository = private_copy(pictured_repository, tmp_path / "repository")
    release = open_served(repository, "r1")
    path = release.path / SEARCH_FILE
    path.chmod(0o644)
    path.write_text("{}")
    with pytest.raises(Exception, match=r"sha256 mismatch r1/search.json"):
        SearchRecall(release.pipelines["search"].model("search_recall"), release)


# --- items without a text, found by their pictures


@pytest.fixture
def shown(pictured_repository, tmp_path) -> LocalPipeline:
    """A search of a copy that may be changed, whose pictures are asked, too."""
    search = LocalPipeline(
        open_served(private_copy(pictured_repository, tmp_path / "repository"), "r1"), "search"
    )
    recall = search.steps["search_recall"]
    recall.search = replace(recall.search, shown_weight=2.0)
    return search


def test_an_item_without_a_title_is_found_by_what_its_picture_shows(shown, pictured_shop):
    recall = shown.steps["search_recall"]
    release = recall.live.release
    title, photo = best_told(pictured_shop, release)
    ask = lambda **more: shown.search(["u1"], [title], parameters={"top_k": 10, **more})  # noqa: E731
    before, writer = ask()["item_ids"][0].tolist(), ItemWriter(release)
    picture = {"base64": base64.b64encode(photo.read_bytes()).decode()}
    value = release.vocabularies["items"]["category"][0]
    new = {"item_id": "untold", "image": picture, "category": value}
    writer.apply([{"op": "add", "item": new}])
    found = ask()
    ids = found["item_ids"][0].tolist()
    assert ids[0] == before[0], "a title that fits stays first"
    assert found["finders"][0, ids.index(b"untold")] == b"shown"
    assert b"untold" not in shown.search(["u1"], ["xqzvkj wpfgh"])["item_ids"][0]
    assert b"untold" in ask(allow=json.dumps({"category": [value]}))["item_ids"][0]
    assert b"untold" not in ask(deny=json.dumps({"category": [value]}))["item_ids"][0]
    writer.overlay.turn_to(merge(release, writer.sequence), writer.sequence)
    assert ask()["item_ids"][0].tolist() == ids, "merged"
    told = {"item_id": "untold", "title": "Zorblax starlight serum"}
    writer.apply([{"op": "update", "item": told}])
    assert b"untold" not in ask()["item_ids"][0], "its title counts as soon as it has one"
    writer.apply([{"op": "update", "item": {**told, "title": ""}}])
    assert b"untold" in ask()["item_ids"][0]
    recall.search = replace(recall.search, shown_weight=0.0)
    assert ask()["item_ids"][0].tolist() == before, "off"
    writer.close()


# --- items without a picture, found by their texts


def test_an_item_without_a_picture_is_found_by_a_photo_of_what_its_title_tells(shown, pictured_shop):
    recall = shown.steps["search_recall"]
    release = recall.live.release
    recall.search = replace(recall.search, told_weight=2.0)
    title, photo = best_told(pictured_shop, release)
    data = photo.read_bytes()
    ask = lambda **more: shown.search(["u1"], [""], [data], parameters={"top_k": 10, **more})  # noqa: E731
    before, writer = ask()["item_ids"][0].tolist(), ItemWriter(release)
    value = release.vocabularies["items"]["category"][0]
    writer.apply([{"op": "add", "item": {"item_id": "unseen", "title": title, "category": value}}])
    found = ask()
    ids = found["item_ids"][0].tolist()
    assert ids[0] == before[0], "a picture that fits stays first"
    assert found["finders"][0, ids.index(b"unseen")] == b"told"
    assert b"unseen" not in ask(deny=json.dumps({"category": [value]}))["item_ids"][0]
    assert shown.search(["u1"], [title])["finders"][0, 0].startswith(b"words"), "a text asks nothing of it"
    writer.overlay.turn_to(merge(release, writer.sequence), writer.sequence)
    assert ask()["item_ids"][0].tolist() == ids, "merged"
    picture = {"base64": base64.b64encode(data).decode()}
    writer.apply([{"op": "update", "item": {"item_id": "unseen", "image": picture}}])
    found = ask()
    place = found["item_ids"][0].tolist().index(b"unseen")
    assert found["finders"][0, place] == b"image", "its picture counts as soon as it has one"
    writer.apply([{"op": "delete", "item": {"item_id": "unseen"}}])
    assert b"unseen" not in ask()["item_ids"][0]
    recall.search = replace(recall.search, told_weight=0.0)
    assert ask()["item_ids"][0].tolist() == before, "off"
    writer.close()
