"""Keeps the lists that a release's own build gave to some held-out users, and holds answers against them.

Whoever is about to serve a release asks it about these users first: numbers must be finite, lists full and
sorted, scores not all alike, and all of it near what was written down.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ensemble.arrays import Array, Tensors
from ensemble.errors import ReleaseError

CANARY = "canary.json"
CANARY_USER = "peregrine-canary"  # nobody's id: the answer is a cold list, which no release may leave empty
MAX_USERS, TOP_K = 16, 10
_FORMAT = 2
_TENSORS = ("item_ids", "scores", "probabilities")


@dataclass(frozen=True)
class Nearness:
    """Says how near answers must be to the lists that were written down."""

    shared: float  # mean share of a list's items that must be found again
    score_error: float  # median difference of the scores of shared items, relative to the largest score


# The same engine on another CPU, or after another compiler
SAME_ENGINE = Nearness(0.8, 0.01)
# A plan of 8-bit weights may be off by a fifth of the largest score (builders/compile/stage.py: TOLERANCES),
# and lists change with it
ANY_ENGINE = Nearness(0.5, 0.25)


@dataclass(frozen=True)
class Canary:
    """Holds the users to ask about, and the list of each as the build's own pipeline gave it, best first."""

    top_k: int  # how many items were asked for
    user_ids: tuple[str, ...]
    item_ids: tuple[tuple[str, ...], ...]
    scores: tuple[tuple[float, ...], ...]
    time: int = 0  # Unix seconds at which the build asked: what a user did lately depends on it

    @property
    def options(self) -> dict[str, int]:
        """Gives what is asked of the users' lists, as a request's options."""
        return {"top_k": self.top_k, "time": self.time}

    def to_json(self) -> str:
        """Writes the content of canary.json."""
        return json.dumps({"format": _FORMAT, **dataclasses.asdict(self)}, indent=1) + "\n"

    def fault(self, answer: Mapping[str, Array], nearness: Nearness | None) -> str:
        """Names the first thing that is wrong with an answer, item_ids [B, K] and so on; empty: nothing is.

        Without `nearness` lists may be shorter and others, since items have changed since the build.
        """
        return (
            _shape_fault(answer, len(self.user_ids))
            or _number_fault(answer)
            or self._length_fault(answer, is_as_built=nearness is not None)
            or _order_fault(answer)
            or (self._distance(answer, nearness) if nearness else "")
        )

    def fault_of_search(self, answer: Mapping[str, Array]) -> str:
        """Names the first thing that is wrong with the lists of a search; empty: nothing is. They may be
        short or empty, as items change, and an item may be the only one that fits."""
        return (
            _shape_fault(answer, len(self.user_ids))
            or _number_fault(answer)
            or _order_fault(answer, may_be_constant=True)
        )

    def _length_fault(self, answer: Mapping[str, Array], *, is_as_built: bool) -> str:
        """Says whose list is shorter than the build's, or that most lists hardly have an item."""
        lengths = (answer["item_ids"] != b"").sum(axis=1)
        for user, length, known in zip(self.user_ids, lengths.tolist(), self.item_ids, strict=True):
            if is_as_built and length < len(known):
                return f"user {user!r} got {length} items; wanted {len(known)}, as in the build"
        usual, wanted = int(np.median(lengths)), min(self.top_k, 2 if is_as_built else 1)
        return f"a usual list has {usual} items; wanted at least {wanted}" if usual < wanted else ""

    def _distance(self, answer: Mapping[str, Array], nearness: Nearness) -> str:
        """Says how far the lists are from those that were written down, if they are too far."""
        shares, errors = [], []
        largest = max((abs(score) for scores in self.scores for score in scores), default=0.0)
        for ids, scores, known, known_scores in zip(
            answer["item_ids"].tolist(), answer["scores"].tolist(), self.item_ids, self.scores, strict=True
        ):
            found = dict(zip((item.decode() for item in ids), scores, strict=True))
            shared = [item for item in known if item in found]
            shares.append(len(shared) / max(1, len(known)))
            wanted = dict(zip(known, known_scores, strict=True))
            errors += [abs(found[item] - wanted[item]) for item in shared]
        share, error = float(np.mean(shares)), float(np.median(errors or [0.0])) / max(largest, 1e-9)
        if share < nearness.shared:
            return f"lists share {share:.0%} of their items with the build's; wanted {nearness.shared:.0%}"
        if error > nearness.score_error:
            return (
                f"scores are {error:.1%} of the largest away from the build's; wanted at most "
                f"{nearness.score_error:.0%}"
            )
        return ""


