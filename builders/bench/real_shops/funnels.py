"""Makes shops of logs of events with a clock: who viewed, carted, bought what, when."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from builders.bench.real_shops.made import QUANTILE, Made, read, share_behind
from ensemble.arrays import Array

NEVER = np.iinfo(np.int64).max

FUNNEL_TOML = """name = "{name}"
split = {{kind = "time", test = {test:.9f}}}

[interactions]                # one row per event; a view, cart or favourite is the exposure of its own tasks
file = "interactions.parquet"
event = "event"
history = {history}
"""
TASK_TOML = """
[[tasks]]
name = "{name}"
label = {{column = "{name}", time = "{name}_time"}}
"""


@dataclass(frozen=True)
class Exposure:
    """Says which event exposes an item to which tasks: each task's label is a later event."""

    event: str
    tasks: dict[str, str]  # name: event


def funnel(name: str, path: Path, exposures: list[Exposure], history: list[str]) -> Made:
    """Makes a shop of a log with one time a (user, item, event): columns user, item, event, time."""
    events = read(path)
    users, items, times = (events[column].to_numpy() for column in ("user", "item", "time"))
    kinds = events["event"].to_numpy(zero_copy_only=False).astype(str)
    pairs = users.astype(np.int64) * (int(items.max()) + 1) + items
    own_cuts = {of.event: float(np.quantile(times[kinds == of.event], QUANTILE)) for of in exposures}
    cut = int(np.ceil(min(own_cuts.values())))
    columns: dict[str, pa.Array] = {}
    for of in exposures:
        rows = np.flatnonzero((kinds == of.event) & ((times < cut) | (times >= own_cuts[of.event])))
        for task, event in of.tasks.items():
            came = _time_of(pairs[kinds == event], times[kinds == event], pairs[rows])
            columns |= _label(task, rows, times, came)
    order = np.lexsort((items, users, times))
    table = pa.table(
        {
            "user_id": users,
            "item_id": items,
            "event": pa.array(kinds),
            "time": times,
            **columns,
        }
    ).take(pa.array(order))
    listed = "[" + ", ".join(f'"{event}"' for event in history) + "]"
    toml = FUNNEL_TOML.format(name=name, test=share_behind(times, cut), history=listed)
    return Made(toml + "".join(TASK_TOML.format(name=task) for of in exposures for task in of.tasks), table)


def _label(task: str, rows: Array, times: Array, came: Array) -> dict[str, pa.Array]:
    """Gives a task's columns over all events: label, null but in `rows` [E], and when it came in.

    came [E] is the time of the event that labels, NEVER where there is none. One at the exposure's own second
    counts as later.
    """
    positive = (came >= times[rows]) & (came < NEVER)
    values, empty = np.zeros(len(times), np.int8), np.ones(len(times), bool)
    values[rows], empty[rows] = positive, False
    when, unknown = np.zeros(len(times), np.int64), np.ones(len(times), bool)
    when[rows[positive]], unknown[rows[positive]] = came[positive], False
    return {task: pa.array(values, mask=empty), f"{task}_time": pa.array(when, mask=unknown)}


def _time_of(pairs: Array, times: Array, wanted: Array) -> Array:
    """Gives the time of each wanted pair [E] int64, NEVER where there is none. Pairs [n] occur once."""
    order = np.argsort(pairs, kind="stable")
    place = np.minimum(np.searchsorted(pairs[order], wanted), len(pairs) - 1)
    return np.where(pairs[order][place] == wanted, times[order][place], NEVER)


def retailrocket(source: Path) -> Made:
    """Makes F2: cart and buy given the first view of an item, and buy given its first cart."""
    tasks = [Exposure("view", {"cart": "cart", "buy": "buy"}), Exposure("cart", {"buy_of_cart": "buy"})]
    path = source / "funnel_retailrocket" / "events.csv.gz"
    return funnel("retailrocket", path, tasks, ["view", "cart", "buy"])


def tmall(source: Path) -> Made:
    """Makes F3: buy given the first cart, and given the first favourite, of an item."""
    tasks = [Exposure("cart", {"buy_of_cart": "buy"}), Exposure("fav", {"buy_of_fav": "buy"})]
    return funnel("tmall", source / "funnel_tmall" / "events.csv.gz", tasks, ["fav", "cart", "buy"])
