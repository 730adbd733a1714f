"""Everything that changes a repository, in any order, against a plain model of what every answer must be.

The catalogue is changed, merged and compacted; releases are activated, tried on a share of the users,
promoted, taken out, removed and brought back under their names; the writer is killed at any moment, overlays
are lost, and steps start again. After each step the release that the route names for a user answers, and
nothing else than what the model says may be in its lists; a second reader sees the same. `make soak` goes on
for long.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from shops import private_copy

from clients.client import Client
from clients.errors import CallError, InvalidArgument, Unavailable
from clients.items import ItemClient, make_ready
from clients.operations import canaries, releases
from ensemble.errors import InvalidInput, PeregrineError
from ensemble.local import LocalPipeline
from ensemble.release.manifest import MANIFEST
from ensemble.release.release import active_release, open_release
from ensemble.release.route import Route
from ensemble.server.following import route_in
from ensemble.server.options import ServeOptions
from ensemble.server.supervisor import Server, serve
from ensemble.steps.served import open_served

SOAK, STEPS = int(os.environ.get("PEREGRINE_SOAK", "0")), 20  # examples of `make soak`
BRANDS = ("brand of its own", "another brand")  # that no release knows
IDS = st.sampled_from([f"i{number}" for number in range(1, 9)] + [f"new-{number}" for number in range(4)])
VALUES = st.fixed_dictionaries({}, optional={"brand": st.sampled_from(BRANDS), "price": st.just(9.5)})
NEWCOMER = b"nobody-knows-me"
USERS = (NEWCOMER, b"u1", b"u2", b"u3")
NAMES = ("r1", "r2")
WAIT_S = 20.0
# The writer, whose merges do not wait for idle time: on a busy machine they would outlast the test.
WRITER = """
import sys
from ensemble.live import merge_process, service
merge_process.IDLE_ONLY_S = 0.0
service.main(sys.argv[1:])
"""


class Catalogue:
    """Is the model: each item's brand, and how many changes were acknowledged."""

    def __init__(self, brands: dict[str, str | None]) -> None:
        self.brands, self.sequence = dict(brands), 0

    def refuses(self, operation: str, item_id: str) -> bool:
        """Says whether the change is none: an item is added that is there, or changed that is not."""
        return (item_id in self.brands) == (operation == "add") and operation != "upsert"

    def apply(self, operation: str, item_id: str, values: dict[str, Any]) -> None:
        """Makes one change that was acknowledged."""
        self.sequence += 1
        if operation == "delete":
            del self.brands[item_id]
            return
        known = self.brands.setdefault(item_id, None)
        self.brands[item_id] = values.get("brand", known)

    def with_brand(self, brand: str) -> set[bytes]:
        """Gives the ids of the items that a filter on this brand lets through."""
        return {item_id.encode() for item_id, one in self.brands.items() if one == brand}


class Answer(NamedTuple):
    """Holds one list, whoever gave it."""

    release: str
    sequence: int
    items: list[bytes]


class Steps(Protocol):
    """Is what answers: local twins, or a server."""

    def open(self) -> None:
        """Makes sure that the releases of the route answer."""

    def restart(self) -> None:
        """Starts what answers again, in the rough way."""

    def close(self) -> None:
        """Ends it."""

    def ask(self, user: bytes, options: dict[str, Any]) -> Answer:
        """Asks for one user's list."""


class Twins:
    """Keeps a local twin of every release that was in the route, as a server's steps are kept."""

    def __init__(self, repository: Path) -> None:
        self.repository, self.twins = repository, dict[str, LocalPipeline]()

    def open(self) -> None:
        for name in the_route(self.repository).releases:
            make_ready(self.repository, name)
            if name not in self.twins:
                self.twins[name] = LocalPipeline(open_served(self.repository, name))
                self.twins[name].release.live.follow()

    def restart(self) -> None:
        self.close()
        self.open()

    def close(self) -> None:
        for twin in self.twins.values():
            twin.release.close()
        self.twins.clear()

    def ask(self, user: bytes, options: dict[str, Any]) -> Answer:
        twin = self.twins[whose(self.repository, user)]
        answer = twin.recommend([user], options)
        assert not twin.release.live.fault
        items = [item for item in answer["item_ids"][0].tolist() if item]
        return Answer(answer["release"].item().decode(), answer["sequence"].item(), items)


