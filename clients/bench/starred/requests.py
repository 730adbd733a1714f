"""Asks what cannot be answered, and does to the port what a stranger would."""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from clients.bench.starred.load import Row
from clients.bench.starred.setting import Setting
from clients.client import Client
from clients.results import Recommendations
from ensemble.contract import PIPELINE, Degraded
from ensemble.errors import PeregrineError

_STRANGER = "nobody-0"
_ROUNDS, _ALL_ROUNDS = 3, 30
_ANSWER_S = 20.0
# What 2.51 does not close, nor does any flag of it: it stays on loopback, images have newer ones, and the
# gateway refuses compressed messages
KNOWN_OPEN = {"class_count", "gzip bomb"}


def asks(setting: Setting) -> list[Row]:
    """Asks for lists of impossible lengths, for users and items that are not there, through the client."""
    wrong, count = list[str](), 0

    def harm() -> None:
        nonlocal count
        with Client(setting.server.url, fallback=False) as client:
            for _ in range(_ALL_ROUNDS if setting.is_all else _ROUNDS):
                for what, user, options, is_met in _cases(setting):
                    count += 1
                    if said := _asked(client, user, options, is_met):
                        wrong.append(f"{what}: {said}")

    notes, began = setting.bench.run(harm)
    row = setting.bench.row("asks", notes, began, setting.bench.harmed)
    row["asked"], row["faults"] = count, sorted(set(wrong))
    row["more"] = f"{count - len(wrong)} of {count} as they should be"
    return [row]


Expected = Callable[[Recommendations], bool] | str


def _asked(client: Client, user: str, options: dict[str, Any], expected: Expected) -> str:
    """Asks once; says what is wrong with the answer. A text is the beginning of the error that must come."""
    try:
        answer = client.recommend(user, **options)
    except PeregrineError as error:
        said = str(error)
        return "" if isinstance(expected, str) and said.startswith(expected) else said[:120]
    if isinstance(expected, str):
        return f"answered with {len(answer.items)} items"
    ids = answer.item_ids
    if len(ids) > options.get("top_k", 10) or len(set(ids)) < len(ids):
        return "too many items, or one twice"
    return "" if expected(answer) else f"{len(ids)} items, {answer.degraded!r}"


def _cases(setting: Setting) -> list[tuple[str, str, dict[str, Any], Expected]]:
    """Lists who asks for what, and what must come."""
    user, release = setting.bench.users[0], setting.release
    known = [one.decode() for one in release.item_ids.ids_from_rows(np.array([1, 2]))]
    category = next(name for name, values in release.vocabularies["items"].items() if values)

    def is_full(answer: Recommendations) -> bool:
        return len(answer.items) == 10

    def is_flagged(answer: Recommendations) -> bool:
        return len(answer.items) == 10 and bool(answer.degraded & Degraded.UNKNOWN_USER)

    def drops(answer: Recommendations) -> bool:
        return len(answer.items) == 10 and bool(answer.degraded & Degraded.UNKNOWN_ITEMS)

    cases: list[tuple[str, str, dict[str, Any], Expected]] = [
        (f"top_k {k}", user, {"top_k": k}, "top_k: must be 1..") for k in (0, -1, 51, 2**31)
    ]
    cases += [
        ("an unknown user", _STRANGER, {}, is_flagged),
        ("no user", "", {}, is_flagged),
        ("a long user", "u" * 129, {}, "user_id: an id must have at most 128 bytes"),
        ("unknown items", user, {"session_items": ["nothing", "-1", *known]}, drops),
        ("items twice", user, {"session_items": known * 3}, is_full),
        (
            "items left out twice",
            user,
            {"exclude_items": known * 3},
            lambda one: not {*one.item_ids} & {*known},
        ),
        ("5,000 items", user, {"session_items": ["i"] * 5000}, "session_items: at most 1000 items"),
        ("a million items", user, {"session_items": ["i"] * 10**6}, "request: 4,000,"),
        ("no candidate is left", user, {"allow": {category: []}}, lambda one: not one.items),
    ]
    return cases


def holes(setting: Setting) -> list[Row]:
    """Tries the holes that are known of old servers on the port that is open, the deadly one last."""
    server, bench = setting.server, setting.bench
    outcomes = dict[str, str]()

    def harm() -> None:
        for name, attempt in _HOLES.items():
            pid = server.pid
            found = attempt(setting)
            if not _is_alive(setting, pid):
                found = "tritonserver died"
            outcomes[name] = found

    notes, began = bench.run(harm)
    row = bench.row("holes", notes, began, bench.harmed)
    still_open = sorted(name for name, found in outcomes.items() if found)
    row["closed"], row["tried"], row["open"] = len(outcomes) - len(still_open), len(outcomes), still_open
    row["outcomes"] = [f"{name}: {found or 'closed'}" for name, found in outcomes.items()]
    row["faults"] = [f"{name}: {outcomes[name]}" for name in still_open if name not in KNOWN_OPEN]
    row["more"] = f"{row['closed']} of {row['tried']} closed" + "".join(
        f", {name} open" for name in still_open
    )
    return [row]


def _is_alive(setting: Setting, pid: int) -> bool:
    """Says whether the same tritonserver is there a moment later; waits for the next one if it is not."""
    time.sleep(0.5)
    if setting.server.pid == pid and Path(f"/proc/{pid}").exists() and not setting.server.state():
        return True
    until = time.monotonic() + _ANSWER_S
    while (setting.server.state() or setting.server.pid == pid) and time.monotonic() < until:
        time.sleep(0.1)
    return False


def _address(setting: Setting) -> tuple[str, int]:
    host, _, port = setting.server.url.rpartition(":")
    return host, int(port)


