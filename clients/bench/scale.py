"""Says how many machines a catalogue and a rate take, from measured figures and a simulated queue.

    python -m clients.bench.scale                          # the table of docker/SCALE.md
    python -m clients.bench.scale --items 3e6 --rate 2000  # one row
    python -m clients.bench.scale --check                  # the queue against what was measured

Figures named MEASURED are of BENCHMARKS.md; what is beyond them is marked. Prices are given, not known.
"""

from __future__ import annotations

import argparse
import bisect
import heapq
import math
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from ensemble.arrays import Array

# MEASURED, a Beauty-sized chain served fused: a batch of b lists takes START + b x EACH ms of one core (part
# 4: a lone list 4.0 ms, 2.3 ms a list in batches of sixty), of which the search of 12,000 items is SMALL
START_MS, EACH_MS, SMALL_SEARCH_MS, MOST_BATCH = 1.73, 2.27, 0.3, 64
# MEASURED: gRPC and Triton around it, for a lone list (section 4: p50 7.9 ms, 4.0 of them the batch)
AROUND_MS = 3.9
# MEASURED: ms to search the index for one user, one thread (section 8)
SEARCH_MS = {1e5: 0.4, 1e6: 1.3, 1e7: 5.0}
# MEASURED on one H200 with 16 cores: lists a second of the chain, and ms of 64 searches (section 6, GPU)
GPU_LISTS, GPU_SEARCH_64_MS = 6899.0, {1.2e4: 0.45, 1e6: 5.74, 1e7: 16.3}
# MEASURED, bytes an item of a release 128 wide: rows (880), items taken next (800), ids and titles (60); the
# index: whole vectors, mapped, up to a million; beyond, fp16 vectors, mapped, and codes of each process's own
ROWS, FLAT, HALF, CODES = 1740, 512, 256, 25.4
PROCESS_MB = 60.0  # MEASURED: a fused process's own (169 MB of two and tritonserver)
FLAT_UP_TO = 2e6
# MEASURED: a queue that shares two cores with the generator is so much slower (fitted at 362/s, see --check)
SHARED = 1.45
LAST_MEASURED = 1e7
# MEASURED: what processes on one node get of what each alone would (2 cores: 724/s of 881, section 4; 16
# cores: 2,126/s of 7,048, section 6); larger nodes as many of 16. The generator's share of cores is in both
EFFICIENCY = {2: 0.82, 16: 0.30}


@dataclass(frozen=True)
class Node:
    """Is a machine that can be rented."""

    name: str
    cores: int
    memory_gb: float
    gpus: int
    dollars_an_hour: float


CPU_NODE = Node("16 cores, 64 GB", 16, 64, 0, 0.70)
LARGE_NODE = Node("64 cores, 512 GB", 64, 512, 0, 3.60)
GPU_NODE = Node("1 GPU of 141 GB, 16 cores, 200 GB", 16, 200, 1, 4.50)
NODES = (CPU_NODE, LARGE_NODE, GPU_NODE)


@dataclass(frozen=True)
class Plan:
    """Says what a catalogue and a rate take of one kind of node."""

    items: float
    rate: float
    node: Node
    nodes: int  # one more than needed, two at least
    per_node: float  # lists a second that keep to the p99
    memory_gb: float  # of one node
    cpu_ms: float  # of a list
    dollars_a_month: float
    notes: list[str] = field(default_factory=list)


def search_ms(items: float, table: dict[float, float] | None = None) -> float:
    """Gives ms of a search, between measured sizes by a straight line of logarithms; beyond, by the root: as
    many more lists as items in each."""
    known = table or SEARCH_MS
    sizes = sorted(known)
    if items >= sizes[-1]:
        return known[sizes[-1]] * math.sqrt(items / sizes[-1])
    logs = np.interp(math.log(items), np.log(sizes), np.log([known[one] for one in sizes]))
    return float(np.exp(logs))


def list_ms(items: float) -> tuple[float, float]:
    """Gives ms of one core (for a batch's start, for each of its lists)."""
    return START_MS, EACH_MS - SMALL_SEARCH_MS + search_ms(items)


def memory_gb(items: float, processes: int) -> float:
    """Gives the memory of a node: pages that all its processes share, and what each has of its own."""
    is_flat = items <= FLAT_UP_TO
    shared = items * (ROWS + (FLAT if is_flat else HALF))
    own = processes * (PROCESS_MB * 1e6 + (0.0 if is_flat else items * CODES))
    return (shared + own) / 1e9 + 1.0  # and the system's


def queue_ms(
    rate: float, servers: int, start_ms: float, each_ms: float, count: int = 20_000, seed: int = 0
) -> Array:
    """Simulates Poisson arrivals at `servers` processes, each of which takes all that waits, up to
    MOST_BATCH, whenever it is free; gives every request's ms [R] until its batch is done."""
    rng = np.random.default_rng(seed)
    times = np.cumsum(rng.exponential(1e3 / rate, count))
    arrivals, done = times.tolist(), [0.0] * count
    free, head = [0.0] * servers, 0
    while head < count:
        begin = max(free[0], arrivals[head])
        end = min(bisect.bisect_right(arrivals, begin, head), head + MOST_BATCH)
        finish = begin + start_ms + each_ms * (end - head)
        done[head:end] = [finish] * (end - head)
        head = end
        heapq.heapreplace(free, finish)
    result: Array = np.array(done) - times
    return result


