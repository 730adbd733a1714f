"""Shows that an index in shards finds what the whole index finds."""

import faiss
import numpy as np
import pytest

from ensemble.errors import ReleaseError
from ensemble.index.main_index import MainIndex
from ensemble.index.sharded import ShardedIndex
from tests.ensemble.index.test_main_index import clustered, main_index


def sharded(whole, count):
    return ShardedIndex(
        whole.index, whole.vectors, count, lambda index, vectors, _: MainIndex(index, vectors, whole.query)
    )


@pytest.mark.parametrize("kind", ["Flat", "IVF16,Flat"])
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("share", [None, 0.5, 0.02])
def test_shards_together_find_what_the_whole_finds(rng, kind, count, share):
    embeddings, query = clustered(rng, 3001), clustered(rng, 20)
    embeddings[7] = embeddings[2900]  # a tie between shards
    query[0] = embeddings[7]
    whole = main_index(kind, embeddings)
    mask = None if share is None else np.concatenate([[False], rng.random(3001) < share])
    rows, scores = sharded(whole, count).search(query, 40, mask)
    wanted, wanted_scores = whole.search(query, 40, mask)
    np.testing.assert_array_equal(rows, wanted)
    np.testing.assert_allclose(scores, wanted_scores, rtol=1e-5, atol=1e-6)


def test_a_compressed_index_is_not_cut(rng):
    with pytest.raises(ReleaseError, match="cannot be cut into shards"):
        sharded(main_index("IVF16,PQ16x4fsr", clustered(rng, 3001)), 2)


def test_each_shard_holds_its_part_alone(rng):
    whole = main_index("IVF16,Flat", clustered(rng, 3001))
    shards = sharded(whole, 4).shards
    assert [shard.searched.num_items for shard in shards] == [750, 750, 750, 751]
    assert [shard.start for shard in shards] == [0, 750, 1500, 2250]
    assert isinstance(shards[1].searched.index, faiss.IndexIVFFlat)


def test_more_shards_than_items_are_as_many_as_items(rng):
    whole = main_index("Flat", clustered(rng, 3))
    rows, _ = sharded(whole, 8).search(clustered(rng, 2), 5)
    assert sorted(rows[0].tolist()) == [-1, -1, 1, 2, 3]