class Triton:
    """Keeps a real server."""

    def __init__(self, repository: Path, fused: bool) -> None:
        self.repository, self.options = repository, ServeOptions(port=0, metrics_port=None, fused=fused)
        self.stack = contextlib.ExitStack()
        self.server: Server | None = None

    def open(self) -> None:
        if self.server is None:
            self.server = self.stack.enter_context(serve(self.repository, self.options))
            self.client = self.stack.enter_context(Client(self.server.url))
        until(self._follows_the_route)

    def restart(self) -> None:
        """Kills tritonserver; the supervisor starts another."""
        assert self.server is not None
        os.kill(self.server.pid, signal.SIGKILL)
        until(self._follows_the_route)

    def close(self) -> None:
        self.stack.close()
        self.server = None

    def ask(self, user: bytes, options: dict[str, Any]) -> Answer:
        answer = self.client.recommend(user.decode(), **options)
        return Answer(answer.release, answer.sequence, [item.encode() for item in answer.item_ids])

    def _follows_the_route(self) -> bool:
        with contextlib.suppress(CallError):
            return all(self.ask(user, {}).release == whose(self.repository, user) for user in USERS)
        return False


def the_route(repository: Path) -> Route:
    """Gives the route; there is always one."""
    route = route_in(repository, repository)
    assert route is not None
    return route


def whose(repository: Path, user: bytes) -> str:
    """Names the release that answers a user."""
    route = the_route(repository)
    return route.releases[int(route.places([user])[0])]


def until(holds: Callable[[], bool]) -> None:
    """Waits until it holds; AssertionError where it does not come."""
    end = time.monotonic() + WAIT_S
    while not holds():
        assert time.monotonic() < end, "it does not come"
        time.sleep(0.01)


