"""Writes down what the catalogue's log says when a build begins, so that all stages read the same."""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Iterable
from pathlib import Path

from builders.folders import link
from ensemble.live.catalogue import Entry, facts_of, last_entries, log_folder, open_catalogue
from ensemble.live.pictures import is_logged, picture_path
from ensemble.release.files import write_durably
from ensemble.release.release import UNREAD, Watermark

FILE = "changes.jsonl"
_KEPT_S = 3 * 86_400
_OF_A_BUILD = ("kind", "item_id", "values")  # embeddings belong to one release, numbers to the log


def write_changes(repository: Path, root: Path) -> tuple[Watermark, Path, str]:
    """Writes the log's last word on each item into a folder under `root`.

    Gives how far that is, the folder, and a digest, which is the same whenever the items are the same.
    """
    reader = open_catalogue(repository)
    entries = last_entries(reader) if reader is not None else {}
    lines = [
        json.dumps(
            {name: value for name, value in facts_of(entry).items() if name in _OF_A_BUILD}, sort_keys=True
        )
        for _, entry in sorted(entries.items())
    ]
    text = "".join(f"{line}\n" for line in lines)
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    folder = root / "catalogue"
    folder.mkdir(parents=True, exist_ok=True)
    write_durably(folder / f"{digest}-{FILE}", text)
    _link_pictures(entries.values(), log_folder(repository), folder)
    for old in folder.glob(f"*-{FILE}"):
        if (
            time.time() - old.stat().st_mtime > _KEPT_S
        ):  # a build beside this one may still read a younger one
            old.unlink()
    mark = Watermark(reader.id, reader.sequence) if reader is not None else UNREAD
    return mark, folder / f"{digest}-{FILE}", digest


def _link_pictures(entries: Iterable[Entry], log: Path, folder: Path) -> None:
    """Links the pictures that the log's last lines name; one that is lost is missing in the build, too."""
    for name in {value for entry in entries for value in entry.values.values() if is_logged(value)}:
        source, target = picture_path(log, name), picture_path(folder, name)
        if source.is_file() and not target.exists():
            with contextlib.suppress(FileExistsError):  # a build beside this one
                link(source, target)


def read_changes(file: Path) -> dict[str, Entry]:
    """Reads what write_changes wrote: by item id."""
    entries = [Entry(0, 0, **json.loads(line)) for line in file.read_text(encoding="utf-8").splitlines()]
    return {entry.item_id: entry for entry in entries}
