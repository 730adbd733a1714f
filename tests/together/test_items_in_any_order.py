"""Changes, merges, compactions, activations, restarts and lost overlays in any order, against dictionaries:
what a release shows of the catalogue depends on what was said, and on nothing else."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from random_release import BRANDS, RandomRelease, make_release, open_again, write_item_encoder

from ensemble.index.item_index import find
from ensemble.live import overlay as overlay_module
from ensemble.live.merge import merge
from ensemble.live.state import LiveView
from ensemble.live.writer import ItemWriter
from ensemble.options import parse_options
from ensemble.steps.recall import Recall

NAMES = ("r1", "r2")
IDS = ("i00000", "i00002", "i00003", "new1", "new2")  # r2 has no i00000 and i00001
BRAND = st.sampled_from([*BRANDS[:2], "Vert", "Bleu"])
PRICE = st.sampled_from([1.0, 50.0, 80.0])
SAID = st.fixed_dictionaries({}, optional={"brand": BRAND, "price": PRICE})


class Items(RuleBasedStateMachine):
    """Holds a repository of two releases, its writer, readers that stay open, and the truth."""

    @initialize()
    def open(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="peregrine-order-"))
        overlay_module.SEALED_AT_ONCE = 5
        self.releases = {name: self._release(name) for name in NAMES}
        self.shown: dict[str, dict[str, dict]] = {name: self._base(name) for name in NAMES}
        self.said: dict[str, dict] = {}  # of each item, since it was deleted last
        self.sequence, self.active = 0, "r1"
        self.writer = ItemWriter(self.releases["r1"])
        self.readers = {name: self._recall(name) for name in NAMES}

    def _release(self, name: str) -> RandomRelease:
        made = make_release(self.folder / "made" / name, np.random.default_rng(len(name)), num_items=6)
        if name == "r2":  # as a build of other files: two items fewer
            items = np.load(made.path / "items.npy")
            items["codes"][1:3] = 0
            for file in ("items.npy", "numbers.npy", "popular.npy", "transitions.npy"):
                np.save(made.path / file, np.delete(np.load(made.path / file), [1, 2], axis=0))
            np.save(made.path / "item_ids.npy", np.load(made.path / "item_ids.npy")[2:])
            self._write_index(made.path)
        made.path.rename(self.folder / name)
        release = RandomRelease(self.folder, name, {"files": {name: {"sha256": name}}})
        write_item_encoder(release, seed=len(release.items))
        return release

    def _write_index(self, path: Path) -> None:
        import faiss

        embeddings = np.ascontiguousarray(np.load(path / "items.npy")["embedding"][1:])
        index = faiss.IndexFlatIP(embeddings.shape[1])
        index.add(embeddings)
        faiss.write_index(index, str(path / "index.faiss"))

    def _recall(self, name: str) -> Recall:
        release = open_again(self.releases[name])
        return Recall(release.model("recall"), release)

    def _base(self, name: str) -> dict[str, dict]:
        release = self.releases[name]
        ids = [one.decode() for one in release.item_ids.sorted_ids]
        return {
            item: {
                "brand": _brand(release.items["codes"][row, 0], None),
                "price": release.items["values"][row, 0],
            }
            for row, item in enumerate(ids, 1)
        }

    # --- what may happen

    @rule(item=st.sampled_from(IDS), said=SAID)
    def upsert(self, item: str, said: dict) -> None:
        self._apply("upsert", item, said)

    @rule(item=st.sampled_from(IDS), said=SAID)
    def change_what_is_there(self, item: str, said: dict) -> None:
        if item in self.shown[self.active]:
            self._apply("update", item, said)

    @rule(item=st.sampled_from(IDS))
    def delete(self, item: str) -> None:
        if item in self.shown[self.active]:
            self._apply("delete", item, {})

    def _apply(self, operation: str, item: str, said: dict) -> None:
        self.sequence = self.writer.apply([{"op": operation, "item": {"item_id": item, **said}}])
        values = {**said, "price": (said["price"] - 50) / 30} if "price" in said else dict(said)
        if operation == "delete":
            self.said.pop(item, None)
        else:
            self.said[item] = {**self.said.get(item, {}), **values}
        for shown in self.shown.values():
            if operation == "delete":
                shown.pop(item, None)
            elif item in shown:
                shown[item] |= values
            elif operation == "upsert":
                shown[item] = {"brand": "", "price": 0.0, **self.said[item]}

    @rule(name=st.sampled_from(NAMES))
    def activate(self, name: str) -> None:
        self.writer.check_against(self.releases[name])
        self.active = name

    @rule()
    def leave_the_other(self) -> None:
        for release_id in set(self.writer.overlays) - {self.writer.release.id}:
            self.writer.leave(release_id)

    @rule()
    def merge(self) -> None:
        release = self.writer.release
        sequence = self.writer.overlay.sequence
        self.writer.overlay.turn_to(merge(open_again(release), sequence), sequence)

    @rule()
    def compact(self) -> None:
        self.writer.catalogue.compact()

    @rule()
    def restart(self) -> None:
        self.writer.close()
        self.writer = ItemWriter(open_again(self.releases[self.active]))

    @rule(name=st.sampled_from(NAMES))
    @precondition(lambda self: self.sequence)
    def lose_an_overlay(self, name: str) -> None:
        self.writer.close()
        shutil.rmtree(self.releases[name].live_folder, ignore_errors=True)
        self.writer = ItemWriter(open_again(self.releases[self.active]))

    # --- what must be

    @invariant()
    def every_release_that_is_followed_shows_the_truth(self) -> None:
        for name, reader in self.readers.items():
            if self.releases[name].id in self.writer.overlays:
                view = reader.live.refresh(1 << 20)
                assert reader.live.fault == ""
                assert view.sequence == self.sequence
                assert _shown(view) == _rounded(self.shown[name])
                self._searches_right(reader, view, name)

    def _searches_right(self, reader: Recall, view: LiveView, name: str) -> None:
        parameters = {"allow": json.dumps({"brand": ["Vert", "brand1"]})}
        wanted = parse_options(json.dumps(parameters), 1, reader.live.release.schema).users[0].filter
        for mask in (None, reader.filters.mask(wanted, view)):
            rows = find(view, np.ones((1, 8), np.float32), 20, mask)[0][0]
            ids = [one.decode() for one in view.ids_from_rows(rows[rows > 0]).tolist()]
            truth = {
                item
                for item, values in self.shown[name].items()
                if mask is None or values["brand"] in ("Vert", "brand1")
            }
            assert sorted(ids) == sorted(truth)

    def teardown(self) -> None:
        if hasattr(self, "writer"):
            self.writer.close()
            shutil.rmtree(self.folder)
        overlay_module.SEALED_AT_ONCE = 50_000


def _brand(code: int, view: LiveView | None) -> str:
    """The brand of a code; brands share the code 1 that the vocabulary lacks, and have none with 0."""
    if view is not None and code > 12:
        new = view.state.new_values
        return next(value for value in ("Vert", "Bleu") if new.codes("brand", [value]) == [code])
    return BRANDS[code - 2] if code >= 2 else ""


def _shown(view: LiveView) -> dict[str, tuple]:
    rows = np.arange(1, view.num_rows)
    rows = rows[~view.is_deleted(rows)]
    codes, values = view.gather(rows, "codes"), view.gather(rows, "values")
    ids = [one.decode() for one in view.ids_from_rows(rows).tolist()]
    assert view.rows_from_ids(np.array([one.encode() for one in ids], dtype="S")).tolist() == rows.tolist()
    return {
        item: (_brand(int(codes[at, 0]), view), round(float(values[at, 0]), 4)) for at, item in enumerate(ids)
    }


def _rounded(shown: dict[str, dict]) -> dict[str, tuple]:
    return {item: (values["brand"], round(float(values["price"]), 4)) for item, values in shown.items()}


TestItems = Items.TestCase
TestItems.settings = settings(
    max_examples=16,
    stateful_step_count=30,
    phases=(Phase.generate,),  # with Phase.shrink a failure takes minutes to be told, and is shorter
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
