"""Asks a server for a list, as a caller would: what is called ready or alive here has answered.

Nothing else tells: Triton's own readiness says yes while every Python process of a model is dead.
"""

from __future__ import annotations

import struct
import threading
import time
from dataclasses import dataclass
from typing import Any

from ensemble import contract

BUDGET_S = 1.0  # within which a ready server answers
_KEEP_S = 0.25  # an answer is as good as a new one for so long: many probes are one request


@dataclass(frozen=True)
class Answer:
    """Says what one request for a list came to."""

    problem: str = ""  # empty: a list came within the budget
    seconds: float = 0.0
    release: str = ""
    sequence: int = 0  # the last change to items that the answer knows


class Probe:
    """Asks for one item of the list of a user without an id, one request at a time.

    A request is never given a deadline and never cancelled, which ends old servers; one that is still on its
    way when the next is due says that the server is late.
    """

    def __init__(self, url: str, budget_s: float = BUDGET_S) -> None:
        self._url, self.budget_s = url, budget_s
        self._lock = threading.Lock()
        self._channel: Any = None
        self._pending: Any = None
        self._sent_s = self._asked_s = 0.0
        self._answer = Answer("nothing was asked yet")
        self.last_good_s = time.monotonic()  # when a list came within the budget
        self.failures = 0

    def ask(self) -> Answer:
        """Gives an answer that is at most a quarter of a second old."""
        with self._lock:
            if self._asked_s and time.monotonic() - self._asked_s < _KEEP_S:
                return self._answer
            self._answer = self._ask()
            self._asked_s = time.monotonic()
            if self._answer.problem:
                self.failures += 1
            else:
                self.last_good_s = self._asked_s
            return self._answer

    def _ask(self) -> Answer:
        """Sends a request unless one is on its way, and waits for it as long as the budget lasts."""
        import grpc

        if self._pending is None:
            self._pending, self._sent_s = self._sent(grpc), time.monotonic()
        try:
            response = self._pending.result(timeout=self.budget_s)
        except grpc.FutureTimeoutError:
            waited_s = time.monotonic() - self._sent_s
            return Answer(f"no list within {waited_s * 1e3:.0f} ms", waited_s)
        except grpc.RpcError as error:
            self._pending = None
            return Answer(f"no list: {_words(error)}", time.monotonic() - self._sent_s)
        self._pending = None
        seconds = time.monotonic() - self._sent_s
        problem = f"a list came after {seconds * 1e3:.0f} ms only" if seconds > self.budget_s else ""
        return _read(response, seconds, problem)

    def _sent(self, grpc: Any) -> Any:
        """Sends the request; gives its future."""
        from tritonclient.grpc import service_pb2, service_pb2_grpc

        if self._channel is None:
            # A server that is started again is met at once, not after a minute of backing off
            options = [("grpc.max_reconnect_backoff_ms", 500), ("grpc.initial_reconnect_backoff_ms", 100)]
            self._channel = grpc.insecure_channel(self._url, options)
        request = service_pb2.ModelInferRequest(model_name=contract.PIPELINE)
        request.inputs.add(name="user_id", datatype="BYTES", shape=[1, 1])
        request.raw_input_contents.append(struct.pack("<I", 0))
        request.parameters["top_k"].int64_param = 1
        return service_pb2_grpc.GRPCInferenceServiceStub(self._channel).ModelInfer.future(request)

    def close(self) -> None:
        """Closes the channel. Call it when the server has ended."""
        if self._channel is not None:
            self._channel.close()


def _words(error: Any) -> str:
    """Gives a status and its text in one line."""
    return " ".join(f"{error.code().name}: {error.details()}".split())[:200]


def _read(response: Any, seconds: float, problem: str) -> Answer:
    """Reads release, sequence and the first item; a list without an item is no list."""
    raw = dict(zip((one.name for one in response.outputs), response.raw_output_contents, strict=True))
    item, release = _text(raw.get("item_ids", b"")), _text(raw.get("release", b""))
    sequence = raw.get("sequence", b"")[:8]
    if not item:
        problem = problem or "the list is empty"
    return Answer(problem, seconds, release, struct.unpack("<q", sequence)[0] if len(sequence) == 8 else 0)


def _text(raw: bytes) -> str:
    """Reads the first element of a BYTES tensor."""
    if len(raw) < 4:
        return ""
    return raw[4 : 4 + struct.unpack_from("<I", raw)[0]].decode(errors="replace")
