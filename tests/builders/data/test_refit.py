"""A refit learns from all that is known, and neither it nor what is served knows a published test."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from shops import write_labelled_shop, write_sequences_shop

from builders.data.dataset import Dataset, open_dataset, save_dataset, training_histories
from builders.data.refit import holds_out, refit_dataset, refit_epochs, save_refit
from builders.data.spans import read_span, save_span, span_of, training_span
from builders.data.stage import load_dataset
from builders.index.snapshot import write_users


@pytest.fixture(scope="module")
def shops(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Dataset]:
    """Datasets of two shops, each as it is and with its test kept."""
    found = {}
    for name, write, kind in (
        ("time", write_labelled_shop, "time"),
        ("sequences", write_sequences_shop, "leave_one_out"),
    ):
        folder = tmp_path_factory.mktemp(name) / "shop"
        write(folder)
        toml = (folder / "shop.toml").read_text()
        found[name] = load_dataset(folder)
        kept = f'split = {{kind = "{kind}", keep_test = true}}'
        lines = [kept if line.startswith("split =") else line for line in toml.splitlines()]
        (folder / "shop.toml").write_text("\n".join(lines))
        found[f"{name}, kept"] = load_dataset(folder)
    return found


@pytest.mark.parametrize("name", ["time", "sequences"])
def test_a_refit_may_learn_from_every_event_and_impression(shops, name):
    dataset = refit_dataset(shops[name])
    assert (dataset.train_ends == dataset.histories.offsets[1:]).all()
    assert len(training_histories(dataset)[1]) == len(dataset.histories.item_rows)
    if name == "time":
        parts = (dataset.train_impressions, shops[name].test_impressions)
        assert len(parts[0].times) == 20_000
        assert parts[0].times.max() == parts[1].times.max()
        known = len(shops[name].train_impressions.times)
        assert (parts[0].times[:known] == shops[name].train_impressions.times).all()
        held = parts[0].behind(known)
        assert len(held.labels) == len(held.times) == 20_000 - known
        assert held.times.min() > shops[name].train_impressions.times.max()


@pytest.mark.parametrize("name", ["time", "sequences"])
def test_a_published_test_is_never_learned_from(shops, name):
    kept, free = shops[f"{name}, kept"], shops[name]
    dataset = refit_dataset(kept)
    targets = kept.test
    assert (targets.item_rows == free.test.item_rows).all(), "it tests the same rows"
    assert (dataset.train_ends[targets.user_rows] <= targets.history_ends).all()
    assert dataset.train_ends.sum() > kept.train_ends.sum(), "the validation part is learned from"
    if name == "time":
        assert len(dataset.train_impressions.times) == 20_000 - len(kept.test_impressions.times)
        assert dataset.train_impressions.times.max() < kept.test_impressions.times.min()


@pytest.mark.parametrize("name", ["time", "sequences"])
def test_the_served_history_ends_before_a_published_test(shops, tmp_path, name):
    kept, free = shops[f"{name}, kept"], shops[name]
    for dataset, folder in ((free, tmp_path / "free"), (kept, tmp_path / "kept")):
        folder.mkdir()
        sizes = dataset.schema.sizes
        features, rates = (
            np.zeros((dataset.num_users + 1, width), np.float32)
            for width in (sizes.user_features, sizes.user_rates)
        )
        write_users(dataset, features, rates, folder)
    free_users, users = (np.load(tmp_path / which / "users.npy") for which in ("free", "kept"))
    tested, histories = kept.test.user_rows, kept.histories
    ends = kept.test.history_ends
    if name == "time":  # a user's target is the first new item of the period, which may begin before it
        begin = kept.test_impressions.times.min()
        ends = np.array([np.searchsorted(_times_of(kept, user), begin) for user in tested])
        ends += histories.offsets[tested]
    newest = np.where(ends > histories.offsets[tested], histories.item_rows[ends - 1], -1)
    assert (users["seen"][tested, -1] == newest).all()
    assert (free_users["seen"][tested, -1] == histories.item_rows[histories.offsets[tested + 1] - 1]).all()


def _times_of(dataset: Dataset, user: int) -> np.ndarray:
    offsets = dataset.histories.offsets
    return dataset.histories.times[offsets[user] : offsets[user + 1]]


def test_what_has_not_changed_is_linked_and_the_verified_files_stay(shops, tmp_path):
    verified, folder = tmp_path / "verified", tmp_path / "refit"
    for path in (verified, folder):
        path.mkdir()
    save_dataset(shops["time"], verified)
    before = {path.name: path.read_bytes() for path in verified.iterdir()}
    save_refit(open_dataset(verified), verified, folder)
    assert {path.name: path.read_bytes() for path in verified.iterdir()} == before
    assert {path.name for path in folder.iterdir()} == before.keys()
    changed = {path.name for path in folder.iterdir() if path.read_bytes() != before[path.name]}
    assert {name.partition(".")[0] for name in changed} == {"train_ends", "train_impressions"}
    assert (open_dataset(folder).train_ends == shops["time"].known_ends).all()


def test_a_shop_that_holds_nothing_out_needs_no_refit(shops):
    dataset = shops["sequences"]
    assert holds_out(dataset)
    assert not holds_out(replace(dataset, train_ends=dataset.known_ends))


def test_spans_say_how_many_events_and_up_to_when(shops, tmp_path):
    dataset = shops["time"]
    first, second = training_span(dataset), training_span(refit_dataset(dataset))
    assert first.events == len(training_histories(dataset)[1]) < second.events
    assert first.until < dataset.histories.times[dataset.validation.history_ends].min()
    assert second.until == dataset.histories.times.max()
    assert second.words().endswith(" UTC")
    assert training_span(shops["sequences"]).words().startswith("position ")
    assert span_of(np.zeros(0, np.int64)).words() == "nothing"
    save_span(first, tmp_path)
    assert read_span(tmp_path) == first


def test_a_refit_replays_a_share_of_the_chosen_epochs():
    assert [refit_epochs(n, 0.25) for n in (1, 4, 12)] == [1, 1, 3]
