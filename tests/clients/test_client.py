"""The sync client, against the fake transport and against a small gRPC server that answers as Triton does."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from fake_triton import FakeTriton
from shops import ROOT

from clients.aio import AsyncClient
from clients.client import Client, ClientCore
from clients.errors import (
    BudgetExceeded,
    CallError,
    InvalidArgument,
    Overloaded,
    ServerFault,
    Unavailable,
    error_from_status,
    scrubbed,
)
from clients.events import EventWriter
from clients.items import ItemClient
from clients.search import call_of_search
from clients.transport import FakeTransport, GrpcTransport, proto_from_call
from clients.wire import call_from_options, decode_bytes, encode_bytes, recommendations_from_answer
from ensemble.contract import Degraded
from ensemble.errors import PeregrineError

LISTS = {"u1": [("lipstick", 0.9, {"click": 0.5, "buy": 0.1}), ("remover", 0.4, {"click": 0.2, "buy": 0.05})]}


def ask(user: object = "u1", **options: object) -> FakeTransport:
    transport = FakeTransport(LISTS, default=["popular"])
    Client(transport=transport).recommend(user, **options)  # type: ignore[arg-type]
    return transport


def test_recommend_gives_typed_items_best_first() -> None:
    result = Client(transport=FakeTransport(LISTS)).recommend("u1")
    assert result.item_ids == ("lipstick", "remover")
    assert result.items[0].probabilities == pytest.approx({"click": 0.5, "buy": 0.1})
    assert (result.user_id, result.release, result.degraded) == ("u1", "fake", Degraded(0))
    with pytest.raises(AttributeError):
        result.release = "r2"  # type: ignore[misc]


def test_recommend_many_cuts_padding_of_each_user() -> None:
    transport = FakeTransport({"a": ["x", "y", "z"], "b": ["x"]})
    first, second, third = Client(transport=transport).recommend_many(["a", "b", 3])
    assert (first.item_ids, second.item_ids, third.item_ids) == (("x", "y", "z"), ("x",), ())
    assert transport.calls[0].user_ids == (b"a", b"b", b"3")


def test_options_become_parameters_and_what_is_not_given_is_not_sent() -> None:
    options = {
        "top_k": 5,
        "session_items": ["a", 7],
        "exclude_seen": False,
        "allow": {"brand": ["X"]},
        "weights": {"buy": 2.0},
        "diversity": 0.5,
        "context": {"device": "phone", "hour": 13},
    }
    sent = ask(**options).calls[0].parameters
    assert sent == {
        "top_k": 5,
        "session_items": '["a","7"]',
        "exclude_seen": False,
        "allow": '{"brand":["X"]}',
        "weights": '{"buy":2.0}',
        "diversity": 0.5,
        "context": '{"device":"phone","hour":13}',
    }
    assert ask().calls[0].parameters == {}


def test_recommend_many_takes_one_value_per_user() -> None:
    options = {
        "top_k": [1, 2],
        "session_items": [["a"], None],
        "caps": {"brand": 1},
        "exclude_seen": [True, None],
    }
    sent = call_from_options(["u", "v"], options, None, per_user=True).parameters
    assert {name: json.loads(value) for name, value in sent.items()} == {  # type: ignore[arg-type]
        "top_k": [1, 2],
        "session_items": [["a"], []],
        "caps": {"brand": 1},
        "exclude_seen": [True, True],
    }


TEXTS = ("abc", "", b"abc", np.str_("abc"), bytearray(b"abc"), memoryview(b"abc"))
# Each argument that takes a list, given a text: what is called, and how what is said begins
LISTS_OF_TEXTS: dict[str, tuple[Callable[..., object], str]] = {
    "user_ids": (lambda c, text: c.recommend_many(text), "user_id: must be a list of user ids, got "),
    **{
        f"{call}, {name}": (ask, f"{name}: must be a list of item ids, got ")
        for name in ("session_items", "exclude_items", "like")
        for call, ask in {
            "one": lambda c, text, name=name: c.recommend("u", **{name: text}),
            "many": lambda c, text, name=name: c.recommend_many(["u", "v"], **{name: text}),
            "each": lambda c, text, name=name: c.recommend_many(["u", "v"], **{name: [["i"], text]}),
            "search": lambda c, text, name=name: c.search("u", "shoes", **{name: text}),
        }.items()
    },
    **{
        f"{name} of a feature": (
            lambda c, text, name=name: c.recommend("u", **{name: {"brand": text}}),
            f"{name}: 'brand' must be a list, [",
        )
        for name in ("allow", "deny", "ranges")
    },
    **{
        f"{name} as a whole": (
            lambda c, text, name=name: c.recommend("u", **{name: text}),
            f"{name}: must map names to values, got ",
        )
        for name in ("allow", "deny", "ranges", "weights", "caps", "context")
    },
    "allow of each": (
        lambda c, text: c.recommend_many(["u", "v"], allow=[{}, {"brand": text}]),
        "allow: 'brand' must be a list, [",
    ),
}


def awaited(answer: object) -> object:
    """What a client of either kind answers."""
    return asyncio.run(answer) if asyncio.iscoroutine(answer) else answer


@pytest.mark.parametrize("argument", LISTS_OF_TEXTS)
@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_a_text_is_no_list_wherever_one_is_taken(kind: type[ClientCore], argument: str) -> None:
    ask, words = LISTS_OF_TEXTS[argument]
    transport = FakeTransport()
    for text in TEXTS:
        with pytest.raises(InvalidArgument) as caught:
            awaited(ask(kind(transport=transport), text))
        assert str(caught.value).startswith(words)
        assert "\n" not in str(caught.value)
    assert not transport.calls


def test_a_text_is_no_list_of_events_or_changes() -> None:
    with pytest.raises(InvalidArgument, match=r"^events: must be a list of Event, got 'a' in it$"):
        EventWriter.record_events(object.__new__(EventWriter), "abc")  # type: ignore[arg-type]
    for changes in ("abc", {"op": "delete"}):
        with pytest.raises(
            InvalidArgument, match=r"^changes: must be a list of mappings, got '(a|op)' in it$"
        ):
            ItemClient.apply(object.__new__(ItemClient), changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("user", "options", "message"),
    [
        (1.5, {}, "user_id: an id must be a string or an integer, got 1.5"),
        (True, {}, "user_id: an id must be a string or an integer, got True"),
        ("x" * 129, {}, "user_id: an id must have at most 128 bytes, got 129"),
        ("\ud800", {}, r"user_id: an id must be valid UTF-8, got '\ud800'"),
        ("u", {"session_items": "abc"}, "session_items: must be a list of item ids, got 'abc'"),
        ("u", {"exclude_items": [None]}, "exclude_items: an id must be a string or an integer, got None"),
        ("u", {"weights": {"buy": float("nan")}}, "weights: numbers must be finite, got {'buy': nan}"),
        ("u", {"diversity": float("nan")}, "diversity: numbers must be finite, got nan"),
        ("u", {"allow": object}, "allow: cannot be written as JSON: <class 'object'>"),
        ("u", {"top_k": 2**63}, "top_k: 9223372036854775808 does not fit into 64 bits"),
        (
            "u",
            {"topk": 5},
            "topk: unknown parameter; known: top_k, session_items, exclude_items, exclude_seen, allow, deny, "
            "ranges, weights, caps, diversity, time, context, like",
        ),
        ("u", {"budget_ms": 0}, "budget_ms: must be above 0, got 0"),
        ("u", {"budget_ms": "9"}, "budget_ms: must be above 0, got '9'"),
    ],
)
def test_bad_options_are_refused_before_they_are_sent(user: object, options: dict, message: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        ask(user, **options)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("users", "options", "message"),
    [
        ([], {}, "user_id: at least one user is needed, got none"),
        (["u", "v"], {"top_k": [1]}, "top_k: one value per user is needed: 2 users, got 1 values"),
        (
            ["u", "v"],
            {"top_k": [1, None]},
            "top_k: None is no value; give one to every user, or leave top_k out",
        ),
    ],
)
def test_bad_batches_are_refused(users: list[str], options: dict, message: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        Client(transport=FakeTransport()).recommend_many(users, **options)
    assert str(caught.value) == message


@pytest.mark.parametrize("users", ["u1", b"u1", {"u1"}, {"u1": 1}, None, 7, np.array("u1")])
def test_users_that_are_no_list_are_refused(users: object) -> None:
    transport = FakeTransport(LISTS)
    with pytest.raises(InvalidArgument, match=r"^user_id: must be a list of user ids, got "):
        Client(transport=transport).recommend_many(users)  # type: ignore[arg-type]
    assert transport.calls == []


@pytest.mark.parametrize("users", [np.array(["u1", "u2"]), np.array(["u1", "u2"], object), ("u1", "u2")])
def test_users_may_come_in_an_array(users: object) -> None:
    transport = FakeTransport(LISTS)
    first, second = Client(transport=transport).recommend_many(users)  # type: ignore[arg-type]
    assert (first.user_id, second.user_id) == ("u1", "u2")
    Client(transport=transport).recommend_many(np.array([7, 8]))
    assert transport.calls[-1].user_ids == (b"7", b"8")
    with pytest.raises(InvalidArgument, match=r"^user_id: at least one user is needed, got none$"):
        Client(transport=transport).recommend_many(np.array([]))


def test_columns_of_other_libraries_are_lists() -> None:
    """pandas and polars columns, Arrow's arrays: whatever gives its values as a list."""
    pa = pytest.importorskip("pyarrow")

    class Column:
        """A column of pandas, as far as it is needed: it is no sequence, and knows `tolist`."""

        def __init__(self, values: list) -> None:
            self.values = values

        def tolist(self) -> list:
            return self.values

    call = call_from_options(
        pa.array(["u1", "u2"]), {"deny": {"brand": Column(["X", np.int64(3)])}}, None, per_user=True
    )
    assert call.user_ids == (b"u1", b"u2")
    assert call.parameters == {"deny": '{"brand":["X",3]}'}
    assert call_from_options(Column([np.int64(7)]), {}, None, per_user=True).user_ids == (b"7",)


