"""Every kind of index against brute force: filters, ties, refinement, shards."""

from __future__ import annotations

import faiss
import numpy as np
import pytest

from builders.index.choice import IndexTarget, choose_kind, exact_positions, index_of_kind, tune
from ensemble.errors import InvalidInput, ReleaseError
from ensemble.index.found import merge_found, recall_share
from ensemble.index.gpu_index import GpuIndex
from ensemble.index.main_index import MainIndex, QuerySettings, open_index
from ensemble.index.vectors import open_vectors, packed_vectors

DIM, ITEMS = 32, 4000
KINDS = {
    "Flat": QuerySettings(),
    "IVF16,Flat": QuerySettings(nprobe=8),
    "IVF16,PQ16x4fsr": QuerySettings(nprobe=12, refine_factor=8),
    "IVF16,RaBitQ": QuerySettings(nprobe=12, refine_factor=8),
    "IVF16,PQ8x5": QuerySettings(nprobe=12, refine_factor=8),
}


def clustered(rng: np.random.Generator, count: int) -> np.ndarray:
    centres = np.random.default_rng(7).standard_normal((12, DIM))
    vectors = centres[rng.integers(0, 12, count)] + 0.6 * rng.standard_normal((count, DIM))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def main_index(kind: str, embeddings: np.ndarray) -> MainIndex:
    index = faiss.index_factory(DIM, kind, faiss.METRIC_INNER_PRODUCT)
    index.train(embeddings)
    index.add(embeddings)
    rows = np.concatenate([np.full((1, DIM), np.nan, np.float32), embeddings])
    return MainIndex(index, lambda wanted: rows[wanted], KINDS[kind])


def brute_force(
    query: np.ndarray, embeddings: np.ndarray, depth: int, mask: np.ndarray | None = None
) -> np.ndarray:
    scores = query @ embeddings.T
    if mask is not None:
        scores[:, ~mask[1:]] = -np.inf
    order = np.argsort(-scores, axis=1, kind="stable")[:, :depth]
    return np.where(np.isfinite(np.take_along_axis(scores, order, axis=1)), order + 1, -1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [None, 0.5, 0.1, 0.03, 0.01, 0.0])
