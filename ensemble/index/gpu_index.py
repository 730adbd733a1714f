"""Searches a Faiss index on the GPU, as main_index.MainIndex does on the CPU, and finds the same neighbours.

It needs faiss-gpu, or faiss-gpu-cuvs, which then searches with cuVS by itself.

Classic GPU indexes ignore ID selectors without a word, and give 2,048 neighbours at most. So a filter is
over-fetch and mask; where that leaves too few, the passing rows are searched exactly, in a flat index of
their own that stays on the GPU as long as the filter is asked for. GPU indexes are not thread-safe: each
instance has its own resources and its own lock, and its scratch memory is bounded.

One search of a flat index keeps a fraction of a large card busy: it takes the best of one tile of vectors
after another, with one block of threads a query. So a large one is several parts, each with its own
resources and stream, which are searched at once: 10 million vectors in 16 ms instead of 45 (one H200; 16
parts are no better).
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import faiss
import numpy as np

from ensemble.arrays import Array
from ensemble.errors import InvalidInput, ReleaseError
from ensemble.index.found import Found, cut, cut_sorted
from ensemble.index.main_index import MainIndex, QuerySettings
from ensemble.index.vectors import Vectors

_SCRATCH_BYTES = 256 << 20  # Faiss takes 1.5 GB unless told
_MOST = 2048  # k and nprobe of a GPU index
_DOUBT = 1.25  # times as many fetched as a filter's mean share asks for: some users' items pass less often
_SUBSETS_BYTES = 2 << 30  # of the flat indexes of filters' rows, all together
_PIECE = 1 << 18  # vectors uploaded at once
_PARTS, _PARTS_FROM = 4, 1_000_000  # of a flat index with so many items


def check_gpu() -> None:
    """Raises InvalidInput unless Faiss can search on a GPU here."""
    if not hasattr(faiss, "StandardGpuResources") or not faiss.get_num_gpus():
        raise InvalidInput(
            "--index gpu: faiss-gpu or the GPU is missing; install faiss-gpu instead of faiss-cpu, or leave "
            "--index out"
        )


def num_gpus() -> int:
    """Counts the GPUs that this process sees; InvalidInput if Faiss can search on none."""
    check_gpu()
    return int(faiss.get_num_gpus())


class Device:
    """Puts indexes on one GPU, with one instance's resources; `half` keeps whole vectors as fp16."""

    def __init__(self, number: int = 0, *, half: bool = False) -> None:
        check_gpu()
        self._number, self._half, self._resources = number, half, faiss.StandardGpuResources()
        self._resources.setTempMemory(_SCRATCH_BYTES)

    def copy(self, index: faiss.Index) -> Any:
        """Copies an index onto the GPU; RuntimeError if the GPU has no such kind."""
        options = faiss.GpuClonerOptions()
        options.useFloat16 = self._half
        return faiss.index_cpu_to_gpu(self._resources, self._number, index, options)

    def flat(self, embedding: int) -> Any:
        """Makes an empty flat index of inner products on the GPU."""
        config = faiss.GpuIndexFlatConfig()
        config.device, config.useFloat16 = self._number, self._half
        return faiss.GpuIndexFlatIP(self._resources, embedding, config)

    def another(self) -> Device:
        """Gives the same GPU with resources and a stream of its own."""
        return Device(self._number, half=self._half)


