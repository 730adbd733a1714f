"""Measures what faults of Redis cost who asks for lists.

    python -m clients.bench.faults --repository REPOSITORY [--rate R] [--seconds S] [--json F]

It starts a redis-server, loads the release's rows, serves a copy of the repository with the real tritonserver
and asks at Poisson times (open loop: a delay counts from when the request was due). Each row: some seconds as
usual, a fault, its repair, some seconds more; a/b/c is before / during / after. Every answer is held against
the user's healthy one: rows in Redis are the snapshot's, so a list that differs beyond ties is wrong, flagged
or not. stale, missing: answers so flagged. recovery: from the repair until the last of them before ten in a
row are not, and until the last of all; on a busy machine some are flagged without any fault, because Redis
was asked for longer than --deadline-ms.

frozen      SIGSTOP, then SIGCONT
killed      kill -9; back, empty; loaded some seconds later
full        maxmemory 1mb evicts all, pointers too; loaded
garbage     a tenth of the keys hold no row of theirs; loaded
slow_N      a proxy holds each command back for N ms
resets      the proxy cuts each reply in half, then resets
masterdown  a replica without its master: each read is an error
noauth      the steps' user is off, their connections are ended
stampede    500 callers at once of a user whose row every memory has just dropped, between two such bursts
            of a row that is there

A row in memory is believed for --soft-ttl-s, not for the product's 30 s, so that nearly every request needs
Redis and feels its faults. Only the stampede is served with the product's own times.
"""

from __future__ import annotations

import argparse
import contextlib
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
from ensemble.json_text import json_text
from ensemble.release.release import Release, open_release
from ensemble.release.repository import require_active, require_folder
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
# Of a request: due and ended, on the monotonic clock; its answer, or what went wrong.
Note = tuple[float, float, Recommendations | str]
Row = dict[str, Any]


def _ask(transport: GrpcTransport, user: str, due: float, top_k: int = _TOP_K) -> Note:
    """Asks once for a user's list; nothing is tried again, since each failure counts."""
    call = Call((user.encode(),), {"top_k": top_k})
    reply: Recommendations | str
    try:
        reply = recommendations_from_answer(call, transport.send(call), 0.0)[0]
    except PeregrineError as error:
        reply = str(error)
    return due, time.monotonic(), reply


def closed_loop(url: str, users: Sequence[str], in_flight: int, top_k: int = _TOP_K) -> list[Note]:
    """Asks for each of `users` once, `in_flight` at a time."""
    transport = GrpcTransport(url)
    with ThreadPoolExecutor(in_flight) as pool:
        notes = list(pool.map(lambda user: _ask(transport, user, time.monotonic(), top_k), users))
    transport.close()
    return notes


def _open_loop(url: str, users: list[str], rate: float, pipe: Any) -> None:
    """Asks for `users` in turn at Poisson times until `pipe` says enough, and sends the notes.

    It runs in a process of its own: what is done to Redis meanwhile must not take its GIL.
    """
    transport, rng, pending = GrpcTransport(url), random.Random(0), list[Future[Note]]()
    with ThreadPoolExecutor(_BURST) as pool:
        _ask(transport, users[0], 0.0)
        pipe.send("asking")
        due = time.monotonic()
        while not pipe.poll():
            due += rng.expovariate(rate)
            time.sleep(max(0.0, due - time.monotonic()))
            pending.append(pool.submit(_ask, transport, users[len(pending) % len(users)], due))
    pipe.send([one.result() for one in pending])


STAMPEDE = "stampede"
ALL = [*STRAIGHT, *PROXIED, STAMPEDE]


def is_right(reply: Recommendations, healthy: Recommendations) -> bool:
    """Tells whether a reply is the healthy list up to ties, with the healthy flags but for those of rows that
    could not be had."""

    def near(one: float, other: float) -> bool:
        return abs(one - other) <= _TOLERANCE * (1 + abs(other))

    scores = {item.item_id: item.score for item in healthy.items}
    pairs = zip(reply.items, healthy.items, strict=False)
    same = all(
        near(item.score, there.score) and near(item.score, scores.get(item.item_id, math.nan))
        for item, there in pairs
    )
    whole = len(reply.items) == len(set(reply.item_ids)) == min(_TOP_K, len(healthy.items))
    return whole and same and (reply.degraded ^ healthy.degraded) & ~(_STALE | _MISSING) == 0


