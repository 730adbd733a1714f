"""The examples for Go and Java, built from Debian's packages, ask a real server and get what the twin
answers."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from shops import ROOT

from ensemble.contract import Degraded

# what each needs, and Debian's package of it
TOOLS = {
    "go": {
        "go": "golang-go",
        "protoc": "protobuf-compiler",
        "/usr/share/doc/protoc-gen-go-1-3": "protoc-gen-go-1-3",
        "/usr/share/gocode/src/google.golang.org/grpc": "golang-google-grpc-dev",
    },
    "java": {
        "javac": "default-jdk-headless",
        "protoc": "protobuf-compiler",
        "grpc_java_plugin": "protobuf-compiler-grpc-java-plugin",
        "/usr/share/java/grpc-netty.jar": "libgrpc-java",
        "/usr/share/java/protobuf.jar": "libprotobuf-java",
        "/usr/share/java/netty-all.jar": "libnetty-java",
        "/usr/share/java/perfmark-impl.jar": "libperfmark-java",
    },
}


@pytest.fixture(scope="module", params=TOOLS)
def example(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example's program."""
    tools = TOOLS[request.param]
    missing = [package for tool, package in tools.items() if not (shutil.which(tool) or Path(tool).exists())]
    if missing:
        pytest.skip(f"the toolchain of {request.param} is not whole (Debian: {' '.join(missing)})")
    folder = tmp_path_factory.mktemp(request.param)
    build = ["sh", str(ROOT / "clients" / request.param / "build.sh"), str(folder)]
    done = subprocess.run(build, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return folder / "recommend"


def asked(example: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(example), *arguments], capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.triton
def test_the_example_gets_what_the_twin_answers(example, tiny_server, twin):
    options = {"exclude_seen": False, "caps": {"brand": 2}, "deny": {"brand": ["Nobody's ü"]}}
    words = [part for name, value in options.items() for part in ("--option", f"{name}={json.dumps(value)}")]
    done = asked(example, "--top-k", "4", *words, tiny_server.url, "u1", "nobody")
    assert done.returncode == 0, done.stderr
    lines = [line.split("\t") for line in done.stdout.splitlines()]
    wanted = twin.recommend(["u1", "nobody"], {"top_k": 4, **options})
    assert wanted["degraded"][0, 0] == Degraded.UNKNOWN_VALUES
    tasks = json.loads(wanted["tasks"][0, 0])
    expected = [
        (user, place, name)
        for user, name in enumerate(("u1", "nobody"))
        for place, item in enumerate(wanted["item_ids"][user])
        if item
    ]
    assert len(lines) == len(expected) > 4
    for (user, place, name), line in zip(expected, lines, strict=True):
        item = wanted["item_ids"][user, place].decode()
        assert line[:4] == [name, "r1", str(wanted["degraded"][user, 0]), item]
        assert float(line[4]) == pytest.approx(wanted["scores"][user, place], rel=1e-4)
        values = dict(zip(tasks, wanted["probabilities"][user, place], strict=True))
        told = {task: float(value) for task, _, value in (part.partition("=") for part in line[5:])}
        assert told == pytest.approx(values, rel=1e-4)


@pytest.mark.triton
def test_the_example_is_told_what_is_wrong(example, tiny_server):
    done = asked(example, "--option", 'caps={"colour": 2}', tiny_server.url, "u1")
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert "colour" in done.stderr
