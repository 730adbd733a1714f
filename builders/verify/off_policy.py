"""Estimates what another way of showing items would have been worth, from a log of what was shown.

A log has, for each exposure, the chance with which it was shown (its propensity) and what came of it (its
reward). The other way would have shown the same with another chance; the quotient is the exposure's weight.

  - `ips`: weighted rewards over all exposures (Horvitz & Thompson, JASA 1952). Unbiased where the other way
    shows nothing that the log could not have shown; few large weights make it vary.
  - `snips`: over the sum of the weights (Swaminathan & Joachims, NeurIPS 2015). Hardly biased, varies less,
    stays within the range of the rewards.
  - `doubly_robust`: a model's guess, mended by weighted residuals (Dudik, Langford & Li, ICML 2011). Right if
    the guess or the propensities are right.
  - `replay`: the mean reward where both show the same (Li, Chu, Langford & Wang, WSDM 2011). For logs that
    showed at random, or where nothing but agreement is known.
  - `moved`: for lists whose positions were logged and whose order alone changes: weights by how much a place
    is looked at (the position-based model: Craswell et al., WSDM 2008; its estimator: Li et al., KDD 2018),
    which `examination` learns from the log itself.

Intervals are of a bootstrap over users, whose exposures are not independent. `effective_rows` is how many
exposures of equal weight would tell as much (Kish 1965): a few hundred thousand rows may be worth two.

Axes: E exposures, U users, P positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ensemble.arrays import Array
from ensemble.bootstrap import groups, ratio, spreads, user_sums
from ensemble.errors import InvalidInput

FEWEST_ROWS = 30.0  # effective ones; with fewer an estimate and its interval are those of single exposures
_ROUNDS = 500
_CLOSE = 1e-7


@dataclass(frozen=True)
class Estimate:
    """Holds the estimated worth of an exposure by the other way, and how sure it is."""

    value: float  # NaN where the log tells nothing
    low: float  # of the 95% interval
    high: float
    rows: int
    effective_rows: float
    mean_weight: float  # near 1 where the propensities are right and the log covers the other way

    @property
    def tells(self) -> bool:
        """Says whether enough exposures stand behind it."""
        return self.effective_rows >= FEWEST_ROWS


def weights_of(target: Array, propensities: Array, most: float = np.inf) -> Array:
    """Divides the chance of the other way to show each exposure by the log's: [E] float64.

    target [E], propensities [E], both in (0, 1], a target may be 0; `most` cuts large weights off, which
    trades variance for a downward bias. InvalidInput for a propensity that is none.
    """
    target, propensities = np.asarray(target, np.float64), np.asarray(propensities, np.float64)
    for what, values, low in (
        ("propensity", propensities, propensities <= 0),
        ("target", target, target < 0),
    ):
        wrong = low | (values > 1) | np.isnan(values)
        if wrong.any():
            at = int(np.flatnonzero(wrong)[0])
            bound = "above 0 and at most 1" if what == "propensity" else "from 0 to 1"
            raise InvalidInput(
                f"{what} of exposure {at + 1} is {values[at]}; wanted a chance {bound}",
                "log the chance with which each item was shown, or use replay",
            )
    return np.minimum(target / propensities, most)


def ips(rewards: Array, weights: Array, users: Array) -> Estimate:
    """Gives the mean of weighted rewards. rewards [E], weights [E], users [E] int64."""
    return _estimate(weights * rewards, np.ones(len(rewards)), weights, users)


def snips(rewards: Array, weights: Array, users: Array) -> Estimate:
    """Gives the weighted mean of rewards. rewards [E], weights [E], users [E] int64."""
    return _estimate(weights * rewards, weights, weights, users)


def doubly_robust(rewards: Array, weights: Array, guesses: Array, expected: Array, users: Array) -> Estimate:
    """Gives the mean of a model's guess for the other way plus weighted residuals.

    guesses [E]: the model's reward of what was shown; expected [E]: its mean reward of what the other way
    would have shown there; rewards, weights [E], users [E] int64. The model must not have seen these rewards.
    """
    return _estimate(expected + weights * (rewards - guesses), np.ones(len(rewards)), weights, users)


def replay(rewards: Array, agrees: Array, users: Array) -> Estimate:
    """Gives the mean reward where the other way would have shown the same. rewards [E], agrees [E] bool."""
    weights = np.asarray(agrees, np.float64)
    return _estimate(weights * rewards, weights, weights, users)


def moved(rewards: Array, positions: Array, new_positions: Array, looks: Array, users: Array) -> Estimate:
    """Gives the mean reward of logged lists in another order, by how much their places are looked at.

    positions, new_positions [E] int64 from 1 (a new one of 0: no longer shown); looks [P]: `examination`.
    """
    looks = np.concatenate([[0.0], looks])
    places = np.minimum(np.stack([positions, new_positions]), len(looks) - 1)
    weights = looks[places[1]] / np.maximum(looks[places[0]], 1e-12)
    return _estimate(weights * rewards, np.ones(len(rewards)), weights, users)


def examination(items: Array, positions: Array, clicks: Array) -> Array:
    """Learns how much each place is looked at, against the first: [P] float64, P = the last place there is.

    A click's chance is a product of the item's appeal and its place's look; both are fitted by turns, each to
    the clicks that the other leaves to expect, which climbs the Poisson likelihood of a rank-one table (Lee &
    Seung, NeurIPS 2001). Places are told from appeal only where items were shown at several places.

    items [E] int64, positions [E] int64 from 1, clicks [E] 0/1.
    """
    _, item = np.unique(items, return_inverse=True)
    place, last = positions - 1, int(positions.max(initial=1))
    taken_item, taken_place = np.bincount(item, clicks), np.bincount(place, clicks, minlength=last)
    looks = np.ones(last)
    for _ in range(_ROUNDS):
        appeal = taken_item / np.maximum(np.bincount(item, looks[place]), 1e-12)
        found = taken_place / np.maximum(np.bincount(place, appeal[item], minlength=last), 1e-12)
        found /= max(found[0], 1e-12)
        if np.abs(found - looks).max() < _CLOSE:
            return found
        looks = found
    return looks


def _estimate(above: Array, below: Array, weights: Array, users: Array) -> Estimate:
    """Divides two sums over exposures [E], and resamples users for the interval."""
    if not len(users):
        nothing = float("nan")
        return Estimate(nothing, nothing, nothing, 0, 0.0, nothing)
    num_users, group = groups(users)
    sums = (user_sums(group, np.asarray(part, np.float64), num_users) for part in (above, below))
    [spread] = spreads([ratio(*sums)], num_users)
    total, squares = float(weights.sum()), float((weights**2).sum())
    effective = total**2 / squares if squares else 0.0
    return Estimate(spread.value, spread.low, spread.high, len(users), effective, total / len(users))