def test_arrays_are_sent_wherever_an_option_takes_a_list() -> None:
    options = {
        "top_k": np.int64(5),
        "session_items": np.array(["a", "b"]),
        "allow": {"brand": np.array(["X", "Y"])},
        "deny": {"shade": (np.str_("red"),), "size": np.array([1, 2]), "maker": {"b", "a"}},
        "ranges": {"price": np.array([5.5, 20]), "stock": [np.int64(1), None]},
        "caps": {"brand": np.int32(2)},
        "diversity": np.float64(0.5),
    }
    assert ask(**options).calls[0].parameters == {
        "top_k": 5,
        "session_items": '["a","b"]',
        "allow": '{"brand":["X","Y"]}',
        "deny": '{"shade":["red"],"size":[1,2],"maker":["a","b"]}',
        "ranges": '{"price":[5.5,20.0],"stock":[1,null]}',
        "caps": '{"brand":2}',
        "diversity": 0.5,
    }
    each = {"top_k": np.array([1, 2]), "deny": [{"brand": np.array(["X"])}, None]}
    sent = call_from_options(np.array(["u", "v"]), each, None, per_user=True).parameters
    assert sent == {"top_k": "[1,2]", "deny": '[{"brand":["X"]},{}]'}
    with pytest.raises(InvalidArgument, match=r"^ranges: numbers must be finite, got "):
        ask(ranges={"price": np.array([np.nan, 1.0])})


