"""Rolls two servers behind the gateway, and judges every list that was asked for meanwhile."""

from __future__ import annotations

import contextlib
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from clients.bench.gateway import Authority, Gateway
from clients.bench.rolling.pods import Manifest, Pod, read_manifest, start
from clients.client import Client
from clients.errors import Unavailable
from clients.items import ItemClient
from clients.operations import releases
from clients.operations.push import push
from clients.operations.store import Store
from clients.results import Recommendations
from clients.tls import Tls
from ensemble.errors import PeregrineError, ServerError
from ensemble.release.release import Release, open_release
from ensemble.release.repository import require_active

ITEM, VALUE = "added-while-rolling", "Addedwhilerolling"
_TOP_K, _DEEP, _USERS, _THREADS = 5, 30, 40, 8
_WITHIN_S = 60.0
Note = tuple[float, float, Recommendations | str]  # when it was due, seconds, what came


@dataclass
class Outcome:
    """Says what came of a rolling update; three percentiles are those before, while and after it."""

    sent: int = 0
    failed: int = 0
    mixed: int = 0
    releases: dict[str, int] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0
    ready_s: list[float] = field(default_factory=list)
    end_s: list[float] = field(default_factory=list)
    p50_ms: list[float] = field(default_factory=list)
    p99_ms: list[float] = field(default_factory=list)
    item_s: float = 0.0  # from its addition until it was looked for, at the end, and found on both
    turn_s: float | None = None  # from turning at home until both were seen to serve it, at the end


class Load:
    """Asks for lists at a steady rate until it is stopped, whatever the answers."""

    def __init__(self, url: str, tls: Tls, users: list[str], rate: float) -> None:
        self._client = Client(url, tls=tls, fallback=False)
        self._users, self._gap_s, self._stopped = users, 1 / rate, threading.Event()
        self._pool, self.notes = ThreadPoolExecutor(_THREADS), list[Note]()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        due, count = time.monotonic(), 0
        while not self._stopped.wait(max(0.0, due - time.monotonic())):
            self._pool.submit(self._ask, due, self._users[count % len(self._users)])
            due, count = due + self._gap_s, count + 1

    def _ask(self, due: float, user: str) -> None:
        reply: Recommendations | str
        try:
            reply = self._client.recommend(user, top_k=_TOP_K)
        except PeregrineError as error:
            reply = str(error)
        self.notes.append((due, time.monotonic() - due, reply))

    def stop(self) -> list[Note]:
        """Waits for what is in flight and gives all notes."""
        self._stopped.set()
        self._thread.join()
        self._pool.shutdown()
        self._client.close()
        return self.notes


def roll(
    repository: Path,
    folder: Path,
    ports: list[int],
    rate: float,
    to: str | None = None,
    say: Callable[[str], None] = lambda text: None,
    manifest: Manifest | None = None,
) -> Outcome:
    """Replaces two servers of the repository's active release; turns to release `to` between the two."""
    store, home = folder / "store", folder / "home"
    shutil.copytree(repository, home, ignore=shutil.ignore_patterns(".build", ".lock", ".servers", ".live"))
    release = open_release(home, require_active(home))
    push(home, Store(str(store)), [to] if to else [])
    push(home, Store(str(store)), [])
    pods = [
        Pod(manifest or read_manifest(), folder / f"pod-{n}", str(store), ports[2 * n], ports[2 * n + 1])
        for n in range(4)
    ]
    authority = Authority(folder / "authority")
    gateway = Gateway(folder / "gateway", authority, *ports[8:10])
    with _at_home(home, str(store), folder), contextlib.ExitStack() as stack:
        for pod in pods:
            stack.callback(pod.kill)
        stack.callback(gateway.stop)
        for pod in pods[:2]:
            pod.start()
        for pod in pods[:2]:
            pod.wait_until_ready()
        gateway.name_replicas([pod.url for pod in pods[:2]])
        gateway.start()
        say("two servers are ready")
        users = _users(release)
        tls = authority.issue("load")
        expected = {release.name: _lists(gateway.url, tls, users)}
        load = Load(gateway.url, tls, users, rate)
        stack.callback(load.stop)
        time.sleep(5.0)
        outcome = _replace(pods, gateway, home, to, release, say)
        began, ended = outcome.seconds, time.monotonic()
        time.sleep(5.0)
        notes = load.stop()
        expected.setdefault(open_release(home, require_active(home)).name, _lists(gateway.url, tls, users))
        for pod in pods[2:]:
            pod.end()
    outcome.seconds = ended - began
    return _judged(outcome, notes, expected, began, ended)


