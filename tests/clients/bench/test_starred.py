"""The faults that must not be felt, run against a real server; and how their figures become a verdict."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from clients.bench.starred.__main__ import TESTS, main
from clients.bench.starred.load import Bench
from clients.bench.starred.verdict import misses, table, worst
from clients.results import Item, Recommendations
from ensemble.contract import Degraded

LIST = Recommendations("u", (Item("a", 2.0, {}), Item("b", 1.0, {})), Degraded(0), "r1", 1.0)


def row(*notes: tuple) -> dict:  # type: ignore[type-arg]
    bench = Bench(1.0, ["u"], healthy={"r1": {"u": LIST}})
    return bench.row("stub", list(notes), 10.0)


def test_what_came_is_counted_and_judged() -> None:
    other = Recommendations("u", LIST.items[::-1], Degraded(0), "r1", 1.0)
    popular = Recommendations("u", LIST.items[1:], Degraded.POPULAR, "r1", 1.0)
    empty = Recommendations("u", (), Degraded.POPULAR, "r1", 1.0)
    good = row((9.0, 9.1, "u", LIST, ""), (11.0, 11.1, "u", LIST, ""), (12.0, 12.5, "u", popular, ""))
    assert (good["ok"], good["degraded"], good["recovery_s"]) == (2, 1, 2.5)
    assert misses(good) == []
    bad = row(
        (11.0, 11.1, "u", other, ""), (11.0, 11.1, "u", empty, ""), (11, 18, "u", None, "Unavailable: x")
    )
    assert (bad["wrong"], bad["failed"]) == (2, 1)
    assert misses(bad) == ["failed 1", "wrong 2", "recovery 8.0 s"]
    assert misses(row((11.0, 41.0, "", None, "lost")))[0] == "lost 1"
    assert "FAIL: failed 1" in table([{**bad, "way": "fused"}])


def test_an_answer_is_held_against_its_own_releases_list() -> None:
    other = Recommendations("u", LIST.items[::-1], Degraded(0), "r2", 1.0)
    bench = Bench(1.0, ["u"], healthy={"r1": {"u": LIST}, "r2": {"u": other}})
    mixed = Recommendations("u", LIST.items, Degraded(0), "r2", 1.0)
    stranger = Recommendations("u", LIST.items, Degraded(0), "r3", 1.0)
    notes = [(11.0, 11.1, "u", one, "") for one in (LIST, other, mixed, stranger)]
    assert bench.row("swap", notes, 10.0)["wrong"] == 2
    stale = Recommendations("u", LIST.items[::-1], Degraded.FEATURES_STALE, "r1", 1.0)
    assert bench.row("redis", [(11.0, 11.1, "u", stale, "")], 10.0)["wrong"] == 1, "rows are the snapshot's"


def test_of_several_runs_each_number_is_the_worst() -> None:
    good = {**row((9.0, 9.1, "u", LIST, "")), "way": "fused", "goodput": 0.95, "same_server": True}
    bad = {
        **good,
        "ok": 0,
        "failed": 1,
        "goodput": 0.5,
        "failures": ["x"],
        "same_server": False,
        "more": "bad",
    }
    found = worst([bad, good])
    assert found["more"] == "bad"
    assert (found["ok"], found["failed"], found["goodput"]) == (0, 1, 0.5)
    assert (found["failures"], found["same_server"], found["runs"]) == (["x"], False, [bad, good])
    assert worst([good]) == good


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--only", "stub,fire"], "there is no 'fire'"),
        (["--ways", "fast"], "there is no 'fast'"),
        (["--runs", "0"], "at least 1"),
        (["--repository", "nowhere"], "nowhere"),
    ],
)
def test_what_cannot_be_run_is_said_in_one_line(given, words, capsys) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(SystemExit) as end:
        main(given)
    said = capsys.readouterr().err.strip().splitlines()
    assert (end.value.code, len(said)) == (2, 1)
    assert words in said[0]


@pytest.mark.alone
@pytest.mark.triton
def test_a_process_that_is_killed_is_felt_by_nobody(tiny_repository: Path, tmp_path: Path) -> None:
    file = tmp_path / "faults.json"
    options = ["--only", "stub", "--ways", "fused", "--seconds", "1", "--json", str(file)]
    with pytest.raises(SystemExit) as end:
        main(["--repository", str(tiny_repository), *options])
    [found] = json.loads(file.read_text())["rows"]
    assert (found["failed"], found["wrong"], found["lost"]) == (0, 0, 0), found["failures"]
    assert end.value.code in (0, 1)  # recovery in time is the machine's affair, too


@pytest.mark.alone
@pytest.mark.long
@pytest.mark.triton
@pytest.mark.timeout(900)
@pytest.mark.parametrize("way", ["ensemble", "fused"])
def test_all_faults_are_felt_by_nobody(tiny_repository: Path, tmp_path: Path, way: str) -> None:
    """What must hold on a busy machine too; the times that a target has are `make faults`'s affair."""
    file = tmp_path / "faults.json"
    with pytest.raises(SystemExit) as end:
        main(["--repository", str(tiny_repository), "--ways", way, "--json", str(file)])
    assert end.value.code in (0, 1)
    rows = {row["test"]: row for row in json.loads(file.read_text())["rows"]}
    assert len(rows) == len(TESTS)
    for name, row in rows.items():
        assert (row["failed"], row["wrong"], row["lost"]) == (0, 0, 0), (name, row["failures"])
        assert not row.get("faults"), name