def test_the_fake_gives_no_more_than_top_k_and_refuses_a_list_of_letters() -> None:
    client = Client(transport=FakeTransport({"u": ["x", "y", "z"]}, default=["p", "q"]))
    assert client.recommend("u", top_k=2).item_ids == ("x", "y")
    assert [len(one.items) for one in client.recommend_many(["u", "v"], top_k=[3, 1])] == [3, 1]
    with pytest.raises(
        InvalidArgument, match=r"^lists: a user's list must be a list of items, got 'lipstick'$"
    ):
        FakeTransport({"u": "lipstick"})


def test_lists_without_any_item_are_empty_and_no_fault() -> None:
    results = Client(transport=FakeTransport()).recommend_many(["u", "v"])
    assert [(one.user_id, one.items) for one in results] == [("u", ()), ("v", ())]


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"tasks": None}, "it has no tensor 'tasks'"),
        ({"release": None}, "it has no tensor 'release'"),
        ({"release": []}, "list index out of range"),
        ({"tasks": [b"no JSON"]}, "Expecting value: line 1 column 1 (char 0)"),
        ({"scores": [1.0]}, "cannot reshape array of size 1 into shape (1,2)"),
    ],
)
def test_an_answer_that_cannot_be_read_is_the_servers_fault(change: dict, fault: str) -> None:
    call = call_from_options(["u1"], {}, None, per_user=False)
    answer = {**FakeTransport(LISTS).send(call), **change}
    with pytest.raises(ServerFault) as caught:
        recommendations_from_answer(call, {name: one for name, one in answer.items() if one is not None}, 1.0)
    assert str(caught.value) == (
        f"the server said OK, but its answer cannot be read: {fault}; its log has the details"
    )


