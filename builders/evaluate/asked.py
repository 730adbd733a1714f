"""Says what a release is asked about: users at a time, what they took next, and what was shown to them.

Axes: Q targets, E impressions, U users.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from builders.data.dataset import Dataset, Impressions, Targets
from builders.data.spans import Span
from builders.data.splits import history_ends, users_of
from builders.evaluate.kept import Kept
from builders.verify.plain_features import joined
from ensemble.arrays import Array
from ensemble.errors import InvalidInput
from ensemble.release.ids import IdMap


@dataclass(frozen=True)
class Asked:
    """Holds the rows of an evaluation."""

    targets: Targets
    impressions: Impressions | None
    unknown: int  # users who were named, and are not in the release
    note: str  # what a reader of the figures should know; may be empty


def asked_of(kept: Kept, until: int | None, user_ids: list[bytes] | None, event: str | None = None) -> Asked:
    """Gives the held-out rows of the build, or those at `until`, of all users or of those named.

    With `event` the next item is the first one that the user met in the period and that the event befell.
    InvalidInput for rows inside the training period of the verified model.
    """
    rows, unknown = _rows_of(kept.dataset, user_ids)
    note = ""
    if until is None:
        targets, shown = kept.dataset.test, kept.dataset.test_impressions
        if event is not None:
            targets = next_of_event(kept, event, None)
    else:
        note = refuse_trained(kept, until)
        targets, shown = targets_at(kept.dataset, until), _shown_since(kept.dataset, until)
        if event is not None:
            targets = next_of_event(kept, event, until)
        refuse_trained_targets(kept, targets, until)
    if rows is not None:
        keep = np.isin(targets.user_rows, rows)
        targets = Targets(targets.user_rows[keep], targets.history_ends[keep], targets.item_rows[keep])
        shown = None if shown is None else where(shown, np.isin(shown.user_rows, rows))
    if not len(targets.user_rows) and (shown is None or not len(shown.times)):
        raise InvalidInput(
            f"release {kept.name}: none of the users has an item that was new to them"
            + (" in the test period" if until is None else f" at or after {Span(0, until).words()}"),
            "name other users, or an earlier --until",
        )
    return Asked(targets, shown, unknown, note)


def targets_at(dataset: Dataset, until: int) -> Targets:
    """Gives each user's first event at or after `until` whose item is new to them; what is known of them is
    what came strictly before `until`, one event at least."""
    histories = dataset.histories
    users = users_of(histories)
    ends = history_ends(histories, np.arange(dataset.num_users + 1), np.full(dataset.num_users + 1, until))
    pairs = users * (dataset.num_items + 1) + histories.item_rows
    new = np.zeros(len(pairs), bool)
    new[np.unique(pairs, return_index=True)[1]] = True
    is_known = ends > histories.offsets[:-1]
    rows = np.flatnonzero(new & (histories.times >= until) & is_known[users])
    who, first = np.unique(users[rows], return_index=True)
    return Targets(who, ends[who], histories.item_rows[rows[first]])


def next_of_event(kept: Kept, event: str, until: int | None) -> Targets:
    """Gives each user's first item that was new in the period and that `event` befell there.

    The period begins at `until`, when users are asked then, or with the test, when they are asked just before
    their first event with the item.
    """
    dataset, names = kept.dataset, kept.dataset.schema.events
    since = kept.test_begins() if until is None else until
    if event not in names or since is None or not kept.has_clock:
        rule = (
            "the split has no one moment from which on it could be next"
            if event in names
            else "there is none"
        )
        raise InvalidInput(
            f"--event {event}: {rule}; the events of {kept.name}'s histories are {', '.join(names)}",
            "name one of them, of a shop that is split by time",
        )
    histories = dataset.histories
    pairs = users_of(histories) * (dataset.num_items + 1) + histories.item_rows
    is_kind = (histories.kinds == 1 + names.index(event)) & (histories.times >= since)
    first = np.sort(np.unique(pairs, return_index=True)[1])
    first = first[(histories.times[first] >= since) & np.isin(pairs[first], pairs[is_kind])]
    known = history_ends(histories, np.arange(dataset.num_users + 1), np.full(dataset.num_users + 1, since))
    owners = pairs[first] // (dataset.num_items + 1)
    ends = first if until is None else known[owners]
    keep = ends > histories.offsets[owners]
    who, place = np.unique(owners[keep], return_index=True)
    return Targets(who, ends[keep][place], histories.item_rows[first[keep][place]])


def refuse_trained(kept: Kept, until: int) -> str:
    """Raises InvalidInput where the clock says that `until` is inside the training period; gives what else is
    to be known of the rows behind it."""
    trained, begins = kept.trained, kept.test_begins()
    if kept.has_clock and trained.until is not None and until <= trained.until:
        raise InvalidInput(
            f"--until {Span(0, until).words()} is inside the training period of release {kept.name}: its "
            f"verified model has learned from what happened up to {trained.words()}",
            "ask about a later time"
            + (f"; the test period begins at {Span(0, begins).words()}" if begins is not None else ""),
        )
    if kept.has_clock and begins is not None and until < begins:
        return (
            f"rows before {Span(0, begins).words()} have stopped the training and set the calibration: "
            "the figures are a little too good"
        )
    return ""


def refuse_trained_targets(kept: Kept, targets: Targets, until: int) -> None:
    """Raises InvalidInput where what users took next was trained on, which in a split without one moment is
    each user's own matter."""
    known = targets.history_ends < np.asarray(kept.dataset.train_ends)[targets.user_rows]
    if known.any():
        raise InvalidInput(
            f"release {kept.name}: of {len(known):,} users, {int(known.sum()):,} took their next item after "
            f"{Span(0, until).words()} in the model's training period, which ends at each user's last two "
            "events",
            "leave out --until: then each user is asked about at the last event, which was held out",
        )


def _rows_of(dataset: Dataset, user_ids: list[bytes] | None) -> tuple[Array | None, int]:
    """Gives the rows of the users named, and how many are unknown; (None, 0) where all are meant."""
    if user_ids is None:
        return None, 0
    rows = IdMap(dataset.user_ids).rows_from_ids(np.array(sorted(set(user_ids)), dtype="S"))
    if not (rows > 0).any():
        raise InvalidInput(
            f"--users: none of the {len(rows):,} users is one of the release's {dataset.num_users:,}, for "
            f"example {user_ids[0].decode(errors='replace')!r}",
            "one id a line, as in the interactions",
        )
    return rows[rows > 0], int((rows == 0).sum())


def where(impressions: Impressions, keep: Array) -> Impressions:
    """Gives the impressions where `keep` [E] bool is true."""
    arrays = ((entry.name, getattr(impressions, entry.name)) for entry in fields(Impressions))
    return Impressions(**{name: array[keep] for name, array in arrays if array is not None})


def _shown_since(dataset: Dataset, until: int) -> Impressions | None:
    """Gives what was held out of training and shown at or after `until`."""
    if dataset.test_impressions is None:
        return None
    held = joined((dataset.validation_impressions, dataset.test_impressions))
    return where(held, held.times >= until)
