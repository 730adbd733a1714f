"""Bad input against a real Triton, raw: INVALID_ARGUMENT that names the field, and batch-mates that notice
nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from asking import IN_FLIGHT, OUTPUTS, TritonAsker
from tritonclient.grpc import InferInput, service_pb2
from tritonclient.utils import InferenceServerException

from ensemble.server.supervisor import Server

pytestmark = pytest.mark.triton

# What the server says behind its prefixes ("in ensemble 'recommend', …") for each bad parameter.
BAD_PARAMETERS = [
    ({"top_k": 0}, "top_k: must be 1..50, got 0"),
    ({"top_k": -1}, "top_k: must be 1..50, got -1"),
    ({"top_k": 51}, "top_k: must be 1..50, got 51"),
    ({"top_k": 2**31}, "top_k: must be 1..50, got 2147483648"),
    ({"top_k": "many"}, "top_k: not JSON: Expecting value: line 1 column 1 (char 0)"),
    ({"session_items": json.dumps(["1"] * 10_000)}, "session_items: at most 1000 items, got 10000"),
    (
        {"exclude_items": "[1, 2"},
        "exclude_items: not JSON: Expecting ',' delimiter: line 1 column 6 (char 5)",
    ),
    ({"session_items": json.dumps(["x" * 129])}, "session_items: an id must have at most 128 bytes, got 129"),
    ({"session_items": '["\\ud800"]'}, "session_items: an id must be valid UTF-8, got '\\ud800'"),
    (
        {"session_items": "[" * 50_000},
        "session_items: not JSON: maximum recursion depth exceeded while decoding a JSON array from a "
        "unicode string",
    ),
    (
        {"weights": '{"interact": NaN}'},
        "weights: the weight of 'interact' must be a finite number, at most 1e6 in size, got NaN",
    ),
    ({"weights": '{"buy": 1}'}, 'weights: no task "buy"; known: interact, recall'),
    (
        {"weights": "{"},
        "weights: not JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)",
    ),
    ({"deny": '{"brand": ["x"]}'}, 'deny: no item category "brand"; known: attributes, kind'),
    ({"caps": '{"kind": 0}'}, "caps: the cap of 'kind' must be a whole number from 1, got 0"),
    ({"diversity": 1.5}, "diversity: must be 0..1, got 1.5"),
    ({"diversity": "NaN"}, "diversity: must be 0..1, got NaN"),
    ({"exclude_seen": "perhaps"}, "exclude_seen: not JSON: Expecting value: line 1 column 1 (char 0)"),
    (
        {"topk": 5},
        "topk: unknown parameter; known: top_k, session_items, exclude_items, exclude_seen, allow, deny, "
        "ranges, weights, caps, diversity, time, context, like",
    ),
    ({"top_k": "[1, 2]"}, "top_k: 2 values for 1 users; give one value for all, or one each"),
]
BAD_IDS = [
    (b"\xff\xfe", "user_id: an id must be valid UTF-8, got b'\\xff\\xfe'"),
    (b"ok\xc3", "user_id: an id must be valid UTF-8, got b'ok\\xc3'"),
    (b"x" * 129, "user_id: an id must have at most 128 bytes, got 129"),
    (b"1\0", "user_id: an id must hold no NUL byte"),
]


@pytest.fixture(scope="module", params=["sequences_server", "sequences_server_fused"])
def server(request: pytest.FixtureRequest) -> Server:
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def asker(server: Server) -> Iterator[TritonAsker]:
    asker = TritonAsker(server.url)
    yield asker
    asker.close()


def refusal(asker: TritonAsker, user_ids: list[bytes], parameters: dict) -> InferenceServerException:
    with pytest.raises(InferenceServerException) as caught:
        asker.ask(user_ids, parameters)
    return caught.value


def assert_refused(error: InferenceServerException, text: str) -> None:
    assert error.status() == "StatusCode.INVALID_ARGUMENT", error
    assert error.message().endswith(text), error.message()


@pytest.mark.parametrize(
    ("parameters", "text"),
    BAD_PARAMETERS,
    ids=[f"{n}-{next(iter(p))}" for n, (p, _) in enumerate(BAD_PARAMETERS)],
)
def test_a_bad_parameter_is_refused_by_name(asker, parameters, text):
    assert_refused(refusal(asker, [b"1"], parameters), text)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_double_that_is_no_number_is_refused(asker, value):
    error = refusal(asker, [b"1"], {"diversity": value})
    assert error.status() == "StatusCode.INVALID_ARGUMENT", error
    assert "parameters: " in error.message() or "diversity: must be 0..1" in error.message()


@pytest.mark.parametrize(("user_id", "text"), BAD_IDS, ids=["not-utf8", "cut-utf8", "129-bytes", "nul"])
def test_a_bad_user_id_is_refused(asker, user_id, text):
    assert_refused(refusal(asker, [user_id], {}), text)
    assert_refused(refusal(asker, [b"1", user_id], {}), text)


def batches(asker: TritonAsker, server: Server) -> tuple[int, int]:
    """(requests, batches they came in) of the features step so far."""
    model = "r1_recommend" if server.launch.configuration else "r1_features"
    found = asker.client.get_inference_statistics(model, headers=server.headers, as_json=True)["model_stats"][
        0
    ]
    return int(found["inference_count"]), int(found["execution_count"])


def test_a_bad_request_leaves_its_batch_mates_unharmed(asker, server):
    """Bad and good sent together, so that they meet in Triton's batches, again and again."""
    good = [([str(n).encode()], {"top_k": 5}) for n in range(1, 9)]
    wanted = [asker.ask(*request) for request in good]
    bad = [([b"1"], parameters) for parameters, _ in BAD_PARAMETERS] + [
        ([user_id], {}) for user_id, _ in BAD_IDS
    ]

    def ask(request):
        try:
            return asker.ask(*request)
        except InferenceServerException as error:
            return error

    mixed = [request for _ in range(8) for pair in zip(bad, good * 3, strict=True) for request in pair]
    before = batches(asker, server)
    with ThreadPoolExecutor(IN_FLIGHT) as pool:
        answers = list(pool.map(ask, mixed))
    after = batches(asker, server)
    assert after[1] - before[1] < 0.8 * len(mixed), "they must have met in batches"
    for n, (request, answer) in enumerate(zip(mixed, answers, strict=True)):
        if n % 2 == 0:
            assert isinstance(answer, InferenceServerException), request
            assert answer.status() == "StatusCode.INVALID_ARGUMENT", answer
        else:
            reference = wanted[(n // 2) % len(bad) % len(good)]
            assert not isinstance(answer, Exception), answer
            assert answer["item_ids"].tolist() == reference["item_ids"].tolist()
            np.testing.assert_allclose(answer["scores"], reference["scores"], rtol=0, atol=1e-5)


# --- what Triton itself refuses, before any code of ours


def infer(asker: TritonAsker, *inputs: InferInput) -> InferenceServerException:
    with pytest.raises(InferenceServerException) as caught:
        asker.client.infer("recommend", list(inputs))
    return caught.value


def test_a_wrong_dtype_is_refused(asker):
    tensor = InferInput("user_id", [1, 1], "INT64")
    tensor.set_data_from_numpy(np.array([[1]]))
    error = infer(asker, tensor)
    assert error.status() == "StatusCode.INVALID_ARGUMENT"
    assert "user_id" in error.message()
    assert "data-type" in error.message()


@pytest.mark.parametrize("shape", [(1,), (1, 2), (1, 1, 1), (0, 1)])
def test_a_wrong_shape_is_refused(asker, shape):
    tensor = InferInput("user_id", list(shape), "BYTES")
    tensor.set_data_from_numpy(np.full(shape, b"1", object))
    assert infer(asker, tensor).status() == "StatusCode.INVALID_ARGUMENT"


def test_a_batch_above_the_maximum_is_refused(asker):
    error = refusal(asker, [b"1"] * 65, {})
    assert error.status() == "StatusCode.INVALID_ARGUMENT"
    assert error.message().endswith("inference request batch-size must be <= 64 for 'recommend'")
    assert len(asker.ask([b"1"] * 64, {})["item_ids"]) == 64


def test_a_missing_and_an_unknown_input_are_refused(asker):
    assert infer(asker).status() == "StatusCode.INVALID_ARGUMENT"
    tensors = [InferInput(name, [1, 1], "BYTES") for name in ("user_id", "item_id")]
    for tensor in tensors:
        tensor.set_data_from_numpy(np.array([[b"1"]], object))
    error = infer(asker, *tensors)
    assert error.status() == "StatusCode.INVALID_ARGUMENT"
    assert "item_id" in error.message()


def test_bytes_that_are_cut_short_are_refused(asker):
    request = service_pb2.ModelInferRequest(model_name="recommend")
    request.inputs.add(name="user_id", datatype="BYTES", shape=[1, 1])
    request.raw_input_contents.append(b"\x05\0\0\0ab")
    with pytest.raises(Exception, match=r"user_id") as caught:
        asker.client._client_stub.ModelInfer(request)
    assert caught.value.code().name == "INVALID_ARGUMENT"


# --- what is odd but no error: a list for everyone


def shown(answer: dict, row: int = 0) -> list[bytes]:
    return [i for i in answer["item_ids"][row].tolist() if i]


@pytest.mark.parametrize("user_id", [b"nobody", b"", "ünbekannt".encode(), b"x" * 128, b" 1"])
def test_an_unknown_user_gets_a_cold_list(asker, user_id):
    answer = asker.ask([user_id, b"1"], {})
    assert len(shown(answer)) == 10
    assert answer["degraded"].ravel().tolist() == [1, 0]
    assert answer["release"].ravel().tolist() == [b"r1", b"r1"]
    assert np.isfinite(answer["scores"]).all()
    assert ((answer["probabilities"] >= 0) & (answer["probabilities"] <= 1)).all()


def test_unknown_items_in_a_session_are_dropped_and_flagged(asker):
    known = asker.ask([b"1"], {"session_items": '["7", "9"]'})
    mixed = asker.ask([b"1"], {"session_items": '["7", "nothing", "9"]'})
    assert mixed["degraded"].ravel().tolist() == [16]
    assert known["degraded"].ravel().tolist() == [0]
    assert shown(mixed) == shown(known)
    assert asker.ask([b"nobody"], {"session_items": '["nothing"]'})["degraded"].ravel().tolist() == [17]


def test_a_session_counts_for_an_unknown_user(asker):
    plain, with_session = asker.ask([b"nobody"], {}), asker.ask([b"nobody"], {"session_items": "[7, 9]"})
    assert shown(plain) != shown(with_session)
    assert not {b"7", b"9"} & set(shown(with_session))


def test_the_list_is_as_long_as_what_is_left(asker, sequences_release):
    ids = [i.decode() for i in sequences_release.item_ids.sorted_ids]
    for left in (0, 1, 3):
        answer = asker.ask([b"nobody"], {"exclude_items": json.dumps(ids[left:])})
        assert sorted(shown(answer)) == sorted(i.encode() for i in ids[:left])


def test_seen_items_come_again_only_when_asked(asker, sequences_release):
    users = sequences_release.user_ids.sorted_ids[:30]
    answers = asker.ask(users.tolist(), {"top_k": 50})
    again = asker.ask(users.tolist(), {"top_k": 50, "exclude_seen": False})
    repeated = 0
    for row, user in enumerate(users):
        seen = sequences_release.users[sequences_release.user_ids.rows_from_ids(np.array([user]))[0]]["seen"]
        past = set(sequences_release.item_ids.ids_from_rows(seen[seen > 0]).tolist())
        assert not past & set(shown(answers, row))
        repeated += bool(past & set(shown(again, row)))
    assert repeated > 10


def test_answers_have_the_five_tensors_cut_to_top_k(asker):
    answer = asker.ask([b"1", b"2"], {"top_k": "[3, 8]"})
    assert {name: answer[name].shape for name in OUTPUTS} == {
        "item_ids": (2, 8),
        "scores": (2, 8),
        "probabilities": (2, 8, 1),
        "degraded": (2, 1),
        "release": (2, 1),
        "sequence": (2, 1),
    }
    assert [len(shown(answer, row)) for row in (0, 1)] == [3, 8]
