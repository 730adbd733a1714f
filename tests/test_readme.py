"""README.md and the folders' READMEs are true: the shop builds, commands run, Python prints lists, and what
they name exists.

A fence's second word says what is done with it: `test` runs, `serve` runs in the background meanwhile, a path
is the file that the block is written to, and `acl` is tried in tests/ensemble/tiers/test_access.py. The
pages' commands run one after another in one folder, beside one server.
"""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from ports import free_port

import peregrine
from clients import Client

ROOT = Path(__file__).resolve().parent.parent
PAGES = (
    "README.md",
    "builders/README.md",
    "builders/compress/README.md",
    "ensemble/live/README.md",
    "ensemble/tiers/README.md",
    "docker/README.md",
    "model_repository/README.md",
)
TEXTS = {page: (ROOT / page).read_text("utf-8") for page in PAGES if (ROOT / page).exists()}
README = TEXTS["README.md"]
MOST_WORDS = 1500  # in README.md: detail belongs to the folders
URL = "127.0.0.1:8001"
FENCE = re.compile(r"^```(\w+) ?(\S*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """Holds one fenced block, and the page it stands on."""

    page: str
    language: str
    role: str
    text: str


BLOCKS = [Block(page, *match.groups()) for page, text in TEXTS.items() for match in FENCE.finditer(text)]


def blocks_to_run(language: str) -> list[Block]:
    """Gives the blocks of a language that are to run, README.md's first."""
    return [block for block in BLOCKS if (block.language, block.role) == (language, "test")]


# The first one checks and builds the shop that all others ask about.
BUILD, *COMMANDS = blocks_to_run("bash")
PYTHON = blocks_to_run("python")


def write_own_shop(folder: Path, rng: np.random.Generator) -> None:
    """What README's shop.toml speaks of, small: 150 users, 60 items, views that become clicks and
    purchases."""
    write_csv(
        folder / "users.csv",
        ("user_id", "skin_type"),
        [(f"u{user}", ("dry", "oily")[user % 2]) for user in range(1, 151)],
    )
    items = [
        (f"i{item}", f"soft {('red', 'rose')[item % 2]} lipstick {item}", f"brand-{item % 5}", 5 + item)
        for item in range(1, 61)
    ]
    write_csv(folder / "items.csv", ("sku", "title", "brand", "price"), items)
    events = []
    for at in range(3000):
        user, item, time_s = int(rng.integers(1, 151)), int(rng.integers(1, 61)), 1_700_000_000 + 600 * at
        likes = (user + item) % 2 == 0
        happened = (
            ["view"]
            + ["click"] * (rng.random() < (0.6 if likes else 0.1))
            + ["buy"] * (rng.random() < (0.5 if likes else 0.2))
        )
        events += [
            (f"u{user}", f"i{item}", time_s + step, event)
            for step, event in enumerate(happened)
            if event != "buy" or "click" in happened
        ]
    write_csv(folder / "interactions.csv", ("user_id", "sku", "time", "event"), events)


def write_csv(path: Path, names: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([names, *rows])


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the reader's own shop, checked and built as README says."""
    folder = tmp_path_factory.mktemp("reader")
    for block in BLOCKS:
        if block.role.endswith(".toml"):
            path = folder / block.role
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text, "utf-8")
            if path.name == "shop.toml":
                write_own_shop(path.parent, np.random.default_rng(0))
    run(["bash", "-euo", "pipefail", "-c", BUILD.text], folder)
    return folder


@pytest.fixture(scope="module")
def url(workplace: Path) -> Iterator[str]:
    """host:port of README's server, started as README says but on a port that is free."""
    (text,) = (block.text for block in BLOCKS if block.role == "serve")
    port = free_port()
    with (workplace / "serve.log").open("w") as log:
        server = subprocess.Popen(
            [*text.split(), "--port", str(port), "--metrics-port", "0"],
            cwd=workplace,
            env=environment(),
            stdout=log,
            stderr=log,
        )
    try:
        deadline = time.monotonic() + 120
        while "serving release" not in (shown := (workplace / "serve.log").read_text()):
            assert server.poll() is None, shown
            assert time.monotonic() < deadline, shown
            time.sleep(0.1)
        with Client(f"127.0.0.1:{port}") as client:
            for _ in range(
                12
            ):  # each process answers its first request slowly, and README's call has a budget
                client.recommend("u1", session_items=["i3"])
        yield f"127.0.0.1:{port}"
    finally:
        server.terminate()
        assert server.wait(60) == 0, (workplace / "serve.log").read_text()


def run(command: Sequence[str], folder: Path) -> str:
    """Runs a command to its end -> all it said."""
    done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def environment() -> dict[str, str]:
    """This environment's `peregrine` first on PATH, and this tree's sources."""
    scripts = str(Path(sys.executable).parent)
    return {
        **os.environ,
        "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "COLUMNS": "200",
    }


def names_of(blocks: list[Block]) -> list[str]:
    """Gives a test's name for each block."""
    return [f"{block.page}: {block.text.strip().splitlines()[0]}" for block in blocks]


def _of_its_time(block: Block) -> Any:
    """Gives a block as a test's parameter; the compressed build, the longest, belongs to the soaks."""
    return pytest.param(block, marks=pytest.mark.long) if "--compress" in block.text else block


@pytest.mark.triton
@pytest.mark.parametrize("block", [_of_its_time(block) for block in COMMANDS], ids=names_of(COMMANDS))
def test_commands_run_in_order(workplace: Path, url: str, block: Block) -> None:
    for line in block.text.replace("\\\n", " ").splitlines():
        assert run(["bash", "-c", line], workplace), line


@pytest.mark.triton
@pytest.mark.parametrize("block", PYTHON, ids=names_of(PYTHON))
def test_python_runs_and_prints_lists(workplace: Path, url: str, block: Block) -> None:
    assert URL in block.text
    output = run([sys.executable, "-c", block.text.replace(URL, url)], workplace)
    assert re.search(r"\bi\d+\b", output), output


def test_readme_is_a_door() -> None:
    assert len(README.split()) <= MOST_WORDS


def test_commands_and_options_exist() -> None:
    commands = [
        command
        for text in TEXTS.values()
        for command in re.findall(r"peregrine [a-z]+[^`\n]*(?:\n--[^`]*)?", text)
        if command.split()[1] in peregrine.COMMANDS or "--" in command  # not the project's name in a sentence
    ]
    assert len(commands) > 12
    for line in commands:
        _, name, *words = line.split("#")[0].split()
        command = command_of(name, words)
        known = {
            option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)
        } | {"--help"}
        assert {word for word in words if word.startswith("-")} <= known, line


