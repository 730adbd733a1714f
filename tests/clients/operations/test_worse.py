"""Activation asks whether a release is worse than the active one, on held-out users whom neither had seen."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from shops import private_copy
from toy_repository import allow_toys, publish_toy

import builders.publish.stage as publish_stage
import builders.verify.stage as verify
import peregrine
from clients.operations import canaries, releases
from ensemble.errors import ReleaseError
from ensemble.release.compared import comparison
from ensemble.release.held_out import HELD_OUT, held_out_rows
from ensemble.release.manifest import MANIFEST, sealed
from ensemble.release.release import active_release, open_release
from ensemble.steps.blend import BLEND, read_blend


def rows(gains: np.ndarray) -> np.ndarray:
    users = np.array([f"u{n}" for n in range(len(gains))], dtype="S8")
    return held_out_rows(users, np.full(len(gains), b"i"), np.full(len(gains), 7), gains)


def rewrite(repository: Path, name: str, **entries: object) -> None:
    """Gives a release's manifest other entries, and the digest that fits."""
    path = repository / name / MANIFEST
    path.write_text(sealed({**json.loads(path.read_text()), **entries}))


@pytest.fixture
def publish(tmp_path, monkeypatch):
    """Publishes toys with results of held-out users: publish("r2", gains, created=…) -> the repository."""
    allow_toys(monkeypatch)
    repository = tmp_path / "models"

    def publish(name: str, gains: np.ndarray | None, *, created: str, split: str = "time") -> Path:
        scratch = tmp_path / f"scratch {name}"
        publish_toy(repository, name, scratch)
        if gains is not None:
            np.save(repository / name / HELD_OUT, rows(gains))
            monkeypatch.setattr("ensemble.release.release.Release.verify", lambda self, paths=None: None)
        rewrite(repository, name, created=created, report={"held_out": {"split": split}})
        return repository

    return publish


@pytest.fixture
def better_and_worse(publish, rng) -> Path:
    """r1, active, and r2, which is newer and surely worse."""
    gains = rng.random(100)
    publish("r1", gains, created="2026-01-01T00:00:00+00:00")
    repository = publish("r2", gains - 0.2, created="2026-01-02T00:00:00+00:00")
    releases.activate(repository, "r1")
    return repository


def test_a_worse_release_needs_force(better_and_worse, capsys, monkeypatch):
    with pytest.raises(ReleaseError) as caught:
        releases.activate(better_and_worse, "r2")
    assert caught.value.fact.startswith(
        "release r2 is not activated, r1 goes on: it is worse; r2 against r1 on "
    )
    assert "100 users that neither had seen: NDCG@10 -0.2000 of " in caught.value.fact
    assert caught.value.cure.endswith("--force")
    assert active_release(better_and_worse) == "r1"
    monkeypatch.setattr(
        sys,
        "argv",
        ["peregrine", "release", "activate", "r2", "--force", "--repository", str(better_and_worse)],
    )
    with pytest.raises(SystemExit) as end:
        peregrine.main()
    assert not end.value.code
    assert active_release(better_and_worse) == "r2"
    assert "forced, and worse: r2 against r1" in " ".join(capsys.readouterr().err.split())


def test_going_back_to_an_older_release_is_never_refused(publish, rng):
    gains = rng.random(100)
    publish("r1", gains - 0.2, created="2026-01-01T00:00:00+00:00")
    repository = publish("r2", gains, created="2026-01-02T00:00:00+00:00")
    releases.activate(repository, "r1")
    assert releases.activate(repository, "r2").worth.startswith("r2 against r1 on 100 users")
    assert releases.activate(repository, "r1").worth.startswith("older and worse: r1 against r2")
    assert active_release(repository) == "r1"


