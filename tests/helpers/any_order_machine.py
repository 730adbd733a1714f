"""The state machine of tests/together/test_any_order.py: all that may happen to a repository, and what must
hold after each of it."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from any_order_answers import (
    NEWCOMER,
    USERS,
    WAIT_S,
    Answer,
    Steps,
    Twins,
    the_route,
    until,
    whose,
)
from any_order_model import EVENT, Catalogue, Pasts, Truth
from any_order_writer import WriterProcess
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)
from redis_server import RedisServer
from shops import private_copy

from clients.cli.events import tail
from clients.errors import InvalidArgument, Unavailable
from clients.event_checks import Event
from clients.events import EventWriter
from clients.items import ItemClient
from clients.operations import canaries, releases
from ensemble.errors import InvalidInput, PeregrineError, ServerError
from ensemble.release.manifest import MANIFEST
from ensemble.release.release import active_release, open_release
from ensemble.tiers.load import load_release

BRANDS = ("brand of its own", "another brand")  # that no release knows
IDS = st.sampled_from([f"i{number}" for number in range(1, 9)] + [f"new-{number}" for number in range(4)])
VALUES = st.fixed_dictionaries({}, optional={"brand": st.sampled_from(BRANDS), "price": st.just(9.5)})
NAMES = ("r1", "r2")
LIST: dict[str, Any] = {
    "top_k": 10,
    "time": 1_767_225_600,
}  # or lists would differ by when they are asked for


class AnyOrder(RuleBasedStateMachine):
    """Runs a writer's process, a Redis, and what answers."""

    template: Path
    brands: dict[str, str | None]
    shop: str
    scratch: Path
    served_by: Callable[[Path, str], Steps]

    def __init__(self) -> None:
        super().__init__()
        self.repository = private_copy(self.template, self.scratch / f"{time.monotonic_ns()}" / "repository")
        self.catalogue, self.pasts, self.truth = Catalogue(self.brands), Pasts(), Truth(self.repository)
        self.redis = RedisServer(self.repository.parent)
        self.loaded = set[str]()  # releases whose rows Redis has
        self.is_up = True
        self.events, self.event_writer = self.repository.parent / "events.jsonl", None
        self.events.touch()
        self.steps = self.served_by(self.repository, self.redis.url)
        self.writer = WriterProcess(self.repository)
        self.is_started = False
        self.read_at: object = None  # how things were when a second reader came

    @initialize(loaded=st.sampled_from([NAMES, ("r1",), ()]))
    def start(self, loaded: tuple[str, ...]) -> None:
        for name in loaded:
            self._load(name)
        self.writer.start()
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
        self.writer.kill()
        asking.join()
        self.writer.start()
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
        self._send_again()

    @precondition(lambda self: self._is_published(self._other()))
    @rule(share=st.sampled_from([0.2, 0.5, 0.9]))
    def try_the_other(self, share: float) -> None:
        main, other = self._active(), self._other()
        before = {user: whose(self.repository, user) for user in USERS}
        is_larger = share >= the_route(self.repository).share(other) > 0
        canaries.canary(self.repository, other, share)
        assert self._releases() == (main, other)
        self.steps.open()
        self._send_again()
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
        self.truth.close()
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
        self._send_again()

    # --- what users do, and Redis

    @rule(events=st.lists(st.tuples(st.sampled_from(USERS), IDS, st.integers(1, 40)), min_size=1, max_size=4))
    def users_do_things(self, events: list[tuple[bytes, str, int]]) -> None:
        """Late events and items that nobody knows come as well; where Redis has no rows all are refused."""
        lines = [
            {"user_id": user.decode(), "item_id": item_id, "event": EVENT, "time": time_s}
            for user, item_id, time_s in events
        ]
        with self.events.open("a") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
        if not self.loaded:
            with pytest.raises(ServerError):
                self._event_writer().record_event(**lines[0])
            return
        outcome = self._event_writer().record_events([Event(**line) for line in lines])
        assert set(outcome.unknown_items) == {item_id for _, item_id, _ in events} - self.catalogue.ever
        self._note(events)

    @precondition(lambda self: self.is_up)
    @rule(name=st.sampled_from(NAMES))
    def load(self, name: str) -> None:
        if self._is_published(name):
            self._load(name)

    @precondition(lambda self: self.is_up)
    @rule()
    def redis_goes(self) -> None:
        self.redis.kill()
        self.is_up = False
        self.loaded.clear()

    @precondition(lambda self: not self.is_up)
    @rule(names=st.sampled_from([(), NAMES]))
    def redis_comes_back(self, names: tuple[str, ...]) -> None:
        """It is empty, until rows are loaded."""
        self.redis.start()
        self.is_up = True
        self.the_active_release_answers_as_the_model_says()
        for name in filter(self._is_published, names):
            self._load(name)

    @precondition(lambda self: self.is_up)
    @rule()
    def redis_stands_still(self) -> None:
        self.redis.signal(signal.SIGSTOP)
        try:
            for user in USERS:
                assert self._answer(user, LIST).items in self._lists(user)
        finally:
            self.redis.signal(signal.SIGCONT)

    # --- who reads

    @precondition(lambda self: self.read_at != self._as_it_is())
    @rule()
    def a_second_reader_agrees(self) -> None:
        self.read_at = self._as_it_is()
        second = Twins(self.repository, self.redis.url)
        try:
            second.open()
            for user in USERS:
                until(lambda: second.ask(user, LIST).items in self._lists(user))  # noqa: B023
        finally:
            second.close()

    @rule()
    def start_the_steps_again(self) -> None:
        self.steps.restart()

    @precondition(lambda self: self.catalogue.sequence > 0)
    @rule()
    def lose_the_overlays(self) -> None:
        self.writer.kill()
        self.steps.close()
        for name in filter(self._is_published, NAMES):
            shutil.rmtree(open_release(self.repository, name).live_folder, ignore_errors=True)
        self.writer.start()
        self.steps.open()

    # --- what must hold

    @invariant()
    def the_active_release_answers_as_the_model_says(self) -> None:
        if not self.is_started:
            return
        present = {item_id.encode() for item_id in self.catalogue.brands}
        for user in USERS:
            items = self._list(user)
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
                before = [self._list(user) for user in USERS]
                self.lose_the_overlays()
                assert before == [self._list(user) for user in USERS]
        finally:
            self.steps.close()
            self.truth.close()
            self.writer.kill()
            if self.event_writer is not None:
                self.event_writer.close()
            self.redis.stop()
            shutil.rmtree(self.repository.parent)

    # --- how

    def _said(self, operation: str, item_id: str, values: dict[str, Any]) -> dict[str, Any]:
        return {
            "op": operation,
            "item": {"item_id": item_id, **({} if operation == "delete" else values)},
        }

    def _answer(self, user: bytes, options: dict[str, Any]) -> Answer:
        answer = self.steps.ask(user, options)
        assert (answer.release, answer.sequence) == (whose(self.repository, user), self.catalogue.sequence)
        return answer

    def _ask(self, user: bytes, options: dict[str, Any]) -> list[bytes]:
        return self._answer(user, options).items

    def _list(self, user: bytes) -> list[bytes]:
        """Gives a user's list as soon as it is what the model says, and flagged where Redis did not answer.

        While Redis is gone a process uses the rows that it has for a while.
        """
        answers: list[Answer] = []
        with_past, without = self._lists(user)
        is_loaded = whose(self.repository, user) in self.loaded

        def is_right() -> bool:
            answers[:] = [self._answer(user, LIST)]
            if not self.is_up:
                return answers[0].items in (with_past, without)
            return (answers[0].items, answers[0].is_sure) == (with_past if is_loaded else without, is_loaded)

        until(is_right, lambda: (user, is_loaded, answers, with_past, without))
        return answers[0].items

    def _lists(self, user: bytes) -> tuple[list[bytes], list[bytes]]:
        """Gives what the model says of a user: with all that was done since the build, and without."""
        name, past = whose(self.repository, user), self.pasts.of.get(user, {})
        without = self.truth.items(name, user, {}, LIST)
        return (self.truth.items(name, user, past, LIST) if past else without), without

    def _as_it_is(self) -> object:
        return self._releases(), self.catalogue.sequence, repr(self.pasts.of), sorted(self.loaded)

    def _load(self, name: str) -> None:
        """Loads a release's rows as ensemble/tiers/README.md says: then all events once more."""
        load_release(open_release(self.repository, name), self.redis.url)
        self.loaded.add(name)
        self._send_again()

    def _send_again(self) -> None:
        """Sends the file of all events once more; only what came since can change a row."""
        if not self.loaded:
            return
        tail(str(self.events), redis=self.redis.url, shop=self.shop, repository=self.repository, only="all")
        lines = map(json.loads, self.events.read_text().splitlines())
        self._note([(line["user_id"].encode(), line["item_id"], line["time"]) for line in lines])

    def _note(self, events: list[tuple[bytes, str, int]]) -> None:
        """Notes the events that were written: those of items that are known."""
        for user, item_id, time_s in events:
            if item_id in self.catalogue.ever:
                self.pasts.record(user, item_id, time_s)

    def _event_writer(self) -> EventWriter:
        """Opens the writer of events when there is the first one; like `events tail --follow` it stays."""
        if self.event_writer is None:
            self.event_writer = EventWriter(self.redis.url, self.shop, only="all", repository=self.repository)
        return self.event_writer

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


def machine(
    served_by: Callable[[Path, str], Steps], template: Path, shop: Path, scratch: Path
) -> type[AnyOrder]:
    table = pq.read_table(shop / "items.parquet", columns=["item_id", "brand"]).to_pydict()

    class Machine(AnyOrder):
        pass

    Machine.template, Machine.scratch, Machine.served_by = template, scratch, staticmethod(served_by)
    Machine.brands = dict(zip(table["item_id"], table["brand"], strict=True))
    Machine.shop = open_release(template, "r1").schema.shop
    return Machine
