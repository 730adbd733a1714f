"""What the tests of compression share beside tests/conftest.py."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def workshop(tiny_shop: Path, tiny_repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the shop and a repository in which all stages before `compress` are done."""
    folder = tmp_path_factory.mktemp("workshop")
    shutil.copytree(tiny_shop, folder / "shop")
    shutil.copytree(tiny_shop.parent / "repository", folder / "repository")
    return folder
