"""A shop becomes dense arrays: features, histories, splits and labels, held against plain loops."""

import re
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from builders.data.check import check_shop
from builders.data.dataset import Dataset, Histories
from builders.data.refit import refit_dataset
from builders.data.splits import (
    few_of_users,
    first_few_of_users,
    first_of_users,
    history_ends,
    share_again,
    split_histories,
)
from builders.data.stage import load_dataset
from builders.shop.shop_toml import Split
from builders.verify.data_facts import data_facts
from ensemble.errors import InvalidInput

NOW_S = 1_000_000_000.0
ITEMS = """item_id,title,brand,tags,price,look
7,Velvet Lip-Stick,A,x|y,1,1 2
8,Été noir,,y|,,
9,serum,B,,3,3 4
10,other serum,A,z|y|x,5,5 6
"""
SHOP = """\
name = "tiny"
split = "SPLIT"
[interactions]
file = "interactions.csv"
INTERACTIONS
[items]
file = "items.csv"
id = "item_id"
title = "title"
features = [
  {name = "brand", kind = "category"},
  {name = "price", kind = "number"},
  {name = "tags", kind = "category", separator = "|", width = 2},
  {name = "look", kind = "vector(2)"},
  {name = "words", column = "title", kind = "text", buckets = 64, width = 3},
]
TASKS
"""


def load(
    folder: Path, rows: str, *, split: str = "leave_one_out", interactions: str = "", tasks: str = ""
) -> Dataset:
    (folder / "shop.toml").write_text(
        SHOP.replace('"SPLIT"', split if split.startswith("{") else f'"{split}"')
        .replace("INTERACTIONS", interactions)
        .replace("TASKS", tasks)
    )
    (folder / "interactions.csv").write_text(rows)
    (folder / "items.csv").write_text(ITEMS)
    return load_dataset(folder, now_s=NOW_S)


ROWS = "user_id,item_id,time\nv,9,3\nu,7,1\nu,8,5\nu,9,4\nv,7,9\nu,10,9\nw,7,2\n"


def test_rows_are_sorted_ids_and_row_0_is_unknown(tmp_path: Path) -> None:
    dataset = load(tmp_path, ROWS)
    assert dataset.item_ids.tolist() == [b"10", b"7", b"8", b"9"]
    assert dataset.user_ids.tolist() == [b"u", b"v", b"w"]
    assert dataset.item_titles.tolist() == [
        b"",
        b"other serum",
        b"Velvet Lip-Stick",
        "Été noir".encode(),
        b"serum",
    ]
    assert not dataset.item_codes[0].any()
    assert not dataset.item_values[0].any()


def test_categories_own_ranges_of_codes(tmp_path: Path) -> None:
    dataset = load(tmp_path, ROWS)
    brand, tags = dataset.schema.items.category("brand"), dataset.schema.items.category("tags")
    assert brand is not None
    assert tags is not None
    assert dataset.vocabularies["items"] == {"brand": ["A", "B"], "tags": ["y", "x", "z"]}
    assert (brand.offset, brand.size, tags.offset, tags.size) == (1, 3, 4, 4)
    assert dataset.item_codes[:, brand.columns].ravel().tolist() == [0, 2, 2, 0, 3]
    assert dataset.item_codes[:, tags.columns].tolist() == [[0, 0], [7, 5], [6, 5], [5, 0], [0, 0]]


def test_values_outside_the_vocabulary_share_one_code(tmp_path: Path) -> None:
    load(tmp_path, ROWS)
    text = (
        (tmp_path / "shop.toml").read_text().replace('name = "brand", ', 'name = "brand", vocabulary = 1, ')
    )
    (tmp_path / "shop.toml").write_text(text)
    dataset = load_dataset(tmp_path, now_s=NOW_S)
    assert dataset.vocabularies["items"]["brand"] == ["A"]
    assert dataset.item_codes[:, 0].tolist() == [0, 2, 2, 0, 1]


