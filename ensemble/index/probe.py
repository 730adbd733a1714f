"""Probes whether recall is still as good as it was built: searches a share of live queries exactly, in the
background.

It also tells drift: where the embeddings of live queries lie, against those that the index was tuned with.
All are plain numbers; python_model.py publishes them.
"""

from __future__ import annotations

import json
import queue
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ensemble.arrays import Array
from ensemble.index.filters import RowMask
from ensemble.index.main_index import MainIndex
from ensemble.live.state import LiveView
from ensemble.request_log import RequestLog

_WAITING = 64  # queries; a probe that cannot keep up samples less
_REMEMBERED = 1000  # the last probed queries make the figures
BASELINE = "queries.json"  # what the build saw: QueryBaseline


@dataclass(frozen=True)
class ProbeSettings:
    """Says how much is probed, and what is alarming."""

    share: float = 0.001  # of queries
    alarm_below: float = 0.9  # recall_at_n
    # Of a core: an exact search of ten million items takes seconds, and serving comes first.
    most_busy: float = 0.05
    seed: int = 0


@dataclass(frozen=True)
class QueryBaseline:
    """Holds what held-out user embeddings looked like when the release was built."""

    mean: tuple[float, ...]  # [D]
    deviation: float  # root mean square distance from the mean
    centres: tuple[tuple[float, ...], ...]  # [C, D]
    occupancy: tuple[float, ...]  # [C], share of queries nearest to each centre
    best_scores: tuple[float, ...]  # deciles of the best item's score

    def to_json(self) -> str:
        """Writes the baseline as JSON."""
        return json.dumps(self.__dict__)


def baseline(queries: Array, best_scores: Array, centres: int = 16) -> QueryBaseline:
    """Makes a baseline of held-out user embeddings [Q, D] and the score of each one's best item [Q]."""
    mean = queries.mean(axis=0)
    chosen = queries[np.linspace(0, len(queries) - 1, min(centres, len(queries))).astype(int)]
    deviation = float(np.sqrt(((queries - mean) ** 2).sum(axis=1).mean()))
    deciles = np.quantile(best_scores, np.linspace(0.1, 0.9, 9))
    return QueryBaseline(
        tuple(mean.tolist()),
        deviation,
        tuple(map(tuple, chosen.tolist())),
        tuple(_occupancy(queries, chosen).tolist()),
        tuple(deciles.tolist()),
    )


def read_baseline(path: Path) -> QueryBaseline | None:
    """Reads the release's own baseline; None in a release that has none."""
    return QueryBaseline(**json.loads(path.read_text())) if path.exists() else None


def _occupancy(queries: Array, centres: Array) -> Array:
    """Gives the share of queries [Q, D] nearest to each of centres [C, D]: [C]."""
    nearest = np.argmax(queries @ centres.T - 0.5 * (centres**2).sum(axis=1), axis=1)
    return np.bincount(nearest, minlength=len(centres)) / max(1, len(queries))


def _embeddings(view: LiveView, rows: Array) -> Array:
    """Gives the embeddings [n, D] of rows [n], as the index itself scores them.

    A compressed index has them in a file of its own, a quarter or less of the items' rows: reading those, all
    of them, would fill the memory that the index was compressed to save.
    """
    main = view.state.main
    if not isinstance(main, MainIndex) or not main.query.refine_factor:
        return view.gather(rows, "embedding")
    own, slots = view.split(rows)
    return view.put_slots(main.vectors(np.maximum(own, 0)), slots, "embedding")


