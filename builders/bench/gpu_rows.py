"""Holds one line of gpu-check's table, which travels between its processes as JSON."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

_REPEATS = 50


@dataclass(frozen=True)
class Row:
    """Holds one line of the check's table; `ms` and `error` are None where there is nothing to say."""

    part: str  # compile, engines, onnxruntime, torch, faiss, twin, triton
    what: str
    runtime: str
    precision: str = ""
    batch: int = 0
    ms: float | None = None
    error: float | None = None  # relative to the largest output, or the share of neighbours that differ
    tolerance: float | None = None
    roofline: float | None = None  # share of what the GPU could do: 1 = at its peak
    rate: float | None = None  # users a second
    note: str = ""

    @property
    def is_wrong(self) -> bool:
        """Numbers off by more than their precision may be (NaN included)."""
        return self.error is not None and self.tolerance is not None and not self.error <= self.tolerance

    def to_json(self) -> str:
        """Writes the row as one line of strict JSON: an error that is not a number is a text."""
        facts = dataclasses.asdict(self)
        if self.error is not None and not math.isfinite(self.error):
            facts["error"] = str(self.error)
        return json.dumps(facts, allow_nan=False)

    @staticmethod
    def from_json(line: str) -> Row:
        """Reads what to_json wrote."""
        facts: dict[str, Any] = json.loads(line)
        if isinstance(facts["error"], str):
            facts["error"] = float(facts["error"])
        return Row(**facts)

    def __str__(self) -> str:
        numbers = [
            f"{self.ms:.3f} ms" if self.ms is not None else "",
            f"{self.rate:,.0f} users/s" if self.rate is not None else "",
            f"error {self.error:.1e} (may be {self.tolerance:.0e})" if self.error is not None else "",
            f"{self.roofline:.1%} of the roofline" if self.roofline is not None else "",
        ]
        batch = f"batch {self.batch}" if self.batch else ""
        words = [self.part, self.what, self.runtime, self.precision, batch, *numbers]
        return ("WRONG " if self.is_wrong else "") + " · ".join(
            [*filter(None, words), *filter(None, [self.note])]
        )


def first_line(error: BaseException) -> str:
    """Gives the kind of an error and the first line of its text."""
    text = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {text[:200]}"


def guarded(part: str, what: str, rows: Callable[[], Iterable[Row]]) -> Iterable[Row]:
    """Gives the rows; what fails says why in a row of its own, and the next goes on."""
    try:
        yield from rows()
    except Exception as error:  # a check goes on, whatever a runtime throws
        yield Row(part, what, "failed", note=first_line(error))


def wall_ms(call: Callable[[], Any], at_most_s: float = 0.4) -> float:
    """Gives a call's median milliseconds, after one to warm up.

    It is the median of as many calls as fit `at_most_s`, of three at least.
    """
    call()
    times: list[float] = []
    while len(times) < 3 or (sum(times) < at_most_s and len(times) < _REPEATS):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return statistics.median(times) * 1e3
