"""Writes a release's report as one HTML page that needs nothing else, and its figures as PNG files."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from builders.compress.recipe import Gate
from builders.compress.results import CompressionReport
from builders.learning import learning_lines
from builders.report import figures
from builders.report.made import beside_simple_ways, groups, how_built, sources
from builders.report.markup import escaped, number, table_of
from builders.search.page import search_note, search_table
from builders.verify.data_facts import data_notes, data_table
from builders.verify.first_clicks import FIRST_CLICKS, first_click_table
from builders.verify.markdown import (
    NEXT_ITEMS,
    WAYS,
    WORTH_WAYS,
    calibration_note,
    headline,
    worth_note,
    worth_table,
)
from builders.verify.shown import variety_note, variety_table

Figures = dict[str, bytes]  # name without suffix -> PNG
_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;color:#222;background:#fff}
body{max-width:1040px;margin:2.5rem auto;padding:0 1.25rem}
h1{font-size:1.7rem;margin:0}
h2{font-size:1.2rem;margin:2.4rem 0 .5rem;border-bottom:1px solid #ddd;padding-bottom:.25rem}
h3{font-size:1rem;margin:1.4rem 0 .3rem}p{margin:.4rem 0;max-width:46rem}.facts{color:#666}
table{border-collapse:collapse;font-size:.86rem;margin:.6rem 0;font-variant-numeric:tabular-nums}
th,td{padding:.22rem .8rem .22rem 0;text-align:right;white-space:nowrap}
th:first-child,td:first-child{text-align:left}
th{border-bottom:1px solid #999;font-weight:600}td{border-bottom:1px solid #eee}
.FAIL{color:#D55E00;font-weight:700}.WARN{color:#9a6a00;font-weight:700}.reported{color:#767676}
.headline{font-size:1.15rem;max-width:52rem;border-left:4px solid #0072B2;padding-left:.8rem}
img{max-width:100%;margin:.4rem 0}.scroll{overflow-x:auto}
.tiles{display:flex;flex-wrap:wrap;gap:.8rem;margin:.8rem 0}
ol{margin:0;padding-left:1.6rem}
.lists td,.lists th{text-align:left;vertical-align:top;white-space:normal;width:45%}
.lists td:first-child,.lists th:first-child{width:10%}
.pictured{clear:left;min-height:60px}
.picture{float:left;width:56px;height:56px;margin:0 .5rem 0 0;background:#fff center/contain no-repeat}
.tile{border:1px solid #ddd;border-radius:6px;padding:.5rem .9rem}
.tile b{display:block;font-size:1.25rem}.tile span{color:#666;font-size:.82rem}
"""


def release_figures(report: Mapping[str, Any]) -> Figures:
    """Draws every figure that the report has the numbers for."""
    found: Figures = {}
    if worth := (report.get("worth") or {}).get("ways"):
        found["worth"] = figures.png(partial(figures.worth, worth, WORTH_WAYS))
    ways = report.get("ranking", {}).get("ways", {})
    if ways:
        sure = report.get("baselines", {}).get("ranking", {}).get("ndcg@10", {}).get("ways")
        found["ranking"] = figures.png(partial(figures.ranking, ways, WAYS, sure))
    learned = {name: report[name] for name in ("encoders", "ranker") if report.get(name, {}).get("curve")}
    if learned:
        found["learning"] = figures.png(partial(figures.learning, learned))
    if report.get("calibration"):
        found["calibration"] = figures.png(partial(figures.calibration, report["calibration"]))
    if report.get("compress"):
        found |= _compression_figures(report["compress"])
    return found


def _compression_figures(compress: CompressionReport) -> Figures:
    found: Figures = {}
    limit = compress["plan"].get("gate", {}).get("ranking", Gate().ranking)
    for (model, runtime), variants in _by_engine(compress["variants"]):
        found[f"pareto_{model}_{runtime}"] = figures.png(partial(figures.pareto, variants, limit))
    for (model, runtime), nodes in _by_engine(compress["nodes"]):
        found[f"precision_{model}_{runtime}"] = figures.png(partial(figures.precision_map, nodes))
    for runtime, gate in compress["gates"].items():
        found[f"gate_{runtime}"] = figures.png(partial(figures.gate, gate["rows"]))
        if gate["timings"]:
            found[f"latency_{runtime}"] = figures.png(partial(figures.latency, gate["timings"]))
    return found


