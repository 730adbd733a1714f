"""Stage `data`: turns a shop's files into a Dataset of features, histories, splits and impressions."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from builders.content.contents import LINES, Contents
from builders.content.sources import encoded_features
from builders.data.contexts import contexts_from_columns
from builders.data.dataset import Dataset, Histories, Impressions, open_dataset, save_dataset
from builders.data.packing import pack_features
from builders.data.rates import with_rates
from builders.data.refit import save_refit
from builders.data.spans import FIRST_CLOCK_S
from builders.data.splits import (
    histories_from_positives,
    history_ends,
    split_histories,
    split_impressions,
)
from builders.folders import Inputs
from builders.progress import Progress, part_of
from builders.shop import truth
from builders.shop.catalogue import read_changes
from builders.shop.columns.categories import texts_from_column
from builders.shop.interactions import (
    Exposures,
    Periods,
    exposures_from_interactions,
    known_at_once,
    refuse_all_censored,
    shown_in_vain,
)
from builders.shop.parts import NEVER, cuts_of, in_order, places_in_order, said_of
from builders.shop.read import Rows, ShopTables, read_shop
from builders.shop.shop_toml import Shop, ShopTask
from ensemble.arrays import Array
from ensemble.errors import InvalidInput
from ensemble.schema import MAX_KINDS, ContextFeature, RecallSource, Schema, Sizes, Table, Task

TITLE_BYTES = 120
CHANGES = "changes.txt"  # what became of the catalogue's log, in one line


def run(
    inputs: Inputs,
    sizes: Sizes,
    folder: Path,
    progress: Progress,
    known: Callable[[ShopTables], ShopTables] = lambda tables: tables,
) -> None:
    """Reads the shop's files and the catalogue's log, and saves what is `known` of them as dataset arrays,
    with the schema that later stages link."""
    tables = read_shop(
        inputs["shop"], progress=lambda text: progress(0.3, text), changes=read_changes(inputs["catalogue"])
    )
    tables = known(tables)
    (folder / CHANGES).write_text(tables.applied.line())
    if planted := tables.shop.interactions.planted:
        shutil.copyfile(inputs["shop"] / planted, folder / truth.FILE)
    contents = _encoded(tables, inputs, folder, part_of(progress, 0.4, 0.6))
    contents.save(folder)
    dataset = dataset_from_tables(
        tables, sizes=sizes, contents=contents, progress=lambda text: progress(0.6, text)
    )
    lines = [*contents.lines, *_split_lines(tables), *_label_lines(tables.shop, dataset.schema)]
    (folder / LINES).write_text("\n".join(lines))
    save_dataset(dataset, folder)


def _encoded(tables: ShopTables, inputs: Inputs, folder: Path, progress: Progress) -> Contents:
    """Encodes texts and pictures, or finds their vectors among those that are kept beside the stages."""
    features = tables.shop.items.features if tables.shop.items else []
    if not encoded_features(features):
        return Contents()
    import torch

    from builders.content.features import CACHE, encode_contents

    return encode_contents(
        features,
        tables.items.columns,
        shop=inputs["shop"],
        catalogue=inputs["catalogue"],
        cache=folder.parent / CACHE,
        threads=torch.get_num_threads(),
        progress=progress,
    )


def refit(inputs: Inputs, options: None, folder: Path, progress: Progress) -> None:
    """Saves the dataset of the verified model once more, with all that is known in its training part."""
    save_refit(open_dataset(inputs["verified_data"]), inputs["verified_data"], folder)


def load_dataset(
    shop_dir: Path,
    *,
    sizes: Sizes | None = None,
    now_s: float | None = None,
    progress: Callable[[str], None] = lambda step: None,
) -> Dataset:
    """Reads a whole shop as arrays; `progress` is called with the name of each step as it begins."""
    tables = read_shop(Path(shop_dir), now_s=now_s, progress=progress)
    return dataset_from_tables(tables, sizes=sizes, progress=progress)


def dataset_from_tables(
    tables: ShopTables,
    *,
    sizes: Sizes | None = None,
    contents: Contents | None = None,
    progress: Callable[[str], None] = lambda step: None,
) -> Dataset:
    """Packs features, orders histories, splits. Without `contents`, what was encoded of texts and pictures,
    words are hashed and images left out."""
    contents, tables = contents or Contents(), with_times_in_order(tables)
    shop, items, users = tables.shop, tables.items, tables.users
    progress("packing features")
    item_pack = pack_features(
        shop.items.features if shop.items else [],
        items.columns,
        items.index + 1,
        len(items.ids),
        contents.by_feature,
    )
    user_pack = pack_features(
        shop.users.features if shop.users else [], users.columns, users.index + 1, len(users.ids), {}
    )
    progress("ordering histories")
    exposures = exposures_from_interactions(shop, tables.interactions)
    context, said = _contexts(tables)
    histories = _histories(tables, exposures)
    splits = split_histories(shop.split, histories, tables.interactions.times, users.ids, _cuts(tables))
    progress("splitting impressions")
    parts = (
        split_impressions(_impressions(tables, exposures, histories, splits.cuts, said), splits.cuts)
        if shop.has_labels
        else (None, None, None)
    )
    if parts[0] is not None:
        refuse_all_censored(shop, parts[0].labels)
    schema = _schema(tables, item_pack.table, user_pack.table, sizes or Sizes(), contents, context)
    return Dataset(
        schema=with_rates(schema) if shop.has_labels else schema,
        item_ids=items.ids,
        user_ids=users.ids,
        item_titles=_titles(shop, items),
        item_codes=item_pack.codes,
        item_values=item_pack.values,
        user_codes=user_pack.codes,
        user_values=user_pack.values,
        vocabularies={"items": item_pack.vocabularies, "users": user_pack.vocabularies},
        histories=histories,
        train_ends=splits.train_ends,
        known_ends=splits.known_ends,
        validation=splits.validation,
        test=splits.test,
        train_impressions=parts[0],
        validation_impressions=parts[1],
        test_impressions=parts[2],
        item_numbers=item_pack.numbers,
        item_encoding=item_pack.encoding,
        split=shop.split.model_dump(mode="json"),
    )


def _schema(
    tables: ShopTables,
    items: Table,
    users: Table,
    sizes: Sizes,
    contents: Contents,
    context: tuple[ContextFeature, ...],
) -> Schema:
    """Puts together what determines every tensor, but for the rates."""
    shop = tables.shop
    tasks = tuple(Task(t.name, t.kind, t.given, t.weight) for t in shop.tasks) or (
        Task("interact", "binary"),
    )
    return Schema(
        shop.name,
        items,
        users,
        tasks,
        sizes,
        events=event_kinds(tables),
        sources=_sources(shop, items),
        new_items=shop.recall.new_items,
        has_clock=bool(tables.interactions.times.min(initial=FIRST_CLOCK_S) >= FIRST_CLOCK_S),
        encoders=contents.sizes,
        context=context,
    )


def with_times_in_order(tables: ShopTables) -> ShopTables:
    """Gives the tables with places in order for times, where the shop itself says what tests and that does
    not follow the clock: then a time says no more than which came first within a part."""
    log, shop = tables.interactions, tables.shop
    if log.parts is None or in_order(tables.user_rows, log.times, log.parts, len(tables.users.ids)):
        return tables
    timed = [task.name for task in shop.tasks if task.label and (task.label.time or task.label.within)]
    if timed:
        raise InvalidInput(
            f"{shop.interactions.file}: some users' parts of the split overlap in time, but task "
            f"{timed[0]!r} asks when its label came; let the parts follow the clock, or drop the label's "
            "time and within"
        )
    return replace(tables, interactions=replace(log, times=places_in_order(log.times, log.parts)))


def _split_lines(tables: ShopTables) -> list[str]:
    """Says what the shop's own split has, for whoever builds; nothing where it leaves the split to us."""
    log = tables.interactions
    if log.parts is None:
        return []
    facts = said_of(tables.user_rows, log.times, log.parts, len(tables.users.ids))
    return [
        "split: "
        + ", ".join(f"{name} {value}" if name != "order" else str(value) for name, value in facts.items())
    ]