def _replace(
    pods: list[Pod],
    gateway: Gateway,
    home: Path,
    to: str | None,
    release: Release,
    say: Callable[[str], None],
) -> Outcome:
    """Puts two new servers in the places of the old ones; the outcome's `seconds` is when it began."""
    outcome, feature = Outcome(seconds=time.monotonic()), next(iter(release.vocabularies["items"]))
    added = turned = outcome.seconds
    for place, (old, new) in enumerate(zip(pods[:2], pods[2:], strict=True)):
        started = time.monotonic()
        new.start()
        if not place:
            added = time.monotonic()
            _add(home, feature)
        elif to:
            releases.activate(home, to, home=home)
            turned = time.monotonic()
        new.wait_until_ready()
        outcome.ready_s.append(round(time.monotonic() - started, 1))
        gateway.name_replicas([pod.url for pod in pods[place + 1 : place + 3]])
        time.sleep(old.manifest.pause_s)  # preStop
        outcome.end_s.append(round(old.end(), 1))
        say(f"{old.folder.name} was replaced by {new.folder.name}, ready after {outcome.ready_s[-1]} s")
    outcome.item_s = round(_until(lambda: all(_has_item(pod.url, feature) for pod in pods[2:]), added), 1)
    if to:
        outcome.turn_s = round(_until(lambda: all(_serves(pod.url) == to for pod in pods[2:]), turned), 1)
    return outcome


def _judged(
    outcome: Outcome, notes: list[Note], expected: dict[str, dict[str, set[str]]], began: float, ended: float
) -> Outcome:
    """Counts what came: a list whose items its own release would not show is of no single release."""
    outcome.sent, outcome.failures = len(notes), sorted({text for *_, text in notes if isinstance(text, str)})
    outcome.failed = sum(isinstance(reply, str) for *_, reply in notes)
    replies = [reply for *_, reply in notes if isinstance(reply, Recommendations)]
    outcome.releases = dict(sorted(Counter(reply.release for reply in replies).items()))
    outcome.mixed = sum(not is_of_its_release(reply, expected) for reply in replies)
    for start_s, end_s in ((0.0, began), (began, ended), (ended, float("inf"))):
        took = [1e3 * seconds for due, seconds, _ in notes if start_s <= due < end_s] or [0.0]
        outcome.p50_ms.append(round(float(np.percentile(took, 50)), 1))
        outcome.p99_ms.append(round(float(np.percentile(took, 99)), 1))
    return outcome


def is_of_its_release(reply: Recommendations, expected: dict[str, dict[str, set[str]]]) -> bool:
    """Says whether a list has the items that its release gives this user, but for the one that was added."""
    shown = expected.get(reply.release, {}).get(reply.user_id, set())
    return len(reply.items) == _TOP_K and set(reply.item_ids) - {ITEM} <= shown


@contextlib.contextmanager
def _at_home(home: Path, store: str, folder: Path) -> Iterator[None]:
    """Writes items at home, and brings them and the route into the store."""
    commands = (["items", "serve", "-r", home], ["push", "--follow", store, "-r", home])
    processes = [start([*words], folder / f"{words[0]}.log") for words in commands]
    try:
        yield
    finally:
        for one in processes:
            one.terminate()
        for one in processes:
            one.wait(20)


def _add(home: Path, feature: str) -> None:
    """Adds the item, once its writer is there."""
    until = time.monotonic() + _WITHIN_S
    while True:
        try:
            with ItemClient(home, wait_s=0.0) as items:
                items.upsert({"item_id": ITEM, feature: VALUE})
            return
        except Unavailable:
            if time.monotonic() > until:
                raise
            time.sleep(0.2)


def _users(release: Release) -> list[str]:
    rows = np.linspace(1, len(release.user_ids), _USERS).astype(np.int64)
    return [one.decode() for one in release.user_ids.ids_from_rows(np.unique(rows)).tolist()]


def _lists(url: str, tls: Tls, users: list[str]) -> dict[str, set[str]]:
    """Asks for each user's list, deeper than what is judged: ties may change places."""
    with Client(url, tls=tls, fallback=False) as client:
        return {user: set(client.recommend(user, top_k=_DEEP).item_ids) for user in users}


def _has_item(url: str, feature: str) -> bool:
    with Client(url, fallback=False) as client:
        return ITEM in client.recommend("nobody", top_k=_TOP_K, allow={feature: [VALUE]}).item_ids


def _serves(url: str) -> str:
    with Client(url, fallback=False) as client:
        return client.recommend("nobody", top_k=1).release


def _until(holds: Callable[[], bool], since: float) -> float:
    """Gives the seconds from `since` until something holds; ServerError if it does not in time."""
    until = time.monotonic() + _WITHIN_S
    while not holds():
        if time.monotonic() > until:
            raise ServerError(f"what was changed at home is not on both servers after {_WITHIN_S:.0f} s")
        time.sleep(0.1)
    return time.monotonic() - since
