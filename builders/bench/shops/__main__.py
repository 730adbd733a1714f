"""Says whether the product still ranks real shops as well as it did: builds each, measures it, compares.

    python -m builders.bench.shops SHOP... --out FOLDER [--preset base] [--seed 0] [--against FOLDER]
        [--force] [--json]

A first run makes a record of each SHOP, a folder with shop.toml, which goes by the folder's name:

    python -m builders.bench.shops shops/beauty shops/retailrocket --out records/old

A later one, of newer code, is held against it:

    python -m builders.bench.shops shops/beauty shops/retailrocket --out records/new --against records/old

Each shop is built by `peregrine build --no-refit` in a process of its own, from nothing, in
FOLDER/repositories/SHOP: what is served is then the model that the held-out rows judge. FOLDER/SHOP.json has
the figures (NDCG@10, HR@10 and recall@K of the served list, recall's order, the user encoder alone, the kNN
and popularity; AUC and ECE, or RMSE, of tasks beside two rates and boosting; what lists are worth), what is
served, what the build took, the code's commit, machine and date. FOLDER/SHOP.parquet and SHOP.tasks.parquet
have the rows behind them (record.py says which), FOLDER/SHOP.log the build's lines.

--against says of each figure whether it is surely better, surely worse, or no difference is seen: a 95%
interval by a bootstrap over the users of both runs. It is of the users that were asked, not of the training's
luck: code that draws otherwise may be surely worse as another seed may, so ask --seed 1 of both, too. The
same code, seed and machine give the same figures.

A shop that is done is not built again unless --force is given; a run that was stopped goes on where it was.
Exit code 1: something is surely worse or is no longer measured, something else is served than before (the
order of lists, the deep path, recall's sources), or nothing came out of a shop. 2: the command cannot be run
so. A cron job needs no more than that.
"""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from builders.bench.shops.against import Change, Comparison, compared
from builders.bench.shops.building import Built, build
from builders.bench.shops.record import (
    CHAIN,
    NEXT,
    RANKER,
    WAYS,
    Figure,
    Record,
    forget,
    is_done,
    measure,
    read_record,
    repository_of,
    write_record,
)
from builders.folders import SOURCES
from builders.keys import code_digest
from builders.settings import named_preset
from ensemble.engines.onnx import CPU_FACTS
from ensemble.errors import InvalidInput, PeregrineError
from ensemble.json_text import json_text
from ensemble.progress import bar, say


