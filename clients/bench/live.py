"""Items that change while they are served.   python -m clients.bench.live --repository REPOSITORY --rate 1000
--seconds 60

A writer process takes upserts at --rate; the pipeline, in this process, answers one user at a time at half
load. At the end: the delay before and during, the largest gap between writing and seeing, recall@100 of the
index against brute force over the items as they are now (so against what a fresh build would find), and,
after kill -9 of the writer, whether every acknowledged change is there. Works on a copy of the repository's
active release; needs no server.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clients.errors import Unavailable
from clients.items import ItemClient
from ensemble.index.found import recall_share
from ensemble.index.item_index import find
from ensemble.local import LocalPipeline
from ensemble.release.release import active_release
from ensemble.steps.served import open_served

_TRIED_S = 5.0  # of each try to find half load
_GROUP_S = 0.05  # upserts are sent in groups, as a feed of a shop would


class Upserts:
    """Sends upserts at a steady rate until told to stop or the writer is gone. A process of its own: the feed
    must not take the steps' GIL."""

    def __init__(self, repository: Path, ids: list[str], rate: float, dim: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._sequence, self._stop = context.Value("q", 0), context.Event()
        self._results, told = context.Pipe(duplex=False)
        self._process = context.Process(
            target=_feed, args=(repository, ids, rate, dim, self._sequence, self._stop, told), daemon=True
        )
        self._process.start()

    @property
    def sequence(self) -> int:
        """Of the last change that was acknowledged."""
        return int(self._sequence.value)

    def result(self) -> Fed:
        """Ends the feed."""
        self._stop.set()
        fed = self._results.recv()
        self._process.join()
        return fed


@dataclass(frozen=True)
class Fed:
    """What a feed did."""

    acknowledged: dict[str, np.ndarray]  # the last vector of each item
    sent: int
    slowest_ms: float
    sequence: int


def _feed(
    repository: Path, ids: list[str], rate: float, dim: int, sequence: Any, stop: Any, told: Any
) -> None:
    rng, size, began = np.random.default_rng(0), max(1, round(rate * _GROUP_S)), time.monotonic()
    acknowledged: dict[str, np.ndarray] = {}
    sent, slowest_ms = 0, 0.0
    with (
        contextlib.suppress(Unavailable),
        ItemClient(repository, wait_s=0.0) as client,
    ):  # the writer is killed in the end, as planned
        while not stop.is_set():
            names = [f"live-{n}" if n % 2 else ids[n % len(ids)] for n in range(sent, sent + size)]
            each = dict(zip(names, rng.standard_normal((size, dim)).astype(np.float32), strict=True))
            started = time.monotonic()
            sequence.value = client.upsert(
                *({"item_id": name, "item_embedding": vector.tolist()} for name, vector in each.items())
            ).sequence
            slowest_ms = max(slowest_ms, 1000 * (time.monotonic() - started))
            acknowledged.update(each)
            sent += size
            time.sleep(max(0.0, began + sent / rate - time.monotonic()))
    told.send(Fed(acknowledged, sent, slowest_ms, sequence.value))


def delays(pipeline: LocalPipeline, users: list[str], seconds: float, every_s: float) -> np.ndarray:
    """[n, 2] milliseconds of each answer, open loop: counted from when it was due, and of this thread's CPU.
    every_s 0: one after the other."""
    took: list[tuple[float, float]] = []
    began = time.perf_counter()
    while (due := began + len(took) * every_s if every_s else time.perf_counter()) < began + seconds:
        if (early := due - time.perf_counter()) > 0:
            time.sleep(early)
        cpu = time.thread_time()
        pipeline.recommend([users[len(took) % len(users)]], {"top_k": 10})
        took.append((1000 * (time.perf_counter() - due), 1000 * (time.thread_time() - cpu)))
    return np.array(took)


def half_load(pipeline: LocalPipeline, users: list[str]) -> float:
    """Seconds between answers that leave half of the thread's time. Answers that come one by one cost more
    than those of a closed loop, up to a half, so half of a closed loop's rate would be more than half
    load."""
    every_s = 0.0
    for _ in range(3):
        every_s = 2 * float(np.mean(delays(pipeline, users, _TRIED_S, every_s)[:, 1])) / 1000
    return every_s


def recall_now(pipeline: LocalPipeline, queries: int = 100, k: int = 100) -> float:
    """Share of the true best k, over the items as they are now, that the index finds."""
    recall: Any = pipeline.steps["recall"]
    view = recall.live.refresh(1 << 30)
    rows = np.arange(1, view.num_rows)
    rows = rows[~view.is_deleted(rows)]
    embeddings = view.gather(rows, "embedding")
    query = embeddings[np.random.default_rng(1).integers(0, len(rows), queries)]
    truth = rows[np.argsort(-(query @ embeddings.T), axis=1)[:, :k]]
    found = find(view, query, k, None)[0]
    return recall_share(found, truth - 1)


def start_writer(repository: Path) -> subprocess.Popen[bytes]:
    """A writer's process, ready."""
    process = subprocess.Popen(
        [sys.executable, "-m", "ensemble.live.service", str(repository)], stdin=subprocess.PIPE
    )
    while process.poll() is None:
        try:
            ItemClient(repository).close()
            return process
        except Unavailable:
            time.sleep(0.05)
    raise SystemExit("the writer did not start")


def measure(repository: Path, rate: float, seconds: float) -> dict[str, Any]:
    """The whole of it, on a repository that may be changed."""
    release = open_served(repository, active_release(repository) or "none")
    pipeline, ids = LocalPipeline(release), [i.decode() for i in release.item_ids.sorted_ids]
    users = [i.decode() for i in release.user_ids.sorted_ids[:1000]]
    every_s = half_load(pipeline, users)
    before = delays(pipeline, users, min(seconds, 20), every_s)
    recall_before, writer = recall_now(pipeline), start_writer(repository)
    release.live.follow()
    upserts = Upserts(repository, ids, rate, release.schema.sizes.embedding)
    began = time.monotonic()
    during = delays(pipeline, users, seconds, every_s)
    took_s = time.monotonic() - began
    lag = upserts.sequence - release.live.view.sequence
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    fed = upserts.result()
    recall_after = recall_now(pipeline)  # nothing moves any more
    release.live.close()
    facts = {
        "rate": round(fed.sent / took_s),
        "seconds": seconds,
        "answers_per_s": round(1 / every_s),
        "slowest_write_ms": round(fed.slowest_ms),
    }
    for name, took in (("before", before), ("during", during)):
        for kind, milliseconds in zip(("ms", "cpu_ms"), took.T, strict=True):
            facts |= {
                f"p{p}_{kind}_{name}": round(float(np.percentile(milliseconds, p)), 2) for p in (50, 99)
            }
    facts |= {
        "recall_at_100_before": round(recall_before, 4),
        "recall_at_100_after": round(recall_after, 4),
        "changes_not_yet_seen": int(max(0, lag)),
    }
    return {
        **facts,
        "generation": release.live.view.state.generation,
        "acknowledged": len(fed.acknowledged),
        "lost": lost(repository, fed),
    }


def lost(repository: Path, fed: Fed) -> int:
    """Acknowledged items that a fresh process does not find with their last acknowledged vector, or a later
    one of the same id."""
    view = open_served(repository, active_release(repository) or "none").live.view
    names = list(fed.acknowledged)
    rows = view.rows_from_ids(np.array([name.encode() for name in names]))
    same = (view.gather(rows, "embedding") == np.stack(list(fed.acknowledged.values()))).all(axis=1)
    return int((rows == 0).sum()) if view.sequence > fed.sequence else int((~same).sum())


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repository", type=Path, default=Path("model_repository"))
    parser.add_argument("--rate", type=float, default=1000.0, help="upserts a second")
    parser.add_argument("--seconds", type=float, default=60.0)
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(dir=given.repository.parent) as folder:
        copy = Path(folder) / "repository"
        shutil.copytree(given.repository, copy, ignore=shutil.ignore_patterns(".live"))
        print(json.dumps(measure(copy, given.rate, given.seconds), indent=1))


if __name__ == "__main__":
    main()
