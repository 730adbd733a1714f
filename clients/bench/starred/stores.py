"""Stops Redis while features are asked of it."""

from __future__ import annotations

import signal
import time

from clients.bench.faults import recovery
from clients.bench.starred.load import Note, Row
from clients.bench.starred.setting import Setting
from ensemble.contract import Degraded

STOPPED_S = 5.0
_ROWS = Degraded.FEATURES_STALE | Degraded.FEATURES_MISSING


def redis(setting: Setting) -> list[Row]:
    """Stops the redis-server that features come from; it goes on after 5 s."""
    assert setting.redis is not None
    bench, process = setting.bench, setting.redis.process

    def harm() -> None:
        process.send_signal(signal.SIGSTOP)
        time.sleep(STOPPED_S)
        process.send_signal(signal.SIGCONT)

    notes, began = bench.run(harm)
    row = bench.row("redis", notes, began)
    after = [
        (round(done - bench.harmed, 3), _is_bad(note)) for note in notes if (done := note[1]) > bench.harmed
    ]
    row |= recovery(sorted(after))
    flagged = [note for note in notes if note[3] is not None and note[3].degraded & _ROWS]
    row["flagged_before"] = sum(done < began for _, done, *_ in flagged)
    row["flagged_during"] = sum(began <= done <= bench.harmed for _, done, *_ in flagged)
    row["faults"] = [] if row["flagged_during"] else ["nobody noticed"]
    row["more"] = f"{row['flagged_during']} flagged while it was stopped, {row['flagged_before']} before"
    return [row]


def _is_bad(note: Note) -> bool:
    """Says whether a call failed, or its list is flagged for its rows."""
    answer = note[3]
    return answer is None or bool(answer.degraded & _ROWS)
