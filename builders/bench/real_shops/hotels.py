"""Makes a shop of lists of hotels: what was shown where, at which price, and clicked."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from builders.bench.real_shops.made import QUANTILE, Made, read, share_behind
from ensemble.arrays import Array
from ensemble.errors import InvalidInput

TRIVAGO_TOML = """name = "trivago"
split = {{kind = "time", test = {test:.9f}}}

[interactions]                # shown: one row per hotel of a list that ended in a click-out; touch; click
file = "interactions.parquet"
event = "event"
impression = "shown"
history = ["touch", "click"]
position = "position"

[items]
file = "items.parquet"
id = "item_id"
features = [{{name = "price", kind = "number", log1p = true}}]

[users]
file = "users.parquet"
id = "user_id"
features = [
  {{name = "platform", kind = "category"}},
  {{name = "city", kind = "category"}},
  {{name = "device", kind = "category"}},
]

[[tasks]]
name = "click"
label = {{column = "clicked"}}
"""

TOUCHES = [f"interaction item {what}" for what in ("image", "info", "rating", "deals")] + ["search for item"]


def trivago(source: Path) -> Made:
    """Makes F1: click given impression, position and price, with what the user touched before.

    Users are users, not sessions: 88% have one session, and a later one's history then begins with the
    earlier one's touches. Platform, city and device are the user's, who has one of each (one user has two).
    """
    log = read(
        source / "funnel_trivago" / "trivago_val_100k.csv.gz", texts=("reference", "impressions", "prices")
    )
    kinds = log["action_type"].to_numpy(zero_copy_only=False).astype(str)
    clicks, times = np.flatnonzero(kinds == "clickout item"), log["timestamp"].to_numpy()
    numeric = np.char.isdigit(log["reference"].to_numpy(zero_copy_only=False).astype(str))
    touches = np.flatnonzero(np.isin(kinds, TOUCHES) & numeric)
    shown, rows, position, price = _shown(log, clicks)
    references = log["reference"].combine_chunks()
    clicked = shown == references.take(pa.array(rows)).to_numpy(zero_copy_only=False)
    rows = np.concatenate([rows, touches, clicks])
    others = len(touches) + len(clicks)
    unsaid = np.concatenate([np.zeros(len(shown), bool), np.ones(others, bool)])
    took = references.take(pa.array(rows[len(shown) :])).to_numpy(zero_copy_only=False)
    events = np.repeat(["shown", "touch", "click"], [len(shown), len(touches), len(clicks)])
    padding = np.zeros(others, np.int64)
    table = pa.table(
        {
            "user_id": log["user_id"].take(pa.array(rows)),
            "item_id": pa.array(np.concatenate([shown, took])),
            "event": pa.array(events),
            "time": times[rows],
            "clicked": pa.array(np.concatenate([clicked, padding]).astype(np.int8), mask=unsaid),
            "position": pa.array(np.concatenate([position, padding]), mask=unsaid),
            "price": pa.array(np.concatenate([price, padding]), mask=unsaid),
            "session": log["session_id"].take(pa.array(rows)),
            **{column: log[column].take(pa.array(rows)) for column in ("platform", "city", "device")},
        }
    ).take(pa.array(np.argsort(times[rows], kind="stable")))
    cut = int(np.ceil(np.quantile(times[clicks], QUANTILE)))
    toml = TRIVAGO_TOML.format(test=share_behind(times[rows], cut))
    return Made(toml, table, {"items": _hotels(table), "users": _travellers(table)})


def _shown(log: pa.Table, clicks: Array) -> tuple[Array, Array, Array, Array]:
    """Lays the lists of the click-outs in one line: items [E] text, log rows, positions from 1, prices."""
    lists = [log[name].combine_chunks().take(pa.array(clicks)) for name in ("impressions", "prices")]
    parts = [pc.split_pattern(texts, "|") for texts in lists]
    lengths = parts[0].value_lengths().to_numpy()
    if not (lengths == parts[1].value_lengths().to_numpy()).all():
        raise InvalidInput("funnel_trivago: a list has more items than prices; is the file whole?")
    items, prices = (part.flatten() for part in parts)
    position = np.arange(1, len(items) + 1) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    return (
        items.to_numpy(zero_copy_only=False),
        np.repeat(clicks, lengths),
        position,
        prices.cast(pa.int64()).to_numpy(),
    )


def _hotels(table: pa.Table) -> pa.Table:
    """Gives each hotel's middle price over all lists that showed it; no price says whether it was clicked."""
    ids = table["item_id"].unique()
    priced = table.filter(table["price"].is_valid()).select(["item_id", "price"])
    found = priced.group_by("item_id").aggregate([("price", "approximate_median")])
    return (
        pa.table({"item_id": ids})
        .join(found, "item_id")
        .rename_columns(["item_id", "price"])
        .sort_by("item_id")
    )


def _travellers(table: pa.Table) -> pa.Table:
    """Gives each user's first platform, city and device."""
    first = table.group_by("user_id", use_threads=False).aggregate(
        [(column, "first") for column in ("platform", "city", "device")]
    )
    named = {"user_id": first["user_id"]}
    named |= {column: first[f"{column}_first"] for column in ("platform", "city", "device")}
    return pa.table(named).sort_by("user_id")
