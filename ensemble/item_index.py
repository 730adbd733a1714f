"""The Faiss index over item embeddings, as recall asks it: whole batches, filtered users in groups, exact where it matters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import faiss
import numpy as np

from ensemble.errors import ReleaseError

_EXACT_BELOW = 0.02  # share of items left by a filter under which a search of just these rows is cheaper and exact


def open_index(path: Path, num_items: int, embedding: int) -> faiss.Index:
    """Memory-maps a Faiss index and holds it against what the release promises; position p of the index is item row p + 1."""
    try:
        index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
    except RuntimeError as error:
        raise ReleaseError(f"cannot open {path}: {str(error).splitlines()[0]}") from None
    if (index.ntotal, index.d, index.metric_type) != (num_items, embedding, faiss.METRIC_INNER_PRODUCT):
        raise ReleaseError(
            f"{path}: has {index.ntotal} vectors of {index.d}, metric {index.metric_type}; the release has {num_items} of {embedding}, inner product"
        )
    return index


class ItemIndex:
    """Position p of the Faiss index is item row p + 1; scores are inner products."""

    def __init__(self, path: Path, embeddings: np.ndarray, nprobe: int) -> None:
        """`embeddings` [I + 1, D] float32 of the snapshot serve exact searches; `nprobe` IVF lists are visited (Flat ignores it)."""
        self.embeddings, self.nprobe, self.num_rows = embeddings, nprobe, len(embeddings)
        self.index = open_index(path, self.num_rows - 1, embeddings.shape[1])
        faiss.omp_set_num_threads(1)

    def search(self, query: np.ndarray, depth: int, masks: list[np.ndarray | None]) -> np.ndarray:
        """Index rows [B, M, depth] int64, best first, padded with -1. Users with the same filter are searched together."""
        num_users, interests, embedding = query.shape
        out = np.full((num_users, interests, depth), -1, np.int64)
        groups: dict[int, list[int]] = {}
        for user, mask in enumerate(masks):
            groups.setdefault(0 if mask is None else id(mask), []).append(user)
        for users in groups.values():
            flat = np.ascontiguousarray(query[users].reshape(-1, embedding))
            out[users] = self._group(flat, depth, masks[users[0]]).reshape(len(users), interests, depth)
        return out

    def _group(self, query: np.ndarray, depth: int, mask: np.ndarray | None) -> np.ndarray:
        """[Q, D] -> rows [Q, depth]; exact over the rows that pass when few do."""
        if mask is not None:
            passing = np.flatnonzero(mask)
            if len(passing) <= max(depth, _EXACT_BELOW * self.num_rows):
                return self._exact(query, depth, passing)
        rows = self._approximate(query, depth, self._parameters(mask))
        short = np.flatnonzero((rows <= 0).any(axis=1))
        if isinstance(self.index, faiss.IndexIVF) and len(short):  # the visited lists held too few: nothing may be lost for it
            rows[short] = self._exact(query[short], depth, np.flatnonzero(mask) if mask is not None else np.arange(1, self.num_rows))
        return np.where(rows > 0, rows, -1)

    def _approximate(self, query: np.ndarray, depth: int, parameters: Any) -> np.ndarray:
        """[Q, D] -> rows [Q, depth], 0 where there are no more. Equal scores in order of rows, also where the list is cut: Faiss
        leaves that open, and items that are the same to the encoder would come or go with the depth that batch-mates need."""
        length = min(depth + 1, self.num_rows - 1)
        while True:
            scores, rows = self.index.search(query, length, params=parameters)
            cut_within_ties = (scores[:, depth - 1] == scores[:, -1]) & (rows[:, -1] >= 0)
            if length == self.num_rows - 1 or not cut_within_ties.any():
                break
            length = min(2 * length, self.num_rows - 1)
        rows += 1
        tied = np.flatnonzero((scores[:, 1:] == scores[:, :-1]).any(axis=1))
        if len(tied):
            rows[tied] = np.take_along_axis(rows[tied], np.lexsort((rows[tied], -scores[tied]), axis=-1), axis=1)
        return rows[:, :depth]

    def _parameters(self, mask: np.ndarray | None) -> Any:
        """Search parameters of this index; `mask` [I + 1] becomes a bitmap over index positions."""
        asked: dict[str, Any] = {} if mask is None else {"sel": faiss.IDSelectorBitmap(np.packbits(mask[1:], bitorder="little"))}  # type: ignore[call-arg, arg-type]
        if isinstance(self.index, faiss.IndexIVF):
            return faiss.SearchParametersIVF(nprobe=self.nprobe, **asked)  # type: ignore[call-arg]
        return faiss.SearchParameters(**asked)

    def _exact(self, query: np.ndarray, depth: int, rows: np.ndarray) -> np.ndarray:
        """[Q, D] against the items in `rows` [P] only -> [Q, depth], best first, padded with -1."""
        out = np.full((len(query), depth), -1, np.int64)
        scores = query @ self.embeddings[rows].T
        best = np.argsort(-scores, axis=1, kind="stable")[:, :depth]
        out[:, : best.shape[1]] = rows[best]
        return out
