"""Adds, changes and removes items of a repository that is being served, on the machine where its writer runs.

    from clients import ItemClient

    with ItemClient("model_repository") as items:
        items.add({"item_id": "lipstick-9", "brand": "Rouge", "price": 12.5, "image": Path("9.jpg")})
        items.update({"item_id": "lipstick-9", "price": 9.9})
        items.delete("lipstick-9")

An item has an id and values of the features that the shop's items have, by feature name or column name;
`item_embedding`, if given, takes the place of the encoder's. A picture is its bytes, or the Path of its file,
at most 4 MB. What an update does not name stays. Every call
returns once the change is durable and, within `wait_s`, once every instance that recommends has it.
Overloaded says that too many changes wait to be merged, and that nothing was changed: send them again in a
second or two.
"""

from __future__ import annotations

import base64
import contextlib
import json
import socket
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from clients.errors import InvalidArgument, Overloaded, ServerFault, Unavailable
from ensemble.content.pictures import MAX_BYTES
from ensemble.live import MAX_REQUEST_BYTES

_PREPARING_S = 3600.0  # a release that was never loaded here has to encode all that was ever changed
AT_ONCE, BYTES_AT_ONCE = 1000, 16_000_000  # changes that are sent together, and what they weigh at most
_GRACE_S = 60.0  # beyond wait_s: a large group takes long to encode


@dataclass(frozen=True)
class Changed:
    """Says what became of a change."""

    sequence: int  # number of the last change; an answer whose `sequence` is 42 has all up to 42
    done: bool  # every instance has it
    release: str
    instances: dict[str, int] = field(default_factory=dict)  # by instance: the last change that it has
    generation: int = 0
    items: int = 0  # that can be recommended
    # {feature: values that came and the release does not know}: filters find them, models do not
    unknown_values: dict[str, list[str]] = field(default_factory=dict)
    unmerged: int = 0  # changes that lie beside the main index
    merging: bool = False
    log_lines: int = 0  # changes in the log; compact() leaves one an item
    log_items: int = 0  # that were ever changed
    log_bytes: int = 0
    releases: dict[str, int] = field(default_factory=dict)  # that are kept up to date: how far each is


class ItemClient:
    """Keeps one connection to the writer of a repository, or of the home that several servers share; not to
    be shared between threads."""

    def __init__(self, home: Path | str, wait_s: float = 2.0) -> None:
        self.home, self.wait_s = Path(home), wait_s
        self._socket = self._connected()
        self._stream = self._socket.makefile("rwb")

    def _connected(self) -> socket.socket:
        """Connects to the writer that the home names; Unavailable if there is none."""
        try:
            path = json.loads((self.home / ".live" / "writer.json").read_text())["socket"]
            connection = socket.socket(socket.AF_UNIX)
            connection.connect(path)
        except (OSError, ValueError, KeyError):
            raise Unavailable(
                f"nobody writes the items of {self.home}; start `peregrine serve`, or `peregrine items serve`"
            ) from None
        connection.settimeout(_GRACE_S)
        return connection

    def add(self, *items: Mapping[str, Any]) -> Changed:
        """Adds new items; InvalidArgument if one is there already."""
        return self.apply([{"op": "add", "item": item} for item in items])

    def update(self, *items: Mapping[str, Any]) -> Changed:
        """Gives new values to items that are there; InvalidArgument if one is not."""
        return self.apply([{"op": "update", "item": item} for item in items])

    def upsert(self, *items: Mapping[str, Any]) -> Changed:
        """Adds those that are not there, updates those that are."""
        return self.apply([{"op": "upsert", "item": item} for item in items])

    def delete(self, *item_ids: str) -> Changed:
        """Removes items: from then on they are not recommended."""
        return self.apply([{"op": "delete", "item": {"item_id": item_id}} for item_id in item_ids])

    def apply(self, changes: Sequence[Mapping[str, Any]]) -> Changed:
        """Makes all of the changes, or none.

        A change is {"op": "add" | "update" | "upsert" | "delete", "item": {"item_id": …, feature: value, …}}.
        """
        return self._ask({"op": "change", "changes": [_sendable(change) for change in changes]})

    def status(self) -> Changed:
        """Asks how far the writer and every instance are."""
        return self._ask({"op": "status"})

    def prepare(self, release: str) -> Changed:
        """Makes a release ready to be loaded: when this returns, it has every change."""
        return self._ask({"op": "prepare", "release": release}, _PREPARING_S)

    def compact(self) -> Changed:
        """Drops from the log all lines but each item's last; nothing that was changed is lost."""
        return self._ask({"op": "compact"}, _PREPARING_S)

    def adopt(self, log: Path) -> Changed:
        """Takes in a later state of the log, which `peregrine pull` brought from the home that writes it."""
        return self._ask({"op": "adopt", "path": str(log)}, _PREPARING_S)

    def merge(self) -> Changed:
        """Begins merging all changes into a new main index; returns at once."""
        return self._ask({"op": "merge"})

    def _ask(self, request: dict[str, Any], takes_s: float = _GRACE_S) -> Changed:
        """Sends one JSON line to the writer and reads its reply, which may take so long beyond wait_s."""
        self._socket.settimeout(self.wait_s + takes_s)
        try:
            sent = json.dumps({**request, "wait_s": self.wait_s}).encode()
            if len(sent) >= MAX_REQUEST_BYTES:
                size, most = len(sent) / 1e6, MAX_REQUEST_BYTES / 1e6
                raise ValueError(f"{size:.0f} MB at once, at most {most:.0f} MB; send them in parts")
            self._stream.write(sent + b"\n")
            self._stream.flush()
            line = self._stream.readline()
        except (TypeError, ValueError) as error:
            raise InvalidArgument(f"items: {error}") from None
        except OSError as error:
            raise Unavailable(
                f"the writer of {self.home} does not answer: {error}; what it did not answer may be "
                "done or not"
            ) from None
        if not line:
            raise Unavailable(
                f"the writer of {self.home} went away; what it did not answer may be done or not"
            )
        reply = json.loads(line)
        if "error" in reply:
            if "retry_s" in reply:
                raise Overloaded(reply["error"], retryable=True)
            raise (InvalidArgument if reply.get("invalid", True) else ServerFault)(reply["error"])
        return Changed(**reply)

    def close(self) -> None:
        """Ends the connection."""
        with contextlib.suppress(OSError):  # what could not be sent was an error when it was asked
            self._stream.close()
        self._socket.close()

    def __enter__(self) -> ItemClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _sendable(change: Mapping[str, Any]) -> Mapping[str, Any]:
    """Gives a change as JSON can hold it: pictures as base64."""
    if not isinstance(change, Mapping):
        raise InvalidArgument(f"changes: must be a list of mappings, got {change!r:.60} in it")
    item = change.get("item")
    if not isinstance(item, Mapping) or not any(isinstance(v, bytes | Path) for v in item.values()):
        return change
    sent = {key: _picture(item, key, v) if isinstance(v, bytes | Path) else v for key, v in item.items()}
    return {**change, "item": sent}


