"""Gives every instance its view of the items: the release's rows, with its overlay's over them."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable

from ensemble.errors import PeregrineError
from ensemble.live.catalogue import last_sequence
from ensemble.live.generations import read_current
from ensemble.live.instances import InstanceFile
from ensemble.live.segment import SearchedIndex, Segment
from ensemble.live.state import LiveState, LiveView
from ensemble.release.release import Release

_POLL_S = 0.05
_AT_ONCE = 2048  # records applied by a request; a longer backlog is the thread's
# Records applied at once by the thread: it must not hold the interpreter from requests for longer than a copy
# of these takes
_PIECE = 512
# How long a request waits for the interpreter while the thread has it; Python's 5 ms, at each engine's
# return, are too much
_SWITCH_S = 0.0005


class LiveItems:
    """Follows the log: `refresh` does at the start of a request, and a thread while there is none."""

    def __init__(self, release: Release) -> None:
        self.release, self.folder = release, release.live_folder
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._thread: threading.Thread | None = None
        self._main: SearchedIndex | None = None
        self._open_index: Callable[[Segment], SearchedIndex] | None = None
        self._instance: InstanceFile | None = None
        self._current = str(self.folder / "current")
        self._seen: tuple[int, int] | None = None  # the file `current` as it was: inode, time
        self.fault = ""  # why the log cannot be followed any further; what is served stays as it was
        self._is_open = False
        self.view = self._opened()
        self.fault = self._what_is_missing()

    def attach(self, main: SearchedIndex, open_index: Callable[[Segment], SearchedIndex]) -> None:
        """Makes every state, this one and those to come, carry the main index and those of its segments."""
        with self._lock:
            self._main, self._open_index = main, open_index
            self._carry_indexes(self.view.state)

    def _carry_indexes(self, state: LiveState) -> None:
        """Opens the indexes of segments that have none yet, where somebody searches here."""
        state.main = self._main
        open_index = self._open_index
        for segment in state.segments:
            if segment.index is None and open_index is not None:
                segment.index = open_index(segment)

    def refresh(self, limit: int = _AT_ONCE) -> LiveView:
        """Gives the newest view. Nothing new costs two system calls.

        While another thread is at it, the last view is the answer.
        """
        if not self._lock.acquire(blocking=False):
            return self.view
        try:
            self._catch_up(limit)
        except PeregrineError as error:
            self.fault = str(error)
        finally:
            self._lock.release()
        return self.view

    def follow(self) -> None:
        """Starts the thread that keeps the view fresh, opens generations, and publishes how far we are."""
        if self._thread is None:
            sys.setswitchinterval(_SWITCH_S)
            self._instance = InstanceFile(self.folder)
            self._thread = threading.Thread(target=self._follow, name="live-items", daemon=True)
            self._thread.start()

    def metrics(self) -> dict[str, float]:
        """Says how far this instance is, and whether it can go on."""
        view = self.view
        facts = {
            "live_sequence": view.sequence,
            "live_generation": view.state.generation,
            "live_delta_items": view.num_slots - view.state.tail_start,
            "live_segments": len(view.state.segments),
        }
        return {**facts, "live_fault": bool(self.fault)}

    def close(self) -> None:
        """Ends the thread."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._instance is not None:
            self._instance.close()

    def _follow(self) -> None:
        """Is the thread: looks for news every _POLL_S."""
        while not self._stop.wait(_POLL_S):
            try:
                self._swap_if_new()
                self.refresh()
                if self._instance is not None:
                    self._instance.publish(self.view.sequence)
            except OSError as error:  # a disk that fails for a while must not end the thread for good
                self.fault = str(error)

    def _swap_if_new(self) -> None:
        """Opens a new generation beside the served one, then turns to it: one assignment."""
        if self._mark() != self._seen:
            try:
                view = self._opened()
                with self._lock:
                    self.view, self.fault = _caught_up(view), ""
            except PeregrineError as error:
                self.fault = str(error)

    def _catch_up(self, limit: int) -> None:
        """Applies at most `limit` new records."""
        if self._thread is None and self._mark() != self._seen:
            self.view, self.fault = self._opened(), ""
        state = self.view.state
        if state.reader is None or not state.reader.has_more():
            return
        records = state.reader.read(limit)
        if len(records):
            state.apply(records)
            self.view = state.view()
            if self._instance is not None:
                self._instance.publish(self.view.sequence)

    def _opened(self) -> LiveView:
        """Opens a new state, all of its log read; segments that are open already are not opened again."""
        self._seen = self._mark()
        current = read_current(self.folder) if self._seen else None
        before = self.view.state.segments if self._is_open else []
        opened = {segment.name: segment for segment in before if segment.is_there}
        view = _caught_up(LiveState(self.release, self.folder, current, opened).view())
        self._carry_indexes(view.state)
        self._is_open = True
        return view

    def _what_is_missing(self) -> str:
        """Says what the catalogue's log has and no overlay here; empty where all is well."""
        if self._seen is not None or last_sequence(self.release.home) <= self.release.watermark.sequence:
            return ""
        return (
            f"release {self.release.name} is served without the changes of items that are in "
            f"{self.release.home}; start the writer, `peregrine serve` or `peregrine items serve`"
        )

    def _mark(self) -> tuple[int, int] | None:
        """Gives what tells the file `current` from another one: inode and time; None where there is none."""
        try:
            current = os.stat(self._current)
        except FileNotFoundError:
            return None
        return current.st_ino, current.st_mtime_ns


def wait_for_changes(release: Release, wait_s: float) -> str:
    """Waits until a release's overlay has every change that the catalogue's log has by now; says what is
    missing when the time is over, and nothing if nothing is."""
    wanted, deadline = last_sequence(release.home), time.monotonic() + wait_s
    if wanted <= release.watermark.sequence:
        return ""
    live = LiveItems(release)
    while (view := live.refresh(1 << 30)).sequence < wanted:
        if time.monotonic() >= deadline:
            has = f"release {release.name} has the changes of items up to {view.sequence} of {wanted} only"
            return live.fault or f"{has}; start the writer, `peregrine serve` or `peregrine items serve`"
        time.sleep(_POLL_S)
    return ""


def _caught_up(view: LiveView) -> LiveView:
    """Gives the view with all that the log holds by now."""
    state = view.state
    while state.reader is not None and len(records := state.reader.read(_PIECE)):
        state.apply(records)
    return state.view() if state.reader is not None else view
