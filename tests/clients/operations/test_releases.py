"""Releases are turned under load without one failed request; a bad one never gets that far."""

from __future__ import annotations

import json
import shutil
import sys
import threading
import time

import numpy as np
import pytest
from toy_repository import allow_toys, publish_toy
from variants import answering

import peregrine
from clients.operations import releases
from clients.operations.listing import list_releases
from ensemble.errors import InvalidInput, ReleaseError, ServerError
from ensemble.release.names import release_names
from ensemble.release.release import active_release, open_release
from ensemble.server.control import Control
from ensemble.server.options import ServeOptions
from ensemble.server.running import running_server
from ensemble.server.supervisor import serve
from ensemble.server.turning import Turning


@pytest.fixture
def repository(tmp_path, monkeypatch):
    allow_toys(monkeypatch)
    publish_toy(tmp_path / "models", "r1", tmp_path, activate=True)
    publish_toy(tmp_path / "models", "r2", tmp_path)
    return tmp_path / "models"


def test_activate_without_a_server_writes_the_alias(repository):
    done = releases.activate(repository, "r2")
    assert (done.release, done.previous, done.served) == ("r2", "r1", False)
    assert active_release(repository) == "r2"
    assert (repository / "recommend" / "1").is_dir()


def test_first_activation_makes_the_alias(tmp_path, monkeypatch):
    allow_toys(monkeypatch)
    publish_toy(tmp_path / "models", "r1", tmp_path)
    assert releases.activate(tmp_path / "models", "r1").previous is None
    assert active_release(tmp_path / "models") == "r1"


def test_a_changed_release_is_not_activated(repository):
    (repository / "r2" / "padding.bin").write_bytes(b"other")
    with pytest.raises(ReleaseError, match=r"sha256 mismatch r2/padding\.bin"):
        releases.activate(repository, "r2")
    assert active_release(repository) == "r1"


def test_an_absent_release_and_repository_are_named(repository):
    with pytest.raises(ReleaseError, match=r"no release 'r7' in .*; there are: r1, r2"):
        releases.activate(repository, "r7")
    with pytest.raises(InvalidInput, match="release name 'R!'"):
        releases.activate(repository, "R!")
    with pytest.raises(InvalidInput, match="does not exist"):
        list_releases(repository / "nowhere")
    with pytest.raises(InvalidInput, match="does not exist"):
        releases.remove(repository / "nowhere", "r1")


def test_the_list_names_half_copies_and_goes_on(repository, tmp_path):
    """Members are copied first, the manifest last; a copy that was killed in between, or lost a file."""
    for name in ("r3", "r10"):
        publish_toy(repository, name, tmp_path)
    (repository / "r10" / "manifest.json").unlink()
    shutil.rmtree(repository / "r3_ranker")
    (repository / "r2_reranking" / "2").mkdir()
    r1, r2, r3, r10 = list_releases(repository)
    assert (r1.problem, r1.is_active, r1.share, r1.id) == ("", True, 1.0, open_release(repository, "r1").id)
    assert 0 <= r1.age_s < 60
    assert r2.problem == "not a file of it, yet in its folders: r2_reranking/2/"
    assert r3.problem == "half a copy: r3_ranker/1/model.py and 1 more files are missing"
    assert r10.problem.startswith("half a copy: r10/manifest.json is missing (there are r10, r10_features, ")
    (repository / "r2_reranking" / "2").rmdir()
    (repository / "r2" / "padding.bin").write_bytes(b"1")
    (repository / "r3" / "manifest.json").write_text("{")
    r1, r2, r3, r10 = list_releases(repository)
    assert r2.problem == "changed: r2/padding.bin has 1 bytes, its manifest says 1000"
    assert r3.problem.startswith(f"cannot read {repository / 'r3' / 'manifest.json'}: ")
    with pytest.raises(ReleaseError, match="no release 'r10'"):
        releases.activate(repository, "r10")
    releases.remove(repository, "r10")
    assert [info.name for info in list_releases(repository)] == ["r1", "r2", "r3"]


def test_the_list_shows_what_a_build_said(tiny_repository):
    (info,) = list_releases(tiny_repository)
    manifest = releases.show(tiny_repository, "r1")
    assert (info.id, info.preset, info.compression) == (manifest["id"], "tiny", "none")
    assert next(iter(info.figures)) == "worth"
    assert info.figures["worth"] == manifest["report"]["worth"]["ways"]["chain"]["worth"]
    assert info.figures["ndcg@10"] == manifest["report"]["ranking"]["ways"]["chain"]["ndcg@10"]
    assert info.figures["auc ctr"] == manifest["report"]["tasks"]["ctr"]["auc"]


