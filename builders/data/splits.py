"""Sorts events into histories, held-out next items and impressions: what may be trained on, what tests it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from builders.data.dataset import Dataset, Histories, Impressions, Targets
from builders.shop.parts import NEVER
from builders.shop.shop_toml import Split
from ensemble.arrays import Array
from ensemble.errors import InvalidInput
from ensemble.release.route import user_hashes

_FEW, _MANY = 8, 20_000  # held-out targets of a user that validate, and of all users
_LEFT = 20  # items of a shop for each of them
MANY_AGAIN = 1 / 3  # share of events with an item had before, from which whoever builds is told


@dataclass(frozen=True)
class Splits:
    """Holds everything of a Dataset that depends on the split."""

    train_ends: Array  # [U + 1] int64
    known_ends: Array  # [U + 1] int64: where what may be served, and refitted on, ends
    validation: Targets
    test: Targets
    cuts: tuple[Array, Array]  # [U + 1] int64 each: when a user's validation, and when its test, begins


def histories_from_positives(
    users: Array, items: Array, times: Array, kinds: Array, num_users: int
) -> Histories:
    """Sorts events by user row and time into CSR; events of the same second keep the file's order."""
    order = np.lexsort((times, users))
    offsets = np.zeros(num_users + 2, np.int64)
    np.cumsum(np.bincount(users, minlength=num_users + 1), out=offsets[1:])
    return Histories(offsets, items[order], times[order], kinds[order])


def users_of(histories: Histories) -> Array:
    """Gives the user row of each event: [P] int64."""
    return np.repeat(np.arange(len(histories.offsets) - 1), np.diff(histories.offsets))


def share_again(histories: Histories, ends: Array | None = None) -> float:
    """Gives the share of events whose item their user had before; 0 where there is none. `ends` [U + 1] are
    where each user's events end that may be counted; None: all may."""
    new = are_new(histories)
    if ends is not None:
        new = new[np.arange(len(new)) < ends[users_of(histories)]]
    return float(1 - new.mean()) if len(new) else 0.0


def are_new(histories: Histories) -> Array:
    """Says which events are the first of their user with their item: [P] bool."""
    pair = users_of(histories) * (int(histories.item_rows.max(initial=0)) + 1) + histories.item_rows
    new = np.zeros(len(pair), bool)
    new[np.unique(pair, return_index=True)[1]] = True
    return new


def split_histories(
    split: Split,
    histories: Histories,
    times: Array,
    user_ids: Array,
    cuts: tuple[Array, Array] | None = None,
) -> Splits:
    """Splits as `split` says; quantiles of `times` [n], those of all interactions, cut a split by time.

    user_ids [U] S are those of the rows from 1 on; `cuts` [U + 1] each are when a user's validation and test
    begin, where the shop itself says which rows do what.
    """
    if split.kind == "leave_one_out":
        return _leave_one_out(histories, split)
    if split.kind == "random":
        return _by_user(histories, int(times.min(initial=0)), split, user_ids)
    if cuts is None:
        num_users = len(histories.offsets) - 1
        shares = (1 - split.validation - split.test, 1 - split.test)
        late, later = (int(np.quantile(times, share, method="higher")) for share in shares)
        cuts = (np.full(num_users, late), np.full(num_users, later))
    return _by_cuts(histories, cuts, split)


def _leave_one_out(histories: Histories, split: Split) -> Splits:
    """Lets each last event test and the one before validate; users with fewer than 3 events only train."""
    starts, ends = histories.offsets[:-1], histories.offsets[1:]
    held = np.flatnonzero(ends - starts >= 3)
    last = ends[held] - 1
    train_ends, known_ends = ends.copy(), ends.copy()
    train_ends[held] -= 2
    known_ends[held] -= split.keep_test
    cuts = (np.full(len(starts), NEVER), np.full(len(starts), NEVER))
    cuts[0][held], cuts[1][held] = histories.times[last - 1], histories.times[last]
    validation, test = (Targets(held, end, histories.item_rows[end]) for end in (last - 1, last))
    return Splits(train_ends, known_ends, validation, test, cuts)


def _by_user(histories: Histories, earliest: int, split: Split, user_ids: Array) -> Splits:
    """Draws users by a hash of their ids, who stay drawn whatever comes: nothing of theirs trains, and the
    last event of those with two or more is a target."""
    starts, ends = histories.offsets[:-1], histories.offsets[1:]
    place = np.ones(len(starts))  # of row 0, who is nobody
    place[1:] = user_hashes(user_ids.tolist(), f"split {split.seed}")
    tests = place < split.test
    held = place < split.test + split.validation
    known_ends = np.where(tests & split.keep_test, starts, ends)
    cuts = (np.where(held, earliest, NEVER), np.where(tests, earliest, NEVER))

    def last_events(drawn: Array) -> Targets:
        users = np.flatnonzero(drawn & (ends - starts >= 2))
        return Targets(users, ends[users] - 1, histories.item_rows[ends[users] - 1])

    return Splits(
        np.where(held, starts, ends), known_ends, last_events(held & ~tests), last_events(tests), cuts
    )