def test_words_are_hashed_in_lower_case(tmp_path: Path) -> None:
    dataset = load(tmp_path, ROWS)
    words = next(f for f in dataset.schema.items.features if f.name == "words")
    expected = [words.offset + zlib.crc32(word.encode()) % 64 for word in ("velvet", "lip", "stick")]
    assert dataset.item_codes[2, words.columns].tolist() == expected
    assert dataset.item_codes[3, words.columns].tolist() == [
        words.offset + zlib.crc32(w.encode()) % 64 for w in ("été", "noir")
    ] + [0]
    assert dataset.item_codes.max() < dataset.schema.items.num_codes


def test_numbers_and_vectors_are_standardized_and_0_where_missing(tmp_path: Path) -> None:
    values = load(tmp_path, ROWS).item_values
    assert values[3].tolist() == [0, 0, 0]
    known = values[[1, 2, 4]]
    np.testing.assert_allclose(known.mean(0), 0, atol=1e-6)
    np.testing.assert_allclose(known.std(0), 1, atol=1e-6)


def test_long_titles_are_cut_between_letters(tmp_path: Path) -> None:
    load(tmp_path, ROWS)
    (tmp_path / "items.csv").write_text(ITEMS.replace("serum", "é" * 59 + "xé"), "utf-8")
    title = load_dataset(tmp_path, now_s=NOW_S).item_titles[4]
    assert title.decode() == "é" * 59 + "x"


def test_histories_are_in_time_order_whatever_the_file_s_order(tmp_path: Path) -> None:
    histories = load(tmp_path, ROWS).histories
    assert histories.offsets.tolist() == [0, 0, 4, 6, 7]
    assert histories.item_rows.tolist() == [2, 4, 3, 1, 4, 2, 2]
    assert histories.times.tolist() == [1, 4, 5, 9, 3, 9, 2]


def test_leave_one_out_holds_the_last_two_of_users_with_three(tmp_path: Path) -> None:
    dataset = load(tmp_path, ROWS)
    assert dataset.train_ends.tolist() == [0, 2, 6, 7]
    assert (dataset.validation.user_rows.tolist(), dataset.validation.item_rows.tolist()) == ([1], [3])
    assert (
        dataset.test.user_rows.tolist(),
        dataset.test.item_rows.tolist(),
        dataset.test.history_ends.tolist(),
    ) == ([1], [1], [3])
    assert dataset.train_impressions is None
    assert [task.name for task in dataset.schema.tasks] == ["interact"]


RANDOM = '{kind = "random", validation = 0.2, test = 0.3}'


def test_users_drawn_by_chance_are_held_out_whole_and_stay_drawn_when_others_come(tmp_path: Path) -> None:
    def drawn(users: range, split: str = RANDOM) -> tuple[Dataset, list[set[bytes]]]:
        lines = [f"u{u},{item},{at}" for u in users for at, item in enumerate((7, 8, 9))]
        dataset = load(tmp_path, "\n".join(["user_id,item_id,time", *lines, "once,7,5"]), split=split)
        parts = (dataset.validation, dataset.test)
        return dataset, [{bytes(dataset.user_ids[row - 1]) for row in part.user_rows} for part in parts]

    dataset, (validation, test) = drawn(range(100))
    assert not validation & test
    assert 10 <= len(validation) <= 30
    assert 20 <= len(test) <= 40
    ends, starts = dataset.train_ends, dataset.histories.offsets[:-1]
    held = [row for row in range(1, 102) if ends[row] == starts[row]]
    assert {bytes(dataset.user_ids[row - 1]) for row in held} - {b"once"} == validation | test
    assert dataset.test.history_ends.tolist() == (starts[dataset.test.user_rows] + 2).tolist(), (
        "the last event"
    )
    assert (refit_dataset(dataset).train_ends == dataset.histories.offsets[1:]).all()
    kept = drawn(range(100), RANDOM.replace("}", ", keep_test = true}"))[0]
    assert (kept.known_ends[kept.test.user_rows] == kept.histories.offsets[kept.test.user_rows]).all()
    assert validation <= drawn(range(200))[1][0]
    assert drawn(range(100), RANDOM.replace("}", ", seed = 1}"))[1][1] != test


CLICKS = "[[tasks]]\nname = 'ctr'\nlabel = {column = 'clicked'}\n"


