"""Pulls releases, the route and the log of items out of a store onto a node that serves them."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clients.errors import Unavailable
from clients.items import ItemClient
from clients.operations.push import THREADS
from clients.operations.store import Store, StoreError
from ensemble.errors import PeregrineError, ReleaseError
from ensemble.live.catalogue import log_folder
from ensemble.live.catalogue_log import CatalogueLog
from ensemble.live.pictures import FOLDER as PICTURES
from ensemble.release.arrival import rename_in
from ensemble.release.files import NO_BYTECODE, file_sha256, sync_folder, try_flock, write_durably
from ensemble.release.manifest import MANIFEST, read_manifest
from ensemble.release.names import check_name, is_there, release_names
from ensemble.release.release import served_releases
from ensemble.release.repository import both_locked, put_route
from ensemble.release.route import Route, read_route, route_from_json
from ensemble.release.store_state import StoreState, read_store_state, write_store_state


@dataclass(frozen=True)
class Pulled:
    """Says what a pull did."""

    releases: tuple[str, ...]  # that are here now and were not
    fetched_bytes: int = 0
    route: int = 0  # its number where it has changed
    sequence: int = 0  # the last change to items where there were new ones


def pull(repository: Path, store: Store, names: Sequence[str] = (), home: Path | None = None) -> Pulled:
    """Pulls the named releases; without a name what the store's route names, the log of items, the route.

    Only what is missing travels; a release has its name when every file is what its manifest says. Writes
    into the home whether the store was reached.
    """
    home = home or repository
    repository.mkdir(parents=True, exist_ok=True)
    try:
        done = _pull(repository, store, tuple(map(check_name, names)), home)
    except StoreError as error:
        note(home, store.url, str(error))
        raise
    note(home, store.url)
    return done


def note(home: Path, url: str, problem: str = "") -> None:
    """Notes in the home what a look at the store came to; a home that cannot be written to has no note."""
    before = read_store_state(home)
    reached = time.time() if not problem else before.reached if before else 0.0
    with contextlib.suppress(OSError):
        write_store_state(home, StoreState(url, reached, problem))


def what_is_here(repository: Path, home: Path | None = None) -> str:
    """Names the release that a node serves without its store; empty where there is none."""
    try:
        served = served_releases(repository, home)
    except (PeregrineError, OSError):
        return ""
    is_whole = bool(served) and all((repository / name / MANIFEST).exists() for name in served)
    return served[0] if is_whole else ""


def _pull(repository: Path, store: Store, names: tuple[str, ...], home: Path) -> Pulled:
    """Pulls releases first, then the changes to items, then the route that names them."""
    route = None if names else _route_of(store)
    wanted = names or (route.releases if route else ())
    if not wanted:
        raise StoreError(f"{store.url} has no route", "push one: peregrine push STORE, or name a release")
    came = {name: _pull_release(repository, store, name) for name in wanted}
    size = sum(count or 0 for count in came.values())
    new = tuple(name for name, count in came.items() if count is not None)
    if names:
        return Pulled(new, size)
    sequence = _pull_log(home, store)
    number = _take_route(repository, home, route) if route else 0
    return Pulled(new, size, number, sequence)


def _route_of(store: Store) -> Route | None:
    """Reads the store's route; None where it has none."""
    data = store.read("route.json")
    where = f"{store.url}/route.json"
    return None if data is None else route_from_json(data.decode(errors="replace"), where)


def _take_route(repository: Path, home: Path, route: Route) -> int:
    """Makes the store's route this home's unless it is older; servers follow it. Gives its number, or 0."""
    with both_locked(repository, home):
        mine = read_route(home)
        if mine is not None and mine.sequence >= route.sequence:
            return 0
        put_route(repository, route, home)
    return route.sequence


def _pull_release(repository: Path, store: Store, name: str) -> int | None:
    """Pulls a release; gives the bytes that travelled, None if it was here already."""
    data = store.read(f"releases/{name}.json")
    if data is None:
        there = ", ".join(sorted(one.removesuffix(".json") for one in store.names("releases"))) or "none"
        raise ReleaseError(f"no release {name!r} in {store.url}", f"there are: {there}")
    with _stage(repository, name) as stage:
        (stage / name).mkdir(exist_ok=True)
        write_durably(stage / name / MANIFEST, data.decode(errors="replace"))
        manifest = read_manifest(stage / name / MANIFEST)
        _check_paths(store, name, manifest)
        if is_there(repository, name, manifest["id"]):
            return None
        size = _fetch_files(repository, store, stage, manifest["files"])
        rename_in(repository, stage, _folders(stage, name, manifest), manifest["id"])
        return size


@contextlib.contextmanager
def _stage(repository: Path, name: str) -> Iterator[Path]:
    """Gives the folder where a release is gathered. It stays where a pull is killed or fails, and the next
    one goes on there; another pull of the name waits."""
    stage = repository / f".pull-{name}"
    descriptor = _locked(stage)
    try:
        yield stage
        shutil.rmtree(stage, ignore_errors=True)
    finally:
        os.close(descriptor)


