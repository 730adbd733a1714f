"""Two servers of one repository, which an ordinary user may only read: what is done to one reaches both."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import pytest
from as_nobody import NOBODY, run_as_nobody, why_not
from shops import private_copy
from variants import publish_variant

# As nobody: two servers of one home, of which the first one writes items; then it ends.
PROGRAM = """\
import contextlib, sys, time
from pathlib import Path
from clients import Client
from clients.items import ItemClient
from clients.operations import releases
from ensemble.live.keeper import service_process
from ensemble.release.repository import put_route
from ensemble.release.route import Share, next_route, read_route
from ensemble.server.options import ServeOptions
from ensemble.server.running import running_servers
from ensemble.server.supervisor import serve

repository, home, said = Path(sys.argv[1]), Path(sys.argv[2]), []
assert "CapEff:\\t0000000000000000" in Path("/proc/self/status").read_text()
with contextlib.suppress(OSError):
    (repository / "r1" / "new").touch()
    raise AssertionError("the repository can be written to")

def started(stack, state):
    options = ServeOptions(port=0, metrics_port=None, fused=True, catalogue=home, state=state)
    beside = lambda: service_process(repository, said.append, home)
    server = stack.enter_context(serve(repository, options, said.append, beside))
    return stack.enter_context(Client(server.url))

def until(holds, within_s):
    started_s = time.monotonic()
    while not holds():
        assert time.monotonic() - started_s < within_s, said
        time.sleep(0.02)
    return time.monotonic() - started_s

def shown(client):
    return client.recommend("u1", top_k=5, allow={"brand": ["Neverseen"]}).item_ids

def add(item_id):
    with ItemClient(home, wait_s=5) as items:
        assert items.upsert({"item_id": item_id, "brand": "Neverseen"}).done

with contextlib.ExitStack() as second:
    with contextlib.ExitStack() as first:
        one, other = started(first, home / "one"), started(second, home / "other")
        assert len({server.url for server in running_servers(repository, home)}) == 2
        assert {client.recommend("u1").release for client in (one, other)} == {"r1"}
        add("first")
        print("item", until(lambda: shown(one) == shown(other) == ("first",), 1.0))
        done = releases.activate(repository, "r2", home=home)
        assert (done.served, done.notes, done.warning) == (True, (), ""), done
        assert {client.recommend("u1").release for client in (one, other)} == {"r2"}
        assert shown(one) == shown(other) == ("first",)
        # as a command does that cannot reach these servers
        put_route(repository, next_route(read_route(home), [Share("r1", 1.0)]), home)
        follows = lambda: {client.recommend("u1").release for client in (one, other)} == {"r1"}
        print("route", until(follows, 20.0))
        until(lambda: sum("is followed: release r1 is served" in line for line in said) == 2, 20.0)
    until(lambda: (home / ".live" / "writer.json").exists(), 10.0)  # the other one's writer takes over
    until(lambda: len(running_servers(repository, home)) == 1, 5.0)
    add("second")
    assert set(shown(other)) == {"first", "second"}
assert not [path.name for path in home.iterdir() if not path.name.startswith(".")], "states are gone"
print("warnings", [line for line in said if "WARNING" in line])
"""


@pytest.mark.triton
@pytest.mark.timeout(120)
def test_an_ordinary_user_serves_a_read_only_repository_twice(tiny_repository: Path, tmp_path: Path) -> None:
    if why := why_not():
        pytest.skip(why)
    with tempfile.TemporaryDirectory() as folder:  # where nobody may go, unlike tmp_path
        repository = private_copy(tiny_repository, Path(folder) / "repository")
        publish_variant(repository, "r1", "r2", tmp_path)
        shutil.rmtree(repository / ".live", ignore_errors=True)
        (home := Path(folder) / "home").mkdir()
        os.chown(home, NOBODY, NOBODY)
        os.chmod(folder, 0o755)
        done = run_as_nobody(repository, PROGRAM, [str(repository), str(home)], 100)
    assert done.returncode == 0, done.stderr
    assert "warnings []" in done.stdout, done.stdout
