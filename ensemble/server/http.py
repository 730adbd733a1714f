"""Answers /livez, /readyz and /metrics over HTTP beside a server, for whoever runs a fleet of them.

/readyz    200 if a list came within a second; 503 while it starts, drains, or gives none
/livez     200 while it starts, or if a list came within the last minute; 503 asks for a restart
/metrics   Triton's numbers and our own, together
"""

from __future__ import annotations

import contextlib
import threading
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

from ensemble.errors import PeregrineError, ServerError
from ensemble.server.list_probe import Probe
from ensemble.server.measures import Measures, Reported

SILENT_S = 60.0  # without a list for so long, it is not alive
_FETCH_S = 3.0
_TEXT = "text/plain; charset=utf-8"


class Probed(Reported, Protocol):
    """Is what the port has to know of a server (supervisor.Server)."""

    @property
    def metrics_url(self) -> str | None:
        """Gives the URL of Triton's metrics."""
        ...

    @property
    def url(self) -> str:
        """Gives host:port of gRPC."""
        ...


class Health:
    """Says whether a server is ready and alive, and what it measures."""

    def __init__(self, server: Probed, probe: Probe | None = None, silent_s: float = SILENT_S) -> None:
        self.server, self.probe, self._silent_s = server, probe or Probe(server.url), silent_s
        self.measures = Measures(server, self.probe)

    def ready(self) -> str:
        """Says why no caller should be sent here; empty if one may."""
        if state := self.server.state():
            return state
        return self.probe.ask().problem

    def alive(self) -> str:
        """Says why it has to be started again from outside; empty if not.

        What dies inside, `serve` starts again by itself; when it gives up it ends. So this is for one that
        hangs: it was ready once, and gives no list any more.
        """
        if self.server.state():
            # While it starts or drains nobody expects a list; each has a limit of its own.
            self.probe.last_good_s = time.monotonic()
            return ""
        problem = self.probe.ask().problem
        silent_s = time.monotonic() - self.probe.last_good_s
        return f"{problem}, and none for {silent_s:.0f} s" if problem and silent_s > self._silent_s else ""

    def metrics(self) -> bytes:
        """Gives Triton's metrics and ours, in Prometheus' text format."""
        if not self.server.state():
            self.probe.ask()
        theirs = self._of_triton()
        return (theirs or b"") + self.measures.text(triton_answers=theirs is not None)

    def _of_triton(self) -> bytes | None:
        """Reads Triton's metrics; None where it gives none."""
        if self.server.metrics_url is None:
            return None
        try:
            with urllib.request.urlopen(self.server.metrics_url, timeout=_FETCH_S) as answer:
                text: bytes = answer.read()
        except OSError:
            return None
        return text if text.endswith(b"\n") else text + b"\n"


def application(health: Health) -> Callable[..., Iterable[bytes]]:
    """Makes the WSGI application."""

    def answer(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        """Answers one request."""
        if environ["REQUEST_METHOD"] not in ("GET", "HEAD"):
            return _reply(start_response, "405 Method Not Allowed", b"GET only\n")
        path = environ.get("PATH_INFO", "")
        if path == "/metrics":
            return _reply(start_response, "200 OK", health.metrics(), "text/plain; version=0.0.4")
        if path in ("/readyz", "/livez"):
            problem = health.ready() if path == "/readyz" else health.alive()
            status = "503 Service Unavailable" if problem else "200 OK"
            return _reply(start_response, status, f"{problem or 'ok'}\n".encode())
        return _reply(start_response, "404 Not Found", b"there are /livez, /readyz and /metrics\n")

    return answer


def _reply(start: Callable[..., Any], status: str, body: bytes, kind: str = _TEXT) -> Iterable[bytes]:
    """Begins an answer and gives its body."""
    headers = [("Content-Type", kind), ("Content-Length", str(len(body))), ("Cache-Control", "no-store")]
    start(status, headers)
    return [body]


@contextlib.contextmanager
def answering(server: Probed, address: str, port: int | None) -> Iterator[str | None]:
    """Answers on a port while the block runs, and gives its URL; does nothing where `port` is None.

    ServerError if the port cannot be had.
    """
    if port is None:
        yield None
        return
    try:
        from waitress.server import create_server
    except ModuleNotFoundError:
        raise ServerError(
            "--http-port needs waitress and prometheus-client, which are not installed",
            "pip install 'peregrine-recommender[serve]'",
        ) from None
    health = Health(server)
    try:
        # Threads for probes that wait for an answer; a handful of connections is all that ever comes.
        http = create_server(
            application(health), host=address, port=port, threads=4, connection_limit=64, ident=None
        )
    except OSError as error:
        raise ServerError(
            f"port {port} on {address} cannot be used: {error.strerror}", "choose another with --http-port"
        ) from error
    thread = threading.Thread(target=_run, args=(http,), name="http", daemon=True)
    thread.start()
    try:
        host = f"[{address}]" if ":" in address else address
        yield f"http://{host}:{http.effective_port}"
    finally:
        http.close()
        thread.join(_FETCH_S)
        health.probe.close()


def _run(http: Any) -> None:
    """Is the thread of the port; a socket closed beneath it is its end."""
    with contextlib.suppress(OSError, PeregrineError):
        http.run()
