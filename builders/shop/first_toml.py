"""Writes a first shop.toml for any folder of tables: what each file and column seems to be, for a person to
correct. It takes names of columns at their word, and looks at the first rows of each file."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from builders.shop.columns.categories import texts_from_column, undeclared_separator, with_lists
from builders.shop.columns.column import Column, Said, distinct_of, is_list, is_textual
from builders.shop.columns.ids import known_ids
from builders.shop.columns.labels import labels_from_column
from builders.shop.columns.numbers import numbers_from_column
from builders.shop.columns.times import times_from_column
from builders.shop.formats.streams import not_utf8
from builders.shop.shop_toml import SHOP_FILE
from builders.shop.tables import ENDINGS, files_of, first_columns, is_text_file, table_files
from ensemble.arrays import Array
from ensemble.errors import InvalidInput
from ensemble.release.files import write_durably

# Names of columns, without case and signs, the likeliest first
ROLES = {
    role: tuple(names.split())
    for role, names in {
        "user": "userid user visitorid visitor customerid customer householdid household clientid client "
        "reviewerid memberid member accountid account buyerid shopperid uid sessionid session",
        "item": "itemid item parentasin productid product asin movieid movie articleid article sku stockcode "
        "songid song trackid track bookid book isbn artistid artist videoid iid",
        "time": "timestamp time unixreviewtime datetime eventtime ts createdat date day",
        "event": "event eventtype eventname action behavior behaviortype",
        "rating": "rating stars overall score ratings",
        "label": "clicked click label liked bought purchased isclick",
        "title": "title name itemname productname movietitle productdisplayname",
    }.items()
}
TABLES = ("interactions", "items", "users")
_LIKED = {5: 4.0, 10: 7.0, 100: 70.0}  # what counts as liked on a scale that ends there
Mapped = list[tuple[str, str, str]]  # (file, column, role)
_MOMENT = re.compile(r"(?i)(?:timestamp|datetime|date|time|_at)$|[a-z]At$")  # ends of names of times
_CODE = re.compile(r"(?i:(?:^|[_\W])(?:id|code|zip|sku|ean|upc))$|[a-z](?:Id|ID|Code)$")  # and of codes
# how days and moments are written, where they are no ISO texts; the first that reads all is taken
_DAYS = (
    *("%d.%m.%Y", "%d/%m/%Y", "%m/%d/%Y", "%d-%m-%Y", "%Y/%m/%d", "%Y.%m.%d", "%d.%m.%y", "%m/%d/%y"),
    *("%d-%b-%Y", "%d %b %Y", "%b %d, %Y"),
)
_CLOCKS = ("", " %H:%M", " %H:%M:%S", " %I:%M %p", " %I:%M:%S %p")
_FORMATS = tuple(day + clock for clock in _CLOCKS for day in _DAYS)
_LEGACY = "cp1252"  # what a text that is no UTF-8 is taken for
_OFTEN = 2  # rows an id on average, from which a column with one value for each id tells of the id
_SLIPS = 1.02  # values an id on average, up to which a column has one for each
_LONG = 25  # characters of a cell on average, from which a column is a text


@dataclass
class Sample:
    """Holds the first rows of a table, and which of its columns plays which role."""

    file: str
    columns: dict[str, Column]
    roles: dict[str, str] = field(default_factory=dict)
    encoding: str | None = None  # of a text that is no UTF-8


@dataclass(frozen=True)
class First:
    """Holds the shop.toml, and what each column was taken for: (file, column, role)."""

    text: str
    mapping: Mapped


def init_shop(
    folder: Path,
    *,
    told: Mapping[str, str] | None = None,
    like_from: float | None = None,
    force: bool = False,
) -> First:
    """Writes `folder`/shop.toml, and gives it with its mapping; `told` names columns and files of roles, as
    --map has them, `like_from` the rating that counts as liked."""
    path = folder / SHOP_FILE
    if not folder.is_dir():
        raise InvalidInput(f"{folder} is no folder; name the one with the shop's files")
    if path.exists() and not force:
        raise InvalidInput(f"{path} is there already; --force writes it anew")
    told = dict(told or {})
    for role in told:
        if role not in (*ROLES, *TABLES):
            raise InvalidInput(f"--map {role}=…: no such role; there are {', '.join((*ROLES, *TABLES))}")
    samples = _samples(folder, told)
    first = _first(folder, samples, told, like_from)
    write_durably(path, first.text)
    return first


def _samples(folder: Path, told: Mapping[str, str]) -> list[Sample]:
    """Reads the first rows of each file of a table in a folder, and of each folder of such files in it."""
    parts = sorted(table_files(folder))
    files = sorted({str(part.relative_to(folder).parts[0]) for part in parts})
    if not files:
        others = sorted(one.name for one in folder.iterdir() if one.is_file())[:3]
        raise InvalidInput(
            f"{folder} holds no file of a table ({', '.join(ENDINGS)})"
            + (f", only {', '.join(others)}; save what they hold as CSV, or as JSON lines" if others else "")
        )
    samples = [_sample(folder, file) for file in files]
    for role, name in told.items():
        if role in ROLES and not any(name in sample.columns for sample in samples):
            there = ", ".join(f"{s.file}: {' '.join(s.columns)}" for s in samples)
            raise InvalidInput(f"--map {role}={name}: no file has that column; there are {there}")
        if role in TABLES and name not in files:
            raise InvalidInput(f"--map {role}={name}: no such file; there are {', '.join(files)}")
    for sample in samples:
        for role, names in ROLES.items():
            found = named_column(sample.columns, names, told.get(role))
            if found is not None and (role in told or found not in sample.roles.values()):
                sample.roles[role] = found
        if {"user", "item"} <= sample.roles.keys() and "time" not in sample.roles:
            _find_time(sample)
    return samples


def _sample(folder: Path, file: str) -> Sample:
    """Reads the first rows of a table; a text that is no UTF-8 as most such texts of shops are written."""
    try:
        return Sample(file, first_columns(folder, file))
    except InvalidInput as error:
        part = files_of(folder / file, file)[0]
        if not is_text_file(part) or not_utf8(part) is None:
            raise
        try:
            return Sample(file, first_columns(folder, file, _LEGACY), encoding=_LEGACY)
        except InvalidInput:
            raise error from None


def _find_time(sample: Sample) -> None:
    """Takes for the time a column that is called somewhat like one, else the only one that holds moments;
    refuses to choose among several."""
    free = {name: one for name, one in sample.columns.items() if name not in sample.roles.values()}
    moments = [name for name, one in free.items() if _is_moment(one, is_named=bool(_MOMENT.search(name)))]
    named = [name for name in moments if _MOMENT.search(name)]
    fit = named or moments
    if len(fit) > 1:
        raise InvalidInput(
            f"{sample.file} has several columns of times, {', '.join(fit)}; say which tells when an event "
            "happened: --map time=COLUMN"
        )
    if fit:
        sample.roles["time"] = fit[0]


def _is_moment(column: Column, *, is_named: bool) -> bool:
    """Says whether a column holds times that have passed. A number of any size may read as one, so numbers
    do only where the name says so."""
    if not is_named and not (is_textual(column.values.type) or pa.types.is_temporal(column.values.type)):
        return False
    if _formats(column):
        return True
    try:
        times_from_column(replace(column, said=Said(column.file, column.name)), time.time())
    except InvalidInput:
        return False
    return True


def _formats(column: Column) -> list[str]:
    """Gives the formats of _FORMATS that read all cells of a column of texts as times that have passed."""
    if not is_textual(column.values.type):
        return []

    def reads(form: str, values: pa.ChunkedArray) -> bool:
        reading, said = replace(column.reading, time_format=form), Said(column.file, column.name)
        try:
            times = times_from_column(replace(column, values=values, reading=reading, said=said), time.time())
        except InvalidInput:
            return False
        return bool(times.min(initial=0) >= 0)

    few = [form for form in _FORMATS if reads(form, column.values.slice(0, 100))]  # most columns are no times
    return [form for form in few if reads(form, column.values)]


def named_column(columns: Iterable[str], names: tuple[str, ...], told: str | None) -> str | None:
    """Finds the column of a role: the one told, else the first that is called like one of `names`."""
    there = list(columns)
    if told is not None:
        return told if told in there else None
    plain = {re.sub(r"[^a-z]", "", name.lower()): name for name in reversed(there)}
    return next((plain[name] for name in names if name in plain), None)


def _first(folder: Path, samples: list[Sample], told: Mapping[str, str], like_from: float | None) -> First:
    """Puts the tables together and writes the text."""
    log = _table(samples, "interactions", told, {"user", "item"}, set())
    if log is None:
        there = "; ".join(f"{s.file} has {', '.join(s.columns)}" for s in samples)
        raise InvalidInput(
            f"{folder}: no file has a column of users and one of items; name them: --map user=COLUMN --map "
            f"item=COLUMN (by their first lines, {there})"
        )
    rest = [sample for sample in samples if sample is not log]
    items = _table(rest, "items", told, {"item"}, {"user"})
    users = _table([s for s in rest if s is not items], "users", told, {"user"}, {"item"})
    items = items or _inside(log, "item", log.roles["user"])
    users = users or _inside(log, "user", log.roles["item"])
    if items is not None and items.roles["item"] != log.roles["item"] and items.roles["item"] in log.columns:
        log.roles["item"] = items.roles["item"]  # of two names of items, the one that both tables have
    mapping: Mapped = []
    name = re.sub(r"[^A-Za-z0-9_. -]", "", folder.resolve().name).lstrip("_. -")[:64] or "shop"
    lines = [
        "# A first shop.toml, written by `peregrine shop init`: correct what is wrong, then run",
        "# `peregrine shop check`. All keys: `peregrine shop --help`.",
        f"name = {json.dumps(name)}",
    ]
    inside = [name for of in (items, users) if of is not None and of.file == log.file for name in of.columns]
    body, is_clock = _log_lines(log, mapping, inside)
    split, other = ("time", "leave_one_out")[:: 1 if is_clock else -1]
    lines += [f'split = "{split}"  # or "{other}"', *body]
    for what, sample, role in (("items", items, "item"), ("users", users, "user")):
        if sample is not None:
            lines += _entity_lines(what, sample, role, mapping, is_log=sample.file == log.file)
    lines += _task_lines(log, like_from, mapping)
    lines += [f"# not used: {s.file}" for s in samples if s not in (log, items, users)]
    return First("\n".join(lines) + "\n", mapping)


def _table(
    samples: list[Sample], table: str, told: Mapping[str, str], wanted: set[str], unwanted: set[str]
) -> Sample | None:
    """Finds the file of a table: the one that was told, else the widest whose columns have the wanted roles;
    an entity's has each id once."""
    if table in told:
        return next(sample for sample in samples if sample.file == told[table])
    fit = [s for s in samples if wanted <= s.roles.keys() and not unwanted & s.roles.keys()]
    if table != "interactions":
        role = next(iter(wanted))
        fit = [sample for sample in fit if _is_key(sample.columns[sample.roles[role]])]
    return max(fit, key=lambda sample: ("time" in sample.roles, len(sample.columns)), default=None)


