"""Says what is in a shop, and what is wrong with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from builders.content.sources import sources_of
from builders.data.columns import columns_said, joins
from builders.data.dataset import Dataset, Impressions, Targets
from builders.data.splits import MANY_AGAIN, share_again
from builders.data.stage import dataset_from_tables
from builders.shop.columns.categories import lists_from_column
from builders.shop.columns.column import Column, is_list, is_textual
from builders.shop.interactions import known_at_once, shown_in_vain
from builders.shop.parts import said_of
from builders.shop.read import ShopTables, read_shop
from builders.shop.shop_toml import PICTURED, FeatureColumn
from ensemble.arrays import Array
from ensemble.schema import Feature, Table

FEW_LABELS = 100  # below this a task cannot be learned, let alone calibrated


@dataclass
class Report:
    """Holds counts as {section: {what: value}}, and warnings: what makes a build worse, not impossible."""

    shop: str
    sections: dict[str, dict[str, Any]] = field(default_factory=dict)
    columns: list[dict[str, Any]] = field(default_factory=list)  # what each was taken for, as Said has it
    warnings: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def check_shop(
    folder: Path, *, now_s: float | None = None, progress: Callable[[str], None] = lambda step: None
) -> Report:
    """Reads all of the shop as a build does; raises InvalidInput at what would stop one."""
    tables = read_shop(folder, now_s=now_s, progress=progress)
    dataset = dataset_from_tables(tables, progress=progress)
    report = Report(tables.shop.name)
    _interactions(report, tables)
    _histories(report, dataset)
    _features(
        report,
        "items",
        tables.shop.items.features if tables.shop.items else [],
        tables.items.columns,
        dataset.schema.items,
        dataset.item_codes,
    )
    _features(
        report,
        "users",
        tables.shop.users.features if tables.shop.users else [],
        tables.users.columns,
        dataset.schema.users,
        dataset.user_codes,
    )
    _context(report, tables, dataset)
    _tasks(report, dataset)
    if dataset.schema.has_clock and (line := known_at_once(tables.shop)):
        report.sections["labels"] = {"known at once": line}
    if line := shown_in_vain(tables.shop):
        report.warnings.append(line)
    progress("looking for ids that do not join")
    joins(tables, report.sections, report.warnings)
    report.columns = columns_said(tables, report.warnings)
    progress("looking for encoders and images")
    sources_of(tables.shop.items.features if tables.shop.items else [], folder)
    _images(report, folder, tables)
    return report


def _interactions(report: Report, tables: ShopTables) -> None:
    interactions = tables.interactions
    first, last = int(interactions.times.min()), int(interactions.times.max())
    section: dict[str, Any] = {
        "rows": len(interactions),
        "users": len(np.unique(tables.user_rows)),
        "items": len(np.unique(tables.item_rows)),
    }
    if first > 100_000_000:  # later than 1973: a clock; else positions
        section |= {"from": _day(first), "to": _day(last)}
    else:
        section |= {"times": f"{first} to {last} (positions, no clock)"}
    if interactions.events is not None:
        counts = np.bincount(interactions.events + 1, minlength=len(interactions.event_names) + 1)[1:]
        section["events"] = {
            name: int(count) for name, count in zip(interactions.event_names, counts, strict=True)
        }
    report.sections["interactions"] = section
    _parts(report, tables)
    if tables.num_dropped:
        share = tables.num_dropped / (tables.num_dropped + len(interactions))
        where = tables.shop.items.file if tables.shop.items else ""
        report.warnings.append(
            f"{tables.num_dropped} interactions ({share:.1%}) are left out: their items, "
            f"{tables.first_dropped!r} first, are not in {where}"
        )


def _parts(report: Report, tables: ShopTables) -> None:
    """Says what the shop's own split has, and whether it follows the clock."""
    log = tables.interactions
    if log.parts is None:
        return
    facts = said_of(tables.user_rows, log.times, log.parts, len(tables.users.ids))
    report.sections["split"] = facts


def _day(time_s: int) -> str:
    return f"{datetime.fromtimestamp(time_s, UTC):%Y-%m-%d}"


def _histories(report: Report, dataset: Dataset) -> None:
    lengths = np.diff(dataset.histories.offsets)[1:]
    some = lengths[lengths > 0]
    report.sections["histories"] = {
        "users": len(dataset.user_ids),
        "users without history": int((lengths == 0).sum()),
        "median length": float(np.median(some)) if len(some) else 0.0,
        "longest": int(lengths.max(initial=0)),
        "validation users": _num_users(dataset.validation),
        "test users": _num_users(dataset.test),
    }
    _repeats(report, dataset)
    report.sections["catalogue"] = {
        "items": len(dataset.item_ids),
        "items nobody took": int(len(dataset.item_ids) - len(np.unique(dataset.histories.item_rows))),
        "items without title": int((dataset.item_titles[1:] == b"").sum()),
    }
    for name, targets in (("validation", dataset.validation), ("test", dataset.test)):
        if (held_out := _num_users(targets)) < 2:
            report.warnings.append(
                f"the {name} split has {held_out} users; quality cannot be measured (see split in shop.toml)"
            )


def _num_users(targets: Targets) -> int:
    return len(np.unique(targets.user_rows))


def _repeats(report: Report, dataset: Dataset) -> None:
    """Says how many events are of an item that their user had before; warns where they are many, since
    nothing shows such items unless it is asked to."""
    share = share_again(dataset.histories)
    report.sections["histories"]["events with an item had before"] = f"{share:.1%}"
    if share >= MANY_AGAIN:
        report.warnings.append(
            f"{share:.0%} of events are of an item that their user had before; lists leave such items out, "
            "and held-out figures are of new ones: to show them, ask with exclude_seen = false"
        )