class GpuIndex(MainIndex):
    """Searches whole batches like MainIndex, with the search itself on a GPU."""

    def __init__(
        self, index: faiss.Index, vectors: Vectors, query: QuerySettings, device: Device | None = None
    ) -> None:
        device = device or Device()
        super().__init__(index, vectors, query)
        self._lock, self._device, self._embedding = threading.Lock(), device, int(index.d)
        self._subsets: OrderedDict[int, _Subset] = OrderedDict()
        try:
            self._parts = self._uploaded(index, device)
        except RuntimeError as error:
            kind, reason = type(index).__name__, str(error).strip().splitlines()[-1]
            raise ReleaseError(
                f"the GPU cannot take this {kind} ({reason}); build with an --index-memory-mb that holds "
                "whole vectors"
            ) from None

    def _uploaded(self, index: faiss.Index, device: Device) -> list[tuple[int, Any]]:
        """Copies the index onto the GPU, whole or in parts: (first position, index) each."""
        if not isinstance(index, faiss.IndexFlat) or self.num_items < _PARTS_FROM:
            return [(0, device.copy(index))]
        self._pool = ThreadPoolExecutor(_PARTS, thread_name_prefix="gpu-index")
        ends = np.linspace(0, self.num_items, _PARTS + 1).astype(np.int64).tolist()
        parts = []
        for start, end in itertools.pairwise(ends):
            part = device.another().flat(self._embedding)
            for first in range(start, end, _PIECE):
                part.add(index.reconstruct_n(first, min(_PIECE, end - first)))
            parts.append((start, part))
        return parts

    def _approximate(self, query: Array, depth: int, mask: Array | None, nprobe: int) -> Found:
        if depth > _MOST:  # more than a GPU index gives: the CPU's index is still there
            return super()._approximate(query, depth, mask, nprobe)
        wanted, share = depth, 1.0
        if mask is not None:
            passing = int(np.count_nonzero(mask[1 : self.num_items + 1]))
            wanted, share = min(depth, passing), passing / self.num_items / _DOUBT
        length = int(np.ceil(depth * max(1, self.query.refine_factor) / share))
        if mask is not None and length > _MOST:
            return self._exact(query, depth, mask)
        rows, scores = self._fetch(query, min(length, _MOST, self.num_items), nprobe)
        if mask is not None:
            rows = np.where(mask[np.maximum(rows, 0)], rows, 0)
        kept, scores = np.where(rows > 0, rows, -1), np.where(rows > 0, scores, -np.inf)
        if self.query.refine_factor:
            found = self._refined(query, rows, depth)
        elif mask is None:  # in order already
            found = cut_sorted(kept, scores, depth)
        else:
            found = cut(kept, scores, depth)
        short = np.flatnonzero(found[0][:, wanted - 1] <= 0)
        if mask is not None and len(short):  # these users' items pass less often than others'
            found[0][short], found[1][short] = self._exact(query[short], depth, mask)
        return found

    def _fetch(self, query: Array, length: int, nprobe: int) -> Found:
        """Asks the GPU for `length` neighbours; gives their rows [Q, length], 0 where there are none."""
        nprobe = min(nprobe, _MOST, self.num_lists)
        parameters = faiss.SearchParametersIVF(nprobe=nprobe) if self.num_lists > 1 else None  # type: ignore[call-arg]
        with self._lock:
            if len(self._parts) == 1:
                scores, positions = self._parts[0][1].search(query, length, params=parameters)
                return positions + 1, scores
            parts = list(self._pool.map(lambda part: part[1].search(query, length), self._parts))
        scores = np.concatenate([scores for scores, _ in parts], axis=1)
        rows = np.concatenate(
            [
                np.where(positions >= 0, positions + 1 + start, 0)
                for (start, _), (_, positions) in zip(self._parts, parts, strict=True)
            ],
            axis=1,
        )
        # Stable, of lists in order: a merge, in which equal scores stay in order of rows.
        best = np.argsort(-scores, axis=1, kind="stable")[:, :length]
        return np.take_along_axis(rows, best, axis=1), np.take_along_axis(scores, best, axis=1)

    def _exact(self, query: Array, depth: int, mask: Array) -> Found:
        """Searches all rows that pass; gives the best `depth` for query [Q, D]."""
        with self._lock:
            subset = self._subset(mask)
            if subset is None:
                return self.search_rows(query, depth, np.flatnonzero(mask[: self.num_items + 1]))
            length = min(depth, len(subset.rows), _MOST)
            scores, positions = subset.index.search(query, length)
        rows = np.where(positions >= 0, subset.rows[positions], -1)
        return cut_sorted(rows, np.where(rows > 0, scores, -np.inf), depth)

    def _subset(self, mask: Array) -> _Subset | None:
        """Gives the flat index of the mask's rows: a filter's mask is one object for as long as it is asked
        for. None if it does not fit the memory that is set aside for these."""
        known = self._subsets.get(id(mask))
        if known is not None and known.mask() is mask:
            self._subsets.move_to_end(id(mask))
            return known
        rows = np.flatnonzero(mask[: self.num_items + 1])
        if len(rows) * self._embedding * 4 > _SUBSETS_BYTES:
            return None
        self._make_room(len(rows))
        index = self._device.flat(self._embedding)
        for start in range(0, len(rows), _PIECE):
            index.add(np.ascontiguousarray(self.vectors(rows[start : start + _PIECE]), np.float32))
        self._subsets[id(mask)] = subset = _Subset(index, rows, weakref.ref(mask))
        return subset

    def _make_room(self, num_rows: int) -> None:
        """Drops the subsets of masks that are no more, then the longest unused, until so many rows fit."""
        for key in [key for key, subset in self._subsets.items() if subset.mask() is None]:
            del self._subsets[key]
        most = _SUBSETS_BYTES // (self._embedding * 4)
        while self._subsets and sum(len(s.rows) for s in self._subsets.values()) + num_rows > most:
            self._subsets.popitem(last=False)


class _Subset:
    """Holds the rows that pass one mask, and the flat index of their vectors on the GPU."""

    def __init__(self, index: Any, rows: Array, mask: weakref.ref[Array]) -> None:
        self.index, self.rows, self.mask = index, rows, mask
