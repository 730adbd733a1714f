"""Follows the titles that changes bring, which no row of an item holds: from the catalogue's log."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator

import numpy as np

from ensemble.contract import TEXT
from ensemble.errors import ReleaseError
from ensemble.live.catalogue import DELETE, REPLACE, CatalogueReader, Entry, log_folder, open_catalogue
from ensemble.live.encoding import ENCODING, TITLE
from ensemble.live.state import LiveView
from ensemble.release.release import Release


class LiveTitles:
    """Reads the log as far as a view of the items goes."""

    def __init__(self, release: Release) -> None:
        self._release, self._reader = release, self._open(release)
        self._columns = (TITLE, *_text_columns(release))
        self._pending: list[Entry] = []
        self._done = -1  # the sequence number up to which titles were given

    @staticmethod
    def _open(release: Release) -> CatalogueReader | None:
        """Opens the log; None where nothing was changed yet, or it is damaged, which its writer tells."""
        with contextlib.suppress(ReleaseError):
            return open_catalogue(release.home)
        return None

    def news(self, view: LiveView) -> Iterator[tuple[int, str]]:
        """Gives rows and titles that the log has up to `view` and that were not given yet; the last of a row
        counts."""
        if view.sequence == self._done or not view.num_slots:
            return
        self._read()
        mine = [entry for entry in self._pending if entry.sequence <= view.sequence]
        self._pending = [entry for entry in self._pending if entry.sequence > view.sequence]
        self._done = view.sequence
        told = [(entry, title) for entry in mine if (title := self._title(entry)) is not None]
        if not told:
            return
        rows = view.rows_from_ids(np.array([entry.item_id.encode() for entry, _ in told], dtype="S"))
        for row, (_, title) in zip(rows.tolist(), told, strict=True):
            if row > 0:
                yield row, title

    def _title(self, entry: Entry) -> str | None:
        """Gives the title that an entry makes an item's; None where it leaves the title as it was."""
        for column in self._columns:
            if isinstance(entry.values.get(column), str):
                return str(entry.values[column])
        return "" if entry.kind == REPLACE else None

    def _read(self) -> None:
        """Takes in what the log has by now; one that was made again is read from its start."""
        if self._reader is None or self._is_another():
            self._reader = self._open(self._release)
        if self._reader is None:
            return
        mark = self._release.watermark
        known = mark.sequence if mark.log == self._reader.id else 0
        with contextlib.suppress(ReleaseError):  # a damaged line: its writer says so, and stops there as well
            while entries := self._reader.read():
                self._pending += [e for _, e in entries if e.sequence > known and e.kind != DELETE]

    def _is_another(self) -> bool:
        """Says whether the log's name stands for another file than the one that is open."""
        try:
            now = os.stat(log_folder(self._release.home) / "log").st_ino
        except FileNotFoundError:
            return False
        return self._reader is not None and self._reader.inode != now


def _text_columns(release: Release) -> list[str]:
    """Names the columns whose texts are encoded."""
    texts = {f.name for f in release.schema.items.features if f.encoder == TEXT}
    if not texts:
        return []
    release.verify_data(ENCODING)
    return [e["source"] for e in json.loads((release.path / ENCODING).read_text()) if e["name"] in texts]
