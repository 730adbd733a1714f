"""Writes a generated shop: the plain kind of builders/shop/planted.py, or the truer one of visits.py.

truth.parquet (of the rows) and truth.npz (of any user, item and time) are for tests and reports only.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from builders.content.sources import EFFICIENTNET, MINILM
from builders.folders import new_folder
from builders.shop.effects import Effects
from builders.shop.images import render_images
from builders.shop.knowable import knowable_effects
from builders.shop.planted import (
    ADJECTIVES,
    CATEGORIES,
    SHADES,
    SKIN_TYPES,
    STYLES,
    TEXTURES,
    Catalogue,
    Log,
    People,
    draw_catalogue,
    draw_people,
    draw_tastes,
    plain_effects,
    simulate_log,
)
from builders.shop.shop_toml import SHOP_FILE
from builders.shop.truth import FILE, TASKS, Truth, events_from_log, save_truth
from builders.shop.visits import draw_effects, simulate_visits
from ensemble.arrays import Array
from ensemble.errors import InvalidInput

MAX_DEFAULT_IMAGES = 2_000


def generate_shop(
    out: Path,
    *,
    users: int = 5_000,
    items: int = 2_000,
    events: int = 300_000,
    seed: int = 0,
    images: bool | None = None,
    encoders: bool = False,
    plain: bool = False,
    force: bool = False,
    progress: Callable[[str, float], None] = lambda step, share: None,
) -> None:
    """Writes a shop to `out`; `images` None renders them for at most MAX_DEFAULT_IMAGES items. With
    `encoders`, pretrained ones read titles and pictures.

    plain: all that decides stands in features and in what was clicked last, items stay, and one is shown at a
    time. Else single users and items have effects of their own, and so on: builders/shop/visits.py.
    """
    for name, value, least in (("users", users, 10), ("items", items, 24), ("events", events, 100)):
        if value < least:
            raise InvalidInput(f"--{name} {value}: at least {least}")
    rng = np.random.default_rng(seed)
    with new_folder(out, force=force) as folder:
        progress("items and users", 0.0)
        catalogue, people, tastes = (
            draw_catalogue(rng, items),
            draw_people(rng, users, events),
            draw_tastes(rng),
        )
        if plain:
            effects = plain_effects(catalogue, people, tastes)
            log = simulate_log(rng, catalogue, people, effects, progress)
        else:
            effects = draw_effects(rng, catalogue, people, tastes)
            log = simulate_visits(rng, catalogue, people, effects, progress)
        progress("writing", 0.0)
        _write_interactions(folder, log, users, items)
        save_truth(_truth(effects, log), folder / FILE)
        with_images = items <= MAX_DEFAULT_IMAGES if images is None else images
        _write_items(rng, folder, catalogue, with_images)
        _write_users(folder, people)
        text = SHOP_TOML.format(position="" if plain else POSITION_TOML)
        text += TITLE_FEATURE.format(encoder=MINILM) if encoders else ""
        if with_images:
            text += IMAGE_FEATURE + (f'encoder = "{EFFICIENTNET}"\n' if encoders else "")
        text += TASKS_TOML
        (folder / SHOP_FILE).write_text(text, "utf-8")
        if with_images:
            render_images(
                folder,
                _names("i", items),
                catalogue.shade,
                catalogue.texture,
                catalogue.scene,
                lambda share: progress("images", share),
            )


def _truth(effects: Effects, log: Log) -> Truth:
    """Puts together what truth.npz holds."""
    users, items = len(effects.style), len(effects.category)
    logs = (
        events_from_log(log.users[happened], log.items[happened], log.times[happened], users)
        for happened in (log.clicked, log.bought)
    )
    user_ids, item_ids = (np.array(_names(*of), "S") for of in (("u", users), ("i", items)))
    return Truth(user_ids, item_ids, effects, knowable_effects(effects, log), *logs)


def _write_interactions(folder: Path, log: Log, users: int, items: int) -> None:
    columns = {
        "user_id": _text(_names("u", users), log.users),
        "item_id": _text(_names("i", items), log.items),
        "time": pa.array(log.times),
        "clicked": pa.array(log.clicked.astype(np.int8)),
        "bought": pa.array(log.bought.astype(np.int8)),
        "dwell_s": pa.array(log.dwell_s.astype(np.float32), from_pandas=True),
    }
    if log.positions is not None:
        columns["position"] = pa.array(log.positions.astype(np.int16))
    pq.write_table(pa.table(columns), folder / "interactions.parquet")
    truth = {name: pa.array(log.truth[:, at].astype(np.float32)) for at, name in enumerate(TASKS)}
    pq.write_table(pa.table(truth), folder / "truth.parquet")


def _write_items(rng: np.random.Generator, folder: Path, catalogue: Catalogue, with_images: bool) -> None:
    num = len(catalogue.category)
    ids = _names("i", num)
    category, brand = _text(CATEGORIES, catalogue.category), _text(catalogue.brand_names, catalogue.brand)
    shade, texture = _text(SHADES, catalogue.shade), _text(TEXTURES, catalogue.texture)
    adjective = _text(ADJECTIVES, (catalogue.texture * 2 + rng.integers(0, 3, num)) % len(ADJECTIVES))
    columns = {
        "item_id": pa.array(ids),
        "title": _joined(brand, adjective, texture, shade, category),
        "category": category,
        "brand": brand,
        "shade": shade,
        "texture": texture,
        "price": pa.array(catalogue.price),
    }
    if with_images:
        columns["image"] = pa.array([f"images/{name}.png" for name in ids])
    pq.write_table(pa.table(columns), folder / "items.parquet")


def _write_users(folder: Path, people: People) -> None:
    columns = {
        "user_id": pa.array(_names("u", len(people.age))),
        "style": _text(STYLES, people.style),
        "skin_type": _text(SKIN_TYPES, people.skin),
        "age": pa.array(people.age),
    }
    pq.write_table(pa.table(columns), folder / "users.parquet")


def _names(prefix: str, num: int) -> list[str]:
    """Makes the ids u1, u2, …."""
    return [f"{prefix}{at}" for at in range(1, num + 1)]


def _text(values: tuple[str, ...] | list[str], index: Array) -> pa.Array:
    return pa.array(values).take(pa.array(index))


def _joined(*parts: pa.Array) -> pa.Array:
    return pc.binary_join_element_wise(*parts, " ")


SHOP_TOML = """\
# A generated beauty shop. builders/shop/shop_toml.py and `peregrine shop --help` explain every key.
name = "generated beauty"
split = "time"  # the last tenth of the clock tests, the tenth before it validates