def _label_lines(shop: Shop, schema: Schema) -> list[str]:
    """Says, for whoever builds, which labels count as known at once, where times are times, and which rows as
    shown in vain."""
    lines = (known_at_once(shop) if schema.has_clock else "", shown_in_vain(shop))
    return [f"labels: {line}" for line in lines if line]


def _cuts(tables: ShopTables) -> tuple[Array, Array] | None:
    """Gives when each user's validation and test begin, where the shop itself says it."""
    log = tables.interactions
    return (
        None if log.parts is None else cuts_of(tables.user_rows, log.times, log.parts, len(tables.users.ids))
    )


def _sources(shop: Shop, items: Table) -> tuple[RecallSource, ...]:
    """Gives recall's sources; InvalidInput where a source would have nothing to go by."""
    sources = shop.recall.listed()
    if any(source.name == "content" for source in sources) and not any(f.is_code for f in items.features):
        raise InvalidInput(
            "recall.sources names 'content', but the items have no category and no text feature",
            "give them one under [items], or leave 'content' out",
        )
    return sources


def positives(tables: ShopTables, exposures: Exposures) -> tuple[Array, Array]:
    """Gives the rows of the interactions that form histories, as `history` in shop.toml says, and when each
    happened: [P] int64 both."""
    shop, interactions = tables.shop, tables.interactions
    rule = shop.interactions.history
    if isinstance(rule, list):
        rows = np.flatnonzero(np.any([interactions.is_event(name) for name in rule], axis=0))
        return rows, interactions.times[rows]
    task = _history_task(shop)
    if task is None:
        return np.arange(len(interactions)), interactions.times
    at = shop.tasks.index(task)
    if task.label and task.label.event:  # the event has its own row and time, later than the exposure's
        rows = np.flatnonzero(interactions.is_event(task.label.event))
    elif shop.interactions.impression:  # so has the row that gives the label
        rows = np.flatnonzero(interactions.labels[:, at] == 1)
    else:
        rows = exposures.rows[exposures.labels[:, at] == 1]
    return rows, interactions.label_times.get(at, interactions.times)[rows]


