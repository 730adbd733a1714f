"""Gathers how a repository is served: what is at work, what is wrong, and what to type about it.

Nothing is written and nobody is waited for longer than a moment, so that it works on a read-only disk, for
another user, and while a server hangs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ensemble import contract
from ensemble.contract import Degraded
from ensemble.errors import PeregrineError
from ensemble.live.asking import writer_status
from ensemble.release.audit import last_changes
from ensemble.release.route import Route, read_route
from ensemble.server.calls import is_model_ready, is_open
from ensemble.server.following import route_in
from ensemble.server.health import READY, STARTING, STOPPING, read_health
from ensemble.server.running import RunningServer, num_of_others, running_servers

WELL, WRONG, DOWN = 0, 1, 3  # exit codes: all is well; it answers, but …; nobody answers (2: cannot be told)
_OLD_S = 15.0  # health is written every second
_SLOW_MS = 1000.0
_DEGRADED_SHARE = 0.005
_OURS = (Degraded.FEATURES_STALE, Degraded.FEATURES_MISSING, Degraded.RANK_SKIPPED, Degraded.CANARY_FAILED)
_FULL_BYTES, _FULL_SHARE = 500e6, 0.1
_READY_S = 2.0


@dataclass(frozen=True)
class Problem:
    """Says what is wrong, and what to do or to type."""

    what: str
    cure: str
    is_outage: bool = False


@dataclass(frozen=True)
class Status:
    """Holds all that there is to know, in JSON's types."""

    facts: dict[str, Any]
    problems: tuple[Problem, ...]
    is_ready: bool  # somebody answers `recommend`

    @property
    def exit_code(self) -> int:
        """Gives WELL, WRONG or DOWN."""
        if not self.is_ready:
            return DOWN
        return WRONG if self.problems else WELL

    def to_json(self) -> dict[str, Any]:
        """Gives it as one object."""
        problems = [{"what": one.what, "cure": one.cure} for one in self.problems]
        return {"ready": self.is_ready, "exit_code": self.exit_code, **self.facts, "problems": problems}


def gather(repository: Path, home: Path | None = None, state: Path | None = None) -> Status:
    """Looks at the servers of a repository that follow `home`, or at the one of a state folder."""
    home, repository = (home or repository).resolve(), repository.resolve()
    servers = _servers(repository, home, state)
    seen = [_server(one) for one in servers]
    problems = [*_route_problems(repository, home), *(one for server in seen for one in server.problems)]
    others = num_of_others(home)
    if not seen:
        problems.insert(0, _nobody(repository, others))
    live = writer_status(home)
    problems += _writer_problems(live, home, is_served=bool(seen))
    disks = _disks(home, [Path(one.state) for one in servers])
    problems += _disk_problems(disks)
    facts = {
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "repository": str(repository),
        "home": str(home),
        "route": _route(repository, home),
        "servers": [server.facts for server in seen],
        "servers_of_others": others,
        "items": live,
        "engines": _engines(repository, home, servers, seen),
        "disks": disks,
        "changes": last_changes(home),
    }
    return Status(facts, tuple(problems), any(server.is_ready for server in seen))


def is_ready(repository: Path, home: Path | None = None, state: Path | None = None) -> str:
    """Says why nobody answers `recommend`; empty if somebody does. For probes: it looks at little."""
    servers = _servers(repository.resolve(), (home or repository).resolve(), state)
    reasons = [_unready(one, read_health(Path(one.state))) for one in servers]
    if not reasons:
        return f"no server is at work on {repository}"
    return "" if "" in reasons else reasons[0]


def _servers(repository: Path, home: Path, state: Path | None) -> list[RunningServer]:
    """Lists the servers of a repository that follow a home, or the one of a state folder."""
    servers = running_servers(repository, home)
    return [one for one in servers if state is None or Path(one.state) == state.resolve()]


def _unready(server: RunningServer, health: Mapping[str, Any] | None) -> str:
    """Says why a server does not answer; empty if it does."""
    if server.is_stopping:
        return "it stops"
    if health is not None and health["phase"] != READY and time.time() - health["at"] < _OLD_S:
        return f"it is {health['phase']}"
    if health is not None and (dead := _without_processes(health)):
        return f"no process of {', '.join(dead)} is alive"
    if not is_open(server.url):
        return f"nobody listens at {server.url}"
    if not is_model_ready(server.url, contract.PIPELINE, _READY_S):
        return f"model {contract.PIPELINE} is not ready"
    return ""


