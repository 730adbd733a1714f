"""Runs the services of docker/compose.yaml as processes: their own commands, with paths and addresses of this
machine."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from ports import free_port
from shops import ROOT, one_thread

COMPOSE = ROOT / "docker" / "compose.yaml"
PEREGRINE = [sys.executable, "-c", "import peregrine; peregrine.main()"]


def interpolated(text: str) -> str:
    """Gives compose's text with the default of every variable, as where none is set."""
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text)


def services() -> dict[str, dict[str, Any]]:
    """Reads the services, by name."""
    import yaml

    found: dict[str, dict[str, Any]] = yaml.safe_load(interpolated(COMPOSE.read_text()))["services"]
    return found


def command_of(name: str, here: Mapping[str, str], *more: str) -> list[str]:
    """Gives a service's command, the program in front, with what its paths and addresses are `here`."""
    service = services()[name]
    words = service["command"]
    entrypoint = {"peregrine-serve": PEREGRINE, "redis:7.2-alpine": []}
    program = entrypoint.get(service["image"], [name])
    for there, mine in here.items():
        words = [word.replace(there, mine) for word in words]
    return [*program, *words, *more]


@contextlib.contextmanager
def running(command: list[str], folder: Path, name: str, **environment: str) -> Iterator[Path]:
    """Runs a command while the block does; gives the file of what it says."""
    log = folder / f"{name}.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            command,
            stdout=out,
            stderr=out,
            cwd=folder,
            env={**one_thread(PYTHONPATH=str(ROOT)), **environment},
        )
        try:
            yield log
            assert process.poll() is None, log.read_text()[-3000:]
        finally:
            process.terminate()
            try:
                process.wait(40)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def wait_for_url(url: str, log: Path, limit_s: float = 180.0) -> None:
    """Returns when a URL is answered with 200."""
    deadline = time.monotonic() + limit_s
    while True:
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5):
            return
        assert time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.2)


class Prometheus:
    """Asks a Prometheus on loopback."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"

    def get(self, path: str, **parameters: str) -> Any:
        """Gives what the API's path says; its own error is the assertion's."""
        url = f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{parameters}: {error.read().decode()}") from None

    def numbers(self, expression: str) -> list[float]:
        """Gives a query's values now."""
        return [float(one["value"][1]) for one in self.get("query", query=expression)["result"]]


def prometheus_folder(folder: Path, targets: list[str]) -> Path:
    """Lays out a copy of Prometheus' configuration that reads `targets`, often."""
    own = folder / "prometheus"
    shutil.copytree(ROOT / "docker" / "prometheus", own)
    path = own / "prometheus.yaml"
    text = path.read_text()
    assert '["serve:8080"]' in text
    assert "scrape_interval: 5s" in text
    text = text.replace('["serve:8080"]', json.dumps(targets)).replace(
        "scrape_interval: 5s", "scrape_interval: 500ms"
    )
    path.write_text(text)
    return own


def free_ports(count: int) -> list[int]:
    """Gives ports that nobody listens on."""
    return [free_port() for _ in range(count)]


def grafana_script(name: str) -> ModuleType:
    """Imports a script of docker/grafana, which is no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docker" / "grafana" / f"{name}.py")
    assert spec
    assert spec.loader
    sys.modules[name] = module = importlib.util.module_from_spec(spec)  # dataclasses look there
    spec.loader.exec_module(module)
    return module
