"""Brings a Call to a server and its answer back: over gRPC, or, in an application's tests, not at all.

A transport's `start(call)` gives a Future and never blocks. Both clients use the same one: the asyncio client
waits for the same futures, so a cancelled task or a closed loop cannot reach the call.

Below Triton 2.59 a gRPC deadline or cancel can kill the server. So no deadline is ever set, and a call that
nobody waits for any more is cancelled only where the server is known to be newer; elsewhere it runs to its
end, and the number of such calls is bounded.
"""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from clients.errors import InvalidArgument, Overloaded, Unavailable, error_from_status
from clients.tls import Tls, open_channel
from clients.wire import Answer, Call, decode_bytes, encode_bytes
from ensemble.budget import BUDGET, SENT
from ensemble.contract import MAX_PICTURES_BYTES, PIPELINE, SEARCH
from ensemble.errors import PeregrineError

CANCEL_IS_SAFE_FROM = (2, 59)
MAX_ABANDONED = 64
# 2.51 has no limit of its own, and keeps what it has taken for a large request. A search brings pictures
MAX_REQUEST_BYTES = {PIPELINE: 1 << 20, SEARCH: MAX_PICTURES_BYTES}
# Pings closer than this are answered with GOAWAY by the server's defaults.
_CHANNEL_OPTIONS = (
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.enable_retries", 0),
    # A server that was started again is there within seconds; gRPC's own pauses grow to two minutes
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
)
# Said to a gateway, which lets in more of a search and cannot read the message; how it says when to ask again
_CALL_HEADER, _RETRY_HEADER = "peregrine-call", "retry-after-ms"
_LOCAL = ("127.0.0.1", "localhost", "[::1]")
_CLOSE_TIMEOUT_S = 10.0
_CLOSED = "this client is closed; make another one"
_DTYPES: dict[str, type] = {"FP32": np.float32, "INT64": np.int64, "INT32": np.int32, "BOOL": np.bool_}
_FIELDS: dict[type, str] = {
    bool: "bool_param",
    int: "int64_param",
    float: "double_param",
    str: "string_param",
}


@dataclass
class _Running:
    """Holds a call that the server has not answered yet."""

    rpc: Any  # held here, because gRPC cancels a call that is garbage
    may_be_given_up: bool  # it has a budget
    given_up: bool = False


class Transport(Protocol):
    """Says what a client needs of the way to its server."""

    def start(self, call: Call) -> Future[Answer]:
        """Sends the call and returns at once; the future fails with a PeregrineError."""

    def connect(self, timeout_s: float) -> bool:
        """Tells whether a server answers within about `timeout_s`."""

    def send(self, call: Call) -> Answer:
        """Sends a call without a budget and waits for its answer, without a detour by another thread."""

    def give_up(self, future: Future[Answer]) -> None:
        """Takes note that nobody waits for this future any more."""

    def close(self) -> None:
        """Ends the connection, once the calls that were given up have ended."""


