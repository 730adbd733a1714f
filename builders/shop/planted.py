"""Draws what a generated shop sells, who visits and what they like, and the log of a plain shop.

What a user will like depends on the user's style and skin type, on age (how much a price hurts), on a
favourite shade that only the history tells, and on the category of the item clicked last: after lipstick,
remover. All of it can be learned from features and history, so in a plain shop a good ranker comes close to
the oracle; popularity, which knows no user, stays behind. builders/shop/visits.py draws what real shops have
beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from builders.shop.effects import Effects, Moment, sigmoid
from ensemble.arrays import Array

CATEGORIES = (
    "lipstick",
    "remover",
    "foundation",
    "primer",
    "mascara",
    "eyeshadow",
    "blush",
    "nail polish",
    "serum",
    "moisturizer",
    "sunscreen",
    "perfume",
)
NEXT_CATEGORY = (1, 0, 3, 2, 1, 4, 6, 7, 9, 10, 2, 8)  # what goes with what was clicked last
SHADES = ("nude", "rose", "coral", "red", "berry", "plum", "bronze", "clear")
TEXTURES = ("matte", "gloss", "cream", "powder")
STYLES = ("natural", "glam", "trendy", "classic", "sporty", "artist")
SKIN_TYPES = ("dry", "oily", "normal", "sensitive")
TYPICAL_PRICE = (14, 9, 28, 22, 16, 24, 18, 8, 38, 26, 20, 60)  # per category
ADJECTIVES = (
    "velvet",
    "soft",
    "intense",
    "daily",
    "silky",
    "radiant",
    "light",
    "long-lasting",
    "hydrating",
    "classic",
)
SYLLABLES = ("lu", "ma", "ve", "ri", "so", "na", "be", "lo", "ca", "mi", "da", "er")

LAST_EVENT_S = 1_750_000_000  # June 2025: a seed always gives the same files, and never a future time
SPAN_S = 180 * 86_400


@dataclass(frozen=True)
class Catalogue:
    """Holds items and what is true of them; arrays are [I] unless said otherwise."""

    category: Array
    brand: Array
    shade: Array
    texture: Array
    scene: Array
    price: Array  # currency units
    dearness: Array  # log1p(price), standardized
    popularity: Array  # weights of the logging policy, sum 1
    click_quality: Array  # logit
    buy_quality: Array  # logit
    brand_names: list[str]


@dataclass(frozen=True)
class People:
    """Holds users; arrays are [U]."""

    style: Array
    skin: Array
    age: Array
    shade: Array  # the favourite: in no file, only the history shows it
    price_pain: Array  # logit per unit of dearness
    num_events: Array


@dataclass(frozen=True)
class Tastes:
    """Holds the tables of logits by which users click."""

    style_category: Array  # [styles, categories]
    skin_texture: Array  # [skin types, textures]
    next_category: Array  # [categories + 1, categories], row 0 = nothing clicked yet


def draw_catalogue(rng: np.random.Generator, num: int) -> Catalogue:
    category = rng.choice(len(CATEGORIES), num, p=_zipf(len(CATEGORIES), 0.4))
    num_brands = int(np.clip(num // 40, 12, 300))
    brand = rng.choice(num_brands, num, p=_zipf(num_brands, 0.6))
    shade, texture, scene = (rng.integers(0, n, num) for n in (len(SHADES), len(TEXTURES), 3))
    tier = rng.normal(0, 0.6, num_brands)  # a brand's price level
    price = np.round(
        np.array(TYPICAL_PRICE)[category] * np.exp(0.45 * (tier[brand] + rng.normal(0, 0.8, num))), 2
    )
    dearness = (np.log1p(price) - np.log1p(price).mean()) / np.log1p(price).std()
    popularity = rng.permutation(_zipf(num, 0.7))
    click_quality = rng.normal(0, 0.3, num_brands)[brand] + rng.normal(0, 0.15, num)
    buy_quality = rng.normal(0, 0.25, num_brands)[brand] + rng.normal(0, 0.3, len(CATEGORIES))[category]
    names = ["".join(rng.choice(SYLLABLES, 3)).title() + f"{at:03d}" for at in range(num_brands)]
    return Catalogue(
        category, brand, shade, texture, scene, price, dearness, popularity, click_quality, buy_quality, names
    )


def draw_people(rng: np.random.Generator, num: int, events: int) -> People:
    age = np.clip(rng.normal(34, 11, num), 16, 80).round()
    activity = rng.lognormal(0, 0.8, num)
    return People(
        style=rng.choice(len(STYLES), num),
        skin=rng.choice(len(SKIN_TYPES), num),
        age=age,
        shade=rng.integers(0, len(SHADES), num),
        price_pain=np.clip(
            (40 - age) / 16, -1.0, 1.2
        ),  # the young mind prices, the old distrust what is cheap
        num_events=rng.multinomial(events, activity / activity.sum()),
    )


def draw_tastes(rng: np.random.Generator) -> Tastes:
    jump = np.zeros((len(CATEGORIES) + 1, len(CATEGORIES)))
    jump[1 + np.arange(len(CATEGORIES)), NEXT_CATEGORY] = 1.8
    return Tastes(
        _spread(rng, (len(STYLES), len(CATEGORIES)), 0.9),
        _spread(rng, (len(SKIN_TYPES), len(TEXTURES)), 0.6),
        jump,
    )


def _spread(rng: np.random.Generator, shape: tuple[int, int], deviation: float) -> Array:
    """Draws logits whose mean per column is 0, else popularity would learn a category that all like."""
    table = rng.normal(0, deviation, shape)
    return table - table.mean(0)


@dataclass(frozen=True)
class Log:
    """Holds interactions in time order, [n] each; `truth` [n, 3] has the planted mean of each task."""

    users: Array
    items: Array
    times: Array
    clicked: Array
    bought: Array
    dwell_s: Array  # NaN without a click
    truth: Array
    positions: Array | None = None  # 1 = first; None in a plain shop, which shows one item at a time


def plain_effects(catalogue: Catalogue, people: People, tastes: Tastes) -> Effects:
    """Puts together what decides in a plain shop: nothing of single users or items, and no time."""
    users, items = len(people.style), len(catalogue.category)
    return Effects(
        base=np.array(-1.9),
        style=people.style,
        skin=people.skin,
        price_pain=people.price_pain,
        shade_taste=shade_taste(people),
        user_click=np.zeros(users),
        user_buy=np.zeros(users),
        user_taste=np.zeros((users, 0)),
        category=catalogue.category,
        texture=catalogue.texture,
        shade=catalogue.shade,
        dearness=catalogue.dearness,
        click_quality=catalogue.click_quality,
        buy_quality=catalogue.buy_quality,
        item_click=np.zeros(items),
        item_buy=np.zeros(items),
        item_taste=np.zeros((items, 0)),
        launched=np.zeros(items, np.int64),
        gone=np.full(items, np.iinfo(np.int64).max),
        style_category=tastes.style_category,
        skin_texture=tastes.skin_texture,
        next_category=tastes.next_category,
        season=np.zeros((len(CATEGORIES), 2)),
        examined=np.ones(1),
    )


def shade_taste(people: People) -> Array:
    """Gives the logit that each shade adds for each user: [U, shades]."""
    return 0.4 * (people.shade[:, None] == np.arange(len(SHADES)))


def dwell_seconds(rng: np.random.Generator, clicked: Array, mean_log: Array) -> Array:
    """Draws how long each row [n] was looked at, in seconds; NaN without a click."""
    drawn = np.expm1(np.maximum(mean_log + rng.normal(0, 0.6, len(mean_log)), 0.0))
    return np.round(np.where(clicked, drawn, np.nan), 2)


def simulate_log(
    rng: np.random.Generator,
    catalogue: Catalogue,
    people: People,
    effects: Effects,
    progress: Callable[[str, float], None],
) -> Log:
    """Draws everybody's k-th exposure at once, k = 0, 1, …: only the category clicked last is carried on."""
    busiest = np.argsort(-people.num_events, kind="stable")
    counts = people.num_events[busiest]
    total, steps = int(counts.sum()), int(counts.max())
    active = np.searchsorted(-counts, -np.arange(steps), side="left")  # users with more than k events
    starts = np.concatenate([[0], np.cumsum(active)])
    users, items = np.empty(total, np.int64), np.empty(total, np.int64)
    clicked, click_truth = np.empty(total, bool), np.empty(total)
    last = np.zeros(len(counts), np.int64)  # 1 + category clicked last, 0 = none yet
    policy = _Policy(catalogue, effects)
    for k in range(steps):
        row, who = slice(starts[k], starts[k + 1]), busiest[: active[k]]
        shown = policy.draw(rng, people.style[who], last[who])
        probability = sigmoid(effects.click_logit(who, shown[:, None], _timeless(last[who]))[:, 0])
        hit = rng.random(len(who)) < probability
        last[who] = np.where(hit, 1 + catalogue.category[shown], last[who])
        users[row], items[row], clicked[row], click_truth[row] = who, shown, hit, probability
        if k % 50 == 0:
            progress("interactions", starts[k] / total)
    order = np.argsort(users, kind="stable")  # rows came step by step: each user's stay in order
    columns = (users[order], items[order], clicked[order], click_truth[order])
    return _in_time(rng, people, _outcome(rng, effects, *columns))


