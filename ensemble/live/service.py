"""Runs the writer as a process: one a home, behind a unix socket, beside tritonserver in `peregrine
serve`.

    python -m ensemble.live.service REPOSITORY [HOME]

A request is one line of JSON, and so is its reply: {"op": "change", "changes": [{"op": "add", "item": {…}}],
"wait_s": 2} | {"op": "status"} | {"op": "merge"} | {"op": "prepare", "release": "r7"} |
{"op": "compact"} | {"op": "adopt", "path": "…/log"}.
Changes that arrive while a group is being written form the next group: one fsync for all.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ensemble.errors import InvalidInput, PeregrineError, ReleaseError
from ensemble.live import MAX_REQUEST_BYTES
from ensemble.live.instances import wait_for_instances
from ensemble.live.keeper import AT_WORK
from ensemble.live.loaded import LoadedReleases
from ensemble.live.merge_process import MergeProcess
from ensemble.live.overlay import Overlay
from ensemble.live.requests import OPS, Pending, groups
from ensemble.live.writer import ItemWriter
from ensemble.progress import say
from ensemble.release.files import try_flock, write_durably
from ensemble.release.release import active_release, open_release
from ensemble.waiting import LOOKS_UP_S, wait_for

WRITER_FILE = "writer.json"  # in <home>/.live: where the socket is
MERGE_AT = 10_000  # changes beside the main index; each is searched exactly by every query
MOST_WAITING, _RETRY_S = 10, 1.0  # times MERGE_AT, and no more are taken; when to try again
_NAMED = 20  # values of a feature that a reply names
_HOME = "peregrine-items-"  # in the system's folder for temporary files: where a writer's socket is
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 2.0, 300.0  # after merges that failed, twice as long each time
_MAX_WAIT_S = 60.0


class AtWork(ReleaseError):
    """Says that another process writes already."""


class Full(PeregrineError):
    """Says that no more changes are taken until those that wait are merged."""


class ItemService:
    """Owns the writer; all changes go through one thread."""

    def __init__(
        self,
        repository: Path,
        log: Callable[[str], None],
        merge_at: int = MERGE_AT,
        home: Path | None = None,
    ) -> None:
        self.repository, self.log, self.merge_at = repository, log, merge_at
        self.home = home or repository
        self.most_waiting = MOST_WAITING * max(1, merge_at)
        self.folder = self.home / ".live"
        self.folder.mkdir(exist_ok=True)
        self._lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        if not try_flock(self._lock):
            os.close(self._lock)
            raise AtWork(f"another process writes the live items of {self.home}", "use it, or stop it")
        self._pending: queue.Queue[Pending | None] = queue.Queue()
        self._writer: ItemWriter | None = None
        self._opened_at = 0.0
        self._ready = threading.Event()
        self._loaded = LoadedReleases(repository, self.home)
        self._merging: MergeProcess | None = None
        self._merge_pause_s, self._no_merge_before_s, self._merge_fault = 0.0, 0.0, ""  # after failures
        _remove_socket_of_the_killed(self.folder / WRITER_FILE)
        # 0700; a repository's path may be too long for a socket
        self._home = tempfile.TemporaryDirectory(prefix=_HOME)
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(str(Path(self._home.name) / "s"))
        self._socket.listen(64)
        self._thread = threading.Thread(target=self._write, name="items-writer", daemon=True)

    def run(self) -> None:
        """Answers requests until stop()."""
        self._thread.start()
        wait_for(self._ready)  # who finds the file finds the overlay as far as the log
        write_durably(
            self.folder / WRITER_FILE, json.dumps({"pid": os.getpid(), "socket": self._socket.getsockname()})
        )
        with contextlib.suppress(OSError):  # the socket is closed by stop()
            self._socket.settimeout(LOOKS_UP_S)
            while True:
                with contextlib.suppress(TimeoutError):
                    connection = self._socket.accept()[0]
                    threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def stop(self) -> None:
        """Finishes the group that is being written; a merge is begun again by the next writer."""
        (self.folder / WRITER_FILE).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._pending.put(None)
        if self._thread.is_alive():
            self._thread.join()
        self._drop_merge()
        if self._writer is not None:
            self._writer.close()
        self._home.cleanup()
        os.close(self._lock)

    # --- one thread a connection

    def _serve(self, connection: socket.socket) -> None:
        """Answers the requests of one connection, in a thread of its own."""
        with connection, connection.makefile("rwb") as stream, contextlib.suppress(OSError):
            while line := stream.readline(MAX_REQUEST_BYTES):
                stream.write(json.dumps(self._reply(line)).encode() + b"\n")
                stream.flush()

    def _reply(self, line: bytes) -> dict[str, Any]:
        """Answers one request: checks it, sends it through the writing thread, waits for the instances."""
        try:
            request = json.loads(line)
            if not isinstance(request, dict) or request.get("op") not in OPS:
                raise ValueError(f'"op" must be one of {", ".join(OPS)}')
            if request["op"] == "change" and not isinstance(request.get("changes"), list):
                raise ValueError('"changes" must be an array')
            wait_s = min(float(request.get("wait_s", 0)), _MAX_WAIT_S)
        except (ValueError, TypeError) as error:
            return {"error": f"request: {error}"}
        pending = Pending(request)
        self._pending.put(pending)
        pending.done.wait()
        if "error" in pending.reply:
            return pending.reply
        return {
            **pending.reply,
            **wait_for_instances(self._opened_at, pending.folders, pending.reply["sequence"], wait_s),
        }

    # --- the writing thread

    def _write(self) -> None:
        """Is the writing thread: makes requests into groups and answers them."""
        try:
            self._opened()  # so that instances have a folder to say in how far they are
        except Exception as error:  # whoever asks next is told; the thread goes on
            self.log(f"items: {error}")
        self._ready.set()
        while True:
            with contextlib.suppress(queue.Empty):
                first = self._pending.get(timeout=0.2)
                if first is None:
                    return
                for group in groups(first, self._pending):
                    self._answer(group)
            self._care()

    def _answer(self, group: list[Pending]) -> None:
        """Writes one group as one append.

        When that fails, each request is written on its own, so that one's mistake is not the others'.
        """
        try:
            changes = [change for pending in group for change in pending.request.get("changes", [])]
            writer = self._opened()
            if changes:
                self._refuse_when_full(writer)
            writer.apply(changes)
            for pending in group:
                self._do(writer, pending.request)
            facts = self._facts(writer)
            replies = [{**facts, **_unknown_values(writer, pending.request)} for pending in group]
        except PeregrineError as error:
            if len(group) > 1:
                for pending in group:
                    self._answer([pending])
                return
            replies = [{"error": str(error), "invalid": isinstance(error, InvalidInput)}]
            if isinstance(error, Full):
                replies[0]["retry_s"] = _RETRY_S
        except Exception as error:  # a fault of ours must not leave callers waiting
            self.log(f"items: {error!r}")
            replies = [{"error": f"the writer failed: {error!r}", "invalid": False}] * len(group)
        for pending, reply in zip(group, replies, strict=True):
            if self._writer is not None:
                pending.folders = [overlay.folder for overlay in self._writer.overlays.values()]
            pending.reply = reply
            pending.done.set()

    def _refuse_when_full(self, writer: ItemWriter) -> None:
        """Raises Full while too many changes wait to be merged: each query searches them one by one."""
        waiting = max(_unmerged(overlay) for overlay in writer.overlays.values())
        if waiting >= self.most_waiting:
            why = f" (the last merge failed: {self._merge_fault})" if self._merge_fault else ""
            raise Full(
                f"{waiting:,} changes wait to be merged into the index, and no more are taken before{why}",
                "send these again in a few seconds",
            )

    def _do(self, writer: ItemWriter, request: dict[str, Any]) -> None:
        """Does what a request wants beside changes."""
        if request["op"] == "merge":
            self._start_merge(writer.overlay)
        elif request["op"] == "prepare":
            release = open_release(self.repository, str(request.get("release")), self.home)
            writer.follow(release).catch_up()
            self._loaded.expect(release)
        elif request["op"] == "compact":
            dropped = writer.catalogue.compact()
            self.log(f"items: {dropped} lines were dropped from {writer.catalogue.path}")
        elif request["op"] == "adopt":
            self._drop_merge()
            writer.adopt(Path(str(request.get("path"))))

    def _facts(self, writer: ItemWriter) -> dict[str, Any]:
        """Says how things are."""
        view = writer.live.view
        return {
            "release": writer.release.name,
            "sequence": writer.sequence,
            "generation": view.state.generation,
            "items": view.num_rows - 1 - view.num_deleted,
            "unmerged": _unmerged(writer.overlay),
            "merging": self._merging is not None,
            "log_lines": writer.catalogue.num_lines,
            "log_items": writer.catalogue.num_items,
            "log_bytes": writer.catalogue.num_bytes,
            "releases": {one.release.name: one.sequence for one in writer.overlays.values()},
        }

    def _opened(self) -> ItemWriter:
        """Gives the writer, which checks changes against the release that is active now."""
        name = active_release(self.repository, self.home)
        if name is None:
            raise ReleaseError(
                f"{self.repository} has no active release", "`peregrine release activate NAME` makes one"
            )
        if self._writer is None:
            self._writer = ItemWriter(open_release(self.repository, name, self.home), self.log)
            self._opened_at = time.monotonic()
        elif self._writer.release.name != name:
            self._writer.check_against(open_release(self.repository, name, self.home))
        return self._writer

    def _care(self) -> None:
        """Follows the releases that are loaded, begins a merge when it is time, turns to one that is done;
        whatever goes wrong, the writer goes on."""
        try:
            if self._writer is not None:
                self._follow_loaded(self._opened())
            if self._merging is not None:
                self._end_merge(self._merging)
            elif (overlay := self._due()) is not None:
                self._start_merge(overlay)
        except Exception as error:
            self._drop_merge()
            self._merge_pause_s = min(2 * self._merge_pause_s or _FIRST_PAUSE_S, _LONGEST_PAUSE_S)
            self._no_merge_before_s = time.monotonic() + self._merge_pause_s
            reason = str(error) if isinstance(error, PeregrineError) else repr(error)
            self._merge_fault = reason
            self.log(f"items: {reason}; it is tried again in {self._merge_pause_s:.0f} s")

    def _follow_loaded(self, writer: ItemWriter) -> None:
        """Keeps the overlay of every release that some instance has loaded, and of no other."""
        if not self._loaded.is_time():
            return
        wanted = self._loaded.wanted(writer.release)
        for release in wanted.values():
            try:
                overlay = writer.follow(release)
                if overlay.live.fault:
                    self._drop_merge_of(overlay)
                    overlay = writer.renew(overlay)
                overlay.catch_up()
            except PeregrineError as error:
                self._loaded.complain(release, f"items: release {release.name}: {error}", self.log)
        for release_id in set(writer.overlays) - set(wanted):
            self._drop_merge_of(writer.overlays[release_id])
            writer.leave(release_id)

        for name in self._loaded.sweep([overlay.folder for overlay in writer.overlays.values()]):
            self.log(f"items: the overlay {name} is removed, as its release was")

    def _drop_merge_of(self, overlay: Overlay) -> None:
        """Ends a merge of an overlay that nobody will turn to it any more."""
        if self._merging is not None and self._merging.overlay is overlay:
            self._drop_merge()

    def _due(self) -> Overlay | None:
        """Gives an overlay beside whose index so much lies that a merge should begin."""
        if self._writer is None or time.monotonic() < self._no_merge_before_s:
            return None
        overlays = self._writer.overlays.values()
        return next((overlay for overlay in overlays if _unmerged(overlay) >= self.merge_at), None)

    def _start_merge(self, overlay: Overlay) -> None:
        """Starts merging, unless it is being done."""
        if self._merging is None:
            self._merging = MergeProcess(overlay)

    def _end_merge(self, merging: MergeProcess) -> None:
        """Turns the merge's overlay to the new generation if it is there."""
        generation = merging.generation()
        if generation is not None:
            self._merging = None
            merging.overlay.turn_to(generation, merging.sequence)
            self._merge_pause_s, self._merge_fault = 0.0, ""
            self.log(
                f"items: generation {generation} of {merging.overlay.release.name} holds all changes up to "
                f"{merging.sequence}"
            )

    def _drop_merge(self) -> None:
        """Ends a merge that nobody waits for any more."""
        if self._merging is not None:
            self._merging.stop()
            self._merging = None


