"""One Faiss index as it was built: position p is item row p + 1. Any kind; compressed ones are refined with
exact vectors.

Filters are masks over rows. A Flat or IVFFlat index gives exact scores; PQ and RaBitQ only choose
`refine_factor` times as many items as wanted, which are then scored again with memory-mapped vectors, so that
scores can be merged with any other list's.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from ensemble.errors import ReleaseError
from ensemble.index.found import Found, cut, nothing_found
from ensemble.index.vectors import Vectors

# share and number of rows under which a search of just these is cheaper, and exact
_EXACT_BELOW, _EXACT_MOST = (
    0.02,
    200_000,
)
_PIECE = 1 << 22  # floats gathered at once: 16 MB
_MOST_PROBES_MORE = 8


@dataclass(frozen=True)
class QuerySettings:
    """How an index is asked; how it was built is builders.index.choice.IndexKind's."""

    nprobe: int = 1  # IVF lists visited; Flat ignores it
    refine_factor: int = 0  # items scored again for each one wanted; 0: the index's own scores are exact


def open_index(path: Path, num_items: int, embedding: int) -> faiss.Index:
    """Memory-maps a Faiss index and holds it against what the release promises; position p of the index is
    item row p + 1."""
    try:
        index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
    except (RuntimeError, MemoryError) as error:
        raise ReleaseError(
            f"cannot open {path}: "
            f"{(str(error) or 'not enough memory for what it claims to hold').splitlines()[0]}"
        ) from None
    if (index.ntotal, index.d, index.metric_type) != (num_items, embedding, faiss.METRIC_INNER_PRODUCT):
        raise ReleaseError(
            f"{path}: has {index.ntotal} vectors of {index.d}, metric {index.metric_type}; the release has "
            f"{num_items} of {embedding}, inner product"
        )
    return index


class MainIndex:
    """Searches whole batches, filtered or not; exact where few items are left."""

    def __init__(self, index: Any, vectors: Vectors, query: QuerySettings) -> None:
        """`index` has Faiss's search; `vectors` serve exact searches and refinement."""
        self.index, self.vectors, self.query = index, vectors, query
        self.num_items = int(index.ntotal)
        self.num_lists = index.nlist if isinstance(index, faiss.IndexIVF) else 1
        faiss.omp_set_num_threads(1)

    def search(self, query: np.ndarray, depth: int, mask: np.ndarray | None = None) -> Found:
        """[Q, D] -> the best `depth` items that pass `mask` [num_items + 1 or more] bool, row by row of the
        catalogue."""
        passing = self.num_items if mask is None else int(np.count_nonzero(mask[1 : self.num_items + 1]))
        if not len(query) or not passing:
            return nothing_found(len(query), depth)
        if mask is not None and passing <= max(depth, min(_EXACT_BELOW * self.num_items, _EXACT_MOST)):
            return self.search_rows(query, depth, np.flatnonzero(mask[: self.num_items + 1]))
        wanted = min(depth, passing)
        # the best of few lie in more lists than the best of all
        more = min(np.sqrt(self.num_items / passing), _MOST_PROBES_MORE)
        rows, scores = self._approximate(query, depth, mask, int(np.ceil(self.query.nprobe * more)))
        short = np.flatnonzero(rows[:, wanted - 1] <= 0)
        if len(short) and self.num_lists > 1:  # the visited lists held too few: nothing may be lost for it
            rows[short], scores[short] = self._approximate(query[short], depth, mask, self.num_lists)
        return rows, scores

    def search_rows(self, query: np.ndarray, depth: int, rows: np.ndarray) -> Found:
        """[Q, D] against the items in `rows` [P] ascending only; exact."""
        size = max(1, _PIECE // query.shape[1])
        found = nothing_found(len(query), depth)
        for start in range(0, len(rows), size):
            piece = rows[start : start + size]
            scores = np.concatenate([found[1], query @ self.vectors(piece).T], axis=1)
            found = cut(
                np.concatenate([found[0], np.broadcast_to(piece, (len(query), len(piece)))], axis=1),
                scores,
                depth,
            )
        return found

    def _approximate(self, query: np.ndarray, depth: int, mask: np.ndarray | None, nprobe: int) -> Found:
        parameters = self._parameters(mask, nprobe)
        if not self.query.refine_factor:
            return self._with_ties(query, depth, parameters)
        length = min(depth * self.query.refine_factor, self.num_items)
        rows = self.index.search(query, length, params=parameters)[1] + 1
        return self._refined(query, rows, depth)

    def _with_ties(self, query: np.ndarray, depth: int, parameters: Any) -> Found:
        """Equal scores in order of rows, also where the list is cut: Faiss leaves that open, and items that
        are the same to the encoder would come or go with the depth that batch-mates need."""
        length = min(depth + 1, self.num_items)
        while True:
            scores, positions = self.index.search(query, length, params=parameters)
            if (
                length == self.num_items
                or not ((scores[:, depth - 1] == scores[:, -1]) & (positions[:, -1] >= 0)).any()
            ):
                break
            length = min(2 * length, self.num_items)
        rows, scores = np.where(positions >= 0, positions + 1, -1), np.where(positions >= 0, scores, -np.inf)
        tied = np.flatnonzero((scores[:, 1:] == scores[:, :-1]).any(axis=1))
        if len(tied):
            order = np.lexsort((rows[tied], -scores[tied]), axis=-1)
            rows[tied], scores[tied] = (
                np.take_along_axis(rows[tied], order, axis=1),
                np.take_along_axis(scores[tied], order, axis=1),
            )
        gap = ((0, 0), (0, max(0, depth - length)))
        return np.pad(rows[:, :depth], gap, constant_values=-1), np.pad(
            scores[:, :depth], gap, constant_values=-np.inf
        )

    def _refined(self, query: np.ndarray, rows: np.ndarray, depth: int) -> Found:
        """Approximate finds [Q, R] (0: none) -> the best `depth` by exact inner product."""
        scores = np.empty(rows.shape, np.float32)
        size = max(1, _PIECE // (rows.shape[1] * query.shape[1]))
        for start in range(0, len(rows), size):
            piece = slice(start, start + size)
            scores[piece] = np.matmul(self.vectors(rows[piece]), query[piece][:, :, None])[..., 0]
        return cut(np.where(rows > 0, rows, -1), np.where(rows > 0, scores, -np.inf), depth)

    def _parameters(self, mask: np.ndarray | None, nprobe: int) -> Any:
        """Search parameters of this index; `mask` becomes a bitmap over index positions."""
        asked: dict[str, Any] = {}
        if mask is not None:
            bits = np.packbits(mask[1 : self.num_items + 1], bitorder="little")
            asked["sel"] = faiss.IDSelectorBitmap(bits)  # type: ignore[call-arg, arg-type]
        if isinstance(self.index, faiss.IndexIVF):
            return faiss.SearchParametersIVF(nprobe=min(nprobe, self.num_lists), **asked)  # type: ignore[call-arg]
        return faiss.SearchParameters(**asked)
