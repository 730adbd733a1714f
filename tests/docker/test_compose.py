"""compose.yaml and Grafana's dashboards: valid, strict, each command runs, and no panel is empty."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from composed import (
    COMPOSE,
    Prometheus,
    command_of,
    free_ports,
    grafana_script,
    interpolated,
    prometheus_folder,
    running,
    services,
    wait_for_url,
)
from shops import ROOT, one_thread, private_copy

import peregrine
from clients import Client
from ensemble.release.release import open_release
from ensemble.release.store_state import StoreState, write_store_state
from ensemble.server.options import ServeOptions
from ensemble.server.process import EXIT_TIMEOUT_S
from ensemble.server.supervisor import Server, serve
from ensemble.tiers.load import load_release

yaml = pytest.importorskip("yaml")
GRAFANA = ROOT / "docker" / "grafana"
# Panels that nothing here can fill, with the reason; each must be as empty as is said.
EMPTY_HERE = {
    "GPU": "needs an NVIDIA GPU",
    "Memory of the GPU": "needs an NVIDIA GPU",
}


# --- what is written


def test_compose_is_valid_by_its_specification() -> None:
    compose_spec = pytest.importorskip("compose_spec", reason="compose-spec is not installed (extra deploy)")
    document = yaml.safe_load(interpolated(COMPOSE.read_text()))  # merges what YAML's << brings
    text = yaml.safe_dump(document)
    assert set(compose_spec.PyCompose.from_yaml(text).service_names()) == set(services())
    with pytest.raises(ValueError, match="comand"):
        compose_spec.PyCompose.from_yaml(text.replace("command:", "comand:"))


@pytest.mark.parametrize("name", services())
def test_a_service_has_no_more_rights_than_it_needs(name: str) -> None:
    service = services()[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ()))
    assert ":" in service["image"] or service["image"] == "peregrine-serve"
    for volume in service.get("volumes", ()):
        if volume.startswith("./"):
            source, _, mode = volume.split(":")
            assert (COMPOSE.parent / source).is_dir()
            assert mode == "ro"


def test_peregrines_commands_and_flags_exist() -> None:
    import typer

    for name, service in services().items():
        if service["image"] != "peregrine-serve":
            continue
        command, *words = service["command"]
        app = typer.main.get_command(peregrine._app(peregrine.COMMANDS[command]))
        if isinstance(app, typer.core.TyperGroup):
            app = app.commands[words.pop(0)]
        flags = {flag for parameter in app.params for flag in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= flags, name


def test_a_server_that_is_stopped_may_drain() -> None:
    assert int(services()["serve"]["stop_grace_period"].removesuffix("s")) > EXIT_TIMEOUT_S + 10


def test_dashboards_are_those_of_their_tables() -> None:
    there = {path.name: path.read_text() for path in (GRAFANA / "dashboards").iterdir()}
    assert there == grafana_script("dashboards").texts(), "cure: python docker/grafana/dashboards.py"


def test_grafana_finds_what_it_is_given() -> None:
    grafana = services()["grafana"]
    mounted = dict(volume.split(":")[:2][::-1] for volume in grafana["volumes"])
    (provider,) = yaml.safe_load((GRAFANA / "provisioning/dashboards/peregrine.yaml").read_text())[
        "providers"
    ]
    (source,) = yaml.safe_load((GRAFANA / "provisioning/datasources/prometheus.yaml").read_text())[
        "datasources"
    ]
    assert mounted[provider["options"]["path"]] == "./grafana/dashboards"
    assert mounted["/etc/grafana/provisioning"] == "./grafana/provisioning"
    home = Path(grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])
    assert (GRAFANA / "dashboards" / home.name).exists()
    assert f":{source['url'].rpartition(':')[2]}" in services()["prometheus"]["command"][-1]


# --- what runs


class Composed(NamedTuple):
    """The services at work: what Prometheus knows, and what each said."""

    prometheus: Prometheus
    url: str
    logs: dict[str, Path]
    server: Server  # the one whose steps are models of their own

    def regions(self) -> list[Path]:
        """Lists the shared memory of that server's processes."""
        return list(Path("/dev/shm").glob(f"{self.server._run.region_prefix}*"))