def _by_engine(rows: Sequence[Any]) -> Iterator[tuple[tuple[str, str], list[Any]]]:
    """Gives ((model, runtime), their rows) in the order in which they first come."""
    for key in dict.fromkeys((row["model"], row["runtime"]) for row in rows):
        yield key, [row for row in rows if (row["model"], row["runtime"]) == key]


def write_figures(found: Figures, folder: Path) -> list[Path]:
    """Writes each figure as a PNG into `folder`; gives their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.png" for name in found]
    for path, picture in zip(paths, found.values(), strict=True):
        path.write_bytes(picture)
    return paths


def page(manifest: Mapping[str, Any], found: Figures) -> str:
    """Writes a release's manifest as one page, with the figures inside it."""
    report = manifest["report"]
    title = f"{manifest['shop']}: release {manifest['release']}"
    facts = " · ".join(
        f"{name} {manifest[name]}" for name in ("created", "preset", "seed", "peregrine") if name in manifest
    )
    parts = [
        f"<h1>{escaped(title)}</h1>",
        f'<p class="facts">{escaped(facts)}</p>',
        *_worth(report, found),
        *_ranking(report, found),
        *_tasks(report, found),
        *beside_simple_ways(report),
        *groups(report),
        *_shown(report),
        *_first_clicks(report),
        *_search(report),
        *_recall(report),
        *_learning(report, found),
        *_data(report),
        *_trained(manifest),
        *how_built(manifest),
    ]
    parts += ["<h2>Compression</h2>"]
    if report.get("compress"):
        parts += _compression(report["compress"], found)
    else:
        parts.append(
            "<p>This release is not compressed: its engines are served as they were exported, in fp32.</p>"
        )
    return document(title, parts)


def document(title: str, parts: Sequence[str]) -> str:
    """Writes a page that needs nothing else; `parts` are HTML."""
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{escaped(title)}</title><style>{_STYLE}</style>"
    )
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n'
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def _worth(report: Mapping[str, Any], found: Figures) -> list[str]:
    """Opens the page: what the lists are worth, in a sentence, and how that was measured."""
    worth, text = report.get("worth") or {}, headline(report)
    parts = [f'<p class="headline">{escaped(text)}</p>'] if text else []
    if not worth.get("ways"):
        return parts
    table = table_of(*worth_table(worth))
    note = f"<p>{escaped(worth_note(worth))}</p>"
    return [*parts, "<h2>What the lists are worth</h2>", *_image(found, "worth"), note, table]


def _ranking(report: Mapping[str, Any], found: Figures) -> list[str]:
    ranking = report.get("ranking", {})
    ways = ranking.get("ways", {})
    if not ways:
        return ["<h2>Ranking</h2>", "<p>This shop has no held-out next items.</p>"]
    rows = [[WAYS.get(name, name), *(f"{value:.4f}" for value in of.values())] for name, of in ways.items()]
    parts = [
        f"<h2>Ranking of {ranking['users']:,} held-out next items</h2>",
        f"<p>{escaped(NEXT_ITEMS)}</p>",
        *_image(found, "ranking"),
        table_of(["", *next(iter(ways.values()))], rows),
    ]
    difference = ranking.get("chain_minus_recall_ndcg@10")
    if difference:
        interval = (
            f"{difference['mean']:+.5f}, 95% interval [{difference['low']:+.5f}, {difference['high']:+.5f}]"
        )
        parts.append(f"<p>Chain minus recall, NDCG@10: {interval} (paired bootstrap over users).</p>")
    return parts


def _search(report: Mapping[str, Any]) -> list[str]:
    """Says what a search finds, and by what."""
    if not (found := report.get("search")):
        return []
    return ["<h2>Search</h2>", f"<p>{escaped(search_note(found))}</p>", table_of(*search_table(found))]


