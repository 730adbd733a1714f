"""A canary that keeps the limits goes on; one that breaks any of them is named with what was seen."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from ensemble.release.route import Route, Share
from ensemble.server.guard import Guard, Limits, Numbers, read_numbers
from ensemble.server.router_files import NUMBERS
from ensemble.steps.routing import Counts

ROUTE = Route((Share("r1", 0.9), Share("r2", 0.1)), "s", 4)
EACH = 20  # requests between two looks


def grow(
    counts: Counts,
    rng: np.random.Generator,
    failed=0.0,
    refused=0.0,
    degraded=0.02,
    empty=0.005,
    seconds=0.01,
    score=1.0,
    requests=EACH,
) -> None:
    """What so many requests of two lists each add."""
    for _ in range(requests):
        if rng.random() < failed:
            counts.failure()
        elif rng.random() < refused:
            counts.refusal()
        else:
            scores = rng.lognormal(np.log(score), 0.3, (2, 3)).astype(np.float32)
            scores[rng.random(2) < empty] = 0
            flags = (rng.random((2, 1)) < degraded).astype(np.int64)
            answer = {"scores": scores, "probabilities": scores[..., None], "degraded": flags}
            counts.answer(seconds * rng.lognormal(0, 0.4), answer, 0.5)


def numbers(counts: Counts) -> Numbers:
    return Numbers(**vars(counts))


def copied(counts: Counts) -> Counts:
    other = Counts()
    vars(other).update({k: v.copy() if hasattr(v, "copy") else v for k, v in vars(counts).items()})
    return other


def watch(rng: np.random.Generator, looks: int, **canary: float) -> tuple[str, int]:
    """What the guard says, and after how many of the canary's requests. It gets a fifth of the traffic."""
    guard, main, tried = Guard(ROUTE), Counts(), Counts()
    for look in range(1, looks + 1):
        grow(main, rng, requests=4 * EACH)
        grow(tried, rng, **canary)
        if said := guard.verdict(numbers(copied(main)), numbers(copied(tried))):
            return said, look * EACH
    return "", looks * EACH


WORSE = {
    "failed": ({"failed": 0.2}, 400, r"% of \d+ requests failed or were late; the main release: 0\.0% of "),
    "refused": ({"refused": 0.2}, 400, "requests were refused"),
    "degraded": ({"degraded": 0.3}, 400, "lists were degraded"),
    "empty": ({"empty": 0.3}, 400, "lists were empty or of one score"),
    "slow": ({"seconds": 0.2}, 400, r"requests took longer than \d+ ms"),
    "strange": ({"score": 30.0}, 400, "lists have a best score unlike the main release's"),
}


@pytest.mark.parametrize("name", WORSE)
def test_what_is_worse_is_taken_out_soon_and_named(rng, name):
    worse, within, words = WORSE[name]
    said, after = watch(rng, within // EACH, **worse)
    assert re.search(words, said), said
    assert Limits().minimum <= after <= within


def test_what_is_alike_or_a_little_worse_goes_on():
    """Ten canaries of 2,000 requests; failures of half a percent and a tenth slower are within the limits."""
    for seed in range(5):
        assert watch(np.random.default_rng(seed), 100) == ("", 2000)
        worse = {"failed": 0.005, "seconds": 0.011, "degraded": 0.04, "score": 1.1}
        assert watch(np.random.default_rng(100 + seed), 100, **worse) == ("", 2000)


def test_below_the_minimum_nothing_is_said(rng):
    guard, main, tried = Guard(ROUTE), Counts(), Counts()
    grow(main, rng, requests=5000)
    grow(tried, rng, failed=1.0, requests=Limits().minimum - 1)
    assert guard.is_short(numbers(main), numbers(tried))
    assert guard.verdict(numbers(main), numbers(tried)) == ""
    grow(tried, rng, failed=1.0, requests=1)
    assert "100.0% of 50 requests failed or were late" in guard.verdict(numbers(main), numbers(tried))


def test_a_machine_that_is_slow_for_both_takes_nobody_out(rng):
    """Half of the main release's answers come later than the canary is waited for; half of its own fail."""
    guard, main, tried = Guard(ROUTE), Counts(), Counts()
    for _ in range(30):
        grow(main, rng, seconds=0.5)
        grow(tried, rng, failed=0.5, seconds=0.3)
        assert guard.verdict(numbers(copied(main)), numbers(copied(tried))) == ""
    assert 0.3 < main.late / main.requests < 0.7


@pytest.mark.parametrize(("tried_s", "is_worse"), [(0.07, False), (0.3, True)])
def test_what_is_slow_is_said_anew_at_another_load(rng, tried_s, is_worse):
    """At rest both take 10 ms; then the main release takes 40, and three of four canary's requests would have
    been slow."""
    guard, main, tried = Guard(ROUTE), Counts(), Counts()
    said = ""
    for look in range(60):
        is_busy = look >= 20
        grow(main, rng, requests=4 * EACH, seconds=0.04 if is_busy else 0.01)
        grow(tried, rng, seconds=tried_s if is_busy else 0.01)
        said = said or guard.verdict(numbers(copied(main)), numbers(copied(tried)))
    assert bool(said) == is_worse, said
    assert not is_worse or "requests took longer than" in said


def test_a_server_that_began_anew_is_judged_anew(rng):
    guard, main, tried = Guard(ROUTE), Counts(), Counts()
    for counts in (main, tried):
        grow(counts, rng, requests=200)
    assert guard.verdict(numbers(copied(main)), numbers(copied(tried))) == ""
    main, tried = Counts(), Counts()
    for counts in (main, tried):
        grow(counts, rng, requests=100, seconds=0.2)  # slower than before, both
    for _ in range(20):
        for counts in (main, tried):
            grow(counts, rng, seconds=0.2)
        assert guard.verdict(numbers(copied(main)), numbers(copied(tried))) == ""


def test_the_numbers_of_all_instances_are_added_up_and_other_routers_are_not(tmp_path, rng):
    assert read_numbers(tmp_path, ROUTE) is None
    (tmp_path / NUMBERS).mkdir()
    both = []
    for instance in range(2):
        main, canary = Counts(), Counts()
        grow(main, rng)
        grow(canary, rng, requests=3)
        both.append((main, canary))
        for name, sequence in ((f"route_4_0_{instance}", 4), (f"route_40_0_{instance}", 40)):
            text = {"sequence": sequence, "releases": {"r1": main.to_json(), "r2": canary.to_json()}}
            (tmp_path / NUMBERS / f"{name}.json").write_text(json.dumps(text))
    (tmp_path / NUMBERS / "route_4_0_2.json").write_text("{")
    main, canary = read_numbers(tmp_path, ROUTE)
    assert (main.requests, canary.requests) == (2 * EACH, 6)
    assert (main.scores == both[0][0].scores + both[1][0].scores).all()
    assert canary.lists == sum(one.lists for _, one in both)