@pytest.mark.parametrize("budget_ms", [None, 5000])
def test_an_ok_without_tensors_is_the_servers_fault(triton: FakeTriton, budget_ms: float | None) -> None:
    triton.has_tensors = False
    with Client(triton.url) as client, pytest.raises(ServerFault, match="it has no tensor 'tasks'"):
        client.recommend("u1", budget_ms=budget_ms)


@pytest.mark.parametrize("budget_ms", [None, 5000])
def test_a_tensor_without_content_is_the_servers_fault(triton: FakeTriton, budget_ms: float | None) -> None:
    triton.has_contents = False
    with (
        Client(triton.url) as client,
        pytest.raises(ServerFault, match="its answer cannot be read: ValueError"),
    ):
        client.recommend("u1", budget_ms=budget_ms)


@pytest.mark.parametrize(
    ("status", "text", "kind", "message"),
    [
        (
            "INVALID_ARGUMENT",
            "in ensemble 'recommend', in ensemble 'r1_recommend', top_k: must be 1..100, got 0",
            InvalidArgument,
            "top_k: must be 1..100, got 0",
        ),
        (
            "INVALID_ARGUMENT",
            "[request id: 7] in ensemble 'recommend', caps: no",
            InvalidArgument,
            "caps: no",
        ),
        (
            "INVALID_ARGUMENT",
            "[request id: <id_unknown>] inference request batch-size must be <= 64 for 'recommend'",
            InvalidArgument,
            "user_id: at most 64 users in one request; send several requests",
        ),
        (
            "INTERNAL",
            "in ensemble 'recommend', Stub process 'r1_features_0_0' is not healthy.",
            Unavailable,
            "server s:1: a step's process died; restart the server if this goes on",
        ),
        (
            "INTERNAL",
            "Failed to increase the shared memory pool size for key 'triton_python_backend_shm_region_7' to "
            "1 bytes",
            Overloaded,
            "server s:1 is overloaded: Failed to increase the shared memory pool size for key … to 1 bytes",
        ),
        (
            "INTERNAL",
            "KeyError: 'x'\n\nAt:\n  /srv/model.py(3): execute",
            ServerFault,
            "server s:1 failed (INTERNAL): KeyError: 'x'; its log has the details",
        ),
        (
            "INTERNAL",
            "Stream removed (RST_STREAM (Received RST_STREAM with error code 2))",
            Unavailable,
            "server s:1 broke the answer off (INTERNAL), as when it is killed; ask again",
        ),
        (
            "UNAVAILABLE",
            "Exceeds maximum queue size",
            Overloaded,
            "server s:1 is overloaded: Exceeds maximum queue size",
        ),
        (
            "UNAVAILABLE",
            "Request timeout expired",
            BudgetExceeded,
            "budget_ms: server s:1 gave up within the request's own timeout",
        ),
        (
            "UNAVAILABLE",
            "This protocol is restricted, expecting header 'triton-grpc-protocol-x'",
            Unavailable,
            "server s:1 keeps this call to its operator; pass the header that `peregrine serve` wrote into "
            "server.json in its state folder",
        ),
    ],
)
def test_errors_say_what_to_do_and_leak_nothing(
    status: str, text: str, kind: type[Exception], message: str
) -> None:
    error = error_from_status(status, text, "s:1")
    assert type(error) is kind
    assert str(error) == message
    assert isinstance(error, PeregrineError)


def test_an_answer_that_broke_off_is_asked_for_again() -> None:
    text = "Stream removed (RST_STREAM (Received RST_STREAM with error code 2))"
    transport = FakeTransport(LISTS, failures=[error_from_status("INTERNAL", text, "s:1")])
    assert Client(transport=transport).recommend("u1").items
    assert len(transport.calls) == 2


