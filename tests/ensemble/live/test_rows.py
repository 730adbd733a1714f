"""Items that the log has changed are the log's; all others come through the tiers, also beside them in one
line of rows."""

from __future__ import annotations

import json
import shutil
import time

import numpy as np
import pytest
from random_release import write_item_encoder
from reading import wait_until
from shops import private_copy

from clients.event_checks import ItemUpdate
from clients.events import EventWriter, Outcome
from ensemble.contract import Degraded
from ensemble.live.items import LiveItems
from ensemble.live.rows import read_items
from ensemble.live.writer import ItemWriter
from ensemble.local import LocalPipeline
from ensemble.options import default_options
from ensemble.release.manifest import sealed
from ensemble.release.snapshot import gather
from ensemble.steps.features import FeatureLookup
from ensemble.steps.served import open_served
from ensemble.tiers.load import load_release
from ensemble.tiers.settings import VARIABLE, TierSettings, write_settings

pytestmark = [pytest.mark.redis, pytest.mark.timeout(120)]
NEW, CHANGED, EVENTED, BOTH = 121, 5, 6, 7


def name(release, row: int) -> str:
    return release.item_ids.ids_from_rows(np.array([row]))[0].decode()


def test_the_log_wins_over_redis_and_redis_over_the_snapshot(server, release, open_readers):
    write_item_encoder(release)
    readers, live = open_readers(server), LiveItems(release)
    vectors = {"fresh": [9.0] * 8, name(release, CHANGED): [8.0] * 8, name(release, BOTH): [7.0] * 8}
    ItemWriter(release).apply(
        [
            {"op": "upsert", "item": {"item_id": one, "item_embedding": vector}}
            for one, vector in vectors.items()
        ]
    )
    with EventWriter(server.url, release.schema.shop) as events:
        for row in (EVENTED, BOTH):
            assert events.update_item(
                ItemUpdate(name(release, row), 1.0, features=[-1.0, -2.0, -3.0])
            ).changed
    rows = np.array([[NEW, CHANGED, EVENTED], [BOTH, 8, -1]])
    view = live.refresh()
    wait_until(lambda: (read_items(readers.items, view, rows).field("features")[0, 2] == [-1, -2, -3]).all())
    found = read_items(readers.items, view, rows)
    slots = view.state.slots[:3]
    np.testing.assert_array_equal(found.field("embedding")[:, :2].reshape(4, 8)[:3, 0], [9, 8, 7])
    np.testing.assert_array_equal(
        found.field("features"),
        [
            [*slots["features"][:2], [-1, -2, -3]],
            [slots["features"][2], release.items["features"][8], [0] * 3],
        ],
    )
    np.testing.assert_array_equal(found.at(np.array([1]), np.array([0])).field("embedding"), [[7] * 8])
    assert found.status_of_users().tolist() == [0, 0]


@pytest.mark.parametrize("is_made_again", [False, True])
def test_who_saw_what_is_deleted_is_answered_alike_before_and_after_a_merge(
    tiny_repository, tmp_path, is_made_again
):
    """An overlay that is made again has the deleted items' rows, and no content of them."""
    repository = private_copy(tiny_repository, tmp_path / "repository")
    writer = ItemWriter(open_served(repository, "r1"))
    writer.apply([{"op": "update", "item": {"item_id": "i1", "price": 9.5}}])
    writer.apply([{"op": "add", "item": {"item_id": "fresh", "price": 1.0}}])
    writer.apply([{"op": "delete", "item": {"item_id": one}} for one in ("i1", "fresh")])
    writer.close()
    asked = (["u1", "u2"], {"session_items": [["i1", "fresh"], []], "top_k": 5})
    wanted = LocalPipeline(open_served(repository, "r1")).recommend(*asked)
    if is_made_again:
        shutil.rmtree(writer.release.live_folder)
        ItemWriter(open_served(repository, "r1")).close()
    pipeline = LocalPipeline(open_served(repository, "r1"))
    assert pipeline.release.live.view.num_slots == (0 if is_made_again else 2)
    found = pipeline.recommend(*asked)
    np.testing.assert_array_equal(found["item_ids"], wanted["item_ids"])
    np.testing.assert_array_equal(found["scores"], wanted["scores"])


