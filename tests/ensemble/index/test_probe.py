"""The probe finds what recall loses, and says when queries are no longer what the index was tuned for."""

from __future__ import annotations

import dataclasses

import numpy as np
from random_release import SETTINGS, make_release, open_again, open_recall, write_item_encoder

from ensemble.index.item_index import VECTORS
from ensemble.index.probe import BASELINE, _embeddings, baseline
from ensemble.index.vectors import packed_vectors
from ensemble.live.writer import ItemWriter
from ensemble.options import default_options
from ensemble.steps.sources import Nearest

EVERY = dataclasses.replace(SETTINGS, probe_share=1.0)


def asked(tmp_path, rng, query: np.ndarray, index: str = "Flat") -> dict[str, float]:
    release = make_release(tmp_path, rng, num_items=2000, index=index, settings=EVERY)
    usual = rng.standard_normal((500, 8)).astype(np.float32)
    best = (usual @ release.items["embedding"][1:].T).max(axis=1)
    (release.path / BASELINE).write_text(baseline(usual, best).to_json())
    recall = open_recall(release)
    probe = recall.source(Nearest).probe
    probe.settings = dataclasses.replace(probe.settings, most_busy=1.0)
    for start in range(
        0, len(query), 30
    ):  # the probe holds 64 at most: more would be dropped, which is what it is for
        piece = query[start : start + 30, None]
        recall.run(
            default_options(len(piece)), seen_rows=np.full((len(piece), 12), -1), user_embeddings=piece
        )
        probe.wait()
    return {one.name.removeprefix("peregrine_"): one.value for one in recall.metrics()}


def test_an_exact_index_loses_nothing_and_usual_queries_do_not_drift(tmp_path, rng):
    found = asked(tmp_path, rng, rng.standard_normal((300, 8)).astype(np.float32))
    assert (
        found["recall_at_n"],
        found["recall_alarm"],
        found["recall_probed"],
        found["recall_dropped"],
        found["recall_failed"],
    ) == (
        1.0,
        0.0,
        300.0,
        0.0,
        0.0,
    )
    assert found["query_mean_shift"] < 0.1
    assert found["query_occupancy_shift"] < 0.2
    assert found["query_score_shift"] < 0.15


def test_an_index_asked_too_shallowly_raises_the_alarm(tmp_path, rng):
    # nprobe 1
    found = asked(tmp_path, rng, rng.standard_normal((120, 8)).astype(np.float32), index="IVF32,Flat")
    assert found["recall_at_n"] < 0.7
    assert found["recall_alarm"] == 1.0


def test_a_compressed_index_is_probed_by_its_own_vectors(tmp_path, rng):
    """The items' rows, which take many times as much memory, are not read; what is live counts as it is."""
    settings = dataclasses.replace(EVERY, nprobe=8, refine_factor=50)
    release = make_release(tmp_path, rng, num_items=2000, index="IVF8,PQ4x4fsr", settings=settings)
    np.save(release.path / VECTORS, packed_vectors(release.items["embedding"], "fp16"))
    write_item_encoder(release)
    loved = {"item_id": "loved", "brand": "brand1", "item_embedding": [9.0] * 8}
    ItemWriter(release).apply([{"op": "add", "item": loved}])
    recall = open_recall(open_again(release))
    view = recall.live.refresh()
    poisoned = np.array(view.state.items)
    poisoned["embedding"] = rng.standard_normal(poisoned["embedding"].shape)
    view.state.items = poisoned
    probe = recall.source(Nearest).probe
    query = np.abs(rng.standard_normal((30, 1, 8), dtype=np.float32))
    recall.run(default_options(30), seen_rows=np.full((30, 12), -1), user_embeddings=query)
    probe.wait()
    figures = probe.metrics()
    assert figures["recall_probed"] > 0
    assert figures["recall_at_n"] > 0.99
    row = int(view.rows_from_ids(np.array([b"loved"]))[0])
    assert _embeddings(view, np.array([row]))[0].tolist() == [9.0] * 8


def test_the_alarm_is_told_again_however_long_it_lasts(tmp_path, rng, monkeypatch, capfd):
    monkeypatch.setattr("ensemble.index.probe._REMEMBERED", 50)
    asked(tmp_path, rng, rng.standard_normal((240, 8)).astype(np.float32), index="IVF32,Flat")
    told = capfd.readouterr().err.splitlines()
    assert len(told) == 3, "at the 1st, 101st and 201st"
    words = "WARNING: release r1, request -: model recall's probe: recall_at_n of live queries is 0."
    assert all(line.startswith(words) for line in told)


def test_queries_from_elsewhere_are_seen_as_drift(tmp_path, rng):
    found = asked(tmp_path, rng, 3 * rng.standard_normal((120, 8)).astype(np.float32) + 2)
    assert found["query_mean_shift"] > 0.5
    assert found["query_occupancy_shift"] > 0.3
    assert found["query_score_shift"] > 0.3