def _histories(tables: ShopTables, exposures: Exposures) -> Histories:
    rows, times = positives(tables, exposures)
    users, items, kinds = tables.user_rows[rows], tables.item_rows[rows], _kinds(tables, exposures)[rows]
    return histories_from_positives(users, items, times, kinds, len(tables.users.ids))


def event_kinds(tables: ShopTables) -> tuple[str, ...]:
    """Names the kinds of events that a history holds: those that shop.toml lists, those of a history of all
    events, or the first task and those that are given it, where one row tells them all."""
    shop, interactions = tables.shop, tables.interactions
    rule = shop.interactions.history
    if isinstance(rule, list):
        return tuple(dict.fromkeys(rule))
    first = _history_task(shop)
    if first is None and interactions.events is None:
        told = (task.name for task in _told_with(shop, None))
        return tuple(dict.fromkeys((*Schema.events, *told)))[:MAX_KINDS]
    if first is None:
        return tuple(sorted(filter(None, interactions.event_names))[:MAX_KINDS]) or Schema.events
    if first.label and first.label.event:
        return (first.label.event,)
    return tuple(task.name for task in (first, *_told_with(shop, first)))


def _history_task(shop: Shop) -> ShopTask | None:
    """Gives the task whose positives form histories; None where all events do, or those that are listed."""
    rule = shop.interactions.history
    named = [t for t in shop.tasks if t.kind == "binary" and t.label and rule in ("", t.name)]
    return None if isinstance(rule, list) or rule == "all" or not named else named[0]


