"""Dashboards without Grafana: a real Prometheus' numbers are drawn in the units of the panels."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType

import pytest
from composed import Prometheus, free_ports, grafana_script, prometheus_folder, running, wait_for_url
from shops import ROOT

COMMAND = [sys.executable, str(ROOT / "docker" / "grafana" / "draw.py")]
METRICS = b"""peregrine_ready 1
peregrine_probe_seconds 0.003
nv_cpu_memory_used_bytes 3221225472
"""


@pytest.fixture(scope="module")
def draw() -> ModuleType:
    return grafana_script("draw")


class Scraped(BaseHTTPRequestHandler):
    """Is what Prometheus reads here: three numbers of a server."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/plain; version=0.0.4")
        self.end_headers()
        self.wfile.write(METRICS)

    def log_message(self, *_: object) -> None:
        """Says nothing."""


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """A Prometheus that has scraped a port with three numbers."""
    if not shutil.which("prometheus"):
        pytest.skip("prometheus is not installed (Debian: prometheus)")
    folder = tmp_path_factory.mktemp("prometheus")
    with ThreadingHTTPServer(("127.0.0.1", 0), Scraped) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        own = prometheus_folder(folder, [f"127.0.0.1:{server.server_port}"])
        [port] = free_ports(1)
        command = [
            "prometheus",
            f"--config.file={own / 'prometheus.yaml'}",
            f"--storage.tsdb.path={folder / 'db'}",
        ]
        with running([*command, f"--web.listen-address=127.0.0.1:{port}"], folder, "prometheus") as log:
            found = Prometheus(port)
            wait_for_url(f"{found.url}/-/ready", log)
            while not found.numbers("peregrine_ready"):
                time.sleep(0.05)
            yield found
        server.shutdown()


def test_a_board_is_drawn_and_what_is_empty_is_said(
    prometheus: Prometheus, tmp_path: Path, draw: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "capacity.png"
    draw.main([prometheus.url, "--board", "capacity", "--minutes", "1", "--out", str(out)])
    said = capsys.readouterr().out
    assert "no series in Peregrine: capacity: GPU" in said
    assert not any(
        f": {panel}\n" in said for panel in ("Gives lists", "Probes: time of a list", "Memory of the node")
    )
    assert out.read_bytes().startswith(b"\x89PNG")


def test_a_query_is_asked_as_grafana_asks(prometheus: Prometheus, draw: ModuleType) -> None:
    asked = draw.Prometheus(prometheus.url.removeprefix("http://"))
    assert asked.scrape_s(time.time()) == 0.5
    target = {"expr": 'max by (instance) (peregrine_probe_seconds{instance=~"$instance"})'}
    [line] = asked.lines({**target, "legendFormat": "{{instance}}!"}, draw.span_of(1, 0.5, time.time()), ".*")
    assert line.legend.startswith("127.0.0.1:")
    assert line.legend.endswith("!")
    assert {value for value in line.values if math.isfinite(value)} == {0.003}


def test_what_is_in_the_way_is_one_line(prometheus: Prometheus, tmp_path: Path) -> None:
    def refused(*words: str) -> str:
        done = subprocess.run(
            [*COMMAND, *words, "--out", str(tmp_path / "no" / "x.png")],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1
        return done.stderr

    assert "cure: Prometheus' address" in refused(f"127.0.0.1:{free_ports(1)[0]}")
    assert "no dashboard gpu; there are: capacity, chain" in refused(prometheus.url, "--board", "gpu")


def test_windows_of_rates_are_grafanas(draw: ModuleType) -> None:
    hour = draw.span_of(60, 5.0, 10_000.0)
    assert (hour.start_s, hour.step_s, hour.rate_s) == (6_400.0, 15.0, 20.0)
    assert draw.span_of(5, 5.0, 10_000.0).rate_s == 20.0  # four scrapes
    assert draw.span_of(24 * 60, 5.0, 100_000.0).rate_s == 365.0  # a step and a scrape
    assert draw._seconds("1m30s") == 90


def test_values_are_written_in_their_units(draw: ModuleType) -> None:
    written = {
        (50_000, "µs"): "50 ms",
        (7_200, "s"): "2 h",
        (0.125, "percentunit"): "12.5%",
        (1 << 30, "bytes"): "1 GiB",
        (19_300, "rowsps"): "19.3 K rows/s",
        (12, "suffix: lists/s"): "12 lists/s",
        (0, "s"): "0",
    }
    assert {one: draw.formatted(*one) for one in written} == written
    with pytest.raises(draw.DrawError, match="'parsec'"):
        draw.formatted(1, "parsec")


def test_every_unit_of_a_dashboard_can_be_drawn(draw: ModuleType) -> None:
    for board in draw.read_boards([]):
        for panel in board["panels"]:
            draw.formatted(1.5, panel["fieldConfig"]["defaults"]["unit"])


def test_limits_are_those_of_the_alerts() -> None:
    chain = json.loads((ROOT / "docker/grafana/dashboards/chain.json").read_text())
    limits = {
        panel["title"]: panel["fieldConfig"]["defaults"]["thresholds"]["steps"][1]["value"]
        for panel in chain["panels"]
        if "thresholds" in panel["fieldConfig"]["defaults"]
    }
    assert limits["Slowest of a hundred lists, by instance"] == 50_000
    assert limits["Waiting in queues, by step"] == 20_000
    assert limits["Requests that failed, by instance"] == 0.01
