"""Figures of new and of well-known items and users, against plain loops."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np

from builders.data.dataset import Histories, Targets
from builders.verify.newcomers import GROUPS, newcomer_lines, newcomer_table, newcomers
from builders.verify.values import Worth

ITEMS, USERS = 50, 150


def group_of(count: int) -> str:
    return GROUPS[0 if count == 0 else 1 if count <= 5 else 2 if count <= 30 else 3]


def shown_to(targets):
    """Shows each user the ten items behind the user's own number."""
    shown = 1 + (targets.user_rows[:, None] * 3 + np.arange(10)) % ITEMS
    shown[targets.user_rows % 7 == 0, 4:] = -1  # a short list
    return shown


def shop(rng):
    lengths = rng.choice([0, 2, 9, 60], USERS + 1)
    lengths[0] = 0
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    rows = 1 + (rng.random(offsets[-1]) ** 3 * (ITEMS - 8)).astype(np.int64)  # the last ones nobody takes
    times = np.concatenate([np.sort(rng.integers(1, 1000, n)) for n in lengths])
    trained = offsets[:-1] + (lengths * 0.8).astype(np.int64)
    sizes = SimpleNamespace(candidates=24)
    dataset = SimpleNamespace(
        histories=Histories(offsets, rows, times, np.ones(len(rows), np.uint8)),
        train_ends=trained,
        num_items=ITEMS,
        schema=SimpleNamespace(sizes=sizes),
    )
    users = rng.integers(1, USERS + 1, 200)
    targets = Targets(users, trained[users], rng.integers(1, ITEMS + 1, 200))
    ranks = {way: rng.choice([0, 3, 9, 10, 23, np.inf], 200) for way in ("chain", "recall")}
    return dataset, targets, ranks


def test_each_group_has_its_own_figures(rng):
    dataset, targets, ranks = shop(rng)
    found = newcomers(dataset, shown_to(targets), targets, ranks, "no truth")
    counts = np.zeros(ITEMS + 1, int)
    for user in range(1, USERS + 1):
        for place in range(dataset.histories.offsets[user], dataset.train_ends[user]):
            counts[dataset.histories.item_rows[place]] += 1
    known = [
        int(end - dataset.histories.offsets[user])
        for user, end in zip(targets.user_rows, targets.history_ends, strict=True)
    ]
    of = {
        "items": [group_of(counts[item]) for item in targets.item_rows],
        "users": [group_of(count) for count in known],
    }
    for what, groups in of.items():
        for group in GROUPS:
            mine = [place for place, own in enumerate(groups) if own == group]
            figures = found[what][group]
            assert figures["targets"] == len(mine)
            if mine:
                assert figures["recall@24"] == np.mean([ranks["recall"][place] < 24 for place in mine])
                assert figures["hr@10"] == np.mean([ranks["chain"][place] < 10 for place in mine])
            else:
                assert figures["recall@24"] is None
    shown = [group_of(counts[item]) for item in shown_to(targets).ravel().tolist() if item > 0]
    for group in GROUPS:
        assert found["items"][group]["of_places"] == np.mean([own == group for own in shown])
        everything = [group_of(count) for count in counts[1:]]
        assert found["items"][group]["of_items"] == np.mean([own == group for own in everything])
    assert found["items"]["0"]["of_places"] > 0
    assert found["items"]["0"]["targets"] > 0


def test_worth_is_told_by_what_was_known_at_the_time(rng):
    dataset, targets, ranks = shop(rng)
    users = rng.integers(1, USERS + 1, 300)
    times, values = rng.integers(0, 1100, 300), rng.random((300, 2))
    worth = Worth("replay", "", users, np.zeros(300, np.int64), times, {"chain": values})
    found = newcomers(dataset, shown_to(targets), targets, ranks, worth)
    before = [
        int((dataset.histories.times[slice(*dataset.histories.offsets[user : user + 2])] < time).sum())
        for user, time in zip(users, times, strict=True)
    ]
    for group in GROUPS:
        mine = [values[place, 0] for place, count in enumerate(before) if group_of(count) == group]
        assert found["users"][group]["worth_rows"] == len(mine) > 0
        np.testing.assert_allclose(found["users"][group]["worth"], np.mean(mine))
        assert "worth" not in found["items"][group], "a moment of the log has no next item"


