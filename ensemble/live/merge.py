"""Merges the log into a new main index, in a process of its own, niced to idle.

Serving goes on, and is turned to the new index in one step.

    python -m ensemble.live.merge REPOSITORY RELEASE SEQUENCE
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import faiss
import numpy as np

from ensemble.arrays import Array
from ensemble.errors import PeregrineError, ReleaseError
from ensemble.live.generations import current_generation, write_meta
from ensemble.live.items import LiveState
from ensemble.live.log import CHANGE, DELETE, record_dtype
from ensemble.release.files import sync_folder
from ensemble.release.release import Release, open_release

_PIECE = 1 << 16  # rows added at once


def merge(release: Release, sequence: int) -> int:
    """Writes the generation that has all changes up to `sequence`; gives its number.

    Nobody serves it until Overlay.turn_to.
    """
    folder = release.live_folder
    state = state_at(release, folder, sequence)
    number, staged = state.generation + 1, folder / f".merging-{os.getpid()}"
    staged.mkdir()
    records = merged_records(state)
    np.save(staged / "rows.npy", records)
    faiss.write_index(merged_index(release, state), str(staged / "index.faiss"))
    write_meta(staged, sequence)
    for path in staged.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    staged.rename(folder / f"g{number}")
    sync_folder(folder)
    return number


def state_at(release: Release, folder: Path, sequence: int) -> LiveState:
    """Gives the items as of `sequence`."""
    state = LiveState(release, folder, current_generation(folder))
    assert state.reader is not None
    while len(records := state.reader.read()):
        wanted = records[records["sequence"] <= sequence]
        state.apply(wanted)
        if len(wanted) < len(records):
            break
    if state.reader.sequence < sequence:
        raise ReleaseError(
            f"{state.reader.path} ends at sequence {state.reader.sequence}, before {sequence}: nothing was "
            "merged"
        )
    return state


def merged_records(state: LiveState) -> Array:
    """Says what each changed row is now: records [n], rows ascending."""
    rows = np.flatnonzero((state.slot_of_row > 0) | state.deleted)
    records = np.zeros(len(rows), record_dtype(state.release.schema))
    slots = state.slot_of_row[rows]
    old = rows < state.num_base
    records["row"], records["kind"] = rows, np.where(state.deleted[rows], DELETE, CHANGE)
    records["id"][old] = state.ids.ids_from_rows(rows[old])
    records["id"][~old] = [state.new_ids[row - state.num_base] for row in rows[~old]]
    records["item"][slots > 0], records["numbers"][slots > 0] = (
        state.slots[slots[slots > 0] - 1],
        state.numbers[slots[slots > 0] - 1],
    )
    return records


def merged_index(release: Release, state: LiveState) -> faiss.Index:
    """Builds the release's index over all rows with their present content.

    Its centroids and codebooks stay: only what they hold is new.
    """
    index = faiss.read_index(str(release.path / "index.faiss"))
    index.reset()
    embeddings, num_rows = release.items["embedding"], state.num_base + len(state.new_ids)
    for start in range(1, num_rows, _PIECE):
        rows = np.arange(start, min(start + _PIECE, num_rows))
        vectors = np.zeros((len(rows), embeddings.shape[1]), np.float32)
        vectors[rows < state.num_base] = embeddings[rows[rows < state.num_base]]
        slots = state.slot_of_row[rows]
        vectors[slots > 0] = state.slots["embedding"][slots[slots > 0] - 1]
        index.add(vectors)
    return index


def main(arguments: list[str]) -> None:
    """Merges as the command line says, and prints the generation's number."""
    repository, name, sequence = arguments
    faiss.omp_set_num_threads(1)
    try:
        print(merge(open_release(Path(repository), name), int(sequence)))
    except PeregrineError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main(sys.argv[1:])