[interactions]
file = "interactions.parquet"  # one row per shown item
user = "user_id"
item = "item_id"
time = "time"  # Unix seconds
history = "ctr"  # clicks form a user's history
truth = "truth.parquet"  # the planted probabilities of the rows: for tests, never learned from
planted = "truth.npz"  # those of any user, item and time: what a list is worth, never learned from
{position}
[users]
file = "users.parquet"
id = "user_id"
features = [
  {{name = "style", kind = "category"}},
  {{name = "skin_type", kind = "category"}},
  {{name = "age", kind = "number"}},
]

[items]
file = "items.parquet"
id = "item_id"
title = "title"

[[items.features]]
name = "category"
kind = "category"

[[items.features]]
name = "brand"
kind = "category"

[[items.features]]
name = "shade"
kind = "category"

[[items.features]]
name = "texture"
kind = "category"

[[items.features]]
name = "price"
kind = "number"
log1p = true

[[items.features]]
name = "words"
column = "title"
kind = "text"
"""
POSITION_TOML = 'position = "position"  # the place where an item was shown, 1 = first\n'
# beside its words: recall's content source and the ranker read those
TITLE_FEATURE = """
[[items.features]]
name = "title"
kind = "text"
encoder = "{encoder}"
"""
IMAGE_FEATURE = """
[[items.features]]
name = "image"
kind = "image"
"""
TASKS_TOML = """
[[tasks]]
name = "ctr"
kind = "binary"
label = {column = "clicked"}
weight = 1.0

[[tasks]]
name = "cvr"
kind = "binary"
label = {column = "bought"}
given = "ctr"  # over the whole space: P(buy) = P(click) P(buy given click)
weight = 1.0

[[tasks]]
name = "dwell"
kind = "regression"
label = {column = "dwell_s", log1p = true}
given = "ctr"
weight = 0.1
"""
