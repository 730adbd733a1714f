"""Writes requirements.lock: what pyproject's extras need, to the exact versions of this environment (`make
lock`).

No index line, no host, no hash: the file says what, pip's own configuration says from where. Every package is
listed, so that `pip install --no-deps -r requirements.lock` is complete; that matters for nvidia-pytriton,
whose own requirements serve a Python API that Peregrine does not use (of the wheel only tritonserver is
started).
"""

from __future__ import annotations

import sys
import tomllib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PYPROJECT = Path(__file__).parent.parent / "pyproject.toml"
EXTRAS = ("serve", "redis", "build", "triton", "test")
WITHOUT_REQUIREMENTS = ("nvidia-pytriton",)
HEAD = """\
# Every package of `make install`, exact. Written by `make lock` from pyproject.toml's extras; do not edit.
# Install with: pip install --no-deps -r requirements.lock
"""


def main() -> None:
    """Prints nothing and writes the file, or says what the environment lacks and exits with 2."""
    try:
        pins = locked_versions(direct_requirements())
    except (LookupError, PackageNotFoundError) as error:
        sys.exit(
            f"error: {error}; cure: pip install '.[serve,build,test]' into this environment, then make lock"
        )
    lines = "".join(f"{name}=={version}\n" for name, version in sorted(pins.items()))
    Path(sys.argv[1] if len(sys.argv) > 1 else "requirements.lock").write_text(HEAD + lines, "utf-8")


def direct_requirements() -> list[str]:
    """What pyproject.toml asks for, all extras together."""
    project = tomllib.loads(PYPROJECT.read_text("utf-8"))["project"]
    return [
        *project["dependencies"],
        *(one for extra in EXTRAS for one in project["optional-dependencies"][extra]),
    ]


def locked_versions(direct: list[str]) -> dict[str, str]:
    """{package: version} of the direct requirements and all that they need."""
    pins: dict[str, str] = {}
    waiting = [(Requirement(text), "pyproject.toml") for text in direct]
    seen: set[tuple[str, frozenset[str]]] = set()
    while waiting:
        wanted, by = waiting.pop()
        name = canonicalize_name(wanted.name)
        if (name, frozenset(wanted.extras)) in seen:
            continue
        seen.add((name, frozenset(wanted.extras)))
        try:
            found = distribution(name)
        except PackageNotFoundError:
            raise LookupError(f"{by} needs {wanted}, which is not installed") from None
        if not wanted.specifier.contains(found.version, prereleases=True):
            raise LookupError(f"{by} needs {wanted}, but {found.version} is installed")
        pins[name] = found.version.partition("+")[
            0
        ]  # torch 2.13.0+cpu: which build it is, is pip's configuration
        if name not in WITHOUT_REQUIREMENTS:
            waiting += [(one, name) for one in _requirements(found.requires or [], wanted.extras)]
    return pins


def _requirements(texts: list[str], extras: set[str]) -> list[Requirement]:
    """Those that hold on this machine with these extras."""
    every = [Requirement(text) for text in texts]
    return [
        one
        for one in every
        if one.marker is None or any(one.marker.evaluate({"extra": extra}) for extra in extras | {""})
    ]


if __name__ == "__main__":
    main()
