"""Which sources a shop's recall keeps: those that gain on held-out next items."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from shops import write_sequences_shop

import builders.data.stage as data
from builders.data.dataset import Dataset, Targets, open_dataset, training_histories
from builders.folders import link
from builders.index import recall_files
from builders.index.content import COMPONENTS, content_table
from builders.index.fitting import _Lists
from builders.index.offline import EncodeUsers, OfflineRecall
from builders.index.quotas import QuotaChoice
from builders.index.recall_files import RecallFacts, write_recall
from builders.index.stage import _FROM_DATA
from builders.index.walks import item_walks
from builders.presets import preset
from builders.verify.markdown import source_lines
from ensemble.errors import InvalidInput
from ensemble.release.ids import write_ids
from ensemble.steps.content import content_vectors
from ensemble.steps.recall_settings import RecallSettings, settings_from_json
from ensemble.steps.sources import Batch, Popular
from ensemble.steps.walks import Walks

MORE = '\n[recall]\nsources = ["user_embeddings", "transitions", "popular", "content"]\n'


def dataset_of(folder: Path, more: str = MORE, *, shuffled: bool = False) -> Dataset:
    """A shop whose users take items of two kinds; `shuffled`: what items are called says nothing of it."""
    shop = folder / "shop"
    write_sequences_shop(shop, users=400, items=300)
    (shop / "shop.toml").write_text((shop / "shop.toml").read_text() + more)
    if shuffled:
        items = pq.read_table(shop / "items.parquet")
        order = np.random.default_rng(1).permutation(len(items))
        for name in ("kind", "attributes"):
            place = items.column_names.index(name)
            items = items.set_column(place, name, items[name].take(order))
        pq.write_table(items, shop / "items.parquet")
    return built_data(folder)


def built_data(folder: Path) -> Dataset:
    """The data of folder/shop as a build makes them."""
    (folder / "none.jsonl").write_text("")
    (folder / "data").mkdir()
    inputs = {"shop": folder / "shop", "catalogue": folder / "none.jsonl"}
    data.run(inputs, preset("tiny").sizes, folder / "data", lambda *told: None)
    return open_dataset(folder / "data")


def written(
    folder: Path,
    dataset: Dataset,
    verified: RecallSettings | None = None,
    encode: EncodeUsers | None = None,
    knows: float = 0,
) -> RecallFacts:
    """Writes all that recall opens into folder/index, beside encoders that know nothing, or that much of the
    item that comes next."""
    index = folder / "index"
    index.mkdir()
    for name, source in _FROM_DATA.items():
        link(folder / "data" / source, index / name)
    write_ids(index / "item_ids.npy", dataset.item_ids)
    rng = np.random.default_rng(0)
    items = rng.standard_normal((dataset.num_items + 1, 32), dtype=np.float32)
    users = rng.standard_normal((len(dataset.validation.user_rows), 1, 32), dtype=np.float32)
    users += knows * items[dataset.validation.item_rows][:, None]
    return write_recall(dataset, items, users, index, verified=verified, encode_users=encode)


def settings_in(folder: Path) -> RecallSettings:
    return settings_from_json((folder / "index" / "recall.json").read_text())


def test_where_users_with_pasts_do_not_tell_popularity_weighs_what_serves_strangers():
    """One candidate is far above the others for all users, so that its popularity changes nothing."""
    rows = np.tile([3, 5, 7], (40, 1))
    scores = np.zeros((40, 3, 3), np.float32)
    scores[:, 0] = (9.0, 1.0, 0.0)
    scores[:, 1:, 2] = (0.5, 1.0)  # popular
    lists = _Lists(np.arange(40), rows, scores, np.zeros(40, np.int64))
    user, transitions, popular = lists.best(["user_embeddings", "transitions", "popular"], [])
    assert (user, transitions, popular) == (1.0, 0.0, 0.4)
    scores[:, 1:, 2] = 1000.0  # now it would bury what they take
    assert lists.best(["user_embeddings", "transitions", "popular"], [])[2] == 0.0
    alone = _Lists(lists.users, rows, scores[..., :2], lists.column)
    assert alone.best(["user_embeddings", "transitions"], []) == (1.0, 0.0)


def test_content_is_kept_where_it_gains(tmp_path):
    dataset = dataset_of(tmp_path)
    facts, settings = written(tmp_path, dataset), settings_in(tmp_path)
    [tried] = facts.tried_sources
    assert tried["kept"]
    assert tried["gain"]["recall@64"]["low"] > 0
    assert settings.off == ()
    assert settings.quotas.keys() == {"transitions", "popular", "content"}
    assert settings.source_weights[3] > 0
    assert [of["source"] for of in facts.sources] == list(dataset.schema.source_names)
    assert facts.sources[3]["adds"]["ndcg@10"]["low"] > 0
    page = "\n".join(source_lines(dataclasses.asdict(facts)))
    assert "## What each source of recall adds" in page
    assert f"| content | {settings.quotas['content']} |" in page


def test_places_are_the_nearest_to_before_of_those_that_reach_most(tmp_path):
    """Transitions lose no more than it takes. Content loses none: it alone finds what nobody took."""
    dataset = dataset_of(tmp_path)
    written(tmp_path, dataset)
    recall = OfflineRecall(dataset, tmp_path / "index", lambda users, ends: np.zeros(0)).recall
    assert recall.settings.off == ()
    before, users = {"transitions": 24, "popular": 4, "content": 8}, np.arange(80)
    # each source offers others; the user encoder's 32nd is beyond the 28 that are left for it
    offers = [np.tile(np.arange(1, 65) + 64 * source, (80, 1)) for source in range(4)]
    choice = QuotaChoice(recall, offers, users, np.full(80, 32))
    assert choice.nearest(before, ["transitions", "content"]) == {**before, "transitions": 12}
    assert choice.nearest(before, ["content"]) == choice.best(before, ["content"], users) == before
    hardly = QuotaChoice(recall, offers, users, np.where(users == 0, 32, 1))  # one user is no proof
    assert hardly.nearest(before, ["transitions"]) == before


def test_a_user_tunes_the_index_once_however_often_he_validates(tmp_path, monkeypatch):
    dataset, asked = dataset_of(tmp_path), []
    twice = Targets(*(np.repeat(of, 2) for of in vars(dataset.validation).values()))
    write = recall_files._write_index

    def watched(items, users, *rest):
        asked.append(users)
        return write(items, users, *rest)

    monkeypatch.setattr(recall_files, "_write_index", watched)
    written(tmp_path, dataclasses.replace(dataset, validation=twice))
    assert len(asked[0]) == len(dataset.validation.user_rows) == len(twice.user_rows) / 2


def test_content_is_left_out_where_it_says_nothing_and_recall_is_what_it_was(tmp_path):
    dataset = dataset_of(tmp_path / "with", shuffled=True)
    facts, settings = written(tmp_path / "with", dataset), settings_in(tmp_path / "with")
    assert [tried["kept"] for tried in facts.tried_sources] == [False]
    assert settings.off == ("content",)
    assert len(facts.sources) == 3
    assert "Source content was tried and left out: recall@64" in "\n".join(
        source_lines(dataclasses.asdict(facts))
    )
    without = tmp_path / "without"
    written(without, dataset_of(without, "", shuffled=True))
    assert (*settings_in(without).source_weights, 0.0) == settings.source_weights


def dataset_at_random(folder: Path, more: str = "") -> Dataset:
    """A shop whose users take anything: nothing follows from what came before."""
    shop, rng = folder / "shop", np.random.default_rng(2)
    shop.mkdir(parents=True)
    taken = [rng.choice(300, 6, replace=False) for _ in range(1000)]
    rows = [f"u{user},i{item},{at + 1}" for user, of in enumerate(taken) for at, item in enumerate(of)]
    (shop / "log.csv").write_text("user_id,item_id,time\n" + "\n".join(rows))
    (shop / "shop.toml").write_text(f'name = "random"\n[interactions]\nfile = "log.csv"\n{more}')
    return built_data(folder)


def test_fewer_places_are_taken_where_they_surely_reach_more_and_a_shops_own_stay(tmp_path):
    facts = written(tmp_path, dataset_at_random(tmp_path), knows=0.2)
    settings, tried = settings_in(tmp_path), facts.tried_quotas
    assert tried["kept"]
    assert tried["before"] == {"transitions": 24}, "popular's are for users without a past"
    assert tried["gain"]["recall@64"]["low"] > 0
    fewer = settings.quotas["transitions"]
    assert fewer == tried["best"]["transitions"] == facts.sources[1]["quota"] < 24
    assert settings.quotas["popular"] == 4
    page = "\n".join(source_lines(dataclasses.asdict(facts)))
    assert f"transitions {fewer} of its own instead of 24 was taken: recall@64 +" in page
    own = tmp_path / "own"
    facts = written(own, dataset_at_random(own, "[recall]\nquotas = {transitions = 0.375}\n"), knows=0.2)
    assert settings_in(own).quotas == {"transitions": 24, "popular": 4}
    told = "No other places of sources' own were tried: the shop sets them."
    assert told in source_lines(dataclasses.asdict(facts))


def test_walks_lead_to_the_ends_that_a_plain_product_finds(rng, monkeypatch):
    lengths = rng.integers(0, 9, 40)
    offsets, rows = np.concatenate([[0], np.cumsum(lengths)]), rng.integers(1, 13, lengths.sum())
    ties = np.zeros((15, 15))  # items 13 and 14 nobody takes
    for start, stop in itertools.pairwise(offsets):
        for i in range(start, stop):
            for j in range(i + 1, min(i + 4, stop)):
                for one, other in ((rows[i], rows[j]), (rows[j], rows[i])):
                    ties[one, other] += (one != other) / (j - i)
    step = ties / np.maximum(ties.sum(1, keepdims=True), 1e-9)
    wanted = step @ step * np.sqrt(ties.sum(1, keepdims=True))
    np.fill_diagonal(wanted, 0)
    for at_once, pairs in ((1 << 22, 1 << 25), (400, 100)):  # in one piece, and in many
        monkeypatch.setattr("builders.index.walks._AT_ONCE", at_once)
        monkeypatch.setattr("builders.index.transitions._PAIRS_AT_ONCE", pairs)
        ends, scores = item_walks(offsets, rows, 14, window=3, neighbours=15, kept=20)
        dense = np.zeros((15, 16))
        np.put_along_axis(dense, ends.astype(np.int64), scores, 1)
        np.testing.assert_allclose(dense[:, :15], wanted, atol=1e-5)
        assert (np.diff(scores, axis=1) <= 0).all()
    ends, scores = item_walks(offsets, rows, 14, window=3, neighbours=15, kept=2)
    np.testing.assert_allclose(scores, np.sort(wanted, axis=1)[:, :-3:-1], atol=1e-5)


def test_walks_are_tried_and_offer_what_no_transition_does(tmp_path):
    """Whatever the build finds of them, asked they offer ends of walks from the last item, best first."""
    dataset = dataset_of(tmp_path, MORE.replace("content", "walks"))
    facts = written(tmp_path, dataset)
    [tried] = facts.tried_sources
    assert tried["source"] == "walks"
    assert (settings_in(tmp_path).off == ()) == tried["kept"]
    on = dataclasses.replace(settings_in(tmp_path), off=())
    (tmp_path / "index" / "recall.json").write_text(on.to_json())
    recall = OfflineRecall(dataset, tmp_path / "index", lambda users, ends: np.zeros(0)).recall
    last = dataset.histories.item_rows[dataset.train_ends[1:65] - 1][:, None].astype(np.int64)
    offers = recall.source(Walks).offer(Batch(np.zeros((64, 1, 32), np.float32), last, recall.live.view))
    table = np.load(tmp_path / "index" / "walks.npy")
    wanted = table["rows"][last[:, 0]]
    assert (wanted[:, 0] > 0).mean() > 0.9
    np.testing.assert_array_equal(offers[:, 0], wanted[:, 0])
    assert not (offers == last).any()


def test_a_refit_keeps_what_the_verified_model_kept(tmp_path):
    quotas = {"transitions": 6, "popular": 4, "content": 19}
    verified = RecallSettings(source_weights=(1.0, 2.0, 0.1, 4.0), content_items=50, quotas=quotas)
    facts = written(tmp_path, dataset_of(tmp_path), verified)
    settings = settings_in(tmp_path)
    assert (settings.source_weights, settings.content_items, settings.off) == (
        verified.source_weights,
        50,
        (),
    )
    assert settings.quotas == quotas
    assert not facts.tried_sources


@pytest.mark.parametrize("new_items", ["last", "median"])
def test_what_nobody_took_is_as_popular_as_the_shop_says(tmp_path, new_items):
    """In recall, and for items that are added later, too."""
    dataset = dataset_of(tmp_path, f'{MORE}new_items = "{new_items}"\n')
    counts = np.bincount(training_histories(dataset)[1], minlength=dataset.num_items + 1)
    assert (counts[1:] == 0).any()
    written(tmp_path, dataset)
    popularity = np.load(tmp_path / "index" / "popular.npy")
    taken = np.log1p(counts[counts > 0])
    np.testing.assert_allclose(popularity[counts > 0], taken, rtol=1e-6)
    expected = np.median(taken) if new_items == "median" else 0
    np.testing.assert_allclose(popularity[counts == 0], expected, rtol=1e-6)
    popular = OfflineRecall(dataset, tmp_path / "index", lambda *asked: None).recall.source(Popular)
    later = np.array([[dataset.num_items + 5]])
    batch = Batch(np.zeros((1, 1, 32)), np.full((1, 50), -1), None)
    np.testing.assert_allclose(popular.score(batch, later, np.zeros(0)), [[expected]], rtol=1e-6)


def test_items_with_the_same_rare_tag_are_alike_and_a_common_one_tells_less(tmp_path):
    dataset = dataset_of(tmp_path)
    table = content_table(dataset.schema, dataset.item_codes, COMPONENTS, 0)
    assert table.shape == (dataset.schema.items.num_codes, COMPONENTS)
    assert not table[0].any()
    vectors = content_vectors(table, dataset.item_codes)
    kind = dataset.item_codes[1:, 0]
    alike = vectors[1:] @ vectors[1:].T
    same = kind[:, None] == kind
    assert alike[same].mean() > alike[~same].mean() + 0.2
    again = content_table(dataset.schema, dataset.item_codes, COMPONENTS, 0)
    np.testing.assert_array_equal(table, again)


USUAL = '"user_embeddings", "transitions", "popular"'
WRONG = {
    f'sources = [{USUAL}, "dreams"]': "recall source 'dreams' is unknown; known:",
    'sources = ["content"]': "begin with ['user_embeddings', 'transitions', 'popular'], others behind",
    "quotas = {content = 0.2}": "recall.quotas names 'content', which is no source here that has a quota",
    'new_items = "first"': "recall.new_items",
    "quotas = {popular = 1.5}": "recall.quotas.popular is 1.5; give a share, 0 to 1",
    "quotas = {popular = 0.7}": "recall.quotas come to 1.075; leave some for user_embeddings",
}


@pytest.mark.parametrize(("more", "message"), WRONG.items())
def test_what_is_wrong_with_recall_is_said(tmp_path, more, message):
    with pytest.raises(InvalidInput) as caught:
        dataset_of(tmp_path, f"\n[recall]\n{more}\n")
    assert message in str(caught.value)


def test_content_without_categories_and_words_is_refused(tmp_path):
    shop = tmp_path / "shop"
    write_sequences_shop(shop, users=50, items=60)
    text = (shop / "shop.toml").read_text()
    (shop / "shop.toml").write_text(text[: text.index("features")] + MORE)
    with pytest.raises(InvalidInput, match="the items have no category and no text feature"):
        data.load_dataset(shop)


def test_settings_of_before_are_refused_with_the_cure():
    old = json.dumps({"nprobe": 1, "transition_quota": 96, "source_weights": [1, 1, 0]})
    with pytest.raises(Exception, match="build the release again"):
        settings_from_json(old)


@pytest.mark.parametrize("kind", ["again", "never again", "labelled"])
def test_what_is_taken_again_counts_where_it_is_and_nobody_says_what_was_shown(tmp_path, kind):
    rng, shop = np.random.default_rng(3), tmp_path / "shop"
    shop.mkdir()
    rows = []
    for user in range(150):
        usual, taken = rng.choice(60, 3, replace=False), [int(rng.integers(60))]
        while len(taken) < 16:  # what he is used to, or what most take next
            is_usual = kind != "never again" and rng.random() < 0.6
            taken.append(int(rng.choice(usual)) if is_usual else (taken[-1] + 1) % 60)
        rows += [f"u{user},i{item},{at + 1},1" for at, item in enumerate(taken)]
    (shop / "log.csv").write_text("user_id,item_id,time,clicked\n" + "\n".join(rows))
    labels = '[[tasks]]\nname = "ctr"\nlabel = {column = "clicked"}\n' * (kind == "labelled")
    (shop / "shop.toml").write_text(f'name = "again"\n[interactions]\nfile = "log.csv"\n{labels}')
    dataset = built_data(tmp_path)

    def encode(users: np.ndarray, ends: np.ndarray) -> np.ndarray:
        return rng.standard_normal((len(users), 1, 32), np.float32)

    written(tmp_path, dataset, encode=encode)
    assert (settings_in(tmp_path).again > 0) == (kind == "again")
    verified = dataclasses.replace(settings_in(tmp_path), again=3.0)
    (tmp_path / "index").rename(tmp_path / "before")
    written(tmp_path, dataset, verified)
    assert settings_in(tmp_path).again == 3.0, "a refit keeps it"
