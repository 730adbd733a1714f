"""Counts a tier's latencies in a histogram of plain numbers."""

from __future__ import annotations

from dataclasses import dataclass, field

from ensemble.telemetry import Metric

LATENCY_BOUNDS_US = (100, 250, 500, 1000, 2500, 5000, 10_000)


@dataclass
class Latencies:
    """Holds a histogram: calls at or under each of LATENCY_BOUNDS_US, all calls, their sum."""

    counts: list[int] = field(default_factory=lambda: [0] * len(LATENCY_BOUNDS_US))
    total: int = 0
    sum_us: float = 0.0

    def add(self, seconds: float) -> None:
        """Counts one call."""
        micros = seconds * 1e6
        self.total += 1
        self.sum_us += micros
        for i, bound in enumerate(LATENCY_BOUNDS_US):
            self.counts[i] += micros <= bound

    def metrics(self, **labels: str) -> list[Metric]:
        """Gives the histogram as Prometheus wants it."""
        base = tuple(labels.items())
        bounds = [*map(str, LATENCY_BOUNDS_US), "+Inf"]
        out = [
            Metric("peregrine_tier_latency_us_bucket", (*base, ("le", b)), float(n))
            for b, n in zip(bounds, [*self.counts, self.total], strict=True)
        ]
        return [
            *out,
            Metric("peregrine_tier_latency_us_sum", base, self.sum_us),
            Metric("peregrine_tier_latency_us_count", base, float(self.total)),
        ]
