"""`from clients import Client`: the package has every public name, and importing it is free."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from shops import ROOT

import clients


def run(script: str) -> str:
    """Output of a fresh Python that ran `script` in the project's root."""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return done.stdout.strip()


def test_importing_the_door_loads_neither_numpy_nor_tritonclient() -> None:
    heavy = {"numpy", "tritonclient", "grpc", "ensemble", "clients.client", "typer", "rich"}
    assert run(f"import sys, clients; dir(clients); print(*{heavy} & set(sys.modules))") == ""


def test_the_client_is_had_without_redis_screens_or_grpc() -> None:
    heavy = {"grpc", "redis", "typer", "rich", "faiss", "torch", "clients.events"}
    script = "import sys; from clients import Client, AsyncClient, FakeTransport, Overloaded, Recommendations"
    assert run(f"{script}; print(*{heavy} & set(sys.modules))") == ""


@pytest.mark.parametrize("name", clients.__all__)
def test_every_public_name_is_the_one_of_its_module(name: str) -> None:
    from importlib import import_module

    found = getattr(clients, name)
    assert found.__name__ == name
    assert found is getattr(import_module(clients._MODULE_OF[name]), name)
    assert name in dir(clients)


def test_type_checkers_read_the_same_table_as_python() -> None:
    tree = ast.parse(Path(clients.__file__).read_text(encoding="utf-8"))
    (block,) = (
        node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    )
    typed = {alias.name: line.module for line in block.body for alias in line.names}  # type: ignore[attr-defined]
    assert typed == clients._MODULE_OF
    assert sorted(typed) == clients.__all__


def test_a_name_that_is_not_there_is_an_error_with_the_names_that_are() -> None:
    with pytest.raises(
        AttributeError, match=r"^module 'clients' has no name 'Clinet'; it has: AsyncClient, "
    ):
        clients.Clinet  # type: ignore[attr-defined]  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'Clinet'"):
        from clients import Clinet  # type: ignore[attr-defined]  # noqa: F401