def test_a_filtered_search_is_that_of_brute_force(rng, kind, share):
    embeddings, query = clustered(rng, ITEMS), clustered(rng, 30)
    mask = None if share is None else np.concatenate([[False], rng.random(ITEMS) < share])
    rows, scores = main_index(kind, embeddings).search(query, 50, mask)
    wanted = brute_force(query, embeddings, 50, mask)
    assert ((rows > 0) == (wanted > 0)).all(), "as many as there are"
    assert mask is None or mask[rows[rows > 0]].all()
    found = np.mean(
        [np.isin(w[w > 0], r).mean() if (w > 0).any() else 1.0 for w, r in zip(wanted, rows, strict=True)]
    )
    assert found >= (1.0 if kind == "Flat" else 0.95)
    assert (scores[:, 1:] <= scores[:, :-1]).all()
    lines, columns = np.nonzero(rows > 0)
    exact = np.einsum("nd,nd->n", query[lines], embeddings[rows[lines, columns] - 1])
    np.testing.assert_allclose(scores[lines, columns], exact, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_depth_beyond_the_catalogue_is_padded(rng, kind):
    embeddings = clustered(rng, 700)
    rows, scores = main_index(kind, embeddings).search(clustered(rng, 3), 900)
    for line in rows:
        assert sorted(line[line > 0].tolist()) == list(range(1, 701))
    assert np.isneginf(scores[:, 700:]).all()


def test_three_shards_give_the_same_list(rng):
    embeddings, query = clustered(rng, 3000), clustered(rng, 20)
    embeddings[1000:2000:7] = embeddings[3]  # the same item in several shards: ties across them
    whole = main_index("Flat", embeddings).search(query, 64)
    parts = []
    for shard in range(3):
        rows, scores = main_index("Flat", embeddings[1000 * shard : 1000 * (shard + 1)]).search(query, 64)
        parts.append((np.where(rows > 0, rows + 1000 * shard, -1), scores))
    merged = merge_found(parts, 64)
    np.testing.assert_array_equal(merged[0], whole[0])
    np.testing.assert_allclose(merged[1], whole[1], atol=1e-6)


def test_merged_lists_are_in_order_whatever_their_parts_were():
    one = (np.array([[9, -1]]), np.array([[2.0, -np.inf]], np.float32))
    two = (np.array([[7, 4, 2]]), np.array([[1.0, 3.0, 2.0]], np.float32))
    rows, scores = merge_found([one, two], 6)
    assert rows.tolist() == [[4, 2, 9, 7, -1, -1]]
    assert scores.tolist() == [[3.0, 2.0, 2.0, 1.0, -np.inf, -np.inf]]
    assert merge_found([one, two], 2)[0].tolist() == [[4, 2]]


@pytest.mark.parametrize(
    ("items", "budget", "factory"),
    [
        (50_000, None, "Flat"),
        (500_000, None, "IVF1024,Flat"),
        (10_000_000, None, "IVF4096,PQ32x4fsr"),
        (10_000_000, 500_000_000, "IVF4096,PQ64x4fsr"),
    ],
)
def test_the_kind_fits_size_and_budget(items, budget, factory):
    kind = choose_kind(items, 128, budget)
    assert kind.factory == factory
    assert budget is None or kind.bytes_per_item * items <= budget


def test_a_budget_that_nothing_fits_is_refused():
    with pytest.raises(
        InvalidInput, match=r"^index memory 1000 bytes: 10000000 items of 128 components need at least \d+"
    ):
        choose_kind(10_000_000, 128, 1000)


def test_tuning_reaches_its_target_and_says_what_it_tried(rng):
    embeddings, queries = clustered(rng, 20_000), clustered(rng, 60)
    kind = choose_kind(20_000, DIM, 20_000 * 20)
    assert kind.refined
    index = index_of_kind(kind, 20_000, DIM, lambda start, stop: embeddings[start:stop])
    truth = exact_positions(queries, 100, 20_000, lambda start, stop: embeddings[start:stop])
    tuned = tune(index, kind, lambda rows: embeddings[rows - 1], queries, truth, IndexTarget(0.95, 100))
    again = MainIndex(index, lambda rows: embeddings[rows - 1], tuned.query).search(queries, 100)[0]
    assert recall_share(again, truth) >= 0.95
    assert {
        "nprobe",
        "refine_factor",
        "recall_at_100",
        "ms_per_query",
        "bytes_per_item",
        "mapped_bytes_per_item",
    } <= set(tuned.tried[0])


@pytest.mark.parametrize(("precision", "tolerance"), [("fp16", 1e-3), ("int8", 1e-2)])
def test_mapped_vectors_are_close_to_the_real_ones(tmp_path, rng, precision, tolerance):
    embeddings = clustered(rng, 100)
    np.save(tmp_path / "vectors.npy", packed_vectors(embeddings, precision))
    read = open_vectors(tmp_path / "vectors.npy", 100, DIM)
    np.testing.assert_allclose(
        read(np.array([[3, 99], [0, 3]])), embeddings[[[3, 99], [0, 3]]], atol=tolerance
    )
    with pytest.raises(
        ReleaseError,
        match=r"vectors\.npy: 100 rows of .*; the release has 101 of 32 components; build the release again$",
    ):
        open_vectors(tmp_path / "vectors.npy", 101, DIM)
    (tmp_path / "vectors.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(ReleaseError, match=r"^cannot open .*vectors\.npy: .*build the release again$"):
        open_vectors(tmp_path / "vectors.npy", 100, DIM)


class CpuDevice:
    """Stands where a GPU's memory is: the same indexes, which get no selector either."""

    def copy(self, index: faiss.Index) -> faiss.Index:
        return index

    def flat(self, embedding: int) -> faiss.Index:
        return faiss.IndexFlatIP(embedding)

    def another(self) -> CpuDevice:
        return self


@pytest.mark.parametrize("kind", ["Flat", "IVF16,Flat"])
@pytest.mark.parametrize("share", [None, 0.5, 0.1, 0.03, 0.01, 0.0])
def test_a_filter_gets_full_lists_from_an_index_that_takes_none(rng, kind, share):
    embeddings, query = clustered(rng, ITEMS), clustered(rng, 30)
    mask = None if share is None else np.concatenate([[False], rng.random(ITEMS) < share])
    cpu = main_index(kind, embeddings)
    gpu = GpuIndex(cpu.index, cpu.vectors, cpu.query, CpuDevice())
    for _ in range(2):  # the second search finds the filter's own index
        rows, scores = gpu.search(query, 200, mask)
        wanted = brute_force(query, embeddings, 200, mask)
        assert ((rows > 0) == (wanted > 0)).all(), "as many as there are"
        assert (np.sort(scores, axis=1)[:, ::-1] == scores).all()
        if kind == "Flat":
            assert (rows == wanted).mean() > 0.999  # sums in another order may swap near ties
        else:
            assert recall_share(rows, wanted - 1) > 0.85


def test_more_than_a_gpu_index_gives_is_searched_on_the_cpu(rng, monkeypatch):
    monkeypatch.setattr("ensemble.index.gpu_index._MOST", 100)
    embeddings, query = clustered(rng, ITEMS), clustered(rng, 5)
    cpu = main_index("Flat", embeddings)
    gpu = GpuIndex(cpu.index, cpu.vectors, cpu.query, CpuDevice())
    rows, _ = gpu.search(query, 300)
    assert (rows == brute_force(query, embeddings, 300)).mean() > 0.999


def test_a_large_flat_index_is_searched_in_parts_and_gives_the_whole_ones_lists(rng, monkeypatch):
    monkeypatch.setattr("ensemble.index.gpu_index._PARTS_FROM", ITEMS)
    embeddings, query = clustered(rng, ITEMS), clustered(rng, 30)
    embeddings[ITEMS // 2 :] = embeddings[: ITEMS // 2]  # every item twice, in different parts
    cpu = main_index("Flat", embeddings)
    gpu = GpuIndex(cpu.index, cpu.vectors, cpu.query, CpuDevice())
    assert len(gpu._parts) == 4
    mask = np.concatenate([[False], rng.random(ITEMS) < 0.5])
    for wanted_mask in (None, mask):
        rows, scores = gpu.search(query, 200, wanted_mask)
        wanted, wanted_scores = cpu.search(query, 200, wanted_mask)
        np.testing.assert_allclose(scores, wanted_scores, atol=1e-6)
        assert (rows == wanted).mean() > 0.98  # sums in another order may swap near ties


def test_indexes_of_filters_are_dropped_with_their_masks(rng, monkeypatch):
    embeddings, query = clustered(rng, ITEMS), clustered(rng, 4)
    cpu = main_index("Flat", embeddings)
    gpu = GpuIndex(cpu.index, cpu.vectors, cpu.query, CpuDevice())
    for _ in range(3):  # a clustered mask: these users' items pass less often than others'
        mask = np.concatenate([[False], embeddings[:, 0] > 0.1])
        rows, _ = gpu.search(query, 200, mask)
        assert (rows == brute_force(query, embeddings, 200, mask)).mean() > 0.99
    assert len(gpu._subsets) <= 1
    monkeypatch.setattr("ensemble.index.gpu_index._SUBSETS_BYTES", 1000)
    other = np.concatenate([[False], embeddings[:, 1] > 0.1])
    rows, _ = gpu.search(query, 200, other)  # no room on the GPU: the CPU searches
    assert (rows == brute_force(query, embeddings, 200, other)).mean() > 0.99


@pytest.mark.skipif(hasattr(faiss, "StandardGpuResources"), reason="faiss-gpu is installed")
def test_a_gpu_that_is_asked_for_and_absent_is_refused(rng):
    index = main_index("Flat", clustered(rng, 100))
    with pytest.raises(
        InvalidInput,
        match=r"^--index gpu: faiss-gpu or the GPU is missing; install faiss-gpu instead of faiss-cpu",
    ):
        GpuIndex(index.index, index.vectors, index.query)


@pytest.mark.parametrize("kind", ["Flat", "IVF16,PQ16x4fsr"])
def test_an_index_cut_anywhere_is_refused_by_name(tmp_path, rng, kind):
    index = main_index(kind, clustered(rng, 1000)).index
    faiss.write_index(index, str(tmp_path / "index.faiss"))
    whole = (tmp_path / "index.faiss").read_bytes()
    for length in (0, 3, len(whole) // 3, len(whole) - 1):
        (tmp_path / "index.faiss").write_bytes(whole[:length])
        with pytest.raises(ReleaseError, match=r"^cannot open .*index\.faiss: "):
            open_index(tmp_path / "index.faiss", 1000, DIM)
    (tmp_path / "index.faiss").write_bytes(whole)
    with pytest.raises(
        ReleaseError, match=r"has 1000 vectors of 32, metric 0; the release has 1000 of 16, inner product$"
    ):
        open_index(tmp_path / "index.faiss", 1000, 16)