def _other_ports(setting: Setting) -> str:
    """Says which ports tritonserver listens on besides the one for gRPC."""
    pid, (_, own) = setting.server.pid, _address(setting)
    sockets = set()
    for entry in os.listdir(f"/proc/{pid}/fd"):
        try:
            sockets.add(os.readlink(f"/proc/{pid}/fd/{entry}"))
        except OSError:
            continue
    ports = set()
    for line in [*_lines("/proc/net/tcp"), *_lines("/proc/net/tcp6")]:
        words = line.split()
        if words[3] == "0A" and f"socket:[{words[9]}]" in sockets:
            ports.add(int(words[1].rpartition(":")[2], 16))
    return f"listens on {sorted(ports - {own})}" if ports != {own} else ""


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines()[1:] if Path(path).exists() else []


def _chunks(setting: Setting) -> str:
    """Sends a million chunks of HTTP 1.1, as what killed 2.51 by its HTTP port."""
    head = b"POST /v2/models/recommend/infer HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    with socket.create_connection(_address(setting), 5.0) as connection:
        connection.settimeout(5.0)
        try:
            connection.sendall(head)
            for _ in range(100):
                connection.sendall(b"1\r\n0\r\n" * 10_000)
            return "took a million chunks" if connection.recv(100).startswith(b"HTTP/1.1 2") else ""
        except OSError:
            return ""


def _call(setting: Setting, method: str, request: str, **fields: Any) -> str:
    """Makes a call as a stranger; says that it was let through."""
    import grpc
    from tritonclient.grpc import service_pb2, service_pb2_grpc

    with grpc.insecure_channel(setting.server.url) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        try:
            getattr(stub, method).future(getattr(service_pb2, request)(**fields)).result(timeout=_ANSWER_S)
        except (grpc.RpcError, grpc.FutureTimeoutError):
            return ""
    return f"{method} was let through"


def _infer(setting: Setting, change: Callable[[Any], None], **options: Any) -> tuple[str, str]:
    """Asks for a list with a request that is changed; gives the status and its text."""
    import grpc
    from tritonclient.grpc import service_pb2, service_pb2_grpc

    request = service_pb2.ModelInferRequest(model_name=PIPELINE)
    request.inputs.add(name="user_id", datatype="BYTES", shape=[1, 1])
    user = setting.bench.users[0].encode()
    request.raw_input_contents.append(struct.pack("<I", len(user)) + user)
    change(request)
    with grpc.insecure_channel(setting.server.url, [("grpc.max_send_message_length", -1)]) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        try:
            stub.ModelInfer.future(request, **options).result(timeout=_ANSWER_S)
        except grpc.RpcError as error:
            return error.code().name, str(error.details())
        except grpc.FutureTimeoutError:
            return "TIMEOUT", ""
    return "OK", ""


def _depth(setting: Setting) -> str:
    """Sends JSON of a depth of a hundred thousand."""

    def change(request: Any) -> None:
        request.parameters["session_items"].string_param = "[" * 100_000

    status, text = _infer(setting, change)
    return "" if status == "INVALID_ARGUMENT" and "session_items" in text else f"{status}: {text[:80]}"


def _bomb(setting: Setting) -> str:
    """Sends 64 MB of zeros that travel as 64 kB."""
    import grpc

    def change(request: Any) -> None:
        request.raw_input_contents[0] = bytes(64 << 20)

    before = setting.server.memory_bytes()[0]
    _infer(setting, change, compression=grpc.Compression.Gzip)
    grown = (setting.server.memory_bytes()[0] - before) >> 20
    return f"{grown} MB stay" if grown > 20 else ""


def _twice(setting: Setting) -> str:
    """Asks for an output twice, and gives an input twice."""

    def outputs(request: Any) -> None:
        for _ in range(2):
            request.outputs.add(name="item_ids")

    def inputs(request: Any) -> None:
        request.inputs.append(request.inputs[0])
        request.raw_input_contents.append(request.raw_input_contents[0])

    statuses = [_infer(setting, change)[0] for change in (outputs, inputs)]
    return "" if {*statuses} <= {"OK", "INVALID_ARGUMENT"} else f"{statuses}"


def _classes(setting: Setting) -> str:
    """Asks for classes of each output (CVE-2025-23321)."""

    def change(request: Any) -> None:
        for name in ("scores", "item_ids"):
            request.outputs.add(name=name).parameters["classification"].int64_param = 3

    _infer(setting, change)
    return ""


_HOLES: dict[str, Callable[[Setting], str]] = {
    "other ports": _other_ports,
    "chunk flood": _chunks,
    "deep JSON": _depth,
    "gzip bomb": _bomb,
    "shared memory": lambda s: _call(
        s,
        "SystemSharedMemoryRegister",
        "SystemSharedMemoryRegisterRequest",
        name="x",
        key="/triton_python_backend_shm_region_1",
        byte_size=64,
    ),
    "shared memory's status": lambda s: _call(
        s, "SystemSharedMemoryStatus", "SystemSharedMemoryStatusRequest"
    ),
    "load of ../x": lambda s: _call(
        s, "RepositoryModelLoad", "RepositoryModelLoadRequest", model_name="../x"
    ),
    "load of x;id": lambda s: _call(
        s, "RepositoryModelLoad", "RepositoryModelLoadRequest", model_name="x;id"
    ),
    "unload": lambda s: _call(
        s, "RepositoryModelUnload", "RepositoryModelUnloadRequest", model_name="recommend"
    ),
    "log settings": lambda s: _call(s, "LogSettings", "LogSettingsRequest"),
    "trace settings": lambda s: _call(s, "TraceSetting", "TraceSettingRequest"),
    "model config": lambda s: _call(s, "ModelConfig", "ModelConfigRequest", name="recommend"),
    "twice": _twice,
    "class_count": _classes,
}
