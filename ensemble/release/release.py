"""Opens a release on disk for reading: what the manifest promises is what is served, or nothing is."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ensemble import contract
from ensemble.arrays import Array
from ensemble.errors import ReleaseError
from ensemble.release.files import file_sha256, unlisted_paths
from ensemble.release.ids import IdMap, open_ids
from ensemble.release.manifest import MANIFEST, content_id, read_manifest
from ensemble.release.route import read_route
from ensemble.schema import Schema, schema_from_json
from ensemble.spec import ModelSpec, PipelineSpec

LIVE = ".live"  # the folder of changes of items, in the home
_ACTIVE = re.compile(r'model_name:\s*"([a-z0-9][a-z0-9-]*)_' + contract.PIPELINE + '"')


class Watermark(NamedTuple):
    """Says up to which change of which catalogue log a release was built."""

    log: str
    sequence: int


UNREAD = Watermark("", 0)  # of a build that had no log to read


class Release:
    """Reads one immutable bundle.

    Arrays are memory-mapped, so all processes of a machine share one copy in page cache.
    """

    def __init__(
        self, repository: Path, name: str, manifest: dict[str, Any], home: Path | None = None
    ) -> None:
        self.repository, self.name, self.manifest = repository, name, manifest
        self.path, self.home = repository / name, home or repository

    @cached_property
    def id(self) -> str:
        """Gives what the release is, 16 hex digits: two releases of one name that differ have two ids."""
        return content_id(self.manifest)

    @property
    def live_folder(self) -> Path:
        """Names where its overlay lies, what the catalogue's log is for it; no other release has its id."""
        return self.home / LIVE / f"{self.name}-{self.id}"

    @cached_property
    def watermark(self) -> Watermark:
        """Gives how far the build has read the catalogue's log; ("", 0) where there was none to read."""
        entry = self.manifest.get("catalogue") or {}
        return Watermark(str(entry.get("log", "")), int(entry.get("sequence", 0)))

    @cached_property
    def schema(self) -> Schema:
        """Gives the shop's columns, tasks and sizes."""
        return schema_from_json(self._text("schema.json"))

    @cached_property
    def pipelines(self) -> dict[str, PipelineSpec]:
        """Gives the release's pipelines by name, `recommend` first."""
        return {pipeline.name: pipeline for pipeline in contract.pipelines(self.schema)}

    @property
    def pipeline(self) -> PipelineSpec:
        """Gives the pipeline behind `recommend`."""
        return self.pipelines[contract.PIPELINE]

    @cached_property
    def vocabularies(self) -> dict[str, dict[str, list[str]]]:
        """Gives {"items": {feature: [value, …]}, "users": …}: value v has code offset + 1 + v."""
        return json.loads(self._text("vocabularies.json"))

    @cached_property
    def item_ids(self) -> IdMap:
        """Maps item ids to rows of `items`."""
        return open_ids(self.path / "item_ids.npy")

    @cached_property
    def user_ids(self) -> IdMap:
        """Maps user ids to rows of `users`."""
        return open_ids(self.path / "user_ids.npy")

    @cached_property
    def items(self) -> Array:
        """Gives the items' packed rows [I + 1] (snapshot.item_dtype); row 0 is the unknown item."""
        return self._array("items.npy")

    @cached_property
    def users(self) -> Array:
        """Gives the users' packed rows [U + 1] (snapshot.user_dtype); row 0 is the unknown user."""
        return self._array("users.npy")

    @cached_property
    def item_numbers(self) -> Array:
        """Gives the items' number features as the shop wrote them: [I + 1, n] float32, NaN where missing."""
        return self._array("numbers.npy")

    @cached_property
    def item_titles(self) -> Array:
        """Gives the items' titles: [I + 1] S, UTF-8."""
        return self._array("item_titles.npy")

    def model(self, name: str) -> ModelSpec:
        """Gives the ModelSpec of one member."""
        if name in self.pipelines:
            return self.pipelines[name].fused
        known = {model.name: model for model in contract.members(self.schema)}
        return known[name] if name in known else self.pipeline.model(name)

    def member_file(self, model: str, file: str) -> Path:
        """Gives the path of a file of a member's only version."""
        return self.repository / f"{self.name}_{model}" / "1" / file

    def verify(self, paths: Iterable[Path] | None = None) -> None:
        """Compares files with the manifest's sha256, all of them when `paths` is None: then nothing else may
        lie in the release's folders either.

        ReleaseError names the first that differs.
        """
        promised = self.manifest["files"]
        if paths is None:
            self._refuse_unlisted()
        wanted = promised if paths is None else [str(p.relative_to(self.repository)) for p in paths]
        for relative in wanted:
            entry = promised.get(relative)
            if entry is None:
                raise ReleaseError(f"manifest: {relative} is not a file of release {self.name}")
            self._verify_file(relative, entry)

    def verify_data(self, *names: str) -> None:
        """Verifies files of the release's own folder, by name."""
        self.verify(self.path / name for name in names)

    def unlisted(self) -> Iterator[str]:
        """Finds what lies in the release's folders unlisted by its manifest; Triton would run it."""
        yield from unlisted_paths(self.repository, {*self.manifest["files"], f"{self.name}/{MANIFEST}"})

    def _refuse_unlisted(self) -> None:
        """Raises ReleaseError for the first file or folder that the manifest does not list."""
        try:
            path = next(self.unlisted(), None)
        except OSError as error:
            raise ReleaseError(
                f"cannot read {error.filename} of release {self.name}: {error.strerror}",
                "activate another release or build again",
            ) from error
        if path is not None:
            raise ReleaseError(
                f"manifest: {path} is not a file of release {self.name}, yet it lies in its folders",
                f"remove {self.repository / path}, or build again",
            )

    def _verify_file(self, relative: str, entry: dict[str, Any]) -> None:
        """Raises ReleaseError unless the file is what its manifest's `entry` says."""
        try:
            digest = file_sha256(self.repository / relative)
        except OSError as error:
            raise ReleaseError(
                f"manifest: cannot read {relative} of release {self.name}: {error.strerror}",
                "activate another release or build again",
            ) from error
        if digest != entry["sha256"]:
            raise ReleaseError(
                f"manifest: sha256 mismatch {relative}; release {self.name} was changed",
                "activate another release or build again",
            )

    def _text(self, name: str) -> str:
        """Reads a text file of the release's own folder."""
        try:
            return (self.path / name).read_text(encoding="utf-8")
        except OSError as error:
            raise ReleaseError(f"cannot read {self.path / name}: {error.strerror}") from error

    def _array(self, name: str) -> Array:
        """Maps an array of the release's own folder into memory."""
        try:
            return np.load(self.path / name, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise ReleaseError(f"cannot open {self.path / name}: {error}") from error


def open_release(repository: Path, name: str, home: Path | None = None) -> Release:
    """Opens release `name`; ReleaseError if it is absent, half there, or made for another contract.

    Its items' changes lie in `home`, which is the repository if not given. Only schema.json is held against
    its digest here: see Release.verify.
    """
    path = repository / name / MANIFEST
    try:
        release = Release(repository, name, read_manifest(path), home)
    except FileNotFoundError:
        raise ReleaseError(
            f"no release {name!r} in {repository}: {path} does not exist",
            "`peregrine release list` shows what there is",
        ) from None
    release.verify_data("schema.json")  # before it is parsed: a changed one may be no JSON at all
    if release.manifest.get("contract") != contract.fingerprint(release.schema):
        raise ReleaseError(
            f"release {name} was built for another contract (tensors or steps differ)",
            "build it again with this Peregrine",
        )
    return release


def served_releases(repository: Path, home: Path | None = None) -> tuple[str, ...]:
    """Names every release that has a share of the route, the main one first; none before the first
    activation."""
    route = read_route(home or repository)
    if route is not None:
        return route.releases
    active = active_release(repository, home)
    return () if active is None else (active,)


def active_release(repository: Path, home: Path | None = None) -> str | None:
    """Names the main release of the route in `home`, which is the repository if not given; where no route
    was written yet, the one that the alias points to. None before the first activation."""
    route = read_route(home or repository)
    if route is not None:
        return route.main
    try:
        text = (repository / contract.PIPELINE / "config.pbtxt").read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    match = _ACTIVE.search(text)
    if match is None:
        raise ReleaseError(
            f"{repository / contract.PIPELINE / 'config.pbtxt'} names no release",
            "activate one: peregrine release activate NAME",
        )
    return match.group(1)
