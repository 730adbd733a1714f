"""Keeps the repository's shape on disk: which releases exist, who may change it, what a killed process left.

recommend/config.pbtxt    the alias: the active release, the only file that ever changes
rN/manifest.json          release rN exists if and only if this file does
rN_<model>/               its members, renamed in before rN/ and out after it
.staging-*/               half written or half removed; Triton never looks there, sweep() removes it
.lock                     held by whoever changes any of these
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from ensemble import contract
from ensemble.errors import InvalidInput, ReleaseError
from ensemble.release.files import try_flock, write_durably
from ensemble.release.release import active_release

NAME = re.compile(r"[a-z0-9][a-z0-9-]*")
STAGING = ".staging-"
FUSED = "fused"  # configs/fused.pbtxt of a release's ensemble: all steps in one process
ALIAS_FILE = "alias.pbtxt"  # in a release's own folder: what activation makes recommend/config.pbtxt
_MEMBER = re.compile(rf"({NAME.pattern})_[a-z0-9_]+")
_RELEASE_PARAMETER = re.compile(r'key:\s*"release"\s*value\s*\{\s*string_value:\s*"([^"]*)"')


def check_name(name: str) -> str:
    """Gives `name` back if it can name a release; InvalidInput if it cannot."""
    if not NAME.fullmatch(name) or name == contract.PIPELINE:
        raise InvalidInput(
            f"release name {name!r}: use lower-case letters, digits and dashes, such as r7 (not "
            f"{contract.PIPELINE!r}, which is the alias)"
        )
    return name


def release_names(repository: Path) -> list[str]:
    """Lists every release that exists, r2 before r10."""
    names = [
        path.parent.name for path in repository.glob("*/manifest.json") if NAME.fullmatch(path.parent.name)
    ]
    return sorted(
        names, key=lambda name: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]
    )


def require_active(repository: Path) -> str:
    """Gives the active release's name; ReleaseError that lists what could be activated where none is."""
    name = active_release(repository)
    if name is not None:
        return name
    names = ", ".join(release_names(repository))
    cure = (
        f"`peregrine release activate NAME` (there are: {names})"
        if names
        else "`peregrine build SHOP --activate`"
    )
    raise ReleaseError(f"no release is active in {repository}", cure)


def next_release_name(repository: Path) -> str:
    """Gives the first of r1, r2, … above all that are there, members of a half-removed release included."""
    names = [path.name.partition("_")[0] for path in repository.iterdir()] if repository.is_dir() else []
    numbers = [int(name[1:]) for name in names if re.fullmatch(r"r\d+", name)]
    return f"r{max(numbers, default=0) + 1}"


def member_folders(repository: Path, name: str) -> list[Path]:
    """Lists the model folders of release `name`, its ensemble included, whether or not it is complete."""
    return sorted(path for path in repository.glob(f"{name}_*") if path.is_dir())


@contextlib.contextmanager
def locked(repository: Path, wait_s: float = 30.0) -> Iterator[None]:
    """Holds the repository's lock; ReleaseError names the holder if it is not free within `wait_s`.

    It is a flock, because the kernel drops it when its holder dies: a killed build never leaves the
    repository locked.
    """
    try:
        lock = os.open(repository / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise ReleaseError(f"cannot lock {repository}: {error.strerror}") from error
    try:
        _wait_for(lock, repository, wait_s)
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(lock)


def _wait_for(lock: int, repository: Path, wait_s: float) -> None:
    """Takes the lock as soon as it is free; ReleaseError when `wait_s` is over."""
    deadline = time.monotonic() + wait_s
    while not try_flock(lock):
        if time.monotonic() >= deadline:
            holder = os.pread(lock, 32, 0).decode(errors="replace").strip() or "unknown"
            raise ReleaseError(
                f"{repository} is being changed by process {holder}", "wait for it, or stop it, and try again"
            )
        time.sleep(0.02)


@contextlib.contextmanager
def staging(repository: Path) -> Iterator[Path]:
    """Gives a private folder on the repository's file system, gone afterwards.

    It is locked, so that sweep() leaves it alone while we live.
    """
    # The lock comes before the name that sweep() looks for: else it could remove the folder between the two
    hidden = Path(tempfile.mkdtemp(prefix=f".new-{os.getpid()}-", dir=repository))
    descriptor = os.open(hidden, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    folder = hidden.with_name(hidden.name.replace(".new-", STAGING))
    try:
        try_flock(descriptor)
        hidden.rename(folder)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(hidden, ignore_errors=True)
        os.close(descriptor)


def sweep(repository: Path) -> list[str]:
    """Removes what killed builds and removals left; gives the names of what it removed."""
    with locked(repository):
        removed = [path.name for path in _orphans(repository)]
        for name in removed:
            shutil.rmtree(repository / name)
    return removed


def _orphans(repository: Path) -> Iterator[Path]:
    """Finds staging folders without a living owner, and parts of releases that do not exist.

    Parts of the active release are spared. A member counts only if its own config.pbtxt says which release it
    belongs to, a release's own folder only if it holds an alias: other people's models stay.
    """
    spared = {*release_names(repository), active_release(repository) if _alias(repository).exists() else None}
    for path in sorted(repository.iterdir()):
        if path.name.startswith(STAGING):
            orphan = not _has_owner(path)
        elif path.name.startswith(".new-"):
            # A staging folder lives under this name for a moment only
            orphan = time.time() - path.stat().st_mtime > 60
        elif match := _MEMBER.fullmatch(path.name):
            orphan = match[1] not in spared and _release_of(path) == match[1]
        else:
            orphan = path.name not in spared and (path / ALIAS_FILE).exists()
        if orphan:
            yield path


def _has_owner(folder: Path) -> bool:
    """Says whether a living process holds the folder's lock."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return not try_flock(descriptor)
    finally:
        os.close(descriptor)


def _release_of(member: Path) -> str | None:
    """Names the release that a member's config.pbtxt says it belongs to; None if it says nothing."""
    try:
        match = _RELEASE_PARAMETER.search((member / "config.pbtxt").read_text(encoding="utf-8"))
    except OSError:
        return None
    return match[1] if match else None


def _alias(repository: Path) -> Path:
    """Gives the path of the alias's configuration."""
    return repository / contract.PIPELINE / "config.pbtxt"


def remove(repository: Path, name: str, unload: Callable[[], None] = lambda: None) -> None:
    """Removes a release that is not active; `unload` takes it out of a server, and nobody can activate it
    meanwhile.

    Its manifest goes first: killed in the middle, the rest are orphans for sweep().
    """
    if not (repository / check_name(name) / "manifest.json").exists():
        raise ReleaseError(
            f"no release {name!r} in {repository}",
            f"there are: {', '.join(release_names(repository)) or 'none'}",
        )
    with locked(repository):
        if active_release(repository) == name:
            raise ReleaseError(
                f"release {name} is active", "activate another one first: peregrine release activate NAME"
            )
        unload()
        with staging(repository) as trash:
            for folder in (repository / name, *member_folders(repository, name)):
                folder.rename(trash / folder.name)


def point_alias(repository: Path, config: str) -> None:
    """Makes `config` the alias's configuration. Call it under locked().

    It is put there by a rename, so that a reader finds the old text or the new one.
    """
    version = _alias(repository).parent / "1"
    # Triton wants a version folder, though an ensemble has nothing to put there
    version.mkdir(parents=True, exist_ok=True)
    write_durably(_alias(repository), config)
