"""Makes shops of tables without a clock: a hash or a permutation splits them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa

from builders.bench.real_shops.made import Made, read, share_behind
from ensemble.arrays import Array

STEAM_TOML = """name = "steam"
split = {{kind = "time", validation = {validation:.9f}, test = {test:.9f}}}

[interactions]                # one row per purchase; time: the place in the order of a hash
file = "interactions.parquet"
history = "all"

[items]
file = "items.parquet"
id = "item_id"
title = "title"
features = [{{name = "words", column = "title", kind = "text"}}]

[[tasks]]
name = "play"
label = {{column = "played"}}

[[tasks]]
name = "hours"
kind = "regression"
label = {{column = "hours", log1p = true}}
given = "play"
"""
CENSUS_TOML = """name = "census"
split = {{kind = "time", test = {test:.9f}}}

[interactions]                # one row per person; the item is the year of the survey
file = "interactions.parquet"
history = "all"

[users]
file = "users.parquet"
id = "user_id"
features = [
{features}
]

[[tasks]]
name = "income"
label = {{column = "income"}}

[[tasks]]
name = "never_married"
label = {{column = "never_married"}}
"""


def steam(source: Path) -> Made:
    """Makes M1: play given purchase, and hours given play; a hash of (user, item) splits 80/10/10."""
    folder = source / "mo_steam"
    bought, played, titles = (
        read(folder / f"{f}.dat", "\t") for f in ("game_purchase", "game_play", "item_info")
    )
    games = 1 + max(int(table["Game_ID"].to_numpy().max()) for table in (bought, played))
    pairs = np.unique(bought["User_ID"].to_numpy() * games + bought["Game_ID"].to_numpy())
    of_play, of_pair = np.unique(
        played["User_ID"].to_numpy() * games + played["Game_ID"].to_numpy(), return_inverse=True
    )
    longest = np.zeros(len(of_play))
    np.maximum.at(longest, of_pair, played["Hours"].to_numpy())
    place = np.searchsorted(of_play, pairs).clip(max=len(of_play) - 1)
    is_played = of_play[place] == pairs
    hashed = _mixed(pairs)
    bucket = hashed % np.uint64(10)
    order = np.lexsort((hashed, bucket))
    table = pa.table(
        {
            "user_id": (pairs // games)[order],
            "item_id": (pairs % games)[order],
            "time": np.arange(len(pairs)),
            "played": is_played[order].astype(np.int8),
            "hours": pa.array(np.where(is_played, longest[place], 0.0)[order], mask=~is_played[order]),
        }
    )
    ends = np.searchsorted(bucket[order], [8, 9])
    test = share_behind(np.arange(len(pairs)), int(ends[1]))
    validation = (ends[1] - ends[0]) / (len(pairs) - 1)
    items = pa.table({"item_id": titles["Game_ID"], "title": titles["Game Name"].cast(pa.string())})
    return Made(STEAM_TOML.format(validation=validation, test=test), table, {"items": items})


def _mixed(values: Array) -> Array:
    """Gives 64 well mixed bits of each number: the finalizer of SplitMix64 (Steele et al., OOPSLA 2014)."""
    x = values.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


AMOUNTS = (0, 5, 16, 17, 18, 30, 39)  # age, wage an hour, gains, losses, dividends, employer's size, weeks
MARRIED, WEIGHT, INCOME, YEAR = 7, 24, 41, 40


def census(source: Path) -> Made:
    """Makes M3: two tasks of a person, of whom nothing is known but 39 columns; seed-0 permutation 2:1.

    A shop needs items: here the two years of the survey. Nobody has a second event, so that recall has
    nothing to learn and nothing to be asked; what this shop measures is the ranker's tasks.
    """
    path = source / "mt_census_kdd" / "census-income.test.gz"
    people = read(path, names=[f"c{at}" for at in range(42)])
    order = np.random.default_rng(0).permutation(people.num_rows)
    people, place = people.take(pa.array(order)), np.arange(people.num_rows)
    kept = [at for at in range(42) if at not in (MARRIED, WEIGHT, INCOME)]
    columns = {f"c{at}": people[f"c{at}"] for at in kept}
    amounts = {f"c{at}": columns[f"c{at}"].cast(pa.float64()) for at in AMOUNTS}
    says = (
        people[f"c{INCOME}"].to_numpy(zero_copy_only=False),
        people[f"c{MARRIED}"].to_numpy(zero_copy_only=False),
    )
    table = pa.table(
        {
            "user_id": pa.array(order),
            "item_id": people[f"c{YEAR}"],
            "time": place,
            "income": np.char.startswith(says[0].astype(str), "50000+").astype(np.int8),
            "never_married": (says[1].astype(str) == "Never married").astype(np.int8),
        }
    )
    features = ",\n".join(
        f'  {{name = "c{at}", kind = "number", log1p = true}}'
        if at in AMOUNTS
        else f'  {{name = "c{at}", kind = "category"}}'
        for at in kept
    )
    cut = -(-2 * len(place) // 3)
    toml = CENSUS_TOML.format(test=share_behind(place, cut), features=features)
    return Made(toml, table, {"users": pa.table({"user_id": pa.array(order), **columns, **amounts})})
