"""A search on a real server says what the twin says, in an ensemble and fused; what is wrong with a query is
that request's alone."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from shops import private_copy

from clients import AsyncClient, Client
from clients.errors import InvalidArgument, Unavailable
from ensemble.contract import Degraded
from ensemble.local import LocalPipeline
from ensemble.server.options import ServeOptions
from ensemble.server.supervisor import Server, serve

pytestmark = pytest.mark.triton


@pytest.fixture(scope="module", params=[False, True], ids=["ensemble", "fused"])
def server(request, pictured_repository, tmp_path_factory) -> Iterator[Server]:
    copy = private_copy(pictured_repository, tmp_path_factory.mktemp("search") / "repository")
    options = ServeOptions(port=0, metrics_port=None, fused=request.param, instances=1)
    with serve(copy, options) as one:
        yield one


@pytest.fixture(scope="module")
def search(pictured_release) -> LocalPipeline:
    return LocalPipeline(pictured_release, "search")


@pytest.fixture(scope="module")
def photo(pictured_shop: Path) -> bytes:
    return sorted((pictured_shop / "images").rglob("*.*"))[7].read_bytes()


def png(colour: str) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (40, 30), colour).save(out, "PNG")
    return out.getvalue()


def test_the_server_says_what_the_twin_says_whatever_shares_its_batch(server, search, photo):
    texts = ["matte lipstick", "", "berry", "xqzvkj wpfgh", "glossy coral blush", ""]
    images: list[bytes] = [b"", photo, b"", b"", photo, png("red")]
    users = [f"u{n + 1}" for n in range(len(texts))]
    with Client(server.url) as client, ThreadPoolExecutor(12) as pool:

        def ask(n: int) -> Any:
            return client.search(users[n], texts[n], image=images[n] or None, top_k=5)

        for n, found in enumerate(pool.map(ask, [*range(len(texts))] * 4)):
            n %= len(texts)
            wanted = search.search([users[n]], [texts[n]], [images[n]], {"top_k": 5})
            assert [i.item_id.encode() for i in found.items] == [i for i in wanted["item_ids"][0] if i]
            np.testing.assert_allclose(
                [i.score for i in found.items], wanted["scores"][0][: len(found.items)], atol=1e-3
            )
            assert [",".join(i.finders).encode() for i in found.items] == [
                f for f in wanted["finders"][0] if f
            ]
            assert found.degraded == Degraded(int(wanted["degraded"][0, 0]))


def test_a_raw_client_of_triton_asks_for_several_users_at_once(server, search, photo):
    from tritonclient.grpc import InferenceServerClient, InferInput

    columns = {"user_id": [b"u1", b"u2"], "query_text": [b"berry", b""], "query_image": [b"", photo]}
    inputs = []
    for name, values in columns.items():
        inputs.append(InferInput(name, [2, 1], "BYTES"))
        inputs[-1].set_data_from_numpy(np.array([[value] for value in values], dtype=object))
    answer = InferenceServerClient(server.url).infer("search", inputs, parameters={"top_k": 3})
    wanted = search.search([b"u1", b"u2"], ["berry", ""], [b"", photo], {"top_k": 3})
    assert answer.as_numpy("item_ids").tolist() == wanted["item_ids"].tolist()


BAD = [
    ("", None, "query_text: it is empty, and so is query_image"),
    (" \0 ", None, "query_text: it is empty, and so is query_image"),
    ("", b"no picture", "query_image: is no JPEG, PNG or WebP"),
    ("matte", png("red")[:-30], "query_image: is corrupt: "),
    ("x" * 2_001, None, "query_text: at most 2,000 bytes, got 2,001"),
    ("", b"\xff" * 4_000_001, "query_image: at most 4,000,000 bytes, got 4,000,001"),
]


def test_a_bad_query_is_one_line_and_its_batch_mates_are_answered(server, photo):
    with Client(server.url) as client, ThreadPoolExecutor(12) as pool:

        def good(n: int) -> Any:
            return client.search(f"u{n}", "berry", image=photo if n % 2 else None)

        def bad(n: int) -> str:
            text, image, _ = BAD[n]
            with pytest.raises(InvalidArgument) as raised:
                client.search("u1", text, image=image)
            return str(raised.value)

        goods = [pool.submit(good, n) for n in range(12)]
        for n, said in enumerate(pool.map(bad, range(len(BAD)))):
            assert said.startswith(BAD[n][2]), said
            assert "\n" not in said
        assert all(one.result().items for one in goods)
        with pytest.raises(InvalidArgument, match="like: is an option of search"):
            client.recommend("u1", like=["i1"])


def test_an_async_client_searches_too(server, photo, search):
    async def ask() -> Any:
        async with AsyncClient(server.url) as client:
            return await asyncio.gather(client.search("u1", "berry"), client.search("u1", image=photo))

    for found, wanted in zip(asyncio.run(ask()), (("berry", b""), ("", photo)), strict=True):
        ids = search.search(["u1"], [wanted[0]], [wanted[1]])["item_ids"][0]
        assert list(found.item_ids) == [one.decode() for one in ids if one]


def test_more_like_an_item(server):
    with Client(server.url) as client:
        item = client.search("u1", "berry").item_ids[0]
        near = client.search("u1", like=[item], top_k=4)
    assert len(near.items) == 4
    assert item not in near.item_ids


def test_a_release_without_encoders_says_that_it_has_no_search(tiny_server):
    with (
        Client(tiny_server.url) as client,
        pytest.raises(Unavailable, match="has no search: its release enc"),
    ):
        client.search("u1", "lipstick")
