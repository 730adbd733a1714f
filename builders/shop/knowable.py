"""Says what of a generated shop's hidden effects its log can tell: the most that any model can know.

Each hidden effect is replaced by what one would take it for who knew all the others, by the log of the time
before the test: the posterior mode under the normal distribution that it was drawn from (Fisher scoring;
Gelman et al., Bayesian Data Analysis, section 4.1); a user's favourite shade by the chances of all shades.
Nobody knows all the others, so a model comes near what this gives, and never gets beyond it but by luck.

Axes: R rows of the log, G users or items whose effects are sought, k dimensions of taste, S shades.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from builders.shop.effects import Effects, sigmoid
from builders.shop.planted import Log
from builders.shop.visits import MATCH_SPREAD, SPREAD
from ensemble.arrays import Array

TEST_SHARE = 0.1  # of the clock: what is held out of what can be known, as in the generated shop.toml
_STEPS = 6
_SURE = 1e-9


@dataclass(frozen=True)
class _Rows:
    """Holds yes and no [R] with their true logits, and how likely each was asked at all."""

    users: Array
    items: Array
    logit: Array
    yes: Array  # 0 or 1
    asked: Array  # P(looked at); 1 for purchases

    def information(self, logit: Array) -> tuple[Array, Array]:
        """Gives the slope of the log likelihood by the logit, and its expected curvature: [R] each."""
        known = sigmoid(logit)
        chance = np.clip(self.asked * known, _SURE, 1 - _SURE)
        slope = self.asked * known * (1 - known)
        return (self.yes - chance) / (chance * (1 - chance)) * slope, slope**2 / (chance * (1 - chance))

    def log_likelihood(self, logit: Array) -> Array:
        """Gives the log likelihood of each row: [R]."""
        chance = np.clip(self.asked * sigmoid(logit), _SURE, 1 - _SURE)
        return np.where(self.yes == 1, np.log(chance), np.log1p(-chance))


def knowable_effects(effects: Effects, log: Log) -> Effects:
    """Gives the effects as far as the log before its last tenth tells them."""
    before = log.times < int(np.quantile(log.times, 1 - TEST_SHARE, method="higher"))
    looked = np.ones(len(log.users)) if log.positions is None else effects.looked_at(log.positions)
    clicks = _rows(log, before & (log.truth[:, 0] > 0), log.truth[:, 0] / looked, log.clicked, looked)
    found = {"shade_taste": _shades(effects, clicks)}
    if effects.changes:
        buys = _rows(log, before & log.clicked, log.truth[:, 1], log.bought, np.ones(len(log.users)))
        for name, deviation in SPREAD.items():
            rows = clicks if name.endswith("click") else buys
            of = rows.users if name.startswith("user") else rows.items
            one = np.ones((len(of), 1))
            found[name] = _effects(rows, of, one, getattr(effects, name)[:, None], deviation)[:, 0]
        spread = np.sqrt(MATCH_SPREAD) / effects.user_taste.shape[1] ** 0.25
        by_item, by_user = effects.item_taste[clicks.items], effects.user_taste[clicks.users]
        found["user_taste"] = _effects(clicks, clicks.users, by_item, effects.user_taste, spread)
        found["item_taste"] = _effects(clicks, clicks.items, by_user, effects.item_taste, spread)
    return replace(effects, **found)


def _rows(log: Log, which: Array, chance: Array, yes: Array, asked: Array) -> _Rows:
    """Takes rows of the log with their logits."""
    sure = np.clip(chance[which], _SURE, 1 - _SURE)
    logit = np.log(sure) - np.log1p(-sure)
    return _Rows(log.users[which], log.items[which], logit, yes[which].astype(np.float64), asked[which])


def _effects(rows: _Rows, of: Array, inputs: Array, true: Array, deviation: float) -> Array:
    """Finds the effects [G, k] of groups `of` [R] on inputs [R, k].

    `true` [G, k], what they are, is taken out of the logits first.
    """
    groups, width = true.shape
    offset = rows.logit - np.einsum("rk,rk->r", inputs, true[of])
    found, prior = np.zeros(true.shape), np.eye(width) / deviation**2
    for _ in range(_STEPS):
        slope, curvature = rows.information(offset + np.einsum("rk,rk->r", inputs, found[of]))
        gradient = _sums(of, inputs * slope[:, None], groups) - found / deviation**2
        pairs = (inputs[:, :, None] * inputs[:, None, :]).reshape(len(of), -1) * curvature[:, None]
        hessian = _sums(of, pairs, groups).reshape(groups, width, width) + prior
        found += np.clip(np.linalg.solve(hessian, gradient[..., None])[..., 0], -1, 1)
    return found


def _sums(of: Array, values: Array, groups: int) -> Array:
    """Adds up values [R, m] by group: [G, m]."""
    return np.stack([np.bincount(of, weights=column, minlength=groups) for column in values.T], axis=1)


def _shades(effects: Effects, clicks: _Rows) -> Array:
    """Gives what each shade adds for each user, by the chances of each shade to be the favourite: [U, S]."""
    users, shades = effects.shade_taste.shape
    shown, height = effects.shade[clicks.items], effects.shade_taste.max()
    offset = clicks.logit - effects.shade_taste[clicks.users, shown]
    likelihood = np.stack(
        [
            np.bincount(
                clicks.users,
                weights=clicks.log_likelihood(offset + height * (shown == shade)),
                minlength=users,
            )
            for shade in range(shades)
        ],
        axis=1,
    )
    chances = np.exp(likelihood - likelihood.max(axis=1, keepdims=True))
    return height * chances / chances.sum(axis=1, keepdims=True)
