"""Servers that all tests of this folder share: of each shop one as it is built, and one with `--fused`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from shops import private_copy

if TYPE_CHECKING:
    from ensemble.server.supervisor import Server


# Not for the session: tests of the server itself look for what servers leave behind.
@pytest.fixture(scope="package")
def tiny_server(tiny_repository: Path) -> Iterator[Server]:
    yield from _serve(tiny_repository)


@pytest.fixture(scope="package")
def tiny_server_fused(tiny_repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    yield from _serve_fused(tiny_repository, tmp_path_factory)


@pytest.fixture(scope="package")
def sequences_server(sequences_repository: Path) -> Iterator[Server]:
    yield from _serve(sequences_repository)


@pytest.fixture(scope="package")
def sequences_server_fused(
    sequences_repository: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    yield from _serve_fused(sequences_repository, tmp_path_factory)


@pytest.fixture(scope="package")
def tiny_server_gpu(tiny_repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    yield from _serve_gpu(tiny_repository, tmp_path_factory)


@pytest.fixture(scope="package")
def sequences_server_gpu(
    sequences_repository: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    yield from _serve_gpu(sequences_repository, tmp_path_factory)


def _serve(repository: Path, *, fused: bool = False, require: str | None = None) -> Iterator[Server]:
    from ensemble.server.options import ServeOptions
    from ensemble.server.supervisor import serve

    options = ServeOptions(port=0, metrics_port=None, fused=fused, require=require)
    with serve(repository, options) as server:
        yield server


def _serve_gpu(repository: Path, folders: pytest.TempPathFactory) -> Iterator[Server]:
    """Serves a copy on the best that this machine's GPU has: plans built here, else ONNX Runtime."""
    from builders.compile.stage import compile_release, toolchain
    from ensemble.engines import ONNXRUNTIME_GPU
    from ensemble.errors import ReleaseError
    from ensemble.release.release import active_release

    copy = private_copy(repository, folders.mktemp("gpu") / "repository")
    try:
        tools = toolchain()
        compile_release(copy, active_release(copy) or "", tools)
        require = tools.node.flavor
    except ReleaseError:
        require = ONNXRUNTIME_GPU
    try:
        yield from _serve(copy, require=require)
    except ReleaseError as error:
        pytest.skip(f"no engine runs on this machine's GPU: {error}")


def _serve_fused(repository: Path, folders: pytest.TempPathFactory) -> Iterator[Server]:
    """Serves a copy, since a repository has one server."""
    return _serve(private_copy(repository, folders.mktemp("fused") / "repository"), fused=True)