class RecallProbe:
    """Takes queries as they are served, with the rows found for them; compares in a thread of its own."""

    def __init__(self, settings: ProbeSettings, base: QueryBaseline | None, release: str) -> None:
        self.settings, self.base = settings, base
        self._release, self._log = release, RequestLog("recall's probe")
        self._rng, self._lock = np.random.default_rng(settings.seed), threading.Lock()
        self._waiting: queue.Queue[tuple[Array, Array, RowMask | None, LiveView]] = queue.Queue(_WAITING)
        self._shares: deque[float] = deque(maxlen=_REMEMBERED)
        self._queries: deque[Array] = deque(maxlen=_REMEMBERED)
        self._best: deque[float] = deque(maxlen=_REMEMBERED)
        self._compared = self._dropped = self._failed = 0
        self._thread: threading.Thread | None = None

    def offer(self, view: LiveView, query: Array, rows: Array, masks: Sequence[RowMask | None]) -> None:
        """Takes some of a batch's users by chance, mostly none: query [B, M, D], found rows [B, M, n] best
        first."""
        for user in np.flatnonzero(self._rng.random(len(query)) < self.settings.share):
            self._take(view, query[user, 0], rows[user, 0], masks[user])

    def _take(self, view: LiveView, query: Array, rows: Array, mask: RowMask | None) -> None:
        """Queues one query for the thread, or counts it as dropped where the queue is full."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="recall-probe", daemon=True)
            self._thread.start()
        try:
            self._waiting.put_nowait((query.copy(), rows.copy(), mask, view))
        except queue.Full:
            self._dropped += 1

    def _work(self) -> None:
        """Compares queries as they come, and rests in between."""
        while True:
            query = self._waiting.get()
            started = time.thread_time()
            try:
                self._compare(*query)
            except Exception as error:  # a probe must never end, and never harm what it watches
                self._failed += 1
                self._log.failed(self._release, [""], error)
            self._waiting.task_done()
            time.sleep((time.thread_time() - started) * (1 / self.settings.most_busy - 1))

    def _compare(self, query: Array, rows: Array, mask: RowMask | None, view: LiveView) -> None:
        """Searches query [D] exactly, and notes the share of the truth that is among found rows [n]."""
        main = view.state.main
        assert main is not None
        every = np.arange(1, view.num_rows)
        passing = every[~view.is_deleted(every) & (mask.passes(every) if mask is not None else True)]
        found = rows[rows > 0]
        truth, scores = self._exact(view, query, passing, max(1, len(found)))
        share = float(np.isin(truth, found).mean()) if len(truth) else 1.0
        with self._lock:
            self._shares.append(share)
            self._queries.append(query)
            self._best.append(float(scores[0]) if len(scores) else 0.0)
            self._compared += 1
            recall = self.recall()
        if recall < self.settings.alarm_below and self._compared % 100 == 1:
            words = f"recall_at_n of live queries is {recall:.3f}, below {self.settings.alarm_below:.3f}"
            self._log.warned(self._release, "", words)

    def _exact(self, view: LiveView, query: Array, rows: Array, depth: int) -> tuple[Array, Array]:
        """Gives the true best rows [<= depth] and their scores; in pieces, so that the interpreter is let go
        now and then."""
        best, best_scores = np.zeros(0, np.int64), np.zeros(0, np.float32)
        for start in range(0, len(rows), 1 << 14):
            piece = rows[start : start + (1 << 14)]
            best = np.concatenate([best, piece])
            best_scores = np.concatenate([best_scores, _embeddings(view, piece) @ query])
            order = np.lexsort((best, -best_scores))[:depth]
            best, best_scores = best[order], best_scores[order]
        return best, best_scores

    def recall(self) -> float:
        """Gives the mean recall over the last probed queries; 1 before the first."""
        return float(np.mean(self._shares)) if self._shares else 1.0

    def wait(self) -> None:
        """Returns when all that was offered is compared."""
        self._waiting.join()

    def metrics(self) -> dict[str, float]:
        """Gives the figures by name."""
        with self._lock:
            recall, probed = self.recall(), len(self._shares)
            drift = self._drift() if self.base is not None and probed else {}
        return {
            "recall_at_n": recall,
            "recall_alarm": float(recall < self.settings.alarm_below),
            "recall_probed": float(probed),
            "recall_dropped": float(self._dropped),
            "recall_failed": float(self._failed),
            **drift,
        }

    def _drift(self) -> dict[str, float]:
        """Gives three differences of live queries from the baseline.

        mean: the shift of the mean, in the baseline's deviations. occupancy: half the sum of the differences
        (0 the same, 1 elsewhere). score: the largest difference between the distributions of the best score
        at the baseline's deciles (Kolmogorov-Smirnov).
        """
        assert self.base is not None
        queries, best = np.stack(self._queries), np.array(self._best)
        centres = np.array(self.base.centres, np.float32)
        below = np.array([(best <= decile).mean() for decile in self.base.best_scores])
        return {
            "query_mean_shift": float(np.linalg.norm(queries.mean(axis=0) - np.array(self.base.mean)))
            / max(self.base.deviation, 1e-12),
            "query_occupancy_shift": float(
                np.abs(_occupancy(queries, centres) - np.array(self.base.occupancy)).sum() / 2
            ),
            "query_score_shift": float(np.abs(below - np.linspace(0.1, 0.9, 9)).max()),
        }
