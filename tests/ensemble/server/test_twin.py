"""A release that gives nonsense, hangs or takes too much is refused in a process of its own."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path

import numpy as np
import pytest
import variants
from shops import private_copy

from clients.operations import releases
from ensemble.errors import ReleaseError
from ensemble.release.canary import CANARY, read_canary
from ensemble.release.release import active_release, open_release
from ensemble.server.twin import ask_twin, limits_of


@pytest.fixture(scope="module")
def repository(tiny_repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return private_copy(tiny_repository, tmp_path_factory.mktemp("twin") / "repository")


def publish(repository: Path, name: str, scratch: Path, change: variants.Change) -> None:
    if not (repository / name).exists():
        variants.publish_variant(repository, "r1", name, scratch, change)


def test_the_build_wrote_down_what_the_release_answers(repository):
    release = open_release(repository, "r1")
    canary = read_canary(release.path / CANARY)
    assert (len(canary.user_ids), canary.top_k) == (16, 10)
    assert {len(ids) for ids in canary.item_ids} == {10}
    known = release.user_ids.rows_from_ids(np.array([user.encode() for user in canary.user_ids])) > 0
    assert known.tolist() == [True] * 15 + [False]
    ask_twin(release)


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (variants.gives_nan, "(scores are not finite|the scores of every list are constant)$"),
        # where recall's relevance is a factor, constant probabilities leave recall's order
        (
            variants.gives_constants,
            r"(the scores of every list are constant|lists share \d+% .* wanted 80%)$",
        ),
        (variants.gives_the_reverse, r"lists share \d+% of their items with the build's; wanted 80%$"),
        (
            variants.gives_another_shape,
            r"it said: .*/model\.onnx: the model gives candidate_probabilities as",
        ),
        (variants.never_ends, "it did not answer within 2 s$"),
        (variants.takes_much_memory, "([Aa]lloc|memory)"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_release_that_answers_nonsense_or_not_at_all_is_refused(repository, tmp_path, edit, said):
    name = edit.__name__.replace("_", "-")
    publish(repository, name, tmp_path, variants.ranker(edit))
    release, started = open_release(repository, name), time.monotonic()
    release.verify()
    limits = limits_of(release)
    with pytest.raises(ReleaseError, match=rf"^asked in a process of its own: .*{said}"):
        ask_twin(release, dataclasses.replace(limits, ask_s=2.0))
    assert time.monotonic() - started < 20


def test_time_is_limited_by_the_clock_and_by_the_core(repository, tmp_path):
    release = open_release(repository, "r1")
    with pytest.raises(ReleaseError, match="it was not open within 0 s"):
        ask_twin(release, dataclasses.replace(limits_of(release), open_s=0.01))
    publish(repository, "never-ends", tmp_path, variants.ranker(variants.never_ends))
    release = open_release(repository, "never-ends")
    with pytest.raises(ReleaseError, match="it took more time of a core than a release of its size may"):
        ask_twin(release, dataclasses.replace(limits_of(release), ask_s=60.0, cpu_s=2.0))


def test_lists_that_are_not_those_of_the_build_are_refused(repository, tmp_path):
    def exchange(own: Path, members: dict[str, Path]) -> None:
        facts = json.loads((own / CANARY).read_text())
        facts["scores"] = [[2 * score for score in scores] for scores in facts["scores"]]
        (own / CANARY).write_text(json.dumps(facts))

    publish(repository, "twice", tmp_path, exchange)
    with pytest.raises(ReleaseError, match=r"scores are \d+\.\d% of the largest away from the build's"):
        ask_twin(open_release(repository, "twice"))


def test_a_release_without_lists_is_refused(repository, tmp_path):
    publish(repository, "silent", tmp_path, lambda own, members: (own / CANARY).unlink())
    with pytest.raises(ReleaseError, match=r"r?silent/canary\.json"):
        ask_twin(open_release(repository, "silent"))


def test_what_is_refused_stays_out_where_no_server_runs(repository, tmp_path):
    publish(repository, "gives-nan", tmp_path, variants.ranker(variants.gives_nan))
    with pytest.raises(ReleaseError) as caught:
        releases.activate(repository, "gives-nan")
    assert str(caught.value).startswith("release gives-nan is not activated, r1 goes on: asked in a process")
    assert active_release(repository) == "r1"
    publish(repository, "r2", tmp_path, lambda own, members: None)
    started = time.monotonic()
    done = releases.activate(repository, "r2")
    assert (done.previous, done.notes, active_release(repository)) == ("r1", (), "r2")
    assert time.monotonic() - started < 10
    releases.activate(repository, "r1")