@pytest.mark.parametrize("split", ["time", "leave_one_out", RANDOM])
def test_splits_and_history_ends_agree_with_plain_loops(tmp_path: Path, split: str) -> None:
    rng = np.random.default_rng(3)
    num = 400
    users, items = rng.integers(0, 12, num), rng.choice([7, 8, 9, 10], num)
    times, clicked = rng.integers(0, 300, num), rng.random(num) < 0.5
    lines = [f"u{u:02d},{i},{t},{int(c)}" for u, i, t, c in zip(users, items, times, clicked, strict=True)]
    dataset = load(
        tmp_path, "user_id,item_id,time,clicked\n" + "\n".join(lines) + "\n", split=split, tasks=CLICKS
    )
    histories = dataset.histories
    parts = [dataset.train_impressions, dataset.validation_impressions, dataset.test_impressions]
    assert sum(len(p.times) for p in parts if p) == num
    for part in parts:
        assert part is not None
        assert (np.diff(part.times) >= 0).all()
        for user, time, end in zip(part.user_rows, part.times, part.history_ends, strict=True):
            begin, stop = histories.offsets[user], histories.offsets[user + 1]
            assert end == begin + sum(t < time for t in histories.times[begin:stop])
    if split == "time":
        late, later = sorted(times)[320], sorted(times)[360]
        for user in range(1, 13):
            begin, stop = histories.offsets[user], histories.offsets[user + 1]
            assert dataset.train_ends[user] == begin + sum(histories.times[begin:stop] < late)
        for targets, low, high in ((dataset.validation, late - 1, later), (dataset.test, later - 1, 10**9)):
            for user, end, item in zip(
                targets.user_rows, targets.history_ends, targets.item_rows, strict=True
            ):
                assert low <= histories.times[end] < high
                assert histories.item_rows[end] == item
                assert histories.offsets[user] < end
                assert item not in histories.item_rows[histories.offsets[user] : end]
        assert len(np.unique(dataset.test.user_rows)) == len(dataset.test.user_rows), "a user is one user"
        expected = [
            at
            for user in range(1, 13)
            for at in range(histories.offsets[user] + 1, histories.offsets[user + 1])
            if late <= histories.times[at] < later
            and histories.item_rows[at] not in histories.item_rows[histories.offsets[user] : at]
        ]
        first = first_of_users(np.searchsorted(histories.offsets, expected, "right"), 1)
        assert dataset.validation.history_ends.tolist() == np.array(expected)[first].tolist()
        train, test = parts[0], parts[2]
        assert train is not None
        assert test is not None
        assert train.times.max() < test.times.min()


EVENTS = """\
user_id,item_id,time,event,seconds
u,7,1,view,
u,7,2,click,
u,7,3,buy,5
u,7,4,view,
u,8,5,view,
u,8,6,click,
v,9,1,click,
v,9,2,view,
v,9,2,click,
v,10,3,view,
v,10,9,buy,
"""
EVENT_TASKS = """
[[tasks]]
name = "ctr"
label = {event = "click"}
[[tasks]]
name = "cvr"
label = {event = "buy"}
given = "ctr"
[[tasks]]
name = "stay"
kind = "regression"
label = {column = "seconds", log1p = true}
given = "cvr"
"""


def _all_labels(dataset: Dataset) -> dict[tuple[bytes, bytes, int], list[float]]:
    found = {}
    for part in (dataset.train_impressions, dataset.validation_impressions, dataset.test_impressions):
        assert part is not None
        for u, i, t, labels in zip(part.user_rows, part.item_rows, part.times, part.labels, strict=True):
            found[dataset.user_ids[u - 1], dataset.item_ids[i - 1], int(t)] = labels.round(3).tolist()
    return found


def test_events_after_a_view_label_it_until_the_next_view(tmp_path: Path) -> None:
    dataset = load(
        tmp_path, EVENTS, split="time", interactions='event = "event"\nimpression = "view"', tasks=EVENT_TASKS
    )
    nan = float("nan")
    expected = {
        (b"u", b"7", 1): [1, 1, 1.792],
        (b"u", b"7", 4): [0, nan, nan],
        (b"u", b"8", 5): [0, nan, nan],  # validation's; its click is the test's
        (b"v", b"9", 2): [1, 0, nan],
        (b"v", b"10", 3): [0, nan, nan],  # bought without a click: not "given ctr"
    }
    found = _all_labels(dataset)
    assert found.keys() == expected.keys()
    for key, labels in expected.items():
        np.testing.assert_allclose(found[key], labels, atol=1e-3, err_msg=str(key))
    assert dataset.histories.times.tolist() == [2, 6, 1, 2]  # the clicks, at their own times


