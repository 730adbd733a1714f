"""How well items that nobody took are found, on a small split of the same form."""

from __future__ import annotations

import json

import numpy as np
from real_data import real_data

from builders.bench import cold_items
from builders.bench.cold_items import main, truth_of, write_shop
from builders.data.dataset import history_windows, open_dataset
from builders.data.stage import load_dataset
from builders.index.stage import open_recall
from ensemble.steps.sources import Batch


def small(folder):
    """200 users of eight subjects, 400 articles that people took and 150 that nobody did, a tag a subject."""
    rng, source = np.random.default_rng(0), folder / "cold_citeulike"
    source.mkdir(parents=True)
    subject = rng.integers(0, 8, 551)
    pairs = {"train": [], "test": []}
    for user in range(1, 201):
        for part, low, high, count in (("train", 1, 401, 8), ("test", 401, 551, 3)):
            own = [item for item in range(low, high) if subject[item] == user % 8]
            pairs[part] += [f"{user},{item},1" for item in rng.choice(own, count, replace=False)]
    for part, lines in pairs.items():
        (source / f"cold_{part}.csv").write_text("\n".join(lines))
    (source / "cold_test_item_ids.csv").write_text("\n".join(map(str, range(401, 551))))
    tags = [f"2 {subject[item]} {8 + rng.integers(0, 9)}" for item in range(1, 551)]
    (source / "item-tag.dat").write_text("\n".join(tags))
    return folder


def test_cold_items_are_found_by_their_tags(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cold_items, "FIRST", 60)
    arguments = [str(small(tmp_path)), "--out", str(tmp_path / "out"), "--preset", "tiny", "--epochs", "1"]
    main(arguments)
    told = capsys.readouterr().out
    figures = json.loads(told[told.index("{") :])["figures"]
    # 60 of 150, about 19 of which are of the right subject: .4 by chance, all by the tags
    assert figures["content"]["recall@60_among_cold"] > 0.9
    assert set(figures) == {"all sources", "user_embeddings", "content", "candidates"}
    assert all(0 <= value <= 1 for of in figures.values() for value in of.values())

    folders = {name: tmp_path / "out" / name for name in ("data", "encoders", "index")}
    dataset = open_dataset(folders["data"])
    offline, embeddings = open_recall(folders, dataset)
    users = np.arange(1, 6)
    ends = dataset.known_ends[users]
    rows = np.tile(np.arange(1, dataset.num_items + 1), (5, 1))
    seen = history_windows(dataset.histories, users, ends, dataset.schema.sizes.seen)
    batch = Batch(offline.encode_users(users, ends), seen, offline.recall.live.view)
    scores = cold_items._scores(offline.recall, batch, rows, embeddings[1:])
    np.testing.assert_allclose(scores, offline.scores(users, ends, rows), atol=1e-4)


def test_the_split_is_read_to_the_pair(tmp_path):
    source = small(tmp_path) / "cold_citeulike"
    (tmp_path / "shop").mkdir()
    write_shop(source, tmp_path / "shop")
    dataset = load_dataset(tmp_path / "shop")
    truth = truth_of(source, dataset)
    assert [dataset.item_ids[row - 1] for row in truth.cold] == sorted(
        f"a{i}".encode() for i in range(401, 551)
    )
    assert truth.is_true.sum() == 600
    assert not truth.is_true[:, np.setdiff1d(np.arange(551), truth.cold)].any()
    assert not np.isin(dataset.histories.item_rows, truth.cold).any()


def test_the_real_split_has_its_published_size(tmp_path):
    source = real_data("cold_citeulike") / "cold_citeulike"
    (tmp_path / "shop").mkdir()
    write_shop(source, tmp_path / "shop")
    truth = truth_of(source, load_dataset(tmp_path / "shop"))
    assert (len(truth.cold), len(truth.users), int(truth.is_true.sum())) == (3396, 5410, 40776)
