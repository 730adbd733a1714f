"""Makes Triton's model-control calls to the server of one repository; bounds waits itself, without deadlines.

A gRPC deadline that passes is a cancelled call, which crashes Triton below 2.59. So a call that takes too
long is left to itself in a daemon thread, and the caller gets an error.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Any, TypeVar

import numpy as np

from ensemble import contract
from ensemble.arrays import Array
from ensemble.errors import ServerError
from ensemble.server.calls import drain
from ensemble.server.process import kill_stubs
from ensemble.server.running import RunningServer

# A release that hangs is ended after this; what is served answers within milliseconds
ASK_S, UNLOAD_S = 8.0, 20.0
# Each of a release's instances reads its files while others do, on a machine that serves
_LOAD_S, _LOAD_BYTES_A_S = 120.0, 5e6
_KILLED_DRAIN_S = 2.0
READY, _LOADING = "READY", "LOADING"
T = TypeVar("T")


class NoAnswerError(ServerError):
    """Says that a call took too long or failed inside a model: its processes may hang, or be dead."""


class Control:
    """Loads, unloads and asks the models of a running server."""

    def __init__(self, server: RunningServer) -> None:
        from tritonclient.grpc import InferenceServerClient

        self.server = server
        self._client = InferenceServerClient(server.url)

    def __enter__(self) -> Control:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._client.close()

    def load(
        self,
        model: str,
        config_json: str | None = None,
        size_bytes: int = 0,
        limit_s: float = _LOAD_S,
    ) -> None:
        """Loads a model of so many bytes, with an ensemble's members; `config_json` stands in for the
        configuration on disk. NoAnswerError where it takes longer than `limit_s` and its bytes allow.

        Triton says OK although an ensemble may be gone afterwards, so readiness is asked for as well.
        """
        self._call(
            f"load {model}",
            lambda: self._client.load_model(model, headers=self.server.headers, config=config_json),
            limit_s + size_bytes / _LOAD_BYTES_A_S,
        )
        if not self.is_ready(model):
            raise ServerError(f"load {model}: {self.server.url} says it is loaded, but it is not ready")

    def unload_release(self, name: str, drain_s: float = UNLOAD_S) -> None:
        """Unloads a release's ensemble, then, when the last request in it is answered, its members, those too
        that are still loading; NoAnswerError if they do not go.

        Served fused it has no members to wait for: Triton answers what is in flight, and ends its processes
        in seconds that nobody has to wait for.
        """
        ensembles = [f"{name}_{pipeline}" for pipeline in contract.PIPELINES]
        there = [model for model in self.models() if model.startswith(f"{name}_")]
        if set(there) - set(ensembles):
            for ensemble in (one for one in ensembles if one in there):
                drain(self.server.url, self.server.headers, ensemble, drain_s)
        deadline = time.monotonic() + UNLOAD_S
        while mine := {m: state for m, state in self.models().items() if m.startswith(f"{name}_")}:
            for model in [model for model, state in mine.items() if state == READY]:
                unload = partial(self._client.unload_model, model, headers=self.server.headers)
                self._call(f"unload {model}", unload)
            if time.monotonic() > deadline:
                raise NoAnswerError(f"unload {name}: {', '.join(mine)} still there after {UNLOAD_S:.0f} s")
            time.sleep(0.02)

    def unload_model(self, model: str, limit_s: float = UNLOAD_S) -> None:
        """Unloads one model, and returns when its last request is answered; NoAnswerError if it does not
        go."""
        deadline = time.monotonic() + limit_s
        unload = partial(self._client.unload_model, model, headers=self.server.headers)
        self._call(f"unload {model}", unload)
        while self._state(model) not in ("", "UNAVAILABLE"):
            if time.monotonic() > deadline:
                raise NoAnswerError(f"unload {model}: still there after {limit_s:.0f} s")
            time.sleep(0.02)

    def _state(self, model: str) -> str:
        """Gives a model's state as Triton's index has it; empty if it is not there."""
        return self._index().get(model, "")

    def kill_release(self, name: str) -> None:
        """Kills the stubs of a release that nobody else asks, then unloads it.

        Unloading would wait for a request that hangs. Triton (2.51) never lets go of a model whose stub died
        at work: no process of it is left, and that is all there is to wait for.
        """
        kill_stubs(self.server.pid, name)
        self.unload_release(name, drain_s=_KILLED_DRAIN_S)

    def is_ready(self, model: str) -> bool:
        """Tells whether the model can be asked."""
        return bool(self._call(f"ask for {model}", lambda: self._client.is_model_ready(model)))

    def models(self) -> dict[str, str]:
        """Gives {model: READY or LOADING} of all that are loaded, or will be."""
        return {model: state for model, state in self._index().items() if state in (READY, _LOADING)}

    def _index(self) -> dict[str, str]:
        """Gives the state of every model that Triton knows."""
        index = self._call(
            "list models", lambda: self._client.get_model_repository_index(headers=self.server.headers)
        )
        return {model.name: model.state for model in index.models}

    def step_of(self, ensemble: str) -> str:
        """Names the first step of an ensemble that is loaded."""
        config = self._call(
            f"ask for the configuration of {ensemble}",
            lambda: self._client.get_model_config(ensemble, headers=self.server.headers),
        ).config
        return str(config.ensemble_scheduling.step[0].model_name)

    def ask(
        self, model: str, user_ids: Sequence[str], options: Mapping[str, Any], text: str | None = None
    ) -> dict[str, Array]:
        """Asks `model` for the lists of B users under a request's options, a search for what fits `text`;
        gives the tensors of its answer by name, ids as S."""
        from tritonclient.grpc import InferInput

        columns = {"user_id": [user.encode() for user in user_ids]}
        if text is not None:
            columns |= dict(
                zip(contract.CONTENTS, ([text.encode()] * len(user_ids), [b""] * len(user_ids)), strict=True)
            )
        inputs = []
        for name, values in columns.items():
            inputs.append(InferInput(name, [len(values), 1], "BYTES"))
            inputs[-1].set_data_from_numpy(np.array([[value] for value in values], dtype=object))
        what = f"ask {model} for {len(user_ids)} users' lists"
        try:
            answer = self._call(what, lambda: self._client.infer(model, inputs, parameters=options), ASK_S)
        except ServerError as error:
            raise NoAnswerError(str(error)) from error
        try:
            found = {name: answer.as_numpy(name) for name in contract.ANSWER}
            known = {name: array for name, array in found.items() if array is not None}
            return {n: array.astype("S") if array.dtype == object else array for n, array in known.items()}
        except Exception as error:  # of whatever kind: bytes that do not fit the shape
            raise ServerError(f"{what}: the answer cannot be read ({error})") from error

    def _call(self, what: str, call: Callable[[], T], limit_s: float = UNLOAD_S) -> T:
        """Runs a call in a thread and waits for it; ServerError if it fails, NoAnswerError if it takes too
        long."""
        done: dict[str, Any] = {}

        def run() -> None:
            try:
                done["value"] = call()
            except Exception as error:  # tritonclient's own, or gRPC's: the caller wants one kind
                done["error"] = error

        thread = threading.Thread(target=run, name=what, daemon=True)
        thread.start()
        thread.join(limit_s)
        if "error" in done:
            error = done["error"]
            text = str(getattr(error, "message", lambda: error)())
            raise ServerError(f"{what}: {' '.join(text.split())}") from error  # Triton's text has line ends
        if "value" not in done:
            raise NoAnswerError(f"{what}: no answer from {self.server.url} within {limit_s:.0f} s")
        return done["value"]
