"""How long an engine takes next to another one, on a machine that others use too."""

from __future__ import annotations

import time
from collections.abc import Mapping

import numpy as np

from builders.compress.calibration import open_session

Array = np.ndarray


def time_share(model: bytes, reference: bytes, feeds: Mapping[str, Array], batch: int, rounds: int = 15) -> tuple[float, float]:
    """(time of `model` as a share of the reference's, its standard error), one thread, `batch` users, onnxruntime as it serves.

    Both run in turns and the median of the rounds' ratios is taken. CPU time of the one thread that computes: what other
    processes take is not counted, what they do to the caches hits both.
    """
    sessions = [open_session(reference), open_session(model)]
    piece = [{i.name: feeds[i.name][:batch] for i in session.get_inputs()} for session in sessions]
    repeats = max(1, 16 // batch)
    ratios = []
    for turn in range(rounds + 2):  # the first two warm up
        spent = []
        for place in (0, 1) if turn % 2 else (1, 0):
            start = time.thread_time()
            for _ in range(repeats):
                sessions[place].run(None, piece[place])
            spent.append((place, time.thread_time() - start))
        by_place = dict(spent)
        ratios.append(by_place[1] / max(by_place[0], 1e-9))
    kept = np.array(ratios[2:])
    return float(np.median(kept)), float(1.2533 * kept.std() / np.sqrt(len(kept)))