def _first_clicks(report: Mapping[str, Any]) -> list[str]:
    """Shows what new users find after one to five clicks, where the shop's split has new users."""
    if not (found := report.get("first_clicks")):
        return []
    return ["<h2>First clicks</h2>", f"<p>{escaped(FIRST_CLICKS)}</p>", table_of(*first_click_table(found))]


def _trained(manifest: Mapping[str, Any]) -> list[str]:
    """Says what the served models have learned from, and what their refit changed."""
    spans = manifest.get("trained", {})
    if not spans:
        return []
    rows = [[name, f"{span['events']:,}", escaped(span["trained_up_to"])] for name, span in spans.items()]
    parts = ["<h2>What is served has learned from</h2>", table_of(["", "events", "up to"], rows)]
    if reason := manifest.get("why_no_refit"):
        return [*parts, f"<p>The verified model is served, not a refit of it: {escaped(reason)}.</p>"]
    new = manifest["report"].get("refit", {}).get("new_items", {})
    if new.get("items"):
        head = ["", "of them shown", "of all places"]
        rows = [
            [name, f"{new[key]['shown']:.1%}", f"{new[key]['places']:.2%}"]
            for key, name in (("before", "verified model"), ("after", "refitted, served"))
        ]
        parts.append(f"<p>{new['items']:,} new items, in the lists of {new['users']:,} users:</p>")
        parts.append(table_of(head, rows))
    return parts


def _tasks(report: Mapping[str, Any], found: Figures) -> list[str]:
    tasks = report.get("tasks")
    if not tasks:
        return []
    columns = sorted({column for of in tasks.values() for column in of})
    parts = [
        "<h2>Tasks on held-out impressions</h2>",
        table_of(["task", *columns], [[t, *(number(of.get(c)) for c in columns)] for t, of in tasks.items()]),
        f"<p>{escaped(calibration_note(tasks))}</p>",
    ]
    if "calibration" in found:
        text = (
            "Impressions with about the same probability, a tenth of all at a time: a point on the line came "
            "true as often as was foretold, one below it less often. 95% intervals."
        )
        parts += [f"<p>{text}</p>", *_image(found, "calibration")]
    return parts


def _shown(report: Mapping[str, Any]) -> list[str]:
    """Says what lists show, whatever they hit."""
    if not (shown := report.get("shown")):
        return []
    note, table = f"<p>{escaped(variety_note(shown))}</p>", table_of(*variety_table(shown, WAYS))
    return ["<h2>What the lists show</h2>", note, table]


def _data(report: Mapping[str, Any]) -> list[str]:
    """Says what the release was made of, and what the shop's data lacks."""
    if not (data := report.get("data")):
        return []
    notes = [f"<p>{escaped(note)}</p>" for note in data_notes(data)]
    return ["<h2>What it was made of</h2>", table_of(*data_table(data)), *notes]


def _recall(report: Mapping[str, Any]) -> list[str]:
    settings = {
        name: of
        for name, of in report.get("recall", {}).items()
        if not name.startswith("tried_") and name != "sources"
    }
    tried = settings.pop("tried", [])
    quotas = settings.pop("quotas", {})
    settings |= {f"quota of {source}": places for source, places in quotas.items()}
    parts = [
        *sources(report),
        "<h2>Recall</h2>",
        table_of(["setting", "chosen"], [[name, number(value)] for name, value in settings.items()]),
    ]
    if tried:
        columns = list(dict.fromkeys(column for row in tried for column in row))
        parts += [
            "<h3>Tried for the index</h3>",
            table_of(columns, [[number(row.get(column)) for column in columns] for row in tried]),
        ]
    return parts if settings or tried else []


def _learning(report: Mapping[str, Any], found: Figures) -> list[str]:
    """Shows what each epoch of the trainings gained, and says which was kept."""
    lines = [f"<p>{escaped(line)}</p>" for line in learning_lines(report)]
    return ["<h2>Learning curves</h2>", *_image(found, "learning"), *lines] if lines else []


