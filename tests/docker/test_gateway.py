"""The door: a real nginx with the configuration of docker/nginx, before two real servers."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from ports import free_port
from shops import ROOT, one_thread, private_copy

from clients import AsyncClient, Client, InvalidArgument, Overloaded, Tls, Unavailable
from clients.bench import gateway
from clients.bench.gateway import Authority, Gateway
from clients.errors import CallError
from clients.transport import proto_from_call
from clients.wire import Call
from ensemble.server.options import ServeOptions
from ensemble.server.process import CONTROL_HEADER
from ensemble.server.supervisor import Server, serve

pytestmark = [
    pytest.mark.triton,
    pytest.mark.skipif(bool(gateway.missing()), reason=gateway.missing() or "nothing is missing"),
]
ALLOWED = {"ModelInfer", "ServerLive", "ServerReady", "ServerMetadata", "ModelReady", "ModelMetadata"}


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def web(authority: Authority) -> Tls:
    return authority.issue("web")


@pytest.fixture(scope="module")
def repository(tiny_repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return private_copy(tiny_repository, tmp_path_factory.mktemp("door") / "repository")


@pytest.fixture(scope="module")
def replica(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    options = ServeOptions(0, None, fused=True, state=tmp_path_factory.mktemp("state"))
    with serve(repository, options) as server:
        yield server


@pytest.fixture(scope="module")
def door(
    authority: Authority, replica: Server, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Gateway]:
    one = Gateway(tmp_path_factory.mktemp("nginx"), authority, free_port(), free_port())
    one.name_replicas([replica.url])
    one.start()
    yield one
    one.stop()


@pytest.fixture(scope="module")
def stub(door: Gateway, web: Tls) -> Iterator[Any]:
    from tritonclient.grpc import service_pb2_grpc

    from clients.tls import open_channel

    with open_channel(door.url, web, [("grpc.max_send_message_length", -1)]) as channel:
        yield service_pb2_grpc.GRPCInferenceServiceStub(channel)


def asked(size: int = 0) -> Any:
    request = proto_from_call(Call((b"u1",), {"top_k": 3}), "recommend")
    if size:
        request.parameters["padding"].string_param = "x" * size
    return request


def refusal(call: Callable[[], object]) -> tuple[str, str]:
    import grpc

    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value.code().name, caught.value.details()  # type: ignore[attr-defined]


def until(holds: Callable[[], object], within_s: float = 10.0) -> None:
    limit = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < limit
        time.sleep(0.05)


def test_every_client_gets_lists_by_tls_and_its_name_is_in_the_log(door: Gateway, web: Tls) -> None:
    async def one() -> str:
        async with AsyncClient(door.url, tls=web) as client:
            return (await client.recommend("u1", budget_ms=5000)).release

    with Client(door.url, tls=web) as client:
        assert client.connect()
        assert client.recommend("u1", top_k=3).release == "r1"
        assert len(client.recommend_many(["u1", "u2"], top_k=3)) == 2
    assert asyncio.run(one()) == "r1"
    files = ("--ca", web.ca, "--certificate", web.certificate, "--key", web.key)
    done = subprocess.run(
        [sys.executable, ROOT / "peregrine.py", "recommend", "u1", "--json", "--url", door.url, *files],
        capture_output=True,
        text=True,
        env=one_thread(PYTHONPATH=str(ROOT)),
        check=False,
    )
    assert json.loads(done.stdout)[0]["release"] == "r1", done.stderr
    lines = [json.loads(line) for line in (door.folder / "access.log").read_text().splitlines()]
    assert {one["client"] for one in lines} == {"web"}
    assert sum(one["grpc"] == "0" for one in lines if one["method"].endswith("/ModelInfer")) >= 4


def test_only_methods_that_give_lists_or_say_who_is_there_are_passed_on(stub: Any, replica: Server) -> None:
    from tritonclient.grpc import service_pb2

    methods = {name for name in vars(stub) if name[0].isupper()}
    assert len(methods) > 15
    outcomes = {}
    for name in methods - {"ModelInfer", "ModelStreamInfer"}:
        request = getattr(service_pb2, f"{name}Request")()
        if name.startswith("Model"):
            request.name = "recommend"
        key = tuple(replica.headers.items())  # the control header opens nothing here
        try:
            getattr(stub, name)(request, metadata=key)
            outcomes[name] = "OK"
        except Exception as error:
            outcomes[name] = f"{error.code().name}: {error.details()}"  # type: ignore[attr-defined]
    refused = {"UNIMPLEMENTED: gateway: this method is not offered here"}
    assert {name for name, outcome in outcomes.items() if outcome == "OK"} == ALLOWED - {"ModelInfer"}
    assert {outcomes[name] for name in outcomes.keys() - ALLOWED} == refused
    assert refusal(lambda: list(stub.ModelStreamInfer(iter([asked()]))))[0] == "UNIMPLEMENTED"
    assert CONTROL_HEADER in gateway.FOLDER.joinpath("nginx.conf").read_text()


def test_who_has_no_certificate_of_the_authority_is_refused(
    door: Gateway, web: Tls, authority: Authority, tmp_path: Path
) -> None:
    stranger = Authority(tmp_path / "other", "another").issue("web")
    for tls, words in (
        (Tls(web.ca), "does not let this client in"),
        (Tls(web.ca, stranger.certificate, stranger.key), "does not let this client in"),
        (Tls(stranger.ca, web.certificate, web.key), "not of the authority"),
        (Tls(web.ca, web.certificate, web.key, server_name="peregrine.shop"), "of another name"),
        (Tls(web.ca, web.certificate, stranger.key), "do not belong together"),
        (None, "it wants TLS"),
    ):
        with Client(door.url, tls=tls, fallback=False) as client, pytest.raises(Unavailable, match=words):
            client.recommend("u1")


def test_files_that_are_none_are_named(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.crt"
    wrong.write_text("no certificate")
    with pytest.raises(InvalidArgument, match=r"ca: .*wrong.crt holds no certificate in PEM form"):
        Client(tls=Tls(ca=wrong))
    with pytest.raises(InvalidArgument, match=r"key: .*none cannot be read: No such file"):
        Client(tls=Tls(certificate=wrong, key=tmp_path / "none"))
    with pytest.raises(InvalidArgument, match="key: is needed together with the certificate"):
        Tls(certificate=wrong)


def test_large_and_compressed_messages_are_refused_before_a_server_sees_them(stub: Any) -> None:
    import grpc

    search = (("peregrine-call", "search"),)
    large = ("INVALID_ARGUMENT", "request: larger than this gateway lets in")
    for size, metadata, is_refused in (
        (900 << 10, (), False),
        (1100 << 10, (), True),
        (1100 << 10, search, False),
        (5 << 20, search, False),
        (7 << 20, search, True),
    ):
        status, text = refusal(lambda size=size, of=metadata: stub.ModelInfer(asked(size), metadata=of))
        assert (status == large[0] and text.startswith(large[1])) == is_refused, (size, status, text)
    for kind in (grpc.Compression.Gzip, grpc.Compression.Deflate):
        status, text = refusal(lambda kind=kind: stub.ModelInfer(asked(), compression=kind))
        assert (status, text) == ("UNIMPLEMENTED", "gateway: send messages without compression")


def test_limits_are_each_clients_own_and_read_again_at_a_reload(door: Gateway, authority: Authority) -> None:
    file = door.folder / "clients.conf"
    usual = file.read_text()
    crawler, shop, thief = (authority.issue(name) for name in ("crawler", "shop", "thief"))
    file.write_text(usual.replace('# "stolen-laptop" refused;', '"thief" refused;').replace("500r/s", "1r/s"))
    conf = door.folder / "nginx.conf"
    conf.write_text(conf.read_text().replace("zone=normal burst=200", "zone=normal burst=2"))
    door.reload()

    def is_refused() -> bool:
        with Client(door.url, tls=thief, fallback=False) as client:
            try:
                client.recommend("u1", top_k=1)
            except Unavailable as error:
                return error.status == "PERMISSION_DENIED"
            return False

    until(is_refused)
    with Client(door.url, tls=crawler) as client:
        client.recommend("u1", top_k=1)
        with pytest.raises(Overloaded, match="more requests than this client may send") as caught:
            [client.recommend("u1", top_k=1) for _ in range(5)]
        assert caught.value.retry_after_s == 0.2
    with Client(door.url, tls=shop) as client:
        assert client.recommend("u1", top_k=1).release == "r1"
    file.write_text(usual)
    conf.write_text(conf.read_text().replace("zone=normal burst=2 ", "zone=normal burst=200 "))
    door.reload()
    until(lambda: not is_refused())


def test_a_way_that_is_slow_is_no_reason_to_connect_again_and_again(door: Gateway, web: Tls) -> None:
    with socket.create_server(("127.0.0.1", 0)) as far:
        came = []

        def carry(source: socket.socket, sink: socket.socket) -> None:
            with contextlib.suppress(OSError):
                while data := source.recv(1 << 16):
                    time.sleep(0.15)  # longer than gRPC's pause between two tries
                    sink.sendall(data)

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    near = far.accept()[0]
                    other = socket.create_connection(("127.0.0.1", int(door.url.rpartition(":")[2])))
                    came.append(near)
                    for pair in ((near, other), (other, near)):
                        threading.Thread(target=carry, args=pair, daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        with Client(f"127.0.0.1:{far.getsockname()[1]}", tls=web) as client:
            assert client.recommend("u1", top_k=1).release == "r1"
        assert len(came) == 1


class Asking:
    """Asks all the time, six at once, and counts what comes. A call that nginx never took, since it was just
    ending that connection, is asked again by the client."""

    def __init__(self, url: str, tls: Tls) -> None:
        self.outcomes, self._stopped = Counter[str](), False
        self._client, self._pool = Client(url, tls=tls, fallback=False), ThreadPoolExecutor(6)
        self._loops = [self._pool.submit(self._loop, number) for number in range(6)]

    def _loop(self, number: int) -> None:
        while not self._stopped:
            try:
                self.outcomes["OK" if self._client.recommend(f"u{number}", top_k=3).items else "empty"] += 1
            except CallError as error:
                self.outcomes[str(error)] += 1
            time.sleep(0.01)

    def stop(self) -> Counter[str]:
        self._stopped = True
        self._pool.shutdown()
        self._client.close()
        return self.outcomes


def test_a_reload_fails_no_call(door: Gateway, web: Tls) -> None:
    asking = Asking(door.url, web)
    for _ in range(3):
        time.sleep(0.4)
        door.reload()
    time.sleep(0.4)
    outcomes = asking.stop()
    assert set(outcomes) == {"OK"}, outcomes
    assert outcomes["OK"] > 30


def test_where_one_replica_drains_or_dies_the_other_answers(
    door: Gateway, web: Tls, repository: Path, replica: Server, tmp_path: Path
) -> None:
    options = ServeOptions(0, None, fused=True, state=tmp_path / "state")
    with serve(repository, options) as second:
        door.name_replicas([replica.url, second.url])
        log = door.folder / "access.log"
        start = log.stat().st_size

        def is_asked() -> bool:
            with Client(door.url, tls=web) as client:
                client.recommend_many(["u1"], top_k=1)
            return f'"replica":"{second.url}"' in log.read_text()[start:]

        until(is_asked)
        asking = Asking(door.url, web)
        time.sleep(0.5)
        door.name_replicas([replica.url])  # as Kubernetes does, whose preStop waits for it
        time.sleep(2.0)
        gone = log.stat().st_size
        time.sleep(0.3)
        assert second.url not in log.read_text()[gone:]
        door.name_replicas([replica.url, second.url])
        until(lambda: second.url in log.read_text()[gone:])
        os.kill(second.pid, signal.SIGKILL)  # with calls in it; serve starts it again
        time.sleep(1.5)
        outcomes = asking.stop()
        assert set(outcomes) == {"OK"}, outcomes
        retried = [line for line in log.read_text()[start:].splitlines() if f"{second.url}, " in line]
        assert retried, "no call met the server that was killed"


def test_nobody_behind_it_is_said_as_such(authority: Authority, web: Tls, tmp_path: Path) -> None:
    one = Gateway(tmp_path / "nginx", authority, free_port(), free_port())
    one.start()
    try:
        with Client(one.url, tls=web, fallback=False) as client:
            with pytest.raises(Unavailable, match="no replica answers") as caught:
                client.recommend("u1")
            assert (caught.value.retryable, caught.value.retry_after_s) == (True, 0.5)
        with urllib.request.urlopen(f"http://127.0.0.1:{one.http_port}/livez", timeout=5) as reply:
            assert reply.read() == b"ok\n"
    finally:
        one.stop()
    assert not (one.folder / "nginx.pid").exists()
