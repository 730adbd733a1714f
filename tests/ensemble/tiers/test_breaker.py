"""The circuit breaker, with a clock that only the test moves."""

from __future__ import annotations

from ensemble.tiers.breaker import Breaker


def test_it_opens_after_failures_in_a_row_and_lets_one_call_try_at_a_time():
    now = [0.0]
    breaker = Breaker(3, 10.0, clock=lambda: now[0])
    for _ in range(5):
        assert breaker.allow()
        breaker.failure()
        assert breaker.allow()
        breaker.success()  # not in a row
    for _ in range(3):
        assert breaker.allow()
        breaker.failure()
    assert breaker.state == "open"
    now[0] += 7.9  # jitter is 20 %
    assert not breaker.allow()
    now[0] += 4.2
    assert breaker.state == "half_open"
    assert [breaker.allow() for _ in range(4)] == [True, False, False, False]
    breaker.failure()
    assert not breaker.allow()
    now[0] += 12.1
    assert breaker.allow()
    breaker.success()
    assert breaker.state == "closed"
    assert [breaker.allow() for _ in range(4)] == [True] * 4
    assert breaker.opened == 2


def test_one_that_hurries_lets_one_call_try_at_once_and_stays_open_if_that_fails():
    now = [0.0]
    breaker = Breaker(1, 10.0, clock=lambda: now[0])
    breaker.hurry()
    assert breaker.state == "closed"
    breaker.failure()
    assert not breaker.allow()
    breaker.hurry()
    assert [breaker.allow() for _ in range(2)] == [True, False]
    breaker.failure()
    assert not breaker.allow()


def test_processes_do_not_try_in_step():
    now, opened_at = [0.0], []
    for _ in range(50):
        now[0] = 0.0
        breaker = Breaker(1, 10.0, clock=lambda: now[0])
        breaker.allow()
        breaker.failure()
        while not breaker.allow():
            now[0] += 0.1
        opened_at.append(now[0])
    assert min(opened_at) >= 8 - 0.11
    assert max(opened_at) <= 12 + 0.11
    assert max(opened_at) - min(opened_at) > 2
