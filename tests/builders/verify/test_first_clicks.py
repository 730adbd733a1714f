"""Who is asked after the first clicks, against plain loops, and what the report says of it."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np

from builders.data.dataset import Histories, Targets
from builders.verify.first_clicks import (
    CLICKS,
    first_click_lines,
    first_click_shortfalls,
    first_clicks,
    targets_after,
)

ITEMS, USERS = 6, 400


def shop(rng):
    """Users of whom all, some or nothing is trained on, with few items, so that some come back."""
    lengths = rng.integers(0, 9, USERS + 1)
    lengths[0] = 0
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    rows = rng.integers(1, ITEMS + 1, offsets[-1])
    trained = offsets[:-1] + (lengths * rng.choice([0, 0, 0.5, 1], USERS + 1)).astype(np.int64)
    seen = np.flatnonzero((trained == offsets[:-1]) & (lengths > 2))[::5]
    histories = Histories(offsets, rows, np.zeros(len(rows), np.int64), np.ones(len(rows), np.uint8))
    validation = Targets(seen, offsets[seen] + 1, rows[offsets[seen] + 1])
    return SimpleNamespace(histories=histories, train_ends=trained, num_items=ITEMS, validation=validation)


class Ranks:
    """A verifier whose chain finds the even items, recall and popularity none."""

    def ranks(self, targets):
        found = np.where(targets.item_rows % 2 == 0, 0.0, np.inf)
        nothing = np.full(len(found), np.inf)
        return targets.user_rows, {"chain": found, "recall": nothing, "popularity": nothing}


def test_only_new_users_are_asked_and_only_about_what_is_new_to_them(rng):
    dataset = shop(rng)
    offsets, rows = dataset.histories.offsets, dataset.histories.item_rows
    for clicks in (0, *CLICKS):
        expected = []
        for user in range(1, USERS + 1):
            own = rows[offsets[user] : offsets[user + 1]].tolist()
            learned = dataset.train_ends[user] > offsets[user] or user in dataset.validation.user_rows
            if not learned and len(own) > clicks and own[clicks] not in own[:clicks]:
                expected.append((user, offsets[user] + clicks, own[clicks]))
        of = targets_after(dataset, clicks)
        assert expected
        assert list(zip(of.user_rows, of.history_ends, of.item_rows, strict=True)) == expected


def test_each_number_of_clicks_has_its_figures_and_its_line(rng):
    dataset = shop(rng)
    found = first_clicks(dataset, Ranks())
    assert list(found)[:2] == ["0", "1"]
    for clicks, of in found.items():
        items = targets_after(dataset, int(clicks)).item_rows
        assert of["users"] == len(items) >= 30
        assert of["chain"] == of["chain_minus_popularity"]["mean"] == np.mean(items % 2 == 0)
        assert of["recall"] == of["popularity"] == 0
    first, page = found["1"], "\n".join(first_click_lines(found))
    assert f"| 1 | {first['users']} | {first['chain']:.4f} | 0.0000 | 0.0000 | +" in page
    assert first_click_lines({}) == []


def test_who_is_better_served_with_what_is_popular_is_said(rng):
    class Worse(Ranks):
        """Here popularity has the odd items last in ten, the chain nothing else."""

        def ranks(self, targets):
            users, ranks = super().ranks(targets)
            return users, {**ranks, "popularity": np.minimum(ranks["chain"], 9.0)}

    dataset = shop(rng)
    assert first_click_shortfalls(first_clicks(dataset, Ranks())) == []
    found = first_clicks(dataset, Worse())
    lines = first_click_shortfalls(found)
    assert len(lines) == len(found)
    own, other = (found["0"]["ndcg@10"][way] for way in ("chain", "popularity"))
    what = f"NDCG@10 {own:.4f} is below that of popularity, {other:.4f}"
    assert lines[0] == f"new users before their first click: the served list's {what}"
    assert lines[1].startswith("new users after 1 click: ")


def test_where_all_users_were_learned_from_there_is_nothing_to_say(rng):
    dataset = shop(rng)
    dataset.train_ends = dataset.histories.offsets[1:]
    assert first_clicks(dataset, Ranks()) == {}
