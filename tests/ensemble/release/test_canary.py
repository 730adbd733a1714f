"""What is wrong with lists is named; what is only a little different is not."""

from __future__ import annotations

import numpy as np
import pytest

from ensemble.errors import ReleaseError
from ensemble.release.canary import ANY_ENGINE, SAME_ENGINE, canary_from_answer, read_canary

USERS = ("a", "b", "c")


def answer(num_items: int = 5) -> dict[str, np.ndarray]:
    """Three users' lists of ten places, the last of them empty."""
    ids = np.full((3, 10), b"", "S4")
    scores, probabilities = np.zeros((3, 10), np.float32), np.zeros((3, 10, 2), np.float32)
    for user in range(3):
        ids[user, :num_items] = [f"i{user}{place}".encode() for place in range(num_items)]
        scores[user, :num_items] = np.linspace(0.9, 0.1, num_items)
    return {"item_ids": ids, "scores": scores, "probabilities": probabilities}


CANARY = canary_from_answer(10, USERS, answer())


def changed(name: str, place: object, value: object) -> dict[str, np.ndarray]:
    found = answer()
    found[name][place] = value
    return found


def test_the_same_lists_pass_and_survive_being_written(tmp_path):
    (tmp_path / "canary.json").write_text(CANARY.to_json())
    assert read_canary(tmp_path / "canary.json") == CANARY
    assert CANARY.fault(answer(), SAME_ENGINE) == ""
    assert CANARY.fault(changed("scores", (0, 0), 0.93), SAME_ENGINE) == ""


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (changed("scores", (1, 1), np.nan), "1 of 30 scores are not finite"),
        (changed("probabilities", 2, np.inf), "20 of 60 probabilities are not finite"),
        (changed("scores", ..., 0.5), "the scores of every list are constant"),
        (changed("scores", (2, 4), 0.8), "a list is not sorted by its scores"),
        (changed("item_ids", (0, 1), b"i00"), "a list has an item twice"),
        (changed("item_ids", (0, 4), b""), "user 'a' got 4 items; wanted 5, as in the build"),
        (changed("item_ids", (0, slice(1)), b""), "user 'a' got 4 items; wanted 5, as in the build"),
        (changed("item_ids", (0, slice(4, 6)), [b"", b"i09"]), "a list has items behind empty ids"),
        (changed("item_ids", slice(0, 3), b"else"), "a list has an item twice"),
        ({**answer(), "scores": answer()["scores"][:, :3]}, "scores is [3, 3]; wanted [3, 10]"),
        ({**answer(), "scores": np.zeros(3)}, "scores is [3]; wanted [3, 10]"),
        ({**answer(), "item_ids": np.zeros((2, 3), "S1")}, "item_ids is [2, 3]; wanted [3, 3]"),
        (
            {**answer(), "probabilities": np.zeros((3, 10))},
            "probabilities is [3, 10]; wanted [3, 10, 'tasks']",
        ),
        ({"item_ids": answer()["item_ids"]}, "the answer has no tensor scores"),
        (answer(num_items=3), "user 'a' got 3 items; wanted 5, as in the build"),
    ],
)
def test_the_first_fault_is_named(found, said):
    assert CANARY.fault(found, SAME_ENGINE) == said


def test_lists_of_one_item_are_no_lists_even_if_the_build_gave_them():
    one = answer(num_items=1)
    canary = canary_from_answer(10, USERS, one)
    assert canary.fault(one, SAME_ENGINE) == "a usual list has 1 items; wanted at least 2"
    assert canary_from_answer(1, USERS, one).fault(one, SAME_ENGINE) == "", "no more was asked for"


def test_near_is_wider_for_other_engines_and_nothing_where_items_have_changed():
    found = answer()
    found["item_ids"][:, 3:5] = [b"new1", b"new2"]
    found["scores"] += 0.1
    assert CANARY.fault(found, SAME_ENGINE) == "lists share 60% of their items with the build's; wanted 80%"
    assert CANARY.fault(found, ANY_ENGINE) == ""
    found["item_ids"][:, :3] = [b"n3", b"n4", b"n5"]
    assert CANARY.fault(found, ANY_ENGINE) == "lists share 0% of their items with the build's; wanted 50%"
    assert CANARY.fault(found, None) == ""
    assert CANARY.fault(answer(num_items=1), None) == "", "most items may have been deleted since"
    assert CANARY.fault(answer(num_items=0), None) == "a usual list has 0 items; wanted at least 1"
    found = answer()
    found["scores"] *= 0.5
    assert CANARY.fault(found, ANY_ENGINE) == (
        "scores are 27.8% of the largest away from the build's; wanted at most 25%"
    )


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"format": 2}', CANARY.to_json().replace('"a"', '"a", "d"')]
)
def test_a_file_that_is_none_of_ours_is_refused(tmp_path, text):
    (tmp_path / "canary.json").write_text(text)
    with pytest.raises(
        ReleaseError, match=r"cannot read .*canary\.json, the lists .*; build the release again"
    ):
        read_canary(tmp_path / "canary.json")
