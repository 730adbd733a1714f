"""Seals what an overlay's log has into a segment with an index, in a process of its own, niced to idle.

Serving goes on, and is turned to the new segment in one step. Segments of about the same size are joined on
the way (the logarithmic method of Bentley and Saxe 1980): a change is moved a few times, however many there
are, and what it costs does not hang on the catalogue's size.

    python -m ensemble.live.merge REPOSITORY RELEASE SEQUENCE [HOME]
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import faiss
import numpy as np

from ensemble.errors import PeregrineError, ReleaseError
from ensemble.live.generations import Current, read_current
from ensemble.live.log import LogReader
from ensemble.live.segment import Part, Segment, joined_part, part_from_records, write_meta, write_part
from ensemble.release.release import Release, open_release

_PIECE = 1 << 16  # rows added at once
_RATIO = 2  # a segment is joined to what comes behind it unless it is more than so many times larger


def merge(release: Release, sequence: int) -> int:
    """Writes the segment that has all changes of the log up to `sequence`; gives its number.

    Nobody serves it until Overlay.turn_to.
    """
    current = read_current(release.live_folder)
    number = current.generation + 1
    seal(release, number, current.segments, _tail(release, current, sequence), sequence)
    return number


def seal(release: Release, number: int, segments: Sequence[str], part: Part, sequence: int) -> list[str]:
    """Writes segment g<number> of a part, joined to those of `segments` that are not much larger; gives the
    names of the segments that there are then."""
    folder = release.live_folder
    sizes = [len(Segment(folder / name)) for name in segments]
    kept = len(segments) - _num_joined(sizes, len(part.rows))
    staged, name = folder / f".merging-{os.getpid()}", f"g{number}"
    staged.mkdir()
    parts = [*(Segment(folder / one).part for one in segments[kept:]), part]
    joined = joined_part(parts, release.schema, staged)
    write_part(staged, joined)
    faiss.write_index(_index_of(release, joined), str(staged / "index.faiss"))
    write_meta(staged, sequence, segments[kept:])
    _put_in_place(staged, folder / name)
    return [*segments[:kept], name]


def _put_in_place(staged: Path, segment: Path) -> None:
    """Gives a finished segment its name.

    What has it already is served by nobody: a merge whose writer was killed goes on, and may end after the
    next writer has swept.
    """
    shutil.rmtree(segment, ignore_errors=True)
    staged.rename(segment)


def _num_joined(sizes: Sequence[int], num_new: int) -> int:
    """Says how many of the last segments, of these sizes, are joined to so many new rows."""
    total = num_new
    for count, size in enumerate(reversed(sizes)):
        if size > _RATIO * total:
            return count
        total += size
    return len(sizes)


def _tail(release: Release, current: Current, sequence: int) -> Part:
    """Reads the log's changes up to `sequence`."""
    reader = LogReader(release.live_folder / f"log-{current.generation}", release.schema)
    pieces = [np.zeros(0, reader.dtype)]
    while reader.sequence < sequence and len(records := reader.read()):
        pieces.append(records[records["sequence"] <= sequence])
    if reader.sequence < sequence:
        raise ReleaseError(
            f"{reader.path} ends at sequence {reader.sequence}, before {sequence}: nothing was merged"
        )
    return part_from_records(np.concatenate(pieces), len(release.items))


def _index_of(release: Release, part: Part) -> faiss.Index:
    """Builds an index of the release's kind, with its centroids and codebooks, over a part's rows."""
    index = _empty_index(release)
    for start in range(0, len(part.rows), _PIECE):
        index.add(np.ascontiguousarray(part.items["embedding"][start : start + _PIECE]))
    return index


def _empty_index(release: Release) -> faiss.Index:
    """Gives the release's index with nothing in it; taken out of the whole one once, for that is large."""
    path = release.live_folder / "empty.faiss"
    if not path.exists():
        index = faiss.read_index(str(release.path / "index.faiss"))
        index.reset()
        staged = path.with_name(f".empty-{os.getpid()}")
        faiss.write_index(index, str(staged))
        staged.rename(path)
    return faiss.read_index(str(path))


def main(arguments: list[str]) -> None:
    """Merges as the command line says, and prints the segment's number."""
    repository, name, sequence, *home = arguments
    faiss.omp_set_num_threads(1)
    try:
        release = open_release(Path(repository), name, Path(home[0]) if home else None)
        print(merge(release, int(sequence)))
    except PeregrineError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main(sys.argv[1:])
