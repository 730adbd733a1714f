"""Runs what a pod of docker/kubernetes runs, as processes here: the same commands, probes and pauses."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ensemble.errors import ServerError

ROOT = Path(__file__).resolve().parents[3]
_MANIFESTS = ROOT / "docker" / "kubernetes"


@dataclass(frozen=True)
class Manifest:
    """Holds what the Deployment says of a pod: its commands by container, and how it is watched and ended."""

    commands: Mapping[str, list[str]]
    probe_path: str
    period_s: float
    failures: int
    pause_s: float
    grace_s: float


def read_manifest(overlay: str = "cpu") -> Manifest:
    """Reads the base's Deployment, with the commands that an overlay puts in their places."""
    import yaml

    base = yaml.safe_load((_MANIFESTS / "base" / "deployment.yaml").read_text())["spec"]["template"]["spec"]
    patch = yaml.safe_load((_MANIFESTS / "overlays" / overlay / "serve.yaml").read_text())
    containers = [*base["initContainers"], *base["containers"]]
    patched = patch["spec"]["template"]["spec"]["containers"]
    commands = {one["name"]: one["args"] for one in [*containers, *patched] if "args" in one}
    [serve] = [one for one in base["containers"] if one["name"] == "serve"]
    probe = serve["startupProbe"]
    return Manifest(
        commands,
        probe["httpGet"]["path"],
        probe["periodSeconds"],
        probe["failureThreshold"],
        float(serve["lifecycle"]["preStop"]["exec"]["command"][1]),
        base["terminationGracePeriodSeconds"],
    )


@dataclass
class Pod:
    """Is one replica: a folder for its volumes, and its processes."""

    manifest: Manifest
    folder: Path
    store: str
    port: int
    http_port: int
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def url(self) -> str:
        """Gives host:port of gRPC."""
        return f"127.0.0.1:{self.port}"

    def start(self) -> None:
        """Pulls what the store's route names, then serves it and follows the store; does not wait."""
        for name in ("releases", "catalogue", "state"):
            (self.folder / name).mkdir(parents=True)
        pull = self._run("pull")
        if pull.wait(self.manifest.grace_s):
            raise ServerError(f"pull ended with code {pull.returncode}: {self.log('pull')}")
        self.processes = {name: self._run(name) for name in ("serve", "follow")}

    def wait_until_ready(self) -> None:
        """Asks as the startup probe does; ServerError where Kubernetes would end the pod."""
        for _ in range(self.manifest.failures):
            if self.processes["serve"].poll() is not None:
                raise ServerError(f"serve ended: {self.log('serve')}")
            if self.is_ready():
                return
            time.sleep(self.manifest.period_s)
        raise ServerError(f"not ready after {self.manifest.failures} probes: {self.log('serve')}")

    def is_ready(self) -> bool:
        """Asks the readiness probe once."""
        url = f"http://127.0.0.1:{self.http_port}{self.manifest.probe_path}"
        try:
            with urllib.request.urlopen(url, timeout=3.0):
                return True
        except OSError:
            return False

    def end(self) -> float:
        """Sends SIGTERM and gives the seconds until all has ended; ServerError if the grace is too short."""
        began = time.monotonic()
        for one in self.processes.values():
            one.terminate()
        until = began + self.manifest.grace_s - self.manifest.pause_s
        for name, one in self.processes.items():
            try:
                one.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                self.kill()
                raise ServerError(f"{name} did not end within the grace: {self.log(name)}") from None
        return time.monotonic() - began

    def kill(self) -> None:
        """Ends at once what is left."""
        for one in self.processes.values():
            if one.poll() is None:
                one.kill()

    def log(self, name: str) -> str:
        """Gives the end of what a container said."""
        return (self.folder / f"{name}.log").read_text(errors="replace")[-1500:]

    def _run(self, name: str) -> subprocess.Popen[bytes]:
        """Starts a container's command, with its paths in this pod's folder and its ports ours."""
        places = {"0.0.0.0": "127.0.0.1", "8080": str(self.http_port), "$(STORE)": self.store}
        words = [self._placed(places.get(word, word)) for word in self.manifest.commands[name]]
        if name == "serve":
            words += ["--port", str(self.port), "--metrics-port", "0"]
        return start(words, self.folder / f"{name}.log", PEREGRINE_CATALOGUE=self._placed("/catalogue"))

    def _placed(self, word: str) -> str:
        is_volume = word.startswith(("/releases", "/catalogue", "/state"))
        return f"{self.folder}{word}" if is_volume else word


def start(words: list[Any], log: Path, **variables: str) -> subprocess.Popen[bytes]:
    """Starts `peregrine WORDS…`, which writes to `log`."""
    usual = {"PEREGRINE_AS_ROOT": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with log.open("ab") as file:
        return subprocess.Popen(
            [sys.executable, str(ROOT / "peregrine.py"), *map(str, words)],
            stdout=file,
            stderr=file,
            env={**os.environ, **usual, **variables},
        )
