"""The example for Node asks a real server by the KServe v2 protocol alone, and gets what the twin answers."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from shops import ROOT
from tritonclient.grpc import service_pb2

EXAMPLE = ROOT / "clients" / "node"


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example with its packages, as `npm install` brings them."""
    if not shutil.which("npm"):
        pytest.skip("npm is not installed (Debian: nodejs npm)")
    folder = tmp_path_factory.mktemp("node") / "node"
    shutil.copytree(EXAMPLE, folder, ignore=shutil.ignore_patterns("node_modules"))
    install = ["npm", "install", "--no-audit", "--no-fund", "--ignore-scripts"]
    done = subprocess.run(install, cwd=folder, capture_output=True, text=True, timeout=100, check=False)
    if done.returncode:
        pytest.skip(f"npm cannot fetch the example's packages: {done.stderr.strip().splitlines()[-1]}")
    return folder


def asked(example: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["node", "recommend.mjs", *arguments]
    return subprocess.run(command, cwd=example, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.triton
def test_node_gets_what_the_twin_answers(example, tiny_server, twin):
    options = {"exclude_seen": False, "caps": {"brand": 2}, "deny": {"brand": ["Nobody's"]}}
    done = asked(example, tiny_server.url, "u1", "nobody", "--top-k", "4", "--options", json.dumps(options))
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    wanted = twin.recommend(["u1", "nobody"], {"top_k": 4, **options})
    tasks = json.loads(wanted["tasks"][0, 0])
    for line, answer in enumerate(answers):
        assert answer["release"] == "r1"
        assert answer["degraded"] == wanted["degraded"][line, 0]
        kept = [place for place, item in enumerate(wanted["item_ids"][line]) if item]
        assert [item["item_id"] for item in answer["items"]] == [
            wanted["item_ids"][line, place].decode() for place in kept
        ]
        for item, place in zip(answer["items"], kept, strict=True):
            assert item["score"] == pytest.approx(wanted["scores"][line, place], rel=1e-4)
            probabilities = dict(zip(tasks, wanted["probabilities"][line, place], strict=True))
            assert item["probabilities"] == pytest.approx(probabilities, rel=1e-4)
    assert len(answers) == 2
    assert answers[0]["items"]


@pytest.mark.triton
def test_node_is_told_what_is_wrong(example, tiny_server):
    done = asked(example, tiny_server.url, "u1", "--options", '{"caps": {"colour": 2}}')
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert "caps" in done.stderr
    assert "colour" in done.stderr


def test_the_examples_protocol_is_a_part_of_tritons():
    """Names, numbers and kinds of fields: a wrong one would be read as another, without a word."""
    text = re.sub(r"//.*", "", (EXAMPLE / "inference.proto").read_text())
    message, seen = [], 0
    for line in text.splitlines():
        if found := re.match(r"\s*message (\w+) {", line):
            message.append(found[1])
        elif re.match(r"\s*(oneof|service) ", line):
            message.append("")
        elif line.strip() == "}":
            message.pop()
        elif found := re.match(r"\s*(repeated )?(map<string, \w+>|\w+) (\w+) = (\d+);", line):
            kind = service_pb2.DESCRIPTOR.message_types_by_name[message[0]]
            for name in filter(None, message[1:]):
                kind = kind.nested_types_by_name[name]
            field = kind.fields_by_name[found[3]]
            assert field.number == int(found[4])
            assert _type_of(field) == found[2]
            seen += 1
    assert seen == 26


def _type_of(field) -> str:
    if field.message_type is None:
        return {3: "int64", 8: "bool", 9: "string", 12: "bytes"}[field.type]
    if field.message_type.GetOptions().map_entry:
        return f"map<string, {field.message_type.fields_by_name['value'].message_type.name}>"
    return field.message_type.name