def test_what_the_log_has_is_not_stale_when_redis_is_gone(own_server, release, open_readers):
    write_item_encoder(release)
    readers, live = open_readers(own_server), LiveItems(release)
    ItemWriter(release).apply([{"op": "add", "item": {"item_id": "fresh", "item_embedding": [9.0] * 8}}])
    own_server.kill()
    found = read_items(readers.items, live.refresh(), np.array([[NEW, -1], [NEW, CHANGED]]))
    assert [bool(bits) for bits in found.status_of_users()] == [False, True]
    np.testing.assert_array_equal(found.field("embedding")[:, 0], [[9] * 8] * 2)
    np.testing.assert_array_equal(found.field("embedding")[1, 1], release.items["embedding"][CHANGED])


@pytest.mark.parametrize("rows", [[[0, -1]], [[0, 5, -1], [7, 7, 0]]])
def test_an_item_that_nobody_knows_is_the_same_with_redis_and_without(server, release, open_readers, rows):
    found = open_readers(server).items.read_items(np.array(rows))
    for field in ("embedding", "features"):
        wanted = gather(np.array(rows), release.items, field)
        np.testing.assert_array_equal(found.field(field), wanted)


def test_events_name_items_that_were_added_live(server, tiny_repository, tiny_release, monkeypatch, tmp_path):
    """Also those that were added after the writer was opened; who has no log of them leaves them out of the
    past, and says so."""
    repository, name, user = (
        private_copy(tiny_repository, tmp_path / "repository"),
        tiny_release.name,
        tiny_release.user_ids.sorted_ids[3],
    )
    load_release(tiny_release, server.url)
    write_settings(tmp_path / "tiers.json", TierSettings(server.url, deadline_ms=250))
    monkeypatch.setenv(VARIABLE, str(tmp_path / "tiers.json"))
    event = (user.decode(), "fresh", tiny_release.schema.events[0], time.time())

    def features_of_user():
        release = open_served(repository, name)
        step = FeatureLookup(tiny_release.model("features"), release)
        found = step.run(default_options(1), user_id=np.array([[user]]))
        release.readers.close()
        return found

    with EventWriter(server.url, tiny_release.schema.shop) as blind:
        assert blind.record_event(*event) == Outcome(unknown_items=("fresh",))
    with EventWriter(server.url, tiny_release.schema.shop, repository=repository) as events:
        assert events.record_event(*event) == Outcome(unknown_items=("fresh",))
        ItemWriter(open_served(repository, name)).apply([{"op": "add", "item": {"item_id": "fresh"}}])
        assert events.record_event(*event) == Outcome(changed=1)
    found = features_of_user()
    assert found["seen_rows"][0, -1] == len(tiny_release.items)
    assert found["history_embeddings"][0, -1].any()
    assert found["user_status"][0, 0] == 0
    (repository / ".live").rename(repository / ".elsewhere")
    without = features_of_user()
    assert without["user_status"][0, 0] == Degraded.UNKNOWN_ITEMS
    np.testing.assert_array_equal(without["seen_rows"][0], [-1, *found["seen_rows"][0, :-1]])


def test_an_old_release_in_the_repository_costs_no_events(server, tiny_repository, tiny_release, tmp_path):
    repository = private_copy(tiny_repository, tmp_path / "repository")
    load_release(tiny_release, server.url)
    manifest = repository / tiny_release.name / "manifest.json"
    manifest.write_text(sealed({**json.loads(manifest.read_text()), "contract": "another"}))
    user, item = tiny_release.user_ids.sorted_ids[3].decode(), name(tiny_release, 1)
    with EventWriter(server.url, tiny_release.schema.shop, repository=repository) as events:
        assert events.record_event(user, item, tiny_release.schema.events[0], time.time()) == Outcome(
            changed=1
        )
