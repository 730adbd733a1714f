"""Everything that changes a repository, in any order, against a plain model of what every answer must be.

The catalogue is changed, merged and compacted; releases are activated, tried on a share of the users,
promoted, taken out, removed and brought back under their names; users do things, rows are loaded into Redis,
and Redis goes, stands still and comes back empty; the writer is killed at any moment, overlays are lost, and
steps start again. After each step the release that the route names for a user answers with the list that the
model says, and a second reader sees the same. `make soak` goes on for long.
"""

from __future__ import annotations

import os
from functools import partial
from typing import Any

import pytest
from any_order_answers import DEADLINE_MS, NEWCOMER, USERS, Triton, Twins
from any_order_machine import BRANDS, NAMES, AnyOrder, machine
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from ensemble.server import process as server_process
from ensemble.tiers.settings import TierSettings

SOAK, STEPS = int(os.environ.get("PEREGRINE_SOAK", "0")), 20  # examples of `make soak`


def run_in_any_order(machine: type[AnyOrder], examples: int) -> None:
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=STEPS,
            deadline=None,
            derandomize=not SOAK,
            phases=(Phase.generate, Phase.shrink) if SOAK else (Phase.generate,),
            suppress_health_check=list(HealthCheck),
        ),
    )


# One life of a repository, in which everything happens that may: few examples in any order leave much out.
ADDED = {"operation": "add", "item_id": "new-0", "values": {"brand": BRANDS[0]}}
STORY: list[tuple[str, dict[str, Any]]] = [
    ("start", {"loaded": NAMES}),
    ("users_do_things", {"events": [(b"u1", "i1", 5), (b"u1", "i2", 3), (NEWCOMER, "i3", 4)]}),
    ("users_do_things", {"events": [(b"u2", "new-0", 9)]}),
    ("change", ADDED),
    ("users_do_things", {"events": [(b"u1", "new-0", 2), (b"u1", "i1", 1), (b"u2", "i4", 2)]}),
    ("merge_to_the_end", {}),
    ("try_the_other", {"share": 0.5}),
    ("users_do_things", {"events": [(user, "i5", 7) for user in USERS]}),
    ("a_second_reader_agrees", {}),
    ("take_out", {}),
    ("activate", {"name": "r2"}),
    ("change", {**ADDED, "operation": "delete", "values": {}}),
    ("redis_stands_still", {}),
    ("redis_goes", {}),
    ("users_do_things", {"events": [(b"u3", "i6", 8)]}),
    ("start_the_steps_again", {}),
    ("redis_comes_back", {"names": ("r2",)}),
    ("remove_the_other", {}),
    ("users_do_things", {"events": [(b"u3", "i7", 9)]}),
    ("bring_the_other_back", {}),
    ("load", {"name": "r1"}),
    ("redis_goes", {}),
    ("redis_comes_back", {"names": NAMES}),
    ("change_while_the_writer_is_killed", {"item_id": "new-1", "delay_s": 0.01}),
    ("compact", {}),
    ("lose_the_overlays", {}),
    ("try_the_other", {"share": 0.9}),
    ("merge", {}),
    ("promote", {}),
]


def live_through(machine: type[AnyOrder]) -> None:
    one = machine()
    try:
        for name, values in STORY:
            getattr(one, name)(**values)
            one.the_active_release_answers_as_the_model_says()
    finally:
        one.teardown()


def test_everything_that_may_happen_is_in_the_story():
    rules = {name for name, one in vars(AnyOrder).items() if hasattr(one, "hypothesis_stateful_rule")}
    assert {name for name, _ in STORY[1:]} == rules


@pytest.mark.redis
@pytest.mark.timeout(600)
def test_any_order_of_features_gives_what_the_model_says(two_variants, tiny_shop, tmp_path):
    run_in_any_order(machine(Twins, two_variants, tiny_shop, tmp_path), SOAK or 5)


@pytest.mark.redis
@pytest.mark.timeout(600)
def test_one_life_of_a_repository(two_variants, tiny_shop, tmp_path):
    live_through(machine(Twins, two_variants, tiny_shop, tmp_path))


@pytest.mark.redis
@pytest.mark.triton
@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("fused", [False, True], ids=["ensemble", "fused"])
def test_any_order_of_features_on_a_real_server(two_variants, tiny_shop, tmp_path, fused, monkeypatch):
    monkeypatch.setattr(server_process.tiers, "TierSettings", partial(TierSettings, deadline_ms=DEADLINE_MS))
    served = machine(partial(Triton, fused=fused), two_variants, tiny_shop, tmp_path)
    live_through(served)
    run_in_any_order(served, SOAK or 1)
