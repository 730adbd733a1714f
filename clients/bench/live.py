"""Measures what it costs that items change while they are served.

    python -m clients.bench.live --repository REPOSITORY --rate 1000 --seconds 60

A writer process takes upserts at --rate; the pipeline, in this process, answers one user at a time at half
load. At the end: the delay before and during, the largest gap between writing and seeing, recall@100 of the
index against brute force over the items as they are now (so against what a fresh build would find), and,
after kill -9 of the writer, whether every acknowledged change is there. Works on a copy of the repository's
active release; needs no server.
"""

from __future__ import annotations

import argparse
import contextlib
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
from ensemble.arrays import Array
from ensemble.errors import PeregrineError, ServerError
from ensemble.index.found import recall_share
from ensemble.index.item_index import find
from ensemble.json_text import json_text
from ensemble.local import LocalPipeline
from ensemble.release.repository import require_active
from ensemble.steps.served import open_served

_TRIED_S = 5.0  # of each try to find half load
_GROUP_S = 0.05  # upserts are sent in groups, as a feed of a shop would


class Upserts:
    """Sends upserts at a steady rate until it is stopped or the writer is gone. It runs in a process of its
    own: the feed must not take the steps' GIL."""

    def __init__(self, repository: Path, ids: list[str], rate: float, dim: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._sequence, self._stop = context.Value("q", 0), context.Event()
        self._summaries, summaries = context.Pipe(duplex=False)
        arguments = (repository, ids, rate, dim, self._sequence, self._stop, summaries)
        self._process = context.Process(target=_feed, args=arguments, daemon=True)
        self._process.start()

    @property
    def sequence(self) -> int:
        """Gives the number of the last change that was acknowledged."""
        return int(self._sequence.value)

    def result(self) -> FeedSummary:
        """Ends the feed, and says what it did."""
        self._stop.set()
        summary: FeedSummary = self._summaries.recv()
        self._process.join()
        return summary


@dataclass(frozen=True)
class FeedSummary:
    """Says what a feed did."""

    acknowledged: dict[str, Array]  # the last vector of each item
    sent: int
    slowest_ms: float
    sequence: int


def _feed(
    repository: Path, ids: list[str], rate: float, dim: int, sequence: Any, stop: Any, summaries: Any
) -> None:
    """Upserts new and old items by turns, at `rate` a second, until `stop` is set."""
    rng, size, began = np.random.default_rng(0), max(1, round(rate * _GROUP_S)), time.monotonic()
    acknowledged: dict[str, Array] = {}
    sent, slowest_ms = 0, 0.0
    # Unavailable: the writer is killed in the end, as planned.
    with contextlib.suppress(Unavailable), ItemClient(repository, wait_s=0.0) as client:
        while not stop.is_set():
            names = [f"live-{n}" if n % 2 else ids[n % len(ids)] for n in range(sent, sent + size)]
            vectors = dict(zip(names, rng.standard_normal((size, dim)).astype(np.float32), strict=True))
            items = [{"item_id": name, "item_embedding": one.tolist()} for name, one in vectors.items()]
            started = time.monotonic()
            sequence.value = client.upsert(*items).sequence
            slowest_ms = max(slowest_ms, 1000 * (time.monotonic() - started))
            acknowledged.update(vectors)
            sent += size
            time.sleep(max(0.0, began + sent / rate - time.monotonic()))
    summaries.send(FeedSummary(acknowledged, sent, slowest_ms, sequence.value))


def delays(pipeline: LocalPipeline, users: list[str], seconds: float, every_s: float) -> Array:
    """Measures answers for `seconds`: [n, 2] milliseconds of each, from when it was due, and of CPU.

    One is due each `every_s` seconds; with 0 they come one after the other.
    """
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
    """Finds the seconds between answers that leave half of the thread's time.

    Answers that come one by one cost up to a half more than those of a closed loop, so that half of a closed
    loop's rate would be more than half load.
    """
    every_s = 0.0
    for _ in range(3):
        every_s = 2 * float(np.mean(delays(pipeline, users, _TRIED_S, every_s)[:, 1])) / 1000
    return every_s


def recall_now(pipeline: LocalPipeline, queries: int = 100, k: int = 100) -> float:
    """Gives the share of the true best k, over the items as they are now, that the index finds."""
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
    """Starts a writer's process and waits until it answers."""
    process = subprocess.Popen(
        [sys.executable, "-m", "ensemble.live.service", str(repository)], stdin=subprocess.PIPE
    )
    while process.poll() is None:
        try:
            ItemClient(repository).close()
            return process
        except Unavailable:
            time.sleep(0.05)
    raise ServerError("the writer of items did not start")


def measure(repository: Path, rate: float, seconds: float) -> dict[str, Any]:
    """Measures all of it, on a repository that may be changed."""
    release = open_served(repository, require_active(repository))
    pipeline, ids = LocalPipeline(release), [one.decode() for one in release.item_ids.sorted_ids]
    users = [one.decode() for one in release.user_ids.sorted_ids[:1000]]
    every_s = half_load(pipeline, users)
    before = delays(pipeline, users, min(seconds, 20), every_s)
    recall_before, writer = recall_now(pipeline), start_writer(repository)
    release.live.follow()
    upserts = Upserts(repository, ids, rate, release.schema.sizes.embedding)
    began = time.monotonic()
    during = delays(pipeline, users, seconds, every_s)
    took_s = time.monotonic() - began
    behind = upserts.sequence - release.live.view.sequence
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    feed = upserts.result()
    recall_after = recall_now(pipeline)  # nothing moves any more
    release.live.close()
    return {
        "rate": round(feed.sent / took_s),
        "seconds": seconds,
        "answers_per_s": round(1 / every_s),
        "slowest_write_ms": round(feed.slowest_ms),
        **_percentiles("before", before),
        **_percentiles("during", during),
        "recall_at_100_before": round(recall_before, 4),
        "recall_at_100_after": round(recall_after, 4),
        "changes_not_yet_seen": int(max(0, behind)),
        "generation": release.live.view.state.generation,
        "acknowledged": len(feed.acknowledged),
        "lost": lost(repository, feed),
    }


def _percentiles(phase: str, took_ms: Array) -> dict[str, float]:
    """Gives p50 and p99 of delays() [n, 2], by name."""
    return {
        f"p{p}_{kind}_{phase}": round(float(np.percentile(column, p)), 2)
        for kind, column in zip(("ms", "cpu_ms"), took_ms.T, strict=True)
        for p in (50, 99)
    }


def lost(repository: Path, feed: FeedSummary) -> int:
    """Counts acknowledged items that a fresh process does not find with their last acknowledged vector, or a
    later one of the same id."""
    view = open_served(repository, require_active(repository)).live.view
    names = list(feed.acknowledged)
    rows = view.rows_from_ids(np.array([name.encode() for name in names]))
    same = (view.gather(rows, "embedding") == np.stack(list(feed.acknowledged.values()))).all(axis=1)
    return int((rows == 0).sum()) if view.sequence > feed.sequence else int((~same).sum())


def main(arguments: list[str] | None = None) -> None:
    """Measures a copy of the repository, and prints the figures as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repository", type=Path, default=Path("model_repository"))
    parser.add_argument("--rate", type=float, default=1000.0, help="upserts a second")
    parser.add_argument("--seconds", type=float, default=60.0)
    given = parser.parse_args(arguments)
    try:
        with tempfile.TemporaryDirectory(dir=given.repository.parent) as folder:
            copy = Path(folder) / "repository"
            shutil.copytree(given.repository, copy, ignore=shutil.ignore_patterns(".live"))
            print(json_text(measure(copy, given.rate, given.seconds), indent=1))
    except (PeregrineError, OSError) as error:
        parser.exit(2, f"error: {error}\n")


if __name__ == "__main__":
    main()