def test_scrubbed_removes_keys_paths_and_addresses() -> None:
    assert (
        scrubbed("open /dev/shm/triton_python_backend_shm_region_1 at 0x7f00 failed") == "open … at … failed"
    )


@pytest.mark.parametrize("status", ["UNAVAILABLE", "INTERNAL"])
def test_what_may_pass_is_asked_once_more(status: str) -> None:
    error = Unavailable("away", status, retryable=True)
    transport = FakeTransport(LISTS, failures=[error])
    assert Client(transport=transport).recommend("u1").items
    assert len(transport.calls) == 2
    with pytest.raises(Unavailable):
        Client(transport=FakeTransport(LISTS, failures=[error, error])).recommend("u1")


@pytest.mark.parametrize(
    "error",
    [InvalidArgument("top_k: no"), ServerFault("bug", "INTERNAL"), Overloaded("full", "RESOURCE_EXHAUSTED")],
)
def test_what_will_not_pass_is_not_asked_again(error: Exception) -> None:
    transport = FakeTransport(LISTS, failures=[error])
    with pytest.raises(type(error)):
        Client(transport=transport).recommend("u1")
    assert len(transport.calls) == 1


def test_retries_stay_within_a_tenth_of_the_traffic() -> None:
    transport = FakeTransport(LISTS, failures=[Unavailable("away", "INTERNAL", retryable=True)] * 1000)
    client = Client(transport=transport)
    for _ in range(100):
        with pytest.raises(CallError):
            client.recommend("u1")
    assert len(transport.calls) <= 111


@pytest.mark.alone
def test_a_budget_ends_the_waiting() -> None:
    started = time.perf_counter()
    with pytest.raises(BudgetExceeded) as caught:
        Client(transport=FakeTransport(LISTS, delay_s=0.5)).recommend("u1", budget_ms=20)
    assert str(caught.value) == "budget_ms: no answer within 20 ms"
    with pytest.raises(BudgetExceeded):
        Client(transport=FakeTransport(LISTS, delay_s=0.5), budget_ms=20).recommend("u1")
    assert time.perf_counter() - started < 0.4


@pytest.mark.parametrize(
    "values", [[b"a"] * 100, [b"abc", b"", b"de"] * 40, [b""] * 100, [], [b"x\0"] * 100, ["é".encode()] * 3]
)
def test_bytes_survive_the_wire(values: list[bytes]) -> None:
    assert decode_bytes(encode_bytes(values), len(values)) == values


@pytest.fixture
def triton() -> Iterator[FakeTriton]:
    server = FakeTriton()
    yield server
    server.stop()


def test_grpc_answers_become_results(triton: FakeTriton) -> None:
    with Client(triton.url) as client:
        first, second = client.recommend_many(["u1", "ü2"], top_k=3, diversity=0.5, exclude_seen=True)
    assert first.item_ids == second.item_ids == ("i1", "item-2")
    assert first.items[1].probabilities == {"click": 0.5, "buy": 0.5}
    assert (first.degraded, second.degraded, second.user_id) == (Degraded(0), Degraded.UNKNOWN_USER, "ü2")
    sent = triton.requests[0]
    assert (sent.model_name, len(sent.inputs), sent.inputs[0].name, list(sent.inputs[0].shape)) == (
        "recommend",
        1,
        "user_id",
        [2, 1],
    )
    assert sent.parameters["top_k"].int64_param == 3
    assert sent.parameters["diversity"].double_param == 0.5
    assert sent.parameters["exclude_seen"].bool_param is True


def test_grpc_errors_are_stripped(triton: FakeTriton) -> None:
    triton.failures = [
        (
            "INVALID_ARGUMENT",
            "in ensemble 'recommend', in ensemble 'r1_recommend', top_k: must be 1..100, got 0",
        )
    ]
    with Client(triton.url) as client, pytest.raises(InvalidArgument) as caught:
        client.recommend("u1", top_k=0)
    assert str(caught.value) == "top_k: must be 1..100, got 0"


