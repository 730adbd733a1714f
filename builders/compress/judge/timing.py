"""Measures how long a call takes next to another one, on a machine that others use too.

Both run in turns, now the one first, now the other, and the median of the turns' ratios counts. CPU time of
the one thread that computes: what other processes take is not counted, what they do to the caches hits both.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import numpy as np

from ensemble.arrays import Array
from ensemble.engines.onnx import open_session

Call = Callable[[], object]
_WARM_UP = 2  # turns that are not counted


def time_share(
    model: bytes, reference: bytes, feeds: Mapping[str, Array], batch: int, rounds: int = 15
) -> tuple[float, float]:
    """Gives (time of `model` as a share of the reference's, its standard error).

    One thread, `batch` users, onnxruntime as it serves.
    """
    repeats = max(1, 16 // batch)

    def call(engine: bytes) -> Call:
        session = open_session(engine)
        piece = {i.name: feeds[i.name][:batch] for i in session.get_inputs()}
        return lambda: [session.run(None, piece) for _ in range(repeats)]

    times = _turns(call(model), call(reference), least=rounds, most=rounds)
    ratios = times[:, 0] / np.maximum(times[:, 1], 1e-9)
    return float(np.median(ratios)), float(1.2533 * ratios.std() / np.sqrt(rounds))


def time_pair(ours: Call, reference: Call, *, limit_s: float = 1.0) -> tuple[float, float]:
    """Milliseconds of two calls: the reference's median, and that times the turns' median ratio."""
    times = _turns(ours, reference, least=15, most=200, limit_s=limit_s)
    reference_ms = float(np.median(times[:, 1])) * 1e3
    return reference_ms * float(np.median(times[:, 0] / times[:, 1])), reference_ms


def _turns(ours: Call, reference: Call, *, least: int, most: int, limit_s: float = 0.0) -> Array:
    """Seconds [turns, 2] of both calls: `least` turns, and more, up to `most`, while time is left."""
    times: list[list[float]] = []
    end = time.monotonic() + limit_s
    while len(times) < _WARM_UP + least or (time.monotonic() < end and len(times) < _WARM_UP + most):
        first, second = (ours, reference) if len(times) % 2 else (reference, ours)
        spent = [_seconds(first), _seconds(second)]
        times.append(spent if len(times) % 2 else spent[::-1])
    return np.array(times[_WARM_UP:])


def _seconds(call: Call) -> float:
    start = time.thread_time()
    call()
    return time.thread_time() - start
