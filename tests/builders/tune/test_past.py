"""What is tuned on knows nothing of the test part, and is tested by what validated."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from builders.data.dataset import Dataset
from builders.data.splits import first_of_users
from builders.data.stage import dataset_from_tables
from builders.shop.read import read_shop
from builders.tune.past import before_test

SPLITS = {
    "leave_one_out": 'kind = "leave_one_out"',
    "time": 'kind = "time"\nvalidation = 0.2\ntest = 0.2',
    "random": 'kind = "random"\nvalidation = 0.2\ntest = 0.2',
    "column": 'kind = "column"\ncolumn = "part"',
}
USERS, EVENTS = 30, 8


def rows_of(rng: np.random.Generator) -> list[list[str]]:
    """Eight events a user, a minute apart, users one after the other in each minute; the last two of each
    validate and test."""
    parts = ["train"] * (EVENTS - 2) + ["valid", "test"]
    return [
        [f"u{user}", f"i{item}", str(1_700_000_000 + 60 * at + user), str(int(rng.random() < 0.5)), parts[at]]
        for user in range(USERS)
        for at, item in enumerate(rng.permutation(40)[:EVENTS])
    ]


def write_shop(folder: Path, split: str, rows: list[list[str]], labels: bool) -> Path:
    folder.mkdir()
    task = '[[tasks]]\nname = "like"\nlabel = {column = "liked"}\n' if labels else ""
    (folder / "shop.toml").write_text(
        f'name = "past"\n[split]\n{split}\n[interactions]\nfile = "log.csv"\nhistory = "all"\n{task}'
    )
    lines = ["user_id,item_id,time,liked,part", *(",".join(row) for row in rows)]
    (folder / "log.csv").write_text("\n".join(lines) + "\n")
    return folder


def both(folder: Path) -> tuple[Dataset, Dataset]:
    """The shop as a build reads it, and its past."""
    tables = read_shop(folder)
    return dataset_from_tables(tables), dataset_from_tables(before_test(tables))


def arrays_of(part: object) -> dict[str, np.ndarray]:
    found = {name: value for name, value in vars(part).items() if isinstance(value, np.ndarray)}
    for name in ("histories", "validation", "test", "train_impressions", "test_impressions"):
        if getattr(part, name, None) is not None:
            found |= {f"{name}.{key}": value for key, value in arrays_of(getattr(part, name)).items()}
    return found


@pytest.mark.parametrize("labels", [True, False])
@pytest.mark.parametrize("kind", SPLITS)
def test_the_past_is_the_same_whatever_the_test_rows_say(tmp_path, rng, kind, labels):
    rows = rows_of(rng)
    built, past = both(write_shop(tmp_path / "one", SPLITS[kind], rows, labels))
    tests = set(built.user_ids[built.test.user_rows - 1].tolist())
    ends = {
        built.user_ids[user - 1].decode(): int(built.histories.times[end])
        for user, end in zip(built.test.user_rows, built.test.history_ends, strict=True)
    }
    cut = min(ends.values())

    def is_test(row: list[str]) -> bool:
        if kind == "time":
            return int(row[2]) >= cut
        if kind == "random":
            return row[0].encode() in tests
        return int(row[2]) >= ends.get(row[0], 1 << 60)

    assert 0 < sum(map(is_test, rows)) < len(rows) / 2
    known = sorted({row[1] for row in rows if not is_test(row)})
    other = [
        [row[0], known[at % len(known)], row[2], "1", row[4]] if is_test(row) else row
        for at, row in enumerate(rows)
    ]
    _, again = both(write_shop(tmp_path / "two", SPLITS[kind], other, labels))
    before, after = arrays_of(past), arrays_of(again)
    assert before.keys() == after.keys()
    if set(built.item_ids.tolist()) == {item.encode() for item in known}:
        for name, array in before.items():
            np.testing.assert_array_equal(array, after[name], err_msg=name)
    else:
        pytest.fail("an item is only in test rows: the seed has to change")


@pytest.mark.parametrize("kind", SPLITS)
def test_what_validated_tests(tmp_path, rng, kind):
    built, past = both(write_shop(tmp_path / "shop", SPLITS[kind], rows_of(rng), labels=False))
    of = built.validation
    first = first_of_users(of.user_rows, 1)
    validated = dict(zip(of.user_rows[first], of.item_rows[first], strict=True))
    tested = dict(zip(past.test.user_rows, past.test.item_rows, strict=True))
    assert tested == validated
    assert len(past.validation.user_rows), "something validates in its place"
    assert not set(past.validation.history_ends) & set(past.test.history_ends)