@pytest.mark.parametrize(
    ("gains", "split", "why"),
    [
        (None, "time", "the new one has no results of held-out users"),
        (np.zeros(100), "leave_one_out", "they held users out in two ways, 'leave_one_out' and 'time'"),
        (np.zeros(20), "time", "20 users have a held-out item in both"),
    ],
)
def test_what_cannot_be_told_is_said_and_asks_nothing(publish, gains, split, why):
    publish("r1", np.ones(100), created="2026-01-01T00:00:00+00:00")
    repository = publish("r2", gains, created="2026-01-02T00:00:00+00:00", split=split)
    assert releases.activate(repository, "r1").worth == ""
    done = releases.activate(repository, "r2")
    assert done.worth.startswith(f"cannot tell whether r2 is worse than r1: {why}")
    assert active_release(repository) == "r2"


def test_releases_of_two_shops_are_not_compared(publish):
    publish("r1", np.ones(100), created="2026-01-01T00:00:00+00:00")
    repository = publish("r2", np.zeros(100), created="2026-01-02T00:00:00+00:00")
    rewrite(repository, "r2", shop="another")
    new, active = (open_release(repository, name) for name in ("r2", "r1"))
    assert comparison(new, active).why_not.startswith("they are of two shops")


def test_a_release_whose_active_one_is_broken_is_not_held_against_it(better_and_worse):
    (better_and_worse / "r1" / HELD_OUT).write_bytes(b"spoiled")
    assert releases.activate(better_and_worse, "r2").worth.startswith(
        "cannot tell whether r2 is worse than r1: cannot read "
    )


def test_a_worse_release_may_be_tried_but_gets_all_users_by_force_alone(better_and_worse):
    canaries.canary(better_and_worse, "r2", 0.5)
    with pytest.raises(ReleaseError, match="it is worse"):
        canaries.promote(better_and_worse)
    assert active_release(better_and_worse) == "r1"
    done = canaries.promote(better_and_worse, force=True)
    assert any("forced, and worse" in note for note in done.notes)
    assert active_release(better_and_worse) == "r2"


def publish_upside_down(root: Path, repository: Path, work: Path) -> str:
    """Verifies and publishes, by stages of a build, one whose lists begin with what is least relevant."""
    stages = {path.name.rpartition("-")[0]: path for path in root.glob("*-*") if path.is_dir()}
    staged, verified, published = (work / name for name in ("export", "verify", "repository stage"))
    shutil.copytree(stages["export"], staged)
    blend = read_blend(staged)  # whether it ranks by tasks was fitted: here it does not
    # flat: a relevance that is 1 for whatever is least relevant would leave no order at all
    turned = replace(blend, uses_tasks=False, slope=-abs(blend.slope) / 100, bias=0.0)
    (staged / BLEND).write_text(turned.to_json())
    for folder in (verified, published):
        folder.mkdir()
    inputs = {**stages, "export": staged, "verify": verified}
    verify.run(inputs, verify.Options(), verified, lambda share, text: None)
    publish_stage.run(
        inputs, publish_stage.Options(str(repository), None, "tiny", 0), published, lambda share, text: None
    )
    return publish_stage.read_name(published)


def test_a_built_release_that_ranks_upside_down_is_refused(release_cache, tiny_repository, tmp_path):
    """End to end, with real releases of one shop."""
    repository = private_copy(tiny_repository, tmp_path / "repository")
    root = release_cache.folder("tiny") / "repository" / ".build" / "shop"
    name = publish_upside_down(root, repository, tmp_path)
    before, after = (
        open_release(repository, one).manifest["report"]["worth"]["ways"]["chain"]["worth"]
        for one in ("r1", name)
    )
    with pytest.raises(ReleaseError, match=rf"release {name} is not activated, r1 goes on: it is worse; "):
        releases.activate(repository, name)
    assert active_release(repository) == "r1"
    found = releases.activate(repository, name, force=True).worth
    assert f"the worth of an item shown {after - before:+.4f} of {before:.4f}" in found
    assert active_release(repository) == name
    assert releases.activate(repository, "r1").worth.startswith(f"r1 against {name} on 283 users")
