"""An item that comes later is packed as the build packed those it knew, and a server recommends it."""

from __future__ import annotations

import threading
import time

import numpy as np
import pyarrow.parquet as pq
import pytest
from shops import private_copy

from clients.client import Client
from clients.items import ItemClient
from ensemble.live.catalogue import REPLACE, Entry
from ensemble.live.encoding import ItemEncoding
from ensemble.live.service import ItemService
from ensemble.steps.served import open_served


def catalogue(shop, id_column: str = "item_id") -> dict[str, dict]:
    """The shop's items by id, as JSON would hold them."""
    rows = pq.read_table(shop / "items.parquet").to_pylist()
    return {str(row[id_column]): {**row, "item_id": str(row[id_column])} for row in rows}


@pytest.mark.parametrize("shop", ["tiny", "sequences"])
def test_a_later_item_is_packed_as_the_build_would(shop, request):
    release, folder = request.getfixturevalue(f"{shop}_release"), request.getfixturevalue(f"{shop}_shop")
    encoding, items = ItemEncoding(release), catalogue(folder)
    names = [name.decode() for name in release.item_ids.sorted_ids]
    known = {*encoding.columns, "item_id", "title"}
    said = [
        encoding.values({key: value for key, value in items[name].items() if key in known}) for name in names
    ]
    entries = [Entry(1, 1, REPLACE, name, values) for name, values in zip(names, said, strict=True)]
    rows, numbers, good = encoding.rows(entries, [frozenset(values) for values in said])
    assert good.all()
    np.testing.assert_array_equal(rows["codes"], release.items["codes"][1:])
    np.testing.assert_allclose(rows["values"], release.items["values"][1:], atol=1e-6)
    np.testing.assert_array_equal(numbers, release.item_numbers[1:])
    lengths = np.linalg.norm(release.items["embedding"][1:], axis=1)
    np.testing.assert_allclose(np.linalg.norm(rows["embedding"], axis=1), lengths, rtol=1e-3)
    cosine = np.einsum("id,id->i", rows["embedding"], release.items["embedding"][1:]) / lengths**2
    other = (
        np.einsum("id,id->i", rows["embedding"], np.roll(release.items["embedding"][1:], 7, axis=0))
        / lengths**2
    )
    assert cosine.mean() > other.mean(), "its features speak for it"


@pytest.mark.triton
@pytest.mark.timeout(300)
def test_a_server_recommends_what_was_added_and_not_what_was_deleted(tiny_repository, tiny_shop, tmp_path):
    from ensemble.server.options import ServeOptions
    from ensemble.server.supervisor import serve

    repository = private_copy(tiny_repository, tmp_path / "repository")
    release = open_served(repository, "r1")
    user = release.user_ids.sorted_ids[5].decode()
    service = ItemService(repository, lambda line: None)
    thread = threading.Thread(target=service.run, daemon=True)
    with serve(repository, ServeOptions(port=0, metrics_port=None)) as server, Client(server.url) as client:
        thread.start()
        while not (repository / ".live" / "writer.json").exists():
            time.sleep(0.01)
        try:
            with ItemClient(repository, wait_s=10) as items:
                first = client.recommend(user, top_k=5).items[0].item_id
                assert client.recommend(user).release == "r1"
                assert items.delete(first).done
                answer = client.recommend(user, top_k=50)
                assert first not in [item.item_id for item in answer.items]
                assert (answer.release, answer.sequence) == ("r1", 1)
                twin = {
                    key: value
                    for key, value in catalogue(tiny_shop)[first].items()
                    if key in service._writer.overlay.encoding.columns
                }
                done = items.add(
                    {
                        **twin,
                        "item_id": "its twin",
                        "item_embedding": (
                            9 * release.live.view.gather(np.array([7]), "embedding")[0]
                        ).tolist(),
                    }
                )
                assert done.done
                assert len(done.instances) >= 3
                others = release.item_ids.sorted_ids.tolist()
                rare = client.recommend(user, top_k=50, exclude_items=[i.decode() for i in others[:270]])
                assert "its twin" in [item.item_id for item in rare.items]
        finally:
            service.stop()
            thread.join()
