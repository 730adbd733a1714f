"""`python -m clients.bench.faults`: a real tritonserver and a real redis-server, harmed for a moment each
way; and what it makes of answers."""

from __future__ import annotations

import json

import pytest

from clients.bench import faults as bench_faults
from clients.bench.faults import is_right, main, misses, recovery
from clients.results import Item, Recommendations
from ensemble.contract import Degraded

STALE, MISSING = Degraded.FEATURES_STALE, Degraded.FEATURES_MISSING


@pytest.mark.long  # tests/ensemble/tiers/test_faults.py has each fault; this has them all under load
@pytest.mark.redis
@pytest.mark.triton
@pytest.mark.timeout(300)
def test_no_fault_fails_a_request_or_spoils_a_list(tiny_repository, tmp_path, capsys):
    """The deadline is wide, as in test_served.py: what is asked here is whether answers are right, not how
    fast a busy machine is."""
    given = [
        "--repository",
        str(tiny_repository),
        "--seconds",
        "0.8",
        "--rate",
        "30",
        "--deadline-ms",
        "100",
        "--soft-ttl-s",
        "0.3",
    ]
    before = {path.name for path in tiny_repository.parent.iterdir()}
    main([*given, "--faults", "killed,resets,stampede", "--json", str(tmp_path / "faults.json")])
    rows = {row["fault"]: row for row in json.loads((tmp_path / "faults.json").read_text())["rows"]}
    assert list(rows) == ["killed", "resets", "stampede"]
    for row in rows.values():
        assert (row["failed"], row["wrong"]) == (0, 0), row
        assert row["sent"] > 60
    for name in ("killed", "resets"):
        assert rows[name]["stale_during"] > 5, "the fault was felt"
    assert rows["stampede"]["sent"] == 1500
    assert rows["stampede"]["reads"] <= 4, (
        "one for each of the step's two processes, and now and then one for an item that was pushed out"
    )
    assert {path.name for path in tiny_repository.parent.iterdir()} == before, "nothing is left"
    table = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in table[:5]] == [
        "| fault",
        "| ---",
        "| killed",
        "| resets",
        "| stampede",
    ]


@pytest.mark.parametrize(
    ("given", "words"),
    [(["--faults", "frozen,fire"], "there is no 'fire'"), (["--repository", "nowhere/else"], "nowhere")],
)
def test_what_cannot_be_done_is_said_in_one_line(given, words, capsys):
    with pytest.raises(SystemExit) as end:
        main(given)
    assert end.value.code == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert words in said[0]


def answer(*scored: tuple[str, float], degraded: int = 0) -> Recommendations:
    return Recommendations(
        "u1", tuple(Item(item, score, {}) for item, score in scored), Degraded(degraded), "r1", 1.0
    )


def test_a_list_is_right_up_to_ties_and_flags_of_rows(monkeypatch):
    monkeypatch.setattr(bench_faults, "_TOP_K", 2)
    healthy = answer(("a", 0.9), ("b", 0.5), ("c", 0.5), ("d", 0.1))
    assert is_right(answer(("a", 0.9), ("b", 0.5)), healthy)
    assert is_right(answer(("a", 0.9), ("c", 0.50001), degraded=STALE | MISSING), healthy), (
        "c is as good as b"
    )
    wrong = [
        answer(("a", 0.9), ("d", 0.5)),
        answer(("b", 0.5), ("a", 0.9)),
        answer(("a", 0.9), ("x", 0.5)),
        answer(("a", 0.9), ("a", 0.9)),
        answer(("a", 0.9)),
        answer(("a", 0.8), ("b", 0.5)),
        answer(("a", 0.9), ("b", 0.5), degraded=Degraded.UNKNOWN_USER),
    ]
    assert not any(is_right(one, healthy) for one in wrong)


def test_recovery_ends_with_ten_clean_answers_in_a_row():
    clean = [(0.1 * n, False) for n in range(1, 20)]
    assert recovery([]) == recovery(clean) == {"recovery_s": 0.0, "last_flagged_s": 0.0}
    late = [(0.01, True), (0.02, False), (0.03, True), *clean, (3.0, True), (3.1, False)]
    assert recovery(late) == {"recovery_s": 0.03, "last_flagged_s": 3.0}
    assert recovery([(0.2, True), (0.4, True)])["recovery_s"] == 0.4


def test_targets():
    row = {
        "fault": "frozen",
        "failed": 0,
        "wrong": 0,
        "p99_ms_before": 10.0,
        "p99_ms_during": 34.0,
        "recovery_s": 0.4,
    }
    assert misses(row) == []
    assert misses({**row, "failed": 2, "wrong": 1, "p99_ms_during": 36.0, "recovery_s": 0.6}) == [
        "failed 2",
        "wrong 1",
        "p99 +26 ms",
        "recovery 0.6 s",
    ]
    assert misses({**row, "fault": "killed", "recovery_s": 0.6}) == [], "there the rows had to be loaded"