def funnel(
    folder: Path, rows: list[tuple[str, int, int, str]], within: str = "", split: str = "time"
) -> Dataset:
    """Loads views and what came of them: (user, item, time, event)."""
    text = "user_id,item_id,time,event\n" + "".join(",".join(map(str, row)) + "\n" for row in rows)
    tasks = f'[[tasks]]\nname = "buys"\nlabel = {{event = "buy"{within}}}\n'
    return load(folder, text, split=split, interactions='event = "event"\nimpression = "view"', tasks=tasks)


# Hundred views, one a second of 1,000 to 10,900: validation begins at 9,000, test at 9,950.
VIEWS = [(f"u{second % 7}", 7 + second % 4, 1_000 + 100 * second, "view") for second in range(100)]


def bought(view: int, after_s: int) -> tuple[str, int, int, str]:
    """A purchase of what the view showed, so many seconds later."""
    return (*VIEWS[view][:2], VIEWS[view][2] + after_s, "buy")


def test_a_label_counts_within_its_time_alone(tmp_path: Path) -> None:
    rows = [*VIEWS, bought(3, 60), bought(10, 61), bought(20, 5)]
    found = _all_labels(funnel(tmp_path, rows, within=', within = "1min"'))
    happened = {time for (_, _, time), [label] in found.items() if label == 1}
    assert happened == {VIEWS[3][2], VIEWS[20][2]}
    found = _all_labels(funnel(tmp_path, rows, within=", within = 61"))
    assert VIEWS[10][2] in {time for (_, _, time), [label] in found.items() if label == 1}


def test_no_label_comes_from_a_later_period_and_a_refit_knows_it(tmp_path: Path) -> None:
    """What a user bought after training ended was not known then; when all is over it is."""
    rows = [*VIEWS, bought(75, 2_500), bought(85, 1_500), bought(5, 100)]
    dataset = funnel(tmp_path, rows)
    found = _all_labels(dataset)
    parts = (dataset.train_impressions, dataset.validation_impressions, dataset.test_impressions)
    begins = [int(part.times.min()) for part in parts if part is not None]
    assert VIEWS[75][2] < begins[1] < VIEWS[75][2] + 2_500
    assert begins[1] < VIEWS[85][2] < begins[2] < VIEWS[85][2] + 1_500
    assert {time for (_, _, time), [label] in found.items() if label == 1} == {VIEWS[5][2]}
    assert not any(np.isnan(label) for label in found.values())
    known = refit_dataset(dataset).train_impressions
    assert known is not None
    assert sorted(known.times[known.labels[:, 0] == 1]) == sorted(VIEWS[view][2] for view in (5, 75, 85))


def test_a_refit_learns_nothing_of_a_published_test(tmp_path: Path) -> None:
    rows = [*VIEWS, bought(75, 100), bought(60, 2_600), bought(85, 1_500)]
    dataset = funnel(tmp_path, rows, split='{kind = "time", keep_test = true}')
    known = refit_dataset(dataset).train_impressions
    assert known is not None
    assert sorted(known.times[known.labels[:, 0] == 1]) == [VIEWS[60][2], VIEWS[75][2]]


