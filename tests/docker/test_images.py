"""Images: what their files promise; `make images` itself runs where a machine can build them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from shops import ROOT

DOCKER = ROOT / "docker"
DOCKERFILES = ("serve.Dockerfile", "build.Dockerfile")
LOCKS = ("serve-py311.lock", "serve-py312.lock", "build-py311.lock")


def pins(lock: str) -> dict[str, str]:
    lines = (DOCKER / lock).read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def hadolint() -> str:
    found = shutil.which("hadolint", path=f"{sysconfig.get_path('scripts')}:{os.environ['PATH']}")
    if found is None:
        pytest.skip("hadolint is not installed")
    return found


@pytest.mark.parametrize("name", DOCKERFILES)
def test_hadolint_finds_nothing(name: str) -> None:
    done = subprocess.run([hadolint(), DOCKER / name], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("name", DOCKERFILES)
def test_an_image_is_of_an_ordinary_user_and_of_a_base_that_is_told(name: str) -> None:
    text = (DOCKER / name).read_text()
    last_stage = text.rpartition("\nFROM ")[2]
    assert re.search(r"^ARG BASE=\S+$", text, re.MULTILINE)
    assert re.findall(r"^USER (.*)$", last_stage, re.MULTILINE) == ["1000:1000"]
    assert "HEALTHCHECK" in last_stage
    assert "org.opencontainers.image.revision" in last_stage
    assert " pip" not in last_stage.replace("# ", "")


@pytest.mark.parametrize(
    ("lock", "extras"),
    [
        ("serve-py311.lock", ("serve", "redis", "s3", "compile", "traces")),
        ("serve-py312.lock", ("serve", "redis", "s3", "compile", "traces")),
        ("build-py311.lock", ("serve", "redis", "s3", "build", "encoders")),
    ],
)
def test_a_lock_has_what_its_image_asks_for(lock: str, extras: tuple[str, ...]) -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [
        *project["dependencies"],
        *(one for extra in extras for one in project["optional-dependencies"][extra]),
    ]
    have = pins(lock)
    for requirement in map(Requirement, asked):
        assert requirement.specifier.contains(have[requirement.name.lower()]), requirement


def test_only_the_official_base_has_numpy_2_and_no_image_has_the_tritonserver_of_tests() -> None:
    majors = {lock: pins(lock)["numpy"].partition(".")[0] for lock in LOCKS}
    assert majors == {"serve-py311.lock": "1", "serve-py312.lock": "2", "build-py311.lock": "1"}
    assert not any("nvidia-pytriton" in pins(lock) for lock in LOCKS)
    assert "torch" not in pins("serve-py312.lock")


@pytest.mark.long
def test_make_images_builds_and_tries_both(tmp_path: Path) -> None:
    missing = [tool for tool in ("buildah", "debootstrap", "setpriv", "unshare") if not shutil.which(tool)]
    if missing or os.geteuid():
        pytest.skip(f"images need root and {', '.join(missing) or 'nothing else'}")
    environment = {**os.environ, "PEREGRINE_IMAGES": os.environ.get("PEREGRINE_IMAGES", str(tmp_path))}
    done = subprocess.run(
        [DOCKER / "images.sh"], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "CapEff: 0000000000000000" in done.stdout
    assert "release r1" in done.stdout


def test_a_script_that_builds_images_says_what_is_missing(tmp_path: Path) -> None:
    environment = {"PATH": str(tmp_path), "PEREGRINE_IMAGES": str(tmp_path)}
    for tool in ("mkdir", "dirname", "id"):
        (tmp_path / tool).symlink_to(str(shutil.which(tool)))
    done = subprocess.run(
        [str(shutil.which("bash")), DOCKER / "images.sh"],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
