"""Manifests: valid, strict, and every command, flag and path in them exists."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from shops import ROOT

import peregrine
from builders.compile.stage import timing_cache
from ensemble.engines.plans import Node

yaml = pytest.importorskip("yaml")
FOLDER = ROOT / "docker" / "kubernetes"
MANIFESTS = sorted(path for path in FOLDER.rglob("*.yaml") if path.name != "kustomization.yaml")
OVERLAYS = sorted((FOLDER / "overlays").iterdir())


def documents(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text()))


def pods() -> Iterator[tuple[str, dict[str, Any]]]:
    for path in MANIFESTS:
        for document in documents(path):
            if document["kind"] == "Deployment" and path.name != "shm.yaml":
                yield path.parent.name, document["spec"]["template"]["spec"]


def described(kind: str) -> list[dict[str, Any]]:
    return [one for path in MANIFESTS for one in documents(path) if one["kind"] == kind]


def containers(pod: dict[str, Any]) -> list[dict[str, Any]]:
    return [*pod.get("initContainers", ()), *pod.get("containers", ())]


def adapter_rules() -> list[dict[str, Any]]:
    (document,) = documents(FOLDER / "monitoring" / "adapter.yaml")
    return list(yaml.safe_load(document["data"]["config.yaml"])["rules"])


@pytest.mark.parametrize("path", [*(FOLDER / "base").glob("[!k]*.yaml")], ids=lambda path: path.stem)
def test_the_base_is_valid_by_kubernetes_own_schemas(path: Path) -> None:
    validate = pytest.importorskip("kubernetes_validate")
    for document in documents(path):
        validate.validate(document, "1.30", strict=True)


@pytest.mark.parametrize(
    "folder",
    [FOLDER / "base", FOLDER / "monitoring", FOLDER / "redis", FOLDER / "timing", *OVERLAYS],
    ids=lambda path: path.name,
)
def test_a_kustomization_names_files_that_are_there(folder: Path) -> None:
    (kustomization,) = documents(folder / "kustomization.yaml")
    named = [*kustomization.get("resources", ()), *(one["path"] for one in kustomization.get("patches", ()))]
    assert named
    assert all((folder / name).exists() for name in named)


def test_pods_pass_the_restricted_policy() -> None:
    for name, pod in pods():
        if name == "base":
            assert pod["securityContext"]["runAsNonRoot"]
            assert pod["securityContext"]["runAsUser"] == 1000
            assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
            assert pod["automountServiceAccountToken"] is False
            assert not any("hostPath" in volume for volume in pod["volumes"])
        for container in containers(pod):
            if name != "base" and "image" not in container:
                continue  # a patch of what the base has
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert "memory" in container["resources"]["limits"]


def test_every_command_and_flag_exists() -> None:
    import typer

    for _, pod in pods():
        for container in containers(pod):
            if "args" not in container:
                continue
            command, *words = container["args"]
            app = typer.main.get_command(peregrine._app(peregrine.COMMANDS[command]))
            flags = {flag for parameter in app.params for flag in parameter.opts}
            assert {word for word in words if word.startswith("--")} <= flags, container["args"]


def test_every_path_is_a_volume_of_the_container() -> None:
    (base,) = [pod for name, pod in pods() if name == "base"]
    mounts = {one["name"]: {m["mountPath"] for m in one["volumeMounts"]} for one in containers(base)}
    volumes = set(
        re.findall(
            r'"(/\w+)"', (ROOT / "docker" / "serve.Dockerfile").read_text().split("VOLUME")[1].split("\n")[0]
        )
    )
    assert volumes == {"/releases", "/catalogue", "/state"}
    for _, pod in pods():
        for container in containers(pod):
            there = {m["mountPath"] for m in container.get("volumeMounts", ())} | mounts.get(
                container["name"], set()
            )
            for word in container.get("args", ()):
                if word.startswith("/"):
                    assert any(f"{word}/".startswith(f"{mount}/") for mount in there), (word, there)


def test_probes_ask_for_an_answer_and_the_grace_is_longer_than_the_drain() -> None:
    from ensemble.server.process import DRAINED_EXIT_S, EXIT_TIMEOUT_S

    (base,) = [pod for name, pod in pods() if name == "base"]
    (serve,) = [one for one in base["containers"] if one["name"] == "serve"]
    paths = [serve[f"{kind}Probe"]["httpGet"]["path"] for kind in ("startup", "readiness", "liveness")]
    assert paths == ["/readyz", "/readyz", "/livez"]
    pause_s = int(serve["lifecycle"]["preStop"]["exec"]["command"][1])
    assert base["terminationGracePeriodSeconds"] > pause_s + EXIT_TIMEOUT_S + max(DRAINED_EXIT_S, 10)


def test_redis_is_a_secrets_file_that_serve_reads() -> None:
    """The patch, put onto the base as kustomize does it, is valid, and names what `serve` takes."""
    import typer

    validate = pytest.importorskip("kubernetes_validate")
    (whole,) = documents(FOLDER / "base" / "deployment.yaml")
    (patch,) = documents(FOLDER / "redis" / "serve.yaml")
    pod, added = whole["spec"]["template"]["spec"], patch["spec"]["template"]["spec"]
    (serve,) = [one for one in pod["containers"] if one["name"] == "serve"]
    (more,) = added["containers"]
    serve["env"] = [*serve.get("env", ()), *more["env"]]
    serve["volumeMounts"] += more["volumeMounts"]
    pod["volumes"] += added["volumes"]
    validate.validate(whole, "1.30", strict=True)
    app = typer.main.get_command(peregrine._app(peregrine.COMMANDS["serve"]))
    (variable,) = more["env"]
    assert variable["name"] in {parameter.envvar for parameter in app.params}
    folder, _, key = variable["value"].removeprefix("@").rpartition("/")
    assert [mount["mountPath"] for mount in more["volumeMounts"]] == [folder]
    secret = added["volumes"][0]["secret"]["secretName"]
    command = (FOLDER / "redis" / "kustomization.yaml").read_text()
    assert f"create secret generic {secret} " in command
    assert f"--from-literal={key}=" in command


def test_timings_lie_where_compile_keeps_them_on_a_volume_of_all_pods() -> None:
    validate = pytest.importorskip("kubernetes_validate")
    (claim,) = documents(FOLDER / "timing" / "claim.yaml")
    validate.validate(claim, "1.30", strict=True)
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"], "each pod compiles on its own node"
    (patch,) = documents(FOLDER / "timing" / "serve.yaml")
    (volume,) = patch["spec"]["template"]["spec"]["volumes"]
    assert volume == {
        "name": "timing",
        "emptyDir": None,
        "persistentVolumeClaim": {"claimName": claim["metadata"]["name"]},
    }
    (gpu,) = [pod for name, pod in pods() if name == "gpu"]
    assert gpu["volumes"] == [{"name": volume["name"], "emptyDir": {}}], "what the patch replaces"
    (compile_,) = [one for one in containers(gpu) if one["name"] == "compile"]
    mounted = {mount["name"]: Path(mount["mountPath"]) for mount in compile_["volumeMounts"]}
    node = Node("NVIDIA L4", "8.9", "11.4.0", "13.1")
    assert timing_cache(mounted["releases"], node).is_relative_to(mounted[volume["name"]])


def test_pods_are_added_when_requests_wait_and_when_the_cpu_is_busy() -> None:
    validate = pytest.importorskip("kubernetes_validate")
    base, patch = described("HorizontalPodAutoscaler")
    merged = {**base, "spec": {**base["spec"], **patch["spec"]}}  # a list of metrics is replaced whole
    validate.validate(merged, "1.30", strict=True)
    waiting, cpu = merged["spec"]["metrics"]
    assert [cpu] == base["spec"]["metrics"]
    (rule,) = adapter_rules()
    assert waiting["pods"]["metric"]["name"] == rule["name"]["as"]


def test_prometheus_finds_what_the_server_measures() -> None:
    from ensemble.server import http

    (monitor,) = described("ServiceMonitor")
    (service,) = described("Service")
    (endpoint,) = monitor["spec"]["endpoints"]
    assert monitor["spec"]["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    assert endpoint["port"] in {port["name"] for port in service["spec"]["ports"]}
    assert f'"{endpoint["path"]}"' in Path(http.__file__).read_text()
    assert int(endpoint["scrapeTimeout"][:-1]) < int(endpoint["interval"][:-1])


@pytest.mark.parametrize(("overlay", "flags"), [("cpu", ["--fused"]), ("gpu", [])])
def test_shared_memory_is_as_large_as_a_release_says(
    overlay: str, flags: list[str], tiny_repository: Path
) -> None:
    from typer.testing import CliRunner

    from clients.cli.release import app

    asked = ["needs", "--repository", str(tiny_repository), "--patch", *flags]
    done = CliRunner().invoke(app, asked)
    assert done.exit_code == 0, done.output
    said = yaml.safe_load(done.output)
    (written,) = documents(FOLDER / "overlays" / overlay / "shm.yaml")
    sizes = []
    for one in (said, written):
        (volume,) = one["spec"]["template"]["spec"]["volumes"]
        sizes.append(int(volume["emptyDir"].pop("sizeLimit").removesuffix("Mi")))
    assert said == written
    assert 0 < sizes[0] <= sizes[1]
    (base,) = [pod for name, pod in pods() if name == "base"]
    assert volume["name"] in {one["name"] for one in base["volumes"]}
