"""The gateway's manifests: valid, strict, and of the files that lie beside them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from shops import ROOT

yaml = pytest.importorskip("yaml")
FOLDER = ROOT / "docker" / "nginx"
BASE = ROOT / "docker" / "kubernetes" / "base"


def documents(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text()))


def pod() -> dict[str, Any]:
    (deployment,) = [one for one in documents(FOLDER / "gateway.yaml") if one["kind"] == "Deployment"]
    template: dict[str, Any] = deployment["spec"]["template"]
    return template


def test_they_are_valid_by_kubernetes_own_schemas() -> None:
    validate = pytest.importorskip("kubernetes_validate")
    for document in documents(FOLDER / "gateway.yaml"):
        validate.validate(document, "1.30", strict=True)


def test_the_pod_passes_the_restricted_policy() -> None:
    spec = pod()["spec"]
    assert spec["securityContext"]["runAsNonRoot"]
    assert spec["securityContext"]["runAsUser"] == 1000
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert spec["automountServiceAccountToken"] is False
    assert {one["name"] for one in spec["securityContext"]["sysctls"]} <= {"net.ipv4.ip_local_port_range"}
    (container,) = spec["containers"]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert "memory" in container["resources"]["limits"]
    assert not any("hostPath" in volume for volume in spec["volumes"])


def test_ports_files_and_the_name_of_the_replicas_are_those_of_the_configuration() -> None:
    conf, (container,) = (FOLDER / "nginx.conf").read_text(), pod()["spec"]["containers"]
    ports = {one["containerPort"] for one in container["ports"]}
    assert {int(port) for port in re.findall(r"^\s+listen (\d+)", conf, re.MULTILINE)} == ports
    (kustomization,) = documents(FOLDER / "kustomization.yaml")
    files = {name for one in kustomization["configMapGenerator"] for name in one["files"]}
    assert files == {path.name for path in FOLDER.iterdir() if path.suffix in (".conf", ".sh")}
    mounts = {one["mountPath"] for one in container["volumeMounts"]}
    for word in container["command"]:
        assert not word.startswith("/") or str(Path(word).parent) in mounts, word
    assert {word.rstrip(";").rsplit("/", 1)[0] for word in re.findall(r"(?<= )/tmp/\S+", conf)} == {"/tmp"}
    assert {f"tls/{key}" for key in ("tls.crt", "tls.key", "ca.crt")} == set(
        re.findall(r"tls/\S+(?=;)", conf)
    )
    services = documents(BASE / "service.yaml")
    assert {one["value"] for one in container["env"]} == {one["metadata"]["name"] for one in services}
    assert services[0]["spec"]["clusterIP"] == "None"


def test_servers_let_this_pod_in_and_no_other() -> None:
    policies = [one for one in documents(BASE / "policies.yaml") if one["kind"] == "NetworkPolicy"]
    rules = [rule for one in policies for rule in one["spec"]["ingress"] if {"port": 8001} in rule["ports"]]
    allowed = [peer for rule in rules for peer in rule["from"]]
    assert allowed == [{"podSelector": {"matchLabels": pod()["metadata"]["labels"]}}]