class AnyOrder(RuleBasedStateMachine):
    """Runs a writer's process, and what answers."""

    template: Path
    brands: dict[str, str | None]
    scratch: Path
    served_by: Callable[[Path], Steps]

    def __init__(self) -> None:
        super().__init__()
        self.repository = private_copy(self.template, self.scratch / f"{time.monotonic_ns()}" / "repository")
        self.catalogue = Catalogue(self.brands)
        self.steps = self.served_by(self.repository)
        self.writer: subprocess.Popen[bytes] | None = None
        self.is_started = False

    @initialize()
    def start(self) -> None:
        self._start_writer()
        self.steps.open()
        self.is_started = True

    # --- what may happen

    @rule(operation=st.sampled_from(["add", "update", "upsert", "delete"]), item_id=IDS, values=VALUES)
    def change(self, operation: str, item_id: str, values: dict[str, Any]) -> None:
        with self._items() as items:
            if self.catalogue.refuses(operation, item_id):
                with pytest.raises(InvalidArgument):
                    items.apply([self._said(operation, item_id, values)])
                return
            changed = items.apply([self._said(operation, item_id, values)])
        self.catalogue.apply(operation, item_id, values)
        assert (changed.sequence, changed.done) == (self.catalogue.sequence, True), changed

    @rule(item_id=IDS, delay_s=st.floats(0, 0.02))
    def change_while_the_writer_is_killed(self, item_id: str, delay_s: float) -> None:
        """Nobody knows whether it is done: afterwards the log says it, and both are right."""
        before, values = self.catalogue.sequence, {"brand": BRANDS[0]}

        def ask() -> None:
            with contextlib.suppress(Unavailable), self._items() as items:
                items.apply([self._said("upsert", item_id, values)])

        asking = threading.Thread(target=ask)
        asking.start()
        time.sleep(delay_s)
        self._kill_writer()
        asking.join()
        self._start_writer()
        with self._items() as items:
            sequence = items.status().sequence
        assert sequence in (before, before + 1)
        if sequence > before:
            self.catalogue.apply("upsert", item_id, values)

    @rule()
    def merge(self) -> None:
        with self._items() as items:
            items.merge()

    @rule()
    def merge_to_the_end(self) -> None:
        with self._items() as items:
            before = items.status().unmerged
            items.merge()
            until(lambda: not (now := items.status()).merging and (not before or now.unmerged < before))

    @rule()
    def compact(self) -> None:
        with self._items() as items:
            changed = items.compact()
        assert changed.log_lines == changed.log_items
        assert changed.sequence == self.catalogue.sequence

    @rule(name=st.sampled_from(NAMES))
    def activate(self, name: str) -> None:
        if not self._is_published(name):
            return
        done = releases.activate(self.repository, name)
        assert (done.release, done.warning) == (name, "")
        assert self._releases() == (name,)
        self.steps.open()

    @precondition(lambda self: self._is_published(self._other()))
    @rule(share=st.sampled_from([0.2, 0.5, 0.9]))
    def try_the_other(self, share: float) -> None:
        main, other = self._active(), self._other()
        before = {user: whose(self.repository, user) for user in USERS}
        is_larger = share >= the_route(self.repository).share(other) > 0
        canaries.canary(self.repository, other, share)
        assert self._releases() == (main, other)
        self.steps.open()
        if is_larger:  # a larger share keeps its users
            after = {user: whose(self.repository, user) for user in USERS}
            assert all(after[user] == other for user in USERS if before[user] == other)

    @rule()
    def promote(self) -> None:
        self._end_the_trial(canaries.promote, keeps_main=False)

    @rule()
    def take_out(self) -> None:
        self._end_the_trial(canaries.abort, keeps_main=True)

    @precondition(lambda self: self._is_published(self._other()))
    @rule()
    def remove_the_other(self) -> None:
        """Its name is kept for it; while it is tried it stays."""
        other = self._other()
        if other in self._releases():
            with pytest.raises(PeregrineError):
                releases.remove(self.repository, other)
            return
        releases.remove(self.repository, other)
        with pytest.raises(PeregrineError):
            releases.activate(self.repository, other)

    @precondition(lambda self: not self._is_published(self._other()))
    @rule()
    def bring_the_other_back(self) -> None:
        """A copy comes as a person would make it: members first."""
        other = self._other()
        for folder in sorted(self.template.glob(f"{other}*"), key=lambda path: path.name == other):
            shutil.copytree(folder, self.repository / folder.name)

    @rule()
    def a_second_reader_agrees(self) -> None:
        second = Twins(self.repository)
        try:
            second.open()
            for user in USERS:
                assert second.ask(user, {"top_k": 10}).items == self._ask(user, {"top_k": 10})
        finally:
            second.close()

    @rule()
    def start_the_steps_again(self) -> None:
        self.steps.restart()

    @precondition(lambda self: self.catalogue.sequence > 0)
    @rule()
    def lose_the_overlays(self) -> None:
        self._kill_writer()
        self.steps.close()
        for name in filter(self._is_published, NAMES):
            shutil.rmtree(open_release(self.repository, name).live_folder, ignore_errors=True)
        self._start_writer()
        self.steps.open()

    # --- what must hold

    @invariant()
    def the_active_release_answers_as_the_model_says(self) -> None:
        if not self.is_started:
            return
        present = {item_id.encode() for item_id in self.catalogue.brands}
        for user in USERS[:2]:
            items = self._ask(user, {"top_k": 10})
            assert len(items) == len(set(items)) == 10
            assert set(items) <= present
        for brand in BRANDS:
            wanted = self.catalogue.with_brand(brand)
            assert set(self._ask(NEWCOMER, {"top_k": 20, "allow": {"brand": [brand]}})) == wanted
            assert not wanted & set(self._ask(NEWCOMER, {"top_k": 20, "deny": {"brand": [brand]}}))
        with self._items() as items_client:
            assert items_client.status().items == len(present)

    def teardown(self) -> None:
        """Compares the last answers with those of a repository that has nothing but the log."""
        try:
            if self.is_started:
                before = [self._ask(user, {"top_k": 20}) for user in USERS]
                self.lose_the_overlays()
                assert before == [self._ask(user, {"top_k": 20}) for user in USERS]
        finally:
            self.steps.close()
            self._kill_writer()
            shutil.rmtree(self.repository.parent)

    # --- how

    def _said(self, operation: str, item_id: str, values: dict[str, Any]) -> dict[str, Any]:
        return {
            "op": operation,
            "item": {"item_id": item_id, **({} if operation == "delete" else values)},
        }

    def _ask(self, user: bytes, options: dict[str, Any]) -> list[bytes]:
        answer = self.steps.ask(user, options)
        assert (answer.release, answer.sequence) == (whose(self.repository, user), self.catalogue.sequence)
        return answer.items

    def _end_the_trial(self, end: Callable[[Path], Any], *, keeps_main: bool) -> None:
        if len(self._releases()) == 1:
            with pytest.raises(InvalidInput):
                end(self.repository)
            return
        main, other = self._releases()
        end(self.repository)
        assert self._releases() == ((main if keeps_main else other),)
        self.steps.open()

    def _releases(self) -> tuple[str, ...]:
        return the_route(self.repository).releases

    def _other(self) -> str:
        return next(name for name in NAMES if name != self._active())

    def _is_published(self, name: str) -> bool:
        return (self.repository / name / MANIFEST).exists()

    def _active(self) -> str:
        name = active_release(self.repository)
        assert name is not None
        return name

    @contextlib.contextmanager
    def _items(self) -> Iterator[ItemClient]:
        with ItemClient(self.repository, wait_s=WAIT_S) as items:
            yield items

    def _start_writer(self) -> None:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", WRITER, str(self.repository)]
        self.writer = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE)

        def answers() -> bool:
            with contextlib.suppress(Unavailable), self._items() as items:
                return bool(items.status())
            return False

        until(answers)

    def _kill_writer(self) -> None:
        if self.writer is not None:
            self.writer.send_signal(signal.SIGKILL)
            self.writer.communicate()


def run_in_any_order(
    served_by: Callable[[Path], Steps], examples: int, template: Path, shop: Path, scratch: Path
) -> None:
    table = pq.read_table(shop / "items.parquet", columns=["item_id", "brand"]).to_pydict()

    class Machine(AnyOrder):
        pass

    Machine.template, Machine.scratch, Machine.served_by = template, scratch, staticmethod(served_by)
    Machine.brands = dict(zip(table["item_id"], table["brand"], strict=True))
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=STEPS,
            deadline=None,
            derandomize=not SOAK,
            phases=(Phase.generate, Phase.shrink) if SOAK else (Phase.generate,),
            suppress_health_check=list(HealthCheck),
        ),
    )


@pytest.mark.timeout(600)
def test_any_order_of_features_gives_what_the_model_says(two_releases, tiny_shop, tmp_path):
    run_in_any_order(Twins, SOAK or 5, two_releases, tiny_shop, tmp_path)


@pytest.mark.triton
@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("fused", [False, True], ids=["ensemble", "fused"])
def test_any_order_of_features_on_a_real_server(two_releases, tiny_shop, tmp_path, fused):
    run_in_any_order(
        lambda repository: Triton(repository, fused), SOAK or 1, two_releases, tiny_shop, tmp_path
    )
