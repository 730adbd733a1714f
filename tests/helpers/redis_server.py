"""A real redis-server of a test's own, which it may stop, kill and start again; and a proxy that spoils what
it says."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

from ports import free_port


class RedisServer:
    """redis-server on a free port, without persistence."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.folder, self.options, self.port = folder, options, free_port()
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    def client(self, **options: Any) -> Any:
        import redis

        return redis.Redis(port=self.port, **options)

    def start(self) -> None:
        command = [
            "redis-server",
            "--port",
            str(self.port),
            "--bind",
            "127.0.0.1",
            "--save",
            "",
            "--appendonly",
            "no",
            "--dir",
            str(self.folder),
        ]
        self._process = subprocess.Popen(
            [*command, *self.options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1) as probe:
                probe.sendall(b"PING\r\n")
                if probe.recv(7):
                    return
            time.sleep(0.02)
        raise AssertionError("redis-server did not start")

    def signal(self, number: int) -> None:
        assert self._process is not None
        os.kill(self._process.pid, number)

    def kill(self) -> None:
        """kill -9."""
        assert self._process is not None
        self.signal(signal.SIGKILL)
        self._process.wait()

    def stop(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self.signal(signal.SIGCONT)
            self.kill()


class Proxy:
    """TCP between a client and Redis. delay_s holds every reply back; drip sends it in crumbs; slip answers
    each MGET with the reply of the one before it on that connection, as if a reply had been left unread;
    reset_after cuts a reply off."""

    def __init__(self, port: int) -> None:
        self._target = port
        self.delay_s, self.drip, self.slip, self.reset_after = 0.0, False, False, 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._open: set[socket.socket] = set()
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    def close(self) -> None:
        self._listener.close()
        for one in list(self._open):
            one.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near = self._listener.accept()[0]
                far = socket.create_connection(("127.0.0.1", self._target))
                self._open |= {near, far}
                for args in ((near, far, False), (far, near, True)):
                    threading.Thread(target=self._pump, args=args, daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, is_reply: bool) -> None:
        held: list[bytes] = []
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 20):
                if is_reply and not self._reply(data, sink, held):
                    break
                if not is_reply:
                    sink.sendall(data)
        for one in (source, sink):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def _reply(self, data: bytes, sink: socket.socket, held: list[bytes]) -> bool:
        time.sleep(self.delay_s)
        if self.slip and data.startswith(b"*"):
            held.append(data)
            data = held.pop(0) if len(held) > 1 else data
        if self.reset_after:
            sink.sendall(data[: self.reset_after])
            return False
        for crumb in [data[at : at + 64] for at in range(0, len(data), 64)] if self.drip else [data]:
            sink.sendall(crumb)
            if self.drip:
                time.sleep(0.01)
        return True