def efficiency(cores: int) -> float:
    """Gives the measured share, between 2 and 16 cores by a straight line of logarithms."""
    sizes = sorted(EFFICIENCY)
    return float(np.interp(math.log(cores), np.log(sizes), [EFFICIENCY[one] for one in sizes]))


@lru_cache
def greatest_rate(servers: int, start_ms: float, each_ms: float, p99_ms: float) -> float:
    """Finds the lists a second that `servers` processes give with a p99 of at most `p99_ms`, by halving."""
    low, high = 0.0, servers * 1e3 / each_ms
    for _ in range(9):
        middle = (low + high) / 2
        took = np.percentile(queue_ms(middle, servers, start_ms, each_ms), 99) + AROUND_MS
        low, high = (middle, high) if took <= p99_ms else (low, middle)
    return low


def plan(items: float, rate: float, node: Node, p99_ms: float = 50.0) -> Plan:
    """Plans a catalogue and a rate on one kind of node."""
    start_ms, each_ms = list_ms(items)
    notes = [] if items <= LAST_MEASURED else ["beyond what was measured"]
    if node.gpus:
        search = (search_ms(items, GPU_SEARCH_64_MS) - GPU_SEARCH_64_MS[1.2e4]) / 64
        # Half of the greatest rate: what keeps the measured p99 at 57 ms and not at a second
        per_node, need = 0.5 / (1 / GPU_LISTS + search / 1e3), memory_gb(items, 10)
        on_card = items * FLAT / 1e9
        if on_card > 120 * node.gpus:
            notes.append(f"the index needs {math.ceil(on_card / 120)} cards")
    else:
        per_node = greatest_rate(node.cores, start_ms, each_ms, p99_ms) * efficiency(node.cores)
        need = memory_gb(items, node.cores)
    if need > node.memory_gb:
        notes.append(f"does not fit: {math.ceil(need / node.memory_gb)} shards by item, which are not built")
    nodes = max(2, math.ceil(rate / per_node) + 1) if per_node else 0
    if not per_node:
        notes.append(f"no rate keeps to {p99_ms:.0f} ms")
    month = nodes * node.dollars_an_hour * 730
    return Plan(items, rate, node, nodes, per_node, need, start_ms + each_ms, month, notes)


def table(plans: list[Plan]) -> str:
    """Writes plans as a Markdown table."""
    head = "items | lists a second | node | nodes | lists a second each | memory each, GB | ms of a core"
    lines = [f"{head} | $ a month | notes", "--|--|--|--|--|--|--|--|--"]
    for one in plans:
        cells = [f"{one.items / 1e6:g} M", f"{one.rate:,.0f}", one.node.name, str(one.nodes)]
        cells += [f"{one.per_node:,.0f}", f"{one.memory_gb:,.1f}", f"{one.cpu_ms:.1f}"]
        lines.append(" | ".join([*cells, f"{one.dollars_a_month:,.0f}", "; ".join(one.notes)]))
    return "\n".join(lines)


def check() -> str:
    """Holds the simulated queue against section 4's open loop on two shared cores."""
    measured = {181: (8.9, 21.0), 362: (19.6, 44.0), 543: (29.6, 74.0)}
    lines = ["lists a second | measured p50, p99 | simulated p50, p99", "--|--|--"]
    for rate, (p50, p99) in measured.items():
        took = queue_ms(rate, 2, START_MS * SHARED, EACH_MS * SHARED) + AROUND_MS
        ours = np.percentile(took, [50, 99])
        lines.append(f"{rate} | {p50}, {p99} | {ours[0]:.1f}, {ours[1]:.1f}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Prints the table, one row of it, or the check."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--items", type=float, help="of the catalogue (1e6, 1e7 and 1e8)")
    parser.add_argument("--rate", type=float, help="lists a second (1e3, 1e4 and 1e5)")
    parser.add_argument("--p99-ms", type=float, default=50.0, help="that a CPU node has to keep to (50)")
    parser.add_argument("--check", action="store_true", help="the queue against what was measured")
    given = parser.parse_args(arguments)
    for name in ("items", "rate", "p99_ms"):
        value = getattr(given, name)
        if value is not None and not 0 < value < 1e12:
            parser.exit(
                2, f"error: --{name.replace('_', '-')}: must be above 0 and below 1e12, got {value:g}\n"
            )
    if given.check:
        print(check())
        return
    sizes = [given.items] if given.items else [1e6, 1e7, 1e8]
    rates = [given.rate] if given.rate else [1e3, 1e4, 1e5]
    print(
        table([plan(items, rate, node, given.p99_ms) for items in sizes for rate in rates for node in NODES])
    )


if __name__ == "__main__":
    main()