def _inside(log: Sample, role: str, other: str) -> Sample | None:
    """Finds what a log itself tells of its items, or users: columns with one value for each, as a table of
    their first rows; None where there is none. `other` is the column of the other ones."""
    key = log.columns[log.roles[role]]
    ids, index = known_ids(replace(key, said=Said(key.file, key.name)))
    first = np.unique(index[index >= 0], return_index=True)[1] if (index >= 0).all() else index[:0]
    if not len(index) / max(1, len(first)) >= _OFTEN:
        return None
    taken = {name for kind, name in log.roles.items() if kind != "title"}
    told = {
        name: column
        for name, column in log.columns.items()
        if name not in taken and _tells_of(column, index, len(ids))
    }
    if not told:
        return None
    mask = np.zeros(len(index), bool)
    mask[first] = True
    rows = {name: column.where(mask) for name, column in {key.name: key, **told}.items()}
    roles = {role: key.name} | {kind: name for kind, name in log.roles.items() if name in told}
    return Sample(log.file, rows, roles, log.encoding)


def _tells_of(column: Column, index: Array, count: int) -> bool:
    """Says whether a column has, but for slips, one value for each of the `count` ids of index [n], and not
    the same for all."""
    if is_list(column) or pa.types.is_nested(column.values.type):
        return False
    values, place = distinct_of(column.values)
    pairs = len(np.unique(index * (len(values) + 1) + place))
    return len(values) > 1 and pairs <= _SLIPS * count


