"""Gives names to releases, each only once: <repository>/.names.json remembers whose name it was, also after
the release is removed."""

from __future__ import annotations

import json
import re
from pathlib import Path

from ensemble import contract
from ensemble.errors import InvalidInput, ReleaseError
from ensemble.release.files import write_durably
from ensemble.release.manifest import MANIFEST, read_manifest

NAME = re.compile(r"[a-z0-9][a-z0-9-]*")
LEDGER = ".names.json"
ROUTER = "route"  # of models that are no release's: route_3
_FORMAT = 1


def check_name(name: str) -> str:
    """Gives `name` back if it can name a release; InvalidInput if it cannot."""
    if not NAME.fullmatch(name) or name in (*contract.PIPELINES, ROUTER):
        raise InvalidInput(
            f"release name {name!r}: use lower-case letters, digits and dashes, such as r7 (not "
            f"{' or '.join(map(repr, contract.PIPELINES))}, which are aliases, nor {ROUTER!r}, which splits "
            "users)"
        )
    return name


def release_names(repository: Path) -> list[str]:
    """Lists every release that exists, r2 before r10."""
    names = [path.parent.name for path in repository.glob(f"*/{MANIFEST}")]
    return sorted((name for name in names if NAME.fullmatch(name)), key=name_order)


def name_order(name: str) -> list[tuple[bool, int, str]]:
    """Gives the key that sorts names by their numbers: r2 before r10."""
    return [
        (part.isdigit(), int(part or 0) if part.isdigit() else 0, part) for part in re.split(r"(\d+)", name)
    ]


def next_release_name(repository: Path) -> str:
    """Gives the first of r1, r2, … above all that are there or were, half-removed ones included."""
    names = [path.name.partition("_")[0] for path in repository.iterdir()] if repository.is_dir() else []
    numbers = [int(name[1:]) for name in (*names, *names_given(repository)) if re.fullmatch(r"r\d+", name)]
    return f"r{max(numbers, default=0) + 1}"


def names_given(repository: Path) -> dict[str, str]:
    """Gives {name: the id of the release that has or had it}; a manifest that cannot be read gives none."""
    given = _ledger(repository)
    for name in release_names(repository):
        try:
            given.setdefault(name, read_manifest(repository / name / MANIFEST)["id"])
        except (ReleaseError, FileNotFoundError):
            continue
    return given


def is_there(repository: Path, name: str, release_id: str) -> bool:
    """Says whether the release of this name and id is in the repository.

    InvalidInput if the name belongs to another one, there or removed.
    """
    owner = names_given(repository).get(name, release_id)
    if owner != release_id:
        raise InvalidInput(
            f"release name {name} was given to other content (id {owner}; this has {release_id}), and a name "
            f"is given once; the next free one is {next_release_name(repository)}"
        )
    return (repository / name / MANIFEST).exists()


def taken(repository: Path, name: str) -> str:
    """Says, before a build, that its name is given already; nothing where it is free."""
    if name not in names_given(repository):
        return ""
    return (
        f"warning: release name {name} is given already: this build can only give the very same content to "
        "it, and ends in an error otherwise (its stages are kept); the next free name is "
        f"{next_release_name(repository)}"
    )


def remember_names(repository: Path) -> None:
    """Writes down whose names are given, also those of releases copied in. Call it under locked()."""
    given = names_given(repository)
    if given != _ledger(repository):
        ordered = {name: given[name] for name in sorted(given, key=name_order)}
        write_durably(repository / LEDGER, json.dumps({"format": _FORMAT, "names": ordered}, indent=1) + "\n")


def _ledger(repository: Path) -> dict[str, str]:
    """Reads the names that were written down; ReleaseError if the file is not what we wrote."""
    path = repository / LEDGER
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        if known["format"] != _FORMAT:
            raise ValueError(f"format {known['format']} is not {_FORMAT}")
        return {str(name): str(release_id) for name, release_id in known["names"].items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ReleaseError(
            f"cannot read {path}, which remembers the names of removed releases: {error}",
            "restore it from a backup; without it their names could be given again",
        ) from error
