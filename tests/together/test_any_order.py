"""Everything that changes a repository, in any order, against a plain model of what every answer must be.

The catalogue is changed, merged and compacted, releases are activated, the writer is killed at any moment,
overlays are lost, and steps start again. After each step the active release answers, and nothing else than
what the model says may be in its lists. `make soak` goes on for long.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
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

from clients.errors import InvalidArgument, Unavailable
from clients.items import ItemClient, make_ready
from clients.operations import releases
from ensemble.live.merge_process import module_process
from ensemble.local import LocalPipeline
from ensemble.release.release import active_release, open_release
from ensemble.steps.served import open_served

EXAMPLES, STEPS = int(os.environ.get("PEREGRINE_SOAK", "5")), 20
BRANDS = ("brand of its own", "another brand")  # that no release knows
IDS = st.sampled_from([f"i{number}" for number in range(1, 9)] + [f"new-{number}" for number in range(4)])
VALUES = st.fixed_dictionaries({}, optional={"brand": st.sampled_from(BRANDS), "price": st.just(9.5)})
NEWCOMER, KNOWN = b"nobody-knows-me", b"u1"
WAIT_S = 20.0


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


class AnyOrder(RuleBasedStateMachine):
    """Runs a writer's process and a local twin of every release that was active, as a server's steps are."""

    template: Path
    brands: dict[str, str | None]
    scratch: Path

    def __init__(self) -> None:
        super().__init__()
        self.repository = private_copy(self.template, self.scratch / f"{time.monotonic_ns()}" / "repository")
        self.catalogue = Catalogue(self.brands)
        self.twins: dict[str, LocalPipeline] = {}
        self.writer: subprocess.Popen[bytes] | None = None

    @initialize()
    def start(self) -> None:
        self._start_writer()
        self._open(self._active())

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
    def compact(self) -> None:
        with self._items() as items:
            changed = items.compact()
        assert changed.log_lines == changed.log_items
        assert changed.sequence == self.catalogue.sequence

    @rule(name=st.sampled_from(["r1", "r2"]))
    def activate(self, name: str) -> None:
        done = releases.activate(self.repository, name)
        assert (done.release, done.warning) == (name, "")
        make_ready(self.repository, name)
        self._open(name)

    @rule()
    def start_the_steps_again(self) -> None:
        for twin in self.twins.values():
            twin.release.close()
        self.twins.clear()
        self._open(self._active())

    @precondition(lambda self: self.catalogue.sequence > 0)
    @rule()
    def lose_the_overlays(self) -> None:
        self._kill_writer()
        for twin in self.twins.values():
            twin.release.close()
        self.twins.clear()
        for name in ("r1", "r2"):
            shutil.rmtree(open_release(self.repository, name).live_folder, ignore_errors=True)
        self._start_writer()
        self._open(self._active())

    # --- what must hold

    @invariant()
    def the_active_release_answers_as_the_model_says(self) -> None:
        if not self.twins:
            return
        name = self._active()
        twin = self.twins[name]
        self._until(lambda: twin.release.live.view.sequence == self.catalogue.sequence)
        present = {item_id.encode() for item_id in self.catalogue.brands}
        for user in (NEWCOMER, KNOWN):
            items = self._ask(twin, user, {"top_k": 10})
            assert len(items) == len(set(items)) == 10
            assert set(items) <= present
        for brand in BRANDS:
            wanted = self.catalogue.with_brand(brand)
            assert set(self._ask(twin, NEWCOMER, {"top_k": 20, "allow": {"brand": [brand]}})) == wanted
            assert not wanted & set(self._ask(twin, NEWCOMER, {"top_k": 20, "deny": {"brand": [brand]}}))
        view = twin.release.live.view
        assert view.num_rows - 1 - view.num_deleted == len(present)
        assert not twin.release.live.fault

    def teardown(self) -> None:
        """Compares the last answers with those of a repository that has nothing but the log."""
        try:
            if self.twins:
                users = [NEWCOMER, KNOWN, b"u2", b"u3"]
                before = self.twins[self._active()].recommend(users, {"top_k": 20})
                self.lose_the_overlays()
                after = self.twins[self._active()].recommend(users, {"top_k": 20})
                assert before["item_ids"].tolist() == after["item_ids"].tolist()
                np.testing.assert_allclose(before["scores"], after["scores"], rtol=1e-4)
        finally:
            for twin in self.twins.values():
                twin.release.close()
            self._kill_writer()
            shutil.rmtree(self.repository.parent)

    # --- how

    def _said(self, operation: str, item_id: str, values: dict[str, Any]) -> dict[str, Any]:
        return {
            "op": operation,
            "item": {"item_id": item_id, **({} if operation == "delete" else values)},
        }

    def _ask(self, twin: LocalPipeline, user: bytes, options: dict[str, Any]) -> list[bytes]:
        answer = twin.recommend([user], options)
        assert answer["release"].ravel().tolist() == [self._active().encode()]
        assert answer["sequence"].ravel().tolist() == [self.catalogue.sequence]
        return [item for item in answer["item_ids"][0].tolist() if item]

    def _active(self) -> str:
        name = active_release(self.repository)
        assert name is not None
        return name

    def _open(self, name: str) -> None:
        """Opens a twin as Triton's Python step opens a release: it follows the overlay."""
        if name not in self.twins:
            self.twins[name] = LocalPipeline(open_served(self.repository, name))
            self.twins[name].release.live.follow()

    @contextlib.contextmanager
    def _items(self) -> Iterator[ItemClient]:
        with ItemClient(self.repository, wait_s=WAIT_S) as items:
            yield items

    def _start_writer(self) -> None:
        self.writer = module_process("ensemble.live.service", str(self.repository), stdin=subprocess.PIPE)

        def answers() -> bool:
            with contextlib.suppress(Unavailable), self._items() as items:
                return bool(items.status())
            return False

        self._until(answers)

    def _kill_writer(self) -> None:
        if self.writer is not None:
            self.writer.send_signal(signal.SIGKILL)
            self.writer.communicate()

    def _until(self, holds: Any) -> None:
        until = time.monotonic() + WAIT_S
        while not holds():
            assert time.monotonic() < until, "it does not come"
            time.sleep(0.01)


@pytest.mark.timeout(600)
def test_any_order_of_features_gives_what_the_model_says(
    two_releases: Path, tiny_shop: Path, tmp_path: Path
) -> None:
    table = pq.read_table(tiny_shop / "items.parquet", columns=["item_id", "brand"]).to_pydict()
    AnyOrder.template, AnyOrder.scratch = two_releases, tmp_path
    AnyOrder.brands = dict(zip(table["item_id"], table["brand"], strict=True))
    run_state_machine_as_test(
        AnyOrder,
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=STEPS,
            deadline=None,
            derandomize="PEREGRINE_SOAK" not in os.environ,
            phases=(Phase.generate, Phase.shrink) if "PEREGRINE_SOAK" in os.environ else (Phase.generate,),
            suppress_health_check=list(HealthCheck),
        ),
    )