def _without_processes(health: Mapping[str, Any]) -> list[str]:
    """Names the models of which no process lives."""
    return [name for name, one in health.get("models", {}).items() if one["wanted"] and not one["alive"]]


@dataclass(frozen=True)
class _Seen:
    """Holds what was seen of one server."""

    facts: dict[str, Any]
    problems: tuple[Problem, ...]
    is_ready: bool


def _server(server: RunningServer) -> _Seen:
    """Looks at one server."""
    health = read_health(Path(server.state))
    unready = _unready(server, health)
    told = health or {}
    facts = {
        "url": server.url,
        "metrics_url": server.metrics_url,
        "pid": server.pid,
        "state": server.state,
        "way": "fused" if server.is_fused else "ensemble",
        "runtime": told.get("runtime", server.engine),
        "ready": not unready,
        "why_not": unready,
        "phase": STOPPING if server.is_stopping else told.get("phase", "unknown"),
        "since": _time(told.get("since")),
        "started": _time(told.get("started")),
        "seen_s": round(time.time() - told["at"], 1) if told else None,
        "restarts": told.get("restarts"),
        "last_restart": told.get("last_restart", ""),
        "repairs": told.get("repairs"),
        "models": told.get("models", {}),
        "redis": _redis(server, told),
        "last_minute": told.get("last_minute"),
    }
    return _Seen(facts, tuple(_problems(server, told, unready)), not unready)


def _redis(server: RunningServer, health: Mapping[str, Any]) -> str:
    """Says how Redis is to a server's steps."""
    if not server.has_redis:
        return "not used"
    told = health.get("last_minute")
    if not told:
        return "used; how it answers is not known yet" if server.metrics_url else "used; metrics are off"
    if told["open_breakers"]:
        return f"does not answer {told['open_breakers']:.0f} processes"
    failures = sum(told["redis_failures"].values())
    return f"answers; {failures:.0f} calls failed in the last minute" if failures else "answers"


def _problems(server: RunningServer, health: Mapping[str, Any], unready: str) -> Iterator[Problem]:
    """Finds what is wrong with a server."""
    at = f"server {server.url}"
    if unready and health.get("phase") == STARTING:
        yield Problem(f"{at} is starting", "wait; `peregrine serve --verbose` shows what it loads", True)
    elif unready and not server.is_stopping:
        yield Problem(
            f"{at} does not answer: {unready}",
            f"it mends itself within seconds; if it does not: kill {server.pid}, and `peregrine serve` again",
            True,
        )
    if health and time.time() - health["at"] > _OLD_S:
        yield Problem(
            f"{at} has not written how it is for {time.time() - health['at']:.0f} s",
            f"is the disk of {server.state} full, or process {server.pid} stopped? kill -CONT {server.pid}",
        )
    for name, one in health.get("models", {}).items():
        if one["wanted"] and one["alive"] < one["wanted"]:
            yield Problem(
                f"{one['alive']} of {one['wanted']} processes of {name} are alive",
                "they are started again within seconds; if not, see the log of `peregrine serve`",
            )
        if one["fault"] or one["waiting_s"] * 1e3 > _SLOW_MS:
            why = one["fault"] or f"no answer for {one['waiting_s']:.1f} s"
            yield Problem(f"the canary of {name} failed: {why}", "see the log of `peregrine serve`")
    if health.get("restarts"):
        yield Problem(
            f"tritonserver of {at} was started again {health['restarts']} times; last: "
            f"{health['last_restart']}",
            "look into the log of `peregrine serve` for what came before it",
        )
    yield from _degraded(at, server, health.get("last_minute"))


