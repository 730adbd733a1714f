"""Depth's figures are those of the report at the release's own depth, and a coarse ranker learns an order."""

import json

import numpy as np
import pytest

from builders.bench.coarse import Coarse, Gathered, distil
from builders.bench.depth import Depths, main, measure, plot_of, table_of
from ensemble.steps.blend import Blend


@pytest.fixture(scope="module")
def report(kept, repository):
    return measure(kept, repository, (16, 1024), gathered=128)


def test_at_its_own_depth_a_release_is_worth_what_its_report_says(report, kept):
    told = kept.manifest["report"]["worth"]["ways"]
    own = kept.dataset.schema.sizes.candidates
    row = next(row for row in report["rows"] if row["ranked"] == own and row["way"] == "recall")
    assert row["worth"] == pytest.approx(told["chain"]["worth"], abs=1e-6)
    assert row["worth_minus_own"]["mean"] == 0
    assert report["best"] == pytest.approx(told["best"]["worth"])


def test_no_depth_is_more_than_the_catalogue_and_more_candidates_cost_more(report, kept):
    rows = {(row["way"], row["ranked"]): row for row in report["rows"]}
    assert sorted(rows) == [
        ("coarse", 16),
        ("coarse", 64),
        ("recall", 16),
        ("recall", 64),
        ("recall", kept.dataset.num_items),
    ]
    deep, shallow = rows["recall", kept.dataset.num_items], rows["recall", 16]
    assert deep["ms_ranker"] > 2 * shallow["ms_ranker"]
    assert all(
        row["ms_all"] >= row["ms_recall"] + row["ms_coarse"] + row["ms_ranker"] for row in rows.values()
    )
    assert rows["coarse", 16]["ms_coarse"] > 0
    assert "| coarse | 128 | 16 |" in table_of(report)
    assert plot_of(report)[1:4] == b"PNG"


def test_a_depth_below_a_list_and_a_release_without_stages_are_told_in_a_line(repository, tmp_path, capsys):
    for arguments, words in (
        (["r1", "-r", repository, "--depths", "4"], "--depths 4: should be at least 10"),
        (["r9", "-r", repository], "r9"),
        (["r1", "-r", repository, "--power", "-1"], "--power -1: should be at least 0"),
        (["r1", "-r", repository, "--gathered", "16"], "--gathered 16: should be more than 16"),
        (["r1", "-r", repository, "--plot", tmp_path / "no" / "x.png"], "no is no folder"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main([str(one) for one in arguments])
        assert str(stopped.value).startswith("error: ")
        assert words in str(stopped.value)
        assert "\n" not in str(stopped.value)


def test_another_power_of_relevance_may_be_asked_about(kept, repository):
    verifier = Depths(kept, repository, power=0.0).verifier
    assert isinstance(verifier.reranking.blended, Blend)
    assert (verifier.reranking.blended.power, verifier.reranking.blended.uses_tasks) == (0.0, True)


def test_a_coarse_ranker_learns_the_order_that_it_is_taught(rng):
    features = rng.normal(size=(201, 6)).astype(np.float32) * 3 + 1
    known = rng.normal(size=(300, 4)).astype(np.float32) * 2 - 1
    true = Coarse(rng.normal(size=(4, 6)).astype(np.float32), features[1] * 0, np.ones(2, np.float32))
    rows = np.argsort(rng.random((300, 200)), axis=1)[:, :60] + 1
    rows[::7, 50:] = -1
    scores = rng.normal(size=(300, 60, 2)).astype(np.float32)
    blended = true.scores(known, features[np.maximum(rows, 0)], scores)
    taught = Gathered(known, rows, scores, np.where(rows > 0, blended, -np.inf))
    coarse = distil(taught.take(slice(200)), features)
    kept = coarse.leaves(taught.take(slice(200, None)), features, 15)
    assert (np.isfinite(kept.blended).sum(axis=1) == 15).all()
    assert (kept.rows[np.isfinite(kept.blended)] > 0).all()
    best = np.argsort(-taught.blended[200:], axis=1)[:, :10]
    share = np.isfinite(np.take_along_axis(kept.blended, best, axis=1)).mean()
    assert share > 0.9, "of each list's first ten, among the 15 that are left (a quarter by chance)"


def test_the_command_prints_json(repository, capsys):
    main(["r1", "-r", str(repository), "--depths", "16", "--json"])
    assert [row["ranked"] for row in json.loads(capsys.readouterr().out)["rows"]] == [16, 64]