def test_command_line_lists_shows_activates_and_removes(repository, capsys, monkeypatch):
    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["peregrine", "release", *arguments, "-r", str(repository)])
        with pytest.raises(SystemExit) as end:
            peregrine.main()
        return int(end.value.code or 0), *capsys.readouterr()

    assert [(r["name"], r["is_active"]) for r in json.loads(run("list", "--json")[1])] == [
        ("r1", True),
        ("r2", False),
    ]
    assert json.loads(run("show", "r2", "--json")[1])["release"] == "r2"
    assert run("activate", "r2", "--require", "gpus") == (
        2,
        "",
        "error: --require gpus: known are tensorrt, rtx, onnxruntime-gpu, onnxruntime\n",
    )
    code, _, error = run("activate", "r2", "--require", "tensorrt")
    assert (code, active_release(repository)) == (2, "r1")
    assert error.startswith(f"error: --require tensorrt: no server is at work on {repository}, which alone")
    assert run("activate", "r2")[1] == "release r2 is active (was r1); no server is running here\n"
    assert run("remove", "r2") == (
        2,
        "",
        "error: release r2 is active; activate another one first: peregrine release activate NAME\n",
    )
    assert run("remove", "r1")[0] == 0
    assert release_names(repository) == ["r2"]


class Callers:
    """Clients that ask hundreds of times a second, and what they got."""

    def __init__(self, url: str, count: int = 4) -> None:
        self.releases: list[str] = []
        self.failures: list[str] = []
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(url,)) for _ in range(count)]

    def _ask(self, url: str) -> None:
        from tritonclient.grpc import InferenceServerClient, InferInput

        client, user = InferenceServerClient(url), InferInput("user_id", [1, 1], "BYTES")
        user.set_data_from_numpy(np.array([[b"u"]], dtype=object))
        while not self._stop.is_set():
            try:
                self.releases.append(client.infer("recommend", [user]).as_numpy("release")[0, 0].decode())
            except Exception as error:
                self.failures.append(str(error))
            time.sleep(0.005)

    def __enter__(self) -> Callers:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


@pytest.mark.triton
def test_turning_there_and_back_under_load_fails_no_request(repository):
    with serve(repository, ServeOptions(port=0, metrics_port=None)) as server, Callers(server.url) as callers:
        for name in ("r2", "r1"):
            done = releases.activate(repository, name)
            assert done.served
            assert done.flip_ms < 1000, "members were loaded again: their version folders changed"
            seen = len(callers.releases)
            while len(callers.releases) < seen + 20 and not callers.failures:
                time.sleep(0.002)
            assert set(callers.releases[seen + 8 :]) == {name}
            with Control(running_server(repository)) as control:
                assert all(model == "recommend" or model.startswith(f"{name}_") for model in control.models())
    assert callers.failures == []


@pytest.mark.triton
def test_a_release_that_cannot_load_leaves_the_old_one_serving(repository, tmp_path):
    publish_toy(repository, "r3", tmp_path, broken="raise ValueError('no such planet')")
    with (
        serve(repository, ServeOptions(port=0, metrics_port=None)) as server,
        Callers(server.url, 2) as callers,
    ):
        with pytest.raises(ReleaseError, match=r"release r3 is not activated, r1 goes on: .*no such planet"):
            releases.activate(repository, "r3")
        assert active_release(repository) == "r1"
        assert answering(repository) == "r1"
        releases.remove(repository, "r3")
    assert callers.failures == []
    assert set(callers.releases) == {"r1"}


@pytest.mark.triton
def test_a_flip_that_goes_wrong_is_taken_back(repository, monkeypatch):
    with serve(repository, ServeOptions(port=0, metrics_port=None)):
        check = Turning._check

        def fail_through_the_alias(self, model, route, pipeline="recommend"):
            if model == "recommend":
                raise ServerError("the canary died")
            check(self, model, route, pipeline)

        monkeypatch.setattr(Turning, "_check", fail_through_the_alias)
        with pytest.raises(ReleaseError, match="release r2 is not activated, r1 goes on: the canary died"):
            releases.activate(repository, "r2")
        assert active_release(repository) == "r1"
        assert answering(repository) == "r1"
