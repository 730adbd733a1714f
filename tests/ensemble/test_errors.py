"""Errors: one text for people, and its two halves for programs."""

from __future__ import annotations

import pickle

from clients.errors import Overloaded
from ensemble.errors import InvalidArgument, InvalidInput, PeregrineError, ReleaseError


def test_an_error_reads_as_fact_and_cure():
    error = ReleaseError("release r1 was changed", "build it again")
    assert str(error) == "release r1 was changed; build it again"
    assert (error.fact, error.cure) == ("release r1 was changed", "build it again")


def test_an_error_without_a_cure_is_its_fact():
    error = InvalidArgument("top_k: must be 1..50, got 0; or was it")
    assert str(error) == error.fact == "top_k: must be 1..50, got 0; or was it"
    assert error.cure == ""
    assert isinstance(error, InvalidInput)
    assert isinstance(error, PeregrineError)


def test_an_error_of_a_call_has_a_fact_too():
    assert Overloaded("too much to do", "UNAVAILABLE").fact == "too much to do"


def test_an_error_comes_whole_out_of_another_process():
    error = pickle.loads(pickle.dumps(ReleaseError("wrong", "mend it")))
    assert (str(error), error.fact, error.cure) == ("wrong; mend it", "wrong", "mend it")
