"""The items' writer of tests/together/test_any_order.py, which is killed at any moment."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

from any_order_answers import WAIT_S, until

from clients.errors import Unavailable
from clients.items import ItemClient

# Its merges do not wait for idle time: on a busy machine they would outlast the test.
_PROGRAM = """
import sys
from ensemble.live import merge_process, service
merge_process.IDLE_ONLY_S = 0.0
service.main(sys.argv[1:])
"""


class WriterProcess:
    """Is `peregrine items serve` of one repository."""

    def __init__(self, repository: Path) -> None:
        self.repository = repository
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Returns when it answers."""
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", _PROGRAM, str(self.repository)]
        self._process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE)
        until(self._answers)

    def kill(self) -> None:
        """Kills it -9, if it runs."""
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.communicate()

    def _answers(self) -> bool:
        with contextlib.suppress(Unavailable), ItemClient(self.repository, wait_s=WAIT_S) as items:
            return bool(items.status())
        return False
