"""The bench of live items and the one of large indexes, whole but small: what they report is what was
there."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from shops import ROOT, one_thread, private_copy

from builders.bench import index as bench_index
from builders.index.choice import IndexTarget
from clients.bench import live as bench_live
from clients.bench import many_changes


@pytest.mark.timeout(180)
def test_what_is_upserted_while_answering_is_found_and_none_is_lost(tiny_repository, tmp_path, monkeypatch):
    monkeypatch.setattr(bench_live, "_TRIED_S", 0.3)
    facts = bench_live.measure(
        private_copy(tiny_repository, tmp_path / "repository"), rate=200.0, seconds=2.0
    )
    assert facts["lost"] == 0
    assert facts["acknowledged"] >= 100
    assert facts["recall_at_100_before"] == facts["recall_at_100_after"] == 1.0
    assert 0 < facts["p50_ms_during"] <= facts["p99_ms_during"]


@pytest.mark.timeout(180)
def test_many_changes_are_measured_to_the_last(tiny_repository, tmp_path, monkeypatch):
    monkeypatch.setattr(many_changes, "_ASKED", 20)
    facts = many_changes.measure(private_copy(tiny_repository, tmp_path / "repository"), 15_000)
    assert 10_000 < facts["changes"] <= 15_000
    assert facts["segments"] == 1, "they were merged"
    assert facts["log_mb"] > 1
    assert 0 < facts["recall_p50_ms_after"] <= facts["recall_p99_ms_after"]
    assert facts["features_private_mb_after"] < facts["features_private_mb_before"] + 60


@pytest.mark.timeout(180)
def test_an_index_that_is_compressed_is_measured_as_a_serving_process_has_it(tmp_path, rng, monkeypatch):
    like = bench_index.likeness(rng.standard_normal((2000, 32)).astype(np.float32), clusters=16)
    queries = like.block(7, 2 * bench_index._QUERIES)
    folder = tmp_path / "8000"
    tune = bench_index.tune  # with few queries: settings are tried a query at a time
    monkeypatch.setattr(
        bench_index,
        "tune",
        lambda index, kind, vectors, queries, truth, target: tune(
            index, kind, vectors, queries[:64], truth[:64], target
        ),
    )
    facts = bench_index.build(8_000, like, queries, folder, IndexTarget(0.9), budget_bytes=8_000 * 32)
    assert facts["refined"]
    (folder / "facts.json").write_text(json.dumps(facts))
    command = [sys.executable, "-m", "builders.bench.index", "--like", "nowhere", "--measure", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=one_thread(), check=True)
    row = json.loads(done.stdout)
    assert row["recall_at_100"] >= 0.85
    assert row["mapped_vector_bytes"] > 8_000 * 64
    assert row["flat_bytes"] == 8_000 * 32 * 4
    assert 0 < row["anonymous_bytes"] < row["flat_bytes"] * 4
    bench_index.plot([row], tmp_path / "growth.png")
    assert (tmp_path / "growth.png").stat().st_size > 5000
    assert "8,000" in bench_index.table([row])
