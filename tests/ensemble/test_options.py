"""What a request may ask: each bad parameter with its exact error, each good one with what it becomes."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ensemble.context import NO_CONTEXT, Context, context_state, context_width
from ensemble.errors import InvalidArgument
from ensemble.options import (
    _READERS,
    NOTHING_ASKED,
    OPTION_NAMES,
    Filter,
    Options,
    UserOptions,
    default_options,
    parse_options,
    stack,
)
from ensemble.schema import ContextFeature, Feature, Schema, Sizes, Table, Task, schema_from_json

ITEMS = Table(
    (
        Feature("brand", "category", 0, 1, 1, 5),
        Feature("kind", "category", 1, 2, 6, 4),
        Feature("price", "number", 0, 1),
    )
)
CONTEXT = (
    ContextFeature("device", "category", ("phone", "7")),
    ContextFeature("hour", "number", (), True, 1.0, 0.5),
)
SCHEMA = Schema(
    "shop", ITEMS, Table(), (Task("ctr", "binary"), Task("dwell", "regression", "ctr", 0.1)), context=CONTEXT
)
DEEP = "[" * 100_000 + "]" * 100_000


def parse(num_users: int = 1, **parameters: Any) -> Options:
    return parse_options(json.dumps(parameters), num_users, SCHEMA)


BAD = [
    ({"top_k": 0}, "top_k: must be 1..100, got 0"),
    ({"top_k": -1}, "top_k: must be 1..100, got -1"),
    ({"top_k": 101}, "top_k: must be 1..100, got 101"),
    ({"top_k": 2**31}, "top_k: must be 1..100, got 2147483648"),
    ({"top_k": 2**70}, "top_k: must be 1..100, got 1180591620717411303424"),
    ({"top_k": 1.0}, "top_k: must be 1..100, got 1.0"),
    ({"top_k": True}, "top_k: must be 1..100, got true"),
    ({"top_k": "ten"}, "top_k: not JSON: Expecting value: line 1 column 1 (char 0)"),
    ({"top_k": '"3"'}, 'top_k: must be 1..100, got "3"'),
    ({"top_k": "[1, 2]"}, "top_k: 2 values for 1 users; give one value for all, or one each"),
    ({"top_k": "[]"}, "top_k: 0 values for 1 users; give one value for all, or one each"),
    ({"session_items": "u1"}, "session_items: not JSON: Expecting value: line 1 column 1 (char 0)"),
    ({"session_items": '{"a": 1}'}, 'session_items: must be a JSON array of item ids, got {"a": 1}'),
    ({"session_items": 7}, "session_items: must be a JSON array of item ids, got 7"),
    ({"session_items": json.dumps(["i"] * 10_000)}, "session_items: at most 1000 items, got 10000"),
    ({"session_items": '["a", 1.5]'}, "session_items: an id must be a string or an integer, got 1.5"),
    ({"session_items": '["a", ["b"]]'}, "session_items: an id must be a string or an integer, got ['b']"),
    ({"session_items": "[true]"}, "session_items: an id must be a string or an integer, got True"),
    ({"session_items": "[null]"}, "session_items: an id must be a string or an integer, got None"),
    ({"session_items": json.dumps(["é" * 65])}, "session_items: an id must have at most 128 bytes, got 130"),
    ({"session_items": f"[{'9' * 400}]"}, "session_items: an id must have at most 128 bytes, got 400"),
    ({"session_items": '["\\ud800"]'}, "session_items: an id must be valid UTF-8, got '\\ud800'"),
    ({"session_items": '["a\\u0000"]'}, "session_items: an id must hold no NUL byte"),
    (
        {"session_items": '[["a"], ["b"]]'},
        "session_items: 2 values for 1 users; give one value for all, or one each",
    ),
    ({"exclude_items": json.dumps(["i"] * 1001)}, "exclude_items: at most 1000 items, got 1001"),
    ({"exclude_seen": 1}, "exclude_seen: must be true or false, got 1"),
    ({"exclude_seen": "yes"}, "exclude_seen: not JSON: Expecting value: line 1 column 1 (char 0)"),
    ({"allow": '["brand"]'}, 'allow: must be a JSON object, got "brand"'),
    ({"allow": "3"}, "allow: must be a JSON object, got 3"),
    ({"allow": '{"colour": ["red"]}'}, 'allow: no item category "colour"; known: brand, kind'),
    ({"allow": '{"price": ["1"]}'}, 'allow: no item category "price"; known: brand, kind'),
    ({"deny": '{"brand": "x"}'}, "deny: 'brand' must be a JSON array of at most 1000 strings, got \"x\""),
    ({"deny": '{"brand": [1]}'}, "deny: 'brand' must be a JSON array of at most 1000 strings, got [1]"),
    (
        {"deny": json.dumps({"brand": ["x"] * 1001})},
        "deny: 'brand' must be a JSON array of at most 1000 strings, got ",
    ),
    ({"weights": "NaN"}, "weights: must be a JSON object, got NaN"),
    (
        {"weights": '{"ctr": NaN}'},
        "weights: the weight of 'ctr' must be a finite number, at most 1e6 in size, got NaN",
    ),
    (
        {"weights": '{"ctr": 1e999}'},
        "weights: the weight of 'ctr' must be a finite number, at most 1e6 in size, got Infinity",
    ),
    (
        {"weights": '{"ctr": "1"}'},
        "weights: the weight of 'ctr' must be a finite number, at most 1e6 in size, got \"1\"",
    ),
    (
        {"weights": f'{{"ctr": {"9" * 400}}}'},
        "weights: the weight of 'ctr' must be a finite number, at most 1e6 in size, got 999",
    ),
    (
        {"weights": '{"ctr": -1000001}'},
        "weights: the weight of 'ctr' must be a finite number, at most 1e6 in size, got -1000001",
    ),
    ({"weights": '{"buy": 1}'}, 'weights: no task "buy"; known: ctr, dwell, recall'),
    ({"caps": '{"brand": 0}'}, "caps: the cap of 'brand' must be a whole number from 1, got 0"),
    ({"caps": '{"brand": 1.5}'}, "caps: the cap of 'brand' must be a whole number from 1, got 1.5"),
    ({"caps": '{"price": 1}'}, 'caps: no item category "price"; known: brand, kind'),
    ({"diversity": 1.01}, "diversity: must be 0..1, got 1.01"),
    ({"diversity": -0.1}, "diversity: must be 0..1, got -0.1"),
    ({"diversity": "NaN"}, "diversity: must be 0..1, got NaN"),
    ({"diversity": "9" * 400}, "diversity: must be 0..1, got 999"),
    ({"diversity": "9" * 5000}, "diversity: not JSON: Exceeds the limit (4300 digits)"),
    ({"diversity": True}, "diversity: must be 0..1, got true"),
    ({"time": -1}, "time: must be Unix seconds, from 0 to below 4294967296, got -1"),
    ({"time": '"noon"'}, 'time: must be Unix seconds, from 0 to below 4294967296, got "noon"'),
    ({"context": '{"colour": "red"}'}, 'context: no context feature "colour"; known: device, hour'),
    ({"context": '{"device": true}'}, "context: 'device' is a category and wants a string, got true"),
    (
        {"context": '{"device": ["phone"]}'},
        "context: 'device' is a category and wants a string, got [\"phone\"]",
    ),
    ({"context": '{"hour": -1}'}, "context: 'hour' wants a finite number from 0, got -1"),
    ({"context": '{"hour": "noon"}'}, "context: 'hour' wants a finite number from 0, got \"noon\""),
    ({"context": '{"hour": NaN}'}, "context: 'hour' wants a finite number from 0, got NaN"),
    ({"context": '"phone"'}, 'context: must be a JSON object, got "phone"'),
    ({"diversity": None}, "diversity: must be 0..1, got null"),
    (
        {"num": 3},
        "num: unknown parameter; known: top_k, session_items, exclude_items, exclude_seen, allow, deny, "
        "ranges, weights, caps, diversity, time, context, like",
    ),
    ({"weights": DEEP}, "weights: not JSON: maximum recursion depth exceeded"),
    ({"session_items": DEEP}, "session_items: not JSON: maximum recursion depth exceeded"),
]
WITHOUT_LIMIT = ("got ", "(4300 digits)", "exceeded", "got 999")  # texts of which only the beginning is ours


@pytest.mark.parametrize(
    ("parameters", "text"), BAD, ids=[f"{n}-{next(iter(p))}" for n, (p, _) in enumerate(BAD)]
)
def test_a_bad_parameter_is_named_with_what_came(parameters, text):
    with pytest.raises(InvalidArgument) as caught:
        parse(**parameters)
    said = str(caught.value)
    assert said.startswith(text) if text.endswith(WITHOUT_LIMIT) else said == text
    assert "\n" not in said
    assert len(said) < 250


@pytest.mark.parametrize(
    "name", ["top_k", "session_items", "weights", "allow", "caps", "diversity", "exclude_seen"]
)
def test_whatever_is_nested_deeply_is_an_invalid_argument(name):
    for depth in range(900, 1000, 7):
        with pytest.raises(InvalidArgument, match=f"^{name}: "):
            parse(**{name: "[" * depth + "]" * depth})


@pytest.mark.parametrize("text", ["{", "[]", "1", '{"diversity":}', '"a"'])
def test_parameters_that_are_no_object_are_refused(text):
    with pytest.raises(InvalidArgument, match=r"^parameters: "):
        parse_options(text, 1, SCHEMA)


@given(
    st.dictionaries(
        st.sampled_from(
            [
                "top_k",
                "session_items",
                "exclude_items",
                "exclude_seen",
                "allow",
                "deny",
                "weights",
                "caps",
                "diversity",
            ]
        ),
        st.recursive(
            st.none()
            | st.booleans()
            | st.integers()
            | st.floats()
            | st.text(max_size=5)
            | st.sampled_from(["brand", "ctr", "[]", "{}"]),
            lambda inner: (
                st.lists(inner, max_size=4)
                | st.dictionaries(st.sampled_from(["brand", "kind", "ctr", "dwell"]), inner, max_size=3)
            ),
            max_leaves=6,
        ).map(lambda value: value if isinstance(value, (bool, int, float)) else json.dumps(value)),
        max_size=3,
    ),
    st.integers(1, 3),
)
def test_any_parameters_either_parse_or_are_an_invalid_argument(parameters, num_users):
    options, said = None, ""
    try:
        options = parse_options(json.dumps(parameters), num_users, SCHEMA)
    except InvalidArgument as error:
        said = str(error)
    if options is None:
        assert said.partition(":")[0] in parameters
    else:
        assert len(options) == num_users
        assert ((options.top_k >= 1) & (options.top_k <= 100)).all()


def test_nothing_asked_is_the_default():
    assert (
        parse_options("", 2, SCHEMA)
        == parse_options("{}", 2, SCHEMA)
        == parse_options("null", 2, SCHEMA)
        == default_options(2)
    )
    assert default_options(1).users == (UserOptions(),)


def test_tritons_own_parameters_may_travel_along():
    assert parse(timeout=1000, priority=1, sequence_id="a", top_k=3).users[0].top_k == 3


def test_a_string_holds_json_and_a_number_itself():
    assert parse(top_k=3) == parse(top_k="3")
    assert parse(diversity=0.5) == parse(diversity="0.5")
    assert parse(exclude_seen=False) == parse(exclude_seen="false")


def test_one_value_is_shared_and_a_list_is_one_each():
    shared = parse(3, top_k=5, session_items='["a", 7]', deny='{"brand": ["x"]}')
    assert shared.users == (shared.users[0],) * 3
    assert shared.users[0].session_items == (b"a", b"7")
    each = parse(
        3,
        top_k="[1, 2, 3]",
        session_items='[["a"], [], ["b", "c"]]',
        weights='[{"ctr": 2}, {}, {"dwell": -1}]',
    )
    assert each.top_k.tolist() == [1, 2, 3]
    assert [u.session_items for u in each.users] == [(b"a",), (), (b"b", b"c")]
    assert [dict(u.weights) for u in each.users] == [{"ctr": 2.0}, {}, {"dwell": -1.0}]


def test_one_value_each_must_be_as_many_as_users():
    for name, value in (
        ("top_k", "[1, 2]"),
        ("session_items", '[["a"], []]'),
        ("allow", "[{}, {}]"),
        ("exclude_seen", "[true, true]"),
    ):
        with pytest.raises(
            InvalidArgument, match=rf"^{name}: 2 values for 3 users; give one value for all, or one each$"
        ):
            parse(3, **{name: value})


def test_a_bad_value_of_one_user_is_found():
    with pytest.raises(InvalidArgument, match=r"^top_k: must be 1\.\.100, got 0$"):
        parse(3, top_k="[1, 0, 3]")


def test_limits_themselves_are_allowed():
    assert parse(top_k=100).top_k.tolist() == [100]
    assert len(parse(session_items=json.dumps(["i"] * 1000)).users[0].session_items) == 1000
    assert parse(session_items=json.dumps(["x" * 128])).users[0].session_items == (b"x" * 128,)
    assert parse(diversity=1).users[0].diversity == 1.0
    assert dict(parse(caps=f'{{"brand": {"9" * 400}}}').users[0].caps) == {"brand": 1 << 30}


def test_filters_are_equal_whatever_the_order_they_were_written_in():
    one = parse(allow='{"brand": ["b", "a"], "kind": ["x"]}').users[0].filter
    other = parse(allow='{"kind": ["x", "x"], "brand": ["a", "b"]}').users[0].filter
    assert one == other == Filter(allow=(("brand", ("a", "b")), ("kind", ("x",))))
    assert parse(allow="{}").users[0].filter is None


def test_lists_are_flat_with_their_owners():
    owners, ids = parse(3, session_items='[["a"], [], ["b", "cc"]]').ids("session_items")
    assert owners.tolist() == [0, 2, 2]
    assert ids.tolist() == [b"a", b"b", b"cc"]
    owners, ids = default_options(2).ids("exclude_items")
    assert len(owners) == len(ids) == 0


def test_stack_puts_requests_behind_each_other():
    assert stack([parse(2, top_k=3), parse(1, top_k=4)]).top_k.tolist() == [3, 3, 4]


def test_long_parameters_are_not_remembered():
    from ensemble.options import _parse

    _parse.cache_clear()
    parse(session_items=json.dumps(["i" * 100] * 900))
    assert _parse.cache_info().currsize == 0
    parse(top_k=7)
    assert _parse.cache_info().currsize == 1
    assert np.array_equal(parse(top_k=7).top_k, [7])


RANGE = "ranges: 'price' must be [least, greatest], finite numbers or null, got "
RANGES = {
    '{"weight": [1, 2]}': "ranges: no item number \"weight\"; known: price",
    '{"price": 5}': "ranges: 'price' must be [least, greatest], finite numbers or null, got 5",
    '{"price": [1, 2, 3]}': RANGE + "[1, 2, 3]",
    '{"price": ["1", 2]}': RANGE + '["1", 2]',
    '{"price": [3, 2]}': "ranges: 'price' has no number from 3 to 2",
}  # fmt: skip


@pytest.mark.parametrize(("ranges", "text"), RANGES.items())
def test_a_bad_range_is_named(ranges, text):
    with pytest.raises(InvalidArgument) as caught:
        parse_options(
            json.dumps({"ranges": ranges}),
            1,
            Schema("shop", Table((Feature("price", "number", 0, 1),)), Table(), (), Sizes()),
        )
    assert str(caught.value) == text


def test_a_range_may_be_open():
    schema = Schema(
        "shop",
        Table((Feature("price", "number", 0, 1), Feature("stock", "number", 1, 1))),
        Table(),
        (),
        Sizes(),
    )
    asked = parse_options('{"ranges": "{\\"stock\\": [1, null], \\"price\\": [null, 20]}"}', 1, schema).users[
        0
    ]
    assert asked.ranges == (("price", -math.inf, 20.0), ("stock", 1.0, math.inf))


def test_the_options_have_the_same_names_for_clients_and_server():
    assert OPTION_NAMES == tuple(_READERS) == tuple(field.name for field in dataclasses.fields(UserOptions))
    asked = parse(**{name: json.dumps(value) for name, value in NOTHING_ASKED.items()})
    assert asked.users[0].exclude_seen is True, "said, so that a search does it, too"
    unsaid = dataclasses.replace(asked.users[0], exclude_seen=None)
    assert Options((unsaid,)) == default_options(1)
    assert default_options(1).exclude_seen.tolist() == [True]
    assert default_options(1).of_search().exclude_seen.tolist() == [False]


def test_a_context_is_read_as_training_saw_it():
    options = parse(
        5,
        context=json.dumps(
            [{"device": "phone", "hour": 0}, {"device": 7, "hour": "0"}, {"device": "tv"}, {}, {"hour": None}]
        ),
    )
    np.testing.assert_array_equal(
        options.contexts(2), np.array([[1, -2], [2, -2], [0, np.nan], [np.nan] * 2, [np.nan] * 2], np.float32)
    )
    assert options.knows_context.tolist() == [True, True, False, True, True]
    assert parse(context='{"hour": 1e200}').contexts(2)[0, 1] == 10
    spread = context_state(SCHEMA, options.contexts(2))
    assert context_width(SCHEMA) == spread.shape[1] == 5
    assert spread.tolist() == [[0, 1, 0, 1, -2], [0, 0, 1, 1, -2], [1, 0, 0, 0, 0], [0] * 5, [0] * 5]
    assert schema_from_json(SCHEMA.to_json()) == SCHEMA


def test_a_release_without_a_context_takes_any_and_says_so():
    plain = dataclasses.replace(SCHEMA, context=())
    for text, wanted in (('{"device": "phone"}', Context((), False)), ("{}", NO_CONTEXT)):
        [user] = parse_options(json.dumps({"context": text}), 1, plain).users
        assert user.context == wanted
    assert default_options(3).contexts(0).shape == (3, 0)
    with pytest.raises(InvalidArgument, match="context: must be a JSON object, got 3"):
        parse_options('{"context": 3}', 1, plain)
