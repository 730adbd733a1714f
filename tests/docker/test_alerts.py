"""Alerts: promtool's own test fires each of them, each is in the runbook, and what they read is published."""

from __future__ import annotations

import re
import shutil
import subprocess
from typing import Any

import pytest
from shops import ROOT

yaml = pytest.importorskip("yaml")
FOLDER = ROOT / "docker" / "prometheus"


def rules() -> list[dict[str, Any]]:
    (group,) = yaml.safe_load((FOLDER / "rules.yaml").read_text())["groups"]
    return list(group["rules"])


@pytest.mark.skipif(not shutil.which("promtool"), reason="promtool is not installed (Debian: prometheus)")
def test_every_alert_fires_for_what_is_bad_and_none_for_what_is_good():
    done = subprocess.run(
        ["promtool", "test", "rules", "rules_test.yaml"],
        cwd=FOLDER,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_test_knows_every_alert():
    (test,) = yaml.safe_load((FOLDER / "rules_test.yaml").read_text())["tests"]
    samples = {one["labels"]: one["value"] for one in test["promql_expr_test"][0]["exp_samples"]}
    assert samples == {'{instance="bad"}': len(rules()), '{instance="gone"}': 1}


def test_every_alert_has_its_line_in_the_runbook():
    lines = (ROOT / "docker" / "RUNBOOK.md").read_text().splitlines()
    named = [line.partition(" | ")[0] for line in lines if line.count(" | ") == 3][1:]
    assert named == [rule["alert"] for rule in rules()]


def test_alerts_read_what_is_published():
    sources = "".join(path.read_text() for path in (ROOT / "ensemble").rglob("*.py"))
    for rule in rules():
        for name in re.findall(r"peregrine_(\w+)", rule["expr"]):
            words = [name, name.removesuffix("_total"), *([name.split("_", 1)[1]] if "_" in name else [])]
            assert any(
                f'"{word}"' in sources or f'"peregrine_{word}"' in sources or f"_{word}" in sources
                for word in words
            ), name
