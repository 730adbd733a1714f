"""Reads what is left of a request's budget, which its parameters bring along.

`budget_us` is what is left when the request is sent, in microseconds; `sent_us` when that was, in
microseconds since 1970, for a server on the same machine.
"""

from __future__ import annotations

import math
import re
import time

BUDGET, SENT = "budget_us", "sent_us"
_WITH_BUDGET = re.compile(rf',?\s*"(?:{BUDGET}|{SENT})":\s*"?\d+"?')
_BUDGET, _SENT = (re.compile(rf'"{name}":\s*"?(\d{{1,18}})"?') for name in (BUDGET, SENT))
_LONGEST_WAIT_S = 600.0  # nobody waits longer: a clock was set


def without_budget(parameters: str) -> str:
    """Gives a request's parameters, JSON as Triton gives it, without what is said of its budget."""
    return _WITH_BUDGET.sub("", parameters).replace("{,", "{") if BUDGET in parameters else parameters


def deadline_of(parameters: str, timeout_us: int = 0) -> float:
    """Gives the moment on the monotonic clock at which a request's budget is spent; infinite without one.

    What it has waited for is known where the caller, on this machine, has said when it was sent; else it
    counts from now. `timeout_us` is Triton's own, 0 for none.
    """
    budget = _BUDGET.search(parameters) if BUDGET in parameters else None
    budget_us = int(budget[1]) if budget else timeout_us
    if budget_us <= 0:
        return math.inf
    sent = _SENT.search(parameters)
    waited_s = time.time() - int(sent[1]) / 1e6 if sent else 0.0
    return time.monotonic() + budget_us / 1e6 - (waited_s if 0 < waited_s < _LONGEST_WAIT_S else 0.0)
