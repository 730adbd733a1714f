"""The space of titles and pictures is the same each time, knows nothing of what judges it, and is asked only
where it gains and costs no more than it may."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from builders.data.dataset import Dataset, open_dataset
from builders.search.page import shown_lines
from builders.search.queries import FULL, SOME
from builders.search.shared_space import exact_heads, fit_heads, is_judged, shared_features
from builders.search.shown import WEIGHTS, Ranks, choose, hidden_rows, judged_rows
from ensemble.content.encoder import EncoderFacts
from ensemble.content.projection import (
    PROJECTIONS,
    Projection,
    fitted_projection,
    read_projections,
    save_projections,
)
from ensemble.content.shared_space import SHARED, read_heads
from ensemble.index.looks import unit_rows
from ensemble.steps.served import ServedRelease


@pytest.fixture(scope="module")
def dataset(pictured_release: ServedRelease, pictured_shop: Path) -> Dataset:
    built = pictured_shop.parent / "repository"
    return open_dataset(built / pictured_release.manifest["stages"]["data"])


def test_the_heads_are_those_of_the_release_whatever_was_drawn_before(dataset, pictured_release):
    torch.rand(7)
    state, said = torch.get_rng_state(), list[str]()
    heads = fit_heads(dataset, 0, lambda share, text: said.append(text))
    assert heads is not None
    assert torch.equal(torch.get_rng_state(), state)
    assert said[-1] == "titles beside pictures: 299 of 300 rounds"
    for name, head in read_heads(pictured_release.path / SHARED).items():
        np.testing.assert_allclose(heads[name].matrix, head.matrix, atol=1e-5)
        np.testing.assert_allclose(heads[name].bias, head.bias, atol=1e-5)


def test_true_pairs_lie_nearer_than_others_and_what_judges_taught_nothing(dataset):
    def cosines(of: Dataset) -> np.ndarray:
        heads, features = fit_heads(of, 0, lambda share, text: None), shared_features(of.schema)
        assert heads is not None
        assert features is not None
        places = [
            heads[f.name].unit(unit_rows(np.asarray(dataset.item_values[:, f.columns]))) for f in features
        ]
        return places[0] @ places[1].T

    before = cosines(dataset)
    learned = ~judged_rows(dataset)
    learned[0] = False
    own = np.diag(before)
    assert own[learned].mean() > before[learned][:, learned].mean() + 0.15
    values = np.array(dataset.item_values)
    values[judged_rows(dataset)] = 0.5
    np.testing.assert_array_equal(cosines(_with_values(dataset, values)), before)


def test_too_few_pairs_make_no_space(dataset):
    values = np.array(dataset.item_values)
    picture = next(f for f in dataset.schema.items.features if f.name == "image")
    values[63:, picture.columns.stop - 1] = 1
    assert fit_heads(_with_values(dataset, values), 0, lambda share, text: None) is None


def test_encoders_that_share_a_space_need_no_training(dataset, tmp_path, rng):
    """Rows of few components turn back into the vectors' directions; where trained heads find more, because a
    space was shared by name alone, these stay."""
    features = shared_features(dataset.schema)
    assert features is not None
    common = rng.normal(size=(dataset.num_items, 16)).astype(np.float32)
    vectors, values = [], np.array(dataset.item_values)
    for feature in features:
        of = common + 0.3 * rng.normal(size=common.shape).astype(np.float32) + 0.5
        vectors.append(of / np.linalg.norm(of, axis=1, keepdims=True))
        projection = fitted_projection(vectors[-1], 16)
        values[1:, feature.columns] = projection.values(vectors[-1], np.ones(len(common), bool))
        facts = EncoderFacts(feature.encoder, "clip", "", 16, space="one")
        (tmp_path / f"{feature.encoder}.json").write_text(facts.to_json())
        save_projections({**_read(tmp_path), feature.name: projection}, tmp_path / PROJECTIONS)
    exact = exact_heads(dataset.schema, tmp_path)
    assert exact is not None
    for feature, of in zip(features, vectors, strict=True):
        placed = exact[feature.name].unit(unit_rows(values[1:, feature.columns]))
        assert (placed * of).sum(axis=1).mean() > 0.98
    shared = _with_values(dataset, values)
    assert fit_heads(shared, 0, lambda share, text: None, exact) is exact
    wrong = {
        **exact,
        features[0].name: replace(exact[features[0].name], matrix=-exact[features[0].name].matrix),
    }
    found = fit_heads(shared, 0, lambda share, text: None, wrong)
    assert found is not None
    assert found is not wrong
    facts = EncoderFacts(features[0].encoder, "bert", "", 16)
    (tmp_path / f"{features[0].encoder}.json").write_text(facts.to_json())
    assert exact_heads(dataset.schema, tmp_path) is None


def _read(folder: Path) -> dict[str, Projection]:
    return read_projections(folder / PROJECTIONS) if (folder / PROJECTIONS).exists() else {}


def _with_values(dataset: Dataset, values: np.ndarray) -> Dataset:
    return replace(dataset, item_values=values)


def test_a_fifth_judges_and_half_of_it_is_hidden(rng):
    ids = np.array([f"i{n}" for n in range(4_000)], "S")
    assert abs(is_judged(ids).mean() - 0.2) < 0.03


def test_hidden_rows_are_judged_ones(dataset):
    hidden, judged = hidden_rows(dataset), judged_rows(dataset)
    assert not (hidden & ~judged).any()
    assert 0.2 < hidden.sum() / judged.sum() < 0.8


def ranks(hidden: list[int], told: list[int], items: int = 40) -> Ranks:
    """Queries, two an item, half of which are hidden; each weight gives each of both the same place."""
    is_hidden = np.repeat(np.arange(items) % 2 == 0, 2)
    places = np.where(is_hidden[:, None], np.array(hidden), np.array(told))
    kinds = np.array([FULL, SOME] * items, dtype=object)
    return Ranks(places, is_hidden, kinds, np.repeat(np.arange(items), 2))


NEVER, FIRST = [99] * len(WEIGHTS), [0] * len(WEIGHTS)


def test_the_weight_that_finds_most_is_taken():
    weight, report = choose(ranks([99, 7, 5, *[3] * 9], FIRST))
    assert weight == WEIGHTS[3]
    assert report["on"]
    assert report["hidden"]["with"] > report["hidden"]["without"] == 0
    assert report["hidden"]["gain_at_least"] > 0
    assert report["full_title_first"] == {"without": 1.0, "with": 1.0}
    (line,) = shown_lines({"shown": json.loads(json.dumps(report))})
    assert line.startswith(
        "A text finds items without a text by their pictures: NDCG@10 of items whose titles"
    )
    assert "hidden 0.000 -> 0.431 (100% of their titles find them among the first ten)" in line


@pytest.mark.parametrize(
    ("hidden", "told"),
    [(NEVER, FIRST), ([99, *[0] * 11], [0, *[1] * 11])],
    ids=["nothing is gained", "full titles no longer find their own first"],
)
def test_what_gains_nothing_or_costs_too_much_is_off(hidden, told):
    weight, report = choose(ranks(hidden, told))
    assert weight == 0
    assert not report["on"]
    assert shown_lines({"shown": report})[0].startswith("A text does not find items without a text")


def test_a_gain_that_the_other_half_does_not_bear_out_is_off():
    found = ranks(NEVER, FIRST)
    found.ranks[(found.items % 4 == 0) & found.hidden, 1:] = 0  # every other hidden item
    weight, report = choose(found)
    assert report["weight"] > 0
    assert weight == 0


def test_no_space_says_nothing():
    assert shown_lines({}) == shown_lines({"shown": {}}) == []
