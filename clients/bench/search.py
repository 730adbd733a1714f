"""Measures searches of a real server: by text, by picture and by both, alone and at saturation.

    python -m clients.bench.search --repository REPOSITORY --shop SHOP [--seconds S] [--ways W] [--json F]

Serves a copy of the repository as an ensemble and fused. Texts are titles of the release's items, and two
words of them; pictures are the first files of SHOP/images. `lone`: one request at a time; `many`: so many in
flight, which is what the server can give.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from clients.bench.inputs import WAYS, check_ways, working_copy
from clients.bench.loadgen import Load, prepare, users_file_of
from clients.bench.machine import machine
from clients.bench.server_probe import ServerProbe
from ensemble.errors import InvalidInput, PeregrineError
from ensemble.json_text import json_text
from ensemble.progress import say
from ensemble.release.release import Release, open_release
from ensemble.release.repository import require_active, require_folder
from ensemble.server.options import ServeOptions
from ensemble.server.supervisor import Server, serve

_ASKED = 200  # distinct texts
_PICTURES = 50
Row = dict[str, Any]


def texts_of(release: Release) -> list[str]:
    """Gives titles of items, every other one cut to two words."""
    titles = [bytes(title).decode(errors="replace") for title in release.item_titles[1 : _ASKED + 1]]
    return [title if at % 2 else " ".join(title.split()[:2]) for at, title in enumerate(titles) if title]


def pictures_of(shop: Path) -> list[str]:
    """Names the first pictures of a shop; InvalidInput where it has none."""
    found = sorted(path for path in (shop / "images").glob("*") if path.is_file())[:_PICTURES]
    if not found:
        raise InvalidInput(f"--shop {shop}: there is no file in {shop / 'images'}")
    return [str(path) for path in found]


def measure(given: argparse.Namespace) -> list[Row]:
    """Gives a row for each way of serving, kind of query and load."""
    name, rows = require_active(given.repository), list[Row]()
    pictures = pictures_of(given.shop)
    for way in given.ways:
        with tempfile.TemporaryDirectory(prefix="peregrine-search-") as folder:
            copy = working_copy(given.repository, Path(folder) / "repository")
            release = open_release(copy, name)
            queries = {"text": (texts_of(release), []), "picture": ([], pictures)}
            queries["both"] = (queries["text"][0], pictures)
            options = ServeOptions(port=0, metrics_port=None, fused=way == "fused")
            with serve(copy, options, say) as server:
                for kind, (texts, images) in queries.items():
                    for load, concurrency in (("lone", 1), ("many", given.concurrency)):
                        asked = Load(
                            server.url, users_file_of(release.path), given.seconds, concurrency=concurrency,
                            texts=texts, pictures=images,
                        )  # fmt: skip
                        rows.append({"way": way, "query": kind, "load": load, **_measured(server, asked)})
    return rows


def _measured(server: Server, load: Load) -> Row:
    """Puts the load on the server; gives its latencies, and the server's CPU for each list."""
    probe, run = ServerProbe(server.url, {}, server.pid), prepare(load.to_spec())
    before = probe.cpu_s()
    row = run()
    after, answered = probe.cpu_s(), max(1, row["sent"] - row["failed"])
    cpu_ms = float("nan") if after is None or before is None else 1e3 * (after - before) / answered
    return {**row, "cpu_ms": cpu_ms}


def table(rows: list[Row]) -> str:
    """Writes the rows as a Markdown table."""
    head = ["served", "query", "load", "lists/s", "p50 ms", "p99 ms", "CPU ms a list", "failed"]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        figures = [f"{row[name]:.1f}" for name in ("achieved_per_s", "p50_ms", "p99_ms", "cpu_ms")]
        lines.append([row["way"], row["query"], row["load"], *figures, str(row["failed"])])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main(arguments: list[str] | None = None) -> None:
    """Measures and prints the table; exit code 2 if it cannot be done."""
    parser = argparse.ArgumentParser(
        prog="python -m clients.bench.search",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--repository", type=Path, default=Path("model_repository"))
    parser.add_argument("--shop", type=Path, required=True, help="the shop's folder, with images/")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each row")
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), metavar="WAY", help=", ".join(WAYS))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers")
    given = parser.parse_args(arguments)
    try:
        check_ways(given.ways)
        require_folder(given.repository)
        rows = measure(given)
        if given.json:
            given.json.write_text(json_text({**machine(), "rows": rows}, indent=1) + "\n", encoding="utf-8")
    except (PeregrineError, OSError) as error:
        parser.exit(2, f"error: {error}\n")
    print(table(rows))


if __name__ == "__main__":
    main()
