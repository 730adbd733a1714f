"""Measures the index at 10^5, 10^6, 10^7 items: memory, latency, recall.

    python -m builders.bench.index --items 100000,1000000 --like RELEASE

Vectors are generated: no shop here has ten million items. They have the clusters (2048 centres, sizes) and,
within them, the spectrum of the item embeddings of the release named by --like (Beauty's, in BENCHMARKS.md),
and their length. Queries are real: the embeddings of that release's users, half for tuning, half for the
figures.

Memory is what the process has of its own (anonymous resident bytes, smaps), read before and after the index
is opened and asked; mapped files are reported beside it, as they are shared page cache that the system may
drop. `opened_bytes` is what was there before the first query: the rest of `anonymous_bytes` is the scratch of
one query, which does not grow with the items.

Cold: the system has forgotten the files, as after a start without a look at them (`serve` verifies, so reads,
all of them). The first query makes it read ahead so much that the next 99 say little of a disk, so it stands
alone.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from builders.index.choice import IndexTarget, choose_kind, exact_positions, index_of_kind, pack_vectors, tune
from ensemble.arrays import Array
from ensemble.contract import USER_ENCODER_INPUTS
from ensemble.index.found import recall_share
from ensemble.index.item_index import VECTORS
from ensemble.index.main_index import MainIndex, QuerySettings, open_index
from ensemble.index.vectors import open_vectors
from ensemble.json_text import json_text
from ensemble.local import open_step
from ensemble.options import default_options
from ensemble.steps.served import ServedRelease, open_served

_BLOCK = 1 << 16  # items generated at once, each block from its own seed
_QUERIES = 512
_TIMED = 1000


@dataclass(frozen=True)
class Likeness:
    """Clusters and spectrum of some embeddings."""

    centres: Array  # [C, D]
    shares: Array  # [C], sum 1
    within: Array  # [D, D]: standard normal @ within has the covariance around the centres
    length: float

    def block(self, seed: int, count: int) -> Array:
        """Draws [count, D] float32, the same for the same seed."""
        rng = np.random.default_rng(seed)
        vectors = rng.standard_normal((count, self.centres.shape[1]), dtype=np.float32) @ self.within
        vectors += self.centres[rng.choice(len(self.centres), count, p=self.shares)]
        return vectors * (self.length / np.linalg.norm(vectors, axis=1, keepdims=True))


def likeness(embeddings: Array, clusters: int = 2048) -> Likeness:
    """Learns clusters and spectrum of item embeddings [I, D]."""
    kmeans = faiss.Kmeans(embeddings.shape[1], clusters, niter=15, seed=1, verbose=False)
    kmeans.train(embeddings)
    assert kmeans.centroids is not None
    assert kmeans.index is not None
    owner = kmeans.index.search(embeddings, 1)[1][:, 0]
    rest = embeddings - kmeans.centroids[owner]
    values, directions = np.linalg.eigh(np.cov(rest, rowvar=False))
    within = (directions * np.sqrt(np.maximum(values, 0))).T.astype(np.float32)
    shares = np.bincount(owner, minlength=clusters) / len(owner)
    return Likeness(
        kmeans.centroids.astype(np.float32), shares, within, float(np.linalg.norm(embeddings, axis=1).mean())
    )


def user_embeddings(release: ServedRelease, count: int) -> Array:
    """Gives [count, D] float32: what the release's engine says of a random sample of its users."""
    features, encoder = (
        open_step(release.model("features"), release),
        open_step(release.model("user_encoder"), release),
    )
    ids = release.user_ids.sorted_ids
    chosen = ids[np.random.default_rng(0).integers(0, len(ids), count)]
    parts = []
    for start in range(0, count, 64):
        options = default_options(len(chosen[start : start + 64]))
        known = features.run(options, user_id=chosen[start : start + 64, None])
        parts.append(
            encoder.run(options, **{name: known[name] for name in USER_ENCODER_INPUTS})["user_embeddings"][
                :, 0
            ]
        )
    return np.concatenate(parts)


