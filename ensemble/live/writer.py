"""Changes items, as the only one: checks a group of changes, puts it into the catalogue's log, and tells
every release that is loaded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ensemble.errors import InvalidInput, PeregrineError
from ensemble.id_rule import recorded_id
from ensemble.live.catalogue import DELETE, REPLACE, UPDATE, UPSERT, Entry
from ensemble.live.catalogue_log import CatalogueLog
from ensemble.live.items import LiveItems
from ensemble.live.overlay import Overlay
from ensemble.release.release import Release

# {"op": "add" | "update" | "upsert" | "delete", "item": {"item_id": …, feature: value, …}}
Change = Mapping[str, Any]
OPERATIONS = ("add", "update", "upsert", "delete")
MAX_GROUP = 10_000  # changes at once


class ItemWriter:
    """Holds the lock of a catalogue's log while it is open.

    Changes are checked against one release, which callers think of; other releases that are loaded take of
    them what they can.
    """

    def __init__(self, release: Release, note: Callable[[str], None] = lambda line: None) -> None:
        self.note = note
        self.catalogue = CatalogueLog(release.home, note)
        self.overlays: dict[str, Overlay] = {}  # by release id
        try:
            self.overlay = self.follow(release)
        except BaseException:
            self.close()
            raise

    @property
    def release(self) -> Release:
        """Gives the release that changes are checked against."""
        return self.overlay.release

    @property
    def live(self) -> LiveItems:
        """Gives the items as that release has them now."""
        return self.overlay.live

    @property
    def sequence(self) -> int:
        """Gives the number of the last change."""
        return self.catalogue.sequence

    def follow(self, release: Release) -> Overlay:
        """Keeps a release's overlay up to date from now on."""
        if release.id not in self.overlays:
            self.overlays[release.id] = Overlay(release, self.catalogue, self.note)
        return self.overlays[release.id]

    def check_against(self, release: Release) -> None:
        """Makes `release` the one that changes are checked against."""
        self.overlay = self.follow(release)

    def renew(self, overlay: Overlay) -> Overlay:
        """Opens an overlay again, which makes it anew where it is damaged."""
        again = self.overlays[overlay.release.id] = Overlay(overlay.release, self.catalogue, self.note)
        if self.overlay is overlay:
            self.overlay = again
        return again

    def leave(self, release_id: str) -> None:
        """Lets an overlay be as it is; it is made up to date when the release is loaded again."""
        self.overlays.pop(release_id)

    def apply(self, changes: Sequence[Change]) -> int:
        """Makes all changes durable, or none of them; gives the last one's sequence number.

        InvalidInput names the first bad one.
        """
        entries, given = self._entries(changes)
        if entries:
            self.overlay.catch_up()
            records = self.overlay.records(entries, given)
            entries = self.catalogue.append(entries)
            self.overlay.append(entries, records)
            for overlay in self.overlays.values():
                if overlay is not self.overlay:
                    self.bring_up_to_date(overlay)
        return self.sequence

    def adopt(self, log: Path) -> int:
        """Takes in a later state of the log that another home has written; gives the last change's number."""
        self.catalogue.adopt(log)
        for overlay in list(self.overlays.values()):
            self.bring_up_to_date(self.renew(overlay))  # items may be numbered in another order now
        return self.sequence

    def bring_up_to_date(self, overlay: Overlay) -> None:
        """Tells an overlay what it has missed; what goes wrong there keeps nobody from changing items."""
        try:
            overlay.catch_up()
        except PeregrineError as error:
            self.note(f"items: release {overlay.release.name}: {error}")

    def _entries(self, changes: Sequence[Change]) -> tuple[list[Entry], list[frozenset[str]]]:
        """Checks changes: what each makes of its item, and the columns that it names."""
        if len(changes) > MAX_GROUP:
            raise InvalidInput(
                f"at most {MAX_GROUP} changes at once, got {len(changes)}", "send them in parts"
            )
        ids = [_item_id(change) for change in changes]
        twice = next((item_id for item_id, count in Counter(ids).items() if count > 1), None)
        if twice is not None:
            raise InvalidInput(
                f"item {twice!r} is changed twice at once", "send the second change after the first"
            )
        entries, given = [], []
        here = self.overlay.here(ids).tolist() if ids else []
        for item_id, change, is_here in zip(ids, changes, here, strict=True):
            _check_operation(item_id, change.get("op"), is_here=is_here)
            values, embeddings = self._said(item_id, change)
            entries.append(_joined(self.catalogue.entry(item_id), item_id, change["op"], values, embeddings))
            given.append(frozenset(values))
        return entries, given

    def _said(self, item_id: str, change: Change) -> tuple[dict[str, Any], dict[str, list[float]]]:
        """Gives what a change says of its item: values by column, and the embedding that it brings."""
        if change["op"] == "delete":
            return {}, {}
        encoding, item = self.overlay.encoding, change["item"]
        values, embeddings = encoding.values(item), {}
        if "item_embedding" in item:
            encoding.embedding(item_id, item["item_embedding"])
            embeddings[self.release.id] = item["item_embedding"]
        return values, embeddings

    def close(self) -> None:
        """Gives the lock back."""
        self.catalogue.close()


def _check_operation(item_id: str, operation: Any, *, is_here: bool) -> None:
    """Raises InvalidInput for an operation that is none, or not possible as things are."""
    if operation not in OPERATIONS:
        raise InvalidInput(f"item {item_id!r}: op {operation!r} is unknown", f"use {', '.join(OPERATIONS)}")
    if operation == "add" and is_here:
        raise InvalidInput(f"item {item_id!r} exists already", "update it instead")
    if operation in ("update", "delete") and not is_here:
        cure = "add it first" if operation == "update" else "there is nothing to delete"
        raise InvalidInput(f"item {item_id!r} is unknown", cure)


def _joined(
    before: Entry | None,
    item_id: str,
    operation: str,
    values: dict[str, Any],
    embeddings: dict[str, list[float]],
) -> Entry:
    """Gives what an operation makes of an item that was `before`; its number comes with the log's append."""
    if operation == "delete":
        return Entry(0, 0, DELETE, item_id)
    if before is None:
        return Entry(0, 0, UPDATE if operation == "update" else UPSERT, item_id, values, embeddings)
    if before.kind == DELETE:  # what it was before it was deleted is over
        return Entry(0, 0, REPLACE, item_id, values, embeddings)
    kind = UPSERT if before.kind == UPDATE and operation != "update" else before.kind
    both = {**before.values, **values}, {**before.embeddings, **embeddings}
    return replace(before, kind=kind, values=both[0], embeddings=both[1])


def _item_id(change: Change) -> str:
    """Gives the id of the item that is changed; InvalidInput if what came is no change, or has no such id."""
    item = change.get("item") if isinstance(change, Mapping) else None
    item_id = item.get("item_id") if isinstance(item, Mapping) else None
    if item_id is None:
        raise InvalidInput(
            "a change must be an operation and an item with an item_id (text or a whole number), got "
            f"{str(change)[:60]!r}"
        )
    return recorded_id("item_id", item_id).decode()
