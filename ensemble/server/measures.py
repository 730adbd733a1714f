"""Measures a server from outside its steps: readiness, processes, route, changes to items, the store.

What steps count of themselves (tiers, the route by release) Triton publishes: ensemble/telemetry.py.
"""

from __future__ import annotations

import datetime
import time
from typing import Any, Protocol

from ensemble.engines.flavors import FLAVORS
from ensemble.errors import PeregrineError
from ensemble.live.catalogue import last_sequence
from ensemble.release.manifest import MANIFEST, read_manifest
from ensemble.release.route import Route, read_route
from ensemble.server.list_probe import Probe
from ensemble.server.process import Launch
from ensemble.server.runtime import has_gpu


class Reported(Protocol):
    """Is what is measured of a server (supervisor.Server)."""

    launch: Launch
    starts: int

    def state(self) -> str:
        """Says what it is doing instead of answering; empty while it answers."""
        ...

    def stubs(self) -> dict[str, list[int]]:
        """Gives the process ids of the Python stubs by model."""
        ...

    def missing(self) -> dict[str, int]:
        """Counts the Python processes that each served model lacks."""
        ...

    def num_repairs(self) -> int:
        """Counts the times that a model's processes were replaced."""
        ...

    def route(self) -> Route:
        """Gives what is served."""
        ...


class Measures:
    """Collects a server's own numbers whenever they are asked for."""

    def __init__(self, server: Reported, probe: Probe) -> None:
        from prometheus_client import CollectorRegistry

        self._server, self._probe = server, probe
        self._triton_answers, self._has_gpu = False, has_gpu()
        self._manifests: dict[str, dict[str, Any]] = {}
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)

    def text(self, *, triton_answers: bool) -> bytes:
        """Gives the numbers in Prometheus' text format."""
        from prometheus_client import generate_latest

        self._triton_answers = triton_answers
        return generate_latest(self._registry)

    def describe(self) -> list[Any]:
        """Names nothing beforehand, so that registering asks for nothing."""
        return []

    def collect(self) -> Any:
        """Gives the families, as prometheus_client's collectors do."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily

        server, answer, state = self._server, self._probe.ask, self._server.state()
        last = answer() if not state else None

        def gauge(name: str, text: str, value: float) -> Any:
            """Makes a family of one gauge."""
            return GaugeMetricFamily(f"peregrine_{name}", text, value=value)

        is_ready = last is not None and not last.problem
        yield gauge("ready", "1 if a list came within the budget of the probe", float(is_ready))
        yield gauge("triton_metrics", "1 if Triton's own metrics could be read", float(self._triton_answers))
        yield gauge("probe_seconds", "what the last probe took", last.seconds if last else 0.0)
        yield CounterMetricFamily(
            "peregrine_probe_failures", "probes without a list in time", value=self._probe.failures
        )
        yield CounterMetricFamily(
            "peregrine_restarts", "times that tritonserver was started again", value=max(0, server.starts - 1)
        )
        yield CounterMetricFamily(
            "peregrine_repairs", "times that a model's processes were replaced", value=server.num_repairs()
        )
        runtime = server.launch.runtime
        has_plans = bool(runtime.plans) or runtime.engine in FLAVORS
        yield InfoMetricFamily("peregrine_runtime", "what engines run on", value={"engine": runtime.engine})
        fallback = float(self._has_gpu and not has_plans)
        yield gauge("plan_fallback", "1 if there is a GPU, and no plan runs", fallback)
        yield from self._processes(GaugeMetricFamily)
        yield from self._releases(GaugeMetricFamily)
        newest = last_sequence(server.launch.home)
        yield gauge("catalogue_sequence", "the number of the last change to items", newest)
        if is_ready and last is not None:
            yield gauge("served_sequence", "the last change that answers know", last.sequence)
        yield from self._store(GaugeMetricFamily)

    def _processes(self, family: Any) -> Any:
        """Counts each model's Python processes, and how many it lacks until they are replaced."""
        alive = family("peregrine_stubs", "Python processes of a model", labels=["model"])
        dead = family("peregrine_stubs_dead", "processes of a model that died", labels=["model"])
        for model, pids in self._server.stubs().items():
            alive.add_metric([model], len(pids))
        for model, count in self._server.missing().items():
            dead.add_metric([model], count)
        return alive, dead

    def _releases(self, family: Any) -> Any:
        """Tells each served release's share, its age, and how much older it is than what the route asks."""
        share = family("peregrine_route_share", "share of users that a release answers", labels=["release"])
        age = family("peregrine_release_age_seconds", "time since it was built", labels=["release", "id"])
        figures = family("peregrine_release_figure", "held-out figures of it", labels=["release", "figure"])
        try:
            route = self._server.route()
            asked = read_route(self._server.launch.home)
        except (PeregrineError, OSError):
            return ()
        for one in route.shares:
            share.add_metric([one.release], one.share)
            manifest = self._manifest(one.release)
            if (seconds := _age_s(manifest)) is not None:
                age.add_metric([one.release, str(manifest.get("id", ""))], seconds)
            for name, value in _figures(manifest).items():
                figures.add_metric([one.release, name], value)
        behind = family("peregrine_route_behind", "1 if the home's route is another than what is served")
        behind.add_metric([], float(asked is not None and asked.shares != route.shares))
        return share, age, figures, behind

    def _manifest(self, name: str) -> dict[str, Any]:
        """Reads a release's manifest, once; releases never change."""
        if name not in self._manifests:
            try:
                self._manifests[name] = read_manifest(self._server.launch.repository / name / MANIFEST)
            except (PeregrineError, OSError):
                return {}
        return self._manifests[name]

    def _store(self, family: Any) -> Any:
        """Tells what `peregrine pull --follow` has written of the store; nothing where none runs."""
        from ensemble.release.store_state import read_store_state

        state = read_store_state(self._server.launch.home)
        if state is None:
            return ()
        reached = family("peregrine_store_reached", "1 if the store could be read the last time")
        reached.add_metric([], float(not state.problem))
        since = family("peregrine_store_age_seconds", "time since the store was last read")
        since.add_metric([], max(0.0, time.time() - state.reached))
        return reached, since


def _age_s(manifest: dict[str, Any]) -> float | None:
    """Gives the seconds since a release was built; None where its manifest does not say."""
    try:
        built = datetime.datetime.fromisoformat(str(manifest.get("created", "")))
    except ValueError:
        return None
    return max(0.0, (datetime.datetime.now(datetime.UTC) - built).total_seconds())


def _figures(manifest: dict[str, Any]) -> dict[str, float]:
    """Picks what a release's chain did on held-out users, recall of its candidates among it."""
    chain = (manifest.get("report") or {}).get("ranking", {}).get("ways", {}).get("chain", {})
    return {name: float(value) for name, value in chain.items() if isinstance(value, int | float)}
