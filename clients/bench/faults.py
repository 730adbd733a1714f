"""What faults of Redis cost who asks for lists.   python -m clients.bench.faults --repository REPOSITORY
[--rate R] [--seconds S] [--json F]

It starts a redis-server, loads the release's rows, serves a copy of the repository with the real tritonserver
and asks at Poisson times (open loop: a delay counts from when the request was due). Each row: some seconds as
usual, a fault, its repair, some seconds more; a/b/c is before / during / after. Every answer is held against
the user's healthy one: rows in Redis are the snapshot's, so a list that differs beyond ties is wrong, flagged
or not. stale, missing: answers so flagged. recovery: from the repair until the last of them before ten in a
row are not, and until the last of all; on a busy machine some are flagged without any fault, because Redis
was asked for longer than --deadline-ms.

frozen    SIGSTOP, then SIGCONT                               slow_N      a proxy holds each command back for N ms
killed    kill -9; back, empty; loaded some seconds later     resets      the proxy cuts each reply in half, then resets
full      maxmemory 1mb evicts all, pointers too; loaded      masterdown  a replica without its master: each read is an error
garbage   a tenth of the keys hold no row of theirs; loaded   noauth      the steps' user is off, their connections are ended
stampede  500 callers at once of a user whose row every memory has just dropped, between two such bursts of a row that is there

A row in memory is believed for --soft-ttl-s, not for the product's 30 s, so that nearly every request needs
Redis and feels its faults. Only the stampede is served with the product's own times.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from clients.bench.faulty_redis import PROXIED, STRAIGHT, FaultyRedis
from clients.bench.loadgen import zipf_users
from clients.bench.machine import machine
from clients.results import Recommendations
from clients.transport import GrpcTransport
from clients.wire import Call, recommendations_from_answer
from ensemble.contract import Degraded
from ensemble.errors import InvalidInput, PeregrineError, ServerError
from ensemble.release.release import active_release, open_release
from ensemble.server.options import ServeOptions
from ensemble.server.supervisor import serve
from ensemble.tiers.records import keys_from_identities, user_identities
from ensemble.tiers.settings import VARIABLE, TierSettings, write_settings

_TOP_K, _SPARE = 10, 20  # a healthy list is longer, so that ties at a list's end are known as such
_TOLERANCE = 1e-4  # of scores: batches of another size add in another order
_USERS, _UNKNOWN, _BURST, _IN_FLIGHT = 1000, 20, 500, 16
_SHARE, _MAX_RATE = 0.4, 100.0  # of what a closed loop gets; requests a second
_STALE, _MISSING = int(Degraded.FEATURES_STALE), int(Degraded.FEATURES_MISSING)
_MARGIN_MS, _RECOVERY_S = 25.0, 0.5  # targets
_CLEAN = 10
_PHASES = ("before", "during", "after")
Note = tuple[
    float, float, Recommendations | str
]  # of a request: due and ended, on the monotonic clock; its answer, or what went wrong
Row = dict[str, Any]


def _ask(transport: GrpcTransport, user: str, due: float, top_k: int = _TOP_K) -> Note:
    """Nothing is tried again: each failure counts."""
    call = Call((user.encode(),), {"top_k": top_k})
    said: Recommendations | str
    try:
        said = recommendations_from_answer(call, transport.send(call), 0.0)[0]
    except PeregrineError as error:
        said = str(error)
    return due, time.monotonic(), said


def closed_loop(url: str, users: Sequence[str], in_flight: int, top_k: int = _TOP_K) -> list[Note]:
    """Each of `users` once."""
    transport = GrpcTransport(url)
    with ThreadPoolExecutor(in_flight) as pool:
        notes = list(pool.map(lambda user: _ask(transport, user, time.monotonic(), top_k), users))
    transport.close()
    return notes


def _open_loop(url: str, users: list[str], rate: float, pipe: Any) -> None:
    """`users` in turn until told to stop. A process of its own: what is done to Redis meanwhile must not take
    its GIL."""
    transport, rng, asked = GrpcTransport(url), random.Random(0), list[Future[Note]]()
    with ThreadPoolExecutor(_BURST) as pool:
        _ask(transport, users[0], 0.0)
        pipe.send("asking")
        due = time.monotonic()
        while not pipe.poll():
            due += rng.expovariate(rate)
            time.sleep(max(0.0, due - time.monotonic()))
            asked.append(pool.submit(_ask, transport, users[len(asked) % len(users)], due))
    pipe.send([one.result() for one in asked])


STAMPEDE = "stampede"
ALL = [*STRAIGHT, *PROXIED, STAMPEDE]


def is_right(said: Recommendations, healthy: Recommendations) -> bool:
    """The healthy list up to ties, and the healthy flags but for those of rows that could not be had."""

    def near(one: float, other: float) -> bool:
        return abs(one - other) <= _TOLERANCE * (1 + abs(other))

    scores = {item.item_id: item.score for item in healthy.items}
    pairs = zip(said.items, healthy.items, strict=False)
    same = all(
        near(item.score, there.score) and near(item.score, scores.get(item.item_id, math.nan))
        for item, there in pairs
    )
    whole = len(said.items) == len(set(said.item_ids)) == min(_TOP_K, len(healthy.items))
    return whole and same and (said.degraded ^ healthy.degraded) & ~(_STALE | _MISSING) == 0


@dataclass
class Bench:
    """One server under load: what is asked, what is right, what comes of it."""

    redis: FaultyRedis
    seconds: float
    users: list[str]  # in the order they are asked for
    rate: float | None  # requests a second; None: _SHARE of a closed loop's, at most _MAX_RATE
    url: str = ""
    capacity: float = 0.0
    healthy: dict[str, Recommendations] = field(default_factory=dict)

    def learn(self) -> None:
        """Warms a server; on the first, notes healthy lists and how many answers a second a closed loop
        gets."""
        everyone = sorted(set(self.users))
        closed_loop(self.url, everyone[:100], _IN_FLIGHT)
        if self.healthy:
            return
        began = time.monotonic()
        notes = closed_loop(self.url, everyone, _IN_FLIGHT, _TOP_K + _SPARE)
        self.capacity = len(everyone) / (time.monotonic() - began)
        self.rate = self.rate or min(_MAX_RATE, _SHARE * self.capacity)
        self.healthy = {said.user_id: said for *_, said in notes if isinstance(said, Recommendations)}
        if len(self.healthy) < len(everyone):
            raise ServerError(
                f"without any fault {len(everyone) - len(self.healthy)} of {len(everyone)} requests failed"
            )

    def fault(self, name: str) -> Row:
        """One row, under the open loop."""
        ours, its = multiprocessing.Pipe()
        multiprocessing.get_context("spawn").Process(
            target=_open_loop, args=(self.url, self.users, self.rate, its), daemon=True
        ).start()
        its.close()  # so that we hear of its end
        ours.recv()
        time.sleep(1.4 * self.seconds)
        began = time.monotonic()
        harm, repair = {**STRAIGHT, **PROXIED}[name]
        harm(self.redis)
        time.sleep(self.seconds)
        repair(self.redis)
        repaired = time.monotonic()
        time.sleep(self.seconds)
        ours.send("enough")
        return self._row(name, ours.recv(), began, repaired)

    def stampede(self) -> Row:
        """Three bursts. `reads` are Redis's calls of MGET while the second is answered."""
        user, client, notes, began, reads = (
            self.users[0],
            self.redis.client,
            list[Note](),
            list[float](),
            list[int](),
        )
        key = keys_from_identities(self.redis.prefix("users"), user_identities(np.array([user.encode()])))[0]
        closed_loop(self.url, [user] * _BURST, _BURST)
        for phase in _PHASES:
            if phase == "during":
                client.set(key, client.get(key), keepttl=True)  # every memory hears of it
                time.sleep(0.2)
            began.append(time.monotonic())
            reads.append(client.info("commandstats")["cmdstat_mget"]["calls"])
            notes += closed_loop(self.url, [user] * _BURST, _BURST)
        return {**self._row(STAMPEDE, notes, began[1], began[2]), "reads": reads[2] - reads[1]}

    def _row(self, name: str, notes: list[Note], began: float, repaired: float) -> Row:
        moments = (-math.inf if name == STAMPEDE else began - self.seconds, began, repaired, math.inf)
        row: Row = {"fault": name, "sent": len(notes), "ok": 0, "failed": 0, "wrong": 0, "failures": []}
        for phase, start, end in zip(_PHASES, moments, moments[1:], strict=False):
            took_ms = [1000 * (done - due) for due, done, _ in notes if start <= due < end] or [0.0]
            row |= {f"p{p}_ms_{phase}": round(float(np.percentile(took_ms, p)), 1) for p in (50, 99)} | {
                f"stale_{phase}": 0,
                f"missing_{phase}": 0,
            }
        after = list[tuple[float, bool]]()  # seconds since the repair, flagged
        for due, done, said in sorted(notes, key=lambda note: note[1]):
            if isinstance(said, str):
                row["failed"] += 1
                row["failures"] = sorted({*row["failures"], said})[:5]
                continue
            stale, missing, right = (
                bool(said.degraded & _STALE),
                bool(said.degraded & _MISSING),
                is_right(said, self.healthy[said.user_id]),
            )
            phase = _PHASES[(due >= began) + (due >= repaired)]
            row[f"stale_{phase}"] += stale
            row[f"missing_{phase}"] += missing
            row["wrong"] += not right
            row["ok"] += right and not stale and not missing
            after += [(round(done - repaired, 3), stale or missing)] * (done > repaired)
        return {**row, **recovery(after)}


