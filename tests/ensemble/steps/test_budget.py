"""Whose budget is spent gets what there is: recall's order, or the popular list; never nothing, and no
batch-mate notices."""

from __future__ import annotations

import json
import math
import time
from dataclasses import replace

import numpy as np
import pytest

from ensemble.budget import BUDGET, SENT, deadline_of
from ensemble.contract import Degraded
from ensemble.engines import EngineStep
from ensemble.local import LocalPipeline
from ensemble.options import (
    default_options,
    parse_options,
    stack,
    with_deadline,
)
from ensemble.steps import recall as recall_module

SPENT = Degraded.RANK_SKIPPED | Degraded.POPULAR


def users_of(twin: LocalPipeline, count: int) -> list[bytes]:
    return [one for one in twin.release.user_ids.sorted_ids[:count].tolist() if one][:count]


def recording(found: dict, name: str, run):
    """Runs a step and keeps what the outermost run gave."""

    def recorded(*arguments, **tensors):
        found[name] = run(*arguments, **tensors)
        return found[name]

    return recorded


def answer(twin: LocalPipeline, users: list[bytes], deadlines: tuple[float, ...], text: str = ""):
    options = replace(parse_options(text, len(users), twin.release.schema), deadlines=deadlines)
    return twin.run(options, {"user_id": np.array(users, "S")[:, None]})


def test_a_spent_budget_is_the_popular_list_and_batch_mates_are_unharmed(twin):
    users, never = users_of(twin, 3), math.inf
    whole = twin.recommend(users)
    mixed = answer(twin, users, (never, time.monotonic() - 1, never))
    assert (mixed["item_ids"][1] != b"").all()
    assert Degraded(int(mixed["degraded"][1, 0])) & SPENT == SPENT
    assert mixed["release"][1, 0] == whole["release"][1, 0]
    assert (np.diff(mixed["scores"][1]) < 0).all()
    for row in (0, 2):
        np.testing.assert_array_equal(mixed["item_ids"][row], whole["item_ids"][row])
        np.testing.assert_allclose(mixed["scores"][row], whole["scores"][row], rtol=1e-4, atol=1e-6)
        assert mixed["degraded"][row] == whole["degraded"][row]


def test_the_popular_list_keeps_to_the_request(twin):
    user = users_of(twin, 1)
    [first, *_] = answer(twin, user, (0.0,))["item_ids"][0]
    text = json.dumps({"exclude_items": json.dumps([first.decode()]), "top_k": 4})
    rest = answer(twin, user, (0.0,), text)["item_ids"][0]
    assert first not in rest.tolist()
    assert len(rest) == 4


def test_a_budget_spent_during_recall_leaves_its_order_and_the_ranker_alone(twin, monkeypatch):
    users = users_of(twin, 2)
    found = {}
    for name in ("recall", "ranker"):
        monkeypatch.setattr(twin.steps[name], "run", recording(found, name, twin.steps[name].run))
    sizes = []
    engine = twin.steps["ranker"].engine
    run = engine.run
    monkeypatch.setattr(
        engine, "run", lambda given: (sizes.append(len(given["candidate_features"])), run(given))[1]
    )
    scored = twin.steps["recall"]._scored
    soon = time.monotonic() + 0.15
    monkeypatch.setattr(twin.steps["recall"], "_scored", lambda *a: (time.sleep(0.2), scored(*a))[1])
    got = answer(twin, users, (soon, math.inf))
    assert Degraded(int(got["degraded"][0, 0])) & SPENT == Degraded.RANK_SKIPPED
    assert not int(got["degraded"][1, 0]) & SPENT
    rows = found["recall"]["candidate_rows"][0][:10]
    ids = twin.release.item_ids.ids_from_rows(rows)
    assert got["item_ids"][0].tolist() == ids.tolist()
    assert sizes == [1], "the ranker saw the other user alone"
    assert not found["ranker"]["candidate_probabilities"][0].any()
    assert np.isfinite(got["scores"]).all()
    assert recall_module.SPENT_S < 0.15


def test_an_engine_whose_users_are_all_late_answers_zeros(twin):
    step = twin.steps["ranker"]
    assert isinstance(step, EngineStep)
    model = twin.release.model("ranker")
    tensors = {t.name: np.zeros((3, *t.dims), t.dtype) for t in model.inputs}
    tensors["candidate_features"][:, 0, 0] = np.nan
    [out] = step.run(default_options(3), **tensors).values()
    assert out.shape[0] == 3
    assert np.isfinite(out).all()


def test_what_a_request_has_waited_for_counts_where_it_is_known():
    now = time.monotonic()
    assert deadline_of("{}") == math.inf
    assert deadline_of("", 50_000) == pytest.approx(now + 0.05, abs=0.02)
    sent = int((time.time() - 0.2) * 1e6)
    assert deadline_of(json.dumps({BUDGET: 300_000, SENT: sent})) == pytest.approx(now + 0.1, abs=0.02)
    ahead = int((time.time() + 100) * 1e6)
    assert deadline_of(json.dumps({BUDGET: 300_000, SENT: ahead})) == pytest.approx(now + 0.3, abs=0.02)


def test_a_budget_is_no_option_and_what_is_parsed_is_remembered(twin):
    schema = twin.release.schema
    texts = [
        json.dumps({BUDGET: 1, "top_k": 5, SENT: 2}),
        json.dumps({"top_k": 5, SENT: 9, BUDGET: 8}),
        json.dumps({"top_k": 5}),
    ]
    parsed = [parse_options(text, 1, schema) for text in texts]
    assert parsed[0] is parsed[2] or parsed[0] == parsed[2]
    assert parsed[1] == parsed[2]
    assert parse_options(json.dumps({BUDGET: 1, SENT: 2}), 1, schema) == default_options(1)
    joined = stack([parsed[0], with_deadline(parsed[1], 3.0)])
    assert joined.deadlines == (math.inf, 3.0)
