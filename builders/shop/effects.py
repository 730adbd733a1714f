"""Says how likely a user of a generated shop clicks, buys and lingers: the truth.

In a plain shop all that decides stands in features, or in what was clicked last. In the other kind single
items and users have effects of their own, and tastes that no feature tells; categories have seasons, items
come and go, what was bought is not wanted again until it is used up, and a place far down the list is not
looked at by everybody (the position-based model: Richardson et al. 2007; Chuklin et al. 2015, chapter 3).

Axes: Q rows, each a user at a moment; N items a row; U users, I items, C categories, P places of a list.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from ensemble.arrays import Array

DAY_S = 86_400
REMEMBERED = 8  # purchases of a user that still matter
REFILL_DAYS = 21  # after which what was bought is used up
_SATED, _USED_UP, _AGAIN = -1.5, 1.2, 0.8  # logits: too early, used up; and of buying it when clicked
_FRESH, _FRESH_DAYS = 0.6, 14  # how much more a new item is clicked, and how soon that fades
YEAR_DAYS = 365


@dataclass(frozen=True)
class Moment:
    """Holds what is true of users [Q] at one time each."""

    last: Array  # [Q] int64: 1 + the category clicked last, 0 = nothing clicked yet
    times: Array  # [Q] int64, Unix seconds
    bought: Array  # [Q, REMEMBERED] int64: items bought last, -1 where there are fewer
    bought_times: Array  # [Q, REMEMBERED] int64


@dataclass(frozen=True)
class Effects:
    """Holds all that decides, in logits unless said otherwise; rows are the generator's own, from 0."""

    base: Array  # [] of a click
    # users
    style: Array  # [U] code
    skin: Array  # [U] code
    price_pain: Array  # [U] logit per unit of dearness
    shade_taste: Array  # [U, shades]
    user_click: Array  # [U]
    user_buy: Array  # [U]
    user_taste: Array  # [U, k]: with item_taste, tastes that no feature tells
    # items
    category: Array  # [I] code
    texture: Array  # [I] code
    shade: Array  # [I] code
    dearness: Array  # [I] log1p(price), standardized
    click_quality: Array  # [I]
    buy_quality: Array  # [I]
    item_click: Array  # [I]
    item_buy: Array  # [I]
    item_taste: Array  # [I, k]
    launched: Array  # [I] int64, Unix seconds
    gone: Array  # [I] int64: from then on nobody can have it
    # what features share
    style_category: Array  # [styles, C]
    skin_texture: Array  # [skin types, textures]
    next_category: Array  # [C + 1, C]
    season: Array  # [C, 2]: height, and the day of the peak, counted from 1970, modulo a year
    examined: Array  # [P] how likely a place is looked at; its last one stands for all places beyond

    @property
    def changes(self) -> bool:
        """Says whether anything depends on the time or on single users and items: False in a plain shop."""
        return bool(self.user_taste.shape[1])

    def click_logit(self, users: Array, items: Array, moment: Moment) -> Array:
        """Gives the logit of a click where it is looked at. users [Q], items [Q or 1, N] -> [Q, N]."""
        who, category = users[:, None], self.category[items]
        logit = (
            self.base
            + self.style_category[self.style[who], category]
            + self.skin_texture[self.skin[who], self.texture[items]]
            + self.next_category[moment.last[:, None], category]
            + self.shade_taste[who, self.shade[items]]
            + self.click_quality[items]
            - 0.4 * self.price_pain[who] * self.dearness[items]
        )
        if not self.changes:
            return logit
        days = self._days_since_bought(items, moment)
        refill = np.where(days < REFILL_DAYS, _SATED, np.where(np.isfinite(days), _USED_UP, 0.0))
        own = self.user_click[who] + self.item_click[items] + self._match(users, items)
        return logit + own + self._of_time(items, moment.times) + refill

    def buy_logit(self, users: Array, items: Array, moment: Moment) -> Array:
        """Gives the logit of a purchase where it was clicked. users [Q], items [Q or 1, N] -> [Q, N]."""
        who, category = users[:, None], self.category[items]
        logit = (
            -1.0
            + self.buy_quality[items]
            + 0.7 * self.style_category[self.style[who], category]
            - 1.2 * self.price_pain[who] * self.dearness[items]
        )
        if not self.changes:
            return logit
        days = self._days_since_bought(items, moment)
        again = _AGAIN * (np.isfinite(days) & (days >= REFILL_DAYS))
        return logit + self.user_buy[who] + self.item_buy[items] + again

    def mean_log_dwell(self, users: Array, items: Array) -> Array:
        """Gives the mean of log(1 + seconds) after a click. users [Q], items [Q or 1, N] -> [Q, N]."""
        style = self.style_category[self.style[users[:, None]], self.category[items]]
        return 3.0 + 0.4 * style + 0.5 * self.buy_quality[items]

    def tasks(self, users: Array, items: Array, moment: Moment, positions: Array | None = None) -> Array:
        """Gives the planted value of each task: P(click), P(buy | click), mean log dwell [Q, N, 3].

        positions [Q or 1, N] int64, 1 = first; None: all are looked at. What is not for sale is not clicked.
        """
        click = sigmoid(self.click_logit(users, items, moment)) * self.is_for_sale(items, moment.times)
        if positions is not None:
            click = click * self.looked_at(positions)
        buy = sigmoid(self.buy_logit(users, items, moment))
        return np.stack([click, buy, self.mean_log_dwell(users, items)], axis=-1)

    def looked_at(self, positions: Array) -> Array:
        """Gives how likely places [...] int64 are looked at; an unknown one (0) is taken for the first."""
        return self.examined[np.clip(positions - 1, 0, len(self.examined) - 1)]

    def is_for_sale(self, items: Array, times: Array) -> Array:
        """Says which items [Q or 1, N] can be had at times [Q]: [Q, N] bool."""
        return (self.launched[items] <= times[:, None]) & (times[:, None] < self.gone[items])

    def _match(self, users: Array, items: Array) -> Array:
        """Gives how well hidden tastes fit. users [Q], items [Q or 1, N] -> [Q, N]."""
        if len(items) == 1:
            return self.user_taste[users] @ self.item_taste[items[0]].T
        return np.einsum("qk,qnk->qn", self.user_taste[users], self.item_taste[items])

    def _of_time(self, items: Array, times: Array) -> Array:
        """Gives what season and newness add. items [Q or 1, N], times [Q] -> [Q, N]."""
        height, peak = self.season[self.category[items]].transpose(2, 0, 1)
        day = times[:, None] / DAY_S
        age = np.maximum(day - self.launched[items] / DAY_S, 0)
        return height * np.cos(2 * np.pi * (day - peak) / YEAR_DAYS) + _FRESH * np.exp(-age / _FRESH_DAYS)

    def _days_since_bought(self, items: Array, moment: Moment) -> Array:
        """Gives the days since each item was bought last, inf where it was not: [Q, N]."""
        days = np.full((len(moment.times), items.shape[1]), np.inf)
        since = (moment.times[:, None] - moment.bought_times) / DAY_S
        for place in range(moment.bought.shape[1]):
            same = items == moment.bought[:, place, None]
            np.minimum(days, since[:, place, None], out=days, where=same)
        return days


def sigmoid(logit: Array) -> Array:
    """Gives 1 / (1 + exp(-logit))."""
    return 1.0 / (1.0 + np.exp(-logit))


def arrays_of(effects: Effects) -> dict[str, Array]:
    """Gives all arrays by name."""
    return {entry.name: getattr(effects, entry.name) for entry in fields(effects)}
