"""Probes that a fleet asks: they say what callers would meet."""

from __future__ import annotations

import os
import signal
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from shops import private_copy

from clients import Client
from ensemble.errors import ServerError
from ensemble.server.http import Health, answering, application
from ensemble.server.list_probe import Answer, Probe
from ensemble.server.options import ServeOptions
from ensemble.server.supervisor import Server, serve

pytestmark = pytest.mark.triton


def get(url: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def values(text: str) -> dict[tuple[str, ...], float]:
    """Reads Prometheus' text as its own parser does: {(name, label values …): value}."""
    return {
        (one.name, *one.labels.values()): one.value
        for family in text_string_to_metric_families(text)
        for one in family.samples
    }


@pytest.fixture(scope="module")
def server(tiny_repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    repository = private_copy(tiny_repository, tmp_path_factory.mktemp("http") / "repository")
    options = ServeOptions(0, 0, http_port=0, fused=True, state=tmp_path_factory.mktemp("state"))
    with serve(repository, options) as server:
        yield server


def wait_for(path: str, status: int, server: Server, limit_s: float = 30.0) -> str:
    deadline = time.monotonic() + limit_s
    while (answer := get(f"{server.http_url}{path}"))[0] != status:
        assert time.monotonic() < deadline, answer
        time.sleep(0.1)
    return answer[1]


def test_a_server_that_gives_lists_is_ready_and_alive(server: Server) -> None:
    assert wait_for("/readyz", 200, server) == "ok\n"
    assert get(f"{server.http_url}/livez") == (200, "ok\n")
    assert get(f"{server.http_url}/secret")[0] == 404


def test_metrics_are_tritons_and_our_own_in_one_answer(server: Server) -> None:
    with Client(server.url) as client:
        client.recommend("u1")
    wait_for("/readyz", 200, server)
    status, text = get(f"{server.http_url}/metrics")
    found = values(text)
    assert status == 200
    assert found["peregrine_ready",] == 1
    assert found["peregrine_triton_metrics",] == 1
    assert found["peregrine_route_share", "r1"] == 1
    assert found["peregrine_restarts_total",] == 0
    assert found["peregrine_repairs_total",] == 0
    assert found["peregrine_stubs_dead", "r1_recommend"] == 0
    assert found["nv_inference_request_success_total", "recommend", "1"] > 0
    assert found["nv_inference_request_summary_us", "recommend", "1", "0.99"] > 0


def test_a_server_whose_processes_are_stopped_is_not_ready_and_says_so(server: Server) -> None:
    stubs = [pid for pids in server.stubs().values() for pid in pids]
    for pid in stubs:
        os.kill(pid, signal.SIGSTOP)
    try:
        time.sleep(0.3)  # the last answer counts for a quarter of a second
        started = time.monotonic()
        status, text = get(f"{server.http_url}/readyz")
        assert (status, text[:7]) == (503, "no list")
        assert time.monotonic() - started < 3
        assert get(f"{server.http_url}/livez")[0] == 200  # for a minute
        assert values(get(f"{server.http_url}/metrics")[1])["peregrine_ready",] == 0
    finally:
        for pid in stubs:
            os.kill(pid, signal.SIGCONT)
    wait_for("/readyz", 200, server)


def test_a_killed_tritonserver_is_not_ready_until_it_answers_again(server: Server) -> None:
    os.kill(server.pid, signal.SIGKILL)
    wait_for("/readyz", 503, server)
    assert get(f"{server.http_url}/livez")[0] == 200
    wait_for("/readyz", 200, server)
    assert values(get(f"{server.http_url}/metrics")[1])["peregrine_restarts_total",] >= 1


class Hung:
    """A probe whose server gives no list any more."""

    budget_s, failures = 1.0, 0

    def __init__(self) -> None:
        self.last_good_s = time.monotonic() - 61.2

    def ask(self) -> Answer:
        return Answer("no list within 1000 ms", 1.0)


def test_a_server_that_hangs_is_not_alive_after_a_minute(server: Server) -> None:
    hung = Hung()
    health = Health(server, hung)  # type: ignore[arg-type]
    assert health.alive() == "no list within 1000 ms, and none for 61 s"
    hung.last_good_s = time.monotonic() - 30
    assert health.alive() == ""


def test_what_is_no_get_is_refused(server: Server) -> None:
    said: list[str] = []
    app = application(Health(server, Probe(server.url)))
    body = app(
        {"REQUEST_METHOD": "POST", "PATH_INFO": "/readyz"}, lambda status, headers: said.append(status)
    )
    assert (said, list(body)) == (["405 Method Not Allowed"], [b"GET only\n"])


def test_a_port_that_is_taken_is_one_line_with_its_cure(server: Server) -> None:
    assert server.http_url
    port = int(server.http_url.rpartition(":")[2])
    with (
        pytest.raises(ServerError, match=r"choose another with --http-port"),
        answering(server, "127.0.0.1", port),
    ):
        pass
