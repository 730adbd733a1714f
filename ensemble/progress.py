"""Shows how far long work is: a bar on a terminal; elsewhere, as in a log, a line now and then."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

Update = Callable[[str, float], None]  # what is being done, and the share of it all that is done (0..1)
_OF_REQUEST = re.compile(r"release (\S+), request (\S+): ")  # as ensemble/request_log.py writes it
_QUIET_S = 2.0  # work that takes no longer says nothing
_APART_S, _AT_LEAST_EVERY_S = 1.0, 30.0  # between two lines; between two of the same words


def say(line: str) -> None:
    """Prints a line to stderr at once."""
    print(line, file=sys.stderr, flush=True)


def log_of(as_json: bool) -> Callable[[str], None]:
    """Gives what writes a log's lines to stderr, each with time (UTC) and level; as JSON if that is asked
    for. A line that begins with "WARNING: " or "ERROR: " is of that level; as JSON, one of a request has its
    release and id as fields."""

    def log(line: str) -> None:
        level, message = next(
            ((name, line[len(name) + 2 :]) for name in ("WARNING", "ERROR") if line.startswith(f"{name}: ")),
            ("INFO", line),
        )
        at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        if as_json:
            fields = {"time": at, "level": level.lower()}
            if of := _OF_REQUEST.match(message):
                fields |= {"release": of[1], "request": of[2]}
            say(json.dumps({**fields, "message": message[of.end() if of else 0 :]}))
        else:
            say(f"{at} {line}")

    return log


@contextmanager
def bar(text: str, console: Console | None = None) -> Iterator[Update]:
    """Gives `update(step, share)`, which shows what is being done and how much of it is done."""
    from rich.console import Console

    console = console or Console(stderr=True)
    if not console.is_terminal:
        lines = Lines(text, lambda line: console.print(line, soft_wrap=True, markup=False, highlight=False))
        yield lines.update
        lines.end()
        return
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (
        SpinnerColumn(),
        TextColumn("{task.fields[text]:<11}"),
        BarColumn(bar_width=30),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=1.0, text=text)
        yield lambda step, share: progress.update(task, description=step, completed=share)


class Lines:
    """Says in lines how far work is: one for each step, and one every half minute within a step."""

    def __init__(
        self, text: str, say: Callable[[str], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._text, self._say, self._clock = text, say, clock
        self._start = clock()
        self._last, self._step = float("-inf"), ""

    def update(self, step: str, share: float) -> None:
        """Says it, unless it would come too soon after the line before."""
        now = self._clock()
        apart_s = _APART_S if step != self._step else _AT_LEAST_EVERY_S
        if now - self._start < _QUIET_S or now - self._last < apart_s:
            return
        self._last, self._step = now, step
        self._say(f"{self._text}: {step} ({share:.0%}, {now - self._start:.0f} s)")

    def end(self) -> None:
        """Says how long it took, if it was long."""
        took_s = self._clock() - self._start
        if took_s >= _QUIET_S:
            self._say(f"{self._text}: done in {took_s:.0f} s")
