"""Waits in the main thread so that a signal is heard.

Python runs a signal's handler in the main thread, between two instructions. The kernel may give the signal to
another thread, or just before the wait begins: neither wakes a main thread that waits without an end.
"""

from __future__ import annotations

import threading

LOOKS_UP_S = 0.5


def wait_for(event: threading.Event) -> None:
    """Returns when the event is set; handlers of signals run within LOOKS_UP_S."""
    while not event.wait(LOOKS_UP_S):
        pass
