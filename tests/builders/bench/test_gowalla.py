"""The Gowalla benchmark on two tastes: it reads, trains, ranks as by hand, asks the indexes and says what is
wrong."""

import json

import numpy as np
import pytest

from builders.bench.gowalla import drawn, hold_out, main, popularity, read_split, recall_ndcg, together
from builders.encoders.encoders import EncoderConfig, new_user_encoder

_USERS, _ITEMS = 200, 120


def _write(path, lists):
    path.write_text(
        "".join(f"{user} {' '.join(map(str, items))}\n" for user, items in enumerate(lists)), "utf-8"
    )


@pytest.fixture(scope="module")
def two_tastes(tmp_path_factory):
    """Even users like the first half of the items, odd ones the second; within a half some items are asked
    for more."""
    folder, rng = tmp_path_factory.mktemp("two_tastes"), np.random.default_rng(0)
    chance = 1 / np.arange(3, 3 + _ITEMS // 2) ** 0.5
    picks = [
        _ITEMS // 2 * (user % 2) + rng.choice(_ITEMS // 2, 20, replace=False, p=chance / chance.sum())
        for user in range(_USERS)
    ]
    _write(folder / "train.txt", [items[:14] for items in picks])
    _write(folder / "test.txt", [items[14:] for items in picks])
    return folder


def test_two_tastes_are_learned_and_found(two_tastes, tmp_path, capsys):
    options = ["--epochs", "6", "--history", "10", "--orders", "3", "--batch", "256"]
    main([str(two_tastes), "--out", str(tmp_path / "out"), *options])
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    (one, _), (many, _), (popular, _) = report["ranking"].values()
    assert min(one, many) > 1.25 * popular
    assert len(report["log"]) <= 8
    assert [row["index"].split(",")[-1] for row in report["index"]] == ["Flat", "Flat", "RaBitQ", "PQ64x4fsr"]
    assert report["index"][0]["recall_at_100"] == 1.0
    assert all(row["recall_at_100"] > 0.9 for row in report["index"])
    said = capsys.readouterr()
    assert "| LightGCN | 0.1820 | 0.1547 |" in said.out
    assert "epoch 1  loss" in said.err
    main([str(two_tastes), "--out", str(tmp_path / "out"), *options])  # what is trained is kept
    assert "epoch" not in capsys.readouterr().err
    assert json.loads((tmp_path / "out" / "report.json").read_text())["ranking"] == report["ranking"]


def test_metrics_by_hand():
    # rows 1, 2, 3, 4 are ranked so for everyone
    items = np.array([[0.0], [4.0], [3.0], [2.0], [1.0]], np.float32)
    none = np.zeros(0, np.int64)
    train = together([np.array([1]), none, np.array([2])])
    test = together([np.array([3, 4]), none, np.array([1, 3, 4])])
    recall, ndcg = recall_ndcg(np.ones((3, 1), np.float32), items, train, test, k=2)
    # user 0: 2, 3 -> one of two, second place; user 1 has no test items; user 2: 1, 3 -> two of three, both
    # places right
    second = 1 / np.log2(3)
    assert recall == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert ndcg == pytest.approx((second / (1 + second) + 1) / 2)


def test_popularity_ranks_by_count():
    users, items = popularity(together([np.array([2, 3]), np.array([3])]), num_items=4)
    assert users.shape == (2, 1)
    assert items[:, 0].tolist() == [0, 0, 1, 2, 0]


def test_a_draw_keeps_users_apart_and_is_new_every_time():
    rng = np.random.default_rng(0)
    lists = together([np.arange(1, 31), np.zeros(0, np.int64), np.arange(31, 34)])
    first, second = drawn(lists, 10, rng), drawn(lists, 10, rng)
    assert first.offsets.tolist() == second.offsets.tolist() == [0, 10, 10, 13]
    assert first.rows[:10].max() <= 30
    assert set(first.rows[10:]) == {31, 32, 33}
    assert len(set(first.rows)) == 13
    assert first.rows.tolist() != second.rows.tolist()


def test_an_unordered_history_has_no_recent_end_at_first():
    encoder = new_user_encoder(EncoderConfig.tiny(ordered=False), 1)
    assert not encoder.distance_bias.any()
    assert not encoder.recency_bias.any()
    assert new_user_encoder(EncoderConfig.tiny(), 1).distance_bias.any()


def test_what_validates_is_not_trained_on(two_tastes):
    train, _, num_items = read_split(two_tastes)
    kept, validation = hold_out(train, 50, 10, np.random.default_rng(0))
    assert num_items == _ITEMS
    assert len(kept.rows) == len(train.rows) - 50
    for user, target in zip(validation.user_rows, validation.target_rows, strict=True):
        assert target in train.rows[train.offsets[user] : train.offsets[user + 1]]
        assert target not in kept.rows[kept.offsets[user] : kept.offsets[user + 1]]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda folder: (folder / "test.txt").unlink(),
            "test.txt is missing; SRC holds train.txt and test.txt",
        ),
        (
            lambda folder: (folder / "train.txt").write_text("0 1 2\n1 x\n"),
            "train.txt: line 2: wanted 'user item item ...'",
        ),
        (
            lambda folder: (folder / "train.txt").write_text("\n"),
            "train.txt: no line of 'user item item ...'",
        ),
    ],
)
def test_a_wrong_file_is_one_line(tmp_path, capsys, spoil, message):
    for name in ("train.txt", "test.txt"):
        _write(tmp_path / name, [[0, 1], [2]])
    spoil(tmp_path)
    with pytest.raises(SystemExit) as raised:
        main([str(tmp_path), "--out", str(tmp_path / "out")])
    said = capsys.readouterr()
    assert raised.value.code == 2
    assert said.out == ""
    assert said.err.startswith("error: ")
    assert message in said.err
    assert said.err.count("\n") == 1