def recovery(after: list[tuple[float, bool]]) -> dict[str, float]:
    """When the last flagged answer came before ten clean ones in a row, and the last of all. Seconds; 0: none
    did."""
    flags = [flagged for _, flagged in after]
    clean = next((n for n in range(len(flags)) if not any(flags[n : n + _CLEAN])), len(flags))
    return {
        "recovery_s": after[clean - 1][0] if clean else 0.0,
        "last_flagged_s": max((at for at, flagged in after if flagged), default=0.0),
    }


def misses(row: Row) -> list[str]:
    """The targets that a row misses."""
    found = [f"{name} {row[name]}" for name in ("failed", "wrong") if row[name]]
    if (added_ms := row["p99_ms_during"] - row["p99_ms_before"]) > _MARGIN_MS:
        found.append(f"p99 {added_ms:+.0f} ms")
    if row["fault"] == "frozen" and row["recovery_s"] > _RECOVERY_S:
        found.append(f"recovery {row['recovery_s']} s")
    return found


def table(rows: list[Row]) -> str:
    """Markdown."""
    head = [
        "fault",
        "sent",
        "ok",
        "stale",
        "missing",
        "failed",
        "wrong",
        "p50 ms",
        "p99 ms",
        "recovery s",
        "reads",
        "missed targets",
    ]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        stale, missing, p50, p99 = (
            " / ".join(str(row[f"{key}_{phase}"]) for phase in _PHASES)
            for key in ("stale", "missing", "p50_ms", "p99_ms")
        )
        back = f"{row['recovery_s']} / {row['last_flagged_s']}"
        counts = [row["fault"], row["sent"], row["ok"], stale, missing, row["failed"], row["wrong"]]
        lines.append([*counts, p50, p99, back, row.get("reads", ""), ", ".join(misses(row)) or "none"])
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