@pytest.fixture(scope="module")
def repository(tiny_repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """r1 with most users, and r2, of the same files, that is tried on the others."""
    from variants import publish_variant

    from ensemble.release.route import Share, next_route, read_route, write_route

    folder = tmp_path_factory.mktemp("composed")
    repository = private_copy(tiny_repository, folder / "repository")
    publish_variant(repository, "r1", "r2", folder / "scratch")
    write_route(repository, next_route(read_route(repository), [Share("r1", 0.7), Share("r2", 0.3)]))
    write_store_state(repository, StoreState("file:///store", time.time()))
    return repository


@pytest.fixture(scope="module")
def composed(
    repository: Path, tiny_repository: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Composed]:
    """Redis, rows in it, the server, one more of the other kind, a little traffic, and Prometheus."""
    missing = [one for one in ("redis-server", "prometheus") if not shutil.which(one)]
    if missing:
        pytest.skip(f"{' and '.join(missing)} not installed (Debian: redis-server, prometheus)")
    folder = tmp_path_factory.mktemp("services")
    redis, grpc, http, metrics, prometheus = free_ports(5)
    here = {
        "redis:6379": f"127.0.0.1:{redis}",
        "/releases": str(repository),
        "/state/serve": str(folder / "state"),
        "0.0.0.0": "127.0.0.1",
        "8080": str(http),
    }
    ports = ("--port", str(grpc), "--metrics-port", str(metrics))
    logs = {}
    with contextlib.ExitStack() as stack:
        logs["redis"] = stack.enter_context(
            running(command_of("redis", {}, "--port", str(redis), "--bind", "127.0.0.1"), folder, "redis")
        )
        loaded = subprocess.run(
            command_of("features", here),
            capture_output=True,
            env=one_thread(PYTHONPATH=str(ROOT)),
            check=True,
        )
        (folder / "features.log").write_bytes(loaded.stdout)
        logs["features"] = folder / "features.log"
        # Without rows of its own a release that is tried is taken out within seconds, and its panels end
        load_release(open_release(repository, "r2"), f"redis://127.0.0.1:{redis}")
        logs["serve"] = stack.enter_context(
            running(command_of("serve", here, *ports), folder, "serve", PEREGRINE_CATALOGUE=str(repository))
        )
        other = private_copy(tiny_repository, folder / "other")
        options = ServeOptions(0, 0, http_port=0, state=folder / "other-state")
        server = stack.enter_context(serve(other, options))
        wait_for_url(f"http://127.0.0.1:{http}/readyz", logs["serve"])
        targets = [f"127.0.0.1:{http}", str(server.http_url).removeprefix("http://")]
        own = prometheus_folder(folder, targets)
        here = {
            "/etc/prometheus": str(own),
            "=/prometheus": f"={folder / 'tsdb'}",
            ":9090": f"127.0.0.1:{prometheus}",
        }
        logs["prometheus"] = stack.enter_context(
            running(command_of("prometheus", here), folder, "prometheus")
        )
        found = Prometheus(prometheus)
        wait_for_url(f"{found.url}/-/ready", logs["prometheus"])
        stack.enter_context(traffic(f"127.0.0.1:{grpc}", server.url))
        yield Composed(found, f"127.0.0.1:{grpc}", logs, server)


@contextlib.contextmanager
def traffic(*urls: str) -> Iterator[None]:
    """Asks for lists while the block runs, many at once: one query in a thousand is probed."""
    stopping = threading.Event()

    def ask(url: str) -> None:
        with Client(url) as client:
            number = 0
            while not stopping.wait(0.05):
                client.recommend_many([f"u{(number + one) % 300 + 1}" for one in range(32)])
                number += 32

    threads = [threading.Thread(target=ask, args=(url,)) for url in urls]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stopping.set()
        for thread in threads:
            thread.join()


@pytest.mark.long  # two servers, a canary and a Prometheus that has to scrape for a while
@pytest.mark.triton
@pytest.mark.redis
def test_each_services_command_runs(composed: Composed) -> None:
    with Client(composed.url) as client:
        assert client.recommend("u1").items
    said = {name: path.read_text() for name, path in composed.logs.items()}
    assert "is in Redis" in said["features"]
    assert "serving release r1" in said["serve"]
    assert "Server is ready to receive web requests" in said["prometheus"]
    rules = composed.prometheus.get("rules")["groups"][0]["rules"]
    assert len(rules) == len(
        yaml.safe_load((ROOT / "docker/prometheus/rules.yaml").read_text())["groups"][0]["rules"]
    )
    assert set(said) | {"grafana"} == set(services())  # Grafana is in no registry that tests reach


@pytest.mark.long  # two servers, a canary and a Prometheus that has to scrape for a while
@pytest.mark.triton
@pytest.mark.redis
def test_no_panel_is_empty(composed: Composed) -> None:
    pending = dict(queries())
    deadline = time.monotonic() + 60
    while pending and time.monotonic() < deadline:
        for panel, expression in list(pending):
            numbers = composed.prometheus.numbers(expression)
            if any(map(math.isfinite, numbers)):
                del pending[panel, expression]
        if {panel for panel, _ in pending} <= set(EMPTY_HERE):
            break
        time.sleep(0.5)
    assert {panel for panel, _ in pending} == set(EMPTY_HERE), pending


@pytest.mark.long  # two servers, a canary and a Prometheus that has to scrape for a while
@pytest.mark.triton
@pytest.mark.redis
def test_every_panel_is_drawn(composed: Composed, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """After the test above, when each query has had numbers."""
    out = tmp_path / "dashboards.png"
    grafana_script("draw").main([composed.prometheus.url, "--out", str(out), "--minutes", "2"])
    first, *empty = capsys.readouterr().out.splitlines()
    assert first == f"{out}: {len({panel for panel, _ in queries()})} panels"
    assert {line.rpartition(": ")[2] for line in empty} == set(EMPTY_HERE)
    assert 20_000 < len(out.read_bytes()) < 400_000


@pytest.mark.long  # two servers, a canary and a Prometheus that has to scrape for a while
@pytest.mark.triton
@pytest.mark.redis
def test_kubernetes_adapter_reads_how_long_requests_wait(composed: Composed) -> None:
    (document,) = yaml.safe_load_all((ROOT / "docker/kubernetes/monitoring/adapter.yaml").read_text())
    (rule,) = yaml.safe_load(document["data"]["config.yaml"])["rules"]
    query = (
        rule["metricsQuery"]
        .replace("<<.LabelMatchers>>", 'instance=~".+"')
        .replace("<<.GroupBy>>", "instance")
    )
    deadline, seconds = time.monotonic() + 60, composed.prometheus.numbers(query)
    while len(seconds) < 2 and time.monotonic() < deadline:  # a rate needs two scrapes
        time.sleep(0.5)
        seconds = composed.prometheus.numbers(query)
    assert len(seconds) == 2  # servers
    assert all(0 < one < 1 for one in seconds)


@pytest.mark.long  # two servers, a canary and a Prometheus that has to scrape for a while
@pytest.mark.triton
@pytest.mark.redis
def test_shared_memory_is_no_more_than_a_release_says(composed: Composed, repository: Path) -> None:
    from ensemble.release.shared_memory import shm_bytes

    need = shm_bytes(open_release(repository, "r1").schema)
    sizes = [path.stat().st_size for path in composed.regions()]
    assert len(sizes) == 10  # two processes for each of five steps
    assert sum(sizes) <= need


def queries() -> dict[tuple[str, str], Any]:
    """Gives each panel's queries as Grafana would ask them, of all instances."""
    found = {}
    for path in (GRAFANA / "dashboards").glob("*.json"):
        for panel in json.loads(path.read_text())["panels"]:
            for target in panel["targets"]:
                expression = target["expr"].replace("$instance", ".*").replace("$__rate_interval", "10s")
                found[panel["title"], expression] = path.name
    return found
