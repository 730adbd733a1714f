"""Pushes releases, the route and the log of items into a store, from where any number of nodes pull them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from clients.operations.listing import check_repository
from clients.operations.store import Store
from ensemble.errors import InvalidInput, ReleaseError
from ensemble.live.catalogue import CatalogueReader, all_entries, log_folder
from ensemble.live.pictures import FOLDER as PICTURES
from ensemble.release.manifest import MANIFEST
from ensemble.release.release import open_release, served_releases
from ensemble.release.route import Route, Share, read_route

CHUNK_BYTES = 1 << 20  # of the log: what has not changed is not sent again
THREADS = 8
Blobs = dict[str, tuple[Path, int]]  # by digest: the file that has it, and its bytes


@dataclass(frozen=True)
class Pushed:
    """Says what a push did."""

    releases: tuple[str, ...]
    blobs: int = 0  # that were sent
    sent_bytes: int = 0
    route: int = 0  # its number; 0 where releases were named
    sequence: int = 0  # the last change to items


def push(repository: Path, store: Store, names: Sequence[str] = (), home: Path | None = None) -> Pushed:
    """Pushes the named releases; without a name all that is served, its route, and the log of items.

    A release's manifest goes last, the route after the releases that it names. InvalidInput where the store
    has another release of the name: a name is given once.
    """
    check_repository(repository)
    home = home or repository
    wanted = tuple(names) or served_releases(repository, home)
    if not wanted:
        raise ReleaseError(f"no release is active in {repository}", "name one: peregrine push r7 STORE")
    blobs = sent = 0
    for name in wanted:
        some, size = _push_release(repository, store, name)
        blobs, sent = blobs + some, sent + size
    if names:
        return Pushed(wanted, blobs, sent)
    sequence, some, size = _push_log(home, store)
    # A repository of before there were routes has the alias alone
    route = read_route(home) or Route((Share(wanted[0], 1.0),), "", 1)
    text = route.to_json().encode()
    if store.read("route.json") != text:
        store.write("route.json", text)
    return Pushed(wanted, blobs + some, sent + size, route.sequence, sequence)


def _push_release(repository: Path, store: Store, name: str) -> tuple[int, int]:
    """Pushes a release, or what the store has lost of it; gives how many blobs of how many bytes it sent."""
    release = open_release(repository, name)
    manifest = (repository / name / MANIFEST).read_bytes()
    there = store.read_json(f"releases/{name}.json")
    if there is not None and there.get("id") != release.id:
        raise InvalidInput(
            f"release {name} of {store.url} is another one (id {there.get('id')}; this has {release.id})",
            "a name is given once: build it under a name of its own",
        )
    files = {
        str(entry["sha256"]): (repository / path, int(entry["bytes"]))
        for path, entry in release.manifest["files"].items()
    }
    lacking = _lacking(store, files)
    if lacking:
        release.verify()
        _send(store, lacking)
    if there is None:
        store.write(f"releases/{name}.json", manifest)
    return len(lacking), sum(size for _, size in lacking.values())


def _lacking(store: Store, files: Blobs) -> Blobs:
    """Gives the blobs that the store has not, or of another size, asking for several at once."""
    with ThreadPoolExecutor(THREADS) as pool:
        there = pool.map(lambda digest: store.has_blob(digest, files[digest][1]), files)
        return {digest: files[digest] for digest, is_there in zip(files, there, strict=True) if not is_there}


def _send(store: Store, files: Blobs) -> None:
    """Sends blobs, several at once."""
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(lambda digest: store.put_blob(digest, files[digest][0]), files))


def _push_log(home: Path, store: Store) -> tuple[int, int, int]:
    """Pushes the log of items with its pictures: (last sequence, blobs sent, bytes sent)."""
    folder = log_folder(home)
    if not (folder / "log").exists():
        return 0, 0, 0
    reader = CatalogueReader(folder / "log")
    for _ in all_entries(reader):  # every checksum; what comes after is the next push's
        pass
    with (folder / "log").open("rb") as file:
        data = file.read(reader.offset)
    chunks = list(_chunks(data))
    pictures = {path.name: path for path in sorted((folder / PICTURES).glob("[0-9a-f]*"))}
    facts = {
        "log": reader.id,
        "sequence": reader.sequence,
        "chunks": [{"sha256": digest, "bytes": len(piece)} for digest, piece in chunks],
        "pictures": list(pictures),
    }
    text = json.dumps(facts, indent=1).encode() + b"\n"
    there = store.read_json("catalogue.json")
    _refuse_other_log(store, there, reader)
    if there == facts:
        return reader.sequence, 0, 0
    lacking = _lacking(store, {name: (path, path.stat().st_size) for name, path in pictures.items()})
    _send(store, lacking)
    blobs, sent = len(lacking), sum(size for _, size in lacking.values())
    for digest, piece in chunks:
        if not store.has_blob(digest, len(piece)):
            store.put_blob(digest, piece)
            blobs, sent = blobs + 1, sent + len(piece)
    store.write("catalogue.json", text)
    return reader.sequence, blobs, sent


def _refuse_other_log(store: Store, there: dict[str, object] | None, reader: CatalogueReader) -> None:
    """Raises InvalidInput where the store has another log with changes in it, or is ahead of this one."""
    if not there or not there.get("sequence"):
        return
    if there["log"] != reader.id:
        raise InvalidInput(
            f"{store.url} has the log {there['log']}, and this home has {reader.id}: items are changed "
            "in two places",
            "push from one home alone; `peregrine pull` brings its log to the others",
        )
    if int(str(there["sequence"])) > reader.sequence:
        raise InvalidInput(
            f"{store.url} has changes up to {there['sequence']}, this home only up to {reader.sequence}",
            "pull before you push",
        )


def _chunks(data: bytes) -> Iterator[tuple[str, bytes]]:
    """Cuts a log: (digest, piece) of each chunk."""
    for start in range(0, len(data), CHUNK_BYTES):
        piece = data[start : start + CHUNK_BYTES]
        yield hashlib.sha256(piece).hexdigest(), piece
