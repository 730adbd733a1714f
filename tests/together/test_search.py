"""A search meets what changes: items that come and go, another release, a canary, a release without one, one
without the space that titles and pictures share."""

from __future__ import annotations

import base64
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from shops import private_copy
from untold import asks_pictures, best_told, knows_no_space
from variants import publish_variant

from clients import Client
from clients.errors import Unavailable
from clients.items import ItemClient
from clients.operations import canaries, releases
from ensemble.contract import Degraded
from ensemble.live.keeper import service_process
from ensemble.live.merge import merge
from ensemble.live.writer import ItemWriter
from ensemble.local import LocalPipeline
from ensemble.release.route import read_route
from ensemble.server.options import ServeOptions
from ensemble.server.supervisor import Server, serve
from ensemble.steps.served import open_served

USERS = [f"u{number}" for number in range(1, 13)]


def ids(search: LocalPipeline, text: str, image: bytes = b"", **options: object) -> list[str]:
    found = search.search(["u1"], [text], [image], {"top_k": 20, **options})
    return [one.decode() for one in found["item_ids"][0] if one]


def test_live_items_are_found_by_title_and_picture_at_once_and_deleted_ones_never(
    pictured_repository, tmp_path
):
    repository = private_copy(pictured_repository, tmp_path / "repository")
    release = open_served(repository, "r1")
    search, writer = LocalPipeline(release, "search"), ItemWriter(release)
    rng = np.random.default_rng(5)
    path = tmp_path / "new.png"
    Image.fromarray(rng.integers(0, 255, (40, 40, 3), np.uint8)).save(path)
    photo = path.read_bytes()
    assert ids(search, "zorblax starlight serum") == []
    picture = {"base64": base64.b64encode(photo).decode()}
    change = {"op": "add", "item": {"item_id": "new", "title": "Zorblax starlight serum", "image": picture}}
    writer.apply([change])
    assert ids(search, "zorblax starlight serum")[0] == "new"
    assert ids(search, "zorblacks starlight")[0] == "new", "mistyped"
    assert "new" in ids(search, "", photo)
    assert "new" not in ids(search, "", like='["new"]')
    known = release.item_ids.sorted_ids[5].decode()
    title = release.item_titles[release.item_ids.rows_from_ids(np.array([known.encode()]))[0]].decode()
    assert ids(search, title)[0] == known
    writer.apply([{"op": "update", "item": {"item_id": known, "title": "Quuxified moon dust"}}])
    assert ids(search, "quuxified moon dust")[0] == known
    assert ids(search, title)[:1] != [known], "its old title is not its title"
    writer.overlay.turn_to(merge(release, writer.sequence), writer.sequence)
    assert ids(search, "zorblax starlight serum")[0] == "new"
    writer.apply([{"op": "delete", "item": {"item_id": "new"}}, {"op": "delete", "item": {"item_id": known}}])
    assert ids(search, "zorblax starlight serum") == []
    assert "new" not in ids(search, "", photo)
    assert known not in ids(search, "quuxified moon dust")
    again = LocalPipeline(open_served(repository, "r1"), "search")
    assert ids(again, "zorblax starlight serum") == [], "another process, which reads the log from its start"
    writer.apply([{"op": "upsert", "item": {"item_id": "new", "title": "Zorblax starlight serum"}}])
    for one in (search, again):
        assert ids(one, "zorblax starlight serum")[0] == "new"
    writer.close()


@pytest.fixture(scope="module")
def repository(pictured_repository: Path, tiny_repository: Path, tmp_path_factory) -> Path:
    """r1, active, and r2, which search; r3, of a shop that encodes nothing; r4 asks pictures where no text
    tells of an item, r5 is as releases were before there was such a thing."""
    folder = tmp_path_factory.mktemp("searches")
    repository = private_copy(pictured_repository, folder / "repository")
    publish_variant(repository, "r1", "r2", folder / "two")
    publish_variant(repository, "r1", "r3", folder / "three", origin=tiny_repository)
    publish_variant(repository, "r1", "r4", folder / "four", asks_pictures)
    publish_variant(repository, "r1", "r5", folder / "five", knows_no_space)
    return repository


