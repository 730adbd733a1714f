"""Keeps the repository's shape on disk: which releases exist, who may change it, what a killed process left.

.route.json               the route: which releases are served, to which shares of users
recommend/config.pbtxt    the alias: the route's main release, for a server that knows no route; search/ is
                          one more, where that release has the pipeline
rN/manifest.json          release rN exists if and only if this file does
rN_<model>/               its members, renamed in before rN/ and out after it
.audit.jsonl              who changed the route, when, from what to what (ensemble/release/audit.py)
.names.json               whose name is whose, also of removed releases (ensemble/release/names.py)
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
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from ensemble import contract
from ensemble.errors import InvalidInput, ReleaseError
from ensemble.release.audit import note_change
from ensemble.release.files import LOCK, keep_reserve, partial_files, try_flock, write_durably
from ensemble.release.manifest import MANIFEST
from ensemble.release.names import NAME, check_name, release_names, remember_names
from ensemble.release.release import active_release, served_releases
from ensemble.release.route import Route, read_route, write_route

MIN_AGE_S = 3600.0  # what has changed since may still be arriving: a copy brings members first
STAGING = ".staging-"
FUSED = "fused"  # configs/fused.pbtxt of a release's ensemble: all steps in one process
ALIAS_FILE = "alias.pbtxt"  # in a release's own folder: what activation makes recommend/config.pbtxt
# All that a member's model.py ever says: what serves lies in this package, never in a release
MODEL_PY = (
    "import triton_python_backend_utils  # noqa: F401  (puts our packages first)\n"
    "from ensemble.python_model import PythonModel as TritonPythonModel  # noqa: F401\n"
)


def alias_file(pipeline: str) -> str:
    """Names the file in a release's own folder that is its alias of a pipeline."""
    return ALIAS_FILE if pipeline == contract.PIPELINE else f"{pipeline}.{ALIAS_FILE}"


_MEMBER = re.compile(rf"({NAME.pattern})_[a-z0-9_]+")
_RELEASE_PARAMETER = re.compile(r'key:\s*"release"\s*value\s*\{\s*string_value:\s*"([^"]*)"')


def require_folder(repository: Path) -> None:
    """Raises InvalidInput unless the repository's folder is there."""
    if not repository.is_dir():
        raise InvalidInput(
            f"repository {repository} does not exist; `peregrine build SHOP --activate` makes one"
        )


def require_active(repository: Path, home: Path | None = None) -> str:
    """Gives the active release's name; ReleaseError that lists what could be activated where none is."""
    name = active_release(repository, home)
    if name is not None:
        return name
    names = ", ".join(release_names(repository))
    cure = (
        f"`peregrine release activate NAME` (there are: {names})"
        if names
        else "`peregrine build SHOP --activate`"
    )
    if home is not None and not os.access(home, os.W_OK):
        cure += f", or `peregrine serve --route NAME`, as {home} cannot be written to"
    raise ReleaseError(f"no release is active in {repository}", cure)


def member_folders(repository: Path, name: str) -> list[Path]:
    """Lists the model folders of release `name`, its ensemble included, whether or not it is complete."""
    return sorted(path for path in repository.glob(f"{name}_*") if path.is_dir())


