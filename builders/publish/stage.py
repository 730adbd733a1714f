"""Stage `repository`: brings a finished release into the repository, whole or not at all."""

from __future__ import annotations

import contextlib
import datetime
import errno
import hashlib
import importlib.metadata
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from builders.data.dataset import open_schema
from builders.data.spans import read_span
from builders.folders import Inputs, link
from builders.progress import Progress
from builders.publish.triton_config import write_members
from ensemble import contract
from ensemble.errors import ReleaseError
from ensemble.release.arrival import rename_in
from ensemble.release.files import NO_BYTECODE, sync_folder, write_durably
from ensemble.release.manifest import FORMAT, MANIFEST, content_id, sealed
from ensemble.release.names import check_name, next_release_name
from ensemble.release.release import UNREAD, Watermark
from ensemble.release.repository import staging

_PIECE_BYTES = 4 << 20
_NAME, _WAS_THERE = "release-name", "was-there"  # files of the stage's folder: what it published, or found
# The release's report.json has what they say; places are of exposures, and a served list has none
_LEFT_OUT = ("export.json", "compress.json", "positions.npz")


@dataclass(frozen=True)
class Options:
    """Holds where the release goes and what its manifest says of the build."""

    repository: str
    release: str | None  # its name; None: the next free rN
    preset: str
    seed: int
    watermark: Watermark = UNREAD  # how far the build has read the catalogue's log
    is_refit: bool = False  # its models have learned from the held-out rows too
    why_not: str = ""  # why the refit is not published
    settings: Mapping[str, Any] = field(default_factory=dict)  # of the preset, those that were changed
    training: Mapping[str, Any] = field(default_factory=dict)  # all settings, with their values
    # what each stage took, in the build that ran it
    stages_s: Mapping[str, float] = field(default_factory=dict, metadata={"in_key": False})


def run(inputs: Inputs, options: Options, folder: Path, progress: Progress) -> None:
    """Publishes the staged release with its report; `folder` keeps the files, linked, and the name."""
    repository, staged = Path(options.repository), inputs.get("compress") or inputs["export"]
    name = options.release or next_release_name(repository)
    (folder / _NAME).write_text(name)
    schema = open_schema(staged)
    members = write_members(contract.pipelines(schema), contract.beside(schema), name, folder)
    for model in contract.members(schema):
        for engine in sorted((staged / "engines" / model.name).glob("*.onnx")):
            link(engine, members[model.name] / "1" / engine.name)
    own = folder / name
    for path in (*staged.iterdir(), *inputs["verify"].iterdir()):
        if path.is_file() and path.name not in _LEFT_OUT:
            link(path, own / path.name)
    progress(0.5, f"publishing {name}")
    manifest: dict[str, Any] = {
        "shop": schema.shop,
        "preset": options.preset,
        "seed": options.seed,
        "contract": contract.fingerprint(schema),
        "report": json.loads((inputs["verify"] / "report.json").read_text()),
        "trained": {name: read_span(inputs[name]).to_json() for name in ("encoders", "ranker")},
        "refit": options.is_refit,
    }
    if "verified_data" in inputs:
        final = "verified_compress" if "verified_compress" in inputs else "verified_export"
        kept = {"data": inputs["verified_data"], "verified": inputs[final]}
        manifest["stages"] = {name: os.path.relpath(path, repository) for name, path in kept.items()}
    for entry in ("settings", "training", "stages_s"):
        if told := getattr(options, entry):
            manifest[entry] = dict(told)
    if options.why_not:
        manifest["why_no_refit"] = options.why_not
    if options.watermark.log:
        manifest["catalogue"] = options.watermark._asdict()
    if not publish(repository, name, members, own, manifest):
        (folder / _WAS_THERE).touch()


def read_name(folder: Path) -> str:
    """Reads the name of the release that this stage published."""
    return (folder / _NAME).read_text()


def was_there(folder: Path) -> bool:
    """Says whether this stage found the release in the repository, as it would have published it."""
    return (folder / _WAS_THERE).exists()


def publish(
    repository: Path, name: str, members: Mapping[str, Path], release_files: Path, manifest: Mapping[str, Any]
) -> bool:
    """Copies a release into the repository: member folders are renamed in first, `name`/ with its manifest
    last. False if the very same release is there already, and nothing was done.

    members: bare model name ("ranker", "recommend") -> folder with config.pbtxt and 1/; release_files: what
    `name`/ holds beside manifest.json; manifest: its entries beside release, created, format, id, peregrine,
    files and digest, which are filled in here. InvalidInput if the name was given to another release.
    """
    repository.mkdir(parents=True, exist_ok=True)
    check_name(name)
    folders = {**{f"{name}_{model}": folder for model, folder in members.items()}, name: release_files}
    with (
        _room_for(repository, name, sum(_bytes_of(folder) for folder in folders.values())),
        staging(repository) as stage,
    ):
        files: dict[str, dict[str, Any]] = {}
        for target, source in folders.items():
            _copy(source, stage / target, stage, files)
        whole = {**_defaults(name), **manifest, "files": dict(sorted(files.items()))}
        write_durably(stage / name / MANIFEST, sealed(whole))
        return rename_in(repository, stage, list(folders), content_id(whole))


def _defaults(name: str) -> dict[str, Any]:
    created = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    try:
        version = importlib.metadata.version("peregrine-recommender")
    except importlib.metadata.PackageNotFoundError:
        version = "source"
    return {"release": name, "id": "", "created": created, "peregrine": version, "format": FORMAT}


@contextlib.contextmanager
def _room_for(repository: Path, name: str, need_bytes: int) -> Iterator[None]:
    """Turns a full or read-only disk into one line with the room needed; staging is gone by then."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            need = f"need {need_bytes / 1e6:.1f} MB"
            raise ReleaseError(
                f"publish: no space left in {repository}, {need} for release {name}; free some and build "
                "again"
            ) from error
        raise ReleaseError(
            f"publish: cannot write release {name} into {repository}: {error.strerror} ({error.filename})"
        ) from error


def _bytes_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _copy(source: Path, target: Path, stage: Path, files: dict[str, dict[str, Any]]) -> None:
    """Copies a folder with empty ones in it; adds {path in the repository: sha256, bytes} of each file."""
    target.mkdir()
    for path in sorted(source.iterdir()):
        if path.name == NO_BYTECODE:
            continue
        if path.is_dir():
            _copy(path, target / path.name, stage, files)
        else:
            files[str((target / path.name).relative_to(stage))] = _copy_file(path, target / path.name)
    if (target / "model.py").exists():
        _forbid_bytecode(target)
    sync_folder(target)


def _forbid_bytecode(version: Path) -> None:
    """Puts a file where Python would make a folder of bytecode.

    The stub ignores PYTHONDONTWRITEBYTECODE, and a version folder that changes while it is served makes
    Triton load all its members again at the next activation (3 s, tried).
    """
    (version / NO_BYTECODE).touch()


def _copy_file(source: Path, target: Path) -> dict[str, Any]:
    """Copies and digests in one pass, so that the digest is of the bytes that were written."""
    digest, size = hashlib.sha256(), 0
    with source.open("rb") as reader, target.open("xb") as writer:
        while piece := reader.read(_PIECE_BYTES):
            writer.write(piece)
            digest.update(piece)
            size += len(piece)
        writer.flush()
        os.fsync(writer.fileno())
    return {"sha256": digest.hexdigest(), "bytes": size}