@pytest.fixture(
    scope="module", params=[pytest.param(False, marks=pytest.mark.long), True], ids=["ensemble", "fused"]
)
def served(request, repository) -> Iterator[Server]:
    releases.activate(repository, "r1")
    options = ServeOptions(port=0, metrics_port=None, fused=request.param, instances=1)
    with serve(repository, options) as server, service_process(repository):
        yield server


@pytest.mark.triton
def test_the_search_turns_with_the_route(served, repository, pictured_shop):
    known = pq.read_table(pictured_shop / "items.parquet").to_pylist()[4]
    with Client(served.url) as client:

        def answers(user: str) -> tuple[str, Degraded]:
            found = client.search(user, known["title"])
            assert found.item_ids[0] == known["item_id"]
            return found.release, found.degraded

        assert answers("u1")[0] == "r1"
        releases.activate(repository, "r2")
        assert answers("u1")[0] == "r2"
        canaries.canary(repository, "r1", 0.5)
        route = read_route(repository)
        assert route is not None
        places = route.places([user.encode() for user in USERS]).tolist()
        assert len(set(places)) == 2
        time.sleep(0.5)
        for user, place in zip(USERS, places, strict=True):
            assert answers(user) == (route.releases[place], Degraded(0))
        with pytest.raises(Exception, match="query_image: is no JPEG, PNG or WebP"):
            client.search("u1", image=b"none")
        canaries.abort(repository)
        canaries.canary(repository, "r3", 0.5)
        named = {client.recommend(user).release for user in USERS}
        assert named == {"r2", "r3"}
        assert {answers(user)[0] for user in USERS} == {"r2"}, "the canary has no search"
        canaries.abort(repository)
        releases.activate(repository, "r3", force=True)
        assert client.recommend("u1").release == "r3"
        assert not (repository / "search").exists()
        with pytest.raises(Unavailable, match="has no search"):
            client.search("u1", known["title"])
        releases.activate(repository, "r1", force=True)
        assert answers("u1")[0] == "r1"


@pytest.mark.triton
def test_a_live_item_is_found_by_a_served_search_at_once(served, repository):
    with Client(served.url) as client, ItemClient(repository) as items:
        items.add({"item_id": "fresh", "title": "Glimmerstone aurora tonic"})
        assert client.search("u1", "glimmerstone aurora").item_ids[:1] == ("fresh",)
        items.delete("fresh")
        assert "fresh" not in client.search("u1", "glimmerstone aurora").item_ids


@pytest.mark.triton
def test_an_item_without_a_title_or_a_picture_is_found_where_a_release_asks_the_other(
    served, repository, pictured_shop
):
    title, picture = best_told(pictured_shop, open_served(repository, "r4"))
    with Client(served.url) as client, ItemClient(repository) as items:
        items.add({"item_id": "untold", "image": picture})
        for name in ("r5", "r4", "r5"):  # forward, and back
            releases.activate(repository, name)
            found = client.search("u1", title, top_k=20)
            assert found.release == name
            assert found.items[0].item_id != "untold"
            twin = LocalPipeline(open_served(repository, name), "search")
            assert list(found.item_ids) == ids(twin, title)
            finders = {item.item_id: item.finders for item in found.items}
            assert finders.get("untold") == {"r4": ("shown",), "r5": None}[name]
        items.delete("untold")
        items.add({"item_id": "unseen", "title": title})
        for name in ("r4", "r5"):
            releases.activate(repository, name)
            found = client.search("u1", image=picture, top_k=20)
            finders = {item.item_id: item.finders for item in found.items}
            assert finders.get("unseen") == {"r4": ("told",), "r5": None}[name]
        items.delete("unseen")
