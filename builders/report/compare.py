"""Writes two releases side by side as one HTML page: which is better, for whom, what some users would see.

The verdict is on held-out rows that both verified models had not seen (ensemble/release/held_out.py); the
figures below it are each release's own, and the lists are what each would answer now.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from builders.report.html import document
from builders.report.markup import escaped, number, table_of
from builders.report.thumbnails import Thumbnails, thumbnails
from builders.verify.newcomers import GROUPS, cell
from ensemble.arrays import Array
from ensemble.local import LocalPipeline
from ensemble.release.held_out import HELD_OUT, Comparison, read_held_out
from ensemble.release.release import Release
from ensemble.steps.served import ServedRelease

USERS, PLACES = 50, 10


def comparison_page(
    first: ServedRelease, second: ServedRelease, verdict: Comparison, shop: Path | None = None
) -> str:
    """Writes the page; `verdict` is of the second release beside the first. Where the shop's folder is given,
    its pictures stand beside the items."""
    reports = [release.manifest.get("report") or {} for release in (first, second)]
    names = [first.name, second.name]
    title = f"{first.manifest['shop']}: release {second.name} beside {first.name}"
    users = shared_users(first, second)
    parts = [
        f"<h1>{escaped(title)}</h1>",
        f'<p class="headline">{escaped(sentence(verdict, *names))}</p>',
        "<h2>Figures of each release, on its own held-out rows</h2>",
        table_of(["", *names, "difference"], figure_rows(*reports)),
        *_for_whom(names, reports),
        *_lists(first, second, users, shop),
    ]
    return document(title, parts)


def sentence(verdict: Comparison, first: str, second: str) -> str:
    """Says which release is better, or that nobody can tell."""
    line = verdict.line(second, first)
    if verdict.low is None or verdict.high is None:
        return line[0].upper() + line[1:] + "."
    which = (
        f"{second} is better than {first}"
        if verdict.low > 0
        else f"{second} is worse than {first}"
        if verdict.high < 0
        else f"{second} and {first} cannot be told apart"
    )
    return f"{which}: {line}."


def figure_rows(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[list[str]]:
    """Gives the rows of the figures that both reports have: name, both values, their difference."""
    one, other = _figures(first), _figures(second)
    return [
        [name, number(one[name]), number(other[name]), f"{other[name] - one[name]:+.4f}"]
        for name in one
        if name in other
    ]


def _figures(report: Mapping[str, Any]) -> dict[str, float]:
    """Names a report's main figures."""
    found = {}
    if chain := (report.get("worth") or {}).get("ways", {}).get("chain"):
        found["worth of an item shown"] = chain["worth"]
    for name, value in (report.get("ranking") or {}).get("ways", {}).get("chain", {}).items():
        found[f"next item: {name}"] = value
    for task, of in (report.get("tasks") or {}).items():
        found |= {f"{task}: {name}": of[name] for name in ("auc", "ece", "rmse") if name in of}
    if shown := (report.get("shown") or {}).get("ways", {}).get("chain"):
        found["share of the catalogue shown"] = shown["coverage"]
        for name in ("novelty", "diversity"):
            if shown[name]:
                found[f"{name} of lists"] = shown[name]["value"]
    return {name: value for name, value in found.items() if value is not None}


def _for_whom(names: Sequence[str], reports: Sequence[Mapping[str, Any]]) -> list[str]:
    """Sets the releases side by side for users and items of few and of many events."""
    parts = []
    for what, head in (("users", "events of the user"), ("items", "events of the item")):
        groups = [of for report in reports if (of := (report.get("newcomers") or {}).get(what))]
        if len(groups) < len(reports):
            continue
        worth = all(of is not None and of.get("worth") is not None for one in groups for of in _asked(one))
        figure = "worth" if worth else "hr@10"
        rows = [
            [
                group,
                *(
                    number(value)
                    for one in groups
                    for value in (one[group]["targets"], cell(one[group], figure) or None)
                ),
            ]
            for group in GROUPS
        ]
        columns = [f"{name}: {column}" for name in names for column in ("held out", figure)]
        parts.append(table_of([head, *columns], rows))
    return ["<h2>For whom</h2>", *parts] if parts else []


