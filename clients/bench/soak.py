"""Measures whether a server that is asked for minutes on end grows, or becomes slower.

    python -m clients.bench.soak --repository REPOSITORY [--minutes 10] [--ways ensemble,fused] [--json F]

It asks at 60% of what a closed loop gets (open loop), as clients.bench.starred does, holds each answer
against the healthy list, and looks at the server every five seconds. A slope is that of the straight line
nearest to all looks but those of the first fifth, when memories still fill.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from clients.bench.inputs import WAYS, check_ways, working_copy
from clients.bench.machine import machine
from clients.bench.starred.load import Bench, Note, some_users
from ensemble.errors import InvalidInput, PeregrineError
from ensemble.json_text import json_text
from ensemble.release.release import open_release
from ensemble.release.repository import require_active, require_folder
from ensemble.server.options import ServeOptions
from ensemble.server.supervisor import Server, serve

_EVERY_S, _WARM_SHARE = 5.0, 0.2
_MOST_MB_A_MINUTE = 1.0  # the target
Row = dict[str, Any]


def _look(server: Server, began: float) -> dict[str, float]:
    """Counts what a server has of what may leak."""
    resident, proportional = server.memory_bytes()
    pids = [server.pid, *(pid for some in server.stubs().values() for pid in some)]
    files = sum(len(list(Path(f"/proc/{pid}/fd").iterdir())) for pid in pids)
    threads = sum(len(list(Path(f"/proc/{pid}/task").iterdir())) for pid in pids)
    at = (time.monotonic() - began) / 60
    return {
        "minute": at,
        "rss_mb": resident / 1e6,
        "pss_mb": proportional / 1e6,
        "files": files,
        "threads": threads,
    }


def _slope(looks: list[dict[str, float]], name: str) -> float:
    """Gives how much a number grows a minute."""
    late = looks[int(_WARM_SHARE * len(looks)) :]
    minutes = [one["minute"] for one in late]
    return float(np.polyfit(minutes, [one[name] for one in late], 1)[0]) if len(late) > 2 else 0.0


def _row(way: str, bench: Bench, notes: list[Note], began: float, looks: list[dict[str, float]]) -> Row:
    """Sums up one way of serving."""
    row = {"way": way, "rate": round(bench.rate, 1), **bench.row("soak", notes, began)}
    took = np.array([(due - began, 1e3 * (done - due)) for due, done, *_ in notes if due >= began])
    halves = np.array_split(took[:, 1], 2)
    row["p50_ms"], row["p99_ms"] = (
        [round(float(np.percentile(half, q)), 1) for half in halves] for q in (50, 99)
    )
    row["rss_mb"] = [round(looks[0]["rss_mb"]), round(looks[-1]["rss_mb"])]
    for name in ("rss_mb", "pss_mb", "files", "threads"):
        row[f"{name}_a_minute"] = round(_slope(looks, name), 3)
    row["minutes"], row["looks"] = round(looks[-1]["minute"], 1), looks
    return row


def misses(row: Row) -> list[str]:
    """Names the targets that a row misses."""
    missed = [f"{name} {row[name]}" for name in ("failed", "wrong", "lost") if row[name]]
    if row["rss_mb_a_minute"] > _MOST_MB_A_MINUTE:
        missed.append(f"{row['rss_mb_a_minute']:.2f} MB a minute")
    return missed


def table(rows: list[Row]) -> str:
    """Writes the rows as a Markdown table; a / b: of the halves, or the first and last look."""
    head = [
        "way",
        "minutes",
        "a second",
        "sent",
        "degraded",
        "failed",
        "wrong",
        "lost",
        "p50 ms",
        "p99 ms",
        "MB",
    ]
    head += ["MB a minute (own)", "files, threads a minute", "verdict"]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        cells = [
            row[name] for name in ("way", "minutes", "rate", "sent", "degraded", "failed", "wrong", "lost")
        ]
        cells += [" / ".join(map(str, row[name])) for name in ("p50_ms", "p99_ms", "rss_mb")]
        cells += [f"{row['rss_mb_a_minute']} ({row['pss_mb_a_minute']})"]
        cells += [f"{row['files_a_minute']}, {row['threads_a_minute']}"]
        verdict = ", ".join(misses(row))
        lines.append([*cells, f"FAIL: {verdict}" if verdict else "PASS"])
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def measure(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Asks a server of each way for the given time."""
    name, rows = require_active(given.repository), list[Row]()
    copy = working_copy(given.repository, folder / "repository")
    for way in given.ways:
        bench = Bench(3.0, some_users(open_release(copy, name)))
        options = ServeOptions(port=0, metrics_port=None, fused=way == "fused", state=folder / way)
        with serve(copy, options) as server:
            bench.urls, looks = [server.url], list[dict[str, float]]()
            bench.learn(server.url)

            def watch(server: Server = server, looks: list[dict[str, float]] = looks, way: str = way) -> None:
                began = time.monotonic()
                while time.monotonic() - began < 60 * given.minutes:
                    time.sleep(min(_EVERY_S, 6 * given.minutes))
                    looks.append(_look(server, began))
                    said = f"{way}: minute {looks[-1]['minute']:.1f}, {looks[-1]['rss_mb']:.0f} MB"
                    print(f"\r{said}", end="", file=sys.stderr, flush=True)
                print(file=sys.stderr)

            notes, began = bench.run(watch)
        rows.append(_row(way, bench, notes, began, looks))
    return {
        **machine(),
        "release": name,
        "rows": rows,
        "missed": {row["way"]: misses(row) for row in rows if misses(row)},
    }


def main(arguments: list[str] | None = None) -> None:
    """Asks, prints the table; exit code 1 if a target is missed, 2 if it cannot be done."""
    parser = argparse.ArgumentParser(
        prog="python -m clients.bench.soak",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--repository", type=Path, default=Path("model_repository"))
    parser.add_argument("--minutes", type=float, default=10.0, help="for each way")
    parser.add_argument("--ways", type=lambda text: text.split(","), default=[*WAYS], help=",".join(WAYS))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers, each look's too")
    given = parser.parse_args(arguments)
    try:
        if given.minutes <= 0:
            raise InvalidInput(f"--minutes: must be above 0, got {given.minutes:g}")
        check_ways(given.ways)
        require_folder(given.repository)
        with tempfile.TemporaryDirectory(prefix="peregrine-soak-") as folder:
            figures = measure(given, Path(folder))
        if given.json:
            given.json.write_text(json_text(figures, indent=1) + "\n", encoding="utf-8")
    except (PeregrineError, OSError, EOFError) as error:
        parser.exit(2, f"error: {str(error) or 'the process that asks has ended'}\n")
    print(table(figures["rows"]))
    sys.exit(1 if figures["missed"] else 0)


if __name__ == "__main__":
    main()