@contextlib.contextmanager
def locked(repository: Path, wait_s: float = 30.0) -> Iterator[None]:
    """Holds a repository's lock, or a home's; ReleaseError names the holder if it is not free in `wait_s`.

    It is a flock, because the kernel drops it when its holder dies: a killed build never leaves the
    repository locked.
    """
    try:
        lock = os.open(repository / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise ReleaseError(f"cannot lock {repository}: {error.strerror}") from error
    try:
        _wait_for(lock, repository, wait_s)
        with contextlib.suppress(OSError):  # a full disk: the lock holds, though it cannot name us
            keep_reserve(lock, f"{os.getpid()}\n".encode())
        yield
    finally:
        os.close(lock)


@contextlib.contextmanager
def both_locked(repository: Path, home: Path) -> Iterator[None]:
    """Holds the locks of a home and its repository, which may be one folder."""
    with locked(home), contextlib.nullcontext() if home == repository else locked(repository):
        yield


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


def sweep(
    repository: Path, log: Callable[[str], None], min_age_s: float = MIN_AGE_S, home: Path | None = None
) -> list[str]:
    """Removes what killed builds and removals left, once nothing in it has changed for `min_age_s`, and
    tells `log` what it removes; gives the names."""
    removed = []
    with locked(repository):
        for why, paths in _leftovers(repository, home):
            if _age_s(paths) < min_age_s:
                continue
            names = [path.name for path in paths]
            log(f"removing {', '.join(names)} from {repository}: {why}")
            for path in paths:
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
            removed += names
    return removed


def _leftovers(repository: Path, home: Path | None) -> Iterator[tuple[str, list[Path]]]:
    """Finds what nobody owns, with what it is: staging folders, files that were being written, and the parts
    of each release without a manifest. Those of releases that are served are spared."""
    for path in sorted(repository.iterdir()):
        # A staging folder lives as .new-… for a moment only
        if path.name.startswith(".new-") or (path.name.startswith(STAGING) and not _has_owner(path)):
            yield "a build or removal that was killed left it", [path]
    for folder in dict.fromkeys((repository, home or repository)):
        for path in partial_files(folder):
            yield "a command that was killed while it wrote left it", [path]
    served = served_releases(repository, home)
    for name, paths in half_releases(repository).items():
        if name not in served:
            yield f"parts of a release without {name}/{MANIFEST}", paths


def half_releases(repository: Path) -> dict[str, list[Path]]:
    """Gives {name: folders} of releases that are not whole since their manifest is missing: a copy under way,
    or what a killed build or removal left.

    A member counts only if its own config.pbtxt says which release it belongs to, a release's own folder only
    if it holds an alias: other people's models are none.
    """
    whole, halves = set(release_names(repository)), dict[str, list[Path]]()
    for path in sorted(repository.iterdir()):
        match = _MEMBER.fullmatch(path.name)
        name = match[1] if match else path.name
        if name in whole or not NAME.fullmatch(name):
            continue
        if _is_member(path, name) if match else (path / ALIAS_FILE).exists():
            halves.setdefault(name, []).append(path)
    return halves


def _is_member(path: Path, name: str) -> bool:
    """Says whether a folder holds a member of release `name`, or its plans."""
    return release_of(path) == name or (path.name == f"{name}_plans" and any(path.glob(f"*/{name}_*")))


def _age_s(paths: Iterable[Path]) -> float:
    """Gives the seconds since anything in these folders changed. By ctime, since copying tools set mtime
    back."""
    newest = 0.0
    for path in paths:
        for one in (path, *path.rglob("*")):
            with contextlib.suppress(FileNotFoundError):
                newest = max(newest, one.lstat().st_ctime)
    return time.time() - newest


def _has_owner(folder: Path) -> bool:
    """Says whether a living process holds the folder's lock."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return not try_flock(descriptor)
    finally:
        os.close(descriptor)


def release_of(member: Path) -> str | None:
    """Names the release that a member's config.pbtxt says it belongs to; None if it says nothing."""
    try:
        match = _RELEASE_PARAMETER.search((member / "config.pbtxt").read_text(encoding="utf-8"))
    except OSError:
        return None
    return match[1] if match else None


def _alias(repository: Path, pipeline: str = contract.PIPELINE) -> Path:
    """Gives the path of an alias's configuration."""
    return repository / pipeline / "config.pbtxt"


def remove(
    repository: Path, name: str, unload: Callable[[], None] = lambda: None, home: Path | None = None
) -> None:
    """Removes a release that is not active, or the parts of one; `unload` takes it out of a server, and
    nobody can activate it meanwhile. Its name stays given.

    Its manifest goes first: killed in the middle, the rest are leftovers for sweep().
    """
    check_name(name)
    with both_locked(repository, home or repository):
        folders = _folders(repository, name)
        if not folders:
            raise ReleaseError(
                f"no release {name!r} in {repository}",
                f"there are: {', '.join(release_names(repository)) or 'none'}",
            )
        _refuse_served(repository, name, home)
        unload()
        remember_names(repository)
        with staging(repository) as trash:
            for folder in folders:
                folder.rename(trash / folder.name)


def _refuse_served(repository: Path, name: str, home: Path | None) -> None:
    """Raises ReleaseError if a release has a share of the route."""
    if active_release(repository, home) == name:
        raise ReleaseError(
            f"release {name} is active", "activate another one first: peregrine release activate NAME"
        )
    route = read_route(home or repository)
    if route is not None and route.share(name):
        raise ReleaseError(
            f"release {name} is tried by {route.share(name):.3g} of the users", "peregrine release abort"
        )


def _folders(repository: Path, name: str) -> list[Path]:
    """Lists the folders of a release, its own first, or those parts of it that are there."""
    if (repository / name / MANIFEST).exists():
        return [repository / name, *member_folders(repository, name)]
    return half_releases(repository).get(name, [])


def put_route(repository: Path, route: Route, home: Path | None = None) -> None:
    """Makes `route` what is served, and the alias name its main release. Call it under locked().

    The route is the truth and goes first: killed in between, align_alias() does the rest.
    """
    aliases, before = aliases_of(repository, route.main), _known_route(home or repository)
    write_route(home or repository, route)
    note_change(home or repository, before, route)
    _copy_aliases(repository, aliases, home)


def _known_route(home: Path) -> Route | None:
    """Reads a route; None as well where it is damaged."""
    try:
        return read_route(home)
    except ReleaseError:
        return None


def align_alias(repository: Path, home: Path | None = None) -> None:
    """Makes the alias name the route's main release, if a killed process left it behind. Call it under
    locked()."""
    route = read_route(home or repository)
    if route is None or not (repository / route.main / ALIAS_FILE).exists():
        return
    aliases = aliases_of(repository, route.main)
    paths = {pipeline: _alias(repository, pipeline) for pipeline in contract.PIPELINES}
    there = {name: path.read_text(encoding="utf-8") for name, path in paths.items() if path.exists()}
    if there != aliases:
        _copy_aliases(repository, aliases, home)


def _copy_aliases(repository: Path, aliases: Mapping[str, str], home: Path | None) -> None:
    """Writes the aliases where the repository can be written, and removes those of pipelines that the release
    has not; a home elsewhere has the truth without them."""
    if home not in (None, repository) and not os.access(repository, os.W_OK):
        return
    for pipeline in contract.PIPELINES:
        if pipeline in aliases:
            point_alias(repository, aliases[pipeline], pipeline)
        elif _alias(repository, pipeline).exists():
            shutil.rmtree(repository / pipeline)


def aliases_of(repository: Path, name: str) -> dict[str, str]:
    """Reads the aliases of all pipelines that a release has, by the pipeline's name."""
    others = (one for one in contract.PIPELINES[1:] if (repository / name / alias_file(one)).exists())
    return {one: alias_of(repository, name, one) for one in (contract.PIPELINE, *others)}


def alias_of(repository: Path, name: str, pipeline: str = contract.PIPELINE) -> str:
    """Reads the alias's config.pbtxt that a release brings along."""
    path = repository / name / alias_file(pipeline)
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ReleaseError(f"cannot read {path}: {error.strerror}; build the release again") from error


def point_alias(repository: Path, config: str, pipeline: str = contract.PIPELINE) -> None:
    """Makes `config` the configuration of a pipeline's alias. Call it under locked().

    It is put there by a rename, so that a reader finds the old text or the new one.
    """
    version = _alias(repository, pipeline).parent / "1"
    # Triton wants a version folder, though an ensemble has nothing to put there
    version.mkdir(parents=True, exist_ok=True)
    write_durably(_alias(repository, pipeline), config)
