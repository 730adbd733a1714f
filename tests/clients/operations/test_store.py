"""Releases travel through a store whole or not at all; a node without its store serves what it has."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from shops import private_copy
from toy_repository import allow_toys, publish_toy

import peregrine
from clients import Client, ItemClient
from clients.errors import ServerFault
from clients.operations import releases
from clients.operations.pull import _is_known, pull, what_is_here
from clients.operations.push import push
from clients.operations.store import Store, StoreError
from ensemble.errors import InvalidInput, ReleaseError
from ensemble.release.names import release_names
from ensemble.release.release import active_release, open_release
from ensemble.release.store_state import read_store_state
from ensemble.server.options import ServeOptions
from ensemble.server.supervisor import serve


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """A real S3 API on loopback; its log is of no use here."""
    pytest.importorskip("s3fs")
    server_module = pytest.importorskip("moto.server")
    import logging

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    names = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "me",
        "AWS_SECRET_ACCESS_KEY": "it",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in names.items():
            patch.setenv(name, value)
        import s3fs

        s3fs.S3FileSystem().mkdir("shop")
        yield "s3://shop"
    server.stop()


@pytest.fixture(params=["folder", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "folder":
        return str(tmp_path / "store")
    return f"{request.getfixturevalue('s3')}/{tmp_path.name}"


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    allow_toys(monkeypatch)
    publish_toy(tmp_path / "models", "r1", tmp_path, activate=True)
    publish_toy(tmp_path / "models", "r2", tmp_path)
    return tmp_path / "models"


def blobs_of(repository: Path, name: str) -> set[str]:
    return {entry["sha256"] for entry in open_release(repository, name).manifest["files"].values()}


def test_what_is_served_travels_whole_and_only_what_is_missing_travels(url, repository, tmp_path):
    store, node = Store(url), tmp_path / "node"
    pushed = push(repository, store)
    assert (pushed.releases, pushed.blobs) == (("r1",), len(blobs_of(repository, "r1")))
    assert push(repository, store).blobs == 0
    pulled = pull(node, Store(url))
    assert (pulled.releases, active_release(node)) == (("r1",), "r1")
    release = open_release(node, "r1")
    release.verify()
    assert release.id == open_release(repository, "r1").id
    assert (node / "r1_recommend" / "1").is_dir()
    assert pull(node, Store(url)).releases == ()
    assert push(repository, store, ["r2"]).blobs == len(
        blobs_of(repository, "r2") - blobs_of(repository, "r1")
    )
    pull(node, Store(url), ["r2"])
    assert (release_names(node), active_release(node)) == (["r1", "r2"], "r1")
    releases.activate(repository, "r2")
    push(repository, store)
    assert pull(node, store).route >= 1
    assert active_release(node) == "r2"
    assert not list(node.glob(".pull-*"))


def test_a_pull_that_was_killed_goes_on_where_it_stopped(repository, tmp_path, monkeypatch):
    store, node = Store(str(tmp_path / "store")), tmp_path / "node"
    push(repository, store)
    fetched, get_blob = [], Store.get_blob

    def killed(self: Store, digest: str, target: Path) -> None:
        if len(fetched) == 3:
            raise KeyboardInterrupt
        fetched.append(digest)
        get_blob(self, digest, target)

    monkeypatch.setattr("clients.operations.pull.THREADS", 1)
    monkeypatch.setattr(Store, "get_blob", killed)
    with pytest.raises(KeyboardInterrupt):
        pull(node, store)
    assert release_names(node) == []
    again: list[str] = []
    monkeypatch.setattr(
        Store, "get_blob", lambda self, digest, to: (again.append(digest), get_blob(self, digest, to))
    )
    pull(node, store)
    assert not set(again) & set(fetched)
    open_release(node, "r1").verify()


def test_half_a_file_is_gone_on_with_and_a_wrong_half_is_fetched_anew(tmp_path):
    store, data = Store(str(tmp_path / "store")), os.urandom(10_000)
    import hashlib

    digest = hashlib.sha256(data).hexdigest()
    store.put_blob(digest, data)
    for half in (data[:4000], b"x" * 4000, data + b"more"):
        (tmp_path / ".file.part").write_bytes(half)
        store.get_blob(digest, tmp_path / "file")
        assert (tmp_path / "file").read_bytes() == data


def test_a_changed_blob_never_becomes_a_release(url, repository, tmp_path):
    store = Store(url)
    push(repository, store)
    entry = open_release(repository, "r1").manifest["files"]["r1/schema.json"]
    store.put_blob(entry["sha256"], b"x" * entry["bytes"])
    with pytest.raises(StoreError, match="is not what its name says"):
        pull(tmp_path / "node", store)
    assert release_names(tmp_path / "node") == []


def test_what_a_store_has_lost_or_damaged_is_pushed_again_as_the_error_says(repository, tmp_path):
    store = Store(str(tmp_path / "store"))
    push(repository, store)
    digest = open_release(repository, "r1").manifest["files"]["r1/schema.json"]["sha256"]
    blob = tmp_path / "store" / "blobs" / digest[:2] / digest
    good = blob.read_bytes()
    blob.write_bytes(b"x" * len(good))
    with pytest.raises(StoreError, match=f"delete blobs/{digest[:2]}/{digest} there, and push the release"):
        pull(tmp_path / "node", store)
    blob.unlink()
    with pytest.raises(StoreError, match="push the release again"):
        pull(tmp_path / "node", store)
    assert push(repository, store, ["r1"]).blobs == 1
    assert push(repository, store, ["r1"]).blobs == 0
    assert blob.read_bytes() == good
    pull(tmp_path / "node", store)
    open_release(tmp_path / "node", "r1").verify()


def test_a_manifest_that_names_a_file_elsewhere_is_refused(repository, tmp_path):
    from ensemble.release.manifest import sealed

    store = Store(str(tmp_path / "store"))
    push(repository, store)
    manifest = json.loads(store.read("releases/r1.json") or b"")
    manifest["files"]["../outside"] = next(iter(manifest["files"].values()))
    store.write("releases/r1.json", sealed(manifest).encode())
    with pytest.raises(StoreError, match="outside its folders"):
        pull(tmp_path / "node", store)
    assert not (tmp_path / "outside").exists()


def test_a_name_of_the_store_is_given_once(url, repository, tmp_path, monkeypatch):
    store = Store(url)
    push(repository, store)
    publish_toy(tmp_path / "others", "r1", tmp_path / "o", activate=True, padding_bytes=2000)
    with pytest.raises(InvalidInput, match="is another one"):
        push(tmp_path / "others", store)


def test_several_pulls_at_once_give_one_release(url, repository, tmp_path):
    push(repository, Store(url))
    with ThreadPoolExecutor(3) as pool:
        done = list(pool.map(lambda _: pull(tmp_path / "node", Store(url), ["r1"]), range(3)))
    assert sorted(len(one.releases) for one in done) == [0, 0, 1]
    open_release(tmp_path / "node", "r1").verify()


def test_a_node_that_cannot_reach_its_store_serves_what_it_has_and_says_so(
    repository, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "me")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "it")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    pytest.importorskip("s3fs")
    monkeypatch.setattr(
        "sys.argv", ["peregrine", "pull", "s3://lost", "-r", str(repository), "--serve-what-is-here"]
    )
    with pytest.raises(SystemExit) as ended:
        peregrine.main()
    assert ended.value.code in (0, None)
    assert "release r1, which is here, is served" in capsys.readouterr().err
    state = read_store_state(repository)
    assert state
    assert "cannot be used" in state.problem
    assert what_is_here(tmp_path / "empty") == ""


def test_an_address_with_a_password_is_refused_without_repeating_it():
    with pytest.raises(InvalidInput) as error:
        Store("s3://me:secret@bucket/x")
    assert "secret" not in str(error.value)


def test_what_is_not_in_the_store_is_named(url, repository, tmp_path):
    with pytest.raises(StoreError, match="no route"):
        pull(tmp_path / "node", Store(url))
    push(repository, Store(url), ["r2"])
    with pytest.raises(ReleaseError, match="there are: r2"):
        pull(tmp_path / "node", Store(url), ["r9"])


@pytest.mark.triton
def test_an_item_added_on_one_node_is_recommended_on_another(tiny_repository, tmp_path):
    first, node, store = tmp_path / "first", tmp_path / "node", Store(str(tmp_path / "store"))
    private_copy(tiny_repository, first)
    releases.activate(first, "r1")
    from ensemble.live.keeper import service_process

    with service_process(first):
        push(first, store)
        pull(node, store)
        options = ServeOptions(0, None, fused=True, state=tmp_path / "state")
        with (
            serve(node, options, beside=lambda: service_process(node)) as server,
            Client(server.url) as client,
        ):
            with ItemClient(first) as items:
                added = items.add({"item_id": "brand-new", "title": "a new lipstick"})
            started = time.monotonic()
            push(first, store)
            assert pull(node, store).sequence == added.sequence
            while client.recommend("u1").sequence < added.sequence:
                assert time.monotonic() - started < 15
            with ItemClient(node) as here:
                assert here.status().sequence == added.sequence
            with ItemClient(node) as here:
                here.add({"item_id": "mine", "title": "mine"})
            with ItemClient(first) as items:
                items.add({"item_id": "other", "title": "other"})
            push(first, store)
            with pytest.raises(ServerFault, match="items were changed here, too"):
                pull(node, store)


def test_a_log_of_the_same_length_that_says_something_else_is_not_taken_for_the_stores(tmp_path):
    log, text = tmp_path / "log", b"one line\nother line\n"
    chunks = [
        {"sha256": hashlib.sha256(piece).hexdigest(), "bytes": len(piece)} for piece in (text[:9], text[9:])
    ]
    assert not _is_known(log, chunks)
    for content, is_known in ((text, True), (text[:9] + b"OTHER line\n", False), (text + b"x", False)):
        log.write_bytes(content)
        assert _is_known(log, chunks) is is_known
