"""Repairs the models of one tritonserver while it serves: what is dead, stopped or hangs is loaded again.

A model is loaded again when a file of it in the server's own mount has changed; its new processes answer
before the old ones are given up, as in a swap of releases.
"""

from __future__ import annotations

import collections
import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from ensemble.errors import PeregrineError, ReleaseError
from ensemble.server.control import Control
from ensemble.server.illness import Diagnosis, Ill
from ensemble.server.leftovers import LEFT_S, Leftovers
from ensemble.server.model_probes import Probes
from ensemble.server.mount import Busy, Mount
from ensemble.server.process import Stub, TritonProcess
from ensemble.server.running import RunningServer
from ensemble.server.watched import Watched, watched_models

LOOK_EVERY_S = 0.25
SETTLE_S = 2.0  # for requests in processes that have been replaced; then they are killed
MOST, WINDOW_S = 4, 60.0  # more repairs of a model in this time do not help: start tritonserver again
_LOAD_S, _LOCK_S = 20.0, 1.0


class Repairs:
    """Watches and repairs the models of one run of tritonserver."""

    def __init__(
        self,
        process: TritonProcess,
        server: RunningServer,
        mount: Mount,
        configuration: str | None,
        log: Callable[[str], None],
    ) -> None:
        self._process, self._server, self._mount, self._log = process, server, mount, log
        self._configuration = configuration
        self.probes = Probes(server.url)
        self._diagnosis = Diagnosis(process.pid, self.probes)
        self._route_text, self.models = "", dict[str, Watched]()
        self._leftovers = Leftovers()
        self._replaced: dict[int, float] = {}  # processes that have been, and until when they may work
        self._done: dict[str, collections.deque[float]] = {}
        self.alive = dict(collections.Counter(stub.model for stub in process.stubs()))
        self.count = 0  # of repairs that were made
        self._learn()

    def look(self, is_tried: Callable[[str], bool], give_up: Callable[[str], None]) -> str:
        """Looks once and repairs what is ill; returns why tritonserver has to be started again, if it has.

        Of a model that `is_tried` as a canary nothing is repaired: `give_up` hears what became of it.
        """
        self._learn()
        self._end_replaced()
        stubs = [stub for stub in self._process.stubs() if stub.pid not in self._replaced]
        self._end_leftovers(stubs)
        self.alive = dict(collections.Counter(stub.model for stub in stubs))
        problem, ill = self._diagnosis.look(stubs, self.models)
        if problem or self._process.exit_code is not None:
            return problem
        self.probes.send(self.models)
        for one in ill:
            _kill(one.stopped)
            if is_tried(one.model):
                if not one.is_late:  # else the guard judges it by what callers see
                    give_up(one.why)
            elif problem := self._repair(one):
                return problem
        return ""

    def _learn(self) -> None:
        """Reads which models are served, where that has changed."""
        try:
            route = self._mount.route()
            if route.to_json() != self._route_text:
                self.models = watched_models(self._mount.folder, route, self._configuration)
                self._route_text = route.to_json()
        except (OSError, ReleaseError):
            return  # it is being changed: the next look sees it

    def _repair(self, ill: Ill) -> str:
        """Loads a model again; returns why that did not help."""
        now = time.monotonic()
        done = self._done.setdefault(ill.model, collections.deque(maxlen=MOST))
        if len(done) == MOST and now - done[0] < WINDOW_S:
            return f"{ill.why}, and {MOST} repairs within {WINDOW_S:.0f} s did not help"
        done.append(now)
        self._log(f"WARNING: {ill.why}; they are started again")
        old = [stub.pid for stub in self._process.stubs() if stub.model == ill.model]
        try:
            with self._locked(), Control(self._server) as control:
                (self._mount.folder / ill.model / "1" / "model.py").touch()
                control.load(ill.model, limit_s=_LOAD_S)
        except (PeregrineError, OSError) as error:
            return f"{ill.why}, and they do not start again: {error}"
        # Whatever of the old ones still answers something may end that
        self._replaced |= dict.fromkeys(old, time.monotonic() + SETTLE_S)
        self.probes.forget(ill.model)
        self._diagnosis.forget(ill.model)
        self._log(f"{ill.model} is whole again after {time.monotonic() - now:.1f} s")
        self.count += 1
        return ""

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Keeps commands from turning the server meanwhile; one that is at it for long is not waited for."""
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(Busy):
                stack.enter_context(self._mount.turning(_LOCK_S))
            yield

    def _end_replaced(self) -> None:
        """Kills the processes that have been replaced and had their time: Triton (2.51) never lets go of a
        model of which one died at work."""
        now = time.monotonic()
        late = [pid for pid, until in self._replaced.items() if now >= until]
        _kill(late)
        for pid in late:
            del self._replaced[pid]

    def _end_leftovers(self, stubs: list[Stub]) -> None:
        """Kills processes of models that went long ago, unless Triton still holds the model: then a change
        was cut off before it could unload it, and the next one does."""
        late = self._leftovers.look(stubs, self.models)
        if not late:
            return
        self._leftovers.wait_again(late)
        try:
            with Control(self._server) as control:
                held = control.models()
        except PeregrineError:
            return
        gone = [stub for stub in late if stub.model not in held]
        _kill(stub.pid for stub in gone)
        for model, count in collections.Counter(stub.model for stub in gone).items():
            self._log(
                f"WARNING: {count} processes of {model} had not ended {LEFT_S:.0f} s after it went; killed"
            )

    def report(self) -> Mapping[str, Any]:
        """Says of each model how many processes it has of how many, and when it last answered."""
        return {
            name: {
                "wanted": model.wanted,
                "alive": self.alive.get(name, 0) if model.wanted else None,
                "canary_ms": self.probes.took_ms.get(name),
                "waiting_s": round(self.probes.waiting_s(name), 3),
                "runs_on": model.runs_on,
                "fault": self.probes.faults.get(name, ""),
            }
            for name, model in self.models.items()
        }

    def missing(self) -> dict[str, int]:
        """Counts the Python processes that each model lacks, of those that it is configured to have."""
        return {
            name: max(0, model.wanted - self.alive.get(name, 0))
            for name, model in self.models.items()
            if model.wanted
        }

    def close(self) -> None:
        """Ends the calls, after tritonserver has ended."""
        self.probes.close()


def _kill(pids: Iterable[int]) -> None:
    """Ends processes at once."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
