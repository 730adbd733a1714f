"""Makes Triton's model-control calls to the server of one repository; bounds waits itself, without deadlines.

A gRPC deadline that passes is a cancelled call, which crashes Triton below 2.59. So a call that takes too
long is left to itself in a daemon thread, and the caller gets an error.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import Any, TypeVar

import numpy as np

from ensemble.contract import PIPELINE
from ensemble.errors import ServerError
from ensemble.server.calls import drain
from ensemble.server.running import RunningServer

CANARY_USER = "peregrine-canary"  # nobody's id: the answer is a cold list, which no release may leave empty
T = TypeVar("T")


class Control:
    """Loads, unloads and asks the models of a running server."""

    def __init__(self, server: RunningServer, timeout_s: float = 120.0) -> None:
        from tritonclient.grpc import InferenceServerClient

        self._server, self._timeout_s = server, timeout_s
        self._client = InferenceServerClient(server.url)

    def __enter__(self) -> Control:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._client.close()

    def load(self, model: str, config_json: str | None = None) -> None:
        """Loads a model, with an ensemble's members; `config_json` stands in for the configuration on disk.

        Triton says OK although an ensemble may be gone afterwards, so readiness is asked for as well.
        """
        self._call(
            f"load {model}",
            lambda: self._client.load_model(model, headers=self._server.headers, config=config_json),
        )
        if not self.is_ready(model):
            raise ServerError(f"load {model}: {self._server.url} says it is loaded, but it is not ready")

    def unload_release(self, name: str) -> None:
        """Unloads a release's ensemble, then, when the last request in it is answered, its members."""
        drain(self._server.url, self._server.headers, f"{name}_{PIPELINE}", self._timeout_s)
        for model in self.ready_models():
            if model.startswith(f"{name}_"):
                self._call(
                    f"unload {model}", partial(self._client.unload_model, model, headers=self._server.headers)
                )

    def is_ready(self, model: str) -> bool:
        """Tells whether the model can be asked."""
        return bool(self._call(f"ask for {model}", lambda: self._client.is_model_ready(model)))

    def ready_models(self) -> list[str]:
        """Names all models that are loaded."""
        index = self._call(
            "list models", lambda: self._client.get_model_repository_index(headers=self._server.headers)
        )
        return sorted(model.name for model in index.models if model.state == "READY")

    def canary(self, model: str) -> tuple[str, int]:
        """Asks `model` for an unknown user's list; gives the release that answered, and how many items."""
        from tritonclient.grpc import InferInput

        user = InferInput("user_id", [1, 1], "BYTES")
        user.set_data_from_numpy(np.array([[CANARY_USER.encode()]], dtype=object))
        answer = self._call(f"canary request to {model}", lambda: self._client.infer(model, [user]))
        num_items = sum(bool(item) for item in answer.as_numpy("item_ids")[0])
        return answer.as_numpy("release")[0, 0].decode(), num_items

    def _call(self, what: str, call: Callable[[], T]) -> T:
        """Runs a call in a thread and waits for it; ServerError if it fails or takes too long."""
        done: dict[str, Any] = {}

        def run() -> None:
            try:
                done["value"] = call()
            except Exception as error:  # tritonclient's own, or gRPC's: the caller wants one kind
                done["error"] = error

        thread = threading.Thread(target=run, name=what, daemon=True)
        thread.start()
        thread.join(self._timeout_s)
        if "error" in done:
            error = done["error"]
            text = str(getattr(error, "message", lambda: error)())
            raise ServerError(f"{what}: {' '.join(text.split())}") from error  # Triton's text has line ends
        if "value" not in done:
            raise ServerError(
                f"{what}: no answer from {self._server.url} within {self._timeout_s:.0f} s",
                "restart `peregrine serve`",
            )
        return done["value"]
