"""A release is in the repository whole or not at all, whoever is killed and whenever."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
from shops import ROOT
from toy_repository import manifest_of, publish_toy

from builders.publish import stage as publishing
from builders.publish.stage import publish
from ensemble.errors import InvalidInput, ReleaseError
from ensemble.release.names import names_given, next_release_name, release_names, taken
from ensemble.release.release import active_release, open_release
from ensemble.release.repository import half_releases, locked, member_folders, remove, staging, sweep


def test_publish_makes_a_release_that_verifies(tmp_path):
    repository = tmp_path / "models"
    publish_toy(repository, "r1", tmp_path, activate=True)
    open_release(repository, "r1").verify()
    assert release_names(repository) == ["r1"]
    assert active_release(repository) == "r1"
    on_disk = {
        str(p.relative_to(repository))
        for p in repository.glob("r1*/**/*")
        if p.is_file() and p.name not in ("manifest.json", "__pycache__")
    }
    assert set(manifest_of(repository, "r1")["files"]) == on_disk
    assert {p.name for p in repository.iterdir() if p.name.startswith(".")} == {".lock", ".names.json"}


def test_next_release_name_is_above_all_that_are_there(tmp_path):
    assert next_release_name(tmp_path / "absent") == "r1"
    for name in ("r2", "r10_ranker", "autumn", "recommend"):
        (tmp_path / name).mkdir()
    assert next_release_name(tmp_path) == "r11"
    (tmp_path / ".names.json").write_text('{"format": 1, "names": {"r12": "0", "winter": "1"}}')
    assert next_release_name(tmp_path) == "r13"


@pytest.mark.parametrize("name", ["R1", "r_1", "", "../r1", "-r", "recommend"])
def test_bad_release_name_is_refused(tmp_path, name):
    with pytest.raises(InvalidInput, match="release name"):
        publish(tmp_path / "models", name, {}, tmp_path, {})


def test_a_release_is_never_overwritten_and_the_same_once_more_is_nothing_to_do(tmp_path):
    repository = tmp_path / "models"
    assert publish_toy(repository, "r1", tmp_path / "1")
    before = (repository / "r1" / "manifest.json").read_bytes()
    assert taken(repository, "r1").startswith("warning: release name r1 is given already: ")
    assert not taken(repository, "r2")
    other = r"^release name r1 was given to other content \(id \w{16}; this has \w{16}\), .* free one is r2$"
    with pytest.raises(InvalidInput, match=other):
        publish_toy(repository, "r1", tmp_path / "2", padding_bytes=2000)
    assert not publish_toy(repository, "r1", tmp_path / "3")
    assert (repository / "r1" / "manifest.json").read_bytes() == before
    assert not list(repository.glob(".staging-*"))


def test_a_name_is_given_once_also_after_its_release_is_removed(tmp_path):
    repository = tmp_path / "models"
    for name in ("r1", "autumn"):
        publish_toy(repository, name, tmp_path)
    given = names_given(repository)
    (repository / ".names.json").unlink()  # as in repositories of earlier commits
    remove(repository, "autumn")
    remove(repository, "r1")
    assert names_given(repository) == given
    assert next_release_name(repository) == "r2"
    with pytest.raises(InvalidInput, match=r"^release name autumn was given to other content .* one is r2$"):
        publish_toy(repository, "autumn", tmp_path / "other", padding_bytes=2000)
    assert publish_toy(repository, "autumn", tmp_path / "same"), "it comes back as it was"
    assert release_names(repository) == ["autumn"]


def test_a_ledger_that_cannot_be_read_is_named_and_not_replaced(tmp_path):
    publish_toy(tmp_path / "models", "r1", tmp_path)
    ledger = tmp_path / "models" / ".names.json"
    for text in ("", "{", "[]", '{"format": 2, "names": {}}', '{"format": 1, "names": []}'):
        ledger.write_text(text)
        with pytest.raises(ReleaseError, match=r"cannot read .*\.names\.json, which remembers"):
            publish_toy(tmp_path / "models", "r2", tmp_path / "r2")
        assert ledger.read_text() == text


def test_a_changed_file_is_named(tmp_path):
    publish_toy(tmp_path / "models", "r1", tmp_path)
    (tmp_path / "models/r1/padding.bin").write_bytes(b"\0" * 1000)
    with pytest.raises(ReleaseError, match=r"sha256 mismatch r1/padding\.bin"):
        open_release(tmp_path / "models", "r1").verify()


def test_remove_takes_a_release_with_its_members_but_never_the_active_one(tmp_path):
    repository = tmp_path / "models"
    publish_toy(repository, "r1", tmp_path, activate=True)
    publish_toy(repository, "r2", tmp_path)
    with pytest.raises(ReleaseError, match="release r1 is active"):
        remove(repository, "r1")
    with pytest.raises(ReleaseError, match=r"no release 'r3' in .*; there are: r1, r2"):
        remove(repository, "r3")
    remove(repository, "r2")
    assert release_names(repository) == ["r1"]
    assert member_folders(repository, "r2") == []


def test_sweep_removes_old_leftovers_and_nothing_else_and_says_so(tmp_path):
    repository, told = tmp_path / "models", []
    publish_toy(repository, "r1", tmp_path, activate=True)
    publish_toy(repository, "r2", tmp_path)
    (repository / "r2" / "manifest.json").unlink()  # half a release, not active
    (repository / ".staging-1-dead").mkdir()
    (repository / "other_model" / "1").mkdir(parents=True)
    (repository / "other_model" / "config.pbtxt").write_text('name: "other_model"')
    assert sweep(repository, told.append) == []
    assert told == [], "what is younger than an hour may be a copy under way"
    removed = sweep(repository, told.append, min_age_s=0)
    assert set(removed) >= {".staging-1-dead", "r2", "r2_ranker", "r2_recommend"}
    first, second = told
    assert first.startswith("removing .staging-1-dead from ")
    assert second.startswith("removing r2, r2_features, ")
    assert second.endswith(": parts of a release without r2/manifest.json")
    assert (repository / "other_model").exists()
    assert member_folders(repository, "r2") == []
    open_release(repository, "r1").verify()
    assert sweep(repository, told.append, min_age_s=0) == []


def test_sweep_removes_files_that_killed_commands_were_writing(tmp_path):
    repository, home = tmp_path / "models", tmp_path / "home"
    publish_toy(repository, "r1", tmp_path, activate=True)
    home.mkdir()
    left = [repository / "..names.json.10131", repository / ".recommend.77", home / "..route.json.5"]
    for path in left:
        path.write_text("{")
    before = {path.name for path in repository.iterdir()}
    assert sweep(repository, print, home=home) == [], "it may be written just now"
    assert sweep(repository, print, min_age_s=0, home=home) == [path.name for path in (*left[:2], left[2])]
    assert {path.name for path in repository.iterdir()} == before - {path.name for path in left}
    assert not left[2].exists()


def test_a_copy_that_lasts_for_hours_is_as_young_as_its_newest_file(tmp_path):
    repository = tmp_path / "models"
    publish_toy(repository, "r1", tmp_path)
    (repository / "r1" / "manifest.json").unlink()
    for path in repository.rglob("*"):
        os.utime(path, (0, 0))  # as tools that copy times with the files do
    time.sleep(0.6)
    (repository / "r1_ranker" / "config.pbtxt").touch()
    assert sweep(repository, print, min_age_s=0.5) == []
    time.sleep(0.6)
    assert "r1_recall" in sweep(repository, print, min_age_s=0.5)


def test_half_a_release_is_not_built_over_but_can_be_removed(tmp_path):
    repository = tmp_path / "models"
    publish_toy(repository, "r1", tmp_path)
    (repository / "r1" / "manifest.json").unlink()
    shutil.rmtree(repository / "r1_ranker")
    (repository / "r1_plans" / "key" / "r1_ranker").mkdir(parents=True)
    (repository / "r1_other").mkdir()
    assert list(half_releases(repository)) == ["r1"]
    with pytest.raises(
        InvalidInput, match=r"of a release without a manifest: .* `peregrine release remove r1`"
    ):
        publish_toy(repository, "r1", tmp_path / "again")
    remove(repository, "r1")
    assert sorted(path.name for path in repository.glob("r1*")) == ["r1_other"], "none of the release's"
    assert publish_toy(repository, "r1", tmp_path / "once more")


def test_sweep_spares_the_active_release_even_if_it_is_half_there(tmp_path):
    publish_toy(tmp_path / "models", "r1", tmp_path, activate=True)
    (tmp_path / "models/r1/manifest.json").unlink()
    assert sweep(tmp_path / "models", print, min_age_s=0) == []


def test_sweep_spares_a_living_builds_staging(tmp_path):
    with staging(tmp_path) as folder:
        assert sweep(tmp_path, print, min_age_s=0) == []
        assert folder.exists()
    assert not folder.exists()


def test_lock_names_its_holder(tmp_path):
    with (
        locked(tmp_path),
        pytest.raises(ReleaseError, match=f"is being changed by process {os.getpid()}"),
        locked(tmp_path, wait_s=0.1),
    ):
        pass


@pytest.mark.parametrize("fail_at", [1, 4, 9])
def test_full_disk_says_how_much_is_needed_and_leaves_nothing(tmp_path, monkeypatch, fail_at):
    repository = tmp_path / "models"
    publish_toy(repository, "r1", tmp_path, activate=True)
    copied, copy = [], publishing._copy_file

    def full(source, target):
        copied.append(source)
        if len(copied) == fail_at:
            raise OSError(errno.ENOSPC, "No space left on device", str(target))
        return copy(source, target)

    monkeypatch.setattr(publishing, "_copy_file", full)
    with pytest.raises(ReleaseError, match=r"publish: no space left in .*, need 2\.0 MB for release r2"):
        publish_toy(repository, "r2", tmp_path, padding_bytes=2_000_000)
    assert not any("r2" in p.name or p.name.startswith(".staging") for p in repository.iterdir())
    monkeypatch.undo()
    publish_toy(repository, "r3", tmp_path)
    assert release_names(repository) == ["r1", "r3"]


PUBLISHER = """
import sys, itertools
from pathlib import Path
sys.path[:0] = [{root!r}, {tests!r}]
from toy_repository import publish_toy
from ensemble.release.names import next_release_name
from ensemble.release.repository import remove
repository, scratch = Path({repository!r}), Path({scratch!r})
print("ready", flush=True)
for i in itertools.count():
    name = next_release_name(repository)
    publish_toy(repository, name, scratch / str(i), padding_bytes=3_000_000)
    if i % 2:
        remove(repository, name)
"""


def test_kill_9_at_random_moments_leaves_only_whole_releases(tmp_path):
    repository, rng = tmp_path / "models", random.Random(7)
    publish_toy(repository, "r1", tmp_path, activate=True)
    for kill in range(10):
        scratch = tmp_path / f"scratch{kill}"
        code = PUBLISHER.format(
            root=str(ROOT),
            tests=str(ROOT / "tests" / "helpers"),
            repository=str(repository),
            scratch=str(scratch),
        )
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
        assert process.stdout.readline()
        time.sleep(rng.uniform(0.0, 0.25))
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert active_release(repository) == "r1"
        for name in release_names(repository):
            open_release(repository, name).verify()
            assert len(member_folders(repository, name)) == 7
        sweep(repository, print, min_age_s=0)
        whole = {
            f.name
            for name in release_names(repository)
            for f in (repository / name, *member_folders(repository, name))
        }
        left = {p.name for p in repository.iterdir() if p.name not in (".lock", ".names.json")}
        assert left == {*whole, "recommend"}
    publish_toy(repository, next_release_name(repository), tmp_path / "last")