@dataclass
class Bench:
    """Puts one server under load: knows what is asked and what is right, and counts what comes of it."""

    redis: FaultyRedis
    seconds: float
    users: list[str]  # in the order they are asked for
    rate: float | None  # requests a second; None: _SHARE of a closed loop's, at most _MAX_RATE
    url: str = ""
    capacity: float = 0.0
    healthy: dict[str, Recommendations] = field(default_factory=dict)

    def learn(self) -> None:
        """Warms a server; notes on the first one the healthy lists, and how many answers a second a closed
        loop gets."""
        everyone = sorted(set(self.users))
        closed_loop(self.url, everyone[:100], _IN_FLIGHT)
        if self.healthy:
            return
        began = time.monotonic()
        notes = closed_loop(self.url, everyone, _IN_FLIGHT, _TOP_K + _SPARE)
        self.capacity = len(everyone) / (time.monotonic() - began)
        self.rate = self.rate or min(_MAX_RATE, _SHARE * self.capacity)
        self.healthy = {reply.user_id: reply for *_, reply in notes if isinstance(reply, Recommendations)}
        if len(self.healthy) < len(everyone):
            raise ServerError(
                f"without any fault {len(everyone) - len(self.healthy)} of {len(everyone)} requests failed"
            )

    def fault(self, name: str) -> Row:
        """Does harm and repairs it under the open loop; gives the row of the fault."""
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
        """Sends three bursts; the row's `reads` are Redis's calls of MGET while the second is answered."""
        user, client = self.users[0], self.redis.client
        notes, began, reads = list[Note](), list[float](), list[int]()
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
        """Counts the answers before, during and after a fault, and says when the server had recovered."""
        moments = (-math.inf if name == STAMPEDE else began - self.seconds, began, repaired, math.inf)
        row: Row = {"fault": name, "sent": len(notes), "ok": 0, "failed": 0, "wrong": 0, "failures": []}
        for phase, start, end in zip(_PHASES, moments, moments[1:], strict=False):
            took_ms = [1000 * (done - due) for due, done, _ in notes if start <= due < end] or [0.0]
            row |= {f"p{p}_ms_{phase}": round(float(np.percentile(took_ms, p)), 1) for p in (50, 99)}
            row |= {f"stale_{phase}": 0, f"missing_{phase}": 0}
        after = list[tuple[float, bool]]()  # seconds since the repair, flagged
        for due, done, reply in sorted(notes, key=lambda note: note[1]):
            if isinstance(reply, str):
                row["failed"] += 1
                row["failures"] = sorted({*row["failures"], reply})[:5]
                continue
            stale, missing = bool(reply.degraded & _STALE), bool(reply.degraded & _MISSING)
            right = is_right(reply, self.healthy[reply.user_id])
            phase = _PHASES[(due >= began) + (due >= repaired)]
            row[f"stale_{phase}"] += stale
            row[f"missing_{phase}"] += missing
            row["wrong"] += not right
            row["ok"] += right and not stale and not missing
            after += [(round(done - repaired, 3), stale or missing)] * (done > repaired)
        return {**row, **recovery(after)}


def recovery(after: list[tuple[float, bool]]) -> dict[str, float]:
    """Finds when the last flagged answer came before ten clean ones in a row, and the last of all; in seconds
    since the repair, 0 if none came."""
    flags = [flagged for _, flagged in after]
    clean = next((n for n in range(len(flags)) if not any(flags[n : n + _CLEAN])), len(flags))
    return {
        "recovery_s": after[clean - 1][0] if clean else 0.0,
        "last_flagged_s": max((at for at, flagged in after if flagged), default=0.0),
    }


def misses(row: Row) -> list[str]:
    """Names the targets that a row misses."""
    missed = [f"{name} {row[name]}" for name in ("failed", "wrong") if row[name]]
    if (added_ms := row["p99_ms_during"] - row["p99_ms_before"]) > _MARGIN_MS:
        missed.append(f"p99 {added_ms:+.0f} ms")
    if row["fault"] == "frozen" and row["recovery_s"] > _RECOVERY_S:
        missed.append(f"recovery {row['recovery_s']} s")
    return missed


