"""Measures what traces cost: a server without, one with, and requests that are traced or not, by turns.

    python -m clients.bench.traces --repository model_repository [--fused] [--rounds 300] [--json F]

Requests come one at a time and by turns, so that whatever else the machine does meets all alike.
"""

from __future__ import annotations

import argparse
import contextlib
import http.server
import secrets
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from clients.bench.machine import machine
from clients.bench.starred.load import some_users
from clients.transport import GrpcTransport
from clients.wire import Call
from ensemble.errors import InvalidInput, PeregrineError
from ensemble.json_text import json_text
from ensemble.release.release import open_release
from ensemble.release.repository import require_active, require_folder
from ensemble.server.options import ServeOptions
from ensemble.server.supervisor import serve

WAYS = ("off", "on, not traced", "on, traced")


@contextlib.contextmanager
def swallowing() -> Iterator[str]:
    """Gives the URL of a collector that reads what comes and forgets it."""

    class Handler(http.server.BaseHTTPRequestHandler):
        """Answers 200."""

        def do_POST(self) -> None:
            """Reads and forgets."""
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *words: object) -> None:
            """Says nothing."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1/traces"
    finally:
        server.shutdown()
        server.server_close()


def measure(repository: Path, rounds: int, *, fused: bool) -> dict[str, list[float]]:
    """Gives the milliseconds of lone requests, by way."""
    with contextlib.ExitStack() as stack:
        url = stack.enter_context(swallowing())
        transports = []
        for traces in (None, url):
            state = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            options = ServeOptions(0, None, fused=fused, traces=traces, state=state / "state")
            server = stack.enter_context(serve(repository, options))
            transports.append(GrpcTransport(server.url))
            stack.callback(transports[-1].close)
        taken: dict[str, list[float]] = {way: [] for way in WAYS}
        users = some_users(open_release(repository, require_active(repository)))
        for number in range(rounds + 20):
            call = Call((users[number % len(users)].encode(),), {"top_k": 10})
            parent = f"00-{secrets.token_hex(16)}-{secrets.token_hex(8)}-01"
            asked = (call, call, replace(call, traceparent=parent))
            for way, transport, one in zip(WAYS, (transports[0], *[transports[1]] * 2), asked, strict=True):
                started = time.perf_counter()
                transport.send(one)
                if number >= 20:  # the first ones warm
                    taken[way].append((time.perf_counter() - started) * 1e3)
        return taken


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the quantiles of each way; exit code 2 if they cannot be measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--repository", type=Path, default=Path("model_repository"))
    parser.add_argument("--fused", action="store_true", help="all steps in one process")
    parser.add_argument("--rounds", type=int, default=300, help="requests of each way")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers")
    given = parser.parse_args(arguments)
    try:
        if given.rounds < 1:
            raise InvalidInput(f"--rounds: must be at least 1, got {given.rounds}")
        require_folder(given.repository)
        taken = measure(given.repository, given.rounds, fused=given.fused)
        if given.json:
            given.json.write_text(json_text({**machine(), "fused": given.fused, "ms": taken}) + "\n", "utf-8")
    except (PeregrineError, OSError) as error:
        parser.exit(2, f"error: {error}\n")
    print(f"{'traces':16} {'p50 ms':>8} {'p90 ms':>8} {'p99 ms':>8}")
    for way, values in taken.items():
        print(f"{way:16} " + " ".join(f"{np.percentile(values, q):8.2f}" for q in (50, 90, 99)))


if __name__ == "__main__":
    main()
