"""Searches a Faiss index on the GPU, as main_index.MainIndex does on the CPU, and finds the same neighbours.

It needs faiss-gpu, or faiss-gpu-cuvs, which then searches with cuVS by itself.

Classic GPU indexes ignore ID selectors without a word, so a filter is over-fetch and mask, and a search of
the passing rows where that leaves too few. They are not thread-safe: each instance has its own resources and
its own lock, and its scratch memory is bounded.
"""

from __future__ import annotations

import threading

import faiss
import numpy as np

from ensemble.arrays import Array
from ensemble.errors import InvalidInput, ReleaseError
from ensemble.index.found import Found, cut
from ensemble.index.main_index import MainIndex, QuerySettings
from ensemble.index.vectors import Vectors

_SCRATCH_BYTES = 256 << 20  # Faiss takes 1.5 GB unless told
_MOST = 2048  # k and nprobe of a GPU index


def check_gpu() -> None:
    """Raises InvalidInput unless Faiss can search on a GPU here."""
    if not hasattr(faiss, "StandardGpuResources") or not faiss.get_num_gpus():
        raise InvalidInput(
            "--index gpu: faiss-gpu or the GPU is missing; install faiss-gpu instead of faiss-cpu, or leave "
            "--index out"
        )


class GpuIndex(MainIndex):
    """Searches whole batches like MainIndex, with the search itself on a GPU."""

    def __init__(self, index: faiss.Index, vectors: Vectors, query: QuerySettings, device: int = 0) -> None:
        check_gpu()
        super().__init__(index, vectors, query)
        self._lock, self._resources = threading.Lock(), faiss.StandardGpuResources()
        self._resources.setTempMemory(_SCRATCH_BYTES)
        try:
            self.index = faiss.index_cpu_to_gpu(self._resources, device, index)
        except RuntimeError as error:
            kind, reason = type(index).__name__, str(error).strip().splitlines()[-1]
            raise ReleaseError(
                f"the GPU cannot take this {kind} ({reason}); build with an --index-memory-mb that holds "
                "whole vectors"
            ) from None

    def _approximate(self, query: Array, depth: int, mask: Array | None, nprobe: int) -> Found:
        length = min(
            _MOST, self.num_items, (2 if mask is not None else 1) * depth * max(1, self.query.refine_factor)
        )
        nprobe = min(nprobe, _MOST, self.num_lists)
        parameters = faiss.SearchParametersIVF(nprobe=nprobe) if self.num_lists > 1 else None  # type: ignore[call-arg]
        with self._lock:
            scores, positions = self.index.search(query, length, params=parameters)
        rows = positions + 1
        if mask is not None:
            rows = np.where(mask[np.maximum(rows, 0)], rows, 0)
        if self.query.refine_factor:
            return self._refined(query, rows, depth)
        return cut(np.where(rows > 0, rows, -1), np.where(rows > 0, scores, -np.inf), depth)
