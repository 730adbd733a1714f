"""Measures what very many changes of items cost: the writer, the merges, and every process that follows.

    python -m clients.bench.many_changes --repository REPOSITORY --changes 1000000

Sends changes to a real writer as fast as it takes them, one of three to an item of the release and two to
new ones, by their features. Meanwhile and afterwards two processes follow as a server's do: one that only
reads rows, as `features` does, and one that searches, as `recall` does. At the end: changes a second,
merges and how long they took, private memory of each process before and after, the delay of recall before,
during and after, the size of log and overlay, and how long a writer takes to start. Works on a copy of the
repository's active release; needs no server.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import shutil
import subprocess
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from clients.bench.live import start_writer
from clients.errors import Overloaded
from clients.items import ItemClient
from ensemble.errors import PeregrineError
from ensemble.json_text import json_text
from ensemble.live.generations import read_current
from ensemble.live.service import MERGE_AT
from ensemble.options import default_options
from ensemble.release.release import Release
from ensemble.release.repository import require_active
from ensemble.steps.recall import Recall
from ensemble.steps.served import open_served

_GROUP = 1000  # changes sent together
_EVERY_S, _ASKED = 0.05, 200  # of a recall: one each so often; answers that make a figure


def follow(repository: Path, searches: bool, orders: Any, facts: Any) -> None:
    """Is a process that follows: answers "memory" and "delay" until it is told to end."""
    release = open_served(repository, require_active(repository))
    recall = Recall(release.model("recall"), release) if searches else None
    release.live.follow()
    rng, sizes, delays = np.random.default_rng(0), release.schema.sizes, list[float]()
    query = rng.standard_normal((1, sizes.interests, sizes.embedding)).astype(np.float32)
    seen, options = np.full((1, sizes.seen), -1), default_options(1)
    while True:
        if recall is not None:
            began = time.perf_counter()
            recall.run(options, seen_rows=seen, user_embeddings=query)
            delays.append(1000 * (time.perf_counter() - began))
        if not orders.poll(_EVERY_S):
            continue
        order = orders.recv()
        if order == "end":
            release.close()
            return
        facts.send(
            (_private_bytes(), delays[-_ASKED:] if order == "last" else delays, release.live.view.sequence)
        )
        delays = []


def _private_bytes() -> int:
    """Gives the memory that is this process's alone and of no file."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Anonymous:"))


class Follower:
    """Runs follow() as a process."""

    def __init__(self, repository: Path, *, searches: bool) -> None:
        context = multiprocessing.get_context("spawn")
        self._orders, orders = context.Pipe()
        self._facts, facts = context.Pipe(duplex=False)
        arguments = (repository, searches, orders, facts)
        self._process = context.Process(target=follow, args=arguments, daemon=True)
        self._process.start()

    def ask(self, order: str) -> tuple[int, list[float], int]:
        """Gives its private bytes, its delays since it was asked the last time, and how far it is."""
        self._orders.send(order)
        reply: tuple[int, list[float], int] = self._facts.recv()
        return reply

    def wait_for(self, sequence: int) -> None:
        """Returns when it has all changes up to `sequence`."""
        while self.ask("all")[2] < sequence:
            time.sleep(0.1)

    def end(self) -> None:
        """Ends the process."""
        self._orders.send("end")
        self._process.join()


def send(
    repository: Path, ids: list[str], num_changes: int, features: list[dict[str, Any]]
) -> tuple[int, int]:
    """Sends changes as fast as they are taken; gives the last number, and how often the writer was full."""
    full = 0
    with ItemClient(repository, wait_s=0.0) as client:
        sequence = client.status().sequence
        for start in range(0, num_changes, _GROUP):
            items = [
                {"item_id": ids[n % len(ids)] if n % 3 == 0 else f"new-{n}", **features[n % len(features)]}
                for n in range(start, min(start + _GROUP, num_changes))
            ]
            changes = {item["item_id"]: {"op": "upsert", "item": item} for item in items}
            while True:
                try:
                    sequence = client.apply(list(changes.values())).sequence
                    break
                except Overloaded:
                    full += 1
                    time.sleep(0.5)
    return sequence, full


def some_features(release: Release) -> list[dict[str, Any]]:
    """Makes values of an item's categories and numbers, no two alike: items that are the same to the encoder
    would measure how equal scores are put in order."""
    rng, kinds = np.random.default_rng(0), release.schema.items.features
    made: list[dict[str, Any]] = [{} for _ in range(100_003)]
    for feature in kinds:
        if feature.kind == "category" and (values := release.vocabularies["items"][feature.name]):
            for one, place in zip(made, rng.integers(0, len(values), len(made)).tolist(), strict=True):
                one[feature.name] = values[place]
        elif feature.kind == "number":
            for one, number in zip(made, rng.uniform(1, 100, len(made)).tolist(), strict=True):
                one[feature.name] = number
    return made


