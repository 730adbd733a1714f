"""Turns what came of the tests into PASS or FAIL, the worst of several runs, and a table."""

from __future__ import annotations

from collections.abc import Sequence

from clients.bench.starred.load import RECOVERY_S, Row

_GOODPUT, _REJECT_P50_MS, _REJECT_P99_MS, _BACK_S, _LEAST_SHARE = 0.9, 5.0, 20.0, 2.0, 0.5
_MORE_P99_MS, _REDIS_BACK_S, _TIMES_P99 = 25.0, 0.5, 2.0
# A tritonserver that has to be started takes longer than a process of it
_RESTARTS = ("server", "frozen", "holes")
_FEWEST = ("sent", "ok", "goodput", "offered", "refused", "capacity")  # of these the least is the worst
_COLUMNS = ("test", "way", "sent", "ok", "degraded", "failed", "wrong", "lost")


def misses(row: Row) -> list[str]:
    """Names the targets that a row misses."""
    missed = [f"{name} {row[name]}" for name in ("failed", "wrong", "lost") if row[name]]
    missed += row.get("faults", [])
    test = row["test"].partition(" ")[0]
    if test == "overload":
        limits = (
            ("offered", row["offered"] >= _LEAST_SHARE * row["times"]),
            ("goodput", row["goodput"] >= _GOODPUT),
            ("reject_p50_ms", row["reject_p50_ms"] <= _REJECT_P50_MS),
            ("reject_p99_ms", row["reject_p99_ms"] <= _REJECT_P99_MS),
            ("memory_growth", row["memory_growth"] <= 0.1),
            ("back_ms", row["back_ms"] <= 1e3 * _BACK_S),
        )
        return missed + [f"{name} {row[name]}" for name, is_met in limits if not is_met]
    if test == "storm":
        return missed + ([] if row["same_server"] else ["tritonserver died"])
    if test == "redis" and row["p99_ms_during"] > row["p99_ms_before"] + _MORE_P99_MS:
        missed.append(f"p99 {row['p99_ms_during'] - row['p99_ms_before']:+.0f} ms")
    if test == "swap" and row["p99_ms_during"] > _TIMES_P99 * row["p99_ms_before"]:
        missed.append(f"p99 {row['p99_ms_during'] / row['p99_ms_before']:.1f} times")
    limit_s = _REDIS_BACK_S if test == "redis" else RECOVERY_S * (2 if test in _RESTARTS else 1)
    return missed + ([f"recovery {row['recovery_s']} s"] if row["recovery_s"] > limit_s else [])


def worst(runs: Sequence[Row]) -> Row:
    """Gives one row for several runs of a test: of each number the worst."""
    if len(runs) == 1:
        return runs[0]
    row: Row = {**runs[-1], "runs": list(runs)}
    for name, value in runs[-1].items():
        values = [run[name] for run in runs if name in run]
        if isinstance(value, bool):
            row[name] = all(values)
        elif isinstance(value, int | float):
            row[name] = min(values) if name in _FEWEST else max(values)
        elif isinstance(value, list):
            row[name] = sorted({str(one) for some in values for one in some})
    # What is told in words is told of the run that was worst
    return {**row, "more": max(runs, key=lambda run: len(misses(run))).get("more", "")}


def table(rows: Sequence[Row]) -> str:
    """Writes the rows as a Markdown table."""
    head = [*_COLUMNS, "p99 ms", "recovery s", "more", "verdict"]
    lines = ["| " + " | ".join(head) + " |", "| " + " | ".join(["---"] * len(head)) + " |"]
    for row in rows:
        verdict = ", ".join(misses(row))
        cells = [*(row[name] for name in _COLUMNS), f"{row['p99_ms_before']} / {row['p99_ms_during']}"]
        cells += [row["recovery_s"], row.get("more", ""), f"FAIL: {verdict}" if verdict else "PASS"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)
