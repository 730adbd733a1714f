"""Writes the parts of a release's page that report.md has too, and how the release was built."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from builders.report.markup import escaped, html_of, number, table_of
from builders.verify.baselines import baseline_lines
from builders.verify.markdown import source_lines
from builders.verify.newcomers import newcomer_lines


def beside_simple_ways(report: Mapping[str, Any]) -> list[str]:
    """Says where the model is below simple ways, and gives every figure with its interval."""
    return html_of(baseline_lines(dict(report))) if "baselines" in report else []


def groups(report: Mapping[str, Any]) -> list[str]:
    """Shows how new and old items, and idle and active users, fare."""
    return html_of(newcomer_lines(report["newcomers"])) if report.get("newcomers") else []


def sources(report: Mapping[str, Any]) -> list[str]:
    """Shows what each source of recall adds."""
    return html_of(source_lines(report.get("recall", {})))


def how_built(manifest: Mapping[str, Any]) -> list[str]:
    """Names the slowest stage of the build, and lists its settings; nothing for a release of an earlier
    Peregrine, which kept neither."""
    took, settings = manifest.get("stages_s") or {}, manifest.get("training") or {}
    if not took and not settings:
        return []
    parts = ["<h2>How it was built</h2>"]
    if took:
        slowest, whole = max(took, key=lambda stage: took[stage]), sum(took.values())
        text = f"The slowest stage was {slowest}: {took[slowest]:,.1f} of {whole:,.1f} s."
        parts.append(f"<p>{escaped(text)}</p>")
        parts.append(table_of(["stage", "seconds"], [[name, f"{of:,.1f}"] for name, of in took.items()]))
    if settings:
        changed = manifest.get("settings", {})
        rows = [
            [name, number(str(of) if isinstance(of, bool) else of, 8), "changed" * (name in changed)]
            for name, of in settings.items()
        ]
        table = table_of(["setting", "value", ""], rows)
        parts.append(f"<details><summary>all {len(rows)} settings of the training</summary>{table}</details>")
    return parts