def _is_key(column: Column) -> bool:
    """Says whether each row has an id of its own."""
    try:
        ids, index = known_ids(column)
    except InvalidInput:
        return False
    return len(ids) == len(index) > 0


def _log_lines(log: Sample, mapping: Mapped, inside: Iterable[str]) -> tuple[list[str], bool]:
    """Writes [interactions], and says whether its times are a clock."""
    lines = ["", "[interactions]", *_file_lines(log, mapping)]
    for role in ("user", "item"):
        lines.append(f"{role} = {json.dumps(log.roles[role])}")
        mapping.append((log.file, log.roles[role], role))
    clock, is_clock = _time_lines(log, mapping)
    lines += clock
    if "event" in log.roles:
        name = log.roles["event"]
        lines.append(f"event = {json.dumps(name)}")
        mapping.append((log.file, name, "event"))
    if "event" in log.roles:
        names = distinct_of(_textual(log.columns[log.roles["event"]]).values)[0].to_pylist()
        lines.append(
            f'history = "all"  # or a list of what makes a past, of {", ".join(map(repr, names[:8]))}'
        )
    elif "rating" in log.roles and "label" not in log.roles:
        lines.append('history = "all"  # what a past is made of: all that was rated, or "like"')
    used = {*(log.roles[r] for r in ("user", "item", "time", "event", "rating", "label") if r in log.roles)}
    used |= {*inside}
    lines += [f"# not used: {', '.join(rest)}"] if (rest := [n for n in log.columns if n not in used]) else []
    return lines, is_clock


