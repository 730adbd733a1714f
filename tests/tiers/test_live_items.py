"""Items that the log has changed are the log's; all others come through the tiers, also beside them in one line of rows."""

from __future__ import annotations

import numpy as np
import pytest
from random_release import write_item_encoder
from reading import wait_until

from clients.event_checks import ItemUpdate
from clients.events import EventWriter
from ensemble.live.items import LiveItems
from ensemble.live.rows import read_items
from ensemble.live.writer import ItemWriter

pytestmark = [pytest.mark.redis, pytest.mark.timeout(120)]
NEW, CHANGED, EVENTED, BOTH = 121, 5, 6, 7


def name(release, row: int) -> str:
    return release.item_ids.ids_from_rows(np.array([row]))[0].decode()


def test_the_log_wins_over_redis_and_redis_over_the_snapshot(server, release, open_readers):
    write_item_encoder(release)
    readers, live = open_readers(server), LiveItems(release)
    vectors = {"fresh": [9.0] * 8, name(release, CHANGED): [8.0] * 8, name(release, BOTH): [7.0] * 8}
    ItemWriter(release).apply([{"op": "upsert", "item": {"item_id": one, "item_embedding": vector}} for one, vector in vectors.items()])
    with EventWriter(server.url, release.schema.shop) as events:
        for row in (EVENTED, BOTH):
            assert events.update_item(ItemUpdate(name(release, row), 1.0, features=[-1.0, -2.0, -3.0])).changed
    rows = np.array([[NEW, CHANGED, EVENTED], [BOTH, 8, -1]])
    view = live.refresh()
    wait_until(lambda: (read_items(readers.items, view, rows).field("features")[0, 2] == [-1, -2, -3]).all())
    found = read_items(readers.items, view, rows)
    slots = view.state.slots[:3]
    np.testing.assert_array_equal(found.field("embedding")[:, :2].reshape(4, 8)[:3, 0], [9, 8, 7])
    np.testing.assert_array_equal(
        found.field("features"), [[*slots["features"][:2], [-1, -2, -3]], [slots["features"][2], release.items["features"][8], [0] * 3]]
    )
    np.testing.assert_array_equal(found.at(np.array([1]), np.array([0])).field("embedding"), [[7] * 8])
    assert found.status_of_users().tolist() == [0, 0]


def test_what_the_log_has_is_not_stale_when_redis_is_gone(own_server, release, open_readers):
    write_item_encoder(release)
    readers, live = open_readers(own_server), LiveItems(release)
    ItemWriter(release).apply([{"op": "add", "item": {"item_id": "fresh", "item_embedding": [9.0] * 8}}])
    own_server.kill()
    found = read_items(readers.items, live.refresh(), np.array([[NEW, -1], [NEW, CHANGED]]))
    assert [bool(bits) for bits in found.status_of_users()] == [False, True]
    np.testing.assert_array_equal(found.field("embedding")[:, 0], [[9] * 8] * 2)
    np.testing.assert_array_equal(found.field("embedding")[1, 1], release.items["embedding"][CHANGED])
