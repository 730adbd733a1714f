"""Shows what a log says of long work: a line a step, not a line an update, and nothing of short work."""

import io
import json
import re

import pytest
from rich.console import Console

from ensemble.progress import Lines, bar, log_of


def said(updates):
    """Gives the lines of updates (seconds, step, share), the last of which is the end."""
    now, lines = [0.0], []
    work = Lines("encoders", lines.append, lambda: now[0])
    for seconds, step, share in updates:
        now[0] = seconds
        work.update(step, share) if step else work.end()
    return lines


def test_short_work_says_nothing():
    assert said([(0.1, "reading", 0.5), (1.9, "", 1)]) == []


def test_each_step_has_a_line():
    assert said([(3, "epoch 1", 0.1), (9, "epoch 2", 0.2), (20, "", 1)]) == [
        "encoders: epoch 1 (10%, 3 s)",
        "encoders: epoch 2 (20%, 9 s)",
        "encoders: done in 20 s",
    ]


def test_many_updates_of_one_step_make_a_line_every_half_minute():
    lines = said([(second / 10, "held-out users", second / 1000) for second in range(1000)])
    assert [line.rpartition(", ")[2] for line in lines] == ["2 s)", "32 s)", "62 s)", "92 s)"]


def test_steps_that_fly_by_are_not_all_told():
    assert len(said([(2 + k / 100, f"batch {k}", 0) for k in range(100)])) == 1


def test_where_there_is_no_terminal_lines_are_printed(monkeypatch):
    monkeypatch.setattr("ensemble.progress._QUIET_S", 0.0)
    out = io.StringIO()
    with bar("export", Console(file=out)) as update:
        update("ranker [of r1] -> ONNX", 0.5)
    assert out.getvalue().splitlines() == [
        "export: ranker [of r1] -> ONNX (50%, 0 s)",
        "export: done in 0 s",
    ]


def test_a_logs_lines_have_time_and_level_and_may_be_json(capsys: pytest.CaptureFixture[str]) -> None:
    log_of(False)("WARNING: it died")
    log_of(True)("WARNING: it died")
    log_of(True)("it is well")
    plain, warned, told = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ WARNING: it died", plain)
    assert {k: v for k, v in json.loads(warned).items() if k != "time"} == {
        "level": "warning",
        "message": "it died",
    }
    assert json.loads(told)["level"] == "info"
