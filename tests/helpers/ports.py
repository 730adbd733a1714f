"""Ports for servers that tests start."""

from __future__ import annotations

import itertools
import os
import socket

# Below those that the kernel hands out by itself (from 32768): a server that is killed and started again
# finds its port free. Each test process counts from a place of its own, so that two do not try the same one
# at the same time.
_LEAST, _COUNT = 10_000, 20_000
_next = itertools.count(os.getpid() * 97)


def free_port() -> int:
    """Gives a port of 127.0.0.1 that nobody listens on."""
    for number in itertools.islice(_next, _COUNT):
        port = _LEAST + number % _COUNT
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise AssertionError(f"no port from {_LEAST} to {_LEAST + _COUNT} is free")