def _timeless(last: Array) -> Moment:
    """Gives moments [Q] of a plain shop, where only the category clicked last counts."""
    none = np.zeros((len(last), 0), np.int64)
    return Moment(last, np.zeros(len(last), np.int64), none, none)


def _outcome(
    rng: np.random.Generator,
    effects: Effects,
    users: Array,
    items: Array,
    clicked: Array,
    click_truth: Array,
) -> Log:
    """Draws purchase and dwell after each click; times are still to come."""
    buy = sigmoid(effects.buy_logit(users, items[:, None], _timeless(np.zeros_like(users)))[:, 0])
    mean_log_dwell = effects.mean_log_dwell(users, items[:, None])[:, 0]
    bought = clicked & (rng.random(len(users)) < buy)
    dwell = dwell_seconds(rng, clicked, mean_log_dwell)
    truth = np.stack([click_truth, buy, mean_log_dwell], axis=1)
    return Log(users, items, np.zeros(0, np.int64), clicked, bought, dwell, truth)


def _in_time(rng: np.random.Generator, people: People, log: Log) -> Log:
    """Gives every row a time, strictly ascending per user, and sorts all by it."""
    drawn = rng.integers(0, SPAN_S, len(log.users))
    drawn = drawn[np.lexsort((drawn, log.users))]  # rows are by user already: each one's times in order
    nth = np.arange(len(drawn)) - np.repeat(
        np.cumsum(people.num_events) - people.num_events, people.num_events
    )
    times = LAST_EVENT_S - SPAN_S - int(people.num_events.max()) + drawn + nth
    order = np.lexsort((log.users, times))
    return Log(
        log.users[order],
        log.items[order],
        times[order],
        log.clicked[order],
        log.bought[order],
        log.dwell_s[order],
        log.truth[order],
    )