def _asked(groups: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Gives the groups that have any held-out rows."""
    return [of for of in groups.values() if of.get("targets")]


def shared_users(first: Release, second: Release) -> list[bytes]:
    """Draws held-out users that both releases have: up to 50, always the same ones."""
    files = [read_held_out(release.path / HELD_OUT) for release in (first, second)]
    users = [np.unique(rows["user"]) for rows in files if rows is not None]
    if len(users) < len(files):
        return []
    both = np.intersect1d(*users)
    return np.sort(np.random.default_rng(0).permutation(both)[:USERS]).tolist()


def _lists(
    first: ServedRelease, second: ServedRelease, users: Sequence[bytes], shop: Path | None
) -> list[str]:
    """Sets what each of the users would see side by side; what only one of the lists has is bold."""
    if not users:
        return []
    found = [
        LocalPipeline(release).recommend(users, {"top_k": PLACES})["item_ids"] for release in (first, second)
    ]
    is_shared = [_is_in(found[place], found[1 - place]) for place in (0, 1)]
    titles = [_titles(release, ids) for release, ids in zip((first, second), found, strict=True)]
    shown = list(dict.fromkeys(item for ids in found for item in ids.ravel().tolist() if item))
    pictures = None if shop is None else thumbnails(shop, shown, second.home)
    classes = _classes(pictures)
    same = is_shared[0].sum() / max(1, sum(int(item != b"") for item in found[0].ravel().tolist()))
    head = ["user", first.name, second.name]
    lines = ["<tr>" + "".join(f"<th>{escaped(cell)}</th>" for cell in head) + "</tr>"]
    for at, user in enumerate(users):
        cells = [
            _cell(titles[place][at], is_shared[place][at], [classes.get(one) for one in found[place][at]])
            for place in (0, 1)
        ]
        lines.append(f"<tr><td>{escaped(user.decode(errors='replace'))}</td>{''.join(cells)}</tr>")
    return [
        f"<h2>What {len(users)} held-out users would see now</h2>",
        f"<p>{same:.0%} of the places hold an item that the other list has too; all others are bold.</p>",
        *_styles(pictures, classes),
        f'<div class="scroll"><table class="lists">{"".join(lines)}</table></div>',
    ]


def _is_in(lists: Array, others: Array) -> Array:
    """Says of each place of lists [Q, K] whether the other list of the same user has the item; none where
    there is no item."""
    return (lists[:, :, None] == others[:, None, :]).any(-1) & (lists != b"")


def _titles(release: ServedRelease, ids: Array) -> list[list[str]]:
    """Gives items' titles, or their ids where there are none, without the empty places at a list's end."""
    rows = release.item_ids.rows_from_ids(ids.ravel()).reshape(ids.shape)
    titles = release.item_titles[rows] if (release.path / "item_titles.npy").exists() else ids
    return [
        [(title or one).decode(errors="replace") for title, one in zip(mine, of, strict=True) if one]
        for mine, of in zip(titles.tolist(), ids.tolist(), strict=True)
    ]


def _classes(pictures: Thumbnails | None) -> dict[bytes, str]:
    """Names each picture's style: in the page it stands once, however many lists show it."""
    return {item: f"p{at}" for at, item in enumerate(pictures.by_item)} if pictures else {}


def _styles(pictures: Thumbnails | None, classes: Mapping[bytes, str]) -> list[str]:
    """Writes the pictures, and how many there are."""
    if pictures is None:
        return []
    rules = [
        f".{classes[item]}{{background-image:url(data:image/jpeg;base64,{text})}}"
        for item, text in pictures.by_item.items()
    ]
    return [f"<p>{escaped(pictures.note())}</p>", f"<style>{''.join(rules)}</style>"]


def _cell(titles: Sequence[str], is_shared: Array, classes: Sequence[str | None]) -> str:
    """Writes a list; what the other lacks is bold."""
    items = []
    for title, shared, of in zip(titles, is_shared, classes, strict=False):
        text = escaped(title) if shared else f"<b>{escaped(title)}</b>"
        items.append(
            f'<li class="pictured"><i class="picture {of}"></i>{text}</li>' if of else f"<li>{text}</li>"
        )
    return f"<td><ol>{''.join(items)}</ol></td>"
