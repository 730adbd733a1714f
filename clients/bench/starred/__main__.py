"""Runs the faults that must not be felt against a real server, in both ways of serving: PASS or FAIL.

    python -m clients.bench.starred --repository REPOSITORY [--only NAME,…] [--runs N] [--all] [--json F]

Each test serves a copy of the repository, learns the healthy list of each user, measures what a closed loop
gets, and asks at 60% of that at Poisson times (open loop) through the product's own client, with a budget of
one second. Every answer that does not say POPULAR is held against the user's healthy list.

failed: an error came. wrong: an unflagged list that differs beyond ties from its own release's. lost: a call
that never ended. degraded: a list that says so. recovery: from the harm (from redis on: from its end) to the
last answer that failed or was degraded. With --runs each test is run as often, and each number is the worst.

stub        kill -9 of one process of two of a model (with --all: of each model in turn)
stubs       kill -9 of all processes of a model
stopped     SIGSTOP of a process of a model for 5 s
server      kill -9 of tritonserver
frozen      SIGSTOP of tritonserver for 5 s
drain       SIGTERM of one server of two
overload    ten times the capacity without budgets, some calls of high priority; a call has several users,
            so that it is not who asks that is too slow (with --all: 1, 2 and 5 times, too)
storm       budgets of .2 to 5 ms
redis       SIGSTOP of redis-server for 5 s, with rows believed for 1 s
swap        4 turns between two releases that answer otherwise (with --all: 50)
corrupt     10 changes of each kind of file of a release that is offered (with --all: 200)
half        parts of a release, and kill -9 of 5 pulls of one (with --all: 20)
bad         releases that are whole and wrong: own code, scores that are none, alike or upside down
asks        impossible lengths, unknown and long ids, a million items
holes       what is known to harm old servers, on the open port. class_count kills tritonserver 2.51, which no
            flag prevents: that it is known and survived is what passes
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from clients.bench.faulty_redis import FaultyRedis
from clients.bench.inputs import WAYS, check_ways, working_copy
from clients.bench.machine import machine
from clients.bench.starred import processes, releases, requests, stores
from clients.bench.starred.load import Bench, Row, some_users
from clients.bench.starred.setting import Setting
from clients.bench.starred.verdict import misses, table, worst
from ensemble.errors import InvalidInput, PeregrineError
from ensemble.json_text import json_text
from ensemble.release.release import open_release
from ensemble.release.repository import require_active, require_folder
from ensemble.server.options import ServeOptions
from ensemble.server.supervisor import Server, serve
from ensemble.tiers.settings import VARIABLE, TierSettings, write_settings

TESTS: dict[str, Callable[[Setting], list[Row]]] = {
    "stub": processes.stub,
    "stubs": processes.stubs,
    "stopped": processes.stopped,
    "server": processes.server,
    "frozen": processes.frozen,
    "drain": processes.drain,
    "overload": processes.overload,
    "storm": processes.storm,
    "redis": stores.redis,
    "swap": releases.swap,
    "corrupt": releases.corrupt,
    "half": releases.half,
    "bad": releases.bad,
    "asks": requests.asks,
    "holes": requests.holes,
}


def measure(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Runs the tests that were named, each on servers of its own, in both ways of serving."""
    name, rows = require_active(given.repository), list[Row]()
    for way in given.ways:
        for test in given.only:
            runs = [_run(given, folder, name, test, way) for _ in range(given.runs)]
            found = [worst(some) for some in zip(*runs, strict=True)]
            rows += found
            print(table(found).splitlines()[-1], file=sys.stderr, flush=True)
    failed = {f"{row['test']} {row['way']}": misses(row) for row in rows if misses(row)}
    facts = {"release": name, "seconds": given.seconds, "runs": given.runs}
    return {**machine(), **facts, "rows": rows, "missed": failed}


def _run(given: argparse.Namespace, folder: Path, name: str, test: str, way: str) -> list[Row]:
    """Runs one test once, on a copy of the repository."""
    with tempfile.TemporaryDirectory(dir=folder) as own:
        copy = working_copy(given.repository, Path(own) / "repository")

        def served(state: str) -> contextlib.AbstractContextManager[Server]:
            options = ServeOptions(
                port=0, metrics_port=None, fused=way == "fused", state=Path(own) / state, start_timeout_s=120
            )
            return serve(copy, options)

        bench = Bench(given.seconds, some_users(open_release(copy, name)))
        with _redis(copy, Path(own), name, test) as redis, served("state") as server:
            bench.urls = [server.url]
            bench.learn(server.url)
            setting = Setting(server, bench, copy, Path(own), lambda: served("other"), given.all, redis)
            found = TESTS[test](setting)
        return [{**row, "way": way, "capacity": round(bench.capacity, 1)} for row in found]


@contextlib.contextmanager
def _redis(copy: Path, folder: Path, name: str, test: str) -> Iterator[FaultyRedis | None]:
    """Starts a redis-server with the release's rows for the test that stops it; a row in memory is believed
    for a second only, so that nearly every call needs Redis."""
    if test != "redis":
        yield None
        return
    redis = FaultyRedis(open_release(copy, name), folder, stores.STOPPED_S)
    redis.start()
    try:
        redis.load()
        settings = TierSettings(f"redis://127.0.0.1:{redis.port}", soft_ttl_s=1.0, negative_ttl_s=1.0)
        write_settings(folder / "tiers.json", settings)
        os.environ[VARIABLE] = str(folder / "tiers.json")
        yield redis
    finally:
        os.environ.pop(VARIABLE, None)
        redis.kill()


def main(arguments: list[str] | None = None) -> None:
    """Runs the tests, prints the table; exit code 1 if a target is missed, 2 if they cannot be run."""
    parser = argparse.ArgumentParser(
        prog="python -m clients.bench.starred",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--repository", type=Path, default=Path("model_repository"))
    parser.add_argument("--seconds", type=float, default=3.0, help="before and after each harm")
    parser.add_argument("--only", type=lambda text: text.split(","), default=[*TESTS], help="some of them")
    parser.add_argument("--ways", type=lambda text: text.split(","), default=[*WAYS], help=",".join(WAYS))
    parser.add_argument("--runs", type=int, default=1, help="of each test; each number is the worst")
    parser.add_argument("--all", action="store_true", help="as often as the scorecard says")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers, those of each run too")
    given = parser.parse_args(arguments)
    try:
        _check(given)
        with tempfile.TemporaryDirectory(prefix="peregrine-faults-") as folder:
            figures = measure(given, Path(folder))
        if given.json:
            given.json.write_text(json_text(figures, indent=1) + "\n", encoding="utf-8")
    except (PeregrineError, OSError, EOFError, ModuleNotFoundError) as error:
        parser.exit(2, f"error: {str(error) or 'the process that asks has ended'}\n")
    print(table(figures["rows"]))
    sys.exit(1 if figures["missed"] else 0)


def _check(given: argparse.Namespace) -> None:
    """Raises InvalidInput for what cannot be run."""
    if unknown := sorted(set(given.only) - set(TESTS)):
        raise InvalidInput(f"--only: there is no {unknown[0]!r}; there are {', '.join(TESTS)}")
    check_ways(given.ways)
    if given.runs < 1:
        raise InvalidInput(f"--runs: must be at least 1, got {given.runs}")
    require_folder(given.repository)


if __name__ == "__main__":
    main()
