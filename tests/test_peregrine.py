"""The console command: quick, quiet about its insides, one line for what the caller can fix."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

import peregrine

SCRIPT = str(Path(__file__).parents[1] / "peregrine.py")
HEAVY = ("torch", "pyarrow", "faiss", "onnxruntime", "tritonclient", "numpy", "pydantic", "typer")


def run(*arguments: str, before: str = "") -> subprocess.CompletedProcess:
    root = str(Path(SCRIPT).parent)
    setup = f"import sys; sys.path.insert(0, {root!r}); sys.argv = ['peregrine', *{arguments!r}]"
    code = f"{setup}; {before}\nimport peregrine; peregrine.main()"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)


@pytest.mark.alone
def test_help_names_every_command_and_imports_nothing_heavy():
    started = time.monotonic()
    done = run("--help", before=f"sys.modules.update(dict.fromkeys({HEAVY!r}))")
    assert done.returncode == 0, done.stderr
    assert all(f"  {name} " in done.stdout for name in peregrine.COMMANDS)
    assert time.monotonic() - started < 2.0  # 0.1 s on an idle machine


@pytest.mark.parametrize("name", peregrine.COMMANDS)
def test_every_command_has_help(name):
    done = run(name, "--help")
    assert done.returncode == 0, done.stderr
    assert "--help" in done.stdout


def test_an_unknown_command_is_one_line_and_exit_code_2():
    done = run("sevre")
    assert (done.returncode, done.stdout) == (2, "")
    assert (
        done.stderr == f"error: peregrine has no command 'sevre'; it has: {', '.join(peregrine.COMMANDS)}\n"
    )


def test_a_missing_package_names_the_extra_that_brings_it():
    done = run("serve", "--help", before="sys.modules['typer'] = None")
    assert done.returncode == 2
    assert (
        done.stderr == "error: `peregrine serve` needs typer, which is not installed; cure: pip install "
        "'peregrine-recommender[serve]'\n"
    )


def test_ctrl_c_exits_with_130():
    before = (
        "import ensemble.server.supervisor as s\ndef stop(*a, **k): raise KeyboardInterrupt\ns.serve = stop"
    )
    assert run("serve", before=before).returncode == 130
