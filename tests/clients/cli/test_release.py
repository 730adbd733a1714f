"""`peregrine release`: what it prints is whole on a narrow terminal, and its JSON is JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from clients.cli.release import app
from clients.operations import listing, releases
from clients.operations.listing import ReleaseInfo

NAME = "a-release-whose-name-is-longer-than-a-column"
METHOD = "distilled_then_pruned_then_quantized_by_sensitivity"


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository whose one release has a manifest with NaN, and a report with a wide table."""
    info = ReleaseInfo(NAME, "0123456789abcdef", size_bytes=12_345_678, share=1.0, problem="half a copy")
    manifest = {"release": NAME, "ndcg": float("nan"), "files": {}, "numbers": [1.0, float("-inf")]}
    monkeypatch.setattr(listing, "list_releases", lambda *_: [info])
    monkeypatch.setattr(releases, "show", lambda repository, name: manifest)
    monkeypatch.setenv("COLUMNS", "60")
    rows = [f"| {METHOD} | 0.1234 | 0.5678 | {METHOD} |"]
    lines = ["# Report", "", "| method | NDCG@10 | AUC | base |", "| --- | --- | --- | --- |", *rows]
    (tmp_path / NAME).mkdir()
    (tmp_path / NAME / "report.md").write_text("\n".join(lines))
    return tmp_path


def run(repository: Path, *arguments: str) -> str:
    return CliRunner().invoke(app, [*arguments, "-r", str(repository)], catch_exceptions=False).output


def test_the_list_folds_long_names_and_fits_a_terminal(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = run(repository, "list")
    assert "…" not in text
    assert NAME in "".join(line.split()[0] for line in text.splitlines() if line.strip())
    assert "01234567" in text
    assert text.endswith(f"{NAME}: half a copy\n")


def test_the_report_folds_long_cells(repository: Path) -> None:
    text = run(repository, "show", NAME)
    assert "…" not in text
    assert METHOD in "".join(line.split()[0] for line in text.splitlines() if line.strip())


def test_what_is_no_number_is_null_in_json(repository: Path) -> None:
    manifest: dict[str, Any] = json.loads(run(repository, "show", NAME, "--json"), parse_constant=pytest.fail)
    assert (manifest["ndcg"], manifest["numbers"]) == (None, [1.0, None])