def main(arguments: list[str] | None = None) -> None:
    """Measures the shops, and ends with the exit code that the first lines of this file name."""
    parser = argparse.ArgumentParser(
        prog="builders.bench.shops", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shops", type=Path, nargs="+", metavar="SHOP")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--against", type=Path, metavar="FOLDER", help="an earlier run's --out")
    parser.add_argument("--preset", default="base", help="of peregrine build: tiny, base or a file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--force", action="store_true", help="build what is done again, from nothing")
    parser.add_argument("--json", action="store_true", help="print one JSON document, not tables")
    given = parser.parse_args(arguments)
    try:
        shops = _named(given.shops)
        _refuse_unlike(given, shops)
        given.out.mkdir(parents=True, exist_ok=True)
    except (PeregrineError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    try:
        sys.exit(_run(given, shops))
    except KeyboardInterrupt:
        say("stopped; the same command goes on where it was")
        sys.exit(130)


def _named(folders: list[Path]) -> dict[str, Path]:
    """Gives the shops by the last part of their folders' paths; InvalidInput for two of one name."""
    shops: dict[str, Path] = {}
    for folder in folders:
        name = folder.resolve().name
        if name in shops:
            raise InvalidInput(
                f"{folder} and {shops[name]} are both {name!r}", "give one folder another name"
            )
        shops[name] = folder
    return shops


def _refuse_unlike(given: argparse.Namespace, shops: dict[str, Path]) -> None:
    """Raises InvalidInput where --against has no shop of these, or --out has a record of other options."""
    preset = named_preset(given.preset).name
    if given.against is not None and not any(is_done(given.against, name) for name in shops):
        raise InvalidInput(
            f"--against {given.against}: has no record of {', '.join(shops)}",
            "name the --out of an earlier run",
        )
    if given.against is not None and given.against.resolve() == given.out.resolve():
        raise InvalidInput(f"--against {given.against}: is --out itself", "name the --out of an earlier run")
    for name in shops:
        if is_done(given.out, name) and not given.force:
            facts = read_record(given.out, name).facts
            asked = {"preset": preset, "seed": given.seed}
            there = {"preset": facts["release"]["preset"], "seed": facts["seed"]}
            if asked != there:
                raise InvalidInput(
                    f"--out {given.out}: its record of {name} is of preset {there['preset']} and seed "
                    f"{there['seed']}, not {asked['preset']} and {asked['seed']}",
                    "name another folder, or --force",
                )


def _run(given: argparse.Namespace, shops: dict[str, Path]) -> int:
    """Takes the shops one after another: the exit code."""
    document: dict[str, Any] = {}
    is_bad = False
    for at, (name, folder) in enumerate(shops.items(), 1):
        say(f"{name}: shop {at} of {len(shops)}")
        try:
            record = _record(given, name, folder)
            comparison = _compared(given, name, record)
        except (PeregrineError, OSError) as error:
            document[name] = {"error": str(error)}
            line, is_bad = f"nothing came out: {error}", True
        else:
            document[name] = _plain(record, comparison)
            is_bad |= comparison is not None and comparison.is_bad
            if not given.json:
                _show(name, record, comparison)
            line = _line(record, comparison)
        (say if given.json else print)(f"{name}: {line}")
    if given.json:
        print(json_text({"shops": document, "is_bad": is_bad}, indent=1))
    return int(is_bad)


def _record(given: argparse.Namespace, name: str, shop: Path) -> Record:
    """Gives the shop's record: the one that is there, or a new one."""
    if given.force:
        forget(given.out, name)
    if is_done(given.out, name):
        record, now = read_record(given.out, name), _code()
        made = record.facts["code"]
        say(f"{name}: is done, by the code of {_words(made)}; --force builds it again")
        if made["digest"] != now["digest"]:
            say(f"{name}: warning: the code is another one by now, {_words(now)}")
        return record
    if not shop.is_dir():
        raise InvalidInput(f"{shop}: no such folder", "name the folder that holds shop.toml")
    code, where, begun = _code(), _machine(), time.strftime("%Y-%m-%d %H:%M:%S%z")
    log, repository = given.out / f"{name}.log", repository_of(given.out, name)
    built = build(shop, repository, given.preset, given.seed, log, lambda line: say(f"{name}: {line}"))
    facts = {"shop": str(shop), "code": code, "machine": where, "date": begun}
    facts["command"] = shlex.join(["python", "-m", "builders.bench.shops", *sys.argv[1:]])
    return record_release(built, facts, given.out, name)


def record_release(built: Built, facts: dict[str, Any], out: Path, name: str) -> Record:
    """Asks a release that a build has made, and writes its record with `facts` of where it came from."""
    with bar(f"{name}: asking") as update:
        record = measure(built.repository, built.release, lambda share, text: update(text, share))
    record = replace(record, facts={**facts, **record.facts, "build": built.cost})
    write_record(record, out, name)
    return record


def _compared(given: argparse.Namespace, name: str, record: Record) -> Comparison | None:
    """Holds a record against the earlier one, if there is one."""
    if given.against is None:
        return None
    if not is_done(given.against, name):
        say(f"{name}: {given.against} has no record of it: nothing to compare with")
        return None
    return compared(read_record(given.against, name), record)


# --- where


def _code() -> dict[str, Any]:
    """Gives the commit of the code, whether files of it are changed since, and a digest of what builds."""
    commit, changed = _git("rev-parse", "HEAD"), _git("status", "--porcelain", "--untracked-files=no")
    digest = code_digest("builders.build")
    return {"commit": commit, "changed": None if changed is None else bool(changed), "digest": digest}


def _git(*words: str) -> str | None:
    """Asks git about the source tree; None where there is no git, or no clone."""
    if shutil.which("git") is None:
        return None
    done = subprocess.run(["git", "-C", str(SOURCES), *words], capture_output=True, text=True, check=False)
    return None if done.returncode else done.stdout.strip()


def _words(code: dict[str, Any]) -> str:
    commit = code["commit"] and f"commit {code['commit'][:7]}{', changed' * bool(code['changed'])}"
    return commit or f"digest {code['digest'][:12]}"


def _machine() -> dict[str, Any]:
    """Gives the CPU, its cores, and how busy the machine was before."""
    lines = CPU_FACTS.read_text().splitlines() if CPU_FACTS.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    cpu = names[0] if names else platform.processor() or platform.machine()
    return {"cpu": cpu, "cores": os.cpu_count(), "load_average_1min": os.getloadavg()[0]}


# --- what is printed


def _plain(record: Record, comparison: Comparison | None) -> dict[str, Any]:
    found = {**record.facts, "figures": [asdict(figure) for figure in record.figures]}
    return found | (
        {} if comparison is None else {"against": asdict(comparison) | {"is_bad": comparison.is_bad}}
    )


def _show(name: str, record: Record, comparison: Comparison | None) -> None:
    """Prints a shop's table and what it serves."""
    from rich.console import Console
    from rich.table import Table

    console = Console() if sys.stdout.isatty() else Console(width=150)
    heads = ["of", "way", "figure", "value", "95% interval"]
    heads += [] if comparison is None else ["before", "difference", "its 95% interval", ""]
    table = Table(title=name, title_justify="left", box=None, pad_edge=False)
    for head in heads:
        table.add_column(head, justify="left" if head in ("of", "way", "figure", "") else "right")
    changes = {} if comparison is None else {(c.of, c.way, c.figure): c for c in comparison.changes}
    for row in _rows(record, changes, comparison is not None):
        table.add_row(*row)
    console.print(table)
    serves = "; ".join(f"{what}: {of}" for what, of in record.facts["serves"].items())
    lines = [f"serves {serves}", *(() if comparison is None else comparison.notes)]
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _rows(
    record: Record, changes: dict[tuple[str, str, str], Change], is_compared: bool
) -> Iterator[list[str]]:
    """Gives a row a figure: of this run, with what became of it; then what only the earlier run has."""
    for figure in record.figures:
        yield [figure.of, WAYS.get(figure.way, figure.way), figure.figure, *_value(figure)] + (
            _cells(changes.pop(figure.name, None)) if is_compared else []
        )
    for change in changes.values():
        value = _number(change.after, change.figure)
        yield [change.of, WAYS.get(change.way, change.way), change.figure, value, "", *_cells(change)]


def _value(figure: Figure) -> list[str]:
    interval = "" if figure.low is None else f"[{figure.low:.4f}, {figure.high:.4f}]"
    return [_number(figure.value), interval]


def _cells(change: Change | None) -> list[str]:
    if change is None:
        return ["", "", "", "new"]
    interval = "" if change.low is None else f"[{change.low:+.4f}, {change.high:+.4f}]"
    difference = _number(change.difference, change.figure)
    plus = "+" * bool(change.difference is not None and change.difference >= 0)
    return [_number(change.before, change.figure), plus + difference, interval, change.verdict]


def _number(value: float | None, figure: str = "") -> str:
    if value is None:
        return "-"
    if figure == "peak_bytes":
        return f"{value / 2**20:,.0f} MiB"
    return f"{value:.1f}" if figure.endswith("seconds") else f"{value:.4f}"


def _line(record: Record, comparison: Comparison | None) -> str:
    """Gives a shop's last line: what became of it; without an earlier run, its main figures."""
    named = [(_short(figure), figure) for figure in record.figures]
    parts = [f"{name} {_number(figure.value)}" for name, figure in named if name]
    cost, code = record.facts["build"], record.facts["code"]
    there = f", {len(cost['skipped'])} of its stages were there" if cost["skipped"] else ""
    took = f"{cost['cpu_seconds']:.0f} s of CPU ({cost['seconds']:.0f} s{there})"
    took += f", {cost['peak_bytes'] / 2**20:,.0f} MiB, {_words(code)}"
    if comparison is not None:
        return f"{comparison.line()}; {took}"
    return f"{', '.join(parts)}; {took}"


def _short(figure: Figure) -> str:
    """Names one of the main figures; "" for the others."""
    if figure.of == NEXT and figure.figure == "ndcg@10" and figure.way in (CHAIN, "recall"):
        return f"NDCG@10 of {WAYS[figure.way]}"
    if figure.way == RANKER and figure.figure in ("auc", "rmse"):
        return f"{figure.figure.upper()} of {figure.of}"
    return ""


if __name__ == "__main__":
    main()