class GrpcTransport:
    """Talks to Triton's gRPC endpoint, with nothing of tritonclient but its protocol."""

    def __init__(
        self,
        url: str,
        model: str = PIPELINE,
        headers: Mapping[str, str] | None = None,
        max_abandoned: int = MAX_ABANDONED,
        tls: Tls | None = None,
    ) -> None:
        import grpc
        from tritonclient.grpc import service_pb2, service_pb2_grpc

        self.url, self._model, self._max_abandoned = url, model, max_abandoned
        self._is_local = url.rpartition(":")[0] in _LOCAL
        self._pb, self._metadata = service_pb2, tuple((headers or {}).items())
        self._rpc_error: Any = grpc.RpcError
        self._channel = open_channel(url, tls, _CHANNEL_OPTIONS)
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
        self._lock = threading.Lock()
        self._running: dict[Future[Answer], _Running] = {}
        self._cancel_is_safe: bool | None = None  # None: not known yet
        self._version_call: Any = None
        self._is_closed = False

    def start(self, call: Call) -> Future[Answer]:
        future: Future[Answer] = Future()
        future.set_running_or_notify_cancel()  # so that an asyncio task that ends cannot cancel it
        request = proto_from_call(call, self._model, is_local=self._is_local)
        with self._lock:
            self._refuse_beyond_limit(call)
            self._check_open()
            rpc = self._stub.ModelInfer.future(request, metadata=self._metadata_of(call))
            self._running[future] = _Running(rpc, call.budget_ms is not None)
        rpc.add_done_callback(lambda done: self._finish(future, done))
        if self._version_call is None:
            self._ask_version()
        return future

    def connect(self, timeout_s: float) -> bool:
        import grpc

        try:
            grpc.channel_ready_future(self._channel).result(timeout_s)
            self._ask_version().result(timeout_s)
        except (grpc.FutureTimeoutError, grpc.RpcError):
            return False
        return True

    def send(self, call: Call) -> Answer:
        self._check_open()
        try:
            response = self._stub.ModelInfer(
                proto_from_call(call, self._model, is_local=self._is_local), metadata=self._metadata_of(call)
            )
        except self._rpc_error as error:
            raise self._error_of(error) from None
        try:
            return answer_from_proto(response)
        except Exception as error:  # whatever is wrong with it, the caller knows one kind of error
            raise self._unreadable(error) from error

    def give_up(self, future: Future[Answer]) -> None:
        with self._lock:
            running = self._running.get(future)
            if running is not None:
                running.given_up = True
        if running is not None and self._cancel_is_safe:
            running.rpc.cancel()

    def close(self) -> None:
        until = time.monotonic() + _CLOSE_TIMEOUT_S
        while self._running and not self._cancel_is_safe and time.monotonic() < until:
            time.sleep(0.01)
        self._is_closed = True
        self._channel.close()

    @property
    def num_abandoned(self) -> int:
        """Counts the calls that run on although nobody waits for them."""
        with self._lock:
            return sum(running.given_up for running in self._running.values())

    def _metadata_of(self, call: Call) -> tuple[tuple[str, str], ...]:
        """Gives the headers of a call; to a gateway, a search is a larger message than others."""
        metadata = self._metadata
        if (call.model or self._model) == SEARCH:
            metadata = (*metadata, (_CALL_HEADER, SEARCH))
        return (*metadata, ("traceparent", call.traceparent)) if call.traceparent else metadata

    def _error_of(self, rpc: Any) -> PeregrineError:
        """Makes the error of a call that has failed."""
        waits = [value for key, value in rpc.trailing_metadata() or () if key == _RETRY_HEADER]
        retry_after_s = int(waits[0]) / 1e3 if waits and str(waits[0]).isdecimal() else 0.0
        return error_from_status(rpc.code().name, rpc.details() or "", self.url, retry_after_s)

    def _check_open(self) -> None:
        if self._is_closed:
            raise Unavailable(_CLOSED)

    def _refuse_beyond_limit(self, call: Call) -> None:
        """Refuses a call with Overloaded where too many run on that cannot be cancelled.

        There, one with a budget may have to be given up and then runs on; so no more of them are started than
        may be abandoned.
        """
        if self._cancel_is_safe or len(self._running) < self._max_abandoned:
            return
        given_up = sum(running.given_up for running in self._running.values())
        at_risk = sum(running.given_up or running.may_be_given_up for running in self._running.values())
        if (given_up if call.budget_ms is None else at_risk) >= self._max_abandoned:
            raise Overloaded(
                f"{self._max_abandoned} calls to {self.url} are still running, and it cannot be told to "
                "stop; ask again later"
            )

    def _finish(self, future: Future[Answer], rpc: Any) -> None:
        """Hands the answer or the error to the future; runs in gRPC's thread when the call has ended."""
        with self._lock:
            self._running.pop(future, None)
        status = rpc.code().name
        if status != "OK":
            future.set_exception(self._error_of(rpc))
            return
        try:
            future.set_result(answer_from_proto(rpc.result()))
        except Exception as error:  # an answer that cannot be read must not leave its caller waiting
            future.set_exception(self._unreadable(error))

    def _unreadable(self, error: Exception) -> PeregrineError:
        """Makes the ServerFault for an answer whose tensors cannot be read."""
        return error_from_status("INTERNAL", f"its answer cannot be read: {error!r}", self.url)

    def _ask_version(self) -> Any:
        """Asks for the server's version without waiting; until it is known, the server is taken for an old
        one."""
        self._version_call = call = self._stub.ServerMetadata.future(
            self._pb.ServerMetadataRequest(), metadata=self._metadata
        )
        call.add_done_callback(self._note_version)
        return call

    def _note_version(self, rpc: Any) -> None:
        if rpc.code().name != "OK":
            self._version_call = None  # ask again with the next call
            return
        numbers = tuple(int(part) for part in rpc.result().version.split(".")[:2] if part.isdigit())
        self._cancel_is_safe = numbers >= CANCEL_IS_SAFE_FROM


