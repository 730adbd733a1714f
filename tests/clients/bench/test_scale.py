"""How large: the queue against formulas and against what was measured, and plans that grow as they must."""

from __future__ import annotations

import numpy as np
import pytest

from clients.bench import scale
from clients.bench.scale import CPU_NODE, GPU_NODE, LARGE_NODE, plan, queue_ms


def test_a_single_server_without_batches_waits_as_the_formula_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scale, "MOST_BATCH", 1)
    for load in (0.3, 0.6):  # M/D/1: mean time = s + load * s / (2 * (1 - load))
        took = queue_ms(1e3 * load / 5.0, 1, 0.0, 5.0, 60_000)
        assert took.mean() == pytest.approx(5.0 + load * 5.0 / (2 * (1 - load)), rel=0.05)


def test_batches_bear_more_than_lone_lists_could() -> None:
    took = queue_ms(380.0, 1, 4.0, 1.0)  # 200 a second if each paid the start
    assert np.percentile(took, 99) < 60


def test_the_queue_is_near_what_two_cores_did_up_to_half_their_load() -> None:
    slower = scale.SHARED
    for rate, p99_ms in ((181, 21.0), (362, 44.0)):
        took = queue_ms(rate, 2, scale.START_MS * slower, scale.EACH_MS * slower) + scale.AROUND_MS
        assert np.percentile(took, 99) == pytest.approx(p99_ms, rel=0.15)


@pytest.mark.parametrize("node", [CPU_NODE, GPU_NODE], ids=lambda node: node.name)
def test_more_items_and_more_lists_never_take_less(node: scale.Node) -> None:
    plans = [[plan(items, rate, node) for rate in (1e3, 1e5)] for items in (1e6, 1e7)]
    for few, many in plans:
        assert many.nodes > few.nodes >= 2
        assert many.rate <= (many.nodes - 1) * many.per_node
    assert plans[1][1].nodes > plans[0][1].nodes
    assert plans[1][0].memory_gb > plans[0][0].memory_gb


def test_what_does_not_fit_or_was_not_measured_is_said() -> None:
    assert plan(1e7, 1e3, CPU_NODE).notes == []
    notes = plan(1e8, 1e3, CPU_NODE).notes
    assert notes == ["beyond what was measured", "does not fit: 4 shards by item, which are not built"]
    assert plan(1e8, 1e3, LARGE_NODE).notes == ["beyond what was measured"]


def test_the_command_prints_a_row_and_refuses_nonsense(capsys: pytest.CaptureFixture[str]) -> None:
    scale.main(["--items", "1e6", "--rate", "500"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 3
    assert lines[2].startswith("1 M | 500 | 16 cores, 64 GB | 2 | ")
    with pytest.raises(SystemExit) as caught:
        scale.main(["--items", "-5"])
    assert caught.value.code == 2
    assert "--items: must be above 0" in capsys.readouterr().err
