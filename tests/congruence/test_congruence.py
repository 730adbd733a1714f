"""One question, one answer, whoever is asked: the twin one user at a time is the reference; every other way
must agree.

Tolerance: scores and probabilities within 1e-5 (fp32, sums in another order); on a GPU 5e-3 (fp32 runs on
TF32 there, with 10 bits). Ids are equal, except where two scores are nearer than that: such neighbours may
change places (or the last one fall out), and so may the Nth candidate of recall.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from asking import Request, TritonAsker, parameters_of

from ensemble.arrays import Tensors
from ensemble.local import LocalPipeline
from ensemble.options import default_options

TOLERANCE = 1e-5
# Of a GPU's engines; and how many lists may differ by recall's Nth candidate, since more of them are near
# ties.
GPU_TOLERANCE, GPU_SHARE, CPU_SHARE = 5e-3, 1 / 20, 1 / 200
USERS = 1000
# of the requests: every batch size at least once
SIZES = (
    *range(1, 65),
    64,
    64,
    32,
    16,
    8,
    4,
    2,
    *(1,) * 30,
)
AskAll = Callable[[list[Request]], list[Tensors]]


@dataclass(frozen=True)
class Question:
    """A user of the shop and what is asked for it."""

    user_id: bytes
    options: dict[str, Any]


def questions_of(twin: LocalPipeline, count: int, seed: int) -> list[Question]:
    """Known and unknown users; half of them with a session, the others' options each another mixture."""
    rng = np.random.default_rng(seed)
    users, items = twin.release.user_ids.sorted_ids, twin.release.item_ids.sorted_ids
    values = twin.release.vocabularies["items"]
    tasks = [task.name for task in twin.release.schema.tasks]
    asked = []
    for n in range(count):
        options = {
            name: make(rng, items, values, tasks) for name, make in MAKERS.items() if rng.random() < 0.25
        }
        options |= {"session_items": _items(rng, items, 6)} if n % 2 else {}
        asked.append(
            Question(b"nobody" if rng.random() < 0.03 else bytes(users[n % min(USERS, len(users))]), options)
        )
    return asked


def _items(rng: np.random.Generator, items: np.ndarray, most: int) -> list[str]:
    return [i.decode() for i in rng.choice(items, rng.integers(0, most + 1))] + ["no such item"] * int(
        rng.random() < 0.1
    )


def _values(rng: np.random.Generator, values: dict[str, list[str]]) -> dict[str, list[str]]:
    name = rng.choice(sorted(values))
    return {str(name): [str(v) for v in rng.choice(values[name], min(len(values[name]), 3), replace=False)]}


MAKERS: dict[str, Callable[..., Any]] = {
    "top_k": lambda rng, items, values, tasks: int(rng.integers(1, 51)),
    "exclude_items": lambda rng, items, values, tasks: _items(rng, items, 30),
    "exclude_seen": lambda rng, items, values, tasks: bool(rng.random() < 0.5),
    "allow": lambda rng, items, values, tasks: _values(rng, values),
    "deny": lambda rng, items, values, tasks: _values(rng, values),
    "weights": lambda rng, items, values, tasks: {
        str(rng.choice(tasks)): round(float(rng.normal(1, 0.5)), 3)
    },
    "caps": lambda rng, items, values, tasks: {str(rng.choice(sorted(values))): int(rng.integers(1, 4))},
    "diversity": lambda rng, items, values, tasks: round(float(rng.random() * 0.8), 3),
    "context": lambda rng, items, values, tasks: {
        "device": str(rng.choice(["phone", "desktop", "tv"])),
        "hour": int(rng.integers(0, 24)) if rng.random() < 0.5 else None,
    },
}


def requests_of(questions: list[Question], sizes: tuple[int, ...]) -> list[Request]:
    """The questions in order, several to a request, each with its own value of every option."""
    requests, start = [], 0
    for size in sizes:
        part = [questions[place % len(questions)] for place in range(start, start + size)]
        requests.append(([q.user_id for q in part], parameters_of([q.options for q in part])))
        start += size
    return requests


class Reference:
    """What the twin answers to each question alone, computed once."""

    def __init__(self, twin: LocalPipeline, questions: list[Question]) -> None:
        self.twin, self.questions = twin, questions
        self.answers = [twin.recommend([q.user_id], parameters_of([q.options])) for q in questions]

    def candidates(self, question: Question) -> tuple[np.ndarray, np.ndarray]:
        """(rows of recall's candidates [N], its score of every item [I + 1]), to tell whether the Nth was a
        near tie."""
        from ensemble.options import parse_options

        options = parse_options(json.dumps(parameters_of([question.options])), 1, self.twin.release.schema)
        known: Tensors = {"user_id": np.array([[question.user_id]])}
        for name in ("features", "user_encoder", "recall"):
            model = self.twin.spec.model(name)
            known |= self.twin.steps[name].run(options, **{t.name: known[t.name] for t in model.inputs})
        scores = (self.twin.release.items["embedding"] @ known["user_embeddings"][0].T).max(axis=1)
        return known["candidate_rows"][0], scores