def proto_from_call(call: Call, model: str, *, is_local: bool = False) -> Any:
    """Writes a Call as a ModelInferRequest; to a server on this machine, whose clock is ours, also when it
    was sent. InvalidArgument where it is too large."""
    from tritonclient.grpc import service_pb2

    called = call.model or model
    request = service_pb2.ModelInferRequest(model_name=called, id=call.request_id)
    request.inputs.add(name="user_id", datatype="BYTES", shape=(len(call.user_ids), 1))
    request.raw_input_contents.append(encode_bytes(call.user_ids))
    for name, content in call.contents:
        request.inputs.add(name=name, datatype="BYTES", shape=(len(call.user_ids), 1))
        request.raw_input_contents.append(encode_bytes([content] * len(call.user_ids)))
    for name, value in call.parameters.items():
        setattr(request.parameters[name], _FIELDS[type(value)], value)
    if call.budget_ms is not None:
        request.parameters["timeout"].int64_param = max(1, int(call.budget_ms * 1000))
        request.parameters[BUDGET].int64_param = max(1, int(call.budget_ms * 1000))
        if is_local:
            request.parameters[SENT].int64_param = time.time_ns() // 1000
    most = MAX_REQUEST_BYTES.get(called)
    if most is not None and (size := request.ByteSize()) > most:
        raise InvalidArgument(f"request: {size:,} bytes, at most {most:,}; send fewer users or items")
    return request


def answer_from_proto(response: Any) -> Answer:
    """Reads the tensors of a ModelInferResponse, by name."""
    answer: dict[str, Any] = {}
    for tensor, raw in zip(response.outputs, response.raw_output_contents, strict=True):
        if tensor.datatype == "BYTES":
            answer[tensor.name] = decode_bytes(raw, math.prod(tensor.shape))
        else:
            answer[tensor.name] = np.frombuffer(raw, _DTYPES[tensor.datatype])
    return answer


class FakeTransport:
    """Answers from a table, without server or network: for an application's tests.

    lists     user id -> [(item id, score, {task: probability}), …] or just [item id, …]
    default   the list of users who are not in `lists`
    failures  exceptions raised by the next calls, one each, before any list is given
    delay_s   time until an answer arrives
    calls     keeps every Call that was made
    """

    def __init__(
        self,
        lists: Mapping[str, Sequence[Any]] | None = None,
        default: Sequence[Any] = (),
        failures: Sequence[Exception] = (),
        delay_s: float = 0.0,
        release: str = "fake",
        degraded: Callable[[str], int] = lambda user: 0,
    ) -> None:
        for entries in (default, *(lists or {}).values()):
            if isinstance(entries, str):
                raise InvalidArgument(f"lists: a user's list must be a list of items, got {entries!r}")
        self._lists, self._default = dict(lists or {}), list(default)
        self._release, self._degraded = release, degraded
        self._failures, self._delay_s = list(failures), delay_s
        self.calls: list[Call] = []
        self.closed = False

    def start(self, call: Call) -> Future[Answer]:
        if self.closed:
            raise Unavailable(_CLOSED)
        self.calls.append(call)
        future: Future[Answer] = Future()
        future.set_running_or_notify_cancel()
        failure = self._failures.pop(0) if self._failures else None

        def finish() -> None:
            if failure:
                future.set_exception(failure)
            else:
                future.set_result(self._answer(call))

        if self._delay_s:
            threading.Timer(self._delay_s, finish).start()
        else:
            finish()
        return future

    def connect(self, timeout_s: float) -> bool:
        return not self.closed

    def send(self, call: Call) -> Answer:
        return self.start(call).result()

    def give_up(self, future: Future[Answer]) -> None:
        pass

    def close(self) -> None:
        self.closed = True

    def _answer(self, call: Call) -> Answer:
        """Gives each user the first top_k entries of the list, padded as a server pads."""
        users = [user.decode() for user in call.user_ids]
        lists = [
            self._lists.get(user, self._default)[:top_k]
            for user, top_k in zip(users, _top_ks(call), strict=True)
        ]
        rows = [[_row(entry, place) for place, entry in enumerate(entries)] for entries in lists]
        depth = max((len(r) for r in rows), default=0)
        names = next((list(row[2]) for r in rows for row in r), ["task"])
        padding = ("", 0.0, dict.fromkeys(names, 0.0))
        padded = [row for r in rows for row in r + [padding] * (depth - len(r))]
        return {
            "item_ids": [row[0].encode() for row in padded],
            "scores": np.array([row[1] for row in padded], np.float32),
            "probabilities": np.array([list(row[2].values()) for row in padded], np.float32).reshape(
                len(users), depth, len(names)
            ),
            "tasks": [json.dumps(names).encode()] * len(users),
            "degraded": np.array([self._degraded(user) for user in users], np.int64),
            "release": [self._release.encode()] * len(users),
            "sequence": np.zeros(len(users), np.int64),
        }


def _top_ks(call: Call) -> list[Any]:
    """Reads how many items each user wants; None: all there are."""
    top_k = call.parameters.get("top_k")
    return json.loads(top_k) if isinstance(top_k, str) else [top_k] * len(call.user_ids)


def _row(entry: Any, place: int) -> tuple[str, float, dict[str, float]]:
    """Reads one entry of FakeTransport's lists; a bare id gets a score that falls with its place."""
    if isinstance(entry, str):
        return entry, 1.0 / (1 + place), {"task": 0.0}
    return entry[0], float(entry[1]), entry[2]