def _locked(stage: Path) -> int:
    """Makes a folder and takes its lock; gives the descriptor. Who had it before may have removed it."""
    while True:
        stage.mkdir(exist_ok=True)
        try:
            descriptor = os.open(stage, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        if try_flock(descriptor):
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), stage.stat()):
                    return descriptor
        os.close(descriptor)
        time.sleep(0.1)


def _check_paths(store: Store, name: str, manifest: Mapping[str, Any]) -> None:
    """Raises StoreError where a manifest is another release's, or names files outside its folders."""
    for path in manifest["files"]:
        parts = Path(path).parts
        is_ours = len(parts) > 1 and (parts[0] == name or parts[0].startswith(f"{name}_"))
        if not is_ours or ".." in parts or str(Path(path)) != path:
            raise StoreError(f"{store.url}: release {name} has a file {path!r}, outside its folders")
    if manifest.get("release") != name:
        raise StoreError(f"{store.url}: releases/{name}.json is of release {manifest.get('release')}")


def _fetch_files(repository: Path, store: Store, stage: Path, files: Mapping[str, Mapping[str, Any]]) -> int:
    """Brings every file of a release into the stage, several at once; gives the bytes that travelled."""
    have = _files_here(repository)

    def fetch(path: str) -> int:
        """Brings one file: it is there already, or another release has it, or it travels."""
        target, digest = stage / path, str(files[path]["sha256"])
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists() and file_sha256(target) == digest:
            return 0
        if (same := have.get(digest)) is not None and file_sha256(same) == digest:
            shutil.copyfile(same, target)
            return 0
        try:
            store.get_blob(digest, target)
        except FileNotFoundError:
            raise StoreError(f"{store.url} lacks {path} ({digest})", "push the release again") from None
        return int(files[path]["bytes"])

    with ThreadPoolExecutor(THREADS) as pool:
        return sum(pool.map(fetch, files))


def _files_here(repository: Path) -> dict[str, Path]:
    """Gives {sha256: a file that should have it} of all releases that are here."""
    have: dict[str, Path] = {}
    for name in release_names(repository):
        with contextlib.suppress(ReleaseError, OSError):
            for path, entry in read_manifest(repository / name / MANIFEST)["files"].items():
                have[entry["sha256"]] = repository / path
    return have


def _folders(stage: Path, name: str, manifest: Mapping[str, Any]) -> list[str]:
    """Makes what a manifest does not list (empty version folders, the files that forbid bytecode), and gives
    the release's folders, its own last."""
    folders = sorted({Path(path).parts[0] for path in manifest["files"]} - {name})
    for folder in folders:
        (stage / folder / "1").mkdir(exist_ok=True)
        if (stage / folder / "1" / "model.py").exists():
            (stage / folder / "1" / NO_BYTECODE).touch()
    for path in (*stage.rglob("*/"), stage):
        sync_folder(path) if path.is_dir() else None
    return [*folders, name]


def _pull_log(home: Path, store: Store) -> int:
    """Takes in the store's changes to items; gives the last one's number, 0 where none is new."""
    facts = store.read_json("catalogue.json")
    folder = log_folder(home)
    if facts is None or _is_known(folder / "log", facts["chunks"]):
        return 0
    folder.mkdir(parents=True, exist_ok=True)
    for name in facts.get("pictures", ()):
        target = folder / PICTURES / str(name)
        if not target.exists():
            target.parent.mkdir(exist_ok=True)
            store.get_blob(str(name), target)
    with tempfile.TemporaryDirectory(prefix=".pull-", dir=folder) as staged:
        whole = Path(staged) / "log"
        with whole.open("wb") as file:
            for chunk in facts["chunks"]:
                piece = Path(staged) / "chunk"
                store.get_blob(str(chunk["sha256"]), piece)
                file.write(piece.read_bytes())
            file.flush()
            os.fsync(file.fileno())
        _hand_over(home, whole)
    return int(facts["sequence"])


def _is_known(log: Path, chunks: Sequence[Mapping[str, Any]]) -> bool:
    """Says whether the log that is here is the store's, by its length and its last chunk: the checksum of its
    last line is of all lines before."""
    try:
        with log.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            if not chunks or size != sum(int(chunk["bytes"]) for chunk in chunks):
                return False
            file.seek(size - int(chunks[-1]["bytes"]))
            return hashlib.sha256(file.read()).hexdigest() == chunks[-1]["sha256"]
    except OSError:
        return False


def _hand_over(home: Path, whole: Path) -> None:
    """Gives the log to the writer of the home if one is at work, else puts it there."""
    try:
        with ItemClient(home) as items:
            items.adopt(whole)
    except Unavailable:
        log = CatalogueLog(home)
        try:
            log.adopt(whole)
        finally:
            log.close()