def _told_with(shop: Shop, first: ShopTask | None) -> list[ShopTask]:
    """Gives the binary tasks, but the history's own, whose label stands in the row of the event and came in
    with it: what comes in later would tell the future."""
    others = [t for t in shop.tasks if t is not first and t.kind == "binary" and t.label]
    return [t for t in others if t.label and t.label.column and not t.label.time]


def _kinds(tables: ShopTables, exposures: Exposures) -> Array:
    """Gives each interaction's kind as an event of a history [n] uint8, from 1 in the order of
    event_kinds."""
    shop, interactions, names = tables.shop, tables.interactions, event_kinds(tables)
    kinds = np.ones(len(interactions), np.uint8)
    first = _history_task(shop)
    if interactions.events is not None and (first is None or (first.label and first.label.event)):
        for place, name in enumerate(names):
            kinds[interactions.is_event(name)] = 1 + place
        return kinds
    for task in (task for task in _told_with(shop, first) if task.name in names):
        told = exposures.rows[exposures.labels[:, shop.tasks.index(task)] == 1]
        kinds[told] = 1 + names.index(task.name)
    return kinds


def _contexts(tables: ShopTables) -> tuple[tuple[ContextFeature, ...], Array | None]:
    """Gives the context's features, and what each interaction says of them [n, X]; None without a context."""
    columns, interactions = tables.shop.context_columns, tables.interactions
    if not columns:
        return (), None
    length = len(next(iter(interactions.contexts.values())).values)
    features, said = contexts_from_columns(columns, dict(interactions.contexts), length)
    return features, said[interactions.file_rows]


def _impressions(
    tables: ShopTables,
    exposures: Exposures,
    histories: Histories,
    cuts: tuple[Array, Array],
    said: Array | None,
) -> Impressions:
    """Makes the impressions, with labels that were known before their user's next period began; `said` [n, X]
    are all interactions' contexts."""
    rows, truth = exposures.rows, tables.interactions.truth
    users, times = tables.user_rows[rows], tables.interactions.times[rows]
    ends = history_ends(histories, users, times)
    known = _labelled(tables, cuts)
    settled = None
    timed = tables.shop.interactions.impression or tables.interactions.label_times
    if timed:  # what a refit learns from; of a published test it knows nothing
        begins = cuts[1] if tables.shop.split.keep_test else np.full_like(cuts[1], NEVER)
        settled = _labelled(tables, (begins, begins)).labels
    return Impressions(
        users,
        tables.item_rows[rows],
        times,
        ends,
        known.labels,
        exposures.positions,
        None if truth is None else truth[rows],
        settled,
        exposures.propensities,
        exposures.known_times,
        None if said is None else said[rows],
    )


def _labelled(tables: ShopTables, cuts: tuple[Array, Array]) -> Exposures:
    """Makes the exposures with labels of their own periods; cuts [U + 1] int64 are when users' two begin."""
    periods = Periods(*(cut[tables.user_rows] for cut in cuts))
    return exposures_from_interactions(tables.shop, tables.interactions, periods)


def _titles(shop: Shop, items: Rows) -> Array:
    """Gives the titles [I + 1] S as UTF-8, cut at TITLE_BYTES without splitting a letter."""
    if shop.items is None or shop.items.title is None:
        return np.zeros(len(items.ids) + 1, "S1")
    texts = pc.fill_null(texts_from_column(items.columns[shop.items.title]), "")
    cut = pc.utf8_slice_codeunits(texts, 0, TITLE_BYTES).cast(pa.large_binary())
    titles = np.array(["", *cut.to_pylist()], dtype="O")
    titles[0] = b""
    for row in 1 + np.flatnonzero(pc.binary_length(cut).to_numpy(zero_copy_only=False) > TITLE_BYTES):
        titles[row] = titles[row][:TITLE_BYTES].decode(errors="ignore").encode()
    ordered = np.full(len(items.ids) + 1, b"", dtype="O")
    ordered[items.index + 1] = titles[1:]
    return ordered.astype("S") if len(ordered) else np.zeros(1, "S1")