def _unknown_values(writer: ItemWriter, request: dict[str, Any]) -> dict[str, Any]:
    """Names values that came with a request and are in no vocabulary of the release: models do not know
    them."""
    values: dict[str, list[str]] = {}
    for change in request.get("changes", []):
        if change["op"] != "delete":
            for feature, value in writer.overlay.encoding.unknown_values(change["item"]):
                some = values.setdefault(feature, [])
                if value not in some and len(some) < _NAMED:
                    some.append(value)
    return {"unknown_values": values} if values else {}


def _unmerged(overlay: Overlay) -> int:
    """Counts the changes that lie beside an overlay's index."""
    return overlay.live.view.state.num_records


def _remove_socket_of_the_killed(writer_file: Path) -> None:
    """Removes the socket of a writer that was killed.

    We hold the repository's lock, so whoever wrote the file is gone, and had no time to tidy up if the file
    is still there.
    """
    with contextlib.suppress(OSError, ValueError, KeyError):
        home = Path(json.loads(writer_file.read_text())["socket"]).parent
        if home.name.startswith(_HOME):
            shutil.rmtree(home)


def serve_until_ended(
    repository: Path, log: Callable[[str], None], merge_at: int = MERGE_AT, home: Path | None = None
) -> None:
    """Serves until SIGTERM or Ctrl-C."""
    service = ItemService(repository, log, merge_at, home)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: _raise_stop())
    try:
        service.run()
    except _Stop:
        pass
    finally:
        service.stop()


class _Stop(BaseException):
    """Ends the main thread at SIGTERM or SIGINT."""


def _raise_stop() -> None:
    """Raises _Stop; later signals are ignored, so that stop() can finish."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    raise _Stop


def _end_with_parent() -> None:
    """Ends this process when its parent has: the parent holds the other end of standard input."""
    while os.read(0, 1):  # not sys.stdin: a thread that holds its lock at the end is a fatal error to Python
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def main(arguments: list[str]) -> None:
    """Runs the service of the repository and the home that the command line names."""
    repository, *home = map(Path, arguments)
    if not sys.stdin.isatty():
        threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        serve_until_ended(repository.resolve(), say, home=home[0].resolve() if home else None)
    except AtWork:
        sys.exit(AT_WORK)
    except PeregrineError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main(sys.argv[1:])