def check(
    reference: Reference, requests: list[Request], answers: list[Tensors], tolerance: float = TOLERANCE
) -> None:
    """Every user of every request against the reference; few may differ by recall's Nth candidate."""
    place, by_nth, told = 0, 0, []
    for (users, _), answer in zip(requests, answers, strict=True):
        widest = 0
        for row in range(len(users)):
            question = reference.questions[place % len(reference.questions)]
            wanted = {
                name: array[0] for name, array in reference.answers[place % len(reference.questions)].items()
            }
            found = {name: array[row] for name, array in answer.items()}
            widest = max(widest, len(wanted["item_ids"]))
            problem = difference(wanted, found, tolerance)
            if problem and is_nth_candidate(reference, question, wanted, found, tolerance):
                by_nth += 1
            elif problem:
                told.append(
                    f"user {question.user_id!r} of a request of {len(users)}, {question.options}: {problem}"
                )
            place += 1
        assert answer["item_ids"].shape == (len(users), widest)
    assert not told, f"{len(told)} of {place} users differ, the first: {told[0]}"
    share = CPU_SHARE if tolerance == TOLERANCE else GPU_SHARE
    assert by_nth <= place * share, f"{by_nth} of {place} lists differ by the Nth candidate"


def difference(wanted: Tensors, found: Tensors, tolerance: float = TOLERANCE) -> str:
    """What is not the same in two answers for one user; empty when nothing is."""
    shown = int((wanted["item_ids"] != b"").sum())
    if int((found["item_ids"] != b"").sum()) != shown:
        return f"{(found['item_ids'] != b'').sum()} items instead of {shown}"
    for name in ("degraded", "release"):
        if wanted[name].tolist() != found[name].tolist():
            return f"{name} {found[name]} instead of {wanted[name]}"
    if found["scores"][shown:].any() or found["probabilities"][shown:].any():
        return "padding is not 0"
    if not np.allclose(found["scores"][:shown], wanted["scores"][:shown], rtol=0, atol=tolerance):
        return f"scores differ by {np.abs(found['scores'][:shown] - wanted['scores'][:shown]).max():.1e}"
    ids, their_ids = wanted["item_ids"][:shown].tolist(), found["item_ids"][:shown].tolist()
    if sorted(ids) != sorted(their_ids) and sorted(ids[:-1]) != sorted(their_ids[:-1]):
        return f"items {sorted(set(their_ids) - set(ids))} instead of {sorted(set(ids) - set(their_ids))}"
    values = dict(zip(ids, wanted["probabilities"], strict=False))
    for item, value, score in zip(their_ids, found["probabilities"], found["scores"], strict=False):
        if item not in values:
            continue  # the last one, with another's score: that was compared above
        if np.abs(values[item] - value).max() > tolerance:
            return f"probabilities of {item!r}: {value} instead of {values[item]}"
        if abs(wanted["scores"][ids.index(item)] - score) > tolerance:
            return f"{item!r} has place {their_ids.index(item)} instead of {ids.index(item)}"
    return ""


def is_nth_candidate(
    reference: Reference, question: Question, wanted: Tensors, found: Tensors, tolerance: float
) -> bool:
    """True when an item is there for another that recall likes as well, to within the tolerance."""
    rows, scores = reference.candidates(question)
    ids = reference.twin.release.item_ids
    extra = [
        int(ids.rows_from_ids(np.array([i]))[0])
        for i in set(found["item_ids"].tolist()) - set(wanted["item_ids"].tolist())
    ]
    outside = [row for row in extra if row not in rows]
    inside = (
        [row for row in range(1, len(scores)) if row not in rows]
        if not outside
        else [int(row) for row in rows if row > 0]
    )
    tested = outside or [int(row) for row in rows if row > 0]
    return any(
        abs(scores[row] - scores[other]) < tolerance for row in tested for other in inside if row != other
    )


@pytest.fixture(scope="module")
def beauty(sequences_twin: LocalPipeline) -> Reference:
    return Reference(sequences_twin, questions_of(sequences_twin, USERS, seed=1))


@pytest.fixture(scope="module")
def labelled(twin: LocalPipeline) -> Reference:
    return Reference(twin, questions_of(twin, 200, seed=2))


def ask_twin(pipeline: LocalPipeline) -> AskAll:
    return lambda requests: [pipeline.recommend(*request) for request in requests]


@pytest.fixture(
    params=[
        "twin",
        pytest.param("triton cpu", marks=pytest.mark.triton),
        pytest.param("triton cpu fused", marks=pytest.mark.triton),
        pytest.param("triton gpu", marks=[pytest.mark.triton, pytest.mark.gpu]),
    ]
)
def implementation(request: pytest.FixtureRequest) -> str:
    return request.param


SUFFIXES = {"triton cpu": "", "triton cpu fused": "_fused", "triton gpu": "_gpu"}  # of the server's fixture


@pytest.fixture
def tolerance(implementation: str) -> float:
    return GPU_TOLERANCE if "gpu" in implementation else TOLERANCE


