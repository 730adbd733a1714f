"""What the tests of compression share beside tests/conftest.py."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest


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
def workshop(tiny_shop: Path, tiny_repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the shop and a repository in which all stages before `compress` are done."""
    folder = tmp_path_factory.mktemp("workshop")
    shutil.copytree(tiny_shop, folder / "shop")
    shutil.copytree(tiny_shop.parent / "repository", folder / "repository")
    return folder