def test_a_label_whose_time_is_not_over_is_censored_whatever_happened(tmp_path: Path) -> None:
    """Near the end of each period, the log's own too; early purchases there would look too frequent."""
    dataset = funnel(tmp_path, [*VIEWS, bought(5, 100), bought(78, 50)], within=", within = 500")
    train = dataset.train_impressions
    assert train is not None
    for part in (train, dataset.validation_impressions, dataset.test_impressions):
        assert part is not None
        is_known = ~np.isnan(part.labels[:, 0])
        last = int(part.times.max())
        assert is_known[part.times + 600 < last].all()
        assert not is_known[part.times + 400 > last].any()
        assert is_known.any()
    assert train.labels[train.times == VIEWS[5][2], 0] == 1
    known = refit_dataset(dataset).train_impressions
    assert known is not None
    assert known.labels[known.times == VIEWS[78][2], 0] == 1, "over by the end of the log"
    assert np.isnan(known.labels[known.times + 500 > VIEWS[-1][2], 0]).all()
    with pytest.raises(
        InvalidInput, match=r"no label of task 'buys' is known by the end of training: its `within`"
    ):
        funnel(tmp_path, [*VIEWS, bought(5, 100)], within=', within = "1d"')


def test_a_column_s_label_counts_by_when_it_came_in(tmp_path: Path) -> None:
    """As an event does: within its time, from its own part alone, censored near a part's end; a refit knows
    more."""
    came = {3: 60, 10: 61, 75: 2_500, 78: 50}
    text = "user_id,item_id,time,bought,when\n" + "".join(
        f"{user},{item},{time},{int(view in came)},{time + came[view] if view in came else ''}\n"
        for view, (user, item, time, _) in enumerate(VIEWS)
    )

    def positive(dataset: Dataset) -> set[int]:
        return {time for (_, _, time), [label] in _all_labels(dataset).items() if label == 1}

    task = '[[tasks]]\nname = "buys"\nlabel = {{column = "bought", time = "when"{}}}\n'
    dataset = load(tmp_path, text, split="time", tasks=task.format(""))
    assert positive(dataset) == {VIEWS[view][2] for view in (3, 10, 78)}
    known = refit_dataset(dataset).train_impressions
    assert known is not None
    assert set(known.times[known.labels[:, 0] == 1].tolist()) == {VIEWS[view][2] for view in came}
    assert sorted(dataset.histories.times) == sorted(VIEWS[view][2] + after for view, after in came.items())
    dataset = load(tmp_path, text, split="time", tasks=task.format(', within = "1min"'))
    assert positive(dataset) == {VIEWS[3][2], VIEWS[78][2]}
    dataset = load(tmp_path, text, split="time", tasks=task.format(", within = 500"))
    assert positive(dataset) == {VIEWS[3][2], VIEWS[10][2]}, "78 stands 200 s before training ends"
    assert np.isnan(_all_labels(dataset)[VIEWS[78][0].encode(), str(VIEWS[78][1]).encode(), VIEWS[78][2]])
    for old, new, fault in (
        (str(VIEWS[3][2] + 60), "", "row 4: None is no time, but the label has come in; when?"),
        (str(VIEWS[3][2] + 60), "900", "row 4: '900' is before the row's own time; a label comes in later"),
    ):
        with pytest.raises(InvalidInput, match=re.escape(f"column 'when', {fault}")):
            load(tmp_path, text.replace(f"1,{old}\n", f"1,{new}\n", 1), split="time", tasks=task.format(""))


