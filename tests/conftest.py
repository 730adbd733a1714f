"""What all tests share: this folder on the import path, and skips that name what is missing."""

from __future__ import annotations

import shutil

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = {"triton": _missing_triton(), "redis": "" if shutil.which("redis-server") else "redis-server is not installed"}
    for item in items:
        for mark, reason in missing.items():
            if reason and item.get_closest_marker(mark):
                item.add_marker(pytest.mark.skip(reason=reason))


def _missing_triton() -> str:
    from ensemble.errors import ServerError
    from ensemble.server_folder import find_tritonserver

    try:
        find_tritonserver()
    except ServerError as error:
        return str(error)
    return ""
