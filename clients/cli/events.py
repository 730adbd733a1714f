"""Runs `peregrine events tail FILE|-`: writes JSON lines of events into the feature rows in Redis."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ensemble.cli.options import REPOSITORY, CatalogueOption, JsonOption, RedisOption
from ensemble.json_text import json_text

if TYPE_CHECKING:
    from clients.event_checks import Event, ItemUpdate
    from clients.events import EventWriter, Outcome

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Write live events into the feature rows in Redis.",
)

_BATCH = 500  # lines written together
_SHOWN = 20  # bad lines, and unknown items, that are named one by one
_LINE_BYTES = 1 << 20


File = Annotated[str, typer.Argument(metavar="FILE|-", help="JSON lines; - reads standard input.")]
Shop = Annotated[
    str | None, typer.Option(help="The shop's name; default: that of the repository's active release.")
]
Repository = Annotated[
    Path,
    typer.Option("--repository", "-r", help="Where the shop's name is read, and items that were added live."),
]
Only = Annotated[
    str | None,
    typer.Option(
        help="NAME,NAME,… or `all`: events that enter a user's past; default: those of the release's own "
        "pasts, as `history` of shop.toml has them."
    ),
]
Follow = Annotated[
    bool,
    typer.Option(
        "--follow",
        "-f",
        help="Go on for ever: wait for more at the file's end, for a server that is away, and for the next "
        "file of that name; after a restart go on where it was.",
    ),
]
Offset = Annotated[
    Path | None,
    typer.Option("--offset", help="With --follow: where to keep how far it is; default: FILE.offset."),
]


@app.callback()
def _group() -> None:
    """Writes live events into the feature rows in Redis."""


@app.command()
def tail(
    file: File,
    redis: RedisOption,
    shop: Shop = None,
    repository: Repository = REPOSITORY,
    catalogue: CatalogueOption = None,
    only: Only = None,
    follow: Follow = False,
    offset: Offset = None,
    as_json: JsonOption = False,
) -> None:
    """Reads {"user_id", "item_id", "event", "time"} a line (or {"item_id", "time", "features" | "codes" |
    "values"}: an item's new numbers) and writes them. Bad lines are named and skipped; exit code 2 if there
    were any. The same file again changes nothing."""
    from clients.events import EventWriter
    from ensemble.tiers.settings import TierSettings, url_from_option

    url = TierSettings(url_from_option(redis)).url
    names: Any = None if only is None else [name for name in only.split(",") if name]
    names = "all" if names == ["all"] else names
    name = shop or _shop(repository, catalogue)

    def connected() -> EventWriter:
        return EventWriter(url, name, only=names, repository=repository, home=catalogue)

    events = Tail()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a daemon's end is no failure: it counts, too
    with contextlib.suppress(KeyboardInterrupt):
        if follow and file != "-":
            _follow(events, connected, Path(file), offset or Path(f"{file}.offset"))
        else:
            with connected() as events.writer, _opened(file) as descriptor:
                events.run(_lines(descriptor))
    events.print_counts(as_json)
    if events.bad:
        sys.exit(2)


def _follow(events: Tail, connected: Callable[[], EventWriter], file: Path, state: Path) -> None:
    """Takes lines of a file for ever."""
    from clients.cli.following import FollowedFile, patiently

    followed = FollowedFile(file, state)
    with contextlib.closing(followed), patiently(connected) as events.writer:
        events.guard, events.keep = patiently, followed.keep
        events.run(followed.lines())


class Tail:
    """Takes lines, writes rows, and counts both."""

    writer: EventWriter

    def __init__(self) -> None:
        self.guard: Callable[[Callable[[], Outcome]], Outcome] = lambda write: write()
        self.keep: Callable[[], None] = lambda: None  # called when all lines so far are written
        self.lines = self.changed = self.unchanged = self.unknown = self.bad = 0
        self.left_out: set[str] = set()

    def run(self, lines: Iterator[bytes | None]) -> None:
        """Takes lines until they end, or for ever; what was read is written before more is waited for."""
        batch: list[Event] = []
        for line in lines:
            if line is not None:
                self._take(line, batch)
            if line is None or len(batch) >= _BATCH:
                self._flush(batch)
                self.keep()
        self._flush(batch)

    def _take(self, line: bytes, batch: list[Event]) -> None:
        """Puts a line's event into the batch, or writes its item's numbers at once; names a bad line."""
        from clients.event_checks import ItemUpdate
        from ensemble.errors import InvalidArgument

        self.lines += 1
        if not line.strip():
            return
        try:
            change = parse_line(line)
            if isinstance(change, ItemUpdate):
                self._add(self.guard(lambda: self.writer.update_item(change)))
            else:
                batch.append(change)
        except InvalidArgument as error:
            self.bad += 1
            if self.bad <= _SHOWN:
                print(f"line {self.lines}: {error}; skipped", file=sys.stderr)

    def _flush(self, batch: list[Event]) -> None:
        """Writes the events of the batch and empties it."""
        if batch:
            self._add(self.guard(lambda: self.writer.record_events(batch)))
            batch.clear()

    def _add(self, outcome: Outcome) -> None:
        """Counts what came of a write, and names the first unknown items."""
        self.changed += outcome.changed
        self.unchanged += outcome.unchanged
        self.unknown += len(outcome.unknown_items)
        for name in sorted(set(outcome.left_out) - self.left_out)[: max(0, _SHOWN - len(self.left_out))]:
            print(
                f"event {name!r} enters no past, by the shop's history; its events are left out (--only NAME "
                "or --only all lets them in)",
                file=sys.stderr,
            )
        self.left_out |= set(outcome.left_out)
        for item in outcome.unknown_items[: max(0, _SHOWN - self.unknown + len(outcome.unknown_items))]:
            print(f"item {item!r} is in no loaded release; its events are skipped", file=sys.stderr)

    def print_counts(self, as_json: bool) -> None:
        """Prints how many lines there were and what came of them."""
        numbers = {name: getattr(self, name) for name in ("lines", "changed", "unchanged", "unknown", "bad")}
        if as_json:
            print(json_text({**numbers, "left_out": sorted(self.left_out)}))
            return
        print(f"{self.lines:,} lines: {self.changed:,} rows written, {self.unchanged:,} knew it")
        print(f"  skipped: {self.unknown:,} unknown items, {self.bad:,} bad lines")


def parse_line(line: bytes) -> Event | ItemUpdate:
    """Reads and checks one JSON line; InvalidArgument says what is wrong with it."""
    from clients.event_checks import Event, ItemUpdate, check_event
    from ensemble.errors import InvalidArgument
    from ensemble.time_rule import check_time

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
    moment, _ = check_time(raw["time"])
    if not is_event:
        parts = {name: raw[name] for name in ("features", "codes", "values") if name in raw}
        _check_parts(parts)
        return ItemUpdate(raw["item_id"], moment, **parts)
    event = Event(raw["user_id"], raw["item_id"], raw["event"], moment)
    check_event(event)
    return event


def _check_parts(parts: dict[str, Any]) -> None:
    """Refuses an item's numbers that are not of the kind of JSON value that they must be."""
    from ensemble.errors import InvalidArgument

    for name, part in parts.items():
        if not isinstance(part, list if name == "features" else dict):
            raise InvalidArgument(f"{name}: must be a JSON {'array' if name == 'features' else 'object'}")


def _lines(descriptor: int) -> Iterator[bytes | None]:
    """Gives whole lines, and None whenever there is nothing more for now. readline would wait with lines in
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
        if held:
            yield held  # the last line, or one that cannot be an event
            held = b""
        if not data:
            return


@contextlib.contextmanager
def _opened(file: str) -> Iterator[int]:
    """Opens a file, or standard input for "-", and gives its descriptor."""
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


def _shop(repository: Path, home: Path | None) -> str:
    """Gives the name of the active release's shop; ReleaseError where no release is active."""
    from ensemble.cli.options import active_or_named
    from ensemble.errors import ReleaseError
    from ensemble.release.release import open_release

    try:
        return open_release(repository, active_or_named(repository, home=home)).schema.shop
    except ReleaseError as error:
        raise ReleaseError(f"--shop is not given, and {error.fact}", "name the shop with --shop") from None