def _by_cuts(histories: Histories, cuts: tuple[Array, Array], split: Split) -> Splits:
    """Takes as targets a user's events in the period whose item is new, if any item is known before: to test
    the first, as a user is one user; to validate the first few, as what is chosen by few rows is chosen by
    chance."""
    users = users_of(histories)
    num_users = len(histories.offsets) - 1
    begins, times_of = histories.offsets[:-1], histories.times
    train_ends, before_test = (
        begins + np.bincount(users[times_of < cut[users]], minlength=num_users) for cut in cuts
    )
    known_ends = before_test if split.keep_test else histories.offsets[1:].copy()
    new = are_new(histories)
    fit = new & (np.arange(len(new)) > histories.offsets[users])

    def targets_in(begin: Array, end: Array) -> Array:
        return np.flatnonzero(fit & (times_of >= begin[users]) & (times_of < end[users]))

    def targets_at(rows: Array) -> Targets:
        return Targets(users[rows], rows, histories.item_rows[rows])

    validation, test = targets_in(*cuts), targets_in(cuts[1], np.full(num_users, NEVER))
    return Splits(
        train_ends,
        known_ends,
        targets_at(validation[first_few_of_users(users[validation], num_taken(histories))]),
        targets_at(test[first_of_users(users[test], 1)]),
        cuts,
    )


def few_of_users(dataset: Dataset) -> Targets:
    """Gives the first few new items of each user in the test part, where the dataset has but the first: they
    tell settings apart that one would not."""
    histories, test = dataset.histories, dataset.test
    users = users_of(histories)
    begins = np.full(len(histories.offsets), len(users))
    begins[test.user_rows] = test.history_ends
    rows = np.flatnonzero(are_new(histories) & (np.arange(len(users)) >= begins[users]))
    rows = rows[first_few_of_users(users[rows], num_taken(histories))]
    return Targets(users[rows], rows, histories.item_rows[rows])


def num_taken(histories: Histories) -> int:
    """Counts the items that somebody took."""
    return len(np.unique(histories.item_rows))


def first_few_of_users(users: Array, num_items: int) -> Array:
    """Gives the places [R] int64 of the first few entries of each user among `users` [n]: up to eight, fewer
    where a shop would have more than 20,000 in all, or where so few items are taken (num_taken) that later
    ones are what is left."""
    counts = np.unique(users, return_counts=True)[1]
    few = range(1, min(_FEW, num_items // _LEFT) + 1)
    fits = [most for most in few if np.minimum(counts, most).sum() <= _MANY]
    return first_of_users(users, max(fits, default=1))


def first_of_users(users: Array, most: int) -> Array:
    """Gives the places [R] int64 of the first `most` entries of each user among `users` [n], in order."""
    order = np.argsort(users, kind="stable")
    _, starts, counts = np.unique(users[order], return_index=True, return_counts=True)
    place = np.arange(len(users)) - np.repeat(starts, counts)
    return np.sort(order[place < most])


def history_ends(histories: Histories, users: Array, times: Array) -> Array:
    """Gives the absolute end [E] int64 of what the user had taken strictly before each time."""
    if not len(histories.times):
        return histories.offsets[users]
    low = min(int(histories.times.min()), int(times.min(initial=NEVER)))
    high = max(int(histories.times.max()), int(times.max(initial=low)))
    span = high - low + 1
    if span * (len(histories.offsets) + 1) >= NEVER:
        raise InvalidInput(
            f"interactions: times from {low} to {high} are too far apart for {len(histories.offsets)} "
            "users; times are Unix seconds"
        )
    keys = users_of(histories) * span + (histories.times - low)
    return np.searchsorted(keys, users * span + (times - low), side="left")


def split_impressions(
    impressions: Impressions, cuts: tuple[Array, Array]
) -> tuple[Impressions, Impressions, Impressions]:
    """Splits into (train, validation, test), each in time order, by when each user's own periods begin."""
    begin = cuts[0][impressions.user_rows], cuts[1][impressions.user_rows]
    train = impressions.times < begin[0]
    test = impressions.times >= begin[1]
    return tuple(impressions.at(keep) for keep in (train, ~train & ~test, test))  # type: ignore[return-value]