def _file_lines(sample: Sample, mapping: Mapped) -> list[str]:
    """Writes the name of a table's file, and its encoding where that is not UTF-8."""
    lines = [f"file = {json.dumps(sample.file)}"]
    if sample.encoding:
        lines.append(f"encoding = {json.dumps(sample.encoding)}  # the file is no UTF-8; are letters right?")
        mapping.append((sample.file, "encoding", f"{sample.encoding}, since it is no UTF-8"))
    return lines


def _time_lines(log: Sample, mapping: Mapped) -> tuple[list[str], bool]:
    """Writes which column holds the times, and how, and says whether they are a clock."""
    if "time" not in log.roles:
        mapping.append((log.file, "(none)", "time; --map time=COLUMN if there is one"))
        return ['time = ""  # no column of times was found: only the rows\' order is left'], False
    name = log.roles["time"]
    column = log.columns[name]
    if forms := _formats(column):
        others = f"; or {' or '.join(map(json.dumps, forms[1:]))}" if forms[1:] else ""
        mapping.append((log.file, name, f"time, written {forms[0]}{others}"))
        return [f"time = {json.dumps(name)}", f"time_format = {json.dumps(forms[0])}  # UTC{others}"], True
    try:
        times_from_column(column, float("inf"))
    except InvalidInput as error:
        mapping.append((log.file, name, "time, but it cannot be read; shop.toml says why"))
        return [f"time = {json.dumps(name)}", f"# {error}", '# time_format = "%d/%m/%Y %H:%M"'], True
    mapping.append((log.file, name, "time"))
    line = f"time = {json.dumps(name)}  # {column.said.what.removeprefix('times: ')}"
    return [line], not column.said.what.startswith("times: positions")


def _textual(column: Column) -> Column:
    texts = texts_from_column(column)
    return Column(column.file, column.name, pa.chunked_array([texts]))


def _entity_lines(what: str, sample: Sample, role: str, mapping: Mapped, *, is_log: bool) -> list[str]:
    """Writes [items] or [users] with a feature for each column that looks like one."""
    key = sample.roles[role]
    lines = ["", f"[{what}]", *_file_lines(sample, mapping), f"id = {json.dumps(key)}"]
    lines[2] += "  # the log itself: the first row of each counts" if is_log else ""
    mapping.append((sample.file, key, role))
    title = sample.roles.get("title") if what == "items" else None
    if title and is_textual(sample.columns[title].values.type):
        lines.append(f"title = {json.dumps(title)}")
        mapping.append((sample.file, title, "title"))
    else:
        title = None
    for name, column in sample.columns.items():
        if name == key:
            continue
        kind, why = _kind(column, is_title=name == title, is_code=bool(_CODE.search(name)))
        if kind is None:
            lines.append(f"# {name}: {why}")
            continue
        label = re.sub(r"\W", "_", name, flags=re.ASCII)
        label = label if re.match("[A-Za-z]", label) else f"f_{label}"
        lines += ["", f"[[{what}.features]]", f"name = {json.dumps(label)}", *kind]
        lines += [f"column = {json.dumps(name)}"] if label != name else []
        mapping.append((sample.file, name, f"feature, {kind[0].partition(' = ')[2]}"))
    return lines


