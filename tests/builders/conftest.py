"""What the tests of builds share beside tests/conftest.py."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from shops import ReleaseCache

from builders.evaluate.kept import Kept, open_kept


@pytest.fixture(scope="session", autouse=True)
def one_registry() -> Iterator[None]:
    """Lets all exports of a test process share the exporter's table of operators, which is the same each time
    and takes a sixth of an export to make."""
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    make = ONNXRegistry.__dict__["from_torchlib"].__func__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ONNXRegistry, "from_torchlib", classmethod(functools.cache(make)))
        yield


@pytest.fixture(scope="module")
def repository(release_cache: ReleaseCache) -> Path:
    """The tiny shop's repository with the stages of its build; read it only."""
    return release_cache.folder("tiny") / "repository"


@pytest.fixture(scope="module")
def kept(repository: Path) -> Kept:
    """What the build of that repository's release keeps to be asked again."""
    return open_kept(repository, "r1")


@pytest.fixture(scope="module")
def workshop(tiny_shop: Path, tiny_repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the shop and a repository in which all stages before `compress` are done."""
    folder = tmp_path_factory.mktemp("workshop")
    shutil.copytree(tiny_shop, folder / "shop")
    shutil.copytree(tiny_shop.parent / "repository", folder / "repository")
    return folder
