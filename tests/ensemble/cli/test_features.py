"""`peregrine features load | bench` and `serve --redis`, as they are typed."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from shops import ROOT

from ensemble.errors import InvalidInput
from ensemble.tiers.settings import (
    TierSettings,
    hidden,
    settings_from_environment,
    url_from_option,
    write_settings,
)

pytestmark = [pytest.mark.timeout(300)]


def peregrine(*arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "peregrine", *arguments]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **more},
        timeout=120,
        check=False,
    )


@pytest.mark.redis
def test_load_reports_and_a_second_load_replaces_the_first(server, tiny_repository, tiny_release):
    first = peregrine(
        "features", "load", "--repository", str(tiny_repository), "--redis", server.url, "--json"
    )
    assert first.returncode == 0, first.stderr
    done = json.loads(first.stdout)
    assert (done["shop"], done["release"], done["previous"]) == (tiny_release.schema.shop, "r1", None)
    assert (done["users"], done["items"]) == (len(tiny_release.user_ids), len(tiny_release.item_ids))
    assert server.client().dbsize() == done["users"] + 2 * done["items"] + 2
    second = peregrine("features", "load", "-r", str(tiny_repository), PEREGRINE_REDIS=server.url)
    assert second.returncode == 0
    assert f"version {done['version']} is left" in second.stdout


@pytest.mark.redis
def test_what_is_wrong_is_said_in_one_line(server, tiny_repository, tmp_path):
    cases = {
        ("--redis", "redis://127.0.0.1:1"): "error: Redis at redis://127.0.0.1:1 does not answer: ",
        (
            "--redis",
            "http://me:secret@x",
        ): "error: --redis: 'http://x' is not a Redis URL; write redis://[USER:PASSWORD@]HOST:PORT[/DB]",
        (
            "--redis",
            f"@{tmp_path / 'no'}",
        ): f"error: --redis: cannot read {tmp_path / 'no'}: No such file or directory",
        ("--redis", server.url, "--release", "r9"): f"error: no release 'r9' in {tiny_repository}",
        ("--redis", server.url, "--ttl-days", "-1"): "error: --ttl-days must be above 0 and below 36500",
    }
    for arguments, text in cases.items():
        done = peregrine("features", "load", "-r", str(tiny_repository), *arguments)
        assert done.returncode == 2
        assert done.stderr.startswith(text)
        assert len(done.stderr.splitlines()) == 1
        assert "secret" not in done.stderr
    done = peregrine("serve", "-r", str(tiny_repository), "--redis", "nonsense")
    assert (done.returncode, done.stderr[:17]) == (2, "error: --redis: '")


@pytest.mark.redis
def test_bench_prints_a_table_and_writes_its_numbers(tiny_repository, tmp_path):
    done = peregrine(
        "features",
        "bench",
        "-r",
        str(tiny_repository),
        "--seconds",
        "0.2",
        "--out",
        str(tmp_path / "out.json"),
        COLUMNS="200",
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "out.json").read_text())
    assert [(line["step"], line["tier"]) for line in figures["lines"][:2]] == [
        ("features", "snapshot"),
        ("recall", "snapshot"),
    ]
    assert len(figures["lines"]) == 8
    assert all(
        line["reads"] >= 10 and 0 < line["cpu_p50_ms"] <= line["cpu_p99_ms"] for line in figures["lines"]
    )
    assert figures["failures"] == {}
    assert "90 % memory, 10 % redis" in done.stdout


def test_settings_travel_in_a_file_of_their_owners_alone(tmp_path, monkeypatch):
    settings = TierSettings("redis://me:secret@host:1", soft_ttl_s=5)
    write_settings(tmp_path / "tiers.json", settings)
    assert (tmp_path / "tiers.json").stat().st_mode & 0o777 == 0o600
    monkeypatch.setenv("PEREGRINE_TIERS", str(tmp_path / "tiers.json"))
    assert settings_from_environment() == settings
    assert "secret" not in repr(settings)
    assert hidden(settings.url) == "redis://host:1"
    (tmp_path / "tiers.json").write_text("{}")
    with pytest.raises(InvalidInput, match="not a file of tier settings"):
        settings_from_environment()
    monkeypatch.delenv("PEREGRINE_TIERS")
    assert settings_from_environment() is None
    (tmp_path / "url").write_text("redis://me:secret@host:1\nmore\n")
    assert url_from_option(f"@{tmp_path / 'url'}") == settings.url


@pytest.mark.parametrize(
    "wrong",
    [{"deadline_ms": 0}, {"jitter": 1.0}, {"soft_ttl_s": 400}, {"memory_bytes": -1}, {"url": "localhost"}],
)
def test_settings_that_cannot_be_are_refused(wrong):
    with pytest.raises(InvalidInput):
        TierSettings(**{"url": "redis://host", **wrong})