def test_a_dead_stub_is_asked_around(triton: FakeTriton) -> None:
    triton.failures = [
        ("INTERNAL", "in ensemble 'recommend', Stub process 'r1_features_0_0' is not healthy.")
    ]
    with Client(triton.url, fallback=False) as client:
        assert client.recommend("u1").items
    assert len(triton.requests) == 2


def test_an_old_server_sees_neither_deadline_nor_cancel(triton: FakeTriton) -> None:
    with Client(triton.url, fallback=False) as client:
        client.recommend("u1", budget_ms=5000)
        triton.delay_s = 0.3
        with pytest.raises(BudgetExceeded):
            client.recommend("u1", budget_ms=20)
    # close() has waited for the call that was given up
    assert (triton.deadlines, triton.cancelled, len(triton.requests)) == ([], 0, 2)
    assert triton.requests[1].parameters["timeout"].int64_param == pytest.approx(20_000, rel=0.2)


def test_a_new_server_is_told_to_stop() -> None:
    triton = FakeTriton("2.73.0")
    with Client(triton.url) as client:
        assert client.connect()
        triton.delay_s = 0.2
        with pytest.raises(BudgetExceeded):
            client.recommend("u1", budget_ms=20)
        time.sleep(0.4)
    assert (triton.deadlines, triton.cancelled) == ([], 1)
    triton.stop()


def test_calls_that_were_given_up_are_bounded(triton: FakeTriton) -> None:
    transport = GrpcTransport(triton.url, max_abandoned=4)
    with Client(transport=transport) as client:
        client.recommend("u1", budget_ms=5000)
        triton.delay_s = 0.5
        for _ in range(4):
            with pytest.raises(BudgetExceeded):
                client.recommend("u1", budget_ms=5)
        with pytest.raises(Overloaded) as caught:
            client.recommend("u1", budget_ms=5)
        assert (
            str(caught.value)
            == f"4 calls to {triton.url} are still running, and it cannot be told to stop; ask again later"
        )
        assert transport.num_abandoned == 4
        triton.delay_s = 0.0
        assert client.recommend("u1").items  # without a budget nothing can be given up
    assert (transport.num_abandoned, triton.cancelled) == (0, 0)


def test_a_closed_client_says_so(triton: FakeTriton) -> None:
    client = Client(triton.url)
    client.close()
    for options in ({}, {"budget_ms": 100}):
        with pytest.raises(Unavailable, match=r"^this client is closed; make another one$"):
            client.recommend("u1", **options)  # type: ignore[arg-type]


def test_no_server_is_one_clear_line() -> None:
    with (
        Client("127.0.0.1:1") as client,
        pytest.raises(
            Unavailable, match=r"^server 127\.0\.0\.1:1 is not available: .*is `peregrine serve` running\?$"
        ),
    ):
        client.recommend("u1")


def test_importing_the_client_is_free_of_servers_screens_and_grpc() -> None:
    heavy = ("grpc", "typer", "rich", "psutil", "matplotlib", "torch", "faiss")
    script = f"import sys, clients.client, clients.aio; print(*set({heavy}) & set(sys.modules))"
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert result.stdout.strip() == ""


def test_a_search_brings_a_picture_that_no_recommendation_could():
    picture = b"p" * 3_900_000
    request = proto_from_call(call_of_search("u1", "", picture, {}, None), "recommend")
    assert request.model_name == "search"
    with pytest.raises(InvalidArgument, match=r"request: .* bytes, at most 1,048,576; send fewer users"):
        proto_from_call(call_from_options(["u" * 100] * 12_000, {}, None, True), "recommend")


class Table:
    """Stands for a data frame: it shows itself in many long lines."""

    def __repr__(self) -> str:
        return "\n".join(f"row {row}   {'u' * 40}" for row in range(30))


@pytest.mark.parametrize("field", ["user_ids", "exclude_items", "weights", "budget_ms"])
def test_an_error_shows_whatever_was_given_in_one_short_line(field: str) -> None:
    given = {"user_ids": ["u1"], field: Table()}
    with Client(transport=FakeTransport()) as client, pytest.raises(InvalidArgument) as caught:
        client.recommend_many(given.pop("user_ids"), **given)
    assert "row 0 uuu" in str(caught.value)
    assert "(Table)" in str(caught.value)
    assert len(str(caught.value)) < 250
    assert "\n" not in str(caught.value)
