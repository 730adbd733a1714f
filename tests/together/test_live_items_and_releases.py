"""Live items meet activations: going on, going back and staying work whatever was changed meanwhile."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from shops import ROOT, one_thread

from clients import Client
from clients.items import ItemClient
from clients.operations import releases
from ensemble.contract import Degraded
from ensemble.errors import ReleaseError, ServerError
from ensemble.live.keeper import service_process
from ensemble.release.names import release_names
from ensemble.release.release import active_release
from ensemble.server.control import Control
from ensemble.server.options import ServeOptions
from ensemble.server.running import running_server
from ensemble.server.supervisor import serve
from ensemble.server.turning import Turning


@pytest.fixture(scope="module")
def repository(tiny_shop: Path, tiny_repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with r1, active, and r2 of the same stages."""
    folder = tmp_path_factory.mktemp("together")
    shutil.copytree(tiny_shop, folder / "shop")
    shutil.copytree(tiny_shop.parent / "repository", folder / "repository")
    command = [sys.executable, "-m", "peregrine", "build", str(folder / "shop"), "--preset", "tiny"]
    command += ["--repository", str(folder / "repository"), "--release", "r2"]
    done = subprocess.run(command, cwd=ROOT, env=one_thread(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder / "repository"


@pytest.mark.triton
@pytest.mark.parametrize(
    ("fused", "instances"),
    [(False, None), pytest.param(True, None, marks=pytest.mark.long), (True, 3)],
    ids=["ensemble", "fused", "overlay"],
)
def test_changed_items_keep_no_release_from_being_activated(repository, fused, instances):
    """With a number of instances Triton mounts a folder of links, as it does for plans."""
    releases.activate(repository, "r1")
    options = ServeOptions(port=0, metrics_port=None, fused=fused, instances=instances)
    with serve(repository, options) as server, service_process(repository), Client(server.url) as client:
        wait_for_writer(repository)
        assert instances in (None, *map(len, server.stubs().values()))
        with ItemClient(repository, wait_s=5) as items:
            before = client.recommend("u1", top_k=5)
            changed = items.delete(before.items[0].item_id)
            after = client.recommend("u1", top_k=5)
            assert (after.release, after.sequence) == ("r1", changed.sequence)
            gone = {before.item_ids[0]}
            assert not gone & set(after.item_ids)
            changed = items.upsert({"item_id": "a new one", "brand": "Neverseen"})
            assert changed.unknown_values == {"brand": ["Neverseen"]}
            for name in ("r1", "r2", "r1"):  # the one that is served; the next; back to what was changed
                done = releases.activate(repository, name)
                assert (done.served, done.warning) == (True, "")
                answer = client.recommend("u1", top_k=5)
                assert (answer.release, answer.sequence) == (name, changed.sequence), "from the first on"
                assert not gone & set(answer.item_ids)
                only = client.recommend("u1", top_k=5, allow={"brand": ["Neverseen"]})
                assert only.item_ids == ("a new one",), "though no vocabulary has its brand"
                assert Degraded.UNKNOWN_VALUES not in only.degraded
                none = client.recommend("u1", top_k=5, allow={"brand": ["Nobody's"]})
                assert (none.item_ids, none.degraded) == ((), Degraded.UNKNOWN_VALUES)
                gone.add(answer.item_ids[0])
                changed = items.delete(answer.item_ids[0])  # while this release is the active one
                assert (changed.done, changed.release) == (True, name)
                assert not gone & set(client.recommend("u1", top_k=5).item_ids)


@pytest.mark.triton
def test_what_is_served_is_never_unloaded_and_what_is_removed_is_not_activated(repository, monkeypatch):
    releases.activate(repository, "r1")
    with serve(repository, ServeOptions(port=0, metrics_port=None)) as server, Client(server.url) as client:
        with monkeypatch.context() as patch:
            patch.setattr(Turning, "_check", _fails)
            with pytest.raises(ReleaseError, match=r"^release r1 is active, and could not be loaded again"):
                releases.activate(repository, "r1")
        assert client.recommend("u1").release == "r1", "it goes on"
        with monkeypatch.context() as patch:
            patch.setattr(Control, "unload_release", _fails)
            done = releases.activate(repository, "r2")
        assert done.warning == "a release that is served no longer is still loaded: the server is busy"
        assert (active_release(repository), client.recommend("u1").release) == ("r2", "r2")
        with pytest.raises(ReleaseError, match="release r2 is active"):
            releases.remove(repository, "r2")
        releases.remove(repository, "r1")
        with Control(running_server(repository)) as control:
            assert not [model for model in control.models() if model.startswith("r1_")]
        assert release_names(repository) == ["r2"]


def wait_for_writer(repository: Path) -> None:
    deadline = time.monotonic() + 30
    while not (repository / ".live" / "writer.json").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _fails(*_: object, **__: object) -> None:
    raise ServerError("the server is busy")
