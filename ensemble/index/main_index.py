"""Searches one Faiss index of any kind as it was built: its position p is item row p + 1.

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

from ensemble.arrays import Array
from ensemble.errors import ReleaseError
from ensemble.index.found import Found, cut, cut_sorted, last_bits, nothing_found
from ensemble.index.vectors import Vectors

# Share and number of rows under which a search of just these is cheaper, and exact.
_EXACT_BELOW, _EXACT_MOST = 0.02, 200_000
_PIECE = 1 << 22  # floats gathered at once: 16 MB
_MOST_PROBES_MORE = 8


@dataclass(frozen=True)
class QuerySettings:
    """Says how an index is searched; how it was built is builders.index.choice.IndexKind's."""

    nprobe: int = 1  # IVF lists visited; Flat ignores it
    refine_factor: int = 0  # items scored again for each one wanted; 0: the index's own scores are exact


def open_index(path: Path, num_items: int, embedding: int) -> faiss.Index:
    """Memory-maps a Faiss index; ReleaseError if it cannot be read or does not hold what the release
    promises."""
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
        """Takes a Faiss index, or what searches like one, and vectors for exact searches and refinement."""
        self.index, self.vectors, self.query = index, vectors, query
        self.num_items = int(index.ntotal)
        self.num_lists = index.nlist if isinstance(index, faiss.IndexIVF) else 1
        faiss.omp_set_num_threads(1)

    def search(self, query: Array, depth: int, mask: Array | None = None) -> Found:
        """Finds the best `depth` items for query [Q, D] float32 that pass `mask`: bool by item row, at least
        [num_items + 1]."""
        passing = self.num_items if mask is None else int(np.count_nonzero(mask[1 : self.num_items + 1]))
        if not len(query) or not passing:
            return nothing_found(len(query), depth)
        if mask is not None and passing <= max(depth, min(_EXACT_BELOW * self.num_items, _EXACT_MOST)):
            return self.search_rows(query, depth, np.flatnonzero(mask[: self.num_items + 1]))
        wanted = min(depth, passing)
        # The best of few items lie in more lists than the best of all.
        more = min(np.sqrt(self.num_items / passing), _MOST_PROBES_MORE)
        rows, scores = self._approximate(query, depth, mask, int(np.ceil(self.query.nprobe * more)))
        short = np.flatnonzero(rows[:, wanted - 1] <= 0)
        if len(short) and self.num_lists > 1:  # the visited lists held too few: nothing may be lost for it
            rows[short], scores[short] = self._approximate(query[short], depth, mask, self.num_lists)
        return rows, scores

    def search_rows(self, query: Array, depth: int, rows: Array) -> Found:
        """Finds the best of the items in `rows` [P] ascending for query [Q, D], exactly."""
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

    def _approximate(self, query: Array, depth: int, mask: Array | None, nprobe: int) -> Found:
        """Asks the index itself, and refines what it finds where its scores are not exact."""
        parameters = self._parameters(mask, nprobe)
        if not self.query.refine_factor:
            return self._with_ties(query, depth, parameters)
        length = min(depth * self.query.refine_factor, self.num_items)
        rows = self.index.search(query, length, params=parameters)[1] + 1
        return self._refined(query, rows, depth)

    def _with_ties(self, query: Array, depth: int, parameters: Any) -> Found:
        """Searches with equal scores in order of rows, also where the list is cut.

        Faiss leaves that open, and items that are the same to the encoder would come or go with the depth.
        """
        length = min(depth + 1, self.num_items)
        scores, positions = self.index.search(query, length, params=parameters)
        rows, kept = np.where(positions >= 0, positions + 1, -1), np.where(positions >= 0, scores, -np.inf)
        found = cut_sorted(rows, kept, depth)
        if length > depth:
            least, behind = scores[:, depth - 1], scores[:, depth]
            tied = np.flatnonzero((least - behind <= last_bits(least)) & (positions[:, depth] >= 0))
            if len(tied):
                found[0][tied], found[1][tied] = self._all_tied(query[tied], least[tied], depth, parameters)
        return found

    def _all_tied(self, query: Array, least: Array, depth: int, parameters: Any) -> Found:
        """Finds the best `depth` of queries [Q, D] whose lists are cut among equal scores, `least` [Q]: only
        these are searched again, once, for all items that are no worse."""
        found, size = nothing_found(len(query), depth), max(1, _PIECE // self.num_items)
        limits = least - 2 * last_bits(least)
        order = np.argsort(limits)  # one search has one limit: queries with about the same go together
        for start in range(0, len(query), size):
            piece = order[start : start + size]
            limit = float(limits[piece[0]])
            ends, scores, positions = self.index.range_search(query[piece], limit, params=parameters)
            for place, first, last in zip(piece.tolist(), ends[:-1].tolist(), ends[1:].tolist(), strict=True):
                here = scores[first:last] >= limits[place]
                best = cut(positions[None, first:last][:, here] + 1, scores[None, first:last][:, here], depth)
                found[0][place], found[1][place] = best[0][0], best[1][0]
        return found

    def _refined(self, query: Array, rows: Array, depth: int) -> Found:
        """Scores approximate finds, rows [Q, R] (0: none), by exact inner product; gives the best `depth`."""
        scores = np.empty(rows.shape, np.float32)
        size = max(1, _PIECE // (rows.shape[1] * query.shape[1]))
        for start in range(0, len(rows), size):
            piece = slice(start, start + size)
            scores[piece] = np.matmul(self.vectors(rows[piece]), query[piece][:, :, None])[..., 0]
        return cut(np.where(rows > 0, rows, -1), np.where(rows > 0, scores, -np.inf), depth)

    def _parameters(self, mask: Array | None, nprobe: int) -> Any:
        """Gives the parameters of one search; `mask` becomes a bitmap over index positions."""
        options: dict[str, Any] = {}
        if mask is not None:
            bits = np.packbits(mask[1 : self.num_items + 1], bitorder="little")
            options["sel"] = faiss.IDSelectorBitmap(bits)  # type: ignore[call-arg, arg-type]
        if isinstance(self.index, faiss.IndexIVF):
            return faiss.SearchParametersIVF(nprobe=min(nprobe, self.num_lists), **options)  # type: ignore[call-arg]
        return faiss.SearchParameters(**options)