def _degraded(at: str, server: RunningServer, minute: Mapping[str, Any] | None) -> Iterator[Problem]:
    """Finds flags that too many lists of the last minute had, by no fault of the callers."""
    if not minute or not minute["lists"]:
        return
    for flag in _OURS:
        count = minute["flagged"].get(str(flag.name).lower(), 0.0)
        share = count / minute["lists"]
        if share > _DEGRADED_SHARE:
            is_redis = flag in (Degraded.FEATURES_STALE, Degraded.FEATURES_MISSING)
            cure = (
                "is Redis well? redis-cli ping, and `peregrine features load`"
                if is_redis
                else "the machine has more to do than it can: fewer callers, more --instances or cores"
            )
            if flag == Degraded.CANARY_FAILED:
                cure = "`peregrine release abort` takes the canary out"
            yield Problem(f"{at}: {share:.1%} of the last minute's lists say {str(flag.name).lower()}", cure)


def _nobody(repository: Path, others: int) -> Problem:
    """Says that no server of ours is at work."""
    if others:
        return Problem(
            f"no server of this user is at work on {repository}; {others} of other users are listed there",
            "ask as the user who serves: sudo -u USER peregrine status",
            True,
        )
    return Problem(f"no server is at work on {repository}", "peregrine serve", True)


def _route(repository: Path, home: Path) -> dict[str, Any] | None:
    """Gives the route that servers follow; None where there is none, or it cannot be read."""
    with contextlib.suppress(PeregrineError, OSError):
        route: Route | None = route_in(repository, home)
        return dataclasses.asdict(route) if route else None
    return None


def _route_problems(repository: Path, home: Path) -> Iterator[Problem]:
    """Says what is wrong with the route."""
    try:
        if route_in(repository, home) is None:
            yield Problem(
                "no release is active", "peregrine release list, then peregrine release activate NAME"
            )
        read_route(home)
    except (PeregrineError, OSError) as error:
        yield Problem(str(error), "peregrine release activate NAME")


def _engines(
    repository: Path, home: Path, servers: list[RunningServer], seen: list[_Seen]
) -> list[dict[str, Any]]:
    """Says what each engine of the main release runs on, and which plans it has."""
    from ensemble.engines.plans import read_plans
    from ensemble.release.release import open_release

    found = list[dict[str, Any]]()
    with contextlib.suppress(PeregrineError, OSError, ValueError):
        route = route_in(repository, home)
        if route is None:
            return []
        release = open_release(repository, route.main, home)
        plans = [plan.member for plan in read_plans(release)]
        for model in (one for one in release.pipeline.models if one.is_engine):
            member = f"{route.main}_{model.name}"
            runs_on = [
                "tensorrt"
                if one.facts["models"].get(member, {}).get("runs_on") == "tensorrt"
                else server.engine
                for server, one in zip(servers, seen, strict=True)
            ]
            found.append({"engine": member, "runs_on": runs_on, "plans": plans.count(member)})
    return found


def _writer_problems(live: Mapping[str, Any], home: Path, *, is_served: bool) -> Iterator[Problem]:
    """Says what is wrong with the writer of items."""
    if live["pid"] and not live["answers"]:
        is_there = Path(f"/proc/{live['pid']}").exists()
        state = "does not answer" if is_there else "is gone"
        yield Problem(
            f"the writer of items, process {live['pid']}, {state}",
            f"`peregrine serve` replaces it; else: kill -9 {live['pid']}"
            if is_there
            else "`peregrine serve`, or `peregrine items serve`",
        )
    elif is_served and not live["pid"] and live["log"] and os.access(home, os.W_OK):
        yield Problem(f"nobody writes the items of {home}", "`peregrine items serve`")


def _disks(home: Path, states: list[Path]) -> list[dict[str, Any]]:
    """Measures the disks of home, state folders and shared memory."""
    found = list[dict[str, Any]]()
    for path in dict.fromkeys([home, *states, Path("/dev/shm")]):
        with contextlib.suppress(OSError):
            usage = shutil.disk_usage(path)
            found.append({"path": str(path), "free_bytes": usage.free, "total_bytes": usage.total})
    return found


def _disk_problems(disks: list[dict[str, Any]]) -> Iterator[Problem]:
    """Finds disks that are nearly full."""
    for disk in disks:
        if disk["free_bytes"] < min(_FULL_BYTES, _FULL_SHARE * disk["total_bytes"]):
            yield Problem(
                f"the disk of {disk['path']} has {disk['free_bytes'] / 1e6:.0f} MB left",
                "peregrine release remove an old release, or make room",
            )


def _time(seconds: float | None) -> str:
    """Writes a time, in UTC."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds)) if seconds else ""
