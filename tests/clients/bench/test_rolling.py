"""A rolling update behind the gateway: what is counted, what manifests say, and (long) the whole of it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from ports import free_port
from shops import ROOT, one_thread, private_copy
from variants import publish_variant

from clients.bench import gateway
from clients.bench.rolling.__main__ import report
from clients.bench.rolling.pods import Pod, read_manifest
from clients.bench.rolling.update import ITEM, Outcome, is_of_its_release, roll
from clients.results import Item, Recommendations
from ensemble.contract import Degraded

pytest.importorskip("yaml")


def answer(release: str, *items: str) -> Recommendations:
    listed = tuple(Item(item, 1.0, {}) for item in items)
    return Recommendations(user_id="u1", items=listed, release=release, degraded=Degraded(0), latency_ms=1.0)


def test_a_list_of_another_release_than_it_says_is_mixed() -> None:
    expected = {"r1": {"u1": {"a", "b", "c", "d", "e", "f"}}, "r2": {"u1": {"v", "w", "x", "y", "z"}}}
    assert is_of_its_release(answer("r1", "a", "b", "c", "d", "f"), expected)
    assert is_of_its_release(answer("r1", "a", "b", "c", ITEM, "f"), expected)
    assert not is_of_its_release(answer("r1", "a", "b", "c", "d", "v"), expected)
    assert not is_of_its_release(answer("r2", "a", "b", "c", "d", "e"), expected)
    assert not is_of_its_release(answer("r1", "a", "b", "c"), expected)
    assert not is_of_its_release(answer("r3", "a", "b", "c", "d", "e"), expected)


def test_a_pod_runs_the_manifests_commands_in_a_folder_of_its_own(tmp_path: Path) -> None:
    manifest = read_manifest()
    assert list(manifest.commands) == ["pull", "serve", "follow"]
    assert "--fused" in manifest.commands["serve"]
    assert manifest.probe_path == "/readyz"
    assert manifest.grace_s > manifest.pause_s > 0
    pod = Pod(manifest, tmp_path, "store", 1, 2)
    placed = [pod._placed(word) for words in manifest.commands.values() for word in words]
    assert f"{tmp_path}/state/serve" in placed
    assert not [word for word in placed if word.startswith("/") and not word.startswith(str(tmp_path))]


def test_it_says_what_is_missing(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "clients.bench.rolling", "--repository", tmp_path / "none"],
        capture_output=True,
        text=True,
        env=one_thread(PYTHONPATH=str(ROOT)),
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr


@pytest.mark.long
@pytest.mark.triton
@pytest.mark.skipif(bool(gateway.missing()), reason=gateway.missing() or "nothing is missing")
def test_two_servers_are_replaced_under_load_without_a_failed_or_a_mixed_list(
    tiny_repository: Path, tmp_path: Path
) -> None:
    repository = private_copy(tiny_repository, tmp_path / "repository")
    publish_variant(repository, "r1", "r2", tmp_path)
    outcome: Outcome = roll(repository, tmp_path / "here", [free_port() for _ in range(10)], 15.0, "r2")
    print(report(outcome))
    assert outcome.sent > 100
    assert (outcome.failed, outcome.mixed) == (0, 0), report(outcome)
    assert outcome.releases.keys() == {"r1", "r2"}
    assert min(outcome.releases.values()) > 5
    assert len(outcome.end_s) == len(outcome.ready_s) == 2
