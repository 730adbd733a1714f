"""A search is one call with a text, a picture, or both; what no server takes never leaves the client."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from clients import AsyncClient, Client
from clients.errors import InvalidArgument, Unavailable, error_from_status
from clients.transport import FakeTransport, proto_from_call


def test_text_and_picture_go_as_inputs_of_search(tmp_path: Path) -> None:
    picture = tmp_path / "a.jpg"
    picture.write_bytes(b"\xff\xd8 a picture")
    for image in (picture, str(picture), picture.read_bytes()):
        transport = FakeTransport({"u1": ["i1"]})
        with Client(transport=transport) as client:
            found = client.search("u1", "matte", image=image, top_k=3, like=["i3"])
        assert found.item_ids == ("i1",)
        sent = proto_from_call(transport.calls[0], "recommend")
        assert sent.model_name == "search"
        assert [one.name for one in sent.inputs] == ["user_id", "query_text", "query_image"]
        assert [raw[4:] for raw in sent.raw_input_contents] == [b"u1", b"matte", b"\xff\xd8 a picture"]
        assert sent.parameters["like"].string_param == '["i3"]'
    assert proto_from_call(transport.calls[0], "x").model_name == "search"


def test_an_async_client_sends_the_same() -> None:
    transport = FakeTransport()

    async def ask() -> None:
        async with AsyncClient(transport=transport) as client:
            await client.search("u1", "matte")

    asyncio.run(ask())
    assert transport.calls[0].contents == (("query_text", b"matte"), ("query_image", b""))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"text": "x" * 2_001}, "query_text: at most 2,000 bytes, got 2,001"),
        ({"text": 5}, "query_text: must be text, got int"),
        ({"image": "/nowhere/a.jpg"}, "query_image: cannot read /nowhere/a.jpg: No such file"),
        ({"image": b""}, "query_image: the picture is empty"),
        ({"image": b"x" * 4_000_001}, "query_image: at most 4,000,000 bytes, got 4,000,001"),
        ({"image": 7}, "query_image: must be a file's bytes or its path, got int"),
        ({"text": "a", "topk": 3}, "topk: unknown parameter"),
    ],
)
def test_what_no_server_takes_is_refused_before_it_is_sent(arguments, message) -> None:
    transport = FakeTransport()
    with Client(transport=transport) as client, pytest.raises(InvalidArgument, match=message):
        client.search("u1", **arguments)
    assert not transport.calls


def test_a_server_without_search_is_told_from_one_without_a_release() -> None:
    for status, text in (
        ("NOT_FOUND", "Request for unknown model: 'search' is not found"),
        ("UNAVAILABLE", "Request for unknown model: 'search' has no available versions"),
    ):
        error = error_from_status(status, text, "host:1")
        assert isinstance(error, Unavailable)
        assert "host:1 has no search: its release encodes no texts or pictures" in str(error)
        assert error.retryable == (status == "UNAVAILABLE"), "that one may be draining"
    other = error_from_status(
        "UNAVAILABLE", "Request for unknown model: 'recommend' has no available", "host:1"
    )
    assert "no search" not in str(other)
