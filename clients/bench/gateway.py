"""Runs the gateway of docker/nginx on loopback, with its own certificates, before servers on this machine."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from clients.tls import Tls
from ensemble.errors import ServerError

FOLDER = Path(__file__).resolve().parents[2] / "docker" / "nginx"
_START_S, _STOP_S = 10.0, 35.0
_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")


def missing() -> str:
    """Says what this machine lacks; empty if nothing."""
    lacks = [tool for tool in ("nginx", "openssl") if not shutil.which(tool)]
    return f"{' and '.join(lacks)} not installed; cure: apt-get install nginx-light openssl" if lacks else ""


class Authority:
    """Signs certificates of the gateway and of clients, in a folder of its own."""

    def __init__(self, folder: Path, name: str = "test authority") -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._run("req", "-x509", *_KEY, "-subj", f"/CN={name}", "-keyout", "ca.key", "-out", "ca.crt")

    def issue(self, name: str) -> Tls:
        """Signs a certificate of this common name, good for 127.0.0.1; gives what a client needs."""
        self._run("req", *_KEY, "-subj", f"/O=shop/CN={name}", "-keyout", f"{name}.key", "-out", "asked")
        (self.folder / "names").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1\n")
        signs = ("-CA", "ca.crt", "-CAkey", "ca.key", "-CAcreateserial", "-extfile", "names")
        self._run("x509", "-req", "-in", "asked", *signs, "-days", "2", "-out", f"{name}.crt")
        return Tls(self.folder / "ca.crt", self.folder / f"{name}.crt", self.folder / f"{name}.key")

    def _run(self, *words: str) -> None:
        done = subprocess.run(["openssl", *words], cwd=self.folder, capture_output=True, check=False)
        if done.returncode:
            raise ServerError(f"openssl {words[0]}: {done.stderr.decode(errors='replace').strip()[-300:]}")


class Gateway:
    """Runs replicas.sh and nginx from a copy of docker/nginx, which differs in its addresses and in /tmp."""

    def __init__(self, folder: Path, authority: Authority, port: int, http_port: int) -> None:
        self.folder, self.url, self.http_port = folder, f"127.0.0.1:{port}", http_port
        (folder / "tls").mkdir(parents=True)
        authority.issue("tls")
        for name in ("tls.crt", "tls.key", "ca.crt"):
            shutil.copy(authority.folder / name, folder / "tls")
        for path in FOLDER.iterdir():
            if path.suffix in (".conf", ".sh"):
                shutil.copy(path, folder)
        text = (folder / "nginx.conf").read_text().replace("/tmp/", f"{folder}/")
        text = text.replace("listen 8443 ", f"listen {self.url} ").replace(
            "listen 8081;", f"listen 127.0.0.1:{http_port};"
        )
        # As in a container: nobody else's user, who could not write to a folder of ours
        text = ("user root;\n" if os.geteuid() == 0 else "") + text
        (folder / "nginx.conf").write_text(text.replace("/dev/stdout", f"{folder}/access.log"))
        self.log = folder / "gateway.log"
        self._process: subprocess.Popen[bytes] | None = None
        self.name_replicas([])

    def name_replicas(self, urls: Sequence[str]) -> None:
        """Says which servers are ready; nginx asks them within about a second."""
        new = self.folder / "ready.new"
        new.write_text("".join(f"{url}\n" for url in urls))
        new.replace(self.folder / "ready")

    def start(self) -> None:
        """Returns when nginx listens; ServerError with what it said otherwise."""
        command = ["sh", "replicas.sh", "nginx", "-c", f"{self.folder}/nginx.conf"]
        environment = {
            "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "LOOKUP": f"cat '{self.folder}/ready'",
            "REPLICAS_FILE": f"{self.folder}/replicas.conf",
        }
        with self.log.open("ab") as log:
            process = subprocess.Popen(command, cwd=self.folder, env=environment, stdout=log, stderr=log)
        self._process = process
        host, _, port = self.url.partition(":")
        until = time.monotonic() + _START_S
        while time.monotonic() < until and process.poll() is None:
            try:
                socket.create_connection((host, int(port)), 1.0).close()
            except OSError:
                time.sleep(0.02)
                continue
            return
        raise ServerError(f"nginx did not start: {self.log.read_text()[-500:]}")

    def reload(self) -> None:
        """Lets nginx read its files again, as `nginx -s reload` does."""
        subprocess.run(["nginx", "-c", f"{self.folder}/nginx.conf", "-s", "reload"], check=True)

    def stop(self) -> None:
        """Ends nginx once what is in flight has been answered."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