def canary_from_answer(top_k: int, user_ids: Sequence[str], answer: Tensors, time: int = 0) -> Canary:
    """Keeps what a pipeline answered these users when asked for K items at `time`: item_ids [B, K] S, scores
    [B, K]."""
    lengths = (answer["item_ids"] != b"").sum(axis=1).tolist()
    lists = zip(answer["item_ids"].tolist(), answer["scores"].tolist(), lengths, strict=True)
    items, scores = [], []
    for ids, of, length in lists:
        items.append(tuple(item.decode() for item in ids[:length]))
        scores.append(tuple(of[:length]))
    return Canary(top_k, tuple(user_ids), tuple(items), tuple(scores), time)


def read_canary(path: Path) -> Canary:
    """Reads a release's canary.json; ReleaseError if it is not there or none of ours."""
    try:
        facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if facts["format"] != _FORMAT:
            raise ValueError(f"format {facts['format']} is not {_FORMAT}")
        lists = [tuple(tuple(line) for line in facts[name]) for name in ("item_ids", "scores")]
        canary = Canary(int(facts["top_k"]), tuple(facts["user_ids"]), lists[0], lists[1], int(facts["time"]))
        if not 0 < len(canary.user_ids) == len(canary.item_ids) == len(canary.scores):
            raise ValueError("it has not one list for each user")
        return canary
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ReleaseError(
            f"cannot read {path}, the lists that the release is asked for before it is served: {error}",
            "build the release again",
        ) from error


def _shape_fault(answer: Mapping[str, Array], num_users: int) -> str:
    """Names the first tensor that is missing or has not [users, items, …]."""
    for name in _TENSORS:
        if name not in answer:
            return f"the answer has no tensor {name}"
    width = answer["item_ids"].shape[1:2]
    for name, axes in zip(_TENSORS, (2, 2, 3), strict=True):
        shape = answer[name].shape
        if len(shape) != axes or shape[:2] != (num_users, *width):
            return f"{name} is {list(shape)}; wanted {[num_users, *width, *['tasks'] * (axes - 2)]}"
    return ""


def _number_fault(answer: Mapping[str, Array]) -> str:
    """Says which numbers are not finite."""
    for name in ("scores", "probabilities"):
        bad = int(np.count_nonzero(~np.isfinite(answer[name])))
        if bad:
            return f"{bad} of {answer[name].size} {name} are not finite"
    return ""


def _order_fault(answer: Mapping[str, Array], *, may_be_constant: bool = False) -> str:
    """Says if ids are twice in a list or behind its end, scores are not sorted, or all alike in all lists."""
    given, scores = answer["item_ids"] != b"", answer["scores"]
    if (given[:, 1:] > given[:, :-1]).any():
        return "a list has items behind empty ids"
    for ids, present in zip(answer["item_ids"], given, strict=True):
        if len(set(ids[present].tolist())) < present.sum():
            return "a list has an item twice"
    both = given[:, 1:]
    if (scores[:, 1:] > scores[:, :-1])[both].any():
        return "a list is not sorted by its scores"
    if not may_be_constant and both.any() and (scores[:, 1:] == scores[:, :-1])[both].all():
        return "the scores of every list are constant"
    return ""