def test_intervals_are_those_of_users_drawn_again(rng):
    """Against a loop; rows of one user are drawn together."""
    dataset, targets, ranks = shop(rng)
    targets = Targets(rng.integers(1, 40, 200), targets.history_ends, targets.item_rows)  # five rows a user
    targets = Targets(targets.user_rows, dataset.train_ends[targets.user_rows], targets.item_rows)
    ranks["chain"] = np.where(targets.user_rows % 2, 0, np.inf)  # a user hits always or never
    found = newcomers(dataset, shown_to(targets), targets, ranks, "no truth")
    known = targets.history_ends - dataset.histories.offsets[targets.user_rows]
    mine = np.array([group_of(count) == "6 to 30" for count in known])
    users, hits = targets.user_rows[mine], (ranks["chain"] < 10)[mine]
    means = []
    for _ in range(1000):
        drawn = np.concatenate(
            [np.flatnonzero(users == user) for user in rng.choice(np.unique(users), len(set(users)))]
        )
        means.append(hits[drawn].mean())
    interval = found["users"]["6 to 30"]["intervals"]["hr@10"]
    np.testing.assert_allclose(
        [interval["low"], interval["high"]], np.quantile(means, [0.025, 0.975]), atol=0.03
    )
    of_rows = 2 * 1.96 * hits.std() / np.sqrt(len(hits))  # as if each row were a user
    assert interval["high"] - interval["low"] > 1.3 * of_rows


def test_a_group_that_chance_cannot_tell_of_has_no_interval(rng):
    dataset, targets, ranks = shop(rng)
    ranks["chain"] = np.full(200, np.inf)
    of = newcomers(dataset, shown_to(targets), targets, ranks, "no truth")["users"]
    assert all("hr@10" not in one["intervals"] for one in of.values())
    assert "recall@24" in of["6 to 30"]["intervals"]


def test_a_terminal_of_80_columns_shows_groups_with_intervals(rng):
    dataset, targets, ranks = shop(rng)
    found = newcomers(dataset, shown_to(targets), targets, ranks, "no truth")
    lines = newcomer_table(found)
    assert len(lines) == 10
    assert max(map(len, lines)) <= 80
    low, high = found["users"]["6 to 30"]["intervals"]["ndcg@10"].values()
    assert lines[8].startswith("6 to 30 ")
    assert lines[8].endswith(f" {found['users']['6 to 30']['ndcg@10']:.4f} [{low:.4f}, {high:.4f}]")
    earlier = {what: {name: {**of, "intervals": {}} for name, of in by.items()} for what, by in found.items()}
    for of in earlier["users"].values():
        del of["intervals"]  # as in a release of an earlier Peregrine
    assert newcomer_table(earlier)[8].endswith(f" {found['users']['6 to 30']['ndcg@10']:.4f}")


def test_the_page_has_a_row_for_each_group(rng):
    dataset, targets, ranks = shop(rng)
    lines = newcomer_lines(newcomers(dataset, shown_to(targets), targets, ranks, "no truth"))
    assert sum(line.startswith("| 1 to 5 |") for line in lines) == 3
    assert "| events of the item | of items | of places |" in lines


def test_no_figure_of_a_group_is_cut_in_a_terminal_of_80_columns(rng):
    from rich.console import Console
    from rich.markdown import Markdown

    dataset, targets, ranks = shop(rng)
    users = targets.user_rows
    truth = Worth(
        "truth", "", users, targets.item_rows, np.zeros(len(users)), {"chain": rng.random((200, 2))}
    )
    lines = newcomer_lines(newcomers(dataset, shown_to(targets), targets, ranks, truth))
    console = Console(width=80)
    with console.capture() as shown:
        console.print(Markdown("\n".join(lines)))
    assert "…" not in shown.get()
    assert shown.get().count("[0.") >= 8