class Generated:
    """Items by number, made when they are asked for: ten million float32 vectors are never anywhere at
    once."""

    def __init__(self, like: Likeness) -> None:
        self.like, self._last = like, (-1, np.zeros((0, 0), np.float32))

    def __call__(self, start: int, stop: int) -> Array:
        parts = []
        for block in range(start // _BLOCK, (stop - 1) // _BLOCK + 1):
            if self._last[0] != block:
                self._last = block, self.like.block(1000 + block, _BLOCK)
            first = block * _BLOCK
            parts.append(self._last[1][max(start, first) - first : stop - first])
        return np.concatenate(parts)


def build(
    num_items: int,
    like: Likeness,
    queries: Array,
    folder: Path,
    target: IndexTarget,
    budget_bytes: int | None,
) -> dict[str, Any]:
    """Writes index.faiss, vectors.npy and queries.npz; gives what it took and what was tried."""
    folder.mkdir(parents=True, exist_ok=True)
    started, dim, chunks = time.perf_counter(), like.centres.shape[1], Generated(like)
    kind = choose_kind(num_items, dim, budget_bytes)
    pack_vectors(folder / VECTORS, kind, num_items, dim, chunks)
    generated_s = time.perf_counter() - started
    vectors = open_vectors(folder / VECTORS, num_items + 1, dim)
    started = time.perf_counter()
    index = index_of_kind(kind, num_items, dim, lambda start, stop: vectors(np.arange(start + 1, stop + 1)))
    built_s = time.perf_counter() - started
    faiss.write_index(index, str(folder / "index.faiss"))
    truth = exact_positions(queries, target.k, num_items, chunks)
    tuned = tune(index, kind, vectors, queries[:_QUERIES], truth[:_QUERIES], target)
    np.savez(folder / "queries.npz", queries=queries, truth=truth)
    facts = {
        "items": num_items,
        "index": kind.factory,
        "nprobe": tuned.query.nprobe,
        "refine_factor": tuned.query.refine_factor,
    }
    facts |= {
        "generate_s": round(generated_s, 1),
        "build_s": round(built_s, 1),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    return {**facts, "refined": kind.refined, "tried": tuned.tried}


def measure(folder: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """Opens what build() wrote, as a serving process does, and asks it one query at a time on one thread."""
    with np.load(folder / "queries.npz", allow_pickle=False) as held:
        queries, truth = held["queries"], held["truth"]
    dim, num_items = queries.shape[1], facts["items"]
    faiss.omp_set_num_threads(1)
    # what a process has anyway, before it opens the index
    MainIndex(faiss.IndexFlatIP(dim), lambda rows: queries[rows], QuerySettings())
    before = own_bytes()
    paths = [folder / "index.faiss", folder / VECTORS]
    drop_from_cache(paths)
    index, vectors = open_index(paths[0], num_items, dim), open_vectors(paths[1], num_items + 1, dim)
    main, opened = (
        MainIndex(index, vectors, QuerySettings(facts["nprobe"], facts["refine_factor"])),
        own_bytes(),
    )
    others = slice(_QUERIES, 2 * _QUERIES)  # the first half has tuned the settings
    cold_ms, _ = timed(main, queries[others][:100], truth.shape[1])
    timed(main, queries, truth.shape[1])
    warm_ms, found = timed(
        main, np.tile(queries[others], (1 + _TIMED // _QUERIES, 1))[:_TIMED], truth.shape[1]
    )
    after, flat = own_bytes(), 4 * dim * num_items
    anonymous, file_bytes = after["Anonymous"] - before["Anonymous"], os.path.getsize(paths[0])
    return {
        **{name: value for name, value in facts.items() if name != "tried"},
        "recall_at_100": round(recall_share(found[:_QUERIES], truth[others]), 4),
        "flat_bytes": flat,
        "anonymous_bytes": anonymous,
        "opened_bytes": opened["Anonymous"] - before["Anonymous"],
        "index_file_bytes": file_bytes,
        "flat_over_anonymous": round(flat / max(1, anonymous), 1),
        "flat_over_index_file": round(flat / file_bytes, 1),
        "mapped_vector_bytes": os.path.getsize(paths[1]) if facts["refined"] else 0,
        "resident_mapped_bytes": (after["Rss"] - after["Anonymous"]) - (before["Rss"] - before["Anonymous"]),
        "warm_p50_ms": _quantile(warm_ms, 50),
        "warm_p99_ms": _quantile(warm_ms, 99),
        "cold_first_ms": round(float(cold_ms[0]), 3),
        "cold_p50_ms": _quantile(cold_ms[1:], 50),
        "cold_p99_ms": _quantile(cold_ms[1:], 99),
        "load_1m": round(os.getloadavg()[0], 2),
    }


def timed(main: MainIndex, queries: Array, k: int) -> tuple[Array, Array]:
    """Asks one query after the other; gives (milliseconds [n], rows [n, k])."""
    took, found = np.zeros(len(queries)), []
    for i, query in enumerate(queries):
        started = time.perf_counter()
        found.append(main.search(query[None], k)[0][0])
        took[i] = 1000 * (time.perf_counter() - started)
    return took, np.stack(found)


def own_bytes() -> dict[str, int]:
    """Rss and Anonymous of this process, in bytes."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    return {
        name.strip(): int(value.split()[0]) * 1024
        for name, _, value in (line.partition(":") for line in lines)
    }


def drop_from_cache(paths: list[Path]) -> None:
    """Asks the system to forget the files' pages."""
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _quantile(values: Array, percent: int) -> float:
    return round(float(np.percentile(values, percent)), 3)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Draws latency and memory over the number of items."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4))
    items = [row["items"] for row in rows]
    for name in ("warm_p50_ms", "warm_p99_ms", "cold_first_ms"):
        left.plot(
            items, [row[name] for row in rows], marker="o", label=name.removesuffix("_ms").replace("_", " ")
        )
    for name in ("flat_bytes", "index_file_bytes", "anonymous_bytes", "mapped_vector_bytes"):
        there = [
            (row["items"], row[name] / 1e6) for row in rows if row[name]
        ]  # an index that is not refined has no vectors beside it
        right.plot(*zip(*there, strict=True), marker="o", label=name.removesuffix("_bytes").replace("_", " "))
    for axis, what in ((left, "ms a query, one thread"), (right, "MB")):
        axis.set(xscale="log", yscale="log", xlabel="items", ylabel=what)
        axis.legend()
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def table(rows: list[dict[str, Any]]) -> str:
    """Writes the rows as a Markdown table."""
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "items": lambda r: f"{r['items']:,}",
        "index": lambda r: f"{r['index']} nprobe {r['nprobe']} refine {r['refine_factor']}",
        "recall@100": lambda r: f"{r['recall_at_100']:.3f}",
        "anonymous MB, opened / asked (flat /)": lambda r: (
            f"{r['opened_bytes'] / 1e6:.1f} / {r['anonymous_bytes'] / 1e6:.1f} ({r['flat_over_anonymous']})"
        ),
        "index file MB (flat /)": lambda r: (
            f"{r['index_file_bytes'] / 1e6:.1f} ({r['flat_over_index_file']})"
        ),
        "mapped vectors MB": lambda r: f"{r['mapped_vector_bytes'] / 1e6:.0f}",
        "warm p50 / p99 ms": lambda r: f"{r['warm_p50_ms']} / {r['warm_p99_ms']}",
        "cold first / p50 / p99 ms": lambda r: (
            f"{r['cold_first_ms']:.0f} / {r['cold_p50_ms']} / {r['cold_p99_ms']}"
        ),
        "build s": lambda r: f"{r['build_s']}",
        "peak GB": lambda r: f"{r['peak_bytes'] / 1e9:.2f}",
    }
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    return "\n".join(
        [*lines, *("| " + " | ".join(show(row) for show in columns.values()) + " |" for row in rows)]
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--items", default="100000,1000000,10000000")
    parser.add_argument(
        "--like",
        type=Path,
        required=True,
        help="folder of a release whose items.npy the vectors shall be like",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("bench_index"),
        help="folder for the indexes, report.json and growth.png",
    )
    parser.add_argument(
        "--recall",
        type=float,
        default=0.96,
        help="recall@100 to tune for; a little above what is wanted on other queries",
    )
    parser.add_argument(
        "--bytes-per-item", type=float, help="memory budget of the index; default: builders.index.choice's"
    )
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.measure:
        print(json_text(measure(given.measure, json.loads((given.measure / "facts.json").read_text()))))
        return
    release = open_served(given.like.parent, given.like.name)
    like, queries = (
        likeness(np.ascontiguousarray(release.items["embedding"][1:])),
        user_embeddings(release, 2 * _QUERIES),
    )
    rows = []
    for count in map(int, given.items.split(",")):
        folder = given.out / str(count)
        facts_path = folder / "facts.json"
        if not facts_path.exists():
            budget = int(given.bytes_per_item * count) if given.bytes_per_item else None
            facts = build(count, like, queries, folder, IndexTarget(given.recall), budget)
            facts_path.write_text(json_text(facts, indent=1))
        # a fresh process: what building left in this one's memory is not the index's
        command = [
            sys.executable,
            "-m",
            "builders.bench.index",
            "--like",
            str(given.like),
            "--measure",
            str(folder),
        ]
        rows.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
        print(table(rows[-1:]).splitlines()[-1], file=sys.stderr, flush=True)
    (given.out / "report.json").write_text(json_text(rows, indent=1))
    plot(rows, given.out / "growth.png")
    print(table(rows))


if __name__ == "__main__":
    main()