@contextlib.contextmanager
def served(repository: Path, file: Path, settings: TierSettings) -> Iterator[str]:
    """As `peregrine serve --redis` does, but with settings of our own: its processes inherit the variable
    that names their file."""
    write_settings(file, settings)
    os.environ[VARIABLE] = str(file)
    try:
        with serve(repository, ServeOptions(port=0, metrics_port=None)) as server:
            yield server.url
    finally:
        del os.environ[VARIABLE]


def measure(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All of the faults asked for: the server once for each way to Redis, for the stampede with the product's
    own times."""
    release = open_release(given.repository, active_release(given.repository) or "none")
    copy, rng = folder / "repository", np.random.default_rng(0)
    shutil.copytree(given.repository, copy, ignore=shutil.ignore_patterns(".*"))
    known = release.user_ids.ids_from_rows(1 + rng.permutation(len(release.user_ids))[:_USERS])
    asked = zipf_users(np.array([*known, *(b"nobody-%d" % n for n in range(_UNKNOWN))]), 10_000, 1.1, rng)
    redis = FaultyRedis(release, folder, 0.6 * given.seconds)
    bench, rows = (
        Bench(redis, given.seconds, [user.decode() for user in asked.tolist()], given.rate),
        list[Row](),
    )
    own = {
        "deadline_ms": given.deadline_ms,
        "soft_ttl_s": given.soft_ttl_s,
        "negative_ttl_s": given.soft_ttl_s,
    }
    ways: list[tuple[int, dict[str, Any], list[str]]] = [
        (redis.port, own, [*STRAIGHT]),
        (redis.proxy.port, own, [*PROXIED]),
    ]
    try:
        redis.start()
        redis.load()
        for port, changed, names in [*ways, (redis.port, {"deadline_ms": given.deadline_ms}, [STAMPEDE])]:
            if not (chosen := [name for name in given.faults if name in names]):
                continue
            with served(
                copy, folder / "tiers.json", TierSettings(f"redis://127.0.0.1:{port}", **changed)
            ) as bench.url:
                bench.learn()
                for name in chosen:
                    rows.append(bench.stampede() if name == STAMPEDE else bench.fault(name))
                    print(table(rows[-1:]).splitlines()[-1], file=sys.stderr, flush=True)
    finally:
        redis.kill()
    facts = {
        "shop": release.schema.shop,
        "release": release.name,
        "rate": bench.rate,
        "capacity": bench.capacity,
        "seconds": given.seconds,
    }
    facts |= {"command": " ".join(["python -m clients.bench.faults", *sys.argv[1:]])}
    return {
        **machine(),
        **facts,
        "settings": own,
        "targets_missed": {row["fault"]: misses(row) for row in rows if misses(row)},
        "rows": rows,
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repository", type=Path, default=Path("model_repository"))
    parser.add_argument(
        "--rate", type=float, help="requests a second; default: 40 %% of what a closed loop gets, at most 100"
    )
    parser.add_argument("--seconds", type=float, default=5.0, help="before, during and after each fault")
    parser.add_argument(
        "--faults", type=lambda text: text.split(","), default=ALL, help="some of them: frozen,killed,…"
    )
    parser.add_argument("--soft-ttl-s", type=float, default=1.0, help="how long a row in memory is believed")
    parser.add_argument(
        "--deadline-ms", type=float, default=TierSettings.deadline_ms, help="of a call to Redis"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers")
    given = parser.parse_args(arguments)
    try:
        if unknown := sorted(set(given.faults) - set(ALL)):
            raise InvalidInput(f"--faults: there is no {unknown[0]!r}; there are {', '.join(ALL)}")
        if not given.repository.is_dir():
            raise InvalidInput(
                f"repository {given.repository} does not exist; `peregrine build SHOP --activate` makes one"
            )
        with tempfile.TemporaryDirectory(dir=given.repository.parent) as folder:
            report = measure(given, Path(folder))
        if given.json:
            given.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    except (PeregrineError, ModuleNotFoundError, OSError, EOFError) as error:
        parser.exit(2, f"error: {str(error) or 'the process that asks has ended'}\n")
    print(table(report["rows"]))
    targets = f"failed 0, wrong 0, p99 during <= before + {_MARGIN_MS:.0f} ms, recovery of frozen <= {_RECOVERY_S} s"
    print(
        f"\n{report['rate']:.0f} requests a second, of {report['capacity']:.0f} in a closed loop. Targets: "
        f"{targets}."
    )


if __name__ == "__main__":
    main()
