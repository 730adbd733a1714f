"""Draws what single users and items have of their own, and the log of a shop where it matters.

Users come back for visits, each of which shows a list; what it shows follows what is popular by then, what
the user clicked before and, in part, nothing; further down it is looked at less. All users whose visit falls
into one round are drawn at once, round by round, since popularity and purchases are carried on.

Axes: U users, I items, V visits of a round, P places of a list, C what a list is chosen from.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from builders.shop.effects import DAY_S, REMEMBERED, YEAR_DAYS, Effects, Moment
from builders.shop.planted import (
    CATEGORIES,
    LAST_EVENT_S,
    SPAN_S,
    Catalogue,
    Log,
    People,
    Tastes,
    dwell_seconds,
    shade_taste,
)
from ensemble.arrays import Array

PLACES = 8  # of a list
TASTES = 4  # hidden dimensions of taste
# Standard deviations of hidden effects, in logits
SPREAD = {"user_click": 0.6, "user_buy": 0.5, "item_click": 0.5, "item_buy": 0.5}
MATCH_SPREAD = 0.7  # of a user's hidden taste for an item
_BASE = -1.3
_CHOICES = 32  # items that a list is chosen from
_ROUNDS = 180  # at least: one a day
_HALF_LIFE_DAYS = 30  # of a click's share in popularity
_NEVER_GONE = np.iinfo(np.int64).max


def draw_effects(rng: np.random.Generator, catalogue: Catalogue, people: People, tastes: Tastes) -> Effects:
    """Draws what no feature tells, seasons and the lives of items, and puts them to what features tell."""
    users, items = len(people.style), len(catalogue.category)
    own = {
        name: rng.normal(0, deviation, users if name.startswith("user") else items)
        for name, deviation in SPREAD.items()
    }
    scale = np.sqrt(MATCH_SPREAD) / TASTES**0.25  # of each side: their inner product has MATCH_SPREAD
    launched, gone = _lives(rng, items)
    return Effects(
        base=np.array(_BASE),
        style=people.style,
        skin=people.skin,
        price_pain=people.price_pain,
        shade_taste=shade_taste(people),
        user_taste=rng.normal(0, scale, (users, TASTES)),
        category=catalogue.category,
        texture=catalogue.texture,
        shade=catalogue.shade,
        dearness=catalogue.dearness,
        click_quality=catalogue.click_quality,
        buy_quality=catalogue.buy_quality,
        item_taste=rng.normal(0, scale, (items, TASTES)),
        launched=launched,
        gone=gone,
        style_category=tastes.style_category,
        skin_texture=tastes.skin_texture,
        next_category=tastes.next_category,
        season=np.stack(
            [np.abs(rng.normal(0, 0.6, len(CATEGORIES))), rng.uniform(0, YEAR_DAYS, len(CATEGORIES))], axis=1
        ),
        examined=np.arange(1, PLACES + 1) ** -0.5,
        **own,
    )


def _lives(rng: np.random.Generator, items: int) -> tuple[Array, Array]:
    """Draws when each item comes and goes: three quarters are there at first, a seventh does not stay."""
    begin = LAST_EVENT_S - SPAN_S
    is_new, leaves = rng.random(items) < 0.25, rng.random(items) < 0.15
    launched = np.where(
        is_new, begin + (rng.random(items) * 0.95 * SPAN_S).astype(np.int64), begin - YEAR_DAYS * DAY_S
    )
    stays_s = (rng.uniform(0.3, 1.0, items) * SPAN_S).astype(np.int64)
    return launched, np.where(leaves & ~is_new, begin + stays_s, _NEVER_GONE)


@dataclass(frozen=True)
class Visits:
    """Holds all visits in the order of their rounds, [n] each."""

    users: Array
    rounds: Array
    sizes: Array  # places that are logged, 1 to PLACES
    num_rounds: int

    def of_round(self) -> Array:
        """Gives where each round's visits begin and end: [num_rounds + 1] int64."""
        return np.searchsorted(self.rounds, np.arange(self.num_rounds + 1))