def asker_of(
    request: pytest.FixtureRequest, implementation: str, server: str, pipeline: LocalPipeline
) -> Iterator[AskAll]:
    if implementation == "twin":
        yield ask_twin(pipeline)
        return
    asker = TritonAsker(request.getfixturevalue(f"{server}{SUFFIXES[implementation]}").url)
    yield asker.ask_all
    asker.close()


@pytest.fixture
def ask_beauty(
    request: pytest.FixtureRequest, implementation: str, sequences_twin: LocalPipeline
) -> Iterator[AskAll]:
    yield from asker_of(request, implementation, "sequences_server", sequences_twin)


@pytest.fixture
def ask_labelled(
    request: pytest.FixtureRequest, implementation: str, twin: LocalPipeline
) -> Iterator[AskAll]:
    yield from asker_of(request, implementation, "tiny_server", twin)


def test_a_shop_like_beauty_in_batches_of_1_to_64(beauty, ask_beauty, tolerance):
    requests = requests_of(beauty.questions, SIZES)
    check(beauty, requests, ask_beauty(requests), tolerance)


def test_a_shop_with_tasks_and_user_features(labelled, ask_labelled, tolerance):
    requests = requests_of(labelled.questions, (1, 2, 3, 64, 30, 7, 1, 1, 1, 60, 30))
    check(labelled, requests, ask_labelled(requests), tolerance)


def test_one_user_a_request_with_options_that_all_differ(beauty, ask_beauty, tolerance):
    """Sixteen in flight: Triton makes batches of requests that share nothing."""
    requests = requests_of(beauty.questions, (1,) * 400)
    check(beauty, requests, ask_beauty(requests), tolerance)


def test_nothing_here_is_skipped_but_for_what_a_machine_lacks():
    """A skip in this file would hide one implementation everywhere; conftest's marks say what is missing."""
    text = Path(__file__).read_text(encoding="utf-8")
    assert text.count("pytest." + "skip") == 0
    assert all(
        f"def tiny_server{suffix}(" in (Path(__file__).parent / "conftest.py").read_text()
        for suffix in SUFFIXES.values()
    )


def test_lists_are_worth_comparing(beauty):
    """Else all of the above could pass on empty or constant answers."""
    plain = [answer for q, answer in zip(beauty.questions, beauty.answers, strict=True) if not q.options]
    assert len(plain) > 20
    assert all((answer["item_ids"] != b"").all() for answer in plain)
    assert len({tuple(answer["item_ids"][0].tolist()) for answer in plain}) > len(plain) / 2
    spread = np.array([np.ptp(answer["scores"]) for answer in plain])
    assert np.median(spread) > 1000 * TOLERANCE, "scores spread far wider than the tolerance"


# --- what is padded does not count


def padded_feeds(pipeline: LocalPipeline) -> Tensors:
    """All tensors up to the ranker's, for users with short histories."""
    users = pipeline.release.user_ids.sorted_ids[:32]
    known: Tensors = {"user_id": users[:, None]}
    for name in ("features", "user_encoder", "recall"):
        known |= pipeline.steps[name].run(
            default_options(32), **{t.name: known[t.name] for t in pipeline.spec.model(name).inputs}
        )
    assert not known["history_mask"].all(axis=1).any() or not known["history_mask"].all()
    return known


@pytest.mark.parametrize(
    ("model", "history"), [("user_encoder", "history_embeddings"), ("ranker", "history_features")]
)
def test_what_stands_under_the_history_mask_does_not_change_the_scores(twin, sequences_twin, model, history):
    for pipeline in (twin, sequences_twin):
        feeds = padded_feeds(pipeline)
        dirty = np.where(feeds["history_mask"][:, :, None], feeds[history], np.float32(7.5))
        assert (dirty != feeds[history]).any()
        step, names = pipeline.steps[model], [t.name for t in pipeline.spec.model(model).inputs]
        clean_out, dirty_out = (
            step.run(default_options(32), **{n: ({**feeds, **change})[n] for n in names})
            for change in ({}, {history: dirty})
        )
        for name in clean_out:
            np.testing.assert_allclose(dirty_out[name], clean_out[name], rtol=0, atol=TOLERANCE)


def test_fewer_candidates_beside_padding_have_the_same_probabilities(twin, sequences_twin):
    for pipeline in (twin, sequences_twin):
        feeds = padded_feeds(pipeline)
        names = [t.name for t in pipeline.spec.model("ranker").inputs]
        whole = pipeline.steps["ranker"].run(default_options(32), **{n: feeds[n] for n in names})[
            "candidate_probabilities"
        ]
        blanked = {
            n: np.where(np.arange(64)[None, :, None] < 20, feeds[n], 0).astype(np.float32)
            for n in names
            if n.startswith("candidate_")
        }
        padded = pipeline.steps["ranker"].run(
            default_options(32), **{n: {**feeds, **blanked}[n] for n in names}
        )["candidate_probabilities"]
        np.testing.assert_allclose(padded[:, :20], whole[:, :20], rtol=0, atol=TOLERANCE)
        assert np.isfinite(padded).all()