def command_of(name: str, words: list[str]) -> object:
    """The click command that `peregrine NAME words…` runs."""
    command = typer.main.get_command(app_of(peregrine.COMMANDS[name]))
    while words and words[0] in getattr(command, "commands", {}):
        command = command.commands[words[0]]
        words = words[1:]
    return command


def app_of(command: object) -> typer.Typer:
    import importlib

    found = getattr(importlib.import_module(command.module), command.attribute)
    if isinstance(found, typer.Typer):
        return found
    app = typer.Typer()
    app.command()(found)
    return app


def test_every_request_parameter_and_degraded_bit_is_explained() -> None:
    from ensemble.contract import ANSWER, Degraded
    from ensemble.options import OPTION_NAMES

    rows = re.findall(r"^(`.*?) \| ", README, re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert {*OPTION_NAMES, *ANSWER} <= named
    assert {(str(bit.value), bit.name.lower()) for bit in Degraded} == set(
        re.findall(r"^(\d+) \| `(\w+)` \|", README, re.MULTILINE)
    )


def test_files_that_are_named_exist() -> None:
    named = {
        (page, ROOT / name)
        for page, text in TEXTS.items()
        for name in re.findall(r"`((?:tests|ensemble|builders|clients|docker)/[\w/.]+)`", text)
    } | {
        (page, (ROOT / page).parent / name)
        for page, text in TEXTS.items()
        for name in re.findall(r"\]\(([\w./-]+)(?:#[\w-]+)?\)", text)
    }
    assert len({page for page, _ in named}) > 2
    assert not [f"{page}: {path}" for page, path in sorted(named) if not path.exists()]


def test_lock_fits_pyproject_and_names_no_place() -> None:
    from packaging.requirements import Requirement

    install, tools = (
        dict(line.split("==") for line in section if not line.startswith("#"))
        for section in lock_sections((ROOT / "requirements.lock").read_text("utf-8").splitlines())
    )
    assert not install.keys() & tools.keys()
    project = pyproject()["project"]
    extras = dict(project["optional-dependencies"])
    for wanted in map(
        Requirement, [text for name in ("test", "rtx", "s3", "deploy", "traces") for text in extras.pop(name)]
    ):
        assert wanted.specifier.contains((install | tools)[wanted.name]), wanted
    needed = [*project["dependencies"], *pyproject()["build-system"]["requires"]]
    for wanted in map(Requirement, [*needed, *(text for extra in extras.values() for text in extra)]):
        assert wanted.specifier.contains(install[wanted.name]), f"make install lacks {wanted}"


def lock_sections(lines: list[str]) -> tuple[list[str], list[str]]:
    """Splits the lock where the Makefile does: what `make install` brings, and what tests need besides."""
    (mark,) = re.findall(r"^SECOND := \^\\(.*)$", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    (at,) = (at for at, line in enumerate(lines) if line.startswith(mark))
    assert all(re.fullmatch(r"#.*|[a-z0-9-]+==[\w.]+", line) for line in lines)
    return lines[:at], lines[at:]


def pyproject() -> dict[str, Any]:
    import tomllib

    return tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


def test_every_package_is_installed() -> None:
    from setuptools import find_packages

    settings = pyproject()["tool"]["setuptools"]
    modules = (path for top in ("ensemble", "builders", "clients") for path in (ROOT / top).rglob("*.py"))
    folders = {str(path.parent.relative_to(ROOT)).replace("/", ".") for path in modules}
    assert set(find_packages(str(ROOT), include=settings["packages"]["find"]["include"])) == folders


def test_decisions_have_an_index_of_one_line_each() -> None:
    text = (ROOT / "DECISIONS.md").read_text("utf-8")
    headings = re.findall(r"^## (\d{4}-\d\d-\d\d) (.+)$", text, re.MULTILINE)
    assert re.findall(r"^- (\d{4}-\d\d-\d\d) \[(.+)\]\(#", text, re.MULTILINE) == headings