class _Policy:
    """Chooses what is shown: in part popular, in part to the user's taste, in part anything."""

    def __init__(self, catalogue: Catalogue, effects: Effects) -> None:
        self.popular = np.cumsum(catalogue.popularity)
        self.by_category = np.argsort(catalogue.category, kind="stable")
        self.within = np.concatenate([[0.0], np.cumsum(catalogue.popularity[self.by_category])])
        self.bounds = np.searchsorted(catalogue.category[self.by_category], np.arange(len(CATEGORIES) + 1))
        weights = np.exp(effects.style_category[:, None, :] + effects.next_category[None, :, :])
        weights *= np.diff(self.bounds) > 0  # a tiny shop may have an empty category
        # [styles, last, categories]
        self.category = np.cumsum(weights / weights.sum(-1, keepdims=True), axis=-1)

    def draw(self, rng: np.random.Generator, style: Array, last: Array) -> Array:
        """Draws items shown to users of these styles and last clicks: [n] int64."""
        num, top = len(style), len(self.popular) - 1
        mode, u, v = rng.random((3, num))
        popular = np.minimum(np.searchsorted(self.popular, u), top)
        category = (self.category[style, last] < v[:, None]).sum(1).clip(max=len(CATEGORIES) - 1)
        low, high = self.within[self.bounds[category]], self.within[self.bounds[category + 1]]
        place = np.searchsorted(self.within, low + u * (high - low), side="right") - 1
        tasteful = self.by_category[
            place.clip(self.bounds[category], np.maximum(self.bounds[category + 1] - 1, 0)).clip(max=top)
        ]
        anything = np.minimum((u * len(self.popular)).astype(np.int64), top)
        return np.where(mode < 0.3, popular, np.where(mode < 0.7, tasteful, anything))


def _zipf(num: int, exponent: float) -> Array:
    weights = 1.0 / np.arange(1, num + 1) ** exponent
    return weights / weights.sum()