def _picture(item: Mapping[str, Any], key: str, value: bytes | Path) -> dict[str, str]:
    """Reads a picture for the wire; InvalidArgument names the item and the file."""
    where = f"item {item.get('item_id')!r}: {key}"
    try:
        size = value.stat().st_size if isinstance(value, Path) else len(value)
        if size > MAX_BYTES:
            raise InvalidArgument(
                f"{where}: {size / 1e6:.1f} MB; a picture has at most {MAX_BYTES / 1e6:g} MB"
            )
        data = value.read_bytes() if isinstance(value, Path) else value
    except OSError as error:
        raise InvalidArgument(f"{where}: cannot read {error.filename}: {error.strerror}") from None
    return {"base64": base64.b64encode(data).decode()}


def make_ready(repository: Path, release: str, home: Path | None = None) -> None:
    """Makes a release ready to be loaded with every change that the catalogue's log has: by the writer at
    work, or here where there is none."""
    home = home or repository
    if not (home / ".live" / "catalogue" / "log").exists():
        return
    try:
        with ItemClient(home, wait_s=0.0) as client:
            client.prepare(release)
    except Unavailable:
        from ensemble.live.writer import ItemWriter
        from ensemble.release.release import open_release

        ItemWriter(open_release(repository, release, home)).close()


def read_changes(lines: Iterable[str], operation: str, name: str) -> list[dict[str, Any]]:
    """Reads changes from JSON lines, one item each; InvalidArgument names the line."""
    changes = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
        except ValueError as error:
            raise InvalidArgument(f"{name}, line {number}: not JSON: {error}") from None
        if not isinstance(item, dict):
            item = {"item_id": item}  # a list of ids to delete
        changes.append({"op": operation, "item": item})
    return changes


def parts_of(changes: Sequence[Mapping[str, Any]]) -> list[tuple[int, int]]:
    """Gives where each part begins and ends: so many changes, fewer where they bring pictures."""
    sizes = [len(json.dumps(change, default=str)) for change in changes]
    starts, held = [0], 0
    for at, size in enumerate(sizes):
        held += size
        if at - starts[-1] >= AT_ONCE or (held > BYTES_AT_ONCE and at > starts[-1]):
            starts.append(at)
            held = size
    return list(zip(starts, [*starts[1:], len(changes)], strict=True))