def measure(repository: Path, num_changes: int) -> dict[str, Any]:
    """Measures all of it, on a repository that may be changed."""
    release = open_served(repository, require_active(repository))
    ids = [one.decode() for one in release.item_ids.sorted_ids]
    features = some_features(release)
    writer, merges = start_writer(repository), list[float]()
    watch = threading.Thread(target=_time_merges, args=(repository, merges), daemon=True)
    followers = Follower(repository, searches=False), Follower(repository, searches=True)
    time.sleep(_EVERY_S * _ASKED * 1.5)
    before = [one.ask("last") for one in followers]
    watch.start()
    began = time.monotonic()
    sequence, full = send(repository, ids, num_changes, features)
    took_s = time.monotonic() - began
    during = followers[1].ask("all")[1]
    for follower in followers:
        follower.wait_for(sequence)
    status = _status_when_merged(repository)
    time.sleep(_EVERY_S * _ASKED * 1.5)
    after = [one.ask("last") for one in followers]
    for follower in followers:
        follower.end()
    files = [*release.live_folder.glob("g*/*"), *release.live_folder.glob("log-*")]
    return {
        "changes": sequence,  # fewer than asked for where a group would have changed an item twice
        "items_of_the_release": len(ids),
        "changes_per_s": round(sequence / took_s),
        "refused_as_full": full,
        "merges": len(merges),
        "merge_s_median": round(float(np.median(merges)), 2) if merges else None,
        "merge_s_longest": round(max(merges), 2) if merges else None,
        "segments": len(read_current(release.live_folder).segments),
        **_memory("before", before),
        **_memory("after", after),
        **_percentiles("before", before[1][1]),
        **_percentiles("during", during),
        **_percentiles("after", after[1][1]),
        "log_mb": round(status["log_bytes"] / 1e6, 1),
        "overlay_mb": round(sum(path.stat().st_size for path in files) / 1e6, 1),
        "writer_starts_in_s": _restarted(repository, writer),
    }


def _memory(phase: str, facts: list[tuple[int, list[float], int]]) -> dict[str, float]:
    """Gives the followers' private memory in megabytes, by name."""
    return {
        f"{name}_private_mb_{phase}": round(one[0] / 1e6, 1)
        for name, one in zip(("features", "recall"), facts, strict=True)
    }


def _restarted(repository: Path, writer: subprocess.Popen[bytes]) -> float:
    """Gives the seconds that the next writer takes until it answers."""
    writer.terminate()
    writer.wait()
    began = time.monotonic()
    again = start_writer(repository)
    took_s = time.monotonic() - began
    again.terminate()
    again.wait()
    return round(took_s, 1)


def _time_merges(repository: Path, merges: list[float]) -> None:
    """Notes how long each merge takes, as the writer tells, for as long as there is one."""
    began_s = 0.0
    with contextlib.suppress(PeregrineError), ItemClient(repository, wait_s=0.0) as client:
        while True:
            merging = client.status().merging
            if merging and not began_s:
                began_s = time.monotonic()
            elif not merging and began_s:
                merges.append(time.monotonic() - began_s)
                began_s = 0.0
            time.sleep(0.05)


def _status_when_merged(repository: Path) -> dict[str, Any]:
    """Gives the writer's status as soon as no merge is due or at work."""
    with ItemClient(repository, wait_s=0.0) as client:
        while True:
            status = client.status()
            if not status.merging and status.unmerged < MERGE_AT:
                return vars(status)
            time.sleep(0.2)


def _percentiles(phase: str, delays: list[float]) -> dict[str, float]:
    """Gives p50 and p99 of recall's delays [n] in milliseconds, by name."""
    return {f"recall_p{p}_ms_{phase}": round(float(np.percentile(delays, p)), 2) for p in (50, 99)}


def main(arguments: list[str] | None = None) -> None:
    """Measures a copy of the repository, and prints the figures as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repository", type=Path, default=Path("model_repository"))
    parser.add_argument("--changes", type=int, default=1_000_000)
    given = parser.parse_args(arguments)
    try:
        with tempfile.TemporaryDirectory(dir=given.repository.parent) as folder:
            copy = Path(folder) / "repository"
            shutil.copytree(given.repository, copy, ignore=shutil.ignore_patterns(".live", ".build"))
            print(json_text(measure(copy, given.changes), indent=1))
    except (PeregrineError, OSError) as error:
        parser.exit(2, f"error: {error}\n")


if __name__ == "__main__":
    main()