def test_a_history_has_what_happened_when_the_row_that_says_so_was_written(tmp_path: Path) -> None:
    rows = "user_id,item_id,time,event,liked\n" + "".join(
        f"{user},{item},{time},view,\n{user},{item},{time + 40},rate,{time % 200 // 100}\n"
        for user, item, time, _ in VIEWS
    )
    task = '[[tasks]]\nname = "like"\nlabel = {column = "liked"}\n'
    entry = 'event = "event"\nimpression = "view"'
    dataset = load(tmp_path, rows, split="time", interactions=entry, tasks=task)
    liked = [time for _, _, time, _ in VIEWS if time % 200 // 100]
    assert sorted(dataset.histories.times) == [time + 40 for time in liked]
    assert {time for (_, _, time), [label] in _all_labels(dataset).items() if label == 1} == set(liked)


def test_history_may_be_named_events(tmp_path: Path) -> None:
    entry = 'event = "event"\nimpression = "view"\nhistory = ["buy"]'
    dataset = load(tmp_path, EVENTS, split="time", interactions=entry, tasks=EVENT_TASKS)
    assert dataset.histories.times.tolist() == [3, 9]


def test_without_a_view_event_rows_of_the_same_moment_are_one_impression(tmp_path: Path) -> None:
    dataset = load(
        tmp_path,
        EVENTS,
        split="time",
        interactions='event = "event"',
        tasks=EVENT_TASKS.split('[[tasks]]\nname = "cvr"')[0],
    )
    found = _all_labels(dataset)
    assert len(found) == 10
    assert found[b"v", b"9", 2] == [1.0]


def test_a_threshold_makes_a_rating_a_label(tmp_path: Path) -> None:
    rows = "user_id,item_id,time,stars\nu,7,1,4.5\nu,8,2,3\nv,9,3,4\nv,7,4,\n"
    dataset = load(
        tmp_path, rows, tasks="[[tasks]]\nname = 'like'\nlabel = {column = 'stars', threshold = 4}\n"
    )
    assert dataset.train_impressions is not None
    np.testing.assert_array_equal(dataset.train_impressions.labels.ravel(), [1, 0, 1, np.nan])
    assert dataset.histories.times.tolist() == [1, 3]


def test_a_past_of_all_that_was_rated_tells_what_was_liked(tmp_path: Path) -> None:
    rows = "user_id,item_id,time,stars\nu,7,1,4.5\nu,8,2,3\nv,9,3,4\nv,7,4,\n"
    task = "[[tasks]]\nname = 'like'\nlabel = {column = 'stars', threshold = 4}\n"
    dataset = load(tmp_path, rows, interactions='history = "all"', tasks=task)
    assert dataset.schema.events == ("event", "like")
    assert dataset.histories.times.tolist() == [1, 2, 3, 4]
    assert dataset.histories.kinds.tolist() == [2, 1, 2, 1]


@pytest.mark.parametrize(
    ("interactions", "label", "is_told"),
    [
        ("", "{column = 'stars', threshold = 4}", True),
        ('history = "all"', "{column = 'stars', threshold = 4}", False),
        ('history = "like"', "{column = 'stars', threshold = 4}", False),  # so it is wanted
        ("", "{column = 'clicked'}", False),
    ],
)
def test_ratings_that_count_as_shown_in_vain_are_told(
    tmp_path: Path, interactions: str, label: str, is_told: bool
) -> None:
    rows = "user_id,item_id,time,stars,clicked\nu,7,1,4.5,1\nu,8,2,3,0\nv,9,3,4,1\nv,7,4,,0\n"
    load(tmp_path, rows, interactions=interactions, tasks=f"[[tasks]]\nname = 'like'\nlabel = {label}\n")
    told = [line for line in check_shop(tmp_path, now_s=NOW_S).warnings if 'history = "all"' in line]
    assert len(told) == is_told
    assert all(
        line.startswith("like: a row whose 'stars' is below 4 counts as shown in vain") for line in told
    )


def test_positions_follow_their_impressions_into_each_part(tmp_path: Path) -> None:
    rows = [(f"u{place % 3}", 7 + place % 4, place, (place * 7) % 5) for place in range(1, 41)]
    text = "user_id,item_id,time,clicked,place,chance\n" + "".join(
        f"{user},{item},{time},{int(time % 2)},{place or ''},{place / 4 if 0 < place < 4 else ''}\n"
        for user, item, time, place in reversed(rows)
    )
    task = "[[tasks]]\nname = 'ctr'\nlabel = {column = 'clicked'}\n"
    entry = 'position = "place"\npropensity = "chance"'
    dataset = load(tmp_path, text, split="time", interactions=entry, tasks=task)
    parts = (dataset.train_impressions, dataset.validation_impressions, dataset.test_impressions)
    places = {time: place for _, _, time, place in rows}
    for part in parts:
        assert part is not None
        assert len(part.times)
        assert part.positions.tolist() == [places[time] for time in part.times.tolist()]
        chances = np.where((part.positions > 0) & (part.positions < 4), part.positions / 4, np.nan)
        np.testing.assert_array_equal(part.propensities, chances)
    unknown = load(tmp_path, text, split="time", tasks=task).train_impressions
    assert unknown is not None
    assert unknown.positions.dtype == np.int64
    assert not unknown.positions.any()
    assert unknown.propensities is None


def test_users_of_the_users_file_have_rows_and_features(tmp_path: Path) -> None:
    load(tmp_path, ROWS)
    text = (tmp_path / "shop.toml").read_text()
    users = '[users]\nfile = "users.csv"\nid = "id"\nfeatures = [{name = "skin", kind = "category"}]\n'
    (tmp_path / "shop.toml").write_text(text + users)
    (tmp_path / "users.csv").write_text("id,skin\nz,dry\nu,oily\n")
    dataset = load_dataset(tmp_path, now_s=NOW_S)
    assert dataset.user_ids.tolist() == [b"u", b"v", b"w", b"z"]
    assert dataset.user_codes.ravel().tolist() == [0, 3, 0, 0, 2]
    assert dataset.histories.offsets.tolist() == [0, 0, 4, 6, 7, 7]


def test_history_ends_of_users_without_history_are_their_empty_range(tmp_path: Path) -> None:
    histories = load(tmp_path, ROWS).histories
    assert history_ends(histories, np.array([0, 3, 3]), np.array([100, 0, 3])).tolist() == [0, 6, 7]


@pytest.mark.parametrize("often", [False, True])
def test_what_is_taken_again_is_said(tmp_path: Path, often: bool) -> None:
    rows = [(user, 7 + n % (2 if often else 4), n + 1) for user in "uv" for n in range(4)]
    dataset = load(tmp_path, "user_id,item_id,time\n" + "".join(f"{u},{i},{t}\n" for u, i, t in rows))
    report = check_shop(tmp_path, now_s=NOW_S)
    assert report.sections["histories"]["events with an item had before"] == ("50.0%" if often else "0.0%")
    told = "50% of events are of", "exclude_seen = false"
    assert any(all(part in line for part in told) for line in report.warnings) == often
    assert any(all(part in line for part in told) for line in data_facts(dataset)["lacks"]) == often


def test_a_user_validates_by_a_few_items_and_by_fewer_where_users_are_many():
    users = np.array([3, 1, 3, 3, 2] + [1] * 20)
    assert first_of_users(users, 2).tolist() == [0, 1, 2, 4, 5]
    assert np.bincount(users[first_few_of_users(users, 1000)]).tolist() == [0, 8, 1, 3]
    assert np.bincount(users[first_few_of_users(users, 59)]).tolist() == [0, 2, 1, 2]
    assert np.bincount(users[first_few_of_users(users, 4)]).tolist() == [0, 1, 1, 1], (
        "the rest is what is left"
    )
    assert len(first_few_of_users(np.repeat(np.arange(6000), 5), 1000)) == 18_000
    assert len(first_few_of_users(np.repeat(np.arange(30_000), 2), 1000)) == 30_000
    assert first_few_of_users(np.zeros(0, np.int64), 1000).tolist() == []


def test_what_is_held_out_tells_nothing_of_how_often_items_are_taken_again():
    of_both = Histories(np.array([0, 0, 4]), np.array([1, 2, 1, 2]), np.arange(4), np.ones(4, np.uint8))
    assert share_again(of_both) == 0.5
    assert share_again(of_both, np.array([0, 2])) == 0.0
    assert share_again(of_both, np.array([0, 0])) == 0.0


def test_several_new_items_of_a_user_validate_and_one_tests():
    items = np.arange(1, 101)  # one user takes item after item, the others nothing
    histories = Histories(np.array([0, 0, 100]), items, np.arange(100), np.ones(100, np.uint8))
    splits = split_histories(Split(kind="time"), histories, histories.times, np.array(["u"]))
    assert splits.validation.item_rows.tolist() == [81, 82, 83, 84, 85]
    assert splits.validation.history_ends.tolist() == [80, 81, 82, 83, 84]
    assert splits.test.item_rows.tolist() == [91]
    several = few_of_users(SimpleNamespace(histories=histories, test=splits.test))
    assert several.item_rows.tolist() == [91, 92, 93, 94, 95]
    few = Histories(np.array([0, 0, 30]), items[:30], np.arange(30), np.ones(30, np.uint8))
    first = split_histories(Split(kind="time"), few, few.times, np.array(["u"])).test
    assert few_of_users(SimpleNamespace(histories=few, test=first)).item_rows.tolist() == [28]