def draw_visits(rng: np.random.Generator, num_events: Array) -> Visits:
    """Lays each user's events [U] into visits of at most one a round; half of the users come later."""
    counts = -(-num_events // PLACES)
    num_rounds = max(_ROUNDS, int(counts.max()))
    late = np.where(rng.random(len(counts)) < 0.5, 0.0, rng.uniform(0, 0.9, len(counts)))
    first = (late * (num_rounds - counts)).astype(np.int64)
    users = np.repeat(np.arange(len(counts)), counts)
    nth = np.arange(len(users)) - np.repeat(np.cumsum(counts) - counts, counts)
    room = (num_rounds - first)[users]  # cut into as many pieces as there are visits: one in each
    low, high = nth * room // counts[users], (nth + 1) * room // counts[users]
    rounds = first[users] + low + (rng.random(len(users)) * (high - low)).astype(np.int64)
    sizes = np.where(nth == counts[users] - 1, num_events[users] - PLACES * nth, PLACES)
    order = np.argsort(rounds, kind="stable")
    return Visits(users[order], rounds[order], sizes[order], num_rounds)


class _State:
    """Carries on what a round leaves to the next: who clicked and bought what, and what is popular."""

    def __init__(self, effects: Effects, catalogue: Catalogue, num_events: int) -> None:
        users = len(effects.style)
        self.effects = effects
        self.last_item = np.full(users, -1, np.int64)
        self.bought = np.full((users, REMEMBERED), -1, np.int64)
        self.bought_times = np.zeros((users, REMEMBERED), np.int64)
        self.num_bought = np.zeros(users, np.int64)
        self.popular = catalogue.popularity * 0.05 * num_events  # clicks, older ones count less

    def moment(self, users: Array, times: Array) -> Moment:
        """Gives what is true of users [V] before their visits at times [V]."""
        item = self.last_item[users]
        last = np.where(item >= 0, 1 + self.effects.category[item], 0)
        return Moment(last, times, self.bought[users], self.bought_times[users])

    def add(self, users: Array, times: Array, shown: Array, clicked: Array, bought: Array) -> None:
        """Takes up what users [V] did in their visits: shown [V, P], clicked and bought [V, P] bool."""
        any_click = clicked.any(axis=1)
        place = shown.shape[1] - 1 - clicked[:, ::-1].argmax(axis=1)
        self.last_item[users[any_click]] = shown[any_click, place[any_click]]
        np.add.at(self.popular, shown[clicked], 1.0)
        for column in range(shown.shape[1]):
            who = users[bought[:, column]]
            slot = self.num_bought[who] % REMEMBERED
            self.bought[who, slot] = shown[bought[:, column], column]
            self.bought_times[who, slot] = times[bought[:, column]]
            self.num_bought[who] += 1


def simulate_visits(
    rng: np.random.Generator,
    catalogue: Catalogue,
    people: People,
    effects: Effects,
    progress: Callable[[str, float], None],
) -> Log:
    """Draws the log of all visits, in time order, those of a list by place."""
    visits = draw_visits(rng, people.num_events)
    state = _State(effects, catalogue, int(people.num_events.sum()))
    policy = _Policy(effects)
    bounds, round_s = visits.of_round(), SPAN_S // visits.num_rounds
    renewed = max(1, visits.num_rounds // _ROUNDS)
    parts = []
    for k in range(visits.num_rounds):
        piece = slice(bounds[k], bounds[k + 1])
        begin = LAST_EVENT_S - SPAN_S + k * round_s
        if k % renewed == 0:
            policy.renew(state.popular, begin)
            state.popular *= 0.5 ** (renewed * round_s / DAY_S / _HALF_LIFE_DAYS)
            progress("interactions", k / visits.num_rounds)
        users = visits.users[piece]
        if len(users):
            times = begin + (rng.random(len(users)) * round_s).astype(np.int64)
            parts.append(_visit(rng, effects, state, policy, users, times, visits.sizes[piece]))
    log = [np.concatenate(column) for column in zip(*parts, strict=True)]
    users, items, times, clicked, bought, truth, positions = log
    dwell = dwell_seconds(rng, clicked, truth[:, 2])
    order = np.lexsort((positions, users, times))
    columns = (users, items, times, clicked, bought, dwell, truth, positions)
    return Log(*(column[order] for column in columns))


def _visit(
    rng: np.random.Generator,
    effects: Effects,
    state: _State,
    policy: _Policy,
    users: Array,
    times: Array,
    sizes: Array,
) -> tuple[Array, ...]:
    """Draws one round's visits: what is shown, clicked and bought; gives the log's columns."""
    moment = state.moment(users, times)
    shown = policy.draw(rng, effects.style[users], moment.last, state.last_item[users])
    positions = np.broadcast_to(np.arange(1, PLACES + 1), shown.shape)
    truth = effects.tasks(users, shown, moment, positions)
    clicked = (rng.random(shown.shape) < truth[..., 0]) & (positions <= sizes[:, None])
    bought = clicked & (rng.random(shown.shape) < truth[..., 1])
    state.add(users, times, shown, clicked, bought)
    logged = positions <= sizes[:, None]
    who, when = (np.broadcast_to(column[:, None], shown.shape) for column in (users, times))
    return tuple(column[logged] for column in (who, shown, when, clicked, bought, truth, positions))


class _Policy:
    """Chooses the lists of a round: what is popular, fits the style or was clicked last, and anything."""

    def __init__(self, effects: Effects) -> None:
        self.effects = effects
        self.by_category = np.argsort(effects.category, kind="stable")
        codes = np.arange(len(CATEGORIES) + 1)
        self.bounds = np.searchsorted(effects.category[self.by_category], codes)
        self.wanted = effects.style_category[:, None, :] + effects.next_category[None, :, :]

    def renew(self, popular: Array, now_s: int) -> None:
        """Takes up what is popular [I], and what is for sale, now."""
        effects = self.effects
        self.is_there = (effects.launched <= now_s) & (now_s < effects.gone)
        self.there = np.flatnonzero(self.is_there)
        age_days = np.maximum(now_s - effects.launched, 0) / DAY_S
        self.weights = np.where(self.is_there, popular + 0.2 + 3.0 * (age_days < 14), 0.0)
        self.popular = np.cumsum(self.weights)
        self.within = np.concatenate([[0.0], np.cumsum(self.weights[self.by_category])])
        low, high = self.within[self.bounds[:-1]], self.within[self.bounds[1:]]
        chances = np.exp(self.wanted) * (high > low)  # a category may have nothing for sale
        self.category = np.cumsum(chances / chances.sum(-1, keepdims=True), axis=-1)

    def draw(self, rng: np.random.Generator, style: Array, last: Array, last_item: Array) -> Array:
        """Draws the lists shown to users of these styles and last clicks: [V, P] int64, best places first."""
        choices = self._choices(rng, style, last, last_item)
        score = 0.35 * np.log(np.maximum(self.weights[choices], 1e-9))
        score += 0.5 * self.wanted[style[:, None], last[:, None], self.effects.category[choices]]
        score += rng.gumbel(size=score.shape)
        score[_is_repeat(choices)] -= 1e6
        best = np.argsort(-score, axis=1, kind="stable")[:, :PLACES]
        return np.take_along_axis(choices, best, axis=1)

    def _choices(self, rng: np.random.Generator, style: Array, last: Array, last_item: Array) -> Array:
        """Draws what lists are chosen from: [V, C] int64, all for sale."""
        num = len(style)
        if len(self.there) <= _CHOICES:  # a tiny shop: everything
            return np.broadcast_to(self.there, (num, len(self.there)))
        mode, u, v = rng.random((3, num, _CHOICES))
        popular = np.searchsorted(self.popular, u * self.popular[-1], side="right")
        category = (
            (self.category[style, last][:, None, :] < v[..., None]).sum(-1).clip(max=len(CATEGORIES) - 1)
        )
        low, high = self.within[self.bounds[category]], self.within[self.bounds[category + 1]]
        place = np.searchsorted(self.within, low + u * (high - low), side="right") - 1
        fitting = self.by_category[place.clip(max=len(self.by_category) - 1)]
        anything = self.there[(u * len(self.there)).astype(np.int64)]
        again = np.broadcast_to(last_item[:, None], u.shape)
        chosen = np.select(
            [mode < 0.4, mode < 0.75, mode < 0.8],
            [popular.clip(max=len(self.weights) - 1), fitting, again],
            anything,
        )
        return np.where((chosen >= 0) & self.is_there[chosen], chosen, anything)


def _is_repeat(items: Array) -> Array:
    """Says which of items [V, C] stand before in their row: [V, C] bool."""
    order = np.argsort(items, axis=1, kind="stable")
    ordered = np.take_along_axis(items, order, axis=1)
    again = np.zeros(items.shape, bool)
    again[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
    out = np.empty_like(again)
    np.put_along_axis(out, order, again, axis=1)
    return out
