"""Finds the models whose processes died, are stopped or hang, and a tritonserver that is stopped or hangs.

Triton (2.51) does neither restart a Python process nor call its model unready, and one that was stopped for
1.5 s or more aborts the whole server when it goes on: so it must have been killed by then.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from ensemble.server.model_probes import SERVER, Probes
from ensemble.server.process import Stub
from ensemble.server.watched import Watched
from ensemble.vitals import Vitals, vitals_of

STOPPED_S = 0.8  # a shorter pause is nobody's business
HANGS_S = 1.5  # without an answer, and a process has not run meanwhile
BUSY_S = 20.0  # without an answer, whatever the processes do
SERVER_HANGS_S = 4.0
DEAD_LOOKS = 2  # in a row: processes are being replaced now and then


class Ill(NamedTuple):
    """Names a model that has to be repaired."""

    model: str
    why: str
    stopped: tuple[int, ...] = ()  # processes that must not go on
    is_late: bool = False  # and no more than that


class Stopped:
    """Finds processes that have been stopped for too long."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._since = clock, dict[int, float]()

    def look(self, vitals: Mapping[int, Vitals]) -> set[int]:
        """Gives the processes that have been stopped for STOPPED_S."""
        now = self._clock()
        self._since = {pid: self._since.get(pid, now) for pid, one in vitals.items() if one.is_stopped}
        return {pid for pid, since in self._since.items() if now - since >= STOPPED_S}


class Diagnosis:
    """Looks at one tritonserver and its Python processes again and again."""

    def __init__(self, server: int, probes: Probes, clock: Callable[[], float] = time.monotonic) -> None:
        self._server, self._probes, self._clock = server, probes, clock
        self._stopped = Stopped(clock)
        self._short: dict[str, int] = {}  # looks at which a model had too few processes
        self._ticks: dict[str, dict[int, int]] = {}  # when the call that waits was first seen to wait

    def look(self, stubs: Iterable[Stub], models: Mapping[str, Watched]) -> tuple[str, list[Ill]]:
        """Says why tritonserver has to be started again, if it has, and which models have to be repaired."""
        processes = {name: list[int]() for name in models}
        for stub in stubs:
            if stub.model in processes:
                processes[stub.model].append(stub.pid)
        pids = [self._server, *(pid for some in processes.values() for pid in some)]
        vitals = {pid: one for pid in pids if (one := vitals_of(pid))}
        stopped = self._stopped.look(vitals)
        if problem := self._server_problem(vitals, stopped):
            return problem, []
        found = (self._ill(models[name], some, vitals, stopped) for name, some in processes.items())
        return "", [one for one in found if one]

    def _server_problem(self, vitals: Mapping[int, Vitals], stopped: set[int]) -> str:
        """Says what is wrong with tritonserver itself."""
        if self._server in stopped:
            return "tritonserver is stopped"
        waiting_s = self._probes.waiting_s(SERVER)
        if self._is_idle(SERVER, [self._server], vitals, waiting_s) and waiting_s >= SERVER_HANGS_S:
            return f"tritonserver has not answered for {waiting_s:.0f} s"
        if waiting_s >= BUSY_S:
            return f"tritonserver has not answered for {waiting_s:.0f} s"
        return ""

    def _ill(
        self, model: Watched, pids: list[int], vitals: Mapping[int, Vitals], stopped: set[int]
    ) -> Ill | None:
        """Says what is wrong with a model; None if nothing is."""
        name, waiting_s = model.name, self._probes.waiting_s(model.name)
        frozen = tuple(pid for pid in pids if pid in stopped)
        hangs = self._is_idle(name, pids, vitals, waiting_s)
        alive = sum(pid in vitals for pid in pids)
        self._short[name] = self._short.get(name, 0) + 1 if alive < model.wanted else 0
        if frozen:
            return Ill(name, f"{len(frozen)} of {model.wanted} processes of {name} are stopped", frozen)
        if self._short[name] >= DEAD_LOOKS:
            return Ill(name, f"{model.wanted - alive} of {model.wanted} processes of {name} died")
        if (waiting_s >= HANGS_S and hangs) or waiting_s >= BUSY_S:
            return Ill(name, f"{name} has not answered for {waiting_s:.1f} s", is_late=True)
        return None

    def _is_idle(self, name: str, pids: list[int], vitals: Mapping[int, Vitals], waiting_s: float) -> bool:
        """Says whether one of the processes has not run since a call that waits was first seen to: one that
        is merely busy, or waits for a core, runs now and then."""
        if waiting_s <= 0:
            self._ticks.pop(name, None)
            return False
        now = {pid: vitals[pid].ticks for pid in pids if pid in vitals}
        before = self._ticks.setdefault(name, now)
        return any(before.get(pid) == ticks for pid, ticks in now.items())

    def forget(self, name: str) -> None:
        """Begins anew with a model whose processes have been replaced."""
        self._short.pop(name, None)
        self._ticks.pop(name, None)
