"""The context of a request: read for each user of a batch, by the twin of a real release."""

import json

import numpy as np
import pytest

from clients.wire import call_from_options
from ensemble.contract import Degraded
from ensemble.errors import InvalidArgument


def _ask(twin, users, **options):
    return twin.recommend(users, {"top_k": 50, **options})


def _same(first, second):
    assert first["item_ids"].tolist() == second["item_ids"].tolist()
    np.testing.assert_allclose(first["probabilities"], second["probabilities"], atol=1e-5)


def test_each_user_has_an_own_context_whatever_the_batch_mates_say(twin):
    users = twin.release.user_ids.sorted_ids[:4]
    contexts = [{"device": "phone", "hour": 3}, {}, {"device": "tv"}, {"device": "desktop"}]
    together = _ask(twin, users, context=json.dumps(contexts))
    for place, (user, context) in enumerate(zip(users, contexts, strict=True)):
        alone = _ask(twin, [user], context=json.dumps(context))
        _same({name: array[place : place + 1] for name, array in together.items()}, alone)
    said = Degraded.UNKNOWN_CONTEXT
    assert (together["degraded"][:, 0] & said).tolist() == [0, 0, said, 0]


def test_a_context_changes_probabilities_and_nothing_said_is_no_context(twin):
    [user] = twin.release.user_ids.sorted_ids[:1]
    plain = _ask(twin, [user])
    for nothing in ("{}", '{"device": null}', '{"device": null, "hour": null}'):
        _same(_ask(twin, [user], context=nothing), plain)
    ids = plain["item_ids"][0].tolist()
    other = _ask(twin, [user], context='{"device": "phone"}')
    values = dict(zip(other["item_ids"][0].tolist(), other["probabilities"][0], strict=True))
    shared = [place for place, item in enumerate(ids) if item in values]
    gaps = [np.abs(values[ids[place]] - plain["probabilities"][0][place]).max() for place in shared]
    assert max(gaps) > 1e-5


def test_a_feature_that_the_release_lacks_is_refused_by_name(twin):
    with pytest.raises(InvalidArgument, match='context: no context feature "devise"; known: device, hour'):
        _ask(twin, twin.release.user_ids.sorted_ids[:1], context='{"devise": "phone"}')


def test_clients_send_it_as_it_is_one_for_all_or_one_each():
    one = call_from_options(["a", "b"], {"context": {"device": "phone", "hour": 3}}, None, per_user=True)
    assert json.loads(one.parameters["context"]) == {"device": "phone", "hour": 3}
    each = call_from_options(["a", "b"], {"context": [{"device": "tv"}, None]}, None, per_user=True)
    assert json.loads(each.parameters["context"]) == [{"device": "tv"}, {}]