def table(rows: list[Row]) -> str:
    """Writes the rows as a Markdown table."""
    head = ["fault", "sent", "ok", "stale", "missing", "failed", "wrong"]
    head += ["p50 ms", "p99 ms", "recovery s", "reads", "missed targets"]
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
    """Serves as `peregrine serve --redis` does, but with settings of our own: the server's processes inherit
    the variable that names their file."""
    write_settings(file, settings)
    os.environ[VARIABLE] = str(file)
    try:
        with serve(repository, ServeOptions(port=0, metrics_port=None)) as server:
            yield server.url
    finally:
        del os.environ[VARIABLE]


def measure(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Measures the faults that were named; the server is started once for each way to Redis."""
    release = open_release(given.repository, require_active(given.repository))
    copy = folder / "repository"
    shutil.copytree(given.repository, copy, ignore=shutil.ignore_patterns(".*"))
    redis = FaultyRedis(release, folder, 0.6 * given.seconds)
    bench, rows = Bench(redis, given.seconds, _users(release), given.rate), list[Row]()
    try:
        redis.start()
        redis.load()
        for settings, names in _ways(given, redis):
            if not (chosen := [name for name in given.faults if name in names]):
                continue
            with served(copy, folder / "tiers.json", settings) as bench.url:
                bench.learn()
                for name in chosen:
                    rows.append(bench.stampede() if name == STAMPEDE else bench.fault(name))
                    print(table(rows[-1:]).splitlines()[-1], file=sys.stderr, flush=True)
    finally:
        redis.kill()
    return {
        **machine(),
        "shop": release.schema.shop,
        "release": release.name,
        "rate": bench.rate,
        "capacity": bench.capacity,
        "seconds": given.seconds,
        "command": " ".join(["python -m clients.bench.faults", *sys.argv[1:]]),
        "settings": _own_settings(given),
        "targets_missed": {row["fault"]: misses(row) for row in rows if misses(row)},
        "rows": rows,
    }


def _users(release: Release) -> list[str]:
    """Draws the users to ask for, by Zipf, some of them unknown to the release."""
    rng = np.random.default_rng(0)
    known = release.user_ids.ids_from_rows(1 + rng.permutation(len(release.user_ids))[:_USERS])
    users = np.array([*known, *(b"nobody-%d" % n for n in range(_UNKNOWN))])
    return [user.decode() for user in zipf_users(users, 10_000, 1.1, rng).tolist()]


def _own_settings(given: argparse.Namespace) -> dict[str, Any]:
    """Gives the tiers' settings in place of the product's: memory is believed for a short time only."""
    ttl_s = given.soft_ttl_s
    return {"deadline_ms": given.deadline_ms, "soft_ttl_s": ttl_s, "negative_ttl_s": ttl_s}


def _ways(given: argparse.Namespace, redis: FaultyRedis) -> list[tuple[TierSettings, list[str]]]:
    """Lists the ways to Redis, straight or by the proxy, each with the faults that are done there."""
    own, straight = _own_settings(given), f"redis://127.0.0.1:{redis.port}"
    return [
        (TierSettings(straight, **own), [*STRAIGHT]),
        (TierSettings(f"redis://127.0.0.1:{redis.proxy.port}", **own), [*PROXIED]),
        (TierSettings(straight, deadline_ms=given.deadline_ms), [STAMPEDE]),
    ]


def main(arguments: list[str] | None = None) -> None:
    """Measures the faults that were named, and prints the table; exit code 2 if that cannot be done."""
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
        require_folder(given.repository)
        with tempfile.TemporaryDirectory(dir=given.repository.parent) as folder:
            figures = measure(given, Path(folder))
        if given.json:
            given.json.write_text(json_text(figures, indent=1) + "\n", encoding="utf-8")
    except (PeregrineError, ModuleNotFoundError, OSError, EOFError) as error:
        parser.exit(2, f"error: {str(error) or 'the process that asks has ended'}\n")
    print(table(figures["rows"]))
    margin, recovery_s = f"{_MARGIN_MS:.0f} ms", f"{_RECOVERY_S} s"
    print(
        f"\n{figures['rate']:.0f} requests a second, of {figures['capacity']:.0f} in a closed loop. Targets: "
        f"failed 0, wrong 0, p99 during <= before + {margin}, recovery of frozen <= {recovery_s}."
    )


if __name__ == "__main__":
    main()
