"""An index in shards meets filters, exclusions and batch-mates: the lists are those of the whole index."""

import numpy as np

from ensemble.engines import SHARDS_VARIABLE
from ensemble.index.sharded import ShardedIndex
from ensemble.local import LocalPipeline
from ensemble.steps.served import open_served


def wishes(release, user):
    """Gives a user's options, which differ from the next one's."""
    name, values = next(iter(release.vocabularies["items"].items()))
    known = [item.decode() for item in release.item_ids.ids_from_rows(np.arange(1, 40))]
    return [
        {},
        {"allow": {name: values[:1]}},
        {"deny": {name: values[1:2]}, "top_k": 30},
        {"exclude_items": known, "exclude_seen": False},
    ][user % 4]


def test_lists_of_shards_are_those_of_the_whole(tiny_repository, monkeypatch):
    whole = LocalPipeline(open_served(tiny_repository, "r1"))
    monkeypatch.setenv(SHARDS_VARIABLE, "3")
    cut = LocalPipeline(open_served(tiny_repository, "r1"))
    assert isinstance(cut.release.live.view.state.main, ShardedIndex)
    rows = np.arange(1, 33)
    users = [bytes(user) for user in whole.release.user_ids.ids_from_rows(rows)]
    given = [wishes(whole.release, user) for user in range(len(users))]
    wanted, found = whole.recommend(users, given), cut.recommend(users, given)
    assert (found["item_ids"] == wanted["item_ids"]).all()
    np.testing.assert_allclose(found["scores"], wanted["scores"], atol=1e-5)
