"""The one rule of ids: what each kind of value becomes, and what each fault is called."""

from __future__ import annotations

import numpy as np
import pytest

from ensemble.errors import InvalidArgument
from ensemble.id_rule import encode_id, encode_ids, id_fault, recorded_id

FAULTS = {
    b"": "an id must not be empty",
    b"x" * 129: "an id must have at most 128 bytes, got 129",
    b"a\0b": "an id must hold no NUL byte",
    b"a\0": "an id must hold no NUL byte",
}


@pytest.mark.parametrize(
    ("value", "encoded"),
    [("é", "é".encode()), (7, b"7"), (np.int64(-7), b"-7"), (b"raw", b"raw"), ("x" * 128, b"x" * 128)],
)
def test_ids_become_bytes(value, encoded):
    assert encode_id("user_id", value) == encoded
    assert id_fault(encoded) == ""


@pytest.mark.parametrize(("encoded", "fault"), FAULTS.items(), ids=["empty", "long", "NUL", "NUL-at-end"])
def test_each_fault_has_one_wording(encoded, fault):
    assert id_fault(encoded) == fault
    for value in (encoded, encoded.decode()):
        with pytest.raises(InvalidArgument, match=f"^item_id: {fault}$"):
            encode_id("item_id", value)


@pytest.mark.parametrize("value", [None, True, 1.5, ["a"], {"a": 1}])
def test_what_is_neither_text_nor_whole_number_is_refused(value):
    with pytest.raises(InvalidArgument, match=r"^f: an id must be a string or an integer, got "):
        encode_id("f", value)


@pytest.mark.parametrize("value", ["\ud800", b"\xff", b"ok\xc3"])
def test_what_is_not_utf8_is_refused(value):
    with pytest.raises(InvalidArgument, match=r"^f: an id must be valid UTF-8, got "):
        encode_id("f", value)


def test_a_request_may_name_nobody():
    assert encode_id("user_id", "", may_be_empty=True) == b""
    assert encode_ids("user_id", [b"", b"u1"]).tolist() == [b"", b"u1"]
    assert encode_ids("user_id", []).tolist() == []


@pytest.mark.parametrize("wrong", [b"x" * 129, b"a\0", b"\xc3", b"\xa9"])
def test_a_batch_of_ids_is_held_to_the_same_rule(wrong):
    """Two ids that are no UTF-8 alone, but would be side by side, are refused too."""
    with pytest.raises(InvalidArgument) as alone:
        encode_id("user_id", wrong, may_be_empty=True)
    for ids in ([wrong], [b"u1", wrong, b"u2"], [b"\xc3", b"\xa9"] if wrong == b"\xc3" else [wrong, wrong]):
        with pytest.raises(InvalidArgument) as caught:
            encode_ids("user_id", ids)
        assert str(caught.value) == str(alone.value)


def test_recorded_ids_are_mended_as_those_of_files_are():
    mended = [recorded_id("f", one) for one in (" u1\t", b" u1 ", 7.0, np.float32(7), 7, "7.0")]
    assert mended == [b"u1", b"u1", b"7", b"7", b"7", b"7.0"]
    for word in ("nan", " NULL ", "None", b"null", float("nan")):
        with pytest.raises(InvalidArgument, match=r"^f: the id is missing, got "):
            recorded_id("f", word)
    for wrong in (None, 1.5, True, " ", float("inf"), 2.0**60):
        with pytest.raises(InvalidArgument, match=r"^f: an id must "):
            recorded_id("f", wrong)
