"""Asks every model of a server for nothing once a second, and the server itself whether it lives.

No call has a deadline: old servers crash on cancelled calls. Who is not answered stays asked, and is asked
again only afterwards, so that a server that hangs has one call of each model to bear.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from ensemble.server.watched import Watched

EVERY_S = 1.0
SERVER = ""  # the name under which the server itself is asked


class Probes:
    """Holds the calls to one tritonserver."""

    def __init__(self, url: str, clock: Callable[[], float] = time.monotonic) -> None:
        import grpc
        from tritonclient.grpc import service_pb2, service_pb2_grpc

        self._clock, self._channel = clock, grpc.insecure_channel(url)
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
        self._live_request = service_pb2.ServerLiveRequest()
        self._lock = threading.Lock()
        self._sent: dict[str, float] = {}  # the calls that are not answered
        self._next: dict[str, float] = {}
        self._calls: dict[str, Any] = {}  # held: gRPC cancels a call that is garbage
        self._abandoned: set[Any] = set()
        self.took_ms: dict[str, float] = {}  # the last answer's time
        self.faults: dict[str, str] = {}  # what the last answer was, where it was an error

    def send(self, models: Mapping[str, Watched]) -> None:
        """Asks whoever has answered and was asked a second ago; forgets models that are no longer there."""
        now = self._clock()
        with self._lock:
            for gone in set(self._next) - set(models) - {SERVER}:
                self._drop(gone)
            due = [
                name
                for name in (SERVER, *models)
                if name not in self._sent and now >= self._next.get(name, now)
            ]
            for name in due:
                self._sent[name], self._next[name] = now, now + EVERY_S
        for name in due:
            self._ask(name, models.get(name))

    def _ask(self, name: str, model: Watched | None) -> None:
        """Sends one call."""
        if model is None:
            call = self._stub.ServerLive.future(self._live_request)
        else:
            call = self._stub.ModelInfer.future(model.request)
        with self._lock:
            self._calls[name] = call
        call.add_done_callback(lambda done: self._note(name, model, done))

    def _note(self, name: str, model: Watched | None, call: Any) -> None:
        """Takes note of an answer, in gRPC's thread."""
        status = call.code().name
        fault = "" if status == "OK" else f"{status}: {(call.details() or '')[:200]}"
        if model is not None and model.is_router and status == "INVALID_ARGUMENT":
            fault = ""
        with self._lock:
            if self._calls.get(name) is not call:
                return  # it was forgotten meanwhile
            del self._calls[name]
            sent = self._sent.pop(name)
            self.took_ms[name] = (self._clock() - sent) * 1e3
            self.faults.pop(name, None)
            if fault:
                self.faults[name] = fault

    def waiting_s(self, name: str) -> float:
        """Says for how long the last call to a model, or to the SERVER, has not been answered; else 0."""
        with self._lock:
            sent = self._sent.get(name)
        return 0.0 if sent is None else self._clock() - sent

    def forget(self, name: str) -> None:
        """Waits no longer for what a model was asked: its processes have been replaced."""
        with self._lock:
            self._drop(name)

    def _drop(self, name: str) -> None:
        """Forgets a model; the call that it has not answered is kept until it ends."""
        self._sent.pop(name, None)
        self._next.pop(name, None)
        self.took_ms.pop(name, None)
        self.faults.pop(name, None)
        call = self._calls.pop(name, None)
        if call is not None:
            self._abandoned.add(call)
            call.add_done_callback(self._abandoned.discard)

    def close(self) -> None:
        """Ends the channel, with the server gone or about to go."""
        self._channel.close()
