"""Reads and writes a store of releases by fsspec: a folder, an S3 API, whatever fsspec has a driver for.

blobs/ab/ab12…             what files are, by their sha256: written once, the same for all releases
releases/r7.json           the release's manifest; it is there when all its blobs are
route.json                 which releases nodes are to serve
catalogue.json             the log of changes to items, as a list of blobs, and its pictures
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ensemble.errors import InvalidInput, PeregrineError

_PIECE_BYTES = 4 << 20
_DIGEST = re.compile(r"[0-9a-f]{64}")


class StoreError(PeregrineError):
    """Says that a store cannot be reached, or has not what it should have."""


class Store:
    """Keeps one connection to a store; threads may share it."""

    def __init__(self, url: str) -> None:
        """Opens `url`, such as s3://bucket/shop, file:///srv/store or a folder; StoreError if it is none."""
        if "@" in url.partition("://")[2].partition("/")[0]:
            raise InvalidInput(
                f"store {url.partition('://')[0]}://…: an address holds no password",
                "credentials come from the environment, or the files that the store's own tools read",
            )
        with _reached(url):
            import fsspec

            # Neither what another address was nor what was listed before counts
            self._files, root = fsspec.core.url_to_fs(url, skip_instance_cache=True, use_listings_cache=False)
        self.url, self._root = url, root.rstrip("/")
        self._is_local = "file" in _protocols(self._files)

    def read(self, name: str) -> bytes | None:
        """Reads a small file; None where there is none."""
        with _reached(self.url):
            try:
                data: bytes = self._files.cat_file(self._path(name))
            except FileNotFoundError:
                return None
            return data

    def read_json(self, name: str) -> dict[str, Any] | None:
        """Reads a file of JSON; StoreError if it is none."""
        data = self.read(name)
        try:
            return None if data is None else dict(json.loads(data))
        except (ValueError, TypeError) as error:
            raise StoreError(f"{self.url}/{name} is no JSON of ours: {error}", "push again") from None

    def write(self, name: str, data: bytes) -> None:
        """Writes a small file: readers find the old one or this one."""
        with _reached(self.url):
            path = self._path(name)
            if not self._is_local:  # an object is there whole, or not
                self._files.pipe_file(path, data)
                return
            self._files.makedirs(path.rpartition("/")[0], exist_ok=True)
            self._files.pipe_file(f"{path}.{os.getpid()}", data)
            os.replace(f"{path}.{os.getpid()}", path)

    def names(self, folder: str) -> list[str]:
        """Lists the names of the files in a folder."""
        with _reached(self.url):
            try:
                return [path.rpartition("/")[2] for path in self._files.ls(self._path(folder), detail=False)]
            except FileNotFoundError:
                return []

    def has_blob(self, digest: str, size: int) -> bool:
        """Says whether a blob is there, whole."""
        with _reached(self.url):
            try:
                return int(self._files.info(self._blob(digest))["size"]) == size
            except FileNotFoundError:
                return False

    def put_blob(self, digest: str, source: Path | bytes) -> None:
        """Writes a blob."""
        if isinstance(source, bytes):
            self.write(f"blobs/{digest[:2]}/{digest}", source)
            return
        with _reached(self.url):
            path = self._blob(digest)
            if not self._is_local:
                self._files.put_file(str(source), path)
                return
            self._files.makedirs(path.rpartition("/")[0], exist_ok=True)
            self._files.put_file(str(source), f"{path}.{os.getpid()}")
            os.replace(f"{path}.{os.getpid()}", path)

    def get_blob(self, digest: str, target: Path) -> None:
        """Fetches a blob into a file, which has its name when its digest is right; goes on where a killed
        call stopped. StoreError where the store has something else under this digest."""
        part = target.with_name(f".{target.name}.part")
        for _ in range(2):  # a part that a crash has damaged is fetched once more, from its start
            with part.open("ab+") as file:
                if self._fetch(digest, file) == digest:
                    file.flush()
                    os.fsync(file.fileno())
                    part.rename(target)
                    return
            part.unlink()
        raise StoreError(
            f"{self.url}: blob {digest} is not what its name says",
            f"delete blobs/{digest[:2]}/{digest} there, and push the release again",
        )

    def _fetch(self, digest: str, file: Any) -> str:
        """Appends what a file has not of a blob; gives the digest of the whole."""
        found = hashlib.sha256()
        file.seek(0)
        while piece := file.read(_PIECE_BYTES):
            found.update(piece)
        start = file.tell()
        with _reached(self.url):
            size = int(self._files.info(self._blob(digest))["size"])
            while start < size:
                end = min(size, start + _PIECE_BYTES)
                is_whole = (start, end) == (0, size)  # asked for without a range, which not every API likes
                piece = self._files.cat_file(self._blob(digest), *(() if is_whole else (start, end)))
                if not piece:
                    break
                file.write(piece)
                found.update(piece)
                start += len(piece)
        return found.hexdigest()

    def _blob(self, digest: str) -> str:
        """Names a blob; StoreError for a digest that is none, which could be a path."""
        if not _DIGEST.fullmatch(digest):
            raise StoreError(f"{self.url}: {digest[:80]!r} is no sha256", "push the release again")
        return self._path(f"blobs/{digest[:2]}/{digest}")

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"


def _protocols(files: Any) -> tuple[str, ...]:
    """Names the protocols of a file system."""
    return (files.protocol,) if isinstance(files.protocol, str) else tuple(files.protocol)


@contextlib.contextmanager
def _reached(url: str) -> Iterator[None]:
    """Turns whatever a driver raises into one StoreError; drivers have no errors in common but OSError."""
    try:
        yield
    except (PeregrineError, FileNotFoundError):
        raise
    except ImportError as error:
        raise StoreError(
            f"store {url}: its driver is not installed: {error}", "pip install 'peregrine-recommender[s3]'"
        ) from None
    except Exception as error:
        words = " ".join(str(error).split()) or type(error).__name__
        raise StoreError(
            f"store {url} cannot be used: {words[:300]}", "look at its address and credentials"
        ) from error
