"""Reads and writes generations: what a merge leaves, and the small file that says which one is served."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from ensemble.arrays import Array
from ensemble.errors import ReleaseError
from ensemble.live.log import record_dtype
from ensemble.release.files import file_sha256, write_durably
from ensemble.schema import Schema

FILES = ("rows.npy", "index.faiss")


def current_generation(folder: Path) -> int:
    """Gives the generation that is served; ReleaseError when the file that names it is damaged."""
    path = folder / "current"
    try:
        return int(path.read_text())
    except (OSError, ValueError) as error:
        raise ReleaseError(
            f"cannot read {path}: {error}",
            f"start the writer, `peregrine serve` or `peregrine items serve`: it makes {folder} again",
        ) from None


def point_to(folder: Path, generation: int) -> None:
    """Makes `generation` the served one, durably and in one step."""
    write_durably(folder / "current", f"{generation}\n")


def generation_records(folder: Path, schema: Schema) -> Array:
    """Gives the changes that generation `folder` has merged [n], each row once.

    Its files must be what its meta.json promises.
    """
    try:
        meta = json.loads((folder / "meta.json").read_text())
        differing = [name for name in FILES if file_sha256(folder / name) != meta["sha256"][name]]
        records = np.load(folder / "rows.npy", mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, KeyError) as error:
        raise ReleaseError(f"cannot open generation {folder}: {error}", _way_back(folder)) from None
    if differing or records.dtype != record_dtype(schema):
        raise ReleaseError(
            f"{folder / (differing or ['rows.npy'])[0]}: sha256 mismatch or another schema",
            _way_back(folder),
        )
    return records


def write_meta(folder: Path, sequence: int) -> None:
    """Writes meta.json: the last change that is merged, and the digests of the other files."""
    meta = {"sequence": sequence, "sha256": {name: file_sha256(folder / name) for name in FILES}}
    (folder / "meta.json").write_text(json.dumps(meta))


def _way_back(folder: Path) -> str:
    """Says what to do about a damaged generation."""
    return f"start the writer, `peregrine serve` or `peregrine items serve`: it makes {folder.parent} again"
