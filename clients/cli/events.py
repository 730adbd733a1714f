"""`peregrine events tail FILE|-`: JSON lines of events, into the feature rows in Redis."""

from __future__ import annotations

import contextlib
import json
import os
import select
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from clients.event_checks import Event, ItemUpdate
    from clients.events import EventWriter

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Live events, into the feature rows in Redis.",
)

_BATCH = 500  # lines written together
_SHOWN = 20  # bad lines told of one by one
_LINE_BYTES = 1 << 20
_WAIT_S = 0.05


@app.callback()
def _group() -> None:
    """Live events, into the feature rows in Redis."""


@app.command()
def tail(
    file: Annotated[str, typer.Argument(metavar="FILE|-", help="JSON lines; - reads standard input.")],
    redis: Annotated[
        str,
        typer.Option(
            "--redis",
            help="redis://[USER:PASSWORD@]HOST:PORT, or @FILE that holds it.",
            envvar="PEREGRINE_REDIS",
        ),
    ],
    shop: Annotated[
        str | None, typer.Option(help="The shop's name; default: that of the repository's active release.")
    ] = None,
    repository: Annotated[
        Path,
        typer.Option(
            "--repository", "-r", help="Where the shop's name is read, and items that were added live."
        ),
    ] = Path("model_repository"),
    only: Annotated[
        str | None, typer.Option(help="NAME,NAME,…: events that enter a user's past; default: all.")
    ] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="At the file's end wait for more.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Reads {"user_id", "item_id", "event", "time"} a line (or {"item_id", "time", "features" | "codes" |
    "values"}: an item's new numbers) and writes them. Bad lines are named and skipped; exit code 2 if there
    were any. The same file again changes nothing."""
    from clients.events import EventWriter
    from ensemble.tiers.settings import TierSettings, url_from_option

    url = TierSettings(url_from_option(redis)).url
    names = None if only is None else [name for name in only.split(",") if name]
    with (
        EventWriter(url, shop or _shop(repository), only=names, repository=repository) as writer,
        _opened(file) as descriptor,
    ):
        count = Tail(writer)
        with contextlib.suppress(KeyboardInterrupt):
            count.run(_lines(descriptor, follow and file != "-"))
    count.report(as_json)
    if count.bad:
        sys.exit(2)


class Tail:
    """Lines in, rows written, and what was counted."""

    def __init__(self, writer: EventWriter) -> None:
        self.writer = writer
        self.lines = self.changed = self.unchanged = self.unknown = self.bad = 0

    def run(self, lines: Iterator[bytes | None]) -> None:
        """Until the end, or for ever; what has been read is written before more is waited for."""
        batch: list[Event] = []
        for line in lines:
            if line is None or len(batch) >= _BATCH:
                self._flush(batch)
            if line is not None:
                self._take(line, batch)
        self._flush(batch)

    def _take(self, line: bytes, batch: list[Event]) -> None:
        from clients.event_checks import ItemUpdate
        from ensemble.errors import InvalidArgument

        self.lines += 1
        if not line.strip():
            return
        try:
            found = parse_line(line)
            if isinstance(found, ItemUpdate):
                self._add(self.writer.update_item(found))
            else:
                batch.append(found)
        except InvalidArgument as error:
            self.bad += 1
            if self.bad <= _SHOWN:
                print(f"line {self.lines}: {error}; skipped", file=sys.stderr)

    def _flush(self, batch: list[Event]) -> None:
        if batch:
            self._add(self.writer.record_events(batch))
            batch.clear()

    def _add(self, outcome: Any) -> None:
        self.changed += outcome.changed
        self.unchanged += outcome.unchanged
        self.unknown += len(outcome.unknown_items)
        for item in outcome.unknown_items[: max(0, _SHOWN - self.unknown + len(outcome.unknown_items))]:
            print(f"item {item!r} is in no loaded release; its events are skipped", file=sys.stderr)

    def report(self, as_json: bool) -> None:
        numbers = {name: getattr(self, name) for name in ("lines", "changed", "unchanged", "unknown", "bad")}
        if as_json:
            print(json.dumps(numbers))
            return
        print(f"{self.lines:,} lines: {self.changed:,} rows written, {self.unchanged:,} knew it")
        print(f"  skipped: {self.unknown:,} unknown items, {self.bad:,} bad lines")


def parse_line(line: bytes) -> Event | ItemUpdate:
    """One JSON line, checked; InvalidArgument says what is wrong with it."""
    from clients.event_checks import Event, ItemUpdate, check_event
    from ensemble.errors import InvalidArgument

    try:
        raw = json.loads(line)
    except (ValueError, RecursionError):
        raise InvalidArgument("not JSON") from None
    if not isinstance(raw, dict):
        raise InvalidArgument("must be a JSON object")
    is_event = "user_id" in raw or "event" in raw
    wanted = {"user_id", "item_id", "event", "time"} if is_event else {"item_id", "time"}
    missing = sorted(wanted - set(raw))
    if missing:
        raise InvalidArgument(f"{missing[0]}: missing")
    moment = _seconds(raw["time"])
    if not is_event:
        parts = {name: raw[name] for name in ("features", "codes", "values") if name in raw}
        _check_parts(parts)
        return ItemUpdate(raw["item_id"], moment, **parts)
    event = Event(raw["user_id"], raw["item_id"], raw["event"], moment)
    check_event(event)
    return event


def _check_parts(parts: dict[str, Any]) -> None:
    from ensemble.errors import InvalidArgument

    for name, part in parts.items():
        if not isinstance(part, list if name == "features" else dict):
            raise InvalidArgument(f"{name}: must be a JSON {'array' if name == 'features' else 'object'}")


def _seconds(value: Any) -> Any:
    """A number as it is; ISO 8601 text (UTC where it names no zone) as seconds since 1970."""
    from ensemble.errors import InvalidArgument

    if not isinstance(value, str):
        return value
    try:
        moment = datetime.fromisoformat(value)
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        raise InvalidArgument(f"time: must be a number or an ISO 8601 time, got {value!r:.60}") from None


def _lines(descriptor: int, follow: bool) -> Iterator[bytes | None]:
    """Whole lines; None whenever there is nothing more for now. Not readline: it would wait with lines in
    hand."""
    held = b""
    while True:
        if not select.select([descriptor], [], [], 0)[0]:
            yield None
            select.select([descriptor], [], [])
        data = os.read(descriptor, 1 << 16)
        *lines, held = (held + data).split(b"\n")
        yield from lines
        if data and len(held) <= _LINE_BYTES:
            continue
        if held and not (follow and not data):
            yield held  # the last line, or one that cannot be an event
            held = b""
        if not data and not follow:
            return
        if not data:
            yield None
            time.sleep(_WAIT_S)


@contextlib.contextmanager
def _opened(file: str) -> Iterator[int]:
    from ensemble.errors import InvalidInput

    if file == "-":
        yield sys.stdin.fileno()
        return
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise InvalidInput(f"{file}: {error.strerror}") from None
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _shop(repository: Path) -> str:
    from ensemble.errors import InvalidInput
    from ensemble.release.release import active_release, open_release

    name = active_release(repository) if repository.is_dir() else None
    if name is None:
        raise InvalidInput(
            f"--shop: no release is active in {repository} to take the shop's name from; name it"
        )
    return open_release(repository, name).schema.shop