def _kind(column: Column, *, is_title: bool, is_code: bool) -> tuple[list[str] | None, str]:
    """Says what kind of feature a column looks like, as lines of shop.toml; None and why, if none."""
    if column.values.null_count == len(column.values):
        return None, "empty"
    try:
        listed = with_lists(column)
        if is_list(listed):
            return _list_kind(listed)
        if not is_textual(column.values.type) or not is_title:
            numbers = _numbers(column)
            if numbers is not None and not is_code and _are_amounts(numbers[~np.isnan(numbers)]):
                return ['kind = "number"'], ""
        texts = texts_from_column(column)
        distinct = [text for text in texts.unique().to_pylist() if text]
        sign = undeclared_separator(column)
        if sign is not None and not is_title:
            return ['kind = "category"', f"separator = {json.dumps(sign)}"], ""
        if is_title or np.mean([len(text) for text in distinct]) > _LONG:
            return ['kind = "text"'], ""
        if len(distinct) == len(texts) > 50:
            return None, "each row has a value of its own: an id, a link or a name?"
        return ['kind = "category"'], ""
    except InvalidInput as error:
        return None, str(error).partition(": ")[2] or str(error)


def _are_amounts(numbers: Array) -> bool:
    """Says whether numbers [n] measure something; few whole ones may as well be codes."""
    return len(np.unique(numbers)) > 12 or bool((numbers != np.floor(numbers)).any())


def _list_kind(column: Column) -> tuple[list[str] | None, str]:
    """Says of a column of lists whether they are categories or vectors."""
    kind = column.values.type.value_type
    if pa.types.is_floating(kind):
        lengths = set(pc.list_value_length(column.values).unique().drop_null().to_pylist()) - {0}
        if len(lengths) == 1:
            return [f'kind = "vector({lengths.pop()})"'], ""
        return None, "lists of numbers of several lengths"
    if is_textual(kind) or pa.types.is_integer(kind):
        return ['kind = "category"'], ""
    return None, f"lists of {kind}"


def _numbers(column: Column) -> Array | None:
    try:
        return numbers_from_column(column)
    except InvalidInput:
        return None


def _task_lines(log: Sample, like_from: float | None, mapping: Mapped) -> list[str]:
    """Writes the tasks: a label's, or liking by a rating; none where the log has neither."""
    if "label" in log.roles:
        name = log.roles["label"]
        labels_from_column(log.columns[name])
        mapping.append((log.file, name, "label"))
        return ["", "[[tasks]]", 'name = "ctr"', f"label = {{column = {json.dumps(name)}}}"]
    if "rating" in log.roles:
        name = log.roles["rating"]
        numbers = numbers_from_column(log.columns[name])
        top = float(np.nanmax(numbers)) if not np.isnan(numbers).all() else 0.0
        scale = next((end for end in _LIKED if top <= end), None)
        limit = (
            like_from if like_from is not None else _LIKED[scale] if scale else float(np.nanmedian(numbers))
        )
        share = float(np.mean(numbers[~np.isnan(numbers)] >= limit))
        mapping.append(
            (log.file, name, f"rating; {limit:g} and more is liked, {share:.0%} of the first rows")
        )
        return [
            "",
            "[[tasks]]",
            'name = "like"',
            f"label = {{column = {json.dumps(name)}, threshold = {limit:g}}}  # {share:.0%} of its rows",
        ]
    return [
        "",
        "# Without a task the ranker learns whether a user takes an item. With labels or events:",
        "# [[tasks]]",
        '# name = "buy"',
        '# label = {event = "buy"}  # or {column = "bought"}',
    ]