def _compression(compress: CompressionReport, found: Figures) -> list[str]:
    parts = [_tiles(compress), *(f"<p>{escaped(note)}</p>" for note in compress["notes"])]
    for runtime, gate in compress["gates"].items():
        passed = "passed" if gate["ok"] else "failed"
        parts += [
            f"<h3>The gate on {escaped(runtime)}: {passed}</h3>",
            *_image(found, f"gate_{runtime}"),
            _gate_table(gate["rows"]),
        ]
        parts += (
            [f"<h3>Latency on {escaped(runtime)}</h3>", *_image(found, f"latency_{runtime}")]
            if gate["timings"]
            else []
        )
    for (model, runtime), variants in _by_engine(compress["variants"]):
        parts += [
            f"<h3>{escaped(model)} on {escaped(runtime)}: every variant tried</h3>",
            *_image(found, f"pareto_{model}_{runtime}"),
            _variants(variants),
        ]
    for (model, runtime), nodes in _by_engine(compress["nodes"]):
        parts += [
            f"<h3>{escaped(model)} on {escaped(runtime)}: precision by node</h3>",
            *_image(found, f"precision_{model}_{runtime}"),
            _nodes(nodes),
        ]
    return parts


def _tiles(compress: CompressionReport) -> str:
    """Says in a tile for each engine how much smaller it became."""
    tiles = [_tile("recipe", compress["plan_name"], f"{len(compress['nodes'])} nodes judged")]
    for engine in compress["engines"]:
        smaller = engine["reference_bytes"] / max(engine["bytes"], 1)
        fewer = engine["parameters"] / max(engine["reference_parameters"], 1) - 1
        size = (
            f"{engine['reference_bytes'] / 1e6:.2f} → {engine['bytes'] / 1e6:.2f} MB, parameters {fewer:+.0%}"
        )
        tiles.append(_tile(f"{engine['model']}, {engine['runtime']}", f"{smaller:.1f}× smaller", size))
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _tile(above: str, middle: str, below: str) -> str:
    texts = map(escaped, (above, middle, below))
    return '<div class="tile"><span>{}</span><b>{}</b><span>{}</span></div>'.format(*texts)


def _gate_table(rows: Sequence[Mapping[str, Any]]) -> str:
    head = ["figure", "users", "uncompressed", "compressed", "loss", "95% interval", "limit", "verdict"]
    lines = []
    for row in rows:
        show = partial(_loss, relative=row["relative"])
        interval = f"{show(row['low'])} … {show(row['high'])}"
        both = [number(row["reference"], 5), number(row["candidate"], 5)]
        limit = f"{row['limit']:.2%}" if row["relative"] else f"{row['limit']:g}"
        lines.append(
            [row["figure"], f"{row['users']:,}", *both, show(row["loss"]), interval, limit, row["verdict"]]
        )
    return table_of(head, lines, [row["verdict"] for row in rows])


def _loss(value: float | None, *, relative: bool) -> str:
    return _share(value) if relative or value is None else f"{value:+.5f}"


def _variants(variants: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        [
            v["name"],
            v["family"],
            f"{v['loss']:+.2%}",
            f"{v['bytes'] / 1e6:.3f}",
            f"{v['parameters']:,}",
            number(v["latency_ms"], 3),
            "chosen" * v["chosen"],
        ]
        for v in variants
    ]
    return table_of(["variant", "kind", "NDCG@10 lost", "MB", "parameters", "ms at batch 8", ""], rows)


def _nodes(nodes: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        [
            n["node"],
            n["op"],
            f"{n['parameters']:,}",
            _share(n["changed"]),
            _share(n["loss"]),
            n["precision"],
            n["reason"] or "lowest",
        ]
        for n in figures.most_sensitive_first(nodes)
    ]
    table = table_of(
        ["node", "operator", "parameters", "lists changed, alone", "NDCG@10 lost, alone", "precision", "why"],
        rows,
    )
    return f"<details><summary>all {len(rows)} nodes</summary>{table}</details>"


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:+.2%}"


def _image(found: Figures, name: str) -> list[str]:
    if name not in found:
        return []
    return [
        f'<img alt="{escaped(name.replace("_", " "))}" '
        f'src="data:image/png;base64,{base64.b64encode(found[name]).decode()}">'
    ]
