"""Starts a redis-server that can be harmed and repaired, and a proxy that spoils what it says.

STRAIGHT and PROXIED have the faults of clients.bench.faults by name.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import shutil
import signal
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from ensemble.errors import ServerError
from ensemble.release.release import Release
from ensemble.tiers.connection import connect_now
from ensemble.tiers.load import load_release
from ensemble.tiers.records import TABLES, prefix, shop_key


class Proxy:
    """Carries TCP between the steps and Redis, in a thread; holds each command back for `delay_s`, and, with
    `cut`, ends each reply in its middle."""

    def __init__(self, target: int) -> None:
        self.delay_s, self.cut, self._target = 0.0, False, target
        loop = asyncio.new_event_loop()
        server = loop.run_until_complete(asyncio.start_server(self._serve, "127.0.0.1", 0))
        self.port = int(server.sockets[0].getsockname()[1])
        threading.Thread(target=loop.run_forever, daemon=True).start()

    async def _serve(self, near: asyncio.StreamReader, to_near: asyncio.StreamWriter) -> None:
        """Carries one connection both ways until either end closes it."""
        far, to_far = await asyncio.open_connection("127.0.0.1", self._target)
        ways = [
            asyncio.ensure_future(self._pump(*way)) for way in ((near, to_far, False), (far, to_near, True))
        ]
        await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        for way, sink in zip(ways, (to_far, to_near), strict=True):
            way.cancel()
            sink.transport.abort()

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, is_reply: bool) -> None:
        """Carries bytes one way, and spoils them as it is told."""
        with contextlib.suppress(OSError):
            while data := await source.read(1 << 20):
                await asyncio.sleep(0.0 if is_reply else self.delay_s)
                sink.write(data[: len(data) // 2] if is_reply and self.cut else data)
                if is_reply and self.cut:
                    linger = struct.pack("ii", 1, 0)  # makes the close a reset, not an end
                    sink.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                    return


class FaultyRedis:
    """Runs a redis-server on a free port with a release's rows. `client` is a user of its own, let in
    whatever becomes of the steps' user."""

    def __init__(self, release: Release, folder: Path, pause_s: float) -> None:
        if not shutil.which("redis-server"):
            raise ServerError("redis-server is not installed", "install it")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        options = (
            f"--port {self.port} --bind 127.0.0.1 --maxmemory 256mb --maxmemory-policy allkeys-lru "
            "--replica-serve-stale-data no --user bench on nopass ~* &* +@all"
        )
        self._command = ["redis-server", *options.split(), "--dir", str(folder), "--save", ""]
        self._url = f"redis://bench:any@127.0.0.1:{self.port}"
        self.release, self.proxy, self._pause_s = release, Proxy(self.port), pause_s

    def start(self) -> None:
        """Starts the server, empty, and connects to it."""
        self.process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL)
        for _ in range(20):  # each tries for 0.3 s
            with contextlib.suppress(ServerError):
                self.client = connect_now(self._url)
                return
        raise ServerError("redis-server did not start")

    def load(self, *commands: str) -> None:
        """Gives the commands, then loads the release's rows."""
        self.tell(*commands)
        load_release(self.release, self._url)

    def kill(self) -> None:
        """Kills the server as kill -9 does."""
        self.process.kill()
        self.process.wait()

    def come_back(self) -> None:
        """Starts the server again, and loads the rows some seconds later."""
        self.start()
        time.sleep(self._pause_s)
        self.load()

    def tell(self, *commands: str) -> None:
        """Gives commands to the server."""
        for command in commands:
            self.client.execute_command(*command.split())

    def spoil_replies(self, delay_s: float = 0.0, cut: bool = False) -> None:
        """Lets the proxy delay commands and cut replies; without arguments it is honest again."""
        self.proxy.delay_s, self.proxy.cut = delay_s, cut

    def prefix(self, table: str) -> bytes:
        """Gives the beginning of the keys of a table's loaded rows."""
        return prefix(self.client.hget(shop_key(self.release.schema.shop), self.release.name), table)

    def spoil_keys(self) -> None:
        """Puts into every tenth key, by turns: too few bytes, noise, another's row, a list."""
        patterns = [self.prefix(table) + b"*" for table in TABLES]
        keys = [key for one in patterns for key in sorted(self.client.scan_iter(match=one, count=1000))][::10]
        values, pipe = self.client.mget(keys), self.client.pipeline(transaction=False)
        for n, (key, value) in enumerate(zip(keys, values, strict=True)):
            pipe.delete(key)
            if n % 4 == 3:
                pipe.rpush(key, 1)
            else:
                pipe.set(key, (b"abc", random.Random(n).randbytes(len(value)), values[n - 1])[n % 4])
        pipe.execute()


# By name: what does the harm, and what repairs it.
Faults = dict[str, tuple[Callable[[FaultyRedis], object], Callable[[FaultyRedis], object]]]
STRAIGHT: Faults = {
    "frozen": (
        lambda redis: redis.process.send_signal(signal.SIGSTOP),
        lambda redis: redis.process.send_signal(signal.SIGCONT),
    ),
    "killed": (FaultyRedis.kill, FaultyRedis.come_back),
    "full": (
        lambda redis: redis.tell("CONFIG SET maxmemory 1mb"),
        lambda redis: redis.load("CONFIG SET maxmemory 256mb"),
    ),
    "garbage": (FaultyRedis.spoil_keys, FaultyRedis.load),
    "noauth": (
        lambda redis: redis.tell("ACL SETUSER default off", "CLIENT KILL USER default"),
        lambda redis: redis.tell("ACL SETUSER default on"),
    ),
    "masterdown": (
        lambda redis: redis.tell("REPLICAOF 127.0.0.1 1"),
        lambda redis: redis.tell("REPLICAOF NO ONE"),
    ),
}
PROXIED: Faults = {
    f"slow_{ms}": (partial(FaultyRedis.spoil_replies, delay_s=ms / 1000), FaultyRedis.spoil_replies)
    for ms in (15, 50, 500)
}
PROXIED |= {"resets": (partial(FaultyRedis.spoil_replies, cut=True), FaultyRedis.spoil_replies)}