def _features(
    report: Report,
    what: str,
    entries: list[FeatureColumn],
    columns: dict[str, Column],
    table: Table,
    codes: Array,
) -> None:
    section: dict[str, Any] = {}
    packed: dict[str, Feature] = {f.name: f for f in table.features}
    for entry in entries:
        column = columns[entry.source]
        filled = _share_filled(column, entry.kind)
        section[entry.name] = f"{entry.kind}, {filled:.1%} filled"
        feature = packed.get(entry.name)
        if feature is not None and feature.kind == "category":
            section[entry.name] += f", {feature.size - 1} values"
            full = (codes[1:, feature.columns] > 0).all(axis=1).mean()
            if feature.width > 1 and full > 0.05 and (is_list(column) or entry.separator):
                report.warnings.append(
                    f"{what}: {full:.0%} of rows fill all {feature.width} places of {entry.name!r}; raise "
                    "its width if values are cut"
                )
        if filled == 0:
            report.warnings.append(f"{what}: the feature {entry.name!r} is empty in every row")
        elif feature is not None and feature.kind == "category" and feature.size == 2:
            report.warnings.append(
                f"{what}: the feature {entry.name!r} has a single value; it tells rows apart in nothing but "
                "its absence"
            )
    report.sections[f"{what}' features"] = section


def _share_filled(column: Column, kind: str) -> float:
    """Gives the share of cells that say something: words for nothing are none where a number is read."""
    missing = column.values.null_count
    if kind == "number":
        missing = max(missing, column.said.missing)
    elif is_textual(column.values.type):
        missing += int(
            pc.sum(pc.equal(pc.utf8_trim_whitespace(column.values.cast(pa.large_string())), "")).as_py() or 0
        )
    return 1 - missing / max(len(column.values), 1)


def _context(report: Report, tables: ShopTables, dataset: Dataset) -> None:
    """Says of each context feature how often the log tells it; warns where it never does."""
    section: dict[str, Any] = {}
    for entry, feature in zip(tables.shop.context_columns, dataset.schema.context, strict=True):
        filled = _share_filled(tables.interactions.contexts[entry.source], entry.kind)
        told = f", {len(feature.values)} values" if feature.kind == "category" else ""
        section[entry.name] = f"{entry.kind}, {filled:.1%} filled{told}"
        if not filled:
            report.warnings.append(f"context: the feature {entry.name!r} is empty in every row")
    if section:
        report.sections["context"] = section


def _tasks(report: Report, dataset: Dataset) -> None:
    section: dict[str, Any] = {}
    parts = [
        p
        for p in (dataset.train_impressions, dataset.validation_impressions, dataset.test_impressions)
        if p is not None
    ]
    for at, task in enumerate(dataset.schema.tasks):
        given = f" given {task.given}" if task.given else ""
        if not parts:
            section[task.name] = f"{task.kind}, no label: learned from sampled negatives"
            continue
        known = np.concatenate([p.labels[:, at] for p in parts])
        known = known[~np.isnan(known)]
        what = "positive" if task.kind == "binary" else "on average"
        mean = f"{known.mean():.2%}" if task.kind == "binary" else f"{known.mean():.3f}"
        section[task.name] = f"{task.kind}{given}, {len(known)} labels, {mean} {what}{_too_young(parts, at)}"
        fewest = int(min((known == 1).sum(), (known == 0).sum())) if task.kind == "binary" else len(known)
        if fewest < FEW_LABELS:
            report.warnings.append(
                f"task {task.name!r} has only {fewest} "
                f"{'labels of one kind' if task.kind == 'binary' else 'labels'}; it will hardly be learned"
            )
    report.sections["tasks"] = section
    if parts:
        names = ("train", "validation", "test")
        report.sections["impressions"] = {
            name: len(part.times) for name, part in zip(names, parts, strict=True)
        }


def _too_young(parts: list[Impressions], at: int) -> str:
    """Says how many labels of a task were not known yet when their part of the split ended."""
    censored = [
        np.isnan(p.labels[:, at]) & ~np.isnan(p.settled[:, at]) for p in parts if p.settled is not None
    ]
    count = sum(int(of.sum()) for of in censored)
    return f", {count} not known in time" if count else ""


def _images(report: Report, folder: Path, tables: ShopTables) -> None:
    """Counts image files and warns of those that are missing."""
    for what, entity, rows in (
        ("items", tables.shop.items, tables.items),
        ("users", tables.shop.users, tables.users),
    ):
        for entry in entity.features if entity else []:
            if entry.kind not in PICTURED:
                continue
            paths = _paths(entry, rows.columns[entry.source])
            missing = [p for p in paths if not (folder / p).is_file()]
            report.sections.setdefault("images", {})[f"{what}.{entry.name}"] = (
                f"{len(paths) - len(missing)} files; {_reader(entry)}"
            )
            if missing:
                report.warnings.append(
                    f"{what}: {len(missing)} files of the feature {entry.name!r} are missing, "
                    f"{missing[0]!r} first"
                )


def _paths(entry: FeatureColumn, column: Column) -> list[str]:
    """Gives the files that a column names, those of all frames of videos."""
    if entry.kind == "video":
        return [str(path) for path in lists_from_column(column, entry.separator)[1].to_pylist()]
    return [path for path in column.values.to_pylist() if path]


def _reader(entry: FeatureColumn) -> str:
    """Says who reads an image feature."""
    if entry.encoder is None:
        return 'no encoder is named, so a build leaves them aside (encoder = "efficientnet-lite0")'
    return f"read by {entry.encoder}"
