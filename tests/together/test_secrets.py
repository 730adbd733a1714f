"""What is secret, and who a user is, stays out of command lines, environments, logs, metrics and images."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from ports import free_port
from redis_server import RedisServer
from shops import ROOT, one_thread, private_copy

from clients import Client, PeregrineError

PASSWORD, USER, ITEM = "planted-password-7d3f", "planted-user-91ac", "planted-item-44be"
COPIED = {"builders", "ensemble", "clients"}


@dataclass
class Site:
    """A server at work as a command of its own, all that it said, and its state folder."""

    process: subprocess.Popen[bytes]
    port: int
    http_port: int
    state: Path
    log: Path

    def processes(self) -> dict[int, str]:
        """Command lines and environments of the server and of all that it started."""
        parents = {}
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
        ours = {self.process.pid}
        while more := {pid for pid, parent in parents.items() if parent in ours} - ours:
            ours |= more
        return {pid: "\n".join(_read(pid, name) for name in ("cmdline", "environ")) for pid in ours}

    def said(self) -> str:
        """Its log, and what its HTTP port tells."""
        texts = [self.log.read_text(errors="replace")]
        for path in ("metrics", "readyz", "livez"):
            try:
                reply = urllib.request.urlopen(f"http://127.0.0.1:{self.http_port}/{path}", timeout=10)
            except urllib.error.HTTPError as error:  # a busy machine may not be ready: it says why
                reply = error
            with reply:
                texts.append(reply.read().decode())
        return "\n".join(texts)


def _read(pid: int, name: str) -> str:
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


@pytest.fixture(scope="module")
def site(tiny_repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("site")
    redis = RedisServer(folder, "--requirepass", PASSWORD)
    url = folder / "redis-url"
    url.write_text(f"redis://:{PASSWORD}@127.0.0.1:{redis.port}\n")
    repository = private_copy(tiny_repository, folder / "repository")
    port, http_port = free_port(), free_port()
    words = ["--port", str(port), "--http-port", str(http_port), "--metrics-port", str(free_port())]
    words += ["--state", str(folder / "state"), "--redis", f"@{url}", "--fused", "--verbose"]
    log = folder / "log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, ROOT / "peregrine.py", "serve", "-r", repository, *words],
            stdout=file,
            stderr=file,
            env=one_thread(PYTHONPATH=str(ROOT)),
        )
    try:
        until = time.monotonic() + 240
        while "Ctrl-C or SIGTERM" not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < until, log.read_text()
            time.sleep(0.1)
        yield Site(process, port, http_port, folder / "state", log)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)
        redis.stop()


@pytest.fixture(scope="module")
def asked(site: Site) -> Site:
    """The site, after a planted user has asked well and badly."""
    with Client(f"127.0.0.1:{site.port}", fallback=False) as client:
        client.recommend(USER, session_items=[ITEM], exclude_items=[ITEM])
        client.recommend_many([USER, "u1"], top_k=[3, 4])
        assert client.recommend(USER, allow={"brand": [USER]}).item_ids == ()
        for options in ({"top_k": 0}, {"diversity": 7.0}, {"weights": {USER: 1.0}}):
            with pytest.raises(PeregrineError):
                client.recommend(USER, **options)  # type: ignore[arg-type]
    return site


@pytest.mark.triton
@pytest.mark.redis
def test_the_password_of_redis_is_in_no_command_line_environment_log_or_metric(asked: Site) -> None:
    texts = asked.processes()
    assert len(texts) >= 4, "serve, the items' writer, tritonserver and two steps"
    assert not [text for text in texts.values() if PASSWORD in text]
    assert any("redis-url" in text for text in texts.values()), "the grep finds what is there"
    said = asked.said()
    assert PASSWORD not in said
    assert "peregrine_ready" in said


@pytest.mark.triton
@pytest.mark.redis
def test_no_user_and_no_item_that_was_asked_for_is_in_a_log_or_a_metric(asked: Site) -> None:
    said = asked.said()
    assert USER not in said
    assert ITEM not in said
    assert "recommend" in said, "the grep finds what is there"


@pytest.mark.triton
@pytest.mark.redis
def test_the_key_of_control_calls_is_told_to_tritonserver_alone(asked: Site) -> None:
    # It takes it by its command line only: README says what follows
    [key] = {json.loads(path.read_text())["secret"] for path in asked.state.rglob("server.json")}
    holders = [text for text in asked.processes().values() if key in text]
    assert len(holders) == 1
    assert "--grpc-restricted-protocol=" in holders[0]
    assert key not in asked.said()


@pytest.mark.triton
@pytest.mark.redis
def test_files_that_hold_secrets_are_their_owners_alone(asked: Site) -> None:
    [server] = asked.state.rglob("server.json")
    secrets = (PASSWORD, json.loads(server.read_text())["secret"])
    holding = [
        path
        for path in asked.state.rglob("*")
        if path.is_file() and any(one.encode() in path.read_bytes() for one in secrets)
    ]
    assert server in holding
    assert {path.name: path.stat().st_mode & 0o077 for path in holding} == {path.name: 0 for path in holding}


@pytest.mark.parametrize("name", ["serve.Dockerfile", "build.Dockerfile"])
def test_an_image_is_made_of_the_sources_and_is_told_no_secret(name: str) -> None:
    text = (ROOT / "docker" / name).read_text()
    sources = {
        word.rstrip("/")
        for line in re.findall(r"^COPY (?!--from)(.*)$", text, re.MULTILINE)
        for word in line.split()[:-1]
    }
    assert sources - COPIED <= {
        "docker/install.sh",
        "docker/${LOCK}",
        "docker/build-py311.lock",
        "pyproject.toml",
        "README.md",
        "peregrine.py",
    }
    assert sources >= COPIED
    assert not re.search(r"^(?:ADD|ARG|ENV).*(?:PASSWORD|SECRET|TOKEN|CREDENTIAL|REDIS)", text, re.MULTILINE)


def test_no_source_of_an_image_holds_a_key() -> None:
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    rules = [line for line in ignored if line and not line.startswith("#")]
    assert rules[0] == "*"
    key = re.compile(rb"-----BEGIN [A-Z ]*PRIVATE KEY-----\n|AKIA[0-9A-Z]{16}")
    for folder in sorted(COPIED):
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                assert not key.search(path.read_bytes()), path


def test_manifests_and_the_gateway_take_secrets_as_files() -> None:
    yaml = pytest.importorskip("yaml")
    for path in [
        *(ROOT / "docker" / "kubernetes").rglob("*.yaml"),
        *(ROOT / "docker" / "nginx").glob("*.yaml"),
    ]:
        text = json.dumps(list(yaml.safe_load_all(path.read_text())))
        assert "secretRef" not in text, path
        assert "secretKeyRef" not in text, path
