"""What a checkout has beside its sources gets into no image: keys, passwords, shops, releases."""

from __future__ import annotations

import os
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from build_context import copied, sent
from shops import ROOT

PLANTED = "planted-secret-5b1e"
SOURCES = ("builders", "ensemble", "clients", "docker")
# What people keep where they work: in the root, and deep among the sources, whose folders are sent whole
SECRETS = (
    ".env", ".env.local", "prod.env", "server.pem", "server.key", "server.crt.key", "tls.p12", "tls.pfx",
    "trust.jks", "id_rsa", "id_ed25519", "id_ecdsa", ".netrc", ".pypirc", ".pgpass", ".npmrc",
    ".git-credentials", "credentials", "credentials.json", "aws-credentials.ini", ".aws/config",
    ".ssh/config", ".kube/config", "kubeconfig", "kubeconfig.yaml", "secrets.toml", "client-secret.json",
    "redis-url", ".docker/config.json",
)  # fmt: skip
DATA = (
    "shops/demo/users.csv", "shops/demo/shop.toml", "model_repository/r1/user_ids.npy",
    "model_repository/route.json", "demo/shop/users.parquet", "notes.txt", ".git/config", ".venv/pyvenv.cfg",
    ".build/images/serve.log",
)  # fmt: skip


def planted_checkout(folder: Path) -> Path:
    """A copy of what git knows, with all of that in it."""
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    for file in filter(None, files.decode().split("\0")):
        if (ROOT / file).is_file():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / file, folder / file)
            (folder / file).chmod((ROOT / file).stat().st_mode)
    places = ("", *(f"{source}/{deep}" for source in SOURCES for deep in ("", "cli/")))
    for file in (*(place + secret for place in places for secret in SECRETS), *DATA):
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        assert not path.exists(), path
        path.write_text(f"{PLANTED}\n")
    return folder


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not (ROOT / ".git").exists():
        pytest.skip("no git: what belongs to a checkout is not known")
    return planted_checkout(tmp_path_factory.mktemp("checkout"))


def holding(folder: Path, files: list[str]) -> list[str]:
    return [file for file in files if PLANTED in (folder / file).read_text(errors="replace")]


class Store:
    """buildah's images in a folder of a test's own."""

    def __init__(self, folder: Path, driver: str) -> None:
        self._command = ["buildah", "--root", folder / "store", "--runroot", folder / "run"]
        self._command += ["--storage-driver", driver]

    def run(self, *words: str | Path) -> None:
        subprocess.run([*self._command, *words], check=True, capture_output=True)

    def files_of(self, image: str, archive: Path) -> Iterator[tuple[str, bytes]]:
        """The files of all layers of an image with what is in them; its configuration is looked at here."""
        self.run("push", image, f"docker-archive:{archive}")
        with tarfile.open(archive) as outer:
            for member in outer:
                stream = outer.extractfile(member) if member.isfile() else None
                if stream is None:
                    continue
                if not member.name.endswith(".tar"):
                    assert PLANTED.encode() not in stream.read(), f"{image}: {member.name}"
                    continue
                with tarfile.open(fileobj=stream) as layer:
                    for file in layer:
                        content = layer.extractfile(file) if file.isfile() else None
                        if content is not None:
                            yield file.name, content.read()


def test_nothing_planted_is_sent_to_whoever_builds(checkout: Path) -> None:
    files = sent(checkout)
    assert {"pyproject.toml", "builders/build.py", "docker/install.sh"} <= set(files), "the sources are"
    assert holding(checkout, files) == []


@pytest.mark.parametrize("name", ["serve.Dockerfile", "build.Dockerfile"])
def test_an_image_takes_what_git_knows_and_nothing_planted(checkout: Path, name: str) -> None:
    files = copied(checkout, (checkout / "docker" / name).read_text())
    assert {"builders/build.py", "ensemble/contract.py", "clients/client.py", "docker/install.sh"} <= set(
        files
    )
    assert any(file.startswith("docker/") and file.endswith(".lock") for file in files)
    assert holding(checkout, files) == []


def test_a_checkout_without_rules_would_send_all_of_it(checkout: Path, tmp_path: Path) -> None:
    """What is looked for can be found: the rules are what keeps it out."""
    bare = tmp_path / "bare"
    shutil.copytree(checkout / "docker", bare / "docker")
    (bare / ".dockerignore").write_text("")
    assert len(holding(bare, sent(bare))) == 2 * len(SECRETS)


def test_buildah_sends_what_the_rules_are_read_as(checkout: Path, tmp_path: Path) -> None:
    if not shutil.which("buildah") or os.geteuid():
        pytest.skip("buildah is not installed, or this is not root")
    (tmp_path / "Dockerfile").write_text("FROM scratch\nCOPY . /context/\n")
    store = Store(tmp_path, "vfs")
    store.run("bud", "--isolation", "chroot", "--tag", "context", "--file", tmp_path / "Dockerfile", checkout)
    files = dict(store.files_of("localhost/context", tmp_path / "context.tar"))
    assert sorted(files) == [f"context/{file}" for file in sent(checkout)]
    assert [name for name, content in files.items() if PLANTED.encode() in content] == []


@pytest.mark.long
def test_no_layer_of_an_image_holds_what_was_planted(checkout: Path, tmp_path: Path) -> None:
    missing = [tool for tool in ("buildah", "debootstrap", "setpriv", "unshare") if not shutil.which(tool)]
    if missing or os.geteuid():
        pytest.skip(f"images need root and {', '.join(missing) or 'nothing else'}")
    (checkout / ".venv" / "pyvenv.cfg").unlink()
    (checkout / ".venv").rmdir()
    (checkout / ".venv").symlink_to(ROOT / ".venv")
    folder = Path(os.environ.get("PEREGRINE_IMAGES", tmp_path / "images"))
    environment = {**os.environ, "PEREGRINE_IMAGES": str(folder)}
    subprocess.run([checkout / "docker" / "images.sh", "build"], env=environment, check=True)
    store = Store(folder, (folder / "driver").read_text().strip())
    for name in ("serve", "build"):
        image = tmp_path / f"{name}.tar"
        files = store.files_of(f"localhost/peregrine-{name}", image)
        assert [file for file, content in files if PLANTED.encode() in content] == []
        image.unlink()
