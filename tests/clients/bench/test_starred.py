"""The faults that must not be felt, run against a real server; and how their figures become a verdict."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from clients.bench import starred
from clients.results import Item, Recommendations
from ensemble.contract import Degraded

LIST = Recommendations("u", (Item("a", 2.0, {}), Item("b", 1.0, {})), Degraded(0), "r1", 1.0)


def row(*notes: tuple) -> dict:  # type: ignore[type-arg]
    bench = starred.Bench(1.0, ["u"], healthy={"u": LIST})
    return bench.row("stub", list(notes), 10.0)


def test_what_came_is_counted_and_judged() -> None:
    other = Recommendations("u", LIST.items[::-1], Degraded(0), "r1", 1.0)
    popular = Recommendations("u", LIST.items[1:], Degraded.POPULAR, "r1", 1.0)
    empty = Recommendations("u", (), Degraded.POPULAR, "r1", 1.0)
    good = row((9.0, 9.1, "u", LIST, ""), (11.0, 11.1, "u", LIST, ""), (12.0, 12.5, "u", popular, ""))
    assert (good["ok"], good["degraded"], good["recovery_s"]) == (2, 1, 2.5)
    assert starred.misses(good) == []
    bad = row(
        (11.0, 11.1, "u", other, ""), (11.0, 11.1, "u", empty, ""), (11, 18, "u", None, "Unavailable: x")
    )
    assert (bad["wrong"], bad["failed"]) == (2, 1)
    assert starred.misses(bad) == ["failed 1", "wrong 2", "recovery 8.0 s"]
    assert starred.misses(row((11.0, 41.0, "", None, "lost")))[0] == "lost 1"
    assert "FAIL: failed 1" in starred.table([{**bad, "way": "fused"}])


@pytest.mark.alone
@pytest.mark.triton
def test_a_process_that_is_killed_is_felt_by_nobody(tiny_repository: Path, tmp_path: Path) -> None:
    file = tmp_path / "faults.json"
    options = ["--only", "stub", "--ways", "fused", "--seconds", "1", "--json", str(file)]
    with pytest.raises(SystemExit) as end:
        starred.main(["--repository", str(tiny_repository), *options])
    [found] = json.loads(file.read_text())["rows"]
    assert (found["failed"], found["wrong"], found["lost"]) == (0, 0, 0), found["failures"]
    assert end.value.code in (0, 1)  # recovery in time is the machine's affair, too


@pytest.mark.alone
@pytest.mark.long
@pytest.mark.triton
@pytest.mark.parametrize("way", ["ensemble", "fused"])
def test_all_faults_are_felt_by_nobody(tiny_repository: Path, way: str) -> None:
    with pytest.raises(SystemExit) as end:
        starred.main(["--repository", str(tiny_repository), "--ways", way])
    assert end.value.code == 0
